"""Compile backend.cpp against the headers of the torch that is installed: `build.py FOLDER`.

It takes a minute, with g++ and ninja; what lies there already is kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # the device is not there yet
from torch.utils.cpp_extension import load

if __name__ == "__main__":
    load(
        "ersatz_compiled",
        [str(Path(__file__).parent / "backend.cpp")],
        build_directory=sys.argv[1],
        extra_cflags=["-O1", "-w"],
    )
