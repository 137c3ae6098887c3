"""The arithmetic of savings on a hand-made run: one teacher, one student (killed once), two controls."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.compare.chains import Spend, all_in, c_opt, c_total, chain, payback_units, saving
from pipeline.values import measured

MINUTE = 1 / 60
SPENDS = {
    "teacher": Spend((), 30 * MINUTE),
    "student": Spend(("teacher",), (4 + 16) * MINUTE, retry_h=2 * MINUTE),
    "control_compute": Spend((), 12 * MINUTE),
    "control_steps": Spend((), 9 * MINUTE),
}


def test_chains_and_costs() -> None:
    assert chain("student", SPENDS) == ["teacher", "student"]
    assert c_total("student", SPENDS).v == pytest.approx(50 * MINUTE)
    assert all_in("student", SPENDS).v == pytest.approx(52 * MINUTE)
    assert c_total("control_compute", SPENDS).v == pytest.approx(12 * MINUTE)
    assert c_opt("student", "teacher", SPENDS).v == pytest.approx(20 * MINUTE)
    assert c_opt("student", "control_compute", SPENDS).v == pytest.approx(38 * MINUTE)
    assert saving("student", "control_compute", SPENDS).v == pytest.approx(1 - 50 / 12)


def test_payback() -> None:
    spent = c_opt("student", "teacher", SPENDS)
    units = payback_units(spent, measured(1.0 / 1000), measured(0.6 / 1000))
    assert units.v == pytest.approx(3.0e6)
    never = payback_units(c_opt("student", "control_compute", SPENDS), measured(6e-4), measured(6e-4))
    assert (never.v, never.why_null) == (None, "never: not cheaper")
    assert payback_units(measured(-1.0), measured(1e-3), measured(5e-4)).v == 0


def test_an_existing_teacher_cancels_where_both_have_it_and_is_null_where_not() -> None:
    spends = {**SPENDS, "teacher": dataclasses.replace(SPENDS["teacher"], work_h=0.0, existing=True)}
    assert c_opt("student", "teacher", spends).v == pytest.approx(20 * MINUTE)
    missing = saving("student", "control_compute", spends)
    assert missing.v is None
    assert "existing model" in str(missing.why_null)
    both = {**spends, "control_compute": Spend(("teacher",), 12 * MINUTE)}
    assert saving("student", "control_compute", both).v == pytest.approx(1 - 20 / 12)
