"""The code that torch's compiler makes for CUDA of a training step, of the head and of a decoding
step, made and compiled without a device: no kernel spills, no mask of tokens against tokens is
made, attention keeps its operator, and a layer starts no more kernels than it did.

What torch does not allow offline: Dynamo's own capture of a model on `cuda:0`, which needs a torch
built for CUDA; graphs are traced on the CPU, with attention's CUDA operators put in, and moved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
PROJECT = Path(__file__).parent.parent
ARCHITECTURES = (80, 89, 90, 100, 120)
GRAPHS = {"forward", "backward", "head", "step"}
ATTENTION = {
    "forward": "torch_attn._varlen_attn.default",
    "backward": "torch_attn._varlen_attn_backward.default",
    "step": "aten._scaled_dot_product_efficient_attention.default",
}
"""The operator that each graph has once a layer."""
PER_LAYER = {"forward": 14, "backward": 18, "head": 0, "step": 9}
BESIDE = {"forward": 2, "backward": 3, "head": 4, "step": 1}
"""Triton kernels that are started at most, for each layer and beside them: as torch 2.13 does."""
CACHE = 4 * 2 * 128 * 64  # elements of a layer's keys


@dataclass(frozen=True, slots=True)
class Made:
    """What came of the graphs, by name, and of every configuration of their kernels."""

    graphs: dict[str, dict[str, Any]]
    kernels: list[dict[str, Any]]


def made(folder: Path, architecture: int, *options: str) -> Made:
    """Have the code made in a process of its own, where kernels are no Python."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "CI": "1",  # an operator that Inductor would only warn of is an error there
        "PYTHONPATH": str(PROJECT),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    program = PROJECT / "tests/programs/inductor_for_cuda.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(architecture), *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    graphs = {line["graph"]: line for line in lines if "operators" in line}
    return Made(graphs, [line for line in lines if "operators" not in line])


def complaints(found: Made, layers: int) -> list[str]:
    """Return what is wrong with the code of a model of so many layers."""
    said: list[str] = []
    for name, graph in found.graphs.items():
        if graph["dense"]:
            said.append(f"{name}: tokens against tokens: {graph['dense']}")
        operator = ATTENTION.get(name)
        if operator and graph["operators"].get(operator) != layers:
            said.append(f"{name}: not {operator} once a layer")
        if graph["launches"] > (most := layers * PER_LAYER[name] + BESIDE[name]):
            said.append(f"{name}: {graph['launches']} kernels, {most} expected")
        if name == "step" and graph["largest"] >= CACHE:
            said.append("step: a kernel passes over the whole cache")
    return [*said, *(f"spills: {kernel}" for kernel in found.kernels if kernel["spilled"])]


@pytest.mark.slow
def test_code_for_one_gpu_attends_by_lengths_and_does_not_spill(tmp_path: Path) -> None:
    """Two kernels of each graph; the rest of them is slow."""
    found = made(tmp_path, 90, "--kernels", "2")
    assert found.graphs.keys() == GRAPHS
    assert len({(each["graph"], each["kernel"]) for each in found.kernels}) == 2 * len(GRAPHS)
    assert complaints(found, layers=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_of_any_gpu_spills(architecture: int, tmp_path: Path) -> None:
    found = made(tmp_path, architecture, "--layers", "2")
    names = {(each["graph"], each["kernel"]) for each in found.kernels}
    assert len(names) == sum(each["kernels"] for each in found.graphs.values()) > 40
    assert complaints(found, layers=2) == []


@pytest.mark.slow
def test_a_dense_mask_is_found_forward_and_backward(tmp_path: Path) -> None:
    """What the tests above would see."""
    said = complaints(made(tmp_path, 90, "--parts", "masked", "--kernels", "0"), layers=1)
    for name in ("forward", "backward"):
        assert any(line.startswith(f"{name}: tokens against tokens") for line in said)
        assert f"{name}: not {ATTENTION[name]} once a layer" in said


def test_a_spill_another_kernel_and_a_copied_cache_are_found() -> None:
    kernel = {"kernel": "one", "config": "", "registers": 32, "stack": 0, "spilled": 8}
    operators = {ATTENTION["step"]: 1}
    graph = {"operators": operators, "dense": [], "launches": 11, "largest": CACHE}
    said = complaints(Made({"step": graph}, [kernel]), layers=1)
    assert said[:2] == [
        "step: 11 kernels, 10 expected",
        "step: a kernel passes over the whole cache",
    ]
    assert said[2].startswith("spills: {'kernel': 'one'")
