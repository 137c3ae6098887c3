"""Small valid results (schema 2) for tests: hours from the worked example of the measurement rules,
in minutes.

`make_result("distill")` gives a whole dict; `make_row`, `make_pair`, `value` and `null` its parts.
"""

from __future__ import annotations

from typing import Any

from pipeline.ledger.gpu_usage import FIGURES
from pipeline.ledger.memory import ON_DEVICE
from pipeline.ledger.metrics import BY_KEY

MINUTE = 1 / 60
DIGEST = "0123456789abcdef0123456789abcdef"
ARMS = {
    "baseline": ("baseline",),
    "distill": ("teacher", "student", "control_steps", "control_compute"),
    "quantize": ("reference", "int8", "nf4"),
    "mixed_precision": ("fp32", "bf16", "tf32", "fp16"),
    "full": ("baseline", "teacher", "student", "student_int8"),
}
PRIMARY = {
    "baseline": "baseline",
    "distill": "student",
    "quantize": "int8",
    "mixed_precision": "bf16",
    "full": "student_int8",
}
DEPENDS = {
    "student": ["teacher"],
    "int8": ["reference"],
    "nf4": ["reference"],
    "student_int8": ["teacher", "student"],
}
INPUTS = {
    "student": {"model": "student_init", "teacher": "teacher"},
    "int8": {"model": "reference"},
    "nf4": {"model": "reference"},
    "student_int8": {"model": "student"},
}
BASE_IS = {
    ("student", "control_compute"): "compute_control",
    ("student", "control_steps"): "tokens_control",
    ("student", "teacher"): "teacher",
    ("int8", "reference"): "source",
    ("nf4", "reference"): "source",
    ("student_int8", "student"): "source",
}
WORK_MIN = {"teacher": 30, "student": 20, "control_steps": 9, "control_compute": 12}
"""Minutes of work of the worked example; other arms take 10."""
BITS = {"teacher": 2.204, "student": 2.272, "control_steps": 2.319, "control_compute": 2.067}
_TYPES = {"student": "distill", "int8": "quantize", "nf4": "quantize", "student_int8": "quantize"}


def value(v: float, prov: str = "measured", **more: Any) -> dict[str, Any]:
    """Return a figure as it stands in result.json."""
    return {"value": v, "provenance": prov, "why_missing": None, **more}


def null(why: str, **more: Any) -> dict[str, Any]:
    """Return a null with its reason."""
    return {"value": None, "provenance": "unavailable", "why_missing": why, **more}


def make_ledger(
    work_min: float, assess_min: float, *, retry_min: float = 0.0, gpu: bool = False
) -> dict[str, Any]:
    """Return a ledger whose attached time is work + assess + retry, 80% of it productive and 5%
    wasted.
    """
    attached = (work_min + assess_min + retry_min) * MINUTE
    classes = {"productive": 0.8 * attached, "support": 0.15 * attached, "wasted": 0.05 * attached}
    hours = {
        "attached": attached,
        "work": work_min * MINUTE,
        "assess": assess_min * MINUTE,
        "retry": retry_min * MINUTE,
    }
    no_gpu, unread = "no GPU in this run", null("no such counter in this run")
    no_memory = null("no device memory on a CPU run")
    gpu_hours = {
        name: value(v) if gpu else null(no_gpu)
        for name, v in (("attached", attached), *classes.items())
    }
    ns = lambda share: round(share * attached * 3600e9)
    return {
        "identity": {"team": "vision"},
        "placement": {"node": "n1"},
        "conditions": {
            **dict.fromkeys((name for name in FIGURES if name != "energy_j"), unread),
            "meter_overhead": value(0.001),
            "throttle_reasons": [],
            "problems": [],
            "truncated": False,
        },
        "wall_s": value(attached * 3600),
        "phases_ns": {
            "forward": ns(0.45),
            "backward": ns(0.35),
            "eval": ns(0.15),
            "data_wait": ns(0.05),
        },
        "device_hours": {
            **{name: value(v) for name, v in {**hours, **classes}.items()},
            "wasted_by": {"data_wait": value(classes["wasted"])},
        },
        "gpu_hours": {
            **gpu_hours,
            **dict.fromkeys(("allocated", "busy", "sm_active", "tensor_active"), unread),
        },
        "energy_j": null("no energy counter on this device"),
        "counts": {
            "steps": value(200),
            "steps_lost": value(0),
            "examples": value(3200),
            "tokens": value(409_600),
            "target_tokens": value(400_000),
            "model_flops": value(1e13),
            "achieved_tflops": value(0.05),
            "peak_tflops": null("no peak rate known"),
            "mfu": null("no peak rate known"),
            "goodput": value(0.8),
            "distillation_share": null("not a distillation"),
            "distillation_gradient_share": null("not a distillation"),
        },
        "memory": {
            **dict.fromkeys(ON_DEVICE, no_memory),
            "host_peak_rss_bytes": value(900_000_000),
        },
        "cost": {
            "amount": null("no rate declared: cost.per_device_hour"),
            "currency": None,
            "facility_energy_j": null("no PUE declared"),
        },
        "meter_valid": True,
        "meter_problems": [],
    }


def make_empty_ledger(why: str) -> dict[str, Any]:
    """Return the ledger of a stage that did not run: every figure null, with the reason."""
    full = make_ledger(1, 1)
    for group in ("device_hours", "gpu_hours", "counts", "memory"):
        full[group] = {name: null(why) for name in full[group] if name != "wasted_by"}
    full["device_hours"]["wasted_by"] = {}
    return {
        **full,
        "wall_s": null(why),
        "phases_ns": {},
        "energy_j": null(why),
        "cost": {"amount": null(why), "currency": None, "facility_energy_j": null(why)},
    }


def make_row(
    arm: str, *, key: str = "bits_per_byte", gpu: bool = False, **changes: Any
) -> dict[str, Any]:
    """Return the row of a finished stage; `changes` replace its members."""
    level = BITS.get(arm, 2.2) if BY_KEY[f"quality/{key}"].direction < 0 else 0.8
    row: dict[str, Any] = {
        "arm": arm,
        "stage": arm,
        "type": _TYPES.get(arm, "train"),
        "seed": 0,
        "attempt": 1,
        "status": "FINISHED",
        "why": None,
        "reused": None,
        "depends_on": DEPENDS.get(arm, []),
        "inputs": INPUTS.get(arm, {"model": "base"}),
        "makes": "model",
        "artifact": {
            "path": f"/runs/store/{DIGEST}",
            "kind": "model",
            "digest": DIGEST,
            "bytes": 4_000_000,
        },
        "ledger": make_ledger(WORK_MIN.get(arm, 10), 2, gpu=gpu),
        "quality": {
            key: value(level, ci=[level - 0.02, level + 0.02], n=520, items="items/test.parquet")
        },
        "recovery": {},
        "serving": {"device_s_per_1k_units": value(0.6 if arm == "student" else 1.0)},
    }
    return {**row, **changes}


def make_unfinished(arm: str, status: str, why: str, **changes: Any) -> dict[str, Any]:
    """Return the row of a stage that was skipped, failed or killed before it left an artifact."""
    return make_row(arm) | {
        "status": status,
        "why": why,
        "artifact": None,
        "ledger": make_empty_ledger(why),
        "quality": {"bits_per_byte": null(why, ci=None, n=None, items=None)},
        "recovery": {},
        "serving": {"device_s_per_1k_units": null(why)},
        **changes,
    }


def make_quality(
    v: float, answer: str, *, key: str = "bits_per_byte", half: float = 0.004
) -> dict[str, Any]:
    """Return a comparison's quality: an oriented difference with its interval and answer."""
    return {key: value(v, "derived", ci=[v - half, v + half], margin=0.01, answer=answer, n=520)}


def make_saving(v: float, half: float | None = 0.02) -> dict[str, Any]:
    """Return a saving with its interval, or without one."""
    return value(v, "derived", ci=None if half is None else [v - half, v + half])


def make_pair(arm: str, base: str, **measures: Any) -> dict[str, Any]:
    """Return a comparison that is read on what `measures` names: quality, training, serving,
    payback.
    """
    empty: dict[str, Any] = {
        "speedup": None,
        "quality": {},
        "training": None,
        "serving": None,
        "payback": None,
    }
    names = {"arm": arm, "base": base, "base_is": BASE_IS.get((arm, base))}
    return {**names, "on": list(measures), **empty, **measures}


def make_pairs(recipe: str) -> list[dict[str, Any]]:
    """Return the comparisons of a shipped recipe, decided in one way or another."""
    never = null("never: not cheaper", unit="token")
    after = value(3_000_000, "derived", unit="token")
    better, worse, equal = (
        make_quality(0.02, "better"),
        make_quality(-0.1, "worse"),
        make_quality(0.001, "equal"),
    )
    return {
        "baseline": [],
        "distill": [
            make_pair(
                "student",
                "control_compute",
                quality=worse,
                training=null("censored: 200 steps", ci=None),
            ),
            make_pair("student", "control_steps", quality=better),
            make_pair("student", "teacher", quality=worse, serving=make_saving(0.4), payback=after),
        ],
        "quantize": [
            make_pair(
                "int8", "reference", quality=equal, serving=make_saving(-0.12), payback=never
            ),
            make_pair("nf4", "reference", quality=worse, serving=make_saving(0.3), payback=after),
        ],
        "mixed_precision": [
            make_pair(arm, "fp32", quality=equal, training=make_saving(0.41))
            for arm in ("bf16", "tf32", "fp16")
        ],
        "full": [
            make_pair("teacher", "baseline", quality=equal, training=make_saving(0.41)),
            make_pair(
                "student",
                "baseline",
                quality=worse,
                training=null("censored: 200 steps", ci=None),
                serving=make_saving(0.7),
                payback=after,
            ),
            make_pair(
                "student_int8", "baseline", quality=worse, serving=make_saving(-2.4), payback=never
            ),
        ],
    }[recipe]


def make_run(
    rows: list[dict[str, Any]], *, compare_min: float = 6, overhead_min: float = 3
) -> dict[str, Any]:
    """Return the run's sums: work, assess and retry of the rows not reused, and what stands
    apart.
    """
    hours: dict[str, float] = {"compare": compare_min * MINUTE, "overhead": overhead_min * MINUTE}
    for name in ("work", "assess", "retry"):
        hours[name] = sum(
            row["ledger"]["device_hours"][name]["value"] or 0.0 for row in rows if not row["reused"]
        )
    total = sum(hours.values())
    reused = sum(
        row["ledger"]["device_hours"]["attached"]["value"] or 0.0 for row in rows if row["reused"]
    )
    return {
        "attempts": 1,
        "device_hours": {**{name: value(v) for name, v in hours.items()}, "total": value(total)},
        "phases_device_ns": {
            "overhead": {"import": round(overhead_min * 6e10)},
            "compare": {"generate": round(compare_min * 6e10)},
        },
        "spent": value(total),
        "reused": value(reused),
        "per_converged_model": {
            **dict.fromkeys(
                ("device_hours", "amount"), null("no quality declared: cost.converged_at")
            ),
            "currency": None,
            "run": None,
        },
    }


def make_result(recipe: str = "distill", *, gpu: bool = False, **changes: Any) -> dict[str, Any]:
    """Return a valid result of a shipped recipe; `changes` replace its members (`rows`,
    `comparisons`, ...).
    """
    rows = changes.get("rows", [make_row(arm, gpu=gpu) for arm in ARMS[recipe]])
    result: dict[str, Any] = {
        "schema": 2,
        "run_id": "4f1c0a",
        "recipe": recipe,
        "question": "is it worth it?",
        "status": "FINISHED",
        "why": None,
        "primary_arm": PRIMARY[recipe],
        "conclusion": {"verdict": "", "answers": []},
        "device": (
            {"kind": "cuda", "name": "NVIDIA H200", "count": 1}
            if gpu
            else {"kind": "cpu", "name": "x86_64", "count": 1}
        ),
        "environment": {
            "command": f"python -m pipeline recipe={recipe}",
            "python": "3.11.9",
            "platform": "Linux",
            "cores": 2,
            "torch": "2.13.0",
            "commit": None,
            "notes": [],
        },
        "run": make_run(rows),
        "rows": rows,
        "comparisons": make_pairs(recipe),
        "verdict": None,
    }
    return {**result, **changes}
