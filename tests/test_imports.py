"""Who may import whom: the arrows between the parts of the package; what `import ppl_lvm` leaves alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ppl_lvm"

FRAMEWORKS = {"torch", "pyro", "jax", "jaxlib", "numpyro", "flax", "optax", "equinox"}
SLOW = {"matplotlib", "sklearn", "scipy", "pandas", "xarray", "arviz_base", "arviz_stats", "h5netcdf"}

# Each part of ppl_lvm, and the parts it may import when it is imported or called. `ops` finds a backend's
# functions and `catalogue` an algorithm by name at run time: no arrow. A new module is entered here.
ARROWS = {
    "errors": set[str](),
    "process": set[str](),
    "lookup": {"errors", "process"},
    "ops": {"errors"},
    "nets": {"errors"},
    "datasets": {"errors", "lookup"},
    "algorithm": {"errors", "latents", "ops"},  # for type checkers: a family of guides is called with a sketch
    "draws": {"algorithm", "errors", "ops"},
    "latents": {"errors", "nets", "ops"},
    "guides": {"algorithm", "errors", "latents", "nets", "ops"},
    "objectives": {"algorithm", "draws", "errors", "ops"},
    "relaxations": {"algorithm", "ops"},
    "estimators": {"algorithm", "draws", "errors", "ops", "relaxations"},
    "methods": {"algorithm"},
    "structured": {"draws", "errors", "ops"},
    "catalogue": {"algorithm", "errors", "lookup"},
    "recipe": {"algorithm", "catalogue", "errors", "lookup"},
    "backend_of": {"errors"},
    "program": {"algorithm", "backend_of", "errors", "lookup", "nets", "ops"},
    "backends": {"algorithm", "draws", "errors", "latents", "nets", "ops", "process", "program", "structured"},
    "legality": {"algorithm", "backends", "catalogue", "draws", "errors", "estimators"},  # "auto" prefers some by name
    "matrix": {"algorithm", "backends", "catalogue", "draws", "legality"},
    "store": {"errors"},
    "to_arviz": {"errors"},
    "data": {"backends", "errors", "lookup", "program"},
    "memory": {"errors"},
    "sinks": {"errors", "to_arviz"},
    "fitted": {"backends", "errors", "lookup", "memory", "program"},
    "predict": {"backends", "errors", "fitted"},
    "posterior": {
        *("asking", "backends", "data", "errors", "fitted", "legality", "lookup", "predict", "program", "saving"),
        *("sinks", "store", "to_arviz"),
    },
    "saving": {
        *("algorithm", "backends", "catalogue", "errors", "fingerprint", "lookup", "program", "store", "to_arviz"),
    },
    "loading": {
        *("algorithm", "backends", "catalogue", "data", "errors", "fingerprint", "fitted", "posterior", "program"),
        *("recipe", "sampled", "saving", "store", "to_arviz"),
    },
    "sampled": {"asking", "backends", "errors", "fitted", "posterior", "predict", "program"},
    "disentanglement": {"errors"},
    "progress": set[str](),
    "parameters": {"algorithm", "backends", "errors", "lookup"},
    "monitor": {"backends"},
    "nonfinite": {"algorithm", "backends", "errors", "monitor"},
    "pace": set[str](),
    "asking": {"errors"},
    "arguments": {"asking", "errors", "posterior", "recipe", "to_arviz"},
    "validation": {"algorithm", "backends", "errors", "memory"},
    "interrupts": set[str](),
    "fingerprint": set[str](),
    "checkpoint": {"backends", "errors", "fingerprint", "monitor", "posterior", "store", "to_arviz"},
    "stages": {"checkpoint", "errors", "posterior", "recipe"},
    "fit": {
        *("algorithm", "arguments", "backend_of", "backends", "checkpoint", "data", "draws", "errors", "fingerprint"),
        *("interrupts", "legality", "lookup", "memory", "monitor", "nonfinite", "ops", "pace", "parameters"),
        *("posterior", "program", "progress", "recipe", "sampled", "stages", "store", "to_arviz", "validation"),
    },
    "facades": {
        *("algorithm", "backends", "catalogue", "draws", "errors", "estimators", "legality", "lookup", "ops"),
        *("posterior", "program", "recipe", "to_arviz"),
    },
    "pictures": {"datasets", "errors", "to_arviz"},
    "report": {
        *("algorithm", "datasets", "errors", "fit", "pictures", "posterior", "program", "recipe", "saving", "store"),
        "to_arviz",
    },
    "listing": {"catalogue", "datasets", "errors", "lookup", "program", "recipe"},
    "jobs": {"errors"},
    "cells": {"datasets", "errors", "fit", "program", "recipe", "report"},
    "comparison": {"report"},
    "cli": {
        *("algorithm", "catalogue", "cells", "checkpoint", "comparison", "datasets", "errors", "fit", "jobs"),
        *("listing", "loading", "lookup", "matrix", "posterior", "program", "recipe", "report", "store", "to_arviz"),
    },
    "": {
        *("algorithm", "catalogue", "draws", "errors", "facades", "fit", "loading", "nets"),
        *("posterior", "program", "recipe"),
    },
}
ALONE = {"objectives", "estimators", "guides", "methods"}
"""Folders whose files do not import each other: adding or removing one touches no other."""

SOURCES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted((ROOT / "models").rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """The part of ppl_lvm that a file belongs to; the package's own `__init__` is ""."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full dotted names of all that a file imports, at any depth, as if `from` imported modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -(node.level - 1) or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The tree without `if TYPE_CHECKING:` blocks: an annotation is no arrow between parts."""

    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else node

    kept = Drop().visit(tree)
    assert isinstance(kept, ast.Module)
    return kept


def frameworks_in(source: str) -> set[str]:
    """Frameworks that a file imports; array_api_compat.torch counts as torch."""
    names = [module.removeprefix("array_api_compat.") for module in imported(ast.parse(source), "")]
    return {module.partition(".")[0] for module in names} & FRAMEWORKS


def wrong_arrows(source: str, path: Path) -> list[str]:
    """Imports of other parts of ppl_lvm that this file must not have."""
    part = part_of(path)
    inside = ".".join(("ppl_lvm", *path.relative_to(PACKAGE).parent.parts))
    wrong = []
    for module in imported(without_type_checking(ast.parse(source)), inside):
        root, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if root != "ppl_lvm":
            continue
        if target not in ARROWS:
            target = ""  # a public name, taken from the package itself
        if target == part and part not in ALONE:
            continue
        if target not in ARROWS[part]:
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("path", [*SOURCES, *PROGRAMS], ids=name)
def test_only_backends_import_a_framework(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "backends"):
        return
    assert frameworks_in(path.read_text()) == set(), f"{name(path)}: only ppl_lvm/backends/ may"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_arrows_between_parts(path: Path) -> None:
    part = part_of(path)
    assert part in ARROWS, f"say in ARROWS what ppl_lvm/{part} may import"
    if path.name == "__init__.py" and part in ALONE:
        assert not list(imported(ast.parse(path.read_text()), "")), f"{name(path)} must not be a register"
    assert wrong_arrows(path.read_text(), path) == [], f"{name(path)} may import {sorted(ARROWS[part])}"


def test_wrong_imports_are_seen() -> None:
    elbo = PACKAGE / "objectives" / "elbo.py"
    assert frameworks_in("def f():\n    from torch.nn import functional") == {"torch"}
    assert frameworks_in("import array_api_compat.torch as xp") == {"torch"}
    assert frameworks_in("from array_api_compat import torch") == {"torch"}
    assert frameworks_in("import torchlight, numpy") == set()
    for source in (
        "from ppl_lvm.objectives import iwae",
        "from ppl_lvm.objectives.iwae import iwae",
        "from . import iwae",
        "from .iwae import iwae",
        "from ..backends import base",
        "import ppl_lvm.backends.base",
        "from ppl_lvm import fit",
        "def f():\n    from ppl_lvm.recipe import recipe",
    ):
        assert wrong_arrows(source, elbo), f"not seen: {source}"
    for source in (
        "from ppl_lvm.draws import Loss",
        "from .. import ops",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ppl_lvm.fit import Fit",
    ):
        assert wrong_arrows(source, elbo) == [], f"refused: {source}"


def test_arrows_make_no_circle() -> None:
    seen: set[str] = set()
    while ready := {part for part, targets in ARROWS.items() if part not in seen and targets <= seen}:
        seen |= ready
    assert seen == set(ARROWS), f"these import each other in a circle: {sorted(set(ARROWS) - seen)}"


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, time; began = time.process_time(); import ppl_lvm; print(time.process_time() - began); "
        "print(*sorted({module.partition('.')[0] for module in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *modules = run.stdout.split()
    print(f"import ppl_lvm: {seconds} s of processor time")
    assert set(modules) & (FRAMEWORKS | SLOW) == set()
