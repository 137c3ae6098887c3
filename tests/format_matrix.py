"""What each format does to each architecture: the function behind a cell of the table of what is
supported.

`cell(architecture, fmt, folder)` quantizes a tiny model of an architecture and loads it again in
this process, as what assesses and serves it does. It returns a `Cell`: the share of the parameters
that is in the format, or the reason for a no, which is what a run prints. The widths are multiples
of 64, so that no kernel's shape decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from make_assess_models import LABELS, byte_tokenizer

import pipeline.quantization.backend as backend
from pipeline.config.settings.quantization import Format
from pipeline.errors import UserError
from pipeline.models.load import load_model, save_model
from pipeline.models.sixteen_bits import stored_dtype
from pipeline.quantization.fresh_process import align, forward_digests
from pipeline.quantization.reload_check import Reference, auto_class
from pipeline.tasks.table import Task

CPU = torch.device("cpu")
KEY = "stages.small.format"
WIDE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2}
CLASSES = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {name: n for n, name in enumerate(LABELS)},
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A tiny model: its configuration's class in transformers, its settings, and what it is for."""

    config: str
    settings: dict[str, Any]
    task: Task = Task.causal_lm

    def make(self) -> Any:
        """Return a model with random weights, the same at every call."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        return auto_class(self.task).from_config(config).float().eval()


def _language(config: str, **more: Any) -> Architecture:
    return Architecture(config, WIDE | more)


def _classes(config: str, **more: Any) -> Architecture:
    return Architecture(config, WIDE | CLASSES | more, Task.sequence_classification)


GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": 259,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "vocab_size": 259,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
ARCHITECTURES: dict[str, Architecture] = {
    "Llama": _language("LlamaConfig", **HEADS),
    "Mistral": _language("MistralConfig", **HEADS),
    "Qwen2": _language("Qwen2Config", num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen3": _language("Qwen3Config", **HEADS),
    "Gemma2": _language("Gemma2Config", **HEADS),
    "Gemma3": _language("Gemma3TextConfig", **HEADS, final_logit_softcapping=20.0),
    "Cohere": _language("CohereConfig", num_key_value_heads=2, logit_scale=0.25),
    "Granite": _language("GraniteConfig", num_key_value_heads=2, logits_scaling=4.0),
    "SmolLM3": _language("SmolLM3Config", num_key_value_heads=2, no_rope_layers=[1, 0]),
    "Phi": _language("PhiConfig"),
    "Phi-3": _language("Phi3Config", num_key_value_heads=2),
    "GPT-2": Architecture("GPT2Config", GPT2),
    "GPT-Neo": _language(
        "GPTNeoConfig",
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "GPT-NeoX": _language("GPTNeoXConfig"),
    "OPT": _language("OPTConfig", ffn_dim=128, word_embed_proj_dim=64),
    "Falcon": _language("FalconConfig", new_decoder_architecture=False, multi_query=True),
    "Mamba": Architecture(
        "MambaConfig",
        {
            "vocab_size": 259,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "pad_token_id": 0,
        },
    ),
    "Qwen3-MoE": _language(
        "Qwen3MoeConfig", **HEADS, **EXPERTS, num_experts=4, moe_intermediate_size=64
    ),
    "Mixtral": _language("MixtralConfig", **HEADS, **EXPERTS, num_local_experts=4),
    "OLMoE": _language("OlmoeConfig", num_key_value_heads=2, **EXPERTS, num_experts=4),
    "DeepSeek-V3": _language(
        "DeepseekV3Config",
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=64,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        first_k_dense_replace=1,
        n_shared_experts=1,
    ),
    "GPT-OSS": _language(
        "GptOssConfig",
        **HEADS,
        **EXPERTS,
        num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "BERT": _classes("BertConfig"),
    "RoBERTa": _classes("RobertaConfig", max_position_embeddings=66),
    "DistilBERT": Architecture(
        "DistilBertConfig",
        {
            "vocab_size": 259,
            "dim": 64,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 128,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            **CLASSES,
        },
        Task.sequence_classification,
    ),
    "ELECTRA": _classes("ElectraConfig", embedding_size=64),
    "DeBERTa-v2": _classes("DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "ModernBERT": _classes("ModernBertConfig", cls_token_id=1, sep_token_id=2),
    "XLNet": Architecture(
        "XLNetConfig",
        {
            "vocab_size": 259,
            "d_model": 64,
            "n_layer": 2,
            "n_head": 2,
            "d_inner": 128,
            "pad_token_id": 0,
            **CLASSES,
        },
        Task.sequence_classification,
    ),
    "BART": Architecture("BartConfig", BART | CLASSES, Task.sequence_classification),
    "T5": Architecture(
        "T5Config",
        {
            "vocab_size": 259,
            "d_model": 64,
            "d_kv": 32,
            "d_ff": 128,
            "num_layers": 1,
            "num_decoder_layers": 1,
            "num_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
            **CLASSES,
        },
        Task.sequence_classification,
    ),
    "Llama classifier": _classes("LlamaConfig", **HEADS),
}
"""By name as the table has it."""
FORMATS = [fmt for fmt in backend.formats() if backend.why_not(fmt, CPU) is None]
"""Those that this machine can take."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a format does to an architecture.

    Attributes:
        share: Of the parameters that are in the format; None where it is refused.
        why: The reason for that, as a run prints it.
    """

    share: float | None
    why: str = ""

    def __str__(self) -> str:
        return (
            f"no: {self.why}"
            if self.share is None
            else "yes"
            if self.share > 0.9
            else f"yes, {self.share:.0%}"
        )


def cell(
    name: str,
    fmt: Format,
    folder: Path,
    reload: Callable[[Path, Any, Reference], None] | None = None,
) -> Cell:
    """Quantize a tiny model of an architecture, load it again, and compare to the bit.

    Args:
        name: In `ARCHITECTURES`.
        folder: To write to; the source is made in it once.
        reload: In place of loading it in this process.

    Raises:
        AssertionError: If what was loaded answers otherwise than what was saved.
    """
    architecture, source = ARCHITECTURES[name], folder / "source"
    if not source.exists():
        save_model(architecture.make(), byte_tokenizer(), source)
    proven: list[Reference] = []
    check = backend.check_bit_equal
    backend.check_bit_equal = lambda out, task, reference, *, device: proven.append(reference)  # pyright: ignore
    try:
        made = backend.quantize(
            source, folder / fmt.value, fmt, architecture.task, device=CPU, key=KEY
        )
    except UserError as error:
        return Cell(None, error.problem)
    finally:
        backend.check_bit_equal = check
    (reload or _reload)(folder / fmt.value, architecture, proven[0])
    return Cell(made.share)


def _reload(folder: Path, architecture: Architecture, reference: Reference) -> None:
    """Load it as it is assessed and served, and compute as those do: in inference mode."""
    model = load_model(folder, architecture.task, dtype=stored_dtype(folder, CPU))
    align(model)
    with torch.inference_mode():
        assert tuple(forward_digests(model, reference.probes)) == reference.digests, folder


if __name__ == "__main__":  # the table, in Markdown
    import tempfile

    print("| | " + " | ".join(fmt.value for fmt in FORMATS) + " |\n|---" * (len(FORMATS) + 1) + "|")
    for each in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as root:
            print(
                f"| {each} | "
                + " | ".join(str(cell(each, fmt, Path(root))) for fmt in FORMATS)
                + " |",
                flush=True,
            )
