"""The table of what is supported, `docs/supported.md`: every cell is what this code does with a
tiny model or a file.

`python tests/support.py > docs/supported.md` writes it anew; `test_support.py` runs its cells again
and compares. A cell is yes, a word on how, or no with the number of its reason, which is what a run
prints when it refuses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import data_layouts
import torch
import transformers
from format_matrix import ARCHITECTURES, CLASSES, CPU, FORMATS, Architecture, cell
from make_assess_models import LABELS, byte_tokenizer

from pipeline.config.settings.model import StudentConfig
from pipeline.errors import UserError
from pipeline.models.load import save_model
from pipeline.models.student import make_student, stack_layers
from pipeline.tasks.table import Task
from pipeline.training.reading import examine

TABLE = Path(__file__).resolve().parent.parent / "docs/supported.md"
ANSWERS = ("trained", "student cut", "stacked", "classifies")
"""Columns beside the formats: see `INTRODUCTION`."""

INTRODUCTION = """# What is supported

`python tests/support.py > docs/supported.md` writes this page; each cell was run on a tiny model or
file, and `tests/test_support.py` runs them again. An architecture that is not listed is treated by
the same rules.

## Models

- **trained**: as a language model, and how the loss is taken from the output head. *fused*: in
  chunks, with the model's own logit scale, soft cap and bias, and without ever holding all logits.
  *full logits*: through the model's own forward pass, which takes more memory. *unpacked*: a
  document a row, where the model would read from one packed document into the next. Every training
  proves the choice on amplified logits before it starts.
- **student cut**: `student.layers`; **stacked**: `stages.NAME.stack`. Both are proven by a reload
  before a step.
- **classifies**: `task=sequence_classification`, trained for a step and scored.
- **formats**: the share of the parameters that the format takes, where it is below 90%.

"""


def answers(name: str, folder: Path) -> dict[str, str]:
    """Return the cells of an architecture beside its formats, by column."""
    architecture = ARCHITECTURES[name]
    source = folder / "model"
    model = architecture.make()
    save_model(model, byte_tokenizer(), source)
    return {
        "trained": _head(model) if architecture.task is Task.causal_lm else "",
        "student cut": _asked(
            lambda: make_student(
                StudentConfig(layers=[1]), source, architecture.task, _labels(model)
            )
        ),
        "stacked": _asked(lambda: stack_layers(model, 2, "stages.NAME.stack")),
        "classifies": _asked(lambda: _classify(architecture)),
    }


def _labels(model: torch.nn.Module) -> tuple[str, ...] | None:
    return LABELS if "Classification" in type(model).__name__ else None


def _asked(do: Callable[[], object]) -> str:
    try:
        do()
    except UserError as error:
        return f"no: {error.problem}"
    return "yes"


def _head(model: torch.nn.Module) -> str:
    try:
        found = examine(model, CPU)
    except UserError as error:
        return f"no: {error.problem}"
    why = getattr(found.head, "why", None)
    rows = "" if found.packs else ", unpacked"
    return f"fused{rows}" if why is None else f"full logits{rows}: {why}"


def _classify(architecture: Architecture) -> None:
    """Train a classifier of this architecture for a step on padded examples, and score it."""
    config = getattr(transformers, architecture.config)(**architecture.settings | CLASSES)
    torch.manual_seed(0)
    try:
        model = transformers.AutoModelForSequenceClassification.from_config(config).float()
    except ValueError as error:
        raise UserError(
            "task", "transformers has no classifier of this architecture", "use another"
        ) from error
    tokenizer = byte_tokenizer()
    batch = tokenizer(
        ["a b</s>", "c d e f</s>"], padding=True, return_tensors="pt", return_token_type_ids=False
    )
    before = model.train()(**batch, labels=torch.tensor([0, 1])).loss
    before.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert torch.isfinite(model.eval()(**batch).logits).all()


def formats(name: str, folder: Path) -> dict[str, str]:
    """Return the cells of an architecture's formats, by format."""
    return {fmt.value: str(cell(name, fmt, folder)) for fmt in FORMATS}


class Reasons:
    """Numbers reasons in the order in which they come."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def short(self, text: str) -> str:
        """Return a cell with its reason's number in place of the reason."""
        answer, colon, why = text.partition(": ")
        if not colon:
            return text
        if why not in self.known:
            self.known.append(why)
        return f"{answer} ({self.known.index(why) + 1})"


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Return the cells of the table of models, by architecture and column, reasons in full."""
    lines = text.splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if line.partition(". ")[0].isdecimal())
    rows = [
        [each.strip() for each in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    header = rows[0]
    found: dict[str, dict[str, str]] = {}
    for row in rows[2:]:
        if row[0] not in ARCHITECTURES:
            break
        found[row[0]] = {}
        for column, short in zip(header[1:], row[1:], strict=True):
            answer, bracket, number = short.rstrip(")").partition(" (")
            found[row[0]][column] = f"{answer}: {reasons[number]}" if bracket else short
    return found


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def models_table() -> list[str]:
    """Return the section on models, line by line."""
    columns, reasons = [*ANSWERS, *(fmt.value for fmt in FORMATS)], Reasons()
    lines = [_line(["architecture", *columns]), "|---" * (len(columns) + 1) + "|"]
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as root:
            cells = answers(name, Path(root)) | formats(name, Path(root))
        lines.append(_line([name, *(reasons.short(cells[column]) for column in columns)]))
    return [
        *lines,
        "",
        "Reasons, as a run prints them:",
        "",
        *(f"{number}. {why}" for number, why in enumerate(reasons.known, 1)),
    ]


def data_tables() -> list[str]:
    """Return the section on data; `test_data_layouts.py` and `test_data_rows.py` load each cell."""
    packed = [name or "plain" for name in data_layouts.COMPRESSIONS]
    lines = [
        "## Data files",
        "",
        "`data.path` is a file or a folder; endings in any letter case.",
        "",
        _line(["ending", *packed]),
        "|---" * (len(packed) + 1) + "|",
        *(_line([ending, *["yes"] * len(packed)]) for ending in data_layouts.FORMATS),
        "",
        "Folders, each read in every format:",
        "",
    ]
    with tempfile.TemporaryDirectory() as root:
        for name, make in {**data_layouts.LAYOUTS, **data_layouts.ONE_SPLIT}.items():
            folder = Path(root) / name.replace(" ", "_")
            folder.mkdir()
            make(folder, ".jsonl")
            files = sorted(
                path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
            )
            lines.append(f"- {name}: {', '.join(f'`{file}`' for file in files)}")
        lines += [*_own_layouts(Path(root))]
    lines += [
        "- what `datasets` saves with `save_to_disk`, one split or several",
        "",
        "## Rows",
        "",
        (
            "Rows are recognised by their columns; `data.format=` forces one, `data.columns={...}`"
            " names columns."
        ),
        "",
        _line(["columns", "read as", "task"]),
        "|---|---|---|",
    ]
    lines += [
        _line([name, kind, "causal_lm"]) for name, (kind, _) in data_layouts.ROW_CELLS.items()
    ]
    lines += [
        _line([name, kind, "sequence_classification"])
        for name, (kind, _) in data_layouts.LABELLED_CELLS.items()
    ]
    return lines


def _own_layouts(root: Path) -> Iterable[str]:
    """Yield a line for each layout that has a format of its own."""
    for name, make in data_layouts.OWN_LAYOUTS.items():
        folder = root / name.replace(" ", "_")
        folder.mkdir()
        make(folder)
        files = sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
        shown = [files[0], files[-1]] if len(files) > 2 else files
        yield f"- {name}: {' ... '.join(f'`{file}`' for file in shown)}"


if __name__ == "__main__":
    print(INTRODUCTION + "\n".join([*models_table(), "", *data_tables()]))
