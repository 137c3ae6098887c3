"""Ignores SIGTERM: says so each time, and ends with the third one, or for good with SIGKILL."""

import signal
import sys
import time

import pipeline

asked = []


def ignore(number: int, _: object) -> None:
    asked.append(number)
    print(f"no {len(asked)}", flush=True)
    if len(asked) == 3:
        sys.exit(0)


signal.signal(signal.SIGTERM, ignore)
with pipeline.phase("forward"):
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
