"""Bad input: one line with key, problem and remedy, exit 1, no traceback, nothing left
half-written.
"""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import saved, tiny
from transformers import BertConfig, BertForMaskedLM

from pipeline.cli.main import main
from pipeline.errors import UserError
from pipeline.ledger.journal import Journal
from pipeline.models.load import check_loads, load_model, load_tokenizer, save_model
from pipeline.runs.opening import quiet_libraries
from pipeline.store import artifacts as store
from pipeline.tasks.table import Task

Refuse = Callable[..., str]
LINES = [
    {"text": f"document {number} of a small set, long enough to be one"} for number in range(80)
]
CLASSIFY = ("task=sequence_classification",)


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Run a command that must be refused; return its line. No run may have been opened."""
    monkeypatch.chdir(tmp_path)
    quiet_libraries()  # what a test saves is nothing that a refusal says

    def run(*args: str, recipe: str = "baseline") -> str:
        code = main(
            [f"recipe={recipe}", "tracking.mlflow=false", "training.steps=1", *args], started_ns=0
        )
        said = capsys.readouterr().err.strip()
        assert code == 1, said
        assert len(said.splitlines()) == 1, said
        assert said.startswith("refused: ")
        assert not list(tmp_path.glob("mlruns/runs/*"))
        return said.removeprefix("refused: ")

    return run


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text(
        "".join(f"{json.dumps(row) if not isinstance(row, str) else row}\n" for row in rows)
    )
    return f"data.path={path}"


# -- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([], (), "data.path:"),
        ([*LINES[:2], '{"text": '], (), "line 3"),
        ([*LINES[:2], {"txet": "a"}], (), "text"),
        ([*LINES[:2], {"text": 5}], (), "line 3"),
        ([*LINES[:2], [1, 2]], (), "line 3"),
        ([{**row, "label": 0.5} for row in LINES], CLASSIFY, "label"),
        (LINES, CLASSIFY, "label"),
        ([{"messages": [{"role": "user"}]}], (), "line 1"),
    ],
)
def test_malformed_data_names_its_line(
    refuse: Refuse, tmp_path: Path, rows: list[Any], more: tuple[str], said: str
):
    line = refuse(jsonl(tmp_path / "d.jsonl", rows), *more)
    assert line.startswith("data")
    assert said in line


def test_a_document_in_two_splits_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    jsonl(folder / "train.jsonl", LINES[:60])
    jsonl(folder / "test.jsonl", LINES[59:])
    line = refuse(f"data.path={folder}", "data.shared_documents=refuse")
    assert "document 1 of test ('document 59 of a small set" in line
    assert "is document 60 of train too; keep it in one split" in line


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", b"\xffbad", "UTF-8"),
        ("d.xyz", b"what", "xyz"),
        ("d.parquet", b"PAR1 no", "parquet"),
        ("d.csv", b"a,b\n1,2\n", "text"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    refuse: Refuse, tmp_path: Path, name: str, content: bytes, said: str
):
    (tmp_path / name).write_bytes(content)
    assert said.lower() in refuse(f"data.path={tmp_path / name}").lower()


def test_what_is_not_there_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    assert "data.path: /nowhere does not exist" in refuse("data.path=/nowhere")
    (tmp_path / "empty").mkdir()
    assert refuse(f"data.path={tmp_path / 'empty'}").startswith("data.path")
    assert "model.path" in refuse("model.path=/nowhere/model")


# -- models ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny(Task.causal_lm), tmp_path / "model")


def test_a_folder_without_weights_is_refused(refuse: Refuse, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    line = refuse(f"model.path={folder}")
    assert "model.path" in line
    assert "has no weights" in line
    (folder / "config.json").unlink()
    assert "has no config.json" in refuse(f"model.path={folder}")


def test_pickled_weights_are_refused_and_not_run(
    refuse: Refuse, folder: Path, tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert (
        "pickled weights (pytorch_model.bin), which can run code; convert to safetensors"
        in refuse(f"model.path={folder}")
    )
    assert not (tmp_path / "ran").exists()


EVIL = {
    "AutoConfig": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}


def wants_code(folder: Path, trace: Path, **more: Any) -> None:
    """Have a folder's files ask for code of its own, which would leave a trace."""
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        content = content | {"auto_map": EVIL} | (more if name == "config.json" else {})
        (folder / name).write_text(json.dumps(content))
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')")


def test_remote_code_is_refused_and_not_run(refuse: Refuse, folder: Path, tmp_path: Path) -> None:
    wants_code(folder, tmp_path / "ran", model_type="evil")
    assert "wants to run code of its own (auto_map)" in refuse(f"model.path={folder}")
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_that_transformers_has_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Phi-3's layout: the architecture is known, so that its folder's own code is not needed, and
    never read.
    """
    wants_code(folder, tmp_path / "ran")
    model = load_model(folder, Task.causal_lm)
    assert type(model).__module__.startswith("transformers.models.")
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer).__module__.startswith("transformers.")
    check_loads(folder, Task.causal_lm, labels=None, key="model.path")
    assert not (tmp_path / "ran").exists()
    save_model(model, tokenizer, tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        assert file.suffix != ".py"
        assert file.suffix != ".json" or "evil" not in file.read_text(), file.name
    assert not (tmp_path / "ran").exists()


def test_a_broken_config_is_refused(refuse: Refuse, folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refuse(f"model.path={folder}")


# -- device, disk, tracking -----------------------------------------------------------------------


def test_more_devices_than_there_are_is_refused(refuse: Refuse) -> None:
    assert refuse("hardware.devices=64").startswith("hardware.devices: 64 asked for")
    assert "hardware.device: 'gpu' is no device" in refuse("hardware.device=gpu")
    if not torch.cuda.is_available():
        assert "hardware.device: there is no cuda here; give auto or cpu" in refuse(
            "hardware.device=cuda"
        )
        assert "fp16 with loss scaling needs a CUDA device" in refuse_precision(refuse, "fp16")
        assert "tf32 needs a CUDA device" in refuse_precision(refuse, "tf32")


def refuse_precision(refuse: Refuse, name: str) -> str:
    line = refuse(f"precision={name}")
    assert "choose fp32 or bf16" in line
    return line


def test_no_room_on_the_disk_is_refused(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(10, 9, 5 * 2**20))
    line = refuse()
    assert line.startswith("tracking.root:")
    assert "has 5 MiB free, this needs 256 MiB; free some room" in line


def test_a_root_that_cannot_be_written_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "tracking.root" in refuse(f"tracking.root={tmp_path / 'file' / 'mlruns'}")


def test_a_login_in_a_tracking_uri_is_refused(refuse: Refuse) -> None:
    line = refuse("tracking.uri=https://me:hunter2@host")
    assert "MLFLOW_TRACKING_USERNAME" in line
    assert "hunter2" not in line


# -- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Q?\ndefaults: [\n", "mine.yaml"),
        ("# Q?\ndefaults:\n  - /stage@stages.a: nothing\nprimary_arm: a\n", "nothing"),
        ("# Q?\ndefaults:\n  - /stage@stages.a: train\nprimary_arm: b\n", "primary_arm"),
        (
            (
                "# Q?\ndefaults:\n  - /stage@stages.a: train\nprimary_arm: a\nstages: {a: {stepz:"
                " 1}}\n"
            ),
            "stepz",
        ),
        (
            (
                "# Q?\ndefaults:\n  - /stage@stages.a: train\nprimary_arm: a\ncompare: [{arm: a,"
                " base: z, on: [quality]}]\n"
            ),
            "'z'",
        ),
        ("# Q?\ndefaults:\n  - /stage@stages.base: train\nprimary_arm: base\n", "base"),
        ("primary_arm: a\n", "stages: the recipe places none"),
    ],
)
def test_a_recipe_of_ones_own_that_is_wrong_is_refused(
    refuse: Refuse, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.yaml").write_text(text)
    assert said in refuse("--recipe-dir", str(tmp_path / "own"), recipe="mine")


def test_a_recipe_folder_that_is_not_there_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    assert "--recipe-dir" in refuse("--recipe-dir", str(tmp_path / "nowhere"))


def test_debug_shows_where_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["recipe=baseline", "data.path=/nowhere", "--debug"], started_ns=time.monotonic_ns())
        == 1
    )
    assert "Traceback" in capsys.readouterr().err


def test_a_stage_that_fails_leaves_a_row_a_result_and_no_half_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A rate that explodes: exit 1, hours kept, nothing in the store."""
    monkeypatch.chdir(tmp_path)
    small = [
        *(
            "training.steps=40",
            "training.batch_size=2",
            "training.sequence_length=32",
            "data.max_documents=20",
        ),
        *(
            "model.shape.hidden_size=64",
            "model.shape.heads=1",
            "model.shape.intermediate_size=64",
            "model.shape.layers=1",
        ),
        *("training.learning_rate=1e9", "precision=fp32", "tracking.mlflow=false"),
    ]
    assert main(["recipe=baseline", *small], started_ns=time.monotonic_ns()) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert "lower training.learning_rate" in said.err
    (folder,) = tmp_path.glob("mlruns/runs/*")
    result = json.loads((folder / "result.json").read_text())
    (row,) = result["rows"]
    assert (result["status"], row["status"]) == ("FAILED", "FAILED")
    assert row["ledger"]["device_hours"]["retry"]["value"] > 0
    assert row["artifact"] is None
    assert not (tmp_path / "mlruns/latest").exists()
    assert not list(tmp_path.glob("mlruns/store/tmp/*/*.safetensors"))
    assert shutil.rmtree(tmp_path / "mlruns") is None


# -- what would otherwise be met after the teacher is trained -------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("student.config={foo:1}", "student.config.foo: LlamaConfig has no such key"),
        ("student.config={vocab_size:10}", "student.config: the tokenizer gives token"),
        (
            "student.config={model_type:gpt2}",
            "student.config.model_type: a student is of its source's architecture",
        ),
        ("training.learning_rate=inf", "training.learning_rate: inf is no number to work with"),
        ("serving.volume=inf", "serving.volume: inf is no number to work with"),
        (
            "student.config={num_hidden_layers:0}",
            "student.config.num_hidden_layers: 0 is no number of layers",
        ),
        (
            "serving.load.prompt=4096",
            "serving.load.prompt: 4112 tokens in one sequence, and the model has 2048",
        ),
        (
            "stages.student.mixture=0.3",
            "stages.student.mixture: forward_kl mixes nothing; drop it, or use jsd",
        ),
        (
            "stages.student.head=triton",
            "stages.student.head: the Triton kernel needs a CUDA device",
        ),
        ("quality.sequence_length=4096", "quality.sequence_length: 4096 tokens in one sequence"),
        (
            "stages.teacher.sequence_length=4096",
            "stages.teacher.sequence_length: 4096 tokens in one sequence",
        ),
    ],
)
def test_what_fits_no_model_is_refused_before_a_teacher_is_trained(
    refuse: Refuse, setting: str, said: str
) -> None:
    assert said in refuse("data.max_documents=40", setting, recipe="distill")


def test_a_student_with_fewer_embeddings_than_tokens_is_refused(
    refuse: Refuse, tmp_path: Path
) -> None:
    model = tiny(Task.causal_lm)
    model.resize_token_embeddings(100)
    student = saved(model, tmp_path / "student")
    line = refuse(
        f"model.path={saved(tiny(Task.causal_lm), tmp_path / 'base')}",
        f"student.path={student}",
        "data.max_documents=40",
        recipe="distill",
    )
    assert line.startswith("student.path: the tokenizer gives token")
    assert "the model's embedding ends at 99" in line


@pytest.mark.parametrize("key", ["model.path", "student.path"])
@pytest.mark.parametrize("recipe", ["distill", "quantize_search"])
def test_a_model_that_is_quantized_already_is_refused(
    refuse: Refuse, tmp_path: Path, key: str, recipe: str
) -> None:
    folder = saved(tiny(Task.causal_lm), tmp_path / "model")
    reconfigured(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    line = refuse(f"{key}={folder}", "data.max_documents=40", recipe=recipe)
    assert (
        line
        == f"{key}: the model is quantized already (bitsandbytes); give the model it was made from"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("model.revision=abc",), "model.revision: has no effect without model.path"),
        (("data.subset=en",), "data.subset: has no effect without data.path or data.hub"),
        (("data.hub=a/b", "data.path=."), "data.hub: does not go with data.path"),
    ],
)
def test_what_would_be_ignored_is_refused(
    refuse: Refuse, settings: tuple[str, ...], said: str
) -> None:
    assert said in refuse(*settings)


def test_a_student_of_another_family_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    line = refuse(
        f"student.path={saved(tiny(Task.causal_lm), tmp_path / 'student')}", recipe="distill"
    )
    assert line.startswith("student.path: its tokenizer differs from the teacher's")


def test_a_model_without_a_tokenizer_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    model = saved(tiny(Task.causal_lm), tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "put its tokenizer files beside the weights" in refuse(f"model.path={model}")


def test_chats_for_a_model_without_a_template_are_refused(refuse: Refuse, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": "an answer"},
    ]
    data = jsonl(
        tmp_path / "d.jsonl",
        [{"messages": [{**turns[0], "content": f"{n}?"}, turns[1]]} for n in range(80)],
    )
    assert "no chat template" in refuse(
        data, f"model.path={saved(tiny(Task.causal_lm), tmp_path / 'model')}"
    )


DAMAGED = {
    "truncated": ("cannot be loaded", lambda folder: cut(folder / "model.safetensors")),
    "of another shape": (
        "in its right shape",
        lambda folder: reconfigured(folder, hidden_size=128),
    ),
    "of fewer layers": (
        "in its right shape",
        lambda folder: reconfigured(folder, num_hidden_layers=3),
    ),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reconfigured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("key", ["model.path", "student.path"])
def test_damaged_weights_are_refused_before_anything_is_written(
    refuse: Refuse, tmp_path: Path, damage: str, key: str
) -> None:
    said, harm = DAMAGED[damage]
    whole, damaged = (saved(tiny(Task.causal_lm), tmp_path / name) for name in ("whole", "damaged"))
    harm(damaged)
    others = [] if key == "model.path" else [f"model.path={whole}"]
    line = refuse(f"{key}={damaged}", *others, "data.max_documents=40", recipe="distill")
    assert line.startswith(f"{key}: ")
    assert said in line


def test_an_encoder_is_refused_as_language_model_before_anything_is_written(
    refuse: Refuse, tmp_path: Path
) -> None:
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    encoder = saved(BertForMaskedLM(config), tmp_path / "encoder")
    assert "is an encoder (bert)" in refuse(f"model.path={encoder}", "data.max_documents=40")


def test_a_run_that_cannot_even_begin_leaves_no_folder(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise UserError("tracking.root", "the disk is full", "free some room")

    monkeypatch.setattr(Journal, "write", broken)
    assert "the disk is full" in refuse("data.max_documents=40")
