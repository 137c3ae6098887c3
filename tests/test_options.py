"""The words after a command's name, as `chargeback`, `compare`, `history`, `verify` and `weekly`
read them.
"""

from __future__ import annotations

import pytest

from pipeline.cli.options import Given, read_options
from pipeline.errors import Unparsable

VALUED, FLAGS = ("--from", "--budget"), ("--csv",)


def read(*argv: str, **how: bool) -> Given:
    return read_options(argv, "count", VALUED, flags=FLAGS, repeated=("--budget",), **how)


def test_values_flags_and_names_are_told_apart() -> None:
    given = read(
        "a", "--from", "b", "--csv", "--budget=x=1", "c", "--budget", "2", takes_names=True
    )
    assert given.names == ["a", "c"]
    assert given.values == {"--from": "b", "--csv": "", "--budget": "2"}
    assert given.all_values == {"--budget": ["x=1", "2"]}


def test_of_an_option_that_is_given_again_the_last_holds() -> None:
    assert read("--from", "1", "--from=2").values == {"--from": "2"}
    assert read() == Given({}, {"--budget": []}, [])


def test_a_value_may_look_like_an_option_or_be_empty() -> None:
    assert read("--from", "--csv").values == {"--from": "--csv"}
    assert read("--from=").values == {"--from": ""}


@pytest.mark.parametrize(
    ("argv", "how", "said"),
    [
        (["--what"], {}, "--what: is no option of count; --help lists them"),
        (["--what=1"], {"takes_names": True}, "--what=1: is no option of count; --help lists them"),
        (["a"], {}, "a: is no option of count; --help lists them"),
        (["--csv=1"], {}, "--csv: takes no value; write --csv alone"),
        (["--from"], {}, "--from: has no value; write --from VALUE"),
        (["--from="], {"takes_empty": False}, "--from: has no value; write --from VALUE"),
        (["--x\x1b[31m\n"], {}, "--x: is no option of count; --help lists them"),
        (["-" + "x" * 99], {}, "-" + "x" * 76 + "...: is no option of count; --help lists them"),
    ],
)
def test_what_cannot_be_read_is_named(argv: list[str], how: dict[str, bool], said: str) -> None:
    with pytest.raises(Unparsable) as refused:
        read(*argv, **how)
    assert str(refused.value) == said
