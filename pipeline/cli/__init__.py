"""Command lines: argv -> Hydra -> a typed `Run` -> exit code. Nothing outside knows Hydra."""
