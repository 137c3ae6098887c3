"""Verdicts as the gate makes them, from criteria on hand-made readings."""

from __future__ import annotations

from typing import Any

from pipeline.compare.verdict import Criterion, Outcome, decide
from pipeline.ledger.values import Provenance, Value, null
from pipeline.report.verdict import verdict_line

DERIVED = Provenance.DERIVED


def serving(
    saving: float = 0.382, ci: tuple[float, float] | None = (0.351, 0.41), **more: Any
) -> Criterion:
    given = {"outcome": Outcome.PASS, "threshold": 0.05, "level": 0.94, "n": 4, **more}
    return Criterion(name="serving", value=Value(saving, DERIVED), ci=ci, **given)


def accuracy(
    delta: float = -0.003, ci: tuple[float, float] | None = (-0.008, 0.002), **more: Any
) -> Criterion:
    given = {"outcome": Outcome.PASS, "threshold": -0.01, "level": 0.9, "n": 2000, **more}
    return Criterion(name="quality/accuracy", value=Value(delta, DERIVED), ci=ci, **given)


def payback(units: float | None = 2.1e6, why: str | None = None) -> Criterion:
    value = Value(units, DERIVED) if units is not None else null(why or "never: not cheaper")
    return Criterion(name="payback", outcome=Outcome.PASS, value=value, gating=False, unit="token")


def make_verdict(
    *criteria: Criterion, kind: str = "cuda", policy: str = "strict", **more: Any
) -> dict[str, Any]:
    """Return what the gate writes, without the checksum of its record."""
    criteria = criteria or (serving(), accuracy(), payback())
    side = {
        "reference": "models:/m@champion",
        "digest": "a" * 32,
        "path": "/store/a",
        "bytes": 10,
        "model": "m",
        "version": "3",
        "url": None,
        "charge": None,
    }
    charge = {
        "work_device_hours": 1.5,
        "retry_device_hours": 0.0,
        "model_flops": 1.0,
        "run_id": "r",
        "arm": "student",
    }
    outcome = decide(criteria)
    made: dict[str, Any] = {
        "schema": 2,
        "line": "",
        "verdict": outcome.value,
        "exit_code": {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4, "INVALID": 5}[outcome],
        "why": None,
        "criteria": [each.to_json() for each in criteria],
        "candidate": {
            **side,
            "reference": "new",
            "digest": "b" * 32,
            "version": None,
            "charge": charge,
        },
        "baseline": side,
        "policy": {"name": policy, "sha256": "c" * 32, "settings": {}},
        "task": "causal_lm",
        "primary": "accuracy",
        "unit": "token",
        "data": "d" * 32,
        "device": {"kind": kind, "name": "NVIDIA H200", "count": 1},
        "key": "e" * 32,
        "look": 1,
        "looks": 2,
        "readings": {},
        "run_id": "20261128-000000-release_check-0000",
        "created": "2026-11-28T00:00:00+00:00",
        **more,
    }
    made["line"] = more.get("line") or verdict_line(made)
    return made


def no_baseline() -> dict[str, Any]:
    made = make_verdict(
        why="there is no champion; bootstrap=true makes it the first", baseline=None
    )
    made |= {"verdict": "NO_BASELINE", "exit_code": 6, "criteria": []}
    return {**made, "line": verdict_line(made)}
