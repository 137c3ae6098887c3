"""FLOPs against counts by hand (2 per multiply-add) and against 6N; energy from a counter that can fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_assess_models import SHAPE, tiny
from transformers import BertConfig

from pipeline.config import Task
from pipeline.ledger.energy import EnergyMeter
from pipeline.ledger.flops import count_flops
from pipeline.values import Prov


def llama_forward(length: int, vocabulary: int) -> int:
    """Multiply-adds of a Llama of `SHAPE` by hand, times two."""
    hidden, wide = SHAPE.hidden_size, SHAPE.intermediate_size
    linear = SHAPE.layers * (4 * hidden * hidden + 3 * hidden * wide) + hidden * vocabulary
    attention = SHAPE.layers * 2 * hidden * length  # scores and their use, per token, full attention
    return 2 * length * (linear + attention)


@pytest.mark.parametrize("length", [16, 100, 1024])
def test_a_llama_by_hand(length: int) -> None:
    model = tiny(Task.causal_lm)
    forward = count_flops(model.config, Task.causal_lm, backward=False)(length)
    rotary = 2 * length * (SHAPE.hidden_size // SHAPE.heads // 2)  # angles: positions x inverse frequencies
    assert forward - llama_forward(length, 259) in (0, rotary)
    both = count_flops(model.config, Task.causal_lm, backward=True)(length)
    assert both == pytest.approx(3 * forward, rel=1e-3)  # the backward pass is twice the forward


def test_six_n_at_short_lengths() -> None:
    """Kaplan et al. 2020: 6 FLOPs per parameter (embeddings left out) and token, attention apart."""
    model = tiny(Task.causal_lm)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    weights += model.lm_head.weight.numel()  # tied to the embeddings, but multiplied with all the same
    per_token = count_flops(model.config, Task.causal_lm, backward=True)(8) / 8
    assert per_token == pytest.approx(6 * weights, rel=0.03)


def test_an_encoder_by_hand_reads_one_token_for_its_classes() -> None:
    config = BertConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=3
    )
    length = 40
    body = 2 * length * (2 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 2 * 64 * length)
    head = 2 * (64 * 64 + 64 * 3)  # pooler and classifier see the first token
    assert count_flops(config, Task.sequence_classification, backward=False)(length) == body + head


def test_a_quantized_model_counts_as_its_unquantized_twin() -> None:
    config = tiny(Task.causal_lm).config
    plain = count_flops(config, Task.causal_lm, backward=False)(32)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert count_flops(config, Task.causal_lm, backward=False)(32) == plain
    assert config.quantization_config  # the caller's configuration is left as it was


# -- energy ---------------------------------------------------------------------------------------------------------


class FakeNvml:
    """NVML with one GPU whose counter gives `readings` in turn; an exception in it is raised."""

    class NVMLError(Exception):
        pass

    def __init__(self, *readings: Any, init: Exception | None = None) -> None:
        self.readings, self.init, self.asked = list(readings), init, None

    def nvmlInit(self) -> None:
        if self.init is not None:
            raise self.init

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked = uuid
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        reading = self.readings.pop(0)
        if isinstance(reading, Exception):
            raise reading
        return reading


def meter(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> EnergyMeter:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234-ab"))
    return EnergyMeter(torch.device("cuda"))


def test_joules_are_the_counters_difference_of_the_jobs_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(0, 1_000_000, 4_500_000)
    own = meter(monkeypatch, nvml)
    joules = own.spent(own.read_mj(), own.read_mj(), 10.0)
    assert (joules.v, joules.prov) == (3500.0, Prov.MEASURED)
    assert nvml.asked == "GPU-1234-ab"


def test_no_reading_is_null_with_its_reason_and_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = FakeNvml.NVMLError("Insufficient Permissions")
    own = meter(monkeypatch, FakeNvml(0, 5, lost))
    joules = own.spent(own.read_mj(), own.read_mj(), 10.0)
    assert (joules.v, joules.why_null) == (None, "NVML: Insufficient Permissions")
    for nvml in (FakeNvml(FakeNvml.NVMLError("Not Supported")), FakeNvml(init=FakeNvml.NVMLError("Not Supported"))):
        own = meter(monkeypatch, nvml)
        assert own.spent(own.read_mj(), own.read_mj(), 10.0).why_null == "NVML: Not Supported"


def test_a_reset_counter_and_a_short_window_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    own = meter(monkeypatch, FakeNvml(0))
    assert own.spent(900, 100, 10.0).why_null == "the energy counter was reset during the window"
    assert own.spent(100, 900, 4.9).why_null == "window shorter than 5 s"


def test_a_cpu_run_has_no_energy() -> None:
    own = EnergyMeter(torch.device("cpu"))
    assert own.read_mj() is None
    assert own.spent(None, None, 10.0).why_null == "a CPU run: no NVML device"
