"""Every setting with its default and range, a file per group; `run.py` holds them all."""
