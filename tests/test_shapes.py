"""The typed records and the JSON Schemas say the same: neither can change alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from types import UnionType
from typing import Any, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints

import pytest

from pipeline.compare import history
from pipeline.config.settings.cost import CostConfig
from pipeline.ledger import records, shapes
from pipeline.ledger.placement import Grant
from pipeline.ledger.records import EVENTS, Spec
from pipeline.ledger.schema import RESULT_SCHEMA, VALUE, VERDICT_SCHEMA

LINE = {"e", "t", "mono_ns"}  # what `sound_events` checks of every line
# asked of a line where it is read (`STARTED`), so that a damaged one is passed over and not dropped
LATER = {"run_id", "recipe", "params", "tags", "environment", "started_ns"}
SPECS = {name: each for name, each in vars(records).items() if isinstance(each, Spec)}


def schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its references followed, its parts joined and null left out."""
    if "$ref" in schema:
        assert schema["$ref"] == "#/$defs/value"
        return VALUE
    if "allOf" in schema:
        parts = [schema_of(part) for part in schema["allOf"]]
        return {
            "required": [name for part in parts for name in part.get("required", ())],
            "properties": {k: v for part in parts for k, v in part.get("properties", {}).items()},
        }
    if "oneOf" in schema and "properties" not in schema:
        own = [part for part in schema["oneOf"] if part.get("type") != "null"]
        return schema_of(own[0]) if len(own) == 1 else schema
    return schema


def bare(hint: Any) -> Any:
    """Return a type without `NotRequired`, and without None."""
    if get_origin(hint) is NotRequired:
        return bare(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        own = [each for each in get_args(hint) if each is not type(None)]
        return bare(own[0]) if len(own) == 1 else hint
    return hint


def is_record(hint: Any) -> bool:
    return isinstance(hint, type) and hasattr(hint, "__total__")


def differences(record: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    """Yield where a typed record and a schema say different things, at any depth."""
    record, schema = bare(record), schema_of(schema)
    if get_origin(record) is list and "items" in schema:
        yield from differences(get_args(record)[0], schema["items"], f"{where}[]")
    if get_origin(record) is dict:
        each = get_args(record)[1]
        if isinstance(schema.get("additionalProperties"), dict):
            yield from differences(each, schema["additionalProperties"], f"{where}.*")
        for name, member in schema.get("properties", {}).items():
            yield from differences(each, member, f"{where}.{name}")
    if not is_record(record) or not {"properties", "required"} & schema.keys():
        return
    hints = get_type_hints(record, include_extras=True)
    known = {*schema.get("properties", {}), *schema.get("required", ())}
    needed = {
        name
        for name, hint in hints.items()
        if get_origin(hint) is not NotRequired and name in record.__required_keys__
    }
    yield from (f"{where}.{name}: in one alone" for name in hints.keys() ^ known)
    yield from (
        f"{where}.{name}: optional in one alone"
        for name in needed ^ set(schema.get("required", ()))
    )
    for name in hints.keys() & schema.get("properties", {}).keys():
        yield from differences(hints[name], schema["properties"][name], f"{where}.{name}")


@pytest.mark.parametrize("name", SPECS)
def test_a_record_of_the_store_is_typed_as_its_schema_has_it(name: str) -> None:
    assert sorted(differences(SPECS[name].record, SPECS[name], name)) == []


@pytest.mark.parametrize("name", EVENTS)
def test_a_line_of_a_journal_is_typed_as_its_schema_has_it(name: str) -> None:
    spec = EVENTS[name]
    asked = {*spec["required"], *LINE, *(LATER if name == "run_start" else ())}
    whole = {
        **spec,
        "required": sorted(asked),
        "properties": {**{key: {} for key in LINE}, **spec["properties"]},
    }
    found = set(differences(spec.record, whole, name))
    # of a run's totals other runs read the hours alone
    assert {each for each in found if not each.startswith("run_end.run.")} == set()


@pytest.mark.parametrize(
    ("record", "schema"),
    [
        (shapes.Result, RESULT_SCHEMA),
        (shapes.VerdictFile, VERDICT_SCHEMA["oneOf"][0]),
        (shapes.NoVerdict, VERDICT_SCHEMA["oneOf"][1]),
    ],
)
def test_what_a_run_leaves_is_typed_as_its_schema_has_it(record: Any, schema: Any) -> None:
    found = set(differences(record, schema, record.__name__))
    # a pair's members are all written today; of results of older releases the schema asks less
    lenient = re.compile(r"Result\.comparisons\[\]\.\w+(\.\*)?\.\w+: optional in one alone")
    assert {each for each in found if not lenient.fullmatch(each)} == set()


@pytest.mark.parametrize(
    ("record", "made"),
    [
        (shapes.ReleaseRecord, history.Judged),
        (shapes.ReleaseReading, history.Figure),
        (shapes.FindingRecord, history.Finding),
        (shapes.GrantRecord, Grant),
        (shapes.CostRecord, CostConfig),
    ],
)
def test_what_is_written_as_a_dataclass_has_its_fields(record: Any, made: Any) -> None:
    assert list(get_type_hints(record)) == [each.name for each in fields(made)]


class Part(TypedDict):
    a: int
    b: NotRequired[str | None]


class Loose(TypedDict, total=False):
    a: int


class Whole(TypedDict):
    parts: list[Part]
    by_name: NotRequired[dict[str, Part] | None]


def of_parts(part: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of `Whole` whose parts are `part`."""
    by_name = {"oneOf": [{"type": "null"}, {"additionalProperties": part}]}
    return {"required": ["parts"], "properties": {"parts": {"items": part}, "by_name": by_name}}


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"required": ["a"], "properties": {"a": {}, "b": {}}}, set()),
        ({"required": ["a"], "properties": {"a": {}}}, {"b: in one alone"}),
        ({"required": ["a"], "properties": {"a": {}, "b": {}, "c": {}}}, {"c: in one alone"}),
        ({"required": [], "properties": {"a": {}, "b": {}}}, {"a: optional in one alone"}),
        ({"required": ["a", "b"], "properties": {"a": {}, "b": {}}}, {"b: optional in one alone"}),
    ],
)
def test_differences_are_found_at_any_depth(part: dict[str, Any], found: set[str]) -> None:
    places = ("x.parts[].", "x.by_name.*.")
    assert set(differences(Whole, of_parts(part), "x")) == {
        p + each for p in places for each in found
    }


def test_what_may_all_be_left_out_is_required_nowhere() -> None:
    schema = {"type": "object", "properties": {"a": {}}}
    assert list(differences(Loose, schema, "x")) == []
    found = list(differences(Loose, {**schema, "required": ["a"]}, "x"))
    assert found == ["x.a: optional in one alone"]
