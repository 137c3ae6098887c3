"""Measure this project's source: sizes, density, circles. `python docs/measure_source.py`."""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UNIT = re.compile(
    r"\b(?:shape|dtype|seconds|bytes|tokens|hours|joules|watts|nats|fraction|share|Source:|arXiv)\b"
    r"|\([A-Z],"
)
TOOLS = re.compile(r"# ?(?:fmt|noqa|pyright|type|ruff):")


def functions(trees: list[ast.Module]) -> list[Any]:
    """Return every function and method."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def public(trees: list[ast.Module]) -> list[Any]:
    """Return public functions and classes at the top of modules, and public methods of classes."""
    found: list[Any] = []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for tree in trees:
        for node in tree.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                found.append(node)
                inside = node.body if isinstance(node, ast.ClassDef) else []
                found += [
                    each
                    for each in inside
                    if isinstance(each, kinds) and not each.name.startswith("_")
                ]
    return found


def comment_lines(text: str) -> int:
    """Return how many lines hold a comment that is for people, not for a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = (token for token in tokens if token.type == tokenize.COMMENT)
    return len({each.start[0] for each in comments if not TOOLS.match(each.string)})


def measure(root: Path) -> dict[str, str]:
    """Return the measures of the package in `root/pipeline`, in words."""
    texts = [path.read_text() for path in sorted((root / "pipeline").rglob("*.py"))]
    trees = [ast.parse(text) for text in texts]
    lines = [line for text in texts for line in text.splitlines()]
    sizes = sorted(each.end_lineno - each.lineno + 1 for each in functions(trees))
    taken = [
        len(each.args.posonlyargs) + len(each.args.args) + len(each.args.kwonlyargs)
        for each in functions(trees)
    ]
    documented = [ast.get_docstring(each) for each in public(trees)]
    described = [text for text in documented if text]
    top = [each for each in (root / "pipeline").iterdir() if each.name not in ("__pycache__",)]
    folders = [each for each in top if each.is_dir() and not each.name.startswith("_")]
    modules = [each for each in top if each.suffix == ".py"]
    share = lambda part, whole: f"{100 * part / whole:.1f}%"
    return {
        "files / lines": f"{len(texts)} / {len(lines) / 1000:.1f}k",
        "function lines: median, p90, max": (
            f"{statistics.median(sizes):g}, {sizes[int(0.9 * len(sizes))]}, {sizes[-1]}"
        ),
        "parameters: p90, share over 6": (
            f"{sorted(taken)[int(0.9 * len(taken))]},"
            f" {share(sum(n > 6 for n in taken), len(taken))}"
        ),
        "public docstrings (unit, shape, source)": (
            f"{share(len(described), len(documented))}"
            f" ({share(sum(bool(UNIT.search(text)) for text in described), len(documented))})"
        ),
        "comment lines": share(sum(map(comment_lines, texts)), len(lines)),
        "lines over 100 characters": share(sum(len(line) > 100 for line in lines), len(lines)),
        "formatter switched off": str(
            sum(bool(re.search(r"# fmt: (?:skip|off)", line)) for line in lines)
        ),
        "top-level modules + folders": f"{len(modules)} + {len(folders)}",
        "dict[str, Any]": str(sum(line.count("dict[str, Any]") for line in lines)),
        "README words": str(len((root / "README.md").read_text().split())),
    }


if __name__ == "__main__":
    for root in [Path(each) for each in sys.argv[1:]] or [ROOT]:
        for what, said in measure(root).items():
            print(f"| {what} | {said} |")
