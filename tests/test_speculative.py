"""A text that a draft proposes and a model verifies is that model's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from capturing import Capturing
from few import few
from make_assess_models import tiny
from make_heads import COMMON
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.config.settings.model import TinyShape
from pipeline.evaluation.serving.decoding import graphs_compiled
from pipeline.evaluation.serving.speculative import (
    FixedReader,
    GrowingReader,
    Reader,
    Speculative,
    Written,
)
from pipeline.ledger.devices import table
from pipeline.models.vocabulary import vocabulary_of
from pipeline.tasks.table import Task

SMALL = TinyShape(hidden_size=64, layers=1, heads=1, intermediate_size=64)
PROMPT = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(0))
NEW = 23


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def greedy(model: Any, prompt: torch.Tensor = PROMPT, new: int = NEW) -> torch.Tensor:
    """Return the greedy text of transformers' own loop, past any end of text: (1, new)."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = model.generate(prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new)
    return ids[:, prompt.shape[1] :]


def noisy(model: Any, scale: float, seed: int = 5) -> Any:
    """Return a copy that agrees with a model now and then."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    for parameter in copy.parameters():
        parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
    return copy


def written(model: Any, draft: Any, ahead: int = 4, new: int = NEW) -> Written:
    limit = min(vocabulary_of(each) or 0 for each in (model, draft))
    readers = GrowingReader(model, model.config.vocab_size), GrowingReader(draft, limit)
    return Speculative(*readers, ahead).write(PROMPT, new)


@pytest.mark.parametrize("new", [1, 2, 5, NEW])
@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_the_text_is_the_models_own_whatever_is_drafted(ahead: int, new: int) -> None:
    model = tiny(Task.causal_lm)
    for draft in (model, noisy(model, 0.1), tiny(Task.causal_lm, seed=7, shape=SMALL)):
        found = written(model, draft, ahead, new)
        assert torch.equal(found.tokens, greedy(model, new=new))
        assert 0 <= found.accepted <= found.drafted
        assert found.passes + found.accepted == new - 1  # a pass adds a token of its own


def test_a_draft_that_is_the_model_is_always_right() -> None:
    model = tiny(Task.causal_lm)
    found = written(model, model, 4, 21)
    assert (found.drafted, found.accepted, found.passes) == (16, 16, 4)


def test_a_draft_that_is_never_right_costs_a_pass_a_token() -> None:
    model, draft = tiny(Task.causal_lm), tiny(Task.causal_lm)
    head = draft.get_output_embeddings()
    forward = head.forward
    head.forward = lambda hidden: -forward(hidden)  # least likely first
    found = written(model, draft, 4, 6)
    assert (found.accepted, found.passes) == (0, 5)
    # of 5 tokens after the first, in rounds of at most 4 that still can be used
    assert found.drafted == 4 + 3 + 2 + 1


def test_acceptance_is_that_of_transformers_assisted_generation() -> None:
    model = tiny(Task.causal_lm)
    draft = noisy(model, 0.3)
    found = written(model, draft, 3)
    model.generation_config.eos_token_id = draft.generation_config.eos_token_id = None
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    passes: list[int] = []
    forward = model.forward
    model.forward = lambda *given, **more: passes.append(1) or forward(*given, **more)
    theirs = model.generate(
        PROMPT, do_sample=False, max_new_tokens=NEW, assistant_model=draft, pad_token_id=0
    )
    assert torch.equal(found.tokens, theirs[:, PROMPT.shape[1] :])
    assert 0 < found.accepted < found.drafted
    assert abs(found.passes - len(passes)) <= 1  # theirs reads the prompt with the first draft


def test_an_end_inside_a_draft_is_a_token_like_any_other() -> None:
    """All that is served runs to its full length, with a draft and without."""
    model = tiny(Task.causal_lm)
    plain = greedy(model)
    end = int(plain[0, 6])
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    draft = noisy(model, 0.05)
    draft.config.eos_token_id = end
    found = written(model, draft, 8)
    assert torch.equal(found.tokens, plain)
    assert end in found.tokens[0, :-1]
    assert found.accepted > 0


@pytest.mark.parametrize("wider", ["draft", "model"])
def test_vocabularies_may_differ_by_padding(wider: str) -> None:
    """A padded id is never handed over: the other model has no embedding for it."""
    model = tiny(Task.causal_lm)
    other = noisy(model, 0.05)
    if wider == "draft":
        draft = other
        draft.resize_token_embeddings(320)
        head = draft.get_output_embeddings()
        forward, padded = head.forward, 1e4 * (torch.arange(320) >= 259)
        head.forward = lambda hidden: forward(hidden) + padded  # the likeliest by far
    else:
        draft, model = model, other
        model.resize_token_embeddings(320)
        model.get_output_embeddings().weight[310] = 4 * model.get_output_embeddings().weight[9]
    found = written(model, draft)
    assert torch.equal(found.tokens, greedy(model))
    assert found.accepted > 0


WIDE: dict[str, Any] = {**COMMON, "vocab_size": 259}
FAMILIES = {
    "llama": lambda: tiny(Task.causal_lm),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE)),
    "mistral, windows": lambda: MistralForCausalLM(MistralConfig(**WIDE, sliding_window=6)),
    "gemma3, windows": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **WIDE,
            head_dim=16,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_every_kind_are_cut(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    draft = noisy(model, 0.2)
    found = written(model, draft)
    assert torch.equal(found.tokens, greedy(model))
    assert found.drafted > 0


# -- captured -------------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> type[Capturing]:
    monkeypatch.setattr(table, "_opened", {"cpu": Capturing})
    monkeypatch.setattr(Capturing, "captured", 0)
    return Capturing


def test_a_cache_of_fixed_size_is_cut_and_its_passes_are_captured(
    capturing: type[Capturing],
) -> None:
    model = tiny(Task.causal_lm)
    draft, size, ahead = noisy(model, 0.2), PROMPT.shape[1] + NEW, 3
    readers: list[Reader] = [
        FixedReader(model, 259, PROMPT, size, (ahead + 1,)),
        FixedReader(draft, 259, PROMPT, size, (1, 2)),
    ]
    assert capturing.captured == 3
    found = [Speculative(*readers, ahead).write(PROMPT, NEW) for _ in range(2)]
    expected = written(model, draft, ahead)
    assert all(torch.equal(each.tokens, greedy(model)) for each in found)
    assert [each.accepted for each in found] == [expected.accepted] * 2


@pytest.mark.parametrize("captured", few([True, False], 1))
def test_passes_are_compiled_too(
    captured: bool, capturing: type[Capturing], monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced, no C++ made of it
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = tiny(Task.causal_lm)
    draft, size = noisy(model, 0.2), PROMPT.shape[1] + NEW
    more = {"compiled": True, "captured": captured}
    readers: list[Reader] = [
        FixedReader(model, 259, PROMPT, size, (4,), **more),
        FixedReader(draft, 259, PROMPT, size, (1, 2), **more),
    ]
    end = ", CUDA graph" if captured else ""
    hows = [f"static cache, compiled (1 graph){end}", f"static cache, compiled (2 graphs){end}"]
    assert [each.how for each in readers] == hows
    before = graphs_compiled()
    found = Speculative(*readers, 3).write(PROMPT, NEW)
    assert torch.equal(found.tokens, greedy(model))
    assert graphs_compiled() == before


def test_a_cache_that_cannot_be_cut_is_not_captured(capturing: type[Capturing]) -> None:
    model = FAMILIES["mistral, windows"]().eval()
    with pytest.raises(RuntimeError, match="cannot be cut"):
        FixedReader(model, 64, PROMPT, 40, (1,))
