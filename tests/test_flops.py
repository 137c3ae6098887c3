"""FLOPs against counts by hand (2 per multiply-add) and against 6N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from make_assess_models import SHAPE, encoded, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.data.batches import PackedBatches, PaddedBatches
from pipeline.data.padding import Padding
from pipeline.ledger.flops import FlopsPerSequence, count_flops, six_n, suspicion
from pipeline.stages.step_flops import StepFlops
from pipeline.tasks.table import Task


def llama_forward(length: int, vocabulary: int) -> int:
    """Multiply-adds of a Llama of `SHAPE` by hand, times two."""
    hidden, wide = SHAPE.hidden_size, SHAPE.intermediate_size
    linear = SHAPE.layers * (4 * hidden * hidden + 3 * hidden * wide) + hidden * vocabulary
    # scores and their use, per token, full attention
    attention = SHAPE.layers * 2 * hidden * length
    return 2 * length * (linear + attention)


@pytest.mark.parametrize("length", [16, 100, 1024])
def test_a_llama_by_hand(length: int) -> None:
    model = tiny(Task.causal_lm)
    forward = count_flops(model.config, Task.causal_lm, backward=False)(length)
    # angles: positions x inverse frequencies
    rotary = 2 * length * (SHAPE.hidden_size // SHAPE.heads // 2)
    assert forward - llama_forward(length, 259) in (0, rotary)
    both = count_flops(model.config, Task.causal_lm, backward=True)(length)
    assert both == pytest.approx(3 * forward, rel=1e-3)  # the backward pass is twice the forward


# -- what is trained decides the backward pass ----------------------------------------------------
# width, mlp, layers, vocabulary, tokens, predicted, rank of an adapter
H, M, L, V, T, K, R = 64, 96, 4, 128, 20, 7, 4
PROJECTION = 2 * T * H * H  # q, k, v or o of a layer
MLP = 3 * 2 * T * H * M
ATTENTION = 2 * 2 * T * T * H  # scores, and their use
LAYER = 4 * PROJECTION + MLP + ATTENTION
HEAD = 2 * K * H * V
FORWARD = L * LAYER + HEAD


class ByHand(int):
    """FLOPs by hand; transformers releases that multiply positions with frequencies as matrices
    count those too.
    """

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, float)
        return other - int(self) in (0, 2 * T * (H // 2 // 2))

    __hash__ = int.__hash__


def llama() -> Any:
    """Return a small Llama whose head is not tied."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=H,
            intermediate_size=M,
            num_hidden_layers=L,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=H, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def bert() -> Any:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=V,
            hidden_size=H,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=M,
        )
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_it_is_what_torchs_counter_sees_of_the_real_model(
    make: Callable[[], Any], backward: bool
) -> None:
    model = make().eval()
    model.set_attn_implementation("eager")
    task = Task.sequence_classification if make is bert else Task.causal_lm
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(input_ids=torch.zeros(1, 40, dtype=torch.long)).logits
        if backward:
            logits.sum().backward()
    assert count_flops(model, task, backward=backward)(40) == counter.get_total_flops()


def freeze(model: Any, keep: Callable[[str], bool]) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(keep(name))
    return model


def counted(model: Any) -> float:
    return count_flops(model, Task.causal_lm, backward=True)(T, K)


def test_all_trained_is_three_forward_passes() -> None:
    assert counted(llama()) == ByHand(3 * FORWARD)
    assert count_flops(llama(), Task.causal_lm, backward=False)(T, K) == ByHand(FORWARD)


def test_all_frozen_but_the_head() -> None:
    model = freeze(llama(), lambda name: name.startswith("lm_head"))
    assert counted(model) == ByHand(
        FORWARD + HEAD
    )  # one gradient, of the head's weight; nothing goes back into the body


def test_lower_half_frozen() -> None:
    trained = ("model.layers.2.", "model.layers.3.", "model.norm", "lm_head")
    model = freeze(llama(), lambda name: name.startswith(trained))
    assert counted(model) == ByHand(FORWARD + 2 * (2 * LAYER) + 2 * HEAD)


def test_frozen_embeddings_save_nothing_but_with_the_first_norm_they_do() -> None:
    """The first norm's gain needs the gradient of what q, k and v read; frozen too, those three
    products go.
    """
    model = freeze(llama(), lambda name: "embed_tokens" not in name)
    assert counted(model) == counted(llama())
    model = freeze(
        llama(), lambda name: "embed_tokens" not in name and "layers.0.input_layernorm" not in name
    )
    assert counted(model) == counted(llama()) - 3 * PROJECTION


def test_a_tied_head_is_frozen_with_its_embeddings() -> None:
    model = tiny(Task.causal_lm)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    trained = count_flops(model, Task.causal_lm, backward=True)
    model.get_input_embeddings().weight.requires_grad_(requires_grad=False)
    frozen = count_flops(model, Task.causal_lm, backward=True)
    assert trained(T, K) - frozen(T, K) == 2 * K * SHAPE.hidden_size * 259


class Lora(torch.nn.Module):
    """A frozen linear layer and a trained product of rank `R` beside it."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base = layer.requires_grad_(requires_grad=False)
        self.down = torch.nn.Linear(layer.in_features, R, bias=False)
        self.up = torch.nn.Linear(R, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_lora_counts_its_own_products_and_no_gradient_of_frozen_weights() -> None:
    model = freeze(llama(), lambda _: False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    adapter = 2 * T * R * H  # one of the two products
    # activations' gradients; attention differentiates both its factors
    upper = LAYER + ATTENTION + 2 * 2 * adapter
    # the first layer reads what nobody trains: no gradient through q, k and v, nor of keys, nor of
    # values
    lowest = PROJECTION + MLP + ATTENTION + 2 * adapter + adapter
    assert counted(model) == ByHand(FORWARD + L * 2 * adapter + HEAD + (L - 1) * upper + lowest)


def test_a_model_counts_as_a_fresh_one_of_its_configuration() -> None:
    for model, task in ((gpt2(), Task.causal_lm), (bert(), Task.sequence_classification)):
        found = count_flops(model, task, backward=True)
        assert found == count_flops(model.config, task, backward=True)
        assert (found.predicted > 0) == (task is Task.causal_lm)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = freeze(llama(), lambda name: "embed" not in name)
    before = {
        name: (p.device.type, p.requires_grad, p.detach().clone())
        for name, p in model.named_parameters()
    }
    attention, training = model.config._attn_implementation, model.training
    counted(model)
    assert (model.config._attn_implementation, model.training) == (attention, training)
    for name, parameter in model.named_parameters():
        device, requires_grad, values = before[name]
        assert (parameter.device.type, parameter.requires_grad) == (device, requires_grad)
        assert parameter.grad is None
        assert torch.equal(parameter, values)


def test_recomputed_activations_are_not_counted() -> None:
    model = llama().train()
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable()  # renamed by later releases of transformers
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert counted(model) == counted(llama())


def test_a_quantized_layer_counts_as_a_plain_one() -> None:
    packed = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model = freeze(llama(), lambda name: name.startswith("lm_head"))
    for layer in model.model.layers:
        layer.mlp.up_proj = packed(H, M, bias=False)
        layer.mlp.up_proj.weight = torch.nn.Parameter(
            torch.zeros(H * M // 2, 1, dtype=torch.uint8), False
        )
    assert counted(model) == ByHand(FORWARD + HEAD)


# -- batches --------------------------------------------------------------------------------------


def test_packed_windows_are_full_and_the_head_reads_their_targets() -> None:
    documents = [encoded(list(range(3, 3 + length))) for length in (9, 14, 30, 27)]
    batches = PackedBatches(documents, sequence_length=T, batch_size=3, seed=0)
    batch = batches.batch(0)
    rows, length = batch["input_ids"].shape
    targets = int((batch["labels"] >= 0).sum())
    assert (length, targets < rows * T) == (T, True)  # a document's last token predicts nothing
    own = count_flops(llama(), Task.causal_lm, backward=True)
    by_hand = rows * 3 * L * LAYER + 3 * targets * 2 * H * V
    # within the positions' frequencies
    assert StepFlops(own)(batch)[0] == pytest.approx(by_hand, rel=1e-4)


def test_a_live_teachers_forward_counts_and_a_cached_ones_does_not() -> None:
    batch = PackedBatches(
        [encoded(list(range(3, 90)))], sequence_length=T, batch_size=2, seed=0
    ).batch(0)
    own = count_flops(llama(), Task.causal_lm, backward=True)
    teacher = count_flops(freeze(llama(), lambda _: False), Task.causal_lm, backward=False)
    targets = int((batch["labels"] >= 0).sum())
    forward = 2 * L * LAYER + targets * 2 * H * V
    assert StepFlops(own, teacher)(batch) == (
        StepFlops(own)(batch)[0],
        pytest.approx(forward, rel=1e-3),
    )


def test_padding_is_computed_and_is_no_token() -> None:
    """An encoder, by hand: the longest example sets the shape of all, the head reads one position
    of each.
    """
    rows = [encoded(list(range(3, 3 + length)), label=1) for length in (8, 40, 23)]
    batch = PaddedBatches(rows, batch_size=3, seed=0, padding=Padding(0)).batch(0)
    assert (tuple(batch["input_ids"].shape), int(batch["attention_mask"].sum())) == ((3, 40), 71)
    config = BertConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        num_labels=3,
    )
    own = count_flops(config, Task.sequence_classification, backward=True)
    layer = 2 * 40 * (4 * 64 * 64 + 2 * 64 * 128) + 4 * 64 * 40**2
    assert StepFlops(own)(batch)[0] == 3 * 3 * (2 * layer + 2 * (64 * 64 + 64 * 3))


def test_micro_batches_sum_to_their_batch() -> None:
    """Gradient accumulation cuts a batch into parts and changes no FLOP."""
    batch = PackedBatches(
        [encoded(list(range(3, 200)))], sequence_length=T, batch_size=4, seed=0
    ).batch(0)
    own = count_flops(llama(), Task.causal_lm, backward=True)
    parts = [{name: tensor.chunk(2)[part] for name, tensor in batch.items()} for part in (0, 1)]
    assert sum(StepFlops(own)(part)[0] for part in parts) == pytest.approx(
        StepFlops(own)(batch)[0], rel=1e-12
    )


# -- the rule of thumb ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "layers", "length"), [(256, 4, 128), (512, 8, 1024), (1024, 2, 4096)]
)
def test_a_count_lies_between_six_n_and_its_attention(width: int, layers: int, length: int) -> None:
    """6N leaves attention out: 12 x layers x width x T a token. For normal shapes T is at most 4
    widths: factor 5/3.
    """
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    per_token = count_flops(model, Task.causal_lm, backward=True)(length) / length
    rule = six_n(model)
    assert rule <= per_token <= (1 + length / (6 * width)) * rule
    assert per_token / rule <= 5 / 3
    assert per_token - rule == pytest.approx(12 * layers * width * length, rel=1e-3)


def test_frozen_weights_have_two_of_the_six() -> None:
    frozen = freeze(llama(), lambda name: name.startswith("lm_head"))
    body = L * (4 * H * H + 3 * H * M)
    assert six_n(frozen) == 2 * body + 6 * H * V
    assert six_n(llama()) == 6 * (body + H * V)


def test_a_count_that_misses_operations_is_suspected() -> None:
    model = llama()
    whole = count_flops(model, Task.causal_lm, backward=True)
    assert suspicion(whole, model, Task.causal_lm, T) is None
    missed = FlopsPerSequence(0.0, 0.4 * six_n(model), 0.0)
    said = suspicion(missed, model, Task.causal_lm, T)
    assert (
        said == "model_flops may be too low: 40% of 6N; an operation of this model is not counted"
    )


def test_an_encoder_by_hand_reads_one_token_for_its_classes() -> None:
    config = BertConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        num_labels=3,
    )
    length = 40
    body = 2 * length * (2 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 2 * 64 * length)
    head = 2 * (64 * 64 + 64 * 3)  # pooler and classifier see the first token
    assert count_flops(config, Task.sequence_classification, backward=False)(length) == body + head


def test_a_quantized_model_counts_as_its_unquantized_twin() -> None:
    config = tiny(Task.causal_lm).config
    plain = count_flops(config, Task.causal_lm, backward=False)(32)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert count_flops(config, Task.causal_lm, backward=False)(32) == plain
    assert config.quantization_config  # the caller's configuration is left as it was
