"""The torchao backend: integer and float8 weights as tensor subclasses, loaded through
transformers' TorchAoConfig.

`int8_weight_only` and `float8_weight_only` keep one scale per output row and multiply in 16 or 32
bits, so that they save memory and bandwidth, not arithmetic. `int8_dynamic` and `float8_dynamic`
quantize activations on the fly, a scale per token, and multiply in 8 bits. `int4_weight_only` keeps
a scale and a zero per 128 weights, packed for the tinygemm kernel of CUDA devices. Embeddings stay
as they are: a quantized one does not come back from disk.

Fused experts (mixtures of experts in transformers 5 keep all experts of a block in one parameter)
are taken by the formats in `FUSES`, one scale per output row of each expert. torchao's tensors can
be indexed by expert but not multiplied as a batch, so that such a model computes expert by expert:
its config.json says so (`experts_implementation`), and any `from_pretrained` follows it.
Source: torchao.quantization.quant_api of torchao 0.18 (what each configuration stores and asks of a
device).
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.quantization import Format
from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.models.load import load_config
from pipeline.quantization.layers import Layer, plan_layers
from pipeline.quantization.reload_check import auto_class
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INT4_GROUP = 128  # weights that share a scale; torchao's default
FUSES = (Format.int8_weight_only, Format.int8_dynamic, Format.float8_weight_only)
EXPERT_BY_EXPERT = "eager"  # transformers' name for a loop over experts
FLOAT8_MULTIPLE = 16  # widths that torch._scaled_mm takes
CAPABILITY = {
    Format.int8_dynamic: (7, 5),  # torch._int_mm: int8 tensor cores
    Format.int4_weight_only: (8, 0),  # torch._weight_int4pack_mm
    Format.float8_dynamic: (8, 9),  # torch._scaled_mm
}


def refuse_device(fmt: Format, *, device: torch.device, key: str) -> None:
    """Refuse a machine on which torchao cannot work.

    Raises:
        UserError: If it is not installed, or its kernel for this format needs another device.
    """

    if find_spec("torchao") is None:
        raise UserError(
            key, f"{fmt.value} needs torchao, which is not installed", "pip install -e '.[quant]'"
        )
    if device.type == "cpu":
        if fmt in (Format.int4_weight_only, Format.float8_dynamic):
            raise UserError(
                key,
                f"torchao has no kernel for {fmt.value} on a CPU",
                "use int8_weight_only, or nf4",
            )
        return
    own = device_of(device)
    needed, have = CAPABILITY.get(fmt, (0, 0)), own.capability()
    if not own.torchao:
        raise UserError(
            key,
            f"{fmt.value} is known to work on cuda and cpu, not on {own.kind}",
            "use one of them",
        )
    if have is not None and have < needed:
        problem = (
            f"{fmt.value} needs compute capability {needed[0]}.{needed[1]} and {own.name()} has"
            f" {have[0]}.{have[1]}"
        )
        raise UserError(key, problem, "use int8_weight_only")


def refuse_layers(layers: Sequence[Layer], fmt: Format, *, device: torch.device, key: str) -> None:
    """Refuse layers that torchao would pass over in silence, or whose kernels would fail, by name.

    Raises:
        UserError: Naming the first such layer and how many there are.
    """
    transposed = [layer for layer in layers if layer.transposed]
    if transposed:
        problem = (
            f"torchao takes torch.nn.Linear alone, and {transposed[0].name} is a Conv1D with"
            " transposed weights"
        )
        raise UserError(key, problem, "use int8 or nf4 of bitsandbytes")
    multiple = {Format.int4_weight_only: INT4_GROUP, Format.float8_dynamic: FLOAT8_MULTIPLE}.get(
        fmt, 1
    )
    # tinygemm pads outputs by itself; torch._scaled_mm takes multiples of 16 on both sides.
    both = fmt is Format.float8_dynamic
    bad = [
        layer
        for layer in layers
        if layer.in_features % multiple or (both and layer.out_features % multiple)
    ]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        sides = "inputs and outputs" if both else "inputs"
        problem = f"{fmt.value} needs {sides} in multiples of {multiple}, unlike {bad[0]}{more}"
        raise UserError(
            key, problem, f"name them in {key.rpartition('.')[0]}.exclude, or use int8_weight_only"
        )


def load_quantized(
    source: Path,
    fmt: Format,
    task: Task,
    *,
    device: torch.device,
    rest_dtype: torch.dtype,
    keep: Sequence[str],
) -> PreTrainedModel:
    """Load `source` with every linear layer quantized as it is read, but those named in `keep`."""
    from transformers import TorchAoConfig

    quiet()
    plan = plan_layers(load_config(source), task, key="format", fuses=fmt in FUSES)
    layers = [layer for layer in (*plan.quantize, *plan.keep) if layer.name not in keep]
    config = TorchAoConfig(_scheme_with(fmt, layers), modules_to_not_convert=list(keep))
    experts = [layer for layer in layers if layer.fused]
    model = (
        auto_class(task)
        .from_pretrained(
            source,
            config=load_config(source),
            quantization_config=config,
            device_map={"": str(device)},
            dtype=rest_dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **({"experts_implementation": EXPERT_BY_EXPERT} if experts else {}),
        )
        .eval()
    )
    if experts:  # read by `PreTrainedConfig.__init__`, and lost by its own way of saving
        model.config.experts_implementation = EXPERT_BY_EXPERT
    return model


def _scheme_with(fmt: Format, layers: Sequence[Layer]) -> Any:
    """Return the configuration of a format, for linear layers and fused experts.

    Layers are named by patterns, one for each place in a block: config.json holds them.
    """
    from torchao.quantization import FqnToConfig

    scheme = _scheme(fmt)
    if not any(layer.fused for layer in layers):
        return scheme
    names = [f"{layer.name}.{part}" for layer in layers for part in layer.fused or ("weight",)]
    patterns = dict.fromkeys(
        # `layers.3.mlp` becomes `layers\.\d+\.mlp`: a pattern a place, not a name a layer.
        re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
        for name in names
    )
    return FqnToConfig(OrderedDict((f"re:{pattern}", scheme) for pattern in patterns))


def quiet() -> None:
    """Stop the library's log lines below errors: on a CPU build it says at import which kernels it
    lacks.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)


def _scheme(fmt: Format) -> Any:
    import torchao.quantization as ao

    if fmt is Format.int4_weight_only:
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        packing = Int4PackingFormat.TILE_PACKED_TO_4D
        return ao.Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format=packing)
    if fmt is Format.float8_dynamic:
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    return {
        Format.int8_weight_only: ao.Int8WeightOnlyConfig,
        Format.float8_weight_only: ao.Float8WeightOnlyConfig,
        Format.int8_dynamic: ao.Int8DynamicActivationInt8WeightConfig,
    }[fmt]()


def is_quantized(module: torch.nn.Module) -> bool:
    """Return whether `module` is a layer, or holds fused experts, that this backend quantized."""
    from torchao.utils import TorchAOBaseTensor

    return any(isinstance(own, TorchAOBaseTensor) for own in module.parameters(recurse=False))


def round_trip(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return what is left of a weight by the library's own rounding, in its shape and dtype."""
    import torch
    from torchao.quantization import quantize_

    # The layer's own weight is replaced at once.
    with torch.device("meta"):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    # tinygemm's int4 takes bf16 alone.
    dtype = torch.bfloat16 if fmt is Format.int4_weight_only else weight.dtype
    layer.weight = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    quantize_(layer, _scheme(fmt))
    return _dequantize(layer).to(weight.dtype)


def _dequantize(module: torch.nn.Module) -> torch.Tensor:
    """Return the weight that a quantized layer stands for, (out, in).

    A tile of int4 has no way back of its own: the layer is run on the unit matrix, which its kernel
    multiplies exactly.
    """
    import torch
    from torchao.quantization import Int4TilePackedTo4dTensor

    layer: Any = module
    if not isinstance(layer.weight, Int4TilePackedTo4dTensor):
        return layer.weight.dequantize().detach()
    unit = torch.eye(layer.in_features, dtype=torch.bfloat16, device=layer.weight.device)
    with torch.no_grad():
        return torch.nn.functional.linear(unit, layer.weight).T
