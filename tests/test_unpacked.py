"""Models that would read from one packed document into the next: a document a row, tokens alone,
and the same loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from here import here
from make_assess_models import byte_tokenizer
from test_run import TINY

from pipeline.config.settings.precision import Precision
from pipeline.data.batches import PackedBatches
from pipeline.data.documents import Document
from pipeline.data.encode import encode_all
from pipeline.distillation.losses import Loss
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import save_model
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import Examined, examine

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE: dict[str, Any] = {
    **SIZES,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
KINDS: dict[str, Any] = {
    "states": lambda: transformers.Mamba2Config(
        **SIZES,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=32,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "no positions": lambda: transformers.BloomConfig(**SIZES, hidden_size=64, n_layer=2, n_head=2),
    "learnt positions, no mask": lambda: transformers.OpenAIGPTConfig(
        **SIZES, n_embd=64, n_layer=2, n_head=2, n_positions=128
    ),
    "positions from 2 on": lambda: transformers.CamembertConfig(
        **{**WIDE, "pad_token_id": 1}, is_decoder=True, max_position_embeddings=130
    ),
    "another offset": lambda: transformers.Data2VecTextConfig(
        **WIDE, is_decoder=True, max_position_embeddings=130
    ),
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]()).float().eval()
    with torch.no_grad():  # positions that are still small would hardly be seen
        for name, parameter in model.named_parameters():
            if "position" in name:
                parameter.mul_(20)
    return model


def batch_of(texts: list[str], length: int, *, apart: bool) -> dict[str, torch.Tensor]:
    documents = [Document(text) for text in texts]
    encoded = encode_all(documents, byte_tokenizer(), Task.causal_lm, max_length=0)
    rows = PackedBatches(encoded, sequence_length=length, batch_size=1, seed=0, apart=apart)
    return rows.read(np.arange(rows.num_rows))


def plain_loss(model: Any, texts: list[str], length: int) -> float:
    """Return the mean loss of texts, each cut into stretches that know nothing of one another, by
    the model alone.
    """
    losses: list[torch.Tensor] = []
    for text in texts:
        [encoded] = encode_all([Document(text)], byte_tokenizer(), Task.causal_lm, max_length=0)
        ids = torch.from_numpy(encoded.input_ids).long()
        for start in range(0, len(ids) - 1, length):
            part, following = ids[start : start + length], ids[start + 1 : start + length + 1]
            logits = model(input_ids=part[None]).logits[0, : len(following)].double()
            losses.append(F.cross_entropy(logits, following, reduction="none"))
    return float(torch.cat(losses).mean())


TEXTS = ["a mill by the river", "grain", "stones turn slowly, and the wheel turns with them", "x y"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_each_document_as_it_is_scored_and_served(kind: str) -> None:
    model = made(kind)
    own = examine(model, CPU)
    assert not own.packs
    objective = Objective(model, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), read=own)
    with torch.no_grad():
        found = objective(batch_of(TEXTS, 16, apart=True))
        assert float(found.loss) == pytest.approx(plain_loss(model, TEXTS, 16), rel=1e-5)
        taken_at_its_word = Objective(
            model, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), read=Examined(own.head)
        )
        if kind.startswith(("states", "positions", "another")):
            packed = taken_at_its_word(batch_of(TEXTS, 16, apart=False))
            assert abs(float(packed.loss) - float(found.loss)) > 1e-4


def test_a_teacher_that_packs_teaches_a_student_that_does_not() -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**WIDE, num_key_value_heads=2)
    teacher, student = transformers.LlamaForCausalLM(config).eval(), made("states")
    theirs, ours = examine(teacher, CPU), examine(student, CPU)
    assert (theirs.packs, ours.packs) == (True, False)
    taught = Teacher(teacher, Precision.fp32, Loss(0.0), theirs)
    clock = PhaseClock()
    objective = Objective(student, Task.causal_lm, Precision.fp32, CPU, clock, taught, read=ours)
    with torch.no_grad():
        found = objective(batch_of(TEXTS, 64, apart=True))
        kl, count = 0.0, 0
        for text in TEXTS:
            [encoded] = encode_all([Document(text)], byte_tokenizer(), Task.causal_lm, max_length=0)
            ids = torch.from_numpy(encoded.input_ids).long()[None]
            p, q = (
                F.log_softmax(each(input_ids=ids).logits[0, :-1].double(), -1)
                for each in (teacher, student)
            )
            kl += float((p.exp() * (p - q)).sum())
            count += ids.shape[1] - 1
    assert float(found.loss) == pytest.approx(kl / count, rel=1e-4)


def test_rows_of_one_document_hold_all_of_it_once() -> None:
    batch = batch_of(["abcdefghij" * 3, "k"], 16, apart=True)
    read = [
        row[:size].tolist()
        for row, size in zip(batch["input_ids"], batch["lengths"].tolist(), strict=True)
    ]
    documents = [Document("abcdefghij" * 3), Document("k")]
    [long, short] = encode_all(documents, byte_tokenizer(), Task.causal_lm, max_length=0)
    whole = [*long.input_ids.tolist(), *short.input_ids.tolist()]
    assert sorted(token for row in read for token in row) == sorted(whole)
    targets = int((batch["labels"] != -100).sum())
    assert targets == len(long.input_ids) + len(short.input_ids) - 2


def test_a_model_that_looks_ahead_is_refused() -> None:
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**WIDE, is_decoder=False)).eval()
    with pytest.raises(UserError, match="BertLMHeadModel reads later tokens of a row"):
        examine(model, CPU)


@pytest.mark.slow
def test_such_a_model_is_distilled_from_a_cache_and_live_and_says_how_it_reads(
    tmp_path: Path,
) -> None:
    save_model(made("states"), byte_tokenizer(), tmp_path / "teacher")
    (tmp_path / "d.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{'the wheel turns ' * (1 + number % 4)}{number}"}) + "\n"
            for number in range(120)
        )
    )
    common = [
        f"model.path={tmp_path / 'teacher'}",
        f"data.path={tmp_path / 'd.jsonl'}",
        "tracking=off",
        *(each for each in TINY if not each.startswith(("model.", "data.", "training.steps"))),
        "stages.teacher.steps=3",
        "stages.student.steps=3",
        "stages.student.allow_weak_teacher=true",
    ]
    for recipe in ("distill", "distill_cached"):
        done = here(tmp_path, f"recipe={recipe}", *common)
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "mlruns/latest/result.json").read_text())
        assert all(row["status"] == "FINISHED" for row in result["rows"])
        assert any("each has rows of its own" in note for note in result["environment"]["notes"])
    done = here(tmp_path, "recipe=distill", *common, "stages.student.on_policy=0.5")
    assert done.returncode == 1
    assert "stages.student.on_policy: Mamba2ForCausalLM takes no positions" in done.stderr
