"""How a stage comes to its row: its key, then what was made under it before, or its work in a
window and a committed artifact; then its assessment.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.arms import file_name, is_fallback
from pipeline.errors import DeviceLost, StageFailed, UserError
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import difference
from pipeline.ledger.records import MADE, read_record
from pipeline.ledger.shapes import Figures, HistoryEntry, Made, OutputRecord, RankTime, Row
from pipeline.ledger.values import Value
from pipeline.report.progress import progress_bar
from pipeline.runs.assessor import Assessor
from pipeline.runs.book import Arm
from pipeline.runs.following import share_of, straggler, told_times
from pipeline.runs.keys import stage_key
from pipeline.runs.live import Live
from pipeline.runs.out_of_memory import failing_as
from pipeline.runs.resume import from_checkpoint
from pipeline.runs.rows import broken_row, made_row, reused_work, skipped_row
from pipeline.runs.running import Running
from pipeline.runs.timeline import OpenWindow
from pipeline.stages.base import (
    LIKE,
    RELEASE,
    Attempts,
    Stage,
    WarmUp,
    arms_read,
    made_arms_read,
    refusal_words,
)
from pipeline.stages.context import Context, Output
from pipeline.store.artifacts import MODEL, Artifact, DiskFull, plain
from pipeline.training.ranks import ALONE


@dataclass(frozen=True, slots=True)
class StageRunner:
    """Brings the stages of one seed to their rows."""

    running: Running
    seed: int

    def attempts(self, name: str, stage: Stage) -> Attempts:
        session, book = self.running.session, self.running.book

        def made(arm: str) -> Output | None:
            found = book.arms.get((arm, self.seed))
            return None if found is None else found.output

        return Attempts(
            run=session.run,
            device=session.device,
            attempt=self.attempt,
            skip=self.skip,
            made=made,
            artifact=lambda arm: book.arms[arm, self.seed].artifact,
            unavailable=lambda each: self.unavailable(name, each),
            skip_stage=lambda why: self.skip(name, stage, why),
            say=book.notes.append,
        )

    def skip(self, name: str, stage: Stage, why: str) -> None:
        """Record a stage that cannot be done here."""
        self.running.book.add(skipped_row(self.running.timeline, name, stage, self.seed, why))

    def unavailable(self, name: str, stage: Stage) -> str | None:
        """Return why a stage cannot be done, or None: what it reads is not there, or this device
        cannot do it. It is then an optional one: others were refused before.
        """
        session, arms = self.running.session, self.running.book.arms
        gone = [arm for arm in arms_read(stage, session.run) if (arm, self.seed) not in arms]
        if gone:
            return f"{gone[0]} was skipped"
        return stage.unavailable(session.run, session.device, self.inputs(name, stage))

    def attempt(self, name: str, stage: Stage) -> Exception | None:
        """Bring one stage to its artifact, its assessment and its row: each reused where it was
        done before.

        Returns:
            Why a stage that may be refused was; its row has the reason too.
        """
        try:
            self._to_its_row(name, stage)
        except (UserError, StageFailed) as error:
            # A full disk or a lost device is no fault of the stage; passing over it would end in a
            # result without models.
            if isinstance(error, DiskFull | DeviceLost) or not stage.may_be_refused():
                raise
            self.running.book.notes.append(f"{name}: {refusal_words(name, error)}")
            return error
        return None

    def _to_its_row(self, name: str, stage: Stage) -> None:
        timeline, assessor = self.running.timeline, Assessor(self.running, self.seed)
        why = self.unavailable(name, stage)
        if why is not None:
            self.skip(name, stage, why)
            return
        inputs = self.inputs(name, stage)
        _refuse_gone(stage.inputs(self.running.session.run), inputs)
        # Before the key: a control's budget of FLOPs is a part of what it makes.
        matched = self.matched_flops(stage)
        key = stage_key(self.running.session, name, stage, inputs, self.seed, matched)
        with timeline.hold(key, name):  # another process may be at it: then find it done
            # Looked up while the lock is held: who waited for it finds the work done.
            made = self.recall(key) or self._make(name, stage, inputs, key, matched)
            artifact = Artifact.from_json(made["artifact"])
            assessed = None
            # a teacher cache has no quality; a fallback is read as it is made
            if stage.makes != MODEL or is_fallback(name):
                self._show(name, stage, made)
            else:
                assessed = assessor.assess(name, stage, made, key)
        items = None if assessed is None else Path(assessed["items"])
        output = Output.from_json(made["output"])
        self.running.book.arms[name, self.seed] = Arm(artifact, output, items)
        if assessed is not None:
            assessor.report_vllm(name, assessed)

    def inputs(self, name: str, stage: Stage) -> dict[str, Artifact]:
        """Return the artifacts that a stage reads, by role."""
        session, arms = self.running.session, self.running.book.arms
        if stage.takes_release() and session.gate is not None:
            return {RELEASE: session.gate.releases()[name].artifact}
        roles = stage.inputs(session.run)
        return {role: arms[arm, self.seed].artifact for role, arm in roles.items()}

    def matched_flops(
        self, stage: Stage, planned: Mapping[str, Output] | None = None
    ) -> float | None:
        """Return the FLOPs that a stage may spend which matches others; None where it matches none,
        or theirs are unknown.

        Args:
            planned: What arms that are not made yet will report of them.
        """
        arms = stage.matched(self.running.session.run)
        outputs = [(planned or {}).get(arm) or self.output(arm) for arm in arms]
        known = [None if output is None else _flops_of(output) for output in outputs]
        return None if None in known or not known else sum(each or 0.0 for each in known)

    def like(self, stage: Stage, planned: Mapping[str, Output] | None = None) -> Output | None:
        """Return what the stage reported, or as planned will report, that a stage is like."""
        reference = stage.references(self.running.session.run).get(LIKE)
        if reference is None:
            return None
        return (planned or {}).get(reference.arm) or self.output(reference.arm)

    def output(self, arm: str) -> Output | None:
        found = self.running.book.arms.get((arm, self.seed))
        return None if found is None else found.output

    # -- work -------------------------------------------------------------------------------------

    def recall(self, key: str) -> Made | None:
        """Return what is remembered of work with this key, if its artifact is still whole: it is
        hashed.
        """
        with self.running.session.clock.phase("prepare"):
            return self.running.session.store.recall("keys", key, MADE)

    def remembered(self, key: str) -> Made | None:
        """Return what is remembered of work with this key, whatever became of its artifact: nothing
        is hashed.
        """
        return read_record(self.running.session.store.root / "keys" / f"{key}.json", MADE)

    def _make(
        self,
        name: str,
        stage: Stage,
        inputs: Mapping[str, Artifact],
        key: str,
        matched: float | None,
    ) -> Made:
        """Do a stage's work inside its window and commit its artifact; return what the store
        remembers of it.
        """
        session, timeline, book = (self.running.session, self.running.timeline, self.running.book)
        checkpoints = self.checkpoints(name, stage, inputs, key, matched)
        timeline.check_budget()
        self.announce(name, stage)
        window = None
        try:
            # what all arms use alike is overhead of the run
            stage.warm_up(inputs, WarmUp(session.run, session.data, session.device, session.clock))
            session.memory.start(session.device)
            with timeline.window("work", name, self.seed) as window:
                artifact, output, times = self._work(name, stage, inputs, key, window, checkpoints)
                # The window ends when the device is done, not when it was asked. What failed on
                # it may be told only now.
                with failing_as(self.running, name, "work", stage):
                    device_of(session.device).synchronise()
        except BaseException as error:
            # Ctrl-C and signals too: hours of a failed attempt are charged.
            book.add(broken_row(timeline, name, stage, self.seed, window, error))
            raise
        # After the window, whose closing edge is the last reading.
        peak = timeline.usage(name, self.seed).memory_used_peak_bytes
        memory = session.memory.read(session.device, nvml_peak=peak)
        read = {part: value.to_json() for part, value in memory.items()}
        return self.remember(
            name, key, window, checkpoints, artifact, output.to_json(), read, times
        )

    def checkpoints(
        self,
        name: str,
        stage: Stage,
        inputs: Mapping[str, Artifact],
        key: str,
        matched: float | None,
    ) -> Path:
        """Return where a stage's checkpoints are: by settings, so that another run with the same
        ones resumes from them, and one with another number of devices.
        """
        session = self.running.session
        if session.devices > 1:
            key = stage_key(session, name, stage, inputs, self.seed, matched, devices=1)
        return session.store.root / "checkpoints" / key

    def announce(self, name: str, stage: Stage) -> None:
        """Say that a stage begins."""
        session = self.running.session
        several = f" (seed {self.seed})" if len(session.seeds) > 1 else ""
        print(f"{name}{several}: running", flush=True)
        session.journal.write(
            "stage_start",
            arm=name,
            stage=name,
            type=stage.type,
            seed=self.seed,
            attempt=session.number,
            params=stage.shown_settings(session.run),
            depends_on=made_arms_read(stage, session.run),
        )

    def manifest(
        self, name: str, stage: Stage, inputs: Mapping[str, Artifact], key: str
    ) -> dict[str, Any]:
        """Return what artifact.json says of a stage, beside what it reports itself."""
        session = self.running.session
        return {
            "recipe": session.run.recipe,
            "arm": name,
            "seed": self.seed,
            "key": key,
            "run_id": session.run_id,
            "settings": plain(stage),
            "inputs": {role: artifact.digest for role, artifact in inputs.items()},
        }

    def remember(
        self,
        name: str,
        key: str,
        window: OpenWindow,
        checkpoints: Path,
        artifact: Artifact,
        output: OutputRecord,
        memory: Figures,
        times: list[RankTime],
    ) -> Made:
        """Keep what a stage made, and what that took, under its key."""
        session, timeline = self.running.session, self.running.timeline
        record: Made = {
            "artifact": artifact.to_json(),
            "run_id": session.run_id,
            "attempt": session.number,
            "seed": self.seed,
            "work_ns": window.elapsed_ns,
            "phases_ns": window.phases_ns,
            "output": output,
            "memory": memory,
            "usage": timeline.usage(name, self.seed).to_json(),
            "disturbance": timeline.disturbance(name, self.seed).to_json(),
            "earlier": self.running.book.rows_of(name, self.seed),
        }
        if times:
            record["ranks"] = times
        if window.beside > 1:
            record["beside"] = window.beside
        # The record before the checkpoints go: a crash in between only leaves files behind.
        session.store.remember("keys", key, record)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return record

    def _work(
        self,
        name: str,
        stage: Stage,
        inputs: Mapping[str, Artifact],
        key: str,
        window: OpenWindow,
        checkpoints: Path,
    ) -> tuple[Artifact, Output, list[RankTime]]:
        session, book = self.running.session, self.running.book
        with session.store.scratch() as out:
            context = self._context(name, stage, window, out, checkpoints)
            with failing_as(self.running, name, "work", stage):
                share = share_of(name, stage, inputs, context)
                if context.ranks.several:
                    context.ranks.told(share)
                before, times = session.clock.mark()[1], list[RankTime]()
                output = stage.run(inputs, context)
                if context.ranks.several:
                    own = difference(session.clock.mark()[1], before)
                    times = told_times(context.ranks, session.run, share, own)
            book.notes += output.notes
            slow = straggler(times)
            book.notes += [] if slow is None else [f"{name}: {slow}"]
            with session.clock.phase("checkpoint"):
                manifest = {**self.manifest(name, stage, inputs, key), **output.about}
                # Still inside the window: work lasts until the artifact is committed.
                return session.store.commit(out, stage.makes, manifest), output, times

    def _context(
        self, name: str, stage: Stage, window: OpenWindow, out: Path, checkpoints: Path
    ) -> Context:
        """Return what a stage works with; it leaves its artifact in `out`."""
        session, timeline = self.running.session, self.running.timeline
        trace = timeline.trace(name, self.seed, session.number)

        def journal(event: str, step: int, **fields: Any) -> None:
            trace.reached = max(trace.reached, step)
            of_arm = {"arm": name, "seed": self.seed, "attempt": session.number}
            session.journal.write(event, **of_arm, step=step, **fields)

        def phases_ns() -> dict[str, int]:
            return difference(session.clock.mark()[1], window.before)

        def checkpointed(step: int) -> None:
            trace.saved, trace.saved_ns = step, phases_ns()
            journal("checkpoint", step, phases_ns=trace.saved_ns)

        def resumed(step: int, history: list[HistoryEntry]) -> None:
            if step:
                print(f"{name}: resuming from step {step}", flush=True)
            journal("resume", step, history=history)
            from_checkpoint(self.running, name, self.seed, step, history)

        live = Live(self.running, name, self.seed)

        def points(step: int, values: Mapping[str, float | None]) -> None:
            live.read(values)
            journal("points", step, values=values)

        return Context(
            run=session.run,
            stage=name,
            seed=self.seed,
            device=session.device,
            data=session.data,
            clock=session.clock,
            out=out,
            checkpoints=checkpoints,
            like=self.like(stage),
            matched_flops=self.matched_flops(stage),
            points=points,
            history=lambda step: timeline.history(name, self.seed, step, phases_ns()),
            checkpointed=checkpointed,
            resumed=resumed,
            should_stop=timeline.should_stop,
            progress=partial(progress_bar, about=live),
            say=self.running.book.notes.append,
            ranks=session.ranks if stage.is_split(session.run) else ALONE,
            traces=session.folder / "traces" / f"{file_name(name)}-seed{self.seed}",
        )

    def _show(self, name: str, stage: Stage, made: Made) -> None:
        """Add the rows of an artifact that is not assessed, made now or found."""
        session, book = self.running.session, self.running.book
        if made["run_id"] != session.run_id:
            print(f"{name}: reused from {made['run_id']}", flush=True)
            own = reused_work(session, name, stage, self.seed, made, {})
            rows: list[Row] = [*made["earlier"], {**own, "artifact": made["artifact"], "why": None}]
            reused: list[Row] = [{**row, "reused": row["reused"] or made["run_id"]} for row in rows]
            book.adopt(reused, "work")
            return
        book.adopt(made["earlier"], "work")
        before = [
            row for row in book.finished_before if (row["arm"], row["seed"]) == (name, self.seed)
        ]
        # an earlier attempt of this very run, journaled there
        if before and made["attempt"] != session.number:
            again: list[Row] = [{**row, "artifact": made["artifact"]} for row in before]
            book.rows += again
            return
        book.add(made_row(self.running.timeline, name, stage, self.seed, made, None, {}))


def _refuse_gone(arms: Mapping[str, str], inputs: Mapping[str, Artifact]) -> None:
    gone = next((role for role, artifact in inputs.items() if not artifact.path.is_dir()), None)
    if gone is not None:
        raise StageFailed(
            f"{inputs[gone].path}, the artifact of {arms.get(gone, gone)}, is gone; the same"
            " command makes it again"
        )


def _flops_of(output: Output) -> float | None:
    """Return the FLOPs of a stage: counted, else by the rule of thumb."""
    counted: Value = output.counts["model_flops"]
    return output.flops_by_rule if counted.value is None else counted.value
