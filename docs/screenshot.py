"""Take the README's picture: the arms of the newest run side by side in the MLflow UI.

    python docs/screenshot.py [--root mlruns] [--out docs/mlflow-comparison.png]

Starts `mlflow ui` on a free loopback port over the store of `--root`, opens MLflow's comparison of
the stages of the newest run in a headless Chromium, and ends both. Needs `pip install selenium`,
Chromium and its driver.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SIZE = "1500,1540"
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


def comparison_url(root: Path, server: str) -> str:
    """Return the address of MLflow's comparison of the newest run's stages."""
    run_id = (root / "latest").resolve().name
    client = MlflowClient(tracking_uri=f"sqlite:///{root.resolve() / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, f"tags.`pipeline.run` = '{run_id}'")
    children = client.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}'",
        order_by=["start_time ASC"],
    )
    runs, experiment = (
        json.dumps([child.info.run_id for child in children]),
        parent.info.experiment_id,
    )
    query = urllib.parse.urlencode({"runs": runs, "experiments": json.dumps([experiment])})
    return f"{server}/#/compare-runs?{query}"


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


def take(url: str, out: Path) -> None:
    """Open `url`, leave only names and metrics of the comparison open, and save what is seen."""
    options = webdriver.ChromeOptions()
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "hide-scrollbars",
        f"window-size={SIZE}",
    ):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options)
    try:
        browser.get(url)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda b: "compute/device_hours" in b.page_source)
        for close in browser.find_elements(
            By.XPATH, "//*[text()='MLflow Assistant']/following::button"
        ):
            if (
                "close"
                in (
                    close.get_attribute("innerHTML") + str(close.get_attribute("aria-label"))
                ).lower()
            ):
                close.click()
                break
        for title in ("Visualizations", "Parameters", "Artifacts", "Tags"):
            for heading in browser.find_elements(By.XPATH, f"//*[text()='{title}']"):
                browser.execute_script("arguments[0].click()", heading)
        time.sleep(2)
        browser.execute_script(SHOW_WHOLE_TABLES)
        time.sleep(1)
        browser.save_screenshot(str(out))
    finally:
        browser.quit()


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("mlruns"))
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
        take(comparison_url(args.root, server), args.out)
    finally:
        ui.terminate()
        ui.wait(30)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
