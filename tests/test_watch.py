"""Which GPUs a command used, by a fake NVML: visible ones by UUID, those it appeared on, and what
they did.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_nvml import NO_DRIVER, NOT_SUPPORTED, FakeNvml, Gpu, NVMLError

from pipeline.config.settings.cost import CostConfig
from pipeline.errors import UserError
from pipeline.ledger.gpu_usage import FIGURES, Usage, unread
from pipeline.ledger.ranks import Life
from pipeline.ledger.records import METERED, why_damaged
from pipeline.ledger.shapes import Metered, ReportedDevices
from pipeline.ledger.values import measured, null
from pipeline.report.metered import _form
from pipeline.runs.metering import row as row_of
from pipeline.runs.metering import watch as watch_of
from pipeline.runs.metering.presence import CONTEXT_BYTES, Presence, visible
from pipeline.runs.metering.row import Facts, make_row
from pipeline.runs.metering.watch import Used, Watch, as_reported, cpu_host, over_devices
from pipeline.store.artifacts import plain

S = 10**9


class Node(FakeNvml):
    """GPUs by number, with the processes that the driver shows."""

    def __init__(self, *uuids: str, **more: Any) -> None:
        super().__init__(*(Gpu(uuid) for uuid in uuids), **more)
        self.pids: dict[str, list[int]] = {uuid: [7] for uuid in uuids}

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, handle: Gpu) -> str:
        return handle.uuid

    def nvmlDeviceGetName(self, handle: Gpu) -> str:
        return f"NVIDIA {handle.uuid[-1]}00"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Gpu) -> list[Any]:
        if "processes" in handle.refuses:
            raise NVMLError(handle.refuses["processes"])
        return [SimpleNamespace(pid=pid) for pid in self.pids[handle.uuid]]


IDS = ("GPU-aa1", "GPU-ab2", "GPU-b3")


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (None, IDS),
        ("", ()),
        ("NoDevFiles", ()),
        ("-1", ()),
        ("1", ("GPU-ab2",)),
        ("2, 0", ("GPU-b3", "GPU-aa1")),
        ("GPU-b", ("GPU-b3",)),
        ("GPU-a", ()),
        ("0,9,1", ("GPU-aa1",)),
        ("GPU-b3,GPU-aa1", ("GPU-b3", "GPU-aa1")),
    ],
)
def test_visible_gpus_are_those_cuda_would_show(named: str | None, found: tuple[str, ...]) -> None:
    environ = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    assert tuple(visible(Node(*IDS), environ)) == found


def _presence(node: Node) -> tuple[Presence, list[str]]:
    said: list[str] = []
    presence = Presence(node, visible(node, {}), said.append)
    presence.start()
    presence.stop()  # the test looks by itself
    return presence, said


def test_a_new_process_or_a_context_s_memory_is_the_command() -> None:
    node = Node(*IDS)
    node.gpus[1].refuses["processes"] = NOT_SUPPORTED
    presence, said = _presence(node)
    presence.look()
    assert said == []
    node.gpus[0].memory += CONTEXT_BYTES  # not more than that
    node.gpus[1].memory += CONTEXT_BYTES + 1
    node.pids["GPU-b3"] = [7, 8]
    presence.look()
    presence.look()
    assert (said, presence.used) == (["GPU-ab2", "GPU-b3"], {"GPU-ab2", "GPU-b3"})
    node.pids["GPU-b3"] = []  # it has ended: used all the same
    presence.look()
    assert presence.used == {"GPU-ab2", "GPU-b3"}


def test_who_was_there_before_is_not_the_command() -> None:
    node = Node(*IDS)
    presence, said = _presence(node)
    node.pids["GPU-aa1"] = []
    presence.look()
    assert said == []


def _watched(
    node: Node, appears: tuple[str, ...], opened: dict[str, str | None], asked: Any = None
) -> Used:
    watch = Watch(asked, {}, nvml=node)
    watch.start()
    for uuid in appears:
        node.pids[uuid] = [7, 8]
    assert watch._presence is not None
    watch._presence.look()
    return watch.stop(0, 1, opened)


def test_granted_but_untouched_gpus_are_not_counted() -> None:
    used = _watched(Node(*IDS), ("GPU-ab2",), {"GPU-b3": "as the rank says"})
    assert (used.kind, used.ids, used.name) == ("cuda", ("GPU-ab2", "GPU-b3"), "NVIDIA 200")
    assert used.placement["device_names"] == ["NVIDIA 200", "NVIDIA 300"]
    assert used.placement["uuids"] == ["GPU-ab2", "GPU-b3"]
    assert used.read().energy_j.value is None


def test_none_used_is_a_cpu_host_and_says_so() -> None:
    used = _watched(Node(*IDS), (), {})
    assert (used.kind, used.count) == ("cpu", 1)
    assert used.notes == ("3 GPUs were visible to the command, and none was used",)


def test_only_gpus_that_are_asked_for_are_looked_at() -> None:
    assert _watched(Node(*IDS), ("GPU-aa1", "GPU-b3"), {}, asked=("GPU-b3",)).ids == ("GPU-b3",)
    with pytest.raises(
        UserError,
        match=r"^--gpus: NVML does not know GPU-x .*; name some of GPU-aa1, GPU-ab2, GPU-b3$",
    ):
        Watch(("GPU-x",), {}, nvml=Node(*IDS))


def test_without_a_driver_ranks_are_believed_and_the_command_line_is_not() -> None:
    """A rank holds the GPU that it names; a name on the command line may be of none."""
    watch = Watch(None, {}, nvml=Node(*IDS, init=NO_DRIVER))
    watch.start()
    assert watch.stop(0, 1, {}).kind == "cpu"
    used = watch.stop(0, 1, {"GPU-q": "NVIDIA H200"})
    assert (used.ids, used.name) == (("GPU-q",), "NVIDIA H200")
    assert used.read().energy_j.why_missing == "no NVIDIA driver to ask (Driver Not Loaded)"
    with pytest.raises(
        UserError, match=r"^--gpus: GPU-x cannot be confirmed: no NVIDIA driver to ask"
    ):
        Watch(("GPU-x",), {}, nvml=Node(init=NO_DRIVER))
    assert replace(Watch((), {}, nvml=Node(*IDS)).stop(0, 1, {}), load=None) == cpu_host()


def test_what_is_journaled_is_read_back() -> None:
    used = as_reported({"GPU-q": "NVIDIA H200"}, "gone")
    assert Used.from_json(used.to_json()).ids == ("GPU-q",)


# -- rows on GPUs ---------------------------------------------------------------------------------


def _row(
    used: Used,
    *,
    grant: dict[str, Any] | None,
    lives: tuple[Life, ...] = (),
    status: str = "FINISHED",
) -> Any:
    start = {
        "identity": {},
        "cost": plain(CostConfig(per_device_hour=2.0)),
        "node": "n1",
        "grant": grant,
    }
    facts = Facts(
        name="sft",
        status=status,
        why=None,
        start_ns=0,
        end_ns=3600 * S,
        used=used,
        host_peak=measured(1),
    )
    return make_row(start, facts, lives)["ledger"]


def _two(**figures: Any) -> Used:
    known = {
        "energy_j": measured(5e6),
        "busy": measured(0.9),
        "sm_active": measured(0.5),
        "tensor_active": null("no"),
    }
    usage = replace(unread("not asked"), **{**known, **figures})
    return Used(kind="cuda", name="NVIDIA H200", ids=("GPU-a", "GPU-b"), usage=usage)


SLURM = {"scheduler": "slurm", "job_id": "1", "gpus": 8}


def test_gpu_hours_are_nested_and_close() -> None:
    lives = tuple(
        Life(
            rank=rank,
            local_rank=rank,
            world_size=2,
            start_ns=0,
            end_ns=end * S,
            phases_ns={"forward": end * S},
        )
        for rank, end in ((0, 3600), (1, 1800))
    )
    ledger = _row(_two(), grant=SLURM, lives=lives)
    assert ledger["meter_problems"] == []
    hours = {name: value["value"] for name, value in ledger["gpu_hours"].items()}
    assert hours == {
        "attached": 2.0,
        "allocated": 8.0,
        "busy": 1.8,
        "sm_active": 1.0,
        "tensor_active": None,
        "productive": 1.5,
        "support": 0.0,
        "wasted": 0.5,
    }
    assert {
        name: value["value"] for name, value in ledger["device_hours"]["wasted_by"].items()
    } == {"idle_rank": 0.5}
    assert ledger["phases_ns"] == {"forward": 2700 * S, "idle_rank": 900 * S}
    assert (ledger["energy_j"]["value"], ledger["cost"]["amount"]["provenance"]) == (
        5e6,
        "declared",
    )


def test_shares_that_contradict_each_other_name_themselves() -> None:
    ledger = _row(_two(sm_active=measured(0.95)), grant=None)
    assert ledger["meter_problems"] == ["sm_active is more than busy: 360 s"]
    assert ledger["meter_valid"] is False


def test_doubts_about_a_reading_stand_in_the_row_and_do_not_undo_its_books() -> None:
    ledger = _row(_two(problems=("energy: the counter of GPU-a was reset",)), grant=None)
    assert ledger["meter_problems"] == ["energy: the counter of GPU-a was reset"]
    assert ledger["meter_valid"] is True
    assert ledger["conditions"]["problems"] == ledger["meter_problems"]


def test_usage_of_several_devices_is_one_window_s() -> None:
    all_of: Any = lambda v: dict.fromkeys(FIGURES, measured(v))
    one = Usage(**all_of(1.0), problems=("odd",))
    two = Usage(**all_of(3.0), problems=("odd",), throttle_reasons=("power cap",))
    both = over_devices([one, two])
    added, highest = (
        ("energy_j", "energy_integral_j", "power_w_mean"),
        ("memory_used_peak_bytes", "temperature_c_max"),
    )
    wanted = {
        **dict.fromkeys(FIGURES, 2.0),
        **dict.fromkeys(added, 4.0),
        **dict.fromkeys(highest, 3.0),
        "sm_clock_mhz_min": 1.0,
        "foreign_load": None,
        "module_energy_j": None,  # it would count twice
    }
    assert {name: getattr(both, name).value for name in FIGURES} == wanted
    assert (both.problems, both.throttle_reasons) == (("odd",), ("power cap",))
    assert over_devices([one]).energy_j == measured(1.0)
    assert over_devices([one, unread("GPU-b fell off")]).busy.why_missing == "GPU-b fell off"


def test_a_row_has_the_conditions_its_devices_worked_under() -> None:
    ledger = _row(_two(throttle_share=measured(0.25), throttle_reasons=("power cap",)), grant=None)
    assert ledger["conditions"]["throttle_share"]["value"] == 0.25
    assert _form("compute/power_w_mean", 412.34, {}) == "412 W"
    assert _form("compute/sm_active_gpu_hours", 0.5, {}) == "30.0 min of GPU time"
    assert ledger["conditions"]["throttle_reasons"] == ["power cap"]


def test_a_grant_that_a_command_never_touched_is_seen() -> None:
    ledger = _row(cpu_host(), grant=SLURM, status="FAILED")
    assert ledger["gpu_hours"]["allocated"]["value"] == 8.0
    assert ledger["gpu_hours"]["attached"]["value"] is None
    assert ledger["placement"]["uuids"] == []


def test_a_first_line_may_know_no_grant_but_no_half_of_one() -> None:
    start: dict[str, Any] = {
        "run_id": "r",
        "started_ns": 0,
        "name": "sft",
        "node": "n1",
        "identity": {},
        "params": {"command": "true"},
        "cost": {},
    }
    assert why_damaged(start, METERED) is None
    assert row_of._granted(cast("Metered", start)) is None
    assert why_damaged({**start, "grant": SLURM}, METERED) is None
    assert why_damaged({**start, "grant": {"scheduler": "slurm"}}, METERED) is not None


def test_a_device_that_reports_nothing_breaks_no_placement() -> None:
    told: ReportedDevices = {"uuids": ["GPU-a"], "device_names": ["A"], "power_limit_w": [700.0]}
    assert watch_of._joined([told, {}]) == told


# -- a GPU that is lost, a driver that answers what nobody foresaw --------------------------------


class Lossy(Node):
    """The GPU with number `lost` does not answer any more."""

    lost = 1
    error: type[Exception] = RuntimeError

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if index == self.lost:
            raise self.error("GPU is lost")
        return super().nvmlDeviceGetHandleByIndex(index)


@pytest.mark.parametrize("error", [RuntimeError, ZeroDivisionError])
def test_a_lost_gpu_leaves_the_numbers_of_the_others_as_they_are(error: type[Exception]) -> None:
    node = Lossy(*IDS)
    node.error = error
    assert tuple(visible(node, {})) == ("GPU-aa1", "GPU-b3")
    assert tuple(visible(node, {"CUDA_VISIBLE_DEVICES": "2,0"})) == ("GPU-b3", "GPU-aa1")
    # as in CUDA, the list ends there
    assert tuple(visible(node, {"CUDA_VISIBLE_DEVICES": "0,1,2"})) == ("GPU-aa1",)
    assert tuple(visible(node, {"CUDA_VISIBLE_DEVICES": "0,MIG-gone"})) == ("GPU-aa1",)


@pytest.mark.parametrize(
    "name",
    [
        "nvmlDeviceGetCount",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetName",
        "nvmlInit",
        "nvmlDeviceGetUUID",
    ],
)
def test_a_driver_that_fails_ends_no_metering(name: str) -> None:
    node = Node(*IDS)

    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("unforeseen")

    setattr(node, name, fail)
    watch = Watch(None, {}, nvml=node)
    watch.start()
    used = watch.stop(0, 1, {"GPU-b3": "NVIDIA 300"})
    assert used.kind == "cuda"
    assert used.ids == ("GPU-b3",)
