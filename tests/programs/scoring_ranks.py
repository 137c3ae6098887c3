"""A rank that scores in a test: `scoring_ranks.py FOLDER FILE`, started once a rank with RANK set.

Rank 0 writes to FILE, as JSON, what became of each case: documents scored by all ranks and by this
process alone below FOLDER, and what each rank raised where one of them failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from make_assess_models import LABELS, saved, tiny
from test_assess_quality import WORDS, labelled_documents

from pipeline.config.settings.quality import QualityConfig
from pipeline.data.documents import Document
from pipeline.errors import StageFailed, UserError
from pipeline.evaluation.quality.assess import assess_quality, score_folder
from pipeline.ledger.phases import PhaseClock
from pipeline.runs.following import Scorers
from pipeline.tasks.table import Task
from pipeline.training.ranks import Ranks, join, place_in

SCORED: dict[str, Task] = {"texts": Task.causal_lm, "classes": Task.sequence_classification}


def uneven(count: int = 23) -> list[Document]:
    """Return texts of 1 to 60 words, in an order that is not that of their lengths."""
    rng = np.random.default_rng(3)
    lengths = rng.permutation(np.geomspace(1, 60, count).astype(int))
    return [Document(" ".join(rng.choice(WORDS, length)) + f" {length}.") for length in lengths]


def models(task: Task, folder: Path) -> tuple[Path, Path]:
    """Return the folder of a model, and of another that it may have been quantized from."""
    model: Any = tiny(task)
    plain = saved(model, folder / "plain")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return saved(model, folder / "moved"), plain


def scored(ranks: Ranks, folder: Path, task: Task) -> list[list[int]]:
    """Score by all ranks, and at the first by itself; return the tokens that each rank read."""
    if ranks.is_first:
        models(task, folder)
    ranks.meet()
    documents = labelled_documents(23) if task is Task.sequence_classification else uneven()
    clock = PhaseClock()
    how: dict[str, Any] = {
        "documents": documents,
        "task": task,
        "labels": LABELS if task is Task.sequence_classification else None,
        "config": QualityConfig(batch_size=2, bootstrap=200, stride=8),
        "sequence_length": 16,
        "device": "cpu",
        "clock": clock,
        "unquantized": folder / "plain",
    }
    scorers = Scorers(ranks, clock)
    if not ranks.is_first:
        score_folder(folder / "moved", **how, scorers=scorers)
        return []
    for name, of in (("alone", None), ("ranks", scorers)):
        items = folder / f"{name}.jsonl"
        assess_quality(
            folder / "moved", items=items, teacher_predictions=None, seed=0, **how, scorers=of
        )
    return [[each["rank"], each["phases_ns"]["eval"]] for each in scorers.times]


def failed(ranks: Ranks, work: Callable[[int], None]) -> list[str]:
    """Return what each rank raised of a work that it shares."""
    try:
        said = str(ranks.shared(lambda: work(ranks.rank)))
    except Exception as error:  # noqa: BLE001
        said = f"{type(error).__name__}: {error}"
    return ranks.gathered(said)


def raising(by_rank: dict[int, Exception]) -> Callable[[int], None]:
    def work(rank: int) -> None:
        if rank in by_rank:
            raise by_rank[rank]

    return work


FAILING: dict[str, dict[int, Exception]] = {
    "refused by one": {1: UserError("model.path", "has no such token", "give another")},
    "failed at one": {1: StageFailed("not finite")},
    "crashed at one": {1: RuntimeError("boom")},
    "crashed at the first": {0: KeyError("x")},
    "refused by all": {rank: UserError("data", f"empty {rank}", "fill it") for rank in (0, 1)},
    "none": {},
}


def main() -> None:
    place = place_in()
    assert place is not None
    torch.set_num_threads(1)
    ranks = join(place, backend="gloo", timeout_seconds=60)
    folder, file = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, Any] = {}
    for name, task in SCORED.items():
        found[name] = scored(ranks, folder / name, task)
    for name, by_rank in FAILING.items():
        found[name] = failed(ranks, raising(by_rank))
    if ranks.is_first:
        file.write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
