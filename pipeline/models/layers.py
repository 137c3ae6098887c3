"""Models of fewer, more or other layers: built from a configuration that says so, with the source's
weights in it.

Architectures read what a layer is from the configuration when they build it: whether it has rotary
positions (SmolLM3), which window it sees (Gemma, Qwen, GPT-Neo), by what it is scaled. Moving live
layers would make one model in memory and another one after a reload.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageFailed, UserError
from pipeline.ledger.numbers import how_many
from pipeline.models.load import auto_class, text_config_of, write_weights
from pipeline.models.vocabulary import probe
from pipeline.models.weights import keep_attention, name_body
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
INDEXES = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "ple_layer_ids",
)
"""Lists that name layers by number, as configurations call them."""
# how many of the first layers are of another kind
LEADING = ("first_k_dense_replace", "num_dense_layers")
PATTERNS = ("block_types",)  # lists that are repeated until every layer has a kind (RecurrentGemma)
NOT_LAYERS = (
    "architectures",
    "axial_pos_embds_dim",
    "axial_pos_shape",
    "block_repeats",
    "block_sizes",
    "languages",
    "mlp_multipliers",
    "mrope_section",
    "pos_att_type",
    "ssm_multipliers",
    "time_step_limit",
    "type_vocab_sizes",
)
"""Lists of something else, which may be as long as a small model is deep."""
# of the largest logit: a reload places weights elsewhere in memory, and sums round otherwise
TOLERANCE = 1e-5
TRANSIENT = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
)


def layer_count(config: PreTrainedConfig) -> int:
    """Return the number of transformer layers a configuration declares, of a nested one those of
    its text model.

    Raises:
        UserError: If it declares none under the names known.
    """
    text = config.get_text_config()
    for name in COUNTS:
        if isinstance(getattr(text, name, None), int):
            return getattr(text, name)
    raise UserError(
        "student.layers",
        f"{type(config).__name__} names no layer count",
        "give student.path instead",
    )


def layer_stacks(model: PreTrainedModel, total: int) -> list[tuple[str, Any]]:
    """Return every list of `total` modules in a model that lies in no other such list: its name,
    and itself.
    """
    import torch

    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, torch.nn.ModuleList) and len(module) == total and not inside:
            found.append((name, module))
    return found


def per_layer(config: Any) -> list[str]:
    """Return the keys of a configuration that hold one value for each layer."""
    total = layer_count(config)
    return [
        name
        for name, value in config.get_text_config().to_dict().items()
        if isinstance(value, list)
        and len(value) == total
        and name not in (*INDEXES, *PATTERNS, *NOT_LAYERS)
        and not name.endswith("_token_id")
    ]


def cut_config(config: Any, chosen: Sequence[int], key: str) -> Any:
    """Return the configuration of a model that has the layers named by `chosen`, in that order.

    Raises:
        UserError: If its class takes no such configuration.
    """
    text = config.get_text_config()
    raw, total = text.to_dict(), layer_count(config)
    raw |= {name: len(chosen) for name in COUNTS if raw.get(name) == total}
    raw |= {name: [raw[name][at] for at in chosen] for name in per_layer(config)}
    for name in INDEXES:
        if isinstance(raw.get(name), list):
            raw[name] = [place for place, at in enumerate(chosen) if at in raw[name]]
    for name in LEADING:
        if isinstance(raw.get(name), int):
            raw[name] = sum(at < raw[name] for at in chosen)
    for name in PATTERNS:
        if isinstance(raw.get(name), list):
            raw[name] = [raw[name][at % len(raw[name])] for at in chosen]
    if "attention_types" in raw:  # GPT-Neo counts kinds up: [[["global", "local"], 6]]
        raw["attention_types"] = [[[kind], 1] for kind in raw.pop("attention_layers")]
    try:
        return text_config_of(config, raw)
    except Exception as error:  # configurations check themselves, each in its own way
        said = " ".join(str(error).split())[:240]
        problem = f"{type(config).__name__} takes no {len(chosen)} of its {total} layers ({said})"
        raise UserError(key, problem, "give student.path") from error


def check_layers(config: Any, task: Task, chosen: Sequence[int], key: str) -> Any:
    """Refuse, from the configuration alone, layers that make no model; return the configuration
    that they make.

    The model is built and run on the meta device, where its architecture runs there at all.

    Raises:
        UserError: Naming what does not fit.
    """
    import torch

    with torch.device("meta"):
        source = auto_class(task).from_config(copy.deepcopy(config)).eval()
        made = _shell(source, chosen, key)
        ids = torch.zeros(1, 2, dtype=torch.long)
        if _why_not_run(source, ids) is None and (why := _why_not_run(made, ids)) is not None:
            raise UserError(
                key, f"layers {list(chosen)} make no model that runs ({why})", "give student.path"
            )
    return made.config


def _why_not_run(model: Any, ids: Tensor) -> str | None:
    """Return what a forward pass fails with; None where it works. The meta device lacks some
    architectures' kernels.
    """
    import torch

    try:
        with torch.no_grad():
            model(input_ids=ids)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        AssertionError,
    ) as error:
        return " ".join(str(error).split())[:240] or type(error).__name__
    return None


def _shell(source: PreTrainedModel, chosen: Sequence[int], key: str) -> PreTrainedModel:
    """Return the model that `chosen` make on the meta device, if it has places for just their
    weights.

    Raises:
        UserError: Naming the first weight that it has no place for, or place that it has no weight
            for.
    """
    stack = _stack(source, key)
    made, odd = _tried(source, stack, chosen, key)
    # ModernBERT's first layer lacks a norm, for one; ALBERT's layers are one, whatever its
    # configuration says
    if odd:
        problem = (
            f"{list(chosen)} put a layer where its architecture wants another kind ({min(odd)})"
        )
        raise UserError(key, problem, _remedy(source, stack, chosen, key))
    return made


def _tried(source: Any, stack: str, chosen: Sequence[int], key: str) -> tuple[Any, set[str]]:
    """Return the model that `chosen` make on the meta device, and the weights that do not fit its
    places.

    Raises:
        UserError: If its class makes none.
    """
    import torch

    config = cut_config(source.config, chosen, key)
    try:
        with torch.device("meta"):
            made = type(source)(config).eval()
            with torch.no_grad(), suppress(RuntimeError):  # of kernels that the meta device lacks
                # The initialisation that a reload of the model calls, too.
                made.apply(made._init_weights)  # pyright: ignore[reportPrivateUsage]
    # RWKV divides by the number of its layers less one; others index what is not there
    except Exception as error:
        said = " ".join(str(error).split())[:240] or type(error).__name__
        raise UserError(
            key,
            f"layers {list(chosen)} make no {type(source).__name__} ({said})",
            "give student.path, or other layers",
        ) from error
    weights, places = renamed(source.state_dict(), stack, chosen), made.state_dict()
    odd = {
        name
        for name in weights.keys() | places.keys()
        if name not in weights or name not in places or weights[name].shape != places[name].shape
    }
    return made, odd


def _remedy(source: Any, stack: str, chosen: Sequence[int], key: str) -> str:
    """Return what to give in place of layers that do not fit: those with layer 0 in front, where
    they would.
    """
    with suppress(UserError):
        if not _tried(source, stack, [0, *(at for at in chosen if at != 0)], key)[1]:
            return "give a list that keeps layer 0 first, or student.path"
    return "give student.path"


def _stack(model: PreTrainedModel, key: str) -> str:
    """Return the name of a model's one stack of layers; of a multimodal model, that of its text
    model.
    """
    total = layer_count(model.config)
    if model.config.is_encoder_decoder:
        problem = (
            f"{type(model).__name__} has an encoder and a decoder, and layers are cut from one"
            " stack"
        )
        raise UserError(key, problem, "give student.path, or student.config")
    stacks = [name for name, _ in layer_stacks(model, total)]
    if len(stacks) > 1 and model.config.get_text_config() is not model.config:
        stacks = [
            name for name in stacks if "language_model" in name or "text_model" in name
        ] or stacks
    if len(stacks) != 1:
        raise UserError(
            key,
            f"{type(model).__name__} has {how_many(len(stacks), 'stack')} of"
            f" {how_many(total, 'layer')}",
            "give student.path",
        )
    return stacks[0]


def renamed(weights: dict[str, Tensor], stack: str, chosen: Sequence[int]) -> dict[str, Tensor]:
    """Return weights under the names that they have once `chosen` layers of `stack` are all there
    are.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith(f"{stack}."):
            found[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        found |= {
            f"{stack}.{place}.{rest}": tensor
            for place, at in enumerate(chosen)
            if at == int(number)
        }
    return found


def with_layers(
    model: PreTrainedModel, chosen: Sequence[int], key: str, *, scratch: Path | None = None
) -> PreTrainedModel:
    """Return a model of the layers named by `chosen`, in order; one that is named again is a copy.

    Args:
        scratch: Where it may be saved for a moment.

    Raises:
        UserError: If they make no model.
        StageFailed: If it reloads as another model.
    """
    from transformers.initialization import no_init_weights

    from pipeline.models.classes import read_in_order

    config = _shell(model, chosen, key).config
    stack = _stack(model, key)
    with no_init_weights():
        made: Any = type(model)(config)
    weights = renamed(model.state_dict(), stack, chosen)
    made.load_state_dict(weights)
    made.tie_weights()
    _prove_same(made, weights)
    name_body(made.eval())
    keep_attention(made)
    ids = probe(made)
    if (why := _why_not_run(made, ids)) is not None:
        raise UserError(
            key, f"layers {list(chosen)} make no model that runs ({why})", "give student.path"
        )
    _prove_reload(made, ids, scratch)
    if hasattr(model, "class_order"):
        read_in_order(made, model.class_order)  # pyright: ignore[reportArgumentType]
    return made


def _prove_same(made: Any, weights: dict[str, Tensor]) -> None:
    """Compare what was made with the weights that it was to have: a tie that the source lacks would
    replace some.

    Raises:
        StageFailed: Naming a weight that is another.
    """
    for name, tensor in made.state_dict().items():
        # a NaN is for others to refuse
        same = (tensor == weights[name].to(tensor.dtype)) | (tensor != tensor)
        if not bool(same.all()):
            raise StageFailed(
                f"{type(made).__name__} of these layers has another {name} than its source"
            )


def _prove_reload(model: Any, ids: Tensor, scratch: Path | None) -> None:
    """Save a model, load it again, and compare configuration and logits.

    Raises:
        StageFailed: If they differ.
    """
    import torch

    with tempfile.TemporaryDirectory(dir=scratch, prefix="reload.") as folder, torch.no_grad():
        write_weights(model, Path(folder))
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        ours, theirs = model(input_ids=ids).logits, again(input_ids=ids).logits
    off = float((ours - theirs).abs().max())
    if off > TOLERANCE * float(ours.abs().max()):
        raise StageFailed(
            f"{type(model).__name__} of these layers reloads as another model: logits differ by"
            f" {off:.2g}"
        )
    if _plain(model.config) != _plain(again.config):
        raise StageFailed(
            f"{type(model).__name__} of these layers reloads with another configuration"
        )


def _plain(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in TRANSIENT}
