"""An accelerator named `ersatz`, which torch loads by its entry point when it is imported.

`ERSATZ` names the folder where `tests/accelerator/build.py` left the compiled part; in `used`
there, each process leaves how many operations it did on the device.
"""

from __future__ import annotations

import atexit
import os
import sys
import types
from pathlib import Path
from typing import Any

NAME = "ersatz"
COMPILED = "ersatz_compiled"


def autoload() -> None:
    """Make the device known to torch."""
    import torch

    built = os.environ.get("ERSATZ")
    if built is None or COMPILED in sys.modules:
        return
    sys.path.insert(0, built)
    compiled: Any = __import__(COMPILED)
    compiled.install()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(torch))
    torch.utils.generate_methods_for_privateuse1_backend()

    def tell() -> None:
        Path(built, "used").mkdir(exist_ok=True)
        Path(built, "used", f"{os.getpid()}").write_text(str(compiled.fallbacks()))

    atexit.register(tell)


def _module(torch: Any) -> types.ModuleType:
    """Return what torch asks of `torch.ersatz`. Random numbers are the host's."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    for name in ("set_device", "manual_seed", "manual_seed_all", "synchronize", "_lazy_init"):
        setattr(module, name, lambda *_, **__: None)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    return module
