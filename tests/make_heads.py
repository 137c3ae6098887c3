"""Tiny language models of many architectures with random weights, their heads as their classes make
them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {**COMMON, "head_dim": 16, "query_pre_attn_scalar": 16}
OLD: dict[str, Any] = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
ENCODER: dict[str, Any] = {**COMMON, "is_decoder": True}
NARROWER: dict[str, Any] = {"word_embed_proj_dim": 16, "ffn_dim": 64}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "dim_model_base": 8,
}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaConfig", COMMON),
    "phi": ("Phi", "PhiConfig", COMMON),  # a bias
    "gemma2": ("Gemma2", "Gemma2Config", GEMMA),  # a soft cap of 30, tied
    "gemma3": ("Gemma3", "Gemma3TextConfig", {**GEMMA, "final_logit_softcapping": 20.0}),
    "vaultgemma": ("VaultGemma", "VaultGemmaConfig", GEMMA),
    "nanochat": ("NanoChat", "NanoChatConfig", COMMON),  # a soft cap of 15
    "cohere": ("Cohere", "CohereConfig", {**COMMON, "logit_scale": 0.25}),
    "cohere2": ("Cohere2", "Cohere2Config", {**COMMON, "head_dim": 16, "logit_scale": 0.5}),
    "granite": ("Granite", "GraniteConfig", {**COMMON, "logits_scaling": 4.0}),  # it divides
    "granitemoe": (
        "GraniteMoe",
        "GraniteMoeConfig",
        {**COMMON, "logits_scaling": 2.0, "num_local_experts": 4},
    ),
    # it multiplies
    "hyperclovax": ("HyperCLOVAX", "HyperCLOVAXConfig", {**COMMON, "logits_scaling": 3.0}),
    "minicpm3": ("MiniCPM3", "MiniCPM3Config", {**COMMON, **LATENT}),  # it divides hidden states
    "opt": ("OPT", "OPTConfig", {**COMMON, **NARROWER}),  # it goes around its base model
    "falcon": ("Falcon", "FalconConfig", {**COMMON, "new_decoder_architecture": True}),
    "biogpt": ("BioGpt", "BioGptConfig", COMMON),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", OLD),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {**OLD, "dff": 64}),
    "mpt": (
        "Mpt",
        "MptConfig",
        {
            "vocab_size": 99,
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
            "logit_scale": 0.5,
        },
    ),  # it ignores its scale
    # more layers after its body
    "modernbert": ("ModernBertDecoder", "ModernBertDecoderConfig", COMMON),
    "bert": ("BertLMHeadModel", "BertConfig", ENCODER),
    "falcon_h1": (
        "FalconH1",
        "FalconH1Config",
        {
            **COMMON,
            "lm_head_multiplier": 0.25,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
        },
    ),
    "inkling": ("Inkling", "InklingTextConfig", {**COMMON, "unpadded_vocab_size": 90}),
}


def made(name: str, *, seed: int = 0, **more: Any) -> Any:
    """Return a model of an architecture in evaluation mode, its dropout off."""
    prefix, config_class, settings = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**settings, **more})
    for setting in (
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "hidden_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
    ):
        if isinstance(getattr(config, setting, None), float):
            setattr(config, setting, 0.0)
    config._experts_implementation = "eager"  # the one that float64 has
    torch.manual_seed(seed)
    cls = prefix if prefix.endswith("Model") else f"{prefix}ForCausalLM"
    return getattr(transformers, cls)(config).float().eval()


def louder(model: Any, factor: float = 12.0) -> Any:
    """Return the model with an output layer so large that a soft cap is felt, and a bias where it
    has one.
    """
    layer = model.get_output_embeddings()
    with torch.no_grad():
        layer.weight.mul_(factor)
        if layer.bias is not None:
            layer.bias.normal_()
    return model
