"""Every setting, by group; what must not reach a file."""
