"""Whether the Hugging Face Hub can be reached: asked once, within seconds.

Its library asks again and again, with pauses, for 40 s, and by each file; a machine without a
network need not wait for that. Where the Hub cannot be reached, the library reads only
its cache alone.
"""

from __future__ import annotations

import os
import socket
import threading
from functools import cache
from urllib.parse import urlsplit

PROBE_S = 4.0


def offline_without_network() -> str | None:
    """Return why the Hub cannot be reached, and have its library work offline then; None where it
    can be, or may be.

    Where a proxy is set nothing is probed: a direct connection may fail although the Hub can be
    reached.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _known.get("why")
    if any(
        os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return None
    why = _why_unreachable(constants.ENDPOINT)
    if why is not None:
        _known["why"] = why
        # Its library reads this at each request, so the whole process is offline from now on.
        constants.HF_HUB_OFFLINE = True
    return why


_known: dict[str, str] = {}


@cache
def _why_unreachable(endpoint: str) -> str | None:
    place = urlsplit(endpoint)
    host, port = place.hostname or "", place.port or (80 if place.scheme == "http" else 443)
    said: list[str | None] = []

    def ask() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_S).close()
            said.append(None)
        except OSError as error:
            said.append(error.strerror or str(error))

    # a name server that is silent keeps no limit of ours
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    why = said[0] if said else f"no answer within {PROBE_S:.0f} s"
    return None if why is None else f"{host} cannot be reached: {why}"
