"""Single-line faults that the default suite must find: `make mutants`.

Each mutant is one change to one line of the package. It is applied to a copy of the project, and
the tests that should notice it are run there, as the default suite runs them. A mutant that they
pass survives: what that line does is tested by nothing. `python tests/mutants.py NAME ...` runs
some.

The tests are first run without any fault, so that a failure is the fault's doing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

PROJECT = Path(__file__).resolve().parent.parent
WORKERS = int(os.environ.get("WORKERS", "2"))
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "mlruns", "results", "dist", "site"
)
NO_TEST_FAILED, TESTS_FAILED = 0, 1  # pytest's exit codes


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        what: What goes wrong, as a user would see it.
        file: Of the package.
        old: Text that stands there exactly once.
        new: What takes its place.
        tests: Files, or single tests, that should fail.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "silent-waste",
        "hours of programs that do not tell their waste count as free of it",
        "ledger/weekly.py",
        "if not tells(members):",
        "if False:",
        ("test_weekly.py",),
    ),
    Mutant(
        "lost-hours",
        "time that a killed attempt lost counts for one device only",
        "ledger/booking.py",
        "retry_ns=time.retry_ns + window.lost_ns * devices",
        "retry_ns=time.retry_ns + window.lost_ns",
        ("test_running.py", "test_worked_example.py"),
    ),
    Mutant(
        "waste-forgotten",
        "lost work is in no cause of waste, and shows as support",
        "ledger/record.py",
        "wasted_by[spent.lost_as] += spent.lost_ns",
        "wasted_by[spent.lost_as] += 0",
        ("test_reconcile.py", "test_report_waste.py"),
    ),
    Mutant(
        "goodput",
        "goodput of our own stages is the share of productive time of what was not wasted",
        "ledger/record.py",
        "measured(productive / total) if is_training",
        "measured(productive / (productive + support)) if is_training",
        ("test_reconcile.py",),
    ),
    Mutant(
        "phase-nesting",
        "an inner phase's time is booked to the outer one",
        "ledger/phases.py",
        "        finally:\n            self._book()\n            self._stack.pop()",
        "        finally:\n            self._stack.pop()\n            self._book()",
        ("test_phases.py",),
    ),
    Mutant(
        "nested-shares",
        "a GPU may be busier than it was attached for",
        "ledger/reconcile.py",
        "if small - large > max(NESTED_SHARE * large, NESTED_S / HOUR_S)",
        "if large - small > max(NESTED_SHARE * large, NESTED_S / HOUR_S)",
        ("test_reconcile.py",),
    ),
    Mutant(
        "pue",
        "the facility's energy is the boards'",
        "ledger/cost.py",
        "derive(lambda board, pue: board * pue, energy_j",
        "derive(lambda board, pue: board, energy_j",
        ("test_cost.py",),
    ),
    Mutant(
        "savings-sign",
        "a saving shows as a loss",
        "compare/savings.py",
        "derive(lambda a, b: 1 - a / b, of_arm, of_base)",
        "derive(lambda a, b: a / b - 1, of_arm, of_base)",
        ("test_compare_savings.py",),
    ),
    Mutant(
        "one-reading",
        "one lucky evaluation counts as quality reached",
        "compare/savings.py",
        "if target.reached(one.metric) and target.reached(two.metric)",
        "if target.reached(one.metric) or target.reached(two.metric)",
        ("test_compare_savings.py",),
    ),
    Mutant(
        "payback",
        "the volume at which an arm has paid is that of a base which costs nothing to serve",
        "compare/savings.py",
        "SECONDS_PER_HOUR * o / (c * s)",
        "SECONDS_PER_HOUR * o / c",
        ("test_compare_savings.py",),
    ),
    Mutant(
        "fixed-hours",
        "points of a curve are not charged with loading and preparing",
        "runs/comparison.py",
        'fixed_h + point["seconds"] / 3600',
        'point["seconds"] / 3600',
        ("test_running.py",),
    ),
    Mutant(
        "wilson",
        "Wilson's interval is Wald's, of no width where all is right",
        "compare/statistics.py",
        "half = math.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)",
        "half = math.sqrt(z2 * (k * (n - k) / n)) / (n + z2)",
        ("test_compare_statistics.py",),
    ),
    Mutant(
        "tango",
        "an arm that loses items gains them",
        "compare/statistics.py",
        "distance = b - c - n * d0",
        "distance = c - b - n * d0",
        ("test_compare_statistics.py",),
    ),
    Mutant(
        "worst-outcome",
        "the gate passes what an interval leaves open",
        "compare/verdict.py",
        "return Outcome.FAIL if high < threshold else Outcome.INCONCLUSIVE",
        "return Outcome.FAIL if high < threshold else Outcome.PASS",
        ("test_verdict.py",),
    ),
    Mutant(
        "temperature",
        "the divergence loses weight as the temperature rises",
        "distillation/losses.py",
        "sums = Sums(ce, loss.temperature**2 * value)",
        "sums = Sums(ce, loss.temperature * value)",
        ("test_losses.py",),
    ),
    Mutant(
        "gradient-weight",
        "the teacher's gradient keeps the weight of the labels",
        "distillation/losses.py",
        "gradient *= (1 - weight) * loss.temperature",
        "gradient *= weight * loss.temperature",
        ("test_losses.py",),
    ),
    Mutant(
        "warm-up",
        "training starts at the peak rate",
        "training/schedule.py",
        "return (step + 1) / warmup",
        "return 1.0",
        ("test_schedule.py", "test_training_loop.py"),
    ),
    Mutant(
        "damaged-checkpoint",
        "a checkpoint whose bytes changed is resumed from",
        "training/checkpoint.py",
        "if _sha256(path / name) != sums[name]:",
        "if not sums[name]:",
        ("test_training_loop.py",),
    ),
    Mutant(
        "generators",
        "a resumed training draws other numbers than the one that was not interrupted",
        "training/checkpoint.py",
        'torch.set_rng_state(generators["cpu"])',
        "pass",
        ("test_training_loop.py", "test_activations.py"),
    ),
    Mutant(
        "kept-to-checkpoint",
        "of a killed attempt the hours up to its first checkpoint count, not to its last",
        "runs/resume.py",
        'kept_ns = sum(saved[-1]["phases_ns"].values())',
        'kept_ns = sum(saved[0]["phases_ns"].values())',
        ("test_running.py",),
    ),
    Mutant(
        "teacher-in-key",
        "agreement with another teacher is read from the store",
        "runs/keys.py",
        "teacher=None if teacher is None else teacher.digest,",
        "teacher=None,",
        ("test_running.py",),
    ),
    Mutant(
        "seed-in-key",
        "the second seed's model is the first one's",
        "runs/keys.py",
        "seed=seed,\n        matched=",
        "matched=",
        ("test_running.py",),
    ),
    Mutant(
        "test-in-train",
        "documents of the test split stay in train",
        "data/splits.py",
        "for first in order[:place]:",
        "for first in order[1:place]:",
        ("test_data_shared.py",),
    ),
    Mutant(
        "bits-per-byte",
        "bits are nats",
        "evaluation/quality/scoring.py",
        'bits=of_text(columns["nats"]) / math.log(2)',
        'bits=of_text(columns["nats"])',
        ("test_assess_scoring.py",),
    ),
    Mutant(
        "reload",
        "a quantized model that reloads as another one ships",
        "quantization/reload_check.py",
        "if expected != found:",
        "if not found:",
        ("test_quantization.py::test_an_artifact_that_is_not_what_was_quantized_fails_its_stage",),
    ),
    Mutant(
        "lost-device",
        "a lost device is taken for the fault of an optional stage, and the next one is tried",
        "runs/runner.py",
        "isinstance(error, DiskFull | DeviceLost)",
        "isinstance(error, DiskFull)",
        ("test_memory.py::test_a_device_that_is_lost_ends_the_run_though_its_stage_is_optional",),
    ),
    Mutant(
        "module-energy",
        "a superchip's row holds its CPU's energy as the GPU's",
        "ledger/gpu_usage.py",
        "return _Energy(integral, integral, counter)",
        "return _Energy(counter, integral, counter)",
        ("test_gpu_sampler.py",),
    ),
    Mutant(
        "redaction",
        "a secret in a record that leaves the process is printed",
        "config/redaction.py",
        "return REDACTED if value and secret else _text(value, of_environment)",
        "return _text(value, of_environment)",
        ("test_redact.py",),
    ),
    Mutant(
        "stored-bytes",
        "an artifact whose bytes changed is reused",
        "store/artifacts.py",
        'manifest.get("digest") == digest == digest_folder(folder)[0]',
        'manifest.get("digest") == digest',
        ("test_store.py",),
    ),
)


def copy_project(folder: Path) -> Path:
    """Return a copy of the project that mutants may be applied to."""
    return Path(shutil.copytree(PROJECT, folder, ignore=LEFT_BEHIND, symlinks=True))


def failure(project: Path, tests: Sequence[str]) -> str:
    """Return which of the tests fails first in a copy of the project; empty where none does.

    Raises:
        RuntimeError: If pytest could not run them.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p"]
    environment = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "no:xdist", *(f"tests/{each}" for each in tests)],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (NO_TEST_FAILED, TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "" if done.returncode == NO_TEST_FAILED else " ".join(lines) or "one"


def is_killed(mutant: Mutant, project: Path) -> bool:
    """Return whether the tests notice a mutant; the copy is as before afterwards.

    Raises:
        RuntimeError: If its line is not there exactly once.
    """
    path = project / "pipeline" / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise RuntimeError(f"{mutant.name}: its line stands {source.count(mutant.old)} times")
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return bool(failure(project, mutant.tests))
    finally:
        path.write_text(source, encoding="utf-8")


def main(names: Sequence[str]) -> int:
    """Run mutants, all or those named; return 1 where one survives."""
    chosen = [each for each in MUTANTS if not names or each.name in names]
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(WORKERS) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(WORKERS):
            copies.put(copy_project(Path(root) / str(number)))

        def on_a_copy(mutant: Mutant | None) -> str:
            project = copies.get()
            try:
                if mutant is None:
                    tests = sorted({test for each in chosen for test in each.tests})
                    return failure(project, tests)
                return "killed" if is_killed(mutant, project) else "SURVIVED"
            except RuntimeError as error:
                return str(error)
            finally:
                copies.put(project)

        sound, ends = pool.submit(on_a_copy, None), [pool.submit(on_a_copy, m) for m in chosen]
        for mutant, end in zip(chosen, ends, strict=True):
            print(f"{end.result():9} {mutant.name}: {mutant.what}", flush=True)
        if sound.result():
            print(f"without any fault: {sound.result()}; what it killed says nothing")
        killed = sum(end.result() == "killed" for end in ends)
    print(f"{killed} of {len(chosen)} killed")
    return int(killed < len(chosen) or bool(sound.result()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
