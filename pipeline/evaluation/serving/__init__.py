"""What an artifact costs to run at the declared load."""
