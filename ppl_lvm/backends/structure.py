"""The structure of a program: its sites, and what an objective and estimators plan to do with each of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, Resampling, SiteDistribution, best_pattern
from ppl_lvm.backends.marginal import Group, groups
from ppl_lvm.draws import Plate
from ppl_lvm.errors import BackendError
from ppl_lvm.ops import Array

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


def of_least_variance(plan: Plan, own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The sites whose estimator's own parameters are trained on the variance of the guide's gradient."""
    return [s for s in own if s in plan.estimators and plan.estimators[s].least_variance]
