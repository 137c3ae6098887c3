"""Ranks: a training that several processes share is that of one with the whole batch, goes on to
the bit, and ends as one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from few import few
from ranks_here import PROJECT, ended, free_port, rank_environment, start

from pipeline.cli import ranks as cli_ranks
from pipeline.cli.ranks import is_silent, ranks_to_start
from pipeline.cli.validate import validate
from pipeline.config.settings.parallel import Parallel
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import Compile, OptimizerKind
from pipeline.errors import DeviceLost, Preempted, StageFailed, UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.runs.following import _as_the_first_one_sees_it
from pipeline.runs.timeline import Timeline
from pipeline.stages.settings import _check_ranks, check_training
from pipeline.stages.train import TrainStage
from pipeline.training.parallel import Shared, layers_in
from pipeline.training.ranks import Place, RankLost, Ranks, place_in

PROGRAM = str(PROJECT / "tests/programs/ranks.py")
SMALL = [
    "tracking.charts=false",
    *("recipe=baseline", "hardware.device=cpu", "precision=fp32"),
    *("training.batch_size=4", "training.steps=8"),
    *("training.sequence_length=32", "data.max_documents=40", "quality.max_documents=20"),
    *("quality.bootstrap=200", "tracking.mlflow=false", "serving.blocks=4", "serving.batches=[1]"),
    *("serving.load.prompt=16", "serving.load.new=2", "serving.load.batch=1"),
]


# -- the same training -----------------------------------------------------------------------------


def by_ranks(folder: Path, *cases: str, size: int = 2, timeout: float = 400) -> dict[str, Any]:
    file = folder / "found.json"
    ranks = start([[PROGRAM, str(file), *cases]] * size, folder)
    for code, output, errors in ended(ranks, timeout=timeout):
        assert code == 0, output + errors
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found, in one group: starting them takes longer than training."""
    cases = ("ddp, in parts", "fsdp, taught", "fsdp, resumed", "without sums", "averaged by rank")
    more = ("fsdp, watched", "fsdp, staged", "fsdp, staged, classes")
    return by_ranks(tmp_path_factory.mktemp("ranks"), *cases, *more)


@pytest.mark.parametrize("case", ["ddp, in parts", "fsdp, taught"])
def test_two_ranks_train_what_one_process_does(case: str, found: dict[str, Any]) -> None:
    """Targets are uneven, and in one step a rank has none; the vocabulary is odd."""
    assert found[case]["apart"] < 1e-5
    # what was shared is put together by the first rank alone
    assert found[case]["only_first_is_whole" if "fsdp" in case else "same_on_all"]
    tokens, alone = found[case]["tokens"]
    assert tokens == alone
    (loss,), (wanted,) = (each.values() for each in found[case]["loss"])
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert not [name for name in found[case]["classes"] if "FSDP" in name]


def test_no_rank_but_the_first_ever_has_more_than_a_layer_whole(found: dict[str, Any]) -> None:
    """Of a student and of its teacher, until the first step; then it has its share. Buffers that no
    file has (the frequencies of rotary positions) are right on all.
    """
    seen = found["fsdp, watched"]
    for each in seen["ranks"]:
        assert each["whole"] == {"student": 0, "teacher": seen["rest"]}
        assert each["share"] == pytest.approx(1 / 2, abs=0.01)
        assert each["tied"]
        assert set(each["buffers"].values()) == {True}
        assert any("inv_freq" in name for name in each["buffers"])
    for told in seen["ranks"][1]["told"].values():
        assert told[0] == 0  # none was made
        assert max(told) == max(seen["layer"], seen["rest"])


@pytest.mark.parametrize("case", ["fsdp, staged", "fsdp, staged, classes"])
def test_a_stage_whose_weights_one_rank_alone_reads_is_that_of_one_process(
    case: str, found: dict[str, Any]
) -> None:
    """The other rank's files of weights cannot be read; the teacher of text is found to teach."""
    staged = found[case]
    assert staged["apart"] < 1e-5
    assert staged["names"][0] == staged["names"][1]
    ours, alone = staged["share"]
    assert 0 < ours < 1
    assert ours == pytest.approx(alone, rel=1e-4)
    assert staged["saved_by_others"] == []


@pytest.mark.parametrize("case", ["without sums", "averaged by rank"])
def test_what_is_compared_would_see_gradients_that_are_not_summed_rightly(
    case: str, found: dict[str, Any]
) -> None:
    assert found[case]["apart"] > 0.1


def test_a_training_that_goes_on_is_the_same_to_the_bit(found: dict[str, Any]) -> None:
    """One rank alone was asked to stop: both did, after the same step."""
    assert found["fsdp, resumed"]["equal"]


EVERY_WAY = {
    **dict.fromkeys(("ddp", "ddp, taught", "ddp, classes", "fsdp", "fsdp, in parts"), 1e-5),
    **dict.fromkeys(("fsdp, frozen", "fsdp, inside", "fsdp, clipped", "fsdp, growing"), 1e-4),
    **dict.fromkeys(("fsdp, offload", "fsdp, writes", "ddp, writes"), 1e-4),
    # a weight at the edge between two of 8 bits rounds to the other one
    "fsdp, adapters": 5e-3,
    "fsdp, rounded": 1e-2,
    # blocks of 256 end where a rank's share does, and not where the whole weight's do
    "fsdp, 8 bits": 5e-2,
    # a sum of two is rounded in 16 bits, and AdamW's first steps are signs
    **dict.fromkeys(("ddp, bf16_pure", "fsdp, bf16_pure", "fsdp, bf16", "fsdp, fp16"), 0.1),
    "fsdp, fp16 that overflows": 0.1,
}
"""How far the update of two ranks may be from that of one process, as a share of it."""


@pytest.mark.distributed
def test_every_way_to_share_a_training_gives_the_same(tmp_path: Path) -> None:
    found = by_ranks(tmp_path, *EVERY_WAY, timeout=1500)
    for case, each in found.items():
        assert each["apart"] < EVERY_WAY[case], case
        assert each["only_first_is_whole" if "fsdp" in case else "same_on_all"], case
        assert each["dtype"] == "torch.float32", case
        assert each["tokens"][0] == each["tokens"][1], case
    assert set(found["fsdp, writes"]["loss"][0]) == {"text", "sampled"}


RESUMED = {
    "ddp, resumed": 0.0,
    "ddp, resumed beside": 0.0,
    "fsdp, resumed beside": 0.0,
    "ddp, resumed as fsdp": 1e-4,
    "fsdp, resumed alone": 1e-4,
    "alone, resumed as fsdp": 1e-4,
    "fsdp, 8 bits, resumed": 0.0,
    "fsdp, 8 bits, resumed alone": 5e-2,
    "alone, 8 bits, resumed as fsdp": 5e-2,
}


@pytest.mark.slow
def test_a_training_goes_on_however_it_is_shared_then(tmp_path: Path) -> None:
    found = by_ranks(tmp_path, *RESUMED, timeout=900)
    for case, most in RESUMED.items():
        assert found[case]["apart"] <= most, case
        assert found[case]["equal"] == (most == 0.0), case


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_with_three_and_with_one(tmp_path: Path) -> None:
    """By three: rows and weights that they do not divide."""
    parts = ("fsdp", "fsdp, 8 bits")
    begun = by_ranks(tmp_path, *(f"{part}, begun" for part in parts))
    assert all(len(each["files"]) == 4 for each in begun.values())  # two shares and two of JSON
    for part in parts:
        shutil.copytree(tmp_path / f"{part}, begun".replace(", ", "-"), tmp_path / part)
    found = by_ranks(tmp_path, *(f"{part}, gone on" for part in parts), size=3)
    assert found["fsdp, gone on"]["apart"] < 1e-4
    assert found["fsdp, 8 bits, gone on"]["apart"] < 5e-2


@pytest.mark.slow
def test_three_ranks_share_rows_that_they_do_not_divide(tmp_path: Path) -> None:
    found = by_ranks(tmp_path, "ddp", "fsdp, taught", "fsdp, writes", size=3)
    assert all(each["apart"] < 1e-4 for each in found.values())


@pytest.mark.slow
def test_four_ranks_of_two_hosts_share_within_and_average_between(tmp_path: Path) -> None:
    found = by_ranks(tmp_path, "hsdp, taught", "hsdp, resumed", "hsdp, 8 bits, resumed", size=4)
    assert found["hsdp, taught"]["apart"] < 1e-4
    assert found["hsdp, taught"]["only_first_is_whole"]
    assert found["hsdp, resumed"]["equal"]
    assert found["hsdp, 8 bits, resumed"]["equal"]


def test_rows_are_shared_and_none_is_left() -> None:
    rows = {"x": torch.arange(7)}
    parts = [
        Shared(Ranks(Place(rank, 3)), module=object()).own_rows(rows)["x"].tolist()
        for rank in range(3)
    ]
    assert parts == [[0, 1, 2], [3, 4], [5, 6]]


def test_the_layers_of_a_model_are_found() -> None:
    from make_assess_models import tiny

    from pipeline.tasks.table import Task

    for task in (Task.causal_lm, Task.sequence_classification):
        model = tiny(task)
        assert len(layers_in(model)) == model.config.num_hidden_layers


# -- which rank, and how many ----------------------------------------------------------------------

GIVEN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({}, Place(1, 4, 1, 4)),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, Place(1, 4, 0, 2)),
        ({"RANK": "3", "LOCAL_WORLD_SIZE": "2"}, Place(3, 4, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    ],
)
def test_the_environment_says_which_rank_it_is(more: dict[str, str], place: Place | None) -> None:
    assert place_in({**GIVEN, **more}) == place
    assert place_in({}) is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: is empty"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is no number"),
        ({"RANK": ""}, "RANK: is empty"),
        ({"RANK": "4"}, "RANK: 4 is no rank of WORLD_SIZE=4"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: is not set, and WORLD_SIZE=4"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: 'http' is no number"),
        ({"RANK": "-1"}, "RANK: '-1' is no number"),
        ({"WORLD_SIZE": "0"}, "RANK: 1 is no rank of WORLD_SIZE=0"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: 'x' is no number"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK: 2 is none of 2 ranks on this"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: 0 ranks on this host"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE: 5 ranks on this host, and WORLD_SIZE=4"),
    ],
)
def test_half_an_environment_is_refused(more: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        place_in({**GIVEN, **more})
    assert "hardware.devices=N" in str(error.value)


def test_a_port_is_one() -> None:
    with pytest.raises(UserError, match="MASTER_PORT: 65536 is no port; give one from 1 to 65535"):
        place_in({**GIVEN, "MASTER_PORT": "65536"})


def wanted(devices: Any, monkeypatch: pytest.MonkeyPatch, **environment: str) -> int:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")] + [
        *("RANK", "WORLD_SIZE", "SLURM_NTASKS", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    ]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = Run()
    run.hardware.device, run.hardware.devices = "cpu", devices
    return ranks_to_start(run)


def test_a_host_starts_as_many_ranks_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_ranks.os, "cpu_count", lambda: 4)
    assert wanted(1, monkeypatch) == 1
    assert wanted(4, monkeypatch) == 4
    assert wanted("all", monkeypatch) == 1  # a CPU host is one device
    with pytest.raises(UserError, match=r"hardware\.devices: 5 asked for, 4 there"):
        wanted(5, monkeypatch)
    outside = {**GIVEN, "LOCAL_WORLD_SIZE": "2"}
    assert [wanted(devices, monkeypatch, **outside) for devices in (1, 2, "all")] == [1, 1, 1]
    with pytest.raises(UserError, match="3 asked for, and 2 ranks are started"):
        wanted(3, monkeypatch, **outside)


def test_tasks_of_slurm_that_are_no_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"SLURM_NTASKS: Slurm started 2 tasks.*SLURM_PROCID"):
        wanted(1, monkeypatch, SLURM_NTASKS="2")
    assert wanted(1, monkeypatch, SLURM_NTASKS="1") == 1


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "precision="),
        ({"ACCELERATE_USE_FSDP": "true"}, "parallel.mode=fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "parallel.mode=fsdp"),
    ],
)
def test_what_accelerate_launch_was_asked_for_is_not_passed_over(
    variable: dict[str, str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=remedy) as error:
        wanted(1, monkeypatch, **variable)
    assert str(error.value).startswith(next(iter(variable)))


def test_one_process_on_a_cpu_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    assert wanted(1, monkeypatch, **asked) == 1
    assert "hardware.devices=N starts several" in capsys.readouterr().out
    wanted(1, monkeypatch, **asked, **GIVEN)
    assert capsys.readouterr().out == ""


def test_one_of_several_speaks() -> None:
    assert [is_silent({"RANK": each}) for each in ("0", "1", "")] == [False, True, False]
    assert [is_silent({"SLURM_PROCID": each}) for each in ("0", "3")] == [False, True]
    assert not is_silent({"RANK": "0", "SLURM_PROCID": "3"})
    # no rank that there is: nobody else would say so
    assert [is_silent({"RANK": "4", "WORLD_SIZE": size}) for size in ("4", "5")] == [False, True]


def test_what_shares_no_weights_is_refused_by_name() -> None:
    run = Run()
    run.parallel.mode = Parallel.fsdp
    stage = TrainStage(optimizer=OptimizerKind.adamw_8bit_bitsandbytes)
    with pytest.raises(UserError, match=r"steps no shares of weights; give adamw_8bit_torchao"):
        check_training(stage, "stages.plain", run)
    check_training(TrainStage(optimizer=OptimizerKind.adamw_8bit_torchao), "stages.plain", run)
    run.parallel.offload = True
    with pytest.raises(UserError, match=r"parallel\.offload: scales losses by what lies on the"):
        _check_ranks(TrainStage(precision=Precision.fp16), "plain", run, 2)
    run.parallel.mode = Parallel.ddp
    with pytest.raises(UserError, match=r"parallel\.offload: has no effect with parallel.mode=ddp"):
        validate(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"batch_size": 4, "gradient_accumulation": 2},
            "batch_size: a micro-batch of 2 sequences has",
        ),
        ({"start_batch_size": 2}, "start_batch_size: a micro-batch of 2 sequences"),
        ({"precision": Precision.auto}, "precision: auto times steps"),
        ({"compile": Compile.always}, "compile: always: fsdp gathers"),
    ],
)
def test_what_ranks_cannot_share_is_refused(changes: dict[str, Any], said: str) -> None:
    run, stage = Run(), TrainStage(**changes)
    run.parallel.mode = Parallel.fsdp
    with pytest.raises(UserError) as error:
        _check_ranks(stage, "plain", run, 3)
    assert f"{said}" in str(error.value)


def test_a_lost_rank_is_no_failure_of_its_stage() -> None:
    """An optional stage may fail and the run goes on, for all ranks; without one of them it
    cannot.
    """
    for error in (StageFailed("the loss is NaN"), Preempted("stopped")):
        with _as_the_first_one_sees_it():
            raise error
    with pytest.raises(RankLost), _as_the_first_one_sees_it():
        raise RankLost("rank 1 failed")
    assert isinstance(RankLost("rank 1 failed"), DeviceLost)  # which no stage may pass over


# -- a run by several ranks ------------------------------------------------------------------------


def result_of(root: Path) -> dict[str, Any]:
    [path] = root.glob("mlruns/runs/*/result.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def launched(
    root: Path, *more: str, devices: int = 2, settings: list[str] = SMALL
) -> subprocess.Popen[str]:
    environment = rank_environment(0, 1, 1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del environment[name]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *settings, f"hardware.devices={devices}", *more],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    under_way.append(launcher)
    return launcher


under_way: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Generator[None]:
    """End what a test that failed had started: ranks outlive their launcher."""
    yield
    for launcher in under_way:
        if launcher.poll() is None:
            for pid in (*ranks_of(launcher).values(), launcher.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launcher.communicate()
    under_way.clear()


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Return the processes of ranks by rank, as the kernel knows them."""
    found: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid:
                variables = (stat.parent / "environ").read_bytes().split(b"\0")
                rank = [each for each in variables if each.startswith(b"RANK=")]
                found |= {int(each[5:]): int(stat.parent.name) for each in rank}
        except (OSError, ValueError):
            continue
    return found


def until_a_checkpoint(root: Path, launcher: subprocess.Popen[str], number: int = 1) -> None:
    """Wait until so many stages have one."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        found = root.glob("mlruns/store/checkpoints/*/step-*/manifest.json")
        if len({path.parent.parent for path in found}) >= number:
            return
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.1)
    pytest.fail("no checkpoint was written")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_run_by_two_ranks_is_booked_once(mode: str, tmp_path: Path) -> None:
    """A host is one device, and its hours pass once, however many ranks share its cores."""
    code, output, errors = ended([launched(tmp_path, f"parallel.mode={mode}")])[0]
    assert code == 0, errors
    assert output.count("baseline: running") == 1
    assert errors == ""
    result = result_of(tmp_path)
    [row] = result["rows"]
    assert row["status"] == "FINISHED"
    ledger = row["ledger"]
    assert [each["rank"] for each in ledger["ranks"]] == [0, 1]
    for each in ledger["ranks"]:  # each by its own clock, in the same window
        assert 0 < each["phases_ns"]["forward"] <= sum(each["phases_ns"].values())
        assert sum(each["phases_ns"].values()) <= ledger["device_hours"]["work"]["value"] * 3.6e12
    assert "assess_ranks" not in ledger  # 20 documents are two batches for one rank alone
    seconds = sum(ledger["phases_ns"].values()) / 1e9
    assert ledger["device_hours"]["attached"]["value"] * 3600 == pytest.approx(seconds)
    alone = tmp_path / "alone"
    alone.mkdir()
    assert ended([launched(alone, devices=1)])[0][0] == 0
    [wanted] = result_of(alone)["rows"]
    for name in ("steps", "tokens", "model_flops"):
        assert ledger["counts"][name]["value"] == wanted["ledger"]["counts"][name]["value"]
    ours, theirs = (each["quality"]["bits_per_byte"]["value"] for each in (row, wanted))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_stages_that_two_ranks_make_at_once_are_those_of_one_process(tmp_path: Path) -> None:
    """Each seed's model is one rank's, to the bit; what a rank waits for the other has a name."""
    asked = ["seeds=[0,1]", "parallel.stages=true", "hardware.num_threads=1"]
    code, output, errors = ended([launched(tmp_path, *asked)])[0]
    assert code == 0, errors
    assert "baseline (seed 1): running" in output
    result = result_of(tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    assert ended([launched(alone, *asked, devices=1)])[0][0] == 0
    wanted = result_of(alone)
    digests = [[row["artifact"]["digest"] for row in each["rows"]] for each in (result, wanted)]
    assert digests[0] == digests[1]
    assert [row["ledger"]["ranks"][0]["rank"] for row in result["rows"]] == [0, 1]
    assert result["run"]["phases_device_ns"]["overhead"]["idle_rank"] > 0
    work = sum(row["ledger"]["device_hours"]["work"]["value"] for row in result["rows"])
    assert result["run"]["device_hours"]["work"]["value"] == pytest.approx(work)
    assert not [note for note in result["environment"]["notes"] if "please report it" in note]


@pytest.mark.slow
def test_a_cache_that_two_ranks_capture_and_learn_from_is_that_of_one(tmp_path: Path) -> None:
    """The student's weights are shared out, too."""
    shards, read = list[dict[str, Any]](), list[float]()
    left_out = ("recipe", "training", "data")
    small = [each for each in SMALL if not each.startswith(left_out)]
    small += [
        *("recipe=distill_cached", "stages.teacher.steps=2", "stages.student.steps=160"),
        *("model.shape.hidden_size=64", "model.shape.layers=1", "model.shape.heads=1"),
        *("student.layers=[0]", "stages.student.allow_weak_teacher=true"),
    ]
    for devices in (1, 2):
        root = tmp_path / str(devices)
        root.mkdir()
        launcher = launched(root, "parallel.mode=fsdp", devices=devices, settings=small)
        code, _, errors = ended([launcher], timeout=600)[0]
        assert code == 0, errors
        rows = result_of(root)["rows"]
        [row] = [row for row in rows if row["type"] == "capture"]
        [student] = [row for row in rows if row["arm"] == "student"]
        read.append(student["quality"]["bits_per_byte"]["value"])
        manifest = json.loads(Path(row["artifact"]["path"], "manifest.json").read_text())
        shards.append(manifest["shards"])
    assert len(shards[0]) > 2
    assert [each["windows"] for each in shards[0]] == [each["windows"] for each in shards[1]]
    assert read[1] == pytest.approx(read[0], rel=1e-3)


@pytest.mark.distributed
def test_two_ranks_recover_what_quantizing_lost_and_try_layers_as_one_does(tmp_path: Path) -> None:
    """All train; the first one quantizes, and reads what is left of the loss."""
    recipe = """
defaults:
  - /stage@stages.reference: train
  - /stage@stages.shorter: prune
  - /stage@stages.quantized: quantize
stages:
  reference: {model: base, steps: 4}
  shorter: {model: reference, teacher: reference, drop: 1, steps: 4}
  quantized: {model: reference, format: fp4, recover: [lora, qat], tolerance: 0}
primary_arm: shorter
allow_no_speedup: true
compare:
  - {arm: shorter, base: reference, on: [quality]}
"""
    found: list[tuple[Any, dict[str, float]]] = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        (root / "own").mkdir(parents=True)
        (root / "own/recovering.yaml").write_text(recipe)
        more = [*("stages.quantized.lora.steps=4", "stages.quantized.qat.steps=4")]
        more += [] if devices == 1 else ["parallel.mode=fsdp"]
        more += [f"model.shape.{name}" for name in ("hidden_size=64", "layers=2", "heads=1")]
        settings = ["--recipe-dir", "own", "recipe=recovering", *SMALL[2:], *more]
        launcher = launched(root, devices=devices, settings=settings)
        code, output, errors = ended([launcher], timeout=400)[0]
        assert code == 0, output + errors
        rows = {row["arm"]: row for row in result_of(root)["rows"]}
        about = json.loads(Path(rows["shorter"]["artifact"]["path"], "artifact.json").read_text())
        trained = ("quantized/lora", "quantized/qat")
        assert all(rows[arm]["status"] == "FINISHED" for arm in trained)
        losses = {arm: rows[arm]["recovery"]["loss"]["value"] for arm in trained}
        found.append((about["pruning"], losses))
    (alone, losses), (ours, found_losses) = found
    assert ours["dropped"] == alone["dropped"]
    assert len(ours["trials"][0]) == ours["layers"]
    for layer, read in alone["trials"][0].items():
        assert ours["trials"][0][layer] == pytest.approx(read, rel=1e-3)
    assert found_losses == pytest.approx(losses, abs=0.02)


LONG = ("training.steps=4000", "training.checkpoint_every=5", "training.eval_every=4000")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("whom", few(["the launcher", "a rank"], 2))
def test_a_signal_stops_all_ranks_with_a_checkpoint_and_75(whom: str, tmp_path: Path) -> None:
    launcher = launched(tmp_path, *LONG)
    until_a_checkpoint(tmp_path, launcher)
    if whom == "the launcher":
        launcher.send_signal(signal.SIGUSR1)
    else:
        os.kill(ranks_of(launcher)[1], signal.SIGTERM)
    code, _, errors = ended([launcher])[0]
    assert code == 75, errors
    assert "the same command resumes from there" in errors
    assert result_of(tmp_path)["status"] == "KILLED"
    again = ended([launched(tmp_path, *LONG, "budget.device_hours=1e-9")])[0]
    assert again[0] == 7


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("rank", "number", "ends"),
    [(1, signal.SIGTERM, 75), (1, signal.SIGKILL, 1), (0, signal.SIGKILL, 1)],
)
def test_stages_made_at_once_end_together_and_go_on(
    rank: int, number: signal.Signals, ends: int, tmp_path: Path
) -> None:
    """Each goes on from its own checkpoint; hours of both attempts add up, whoever was killed."""
    asked = ["seeds=[0,1]", "parallel.stages=true", "training.checkpoint_every=5"]
    asked += ["training.steps=120", "training.eval_every=120", "training.compile=never"]
    launcher = launched(tmp_path, *asked)
    until_a_checkpoint(tmp_path, launcher, number=2)
    os.kill(ranks_of(launcher)[rank], number)
    code, _, errors = ended([launcher])[0]
    assert code == ends, errors
    code, output, errors = ended([launched(tmp_path, *asked)])[0]
    assert code == 0, errors
    assert output.count("resuming from step") == 2
    result = result_of(tmp_path)
    rows = result["rows"]
    assert sorted((row["seed"], row["attempt"], row["status"]) for row in rows) == [
        *((0, 1, rows[0]["status"]), (0, 2, "FINISHED")),
        *((1, 1, rows[0]["status"]), (1, 2, "FINISHED")),
    ]
    assert all(row["ledger"]["meter_valid"] for row in rows)
    assert not [note for note in result["environment"]["notes"] if "please report it" in note]
    for row in rows:
        assert row["ledger"]["device_hours"]["work"]["value"] > 0
    if number == signal.SIGTERM:  # a killed rank's steps since it last told are not known
        assert {row["ledger"]["counts"]["steps_lost"]["value"] for row in rows} == {0}


@pytest.mark.slow
@pytest.mark.faults
def test_ctrl_c_stops_all_with_a_checkpoint_and_130(tmp_path: Path) -> None:
    launcher = launched(tmp_path, *LONG)
    until_a_checkpoint(tmp_path, launcher)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
    code, _, errors = ended([launcher])[0]
    assert code == 130, errors
    assert "the same command resumes from there" in errors
    assert len(errors.splitlines()) == 1
    assert result_of(tmp_path)["status"] == "KILLED"


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("number", "within"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 60)])
def test_a_rank_that_is_lost_ends_the_run_and_its_hours_are_kept(
    number: signal.Signals, within: float, tmp_path: Path
) -> None:
    """Killed, or hung: then for as long as `parallel.timeout_seconds` says."""
    launcher = launched(tmp_path, *LONG, "parallel.timeout_seconds=40")
    until_a_checkpoint(tmp_path, launcher)
    lost, begun = ranks_of(launcher)[1], time.monotonic()
    os.kill(lost, number)
    try:
        code, _, errors = ended([launcher], timeout=within + 130)[0]
    finally:
        with suppress(ProcessLookupError):  # one that was stopped is still there
            os.kill(lost, signal.SIGKILL)
    assert code == 1, errors
    assert "a rank does not answer any more" in errors
    assert len(errors.splitlines()) == 1
    result = result_of(tmp_path)
    assert result["status"] == "FAILED"
    [row] = result["rows"]
    assert row["ledger"]["device_hours"]["attached"]["value"] > 0
    assert time.monotonic() - begun < within + 130


@pytest.mark.slow
@pytest.mark.faults
def test_ranks_with_other_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    commands = [["-m", "pipeline", *SMALL, f"seed={rank}"] for rank in range(2)]
    found = ended(start(commands, tmp_path))
    assert [code for code, _, _ in found] == [1, 1]
    assert found[0][2] == (
        "refused: RANK: rank 0 and rank 1 have different settings (seed); give every rank the same"
        " command\n"
    )
    assert found[1][1:] == ("", "")


@pytest.mark.faults
@pytest.mark.slow
def test_several_jobs_by_ranks_from_outside_are_refused(tmp_path: Path) -> None:
    command = ["-m", "pipeline", "-m", *SMALL, "seed=0,1"]
    code, _, errors = ended(start([command], tmp_path, size=2))[0]
    assert code == 1
    assert "refused: --multirun: several jobs do not go with ranks" in errors


@pytest.mark.slow
@pytest.mark.faults
def test_ranks_that_never_come_are_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", *SMALL, "parallel.rendezvous_seconds=3"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=rank_environment(0, 2, free_port()),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("refused: MASTER_ADDR: 2 ranks do not meet at 127.0.0.1:")
    assert "rank 1 did not come within 3 s" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "mlruns/runs").exists()


@pytest.mark.parametrize(
    ("elapsed_s", "stops"), [(0.0, False), (39.0, False), (41.0, True), (101.0, True)]
)
def test_a_schedulers_limit_stops_a_stage_in_time(elapsed_s: float, stops: bool) -> None:
    """60 s are kept for the checkpoint of 100."""
    run = Run()
    run.budget.wall_seconds = 100.0
    clock = PhaseClock(lambda: int((7 + elapsed_s) * 1e9))
    session = SimpleNamespace(run=run, clock=clock, started_ns=7 * 10**9, devices=1)
    timeline = Timeline(session)  # pyright: ignore[reportArgumentType]
    assert timeline.should_stop() is (Preempted if stops else None)
    if stops:
        with pytest.raises(Preempted, match="between stages"):
            timeline.check_budget()
    run.budget.wall_seconds = None
    assert timeline.should_stop() is None
