"""The one gate through which every string passes that leaves the process: files, journal, MLflow,
terminal, exceptions.

Writers call it, not sources: `store.write_json`, `store.write_text`, the journal, and
`clean_output` around each command's standard output and error. Secrets are known by their name
(`api_key=...`), by their shape (`hf_...`), by where they stand (a login in a URL), or because an
environment variable with such a name holds them.

What is lost is a reader's convenience where this errs; what passes by mistake is read by everybody.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ContextDecorator
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self, TextIO
from urllib.parse import quote

REDACTED = "[redacted]"
MIN_ENVIRONMENT = 6  # characters of a variable's value: `key`, `1` and `true` are words
MIN_ANYWHERE = 12  # characters of a value of letters alone that is looked for inside of words too
MAX_REMEMBERED = 100  # characters of a text that is likely to come again: a record's names
MAX_NESTED = 10_000  # characters of a list or an object that a secret name holds

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAMES = frozenset(
    {
        "password",
        "passwd",
        "passphrase",
        "passcode",
        "pwd",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "authorization",
        "apikey",
        "accesskey",
        "privatekey",
        "secretkey",
        "authtoken",
        "accesstoken",
    }
)
_ENDINGS = (
    "password",
    "passwd",
    "passphrase",
    "apikey",
    "secretkey",
    "accesskey",
    "privatekey",
    "authtoken",
    "accesstoken",
)
"""What makes a secret of a word that ends so: PGPASSWORD."""
_KEYS = frozenset(
    {
        "api",
        "access",
        "private",
        "account",
        "encryption",
        "signing",
        "storage",
        "subscription",
        "master",
        "ssh",
        "deploy",
    }
)
"""What makes a secret of the `key` that follows it."""
_NO_TOKEN = frozenset(
    {
        "eos",
        "bos",
        "pad",
        "unk",
        "sep",
        "cls",
        "mask",
        "next",
        "per",
        "special",
        "image",
        "video",
        "audio",
        "first",
        "last",
        "start",
        "end",
        "begin",
        "stop",
        "new",
        "each",
        "a",
        "one",
        "extra",
        "added",
        "additional",
        "boi",
        "eoi",
        "prefix",
        "suffix",
        "middle",
        "target",
        "predicted",
        "this",
        "the",
        "any",
        "every",
        "single",
        "by",
    }
)
"""What a tokenizer, or a report, puts before `token`."""
NO_SECRETS = ("PWD", "OLDPWD")  # the shell's working folders
_NO_PASS = _NO_TOKEN | {
    "forward",
    "backward",
    "second",
    "both",
    "two",
    "training",
    "test",
    "tests",
    "all",
    "did",
    "can",
    "must",
    "serve",
    "serving",
    "comparison",
    "eval",
    "bypass",
    "compass",
    "render",
    "compile",
    "optimization",
    "high",
    "low",
    "band",
}
"""What a report puts before `pass`."""
_NO_KEY = frozenset(
    {
        "session",
        "public",
        "pub",
        "primary",
        "foreign",
        "sort",
        "cache",
        "hot",
        "partition",
        "group",
        "modifier",
        "meta",
        "index",
        "search",
        "compose",
        "registry",
        "config",
        "dict",
        "map",
        "return",
        "enter",
        "arrow",
        "shift",
        "row",
    }
)
"""What variables that hold no secret put before `KEY`."""
_VARIABLES = frozenset(
    {
        "pass",
        "pwd",
        "secret",
        "secrets",
        "token",
        "tokens",
        "pat",
        "credential",
        "credentials",
        "cred",
        "creds",
        "auth",
        "dsn",
        "cookie",
        "jwt",
        "webhook",
        "key",
        "keys",
    }
)
"""What an environment variable that holds a secret ends with, beside `_NAMES` anywhere in it."""
# BYPASS
_GLUES = frozenset(
    {"by", "com", "encom", "tres", "sur", "sub", "multi", "pre", "de", "over", "under"}
)
_GLUED = ("pass", "secret", "token", "apikey", "webhook")  # SSHPASS, GITHUBTOKEN
_COMMON = frozenset(
    {
        "default",
        "enabled",
        "disabled",
        "required",
        "optional",
        "bearer",
        "oauth2",
        "password",
        "secret",
        "secrets",
        "token",
        "tokens",
        "keyring",
        "plaintext",
        "public",
        "private",
        "localhost",
        "production",
        "development",
        "staging",
        "testing",
        "example",
        "postgres",
        "postgresql",
        "mlflow",
        "minioadmin",
        "changeme",
        "anonymous",
        "kerberos",
        "negotiate",
        "digest",
        "always",
        "prefer",
        "pipeline",
        "report",
        "result",
        "config",
        "training",
        "quality",
        "serving",
        "baseline",
        "python",
        "reference",
        "student",
        "teacher",
        "system",
        "string",
        "number",
        "unknown",
        "account",
        "username",
        "hunter",
        "access",
        "master",
        "nobody",
    }
)
"""Values that are words: a text without them could not be read."""
_ARTICLES = frozenset({"a", "the", "this", "any", "every", "each", "by", "new"})
COUNTED = ("token", "pass")  # what may be counted: a number after it is no secret
_NUMBER = re.compile(r"[-+]?[\d.]+(?:e[-+]?\d+)?%?|null|none|true|false|nan|inf", re.IGNORECASE)

_URL_LOGIN = re.compile(r"(?<=://)(?P<login>[^/\s]+)(?=@)")
_STORAGE = re.compile(r"(?:abfss?|wasbs?)://\Z", re.IGNORECASE)
"""Azure writes a container where others write a login."""
_HEAD = re.compile(
    r"""(?<![\w.-])["']?(?P<name>[\w.-]++)\\*["']?\s*[:=]\s*"""
    r"""|(?<!\S)--?(?P<flag>[A-Za-z][\w-]*+)\s+(?!-)"""
)
"""`api_key: `, `token=`, `--token `; what follows is the value. Possessive: a word of a megabyte is
read once.
"""
_VALUE = re.compile(
    r"""(?!\[redacted\])(?:"(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+'"""
    r"""|\\+"[^"]*"|\\+'[^']*'|"[^"]*"|'[^']*'"""
    r"""|[^\s,&;})\]"'\\]+(?:\\[^\s"'][^\s,&;})\]"']*)?)""",
    re.DOTALL,
)
_BRACKET = re.compile(r"""(?!\[redacted\])[\[{]""")
_IN_BRACKETS = re.compile(r"""[\[{]|[\]}]|"(?:[^"\\]|\\.)*+"|'[^']*'""", re.DOTALL)
_HEADER = re.compile(
    r"""(?P<head>\b(?:proxy-)?authorization["']?\s*[:=]\s*["']?)"""
    r"""(?:(?:bearer|basic|digest|token|apikey)\s+)?"""
    r"""(?!\[redacted\])[^\s"',;}\]]+""",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<head>\bbearer\s+)(?=[^\s]*\d)[\w.~+/-]{16,}=*", re.IGNORECASE)
_BASIC = re.compile(r"(?<=\bbasic )[A-Za-z0-9+/]{6,}={0,2}(?![\w+/=])", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<head>(?<![\w-])(?:[\w-]{1,40}-)?(?:sig|signature|hmac)=)(?!\[redacted\])[^\s&;\"',)]{6,}",
    re.IGNORECASE,
)
_QUERY_KEY = re.compile(r"(?P<head>[?&]key=)(?!\[redacted\])[^\s&;\"',)]{16,}", re.IGNORECASE)
_CONNECTION = re.compile(
    r"(?P<head>\b(?:AccountKey|SharedAccessKey|SharedAccessSignature)=)(?!\[redacted\])[^;\s\"']+",
    re.IGNORECASE,
)
_WEBHOOK = re.compile(
    r"(?P<head>https?://(?:"
    r"hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/"
    r"|(?:\w+\.)?discord(?:app)?\.com/api(?:/v\d+)?/webhooks/"
    r"|[\w.-]+\.webhook\.office\.com/\w+/|outlook\.office(?:365)?\.com/webhook/"
    r"|api\.telegram\.org/bot"
    r"|hooks\.zapier\.com/hooks/catch/|maker\.ifttt\.com/\w+/|chat\.googleapis\.com/v1/spaces/"
    r"|[\w.-]+(?::\d+)?/(?:hooks|webhooks?)/(?=[\w/-]{16})))(?!\[redacted\])[^\s\"'<>,)\]}]+",
    re.IGNORECASE,
)
"""Who knows such an address may write to it; Mattermost's and others' are /hooks/ and a long word.
"""
_PRIVATE = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL
)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"  # GitHub, GitLab
    r"|sk-(?=[\w-]*\d)[\w-]{20,}|[rs]k_(?:live|test)_\w{16,}"  # OpenAI, Anthropic, Stripe
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,}"  # Google
    r"|xox[abeprs]-[\w-]{10,}|xapp-[\w-]{10,}"  # Slack
    r"|npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{20,}|dapi[0-9a-f]{32}"  # npm, PyPI, Databricks
    r"|nvapi-[\w-]{20,}|gsk_\w{20,}|r8_\w{30,}"  # NVIDIA, Groq, Replicate
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON Web Tokens
    r")"
)
"""Tokens known by their shape. Sources: each vendor's documentation; GitHub's list of secret
scanning patterns.
"""
_HINT = re.compile(r"[:=@]|[-_]|[A-Z]{4}|eyJ|\s--?[a-zA-Z]|[Bb]earer|[Bb]asic|BEGIN")
"""Without any of these there is nothing to look for: most strings are short words."""


@lru_cache(maxsize=4096)
def names_secret(key: str) -> bool:
    """Tell whether a setting, header, flag or variable of this name holds a secret; a tokenizer's
    tokens are none.
    """
    if key in NO_SECRETS:
        return False
    if key.isupper() and "_" in key and _is_secret_variable(key):
        return True
    words = [word.lower() for word in _WORD.findall(key)]
    if not _NAMES.isdisjoint(words) or any(word.endswith(_ENDINGS) for word in words):
        return True
    if any(word in _KEYS and after == "key" for word, after in pairwise(words)):
        return True
    words = [word for word in words if not word.isdigit()]
    before = words[-2] if len(words) > 1 else ""
    return (words[-1:] == ["token"] and before not in _NO_TOKEN) or (
        words[-1:] == ["pass"] and before not in _NO_PASS
    )


def _is_secret_variable(name: str) -> bool:
    """Tell whether an environment variable of this name holds a secret, by its parts and its
    ending.
    """
    parts = [part.lower() for part in re.split(r"[\W_]+", name) if part and not part.isdigit()]
    if not parts or name in NO_SECRETS:
        return False
    if not _NAMES.isdisjoint(parts) or parts[-1].endswith(_ENDINGS):
        return True
    if any(word in _KEYS and after == "key" for word, after in pairwise(parts)):
        return True
    if len(parts) > 1 and parts[-1] in ("url", "uri", "endpoint", "value"):
        parts = parts[:-1] if parts[-2] in ("webhook", "hook", *_VARIABLES) else parts
    last, before = parts[-1].rstrip("0123456789"), parts[-2] if len(parts) > 1 else ""
    if last in ("token", "tokens", "key", "keys", "pass"):
        return before not in {"key": _NO_KEY, "keys": _NO_KEY, "pass": _NO_PASS}.get(
            last, _NO_TOKEN | {"max"}
        )
    glued = next((end for end in _GLUED if last.endswith(end) and last != end), None)
    return (
        last in _VARIABLES
        or last == "hook"
        or (glued is not None and last.removesuffix(glued) not in _NO_PASS | _GLUES)
    )


def redact(text: str) -> str:
    """Return `text` with a mark in the place of every secret that can be told; redacting again
    changes nothing.
    """
    return _redact(text, _of_environment())


def _redact(text: str, of_environment: tuple[re.Pattern[str], ...]) -> str:
    remembered = len(text) <= MAX_REMEMBERED
    return (_redact_short if remembered else _redact_any)(text, of_environment)


@lru_cache(maxsize=4096)
def _redact_short(text: str, of_environment: tuple[re.Pattern[str], ...]) -> str:
    return _redact_any(text, of_environment)


def _redact_any(text: str, of_environment: tuple[re.Pattern[str], ...]) -> str:
    for secret in of_environment:
        text = secret.sub(REDACTED, text)
    if not _HINT.search(text):
        return text
    text = _PRIVATE.sub(REDACTED, text)
    text = _HEADER.sub(rf"\g<head>{REDACTED}", text)
    text = _URL_LOGIN.sub(_login, text)
    text = _BASIC.sub(_basic, text)
    for pattern in (_WEBHOOK, _BEARER, _QUERY, _QUERY_KEY, _CONNECTION):
        text = pattern.sub(rf"\g<head>{REDACTED}", text)
    return _SHAPES.sub(REDACTED, _without_named(text))


def _login(found: re.Match[str]) -> str:
    login = found["login"]
    is_container = ":" not in login and _STORAGE.search(found.string, 0, found.start())
    return login if is_container else REDACTED


def _basic(found: re.Match[str]) -> str:
    """Return a mark for what is a login in base64 (user:password); else the word, as in `basic
    understanding`.
    """
    try:
        decoded = base64.b64decode(found.group(), validate=True).decode()
    except ValueError:
        return found.group()
    return REDACTED if ":" in decoded and decoded.isprintable() else found.group()


def _without_named(text: str) -> str:
    """Return `text` with a mark for each value that a name declares secret."""
    parts: list[str] = []
    done = 0
    for start, end in _named_values(text):
        parts += [text[done:start], REDACTED]
        done = end
    return "".join([*parts, text[done:]])


def _named_values(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the values lie that a name declares secret."""
    done = 0
    for head in _HEAD.finditer(text):
        name = head["name"] or head["flag"]
        if head.start() < done or not names_secret(name):
            continue
        end = _end_of_value(text, head.end())
        if end is None or (
            name.lower().endswith(COUNTED) and _is_count(text, head.start(), text[head.end() : end])
        ):
            continue
        yield head.end(), end
        done = end


def _end_of_value(text: str, at: int) -> int | None:
    """Return where the value that begins at `at` ends: a word, a quoted text, or a list or object
    to its bracket.
    """
    if _BRACKET.match(text, at):
        depth = 0
        for found in _IN_BRACKETS.finditer(text, at, at + MAX_NESTED):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
            if depth == 0:
                return found.end()
        return min(len(text), at + MAX_NESTED)  # it was cut off: so is what follows, to be sure
    value = _VALUE.match(text, at)
    return None if value is None else value.end()


def _is_count(text: str, at: int, value: str) -> bool:
    """Tell whether `... token: VALUE` speaks of a tokenizer's tokens: of the next one, of a number
    per token.

    `pass: VALUE` of a number of tests, or of whether they did.
    """
    before = re.search(r"([a-z]{3,12}) \Z", text[max(0, at - 13) : at])
    return _NUMBER.fullmatch(value) is not None or (
        before is not None and before[1] in _NO_PASS - _ARTICLES
    )


def _of_environment() -> tuple[re.Pattern[str], ...]:
    """Return what finds the secrets in environment variables, the longest first."""
    return _secrets_in(tuple(os.environ.items()))


@lru_cache(maxsize=8)
def _secrets_in(variables: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], ...]:
    found: set[str] = set()
    for name, value in variables:
        if _is_secret_variable(name):
            found.add(value)
        found |= _inside(value)
    secrets = {form for value in found if not _is_ordinary(value) for form in _forms(value)}
    return tuple(_finds(secret) for secret in sorted(secrets, key=len, reverse=True))


def _inside(value: str) -> set[str]:
    """Return the secrets inside of a variable whatever its name: of a URL with a login, of a
    connection string.
    """
    found: set[str] = set()
    for login in _URL_LOGIN.finditer(value):
        _, colon, word = login["login"].partition(":")
        found |= (
            {login["login"], word}
            if colon
            else {login["login"]}
            if not _STORAGE.search(value[: login.start()])
            else set()
        )
    return found | {value[start:end].strip("\"'") for start, end in _named_values(value)}


def _is_ordinary(value: str) -> bool:
    """Tell whether a variable's value is a short word, a common one, a number, or a path: no text
    could do without.
    """
    if len(value) < MIN_ENVIRONMENT or value.lower() in _COMMON or REDACTED in value:
        return True
    if _NUMBER.fullmatch(value) and len(value) < MIN_ANYWHERE:
        return True
    return value[0] in "/~." and (value.count("/") > 1 or os.path.exists(os.path.expanduser(value)))


def _forms(value: str) -> set[str]:
    """Return how a value may be written: as it is, in JSON, in a URL."""
    return {
        value,
        value.strip(),
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        quote(value, safe=""),
    }


def _finds(secret: str) -> re.Pattern[str]:
    """Return what finds a secret; a short word only where it is one, not inside of others."""
    inside = len(secret) >= MIN_ANYWHERE or not secret.isalpha()
    return re.compile(
        re.escape(secret) if inside else rf"(?<![A-Za-z0-9_]){re.escape(secret)}(?![A-Za-z0-9_])"
    )


# -- settings and records -------------------------------------------------------------------------


def redact_value(key: str, value: str) -> str:
    """Return `value`, or a mark in its place where `key` names a secret; secrets inside it are
    marked too.
    """
    return REDACTED if names_secret(key) and value else redact(value)


def redact_json(value: Any, key: str = "", *, under: str = "") -> Any:
    """Return plain JSON without its secrets, in keys too; what is no secret keeps its type.

    Lone surrogates, which a file's name may hold and no file takes, become question marks.

    Args:
        key: The name that holds the value.
        under: The name of a secret further out: what such a list or object holds is a secret
            whatever its own name.
    """
    # the environment is read once: a record holds thousands of texts
    return _redact_json(value, key, under, _of_environment())


def _redact_json(
    value: Any, key: str, under: str, of_environment: tuple[re.Pattern[str], ...]
) -> Any:
    secret = key if names_secret(key) else under
    if isinstance(value, dict):
        return {
            _text(str(name), of_environment): _redact_json(item, str(name), secret, of_environment)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact_json(item, key, secret, of_environment) for item in value]
    if isinstance(value, str):
        return REDACTED if value and secret else _text(value, of_environment)
    is_plain = value is None or (
        isinstance(value, bool | int | float) and secret.lower().endswith(COUNTED)
    )
    return value if is_plain or not secret else REDACTED


redact_settings = redact_json


def _text(text: str, of_environment: tuple[re.Pattern[str], ...]) -> str:
    writable = text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
    return _redact(writable, of_environment)


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


# -- the terminal ---------------------------------------------------------------------------------


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
    """What libraries log, without secrets; Hydra's log file is written with it
    (`configs/config.yaml`).
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's text."""
        return redact(super().format(record))


class clean_output(ContextDecorator):
    """Have nothing that is printed meanwhile, by whatever library, show a secret."""

    def __enter__(self) -> Self:
        self._before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (
            each if isinstance(each, Clean) else Clean(each) for each in self._before
        )
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._before

    def _recreate_cm(self) -> Self:
        return type(self)()
