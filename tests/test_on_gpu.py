"""benchmarks/on_gpu.sh and gpu_tests.sh as far as a machine without a GPU can: a step that fails or
overruns ends nothing else, what was measured lies there, and all that they import is listed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import attention
import blocks
import distillation_head
import results
from nanogpt import GPT, optimizer_of

from pipeline.config.settings.precision import Precision

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "on_gpu.sh"
SAVES = "import results; results.save_result('products', {'tflops': 2}, 'log')"
STEPS = f"""
step breaks 1 "$python" -c 'raise SystemExit(3)'
step hangs 1 sleep 60
step saves 58 env PYTHONPATH={BENCHMARKS} "$python" -c "{SAVES}"
"""


def ran(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run on_gpu.sh in this Python."""
    here = {name: value for name, value in os.environ.items() if name != "OUT"}
    return subprocess.run(
        ["bash", str(SCRIPT), *args],
        capture_output=True,
        text=True,
        check=False,
        env={**here, "PYTHON": sys.executable, **environment},
    )


def test_a_step_that_fails_or_overruns_ends_nothing_else_and_results_are_saved(
    tmp_path: Path,
) -> None:
    steps, folder, archive = tmp_path / "steps.sh", tmp_path / "out", tmp_path / "out.tar.gz"
    steps.write_text(STEPS)
    done = ran(
        *("--device", "cpu", "--tiny", "--minutes", "1", "--steps", str(steps)),
        *("--folder", str(folder), "--archive", str(archive)),
    )
    assert done.returncode == 1, done.stderr  # something failed
    rows = [line.split() for line in (folder / "summary.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "breaks", "hangs", "saves"]
    assert [row[3] for row in rows[1:]] == ["3", "124", "0"]
    assert int(rows[2][1]) <= 2  # one second was its share
    saved = folder / rows[3][4]
    assert '"tflops": 2' in saved.read_text()
    with tarfile.open(archive) as packed:
        assert f"./{rows[3][4]}" in packed.getnames()


def test_the_folder_is_the_one_that_is_set_and_one_step_can_be_asked_for(tmp_path: Path) -> None:
    steps = tmp_path / "steps.sh"
    steps.write_text("step one 1 true\nstep two 1 true\n")
    done = ran("--steps", str(steps), "--only", "two", OUT=str(tmp_path / "set"))
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "set/summary.txt").read_text().splitlines()
    assert [row.split()[0] for row in rows] == ["step", "two"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--minutes", "half"], "--minutes takes a whole number"),
        (["--minutes"], "--minutes needs a value"),
        (["--device", "tpu"], "--device takes cuda or cpu"),
        (["--wrong"], "no option '--wrong'"),
        (["--only", "nothing"], "no step is named 'nothing'"),
        (["--steps", "/no/such/file"], "no file '/no/such/file'"),
    ],
)
def test_what_it_cannot_do_is_refused(args: list[str], said: str) -> None:
    done = ran(*args)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("args", [[], ["--minutes", "6"], ["--device", "cpu", "--tiny"]])
def test_the_steps_come_in_order_and_name_options_that_scripts_have(args: list[str]) -> None:
    listed = [shlex.split(line) for line in ran("--list", *args).stdout.splitlines()]
    names = [each[0] for each in listed]
    assert names[:5] == ["kernels", "precisions", "products", "head_1", "head_2"]
    assert {"step", "decode_ways", "cached", "hours"} < {*names}
    assert names.index("captured") < names.index("captured_int8") < names.index("training")
    for _, weight, *command in listed:
        assert int(weight) > 0
        scripts = [word for word in command if word.startswith("benchmarks/")]
        text = (ROOT / (scripts or ["tests/test_gpu.py"])[0]).read_text()
        for option in (word for word in command if scripts and word.startswith("--")):
            assert f'"{option}"' in text, (command, option)


def test_the_suite_of_a_gpu_is_every_file_that_has_such_tests(tmp_path: Path) -> None:
    told = tmp_path / "python"
    told.write_text('#!/bin/sh\necho "$@"\nexit 5\n')
    told.chmod(0o755)
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_tests.sh"), "-k", "energy"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": str(told), "OUT": str(tmp_path / "out")},
    )
    assert done.returncode == 5  # pytest's own
    words = (tmp_path / "out/gpu_tests.txt").read_text().split()
    assert {str(path.relative_to(ROOT)) for path in gpu_tests()} <= {*words}
    assert words[-2:] == ["-k", "energy"]


# -- what they need -------------------------------------------------------------------------------

MODULES = {
    "google": "protobuf",
    "hydra": "hydra-core",
    "liger_kernel": "liger-kernel",
    "pynvml": "nvidia-ml-py",
    "yaml": "pyyaml",
}
"""Distributions by the module they bring, where the names differ."""
LEFT_OUT = {
    "amdsmi": "reads AMD's GPUs",
    "vllm": "runs in an environment of its own",
    "lm_eval": "scores tasks, which no step does",
    "boto3": "a server of objects, for other tests",
    "moto": "a server of objects, for other tests",
    "s3fs": "a server of objects, for other tests",
    "selenium": "a browser, for other tests",
    "axe_core_python": "a browser, for other tests",
}
UNSEEN = {"accelerate", "pytest-timeout"}  # what transformers and pytest load by themselves


def gpu_tests() -> list[Path]:
    return [
        path
        for path in (ROOT / "tests").glob("test_*.py")
        if "mark.gpu" in path.read_text() and path != Path(__file__)
    ]


def named_in(path: Path) -> Iterator[str]:
    """Yield the top-level modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (each.name.partition(".")[0] for each in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case ast.Call(
                func=ast.Attribute(attr=called), args=[ast.Constant(value=str(name))]
            ) if called in ("import_module", "importorskip", "find_spec"):
                yield name.partition(".")[0]
            case _:
                pass


def third_party() -> set[str]:
    """Return the modules of others that the scripts, the tests of a GPU and the package import."""
    lines = ran("--list").stdout
    ahead = [ROOT / script for script in re.findall(r"benchmarks/\w+\.py", lines)]
    ahead += [ROOT / "tests/conftest.py", *gpu_tests(), *(ROOT / "pipeline").rglob("*.py")]
    assert len(ahead) > 100
    seen, found = set[Path](), set[str]()
    while ahead:
        path = ahead.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in {*named_in(path)} - {*sys.stdlib_module_names, "pipeline"}:
            folders = (BENCHMARKS, ROOT / "tests")
            own = [place / f"{name}.py" for place in folders if (place / f"{name}.py").is_file()]
            own += [each for place in folders for each in (place / name).glob("*.py")]
            ahead += own
            found |= set() if own else {name}
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(path: Path) -> dict[str, str]:
    """Return by distribution what a file asks of it: `==1.0`, `>=1.0`, or nothing."""
    found = dict[str, str]()
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            name, asked = re.fullmatch(r"([\w.-]+)((?:[=>]=\S+)?)", line).groups()
            found[canonical(name)] = asked
    return found


def test_all_that_they_import_is_listed() -> None:
    listed = requirements(BENCHMARKS / "on_gpu-requirements.txt")
    wanted = {canonical(MODULES.get(name, name)) for name in third_party() - LEFT_OUT.keys()}
    assert wanted - listed.keys() == set()
    assert listed.keys() - wanted == UNSEEN  # nothing else is carried along


def test_versions_are_those_that_were_tested() -> None:
    listed = requirements(BENCHMARKS / "on_gpu-requirements.txt")
    pinned = requirements(ROOT / "constraints.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    some = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    floors = dict[str, str]()
    for each in some:
        name, asked = re.match(r"([\w.-]+)(?:\[.*?\])?((?:[=>]=[^,;\s]+)?)", each).groups()
        floors[canonical(name)] = asked
    for name, asked in listed.items():
        assert asked == pinned.get(name, floors.get(name, "")), name


# -- what the scripts rest on ---------------------------------------------------------------------


def test_an_arm_that_fails_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 80 GiB")

    arms = {"ours": distillation_head.ours, "trl": broken, "eager": distillation_head.eager}
    monkeypatch.setattr(distillation_head, "arms_of", lambda _: arms)
    monkeypatch.setattr(distillation_head, "peak_elsewhere", lambda *_: 0)
    monkeypatch.setattr(distillation_head, "free_bytes", lambda _: 2**10)
    kept = list[set[str]]()
    shape = (16, 65, 8, 8)
    found = distillation_head.measure(
        shape, torch.device("cpu"), torch.float32, 2, lambda now: kept.append({*now})
    )
    assert found["not_here"]["trl"] == "OutOfMemoryError: CUDA out of memory."
    assert found["not_here"]["eager"].startswith("logits in full take about")
    assert found["ours"]["error"]["weight"] < 1e-5
    assert found["products, padded"]["tflops"] > 0
    assert ("ours" in kept[0], "ours" in kept[-1]) == (False, True)  # saved before the end
    said = distillation_head.table(shape, found)
    assert "trl: not here: OutOfMemoryError" in said
    assert "out of memory" in capsys.readouterr().err


def test_what_a_compiler_fails_with_ends_one_arm_alone() -> None:
    class CompilationError(Exception):  # as Triton's is: of no kind that Python has
        pass

    def broken() -> int:
        raise CompilationError("at 3:4\nmore")

    assert results.attempt(broken) == (None, "CompilationError: at 3:4")
    assert results.attempt(lambda: 0) == (0, None)


def test_a_script_fails_where_ours_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> torch.Tensor:
        raise RuntimeError("no kernel")

    arms = {"ours": broken, "eager": distillation_head.eager}
    monkeypatch.setattr(distillation_head, "arms_of", lambda _: arms)
    monkeypatch.setattr(distillation_head, "peak_elsewhere", lambda *_: 0)
    words = ["head", "--device", "cpu", "--shapes", "16,65,8,8", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="ours was not measured"):
        distillation_head.main()


def test_logits_in_full_are_tried_only_where_they_fit() -> None:
    shape = (65536, 50257, 768, 1024)
    assert distillation_head.does_not_fit(shape, 139 * 2**30) is None
    said = distillation_head.does_not_fit(shape, 80 * 2**30)
    assert said == "logits in full take about 86 GiB, 80 GiB are free"


def test_a_result_is_saved_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "a/b")
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    path = results.save_result("products", {}, "log")
    apart = results.save_result("products", {}, "log", part="some")
    assert apart.name == path.name.replace("products-", "products-some-")
    assert '"commit": "abc"' in path.read_text()
    assert '"dirty": null' in path.read_text()


def test_attentions_figures_are_named_as_those_that_were_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "TOKENS", 64)
    monkeypatch.setattr(attention, "_peak_elsewhere", lambda *_: 2**20)
    found = attention.compared(32, Precision.fp32, torch.device("cpu"), 1, 1)
    saved = json.loads(max(BENCHMARKS.glob("results/attention-cpu-*.json")).read_text())
    assert list(found) == list(saved["figures"]["arms"][0])
    assert found["documents"] > 2  # more than one a row
    assert "memory of a step 1 against 1 MiB" in attention.in_words(found)


def test_a_block_is_made_once_and_counts_what_follows_its_warm_up() -> None:
    made = list[str]()

    def make() -> blocks.Block:
        made.append("block")
        return lambda steps: (2.0 * steps, 8 * steps)

    kept = dict[str, blocks.Block]()
    assert [blocks.pace("ours", make, kept, steps) for steps in (1, 2)] == [0.25, 0.25]
    assert made == ["block"]
    edges: list[tuple[float, int]] = []
    hooks = blocks.edge_hooks(edges, 2, torch.device("cpu"))
    for step in range(1, blocks.WARM_UP + 3):
        hooks.advance(step, 10 * step)
    assert blocks.between(edges)[1] == 20  # tokens of two steps


def test_the_peer_is_gpt2s_shape_and_reads_nothing_ahead() -> None:
    with torch.device("meta"):
        whole = GPT(50304, 1024, 12, 12, 768)
    counted = sum(each.numel() for each in whole.parameters()) - whole.positions.weight.numel()
    assert f"{counted / 1e6:.2f}" == "123.59"  # as its authors print it
    torch.manual_seed(0)
    model = GPT(32, 8, 2, 2, 16)
    ids = torch.randint(32, (2, 8))
    seen, later = ids.clone(), ids.clone()
    later[:, 5:] = (ids[:, 5:] + 1) % 32
    hidden = list[torch.Tensor]()
    model.norm.register_forward_hook(lambda *given: hidden.append(given[2].detach()))
    losses = [model(each, torch.randint(32, (2, 8))) for each in (seen, later)]
    assert losses[0].item() == pytest.approx(torch.tensor(32.0).log().item(), abs=0.2)
    torch.testing.assert_close(hidden[0][:, :5], hidden[1][:, :5])
    assert not torch.allclose(hidden[0][:, 5:], hidden[1][:, 5:])
    decays, stays = optimizer_of(model, learning_rate=1e-3).param_groups
    assert {each.dim() for each in decays["params"]} == {2}
    assert {each.dim() for each in stays["params"]} == {1}


@pytest.mark.slow
def test_real_steps_run_at_the_tiniest_size(tmp_path: Path) -> None:
    done = ran(
        *("--device", "cpu", "--tiny", "--minutes", "8", "--folder", str(tmp_path)),
        *("--only", "kernels products known_load decode_ways training cached decode hours"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
