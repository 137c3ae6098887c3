"""Tokens and bytes by tokenizers of many kinds: trimmed offsets, no offsets, unknown and dropped
characters, pairs.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from make_assess_models import byte_tokenizer
from test_encode import forget  # noqa: F401  (a fixture)
from test_lm_eval_equality import byte_level, unigram, word_piece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AddedToken, ByT5Tokenizer, PreTrainedTokenizerFast

from pipeline.data import encode
from pipeline.data.documents import Document
from pipeline.data.encode import encode_all, tokenizer_content
from pipeline.data.spans import Reader
from pipeline.tasks.table import Task

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KINDS = {
    "byte-level": lambda: byte_level(eos_token="</s>"),
    "Unigram": lambda: unigram(bos_token="<s>", eos_token="</s>"),
    "slow": ByT5Tokenizer,
}


def tokenizer_of(kind: str) -> Any:
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def causal(document: Document, tokenizer: Any, **more: Any) -> Any:
    [found] = encode_all([document], tokenizer, Task.causal_lm, max_length=0, **more)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["one two", "  spaced", "naïve"])
def test_bytes_of_an_answer_are_those_of_its_rendering(kind: str, answer: str) -> None:
    messages = ({"role": "user", "content": "a question"}, {"role": "assistant", "content": answer})
    found = causal(Document("", messages=messages), tokenizer_of(kind))
    assert found.num_bytes == len(f"{answer}\n".encode())
    assert found.targets.any()
    assert not found.targets[0]


@pytest.mark.parametrize("role", [None, "additional_special_tokens", "pad_token"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_turn_stands_for_no_text_whatever_declares_it_special(
    kind: str, role: str | None
) -> None:
    """Many tokenizers mark it as special where they list their tokens, and give it no role."""
    tokenizer, end = KINDS[kind](), "[[done]]"
    tokenizer.add_tokens([AddedToken(end, special=True, normalized=False)])
    if role is not None:
        tokenizer.add_special_tokens({role: [end] if role.startswith("add") else end})
    tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}" + end)
    messages = (
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "twice as far"},
    )
    found = causal(Document("", messages=messages), tokenizer)
    assert found.num_bytes == len("twice as far\n")
    assert found.ends is not None
    assert found.input_ids[found.ends].tolist() == [tokenizer.convert_tokens_to_ids(end)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_predicted_and_its_prompt_read(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    found = causal(Document(" grain and stone", prompt="The mill makes"), tokenizer)
    text = causal(Document("The mill makes grain and stone"), tokenizer)
    assert found.input_ids.tolist() == text.input_ids.tolist()
    assert found.num_bytes == len(" grain and stone")
    first = int(np.flatnonzero(found.targets)[0])
    assert first > 1
    assert found.targets[first:].all()
    assert (found.ends is not None) is (tokenizer.eos_token_id is not None)


def test_a_token_that_joins_prompt_and_completion_counts_all_of_its_bytes() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["xy"])
    found = causal(Document("yz", prompt="wx"), tokenizer)
    said = tokenizer.convert_ids_to_tokens(found.input_ids[found.targets].tolist())
    assert said == ["xy", "z", "</s>"]
    assert found.num_bytes == len("xyz")


@pytest.mark.parametrize(
    ("tokenizer", "text", "share"),
    [
        (lambda: word_piece(eos_token="[SEP]"), "return \u2603\u2603", 6 / 13),
        (lambda: unigram(eos_token="</s>"), "a \u2603\u2604 a", 6 / 10),
        (lambda: byte_level(eos_token="</s>"), "\u2603\u2604", 0),
    ],
)
def test_unknown_characters_are_counted_in_bytes(tokenizer: Any, text: str, share: float) -> None:
    found = causal(Document(text), tokenizer())
    assert found.num_bytes == len(text.encode())
    assert found.unknown_bytes / found.num_bytes == pytest.approx(share)


def test_characters_that_a_tokenizer_drops_are_unknown_and_white_space_is_not() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # without an unknown token: drops the rest
    backend = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    found = causal(Document("ab  a \u05d0 b"), tokenizer)
    assert (found.num_bytes, found.unknown_bytes) == (10, 2)
    assert not Reader(tokenizer).is_lossless


def test_whether_a_tokenizer_knows_every_character_is_found_out() -> None:
    assert Reader(byte_tokenizer()).is_lossless
    assert Reader(ByT5Tokenizer()).is_lossless
    assert not Reader(word_piece(eos_token="[SEP]")).is_lossless


def test_pairs_are_read_with_their_parts_and_the_longer_one_is_cut() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    documents = [
        Document("premise", 1, pair="so"),
        Document("alone", 0),
        Document("a" * 20, 0, pair="b" * 6),
    ]
    pair, alone, long = encode_all(
        documents, tokenizer, Task.sequence_classification, max_length=16
    )
    assert tokenizer.decode(pair.input_ids) == "<s>premise</s>so</s>"
    assert pair.token_type_ids.tolist() == [0] * 9 + [1] * 3
    assert (alone.token_type_ids, alone.label, alone.unread_tokens) == (None, 0, 0)
    assert tokenizer.decode(long.input_ids) == "<s>aaaaaaa</s>bbbbbb</s>"
    assert long.unread_tokens == 13
    notes = encode.encoding_notes(documents, tokenizer, Task.sequence_classification, max_length=16)
    assert notes == ["1 of 3 examples is cut: 27.1% of the tokens are not read"]


def test_a_pair_is_nothing_for_a_language_model() -> None:
    with pytest.raises(
        Exception,
        match=r"document 1 of test is a pair of texts, which task=causal_lm does not read",
    ):
        causal(Document("a", pair="b"), byte_tokenizer(), split="test")


def test_what_is_encoded_again_is_known_by_content() -> None:
    """A slow tokenizer too: another object of the same content is the same, another content is
    not.
    """
    calls: list[int] = []
    original = encode._encode
    documents = [Document("one")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_encode", lambda *given: (calls.append(1), original(*given))[1])
        causal(documents[0], ByT5Tokenizer())
        causal(documents[0], ByT5Tokenizer())
        assert len(calls) == 1
        different = [Document("one", prompt="p"), Document("one", group="g")]
        for count, document in enumerate(different, 2):
            causal(document, ByT5Tokenizer())
            assert len(calls) == count
        for pair in ("x", "y"):
            encode_all(
                [Document("one", 0, pair=pair)],
                byte_tokenizer(),
                Task.sequence_classification,
                max_length=9,
            )
        for label in (1, 2):
            encode_all(
                [Document("one", label)],
                byte_tokenizer(),
                Task.sequence_classification,
                max_length=9,
            )
        assert len(calls) == 7
    assert tokenizer_content(ByT5Tokenizer()) != tokenizer_content(ByT5Tokenizer(extra_ids=3))


def made_by_hand(model: Any, **more: Any) -> Any:
    """A tokenizer whose model is all that knows its unknown token, as
    `PreTrainedTokenizerFast(...)` wraps it.
    """
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]", **more)


WORDS = {"[X]": 0, "[E]": 1, "known": 2, "words": 3, "k": 4, "##nown": 5}
BY_HAND = {
    "words": lambda: models.WordLevel(WORDS, unk_token="[X]"),
    "pieces": lambda: models.WordPiece(WORDS, unk_token="[X]"),
    "pairs": lambda: models.BPE(
        {**WORDS, **{c: 9 + at for at, c in enumerate("nowrds")}}, [], unk_token="[X]"
    ),
    "likely": lambda: models.Unigram(
        [(word, -float(at)) for at, word in enumerate(WORDS)], unk_id=0
    ),
    "ends too": lambda: models.WordLevel({**WORDS, "[E]": 0, "[X]": 1}, unk_token="[E]"),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_an_unknown_token_that_only_the_model_knows_is_unknown(kind: str) -> None:
    tokenizer = made_by_hand(BY_HAND[kind]())
    assert tokenizer.unk_token is None
    [found] = Reader(tokenizer).whole(["known zebra words"])
    assert found.unknown_bytes >= 4
    assert not Reader(tokenizer).is_lossless
    tokenizer.chat_template = TEMPLATE.replace("\n", " [E]")
    messages = (
        {"role": "user", "content": "known"},
        {"role": "assistant", "content": "zebra words"},
    )
    said = causal(Document("", messages=messages), tokenizer)
    assert said.unknown_bytes >= 4
    assert said.ends.sum() == 1  # the one that the template writes


def test_a_byte_that_a_vocabulary_lacks_is_unread() -> None:
    whole, poor = (byte_level(eos_token="</s>") for _ in range(2))
    state = json.loads(poor.backend_tokenizer.to_str())
    state["model"]["vocab"] = {
        word: at for word, at in state["model"]["vocab"].items() if "q" not in word
    }
    state["model"]["merges"] = [
        pair for pair in state["model"]["merges"] if "q" not in "".join(pair)
    ]
    poor = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>"
    )
    assert Reader(whole).is_lossless
    assert not Reader(poor).is_lossless
    [found] = Reader(poor).whole(["quite quick"])
    assert found.unknown_bytes == 2


@pytest.mark.parametrize(
    ("normalizer", "lost"),
    [
        (normalizers.Replace("gone", ""), 4),
        (normalizers.Replace(Regex("[0-9]+"), " "), 2),
        (normalizers.NFC(), 0),
        (
            normalizers.Sequence(
                [normalizers.NFKC(), normalizers.Sequence([normalizers.Replace("what", "")])]
            ),
            4,
        ),
        (normalizers.Sequence([normalizers.Lowercase(), normalizers.NFD()]), 0),
    ],
)
def test_what_a_normalizer_takes_out_is_unread(normalizer: Any, lost: int) -> None:
    tokenizer = byte_level(eos_token="</s>")
    tokenizer.backend_tokenizer.normalizer = normalizer
    [found] = Reader(tokenizer).whole(["what is gone with 42"])
    assert found.unknown_bytes == lost
    assert Reader(tokenizer).is_lossless is (lost == 0)
