"""What the repository says about itself is there: docstrings, the change log, one version."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = sorted(
    path
    for pattern in ("models/**/*.py", "ppl_lvm/**/*.py", "tests/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_has_docstring(path: Path) -> None:
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), f"{path} says nothing about itself"


@pytest.mark.parametrize("path", sorted((ROOT / "inference").glob("*.toml")), ids=lambda path: path.name)
def test_recipe_says_what_it_is(path: Path) -> None:
    assert path.read_text().lstrip().startswith("#"), f"{path} does not begin with a comment"


def test_changelog_has_a_place_for_changes() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert "## [Unreleased]" in lines


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        entry for name, extra in project["optional-dependencies"].items() if name != "all" for entry in extra
    ]
    names = {name_of(entry) for entry in wanted}
    pinned = {
        name_of(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert names <= pinned, f"constraints.txt lacks {sorted(names - pinned)}"


def name_of(requirement: str) -> str:
    """The normalised project name at the beginning of a requirement."""
    name = requirement
    for mark in "[;<>=! ":
        name = name.partition(mark)[0]
    return name.lower().replace("_", "-")
