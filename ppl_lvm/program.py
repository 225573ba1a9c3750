"""Programs, what is fitted: a file with `model` and `guide`, or a pair of native callables."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, Literal, Self

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from ppl_lvm import lookup
from ppl_lvm.algorithm import GuideFamily, plain
from ppl_lvm.backend_of import Backend as Backend
from ppl_lvm.backend_of import backend_of as backend_of
from ppl_lvm.errors import ProgramError


@dataclass(frozen=True, eq=False)
class Program:
    """A model and its guide, options bound.

    Two programs are equal, and share what was compiled for one, if they come from the same file with the same
    content and options; native callables, if they are the same objects.

    Args:
        name: the stem of the file, or the name of the model.
        model: `model(ppl, *data)` if portable, `model(*data)` if native.
        guide: called like the model; or a family that writes one from the model, or None while none is chosen, or
            where the recipe has a method, which needs none.
        options: all keyword-only options of model and guide with their values, sorted by name.
        portable: whether it is written against `ppl` and runs on both backends.
        path: the file, or None.
        source_hash: digest of the file's content, or "".
        example: `example(rng)` gives tiny data, an array or a dictionary of arrays, or None.
        recipe: name of the recipe it is best fitted with.
        arguments: names of the data arguments; an observed site is called like the one it observes.
        observed: pairs (site, argument) of the sites that are not.
        summary: first paragraph of the file's docstring.
    """

    name: str
    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    options: tuple[tuple[str, Any], ...] = ()
    portable: bool = False
    path: str | None = None
    source_hash: str = ""
    example: Callable[..., Any] | None = None
    recipe: str = "elbo"
    arguments: tuple[str, ...] = ()
    observed: tuple[tuple[str, str], ...] = ()
    summary: str = field(default="", repr=False)

    @classmethod
    def from_callables(
        cls, model: Callable[..., Any], guide: Callable[..., Any] | None = None, recipe: str = "elbo"
    ) -> Self:
        """A native program: any Pyro or NumPyro callables, autoguides included.

        Raises:
            ProgramError: one of them cannot be called.
        """
        for role, call in (("model", model), ("guide", guide)):
            if call is not None and not callable(call):
                raise ProgramError(f"The {role} is {call!r}, which cannot be called.")
        return cls(
            _name(model), model, guide, recipe=recipe, arguments=_positional(getattr(model, "forward", model))
        )

    def argument_of(self, site: str) -> str:
        """The data argument whose values a site has: of its own name, unless `observed` says otherwise."""
        return dict(self.observed).get(site, site)

    def options_of(self, role: Literal["model", "guide"]) -> dict[str, Any]:
        """The options that the model, or the guide, takes; they are bound already."""
        call = self.model if role == "model" else self.guide
        return dict(call.keywords) if self.path and isinstance(call, functools.partial) else {}

    @property
    def takes_rows(self) -> bool:
        """Whether it is a native program with an argument `rows`, which gets the indices of the rows in a batch."""
        return not self.portable and any("rows" in _positional(c) for c in (self.model, self.guide) if callable(c))

    def _key(self) -> tuple[object, ...]:
        if self.path is None:
            return _identity(self.model), _identity(self.guide), self.observed
        family = self.guide if isinstance(self.guide, GuideFamily) else None
        return self.path, self.source_hash, self.options, self.observed, family, self.guide is None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def programs() -> dict[str, Path]:
    """The programs that can be asked for by name, with their files."""
    return lookup.find(lookup.folder("models"), ".py", ProgramError)


def program(asked: str | Path | Program, /, **options: Any) -> Program:
    """The program of this name or file, with options for its model and guide.

    Args:
        asked: a name of `programs()`, a path to a Python file, or a Program whose options are to be changed.
        **options: keyword-only parameters of the file's `model` and `guide`.

    Raises:
        ProgramError: there is no such program, the file fails or lacks a model or a guide, the two do not fit
            together, or an option is unknown or has a value of the wrong type.

    Example:
        >>> dict(program("vae", latent=2).options)["latent"]
        2
    """
    if isinstance(asked, Program):
        if asked.path is None:
            if options:
                raise ProgramError(
                    f"Program {asked.name!r} is a pair of callables and has no options, but was given "
                    f"{', '.join(options)}."
                )
            return asked
        return replace(program(Path(asked.path), **dict(asked.options) | options), observed=asked.observed)
    if not isinstance(asked, str | Path):
        raise ProgramError(
            f"A program was asked for by {asked!r}, of type {type(asked).__name__}; give a name, a path to a Python "
            f"file, or a Program."
        )
    path = _locate(asked)
    module = lookup.load(path, ProgramError)
    where = f"Program {path.stem!r} ({path})"
    model, guide = (_callable(module, role, where) for role in ("model", "guide"))
    portable = _is_portable(model)
    if portable != _is_portable(guide):
        raise ProgramError(
            f"{where}: either both model and guide, or neither, take the namespace `ppl` first; "
            f"found model{_signature(model)} and guide{_signature(guide)}."
        )
    arguments, guide_arguments = (_positional(call)[portable:] for call in (model, guide))
    if portable and arguments != guide_arguments:
        raise ProgramError(
            f"{where}: model and guide must take the same data; found model({', '.join(arguments)}) and "
            f"guide({', '.join(guide_arguments)}) after ppl."
        )
    declared = _declared(model, guide, where)
    values = _check_options(declared, options, where)
    recipe = getattr(module, "recipe", "elbo")
    example = getattr(module, "example", None)
    if not isinstance(recipe, str) or not (example is None or callable(example)):
        raise ProgramError(
            f"{where}: `recipe` must be a name and `example` a function of a random generator."
        )
    return Program(
        name=path.stem,
        model=_bind(model, values),
        guide=_bind(guide, values),
        options=tuple(sorted(values.items())),
        portable=portable,
        path=str(path),
        source_hash=module.__dict__[lookup.SOURCE_HASH],
        example=example,
        recipe=recipe,
        arguments=arguments,
        summary=inspect.cleandoc(str(module.__doc__ or "")).split("\n\n")[0].replace("\n", " "),
    )


def _locate(asked: str | Path) -> Path:
    if isinstance(asked, Path) or lookup.is_path(asked, ".py"):
        path = Path(asked)
        if not lookup.is_file(path):
            raise ProgramError(
                f"There is no program file {path}; names of programs: {', '.join(programs())}."
            )
        return path.resolve()
    found = programs()
    if asked not in found:
        raise ProgramError(
            f"Unknown program {asked!r}. {lookup.valid(asked, found, 'Programs')} "
            "A file of your own is given by its path, ending in .py."
        )
    return found[asked].resolve()


def _callable(module: ModuleType, role: str, where: str) -> Callable[..., Any]:
    call = getattr(module, role, None)
    if not callable(call):
        found = "defines none" if call is None else f"defines {role} = {call!r}"
        raise ProgramError(f"{where} needs a function {role}(ppl, x, *, option=...), but {found}.")
    return call


def _signature(call: Callable[..., Any]) -> inspect.Signature:
    try:
        written = inspect.signature(call)
    except (TypeError, ValueError):  # a callable of C code
        return inspect.Signature()
    try:
        return inspect.signature(call, eval_str=True)
    except Exception:  # annotations are code: names of a type checker only, or anything
        return written.replace(
            parameters=[
                p.replace(annotation=p.empty) if isinstance(p.annotation, str) else p
                for p in written.parameters.values()
            ]
        )


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _positional(call: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(p.name for p in _signature(call).parameters.values() if p.kind in _POSITIONAL)


def _is_portable(call: Callable[..., Any]) -> bool:
    return _positional(call)[:1] == ("ppl",)


def _declared(
    model: Callable[..., Any], guide: Callable[..., Any], where: str
) -> dict[str, inspect.Parameter]:
    """The options of model and guide; one that both have must be the same in both."""
    declared: dict[str, inspect.Parameter] = {}
    for call in (model, guide):
        for option in _signature(call).parameters.values():
            if option.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            known = declared.setdefault(option.name, option)
            if known.default != option.default:
                raise ProgramError(
                    f"{where}: option {option.name!r} is {known.default!r} by default in the model and "
                    f"{option.default!r} in the guide; give both the same default."
                )
    return declared


def _check_options(
    declared: Mapping[str, inspect.Parameter], options: Mapping[str, Any], where: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in options:
        if name not in declared:
            defaults = ", ".join(_describe(option) for _, option in sorted(declared.items()))
            hint = lookup.valid(name, declared, "Options").partition("Options")[0]
            raise ProgramError(
                f"{where} has no option {name!r}. {hint}"
                + (f"Options and defaults: {defaults}." if defaults else "It has no options.")
            )
    for name, option in declared.items():
        if name not in options and option.default is option.empty:
            raise ProgramError(f"{where}: option {name!r} has no default; give it, as in {name}=...")
        values[name] = (
            _check_value(option, plain(options[name]), where) if name in options else option.default
        )
        try:
            hash(values[name])
        except TypeError:
            raise ProgramError(
                f"{where}: option {name!r} is {values[name]!r}, which cannot be hashed, so what is compiled "
                "for it could not be found again; use numbers, strings or tuples."
            ) from None
    return values


def _describe(option: inspect.Parameter) -> str:
    return option.name if option.default is option.empty else f"{option.name}={option.default!r}"


def _check_value(option: inspect.Parameter, value: object, where: str) -> object:
    """The value as the option's annotation, or else the type of its default, wants it."""
    wanted = option.annotation
    if wanted is option.empty:
        wanted = Any if option.default in (None, option.empty) else type(option.default)
    try:
        return TypeAdapter(wanted).validate_python(value, strict=True)
    except PydanticUserError as cause:
        raise ProgramError(
            f"{where}: option {option.name!r} is annotated with {wanted!r}, by which no value can be checked; use int, "
            f"float, str, bool, a tuple of them, or Any."
        ) from cause
    except ValidationError as cause:
        said = "; or ".join(error["msg"].replace("Input should", "should", 1) for error in cause.errors())
        default = "" if option.default is option.empty else f" (default {option.default!r})"
        raise ProgramError(
            f"{where}: option {option.name!r} is {value!r}, but it {said}{default}."
        ) from cause


def _bind(call: Callable[..., Any], values: Mapping[str, Any]) -> Callable[..., Any]:
    own = {name: value for name, value in values.items() if name in _signature(call).parameters}
    return functools.partial(call, **own) if own else call


def _name(call: Callable[..., Any]) -> str:
    if isinstance(call, functools.partial):
        return _name(call.func)
    return getattr(call, "__name__", type(call).__name__)


def _identity(call: object) -> object:
    """What stays the same where `obj.method` and `partial(f, 3)` are written twice."""
    if isinstance(call, GuideFamily):
        return call
    if isinstance(call, MethodType):
        return id(call.__self__), call.__func__
    if isinstance(call, functools.partial):
        try:
            parts = (_identity(call.func), call.args, tuple(sorted(call.keywords.items())))
            hash(parts)
        except TypeError:
            return id(call)
        return parts
    return id(call)
