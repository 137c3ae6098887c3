"""FLOPs a method needs, counted once on an eager, unquantized twin on the meta device: no memory,
no recompute.

A transformer's matmul FLOPs for one sequence of T tokens of which K are predicted are exactly c + a
T + b T^2 + h K: heads that read one position, linear layers, attention, and the output head of a
language model, which the objective applies to predicted positions only. Four counts fix the four
numbers, and every batch is then priced by arithmetic.

What is counted, and what is not:
- A multiply-add is 2 FLOPs; only matrix products (and convolutions) count, as in every published
  MFU.
- Attention counts in full, T x T: neither the causal half, nor what documents packed into one
  window do not read of each other, is taken off.
- Positions count as they are computed: a packed window is full; of a padded batch its padding
  counts as well, while `tokens` leaves it out.
- The backward pass is what autograd does with the model's own `requires_grad`: a frozen weight has
  no gradient, and below the lowest trained weight nothing is carried back. Adapters (LoRA) are
  modules like any other.
- A live teacher's forward pass is added by the caller; a cached teacher's belongs to the stage that
  captured it.
- A mixture of experts counts the experts that a token visits: the twin multiplies each token with
  the weights of its own top k, whichever they are. Experts in a loop over tokens cannot be counted
  without data: that is an error here, and a null with this reason in a row.
- Recomputed activations, gradient accumulation and the storage format of weights change nothing.

Source of the convention: PaLM, arXiv 2204.02311, appendix B; of 6N: Kaplan et al. 2020, arXiv
2001.08361, section 2.1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from pipeline.ledger.attempted import attempted
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POINTS = (8, 16, 24)  # sequence lengths at which the twin is counted
# transformers' way to run experts that takes each token with its own top k, whatever its data
EXPERTS = "batched_mm"
# of the rule of thumb: a count below it has missed operations (a custom kernel, say)
SHARE_OF_RULE = 0.5


@dataclass(frozen=True, slots=True)
class FlopsPerSequence:
    """FLOPs of one sequence of T tokens, K predicted: `constant + linear * T + square * T^2 +
    predicted * K`.
    """

    constant: float
    linear: float
    square: float
    predicted: float = 0.0

    def __call__(self, num_tokens: float, num_predicted: float | None = None) -> float:
        """Return the FLOPs of one sequence of `num_tokens` (padding included).

        Args:
            num_predicted: Positions that the output head reads; None: all of them.
        """
        heads = num_tokens if num_predicted is None else num_predicted
        return (
            self.constant
            + self.linear * num_tokens
            + self.square * num_tokens**2
            + self.predicted * heads
        )

    def generation(self, prompt: int, new: int) -> float:
        """Return the FLOPs of a forward pass over a prompt of `prompt` tokens, and of `new` - 1
        more that read one token each and a key-value cache.

        The head reads one position in each; a new token attends to all before it and to itself.
        """
        read = prompt + new - 1
        # Query-key pairs: the prompt against itself, then each new token against one more than
        # before.
        pairs = prompt**2 + (read * (read + 1) - prompt * (prompt + 1)) // 2
        return self.constant + self.linear * read + self.square * pairs + self.predicted * new

    def batch(self, rows: int, length: int, num_predicted: int) -> float:
        """Return the FLOPs of a batch of shape (rows, length) with `num_predicted` targets in all
        of it.
        """
        return rows * self(length, num_predicted / rows)


def count_flops(source: PreTrainedConfig | Any, task: Task, *, backward: bool) -> FlopsPerSequence:
    """Count a model's matmul FLOPs per sequence.

    Args:
        source: The model as it is trained, adapters and frozen parameters included (it is copied to
            the meta device without its weights), or a configuration: a fresh model, all of it
            trained. Quantized layers count as plain ones.
        backward: Count the forward and backward pass, else the forward pass only.

    Raises:
        Exception: Of any kind, where the model cannot be run without data: what it does depends on
            values.
    """
    twin = _twin(source, task)
    head = _head(twin) if task.kind.is_language else None
    mask = _mask_that_works(twin)
    # With one predicted position each; a fourth count with two gives the head's part by itself.
    counts = [_count_once(twin, length, head, 1, mask, backward=backward) for length in POINTS]
    each = 0
    if head is not None:
        each = _count_once(twin, POINTS[0], head, 2, mask, backward=backward) - counts[0]
    return _fit([count - each for count in counts], each)


def expert_shares(source: PreTrainedConfig | Any, task: Task) -> dict[str, float]:
    """Return, by name of a parameter that holds experts, the share of them that a token visits;
    empty without experts.

    Found by running the twin: experts are told which of them each token visits, k of E, and k / E
    is the share.

    Raises:
        Exception: As `count_flops` does.
    """
    import torch

    twin = _twin(source, task)
    shares: dict[str, float] = {}
    handles: list[Any] = []
    for prefix, module in twin.named_modules():
        held = {
            f"{prefix}.{name}": each
            for name, each in module.named_parameters(recurse=False)
            # Experts of a layer lie in one tensor (experts, in, out); the ndim of a plain weight is
            # 2.
            if each.ndim == 3
        }
        # A convolution over one dimension has weights of three dimensions, too.
        if held and not isinstance(module, torch.nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
            noted = _noting(held, shares)
            handles.append(module.register_forward_pre_hook(noted, with_kwargs=True))
    if not handles:
        return {}
    with torch.no_grad():
        twin(**_inputs(POINTS[0], _mask_that_works(twin)), **_no_cache(twin))
    return shares


def _noting(held: Mapping[str, Any], shares: dict[str, float]) -> Callable[..., None]:
    """Return a hook that notes which share of the experts in `held` each token is sent to."""

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = next((each for each in (*args, *kwargs.values()) if _is_index(each)), None)
        if chosen is not None:
            for name, parameter in held.items():
                shares[name] = min(1.0, chosen.shape[-1] / parameter.shape[0])

    return note


def _is_index(value: Any) -> bool:
    """Tell whether an argument says which experts tokens visit: integers, (tokens, k)."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.ndim >= 2
        and value.dtype in (torch.int64, torch.int32)
    )


def active_parameters(model: Any, shares: Mapping[str, float]) -> tuple[int, int]:
    """Return how many parameters a token uses, and how many there are.

    Args:
        shares: As `expert_shares` returns them.
    """
    sizes = {name: _size(parameter) for name, parameter in model.named_parameters()}
    active = sum(size * shares.get(name, 1.0) for name, size in sizes.items())
    return round(active), sum(sizes.values())


def six_n(model: Any, shares: Mapping[str, float] | None = None, *, backward: bool = True) -> float:
    """Return FLOPs of a training step per token by the rule of thumb: 2 forward and 4 backward per
    matmul weight.

    Embeddings look up and do not multiply; an output head tied to them does. Attention is left out,
    so a true count lies above by about 12 x layers x width x T: T / (6 x width) of a GPT-shaped
    model.

    Args:
        shares: Of experts that a token visits, as `expert_shares` returns them; N then counts
            active parameters.
        backward: With the backward pass; else 2N.
    """
    weights = _matmul_weights(model, shares or {})
    forward = 2 * sum(size for _, size in weights)
    return forward + 4 * sum(size for weight, size in weights if weight.requires_grad) * backward


def suspicion(
    count: FlopsPerSequence,
    model: Any,
    task: Task,
    length: int,
    shares: Mapping[str, float] | None = None,
) -> str | None:
    """Return what to say where a count is far below the rule of thumb, or None: an operation was
    not recognised.

    The rule is a lower bound but for layers that not every token visits: heads on one position,
    experts without `shares` (see `expert_shares`).
    """
    if not task.kind.is_language:
        return None
    share = count(length) / (six_n(model, shares) * length)
    if share >= SHARE_OF_RULE:
        return None
    return (
        f"model_flops may be too low: {share:.0%} of 6N; an operation of this model is not counted"
    )


def _size(weight: Any) -> int:
    """Return the elements of a weight; a 4-bit one is packed and knows its true shape."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def _matmul_weights(model: Any, shares: Mapping[str, float]) -> list[tuple[Any, float]]:
    """Return the weights that multiply, each with the elements of it that a token meets."""
    import torch

    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    weights = [
        (weight, _size(weight) * shares.get(name, 1.0))
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and id(weight) not in looked_up and not name.endswith("bias")
    ]
    head = _head(model)
    if head is None or id(head.weight) not in looked_up:
        return weights
    return [*weights, (head.weight, _size(head.weight))]  # tied


def _head(model: Any) -> Any:
    """Return a language model's output head; None where it names none."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _fresh(config: PreTrainedConfig, task: Task) -> Any:
    import torch
    import transformers

    config = copy.deepcopy(config)
    # How weights are stored changes no product: the twin is unquantized.
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        return getattr(transformers, task.kind.auto_class).from_config(config)


def _copy(model: Any) -> Any:
    """Return a copy on the meta device: same modules, same ties, same `requires_grad`, no
    weights.
    """
    import torch

    # `deepcopy` takes what is in its memo for already copied, so no weight is copied at all. Tied
    # weights have one id, and so stay tied.
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and _is_quantized(module):
            # a bias multiplies nothing
            plain = torch.nn.Linear(module.in_features, module.out_features, device="meta")
            memo[id(module)] = plain.requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, device="meta")
        memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _is_quantized(layer: Any) -> bool:
    """Tell whether a linear layer keeps its weight in a form of its own (bitsandbytes subclasses
    it).
    """
    return type(layer).__module__.startswith("bitsandbytes")


def _twin(source: PreTrainedConfig | Any, task: Task) -> Any:
    import torch

    twin = _copy(source) if isinstance(source, torch.nn.Module) else _fresh(source, task)
    _make_eager(twin)
    return twin


def _make_eager(twin: Any) -> None:
    """Have attention and experts multiply plain matrices, which the counter sees, and nothing be
    computed twice.
    """
    from transformers import PreTrainedModel

    twin.eval()  # recomputes no activations
    for module in twin.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            # No public name sets it for a single module.
            setattr(module.config, "_experts_implementation", EXPERTS)  # noqa: B010
        # Dynamic frequencies look at the values of positions; what is multiplied is the same with
        # fixed ones.
        kind: Any = getattr(module, "rope_type", None)
        if isinstance(kind, str | dict):
            fixed: Any = "default" if isinstance(kind, str) else dict.fromkeys(kind, "default")
            module.rope_type = fixed


def _masks(length: int) -> dict[str, Any]:
    """Return attention masks in the forms that models take."""
    import torch

    return {
        "4D": torch.ones(1, 1, length, length, device="meta"),  # nothing inspects its values
        "2D": torch.ones(1, length, device="meta"),
        "none": None,
    }


def _mask_that_works(twin: Any) -> str:
    """Return the first form of mask that a model takes without looking at values.

    Raises:
        Exception: Where it takes none; what it says of the first.
    """
    import torch

    def takes(name: str) -> bool:
        with torch.no_grad():
            twin(**_inputs(POINTS[0], name), **_no_cache(twin))
        return True

    forms = list(_masks(1))
    found = next(
        (name for name in forms if attempted(lambda name=name: takes(name), lambda _: False)), None
    )
    if found is None:
        # Run outside of `attempted`, so that its own error reaches the caller.
        takes(forms[0])
        raise AssertionError("it ran the second time")
    return found


def _inputs(length: int, mask: str) -> dict[str, Any]:
    import torch

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": _masks(length)[mask]}


def _count_once(
    twin: Any, length: int, head: Any, num_predicted: int, mask: str, *, backward: bool
) -> int:
    """Count one sequence whose output head reads `num_predicted` positions, as the objective
    does.
    """
    import torch

    inputs = _inputs(length, mask)
    keep = None
    if head is not None:
        # As in training, where the head sees predicted positions only.
        keep = head.register_forward_pre_hook(
            lambda _, args: (args[0][:, :num_predicted], *args[1:])
        )
    try:
        with _counting() as counted, torch.set_grad_enabled(backward):
            logits = twin(**inputs, **_no_cache(twin)).logits
            # A model that is frozen throughout has no backward pass.
            if backward and logits.requires_grad:
                logits.sum().backward()
    finally:
        if keep is not None:
            keep.remove()
        twin.zero_grad()
    return sum(counted)


@contextmanager
def _counting() -> Generator[list[int]]:
    """Collect the FLOPs of every operation that torch's registry knows, by its formulas.

    As torch's FlopCounterMode, without its table by module: the hooks for that take as long as all
    the rest.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    counted = list[int]()

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            flops = flop_registry.get(func._overloadpacket)
            if flops is not None:
                counted.append(flops(*args, **(kwargs or {}), out_val=out))
            return out

    with Counter():
        yield counted


def _no_cache(twin: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(twin.config, "use_cache") else {}


def _fit(counts: list[int], each: int) -> FlopsPerSequence:
    """Solve for the polynomial through the three counts, exactly; `each` is the head's part per
    position.
    """
    # Newton's divided differences, in fractions: no rounding in a count of operations.
    (x0, x1, x2), (y0, y1, y2) = map(Fraction, POINTS), map(Fraction, counts)
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    square = (second - first) / (x2 - x0)
    linear = first - square * (x0 + x1)
    constant = y0 - linear * x0 - square * x0**2
    return FlopsPerSequence(float(constant), float(linear), float(square), float(each))
