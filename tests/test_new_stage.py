"""Another type of stage is a file of its own, a line of the table with its import, and a recipe."""

from __future__ import annotations

import pytest
from edited_copy import Copy, result_of

STAGE = '''"""Average: the mean of two models' weights.

Source: Wortsman et al. 2022, "Model soups", arXiv 2203.05482, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.stages.base import MODEL, Reference, Stage


@dataclass(kw_only=True, slots=True)
class AverageStage(Stage):
    """Settings of an `average` stage."""

    model: str = "base"
    other: str = "base"
    share: float = 0.5  # of the other

    type: ClassVar[str] = "average"
    version: ClassVar[int] = 1

    def references(self, run):
        return {MODEL: Reference(self.model, "model"), "other": Reference(self.other, "other")}

    def starts_from(self):
        return self.model

    def check(self, key, run):
        from pipeline.errors import UserError

        if not 0 <= self.share <= 1:
            raise UserError(f"{key}.share", f"{self.share} is no share", "give 0 to 1")

    def run(self, inputs, ctx):
        from safetensors.torch import load_file, save_file

        from pipeline.stages.context import Output
        from pipeline.store.artifacts import copy_model

        with ctx.clock.phase("convert"):
            copy_model(inputs[MODEL].path, ctx.out)
            ours, theirs = (
                load_file(inputs[role].path / "model.safetensors") for role in (MODEL, "other")
            )
            own = 1 - self.share
            mean = {name: own * ours[name] + self.share * theirs[name] for name in ours}
            save_file(mean, ctx.out / "model.safetensors", metadata={"format": "pt"})
        return Output(notes=(f"{ctx.stage}: averaged {len(mean)} tensors",))
'''
RECIPE = """# Is the mean of two trainings better than one?
defaults:
  - /stage@stages.one: train
  - /stage@stages.more: train
  - /stage@stages.both: average
stages:
  one: {model: base}
  more: {model: one}
  both: {model: one, other: more}
primary_arm: both
compare:
  - {arm: both, base: one, on: [quality, serving]}
"""
IMPORT = "from pipeline.stages.capture import CaptureStage\n"
LINE = '    "capture": CaptureStage,\n'


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Return a copy of the project with exactly the edits that CONTRIBUTING lists."""
    copy, table = Copy.make(tmp_path_factory.mktemp("stage")), "pipeline/stages/table.py"
    copy.add_file("pipeline/stages/average.py", STAGE)
    copy.add_lines(table, IMPORT, "from pipeline.stages.average import AverageStage\n")
    copy.add_lines(table, LINE, '    "average": AverageStage,\n')
    copy.add_file("recipes/average.yaml", RECIPE)
    return copy


@pytest.mark.slow
def test_a_stage_of_one_file_runs_is_compared_and_found_again(copy: Copy) -> None:
    result = result_of(copy.run("recipe=average"))
    row = next(row for row in result["rows"] if row["arm"] == "both")
    assert (row["type"], row["inputs"]) == ("average", {"model": "one", "other": "more"})
    assert (row["status"], row["artifact"]["kind"]) == ("FINISHED", "model")
    assert any(figure["value"] is not None for figure in row["quality"].values())
    assert row["ledger"]["counts"]["goodput"]["why_missing"] == "not a training stage"
    (pair,) = result["comparisons"]
    assert pair["serving"]["how"]
    again = copy.start("recipe=average")
    assert "both: reused from" in again.stdout


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stages.both.share=2", "stages.both.share: 2.0 is no share"),
        ("stages.both.shar=1", "stages.both.share"),
        ("stages.both.other=nobody", "stages.both.other: there is no stage 'nobody'"),
    ],
)
def test_its_settings_are_checked_as_any_others(copy: Copy, word: str, said: str) -> None:
    done = copy.start("recipe=average", word)
    assert (done.returncode, said in done.stderr) == (1, True)
