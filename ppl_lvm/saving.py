"""A fit as a folder: what is written of it, and what the manifest of such a folder has to look like."""

from __future__ import annotations

import functools
import inspect
import json
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ppl_lvm import backends, fingerprint, lookup, store
from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.backends.base import ROWS, Call
from ppl_lvm.catalogue import to_dict
from ppl_lvm.errors import StorageError
from ppl_lvm.program import Program, programs
from ppl_lvm.to_arviz import versions

if TYPE_CHECKING:
    from ppl_lvm.posterior import Fit
    from ppl_lvm.sampled import Sampled

KIND = "fit"
PARAMS, TRAINED, STATE, DRAWS, STATS = "params", "trained", "state", "draws", "stats"
"""Groups of arrays: constrained parameters by name, for any backend; the same as the backend holds them, unconstrained;
what training goes on from; draws of a method and what its library reports of each."""

Size = Annotated[int, Field(ge=0, lt=2**48)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SavedCallable(_Strict):
    """A native model or guide: where it was defined, its source where that is the user's and can be had, its code."""

    name: str
    source: str | None
    code: str
    """A digest, which says nothing to another version of Python."""


class SavedProgram(_Strict):
    """What the program was. `origin`: of the library, a file of the user's, or callables."""

    origin: Literal["shipped", "file", "native"]
    name: str
    portable: bool
    options: dict[str, Any]
    arguments: list[str]
    observed: dict[str, str]
    source_hash: str
    source: str | None
    model: SavedCallable
    guide: SavedCallable | None
    family: dict[str, Any] | None
    """The family that wrote the guide from the model."""


class SavedArgument(_Strict):
    """A data argument: dtype, and shape of one row; `name` is None for a positional one."""

    name: str | None
    dtype: str | None
    shape: Annotated[list[Size], Field(max_length=30)]


class SavedSite(_Strict):
    role: Literal["latent", "observed", "auxiliary"]
    local: bool


class Content(_Strict):
    """A fit's part of the manifest; arrays are in the files beside it."""

    program: SavedProgram
    recipe: dict[str, Any]
    backend: Literal["pyro", "numpyro"]
    seed: Annotated[int, Field(ge=0)]
    dtype: Literal["float32", "float64"]
    data_plate: str | None
    rows: Size | None
    """Rows that the program was bound to; `total` of the data."""
    in_plate: bool
    """Whether the rows are in a data plate that the engine picks from, so that the program takes any number of them."""
    total: Size | None
    arguments: list[SavedArgument]
    batches: bool
    """Whether the data came in batches, of which none are known but their shapes."""
    data: dict[str, str] | None
    """Fingerprints of the training data by argument; None where they came in batches or were taken off."""
    row_params: list[str]
    sites: dict[str, SavedSite]
    seconds: Annotated[float, Field(ge=0)]
    messages: list[str]
    history: dict[str, str]
    """Column of the lines -> dtype."""
    state: dict[str, Any]
    versions: dict[str, str]


def save(run: Fit, path: str | Path, overwrite: bool = False) -> None:
    """Writes a fit; see `Fit.save`."""
    if not overwrite and store.exists(path):
        raise StorageError(f"{str(path)!r} holds something that was saved before; pass overwrite=True to replace it.")
    arrays: dict[str, Mapping[str, np.ndarray]] = {
        # Networks of a native program are trees, which the program alone can put together again: from TRAINED.
        PARAMS: {n: v for n, v in run.params.items() if isinstance(v, np.ndarray)},
        TRAINED: backends.load(run.backend).arrays_of(run._trained),
        STATE: run.state.arrays,
    }
    if run.recipe.method is not None:
        arrays |= _draws(run)  # type: ignore[arg-type]
    history = {n: np.asarray(v) for n, v in run.history.items()}
    content = content_of(run).model_dump(mode="json")
    store.write(path, KIND, content, arrays, lines_of(history))


def content_of(run: Fit) -> Content:
    """What the manifest says of a fit."""
    bound, example = run._bound, run._example
    assert example is not None
    names = [*(None for _ in example.args), *example.kwargs]
    in_plate = bound.structure.data_plate is not None and bound.structure.plate_size is None
    batches = run._data is not None and run._data.sample
    return Content(
        program=as_saved(run.program),
        recipe=run.recipe.to_dict(),
        backend=run.backend,  # type: ignore[arg-type]
        seed=int(run.seed),
        dtype=bound.dtype,
        data_plate=bound.asked_plate,
        rows=bound.structure.rows if in_plate else bound.total,
        in_plate=in_plate,
        total=bound.total,
        arguments=[_argument(n, a) for n, a in zip(names, (*example.args, *example.kwargs.values()), strict=True)],
        batches=batches,
        data=None if run._data is None or batches else data_of(run._data, run.program),
        row_params=sorted(bound.row_params),
        sites=sites_of(bound),
        seconds=float(run.seconds),
        messages=list(run.messages),
        history={n: np.asarray(v).dtype.name for n, v in run.history.items()},
        state=run.state.described,
        versions=versions(),
    )


def data_of(call: Call, program: Program) -> dict[str, str]:
    """A fingerprint of each data argument."""
    return {n: f for n, f in fingerprint.of_data(call, program.arguments).items() if n != ROWS}


def sites_of(bound: Any) -> dict[str, SavedSite]:
    """The sites of a bound program, as far as a saved fit depends on them."""
    return {n: SavedSite(role=i.role, local=i.local) for n, i in bound.structure.sites.items()}


def lines_of(history: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Columns as lines: those of one length side by side. What is no number of JSON is text: "nan", "inf", "-inf"."""
    lengths = dict.fromkeys(len(column) for column in history.values())
    return [
        {name: _plain(column[i]) for name, column in history.items() if len(column) == length}
        for length in lengths
        for i in range(length)
    ]


def history_of(lines: list[dict[str, Any]], dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The columns again, to the bit.

    Raises:
        StorageError: a line has another column or something that is no number of its column's dtype.
    """
    columns: dict[str, list[Any]] = {name: [] for name in dtypes}
    for name, dtype in dtypes.items():
        if dtype not in store.DTYPES:
            raise StorageError(f"The history has a column {name!r} of dtype {dtype!r}, which is none that is written.")
    for line in lines:
        for name, value in line.items():
            if name not in columns:
                raise StorageError(f"The history has a column {name!r}, of which the manifest says nothing.")
            columns[name].append(_number(name, value, np.dtype(dtypes[name])))
    return {name: np.array(values, dtype=dtypes[name]) for name, values in columns.items()}


def _plain(value: Any) -> bool | int | float | str:
    item = np.asarray(value).item()
    return item if not isinstance(item, float) or np.isfinite(item) else str(item)


def _number(name: str, value: Any, dtype: np.dtype) -> Any:
    fits = {"f": (float, int), "i": (int,), "u": (int,), "b": (bool,)}[dtype.kind]
    if dtype.kind == "f" and isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if type(value) not in fits or (dtype.kind in "iu" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max):
        raise StorageError(f"The history has {value!r:.100} in column {name!r}, which is of dtype {dtype.name}.")
    try:
        return dtype.type(value)
    except OverflowError as cause:
        raise StorageError(f"The history has {value!r:.100} in column {name!r}: {cause}.") from cause


def _argument(name: str | None, array: Any) -> SavedArgument:
    if array is None:
        return SavedArgument(name=name, dtype=None, shape=[])
    return SavedArgument(name=name, dtype=np.asarray(array).dtype.name, shape=list(np.shape(array)[1:]))


def _draws(run: Sampled) -> dict[str, Mapping[str, np.ndarray]]:
    gaussian = run._outcome.gaussian
    found = {"u": run._outcome.u} | ({} if gaussian is None else {"mean": gaussian[0], "lower": gaussian[1]})
    return {DRAWS: found, STATS: run.stats}


# Programs.


def as_saved(program: Program) -> SavedProgram:
    """What the manifest says of a program."""
    family = program.guide if isinstance(program.guide, GuideFamily) else None
    path = None if program.path is None else Path(program.path)
    return SavedProgram(
        origin="native" if path is None else "shipped" if shipped(program.name) == path else "file",
        name=program.name,
        portable=program.portable,
        options=_options(program),
        arguments=list(program.arguments),
        observed=dict(program.observed),
        source_hash=program.source_hash,
        source=None if path is None else _as_executed(path, program.source_hash),
        model=described(program.model, path is None),
        guide=None if family is not None or program.guide is None else described(program.guide, path is None),
        family=None if family is None else to_dict(family),
    )


def shipped(name: str) -> Path | None:
    """The file of the library's program of this name."""
    found = programs().get(name)
    return None if found is None else found.resolve()


def _options(program: Program) -> dict[str, Any]:
    """As they are read back: a tuple is a list there."""
    found = {}
    for name, value in program.options:
        try:
            found[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as cause:
            raise StorageError(
                f"Option {name!r} of program {program.name!r} is {value!r}, which JSON cannot hold ({cause}); numbers, "
                f"strings, tuples and None can be saved."
            ) from cause
    return found


def _as_executed(path: Path, digest: str) -> str | None:
    """The source of a program's file, if it still is what was executed."""
    try:
        source = path.read_bytes()
    except OSError:
        return None
    return source.decode() if lookup.digest(source) == digest else None


def described(call: Callable[..., Any], with_source: bool) -> SavedCallable:
    """A model or guide by its name, and its source if it is the user's own."""
    code = fingerprint.of_code(call)
    while isinstance(call, functools.partial):
        call = call.func
    kind = call if hasattr(call, "__qualname__") else type(call)
    name = f"{kind.__module__}:{kind.__qualname__}"
    return SavedCallable(name=name, source=_source(kind) if with_source else None, code=code)


def _source(kind: Any) -> str | None:
    """None for what an installed package defines, whose version the manifest has."""
    installed = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")]
    try:
        file = inspect.getsourcefile(kind)
        if file is None or any(Path(file).is_relative_to(place) for place in installed):
            return None
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return None
