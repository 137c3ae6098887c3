"""`python -m pipeline recipe=NAME [key=value ...]`; alone, it lists the recipes."""

from __future__ import annotations

import sys
import time

STARTED_NS = time.monotonic_ns()  # before any import that costs something: start-up is part of the bill

if __name__ == "__main__":
    from pipeline.cli import main

    sys.exit(main(sys.argv[1:], started_ns=STARTED_NS))
