"""Records read back, each checked once at the door: whole, of the right shape, with its checksum.
Else it is not there.

A damaged record is said once, by its file, and what it recorded is made or measured again. What
must not be forgotten silently, a verdict, is refused instead (`store/verdicts.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.config.settings.cost import CostConfig
from pipeline.config.text_files import NotAFile, read_bytes
from pipeline.ledger import shapes
from pipeline.ledger.gpu_usage import FIGURES
from pipeline.ledger.json_schema import Schema, why_not
from pipeline.ledger.metrics import PHASES
from pipeline.ledger.schema import FORECAST_SCHEMA, FORECAST_TOTAL, RANK_TIME, RESULT_SCHEMA, VALUE
from pipeline.ledger.shapes import Event
from pipeline.ledger.values import from_schema_1

R = TypeVar("R", bound=Mapping[str, Any])
CHECKSUM = "checksum"  # of a record's other keys
MAX_BYTES = 2**30


class Spec(dict[str, Any], Generic[R]):
    """The schema of a record, and the type of what it lets through."""

    def __init__(self, record: type[R], schema: Schema) -> None:
        super().__init__(schema)
        self.record = record


_DEFS = {"value": VALUE}
_VALUE = {"$ref": "#/$defs/value"}
_NS = {"type": "integer", "minimum": 0}
_TEXT, _TEXT_OR_NULL, _OBJECT = {"type": "string"}, {"type": ["string", "null"]}, {"type": "object"}
_ATTEMPT = {"type": "integer", "minimum": 1}
_PHASES_NS = {
    "type": "object",
    "propertyNames": {"enum": list(PHASES)},
    "additionalProperties": _NS,
}
_VALUES = {"type": "object", "additionalProperties": _VALUE}
ROW: Schema = RESULT_SCHEMA["properties"]["rows"]["items"]
_ARTIFACT: Schema = next(
    each for each in ROW["properties"]["artifact"]["oneOf"] if each["type"] == "object"
)


def _fields(optional: Schema | None = None, **required: Schema) -> dict[str, Any]:
    """Return the schema of an object: its required members and others that may be there, each of a
    kind.
    """
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _list_of(kind: Schema, *, least: int = 0, most: int | None = None) -> Schema:
    limit = {} if most is None else {"maxItems": most}
    return {"type": "array", "items": kind, "minItems": least, **limit}


_HISTORY = _list_of(
    _fields({"beside": _ATTEMPT}, run_id=_TEXT, attempt=_ATTEMPT, step=_NS, phases_ns=_PHASES_NS)
)
_USAGE = _fields(
    dict.fromkeys(FIGURES, _VALUE), throttle_reasons=_list_of(_TEXT), problems=_list_of(_TEXT)
)
_USAGE["required"] += FIGURES
_COUNT_OR_NULL = {"type": ["number", "null"], "minimum": 0}
# more than all that were ever sold
_HOURS_OR_NULL = {"type": ["number", "null"], "minimum": 0, "maximum": 1e9}
RUN = Spec(
    shapes.RunState,
    _fields(
        {
            "pid": {"type": ["integer", "null"]},
            "spent_device_hours": _HOURS_OR_NULL,
            "jobs": _list_of(_TEXT),  # of a scheduler, that the run's attempts were in
        },
        key=_TEXT,
        status={"enum": ["RUNNING", "FINISHED", "FAILED", "KILLED"]},
        attempt=_ATTEMPT,
    ),
)
"""run.json: which run of its key this is, and how far it came."""
FORECAST = Spec(shapes.ForecastRecord, {**FORECAST_SCHEMA, "additionalProperties": True})
"""forecast.json: what was expected of a run, and what became of it."""
PROBE = Spec(
    shapes.ProbeRecord,
    _fields(
        step_s={"type": "number", "minimum": 0},
        eval_s={"type": "number", "minimum": 0},
        around_s={"type": "number", "minimum": 0},
        peak_bytes={"type": ["integer", "null"], "minimum": 0},
    ),
)
"""probes/KEY.json: what the first steps of a stage took."""
ANY_ARTIFACT = Spec(
    shapes.KnownArtifact, _fields({"artifact": {"oneOf": [{"type": "null"}, _ARTIFACT]}})
)
MADE = Spec(
    shapes.Made,
    _fields(
        {"usage": _USAGE, "disturbance": _VALUES, "ranks": _list_of(RANK_TIME), "beside": _ATTEMPT},
        artifact=_ARTIFACT,
        run_id=_TEXT,
        attempt=_ATTEMPT,
        seed={"type": "integer"},
        work_ns=_NS,
        phases_ns=_PHASES_NS,
        output=_fields(
            {"flops_by_rule": _COUNT_OR_NULL},
            counts=_VALUES,
            curve=_list_of(
                {"type": "object", "additionalProperties": {"type": ["number", "null"]}}
            ),
            flops_per_step=_COUNT_OR_NULL,
            seconds_in_steps=_COUNT_OR_NULL,
            existing={"type": "boolean"},
            gpu_timeline=_OBJECT,
            about=_OBJECT,
        ),
        memory=_VALUES,
        earlier=_list_of(ROW),
    ),
)
"""keys/KEY.json: what a stage made, and what that took."""
ASSESSED = Spec(
    shapes.Assessed,
    _fields(
        {
            "vllm": _fields(
                {
                    "why": _TEXT,
                    "version": _TEXT,
                    "vllm": {"type": "number"},
                    "here": {"type": "number"},
                    "tolerance": {"type": "number"},
                    "agrees": {"type": "boolean"},
                    "documents": _NS,
                    "tokens": _NS,
                },
                outcome={"enum": ["ran", "failed", "not run here"]},
            )
        },
        run_id=_TEXT,
        items=_TEXT,
        sha256=_TEXT,
        rows=_list_of(ROW, least=1),
    ),
)
"""assessments/KEY.json: how good an artifact is."""
_SECONDS = _list_of(_list_of({"type": "number", "minimum": 0}, least=2, most=2), least=1)
_OF_PAIRS = _list_of({"type": "array", "minItems": 3, "maxItems": 3})
_SERVED_PASS = _fields(
    {
        "conditions": _VALUES,
        "why_no_joules": _TEXT_OR_NULL,
        "dtype": _OBJECT,
        "orders": _OF_PAIRS,
        "places": _OF_PAIRS,
        "order_seed": {"type": ["integer", "null"]},
        "warm_up": _OBJECT,
        "decode": _OBJECT,
        "draft": {"type": ["object", "null"]},
        "joules": {"oneOf": [{"type": "null"}, _list_of(_SECONDS, least=2, most=2)]},
    },
    serving={"type": "object", "additionalProperties": _VALUES},
    seconds=_list_of({"type": "array", "minItems": 4, "maxItems": 4}),
    how=_OBJECT,
)
SERVED = Spec(
    shapes.Served, _fields({"devices": _ATTEMPT}, run_id=_TEXT, elapsed_ns=_NS, served=_SERVED_PASS)
)
"""serving/KEY.json: a comparison pass."""
_HOURS = {"type": "number", "minimum": 0}
_SPEND = _fields(
    arm=_TEXT,
    depends_on=_list_of(_TEXT),
    work_h=_HOURS,
    retry_h=_HOURS,
    flops=_COUNT_OR_NULL,
    existing={"type": "boolean"},
    unknown=_TEXT,
    registered=_TEXT_OR_NULL,
    foreign_load={"oneOf": [{"type": "null"}, _VALUE]},
)
_READING = _fields(
    tokens=_NS,
    metric={"type": ["number", "null"]},
    device_hours=_HOURS,
    is_constant={"type": "boolean"},
)
_TRAINED = _fields(arm=_TEXT, final={"type": ["number", "null"]}, curve=_list_of(_READING))
BASIS = Spec(
    shapes.ComparisonBasis,
    _fields(
        seeds=_list_of(
            _fields(seed={"type": "integer"}, spends=_list_of(_SPEND), trained=_list_of(_TRAINED))
        ),
        teachers=_list_of(_TEXT),
        tolerance=_fields(most=_COUNT_OR_NULL, what=_TEXT, is_shared={"type": "boolean"}),
        served={"oneOf": [{"type": "null"}, _SERVED_PASS]},
        served_elsewhere_h=_HOURS,
    ),
)
"""evidence/compared.json: what comparisons rest on, beside per-document values."""
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
RECEIPT_VERSION = 1
RECEIPT = Spec(
    shapes.Receipt,
    {
        **_fields(
            schema={"const": RECEIPT_VERSION},
            run_id=_TEXT,
            recipe=_TEXT,
            question=_TEXT,
            created=_TEXT,
            release=_TEXT,
            commit=_TEXT_OR_NULL,
            task=_TEXT,
            primary_arm=_TEXT,
            seeds=_list_of({"type": "integer"}, least=1),
            device=_fields(kind=_TEXT, name=_TEXT, count=_ATTEMPT),
            data=_fields(
                name=_TEXT, digest=_TEXT, splits={"type": "object", "additionalProperties": _NS}
            ),
            digests=_fields(
                journal=_fields(bytes=_NS, sha256=_SHA256),
                result=_SHA256,
                settings=_SHA256,
                schema=_SHA256,
                evidence={"type": "object", "additionalProperties": _SHA256},
            ),
            artifacts=_list_of(
                _fields(
                    arm=_TEXT,
                    seed={"type": "integer"},
                    kind=_TEXT,
                    digest={"type": "string", "pattern": "^[0-9a-f]{32}$"},
                    bytes=_NS,
                )
            ),
            figures={"type": "object", "additionalProperties": _OBJECT},
            left_out={"type": "object", "additionalProperties": _TEXT},
        ),
        "additionalProperties": False,
    },
)
"""receipt.json: what was measured, and what proves it."""
MANIFEST = Spec(
    shapes.ArtifactFacts,
    _fields(kind={"type": "string", "pattern": "^[a-z_]{1,40}$"}, digest=_TEXT),
)
"""artifact.json, which is in no digest."""
REGISTERED = Spec(
    shapes.Registered,
    _fields(
        run_id=_TEXT,
        device=_fields(name=_TEXT),
        work_device_hours=_HOURS_OR_NULL,
        retry_device_hours=_HOURS_OR_NULL,
        model_flops=_COUNT_OR_NULL,
    ),
)
"""`ledger` of an artifact.json: what a registered model cost."""
CHOICE = Spec(
    shapes.PrecisionChoice,
    _fields(
        {"loss_tolerance": {"type": "number"}, "not_tried": _list_of(_TEXT)},
        chosen=_TEXT,
        said=_list_of(_TEXT),
        trials=_list_of(_OBJECT),
    ),
)
"""What an earlier attempt at a stage chose for its precision."""
HEAD = Spec(
    shapes.HeadChoice,
    _fields(kernel=_TEXT, rows={"type": ["integer", "null"]}, said={"type": ["string", "null"]}),
)
"""What an earlier attempt at a stage chose for its head."""
SHARD = Spec(
    shapes.Shard,
    _fields(
        sha256=_TEXT,
        windows=_NS,
        tokens=_NS,
        read=_NS,
        bytes=_NS,
        flops={"type": ["number", "null"], "minimum": 0},
        capture_ns=_NS,
        step=_NS,
        history=_HISTORY,
    ),
)
"""Beside each shard of a capture."""
CHECKPOINT = Spec(
    shapes.CheckpointManifest,
    _fields({"format": _NS}, step=_NS, sha256={"type": "object", "additionalProperties": _TEXT}),
)
"""manifest.json of a checkpoint."""
PROGRESS = Spec(shapes.Progress, _fields({"history": _HISTORY}))
"""extra.json of a checkpoint, for which its manifest vouches."""
_MOMENT = _fields(e=_TEXT, t={"type": "number"})
DELIVERED = Spec(
    shapes.Delivered,
    _fields(
        {
            "dead": {"type": "boolean"},
            "parent": _TEXT_OR_NULL,
            "ended": {"type": "boolean"},
            "children": {"type": "object", "additionalProperties": _TEXT},
            "arms": {"type": "object", "additionalProperties": {"type": "object"}},
            "spans": _list_of(_list_of({"type": "integer"}, least=3, most=3)),
            "noted": {"type": ["number", "null"]},
            "experiment": _TEXT_OR_NULL,
        },
        offset=_NS,
        last={"oneOf": [{"type": "null"}, _MOMENT]},
    ),
)
"""mlflow.json of a run: how far it was delivered."""
_RANK = {"type": ["integer", "null"], "minimum": 0}
LIFE = Spec(
    shapes.LifeRecord,
    _fields(
        host=_TEXT,
        rank=_RANK,
        local_rank=_RANK,
        world_size={"type": ["integer", "null"], "minimum": 1},
        device=_TEXT_OR_NULL,
        device_name=_TEXT_OR_NULL,
        start_ns=_NS,
        end_ns=_NS,
        phases_ns={"type": "object", "additionalProperties": _NS},
        counts={"type": "object", "additionalProperties": {"type": "number"}},
        ended={"type": "boolean"},
    ),
)
"""What a rank of a metered command left."""
_MADE_BY: dict[str, Schema] = {
    "arm": _TEXT,
    "status": _TEXT,
    "artifact": {"oneOf": [{"type": "null"}, _ARTIFACT]},
}
ENDED = Spec(
    shapes.EndedResult,
    _fields(
        {"why": _TEXT_OR_NULL, "primary_arm": _TEXT_OR_NULL},
        status={"enum": ["FINISHED", "FAILED", "KILLED"]},
        rows=_list_of(_fields(**_MADE_BY)),
    ),
)
"""result.json, as far as a reference to a run reads it: what it made, and how it ended."""
CHARGED = Spec(
    shapes.ChargedResult,
    _fields(
        {"why": _TEXT_OR_NULL},
        run_id=_TEXT,
        status={"enum": ["FINISHED", "FAILED", "KILLED"]},
        primary_arm=_TEXT_OR_NULL,
        device=_fields(kind=_TEXT, name=_TEXT),
        rows=_list_of(
            _fields(
                **_MADE_BY,
                type=_TEXT,
                seed={"type": "integer"},
                depends_on=_list_of(_TEXT),
                ledger=_fields(
                    device_hours=_fields(work=_VALUE, retry=_VALUE),
                    energy_j=_VALUE,
                    counts=_fields(tokens=_VALUE, model_flops=_VALUE),
                ),
            )
        ),
    ),
)
"""result.json, as far as a registration reads it: what a run spent, too."""

_OF_ARM = {"arm": _TEXT_OR_NULL, "seed": {"type": "integer"}}
_WINDOW = _fields(
    {"beside": _ATTEMPT},
    kind={"enum": ["work", "assess", "compare"]},
    **_OF_ARM,
    attempt=_ATTEMPT,
    start_ns=_NS,
    end_ns=_NS,
    kept_ns=_NS,
)
_CLOCK = {"clock_ns": _PHASES_NS}
_STARTED = {
    "run_id": _TEXT,
    "recipe": _TEXT,
    "params": _OBJECT,
    "tags": _OBJECT,
    "environment": _OBJECT,
}
STARTED = Spec(shapes.RunStarted, _fields(**_STARTED))
"""The first line of a run's journal, as far as other runs read it."""
_GRANT = _fields(scheduler=_TEXT, job_id=_TEXT, gpus={"type": ["integer", "null"], "minimum": 0})
EVENTS: dict[str, Spec[Any]] = {
    "run_start": Spec(
        shapes.Started,
        _fields(
            {
                **_CLOCK,
                **_STARTED,
                "devices": _ATTEMPT,
                "started_ns": _NS,
                "grant": {"oneOf": [{"type": "null"}, _GRANT]},
            },
            attempt=_ATTEMPT,
        ),
    ),
    "stage_start": Spec(
        shapes.StageStarted,
        _fields(
            arm=_TEXT,
            stage=_TEXT,
            type=_TEXT,
            seed={"type": "integer"},
            attempt=_ATTEMPT,
            params=_OBJECT,
            depends_on=_list_of(_TEXT),
        ),
    ),
    "open": Spec(
        shapes.Opened,
        _fields(
            _CLOCK,
            kind={"enum": ["work", "assess", "compare"]},
            **_OF_ARM,
            attempt=_ATTEMPT,
            start_ns=_NS,
        ),
    ),
    "beside": Spec(
        shapes.BesideLine,
        _fields(
            attempt=_ATTEMPT,
            start_ns=_NS,
            ranks=_ATTEMPT,
            arms=_list_of(_fields(arm=_TEXT, seed={"type": "integer"}), least=1),
            clock_ns=_PHASES_NS,
        ),
    ),
    "window": Spec(shapes.Closed, _fields(_CLOCK, **_OF_ARM, window=_WINDOW, phases_ns=_PHASES_NS)),
    "row": Spec(shapes.RowLine, _fields(row=ROW)),
    "points": Spec(shapes.Points, _fields(**_OF_ARM, attempt=_ATTEMPT, step=_NS, values=_OBJECT)),
    "checkpoint": Spec(
        shapes.Checkpointed, _fields(**_OF_ARM, attempt=_ATTEMPT, step=_NS, phases_ns=_PHASES_NS)
    ),
    "resume": Spec(
        shapes.Resumed, _fields(**_OF_ARM, attempt=_ATTEMPT, step=_NS, history=_HISTORY)
    ),
    "booked": Spec(
        shapes.Booked,
        _fields(attempt=_ATTEMPT, end_ns=_NS, clock_ns=_PHASES_NS, release=_TEXT, schema=_SHA256),
    ),
    "run_end": Spec(
        shapes.Ended,
        _fields(
            {"forecast": FORECAST_TOTAL},
            status=_TEXT,
            why=_TEXT_OR_NULL,
            primary_arm=_TEXT_OR_NULL,
            run=_fields(
                {"phases_device_ns": _fields(overhead=_PHASES_NS, compare=_PHASES_NS)},
                device_hours=_VALUES,
            ),
        ),
    ),
    "devices": Spec(
        shapes.DevicesSeen,
        _fields(used=_fields(kind=_TEXT, name=_TEXT, ids=_list_of(_TEXT, least=1))),
    ),
    "started": Spec(shapes.ProcessStarted, _fields(pid={"type": "integer", "minimum": 1})),
}
"""journal.jsonl, a line each: what is read back of it. Lines of other kinds are read by MLflow's
writer alone.
"""
METERED = Spec(
    shapes.Metered,
    _fields(
        {"grant": {"oneOf": [{"type": "null"}, _GRANT]}},
        run_id=_TEXT,
        started_ns=_NS,
        name=_TEXT,
        node=_TEXT,
        identity=_OBJECT,
        params=_fields(command=_TEXT),
        cost={
            "type": "object",
            "propertyNames": {"enum": [each.name for each in fields(CostConfig)]},
        },
    ),
)
"""The first line of a metered command's journal, beside what every run's says."""
_EVENT: Schema = _fields(e=_TEXT, t={"type": "number"}, mono_ns=_NS)
_reported: set[str] = set()


def tell(path: Path, why: str, so: str = "is ignored") -> None:
    """Say, once a process, that a record is damaged and what comes of it."""
    line = f"note: {path} is damaged ({why}) and {so}"
    if line not in _reported:
        _reported.add(line)
        print(line, flush=True)


def why_damaged(record: Any, spec: Schema) -> str | None:
    """Return what is wrong with a record that parsed, or None; its checksum is looked at where it
    has one.
    """
    if not isinstance(record, dict):
        return "it is no object"
    # Records of older releases have none.
    if CHECKSUM in record and record[CHECKSUM] != checksum(record):
        return "it does not have its checksum"
    # The checksum is of the record as written, so it is compared before figures change their form.
    return why_not(from_schema_1(record), spec, _DEFS)


def checksum(record: Mapping[str, Any]) -> str:
    """Return the checksum of a record's other keys, 32 hex characters."""
    others = {name: value for name, value in record.items() if name != CHECKSUM}
    return sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:32]


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with its checksum."""
    return {**record, CHECKSUM: checksum(record)}


def read_record(path: Path, spec: Spec[R], *, so: str = "is ignored") -> R | None:
    """Return a record without its checksum; None where there is none, or it is damaged, which is
    said once.

    Args:
        so: Ends the note on a damaged one: what comes of it.
    """
    record, why = parsed(path)
    if why is None and record is None:
        return None
    why = why or why_damaged(record, spec)
    if why is not None:
        tell(path, why, so)
        return None
    return from_schema_1({name: value for name, value in record.items() if name != CHECKSUM})


def parsed(path: Path, *, any_number: bool = False) -> tuple[Any, str | None]:
    """Return the JSON in a file, and why it cannot be read; None twice where there is no file.

    Args:
        any_number: Let NaN and infinities through, for who refuses them by their name.
    """
    constant = float if any_number else _no_number
    try:
        return json.loads(read_bytes(path, limit=MAX_BYTES), parse_constant=constant), None
    except FileNotFoundError:
        return None, None
    except NotAFile as error:
        return None, f"it {error}"
    except OSError as error:
        return None, f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return None, "it is no JSON"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def sound_events(events: list[Event], path: Path) -> list[Event]:
    """Return the lines of a journal that say what lines of their kind say; others are as if absent,
    and said.
    """
    found: list[Event] = []
    for event in events:
        # First what every line has, then what its own kind has.
        why = why_not(event, _EVENT) or why_not(event, EVENTS.get(str(event["e"]), _EVENT), _DEFS)
        if why is None:
            found.append(event)
        else:
            tell(path, f"a line {str(event.get('e'))[:40]!r}: {why}", "that line is ignored")
    return found
