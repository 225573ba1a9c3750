"""What a backend promises: the structure of a program, one run as a table of arrays, and a training step.

`PyroBound` and `NumPyroBound` implement `Bound`. Everything here is free of frameworks; arrays are whatever the
backend's are, and `ops` tells them apart.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import traceback
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from ppl_lvm import ops
from ppl_lvm.algorithm import (
    Algorithm,
    Estimator,
    GuideFamily,
    Objective,
    Resampling,
    Schedule,
    SiteDistribution,
    Turn,
    best_pattern,
)
from ppl_lvm.backends.marginal import Group, groups
from ppl_lvm.draws import Draws, Plate
from ppl_lvm.errors import BackendError, DataError, LegalityError, PplLvmError, ProgramError, first_line
from ppl_lvm.latents import Discrete, Latent, PlateOf, Sketch, check_plates
from ppl_lvm.ops import Array
from ppl_lvm.process import TURN

if TYPE_CHECKING:
    from ppl_lvm.program import Program

LARGEST_SUPPORT = 4096
"""Values of a finite site that are enumerated at most."""

ROWS = "rows"
"""Argument by which a native program asks for the indices of its rows among all of the data."""

PRIOR_DRAWS = 15
"""Runs of the model whose median is where a family of guides starts."""


Role = Literal["latent", "observed", "auxiliary"]


@dataclass(frozen=True)
class SiteInfo:
    """What does not change from run to run about one site."""

    name: str
    role: Role
    local: bool
    reparameterised: bool = False
    support: np.ndarray | None = None
    """All values `[V, *event]` of a finite latent site, or None."""
    classes: int | None = None
    """V of a latent site whose elements are one-hots, categoricals or Bernoullis, however many they are; or None."""
    one_hot: bool = False
    """Its values are weights of classes (one-hots, zeros and ones) that a gradient can flow through, no indices."""
    weights: int = 0
    """How many weights of classes make a value: elements times V."""
    classes_in_model: int | None = None
    """V of the model's distribution of the site where the two are of one kind."""
    partly_observed: bool = False
    """Known entries of the data take the places of drawn ones."""
    plates: tuple[Plate, ...] = ()
    guide_parents: frozenset[str] = frozenset()
    """Sites whose values the guide's density of this site looks at."""
    model_parents: frozenset[str] = frozenset()
    """Latent sites whose values the model's density of this site looks at."""
    local_in_model: bool = True
    closed_kl: bool = False
    """The library knows KL(guide's distribution || model's) in closed form."""
    whole: bool = False
    """No mask, missing entry or scan stands between its value and a draw of its distribution, in guide and model."""
    elementwise: bool = False
    """The elements of a value (entries of a vector, variables of a code) are independent, in guide and model."""
    most: float | None = None
    """Nats that a draw of finite support holds at most over a uniform prior: log V, summed over elements."""
    user_scaled: bool = False
    fixed: bool = False
    """A guide site whose value is no draw (a factor): it has a density and needs no estimator."""
    point: bool = False
    """Its distribution is a point (Delta): the value is a function of parameters or of other guide sites."""
    parameterised: bool = False
    """A point whose value or density looks at parameters, whatever else it looks at."""
    trained: bool = False
    """An auxiliary site whose density looks at parameters."""
    scanned: bool = False
    """The guide draws it inside the library's own scan, which no estimator reaches."""
    in_guide: bool = True
    """False for a latent site of the model that the guide does not draw; its support is finite."""
    model_axes: frozenset[int] = frozenset()
    """The axes of its plates inside a row, in the model."""
    undeclared: bool = False
    """Of a site that the guide does not draw: it has several elements that are in no plate."""
    enumerated: bool = False
    """The model says `infer={"enumerate": "parallel"}`, by which both libraries mean that it is summed out."""
    chained: bool = False
    """The guide draws it step by step inside a scan."""
    steps: int = 0
    """Steps of the `ppl.scan` that it is inside of, in guide and model; 0 outside of one, or of one in both."""


@dataclass(frozen=True)
class Structure:
    """The static facts of a program on a batch, found by a probe run."""

    sites: Mapping[str, SiteInfo]
    """The guide's sites in the order in which they are drawn, then those that only the model has, as it meets them."""
    data_plate: str | None
    plate_size: int | None
    """The data plate's own size where the program subsamples it itself, otherwise None."""
    rows: int
    """B: rows in a run (1 without a data plate)."""
    nesting: int
    """Plate dimensions, counted from the right of every batch shape."""
    plate_dim: int | None
    groups: Mapping[str, frozenset[str]]
    """Parameter name -> where it is used, of "model" and "guide"."""

    def ancestors(self, name: str) -> frozenset[str]:
        """Guide sites that this guide site's draw depends on, through any number of others."""
        return self._ancestors[name]

    def downstream(self, name: str) -> frozenset[str]:
        """Sites with a density that depends on this site's draw, itself included."""
        return self._downstream[name]

    # Found once, as every run asks for them.

    @cached_property
    def _ancestors(self) -> dict[str, frozenset[str]]:
        def of(name: str) -> frozenset[str]:
            found: set[str] = set()
            todo = list(self.sites[name].guide_parents)
            while todo:
                parent = todo.pop()
                if parent not in found:
                    found.add(parent)
                    todo.extend(self.sites[parent].guide_parents)
            return frozenset(found)

        return {name: of(name) for name in self.sites}

    @cached_property
    def _downstream(self) -> dict[str, frozenset[str]]:
        def of(name: str) -> frozenset[str]:
            moved = {name} | {s for s, i in self.sites.items() if i.role != "observed" and name in self.ancestors(s)}
            return frozenset(
                s for s, i in self.sites.items() if s in moved or moved & (i.model_parents | i.guide_parents)
            )

        return {name: of(name) for name in self.sites}

    @cached_property
    def _drawn(self) -> dict[bool | None, list[SiteInfo]]:
        every = [i for i in self.sites.values() if i.role != "observed" and i.in_guide and not i.fixed]
        return {None: every, **{local: [i for i in every if i.local == local] for local in (True, False)}}

    def drawn(self, local: bool | None = None) -> list[SiteInfo]:
        """Guide sites that need an estimator, in the guide's order."""
        return list(self._drawn[local])

    def most(self, info: SiteInfo) -> float | None:
        """Nats that a row's draws of finite support hold at most over a uniform prior, plates inside the row
        included."""
        if info.most is None:
            return None
        return info.most * float(np.prod([p.subsample for p in info.plates if p.axis is not None], dtype=int))

    def undrawn(self) -> list[SiteInfo]:
        """Latent sites of the model that the guide does not draw, in the model's order."""
        return [i for i in self.sites.values() if not i.in_guide]


VARIANT, SUMMED = ("weight", "credit", "through", "control"), ("credit", "control")
"""What a table has of a variant besides its value; of these, what is summed over the elements of a row."""


class Facts(NamedTuple):
    """See `draws.Site`."""

    role: Role
    downstream: frozenset[str]
    ancestors: frozenset[str] = frozenset()
    joint: tuple[str, ...] = ()
    mixed: bool = False


@dataclass(frozen=True)
class Nested:
    """Auxiliary sites of a row that are summed out of the guide's density together."""

    sites: tuple[str, ...]
    """In the guide's order; the first one's `log_q` stands for all of them."""
    looking: tuple[str, ...]
    """The other guide sites whose density looks at them."""
    draws: int
    """J, the draw that the others came from included."""


def nested(structure: Structure, counts: Mapping[str, int]) -> tuple[Nested, ...]:
    """What an objective's `marginal` sums out: sites that are parents of one another, or of one site, together."""
    chosen = {
        n: counts[pattern]
        for n, i in structure.sites.items()
        if i.role == "auxiliary" and not i.fixed and (pattern := best_pattern(counts, n)) is not None
    }
    groups = [{n} for n in chosen]
    for name, info in structure.sites.items():
        met = (info.guide_parents | {name}) & chosen.keys()
        together = [g for g in groups if g & met]
        if together:
            groups = [g for g in groups if not g & met] + [set().union(*together)]
    order = list(structure.sites)
    return tuple(
        Nested(
            tuple(sorted(group, key=order.index)),
            tuple(n for n, i in structure.sites.items() if n not in group and i.guide_parents & group),
            max(chosen[n] for n in group),
        )
        for group in sorted(groups, key=lambda g: min(map(order.index, g)))
    )


def inner_name(site: str, j: int) -> str:
    """The name under which a run is given the inner draw j = 1 .. J - 1 of a site, laid out like the site's value."""
    return f"{site}/{j}"


def prior_name(site: str) -> str:
    """The name under which a run is given a draw from a site's prior, laid out like the site's value."""
    return f"{site}/prior"


def noise_name(site: str, salt: int = 0) -> str:
    """The name under which a run is given the uniforms of a site with classes, for an estimator's noise of this number.

    They are laid out like the site's value `[.., *elements, V]`, several copies as `[.., copies, *elements, V]`.
    """
    return f"{site}~{salt}"


def owner(name: str, sites: Container[str]) -> str:
    """The site that something is injected for: the name itself, or what one of the functions above made of it."""
    if name in sites:
        return name
    value, noise, salt = name.rpartition("~")
    name = value if noise and salt.isdigit() else name
    site, inner, j = name.rpartition("/")
    return site if name not in sites and inner and (j.isdigit() or name == prior_name(site)) else name


def class_facts(guide: tuple[int, bool] | None, model: tuple[int, bool] | None) -> dict[str, Any]:
    """What `SiteInfo` says of a site's classes, from those of its two distributions (V, whether values are no index).
    """
    if guide is None:
        return {}
    return {"classes": guide[0], "one_hot": guide[1], "classes_in_model": guide[0] if model == guide else None}


def check_injected(site: str, value: Array | None) -> None:
    """Refuses a value that was injected and left aside."""
    if value is not None:
        raise BackendError(
            f"A value was injected into site {site!r}, whose estimator makes its own from noise; inject the noise "
            f"({noise_name(site)!r})."
        )


def log_reverse(marginal: Nested, log_q: Mapping[str, Array], inner: Mapping[str, Array]) -> Array:
    """`log (1/J) sum_j prod_s q(s | u_j) - sum_s log q(s | u_0)` over the sites s that look at u.

    `log_q` are densities at u_0, `inner` those at u_1 and on, `[J - 1 or more, ...]`, by site.
    """
    at = sum((log_q[s] for s in marginal.looking[1:]), log_q[marginal.looking[0]])
    if marginal.draws == 1:
        return ops.zeros(tuple(at.shape), at)
    anew = sum((inner[s] for s in marginal.looking[1:]), inner[marginal.looking[0]])
    every = ops.xp(at).concat([at[None], anew[: marginal.draws - 1]], axis=0)
    return ops.log_mean_exp(every, 0) - at


def sum_out(
    rows: dict[str, dict[str, Any]], plan: Plan, inner: Mapping[str, Array], frozen: Mapping[str, Array]
) -> None:
    """Puts a table's densities in the place of the guide's own under `plan.nested`.

    `rows` are the arrays of local sites, `inner` and `frozen` densities by site at the inner draws, `[J - 1, ...]`.
    """
    for m in plan.nested:
        log_q = {n: rows[n]["log_q"] for n in m.looking}
        stopped = {n: rows[n].get("log_q_frozen", log_q[n]) for n in m.looking}
        found = log_reverse(m, log_q, inner)
        for n in m.sites:
            row = rows[n]
            zero = ops.zeros(tuple(found.shape), found)
            drawn = row["log_q"]
            if m.draws > 1:
                drawn = drawn + ops.xp(drawn).sum(inner[n][: m.draws - 1], axis=0)
            row["log_q_inner"] = drawn
            row["log_q"] = found if n == m.sites[0] else zero
            row["log_q_full"] = ops.xp(found).reshape(row["log_q"], tuple(row["log_q_full"].shape))
            row.pop("log_q_frozen", None)
            if plan.frozen:
                row["log_q_frozen"] = log_reverse(m, stopped, {**inner, **frozen}) if n == m.sites[0] else zero


class Plain(Estimator):
    """Draws that nothing is differentiated through."""

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.sample()


@dataclass(frozen=True)
class Plan:
    """The static choices of a run: how many draws, carried how, and what else the table must hold."""

    K: int = 1
    M: int = 1
    estimators: Mapping[str, Estimator] = field(default_factory=dict)
    requests: frozenset[str] = frozenset()
    kl: frozenset[str] = frozenset()
    """Sites whose KL is found in closed form."""
    chunk: int | None = None
    """Draws that are run at a time; None: all."""
    marginal: tuple[Group, ...] = ()
    """Sums over sites that only the model has."""
    nested: tuple[Nested, ...] = ()
    """Auxiliary sites that are summed out of the guide's density."""
    resampling: Resampling | None = None
    """Draws of a row meet between the steps of its scan."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """How many weights of classes make a value of a site that has them."""

    @staticmethod
    def of_values(structure: Structure, K: int, M: int, nested: tuple[Nested, ...] = ()) -> Plan:
        """Plain draws, for evaluation."""
        marginal = groups(structure, [i.name for i in structure.undrawn()])
        estimators = {i.name: Plain() for i in structure.drawn()}
        return Plan(K, M, estimators, marginal=marginal, nested=nested)

    @property
    def values_summed(self) -> int:
        """Runs of the model, each at other values of the sites that are summed out; independent sums share them."""
        return max((g.count for g in self.marginal), default=1)

    def compared(self, structure: Structure, *requests: str) -> list[str]:
        """The sites that these requests are about: the latent ones of a row, if one of them was made."""
        asked = self.requests.intersection(requests)
        return [i.name for i in structure.drawn(local=True) if i.role == "latent"] if asked else []

    @property
    def in_sums(self) -> frozenset[str]:
        """Sites whose densities are inside a sum."""
        return frozenset(name for g in self.marginal for name, _ in g.looks)

    def rows(self, structure: Structure) -> list[SiteInfo]:
        """The sites that the table has a row of."""
        absent = frozenset[str]().union(*(g.absent for g in self.marginal))
        return [i for i in structure.sites.values() if i.name not in absent]

    def facts(self, structure: Structure, name: str) -> Facts:
        """What a row of the table says of its site besides arrays."""
        facts = Facts(structure.sites[name].role, self.seen(structure).downstream(name), structure.ancestors(name))
        for group in self.marginal:
            if group.carrier == name and name in group.sites:
                role: Role = "observed" if group.observed and not group.mixed else "latent"
                facts = facts._replace(role=role, joint=group.members, mixed=group.mixed)
            if group.carrier is not None and not facts.downstream.isdisjoint({*group.sites, *group.members}):
                facts = facts._replace(downstream=facts.downstream | {group.carrier})
        return facts

    def value_at(self, structure: Structure, name: str, s: Array | int) -> Array | int:
        """Which of its values a site has in the model's run s."""
        return next(g for g in self.marginal if name in g.sites).index(name, s)

    def sums(self, terms: Mapping[str, Array], lead: int) -> dict[str, Array]:
        """Densities `[*lead, *inner]` by the site that carries them, from those of all runs `[S, *lead, *inner]`."""
        return {
            g.carrier: g.summed({n: terms[n][: g.count] for n, _ in g.looks}, lead)
            for g in self.marginal
            if g.carrier is not None
        }

    @property
    def inner(self) -> int:
        """J - 1: how often the guide is run again with inner draws."""
        return max((m.draws - 1 for m in self.nested), default=0)

    @property
    def summed_out(self) -> frozenset[str]:
        """The sites of all `nested`."""
        return frozenset(n for m in self.nested for n in m.sites)

    @property
    def inner_sites(self) -> tuple[str, ...]:
        """Sites whose densities at the inner draws are needed."""
        return tuple(dict.fromkeys(n for m in self.nested for n in (*m.sites, *m.looking)))

    @property
    def frozen_inner_sites(self) -> tuple[str, ...]:
        """Those of them that the guide's loss sees under stopped parameters."""
        return tuple(n for n in self.inner_sites if n in self.estimators and self.estimators[n].frozen)

    def seen(self, structure: Structure) -> Structure:
        """The structure with what the densities look at under `nested`: an estimate looks at all that is in it."""
        if not self.nested:
            return structure
        sites = dict(structure.sites)
        for m in self.nested:
            looks = frozenset({*m.sites, *m.looking}.union(*(sites[n].guide_parents for n in (*m.sites, *m.looking))))
            sites[m.sites[0]] = replace(sites[m.sites[0]], model_parents=looks)
        return replace(structure, sites=sites)

    @property
    def frozen(self) -> bool:
        return any(e.frozen for e in self.estimators.values())

    @property
    def relaxed(self) -> bool:
        """Whether some site's values are off the support of its distribution."""
        return any(e.relaxed() for e in self.estimators.values())

    def hard(self) -> Plan:
        """The same run with draws of the sites' own distributions in the place of relaxed ones."""
        return replace(self, estimators={n: Plain() if e.relaxed() else e for n, e in self.estimators.items()})

    def of_classes(self, side: Literal["guide", "model"]) -> dict[str, Callable[[Array, Array], Array]]:
        """Densities of sites whose values are relaxed, all or some of them, as this side has them."""
        estimators = self.estimators.items()
        return {n: partial(e.log_density, side=side) for n, e in estimators if e.relaxed() or e.relaxes}

    def varied(self, name: str, count: int) -> bool:
        """Whether a site's value is one of its estimator's variants, of which there are `count`."""
        return count > 1 or self.estimators[name].weighted

    def layout(self, structure: Structure, local: bool) -> tuple[int, dict[str, tuple[int, int]]]:
        """V of a level, and for each of its sites (variants, stride) on the draws axis.

        Entry t holds variant `t // stride % variants` of a site. A site drawn before others with variants keeps one
        draw for all of theirs: the entries `t // stride * stride` that differ only in later sites share it.
        """
        strides: dict[str, tuple[int, int]] = {}
        stride = 1
        for info in reversed(structure.drawn(local)):
            count = self.estimators[info.name].count(0 if info.support is None else len(info.support))
            strides[info.name] = (count, stride)
            stride *= count
        return stride, strides


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


def is_real(support: Any) -> bool:
    """Whether a support is the reals, so that its bijection is the identity."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return type(support).__name__.strip("_") in ("Real", "RealVector")


def latent_site(
    name: str,
    fn: Any,
    plates: Sequence[PlateOf],
    data_plate: str | None,
    transform: Any,
    unconstrained: Callable[[], Sequence[np.ndarray]],
) -> Latent:
    """What a family of guides is told of a model's latent site.

    `transform` maps the reals to its support; `unconstrained()` are prior draws `[*batch, *event]` mapped back, whose
    median, over rows too, is where a guide starts.

    Raises:
        ProgramError: the site is discrete, and of no kind that families know.
    """
    batch = tuple(fn.batch_shape)
    row_dim = next((p.dim for p in plates if p.name == data_plate), None)
    discrete = _discrete_kind(name, fn)
    if discrete is not None:
        event = tuple(fn.event_shape) + ((innermost(fn).probs.shape[-1],) if discrete == "categorical" else ())
        draws: Sequence[np.ndarray] = [np.zeros(batch + event)]
    else:
        draws = unconstrained()
        event = draws[0].shape[len(batch) :]
    values = np.stack(draws).astype(np.float64)
    if row_dim is not None:
        values = np.moveaxis(values, 1 + len(batch) + row_dim, 0)
        values = values.reshape(-1, *values.shape[2:])
    start = np.nan_to_num(np.nanmedian(values, axis=0), nan=0.0, posinf=0.0, neginf=0.0)
    identity = discrete is not None or is_real(fn.support)
    return Latent(
        name, tuple(plates), row_dim, batch, event, fn.event_dim, start, None if identity else transform, discrete
    )


def _discrete_kind(name: str, fn: Any) -> Discrete | None:
    kind = type(innermost(fn)).__name__
    for prefix, discrete in _DISCRETE.items():
        if kind.startswith(prefix):
            return discrete
    if fn.support.is_discrete:
        raise ProgramError(
            f"Families of guides know discrete sites that are Bernoulli, Categorical or OneHotCategorical; "
            f"{name!r} is {kind}. Write a guide for it, or sum it out in the model."
        )
    return None


_DISCRETE: dict[str, Discrete] = {
    "Bernoulli": "bernoulli",
    "OneHotCategorical": "one_hot",
    "Categorical": "categorical",
}


def of_least_variance(plan: Plan, own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The sites whose estimator's own parameters are trained on the variance of the guide's gradient."""
    return [s for s in own if s in plan.estimators and plan.estimators[s].least_variance]


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


def rebuild(fn: Any, value: Array, solve: Callable[[Array, Array], Array]) -> Array:
    """`T(sg(T^-1(value)), parameters)`: an injected value that carries the pathwise gradient of its distribution.

    `solve(L, b)` solves a lower-triangular system. Location-scale families, multivariate normals and invertible
    transforms of them are known; others raise BackendError.
    """
    kind = type(fn).__name__
    stop = ops.stop_gradient
    if hasattr(fn, "noise_of"):
        return fn.from_noise(stop(fn.noise_of(value)))
    if kind == "TransformedDistribution" or getattr(fn, "transforms", None):
        x = value
        for transform in reversed(fn.transforms):
            x = transform.inv(x) if hasattr(transform, "inv") else transform._inverse(x)
        x = rebuild(fn.base_dist, x, solve)
        for transform in fn.transforms:
            x = transform(x)
        return x
    if hasattr(fn, "base_dist"):
        return rebuild(fn.base_dist, value, solve)
    if kind == "Delta":
        return fn.v + stop(value - fn.v)
    if kind == "MultivariateNormal":
        noise = stop(solve(fn.scale_tril, value - fn.loc))
        return fn.loc + ops.xp(value).matmul(fn.scale_tril, noise[..., None])[..., 0]
    if kind in {"Normal", "Laplace", "Cauchy", "Gumbel", "Logistic", "StudentT"}:
        return fn.loc + fn.scale * stop((value - fn.loc) / fn.scale)
    raise BackendError(
        f"A value was injected into a pathwise site with distribution {kind}, whose noise cannot be recovered; inject "
        f"values into location-scale, multivariate normal or transformed sites, or use a score-type estimator."
    )


def product_support(atoms: np.ndarray, event_shape: Sequence[int]) -> np.ndarray | None:
    """All values `[V, *event_shape]` of independent elements with the given atoms `[E, *atom_shape]`.

    None where there would be more than LARGEST_SUPPORT.
    """
    atom_shape = atoms.shape[1:]
    outer = tuple(event_shape)[: len(event_shape) - len(atom_shape)]
    elements = int(np.prod(outer, dtype=int))
    if len(atoms) ** elements > LARGEST_SUPPORT:
        return None
    rows = [atoms[list(choice)] for choice in itertools.product(range(len(atoms)), repeat=elements)]
    return np.stack(rows).reshape(len(rows), *outer, *atom_shape)


def log_values(atoms: int, atom_shape: Sequence[int], event_shape: Sequence[int]) -> float:
    """log V of independent elements with so many atoms each."""
    elements = np.prod(tuple(event_shape)[: len(event_shape) - len(atom_shape)], dtype=int)
    return float(elements * np.log(atoms))


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


def innermost(fn: Any) -> Any:
    """The distribution inside `to_event`, masks, expansions and transforms."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


@dataclass(frozen=True)
class Chain:
    """The distribution of a site inside a scan, over all steps: facts only, as its density was taken step by step.

    Steps are the first dimension of an event, so a value is `[*batch, T, *event]`.
    """

    of: Any
    """The distribution of one step."""
    steps: int
    has_enumerate_support = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.of.batch_shape)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.steps, *self.of.event_shape)

    @property
    def event_dim(self) -> int:
        return int(self.of.event_dim) + 1

    @property
    def has_rsample(self) -> bool:
        return bool(self.of.has_rsample)

    @property
    def support(self) -> Any:
        return self.of.support

    @property
    def mean(self) -> Any:
        raise ProgramError("A site inside a scan has no mean of its own: each step depends on the last; take draws.")


def _kind(fn: Any) -> str:
    return type(innermost(fn.of if isinstance(fn, Chain) else fn)).__name__


def steps_of(*fns: Any) -> int:
    """Steps of the scan that a site is inside of wherever it is met, or 0."""
    found = {fn.steps if isinstance(fn, Chain) else 0 for fn in fns}
    return found.pop() if len(found) == 1 else 0


def check_together(one_each: bool, guide: int = 0, model: int = 0) -> None:
    """Refuses programs that do not have one scan of the same number of steps in the guide and in the model."""
    if not one_each or guide != model:
        raise ProgramError(
            "The draws of a row are resampled between steps, which guide and model take together: each needs one "
            "ppl.scan" + (f", and theirs have {guide} and {model} steps." if one_each else ".")
        )


def is_factor(fn: Any) -> bool:
    """Whether a site is a `factor`: a density without a value, which is no data."""
    return _kind(fn) == "Unit"


def is_chain_of_classes(fn: Any) -> bool:
    """Whether a site is inside a scan and has a finite support at every step."""
    return isinstance(fn, Chain) and bool(fn.of.has_enumerate_support)


def undeclared(fn: Any, plates: Iterable[Any]) -> bool:
    """Whether a site has several elements along a batch dimension that is no plate's."""
    dims = {f.dim for f in plates}
    return any(size > 1 and dim not in dims for dim, size in enumerate(fn.batch_shape, -len(fn.batch_shape)))


def is_point(fn: Any) -> bool:
    """Whether a site's value is a function of the distribution's parameters."""
    return _kind(fn) == "Delta"


def check_param(name: str, known: Any, offered: Any) -> None:
    """Refuse a second initial value of another shape: both libraries would go on with the first without a word."""
    if offered is None or callable(offered) or np.shape(known) == np.shape(offered):
        return
    raise ProgramError(
        f"Parameter {name!r} is given initial values of shapes {tuple(np.shape(known))} and "
        f"{tuple(np.shape(offered))}; one name is one parameter, so give the second a name of its own."
    )


def density(site: Mapping[str, Any], log_prob: Callable[[Any], Any]) -> Any:
    """`log_prob(site)`, or an error that says so where value, distribution and plates do not fit each other."""
    check_fits(site)
    try:
        found = log_prob(site)
    except (RuntimeError, TypeError, ValueError) as error:
        value = site["value"]
        raise ProgramError(
            f"Site {site['name']!r} has no density: {_kind(site['fn'])} at a value of shape {tuple(np.shape(value))} "
            f"and dtype {getattr(value, 'dtype', type(value).__name__)} says {_told(error)}."
        ) from error
    for frame in site["cond_indep_stack"]:
        size = found.shape[frame.dim] if frame.dim is not None and len(found.shape) >= -frame.dim else 1
        if size not in (1, frame.size):
            raise ProgramError(
                f"Site {site['name']!r} has densities of shape {tuple(found.shape)} in plate {frame.name!r}, which is "
                f"dimension {frame.dim} and has {frame.size} rows; make further axes of a value part of one event "
                f"(to_event), or give them a plate."
            )
    return found


def check_fits(site: Mapping[str, Any]) -> None:
    """Refuses a value of another shape than its distribution's; a larger one has densities that no plate would sum.

    Where `to_event` sums them, parameters of size one stand for all of the value's.
    """
    fn, shape = site["fn"], tuple(np.shape(site["value"]))
    drawn = (*fn.batch_shape, *fn.event_shape)
    summed = range(len(fn.batch_shape), len(fn.batch_shape) + getattr(fn, "reinterpreted_batch_ndims", 0))
    offset = len(drawn) - len(shape)
    wanted = tuple(shape[i - offset] if i in summed and n == 1 and i >= offset else n for i, n in enumerate(drawn))
    try:
        fits = np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        fits = False
    if not fits:
        sizes = {f.name: f.size for f in site["cond_indep_stack"]}
        remedy = (
            "size plates and parameters by the data (len(x))"
            if site["is_observed"]
            else "if the guide draws it for every row, the model once for all rows, sample it outside the plate in both"
        )
        raise ProgramError(
            f"Site {site['name']!r} has a value of shape {shape}, and its distribution draws {tuple(drawn)} in plates "
            f"{sizes}; {remedy}."
        )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}"


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
            f"Program {program.name!r} failed{where} when it was first run, on {shapes or 'no data'}: {_told(error)}."
        ) from error


def _functions(program: Program) -> Iterator[Any]:
    for call in (program.model, program.guide):
        while isinstance(call, partial):
            call = call.func
        yield getattr(call, "__func__", call)


CHECK_DATA = "Check units and options such as total_count."

UNOBSERVED = "_unobserved"
"""How both libraries end the name of the latent site that `obs_mask` makes."""

CHAINS = (
    "sum it out in the model by the library's own variable elimination (pyro.distributions.DiscreteHMM; on NumPyro a "
    "factor of a scan with logsumexp, or numpyro.contrib.funsor in an SVI of its own)"
)


def check_scale(name: str, shape: Sequence[int], plate_dim: int | None) -> None:
    """Refuse a scale handler's array unless it is a number a row."""
    if any(size > 1 and dim != plate_dim for dim, size in enumerate(shape, -len(shape))):
        raise ProgramError(
            f"Site {name!r} is scaled by an array of shape {tuple(shape)}; a scale is one number, or one for each row "
            f"of the data plate. Sum elements that are weighted apart in a factor of your own."
        )


def check_sites(
    guide: Mapping[str, bool],
    model: Mapping[str, bool],
    auxiliary: Sequence[str],
    supports: Mapping[str, np.ndarray | None],
    chains: Sequence[str],
) -> None:
    """Refuse sites that only one of model and guide has, or both observe (`guide`, `model`: site -> observed).

    Of latent sites that only the model has, `supports` holds all values or None; those with values may be summed out,
    which is for legality to say. `chains` are those that are discrete and inside a scan.
    """
    for name, observed in guide.items():
        if name in model and (observed or model[name]):
            raise ProgramError(
                f"Site {name!r} is {'observed' if observed else 'latent'} in the guide and "
                f"{'observed' if model[name] else 'latent'} in the model; a guide draws the model's latent sites, and "
                f"terms of its own (factor) need names of their own."
            )
    latent = [name for name, observed in model.items() if not observed]
    missing = [name for name in latent if name not in guide and (name.endswith(UNOBSERVED) or supports[name] is None)]
    if missing:
        way = "Sample it in the guide, condition on it, or sum it out in the model."
        if missing[0].endswith(UNOBSERVED):
            way = "If obs_mask made it, observe under a mask instead (poutine.mask, handlers.mask or dist.mask)."
        elif missing[0] in chains:
            way = f"It is a discrete chain inside a scan; sample it in the guide, or {CHAINS}."
        raise ProgramError(
            f"Latent site {missing[0]!r} is in the model but not in the guide (guide sites: {list(guide)}). {way}"
        )
    orphans = [name for name in guide if name not in model and name not in auxiliary]
    if orphans:
        raise ProgramError(
            f"Guide site {orphans[0]!r} is not in the model (model sites: {latent}). Rename it, or mark it as "
            f"auxiliary with infer={{'is_auxiliary': True}}."
        )


Numbers = Mapping[str, Any]
"""Every number that a schedule may move, by dotted name; the compiled step takes them as inputs."""


@dataclass(frozen=True)
class Descent:
    """Optimisers by their place in the recipe, and the place of every trained parameter's."""

    optimizers: Mapping[str, Algorithm]
    """ "optimizer" or "optimizer.<pattern>" -> name and options."""
    of: Mapping[str, str]
    """Parameter -> place; those that stay as they are have none."""
    groups: Mapping[str, str]
    """Parameter -> "model" or "guide"."""
    turns: Mapping[str, Turn]
    """When each group moves, where they take turns."""
    model_first: bool
    """The guide's gradient is taken at the model's new parameters, on the same draws."""

    @property
    def units(self) -> dict[str, Unit]:
        """Optimisers with parameters, by name; where groups move apart, each place has one for each."""
        apart = bool(self.turns) or self.model_first
        found: dict[str, Unit] = {}
        for place, optimizer in self.optimizers.items():
            for group in ("model", "guide") if apart else (None,):
                mine = (n for n, p in self.of.items() if p == place and group in (None, self.groups[n]))
                if names := sorted(mine):
                    found[place if group is None else f"{place}|{group}"] = Unit(place, optimizer, names, group)
        return found

    def static_key(self) -> Hashable:
        return (
            tuple(sorted(self.of.items())),
            tuple((p, _static(o)) for p, o in self.optimizers.items()),
            tuple(self.turns),
            self.model_first,
        )


@dataclass(frozen=True)
class Unit:
    """Parameters that one optimiser moves together."""

    place: str
    optimizer: Algorithm
    names: list[str]
    group: str | None
    """The group that all of them are of, where groups move apart."""

    @property
    def natural(self) -> bool:
        """Whether gradients are turned into displacements by the Fisher information (see `natural`)."""
        return self.optimizer.name == "natural"  # type: ignore[attr-defined]

    @property
    def turn(self) -> str:
        """The number that says whether it is this group's turn; there is none where groups take none."""
        return f"turn.{self.group}"


def numbers_of(
    objective: Objective, plan: Plan, optimizers: Mapping[str, Algorithm], turns: Mapping[str, Turn] | None = None
) -> dict[str, float | Schedule | Turn]:
    """The numbers of a recipe: "objective.beta", "estimator.z.temperature", "optimizer.learning_rate", "turn.guide"."""
    owners = {"objective": objective, **optimizers}
    owners |= {f"estimator.{site}": e for site, e in plan.estimators.items()}
    numbers = {f"{owner}.{name}": v for owner, a in owners.items() for name, v in a.numbers().items()}
    return {**numbers, **{f"turn.{group}": turn for group, turn in (turns or {}).items()}}


def with_numbers(objective: Objective, plan: Plan, numbers: Numbers) -> tuple[Objective, Plan]:
    """Objective and plan with these numbers in place of their own."""

    def of(owner: str) -> dict[str, Any]:
        return {n.removeprefix(owner + "."): v for n, v in numbers.items() if n.rpartition(".")[0] == owner}

    def placed(s: str, e: Estimator) -> Estimator:
        return e.with_numbers({n: v for n, v in of(f"estimator.{s}").items() if n in e.numbers()})

    mine = of("objective")
    if mine:
        objective = objective.with_numbers(mine)
    if any(n.startswith("estimator.") for n in numbers):
        plan = replace(plan, estimators={s: placed(s, e) for s, e in plan.estimators.items()})
    return objective, plan


def static_key(objective: Objective, plan: Plan) -> Hashable:
    """What a compiled step depends on besides shapes: everything of objective and estimators but their numbers."""
    estimators = tuple((s, _static(e)) for s, e in plan.estimators.items())
    return _static(objective), plan.requests, plan.kl, estimators, plan.marginal


def _static(algorithm: Algorithm) -> Hashable:
    return type(algorithm), algorithm.with_numbers(dict.fromkeys(algorithm.numbers(), 0.0))


class Steps:
    """Compiled steps, the most recently used ones kept; `traces` counts how often a program was traced into one."""

    def __init__(self, size: int = 32) -> None:
        self.traces = 0
        self._size = size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, build: Callable[[], Any]) -> Any:
        with TURN:
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                self._kept[key] = build()
                while len(self._kept) > self._size:
                    self._kept.popitem(last=False)
            return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def renew(self, key: Hashable, build: Callable[[], Any]) -> Any:
        with TURN:
            self._kept.pop(key, None)
            return self.get(key, build)


SKIPPED = "skipped"
"""`skipped_in_a_row`, of a trainer's tree, of its packed state and of its records."""

RECORDS = ("loss", "gradient_norm", SKIPPED)
"""What a step records: the loss per row, the norm of all trained gradients before clipping, and `skipped_in_a_row`."""

MOST_SKIPPED = "loop.most_skipped"
"""The number of a step that says how many in a row may be skipped; 0 stops at the first that is not finite."""


def skipped_in_a_row(xp: Any, before: Array, most: Array, loss: Array, norm: Array) -> Array:
    """How many steps in a row, up to this one, had a loss or a gradient that is not finite; none moved anything.

    Beyond `most` it stays what it is, so nothing moves any more: the state after a chunk is that before the first of
    them, and no step waits to be told. `xp` is torch or numpy.
    """
    here = xp.where(xp.isfinite(loss + norm), 0.0 * before, before + 1.0)
    return xp.where(before > most, before, here)


def rows_of(sites: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values and densities of a table's sites."""
    return {n: {"value": s.value, "log_p": s.log_p, "log_q": s.log_q} for n, s in sites.items()}


@dataclass(frozen=True)
class Again:
    """A step that was run once more, outside of the compiled loop and with its own noise."""

    batch: Call
    table: Mapping[str, Mapping[str, Any]]
    """Site -> "value", "log_p" and "log_q", as in the table of a run."""
    gradient: Mapping[str, np.ndarray]
    """Gradients of the parameters; of a network that is one parameter, end to end."""


class Trainer(Protocol):
    """Optimiser steps in chunks, of R runs at once that differ in seed, initial parameters and order of rows.

    A tree holds all state of all runs: parameters, optimisers, estimators' state and parameters.
    """

    mode: str
    notes: list[str]
    fused: float
    """How much less memory a step may take than `peak` says, where operations are fused."""

    def initial(self) -> Any: ...

    def run(
        self, tree: Any, data: Call, index: np.ndarray | None, numbers: Mapping[str, np.ndarray], start: int, n: int
    ) -> tuple[Any, Mapping[str, Any]]:
        """Steps `start .. start + n - 1`; `index [R, C, B]` and `numbers [C]` may be longer.

        Gives RECORDS, each `[R, n]`.
        """

    def loss(
        self,
        tree: Any,
        bound: Any,
        batch: Call,
        key: Any,
        numbers: Numbers,
        rows: int | None,
        plan: Plan | None = None,
    ) -> Any:
        """The objective's loss per row, `[R]`, on a batch of `bound`, without gradients; `rows` is N.

        `plan` is another one than the fit's; numbers that it has no place for are left aside.
        """

    def again(
        self,
        tree: Any,
        data: Call,
        index: np.ndarray | None,
        numbers: Mapping[str, np.ndarray],
        step: int,
        i: int,
        run: int = 0,
    ) -> Again:
        """Step number `step`, whose numbers and rows are at `i`, once more; nothing moves."""

    def peak(self, tree: Any, batch: Call, numbers: Numbers) -> int | None:
        """Bytes that a step takes beside parameters and data, as far as shapes tell; nothing is run."""

    def params(self, tree: Any, run: int = 0) -> Mapping[str, Any]: ...

    def pack(self, tree: Any, run: int = 0) -> dict[str, np.ndarray]:
        """All state of one run as arrays that nothing else changes."""

    def unpack(self, *runs: Mapping[str, np.ndarray]) -> Any:
        """A tree of these runs, each as `pack` gave it."""

    def params_of(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """The parameters among what `pack` gave."""


def check_state(found: Mapping[str, np.ndarray], needed: Mapping[str, np.ndarray], what: str = "state") -> None:
    """Refuses saved arrays that are not those of this fit."""
    kinds = [{n: (a.dtype.name, a.shape) for n, a in arrays.items()} for arrays in (found, needed)]
    wrong = sorted(n for n in {*found, *needed} if kinds[0].get(n) != kinds[1].get(n))
    if wrong:
        pair = (known.get(wrong[0]) for known in kinds)
        had, wants = ("not there" if kind is None else f"{kind[0]} of shape {kind[1]}" for kind in pair)
        raise BackendError(
            f"The {what} does not fit: missing, unknown or of another shape or dtype are {wrong[:5]} ({wrong[0]!r} is "
            f"{had}, and should be {wants}); continue with the same program, recipe, backend and dtype."
        )


def check_value(name: str, found: Any, needed: Sequence[int], inside: Callable[[], bool]) -> None:
    """Refuses a starting value that its parameter cannot have."""
    if np.shape(found) != tuple(needed):
        raise DataError(f"start: {name!r} has shape {tuple(np.shape(found))}, and the parameter {tuple(needed)}.")
    if not inside():
        raise DataError(
            f"start: {name!r} is outside the support of its parameter, or at its edge; values span "
            f"{float(found.min()):g} to {float(found.max()):g}."
        )


def own_name(owner: str, name: str) -> str:
    """What a parameter of an estimator or of the objective is called: "estimator.z.weight", "objective.log_z"."""
    return f"objective.{name}" if owner == "objective" else f"estimator.{owner}.{name}"


def merged(params: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters of the program and of the algorithms under one name each."""
    return {**params, **{own_name(s, n): p for s, ps in own.items() for n, p in ps.items()}}


def parameter_groups(
    structure: Structure, objective: Objective, plan: Plan, batch: Call
) -> dict[str, frozenset[str]]:
    """Where every parameter is used, those of the algorithms themselves nowhere."""
    own = merged({}, initial_extras(objective, plan, batch)[1])
    both = sorted(set(own) & set(structure.groups))
    if both:
        raise ProgramError(f"Parameters {both} are called like those of the objective or of an estimator; rename them.")
    return {**structure.groups, **dict.fromkeys(own, frozenset[str]())}


def initial_extras(
    objective: Objective, plan: Plan, batch: Call
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """States of the estimators, and parameters of the estimators and the objective themselves, as plain numbers."""
    features = int(np.prod(batch.leaves[0].shape[1:], dtype=int)) if batch.leaves else 0
    states = {s: e.initial_state() for s, e in plan.estimators.items()}
    own = {s: e.initial_own(features, plan.weights.get(s, 0)) for s, e in plan.estimators.items()}
    own["objective"] = objective.initial_own(features)
    return (
        {s: v for s, v in states.items() if v is not None},
        {s: v for s, v in own.items() if v},
    )
