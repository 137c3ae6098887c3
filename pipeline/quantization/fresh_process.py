"""What the fresh process of the reload check runs, and what the process that quantized runs beside
it.

Run by its path, this file is a program that imports torch and transformers and nothing of this
package: it must load the folder as any user would. Imported, it gives the reference the same code
for the same forwards.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any, TypedDict

import torch

ALIGNMENT = 64  # bytes; where torch puts what it makes
_MKLDNN: Any = torch.backends.mkldnn  # its `matmul` is set up at run time, unseen by type checkers


class Arithmetic(TypedDict):
    """The process-wide settings that change the last bits of a matrix product."""

    num_threads: int
    gpu_matmul: str | bool  # as torch declares it
    mkldnn: str


class Request(TypedDict):
    """What this program is asked: a folder to load, and how to compute."""

    folder: str
    auto_class: str
    device: str
    probes: Sequence[Sequence[int]]
    arithmetic: Arithmetic


def forward_digests(model: Any, probes: Sequence[Sequence[int]]) -> list[str]:
    """Run each probe (token ids of one sequence) in turn; return the sha256 of its logits' type,
    shape and bytes.
    """
    align(model)
    digests: list[str] = []
    with torch.no_grad():
        for ids in probes:
            # (1, T, vocab) or (1, labels)
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
            digest = hashlib.sha256(f"{logits.dtype} {tuple(logits.shape)} ".encode())
            # As bytes: numpy has no bfloat16, and NaNs compare unequal.
            digest.update(logits.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            digests.append(digest.hexdigest())
    return digests


def align(model: Any) -> None:
    """Move a CPU model's plain weights that lie askew in memory, in place.

    A file that is mapped has its tensors at any offset, and a product with a single token rounds
    otherwise where its weight does not begin at 16 bytes: the same weights would give other bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if (
            type(tensor.data) is torch.Tensor
            and tensor.device.type == "cpu"
            and tensor.data_ptr() % ALIGNMENT
        ):
            tensor.data = tensor.data.clone()


def read_arithmetic() -> Arithmetic:
    """Return the process-wide settings that change the last bits of a matrix product."""
    return {
        "num_threads": torch.get_num_threads(),
        "gpu_matmul": torch.backends.cuda.matmul.fp32_precision,
        "mkldnn": _MKLDNN.matmul.fp32_precision,
    }


def set_arithmetic(settings: Arithmetic) -> None:
    """Compute as the process that `read_arithmetic` was called in."""
    torch.set_num_threads(settings["num_threads"])
    torch.backends.cuda.matmul.fp32_precision = settings["gpu_matmul"]
    _MKLDNN.matmul.fp32_precision = settings["mkldnn"]


def main(request: Request) -> None:
    """Load the folder that `request` names, and print its digests as the last line."""
    import transformers

    # Another number of threads adds up in another order, which moves last bits.
    set_arithmetic(request["arithmetic"])
    auto_class = getattr(transformers, request["auto_class"])
    model = auto_class.from_pretrained(
        request["folder"],
        device_map={"": request["device"]},
        local_files_only=True,
        trust_remote_code=False,
    )
    print(json.dumps(forward_digests(model.eval(), request["probes"])))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
