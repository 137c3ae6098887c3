"""Take the documentation's pictures of a report and of the MLflow UI, of the newest run under a
root.

    python docs/screenshot.py [--root mlruns] [--out docs]

Starts `mlflow ui` on a free loopback port over the store of `--root`, opens what PICTURES names in
a headless Chromium, and ends both. `report.png` is the first screen of the run's report.html. Needs
`pip install selenium`, Chromium and its driver.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.tracking.views import ARMS, link

FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
)
EXPANDERS = ".ag-row [data-component-id*='expand'], .ag-row button"
MODEL_TRAINING = "workflowType=machine_learning"
SHOW_WHOLE_TABLES = """
for (const element of document.querySelectorAll("#root *")) {
  const [shown, whole] = [element.clientHeight, element.scrollHeight];
  if (shown > 100 && shown < 500 && whole > shown + 50) {
    element.style.maxHeight = "none";
    element.style.height = whole + "px";
  }
}
window.dispatchEvent(new Event("resize"));
"""


def runs_page(server: str, parent: Any, children: list[Any]) -> str:
    return link(server, parent.info.experiment_id)


def charts_page(server: str, parent: Any, children: list[Any]) -> str:
    return f"{link(server, parent.info.experiment_id)}&compareRunsMode=CHART"


def arms_page(server: str, parent: Any, children: list[Any]) -> str:
    return link(server, parent.info.experiment_id, ARMS)


def comparison_page(server: str, parent: Any, children: list[Any]) -> str:
    runs = json.dumps([child.info.run_id for child in children])
    experiments = json.dumps([parent.info.experiment_id])
    query = urllib.parse.urlencode({"runs": runs, "experiments": experiments})
    return f"{server}/#/compare-runs?{query}&{MODEL_TRAINING}"


Page = Callable[[str, Any, list[Any]], str]
PICTURES: dict[str, tuple[Page, str, tuple[int, int]]] = {
    "mlflow-runs.png": (runs_page, "compute/device_seconds", (1700, 800)),
    "mlflow-charts.png": (charts_page, "Parallel Coordinates", (1700, 1150)),
    "mlflow-arms.png": (arms_page, "arm: ", (1700, 800)),
    "mlflow-comparison.png": (comparison_page, "compute/device_hours", (1500, 1540)),
}
"""Pictures: the page, a text that it shows when it is there, and its size in pixels."""


REPORT_SIZE = (1200, 1500)


def newest(root: Path) -> tuple[Any, list[Any]]:
    """Return the newest run that made a model as MLflow has it, and its stages."""
    run_id = (root / "latest").resolve().name
    client = MlflowClient(tracking_uri=f"sqlite:///{root.resolve() / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, f"tags.`pipeline.run` = '{run_id}'")
    children = client.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}'",
        order_by=["start_time ASC"],
    )
    return parent, list(children)


def wait_for(server: str, seconds: float = 180) -> None:
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


def take(browser: Any, url: str, text: str, size: tuple[int, int], out: Path) -> None:
    """Open `url`, wait until it shows a text, and save what is seen."""
    browser.set_window_size(*size)
    browser.get("about:blank")
    browser.get(url)
    wait = WebDriverWait(browser, 90)
    wait.until(lambda b: text in (b.execute_script("return document.body.innerText") or ""))
    time.sleep(4)
    for close in browser.find_elements(
        By.CSS_SELECTOR, "[data-component-id='mlflow.assistant.chat_panel.close']"
    ):
        browser.execute_script("arguments[0].click()", close)
    for expander in browser.find_elements(By.CSS_SELECTOR, EXPANDERS)[:1]:
        browser.execute_script("arguments[0].click()", expander)
    if "compare-runs" in url:
        for title in ("Visualizations", "Parameters", "Artifacts", "Tags"):
            for heading in browser.find_elements(By.XPATH, f"//*[text()='{title}']"):
                browser.execute_script("arguments[0].click()", heading)
        time.sleep(2)
        browser.execute_script(SHOW_WHOLE_TABLES)
    time.sleep(3)
    browser.save_screenshot(str(out))


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("mlruns"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = f"http://127.0.0.1:{port}"
    report = (args.root / "latest/report.html").resolve().as_uri()
    store = f"sqlite:///{args.root.resolve() / 'mlflow.db'}"
    command = [
        *(sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store),
        *("--port", str(port), "--workers", "1"),
    ]
    ui = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(server)
        parent, children = newest(args.root)
        with tempfile.TemporaryDirectory() as profile:
            options = webdriver.ChromeOptions()
            for flag in (*FLAGS, f"user-data-dir={profile}"):
                options.add_argument(f"--{flag}")
            driver = shutil.which("chromedriver")
            browser = webdriver.Chrome(options=options, service=Service(driver))
            try:
                take(browser, report, "Comparisons", REPORT_SIZE, args.out / "report.png")
                for name, (page, text, size) in PICTURES.items():
                    take(browser, page(server, parent, children), text, size, args.out / name)
                    print(f"saved {args.out / name}", flush=True)
            finally:
                browser.quit()
    finally:
        ui.terminate()
        ui.wait(30)


if __name__ == "__main__":
    main()
