"""Keys: what decides an artifact, an assessment, or a reading of serving, as one digest.

Every function here is pure but for reading the versions of libraries and the settings files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from pipeline.config.settings.run import Run
from pipeline.data.completions import file_digest
from pipeline.ledger.peaks import device_name
from pipeline.runs.session import Session
from pipeline.runs.versions import versions
from pipeline.stages.base import Stage
from pipeline.store.artifacts import Artifact, key_of, plain

# part of an assessment's key: raise it when the same settings give other figures
ASSESSMENT_VERSION = 3
QUANTIZERS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}
"""Libraries by `quant_method` of a model's configuration."""
# settings that change neither what is made nor how good it is
UNKEYED = ("tracking", "budget", "ledger", "allow_no_speedup")
# settings of serving that change nothing of what is measured
UNSERVED = ("volume", "rate", "results", "check_vllm")
DRAFT = ("draft", "draft_tokens")  # they change nothing where no draft is asked for


class MadeOn(TypedDict):
    """What a timing holds for."""

    device: str
    devices: int
    threads: int | None


def made_on(session: Session, devices: int | None = None) -> MadeOn:
    """Return what a timing holds for: device, their number (or another one), and threads."""
    return {
        "device": device_name(session.device),
        "devices": session.devices if devices is None else devices,
        "threads": session.run.hardware.num_threads,
    }


def stage_key(
    session: Session,
    name: str,
    stage: Stage,
    inputs: Mapping[str, Artifact],
    seed: int,
    matched_flops: float | None,
    *,
    devices: int | None = None,
) -> str:
    """Return the key of what a stage makes: settings, inputs, data, seed, versions and device.

    Args:
        inputs: By role.
        matched_flops: That the stage may spend, where it matches those of others.
        devices: In place of how many there are: what it makes is then known by another number.
    """
    with session.clock.phase("prepare"):
        settings = stage.key_settings(session.run, inputs)
    return key_of(
        stage=name,
        type=stage.type,
        version=stage.version,
        settings=settings,
        task=session.run.task,
        inputs={role: artifact.digest for role, artifact in inputs.items()},
        data=session.data.digest,
        seed=seed,
        matched=matched_flops,
        libraries=versions(stage.libraries(session.run)),
        **made_on(session, devices),
    )


def evaluation_settings(session: Session) -> dict[str, Any]:
    """Return what decides how artifacts are scored."""
    from pipeline.evaluation.quality.tasks import identity as tasks_identity

    config = session.run.quality
    # The margin decides what a difference means, not what is read. Tasks enter by what their files
    # say.
    quality = {k: v for k, v in plain(config).items() if k not in ("margin", "tasks")}
    return {
        "quality": {**quality, **tasks_identity(config)},
        "sequence_length": session.scored_length,
        "version": ASSESSMENT_VERSION,
    }


def evaluation_key(session: Session) -> str:
    """Return a digest of how artifacts are scored: values of two evaluations that share it can be
    compared.
    """
    return key_of(task=session.run.task, **evaluation_settings(session))


def reading_key(session: Session) -> str:
    """Return a digest of what of that decides a document's values: not the resamples, nor how many
    at once.
    """
    evaluation = evaluation_settings(session)
    for beside in ("bootstrap", "batch_size"):
        evaluation["quality"].pop(beside)
    return key_of(task=session.run.task, **evaluation)


def assessment_key(
    session: Session,
    stage_key: str,
    artifact: Artifact,
    seed: int,
    *,
    teacher: Artifact | None,
    unquantized: Artifact | None,
    recorded: Path | None,
    vllm: str | None,
) -> str:
    """Return the key of an assessment: the artifact, the test data, how it is scored, and what it
    is read beside.

    Args:
        stage_key: Of the stage that made it.
        teacher: Whose predictions its own are compared with.
        unquantized: What it was quantized from.
        recorded: Per-document values of another evaluation that stand in for this one.
        vllm: The version that reads it too, where one does.
    """
    return key_of(
        made=stage_key,
        artifact=artifact.digest,
        data=session.data.digest,
        seed=seed,
        **evaluation_settings(session),
        teacher=None if teacher is None else teacher.digest,
        unquantized=None if unquantized is None else unquantized.digest,
        libraries=versions(["lm-eval"] if session.run.quality.tasks else []),
        # Only where it is given, so that keys of assessments without it stay as they were.
        **({} if recorded is None else {"recorded": file_digest(str(recorded))}),
        **({} if vllm is None else {"vllm": vllm}),
    )


def serving_key(
    session: Session, pairs: list[tuple[str, str]], artifacts: Mapping[str, Artifact], decode: Any
) -> str:
    """Return the key of a comparison pass: the artifacts, the load, and where they are served.

    Args:
        artifacts: By arm.
        decode: How tokens are written on this device.
    """
    gate = session.gate
    unserved = UNSERVED if session.run.serving.draft is not None else (*UNSERVED, *DRAFT)
    serving = {k: v for k, v in plain(session.run.serving).items() if k not in unserved}
    quantizers = [quantized_by(each.path) for each in artifacts.values()]
    return key_of(
        pairs=pairs,
        artifacts={arm: artifact.digest for arm, artifact in artifacts.items()},
        serving=serving | {"decode": decode},
        task=session.run.task,
        data=session.data.digest,
        libraries=versions(each for each in quantizers if each is not None),
        **made_on(session),
        # A second look has to measure anew, not find the first one's readings.
        **({"look": gate.look, "energy": gate.policy.energy is not None} if gate else {}),
    )


def quantized_by(folder: Path) -> str | None:
    """Return the library that a stored model is quantized with, or None."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    return QUANTIZERS.get(str(method), None if method is None else str(method))


def run_keys(
    run: Run, data: str, owner: Mapping[str, Any], released: Mapping[str, str]
) -> tuple[str, str]:
    """Return the digest of a run's settings and data, and the key of the run: nobody resumes a run
    that another owner has paid for so far.

    Args:
        released: Digests of released artifacts by arm, in a release check.
    """
    settings = {name: value for name, value in plain(run).items() if name not in UNKEYED}
    config = key_of(run=settings, data=data, **({"compared": dict(released)} if released else {}))
    return config, key_of(config=config, owner=dict(owner))
