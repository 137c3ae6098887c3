"""Money: what a declared rate makes of hours, and what is refused to be called a price."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from make_result import make_row, value

from pipeline.cli.main import main
from pipeline.config.owner import check_owner
from pipeline.config.settings.cost import CostConfig, CostKind
from pipeline.errors import UserError
from pipeline.ledger.cost import check_cost, facility_energy, money, priced
from pipeline.ledger.values import declared, estimated, measured, null

SAID: dict[str, Any] = {"currency": "EUR", "source": "contract 7", "date": "2026-11-23"}
RENTED = CostConfig(kind=CostKind.rented, per_device_hour=2.5, **SAID)
OWNED = CostConfig(
    kind=CostKind.owned, per_device_hour=1.0, energy_price_per_kwh=0.3, pue=1.5, **SAID
)
KWH = 3.6e6


def test_without_a_rate_there_is_no_money() -> None:
    nothing = {
        name: null(why).to_json()
        for name, why in (("amount", "no rate declared"), ("facility_energy_j", "no PUE declared"))
    }
    assert money(3.0, CostConfig()) == {**nothing, "currency": None}


def test_a_rate_is_paid_for_what_the_scheduler_held() -> None:
    """Two hours on one GPU of a job that was granted four: 8 GPU-hours at 2.50."""
    found = money(2.0, RENTED, allocated=declared(8.0))
    assert found["amount"] == {"value": 20.0, "provenance": "declared", "why_missing": None}
    assert found["currency"] == "EUR"


def test_without_a_scheduler_attached_hours_are_a_lower_bound() -> None:
    for allocated in (None, null("no scheduler granted this run")):
        found = money(2.0, RENTED, allocated=allocated)
        assert found["amount"] == {"value": 5.0, "provenance": "estimated", "why_missing": None}


def test_neither_energy_nor_pue_is_added_to_a_rented_rate() -> None:
    with_pue = CostConfig(kind=CostKind.rented, per_device_hour=2.5, pue=1.5, **SAID)
    assert (
        money(2.0, with_pue, allocated=declared(2.0), energy_j=measured(9 * KWH))["amount"]["value"]
        == 5.0
    )


@pytest.mark.parametrize(
    ("energy_j", "amount", "provenance"),
    [
        (measured(2 * KWH), 4.0 + 2 * 1.5 * 0.3, "declared"),
        (estimated(2 * KWH), 4.0 + 2 * 1.5 * 0.3, "declared"),  # the worst of what it is made from
        (null("no counter"), 4.0, "estimated"),  # what is known of it, and so a lower bound
    ],
)
def test_owned_devices_may_pay_for_what_their_facility_draws(
    energy_j: Any, amount: float, provenance: str
) -> None:
    found = money(4.0, OWNED, allocated=declared(4.0), energy_j=energy_j)["amount"]
    assert found["value"] == pytest.approx(amount)
    assert found["provenance"] == provenance


def test_facility_energy_needs_a_declared_pue() -> None:
    assert facility_energy(measured(100.0), CostConfig()).why_missing == "no PUE declared"
    assert facility_energy(measured(100.0), OWNED).value == 150.0
    assert facility_energy(null("no counter"), OWNED).why_missing == "no counter"


def test_what_the_facility_drew_stands_beside_the_money() -> None:
    """Never in it: a rented rate has its power in it, and a PUE alone has no price."""
    with_pue = CostConfig(kind=CostKind.rented, per_device_hour=2.5, pue=1.5, **SAID)
    found = money(2.0, with_pue, allocated=declared(2.0), energy_j=measured(2 * KWH))
    assert found["facility_energy_j"] == {
        "value": 3 * KWH,
        "provenance": "declared",
        "why_missing": None,
    }
    assert found["amount"]["value"] == 5.0
    assert money(2.0, with_pue)["facility_energy_j"]["why_missing"] == "not read"
    assert (
        money(2.0, CostConfig(), energy_j=measured(KWH))["facility_energy_j"]["why_missing"]
        == "no PUE declared"
    )


def test_a_ledger_is_priced_again_with_what_it_knows() -> None:
    record = make_row("student", gpu=True)["ledger"]
    record["device_hours"]["attached"], record["gpu_hours"]["allocated"] = (
        value(2.0),
        value(16.0, "declared"),
    )
    assert priced(record, RENTED)["cost"]["amount"]["value"] == 40.0
    record["device_hours"]["attached"] = null("skipped").to_json()
    skipped = null("skipped").to_json()
    assert priced(record, RENTED)["cost"] == {
        "amount": skipped,
        "currency": None,
        "facility_energy_j": skipped,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": None}, "cost.source: a rate without its source is a guess"),
        ({"source": " "}, "cost.source: a rate"),
        ({"date": None}, "cost.date: a rate without its date is a guess"),
        ({"date": "23.11.2026"}, "cost.date: '23.11.2026' is no date"),
        ({"date": "20261123"}, "cost.date: '20261123' is no date"),
        ({"currency": None}, "cost.currency: a rate without its currency"),
        ({"currency": "euro"}, "cost.currency: 'euro' is none"),
        (
            {"per_device_hour": None},
            "cost.per_device_hour: is missing; say what a device-hour asks for",
        ),
        (
            {"per_device_hour": None, "kind": None},
            "cost.per_device_hour: is missing; give the rate, or leave",
        ),
        ({"per_device_hour": float("inf")}, "cost.per_device_hour: inf is out of range"),
        ({"energy_price_per_kwh": 0.3}, "cost.energy_price_per_kwh: is for owned devices"),
        (
            {"energy_price_per_kwh": 0.3, "kind": None},
            "cost.energy_price_per_kwh: is for owned devices",
        ),
        ({"energy_price_per_kwh": 0.3, "kind": CostKind.owned}, "cost.pue: is not declared"),
    ],
)
def test_a_price_nobody_can_vouch_for_is_refused(changes: dict[str, Any], said: str) -> None:
    settings = {"kind": CostKind.rented, "per_device_hour": 2.5, **SAID, **changes}
    with pytest.raises(UserError) as refused:
        check_cost(CostConfig(**settings))
    assert str(refused.value).startswith(said)


def test_whole_declarations_are_taken() -> None:
    for cost in (
        CostConfig(),
        RENTED,
        OWNED,
        CostConfig(per_device_hour=2.5, **SAID),
        CostConfig(pue=1.2),
    ):
        check_cost(cost)


# -- from the command line ------------------------------------------------------------------------


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compose and validate a command; return the run that would have been executed."""
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr("pipeline.cli.main._execute", lambda run, *_, **__: seen.append(run) or 0)

    def run(*args: str) -> Any:
        code = main(["recipe=baseline", *args], started_ns=0)
        return seen[-1] if code == 0 else None

    return run


def test_a_date_stays_text_wherever_it_is_written(composed: Any, tmp_path: Path) -> None:
    line = ("cost=rented", "cost.per_device_hour=2.5", "cost.currency=EUR", "cost.source=list")
    assert composed(*line, "cost.date=2026-11-23").cost.date == "2026-11-23"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "# mine?\ndefaults:\n  - /stage@stages.only: train\n  - override /cost: owned\nprimary_arm:"
        " only\ncost:\n  per_device_hour: 2\n  currency: EUR\n  source: list\n  date: 2026-11-23\n"
    )
    run = composed("--recipe-dir", str(tmp_path), "recipe=mine")
    assert (run.cost.date, run.cost.kind, run.cost.per_device_hour) == (
        "2026-11-23",
        CostKind.owned,
        2.0,
    )


def test_no_group_ships_a_rate_a_currency_or_a_pue(composed: Any) -> None:
    config = Path(__file__).parent.parent / "configs" / "cost"
    assert {path.stem for path in config.glob("*.yaml")} == {"undeclared", "rented", "owned"}
    cost = composed().cost
    assert cost == CostConfig()
    assert (cost.per_device_hour, cost.currency, cost.pue, cost.energy_price_per_kwh) == (None,) * 4
    for path in config.glob("*.yaml"):
        assert (
            "per_device_hour: null" in path.read_text()
            or "per_device_hour:" not in path.read_text()
        )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["cost=rented"], "cost.per_device_hour: is missing"),
        (["cost.pue=0.9"], "cost.pue: 0.9 is out of range; give a number of at least 1"),
        (["cost=borrowed"], "borrowed"),
        (
            ["tracking.require_owner=true"],
            "tracking.team, tracking.cost_center, tracking.purpose: not given",
        ),
        (
            ["tracking.require_owner=true", "tracking.team=v", "tracking.purpose=p"],
            "tracking.cost_center: not given",
        ),
    ],
)
def test_refusals_are_one_line(
    composed: Any, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    assert composed(*args) is None
    line = capsys.readouterr().err.strip()
    assert said in line
    assert len(line.splitlines()) == 1


# -- owners ---------------------------------------------------------------------------------------


def test_an_owner_can_be_required_of_a_run_or_of_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = {"team": "vision", "cost_center": "4711", "purpose": "release"}
    monkeypatch.delenv("PIPELINE_REQUIRE_OWNER", raising=False)
    check_owner({}, required=False)
    check_owner(owner, required=True)
    for missing in owner:
        with pytest.raises(UserError, match=f"tracking.{missing}: not given"):
            check_owner({**owner, missing: " "}, required=True)
    monkeypatch.setenv("PIPELINE_REQUIRE_OWNER", "1")
    check_owner(owner, required=False)
    with pytest.raises(
        UserError, match=r"tracking\.team, tracking\.cost_center, tracking\.purpose"
    ):
        check_owner({}, required=False)
    monkeypatch.setenv("PIPELINE_REQUIRE_OWNER", "0")
    check_owner({}, required=False)


def test_an_owner_is_refused_before_a_device_is_touched(composed: Any) -> None:
    assert composed("tracking.require_owner=true", "hardware.device=cuda:99") is None
    assert not list(Path.cwd().glob("mlruns/runs/*"))
    assert json.dumps(list(map(str, Path.cwd().glob("mlruns/*.db")))) == "[]"
