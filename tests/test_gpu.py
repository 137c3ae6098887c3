"""What only a GPU can show: precisions, hours, energy, memory and formats on the device. Run with
`pytest -m gpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from make_assess_models import saved, tiny
from test_attention import model_of, positions_of
from test_training_loop import batches_for, hooks, settings

from pipeline.config.arms import Draft
from pipeline.config.settings.distillation import Divergence
from pipeline.config.settings.model import TinyShape
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.config.settings.serving import Decode, ServingConfig, ServingLoad
from pipeline.config.settings.training import OptimizerKind, TrainingConfig
from pipeline.distillation.head import Head, Taught, head_loss
from pipeline.distillation.losses import Loss, Sparse, sparse_terms_in_place, terms_in_place
from pipeline.evaluation.serving.drafting import draft_pass
from pipeline.evaluation.serving.server import load
from pipeline.ledger.devices.device import Waits
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.gpu_usage import SHORTEST_S
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.models.load import load_model
from pipeline.quantization.backend import formats, quantize
from pipeline.quantization.backend import why_not as why_not_quantize
from pipeline.tasks.table import Task
from pipeline.training.compiling import as_compiled
from pipeline.training.loop import Hooks, _Loop, train
from pipeline.training.objective import Objective, Teacher
from pipeline.training.precision import arithmetic, why_not
from pipeline.training.reading import Documents, examine, hidden_states

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))  # the CPU tries the tests themselves
SMALL = [
    "tracking.charts=false",
    *(
        "training.batch_size=8",
        "training.sequence_length=128",
        "data.max_documents=200",
        "training.steps=30",
    ),
    *(
        "quality.max_documents=60",
        "quality.bootstrap=500",
        "tracking.mlflow=false",
        f"hardware.device={DEVICE.type}",
    ),
    *("serving.blocks=4", "serving.load.new=8", "serving.batches=[1]"),
]
# as int4 and fp8 need it
WIDE = TinyShape(hidden_size=128, layers=2, heads=2, intermediate_size=256)
QUANTIZED = ["task=sequence_classification", "data=stdlib_labels"]


def result_of(cwd: Path, *args: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipeline", *args, *SMALL]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((cwd / "mlruns/latest/result.json").read_text())
    jsonschema.validate(result, RESULT_SCHEMA)
    return result


@pytest.mark.parametrize(
    ("recipe", "more"), [("distill", []), ("mixed_precision", []), ("quantize", QUANTIZED)]
)
def test_recipes_count_gpu_hours_and_device_memory(
    tmp_path: Path, recipe: str, more: list[str]
) -> None:
    result = result_of(tmp_path, f"recipe={recipe}", *more)
    own = device_of(DEVICE)
    assert (result["device"]["kind"], result["device"]["name"]) == (own.kind, own.name())
    # a CPU without units for fp16 skips what needs them
    done = [row for row in result["rows"] if own.is_gpu or row["status"] != "SKIPPED"]
    assert done
    for row in done:
        assert row["status"] == "FINISHED", row["why"]
        ledger = row["ledger"]
        hours = ledger["device_hours"]["attached"]["value"]
        assert hours > 0
        assert ledger["gpu_hours"]["attached"]["value"] == (hours if own.is_gpu else None)
        if own.counts_memory:
            assert ledger["memory"]["peak_allocated_bytes"]["value"] > 0
        assert ledger["meter_valid"], ledger["meter_problems"]
        elapsed = sum(ledger["phases_ns"].values())
        assert elapsed == pytest.approx(ledger["wall_s"]["value"] * 1e9)
        # tiny models on a CPU that others use: what surrounds a step weighs more
        assert ledger["phases_ns"].get("other", 0) < (0.02 if own.is_gpu else 0.1) * elapsed


def every_precision() -> list[Any]:
    """Each with AdamW, and bf16 with each kind of moments."""
    adamw, *eight_bit = OptimizerKind
    named = [
        pytest.param(each, adamw, id=each.value) for each in Precision if each is not Precision.auto
    ]
    return [*named, *(pytest.param(Precision.bf16, kind, id=kind.value) for kind in eight_bit)]


# torchao compiles its step
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize(("precision", "optimizer"), every_precision())
def test_every_precision_learns(
    tmp_path: Path, precision: Precision, optimizer: OptimizerKind
) -> None:
    if why_not(precision, DEVICE) is not None:
        pytest.skip(why_not(precision, DEVICE) or "")
    model, clock = tiny(Task.causal_lm, shape=WIDE).to(DEVICE), PhaseClock()
    losses: list[float] = []
    rows = torch.arange(64).remainder(50).repeat(8, 1)

    class Always:
        def batch(self, step: int) -> dict[str, torch.Tensor]:
            position = torch.arange(64).repeat(8, 1)
            return {"input_ids": rows, "position_ids": position, "labels": rows.roll(-1, 1)}

    given = Hooks(
        validate=lambda: 0.0,
        flops=lambda _: (0.0, 0.0),
        points=lambda _, values: losses.append(values.get("loss", -1.0)),
        history=lambda _: [],
        checkpointed=lambda _: None,
        resumed=lambda *_: None,
        should_stop=lambda: None,
        advance=lambda *_: None,
        say=lambda _: None,
    )
    settings = TrainingConfig(steps=40, learning_rate=3e-3, eval_every=40, optimizer=optimizer)
    train(
        model,
        Always(),
        Objective(model, Task.causal_lm, precision, DEVICE, clock),
        settings=settings,
        precision=PrecisionConfig(name=precision, fp8_least_width=128),
        folder=tmp_path,
        clock=clock,
        hooks=given,
    )
    read = [loss for loss in losses if loss >= 0]
    assert len(read) == 40  # none of the late readings is lost
    assert read[-1] < 0.7 * read[0]
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"  # put back


@pytest.mark.parametrize("fmt", formats())
def test_every_format_is_the_same_to_the_bit_after_a_reload(tmp_path: Path, fmt: Format) -> None:
    """And close to the model that it was made from."""
    if why_not_quantize(fmt, DEVICE) is not None:
        pytest.skip(why_not_quantize(fmt, DEVICE) or "")
    source = saved(tiny(Task.causal_lm, shape=WIDE), tmp_path / "source")
    done = quantize(
        source, tmp_path / "out", fmt, Task.causal_lm, device=DEVICE, key="stages.small.format"
    )
    assert len(done.quantized_layers) == (0 if fmt in SIXTEEN_BITS else 14)
    ids = torch.arange(3, 35, device=DEVICE)[None]
    with torch.no_grad():
        ours, theirs = (
            load_model(tmp_path / name, Task.causal_lm, device=DEVICE)(input_ids=ids)
            .logits.float()
            .log_softmax(-1)
            for name in ("out", "source")
        )
    # 4 bits: 0.05 on random weights
    assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) < 0.1


def test_a_precision_is_found_by_trial(tmp_path: Path) -> None:
    result = result_of(
        tmp_path, "recipe=baseline", "precision=auto", "precision.fp8_least_width=128"
    )
    (row,) = result["rows"]
    about = json.loads(Path(row["artifact"]["path"], "artifact.json").read_text())["precision"]
    able = {
        each.value
        for each in Precision
        if each is not Precision.auto and why_not(each, DEVICE) is None
    }
    assert {trial["precision"] for trial in about["trials"]} == able
    assert row["ledger"]["phases_ns"]["search"] > 0
    assert row["ledger"]["counts"]["mfu"]["value"] is not None or DEVICE.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_equals_float64_on_the_device(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, teacher = torch.randn(300, 64), torch.randn(300, 96)
    weight, other = torch.randn(1000, 64) / 8, torch.randn(1000, 96) / 10
    labels = torch.randint(1000, (300,))
    ours = hidden.to(DEVICE).requires_grad_()
    loss, _ = head_loss(
        ours,
        Head(weight.to(DEVICE), None),
        labels.to(DEVICE),
        dtype=dtype,
        loss=Loss(0.3, temperature=2.0),
        taught=Taught(teacher.to(DEVICE), Head(other.to(DEVICE), None), dtype),
    )
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    log_q = (exact @ weight.double().T).log_softmax(-1)
    log_q2 = (exact @ weight.double().T / 2).log_softmax(-1)
    log_p2 = (teacher.double() @ other.double().T / 2).log_softmax(-1)
    kl = 4 * (log_p2.exp() * (log_p2 - log_q2)).sum(-1).mean()
    expected = 0.3 * torch.nn.functional.nll_loss(log_q, labels) + 0.7 * kl
    expected.backward()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    )
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=tolerance["rtol"], atol=0)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double().cpu(), exact.grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", list(Divergence))
def test_the_compiled_kernel_equals_the_definition(
    divergence: Divergence, dtype: torch.dtype
) -> None:
    kernel = pytest.importorskip(
        "pipeline.distillation.triton_terms", reason="Triton is not installed"
    )
    if DEVICE.type != "cuda":
        pytest.skip("interpreted on a CPU, as test_triton_terms.py does")
    torch.manual_seed(0)
    tile, teacher = (3 * torch.randn(70, 10_001, device=DEVICE).to(dtype) for _ in range(2))
    labels, loss = torch.randint(9_000, (70,), device=DEVICE), Loss(0.3, divergence, 2.0, 0.4)
    wanted, got = tile.clone(), tile.clone()
    expected = terms_in_place(wanted, teacher, labels, loss, 9_999)
    sums = kernel.terms_in_place(got, teacher, labels, loss, 9_999)
    assert sums.ce.item() == pytest.approx(expected.ce.item(), rel=1e-4)
    assert sums.divergence.item() == pytest.approx(expected.divergence.item(), rel=1e-4)
    torch.testing.assert_close(
        got, wanted, rtol=2**-7 if dtype is torch.bfloat16 else 1e-3, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_reads_a_cached_teacher(dtype: torch.dtype, temperature: float) -> None:
    kernel = pytest.importorskip(
        "pipeline.distillation.triton_terms", reason="Triton is not installed"
    )
    if DEVICE.type != "cuda":
        pytest.skip("interpreted on a CPU, as test_triton_terms.py does")
    torch.manual_seed(0)
    tile = 3 * torch.randn(70, 10_001, device=DEVICE).to(dtype)
    p = torch.rand(70, 21, device=DEVICE)
    ids = torch.rand(70, 9_999, device=DEVICE).topk(21).indices
    teacher = Sparse(ids, p / p.sum(-1, keepdim=True), torch.rand(70, device=DEVICE))
    labels, loss = ids[:, 3].clone(), Loss(0.3, temperature=temperature)
    wanted, got = tile.clone(), tile.clone()
    expected = sparse_terms_in_place(wanted, teacher, labels, loss, 9_999)
    sums = kernel.sparse_terms_in_place(got, teacher, labels, loss, 9_999)
    assert sums.ce.item() == pytest.approx(expected.ce.item(), rel=1e-4)
    assert sums.divergence.item() == pytest.approx(expected.divergence.item(), rel=1e-4)
    torch.testing.assert_close(
        got, wanted, rtol=2**-7 if dtype is torch.bfloat16 else 1e-3, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2"])
def test_documents_by_lengths_are_those_under_a_mask(kind: str) -> None:
    """In bf16, in which flash attention takes lengths; gradients too."""
    model = model_of(kind).to(DEVICE)
    read = examine(model, DEVICE)
    positions = positions_of()
    inputs = {"input_ids": positions.to(DEVICE) + 3, "position_ids": positions.to(DEVICE)}
    documents = Documents.of(inputs["position_ids"], positions)
    told = documents.told(model, read, Precision.bf16)
    assert "cu_seq_lens_q" in told
    found: list[list[torch.Tensor]] = []
    for each in (told, {"allowed": documents.mask}):
        with arithmetic(Precision.bf16, DEVICE):
            states = hidden_states(model, inputs, each)
        slopes = torch.autograd.grad(
            states.float().square().mean(), list(model.base_model.parameters())
        )
        # all gradients together: some are nothing but rounding by themselves
        found.append([states.detach().float(), torch.cat([each.flatten() for each in slopes])])
    for ours, masked in zip(*found, strict=True):
        assert (ours - masked).norm() / masked.norm() < 0.03


@pytest.mark.skipif(DEVICE.type != "cuda", reason="tests/test_host_waits.py counts on a CPU")
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.bf16_pure])
def test_a_step_waits_for_nothing(precision: Precision) -> None:
    """torch raises where the host would wait for the device."""
    model, config = tiny(Task.causal_lm).to(DEVICE), settings()
    read = examine(model, DEVICE)
    objective = Objective(model, Task.causal_lm, precision, DEVICE, PhaseClock(), read=read)
    loop = _Loop.of(
        model, objective, config, PrecisionConfig(name=precision), PhaseClock(), hooks()
    )
    batches = batches_for(config)
    loop.step(batches)  # the optimizer makes its state, kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_model_trains(tmp_path: Path) -> None:
    (row,) = result_of(tmp_path, "recipe=baseline", "training.compile=always")["rows"]
    assert row["ledger"]["counts"]["steps"]["value"] == 30


def taught() -> Objective:
    """Return a student under its teacher, the same each time."""
    student, teacher = (tiny(Task.causal_lm, seed=seed).to(DEVICE) for seed in (0, 1))
    teacher.eval().requires_grad_(requires_grad=False)
    read = examine(teacher, DEVICE)
    signal = Teacher(teacher, Precision.bf16, Loss(0.5), read)
    return Objective(
        student,
        Task.causal_lm,
        Precision.bf16,
        DEVICE,
        PhaseClock(),
        signal,
        read=examine(student, DEVICE),
    )


def test_a_teacher_beside_its_student_says_the_same() -> None:
    batches, found = batches_for(settings()), list[list[torch.Tensor]]()
    for overlaps in (False, True):
        objective = taught()
        objective.overlaps = overlaps
        steps = list[torch.Tensor]()
        for step in range(4):  # memory of one step is taken by the next
            loss = objective(batches.batch(step)).loss
            steps += [loss.detach(), *torch.autograd.grad(loss, list(objective.model.parameters()))]
        found.append(steps)
    for apart, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, apart, rtol=2e-2, atol=1e-4)


# transformers' modules are compiled with annotations that torch will not read for ever
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_captured_steps_learn_what_compiled_ones_do(tmp_path: Path) -> None:
    """Documents in every batch differ in number; CUDA graphs are recorded for a few sizes."""
    if not device_of(DEVICE).captures:
        pytest.skip(f"{device_of(DEVICE).kind} captures no graphs")
    batches, found = batches_for(settings()), list[list[float]]()
    for captured in (False, True):
        objective, losses = taught(), list[float]()
        loop = _Loop.of(
            objective.model, objective, settings(), PrecisionConfig(), PhaseClock(), hooks()
        )
        refused = device_of(DEVICE).captures_refused()
        with as_compiled(objective, settings(), captured=captured):
            for _ in range(6):
                loop.step(batches)
                losses.append(float(loop.pending[-1].values[0]))
        assert device_of(DEVICE).captures_refused() == refused
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_a_training_that_is_to_be_deterministic_is(tmp_path: Path) -> None:
    digests = set[str]()
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (row,) = result_of(folder, "recipe=baseline", "training.deterministic=true")["rows"]
        digests.add(row["artifact"]["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("decode", [Decode.graph, Decode.compile])
@pytest.mark.parametrize("fmt", [None, *formats()])
def test_a_captured_step_writes_what_a_growing_cache_writes(
    tmp_path: Path, fmt: Format | None, decode: Decode
) -> None:
    """The unquantized model is captured; a format that cannot be says why, and is served all the
    same.
    """
    folder = saved(tiny(Task.causal_lm), tmp_path / "plain")
    if fmt is not None:
        if why := why_not_quantize(fmt, DEVICE):
            pytest.skip(why)
        quantize(
            folder,
            tmp_path / "quantized",
            fmt,
            Task.causal_lm,
            device=DEVICE,
            key="format",
            prove=False,
        )
        folder = tmp_path / "quantized"
    server = load(
        folder, Task.causal_lm, DEVICE, labels=None, now_ns=time.monotonic_ns, dtype=torch.float32
    )
    # an index beyond the embedding is an assertion on the device, which is lost by it
    vocabulary = server.model.config.vocab_size
    prompt = np.random.default_rng(0).integers(0, vocabulary, (3, 16))

    def written(way: Decode) -> tuple[torch.Tensor, str]:
        server.once(prompt[::-1], 8, decode=way)
        _, decoder = server._decoder
        with torch.inference_mode():
            decoder.reset()
            tokens = [decoder.prefill(torch.from_numpy(prompt).to(DEVICE)).clone()]
            tokens += [decoder.step().clone() for _ in range(7)]
        return torch.cat(tokens, dim=1), decoder.how

    expected, _ = written(Decode.dynamic)
    tokens, how = written(decode)
    print(fmt, how)
    assert torch.equal(tokens, expected)
    if not device_of(DEVICE).captures:
        return
    assert "CUDA graph" in how or "(not " in how
    if fmt is None:
        assert how.endswith(", CUDA graph")
        reading = server.once(prompt, 8, decode=decode)
        assert reading.working_bytes is not None
        assert reading.working_bytes > 0


def test_a_step_that_waits_is_not_captured_and_the_next_one_is() -> None:
    """What a capture of it would leave behind is nowhere to be seen."""
    device = device_of(DEVICE)
    if not device.captures:
        pytest.skip(f"{device.kind} captures no graphs")
    x = torch.ones(8, device=DEVICE)
    with pytest.raises(Waits):
        device.capture(lambda: x.mul_(float(x.sum()) > 0), lambda: None)
    replay = device.capture(lambda: x.add_(1), lambda: x.fill_(1))
    x.zero_()
    replay()
    assert x.tolist() == [1] * 8


def test_auto_writes_in_the_fastest_way_and_a_draft_changes_no_text(tmp_path: Path) -> None:
    big = tiny(Task.causal_lm)
    folders = {
        "big": saved(big, tmp_path / "big"),
        "small": saved(tiny(Task.causal_lm, seed=1), tmp_path / "small"),
    }
    found = draft_pass(
        Draft("small", "big", 3),
        folders,
        task=Task.causal_lm,
        prompts=[np.arange(3, 60)],
        config=ServingConfig(load=ServingLoad(prompt=16, new=12, batch=2)),
        device=DEVICE,
        devices=1,
        clock=PhaseClock(),
    )
    print(found.record["said"])
    assert found.record["why"] is None
    assert found.figures["draft_equal_share"]["value"] == 1
    if device_of(DEVICE).captures:
        assert "CUDA graph" in found.record["how"]
        assert "CUDA graph" in found.record["how_without"]


def test_work_costs_energy_and_twice_the_work_twice_as_much() -> None:
    sampler = Sampler(device_of(DEVICE).reader())
    if sampler.reader.why:
        pytest.skip(sampler.reader.why)
    factor = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)

    def joules(repeats: int) -> float:
        start_ns = time.monotonic_ns()
        sampler.mark()
        for _ in range(repeats):
            torch.mm(factor, factor)
        torch.cuda.synchronize()
        sampler.mark()
        end_ns = time.monotonic_ns()
        assert end_ns - start_ns > SHORTEST_S * 1e9
        spent = sampler.usage((start_ns, end_ns)).energy_j.value
        assert spent is not None
        return spent

    for _ in range(200):
        torch.mm(factor, factor)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(200):
        torch.mm(factor, factor)
    end.record()
    torch.cuda.synchronize()
    each = start.elapsed_time(end) / 1000 / 200
    repeats = int(1.5 * SHORTEST_S / each)
    once, twice = joules(repeats), joules(2 * repeats)
    assert 1.7 < twice / once < 2.3
