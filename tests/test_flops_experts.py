"""FLOPs of mixtures of experts by hand, of models that look at values, and of those that cannot be
counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from here import here
from make_assess_models import byte_tokenizer, saved
from reports import whole_report
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.ledger import flops
from pipeline.ledger.flops import (
    FlopsPerSequence,
    active_parameters,
    count_flops,
    expert_shares,
    six_n,
    suspicion,
)
from pipeline.stages import step_flops
from pipeline.stages.step_flops import ModelFlops, doubt
from pipeline.tasks.table import Task

# vocabulary, width, of an expert, experts, of a token, layers, tokens
V, H, M, E, K, L, T = 128, 64, 32, 8, 2, 2, 16
HEADS = {"num_attention_heads": 2, "num_hidden_layers": L, "hidden_size": H, "vocab_size": V}


def config(name: str, **given: Any) -> Any:
    return getattr(transformers, name)(**{**HEADS, "pad_token_id": 0, **given})


FULL = 4 * H * H  # q, k, v, o with as many heads of keys as of queries
FEW = 3 * H * H  # two heads of queries of 32, one of keys and values
EXPERTS = K * 3 * H * M + H * E  # gate, up and down of those visited; the router
MIXTURES: dict[str, tuple[Any, int]] = {
    "qwen3_moe": (
        config(
            "Qwen3MoeConfig",
            num_key_value_heads=1,
            head_dim=32,
            moe_intermediate_size=M,
            num_experts=E,
            num_experts_per_tok=K,
        ),
        L * (FEW + EXPERTS),
    ),
    "mixtral": (
        config(
            "MixtralConfig",
            num_key_value_heads=1,
            intermediate_size=M,
            num_local_experts=E,
            num_experts_per_tok=K,
        ),
        L * (FEW + EXPERTS),
    ),
    "olmoe": (
        config(
            "OlmoeConfig",
            num_key_value_heads=2,
            intermediate_size=M,
            num_experts=E,
            num_experts_per_tok=K,
            eos_token_id=1,
        ),
        L * (FULL + EXPERTS),
    ),
    "gpt_oss": (
        config(
            "GptOssConfig",
            num_key_value_heads=1,
            head_dim=32,
            intermediate_size=M,
            num_local_experts=E,
            num_experts_per_tok=K,
            layer_types=["sliding_attention", "full_attention"],
        ),
        L * (FEW + EXPERTS),
    ),
    "granite_moe": (
        config(
            "GraniteMoeConfig",
            num_key_value_heads=2,
            intermediate_size=M,
            num_local_experts=E,
            num_experts_per_tok=K,
        ),
        L * (FULL + EXPERTS),
    ),
    "glm4_moe": (
        config(
            "Glm4MoeConfig",
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=96,
            moe_intermediate_size=M,
            n_routed_experts=E,
            num_experts_per_tok=K,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            n_shared_experts=1,
        ),
        # a dense layer; the other with an expert for all tokens
        L * FULL + 3 * H * 96 + EXPERTS + 3 * H * M,
    ),
    "deepseek_v3": (
        config(
            "DeepseekV3Config",
            num_key_value_heads=2,
            intermediate_size=96,
            moe_intermediate_size=M,
            n_routed_experts=E,
            num_experts_per_tok=K,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            n_shared_experts=1,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
        L * (H * 64 + H * 32 + 16 * 64 + 32 * H) + 3 * H * 96 + EXPERTS + 3 * H * M,
    ),
}
"""By name: a configuration, and its weights that multiply a token, without the output head."""


def made(given: Any, kind: Any = AutoModelForCausalLM) -> Any:
    with torch.device("meta"):
        return kind.from_config(given)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_counts_the_experts_that_a_token_visits(name: str) -> None:
    given, weights = MIXTURES[name]
    model = made(given)
    shares = expert_shares(model, Task.causal_lm)
    assert set(shares.values()) == {K / E}
    assert six_n(model, shares) == 6 * (weights + H * V)
    # of 32, scores and their use; MLA: 32 in scores, 16 in their use
    heads = 2 if name != "deepseek_v3" else 1
    attention = 2 * T * L * 2 * 32 * 2 if heads == 2 else 2 * T * L * 2 * (32 + 16)
    by_hand = 3 * T * (2 * (weights + H * V) + attention)
    whole = count_flops(model, Task.causal_lm, backward=True)(T)
    assert whole == pytest.approx(by_hand, rel=0.005)  # products of positions with frequencies
    assert (
        suspicion(
            count_flops(model, Task.causal_lm, backward=True), model, Task.causal_lm, T, shares
        )
        is None
    )


def test_parameters_in_use_are_told_from_all() -> None:
    model = made(MIXTURES["qwen3_moe"][0])
    active, whole = active_parameters(model, expert_shares(model, Task.causal_lm))
    assert whole == sum(each.numel() for each in model.parameters())
    assert whole - active == L * 3 * H * M * (E - K)


def test_as_many_experts_as_there_are_is_a_dense_model() -> None:
    dense, sparse = (
        made(
            config(
                "MixtralConfig",
                intermediate_size=M,
                num_local_experts=4,
                num_key_value_heads=2,
                num_experts_per_tok=k,
            )
        )
        for k in (4, 1)
    )
    counts = [count_flops(each, Task.causal_lm, backward=False)(T) for each in (dense, sparse)]
    assert counts[0] - counts[1] == 2 * T * L * 3 * (3 * H * M)  # three experts of four


def test_a_count_is_known_again_only_of_the_same_structure() -> None:
    """Of equal configurations: another k on a module, a frozen layer, a layer less, a hook."""

    def counted(change: Callable[[Any], Any]) -> tuple[FlopsPerSequence, FlopsPerSequence]:
        model = made(MIXTURES["mixtral"][0])
        change(model)
        found = ModelFlops.of(model, Task.causal_lm, backward=True)
        assert found.why is None
        return found.per_sequence, count_flops(model, Task.causal_lm, backward=True)

    def other_k(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = 1

    changes: list[Callable[[Any], Any]] = [
        lambda model: None,
        lambda model: None,
        other_k,
        lambda model: model.model.layers[0].requires_grad_(False),
        lambda model: model.model.layers.__delitem__(0),
        lambda model: model.get_input_embeddings().requires_grad_(False),
    ]
    found = [counted(change) for change in changes]
    assert all(ours == anew for ours, anew in found)
    assert len({ours for ours, _ in found}) >= 4


def test_experts_are_left_as_they_were() -> None:
    model = AutoModelForCausalLM.from_config(MIXTURES["olmoe"][0])
    before = model.config._experts_implementation
    count_flops(model, Task.causal_lm, backward=True)
    assert model.config._experts_implementation == before


# these look at masks or positions where the twin has no values
SEEING: dict[str, tuple[Any, Task]] = {
    "deberta_v2": (config("DebertaV2Config", intermediate_size=M), Task.sequence_classification),
    "deberta": (config("DebertaConfig", intermediate_size=M), Task.sequence_classification),
    "xlnet": (
        transformers.XLNetConfig(vocab_size=V, d_model=H, n_layer=L, n_head=2, d_inner=M),
        Task.sequence_classification,
    ),
    "dynamic": (
        config(
            "LlamaConfig",
            intermediate_size=M,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
        Task.causal_lm,
    ),
    "longrope": (
        config(
            "Phi3Config",
            intermediate_size=M,
            rope_parameters={
                "rope_type": "longrope",
                "long_factor": [1.0] * 16,
                "short_factor": [1.0] * 16,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            },
        ),
        Task.causal_lm,
    ),
    "bloom": (
        transformers.BloomConfig(vocab_size=V, hidden_size=H, n_layer=L, n_head=2),
        Task.causal_lm,
    ),
    "opt": (config("OPTConfig", ffn_dim=M, word_embed_proj_dim=H), Task.causal_lm),
}


@pytest.mark.parametrize("name", SEEING)
def test_models_that_look_at_values_are_counted(name: str) -> None:
    given, task = SEEING[name]
    kind = AutoModelForCausalLM if task is Task.causal_lm else AutoModelForSequenceClassification
    model = made(given, kind)
    per_token = count_flops(model, task, backward=True)(T) / T
    assert 0.9 < per_token / six_n(model) < 1.3


def test_dynamic_positions_count_as_plain_ones() -> None:
    plain = config("LlamaConfig", intermediate_size=M, max_position_embeddings=64)
    dynamic = SEEING["dynamic"][0]
    counts = [
        count_flops(made(each), Task.causal_lm, backward=True)(T) for each in (plain, dynamic)
    ]
    assert counts[0] == counts[1]


# an encoder-decoder that looks for the end token, and experts in a loop over tokens
UNCOUNTABLE = [
    (
        transformers.BartConfig(
            vocab_size=V,
            d_model=H,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=M,
            decoder_ffn_dim=M,
        ),
        Task.sequence_classification,
    ),
    (
        transformers.JetMoeConfig(
            vocab_size=V,
            hidden_size=H,
            intermediate_size=M,
            num_hidden_layers=1,
            num_key_value_heads=2,
            kv_channels=32,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        Task.causal_lm,
    ),
]


@pytest.mark.parametrize(("given", "task"), UNCOUNTABLE)
def test_what_cannot_be_counted_has_a_reason_and_an_estimate(given: Any, task: Task) -> None:
    kind = AutoModelForCausalLM if task is Task.causal_lm else AutoModelForSequenceClassification
    model = made(given, kind)
    found = ModelFlops.of(model, task, backward=True)
    assert found.why is not None
    assert "Error" in found.why
    assert found.why_no_rule is None
    assert found.per_sequence(T) == pytest.approx(T * six_n(model))
    assert doubt(found, model, task, T) is None


@pytest.mark.parametrize("error", [RuntimeError, ZeroDivisionError, AttributeError, RecursionError])
def test_no_kind_of_failure_gets_out(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("no such luck")

    monkeypatch.setattr(flops, "_twin", fail)
    monkeypatch.setattr(flops, "_matmul_weights", fail)
    monkeypatch.setattr(step_flops, "_counted", {})  # others of this process know this model
    model = made(MIXTURES["mixtral"][0])
    found = ModelFlops.of(model, Task.causal_lm, backward=True)
    assert (found.why, found.why_no_rule) == (f"{error.__name__}: no such luck",) * 2
    assert found.per_sequence(T) == 0
    assert found.active_share(model).value is None


# -- trained and distilled ------------------------------------------------------------------------

TINY = [
    "tracking.charts=false",
    "training.steps=3",
    "training.batch_size=4",
    "training.sequence_length=48",
    "training.eval_documents=1",
    "data.max_documents=30",
    "quality.max_documents=20",
    "quality.bootstrap=200",
    "serving.blocks=2",
    "serving.load.new=3",
    "serving.load.prompt=16",
    "serving.batches=[1]",
    "tracking.mlflow=false",
    "allow_no_speedup=true",
]
BYTES = {"vocab_size": len(byte_tokenizer()), "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3MoeConfig", "MixtralConfig"])
def test_a_mixture_is_distilled_and_its_active_share_is_said(tmp_path: Path, name: str) -> None:
    sizes = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts_per_tok": K,
    }
    own = (
        {"moe_intermediate_size": M, "num_experts": E}
        if name == "Qwen3MoeConfig"
        else {"intermediate_size": M, "num_local_experts": E}
    )
    torch.manual_seed(0)
    given = config(name, **{**BYTES, **sizes, **own})
    source = saved(AutoModelForCausalLM.from_config(given), tmp_path / "source")
    done = here(
        tmp_path,
        "recipe=distill",
        f"model.path={source}",
        "stages.teacher.steps=3",
        "stages.student.allow_weak_teacher=true",
        *TINY,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "mlruns/latest/result.json").read_text())
    rows = {row["arm"]: row["ledger"]["counts"] for row in result["rows"]}
    student = rows["student"]
    assert student["model_flops"]["value"] > 0
    expected = active_parameters(
        half := AutoModelForCausalLM.from_config(_half(given)), expert_shares(half, Task.causal_lm)
    )
    assert student["active_parameter_share"]["value"] == pytest.approx(expected[0] / expected[1])
    said = [note for note in result["environment"]["notes"] if "mixture of experts" in note]
    assert {note.partition(":")[0] for note in said} == {
        "teacher",
        "student",
        "control_steps",
        "control_compute",
    }
    report = whole_report(tmp_path / "mlruns/latest")
    assert "mixture of experts: a token uses" in report
    flops_ = {arm: counts["model_flops"]["value"] for arm, counts in rows.items()}
    per_step = flops_["control_compute"] / rows["control_compute"]["steps"]["value"]
    assert 0 <= flops_["student"] - flops_["control_compute"] < per_step


def _half(given: Any) -> Any:
    own = type(given)(**{**given.to_dict(), "num_hidden_layers": 1})
    return own
