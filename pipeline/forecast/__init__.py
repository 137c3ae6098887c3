"""What a run will take, said before it begins, and what became of what was said."""
