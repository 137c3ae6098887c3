"""YAML that a user wrote: no larger than settings are, and no larger once its aliases are read."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError

MAX_BYTES = 2**18  # of a file of settings; the longest recipe that ships has 2 KiB
MAX_NODES, MAX_DEPTH = 20_000, 32  # of one whose aliases are written out


def check_growth(path: Path, text: str, key: str, remedy: str) -> None:
    """Refuse YAML that grows when it is read: nesting, aliases of aliases.

    Raises:
        UserError: For the setting `key`; what is too large gets `remedy`.
        yaml.YAMLError: If it is no YAML.
    """
    import yaml

    sizes: dict[str, int] = {}  # by anchor, nodes when written out
    # collections around here, with the nodes in each so far
    opened: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        size = 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UserError(
                    key, f"{path}: *{event.anchor} stands for what it is part of", "write it out"
                )
            size = sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor is not None:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
            if anchor is not None:
                sizes[anchor] = size
        opened[-1] = (opened[-1][0], opened[-1][1] + size)
        if len(opened) > MAX_DEPTH or opened[-1][1] > MAX_NODES:
            raise UserError(
                key, f"{path} is too deep or too long when its aliases are written out", remedy
            )
