"""The command line: `ppl-lvm fit`, `resume`, `evaluate`, `compare`, `demo`, `list` and `show`."""

import contextlib
import importlib.util
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

# The rest is imported by the command that needs it, so that `--help` answers at once.
from ppl_lvm.errors import BackendError, PplLvmError

if TYPE_CHECKING:
    from rich.table import Table

    from ppl_lvm.cells import Cell, Command, Outcome
    from ppl_lvm.comparison import Line
    from ppl_lvm.errors import Interrupted
    from ppl_lvm.jobs import Failed

BACKENDS = ("pyro", "numpyro")
DEMO_RECIPES = ("elbo", "iwae")
DEMO_STEPS = 1000
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


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
    matrix = "matrix"


class Missing(StrEnum):
    """What becomes of missing entries."""

    mask = "mask"


class Dtype(StrEnum):
    """Precision of a fit."""

    float32 = "float32"
    float64 = "float64"


class Compile(StrEnum):
    """How steps are run."""

    auto = "auto"
    compiled = "compiled"
    eager = "eager"
    graph = "graph"


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
    typer.Option(
        "--data", help="Name of a data set, a .npy, .npz, .csv or .parquet file, module:function or path.py:function."
    ),
]
BackendOption = Annotated[str | None, typer.Option("--backend", help="pyro or numpyro.", show_default="the engine's")]
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
ValidationOption = Annotated[
    str | None,
    typer.Option(
        "--validation",
        metavar="FRACTION|own",
        help="Fraction of the rows to fit that the loss is followed on, or own: those the data set comes with.",
    ),
]
MissingOption = Annotated[
    Missing | None, typer.Option("--missing", help="mask: entries that are NaN are left out of the bound.")
]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="Precision.", show_default="float32")]
CompileOption = Annotated[
    Compile | None, typer.Option("--compile", help="How steps are run; graph is Pyro's.", show_default="auto")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, gpu or cuda:1.", show_default="the library's default")
]
PlateOption = Annotated[
    str | None,
    typer.Option("--data-plate", metavar="NAME", help="Plate of the rows, where the program leaves it open; or none."),
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
        list[str] | None,
        typer.Option(
            help="Name of a recipe, or a path ending in .toml; several are run as stages, in order.",
            show_default="the program's own",
        ),
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            metavar="FAMILY",
            help="Family that writes the guide from the model; own: the program's.",
            show_default="the recipe's",
        ),
    ] = None,
    backend: BackendOption = None,
    overrides: RecipeOptions = None,
    options: ProgramOptions = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fit.")] = 0,
    draws: DrawsOption = 5000,
    validation: ValidationOption = None,
    missing: MissingOption = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Run folder, or one of run.save, whose parameters the fit starts from."),
    ] = None,
    dtype: DtypeOption = None,
    compile: CompileOption = None,
    device: DeviceOption = None,
    data_plate: PlateOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder.", show_default="runs/, named by program, backend, recipe, guide, seed"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to keep how far the fit is, for `ppl-lvm resume FOLDER`."),
    ] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two checkpoints.", show_default="about a minute")
    ] = None,
) -> None:
    """Fit a program to data, print its held-out log-likelihood, and write a run folder."""
    from ppl_lvm.cells import Command

    words = {"missing": missing, "dtype": dtype, "compile": compile, "start": start, "out": out}
    asked = Command(
        **{name: None if word is None else str(word) for name, word in words.items()},
        where=str(Path.cwd()),
        program=program,
        data=data,
        recipe=recipe,
        guide=guide,
        backend=backend,
        overrides=overrides,
        options=options,
        seed=seed,
        draws=draws,
        validation=validation,
        device=device,
        data_plate=data_plate,
        every=every,
    )
    _fit(asked, checkpoint)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What --checkpoint of the fit was given.")],
) -> None:
    """Go on with a fit that was ended, from its last checkpoint: to the same result as if it had not been."""
    from ppl_lvm.cells import Command
    from ppl_lvm.checkpoint import newest

    held = newest(folder)
    if held is None:
        raise PplLvmError(f"There is no checkpoint in {str(folder)!r}; `ppl-lvm fit ... --checkpoint` writes them.")
    if held.content.command is None:
        raise PplLvmError(
            f"The checkpoint in {str(folder)!r} was written from Python; the same call of fit goes on from it."
        )
    asked, folder = Command.of(held.content.command), folder.resolve()
    # Paths start from the folder where the fit began.
    with contextlib.chdir(asked.where) if Path(asked.where).is_dir() else contextlib.nullcontext():
        _fit(asked, folder)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Run folder, or one of run.save.")],
    data: DataOption = "digits",
    program: Annotated[
        str | None, typer.Option(help="The program's file, where it is one of yours; nothing is run unasked.")
    ] = None,
    backend: BackendOption = None,
    draws: DrawsOption = 5000,
) -> None:
    """Load a fit, and print the log-likelihood of the held-out rows of a data set."""
    from ppl_lvm import datasets, loading, report, store

    run = loading.load(
        folder if store.exists(folder) else folder / report.FIT,
        program=program,
        backend=None if backend is None else _usable(backend),
    )
    found = report.measure(run, datasets.load(data, missing=run.masked), draws=draws, seed=run.seed)
    _print(report.table([found]))


@app.command()
def compare(
    programs: Annotated[
        str, typer.Argument(metavar="PROGRAM[,PROGRAM...]", help="Programs, by name or path, separated by commas.")
    ],
    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas.")] = "elbo,iwae",
    backends: Annotated[
        str | None, typer.Option(help="Backends, separated by commas.", show_default="all that are installed")
    ] = None,
    guides: Annotated[
        str | None,
        typer.Option(
            help="Families of guides, separated by commas; own: the program's guide.", show_default="the recipes'"
        ),
    ] = None,
    data: DataOption = "digits",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")] = 1,
    overrides: RecipeOptions = None,
    options: ProgramOptions = None,
    draws: DrawsOption = 5000,
    validation: ValidationOption = None,
    missing: MissingOption = None,
    dtype: DtypeOption = None,
    compile: CompileOption = None,
    device: DeviceOption = None,
    data_plate: PlateOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes to fit in, with one thread each if more than one.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for run folders and for the table, as .csv and .json.", show_default="none"),
    ] = None,
) -> None:
    """Fit every combination of programs, backends, recipes, guides and seeds, and compare held-out rows.

    A fit that fails is in the table with its error, the others go on, and the exit code is 1.
    """
    from ppl_lvm import comparison
    from ppl_lvm.cells import Cell

    settings = _settings(validation, missing, dtype, compile, device, data_plate)
    changed = _pairs(options, "--option"), _pairs(overrides, "--set")
    cells = [
        Cell(program, data, (recipe,), guide, backend, seed, *changed, settings, draws)
        for program in _names(programs, "PROGRAM")
        for backend in ([_usable(name) for name in _names(backends, "--backends")] if backends else _installed())
        for recipe in _names(recipes, "--recipes")
        for guide in (_names(guides, "--guides") if guides else [None])
        for seed in range(seeds)
    ]
    lines = _fit_all(cells, jobs, out)
    _print(comparison.table(lines))
    if out is not None:
        comparison.write(lines, out)
        typer.echo(f"Wrote the runs and {' and '.join(comparison.FILES)} to {out}")
    if any(line.errors for line in lines):
        raise typer.Exit(1)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each fit.")] = DEMO_STEPS,
    draws: DrawsOption = 5000,
    out: Annotated[Path, typer.Option(help="Folder to write run folders to.")] = Path("runs/demo"),
) -> None:
    """Fit a variational autoencoder to handwritten digits, with two recipes on every installed backend."""
    from ppl_lvm import report
    from ppl_lvm.cells import Cell

    began = time.perf_counter()
    where = _installed()
    for missing in sorted({*BACKENDS} - {*where}):
        typer.echo(f"The backend {missing} is not installed and left out.", err=True)
    lines = _fit_all(
        [
            Cell("vae", "digits", (recipe,), None, backend, 0, {}, {"steps": steps}, {}, draws)
            for backend in where
            for recipe in DEMO_RECIPES
        ],
        1,
        out,
    )
    found = [fitted for line in lines for fitted in line.fits]
    _print(report.table(found))
    for gain in report.differences(found):
        typer.echo(
            f"On {gain.backend}, {gain.second} is {gain.mean:+.2f} nats per held-out row from {gain.first} "
            f"(paired, standard error {gain.standard_error:.2f})."
        )
    for fitted in found:
        typer.echo(f"Wrote {out / f'{fitted.backend}-{fitted.recipe}'}")
    typer.echo(f"Took {time.perf_counter() - began:.0f} seconds.")
    if any(line.errors for line in lines):
        raise typer.Exit(1)


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
    name: Annotated[
        str | None, typer.Argument(help="Its name, or its path where it is a file of yours; the matrix has none.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="Of the matrix, one objective.")] = None,
    estimator: Annotated[str | None, typer.Option(help="Of the matrix, one estimator.")] = None,
) -> None:
    """Show one program, recipe, objective, estimator, guide, method or data set: what it is and its options.

    `matrix` is what becomes of every objective, estimator and kind of site: unbiased, biased (why), or refused (why,
    and what to use instead).
    """
    from ppl_lvm import listing, matrix

    if (name is None) != (kind is Thing.matrix):
        raise typer.BadParameter("the matrix has no name" if name else f"which {kind.value}? Give its name")
    if name is None:
        typer.echo(matrix.text(objective, estimator))
        return
    if objective or estimator:
        raise typer.BadParameter("--objective and --estimator are of `show matrix`")
    typer.echo(listing.describe(kind.value, name))


def _fit(asked: "Command", checkpoint: Path | None) -> None:
    from ppl_lvm import report
    from ppl_lvm.cells import Cell, fit_cell
    from ppl_lvm.checkpoint import Checkpoint
    from ppl_lvm.errors import Interrupted

    settings = _settings(
        asked.validation, asked.missing, asked.dtype, asked.compile, asked.device, asked.data_plate
    )
    if checkpoint is not None or asked.every is not None:
        keeper = Checkpoint.of(checkpoint, asked.every)
        keeper.command = asked.model_dump()
        settings["checkpoint"] = keeper
    cell = Cell(
        asked.program,
        asked.data,
        tuple(asked.recipe or ()),
        asked.guide,
        None if asked.backend is None else _usable(asked.backend),
        asked.seed,
        _pairs(asked.options, "--option"),
        _pairs(asked.overrides, "--set"),
        settings,
        asked.draws,
        None if asked.start is None else Path(asked.start),
    )
    chosen, how, _ = cell.loaded()
    parts = [chosen.name, cell.backend, how.name, cell.guide, str(cell.seed)]
    folder = Path(asked.out) if asked.out else Path("runs") / _joined(parts)
    report.check_folder(folder)
    if checkpoint is not None and folder.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise PplLvmError(
            f"--checkpoint {str(checkpoint)!r} is in the run folder {str(folder)!r}, which the run replaces when it is "
            f"written; give it a folder of its own."
        )
    try:
        outcome = fit_cell(replace(cell, folder=folder))
    except Interrupted as stop:
        raise _left(stop, checkpoint, folder) from None
    _print(report.table([outcome.metrics]))
    for message in (*outcome.messages, *report.left_out(folder)):
        typer.echo(message, err=True)
    typer.echo(f"Wrote {folder}")


def _left(stop: "Interrupted", checkpoint: Path | None, folder: Path) -> typer.Exit:
    """Says how a fit goes on that Ctrl-C ended; without a checkpoint the fit so far is saved."""
    if checkpoint is not None:
        typer.echo(f"{stop.where} `ppl-lvm resume {shlex.quote(str(checkpoint))}` goes on from there.", err=True)
        return typer.Exit(INTERRUPTED)
    so_far = folder.with_name(f"{folder.name}-interrupted")
    stop.fit.save(so_far)
    typer.echo(
        f"{stop.where} The fit so far is in {str(so_far)!r}, for ppl_lvm.load. With --checkpoint FOLDER a fit can go "
        f"on from where it was.",
        err=True,
    )
    return typer.Exit(INTERRUPTED)


def _settings(
    validation: str | None,
    missing: str | None,
    dtype: str | None,
    compile: str | None,
    device: str | None,
    data_plate: str | None,
) -> dict[str, Any]:
    """Arguments of `fit`, those alone that were given."""
    from ppl_lvm.cells import OWN

    fraction: str | float | None = validation
    if validation is not None and validation != OWN:
        try:
            fraction = float(validation)
        except ValueError:
            raise PplLvmError(
                f"--validation takes a fraction of the rows, as in 0.1, or {OWN}; found {validation!r}."
            ) from None
        if not 0.0 < fraction < 1.0:
            raise PplLvmError(f"--validation takes a fraction between 0 and 1, or {OWN}; found {validation}.")
    words = {"missing": missing, "dtype": dtype, "compile": compile}
    given: dict[str, Any] = {"validation": fraction, "device": device, "data_plate": data_plate}
    given |= {name: None if word is None else str(word) for name, word in words.items()}
    return {name: value for name, value in given.items() if value is not None}


def _fit_all(cells: "Sequence[Cell]", jobs: int, out: Path | None) -> "list[Line]":
    """Fits all, with run folders below `out`; one line for the cells that differ in their seed alone."""
    from ppl_lvm import report
    from ppl_lvm.cells import fit_cell, fit_quietly
    from ppl_lvm.comparison import Line
    from ppl_lvm.jobs import Failed, each

    found = [(program.name, recipe.name) for program, recipe, _ in (cell.loaded() for cell in cells)]
    several = len({name for name, _ in found}) > 1, len({cell.seed for cell in cells}) > 1
    keys: list[tuple[str, str, str, str | None]] = []
    placed: list[Cell] = []
    for (program, recipe), cell in zip(found, cells, strict=True):
        keys.append((program, cell.backend or "", recipe, cell.guide))
        parts = [program if several[0] else None, *keys[-1][1:], str(cell.seed) if several[1] else None]
        placed.append(replace(cell, folder=None if out is None else out / _joined(parts)))
    asked = [(*key, cell.seed) for key, cell in zip(keys, cells, strict=True)]
    if twice := next((fitted for fitted in asked if asked.count(fitted) > 1), None):
        raise PplLvmError(
            f"Programs and recipes are told apart by their names, but two are called {twice[0]!r} and {twice[2]!r}."
        )
    for cell in placed:
        if cell.folder is not None:
            report.check_folder(cell.folder)  # all of them before the first fit

    results: dict[int, Any] = {}
    with contextlib.closing(each(fit_cell if jobs == 1 else fit_quietly, placed, jobs)) as done:
        for number, result in done:
            results[number] = result
            name = f"{_joined(keys[number], ' ')}, seed {cells[number].seed}"
            typer.echo(f"[{len(results)}/{len(cells)}] {name}: {_said(result)}", err=True)
    lines = []
    for key in dict.fromkeys(keys):
        of_seed = {cells[i].seed: results[i] for i in range(len(cells)) if keys[i] == key}
        fits = tuple(result.metrics for result in of_seed.values() if not isinstance(result, Failed))
        errors = {seed: result.error for seed, result in of_seed.items() if isinstance(result, Failed)}
        lines.append(Line(*key, fits, errors))
    return lines


def _said(result: "Outcome | Failed") -> str:
    from ppl_lvm.jobs import Failed

    if isinstance(result, Failed):
        return "\n".join(filter(None, (f"failed: {result.error}", result.traceback)))
    value = result.metrics.log_likelihood
    figure = "no held-out figure" if value is None else f"{value:.3f} nats per held-out row"
    return "\n    ".join([figure, *result.messages])


def _joined(parts: Iterable[str | None], by: str = "-") -> str:
    """Names as one, for a folder; of stages all names."""
    return by.join(part.replace(", ", by) for part in parts if part)


def _print(table: "Table") -> None:
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    if not console.is_terminal:  # as wide as it needs in a file or a pipe
        console.width = max(
            console.width, Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        )
    console.print(table)


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
    """`key=value` arguments, values as TOML has them, and none; what is no TOML is text."""
    import tomllib

    pairs: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals):
            raise PplLvmError(f"{option} takes KEY=VALUE, as in {option} draws=50; found {text!r}.")
        if value == "none":  # as `show` writes it
            pairs[key] = None
            continue
        try:
            pairs[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            pairs[key] = value
    return pairs


if __name__ == "__main__":
    main()
