"""Quantize a model folder: refuse early, convert, save before any forward, prove the reload.

A backend is a module with the functions of `Backend`; `LIBRARIES` says which one does which format.
To add a format: a member of `config.Format`, and a row here; to add a library: such a module, and
its rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.errors import StageFailed, UserError
from pipeline.ledger.attempted import MEANT
from pipeline.ledger.numbers import how_many
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import QuantizedFacts
from pipeline.models.load import (
    check_model_folder,
    is_taken_in_part,
    language_config,
    load_config,
    load_config_of_weights,
    load_model,
    load_tokenizer,
    quantized_by,
    save_model,
)
from pipeline.models.weights import weights_bytes
from pipeline.quantization import ao, bnb, sixteen
from pipeline.quantization.layers import (
    EVERY_LAYER,
    Choice,
    Layer,
    LayerPlan,
    abbreviate,
    count_parameters,
    make_twin,
    plan_layers,
)
from pipeline.quantization.reload_check import Reference, check_bit_equal, take_reference
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class Backend(Protocol):
    """What a quantization library has to offer. Raises UserError where it refuses."""

    def refuse_device(self, fmt: Format, *, device: torch.device, key: str) -> None:
        """Refuse a machine that the library cannot work on."""
        ...

    def quiet(self) -> None:
        """Stop the library's chatter."""
        ...

    def refuse_layers(
        self, layers: Sequence[Layer], fmt: Format, *, device: torch.device, key: str
    ) -> None:
        """Refuse layer shapes that its kernels cannot take."""
        ...

    def load_quantized(
        self,
        source: Path,
        fmt: Format,
        task: Task,
        *,
        device: torch.device,
        rest_dtype: torch.dtype,
        keep: Sequence[str],
    ) -> PreTrainedModel:
        """Load and quantize, leaving alone the layers named in `keep`, without running the
        model.
        """
        ...

    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Say whether a layer is one that it quantized."""
        ...

    def round_trip(self, weight: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Return what would be left of a weight (out, in) in `fmt`, in its own dtype."""
        ...


LIBRARIES: dict[Format, str] = {
    Format.bf16: "torch",
    Format.fp16: "torch",
    Format.int8: "bitsandbytes",
    Format.nf4: "bitsandbytes",
    Format.nf4_double: "bitsandbytes",
    Format.fp4: "bitsandbytes",
    Format.fp4_double: "bitsandbytes",
    Format.int8_weight_only: "torchao",
    Format.int8_dynamic: "torchao",
    Format.int4_weight_only: "torchao",
    Format.float8_weight_only: "torchao",
    Format.float8_dynamic: "torchao",
}
BY_LIBRARY: dict[str, Backend] = {"bitsandbytes": bnb, "torchao": ao, "torch": sixteen}
WORDS = 120  # characters of what a library says
# of others the class is said too: KeyError: 'x'
SPEAKING = (RuntimeError, NotImplementedError, TypeError, ValueError)
FUSES = ao.FUSES  # formats that take fused experts; the others leave them alone


def backend_of(fmt: Format) -> Backend:
    """Return the backend that does a format."""
    return BY_LIBRARY[LIBRARIES[fmt]]


def why_not(fmt: Format, device: torch.device) -> str | None:
    """Return why `device` cannot take `fmt`, or None where it can."""
    try:
        backend_of(fmt).refuse_device(fmt, device=device, key="format")
    except UserError as error:
        return error.problem
    return None


def import_library(fmt: Format, key: str = "format") -> None:
    """Import the library that does a format, without its chatter; it takes a second or more.

    Raises:
        UserError: If it is broken here.
    """
    with refusing("the library", fmt, key):
        backend_of(fmt).quiet()
        import_module(LIBRARIES[fmt])


@contextmanager
def refusing(what: str, fmt: Format, key: str) -> Generator[None]:
    """Turn whatever a library or a model's own code raises into a refusal: `what` does not run in
    `fmt`.

    Which of some twenty kinds it is depends on the architecture, and says nothing that a caller
    could act upon. What is no fault of the format passes: memory, a full disk, a device that
    failed.

    Raises:
        UserError: Naming `key`.
    """
    try:
        yield
    except MEANT:
        raise
    except Exception as error:
        if _is_of_the_machine(error):
            raise
        problem = f"{what} does not run in {fmt.value} by {LIBRARIES[fmt]} ({_words(error)})"
        remedy = "use bf16, or name the layers that its code reads by itself in exclude"
        raise UserError(
            key, problem, remedy if fmt not in SIXTEEN_BITS else "leave it out"
        ) from error


def _words(error: Exception) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    name = type(error).__name__
    return (said if said and isinstance(error, SPEAKING) else f"{name}: {said}" if said else name)[
        :WORDS
    ]


def _is_of_the_machine(error: Exception) -> bool:
    """Whether an exception speaks of memory, a disk or a device, not of the model."""
    import torch

    from pipeline.ledger.memory import is_of_device, is_of_host
    from pipeline.store.artifacts import says_full

    # transformers raises OSError without a number for what is not in a folder
    has_number = isinstance(error, OSError) and error.errno is not None
    return (
        has_number
        or says_full(error)
        or is_of_host(error)
        or is_of_device(error)
        or isinstance(error, torch.AcceleratorError)
    )


def named(config: PreTrainedConfig) -> str:
    """Return what a model calls itself in refusals: its class (`LlamaForCausalLM`), else its
    configuration's.
    """
    classes: Any = getattr(config, "architectures", None)
    return str(classes[0]) if isinstance(classes, list) and classes else type(config).__name__


def formats() -> list[Format]:
    """Return every format, `auto` aside."""
    return list(LIBRARIES)


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantizing did.

    Attributes:
        quantized_layers: Names of the layers in `fmt`; of sixteen bits, which take the whole model,
            none.
        kept_layers: Names of the layers left in `rest_dtype`: heads, tied weights, what was
            excluded, and fused experts that the library cannot take. Of sixteen bits, of the
            parameters that the model keeps in fp32.
        rest_dtype: Of everything that is not quantized (`float32`, `bfloat16`).
        parameters: How many numbers the model's parameters hold.
        quantized_parameters: How many of them are in `fmt`.
        kept_experts: How many of them lie in fused experts that were left alone.
        bytes_before: Of the source's weight files.
        bytes_after: Of the quantized weight files.
        logits_sha256: Of the probes' outputs, equal in memory and after the reload.
    """

    fmt: Format
    quantized_layers: tuple[str, ...]
    kept_layers: tuple[str, ...]
    rest_dtype: str
    parameters: int
    quantized_parameters: int
    kept_experts: int
    bytes_before: int
    bytes_after: int
    logits_sha256: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the parameters that is in `fmt`."""
        return self.quantized_parameters / self.parameters

    def describe(self) -> QuantizedFacts:
        """Return the facts worth keeping beside the artifact."""
        return {
            "format": self.fmt.value,
            "library": f"{LIBRARIES[self.fmt]} {version(LIBRARIES[self.fmt])}",
            "quantized_layers": len(self.quantized_layers),
            "kept_layers": list(self.kept_layers),
            "rest_dtype": self.rest_dtype,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "quantized_share": self.share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "logits_sha256": list(self.logits_sha256),
        }

    def say(self) -> str:
        """Return what was done, in words: how much of the model is in the format, and what is
        not.
        """
        left = abbreviate(self.kept_layers)
        if self.fmt in SIXTEEN_BITS:
            kept = f", kept in fp32 by the model: {left}" if self.kept_layers else ""
            return f"{self.share:.1%} of the parameters in {self.fmt.value}{kept}"
        said = (
            f"{how_many(len(self.quantized_layers), 'layer')} in {self.fmt.value}, {self.share:.1%}"
            f" of the parameters, left alone: {left}"
        )
        if not self.kept_experts:
            return said
        can = ", ".join(fmt.value for fmt in FUSES)
        why = (
            f"{self.fmt.value} cannot take these as they are stored"
            if self.fmt in FUSES
            else f"{can} can take most"
        )
        return (
            f"{said}; {self.kept_experts / self.parameters:.1%} of the parameters are in fused"
            f" experts: {why}"
        )


def quantize(
    source: Path,
    out: Path,
    fmt: Format,
    task: Task,
    *,
    device: torch.device | str,
    key: str,
    clock: PhaseClock | None = None,
    choice: Choice = EVERY_LAYER,
    prepare: Callable[[PreTrainedModel], None] | None = None,
    prove: bool = True,
) -> Quantized:
    """Write `source` to `out` in `fmt`, with its tokenizer, so that a plain `from_pretrained(out)`
    loads it.

    Refusals name `key` (`stages.int8.format`). `clock` books the library's import (import), reading
    and planning (model_load), quantizing (convert: weights are quantized as they are read), saving
    (checkpoint) and the reload check (eval). `prepare` may change the unquantized model's weights
    in place beforehand, and books its own time. Without `prove` the reload check is left out: for
    what is thrown away.

    Raises:
        UserError: If the model, its shapes or the device cannot take the format; nothing is
            written.
        StageFailed: If what was saved is not, bit for bit, what was quantized; `out` is not to be
            used.
    """
    import torch

    device = torch.device(device)
    with _phase(clock, "import"):
        backend_of(fmt).refuse_device(fmt, device=device, key=key)
        import_library(fmt, key)
    with _phase(clock, "model_load"):
        check_model_folder(source, key)
        config = load_config_of_weights(source, task, key=key)
        plan = refuse_unsupported(config, fmt, task, device=device, key=key, choice=choice)
        rest = rest_dtype(config, device, fmt)
    convert = _Conversion(fmt, task, plan, device, rest, key, clock)
    with refusing(named(config), fmt, key):
        if prepare is None and not is_taken_in_part(config, task):
            made, reference, before = *convert(source, out), weights_bytes(source)
        else:
            # Libraries quantize while they read a folder, so a changed model has to be one first.
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as name:
                folder = Path(name)
                _prepared(source, folder, prepare, task, device=device, key=key, clock=clock)
                made, reference, before = *convert(folder, out), weights_bytes(folder)
        if prove:
            with _phase(clock, "eval"):
                check_bit_equal(out, task, reference, device=device)
    return Quantized(
        fmt=fmt,
        quantized_layers=made.layers,
        kept_layers=made.kept,
        rest_dtype=str(rest).removeprefix("torch."),
        parameters=plan.parameters,
        quantized_parameters=made.parameters,
        kept_experts=sum(layer.weights for layer in plan.keep if layer.fused),
        bytes_before=before,
        bytes_after=weights_bytes(out),
        logits_sha256=reference.digests,
    )


def _prepared(
    source: Path,
    folder: Path,
    prepare: Callable[[PreTrainedModel], None] | None,
    task: Task,
    *,
    device: torch.device,
    key: str,
    clock: PhaseClock | None,
) -> None:
    """Write `source`, or the language part of it, changed by `prepare`, to `folder`, in the dtype
    it is stored in.
    """
    with _phase(clock, "model_load"):
        config = load_config(source, key=key)
        model: Any = load_model(source, task, device=device)
        tokenizer = load_tokenizer(source, key=key)
    if prepare is not None:
        prepare(model)
    with _phase(clock, "checkpoint"):
        dtype: Any = config.dtype or config.get_text_config().dtype or model.dtype
        save_model(model.to(dtype), tokenizer, folder)


def refuse_unsupported(
    config: PreTrainedConfig,
    fmt: Format,
    task: Task,
    *,
    device: torch.device,
    key: str,
    choice: Choice = EVERY_LAYER,
) -> LayerPlan:
    """Refuse, from its configuration alone, a model that cannot be quantized; return the layers
    that will be.

    Sixteen bits take the whole model: no layers are chosen.

    Raises:
        UserError: If it is quantized already, cannot do the task, has no linear layers, or has
            shapes that crash.
    """
    method = quantized_by(config)
    if method is not None:
        raise UserError(
            key, f"the model is quantized already ({method})", "quantize the model it was made from"
        )
    with refusing(named(config), fmt, key):
        config = language_config(config, task)
        if fmt in SIXTEEN_BITS:
            return LayerPlan((), (), count_parameters(make_twin(config, task, key)))
        plan = plan_for(fmt, config, task, key=key, choice=choice)
        backend_of(fmt).refuse_layers(plan.quantize, fmt, device=device, key=key)
        return plan


def plan_for(
    fmt: Format, config: PreTrainedConfig, task: Task, *, key: str, choice: Choice
) -> LayerPlan:
    """Return which layers a format of single layers would take (`plan_layers`)."""
    return plan_layers(
        config, task, key=key, choice=choice, fuses=fmt in FUSES, spares_fp32=fmt in bnb.FORMATS
    )


def rest_dtype(
    config: PreTrainedConfig, device: torch.device, fmt: Format | None = None
) -> torch.dtype:
    """Return the dtype of what is not quantized: bfloat16 on accelerators, on CPUs what the source
    is stored in.

    A 16-bit format leaves nothing to its rest.
    """
    import torch

    if fmt in SIXTEEN_BITS:
        return sixteen.torch_dtype(fmt)
    if device.type != "cpu":
        return torch.bfloat16
    dtype = config.dtype or config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@dataclass(frozen=True, slots=True)
class _Made:
    """What a conversion made: names of the layers in the format, of what was left alone, and
    parameters in it.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class _Conversion:
    """Quantize, save, and only then run the model; it is gone from memory when the call returns."""

    fmt: Format
    task: Task
    plan: LayerPlan
    device: torch.device
    rest_dtype: torch.dtype
    key: str
    clock: PhaseClock | None

    def __call__(self, source: Path, out: Path) -> tuple[_Made, Reference]:
        """Return what was made, and what the model in memory answers.

        Raises:
            UserError: If fp16 cannot hold a weight.
            StageFailed: If the library quantized other layers than were planned.
        """
        with _phase(self.clock, "model_load"):
            tokenizer = load_tokenizer(source, key=self.key)
        with _phase(self.clock, "convert"):
            keep = [layer.name for layer in self.plan.keep]
            model = backend_of(self.fmt).load_quantized(
                source,
                self.fmt,
                self.task,
                device=self.device,
                rest_dtype=self.rest_dtype,
                keep=keep,
            )
            made = self._whole(model) if self.fmt in SIXTEEN_BITS else self._by_layer(model)
        with _phase(self.clock, "checkpoint"):
            # before any forward: running the model may spoil its weights (bnb.py)
            save_model(model, tokenizer, out)
        with _phase(self.clock, "eval"):
            return made, take_reference(model)

    def _by_layer(self, model: Any) -> _Made:
        backend = backend_of(self.fmt)
        layers = tuple(
            name for name, module in model.named_modules() if backend.is_quantized(module)
        )
        # Libraries pass over layers in silence; shares and names in the artifact must be true.
        wrong = {layer.name for layer in self.plan.quantize} ^ set(layers)
        if wrong:
            raise StageFailed(
                f"{LIBRARIES[self.fmt]} quantized other layers than planned, among them"
                f" {min(wrong)}"
            )
        return _Made(
            layers, tuple(layer.name for layer in self.plan.keep), self.plan.quantized_parameters
        )

    def _whole(self, model: Any) -> _Made:
        sixteen.refuse_too_large(model, self.fmt, self.key)
        kept = {
            name: own.numel()
            for name, own in model.named_parameters()
            if own.dtype is not self.rest_dtype
        }
        return _Made((), tuple(kept), self.plan.parameters - sum(kept.values()))


def _phase(clock: PhaseClock | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if clock is None else clock.phase(name)
