"""Run a command line in this process: a second, where a process of its own imports torch for
four.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema

from pipeline.cli.main import main
from pipeline.ledger.schema import RESULT_SCHEMA


def here(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Return what `python -m pipeline` with these arguments would: exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(args), started_ns=time.monotonic_ns())
    return subprocess.CompletedProcess(list(args), code, out.getvalue(), err.getvalue())


def result_in(cwd: Path) -> dict[str, Any]:
    """Return the newest result of runs in a folder, which is as its schema says."""
    result = json.loads((cwd / "mlruns/latest/result.json").read_text())
    jsonschema.validate(result, RESULT_SCHEMA)
    return result
