"""The comparison pass's reading of serving: measured in a window of its own, or reused with what it
took.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.compare.verdict import disturbed, moved
from pipeline.config.arms import BASELINE, CANDIDATE, Draft
from pipeline.config.settings.serving import Decode, ServingDtype
from pipeline.data.encode import encode_all
from pipeline.evaluation.serving.decoding import chosen, is_timed
from pipeline.evaluation.serving.drafting import Drafted, draft_pass, not_drafted
from pipeline.evaluation.serving.dtype import choose_dtype
from pipeline.evaluation.serving.measure import ServePass, serve_pass
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.booking import device_hours
from pipeline.ledger.peaks import device_name
from pipeline.ledger.records import SERVED
from pipeline.ledger.shapes import Served
from pipeline.ledger.values import Value, null
from pipeline.models.load import load_tokenizer
from pipeline.runs.charges import tolerance
from pipeline.runs.keys import serving_key
from pipeline.runs.out_of_memory import failing_as
from pipeline.runs.rows import artifact_of
from pipeline.runs.running import Running
from pipeline.stages.drafts import draft_of
from pipeline.store.artifacts import Artifact, key_of

if TYPE_CHECKING:
    import numpy as np
    import torch

PROMPT_DOCUMENTS = 64  # test documents that prompts are cut from


def read_serving(running: Running, pairs: list[tuple[str, str]]) -> ServePass | None:
    """Return what the comparison pass reads; None, with the reason kept, where it fails. A gate has
    to have it.
    """
    if running.session.gate is not None:
        return _served(running, pairs)

    def failed(why: str) -> None:
        running.book.why_unserved = unmeasured("serving", why)
        running.book.notes.append(running.book.why_unserved)

    return attempted(lambda: _served(running, pairs), failed)


def _served(running: Running, pairs: list[tuple[str, str]]) -> ServePass:
    session, rows = running.session, running.book.finished(running.session.seeds[0])
    arms = dict.fromkeys(arm for pair in pairs for arm in pair)
    draft = draft_of(session.run)
    if draft is not None and draft.arm in rows:
        arms[draft.arm] = None
    artifacts = {arm: Artifact.from_json(artifact_of(rows[arm])) for arm in arms}
    decode = _asked_decode(running)
    key = serving_key(session, pairs, artifacts, decode)
    with running.timeline.hold(key, "comparison pass"):
        record = running.session.store.recall("serving", key, SERVED)
        if record is None or not _holds(running, record):
            return _measured(running, pairs, key)
    if record["run_id"] != running.session.run_id:
        hours = device_hours(record["elapsed_ns"] * record.get("devices", 1))
        running.book.served_elsewhere_h = hours
        running.book.reused_h += hours
    return ServePass.from_json(record["served"])


def _holds(running: Running, record: Served) -> bool:
    """Whether a pass that was measured before stands: where it was not disturbed, for a gate by its
    policy.

    A look is read once, whatever policies judge it: a gate that measured anew for each would find
    one that passes.
    """
    if record["run_id"] == running.session.run_id:
        return True
    if (
        running.session.gate is None
    ):  # what was disturbed is measured anew: its savings are not shown
        foreign = Value.from_json(
            record["served"]
            .get("conditions", {})
            .get("foreign_load", null("not recorded").to_json())
        )
        return tolerance(running).too_much(foreign) is None
    served, pair = ServePass.from_json(record["served"]), (CANDIDATE, BASELINE)
    if disturbed(
        running.session.gate.policy, device_name(running.session.device), served.conditions
    ):
        return False
    if pair not in served.orders:  # of an older release
        return True
    return not moved(
        running.session.gate.policy, *served.seconds[pair], served.orders[pair], served.places[pair]
    )


def _measured(running: Running, pairs: list[tuple[str, str]], key: str) -> ServePass:
    running.timeline.check_budget()
    print("comparison pass: serving", flush=True)
    with (
        running.timeline.window("compare", None, -1) as window,
        failing_as(running, "comparison pass", "compare"),
    ):
        served = serve(running, pairs, _order_seed(running, key))
    running.session.store.remember(
        "serving",
        key,
        {
            "run_id": running.session.run_id,
            "elapsed_ns": window.elapsed_ns,
            "devices": running.session.devices,
            "served": served.to_json(),
        },
    )
    return served


def _order_seed(running: Running, key: str) -> int:
    """Return a seed that another run, and another look, do not share."""
    # From a digest: nobody can choose the order, and a resumed run draws the same one.
    return int(key_of(run=running.session.run_id, key=key)[:8], 16)


def serve(running: Running, pairs: list[tuple[str, str]], order_seed: int) -> ServePass:
    """Measure the arms of `pairs` at the declared load, interleaved. What an artifact costs is the
    same for all seeds, so the first seed's are served. `order_seed` draws the orders of the blocks,
    and is recorded.
    """
    rows = running.book.finished(running.session.seeds[0])
    folders = {arm: Path(artifact_of(rows[arm])["path"]) for pair in pairs for arm in pair}
    task = running.session.run.task
    with running.session.clock.phase("prepare"):
        # Prompts are the same numbers for every arm; those of the smallest vocabulary are tokens of
        # all.
        tokenizer = min(map(load_tokenizer, folders.values()), key=len)
        documents = running.session.data.splits["test"][:PROMPT_DOCUMENTS]
        encoded = encode_all(
            documents, tokenizer, task, max_length=max(512, running.session.run.serving.load.prompt)
        )
    prompts = [item.input_ids for item in encoded]
    choice = choose_dtype(
        _asked_dtype(running),
        folders,
        task=task,
        labels=running.session.data.labels,
        prompts=prompts,
        config=running.session.run.serving,
        device=running.session.device,
        clock=running.session.clock,
        check=running.timeline.check_budget,
    )
    served = serve_pass(
        folders,
        pairs,
        dtype=choice.dtype,
        task=task,
        labels=running.session.data.labels,
        prompts=prompts,
        config=replace(running.session.run.serving, decode=_asked_decode(running)),
        device=running.session.device,
        devices=running.session.devices,
        seed=0,
        clock=running.session.clock,
        sampler=running.session.sampler,
        check=running.timeline.check_budget,
        energy_of=(
            pairs[0]
            if running.session.gate and running.session.run.policy.energy is not None
            else None
        ),
        order_seed=order_seed,
    )
    for arm, drift in choice.drift.items():
        served.serving[arm] |= drift.figures()
    served = replace(served, dtype=choice.to_json())
    draft = draft_of(running.session.run)
    if draft is None or draft.of not in served.serving:
        return served
    drafted = _drafted(running, draft, choice.dtype, prompts)
    served.serving[draft.of] |= drafted.figures
    return replace(served, draft=drafted.record)


def _drafted(
    running: Running, draft: Draft, dtype: torch.dtype | None, prompts: list[np.ndarray]
) -> Drafted:
    """Return what serving with a draft gives; null with the reason where there is no draft."""
    session, rows = running.session, running.book.finished(running.session.seeds[0])
    if draft.arm not in rows:
        return not_drafted(draft, f"{draft.arm} was not made")
    return draft_pass(
        draft,
        {arm: Path(artifact_of(rows[arm])["path"]) for arm in (draft.arm, draft.of)},
        task=session.run.task,
        prompts=prompts,
        config=session.run.serving,
        device=session.device,
        devices=session.devices,
        clock=session.clock,
        dtype=dtype,
        check=running.timeline.check_budget,
    )


def _asked_decode(running: Running) -> Decode:
    """Return how tokens are to be written. In a gate nothing is timed for it: two sides, or two
    looks, that were served in two ways would differ by that.
    """
    asked, device = running.session.run.serving.decode, running.session.device
    if running.session.gate is None and is_timed(asked, device):
        return asked
    return chosen(asked, device)


def _asked_dtype(running: Running) -> ServingDtype:
    """Return the setting; a gate's later look is served as the look before it was, because both are
    read together.
    """
    before = (
        None
        if running.session.gate is None or running.session.gate.earlier is None
        else running.session.gate.earlier.get("dtype")
    )
    return (
        running.session.run.serving.dtype
        if before is None or before["served"] is None
        else ServingDtype(before["served"])
    )
