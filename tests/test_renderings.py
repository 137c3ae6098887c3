"""Chat templates of many kinds: what is learnt of a conversation, to the character, and its
bytes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_assess_models import byte_tokenizer, tiny
from test_encode import forget  # noqa: F401  (a fixture)

from pipeline.data.documents import Dataset, Document
from pipeline.data.encode import check_chats, encode_all, encoding_notes
from pipeline.data.renderings import render
from pipeline.errors import UserError
from pipeline.runs.preflight import _check_reads
from pipeline.tasks.table import Task

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m.get('tool_calls') %}{% for call in"
    " m['tool_calls'] %}<call>{{ call['function']['name'] }}{% endfor %}{% else %}{{ m['content']"
    " }}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TOOLS = "{% if tools %}[{% for tool in tools %}{{ tool['name'] }}{% endfor %}]{% endif %}" + CHATML
# opens no thought; only the last answer keeps its thoughts, an empty one where it has none
REASONING = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last"
    " %}<think>{{ m.get('reasoning_content') or '' }}</think>{% endif %}{{ m['content'] }}</s>\n{%"
    " endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
OPENS_THOUGHTS = (  # asks with an opened thought, and drops what is thought in all answers
    "{% for m in messages %}{% if m['role'] == 'user' %}[U]{{ m['content'] }}{% else %}[A]"
    "{{ m['content'].split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
THINKS_ALOUD = (  # asks with an opened thought that the last answer goes on with
    "{% for m in messages %}{% if m['role'] == 'user' %}[U]{{ m['content'] }}{% else %}[A]{% if"
    " loop.last %}<think>\n{{ m.get('reasoning_content', '') }}</think>{% endif %}{{ m['content']"
    " }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
# as Llama 2's: refuses an assistant who speaks first, trims, ends with its end token
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{"
    " raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[INST] {{"
    " m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} </s>{% endif %}{%"
    " endfor %}"
)
SYSTEM_LAST = (  # the system's words stand in the last turn, and only if that is the user's
    "{% for m in messages %}{% if m['role'] == 'user' %}[I]{% if loop.last %}{% for s in messages"
    " if s['role'] == 'system' %}{{ s['content'] }}: {% endfor %}{% endif %}{{ m['content']"
    " }}[/I]{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENDS_ONCE = (  # its end token ends the whole, not each turn
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% if loop.last %}</s>{% endif"
    " %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
OF_TWO = (  # writes what is asked and answered, and nothing else
    "{% for m in messages %}{% if m['role'] == 'user' %}[U]{{ m['content'] }}{% elif m['role'] =="
    " 'assistant' %}[A]{{ m['content'] }}</s>{% endif %}{% endfor %}{% if add_generation_prompt"
    " %}[A]{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<s>system\nhelp</s>\n{% endif %}" + CHATML


def tokenizer_of(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns: Any, tools: Any = None) -> Document:
    """Return a conversation of "u: ..", "a: ..", "s: .." and whole messages."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [
        turn if isinstance(turn, dict) else {"role": roles[turn[0]], "content": turn[3:]}
        for turn in turns
    ]
    return Document("", messages=tuple(messages), tools=tools)


def learnt(document: Document, template: str) -> list[str]:
    """Return each rendering with what is learnt of it in braces."""
    tokenizer = tokenizer_of(template)
    found: list[str] = []
    for each in encode_all([document], tokenizer, Task.causal_lm, max_length=0):
        text, inside, num_bytes = "", False, 0
        for at, (token, target) in enumerate(
            zip(each.input_ids.tolist(), each.targets.tolist(), strict=True)
        ):
            is_end = each.ends is not None and bool(each.ends[at])
            num_bytes += int(target and not is_end)
            text += "{" if target and not inside else "}" if inside and not target else ""
            text, inside = text + tokenizer.decode([token]), bool(target)
        assert each.num_bytes == num_bytes  # a token is a byte here, and an end is none
        found.append(text + ("}" if inside else ""))
    return found


def notes(document: Document, template: str) -> list[str]:
    return encoding_notes([document], tokenizer_of(template), Task.causal_lm, max_length=0)


THOUGHT = {"role": "assistant", "content": "two", "reasoning_content": "hm"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
CASES = {
    "all turns in one": (
        CHATML,
        chat("u: q", "a: one", "u: r", "a: two"),
        ["<s>user\nq</s>\n<s>assistant\n{one</s>\n}<s>user\nr</s>\n<s>assistant\n{two</s>\n}"],
    ),
    "tools and calls": (
        TOOLS,
        chat("u: q", CALL, "t: 42", "a: it is 42", tools=({"name": "look"},)),
        [
            "[look]<s>user\nq</s>\n<s>assistant\n{<call>look</s>\n}<s>tool\n42</s>\n"
            "<s>assistant\n{it"
            " is 42</s>\n}"
        ],
    ),
    "an assistant who speaks first": (
        CHATML,
        chat("a: hi", "u: q", "a: one"),
        ["<s>assistant\n{hi</s>\n}<s>user\nq</s>\n<s>assistant\n{one</s>\n}"],
    ),
    "who speaks first after a system's words that the template adds": (
        DEFAULT_SYSTEM,
        chat("a: hi", "u: q"),
        ["<s>system\nhelp</s>\n<s>assistant\n{hi</s>\n}"],
    ),
    "who speaks first and is not taken": (
        ALTERNATES,
        chat("a: hi", "u: q", "a: one"),
        ["[INST] q [/INST]{ one </s>}"],
    ),
    "blanks trimmed": (ALTERNATES, chat("u:  q ", "a:   one  "), ["[INST] q [/INST]{ one </s>}"]),
    "thoughts of the last answer alone": (
        REASONING,
        chat("u: q", {**THOUGHT, "content": "one"}, "u: r", THOUGHT),
        [
            "<s>user\nq</s>\n<s>assistant\n{<think>hm</think>one</s>\n}",
            "<s>user\nq</s>\n<s>assistant\none</s>\n<s>user\nr</s>\n"
            "<s>assistant\n{<think>hm</think>two</s>\n}",
        ],
    ),
    "thoughts dropped": (
        OPENS_THOUGHTS,
        chat("u: q", "a: <think>hm</think><b>one"),
        ["[U]q[A]{<b>one</s>}"],
    ),
    "thoughts gone on with": (
        THINKS_ALOUD,
        chat("u: q", THOUGHT, "u: r", THOUGHT),
        [
            "[U]q[A]<think>\n{hm</think>two</s>}",
            "[U]q[A]two</s>[U]r[A]<think>\n{hm</think>two</s>}",
        ],
    ),
    "system's words in the last turn": (
        SYSTEM_LAST,
        chat("s: be", "u: q", "a: one"),
        ["[I]q[/I]{one</s>}"],
    ),
    "an end of the whole": (
        ENDS_ONCE,
        chat("u: q", "a: one", "u: r", "a: two"),
        [
            "user: q\nassistant: {one\n</s>}",
            "user: q\nassistant: one\nuser: r\nassistant: {two\n</s>}",
        ],
    ),
    "turns of weight 0": (
        CHATML,
        chat(
            "u: q",
            {"role": "assistant", "content": "bad", "weight": 0},
            "u: r",
            {"role": "assistant", "content": "good", "weight": 1},
            "u: s",
            {"role": "assistant", "content": "no", "train": False},
        ),
        ["<s>user\nq</s>\n<s>assistant\nbad</s>\n<s>user\nr</s>\n<s>assistant\n{good</s>\n}"],
    ),
    "calls that are not written": (
        BARE,
        chat("u: q", CALLED, "t: 42", "a: it is 42", "u: r", {**CALLED, "content": "I look"}),
        ["user: q\nassistant: \ntool: 42\nassistant: {it is 42\n}user: r\nassistant: {I look\n}"],
    ),
    "calls and thoughts that are not written, and nothing else": (
        BARE,
        chat("u: q", {**CALLED, "thinking": "hm"}, "t: 42"),
        [],
    ),
    "a thought that is dropped, and nothing else": (
        OPENS_THOUGHTS,
        chat("u: q", "a: <think>hm</think>", "u: r", "a: <think>so</think>two"),
        ["[U]q[A]</s>[U]r[A]{two</s>}"],
    ),
    "a thought that is written, and nothing else": (
        REASONING,
        chat("u: q", {**THOUGHT, "content": ""}),
        ["<s>user\nq</s>\n<s>assistant\n{<think>hm</think></s>\n}"],
    ),
    "an answer of nothing": (BARE, chat("u: q", "a: "), ["user: q\nassistant: {\n}"]),
    "results and a system that are not written": (
        OF_TWO,
        chat("s: be", "u: q", CALLED, "t: 42", "a: it is 42"),
        ["[U]q[A]</s>[A]{it is 42</s>}"],
    ),
    "nothing to learn": (
        CHATML,
        chat("u: q", {"role": "assistant", "content": "bad", "weight": 0}),
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt_of_a_conversation(case: str) -> None:
    template, document, wanted = CASES[case]
    assert learnt(document, template) == wanted


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "thoughts of the last answer alone",
            "rewrites earlier turns: 1 conversation is learnt as 2 examples",
        ),
        (
            "who speaks first and is not taken",
            "1 assistant turn before the first user turn is left out",
        ),
        ("thoughts dropped", "changes 1 answer, or leaves parts of it out"),
        ("system's words in the last turn", "1 answer follows another text than the one"),
        ("nothing to learn", "1 conversation has no turn to learn"),
        ("calls that are not written", "the chat template leaves out the tool calls of 2 turns"),
        (
            "calls that are not written",
            "1 assistant turn of which the chat template leaves nothing is read, and not",
        ),
        (
            "calls and thoughts that are not written, and nothing else",
            "the chat template leaves out the tool calls of 1 turn, the reasoning of 1 turn",
        ),
        (
            "calls and thoughts that are not written, and nothing else",
            "1 conversation has no turn to learn",
        ),
        (
            "a thought that is dropped, and nothing else",
            "1 assistant turn of which the chat template leaves nothing",
        ),
        (
            "results and a system that are not written",
            (
                "leaves out the tool calls of 1 turn, the text of 1 tool turn, the text of 1"
                " system turn"
            ),
        ),
    ],
)
def test_what_a_template_does_is_said(case: str, said: str) -> None:
    template, document, _ = CASES[case]
    assert any(said in note for note in notes(document, template))
    assert notes(chat("u: q", "a: one"), CHATML) == []


@pytest.mark.parametrize(
    "case",
    [
        "tools and calls",
        "thoughts of the last answer alone",
        "thoughts gone on with",
        "a thought that is written, and nothing else",
        "an answer of nothing",
    ],
)
def test_what_is_written_is_not_said_to_be_left_out(case: str) -> None:
    template, document, _ = CASES[case]
    assert not any("leaves" in note for note in notes(document, template))


def test_tools_that_a_template_does_not_write_are_counted_by_conversation() -> None:
    documents = [chat("u: q", "a: one", tools=({"name": f"t{number}"},)) for number in range(3)]
    said = encoding_notes(documents, tokenizer_of(CHATML), Task.causal_lm, max_length=0)
    assert said == ["the chat template leaves out the tools of 3 conversations"]
    assert encoding_notes(documents, tokenizer_of(TOOLS), Task.causal_lm, max_length=0) == []


@pytest.mark.parametrize("case", CASES)
def test_a_check_without_tokens_says_what_encoding_says(case: str) -> None:
    template, document, wanted = CASES[case]
    documents = [document, chat("u: q", "a: one")]
    said = encoding_notes(documents, tokenizer_of(template), Task.causal_lm, max_length=0)
    assert check_chats(documents, tokenizer_of(template), "train").notes() == said
    if not wanted:
        with pytest.raises(
            UserError, match="no conversation of test has a turn to learn in what the model's chat"
        ):
            check_chats([document], tokenizer_of(template), "test")


def test_what_a_template_does_with_every_split_is_known_before_anything_is_trained() -> None:
    # tokens are looked at of 64
    train = [chat("u: q", CALLED, f"t: {number}", "a: one") for number in range(80)]
    data = Dataset(
        "d",
        "0",
        {"train": tuple(train), "validation": (chat("u: q", "a: one"),), "test": tuple(train[:2])},
    )
    run: Any = SimpleNamespace(task=Task.causal_lm, training=SimpleNamespace(sequence_length=64))
    found = _check_reads("model.path", tiny(Task.causal_lm).config, tokenizer_of(OF_TWO), run, data)
    lost = "the chat template leaves out the tool calls of {0} turns, the text of {0} tool turns"
    assert [each for each in found if "leaves out" in each] == [
        f"train split: {lost.format(80)}",
        f"test split: {lost.format(2)}",
    ]
    said = encoding_notes(train, tokenizer_of(OF_TWO), Task.causal_lm, max_length=0)
    assert [f"train split: {each}" for each in said] == [
        each for each in found if each.startswith("train")
    ]


def test_a_template_without_an_end_of_turn_is_said() -> None:
    assert notes(chat("u: q", "a: one"), BARE) == [
        "the chat template ends no answer with a special token: no stop is learnt"
    ]
    [encoded] = encode_all(
        [chat("u: q", "a: one")], tokenizer_of(BARE), Task.causal_lm, max_length=0
    )
    assert encoded.ends is None


def test_a_rewritten_conversation_is_one_document() -> None:
    template, document, _ = CASES["thoughts gone on with"]
    encoded = encode_all(
        [document, chat("u: x", "a: y")], tokenizer_of(template), Task.causal_lm, max_length=0
    )
    assert [each.digest for each in encoded] == [document.digest] * 2 + [
        chat("u: x", "a: y").digest
    ]


@pytest.mark.parametrize("turn", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}])
def test_weights_are_0_or_1(turn: dict[str, Any]) -> None:
    document = chat("u: q", {"role": "assistant", "content": "one", **turn})
    with pytest.raises(
        UserError, match=r"document 1 of train .*: a turn has .*; give (weight|train) 0 or 1"
    ):
        encode_all([document], tokenizer_of(CHATML), Task.causal_lm, max_length=0, split="train")


def test_every_chat_is_rendered_before_anything_is_trained() -> None:
    """The one that the template refuses stands far behind those whose tokens are looked at."""
    fine = [chat("u: q", f"a: {number}") for number in range(300)]
    bad = chat("u: first words", "u: again", "a: one")
    check_chats(fine, tokenizer_of(ALTERNATES), "train")
    with pytest.raises(
        UserError, match=r"document 301 of train: .* refuses the chat 'first words' \(roles must"
    ):
        check_chats([*fine, bad], tokenizer_of(ALTERNATES), "train")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[0]['content'].nothing() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['x']['y'] }}",
    ],
)
def test_a_template_that_fails_on_a_conversation_is_one_line(template: str) -> None:
    with pytest.raises(UserError, match="refuses the chat 'q'") as refused:
        encode_all([chat("u: q", "a: one")], tokenizer_of(template), Task.causal_lm, max_length=0)
    assert "\n" not in str(refused.value)


WORDS = st.text(st.sampled_from("abc <>/\né\U0001f99c"), min_size=1, max_size=8).filter(
    lambda text: text.strip()
)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
@pytest.mark.parametrize(
    "template", [CHATML, REASONING, THINKS_ALOUD, ALTERNATES, SYSTEM_LAST, BARE, ENDS_ONCE]
)
def test_every_answer_is_learnt_once_and_nothing_of_a_user(
    template: str, turns: list[tuple[str, str]]
) -> None:
    turns = [(f"Q{asked}", said) for asked, said in turns]
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    conversation = render(
        Document("", messages=tuple(messages)), tokenizer_of(template), "document 1"
    )
    spans = [each.text[slice(*span)] for each in conversation.renderings for span in each.answers]
    assert len(spans) == len(turns)
    for (_, said), span in zip(turns, spans, strict=True):
        assert said.strip() in span
        assert "Q" not in span
