"""Data as they come, to a program's arguments: arrays, frames, ragged sequences, missing entries, batches."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ppl_lvm import lookup
from ppl_lvm.backends.base import KNOWN, ROWS, Call
from ppl_lvm.errors import DataError, ProgramError, first_line
from ppl_lvm.program import Program

Missing = Literal["mask"] | None
NUMBERS = "fiub"


def pad(sequences: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences `[T_i, ...]` as one array `[N, T, ...]`, T the longest, zeros behind each; and a mask `[N, T]`.

    The mask is True where a sequence has an entry.

    Raises:
        DataError: there is none, one is empty, or their entries differ in shape.

    Example:
        >>> values, mask = pad([[1.0, 2.0], [3.0]])
        >>> values.tolist(), mask.tolist()
        ([[1.0, 2.0], [3.0, 0.0]], [[True, True], [True, False]])
    """
    arrays = [_numpy(s, f"sequence {i}") for i, s in enumerate(sequences)]
    if not arrays:
        raise DataError("There are no sequences to pad; pass at least one array [T, ...].")
    for i, a in enumerate(arrays):
        if a.ndim == 0 or a.shape[0] == 0 or a.shape[1:] != arrays[0].shape[1:]:
            raise DataError(
                f"Sequence {i} has shape {a.shape}, the first {arrays[0].shape}; sequences are arrays [T, ...] of one "
                f"or more steps that differ in T alone."
            )
    longest = max(len(a) for a in arrays)
    values = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=np.result_type(*arrays))
    mask = np.arange(longest) < np.array([[len(a)] for a in arrays])
    for row, a in zip(values, arrays, strict=True):
        row[: len(a)] = a
    return values, mask


def read(data: object, program: Program, missing: Missing = None, notes: list[str] | None = None) -> Call:
    """The arguments that `program` is called with, checked; see `fit` for what data may be.

    Args:
        data: anything but batches.
        program: names the arguments.
        missing: "mask" takes NaN, and -1 among integers, for entries that are not known. They become zeros, and what
            is known travels with the data (`Call.known`).
        notes: gets a line about columns that are not used.

    Raises:
        DataError: what was given is no array of finite numbers, rows differ in number, or names do not fit.
    """
    if isinstance(data, Call):
        return data
    if missing not in (None, "mask"):
        raise DataError(f"missing={missing!r} was asked for; it is None (refuse NaN) or 'mask' (leave it out).")
    wanted = _Arguments.of(program)
    given = wanted.call(data, notes)
    columns = _cells(given, missing)
    named = {name or f"number {i}": c for (name, i), c in columns.items()}
    lengths = {n: len(c.values) for n, c in named.items()}
    if len({*lengths.values()}) > 1:
        raise DataError(f"Arguments share their first axis, the rows; found {lengths} of them.")
    if 0 in lengths.values():
        shapes = {n: c.values.shape for n, c in named.items()}
        raise DataError(f"The data have no rows: their first axis, the rows, is empty in shapes {shapes}.")
    masks: dict[str, np.ndarray] = {f"{n}{KNOWN}": c.known for n, c in named.items() if c.known is not None}
    derived = wanted.derived(named)
    in_order = not derived or all(name is None for name, _ in given)
    every = {key: columns[key].values if key in columns else None for key in given}  # None stays in its place
    args = [a for (_, i), a in every.items() if i is not None and in_order]
    kwargs = {n: a for (n, i), a in every.items() if n is not None and not (i is not None and in_order)}
    return Call(tuple(args), {**kwargs, **derived, **masks})


def of_sequences(data: object) -> bool:
    """Whether an argument is given as a list of sequences, which are padded to the longest."""
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, tuple) else (data,)
    return any(_sequences(part, "data") is not None for part in parts)


def as_given(call: Call, program: Program) -> dict[str, Any]:
    """Arguments by name with NaN for entries that are not known, as floats where there are any."""
    named = call.named(program.arguments)
    for name, known in call.known.items():
        if not np.all(known):
            named[name] = np.where(known, np.asarray(named[name]), np.nan)
    return named


def check_missing(call: Call, bound: Any, program: Program) -> None:
    """Refuses missing entries that no density can leave out.

    Raises:
        DataError: an argument with missing entries is the value of no site, or of one whose density is of several
            entries at once.
    """
    takes = _Arguments.of(program)
    for argument, known in call.known.items():
        known = np.asarray(known)
        if known.all():
            continue
        sites = [s for s in bound.structure.sites if program.argument_of(s) == argument]
        if not sites and not takes.told_of(argument):
            raise DataError(
                f"Argument {argument!r} has {int((~known).sum())} missing entries (of {known.size}) and no site has "
                f"its values, so they would enter as zeros; impute them, or give the program an argument "
                f"'{argument}_mask', which is True where {argument!r} is known."
            )
        for site in sites:
            joint = bound.joint_dims(site)
            if joint == 0 or known.ndim < joint:
                continue
            flat = known.reshape(*known.shape[: known.ndim - joint], -1)
            torn = np.argwhere(flat.any(-1) & ~flat.all(-1))
            if len(torn):
                raise DataError(
                    f"Row {int(torn[0][0])} of {argument!r} is known in part, and the density of site {site!r} is of "
                    f"all its {flat.shape[-1]} entries at once; impute it, drop the row's other entries too, or use a "
                    f"distribution of independent entries (to_event)."
                )


@dataclass(frozen=True)
class _Column:
    values: np.ndarray
    known: np.ndarray | None
    steps: np.ndarray | None = None
    """`[N, T]` of padded sequences."""


def _cells(
    call: Mapping[tuple[str | None, int | None], object], missing: Missing
) -> dict[tuple[str | None, int | None], _Column]:
    return {key: _column(a, key[0] or f"number {key[1]}", missing) for key, a in call.items() if a is not None}


def _column(given: object, name: str, missing: Missing) -> _Column:
    steps = None
    if isinstance(given, str | bytes | Mapping):
        raise DataError(f"Argument {name!r} is {given!r}; it must be an array, rows first.")
    sequences = _sequences(given, name)
    if sequences is not None:
        values, steps = pad(sequences)
    else:
        values = _numpy(given, name)
    if values.dtype.kind not in NUMBERS:
        raise DataError(
            f"Argument {name!r} has dtype {values.dtype}; data must be numbers. Encode categories as integers, and "
            f"missing entries as NaN (with missing='mask')."
        )
    if values.ndim == 0:
        raise DataError(f"Argument {name!r} is the number {values}; its first axis must be rows, as in [{values}].")
    values = _usual(values, name)
    known = None
    if steps is not None:
        known = np.broadcast_to(steps.reshape(steps.shape + (1,) * (values.ndim - 2)), values.shape)
    holes = np.ma.getmaskarray(given) if isinstance(given, np.ma.MaskedArray) else None
    if values.dtype.kind == "f":
        holes = np.isnan(values) if holes is None else holes | np.isnan(values)
        bad = np.argwhere(np.isinf(values) & ~holes)
        if len(bad):
            raise DataError(
                f"Argument {name!r} holds {len(bad)} infinite values, the first at index "
                f"{tuple(int(i) for i in bad[0])}; remove or impute them first."
            )
    elif missing and values.dtype.kind == "i":
        holes = (values == -1) if holes is None else holes | (values == -1)
    if missing is None and holes is not None and holes.any():
        first = tuple(int(i) for i in np.argwhere(holes)[0])
        raise DataError(
            f"Argument {name!r} holds NaN or masked entries ({int(holes.sum())} of {values.size}, the first at index "
            f"{first}); impute them, or pass missing='mask' to leave their densities out."
        )
    if missing:
        here = np.ones(values.shape, dtype=bool) if holes is None else ~holes
        known = here if known is None else known & here
        values = np.where(here, values, np.zeros((), values.dtype))
    return _Column(values, None if known is None else np.array(known), steps)


def _numpy(a: Any, name: str) -> np.ndarray:
    """An array of NumPy's from one of torch or JAX, a column of a frame, or numbers in lists.

    Raises:
        DataError: NumPy cannot hold it.
    """
    given = type(a).__name__
    try:
        if hasattr(a, "detach"):
            a = a.detach().cpu()
            if a.is_floating_point() and a.element_size() < 4:  # some of these NumPy does not have
                a = a.float()
        if not hasattr(a, "dtype") or not hasattr(a, "shape") or hasattr(a, "to_numpy"):
            a = _of_column(a)
        return np.asarray(a.filled(0) if isinstance(a, np.ma.MaskedArray) else a)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"Argument {name!r} is a {given} that makes no array of numbers ({first_line(error)}); pass a dense array, "
            f"rows first."
        ) from error


def _usual(values: np.ndarray, name: str) -> np.ndarray:
    """The same numbers in a dtype that both libraries have: of this machine's byte order, no longer than 64 bits."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "f" and size > 8:
        with np.errstate(over="ignore"):  # what is infinite then is refused as such
            return values.astype(np.float64)
    if kind == "f" and size < 4:
        return values.astype(np.float32)
    if kind == "u" and size > 1:
        if values.size and values.max() > np.iinfo(np.int64).max:
            raise DataError(
                f"Argument {name!r} holds {values.max()}, which is no 64-bit integer with a sign; pass it as floats."
            )
        return values.astype(np.int64)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _of_column(a: Any) -> Any:
    if not hasattr(a, "to_numpy"):
        return a
    found = a.to_numpy()
    if found.dtype == object and hasattr(a, "isna") and a.isna().any():
        # Nullable columns of numbers; what is no number stays an object and is refused by its dtype.
        try:
            return a.to_numpy(dtype="float64", na_value=np.nan)
        except (TypeError, ValueError):
            return found
    return found


def _sequences(given: object, name: str) -> list[np.ndarray] | None:
    """The sequences in a list of arrays, or in an array of arrays; None where it is something else."""
    listed = isinstance(given, list) or (isinstance(given, np.ndarray) and given.dtype == object and given.ndim > 0)
    if not listed or not len(given):  # type: ignore[arg-type]
        return None
    if any(isinstance(a, str | bytes | Mapping | tuple) or a is None for a in given):  # type: ignore[attr-defined]
        raise DataError(
            f"Argument {name!r} is a list of {type(given[0]).__name__}s; a list holds one array [T, ...] for each "  # type: ignore[index]
            f"sequence. Batches come from an object that is gone through again at every epoch, such as a DataLoader."
        )
    arrays = [_numpy(a, f"{name}[{i}]") for i, a in enumerate(given)]  # type: ignore[arg-type,var-annotated]
    return arrays if all(a.ndim for a in arrays) else None


@dataclass(frozen=True)
class _Arguments:
    """What a program's model can be called with."""

    program: str
    names: tuple[str, ...]
    """In order; positional ones first."""
    positional: int
    required: frozenset[str]
    closed: bool
    """Nothing but these names is taken."""
    indexed: bool = False
    """The engine gives the row indices."""
    native: bool = False
    """Its own code says what None means."""

    @classmethod
    def of(cls, program: Program) -> _Arguments:
        call = program.model
        if not program.portable:
            call = getattr(call, "forward", call)
        try:
            parameters = list(inspect.signature(call).parameters.values())[int(program.portable) :]
        except (TypeError, ValueError):
            return cls(program.name, program.arguments, len(program.arguments), frozenset(), False)
        kinds = inspect.Parameter
        positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        # Keyword-only parameters of a portable program are its options.
        named = [] if program.portable else [p for p in parameters if p.kind is kinds.KEYWORD_ONLY]
        return cls(
            program.name,
            tuple(p.name for p in [*positional, *named]),
            len(positional),
            frozenset(p.name for p in [*positional, *named] if p.default is p.empty),
            not any(p.kind in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL) for p in parameters),
            program.takes_rows,
            not program.portable,
        )

    @property
    def data(self) -> list[str]:
        """Arguments that the caller gives: those that no other one is told by."""
        told = {t for n in self.names for t in _told_by(n)}
        own = {"lengths", ROWS} if self.indexed else {"lengths"}
        return [n for n in self.names if n not in told | own]

    def told_of(self, argument: str) -> bool:
        return bool({*_told_by(argument), "lengths"} & {*self.names})

    def call(self, data: object, notes: list[str] | None) -> dict[tuple[str | None, int | None], object]:
        """Values by (name, position); one of the two may be None."""
        if data is None:
            self._check_names([])
            return {}
        if _is_frame(data):
            data = self._of_frame(data, notes)
        elif not isinstance(data, Mapping | tuple) and isinstance(getattr(data, "name", None), str):
            data = self._of_series(data)
        if isinstance(data, Mapping):
            self._check_names([str(n) for n in data], [str(n) for n, a in data.items() if a is None])
            return {(str(n), None): a for n, a in data.items()}
        values = data if isinstance(data, tuple) else (data,)
        given = self.data if len(values) <= len(self.data) else list(self.names[: self.positional])
        if self.closed and len(values) > len(given):
            raise DataError(
                f"Program {self.program!r} takes {len(given)} argument{'s' * (len(given) != 1)} ({', '.join(given)}), "
                f"but {len(values)} were given."
            )
        names = [*given, *[None] * len(values)]
        if self.closed:
            given_ = {n: a for n, a in zip(names, values, strict=False) if n is not None}
            self._check_names(list(given_), [n for n, a in given_.items() if a is None])
        return {(names[i], i): a for i, a in enumerate(values)}

    def _check_names(self, given: Sequence[str], nothing: Sequence[str] = ()) -> None:
        """Refuses names that there are not, and the lack of others; `nothing` are those that were given as None."""
        for name in given:
            if self.closed and name not in self.names:
                raise DataError(
                    f"Program {self.program!r} has no argument {name!r}. {lookup.valid(name, self.names, 'Arguments')}"
                )
        there = [n for n in given if self.native or n not in nothing]
        lacking = [n for n in self.data if n in self.required and n not in there]
        if lacking:
            raise DataError(
                f"Program {self.program!r} needs data for {', '.join(map(repr, lacking))}; given were "
                f"{', '.join(map(repr, there)) or 'none'}."
            )

    def _of_frame(self, frame: Any, notes: list[str] | None) -> object:
        names = [str(c) for c in getattr(frame, "column_names", None) or frame.columns]
        columns = dict(zip(names, getattr(frame, "column_names", None) or frame.columns, strict=True))
        if not names:
            raise DataError("The frame has no columns; pass one with a column for each variable.")
        needed = [n for n in self.data if n in self.required]
        found = [n for n in names if n in self.names]
        if not found and len(needed or self.data) == 1:
            cells = {n: _of_column(frame[columns[n]]) for n in names}
            wrong = [n for n, c in cells.items() if c.dtype.kind not in NUMBERS]
            if wrong:
                raise DataError(
                    f"Columns {wrong} of the frame are no numbers (dtype {cells[wrong[0]].dtype}); encode or drop them."
                )
            return np.stack(list(cells.values()), axis=1)
        for name in needed:
            if name not in found:
                raise DataError(
                    f"The frame has no column {name!r}, which program {self.program!r} needs. "
                    f"{lookup.valid(name, names, 'Columns')}"
                )
        unused = [n for n in names if n not in found]
        if unused and notes is not None:
            notes.append(f"data: columns {', '.join(unused)} are no arguments of the program and not used")
        return {n: frame[columns[n]] for n in found}

    def _of_series(self, series: Any) -> object:
        if series.name in self.names:
            return {series.name: series}
        if len([n for n in self.data if n in self.required] or self.data) == 1:
            return (series,)
        raise DataError(
            f"The series {series.name!r} is no argument of program {self.program!r}. "
            f"{lookup.valid(series.name, self.names, 'Arguments')}"
        )

    def derived(self, given: Mapping[str, _Column]) -> dict[str, np.ndarray]:
        """`x_mask`, and `x_lengths` or `lengths`, where the program takes them and they were not given."""
        found: dict[str, np.ndarray] = {}
        for name, column in given.items():
            mask, lengths = _told_by(name)
            steps = column.steps
            if mask in self.names:
                found[mask] = column.known if steps is None else steps  # type: ignore[assignment]
                if found[mask] is None:
                    found[mask] = np.ones(column.values.shape, dtype=bool)
            whole = column.values.shape[1] if column.values.ndim > 1 else 1
            count = np.full(len(column.values), whole) if steps is None else steps.sum(1)
            if lengths in self.names:
                found[lengths] = count
            if "lengths" in self.names and (steps is not None or "lengths" not in found):
                found["lengths"] = count
        return {n: a for n, a in found.items() if n not in given}


def _told_by(argument: str) -> tuple[str, str]:
    return f"{argument}_mask", f"{argument}_lengths"


def _is_frame(data: object) -> bool:
    """A table with named columns, of pandas, polars or pyarrow."""
    named = hasattr(data, "column_names") or hasattr(data, "columns")
    return named and hasattr(data, "__getitem__") and not isinstance(data, Mapping)


def is_batches(data: object) -> bool:
    """Whether data come as batches: something to go through that is no array, frame, list, tuple or mapping."""
    if data is None or isinstance(data, Call | Mapping | list | tuple | str | bytes) or _is_frame(data):
        return False
    return hasattr(data, "__iter__") and not hasattr(data, "shape") and not hasattr(data, "to_numpy")


class Batches:
    """Rows that come in batches of one size, in their own order, anew at every epoch.

    `size` is B, `rows` is N: the length of `source.sampler` or `source.dataset` where one is offered, else counted in a
    first pass. The last, smaller batch of an epoch is left out. An order that the source draws at random (a DataLoader
    with `shuffle=True`) is a function of the source's own generator and not of the fit's seed.

    Raises:
        DataError: the source can be gone through only once, has no batches, or batches of several sizes.
    """

    def __init__(self, source: Iterable[Any], read: Callable[[object], Call], notes: list[str]) -> None:
        stream = iter(source)
        if stream is source:
            raise DataError(
                f"Batches come from a {type(source).__name__}, which can be gone through only once, and every epoch "
                f"starts anew; pass an object whose __iter__ makes a new iterator (a DataLoader, a class of yours), or "
                f"all rows as arrays."
            )
        self._source, self._read, self._notes = source, read, notes
        first = next(stream, None)
        if first is None:
            raise DataError("There are no batches: the iterable ended before the first one.")
        call = self._batch(first)
        if not call.leaves:
            raise DataError("The first batch holds no arrays.")
        self.first = Call(call.args, call.kwargs, sample=True)
        self.size = len(call.leaves[0])
        offered = [getattr(source, part, None) for part in ("sampler", "dataset")]
        sized = next((part for part in offered if hasattr(part, "__len__")), None)
        if sized is not None:
            self.rows = len(sized)  # a sampler goes through a part of its data set, the rows of an epoch
        else:
            self.rows = sum(len(self._batch(b).leaves[0]) for b in source)
            notes.append(f"data: {self.rows} rows were counted in a first pass over the batches")
        self._next, self._stream = 0, self._epochs()
        self.seen = {0: 0}
        """A checksum of all batches before a step, for every step of the last chunk and the one behind it."""

    @property
    def kind(self) -> dict[str, Any]:
        """What the batches have in common, whatever their order."""
        shapes = {i: f"{np.asarray(a).dtype} {np.shape(a)[1:]}" for i, a in enumerate(self.first.leaves)}
        return {"rows": self.rows, "size": self.size, "batches of": shapes}

    def _batch(self, given: object) -> Call:
        return self._read(tuple(given) if isinstance(given, list) else given)

    def _epochs(self) -> Iterator[Call]:
        while True:
            full, short = 0, None
            for batch in map(self._batch, self._source):
                shapes = [np.shape(a)[1:] for a in batch.leaves]
                if shapes != [np.shape(a)[1:] for a in self.first.leaves]:
                    raise DataError(
                        f"Batch {full} of an epoch has rows of shapes {shapes}, the first one of "
                        f"{[np.shape(a)[1:] for a in self.first.leaves]}; batches are of one shape (pad sequences to "
                        f"one length)."
                    )
                rows = len(batch.leaves[0])
                if short is not None or rows > self.size:
                    raise DataError(
                        f"Batches differ in size: {self.size} rows in the first, {short or rows} in another that is "
                        f"not the last; use one batch size."
                    )
                if rows < self.size:
                    short = rows
                    continue
                full += 1
                yield batch
            if not full:
                raise DataError(f"An epoch had no batch of {self.size} rows, the size of the first one.")
            note = f"data: an epoch's last batch of {short} rows is left out, as the others have {self.size}"
            if short is not None and note not in self._notes:
                self._notes.append(note)

    def go_to(self, step: int) -> None:
        """To the batch of this step.

        The batches before it are gone through again: an order that is drawn anew in every epoch is then the one that an
        unbroken run meets, if the source draws it from a seed.
        """
        if step != self._next:
            self._next, self._stream, self.seen = 0, self._epochs(), {0: 0}
            while self._next < step:
                self._taken()
                self.seen = {self._next: self.seen[self._next]}

    def _taken(self) -> Call:
        batch, seen = next(self._stream), self.seen[self._next]
        self._next += 1
        for a in batch.leaves:
            seen = zlib.crc32(np.ascontiguousarray(a).tobytes(), seen)
        self.seen[self._next] = seen
        return batch

    def chunk(self, first: int, steps: int, room: int) -> tuple[Call, np.ndarray]:
        """The rows of `steps` batches from step `first` on, repeated to `room` batches, and the indices `[room, B]`."""
        self.go_to(first)
        self.seen = {first: self.seen[first]}
        batches = [self._taken() for _ in range(steps)]

        def joined(*parts: Any) -> np.ndarray:
            rows = np.concatenate([np.asarray(p) for p in parts])
            return np.resize(rows, (room * self.size, *rows.shape[1:]))

        args = tuple(None if a[0] is None else joined(*a) for a in zip(*(b.args for b in batches), strict=True))
        names = batches[0].kwargs
        kwargs = {n: None if names[n] is None else joined(*(b.kwargs[n] for b in batches)) for n in names}
        return Call(args, kwargs), np.arange(room * self.size).reshape(room, self.size)


def observe(program: Program, observed: Mapping[str, str] | None, call: Call) -> Program:
    """The program with `observed = {site: argument}` for sites that are not called like the data that they have."""
    if not observed:
        return program
    names = list(call.named(program.arguments))
    for site, argument in observed.items():
        if argument not in names:
            raise ProgramError(
                f"observed={{{site!r}: {argument!r}}} names no data argument. "
                f"{lookup.valid(argument, names, 'Arguments')}"
            )
    return replace(program, observed=tuple(sorted(observed.items())))


def check_observed(program: Program, structure: Any) -> None:
    """Refuses a site of `observed` that the program does not have, or that is only latent in it."""
    sites = [n for n, i in structure.sites.items() if i.role == "observed"]
    for site, argument in program.observed:
        if site not in structure.sites:
            raise ProgramError(
                f"observed={{{site!r}: {argument!r}}} names no observed site. {lookup.valid(site, sites, 'Sites')}"
            )
