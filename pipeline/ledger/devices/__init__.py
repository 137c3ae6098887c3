"""What this process computes on: a small class for each kind of device; `table.py` lists them."""
