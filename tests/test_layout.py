"""How the source is laid out: the width of a line, and which module may know which.

Every import counts, wherever it stands: at the top of a module, inside a function, or for type
checkers alone. A circle of lazy imports is a circle all the same: neither module can be read, moved
or tested without the other.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "tests", "benchmarks", "docs")
WIDEST = 100
PRAGMA = re.compile(r"\s+# (?:noqa: \w+|(?:type|pyright): ignore(?:\[[\w-]+\])?)$")
"""What a checker reads can stand nowhere but at its line's end; the formatter does not count it."""
SWITCHED_OFF = re.compile(r"#\s*fmt:\s*(?:skip|off)|#\s*yapf:\s*disable")

LAYERS = (
    ("errors",),
    ("tasks",),
    ("config",),
    ("ledger",),
    ("store", "compare"),
    ("models",),
    ("data",),
    ("distillation", "evaluation"),
    ("training", "quantization"),
    ("report",),
    ("tracking",),
    ("stages",),
    ("gate", "forecast"),
    ("runs",),
    ("launch",),
    ("cli",),
    ("__main__",),
)
"""Top-level names of `pipeline/`, the lowest first: each may import those before it, and itself."""
LIBRARIES = {"mlflow": {"tracking"}, "hydra": {"cli", "config"}, "omegaconf": {"cli", "config"}}
"""Libraries that only some may import."""
Graph = Mapping[str, set[str]]


def sources() -> list[Path]:
    """Return every Python file of the project."""
    return sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))


def complaints(text: str) -> list[str]:
    """Return what is wrong with the layout of a file, line by line."""
    found: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if (width := len(PRAGMA.sub("", line))) > WIDEST:
            found.append(f"line {number}: {width} characters")
        if SWITCHED_OFF.search(line):
            found.append(f"line {number}: switches the formatter off")
    return found


def test_no_line_is_wide_and_the_formatter_is_never_switched_off() -> None:
    files = sources()
    assert len(files) > 300  # what finds nothing would pass
    wrong = {str(path.relative_to(ROOT)): complaints(path.read_text()) for path in files}
    assert {path: found for path, found in wrong.items() if found} == {}


@pytest.mark.parametrize("line", ["x" * 101, "# fmt" + ": skip", "x = 1  #fmt" + ":off"])
def test_the_checks_above_can_fail(line: str) -> None:
    assert complaints("x = 1\n" + line)[0].startswith("line 2: ")
    assert complaints("x" * 100 + "  # noqa: E501") == []


def broken_paragraphs(text: str) -> list[str]:
    """Return the lines of module docstrings that are indented in the middle of a sentence."""
    quoted = text.split('"""')  # hundreds of files: parsing each would take seconds
    lines = inspect.cleandoc(quoted[1]).splitlines() if not quoted[0] and len(quoted) > 1 else []
    return [
        line
        for before, line in pairwise(lines)
        if line.startswith("    ") and before[:1].strip() and not before.endswith(":")
    ]


def test_docstrings_of_modules_are_plain_paragraphs() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sources()}
    found = {path: broken_paragraphs(text) for path, text in texts.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_broken_paragraph_is_found() -> None:
    assert broken_paragraphs('"""One.\n\nIt goes\n    on.\n"""') == ["    on."]
    assert broken_paragraphs('"""One.\n\n    x = 1\n    y = 2\n\n- item\n  more\n"""') == []


# -- files that are spoken of ---------------------------------------------------------------------

NAMED = re.compile(r"`([\w./-]+\.py)`")


def lost_names(text: str, near: Path) -> list[str]:
    """Return the Python files that a text names in backquotes and that are not where it says.

    A name is read from the text's own folder, from `pipeline/`, or from the project's root.
    """
    places = (near, ROOT / "pipeline", ROOT, ROOT / "tests")
    return [
        name
        for name in NAMED.findall(text)
        if not any((place / name).is_file() for place in places)
    ]


def test_a_file_that_the_source_names_is_there() -> None:
    found = {
        str(path.relative_to(ROOT)): lost_names(path.read_text(), path.parent) for path in sources()
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_a_file_that_is_gone_is_found() -> None:
    quoted = lambda *names: " and ".join(f"`{name}`" for name in names)
    here = ROOT / "pipeline/runs"
    assert lost_names(quoted("loop.py", "stages/base.py", "benchmarks/startup.py"), here) == []
    assert lost_names(quoted("base.py", "runs/gone.py"), here) == ["base.py", "runs/gone.py"]


# -- who imports whom -----------------------------------------------------------------------------


def imports_of(text: str) -> Iterator[str]:
    """Yield the full names that a module imports; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "imports are written out"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imported(text: str) -> tuple[str, ...]:
    """Return what `imports_of` yields; files are asked several times, and parsing takes longest."""
    return tuple(imports_of(text))


def modules(root: Path) -> dict[str, str]:
    """Return the text of every module below `root/pipeline`, by its name without `pipeline.`."""
    found: dict[str, str] = {}
    for path in (root / "pipeline").rglob("*.py"):
        parts = path.relative_to(root / "pipeline").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # the package itself, which every import runs first
            found[name] = path.read_text()
    return found


def graph_of(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Return which modules each module imports; a package stands for its `__init__`."""
    return {
        name: {
            other
            for each in imported(text)
            if (other := each.removeprefix("pipeline.")) in texts and other != name
        }
        for name, text in texts.items()
    }


def circles(graph: Graph) -> list[set[str]]:
    """Return the strongly connected components of more than one module.

    Source: Tarjan 1972, SIAM Journal on Computing 1(2).
    """
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            at = stack.index(name)
            component = set(stack[at:])
            del stack[at:]
            if len(component) > 1:
                found.append(component)

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def upwards(graph: Graph) -> set[tuple[str, str]]:
    """Return the imports of what stands higher, or beside, in `LAYERS`."""
    height = {name: at for at, names in enumerate(LAYERS) for name in names}

    def may(name: str, other: str) -> bool:
        own, its = name.partition(".")[0], other.partition(".")[0]
        return own == its or height[own] > height[its]

    return {(name, other) for name in graph for other in graph[name] if not may(name, other)}


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(graph_of(modules(ROOT))) == []


def test_imports_point_downwards() -> None:
    assert upwards(graph_of(modules(ROOT))) == set()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_known_where_it_belongs(library: str) -> None:
    texts = modules(ROOT)
    importers = {
        name.partition(".")[0]
        for name, text in texts.items()
        if any(each.partition(".")[0] == library for each in imported(text))
    }
    assert importers
    assert importers <= LIBRARIES[library]


def test_every_import_counts() -> None:
    texts = {
        "models.a": "def f():\n    from pipeline.models import b\n",
        "models.b": "if TYPE_CHECKING:\n    from pipeline.models.c import C\n",
        "models.c": "import pipeline.models.a\nimport pipeline.models.d\n",
        "models.d": "from pipeline.cli.main import main\n",
        "cli.main": "from pipeline.models import a\n",
    }
    graph = graph_of(texts)
    assert circles(graph) == [{"models.a", "models.b", "models.c", "models.d", "cli.main"}]
    assert upwards(graph) == {("models.d", "cli.main")}
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
