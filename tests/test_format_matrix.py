"""Every architecture in every format of this machine: yes, with the share of its parameters, or no
with the reason.

By default each architecture meets one format of each library; `-m slow` has all, and a process of
its own for some.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from format_matrix import ARCHITECTURES, CPU, FORMATS, cell

from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.quantization.backend import FUSES
from pipeline.quantization.reload_check import check_bit_equal

pytest.importorskip("bitsandbytes")
ONE_EACH = [Format.bf16, Format.int8, Format.int8_weight_only]
MIXTURES = {"Qwen3-MoE": 0.79, "Mixtral": 0.87, "OLMoE": 0.87, "DeepSeek-V3": 0.79}
"""By architecture, the share that torchao takes with its fused experts."""
REFUSED = {
    ("Falcon", Format.int8): "has no linear layers",
    ("Falcon", Format.int8_weight_only): "has no linear layers",
    ("GPT-2", Format.int8_weight_only): "is a Conv1D with transposed weights",
    ("Mamba", Format.int8): "does not run in int8",
    ("Mamba", Format.int8_weight_only): "does not run in int8_weight",
    ("DeepSeek-V3", Format.int8): "does not run in int8",
    ("XLNet", Format.bf16): "does not run in bf16",
}
ALIKE = (
    "Mistral",
    "Qwen3",
    "Gemma2",
    "GPT-NeoX",
    "OLMoE",
    "ELECTRA",
    "RoBERTa",
    "DistilBERT",
    "Llama classifier",
)
"""Architectures that differ from another one of the table in nothing that a format looks at: with
`-m slow`.
"""
WITHOUT_EXPERTS = 0.25  # what linear layers alone are, at most, of these tiny mixtures


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in ARCHITECTURES],
)
def test_an_architecture_is_quantized_or_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    for fmt in (each for each in ONE_EACH if each in FORMATS):
        found, said = cell(name, fmt, tmp_path), REFUSED.get((name, fmt))
        if said is not None:
            assert found.share is None, (fmt, found)
            assert said in found.why, (fmt, found)
            continue
        assert found.share is not None, (fmt, found)
        if fmt in SIXTEEN_BITS:
            assert found.share == 1
        elif name in (*MIXTURES, "GPT-OSS"):
            takes = fmt in FUSES and name in MIXTURES
            expected = MIXTURES[name] if takes else WITHOUT_EXPERTS
            assert (found.share > expected - 0.01) if takes else (found.share < expected), (
                fmt,
                found,
            )
        else:
            assert found.share > 0.3, (fmt, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_format_is_quantized_or_refused(name: str, tmp_path: Path) -> None:
    for fmt in FORMATS:
        found = cell(name, fmt, tmp_path)
        assert found.share is not None or found.why, (fmt, found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fmt"), [("Mixtral", Format.int8_weight_only)])
def test_fused_experts_are_the_same_in_a_fresh_process(
    name: str, fmt: Format, tmp_path: Path
) -> None:
    """A program without this package loads it; config.json tells it to compute expert by expert."""
    assert cell(
        name,
        fmt,
        tmp_path,
        reload=lambda folder, architecture, reference: check_bit_equal(
            folder, architecture.task, reference, device=CPU
        ),
    ).share
