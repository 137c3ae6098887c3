"""A self-test of the gate in words, for a terminal and as Markdown."""

from __future__ import annotations

from pipeline.compare.selftest import POWER, TEST_ALPHA
from pipeline.errors import one_line
from pipeline.ledger.numbers import how_many, percent
from pipeline.ledger.shapes import (
    FalseRecord,
    SelftestRecord,
    TestedQuality,
    TestedServing,
    TestedTraining,
)
from pipeline.report.text import bullet


def lines(result: SelftestRecord) -> list[str]:
    """Return what a self-test came to, the answer first."""
    policy, device = result["policy"], result["device"]
    return [
        _answer(result),
        (
            f"policy {one_line(policy['name'], 40)}: {how_many(policy['blocks'], 'block')},"
            f" {how_many(policy['looks'], 'look')}, alpha {policy['alpha']:g} a side; on"
            f" {one_line(device['name'], 60)}"
        ),
        *_serving(result["serving"]),
        _quality(result["quality"]),
        *_training(result["training"]),
        f"took {result['device_hours']:.4f} device-hours",
    ]


def markdown(result: SelftestRecord) -> str:
    """Return the report."""
    first, *rest = lines(result)
    return "\n".join(
        ["# Self-test of the release gate", "", bullet(first)[2:], "", *map(bullet, rest), ""]
    )


def _answer(result: SelftestRecord) -> str:
    model = result["model"]
    named = f"{one_line(model['name'] or '', 80)} {model['digest'][:8]}".strip()
    if result["too_many"]:
        return (
            f"FALSE ANSWERS: {named} against itself gets more of them than alpha allows (chance"
            f" below {TEST_ALPHA:g})"
        )
    if result["serving"]["false_pass"]["n"] == 0:
        return f"NOTHING JUDGED: {named} against itself was INVALID in every trial"
    return f"OK: {named} against itself gets no more false answers than alpha allows"


def _serving(serving: TestedServing) -> list[str]:
    counts = serving["outcomes"]
    said = [
        f"serving: false PASS {_share(serving['false_pass'])}; false FAIL"
        f" {_share(serving['false_fail'])}; undecided, as it should be, {counts['INCONCLUSIVE']};"
        f" INVALID {counts['INVALID']}"
    ]
    why = next((trial["why"] for trial in serving["trials"] if trial["outcome"] == "INVALID"), None)
    said += [f"INVALID because: {one_line(why, 200)}"] if why else []
    if serving["noise_floor"] is None or serving["sd_log"] is None:
        return said
    said.append(
        f"noise floor: a serving saving of {percent(serving['noise_floor'])} can be"
        f" distinguished from 0 in {POWER:.0%} of cases"
        f" (a block's log-ratio has sd {percent(serving['sd_log'])})"
    )
    if serving["power"]:
        curve = ", ".join(f"{percent(saving)}: {chance:.0%}" for saving, chance in serving["power"])
        said.append(f"chance of PASS by true saving: {curve}")
    if serving["copies"] is not None and not serving["copies"][1] <= 0 <= serving["copies"][2]:
        mean, low, high = (percent(each, sign=True) for each in serving["copies"])
        said.append(
            f"the two loaded copies differ by {mean} [{low}, {high}]: some of that is in every"
            " reading here"
        )
    return said


def _share(answers: FalseRecord) -> str:
    if answers["ci"] is None:
        return "of none"
    low, high = answers["ci"]
    return f"{answers['count']} of {answers['n']} [{percent(low)}, {percent(high)}]"


def _quality(quality: TestedQuality) -> str:
    read = ", ".join(
        f"{one_line(key, 60)} {each['outcome']}" for key, each in quality["read"].items()
    )
    return f"quality: false FAIL {_share(quality['false'])}" + (
        f" ({read})" if read else "; the policy asks for none"
    )


def _training(training: TestedTraining | None) -> list[str]:
    if training is None:
        return [
            "training: not repeated (train=...), so that a release's training saving is a point"
            " estimate only"
        ]
    return [
        f"training: device-hours of {training['runs']} runs have sd of ln {training['sd_log']:.4f}"
        f" on {one_line(training['device'].get('name'), 60)}: savings up to"
        f" {percent(training['floor'])} cannot be distinguished from none"
    ]
