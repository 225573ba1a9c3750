"""Rows in blocks and draws in chunks: what a fitted program is run on, whatever is asked of it."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ppl_lvm import backends, lookup, memory
from ppl_lvm.backends.base import KNOWN, ROWS, Call
from ppl_lvm.backends.forward import Anatomy, Forward
from ppl_lvm.backends.structure import Plan, nested
from ppl_lvm.errors import DataError, PplLvmError, ProgramError, TooLargeError, first_line
from ppl_lvm.program import Program

ENTRIES = 2**24
"""Numbers held at once while draws are evaluated, roughly: draws x rows x the size of a row."""

CHUNK = 2**20
"""The same for log weights."""

MOST_BYTES = 256
"""Bytes that a number of a row takes at most, with all that is computed from it, in programs that need no measuring."""

MOST_SHAPES = 16
"""Shapes of data that a fit keeps the program bound to, the last ones."""

HALVED = "; their noise is another one than where they fit"

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Some of the rows, the program bound to their shape, and the arrays as the backend has them."""

    number: int
    first: int
    call: Call
    bound: Any
    held: Call

    @property
    def rows(self) -> int:
        return int(self.bound.structure.rows)


@dataclass
class Fitted:
    """A program with its trained parameters on any rows: the mechanics under every method of a fit.

    Global latents are drawn once for all blocks of rows, and the rows of one draw share them; the noise of the rows'
    own latents is another one in every block and chunk.
    """

    program: Program
    backend: str
    bound: Any
    trained: Mapping[str, Any]
    example: Call
    """The arguments of the fit without their rows: shapes `[0, ...]` and dtypes."""
    marginal: Mapping[str, int] = field(default_factory=dict)
    """Auxiliary sites that the objective summed out of the guide's density, and so does every density of the fit."""
    notes: list[str] = field(default_factory=list, repr=False)
    """Gets a line about what had to be cut as memory ran out."""
    _weight: float | None = field(default=None, repr=False)
    _bounds: dict[Any, Any] = field(default_factory=dict, repr=False)
    _anatomy: list[Anatomy] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.structure.data_plate is not None and self.structure.plate_size is None and self.example.leaves:
            self._bounds[_shape(self.repeated(self.example, self.structure.rows))] = self.bound

    @property
    def structure(self) -> Any:
        return self.bound.structure

    @property
    def anatomy(self) -> Anatomy:
        """Found once, on made-up rows."""

        def look(call: Call) -> Anatomy:
            bound = self.bound_for(call)
            found: Anatomy = bound.anatomy(bound.batch(call))
            return found

        if not self._anatomy:
            self._anatomy.append(on_made_up(look, self.example, self.program, max(1, self.structure.rows)))
        return self._anatomy[0]

    def named(self, call: Call) -> dict[str, Any]:
        """The arguments that are given, by name."""
        return {n: a for n, a in call.named(self.program.arguments).items() if a is not None and n != ROWS}

    def sites(self, *roles: str, local: bool | None = None) -> list[str]:
        """Names of sites that have values."""
        return [
            n
            for n, i in self.structure.sites.items()
            if i.role in roles and not i.fixed and n not in self.anatomy.factors and local in (None, i.local)
        ]

    @property
    def globals(self) -> list[str]:
        """The latents that all rows share."""
        return [i.name for i in self.structure.drawn(local=False)]

    @property
    def drawn(self) -> list[str]:
        """The guide's sites that are draws."""
        return [i.name for i in self.structure.drawn()]

    # Rows.

    def check(self, call: Call, sequences: bool = False) -> Call:
        """The call, if its arrays have the fit's shapes; `sequences` may have been padded to another number of steps.

        Raises:
            DataError: they are not.
        """
        known = self.named(self.example)
        if len(call.args) > len(self.program.arguments) > 0:
            raise DataError(f"{len(call.args)} arrays were given; the program takes {list(self.program.arguments)}.")
        given = self.named(call)
        for name, array in given.items():
            if name not in known or not np.ndim(array):
                continue
            same = np.shape(array)[1:] == np.shape(known[name])[1:]
            if not same and not (sequences and self._of_other_lengths(name, call)):
                raise DataError(
                    f"Rows of {name!r} have shape {np.shape(array)[1:]}, the fit was made on "
                    f"{np.shape(known[name])[1:]}."
                )
        return call

    def _of_other_lengths(self, name: str, call: Call) -> bool:
        """Whether an argument differs from the fit's in the number of steps that sequences were padded to alone."""
        if name.removesuffix("_mask") in call.known:  # which tells the program of the steps of that argument
            name = name.removesuffix("_mask")
        if name not in call.known or name not in self.example.known:
            return False
        steps = np.asarray(call.known[name])
        entries = np.shape(self.example.known[name])[2:]
        return steps.shape[2:] == entries and bool((steps[:, :-1] | ~steps[:, 1:]).all())

    def blank(self, rows: int) -> Call:
        """Zeros for every argument of the fit, none of them missing."""
        return blank(self.example, self.program, rows)

    def repeated(self, call: Call, rows: int) -> Call:
        """The rows of a call, over again until there are enough."""
        return call.map(lambda a: np.resize(np.asarray(a), (rows, *np.shape(a)[1:])))

    def rows(self, call: Call) -> int:
        """How many rows a call has."""
        return len(call.leaves[0]) if call.leaves and self.structure.data_plate is not None else self.structure.rows

    def rows_in(self, block: Block, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A block's part of local sites' arrays `[rows, ...]`; those of global sites as they are."""
        part = slice(block.first, block.first + block.rows)
        return {n: v[part] if self.structure.sites[n].local else v for n, v in values.items()}

    def blocks(
        self, call: Call, work: Callable[[Block], T], draws: int = 16, whole: bool = False, before: int = 0
    ) -> Iterator[T]:
        """`work(block)` for blocks of rows small enough for that many draws of each at once.

        A block of which one draw does not fit in memory is halved, and the work on it begun anew. `before` is how many
        blocks of other rows there were, from whose noise theirs is set apart.
        """
        if self.structure.plate_size is not None:
            raise ProgramError(
                f"The program subsamples plate {self.structure.data_plate!r} itself, so rows cannot be asked "
                f"for; size the plate by its data (len(x)) and let batch_size choose the rows."
            )
        if self.structure.data_plate is None or not call.leaves or whole or self.globals_look_at_rows:
            bound = self.bound_for(call)
            yield work(Block(before, 0, call, bound, bound.batch(call)))
            return
        rows, number, first = len(call.leaves[0]), before, 0
        size = max(1, min(rows, ENTRIES // (draws * self.width(call))))
        while first < rows:
            part = call.map(operator.itemgetter(slice(first, first + size)))
            bound = self.bound_for(part)
            block = Block(number, first, part, bound, bound.batch(part))
            try:
                found = work(block)
            except TooLargeError:
                if block.rows == 1:
                    raise
                size = math.ceil(block.rows / 2)
                self._say(f"memory: a draw of {block.rows:,} rows at once did not fit, and went on with {size:,}")
                continue
            yield found
            number, first = number + 1, first + block.rows

    @property
    def globals_look_at_rows(self) -> bool:
        """Whether the guide's global latents are functions of the data, so that rows cannot be cut into blocks."""
        return any(self.anatomy.guide_arguments.get(n) for n in self.globals)

    def width(self, call: Call) -> int:
        """Numbers in a row."""
        return sum(int(np.prod(np.shape(a)[1:], dtype=int)) for a in call.leaves) or 1

    def bound_for(self, call: Call) -> Any:
        key = _shape(call)
        if key not in self._bounds:
            self._bounds[key] = self.bound.on(call)
            while len(self._bounds) > MOST_SHAPES:
                del self._bounds[next(iter(self._bounds))]
        return self._bounds[key]

    # Draws.

    def chunks(
        self,
        draws: int,
        block: Block,
        seed: int,
        entries: int,
        work: Callable[[Chunk], T],
        particles: int = 1,
        apart: tuple[int, ...] = (),
    ) -> Iterator[tuple[Chunk, T]]:
        """Chunks of draws, each with `work(chunk)`, which gives arrays of numpy.

        They are equal, as every size would be compiled anew: the last one has too many. They are as large as the limit
        of memory lets them be by what shapes tell; where memory runs out all the same, they are halved and go on.
        `apart` sets the noise apart from that of other runs on the same block.

        Raises:
            TooLargeError: one draw does not fit.
        """
        most = max(1, entries // (block.rows * self.width(block.call) * particles))
        most = min(most, self._fitting(block, min(most, draws) * particles) // particles)
        size = math.ceil(draws / math.ceil(draws / max(1, most)))
        library, first, i = backends.load(self.backend), 0, 0
        while first < draws:
            chunk = Chunk(first, size, min(size, draws - first), self.key(seed, block.number, i, *apart))
            try:
                found = work(chunk)
            except Exception as error:
                if not library.out_of_memory(error):
                    raise
                of = f"{size * particles:,} draws of {block.rows:,} rows at once"
                if size == 1:
                    raise TooLargeError(f"{of} do not fit in memory ({first_line(error)}).") from error
                size = math.ceil(size / 2)
                self._say(f"memory: {of} did not fit, and went on with {size * particles:,}")
                continue
            yield chunk, found
            first, i = first + size, i + 1

    def check_room(self, draws: int, rows: int, names: Iterable[str], way: str = "") -> None:
        """Refuses a result `[draws, rows, ...]` of these sites that the machine has no memory for.

        Raises:
            TooLargeError: it is larger than all memory there is, beside what else is held.
        """
        anatomy, sites = self.anatomy, self.structure.sites
        of_rows = sum(
            math.prod(anatomy.shapes[n]) * np.dtype(anatomy.dtypes[n]).itemsize for n in names if sites[n].local
        )
        size, there = draws * rows * of_rows, memory.machine()
        if size > there:
            most = there // max(1, 2 * rows * of_rows)
            fewer = f"{most:,} draws would fit" if most else "not one draw of all rows would fit, so ask for fewer rows"
            raise TooLargeError(
                f"{draws:,} draws of {rows:,} rows are {memory.said(size)} of values, and there are "
                f"{memory.said(there)} of memory; {fewer}{way}."
            )

    def _say(self, message: str) -> None:
        """One message about what was halved: the last one."""
        self.notes[:] = [n for n in self.notes if not n.startswith("memory: ")] + [message + HALVED]

    def _fitting(self, block: Block, draws: int) -> int:
        """How many draws of a block fit in the limit of memory, of those that are wanted."""
        limit = memory.limit(backends.load(self.backend).device_memory())
        numbers = draws * block.rows * self.width(block.call)
        if numbers * MOST_BYTES <= limit:
            return draws
        return int(min(draws, limit // max(1.0, self.weight * block.rows)))

    @property
    def weight(self) -> float:
        """Bytes that a draw of a row takes while it is evaluated; found once, at the fit's own number of rows."""
        rows = max(1, self.structure.rows)

        def look(call: Call) -> float:
            bound, guess = self.bound_for(call), 8.0 * self.width(call)
            held = bound.batch(call)
            two, four = (bound.peak(self.trained, held, self.plan(bound, draws)) for draws in (2, 4))
            return guess if two is None or four is None else max(guess, (four - two) / 2 / rows)

        if self._weight is None:
            self._weight = on_made_up(look, self.example, self.program, rows)
        return self._weight

    def plan(self, bound: Any, draws: int) -> Plan:
        """Draws in the inner axis, or in the outer one where every draw has its own globals."""
        globals_ = any(not i.local for i in bound.structure.drawn())
        return self.plan_of(bound, *((1, draws) if globals_ else (draws, 1)))

    def plan_of(self, bound: Any, K: int, M: int) -> Plan:
        return Plan.of_values(bound.structure, K, M, nested(bound.structure, self.marginal))

    def as_table(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Values `[draws, ...]` of sites as a table of `plan` has them; None where there are none."""
        outer = bool(self.globals)
        sites = self.structure.sites
        return {n: v if not sites[n].local else v[:, None] if outer else v[None] for n, v in values.items()} or None

    def key(self, *path: int) -> Any:
        return backends.load(self.backend).key_of(int(np.random.SeedSequence(path).generate_state(1)[0]))

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(backends.load(self.backend).to_numpy(x))

    def global_draws(self, call: Call, draws: int, seed: int) -> dict[str, np.ndarray]:
        """`[draws, ...]` of every global latent from the guide; they are the same for all rows."""
        names = self.globals
        if not names:
            return {}

        def of_block(block: Block) -> dict[str, np.ndarray]:
            def work(chunk: Chunk) -> dict[str, np.ndarray]:
                table = block.bound.evaluate(self.trained, block.held, chunk.key, self.plan(block.bound, chunk.size))
                return {n: self.numpy(table[n]["value"])[: chunk.wanted] for n in names}

            # Torch's noise is one stream: with the same key, rows' latents would be drawn from that of the globals.
            return joined([found for _, found in self.chunks(draws, block, seed, ENTRIES, work, apart=(1,))], 0)

        return next(self.blocks(call, of_block))

    def simulate(
        self,
        block: Block,
        key: Any,
        draws: int,
        how: Forward,
        given: Mapping[str, np.ndarray] | None = None,
        fixed: Mapping[str, np.ndarray] | None = None,
        masks: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, dict[str, np.ndarray]]:
        """A forward run as numpy arrays (see `simulate` of a bound)."""
        made = block.bound.simulate(self.trained, block.held, key, draws, how, given, fixed, masks)
        return {label: {n: self.numpy(v) for n, v in values.items()} for label, values in made.items()}

    # Shapes: a table keeps an axis of one for every plate dimension that a site is not in.

    def plates_of(self, name: str) -> tuple[list[int], list[str]]:
        """Axes of a row's value (of a global site's whole value) that are no plate of its, and names of those that are.

        Event axes are in neither.
        """
        anatomy, structure, info = self.anatomy, self.structure, self.structure.sites[name]
        spread = info.local and structure.plate_dim is not None
        count = structure.nesting if spread else anatomy.ranks[name]
        dims = [d for d in range(-count, 0) if not (spread and d == structure.plate_dim)]
        own = anatomy.plates[name]
        shape = anatomy.shapes[name]
        empty = [axis for axis, d in enumerate(dims) if d not in own and shape[axis] == 1]
        return empty, [own.get(d, "") for d in dims if d in own or shape[dims.index(d)] != 1]

    def squeezed(self, name: str, value: np.ndarray, lead: int) -> np.ndarray:
        """A table's value without the axes of plates that its site is not in; `lead` axes come before the row's."""
        empty, _ = self.plates_of(name)
        return value.squeeze(tuple(lead + axis for axis in empty)) if empty else value

    def own_rank(self, name: str) -> int:
        """Axes of one value of a site."""
        return len(self.anatomy.shapes[name]) - len(self.plates_of(name)[0])

    def as_fixed(self, given: Mapping[str, Any], rows: int) -> dict[str, np.ndarray]:
        """Given values of sites as tables have them: `[rows, ...]` for local sites; one row's value is for all rows.

        Raises:
            DataError: unknown sites (the nearest one is named), wrong shapes, fractions for discrete sites, values that
                are not finite.
        """
        anatomy, known = self.anatomy, self.sites("latent", "observed")
        found: dict[str, np.ndarray] = {}
        for name, value in given.items():
            if name not in known:
                raise DataError(f"There is no site {name!r} to give values to. {lookup.valid(name, known, 'Sites')}")
            array = np.asarray(value)
            if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
                raise DataError(f"Values of {name!r} must be finite numbers; found {_described(array)}.")
            shape = anatomy.shapes[name]
            empty, _ = self.plates_of(name)
            own = tuple(size for axis, size in enumerate(shape) if axis not in empty)
            local = self.structure.sites[name].local
            lead = (rows,) if local else ()
            allowed = [(), own, *([(rows, *own)] if local else [])]
            if array.shape not in allowed:
                raise DataError(
                    f"Values of {name!r} have shape {array.shape}; a value has {own}"
                    + (f", one for each of {rows} rows {(rows, *own)}." if local else ".")
                )
            if name in anatomy.discrete and (array != np.round(array)).any():
                raise DataError(f"Site {name!r} is discrete and was given {_described(array)}; give whole numbers.")
            each = local and array.shape == (rows, *own)
            cast = array.astype(anatomy.dtypes[name])
            cast = cast.reshape(lead * each + shape) if array.shape else cast
            found[name] = np.array(np.broadcast_to(cast, lead + shape))
        return found

    def check_support(self, block: Block, fixed: Mapping[str, np.ndarray]) -> None:
        """Refuses given values that their sites cannot take."""
        wrong = block.bound.outside(self.trained, block.held, fixed) if fixed else []
        if wrong:
            span = fixed[wrong[0]]
            raise DataError(
                f"Values of {wrong[0]!r} from {span.min():g} to {span.max():g} are outside the support of its "
                f"distribution."
            )


def blank(example: Call, program: Program, rows: int, rising: bool = False) -> Call:
    """Zeros in the shapes and dtypes of a call, none of them missing; or, as times are, numbers that rise in a row."""

    def made(name: str, a: Any) -> np.ndarray:
        shape, dtype = (rows, *np.shape(a)[1:]), np.asarray(a).dtype
        if name.endswith(KNOWN):
            return np.ones(shape, dtype)
        if rising and dtype.kind == "f" and len(shape) > 1:
            return np.arange(shape[1], dtype=dtype).reshape(-1, *[1] * (len(shape) - 2)) + np.zeros(shape, dtype)
        return np.zeros(shape, dtype)

    return example.map_named(program.arguments, made)


def on_made_up(work: Callable[[Call], T], example: Call, program: Program, rows: int) -> T:
    """Work that the values of data are nothing to: on zeros, or on numbers that rise, as times have to in programs.

    Raises:
        PplLvmError: the program takes neither; what it says of zeros.
    """
    try:
        return work(blank(example, program, rows))
    except PplLvmError:
        with contextlib.suppress(PplLvmError):
            return work(blank(example, program, rows, rising=True))
        raise


@dataclass(frozen=True)
class Chunk:
    """`size` draws of which the first `wanted` are kept; `first` is the number of the first one."""

    first: int
    size: int
    wanted: int
    key: Any

    def of(self, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This chunk of arrays `[draws, ...]`, filled up to its size."""
        return {
            n: np.resize(v[self.first : self.first + self.wanted], (self.size, *v.shape[1:])) for n, v in draws.items()
        }


def _shape(call: Call) -> tuple[Any, ...]:
    return tuple((np.shape(a), np.asarray(a).dtype.str) for a in call.leaves)


def joined(parts: list[dict[str, np.ndarray]], axis: int) -> dict[str, np.ndarray]:
    """Arrays by name, put together along an axis."""
    return {n: np.concatenate([p[n] for p in parts], axis) for n in parts[0]} if parts else {}


def _described(array: np.ndarray) -> str:
    return f"{array!r}" if array.size == 1 else f"dtype {array.dtype} of shape {array.shape}"

