"""What a fit amounts to: held-out figures, tables that compare fits, and a folder with draws and pictures."""

import csv
import json
import math
import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ppl_lvm import saving, store
from ppl_lvm.datasets import Dataset
from ppl_lvm.errors import DataError, PplLvmError, StorageError
from ppl_lvm.to_arviz import PosteriorDraws, attribute, versions

if TYPE_CHECKING:
    from rich.table import Table
    from xarray import DataTree

FORMAT = "ppl_lvm run 1"
FIT = "fit"
"""The fit itself, as `run.save` writes it."""
FILES = (
    "metrics.json",
    "posterior.nc",
    FIT,
    "history.csv",
    "validation.csv",
    "hard.csv",
    "held_out.csv",
    "history.png",
    "reconstructions.png",
    "samples.png",
    "latent.png",
)
SHOWN, PREDICTIVE_DRAWS, POSTERIOR_DRAWS = 16, 200, 200


class Program(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def options(self) -> tuple[tuple[str, Any], ...]: ...
    @property
    def source_hash(self) -> str: ...


class Recipe(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def guide(self) -> object: ...
    def to_dict(self) -> dict[str, Any]: ...


class LogLikelihood(Protocol):
    @property
    def values(self) -> np.ndarray: ...
    @property
    def mean(self) -> float: ...
    @property
    def se(self) -> float: ...


class Run(Protocol):
    """What is read of a fit."""

    @property
    def program(self) -> Program: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def backend(self) -> str: ...
    @property
    def history(self) -> Mapping[str, np.ndarray]: ...
    @property
    def seconds(self) -> float: ...
    @property
    def lacks(self) -> Mapping[str, str]: ...
    @property
    def messages(self) -> Sequence[str]: ...
    @property
    def row_params(self) -> Collection[str]: ...

    def save(self, path: Path) -> None: ...

    def log_likelihood(self, data: np.ndarray | None, draws: int = ..., seed: int = ...) -> LogLikelihood: ...
    def posterior(self, draws: int, data: np.ndarray | None = ..., seed: int = ...) -> PosteriorDraws: ...
    def to_arviz(
        self, draws: int, data: np.ndarray | None = ..., seed: int = ..., *, predictive: int | None = ...
    ) -> "DataTree": ...
    def predictive(
        self, draws: int, data: np.ndarray | None = ..., seed: int = ...
    ) -> Mapping[str, np.ndarray]: ...
    def prior_predictive(self, rows: int, seed: int = ...) -> Mapping[str, np.ndarray]: ...
    def active_units(
        self, threshold: float = ..., draws: int = ..., data: np.ndarray | None = ...
    ) -> Mapping[str, int]: ...


@dataclass(frozen=True, eq=False)
class Metrics:
    """Held-out figures of one fit; log-likelihoods are in nats per row, estimated from `draws` draws each.

    A fit by a method may lack some; they are None then, and `lacks` says why.
    """

    program: str
    backend: str
    recipe: str
    data: str
    seed: int
    draws: int
    log_likelihood: float | None
    standard_error: float | None
    row_log_likelihood: np.ndarray | None
    active_units: Mapping[str, int] | None
    seconds: float
    lacks: Mapping[str, str] = field(default_factory=dict)
    guide: str | None = None
    """The family that wrote the guide; None: the program's own."""
    hard_loss: float | None = None
    """Of a fit with relaxed values, its objective's last loss per row under hard draws (the other figures are under
    hard draws too)."""


def measure(run: Run, dataset: Dataset, *, draws: int = 5000, seed: int = 0) -> Metrics:
    """Held-out log-likelihood per row, `log (1/K) sum_k w_k` with K = `draws`, and active units over those rows.

    Active units are not counted for sequences that differ in length: those of steps that were padded have no data.
    `seed` is that of the fit; the importance draws use it too. A fit with parameters of rows (`refit` to the held-out
    rows) is asked for its own.

    Source: Burda, Grosse, Salakhutdinov (2015), arXiv:1509.00519, section 5 and appendix C.
    """
    rows = _rows(run, dataset)
    held_out = None if "log_likelihood" in run.lacks else run.log_likelihood(rows, draws=draws, seed=seed)
    # As many draws of the same rows as `write` takes, so that nothing is compiled for them alone.
    known = not dataset.ragged and "new_rows" not in run.lacks
    active = run.active_units(draws=POSTERIOR_DRAWS, data=rows) if known else {} if dataset.ragged else None
    return Metrics(
        program=run.program.name,
        backend=run.backend,
        recipe=run.recipe.name,
        data=dataset.name,
        seed=seed,
        draws=draws,
        log_likelihood=None if held_out is None else float(held_out.mean),
        standard_error=None if held_out is None else float(held_out.se),
        row_log_likelihood=None if held_out is None else np.asarray(held_out.values, dtype=np.float64),
        active_units=None if active is None else {site: int(units) for site, units in active.items()},
        seconds=float(run.seconds),
        lacks={name: run.lacks[name] for name in ("log_likelihood", "new_rows") if name in run.lacks},
        guide=None if run.recipe.guide is None else type(run.recipe.guide).__name__,
        hard_loss=float(run.history["hard_loss"][-1]) if "hard_loss" in run.history else None,
    )


@dataclass(frozen=True)
class Difference:
    """Held-out log-likelihood per row of `second` minus that of `first`, in nats, paired by row."""

    backend: str
    seed: int
    first: str
    second: str
    mean: float
    standard_error: float


def difference(first: Metrics, second: Metrics) -> Difference:
    """Mean over rows of `second - first`, and its standard error `std(second - first) / sqrt(rows)`.

    Pairing takes out what makes a row hard for both, so small differences show.

    Raises:
        DataError: the two were not measured on the same rows.
    """
    if first.row_log_likelihood is None or second.row_log_likelihood is None:
        lacking = first if first.row_log_likelihood is None else second
        raise DataError(
            f"A paired difference needs two held-out log-likelihoods, and {lacking.recipe!r} has none: "
            f"{lacking.lacks.get('log_likelihood')}."
        )
    sizes = len(first.row_log_likelihood), len(second.row_log_likelihood)
    if first.data != second.data or sizes[0] != sizes[1]:
        raise DataError(
            f"A paired difference needs the same held-out rows, found {sizes[0]} rows of {first.data!r} and "
            f"{sizes[1]} of {second.data!r}."
        )
    rows = second.row_log_likelihood - first.row_log_likelihood
    spread = float(rows.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else math.nan
    return Difference(second.backend, second.seed, first.recipe, second.recipe, float(rows.mean()), spread)


def differences(rows: Iterable[Metrics]) -> list[Difference]:
    """The difference of every fit from the first one of the same backend and seed, of those that have the figure."""
    first: dict[tuple[str, int], Metrics] = {}
    return [
        difference(base, row)
        for row in rows
        if row.row_log_likelihood is not None
        and (base := first.setdefault((row.backend, row.seed), row)) is not row
    ]


def table(rows: Iterable[Metrics]) -> "Table":
    """One line per fit, for rich to print; a dash and a note below stand for what a fit lacks."""
    from rich.table import Table

    rows = list(rows)
    about = ", ".join(
        dict.fromkeys(f"{row.program} on {row.data}, {row.draws:,} importance draws" for row in rows)
    )
    result = Table(title=f"Held-out log-likelihood: {about}" if rows else None)
    for heading in ("backend", "recipe"):
        result.add_column(heading, no_wrap=True)
    for heading in ("seed", "nats per row", "standard error", "active units", "seconds"):
        result.add_column(heading, justify="right")
    for row in rows:
        units = row.active_units or {}
        result.add_row(
            row.backend,
            row.recipe,
            str(row.seed),
            _figure(row.log_likelihood),
            _figure(row.standard_error),
            ", ".join(f"{site} {count}" for site, count in units.items()) if len(units) > 1 else _only(units),
            f"{row.seconds:.1f}",
        )
    notes = dict.fromkeys(f"- {row.recipe}, no {name}: {why}" for row in rows for name, why in row.lacks.items())
    if notes:
        result.caption, result.caption_justify = "\n".join(notes), "left"
    return result


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def difference_table(rows: Iterable[Difference]) -> "Table":
    """One line per pair of recipes, backend and seed, for rich to print."""
    from rich.table import Table

    result = Table(title="Paired differences of held-out log-likelihood")
    for heading in ("backend", "recipes"):
        result.add_column(heading, no_wrap=True)
    for heading in ("seed", "nats per row", "standard error", "in standard errors"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.backend,
            f"{row.second} - {row.first}",
            str(row.seed),
            f"{row.mean:+.3f}",
            f"{row.standard_error:.3f}",
            f"{row.mean / row.standard_error:+.1f}" if row.standard_error > 0 else "-",
        )
    return result


def check_folder(out: Path) -> None:
    """Check, before anything is fitted, that a run may be written to `out`.

    Raises:
        PplLvmError: `out` is a file, or a folder that holds anything but an earlier run.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise PplLvmError(f"A run is a folder, but {str(out)!r} is a file; give another name.")
    foreign = sorted({entry.name for entry in out.iterdir()} - {*FILES}) + store.foreign(out / FIT)
    if foreign:
        raise PplLvmError(
            f"The folder {str(out)!r} holds {foreign[0]!r}, which no run wrote, and a run replaces the "
            "whole folder; give another name, or move your files out of it."
        )
    metrics = out / "metrics.json"
    if any(out.iterdir()) and not (
        metrics.is_file() and f'"{FORMAT}"' in metrics.read_text(errors="replace")
    ):
        raise PplLvmError(
            f"The folder {str(out)!r} is no run folder: it has no metrics.json of format {FORMAT!r}; give "
            "another name."
        )


def write(
    run: Run,
    dataset: Dataset,
    out: Path,
    *,
    draws: int = 5000,
    posterior_draws: int = POSTERIOR_DRAWS,
    seed: int = 0,
    metrics: Metrics | None = None,
) -> Path:
    """Write a run folder and return its path; an earlier run of that name is replaced once all is written.

    posterior.nc holds `posterior_draws` draws for the held-out rows (ArviZ DataTree), metrics.json the
    figures with the recipe, the fit's messages and versions, held_out.csv the log-likelihood of each held-out row,
    history.csv the losses, validation.csv those of validation rows, hard.csv those under hard draws of a fit with
    relaxed ones, and `fit` the fit itself, which `ppl_lvm.load` and `starting` read. Pictures:
    history.png; latent.png for a program with latents per row; reconstructions.png and samples.png for data with an
    `image_shape`. What was left out is in metrics.json, `left_out`, with the reason.
    `metrics` saves measuring again.

    Raises:
        PplLvmError: `out` exists and is no run folder.
    """
    out = Path(out).resolve()
    check_folder(out)
    metrics = metrics or measure(run, dataset, draws=draws, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    fresh, old = (out.with_name(f".{out.name}.{mark}.{part}") for part in ("new", "old"))
    fresh.mkdir()
    try:
        _fill(fresh, run, dataset, metrics, posterior_draws)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    return out


def starting(folder: Path) -> dict[str, np.ndarray]:
    """The parameters of a saved fit, or of the one in a run folder, by name, for `fit(..., start=)`.

    Parameters of rows are left out: they are those of other rows.

    Raises:
        DataError: the folder holds none.
    """
    try:
        found = store.read(folder if store.exists(folder) else Path(folder) / FIT, saving.KIND)
    except StorageError as error:
        raise DataError(
            f"{str(folder)!r} cannot be started from ({str(error).rstrip('.')}); give a run folder, as `ppl-lvm fit` "
            f"writes it, or one of run.save."
        ) from error
    of_rows = found.content.get("row_params", [])
    return {name: array for name, array in found.arrays.get(saving.PARAMS, {}).items() if name not in of_rows}


def left_out(folder: Path) -> list[str]:
    """What a run folder lacks, with the reason: a line for each."""
    about = json.loads((Path(folder) / "metrics.json").read_text())
    return [f"{name}: left out, as {why}" for name, why in about["left_out"].items()]


def plain(value: object) -> Any:
    """A value as JSON can say it: tuples and arrays become lists, numbers that are not finite null.

    Example:
        >>> plain({"rows": np.arange(2), "loss": float("nan"), "data": Path("a.csv")})
        {'rows': [0, 1], 'loss': None, 'data': 'a.csv'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _rows(run: Run, dataset: Dataset) -> np.ndarray | None:
    """The held-out rows; None where a fit has parameters of rows, which are then those of the held-out rows."""
    return None if run.row_params else dataset.test


def _only(units: Mapping[str, int]) -> str:
    return str(next(iter(units.values()), "-"))


def _fill(folder: Path, run: Run, dataset: Dataset, metrics: Metrics, posterior_draws: int) -> None:
    from ppl_lvm import pictures

    # A method has a posterior for the rows that it was fitted to and may have none for others: those are shown then.
    if "new_rows" in run.lacks:
        dataset = replace(dataset, test=dataset.train, test_labels=dataset.train_labels)
    held_out = _rows(run, dataset)
    posterior = run.posterior(posterior_draws, data=held_out, seed=metrics.seed)
    tree = run.to_arviz(posterior_draws, held_out, metrics.seed, predictive=0)
    figures = {field: value for field, value in vars(metrics).items() if field != "row_log_likelihood"}
    left_out = {
        "history.png": pictures.losses(folder / "history.png", run.history),
        "latent.png": pictures.latent(folder / "latent.png", posterior, dataset),
    }
    if dataset.image_shape is None:
        left_out |= dict.fromkeys(("reconstructions.png", "samples.png"), "the rows of the data are no images")
    else:
        few = held_out if held_out is None or "new_rows" in run.lacks else held_out[:SHOWN]
        predicted = run.predictive(PREDICTIVE_DRAWS, data=few, seed=metrics.seed)
        predicted = {site: value[:, :SHOWN] for site, value in predicted.items()}
        prior = run.prior_predictive(64, seed=metrics.seed)
        left_out |= {
            "reconstructions.png": pictures.reconstructions(folder / "reconstructions.png", predicted, dataset),
            "samples.png": pictures.samples(folder / "samples.png", prior, dataset),
        }
    about = {
        "format": FORMAT,
        **figures,
        "rows": len(dataset.test),
        "program_options": dict(run.program.options),
        "program_hash": run.program.source_hash,
        "resolved_recipe": run.recipe.to_dict(),
        "messages": list(run.messages),
        "left_out": {name: why for name, why in left_out.items() if why is not None},
        "versions": versions(),
    }
    tree.attrs |= {name: attribute(value) for name, value in plain(about).items()}
    tree.to_netcdf(folder / "posterior.nc", engine="h5netcdf")
    (folder / "metrics.json").write_text(json.dumps(plain(about), indent=2, allow_nan=False) + "\n")
    steps = max((len(values) for values in run.history.values()), default=0)
    of_steps = {name: values for name, values in run.history.items() if len(values) == steps}
    _write_csv(folder / "history.csv", of_steps)
    if "validation" in run.history:
        of_checks = {"step": run.history["validation_step"], "loss": run.history["validation"]}
        _write_csv(folder / "validation.csv", of_checks)
    if "hard_loss" in run.history:
        of_checks = {"step": run.history["hard_step"], "loss": run.history["hard_loss"]}
        _write_csv(folder / "hard.csv", of_checks)
    run.save(folder / FIT)
    if metrics.row_log_likelihood is not None:
        of_rows = {"row": np.arange(len(metrics.row_log_likelihood)), "log_likelihood": metrics.row_log_likelihood}
        _write_csv(folder / "held_out.csv", of_rows)


def _write_csv(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True))
