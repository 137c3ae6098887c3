"""Classes of a model and of the data: matched by name, whatever place they have in either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from here import here
from make_assess_models import byte_tokenizer
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPTNeoXConfig,
    PreTrainedConfig,
)

from pipeline.config.settings.model import StudentConfig
from pipeline.config.settings.quality import QualityConfig
from pipeline.data.documents import Document
from pipeline.errors import UserError
from pipeline.evaluation.quality.assess import assess_quality, read_items
from pipeline.ledger.phases import PhaseClock
from pipeline.models.classes import match_classes, names_in_order
from pipeline.models.load import load_model, save_model
from pipeline.models.student import make_student
from pipeline.tasks.table import Task
from pipeline.training.objective import shared_vocabulary

TASK = Task.sequence_classification
WIDTHS: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**WIDTHS),
    "albert": AlbertConfig(**WIDTHS, embedding_size=32),
    "neox": GPTNeoXConfig(**WIDTHS),
    "distilbert": DistilBertConfig(
        vocab_size=259, dim=64, n_layers=2, n_heads=2, hidden_dim=64, pad_token_id=0
    ),
}


def classifier(folder: Path, names: tuple[str, ...], kind: str = "bert", seed: int = 0) -> Path:
    """Save a classifier of these classes whose outputs differ clearly."""
    config = ARCHITECTURES[kind].__class__.from_dict(ARCHITECTURES[kind].to_dict())
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.shape == (len(names),):  # a bias: each class its own
                tensor.copy_(torch.arange(len(names)).float())
            elif tensor.shape[0] == len(names) and name.endswith("weight"):
                tensor.mul_(10)
    save_model(model, byte_tokenizer(), folder)
    return folder


def config_of(names: tuple[str, ...], **more: Any) -> BertConfig:
    return BertConfig(**WIDTHS, id2label=dict(enumerate(names)), **more)


def match(names: tuple[str, ...], labels: tuple[str, ...], *, new_head: bool = False) -> Any:
    return match_classes(config_of(names), labels, new_head=new_head, key="model.path", path="M")


@pytest.mark.parametrize(
    ("theirs", "ours", "order"),
    [
        (("negative", "positive"), ("negative", "positive"), (0, 1)),
        (("POSITIVE", "NEGATIVE"), ("negative", "positive"), (1, 0)),
        ((" Not_Spam", "spam"), ("not spam", "Spam "), (0, 1)),
        (("contra-diction", "b", "a"), ("a", "contra diction"), (2, 0, 1)),
        (("z", "Y", "x", "w"), ("y", "z"), (1, 0, 3, 2)),  # the others behind, by name
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2"), (0, 1, 2)),
        (("LABEL_0", "LABEL_1"), ("label_1", "label_0"), (1, 0)),
        (("NEG", "POS"), ("0", "1"), (0, 1)),
        (("5", "7"), ("7", "5"), (1, 0)),
        (("a", "A"), ("A", "a"), (1, 0)),  # two that differ in case alone are told by it
    ],
)
def test_classes_are_found_by_name(
    theirs: tuple[str, ...], ours: tuple[str, ...], order: tuple[int, ...]
) -> None:
    found = match(theirs, ours)
    assert (found.order, found.names, found.is_new) == (order, theirs, False)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("positive", "negative"), ("neg", "pos")),
        (("a", "b"), ("a", "b", "c")),
        (("a", "b", "c"), ("0", "1")),
        (("LABEL_0", "LABEL_1"), ("ham", "spam")),
        (("a b", "a_b"), ("a-b", "c")),
        (("no", "yes"), ("1", "2")),
    ],
)
def test_other_classes_are_refused_with_both_lists_where_nothing_trains(
    theirs: tuple[str, ...], ours: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=r"data\.label_map=\{") as refused:
        match(theirs, ours)
    assert f"the classes {', '.join(theirs)} apart, the data has {', '.join(ours)}" in str(
        refused.value
    )


def test_other_classes_get_a_new_head_where_it_is_trained_and_unnamed_ones_a_name() -> None:
    found = match(("positive", "negative"), ("neg", "pos"), new_head=True)
    assert (found.is_new, found.names) == (True, ("neg", "pos"))
    assert "its head is made anew" in found.note
    found = match(("LABEL_0", "LABEL_1"), ("ham", "spam"), new_head=True)
    assert (found.is_new, found.names, found.order) == (False, ("ham", "spam"), (0, 1))
    assert "taken as ham, spam" in found.note


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_what_is_no_classifier_is_refused_by_name(problem: str) -> None:
    with pytest.raises(UserError, match=f"problem_type {problem}"):
        match_classes(
            config_of(("a", "b"), problem_type=problem),
            ("a", "b"),
            new_head=True,
            key="k",
            path="M",
        )
    with pytest.raises(UserError, match="a single output"):
        match_classes(config_of(("a",)), ("a", "b"), new_head=True, key="k", path="M")


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_logits_come_in_the_datas_order_and_the_artifact_keeps_the_models(
    tmp_path: Path, kind: str
) -> None:
    folder = classifier(tmp_path / "m", ("Beta", "ALPHA", "gamma"), kind)
    ids = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        plain = (
            AutoModelForSequenceClassification.from_pretrained(folder).eval()(input_ids=ids).logits
        )
        model = load_model(folder, TASK, labels=("alpha", "beta"))
        assert torch.allclose(model(input_ids=ids).logits, plain[:, [1, 0, 2]])
    save_model(model, byte_tokenizer(), tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["Beta", "ALPHA", "gamma"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, plain)


@pytest.mark.parametrize("kind", ["albert", "distilbert", "neox"])
def test_a_new_head_is_new_and_the_body_is_kept(tmp_path: Path, kind: str) -> None:
    folder = classifier(tmp_path, ("a", "b"), kind)
    torch.manual_seed(3)
    model: Any = load_model(folder, TASK, labels=("c", "d"), new_head=True)
    before = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    changed = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    assert changed
    assert all(before[name].shape[0] == 2 for name in changed)
    assert model.config.id2label == {0: "c", 1: "d"}


def test_a_student_keeps_its_teachers_order_and_may_have_fewer_classes(tmp_path: Path) -> None:
    teacher = classifier(tmp_path / "t", ("gamma", "beta", "alpha"))
    labels = ("alpha", "beta", "gamma")
    student, _ = make_student(StudentConfig(layers=[1]), teacher, TASK, labels)
    assert names_in_order(student) == labels
    assert student.config.id2label == {0: "gamma", 1: "beta", 2: "alpha"}
    few = ("alpha", "beta")
    big = load_model(teacher, TASK, labels=few)
    small = load_model(classifier(tmp_path / "s", ("beta", "alpha")), TASK, labels=few)
    assert shared_vocabulary(small, big, TASK) == 2
    with pytest.raises(UserError, match="has 3 classes, its teacher 2"):
        shared_vocabulary(big, small, TASK)


@pytest.mark.parametrize(
    ("ours", "theirs", "labels", "same"),
    [
        (("in", "out", "left over"), ("out", "in", "Left_Over"), ("in", "out"), True),
        (("in", "out", "other"), ("out", "in", "none"), ("in", "out"), False),
        (("in", "out", "a"), ("out", "in", "b", "A"), ("in", "out"), True),
        (("in", "out", "z"), ("out", "in", "b", "z"), ("in", "out"), False),
        # both read by number
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("a", "b", "c"), ("2", "0", "1"), True),
        (("LABEL_0", "LABEL_1"), ("a", "b", "c"), None, False),
        (("0", "1", "2"), ("LABEL_0", "LABEL_1", "LABEL_2"), ("1", "2", "0"), True),
        (("0", "1", "x"), ("LABEL_0", "LABEL_1", "LABEL_2"), None, False),
    ],
)
def test_a_teacher_has_the_students_classes_by_name_and_not_by_number_of_them(
    tmp_path: Path,
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    labels: tuple[str, ...] | None,
    same: bool,
) -> None:
    student = load_model(classifier(tmp_path / "s", ours, "albert"), TASK, labels=labels)
    teacher = load_model(classifier(tmp_path / "t", theirs, "neox"), TASK, labels=labels)
    if same:
        assert shared_vocabulary(student, teacher, TASK) == len(ours)
        return
    said = (
        f"has {len(ours)} classes, its teacher {len(theirs)}: .*{ours[-1]}.* against .*{theirs[-1]}"
    )
    with pytest.raises(UserError, match=said):
        shared_vocabulary(student, teacher, TASK)


@pytest.mark.parametrize("kind", ["albert", "neox"])
def test_two_models_that_number_their_classes_otherwise_are_scored_alike(
    tmp_path: Path, kind: str
) -> None:
    """Candidate and baseline of a gate: the same head, its rows in another order."""
    one, other = classifier(tmp_path / "1", ("a", "b", "c"), kind), tmp_path / "2"
    model: Any = AutoModelForSequenceClassification.from_pretrained(one)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.shape[0] == 3 and name.startswith(("classifier", "score")):
                tensor.copy_(tensor[[2, 0, 1]].clone())
    model.config.id2label, model.config.label2id = (
        {0: "C", 1: "A", 2: "B"},
        {"C": 0, "A": 1, "B": 2},
    )
    save_model(model, byte_tokenizer(), other)
    documents = [Document(f"text number {number}", number % 3) for number in range(24)]
    scored = [
        assess_quality(
            folder,
            documents=documents,
            task=TASK,
            labels=("a", "b", "c"),
            sequence_length=32,
            config=QualityConfig(bootstrap=200),
            device="cpu",
            items=tmp_path / f"{folder.name}.jsonl",
            teacher_predictions=None,
            seed=0,
            clock=PhaseClock(),
        )
        for folder in (one, other)
    ]
    assert scored[0]["accuracy"]["value"] == scored[1]["accuracy"]["value"]
    ours, theirs = (read_items(tmp_path / f"{name}.jsonl") for name in "12")
    np.testing.assert_allclose(ours["logprob"], theirs["logprob"], rtol=1e-5)


def labelled(folder: Path, names: tuple[str, str], label: Any) -> Path:
    """Write test documents with the class that `label` gives for a text."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 12), ("test", 24)):
        texts = ["".join(map(chr, rng.integers(97, 123, 20))) for _ in range(count)]
        rows = [{"text": text, "label": names[label(text)]} for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def accuracy(done: Any, cwd: Path, arm: str) -> float:
    assert done.returncode in (0, 3, 4, 5, 6), done.stderr
    result = json.loads((cwd / "mlruns" / "latest" / "result.json").read_text())
    row = next(row for row in result["rows"] if row["arm"] == arm)
    return row["quality"]["accuracy"]["value"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a classifier that says positive, negative, and data which it answers without a
    mistake.
    """
    root = tmp_path_factory.mktemp("told")
    model = classifier(root / "model", ("positive", "negative"))
    loaded = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        loaded.classifier.weight.copy_(
            torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
        )
        loaded.classifier.bias.zero_()
    save_model(loaded, byte_tokenizer(), model)
    tokenizer = byte_tokenizer()
    texts = [
        "".join(map(chr, np.random.default_rng(seed).integers(97, 123, 20))) for seed in range(30)
    ]
    with torch.no_grad():
        logits = torch.cat(
            [loaded(**tokenizer(text, return_tensors="pt")).logits for text in texts]
        )
        loaded.classifier.bias.copy_(-logits.median(0).values)
    save_model(loaded, byte_tokenizer(), model)

    def answer(text: str) -> int:
        with torch.no_grad():
            return int(loaded(**tokenizer(text, return_tensors="pt")).logits.argmax())

    return model, labelled(root / "data", ("Positive ", "NEGATIVE"), answer)


@pytest.mark.slow
def test_a_model_as_it_is_keeps_its_accuracy_under_other_spellings_and_is_refused_under_other_names(
    tmp_path: Path, told: tuple[Path, Path]
) -> None:
    model, data = told
    args = [
        "recipe=baseline",
        f"model.path={model}",
        "task=sequence_classification",
        "training.steps=0",
        "tracking=off",
        "serving.batches=[1]",
        "quality.bootstrap=200",
    ]
    done = here(tmp_path, *args, f"data.path={data}")
    assert done.returncode == 0, done.stderr + done.stdout
    assert accuracy(done, tmp_path, _arm(tmp_path)) == 1.0
    other = tmp_path / "other"
    other.mkdir()
    for file in data.iterdir():
        text = file.read_text().replace('"Positive "', '"pos"').replace('"NEGATIVE"', '"neg"')
        (other / file.name).write_text(text)
    done = here(tmp_path, *args, f"data.path={other}")
    assert done.returncode == 1
    assert "tells the classes positive, negative apart, the data has neg, pos" in done.stderr
    done = here(
        tmp_path, *args, f"data.path={other}", "data.label_map={pos: positive, neg: negative}"
    )
    assert accuracy(done, tmp_path, _arm(tmp_path)) == 1.0
    done = here(tmp_path, *args, f"data.path={other}", "training.steps=2", "training.batch_size=4")
    assert "its head is made anew" in done.stdout
    assert done.returncode == 0, done.stderr


def _arm(cwd: Path) -> str:
    return json.loads((cwd / "mlruns" / "latest" / "result.json").read_text())["primary_arm"]
