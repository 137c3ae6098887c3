"""Batches over documents of random lengths: every token once an epoch, no boundary crossed, a pure
function of step.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_assess_models import encoded, random_documents

from pipeline.data.batches import (
    IGNORE,
    PackedBatches,
    Packing,
    PaddedBatches,
    conversation_pieces,
    num_targets,
    num_tokens,
)
from pipeline.data.padding import Padding
from pipeline.errors import UserError

CASES = range(12)


def drawn(case: int) -> tuple[list[Any], int, int]:
    """Return documents, sequence length and batch size; documents of one token and longer than a
    window among them.
    """
    source = random.Random(case)
    lengths = [source.choice((1, 2, 3, 7, 12, 30, 75)) for _ in range(source.randint(4, 25))] + [40]
    return (
        random_documents(lengths, seed=case, is_text=True),
        source.randint(2, 20),
        source.randint(1, 7),
    )


def rows_of(batches: PackedBatches | PaddedBatches, steps: range) -> list[tuple[torch.Tensor, ...]]:
    return [row for step in steps for row in zip(*batches.batch(step).values(), strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_packing_crosses_no_boundary_and_predicts_the_next_token_of_the_same_document(
    case: int,
) -> None:
    documents, length, _ = drawn(case)
    packed = PackedBatches(documents, sequence_length=length, batch_size=1, seed=case)
    flat = [
        (number, at)
        for number, document in enumerate(documents)
        for at in range(len(document.input_ids))
    ]
    assert packed.num_rows == len(flat) // length  # a rest shorter than a window is not read
    expected: list[tuple[list[int], list[int], list[int]]] = []
    for window in (
        flat[start : start + length] for start in range(0, packed.num_rows * length, length)
    ):
        ids, labels, positions = [], [], []
        for place, (number, at) in enumerate(window):
            document = documents[number]
            ids.append(int(document.input_ids[at]))
            more = at + 1 < len(document.input_ids) and bool(document.targets[at + 1])
            labels.append(int(document.input_ids[at + 1]) if more else IGNORE)
            fresh = place == 0 or window[place - 1][0] != number
            positions.append(0 if fresh else positions[-1] + 1)
        expected.append((ids, labels, positions))
    seen = [tuple(part.tolist() for part in row) for row in rows_of(packed, range(packed.num_rows))]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_reads_every_row_once_whatever_the_batch_size(case: int) -> None:
    documents, length, size = drawn(case)
    packed = PackedBatches(documents, sequence_length=length, batch_size=size, seed=case)
    steps = range(3 * packed.num_rows)  # in whole epochs, as many as a batch has rows, times three
    order = np.concatenate([packed._shuffled.rows(step) for step in steps]).reshape(
        -1, packed.num_rows
    )
    assert all(sorted(epoch) == list(range(packed.num_rows)) for epoch in order.tolist())
    assert len(order) == 3 * size
    if packed.num_rows > 12:
        # each in an order of its own
        assert len({tuple(epoch) for epoch in order.tolist()}) == len(order)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_depends_on_seed_and_step_alone(case: int) -> None:
    documents, length, size = drawn(case)

    def make(seed: int) -> PackedBatches:
        return PackedBatches(documents, sequence_length=length, batch_size=size, seed=seed)

    read = make(case)
    steps = list(range(8))
    forward = [read.batch(step) for step in steps]
    for step in random.Random(case).sample(steps, len(steps)):  # in any order, by another object
        fresh = make(case).batch(step)
        assert all(torch.equal(fresh[name], tensor) for name, tensor in forward[step].items())
        assert {tensor.shape for tensor in fresh.values()} == {(size, length)}
        assert {tensor.dtype for tensor in fresh.values()} == {torch.int64}
    if read.num_rows > 12:
        other = make(case + 1)
        assert any(
            not torch.equal(other.batch(step)["input_ids"], forward[step]["input_ids"])
            for step in steps
        )


@pytest.mark.parametrize("case", CASES)
def test_padding_is_on_the_right_and_masked(case: int) -> None:
    documents, _, size = drawn(case)
    padded = PaddedBatches(documents, batch_size=size, seed=case, padding=Padding(258))
    seen: list[tuple[list[int], int]] = []
    for step in range(padded.num_rows):
        batch = padded.batch(step)
        # no wider than the longest
        assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]
        for ids, mask, label in zip(*batch.values(), strict=True):
            real = int(mask.sum())
            assert mask.tolist() == [1] * real + [0] * (len(mask) - real)
            assert ids[real:].tolist() == [258] * (len(ids) - real)
            seen.append((ids[:real].tolist(), int(label)))
    given = [(document.input_ids.tolist(), document.label) for document in documents]
    assert sorted(seen) == sorted(given * size)  # `num_rows` steps are `size` epochs


def test_less_than_one_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="all of train is 5 tokens, less than one sequence"):
        PackedBatches(random_documents([5], is_text=True), sequence_length=14, batch_size=2, seed=0)


# -- conversations --------------------------------------------------------------------------------

SPANS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5)
"""Of a conversation: how many tokens are read, then how many are learnt, turn by turn."""


def conversation(spans: list[tuple[int, int]], first: int = 3) -> Any:
    """Return a conversation of different tokens, from `first` on; it begins with one more that is
    read.
    """
    spans = [(spans[0][0] + 1, spans[0][1]), *spans[1:]]
    targets = [flag for read, learnt in spans for flag in [False] * read + [True] * learnt]
    return encoded(list(range(first, first + len(targets))), targets=targets)


def learnt_in(packed: PackedBatches) -> list[tuple[int, int]]:
    """Return (token before, token) of every target of all windows."""
    windows = packed.read(np.arange(packed.num_rows))
    pairs = zip(
        windows["input_ids"].flatten().tolist(), windows["labels"].flatten().tolist(), strict=True
    )
    return [(token, label) for token, label in pairs if label != IGNORE]


@settings(max_examples=150, deadline=None)
@given(talks=st.lists(SPANS, min_size=1, max_size=6), length=st.integers(2, 40))
def test_every_target_of_a_conversation_is_in_one_window_or_counted_as_cut(
    talks: Any, length: int
) -> None:
    documents = [conversation(spans, 3 + 1000 * number) for number, spans in enumerate(talks)]
    packed = PackedBatches(documents, sequence_length=length, batch_size=1, seed=0)
    wanted = [
        (int(d.input_ids[at - 1]), int(d.input_ids[at]))
        for d in documents
        for at in np.flatnonzero(d.targets)
    ]
    found = learnt_in(packed)
    assert len(set(found)) == len(found)
    assert set(found) <= set(wanted)
    assert len(wanted) - len(found) == packed.packing.targets_cut
    windows = packed.read(np.arange(packed.num_rows))
    assert bool((windows["labels"] != IGNORE).any(1).all())  # none that teaches nothing
    if all(sum(map(sum, spans)) < length for spans in talks):
        assert (packed.packing.shortened, packed.packing.targets_cut) == (0, 0)


@settings(max_examples=150, deadline=None)
@given(spans=SPANS, length=st.integers(2, 40))
def test_no_answer_is_parted_from_its_prompt(spans: list[tuple[int, int]], length: int) -> None:
    """Each answer's first token is learnt right after what precedes it, and the answer goes on in
    that piece.
    """
    document, packing = conversation(spans), Packing()
    pieces = conversation_pieces(document, length, packing)
    at = 1
    for read, learnt in spans:
        first = at + read
        [piece] = [piece for piece in pieces if document.input_ids[first] in piece.labels]
        place = piece.labels.tolist().index(document.input_ids[first])
        if read + learnt <= length // 2:
            assert place + 1 >= min(read, length - learnt)  # its own turn's prompt is there whole
        if learnt <= length:
            said = document.input_ids[first : first + learnt].tolist()
            assert piece.labels[place : place + learnt].tolist() == said
        at = first + learnt
    assert all(0 < len(piece.ids) <= length for piece in pieces)
    assert all((np.diff(piece.ids) == 1).all() for piece in pieces)  # without a gap


def test_what_is_longer_than_a_window_is_cut_and_said() -> None:
    packing = Packing()
    # the prompt loses its beginning
    [piece] = conversation_pieces(conversation([(29, 6)]), 16, packing)
    assert piece.ids.tolist() == list(range(3 + 35 - 16, 3 + 35))
    assert (packing.shortened, packing.tokens_unread, packing.targets_cut) == (1, 19, 0)
    [piece] = conversation_pieces(conversation([(29, 40)]), 16, packing)  # the answer its end
    # four tokens are the prompt's
    assert (len(piece.ids), int((piece.labels != IGNORE).sum())) == (16, 13)
    assert (packing.answers_cut, packing.targets_cut) == (1, 27)
    assert packing.notes() == [
        (
            "2 of 2 conversations are longer than a window: the oldest 45 tokens are not seen by"
            " their answers"
        ),
        (
            "1 answer is longer than a window: 27 of its tokens are not learnt; raise"
            " training.sequence_length"
        ),
    ]


def test_windows_of_conversations_are_padded_and_padding_is_not_counted() -> None:
    documents = [
        conversation([(2, 4)], 3),
        conversation([(1, 7)], 103),
        conversation([(4, 2)], 203),
    ]
    packed = PackedBatches(documents, sequence_length=12, batch_size=2, seed=0)
    windows = packed.read(np.arange(packed.num_rows))
    # 6 + 6 of the last: the last target is never read
    assert windows["lengths"].tolist() == [12, 8]
    assert windows["position_ids"].tolist() == [[*range(6), *range(6)], [*range(8), *range(4)]]
    assert windows["labels"][1].tolist() == [IGNORE, *range(105, 112), *[IGNORE] * 4]
    batch = packed.batch(0)
    assert (num_tokens(batch), num_targets(batch)) == (20, 13)
    assert packed.packing.padding == 4
    mixed = PackedBatches(
        [*random_documents([30], is_text=True), *documents],
        sequence_length=12,
        batch_size=1,
        seed=0,
    )
    assert mixed.num_rows == 4  # texts stay in windows of their own
    assert "lengths" not in PackedBatches(
        random_documents([30], is_text=True), sequence_length=12, batch_size=1, seed=0
    ).batch(0)


def test_pieces_of_a_window_that_would_teach_nothing_are_left_out() -> None:
    documents = [conversation([(8, 3)], 3)]
    packed = PackedBatches(
        documents, sequence_length=12, batch_size=1, seed=0, length_at=lambda step: 4
    )
    batch = packed.batch(0)
    assert batch["labels"].tolist() == [[12, 13, 14, IGNORE]]
    assert batch["lengths"].tolist() == [3]
