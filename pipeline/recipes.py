"""Where configs and recipes lie, and what each recipe asks. Imports nothing heavy: the list must print at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """Return the folder `name` of the checkout, else the copy that a wheel carries inside the package."""
    checkout = PACKAGE.parent / name
    return checkout if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE / f"_{name}"


def config_dir() -> Path:
    """Return the folder of `config.yaml` and its groups."""
    return _shipped("configs")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe file and the question in its first comment line."""

    name: str
    path: Path
    question: str


def find_recipes(extra: list[Path]) -> dict[str, Recipe]:
    """Return the shipped recipes and those of `--recipe-dir`, by name; a user's recipe wins over a shipped one.

    Raises:
        UserError: If a folder named by `--recipe-dir` is not there.
    """
    for folder in extra:
        if not folder.is_dir():
            raise UserError("--recipe-dir", f"{folder} is not a folder", "name a folder of recipe files")
    files = [path for folder in (_shipped("recipes"), *extra) for path in sorted(folder.glob("*.yaml"))]
    return {path.stem: Recipe(path.stem, path, _question(path)) for path in files}


def _question(path: Path) -> str:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.strip()
        if text.startswith("#") and "@package" not in text:
            return text.lstrip("# ").strip()
        if text and not text.startswith("#"):
            break
    return "(no question in its first comment line)"
