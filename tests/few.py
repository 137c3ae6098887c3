"""A family of like cases, of which the default suite runs some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def few(cases: Sequence[Any], count: int) -> list[Any]:
    """Return all cases, of which all but `count`, spread evenly, are slow.

    For families whose members differ in a number or a name and fail together: `make test-all` runs
    every one.
    """
    kept = {round(at * (len(cases) - 1) / max(1, count - 1)) for at in range(count)}
    return [
        case
        if at in kept
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for at, case in enumerate(cases)
    ]
