"""A Hub that cannot be reached: said within seconds, with the cause; a proxy is trusted to know the
way.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants

from pipeline.store import hub


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask anew, and leave the library as it was."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._why_unreachable.cache_clear()
    hub._known.clear()
    yield
    hub._why_unreachable.cache_clear()
    hub._known.clear()


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.offline_without_network() is None
        assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_is_not_there_puts_the_library_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    why = hub.offline_without_network()
    assert why == "127.0.0.1 cannot be reached: Connection refused"
    assert constants.HF_HUB_OFFLINE
    assert hub.offline_without_network() == why  # and it is not asked again


def test_a_name_server_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, answered = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        answers.wait(60)
        answered.set()
        raise OSError("too late")

    monkeypatch.setattr(hub, "PROBE_S", 0.1)
    monkeypatch.setattr(socket, "create_connection", hang)
    assert "no answer within" in (hub.offline_without_network() or "")
    assert not answered.is_set()
    answers.set()


def test_a_proxy_knows_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked"))
    assert hub.offline_without_network() is None


def test_who_works_offline_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked"))
    assert hub.offline_without_network() is None
