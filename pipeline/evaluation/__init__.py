"""What an artifact on disk is worth: its quality, and what it costs to serve."""
