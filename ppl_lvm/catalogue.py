"""Names of objectives, estimators and methods, turned into classes and back. Found by file, not registered."""

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ppl_lvm import lookup
from ppl_lvm.algorithm import Algorithm, Estimator, GuideFamily, Method, Objective
from ppl_lvm.errors import RecipeError

Kind = Literal["objective", "estimator", "guide", "method"]
BASES: dict[Kind, type[Algorithm]] = {
    "objective": Objective,
    "estimator": Estimator,
    "guide": GuideFamily,
    "method": Method,
}
"""Base class of each kind; the files of a kind are in the folder of its name in the plural."""


def available(kind: Kind) -> dict[str, Path]:
    """The algorithms of a kind that a recipe can name, with their files; nothing is imported."""
    return lookup.find(lookup.PACKAGE / f"{kind}s", ".py", RecipeError)


def objectives() -> dict[str, Path]:
    """The objectives that a recipe can name, with their files; nothing is imported."""
    return available("objective")


def estimators() -> dict[str, Path]:
    """The gradient estimators that a recipe can name, with their files; nothing is imported."""
    return available("estimator")


def guides() -> dict[str, Path]:
    """The families of guides that a recipe can name, with their files; nothing is imported."""
    return available("guide")


def resolve(kind: Kind, asked: str, folder: Path | None, asker: str) -> type[Algorithm]:
    """The class behind a name, a "file.py:name" (relative to `folder`) or a "package.module:name".

    Without a folder, names alone: nothing else is imported or run.

    Raises:
        RecipeError: there is no such class; `asker` says in the message who asked.
    """
    source, _, name = asked.rpartition(":")
    if not source:
        found = available(kind)
        if lookup.is_path(asked, ".py"):
            raise RecipeError(
                f"{asker} asks for the {kind} {asked!r}; add the class, as in {asked}:my_{kind}."
            )
        if asked not in found:
            raise RecipeError(
                f"{asker} asks for an unknown {kind} {asked!r}. "
                f"{lookup.valid(asked, found, kind.title() + 's')} "
                f"One of your own is given as path/to/file.py:{asked}."
            )
        importlib.invalidate_caches()  # the file may be younger than the process
        module = importlib.import_module(f"ppl_lvm.{kind}s.{asked}")
    elif folder is None:
        raise RecipeError(
            f"{asker} asks for the {kind} {asked!r}, which is none of the library's, and nothing that a saved recipe "
            f"names is imported or run; give the recipe itself, as in load(path, recipe=...)."
        )
    elif lookup.is_path(source, ".py"):
        if not source.endswith(".py"):
            raise RecipeError(f"{asker} asks for the {kind} {asked!r}; a file of Python ends in .py.")
        module = lookup.load(folder / source, RecipeError)
    else:
        module = lookup.imported(source, RecipeError, f"{asker} asks for the {kind} {asked!r}")
    return _class_in(module, kind, name, asker)


def _class_in(module: ModuleType, kind: Kind, name: str, asker: str) -> type[Algorithm]:
    base = BASES[kind]
    value: object = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if inspect.isclass(value) and issubclass(value, base):
        return value
    there = [
        n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, base) and v is not base
    ]
    raise RecipeError(
        f"{asker} asks for the {kind} {name!r} of {module.__file__}, which "
        + (
            f"is {value!r} and not a subclass of ppl_lvm.algorithm.{base.__name__}. "
            if value
            else "does not exist. "
        )
        + lookup.valid(name, there, f"{kind.title()}s there")
    )


def to_dict(instance: Algorithm) -> dict[str, Any]:
    """The options with a `name` that `resolve` turns back into the class."""
    kind = type(instance)
    if kind.__module__ in (f"ppl_lvm.{base}s.{kind.__name__}" for base in BASES):
        name = kind.__name__
    elif kind.__module__.startswith(lookup.PREFIX):
        name = f"{sys.modules[kind.__module__].__file__}:{kind.__qualname__}"
    else:
        name = f"{kind.__module__}:{kind.__qualname__}"
    return {"name": name, **instance.model_dump(mode="json", exclude_none=True)}
