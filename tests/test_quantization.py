"""int8 and NF4 on the CPU: what is written, what is left alone, what is refused, and the reload that proves it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import LABELS, byte_tokenizer, saved, tiny
from safetensors import safe_open
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from pipeline.config import Format, Task
from pipeline.errors import StageFailed, UserError
from pipeline.models import load_model, save_model
from pipeline.quantization import backend, bnb
from pipeline.quantization.backend import quantize

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
KEY = "stages.small.format"


def llama(folder: Path) -> Path:
    return saved(tiny(Task.causal_lm), folder)


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, id2label=dict(enumerate(LABELS)), pad_token_id=0,
    )  # fmt: skip
    save_model(BertForSequenceClassification(config), byte_tokenizer(), folder)
    return folder


MODELS = {Task.causal_lm: llama, Task.sequence_classification: bert}
CASES = [
    (Format.int8, Task.causal_lm), (Format.nf4, Task.causal_lm), (Format.nf4, Task.sequence_classification),
]  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Format, Task], tuple[Path, Path, Any]]:
    """Every format of both models, once: source, result, and what quantizing said."""
    found = {}
    for fmt, task in CASES:
        folder = tmp_path_factory.mktemp(f"{fmt.value}-{task.value}")
        source = MODELS[task](folder / "source")
        found[fmt, task] = source, folder / "out", quantize(source, folder / "out", fmt, task, device=CPU, key=KEY)
    return found


@pytest.mark.parametrize(("fmt", "task"), CASES)
def test_every_linear_layer_of_the_body_is_stored_in_the_format_and_nothing_else(made, fmt: Format, task: Task) -> None:
    source, out, done = made[fmt, task]
    before, after = tensors(source), tensors(out)
    quantized = {f"{name}.weight" for name in done.quantized_layers}
    assert len(quantized) == (2 * 7 if task is Task.causal_lm else 2 * 6 + 1)  # q k v o gate up down; BERT's pooler
    stored = {Format.int8: torch.int8, Format.nf4: torch.uint8}[fmt]
    per_weight = {Format.int8: 1, Format.nf4: 2}[fmt]  # weights a byte holds
    for name, tensor in before.items():
        if name in quantized:
            assert after[name].dtype is stored
            assert after[name].numel() * per_weight == tensor.numel()
        else:
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    assert not [name for name in done.quantized_layers if "head" in name or "score" in name or "classifier" in name]
    assert done.bytes_after < done.bytes_before


@pytest.mark.parametrize(("fmt", "task"), CASES)
def test_stored_weights_are_the_source_within_half_a_step(made, fmt: Format, task: Task) -> None:
    """int8: one scale a row, its step 1/127 of the row's largest. NF4: the nearest of 16 levels, block by block."""
    source, out, done = made[fmt, task]
    before, after = tensors(source), tensors(out)
    name = f"{done.quantized_layers[0]}.weight"
    weight = before[name].float()
    if fmt is Format.int8:
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        half_precision = 2**-10 * weight.abs()  # the library reads weights in fp16
        assert ((after[name].float() * step - weight).abs() <= 0.5 * step + half_precision).all()
        return
    levels = after[f"{name}.quant_map"]
    blocks = weight.flatten().reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - levels).abs().argmin(dim=-1).flatten()
    packed = after[name].flatten()
    assert torch.equal(torch.stack([packed >> 4, packed & 15], dim=1).flatten().long(), nearest)


@pytest.mark.parametrize(("fmt", "task"), CASES[::2])
def test_a_program_without_this_package_loads_it_and_answers_the_same(made, fmt: Format, task: Task) -> None:
    _, out, _ = made[fmt, task]
    ids = [[5, 6, 7, 8]]
    auto = "AutoModelForCausalLM" if task is Task.causal_lm else "AutoModelForSequenceClassification"
    script = (
        f"import json, sys, torch, transformers; torch.set_num_threads({torch.get_num_threads()})\n"
        f"model = transformers.{auto}.from_pretrained({str(out)!r}).eval()\n"
        f"with torch.no_grad(): logits = model(input_ids=torch.tensor({ids})).logits\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'pipeline']\n"
        "print(json.dumps(logits.float().tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=out, capture_output=True, text=True, check=True)
    with torch.no_grad():
        ours = load_model(out, task, device=CPU)(input_ids=torch.tensor(ids)).logits
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), ours.float(), rtol=0, atol=0)


def test_the_fresh_process_program_imports_nothing_of_this_package() -> None:
    script = Path(backend.__file__).with_name("fresh_process.py")
    code = f"import runpy, sys; runpy.run_path({str(script)!r}); print([m for m in sys.modules if 'pipeline' in m])"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def flip_one_bit(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    save_model(model, tokenizer, folder)
    held = tensors(folder)
    name = next(name for name, tensor in held.items() if tensor.dtype is torch.uint8 and tensor.numel() > 1000)
    held[name].view(-1)[0] ^= 1
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_artifact_that_is_not_what_was_quantized_fails_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one 4-bit weight is enough."""
    monkeypatch.setattr(backend, "save_model", flip_one_bit)
    with pytest.raises(StageFailed, match="is not the model that was quantized: forward 1 of 3 differs"):
        quantize(llama(tmp_path / "source"), tmp_path / "out", Format.nf4, Task.causal_lm, device=CPU, key=KEY)


def test_the_model_is_saved_before_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU repacks NF4 weights at the first forward, the order is what keeps the artifact right."""
    order: list[str] = []
    for name in ("save_model", "take_reference"):
        original = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *a, _n=name, _f=original: (order.append(_n), _f(*a))[1])
    quantize(llama(tmp_path / "source"), tmp_path / "out", Format.nf4, Task.causal_lm, device=CPU, key=KEY)
    assert order == ["save_model", "take_reference"]


# -- refusals -------------------------------------------------------------------------------------------------------


def refused(
    source: Path, out: Path, fmt: Format = Format.int8, task: Task = Task.causal_lm, device: str = "cpu"
) -> str:
    with pytest.raises(UserError) as error:
        quantize(source, out, fmt, Task.causal_lm, device=device, key=KEY)
    assert error.value.key == KEY
    assert not out.exists()
    return str(error.value)


def test_what_is_quantized_already_is_refused(made, tmp_path: Path) -> None:
    _, out, _ = made[Format.int8, Task.causal_lm]
    assert "quantized already (bitsandbytes)" in refused(out, tmp_path / "out")


def test_a_model_for_another_task_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "source")
    (tmp_path / "source/model.safetensors").write_bytes(b"\0" * 8)
    assert "cannot do causal_lm" in refused(tmp_path / "source", tmp_path / "out")


def test_shapes_that_this_cpu_cannot_repack_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=259, n_embd=48, n_layer=1, n_head=2, n_positions=64)
    save_model(GPT2LMHeadModel(config), byte_tokenizer(), tmp_path / "source")
    monkeypatch.setattr(bnb, "cpu_repacks", lambda: True)
    said = refused(tmp_path / "source", tmp_path / "out", Format.nf4)
    assert "nf4 on this CPU needs inputs in multiples of 64 and outputs in multiples of 32" in said
    assert "c_attn (48 -> 144)" in said


def test_a_missing_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "find_spec", lambda name: None)
    said = refused(llama(tmp_path / "source"), tmp_path / "out")
    assert "needs bitsandbytes, which is not installed" in said
    assert "pip install" in said


def test_a_device_that_the_library_does_not_know_is_refused(tmp_path: Path) -> None:
    assert "cannot compute int8 on meta" in refused(llama(tmp_path / "source"), tmp_path / "out", device="meta")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    (source / "model.safetensors").unlink()
    assert "has no weights (*.safetensors)" in refused(source, tmp_path / "out")
