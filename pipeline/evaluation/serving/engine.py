"""Results of a serving engine, from files of `vllm bench`: declared by whoever ran it, never mixed
with what is measured here.

Read are `vllm bench serve --save-result`, `vllm bench throughput --output-json` and `vllm bench
latency --output-json`; figures that a file lacks are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.settings.ranges import MAX_WHOLE
from pipeline.config.settings.run import Run
from pipeline.config.text_files import read_text_file
from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many
from pipeline.ledger.values import Value, declared

KEY = "serving.results"
_MS = 1e-3
FIGURES: dict[str, tuple[tuple[str, float], ...]] = {
    "engine_output_tokens_per_s": (("output_throughput", 1),),
    "engine_tokens_per_s": (("total_token_throughput", 1), ("tokens_per_second", 1)),
    "engine_requests_per_s": (("request_throughput", 1), ("requests_per_second", 1)),
    "engine_ttft_p50_s": (("median_ttft_ms", _MS), ("p50_ttft_ms", _MS)),
    "engine_ttft_p95_s": (("p95_ttft_ms", _MS),),
    "engine_ttft_p99_s": (("p99_ttft_ms", _MS),),
    "engine_tpot_p50_s": (("median_tpot_ms", _MS), ("p50_tpot_ms", _MS)),
    "engine_tpot_p95_s": (("p95_tpot_ms", _MS),),
    "engine_tpot_p99_s": (("p99_tpot_ms", _MS),),
    "engine_batch_p50_s": (("percentiles.50", 1),),
    "engine_batch_p99_s": (("percentiles.99", 1),),
}
"""By figure, where files hold it and the factor to its unit."""
LOAD: dict[str, tuple[tuple[str, float], ...]] = {
    "engine_requests": (("completed", 1), ("num_requests", 1)),
    "engine_tokens_in": (("total_input_tokens", 1),),
    "engine_tokens_out": (("total_output_tokens", 1),),
    "engine_max_concurrency": (("max_concurrency", 1),),
    # the text "inf" where all were sent at once: left out
    "engine_request_rate": (("request_rate", 1),),
}
"""The load that they were read at."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What one file says of one arm.

    Attributes:
        figures: By key of the catalogue's section `serving`, declared.
        source: The file, with the model and the date it names.
    """

    figures: dict[str, Value]
    source: str


def read_results(run: Run) -> dict[str, EngineResult]:
    """Return the results that `serving.results` names, by arm.

    Raises:
        UserError: If an arm or a file is unknown, or a file is no result of `vllm bench`.
    """
    given = run.serving.results
    if given is None:
        return {}
    by_arm = given if isinstance(given, Mapping) else {run.primary_arm: given}
    known = ["base", *run.stages]
    found: dict[str, EngineResult] = {}
    for arm, path in by_arm.items():
        key = f"{KEY}.{arm}" if isinstance(given, Mapping) else KEY
        if arm not in known:
            raise UserError(
                KEY, f"{arm!r} is no arm of this recipe", f"give files by arm: {', '.join(known)}"
            )
        if not isinstance(path, str):
            raise UserError(key, f"{path!r} is no file", "give the path of a JSON file")
        found[arm] = read_result(Path(path).expanduser(), key)
    return found


def read_result(path: Path, key: str) -> EngineResult:
    """Return what a file of `vllm bench` says.

    Raises:
        UserError: If it cannot be read, or is no such file.
    """
    remedy = "give a file that `vllm bench serve --save-result` wrote"
    text = read_text_file(path, key, remedy)
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        several = error.msg == "Extra data"
        what = "holds several results" if several else f"is no JSON ({error.msg})"
        raise UserError(
            key, f"{path} {what}", "give one with a single result" if several else remedy
        ) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        raise UserError(key, f"{path} is no JSON ({error})", remedy) from None
    figures = _figures(raw, FIGURES) if isinstance(raw, dict) else {}
    if not figures:
        raise UserError(key, f"{path} holds no result of `vllm bench`", remedy)
    if raw.get("completed") == 0:
        raise UserError(key, f"{path}: no request was completed", "run the benchmark again")
    figures |= _figures(raw, LOAD)
    below = next(
        (name for name, value in figures.items() if value.value is not None and value.value < 0),
        None,
    )
    if below is not None:
        raise UserError(
            key, f"{path}: {below.removeprefix('engine_')} is negative", "run the benchmark again"
        )
    words = [str(path), *(f"{name} {raw[name]}" for name in ("model_id", "date") if raw.get(name))]
    failed = _number(raw, "failed")
    words += [f"{how_many(failed, 'request')} failed"] if failed else []
    return EngineResult(figures, ", ".join(words))


def _figures(
    raw: Mapping[str, Any], where: Mapping[str, tuple[tuple[str, float], ...]]
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, places in where.items():
        numbers = [(_number(raw, place), factor) for place, factor in places]
        # The first name that the file has: serve, throughput and latency name them differently.
        known = next(((number, factor) for number, factor in numbers if number is not None), None)
        if known is not None:
            found[name] = declared(known[0] * known[1])
    return found


def _number(raw: Mapping[str, Any], place: str) -> float | int | None:
    value: Any = raw
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= MAX_WHOLE else None  # nan is not, either
