"""Have SkyPilot read tasks, and take apart what other validators read: see `validate.sh`.

    python tests/engines/tasks.py FOLDER FILE...

Into FOLDER go Jobs (a JobSet's, too: its own schema is no package's) and the shell of all files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sky
import yaml


def main(folder: Path, files: list[Path]) -> None:
    """Read every file, and write its parts."""
    for file in files:
        content: Any = yaml.safe_load(file.read_text())
        name = f"{file.parent.name}-{file.stem}"
        if file.parent.name == "skypilot":
            script = task(file, content)
        else:
            job = job_of(content)
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(job))
            [container] = job["spec"]["template"]["spec"]["containers"]
            script = container["args"][0] if container["command"][0] == "bash" else ""
        if script:
            (folder / f"{name}.sh").write_text(f"#!/bin/bash\n{script}")


def task(file: Path, content: Any) -> str:
    """Return what a task runs, once SkyPilot has understood it."""
    read = sky.Task.from_yaml_config(content)
    [asked] = read.resources
    said = (read.num_nodes, asked.accelerators, asked.use_spot, asked.job_recovery)
    print(f"{file}: SkyPilot {sky.__version__} understood {said}")
    assert asked.job_recovery["recover_on_exit_codes"] == [75]
    assert isinstance(read.run, str)
    return read.run


def job_of(content: Any) -> Any:
    """Return a Job; of a JobSet, the one that it makes."""
    if content["kind"] == "Job":
        return content
    [made] = content["spec"]["replicatedJobs"]
    spec = made["template"]["spec"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "ranks"}, "spec": spec}


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
