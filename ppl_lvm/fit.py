"""The one training loop. Read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ppl_lvm import backends, legality, progress
from ppl_lvm.algorithm import Schedule
from ppl_lvm.backends.base import Call, numbers_of
from ppl_lvm.errors import DataError, LegalityError, PplLvmError, ProgramError, RecipeError
from ppl_lvm.posterior import Fit, State
from ppl_lvm.program import Program, backend_of
from ppl_lvm.program import program as load_program
from ppl_lvm.recipe import Recipe
from ppl_lvm.recipe import recipe as load_recipe
from ppl_lvm.sampled import Sampled, sample

CHUNK = 100
"""Steps between two looks at the loss: progress, non-finite values. Nothing is read from the device in between."""


def fit(
    model: Program | str | Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    data: object = None,
    recipe: Any = None,
    *,
    backend: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    progress_bar: bool | None = None,
    compile: str = "auto",
    data_plate: str | None = None,
    state: State | None = None,
    params: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Fit:
    """Fits a latent-variable program to data by the objective and the gradient estimators of a recipe, or its method.

    Args:
        model: a portable program (`program("vae", latent=8)` or its name), or a native model of Pyro or NumPyro.
        guide: the native model's guide or autoguide; None for recipes with a method, which need none.
        data: the program's arguments: an array, a tuple of arrays or a dict by name, whose first axis is rows.
        recipe: a name, a path to a TOML file, a mapping or a Recipe; None: the program's own.
        backend: "pyro" or "numpyro"; found from a native program, the first one installed for a portable one.
        seed: initial parameters, order of rows and noise are functions of it.
        dtype: "float32" or "float64".
        progress_bar: None shows one where the output is a terminal.
        compile: "auto", "compiled" or "eager", and on Pyro "graph" (traced, not compiled).
        data_plate: the plate of the rows where the program leaves it open; "none": the whole program is one row.
        state: of an earlier fit, to go on from to `steps` in all.
        params: parameters by name (`run.params` of another fit) that a method holds, or `map` starts from.
        **overrides: options of the recipe, `draws=50`, `learning_rate=1e-2`, `steps=100`.

    Rows are shuffled once per epoch and taken `batch_size` at a time; the last, smaller batch of an epoch is left out.

    Raises:
        RecipeError, ProgramError, DataError, LegalityError, BackendError: before training starts.
        PplLvmError: the loss is not finite; says at which step and at which sites.

    Example:
        >>> from ppl_lvm import fit, program
        >>> from ppl_lvm.datasets import load
        >>> run = fit(program("vae", latent=2), data=load("digits").train, recipe="elbo", steps=20)
        >>> run.history["loss"].shape
        (20,)
    """
    started = time.perf_counter()
    chosen = _program(model, guide)
    how = load_recipe(chosen.recipe if recipe is None else recipe, **overrides)
    if chosen.guide is None and how.method is None:
        raise ProgramError(
            f"Model {chosen.name!r} came without a guide, which recipe {how.name!r} needs; pass one, or an autoguide "
            f"of its library, or take a recipe with a method: map, laplace, nuts, svgd."
        )
    name = _backend(chosen, backend)
    if dtype not in ("float32", "float64"):
        raise DataError(f"dtype={dtype!r} was asked for; use 'float32' or 'float64'.")
    call = Call.of(data)
    rows = _rows(call)
    messages: list[str] = []

    library = backends.load(name)
    if how.objective is None:
        return _sample(library, chosen, how, call, rows, name, seed, dtype, data_plate, state, params, progress_bar)
    if params is not None:
        raise RecipeError(f"params= goes with a method, and recipe {how.name!r} has an objective; leave it out.")
    bound, example, batched = _bind(library, chosen, call, rows, how, seed, dtype, data_plate, messages)
    _check_support(bound, chosen, call, example)
    plan, notes = legality.plan(how.objective, how.estimator, bound.structure)
    messages += [f"estimator: {note}" for note in notes]
    trainer = library.Trainer(
        bound,
        plan,
        how.objective,
        how.optimizer,
        bound.batch(example),
        seed=seed,
        rows=rows if batched else None,
        steps=how.steps,
        mode=_mode(compile, state),
    )
    tree, step = _start(trainer, state, name, seed, how.steps)

    held = bound.batch(call)
    numbers = numbers_of(how.objective, plan, how.optimizer)
    losses: list[np.ndarray] = []
    with progress.bar(f"{chosen.name} · {how.name} · {name}", how.steps, step, progress_bar) as advance:
        while step < how.steps:
            n = min(CHUNK, how.steps - step)
            index = _index(rows, how.batch_size, seed, step, CHUNK) if batched else None
            values = {k: _values(v, step, CHUNK) for k, v in numbers.items()}
            tree, chunk = trainer.run(tree, held, index, values, step, n)
            losses.append(library.to_numpy(chunk).astype(np.float64))
            if not np.isfinite(losses[-1]).all():
                _stop(losses[-1], step, bound, trainer, tree, plan, held, index, library.key_of(seed))
            step += n
            advance(n, float(losses[-1][-1]))

    loss = np.concatenate(losses) if losses else np.zeros(0)
    constrained = bound.constrain(trainer.params(tree))
    return Fit(
        program=chosen,
        recipe=how,
        backend=name,
        seed=seed,
        params={n: library.to_numpy(v) for n, v in constrained.items()},
        history={"step": np.arange(how.steps - len(loss), how.steps), "loss": loss},
        seconds=time.perf_counter() - started,
        messages=messages + [note for note in trainer.notes if note not in messages],
        state=State(name, seed, step, trainer.mode, trainer.pack(tree)),
        _bound=bound,
        _trained=trainer.params(tree),
        _data=call,
    )


def _program(model: Program | str | Callable[..., Any], guide: Callable[..., Any] | None) -> Program:
    if isinstance(model, Program | str):
        if guide is not None:
            raise ProgramError(f"Program {model!r} brings its guide; pass a guide only beside a native model.")
        found = load_program(model)
    else:
        found = Program.from_callables(model, guide)
    return found


def _sample(
    library: Any,
    chosen: Program,
    how: Recipe,
    call: Call,
    rows: int | None,
    name: str,
    seed: int,
    dtype: str,
    data_plate: str | None,
    state: State | None,
    params: Mapping[str, Any] | None,
    progress_bar: bool | None,
) -> Sampled:
    """A recipe's method in place of the loop, on all rows."""
    if state is not None:
        raise RecipeError(f"state= was given, but recipe {how.name!r} has a method, which has no steps to go on from.")

    def bind(program: Program) -> Any:
        bound = library.Bound(program, call, seed=seed, dtype=dtype, data_plate=data_plate)
        _check_rows(bound, rows)
        _check_support(bound, program, call, call)
        return bound

    return sample(
        chosen,
        how,
        call,
        name,
        bind,
        seed=seed,
        params=params,
        progress=progress.wanted(progress_bar),
        messages=[],
    )


def _backend(chosen: Program, asked: str | None) -> str:
    if asked is not None:
        return asked
    if chosen.portable:
        available = backends.installed()
        if not available:
            raise ProgramError("No backend is installed; pip install 'ppl_lvm[numpyro]' or 'ppl_lvm[pyro]'.")
        return available[-1]
    found = backend_of(chosen.model, chosen.guide)
    if found is None:
        raise ProgramError(
            f"Cannot tell which library {chosen.name!r} is written for; pass backend='pyro' or 'numpyro'."
        )
    return found


def _rows(call: Call) -> int | None:
    """N, the length that all arguments share."""
    lengths = [np.shape(a)[0] if np.ndim(a) else None for a in call.leaves]
    if not lengths:
        return None
    if None in lengths or len(set(lengths)) > 1 or lengths[0] == 0:
        raise DataError(
            f"Data must be arrays that share their first axis, the rows, and have some; found shapes "
            f"{[np.shape(a) for a in call.leaves]}."
        )
    for a in call.leaves:
        if np.asarray(a).dtype.kind not in "fiub":
            raise DataError(f"Data must be numbers; found dtype {np.asarray(a).dtype}.")
        if np.asarray(a).dtype.kind == "f" and not np.isfinite(np.asarray(a)).all():
            raise DataError("Data hold NaN or infinite values; remove or impute them first.")
    return lengths[0]


def _bind(
    library: Any,
    chosen: Program,
    call: Call,
    rows: int | None,
    how: Recipe,
    seed: int,
    dtype: str,
    data_plate: str | None,
    messages: list[str],
) -> tuple[Any, Call, bool]:
    """The program bound to a batch's shape; whether the engine takes mini-batches."""

    def bind(example: Call) -> Any:
        return library.Bound(chosen, example, seed=seed, dtype=dtype, data_plate=data_plate)

    size = how.batch_size
    if rows is None or size is None or size >= rows:
        bound = bind(call)
        _check_rows(bound, rows)
        return bound, call, False
    example = call.map(lambda a: a[:size])
    try:
        bound = bind(example)
    except Exception:
        # A program that takes its own mini-batch may not run on fewer rows than it wants.
        bound = bind(call)
        if bound.structure.plate_size is None:
            raise
    plate = bound.structure.data_plate
    if plate is None or bound.structure.plate_size is not None:
        why = "has no data plate" if plate is None else f"subsamples plate {plate!r} itself"
        messages.append(f"batch_size: {size} not used, as the program {why}; it sees all {rows} rows")
        return bind(call), call, False
    _check_rows(bound, size)
    per_row = [i.name for i in bound.structure.drawn(local=False) if i.local_in_model and i.role == "latent"]
    if per_row:
        raise LegalityError(
            f"Sites {per_row} are drawn for every row by the model and once for all by the guide, so rows cannot be "
            f"taken in mini-batches; pass batch_size=None."
        )
    return bound, example, True


def _check_rows(bound: Any, rows: int | None) -> None:
    structure = bound.structure
    if structure.data_plate is None or structure.plate_size is not None or rows is None:
        return
    if structure.rows != rows:
        raise ProgramError(
            f"Data plate {structure.data_plate!r} has {structure.rows} rows where the program was given {rows}; "
            f"size it by its data (len(x)), subsample inside the program, or name another data_plate."
        )


def _check_support(bound: Any, chosen: Program, call: Call, example: Call) -> None:
    """Refuses observed values outside their site's support, in blocks of the shape that the program was probed on."""
    names = dict(zip(chosen.arguments, call.args, strict=False)) | dict(call.kwargs)
    size = len(example.leaves[0]) if example.leaves else 0
    for site, info in bound.structure.sites.items():
        values = names.get(site)
        # A program that subsamples itself was probed on other rows than its data have.
        if info.role != "observed" or values is None or bound.structure.plate_size is not None:
            continue
        for first in range(0, len(values), size):
            block = np.asarray(values[max(0, min(first, len(values) - size)) :][:size])
            if not bound.in_support(site, block):
                raise DataError(
                    f"Values of {site!r} are outside the support of its distribution; rows {first} to "
                    f"{first + size - 1} span {block.min():g} to {block.max():g}. Check units and options such as "
                    f"total_count."
                )


def _mode(asked: str, state: State | None) -> str:
    """A run goes on in the mode in which it began: another one rounds differently."""
    return state.mode if state is not None and asked == "auto" else asked


def _start(trainer: Any, state: State | None, backend: str, seed: int, steps: int) -> tuple[Any, int]:
    if state is None:
        return trainer.initial(), 0
    if (state.backend, state.seed) != (backend, seed):
        raise DataError(
            f"The state is of backend {state.backend!r} and seed {state.seed}, the fit of {backend!r} and {seed}; go "
            f"on with the same."
        )
    if state.step > steps:
        raise DataError(f"The state is at step {state.step} already and steps = {steps}; ask for more.")
    return trainer.unpack(state.arrays), state.step


def _epochs(rows: int, size: int, seed: int, first: int) -> Iterator[np.ndarray]:
    """Batches from step `first` on: every epoch a permutation of the rows that depends on (seed, epoch) alone."""
    per_epoch = rows // size
    while True:
        epoch, batch = divmod(first, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        for b in range(batch, per_epoch):
            yield order[b * size : (b + 1) * size]
            first += 1


def _index(rows: int | None, size: int | None, seed: int, first: int, steps: int) -> np.ndarray:
    assert rows is not None and size is not None
    batches = _epochs(rows, size, seed, first)
    return np.stack([next(batches) for _ in range(steps)])


def _values(number: float | Schedule, first: int, steps: int) -> np.ndarray:
    at = number.at if isinstance(number, Schedule) else lambda _: number
    return np.array([at(step) for step in range(first, first + steps)], dtype=np.float64)


def _stop(
    losses: np.ndarray,
    first: int,
    bound: Any,
    trainer: Any,
    tree: Any,
    plan: Any,
    held: Call,
    index: np.ndarray | None,
    key: Any,
) -> None:
    """Raises with the step of the first non-finite loss and the sites that are not finite there or later."""
    i = int(np.flatnonzero(~np.isfinite(losses))[0])
    batch = held if index is None else held.map(lambda a: a[index[i]])
    table = bound.evaluate(trainer.params(tree), batch, key, plan)
    guilty = [
        f"{name} ({label})"
        for name, row in table.items()
        for label in ("log_p", "log_q")
        if row[label] is not None and not np.isfinite(np.asarray(row[label])).all()
    ]
    raise PplLvmError(
        f"The loss at step {first + i} is {losses[i]}. Densities that are not finite at the parameters it left behind: "
        f"{guilty or 'none'}. Lower the learning rate, or bound the scales of these sites."
    )
