"""What follows a command's name: options with a value, flags, and names of things.

Recipes are Hydra's to read; commands have these few words, and one way of refusing others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pipeline.errors import Unparsable, one_line


@dataclass(frozen=True, slots=True)
class Given:
    """What a command line gives.

    Attributes:
        values: By option; of one that was given again, the last. A flag's is empty.
        all_values: By option that may be given again: each of its values.
        names: What is no option.
    """

    values: dict[str, str] = field(default_factory=dict[str, str])
    all_values: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    names: list[str] = field(default_factory=list[str])


def read_options(
    argv: Sequence[str],
    command: str,
    valued: Collection[str],
    *,
    flags: Collection[str] = (),
    repeated: Collection[str] = (),
    takes_names: bool = False,
    takes_empty: bool = True,
) -> Given:
    """Return what a command line gives: `--name VALUE` or `--name=VALUE`, `--flag`, NAME.

    Args:
        command: Its name, for refusals.
        valued: Options with a value.
        flags: Options without one.
        repeated: Those of `valued` that may be given again.
        takes_names: Whether there may be words that are no option.
        takes_empty: Whether an empty value is one.

    Raises:
        Unparsable: Naming the option.
    """
    given = Given(all_values={name: [] for name in repeated})
    pending = iter(argv)
    for arg in pending:
        name, equals, value = arg.partition("=")
        if takes_names and not arg.startswith("-"):
            given.names.append(arg)
            continue
        if name not in valued and name not in flags:
            raise Unparsable(one_line(arg, 80), f"is no option of {command}", "--help lists them")
        if name in flags and equals:
            raise Unparsable(name, "takes no value", f"write {name} alone")
        found = "" if name in flags else value if equals else next(pending, None)
        if found is None or (not found and name in valued and not takes_empty):
            raise Unparsable(name, "has no value", f"write {name} VALUE")
        given.values[name] = found
        if name in repeated:
            given.all_values[name].append(found)
    return given
