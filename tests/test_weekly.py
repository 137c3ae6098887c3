"""A period's GPU time on one page, from real MLflow stores that journals were delivered to; every
figure worked by hand.
"""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from lxml import html
from make_result import make_run, null, value
from mlflow import MlflowClient
from test_chargeback import DAY, NOON, NOV, PERIOD, a_row
from test_history import a_verdict, write_gate

from pipeline.cli.commands.weekly import main, read_settings
from pipeline.ledger.charge_lines import TOTAL, lines
from pipeline.ledger.charge_sources import stored_runs_facts
from pipeline.ledger.charges import charges, not_counted_twice
from pipeline.ledger.journal import Journal
from pipeline.ledger.metrics import BY_KEY, WASTE_CAUSES
from pipeline.ledger.weekly import NOT_TOLD, losses
from pipeline.report.waste import REMEDIES, SHARED
from pipeline.tracking import deliver as tracking
from pipeline.tracking.deliver import _asked_for, deliver, stored_runs
from pipeline.tracking.registry import Candidate, promote
from pipeline.tracking.sqlite_file import runs_between

HOUR_NS = 3600e9
SPEECH = {"team": "speech"}


def write_run(
    root: Path,
    run_id: str,
    rows: list[dict[str, Any]],
    *,
    at: float = NOON,
    team: str | None = "vision",
    recipe: str = "distill",
    device: str = "NVIDIA H200",
    rate: float | None = None,
    currency: str = "EUR",
    budget_h: float | None = None,
    ended: bool = True,
    status: str = "FINISHED",
    forecast: dict[str, Any] | None = None,
    outside: dict[str, dict[str, int]] | None = None,
    tags: dict[str, str] | None = None,
) -> Path:
    """Write and deliver a run: a row a minute up to `at`, where it ends; then 6 minutes of
    comparison and 3 of overhead, which are all import, are in its hours.
    """
    folder = root / "runs" / run_id
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    began = at - 60.0 * (len(rows) + 1)
    journal.write(
        "run_start",
        run_id=run_id,
        started_ns=0,
        attempt=1,
        recipe=recipe,
        question="?",
        experiment="distill",
        tracking_uri=None,
        tags={**({"team": team} if team else {}), **(tags or {})},
        environment={"device": device},
        datasets=[],
        params={
            "model.name": "m1",
            "budget.device_hours": budget_h,
            "cost.per_device_hour": rate,
            "cost.currency": None if rate is None else currency,
        },
        t=began,
        mono_ns=0,
    )
    for index, row in enumerate(rows, 1):
        journal.write("row", row=row, t=began + 60.0 * index, mono_ns=index)
    if ended:
        run = make_run(rows)
        run |= {} if outside is None else {"phases_device_ns": outside}
        journal.write(
            "run_end",
            status=status,
            why=None,
            primary_arm="student",
            run=run,
            description="",
            files=[],
            **({} if forecast is None else {"forecast": forecast}),
            t=at,
            mono_ns=len(rows) + 1,
        )
    else:
        journal.write("heartbeat", t=at, mono_ns=round(2 * HOUR_NS))
    journal.close()
    deliver(folder)
    return folder


def foreseen(
    value: float | None, low: float = 0.0, high: float = 0.0, actual: float | None = None
) -> dict[str, Any]:
    """Return the hours of a forecast as a run's last line has them."""
    if value is None:
        return {"expected": None, "why_missing": "nothing like it was done here", "actual": None}
    expected = {"value": value, "low": low, "high": high}
    return {"expected": expected, "why_missing": None, "actual": actual}


def parent(root: Path, run_id: str) -> Any:
    """Return what MLflow holds of a run."""
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (found,) = client.search_runs(["1"], f"tags.`pipeline.run` = '{run_id}'")
    return found.data


# -- what MLflow is told --------------------------------------------------------------------------


def test_the_causes_of_what_is_wasted_outside_of_stages_reach_mlflow(root: Path) -> None:
    """Import 0.5 h and waiting for others 0.25 h around the stages, 0.1 h of it in the comparison
    pass; generating is no waste.
    """
    outside = {
        "overhead": {"import": round(0.5 * HOUR_NS), "idle_rank": round(0.15 * HOUR_NS)},
        "compare": {"idle_rank": round(0.1 * HOUR_NS), "generate": round(2 * HOUR_NS)},
    }
    write_run(root, "run-1", [a_row()], outside=outside)
    told = {
        key.removeprefix("compute/run_wasted_").removesuffix("_device_hours"): hours
        for key, hours in parent(root, "run-1").metrics.items()
        if key.startswith("compute/run_wasted_")
    }
    assert told == pytest.approx(
        {"import": 0.5, "idle_rank": 0.25, "data_wait": 0, "comm_exposed": 0, "unattributed": 0}
    )


def test_a_forecast_and_what_it_came_to_reach_mlflow(root: Path) -> None:
    write_run(root, "run-1", [a_row()], forecast=foreseen(0.5, 0.4, 0.65, 0.55))
    write_run(root, "run-2", [a_row()], forecast=foreseen(0.5, 0.4, 0.65), status="FAILED")
    write_run(root, "run-3", [a_row()], forecast=foreseen(None))
    write_run(root, "run-4", [a_row()])
    held = {
        run: {k: v for k, v in parent(root, run).metrics.items() if k.startswith("forecast/")}
        for run in ("run-1", "run-2", "run-3", "run-4")
    }
    key = "forecast/device_hours"
    expected = {key: 0.5, f"{key}_low": 0.4, f"{key}_high": 0.65}
    assert held == {
        "run-1": {**expected, "forecast/actual_device_hours": 0.55},
        "run-2": expected,
        "run-3": {},
        "run-4": {},
    }
    assert set(held["run-1"]) <= set(BY_KEY)
    nulls = {run: parent(root, run).tags for run in ("run-2", "run-3", "run-4")}
    why = "the run did not finish, or took a part over"
    assert nulls["run-2"]["null.forecast/actual_device_hours"] == why
    assert nulls["run-3"][f"null.{key}"] == "nothing like it was done here"
    assert not [name for name in nulls["run-4"] if "forecast" in name]


# -- the page -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """The page of a period in its three forms."""

    text: str
    markdown: str
    html: Any

    @property
    def words(self) -> str:
        """The terminal's text on one line."""
        return " ".join(self.text.split())

    def table(self, section: str) -> list[list[str]]:
        """Return the rows of a section's table, its head first; nothing where there is none."""
        found = self.html.xpath(f"//section[@aria-labelledby='{section}']/div/table")
        return [
            [text_of(cell) for cell in row.xpath("./*")]
            for each in found
            for row in each.iter("tr")
        ]

    def said(self, section: str) -> list[str]:
        """Return the paragraphs and items of a section."""
        own = f"//section[@aria-labelledby='{section}']"
        return [text_of(each) for each in self.html.xpath(f"{own}/p | {own}/ul/li")]

    def prose(self, section: str) -> str:
        """Return them in one."""
        return " ".join(self.said(section))

    @property
    def sections(self) -> list[str]:
        return self.html.xpath("//section/@aria-labelledby")

    @property
    def badge(self) -> str:
        return text_of(self.html.xpath("//h1/span")[0])

    @property
    def verdict(self) -> str:
        return text_of(self.html.xpath("//h1")[0]).removeprefix(self.badge).strip()


def text_of(element: Any) -> str:
    return " ".join(element.text_content().split())


@pytest.fixture
def weekly(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """Run the command; return its page."""

    def run(*args: str) -> Shown:
        given = args if "--from" in args or "--to" in args else (*PERIOD, *args)
        capsys.readouterr()
        assert main([*given, "--root", str(root)]) == 0
        text = capsys.readouterr().out
        page = Path(text.rpartition("report: ")[2].strip())
        markdown = page.with_name("report.md").read_text()
        return Shown(text, markdown, html.document_fromstring(page.read_text()))

    return run


Weekly = Callable[..., Shown]


def test_a_store_or_a_period_without_runs_says_so(root: Path, weekly: Weekly) -> None:
    shown = weekly()
    assert (shown.badge, shown.verdict) == (
        "NO BUDGET",
        "No run spent anything in this period. No budget is declared, neither by --budget nor by a"
        " run (budget.device_hours).",
    )
    assert shown.sections == ["spent"]
    assert shown.prose("spent") == "No run spent anything in this period."
    write_run(root, "run-1", [a_row()], at=NOV - DAY, forecast=foreseen(0.5, 0.4, 0.65, 0.55))
    assert weekly().sections == ["spent"]
    assert "31" not in weekly().markdown  # minutes of October


# -- spent against budget -------------------------------------------------------------------------


def test_what_runs_declared_is_what_they_are_held_against(root: Path, weekly: Weekly) -> None:
    """63 minutes of 2 h, 31 of 1 h, 31 without a budget: 94 of 180, and 125 in all."""
    write_run(root, "run-1", [a_row("teacher"), a_row()], budget_h=2.0)
    write_run(root, "run-2", [a_row(owner=SPEECH)], budget_h=1.0, team="speech")
    write_run(root, "run-3", [a_row(owner=SPEECH)], team="speech")
    shown = weekly()
    assert shown.badge == "WITHIN BUDGET"
    assert shown.verdict == (
        "2.08 device-hours on NVIDIA H200 in 3 runs. 1.57 of 3.00 allowed device-hours in 2 runs"
        " that had a budget; 1 run had none."
    )
    assert shown.table("spent") == [
        ["team", "device", "runs", "device-hours", "against budget"],
        ["vision", "NVIDIA H200", "1", "1.05", "1.05 of 2.00 in 1 run"],
        ["speech", "NVIDIA H200", "2", "1.03", "0.517 of 1.00 in 1 run, 1 without"],
        ["all", "NVIDIA H200", "3", "2.08", "1.57 of 3.00 in 2 runs, 1 without"],
    ]


def test_a_budget_is_of_a_whole_run_and_the_page_of_a_period(root: Path, weekly: Weekly) -> None:
    """The teacher's 32 minutes were October's; 31 are November's, and 63 count against 1 h."""
    write_run(root, "run-1", [a_row("teacher"), a_row()], at=NOV + 60.0, budget_h=1.0)
    shown = weekly()
    assert shown.badge == "OVER BUDGET"
    assert shown.table("spent")[1] == [
        *("vision", "NVIDIA H200", "1", "0.517", "1.05 of 1.00 in 1 run")
    ]
    note = "1 run with a budget began before the period: all that it took counts against it"
    assert note in shown.prose("notes")


@pytest.mark.parametrize(
    ("budget", "badge", "said"),
    [
        ("2", "OVER BUDGET", "2.08 of 2.00 allowed device-hours."),
        ("2.5", "WITHIN BUDGET", "2.08 of 2.50 allowed device-hours."),
    ],
)
def test_a_budget_of_the_period_takes_the_place_of_what_runs_declared(
    root: Path, weekly: Weekly, budget: str, badge: str, said: str
) -> None:
    write_run(root, "run-1", [a_row("teacher"), a_row()], budget_h=2.0)
    write_run(root, "run-2", [a_row(owner=SPEECH)], team="speech")
    write_run(root, "run-3", [a_row(owner=SPEECH)], team="speech")
    shown = weekly("--budget", budget)
    assert (shown.badge, shown.verdict.partition("runs. ")[2]) == (badge, said)
    assert [row[-1] for row in shown.table("spent")[1:]] == [
        *("-", "-", f"2.08 of {float(budget):.2f}")
    ]
    alone = weekly("--budget", budget, "--by", "recipe")
    assert alone.table("spent")[1:] == [
        ["distill", "NVIDIA H200", "3", "2.08", f"2.08 of {float(budget):.2f}"]
    ]


def test_groups_have_budgets_of_their_own(root: Path, weekly: Weekly) -> None:
    write_run(root, "run-1", [a_row("teacher"), a_row()])
    write_run(root, "run-2", [a_row()], team=None)
    given = ("--budget", "vision=1", "--budget=(no team)=1", "--budget", "audio=7")
    shown = weekly(*given)
    assert shown.badge == "OVER BUDGET"
    assert shown.verdict.endswith(
        "1 of 3 groups with a budget spent more than that: vision. Nothing was spent by audio."
    )
    # a row says whose it is where its run does not
    owners = [row[0] for row in shown.table("spent")[1:]]
    assert owners == ["vision", "(no team)", "all", "audio"]
    assert [row[3:] for row in shown.table("spent")[1:]] == [
        ["1.42", "1.42 of 1.00"],
        ["0.150", "0.150 of 1.00"],
        ["1.57", "-"],
        ["0", "0 of 7.00"],
    ]
    within = weekly("--budget", "vision=2")
    assert within.badge == "WITHIN BUDGET"
    assert within.verdict.endswith("0 of 1 group with a budget spent more than that.")


def test_hours_of_two_device_models_are_never_added(root: Path, weekly: Weekly) -> None:
    write_run(root, "run-1", [a_row("teacher"), a_row()], budget_h=2.0)
    cheap = a_row(device="NVIDIA A100")
    write_run(root, "run-2", [cheap], device="NVIDIA A100", budget_h=0.5)
    shown = weekly()
    assert shown.badge == "OVER BUDGET"  # of 30 minutes 31 were taken
    assert shown.verdict == (
        "0.517 device-hours on NVIDIA A100 in 1 run; 1.05 device-hours on NVIDIA H200 in 1 run."
        " On NVIDIA A100 0.517 of 0.500 allowed device-hours in 1 run that had a budget."
        " On NVIDIA H200 1.05 of 2.00 allowed device-hours in 1 run that had a budget."
    )
    devices = [row[:4] for row in shown.table("spent")[1:]]
    assert devices == [
        ["vision", "NVIDIA H200", "1", "1.05"],
        ["vision", "NVIDIA A100", "1", "0.517"],
        ["all", "NVIDIA A100", "1", "0.517"],
        ["all", "NVIDIA H200", "1", "1.05"],
    ]
    assert [row[:4] for row in shown.table("waste")] == [
        ["cause", "device", "device-hours", "share"],
        ["import", "NVIDIA A100", "0.0500", "9.7%"],
        ["import", "NVIDIA H200", "0.0500", "4.8%"],
        ["data_wait", "NVIDIA H200", "0.0450", "4.3%"],
        ["data_wait", "NVIDIA A100", "0.0183", "3.5%"],
    ]
    total = weekly("--budget", "9")
    assert total.badge == "NOT COMPARED"
    said = "9.00 device-hours is not compared: hours of 2 device models are not added."
    assert total.verdict.endswith(said)
    assert {row[-1] for row in total.table("spent")[1:]} == {"-"}
    group = weekly("--budget", "vision=9")
    assert group.badge == "NOT ALL COMPARED"
    assert group.verdict.endswith("of different device models are not added: vision.")
    assert "1.57" not in "".join(each.text + each.markdown for each in (shown, total, group))


def test_a_run_on_two_device_models_has_a_budget_that_is_not_compared(
    root: Path, weekly: Weekly
) -> None:
    rows = [a_row("teacher", device="NVIDIA A100"), a_row()]
    write_run(root, "run-1", rows, budget_h=2.0)
    shown = weekly()
    assert shown.badge == "NOT COMPARED"
    assert shown.verdict.endswith("No budget that a run declared can be compared.")
    note = "1 run with a budget used several device models, whose hours are not added: left out"
    assert note in shown.prose("notes")


def test_money_of_two_currencies_is_never_added(root: Path, weekly: Weekly) -> None:
    """31 minutes at 3 EUR, the same at 2 USD, and 31 without a rate."""
    write_run(root, "run-1", [a_row(rate=3.0)], rate=3.0)
    write_run(root, "run-2", [a_row(rate=2.0, currency="USD")], rate=2.0, currency="USD")
    write_run(root, "run-3", [a_row()])
    shown = weekly()
    assert shown.table("spent") == [
        ["team", "device", "runs", "device-hours", "against budget", "money"],
        [*("vision", "NVIDIA H200", "3", "1.55", "-"), "1.55 EUR, 1.03 USD, 0.517 h unpriced"],
    ]
    said = "0.517 device-hours on NVIDIA H200 have no declared rate: money leaves them out"
    assert said in shown.prose("notes")


def test_more_groups_than_fit_stand_together(root: Path, weekly: Weekly) -> None:
    for number in range(8):
        row = a_row(owner={"team": f"team-{number}"})
        write_run(root, f"run-{number}", [row], team=f"team-{number}")
    rows = weekly().table("spent")
    assert [row[0] for row in rows[1:]] == [*(f"team-{n}" for n in range(6)), "2 others", "all"]
    assert [row[2:4] for row in rows[-2:]] == [["2", "1.03"], ["8", "4.13"]]
    # one whose budget is declared is never among the others
    named = weekly("--budget", "team-7=0.5").table("spent")
    assert [row[0] for row in named[1:]] == [*(f"team-{n}" for n in range(8)), "all"]
    assert named[8][-1] == "0.517 of 0.500"


@pytest.mark.parametrize(
    ("key", "group"), [("model", "m1"), ("recipe", "distill"), ("purpose", "p")]
)
def test_groups_are_those_of_the_chargeback(
    root: Path, weekly: Weekly, key: str, group: str
) -> None:
    write_run(root, "run-1", [a_row()], tags={"purpose": "p"})
    head, row = weekly("--by", key).table("spent")
    assert (head[0], row[0]) == ("model_name" if key == "model" else key, group)


# -- waste ----------------------------------------------------------------------------------------


def test_waste_has_its_causes_the_worst_place_and_a_remedy(root: Path, weekly: Weekly) -> None:
    """5% of stages waits for data: 1.1 minutes, and 1.6 of the teacher. Of overhead 3 minutes are
    import, twice. 94 minutes were spent.
    """
    write_run(root, "run-1", [a_row("teacher"), a_row()])
    write_run(root, "run-2", [a_row()])
    shown = weekly()
    assert shown.prose("waste") == (
        "0.163 of the 1.57 device-hours whose waste is known were wasted: 10.4%."
    )
    assert shown.table("waste") == [
        ["cause", "device-hours", "share", "most in", "first thing to try"],
        ["import", "0.100", "6.4%", "outside stages, run-2", REMEDIES["import"].here],
        ["data_wait", "0.0633", "4%", "teacher, run-1", "-"],  # advised on from 5% on
    ]


def test_the_wasted_hours_are_those_of_the_chargeback(root: Path) -> None:
    """Whatever tells its waste and whatever does not: a silent metered command, a killed run, a
    reused stage, a run of an older release.
    """
    write_run(root, "run-1", [a_row("teacher"), a_row()])
    write_run(root, "run-2", [a_row(owner=SPEECH)], ended=False)
    write_run(root, "run-3", [silent()], team="meters", recipe="meter")
    write_run(root, "run-4", [a_row("teacher", reused="run-1"), a_row()], team="speech")
    stored, _ = stored_runs(f"sqlite:///{root / 'mlflow.db'}", 0, round(2e12))
    known = stored_runs_facts(stored)
    paid = [charge for run in not_counted_twice(known)[0] for charge in charges(run)]
    for by in ("team", "recipe", "model_name"):
        wasted = {line.device: line.wasted_h for line in lines(paid, by) if line.kind == TOTAL}
        found: dict[str, float] = {}
        for each in losses(paid, stored, known, by):
            found[each.device] = found.get(each.device, 0.0) + each.device_h
        assert found == pytest.approx(wasted)


def silent() -> dict[str, Any]:
    """Return the row of a metered command of 22 minutes that does not tell its phases."""
    row = a_row(type="metered", owner={"team": "meters"})
    hours = row["ledger"]["device_hours"]
    hours |= {name: null("no phases") for name in ("productive", "support", "wasted")}
    hours["wasted_by"] = {}
    return row


def test_hours_without_waste_told_are_in_no_share(root: Path, weekly: Weekly) -> None:
    write_run(root, "run-1", [silent()], team="meters", recipe="meter")
    shown = weekly()
    assert shown.prose("waste") == "No stage tells its waste."
    assert shown.table("waste") == []
    write_run(root, "run-2", [a_row()])
    shown = weekly()
    assert shown.prose("waste").startswith("0.0683 of the 0.517 device-hours")
    said = "0.517 device-hours on NVIDIA H200 do not tell waste: shares leave them out"
    assert said in shown.prose("notes")


def test_what_runs_inside_a_metered_one_tell_is_its_waste(root: Path, weekly: Weekly) -> None:
    """The command's 22 minutes are those of the run inside: 10 + 2 of a stage, of which 5% waits
    for data, and 3 of import. Its own overhead of 3 minutes is import, too.
    """
    write_run(root, "outer", [silent()], team="meters", recipe="meter")
    write_run(root, "inner", [a_row("arm", owner={"team": "meters"})], tags={"nested_in": "outer"})
    shown = weekly()
    assert [row[:4] for row in shown.table("waste")[1:]] == [
        ["import", "0.100", "20%", "student, outer"],
        ["data_wait", "0.0100", "2%", "student, outer"],
    ]
    assert "1 run inside a metered run is part of it" in shown.prose("notes")


def test_the_remedy_is_that_of_the_worst_place(root: Path, weekly: Weekly) -> None:
    """A metered command loads data itself; ranks wait for one another."""
    waits = a_row(type="metered")
    lost_h = 4 / 60
    waits["ledger"]["device_hours"]["wasted"] = value(lost_h)
    waits["ledger"]["device_hours"]["wasted_by"] = {"data_wait": value(lost_h)}
    write_run(root, "run-1", [waits])
    ranks = a_row("teacher")
    ranks["ledger"]["wall_s"] = value(ranks["ledger"]["wall_s"]["value"] / 2)
    ranks["ledger"]["device_hours"]["wasted"] = value(2 * lost_h)
    ranks["ledger"]["device_hours"]["wasted_by"] = {"comm_exposed": value(2 * lost_h)}
    write_run(root, "run-2", [ranks])
    remedies = {row[0]: row[-1] for row in weekly().table("waste")[1:]}
    assert remedies["data_wait"] == REMEDIES["data_wait"].elsewhere != REMEDIES["data_wait"].here
    assert remedies["comm_exposed"] == SHARED


def test_a_cause_that_is_not_told_says_so(
    root: Path, weekly: Weekly, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "outside_causes", lambda _: {})  # as an older release delivers
    old = a_row()
    old["ledger"]["device_hours"]["wasted_by"] = {}
    write_run(root, "run-1", [old])
    shown = weekly()
    assert [row[:4] for row in shown.table("waste")[1:]] == [
        [NOT_TOLD, "0.0683", "13.2%", "outside stages, run-1"]
    ]
    assert shown.table("waste")[1][-1] == "-"
    note = "0.0683 wasted device-hours on NVIDIA H200 are of runs that do not tell their cause"
    assert note in shown.prose("notes")


def test_at_most_five_causes_are_listed(root: Path, weekly: Weekly) -> None:
    row = a_row()
    hours = row["ledger"]["device_hours"]
    hours["wasted_by"] = {cause: value((n + 1) / 100) for n, cause in enumerate(WASTE_CAUSES)}
    hours["wasted"] = value(0.28)
    write_run(root, "run-1", [row], outside={"overhead": {}, "compare": {}})
    shown = weekly()
    assert [each[0] for each in shown.table("waste")[1:]] == [*WASTE_CAUSES][::-1][:5]
    rest = f"Not shown: {WASTE_CAUSES[1]} 0.0200, {WASTE_CAUSES[0]} 0.0100."
    assert shown.prose("waste").endswith(rest)


def test_runs_over_their_own_budgets_are_named(root: Path, weekly: Weekly) -> None:
    """31 minutes each; one was allowed six of them, and all together are within what they may."""
    write_run(root, "run-a", [a_row()], budget_h=0.1)
    write_run(root, "run-b", [a_row()], budget_h=4.0)
    shown = weekly()
    assert "1 run took more than its own budget: run-a" in shown.prose("notes")
    assert shown.badge == "WITHIN BUDGET"


def test_a_budget_of_a_group_that_spent_nothing_is_not_kept(root: Path, weekly: Weekly) -> None:
    write_run(root, "run-a", [a_row()])
    shown = weekly("--budget", "visoin=3")
    assert shown.badge == "NOT COMPARED"
    assert shown.verdict.endswith("Nothing was spent by visoin.")


def test_a_database_of_others_is_not_touched(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other/mlflow.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE experiments (x)")
        database.commit()
    before = path.read_bytes()
    assert main([*PERIOD, "--root", str(path.parent)]) == 1
    assert "holds no MLflow store" in capsys.readouterr().err
    assert path.read_bytes() == before


# -- forecasts ------------------------------------------------------------------------------------


def test_forecasts_are_held_against_what_came(root: Path, weekly: Weekly) -> None:
    """Errors of 10%, 150% and nothing; widths of 40%, 150% and 20%; the second lies outside."""
    write_run(root, "run-1", [a_row()], forecast=foreseen(1.0, 0.8, 1.2, 1.1))
    write_run(root, "run-2", [a_row()], forecast=foreseen(2.0, 1.0, 4.0, 5.0))
    write_run(root, "run-3", [a_row()], forecast=foreseen(1.0, 0.9, 1.1, 1.0))
    for number, told in enumerate((foreseen(None), foreseen(1.0, 0.9, 1.1))):
        write_run(root, f"untold-{number}", [], forecast=told)
    late = foreseen(1.0, 0.9, 1.1, 9.0)
    write_run(root, "run-4", [], at=NOV - 1.0, forecast=late)
    write_run(root, "run-5", [], at=NOV + 30 * DAY, forecast=late)
    assert weekly().prose("forecasts") == (
        "Forecasts covered 2 of 3 runs (90% is what they claim), median error 10%, median width"
        " 40%: of the parts that were foretold, as far as every one of them ended."
    )


def test_without_forecasts_there_is_no_such_section(root: Path, weekly: Weekly) -> None:
    write_run(root, "run-1", [a_row()])
    assert "forecasts" not in weekly().sections


# -- verdicts and savings -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Five releases of m on days 2 to 6, the last a step down that was given again; one of n."""
    root = tmp_path_factory.mktemp("releases")
    shutil.copy(empty_store, root / "mlflow.db")
    for n in range(1, 5):
        write_gate(root, a_verdict(n, saving=0.2 + n / 1000))
    last = a_verdict(5, saving=0.02, verdict="FAIL")
    write_gate(root, last)
    write_gate(root, {**last, "run_id": "run-5b", "recorded": "run-5"})
    write_gate(root, a_verdict(7, model="n", baseline=baseline_of("n")))
    promote(f"sqlite:///{root / 'mlflow.db'}", "m", Candidate(f"{4:032x}", "", "/p"), None, {})
    return root / "mlflow.db"


@pytest.fixture
def released(root: Path, releases: Path) -> Path:
    shutil.copy(releases, root / "mlflow.db")
    return root


def baseline_of(model: str) -> dict[str, Any]:
    return {**a_verdict(7)["baseline"], "model": model}


def test_verdicts_of_the_period_are_counted_once(released: Path, weekly: Weekly) -> None:
    shown = weekly()
    assert shown.prose("verdicts").startswith("6 releases: 5 PASS, 1 FAIL.")
    table = shown.table("verdicts")
    assert table[0] == [
        *("model", "release", "verdict", "serving saved", "quality change against margin")
    ]
    assert [row[:3] for row in table[1:]] == [
        ["m", "00000000", "PASS"],
        ["m", "00000000", "PASS"],
        ["m", "00000000", "PASS"],
        ["m", "v1 00000000", "PASS"],
        ["m", "00000000", "FAIL"],
        ["n", "00000000", "PASS"],
    ]
    assert table[1][3] == "+20.10% [+18.10, +22.10]"
    assert table[5][3] == "+2.00% [+0.00, +4.00]"
    assert table[1][4].endswith(" vs -1")
    (alarm,) = [
        text_of(each)
        for each in shown.html.xpath("//section[@aria-labelledby='verdicts']//li/strong")
    ]
    assert alarm.startswith("m: ALARM: serving has stepped down: ")


def test_a_period_has_its_own_verdicts_and_charts_what_was_known_then(
    released: Path, weekly: Weekly
) -> None:
    shown = weekly("--from", "2026-11-04", "--to", "2026-11-06")
    assert shown.prose("verdicts") == "2 releases: 2 PASS."  # the step came later
    assert [row[2] for row in shown.table("verdicts")[1:]] == ["PASS", "PASS"]
    (chart,) = shown.html.xpath("//figure")
    rows = [[text_of(cell) for cell in row.xpath("./*")] for row in chart.xpath(".//tbody/tr")]
    assert [row[0][:10] for row in rows] == [f"2026-11-0{day}" for day in (2, 3, 4, 5)]
    assert rows[0][1:] == ["+20.10% [+18.10, +22.10]", "PASS"]
    assert chart.xpath(".//*[local-name()='svg']")
    later = weekly("--from", "2026-11-20", "--to", "2026-11-21")
    assert later.prose("verdicts") == "No gate judged a release in this period."
    assert [text_of(each) for each in later.html.xpath("//figcaption/b")] == [
        "Serving saved by releases of n.",
        "Serving saved by releases of m.",
    ]


def test_pictures_lie_beside_the_page(released: Path, weekly: Weekly) -> None:
    shown = weekly("--out", str(released / "a" / "b"))
    there = {each.name for each in (released / "a" / "b").iterdir()}
    assert there == {"report.html", "report.md", "savings.png", "savings-other.png"}
    assert "](savings.png)" in shown.markdown


# -- what is said of what was read ----------------------------------------------------------------


def test_deleted_foreign_and_undelivered_runs_are_said(root: Path, weekly: Weekly) -> None:
    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(uri)
    folder = write_run(root, "run-1", [a_row()])
    (run,) = client.search_runs(["1"], "tags.`pipeline.run` = 'run-1'")
    client.delete_run(run.info.run_id)
    other = client.create_run("0", start_time=round(NOON * 1000))
    client.set_terminated(other.info.run_id, end_time=round(NOON * 1000) + 5)
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"e": "heartbeat", "t": NOON + 1, "mono_ns": 9}) + "\n")
    shown = weekly()
    assert shown.table("spent")[1][3] == "0.517"  # spent is spent
    for note in (
        "1 run or stage was deleted in the UI; what it spent is spent",
        "1 run of another program was left out",
        f"1 run under {root} has more to tell than MLflow has had: python -m pipeline sync {root}",
    ):
        assert note in shown.prose("notes")


def test_reused_hours_are_not_spent(root: Path, weekly: Weekly) -> None:
    """The teacher's 32 minutes are another run's, on another device model, which is none of those
    that were used; 22 + 9 are this one's.
    """
    teacher = a_row("teacher", reused="run-0", device="NVIDIA A100")
    write_run(root, "run-1", [teacher, a_row()])
    shown = weekly("--budget", "1")
    assert shown.verdict == (
        "0.517 device-hours on NVIDIA H200 in 1 run. 0.517 of 1.00 allowed device-hours."
    )
    assert len(shown.table("spent")) == 2
    said = "0.533 device-hours on NVIDIA A100 were reused: they were spent earlier, and count there"
    assert said in shown.prose("notes")


def test_a_run_that_has_not_ended_counts_to_its_last_sign_of_life(
    root: Path, weekly: Weekly
) -> None:
    write_run(root, "run-1", [a_row()], ended=False)
    assert weekly().table("spent")[1][3] == "2.00"


# -- names of others ------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>`*|x\x1b[31m\u202e\u200b\nb{{ 7*7 }}"


def test_names_cannot_do_or_hide_anything(root: Path, weekly: Weekly) -> None:
    row = a_row(HOSTILE, owner={"team": HOSTILE})
    write_run(root, "r<b>\u202e1", [row], team=HOSTILE, device=HOSTILE)
    shown = weekly()
    assert shown.table("spent")[1][0] == "<img src=x onerror=alert(1)>`*|x b{{ 7*7 }}"
    assert [each.tag for each in shown.html.iter("img", "b", "iframe")] == []
    assert len(shown.html.xpath("//script")) == 1
    assert "\\<img src=x onerror=alert(1)\\>\\`\\*\\|x b{{ 7\\*7 }}" in shown.markdown
    for text in (shown.text, shown.markdown, shown.html.text_content()):
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"]
    assert "<img" not in shown.markdown.replace("\\<img", "")


def test_all_forms_have_the_same_figures(released: Path, weekly: Weekly) -> None:
    write_run(
        released, "run-a", [a_row("teacher", rate=3.0), a_row(rate=3.0)], rate=3.0, budget_h=2
    )
    told = foreseen(1.0, 0.8, 1.2, 1.1)
    write_run(released, "run-b", [a_row(device="NVIDIA A100")], device="NVIDIA A100", forecast=told)
    shown = weekly()
    assert shown.sections == ["spent", "waste", "forecasts", "verdicts", "savings", "notes"]
    plain = " ".join(shown.markdown.replace("\\", "").split())
    for section in shown.sections:
        cells = [cell for row in shown.table(section) for cell in row]
        assert cells or shown.said(section) or section == "savings"
        for each in (*cells, *shown.said(section)):
            assert each in plain
            assert each in shown.words
    assert shown.verdict in plain
    assert shown.verdict in shown.words


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--verbose"], 2, "--verbose: is no option of weekly; --help lists them"),
        (["november"], 2, "november: is no option of weekly; --help lists them"),
        (["--from"], 2, "--from: has no value; write --from VALUE"),
        (["--from", "1 Nov"], 1, "--from: '1 Nov' is no day; write it as 2026-11-01; days are UTC"),
        (["--to", "2026-02-30"], 1, "--to: '2026-02-30' is no day"),
        (["--from", "2026-11-02", "--to", "2026-11-02"], 1, "--to: --to is not after --from"),
        (["--from", "2031-01-01"], 1, "--from: is later than today"),
        (["--by", "owner"], 1, "--by: 'owner' is nothing to group by; give team,"),
        (["--budget", "lots"], 1, "--budget: 'lots' is no number of device-hours; write 40,"),
        (["--budget", "0"], 1, "--budget: '0' is no number of device-hours"),
        (["--budget", "nan"], 1, "--budget: 'nan' is no number of device-hours"),
        (["--budget", "vision="], 1, "--budget: 'vision=' is no number of device-hours"),
        (["--budget", "=4"], 1, "--budget: '=4' is no number of device-hours"),
        (["--budget", "4", "--budget", "5"], 1, "--budget: the one of the period is given twice"),
        (["--budget=a=1", "--budget=a=2"], 1, "--budget: the one of a is given twice"),
        (["--budget", "4", "--budget", "a=5"], 1, "--budget: there is one for all and one for a"),
        (["--root", "nowhere"], 1, "--root: there is no store"),
        (["--uri", "sqlite:///none.db"], 1, "--uri: there is no store none.db"),
        (["--uri", "http://127.0.0.1:9"], 1, "--uri: the store does not answer"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_in_one_line(
    argv: list[str],
    code: int,
    said: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    given = argv if "--root" in argv else ["--root", str(root), *argv]
    assert main(given, now_s=lambda: NOON) == code
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(f"refused: {said}")


def test_a_folder_that_cannot_be_written_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "file").write_text("")
    assert main([*PERIOD, "--root", str(root), "--out", str(root / "file" / "x")]) == 1
    assert capsys.readouterr().err.startswith("refused: --out: ")


@pytest.mark.parametrize(
    ("argv", "days"),
    [
        ([], ("2026-11-25", "2026-12-02")),
        (["--to", "2026-11-08"], ("2026-11-01", "2026-11-08")),
        (["--from", "2026-11-30"], ("2026-11-30", "2026-12-02")),
    ],
)
def test_the_last_seven_days_are_shown_today_included(
    root: Path, argv: list[str], days: tuple[str, str]
) -> None:
    now_s = datetime(2026, 12, 1, 23, 59, tzinfo=UTC).timestamp()
    settings = read_settings([*argv, "--root", str(root)], now_s)
    assert settings.days == days
    assert settings.out == root / "weekly" / days[0]


def test_a_file_is_read_without_mlflow(root: Path) -> None:
    """Whose import takes longer than all the rest."""
    write_run(root, "run-1", [a_row()])
    program = (
        "import sys; from pipeline.cli.commands.weekly import main;"
        f" code = main([*{PERIOD!r}, '--root', {str(root)!r}]);"
        " sys.exit(code or ('mlflow' in sys.modules and 9))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.517 device-hours on NVIDIA H200 in 1 run." in done.stdout


# -- a file without MLflow ------------------------------------------------------------------------


def test_a_file_is_read_as_mlflow_s_client_reads_it(root: Path) -> None:
    """A run over the period's edge with all its stages, one that was deleted, one that is not a
    number, one that has not ended, and another program's.
    """
    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(uri)
    write_run(root, "run-0", [a_row()], at=NOV - DAY)
    write_run(root, "run-1", [a_row("teacher"), a_row()], at=NOV + 60.0)
    write_run(root, "run-2", [a_row()])
    (deleted,) = client.search_runs(["1"], "tags.`pipeline.run` = 'run-2'")
    client.delete_run(deleted.info.run_id)
    (odd,) = client.search_runs(["1"], "tags.`pipeline.run` = 'run-1'")
    client.log_metric(odd.info.run_id, "train/loss", math.nan, step=3)
    other = client.create_run("0", start_time=round(NOON * 1000))
    client.set_tag(other.info.run_id, "empty", "")
    for began, ends in ((NOV, NOV + DAY), (NOV, NOV + 1), (0.0, NOV + DAY), (NOON + DAY, 2e9)):
        ours = runs_between(root / "mlflow.db", round(began * 1000), round(ends * 1000))
        theirs = {
            run["id"]: run for run in _asked_for(uri, round(began * 1000), round(ends * 1000))
        }
        assert repr(sorted({run["id"]: run for run in ours}.items())) == repr(
            sorted(theirs.items())
        )
    names = sorted(run["tags"].get("pipeline.run", "-") for run in ours)
    assert names == ["-"]  # it has not ended
    ours = runs_between(root / "mlflow.db", round(NOV * 1000), round((NOV + DAY) * 1000))
    assert sorted(run["tags"].get("pipeline.run", "-") for run in ours) == [
        "-",
        *("run-1", "run-1/student", "run-1/teacher", "run-2", "run-2/student"),
    ]
    assert sum(not run["active"] for run in ours) == 1


def test_a_file_that_is_held_or_other_is_left_to_mlflow(root: Path) -> None:
    (root / "other.db").write_bytes(b"no database, and long enough to look like one" * 20)
    with pytest.raises(sqlite3.DatabaseError):
        runs_between(root / "other.db", 0, 1)
    with closing(sqlite3.connect(root / "empty.db")) as made:
        made.execute("CREATE TABLE runs (run_uuid TEXT)")
    with pytest.raises(sqlite3.OperationalError, match="no such column"):
        runs_between(root / "empty.db", 0, 1)
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        runs_between(root / "gone.db", 0, 1)
    assert not (root / "gone.db").exists()
