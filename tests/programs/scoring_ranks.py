"""A rank that scores and smooths in a test: `scoring_ranks.py FOLDER FILE`, started once a rank
with RANK set.

Rank 0 writes to FILE, as JSON, what became of each case: documents scored by all ranks and by this
process alone below FOLDER, and what each rank raised where one of them failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from make_assess_models import LABELS, saved, tiny
from test_assess_quality import WORDS, labelled_documents

from pipeline.config.settings.quality import QualityConfig
from pipeline.config.settings.quantization import Format
from pipeline.config.settings.run import Run
from pipeline.data.documents import Dataset, Document
from pipeline.errors import StageFailed, UserError
from pipeline.evaluation.quality.assess import assess_quality, score_folder
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import load_model
from pipeline.runs.following import Scorers, Share, told_times
from pipeline.stages.base import MODEL
from pipeline.stages.quantize import QuantizeStage
from pipeline.store.artifacts import Artifact
from pipeline.tasks.table import Task
from pipeline.training.ranks import ALONE, Ranks, join, place_in

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
    return failed_by(ranks, lambda: ranks.shared(lambda: work(ranks.rank)))


def failed_by(ranks: Ranks, work: Callable[[], object]) -> list[str]:
    """Return what each rank raised."""
    try:
        said = str(work())
    except Exception as error:  # noqa: BLE001
        said = f"{type(error).__name__}: {error}"
    return ranks.gathered(said)


def raising(by_rank: dict[int, Exception]) -> Callable[[int], None]:
    def work(rank: int) -> None:
        if rank in by_rank:
            raise by_rank[rank]

    return work


STAGE = QuantizeStage(format=Format.int8_dynamic, smoothing=0.5, calibration_documents=7)


def context(ranks: Ranks, folder: Path, clock: PhaseClock) -> Any:
    """Return as much of a stage's context as smoothing asks for."""
    run = Run()
    run.training.sequence_length = 24
    data = Dataset("uneven", "d" * 32, {"train": uneven(9), "test": []}, None)
    return SimpleNamespace(
        run=run,
        stage="small",
        device=torch.device("cpu"),
        data=data,
        clock=clock,
        out=folder / "out",
        ranks=ranks,
    )


def smoothed(ranks: Ranks, folder: Path) -> float | None:
    """Return by how much weights smoothed by all ranks are apart from those by one process."""
    if ranks.is_first:
        models(Task.causal_lm, folder)
    ranks.meet()
    source = folder / "moved"
    if not ranks.is_first:
        clock = PhaseClock()
        STAGE.run({MODEL: Artifact(source, "model", "m" * 32, 1)}, context(ranks, folder, clock))
        assert clock.read_ns()["calibrate"] > 0
        return None
    made: list[Any] = []
    for by in (ranks, ALONE):
        model: Any = tiny(Task.causal_lm)
        model.load_state_dict(load_model(source, Task.causal_lm, device="cpu").state_dict())
        STAGE.smooth(model.eval(), source, context(by, folder, PhaseClock()))
        made.append(model)
    plain = load_model(source, Task.causal_lm, device="cpu")
    assert max(distances(made[0], plain)) > 0.1  # something was smoothed
    return max(distances(*made))


def distances(one: Any, other: Any) -> list[float]:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs]


def refused_before(ranks: Ranks, folder: Path) -> list[str]:
    """Return what each rank raised where the first one refuses before it looks at activations."""
    ctx = context(ranks, folder, PhaseClock())
    inputs = {MODEL: Artifact(folder / "moved", "model", "m" * 32, 1)}
    refusal = UserError("stages.small.format", "not here", "another")
    with patch("pipeline.quantization.backend.quantize", side_effect=refusal):
        return failed_by(ranks, lambda: STAGE.run(inputs, ctx))


def times_left(ranks: Ranks) -> list[Any]:
    """Return what the first rank is told of three stages: of the first it asks nothing, as it has
    failed in it; in the second the other rank did.
    """
    shares = [Share("s", STAGE, {}, 0, None, None, Path(), number=str(at)) for at in range(3)]
    run, found = Run(), list[Any]()
    for at, share in enumerate(shares):
        if ranks.is_first and at == 0:
            continue
        own: Any = {"forward": 10 * at + ranks.rank}
        if at == 1 and not ranks.is_first:
            own = StageFailed("the loss is no number")
        try:
            found.append([each["phases_ns"] for each in told_times(ranks, run, share, own)])
        except StageFailed as error:
            found.append(str(error))
    return found


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
    found["smoothed"] = smoothed(ranks, folder / "smoothed")
    found["refused before"] = refused_before(ranks, folder / "smoothed")
    found["times left"] = times_left(ranks)
    if ranks.is_first:
        file.write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
