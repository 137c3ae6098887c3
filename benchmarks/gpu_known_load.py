"""Known load on a GPU: what the ledger reads of work whose FLOPs, joules, idle time and width are
known beforehand.

    python benchmarks/gpu_known_load.py [--repeats 3] [--only flops energy spin delays loop
    loop_timeline]

Each check has a bound that was written down before the first run (known_load/claims.py) and holds
where every repetition lies within it; what could not be measured has not held. All readings are
those of the pipeline's own meter: sampler, step tracer, FLOP count, peaks, training loop. Sections,
about four minutes together:

    flops          a matmul's FLOPs, a small transformer's against torch's counter and by hand, MFU
    energy         joules of N and 2N matmuls above context-idle; counter against integrated power
                   at three loads
    spin           one spinning thread: NVML's utilization says 100%, SM activity says below 2%
    delays         a host's sleep and two copies, injected into a traced step
    loop           where the training loop waits for the device
    loop_timeline  the same loop traced, with a sleep injected; device time by phase; MFU

`--device cpu --tiny` tries the script without a GPU, on a board and a clock that tests make up, and
saves nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from known_load.claims import Readings, judge, remarks
from known_load.device import TINY, Cuda, Device, Plan
from known_load.loads import measure_energy, measure_flops, measure_spin
from known_load.steps import measure_delays, measure_loop, measure_loop_timeline
from results import save_result

PROBLEMS = (RuntimeError, OSError, ValueError, KeyError, TypeError, AssertionError, ImportError)
"""What a section is known to end with on a machine that cannot do it."""
SECTIONS: dict[str, Callable[[Device, Plan], Readings]] = {
    "flops": measure_flops,
    "energy": measure_energy,
    "spin": measure_spin,
    "delays": measure_delays,
    "loop": measure_loop,
    "loop_timeline": measure_loop_timeline,
}


def measure(device: Device, plan: Plan, sections: Iterable[str]) -> tuple[Readings, list[str]]:
    """Return the readings of sections, and what went wrong; a section that breaks is a failure, not
    the end.
    """
    readings, log = Readings(), list[str]()
    for name in sections:
        start = time.monotonic()
        try:
            readings[name] = SECTIONS[name](device, plan)
        except PROBLEMS as error:
            readings[name] = {
                "failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            }
            log.append(traceback.format_exc())
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    return readings, log


def simulated() -> Any:
    """Return the board that the tests made up."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    return importlib.import_module("simulated_gpu").Simulated()


def main() -> int:
    """Measure, judge, print and save; exit 1 where a check does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="once, and short")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu --tiny tries the script")
    plan = TINY if args.tiny else Plan()
    plan = replace(plan, repeats=args.repeats or plan.repeats)
    device: Device = Cuda() if args.device == "cuda" else simulated()
    device.open()
    readings, log = measure(device, plan, args.only)
    placement = device.sampler.reader.placement()
    device.close()
    outcomes = judge(readings)
    table = [
        f"{'':<5}{'check':<66}{'bound':<16}measured: mean [least, most]",
        *map(str, outcomes),
        *remarks(readings),
    ]
    print("\n".join([*log, *table]), flush=True)
    if args.device == "cuda":
        figures = {
            "checks": [each.to_json() for each in outcomes],
            "plan": asdict(plan),
            "placement": placement,
            "readings": readings,
        }
        raw = [json.dumps(asdict(each), default=dict) for each in device.readings]
        save_result("gpu_known_load", figures, "\n".join([*table, *log, *raw]))
    return int(any(each.state == "FAIL" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
