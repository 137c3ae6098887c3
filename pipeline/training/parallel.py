"""A training's model over several ranks: each computes its rows of a batch.

A micro-batch is computed by one module, whose forward pass is the objective: so torch's own
DistributedDataParallel and FSDP2 see every use of a weight, the head's too. Both average gradients
over ranks; the loss of a rank is weighted by its share of the targets of all ranks, so that the sum
is the gradient of one process with the whole batch.

Under FSDP2 every layer is a group of its own, and what is left (embeddings, the head) belongs to
the objective: gathered before its forward pass, it is whole where the fused head reads it. No
device holds more than one such group whole: the first rank gives its weights out layer by layer,
and in the end has them back, in its host's memory, parameter by parameter. Of a live teacher, what
is left beside its layers is whole on every device.

Shape legend: B rows, R ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.config.settings.parallel import Parallel, ParallelConfig
from pipeline.config.settings.precision import Precision
from pipeline.data.prompts import PROMPT_MASK
from pipeline.distillation.on_policy import Split, Written
from pipeline.ledger.devices.table import device_of
from pipeline.models.load import quantized_by
from pipeline.training.objective import Objective, StepLoss
from pipeline.training.ranks import ALONE, Ranks
from pipeline.training.shares import is_shared

FAR = 1_000_003  # more than there are ranks: no two of them draw alike


class _Step(nn.Module):
    """A micro-batch's loss as a module that holds what is trained."""

    def __init__(self, trained: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.trained = trained
        self.objective = objective  # no module: its teacher is frozen, and is not shared
        self.batch: dict[str, Tensor] = {}
        self.done: StepLoss | None = None

    def forward(self) -> Tensor | None:
        """Compute `batch`, if there is any. It is no argument: tensors of arguments would be moved
        to the device, and the objective reads them on the host.
        """
        if not self.batch:
            return None
        self.done = self.objective(self.batch)
        return self.done.loss


@dataclass(frozen=True, slots=True)
class Shared:
    """How a training is shared among ranks; alone, it computes all itself.

    Attributes:
        module: Computes a micro-batch; None: the objective does, alone.
        mode: `ddp`, `fsdp` or `hsdp`.
        seed: Of what is drawn at random.
    """

    ranks: Ranks = ALONE
    module: Any = None
    mode: Parallel = Parallel.ddp
    seed: int = 0

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds a part of the weights alone."""
        return self.module is not None and self.mode.shards

    def computed(self, objective: Objective, part: dict[str, Tensor]) -> StepLoss:
        """Return the loss of a rank's rows of a micro-batch."""
        if self.module is None:
            return objective(part)
        step = self._step
        step.batch = part
        loss: Tensor = self.module()
        done, step.batch, step.done = cast(StepLoss, step.done), {}, None
        # the module's own tensor: what comes from it is what its hooks know
        return StepLoss(loss, done.parts, done.count, done.ce_weight, done.drawn)

    @property
    def _step(self) -> _Step:
        return self.module.module if self.mode is Parallel.ddp else self.module

    def own_rows(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's rows of a micro-batch: B / R of them, one more on the first ranks
        where R does not divide B.
        """
        if not self.ranks.several:
            return part
        return {
            name: tensor.tensor_split(self.ranks.size)[self.ranks.rank].contiguous()
            for name, tensor in part.items()
        }

    def share(self, own: int, total: int) -> float:
        """Return what the mean loss of this rank's targets is to be multiplied by, so that the
        average over ranks is the mean over the targets of all micro-batches.
        """
        return own / total * self.ranks.size

    @contextmanager
    def gradients(self, *, last: bool) -> Generator[None]:
        """Average gradients over ranks inside, where this is the last micro-batch of a step."""
        if self.module is None:
            yield
        elif self.mode is Parallel.ddp:
            wanted: AbstractContextManager[None] = nullcontext() if last else self.module.no_sync()
            with wanted:
                yield
        else:
            self.module.set_requires_gradient_sync(last)
            yield

    @contextmanager
    def whole(self, *, layers: bool = False) -> Generator[None]:
        """Have the model's own forward pass work inside, as each rank then computes all of it.

        Args:
            layers: Gather them all before, so that ranks may compute different things; each then
                holds the whole weights. Else each layer is gathered by all ranks as it is computed.
        """
        if not self.is_sharded:
            yield
            return
        # what the objective holds is gathered before its own pass
        gathered = [self.module, *(_sharded_layers(self._step.trained) if layers else ())]
        for module in gathered:
            module.unshard()
            if module is not self.module:
                module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in gathered:
                if module is not self.module:
                    module.set_reshard_after_forward(True, recurse=False)
                module.reshard()

    def completed(
        self, objective: Objective, batch: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """Return a batch as it is; of prompts, with what the model writes after them, each rank
        after its rows.
        """
        if not self.ranks.several or PROMPT_MASK not in batch:
            return objective.completed(batch, step)
        sizes = [len(part) for part in batch[PROMPT_MASK].tensor_split(self.ranks.size)]
        start = sum(sizes[: self.ranks.rank])

        def joined(own: Written) -> list[Written]:
            with objective.clock.phase("comm_wait"):
                return self.ranks.gathered(own)

        split = Split(slice(start, start + sizes[self.ranks.rank]), joined)
        with self.whole(layers=True):
            return objective.completed(batch, step, split)

    def end(self) -> None:
        """Part: the first rank has the whole weights of what was trained, in its host's memory
        where they were shared, and the others then have none. A live teacher stays as it is.
        """
        if not self.is_sharded:
            return
        for module in _sharded_layers(self._step):
            module.reshard()
        _made_whole(self._step, keeps=self.ranks.is_first)

    def draw_for(self, step: int) -> None:
        """Have what is drawn at random in a step (dropout) follow from the step and the rank: a
        training that goes on draws what it would have drawn.
        """
        if self.ranks.several:
            torch.manual_seed((self.seed + step) * FAR + self.ranks.rank)


def is_sharded(ranks: Ranks, mode: Parallel) -> bool:
    """Return whether a rank will hold a part of the weights alone."""
    return ranks.several and mode.shards


def share(trained: Any, objective: Objective, ranks: Ranks, parallel: ParallelConfig) -> Shared:
    """Return how a training is shared; the weights are rank 0's from here on."""
    if not ranks.several:
        return Shared()
    ranks.assemble()
    # the others may have drawn nothing yet
    step, seed = _Step(trained, objective), ranks.told(torch.initial_seed())
    if is_sharded(ranks, parallel.mode):
        module = _sharded(step, objective, ranks, parallel)
        module()  # of nothing: what runs first is the root, and the model may run by itself first
        module.reshard()
        _gather_each(step)
        return Shared(ranks, module, parallel.mode, seed)
    return Shared(ranks, _averaged(step), Parallel.ddp, seed)


def _gather_each(step: _Step) -> None:
    """Gather each layer once, alone: what is gathered for the first time under inference_mode, by a
    reading of validation, is of no use to a training.
    """
    teacher = step.objective.teacher
    for model in (step.trained, *(() if teacher is None else (teacher.model,))):
        for layer in _sharded_layers(model):
            layer.unshard()
            layer.reshard()


def _averaged(step: _Step) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    # Parts of a model may be read by no loss (a pooler), and a rank may have no target.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*find_unused_parameters.*")
        return DistributedDataParallel(step, find_unused_parameters=True)


def _sharded(step: _Step, objective: Objective, ranks: Ranks, parallel: ParallelConfig) -> Any:
    """Share layers, then what is left; of a live teacher the layers alone, and nothing of one that
    is quantized: each rank has loaded it.

    What is shared next is given whole to each rank, and no other is whole on its device meanwhile.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    kind, on_host = objective.device.type, ranks.size // ranks.hosts
    if parallel.mode is Parallel.hsdp:
        shape, names = (ranks.hosts, on_host), ("between", "within")
    else:
        shape, names = (ranks.size,), ("within",)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    pure = objective.precision is Precision.bf16_pure
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if pure else None, reduce_dtype=torch.float32
    )
    more: dict[str, Any] = {"mesh": mesh}
    if parallel.offload:
        more["offload_policy"] = CPUOffloadPolicy(pin_memory=device_of(objective.device).pinned)
    teacher = None if objective.teacher is None else objective.teacher.model
    if teacher is not None and quantized_by(teacher.config) is not None:
        teacher = None
    gives = _Giving([step] if teacher is None else [step, teacher], objective.device)
    for layer in layers_in(step.trained):
        gives(layer)
        fully_shard(layer, mp_policy=policy, **more)
    if teacher is not None:  # its weights are in its own precision, and take no step
        for layer in layers_in(teacher):
            gives(layer)
            fully_shard(layer, **more)
        gives(teacher)
    gives(step)
    return fully_shard(step, mp_policy=policy, **more)


class _Giving:
    """Puts the first rank's weights on every rank's device, module by module.

    Args:
        models: Which hold them; where one of theirs is tied, it is replaced in all its places.
    """

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        self._device = device
        # by identity: an entry goes before the parameter that it is of
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for model in models:
            for module, name, each in _parameters_of(model):
                self._places.setdefault(id(each), []).append((module, name))

    def __call__(self, module: nn.Module) -> None:
        """Give what is left of a module, which every rank calls this of."""
        for each in list(module.parameters()):
            if is_shared(each) or id(each) not in self._places:  # it has been given
                continue
            given = nn.Parameter(_from_first(each, self._device), requires_grad=each.requires_grad)
            for holder, name in self._places.pop(id(each)):
                setattr(holder, name, given)
        for buffer in module.buffers():
            buffer.data = buffer.to(self._device)


def _from_first(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the first rank's tensor on the device; that of another rank may be on `meta`."""
    import torch.distributed as dist

    if tensor.is_meta:
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        there = tensor.detach().to(device).contiguous()
    # as bytes: not every backend sends every type
    dist.broadcast(there.flatten().view(torch.uint8), src=0)
    return there


def layers_in(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformers model: those of its modules that it says are not to be
    split.
    """
    named = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [module for module in model.modules() if type(module).__name__ in named]


def _parameters_of(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return every place that a parameter has in a model: module, name and parameter."""
    return [
        (module, name, each)
        for module in model.modules()
        for name, each in module.named_parameters(recurse=False, remove_duplicate=False)
    ]


def _sharded_layers(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _made_whole(model: nn.Module, *, keeps: bool) -> None:
    """Give a model whole weights in the host's memory again, in place of its shares of them, and
    its own classes. All ranks ask for them, one by one.

    Args:
        keeps: Whether this rank does; else they are on `meta`.
    """
    from torch.distributed.fsdp import FSDPModule

    whole: dict[int, nn.Parameter] = {}  # tied weights are one
    places = _parameters_of(model)  # which keeps the shares: an identity is one of them alone
    for module, name, each in places:
        if is_shared(each):
            if id(each) not in whole:
                there = _gathered(each, keeps=keeps)
                whole[id(each)] = nn.Parameter(there, requires_grad=each.requires_grad)
            setattr(module, name, whole[id(each)])
    for buffer in model.buffers():
        buffer.data = buffer.cpu()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # torch has no public way back
            state: Any = module._get_fsdp_state()  # pyright: ignore[reportPrivateUsage]
            for hook in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                hook.remove()
            module.__class__ = type(module).__mro__[2]  # FSDP's own, FSDPModule, the module's


def _gathered(share: Any, *, keeps: bool) -> Tensor:
    """Return a parameter put together on the host; without values where this rank drops it."""
    there: Tensor = share.full_tensor().detach()
    return there.cpu() if keeps else torch.empty_like(there, device="meta")
