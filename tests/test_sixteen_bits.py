"""Sixteen bits as a format: what is written, what stays in fp32, what a device cannot do, and who
is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from format_matrix import ARCHITECTURES
from make_assess_models import byte_tokenizer, saved, tiny
from safetensors.torch import load_file

from pipeline.cli.main import main
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.quantization import SIXTEEN_BITS, Format, Prefer
from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.models import sixteen_bits
from pipeline.models.load import load_config, load_model, save_model
from pipeline.quantization import backend, sixteen
from pipeline.quantization.backend import quantize, why_not
from pipeline.quantization.search import Searcher, Trial
from pipeline.runs.preflight import in_native_precision, slow_precision
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.settings import training_precision
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task

CPU = torch.device("cpu")
KEY = "stages.small.format"
DTYPES = {Format.bf16: torch.bfloat16, Format.fp16: torch.float16}


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have this CPU be one on which products in 16 bits take these times fp32's."""

    def take(bf16: float, fp16: float = 80.0) -> None:
        ratios = {Format.bf16: bf16, Format.fp16: fp16}
        monkeypatch.setattr(sixteen_bits, "product_ratio", lambda fmt, _: ratios[fmt])

    take(0.5)
    return take


def source(name: str, folder: Path) -> Path:
    save_model(ARCHITECTURES[name].make(), byte_tokenizer(), folder)
    return folder


@pytest.mark.parametrize("fmt", SIXTEEN_BITS)
# a tied head, transposed weights, modules kept in fp32
@pytest.mark.parametrize("name", ["Qwen2", "GPT-2", "T5"])
def test_every_weight_is_torchs_own_rounding_of_the_source(
    name: str, fmt: Format, tmp_path: Path, units: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit against `tensor.to`; transformers keeps T5's `wo` in fp32 in fp16, and in bf16
    does not.
    """
    units(0.5, 0.5)
    monkeypatch.setattr(backend, "check_bit_equal", lambda *_, **__: None)
    given, task = source(name, tmp_path / "source"), ARCHITECTURES[name].task
    done = quantize(given, tmp_path / "out", fmt, task, device=CPU, key=KEY)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (given, tmp_path / "out")
    )
    assert set(before) == set(after)
    kept = {key for key, tensor in after.items() if tensor.dtype is torch.float32}
    assert kept == {
        key for key in before if name == "T5" and fmt is Format.fp16 and key.endswith(".wo.weight")
    }
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key].to(tensor.dtype)), key
    numbers = sum(tensor.numel() for tensor in before.values())
    assert (done.parameters, done.quantized_parameters) == (
        numbers,
        numbers - sum(before[key].numel() for key in kept),
    )
    assert set(done.kept_layers) == kept
    assert load_config(tmp_path / "out").dtype is DTYPES[fmt]


def test_it_is_loaded_as_it_is_to_be_assessed_and_in_fp32_to_be_trained(
    tmp_path: Path, units: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "check_bit_equal", lambda *_, **__: None)
    given = saved(tiny(Task.causal_lm), tmp_path / "source")
    quantize(given, tmp_path / "out", Format.bf16, Task.causal_lm, device=CPU, key=KEY)
    assert sixteen_bits.stored_dtype(given, CPU) is torch.float32
    assert sixteen_bits.stored_dtype(tmp_path / "out", CPU) is torch.bfloat16
    assert sixteen_bits.stored_said(tmp_path / "out", CPU) is None
    as_it_is = load_model(
        tmp_path / "out", Task.causal_lm, dtype=sixteen_bits.stored_dtype(tmp_path / "out", CPU)
    )
    to_train = load_model(tmp_path / "out", Task.causal_lm)
    for (name, own), master in zip(as_it_is.named_parameters(), to_train.parameters(), strict=True):
        assert (own.dtype, master.dtype) == (torch.bfloat16, torch.float32), name
        assert torch.equal(own.float(), master), name
    units(80.0)  # an older machine reads the same folder: in fp32, and says so
    assert sixteen_bits.stored_dtype(tmp_path / "out", CPU) is torch.float32
    assert "stored in bf16, computed in fp32: a product in bf16 takes 80 times" in (
        sixteen_bits.stored_said(tmp_path / "out", CPU) or ""
    )


@pytest.mark.slow
def test_a_fresh_process_proves_it(tmp_path: Path, units: Any) -> None:
    """What `quantize` itself does, for a classifier that keeps no weight in 32 bits."""
    given = source("BERT", tmp_path / "source")
    done = quantize(
        given, tmp_path / "out", Format.bf16, Task.sequence_classification, device=CPU, key=KEY
    )
    assert len(done.logits_sha256) == 3
    assert (done.share, done.bytes_after < 0.51 * done.bytes_before) == (1.0, True)
    assert done.say() == "100.0% of the parameters in bf16"


# -- what a device cannot do ----------------------------------------------------------------------


def test_what_no_stage_names_is_bf16_where_the_device_has_units_for_it(units: Any) -> None:
    run = Run(stages={"a": TrainStage()})
    assert run.precision.name is Precision.native
    for ratio in (0.5, 1.2):  # units, and a reading that does not tell
        units(ratio)
        chosen, said = in_native_precision(run, CPU)
        assert (chosen.precision.name, said) == (Precision.bf16, [])
        assert training_precision(chosen.stages["a"], chosen) is Precision.bf16
    units(3.0)
    chosen, said = in_native_precision(run, CPU)
    assert chosen.precision.name is Precision.fp32
    assert said == ["precision=native is fp32: this cpu has no units for bf16"]
    own = Run(stages={"a": TrainStage(precision=Precision.bf16)})
    assert in_native_precision(own, CPU)[1] == []  # nothing inherits it
    named = Run(stages=run.stages, precision=PrecisionConfig(name=Precision.bf16))
    assert in_native_precision(named, CPU) == (named, [])


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        ("distill", "stages.student.precision"),
        ("distill", "stages.student.teacher_precision"),
        ("quantize", "stages.int8.qat.precision"),
    ],
)
def test_a_stage_names_its_precision_itself(
    recipe: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recovered = ["stages.int8.recover=[qat]"] if recipe == "quantize" else []
    argv = [f"recipe={recipe}", f"{setting}=native", *recovered]
    assert main(argv, started_ns=0) == 1
    assert capsys.readouterr().err == (
        f"refused: {setting}: native is for all stages that name no precision; leave it out, or"
        " name a precision\n"
    )


def test_training_in_bits_that_a_device_has_no_units_for_is_said_to_be_slower(units: Any) -> None:
    named = PrecisionConfig(name=Precision.bf16)
    run = Run(stages={"a": TrainStage()}, precision=named)
    own = Run(stages={"a": TrainStage(precision=Precision.bf16)}, precision=named)
    units(3.0)
    assert slow_precision(run, CPU) == [
        "bf16 takes 3.0x fp32's time on this cpu: precision=fp32 trains faster"
    ]
    assert slow_precision(own, CPU) == []  # what a recipe compares precisions by
    in_fp32 = PrecisionConfig(name=Precision.fp32)
    assert slow_precision(Run(stages=run.stages, precision=in_fp32), CPU) == []
    for ratio in (0.5, 1.2):  # units, and a reading that does not tell
        units(ratio)
        assert slow_precision(run, CPU) == []


def test_a_device_without_units_is_told_by_a_product(units: Any) -> None:
    units(0.5, 80.0)
    assert (why_not(Format.bf16, CPU), sixteen_bits.units_said(Format.bf16, CPU)) == (None, "")
    assert (
        why_not(Format.fp16, CPU)
        == "a product in fp16 takes 80 times fp32's time on this cpu, which has no units for it"
    )
    assert sixteen_bits.best_first(CPU) == [Format.bf16, Format.fp16]
    units(2.5, 0.7)
    assert why_not(Format.bf16, CPU) is None
    assert (
        "this cpu has no units for bf16 (a product takes 2.5 times fp32's time)"
        in sixteen_bits.units_said(Format.bf16, CPU)
    )
    assert sixteen_bits.best_first(CPU) == [Format.fp16, Format.bf16]
    units(float("inf"))
    assert "cannot be computed on this cpu" in (why_not(Format.bf16, CPU) or "")
    with pytest.raises(UserError) as error:
        sixteen.refuse_device(Format.bf16, device=CPU, key=KEY)
    assert (error.value.key, error.value.remedy) == (
        KEY,
        "use a format of 8 bits, or a device with such units",
    )


@pytest.mark.parametrize(
    ("native", "fmt", "said"),
    [
        (True, Format.bf16, None),
        (False, Format.bf16, "Some GPU has no units for bf16"),
        (False, Format.fp16, None),
    ],
)
def test_a_gpu_says_what_it_has(
    native: bool, fmt: Format, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    assert why_not(fmt, torch.device("cuda")) == said


def test_the_product_is_timed_on_a_cpu_that_is_made_older() -> None:
    """oneDNN told to use AVX2 alone: what a CPU of 2015 would say; the units of this one are not
    seen.
    """
    code = (
        "import torch; from pipeline.config.settings.quantization import Format;"
        " from pipeline.models import sixteen_bits;"
        " print(sixteen_bits.product_ratio(Format.bf16, 'cpu'),"
        " sixteen_bits.has_units(Format.bf16, torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**__import__("os").environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
    )
    ratio, has = done.stdout.split()
    assert (float(ratio) > 2, has) == (True, "False")


# -- what a model cannot do -----------------------------------------------------------------------


def test_a_weight_beyond_fp16_is_refused_by_name(tmp_path: Path, units: Any) -> None:
    units(0.5, 0.5)
    model = tiny(Task.causal_lm)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    given = saved(model, tmp_path / "source")
    with pytest.raises(
        UserError,
        match=r"layers\.1\.mlp\.up_proj\.weight holds a weight that fp16 has no number for",
    ):
        quantize(given, tmp_path / "out", Format.fp16, Task.causal_lm, device=CPU, key=KEY)
    assert not (tmp_path / "out").exists()
    quantize(
        given, tmp_path / "bf16", Format.bf16, Task.causal_lm, device=CPU, key=KEY, prove=False
    )


def test_a_model_whose_code_does_not_run_in_it_is_refused_with_the_reason(
    tmp_path: Path, units: Any
) -> None:
    given = source("XLNet", tmp_path / "source")
    with pytest.raises(
        UserError, match="XLNetForSequenceClassification does not run in bf16 by torch"
    ):
        quantize(
            given, tmp_path / "out", Format.bf16, Task.sequence_classification, device=CPU, key=KEY
        )


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"include": ["*.mlp.*"]}, "include"),
        ({"exclude": ["*"]}, "exclude"),
        ({"quantize_head": True}, "quantize_head"),
        ({"smoothing": 0.5}, "smoothing"),
        ({"prefer": Prefer.memory}, "prefer"),
    ],
)
def test_settings_of_single_layers_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as error:
        QuantizeStage(format=Format.bf16, **settings).check("stages.small", Run())
    assert error.value.key == f"stages.small.{key}"


# -- what others are read against -----------------------------------------------------------------


def search(
    known: dict[Format, tuple[float, float, float]], candidates: list[Format], **more: Any
) -> Any:
    """Search among made-up trials: by format, the loss, the time and the weights over fp32's."""
    given = {"prefer": Prefer.time, "beside": [], **more}

    def measure(fmt: Format, exclude: tuple[str, ...]) -> Trial:
        if fmt not in known:
            raise UserError("format", "does not run", "leave it out")
        loss, seconds, weights = known[fmt]
        return Trial(fmt, exclude, loss, 0.0, seconds, weights)

    return Searcher(measure, lambda _: ("a", "b"), 0.01, given["prefer"], lambda: False).run(
        candidates, given["beside"]
    )


def test_a_format_that_beats_fp32_and_not_the_16_bits_does_not_pay() -> None:
    """int8 takes half of fp32's time, bf16 a third: today's search would have kept int8."""
    known = {
        Format.bf16: (0.0, 0.33, 0.5),
        Format.int8: (0.0, 0.5, 0.3),
        Format.nf4: (0.0, 0.2, 0.2),
    }
    assert search(known, [Format.bf16, Format.int8]).best.fmt is Format.bf16
    assert search(known, [Format.int8], beside=[Format.bf16]).best is None
    said = search(known, [Format.int8], beside=[Format.bf16]).why
    assert said == "nothing that holds the tolerance saves time over bf16, the best 16-bit form"
    assert search(known, [Format.int8, Format.nf4], beside=[Format.bf16]).best.fmt is Format.nf4
    assert (
        search(known, [Format.int8], beside=[Format.bf16], prefer=Prefer.memory).best.fmt
        is Format.int8
    )


def test_16_bits_that_lose_too_much_or_do_not_run_are_nothing_to_read_against() -> None:
    known = {Format.bf16: (0.5, 0.33, 0.5), Format.int8: (0.0, 0.5, 0.3)}
    assert search(known, [Format.bf16, Format.int8]).best.fmt is Format.int8
    found = search({Format.int8: (0.0, 0.5, 0.3)}, [Format.bf16, Format.int8])
    assert (found.best.fmt, found.refused) == (Format.int8, ("bf16: does not run",))


def test_what_is_no_number_can_be_written() -> None:
    trial = Trial(Format.fp16, (), float("inf"), float("nan"), 0.5, 0.5)
    assert json.loads(json.dumps(trial.to_json(), allow_nan=False))["loss"] is None


def test_sixteen_bits_are_tried_first() -> None:
    assert backend.formats()[:2] == [Format.bf16, Format.fp16]
