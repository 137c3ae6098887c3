"""The card of a model: what it says is what its run says, it is in no digest, and nobody's file is
lost to it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from pipeline.config.settings.cost import CostConfig
from pipeline.errors import UserError
from pipeline.ledger.cost import NO_CO2, check_cost, emissions_g
from pipeline.ledger.values import declared, measured, null
from pipeline.report.model_card import CardFacts, model_card
from pipeline.runs.receipts.cards import _on_hub, facts_of_card, parameters_in, write_cards
from pipeline.runs.receipts.receipt import make_receipt, read_kept
from pipeline.store.artifacts import (
    CARD,
    CARD_MARK,
    GIVEN_CARD,
    Artifact,
    Store,
    copy_model,
    digest_folder,
    facts_of,
)
from pipeline.store.remote import download, upload

EVIL = "<script>alert(1)</script>|`*_[x](y)\x1b[2J\r\n\u202e: {a: b}"


def row_of(folder: Path, arm: str) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    return next(row for row in result["rows"] if row["arm"] == arm)


@pytest.fixture
def facts(receipted: Path) -> CardFacts:
    """What the card of the student says."""
    kept = read_kept(receipted)
    row: Any = row_of(receipted, "student")
    artifact = Artifact.from_json(row["artifact"])
    return facts_of_card(kept, make_receipt(kept), "0" * 64, row, artifact)


def test_every_model_of_a_run_has_a_card_that_the_hubs_own_library_reads(receipted: Path) -> None:
    for arm in ("teacher", "student"):
        row = row_of(receipted, arm)
        folder = Path(row["artifact"]["path"])
        card = ModelCard.load(folder / CARD)
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "text-generation"
        told = {each.metric_type: each for each in card.data.eval_results or []}
        assert "bits_per_byte" in told
        for key, each in told.items():
            figure = row["quality"][key]
            assert each.metric_value == figure["value"]
            assert each.metric_args == {
                "confidence_interval_95": figure["ci"],
                "documents": figure["n"],
            }
            assert each.dataset_split == "test"
        receipt = (receipted / "receipt.json").read_bytes()
        assert hashlib.sha256(receipt).hexdigest() in card.text
        assert row["artifact"]["digest"] in card.text
        assert str(receipted.parents[2]) not in (folder / CARD).read_text()  # no path of a machine
        assert card.data.to_dict().get("license") is None  # nobody told
        assert "co2_eq_emissions" not in card.data.to_dict()


def test_the_chain_costs_what_artifact_json_is_charged_with(
    receipted: Path, facts: CardFacts
) -> None:
    """Two accounts of one chain: the gate's, and the card's."""
    charge = facts_of(Path(row_of(receipted, "student")["artifact"]["path"]))["charge"]
    assert [each.arm for each in facts.chain] == ["teacher", "student"]
    assert facts.hours[0] == pytest.approx(charge["work_device_hours"])
    assert facts.flops.value == pytest.approx(charge["model_flops"])
    assert facts.energy_j.value is None  # a CPU has no counter
    assert "energy is not known: " in model_card(facts)


def test_parameters_are_counted_in_the_files_of_weights(receipted: Path, tmp_path: Path) -> None:
    folder = Path(row_of(receipted, "student")["artifact"]["path"])
    weights = load_file(folder / "model.safetensors")
    assert parameters_in(folder) == sum(each.numel() for each in weights.values())
    for content in (b"", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"\x01" + b"\0" * 7):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert parameters_in(tmp_path) in (None, 0)
    assert parameters_in(tmp_path / "nothing") is None


def test_co2_is_shown_only_where_its_intensity_is_declared(facts: CardFacts) -> None:
    kwh = measured(3.6e6)
    said = CostConfig(co2_g_per_kwh=300.0, co2_source="grid")
    assert emissions_g(kwh, said) == declared(300.0)
    assert emissions_g(kwh, replace(said, pue=1.2)).value == pytest.approx(360.0)
    assert emissions_g(kwh, CostConfig()) == null(NO_CO2)
    assert emissions_g(null("no counter"), said).why_missing == "no counter"
    assert "co2_eq_emissions" not in model_card(facts)
    card = ModelCard(model_card(replace(facts, emissions_g=declared(360.0), emissions_source="g")))
    told = card.data.to_dict()["co2_eq_emissions"]
    assert (told["emissions"], told["source"]) == (360.0, "g")


@pytest.mark.parametrize(
    ("cost", "key"),
    [
        ({"co2_g_per_kwh": 300.0}, "cost.co2_source"),
        ({"co2_g_per_kwh": 300.0, "co2_source": " "}, "cost.co2_source"),
        ({"co2_source": "grid"}, "cost.co2_g_per_kwh"),
        ({"co2_g_per_kwh": float("nan"), "co2_source": "grid"}, "cost.co2_g_per_kwh"),
    ],
)
def test_co2_that_nobody_vouches_for_is_refused(cost: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_cost(CostConfig(**cost))


def test_what_others_chose_is_shown_as_text(facts: CardFacts) -> None:
    evil = replace(
        facts,
        name=EVIL,
        arm=EVIL,
        recipe=EVIL,
        architecture=EVIL,
        given={EVIL: EVIL},
        device=EVIL,
        limits=[EVIL],
        data={**facts.data, "name": EVIL},
        chain=[replace(facts.chain[0], arm=EVIL, reads={EVIL: EVIL}, type=EVIL)],
        hub_data=EVIL,
        emissions_g=declared(1.0),
        emissions_source=EVIL,
    )
    text = model_card(evil)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text.replace("\n", ""))
    body = ModelCard(text).text
    outside = re.sub(r"`[^`]*`", "", body.replace("\\`", ""))
    assert not re.search(r"(?<!\\)<script", outside)
    plain = model_card(facts)
    tables = lambda shown: [line.count(" | ") for line in shown.splitlines() if line[:2] == "| "]
    assert {*tables(ModelCard(plain).text)} == {
        *(re.sub(r"\\\|", "", line).count(" | ") for line in body.splitlines() if line[:2] == "| ")
    }


# -- in no digest ---------------------------------------------------------------------------------


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        file = path / name.replace("__", "/").replace("_md", ".md")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return path


def test_a_card_of_ours_is_in_no_digest_and_any_other_readme_is(tmp_path: Path) -> None:
    bare = digest_folder(folder_with(tmp_path / "a", weights="x"))
    ours = folder_with(tmp_path / "b", weights="x", README_md=f"{CARD_MARK}a: b\n---\n")
    assert digest_folder(ours) == bare
    for name, text in {
        "README_md": "---\nlicense: mit\n---\n",
        "sub__README_md": f"{CARD_MARK}---\n",
        "README_txt": CARD_MARK,
    }.items():
        other = folder_with(tmp_path / name, weights="x", **{name: text})
        assert digest_folder(other) != bare


def test_a_readme_of_somebody_else_is_neither_overwritten_nor_copied_over(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with store.scratch() as out:
        (out / "weights").write_text("x")
        (out / CARD).write_text("mine")
        theirs = store.commit(out, "model", {})
    assert not store.put_card(theirs, f"{CARD_MARK}---\n")
    assert (theirs.path / CARD).read_text() == "mine"
    copied = tmp_path / "copied"
    copied.mkdir()
    copy_model(theirs.path, copied)
    assert (copied / GIVEN_CARD).read_text() == "mine"
    assert not (copied / CARD).exists()
    with store.scratch() as out:
        copy_model(theirs.path, out)
        ours = store.commit(out, "model", {})
    assert store.put_card(ours, f"{CARD_MARK}first: 1\n---\n")
    assert store.put_card(ours, f"{CARD_MARK}second: 2\n---\n")  # a later one takes its place
    assert "second" in (ours.path / CARD).read_text()
    assert store.find(ours.digest) == ours
    again = tmp_path / "again"
    again.mkdir()
    copy_model(ours.path, again)  # a card speaks of one model
    assert sorted(each.name for each in again.iterdir()) == [GIVEN_CARD, "weights"]
    elsewhere = replace(ours, path=copied)
    assert not store.put_card(elsewhere, f"{CARD_MARK}---\n")  # folders of others are left alone


def test_a_card_travels_with_its_artifact(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    with here.scratch() as out:
        (out / "config.json").write_text("{}")
        artifact = here.commit(out, "model", {})
    here.put_card(artifact, f"{CARD_MARK}---\n\n# one\n")
    upload(artifact, str(tmp_path / "remote"))
    got = download(str(tmp_path / "remote"), artifact.digest, there)
    assert got.digest == artifact.digest
    assert (got.path / CARD).read_text() == (artifact.path / CARD).read_text()
    here.put_card(artifact, f"{CARD_MARK}---\n\n# two\n")
    upload(artifact, str(tmp_path / "remote"))
    assert "two" in (tmp_path / "remote" / artifact.digest / CARD).read_text()


def test_a_model_that_was_reused_keeps_the_card_of_the_run_that_made_it(
    receipted: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(receipted.parents[1], tmp_path / "mlruns", symlinks=True))
    store, kept = Store(root / "store"), read_kept(root / "runs" / receipted.name)
    for row in kept.result["rows"]:
        assert row["artifact"] is not None
        row["artifact"]["path"] = str(store.root / "artifacts" / row["artifact"]["digest"])
    reused = {**kept.result["rows"][0], "reused": "run-0"}
    made = kept.result["rows"][1]
    card = lambda row: Path(row["artifact"]["path"]) / CARD
    before = card(reused).read_text()
    kept.result["rows"] = [reused, made]
    receipt = make_receipt(kept)
    assert write_cards(kept, receipt, "f" * 64, store) == []
    assert card(reused).read_text() == before
    assert "f" * 64 in card(made).read_text()
    card(reused).unlink()
    assert write_cards(kept, receipt, "e" * 64, store) == []
    assert "spent by run" in card(reused).read_text()
    card(made).write_text("theirs")
    assert write_cards(kept, receipt, "d" * 64, store) == ["student"]


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("org/name@main", "org/name"),
        ("./folder/model", None),
        ("/abs/model", None),
        ("~/model", None),
        ("model", None),
        ("", None),
        (None, None),
    ],
)
def test_folders_of_a_machine_are_no_names_of_the_hub(name: str | None, hub: str | None) -> None:
    assert _on_hub(name) == hub


def test_a_folder_that_is_there_is_none_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my/model").mkdir(parents=True)
    assert _on_hub("my/model") is None


def test_weights_that_cannot_be_counted_are_said_to_be_unknown(
    monkeypatch: pytest.MonkeyPatch, receipted: Path
) -> None:
    monkeypatch.setattr("pipeline.runs.receipts.cards.parameters_in", lambda _: None)
    kept = read_kept(receipted)
    row: Any = row_of(receipted, "student")
    artifact = Artifact.from_json(row["artifact"])
    said = facts_of_card(kept, make_receipt(kept), "0" * 64, row, artifact)
    assert "| numbers in its weights | unknown |" in model_card(said)
