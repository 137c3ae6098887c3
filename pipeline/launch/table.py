"""The engines by name: the one list to extend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.launch import kubernetes, skypilot, slurm
from pipeline.launch.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What differs between engines.

    Attributes:
        takes: Names of the options it takes.
        check: Refuses what it cannot be asked for.
        text: Returns the file's text.
        client: Returns the command that hands it a file.
        ending: Of the file's name.
        limits_time: Whether it ends a job that takes longer than was asked for.
    """

    takes: tuple[str, ...]
    check: Callable[[Job], None]
    text: Callable[[Job], str]
    client: Callable[[str], list[str]]
    ending: str
    limits_time: bool = True


ENGINES = {
    "slurm": Engine(
        takes=slurm.TAKES, check=slurm.check, text=slurm.text, client=slurm.client, ending=".sbatch"
    ),
    "skypilot": Engine(
        takes=skypilot.TAKES,
        check=skypilot.check,
        text=skypilot.text,
        client=skypilot.client,
        ending=".sky.yaml",
        limits_time=False,
    ),
    "kubernetes": Engine(
        takes=kubernetes.TAKES,
        check=kubernetes.check,
        text=kubernetes.text,
        client=kubernetes.client,
        ending=".k8s.yaml",
    ),
}
