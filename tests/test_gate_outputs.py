"""What a gate leaves for reviewers and CI: line, section of the report, JUnit, GitHub, and the
snippets that run it.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from here import here
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml, Skipped
from make_result import make_result, make_row
from make_verdict import accuracy, make_verdict, no_baseline, payback, serving
from markdown_it import MarkdownIt
from reports import markdown, verdict_section

from pipeline.compare.verdict import Outcome
from pipeline.errors import BudgetSpent, Preempted, exit_of
from pipeline.gate import judge
from pipeline.ledger.schema import VERDICT_SCHEMA
from pipeline.ledger.values import null
from pipeline.report.conclusion import conclude
from pipeline.report.github import annotation, outputs, summary, tell_github
from pipeline.report.junit import junit
from pipeline.report.verdict import markdown_line, release_conclusion, verdict_line
from pipeline.runs.gate_ending import ended, shown_verdict, write_outputs
from pipeline.store.verdicts import as_recorded, checksum

ROOT = Path(__file__).parent.parent
CRASHED: dict[str, Any] = {
    "schema": 2,
    "line": "no verdict: the run ended FAILED: boom",
    "verdict": None,
    "exit_code": 1,
    "why": "boom",
    "criteria": [],
    "run_id": "r",
}
NOT_COMPARED = replace(
    accuracy(), outcome=Outcome.INVALID, value=null("other data"), ci=None, why="other data: a, b"
)
FEW = accuracy(-0.004, (-0.03, 0.02), outcome=Outcome.INCONCLUSIVE, needed=4000)
OPEN_SERVING = serving(0.04, (-0.1, 0.2), outcome=Outcome.INCONCLUSIVE)
DEARER = serving(-0.1, (-0.15, -0.05), outcome=Outcome.FAIL)


# -- the line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "line"),
    [
        (
            make_verdict(),
            (
                "PASS  -38.2% GPU-s/1k tokens [-41.0, -35.1]  accuracy -0.3 pt [-0.8, +0.2] vs"
                " margin -1.0  pays back after 2.1 M tokens  policy strict"
            ),
        ),
        (
            make_verdict(kind="cpu", policy="smoke").copy(),
            (
                "PASS  -38.2% device-s/1k tokens [-41.0, -35.1]  accuracy -0.3 pt [-0.8, +0.2] vs"
                " margin -1.0  pays back after 2.1 M tokens  policy smoke"
            ),
        ),
        (
            make_verdict(DEARER, accuracy(0.00001, (-0.00002, 0.00004)), payback(None)),
            (
                "FAIL  +10.0% GPU-s/1k tokens [+5.0, +15.0]  accuracy 0.0 pt [0.0, 0.0] vs margin"
                " -1.0  never pays back  because of serving  policy strict"
            ),
        ),
        (
            make_verdict(serving(), NOT_COMPARED),
            (
                "INVALID  -38.2% GPU-s/1k tokens [-41.0, -35.1]  accuracy unknown  because of"
                " quality/accuracy  policy strict"
            ),
        ),
        (
            no_baseline(),
            "NO_BASELINE  there is no champion; bootstrap=true makes it the first  policy strict",
        ),
    ],
)
def test_the_line_says_it_all(verdict: dict[str, Any], line: str) -> None:
    assert verdict_line(verdict) == line


@pytest.mark.parametrize(
    ("low", "outcome", "shown"),
    [
        (-0.00999, Outcome.PASS, "[-0.999,"),
        (-0.0100004, Outcome.INCONCLUSIVE, "[-1.00004,"),
        (-0.01, Outcome.FAIL, "[-1.0,"),
    ],
)
def test_rounding_contradicts_no_verdict(low: float, outcome: Outcome, shown: str) -> None:
    assert shown in verdict_line(
        make_verdict(serving(), accuracy(-0.002, (low, 0.004), outcome=outcome))
    )


def in_line(verdict: dict[str, Any]) -> tuple[float, float, float]:
    """Return the ends of quality's interval and its margin, as the line shows them."""
    found = re.search(r"\[(\S+), (\S+)\] vs margin (\S+)", verdict["line"])
    assert found is not None, verdict["line"]
    low, high, margin = map(float, found.groups())
    return low, high, margin


@pytest.mark.parametrize(
    ("margin", "shown"), [(0.0025, -0.25), (0.0005, -0.05), (0.01, -1.0), (0.1, -10.0)]
)
def test_a_margin_is_shown_as_the_policy_states_it(margin: float, shown: float) -> None:
    verdict = make_verdict(serving(), accuracy(0.0, (0.96 * -margin, 0.002), threshold=-margin))
    low, _, limit = in_line(verdict)
    assert limit == shown < low
    assert f"| {shown} pt |" in "\n".join(verdict_section(verdict))


@examples(max_examples=300, deadline=None)
@given(st.floats(1e-4, 0.2), st.floats(-1e-3, 1e-3), st.floats(0, 1e-3))
def test_what_the_line_shows_is_what_was_decided(
    margin: float, beyond: float, width: float
) -> None:
    margin = round(margin, 6)
    low = -margin + beyond
    verdict = make_verdict(serving(), accuracy(low, (low, low + width), threshold=-margin))
    shown_low, shown_high, limit = in_line(verdict)
    if abs(beyond) > 1e-10:  # the last of twelve decimals of a percentage
        assert (shown_low > limit) == (low > -margin)
    if abs(beyond + width) > 1e-10:
        assert (shown_high < limit) == (low + width < -margin)


@given(st.floats(-0.5, 0.5), st.floats(0, 0.2), st.floats(0, 0.2))
def test_no_line_has_a_zero_with_a_sign(delta: float, below: float, above: float) -> None:
    line = verdict_line(
        make_verdict(
            serving(delta, (delta - below, delta + above)), accuracy(delta, (delta - below, delta))
        )
    )
    assert "-0.0 " not in line
    assert "-0.0%" not in line
    assert "+0.0%" not in line


# -- the section and the conclusion ---------------------------------------------------------------


def test_the_section_shows_every_criterion_and_both_sides() -> None:
    text = "\n".join(verdict_section(make_verdict(serving(), FEW, payback())))
    few = (
        "| accuracy | INCONCLUSIVE | -0.4 pt \\[-3.0, +2.0\\] | -1.0 pt | 2000 | yes | 4000 items"
        " would decide |"
    )
    assert few in text
    assert "| payback | PASS | 2.1 M tokens | - | - | shown only |  |" in text
    assert "candidate: new, artifact " + "b" * 32 + ", took 90.0 min of device time" in text
    assert "version 3 of m, no ledger" in text


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (
            make_verdict(serving(), FEW),
            "4000 items would decide. No further look would help: give more test data, or another"
            " candidate.",
        ),
        (
            make_verdict(OPEN_SERVING, accuracy(), look=2),
            "No further look would help: give a policy with more policy.blocks, or another"
            " candidate.",
        ),
        (
            make_verdict(OPEN_SERVING, FEW, look=2),
            "help: give more test data, a policy with more policy.blocks, or another candidate.",
        ),
        (
            make_verdict(OPEN_SERVING, accuracy()),
            "Look 1 of 2: the same command again measures as many blocks more.",
        ),
        (
            make_verdict(serving(), NOT_COMPARED),
            "other data: a, b. Remove the cause and run the same command again",
        ),
        (make_verdict(recorded="run-1"), "This is the verdict of run run-1, given again"),
        (no_baseline(), "Nothing was compared: there is no champion"),
    ],
)
def test_the_conclusion_says_what_comes_next(verdict: dict[str, Any], said: str) -> None:
    conclusion = release_conclusion(verdict)
    assert said in " ".join([conclusion["verdict"], *conclusion["answers"]])


def test_names_that_others_chose_stay_text() -> None:
    verdict = make_verdict(policy="`x`|<b>\x1b[31m\nred")
    verdict["candidate"]["reference"] = "a|b\n# heading <script>"
    verdict["criteria"].append({**serving().to_json(), "name": "quality/task/\x1b[2Jx\n<b>/acc"})
    verdict["line"] = verdict_line(verdict)
    text = "\n".join([markdown_line(verdict), *verdict_section(verdict)])
    assert "<script>" not in text
    assert "<b>" not in text
    assert "\n# heading" not in text
    made = (
        verdict_line(verdict),
        text,
        junit(verdict),
        outputs(verdict, {}),
        annotation(verdict),
        str(release_conclusion(verdict)),
    )
    assert "\x1b" not in "".join(made)


def test_the_report_begins_with_the_line_as_it_is_and_links_nowhere() -> None:
    verdict = make_verdict()
    result = make_result("baseline", verdict=shown_verdict(written(verdict)))
    assert markdown(result).splitlines()[0] == verdict["line"]
    said = conclude(result)
    assert said["verdict"] == "The candidate passes."
    assert said["answers"][:2] == [
        "Serving passes at +38.2% [+35.1, +41.0] against +5.0%.",
        "Accuracy passes at -0.3 pt [-0.8, +0.2] against -1.0 pt.",
    ]
    for name in ("[1, 2](http://x)", "[x](http://x)", "[1, 2][3]"):
        shown = MarkdownIt("commonmark").render(markdown_line(make_verdict(policy=name)))
        assert "<a" not in shown
        assert name in shown


def test_a_report_says_what_came_between_a_verdict_and_its_end() -> None:
    told = shown_verdict(written(make_verdict()))
    assert told is not None
    lost = {**told, "promotion": NOT_PROMOTED}
    said = conclude(make_result("baseline", verdict=lost))["answers"]
    assert "Not promoted: the champion is another by now." in said
    broken = make_result("baseline", verdict=told, status="FAILED", why="disk full")
    assert conclude(broken)["answers"][-1] == "The run ended FAILED: disk full."
    rows = [make_row(arm, type="release") for arm in ("baseline", "candidate")]
    crashed = make_result("baseline", rows=rows, status="FAILED", why="boom", is_release_check=True)
    crash = {"verdict": "No verdict was reached.", "answers": ["The run ended FAILED: boom."]}
    assert conclude(crashed) == crash
    assert "no ledger" in "\n".join(
        verdict_section({**told, "baseline": {**told["baseline"], "charge": {}}})
    )


# -- schema, JUnit --------------------------------------------------------------------------------


def written(verdict: dict[str, Any]) -> dict[str, Any]:
    if verdict["verdict"] is None:
        return verdict
    return {
        **verdict,
        "sha256": "f" * 64,
        "promotion": None,
        "history": None,
        "end": {"exit_code": verdict["exit_code"], "why": None},
    }


NOT_PROMOTED = {
    "done": False,
    "model": "m",
    "version": None,
    "url": None,
    "why": "the champion is another by now",
}


def gate_of(
    verdict: dict[str, Any] | None, folder: Path, promotion: dict[str, Any] | None = None
) -> Any:
    """Return as much of an attempt as its end needs."""
    gate = SimpleNamespace(verdict=verdict, promotion=promotion, history=None)
    session = SimpleNamespace(gate=gate, folder=folder, run_id="r")
    return SimpleNamespace(session=session, book=SimpleNamespace(disagreeing=[]))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("x\x1b[2J\n::error::"), 1),
        (Preempted("wanted back"), 75),
        (BudgetSpent("spent"), 7),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("verdict", [None, make_verdict()], ids=["before", "after"])
def test_an_end_by_an_exception_says_so_with_its_exit_code(
    tmp_path: Path, verdict: dict[str, Any] | None, error: BaseException, code: int
) -> None:
    try:
        raise error
    except BaseException:  # noqa: BLE001 - the very one
        made = ended(gate_of(verdict, tmp_path), "FAILED", "crashed")
    assert made is not None
    assert (exit_of(error), (made.get("end") or made)["exit_code"]) == (code, code)
    jsonschema.validate(made, VERDICT_SCHEMA)
    assert re.search(rf"exit_code<<(\S+)\n{code}\n\1\n", outputs(made, {}))
    assert annotation(made).startswith("::error title=Release check::")
    assert type(error).__name__ in annotation(made)
    assert made["line"].isprintable()
    (suite,) = JUnitXml.fromstring(junit(made).encode())
    assert suite.errors == 1


def test_a_pass_that_was_not_promoted_fails_the_job_and_stays_what_was_recorded(
    tmp_path: Path,
) -> None:
    verdict = make_verdict()
    made = ended(gate_of(verdict, tmp_path, NOT_PROMOTED), "FINISHED", None)
    assert made is not None
    assert (made["exit_code"], made["end"]["exit_code"]) == (0, 1)
    assert checksum(as_recorded(made)) == made["sha256"] == checksum(verdict)
    assert annotation(made).startswith(
        "::error title=Release check::not promoted: the champion is another by now  PASS"
    )
    (suite,) = JUnitXml.fromstring(junit(made).encode())
    assert [case.name for case in suite if case.result] == ["end of the run"]


def test_files_are_written_beside_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    attempt = gate_of(make_verdict(), tmp_path)
    assert write_outputs(attempt, ended(attempt, "FINISHED", None), "PASS\n") == ["verdict.json"]
    jsonschema.validate(json.loads((tmp_path / "verdict.json").read_text()), VERDICT_SCHEMA)
    assert (tmp_path / "summary").read_text() == "PASS\n"
    assert ended(SimpleNamespace(session=SimpleNamespace(gate=None)), "FINISHED", None) is None
    assert write_outputs(attempt, None, "") == []


ALL = [
    make_verdict(),
    make_verdict(DEARER, accuracy()),
    make_verdict(serving(), FEW),
    make_verdict(serving(), NOT_COMPARED),
    no_baseline(),
    CRASHED,
]


@pytest.mark.parametrize("verdict", ALL, ids=lambda verdict: str(verdict["verdict"]))
def test_every_end_has_its_form(verdict: dict[str, Any]) -> None:
    jsonschema.validate(written(verdict), VERDICT_SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**written(verdict), "verdict": "MAYBE"}, VERDICT_SCHEMA)


@pytest.mark.parametrize(
    ("verdict", "kinds"),
    [
        (ALL[0], [None, None, None]),
        (ALL[1], [(Failure, "FAIL"), None]),
        (ALL[2], [None, (Failure, "INCONCLUSIVE")]),
        (ALL[3], [None, (Error, "INVALID")]),
        (ALL[4], [(Skipped, None)]),
        (ALL[5], [(Error, "crash")]),
        (make_verdict(replace(DEARER, gating=False), accuracy()), [(Skipped, None), None]),
    ],
)
def test_a_junit_reader_reads_a_case_per_criterion(
    tmp_path: Path, verdict: dict[str, Any], kinds: list[Any]
) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(junit(verdict), encoding="utf-8")
    (suite,) = JUnitXml.fromfile(str(file))
    cases = list(suite)
    found = [(type(case.result[0]), case.result[0].type) if case.result else None for case in cases]
    assert found == kinds
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == tuple(
        [len(kinds)]
        + [
            sum(kind is not None and kind[0] is which for kind in kinds)
            for which in (Failure, Error, Skipped)
        ]
    )
    assert [each.name for each in cases] == [each["name"] for each in verdict["criteria"]] or len(
        cases
    ) == 1


# -- GitHub and GitLab ----------------------------------------------------------------------------


def test_github_gets_summary_outputs_and_one_annotation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "s"),
        "GITHUB_OUTPUT": str(tmp_path / "o"),
    }
    verdict = make_verdict(DEARER, accuracy())
    verdict["line"] = "FAIL  100%\nverdict<<x\nPASS"
    tell_github(verdict, "# report\n", {"report": "/r"}, environ)
    assert (tmp_path / "s").read_text() == "# report\n"
    lines = (tmp_path / "o").read_text().splitlines()
    read: dict[str, str] = {}
    while lines:  # as the runner reads it
        name, mark = lines.pop(0).split("<<")
        value = []
        while (line := lines.pop(0)) != mark:
            value.append(line)
        read[name] = "\n".join(value)
    assert (read["verdict"], read["exit_code"], read["report"]) == ("FAIL", "3", "/r")
    assert read["line"] == "FAIL  100% verdict<<x PASS"
    assert read["serving_saving"] == "-0.1"
    assert capsys.readouterr().out == "::error title=Release check::FAIL  100%25 verdict<<x PASS\n"


def test_no_delimiter_of_an_output_can_be_known_before() -> None:
    marks = re.findall(
        r"<<(.*)", "".join(outputs(make_verdict(), {"report": "/a\nb"}) for _ in range(2))
    )
    assert len(set(marks)) == len(marks)
    assert all(len(mark) > 32 for mark in marks)


def test_elsewhere_nothing_is_said_and_what_cannot_be_written_changes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tell_github(make_verdict(), "", {}, {})
    assert capsys.readouterr() == ("", "")
    tell_github(make_verdict(), "", {}, {"GITHUB_ACTIONS": "true", "GITHUB_OUTPUT": "/nowhere/x"})
    said = capsys.readouterr()
    assert said.out.startswith("::notice title=Release check::PASS")
    assert said.err == "note: GITHUB_OUTPUT cannot be written (No such file or directory)\n"


def test_a_summary_stays_below_githubs_limit() -> None:
    for line in ("x" * 999 + "\n", "\n", "é\n"):
        cut = summary("é" * 100 + "\n" + line * (2**21 // len(line.encode())))
        assert 2**20 - 1200 < len(cut.encode()) <= 2**20
        assert cut.endswith("*(cut here; the whole report is report.md)*\n")


def stub(folder: Path) -> Path:
    """Write a python that tells its arguments and ends with 4."""
    file = folder / "python"
    file.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$SEEN"\nexit 4\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_the_github_action_passes_inputs_as_they_are_and_the_exit_code_on(tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / ".github/actions/release-check/action.yml").read_text())
    (step,) = action["runs"]["steps"]
    given = {name: str(each.get("default", "")) for name, each in action["inputs"].items()}
    given |= {
        "candidate": 'x"; touch hacked; "',
        "baseline": "models:/m@champion",
        "python": str(stub(tmp_path)),
        "overrides": "tracking.team=a b\r\n# seen elsewhere\n\nstore.url=s3://c/d\n",
    }
    env = {
        name: given[value.removeprefix("${{ inputs.").removesuffix(" }}")]
        for name, value in step["env"].items()
    }
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=tmp_path,
        env={**os.environ, **env, "SEEN": str(tmp_path / "seen")},
        check=False,
    )
    assert done.returncode == 4
    assert not (tmp_path / "hacked").exists()
    assert (tmp_path / "seen").read_text().splitlines() == [
        "-m",
        "pipeline",
        "recipe=release_check",
        'candidate=x"; touch hacked; "',
        "baseline=models:/m@champion",
        "policy=strict",
        "promote=false",
        "bootstrap=false",
        "tracking.team=a b",
        "store.url=s3://c/d",
    ]
    known = outputs(make_verdict(), {"report": "/r"})
    assert {line.partition("<<")[0] for line in known.splitlines() if "<<" in line} == set(
        action["outputs"]
    )
    assert all(
        each["value"] == f"${{{{ steps.gate.outputs.{name} }}}}"
        for name, each in action["outputs"].items()
    )


def test_the_gitlab_job_runs_the_gate_and_keeps_what_it_left(tmp_path: Path) -> None:
    job = yaml.safe_load((ROOT / "ci/release-check.gitlab-ci.yml").read_text())[".release_check"]
    stub(tmp_path)
    env = {
        **os.environ,
        **job["variables"],
        "CANDIDATE": "x y",
        "BASELINE": "models:/m@champion",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
    }
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(job["script"])], cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 4
    assert "candidate=x y" in (tmp_path / "seen").read_text().splitlines()
    old, run = (tmp_path / f"mlruns/runs/20261128-release_check-{number}" for number in (9, 1))
    for folder in (old, run):
        folder.mkdir(parents=True)
        for name in job["artifacts"]["paths"]:
            (folder / name).write_text(folder.name)
    for name in job["artifacts"]["paths"]:  # of a cached mlruns/
        os.utime(old / name, (1, 1))
    subprocess.run(
        ["bash", "-e", "-c", "\n".join(job["after_script"])], cwd=tmp_path, env=env, check=True
    )
    assert {(tmp_path / name).read_text() for name in job["artifacts"]["paths"]} == {run.name}
    assert "allow_failure" not in job, "what nobody has decided is not released"
    assert job["artifacts"]["reports"]["junit"] == "junit.xml"


# -- refusals before there is a folder ------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (("candidate=nowhere", "baseline=nowhere", "policy=smoke"), 1, "there is no nowhere"),
        (
            ("candidate=x", "baseline=x", "policy=smoke", "seeds=[0,1]"),
            1,
            "a release is one artifact",
        ),
        (("candidate=x", "baseline=x", "policy=smok"), 1, "policy"),
        (("candidate=x", "baseline=x", "bare"), 2, "cannot be parsed"),
    ],
)
def test_github_is_told_of_a_gate_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    done = here(tmp_path, "recipe=release_check", "data.max_documents=40", *settings)
    assert done.returncode == code
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("::")]
    assert line.startswith("::error title=Release check::no verdict: refused: ")
    assert said in line
    assert re.search(rf"exit_code<<(\S+)\n{code}\n\1\n", (tmp_path / "outputs").read_text())


@pytest.mark.parametrize("device", [{}, {"name": "NVIDIA H200"}, {"count": 1}])
def test_a_charge_that_says_too_little_of_its_device_finds_no_spread(
    device: dict[str, Any],
) -> None:
    gate: Any = SimpleNamespace(candidate=SimpleNamespace(charge={"device": device}))
    tracking = SimpleNamespace(mlflow=True)
    measured: Any = SimpleNamespace(run=SimpleNamespace(tracking=tracking))
    assert judge._spread(measured, gate) is None
