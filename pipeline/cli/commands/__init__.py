"""What is no recipe is a command: `python -m pipeline COMMAND ...`, each with `--help`, one file
each.
"""

from __future__ import annotations

COMMANDS = {
    "meter": "meter any command into the same ledger and MLflow",
    "register": "make a model trained elsewhere an artifact with its cost",
    "sync": "deliver to MLflow what it has not had yet",
    "chargeback": "who spent what in a period",
    "weekly": "one page on what a period's GPU time went to",
    "compare": "several runs side by side: settings, figures, charts",
    "history": "the verdicts of a model's last releases, with alarms",
    "forecast": "what a run will take, before it is started",
    "attribute": "what each stage or setting of an arm brought",
    "verify": "whether the receipt of a run is true: every figure made again",
    "selftest": "judge a model against itself: what the release check can tell",
    "launch": "write the job file of Slurm, SkyPilot or Kubernetes for a run",
}
"""Commands by name: the one list to extend, each with a module here that has `main(argv,
started_ns)`.
"""


def run_command(argv: list[str], *, started_ns: int) -> int:
    """Run the command that `argv` begins with; return its exit code.

    Args:
        argv: Its name, and its own arguments.
        started_ns: Monotonic time when the process began.
    """
    from importlib import import_module

    module = import_module(f"{__name__}.{argv[0]}")
    return module.main(argv[1:], started_ns)
