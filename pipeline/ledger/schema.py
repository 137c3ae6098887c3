"""The JSON Schemas of `result.json` and `verdict.json` (schema 2). Every run is checked against
them in the tests.
"""

from __future__ import annotations

from typing import Any

from pipeline.ledger.disturbance import ADDED, COMPARED
from pipeline.ledger.gpu_timeline import FIGURES as TRACED
from pipeline.ledger.gpu_usage import ADDED as ADDED_USAGE
from pipeline.ledger.gpu_usage import FIGURES
from pipeline.ledger.json_schema import Schema
from pipeline.ledger.memory import MEMORY
from pipeline.ledger.metrics import PHASES, QUALITY_KEYS, TASK_KEY
from pipeline.ledger.shapes import Granted

_PROV = ["measured", "derived", "estimated", "declared", "unavailable"]
VALUE: Schema = {
    "type": "object",
    "required": ["value", "provenance", "why_missing"],
    "properties": {
        "value": {"type": ["number", "null"]},
        "provenance": {"enum": _PROV},
        "why_missing": {"type": ["string", "null"]},
    },
    "oneOf": [
        {
            "properties": {
                "value": {"type": "number"},
                "provenance": {"enum": _PROV[:4]},
                "why_missing": {"type": "null"},
            }
        },
        {
            "properties": {
                "value": {"type": "null"},
                "provenance": {"const": "unavailable"},
                "why_missing": {"type": "string"},
            }
        },
    ],
}
_TEXT: Schema = {"type": ["string", "null"]}
_INTERVAL = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}


def _values(*names: str, extra: Schema | None = None) -> dict[str, Any]:
    """Return an object whose named members are all values, each required."""
    return {
        "type": "object",
        "required": [*names, *(extra or {})],
        "properties": {**{name: {"$ref": "#/$defs/value"} for name in names}, **(extra or {})},
        "additionalProperties": False,
    }


def _interval_value(**more: Schema) -> Schema:
    return {
        "allOf": [
            {"$ref": "#/$defs/value"},
            {"required": ["ci"], "properties": {"ci": _INTERVAL, **more}},
        ]
    }


_GRANTS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": list(Granted.__annotations__),
        "additionalProperties": False,
        "properties": {
            "scheduler": {"type": "string"},
            "job_id": {"type": "string"},
            "attempts": {"type": "array", "items": {"type": "integer", "minimum": 1}},
            "state": _TEXT,
            "ended": {"type": "boolean"},
            "elapsed_s": {"type": ["number", "null"], "minimum": 0},
            "gpus": {"type": ["integer", "null"], "minimum": 0},
            "shared_with": {"type": "array", "items": {"type": "string"}},
            "why_missing": _TEXT,
        },
    },
}
_PHASES_NS = {
    "type": "object",
    "propertyNames": {"enum": list(PHASES)},
    "additionalProperties": {"type": "integer", "minimum": 0},
}
_STRINGS = {"type": "array", "items": {"type": "string"}}
RANK_TIME: Schema = {
    "type": "object",
    "required": ["rank", "host", "phases_ns", "local_ns"],
    "additionalProperties": False,
    "properties": {
        "rank": {"type": "integer", "minimum": 0},
        "host": {"type": "string"},
        "phases_ns": _PHASES_NS,
        "local_ns": {"type": "integer", "minimum": 0},
    },
}
"""What a rank did in work, or an assessment, that all share."""
_QUALITY_NAMES = {"anyOf": [{"enum": list(QUALITY_KEYS)}, {"pattern": TASK_KEY}]}
_COST = _values("amount", extra={"currency": {"type": ["string", "null"]}})
# a run of an older release has none
_COST["properties"]["facility_energy_j"] = {"$ref": "#/$defs/value"}
_COUNTS = _values(
    "steps",
    "steps_lost",
    "examples",
    "tokens",
    "model_flops",
    "achieved_tflops",
    "peak_tflops",
    "mfu",
    "goodput",
    "distillation_share",
    "distillation_gradient_share",
)
for _name in ("active_parameter_share", "target_tokens"):
    _COUNTS["properties"][_name] = {"$ref": "#/$defs/value"}  # a run of an older release has none
_CONDITIONS = _values(
    *(name for name in FIGURES if name not in ("energy_j", *ADDED_USAGE)),
    "meter_overhead",
    extra={"throttle_reasons": _STRINGS, "problems": _STRINGS, "truncated": {"type": "boolean"}},
)
_CONDITIONS["properties"] |= {
    name: {"$ref": "#/$defs/value"} for name in (*ADDED, *ADDED_USAGE)
}  # a row of an older release has none
_LEDGER: Schema = {
    "type": "object",
    "required": [
        "wall_s",
        "phases_ns",
        "device_hours",
        "gpu_hours",
        "energy_j",
        "counts",
        "memory",
        "cost",
        "meter_valid",
        "meter_problems",
        "identity",
        "placement",
        "conditions",
    ],
    "additionalProperties": False,
    "properties": {
        "conditions": _CONDITIONS,
        "ranks": {"type": "array", "items": RANK_TIME},
        "assess_ranks": {"type": "array", "items": RANK_TIME},
        "gpu_timeline": _values(
            *TRACED,
            extra={
                "phases_s": {
                    "type": "object",
                    "propertyNames": {"enum": list(PHASES)},
                    "additionalProperties": {"type": "number", "minimum": 0},
                },
                "traces": _STRINGS,
                "notes": _STRINGS,
            },
        ),
        "identity": {"type": "object"},
        "placement": {"type": "object"},
        "wall_s": {"$ref": "#/$defs/value"},
        "phases_ns": _PHASES_NS,
        "device_hours": _values(
            "attached",
            "work",
            "assess",
            "retry",
            "productive",
            "support",
            "wasted",
            extra={
                "wasted_by": {"type": "object", "additionalProperties": {"$ref": "#/$defs/value"}}
            },
        ),
        "gpu_hours": _values(
            "attached",
            "allocated",
            "busy",
            "sm_active",
            "tensor_active",
            "productive",
            "support",
            "wasted",
        ),
        "energy_j": {"$ref": "#/$defs/value"},
        "counts": _COUNTS,
        "memory": _values(*MEMORY),
        "cost": _COST,
        "meter_valid": {"type": "boolean"},
        "meter_problems": _STRINGS,
    },
}

_ROW: Schema = {
    "type": "object",
    "required": [
        "arm",
        "stage",
        "type",
        "seed",
        "attempt",
        "status",
        "why",
        "reused",
        "artifact",
        "ledger",
        "quality",
        "recovery",
        "serving",
        "depends_on",
    ],
    "additionalProperties": False,
    "properties": {
        "arm": {"type": "string"},
        "stage": {"type": "string"},
        "type": {"type": "string"},
        "seed": {"type": "integer"},
        "attempt": {"type": "integer", "minimum": 1},
        "status": {"enum": ["FINISHED", "FAILED", "KILLED", "SKIPPED"]},
        "why": {"type": ["string", "null"]},
        "reused": {"type": ["string", "null"]},
        "depends_on": {"type": "array", "items": {"type": "string"}},
        "inputs": {"type": "object", "additionalProperties": {"type": "string"}},
        "makes": {"type": "string"},
        "word": {"type": ["string", "null"]},
        "control": {
            "oneOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "required": ["of", "matches"],
                    "additionalProperties": False,
                    "properties": {
                        "of": {"type": "string"},
                        "matches": {"enum": ["compute", "tokens"]},
                    },
                },
            ]
        },
        "artifact": {
            "oneOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "required": ["path", "kind", "digest", "bytes"],
                    "additionalProperties": False,
                    "properties": {
                        "path": {"type": "string", "pattern": "^/"},
                        "kind": {"enum": ["model", "teacher_cache", "verdict"]},
                        "digest": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
                        "bytes": {"type": "integer", "minimum": 1},
                    },
                },
            ]
        },
        "ledger": _LEDGER,
        "quality": {
            "type": "object",
            "propertyNames": _QUALITY_NAMES,
            "additionalProperties": {
                "allOf": [
                    {"$ref": "#/$defs/value"},
                    {
                        "required": ["ci", "n", "items"],
                        "properties": {
                            "ci": _INTERVAL,
                            "n": {"type": ["integer", "null"]},
                            "groups": {"type": "integer"},
                            "items": {"type": ["string", "null"]},
                            "slice": {"type": "string"},
                        },
                    },
                ]
            },
        },
        "recovery": {
            "type": "object",
            "propertyNames": {"enum": ["loss", "kl"]},
            "additionalProperties": {"$ref": "#/$defs/value"},
        },
        "quantization": {
            "oneOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "required": ["format", "layers", "share"],
                    "additionalProperties": False,
                    "properties": {
                        "format": {"type": "string"},
                        "layers": {"type": "integer", "minimum": 0},
                        "share": {"$ref": "#/$defs/value"},
                    },
                },
            ]
        },
        "serving": {"type": "object", "additionalProperties": {"$ref": "#/$defs/value"}},
        "unchanged": {
            "oneOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "required": ["as", "why"],
                    "additionalProperties": False,
                    "properties": {"as": {"type": "string"}, "why": {"type": "string"}},
                },
            ]
        },
    },
}

_WARM_UP: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"rounds": {"type": "integer", "minimum": 1}, "steady": {"type": "boolean"}},
}  # empty where an older release said nothing of it
_COMPARISON: Schema = {
    "type": "object",
    "required": ["arm", "base", "on", "speedup", "quality", "training", "serving", "payback"],
    "additionalProperties": False,
    "properties": {
        "speedup": {
            "oneOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "required": ["saves_time", "memory", "no_speedup"],
                    "additionalProperties": False,
                    "properties": {
                        "saves_time": {"type": "boolean"},
                        "no_speedup": {"type": "boolean"},
                        "memory": {
                            "allOf": [
                                {"$ref": "#/$defs/value"},
                                {
                                    "required": ["of"],
                                    "properties": {"of": {"enum": ["peak_bytes", "weights_bytes"]}},
                                },
                            ]
                        },
                    },
                },
            ]
        },
        "arm": {"type": "string"},
        "base": {"type": "string"},
        "base_is": {
            "enum": ["compute_control", "tokens_control", "teacher", "source", "best_16_bit", None]
        },
        "on": {"type": "array", "items": {"enum": ["quality", "training", "serving", "payback"]}},
        "quality": {
            "type": "object",
            "propertyNames": _QUALITY_NAMES,
            "additionalProperties": _interval_value(
                margin={"type": "number"},
                answer={"enum": ["better", "worse", "equal", "undecided"]},
                n={"type": "integer"},
                groups={"type": ["integer", "null"]},
                available={"type": ["integer", "null"]},
                smallest_visible_damage={"type": "number"},
                items_to_decide={"type": ["integer", "null"]},
                why_undecided={"type": "string"},
            ),
        },
        "training": {
            "oneOf": [
                {"type": "null"},
                _interval_value(
                    c_arm={"$ref": "#/$defs/value"},
                    c_base={"$ref": "#/$defs/value"},
                    c_opt={"$ref": "#/$defs/value"},
                    all_in_arm={"$ref": "#/$defs/value"},
                    all_in_base={"$ref": "#/$defs/value"},
                    new_spend_saving={"$ref": "#/$defs/value"},
                    systems={"$ref": "#/$defs/value"},
                    algorithmic={"$ref": "#/$defs/value"},
                    bound={"$ref": "#/$defs/value"},
                    amortised={"$ref": "#/$defs/value"},
                    less_others={"$ref": "#/$defs/value"},
                    rule={"type": "string"},
                ),
            ]
        },
        "serving": {
            "oneOf": [
                {"type": "null"},
                _interval_value(
                    blocks={"type": "integer"},
                    how={"type": "string"},
                    dtypes={
                        "type": "object",
                        "required": ["arm", "base"],
                        "additionalProperties": {"type": "string"},
                    },
                    sd_log={"type": "number", "minimum": 0},
                    orders={"type": "array", "items": {"enum": ["ABBA", "BAAB"]}},
                    order_seed={"type": ["integer", "null"]},
                    warm_up=_WARM_UP,
                    disturbed=_STRINGS,
                ),
            ]
        },
        "payback": {
            "oneOf": [
                {"type": "null"},
                {
                    "allOf": [
                        {"$ref": "#/$defs/value"},
                        {
                            "required": ["unit"],
                            "properties": {
                                "unit": {"enum": ["token", "example"]},
                                "p_net_positive": {"$ref": "#/$defs/value"},
                                "replicas_saved": {"$ref": "#/$defs/value"},
                            },
                        },
                    ]
                },
            ]
        },
    },
}

_LIBRARIES = ("torch", "transformers", "accelerate", "hydra-core", "safetensors", "numpy")
_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_CRITERION: Schema = {
    "type": "object",
    "required": [
        "name",
        "outcome",
        "gating",
        "value",
        "ci",
        "level",
        "threshold",
        "unit",
        "n",
        "needed",
        "why",
    ],
    "additionalProperties": False,
    "properties": {
        "name": {
            "type": "string",
            "pattern": "^(training|serving|memory|energy|payback|quality/.+)$",
        },
        "outcome": {"enum": ["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]},
        "gating": {"type": "boolean"},
        "value": {"$ref": "#/$defs/value"},
        "ci": _INTERVAL,
        "level": {"type": ["number", "null"]},
        "threshold": {"type": ["number", "null"]},
        "unit": {"type": "string"},
        "n": {"type": ["integer", "null"]},
        "needed": {"type": ["integer", "null"]},
        "why": _TEXT,
        "groups": {"type": ["integer", "null"]},
        "available": {"type": ["integer", "null"]},
        "smallest_visible_damage": {"type": ["number", "null"]},
    },
}
_SIDE: Schema = {
    "type": "object",
    "required": ["reference", "digest", "path", "bytes", "model", "version", "url", "charge"],
    "additionalProperties": False,
    "properties": {
        "reference": {"type": "string"},
        "digest": _DIGEST,
        "path": {"type": "string"},
        "bytes": {"type": "integer"},
        "model": _TEXT,
        "version": _TEXT,
        "url": _TEXT,
        "charge": {"type": ["object", "null"]},
    },
}
_NUMBER: Schema = {"type": ["number", "null"]}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _record(**members: Schema) -> Schema:
    """Return an object whose members are all required."""
    return {
        "type": "object",
        "required": list(members),
        "additionalProperties": False,
        "properties": members,
    }


_READING_OR_NULL: Schema = {
    "oneOf": [
        {"type": "null"},
        _record(
            value={"type": "number"},
            low={"type": "number"},
            high={"type": "number"},
            error={"type": "number"},
            relative={"type": "boolean"},
            blocks={"type": ["integer", "null"]},
        ),
    ]
}
_RELEASE = _record(
    created={"type": "string"},
    run={"type": "string"},
    model=_TEXT,
    verdict={"type": "string"},
    key={"type": "string"},
    look=_COUNT,
    candidate={"type": "string"},
    baseline=_TEXT,
    version=_TEXT,
    policy={"type": "string"},
    policy_sha256={"type": "string"},
    data={"type": "string"},
    device={"type": "string"},
    recorded=_TEXT,
    serving=_READING_OR_NULL,
    quality=_READING_OR_NULL,
    quality_key={"type": "string"},
    margin=_NUMBER,
    again=_COUNT,
    ways=_COUNT,
)
_FINDING = _record(
    kind={"enum": ["step", "drift"]},
    of={"type": "string"},
    alarm={"type": "boolean"},
    value=_NUMBER,
    low=_NUMBER,
    high=_NUMBER,
    level=_NUMBER,
    margin=_NUMBER,
    releases=_COUNT,
    since=_TEXT,
    candidate={"type": "string"},
    shown={"type": ["boolean", "null"]},
    why=_TEXT,
)
_HISTORY = _record(
    model=_TEXT,
    releases={"type": "array", "items": _RELEASE},
    of=_COUNT,
    findings={"type": "array", "items": _FINDING},
    why=_TEXT,
)
# exit codes of a run that did not come to its end, whatever its verdict
_BROKEN_OFF = [1, 7, 75, 130]
_JUDGED: Schema = {
    "schema": {"const": 2},
    "line": {"type": "string"},
    "verdict": {"enum": ["PASS", "FAIL", "INCONCLUSIVE", "INVALID", "NO_BASELINE"]},
    "exit_code": {"enum": [0, 3, 4, 5, 6]},
    "why": _TEXT,
    "criteria": {"type": "array", "items": _CRITERION},
    "candidate": _SIDE,
    "baseline": {"oneOf": [{"type": "null"}, _SIDE]},
    "policy": {"type": "object", "required": ["name", "sha256", "settings"]},
    "task": {"type": "string"},
    "primary": {"type": "string"},
    "unit": {"enum": ["token", "example"]},
    "data": {"type": "string"},
    "device": {"type": "object", "required": ["kind", "name", "count"]},
    "key": {"type": "string"},
    "look": {"type": "integer", "minimum": 1},
    "looks": {"type": "integer", "minimum": 1},
    "run_id": {"type": "string"},
    "created": {"type": "string"},
    "recorded": {"type": "string"},
    "dtype": {
        "oneOf": [
            {"type": "null"},
            {
                "type": "object",
                "required": ["asked", "served"],
                "properties": {
                    "asked": {"enum": ["auto", "fp32", "bf16", "fp16"]},
                    "served": {"enum": ["fp32", "bf16", "fp16", None]},
                },
            },
        ]
    },
    "promotion": {
        "oneOf": [
            {"type": "null"},
            {
                "type": "object",
                "required": ["done", "model", "version", "url", "why"],
                "properties": {"done": {"type": "boolean"}},
            },
        ]
    },
    "history": {"oneOf": [{"type": "null"}, _HISTORY]},
    "end": {
        "type": "object",
        "required": ["exit_code", "why"],
        "additionalProperties": False,
        "properties": {"exit_code": {"enum": [0, 3, 4, 5, 6, *_BROKEN_OFF]}, "why": _TEXT},
    },
}
_SHOWN: Schema = {
    "type": "object",
    "required": [name for name in _JUDGED if name not in ("recorded", "dtype")],
    "additionalProperties": False,
    "properties": _JUDGED,
}
_CRASHED: Schema = {
    "type": "object",
    "required": ["schema", "line", "verdict", "exit_code", "why", "criteria", "run_id"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": 2},
        "line": {"type": "string"},
        "verdict": {"type": "null"},
        "exit_code": {"enum": _BROKEN_OFF},
        "why": _TEXT,
        "criteria": {"type": "array", "maxItems": 0},
        "run_id": {"type": "string"},
    },
}
VERDICT_SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "verdict.json",
    "oneOf": [
        {
            **_SHOWN,
            "required": [*_SHOWN["required"], "readings", "sha256"],
            "properties": {**_JUDGED, "readings": {"type": "object"}, "sha256": {"type": "string"}},
        },
        _CRASHED,
    ],
    "$defs": {"value": VALUE},
}
"""What a release gate leaves: its verdict, or that it came to none."""

_EXPECTED: Schema = {
    "type": "object",
    "required": ["value", "low", "high"],
    "additionalProperties": False,
    "properties": {name: {"type": "number"} for name in ("value", "low", "high")},
}
_EXPECTED_OR_NULL: Schema = {"oneOf": [{"type": "null"}, _EXPECTED]}
FORECAST_TOTAL: Schema = {
    "type": "object",
    "required": ["expected", "why_missing", "actual"],
    "additionalProperties": False,
    "properties": {
        "expected": _EXPECTED_OR_NULL,
        "why_missing": {"type": ["string", "null"]},
        "actual": _NUMBER,
    },
}
"""A figure of a whole run: what was expected, and what it came to."""
FORECAST_SCHEMA: Schema = {
    "type": "object",
    "required": ["settings", "device", "devices", "parts", "missing", "totals"],
    "additionalProperties": False,
    "properties": {
        "settings": {"type": "string"},
        "device": {"type": "string"},
        "devices": {"type": "integer", "minimum": 1},
        "parts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [
                    "what",
                    "arm",
                    "seed",
                    "like",
                    "flops",
                    "expected_s",
                    "source",
                    "actual_s",
                ],
                "additionalProperties": False,
                "properties": {
                    "what": {"enum": ["work", "assess", "compare", "overhead"]},
                    "arm": {"type": ["string", "null"]},
                    "seed": {"type": ["integer", "null"]},
                    "like": {"type": "object", "additionalProperties": {"type": "string"}},
                    "flops": _NUMBER,
                    "expected_s": _EXPECTED_OR_NULL,
                    "source": {"type": "string"},
                    "actual_s": _NUMBER,
                },
            },
        },
        "missing": {"type": "array", "items": {"type": "string"}},
        "totals": {"type": "object", "additionalProperties": FORECAST_TOTAL},
    },
}
"""What was expected of a run, and what became of it."""

RESULT_SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "result.json",
    "type": "object",
    "required": [
        "schema",
        "run_id",
        "recipe",
        "question",
        "status",
        "why",
        "primary_arm",
        "device",
        "environment",
        "conclusion",
        "run",
        "rows",
        "comparisons",
        "verdict",
    ],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": 2},
        "run_id": {"type": "string"},
        "recipe": {"type": "string"},
        "question": {"type": "string"},
        "status": {"enum": ["FINISHED", "FAILED", "KILLED"]},
        "why": {"type": ["string", "null"]},
        "primary_arm": {"type": "string"},
        "is_release_check": {"type": "boolean"},
        "conclusion": {
            "type": "object",
            "required": ["verdict", "answers"],
            "additionalProperties": False,
            "properties": {
                "verdict": {"type": "string"},
                "answers": {"type": "array", "items": {"type": "string"}},
            },
        },
        "device": {
            "type": "object",
            "required": ["kind", "name", "count"],
            "properties": {
                "kind": {"type": "string"},
                "name": {"type": "string"},
                "count": {"type": "integer"},
            },
        },
        "environment": {
            "type": "object",
            "required": ["command", "python", "platform", "cores", "commit", "notes"],
            "properties": {
                "command": {"type": "string"},
                "python": {"type": "string"},
                "platform": {"type": "string"},
                "cores": {"type": ["integer", "null"]},
                **dict.fromkeys(_LIBRARIES, _TEXT),
                "commit": _TEXT,
                "data": {"type": "string"},
                "data_digest": {"type": "string"},
                "notes": _STRINGS,
            },
        },
        "run": {
            "type": "object",
            "required": ["attempts", "device_hours", "phases_device_ns", "spent", "reused"],
            "additionalProperties": False,
            "properties": {
                "attempts": {"type": "integer", "minimum": 1},
                "device_hours": _values("total", "work", "assess", "retry", "compare", "overhead"),
                "phases_device_ns": {
                    "type": "object",
                    "required": ["overhead", "compare"],
                    "additionalProperties": _PHASES_NS,
                },
                "compare_conditions": _values(*COMPARED),
                "spent": {"$ref": "#/$defs/value"},
                "reused": {"$ref": "#/$defs/value"},
                "allocated": _values("gpu_hours", extra={"grants": _GRANTS}),
                "cost": _values(
                    "amount",
                    extra={
                        "currency": {"type": ["string", "null"]},
                        "basis": {"type": ["string", "null"]},
                        "rate": {
                            "oneOf": [
                                {"type": "null"},
                                {
                                    "type": "object",
                                    "required": ["per_device_hour", "kind", "source", "date"],
                                    "additionalProperties": False,
                                    "properties": {
                                        "per_device_hour": {"type": "number", "minimum": 0},
                                        "kind": {"enum": ["rented", "owned", None]},
                                        "source": _TEXT,
                                        "date": _TEXT,
                                    },
                                },
                            ]
                        },
                    },
                ),
                "per_converged_model": _values(
                    "device_hours",
                    "amount",
                    extra={
                        "currency": {"type": ["string", "null"]},
                        "run": {"type": ["string", "null"]},
                    },
                ),
            },
        },
        "rows": {"type": "array", "items": _ROW},
        "comparisons": {"type": "array", "items": _COMPARISON},
        "verdict": {"oneOf": [{"type": "null"}, _SHOWN]},
        "forecast": FORECAST_SCHEMA,
    },
    "$defs": {"value": VALUE},
}
