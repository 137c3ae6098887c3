"""Does some steps and fails."""

import time

import pipeline

for _ in range(3):
    with pipeline.phase("forward"):
        time.sleep(0.02)
    pipeline.count(tokens=10, steps=1)
raise SystemExit(7)
