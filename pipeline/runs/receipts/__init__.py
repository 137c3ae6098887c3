"""The receipt of a run: what was measured, on what, and what proves it."""
