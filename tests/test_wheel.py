"""Installed from a wheel and run in an empty folder: the same as from a checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "tracking.charts=false",
    *(
        "training.steps=2",
        "training.batch_size=4",
        "training.sequence_length=64",
        "data.max_documents=40",
    ),
    *(
        "model.shape.hidden_size=64",
        "model.shape.heads=1",
        "model.shape.intermediate_size=128",
        "model.shape.layers=1",
    ),
    "training.eval_documents=1",
    *("quality.max_documents=24", "quality.bootstrap=200", "tracking.mlflow=false"),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with nothing in it but the unpacked wheel; the libraries are those of this
    environment.
    """
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that knows the wheel and the libraries, but not the checkout."""
    libraries = sysconfig.get_path("purelib")
    code = (
        f"import sys; sys.path[:0] = [{str(installed)!r}, {libraries!r}]; sys.argv[0] = 'pipeline';"
        f" import pipeline; assert pipeline.__file__.startswith({str(installed)!r}); import runpy;"
        " runpy.run_module('pipeline', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_recipes_settings_and_refusals_come_with_it(installed: Path, tmp_path: Path) -> None:
    assert "Is a distilled student worth it?" in run(installed, tmp_path).stdout
    done = run(installed, tmp_path, "recipe=distill", "precision=fp32", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "name: fp32" in done.stdout
    done = run(installed, tmp_path, "recipe=distil")
    assert (done.returncode, done.stderr.strip()) == (
        1,
        "refused: recipe: there is no 'distil'; did you mean distill?",
    )


@pytest.mark.slow
def test_it_runs_in_an_empty_folder_and_leaves_all_in_mlruns(
    installed: Path, tmp_path: Path
) -> None:
    done = run(installed, tmp_path, "recipe=baseline", *SMALL)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mlruns"]
    result = json.loads((tmp_path / "mlruns/latest/result.json").read_text())
    assert result["status"] == "FINISHED"
    assert result["environment"]["commit"] is None
    assert not list(installed.rglob("mlruns"))
