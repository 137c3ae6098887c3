"""Who pays for a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from pipeline.errors import UserError

OwnerPart: TypeAlias = Literal["team", "cost_center", "purpose"]
OWNER: tuple[OwnerPart, ...] = get_args(OwnerPart)  # who pays, on every run and row


def check_owner(owner: Mapping[str, str | None], *, required: bool) -> None:
    """Refuse a run that nobody owns where an owner is required, by the setting or by
    PIPELINE_REQUIRE_OWNER.

    Args:
        owner: Who pays, by the names in `OWNER`; others are not looked at.

    Raises:
        UserError: Naming all that is missing.
    """
    if not required and os.environ.get("PIPELINE_REQUIRE_OWNER", "") in ("", "0", "false"):
        return
    missing = [f"tracking.{name}" for name in OWNER if not (owner.get(name) or "").strip()]
    if missing:
        raise UserError(
            ", ".join(missing),
            "not given, and every run needs an owner here",
            f"give {missing[0]}=...",
        )
