"""Loading, making and saving models in Hugging Face layout: safetensors only, no remote code."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.model import TinyShape
from pipeline.errors import UserError
from pipeline.models.adapters import CONFIG as ADAPTER
from pipeline.models.adapters import PICKLED as PICKLED_ADAPTER
from pipeline.models.adapters import WEIGHTS as ADAPTER_WEIGHTS
from pipeline.models.adapters import base_of, is_adapter, merge, shapes_in, without_adapter
from pipeline.models.classes import match_classes, read_in_order, refuse_other_problem
from pipeline.models.ties import differs_in_ties, part_ties
from pipeline.models.weights import (
    head_parameters,
    keep_attention,
    name_body,
    refuse_incomplete,
    refuse_unexpected,
    renew_head,
    share_as_written,
)
from pipeline.store.file_names import PICKLE_WEIGHTS
from pipeline.store.hub import offline_without_network
from pipeline.store.waiting import waiting_for
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_model_folder(path: Path, key: str) -> None:
    """Refuse a folder that cannot be a model, before anything is loaded.

    Raises:
        UserError: Without config.json, without weights, with pickle weights only, or asking for
            remote code.
    """
    if not path.is_dir():
        raise UserError(
            key, f"{path} is not a folder", "give a Hugging Face model folder or a Hub name"
        )
    if (
        (path / ADAPTER).is_file()
        and not (path / ADAPTER_WEIGHTS).is_file()
        and (path / PICKLED_ADAPTER).exists()
    ):
        problem = f"{path} holds pickled adapter weights ({PICKLED_ADAPTER}), which can run code"
        raise UserError(
            key,
            problem,
            "convert them to safetensors, or take the adapter's files out of the folder",
        )
    config_file = path / "config.json"
    if not config_file.is_file():
        if (path / ADAPTER).is_file():
            base_of(path, key)
            raise UserError(
                key,
                f"{path} is an adapter, no whole model",
                "merge it into its base (merge_and_unload)",
            )
        raise UserError(key, f"{path} has no config.json", "give a folder in Hugging Face layout")
    try:
        config: Any = json.loads(config_file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            key, f"{config_file} is not valid JSON ({error})", "restore the file"
        ) from None
    if not isinstance(config, dict):
        raise UserError(key, f"{config_file} is not an object", "restore the file")
    if "auto_map" in config and not _is_known(config.get("model_type")):
        raise UserError(
            key,
            f"{path} wants to run code of its own (auto_map)",
            "use a model that transformers has",
        )
    if any(file.name != ADAPTER_WEIGHTS for file in path.glob("*.safetensors")):
        return
    pickled = next((name for name in PICKLE_WEIGHTS if (path / name).exists()), None)
    if pickled is not None:
        raise UserError(
            key,
            f"{path} holds pickled weights ({pickled}), which can run code",
            "convert to safetensors",
        )
    raise UserError(
        key, f"{path} has no weights (*.safetensors)", "give a folder with safetensors weights"
    )


def _is_known(model_type: Any) -> bool:
    """Whether transformers has this architecture itself: what a folder says of its own code is then
    not needed.
    """
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _is_local(path: str | Path) -> bool:
    text = str(path)
    return Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") > 1


def check_local(path: str, key: str) -> None:
    """Refuse a local model folder that cannot be loaded; a Hub name passes (it is checked when it
    is loaded).

    Raises:
        UserError: As `check_model_folder`, of an adapter's base too.
    """
    if _is_local(path):
        folder = Path(path).expanduser()
        check_model_folder(base_of(folder, key) if is_adapter(folder) else folder, key)


def resolve(path: str | Path, key: str) -> str:
    """Return what `from_pretrained` takes for a checked local folder or a Hub name."""
    check_local(str(path), key)
    if _is_local(path):
        return str(Path(path).expanduser())
    offline_without_network()
    return str(path)


def _whole(path: str | Path, key: str) -> str:
    """Return the same, of an adapter the model that it adapts."""
    source = resolve(path, key)
    return str(base_of(Path(source), key)) if is_adapter(source) else source


COUNTED_FROM_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Architectures whose first position is that after their padding token's number: RoBERTa's 514 take
512 tokens.
"""


def embedding_of(model: Any) -> Any | None:
    """Return the embedding of a model's tokens; None where it has no such module, as CANINE, which
    reads letters.
    """
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def positions(config: Any) -> int | None:
    """Return how many tokens of one sequence a model can tell apart, or None where its positions
    know no end.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and getattr(text, "model_type", None) in COUNTED_FROM_PADDING:
        limit -= 1 + (text.pad_token_id or 0)
    return limit if isinstance(limit, int) and limit > 0 else None


def example_length(config: Any, task: Task, length: int) -> int:
    """Return the tokens that an example of classification is cut to: `length`, or what the model
    has positions for.
    """
    limit = positions(config) if task.kind.labelled else None
    return length if limit is None else min(length, limit)


def ends_once(config: Any, task: Task) -> int | None:
    """Return the end token that a classifier wants once in every text, at its end; None where it
    wants none.

    Encoder-decoders (BART, T5) classify by what their decoder says at that token.
    """
    if not task.kind.labelled or not getattr(config, "is_encoder_decoder", False):
        return None
    token = getattr(config.get_text_config(), "eos_token_id", None)
    return token[0] if isinstance(token, list) else token


def text_config_of(config: Any, raw: dict[str, Any]) -> Any:
    """Return a copy of `config` whose text part, which may be all of it, is made from `raw`."""
    import copy

    text = config.get_text_config()
    made = type(text).from_dict(raw)
    if text is config:
        return made
    whole = copy.deepcopy(config)
    name = next(name for name in config.sub_configs if getattr(config, name) is text)
    setattr(whole, name, made)
    return whole


def check_tokens(largest: int, size: int, key: str = "model.path") -> None:
    """Refuse a token that a model of `size` embeddings cannot read.

    Raises:
        UserError: Naming the token.
    """
    if largest >= size:
        problem = (
            f"the tokenizer gives token {largest} but the model's embedding ends at {size - 1}"
        )
        raise UserError(key, problem, "use a model and the tokenizer that it was trained with")


def auto_class(task: Task) -> Any:
    """Return the class of transformers that loads models for a task."""
    import transformers

    return getattr(transformers, task.kind.auto_class)


def load_config(
    path: str | Path, *, revision: str | None = None, key: str = "model.path"
) -> PreTrainedConfig:
    """Load a model's configuration, without what would run code or needs a kernel that is not here.

    Raises:
        UserError: If the folder or Hub name cannot give one.
    """
    from transformers import AutoConfig

    source = _whole(path, key)
    with reading(key, path):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        # transformers has the class itself, else it would have refused
        vars(config).pop("auto_map", None)
        if missing_kernel(config) is not None:
            # None has transformers choose: sdpa, else eager.
            config._attn_implementation = None  # pyright: ignore[reportPrivateUsage]
    return config


def load_config_of_weights(path: str | Path, task: Task, *, key: str) -> PreTrainedConfig:
    """Load a folder's configuration, as `load_config` does, that ties only what its weights have
    alike.

    What is planned from a configuration alone would else be a plan of another model than the one
    that is loaded.
    """
    import copy

    import torch

    config = load_config(path, key=key)
    folder = Path(_whole(path, key))
    if (
        not getattr(config, "tie_word_embeddings", False)
        or quantized_by(config) is not None
        or not folder.is_dir()
    ):
        return config
    if is_taken_in_part(config, task):  # its language part ties as it says
        return config
    with reading(key, path), torch.device("meta"):
        twin = auto_class(task).from_config(copy.deepcopy(config))
    with reading(key, path):
        if differs_in_ties(folder, twin.get_expanded_tied_weights_keys(all_submodels=True)):
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def missing_kernel(config: Any) -> str | None:
    """Return the attention kernel that a configuration asks for and this machine lacks; None where
    there is none.
    """
    from transformers.utils.import_utils import (
        is_flash_attn_2_available,
        is_flash_attn_3_available,
        is_torch_flex_attn_available,
    )

    wanted: Any = config._attn_implementation
    there = {
        "eager": True,
        "sdpa": True,
        "flash_attention_2": is_flash_attn_2_available(),
        "flash_attention_3": is_flash_attn_3_available(),
        "flex_attention": is_torch_flex_attn_available(),
    }
    return None if wanted is None or there.get(str(wanted), False) else str(wanted)


def quantized_by(config: PreTrainedConfig) -> str | None:
    """Return the library or method that a model's weights are quantized with; None where they are
    not.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method))


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, key: str = "model.path"
) -> Any:
    """Load the tokenizer that lies beside a model, with a padding token; an adapter may have its
    base's.

    Raises:
        UserError: If there is none.
    """
    from transformers import AutoTokenizer

    source = resolve(path, key)
    if is_adapter(source) and not (Path(source) / "tokenizer_config.json").is_file():
        source = _whole(path, key)
    with reading(key, path, what="its tokenizer"), without_adapter(Path(source)) as files:
        tokenizer = AutoTokenizer.from_pretrained(
            files if _is_local(source) else source, revision=revision, trust_remote_code=False
        )
        tokenizer.init_kwargs.pop("auto_map", None)  # an artifact that names code it does not hold
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        lacks = tokenizer.pad_token_id is None
    if lacks:
        raise UserError(
            key,
            f"the tokenizer of {path} has neither padding nor end token",
            "add a pad_token to it",
        )
    return tokenizer


def load_model(
    path: str | Path,
    task: Task,
    *,
    device: torch.device | str = "cpu",
    labels: tuple[str, ...] | None = None,
    revision: str | None = None,
    key: str = "model.path",
    new_head: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a model in evaluation mode on `device`, in the dtype it is stored in when quantized,
    else fp32.

    A classifier pads with its tokenizer's token: some find the last token of a text by it. With
    `labels` its logits come in their order (`models/classes.py`). An adapter is merged into its
    base.

    Args:
        labels: The data's class names.
        new_head: Whether a head of other classes may be made anew (random), because it is trained
            afterwards.
        dtype: Of an unquantized model, in place of fp32; what the model keeps in fp32 whatever its
            dtype stays so.

    Raises:
        UserError: If it cannot be loaded safely and whole, or does not fit the task.
    """
    return _load(
        path,
        task,
        device=device,
        labels=labels,
        revision=revision,
        key=key,
        new_head=new_head,
        dtype=dtype,
    )[0]


def _load(
    path: str | Path,
    task: Task,
    *,
    device: torch.device | str,
    labels: tuple[str, ...] | None,
    revision: str | None,
    key: str,
    new_head: bool,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Return what `load_model` does, and what a reader must know of it."""
    import torch
    import transformers

    config = load_config(path, revision=revision, key=key)
    adapter, classes = _adapter(path), None
    brought = {} if adapter is None else _shapes_of_adapter(adapter, key)
    if task.kind.labelled and not task.kind.has_classes:
        task.kind.configure(config, labels or ())
    elif task.kind.labelled:
        _count_as_adapter(config, task, brought, key, path)
        refuse_other_problem(config, key, path)
        if labels is not None:
            classes = match_classes(config, labels, new_head=new_head, key=key, path=path)
            task.kind.configure(config, classes.names)
    in_part = is_taken_in_part(config, task)
    if not in_part:
        _refuse_other_kind(config, task, key, path)
    quantized = quantized_by(config) is not None
    # refused by name below, where it matters
    more: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if quantized or str(device) == "meta":
        more["device_map"] = {"": str(device)}
    if not quantized:
        more["dtype"] = dtype or torch.float32
    source = _whole(path, key)
    with reading(key, path), without_adapter(Path(source)) as files:
        kind: Any = transformers.AutoModelForImageTextToText if in_part else auto_class(task)
        model, info = kind.from_pretrained(
            files if _is_local(source) else source,
            config=config,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **more,
        )
    name_body(model)
    keep_attention(model)
    part_ties(model)
    fresh = refuse_incomplete(model, info, task, key, path, new_head=new_head, brought=brought)
    notes = [
        _beside(path, key),
        (
            None
            if quantized
            else refuse_unexpected(model, config, info["unexpected_keys"], task, key, path)
        ),
    ]
    if in_part:
        model = _language_part(model, key, path)
        notes.append(
            f"{key}: of {path} the language part is taken ({model.config.model_type}), without what"
            " reads images"
        )
    if classes is not None:
        notes.append(
            f"{key}: {fresh} of {path} is new and random"
            if fresh and not classes.is_new
            else classes.note
        )
    if task.kind.is_language:
        _refuse_bidirectional(model.config, key, path)
    else:
        model.config.get_text_config().pad_token_id = load_tokenizer(
            path, revision=revision, key=key
        ).pad_token_id
    if adapter is not None:
        is_new = classes is not None and classes.is_new
        model = merge(model, adapter, key, renewed=head_parameters(model) if is_new else ())
    if classes is not None:  # after an adapter has brought its head
        if classes.is_new and str(device) != "meta":
            renew_head(model)
        read_in_order(model, classes.order)
    if not quantized:
        model.to(device)
    if quantized_by(config) == "torchao":
        from pipeline.models.torchao_experts import leave_inference_mode

        leave_inference_mode(model)
    return model.eval(), [note for note in notes if note is not None]


def _adapter(path: str | Path) -> Path | None:
    """Return the folder of an adapter; None where `path` is none."""
    return Path(_local(path)) if is_adapter(_local(path)) else None


def _shapes_of_adapter(adapter: Path, key: str) -> dict[str, tuple[int, ...]]:
    with reading(key, adapter, what="the adapter"):
        return shapes_in(adapter)


def _count_as_adapter(
    config: Any, task: Task, brought: dict[str, tuple[int, ...]], key: str, path: str | Path
) -> None:
    """Have a configuration count the classes of the head that an adapter brings: its base may have
    none, or another.
    """
    import copy

    import torch

    if not brought:
        return
    with reading(key, path), torch.device("meta"):
        twin = auto_class(task).from_config(copy.deepcopy(config))
    counts = {brought[name][0] for name in head_parameters(twin) if name in brought}
    if len(counts) == 1 and counts != {config.num_labels}:
        config.num_labels = counts.pop()


def _beside(path: str | Path, key: str) -> str | None:
    """Return what is to be said of an adapter's files beside whole weights; None where there are
    none.
    """
    folder = Path(_local(path))
    if not (folder / ADAPTER).is_file() or not (folder / "config.json").is_file():
        return None
    if is_adapter(folder):
        return f"{key}: the adapter in {path} is merged into the weights that lie beside it"
    return (
        f"{key}: {path} holds {ADAPTER} without an adapter's weights: its own weights are taken as"
        " they are"
    )


def is_taken_in_part(config: Any, task: Task) -> bool:
    """Whether a model is multimodal and its language part alone is a model for the task (LLaVA,
    Mistral 3).
    """
    import transformers

    text, causal = config.get_text_config(), auto_class(task)._model_mapping
    whole: Any = transformers.AutoModelForImageTextToText
    in_part = (
        type(config) not in causal and type(text) in causal and type(config) in whole._model_mapping
    )
    return task.kind.is_language and in_part


def language_config(config: Any, task: Task) -> Any:
    """Return the configuration of what `load_model` makes: of a multimodal model, its language
    part's.
    """
    return _text_part(config) if is_taken_in_part(config, task) else config


def _text_part(whole: Any) -> Any:
    import copy

    config = copy.deepcopy(whole.get_text_config())
    config.tie_word_embeddings = whole.tie_word_embeddings
    return config


def _language_part(whole: Any, key: str, path: str | Path) -> Any:
    """Return the language model that a multimodal model holds.

    Raises:
        UserError: If its language part is not what its text configuration says.
    """
    import torch
    from transformers.initialization import no_init_weights

    config = _text_part(whole.config)
    head, decoder = whole.get_output_embeddings(), whole.get_decoder()
    with torch.device(head.weight.device), no_init_weights():
        model: Any = auto_class(Task.causal_lm).from_config(config, dtype=head.weight.dtype)
    try:
        if str(head.weight.device) != "meta":
            model.base_model.load_state_dict(decoder.state_dict())
            model.get_output_embeddings().load_state_dict(head.state_dict())
    except RuntimeError as error:
        text = " ".join(str(error).split())[:240]
        raise UserError(
            key,
            f"the language part of {path} is not what its text_config says ({text})",
            "save it as a model of its own, and give that",
        ) from error
    model.tie_weights()
    return model


def _local(path: str | Path) -> str:
    return str(Path(path).expanduser()) if _is_local(path) else str(path)


def check_loads(
    path: str | Path,
    task: Task,
    *,
    labels: tuple[str, ...] | None,
    key: str,
    new_head: bool = False,
) -> list[str]:
    """Refuse a local folder whose weights cannot be loaded whole, as `load_model` would; on the
    meta device.

    A Hub name passes, and so do quantized weights: both are looked at when they are loaded.

    Returns:
        What a reader must know of it.
    """
    if not _is_local(path):
        return []
    wanted = _wanted_kernel(Path(_whole(path, key)), key)
    notes = (
        []
        if wanted is None
        else [f"{key}: {path} asks for {wanted}, which is not here: sdpa or eager attention"]
    )
    if quantized_by(load_config(path, key=key)) is not None:
        return notes
    return (
        notes
        + _load(
            path, task, device="meta", labels=labels, revision=None, key=key, new_head=new_head
        )[1]
    )


def _wanted_kernel(folder: Path, key: str) -> str | None:
    """Return the attention kernel that a folder's configuration asks for and this machine lacks."""
    from transformers import AutoConfig

    with reading(key, folder):
        return missing_kernel(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def import_model(path: str | Path, task: Task) -> None:
    """Import what loading the model in `path` takes: half a second, which no stage is to be charged
    with.
    """
    import torch

    config = load_config(path)
    with torch.device("meta"), suppress(Exception):  # loading it will say what is wrong
        auto_class(task).from_config(config)


@contextmanager
def reading(key: str, path: str | Path, *, what: str = "") -> Generator[None]:
    """Turn what libraries raise for files that are damaged, inconsistent, absent or not their own
    into one line.

    What the Hub is asked for says so where it takes long.

    Raises:
        UserError: Naming the folder, and `what` of it.
    """
    hub = nullcontext() if _is_local(path) else waiting_for(f"the Hugging Face Hub to give {path}")
    try:
        with hub:
            yield
    except UserError:
        raise
    except Exception as error:  # transformers raises some twenty kinds, tokenizers a bare Exception
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise _unloadable(key, path, error, what=what) from error


def _unloadable(key: str, path: str | Path, error: Exception, *, what: str = "") -> UserError:
    text = " ".join(str(error).strip().split("\n")[:2])[:240] or type(error).__name__
    if not isinstance(error, OSError | ValueError):  # 'layer_types' alone says little
        text = f"{type(error).__name__}: {text}"
    if "trust_remote_code" in str(error):
        return UserError(
            key, f"{path} wants to run code of its own", "use a model that transformers has"
        )
    if not _is_local(path):
        return not_on_hub(key, path, text)
    if isinstance(error, ImportError):
        return UserError(
            key,
            f"{what or 'the model'} in {path} needs a package that is not here ({text})",
            "install it, or give a model that needs none",
        )
    remedy = (
        "put its tokenizer files beside the weights"
        if what
        else "restore its files, or give another model"
    )
    return UserError(key, f"{what or 'the model'} in {path} cannot be loaded ({text})", remedy)


def not_on_hub(key: str, path: str | Path, text: str) -> UserError:
    """Return the refusal of a name that is no folder here and could not be had from the Hub."""
    why = offline_without_network()
    if why is not None:
        problem = (
            f"there is no folder {path} here, nor a model of that name in the cache, and {why}"
        )
        return UserError(key, problem, "check the name and the network, or give a folder")
    return UserError(
        key,
        f"there is no folder {path} here, and the Hub did not give a model of that name ({text})",
        "check the name, or the network",
    )


def _refuse_other_kind(config: Any, task: Task, key: str, path: str | Path) -> None:
    """Refuse an architecture of which transformers has no class for the task."""
    if type(config) not in auto_class(task)._model_mapping:
        if config.get_text_config() is not config:
            problem = (
                f"{path} reads more than text ({config.model_type}), and transformers has no model"
                " of its text part"
            )
            raise UserError(key, problem, f"give a model of text alone for task={task.value}")
        needs = task.kind.word if task.kind.is_language else f"text {task.kind.word}"
        problem = (
            f"the model in {path} cannot be loaded: transformers has no {needs} of type"
            f" {config.model_type}"
        )
        raise UserError(key, problem, f"give a model for task={task.value}")


def _refuse_bidirectional(config: Any, key: str, path: str | Path) -> None:
    """Refuse an encoder as language model: it reads the token that it is to predict."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_encoder = (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and getattr(config, "is_decoder", None) is False
    )
    # XLM and Flaubert
    reads_on = config.model_type == "xlnet" or getattr(config, "causal", None) is False
    if is_encoder or reads_on:
        problem = (
            f"{path} is an encoder ({config.model_type}), which sees the tokens that it is to"
            " predict"
        )
        raise UserError(key, problem, "give a causal model, or task=sequence_classification")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer into `folder`, readable by whoever may read
    the folder.
    """
    part_ties(model)
    write_weights(model, folder)
    tokenizer.save_pretrained(folder)
    share_as_written(folder)


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and config, whichever rank this process is: transformers leaves that to the
    first one, which need not be the one that has this model.
    """
    model.__dict__["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        model.save_pretrained(folder)
    finally:
        del model.__dict__["should_save_on_this_rank"]


def make_tiny(
    shape: TinyShape,
    vocabulary_size: int,
    task: Task,
    labels: tuple[str, ...] | None,
    tokenizer: Any,
) -> Any:
    """Make the embedded Llama-architecture model with random weights (seed torch first).

    Raises:
        UserError: If a width is not a multiple of 64 or the heads do not divide it.
    """
    from transformers import LlamaConfig

    for name, width in (
        ("hidden_size", shape.hidden_size),
        ("intermediate_size", shape.intermediate_size),
    ):
        if width % 64:
            raise UserError(
                f"model.shape.{name}",
                f"{width} is not a multiple of 64",
                "quantized kernels need that",
            )
    if shape.hidden_size % shape.heads or (shape.hidden_size // shape.heads) % 2:
        raise UserError(
            "model.shape.heads",
            f"{shape.heads} heads do not cut {shape.hidden_size} into even parts",
            "change one",
        )
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=shape.hidden_size**-0.5,  # the usual 0.02 is that of widths near 2,500
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return from_config(config, task, labels)


def from_config(config: PreTrainedConfig, task: Task, labels: tuple[str, ...] | None) -> Any:
    """Make a model with random weights from a configuration."""
    if labels is not None and task.kind.labelled:
        task.kind.configure(config, labels)
    model = auto_class(task).from_config(config).float().eval()
    name_body(model)
    keep_attention(model)
    return model
