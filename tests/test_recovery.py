"""Recovery: fake quantization against the libraries' own layers, and the fallbacks as a user meets
it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from few import few
from here import here, result_in
from make_assess_models import saved, tiny
from reports import whole_report
from test_assess_quality import causal_documents, trained
from transformers import GPT2Config, GPT2LMHeadModel

import pipeline.quantization.backend
from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.models import sixteen_bits
from pipeline.models.load import load_model
from pipeline.quantization import fake
from pipeline.quantization.backend import LIBRARIES, backend_of, quantize, why_not
from pipeline.quantization.fake import ACTIVATIONS, Adapters, LowRank, fake_quantize
from pipeline.quantization.fresh_process import ALIGNMENT, align
from pipeline.quantization.layers import EVERY_LAYER, plan_layers
from pipeline.quantization.trials import Bench
from pipeline.tasks.table import Task
from pipeline.training.checkpoint import trained_part

CPU = torch.device("cpu")
FORMATS = [
    fmt
    for fmt in pipeline.quantization.backend.formats()
    if why_not(fmt, CPU) is None and fmt not in SIXTEEN_BITS
]
IDS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have no units for 16 bits, so that a ladder is the same on every machine; a test may ask for
    them.
    """
    ratio = [2.0]
    monkeypatch.setattr(
        sixteen_bits, "product_ratio", lambda fmt, _: ratio[0] if fmt is Format.bf16 else 80.0
    )

    def take(bf16: float) -> None:
        ratio[0] = bf16

    return take


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model that knows its few documents."""
    model = trained(Task.causal_lm, causal_documents(60), steps=150)
    return saved(model, tmp_path_factory.mktemp("source") / "model")


def faked(model: Any, fmt: Format, adapters: Adapters | None = None) -> Any:
    layers = plan_layers(model.config, Task.causal_lm, key="format", choice=EVERY_LAYER).quantize
    return fake_quantize(model, layers, fmt, torch.float32, adapters)


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 keeps its weights the other way round: (in, out)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    ).eval()


# -- fake quantization ----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", few(FORMATS, 3))
def test_weights_are_rounded_as_the_library_stores_them(
    fmt: Format, source: Path, tmp_path: Path
) -> None:
    """Bit by bit, against what peft reads from the layers of a model that was quantized and
    loaded.
    """
    from peft.utils.integrations import dequantize_module_weight

    quantize(source, tmp_path, fmt, Task.causal_lm, device="cpu", key="format", prove=False)
    stored = load_model(tmp_path, Task.causal_lm)
    model: Any = load_model(source, Task.causal_lm)
    faked(model, fmt)
    for name, module in stored.named_modules():
        if backend_of(fmt).is_quantized(module):
            weight: Any = module.weight
            theirs = (
                weight.dequantize()
                if LIBRARIES[fmt] == "torchao"
                else dequantize_module_weight(module)
            )
            assert torch.equal(model.get_submodule(name).weight, theirs.float()), name


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt in ACTIVATIONS])
def test_inputs_are_rounded_as_the_kernel_does(fmt: Format, source: Path, tmp_path: Path) -> None:
    """A layer of the faked model gives what that of the quantized one gives; with its weights alone
    it would not.
    """
    quantize(source, tmp_path, fmt, Task.causal_lm, device="cpu", key="format", prove=False)
    model: Any = load_model(source, Task.causal_lm)
    faked(model, fmt)
    stored: Any = load_model(tmp_path, Task.causal_lm)
    ours, theirs = (each.model.layers[0].mlp.up_proj for each in (model, stored))
    inputs = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    inputs[:, 4, 7] = 9.0  # an outlier, as LLM.int8() calls it
    with torch.no_grad():
        error = (ours(inputs) - theirs(inputs)).square().mean()
        weights_alone = (inputs @ ours.weight.T - theirs(inputs)).square().mean()
    assert error < (1e-4 if fmt is Format.int8 else 0.01) * weights_alone


@pytest.mark.parametrize("rounds", [True, False])
def test_int8_rounds_inputs_where_the_library_does(
    rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of the library on each device: a build that multiplies rounded weights with inputs as
    they are is one.
    """
    from bitsandbytes.nn.modules import Linear8bitLt

    if not rounds:
        as_in_training = Linear8bitLt.forward

        def unrounded(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
            layer.train()  # on a CPU it then leaves its inputs alone
            return as_in_training(layer, inputs)

        monkeypatch.setattr(Linear8bitLt, "forward", unrounded)
    fake.rounds_inputs.cache_clear()
    try:
        assert fake.rounds_inputs("cpu") is rounds
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
        assert torch.equal(fake.int8_but_outliers(inputs), inputs) is not rounds
    finally:
        fake.rounds_inputs.cache_clear()


@pytest.mark.parametrize("adapters", [None, Adapters(rank=4, alpha=8.0)])
def test_gradients_are_those_at_the_rounded_weights(
    adapters: Adapters | None, source: Path
) -> None:
    """In float64, against autograd of a plain model that has the rounded weights; adapters by the
    chain rule.
    """
    model: Any = load_model(source, Task.causal_lm)
    faked(model, Format.nf4, adapters)
    layer = model.model.layers[0].mlp.up_proj
    if adapters is not None:
        torch.nn.init.normal_(
            layer.parametrizations.weight[0].up,
            std=0.02,
            generator=torch.Generator().manual_seed(1),
        )
    plain: Any = load_model(source, Task.causal_lm)
    for each in (model, plain):  # before weights are copied: rounded to fp32 they are others
        each.double()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(model.get_submodule(name).weight)
    for each in (model, plain):
        each(input_ids=IDS, labels=IDS).loss.backward()
    true = plain.model.layers[0].mlp.up_proj.weight.grad
    own = layer.parametrizations.weight
    if adapters is None:
        torch.testing.assert_close(own.original.grad, true, rtol=1e-5, atol=1e-9)
        return
    torch.testing.assert_close(own[0].up.grad, 2.0 * true @ own[0].down.T, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(own[0].down.grad, 2.0 * own[0].up.T @ true, rtol=1e-5, atol=1e-9)
    assert [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "parametrizations" not in name
    ] == []


@pytest.mark.parametrize("adapters", [None, Adapters(rank=2, alpha=4.0)])
@pytest.mark.parametrize("make", [lambda: tiny(Task.causal_lm), gpt2])
def test_undone_it_leaves_a_plain_model_with_what_was_trained(
    make: Any, adapters: Adapters | None
) -> None:
    model, before = make(), make().state_dict()
    undo = faked(model, Format.nf4, adapters)
    name, module = next((n, m) for n, m in model.named_modules() if hasattr(m, "parametrizations"))
    if adapters is None:
        added = torch.full_like(module.parametrizations.weight.original, 0.01)
        module.parametrizations.weight.original.data += added
    else:
        low = module.parametrizations.weight[0]
        assert isinstance(low, LowRank)
        torch.nn.init.normal_(low.up)
        added = 2.0 * (low.up @ low.down).detach()
    rounded = model(input_ids=IDS).logits
    undo()
    after = model.state_dict()
    assert after.keys() == before.keys()
    torch.testing.assert_close(after.pop(f"{name}.weight"), before.pop(f"{name}.weight") + added)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not torch.equal(model(input_ids=IDS).logits, rounded)  # nothing rounds any more


def test_a_checkpoint_of_a_partly_frozen_model_holds_what_is_trained() -> None:
    model = tiny(Task.causal_lm)
    names = {name for name, _ in model.named_parameters()}
    assert trained_part(model).keys() == names
    faked(model, Format.nf4, Adapters(rank=2, alpha=4.0))
    part = trained_part(model)
    assert {name.rpartition(".")[2] for name in part} == {"up", "down"}
    own = dict(model.named_parameters())
    assert all(part[name].data_ptr() == own[name].data_ptr() for name in part)  # no copies


def test_weights_that_lie_askew_are_moved_and_stay_what_they_are() -> None:
    """A product with one token rounds by where its weight begins, and a mapped file has tensors
    anywhere.
    """
    model = tiny(Task.causal_lm)
    want = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + 1)[1:].view_as(parameter)
        parameter.data = room.copy_(parameter.data)
    assert any(p.data_ptr() % ALIGNMENT for p in model.parameters())
    align(model)
    assert not any(p.data_ptr() % ALIGNMENT for p in model.parameters())
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())


# -- the ladder -----------------------------------------------------------------------------------


class Recovering:
    """Runs `recipe=quantize_recover` on one model in one store: what was made once is found
    again.
    """

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        texts = [json.dumps({"text": each.text}) for each in causal_documents(120)]
        (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")

    def run(self, *settings: str) -> subprocess.CompletedProcess[str]:
        return here(
            self.folder,
            "recipe=quantize_recover",
            "~stages.bf16",
            f"model.path={self.source}",
            "data.path=texts.jsonl",
            "tracking.mlflow=false",
            "stages.reference.steps=0",
            "stages.quantized.format=fp4",
            "training.sequence_length=64",
            "training.batch_size=8",
            "training.steps=30",
            "quality.bootstrap=200",
            "serving.blocks=2",
            "serving.load.prompt=8",
            "serving.load.new=4",
            "serving.batches=[1]",
            "hardware.device=cpu",
            *settings,
        )

    def __call__(self, *settings: str) -> dict[str, Any]:
        done = self.run(*settings)
        assert done.returncode == 0, done.stderr
        return result_in(self.folder)


@pytest.fixture(scope="module")
def recovering(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[Recovering]:
    # the proof of the reload has tests of its own, and takes seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.quantization.backend, "check_bit_equal", lambda *args, **more: None)
        yield Recovering(tmp_path_factory.mktemp("recovering"), source)


def attempts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["arm"].rpartition("/")[2]: row for row in result["rows"] if "/" in row["arm"]}


def loss(row: dict[str, Any]) -> float:
    return row["recovery"]["loss"]["value"]


def between(recovering: Recovering, worse: str, better: str, *settings: str) -> float:
    """Return a tolerance that one fallback misses and another holds, from what both lose here.

    What a tiny model loses depends on the processor that trained it; which fallback loses less must
    not.
    """
    lost = attempts(recovering(*settings, "stages.quantized.tolerance=0"))
    found = loss(lost[worse]), loss(lost[better])
    assert found[1] < found[0], found
    return (found[0] + max(found[1], 0.0)) / 2


def check_it_is(result: dict[str, Any], name: str | None, skipped: Sequence[str] = ()) -> None:
    """Check that the stage is what the fallback made (None: its source), that it alone is assessed,
    and who is charged.
    """
    rows = {row["arm"]: row for row in result["rows"]}
    own = rows["quantized"]
    taken = rows["reference"] if name is None else rows[f"quantized/{name}"]
    assert own["artifact"]["digest"] == taken["artifact"]["digest"]
    assert own["quality"]["kl_to_unquantized"]["value"] is not None
    made = [arm for arm in rows if arm.startswith("quantized/") and arm not in skipped]
    assert own["depends_on"] == ["reference", *made]
    for arm in made:
        assert rows[arm]["quality"] == {}
        assert rows[arm]["recovery"]["kl"]["value"] > 0
        assert rows[arm]["ledger"]["device_hours"]["work"]["value"] > 0
    (pair,) = result["comparisons"]
    spent = sum(
        rows[arm]["ledger"]["device_hours"]["work"]["value"] for arm in [*made, "quantized"]
    )
    if pair["payback"]["value"] is not None and pair["serving"]["value"]:
        per_unit = rows["reference"]["serving"]["device_s_per_1k_units"]["value"] / 1000
        saved_s = pair["payback"]["value"] * per_unit * pair["serving"]["value"]
        assert saved_s / 3600 == pytest.approx(spent, rel=1e-6)


def test_what_holds_as_it_was_asked_for_needs_no_fallback(recovering: Recovering) -> None:
    result = recovering("stages.quantized.tolerance=1")
    assert list(attempts(result)) == ["fp4"]
    check_it_is(result, "fp4")


def test_a_better_format_wins(recovering: Recovering) -> None:
    first = recovering("stages.quantized.tolerance=0")
    lost = {name: loss(row) for name, row in attempts(first).items()}
    better = list(lost)[-1]  # all of them where none holds; else the one that lost nothing at all
    assert better != "fp4"
    tolerance = (lost["fp4"] + max(lost[better], 0.0)) / 2
    assert lost[better] <= tolerance < lost["fp4"], lost
    result = recovering(f"stages.quantized.tolerance={tolerance}")
    found, names = attempts(result), list(lost)
    winner = next(name for name in names if lost[name] <= tolerance)
    assert list(found) == names[: names.index(winner) + 1]
    check_it_is(result, winner)
    notes = result["environment"]["notes"]
    form = re.compile(r"quantized/fp4: loses ([\d.]+)% on validation where ([\d.]+)% is allowed")
    [told] = filter(None, map(form.fullmatch, notes))
    shown = [float(each) / 100 for each in told.groups()]
    assert shown == pytest.approx([lost["fp4"], tolerance], rel=0.01)
    said = [*first["environment"]["notes"], *notes]  # once, by the run that took it over
    assert f"quantized: is quantized/{winner}" in said
    report = whole_report(recovering.folder / "mlruns/latest")
    assert f"| quantized/{winner} |" in report[report.index("What recovery brought") :]


LORA = (
    "stages.quantized.recover=[lora]",
    "stages.quantized.lora.learning_rate=0.003",
    "training.divergence_factor=50",
)


def test_adapters_win_and_are_read_after_the_merge(recovering: Recovering) -> None:
    """What is read is the artifact: quantized, plain, without a trace of adapters; the charge has
    its FLOPs.
    """
    tolerance = between(recovering, "fp4", "lora", *LORA)
    result = recovering(*LORA, f"stages.quantized.tolerance={tolerance}")
    found = attempts(result)
    assert list(found) == ["fp4", "lora"]
    assert loss(found["lora"]) <= tolerance < loss(found["fp4"])
    check_it_is(result, "lora")
    counts = found["lora"]["ledger"]["counts"]
    assert (counts["steps"]["value"], found["lora"]["type"]) == (30, "recover")
    assert counts["model_flops"]["value"] > 0
    assert found["lora"]["artifact"]["bytes"] == pytest.approx(
        found["fp4"]["artifact"]["bytes"], rel=0.01
    )
    artifact = json.loads(Path(found["lora"]["artifact"]["path"], "artifact.json").read_text())
    assert artifact["quantization"]["format"] == "fp4"
    assert artifact["recovery"]["loss"] == loss(found["lora"])


@pytest.mark.slow
def test_training_all_weights_wins(recovering: Recovering) -> None:
    settings = ("stages.quantized.recover=[qat]", "stages.quantized.qat.learning_rate=0.001")
    tolerance = between(recovering, "fp4", "qat", *settings)
    result = recovering(*settings, f"stages.quantized.tolerance={tolerance}")
    found = attempts(result)
    assert list(found) == ["fp4", "qat"]
    assert loss(found["qat"]) <= tolerance < loss(found["fp4"])
    check_it_is(result, "qat")


@pytest.mark.slow
def test_sixteen_bits_stay_where_no_fallback_holds(recovering: Recovering) -> None:
    result = recovering(
        "stages.quantized.recover=[lora]",
        "stages.quantized.lora.steps=1",
        "stages.quantized.tolerance=0",
    )
    assert loss(attempts(result)["lora"]) > 0
    check_it_is(result, None)
    assert (
        "quantized: stays as reference is: no fallback is within the tolerance"
        in result["environment"]["notes"]
    )
    assert result["conclusion"]["verdict"].startswith("No format pays: quantized stays as ")
    (pair,) = result["comparisons"]
    assert pair["speedup"]["no_speedup"] is True


def test_sixteen_bits_are_tried_first_and_are_what_is_left(
    recovering: Recovering, units: Any
) -> None:
    """Where the device has units: read first, taken where no other fallback holds, and the row says
    what is in them.
    """
    units(0.5)
    tolerance = (
        "stages.quantized.recover=[lora]",
        "stages.quantized.lora.steps=1",
        "stages.quantized.tolerance=0.003",
    )
    result = recovering(*tolerance)
    found = attempts(result)
    assert list(found) == ["bf16", "fp4", "lora"]
    assert loss(found["bf16"]) <= 0.003 < min(loss(found["fp4"]), loss(found["lora"]))
    check_it_is(result, "bf16")
    own = result["rows"][-1]
    assert own["quantization"] == {
        "format": "bf16",
        "layers": 0,
        "share": {"value": 1.0, "provenance": "measured", "why_missing": None},
    }
    assert own["artifact"]["bytes"] < 0.6 * result["rows"][0]["artifact"]["bytes"]
    assert 0 < own["quality"]["kl_to_unquantized"]["value"] < 0.02
    said = "quantized: is quantized/bf16: no other fallback is within the tolerance"
    assert said in result["environment"]["notes"]


def test_a_precision_of_a_fallback_that_this_device_cannot_is_refused_by_its_key(
    recovering: Recovering,
) -> None:
    """Before anything is trained; and so is one that is inherited."""
    for fallback in ("lora", "qat"):
        done = recovering.run(
            f"stages.quantized.recover=[{fallback}]", f"stages.quantized.{fallback}.precision=tf32"
        )
        assert done.returncode == 1
        assert f"stages.quantized.{fallback}.precision: tf32 needs a CUDA device" in done.stderr
    done = recovering.run(
        "stages.quantized.recover=[lora]", "precision=fp16", "stages.reference.precision=fp32"
    )
    assert done.returncode == 1
    assert "precision: fp16 with loss scaling needs a CUDA device" in done.stderr
    result = recovering(
        "stages.quantized.recover=[lora]",
        "stages.quantized.lora.precision=tf32",
        "stages.quantized.optional=true",
        "stages.quantized.tolerance=0",
    )
    assert attempts(result)["lora"]["status"] == "SKIPPED"
    check_it_is(result, None, skipped=["quantized/lora"])


@pytest.mark.slow
def test_a_search_that_finds_nothing_falls_back_from_what_came_nearest(
    recovering: Recovering, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a mixture of a tiny model's layers may well lose nothing: here all lose it all
    measure = Bench.measure
    monkeypatch.setattr(
        Bench, "measure", lambda self, *given: replace(measure(self, *given), loss=1.0)
    )
    result = recovering(
        "stages.quantized.format=auto",
        "stages.quantized.candidates=[fp4]",
        "stages.quantized.recover=[qat]",
        "stages.quantized.prefer=memory",
        "stages.quantized.qat.learning_rate=0.001",
        "stages.quantized.tolerance=1e-6",
    )
    found = attempts(result)
    assert list(found) == ["search", "qat"]
    assert found["search"]["recovery"] == {}
    artifact = json.loads(Path(found["qat"]["artifact"]["path"], "artifact.json").read_text())
    assert artifact["quantization"]["format"] == "fp4"


@pytest.mark.slow
def test_a_search_that_finds_a_format_needs_no_fallback(recovering: Recovering) -> None:
    result = recovering(
        "stages.quantized.format=auto",
        "stages.quantized.candidates=[fp4]",
        "stages.quantized.recover=[qat]",
        "stages.quantized.prefer=memory",
        "stages.quantized.tolerance=1",
    )
    assert list(attempts(result)) == ["search"]
    check_it_is(result, "search")


@pytest.mark.slow
def test_fallbacks_of_a_killed_run_are_taken_up_where_their_checkpoint_is(
    recovering: Recovering, tmp_path: Path
) -> None:
    """Stopped in the middle of its adapters, the same command resumes and comes to the same
    weights.
    """
    settings = (
        "stages.quantized.recover=[lora]",
        "stages.quantized.lora.steps=20",
        "stages.quantized.tolerance=0",
        "training.checkpoint_every=5",
    )
    whole = attempts(recovering(*settings))["lora"]["artifact"]["digest"]
    other = Recovering(tmp_path, recovering.source)
    asked: list[int] = []

    def stop_at_8(self: Any) -> Any:
        from pipeline.errors import Preempted

        asked.append(1)
        return Preempted if len(asked) == 8 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.runs.timeline.Timeline.should_stop", stop_at_8)
        assert other.run(*settings).returncode == 75
    result = other(*settings)
    rows = [row for row in result["rows"] if row["arm"] == "quantized/lora"]
    assert [row["status"] for row in rows] == ["KILLED", "FINISHED"]
    assert rows[-1]["artifact"]["digest"] == whole


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["stages.quantized.recover=[qat,qat]"], "stages.quantized.recover: names one twice"),
        (
            ["stages.quantized.recover=[qat]", "stages.quantized.lora.rank=8"],
            "stages.quantized.lora: has no effect without lora in recover",
        ),
        (
            ["stages.quantized.recover=[qat]", "precision=bf16_pure"],
            "stages.quantized.qat.precision: bf16_pure is not",
        ),
        (
            ["stages.quantized.recover=[lora]", "training.steps=0"],
            "stages.quantized.lora.steps: training.steps is 0",
        ),
        (
            ["stages.quantized.recover=[lora]", "stages.quantized.lora.rank=0"],
            "stages.quantized.lora.rank: 0 is out",
        ),
        (
            ["stages.quantized.recover=[format]", "stages.quantized.format=auto"],
            "stages.quantized.recover: with format: auto the search is that one",
        ),
        (
            ["stages.quantized.recover=[]", "stages.quantized.tolerance=0.1"],
            (
                "stages.quantized.tolerance: has no effect with format: fp4 and nothing to recover"
                " with"
            ),
        ),
        (["stages.quantized.recover=[lora,more]"], "stages.quantized.recover"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    recovering: Recovering, settings: list[str], said: str
) -> None:
    done = recovering.run(*settings)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("refused")]
    assert said in line
