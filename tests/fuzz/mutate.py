"""Seeded damage: to bytes, to JSON values and their types, to files as such, and to command
lines.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, -(2**70), 1e308, float("nan"), float("inf")),
    *("", "x", "\u0000", "\ud800", "FINISHED", "x" * 5000, "9" * 400),
    *([], {}, [[]], {"": None}, [None, 1, "x"], {"value": 1}),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of a value and of all below it."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [at, *(place for key, item in items for place in places(item, (*at, key)))]


def mutate_json(record: Any, rng: random.Random) -> Any:
    """Return a copy with one to three values replaced, dropped, renamed, doubled, or put in
    another's place.
    """
    record = {"": copy.deepcopy(record)}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = places(record)[1:]
        if not every:
            break
        place, other = rng.choice(every), rng.choice(every)
        owner = _at(record, place[:-1])
        what = rng.randrange(6)
        if what == 0 and len(place) > 1:
            del owner[place[-1]]
        elif what == 1 and isinstance(owner, dict) and len(place) > 1:
            owner[f"{place[-1]}x"] = owner.pop(place[-1])
        elif what == 2 and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[place[-1]]))
        elif what == 3:
            owner[place[-1]] = copy.deepcopy(_at(record, other))
        elif (
            what == 4
            and isinstance(owner[place[-1]], int | float)
            and not isinstance(owner[place[-1]], bool)
        ):
            owner[place[-1]] = owner[place[-1]] * rng.choice((-1, 0, 2, 10**6)) + rng.choice(
                (0, 1, 0.5)
            )
        else:
            owner[place[-1]] = rng.choice(ODD)
    return record[""]


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return content cut, with bytes flipped, dropped, doubled, or with a piece of something else
    in it.
    """
    if not content:
        return rng.randbytes(8)
    at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    what = rng.randrange(6)
    if what == 0:
        return content[:at]
    if what == 1:
        flipped = bytearray(content)
        for _ in range(rng.randrange(1, 5)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if what == 2:
        return content[:at] + content[to:]
    if what == 3:
        return content[:to] + content[at:]
    if what == 4:
        return (
            content[:at]
            + rng.choice((b"\xff\xfe", b"\x00", b"}", b"[" * 3000, b"\n", b'"', b"NaN"))
            + content[at:]
        )
    return rng.choice((b"", b"{}", b"[]", b"null", b"0", b'""', b"\x00" * 64, b"{", b"[" * 100_000))


def damage(path: Path, rng: random.Random, *, lines: bool = False) -> str:
    """Damage a file; return how.

    Args:
        lines: It holds a JSON object a line, of which one is damaged.
    """
    what = rng.choices(("json", "bytes", "folder", "gone", "link", "pipe"), (60, 30, 3, 3, 2, 2))[0]
    if what == "json":
        _damage_json(path, rng, lines=lines)
    elif what == "bytes":
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    else:
        path.unlink()
        if what == "folder":
            path.mkdir()
        elif what == "link":
            path.symlink_to(rng.choice(("/nowhere", "/dev/zero", path.parent)))
        elif what == "pipe":
            os.mkfifo(path)
    return what


def _damage_json(path: Path, rng: random.Random, *, lines: bool) -> None:
    whole = path.read_bytes().decode("utf-8", "replace")
    text = whole.split("\n") if lines else [whole]
    at = rng.randrange(max(1, len(text) - 1))
    try:
        record = mutate_json(json.loads(text[at]), rng)
    except ValueError:  # YAML, or damaged before
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        return
    if isinstance(record, dict) and rng.random() < 0.7:  # one that nobody can tell by its checksum
        record.pop("checksum", None)
        record.pop("crc", None)
    text[at] = json.dumps(record)
    path.write_text("\n".join(text), encoding="utf-8", errors="replace")


def restore(source: Path, target: Path) -> None:
    """Make `target` what `source` is, file or folder."""
    if target.is_symlink() or target.is_file() or target.is_fifo():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


# -- command lines ---------------------------------------------------------------------------------

VALUES = [
    *(
        "1",
        "0",
        "-1",
        "1.5",
        "1e400",
        "nan",
        "null",
        "true",
        "x",
        "",
        "a b",
        "\xe9",
        "[1]",
        "[1,2]",
    ),
    *("[", "{", "{a: 1}", "{a", "'", '"', "'x'", "a,b", "1,2", "${", "${x}", "${model.name}"),
    *("${oc.env:HOME}", "${oc.env:NO_SUCH}", "choice(1,2)", "range(3)", "glob(*)", "9" * 30),
    *("9" * 5000, "\udcff", "\x00", "\n", "=", "~", "*", "/dev/zero", "/", "~/x", "hf_x", "auto"),
    *(
        "cpu",
        "sequence_classification",
        "every_2",
        "[0,99]",
        "{_target_: os.system}",
        "\\",
        "#",
        "%",
    ),
    *("!", "a:b", "[[1]]", "{}", "[]"),
]
SIGNS = [*[""] * 30, "+", "++", "~", "-", "--", " ", "@", "/"]
FLAGS = [
    *("-m", "--multirun", "--cfg", "--cfg=job", "--resolve", "--help", "-h", "--debug", "--frob"),
    *(
        "-c",
        "job",
        "--info",
        "--recipe-dir",
        "--recipe-dir=/nowhere",
        "--config-dir",
        "--config-path",
    ),
    *("-cn", "--version", "--package", "--", "-", "--recipe-dir=/dev/zero"),
]


def command_line(rng: random.Random, keys: list[str], recipes: list[str]) -> list[str]:
    """Return a command line that somebody might mistype."""
    args = [f"recipe={rng.choice(recipes)}"] if rng.random() < 0.9 else []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(keys)
        what = rng.random()
        if what < 0.1:
            key = _typo(key, rng)
        elif what < 0.15:
            key = f"{key}.{rng.choice(('0', 'x', '_target_', ''))}"
        elif what < 0.2:
            key = key.rpartition(".")[0] or key
        value = rng.choice(VALUES) if rng.random() < 0.9 else _typo(rng.choice(VALUES), rng)
        args.append(rng.choice(SIGNS) + (f"{key}={value}" if rng.random() < 0.97 else key))
    if rng.random() < 0.25:
        args.insert(rng.randrange(len(args) + 1), rng.choice(FLAGS))
    rng.shuffle(args)
    return args


def _typo(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) + 1)
    return (
        word[:at]
        + rng.choice(("", "x", ".", "=", " ", "'", "[", "_"))
        + word[at + rng.randrange(2) :]
    )
