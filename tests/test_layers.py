"""Models of fewer or more layers: what is trained is what is reloaded, for architectures whose
layers differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import LABELS, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BambaConfig,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DeepseekV3Config,
    Exaone4Config,
    FalconH1Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LongformerConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    SmolLM3Config,
    T5Config,
    XLMConfig,
)

from pipeline.config.settings.model import StudentConfig
from pipeline.errors import StageFailed, UserError
from pipeline.models.layers import check_layers, cut_config, layer_count, with_layers
from pipeline.models.load import load_model, save_model
from pipeline.models.student import make_student, stacked, student_config
from pipeline.tasks.table import Task

SAME: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
KINDS: dict[str, PreTrainedConfig] = {
    "smollm3": SmolLM3Config(**SAME),
    "gemma3": Gemma3TextConfig(
        **SAME,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt-neo": GPTNeoConfig(
        vocab_size=259,
        hidden_size=32,
        num_layers=4,
        num_heads=2,
        window_size=4,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=64,
    ),
    "qwen2": Qwen2Config(**SAME, use_sliding_window=True, max_window_layers=2, sliding_window=4),
    "llama4": Llama4TextConfig(
        **SAME,
        head_dim=16,
        num_local_experts=2,
        intermediate_size_mlp=32,
        interleave_moe_layer_step=2,
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **SAME,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[1],
    ),
    "exaone4": Exaone4Config(**SAME, sliding_window=4, sliding_window_pattern=2),
    "gpt-oss": GptOssConfig(
        **SAME, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=4
    ),
    "recurrent-gemma": RecurrentGemmaConfig(
        **{**SAME, "num_key_value_heads": 1},
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
    ),
    "deepseek": DeepseekV3Config(
        **SAME,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
    ),
    "lfm2": Lfm2Config(**SAME, full_attn_idxs=[1, 3]),
}


def source(folder: Path, config: PreTrainedConfig, task: Task = Task.causal_lm) -> Path:
    kind = AutoModelForCausalLM if task is Task.causal_lm else AutoModelForSequenceClassification
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict())
    save_model(kind.from_config(config).float(), byte_tokenizer(), folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():  # longer than every window
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_cut_reloads_as_it_trains_and_keeps_what_its_layers_are(
    tmp_path: Path, kind: str
) -> None:
    folder = source(tmp_path / "source", KINDS[kind])
    student_config(StudentConfig(layers=[1, 3]), folder, Task.causal_lm)  # what preflight asks
    student, tokenizer = make_student(StudentConfig(layers=[1, 3]), folder, Task.causal_lm, None)
    save_model(student, tokenizer, tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert torch.allclose(logits(student), logits(again), atol=1e-5)
    teacher, total = load_model(folder, Task.causal_lm).config.get_text_config(), 4
    ours = student.config
    for name in ("layer_types", "no_rope_layers", "attention_layers", "layers_block_type"):
        kinds = getattr(teacher, name, None)
        if isinstance(kinds, list) and len(kinds) == total:
            assert list(getattr(ours, name)) == [kinds[1], kinds[3]], name


@pytest.mark.parametrize("kind", ["smollm3", "gpt-neo", "gpt-oss"])
def test_what_is_cut_computes_what_the_live_layers_did(tmp_path: Path, kind: str) -> None:
    """Dropping the last layers leaves a model whose states are those of the source below them."""
    folder = source(tmp_path, KINDS[kind])
    teacher = load_model(folder, Task.causal_lm)
    student = with_layers(teacher, [0, 1], "student.layers")
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        theirs = teacher(input_ids=ids, output_hidden_states=True).hidden_states[2]
        seen: list[torch.Tensor] = []
        last = next(
            module
            for name, module in student.named_modules()
            if name.endswith((".layers.1", ".h.1"))
        )
        last.register_forward_hook(
            lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        student(input_ids=ids)
    assert torch.allclose(seen[0], theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["smollm3", "gemma3", "gpt-neo", "exaone4"])
def test_what_is_stacked_reloads_as_it_trains(tmp_path: Path, kind: str) -> None:
    model = load_model(source(tmp_path / "source", KINDS[kind]), Task.causal_lm)
    grown = with_layers(model, stacked(model.config, 2), "stages.student.stack")
    assert layer_count(grown.config) == 8
    save_model(grown, byte_tokenizer(), tmp_path / "grown")
    assert torch.allclose(
        logits(load_model(tmp_path / "grown", Task.causal_lm)), logits(grown), atol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "chosen", "said"),
    [
        (
            JambaConfig(
                **SAME,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                num_experts=2,
                mamba_d_state=4,
                use_mamba_kernels=False,
            ),
            [1, 3],
            "wants another kind",
        ),
        (KINDS["deepseek"], [3, 1], "wants another kind"),
        (KINDS["lfm2"], [0, 2], "make no model that runs"),
        (
            BambaConfig(
                **SAME, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8
            ),
            [0, 2],
            "make no model that runs",
        ),
        (FalconH1Config(**SAME, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_state=8), [0, 2], None),
    ],
)
def test_layers_that_make_no_model_are_refused_before_anything_trains(
    config: PreTrainedConfig, chosen: list[int], said: str | None
) -> None:
    if said is None:
        assert layer_count(check_layers(config, Task.causal_lm, chosen, "student.layers")) == len(
            chosen
        )
        return
    with pytest.raises(UserError, match=rf"^student\.layers: .*{said}.*; give"):
        check_layers(config, Task.causal_lm, chosen, "student.layers")


@pytest.mark.parametrize(
    ("config", "chosen", "said"),
    [
        (
            RwkvConfig(vocab_size=259, hidden_size=32, num_hidden_layers=4, context_length=64),
            [0],
            r"layers \[0\] make no RwkvForCausalLM \(.*division by zero\); give student\.path",
        ),
        (KINDS["deepseek"], [3, 1], r"another kind \(.*; give student\.path$"),  # nor do 0, 3, 1
        (
            JambaConfig(
                **SAME,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                num_experts=2,
                mamba_d_state=4,
                use_mamba_kernels=False,
            ),
            [1],
            r"another kind .*keeps layer 0 first, or",
        ),
    ],
)
def test_a_refusal_of_layers_gives_what_would_help(
    config: PreTrainedConfig, chosen: list[int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_layers(config, Task.causal_lm, chosen, "student.layers")


def test_layers_that_are_one_whatever_the_configuration_says_are_not_cut() -> None:
    config = XLMConfig(vocab_size=259, emb_dim=32, n_layers=3, n_heads=2, pad_index=0, num_labels=3)
    with pytest.raises(UserError, match=r"give student\.path$") as found:
        check_layers(config, Task.sequence_classification, [1], "student.layers")
    assert "layer 0 first" not in str(found.value)


@pytest.mark.parametrize(
    "config",
    [
        BartConfig(
            vocab_size=259,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_labels=3,
        ),
        T5Config(
            vocab_size=259, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, num_labels=3
        ),
    ],
)
def test_two_stacks_are_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(UserError, match=r"student\.layers: .* has an encoder and a decoder"):
        check_layers(config, Task.sequence_classification, [1], "student.layers")


def test_a_list_per_layer_of_any_name_is_cut_and_numbers_of_layers_are_counted_anew() -> None:
    wide = LongformerConfig(
        **{name: SAME[name] for name in SAME if "key_value" not in name},
        attention_window=[2, 4, 6, 8],
    )
    assert cut_config(wide, [3, 0], "k").attention_window == [8, 2]
    assert cut_config(KINDS["qwen3-moe"], [0, 1], "k").mlp_only_layers == [1]
    assert cut_config(KINDS["qwen3-moe"], [1, 2, 3], "k").mlp_only_layers == [0]
    assert cut_config(KINDS["deepseek"], [1, 3], "k").first_k_dense_replace == 1
    ends = Qwen2Config(**{**SAME, "eos_token_id": [2, 5, 6, 7]})
    assert cut_config(ends, [1, 3], "k").eos_token_id == [2, 5, 6, 7]


def test_a_list_of_something_else_that_is_as_long_as_the_model_is_deep_stays_whole() -> None:
    plain = {name: SAME[name] for name in SAME if "key_value" not in name} | {
        "num_hidden_layers": 2
    }
    config = DebertaV2Config(**plain, pos_att_type=["p2c", "c2p"], relative_attention=True)
    assert check_layers(
        config, Task.sequence_classification, [1], "student.layers"
    ).pos_att_type == ["p2c", "c2p"]


def test_a_classifier_is_cut_with_its_head(tmp_path: Path) -> None:
    config = BertConfig(
        **{name: SAME[name] for name in SAME if "key_value" not in name},
        num_labels=3,
        id2label=dict(enumerate(LABELS)),
    )
    folder = source(tmp_path, config, Task.sequence_classification)
    student, _ = make_student(
        StudentConfig(layers=2), folder, Task.sequence_classification, LABELS[::-1]
    )
    teacher: Any = load_model(folder, Task.sequence_classification)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert student.config.id2label == dict(enumerate(LABELS))


def untied(folder: Path, config: PreTrainedConfig) -> Path:
    """Save a model whose head is not its embedding, under a configuration that says it is."""
    config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    source(folder, config)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize("kind", ["qwen2", "gpt-neo", "gemma3"])
def test_weights_apart_under_a_configuration_that_ties_them_stay_apart(
    tmp_path: Path, kind: str
) -> None:
    folder = untied(tmp_path / "source", KINDS[kind])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student, tokenizer = make_student(
        StudentConfig(layers=[0, 1, 2, 3]), folder, Task.causal_lm, None
    )
    teacher = load_model(folder, Task.causal_lm)
    whole = with_layers(teacher, stacked(teacher.config, 1), "stages.student.stack")
    save_model(student, tokenizer, tmp_path / "student")
    save_model(plain, tokenizer, tmp_path / "plain")  # as a library loaded it
    student.tie_weights()  # as a resumed training does
    again = [load_model(tmp_path / name, Task.causal_lm) for name in ("student", "plain")]
    for made in (teacher, student, whole, *again):
        assert torch.equal(logits(made), logits(plain))
        assert made.config.get_text_config().tie_word_embeddings is False
    assert '"tie_word_embeddings": false' in (tmp_path / "plain" / "config.json").read_text()


def test_a_tie_of_several_is_parted_as_a_whole(tmp_path: Path) -> None:
    """BERT's decoder has a tied bias beside its tied weight, and one flag for both."""
    plain = {name: SAME[name] for name in SAME if "key_value" not in name}
    folder = source(tmp_path / "source", BertConfig(**plain, is_decoder=True))
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.decoder.weight"] = torch.randn(259, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model = load_model(folder, Task.causal_lm)
    assert torch.equal(logits(model), wanted)
    save_model(model, byte_tokenizer(), tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again", Task.causal_lm)), wanted)


def test_tied_weights_stay_tied_in_what_is_cut(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", Qwen2Config(**SAME, tie_word_embeddings=True))
    student, _ = make_student(StudentConfig(layers=[0, 2]), folder, Task.causal_lm, None)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_what_is_cut_has_its_sources_weights_or_is_never_trained(tmp_path: Path) -> None:
    teacher: Any = load_model(untied(tmp_path, KINDS["smollm3"]), Task.causal_lm)
    teacher.config.tie_word_embeddings = True
    with pytest.raises(
        StageFailed, match=r"of these layers has another lm_head\.weight than its source"
    ):
        with_layers(teacher, [0, 1], "student.layers")


def test_a_model_that_reloads_as_another_is_never_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path, KINDS["smollm3"])
    model = load_model(folder, Task.causal_lm)
    save = type(model).save_pretrained

    def spoilt(self: Any, where: Any, **more: Any) -> None:
        self.config.no_rope_layers = [1, 1]
        save(self, where, **more)

    monkeypatch.setattr(type(model), "save_pretrained", spoilt)
    with pytest.raises(
        StageFailed, match="of these layers reloads as another model: logits differ by"
    ):
        with_layers(model, [1, 3], "student.layers")
