"""Hydra's callback around a multirun (`configs/config.yaml` names it); imported by Hydra alone."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback


class NoCopyOfSettings(Callback):
    """Hydra's own `multirun.yaml` would hold the overrides in clear; each run keeps its settings,
    redacted.
    """

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Send what Hydra writes there nowhere."""
        copy = Path(config.hydra.sweep.dir) / "multirun.yaml"
        with suppress(OSError):  # Hydra will meet it too, and that ends as a refusal
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.unlink(missing_ok=True)
            copy.symlink_to(os.devnull)
