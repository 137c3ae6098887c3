"""Peak rates by exact device name, and MFU by hand: an unknown device, and quantizing, have
none.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.cli.main import main
from pipeline.config.settings.cost import CostConfig
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.ranges import check_ranges
from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.ledger.disturbance import unread as undisturbed
from pipeline.ledger.gpu_usage import unread
from pipeline.ledger.peaks import PEAKS, device_name, peak
from pipeline.ledger.record import Spent, ledger
from pipeline.ledger.values import Provenance, Value, declared, estimated, null
from pipeline.runs import rows
from pipeline.stages.context import Output
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.train import TrainStage

PRECISIONS = {"fp32", "tf32", "bf16", "fp16", "fp8", "int8"}


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla T4", "int8", 130),
    ],
)
def test_rates_are_dense_and_belong_to_one_board(name: str, precision: str, tflops: float) -> None:
    assert peak(name, precision) == declared(tflops)


def test_an_unknown_device_has_no_peak_and_is_nobodys_sibling() -> None:
    for name in (
        "NVIDIA H100",
        "NVIDIA H20",
        "nvidia h200",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA A10G",
        "",
    ):
        found = peak(name, "bf16")
        assert found.value is None
        assert (
            found.why_missing
            == f"no peak rate known for {name} at bf16; hardware.peak_tflops.bf16 declares it"
        )


def test_an_arithmetic_the_device_lacks_has_no_peak() -> None:
    found = peak("Tesla V100-SXM2-16GB", "bf16")
    assert found.why_missing is not None
    assert "states no bf16 rate for Tesla V100-SXM2-16GB" in found.why_missing


def test_what_the_user_states_comes_first() -> None:
    assert peak("NVIDIA H200", "bf16", 700.0) == declared(700.0)
    assert peak("a CPU of mine", "fp32", 2.5) == declared(2.5)


def test_every_entry_has_its_source_and_no_rate_with_sparsity() -> None:
    """On tensor cores halving the width doubles the rate: one sparse figure among dense ones would
    break the row.
    """
    for name, known in PEAKS.items():
        rates = known.tflops
        assert known.source.startswith("NVIDIA "), name
        assert set(rates) <= PRECISIONS, name
        assert rates["fp32"] <= rates.get("tf32", rates["fp16"]), name
        if "bf16" in rates:
            assert rates["bf16"] == rates["fp16"], name
            assert rates["bf16"] / rates["tf32"] == pytest.approx(2, rel=0.03), name
        if "fp8" in rates:
            assert rates["fp8"] / rates["fp16"] == pytest.approx(2, rel=0.03), name
        if "int8" in rates:  # GeForce boards halve the rate of sums in fp32, not of those in int32
            assert rates["int8"] / rates["fp16"] == pytest.approx(
                4 if "GeForce" in name else 2, rel=0.03
            ), name


def test_names_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H200 {device.index}")
    assert device_name(torch.device("cuda:1")) == "NVIDIA H200 1"
    assert device_name(torch.device("cpu")).rpartition(" x")[2].isdigit()


# -- MFU ------------------------------------------------------------------------------------------


def counts(
    flops: Value, most: Value, *, seconds: float | None = 4.0, devices: int = 2
) -> dict[str, Any]:
    return ledger(
        Spent(),
        {"model_flops": flops},
        devices=devices,
        device_kind="cuda",
        cost=CostConfig(),
        memory={},
        disturbance=undisturbed("-"),
        usage=unread("none"),
        is_training=True,
        seconds_in_steps=seconds,
        peak=most,
    )["counts"]


def test_mfu_by_hand() -> None:
    """4e15 FLOPs in 4 s on 2 devices are 500 TFLOP/s each; of a peak of 800 that is 0.625."""
    found = counts(estimated(4e15), declared(800.0))
    assert found["achieved_tflops"] == {
        "value": 500.0,
        "provenance": "estimated",
        "why_missing": None,
    }
    assert found["peak_tflops"] == {"value": 800.0, "provenance": "declared", "why_missing": None}
    assert found["mfu"] == {"value": 0.625, "provenance": "declared", "why_missing": None}


def test_without_a_peak_the_rate_stands_alone() -> None:
    found = counts(estimated(4e15), null("no peak rate known for X at bf16"))
    assert found["achieved_tflops"]["value"] == 500.0
    assert (
        found["mfu"]["why_missing"]
        == found["peak_tflops"]["why_missing"]
        == "no peak rate known for X at bf16"
    )


def test_more_than_the_peak_is_no_share() -> None:
    found = counts(estimated(4e15), declared(400.0))
    assert (
        found["mfu"]["why_missing"]
        == "500 TFLOP/s achieved is more than the peak of 400: one of them is wrong"
    )


def test_a_stage_that_did_not_finish_has_no_mfu() -> None:
    found = counts(null("the stage did not finish"), declared(800.0), seconds=None)
    assert (found["mfu"]["value"], found["mfu"]["why_missing"]) == (
        None,
        "the stage did not finish",
    )


def test_the_peak_is_that_of_the_stages_own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    run = Run(
        stages={
            "a": TrainStage(),
            "b": TrainStage(precision=Precision.tf32),
            "c": TrainStage(like="b"),
        },
        precision=PrecisionConfig(name=Precision.bf16),
    )
    attempt: Any = SimpleNamespace(run=run, device=torch.device("cuda"))
    found = {name: rows._peak(attempt, stage, Output()) for name, stage in run.stages.items()}
    assert {name: value.value for name, value in found.items()} == {
        "a": 989.5,
        "b": 494.5,
        "c": 494.5,
    }
    assert {value.provenance for value in found.values()} == {Provenance.DECLARED}
    run.hardware.peak_tflops.tf32 = 450.0
    assert [rows._peak(attempt, stage, Output()).value for stage in run.stages.values()] == [
        989.5,
        450.0,
        450.0,
    ]
    assert rows._peak(attempt, QuantizeStage(), Output()).why_missing == "this stage trains nothing"


def test_the_peak_of_a_precision_found_by_trial_is_that_of_what_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    attempt: Any = SimpleNamespace(run=Run(), device=torch.device("cuda"))
    stage = TrainStage(precision=Precision.auto)
    found = [
        rows._peak(attempt, stage, Output(about={"precision": {"chosen": name}})).value
        for name in ("fp32", "tf32", "bf16_pure")
    ]
    assert found == [PEAKS["NVIDIA H200"].tflops["fp32"], 494.5, 989.5]
    assert rows._peak(attempt, stage, Output()).why_missing == "no precision was chosen yet"


def test_a_declared_peak_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    run.hardware.peak_tflops.bf16 = 0.0
    with pytest.raises(UserError, match=r"hardware\.peak_tflops\.bf16: 0\.0 is out of range"):
        check_ranges(run)
    assert main(["recipe=baseline", "hardware.peak_tflops.bf61=120"], started_ns=0) == 1
    assert "peak_tflops.bf61" in capsys.readouterr().err
    assert main(["recipe=baseline", "hardware.peak_tflops.bf16=-1"], started_ns=0) == 1
    assert "hardware.peak_tflops.bf16: -1.0 is out of range" in capsys.readouterr().err
