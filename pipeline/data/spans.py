"""Which tokens stand for which characters of a text, and how many bytes that is.

Bytes are those of the text that was tokenized, never of what decoding gives back. Characters that
no token's offsets cover (white space that a tokenizer drops, or trims off its offsets) belong to
the token that follows.

Shape legend: L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_LEADS = [
    *range(0x80, 0x800, 0x40),
    *range(0x800, 0x10000, 0x1000),
    0x10000,
    0x40000,
    0x80000,
    0xC0000,
    0x100000,
]
STRANGE = "\ue0f7\U00013000\u2e3b\U0010fffd"
"""Characters that hardly any vocabulary holds, whose last bytes differ."""
PROBE = (
    STRANGE
    + "\U0001fa7b\u4e2d\u05d0\u1e9e\x0b\u0e01"
    + "".join(
        chr(code)
        for code in [
            *range(0x21, 0x7F),
            *range(0x80, 0xC0),
            *(each for each in _LEADS if each != 0xD800),
        ]
    )
)
"""Characters that only a tokenizer of bytes knows all of: together they hold every byte of UTF-8.
"""
KEEPING = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel")
"""Normalizers that write characters otherwise, and leave none out."""
# characters before a boundary in which a tokenizer without offsets is searched for a token's end
LOOK_BACK = 64

Spans = Sequence[tuple[int, int]]
"""Characters [begin, end) to be predicted, in order, apart from each other."""


@dataclass(frozen=True, slots=True)
class Covered:
    """What of a text is predicted.

    Attributes:
        ids: int32 (L,).
        targets: bool (L,): tokens that stand for characters of the spans. The one that joins what
            precedes a span with its beginning is its own; the one that goes on past its end is not.
            Never the first, which has no context.
        ends: bool (L,): those of them that are special tokens (the end of a turn): they stand for
            no bytes.
        num_bytes: UTF-8 bytes that the other targets stand for.
        unknown_bytes: Those of them that stand under an unknown token, or under none (but white
            space).
    """

    ids: np.ndarray
    targets: np.ndarray
    ends: np.ndarray
    num_bytes: int
    unknown_bytes: int


def utf8(text: str) -> int:
    """Return the bytes of a text; what is no character (half a surrogate pair) counts as one."""
    return len(text.encode("utf-8", "replace"))


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many members two sequences begin alike with."""
    alike = (
        place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]
    )
    return next(alike, min(len(one), len(other)))


def _keeps_all(tokenizer: Any) -> bool:
    """Return whether nothing is known to be taken out of texts before they are tokenized."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return normalizer is None or all(
        _keeps(each) for each in _steps(json.loads(normalizer.__getstate__()))
    )


def _steps(normalizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for each in normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]:
        yield from _steps(each) if each["type"] == "Sequence" else [each]


def _keeps(step: dict[str, Any]) -> bool:
    return step["type"] in KEEPING or (step["type"] == "Replace" and bool(step["content"].strip()))


def special_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that stand for no text: those with a role, and those added as special
    without one.

    `all_special_ids` knows the former alone: many tokenizers mark the end of a turn in
    tokenizer.json only.
    """
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


class Reader:
    """A tokenizer, asked for tokens without any that it would add, and for the characters that they
    stand for.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.has_offsets = bool(getattr(tokenizer, "is_fast", False))
        found = self._unknown_token()
        self._unknown: int | None = tokenizer.unk_token_id if found is None else found
        self._unknown_text = (
            None if self._unknown is None else tokenizer.convert_ids_to_tokens(self._unknown)
        )
        special = special_ids(tokenizer)
        if self._unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            special.discard(self._unknown)  # it stands for text
        self._special = np.array(sorted(special), dtype=np.int64)
        self.is_lossless = self._reads_bytes()

    def special_texts(self) -> list[str]:
        """Return how the tokens that stand for no text are written."""
        return [
            token
            for token in self._tokenizer.convert_ids_to_tokens(self._special.tolist())
            if token
        ]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def whole(self, texts: Sequence[str]) -> list[Covered]:
        """Return texts all of whose tokens are predicted; special tokens that are written out in
        them are text.
        """
        if self.is_lossless or not self.has_offsets:
            rows = self.tokens(texts)
            lost = [
                0 if self.is_lossless else self._estimated(np.array(ids), utf8(text))
                for text, ids in zip(texts, rows, strict=True)
            ]
        elif texts:
            rows, offsets = self._offsets(texts)
            lost = [
                self._lost(
                    text, np.array(ids), *each, np.ones(len(ids), dtype=bool), (0, len(text))
                )
                for text, ids, each in zip(texts, rows, offsets, strict=True)
            ]
        else:
            return []
        return [
            Covered(
                np.array(ids, dtype=np.int32),
                np.ones(len(ids), dtype=bool),
                np.zeros(len(ids), dtype=bool),
                utf8(text),
                bytes_lost,
            )
            for text, ids, bytes_lost in zip(texts, rows, lost, strict=True)
        ]

    def cover(
        self, texts: Sequence[str], spans: Sequence[Spans], *, after_begin: bool = False
    ) -> list[Covered]:
        """Return what is predicted of texts, each with its spans.

        Args:
            after_begin: A begin token will stand before each, so that its first token may be
                predicted.
        """
        if not texts:
            return []
        skip = 0 if after_begin else 1
        if not self.has_offsets:
            return [
                self._searched(text, each, skip) for text, each in zip(texts, spans, strict=True)
            ]
        rows, offsets = self._offsets(texts)
        return [
            self._covered(text, np.array(ids, dtype=np.int32), *each, wanted, skip)
            for text, ids, each, wanted in zip(texts, rows, offsets, spans, strict=True)
        ]

    def _offsets(
        self, texts: Sequence[str]
    ) -> tuple[list[list[int]], list[tuple[np.ndarray, np.ndarray]]]:
        """Return tokens, and the characters [start, stop) of each, int64 (L,) each."""
        found = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        pairs = [np.array(row, dtype=np.int64).reshape(-1, 2) for row in found["offset_mapping"]]
        return found["input_ids"], [(pair[:, 0], pair[:, 1]) for pair in pairs]

    def _unknown_token(self) -> int | None:
        """Return the token that characters become which the vocabulary lacks; None where they
        become bytes, or nothing.

        Asked and not read: a tokenizer made by hand names it in its model, and not to whoever loads
        it.
        """
        lasts = {(ids or [-1])[-1] for ids in self.tokens(list(STRANGE))}
        return lasts.pop() if len(lasts) == 1 and -1 not in lasts else None

    def _reads_bytes(self) -> bool:
        """Whether no character is unknown or dropped: asked of all bytes, and of rare
        characters.
        """
        if not _keeps_all(self._tokenizer):
            return False
        ids = self._tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        if self._unknown is not None and self._unknown in ids:
            return False
        if not self.has_offsets:
            return len(ids) >= len(PROBE)
        [(starts, stops)] = self._offsets([PROBE])[1]
        covered = np.zeros(len(PROBE), dtype=bool)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            covered[start:stop] = True
        return bool(covered[[not character.isspace() for character in PROBE]].all())

    def _covered(
        self,
        text: str,
        ids: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        spans: Spans,
        skip: int,
    ) -> Covered:
        # where earlier tokens end
        before = np.concatenate([[0], np.maximum.accumulate(stops)])[: len(stops)]
        # stands for nothing: belongs to what follows
        empty = (starts == stops) & (starts == before)
        targets, num_bytes, unknown = np.zeros(len(ids), dtype=bool), 0, 0
        ends = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            hit = np.where(
                empty, (starts >= begin) & (starts < end), (stops > begin) & (stops <= end)
            )
            region = _region(hit, starts, stops, (begin, end), skip)
            hit[:skip] = False
            targets |= hit
            if not hit.any():
                continue
            apart = hit & np.isin(ids, self._special) & ~self._is_unknown(text, ids, starts, stops)
            ends |= apart
            said = utf8(text[slice(*region)])
            num_bytes += said - sum(
                utf8(text[starts[at] : stops[at]]) for at in np.flatnonzero(apart)
            )
            if not self.is_lossless:
                unknown += self._lost(text, ids, starts, stops, hit & ~apart, region)
        return Covered(ids, targets, ends, num_bytes, unknown)

    def _is_unknown(
        self, text: str, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> np.ndarray:
        """Return which tokens stand for text that the vocabulary lacks, bool (L,): not where it is
        written out.
        """
        unknown = ids == (-1 if self._unknown is None else self._unknown)
        for at in np.flatnonzero(unknown):
            unknown[at] = text[starts[at] : stops[at]] != self._unknown_text
        return unknown

    def _lost(
        self,
        text: str,
        ids: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        hit: np.ndarray,
        region: tuple[int, int],
    ) -> int:
        """Return the bytes of a region that its tokens do not tell: under an unknown one, or under
        none.
        """
        covered = np.zeros(len(text), dtype=bool)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            covered[start:stop] = True
        for at in np.flatnonzero(hit & self._is_unknown(text, ids, starts, stops)):
            covered[starts[at] : stops[at]] = False
        begin, end = region
        return sum(
            utf8(text[at])
            for at in begin + np.flatnonzero(~covered[begin:end])
            if not text[at].isspace()
        )

    # -- tokenizers without offsets ---------------------------------------------------------------

    def _searched(self, text: str, spans: Spans, skip: int) -> Covered:
        """Find the tokens of spans by tokenizing what precedes their ends."""
        ids = np.array(self.tokens([text])[0], dtype=np.int32)
        targets, num_bytes = np.zeros(len(ids), dtype=bool), 0
        for begin, end in spans:
            first, begin_at = self._boundary(text, ids, begin)
            last, end_at = self._boundary(text, ids, end)
            if first < skip:  # the first token has no context
                first, begin_at = 1, self._after_first(text, ids)
            targets[first:last] = True
            num_bytes += utf8(text[begin_at:end_at]) if last > first else 0
        ends = targets & np.isin(ids, self._special)
        num_bytes -= sum(
            utf8(token) for token in self._tokenizer.convert_ids_to_tokens(ids[ends].tolist())
        )
        unknown = 0 if self.is_lossless else self._estimated(ids[targets & ~ends], num_bytes)
        return Covered(ids, targets, ends, max(num_bytes, 0), unknown)

    def _boundary(self, text: str, ids: np.ndarray, place: int) -> tuple[int, int]:
        """Return how many whole tokens end at `place` or a little before, and the character that
        they end at.
        """
        if place == len(text):
            return len(ids), place
        for at in range(place, max(-1, place - LOOK_BACK), -1):
            before = self.tokens([text[:at]])[0] if at else []
            if ids[: len(before)].tolist() == list(before):
                return len(before), at
        return common_length(ids.tolist(), self.tokens([text[:place]])[0]), place

    def _after_first(self, text: str, ids: np.ndarray) -> int:
        """Return the character that a text's first token ends at."""
        for at in range(1, min(len(text), LOOK_BACK) + 1):
            if (
                self.tokens([text[:at]])[0] != []
                and self.tokens([text[: at + 1]])[0] != ids[:1].tolist()
            ):
                return at
        return 0

    def _estimated(self, ids: np.ndarray, num_bytes: int) -> int:
        """Return the bytes under unknown tokens, taken to be as long as the others on average."""
        if self._unknown is None or not len(ids):
            return 0
        return round(num_bytes * float((ids == self._unknown).mean()))


def _region(
    hit: np.ndarray, starts: np.ndarray, stops: np.ndarray, span: tuple[int, int], skip: int
) -> tuple[int, int]:
    """Return the characters that the tokens of a span stand for, the first `skip` of the text left
    out.
    """
    places, (begin, end) = np.flatnonzero(hit), span
    if not len(places) or places[-1] < skip:
        return begin, begin
    first, last = int(places[0]), int(places[-1])
    begin = int(stops[skip - 1]) if first < skip else min(begin, int(starts[first]))
    goes_on = last + 1 < len(starts) and int(starts[last + 1]) < end
    return begin, max(begin, int(stops[last]) if goes_on else end)
