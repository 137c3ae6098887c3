"""Start-up time of the command against a bare Hydra application, in turns.

    python benchmarks/startup.py [--rounds 10]

Claim: `--help`, `--cfg job` and a refusal take at most 0.8 s and at most twice a bare Hydra
application. Commands are run in turns (one round: each once), so that a machine's drift meets all
alike; medians and ratios of one run are shown.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import save_result

BARE = """
import hydra
from dataclasses import dataclass, field
from hydra.core.config_store import ConfigStore

@dataclass
class Config:
    steps: int = 1

ConfigStore.instance().store(name="config", node=Config)

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg): pass

main()
"""
PIPELINE = ["-m", "pipeline"]


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the commands by name."""
    bare = folder / "bare.py"
    bare.write_text(BARE)
    return {
        "bare Hydra, --cfg job": [str(bare), "--cfg", "job"],
        "list of recipes": PIPELINE,
        "--help": [*PIPELINE, "--help"],
        "--cfg job": [*PIPELINE, "recipe=distill", "--cfg", "job"],
        "refusal": [*PIPELINE, "recipe=distill", "training.steps=x"],
    }


def seconds(arguments: list[str], cwd: Path) -> float:
    """Return the wall seconds of one command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        all_commands = commands(folder)
        for arguments in all_commands.values():
            seconds(arguments, folder)  # warm: byte code, file cache
        readings: dict[str, list[float]] = {what: [] for what in all_commands}
        for _ in range(rounds):
            for what, arguments in all_commands.items():
                readings[what].append(seconds(arguments, folder))
    medians = {what: statistics.median(values) for what, values in readings.items()}
    bare = medians["bare Hydra, --cfg job"]
    lines = [
        f"{what:<24} median {median:.3f} s   {median / bare:.2f}x bare Hydra"
        for what, median in medians.items()
    ]
    print("\n".join(lines))
    worst = {
        what: {"median_s": median, "ratio": median / bare, "n": rounds}
        for what, median in medians.items()
    }
    save_result("startup", {"commands": worst}, "\n".join(lines))


if __name__ == "__main__":
    main()
