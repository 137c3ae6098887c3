"""A run around any command: `python -m pipeline meter -- COMMAND`."""
