"""Assessment: an artifact scored as it was reloaded from disk, in a window of its own and under a
key of its own; or what was found out about it before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.settings.serving import VllmCheck
from pipeline.config.text_files import read_bytes
from pipeline.evaluation.serving.vllm_check import Checked, check_vllm
from pipeline.evaluation.serving.vllm_check import installed as vllm_version
from pipeline.evaluation.serving.vllm_check import why_not as vllm_why_not
from pipeline.gate.checks import ITEMS
from pipeline.ledger.attempted import UNMEASURED, attempted, unmeasured
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.peaks import device_name
from pipeline.ledger.records import ASSESSED, MAX_BYTES
from pipeline.ledger.shapes import Assessed, AssessedFacts, KnownQuality, Made, Quality, Row
from pipeline.runs.following import Scorers, Scoring
from pipeline.runs.keys import assessment_key, evaluation_key, quantized_by
from pipeline.runs.out_of_memory import failing_as
from pipeline.runs.rows import broken_row, made_row, moved, reused_work
from pipeline.runs.running import Running
from pipeline.runs.timeline import OpenWindow
from pipeline.stages.base import Stage, teacher_of
from pipeline.store.artifacts import Artifact, make_way


@dataclass(frozen=True, slots=True)
class Assessor:
    """Assesses the artifacts of one seed."""

    running: Running
    seed: int

    def assess(self, name: str, stage: Stage, made: Made, stage_key: str) -> Assessed:
        """Bring an artifact's assessment to its rows, made now or found; return what the store
        remembers of it.
        """
        key = self.key(name, made, stage_key)
        record = self._recall(key, made)
        if record is None:
            record = self._assess(name, stage, made, key)
        else:
            self._reuse(name, record)
        return record

    def key(self, name: str, made: Made, stage_key: str) -> str:
        """Return the key of an artifact's assessment."""
        session, artifact = self.running.session, Artifact.from_json(made["artifact"])
        teacher = self._teacher(name)
        checks = self._wants_vllm(name) and self._why_no_vllm(artifact.path) is None
        return assessment_key(
            session,
            stage_key,
            artifact,
            self.seed,
            teacher=None if teacher is None else self._artifact(teacher),
            unquantized=self._unquantized(name),
            recorded=self._recorded(name),
            vllm=vllm_version() if checks else None,
        )

    def _artifact(self, arm: str) -> Artifact:
        return self.running.book.arms[arm, self.seed].artifact

    def _teacher(self, name: str) -> str | None:
        """Return the arm whose predictions an artifact's are compared with."""
        teacher = teacher_of(self.running.session.run, name)
        found = None if teacher is None else self.running.book.arms.get((teacher, self.seed))
        return (
            teacher if found is not None and found.items is not None and teacher != name else None
        )

    def _unquantized(self, name: str) -> Artifact | None:
        """Return what a quantized arm was made from."""
        reference = self.running.session.stages[name].reference()
        return None if reference is None else self._artifact(reference)

    def _recorded(self, name: str) -> Path | None:
        """Return the per-document values of another evaluation that stand in for an assessment, or
        None.
        """
        session = self.running.session
        path = getattr(session.run, ITEMS.get(name, ""), None) if session.gate is not None else None
        return None if path is None else Path(path).expanduser()

    # -- found ------------------------------------------------------------------------------------

    def _recall(self, key: str, made: Made) -> Assessed | None:
        """Return what is remembered of an assessment with this key, if its per-document values are
        still there.

        What this run made and another one assessed is assessed again: its row belongs to one run.
        """
        session = self.running.session
        with session.clock.phase("prepare"):
            record = session.store.recall("assessments", key, ASSESSED)
        if record is None or session.run_id == made["run_id"] != record["run_id"]:
            return None
        # wherever the store has been moved to
        items = session.store.root / "assessments" / Path(record["items"]).name
        with session.clock.phase("prepare"):
            sha256 = items_sha256(items)
        # Comparisons read these files again: figures without them could not be compared.
        if sha256 is None or sha256 != record["sha256"]:
            return None
        rows = [moved(row, made["artifact"], items) for row in record["rows"]]
        return {**record, "items": str(items), "rows": rows}

    def _reuse(self, name: str, record: Assessed) -> None:
        """Add the rows of work and assessment that were found done: linked to their run, nothing
        spent.
        """
        book, run_id = self.running.book, self.running.session.run_id
        # an earlier attempt of this very run: spent, and journaled, there
        if record["run_id"] == run_id:
            book.adopt(record["rows"], "work")
            finished = (row for row in record["rows"] if row["status"] == "FINISHED")
            book.rows += [row for row in finished if row["reused"] is None]
            return
        print(f"{name}: reused from {record['run_id']}", flush=True)
        rows: list[Row] = [
            {**row, "reused": row["reused"] or record["run_id"]} for row in record["rows"]
        ]
        book.adopt(rows, "work", "assess")

    # -- made -------------------------------------------------------------------------------------

    def _assess(self, name: str, stage: Stage, made: Made, key: str) -> Assessed:
        """Score an artifact, reloaded from disk, inside a window of its own; return what the store
        remembers of it.
        """
        from pipeline.models.sixteen_bits import stored_said

        session, timeline, book = (self.running.session, self.running.timeline, self.running.book)
        artifact = Artifact.from_json(made["artifact"])
        stored = stored_said(str(artifact.path), session.device)
        if stored is not None:
            book.notes.append(f"{name}: {stored}")
        items = session.store.root / "assessments" / f"{key}.jsonl"
        for file in (items, items.with_suffix(".predictions.npy")):
            make_way(file)
        window: OpenWindow | None = None
        try:
            with (
                timeline.window("assess", name, self.seed) as window,
                failing_as(self.running, name, "assess", stage),
                stage.refusals(f"stages.{name}"),
            ):
                quality = self._quality(name, artifact, items, window)
                checked = self._check_vllm(name, artifact)
                device_of(session.device).synchronise()
        except BaseException as error:
            book.add(broken_row(timeline, name, stage, self.seed, window, error, made))
            raise
        book.adopt(made["earlier"], "work")
        if made["run_id"] != session.run_id:
            book.adopt([reused_work(session, name, stage, self.seed, made, quality)], "work")
        book.add_finished_before(name, self.seed)
        book.add(made_row(timeline, name, stage, self.seed, made, window, quality))
        record: Assessed = {
            "run_id": session.run_id,
            "items": str(items),
            "sha256": items_sha256(items),
            "rows": book.rows_of(name, self.seed),
        }
        if checked is not None:
            record["vllm"] = checked.to_json()
            session.store.annotate(artifact, "checked", {"vllm": record["vllm"]})
        # A measurement that failed may work the next time.
        if not any(UNMEASURED in (figure["why_missing"] or "") for figure in quality.values()):
            session.store.remember("assessments", key, record)  # else it is assessed again
        session.store.annotate(artifact, "assessed", self._assessed(quality))
        return record

    def _quality(self, name: str, artifact: Artifact, items: Path, window: OpenWindow) -> Quality:
        """Score an artifact, with the other ranks where that is worth it; what each took is left
        on the window.
        """
        from pipeline.evaluation.quality.assess import assess_quality
        from pipeline.evaluation.quality.parts import is_worth_sharing
        from pipeline.evaluation.quality.recorded import take_recorded, write_identity

        session = self.running.session
        run, recorded = session.run, self._recorded(name)
        if recorded is not None:
            return take_recorded(recorded, items, run.task, run.quality, ITEMS[name])
        teacher, unquantized = self._teacher(name), self._unquantized(name)
        taught_by = None if teacher is None else self.running.book.arms[teacher, self.seed].items
        documents, scorers = session.data.splits["test"], None
        if is_worth_sharing(len(documents), run.quality, session.ranks.size):
            against = None if unquantized is None else unquantized.path
            scorers = Scorers(session.ranks, session.clock)
            session.ranks.told(Scoring(artifact.path, against))
        quality = assess_quality(
            artifact.path,
            documents=documents,
            task=run.task,
            labels=session.data.labels,
            config=run.quality,
            sequence_length=session.scored_length,
            device=session.device,
            items=items,
            teacher_predictions=(
                None if taught_by is None else taught_by.with_suffix(".predictions.npy")
            ),
            seed=self.seed,
            clock=session.clock,
            unquantized=None if unquantized is None else unquantized.path,
            scorers=scorers,
        )
        window.ranks = [] if scorers is None else scorers.times
        write_identity(
            items,
            data=session.data.digest,
            split="test",
            evaluation=evaluation_key(session),
            artifact=artifact.digest,
        )
        return quality

    def _assessed(self, quality: Quality) -> AssessedFacts:
        """Return what artifact.json says of an artifact's quality, and where that was found."""
        session = self.running.session
        figures: dict[str, KnownQuality] = {
            key: {
                "value": figure["value"],
                "why_missing": figure["why_missing"],
                "ci": figure["ci"],
                "n": figure["n"],
            }
            for key, figure in quality.items()
        }
        return {
            "quality": figures,
            "data": session.data.digest,
            "split": "test",
            "margin": session.run.quality.margin,
            "device": device_name(session.device),
            "run_id": session.run_id,
        }

    # -- vLLM -------------------------------------------------------------------------------------

    def _wants_vllm(self, name: str) -> bool:
        """Return whether vLLM is to load and score an arm's artifact."""
        wanted = self.running.session.run.serving.check_vllm
        return wanted is VllmCheck.every or (
            wanted is VllmCheck.quantized and self._is_quantized(name)
        )

    def _is_quantized(self, name: str) -> bool:
        """Return whether an arm's artifact is quantized: by its stage, or as it was released."""
        session = self.running.session
        if session.gate is not None and name in session.gate.releases():
            return quantized_by(session.gate.releases()[name].artifact.path) is not None
        return session.stages[name].reference() is not None

    def _why_no_vllm(self, folder: Path) -> str | None:
        """Return why vLLM cannot read a folder here, or None; a question that fails is a reason,
        too.
        """
        session = self.running.session
        return attempted(
            lambda: vllm_why_not(folder, session.run.task, session.device),
            lambda why: unmeasured("vLLM", why),
        )

    def _check_vllm(self, name: str, artifact: Artifact) -> Checked | None:
        """Have vLLM score an arm's artifact, where that is wanted; a part of its assessment."""
        if not self._wants_vllm(name):
            return None
        session = self.running.session
        check = lambda: check_vllm(
            artifact.path,
            documents=session.data.splits["test"],
            task=session.run.task,
            sequence_length=session.scored_length,
            device=session.device,
            clock=session.clock,
            still=self.running.timeline.check_budget,
        )
        return attempted(
            check, lambda why: Checked("failed", unmeasured("agreement with vLLM", why))
        )

    def report_vllm(self, name: str, record: Assessed) -> None:
        """Report what became of the check of an arm's artifact, made now or found; what disagrees
        ends the run with 3.
        """
        if not self._wants_vllm(name):
            return
        checked = Checked.from_json(record.get("vllm") or {"outcome": "not run here"})
        why = self._why_no_vllm(self._artifact(name).path)
        # of an assessment that was found: why not now
        if checked.outcome == "not run here" and why is not None:
            checked = Checked("not run here", why)
        several = len(self.running.session.seeds) > 1
        arm = f"{name} (seed {self.seed})" if several else name
        print(f"{arm}: {checked.say()}", flush=True)
        self.running.book.notes.append(f"{arm}: {checked.say()}")
        if checked.agrees is False:
            self.running.book.disagreeing.append(arm)


def items_sha256(items: Path) -> str | None:
    """Return a checksum over per-document values, of tasks too, and first predictions; None where
    any is not there.
    """
    try:
        of_tasks = sorted(items.parent.glob(f"{items.stem}.*.jsonl"))
        files = (items, items.with_suffix(".predictions.npy"), *of_tasks)
        contents = [read_bytes(file, limit=MAX_BYTES) for file in files]
    except OSError:
        return None
    return hashlib.sha256(
        b"".join(hashlib.sha256(content).digest() for content in contents)
    ).hexdigest()
