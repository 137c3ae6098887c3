"""Conversations to text: what a chat template makes of them, and where in it the assistant speaks.

An answer is found by rendering. The text before it is what the template opens an assistant's turn
with (`add_generation_prompt`), or what it puts before a marked answer; its end is where the
conversation up to it ends. Templates that write an answer another way once the conversation goes on
(those of reasoning models drop earlier thoughts) give each answer a rendering of its own: the
conversation up to it, as it was when the answer was given.

What a template leaves out is found by rendering too: the text is the same without it. An
assistant's turn of which nothing is left (tool calls that the template does not write) is read and
not learnt: only its end would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from pipeline.data.documents import Document
from pipeline.data.spans import common_length
from pipeline.errors import UserError

MARK = "zq7answer7qz"  # an answer that no template trims or changes, to find where answers stand

FIELDS = {
    "tool_calls": ("tool_calls",),
    "reasoning": ("reasoning_content", "reasoning", "thinking"),
}
"""What a turn has beside its content, by the fields that templates know it under."""
READ = ("system", "tool")
"""Roles whose text a template may leave out; of an answer see `changed`, and a user's words are
always written.
"""

Turns = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A text that a model reads.

    Attributes:
        text: The whole.
        answers: Characters [begin, end) of it that are to be predicted, in order; they do not
            overlap.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What became of one conversation.

    Attributes:
        renderings: One, or one per answer where the template rewrites earlier turns; none where
            nothing is learnt.
        is_rewritten: The template rewrites earlier turns.
        opening_left_out: Assistant turns before the first user's that the template does not take.
        asked_otherwise: Answers that stand after another text than the template asks for an answer
            with.
        changed: Answers whose content the template drops parts of, or changes.
        emptied: Assistant turns of which the template leaves nothing: they are read, and not
            learnt.
        left_out: By what the template does not write, how many turns have it: `FIELDS`, a role of
            `READ` for its text, and `tools`, once for the conversation.
    """

    renderings: tuple[Rendering, ...]
    is_rewritten: bool = False
    opening_left_out: int = 0
    asked_otherwise: int = 0
    changed: int = 0
    emptied: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])


class _Refusal(Exception):
    """Why the template does not take a conversation."""


def render(document: Document, tokenizer: Any, place: str) -> Conversation:
    """Render a conversation and find its answers.

    Args:
        document: With `messages`.
        tokenizer: Its chat template gets the messages whole, and the document's tools.
        place: Where the document stands, for refusals: `document 12 of train`.

    Raises:
        UserError: If there is no chat template, it does not take this conversation, or an answer is
            not to be found.
    """
    assert document.messages is not None
    if not tokenizer.chat_template:
        raise UserError(
            "data.path",
            "holds chats but the model has no chat template",
            "use a chat model, or text",
        )
    turns = list(document.messages)
    words = first_words(document)
    spoken = f"{place} ({words!r})"
    tools = None if document.tools is None else list(document.tools)
    try:
        return _Template(tokenizer, tools).conversation(turns, spoken)
    except _Refusal as refusal:
        opening = _opening(turns)
        if opening:
            rest = [turn for number, turn in enumerate(turns) if number not in opening]
            try:
                found = _Template(tokenizer, tools).conversation(rest, spoken)
            except _Refusal:
                pass
            else:
                return replace(found, opening_left_out=len(opening))
        problem = f"{place}: the model's chat template refuses the chat {words!r} ({refusal})"
        raise UserError("data.path", problem, "drop that chat, or use another model") from None


def is_learnt(turn: dict[str, Any], place: str = "a chat") -> bool:
    """Whether a turn is to be predicted: the assistant's, unless its `weight` is 0 or its `train`
    is false.

    Raises:
        UserError: If `weight` is neither 0 nor 1, or `train` neither true nor false.
    """
    if turn.get("role") != "assistant":
        return False
    for name in ("weight", "train"):
        wanted = turn.get(name)
        if wanted is None:
            continue
        if not isinstance(wanted, bool | int | float) or wanted not in (0, 1):
            raise UserError(
                "data.path", f"{place}: a turn has {name} {wanted!r}", f"give {name} 0 or 1"
            )
        if not wanted:
            return False
    return True


def _opening(turns: Turns) -> set[int]:
    """Return the numbers of the assistant's turns that nobody has asked for."""
    asked = next(
        (
            number
            for number, turn in enumerate(turns)
            if turn.get("role") not in ("system", "developer", "assistant")
        ),
        0,
    )
    return {number for number in range(asked) if turns[number].get("role") == "assistant"}


def first_words(document: Document) -> str:
    """Return what a conversation begins with, for refusals."""
    content = document.messages[0].get("content") if document.messages else ""
    return " ".join(str(content or "").split())[:40]


def _is_changed(turn: dict[str, Any], answer: str) -> bool:
    """Whether what a turn says is not in its answer word for word."""
    content = turn.get("content")
    return isinstance(content, str) and content.strip() not in answer


def _has(turn: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(turn.get(name) for name in names)


def _with_less(turn: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return what a turn has that a template may leave out, with the turn without it."""
    found = [
        (what, {name: value for name, value in turn.items() if name not in names})
        for what, names in FIELDS.items()
        if _has(turn, names)
    ]
    if turn.get("role") in READ and str(turn.get("content") or "").strip():
        found.append((turn["role"], {**turn, "content": ""}))
    return found


class _Template:
    """A chat template with the tools that it is given."""

    def __init__(self, tokenizer: Any, tools: list[Any] | None) -> None:
        self._tokenizer, self._tools = tokenizer, tools

    def conversation(self, turns: Turns, place: str) -> Conversation:
        """Render turns up to the last answer.

        Raises:
            _Refusal: If the template does not take them.
            UserError: If an answer is not to be found.
        """
        learnt = [number for number, turn in enumerate(turns) if is_learnt(turn, place)]
        if not learnt:
            self._render(turns)  # what it refuses is refused, learnt or not
            return Conversation(())
        said = {number: self._render(turns[: number + 1]) for number in learnt}
        left_out = self._left_out(turns, said)
        kept = [
            number for number in learnt if not self._is_emptied_call(turns, number, said[number])
        ]
        begins = {number: self._begin(turns, number, said[number], place) for number in kept}
        kept = [
            number
            for number in kept
            if not (
                _is_changed(turns[number], said[number][begins[number][0] :])
                and self._is_emptied(turns, number, said[number])
            )
        ]
        emptied, learnt = len(learnt) - len(kept), kept
        if not learnt:
            return Conversation((), emptied=emptied, left_out=left_out)
        shared: dict[str, Any] = {
            "emptied": emptied,
            "left_out": left_out,
            "asked_otherwise": sum(not begins[at][1] for at in learnt),
            "changed": sum(_is_changed(turns[at], said[at][begins[at][0] :]) for at in learnt),
        }
        spans = [(begins[number][0], len(said[number])) for number in learnt]
        whole = said[learnt[-1]]
        grows = all(whole.startswith(said[number]) for number in learnt)
        apart = all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        if grows and apart:
            return Conversation((Rendering(whole, tuple(spans)),), **shared)
        each = tuple(
            Rendering(said[number], (span,)) for number, span in zip(learnt, spans, strict=True)
        )
        return Conversation(each, is_rewritten=True, **shared)

    def _left_out(self, turns: Turns, said: Mapping[int, str]) -> Counter[str]:
        """Count what stands in turns and not in the text of the first learnt turn from there on.

        Args:
            said: By learnt turn, the text up to its end.
        """
        found: Counter[str] = Counter()
        last = max(said)
        for number, turn in enumerate(turns[: last + 1]):
            until = min(at for at in said if at >= number)
            for what, without in _with_less(turn):
                less = [*turns[:number], without, *turns[number + 1 : until + 1]]
                found[what] += self._is_text_of(less, said[until])
        if self._tools is not None:
            found["tools"] += _Template(self._tokenizer, None)._is_text_of(
                turns[: last + 1], said[last]
            )
        return +found

    def _is_emptied_call(self, turns: Turns, number: int, said: str) -> bool:
        """Whether a turn has calls or thoughts and no content, and the template writes none of
        them.
        """
        turn = turns[number]
        is_blank = not str(turn.get("content") or "").strip()
        has_more = any(_has(turn, names) for names in FIELDS.values())
        return is_blank and has_more and self._is_emptied(turns, number, said)

    def _is_emptied(self, turns: Turns, number: int, said: str) -> bool:
        """Whether a turn that says nothing has the same text."""
        content = turns[number].get("content")
        nothing = {"role": "assistant", "content": "" if str(content or "").strip() else content}
        return bool(said) and self._is_text_of([*turns[:number], nothing], said)

    def _is_text_of(self, turns: Turns, text: str) -> bool:
        try:
            return self._render(turns) == text
        except _Refusal:
            return False  # what it cannot do without is no more left out

    def _begin(self, turns: Turns, number: int, said: str, place: str) -> tuple[int, bool]:
        """Return the character at which an answer begins, and whether the text before it is the
        asking one.
        """
        prompt = self._render(turns[:number], ask=True) if number else None
        if prompt is not None and said.startswith(prompt):
            return len(prompt), True
        header = self._header(turns[:number])
        if header is not None and said.startswith(header):
            return len(header), prompt is None
        before = self._render(turns[:number]) if number else ""
        shared = min(
            common_length(said, each) for each in (prompt, header, said) if each is not None
        )
        if (
            (prompt is None and header is None)
            or not said.startswith(before)
            or shared < len(before)
        ):
            problem = (
                f"the answers of {place} are not to be found in what the model's chat template"
                " makes of it"
            )
            raise UserError("data.path", problem, "use one-turn chats, text, or another model")
        return shared, True

    def _header(self, before: Turns) -> str | None:
        """Return what the template writes up to the content of an assistant's turn; None if it
        keeps no content.
        """
        try:
            text = self._render([*before, {"role": "assistant", "content": MARK}])
        except _Refusal:
            return None
        header, mark, _ = text.rpartition(MARK)
        return header if mark else None

    def _render(self, turns: Turns, *, ask: bool = False) -> str:
        """Return the text of turns.

        Args:
            ask: Open an assistant's turn at the end.

        Raises:
            _Refusal: If the template fails on them. It is a program of whoever made the model: what
                an operation on data of another shape raises is its refusal.
        """
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                turns, tools=self._tools, tokenize=False, add_generation_prompt=ask
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise _Refusal(" ".join(str(error).split())[:200] or type(error).__name__) from None
