"""Take the README's picture: the arms of the newest run side by side in the MLflow UI.

    python docs/screenshot.py [--root mlruns] [--browser chromium] [--out docs/mlflow-comparison.png]

Starts `mlflow ui` on a free loopback port over the store of `--root`, opens MLflow's comparison of the stages of the
newest run in a headless Chromium, and ends both.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from mlflow import MlflowClient

SIZE = "1500,1350"
RENDER_MS = 20_000  # of the browser's own time; the page draws after its requests


def comparison_url(root: Path, server: str) -> str:
    """Return the address of MLflow's comparison of the newest run's stages."""
    run_id = (root / "latest").resolve().name
    client = MlflowClient(tracking_uri=f"sqlite:///{root.resolve() / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, f"tags.`pipeline.run` = '{run_id}'")
    stages = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    query = urllib.parse.urlencode({"searchFilter": stages, "compareRunsMode": "CHART"})
    return f"{server}/#/experiments/{parent.info.experiment_id}/runs?{query}"


def wait_for(server: str, seconds: float = 60) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{server}/health", timeout=2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("mlruns"))
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "mlflow-comparison.png")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = f"http://127.0.0.1:{port}"
    store = f"sqlite:///{args.root.resolve() / 'mlflow.db'}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        store,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    ui = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(server)
        with tempfile.TemporaryDirectory() as profile:
            subprocess.run(
                [args.browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}",
                 "--hide-scrollbars", f"--window-size={SIZE}", f"--virtual-time-budget={RENDER_MS}",
                 f"--screenshot={args.out.resolve()}", comparison_url(args.root, server)],
                check=True, capture_output=True, timeout=180,
            )  # fmt: skip
    finally:
        ui.terminate()
        ui.wait(30)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
