"""The one gate through which every string passes that leaves the process: files, journal, MLflow, terminal, exceptions.

Writers call it, not sources: `store.write_json`, `store.write_text`, the journal, and `clean_output` around each
command's standard output and error. Secrets are known by their name (`api_key=...`), by their shape (`hf_...`), by
where they stand (a login in a URL), or because an environment variable with such a name holds them.

What is lost is a reader's convenience where this errs; what passes by mistake is read by everybody.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable
from contextlib import ContextDecorator
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self, TextIO

REDACTED = "[redacted]"
MIN_ENVIRONMENT = 8  # characters of a variable's value: `key`, `1` and `true` are words

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAMES = frozenset({
    "password", "passwd", "passphrase", "passcode", "pwd", "secret", "secrets", "credential", "credentials",
    "authorization", "apikey", "accesskey", "privatekey", "secretkey", "authtoken", "accesstoken",
})  # fmt: skip
_KEYS = frozenset({"api", "access", "private", "account", "encryption", "signing", "storage", "subscription", "master",
                   "ssh", "deploy"})  # fmt: skip
"""What makes a secret of the `key` that follows it."""
_NO_TOKEN = frozenset({
    "eos", "bos", "pad", "unk", "sep", "cls", "mask", "next", "per", "special", "image", "video", "audio", "first",
    "last", "start", "end", "begin", "stop", "new", "each", "a", "one", "extra", "added", "additional", "boi", "eoi",
    "prefix", "suffix", "middle", "target", "predicted", "this", "the", "any", "every", "single", "by",
})  # fmt: skip
"""What a tokenizer, or a report, puts before `token`."""
_ARTICLES = frozenset({"a", "the", "this", "any", "every", "each", "by", "new"})
_NUMBER = re.compile(r"[-+]?[\d.]+(?:e[-+]?\d+)?%?|null|none|true|false|nan|inf", re.IGNORECASE)

_URL_LOGIN = re.compile(r"(?<=://)(?P<login>[^/\s]+)(?=@)")
_STORAGE = re.compile(r"(?:abfss?|wasbs?)://\Z", re.IGNORECASE)
"""Azure writes a container where others write a login."""
_HEAD = re.compile(r"""(?<![\w.-])["']?(?P<name>[\w.-]++)["']?\s*[:=]\s*|(?<!\S)--?(?P<flag>[A-Za-z][\w-]*+)\s+(?!-)""")
"""`api_key: `, `token=`, `--token `; what follows is the value. Possessive: a word of a megabyte is read once."""
_VALUE = re.compile(r"""(?!\[redacted\])(?:"[^"]*"|'[^']*'|[^\s,&;})\]"']+)""")
_HEADER = re.compile(
    r"""(?P<head>\b(?:proxy-)?authorization["']?\s*[:=]\s*["']?)(?:(?:bearer|basic|digest|token|apikey)\s+)?"""
    r"""(?!\[redacted\])[^\s"',;}\]]+""",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<head>\bbearer\s+)(?=[^\s]*\d)[\w.~+/-]{16,}=*", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<head>(?<![\w-])(?:[\w-]{1,40}-)?(?:sig|signature|hmac)=)(?!\[redacted\])[^\s&;\"',)]{6,}", re.IGNORECASE
)
_QUERY_KEY = re.compile(r"(?P<head>[?&]key=)(?!\[redacted\])[^\s&;\"',)]{16,}", re.IGNORECASE)
_CONNECTION = re.compile(
    r"(?P<head>\b(?:AccountKey|SharedAccessKey|SharedAccessSignature)=)(?!\[redacted\])[^;\s\"']+", re.IGNORECASE
)
_PRIVATE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"  # GitHub, GitLab
    r"|sk-(?=[\w-]*\d)[\w-]{20,}|[rs]k_(?:live|test)_\w{16,}"  # OpenAI, Anthropic, Stripe
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,}"  # Google
    r"|xox[abeprs]-[\w-]{10,}|xapp-[\w-]{10,}"  # Slack
    r"|npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{20,}|dapi[0-9a-f]{32}|nvapi-[\w-]{20,}|gsk_\w{20,}|r8_\w{30,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON Web Tokens
    r")"
)
"""Tokens known by their shape. Sources: each vendor's documentation; GitHub's list of secret scanning patterns."""
_HINT = re.compile(r"[:=@]|[-_]|[A-Z]{4}|eyJ|\s--?[a-zA-Z]|[Bb]earer|BEGIN")
"""Without any of these there is nothing to look for: most strings are short words."""


@lru_cache(maxsize=4096)
def names_secret(key: str) -> bool:
    """Tell whether a setting, header, flag or variable of this name holds a secret; a tokenizer's tokens are none."""
    words = [word.lower() for word in _WORD.findall(key)]
    if not _NAMES.isdisjoint(words):
        return True
    if any(word in _KEYS and after == "key" for word, after in pairwise(words)):
        return True
    words = [word for word in words if not word.isdigit()]
    return words[-1:] == ["token"] and (len(words) == 1 or words[-2] not in _NO_TOKEN)


def redact(text: str) -> str:
    """Return `text` with a mark in the place of every secret that can be told; redacting again changes nothing."""
    for secret in _of_environment():
        text = text.replace(secret, REDACTED)
    if not _HINT.search(text):
        return text
    text = _PRIVATE.sub(REDACTED, text)
    text = _HEADER.sub(rf"\g<head>{REDACTED}", text)
    text = _URL_LOGIN.sub(_login, text)
    for pattern in (_BEARER, _QUERY, _QUERY_KEY, _CONNECTION):
        text = pattern.sub(rf"\g<head>{REDACTED}", text)
    return _SHAPES.sub(REDACTED, _without_named(text))


def _login(found: re.Match[str]) -> str:
    login = found["login"]
    is_container = ":" not in login and _STORAGE.search(found.string, 0, found.start())
    return login if is_container else REDACTED


def _without_named(text: str) -> str:
    """Return `text` with a mark for each value that a name declares secret."""
    parts: list[str] = []
    done = 0
    for head in _HEAD.finditer(text):
        name = head["name"] or head["flag"]
        value = _VALUE.match(text, head.end()) if head.start() >= done and names_secret(name) else None
        if value is None or (name.lower().endswith("token") and _is_count(text, head.start(), value.group())):
            continue
        parts += [text[done : value.start()], REDACTED]
        done = value.end()
    return "".join([*parts, text[done:]])


def _is_count(text: str, at: int, value: str) -> bool:
    """Tell whether `... token: VALUE` speaks of a tokenizer's tokens: of the next one, of a number per token."""
    before = re.search(r"([a-z]{3,12}) \Z", text[max(0, at - 13) : at])
    return _NUMBER.fullmatch(value) is not None or (before is not None and before[1] in _NO_TOKEN - _ARTICLES)


def _of_environment() -> list[str]:
    """Return the values of environment variables whose names say that they are secret, the longest first."""
    named = ((name, value) for name, value in os.environ.items() if len(value) >= MIN_ENVIRONMENT)
    found = {value for name, value in named if names_secret(name) and not name.endswith("PWD") and value[0] not in "/~"}
    return sorted(found, key=len, reverse=True)


# -- settings and records ---------------------------------------------------------------------------------------------


def redact_value(key: str, value: str) -> str:
    """Return `value`, or a mark in its place where `key` names a secret; secrets inside it are marked too."""
    return REDACTED if names_secret(key) and value else redact(value)


def redact_json(value: Any, key: str = "") -> Any:
    """Return plain JSON without its secrets, in keys too; what is no secret keeps its type.

    Lone surrogates, which a file's name may hold and no file takes, become question marks.
    """
    if isinstance(value, dict):
        return {_text(str(name)): redact_json(item, f"{key}.{name}" if names_secret(key) else str(name))
                for name, item in value.items()}  # fmt: skip
    if isinstance(value, list | tuple):
        return [redact_json(item, key) for item in value]
    if isinstance(value, str):
        return REDACTED if value and names_secret(key) else _text(value)
    is_plain = value is None or (isinstance(value, bool | int | float) and key.lower().endswith("token"))
    return value if is_plain or not names_secret(key) else REDACTED


redact_settings = redact_json


def _text(text: str) -> str:
    return redact(text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8"))


def redact_override(argument: str) -> str:
    """Return a command-line argument `key=value` without its secret."""
    key, equals, value = argument.partition("=")
    return f"{key}={redact_value(key, value)}" if equals else redact(argument)


def has_login(url: str) -> bool:
    """Tell whether a URL holds a login."""
    return _URL_LOGIN.search(url) is not None


def without_login(url: str) -> str:
    """Return a URL that works for who gives the login in another way."""
    return re.sub(r"(?<=://)[^/\s]+@", "", url)


# -- the terminal -----------------------------------------------------------------------------------------------------


class Clean:
    """A stream through which no secret passes, and no letter that it cannot show stops a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without its secrets; return how long it was."""
        shown = redact(text)
        try:
            self._stream.write(shown)
        except UnicodeEncodeError:  # a terminal that speaks ASCII
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, each without its secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class CleanFormatter(logging.Formatter):
    """What libraries log, without secrets; Hydra's log file is written with it (`configs/config.yaml`)."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's text."""
        return redact(super().format(record))


class clean_output(ContextDecorator):
    """Have nothing that is printed meanwhile, by whatever library, show a secret."""

    def __enter__(self) -> Self:
        self._before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (each if isinstance(each, Clean) else Clean(each) for each in self._before)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._before

    def _recreate_cm(self) -> Self:
        return type(self)()
