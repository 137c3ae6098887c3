"""Have torch's compiler (Inductor) write its CUDA code of what this project compiles, for a GPU
that is not here; compile its Triton kernels with Triton's own ptxas; print what came of it.

    python inductor_for_cuda.py ARCHITECTURE [--parts body head step] [--layers 1]

`body` is a Llama's forward and backward pass over packed documents that are told apart by lengths,
under bf16 autocast; `masked` is the same told by a dense mask. `head` is the loss of a block of
products beside a teacher's, of any shape. `step` predicts one token of a batch with a cache of
fixed size. Each is traced on CPU tensors without data, split and rewritten as torch does it, moved
to `cuda:0`, and lowered for a device whose properties stand below. Nothing runs. Printed are a JSON
line for each graph, and one for each configuration of a kernel that the autotuner would try.

Not under Triton's interpreter: kernels are then Python.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.distillation.losses import Loss, block_terms
from pipeline.distillation.transform import PLAIN
from pipeline.evaluation.serving.decoding import Fixed
from pipeline.models import attention

CUDA = torch.device("cuda:0")
ROWS, TOKENS, DOCUMENTS = 4, 96, 9  # of a batch; nothing else has 96 of anything
CACHED = 128  # tokens that a cache of fixed size holds
PRODUCTS = (1024, 50_257)  # a block's tokens and vocabulary
LENGTHS = "lengths_on_cuda"
SDPA = "torch.nn.functional.scaled_dot_product_attention"
KEPT = ("keys", "values", "cumulative_length")  # by a layer of a cache
# Multiprocessors, threads and shared bytes of each: A100, RTX 4090, H100, B200, RTX 5090.
# Source: CUDA C++ Programming Guide, "Compute Capabilities"; NVIDIA's data sheets.
GPUS = {
    80: (108, 2048, 163 << 10),
    89: (128, 1536, 99 << 10),
    90: (132, 2048, 227 << 10),
    100: (148, 2048, 227 << 10),
    120: (170, 1536, 99 << 10),
}
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
LAUNCH = re.compile(r"\btriton_\w+\.run\(")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True, slots=True)
class Graph:
    """What is lowered, of CPU tensors without data.

    Attributes:
        passed: Whether it was rewritten for Inductor already.
    """

    name: str
    module: GraphModule
    mode: FakeTensorMode
    passed: bool = False


# -- what is compiled ------------------------------------------------------------------------------


def llama(layers: int, how: str, dtype: torch.dtype) -> Any:
    """Return a small Llama whose heads share keys, without data; `how` names its attention."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=how,
    )
    model = LlamaForCausalLM(config)
    for module in model.modules():
        for name, each in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(torch.empty_like(each, dtype=dtype))
        for name, each in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(each)
    return model


def body(layers: int, how: str = LENGTHS) -> list[Graph]:
    """Return the forward and the backward pass of a body, split as torch splits them."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = llama(layers, how, torch.float32).model.train()
        weights = dict(model.named_parameters())

        def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
            leaves, (ids, positions, bounds) = primals[:-3], primals[-3:]
            given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            if how == LENGTHS:
                given |= {"cu_seq_lens_q": bounds, "max_length_q": TOKENS}
            replaced = dict(zip(weights, leaves, strict=True))
            with torch.autocast("cpu", torch.bfloat16):
                out = functional_call(model, replaced, kwargs=given).last_hidden_state
            return [out, *torch.autograd.grad(out, leaves, tangents)]

        ids = [torch.empty(ROWS, TOKENS, dtype=torch.int64) for _ in range(2)]
        bounds = torch.empty(DOCUMENTS + 1, dtype=torch.int32)
        gradient = torch.empty(ROWS, TOKENS, model.config.hidden_size)
        module = traced(joint, [*weights.values(), *ids, bounds], [gradient])
        both = min_cut_rematerialization_partition(module, None, num_fwd_outputs=1)
    named = zip(("forward", "backward"), both, strict=True)
    graphs = [Graph(name, each, mode, passed=True) for name, each in named]
    for graph in graphs:  # on the CPU: those of a backward pass ask for a device
        rewrite(graph)
    return graphs


def by_lengths(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **more: Any
) -> tuple[Tensor, None]:
    """Compute what `attention.attend` does on a GPU; on a CPU it takes another operator."""
    three = attention._in_autocast(query, key, value)
    bounds, longest = more["cu_seq_lens_q"], more["max_length_q"]
    return attention._varlen(*three, bounds, longest, 0, more["scaling"]), None


def head(_: int) -> list[Graph]:
    """Return the loss of a block of products, and its gradient."""

    def glue(student: Tensor, teacher: Tensor, labels: Tensor) -> list[Tensor]:
        sums, gradient = block_terms(student, teacher, labels, Loss(0.5), PLAIN, PLAIN)
        return [sums.ce, sums.divergence, gradient]

    products = torch.empty(PRODUCTS, dtype=torch.bfloat16)  # never read
    any_size = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    compiling = mock.patch("torch.compiler.is_compiling", return_value=True)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode, compiling:
        student = mode.from_tensor(products, symbolic_context=any_size)
        labels = torch.empty(student.shape[0], dtype=torch.int64)
        module = traced(functionalize(glue), student, torch.empty_like(student), labels)
    return [Graph("head", module, mode)]


def step(layers: int) -> list[Graph]:
    """Return a step of the decoder that writes into a cache of fixed size."""
    given = {"logits_to_keep": 1}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model = llama(layers, "sdpa", torch.bfloat16).eval()
        ids = torch.empty(ROWS, 1, dtype=torch.int64)
        fixed = Fixed(model, given, ids, CACHED)
        fixed.prefill(ids)
        places = [(layer, name) for layer in fixed._cache.layers for name in KEPT]
        kept = [getattr(layer, name) for layer, name in places]
        weights = dict(model.named_parameters())

        def predicted(leaves: list[Tensor], kept: list[Tensor], ids: Tensor) -> Tensor:
            for (layer, name), each in zip(places, kept, strict=True):
                setattr(layer, name, each)
            replaced = dict(zip(weights, leaves, strict=True))
            with torch.nn.utils.stateless._reparametrize_module(model, replaced):
                return fixed._predict(ids)

        with mock.patch(SDPA, masked_on_cuda):
            module = traced(functionalize(predicted), list(weights.values()), kept, ids)
    return [Graph("step", module, mode)]


def masked_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, scale: float, **more: Any
) -> Tensor:
    """Return what torch makes on CUDA of attention with a mask; on a CPU it takes another
    operator.
    """
    assert not any(more.values()), more
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    bias = bias.expand(-1, query.shape[1], query.shape[2], -1)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(query, key, value, bias, compute_log_sumexp=False, scale=scale)[0]


PARTS: dict[str, Callable[[int], list[Graph]]] = {
    "body": body,
    "masked": lambda layers: body(layers, "eager"),
    "head": head,
    "step": step,
}


# -- how it is lowered -----------------------------------------------------------------------------


def traced(function: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Return a function's graph in the operators that Inductor lowers."""
    module = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
    module.graph.set_codegen(torch.fx.graph.CodeGen())  # inputs one by one
    module.recompile()
    return module


def rewrite(graph: Graph) -> None:
    """Do to a graph what Inductor does before it lowers it."""
    view_to_reshape(graph.module)
    with V.set_fake_mode(graph.mode):
        post_grad_passes(graph.module, is_inference=False)


def move(graph: Graph) -> list[Any]:
    """Move a graph to the GPU; return its inputs."""
    moved = lambda of: torch.empty_strided(of.shape, of.stride(), dtype=of.dtype, device=CUDA)
    nodes = list(graph.module.graph.nodes)
    with graph.mode:
        for node in nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
            node.meta.pop("tensor_meta", None)
            if "val" in node.meta:
                node.meta["val"] = tree_map_only(Tensor, moved, node.meta["val"])
    graph.module.recompile()
    return [node.meta["val"] for node in nodes if node.op == "placeholder"]


def lowered(graph: Graph) -> str:
    """Return the program that Inductor makes of a graph on the GPU."""
    inputs = move(graph)
    if not graph.passed:
        rewrite(graph)
    lowering = GraphLowering(graph.module, inputs, graph.mode.shape_env, is_inference=False)
    with (
        V.set_fake_mode(graph.mode),
        V.set_graph_handler(lowering),
        V.set_debug_handler(DebugContext()),
    ):
        lowering.run(*inputs)
        return lowering.codegen()[0].value


class Driver:
    """What Inductor asks of Triton's driver."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA


@contextmanager
def gpu(architecture: int) -> Generator[None]:
    """Have torch and Triton believe in a GPU inside."""
    told = properties_of(architecture)
    device = {"current_device": 0, "get_device_properties": told}
    places: list[tuple[Any, dict[str, Any]]] = [
        (CudaInterface.Worker, device),
        (
            CudaInterface,
            {**device, "is_available": True, "get_compute_capability": architecture}
            | {"is_bf16_supported": True, "synchronize": None},
        ),
        (
            torch.cuda,
            {**device, "is_available": True, "_lazy_init": None}
            | {"get_device_capability": (told.major, told.minor)},
        ),
        (scheduler, {"has_triton": True}),
        (triton_helpers, {"set_driver_to_gpu": None}),
    ]
    triton.runtime.driver.set_active(Driver(architecture))
    with ExitStack() as patches:
        for place, answers in places:
            for name, answer in answers.items():
                says = staticmethod(lambda *_, answer=answer, **__: answer)
                patches.enter_context(mock.patch.object(place, name, says))
        yield


def properties_of(architecture: int) -> SimpleNamespace:
    """Return what Inductor reads of a GPU."""
    multiprocessors, threads, shared = GPUS[architecture]
    return SimpleNamespace(
        name=f"sm_{architecture}",
        major=architecture // 10,
        minor=architecture % 10,
        multi_processor_count=multiprocessors,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        gcnArchName="",
        uuid="none",
    )


# -- what came of it -------------------------------------------------------------------------------


def described(graph: Graph) -> dict[str, Any]:
    """Return a graph's operators, and which of them make an entry for each pair of tokens."""
    nodes = list(graph.module.graph.nodes)
    dense = lambda made: isinstance(made, Tensor) and made.shape[-2:] == (TOKENS, TOKENS)
    return {
        "graph": graph.name,
        "operators": Counter(str(node.target) for node in nodes if node.op == "call_function"),
        "dense": [str(node.target) for node in nodes if dense(node.meta.get("val"))],
    }


def tuners(text: str) -> list[CachingAutotuner]:
    """Return the kernels of a program, each with what Inductor's autotuner would try."""
    return [getattr(PyCodeCache.load(source), name) for name, source in KERNEL.findall(text)]


def elements(tuner: CachingAutotuner) -> int:
    """Return how many elements a kernel makes, rounded up to powers of two."""
    return math.prod(size for axis, size in tuner.size_hints.items() if not axis.startswith("r"))


def compiled(tuner: CachingAutotuner, architecture: int) -> Iterator[dict[str, Any]]:
    """Compile a kernel in each configuration that the autotuner would try."""
    assert tuner.device_props.cc == architecture
    target = GPUTarget("cuda", architecture, 32)
    for config in tuner.configs:
        meta = tuner._create_compile_meta(config)
        code = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
        options = tuner._create_compile_options(config, meta)
        log = io.StringIO()
        with redirect_stdout(log):  # Triton prints there what ptxas says
            triton.compile(code, target=target, options=options)
        yield {"kernel": tuner.fn.__name__, "config": str(config), **used(log.getvalue())}


def used(log: str) -> dict[str, int]:
    """Return a thread's registers, and the bytes of its stack and of what it spills, as ptxas says.

    A sine's reduction of large angles has a stack, and spills nothing.
    """
    stack, stores, loads = map(int, MEMORY.search(log).groups())
    registers = int(REGISTERS.search(log)[1])
    return {"registers": registers, "stack": stack, "spilled": stores + loads}


def report(graph: Graph, architecture: int, most: int | None) -> None:
    """Lower a graph, compile its first kernels, and print what came of both."""
    about = described(graph)
    text = lowered(graph)
    kernels = tuners(text)
    about |= {
        "launches": len(LAUNCH.findall(text)),
        "kernels": len(kernels),
        "largest": max(map(elements, kernels)),
    }
    print(json.dumps(about), flush=True)
    for kernel in kernels[:most]:
        for found in compiled(kernel, architecture):
            print(json.dumps({"graph": graph.name, **found}), flush=True)


def main() -> None:
    """Compile what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(";")[0])
    parser.add_argument("architecture", type=int, choices=GPUS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["body", "head", "step"])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--kernels", type=int, help="compiled of each graph; default: all")
    args = parser.parse_args()
    AttentionInterface.register(LENGTHS, by_lengths)
    ALL_MASK_ATTENTION_FUNCTIONS.register(LENGTHS, lambda *_, **__: None)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what is cached says nothing
    for graph in (each for part in args.parts for each in PARTS[part](args.layers)):
        with gpu(args.architecture):
            report(graph, args.architecture, args.kernels)


if __name__ == "__main__":
    main()
