"""Times that others disturbed are not compared, in reports, serving and gates; FLOPs still are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import NO_DRIVER, FakeNvml, Gpu
from here import here, result_in
from make_journal import own_name
from quiet import Quiet
from reports import whole_report

from pipeline.compare.savings import Reading, Spend, Tolerance, Trained, training_saving
from pipeline.evaluation.serving.measure import machine_conditions
from pipeline.gate.judge import _disturbed_training
from pipeline.gate.references import _why_no_charge
from pipeline.ledger import others
from pipeline.ledger.devices.cuda.nvml import Absent, open_reader
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.others import Others
from pipeline.ledger.values import Value, measured, null

CORES = Tolerance(0.1, "the cores", is_shared=True)


def saving(
    student: Value | None, control: Value | None, tolerance: Tolerance = CORES, **more: Any
) -> dict[str, Any]:
    """The trial of the findings: 4.3 min against 2.9 min for equal FLOPs, the student's half
    disturbed.
    """
    spends = {
        "teacher": Spend(arm="teacher", existing=True, flops=0.0),
        "student": Spend(arm="student", work_h=4.3 / 60, flops=1e12, foreign_load=student, **more),
        "control": Spend(arm="control", work_h=2.9 / 60, flops=1e12 / 0.997, foreign_load=control),
    }
    trained = [
        Trained(arm=arm, final=1.0, curve=(Reading(100, 1.0, 0.01),))
        for arm in ("student", "control")
    ]
    return training_saving(*trained, spends, margin=0.01, lower_is_better=True, tolerance=tolerance)


def test_a_disturbed_saving_of_time_is_null_and_the_flops_part_stays() -> None:
    found = saving(measured(0.48), measured(0.02))
    assert found["why_missing"] == "others used 48% of the cores while student trained"
    assert {name: found[name]["value"] for name in ("systems", "new_spend_saving", "bound")} == {
        "systems": None,
        "new_spend_saving": None,
        "bound": None,
    }
    assert found["algorithmic"]["value"] == pytest.approx(0.003, abs=1e-4)
    less = 1 - (4.3 * 0.52) / (2.9 * 0.98)
    assert found["less_others"] == {
        "value": pytest.approx(less),
        "provenance": "estimated",
        "why_missing": None,
    }
    assert found["c_arm"]["value"] == pytest.approx(4.3 / 60)  # what was spent was spent


@pytest.mark.parametrize(
    ("student", "control", "named"),
    [
        (
            0.48,
            0.3,
            (
                "others used 48% of the cores while student trained; "
                "others used 30% of the cores while control trained"
            ),
        ),
        (0.0, 0.11, "others used 11% of the cores while control trained"),
        (0.1, 0.1, None),
        (0.0, 0.0, None),
    ],
)
def test_either_side_disturbs_and_the_limit_itself_does_not(
    student: float, control: float, named: str | None
) -> None:
    assert saving(measured(student), measured(control))["why_missing"] == named


def test_what_is_unknown_is_shown_and_said() -> None:
    found = saving(null("window shorter than 0.5 s"), None)
    assert found["value"] is not None
    assert (
        "disturbance unknown: student (window shorter than 0.5 s), control (not recorded)"
        in found["rule"]
    )
    assert found["less_others"]["why_missing"] == "window shorter than 0.5 s"


def test_nobody_looks_without_a_limit() -> None:
    found = saving(measured(0.9), None, Tolerance(None, "the cores", is_shared=True))
    assert found["value"] == pytest.approx(1 - 4.3 / 2.9)
    assert "unknown" not in found["rule"]


def test_a_teacher_in_both_chains_disturbs_nothing_where_it_cancels() -> None:
    assert (
        saving(measured(0.0), measured(0.0), depends_on=("teacher",))["why_missing"]
        == "existing model: teacher"
    )


def test_on_a_gpu_nothing_is_taken_off() -> None:
    found = saving(measured(0.5), measured(0.0), Tolerance(0.1, "the device"))
    assert found["why_missing"] == "others used 50% of the device while student trained"
    assert found["less_others"]["value"] is None


# -- conditions of a serving pass -----------------------------------------------------------------


@pytest.mark.parametrize(
    "reader",
    [
        Absent("no counters of AMD devices are read yet"),
        open_reader(["GPU-1"], nvml=FakeNvml(init=NO_DRIVER)),
        open_reader(["MIG-9"], nvml=FakeNvml()),
    ],
)
def test_a_gpu_without_a_reader_never_takes_the_cpus_load(
    reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "accounts", Quiet(taken=0.0))
    found = machine_conditions(Sampler(reader), (0, 10), Others(), "cuda")
    assert found["foreign_load"]["value"] is None
    assert found["foreign_load"]["why_missing"] == reader.why
    assert found["host_foreign_load"]["value"] == 0.0


def test_a_mig_slice_has_no_foreign_load_of_its_own() -> None:
    nvml = FakeNvml(Gpu(mig=1))
    sampler = Sampler(open_reader(["GPU-1"], nvml=nvml, now_ns=nvml.clock), now_ns=nvml.clock)
    start = nvml.now_ns
    sampler.mark()
    nvml.pass_time(2.0)
    sampler.mark()
    found = machine_conditions(sampler, (start, nvml.now_ns), Others(), "cuda")
    assert found["foreign_load"]["why_missing"].startswith("GPU-1: MIG")


def test_a_cpus_load_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "accounts", Quiet(taken=0.3, steal=0.05))
    meter = Others()
    found = machine_conditions(Sampler(Absent("a CPU run uses no GPU")), (0, 10), meter, "cpu")
    assert found["foreign_load"]["value"] == pytest.approx(0.3)
    assert found["steal_share"]["value"] == pytest.approx(0.05)
    assert found["throttle_share"]["value"] is None


# -- whole runs -----------------------------------------------------------------------------------

TINY = [
    "tracking.charts=false",
    "stages.teacher.steps=2",
    "training.steps=3",
    "training.batch_size=4",
    "training.sequence_length=48",
    "training.eval_documents=1",
    "data.max_documents=30",
    "quality.max_documents=20",
    "quality.bootstrap=200",
    "quality.margin=1",
    "model.shape.hidden_size=64",
    "model.shape.heads=1",
    "model.shape.intermediate_size=64",
    "model.shape.layers=2",
    "serving.blocks=2",
    "serving.load.new=3",
    "serving.load.prompt=16",
    "serving.batches=[1]",
    "stages.student.allow_weak_teacher=true",
]


@pytest.mark.slow
def test_a_busy_machine_is_seen_in_every_window_and_a_quiet_one_reads_serving_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "mlruns").mkdir()
    (root / "mlflow.db").rename(root / "mlruns/mlflow.db")
    monkeypatch.setattr(others, "accounts", Quiet(taken=0.48))
    assert here(root, "recipe=distill", *TINY).returncode == 0
    busy = result_in(root)
    for row in busy["rows"]:
        conditions = row["ledger"]["conditions"]
        for name in (
            "foreign_load",
            "work_foreign_load",
            "assess_foreign_load",
            "host_foreign_load",
        ):
            assert conditions[name]["value"] == pytest.approx(0.48), (row["arm"], name)
    against = {pair["base"]: pair for pair in busy["comparisons"]}
    training = against["control_compute"]["training"]
    assert "others used 48% of the cores while student trained" in training["why_missing"]
    assert training["algorithmic"]["value"] is not None
    assert training["less_others"]["provenance"] == "estimated"
    said = (
        "others used 48% of the cores while serving was measured; the same command measures it"
        " again"
    )
    assert against["teacher"]["serving"]["why_missing"] == said
    assert against["teacher"]["payback"]["value"] is None
    assert busy["run"]["compare_conditions"]["foreign_load"]["value"] == pytest.approx(0.48)
    report = whole_report(root / "mlruns/latest")
    assert "## What else used the machine" in report
    assert "others used 48% of the cores while student trained" in report
    _in_mlflow(root, busy["run_id"])
    monkeypatch.setattr(others, "accounts", Quiet())
    assert here(root, "recipe=distill", *TINY, "tracking.mlflow=false").returncode == 0
    again = result_in(root)
    assert [row["reused"] for row in again["rows"]] == [busy["run_id"]] * 4
    against = {pair["base"]: pair for pair in again["comparisons"]}
    assert against["teacher"]["serving"]["value"] is not None
    assert again["run"]["device_hours"]["compare"]["value"] > 0
    # the windows were what they were
    assert "48%" in against["control_compute"]["training"]["why_missing"]
    assert (
        here(
            root, "recipe=distill", *TINY, "tracking.mlflow=false", "ledger.max_foreign_load=null"
        ).returncode
        == 0
    )
    shown = {pair["base"]: pair for pair in result_in(root)["comparisons"]}["control_compute"][
        "training"
    ]
    assert shown["why_missing"] is None


def _in_mlflow(root: Path, run_id: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlruns/mlflow.db'}")
    experiment = client.get_experiment_by_name("distill")
    assert experiment is not None
    runs = {
        own_name(run): run.data.metrics for run in client.search_runs([experiment.experiment_id])
    }
    assert runs["student"]["compute/work_foreign_load"] == pytest.approx(0.48)
    assert runs[run_id]["compute/run_compare_foreign_load"] == pytest.approx(0.48)


# -- a gate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [{"value": 2.0, "provenance": "measured", "why_missing": None}, {"value": 0.1}, 0.3, None],
)
def test_a_charge_whose_load_is_no_share_is_not_believed(load: Any) -> None:
    charge = {
        "work_device_hours": 1.0,
        "retry_device_hours": 0.0,
        "model_flops": 1.0,
        "foreign_load": load,
    }
    assert _why_no_charge(charge) == "foreign_load is no share"
    assert _why_no_charge({**charge, "foreign_load": measured(0.2).to_json()}) is None


def gate(limit: float | None, candidate: Value | None, baseline: Value | None) -> Any:
    def release(load: Value | None) -> Any:
        return SimpleNamespace(charge={} if load is None else {"foreign_load": load.to_json()})

    sides = {"candidate": release(candidate), "baseline": release(baseline)}
    return SimpleNamespace(policy=SimpleNamespace(max_foreign_load=limit), releases=lambda: sides)


def test_a_gate_that_asks_for_training_answers_invalid_where_a_side_was_disturbed() -> None:
    loud, unknown = _disturbed_training(gate(0.1, measured(0.48), measured(0.1)))
    assert loud == ["others used 48% of the device while the candidate trained, 10% allowed"]
    assert unknown == []
    loud, unknown = _disturbed_training(gate(0.1, null("killed"), None))
    assert (loud, unknown) == ([], ["disturbance unknown while the candidate trained (killed)"])
    assert _disturbed_training(gate(None, measured(0.9), measured(0.9))) == ([], [])
