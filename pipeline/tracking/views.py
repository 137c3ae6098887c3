"""How MLflow's UI shows an experiment of ours: in training mode, with views of the core figures.

What a reader chose last (columns, charts) the UI keeps in the reader's browser; no server can set
it. It does honour tags of the experiment, which is what is written here:

- `mlflow.experimentKind`: without it the UI guesses, and files runs under GenAI evaluation;
- `mlflow.experiment.primaryMetric.name`: whose chart comes first where no view is open;
- `mlflow.sharedViewState.<id>`: a view in the menu of saved views, and at
  `?viewStateShareKey=<id>`: columns, sections of charts, grouping;
- `mlflow.note.content`: the experiment's description, which links to the views.

They are written once for each version of this file, and only the views over what was there. What
people change or delete in the UI stays so.

Source: MLflow 3.17, `ExperimentPageUIState.ts`, `useSharedExperimentViewState.tsx`, `runs-charts/`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from typing import Any

KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
PRIMARY, NOTE = "mlflow.experiment.primaryMetric.name", "mlflow.note.content"
VIEW = "mlflow.sharedViewState."
WRITTEN = "pipeline.views"  # the digest of what was written of all this
CORE, ARMS = "pipeline", "pipeline-arms"  # ids of views
PRIMARY_KEY = "quality/primary"
COLUMNS = {
    "metrics.`quality/primary`": 130,
    "metrics.`compute/device_seconds`": 190,
    "metrics.`compute/device_hours`": 180,
    "metrics.`compute/run_device_seconds`": 210,
    "tags.`changed`": 260,
    "tags.`device`": 140,
    "attributes.`Dataset`": 240,
}
"""Columns of the table, with their widths in pixels."""
NAME = "attributes.`Run Name`"
OF_ARMS = list(COLUMNS)[:3]
BARS = ("quality/primary", "compute/device_seconds", "compute/run_device_seconds")
"""Device-hours are a column alone: the UI's bars show two decimals."""
COST, QUALITY = "compute/device_seconds", PRIMARY_KEY
ALWAYS = ("quality/primary", "compute/device_seconds", "compute/wall_s")
"""What no run lacks that made a model: parallel coordinates leave out a run that lacks one."""
SECTIONS = ("train", "quality", "serving", "savings", "compute", "forecast", "cost", "gate")
"""Of all other charts, which the UI makes by itself, shut until somebody opens them; `train` is
open.
"""


def link(server: str, experiment: str, view: str = CORE) -> str:
    """Return the address of a view of an experiment."""
    query = f"workflowType=machine_learning&viewStateShareKey={view}"
    return f"{server}/#/experiments/{experiment}/runs?{query}"


def set_up(client: Any, experiment: Any) -> None:
    """Have the UI show an experiment as this project's; do nothing where that was done.

    Args:
        client: MLflow's.
        experiment: As the client returns it.
    """
    wanted = _tags(experiment.experiment_id)
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    had = experiment.tags
    if had.get(WRITTEN) == digest:
        return
    for name, value in wanted.items():
        if name.startswith(VIEW) or not had.get(name):
            client.set_experiment_tag(experiment.experiment_id, name, value)
    client.set_experiment_tag(experiment.experiment_id, WRITTEN, digest)


def _tags(experiment: str) -> dict[str, str]:
    core, arms = (link("", experiment, view).removeprefix("/") for view in (CORE, ARMS))
    return {
        KIND: TRAINING,
        PRIMARY: PRIMARY_KEY,
        NOTE: (
            f"Views: [core figures]({core}) of runs and their stages,"
            f" [arms over seeds]({arms}). `quality/primary` is the quality named by the tag"
            " `quality_key`."
        ),
        VIEW + CORE: _saved("Core figures", _state(list(COLUMNS), BARS)),
        VIEW + ARMS: _saved(
            "Arms over seeds",
            {
                **_state(OF_ARMS, BARS[:2]),
                "searchFilter": "tags.arm LIKE '%'",
                "groupBy": {
                    "aggregateFunction": "average",
                    "groupByKeys": [
                        {"mode": "tag", "groupByData": "run"},
                        {"mode": "tag", "groupByData": "arm"},
                    ],
                },
            },
        ),
    }


def _state(columns: list[str], bars: tuple[str, ...]) -> dict[str, Any]:
    """Return what the UI keeps of a view, by its names."""
    own = "core"
    charts = [
        *({**_chart("BAR", key, own), "metricKey": key, "displayName": key} for key in bars),
        {
            **_chart("SCATTER", "scatter", own),
            "xaxis": {"key": COST, "type": "METRIC"},
            "yaxis": {"key": QUALITY, "type": "METRIC"},
        },
        {
            **_chart("PARALLEL", "parallel", own),
            "selectedParams": [],
            "selectedMetrics": list(ALWAYS),
            "showAllRuns": False,
        },
    ]
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": [NAME, *columns],
        "columnWidths": {NAME: 320, **{name: COLUMNS[name] for name in columns}},
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": charts,
        "compareRunSections": [
            _section(own, "Core figures", is_open=True),
            *(_section(name, name, is_open=name == "train") for name in SECTIONS),
        ],
        "isAccordionReordered": True,
        "viewMaximized": False,
        "runListHidden": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
    }


def _chart(kind: str, name: str, section: str) -> dict[str, Any]:
    return {
        "uuid": f"{section}-{name}",
        "type": kind,
        "runsCountToCompare": 20,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
    }


def _section(name: str, title: str, *, is_open: bool) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": title,
        "display": is_open,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }


def _saved(name: str, state: dict[str, Any]) -> str:
    """Return a saved view as its tag holds it: MLflow takes 5,000 characters, so it is packed as
    the UI packs it.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})
