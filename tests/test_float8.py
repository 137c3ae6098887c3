"""Training in float8, its products emulated: it tracks fp32, leaves plain models, resumes to the
bit, or is refused.

The kernels themselves need a GPU of compute capability 8.9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import tiny
from test_training_loop import CPU, batches_for, run, same, settings, weights
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.config.settings.model import TinyShape
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.errors import Preempted, UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.stages.precision_choice import Tried, choose_precision, decide
from pipeline.tasks.table import Task
from pipeline.training import float8
from pipeline.training.float8 import float8_layers, wide_layers
from pipeline.training.loop import train
from pipeline.training.objective import Objective
from pipeline.training.precision import arithmetic, compute_dtype, frozen, why_not

pytest.importorskip("torchao")
KINDS = list(float8.RECIPES)
WIDE = TinyShape(hidden_size=64, layers=2, heads=2, intermediate_size=128)
CONFIG = PrecisionConfig(fp8_least_width=64)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "EMULATE", True)


def model(seed: int = 0) -> Any:
    return tiny(Task.causal_lm, seed=seed, shape=WIDE)


def trained(given: Any, folder: Path, precision: Precision, **more: Any) -> list[float]:
    """Train as the loop does; return the losses."""
    from test_training_loop import hooks

    losses: list[float] = []
    points = lambda step, values: losses.append(values["loss"]) if "loss" in values else None
    objective = Objective(given, Task.causal_lm, precision, CPU, PhaseClock())
    config = settings(steps=more.pop("steps", 6), learning_rate=3e-3)
    train(
        given,
        batches_for(config),
        objective,
        settings=config,
        precision=CONFIG,
        folder=folder,
        clock=PhaseClock(),
        hooks=hooks(points=points, **more),
    )
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_it_tracks_fp32_and_is_not_bf16(tmp_path: Path, kind: Precision) -> None:
    start = weights(model())
    ends = {each: model() for each in (Precision.fp32, Precision.bf16, kind)}
    losses = {each: trained(given, tmp_path / each.value, each) for each, given in ends.items()}
    assert losses[kind] == pytest.approx(losses[Precision.fp32], rel=0.01)
    assert losses[kind] != losses[Precision.bf16]
    name = "model.layers.0.mlp.up_proj.weight"
    moved, reference = (
        (ends[each].state_dict()[name] - start[name]).flatten() for each in (kind, Precision.fp32)
    )
    assert float(torch.nn.functional.cosine_similarity(moved, reference, dim=0)) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_rounded_factors(kind: Precision) -> None:
    """One layer by hand: each factor scaled to float8's largest, rounded, and scaled back."""
    given = model()
    name = "layers.0.mlp.up_proj"
    layer = given.base_model.get_submodule(name)
    x = torch.randn(8, 64)
    largest = torch.finfo(torch.float8_e4m3fn).max

    def rounded(factor: torch.Tensor, weight: bool) -> torch.Tensor:
        size = (
            factor.abs().amax()
            if kind is Precision.fp8_tensorwise
            else factor.abs().amax(-1, keepdim=True)
        )
        scale = largest / size
        if kind is Precision.fp8_rowwise:  # torchao rounds these scales to powers of two
            scale = torch.exp2(torch.floor(torch.log2(scale)))
        return (factor * scale).to(torch.float8_e4m3fn).float() / scale

    expected = rounded(x, False) @ rounded(layer.weight.detach(), True).T
    with float8_layers(given, kind, least_width=64, say=lambda text: None), torch.no_grad():
        found = given.base_model.get_submodule(name)(x)
    plain = x @ layer.weight.detach().T
    assert float((found - expected).norm()) < 0.1 * float((found - plain).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_a_plain_model(tmp_path: Path, kind: Precision) -> None:
    given, said = model(), list[str]()
    trained(given, tmp_path, kind, say=said.append)
    assert {
        type(layer) for _, layer in given.named_modules() if "proj" in type(layer).__name__.lower()
    } == set()
    assert all(
        type(layer) is torch.nn.Linear
        for name, layer in given.named_modules()
        if name.endswith("_proj")
    )
    assert said == [f"{kind.value}: 14 layers, 0 linear ones of the body left alone"]
    given.save_pretrained(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 35)[None]
    torch.testing.assert_close(again(ids).logits, given.eval()(ids).logits, rtol=0, atol=0)


def test_a_resumed_training_is_bit_equal(tmp_path: Path) -> None:
    whole = model()
    trained(whole, tmp_path / "whole", Precision.fp8_tensorwise)
    asked = iter([None] * 2 + [Preempted] * 9)
    cut = model()
    with pytest.raises(Preempted):
        trained(cut, tmp_path / "cut", Precision.fp8_tensorwise, should_stop=lambda: next(asked))
    assert all(
        type(layer) is torch.nn.Linear
        for name, layer in cut.named_modules()
        if name.endswith("_proj")
    )
    resumed = model(seed=99)
    trained(resumed, tmp_path / "cut", Precision.fp8_tensorwise)
    same(weights(whole), weights(resumed))


def test_narrow_and_odd_layers_are_left_alone() -> None:
    assert wide_layers(model(), 128) == (
        [],
        [name for name, _ in model().base_model.named_modules() if name.endswith("_proj")],
    )
    wide, narrow = wide_layers(
        tiny(Task.causal_lm, shape=TinyShape(hidden_size=128, layers=1, heads=2)), 128
    )
    assert "layers.0.mlp.up_proj" in wide
    odd = model()
    odd.base_model.layers[0].mlp.up_proj = torch.nn.Linear(64, 72)
    wide, narrow = wide_layers(odd, 64)
    assert narrow == ["layers.0.mlp.up_proj"]
    assert len(wide) == 13


def test_a_model_without_wide_layers_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=64, n_layer=1, n_head=2))
    with (
        pytest.raises(
            UserError,
            match="precision: fp8_rowwise: no linear layer has both widths in multiples of 16",
        ),
        float8_layers(gpt2, Precision.fp8_rowwise, least_width=64, say=lambda text: None),
    ):
        pass


@pytest.mark.parametrize(
    ("capability", "refused"),
    [((8, 0), set(KINDS)), ((8, 9), {Precision.fp8_rowwise}), ((9, 0), set())],
)
def test_devices_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: set[Precision]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert {kind for kind in KINDS if why_not(kind, torch.device("cuda"))} == refused
    assert "needs a CUDA device, this is cpu" in (why_not(KINDS[0], CPU) or "")
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    assert "needs torchao, which is not installed" in (
        why_not(KINDS[0], torch.device("cuda")) or ""
    )


def test_all_but_wide_layers_is_bf16() -> None:
    assert compute_dtype(Precision.fp8_rowwise) is torch.bfloat16
    with arithmetic(Precision.fp8_rowwise, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert frozen(Precision.fp8_rowwise, CPU) is Precision.bf16


# -- among others, by trial -----------------------------------------------------------------------


def test_float8_is_refused_by_name_where_it_loses() -> None:
    found = decide(
        [
            Tried(Precision.fp32, [1.0, 1.0], [4.0]),
            Tried(Precision.bf16, [0.5, 0.5], [4.0]),
            Tried(Precision.fp8_tensorwise, [0.6, 0.6], [4.0]),
            Tried(Precision.fp8_rowwise, [0.4, 0.4], [4.0]),
        ],
        [],
        0.005,
    )
    assert found.precision is Precision.fp8_rowwise
    assert (
        "fp8_tensorwise 0.60x fp32's time (0.60 to 0.60), refused: no faster than without float8"
        " (0.50x)" in str(found)
    )
    assert "fp8_rowwise 0.40x fp32's time (0.40 to 0.40)" in str(found).replace(
        ", refused: no faster", ""
    )


def test_a_probe_tries_it_where_the_device_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages import precision_choice

    monkeypatch.setattr(precision_choice, "why_not", lambda *_: None)  # as if this were a GPU
    monkeypatch.setattr(precision_choice, "ROUNDS", 2)
    given = model()
    before = weights(given)
    objective = Objective(given, Task.causal_lm, Precision.auto, CPU, PhaseClock())
    left_out = [Precision.fp16, Precision.tf32]
    found = choose_precision(
        given,
        objective,
        batches_for(settings()),
        settings(),
        CONFIG,
        left_out=left_out,
        folder=tmp_path,
        clock=PhaseClock(),
    )
    tried = {trial["precision"]: trial for trial in found.about["trials"]}
    assert set(tried) == {"fp32", "bf16", "bf16_pure", "fp8_tensorwise", "fp8_rowwise"}
    same(before, weights(given))
    narrow = choose_precision(
        given,
        objective,
        batches_for(settings()),
        settings(),
        PrecisionConfig(),
        left_out=left_out,
        folder=tmp_path / "other",
        clock=PhaseClock(),
    )
    assert (
        "not fp8_rowwise: no linear layer is 1024 wide (precision.fp8_least_width)"
        in narrow.about["not_tried"]
    )
    run(given, settings(steps=1), tmp_path / "still trains")
