"""The bitsandbytes backend: LLM.int8(), NF4 and FP4 weights, on CPUs and GPUs.

int8 keeps one scale per output row and multiplies in int8, activations quantized on the fly, except
the activation columns above 6.0, which stay in 16 bits. NF4 keeps one scale per 64 weights and
4-bit indexes into the quantiles of a normal distribution, FP4 indexes into 4-bit floating-point
numbers; both multiply in the compute dtype. Double quantization (`nf4_double`, `fp4_double`) keeps
the scales in 8 bits themselves: 4.13 instead of 4.5 bits a weight.
Source: Dettmers et al. 2022, arXiv 2208.07339 (int8); Dettmers et al. 2023, arXiv 2305.14314,
section 3 (NF4, double quantization).

The trap: where the CPU has AVX512_BF16, the first forward without gradients repacks 4-bit weights
in place and rounds their scales to bfloat16, and what is saved after it is wrong. So a model is
saved before it is ever run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.quantization import Format
from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.models.load import load_config
from pipeline.quantization.layers import Layer
from pipeline.quantization.reload_check import auto_class
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMATS = (Format.int8, Format.nf4, Format.nf4_double, Format.fp4, Format.fp4_double)
FOUR_BITS = (Format.nf4, Format.nf4_double, Format.fp4, Format.fp4_double)
# weights that share a scale; bitsandbytes.nn.Params4bit's default, which transformers does not
# change
BLOCK = 64
CPU_BLOCK_N = 32  # output rows of a tile; bitsandbytes.functional._convert_weight_packed_for_cpu
# Turing: int8 tensor cores. Source: README of bitsandbytes, "Accelerator support"
INT8_CAPABILITY = (7, 5)


def refuse_device(fmt: Format, *, device: torch.device, key: str) -> None:
    """Refuse a machine on which bitsandbytes cannot work. Imports it, which takes seconds, unless
    that is a CPU.

    Raises:
        UserError: If it is not installed, does not know the device, or was not built for it.
    """

    if find_spec("bitsandbytes") is None:
        raise UserError(
            key,
            f"{fmt.value} needs bitsandbytes, which is not installed",
            "pip install -e '.[quant]'",
        )
    if device.type == "cpu":  # every build has its kernels
        return
    quiet()
    import bitsandbytes
    from bitsandbytes.cextension import lib

    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise UserError(
            key, f"bitsandbytes cannot compute {fmt.value} on {device.type}", f"use one of {known}"
        )
    own = device_of(device)
    if (capability := own.capability()) is None:  # Intel's, Apple's, AMD's: the library knows them
        return
    if not lib.compiled_with_cuda:
        raise UserError(
            key,
            "the installed bitsandbytes has no kernels for this CUDA",
            "install a matching build",
        )
    if fmt is Format.int8 and capability < INT8_CAPABILITY:
        raise UserError(
            key,
            f"int8 needs compute capability 7.5 and {own.name()} has"
            f" {capability[0]}.{capability[1]}",
            "use nf4",
        )


def quiet() -> None:
    """Stop the library's log lines below errors: int8 warns at every layer of every forward that it
    casts its input.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def refuse_layers(layers: Sequence[Layer], fmt: Format, *, device: torch.device, key: str) -> None:
    """Refuse shapes that crash this device's kernels, by layer name. int8 takes every shape, 4 bits
    on GPUs too.

    Raises:
        UserError: Naming the first such layer and how many there are.
    """
    if fmt not in FOUR_BITS or device.type != "cpu":
        return
    bad = [
        layer for layer in layers if layer.out_features % CPU_BLOCK_N or layer.in_features % BLOCK
    ]
    if bad and cpu_repacks():
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        problem = (
            f"{fmt.value} on this CPU needs inputs in multiples of {BLOCK} and outputs in multiples"
            f" of {CPU_BLOCK_N}, unlike {bad[0]}{more}"
        )
        remedy = (
            f"use int8, name them in {key.rpartition('.')[0]}.exclude, or take widths that are"
            " multiples of 64"
        )
        raise UserError(key, problem, remedy)


def cpu_repacks() -> bool:
    """Return whether this CPU's 4-bit kernel repacks weights at the first forward (it has
    AVX512_BF16).
    """
    quiet()
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def load_quantized(
    source: Path,
    fmt: Format,
    task: Task,
    *,
    device: torch.device,
    rest_dtype: torch.dtype,
    keep: Sequence[str],
) -> PreTrainedModel:
    """Load `source` with every linear layer quantized as it is read, but those named in `keep`.

    `rest_dtype` is that of everything else, and the compute dtype of 4 bits. The two must agree:
    bitsandbytes casts the biases of 4-bit layers to the compute dtype in place, at the first
    forward.
    """
    from transformers import BitsAndBytesConfig

    recipe: dict[str, Any] = {"load_in_8bit": True}
    if fmt in FOUR_BITS:
        recipe = {
            "load_in_4bit": True,
            # `nf4` or `fp4`, with or without `_double`
            "bnb_4bit_quant_type": fmt.value[:3],
            "bnb_4bit_compute_dtype": rest_dtype,
            "bnb_4bit_use_double_quant": fmt in (Format.nf4_double, Format.fp4_double),
        }
    return (
        auto_class(task)
        .from_pretrained(
            source,
            config=load_config(source),
            quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=list(keep), **recipe),
            device_map={"": str(device)},
            dtype=rest_dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        .eval()
    )


def is_quantized(module: torch.nn.Module) -> bool:
    """Return whether `module` is a layer that this backend quantized."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return isinstance(module, Linear4bit | Linear8bitLt)


def round_trip(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return what is left of a weight by the library's own rounding, in its shape and dtype."""
    from bitsandbytes import functional

    if fmt is Format.int8:
        # The library quantizes from fp16, so that is the rounding to repeat.
        rounded, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(rounded, scales).to(weight.dtype)
    double = fmt in (Format.nf4_double, Format.fp4_double)
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type=fmt.value[:3]
    )
    return functional.dequantize_4bit(packed, state).to(weight.dtype)
