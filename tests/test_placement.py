"""What a scheduler granted, from its environment; nothing is guessed."""

from __future__ import annotations

import pytest

from pipeline.ledger.placement import Grant, allocated_hours, grant, placement


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"SLURM_GPUS": "8"}, None),  # left over in a shell outside of any job
        ({"SLURM_JOB_ID": "7"}, Grant("slurm", "7", None)),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS": "8"}, Grant("slurm", "7", 8)),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS": "h200:8"}, Grant("slurm", "7", 8)),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS": "h200:4,a100:2"}, Grant("slurm", "7", 6)),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS": "many"}, Grant("slurm", "7", None)),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}, Grant("slurm", "7", 4)),
        (
            {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NUM_NODES": "1"},
            Grant("slurm", "7", 4),
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NUM_NODES": "2"},
            Grant("slurm", "7", None),
        ),
    ],
)
def test_the_grant_is_what_the_scheduler_says(environ: dict[str, str], found: Grant | None) -> None:
    assert grant(environ) == found


def test_untouched_devices_count_as_allocated_alone() -> None:
    allocated = allocated_hours(attached_h=4.0, devices=2, granted=Grant("slurm", "7", 8))
    assert (allocated.value, allocated.provenance) == (16.0, "declared")
    assert allocated_hours(4.0, 2, None).why_missing == "no scheduler granted this run"
    assert "does not say" in (allocated_hours(4.0, 2, Grant("slurm", "7", None)).why_missing or "")
    assert "1 GPUs where 2 were used" in (
        allocated_hours(4.0, 2, Grant("slurm", "7", 1)).why_missing or ""
    )


def test_the_devices_own_library_knows_better() -> None:
    here = placement(
        "NVIDIA H200", 2, {"uuids": ["GPU-1", "GPU-2"], "mig": False}, Grant("slurm", "7", 8)
    )
    assert here["uuids"] == ["GPU-1", "GPU-2"]
    assert here["device_names"] == ["NVIDIA H200", "NVIDIA H200"]
    assert here["scheduler"] == {"name": "slurm", "job_id": "7", "gpus": 8}
    bare = placement("Xeon", 1, {}, None)
    assert (bare["driver"], bare["exclusive"], bare["scheduler"], bare["count"]) == (
        None,
        "unknown",
        None,
        1,
    )
