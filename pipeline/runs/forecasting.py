"""The forecast of a run: what its stages, their assessments, the comparison pass and everything
around them will take; and what became of it once the run is over.

Each part is known from the parts of earlier runs that are most like it (`forecast/past.py`). A
training that nothing is like is priced by its FLOPs and by how fast this device multiplies. What is
done already costs nothing; what nothing is known of is named, and left out of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.compare.statistics import Interval
from pipeline.config.arms import BASE, stage_name
from pipeline.config.settings.run import Measure
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.documents import Document
from pipeline.forecast.memory import Spread, training_memory
from pipeline.forecast.past import FILE, Foreseen, Past, settings_key
from pipeline.forecast.rates import added, expected, scaled
from pipeline.forecast.sizes import size_of
from pipeline.forecast.speed import device_rate
from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.peaks import device_name
from pipeline.ledger.records import ASSESSED, FORECAST, PROBE, read_record, sealed
from pipeline.ledger.shapes import (
    Assessed,
    Expected,
    ForecastPart,
    ForecastRecord,
    ForecastTotal,
    HoursPart,
    Made,
    Result,
    Row,
)
from pipeline.runs.assessor import Assessor
from pipeline.runs.base_model import base_artifact
from pipeline.runs.book import Arm, Book
from pipeline.runs.fitting import planned_spread
from pipeline.runs.keys import evaluation_settings, made_on, stage_key
from pipeline.runs.probe import probe, seconds
from pipeline.runs.rows import hours_in
from pipeline.runs.runner import StageRunner
from pipeline.runs.running import Running
from pipeline.stages.base import BeforeRun, Stage, Workload, config_of
from pipeline.stages.context import Output
from pipeline.store.artifacts import MODEL, Artifact, key_of, plain, write_json
from pipeline.training.schedule import first_row, sequence_length, steps_between_evaluations

BYTES_A_TOKEN = 4.0  # of text, roughly, whatever the tokenizer: it is the same in every forecast
SAMPLED_STEPS = 64  # of a training whose batches grow
CACHED_TOKEN_BYTES = 72  # of a teacher cache
# share of what the device multiplies by itself that a training of small models reaches, and the
# spread of its logarithm: from a tenth to all of it
EFFICIENCY, ANY_MODEL = 0.3, 0.8
OF_A_PROBE = 0.12  # spread of the logarithm of what a stage takes, by its first steps
OF_HOST_MEMORY = 0.1  # spread of the logarithm of what a process holds, from run to run
LONG_S = 1800.0  # from here on a probe is below 1% of what it tells of
PROBED_MOST = 1.1  # of what the first steps held: gaps between tensors come with time
AROUND_STEPS_S = 2.0  # loading and saving, where nothing was measured
NO_TOTAL = "no part of it is known here yet"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take, and how that is known."""

    record: ForecastRecord
    past: Past

    def hours(self) -> Expected | None:
        """Return the device-hours."""
        return self.record["totals"]["device_hours"]["expected"]


def foresee(running: Running, known: BeforeRun | None, *, probes: bool | None = None) -> Forecast:
    """Return the forecast of a run that has not begun.

    Args:
        known: Of the model that is given; None in a release check.
        probes: Whether a few steps are taken of every training that was never seen here with these
            settings; None: of those alone that seem to take so long that the probe is nothing
            beside them.
    """
    past = Past.read(_root(running), but=running.session.run_id)
    return _Forecaster(running, known, past, probes).all()


def _root(running: Running) -> Any:
    return running.session.store.root.parent


@dataclass(slots=True)
class _Forecaster:
    """What the forecast of one run needs to know."""

    running: Running
    known: BeforeRun | None
    past: Past
    probes: bool | None

    def all(self) -> Forecast:
        """Return the forecast."""
        session, done = self.running.session, _Done.of(self.running)
        parts: list[ForecastPart] = []
        for seed in session.seeds:
            for name, stage in session.stages.items():
                if not done.work(name, seed):
                    parts.append(self._work(name, stage, seed))
                if stage.makes == MODEL and not done.assessment(name, seed):
                    parts.append(self._assessment(name, stage, seed))
        if any({Measure.serving, Measure.payback} & set(pair.on) for pair in session.run.compare):
            parts.append(self._of_run("compare"))
        parts.append(self._of_run("overhead"))
        foreseen = [(part, self._seconds(part)) for part in parts]
        for part, found in foreseen:
            part["expected_s"] = None if found is None else _span(found.seconds)
            part["source"] = "nothing like it was done here" if found is None else found.source
        record: ForecastRecord = {
            "settings": settings_key(session.run),
            "device": device_name(session.device),
            "devices": session.devices,
            "parts": parts,
            "missing": [_name(part) for part, found in foreseen if found is None],
            "totals": {
                "device_hours": self._hours([each for _, each in foreseen if each is not None]),
                "memory_bytes": _attempted(lambda: self._memory(parts)),
                "host_bytes": self._host(),
                "disk_bytes": _attempted(lambda: self._disk(done)),
                "energy_j": _attempted(lambda: self._energy(foreseen)),
            },
        }
        return Forecast(record, self.past)

    # -- parts ------------------------------------------------------------------------------------

    def _work(self, name: str, stage: Stage, seed: int) -> ForecastPart:
        run = self.running.session.run
        work = self._workload(name, stage)
        flops = attempted(lambda: self._flops(name, stage), lambda _: None)
        like = {
            "settings": self._like("work", stage.type, stage.shown_settings(run), self._given())
        }
        if work is not None:
            of = (stage.type, work.precision, work.trains)
            like["model"] = self._like("work", *of, _text(work.config), _text_of_teacher(work))
            like["kind"] = self._like("work", work.precision, work.trains)
        return _part("work", name, seed, like, flops)

    def _assessment(self, name: str, stage: Stage, seed: int) -> ForecastPart:
        session = self.running.session
        config = attempted(lambda: self._made_config(name), lambda _: None)
        form = stage.stored_format()
        how = (evaluation_settings(session), None if form is None else form.value)
        like = {"settings": self._like("assess", stage.type, *how, _text(config), self._given())}
        flops = None
        if config is not None:
            like["model"] = self._like("assess", how[1], _text(config))
            like["kind"] = self._like("assess", how[1])
            flops = attempted(lambda: self._scoring_flops(config), lambda _: None)
        return _part("assess", name, seed, like, flops)

    def _of_run(self, what: str) -> ForecastPart:
        run = self.running.session.run
        settings = {
            "stages": {name: stage.type for name, stage in self.running.session.stages.items()},
            "seeds": len(self.running.session.seeds),
            **(
                {"serving": plain(run.serving), "compare": plain(run.compare)}
                if what == "compare"
                else {}
            ),
        }
        like = {"settings": self._like(what, settings, self._given())}
        like["kind"] = self._like(what, run.recipe)
        # how long it takes follows no size that is known: one run of a recipe is like another
        return _part(what, None, None, like, 1.0)

    def _seconds(self, part: ForecastPart) -> Foreseen | None:
        """Return what a part is expected to take: as it did before, as its first steps do, as what
        is like it did, or by its FLOPs.
        """
        found = self.past.foresee(part, "settings") or self._probed(part)
        if found is None:
            rough = self.past.foresee(part, "model", "kind") or self._by_flops(part)
            is_long = rough is not None and rough.seconds.estimate > LONG_S
            takes_steps = is_long if self.probes is None else self.probes
            found = (self._probed(part, now=True) if takes_steps else None) or rough
        return found

    def _by_flops(self, part: ForecastPart) -> Foreseen | None:
        if part["flops"] is None or part["what"] not in ("work", "assess"):
            return None
        rate = attempted(lambda: device_rate(self.running.session.device), lambda _: None)
        if rate is None:
            return None
        multiplying = part["flops"] / (rate * EFFICIENCY * self.running.session.devices)
        guess = scaled(expected([1.0], ANY_MODEL), AROUND_STEPS_S + multiplying)
        return Foreseen(guess, "FLOPs, and how fast this device multiplies")

    def _probed(self, part: ForecastPart, *, now: bool = False) -> Foreseen | None:
        """Return what a stage takes by its first steps: those taken before, or taken `now`."""
        session, name = self.running.session, part["arm"]
        if part["what"] != "work" or name is None or session.devices > 1:
            return None  # several ranks take other steps than one
        stage = session.stages[name]
        work = self._workload(name, stage)
        if work is None or work.batches is None:
            return None
        path = self._probe_file(part["like"]["settings"])
        found = read_record(path, PROBE, so="it is taken again")
        if found is None and now:
            found = attempted(lambda: probe(self.running, name, stage), lambda _: None)
            if found is not None:
                write_json(path, sealed(found))
        if found is None:
            return None
        steps = self._steps(work.batches)
        evaluations = steps // steps_between_evaluations(replace(work.batches, steps=steps))
        took = seconds(found, steps, evaluations)
        return Foreseen(expected([took], OF_A_PROBE), "a probe of its first steps")

    def _probe_file(self, key: str) -> Path:
        return self.running.session.store.root / "probes" / f"{key}.json"

    # -- what is alike ----------------------------------------------------------------------------

    def _like(self, *parts: Any) -> str:
        """Return a digest of what makes two parts alike, on the same devices."""
        session = self.running.session
        return key_of(task=session.run.task, parts=list(parts), **made_on(session))[:16]

    def _given(self) -> list[Any]:
        run, data = self.running.session.run, self.running.session.data
        gate = self.running.session.gate
        released = {} if gate is None else gate.releases()
        sizes = {arm: side.artifact.num_bytes for arm, side in released.items()}
        return [run.model, run.student, data.digest, run.quality.max_documents, sizes]

    # -- sizes ------------------------------------------------------------------------------------

    def _workload(self, name: str, stage: Stage) -> Workload | None:
        if self.known is None:
            return None
        known = self.known
        return attempted(lambda: stage.workload(name, known), lambda _: None)

    def _made_config(self, name: str) -> Any | None:
        from pipeline.models.load import load_config

        gate = self.running.session.gate
        if gate is not None:
            return load_config(gate.releases()[name].artifact.path)
        return None if self.known is None else config_of(name, self.known)

    def _flops(self, name: str, stage: Stage) -> float | None:
        """Return the FLOPs of a stage, a live teacher's among them; None where they are not known
        before its turn.
        """
        run = self.running.session.run
        matched = stage.matched(run)
        if matched:
            stages = self.running.session.stages
            found = [self._flops(each, stages[each]) for each in matched]
            return None if None in found else sum(each or 0.0 for each in found)
        work = self._workload(name, stage)
        if work is None or work.batches is None or work.writes:
            return None
        own = size_of(work.config, run.task).flops(backward=work.trains)
        per_row = [own]
        if work.teacher is not None:
            per_row.append(size_of(work.teacher[0], run.task).flops(backward=False))
        return sum(
            rows * sum(each(length) for each in per_row)
            for rows, length in self._read(work.batches)
        )

    def _read(self, batches: TrainingConfig) -> Iterator[tuple[float, int]]:
        """Yield how many sequences of which length a training reads."""
        kind = self.running.session.run.task.kind
        settings = replace(batches, steps=self._steps(batches))
        if not kind.is_language:
            yield first_row(settings.steps, settings), self._example_length(settings)
            return
        count = min(SAMPLED_STEPS, settings.steps)
        for at in range(count):
            step = at * settings.steps // count
            length = sequence_length(step, settings)
            rows = first_row(step + 1, settings) - first_row(step, settings)
            tokens = rows * settings.sequence_length * settings.steps / count
            yield tokens / length, length

    def _steps(self, batches: TrainingConfig) -> int:
        if batches.epochs is None:
            return batches.steps
        documents = self.running.session.data.splits["train"]
        rows = len(documents)
        if self.running.session.run.task.kind.is_language:
            rows = max(1, round(_tokens(documents) / batches.sequence_length))
        return max(1, round(batches.epochs * rows / batches.batch_size))

    def _example_length(self, settings: TrainingConfig) -> int:
        documents = self.running.session.data.splits["train"]
        mean = _tokens(documents) / max(1, len(documents))
        return max(1, min(settings.sequence_length, round(mean)))

    def _scoring_flops(self, config: Any) -> float:
        """Return the FLOPs of reading the test split once."""
        session = self.running.session
        documents = session.data.splits["test"][: session.run.quality.max_documents]
        length = session.scored_length
        return size_of(config, session.run.task).flops(backward=False)(length) * (
            _tokens(documents) / length
        )

    # -- the whole --------------------------------------------------------------------------------

    def _hours(self, parts: list[Foreseen]) -> ForecastTotal:
        if not parts:
            return _unknown(NO_TOTAL)
        devices = self.running.session.devices
        return _total(scaled(added([each.seconds for each in parts]), devices / 3600))

    def _memory(self, parts: Sequence[ForecastPart]) -> ForecastTotal:
        """Return the most that any training takes on one device: what its first steps took where
        they were tried, else by its parts.
        """
        session = self.running.session
        if not device_of(session.device).counts_memory:
            return _unknown("this device's memory is the host's, or torch does not count it")
        works = {name: self._workload(name, stage) for name, stage in session.stages.items()}
        trained = {name: each for name, each in works.items() if each is not None and each.trains}
        if not trained:
            return _unknown("nothing is trained whose model is known")
        spread = spread_of(self.running)
        tile = device_of(session.device).chunk_bytes
        tried = self._peaks_of_probes(parts)
        found = [
            tried.get(name) or training_memory(each, session.run.task, spread, tile).total
            for name, each in trained.items()
        ]
        most = max(found, key=lambda each: each.estimate)
        if most.high == float("inf"):
            return _unknown("activations cannot be counted without data")
        return _total(most)

    def _peaks_of_probes(self, parts: Sequence[ForecastPart]) -> dict[str, Interval]:
        """Return by stage the most that its first steps held; the later ones do as they did."""
        peaks: dict[str, Interval] = {}
        if self.running.session.ranks.several:  # a probe has whole batches on one device
            return peaks
        for part in parts:
            if part["what"] == "work" and part["arm"] is not None:
                path = self._probe_file(part["like"]["settings"])
                read = read_record(path, PROBE, so="it is taken again")
                if read is not None and read["peak_bytes"] is not None:
                    peak = float(read["peak_bytes"])
                    peaks[part["arm"]] = Interval(peak, peak, PROBED_MOST * peak)
        return peaks

    def _host(self) -> ForecastTotal:
        """Return the most memory of the host that runs with these settings held."""
        held = self.past.totals(settings_key(self.running.session.run), "host_bytes")
        if not held:
            return _unknown("no run with these settings has ended here yet")
        return _total(expected(held, OF_HOST_MEMORY))

    def _disk(self, done: _Done) -> ForecastTotal:
        """Return what its artifacts leave on the disk."""
        session, found = self.running.session, 0.0
        for name, stage in session.stages.items():
            made = [seed for seed in session.seeds if not done.work(name, seed)]
            work = self._workload(name, stage) if made else None
            if not made:
                continue
            if work is None:
                return _unknown(f"what {name} makes is not known before its turn")
            size = size_of(work.config, session.run.task)
            if stage.makes != MODEL:
                assert work.batches is not None
                tokens = sum(rows * length for rows, length in self._read(work.batches))
                found += len(made) * tokens * CACHED_TOKEN_BYTES
            else:
                form = stage.stored_format()
                bits = 32 if form is None else form.bits
                if bits is None:
                    return _unknown(f"{name} has yet to choose its format")
                stored = size.of_layers if bits < 16 else size.parameters
                found += len(made) * (stored * bits / 8 + (size.parameters - stored) * 4)
        return _total(Interval(found, 0.8 * found, 1.15 * found))

    def _energy(self, foreseen: list[tuple[ForecastPart, Foreseen | None]]) -> ForecastTotal:
        """Return the energy by the power that runs on this device took."""
        session = self.running.session
        same = [each for each in self.past.records if each["device"] == device_name(session.device)]
        power: list[float] = []
        for each in same:
            energy, hours = (each["totals"][key]["actual"] for key in ("energy_j", "device_hours"))
            if energy and hours:
                power.append(energy / (hours * 3600))
        parts = [each.seconds for _, each in foreseen if each is not None]
        if not power:
            return _unknown("no run on this device has measured energy yet")
        if not parts:
            return _unknown(NO_TOTAL)
        watts = expected(power, 0.3)
        device_s = scaled(added(parts), session.devices)
        return _total(Interval(*(a * b for a, b in zip(device_s, watts, strict=True))))


def spread_of(running: Running) -> Spread:
    """Return how this run's ranks share a training, or will."""
    session = running.session
    ranks = session.ranks
    if not ranks.several:
        return planned_spread(session.run, session.device)
    return Spread.of(session.run.parallel.mode, ranks.size, ranks.size // ranks.hosts)


# -- what is done already -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Done:
    """Stages and assessments that the store has, by arm and seed."""

    made: frozenset[tuple[str, int]]
    assessed: frozenset[tuple[str, int]]

    @classmethod
    def of(cls, running: Running) -> _Done:
        """Look for every stage of a run in its store; nothing is hashed."""
        made: set[tuple[str, int]] = set()
        assessed: set[tuple[str, int]] = set()
        session = running.session
        for seed in session.seeds:
            book = Book(session)
            aside = replace(running, book=book)
            runner, assessor = StageRunner(aside, seed), Assessor(aside, seed)
            if session.gate is None:
                base = base_artifact(session.run, session.data, seed, session.store, session.clock)
                book.arms[BASE, seed] = Arm(base)
            for name, stage in session.stages.items():
                found = attempted(lambda: _found(runner, name, stage), lambda _: None)  # noqa: B023
                if found is None:
                    continue
                record, key = found
                made.add((name, seed))
                artifact, output = Artifact.from_json(record["artifact"]), record["output"]
                arm = Arm(artifact, Output.from_json(output))
                book.arms[name, seed] = arm
                read = attempted(lambda: _read_before(assessor, name, record, key), lambda _: None)  # noqa: B023
                if read is not None:
                    assessed.add((name, seed))
                    book.arms[name, seed] = replace(arm, items=Path(read["items"]))
        return cls(frozenset(made), frozenset(assessed))

    def work(self, name: str, seed: int) -> bool:
        """Return whether a stage was done before."""
        return (name, seed) in self.made

    def assessment(self, name: str, seed: int) -> bool:
        """Return whether what a stage made was assessed before."""
        return (name, seed) in self.assessed


def _found(runner: StageRunner, name: str, stage: Stage) -> tuple[Made, str] | None:
    """Return what a stage made before, and the key of it; None where it did not, or where what it
    reads is yet to be made.
    """
    session = runner.running.session
    inputs = runner.inputs(name, stage)
    key = stage_key(session, name, stage, inputs, runner.seed, runner.matched_flops(stage))
    record = runner.remembered(key)
    return None if record is None else (record, key)


def _read_before(assessor: Assessor, name: str, made: Made, key: str) -> Assessed | None:
    """Return what is remembered of an artifact's assessment, unread."""
    session = assessor.running.session
    found = assessor.key(name, made, key)
    return read_record(session.store.root / "assessments" / f"{found}.json", ASSESSED)


# -- how it is kept, and scored -------------------------------------------------------------------


def keep(running: Running, forecast: Forecast) -> None:
    """Write the forecast into the run's folder; that of the first attempt stays."""
    path = running.session.folder / FILE
    if running.session.number == 1 or not path.exists():
        write_json(path, sealed(forecast.record))


def scored(running: Running, result: Result) -> ForecastRecord | None:
    """Return a run's forecast with what each part took; kept in its folder where it has finished.

    None where there was no forecast.
    """
    path = running.session.folder / FILE
    record = read_record(path, FORECAST, so="the forecast is not scored")
    if record is None or result["status"] != "FINISHED":
        return record
    own = [row for row in result["rows"] if row["reused"] is None]
    devices = record["devices"]
    for part in record["parts"]:
        hours = _actual_hours(part, own, result)
        part["actual_s"] = None if hours is None else hours * 3600 / devices
    totals = record["totals"]
    spent = [part["actual_s"] for part in record["parts"] if part["expected_s"] is not None]
    if None not in spent:
        totals["device_hours"]["actual"] = sum(each or 0.0 for each in spent) * devices / 3600
    totals["energy_j"]["actual"] = _sum_of(row["ledger"]["energy_j"]["value"] for row in own)
    peaks = [row["ledger"]["memory"]["peak_allocated_bytes"]["value"] for row in own]
    totals["memory_bytes"]["actual"] = max(
        (each for each in peaks if each is not None), default=None
    )
    held = [row["ledger"]["memory"]["host_peak_rss_bytes"]["value"] for row in own]
    totals["host_bytes"]["actual"] = max((each for each in held if each is not None), default=None)
    artifacts = {
        row["artifact"]["digest"]: row["artifact"]["bytes"] for row in own if row["artifact"]
    }
    totals["disk_bytes"]["actual"] = float(sum(artifacts.values()))
    write_json(path, sealed(record))
    return record


def _actual_hours(part: ForecastPart, own: list[Row], result: Result) -> float | None:
    if part["what"] in ("compare", "overhead"):
        return result["run"]["device_hours"][part["what"]]["value"]
    rows = [
        row for row in own if stage_name(row["arm"]) == part["arm"] and row["seed"] == part["seed"]
    ]
    finished = any(row["status"] == "FINISHED" for row in rows)
    skipped = bool(rows) and all(row["status"] == "SKIPPED" for row in rows)
    what: HoursPart = "assess" if part["what"] == "assess" else "work"
    return sum(hours_in(row, what) for row in rows) if finished or skipped else None


def _sum_of(values: Iterator[float | None]) -> float | None:
    found = list(values)
    return None if None in found or not found else sum(each or 0.0 for each in found)


def _part(
    what: str, arm: str | None, seed: int | None, like: dict[str, str], flops: float | None
) -> ForecastPart:
    return {
        "what": what,
        "arm": arm,
        "seed": seed,
        "like": like,
        "flops": flops,
        "expected_s": None,
        "source": "",
        "actual_s": None,
    }


def _name(part: ForecastPart) -> str:
    whole = {"compare": "the comparison pass", "overhead": "starting and reporting"}
    arm, what = part["arm"], part["what"]
    return whole.get(what) or (f"assessing {arm}" if what == "assess" else str(arm))


def _tokens(documents: Sequence[Document]) -> float:
    """Return roughly how many tokens there are in documents."""
    return sum(_length(each) for each in documents) / BYTES_A_TOKEN


def _length(document: Document) -> int:
    whole = len(document.text) + len(document.prompt or "") + len(document.pair or "")
    return whole + sum(len(str(each.get("content") or "")) for each in document.messages or ())


def _text(config: Any) -> str | None:
    return None if config is None else config.to_json_string()


def _text_of_teacher(work: Workload) -> str | None:
    return None if work.teacher is None else _text(work.teacher[0])


def _span(found: Interval) -> Expected:
    return {"value": found.estimate, "low": found.low, "high": found.high}


def _total(found: Interval) -> ForecastTotal:
    return {"expected": _span(found), "why_missing": None, "actual": None}


def _unknown(why: str) -> ForecastTotal:
    return {"expected": None, "why_missing": why, "actual": None}


def _attempted(read: Any) -> ForecastTotal:
    return attempted(read, _unknown)
