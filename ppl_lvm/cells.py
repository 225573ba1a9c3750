"""One fit as the command line asks for it: by names, so that another process can make it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ppl_lvm import report
from ppl_lvm.datasets import Dataset, load
from ppl_lvm.errors import DataError, StorageError
from ppl_lvm.program import Program
from ppl_lvm.program import program as load_program
from ppl_lvm.recipe import Recipe
from ppl_lvm.recipe import recipe as load_recipe
from ppl_lvm.report import Metrics

OWN = "own"
"""The validation rows that a data set comes with."""


class Command(BaseModel):
    """What `ppl-lvm fit` was asked for, as it was typed: a checkpoint keeps it for `ppl-lvm resume`.

    `where` is the folder that paths start from.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    where: str
    program: str
    data: str
    recipe: list[str] | None
    guide: str | None
    backend: str | None
    overrides: list[str] | None
    options: list[str] | None
    seed: int
    draws: int
    validation: str | None
    missing: str | None
    start: str | None
    dtype: str | None
    compile: str | None
    device: str | None
    data_plate: str | None
    out: str | None
    every: int | None

    @classmethod
    def of(cls, kept: object) -> Command:
        """What a checkpoint has kept.

        Raises:
            StorageError: it is no command.
        """
        try:
            return cls.model_validate(kept)
        except ValidationError as cause:
            first = cause.errors()[0]
            raise StorageError(
                f"The checkpoint keeps no command that can be given again: {'.'.join(map(str, first['loc']))}: "
                f"{first['msg']}."
            ) from cause


@dataclass(frozen=True)
class Cell:
    """What is fitted, to what, how, and where the run is written.

    Args:
        program, data: names or paths.
        recipes: names or paths, run as stages; none: the program's own.
        guide: a family of guides, "own" for the program's; None: as the recipe has it.
        backend: None is the engine's choice.
        options, overrides: of the program, and of the recipe.
        settings: further arguments of `fit`: `dtype`, `missing`, `validation` (a fraction or "own") and so on.
        draws: importance draws per held-out row.
        start: a run folder whose parameters the fit starts from.
        folder: the run folder to write.
    """

    program: str
    data: str
    recipes: tuple[str, ...] = ()
    guide: str | None = None
    backend: str | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    draws: int = 5000
    start: Path | None = None
    folder: Path | None = None

    def loaded(self) -> tuple[Program, Recipe, Dataset]:
        """Program, recipe and data of these names.

        Raises:
            ProgramError, RecipeError, DataError: there is no such thing, or it has no such option.
        """
        program = load_program(self.program, **self.options)
        changes = dict(self.overrides) | ({} if self.guide is None else {"guide": self.guide})
        names = self.recipes or (program.recipe,)
        recipe = load_recipe(names[0] if len(names) == 1 else list(names), **changes)
        dataset = _load(self.data, "missing" in self.settings, _stamp(self.data))
        if self.settings.get("validation") == OWN and dataset.valid is None:
            raise DataError(
                f"validation = {OWN!r}, but the data set {dataset.name!r} comes without validation rows; give a "
                f"fraction of the rows to fit, as in 0.1."
            )
        return program, recipe, dataset


@dataclass(frozen=True, eq=False)
class Outcome:
    """The figures of a fit, and what it said about itself."""

    metrics: Metrics
    messages: tuple[str, ...]


def fit_cell(cell: Cell, progress_bar: bool | None = None) -> Outcome:
    """Fits, measures held-out rows, and writes the run folder if the cell has one.

    Parameters that have an entry for every row (`ppl.row_param`, families such as "auto_normal" over latents of rows)
    are fitted anew to the held-out rows, everything else frozen: `refit`.
    """
    from ppl_lvm.fit import fit

    program, recipe, dataset = cell.loaded()
    settings = dict(cell.settings)
    if settings.get("validation") == OWN:
        settings["validation"] = dataset.valid
    if cell.start is not None:
        settings["start"] = report.starting(cell.start)
    if progress_bar is not None:
        settings["progress_bar"] = progress_bar
    run = fit(program, data=dataset.train, recipe=recipe, backend=cell.backend, seed=cell.seed, **settings)
    if run.row_params:
        from ppl_lvm.fit import refit

        kept = {name: settings[name] for name in ("missing", "compile", "progress_bar") if name in settings}
        on_held_out = refit(run, dataset.test, **kept)
        names = ", ".join(sorted(run.row_params))
        said = f"held-out rows: {names} fitted anew to them, all other parameters frozen"
        run = replace(
            on_held_out, recipe=run.recipe, history=run.history, seconds=run.seconds, messages=[*run.messages, said]
        )
    metrics = report.measure(run, dataset, draws=cell.draws, seed=cell.seed)
    if cell.folder is not None:
        report.write(run, dataset, cell.folder, metrics=metrics)
    return Outcome(metrics, tuple(run.messages))


def fit_quietly(cell: Cell) -> Outcome:
    """`fit_cell` without a progress bar, for processes that share a terminal."""
    return fit_cell(cell, progress_bar=False)


def _stamp(data: str) -> tuple[str, int] | None:
    """Which file the data are from, and of when."""
    for path in (Path(data), Path(data.rpartition(":")[0])):
        if path.is_file():
            return str(path.resolve()), path.stat().st_mtime_ns
    return None


@functools.lru_cache(maxsize=1)
def _load(data: str, missing: bool, stamp: tuple[str, int] | None) -> Dataset:
    """The data, kept for the cells that follow; `stamp` tells files of one name apart."""
    return load(data, missing=missing)
