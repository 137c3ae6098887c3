"""The search over formats: its policy on made-up trials, and real trials of a small trained
model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_assess_models import byte_tokenizer, saved
from test_assess_quality import causal_documents, labelled_documents, trained

from pipeline.config.settings.quality import QualityConfig
from pipeline.config.settings.quantization import Format, Prefer
from pipeline.config.settings.run import Run
from pipeline.config.settings.serving import ServingConfig, ServingLoad
from pipeline.data.documents import Dataset
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import load_model
from pipeline.quantization.backend import formats
from pipeline.quantization.layers import Choice
from pipeline.quantization.search import Found, Searcher, Trial
from pipeline.quantization.trials import Bench, able
from pipeline.stages.quantize import QuantizeStage
from pipeline.tasks.table import Task

KEY = "stages.small.format"
LAYERS = tuple(f"layer{number}" for number in range(10))

# -- policy ---------------------------------------------------------------------------------------

Known = dict[Format, tuple[float, float, float]]
"""By format: loss, time, weights, each as a whole; every layer left alone takes a tenth of the loss
and saving away.
"""


def search(
    known: Known, *, tolerance: float = 0.01, prefer: Prefer = Prefer.time, budget: int = 100
) -> tuple[Found, list[Format]]:
    asked: list[Format] = []
    made: list[Trial] = []

    def measure(fmt: Format, exclude: tuple[str, ...]) -> Trial:
        loss, time, memory = known[fmt]
        left = 1 - len(exclude) / len(LAYERS)
        made.append(
            Trial(fmt, exclude, loss * left, 0.0, 1 - (1 - time) * left, 1 - (1 - memory) * left)
        )
        return made[-1]

    def sensitive(fmt: Format) -> tuple[str, ...]:
        asked.append(fmt)
        return LAYERS

    found = Searcher(measure, sensitive, tolerance, prefer, lambda: len(made) >= budget).run(
        list(known)
    )
    assert found.trials == tuple(made)
    return found, asked


def test_the_cheapest_that_holds_the_tolerance_is_kept() -> None:
    known = {
        Format.int8: (0.0, 0.9, 0.5),
        Format.nf4: (0.009, 0.7, 0.3),
        Format.fp4: (0.05, 0.6, 0.3),
    }
    found, asked = search(known)
    assert found.best is not None
    assert (found.best.fmt, found.best.exclude, len(found.trials), asked) == (Format.nf4, (), 3, [])


def test_what_to_save_decides() -> None:
    known = {Format.int8: (0.0, 0.9, 0.5), Format.nf4: (0.0, 1.5, 0.3)}
    assert search(known)[0].best.fmt is Format.int8
    assert search(known, prefer=Prefer.memory)[0].best.fmt is Format.nf4


def test_where_no_format_holds_the_most_sensitive_layers_stay_until_one_does() -> None:
    """Loss 5% as a whole, half a point a layer: eight of ten layers have to stay. Doubling: 1, 2,
    4, 8.
    """
    found, asked = search({Format.nf4: (0.05, 0.5, 0.3)})
    assert found.best is not None
    assert found.best.exclude == LAYERS[:8]
    assert [len(trial.exclude) for trial in found.trials] == [0, 1, 2, 4, 8]
    assert asked == [Format.nf4]


def test_the_cheapest_that_missed_is_mixed_first_and_the_next_only_if_it_fails() -> None:
    found, asked = search({Format.int8: (0.02, 0.9, 0.5), Format.nf4: (0.5, 0.5, 0.3)})
    # nf4 misses with eight layers left alone: 10% of loss
    assert asked == [Format.nf4, Format.int8]
    assert found.best is not None
    assert (found.best.fmt, len(found.best.exclude)) == (Format.int8, 8)


def test_nothing_that_is_no_cheaper_is_kept_or_mixed() -> None:
    found, asked = search({Format.int8: (0.0, 3.0, 0.5), Format.nf4: (0.5, 1.0, 0.3)})
    assert (found.best, asked, found.why) == (
        None,
        [],
        "nothing that holds the tolerance saves time",
    )
    found, _ = search({Format.nf4: (9.0, 0.5, 0.3)})
    assert (found.best, found.why) == (None, "nothing holds the tolerance")


def test_a_spent_budget_ends_the_search_with_the_best_so_far() -> None:
    known = {Format.int8: (0.0, 0.9, 0.5), Format.nf4: (0.0, 0.5, 0.3)}
    found, _ = search(known, budget=1)
    assert found.best is not None
    assert (found.best.fmt, found.why) == (Format.int8, "the budget of the search is spent")
    found, _ = search({Format.nf4: (0.05, 0.5, 0.3)}, budget=3)
    assert (found.best, len(found.trials), found.why) == (
        None,
        3,
        "the budget of the search is spent",
    )


def test_a_model_that_gives_no_numbers_holds_nothing() -> None:
    assert search({Format.nf4: (float("inf"), 0.5, 0.3)}, tolerance=1e9)[0].best is None


# -- real trials ----------------------------------------------------------------------------------


def bench(folder: Path, task: Task) -> Bench:
    documents = causal_documents(40) if task is Task.causal_lm else labelled_documents(60)
    source = saved(trained(task, documents, steps=40), folder / "source")
    labels = None if task is Task.causal_lm else ("up", "down", "flat")
    splits = {name: tuple(documents) for name in ("train", "validation", "test")}
    run = Run(
        task=task,
        quality=QualityConfig(),
        serving=ServingConfig(load=ServingLoad(prompt=8, new=4, batch=2)),
    )
    return Bench(
        source,
        run,
        Dataset("made", "0" * 32, splits, labels),
        torch.device("cpu"),
        Choice(),
        KEY,
        PhaseClock(),
        folder,
        64,
    )


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("language"), Task.causal_lm)


def test_a_trial_reads_what_it_says(language: Bench) -> None:
    """Loss and weights against a plain computation; what was written on trial is gone."""
    trial = language.measure(Format.int8_weight_only, ())
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    plain = sum(p.nbytes for p in language.yard.model.parameters())
    buffers = sum(b.nbytes for b in language.yard.model.buffers())
    # by output row, a scale in fp32 and a zero point in int8
    scales = 2 * (4 * 64 + 2 * 128 + 64) * (4 + 1)
    assert trial.memory_ratio == pytest.approx(
        (plain + buffers - 3 * linear + scales) / (plain + buffers), rel=1e-3
    )
    assert trial.time_ratio > 0
    assert 0 < trial.kl < 0.01
    assert abs(trial.loss) < 0.01
    assert not list(language.folder.glob("trial.*"))


def test_layers_are_ranked_by_how_far_each_alone_moves_the_predictions(language: Bench) -> None:
    """The first and the last of the ranking against quantizing exactly that layer and nothing
    else.
    """
    order = language.sensitive(Format.nf4)
    assert len(order) == 14
    alone = {}
    for name in (order[0], order[-1]):
        with language._quantized(
            Format.nf4, tuple(other for other in order if other != name)
        ) as folder:
            quantized = load_model(folder, Task.causal_lm)
        alone[name] = language.yard.score(
            quantized, language.yard.validation, other=language.yard.model
        )[1]
    assert alone[order[0]] > 2 * alone[order[-1]]


def test_a_tolerance_that_the_whole_format_misses_is_met_by_a_mixture(language: Bench) -> None:
    whole = language.measure(Format.nf4, ())
    assert whole.loss > 0
    found = Searcher(
        language.measure, language.sensitive, 0.4 * whole.loss, Prefer.memory, lambda: False
    ).run([Format.nf4])
    assert found.best is not None
    assert 0 < len(found.best.exclude) < 14
    assert found.best.loss <= 0.4 * whole.loss
    assert whole.memory_ratio < found.best.memory_ratio < 1


@pytest.mark.slow
def test_classes_are_searched_alike(tmp_path: Path) -> None:
    found = bench(tmp_path, Task.sequence_classification)
    trial = found.measure(Format.nf4, ())
    assert trial.kl > 0
    accuracy = np.mean(
        [
            load_model(found.source, Task.sequence_classification, labels=("up", "down", "flat"))(
                input_ids=torch.tensor(byte_tokenizer()([document.text])["input_ids"])
            )
            .logits.argmax(-1)
            .item()
            == document.label
            for document in found.data.splits["validation"]
        ]
    )
    assert found.yard._metric == pytest.approx(accuracy)


def test_what_cannot_run_here_is_left_out_with_its_reason(language: Bench) -> None:
    device = torch.device("cpu")
    found, reasons = able(
        formats(), language.source, Task.causal_lm, device=device, choice=Choice(), key=KEY
    )
    assert Format.int8 in found
    assert Format.int4_weight_only not in found
    assert "int4_weight_only: torchao has no kernel for int4_weight_only on a CPU" in reasons


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"format": Format.int8, "candidates": [Format.nf4]}, "stages.small.candidates"),
        ({"format": Format.int8, "tolerance": 0.1}, "stages.small.tolerance"),
        ({"format": Format.int8, "prefer": Prefer.memory}, "stages.small.prefer"),
        ({"format": Format.int8, "search_device_hours": 0.1}, "stages.small.search_device_hours"),
        ({"format": Format.auto, "candidates": [Format.auto]}, "stages.small.candidates"),
        ({"format": Format.auto, "smoothing": 0.5}, "stages.small.smoothing"),
        ({"format": Format.int8, "calibration": "a.jsonl"}, "stages.small.calibration"),
        ({"format": Format.int8, "calibration_documents": 4}, "stages.small.calibration_documents"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as error:
        QuantizeStage(**settings).check("stages.small", Run())
    assert error.value.key == key


def test_what_decides_a_trial_can_be_read() -> None:
    said = Trial(Format.nf4, (), 0.0100004, 0.0, 0.99996, 1.0).say(0.01)
    assert (
        said
        == "nf4: loses 1.00004% where 1% is allowed, takes 0.99996x the time and 1x the weights"
    )
    assert "loses -2.00e-05% where 0%" in Trial(Format.nf4, ("a", "b"), -2e-7, 0.0, 0.5, 0.3).say(
        0.0
    )
