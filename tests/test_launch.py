"""Job files: what `launch` writes for each engine, what it refuses, and what it hands over."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks_here import PROJECT

from pipeline.cli.commands.launch import _hand_over, _shown, main, make_job, read
from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.launch.job import Job, Options
from pipeline.launch.kubernetes import text as kubernetes_text
from pipeline.launch.needs import GIB, Needs, needs_of
from pipeline.launch.skypilot import text as skypilot_text
from pipeline.launch.slurm import text as slurm_text
from pipeline.launch.table import ENGINES

EXAMPLES = sorted(path for path in (PROJECT / "examples").rglob("*.*") if path.is_file())
POD = ("image=registry.example/pipeline:1", "claim=store")
HARD = "a 'b' \"c\" $(touch made) $HOME `touch made` ; # \\ $$ %j {x} é"
"""What a shell, YAML, Kubernetes or a format string might read as something else than text."""


def launch(folder: Path, *words: str) -> int:
    with contextlib.chdir(folder):
        return main(list(words), started_ns=0)


def file_of(*words: str) -> str:
    """Return the text of the file that a command line writes."""
    return ENGINES[words[0]].text(job_of(*words))


def job_of(*words: str) -> Job:
    """Return the job of a command line, its settings not composed: that takes a second."""
    asked = read(words)
    given = dict(word.partition("=")[::2] for word in asked.settings)
    run = Run(recipe=given["recipe"])
    run.hardware.device = given.get("hardware.device", "auto")
    devices = given.get("hardware.devices", "1")
    run.hardware.devices = int(devices) if devices.isdecimal() else devices
    if "budget.wall_seconds" in given:
        run.budget.wall_seconds = float(given["budget.wall_seconds"])
    return make_job(asked, run, command=_shown(words))


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_what_the_command_in_it_writes(example: Path) -> None:
    said = re.search(r"^#   python -m pipeline launch (.*)$", example.read_text(), re.MULTILINE)
    assert said is not None
    words = shlex.split(said[1])
    assert f"file={example.relative_to(PROJECT)}" in words
    assert file_of(*words) == example.read_text()


def test_the_command_writes_the_file_and_again_no_other_one(tmp_path: Path) -> None:
    example = PROJECT / "examples/slurm/many_ranks.sbatch"
    words = shlex.split(example.read_text().splitlines()[2])[5:]
    for _ in range(2):
        assert launch(tmp_path, *words) == 0
        [written] = (path for path in tmp_path.rglob("*") if path.is_file())
        assert written.read_text() == example.read_text()


def job(**more: Any) -> Job:
    settings = ("recipe=baseline", f"tracking.team={HARD}")
    return Job(name="hard", settings=settings, **{"needs": Needs(), **more})


def words_given(script: str, folder: Path, **more: str) -> list[list[str]]:
    """Return what a shell script gives to each `python` that it starts."""
    program = folder / "python"
    program.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$0.$RANK"\n')
    program.chmod(0o755)
    srun = folder / "srun"
    srun.write_text('#!/bin/bash\nshift\nexec "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": "/nowhere", **more}
    done = subprocess.run(
        ["bash", "-s"], input=script, text=True, cwd=folder, env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (folder / "made").exists()
    found = sorted(folder.glob("python.*"))
    return [file.read_text().split("\0")[:-1] for file in found]


def in_a_pod(words: list[str]) -> list[str]:
    """Return a container's words as Kubernetes makes them: $$ is a $, and no $(NAME) is set.

    Source: https://github.com/kubernetes/kubernetes/tree/master/third_party/forked/golang/expansion
    """
    read = re.compile(r"\$(\$|\([^)]*\)|.)", re.DOTALL)
    return [read.sub(lambda at: "$" if at[1] == "$" else at[0], word) for word in words]


def test_settings_reach_the_run_as_they_were_given(tmp_path: Path) -> None:
    given = ["-m", "pipeline", "recipe=baseline", f"tracking.team={HARD}"]
    root = "tracking.root=/store/mlruns"
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "PIPELINE_MASTER": "h"}
    of_task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NNODES": "1"}
    (got,) = words_given(slurm_text(job()), tmp_path, **slurm, **of_task)
    assert got == given

    one = job(options=Options(bucket="b", gpu="H100", image="i", claim="c"))
    (got,) = words_given(yaml.safe_load(skypilot_text(one))["run"], tmp_path, RANK="0")
    assert got == [*given, root, "hardware.devices=1"]
    manifest = yaml.safe_load(kubernetes_text(one))
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    got = in_a_pod([*container["command"], *container["args"]])
    assert got == ["python", *given, root, "hardware.devices=1"]


def test_each_host_starts_its_ranks(tmp_path: Path) -> None:
    several = job(
        needs=Needs(devices=2, hosts=2), options=Options(volume="v", gpu="H100", image="i")
    )
    given = ["-m", "pipeline", "recipe=baseline", f"tracking.team={HARD}"]
    wanted = [*given, "tracking.root=/store/mlruns"]
    hosts = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    run = yaml.safe_load(skypilot_text(several))["run"]
    assert words_given(run, tmp_path, **hosts) == [wanted, wanted]
    assert {file.suffix for file in tmp_path.glob("python.*")} == {".2", ".3"}
    spec = yaml.safe_load(kubernetes_text(several))["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    [script] = in_a_pod(container["args"])
    assert words_given(script, tmp_path, JOB_COMPLETION_INDEX="1") == [wanted, wanted]
    assert (spec["completions"], spec["completionMode"]) == (2, "Indexed")


@pytest.mark.parametrize(
    ("codes", "own"), [("0 0", 0), ("0 75", 75), ("75 1", 1), ("137 75", 137), ("1 75", 1)]
)
def test_a_host_ends_with_what_its_ranks_ended_with(codes: str, own: int, tmp_path: Path) -> None:
    several = job(needs=Needs(devices=2, hosts=2), options=Options(volume="v", gpu="H100"))
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\ncodes=({codes})\nexit ${{codes[LOCAL_RANK]}}\n")
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SKYPILOT_NODE_RANK": "0"}
    script = yaml.safe_load(skypilot_text(several))["run"]
    done = subprocess.run(["bash", "-c", script], env={**environment, "SKYPILOT_NODE_IPS": "h"})
    assert done.returncode == own


def test_what_is_not_known_is_not_asked_for() -> None:
    known = Needs(devices=4, hosts=2, cpus=3, memory_bytes=10 * GIB + 1, wall_seconds=7100.0)
    options = Options(volume="v", gpu="H100", image="i", claim="c")
    for text, asked in (
        (slurm_text, ("--cpus-per-task=3", "--mem=11G", "--time=2:00:00")),
        (skypilot_text, ("cpus: 12+", "memory: 11+")),
        (kubernetes_text, ("cpu: 12", "memory: 11Gi", "activeDeadlineSeconds: 7700")),
    ):
        written = text(job(needs=known, options=options))
        unsaid = text(job(needs=Needs(devices=4, hosts=2), options=options))
        for line in asked:
            assert line in written
            key = line.partition("=")[0].partition(":")[0]
            assert f"# no {key}: " in unsaid
            assert not re.search(rf"^\s*{key}:|^#SBATCH.*{key}", unsaid, re.MULTILINE)


def test_a_time_limit_is_later_than_the_run_stops_by_itself() -> None:
    words = ("slurm", "recipe=baseline", "budget.wall_seconds=3599", "name=limited")
    script = file_of(*words, "hardware.device=cpu", "hardware.devices=2")
    assert "--time=1:01:00" in script
    assert "budget.wall_seconds=3599 hardware.device=cpu\n" in script
    assert "hardware.devices" not in script.partition("set -u")[2], "tasks say how many there are"
    assert "--gpus" not in script


def test_a_run_says_what_it_needs() -> None:
    run = Run()
    run.hardware.device, run.hardware.devices, run.budget.wall_seconds = "cuda", 8, 60.0
    found = needs_of(run, hosts=2, cpus=None, memory_gib=3)
    assert found == Needs(devices=8, hosts=2, memory_bytes=3 * GIB, wall_seconds=60.0)
    run.hardware.device = "cpu"
    assert not needs_of(run, hosts=1, cpus=1, memory_gib=None).on_gpu


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm", "recipe=distill", "hardware.devices=all"], "hardware.devices: no engine"),
        (["slurm", "recipe=distill", "hardware.device=cuda:1"], "leave the number out"),
        (["slurm", "recipe=distill", "hosts=0"], "hosts: '0' is no such number; give 1 to 4096"),
        (["slurm", "recipe=distill", "hosts=²"], "hosts: '²' is no such number"),
        (["slurm", "recipe=distill", "memory=64G"], "memory: '64G' is no such number"),
        (["slurm", "recipe=distill", "profile=cheap"], "profile: 'cheap' is none"),
        (["slurm", "recipe=distill", "profile=spot"], "profile: Slurm does not say"),
        (["slurm", "recipe=distill", "partition="], "partition: is empty"),
        (["slurm", "recipe=distill", "partition=a b"], "'a b' is no partition of Slurm's"),
        (["slurm", "recipe=distill", "name=Big Job"], "'Big Job' is no name of lower case"),
        (["slurm", "recipe=distill", "image=x"], "image: has no effect for slurm"),
        (["slurm", "recipe=distill", "gpu=h100", "hardware.device=cpu"], "gpu: has no effect"),
        (["slurm", "recipe=distill", "model.path=a\nb"], "model.path=a b: has characters"),
        (["slurm", "recipe=distill", "tracking.uri=http://u:secret@h"], "tracking.uri: holds a"),
        (["skypilot", "recipe=distill"], "gpu: SkyPilot asks for GPUs by"),
        (["skypilot", "recipe=distill", "gpu=H100"], "bucket: a machine that is taken away"),
        (["skypilot", "recipe=distill", "gpu=H100", "bucket=b", "hosts=2"], "volume: the hosts"),
        (
            ["skypilot", "recipe=distill", "gpu=H100", "bucket=b", "volume=v", "hosts=2"],
            "bucket: each host would have a copy",
        ),
        (
            ["skypilot", "recipe=distill", "gpu=H100", "bucket=b", "tracking.root=/x"],
            "tracking.root: is /store/mlruns there",
        ),
        (
            ["skypilot", "recipe=distill", "gpu=H100", "bucket=b", "budget.wall_seconds=9000"],
            "budget.wall_seconds: SkyPilot gives jobs no time limit",
        ),
        (["kubernetes", "recipe=distill"], "image: none is named"),
        (["kubernetes", "recipe=distill", "image=a b", "claim=c"], "'a b' is no image"),
        (["kubernetes", "recipe=distill", "image=a"], "claim: a pod that is taken away"),
        (["kubernetes", "recipe=distill", *POD, "claim=A_b"], "'A_b' is no name of Kubernetes'"),
        (["kubernetes", "recipe=distill", *POD, "gpu=h100"], "is no resource such as nvidia.com"),
        (["kubernetes", "recipe=distill", *POD, "node=spot"], "node: 'spot' is no LABEL=VALUE"),
        (["kubernetes", "recipe=distill", *POD, "profile=spot"], "profile: Kubernetes does not"),
    ],
    ids=lambda each: " ".join(each)[:60] if isinstance(each, list) else "",
)
def test_what_an_engine_cannot_be_asked_for_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        file_of(*words)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm", "recipe=distil"], "did you mean distill?"),
        (["slurm", "training.steps=5"], "recipe: none is named"),
        (["slurm", "recipe=distill", "training.stepz=5"], "did you mean training.steps?"),
        (["slurm", "recipe=baseline", "profile=spot"], "profile: Slurm does not say"),
        (["slurm", "recipe=baseline", "submit=true"], "submit: sbatch is not installed here"),
        (["slurm", "recipe=baseline", "submit=maybe"], "submit: 'maybe' is no answer"),
        (["slurm", "recipe=baseline", "file=/dev/null/x"], "file: /dev/null/x cannot be written"),
    ],
    ids=lambda each: " ".join(each)[:60] if isinstance(each, list) else "",
)
def test_what_is_refused_leaves_nothing_behind(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch(tmp_path, *words) == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pbs", "recipe=distill"], "pbs: is no engine; name one of slurm, skypilot, kubernetes"),
        (["slurm", "recipe=distill", "-m"], "-m: is no flag of launch"),
        (["slurm", "distill"], "distill: cannot be parsed; write recipe=distill"),
    ],
)
def test_a_line_that_cannot_be_read_ends_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, *words) == 2
    assert said in capsys.readouterr().err


def test_a_file_of_another_job_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "baseline.sbatch").write_text("mine")
    assert launch(tmp_path, "slurm", "recipe=baseline") == 1
    assert "file: baseline.sbatch is there, and is another" in capsys.readouterr().err
    assert (tmp_path / "baseline.sbatch").read_text() == "mine"


def test_help_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["--help"], 0), main([], 0)) == (0, 2)
    assert capsys.readouterr().out.count("Usage: python -m pipeline launch") == 2


# -- what is handed over ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "client"),
    [
        (["slurm"], "sbatch job"),
        (["skypilot", "gpu=H100", "bucket=b"], "sky jobs launch --yes job"),
        (["kubernetes", *POD], "kubectl apply -f job"),
    ],
    ids=["slurm", "skypilot", "kubernetes"],
)
def test_the_client_is_given_the_file_and_its_code_is_the_commands(
    words: list[str],
    client: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = client.partition(" ")[0]
    program = tmp_path / name
    program.write_text('#!/bin/bash\necho "$(basename "$0") $* with $PYTHON"\nexit 9\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("PYTHON", raising=False)
    engine, made = ENGINES[words[0]], job_of(*words, "recipe=baseline", "file=job", "submit=true")
    with contextlib.chdir(tmp_path):
        assert _hand_over(engine, made, submit=True) == 9
    assert f"{client} with {sys.executable}\n" in capfd.readouterr().out
    assert "submit" not in (tmp_path / "job").read_text()


def test_a_client_that_a_signal_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\nkill -TERM $$\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch(tmp_path, "slurm", "recipe=baseline", "submit=true") == 128 + 15
