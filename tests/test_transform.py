"""A model's head and what it does after it, against float64 autograd of the model's own logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from make_heads import louder, made
from test_losses import definition
from torch import Tensor, nn

from pipeline.config.settings.distillation import Divergence, HeadKernel
from pipeline.config.settings.precision import Precision
from pipeline.data.batches import IGNORE
from pipeline.distillation import transform as transform_module
from pipeline.distillation.kernels import kernel_of
from pipeline.distillation.losses import Loss, Sparse
from pipeline.distillation.transform import Transform, Unknown, nothing_is_zero, prove
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training import reading
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import Apart, Documents, examine
from pipeline.training.selfcheck import gradient_share

CPU = torch.device("cpu")
LENGTHS = (7, 9)
KNOWN = {
    "llama": Transform(),
    "phi": Transform(),
    "opt": Transform(),
    "gemma2": Transform(cap=30.0),
    "gemma3": Transform(cap=20.0),
    "nanochat": Transform(cap=15.0),
    "vaultgemma": Transform(cap=30.0),
    "cohere": Transform(0.25),
    "cohere2": Transform(0.5),
    "granite": Transform(0.25),
    "granitemoe": Transform(0.5),
    "hyperclovax": Transform(3.0),
    "minicpm3": Transform(0.25),
}
IN_FULL = ("modernbert", "bert")


def batch() -> dict[str, Tensor]:
    """Two documents in one row."""
    torch.manual_seed(5)
    ids = torch.randint(3, 90, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    labels = torch.full_like(ids, IGNORE)
    for start, length in zip((0, LENGTHS[0]), LENGTHS, strict=True):
        labels[0, start : start + length - 1] = ids[0, start + 1 : start + length]
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def own_logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Return the model's own logits of the predicted tokens, each document read alone."""
    found, start = [], 0
    for length in LENGTHS:
        ids = given["input_ids"][:, start : start + length]
        found.append(model(input_ids=ids, use_cache=False).logits[0, :-1])
        start += length
    return torch.cat(found)


def expected(student: Any, teacher: Any, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss and the gradients of all parameters, by autograd in float64."""
    wide, given = copy.deepcopy(student).double(), batch()
    labels = given["labels"][given["labels"] != IGNORE]
    z = own_logits(wide, given)
    if teacher is None:
        value = F.cross_entropy(z, labels)
    else:
        with torch.no_grad():
            t = own_logits(copy.deepcopy(teacher).double(), given)
        width = min(z.shape[1], t.shape[1])
        value = definition(z[:, :width], t[:, :width], labels, loss) / len(labels)
    value.backward()
    return value.detach(), {
        name: each.grad for name, each in wide.named_parameters() if each.grad is not None
    }


def compare(
    student: Any, teacher: Any, loss: Loss, kernel: HeadKernel = HeadKernel.torch
) -> Objective:
    """Have a training's objective compute what `expected` does, after it examined both models."""
    own = examine(student, CPU)
    taught = None
    if teacher is not None:
        theirs = examine(teacher, CPU)
        taught = Teacher(teacher, Precision.fp32, loss, theirs)
    objective = Objective(
        student, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), taught, read=own
    )
    objective.head_loss = kernel_of(kernel)
    done = objective(batch())
    done.loss.backward()
    value, wanted = expected(student, teacher, loss)
    assert done.loss.item() == pytest.approx(value.item(), rel=1e-5)
    largest = max(each.norm() for each in wanted.values())
    for name, parameter in student.named_parameters():
        if name in wanted:
            error = (parameter.grad.double() - wanted[name]).norm()
            assert error <= 1e-4 * wanted[name].norm() + 1e-6 * largest, name
    return objective


@pytest.mark.parametrize("name", [*KNOWN, *IN_FULL])
def test_hard_labels_are_learnt_from_the_models_own_logits(name: str) -> None:
    """Every gradient, tied heads, biases and bodies; caps are felt, for the output layer is
    large.
    """
    objective = compare(louder(made(name)), None, Loss())
    assert isinstance(objective.head, Unknown) if name in IN_FULL else objective.head == KNOWN[name]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("llama", "gemma2"),
        ("gemma3", "llama"),
        ("nanochat", "cohere"),
        ("granite", "phi"),
        ("phi", "modernbert"),
        ("bert", "gemma2"),
        ("modernbert", "bert"),
    ],
)
def test_a_student_learns_from_its_teachers_own_logits(student: str, teacher: str) -> None:
    compare(
        louder(made(student)), louder(made(teacher, seed=1)), Loss(0.3, Divergence.forward_kl, 2.0)
    )


@pytest.mark.parametrize("divergence", list(Divergence))
def test_every_divergence_meets_a_cap_and_a_scale(divergence: Divergence) -> None:
    student, teacher = louder(made("gemma2")), louder(made("granite", seed=1), 30.0)
    compare(student, teacher, Loss(0.2, divergence, 1.5, 0.4))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of masked lanes
def test_triton_does_the_same() -> None:
    triton_terms = pytest.importorskip(
        "pipeline.distillation.triton_terms", reason="Triton is not installed"
    )
    if not triton_terms.triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for a GPU here: see the tests marked gpu")
    compare(
        louder(made("gemma2")),
        louder(made("cohere", seed=1)),
        Loss(0.3, temperature=2.0),
        HeadKernel.triton,
    )
    compare(louder(made("granite")), None, Loss(), HeadKernel.triton)


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_entries_of_a_cache_meet_the_students_own_logits(name: str) -> None:
    """Entries that are all of the distribution are the dense loss; the student's cap counts, and
    full logits do.
    """
    student, given = louder(made(name)), batch()
    own = examine(student, CPU)
    t = 5 * torch.randn(sum(LENGTHS) - 2, 99, generator=torch.Generator().manual_seed(2))
    p = t.softmax(-1)
    objective = Objective(student, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), read=own)
    objective.vocabulary, objective.loss = 99, Loss(0.3)
    everything = Sparse(torch.arange(99).expand(len(t), 99), p, torch.special.entr(p).sum(-1))
    keep = (given["labels"].flatten() != IGNORE).nonzero().flatten()
    labels = given["labels"].flatten()[keep]
    inputs = {name: given[name] for name in ("input_ids", "position_ids")}
    documents = Documents.of(inputs["position_ids"], inputs["position_ids"])
    with objective.clock.phase("other"):
        done = objective._causal(inputs, documents, keep, labels, everything, objective.loss)
    wanted = definition(own_logits(student, given), t, labels, objective.loss) / len(labels)
    assert done.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_labels_alone_beside_an_infinite_divergence_train() -> None:
    """The teacher rules out tokens that the student allows: reverse KL is infinite, and has no
    weight.
    """
    student, teacher = louder(made("phi")), louder(made("phi", seed=1))
    with torch.no_grad():
        teacher.get_output_embeddings().bias[50:] = -torch.inf
    taught = Teacher(teacher, Precision.fp32, Loss(1.0, Divergence.reverse_kl))
    objective = Objective(student, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), taught)
    done = objective(batch())
    done.loss.backward()
    value, wanted = expected(student, None, Loss())
    assert done.loss.item() == pytest.approx(value.item(), rel=1e-5)
    assert done.parts.divergence.item() == torch.inf
    layer = student.get_output_embeddings()
    torch.testing.assert_close(
        layer.weight.grad.double(), wanted["lm_head.weight"], rtol=1e-3, atol=1e-6
    )
    assert gradient_share(objective, batch()) == 0


# -- the proof ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "nanochat", "vaultgemma"])
def test_a_cap_that_fresh_logits_do_not_feel_is_seen(name: str) -> None:
    """Without the cap, the fresh model's logits are the same to a thousandth: only amplified ones
    tell.
    """
    model = made(name)
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        logits = model(**inputs).logits
        raw = model.get_output_embeddings()(model.base_model(**inputs).last_hidden_state)
    assert (raw - logits).abs().max() < 1e-3 * logits.abs().max()
    cap = model.config.final_logit_softcapping
    model.config.final_logit_softcapping = None  # as if no setting that is known by name held it
    assert isinstance(_proof(model, hidden_cap=cap), Unknown)


def _proof(model: Any, *, hidden_cap: float) -> Transform | Unknown:
    """Prove the head of a model that caps its logits without saying so."""
    forward = model.forward

    def capping(*args: Any, **more: Any) -> Any:
        out = forward(*args, **more)
        out.logits = hidden_cap * torch.tanh(out.logits / hidden_cap)
        return out

    model.forward = capping
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), nothing_is_zero(model):
        return prove(model, {"input_ids": ids, "position_ids": torch.arange(6)[None]})


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("falcon_h1", Transform(0.25)),
        ("inkling", Transform(1 / 24, columns=90)),
        ("mpt", Transform()),
    ],
)
def test_what_settings_mean_is_found_out(name: str, wanted: Transform) -> None:
    """Also where packing is impossible; a scale that the class ignores is not applied."""
    model, ids = made(name), torch.arange(3, 9)[None]
    with torch.no_grad(), nothing_is_zero(model):
        assert prove(model, {"input_ids": ids, "position_ids": torch.arange(6)[None]}) == wanted


class Tempered(nn.Module):
    """A learnt temperature between head and logits, 1 at the beginning."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.temperature = layer, nn.Parameter(torch.ones(()))


def test_a_factor_that_is_trained_is_no_known_head() -> None:
    model = made("llama")
    model.tempering = Tempered(nn.Identity())
    forward = model.forward

    def tempered(*args: Any, **more: Any) -> Any:
        out = forward(*args, **more)
        out.logits = out.logits * model.tempering.temperature
        return out

    model.forward = tempered
    found = examine(model, CPU).head
    assert isinstance(found, Unknown)
    assert "parameters between" in found.why
    assert model.tempering.temperature.requires_grad


def test_examining_leaves_a_model_as_it_was() -> None:
    model = made("nanochat").train()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    examine(model, CPU)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_logits_of_which_nothing_can_be_learnt_are_refused() -> None:
    model = made("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"LlamaForCausalLM gives logits that are no numbers"):
        examine(model, CPU)
    model = made("gpt2")
    forward = model.forward

    def at_random(*args: Any, **more: Any) -> Any:
        out = forward(*args, **more)
        out.logits = out.logits + torch.randn(out.logits.shape)
        return out

    model.forward = at_random
    with pytest.raises(UserError, match=r"gives other logits each time"):
        examine(model, CPU)


# -- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("opt", Apart.lengths),
        ("falcon", Apart.mask),
        ("biogpt", Apart.lengths),
        ("ctrl", Apart.lengths),
        ("granite", Apart.lengths),
    ],
)
def test_what_makes_documents_equal_to_documents_alone_is_enough(name: str, apart: Apart) -> None:
    """Whatever the model would read without it."""
    assert examine(made(name), CPU).apart is apart


@pytest.mark.parametrize("name", ["opt", "ctrl", "granite"])
def test_a_boundary_one_token_off_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a model that adds nothing to its residual stream yet: what it will read is seen."""
    for told in ("document_mask", "bounds_of"):
        right = getattr(reading, told)
        shifted = lambda positions, right=right: right(positions.roll(1))
        monkeypatch.setattr(reading, told, shifted)
    model = made(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("o_proj", "out_proj", "attention.dense")):
                parameter.zero_()
    if name != "opt":  # they find the documents in their positions, too
        assert examine(model, CPU).apart is Apart.positions
        return
    assert not examine(model, CPU).packs


def test_a_state_that_runs_on_into_the_next_document_is_caught() -> None:
    """A convolution over four tokens changes little, and is seen."""
    assert not examine(made("falcon_h1"), CPU).packs


def test_positions_by_distance_are_right_under_a_mask_that_is_added() -> None:
    """MPT's attention is eager, and its positions (ALiBi) are distances: the same in every
    document.
    """
    assert examine(made("mpt"), CPU).apart is Apart.mask


# -- the transform itself -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform", [Transform(), Transform(0.3), Transform(cap=5.0), Transform(2.0, 30.0)]
)
def test_slopes_equal_autograd(transform: Transform) -> None:
    product = torch.linspace(-40, 40, 81, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(transform.logits(product).sum(), product)
    found = transform.slope(product.detach()) * torch.ones_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)
    single = transform.slope(product.detach().float()) * torch.ones(81)
    # nothing cancels near the cap
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=0)


def test_full_logits_are_said_with_their_memory() -> None:
    model = made("bert")
    own = examine(model, CPU)
    objective = Objective(model, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), read=own)
    [said] = objective.full_logits(2**20)
    assert said.startswith("BertLMHeadModel: logits and their gradient are held in full, 792 MiB")
    assert "another function of its hidden states" in said


def test_readings_are_tried_the_likeliest_first() -> None:
    config = made("granite").config
    assert [each.scale for each in transform_module.readings(config)] == [0.25, 4.0, 1.0]
