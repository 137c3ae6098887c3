"""Compile the head's Triton kernels for GPUs that are not here, with Triton's own ptxas; print what
came of each, a JSON line each.

    python compile_kernels.py JSON     # a list of [arch, kernel, constants, dtype]

Not under Triton's interpreter: kernels are then Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.distillation import triton_terms

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "student": "*{dtype}",
    "teacher": "*{dtype}",
    "labels": "*i64",
    "ids": "*i64",
    "probabilities": "*fp32",
    "ce_out": "*fp32",
    "divergence_out": "*fp32",
}
NUMBERS = dict.fromkeys(
    ("student_stride", "teacher_stride", "vocabulary", "readable", "columns"), "i32"
)
# 50,257 is a multiple of nothing; what is filled up is one of 16
UNALIGNED = {"vocabulary"} if not os.environ.get("UNFILLED") else set(NUMBERS)


def compiled(arch: int, kernel: str, constants: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return registers, bytes spilled, and loads by width, of one kernel for one architecture."""
    function = getattr(triton_terms, kernel)
    names = [name for name in function.arg_names if name not in constants]
    types = {
        name: POINTERS[name].format(dtype=dtype) if name in POINTERS else NUMBERS.get(name, "fp32")
        for name in names
    }
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name in POINTERS or (name in NUMBERS and name not in UNALIGNED)
    }
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in function.arg_names},
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": triton_terms.WARPS, **triton_terms.LIMITS}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = made.asm["ptx"]
    loads = re.findall(r"ld\.global(?:\.[a-z0-9_:]+)*?\.((?:v\d\.)?[bfu]\d+)", ptx)
    return {
        **_used(made.asm["cubin"]),
        "wide": sum(each.startswith("v4") or each.startswith("v8") for each in loads),
        "scalar": sum(each in ("b16", "u16") for each in loads),
        "divisions": len(re.findall(r"div\.\w+\.f32", ptx)),
    }


def _used(cubin: bytes) -> dict[str, int]:
    """Return what a kernel takes of a multiprocessor, as cuobjdump reads it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(BINARIES / "cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": int(found["SHARED"]),
    }


def main() -> None:
    """Compile what is asked for."""
    for arch, kernel, constants, dtype in json.loads(sys.argv[1]):
        print(json.dumps(compiled(arch, kernel, constants, dtype)), flush=True)


if __name__ == "__main__":
    main()
