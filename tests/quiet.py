"""The kernel's accounts as an idle machine has them: tests that assert savings run on machines that
others use, too.
"""

from __future__ import annotations

import os
import time

import pytest

from pipeline.ledger import others
from pipeline.ledger.others import Accounts

TRUE, SHORTEST_S = others.accounts, others.SHORTEST_S
ENV = "PIPELINE_TEST_TRUE_ACCOUNTS"
"""In the environment of a forked command: it reads the machine as it is."""


class Quiet:
    """Accounts in which this run is alone, or shares the cores with others that take a share of
    them.

    Args:
        taken: What others take, in [0, 1].
        steal: What a hypervisor takes of the cores.
    """

    def __init__(self, taken: float = 0.0, *, steal: float = 0.0, cores: int = 2) -> None:
        self.taken, self.steal, self.cores = taken, steal, cores

    def __call__(self) -> Accounts:
        now_s = time.monotonic()
        return Accounts(
            at_s=now_s,
            busy_s=now_s * self.cores * self.taken,
            own_s=0.0,
            cores=self.cores,
            steal_s=now_s * self.cores * self.steal,
        )


def quiet() -> None:
    """Have this process read an idle machine, in windows of any length."""
    others.accounts = Quiet()
    others.SHORTEST_S = 0.0


def quiet_unless_asked() -> None:
    """Do so unless a test wants the true accounts."""
    if ENV not in os.environ:
        quiet()


def read_truly(patch: pytest.MonkeyPatch) -> None:
    """Have this process, and commands forked for it, read the machine as it is."""
    patch.setattr(others, "accounts", TRUE)
    patch.setattr(others, "SHORTEST_S", SHORTEST_S)
    patch.setenv(ENV, "1")
