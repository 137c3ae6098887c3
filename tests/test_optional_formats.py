"""A format that a model does not take: a refusal by name; in a run a row with the reason, and all
else goes on.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from here import here, result_in
from make_assess_models import LABELS, byte_tokenizer, saved, tiny
from test_run import TINY

import pipeline.quantization.backend as backend
from pipeline.config.settings.quantization import Format, Prefer
from pipeline.errors import StageFailed, UserError
from pipeline.evaluation.quality import assess
from pipeline.models import sixteen_bits
from pipeline.models.load import load_model, save_model
from pipeline.quantization import bnb, reload_check
from pipeline.quantization.backend import quantize
from pipeline.quantization.search import Searcher, Trial
from pipeline.quantization.trials import Bench
from pipeline.tasks.table import Task

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
KEY = "stages.small.format"
SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FUNNEL_HAS_NO = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "bos_token_id",
)
CLASSES = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {name: n for n, name in enumerate(LABELS)},
}


def made(folder: Path, config: str, task: Task = Task.sequence_classification, **more: Any) -> Path:
    torch.manual_seed(0)
    settings = SMALL | more | (CLASSES if task is Task.sequence_classification else {})
    settings = {name: value for name, value in settings.items() if value is not None}
    model = reload_check.auto_class(task).from_config(getattr(transformers, config)(**settings))
    save_model(model.float().eval(), byte_tokenizer(), folder)
    return folder


# -- one conversion -------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def _any_device_takes_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a CPU without units for bf16 not refuse it: what is made is looked at, not how fast."""
    monkeypatch.setattr(sixteen_bits, "product_ratio", lambda *_: 1.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tiny(Task.causal_lm), tmp_path / "source")


def convert(source: Path, fmt: Format = Format.int8) -> None:
    quantize(source, source.with_name("out"), fmt, Task.causal_lm, device=CPU, key=KEY)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("q_proj"), "KeyError: 'q_proj'"),
        (AttributeError("no such thing\nmore"), "AttributeError: no such"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("tensors share memory"), "tensors share memory"),
        (OSError("no file named pytorch_model.bin"), "OSError: no file named"),
        (IndexError("5"), "IndexError: 5"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize(
    "where", ["load_quantized", "save_model", "take_reference", "check_bit_equal", "_split"]
)
def test_whatever_a_library_raises_is_a_refusal_by_name(
    source: Path, where: str, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"load_quantized": bnb, "_split": backend.plan_layers.__globals__}.get(where, backend)
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, where, raising(error))
    else:
        monkeypatch.setattr(owner, where, raising(error))
    with pytest.raises(UserError) as caught:
        convert(source)
    assert caught.value.key == KEY
    assert caught.value.problem.startswith(
        f"LlamaForCausalLM does not run in int8 by bitsandbytes ({said}"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("host"),
        OSError(errno.ENOSPC, "No space left"),
        OSError(errno.EACCES, "denied"),
        RuntimeError("DefaultCPUAllocator: can't allocate"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
        StageFailed("no proof"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_what_is_no_fault_of_the_format_passes(
    source: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "save_model", raising(error))  # pyright: ignore[reportArgumentType]
    with pytest.raises(type(error)) as caught:
        convert(source)
    assert caught.value is error


@pytest.mark.parametrize(
    ("program", "kind", "said"),
    [
        (
            "raise TypeError('no such layer')",
            UserError,
            "cannot be loaded in a fresh process: TypeError: no such layer",
        ),
        ("import sys; sys.exit(7)", UserError, "cannot be loaded in a fresh process: exit 7"),
        ("raise MemoryError", StageFailed, "fresh process: MemoryError"),
        ("import os; os.kill(os.getpid(), 9)", StageFailed, "fresh process: exit -9"),
    ],
)
def test_what_cannot_be_loaded_again_is_refused_and_a_killed_proof_fails(
    source: Path, program: str, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = source.with_name("program.py")
    file.write_text(program)
    monkeypatch.setattr(reload_check, "PROGRAM", file)
    monkeypatch.setattr(backend, "WORDS", 1000)
    with pytest.raises(kind) as caught:
        convert(source)
    assert said in str(caught.value)


def test_a_library_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "import_module", raising(ImportError("undefined symbol: cget")))
    with pytest.raises(
        UserError, match=r"does not run in nf4 by bitsandbytes \(ImportError: undefined symbol"
    ):
        backend.import_library(Format.nf4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "more"),
    [
        (
            "FunnelConfig",
            {
                "d_model": 64,
                "n_head": 2,
                "d_head": 32,
                "d_inner": 128,
                "block_sizes": [1, 1],
                "eos_token_id": None,
                **dict.fromkeys(FUNNEL_HAS_NO),
            },
        ),
        ("IBertConfig", {"max_position_embeddings": 66}),
    ],
)
@pytest.mark.usefixtures("_any_device_takes_bf16")
def test_configurations_and_embeddings_that_say_little_are_quantized(
    tmp_path: Path, config: str, more: dict[str, Any]
) -> None:
    """No end token, no text of one token (Funnel); an embedding that does not say its size
    (I-BERT).
    """
    given = made(tmp_path / "source", config, **more)
    done = quantize(
        given, tmp_path / "out", Format.bf16, Task.sequence_classification, device=CPU, key=KEY
    )
    assert done.share == 1


@pytest.mark.slow
def test_an_architecture_that_does_not_come_back_is_refused(tmp_path: Path) -> None:
    """NomicBERT's layers are put together as they are read: bitsandbytes cannot save them as they
    were.
    """
    given = made(tmp_path / "source", "NomicBertConfig")
    for fmt in (Format.nf4, Format.int8):
        with pytest.raises(
            UserError, match=f"NomicBertForSequenceClassification does not run in {fmt.value} by"
        ):
            quantize(
                given, tmp_path / fmt.value, fmt, Task.sequence_classification, device=CPU, key=KEY
            )


# -- a search -------------------------------------------------------------------------------------


def test_a_search_leaves_out_what_turns_out_not_to_be_one() -> None:
    """Where its trial, its proof, or the ranking of its layers fails."""

    def measure(fmt: Format, exclude: tuple[str, ...]) -> Trial:
        if fmt is Format.nf4:
            raise StageFailed("other layers than planned")
        if fmt is Format.fp4:
            raise UserError(KEY, "does not run", "leave it out")
        return Trial(fmt, exclude, 0.5 if fmt is Format.int8 else 0.0, 0.0, 0.9, 0.5)

    def sensitive(_: Format) -> tuple[str, ...]:
        raise UserError(KEY, "cannot be patched", "leave it out")

    searcher = Searcher(measure, sensitive, 0.01, Prefer.time, lambda: False)
    found = searcher.run([Format.nf4, Format.fp4, Format.int8])
    assert found.best is None
    assert found.refused == (
        "nf4: other layers than planned",
        "fp4: does not run",
        "int8: cannot be patched",
    )
    searcher = Searcher(measure, sensitive, 0.01, Prefer.time, lambda: False)
    best = searcher.run([Format.nf4, Format.int8_weight_only]).best
    assert best is not None
    assert best.fmt is Format.int8_weight_only


# -- a run ----------------------------------------------------------------------------------------


@pytest.fixture
def _unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "check_bit_equal", lambda *args, **more: None)


RUN = (
    "tracking.charts=false",
    "recipe=quantize",
    "~stages.bf16",
    "~stages.fp16",
    "tracking.mlflow=false",
    "allow_no_speedup=true",
    (
        "compare=[{arm: int8, base: reference, on: [quality, serving]}, {arm: nf4, base: reference,"
        " on: [quality]}]"
    ),
)
FAULTS = {
    "saving": (
        backend,
        "save_model",
        AttributeError("no dtype"),
        "does not run in nf4 by bitsandbytes (AttributeErro",
    ),
    "proving": (backend, "check_bit_equal", StageFailed("is not the model"), "is not the model"),
    "memory": (backend, "take_reference", MemoryError(), "out of host memory"),
    "assessing": (assess, "score_causal", IndexError("out of range"), "IndexError: out of range"),
    "numbers": (
        assess,
        "score_causal",
        StageFailed("outputs are not finite"),
        "outputs are not fini",
    ),
}


@pytest.mark.usefixtures("_unproven")
@pytest.mark.parametrize(
    "fault",
    [pytest.param(each, marks=() if each == "proving" else pytest.mark.slow) for each in FAULTS],
)
def test_an_optional_format_that_fails_is_a_row_and_the_run_goes_on(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not optional it ends the run; what failed is published nowhere, and what reads it is
    skipped.
    """
    owner, name, error, said = FAULTS[fault]
    plain, in_nf4 = getattr(owner, name), [False]
    convert = backend.backend_of(Format.nf4).load_quantized

    def noted(source: Path, fmt: Format, *args: Any, **more: Any) -> Any:
        in_nf4[0] = fmt is Format.nf4
        return convert(source, fmt, *args, **more)

    def failing(*args: Any, **more: Any) -> Any:
        if in_nf4[0]:
            raise error
        return plain(*args, **more)

    monkeypatch.setattr(bnb, "load_quantized", noted)
    monkeypatch.setattr(owner, name, failing)
    done = here(tmp_path, *RUN, "stages.nf4.optional=true", *TINY)
    assert done.returncode == 0, done.stderr
    result = result_in(tmp_path)
    rows = {row["arm"]: row for row in result["rows"]}
    assert rows["nf4"]["status"] == "FAILED"
    assert said in json.dumps(rows["nf4"])
    assert any(note.startswith("nf4: ") and said in note for note in result["environment"]["notes"])
    assert rows["int8"]["status"] == "FINISHED"
    assert rows["int8"]["quality"]["bits_per_byte"]["value"] is not None
    in_nf4[0] = False
    if fault == "saving":
        strict = here(tmp_path, *RUN, "stages.nf4.optional=false", *TINY, "tracking.root=strict")
        assert strict.returncode == 1


FALLBACKS = (
    "recipe=quantize_recover",
    "~stages.bf16",
    "stages.quantized.format=fp4",
    "tracking.mlflow=false",
    "stages.quantized.tolerance=9",
    "allow_no_speedup=true",
    *TINY,
)


@pytest.mark.slow
@pytest.mark.usefixtures("_unproven")
def test_a_ladder_goes_past_a_format_that_is_none_for_this_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for is refused, its training too; the next format is taken."""
    monkeypatch.setattr(
        sixteen_bits, "product_ratio", lambda fmt, _: 2.0 if fmt is Format.bf16 else 80.0
    )
    plain = bnb.load_quantized
    able = [Format.nf4]

    def load(source: Path, fmt: Format, *args: Any, **more: Any) -> Any:
        if fmt not in able:
            raise KeyError("absmax")
        return plain(source, fmt, *args, **more)

    monkeypatch.setattr(bnb, "load_quantized", load)
    done = here(tmp_path, *FALLBACKS, "stages.quantized.recover=[lora,format]")
    assert done.returncode == 0, done.stderr
    rows = {row["arm"]: row for row in result_in(tmp_path)["rows"]}
    assert rows["quantized/fp4"]["status"] == "FAILED"
    assert rows["quantized/lora"]["status"] == "SKIPPED"
    assert "absmax" in json.dumps(rows["quantized/lora"])
    assert rows["quantized"]["artifact"]["digest"] == rows["quantized/nf4"]["artifact"]["digest"]


@pytest.mark.slow
@pytest.mark.usefixtures("_unproven")
def test_fallbacks_none_of_which_can_be_tried_is_refused_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sixteen_bits, "product_ratio", lambda fmt, _: 2.0 if fmt is Format.bf16 else 80.0
    )
    monkeypatch.setattr(bnb, "load_quantized", raising(KeyError("absmax")))
    done = here(tmp_path, *FALLBACKS, "stages.quantized.recover=[lora]", "tracking.root=second")
    assert done.returncode == 1
    assert "does not run in fp4 by bitsandbytes (KeyError: 'absmax')" in done.stderr
    done = here(
        tmp_path,
        *FALLBACKS,
        "stages.quantized.recover=[lora]",
        "stages.quantized.optional=true",
        "tracking.root=third",
    )
    assert done.returncode == 0, done.stderr
    rows = {
        row["arm"]: row
        for row in json.loads((tmp_path / "third/latest/result.json").read_text())["rows"]
    }
    assert (rows["quantized"]["status"], rows["quantized"]["artifact"]) == ("SKIPPED", None)


@pytest.mark.slow
@pytest.mark.usefixtures("_unproven")
def test_a_trial_that_crashes_while_it_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Bench._serve  # pyright: ignore[reportPrivateUsage]

    def serve(self: Bench, folder: Path) -> tuple[float, float]:
        config = json.loads((folder / "config.json").read_text())
        if config.get("quantization_config", {}).get("load_in_4bit"):
            raise IndexError("of a cache")
        return plain(self, folder)

    monkeypatch.setattr(Bench, "_serve", serve)
    done = here(
        tmp_path,
        "recipe=quantize_search",
        "~stages.bf16",
        "stages.quantized.candidates=[fp4,int8]",
        "tracking.mlflow=false",
        "allow_no_speedup=true",
        *TINY,
    )
    assert done.returncode == 0, done.stderr
    (note,) = [
        each for each in result_in(tmp_path)["environment"]["notes"] if "not tried: fp4" in each
    ]
    assert "IndexError: of a cache" in note


# -- models that read more than text --------------------------------------------------------------


def seeing(kind: str) -> Any:
    """Return the configuration of a tiny model that reads images too."""
    text = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    sight: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    sight |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "idefics3":
        return transformers.Idefics3Config(
            text_config=text, vision_config=sight, image_token_id=258, scale_factor=1
        )
    if kind == "vipllava":
        return transformers.VipLlavaConfig(
            text_config=text,
            vision_config=transformers.CLIPVisionConfig(**sight),
            image_token_index=258,
        )
    return transformers.LlavaNextConfig(
        text_config=text,
        vision_config=transformers.CLIPVisionConfig(**sight),
        image_token_index=258,
    )


def seeing_folder(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    save_model(
        transformers.AutoModelForImageTextToText.from_config(seeing(kind)).float(),
        byte_tokenizer(),
        folder,
    )
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("_any_device_takes_bf16")
@pytest.mark.parametrize("kind", ["idefics3", "vipllava", "llava_next"])
def test_the_language_part_of_a_model_that_sees_is_quantized(tmp_path: Path, kind: str) -> None:
    given = seeing_folder(tmp_path / "source", kind)
    whole = load_model(given, Task.causal_lm)
    for fmt in (Format.bf16, Format.int8):
        done = quantize(
            given,
            tmp_path / fmt.value,
            fmt,
            Task.causal_lm,
            device=CPU,
            key=KEY,
            prove=fmt is Format.int8,
        )
        made = load_model(tmp_path / fmt.value, Task.causal_lm)
        assert type(made) is type(whole)
        assert done.parameters == sum(each.numel() for each in whole.parameters())
        assert done.bytes_before > done.bytes_after


@pytest.mark.slow
@pytest.mark.usefixtures("_unproven")
def test_a_run_quantizes_a_model_that_sees(tmp_path: Path) -> None:
    given = seeing_folder(tmp_path / "source", "llava_next")
    more = (
        "~stages.nf4",
        "compare=[{arm: int8, base: reference, on: [quality]}]",
        f"model.path={given}",
    )
    tiny_data = [each for each in TINY if not each.startswith(("model.shape", "data.vocab"))]
    done = here(tmp_path, *RUN[:6], *more, *tiny_data, "stages.reference.steps=0")
    assert done.returncode == 0, done.stderr
    assert {row["arm"]: row["status"] for row in result_in(tmp_path)["rows"]}["int8"] == "FINISHED"
