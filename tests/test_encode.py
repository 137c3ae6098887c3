"""Tokens of documents, against hand-derived masks; what is encoded again comes from memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from make_assess_models import byte_tokenizer

from pipeline.data import encode
from pipeline.data.documents import Document
from pipeline.data.encode import encode_all
from pipeline.errors import UserError
from pipeline.tasks.table import Task

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% if m['role'] == 'assistant'"
    " %}|{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(autouse=True)
def forget() -> None:
    encode._KEPT.clear()


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns: tuple[str, str]) -> Document:
    return Document(
        "", messages=tuple({"role": role, "content": content} for role, content in turns)
    )


def test_loss_is_taken_on_what_the_assistant_says_and_nowhere_else() -> None:
    document = chat(
        ("system", "S"), ("user", "hi"), ("assistant", "yo"), ("user", "q"), ("assistant", "answer")
    )
    (encoded,) = encode_all([document], chat_tokenizer(), Task.causal_lm, max_length=99)
    text = byte_tokenizer().decode(encoded.input_ids)
    assert text == "[s]S[u]hi[a]yo|[u]q[a]answer|"
    said = "".join(
        character if target else "."
        for character, target in zip(text, encoded.targets, strict=True)
    )
    assert said == "." * len("[s]S[u]hi[a]") + "yo|" + "." * len("[u]q[a]") + "answer|"
    assert encoded.num_bytes == len("yo|") + len("answer|")  # of what is rendered and predicted


def test_a_conversation_that_ends_with_the_user_predicts_what_came_before() -> None:
    (encoded,) = encode_all(
        [chat(("user", "a"), ("assistant", "b"), ("user", "c"))],
        chat_tokenizer(),
        Task.causal_lm,
        max_length=9,
    )
    assert byte_tokenizer().decode(encoded.input_ids) == "[u]a[a]b|"
    assert encoded.targets.sum() == 2


def test_chats_need_a_template_in_which_answers_are_found() -> None:
    document = chat(("user", "a"), ("assistant", "b"))
    with pytest.raises(UserError, match="the model has no chat template"):
        encode_all([document], chat_tokenizer(None), Task.causal_lm, max_length=9)
    changing = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    )
    with pytest.raises(
        UserError, match=r"the answers of document 1 of test \('a'\) are not to be found"
    ):
        encode_all([document], chat_tokenizer(changing), Task.causal_lm, max_length=9, split="test")


def test_a_token_that_joins_prompt_and_answer_belongs_to_the_answer() -> None:
    """With `: yo` merged into one token, the prompt's last token is not in the whole."""
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.add_tokens([":yo"])
    document = chat(("user", "q"), ("assistant", "yo"), ("user", "w"), ("assistant", "no"))
    (encoded,) = encode_all([document], tokenizer, Task.causal_lm, max_length=9)
    tokens = [tokenizer.decode([token]) for token in encoded.input_ids]
    assert tokens == [
        "u",
        ":",
        "q",
        ";",
        "a",
        ":yo",
        ";",
        "u",
        ":",
        "w",
        ";",
        "a",
        ":",
        "n",
        "o",
        ";",
    ]
    assert [token for token, target in zip(tokens, encoded.targets, strict=True) if target] == [
        ":yo",
        ";",
        "n",
        "o",
        ";",
    ]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            r"refuses the chat 'a' \(roles must alternate\); drop",
        ),
        ("{{ oops( }}", "refuses the chat 'a'"),
        ("{{ messages[7]['x']['y'] }}", "refuses the chat 'a'"),
        ("{{ '' }}", "the chat 'a' has nothing to predict; drop it"),
    ],
)
def test_a_template_that_cannot_take_a_chat_is_said_in_one_line(template: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        encode_all(
            [chat(("user", "a"), ("assistant", "b"))],
            chat_tokenizer(template),
            Task.causal_lm,
            max_length=9,
        )
    assert len(str(refused.value).splitlines()) == 1


def test_a_tokenizer_without_begin_and_end_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a begin nor an end token"):
        encode_all([Document("a")], tokenizer, Task.causal_lm, max_length=9)


def test_text_begins_and_ends_and_its_first_token_is_no_target() -> None:
    (encoded,) = encode_all([Document("aé")], byte_tokenizer(), Task.causal_lm, max_length=2)
    assert [int(encoded.input_ids[0]), int(encoded.input_ids[-1])] == [1, 2]
    # é is two bytes; the end is predicted
    assert encoded.targets.tolist() == [False, True, True, True, True]
    assert encoded.num_bytes == 3


def test_a_long_text_is_cut_at_a_character() -> None:
    (encoded,) = encode_all(
        [Document("aéb")], byte_tokenizer(), Task.causal_lm, max_length=9, max_bytes=2
    )
    assert byte_tokenizer().decode(encoded.input_ids, skip_special_tokens=True) == "a"
    assert encoded.num_bytes == 1


def test_examples_are_cut_to_their_length_and_keep_their_label() -> None:
    (encoded,) = encode_all(
        [Document("abcdef", 2)], byte_tokenizer(), Task.sequence_classification, max_length=4
    )
    assert len(encoded.input_ids) == 4
    assert encoded.label == 2
    assert not encoded.targets.any()


@pytest.mark.parametrize("task", list(Task))
def test_a_text_without_tokens_is_refused(task: Task) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("x", "")
    with pytest.raises(UserError, match="has no tokens"):
        encode_all([Document("xx", 0)], tokenizer, task, max_length=9)


def test_the_same_documents_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = encode._encode
    monkeypatch.setattr(
        encode, "_encode", lambda documents, *rest: (calls.append(1), original(documents, *rest))[1]
    )
    documents = [Document("one"), Document("two")]

    def again(given: list[Document], tokenizer: Any = None, **more: Any) -> list[Any]:
        return encode_all(
            given, tokenizer or byte_tokenizer(), Task.causal_lm, **{"max_length": 9, **more}
        )

    first, second = again(documents), again(documents)  # two tokenizers of the same content
    assert len(calls) == 1
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
    first.clear()  # the caller's list is the caller's
    assert len(again(documents)) == 2
    again(documents[::-1])
    again(documents, max_bytes=2)
    again(documents, chat_tokenizer())
    other = byte_tokenizer()
    other.eos_token = "<pad>"
    again(documents, other)
    assert len(calls) == 5
    for number in range(encode.KEEP + 3):
        again([Document(f"number {number}")])
    assert len(encode._KEPT) == encode.KEEP
