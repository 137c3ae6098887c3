"""Saved completions as a teacher: what is predicted of them, what is refused, and a student trained
on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from here import result_in
from make_assess_models import byte_tokenizer
from test_distill_cached import TINY

from pipeline.cli.main import main
from pipeline.config.settings.data import DataConfig
from pipeline.data.completions import check_apart, encode_completions, read_completions
from pipeline.data.documents import Dataset, Document
from pipeline.errors import UserError

KEY = "stages.student.completions"
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DISTIL = [arg.replace("distill_cached", "distill") for arg in TINY]


def written(folder: Path, rows: list[Any], name: str = "said.jsonl") -> str:
    path = folder / name
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(path)


def encoded(folder: Path, rows: list[Any], *, template: str | None = None) -> list[Any]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return encode_completions(read_completions(written(folder, rows), DataConfig(), KEY), tokenizer)


def test_only_what_was_completed_is_predicted(tmp_path: Path) -> None:
    """By hand, a token a byte: begin, prompt, completion, end."""
    [found] = encoded(tmp_path, [{"prompt": "two + two = ", "completion": "four"}])
    text = "two + two = four"
    assert found.input_ids.tolist() == [1, *byte_tokenizer()(text)["input_ids"], 2]
    assert found.targets.tolist() == [False] * (1 + len("two + two = ")) + [True] * (
        len("four") + 1
    )
    assert found.num_bytes == len("four")


def test_without_a_prompt_all_is_predicted_and_chats_follow_the_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]
    plain, turns = encoded(
        tmp_path, [{"prompt": "", "completion": "abc"}, {"messages": chat}], template=CHATML
    )
    assert plain.targets.tolist() == [False, True, True, True, True]
    assert byte_tokenizer().decode(turns.input_ids[turns.targets]) == "four\n"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "is empty"),
        (["{"], "line 1 is not JSON"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "line 2 has no completion"),
        ([{"prompt": 3, "completion": "b"}], "line 1: prompt is no text"),
        ([{"prompt": "a", "completion": "  "}], "line 1 has an empty completion"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "line 1 has no assistant turn"),
    ],
)
def test_a_damaged_file_names_its_line(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        read_completions(written(tmp_path, rows), DataConfig(), KEY)
    assert str(error.value).startswith(f"{KEY}: ")
    assert said in str(error.value)


def test_any_kind_of_file_is_read(tmp_path: Path) -> None:
    [found] = read_completions(
        written(tmp_path, ["prompt,completion", "a,b"], "said.csv"), DataConfig(), KEY
    )
    assert (found.prompt, found.completion, found.document) == ("a", "b", Document("b", prompt="a"))
    with pytest.raises(UserError, match=r"said.xml has an unknown ending"):
        read_completions(written(tmp_path, ["a,b"], "said.xml"), DataConfig(), KEY)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("", "held out"),
        ("x ", "held out"),
        ("held ", "out"),
        ("held out", "!"),
        ("", " HELD\tout"),
        ("asked", "x"),
        ("asked ", "answered"),
    ],
)
def test_what_will_be_measured_is_not_learnt(tmp_path: Path, prompt: str, completion: str) -> None:
    row = {"prompt": prompt, "completion": completion}
    test = (Document("held out"), Document("answered", prompt="asked "))
    splits = {"train": (Document("seen"),), "validation": (Document("other"),), "test": test}
    data = Dataset("d", "0" * 32, splits)
    fine = read_completions(
        written(tmp_path, [{"prompt": "", "completion": "seen"}]), DataConfig(), KEY
    )
    check_apart(fine, data, KEY)
    with pytest.raises(UserError, match="completion 1 holds a document of test"):
        check_apart(read_completions(written(tmp_path, [row]), DataConfig(), KEY), data, KEY)


@pytest.mark.slow
def test_a_student_learns_from_them_without_a_teacher_and_says_what_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No teacher is loaded beside it; what the completions cost is unknown, so no training saving
    is claimed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.stages.training.load_teacher", None)
    rows = [
        {"prompt": f"number {at} is ", "completion": f"followed by {at + 1}, and so on it goes"}
        for at in range(40)
    ]
    file = written(tmp_path, rows)
    assert main([*DISTIL, f"stages.student.completions={file}"], started_ns=0) == 0, (
        capsys.readouterr().err
    )
    result = result_in(tmp_path)
    student = next(row for row in result["rows"] if row["arm"] == "student")
    counts = student["ledger"]["counts"]
    assert counts["distillation_share"]["value"] is None
    # prompts are read, padding is neither
    assert 0 < counts["target_tokens"]["value"] < counts["tokens"]["value"] < 4 * 4 * 64
    assert "teacher" not in student["ledger"]["phases_ns"]
    training = next(pair["training"] for pair in result["comparisons"] if pair["training"])
    assert training["value"] is None
    assert "made by a model elsewhere: student's completions" in json.dumps(training)
    first = student["artifact"]["digest"]
    written(tmp_path, [{"prompt": "another ", "completion": "beginning of it all"}, *rows])
    assert main([*DISTIL, f"stages.student.completions={file}"], started_ns=0) == 0
    again = next(row for row in result_in(tmp_path)["rows"] if row["arm"] == "student")
    assert (again["reused"], again["artifact"]["digest"] != first) == (None, True)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (("stages.student.completions=none.jsonl",), "none.jsonl is not a file"),
        (("task=sequence_classification", "data=stdlib_labels"), "a classifier completes nothing"),
        (("stages.student.start_temperature=2",), "start_temperature: has no effect without"),
        (("stages.student.teacher_precision=fp32",), "teacher_precision: has no effect without"),
    ],
)
def test_settings_that_contradict_completions_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, [{"prompt": "a", "completion": "b"}])
    given = [
        *DISTIL,
        *([] if "completions" in setting[0] else [f"stages.student.completions={file}"]),
        *setting,
    ]
    assert main(given, started_ns=0) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("mlruns/runs/*"))
