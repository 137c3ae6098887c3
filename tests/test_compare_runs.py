"""`python -m pipeline compare`: runs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lxml import html
from make_journal import write_run
from make_result import make_result, make_row, value

from pipeline.cli.commands.compare import main
from pipeline.tracking.deliver import deliver

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a run as it leaves its result and settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def write(run_id: str, recipe: str = "distill", settings: Any = None, **changes: Any) -> Path:
        folder = tmp_path / "mlruns/runs" / run_id
        folder.mkdir(parents=True)
        result = make_result(recipe, **{"run_id": run_id, **changes})
        (folder / "result.json").write_text(json.dumps(result))
        own = {"training": {"steps": 200}, "quality": {"bootstrap": 100}, **(settings or {})}
        (folder / "config.json").write_text(json.dumps(own))
        return folder

    return write


def page() -> Any:
    (found,) = Path("mlruns/compare").glob("*/report.html")
    return html.document_fromstring(found.read_text())


def text_of(element: Any) -> str:
    return " ".join(element.text_content().split())


def cautions(root: Any) -> list[str]:
    return [text_of(each) for each in root.xpath("//section[@aria-labelledby='cautions']//li")]


def figures(root: Any) -> list[str]:
    return [each.removeprefix("figure-") for each in root.xpath("//figure/@id")]


def test_settings_that_differ_come_first(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("20261130-aaaa1111")
    write("20261130-bbbb2222", settings={"training": {"steps": 300, "batch_size": 8}})
    assert main(["20261130-aaaa1111", "20261130-bbbb2222"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "What differs:\n  training.batch_size: -  |  8\n  training.steps: 200  |  300\n"
    )
    assert "caution" not in out
    root = page()
    assert [text_of(each) for each in root.xpath("//h2")][:3] == [
        "What differs",
        "Comparisons of each run",
        "Arms",
    ]
    rows = root.xpath("//section[@aria-labelledby='settings']//tr")
    assert [[text_of(cell) for cell in row.xpath("./*")] for row in rows] == [
        ["setting", "distill aaaa1111", "distill bbbb2222"],
        ["training.batch_size", "-", "8"],
        ["training.steps", "200", "300"],
    ]
    assert {"quality-hours", "quality-serving", "hours", "arms"} <= {*figures(root)}
    names = [text_of(each) for each in root.xpath("//figure[@id='figure-arms']//tbody//th")]
    assert names[0] == "teacher, distill aaaa1111"
    assert len(names) == 8
    assert any(Path("mlruns/compare").glob("*/report.md"))
    assert any(Path("mlruns/compare").glob("*/arms.png"))


@pytest.mark.parametrize(
    ("changes", "caution", "gone"),
    [
        (
            {"device": {"kind": "cuda", "name": "H200", "count": 1}},
            "They ran on different devices (distill aaaa1111: 1 x",
            {"quality-hours", "quality-serving"},
        ),
        (
            {"settings": {"quality": {"bootstrap": 5}}},
            "Quality was read by other settings",
            {"quality-hours", "quality-serving", "arms"},
        ),
        (
            {"settings": {"serving": {"load": {"batch": 8}}}},
            "Serving was read by other settings",
            {"quality-serving"},
        ),
        ({"status": "FAILED", "why": "no room"}, "distill bbbb2222 ended FAILED: no room.", set()),
    ],
)
def test_what_cannot_be_compared_is_not_drawn_together(
    changes: dict[str, Any], caution: str, gone: set[str], write: Write
) -> None:
    write("20261130-aaaa1111")
    write("20261130-bbbb2222", **changes)
    assert main(["20261130-aaaa1111", "20261130-bbbb2222"]) == 0
    root = page()
    (said,) = cautions(root)
    assert said.startswith(caution)
    assert {"quality-hours", "quality-serving", "arms"} - {*figures(root)} == gone


def test_other_data_and_a_disturbed_machine_are_said(write: Write) -> None:
    first = make_result("distill")["environment"]
    row = make_row("student")
    row["ledger"]["conditions"]["work_foreign_load"] = value(0.4)
    write("20261130-aaaa1111", environment={**first, "data_digest": "1" * 32})
    write("20261130-bbbb2222", environment={**first, "data_digest": "2" * 32}, rows=[row])
    assert main(["20261130-aaaa1111", "20261130-bbbb2222"]) == 0
    assert cautions(page()) == [
        "They read different data (distill aaaa1111: 111111111111, distill bbbb2222: 222222222222):"
        " quality cannot be compared.",
        "distill bbbb2222: others used 40% of the machine while student was made.",
    ]


def test_a_run_is_an_id_latest_a_folder_or_mlflows(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write("20261130-aaaa1111")
    (tmp_path / "mlruns/latest").symlink_to("runs/20261130-aaaa1111")
    (tmp_path / "elsewhere").mkdir()
    write("20261130-bbbb2222").rename(tmp_path / "elsewhere/b")
    other = write_run(tmp_path / "other", "20261130-cccc3333")
    result = make_result("distill", run_id="20261130-cccc3333")
    (other / "result.json").write_text(json.dumps(result))
    journal = (other / "journal.jsonl").read_text().replace('"report.md"', '"result.json"')
    (other / "journal.jsonl").write_text(journal)
    deliver(other)
    store = f"sqlite:///{tmp_path / 'other/mlflow.db'}"
    runs = ["latest", "elsewhere/b", "20261130-cccc3333", "--uri", store]
    assert main(runs) == 0, capsys.readouterr().err
    facts = text_of(page().xpath("//p[@class='facts']")[0])
    assert [f"run 20261130-{each}" in facts for each in ("aaaa1111", "bbbb2222", "cccc3333")] == [
        True
    ] * 3
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a"], "RUN: 1 runs were named; give 2 to 20"),
        (["20261130-aaaa1111", "no-such"], "RUN: there is no run no-such in mlruns or in MLflow"),
        (["20261130-aaaa1111", "latest"], "RUN: there is no run latest in mlruns or in MLflow"),
        (
            ["20261130-aaaa1111", "mlruns/runs/20261130-aaaa1111"],
            "is run 20261130-aaaa1111, which stands there; name each run once",
        ),
        (["20261130-aaaa1111", "killed"], "RUN: killed has no result.json: it has not ended"),
        (["20261130-aaaa1111", "newer"], "its schema 9 is of a newer release"),
        (["20261130-aaaa1111", "broken"], "has no result that can be read"),
        (
            ["20261130-aaaa1111", "classes"],
            "RUN: these share no quality: distill aaaa1111 in bits per byte",
        ),
        (["20261130-aaaa1111", "\x1b[31m"], "is no run"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    argv: list[str], said: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("20261130-aaaa1111")
    (write("killed") / "result.json").rename(tmp_path / "mlruns/runs/killed/journal.jsonl")
    newer = write("newer") / "result.json"
    newer.write_text(json.dumps({**json.loads(newer.read_text()), "schema": 9}))
    (write("broken") / "result.json").write_text("{")
    rows = [make_row("student")]
    rows[0]["quality"] = {"accuracy": rows[0]["quality"]["bits_per_byte"]}
    write("classes", rows=rows, comparisons=[])
    assert main(argv) == 1
    found = capsys.readouterr()
    assert found.err.startswith("refused: RUN: ")
    assert said in found.err
    assert len(found.err.splitlines()) == 1
    assert not Path("mlruns/compare").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--what"], "--what: is no option of compare"), (["a", "b", "--out"], "--out: has no value")],
)
def test_a_command_line_that_cannot_be_read_ends_with_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("20261130-aaaa1111")
    write("20261130-bbbb2222")
    (tmp_path / "file").write_text("")
    assert main(["20261130-aaaa1111", "20261130-bbbb2222", "--out", "file/below"]) == 1
    assert "--out: file/below cannot be written" in capsys.readouterr().err
