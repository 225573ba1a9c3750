"""A fit from its folder: nothing that the folder holds is executed, and what is not understood is refused."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ppl_lvm import backends, fingerprint, saving, store
from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.backends.base import ROWS, Call
from ppl_lvm.backends.sampler import Outcome
from ppl_lvm.catalogue import to_dict
from ppl_lvm.data import read
from ppl_lvm.errors import BackendError, DataError, PplLvmError, StorageError
from ppl_lvm.fitted import on_made_up
from ppl_lvm.posterior import Fit, State
from ppl_lvm.program import Program
from ppl_lvm.program import program as load_program
from ppl_lvm.recipe import Recipe, named
from ppl_lvm.sampled import Sampled, lacks_of
from ppl_lvm.to_arviz import versions

FEW = 16
"""Rows that a program with a data plate is bound to; it takes any number of them."""

ENTRIES = 2**28
"""The most numbers of blank data that a folder can ask for."""

LINES = 40
"""Of a difference between two sources, what an error shows."""


def load(
    path: str | Path,
    *,
    program: Program | str | Path | tuple[Callable[..., Any], Callable[..., Any] | None] | None = None,
    recipe: Recipe | None = None,
    backend: str | None = None,
    data: object = None,
    changed: bool = False,
) -> Fit:
    """The fit that `run.save(path)` wrote, without its training rows: methods then need `data=`, or a number of rows.

    Nothing in the folder is executed. A program of the library is found by its name; one of your own has to be
    given, as the library would otherwise run a file because a folder says so.

    Args:
        path: the folder.
        program: for a file of your own its path, or `program(path)`; for a native program `(model, guide)`. Its source
            is compared with the saved one.
        recipe: the recipe that the fit was made with, where it names objectives, estimators, guides or methods that are
            not the library's; it is compared with the saved one.
        backend: "pyro" or "numpyro"; None: the one of the fit. A portable program can be loaded on the other one.
        data: the rows that the fit was made on, as `fit` got them; they are checked by their fingerprint. What needs
            them, such as draws of a method for latents of these rows, works as it did before.
        changed: takes a program whose source has changed, if its sites and parameters are still the same.

    Raises:
        StorageError: there is no saved fit, a file is missing, truncated or changed, or the manifest, an array or the
            source of the program is not what it should be; the message says what.
        ProgramError, RecipeError: the program or the recipe does not exist any more, or takes other options.
        DataError: the data are not those of the fit.
        BackendError: the backend is not installed, or the program cannot be loaded on it.

    Example:
        >>> import tempfile
        >>> from ppl_lvm import fit, load
        >>> x = np.random.default_rng(0).normal(size=(20, 4))
        >>> run = fit("probabilistic_pca", data=x, backend="pyro", steps=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run.save(f"{folder}/run")
        ...     again = load(f"{folder}/run")
        >>> again.log_likelihood(x, draws=10).values.shape
        (20,)
    """
    found = store.read(path, saving.KIND)
    saved, where = content_of(found.content, path), f"The fit in {str(path)!r}"
    history = saving.history_of(found.lines, saved.history)
    state = State.of(saved.state, found.arrays.get(saving.STATE, {}))
    how = _recipe(saved.recipe, recipe, where)
    now = versions()
    chosen = _program(saved.program, program, how, where, changed, saved.versions.get("python") == now["python"])
    chosen = replace(chosen, observed=tuple(saved.program.observed.items()))
    name = saved.backend if backend is None else backend
    library = backends.load(name)
    if name != saved.backend and (not chosen.portable or how.method is not None):
        kind = "native program, which is" if not chosen.portable else "fit by a method, whose draws are"
        raise BackendError(f"{where} is of a {kind} of backend {saved.backend!r} alone; load it there.")
    bound, example, call, trained = _set_up(library, saved, chosen, data, found.arrays, name, where)
    if (sites := saving.sites_of(bound)) != saved.sites:
        told = _difference(*({n: s.model_dump() for n, s in found.items()} for found in (saved.sites, sites)))
        raise StorageError(f"{where} has other sites than its program: {told}.")
    messages = [*saved.messages, *_aged(saved.versions, now)]
    common: dict[str, Any] = {
        "program": chosen,
        "recipe": how,
        "backend": name,
        "seed": saved.seed,
        "params": {n: library.to_numpy(v) for n, v in bound.constrain(trained).items()},
        "history": history,
        "seconds": saved.seconds,
        "messages": messages,
        "state": state,
        "_bound": bound,
        "_trained": trained,
        "_data": call,
        "_example": example,
    }
    if how.method is None:
        return Fit(**common)
    return _sampled(common, found.arrays, example, where)


def content_of(table: Mapping[str, Any], path: str | Path) -> saving.Content:
    """A manifest's entries, checked."""
    try:
        return saving.Content.model_validate(table)
    except ValidationError as cause:
        first = cause.errors()[0]
        place = repr(".".join(map(str, first["loc"])))[:200]
        raise StorageError(f"The manifest of {str(path)!r} cannot be understood: {place}: {first['msg']}.") from cause


# Recipe and program.


def _recipe(table: Mapping[str, Any], given: Recipe | None, where: str) -> Recipe:
    if given is not None:
        if (mine := given.to_dict()) != table:
            raise StorageError(f"{where} was made with another recipe: {_difference(table, mine)}.")
        return given
    return named(table)


def _program(
    saved: saving.SavedProgram, given: Any, how: Recipe, where: str, changed: bool, same_python: bool
) -> Program:
    if given is None:
        if saved.origin != "shipped":
            kind = "a file of your own" if saved.origin == "file" else "native callables"
            example = "'path/to/file.py'" if saved.origin == "file" else "(model, guide)"
            raise StorageError(
                f"{where} is of program {saved.name!r}, {kind}, and nothing that a folder names is run; pass "
                f"program={example}."
            )
        if saving.shipped(saved.name) is None:
            raise StorageError(f"{where} is of the library's program {saved.name!r}, which this version has not.")
        found = load_program(saved.name, **saved.options)
    elif isinstance(given, Program):
        found = given
    elif isinstance(given, str | Path):
        found = load_program(given, **saved.options)
    else:
        found = Program.from_callables(*(given if isinstance(given, tuple) else (given,)))
    mine = saving.as_saved(found)
    if (options := mine.options) != saved.options:
        raise StorageError(
            f"{where} was made with other options of program {saved.name!r}: {_difference(saved.options, options)}."
        )
    if not changed:
        _compare(saved, mine, where, same_python)
    return replace(found, guide=_guide(found, saved, how, where))


def _guide(program: Program, saved: saving.SavedProgram, how: Recipe, where: str) -> Any:
    """The program's own guide, the family that the recipe has in its place, or none."""
    if saved.family is None:
        return None if saved.guide is None else program.guide
    last = how.stages[-1] if how.stages else how
    for family in (last.guide, program.guide):
        if isinstance(family, GuideFamily) and to_dict(family) == saved.family:
            return family
    raise StorageError(f"{where} has a guide by family {saved.family}, and its recipe has {last.guide!r}.")


def _compare(saved: saving.SavedProgram, mine: saving.SavedProgram, where: str, same_python: bool) -> None:
    """Refuses a program that is not the one that was fitted."""
    pairs = [("the file", saved.source, mine.source)]
    if saved.source_hash == mine.source_hash != "":
        return
    if mine.source_hash == "" == saved.source_hash:
        pairs = [("the model", *_sources(saved.model, mine.model, same_python))]
        if saved.guide is not None and mine.guide is not None:
            pairs.append(("the guide", *_sources(saved.guide, mine.guide, same_python)))
        pairs = [pair for pair in pairs if pair[1] != pair[2]]
    if not pairs:
        return
    what, before, now = pairs[0]
    shown = [f"{saved.source_hash or before} before, {mine.source_hash or now} now"]
    if before is not None and now is not None:
        shown = list(difflib.unified_diff(before.splitlines(), now.splitlines(), "saved", "now", n=1, lineterm=""))
        if len(shown) > LINES:
            shown = [*shown[:LINES], f"... and {len(shown) - LINES} lines more"]
    lines = "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in shown)
    raise StorageError(
        f"{where} is of program {saved.name!r}, and {what} has changed since:\n{lines}\nTake the version that was "
        f"fitted, or pass changed=True if the change does not matter."
    )


def _sources(
    saved: saving.SavedCallable, mine: saving.SavedCallable, same_python: bool
) -> tuple[str | None, str | None]:
    """Sources where both are known, else the code, or names where another Python made that."""
    if saved.source is not None and mine.source is not None:
        return saved.source, mine.source
    if same_python:
        return f"{saved.name}, code {saved.code}", f"{mine.name}, code {mine.code}"
    return saved.name, mine.name


# Parameters.


def _set_up(
    library: Any,
    saved: saving.Content,
    program: Program,
    data: object,
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    name: str,
    where: str,
) -> tuple[Any, Call, Call | None, Mapping[str, Any]]:
    """The program bound, blank rows `[0, ...]`, the training rows if they are given, and the parameters."""
    example = _example(saved, where)
    call = None if data is None else _training(data, saved, program, example, where)
    own = saved.backend == name

    def bind(rows: int | None) -> Any:
        size = 0 if call is not None else (rows or 0) * sum(math.prod(a.shape[1:]) for a in example.leaves)
        if max(size, 0 if call is not None else saved.total or 0) > ENTRIES:
            raise StorageError(
                f"{where} is of {saved.total or 0:,} rows and asks for {size:,} numbers of blank data to set up its "
                f"program; at most {ENTRIES:,} are made. Pass data=, the rows of the fit."
            )
        if not example.leaves:
            return on(Call())
        if call is not None:
            return on(call.map(lambda a: a[:rows]))
        return on_made_up(on, example, program, rows or 0)

    def on(held: Call) -> Any:
        options = {"seed": saved.seed, "dtype": saved.dtype, "data_plate": saved.data_plate, "total": saved.total}
        try:
            return library.Bound(program, held, **options)
        except PplLvmError:
            raise
        except Exception as cause:
            raise StorageError(
                f"{where} holds what its program {program.name!r} cannot be set up with: {type(cause).__name__}: "
                f"{_shown(str(cause))}"
            ) from cause

    def values(bound: Any) -> Mapping[str, Any]:
        if own:
            return library.values_of(bound, arrays.get(saving.TRAINED, {}))
        given = arrays.get(saving.PARAMS, {})
        if given.keys() != bound.initial.keys():
            raise StorageError(f"{where} has other parameters than its program: {_difference(given, bound.initial)}.")
        return {n: bound.unconstrain(n, given[n]) for n in bound.initial}

    if saved.in_plate and (saved.rows or 0) > FEW and not saved.row_params and saving.DRAWS not in arrays:
        # A program for a fixed number of rows, or with parameters that follow it, is bound to all; what is wrong
        # besides is told then.
        with contextlib.suppress(PplLvmError):
            bound = bind(FEW)
            return bound, example, call, values(bound)
    bound = bind(saved.rows)
    return bound, example, call, values(bound)


def _example(saved: saving.Content, where: str) -> Call:
    args, kwargs = list[Any](), dict[str, Any]()
    for argument in saved.arguments:
        if argument.dtype is not None and argument.dtype not in store.DTYPES:
            raise StorageError(f"{where} has data of dtype {argument.dtype[:100]!r}, which no data have.")
        try:
            array = None if argument.dtype is None else np.zeros((0, *argument.shape), argument.dtype)
        except ValueError as cause:
            raise StorageError(f"{where} has data whose rows have shape {argument.shape} ({cause}).") from cause
        if argument.name is None:
            args.append(array)
        else:
            kwargs[argument.name] = array
    return Call(tuple(args), kwargs)


def _training(data: object, saved: saving.Content, program: Program, example: Call, where: str) -> Call:
    if saved.data is None:
        raise DataError(f"{where} was made from batches, or without its data; pass data= to its methods instead.")
    call = read(data, program, "mask" if example.known else None)
    if told := fingerprint.differences(saved.data, saving.data_of(call, program)):
        raise DataError(
            f"{where} was made on other data than these: {told[0]}. Leave data= out, or pass the rows of the fit."
        )
    return call.with_rows(len(call.leaves[0])) if ROWS in example.kwargs else call


def _sampled(
    common: dict[str, Any], arrays: Mapping[str, Mapping[str, np.ndarray]], example: Call, where: str
) -> Sampled:
    bound, call, how = common["_bound"], common["_data"], common["recipe"]
    if call is not None:
        bound = common["_bound"] = bound.on(call)

    def on(rows: Call) -> Any:
        return backends.methods(common["backend"]).Sampler(bound, bound.batch(rows), how.method, common["params"])

    made_up = partial(on_made_up, on, example, common["program"], max(1, bound.structure.rows))
    sampler = made_up() if call is None else on(call)
    draws, stats = arrays.get(saving.DRAWS, {}), arrays.get(saving.STATS, {})
    u, size = draws.get("u", np.zeros(0)), sampler.size
    gaussian = (draws["mean"], draws["lower"]) if {"mean", "lower"} <= draws.keys() else None
    shaped = u.ndim == 3 and u.shape[2] == size and u.size > 0 and draws.keys() <= {"u", "mean", "lower"}
    shaped = shaped and (gaussian is None or (gaussian[0].shape, gaussian[1].shape) == ((size,), (size, size)))
    if not shaped or any(s.shape[:2] != u.shape[:2] for s in stats.values()):
        raise StorageError(
            f"{where} has draws of other shapes than its method's, [chains, draws, {size}]: "
            f"{({n: a.shape for n, a in {**draws, **stats}.items()})}."
        )
    outcome = Outcome(u, common["_trained"], common["history"], stats, gaussian)
    lacks = lacks_of(how.method, bound, outcome)
    if call is None:
        given = "it looks at the rows of the fit, and they were not given; load(path, data=rows)"
        lacks.setdefault("log_evidence", given)
    return Sampled(**common, lacks=lacks, stats=stats, _sampler=sampler, _outcome=outcome)


# Messages.


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first entry that differs."""
    return _shown(fingerprint.differences(before, now)[0])


def _shown(text: str) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else text[:200] + "..."


def _aged(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    moved = [f"{n} {v} (now {now.get(n, 'not installed')})" for n, v in before.items() if now.get(n) != v]
    return [f"loaded: saved with {', '.join(moved)[:500]}"] if moved else []
