"""A gate before anything is measured: what is compared, under which policy, and what was answered
before.

Two looks at most per (candidate, baseline, policy, data, device): the first invocation measures
`policy.blocks` blocks; where that decides nothing the next one adds as many and reads all of them.
Anything decided, and a third invocation, get the recorded verdict: measuring until it passes would
pass one model in seven by luck (MEASUREMENT.md, section 5). An INVALID run does not
count as an interim analysis: what the machine was like made it invalid, whatever the reading was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compare.savings import Spend
from pipeline.compare.verdict import Outcome
from pipeline.config.arms import BASELINE, CANDIDATE
from pipeline.config.settings.policy import PolicyConfig
from pipeline.config.settings.run import Run
from pipeline.config.settings.serving import Decode
from pipeline.errors import UserError
from pipeline.gate.checks import gating_metrics
from pipeline.gate.references import Places, Release, resolve
from pipeline.ledger.shapes import Promotion, Verdict, VerdictHistory
from pipeline.store.artifacts import Store, key_of, plain
from pipeline.store.verdicts import recall


@dataclass(slots=True)
class Gate:
    """A release check.

    Attributes:
        policy_key: Hash of the policy.
        key: Of candidate, baseline, data, device, and all of policy and evaluation that decides
            something: what looks are counted by.
        candidate: What is to be released.
        baseline: The champion; None where there is none.
        earlier: The verdict of the look before; None at the first.
        verdict: What this invocation came to.
        history: The verdict among those before it (`gate/history.py`).
        promotion: What became of moving the champion; None where that was not asked for.
    """

    policy: PolicyConfig
    policy_key: str
    places: Places
    candidate: Release
    baseline: Release | None
    key: str = ""
    earlier: Verdict | None = None
    verdict: Verdict | None = None
    promotion: Promotion | None = None
    history: VerdictHistory | None = None

    @property
    def look(self) -> int:
        """The look that this invocation takes, from 1."""
        return 1 if self.earlier is None else self.earlier["look"] + 1

    @property
    def recorded(self) -> Verdict | None:
        """The earlier verdict where it stands: it was decided, or there are no looks left, or none
        would help.
        """
        if self.earlier is None:
            return None
        undecided = [
            each["name"]
            for each in self.earlier["criteria"]
            if each["gating"] and each["outcome"] == Outcome.INCONCLUSIVE
        ]
        again = (
            self.earlier["verdict"] == Outcome.INCONCLUSIVE
            and self.earlier["look"] < self.policy.looks
        )
        # A second look adds blocks of serving. What rests on documents or training would read the
        # same.
        return None if again and {"serving", "energy", "payback"} & set(undecided) else self.earlier

    def releases(self) -> dict[str, Release]:
        """Return the sides that are there, by arm."""
        sides = {BASELINE: self.baseline, CANDIDATE: self.candidate}
        return {arm: side for arm, side in sides.items() if side is not None}

    def spends(self) -> dict[str, Spend]:
        """Return what the chains of both sides took."""
        return {
            name: spend
            for arm, side in self.releases().items()
            for name, spend in side.spends(arm).items()
        }


# -- opening --------------------------------------------------------------------------------------


def open_gate(run: Run, root: Path, store: Store) -> Gate:
    """Find out what is to be compared.

    Raises:
        UserError: If a reference is none, or what it names cannot be had.
    """
    places = Places(root, store, run.tracking.uri, run.store.url)
    sides = {key: resolve(str(getattr(run, key)), key, places) for key in (BASELINE, CANDIDATE)}
    candidate = sides[CANDIDATE]
    if candidate is None:
        raise UserError(
            CANDIDATE, f"there is no {run.candidate}", "name a version that is registered"
        )
    baseline = sides[BASELINE]
    if run.promote and baseline is not None and baseline.version is None:
        problem = (
            f"{run.baseline} is no registered version, and a PASS replaces the champion that it was"
            " compared with"
        )
        raise UserError(
            "promote",
            problem,
            "give baseline=models:/NAME@champion; bootstrap=true makes the first",
        )
    policy_key = key_of(policy=run.policy)
    gate = Gate(
        policy=run.policy,
        policy_key=policy_key,
        places=places,
        candidate=candidate,
        baseline=baseline,
    )
    if run.promote or run.bootstrap:
        model_name(gate, run)
    return gate


def model_name(gate: Gate, run: Run) -> str:
    """Return the registered model whose champion a PASS replaces.

    Raises:
        UserError: If neither reference names one.
    """
    for key in (BASELINE, CANDIDATE):
        reference = str(getattr(run, key))
        if reference.startswith("models:/"):
            return reference.removeprefix("models:/").partition("@")[0].partition("/")[0]
    key = "promote" if run.promote else "bootstrap"
    raise UserError(key, "names no registered model", "give baseline=models:/NAME@champion")


def identify(
    gate: Gate, run: Run, *, data: str, device: str, evaluation: str, decode: Decode
) -> None:
    """Give the gate its key, and look for what was answered under it before: here, then in the
    MLflow store.

    What decides nothing (a policy's name, its rules for another task) is no part of the key: else
    whoever changes that could look until the candidate passes.

    Args:
        evaluation: What decides a document's values (`Attempt.reading`).
        decode: How tokens are written on this device.

    Raises:
        UserError: If what is recorded was changed by hand.
    """
    if gate.baseline is None:
        return
    items = [
        None if path is None else _identity(Path(path).expanduser())
        for path in (run.candidate_items, run.baseline_items)
    ]
    asked = {key: run.policy.metrics[key] for key in gating_metrics(run.policy, run.task)}
    gate.key = key_of(
        candidate=gate.candidate.artifact.digest,
        baseline=gate.baseline.artifact.digest,
        policy={**plain(run.policy), "name": None, "metrics": plain(asked)},
        data=data,
        device=device,
        evaluation=evaluation,
        items=items,
        decode=decode,
        task=run.task,
    )
    # Both places: a second machine, or a cleared store, gives no further look.
    found = [recall(gate.places.store, gate.key)]
    if run.tracking.mlflow:
        from pipeline.tracking.registry import find_verdict

        found.append(find_verdict(gate.places.tracking, gate.key))
    known = [each for each in found if each is not None]
    gate.earlier = max(known, key=lambda each: each["look"], default=None)


def _identity(items: Path) -> list[Any]:
    """Return what identifies values of another evaluation: a digest of the values, and what the
    note beside them says.
    """
    from pipeline.evaluation.quality.recorded import IDENTITY, read_identity, values_digest

    note = read_identity(items) or {}
    return [values_digest(items), *(note.get(name) for name in (*IDENTITY, "artifact"))]
