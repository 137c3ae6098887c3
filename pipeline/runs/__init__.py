"""The loop that everyone reads first, and what it is made of."""
