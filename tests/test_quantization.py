"""Quantizing on the CPU: what is written, what is left alone, what is refused, and the reload that
proves it.
"""

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
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.errors import StageFailed, UserError
from pipeline.models.load import load_model, save_model
from pipeline.quantization import ao, backend, bnb
from pipeline.quantization.backend import LIBRARIES, formats, quantize, why_not
from pipeline.quantization.layers import Choice, abbreviate
from pipeline.quantization.reload_check import PROGRAM, Reference, request_for
from pipeline.tasks.table import Task

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
KEY = "stages.small.format"


def llama(folder: Path) -> Path:
    return saved(tiny(Task.causal_lm), folder)


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABELS)),
        pad_token_id=0,
    )
    save_model(BertForSequenceClassification(config), byte_tokenizer(), folder)
    return folder


MODELS = {Task.causal_lm: llama, Task.sequence_classification: bert}
CASES = [
    (Format.int8, Task.causal_lm),
    (Format.nf4, Task.causal_lm),
    (Format.nf4, Task.sequence_classification),
]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[Format, Task], tuple[Path, Path, Any]]:
    """Every format of both models, once: source, result, and what quantizing said. Reloads have
    tests of their own.
    """
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "check_bit_equal", lambda *_, **__: None)
        for fmt, task in CASES:
            folder = tmp_path_factory.mktemp(f"{fmt.value}-{task.value}")
            source = MODELS[task](folder / "source")
            found[fmt, task] = (
                source,
                folder / "out",
                quantize(source, folder / "out", fmt, task, device=CPU, key=KEY),
            )
    return found


@pytest.mark.parametrize(("fmt", "task"), CASES)
def test_every_linear_layer_of_the_body_is_stored_in_the_format_and_nothing_else(
    made, fmt: Format, task: Task
) -> None:
    source, out, done = made[fmt, task]
    before, after = tensors(source), tensors(out)
    quantized = {f"{name}.weight" for name in done.quantized_layers}
    # q k v o gate up down; BERT's pooler
    assert len(quantized) == (2 * 7 if task is Task.causal_lm else 2 * 6 + 1)
    stored = {Format.int8: torch.int8, Format.nf4: torch.uint8}[fmt]
    per_weight = {Format.int8: 1, Format.nf4: 2}[fmt]  # weights a byte holds
    for name, tensor in before.items():
        if name in quantized:
            assert after[name].dtype is stored
            assert after[name].numel() * per_weight == tensor.numel()
        else:
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    assert not [
        name
        for name in done.quantized_layers
        if "head" in name or "score" in name or "classifier" in name
    ]
    assert done.bytes_after < done.bytes_before


@pytest.mark.parametrize(("fmt", "task"), CASES)
def test_stored_weights_are_the_source_within_half_a_step(made, fmt: Format, task: Task) -> None:
    """int8: one scale a row, its step 1/127 of the row's largest. NF4: the nearest of 16 levels,
    block by block.
    """
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


@pytest.mark.parametrize(
    ("fmt", "task"), [pytest.param(*CASES[0], marks=pytest.mark.slow), CASES[2]]
)
@pytest.mark.slow
def test_a_program_without_this_package_loads_it_and_answers_the_same(
    made, fmt: Format, task: Task
) -> None:
    _, out, _ = made[fmt, task]
    ids = [[5, 6, 7, 8]]
    auto = (
        "AutoModelForCausalLM" if task is Task.causal_lm else "AutoModelForSequenceClassification"
    )
    script = (
        f"import json, sys, torch, transformers; torch.set_num_threads({torch.get_num_threads()})\n"
        f"model = transformers.{auto}.from_pretrained({str(out)!r}).eval()\n"
        f"with torch.no_grad(): logits = model(input_ids=torch.tensor({ids})).logits\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'pipeline']\n"
        "print(json.dumps(logits.float().tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=out, capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        ours = load_model(out, task, device=CPU)(input_ids=torch.tensor(ids)).logits
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), ours.float(), rtol=0, atol=0)


def test_the_fresh_process_program_imports_nothing_of_this_package() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({str(PROGRAM)!r}); print([m for m in sys.modules if"
        " 'pipeline' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def flip_one_bit(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    save_model(model, tokenizer, folder)
    held = tensors(folder)
    name = next(
        name
        for name, tensor in held.items()
        if tensor.dtype is torch.uint8 and tensor.numel() > 1000
    )
    held[name].view(-1)[0] ^= 1
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_artifact_that_is_not_what_was_quantized_fails_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one 4-bit weight is enough."""
    monkeypatch.setattr(backend, "save_model", flip_one_bit)
    with pytest.raises(
        StageFailed, match="is not the model that was quantized: forward 1 of 3 differs"
    ):
        quantize(
            llama(tmp_path / "source"),
            tmp_path / "out",
            Format.nf4,
            Task.causal_lm,
            device=CPU,
            key=KEY,
        )


@pytest.mark.usefixtures("unchecked")
def test_the_model_is_saved_before_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the CPU repacks NF4 weights at the first forward, the order is what keeps the artifact
    right.
    """
    order: list[str] = []
    for name in ("save_model", "take_reference"):
        original = getattr(backend, name)
        monkeypatch.setattr(
            backend, name, lambda *a, _n=name, _f=original: (order.append(_n), _f(*a))[1]
        )
    quantize(
        llama(tmp_path / "source"),
        tmp_path / "out",
        Format.nf4,
        Task.causal_lm,
        device=CPU,
        key=KEY,
    )
    assert order == ["save_model", "take_reference"]


# -- every format ---------------------------------------------------------------------------------

HERE = [fmt for fmt in formats() if why_not(fmt, CPU) is None and fmt not in SIXTEEN_BITS]


def small_llama(folder: Path, *, tied: bool, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    save_model(LlamaForCausalLM(config).to(dtype), byte_tokenizer(), folder)
    return folder


def test_all_formats_that_need_no_gpu_work_here() -> None:
    assert set(formats()) - set(HERE) == {
        Format.int4_weight_only,
        Format.float8_dynamic,
        *SIXTEEN_BITS,
    }


def round_trip(folder: Path, fmt: Format, *, tied: bool, dtype: torch.dtype) -> None:
    """What `quantize` itself proves, with an untied head quantized where that is possible."""
    source = small_llama(folder / "source", tied=tied, dtype=dtype)
    head = not tied
    done = quantize(
        source, folder / "out", fmt, Task.causal_lm, device=CPU, key=KEY, choice=Choice(head=head)
    )
    assert len(done.logits_sha256) == 3
    assert ("lm_head" in done.quantized_layers) is head
    assert len(done.quantized_layers) == 2 * 7 + head
    assert done.rest_dtype == str(dtype).removeprefix("torch.")


def test_a_head_apart_under_a_configuration_that_ties_it_can_be_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "check_bit_equal", lambda *_, **__: None)
    source = small_llama(tmp_path / "source", tied=False, dtype=torch.float32)
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    done = quantize(
        source,
        tmp_path / "out",
        Format.nf4,
        Task.causal_lm,
        device=CPU,
        key=KEY,
        choice=Choice(head=True),
    )
    assert "lm_head" in done.quantized_layers
    assert done.parameters == sum(
        tensor.numel() for tensor in load_file(source / "model.safetensors").values()
    )
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


@pytest.mark.slow
def test_every_format_is_the_same_to_the_bit_after_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, dtype of the source and tied heads in turn, all reloaded in one fresh process.

    `-m slow` has every combination in a process of its own, as `quantize` does it.
    """
    asked: list[tuple[Format, dict[str, Any], tuple[str, ...]]] = []

    def collect(
        folder: Path, task: Task, reference: Reference, *, device: torch.device | str
    ) -> None:
        asked.append((fmt, request_for(folder, task, reference, device=device), reference.digests))

    monkeypatch.setattr(backend, "check_bit_equal", collect)
    for place, fmt in enumerate(HERE):
        dtype = (torch.float32, torch.bfloat16)[place % 2]
        round_trip(tmp_path / fmt.value, fmt, tied=place // 2 % 2 == 0, dtype=dtype)
    assert [fmt for fmt, *_ in asked] == HERE
    script = f"import json, runpy, sys; main = runpy.run_path({str(PROGRAM)!r})['main']; "
    script += "[main(request) for request in json.load(sys.stdin)]"
    requests = json.dumps([request for _, request, _ in asked])
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        input=requests,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [digests for *_, digests in asked]


@pytest.mark.slow
@pytest.mark.parametrize("fmt", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_every_format_dtype_and_head_is_the_same_to_the_bit_after_a_reload(
    tmp_path: Path, fmt: Format, dtype: torch.dtype, tied: bool
) -> None:
    round_trip(tmp_path, fmt, tied=tied, dtype=dtype)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the fresh process where a test is about something else."""
    monkeypatch.setattr(backend, "check_bit_equal", lambda *_, **__: None)


# -- which layers ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fmt", [Format.nf4, Format.int8_weight_only])
def test_patterns_say_which_layers_are_quantized_and_the_others_are_listed(
    tmp_path: Path, fmt: Format
) -> None:
    choice = Choice(include=("*.mlp.*",), exclude=("model.layers.1.*up_proj",))
    source = small_llama(tmp_path / "source", tied=True, dtype=torch.float32)
    done = quantize(
        source, tmp_path / "out", fmt, Task.causal_lm, device=CPU, key=KEY, choice=choice
    )
    assert sorted(done.quantized_layers) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
    ]
    assert set(done.kept_layers) == {
        "model.layers.1.mlp.up_proj",
        "lm_head",
        *(f"model.layers.{block}.self_attn.{name}_proj" for block in (0, 1) for name in "qkvo"),
    }
    held = tensors(tmp_path / "out")
    assert held["model.layers.1.mlp.up_proj.weight"].dtype is torch.float32


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (
            Choice(include=("*.mpl.*",)),
            "stages.small.include: '*.mpl.*' matches no linear layer of the body",
        ),
        (
            Choice(exclude=("lm_head",)),
            "stages.small.exclude: 'lm_head' matches no linear layer of the body",
        ),
        (Choice(exclude=("*",)), "stages.small.exclude: no layer is left to quantize"),
        (Choice(head=True), "stages.small.quantize_head: the model's head is its embedding"),
    ],
)
def test_choices_that_leave_nothing_to_do_are_refused(
    tmp_path: Path, choice: Choice, said: str
) -> None:
    source = small_llama(tmp_path / "source", tied=True, dtype=torch.float32)
    with pytest.raises(UserError) as error:
        quantize(
            source,
            tmp_path / "out",
            Format.int8,
            Task.causal_lm,
            device=CPU,
            key=KEY,
            choice=choice,
        )
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_library_that_passes_over_a_layer_fails_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchao leaves layers alone that it cannot take, and says so in no error."""
    load = ao.load_quantized
    monkeypatch.setattr(
        ao,
        "load_quantized",
        lambda *args, keep, **more: load(*args, keep=[*keep, "model.layers.0.mlp.up_proj"], **more),
    )
    source = small_llama(tmp_path / "source", tied=True, dtype=torch.float32)
    with pytest.raises(
        StageFailed, match=r"other layers than planned, among them model\.layers\.0\.mlp\.up_proj"
    ):
        quantize(
            source, tmp_path / "out", Format.int8_weight_only, Task.causal_lm, device=CPU, key=KEY
        )


def test_long_lists_of_names_are_cut() -> None:
    assert abbreviate([]) == "none"
    assert abbreviate(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"


# -- known faults of the libraries, where this CPU can show them ----------------------------------


def bitsandbytes_llama(source: Path, task: Task = Task.causal_lm) -> Any:
    return bnb.load_quantized(
        source, Format.nf4, task, device=CPU, rest_dtype=torch.float32, keep=["lm_head"]
    )


@pytest.fixture
def repacking() -> None:
    if not bnb.cpu_repacks():
        pytest.skip("this CPU has no AVX512_BF16: bitsandbytes does not repack 4-bit weights on it")


@pytest.mark.usefixtures("repacking")
def test_nf4_saved_after_a_forward_is_another_model(tmp_path: Path) -> None:
    """Why the model is saved first: the day this fails, the library is mended and the order is
    free.
    """
    model = bitsandbytes_llama(small_llama(tmp_path / "source", tied=True, dtype=torch.float32))
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    model.save_pretrained(tmp_path / "after")
    before, after = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    scales = [name for name in before if name.endswith("absmax")]
    assert scales
    assert any(not torch.equal(before[name], after[name]) for name in scales)


@pytest.mark.usefixtures("repacking")
def test_nf4_of_other_widths_crashes_in_the_library_and_is_refused_by_name_here(
    tmp_path: Path,
) -> None:
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=688,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    save_model(LlamaForCausalLM(config), byte_tokenizer(), tmp_path / "source")
    with pytest.raises((RuntimeError, AssertionError), match="divisible"), torch.no_grad():
        bitsandbytes_llama(tmp_path / "source")(input_ids=torch.tensor([[5, 6, 7, 8]]))
    assert "mlp.gate_proj (64 -> 688) and 2 more" in refused(
        tmp_path / "source", tmp_path / "out", Format.nf4
    )


# -- refusals -------------------------------------------------------------------------------------


def refused(
    source: Path,
    out: Path,
    fmt: Format = Format.int8,
    task: Task = Task.causal_lm,
    device: str = "cpu",
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


def test_shapes_that_this_cpu_cannot_repack_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert "cannot compute int8 on meta" in refused(
        llama(tmp_path / "source"), tmp_path / "out", device="meta"
    )


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    (source / "model.safetensors").unlink()
    assert "has no weights (*.safetensors)" in refused(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("fmt", "device", "capability", "said"),
    [
        (Format.int4_weight_only, "cpu", None, "no kernel for int4_weight_only on a CPU"),
        (Format.float8_dynamic, "cpu", None, "no kernel for float8_dynamic on a CPU"),
        (
            Format.float8_dynamic,
            "cuda",
            (8, 0),
            "float8_dynamic needs compute capability 8.9 and Some GPU has 8.0",
        ),
        (Format.int4_weight_only, "cuda", (7, 5), "int4_weight_only needs compute capability 8.0"),
        (Format.int8_weight_only, "mps", None, "known to work on cuda and cpu, not on mps"),
    ],
)
def test_what_a_device_cannot_do_is_refused_by_name(
    fmt: Format,
    device: str,
    capability: tuple[int, int] | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    assert said in (why_not(fmt, torch.device(device)) or "")
    with pytest.raises(UserError, match=r"stages\.small\.format"):
        ao.refuse_device(fmt, device=torch.device(device), key=KEY)


def test_a_missing_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ao, "find_spec", lambda name: None)
    assert "needs torchao, which is not installed" in (why_not(Format.int8_weight_only, CPU) or "")


def test_torchao_refuses_layers_it_would_pass_over(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=259, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    save_model(GPT2LMHeadModel(config), byte_tokenizer(), tmp_path / "source")
    said = refused(tmp_path / "source", tmp_path / "out", Format.int8_weight_only)
    assert (
        "torchao takes torch.nn.Linear alone, and transformer.h.0.attn.c_attn is a Conv1D" in said
    )


@pytest.mark.parametrize(
    ("fmt", "shape", "said"),
    [
        (
            Format.int4_weight_only,
            (192, 64),
            "inputs in multiples of 128, unlike a (192 -> 64) and 1 more",
        ),
        (
            Format.float8_dynamic,
            (64, 40),
            "inputs and outputs in multiples of 16, unlike a (64 -> 40) and 1 more",
        ),
    ],
)
def test_shapes_that_a_kernel_cannot_take_are_refused(
    fmt: Format, shape: tuple[int, int], said: str
) -> None:
    from pipeline.quantization.layers import Layer

    with pytest.raises(UserError) as error:
        ao.refuse_layers(
            [Layer("a", *shape), Layer("b", *shape), Layer("c", 128, 64)], fmt, device=CPU, key=KEY
        )
    assert said in str(error.value)
    assert "stages.small.exclude" in str(error.value)


def test_every_format_has_a_library() -> None:
    assert set(LIBRARIES) | {Format.auto} == set(Format)
