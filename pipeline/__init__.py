"""A model-efficiency pipeline: every stage's GPU-hours and quality measured (`python -m pipeline
recipe=distill`).

A program of your own that runs under `python -m pipeline meter` names its phases and counts its
tokens with `phase` and `count`; both do nothing elsewhere. They are fetched when first asked for:
importing this package costs nothing.
"""

from __future__ import annotations

# not from typing, which takes longer to import than all the rest of this file
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pipeline.ledger.foreign import count, phase

__all__ = ["count", "phase"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.ledger import foreign

    globals()[name] = found = getattr(foreign, name)  # the next look-up does not come here
    return found
