"""What there is to choose from, in words: programs, recipes, algorithms of every kind, data sets, backends."""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ppl_lvm import catalogue
from ppl_lvm.catalogue import Kind
from ppl_lvm.datasets import datasets, load
from ppl_lvm.program import program, programs
from ppl_lvm.recipe import recipe, recipes

DISTRIBUTIONS = {"pyro": ("pyro-ppl", "torch"), "numpyro": ("numpyro", "jax")}


def entries(kind: str) -> dict[str, str]:
    """Names of one kind, in the plural, each with one line; no framework is imported."""
    return _ENTRIES[kind]()


def describe(kind: str, name: str) -> str:
    """One program, recipe, algorithm or dataset at length: what it is, its options, their values.

    Raises:
        PplLvmError: there is nothing of that name.
    """
    return _DESCRIBE[kind](name)


def _first_lines(paths: Mapping[str, Path]) -> dict[str, str]:
    return {name: docstring(path).partition("\n")[0] for name, path in paths.items()}


def docstring(path: Path) -> str:
    """What a Python file says about itself."""
    # Parsed, not imported: a program may be slow to import, or written for a backend that is not installed.
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _comment(path: Path) -> str:
    """The comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def _summary(path: Path) -> str:
    """The beginning of a recipe's comment, up to the first colon or full stop."""
    return re.split(r"[.:](?:\s|$)", _comment(path).replace("\n", " "), maxsplit=1)[0] + "."


def _backends() -> dict[str, str]:
    found = {}
    for name, distributions in DISTRIBUTIONS.items():
        try:
            found[name] = ", ".join(f"{package} {version(package)}" for package in distributions)
        except PackageNotFoundError:
            found[name] = f"not installed; run `pip install 'ppl_lvm[{name}]'`"
    return found


def _show_program(name: str) -> str:
    shown = program(name)
    text = [] if shown.path is None else [docstring(Path(shown.path)), ""]
    text += [f"data: {', '.join(shown.arguments)}", f"recipe: {shown.recipe}"]
    text += [f"runs on: {'both backends' if shown.portable else 'the backend it is written for'}"]
    return "\n".join([*text, *_options("--option", dict(shown.options))])


def _show_recipe(name: str) -> str:
    shown = recipe(name)
    path = recipes().get(name, Path(name))
    return "\n".join([_comment(path), *_options("--set", dict(_flat(shown.to_dict())))])


def _show_algorithm(kind: Kind, name: str) -> str:
    shown = catalogue.resolve(kind, name, Path.cwd(), "The command line")
    fields = [
        f"  {option}: {_type(field.annotation)}{'' if field.is_required() else f' = {field.default!r}'}"
        for option, field in shown.model_fields.items()
    ]
    return "\n".join([inspect.getdoc(shown) or "", "", "options:" if fields else "no options", *fields])


def _show_dataset(name: str) -> str:
    shown = load(name)
    of_row = shown.train[0].shape if shown.ragged else shown.train.shape[1:]
    shape = " x ".join(["T", *map(str, of_row[1:])] if shown.ragged else map(str, of_row))
    values = np.concatenate([a.reshape(-1) for a in shown.train])
    return "\n".join(
        [
            shown.description,
            "",
            f"rows: {len(shown.train):,} to fit, {len(shown.test):,} held out, each of shape {shape}",
            f"values: from {values.min():g} to {values.max():g}",
            f"labels: {'none' if shown.train_labels is None else len({*shown.train_labels.tolist()})}",
            f"licence: {shown.licence}",
        ]
    )


def _options(flag: str, values: Mapping[str, Any]) -> list[str]:
    if not values:
        return ["", "no options"]
    return [
        "",
        f"options ({flag} KEY=VALUE):",
        *(f"  {key} = {_word(value)}" for key, value in values.items()),
    ]


def _word(value: object) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, as `--set` takes them."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _type(annotation: Any) -> str:
    return inspect.formatannotation(annotation).replace("typing.", "").replace("ppl_lvm.algorithm.", "")


_ENTRIES: dict[str, Callable[[], dict[str, str]]] = {
    "programs": lambda: _first_lines(programs()),
    "recipes": lambda: {name: _summary(path) for name, path in recipes().items()},
    **{f"{kind}s": partial(lambda kind: _first_lines(catalogue.available(kind)), kind) for kind in catalogue.BASES},
    "datasets": datasets,
    "backends": _backends,
}
_DESCRIBE: dict[str, Callable[[str], str]] = {
    "program": _show_program,
    "recipe": _show_recipe,
    **{kind: partial(_show_algorithm, kind) for kind in catalogue.BASES},
    "dataset": _show_dataset,
}
