"""Batches over documents of random lengths: every token once an epoch, no boundary crossed, a pure function of step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from make_assess_models import random_documents

from pipeline.data.batches import IGNORE, PackedBatches, PaddedBatches
from pipeline.data.padding import Padding
from pipeline.errors import UserError

CASES = range(12)


def drawn(case: int) -> tuple[list[Any], int, int]:
    """Return documents, sequence length and batch size; documents of one token and longer than a window among them."""
    source = random.Random(case)
    lengths = [source.choice((1, 2, 3, 7, 12, 30, 75)) for _ in range(source.randint(4, 25))] + [40]
    return random_documents(lengths, seed=case), source.randint(2, 20), source.randint(1, 7)


def rows_of(batches: PackedBatches | PaddedBatches, steps: range) -> list[tuple[torch.Tensor, ...]]:
    return [row for step in steps for row in zip(*batches.batch(step).values(), strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_packing_crosses_no_boundary_and_predicts_the_next_token_of_the_same_document(case: int) -> None:
    documents, length, _ = drawn(case)
    packed = PackedBatches(documents, sequence_length=length, batch_size=1, seed=case)
    flat = [(number, at) for number, document in enumerate(documents) for at in range(len(document.input_ids))]
    assert packed.num_rows == len(flat) // length  # a rest shorter than a window is not read
    expected: list[tuple[list[int], list[int], list[int]]] = []
    for window in (flat[start : start + length] for start in range(0, packed.num_rows * length, length)):
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
    order = np.concatenate([packed._shuffled.rows(step) for step in steps]).reshape(-1, packed.num_rows)
    assert all(sorted(epoch) == list(range(packed.num_rows)) for epoch in order.tolist())
    assert len(order) == 3 * size
    if packed.num_rows > 12:
        assert len({tuple(epoch) for epoch in order.tolist()}) == len(order)  # each in an order of its own


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
        assert any(not torch.equal(other.batch(step)["input_ids"], forward[step]["input_ids"]) for step in steps)


@pytest.mark.parametrize("case", CASES)
def test_padding_is_on_the_right_and_masked(case: int) -> None:
    documents, _, size = drawn(case)
    padded = PaddedBatches(documents, batch_size=size, seed=case, padding=Padding(258))
    seen: list[tuple[list[int], int]] = []
    for step in range(padded.num_rows):
        batch = padded.batch(step)
        assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]  # no wider than the longest
        for ids, mask, label in zip(*batch.values(), strict=True):
            real = int(mask.sum())
            assert mask.tolist() == [1] * real + [0] * (len(mask) - real)
            assert ids[real:].tolist() == [258] * (len(ids) - real)
            seen.append((ids[:real].tolist(), int(label)))
    given = [(document.input_ids.tolist(), document.label) for document in documents]
    assert sorted(seen) == sorted(given * size)  # `num_rows` steps are `size` epochs


def test_less_than_one_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="all of train is 5 tokens, less than one sequence"):
        PackedBatches(random_documents([5]), sequence_length=14, batch_size=2, seed=0)
