"""The command line: `ppl-lvm fit`, `compare`, `demo`, `list` and `show`."""

import importlib.util
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

# The rest is imported by the command that needs it, so that `--help` answers at once.
from ppl_lvm.errors import BackendError, PplLvmError

if TYPE_CHECKING:
    from rich.table import Table

    from ppl_lvm.datasets import Dataset
    from ppl_lvm.program import Program
    from ppl_lvm.recipe import Recipe
    from ppl_lvm.report import Metrics

BACKENDS = ("pyro", "numpyro")
DEMO_RECIPES = ("elbo", "iwae")
DEMO_STEPS = 1000


class Kind(StrEnum):
    """What there is to choose from."""

    programs = "programs"
    recipes = "recipes"
    objectives = "objectives"
    estimators = "estimators"
    methods = "methods"
    guides = "guides"
    datasets = "datasets"
    backends = "backends"


class Thing(StrEnum):
    """What can be shown one at a time."""

    program = "program"
    recipe = "recipe"
    objective = "objective"
    estimator = "estimator"
    method = "method"
    guide = "guide"
    dataset = "dataset"


class Group(TyperGroup):
    """Prints an error that ppl_lvm raised on purpose as one message, and leaves with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PplLvmError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Latent-variable models on Pyro and NumPyro: any program, any objective, any gradient estimator.",
)

ProgramArgument = Annotated[
    str, typer.Argument(metavar="PROGRAM", help="Name of a program, or a path ending in .py.")
]
DataOption = Annotated[
    str,
    typer.Option("--data", help="Name of a data set, a .npy, .npz, .csv or .parquet file, or module:function."),
]
ProgramOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the program, as in latent=8; repeatable."),
]
RecipeOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Option of the recipe, as in objective.draws=50; repeatable."
    ),
]
DrawsOption = Annotated[
    int, typer.Option("--draws", min=1, help="Importance draws per row for the held-out log-likelihood.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from ppl_lvm.report import versions

        for package, number in versions().items():
            typer.echo(f"{package} {number}")
        raise typer.Exit


@app.callback()
def _options(
    versions: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `ppl-lvm`."""
    app(prog_name="ppl-lvm")


@app.command()
def fit(
    program: ProgramArgument,
    data: DataOption = "digits",
    recipe: Annotated[
        str | None,
        typer.Option(help="Name of a recipe, or a path ending in .toml.", show_default="the program's own"),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="pyro or numpyro.", show_default="the engine's choice")
    ] = None,
    overrides: RecipeOptions = None,
    options: ProgramOptions = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fit.")] = 0,
    draws: DrawsOption = 5000,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder.", show_default="runs/, named by program, backend, recipe, seed"),
    ] = None,
) -> None:
    """Fit a program to data, print its held-out log-likelihood, and write a run folder."""
    from ppl_lvm import report

    chosen, (how,) = _choose(program, options, [recipe], overrides)
    where = None if backend is None else _usable(backend)
    name = "-".join([chosen.name, *([where] if where else []), how.name, str(seed)])
    folder = out or Path("runs") / name
    report.check_folder(folder)
    metrics = _fit(chosen, how, _load(data), where, seed, draws, folder)
    _print(report.table([metrics]))
    typer.echo(f"Wrote {folder}")


@app.command()
def compare(
    program: ProgramArgument,
    recipes: Annotated[
        str, typer.Option(help="Recipes, separated by commas; the others are compared with the first.")
    ] = "elbo,iwae",
    backends: Annotated[
        str | None, typer.Option(help="Backends, separated by commas.", show_default="all that are installed")
    ] = None,
    data: DataOption = "digits",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")] = 1,
    overrides: RecipeOptions = None,
    options: ProgramOptions = None,
    draws: DrawsOption = 5000,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write run folders to.", show_default="none are written")
    ] = None,
) -> None:
    """Fit a program with several recipes, backends and seeds, and compare held-out data row by row."""
    from ppl_lvm import report

    chosen, hows = _choose(program, options, _names(recipes, "--recipes"), overrides)
    where = _installed() if backends is None else [_usable(name) for name in _names(backends, "--backends")]
    found = _fit_all(chosen, hows, _load(data), where, range(seeds), draws, out)
    if compared := report.differences(found):
        _print(report.difference_table(compared))
    if out is not None:
        typer.echo(f"Wrote the runs to {out}")


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each fit.")] = DEMO_STEPS,
    draws: DrawsOption = 5000,
    out: Annotated[Path, typer.Option(help="Folder to write run folders to.")] = Path("runs/demo"),
) -> None:
    """Fit a variational autoencoder to handwritten digits, with two recipes on every installed backend."""
    from ppl_lvm import report

    began = time.perf_counter()
    chosen, hows = _choose("vae", None, DEMO_RECIPES, [f"steps={steps}"])
    where = _installed()
    for missing in sorted({*BACKENDS} - {*where}):
        typer.echo(f"The backend {missing} is not installed and left out.", err=True)
    found = _fit_all(chosen, hows, _load("digits"), where, [0], draws, out)
    for gain in report.differences(found):
        typer.echo(
            f"On {gain.backend}, {gain.second} is {gain.mean:+.2f} nats per held-out row from {gain.first} "
            f"(paired, standard error {gain.standard_error:.2f})."
        )
    for fitted in found:
        typer.echo(f"Wrote {out / f'{fitted.backend}-{fitted.recipe}'}")
    typer.echo(f"Took {time.perf_counter() - began:.0f} seconds.")


@app.command("list")
def list_(kind: Annotated[Kind | None, typer.Argument(help="All kinds if left out.")] = None) -> None:
    """List what can be named: one line each."""
    from ppl_lvm import listing

    for shown in [kind] if kind else Kind:
        entries = listing.entries(shown.value)
        if kind is None:
            typer.echo(f"{shown.value}:")
        width = max(map(len, entries), default=0)
        for name, line in entries.items():
            typer.echo(f"{'' if kind else '  '}{name:{width}}  {line}".rstrip())


@app.command()
def show(
    kind: Annotated[Thing, typer.Argument(help="What it is.")],
    name: Annotated[str, typer.Argument(help="Its name, or its path where it is a file of yours.")],
) -> None:
    """Show one program, recipe, objective, estimator, guide, method or data set: what it is and its options."""
    from ppl_lvm import listing

    typer.echo(listing.describe(kind.value, name))


def _choose(
    program: str, options: list[str] | None, recipes: Sequence[str | None], overrides: list[str] | None
) -> "tuple[Program, list[Recipe]]":
    from ppl_lvm.program import program as load_program
    from ppl_lvm.recipe import recipe as load_recipe

    chosen = load_program(program, **_pairs(options, "--option"))
    changes = _pairs(overrides, "--set")
    return chosen, [load_recipe(recipe or chosen.recipe, **changes) for recipe in recipes]


def _load(data: str) -> "Dataset":
    from ppl_lvm.datasets import load

    return load(data)


def _fit(
    program: "Program",
    recipe: "Recipe",
    dataset: "Dataset",
    backend: str | None,
    seed: int,
    draws: int,
    folder: Path | None,
) -> "Metrics":
    from ppl_lvm import report
    from ppl_lvm.fit import fit as fit_

    run = fit_(program, data=dataset.train, recipe=recipe, backend=backend, seed=seed)
    for message in run.messages:
        typer.echo(message, err=True)
    metrics = report.measure(run, dataset, draws=draws, seed=seed)
    if folder is not None:
        report.write(run, dataset, folder, metrics=metrics)
    return metrics


def _fit_all(
    program: "Program",
    recipes: "Sequence[Recipe]",
    dataset: "Dataset",
    backends: Sequence[str],
    seeds: Sequence[int],
    draws: int,
    out: Path | None,
) -> "list[Metrics]":
    """One fit per backend, seed and recipe, in this order, with run folders below `out`; prints their table."""
    from ppl_lvm import report

    names = [recipe.name for recipe in recipes]
    if len({*names}) < len(names):
        raise PplLvmError(f"Recipes are told apart by their names, but these were given: {', '.join(names)}.")
    cells = [(backend, seed, recipe) for backend in backends for seed in seeds for recipe in recipes]
    folders: list[Path | None] = [None] * len(cells)
    if out is not None:
        of_seed = [f"-{seed}" if len(seeds) > 1 else "" for _, seed, _ in cells]
        folders = [out / f"{cell[0]}-{cell[2].name}{end}" for cell, end in zip(cells, of_seed, strict=True)]
    for wanted in filter(None, folders):
        report.check_folder(wanted)  # all of them before the first fit
    found: list[Metrics] = []
    for (backend, seed, recipe), folder in zip(cells, folders, strict=True):
        what = f"{program.name} on {dataset.name}: {recipe.name} on {backend}, seed {seed}"
        typer.echo(f"[{len(found) + 1}/{len(cells)}] {what}", err=True)
        found.append(_fit(program, recipe, dataset, backend, seed, draws, folder))
        figure = found[-1].log_likelihood
        typer.echo("no held-out figure" if figure is None else f"{figure:.3f} nats per held-out row", err=True)
    _print(report.table(found))
    return found


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)


def _installed() -> list[str]:
    found = [name for name in BACKENDS if importlib.util.find_spec(name)]
    if not found:
        raise BackendError(
            "No backend is installed; run `pip install 'ppl_lvm[numpyro]'`, or [pyro], or [all]."
        )
    return found


def _usable(backend: str) -> str:
    from ppl_lvm import lookup

    if backend not in BACKENDS:
        raise BackendError(f"Unknown backend {backend!r}. {lookup.valid(backend, BACKENDS, 'Backends')}")
    if backend not in _installed():
        raise BackendError(
            f"The backend {backend!r} is not installed; run `pip install 'ppl_lvm[{backend}]'`."
        )
    return backend


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len({*names}) < len(names):
        raise PplLvmError(f"{option} takes different names, separated by commas; found {text!r}.")
    return names


def _pairs(texts: list[str] | None, option: str) -> dict[str, Any]:
    """`key=value` arguments, values as TOML has them; what is no TOML is text."""
    import tomllib

    pairs: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals):
            raise PplLvmError(f"{option} takes KEY=VALUE, as in {option} draws=50; found {text!r}.")
        try:
            pairs[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            pairs[key] = value
    return pairs
