"""What scales to 1,000 devices, and what does not: computed, and simulated with 64 ranks.

    python benchmarks/scaling.py [--parameters 7e9] [--tokens 8192] [--ranks 64] [--save]

Computed, from published rates: bytes that a device sends in a step by scheme, and the seconds that
they take on NVLink within a host and InfiniBand between hosts, beside those of the arithmetic; what
a checkpoint moves and how often one pays; what ranks ask of the first one. Nothing of it is
measured, latencies and overlap are left out, and every rate is the best that its vendor states.

Simulated, on this machine without a GPU: processes that append to journals, wait for one lock and
ask the store where ranks meet, as real ranks do. Its figures are counts and ratios.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from results import save_result

from pipeline.ledger.journal import HEARTBEAT_S, Journal, read_events
from pipeline.store.artifacts import Store
from pipeline.training.meeting import ALIVE, BEAT_S, Meeting

# -- published rates -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts of like devices. Rates are bytes a second in one direction.

    Attributes:
        within: Of a device to the others of its host.
        between: Of a host to the others, over all its ports.
        flops: Dense bf16 operations a second of a device.
        mfu: Share of them that a training reaches.
        storage: That the shared storage takes from one writer.
    """

    per_host: int
    within: float
    between: float
    flops: float
    mfu: float = 0.4
    storage: float = 5e9


CLUSTERS = {
    # NVIDIA DGX A100 datasheet: NVLink 600 GB/s both ways; 8 ports of HDR, 200 Gb/s; 312 TFLOP/s
    "DGX A100": Cluster(per_host=8, within=300e9, between=8 * 25e9, flops=312e12),
    # NVIDIA DGX H100 datasheet: NVLink 900 GB/s both ways; 8 ports of NDR, 400 Gb/s; 989 TFLOP/s
    "DGX H100": Cluster(per_host=8, within=450e9, between=8 * 50e9, flops=989e12),
    # the same with one port of 100 Gb/s a host, as rented hosts often have
    "H100, 100 Gb/s": Cluster(per_host=8, within=450e9, between=12.5e9, flops=989e12),
}
LOST_HOURS = 54 * 24 * 16384 / 419
"""Device-hours between two unexpected interruptions. Source: The Llama 3 Herd of Models (2024),
section 3.3.4: 419 in 54 days of 16,384 H100s."""
STATE_BYTES = 12  # a parameter in a checkpoint: fp32, and two moments of AdamW


# -- bytes of a step -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave in a step: a device for others of its host, and a host for other hosts."""

    within: float
    between: float

    def seconds(self, cluster: Cluster) -> float:
        """Return how long they take where neither waits for the other."""
        return max(self.within / cluster.within, self.between / cluster.between)


def ring(size: int, content: float) -> float:
    """Return the bytes that each of `size` sends to gather, or to reduce and scatter, `content`.

    Source: Patarasu and Yuan (2009), Bandwidth optimal all-reduce algorithms; NCCL's tests state it
    as (n - 1) / n of the bytes. An all-reduce is both, one after the other.
    """
    return (size - 1) / size * content


def ddp(parameters: float, devices: int, per_host: int, gradient: int = 4) -> Traffic:
    """Return the traffic of averaging gradients (fp32) over all devices.

    Rings over all ports carry a host's share once: each host sends as much as a device does.
    """
    sent = 2 * ring(devices, parameters * gradient)
    return Traffic(sent, sent if devices > per_host else 0.0)


def fsdp(
    parameters: float, devices: int, per_host: int, weight: int = 4, gradient: int = 4
) -> Traffic:
    """Return the traffic of gathering weights twice, and of scattering gradients, over all devices.

    Source: ZeRO (Rajbhandari et al. 2020), section 7: half as much again as averaging.
    """
    sent = ring(devices, parameters * (2 * weight + gradient))
    return Traffic(sent, sent if devices > per_host else 0.0)


def hsdp(
    parameters: float, devices: int, per_host: int, weight: int = 4, gradient: int = 4
) -> Traffic:
    """Return the traffic of `fsdp` within hosts, and of averaging shares of gradients between."""
    hosts = max(1, devices // per_host)
    within = ring(min(per_host, devices), parameters * (2 * weight + gradient))
    return Traffic(within, 2 * ring(hosts, parameters * gradient))


SCHEMES: dict[str, Callable[[float, int, int], Traffic]] = {"ddp": ddp, "fsdp": fsdp, "hsdp": hsdp}


def compute_seconds(parameters: float, tokens: float, cluster: Cluster) -> float:
    """Return the seconds of a device's arithmetic for its tokens of a step: 6 operations each."""
    return 6 * parameters * tokens / (cluster.flops * cluster.mfu)


def tokens_to_hide(parameters: float, sent_s: float, cluster: Cluster) -> float:
    """Return the tokens of a step on each device whose arithmetic takes as long as what is sent:
    with fewer, the links are what limits.
    """
    return sent_s * cluster.flops * cluster.mfu / (6 * parameters)


def steps_table(parameters: float, tokens: float, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return seconds of a step by cluster, scheme and number of devices.

    Args:
        tokens: Of a step, on each device.
    """
    rows: list[dict[str, Any]] = []
    for name, cluster in CLUSTERS.items():
        compute_s = compute_seconds(parameters, tokens, cluster)
        for scheme, traffic_of in SCHEMES.items():
            for devices in sizes:
                traffic = traffic_of(parameters, devices, cluster.per_host)
                sent_s = traffic.seconds(cluster)
                by_link = traffic.between / cluster.between > traffic.within / cluster.within
                rows.append(
                    {
                        "cluster": name,
                        "scheme": scheme,
                        "devices": devices,
                        "within_bytes": traffic.within,
                        "between_bytes": traffic.between,
                        "compute_s": compute_s,
                        "sent_s": sent_s,
                        "tokens_to_hide": tokens_to_hide(parameters, sent_s, cluster),
                        "efficiency_overlapped": min(1.0, compute_s / sent_s) if sent_s else 1.0,
                        "efficiency_exposed": compute_s / (compute_s + sent_s),
                        "slowest": "between hosts" if by_link else "within a host",
                    }
                )
    return rows


# -- checkpoints -----------------------------------------------------------------------------------


def daly_seconds(save_s: float, between_failures_s: float) -> float:
    """Return the time between two checkpoints that loses the least.

    Source: Daly (2006), A higher order estimate of the optimum checkpoint interval: its first
    order, sqrt(2 d M) - d.
    """
    return math.sqrt(2 * save_s * between_failures_s) - save_s


def checkpoint(parameters: float, devices: int, cluster: Cluster) -> dict[str, float]:
    """Return what a checkpoint moves and costs where the first rank writes it whole."""
    content = parameters * STATE_BYTES
    # what it gathers comes through its host's ports; it lies on the first rank's storage after
    gathered_s = content / cluster.between if devices > cluster.per_host else 0.0
    save_s = gathered_s + content / cluster.storage
    between_s = LOST_HOURS * 3600 / devices
    interval_s = daly_seconds(save_s, between_s)
    lost = save_s / (interval_s + save_s) + (interval_s / 2 + save_s) / between_s
    return {
        "devices": devices,
        "bytes": content,
        "save_s": save_s,
        "hours_between_failures": between_s / 3600,
        "interval_s": interval_s,
        "share_lost": lost,
    }


# -- what ranks ask of the first one ---------------------------------------------------------------


def asked(devices: int) -> dict[str, float]:
    """Return the questions a second that waiting ranks put to the store of the first one: each
    waits `BEAT_S` for a word, then looks for a sign of life, and whether there is one.
    """
    return {"devices": devices, "questions_per_s": 3 * (devices - 1) / BEAT_S}


def journalled(steps_per_s: float) -> dict[str, float]:
    """Return the lines a second of the journal: one writer, whatever the number of ranks.

    MLflow is given the points of curves alone, by one process that reads the journal.
    """
    return {"points_per_s": steps_per_s, "synced_per_s": 1 / HEARTBEAT_S}


# -- simulated -------------------------------------------------------------------------------------


def in_processes(count: int, work: Callable[[int], None]) -> float:
    """Run `work(number)` in as many processes at once; return the seconds until all ended."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(number,)) for number in range(count)]
    begun = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    return time.perf_counter() - begun


def appended(writers: int, lines: int, folder: Path) -> dict[str, float]:
    """Have writers append to one journal; count the lines that are whole, and the seconds."""
    path = folder / f"{writers}.jsonl"

    def write(number: int) -> None:
        journal = Journal(path)
        for step in range(lines):
            journal.write("points", arm=f"arm{number}", step=step, values={"loss": step / 7})
        journal.close()

    seconds = in_processes(writers, write)
    events = read_events(path, checked=True)
    whole = {(event["arm"], event["step"]) for event in events}
    return {"written": writers * lines, "whole": len(whole), "seconds": seconds}


def made_once(ranks: int, folder: Path) -> dict[str, int]:
    """Have processes want what one key stands for; count how often it was made, and found."""
    Store(folder)
    log = folder / "log"
    log.touch()

    def want(_: int) -> None:
        store = Store(folder)
        with store.lock("key"), log.open("a") as file:
            if store.recall("keys", "key") is None:
                with store.scratch() as out:
                    (out / "weights").write_bytes(b"0" * 1000)
                    artifact = store.commit(out, "model", {})
                store.remember("keys", "key", {"artifact": artifact.to_json()})
                file.write("made\n")
            else:
                file.write("found\n")

    in_processes(ranks, want)
    said = log.read_text().split()
    return {"ranks": ranks, "made": said.count("made"), "found": said.count("found")}


def answered(ranks: int, seconds: float) -> dict[str, float]:
    """Have as many connections ask the store where ranks meet as fast as they can; return how many
    questions a second it answers, and for how many waiting ranks that would do.
    """
    import torch.distributed

    dist: Any = torch.distributed
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    limit = timedelta(seconds=30)
    first = dist.TCPStore("127.0.0.1", port, ranks, True, limit, wait_for_workers=False)
    first.set(ALIVE, "0")
    others = [
        dist.TCPStore("127.0.0.1", port, ranks, False, limit, wait_for_workers=False)
        for _ in range(ranks - 1)
    ]
    done = [0] * len(others)
    until = time.perf_counter() + seconds

    def ask(number: int) -> None:
        while time.perf_counter() < until:
            others[number].check([ALIVE])
            done[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(others))]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    per_s = sum(done) / (time.perf_counter() - begun)
    each = asked(2)["questions_per_s"]
    return {"connections": ranks - 1, "answers_per_s": per_s, "ranks_it_would_do": per_s / each}


def told(ranks: int) -> dict[str, float]:
    """Have ranks wait for a word of the first one; count those that hear it, and those that find
    out that it is gone.
    """
    import torch.distributed

    dist: Any = torch.distributed
    store = dist.HashStore()
    meeting = Meeting(store, patience_s=60.0)
    heard = list[int]()

    def wait(number: int) -> None:
        meeting.await_first("told/0")
        heard.append(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(1, ranks)]
    for thread in threads:
        thread.start()
    meeting.put("told/0", "")
    for thread in threads:
        thread.join()
    return {"ranks": ranks, "heard": len(heard)}


def simulated(ranks: int) -> dict[str, Any]:
    """Return what simulated ranks found on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        one = appended(1, 64 * 50, Path(folder))
        many = appended(ranks, 50, Path(folder))
        rate = [each["written"] / each["seconds"] for each in (one, many)]
        return {
            "journal": {
                "writers": ranks,
                "written": many["written"],
                "whole": many["whole"],
                "rate_over_one_writer": rate[1] / rate[0],
            },
            "store": made_once(ranks, Path(folder, "store")),
            "told": told(ranks),
            "meeting": answered(ranks, 2.0),
        }


# -- printed ---------------------------------------------------------------------------------------


def printed(figures: dict[str, Any]) -> str:
    """Return the figures as tables."""
    lines = [
        "computed: a step",
        "cluster | scheme | devices | GB a host sends | compute s | sent s | tokens that hide it",
    ]
    for row in figures["steps"]:
        lines.append(
            f"{row['cluster']} | {row['scheme']} | {row['devices']} |"
            f" {row['between_bytes'] / 1e9:.1f} | {row['compute_s']:.3f} | {row['sent_s']:.3f}"
            f" ({row['slowest']}) | {row['tokens_to_hide']:.0f}, efficiency"
            f" {row['efficiency_exposed']:.2f} to {row['efficiency_overlapped']:.2f}"
        )
    lines += ["", "computed: checkpoints written by the first rank, DGX H100"]
    for row in figures["checkpoints"]:
        lines.append(
            f"{row['devices']} devices: {row['bytes'] / 1e9:.0f} GB, {row['save_s']:.0f} s, every"
            f" {row['interval_s'] / 60:.0f} min, {row['share_lost']:.1%} of the time lost"
        )
    lines += ["", "computed: what waiting ranks ask of the first one"]
    for row in figures["asked"]:
        lines.append(f"{row['devices']} devices: {row['questions_per_s']:.0f} questions a second")
    found = figures["simulated"]
    lines += [
        "",
        f"simulated on {os.cpu_count()} cores",
        f"journal: {found['journal']}",
        f"store: {found['store']}",
        f"told: {found['told']}",
        f"meeting: {found['meeting']}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Compute, simulate, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=7e9)
    parser.add_argument("--tokens", type=float, default=8192, help="of a step, on each device")
    parser.add_argument("--ranks", type=int, default=64, help="that are simulated")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    sizes = (8, 64, 256, 1024)
    figures: dict[str, Any] = {
        "parameters": args.parameters,
        "tokens": args.tokens,
        "steps": steps_table(args.parameters, args.tokens, sizes),
        "checkpoints": [
            checkpoint(args.parameters, devices, CLUSTERS["DGX H100"]) for devices in sizes
        ],
        "asked": [asked(devices) for devices in sizes],
        "journal": journalled(1.0),
        "simulated": simulated(args.ranks),
    }
    log = printed(figures)
    print(log)
    if args.save:
        print(save_result("scaling", figures, log))


if __name__ == "__main__":
    main()
