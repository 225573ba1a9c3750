"""Fits side by side: one line for all seeds of a cell, and its paired difference from the first line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_lvm.report import Metrics, difference, plain

if TYPE_CHECKING:
    from rich.table import Table

FILES = ("comparison.csv", "comparison.json")


@dataclass(frozen=True)
class Line:
    """The fits that differ in their seed alone, and the errors of those that failed, by seed."""

    program: str
    backend: str
    recipe: str
    guide: str | None
    fits: tuple[Metrics, ...]
    errors: Mapping[int, str]

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.program, self.backend, self.recipe, self.guide)))

    @property
    def measured(self) -> dict[int, Metrics]:
        """The fits that have a held-out log-likelihood, by seed."""
        return {fit.seed: fit for fit in self.fits if fit.row_log_likelihood is not None}


@dataclass(frozen=True)
class Figure:
    """A mean over seeds in nats per row; its standard error is over seeds, or over rows where there is one seed."""

    mean: float
    standard_error: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float], of_one: float) -> Figure | None:
        """The mean of a value per seed, `std(values) / sqrt(S)` its standard error; `of_one` where S is 1."""
        if not values:
            return None
        spread = of_one if len(values) == 1 else float(np.std(values, ddof=1) / math.sqrt(len(values)))
        return cls(float(np.mean(values)), spread, len(values))


def log_likelihood(line: Line) -> Figure | None:
    """Held-out log-likelihood per row; None where no fit has one.

    Over seeds the rows stay the same, so its standard error is that of training and says nothing of other rows.
    """
    fits = list(line.measured.values())
    values = [fit.log_likelihood for fit in fits if fit.log_likelihood is not None]
    of_one = fits[0].standard_error if fits else None
    return Figure.of(values, math.nan if of_one is None else of_one)


def paired(first: Line, second: Line) -> Figure | None:
    """`second - first`, paired by row and by seed, over the seeds that both have; None if there are none.

    Raises:
        DataError: the two were not measured on the same rows.
    """
    shared = [seed for seed in second.measured if seed in first.measured]
    found = [difference(first.measured[seed], second.measured[seed]) for seed in shared]
    return Figure.of([one.mean for one in found], found[0].standard_error if found else math.nan)


def base(lines: Sequence[Line]) -> Line | None:
    """The first line with a figure, from which differences are taken."""
    return next((line for line in lines if line.measured), None)


def rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One dictionary of plain values per line, as comparison.json has them."""
    first = base(lines)
    found = []
    for line in lines:
        own, apart = log_likelihood(line), None if first is None or line is first else paired(first, line)
        units = [fit.active_units or {} for fit in line.fits]
        found.append(
            {
                "program": line.program,
                "data": next((fit.data for fit in line.fits), None),
                "backend": line.backend,
                "recipe": line.recipe,
                "guide": line.guide,
                "seeds": [fit.seed for fit in line.fits],
                "log_likelihood": None if own is None else own.mean,
                "standard_error": None if own is None else own.standard_error,
                "standard_error_over": None if own is None else "rows" if own.seeds == 1 else "seeds",
                "log_likelihood_of_seed": {seed: fit.log_likelihood for seed, fit in line.measured.items()},
                "difference_from": None if apart is None or first is None else first.label,
                "difference": None if apart is None else apart.mean,
                "difference_standard_error": None if apart is None else apart.standard_error,
                "difference_seeds": None if apart is None else apart.seeds,
                "draws": next((fit.draws for fit in line.fits), None),
                "active_units": {site: float(np.mean([u[site] for u in units])) for site in (units or [{}])[0]},
                "hard_loss": float(np.mean(hard)) if (hard := _of_hard(line)) else None,
                "seconds": float(np.mean([fit.seconds for fit in line.fits])) if line.fits else None,
                "errors": dict(line.errors),
            }
        )
    return found


def table(lines: Sequence[Line]) -> Table:
    """One line per cell, for rich to print; a dash is for what a line lacks, and errors are below."""
    from rich.table import Table
    from rich.text import Text

    first = base(lines)
    about = {f"{fit.data}, {fit.draws:,} importance draws" for line in lines for fit in line.fits}
    seeds = max((len(line.fits) for line in lines), default=0)
    result = Table(title=f"Held-out log-likelihood in nats per row: {', '.join(sorted(about))}" if about else None)
    named = [name for name in ("program", "backend", "recipe", "guide") if any(getattr(line, name) for line in lines)]
    if len({line.program for line in lines}) == 1:
        named.remove("program")
    for name in named:
        result.add_column(name, overflow="fold")
    relaxed = any(_of_hard(line) for line in lines)
    of_hard = ("hard loss",) if relaxed else ()
    for heading in ("seeds", "mean", "error", "difference", "error", "active units", *of_hard, "seconds"):
        result.add_column(heading, justify="right")
    for line, row in zip(lines, rows(lines), strict=True):
        units = {site: f"{count:g}" for site, count in row["active_units"].items()}
        cells = [
            str(len(line.fits)),
            _figure(row["log_likelihood"]) if line.fits else "failed",
            _figure(row["standard_error"]),
            _figure(row["difference"], "+"),
            _figure(row["difference_standard_error"]),
            ", ".join(f"{s} {n}" for s, n in units.items()) if len(units) > 1 else next(iter(units.values()), "-"),
            *((_figure(row["hard_loss"]),) if relaxed else ()),
            "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
        ]
        result.add_row(*(getattr(line, name) or "-" for name in named), *cells)
    notes = []
    if first is not None:
        over = "seeds, or held-out rows where there is one seed" if seeds > 1 else "held-out rows"
        apart = f" Differences are from {first.label}, paired by row." if len(lines) > 1 else ""
        notes.append(f"Standard errors are over {over}.{apart}")
    if relaxed:
        notes.append("Hard loss: of fits with relaxed values, their objective under hard draws, in nats per row.")
    notes += [
        f"{line.label}: no {name.replace('_', ' ')}: {why}"
        for line in lines
        for name, why in {k: v for fit in line.fits for k, v in fit.lacks.items()}.items()
    ]
    notes += [f"failed: {line.label}, seed {seed}: {error}" for line in lines for seed, error in line.errors.items()]
    result.caption, result.caption_justify = Text("\n".join(notes)), "left"
    return result


def write(lines: Sequence[Line], folder: Path) -> None:
    """Writes the table as comparison.json, and as comparison.csv without the lists of seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    found = plain(rows(lines))
    (folder / "comparison.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    with (folder / "comparison.csv").open("w", newline="") as file:
        flat = [
            row
            | {
                "seeds": len(row["seeds"]),
                "active_units": " ".join(f"{site}={count:g}" for site, count in row["active_units"].items()),
                "errors": " ".join(f"seed {seed}: {error}" for seed, error in row["errors"].items()),
            }
            for row in found
        ]
        names = [name for name in flat[0] if name != "log_likelihood_of_seed"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)


def _of_hard(line: Line) -> list[float]:
    return [fit.hard_loss for fit in line.fits if fit.hard_loss is not None]


def _figure(value: float | None, sign: str = "") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{sign}.3f}"
