"""The catalogue: what rows carry has an entry, and a row's summary has it under that key."""

from __future__ import annotations

from make_result import make_row, value

from pipeline.ledger.gpu_usage import FIGURES
from pipeline.ledger.metrics import BY_KEY, CATALOGUE, row_summary

ELSEWHERE = {
    "energy_j": "compute/energy_j",
    "memory_used_peak_bytes": "compute/nvml_peak_bytes",
    "busy": "compute/busy_gpu_hours",
    "sm_active": "compute/sm_active_gpu_hours",
    "tensor_active": "compute/tensor_active_gpu_hours",
}
"""What a reading of the devices says that a row shows in another unit, or under another name."""


def test_no_key_stands_twice() -> None:
    assert len(BY_KEY) == len(CATALOGUE)


def test_hours_of_gpus_by_kind_are_in_the_summary() -> None:
    row = make_row("student", gpu=True)
    kinds = {"attached": 2.0, "allocated": 8.0, "busy": 1.5, "sm_active": 1.0, "tensor_active": 0.5}
    row["ledger"]["gpu_hours"] |= {name: value(hours) for name, hours in kinds.items()}
    found = row_summary(row)
    keys = {
        name: "compute/gpu_hours" if name == "attached" else f"compute/{name}_gpu_hours"
        for name in kinds
    }
    assert {name: found[key]["value"] for name, key in keys.items()} == kinds
    assert {BY_KEY[key].unit for key in keys.values()} == {"GPU-h"}


def test_the_conditions_that_devices_worked_under_are_in_the_summary() -> None:
    row = make_row("student", gpu=True)
    shown = [name for name in FIGURES if name not in ELSEWHERE]
    row["ledger"]["conditions"] |= {name: value(number) for number, name in enumerate(shown)}
    found = row_summary(row)
    assert {name: found[f"compute/{name}"]["value"] for name in shown} == {
        name: n for n, name in enumerate(shown)
    }
    assert {"throttle_share", "foreign_load", "temperature_c_max", "sm_clock_mhz_mean"} <= set(
        shown
    )


def test_a_summary_has_no_key_that_the_catalogue_lacks() -> None:
    assert set(row_summary(make_row("student"))) <= set(BY_KEY)
    assert set(ELSEWHERE.values()) <= set(BY_KEY)
