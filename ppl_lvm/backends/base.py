"""What a backend promises of a program on a batch: one run as a table of arrays, and its gradients.

`PyroBound` and `NumPyroBound` implement `Bound`. Everything here is free of frameworks; arrays are whatever the
backend's are, and `ops` tells them apart.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ppl_lvm import ops
from ppl_lvm.algorithm import GuideFamily, Objective
from ppl_lvm.backends.sites import told
from ppl_lvm.backends.structure import Plan, SiteInfo, Structure
from ppl_lvm.draws import Draws
from ppl_lvm.errors import DataError, LegalityError, PplLvmError, ProgramError, first_line
from ppl_lvm.latents import Latent, Sketch, check_plates
from ppl_lvm.ops import Array

if TYPE_CHECKING:
    from ppl_lvm.program import Program

ROWS = "rows"
"""Argument by which a native program asks for the indices of its rows among all of the data."""

PRIOR_DRAWS = 15
"""Runs of the model whose median is where a family of guides starts."""


@dataclass(frozen=True)
class Gradients:
    """What one step computes: the loss in nats over all rows, and the gradient of every unconstrained parameter."""

    loss: Array
    params: dict[str, Array]
    own: dict[str, dict[str, Array]]
    states: dict[str, Array]
    mutable: dict[str, Any] = field(default_factory=dict)
    """State that the program changed as it ran (batch statistics), for the next step."""


class Bound(Protocol):
    """A program bound to a backend, a batch shape, a dtype and initial parameters."""

    structure: Structure
    initial: dict[str, Array]
    """Unconstrained initial parameters."""
    states: dict[str, Any]
    """What else the program starts from and every step moves: batch statistics."""

    def on(self, example: Call) -> Bound:
        """The same program on data of another shape."""
        ...

    def batch_parameters(self, call: Call) -> list[str]:
        """Parameters that hold values of the batch's own rows; `call` has another number of rows."""
        ...

    def distributions(
        self, params: Mapping[str, Array], batch: Call, values: Mapping[str, Any]
    ) -> dict[tuple[str, str], list[Any]]:
        """(site, "guide" or "model") -> its distribution in one run, of every step for a site inside a scan.

        `values` are one draw of latent sites, `[B, ...]` for local ones; others are drawn anew.
        """
        ...

    def draws(
        self,
        params: Mapping[str, Array],
        batch: Call,
        key: Array | int,
        plan: Plan,
        *,
        total_rows: int | None = None,
        values: Mapping[str, Array] | None = None,
        outer_weight: Array | None = None,
    ) -> Draws: ...

    def gradients(
        self,
        params: Mapping[str, Array],
        batch: Call,
        key: Array | int,
        plan: Plan,
        objective: Objective,
        **options: Any,
    ) -> Gradients: ...


KNOWN = "?"
"""What is known of argument `x` travels as the named argument `x?`, which no program can have."""


@dataclass(frozen=True)
class Call:
    """The arguments of a program: positional and named, arrays whose first axis is rows (or None).

    Where entries of `x` may be missing, a boolean array of its shape under the name `x?` says which are known. It is
    cut into batches with the data, and taken off before the program is called.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    sample: bool = False
    """Some of the rows only: a first batch that stands for data which are never held whole."""

    @property
    def own(self) -> Call:
        """What the program is called with."""
        return Call(self.args, {k: a for k, a in self.kwargs.items() if not k.endswith(KNOWN)}, self.sample)

    @property
    def known(self) -> dict[str, Any]:
        """Argument -> which of its entries are known, for those that may miss some."""
        return {k.removesuffix(KNOWN): a for k, a in self.kwargs.items() if k.endswith(KNOWN)}

    def named(self, names: Sequence[str]) -> dict[str, Any]:
        """The program's arguments by name; `names` are those of positional ones."""
        return {**dict(zip(names, self.args, strict=False)), **self.own.kwargs}

    @staticmethod
    def of(data: object) -> Call:
        """An array, a tuple of arrays, a dict of named arrays, or None (a program without arguments)."""
        if data is None:
            return Call()
        if isinstance(data, Call):
            return data
        if isinstance(data, Mapping):
            return Call((), dict(data))
        if isinstance(data, tuple):
            return Call(data)
        return Call((data,))

    @property
    def leaves(self) -> list[Any]:
        return [a for a in (*self.args, *self.kwargs.values()) if a is not None]

    def with_rows(self, rows: int) -> Call:
        """With the indices of rows 0 to `rows - 1`, which mini-batches pick from as from any other argument."""
        return self if ROWS in self.kwargs else replace(self, kwargs={**self.kwargs, ROWS: np.arange(rows)})

    def map(self, f: Callable[[Any], Any]) -> Call:
        def each(a: Any) -> Any:
            return None if a is None else f(a)

        return Call(tuple(each(a) for a in self.args), {k: each(a) for k, a in self.kwargs.items()})

    def map_named(self, names: Sequence[str], f: Callable[[str, Any], Any]) -> Call:
        """The same for a function of an argument's name and array; `names` are those of positional ones."""

        def each(name: str, a: Any) -> Any:
            return None if a is None else f(name, a)

        args = tuple(each(n, a) for n, a in itertools.zip_longest(names[: len(self.args)], self.args, fillvalue=""))
        return Call(args, {k: each(k, a) for k, a in self.kwargs.items()})


def example_kinds(program: Program) -> dict[str, str] | None:
    """NumPy's kinds of a portable program's example by argument, or None for a native program."""
    if not program.portable:
        return None
    call = Call.of(None if program.example is None else program.example(np.random.default_rng(0)))
    named = {**dict(zip(program.arguments, call.args, strict=False)), **call.kwargs}
    return {name: np.asarray(a).dtype.kind for name, a in named.items()}


def as_float(kinds: Mapping[str, str] | None, name: str, kind: str) -> bool:
    """Whether data of this argument and NumPy kind go to the program as floats of the fit's precision.

    Integers of portable programs do, so that counts multiply with parameters on both backends and bytes do not wrap
    around; unless the program's example has integers there too (labels, indices). Native programs keep theirs.
    """
    if kind == "f" or kinds is None or name == ROWS:
        return kind == "f"
    return kinds[name] == "f" if name in kinds else kind in "iu"


def check_range(name: str, values: np.ndarray, dtype: str | None) -> np.ndarray:
    """The data, unless they are out of range where they go: floats of `dtype`, or as None says integers of 32 bits.

    Raises:
        DataError: they would become infinite, or other integers.
    """
    wider = values.dtype.kind in "fiu" and values.dtype.itemsize > (4 if dtype is None else np.dtype(dtype).itemsize)
    if not wider or not values.size or (dtype is None and values.dtype.kind == "f"):
        return values
    most = float(np.iinfo(np.int32).max if dtype is None else np.finfo(dtype).max)
    if max(float(values.max()), -float(values.min())) > most:
        far = values.flat[int(np.abs(values.astype(np.float64)).argmax())]
        raise DataError(
            f"Argument {name!r} holds {far:g}, which is out of the range of {dtype or 'int32'}; rescale the data, or "
            f"pass dtype='float64'."
        )
    return values


def given_rows(call: Callable[..., Any], ppl: Any, asked: bool = False) -> Callable[..., Any]:
    """`call`, which gets the row indices if it asks for them: by an argument, or through its namespace `ppl`.

    `asked`: the program's model or guide has the argument.
    """
    try:
        named = ROWS in inspect.signature(call).parameters
    except (TypeError, ValueError):  # a callable of C code
        named = False
    if ppl is None and not asked:
        return call

    def run(*args: Any, rows: Any = None, **kwargs: Any) -> Any:
        if ppl is not None:
            ppl.rows = rows
        try:
            return call(*args, **kwargs, **({ROWS: rows} if named else {}))
        finally:
            if ppl is not None:
                ppl.rows = None

    return run


def written(
    family: GuideFamily, ppl: Any, latents: Sequence[Latent], arguments: Sequence[str]
) -> Callable[..., None]:
    """The guide that a family writes for these sites, called like the model."""
    check_plates(type(family).__name__, latents)

    def guide(*args: Any, **kwargs: Any) -> None:
        data = {**dict(zip(arguments, args, strict=False)), **kwargs}
        family(Sketch(ppl, latents, {n: a for n, a in data.items() if a is not None}))

    return guide


def row_params(program: Program, ppl: Any, initial: Mapping[str, Any], total: int | None) -> frozenset[str]:
    """Parameters with an entry for every row: those that a namespace gave out, and of a native program that takes the
    row indices those whose first axis is as long as the data."""
    if ppl is not None and ppl.row_params:
        return frozenset(ppl.row_params)
    if not program.takes_rows or total is None:
        return frozenset()
    return frozenset(n for n, p in initial.items() if tuple(getattr(p, "shape", ()))[:1] == (total,))


def dreamt(
    program: Program, structure: Structure, batch: Call, values: Mapping[str, Any], cast: Callable[[Any, Any], Any]
) -> Call:
    """The data with what the model drew in the place of every observed site's own; `cast(value, like)` gives a dtype.

    Raises:
        LegalityError: a site's data are no argument of the program, so that the guide could not look at what was drawn.
    """
    arguments = batch.named(program.arguments)
    sites = {n: program.argument_of(n) for n, i in structure.sites.items() if i.role == "observed"}
    astray = sorted(n for n, a in sites.items() if arguments.get(a) is None)
    if astray or batch.known:
        why = f"the data of sites {astray} are no arguments of the program; pass observed={{site: argument}}"
        raise LegalityError(
            "The guide is to be trained on data that the model draws (sleep), but "
            + (why if astray else "entries are missing in the data, and what is drawn is complete")
            + "; or use an objective without a sleep phase, 'rws' with sleep = 0."
        )
    drawn = {a: values[n] for n, a in sites.items()}
    wrong = {n: (tuple(v.shape), tuple(arguments[n].shape)) for n, v in drawn.items() if v.shape != arguments[n].shape}
    if wrong:
        raise LegalityError(f"What the model draws has another shape than the data (drawn, data): {wrong}.")
    return batch.map_named(program.arguments, lambda n, a: cast(drawn[n], a) if n in drawn else a)


def inner_axis(dim: int | None, nesting: int, plate_dim: int | None) -> int | None:
    """Where a plate's dimension is among the inner axes of `[M, K, B, *inner]`; None for the data plate's own."""
    if dim is None or dim == plate_dim:
        return None
    axis = nesting + dim
    return axis - 1 if plate_dim is not None and dim > plate_dim else axis


def features(batch: Call, info: SiteInfo, structure: Structure) -> Array:
    """The first data argument's numbers by row, `[B, 1 .. 1, features]`, to broadcast over a site's batch shape."""
    x = next(a for a in batch.leaves if hasattr(a, "shape"))
    xp = ops.xp(x)
    x = xp.reshape(x, (x.shape[0], -1))
    if not info.local or structure.plate_dim is None:
        return xp.sum(x, axis=0) / x.shape[0]
    return xp.reshape(x, (x.shape[0],) + (1,) * (-structure.plate_dim - 1) + (-1,))


def losses(
    draws: Draws, objective: Objective, plan: Plan
) -> tuple[Array, Array | None, Array | None, dict[str, Array]]:
    """The objective on the views of one run: model loss, guide loss (None: the same), extra loss, next states."""
    guide_view = draws.view("guide", objective.verbs)
    loss = objective(guide_view)
    ledger = guide_view.ledger
    apart = plan.frozen or any(e.relaxes for e in plan.estimators.values())
    model, guide = loss.model, loss.guide
    if apart:
        guide = loss.model if guide is None else guide
        model = objective(draws.view("model", objective.verbs)).model
    extra = loss.extra
    for term in ledger.extra:
        extra = term if extra is None else extra + term
    states = {
        name: plan.estimators[name].update(state, ledger.signals[name]) if name in ledger.signals else state
        for name, state in draws.states.items()
    }
    return model, guide, extra, states


def find_data_plate(
    observed: Mapping[str, Sequence[tuple[str, int]]], asked: str | None, known: Sequence[str]
) -> str | None:
    """The outermost plate common to the observed sites (`observed`: site -> its plates as (name, dim))."""
    if asked == "none":
        return None
    if asked is not None:
        if asked not in known:
            raise ProgramError(
                f"data_plate={asked!r} was asked for, but the program's plates are {list(known)}; name one of them, or "
                f"'none' to take the whole program as one row."
            )
        return asked
    if not observed:
        return None
    common = set.intersection(*({name for name, _ in plates} for plates in observed.values()))
    if not common:
        if any(plates for plates in observed.values()):
            where = {site: [n for n, _ in plates] for site, plates in observed.items()}
            raise ProgramError(
                f"The observed sites share no plate ({where}), so which rows the data are is ambiguous; pass "
                f"data_plate='<name>', or data_plate='none' to take the whole program as one row."
            )
        return None
    dims = {name: dim for plates in observed.values() for name, dim in plates if name in common}
    return min(dims, key=lambda name: dims[name])


def check_param(name: str, known: Any, offered: Any) -> None:
    """Refuse a second initial value of another shape: both libraries would go on with the first without a word."""
    if offered is None or callable(offered) or np.shape(known) == np.shape(offered):
        return
    raise ProgramError(
        f"Parameter {name!r} is given initial values of shapes {tuple(np.shape(known))} and "
        f"{tuple(np.shape(offered))}; one name is one parameter, so give the second a name of its own."
    )


@contextlib.contextmanager
def first_run(program: Program, batch: Call) -> Iterator[None]:
    """The first run of a program on data of some shapes: what it raises then says on what, and where in its code.

    Raises:
        ProgramError: the program raised what is no error of ours.
    """
    try:
        yield
    except (PplLvmError, MemoryError):
        raise
    except Exception as error:
        named = batch.own.named(program.arguments)
        arrays = {n: a for n, a in named.items() if n != ROWS and hasattr(a, "shape")}
        shapes = ", ".join(f"{n} {str(a.dtype).removeprefix('torch.')} {tuple(a.shape)}" for n, a in arrays.items())
        frames = traceback.extract_tb(error.__traceback__)
        files = {c.__code__.co_filename for c in _functions(program) if hasattr(c, "__code__")}
        own = [f for f in frames if f.filename in files]
        where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
        raise ProgramError(
            f"Program {program.name!r} failed{where} when it was first run, on {shapes or 'no data'}: {told(error)}."
        ) from error


def _functions(program: Program) -> Iterator[Any]:
    for call in (program.model, program.guide):
        while isinstance(call, partial):
            call = call.func
        yield getattr(call, "__func__", call)


def starting_numbers(name: str, value: Any, dtype: str) -> np.ndarray:
    """A starting value of a parameter of this dtype, as an array of NumPy's.

    Raises:
        DataError: it holds no numbers, or one that is out of the range of `dtype`.
    """
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, ValueError) as error:  # lists of several lengths, what NumPy has no type for
        raise DataError(f"start: {name!r} makes no array of numbers: {first_line(error)}.") from error
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise DataError(f"start: {name!r} is {value!r}, of dtype {array.dtype}; give numbers.")
    if array.dtype.kind in "fiu" and np.dtype(dtype).kind == "f" and array.size:
        far = max(float(array.max()), -float(array.min()))
        if float(np.finfo(dtype).max) < far < np.inf:
            raise DataError(f"start: {name!r} holds {far:g} in absolute value, which is out of the range of {dtype}.")
    return array


def check_value(name: str, found: Any, needed: Sequence[int], inside: Callable[[], bool]) -> None:
    """Refuses a starting value that its parameter cannot have."""
    if np.shape(found) != tuple(needed):
        raise DataError(f"start: {name!r} has shape {tuple(np.shape(found))}, and the parameter {tuple(needed)}.")
    if not inside():
        raise DataError(
            f"start: {name!r} is outside the support of its parameter, or at its edge; values span "
            f"{float(found.min()):g} to {float(found.max()):g}."
        )
