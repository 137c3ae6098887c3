"""Documents to tokens: what is read, what is to be predicted, and how many bytes that stands
for.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.documents import Document
from pipeline.data.renderings import Rendering, first_words, render
from pipeline.data.spans import Covered, Reader, utf8
from pipeline.errors import UserError
from pipeline.ledger.numbers import agreed, how_many
from pipeline.store.artifacts import key_of
from pipeline.tasks.table import Task

LEFT_OUT = {
    "tools": ("tools", "conversation"),
    "tool_calls": ("tool calls", "turn"),
    "reasoning": ("reasoning", "turn"),
    "tool": ("text", "tool turn"),
    "system": ("text", "system turn"),
}
"""How a note says what a chat template leaves out (`Conversation.left_out`), and of what."""
CHUNK = 256  # documents whose offsets are held at a time


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded document, or one answer of a conversation whose template rewrites earlier turns.

    Attributes:
        input_ids: int32 (L,).
        targets: bool (L,): the tokens to be predicted; never the first.
        num_bytes: UTF-8 bytes of the text that the targets stand for, `ends` left out.
        label: Class index; None without one.
        digest: Content digest of the document; neighbours that share it are one document.
        group: The source that it shares with others; None: a source of its own.
        token_type_ids: int32 (L,): the part of the text that each token is of; None: all of the
            first.
        ends: bool (L,): targets that stand for no text but for its end (end of text, of a turn);
            None: none does.
        unknown_bytes: Those of `num_bytes` under unknown tokens, or under no token.
        unread_bytes: UTF-8 bytes of the document beyond the limit.
        unread_tokens: Tokens of an example beyond the limit.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    num_bytes: int
    label: int | None
    digest: str
    group: str | None = None
    token_type_ids: np.ndarray | None = None
    ends: np.ndarray | None = None
    unknown_bytes: int = 0
    unread_bytes: int = 0
    unread_tokens: int = 0


@dataclass(slots=True)
class Reading:
    """What encoding did that a reader must know, as counts.

    Attributes:
        documents: All of them.
        cut: Documents (or examples) of which a part is not read.
        unread_bytes: Theirs, of `bytes`.
        unread_tokens: Theirs, of `tokens` (classification).
        rewritten: Conversations that became several examples, `renderings` in all.
        opening_left_out: Assistant turns, before the first user's, that the template does not take.
        asked_otherwise: Answers after another text than the template asks for one with.
        changed: Answers whose content the template drops parts of, or changes.
        emptied: Assistant turns of which the template leaves nothing.
        left_out: By what the template leaves out (`LEFT_OUT`), of how many turns or conversations.
        unlearnt: Conversations without a turn to learn.
        chats: Conversations that are learnt; `unended` of them have no special token in any answer.
    """

    documents: int = 0
    cut: int = 0
    bytes: int = 0
    unread_bytes: int = 0
    tokens: int = 0
    unread_tokens: int = 0
    rewritten: int = 0
    renderings: int = 0
    opening_left_out: int = 0
    asked_otherwise: int = 0
    changed: int = 0
    emptied: int = 0
    left_out: Counter[str] = field(default_factory=Counter[str])
    unlearnt: int = 0
    chats: int = 0
    unended: int = 0

    def add(self, **counts: int) -> None:
        """Add to counts by name."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)

    def notes(self) -> list[str]:
        """Return a sentence for whatever happened."""
        said: list[str] = []
        if self.unread_tokens:
            said.append(
                f"{self._cut_of('example')}: "
                f"{self.unread_tokens / self.tokens:.1%} of the tokens are not read"
            )
        if self.unread_bytes:
            said.append(
                f"{self._cut_of('document')}: "
                f"{self.unread_bytes / self.bytes:.1%} of the bytes are not read"
            )
        if self.rewritten:
            said.append(
                "the chat template rewrites earlier turns:"
                f" {how_many(self.rewritten, 'conversation is', 'conversations are')} learnt as"
                f" {how_many(self.renderings, 'example')}, each answer in its own rendering"
            )
        if self.asked_otherwise:
            said.append(
                f"{how_many(self.asked_otherwise, 'answer follows', 'answers follow')} another text"
                " than the one that the chat template asks for an answer with"
            )
        if self.changed:
            said.append(
                f"the chat template changes {how_many(self.changed, 'answer')}, or leaves parts of"
                f" {agreed(self.changed, 'it', 'them')} out"
            )
        if self.left_out:
            parts = [
                f"the {what_of} of {how_many(self.left_out[what], noun)}"
                for what, (what_of, noun) in LEFT_OUT.items()
                if self.left_out[what]
            ]
            said.append(f"the chat template leaves out {', '.join(parts)}")
        if self.emptied:
            said.append(
                f"{how_many(self.emptied, 'assistant turn')} of which the chat template leaves"
                f" nothing {agreed(self.emptied, 'is', 'are')} read, and not learnt"
            )
        if self.opening_left_out:
            said.append(
                f"{how_many(self.opening_left_out, 'assistant turn')} before the first user turn"
                f" {agreed(self.opening_left_out, 'is', 'are')} left out: the chat template does"
                f" not take {agreed(self.opening_left_out, 'it', 'them')}"
            )
        if self.unlearnt:
            said.append(
                how_many(
                    self.unlearnt,
                    "conversation has no turn to learn and is left out",
                    "conversations have no turn to learn and are left out",
                )
            )
        if self.chats and self.unended == self.chats:
            said.append("the chat template ends no answer with a special token: no stop is learnt")
        return said

    def _cut_of(self, noun: str) -> str:
        return f"{self.cut} of {how_many(self.documents, noun)} {agreed(self.cut, 'is', 'are')} cut"


Numbered = Sequence[tuple[int, Document]]
"""Documents with their numbers in their split, from 1."""
ByNumber = dict[int, list[Encoded]]
_KEPT: OrderedDict[str, tuple[list[Encoded], Reading]] = OrderedDict()
"""What this process encoded last, by what decides it: stages read the same documents again and
again.
"""
KEEP = 6


def encode_all(
    documents: Sequence[Document],
    tokenizer: Any,
    task: Task,
    *,
    max_length: int,
    max_bytes: int | None = None,
    split: str = "",
) -> list[Encoded]:
    """Encode documents; the same ones again, by a tokenizer of the same content, come from memory.

    A text is one example, beginning with the tokenizer's begin token (or its end token, without
    one) and ending with its end token unless it is cut. Of a prompt with its completion only the
    completion is predicted, of a conversation only what the assistant says: see `renderings.py`. A
    conversation may become several examples, or none.

    Args:
        max_length: Tokens an example of classification is cut to; causal LM reads documents whole.
        max_bytes: Causal LM reads only the head of longer texts and completions, cut at a
            character.
        split: Where the documents come from, for refusals.

    Raises:
        UserError: If a text has no tokens, or a chat is refused by its template.
    """
    return list(_kept(documents, tokenizer, task, max_length, max_bytes, split)[0])


def encoding_notes(
    documents: Sequence[Document], tokenizer: Any, task: Task, *, max_length: int
) -> list[str]:
    """Return what `encode_all` does with these documents that a reader must know; whole ones, as
    training reads.
    """
    return _kept(documents, tokenizer, task, max_length, None, "train")[1].notes()


def _kept(
    documents: Sequence[Document],
    tokenizer: Any,
    task: Task,
    max_length: int,
    max_bytes: int | None,
    split: str,
) -> tuple[list[Encoded], Reading]:
    key = key_of(
        documents=[(document.digest, document.label, document.group) for document in documents],
        tokenizer=tokenizer_content(tokenizer),
        task=task,
        max_length=max_length if task.kind.labelled else None,
        max_bytes=max_bytes,
    )
    if key not in _KEPT:
        _KEPT[key] = _encode(documents, tokenizer, task, max_length, max_bytes, split)
        while len(_KEPT) > KEEP:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return _KEPT[key]


def tokenizer_content(tokenizer: Any) -> str:
    """Return a digest of all that decides how a tokenizer encodes; of a slow one, of the files that
    it saves.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = hashlib.sha256()
    if backend is not None:
        backend.no_truncation()  # of the last call; the next one sets its own
        backend.no_padding()
        whole.update(backend.to_str().encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    whole.update(file.name.encode() + b"\0" + file.read_bytes())
        whole.update(
            key_of(kind=type(tokenizer).__qualname__, vocabulary=tokenizer.get_vocab()).encode()
        )
    special = [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        tokenizer.all_special_ids,
    ]
    sides = [getattr(tokenizer, name, None) for name in ("truncation_side", "model_input_names")]
    whole.update(repr([special, sides, tokenizer.chat_template]).encode())
    return whole.hexdigest()


def _encode(
    documents: Sequence[Document],
    tokenizer: Any,
    task: Task,
    max_length: int,
    max_bytes: int | None,
    split: str,
) -> tuple[list[Encoded], Reading]:
    reading, encoded = Reading(documents=len(documents)), list[Encoded]()
    reader = Reader(tokenizer)
    for start in range(0, len(documents), CHUNK):
        some = list(enumerate(documents[start : start + CHUNK], start + 1))
        if task.kind.labelled:
            encoded += _examples([document for _, document in some], tokenizer, max_length, reading)
            continue
        by_place: ByNumber = {}
        for kind in (_texts, _completions, _chats):
            by_place |= kind(some, tokenizer, reader, max_bytes, split, reading)
        encoded += [each for place in sorted(by_place) for each in by_place[place]]
    return encoded, reading


def place_of(number: int, split: str) -> str:
    """Return how a refusal names a document: `document 12 of train`."""
    return f"document {number}{f' of {split}' if split else ''}"


def _head(text: str, max_bytes: int | None) -> str:
    raw = text.encode("utf-8", "replace")
    return (
        text
        if max_bytes is None or len(raw) <= max_bytes
        else raw[:max_bytes].decode("utf-8", "ignore")
    )


def _texts(
    some: Numbered,
    tokenizer: Any,
    reader: Reader,
    max_bytes: int | None,
    split: str,
    reading: Reading,
) -> ByNumber:
    """Encode plain texts, by number: all of a text is predicted, and after it its end."""
    chosen = [(number, each) for number, each in some if each.messages is None and not each.prompt]
    texts = [_head(document.text, max_bytes) for _, document in chosen]
    found: ByNumber = {}
    for (number, document), text, each in zip(chosen, texts, reader.whole(texts), strict=True):
        _refuse_pair(document, number, split)
        if not len(each.ids):
            problem = f"{place_of(number, split)}: the text {text[:40]!r} has no tokens"
            raise UserError("data", problem, "drop it, or check the tokenizer")
        found[number] = [
            _framed(document, each, tokenizer, utf8(document.text) - utf8(text), reading)
        ]
    return found


def _completions(
    some: Numbered,
    tokenizer: Any,
    reader: Reader,
    max_bytes: int | None,
    split: str,
    reading: Reading,
) -> ByNumber:
    """Encode prompts with their completions, by number: a token that joins the two belongs to the
    completion.
    """
    chosen = [(number, each) for number, each in some if each.messages is None and each.prompt]
    prompts = [document.prompt or "" for _, document in chosen]
    texts = [_head(document.text, max_bytes) for _, document in chosen]
    spans = [
        [(len(prompt), len(prompt) + len(text))]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    wholes = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    found: ByNumber = {}
    # A begin token goes before it, so that a completion may begin with the first token.
    for (number, document), text, each in zip(
        chosen, texts, reader.cover(wholes, spans, after_begin=True), strict=True
    ):
        _refuse_pair(document, number, split)
        if not each.targets.any():
            problem = (
                f"{place_of(number, split)}: the completion {text[:40]!r} has nothing to predict"
            )
            raise UserError("data", problem, "drop it, or check the tokenizer")
        found[number] = [
            _framed(document, each, tokenizer, utf8(document.text) - utf8(text), reading)
        ]
    return found


def _refuse_pair(document: Document, number: int, split: str) -> None:
    if document.pair is not None:
        problem = (
            f"{place_of(number, split)} is a pair of texts, which task=causal_lm does not read"
        )
        raise UserError("data", problem, "use task=sequence_classification, or give one text")


def _framed(
    document: Document, covered: Covered, tokenizer: Any, unread: int, reading: Reading
) -> Encoded:
    """Return a text's tokens between begin and end; a text that is cut does not end there."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError(
            "model.path", "its tokenizer has neither a begin nor an end token", "add one to it"
        )
    last = [] if tokenizer.eos_token_id is None or unread else [tokenizer.eos_token_id]
    around = lambda inner, before, after: np.concatenate([[before], inner, [after] * len(last)])
    ends = around(covered.ends, False, True).astype(bool)
    reading.add(cut=int(unread > 0), unread_bytes=unread, bytes=covered.num_bytes + unread)
    return Encoded(
        np.array([first, *covered.ids.tolist(), *last], dtype=np.int32),
        around(covered.targets, False, True).astype(bool),
        covered.num_bytes,
        None,
        document.digest,
        document.group,
        ends=ends if ends.any() else None,
        unknown_bytes=covered.unknown_bytes,
        unread_bytes=unread,
    )


def _chats(
    some: Numbered,
    tokenizer: Any,
    reader: Reader,
    max_bytes: int | None,
    split: str,
    reading: Reading,
) -> ByNumber:
    """Encode conversations, by number; `max_bytes` is for texts. Only what the assistant says is
    predicted.
    """
    rendered = list(_rendered(some, tokenizer, split, reading))
    texts = [rendering.text for _, _, rendering in rendered]
    found: ByNumber = {}
    covered = reader.cover(texts, [rendering.answers for _, _, rendering in rendered])
    for (number, document, _), each in zip(rendered, covered, strict=True):
        if not each.targets.any():
            problem = (
                f"{place_of(number, split)}: the chat {first_words(document)!r} has nothing to"
                " predict"
            )
            raise UserError("data.path", problem, "drop it")
        reading.add(bytes=each.num_bytes)
        found.setdefault(number, []).append(
            Encoded(
                each.ids,
                each.targets,
                each.num_bytes,
                None,
                document.digest,
                document.group,
                ends=each.ends if each.ends.any() else None,
                unknown_bytes=each.unknown_bytes,
            )
        )
    reading.add(
        chats=len(found),
        unended=sum(all(one.ends is None for one in each) for each in found.values()),
    )
    return found


def _rendered(
    some: Numbered, tokenizer: Any, split: str, reading: Reading
) -> Iterator[tuple[int, Document, Rendering]]:
    for number, document in some:
        if document.messages is None:
            continue
        conversation = render(document, tokenizer, place_of(number, split))
        reading.add(
            rewritten=int(conversation.is_rewritten),
            unlearnt=int(not conversation.renderings),
            renderings=len(conversation.renderings) if conversation.is_rewritten else 0,
            opening_left_out=conversation.opening_left_out,
            asked_otherwise=conversation.asked_otherwise,
            changed=conversation.changed,
            emptied=conversation.emptied,
        )
        reading.left_out.update(conversation.left_out)
        for rendering in conversation.renderings:
            yield number, document, rendering


def check_chats(documents: Sequence[Document], tokenizer: Any, split: str) -> Reading:
    """Refuse what the chat template refuses, of all documents, without making tokens of them.

    Returns:
        What the template does with them, as `encode_all` will find it.

    Raises:
        UserError: Naming the document, or the split if nothing of it is learnt.
    """
    reading = Reading(documents=len(documents))
    special = Reader(tokenizer).special_texts()
    ended: dict[int, bool] = {}
    for number, _, rendering in _rendered(list(enumerate(documents, 1)), tokenizer, split, reading):
        answers = (rendering.text[slice(*span)] for span in rendering.answers)
        is_ended = any(token in answer for answer in answers for token in special)
        ended[number] = ended.get(number, False) or is_ended
    reading.add(chats=len(ended), unended=sum(not each for each in ended.values()))
    if documents and reading.unlearnt == len(documents):
        problem = (
            f"no conversation of {split} has a turn to learn in what the model's chat template"
            " makes of it"
        )
        raise UserError(
            "data.path", problem, "use a model whose template writes what is said, or other chats"
        )
    return reading


# -- classification -------------------------------------------------------------------------------


def _examples(
    documents: Sequence[Document], tokenizer: Any, max_length: int, reading: Reading
) -> list[Encoded]:
    """Encode texts, or pairs of texts, with the tokens that the tokenizer puts around them; the
    longer one is cut.
    """
    found: dict[int, Encoded] = {}
    for is_pair in (False, True):
        chosen = [
            (at, each) for at, each in enumerate(documents) if (each.pair is not None) is is_pair
        ]
        if not chosen:
            continue
        texts = [each.text for _, each in chosen]
        pairs = [each.pair or "" for _, each in chosen] if is_pair else None
        whole = tokenizer(texts, pairs, verbose=False)
        for row, (at, document) in enumerate(chosen):
            read = {
                name: whole[name][row] for name in ("input_ids", "token_type_ids") if name in whole
            }
            full = len(read["input_ids"])
            if full > max_length:
                read = tokenizer(
                    document.text,
                    document.pair,
                    truncation="longest_first",
                    max_length=max_length,
                    verbose=False,
                )
            found[at] = _example(document, read, full)
            unread = found[at].unread_tokens
            reading.add(tokens=full, unread_tokens=unread, cut=int(unread > 0))
    return [found[at] for at in range(len(documents))]


def _example(document: Document, read: Any, full: int) -> Encoded:
    row = np.array(read["input_ids"], dtype=np.int32)
    if not len(row):
        raise UserError(
            "data",
            f"the text {document.text[:40]!r} has no tokens",
            "drop it, or check the tokenizer",
        )
    parts = read.get("token_type_ids", [])
    return Encoded(
        row,
        np.zeros(len(row), dtype=bool),
        utf8(document.text) + utf8(document.pair or ""),
        document.label,
        document.digest,
        document.group,
        unread_tokens=full - len(row),
        token_type_ids=np.array(parts, dtype=np.int32) if any(parts) else None,
    )
