"""`docs/supported.md` says what is so: its cells are run again."""

from __future__ import annotations

from pathlib import Path

import pytest
from format_matrix import ARCHITECTURES
from support import ANSWERS, TABLE, answers, data_tables, formats, read_table

from pipeline.quantization.bnb import cpu_repacks

pytest.importorskip("bitsandbytes")
THIS_CPU = "on this CPU needs inputs in multiples of"
# each takes seconds; `-m slow` runs all
BY_DEFAULT = ("Gemma2", "GPT-Neo", "DeepSeek-V3", "ModernBERT")


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, str]]:
    return read_table(TABLE.read_text(encoding="utf-8"))


def test_every_architecture_stands_in_the_table(told: dict[str, dict[str, str]]) -> None:
    assert list(told) == list(ARCHITECTURES)
    assert all(list(cells)[: len(ANSWERS)] == list(ANSWERS) for cells in told.values())


@pytest.mark.parametrize(
    "name",
    [
        name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_what_the_table_says_of_an_architecture_is_so(
    name: str, told: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    found = answers(name, tmp_path) | formats(name, tmp_path)
    # a device with other units than that of the table may have formats that it lacks
    found = {column: cell for column, cell in found.items() if column in told[name]}
    if not cpu_repacks():  # the table is of a CPU whose kernel takes some shapes only
        found = {
            column: cell for column, cell in found.items() if THIS_CPU not in told[name][column]
        }
    assert len(found) >= len(ANSWERS)
    assert found == {column: told[name][column] for column in found}


def test_the_tables_of_data_are_those_that_are_tested() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert "\n".join(data_tables()) in text


def test_a_cell_that_is_wrong_is_found(told: dict[str, dict[str, str]], tmp_path: Path) -> None:
    found = answers("Mamba", tmp_path)
    assert found != told["Llama"]
    assert told["Llama"]["trained"] == "fused"
