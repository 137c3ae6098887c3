"""Secrets do not belong into files that others read, nor into MLflow."""

from __future__ import annotations

import re
from typing import Any

_NAME = r"token(?!s|iz)|password|passwd|secret|(?:api|access|private)_?key|credential"
_SECRET = re.compile(_NAME, re.IGNORECASE)
_INSIDE = re.compile(rf"(?<![\w.-])([\"']?[\w.-]*(?:{_NAME})[\w.-]*[\"']?\s*[:=]\s*)[^,&}}\]\s]+", re.IGNORECASE)
"""A secret named inside a value: `{api_key: abc}`, `https://host/x?token=abc`. It is looked for once a word: from every
character on, a word of 9,000 takes seconds."""
_URL_LOGIN = re.compile(r"(?<=://)[^/\s]+(?=@)")
_KNOWN = re.compile(r"\b(?:hf_\w{20,}|gh[pousr]_\w{30,}|github_pat_\w{30,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16})\b")
"""Tokens of Hugging Face, GitHub, OpenAI and AWS, known by their shape wherever they stand."""
REDACTED = "[redacted]"


def redact_value(key: str, value: str) -> str:
    """Return `value`, or a mark in its place where `key` names a secret; secrets inside the value are marked too."""
    if _SECRET.search(key):
        return REDACTED
    return _KNOWN.sub(REDACTED, _INSIDE.sub(rf"\g<1>{REDACTED}", _URL_LOGIN.sub(REDACTED, value)))


def redact_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings without their secrets; what is no secret keeps its type."""
    return {key: _redact(key, value) for key, value in settings.items()}


def _redact(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return redact_settings(value)
    if isinstance(value, list):
        return [_redact(key, item) for item in value]
    if isinstance(value, str):
        return redact_value(key, value)
    return REDACTED if value is not None and _SECRET.search(key) else value


def has_login(url: str) -> bool:
    """Tell whether a URL holds a login."""
    return _URL_LOGIN.search(url) is not None


def without_login(url: str) -> str:
    """Return a URL that works for who gives the login in another way."""
    return re.sub(r"(?<=://)[^/\s]+@", "", url)


def redact_override(argument: str) -> str:
    """Return a command-line argument `key=value` without its secret."""
    key, equals, value = argument.partition("=")
    return f"{key}{equals}{redact_value(key, value)}" if equals else redact_value("", argument)
