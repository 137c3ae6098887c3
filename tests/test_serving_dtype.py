"""What unquantized arms are served in, what other formats are read against, and what is said of
both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from format_matrix import ARCHITECTURES
from here import here, result_in
from make_assess_models import LABELS, byte_tokenizer, saved, tiny
from make_result import make_pair, make_result, make_saving, value
from reports import whole_report
from test_run import TINY
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

import pipeline.quantization.backend
from pipeline.cli.validate import validate
from pipeline.config.settings.quantization import Format
from pipeline.config.settings.run import Comparison, Run
from pipeline.config.settings.serving import ServingConfig, ServingDtype, ServingLoad
from pipeline.errors import UserError
from pipeline.evaluation.serving import dtype as serving_dtype
from pipeline.evaluation.serving.dtype import choose_dtype, drift_of
from pipeline.ledger.phases import PhaseClock
from pipeline.models import sixteen_bits
from pipeline.models.load import load_model, save_model
from pipeline.report.conclusion import conclude
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task

CPU = torch.device("cpu")
RATIO_OF_THIS_CPU = sixteen_bits.product_ratio  # the real one, where a test has replaced it
PROMPTS = [np.random.default_rng(seed).integers(3, 259, 40) for seed in range(10)]
QUIET = ("tracking.mlflow=false", "ledger.max_foreign_load=null")


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Have this CPU be one on which products in 16 bits take these times fp32's."""

    def take(bf16: float, fp16: float = 80.0) -> None:
        ratios = {Format.bf16: bf16, Format.fp16: fp16}
        monkeypatch.setattr(sixteen_bits, "product_ratio", lambda fmt, _: ratios[fmt])

    take(0.5)
    return take


def choose(asked: ServingDtype, artifacts: dict[str, Path], task: Task = Task.causal_lm) -> Any:
    labels = LABELS if task is Task.sequence_classification else None
    config = ServingConfig(load=ServingLoad(prompt=8, new=3, batch=2))
    return choose_dtype(
        asked,
        artifacts,
        task=task,
        labels=labels,
        prompts=PROMPTS,
        config=config,
        device=CPU,
        clock=PhaseClock(),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("arms")
    return {
        name: saved(tiny(Task.causal_lm, seed=seed), root / name)
        for seed, name in enumerate(("a", "b"))
    }


# -- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "served"), [(0.5, "bf16"), (1.0, "fp32"), (1.5, "fp32")])
def test_the_fastest_is_chosen_where_it_is_surely_faster(
    ratio: float, served: str, folders: dict[str, Path], units: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readings on an injected clock, 5% of noise around a bf16 that takes `ratio` of fp32's
    time.
    """
    noise = np.random.default_rng(0)

    def once(self: Any, ids: np.ndarray, new: int, **_: Any) -> Any:
        seconds = (ratio if self.dtype == "bfloat16" else 1.0) * (
            1 + 0.05 * noise.standard_normal()
        )
        return serving_dtype_reading(seconds, len(ids) * new)

    monkeypatch.setattr("pipeline.evaluation.serving.server.Server.once", once)
    choice = choose(ServingDtype.auto, folders)
    assert choice.name == served
    assert choice.trials["bf16"][0] == pytest.approx(ratio, rel=0.2)
    first, *drifts = choice.say()
    assert f"served in {served}, the fastest here by a probe on" in first
    assert "not fp16: a product in fp16 takes 80 times fp32's time" in first
    assert len(drifts) == (2 if served == "bf16" else 0)


def serving_dtype_reading(seconds: float, count: int) -> Any:
    from pipeline.evaluation.serving.server import Reading

    return Reading(seconds, 0.0, count, None)


def test_how_far_each_arm_moves_is_what_a_plain_computation_finds(
    folders: dict[str, Path], units: Any
) -> None:
    choice = choose(ServingDtype.bf16, folders)
    assert (choice.name, choice.dtype, set(choice.drift)) == ("bf16", torch.bfloat16, {"a", "b"})
    kl, largest, flips, count = 0.0, 0.0, 0, 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(folders["b"], dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    with torch.no_grad():
        for ids in PROMPTS[:8]:
            row = torch.from_numpy(ids)[None]
            p, q = before(input_ids=row).logits[0].double(), after(input_ids=row).logits[0].double()
            kl += float(
                kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")
            )
            largest = max(largest, float((p - q).abs().max()))
            flips, count = flips + int((p.argmax(-1) != q.argmax(-1)).sum()), count + len(ids)
    read = choice.drift["b"]
    assert (read.kl, read.largest, read.flips) == pytest.approx(
        (kl / count, largest, flips / count), rel=1e-4
    )
    assert read.documents == 8
    assert read.figures()["dtype_kl"]["value"] == read.kl


def test_fp32_is_what_was_assessed(folders: dict[str, Path]) -> None:
    choice = choose(ServingDtype.fp32, folders)
    assert (choice.name, choice.dtype, choice.drift) == ("fp32", None, {})
    assert choice.say() == ["arms that are stored in fp32 are served in fp32, as asked for"]


def test_a_device_without_units_serves_in_fp32_and_says_why(
    folders: dict[str, Path], units: Any
) -> None:
    units(2.5)
    choice = choose(ServingDtype.auto, folders)
    assert (choice.name, choice.trials) == ("fp32", {})
    assert (
        "not bf16: this cpu has no units for bf16 (a product takes 2.5 times fp32's time)"
        in choice.say()[0]
    )


def test_what_is_stored_in_16_bits_or_quantized_is_served_as_it_is(
    folders: dict[str, Path], tmp_path: Path, units: Any
) -> None:
    model = tiny(Task.causal_lm).to(torch.bfloat16)
    stored = {"a": saved(model, tmp_path / "bf16")}
    choice = choose(ServingDtype.auto, stored)
    assert (choice.name, choice.say()) == (None, [])
    assert set(choose(ServingDtype.bf16, {**stored, "b": folders["b"]}).drift) == {"b"}


def test_a_model_that_moves_too_far_or_does_not_run_stays_in_fp32(
    tmp_path: Path, folders: dict[str, Path], units: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    xlnet = tmp_path / "xlnet"
    save_model(ARCHITECTURES["XLNet"].make(), byte_tokenizer(), xlnet)
    choice = choose(ServingDtype.auto, {"x": xlnet}, Task.sequence_classification)
    assert choice.name == "fp32"
    assert "not bf16: x does not run in it (expected scalar type" in choice.say()[0]
    with pytest.raises(UserError, match=r"serving\.dtype: x does not run in it"):
        choose(ServingDtype.bf16, {"x": xlnet}, Task.sequence_classification)
    monkeypatch.setattr(serving_dtype, "MOST_KL", 0.0)
    assert "nats from what was assessed, 0.0 allowed" in choose(ServingDtype.auto, folders).say()[0]


def test_drift_of_known_logits() -> None:
    """Two classes at 0.5/0.5 against 0.9/0.1: KL = 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1)."""
    read = drift_of([torch.zeros(1, 2)], [torch.tensor([[np.log(9.0), 0.0]], dtype=torch.float32)])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert (read.kl, read.largest, read.flips) == pytest.approx(
        (expected, np.log(9.0), 0.0), rel=1e-6
    )


# -- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """`recipe=quantize` on a CPU with units for bf16."""
    cwd = tmp_path_factory.mktemp("quantize")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sixteen_bits, "product_ratio", lambda fmt, _: 0.5 if fmt is Format.bf16 else 80.0
        )
        patch.setattr(pipeline.quantization.backend, "check_bit_equal", lambda *args, **more: None)
        done = here(cwd, "recipe=quantize", "~stages.nf4", *TINY, *QUIET, *WITHOUT_NF4)
    assert done.returncode == 0, done.stderr
    return cwd, result_in(cwd), done.stdout


PAIRS = [
    ("bf16", "reference", "[quality,serving,payback]"),
    ("int8", "best_16_bit", "[serving]"),
    ("int8", "reference", "[quality,serving,payback]"),
]
WITHOUT_NF4 = [
    "compare=["
    + ",".join(f"{{arm: {arm}, base: {base}, on: {on}}}" for arm, base, on in PAIRS)
    + "]"
]


@pytest.mark.slow
def test_sixteen_bits_are_assessed_and_served_as_they_are_stored(ran: Any) -> None:
    _, result, printed = ran
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ["reference", "bf16", "fp16", "int8"]
    assert (
        rows["fp16"]["why"]
        == "a product in fp16 takes 80 times fp32's time on this cpu, which has no units for it"
    )
    half = rows["bf16"]
    # its tokenizer is in there, too
    assert half["artifact"]["bytes"] < 0.7 * rows["reference"]["artifact"]["bytes"]
    assert (
        half["serving"]["weights_bytes"]["value"]
        < 0.51 * rows["reference"]["serving"]["weights_bytes"]["value"]
    )
    assert 0 < half["quality"]["kl_to_unquantized"]["value"] < 1e-2
    assert half["quality"]["flips"]["value"] is not None
    about = json.loads(Path(half["artifact"]["path"], "artifact.json").read_text())
    assert (about["quantization"]["format"], about["quantization"]["quantized_share"]) == (
        "bf16",
        1.0,
    )
    config = json.loads(Path(half["artifact"]["path"], "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "bf16: 100.0% of the parameters in bf16" in result["environment"]["notes"]
    again = load_model(half["artifact"]["path"], Task.causal_lm, dtype=torch.bfloat16)
    first = load_model(rows["reference"]["artifact"]["path"], Task.causal_lm)
    for ours, theirs in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))
    assert "fp16 was skipped" in " ".join(printed.split())


@pytest.mark.slow
def test_other_formats_are_read_against_the_best_16_bit_form_with_fp32_beside_it(ran: Any) -> None:
    cwd, result, printed = ran
    pairs = {(pair["arm"], pair["base"]): pair for pair in result["comparisons"]}
    assert list(pairs) == [("bf16", "reference"), ("int8", "bf16"), ("int8", "reference")]
    against = pairs["int8", "bf16"]
    assert (against["base_is"], against["serving"]["dtypes"]) == (
        "best_16_bit",
        {"arm": "fp32", "base": "bf16"},
    )
    assert pairs["int8", "reference"]["serving"]["dtypes"]["base"] == "fp32"
    sizes = {
        row["arm"]: row["serving"]["weights_bytes"]["value"]
        for row in result["rows"]
        if row["artifact"]
    }
    assert against["speedup"]["memory"]["value"] == pytest.approx(1 - sizes["int8"] / sizes["bf16"])
    saves = against["speedup"]["saves_time"] or against["speedup"]["memory"]["value"] >= 0.05
    assert against["speedup"]["no_speedup"] is not saves
    said = " ".join(printed.split())
    assert "Against the unquantized model (served in fp32), bf16 " in said
    share = next(
        row["quantization"]["share"]["value"] for row in result["rows"] if row["arm"] == "int8"
    )
    assert (
        f"Against the best 16-bit form of the same model, int8 ({share:.1%} of its"
        " parameters in int8)" in (said)
    )
    report = whole_report(cwd / "mlruns/latest")
    assert f"{share:.1%} in int8" in report[report.index("What quantizing changed") :]
    assert "serving: arms that are stored in fp32 are served in fp32, as asked for" in report


@pytest.mark.slow
def test_a_format_that_pays_against_fp32_alone_is_no_speedup(
    tmp_path: Path, units: Any, monkeypatch: Any
) -> None:
    """int8 of a model that is mostly embedding: smaller than fp32, larger than bf16, and slower
    than both.
    """
    if RATIO_OF_THIS_CPU(Format.bf16, "cpu") > 1:
        pytest.skip("on a CPU without units for bf16 int8 does save time against it")
    monkeypatch.setattr(
        pipeline.quantization.backend, "check_bit_equal", lambda *args, **more: None
    )
    done = here(
        tmp_path,
        "recipe=quantize",
        "~stages.nf4",
        "~stages.fp16",
        *TINY,
        *QUIET,
        *WITHOUT_NF4,
        "stages.int8.include=[*.k_proj,*.q_proj]",
        "allow_no_speedup=false",
    )
    result = result_in(tmp_path)
    judged = {
        pair["base"]: pair["speedup"] for pair in result["comparisons"] if pair["arm"] == "int8"
    }
    assert judged["reference"]["memory"]["value"] > 0.05 > judged["bf16"]["memory"]["value"]
    assert not judged["bf16"]["saves_time"]
    assert (done.returncode, "no_speedup: int8" in done.stderr) == (3, True)


@pytest.mark.slow
def test_a_cpu_without_units_says_so(tmp_path: Path, units: Any, monkeypatch: Any) -> None:
    units(95.0)
    monkeypatch.setattr(
        pipeline.quantization.backend, "check_bit_equal", lambda *args, **more: None
    )
    done = here(tmp_path, "recipe=quantize", "~stages.nf4", *TINY, *QUIET, *WITHOUT_NF4)
    assert done.returncode == 0, done.stderr
    result = result_in(tmp_path)
    why = "a product in bf16 takes 95 times fp32's time on this cpu, which has no units for it"
    assert next(row["why"] for row in result["rows"] if row["arm"] == "bf16") == why
    assert why in " ".join(done.stdout.split())
    assert [(pair["arm"], pair["base"]) for pair in result["comparisons"]] == [
        ("int8", "reference")
    ]
    assert (
        "int8: no arm has the same model in 16 bits here: read against fp32 alone"
        in result["environment"]["notes"]
    )


# -- what is refused ------------------------------------------------------------------------------


def test_a_dtype_that_the_device_cannot_is_refused_by_its_key(tmp_path: Path, units: Any) -> None:
    done = here(tmp_path, "recipe=distill", "serving.dtype=fp16", *TINY, *QUIET)
    assert done.returncode == 1
    assert "serving.dtype: a product in fp16 takes 80 times fp32's time" in done.stderr


def test_best_16_bit_is_for_what_was_quantized() -> None:
    run = Run(
        stages={"a": TrainStage()},
        primary_arm="a",
        compare=[Comparison(arm="a", base="best_16_bit")],
    )
    with pytest.raises(
        UserError, match=r"compare\[0\]\.base: best_16_bit is for what a quantize stage makes"
    ):
        validate(run)


def test_a_part_that_is_quantized_is_said_to_be_a_part() -> None:
    """A mixture of experts of which a fifth is in int8 does not read as if it were in int8."""
    pair = make_pair("int8", "reference", serving=make_saving(0.1))
    for share, said in (
        (0.2, "int8 (20% of its parameters in int8) serves 10% cheaper"),
        (0.95, "int8 serves 10%"),
    ):
        result = make_result("quantize", comparisons=[pair])
        for row in result["rows"]:
            if row["arm"] == "int8":
                row["quantization"] = {"format": "int8", "layers": 16, "share": value(share)}
        assert said in " ".join(conclude(result)["answers"])


# -- in a gate ------------------------------------------------------------------------------------


def test_a_later_look_is_served_as_the_look_before_and_else_is_no_look() -> None:
    """Both looks' readings are read together: bf16 and fp32 are never pooled."""
    from pipeline.gate.judge import _disturbed
    from pipeline.runs.serving_pass import _asked_dtype

    def looks(before: str | None, now: str) -> Any:
        gate = SimpleNamespace(
            earlier=None if before is None else {"dtype": {"asked": "auto", "served": before}}
        )
        served = SimpleNamespace(dtype={"asked": "auto", "served": now})
        return SimpleNamespace(served=served, device=CPU, run=Run()), gate

    for before, asked in ((None, "auto"), ("fp32", "fp32"), ("bf16", "bf16")):
        measured, gate = looks(before, asked)
        session = SimpleNamespace(gate=gate, run=measured.run)
        running: Any = SimpleNamespace(session=session)
        assert _asked_dtype(running).value == asked
        gate.policy = Run().policy
        assert _disturbed(measured, gate, {"conditions": []}) == []
    assert _disturbed(*looks("fp32", "bf16"), {"conditions": []}) == [
        "served in bf16, and at the look before in fp32"
    ]


def test_the_dtype_of_a_gate_is_its_policys(tmp_path: Path) -> None:
    done = here(tmp_path, "recipe=release_check", "candidate=a", "baseline=b", "serving.dtype=bf16")
    assert done.returncode == 1
    assert "serving.dtype: is the policy's here; set policy.dtype=bf16" in done.stderr
