"""How good an artifact is: documents of the test split, tasks of lm-eval."""
