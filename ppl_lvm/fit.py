"""The one training loop. Read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ppl_lvm import backends, interrupts, legality, memory, progress
from ppl_lvm.algorithm import GuideFamily, Schedule, Turn
from ppl_lvm.arguments import check_kinds, check_loop
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.hiding import Hiding
from ppl_lvm.backends.training import MOST_SKIPPED, numbers_of, parameter_groups
from ppl_lvm.checkpoint import Checkpoint, Progress, describe
from ppl_lvm.data import Batches, Missing, check_missing, check_observed, is_batches, observe, read
from ppl_lvm.errors import DataError, Interrupted, LegalityError, ProgramError, RecipeError
from ppl_lvm.monitor import EarlyStopping, Moment, Run, Watch, going_on, restart_seeds, run_seed
from ppl_lvm.nonfinite import Inquiry
from ppl_lvm.pace import FEWEST, Order, Pace, most_steps
from ppl_lvm.parameters import descent, starting_values
from ppl_lvm.posterior import Fit, State
from ppl_lvm.program import Program, backend_of
from ppl_lvm.program import program as load_program
from ppl_lvm.recipe import Recipe
from ppl_lvm.recipe import recipe as load_recipe
from ppl_lvm.sampled import Sampled, sample
from ppl_lvm.stages import in_stages
from ppl_lvm.validation import HeldOut, at_least, split


def fit(
    model: Program | str | Callable[..., Any],
    guide: Callable[..., Any] | GuideFamily | str | None = None,
    data: object = None,
    recipe: Any = None,
    *,
    backend: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    progress_bar: bool | None = None,
    compile: str = "auto",
    data_plate: str | None = None,
    missing: Missing = None,
    observed: Mapping[str, str] | None = None,
    state: State | None = None,
    validation: object = None,
    start: Fit | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callable[[Moment], object]] = (),
    device: str | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    every: int | None = None,
    **overrides: Any,
) -> Fit:
    """Fits a latent-variable program to data by the objective and the gradient estimators of a recipe, or its method.

    Args:
        model: a portable program (`program("vae", latent=8)` or its name), or a native model of Pyro or NumPyro.
        guide: the native model's guide or autoguide; or a family that writes one from the model, by name
            ("auto_normal", "multivariate_normal", "low_rank", "flow", "amortized", "delta"), for any program. None
            for recipes with a method, which need none.
        data: the program's arguments, whose first axis is rows: an array (NumPy, torch, JAX), a tuple of arrays, a
            dict by name, a data frame, a list of ragged sequences, or batches (a DataLoader); see below.
        recipe: a name, a path to a TOML file, a mapping or a Recipe, or a list of them that are run as stages, each
            from the parameters of the last; None: the program's own.
        backend: "pyro" or "numpyro"; found from a native program, the first one installed for a portable one.
        seed: initial parameters, order of rows and noise are functions of it.
        dtype: "float32" or "float64".
        progress_bar: None shows one where the output is a terminal.
        compile: "auto", "compiled" or "eager", and on Pyro "graph" (traced, not compiled).
        data_plate: the plate of the rows where the program leaves it open; "none": the whole program is one row.
        missing: "mask" leaves out the densities of entries that are NaN (or -1 among integers); None refuses them.
        observed: `{site: argument}` for observed sites that are not called like the data argument they have.
        state: of an earlier fit, to go on from to `steps` in all.
        validation: a fraction of the rows, taken out by a permutation that depends on the seed, or other data. Every
            `check_every` steps `history["validation"]` gets the recipe's objective per row on them, with the same
            noise each time and schedules at their end; `patience` stops early on it and keeps the best parameters.
        start: an earlier fit, or constrained values by name; parameters of these names start from them. A method
            other than `map` holds them there.
        callbacks: `f(moment)` is called every `check_every` steps with `step`, `loss`, `validation`, `params` and
            `state`; `moment.stop()` ends the fit, or the stage. What a callback raises ends the fit and is passed on
            as it is; one that wants to keep what there is saves `moment.state`.
        device: "cpu", "gpu" or "cuda:1", where the fit runs; None: the library's default. A native model's own tensors
            are the caller's to put there. What is asked of the fit later runs on the library's default.
        checkpoint: a folder that the fit writes as it goes. The same call goes on from what it holds, to the bits of a
            fit that was never ended; a fit that has all its steps is given back without one more.
        every: steps between two checkpoints; None: about a minute.
        **overrides: options of the recipe, `draws=50`, `learning_rate=1e-2`, `steps=100`.

    Rows are shuffled once per epoch and taken `batch_size` at a time; the last, smaller batch of an epoch is left out.
    `history` holds "step", "loss" and "gradient_norm" (before clipping) of every step, and "validation" at
    "validation_step"; of stages one after the other, with the number in "stage"; of restarts those of the best one,
    and in "restarts" what they were compared by: validation, or the mean loss of their last tenth. Where an estimator
    has relaxed values, "hard_loss" at "hard_step" is the objective under hard draws, on the rows of validation or else
    on 1,000 or more of the training rows, with noise and schedules as for validation.

    Data. The columns of a frame (pandas, polars, pyarrow) go to the arguments of their names, or all together as a
    matrix to the only argument. Sequences `[T_i, ...]` in a list are padded with zeros to `[N, T, ...]`, and what was
    padded is left out of the density of the site that has the argument's name; an argument `x_mask` `[N, T]`,
    `x_lengths` or `lengths` `[N]` of the program tells it which steps are real. Batches come from any object that is
    gone through anew at every epoch; their size replaces `batch_size`, and methods of the `Fit` then need `data=`.

    With `missing="mask"`, missing entries of `x` become zeros, which networks see too; `x_mask`, where the program
    takes it, says which are known. An observed site counts the known entries of a row alone. A data argument called
    like a latent site of the guide is *partly observed*, as labels are: where it is known it takes the place of the
    draw, its log q counts zero and its log p counts; where it is missing it is drawn (Kingma, Rezende, Mohamed,
    Welling, 2014, arXiv:1406.5298, eqs. 6 and 7). The model may sample it with `obs=y` or without.

    Raises:
        RecipeError, ProgramError, DataError, LegalityError, BackendError: before training starts.
        NonFiniteError: a loss or a gradient is not finite; says at which step, sites and rows; has the state before.
        StorageError: the checkpoint is of another fit, or cannot be read or written.
        Interrupted: Ctrl-C (a KeyboardInterrupt); `error.fit` is the fit so far. A second Ctrl-C ends it at once.

    Example:
        >>> from ppl_lvm import fit, program
        >>> from ppl_lvm.datasets import load
        >>> run = fit(program("vae", latent=2), data=load("digits").train, recipe="elbo", steps=20)
        >>> run.history["loss"].shape
        (20,)
    """
    started = time.perf_counter()
    words = {"dtype": dtype, "compile": compile, "data_plate": data_plate, "missing": missing}
    check_kinds(seed, device, observed, state, start, callbacks, validation, backend, progress_bar, **words)
    seed = int(seed)  # one of NumPy's cannot be written down
    if isinstance(guide, str | GuideFamily):
        guide, overrides = None, {"guide": guide, **overrides}
    chosen = _program(model, guide)
    how = load_recipe(chosen.recipe if recipe is None else recipe, **overrides)
    given = {"state": state, "validation": validation, "callbacks": callbacks or None, "device": device}
    check_loop(how, given | {"checkpoint": checkpoint})
    keeper = Checkpoint.of(checkpoint, every)
    messages: list[str] = []
    chosen = _guided(chosen, how, messages)
    name = _backend(chosen, backend)
    if dtype not in ("float32", "float64"):
        raise DataError(f"dtype={dtype!r} was asked for; use 'float32' or 'float64'.")
    once = partial(fit, chosen, None, data, backend=name, seed=seed, dtype=dtype, progress_bar=progress_bar)
    once = partial(once, compile=compile, data_plate=data_plate, validation=validation, callbacks=callbacks)
    once = partial(once, missing=missing, observed=observed)
    if device is not None:
        library = backends.load(name)
        off = partial(_off_device, library)
        try:
            with library.on(device):
                return off(once(recipe=how, start=start, state=state, checkpoint=keeper))
        except Interrupted as stop:
            raise stop.of(off(stop.fit)) from None
    if how.stages:
        return in_stages(how, once, start, state, keeper)
    batches = None
    rows: int | None
    if is_batches(data):
        batches = Batches(data, lambda batch: read(batch, chosen, missing), messages)  # type: ignore[arg-type]
        call, rows = batches.first, batches.rows
        how = _of_size(how, batches.size, messages)
    else:
        call = read(data, chosen, missing, messages)
        rows = _length(call)
    chosen = observe(chosen, observed, call)
    if how.objective is None:
        wanted = progress.wanted(progress_bar)
        return _sample(chosen, how, call, name, seed, dtype, data_plate, start, wanted, messages)
    hiding = Hiding(how.hide, chosen)
    hiding.check(call)
    training, held_out = _split(call, rows, validation, seed, chosen, missing, batches)
    if batches is None:
        rows = _length(training)
    if rows is not None and chosen.takes_rows:
        training = training.with_rows(rows)

    library = backends.load(name)
    bound, example, batched = _bind(library, chosen, training, rows, how, seed, dtype, data_plate, messages)
    if rows is not None and bound.row_params:
        size, training = len(example.leaves[0]), training.with_rows(rows)
        example = training.map(lambda a: a[:size])
    if bound.row_params and (batches is not None or held_out is not None):
        raise DataError(
            f"Parameters {sorted(bound.row_params)} have an entry for every row, and "
            + ("batches do not say which rows they hold; pass arrays." if batches is not None else
               "rows that are held out have none; leave validation out, or use an amortised guide.")
        )
    check_observed(chosen, bound.structure)
    _check_values(bound, chosen, training, example)
    if held_out is not None and _length(held_out) is not None:
        _check_values(bound, chosen, at_least(held_out, example), example)
    plan, notes = legality.plan(how.objective, how.estimator, bound.structure)
    messages += [f"estimator: {note}" for note in notes]
    legality.check_linear(bound, plan, bound.batch(example), library.key_of(seed))
    moved = descent(how, parameter_groups(bound.structure, how.objective, plan, example))
    number = validation if isinstance(validation, int | float | np.number) else held_out
    asked = partial(describe, chosen, how, batches or call, number, start, state, backend=name, seed=seed)
    held_by = partial(asked, dtype=dtype, compile=compile, data_plate=data_plate, missing=missing)
    before = keeper.found(held_by)
    states = before.states if before is not None else None if state is None else [state]
    seeds = restart_seeds(seed, how.restarts) if states is None else [run_seed(seed, s.restart) for s in states]
    trainer = library.Trainer(
        bound,
        plan,
        how.objective,
        moved,
        bound.batch(example),
        seeds=seeds,
        initials=_initials(library, bound, example, seeds, start, state, messages),
        rows=rows if batched else None,
        steps=how.steps,
        mode=_mode(compile, states),
        hiding=hiding,
    )
    tree, step = _start(trainer, states, name, seed, how)
    messages += _about_restarts(how, trainer, tree, seeds, state)

    numbers = numbers_of(how.objective, plan, moved.optimizers, moved.turns, dtype) | {MOST_SKIPPED: how.skips}
    first = {k: float(_values(v, 0, 1)[0]) for k, v in numbers.items()}
    messages += memory.foretold(library, trainer, tree, bound.batch(example), first, plan)
    held = bound.batch(training)
    looked = None if held_out is None else HeldOut(library, chosen, held_out, bound, rows, seed)
    hard = None
    if plan.relaxed:
        of_hard = looked or HeldOut(library, chosen, training, bound, rows, seed, training=True)
        hard = of_hard.look(trainer, numbers, plan.hard())
        kind = "training" if looked is None else "validation"
        messages.append(f"hard draws: history['hard_loss'] is the loss of {of_hard.size:,} {kind} rows under them")
    watch = Watch(
        trainer,
        _runs(how, held_out, seeds, states),
        None if looked is None else looked.look(trainer, numbers),
        callbacks,
        how.check_every,
        hard=hard,
        params=lambda arrays: _constrained(library, bound, trainer.params_of(arrays)),
        state=lambda arrays, step, r: _state(name, seed, step, trainer, arrays, r, states),
    )
    said = {"setup": messages, "watch": watch.messages, "compile": trainer.notes}
    if before is not None:
        before.restore(watch, said, batches)

    def seconds() -> float:
        return (0.0 if before is None else before.seconds) + time.perf_counter() - started

    def now(at: int | None = None) -> Progress:
        return Progress.of(step if at is None else at, tree, watch, said, seconds(), batches)

    inquiry = Inquiry(trainer, bound, library.to_numpy, numbers, batches is not None)
    orders = list[Order]()
    if batched and rows is not None and how.batch_size is not None:
        orders = [Order(rows, how.batch_size, s) for s in seeds]
    room = FEWEST if batches is not None else most_steps(sum(o.size for o in orders))  # batches are held on the device
    pace, ahead = Pace(room), _ahead(numbers, room)
    title = f"{chosen.name} · {how.name} · {name}"
    shown = progress.bar(title, how.steps, step, progress_bar)
    with keeper.writing(), shown as advance, interrupts.noticed() as interrupt:
        keeper.look(step, now)
        while step < how.steps and not watch.over and not interrupt:
            n = min(pace.steps, how.steps - step, watch.until(step), keeper.until(step))
            index = None
            if batches is not None:
                part, one = batches.chunk(step, n, room)
                _check_values(bound, chosen, part, example)
                held, index = bound.batch(part), np.stack([one] * len(seeds))
            elif batched:
                index = np.stack([np.resize(o.batches(step, n), (room, o.size)) for o in orders])
            with memory.of_step(library, plan, bound.structure.rows):
                tree, chunk = trainer.run(tree, held, index, ahead(step, n), step, n)
            watch.add({k: library.to_numpy(v).astype(np.float64) for k, v in chunk.items()}, step)
            if watch.wrong:
                with keeper.of_a_loss(watch, now):
                    inquiry.report(watch, tree, step, n, held, index, partial(watch.state, tree))
            step += n
            pace.took(n)
            watch.check(step, tree)
            advance(n, *watch.last)
            keeper.look(step, now)
        keeper.look(step, now, last=True)

    ended = watch.finish(step, tree)
    trained = trainer.params_of(ended.kept)
    found = Fit(
        program=chosen,
        recipe=how,
        backend=name,
        seed=seed,
        params=_constrained(library, bound, trained),
        history=watch.history(ended),
        seconds=seconds(),
        messages=messages + watch.messages + [note for note in trainer.notes if note not in messages] + keeper.notes,
        state=_state(name, seed, ended.step, trainer, ended.state, ended.run, states),
        _bound=bound,
        _trained=trained,
        _data=training if held_out is None else call,
    )
    if interrupt:
        raise Interrupted(f"Interrupted at step {step} of {how.steps}.", keeper.onwards, found)
    return found


def refit(
    run: Fit,
    data: object,
    *,
    seed: int | None = None,
    missing: Missing = None,
    compile: str = "auto",
    progress_bar: bool | None = None,
    **overrides: Any,
) -> Fit:
    """The fit on other rows: parameters with an entry for every row are trained anew, all others stay as they are.

    For guides that keep parameters per row (`ppl.row_param`, an argument `rows`, families such as "auto_normal" over
    latents in the data plate), which say nothing of rows that they were not trained on.

    Args:
        run: a fit with such parameters.
        data: other rows.
        seed: of the noise and of the order of rows; None: that of the fit.
        missing, compile, progress_bar: as for `fit`.
        **overrides: options of the fit's recipe (of its last stage), `steps=500`.

    Raises:
        ProgramError: the fit has no parameters of rows, so it says what there is of any rows as it is.

    Example:
        >>> from ppl_lvm import fit, refit
        >>> import numpy as np
        >>> counts = np.random.default_rng(0).integers(0, 17, (40, 6)).astype(float)
        >>> run = fit("vae", "auto_normal", counts[:30], steps=10)
        >>> refit(run, counts[30:], steps=10).posterior(2).values["z"].shape
        (2, 10, 8)
    """
    own = run._bound.row_params
    if run.recipe.method is not None:
        raise ProgramError(
            f"The fit is one by method {type(run.recipe.method).__name__!r}, which has no steps that could go on with "
            f"some parameters frozen; fit the other rows by it."
        )
    if not own:
        raise ProgramError(
            f"The fit of {run.program.name!r} has no parameters of rows; ask it about other rows as it is, as in "
            f"run.log_likelihood(data)."
        )
    others = {n: v for n, v in run.params.items() if n not in own}
    still = tuple(n for n in others if n not in run._bound.states)
    how = load_recipe(run.recipe.stages[-1] if run.recipe.stages else run.recipe, freeze=still, **overrides)
    return fit(
        run.program,
        None,
        data,
        how,
        backend=run.backend,
        seed=run.seed if seed is None else seed,
        dtype=run._bound.dtype,
        data_plate=run._bound.asked_plate,
        start=others or None,
        missing=missing,
        compile=compile,
        progress_bar=progress_bar,
    )


def _length(call: Call) -> int | None:
    return len(call.leaves[0]) if call.leaves else None


def _split(
    call: Call,
    rows: int | None,
    validation: object,
    seed: int,
    chosen: Program,
    missing: Missing,
    batches: Batches | None,
) -> tuple[Call, Call | None]:
    """Training and held-out data; the latter are read as data are."""
    if isinstance(validation, int | float | np.number):
        if batches is not None:
            raise DataError(f"validation = {validation} of batches, which are never held whole; pass other data.")
    elif validation is not None:
        validation = read(validation, chosen, missing)
    return split(call, rows, validation, seed)


def _program(model: Program | str | Callable[..., Any], guide: Callable[..., Any] | None) -> Program:
    if isinstance(model, Program | str):
        if guide is not None:
            name = model if isinstance(model, str) else model.name
            raise ProgramError(f"Program {name!r} brings its guide; pass a guide only beside a native model.")
        found = load_program(model)
    else:
        found = Program.from_callables(model, guide)
    return found


def _guided(chosen: Program, how: Recipe, messages: list[str]) -> Program:
    """The program with the recipe's family of guides in place of its own guide; a method needs neither."""
    if how.method is not None:
        return chosen
    if how.guide is not None:
        if chosen.guide is not None and not isinstance(chosen.guide, GuideFamily):
            messages.append(f"guide: {type(how.guide).__name__}, in place of the program's own")
        return replace(chosen, guide=how.guide)
    if chosen.guide is None:
        raise ProgramError(
            f"Model {chosen.name!r} came without a guide, which recipe {how.name!r} needs; pass one, an autoguide of "
            f"its library, or the name of a family, as in guide='auto_normal', or take a recipe with a method: map, "
            f"laplace, nuts, svgd."
        )
    return chosen


def _sample(
    chosen: Program,
    how: Recipe,
    call: Call,
    name: str,
    seed: int,
    dtype: str,
    data_plate: str | None,
    start: Fit | Mapping[str, Any] | None,
    shown: bool,
    messages: list[str],
) -> Sampled:
    """A recipe's method in place of the loop, on all rows."""
    if call.sample:
        raise DataError(f"Recipe {how.name!r} has a method, which takes all rows at once; pass arrays, not batches.")
    library, rows = backends.load(name), _length(call)

    def bind(program: Program) -> Any:
        bound = library.Bound(program, call, seed=seed, dtype=dtype, data_plate=data_plate, total=rows)
        _check_rows(bound, rows)
        check_observed(program, bound.structure)
        _check_values(bound, program, call, call)
        return bound

    params = start.params if isinstance(start, Fit) else start
    return sample(chosen, how, call, name, bind, seed=seed, params=params, progress=shown, messages=messages)


def _backend(chosen: Program, asked: str | None) -> str:
    if asked is not None:
        return asked
    if chosen.portable:
        available = backends.installed()
        if not available:
            raise ProgramError("No backend is installed; pip install 'ppl_lvm[numpyro]' or 'ppl_lvm[pyro]'.")
        return available[-1]
    found = backend_of(chosen.model, None if isinstance(chosen.guide, GuideFamily) else chosen.guide)
    if found is None:
        raise ProgramError(
            f"Cannot tell which library {chosen.name!r} is written for; pass backend='pyro' or 'numpyro'."
        )
    return found


def _of_size(how: Recipe, size: int, messages: list[str]) -> Recipe:
    if how.batch_size != size:
        messages.append(f"batch_size: {size}, the size of the batches that were given, not {how.batch_size}")
    return how.model_copy(update={"batch_size": size})


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
        return library.Bound(chosen, example, seed=seed, dtype=dtype, data_plate=data_plate, total=rows)

    size = how.batch_size
    if rows is None or size is None or (size >= rows and not call.sample):
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
        if call.sample:
            raise ProgramError(f"The program {why}, so it cannot be given batches; pass all rows as arrays.")
        messages.append(f"batch_size: {size} not used, as the program {why}; it sees all {rows} rows")
        return bind(call), call, False
    _check_rows(bound, size)
    per_row = [i.name for i in bound.structure.drawn(local=False) if i.local_in_model and i.role == "latent"]
    if per_row:
        raise LegalityError(
            f"Sites {per_row} are drawn for every row by the model and once for all by the guide, so rows cannot be "
            f"taken in mini-batches; pass batch_size=None."
        )
    if not chosen.portable:
        _refuse_parameters_of_rows(bound, call, size)
    return bound, example, True


def _refuse_parameters_of_rows(bound: Any, call: Call, size: int) -> None:
    """Refuses mini-batches where parameters belong to the rows of a batch: all batches would train those of the first.

    Parameters with an entry for every row of the data (row indices) have one size whatever the batch.
    """
    # Trees of arrays are networks', and no network has an entry per row.
    shapes = [tuple(getattr(v, "shape", ())) for v in bound.initial.values()]
    if not any(max(shape, default=0) >= size for shape in shapes):
        return
    of_rows = bound.batch_parameters(call.map(lambda a: np.resize(np.asarray(a), (2 * size, *np.shape(a)[1:]))))
    if of_rows:
        raise LegalityError(
            f"Parameters {of_rows} hold values for the rows of one batch, and every mini-batch has other rows, which "
            f"would share them; pass batch_size=None, or let the guide compute them from the data (an amortised guide)."
        )


def _check_rows(bound: Any, rows: int | None) -> None:
    structure = bound.structure
    if structure.data_plate is None or structure.plate_size is not None or rows is None:
        return
    if structure.rows != rows:
        raise ProgramError(
            f"Data plate {structure.data_plate!r} has {structure.rows} rows where the program was given {rows}; "
            f"size it by its data (len(x)), subsample inside the program, or name another data_plate."
        )


def _check_values(bound: Any, chosen: Program, call: Call, example: Call) -> None:
    """Refuses observed values outside their site's support, in blocks of the shape that the program was probed on."""
    check_missing(call, bound, chosen)
    names, knowns = call.named(chosen.arguments), call.known
    size = len(example.leaves[0]) if example.leaves else 0
    for site, info in bound.structure.sites.items():
        values = names.get(chosen.argument_of(site))
        known = knowns.get(chosen.argument_of(site))
        latent = info.role != "observed" and known is None
        # A program that subsamples itself was probed on other rows than its data have.
        if latent or values is None or bound.structure.plate_size is not None:
            continue
        for first in range(0, len(values), size):
            rows = slice(max(0, min(first, len(values) - size)), None)
            block = np.asarray(values[rows][:size])
            if not bound.in_support(site, block, None if known is None else known[rows][:size]):
                raise DataError(
                    f"Values of {site!r} are outside the support of its distribution; rows {first} to "
                    f"{first + size - 1} span {block.min():g} to {block.max():g}. {bound.needs(site)}"
                )


def _off_device(library: Any, run: Fit) -> Fit:
    return replace(run, _trained=library.off_device(run._trained))


def _mode(asked: str, states: Sequence[State] | None) -> str:
    """A run goes on in the mode in which it began: another one rounds differently."""
    return states[0].mode if states is not None and asked == "auto" else asked


def _start(trainer: Any, states: Sequence[State] | None, backend: str, seed: int, how: Recipe) -> tuple[Any, int]:
    if states is None:
        return trainer.initial(), 0
    state = states[0]
    if (state.backend, state.seed) != (backend, seed):
        raise DataError(
            f"The state is of backend {state.backend!r} and seed {state.seed}, the fit of {backend!r} and {seed}; go "
            f"on with the same."
        )
    if state.step > how.steps:
        raise DataError(f"The state is at step {state.step} already and steps = {how.steps}; ask for more.")
    return trainer.unpack(*(going_on(s.arrays, how.skips) for s in states)), state.step


def _initials(
    library: Any,
    bound: Any,
    example: Call,
    seeds: Sequence[int],
    start: Fit | Mapping[str, Any] | None,
    state: State | None,
    messages: list[str],
) -> list[Mapping[str, Any]]:
    """Unconstrained initial parameters of every restart, and what else the program starts from."""
    initials: list[Mapping[str, Any]] = [{**bound.initial, **bound.states}]
    for seed in seeds[1:]:
        options = {"dtype": bound.dtype, "data_plate": bound.asked_plate, "total": bound.total}
        other = library.Bound(bound.program, example, seed=seed, **options)
        initials.append({**other.initial, **other.states})
    if start is None:
        return initials
    if state is not None:
        raise DataError("Both state and start were given; a state brings its parameters, so leave start out.")
    return [starting_values(initial, start, bound, messages) for initial in initials]


def _about_restarts(how: Recipe, trainer: Any, tree: Any, seeds: Sequence[int], state: State | None) -> list[str]:
    if how.restarts > 1 and state is not None:
        return [f"restarts: the state goes on with its own, {state.restart}, alone"]
    if len(seeds) > 1:
        first, second = trainer.pack(tree, 0), trainer.pack(tree, 1)
        if all(np.array_equal(first[n], second[n]) for n in first):
            return [
                "restarts: the initial parameters do not depend on the seed, so restarts differ in noise and order of "
                "rows alone"
            ]
    return []


def _runs(how: Recipe, held_out: Call | None, seeds: Sequence[int], states: Sequence[State] | None) -> list[Run]:
    if how.patience is None:
        return [Run(None, most_skipped=how.skips) for _ in seeds]
    if held_out is None:
        raise RecipeError(
            f"Recipe {how.name!r} has patience = {how.patience}, which goes by validation; pass validation=0.1 or data."
        )
    early = [EarlyStopping(how.patience, how.min_delta) for _ in seeds]
    for stopping, state in zip(early, states or [], strict=False):
        stopping.unpack(state.arrays)
    return [Run(stopping, most_skipped=how.skips) for stopping in early]


def _constrained(library: Any, bound: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    return {n: library.to_numpy(v) for n, v in bound.constrain(params).items()}


def _state(
    name: str,
    seed: int,
    step: int,
    trainer: Any,
    arrays: Mapping[str, np.ndarray],
    run: int,
    states: Sequence[State] | None,
) -> State:
    return State(name, seed, step, trainer.mode, arrays, run if states is None else states[run].restart)


def _values(number: float | Schedule | Turn, first: int, steps: int) -> np.ndarray:
    if not isinstance(number, Schedule | Turn):
        return np.full(steps, number, dtype=np.float64)
    return np.array([number.at(step) for step in range(first, first + steps)], dtype=np.float64)


def _ahead(numbers: Mapping[str, float | Schedule | Turn], room: int) -> Callable[[int, int], dict[str, np.ndarray]]:
    """`(step, n) -> numbers of the next n steps`, `[room]` each; one that never changes is always the same array."""
    still = {k: _values(v, 0, room) for k, v in numbers.items() if not isinstance(v, Schedule | Turn)}
    return lambda step, n: {
        k: still[k] if k in still else np.resize(_values(v, step, n), room) for k, v in numbers.items()
    }
