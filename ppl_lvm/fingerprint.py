"""What a fit was asked for, as short text: so that a fit that goes on can tell whether it is asked for the same."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ppl_lvm.backends.base import Call
    from ppl_lvm.program import Program

DIGITS = 32
"""Of a digest in hexadecimal."""


def of_data(call: Call, names: Sequence[str]) -> dict[str, str]:
    """Argument -> dtype, shape and a digest of the values; `names` are those of positional ones.

    Example:
        >>> from ppl_lvm.backends.base import Call
        >>> [of_data(Call((np.full((2, 3), v),)), ["x"])["x"].rsplit(" ", 1)[0] for v in (0.0, 1.0)]
        ['float64 (2, 3)', 'float64 (2, 3)']
        >>> of_data(Call((np.zeros(3),)), ["x"]) == of_data(Call((np.ones(3),)), ["x"])
        False
    """
    named = {**dict(zip([*names, *map(str, range(len(call.args)))], call.args, strict=False)), **call.kwargs}
    return {name: of_values(array) for name, array in named.items() if array is not None}


def of_values(value: Any) -> str:
    """The same of one array, or of arrays in mappings and lists."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    kind = f"{value.dtype} {tuple(value.shape)} " if hasattr(value, "dtype") else ""
    return kind + digest.hexdigest()[:DIGITS]


def of_program(program: Program) -> dict[str, str]:
    """Name, options, and a digest of the source of a file, or of the code of functions."""
    parts = {"name": program.name, "observed": json.dumps(sorted(map(list, program.observed)))}
    if program.path is not None:
        return parts | {"options": json.dumps(dict(program.options), default=repr), "source": program.source_hash}
    return parts | {role: of_code(call) for role, call in (("model", program.model), ("guide", program.guide))}


def of_code(call: object) -> str:
    """A digest of what a callable does: its code, not the values that it closes over.

    Example:
        >>> of_code(lambda x: x + 1) == of_code(lambda x: x + 1), of_code(lambda x: x + 1) == of_code(lambda x: x + 2)
        (True, False)
    """
    digest = hashlib.sha256()
    for part in _code(call):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:DIGITS]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, a line each: "recipe.steps was 3 and is 4"."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{name} was {old.get(name, 'not given')} and is {new.get(name, 'not given')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def plain(value: Any) -> Any:
    """A description as JSON gives it back; what JSON lacks, as text."""
    return json.loads(json.dumps(value, default=repr), parse_constant=str)


def _leaves(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield before + name, value


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield str(name).encode() + b"\0"
            yield from _parts(value[name])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _parts(each)
    elif hasattr(value, "__dict__") and not hasattr(value, "dtype"):
        yield from _parts(vars(value))
    else:
        array = np.asarray(value)
        yield f"{array.dtype.str}{array.shape}".encode()
        yield np.ascontiguousarray(array).tobytes() if array.dtype != object else repr(value).encode()


def _code(call: object) -> Iterator[str]:
    if isinstance(call, functools.partial):
        yield repr((call.args, sorted(call.keywords.items())))
        call = call.func
    if isinstance(call, MethodType):
        call = call.__func__
    code = getattr(call, "__code__", None)
    if isinstance(code, CodeType):
        yield from _of_code(code)
        return
    yield f"{type(call).__module__}.{type(call).__qualname__}"
    for name in ("forward", "__call__"):
        method = getattr(type(call), name, None)
        if isinstance(getattr(method, "__code__", None), CodeType):
            yield from _of_code(method.__code__)  # type: ignore[union-attr]


def _of_code(code: CodeType) -> Iterator[str]:
    """Without names of files and numbers of lines, which move with what stands above."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        else:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)
