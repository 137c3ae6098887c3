"""Versions of the libraries that have a hand in what is made: a part of keys."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# arithmetic, models, tokens, files
ALWAYS = ("torch", "transformers", "tokenizers", "safetensors")


@cache
def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def versions(libraries: Iterable[str] = ()) -> dict[str, str | None]:
    """Return the versions of the libraries that have a hand in every artifact, and of these."""
    return {name: _version(name) for name in sorted({*ALWAYS, *libraries})}
