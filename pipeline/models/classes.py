"""Which output of a classifier stands for which class of the data: told by name, never by place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GENERIC = re.compile(r"LABEL_(\d+)")  # what transformers calls classes that nobody named
PROBLEMS = {
    "regression": "predicts a number",
    "multi_label_classification": "may give a text several classes",
}
SHOWN = 12  # names of a refusal


@dataclass(frozen=True, slots=True)
class Classes:
    """How a classifier is read on a dataset.

    Attributes:
        order: The output of each class of the data, then those of the model's other classes.
        names: The model's class names by output, as they are to be from now on.
        is_new: Whether the head is to be made anew, because its classes are not those of the data.
        note: What a reader must know; None where names are equal.
    """

    order: tuple[int, ...]
    names: tuple[str, ...]
    is_new: bool = False
    note: str | None = None


def class_names(config: Any) -> tuple[str, ...]:
    """Return a classifier's class names by output."""
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def match_classes(
    config: Any, labels: Sequence[str], *, new_head: bool, key: str, path: object
) -> Classes:
    """Find each of the data's classes among a model's.

    Names are equal up to case, blanks around them, and the choice of blank, `_` or `-` inside.
    Numbers are outputs, where there is one for each. The model's numbering stays as it is.

    Args:
        labels: The data's class names.
        new_head: Whether a head of other classes may be made anew, because it is trained
            afterwards.

    Raises:
        UserError: If the model is no classifier, or has other classes and keeps its head.
    """
    refuse_other_problem(config, key, path)
    theirs, ours = class_names(config), tuple(labels)
    for form in (str, folded):
        found = _by_name([form(name) for name in theirs], [form(name) for name in ours])
        if found is not None:
            return Classes(_with_rest(found, theirs), theirs)
    is_generic = all(_GENERIC.fullmatch(name) for name in theirs)
    if sorted(ours) == sorted(map(str, range(len(theirs)))):
        named = _listed([theirs[int(name)] for name in ours])
        note = (
            None
            if is_generic
            else f"{key}: the data's classes {_listed(ours)} are read as {named} of {path}"
        )
        return Classes(tuple(map(int, ours)), theirs, note=note)
    if not new_head:
        raise UserError(key, *_mismatch(theirs, ours, path))
    if is_generic and len(theirs) == len(ours):
        note = (
            f"{key}: the classes of {path} have no names; its outputs are taken as {_listed(ours)},"
            " and trained on"
        )
        return Classes(tuple(range(len(ours))), ours, note=note)
    note = (
        f"{key}: {path} tells {_listed(theirs)} apart, the data {_listed(ours)}: its head is made"
        " anew"
    )
    return Classes(tuple(range(len(ours))), ours, is_new=True, note=note)


def refuse_other_problem(config: Any, key: str, path: object) -> None:
    """Refuse a model whose outputs are no classes of which one is right.

    Raises:
        UserError: For regression, for several labels a text, for a single output.
    """
    problem = getattr(config, "problem_type", None)
    if problem in PROBLEMS:
        said = f"{path} has problem_type {problem}: it {PROBLEMS[problem]}"
        raise UserError(
            key, said, "give a classifier of one class a text (single_label_classification)"
        )
    if config.num_labels == 1:
        raise UserError(
            key, f"{path} has a single output, which tells no classes apart", "give a classifier"
        )


def folded(name: str) -> str:
    """Return a name without what people write differently: case, blanks, `_` and `-`."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _by_name(theirs: list[str], ours: list[str]) -> list[int] | None:
    """Return the output of each of our names; None where one is missing or not unique."""
    if len(set(theirs)) < len(theirs) or len(set(ours)) < len(ours) or not set(ours) <= set(theirs):
        return None
    return [theirs.index(name) for name in ours]


def _with_rest(found: list[int], theirs: Sequence[str]) -> tuple[int, ...]:
    """Put the model's other classes behind, by name: two models that have the same ones agree on
    their places.
    """
    rest = sorted(
        set(range(len(theirs))) - set(found), key=lambda index: (folded(theirs[index]), index)
    )
    return (*found, *rest)


def _mismatch(theirs: Sequence[str], ours: Sequence[str], path: object) -> tuple[str, str]:
    problem = (
        f"{path} tells the classes {_listed(theirs)} apart, the data has {_listed(ours)}, and no"
        " step trains it"
    )
    unknown = next((name for name in ours if folded(name) not in map(folded, theirs)), ours[0])
    remedy = (
        f"map the data's names to the model's: data.label_map={{{unknown}: {theirs[0]}, ...}}, or"
        " train: steps > 0"
    )
    return problem, remedy


def _listed(names: Sequence[str]) -> str:
    return (
        ", ".join(names)
        if len(names) <= SHOWN
        else f"{', '.join(names[:SHOWN])}, ... ({len(names)})"
    )


def read_in_order(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Have a model give its logits, (B, C), in the data's order; its weights and names stay as they
    are.

    Done once here, so that scores, losses, teachers and caches all read the data's numbering.
    """
    vars(model)["class_order"] = tuple(order)
    if list(order) == list(range(len(order))):
        return
    chosen = list(order)

    def reorder(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits = output.logits[:, chosen]
        return output

    model.register_forward_hook(reorder)


def names_in_order(model: Any) -> tuple[str, ...]:
    """Return a model's class names as its logits come."""
    names = class_names(model.config)
    return tuple(names[index] for index in getattr(model, "class_order", range(len(names))))


def same_in_order(ours: Any, theirs: Any, count: int) -> bool:
    """Whether the first logits of two models are of the same classes: by name, or by number where
    one has no names.

    A number (`2`, `LABEL_2`) is the other model's output of that number: that is how data of
    numbers are read.
    """
    names = [names_in_order(model)[:count] for model in (ours, theirs)]
    if list(map(folded, names[0])) == list(map(folded, names[1])):
        return True
    total = len(names_in_order(theirs))
    numbers = [[_number(name) for name in names_in_order(model)] for model in (ours, theirs)]
    are_numbers = [
        sorted(-1 if each is None else each for each in found) == list(range(len(found)))
        for found in numbers
    ]
    if all(are_numbers):
        return numbers[0][:count] == numbers[1][:count]
    if not any(are_numbers) or total != len(names_in_order(ours)):
        return False
    unnamed = are_numbers.index(True)
    if any(number is not None for number in numbers[1 - unnamed]):
        return False
    return numbers[unnamed] == list(getattr((theirs, ours)[unnamed], "class_order", range(total)))


def _number(name: str) -> int | None:
    found = _GENERIC.fullmatch(name) or re.fullmatch(r"(\d+)", name)
    return None if found is None else int(found[1])


def listed(model: Any) -> str:
    """Return a model's class names as its logits come, as a refusal says them."""
    return _listed(names_in_order(model))
