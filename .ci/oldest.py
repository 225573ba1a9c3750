"""The lowest versions that pyproject.toml declares, as a constraints file for pip: one line for every lower bound.

torch stays at the version of constraints.txt, as older ones are not to be had for every machine.

    python .ci/oldest.py > constraints-oldest.txt
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
AS_TESTED = ("torch",)
EXTRAS = ("pyro", "numpyro")


def declared() -> list[Requirement]:
    """What the package and its two backends need here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    needed = [Requirement(line) for line in lines]
    return [r for r in needed if r.marker is None or r.marker.evaluate()]


def floor(requirement: Requirement) -> str:
    """The version of its lower bound; ValueError where it has none, or several."""
    (found,) = [s.version for s in requirement.specifier if s.operator == ">="]
    return found


def tested() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def constraints() -> list[str]:
    held = tested()
    return [f"{r.name}=={held[r.name] if r.name in AS_TESTED else floor(r)}" for r in declared()]


if __name__ == "__main__":
    print("\n".join(constraints()))
