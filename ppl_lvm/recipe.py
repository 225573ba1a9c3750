"""Recipes, how to fit: a TOML file or keywords become a frozen, validated `Recipe`."""

import copy
import inspect
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeGuard, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    field_validator,
    model_validator,
)

from ppl_lvm import lookup
from ppl_lvm.algorithm import (
    Algorithm,
    Estimator,
    GuideFamily,
    Method,
    NonNegative,
    Objective,
    OptionalNonNegative,
    OptionalPositive,
    Schedule,
    best_pattern,
    specificity,
)
from ppl_lvm.catalogue import BASES, Kind, available, estimators, guides, objectives, resolve, to_dict
from ppl_lvm.errors import RecipeError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Checked = TypeVar("Checked", bound=BaseModel)


class Optimizer(Algorithm):
    """How parameters follow the gradient; every number may be a schedule.

    Args:
        name: "adam", "adamw" (decoupled weight decay), "sgd" (no momentum), or "natural" for parameters of the guide's
            sites that all rows share: sgd along `F^-1 gradient`, F the Fisher information of these sites, in a straight
            line of the constrained values where that stays in their domain.
        learning_rate: the step's length; for natural steps one arrives at the optimum of a conjugate model.
        clip: gradients of this optimiser's parameters are scaled to a global norm of at most this; None: as they are.
        weight_decay: for adamw, `p <- p - learning_rate (adam + weight_decay p)`; None there means 0.01.
    """

    name: Literal["adam", "sgd", "adamw", "natural"] = "adam"
    learning_rate: NonNegative = 1e-3
    clip: OptionalPositive = None
    weight_decay: OptionalNonNegative = None

    @model_validator(mode="after")
    def _decay_is_of_adamw(self) -> Self:
        if self.weight_decay is not None and self.name != "adamw":
            raise ValueError(f"weight_decay is an option of adamw, and the optimiser is {self.name}")
        return self

    @model_validator(mode="after")
    def _natural_steps_are_not_clipped(self) -> Self:
        if self.clip is not None and self.name == "natural":
            raise ValueError("clip is a norm of gradients, which natural steps do not go by; lower the learning_rate")
        return self


class Recipe(BaseModel):
    """How to fit: objective, gradient estimators, optimiser and length of the run; or a method, which has its own.

    Args:
        name: what the recipe is called.
        objective: the objective and its options; None where a method takes its place.
        guide: a family that writes the guide from the model (`"auto_normal"`); None is the program's own guide.
        method: an algorithm of the backend's library (`map`, `laplace`, `nuts`, `svgd`) and its options, or None. It
            brings its own steps and optimiser, so those below, guides and estimators go with an objective only.
        estimator: pattern of site names -> estimator; None leaves the choice to the engine ("auto"). Kept
            with the most specific pattern first: names before patterns with wildcards, then by length.
        steps: optimiser steps.
        batch_size: rows per step; None takes all rows in every step.
        optimizer: the optimiser and its options; or a table of them by pattern of parameter names, each complete in
            itself: a name, a pattern ("encoder.*"), the group "model" or "guide", or "*" for the rest; the most
            specific wins, in this order. A parameter that model and guide share is the model's; those of estimators
            and of the objective itself ("estimator.<site>.<name>", "objective.<name>") go with the guide.
        alternate: blocks of steps that move one group only, as in `{"guide": 400, "model": 400}`: E and M steps in this
            order, from the beginning again. What does not move keeps its optimiser's state too. None: both, every step.
        freeze: patterns of parameters that stay as they are, names and groups as for `optimizer`.
        hide: argument -> steps, as in `{"x": 10}`: in every training step, that many steps of each row's sequence, in a
            row and from a random place, are said to be unknown by the argument `x_mask`, while the density of x counts
            as before. So a guide learns to go on without data (self-supervised masking).
        check_every: steps between two looks at validation, and between two calls of callbacks.
        patience: early stopping after this many checks without improvement, with the best parameters kept; needs
            validation data. None trains to the end and keeps the last.
        min_delta: what a check must be better by to count as an improvement, in nats per row.
        restarts: runs from different seeds, the best of which is kept.
        on_nonfinite: "stop" ends the fit at the first step whose loss or gradient is not finite, with the state before
            it kept; "skip" leaves the step out: nothing moves, and the fit goes on with the next one.
        most_skipped: with "skip", steps in a row that may be left out; one more ends the fit.
        stages: recipes that are run one after the other, each from the parameters of the last; in a table, the
            keys that a stage replaces: `stages = [{ steps = 100, freeze = ["guide"] }, { objective = "iwae" }]`.

    Equality is by value. `recipe(r.to_dict()) == r`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = "custom"
    objective: InstanceOf[Objective] | None = None
    guide: InstanceOf[GuideFamily] | None = None
    method: InstanceOf[Method] | None = None
    estimator: dict[str, InstanceOf[Estimator] | None] = {"*": None}
    steps: int = Field(default=1000, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    optimizer: InstanceOf[Optimizer] | dict[str, InstanceOf[Optimizer]] = Optimizer()
    alternate: dict[Literal["model", "guide"], Annotated[int, Field(ge=1)]] | None = None
    freeze: tuple[str, ...] = ()
    hide: dict[str, Annotated[int, Field(ge=1)]] = {}
    check_every: int = Field(default=100, ge=1)
    patience: int | None = Field(default=None, ge=1)
    min_delta: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    restarts: int = Field(default=1, ge=1)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    most_skipped: int = Field(default=10, ge=1)
    stages: tuple[InstanceOf["Recipe"], ...] = ()

    @field_validator("estimator", "optimizer", mode="after")
    @classmethod
    def _most_specific_first(cls, chosen: Any) -> Any:
        # One order for equal recipes, and the first match is the best one however the table was written.
        if isinstance(chosen, Optimizer):
            return chosen
        return {pattern: chosen[pattern] for pattern in sorted(chosen, key=specificity)}

    @field_validator("freeze", mode="before")
    @classmethod
    def _patterns(cls, given: object) -> object:
        return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given

    @field_validator("alternate", mode="after")
    @classmethod
    def _both_take_turns(cls, blocks: dict[str, int] | None) -> dict[str, int] | None:
        if blocks is not None and len(blocks) < 2:
            raise ValueError(f"a block of {' and '.join(blocks) or 'nothing'} alone; give both, or freeze the other")
        return blocks

    @model_validator(mode="after")
    def _objective_or_method(self) -> Self:
        if (self.objective is None) == (self.method is None):
            raise ValueError("either an objective or a method, not both and not neither")
        return self

    def __hash__(self) -> int:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return hash(tuple(tuple(v.items()) if isinstance(v, dict) else v for v in values.values()))

    @property
    def algorithm(self) -> Objective | Method:
        """The objective, or the method in its place."""
        chosen = self.objective or self.method
        assert chosen is not None
        return chosen

    @property
    def skips(self) -> int:
        """Steps in a row whose loss or gradient may be not finite."""
        return self.most_skipped if self.on_nonfinite == "skip" else 0

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Every optimiser by its pattern; a single one has "*"."""
        return {"*": self.optimizer} if isinstance(self.optimizer, Optimizer) else self.optimizer

    def estimator_for(self, site: str) -> Estimator | None:
        """The estimator of the most specific pattern that matches a site; None if the engine is to choose.

        Example:
            >>> recipe({"objective": "elbo", "estimator": {"z*": "pathwise"}}).estimator_for("z1")
            pathwise()
        """
        pattern = best_pattern(self.estimator, site)
        return None if pattern is None else self.estimator[pattern]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for JSON or TOML; `recipe` reads it back."""
        if self.method is not None:
            return {"name": self.name, "method": to_dict(self.method), "batch_size": self.batch_size}
        plain = {p: o.model_dump(mode="json", exclude_none=True) for p, o in self.optimizers.items()}
        table: dict[str, Any] = {
            "name": self.name,
            "objective": to_dict(self.algorithm),
            "guide": "own" if self.guide is None else to_dict(self.guide),
            "estimator": {p: "auto" if e is None else to_dict(e) for p, e in self.estimator.items()},
            "steps": self.steps,
            "batch_size": self.batch_size,
            "optimizer": plain["*"] if isinstance(self.optimizer, Optimizer) else plain,
        }
        rest = ["alternate", "freeze", "hide", "check_every", "patience", "min_delta", "restarts", "on_nonfinite"]
        rest += ["most_skipped"]
        changed = [name for name in rest if getattr(self, name) != type(self).model_fields[name].default]
        table |= {name: getattr(self, name) for name in changed}
        if self.freeze:
            table["freeze"] = list(self.freeze)
        return table | ({"stages": [stage.to_dict() for stage in self.stages]} if self.stages else {})


def recipes() -> dict[str, Path]:
    """The recipes that can be asked for by name, with their files."""
    return lookup.find(lookup.folder("inference"), ".toml", RecipeError)


def recipe(
    asked: "str | Path | Mapping[str, Any] | Recipe | Algorithm | type[Algorithm] | Sequence[Any]",
    **overrides: Any,
) -> Recipe:
    """The recipe of this name, file or mapping, with some options replaced.

    Args:
        asked: a name of `recipes()`, a path to a TOML file, a mapping laid out like one, a Recipe, or an
            objective or method, to be run with everything else at its default; or a list of these, run as stages.
        **overrides: a field of the recipe (`steps=10`), an option that one section has (`draws=50`,
            `learning_rate=1e-2`), or a dotted one (`**{"estimator.y.temperature": 0.5}`).

    An objective, estimator or method is given as a name, as "path/to/file.py:name" (relative to the recipe's file),
    "package.module:name", a table with `name` and options, or a class or instance from Python.

    Raises:
        RecipeError: unknown name, key or option, a value of the wrong type or out of range, or invalid TOML.

    Example:
        >>> r = recipe("iwae", draws=5, learning_rate=1e-2)
        >>> r.objective.draws, r.optimizer.learning_rate, r.steps
        (5, 0.01, 3000)
    """
    if isinstance(asked, list | tuple):
        return _of_stages(asked, overrides)
    if isinstance(asked, Recipe) and asked.stages and "stages" not in overrides:
        base = recipe(asked.model_copy(update={"stages": ()}), **overrides)
        return base.model_copy(update={"stages": tuple(recipe(stage, **overrides) for stage in asked.stages)})
    if isinstance(asked, Recipe):
        draft = _Draft.of(asked)
    elif isinstance(asked, Mapping):
        draft = _Draft.read(asked, "custom", Path.cwd())
    elif isinstance(asked, str | Path):
        path = _locate(asked)
        draft = _Draft.read(_parse(path), path.stem, path.parent)
    elif (lead := _key_of(asked)) is not None:
        name = (asked if inspect.isclass(asked) else type(asked)).__name__
        draft = _Draft.read({lead: asked}, name, Path.cwd())
    else:
        raise RecipeError(
            f"A recipe was asked for by {asked!r}, of type {type(asked).__name__}; give a name, a path to a "
            "TOML file, a mapping, a Recipe, an objective or a method."
        )
    if "stages" in overrides:
        draft.check_key("stages")
    return _built(draft, overrides.pop("stages", draft.stages), overrides)


def named(table: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_dict` gave, of which nothing but the library's own algorithms is looked up.

    Raises:
        RecipeError: it names others, which would have to be imported or run, or is no recipe.
    """
    draft = _Draft.read(table, "custom", None)
    return _built(draft, draft.stages, {})


def _built(draft: "_Draft", tables: object, overrides: Mapping[str, Any]) -> Recipe:
    if not isinstance(tables, Sequence) or isinstance(tables, str):
        raise draft.wrong("stages", tables, "should be a list of tables, each with the keys that a stage replaces")
    folder = draft.folder
    stages = [draft.stage(i, table, folder) for i, table in enumerate(tables)]
    if overrides:
        for each in (draft, *stages):
            each.folder = Path.cwd()  # files named in overrides are the caller's, not the recipe's
            each.apply(overrides)
    return draft.build(tuple(stage.build(()) for stage in stages))


def _of_stages(asked: Sequence[Any], overrides: Mapping[str, Any]) -> Recipe:
    """Recipes one after the other; the whole is otherwise as the last, whose objective the parameters end with."""
    if not asked:
        raise RecipeError("A recipe was asked for by an empty list; give the stages in their order.")
    stages = tuple(recipe(each, **overrides) for each in asked)
    methods = [stage.name for stage in stages if stage.method is not None]
    if methods:
        raise RecipeError(
            f"Recipe {methods[0]!r} has a method and cannot be a stage; fit the others first, and then this one with "
            f"start=run."
        )
    nested = [stage.name for stage in stages if stage.stages]
    if nested:
        raise RecipeError(f"Recipe {nested[0]!r} has stages of its own and cannot be one; list its stages instead.")
    name = ", ".join(stage.name for stage in stages)
    return stages[0] if len(stages) == 1 else stages[-1].model_copy(update={"name": name, "stages": stages})


def _key_of(asked: object) -> Kind | None:
    """The key under which a recipe would have this objective or method."""
    kind = asked if inspect.isclass(asked) else type(asked)
    return next((key for key in _LEADS if issubclass(kind, BASES[key])), None)


def _locate(asked: str | Path) -> Path:
    if isinstance(asked, Path) or lookup.is_path(asked, ".toml"):
        path = Path(asked)
        if not lookup.is_file(path):
            raise RecipeError(f"There is no recipe file {path}; names of recipes: {', '.join(recipes())}.")
        return path.resolve()
    found = recipes()
    if asked not in found:
        raise RecipeError(
            f"Unknown recipe {asked!r}. {lookup.valid(asked, found, 'Recipes')} "
            "A file of your own is given by its path, ending in .toml."
        )
    return found[asked]


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
    except OSError as cause:
        raise RecipeError(f"Cannot read {path}: {cause.strerror or cause}.") from cause
    if len(content) > LONGEST:
        raise RecipeError(f"{path} has more than {LONGEST:,} bytes, which no recipe has.")
    try:
        return tomllib.loads(content.decode())
    except RecursionError as cause:
        raise RecipeError(f"{path} nests tables or arrays too deep to be a recipe.") from cause
    except ValueError as cause:  # of TOML, of UTF-8, of a number with thousands of digits
        raise RecipeError(f"{path} is not valid TOML: {cause}.") from cause


@dataclass
class _Choice:
    """An algorithm's class, and the options that were given for it so far."""

    kind: type[Algorithm]
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, instance: Algorithm) -> Self:
        return cls(type(instance), {name: getattr(instance, name) for name in type(instance).model_fields})


LONGEST, DEEPEST = 2**20, 32
"""The most bytes of a file, and tables and lists within each other."""
MOST = 2**31 - 1
"""Of a whole number in a recipe."""
_LEADS: tuple[Kind, ...] = ("objective", "method")
"""A recipe has one of these."""
_SECTIONS = (*_LEADS, "guide", "estimator", "optimizer")
_FIELDS = tuple(name for name in Recipe.model_fields if name not in (*_SECTIONS, "stages"))
_WITH_METHOD = ("name", "method", "batch_size")
"""The keys that a recipe with a method may have."""


@dataclass
class _Draft:
    """A recipe while it is put together: names are resolved, option values not yet checked."""

    fields: dict[str, Any]
    objective: _Choice
    estimator: dict[str, _Choice | None]
    optimizer: dict[str, _Choice]
    """By pattern of parameter names; a single one has none, ""."""
    folder: Path | None
    """Where files that it names are; None: it may name none."""
    stages: Sequence[Any] = ()
    lead: Kind = "objective"
    """Whether what stands in `objective` is one, or a method in its place."""
    guide: _Choice | None = None

    @classmethod
    def of(cls, given: Recipe) -> Self:
        chosen = {p: None if e is None else _Choice.of(e) for p, e in given.estimator.items()}
        fields = {name: getattr(given, name) for name in _FIELDS}
        guide = None if given.guide is None else _Choice.of(given.guide)
        lead: Kind = "objective" if given.method is None else "method"
        single = isinstance(given.optimizer, Optimizer)
        optimizer = {"" if single else p: _Choice.of(o) for p, o in given.optimizers.items()}
        return cls(fields, _Choice.of(given.algorithm), chosen, optimizer, Path.cwd(), lead=lead, guide=guide)

    @classmethod
    def read(cls, table: Mapping[str, Any], name: str, folder: Path | None) -> Self:
        fields = {"name": name} | {key: table[key] for key in _FIELDS if key in table}
        level: list[Any] = [table]
        for _ in range(DEEPEST):
            each = [v for node in level for v in (node.values() if isinstance(node, Mapping) else node)]
            level = [v for v in each if isinstance(v, Mapping | list | tuple)]
        if level:
            raise RecipeError(f"Recipe {str(name)[:100]!r} has more than {DEEPEST} tables or lists within each other.")
        for key in table:
            if key not in Recipe.model_fields:
                raise RecipeError(
                    f"Recipe {fields['name']!r} has an unknown key {key!r}. "
                    f"{lookup.valid(str(key), Recipe.model_fields, 'Keys')}"
                )
        leads = [key for key in _LEADS if table.get(key) is not None]
        if not leads:
            raise RecipeError(
                f'Recipe {fields["name"]!r} names no objective; add for example objective = "elbo". '
                f"Objectives: {', '.join(objectives())}. Or a method: {', '.join(available('method'))}."
            )
        if len(leads) > 1:
            raise RecipeError(
                f"Recipe {fields['name']!r} has an objective and a method; a method finds the posterior without an "
                f"objective, so keep one of the two keys."
            )
        stages = table.get("stages", ())
        draft = cls(fields, _Choice(Objective), {"*": None}, {"": _Choice(Optimizer)}, folder, stages, leads[0])
        for key in table:
            draft.check_key(key)
        for section in _SECTIONS:
            if section in table and (section not in _LEADS or section == draft.lead):
                draft.replace(section, table[section])
        return draft

    def check_key(self, key: str) -> None:
        """Refuses the keys of an objective beside a method."""
        if self.lead == "method" and key in Recipe.model_fields and key not in _WITH_METHOD:
            has = "" if self.objective.kind is Objective else f" {self.objective.kind.__name__!r}"
            raise RecipeError(
                f"Recipe {self.fields['name']!r} has a method{has}, and {key!r} goes with an objective; a method has "
                f"its options in its own table, as in method = {{ name = \"nuts\", draws = 1000 }}."
            )

    def stage(self, number: int, table: object, folder: Path | None) -> Self:
        """A draft of one stage: this one with the keys of a table replaced."""
        where = f"stages[{number}]"
        if isinstance(table, Recipe):
            if table.method is not None:
                raise self.wrong(where, table.name, "has a method, which is no stage of a fit")
            return type(self).of(table)
        if not isinstance(table, Mapping):
            raise self.wrong(where, table, "should be a table with the keys that the stage replaces")
        unnamed = [key for key in table if not isinstance(key, str)]
        if unnamed:
            raise self.wrong(f"a key of {where}", unnamed[0], "should be a string: an option, or a key of a recipe")
        if "stages" in table:
            raise self.wrong(where, dict(table), "has stages of its own; list them all in one place")
        drafted = copy.deepcopy(self)
        drafted.fields["name"] = f"{self.fields['name']}, {where}"
        drafted.folder = folder
        drafted.apply(table)
        return drafted

    def apply(self, overrides: Mapping[str, Any]) -> None:
        # Whole sections first: `objective="renyi", alpha=0.5` must not depend on the order of the keywords.
        for key in sorted(overrides, key=lambda key: key not in _SECTIONS and not key.endswith(".name")):
            self.override(key, overrides[key])

    def replace(self, section: str, given: object) -> None:
        self.check_key(section)
        if section in _LEADS:
            if section != self.lead:
                raise RecipeError(
                    f"Recipe {self.fields['name']!r} has an objective, and a method was asked for as well; a method "
                    f"finds the posterior without one. Give it as the recipe: recipe={{'method': {given!r}}}."
                )
            self.objective = self.choose(self.lead, given, section)
        elif section == "guide":
            self.guide = None if given in (None, "own") else self.choose("guide", given, "guide")
        elif section == "optimizer":
            self.optimizer = self.choose_optimizers(given)
        else:
            self.estimator = self.choose_estimators(given)

    def choose_optimizers(self, given: object) -> dict[str, _Choice]:
        if (
            isinstance(given, Mapping)
            and given
            and all(isinstance(value, Mapping | Optimizer) for value in given.values())
            and not any(key in Optimizer.model_fields for key in given)
        ):
            return {str(p): self.choose_optimizer(value, f"optimizer.{p}") for p, value in given.items()}
        return {"": self.choose_optimizer(given, "optimizer")}

    def choose_optimizer(self, given: object, where: str) -> _Choice:
        if isinstance(given, Optimizer):
            return _Choice.of(given)
        options = {"name": given} if isinstance(given, str) else given
        if not isinstance(options, Mapping):
            raise self.wrong(where, given, 'should be a name such as "adam", or a table with a name')
        self.check_options(Optimizer, options, where)
        return _Choice(Optimizer, dict(options))

    def choose_estimators(self, given: object) -> dict[str, _Choice | None]:
        if not isinstance(given, Mapping) or isinstance(given.get("name"), str | type):
            return {"*": self.choose_estimator(given, "estimator")}
        return {str(p): self.choose_estimator(value, f"estimator.{p}") for p, value in given.items()}

    def choose_estimator(self, given: object, where: str) -> _Choice | None:
        if given is None or (isinstance(given, str | Mapping) and given in ("auto", {"name": "auto"})):
            return None
        return self.choose("estimator", given, where)

    def choose(self, kind: Kind, given: object, where: str) -> _Choice:
        """The class that was asked for, with its options; `where` is its place in the recipe."""
        base = BASES[kind]
        options: dict[str, Any] = {}
        if isinstance(given, Mapping):
            options = {key: value for key, value in given.items() if key != "name"}
            if "name" not in given:
                raise self.wrong(where, dict(given), 'should be a name, or a table such as { name = "..." }')
            given = given["name"]
        if isinstance(given, base):
            chosen = _Choice.of(given)
        elif inspect.isclass(given) and issubclass(given, base):
            chosen = _Choice(given)
        elif isinstance(given, str):
            chosen = _Choice(resolve(kind, given, self.folder, f"{where} of recipe {self.fields['name']!r}"))
        else:
            article = "an" if kind[0] in "aeiou" else "a"
            raise self.wrong(where, given, f"should be the name of {article} {kind}, or a subclass of {base.__name__}")
        self.check_options(chosen.kind, options, where)
        chosen.options |= options
        return chosen

    def choices(self) -> dict[str, _Choice]:
        """Everything that has options, by its place in the recipe."""
        if self.lead == "method":
            return {"method": self.objective}
        chosen = {f"estimator.{p}": choice for p, choice in self.estimator.items() if choice is not None}
        guide = {} if self.guide is None else {"guide": self.guide}
        optimizers = {f"optimizer.{p}" if p else "optimizer": choice for p, choice in self.optimizer.items()}
        return {"objective": self.objective, **optimizers, **guide, **chosen}

    def override(self, key: str, value: object) -> None:
        if key in _FIELDS and not (self.lead == "method" and key in self.objective.kind.model_fields):
            self.check_key(key)
            self.fields[key] = value
            return
        if key in _SECTIONS:
            self.replace(key, value)
            return
        section, _, rest = key.partition(".")
        if section in _SECTIONS and rest:
            self.override_in(section, rest, value)
            return
        having = [where for where, choice in self.choices().items() if key in choice.kind.model_fields]
        if len(having) > 1:
            raise RecipeError(
                f"Option {key!r} of recipe {self.fields['name']!r} could mean any of "
                f"{', '.join(f'{where}.{key}' for where in having)}; give one of these."
            )
        if not having:
            options = {name for choice in self.choices().values() for name in choice.kind.model_fields}
            raise RecipeError(
                f"Recipe {self.fields['name']!r} has no option {key!r}. "
                f"{lookup.valid(key, {*Recipe.model_fields, *options}, 'Options')}"
            )
        self.choices()[having[0]].options[key] = value

    def override_in(self, section: str, rest: str, value: object) -> None:
        self.check_key(section)
        if section == "estimator":
            # Site names may hold dots, so the pattern is what stands before the last one, or everything.
            pattern, _, option = rest.rpartition(".")
            if not pattern and list(self.estimator) == ["*"]:
                only = self.estimator["*"]
                if only is not None and option in only.kind.model_fields:
                    pattern = "*"
            if option == "name" and pattern:
                self.estimator[pattern] = self.choose_estimator(value, f"estimator.{pattern}")
            elif pattern in self.estimator:
                self.set_option(self.estimator[pattern], option, value, f"estimator.{pattern}")
            elif rest == "name":
                self.replace(section, value)
            else:
                self.estimator[rest] = self.choose_estimator(value, f"estimator.{rest}")
        elif section == "optimizer":
            self.override_optimizer(rest, value)
        elif rest == "name":
            self.replace(section, value)
        else:
            if section in _LEADS and section != self.lead:
                self.replace(section, value)
            self.set_option(self.choices().get(section), rest, value, section)

    def override_optimizer(self, rest: str, value: object) -> None:
        # As for estimators: the pattern is what stands before the last dot, or everything.
        pattern, _, option = rest.rpartition(".")
        if pattern in self.optimizer and option in Optimizer.model_fields:
            self.optimizer[pattern].options[option] = value
        elif isinstance(value, Mapping | Optimizer) and not _is_schedule(value):
            rest_of = {p or "*": choice for p, choice in self.optimizer.items()}
            self.optimizer = rest_of | {rest: self.choose_optimizer(value, f"optimizer.{rest}")}
        else:
            of = f"optimizer.{pattern}" if pattern in self.optimizer and pattern else "optimizer"
            if "" not in self.optimizer and of == "optimizer":
                options = [f"optimizer.{p}.{o}" for p in self.optimizer for o in Optimizer.model_fields]
                raise RecipeError(
                    f"Recipe {self.fields['name']!r} has no option {f'optimizer.{rest}'!r}. "
                    f"{lookup.valid(f'optimizer.{rest}', options, 'Options')}"
                )
            self.check_options(Optimizer, {rest if of == "optimizer" else option: value}, of)

    def set_option(self, choice: _Choice | None, option: str, value: object, where: str) -> None:
        if choice is None and where == "guide":
            raise RecipeError(
                f"Recipe {self.fields['name']!r} keeps the program's own guide, which has no option {option!r}; name "
                f"a family first. Guides: {', '.join(guides())}."
            )
        if choice is None:
            raise RecipeError(
                f"{where} of recipe {self.fields['name']!r} is 'auto' and has no option {option!r}; "
                f"name an estimator first. Estimators: {', '.join(estimators())}."
            )
        self.check_options(choice.kind, {option: value}, where)
        choice.options[option] = value

    def check_options(self, kind: type[Algorithm], options: Mapping[str, Any], where: str) -> None:
        for option in options:
            if option not in kind.model_fields:
                called = "" if kind is Optimizer else f", {kind.__name__!r},"
                raise RecipeError(
                    f"Recipe {self.fields['name']!r}: {where}{called} has no option {option!r}. "
                    f"{lookup.valid(str(option), kind.model_fields, 'Options')}"
                )

    def build(self, stages: tuple[Recipe, ...]) -> Recipe:
        if self.lead == "method":
            fields = {key: self.fields[key] for key in _WITH_METHOD if key in self.fields}
            return self.checked(Recipe, fields | {"method": self.instance(self.objective, "method.")}, "")
        optimizers = {
            p: self.instance(choice, f"optimizer.{p}." if p else "optimizer.") for p, choice in self.optimizer.items()
        }
        sections: dict[str, Any] = {
            "stages": stages,
            "objective": self.instance(self.objective, "objective."),
            "optimizer": optimizers.get("", optimizers),
            "guide": None if self.guide is None else self.instance(self.guide, "guide."),
            "estimator": {
                p: None if choice is None else self.instance(choice, f"estimator.{p}.")
                for p, choice in self.estimator.items()
            },
        }
        return self.checked(Recipe, self.fields | sections, "")

    def instance(self, choice: _Choice, where: str) -> Algorithm:
        options = {
            # Built here: pydantic would begin its complaint about a bad schedule with "not a number".
            key: self.checked(Schedule, value, f"{where}{key}.") if _is_schedule(value) else value
            for key, value in choice.options.items()
        }
        return self.checked(choice.kind, options, where)

    def checked(self, kind: type[Checked], options: Mapping[str, Any], where: str) -> Checked:
        """An instance of a pydantic class; what pydantic complains of becomes a RecipeError."""
        for key, value in options.items():
            if any(abs(number) > MOST for number in _whole_numbers(value)):
                raise self.wrong(f"{where}{key}", value, f"should be {MOST:,} at most")
        try:
            return kind(**options)
        except ValidationError as cause:
            complaints: dict[str, str] = {}
            for error in cause.errors():
                key = str(error["loc"][0]) if error["loc"] else ""
                # Of the alternatives of a union, the first is the one a reader knows.
                complaints.setdefault(key, self.complaint(kind, error, key, where, options))
            raise RecipeError(f"Recipe {self.fields['name']!r}: {'; '.join(complaints.values())}.") from cause

    def complaint(
        self, kind: type[BaseModel], error: "ErrorDetails", key: str, where: str, options: Mapping[str, Any]
    ) -> str:
        said = error["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
        if error["type"] == "missing":
            return f"{where}{key} is missing"
        if error["type"] == "extra_forbidden":
            return f"{where}{key} is unknown. " + lookup.valid(key, kind.model_fields, "Valid").rstrip(".")
        if not key:
            return f"{where.rstrip('.')}: {said}"
        if len(error["loc"]) > 1 and Schedule in get_args(kind.model_fields[key].annotation):
            said += ', or a schedule { schedule = "linear", start = 0.0, end = 1.0, steps = 1000 }'
        return f"{where}{key} is {options[key]!r}, but it {said}"

    def wrong(self, where: str, value: object, expected: str) -> RecipeError:
        return RecipeError(f"Recipe {self.fields['name']!r}: {where} is {value!r}, but it {expected}.")


def _whole_numbers(value: object) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _whole_numbers(item)
    elif isinstance(value, int):
        yield value


def _is_schedule(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and "schedule" in value
