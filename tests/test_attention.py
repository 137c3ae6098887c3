"""Attention that is told where documents begin: equal to attention under a dense mask, and none is
made.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import Attention, TrainingConfig
from pipeline.distillation.on_policy import Writing, write
from pipeline.errors import UserError
from pipeline.ledger.devices.cpu import Cpu
from pipeline.models import attention
from pipeline.models.attention import DOCUMENTS, bounds_of, document_attention, layer_of
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.training import reading
from pipeline.training.precision import arithmetic
from pipeline.training.reading import (
    Apart,
    Documents,
    Examined,
    check_attention,
    document_mask,
    examine,
    full_logits,
    hidden_states,
    lengths,
    prompts_told,
)

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
WINDOW = 5
ROWS = ([9, 3, 12], [1, 23], [24], [8, 8, 8])


def positions_of(rows: Any = ROWS) -> Tensor:
    """Return the positions of packed documents of these lengths, (B, T)."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def model_of(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    name, config = {
        "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SHAPE)),
        "qwen3": ("Qwen3ForCausalLM", transformers.Qwen3Config(**SHAPE)),
        "gemma3": (
            "Gemma3ForCausalLM",
            transformers.Gemma3TextConfig(
                **SHAPE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
            ),
        ),
        "gpt2": (
            "GPT2LMHeadModel",
            transformers.GPT2Config(
                vocab_size=99,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **more},
            ),
        ),
        "mistral": (
            "MistralForCausalLM",
            transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
        ),
        "gemma2": (
            "Gemma2ForCausalLM",
            transformers.Gemma2Config(**SHAPE, attn_logit_softcapping=5.0),
        ),
        "gpt_oss": (
            "GptOssForCausalLM",
            transformers.GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1),
        ),
    }[kind]
    return getattr(transformers, name)(config).eval()


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return torch's own attention under a mask, (B, T, H, D)."""
    shared = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(shared, 1) for part in (key, value))
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return found.transpose(1, 2)


def within(mask: Tensor, window: int) -> Tensor:
    at = torch.arange(mask.shape[-1])
    return mask if not window else mask & (at[:, None] - at < window)


# -- the operator ---------------------------------------------------------------------------------


LONG = ([300, 17, 9, 70], [1, 390, 5], [130, 120, 146])  # some are computed by themselves


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], ([24], [24]), LONG])
@pytest.mark.parametrize("window", [0, 1, 4, 8, 24, 99])
def test_documents_and_their_gradients_are_those_under_a_mask(rows: Any, window: int) -> None:
    positions = positions_of(rows)
    count, length = positions.shape
    torch.manual_seed(window)
    shape = (count, 3, length, 8)
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    slope = torch.randn(count, length, 3, 8, dtype=torch.float64)
    found, _ = document_attention(*parts, bounds_of(positions), window, 0.3)
    wanted = dense(*parts, within(document_mask(positions), window), 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, slope),
        torch.autograd.grad(wanted, parts, slope),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_torch_finds_nothing_wrong_with_the_operator() -> None:
    """Its shapes without data, its strides, and its gradients when compiled."""
    positions = positions_of(ROWS[:2])
    parts = [torch.randn(2, 3, 24, 8, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(document_attention, (*parts, bounds_of(positions), 4, 0.3))


def test_a_compiler_sees_one_step_however_many_documents_there_are() -> None:
    graphs: list[Any] = []

    def noted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda parts, bounds: document_attention(*parts, bounds, 0, 0.3)[0] * 2,
        backend=noted,
        fullgraph=True,
        dynamic=True,
    )
    parts = [torch.randn(1, 3, 24, 8) for _ in range(3)]
    for row in ROWS[:2]:
        bounds = bounds_of(positions_of([row]))
        torch.testing.assert_close(
            step(parts, bounds), document_attention(*parts, bounds, 0, 0.3)[0] * 2
        )
    assert len(graphs) == 1


def test_where_documents_begin() -> None:
    positions = torch.tensor([[0, 1, 0, 1], [2, 3, 0, 1], [0, 0, 1, 2]])
    found = bounds_of(positions)
    # a row begins a document even where a longer one goes on in it
    assert found.tolist() == [0, 2, 4, 6, 8, 9, 12]
    assert found.dtype is torch.int32
    assert positions.tolist()[1] == [2, 3, 0, 1]


# -- models ---------------------------------------------------------------------------------------


def packed(kind: str) -> tuple[Any, dict[str, Tensor], Documents]:
    """Return a model in fp64, a batch, and its documents."""
    positions = positions_of()
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(3, 99, positions.shape), "position_ids": positions}
    return model_of(kind).double(), inputs, Documents.of(positions, positions)


def under_masks(model: Any, inputs: dict[str, Tensor], layer_types: list[str] | None) -> Tensor:
    """Return the states of a model under dense masks, made here and computed by transformers."""
    mask = document_mask(inputs["position_ids"])
    narrow = within(mask, WINDOW)
    masks: Any = {"full_attention": mask, "sliding_attention": narrow}
    if layer_types is None:
        masks = narrow if getattr(model.config, "sliding_window", None) else mask
    return model.base_model(**inputs, attention_mask=masks, use_cache=False).last_hidden_state


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2", "mistral"])
def test_a_packed_batch_is_read_as_under_its_dense_mask_and_none_is_made(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, documents = packed(kind)
    kinds = getattr(model.config, "layer_types", None)
    kinds = kinds if kinds and len(set(kinds)) > 1 else None
    wanted = under_masks(model, inputs, kinds)
    slopes = torch.autograd.grad(wanted.square().sum(), list(model.base_model.parameters()))
    read = examine(model, CPU)
    assert read.apart is Apart.lengths
    masks = _note_masks(model, monkeypatch)
    told = documents.told(model, read, Precision.fp32)
    found = hidden_states(model, inputs, told)
    ours = torch.autograd.grad(found.square().sum(), list(model.base_model.parameters()))
    assert masks == [None] * 2
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(ours, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # a boundary one token off is another reading
    shifted = bounds_of(inputs["position_ids"].roll(1, dims=-1))
    moved = hidden_states(model, inputs, lengths(shifted, 24))
    assert (moved - wanted).abs().max() > 1e-3


def _note_masks(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note what mask each layer's attention is given by transformers; have ours make none."""
    masks: list[Any] = []
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(
                lambda _, args, more: masks.append(more.get("attention_mask")), with_kwargs=True
            )

    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("a mask is made")

    monkeypatch.setattr(reading, "document_mask", refuse)
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    return masks


def test_a_row_of_one_document_each_is_told_nothing() -> None:
    model = model_of("llama")
    read = examine(model, CPU)
    positions = positions_of(([24], [24]))
    assert Documents.of(positions, positions).told(model, read, Precision.fp32) == {}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_a_device_without_such_attention_gets_one_mask_for_all_layers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, documents = packed(kind)
    read = examine(model, CPU)
    wanted = hidden_states(model, inputs, documents.told(model, read, Precision.fp32))
    monkeypatch.setattr(Cpu, "takes_lengths", lambda *_: False)
    told = documents.told(model, read, Precision.fp32)
    assert list(told) == ["allowed"]
    torch.testing.assert_close(hidden_states(model, inputs, told), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_varlen_attention_is_handed_what_its_documentation_asks_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of CUDA's kernel stands what torch documents of it, computed document by
    document.
    """
    calls: list[tuple[int, ...]] = []

    def stand_in(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        of_keys: Tensor,
        longest: int,
        longest_key: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert torch.equal(bounds, of_keys)
        assert bounds.dtype is torch.int32
        assert int(bounds.diff().max()) <= longest == longest_key
        left, right = window_size
        calls.append(tuple(query.shape))
        out = torch.empty_like(query)
        for start, end in itertools.pairwise(bounds.tolist()):
            at = torch.arange(end - start)
            behind = at[:, None] - at
            seen = (behind >= -right) & (behind <= (left if left >= 0 else len(at)))
            each = [part[None, start:end].transpose(1, 2) for part in (query, key, value)]
            out[start:end] = dense(*each, seen, scale)[0]
        return out

    model, inputs, documents = packed(kind)
    read = examine(model, CPU)
    told = documents.told(model, read, Precision.fp32)
    wanted = hidden_states(model, inputs, told)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: None, **more: Any) -> Any:
        out = attention._varlen(
            query,
            key,
            value,
            more["cu_seq_lens_q"],
            more["max_length_q"],
            more.get("sliding_window") or 0,
            more["scaling"],
        )
        return out, None

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS,
        "_global_mapping",
        {**transformers.AttentionInterface._global_mapping, DOCUMENTS: attend},
    )
    torch.testing.assert_close(hidden_states(model, inputs, told), wanted, rtol=1e-6, atol=1e-6)
    assert calls == [(96, 4, 8)] * 2


def test_products_are_computed_in_the_dtype_of_autocast() -> None:
    """Rotary positions leave fp32; torch's own attention is rounded by autocast, and so is ours."""
    model, inputs, documents = packed("llama")
    model.float()
    with torch.no_grad(), arithmetic(Precision.bf16, CPU):
        wanted = under_masks(model, inputs, None)
        read = examine(model, CPU)
        found = hidden_states(model, inputs, documents.told(model, read, Precision.bf16))
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    seen: list[torch.dtype] = []

    def noted(query: Tensor, *rest: Any) -> Any:
        seen.append(query.dtype)
        return document_attention(query, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), arithmetic(Precision.bf16, CPU):
        patch.setattr(attention, "document_attention", noted)
        hidden_states(model, inputs, documents.told(model, read, Precision.bf16))
    assert seen == [torch.bfloat16] * 2


# -- whose attention it can be --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_attention_that_asks_for_more_stays_what_it_is(kind: str) -> None:
    """A soft cap, or sinks: they would be lost without a word."""
    model = model_of(kind)
    before = model.config._attn_implementation
    assert examine(model, CPU).apart is not Apart.lengths
    assert model.config._attn_implementation == before


def test_a_window_that_only_a_mask_would_keep_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """No document of a few tokens would show it."""
    model = model_of("mistral")
    for layer in model.model.layers:
        right = layer.self_attn.forward
        # the layer names no window to its attention
        monkeypatch.setattr(
            layer.self_attn, "forward", _with_config(layer.self_attn, right, sliding_window=None)
        )
    assert examine(model, CPU).apart is not Apart.lengths
    assert examine(model_of("mistral"), CPU).apart is Apart.lengths


def _with_config(module: Any, forward: Callable[..., Any], **changes: Any) -> Callable[..., Any]:
    def run(*args: Any, **more: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(module.config, name, value)
            return forward(*args, **more)

    return run


def test_what_was_asked_for_by_name_stays() -> None:
    config = model_of("llama").config
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    assert examine(model, CPU).apart is Apart.mask
    assert model.config._attn_implementation == "eager"


def test_keys_left_out_at_random_are_left_out_under_a_mask() -> None:
    """GPT-2 as it comes drops a tenth of its attention; no kernel for lengths does."""
    positions = positions_of()
    documents = Documents.of(positions, positions)
    for drops in (0.0, 0.1):
        model = model_of("gpt2", attn_pdrop=drops)
        read = examine(model, CPU)
        assert read.layer is not None
        assert read.layer.drops is (drops > 0)
        assert "allowed" not in documents.told(model, read, Precision.fp32)
        told = documents.told(model.train(), read, Precision.fp32)
        assert ("allowed" in told) is (drops > 0)
        inputs = {"input_ids": positions + 3, "position_ids": positions}
        once, again = (hidden_states(model, inputs, told) for _ in range(2))
        assert torch.equal(once, again) is (drops == 0)


def test_it_is_not_saved_with_a_model(tmp_path: Any) -> None:
    model = model_of("llama")
    examine(model, CPU)
    assert model.config._attn_implementation == DOCUMENTS
    model.save_pretrained(tmp_path)
    assert DOCUMENTS not in (tmp_path / "config.json").read_text()
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_a_failure_leaves_a_model_its_own_attention() -> None:
    model = model_of("llama")

    def run() -> None:
        raise ValueError("no such thing")

    assert layer_of(model, run, torch.tensor([0, 1])) is None
    assert model.config._attn_implementation == "sdpa"


# -- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_what_is_written_after_padded_prompts_is_what_a_mask_has_written(
    kind: str, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where prompt and answer are longer than a layer's window."""
    model = model_of(kind)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0] * 8 + [1]])
    prompts = torch.randint(3, 99, mask.shape, generator=torch.Generator().manual_seed(2))
    writing = Writing(length=8, temperature=1e-4, vocabulary=99, ends=[], seed=3)
    wanted = write(model, prompts, mask, writing, 0)
    read = examine(model, CPU)
    monkeypatch.setattr(Cpu, "takes_lengths", lambda *_: has_kernel)
    told = prompts_told(model, read, Precision.fp32, mask)
    found = write(model, prompts, mask, writing, 0, told)
    assert torch.equal(found["input_ids"], wanted["input_ids"])
    # told nothing, it would read padding
    other = write(model, prompts, mask, writing, 0, lambda _: {})
    assert not torch.equal(other["input_ids"], wanted["input_ids"])


def test_a_model_is_served_and_scored_by_it_as_by_its_own() -> None:
    """A row is one document where no lengths are given, also of a window."""
    for kind in ("mistral", "gemma3"):
        model = model_of(kind)
        ids = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            wanted = full_logits(model, {"input_ids": ids})
            examine(model, CPU)
            torch.testing.assert_close(
                full_logits(model, {"input_ids": ids}), wanted, rtol=1e-4, atol=1e-5
            )


# -- `training.attention` --------------------------------------------------------------------------


def test_a_mask_is_taken_where_it_is_asked_for() -> None:
    model, inputs, documents = packed("llama")
    by_lengths = examine(model, CPU)
    wanted = hidden_states(model, inputs, documents.told(model, by_lengths, Precision.fp32))
    other = model_of("llama").double()
    other.load_state_dict(model.state_dict())
    read = examine(other, CPU, Attention.mask)
    assert read.apart is Apart.mask
    check_attention(other, read, Precision.fp32, CPU, Attention.mask, "training.attention")
    told = documents.told(other, read, Precision.fp32)
    assert list(told) == ["attention_mask"]
    torch.testing.assert_close(hidden_states(other, inputs, told), wanted, rtol=1e-6, atol=1e-6)


def test_a_mask_of_each_kind_of_layer_is_taken_where_it_is_asked_for() -> None:
    """Gemma 3 keeps documents apart by positions too, which auto takes where lengths are not."""
    assert examine(model_of("gemma3"), CPU, Attention.mask).apart is Apart.mask


def test_lengths_that_are_asked_for_are_there_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with the setting's key, what the model does, and the remedy."""

    def check(read: Examined, wanted: Attention = Attention.lengths) -> None:
        check_attention(model, read, Precision.fp32, CPU, wanted, "stages.student.attention")

    model = model_of("llama")
    read = examine(model, CPU)
    check(read)
    check(Examined(read.head, Apart.mask), Attention.mask)
    check(Examined(read.head, Apart.positions), Attention.auto)
    with pytest.raises(UserError, match=r"^stages\.student\.attention: lengths: LlamaFor"):
        check(Examined(read.head, Apart.positions))
    assert read.layer is not None
    drops = dataclasses.replace(read, layer=dataclasses.replace(read.layer, drops=True))
    with pytest.raises(UserError, match=r"leaves keys out at random.*give auto"):
        check(drops)
    with pytest.raises(UserError, match=r"mask: .* looks at none"):
        check(Examined(read.head, Apart.rows), Attention.mask)
    monkeypatch.setattr(Cpu, "takes_lengths", lambda *_: False)
    with pytest.raises(UserError, match=r"no kernel for them takes heads of 8"):
        check(read)


def test_a_device_without_such_attention_refuses_it_before_anything_runs() -> None:
    run = Run(
        training=TrainingConfig(attention=Attention.lengths),
        precision=PrecisionConfig(name=Precision.fp32),
        stages={"plain": TrainStage()},
    )
    TrainStage().refuse_device("stages.plain", run, CPU)
    for named, stage in (("training", TrainStage()), ("stages.plain", TrainStage())):
        if named != "training":
            run.training.attention = Attention.auto
            stage.attention = Attention.lengths
        with pytest.raises(UserError, match=rf"^{named}\.attention: lengths: .* on mps in fp32"):
            stage.refuse_device("stages.plain", run, torch.device("mps"))


def test_a_task_without_packed_documents_has_no_use_for_it() -> None:
    run = Run(task=Task.sequence_classification)
    why = TrainStage().no_effect("attention", run)
    assert why == "with task sequence_classification: no documents are packed"
    assert TrainStage().no_effect("attention", Run()) is None
