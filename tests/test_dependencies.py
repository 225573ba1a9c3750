"""Bounds of dependencies: the tested versions are inside, the lowest are what `make test-oldest` installs."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "oldest.py"))


def test_tested_versions_are_inside_the_bounds() -> None:
    declared, tested = OLDEST["declared"](), OLDEST["tested"]()
    assert {r.name for r in declared} >= {"numpy", "torch", "pyro-ppl", "jax", "numpyro"}
    outside = [f"{r} but {tested[r.name]} is tested" for r in declared if not r.specifier.contains(tested[r.name])]
    assert outside == []


def test_every_dependency_has_one_lower_bound() -> None:
    floors = {r.name: OLDEST["floor"](r) for r in OLDEST["declared"]()}
    found = dict(line.split("==") for line in OLDEST["constraints"]())
    assert {n: v for n, v in found.items() if n != "torch"} == {n: v for n, v in floors.items() if n != "torch"}
    assert found["torch"] == OLDEST["tested"]()["torch"]
    with pytest.raises(ValueError, match="values to unpack"):
        OLDEST["floor"](Requirement("numpy<3"))


def test_every_upper_bound_says_why() -> None:
    lines = PROJECT.splitlines()
    bounded = [i for i, line in enumerate(lines) if re.search(r'^ *"[\w.-]+[^"]*<', line)]
    assert len(bounded) >= 6
    for i in bounded:
        assert lines[i - 1].strip().startswith("#"), f"say above it why: {lines[i]}"
    assert tomllib.loads(PROJECT)["project"]["optional-dependencies"]["all"] == ["ppl_lvm[pyro,numpyro]"]
