"""Loading, making and saving models in Hugging Face layout: safetensors only, no remote code."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Task, TinyShape
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PICKLE_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth")


def check_model_folder(path: Path, key: str) -> None:
    """Refuse a folder that cannot be a model, before anything is loaded.

    Raises:
        UserError: Without config.json, without weights, with pickle weights only, or asking for remote code.
    """
    if not path.is_dir():
        raise UserError(key, f"{path} is not a folder", "give a Hugging Face model folder or a Hub name")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise UserError(key, f"{path} has no config.json", "give a folder in Hugging Face layout")
    try:
        config: Any = json.loads(config_file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(key, f"{config_file} is not valid JSON ({error})", "restore the file") from None
    if not isinstance(config, dict):
        raise UserError(key, f"{config_file} is not an object", "restore the file")
    if "auto_map" in config:
        raise UserError(key, f"{path} wants to run code of its own (auto_map)", "use a model that transformers has")
    if any(path.glob("*.safetensors")):
        return
    pickled = next((name for name in PICKLE_WEIGHTS if (path / name).exists()), None)
    if pickled is not None:
        raise UserError(key, f"{path} holds pickled weights ({pickled}), which can run code", "convert to safetensors")
    raise UserError(key, f"{path} has no weights (*.safetensors)", "give a folder with safetensors weights")


def _is_local(path: str | Path) -> bool:
    text = str(path)
    return Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") > 1


def check_local(path: str, key: str) -> None:
    """Refuse a local model folder that cannot be loaded; a Hub name passes (it is checked when it is loaded).

    Raises:
        UserError: As `check_model_folder`.
    """
    if _is_local(path):
        check_model_folder(Path(path).expanduser(), key)


def resolve(path: str | Path, key: str) -> str:
    """Return what `from_pretrained` takes for a checked local folder or a Hub name."""
    check_local(str(path), key)
    return str(Path(path).expanduser()) if _is_local(path) else str(path)


def positions(config: Any) -> int | None:
    """Return how many tokens of one sequence a model can tell apart, or None where its positions know no end."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_tokens(largest: int, size: int, key: str = "model.path") -> None:
    """Refuse a token that a model of `size` embeddings cannot read.

    Raises:
        UserError: Naming the token.
    """
    if largest >= size:
        problem = f"the tokenizer gives token {largest} but the model's embedding ends at {size - 1}"
        raise UserError(key, problem, "use a model and the tokenizer that it was trained with")


def auto_class(task: Task) -> Any:
    """Return the class of transformers that loads models for a task."""
    import transformers

    return {
        Task.causal_lm: transformers.AutoModelForCausalLM,
        Task.sequence_classification: transformers.AutoModelForSequenceClassification,
    }[task]


def load_config(path: str | Path, *, revision: str | None = None, key: str = "model.path") -> PreTrainedConfig:
    """Load a model's configuration.

    Raises:
        UserError: If the folder or Hub name cannot give one.
    """
    from transformers import AutoConfig

    source = resolve(path, key)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except load_errors() as error:
        raise _unloadable(key, path, error) from error


def quantized_by(config: PreTrainedConfig) -> str | None:
    """Return the library or method that a model's weights are quantized with; None where they are not."""
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method))


def load_tokenizer(path: str | Path, *, revision: str | None = None, key: str = "model.path") -> Any:
    """Load the tokenizer that lies beside a model, with a padding token.

    Raises:
        UserError: If there is none.
    """
    from transformers import AutoTokenizer

    source = resolve(path, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except load_errors() as error:
        raise _unloadable(key, path, error, what="its tokenizer") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(key, f"the tokenizer of {path} has neither padding nor end token", "add a pad_token to it")
    return tokenizer


def load_model(
    path: str | Path,
    task: Task,
    *,
    device: torch.device | str = "cpu",
    labels: tuple[str, ...] | None = None,
    revision: str | None = None,
    key: str = "model.path",
    new_head: bool = True,
) -> PreTrainedModel:
    """Load a model in evaluation mode on `device`, in the dtype it is stored in when quantized, else fp32.

    A classifier pads with its tokenizer's token: some find the last token of a text by it.

    Args:
        labels: Class names; a classification head of another size is made anew (random), as fine-tuning wants.
        new_head: Whether it may be: what is not trained afterwards must have its own.

    Raises:
        UserError: If it cannot be loaded safely and whole, or does not fit the task.
    """
    import torch

    config = load_config(path, revision=revision, key=key)
    more: dict[str, Any] = {"ignore_mismatched_sizes": True}  # refused by name below, where it matters
    if task is Task.sequence_classification and labels is not None:
        _refuse_other_order(config, labels, key, path)
        more["id2label"] = dict(enumerate(labels))
        more["label2id"] = {name: index for index, name in enumerate(labels)}
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized or str(device) == "meta":
        more["device_map"] = {"": str(device)}
    if not quantized:
        more["dtype"] = torch.float32
    source = resolve(path, key)
    try:
        model, info = auto_class(task).from_pretrained(
            source, revision=revision, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **more
        )
    except load_errors() as error:
        raise _unloadable(key, path, error) from error
    _refuse_incomplete(model, info, task, key, path, new_head=new_head)
    if task is Task.causal_lm:
        _refuse_bidirectional(model.config, key, path)
    else:
        model.config.get_text_config().pad_token_id = load_tokenizer(path, revision=revision, key=key).pad_token_id
    if not quantized:
        model.to(device)
    return model.eval()


def check_loads(
    path: str | Path, task: Task, *, labels: tuple[str, ...] | None, key: str, new_head: bool = True
) -> None:
    """Refuse a local folder whose weights cannot be loaded whole, as `load_model` would; on the meta device.

    A Hub name passes, and so do quantized weights: both are looked at when they are loaded.
    """
    if _is_local(path) and quantized_by(load_config(path, key=key)) is None:
        load_model(path, task, device="meta", labels=labels, key=key, new_head=new_head)


def import_model(path: str | Path, task: Task) -> None:
    """Import what loading the model in `path` takes: half a second, which no stage is to be charged with."""
    import torch

    config = load_config(path)
    with torch.device("meta"), suppress(*load_errors()):  # loading it will say what is wrong
        auto_class(task).from_config(config)


def load_errors() -> tuple[type[Exception], ...]:
    """Return what transformers raises for files that are damaged, inconsistent, absent or not its own."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError)


def _unloadable(key: str, path: str | Path, error: Exception, *, what: str = "") -> UserError:
    text = " ".join(str(error).strip().split("\n")[:2])[:240] or type(error).__name__
    if "trust_remote_code" in str(error):
        return UserError(key, f"{path} wants to run code of its own", "use a model that transformers has")
    if not _is_local(path):
        return not_on_hub(key, path, text)
    remedy = "put its tokenizer files beside the weights" if what else "give a Hugging Face model folder or a Hub name"
    return UserError(key, f"{what or 'the model'} in {path} cannot be loaded ({text})", remedy)


def not_on_hub(key: str, path: str | Path, text: str) -> UserError:
    """Return the refusal of a name that is no folder here and could not be had from the Hub."""
    return UserError(
        key, f"there is no folder {path} here, and the Hub did not give a model of that name ({text})",
        "check the name, or the network",
    )  # fmt: skip


def _refuse_other_order(config: Any, labels: tuple[str, ...], key: str, path: str | Path) -> None:
    """Refuse a classifier that has the data's classes under other numbers: its answers would be read as others."""
    theirs = [str(config.id2label[index]) for index in sorted(config.id2label)]
    folded, ours = [name.casefold() for name in theirs], [name.casefold() for name in labels]
    if folded != ours and sorted(folded) == sorted(ours):
        raise UserError(
            key, f"{path} numbers its classes {', '.join(theirs)}, the data {', '.join(labels)}",
            f"write the labels as numbers, 0 for {theirs[0]}, 1 for {theirs[1]}, ...",
        )  # fmt: skip


def _refuse_incomplete(
    model: Any, info: dict[str, Any], task: Task, key: str, path: str | Path, *, new_head: bool
) -> None:
    """Refuse weights that transformers would replace by random ones; a classifier's head and pooler may be new."""
    gone = {str(name) for name in info["missing_keys"]} | {str(entry[0]) for entry in info["mismatched_keys"]}
    body = f"{model.base_model_prefix}."
    lacking = {name for name in gone if name.startswith(body) and "pooler" not in name}
    lacking = lacking if task is Task.sequence_classification else gone
    if lacking:
        first = min(lacking)
        problem = f"the weights in {path} lack {first} in its right shape ({len(lacking)} of the model's are not there)"
        raise UserError(key, problem, "give a whole model, of a class that fits the task")
    if gone and not new_head:
        problem = f"{path} has no classification head for these classes, and 0 steps would leave it random"
        raise UserError(key, problem, "give a fine-tuned classifier, or train it: steps above 0")


def _refuse_bidirectional(config: Any, key: str, path: str | Path) -> None:
    """Refuse an encoder as language model: it reads the token that it is to predict."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False:
        problem = f"{path} is an encoder ({config.model_type}), which sees the tokens that it is to predict"
        raise UserError(key, problem, "give a causal model, or task=sequence_classification")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer into `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny(
    shape: TinyShape, vocabulary_size: int, task: Task, labels: tuple[str, ...] | None, tokenizer: Any
) -> Any:
    """Make the embedded Llama-architecture model with random weights (seed torch first).

    Raises:
        UserError: If a width is not a multiple of 64 or the heads do not divide it.
    """
    from transformers import LlamaConfig

    for name, width in (("hidden_size", shape.hidden_size), ("intermediate_size", shape.intermediate_size)):
        if width % 64:
            raise UserError(f"model.shape.{name}", f"{width} is not a multiple of 64", "quantized kernels need that")
    if shape.hidden_size % shape.heads or (shape.hidden_size // shape.heads) % 2:
        raise UserError(
            "model.shape.heads", f"{shape.heads} heads do not cut {shape.hidden_size} into even parts", "change one"
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
    if labels is not None and task is Task.sequence_classification:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
    return auto_class(task).from_config(config).float().eval()
