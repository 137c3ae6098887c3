"""Secrets do not belong into files that others read."""

from __future__ import annotations

import re

_SECRET = re.compile(r"(token(?!s|iz)|password|passwd|secret|api_?key|credential)", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
REDACTED = "[redacted]"


def redact_value(key: str, value: str) -> str:
    """Return `value`, or a mark in its place where `key` names a secret; logins inside URLs are marked too."""
    return REDACTED if _SECRET.search(key) else _URL_LOGIN.sub(REDACTED, value)


def has_login(url: str) -> bool:
    """Tell whether a URL holds a login."""
    return _URL_LOGIN.search(url) is not None


def redact_override(argument: str) -> str:
    """Return a command-line argument `key=value` without its secret."""
    key, equals, value = argument.partition("=")
    return f"{key}{equals}{redact_value(key, value)}" if equals else argument
