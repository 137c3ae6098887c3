"""Figures of artifacts on disk against plain computations, sklearn and published intervals."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from make_assess_models import LABELS, byte_tokenizer, saved, tiny
from sklearn.metrics import f1_score
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.compare import figures
from pipeline.compare.figures import macro_f1
from pipeline.compare.quality import compare_items
from pipeline.config.settings.quality import QualityConfig
from pipeline.data.documents import Document
from pipeline.data.encode import encode_all
from pipeline.errors import StageFailed, UserError
from pipeline.evaluation.quality import assess as quality
from pipeline.evaluation.quality.assess import (
    assess_quality,
    choose_documents,
    read_items,
    worst_slice,
    write_items,
)
from pipeline.ledger.metrics import deciding, primary_key
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.report import view
from pipeline.tasks.table import Task

CAUSAL, CLASSES = Task.causal_lm, Task.sequence_classification
WORDS = ("mill", "grain", "stone", "river", "wheel", "miller")


def causal_documents(count: int = 30, *, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(" ".join(rng.choice(WORDS, 6)) + f" {number}.") for number in range(count)]


def labelled_documents(count: int = 60, *, seed: int = 0, shuffled: bool = False) -> list[Document]:
    """Return texts whose label is told by their letters, or by nothing."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(len(LABELS), size=count)
    labels = rng.permutation(kinds) if shuffled else kinds
    return [
        Document("".join(rng.choice(list(("abc", "mno", "xyz")[kind]), 12)), label=int(label))
        for kind, label in zip(kinds, labels, strict=True)
    ]


def trained(task: Task, documents: list[Document], *, steps: int):
    """Train a tiny model on documents, just enough to know something."""
    model, tokenizer = tiny(task).train(), byte_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = encode_all(documents, tokenizer, task, max_length=64)
    length = min(len(row.input_ids) for row in rows)
    ids = torch.tensor(np.stack([row.input_ids[:length] for row in rows]).astype(np.int64))
    labels = ids if task is CAUSAL else torch.tensor([row.label for row in rows])
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time to threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(one_thread):
    return {
        CAUSAL: trained(CAUSAL, causal_documents(12, seed=1), steps=20),
        CLASSES: trained(CLASSES, labelled_documents(30, seed=1), steps=15),
    }


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    return {
        task: saved(model, tmp_path_factory.mktemp(task.value)) for task, model in models.items()
    }


def assess(
    folder: Path,
    items: Path,
    *,
    task: Task,
    documents: list[Document],
    clock: PhaseClock | None = None,
    **more,
):
    teacher, length = more.pop("teacher_predictions", None), more.pop("sequence_length", 64)
    unquantized = more.pop("unquantized", None)
    return assess_quality(
        folder,
        documents=documents,
        task=task,
        labels=LABELS if task is CLASSES else None,
        config=QualityConfig(bootstrap=400, **more),
        sequence_length=length,
        device="cpu",
        items=items,
        teacher_predictions=teacher,
        seed=0,
        clock=clock or PhaseClock(),
        unquantized=unquantized,
    )


def test_causal_figures_are_those_of_their_items(folders, tmp_path: Path) -> None:
    documents, items = causal_documents(), tmp_path / "items.jsonl"
    result = assess(folders[CAUSAL], items, task=CAUSAL, documents=documents)
    kept = read_items(items)
    measured = {"bits_per_byte", "perplexity", "next_token_accuracy", "end_token_bits"}
    assert set(result) == measured | {"read_bytes", "read_documents", "cut_documents"}
    assert list(kept) == [
        "digest",
        "bits",
        "bytes",
        "tokens",
        "correct",
        "end_bits",
        "ends",
        "unknown_bytes",
    ]
    by_digest = {document.digest: document for document in documents}
    for digest, size, tokens in zip(kept["digest"], kept["bytes"], kept["tokens"], strict=True):
        assert size == len(by_digest[digest].text)
        assert tokens == size  # one token a byte; the end stands apart
    assert kept["ends"].tolist() == [1] * 30
    assert result["end_token_bits"]["value"] == pytest.approx(kept["end_bits"].mean())
    assert [
        result[name]["value"] for name in ("read_bytes", "read_documents", "cut_documents")
    ] == [1, 1, 0]
    assert result["bits_per_byte"]["value"] == pytest.approx(sum(kept["bits"]) / sum(kept["bytes"]))
    nats_per_token = math.log(2) * sum(kept["bits"]) / sum(kept["tokens"])
    assert result["perplexity"]["value"] == pytest.approx(math.exp(nats_per_token))
    assert result["next_token_accuracy"]["value"] == pytest.approx(
        sum(kept["correct"]) / sum(kept["tokens"])
    )
    for entry in (result[name] for name in measured):
        assert entry["ci"][0] < entry["value"] < entry["ci"][1]
        assert (entry["n"], entry["items"], entry["provenance"]) == (30, str(items), "measured")
    assert len(np.load(tmp_path / "items.predictions.npy")) == sum(kept["tokens"])


def test_what_is_not_read_is_said(folders, tmp_path: Path) -> None:
    documents = [Document("a" * 10), Document("b" * 30), Document("c" * 7), Document("d" * 40)]
    result = assess(
        folders[CAUSAL],
        tmp_path / "i.jsonl",
        task=CAUSAL,
        documents=documents,
        max_bytes_per_document=20,
    )
    assert result["read_bytes"]["value"] == pytest.approx((10 + 20 + 7 + 20) / 87)
    assert result["cut_documents"]["value"] == 0.5
    # what is cut does not end there
    assert sorted(read_items(tmp_path / "i.jsonl")["ends"].tolist()) == [0, 0, 1, 1]
    fewer = assess(
        folders[CAUSAL], tmp_path / "f.jsonl", task=CAUSAL, documents=documents, max_documents=3
    )
    assert fewer["read_documents"]["value"] == 0.75
    labelled = [Document("a" * 10, 0), Document("b" * 30, 1)]
    cut = assess(
        folders[CLASSES], tmp_path / "c.jsonl", task=CLASSES, documents=labelled, sequence_length=20
    )
    assert (cut["read_tokens"]["value"], cut["cut_documents"]["value"]) == (
        pytest.approx(30 / 40),
        0.5,
    )


def test_more_context_costs_fewer_bits_or_other_ones(folders, tmp_path: Path) -> None:
    more = {"task": CAUSAL, "documents": [Document(" ".join(WORDS * 5))], "sequence_length": 16}
    apart, rolling = (
        assess(folders[CAUSAL], tmp_path / "i.jsonl", stride=stride, **more) for stride in (None, 1)
    )
    assert apart["bits_per_byte"]["value"] != rolling["bits_per_byte"]["value"]


@pytest.mark.parametrize(
    ("sides", "task", "decides"),
    [
        ([{"accuracy": 0.5, "macro_f1": 0.4}], None, "accuracy"),
        ([{"perplexity": 9.0, "bits_per_byte": 2.0}], None, "bits_per_byte"),
        ([{"bits_per_byte": 2.0, "accuracy": 0.5}], CLASSES, "accuracy"),
        ([{"bits_per_byte": 2.0, "accuracy": 0.5}], CAUSAL, "bits_per_byte"),
        # what stands in for it, for all sides alike
        ([{"bits_per_byte": None, "next_token_accuracy": 0.3}], CAUSAL, "next_token_accuracy"),
        (
            [
                {"bits_per_byte": 2.0, "next_token_accuracy": 0.4},
                {"bits_per_byte": None, "next_token_accuracy": 0.3},
            ],
            None,
            "next_token_accuracy",
        ),
        ([{"next_token_accuracy": 0.3}], CAUSAL, "next_token_accuracy"),
        ([{"bits_per_byte": None}], None, "bits_per_byte"),
        ([{"macro_f1": 0.3}, {}], None, None),
    ],
)
def test_one_quality_decides(
    sides: list[dict[str, float | None]], task: Task | None, decides: str | None
) -> None:
    assert deciding(sides, task) == decides
    figures = [{key: {"value": value} for key, value in side.items()} for side in sides]
    assert primary_key(figures, task) == decides


@pytest.mark.parametrize(("unknown", "is_known"), [(0, True), (1, True), (3, False), (2000, False)])
def test_bits_per_byte_are_null_under_unknown_tokens(unknown: int, *, is_known: bool) -> None:
    columns = {
        "digest": ["a", "b"],
        "bits": [900.0, 700.0],
        "bytes": [1000, 1000],
        "tokens": [300, 200],
        "correct": [100, 90],
        "unknown_bytes": [unknown // 2, unknown - unknown // 2],
    }
    arrays = {name: np.array(column) for name, column in columns.items()}
    figures = quality.figures_of(CAUSAL, arrays, resamples=200, seed=0)
    row = {"quality": quality.entries_of(CAUSAL, figures, 2, Path("i.jsonl"))}
    assert (figures["bits_per_byte"][0].value is not None) is is_known
    # what can be read of them is compared
    assert row["quality"]["bits_per_byte"]["items"] == "i.jsonl"
    assert ("unknown_bytes" in figures) is (unknown > 0)
    decides = "bits_per_byte" if is_known else "next_token_accuracy"
    same = {**row, "arm": "a"}
    assert primary_key([row["quality"]], CAUSAL) == decides
    assert view.primary_key({"rows": [same]}) == decides
    compared = {
        key: compare_items(key, arrays, arrays, margin=0.01)
        for key in ("bits_per_byte", "next_token_accuracy")
    }
    assert view.primary_of({"quality": compared}) == decides
    if not is_known:
        share = f"{unknown / 2000:.1%}"
        assert figures["bits_per_byte"][0].why_missing.startswith(
            f"{share} of the bytes stand under unknown tokens"
        )
        assert compared["bits_per_byte"]["why_missing"] == figures["bits_per_byte"][0].why_missing


def test_the_artifact_scores_as_the_model_did_in_memory(models, folders, tmp_path: Path) -> None:
    documents, items = causal_documents(), tmp_path / "items.jsonl"
    assess(folders[CAUSAL], items, task=CAUSAL, documents=documents)
    rows = encode_all(documents, byte_tokenizer(), CAUSAL, max_length=64)
    scores = quality.score_causal(
        models[CAUSAL], rows, sequence_length=64, batch_size=16, device="cpu", pad_id=0
    )
    kept = read_items(items)
    memory = dict(zip(scores.digest, scores.bits, strict=True))
    np.testing.assert_allclose(
        kept["bits"], [memory[digest] for digest in kept["digest"]], rtol=1e-6
    )


def test_perplexity_and_bits_per_byte_share_one_interval(folders, tmp_path: Path) -> None:
    # With one token a byte and equal lengths, perplexity is a power of bits per byte, and so are
    # its ends.
    documents = [Document(f"{number:04d} of the mill") for number in range(25)]
    result = assess(folders[CAUSAL], tmp_path / "i.jsonl", task=CAUSAL, documents=documents)
    ends = [2**end for end in result["bits_per_byte"]["ci"]]
    assert result["perplexity"]["ci"] == pytest.approx(ends)


def test_classification_figures_are_sklearns_with_wilsons_interval(folders, tmp_path: Path) -> None:
    documents, items = labelled_documents(seed=2, shuffled=True), tmp_path / "items.jsonl"
    result = assess(folders[CLASSES], items, task=CLASSES, documents=documents)
    kept = read_items(items)
    assert list(kept) == ["digest", "label", "prediction", "correct", "logprob"]
    labels = {document.digest: document.label for document in documents}
    assert [labels[digest] for digest in kept["digest"]] == kept["label"].tolist()
    right, n, z = (
        int((kept["label"] == kept["prediction"]).sum()),
        len(documents),
        1.959963984540054,
    )
    centre, half = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    assert result["accuracy"]["value"] == pytest.approx(right / n)
    assert result["accuracy"]["ci"] == pytest.approx(
        [(centre - half) / (n + z * z), (centre + half) / (n + z * z)]
    )
    assert result["macro_f1"]["value"] == pytest.approx(
        f1_score(kept["label"], kept["prediction"], average="macro")
    )
    assert result["macro_f1"]["ci"][0] < result["macro_f1"]["value"] < result["macro_f1"]["ci"][1]
    assert set(result) == {"accuracy", "macro_f1", "read_tokens", "read_documents", "cut_documents"}


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_sklearns_with_classes_missing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = {"label": rng.integers(0, 3, 12), "prediction": rng.choice([0, 2, 5], 12)}
    expected = f1_score(items["label"], items["prediction"], average="macro", zero_division=0)
    assert macro_f1(items) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "key", "sign"), [(CAUSAL, "bits_per_byte", -1), (CLASSES, "accuracy", 1)]
)
def test_damaged_weights_lower_quality(
    models, folders, tmp_path: Path, task: Task, key: str, sign: int
) -> None:
    damaged = copy.deepcopy(models[task])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in damaged.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    documents = causal_documents() if task is CAUSAL else labelled_documents()
    sound = assess(folders[task], tmp_path / "a.jsonl", task=task, documents=documents)[key]
    broken = assess(
        saved(damaged, tmp_path / "m"), tmp_path / "b.jsonl", task=task, documents=documents
    )[key]
    better, worse = sorted([sound, broken], key=lambda entry: -sign * entry["value"])
    assert better is sound
    # the intervals do not touch
    assert min(better["ci"], worse["ci"])[1] < max(better["ci"], worse["ci"])[0]


def test_labels_that_mean_nothing_leave_chance(tmp_path: Path) -> None:
    folder = saved(
        trained(CLASSES, labelled_documents(30, seed=1, shuffled=True), steps=15), tmp_path / "m"
    )
    documents = labelled_documents(150, seed=5, shuffled=True)
    accuracy = assess(folder, tmp_path / "i.jsonl", task=CLASSES, documents=documents)["accuracy"][
        "value"
    ]
    # 3.3 standard errors of a share of one third
    assert abs(accuracy - 1 / 3) < 3.3 * math.sqrt(2 / 9 / 150)


def test_a_trained_classifier_is_far_from_chance(folders, tmp_path: Path) -> None:
    result = assess(
        folders[CLASSES], tmp_path / "i.jsonl", task=CLASSES, documents=labelled_documents(seed=7)
    )
    assert result["accuracy"]["value"] > 0.9


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_a_model_agrees_with_itself(folders, tmp_path: Path, task: Task) -> None:
    documents = causal_documents() if task is CAUSAL else labelled_documents()
    assess(folders[task], tmp_path / "teacher.jsonl", task=task, documents=documents)
    again = assess(
        folders[task],
        tmp_path / "i.jsonl",
        task=task,
        documents=documents[::-1],
        teacher_predictions=tmp_path / "teacher.predictions.npy",
    )
    assert again["teacher_agreement"]["value"] == 1.0
    assert again["teacher_agreement"]["ci"][1] == 1.0
    items = read_items(tmp_path / "i.jsonl")
    np.testing.assert_array_equal(
        items["agree"], items["tokens"] if task is CAUSAL else np.ones(len(documents))
    )


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_agreement_counts_equal_predictions_by_document(
    folders, tmp_path: Path, task: Task
) -> None:
    documents = causal_documents() if task is CAUSAL else labelled_documents()
    other = saved(tiny(task, seed=3), tmp_path / "other")
    assess(other, tmp_path / "t.jsonl", task=task, documents=documents)
    result = assess(
        folders[task],
        tmp_path / "i.jsonl",
        task=task,
        documents=documents,
        teacher_predictions=tmp_path / "t.predictions.npy",
    )
    ours, theirs = (np.load(tmp_path / f"{name}.predictions.npy").tolist() for name in "it")
    equal = [mine == other for mine, other in zip(ours, theirs, strict=True)]
    assert result["teacher_agreement"]["value"] == pytest.approx(sum(equal) / len(equal))
    items = read_items(tmp_path / "i.jsonl")
    ends = np.cumsum(items["tokens"] if task is CAUSAL else np.ones(len(documents), dtype=int))
    counts = [sum(equal[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert items["agree"].tolist() == counts


# -- drift from the model that was quantized ------------------------------------------------------


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_a_model_does_not_drift_from_itself(folders, tmp_path: Path, task: Task) -> None:
    documents = causal_documents() if task is CAUSAL else labelled_documents()
    result = assess(
        folders[task],
        tmp_path / "i.jsonl",
        task=task,
        documents=documents,
        unquantized=folders[task],
    )
    assert result["kl_to_unquantized"]["value"] == pytest.approx(0, abs=1e-7)
    assert result["flips"]["value"] == 0
    assert result["worst_slice"]["value"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_drift_is_what_both_models_say_on_every_token(folders, tmp_path: Path, task: Task) -> None:
    """By torch's own kl_div in float64, one document at a time, without batches or padding."""
    documents = causal_documents(5) if task is CAUSAL else labelled_documents(9)
    folder = saved(tiny(task, seed=3), tmp_path / "other")
    result = assess(
        folders[task], tmp_path / "i.jsonl", task=task, documents=documents, unquantized=folder
    )
    items = read_items(tmp_path / "i.jsonl")
    auto = {CAUSAL: AutoModelForCausalLM, CLASSES: AutoModelForSequenceClassification}[task]
    ours, theirs = (auto.from_pretrained(path).double().eval() for path in (folders[task], folder))
    by_digest = {document.digest: document for document in documents}
    for place, digest in enumerate(items["digest"]):
        (row,) = encode_all([by_digest[str(digest)]], byte_tokenizer(), task, max_length=64)
        ids = torch.from_numpy(row.input_ids).long()[None]
        with torch.no_grad():
            mine, others = (
                model(input_ids=ids).logits.log_softmax(-1)[0] for model in (ours, theirs)
            )
        if task is CAUSAL:
            said = torch.from_numpy(row.targets[1:] & ~row.ends[1:])  # ends stand apart
            mine, others = (rows[:-1][said] for rows in (mine, others))
        kl = torch.nn.functional.kl_div(mine, others, log_target=True, reduction="sum")
        assert items["kl"][place] == pytest.approx(float(kl), rel=1e-4)
        assert items["flips"][place] == int((mine.argmax(-1) != others.argmax(-1)).sum())
    count = items["tokens"].sum() if task is CAUSAL else len(documents)
    assert result["kl_to_unquantized"]["value"] == pytest.approx(items["kl"].sum() / count)
    assert result["flips"]["value"] == pytest.approx(items["flips"].sum() / count)
    low, high = result["kl_to_unquantized"]["ci"]
    assert low < result["kl_to_unquantized"]["value"] < high
    alone = assess(folder, tmp_path / "o.jsonl", task=task, documents=documents)
    theirs = read_items(tmp_path / "o.jsonl")
    np.testing.assert_allclose(
        items["unquantized"], theirs["bits" if task is CAUSAL else "correct"], rtol=1e-5
    )
    assert "kl_to_unquantized" not in alone


def test_the_worst_slice_is_the_one_that_loses_most() -> None:
    bits = np.array([10.0, 10, 20, 20, 30, 30, 40, 40])
    arrays = {
        "bytes": np.full(8, 10),
        "unquantized": bits,
        "bits": bits * np.array([1, 1, 1.1, 1.3, 1, 1, 1.1, 1.1]),
    }
    assert worst_slice(arrays, None) == ("second quarter", pytest.approx(0.2), 2)
    arrays = {
        "label": np.array([0, 0, 1, 1]),
        "unquantized": np.array([1.0, 1, 1, 0]),
        "correct": np.array([1, 1, 0, 0]),
    }
    assert worst_slice(arrays, ("up", "down")) == ("class down", 0.5, 2)


def test_agreement_is_null_where_the_teacher_reads_other_tokens(folders, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros(7, dtype=np.int32))
    result = assess(
        folders[CAUSAL],
        tmp_path / "i.jsonl",
        task=CAUSAL,
        documents=causal_documents(),
        teacher_predictions=tmp_path / "t.npy",
    )
    entry = result["teacher_agreement"]
    assert entry["value"] is entry["ci"] is entry["n"] is entry["items"] is None
    assert "the teacher has 7 predictions" in entry["why_missing"]
    assert "agree" not in read_items(tmp_path / "i.jsonl")


def test_results_have_the_form_of_result_json(folders, tmp_path: Path) -> None:
    form = RESULT_SCHEMA["properties"]["rows"]["items"]["properties"]["quality"]
    np.save(tmp_path / "t.npy", np.zeros(7, dtype=np.int32))
    for task, documents in ((CAUSAL, causal_documents()), (CLASSES, labelled_documents())):
        result = assess(
            folders[task],
            tmp_path / "i.jsonl",
            task=task,
            documents=documents,
            teacher_predictions=tmp_path / "t.npy",
            unquantized=folders[task],
        )
        jsonschema.validate(
            json.loads(json.dumps(result, allow_nan=False)),
            {**form, "$defs": RESULT_SCHEMA["$defs"]},
        )


def test_documents_are_chosen_by_content_and_cut_by_bytes(folders, tmp_path: Path) -> None:
    documents = causal_documents()
    chosen = choose_documents(documents, 5)
    assert chosen == choose_documents(documents[::-1], 5)
    assert {d.digest for d in chosen} == set(sorted(d.digest for d in documents)[:5])
    items = tmp_path / "i.jsonl"
    result = assess(
        folders[CAUSAL],
        items,
        task=CAUSAL,
        documents=documents,
        max_documents=5,
        max_bytes_per_document=10,
    )
    kept = read_items(items)
    assert kept["digest"].tolist() == [document.digest for document in chosen]
    assert kept["bytes"].tolist() == [10] * 5
    assert result["bits_per_byte"]["n"] == 5


def test_one_document_has_no_interval(folders, tmp_path: Path) -> None:
    for task, documents in ((CAUSAL, causal_documents(1)), (CLASSES, labelled_documents(1))):
        result = assess(folders[task], tmp_path / "i.jsonl", task=task, documents=documents)
        spread = {key for key, entry in result.items() if entry["ci"] is not None}
        assert spread == ({"accuracy"} if task is CLASSES else set())
        assert all(entry["value"] is not None for entry in result.values())


def test_time_is_booked_to_loading_preparing_and_evaluating(
    folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0]

    def takes(name: str, ns: int) -> None:
        module = figures if name == "bootstrap_ratio" else quality
        original = getattr(module, name)

        def slow(*args, **more):
            now[0] += ns
            return original(*args, **more)

        monkeypatch.setattr(module, name, slow)

    steps = (
        "load_model",
        "load_tokenizer",
        "choose_documents",
        "encode_all",
        "score_causal",
        "bootstrap_ratio",
    )
    for place, name in enumerate((*steps, "write_items")):
        takes(name, 10**place)
    clock = PhaseClock(lambda: now[0])
    assess(
        folders[CAUSAL],
        tmp_path / "i.jsonl",
        task=CAUSAL,
        documents=causal_documents(),
        clock=clock,
    )
    spent = {name: ns for name, ns in clock.read_ns().items() if ns}
    assert spent == {"model_load": 11, "prepare": 1_100, "eval": 1_410_000}  # four ratios


def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "items.jsonl"
    write_items(path, {"digest": np.array(["a", "b"]), "bits": np.array([0.1, math.pi])})
    assert read_items(path)["bits"].tolist() == [0.1, math.pi]
    before, real = path.read_bytes(), json.dumps
    monkeypatch.setattr(
        quality.json, "dumps", lambda row: 1 / 0 if row["digest"] == "b" else real(row)
    )
    with pytest.raises(ZeroDivisionError):
        write_items(path, {"digest": np.array(["a", "b"]), "bits": np.array([1.0, 2.0])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_outputs_that_are_not_finite_fail_the_artifact(models, tmp_path: Path, task: Task) -> None:
    broken, items = copy.deepcopy(models[task]), tmp_path / "i.jsonl"
    documents = causal_documents() if task is CAUSAL else labelled_documents()
    with torch.no_grad():
        (broken.get_input_embeddings() if task is CAUSAL else broken.score).weight[0] = math.nan
    folder = saved(broken, tmp_path / "m")
    with pytest.raises(
        StageFailed, match=f"not finite on {len(documents)} of {len(documents)} test documents"
    ):
        assess(folder, items, task=task, documents=documents)
    assert not items.exists()


def test_a_perplexity_beyond_floats_is_null() -> None:
    value, ci = figures._power_of_2(1200.0, (900.0, 1500.0))
    assert (value.value, ci) == (None, None)
    assert value.why_missing == "2**1200 is beyond the range of a float"
    value, ci = figures._power_of_2(1000.0, (900.0, 1500.0))
    assert (value.value, ci) == (None, None)


def test_what_cannot_be_assessed_is_refused(folders, tmp_path: Path) -> None:
    more = {
        "config": QualityConfig(),
        "sequence_length": 64,
        "device": "cpu",
        "items": tmp_path / "i.jsonl",
        "teacher_predictions": None,
        "seed": 0,
        "clock": PhaseClock(),
    }
    with pytest.raises(
        UserError,
        match=r"model\.path: .* tells the classes up, down, flat apart, the data has a, b",
    ):
        assess_quality(
            folders[CLASSES],
            documents=labelled_documents(),
            task=CLASSES,
            labels=("a", "b"),
            **more,
        )
    with pytest.raises(UserError, match="data: no test document holds anything to score"):
        assess_quality(folders[CAUSAL], documents=[], task=CAUSAL, labels=None, **more)
