"""Which backend a native program runs on, read off the modules its code refers to; nothing is imported."""

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, NamedTuple

from ppl_lvm.errors import ProgramError

Backend = Literal["pyro", "numpyro"]

# A reference to the library itself decides; an array library only where nothing else does.
_LIBRARIES: dict[str, Backend] = {"pyro": "pyro", "numpyro": "numpyro"}
_ARRAYS: dict[str, Backend] = {
    "torch": "pyro",
    "jax": "numpyro",
    "jaxlib": "numpyro",
    "flax": "numpyro",
    "equinox": "numpyro",
}
_DEPTH = 6
"""How many references deep helpers are followed; beyond that a program has to say `backend=`."""
_OPAQUE = {*_LIBRARIES, *_ARRAYS, *sys.stdlib_module_names, "numpy", "scipy", "sklearn", "array_api_compat"}
"""Packages whose own code is not followed: it tells nothing about the program."""


class _Import(NamedTuple):
    """An import statement inside a function."""

    module: str


def backend_of(*callables: Callable[..., Any] | None) -> Backend | None:
    """The backend of a native model and guide, or None where nothing tells.

    Looks at globals, closures, defaults, imports inside functions and helpers, at the classes of callable
    objects and at their methods, so autoguides, `PyroModule`s and bound methods are recognised too. What is
    nearest to the callable decides.

    Raises:
        ProgramError: both libraries are referred to equally near, or model and guide differ.

    Example:
        >>> backend_of(lambda x: x) is None
        True
    """
    found = {backend for call in callables if call is not None for backend in [_backend(call)] if backend}
    if len(found) > 1:
        raise ProgramError(
            "The model and the guide refer to different libraries, one to pyro and the other to numpyro; "
            "write both for one library."
        )
    return found.pop() if found else None


def _backend(call: Callable[..., Any]) -> Backend | None:
    level: list[object] = [call]
    seen: dict[int, object] = {}  # holds the objects, so that no id is given twice
    arrays: set[Backend] = set()
    for _ in range(_DEPTH):
        roots = {root for thing in level for root in _roots(thing)}
        libraries = {_LIBRARIES[root] for root in roots if root in _LIBRARIES}
        if len(libraries) > 1:
            raise ProgramError(
                f"Cannot tell the backend of {getattr(call, '__qualname__', call)!r}: it refers to pyro and "
                'to numpyro. Say backend="pyro" or backend="numpyro".'
            )
        if libraries:
            return libraries.pop()
        arrays = arrays or {_ARRAYS[root] for root in roots if root in _ARRAYS}
        seen |= {id(thing): thing for thing in level}
        nearby = {id(thing): thing for one in level for thing in _references(one)}
        level = [thing for key, thing in nearby.items() if key not in seen]
    return arrays.pop() if len(arrays) == 1 else None


def _roots(thing: object) -> set[str]:
    """Top-level packages that an object comes from: its module, its class and the bases of its class."""
    if isinstance(thing, _Import):
        return {_root(thing.module)}
    if isinstance(thing, ModuleType):
        return {_root(thing.__name__)}
    if isinstance(thing, FunctionType):
        return {_root(thing.__module__)}
    return {_root(base.__module__) for base in (thing if isinstance(thing, type) else type(thing)).__mro__}


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _references(thing: object) -> Iterator[object]:
    """What an object's code can reach in one step."""
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, FunctionType):
        if _root(thing.__module__) not in _OPAQUE:
            yield from _function_references(thing)
    elif isinstance(thing, staticmethod | classmethod):
        yield thing.__func__
    elif isinstance(thing, property):
        yield thing.fget
    elif isinstance(thing, type):
        for base in thing.__mro__:
            if _root(base.__module__) not in _OPAQUE:
                yield from (v for v in vars(base).values() if _has_code(v))
    elif _root(type(thing).__module__) not in _OPAQUE:
        yield type(thing)
        yield from (v for v in getattr(thing, "__dict__", {}).values() if _has_code(v))


def _has_code(value: object) -> bool:
    return callable(value) or isinstance(value, ModuleType | classmethod | property)


def _function_references(function: FunctionType) -> Iterator[object]:
    if hasattr(function, "__wrapped__"):
        yield function.__wrapped__
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not assigned yet
            continue
    names: set[str] = set()
    for code in _codes(function.__code__):
        names.update(code.co_names)
        yield from (
            _Import(step.argval) for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"
        )
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        yield value
        if isinstance(value, ModuleType):  # `helpers.encode`: both names are in the code
            yield from (vars(value)[attribute] for attribute in names & vars(value).keys())


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
