"""Which objective, estimator and site go together: computed from what each declares, before training starts.

Every rule is a function that returns the reason for a refusal and the remedy, or None. `plan` applies them all to the
recipe and the probed program, chooses estimators where the recipe says "auto", and raises one error that names every
site at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ppl_lvm.algorithm import Estimator, Objective, best_pattern
from ppl_lvm.backends.marginal import Group, groups
from ppl_lvm.backends.sites import CHAINS, LARGEST_SUPPORT
from ppl_lvm.backends.structure import Nested, Plain, Plan, SiteInfo, Structure, nested
from ppl_lvm.catalogue import resolve
from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.marginalize import marginalize
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.vimco import vimco

PREFERRED: tuple[Estimator, ...] = (pathwise(), vimco(), rloo(), score())
"""What "auto" tries for each site, in this order: the first legal one is taken."""
OFFERED: tuple[Estimator, ...] = (*PREFERRED, enumerated())
"""What a refusal may name instead: those of them that are legal for the site."""
LARGEST_JOINT = 4096
"""Choices of one enumerated value for each draw that a function of all draws is evaluated at, at most."""


@dataclass(frozen=True)
class Case:
    """One site under one estimator, in its program and recipe."""

    objective: Objective
    estimator: Estimator
    site: SiteInfo
    structure: Structure
    estimators: Mapping[str, Estimator]
    offered: bool = False
    """The estimator is one that a refusal might name, so no other is looked for."""

    @property
    def verbs(self) -> frozenset[str]:
        """The verbs that the site's draws go through; the expectation over globals is a mean."""
        return self.objective.verbs if self.site.local else frozenset({"mean"})

    @property
    def nested(self) -> tuple[Nested, ...]:
        return nested(self.structure, dict(self.objective.marginal or ()))

    @property
    def draws(self) -> int:
        return self.objective.draws if self.site.local else self.objective.outer

    def live(self, name: str) -> bool:
        """Whether another site's value carries gradient."""
        if self.moved(name):
            return any(self.live(parent) for parent in self.structure.ancestors(name))
        estimator = self.estimators.get(name)
        return estimator is not None and _live(estimator)

    def moved(self, name: str) -> bool:
        """Whether a point is a function of other guide sites alone, so that it moves with their draws."""
        site = self.structure.sites[name]
        return site.point and not site.parameterised and bool(self.structure.ancestors(name))

    @property
    def remedy(self) -> str:
        """The estimators that are legal for this site, the other sites' unchanged."""
        if self.offered:
            return ""
        name = self.site.name
        cases = [replace(self, estimator=e, estimators={**self.estimators, name: e}, offered=True) for e in OFFERED]
        legal = [repr(_name(c.estimator)) for c in cases if refusal(c) is None]
        if not legal:
            return "no estimator serves it here, use another objective"
        return "use " + " or ".join(filter(None, (", ".join(legal[:-1]), legal[-1])))


Rule = Callable[[Case], str | None]


def _drawn(c: Case) -> str | None:
    if c.estimator.marginal:
        return f"it is for sites that only the model has, and the guide draws this one; {c.remedy}."
    return None


def _kind_of_site(c: Case) -> str | None:
    if c.site.point and not isinstance(c.estimator, pathwise):
        return f"its distribution is a point, which is no draw; {c.remedy}."
    if c.estimator.site == "reparameterised" and not c.site.reparameterised:
        return f"its distribution has no reparameterised draw; {c.remedy}."
    if c.estimator.site in ("classes", "one_hot") and c.site.classes is None:
        return f"it is for one-hots and Bernoullis, and the distribution is neither; {c.remedy}."
    if c.estimator.site == "one_hot" and not c.site.one_hot:
        return (
            f"its value is an index, which carries no gradient; make it a OneHotCategorical in guide and model, or "
            f"{c.remedy}."
        )
    if c.estimator.site == "finite" and c.site.support is None:
        return f"its distribution has no finite support of at most {LARGEST_SUPPORT} values; {c.remedy}."
    return None


def _relaxed(c: Case) -> str | None:
    """Relaxed values have a density of their own on both sides."""
    if not c.estimator.relaxed():
        return None
    if c.site.role == "latent" and c.site.classes_in_model is None:
        return (
            f"its values are relaxed, and the model's distribution of the site is of another kind, which has no "
            f"density there; give the model the guide's kind, or {c.remedy}."
        )
    if c.site.partly_observed:
        return f"its values are relaxed, and the data that take the places of some are not; {c.remedy}."
    if c.objective.requests() & {"cross", "moments", "prior"}:
        return (
            f"its values are relaxed, and the objective compares rows by the distributions of values that are not; "
            f"{c.remedy}."
        )
    return None


def _inside_a_scan(c: Case) -> str | None:
    if not c.site.scanned:
        return None
    plain = c.estimator.site == "reparameterised" and not c.estimator.scored
    without_gradient = c.estimator.scored and not c.site.reparameterised
    if plain or without_gradient:
        return None
    return (
        f"the library's own scan draws it, out of this estimator's reach; {c.remedy}, or write the loop over time in "
        f"Python."
    )


def _one_draw_a_row(c: Case) -> str | None:
    support = 0 if c.site.support is None else len(c.site.support)
    inner = [p.name for p in c.site.plates if p.name != c.structure.data_plate]
    several = c.estimator.count(support) > 1 or c.estimator.weighted
    if several and c.site.chained:
        return f"it is drawn step by step inside a scan, each step from the last, not once a row; {c.remedy}."
    if several and inner and not c.estimator.by_row:
        return (
            f"it has one draw for every element of plates {inner}, not one a row; declare them with to_event, or "
            f"{c.remedy}."
        )
    return None


def _verb(c: Case) -> str | None:
    for verb in sorted(c.verbs):
        why = c.estimator.why_refused(verb)
        if why is not None:
            return f"inside `{verb}` {why}; {c.remedy}."
    return None


def _enough_draws(c: Case) -> str | None:
    if c.draws >= c.estimator.least_draws:
        return None
    option = "draws" if c.site.local else "outer"
    return (
        f"its baseline needs {c.estimator.least_draws} draws at this level, and {option} = {c.draws}; "
        f"set {option} = {c.estimator.least_draws} or more, or use 'score'."
    )


def _detached(c: Case) -> str | None:
    if not c.objective.detached or c.moved(c.site.name):
        return None
    if _live(c.estimator) and c.estimator.why_biased():
        return f"the objective takes draws as they are, and it changes nothing about them; {c.remedy}."
    if c.site.point:
        return (
            "the objective differentiates densities at fixed draws, and a point moves with its parameters; use 'elbo' "
            "or 'iwae'."
        )
    if c.site.scanned and c.site.reparameterised:
        return (
            "the objective differentiates densities at fixed draws, and the library's own scan draws it live; write "
            "the loop over time in Python."
        )
    return None


def _choices(c: Case) -> str | None:
    """A function of all draws is taken at every choice of one enumerated value a draw."""
    if not c.estimator.exhaustive or "joint" not in c.verbs:
        return None
    values = 1
    for other in c.structure.drawn(local=True):
        estimator = c.estimators.get(other.name)
        support = 0 if other.support is None else len(other.support)
        if other.name == c.site.name or (estimator is not None and estimator.exhaustive):
            values *= max(support, 1)
        elif estimator is not None and (estimator.count(support) > 1 or estimator.weighted):
            return (
                f"site {other.name!r} of the same row has values besides its draw ({_name(estimator)!r}), which a sum "
                f"over enumerated ones inside a function of all draws does not know; {c.remedy}."
            )
    if values**c.draws > LARGEST_JOINT:
        return (
            f"a function of {c.draws} draws of {values} values each is summed over {values}^{c.draws} choices, more "
            f"than {LARGEST_JOINT}; lower draws, or {c.remedy}."
        )
    return None


def _summed_out(c: Case) -> str | None:
    """What an estimate of the guide's density, over inner draws of auxiliary sites, asks of the sites in it."""
    for m in c.nested:
        if c.site.name in m.sites:
            support = 0 if c.site.support is None else len(c.site.support)
            if c.estimator.exhaustive or c.estimator.weighted or c.estimator.count(support) > 1:
                return f"`marginal` sums it out over draws, and it has values besides its draw; {c.remedy}."
        if c.estimator.frozen and c.site.local:
            live = [n for n in m.sites if c.structure.sites[n].trained or c.structure.ancestors(n)]
            if live:
                return (
                    f"`marginal` sums out {live[0]!r}, whose density looks at parameters or at other sites, so that "
                    f"the estimated density has a score that is not this site's; use 'pathwise' or 'score'."
                )
            drawn = {i.name for i in c.structure.drawn()}
            others = [n for n in m.looking if n in drawn and not c.estimators.get(n, c.estimator).frozen]
            if others:
                return (
                    f"`marginal` estimates one density of all sites that look at {list(m.sites)}, and of these "
                    f"{others[0]!r} is not {_name(c.estimator)!r}; make all of them so, or use 'pathwise' or 'score'."
                )
    return None


def _one_of_many(c: Case) -> str | None:
    if c.objective.resampling() is None or not c.site.local:
        return None
    plain = c.estimator.count(0 if c.site.support is None else len(c.site.support)) == 1
    if plain and not (c.estimator.frozen or c.estimator.exhaustive or c.estimator.weighted):
        return None
    return f"draws are resampled between steps, which it knows nothing of; {c.remedy}."


def _pooled(c: Case) -> str | None:
    support = 0 if c.site.support is None else len(c.site.support)
    values = c.estimator.exhaustive or c.estimator.weighted or c.estimator.count(support) > 1
    if "pooled" not in c.verbs or not values:
        return None
    return (
        f"the draws of all rows of a batch meet in one function (`pooled`), and it has values or weights of its own in "
        f"each row; {c.remedy}."
    )


def _linear(c: Case) -> str | None:
    """The mean in the place of draws. Whether densities are linear in it is found by numbers (`check_linear`)."""
    if not c.estimator.linear:
        return None
    if c.objective.verbs != {"mean"}:
        return f"its mean stands for its draws, which no function of draws but a mean allows; {c.remedy}."
    why = _closed_kl(c.site.name, c.structure, ())
    if why is None and not _wants_kl(c.objective):
        why = "the objective samples its KL; set kl = 'where_known'"
    if why is not None:
        return f"its mean stands for its draws, and no density of the site is taken there ({why}); {c.remedy}."
    looking = sorted(n for n, i in c.structure.sites.items() if c.site.name in i.guide_parents)
    if looking:
        return f"the guide draws {looking[0]!r} from it, whose distribution is another one at its mean; {c.remedy}."
    if c.site.chained or c.site.partly_observed or (c.site.classes is not None and not c.site.one_hot):
        return f"its values have no mean that a density could be at (indices, steps, data in part); {c.remedy}."
    return None


def _doubly_reparameterised(c: Case) -> str | None:
    if not c.estimator.frozen:
        return None
    shared = sorted(n for n, used in c.structure.groups.items() if len(used) == 2)
    if shared:
        return f"model and guide share parameters {shared}, and it gives them two gradients; use 'pathwise'."
    if not c.site.local or not {"joint", "log_mean_exp", "wake"} & c.verbs:
        return None
    if not c.objective.smooth():
        return (
            f"objective {_name(c.objective)!r} has kinks with these options, and the surrogate needs second "
            f"derivatives; {c.remedy}."
        )
    sites = c.structure.sites
    above = sorted(
        i.name
        for i in c.structure.drawn(local=False)
        if c.live(i.name) and any(sites[n].local for n in c.structure.downstream(i.name))
    )
    if above:
        instead = "" if sites[above[0]].point else f", or 'score' for {above[0]!r}"
        return (
            f"global site {above[0]!r} carries a pathwise gradient into the rows, which the surrogate would reweigh; "
            f"use 'pathwise' here{instead}."
        )
    for other in sites.values():
        if not other.local or other.role == "observed" or not other.in_guide:
            continue
        if other.name == c.site.name or c.moved(other.name):
            continue
        if other.fixed or other.point:
            what = "a factor" if other.fixed else "a point"
            if other.point and c.structure.ancestors(other.name):
                what = "a point that looks at parameters beside its draws"
            return (
                f"site {other.name!r} of the same row is {what}, whose gradient the surrogate would reweigh; "
                f"use 'pathwise'."
            )
        estimator = c.estimators.get(other.name)
        if estimator is None or estimator.frozen:
            continue
        if estimator.site in ("classes", "one_hot"):
            return (
                f"site {other.name!r} of the same row is {_name(estimator)!r}, whose gradient the surrogate would "
                f"reweigh; use 'pathwise' here."
            )
        if not (estimator.scored or estimator.exhaustive):
            return f"site {other.name!r} of the same row is {_name(estimator)!r}; make both 'dreg' or both 'pathwise'."
        if estimator.exhaustive and "wake" in c.verbs:
            return (
                f"site {other.name!r} of the same row is enumerated, whose weights the surrogate does not know; use "
                f"'score' there, or 'pathwise' here."
            )
        if c.site.name in c.structure.ancestors(other.name):
            kind = "enumerated" if estimator.exhaustive else "score-type"
            return f"{kind} site {other.name!r} depends on its draw; use 'pathwise' for this one."
    return None


def _relaxed_beside_hard(c: Case) -> str | None:
    """Values that the guide's loss alone sees."""
    if not c.estimator.relaxes:
        return None
    if c.site.role == "latent" and c.estimator.site == "one_hot" and c.site.classes_in_model is None:
        return (
            f"its control variate is at relaxed values, and the model's distribution of the site is of another kind, "
            f"which has no density there; give the model the guide's kind, or {c.remedy}."
        )
    shared = sorted(n for n, used in c.structure.groups.items() if len(used) == 2)
    if shared:
        return (
            f"model and guide share parameters {shared}, and its control variate is in the guide's gradient alone; "
            f"{c.remedy}."
        )
    return None


def _learned_control(c: Case) -> str | None:
    """The variance of draws that follow a relaxed value depends on it through what they are drawn from."""
    if not (c.estimator.least_variance and c.estimator.initial_own(1, 1)):
        return None
    for other in c.structure.drawn():
        estimator = c.estimators.get(other.name)
        if estimator is None or c.site.name not in c.structure.ancestors(other.name):
            continue
        if not (estimator.exhaustive or (other.reparameterised and c.live(other.name))):
            return (
                f"site {other.name!r} is drawn from its relaxed values without a gradient ({_name(estimator)!r}), so "
                f"that its own parameters would be trained on a part of the variance; use 'rebar' with learn = false, "
                f"or {c.remedy}."
            )
    return None


def _level(c: Case) -> str | None:
    if c.site.role == "latent" and c.site.local_in_model and not c.site.local and c.objective.verbs != {"mean"}:
        return (
            f"the model draws it for every row of plate {c.structure.data_plate!r}, the guide once for all rows, so no "
            f"density per row exists; use 'elbo', or a guide with the site inside the plate."
        )
    if c.site.role == "latent" and c.site.local and not c.site.local_in_model:
        return "the guide draws it for every row, the model once for all rows; sample it outside the plate in both."
    return None


RULES: tuple[Rule, ...] = (
    _drawn,
    _level,
    _inside_a_scan,
    _kind_of_site,
    _relaxed,
    _one_draw_a_row,
    _verb,
    _enough_draws,
    _detached,
    _choices,
    _summed_out,
    _one_of_many,
    _pooled,
    _linear,
    _doubly_reparameterised,
    _relaxed_beside_hard,
    _learned_control,
)


def refusal(case: Case) -> str | None:
    """Why this case is refused, or None where it is legal."""
    return next((why for rule in RULES if (why := rule(case)) is not None), None)


@dataclass(frozen=True)
class Decision:
    """What each site of a program gets, and what is wrong with it."""

    estimators: Mapping[str, Estimator]
    notes: list[str]
    """One line a site that "auto" chose for, or that is a point."""
    refused: Mapping[str, str]
    """Site -> why its estimator is refused, and the remedy."""
    problems: list[str]
    """What is wrong with the program as a whole."""
    summed: list[str]
    """Sites that only the model has, summed out."""
    sums: tuple[Group, ...]


def decide(objective: Objective, patterns: Mapping[str, Estimator | None], structure: Structure) -> Decision:
    """Every rule applied to every site, estimators chosen where the recipe says "auto"."""
    estimators = dict(_named(patterns, structure))
    notes = []
    for info in structure.drawn():
        if info.point:
            # A point is no draw: a score would lose the gradient of its place, which pathwise has exactly.
            asked = estimators.get(info.name, pathwise())
            estimators[info.name] = pathwise()
            if asked != pathwise():
                notes.append(f"{info.name}: pathwise (its distribution is a point, which {_name(asked)} cannot draw)")
    for info in structure.undrawn():
        if info.enumerated and not estimators.get(info.name, score()).marginal:
            estimators[info.name] = marginalize()
            notes.append(f"{info.name}: marginalize (only the model has it, which marks it to be enumerated)")
    summed = [i.name for i in structure.undrawn() if estimators.get(i.name, score()).marginal]
    sums = groups(structure, summed)
    automatic = [i for i in structure.drawn() if i.name not in estimators]
    for info in automatic:
        chosen = next(
            (e for e in _preferred(objective) if refusal(Case(objective, e, info, structure, estimators)) is None),
            score(),
        )
        estimators[info.name] = chosen
        notes.append(f"{info.name}: {_name(chosen)} (chosen by auto)")
    for info in structure.drawn():
        if bias := estimators[info.name].why_biased():
            notes.append(f"{info.name}: {_name(estimators[info.name])} is biased: {bias}")
    cases = (Case(objective, estimators[i.name], i, structure, estimators) for i in structure.drawn())
    refused = {c.site.name: why for c in cases if (why := refusal(c)) is not None}
    problems = [
        *_undrawn(objective, structure, estimators, sums),
        *_whole_program(objective, structure, estimators, sums),
        *_nested(objective, structure),
        *(_particles(objective, structure) if objective.resampling() is not None else ()),
    ]
    return Decision(estimators, notes, refused, problems, summed, sums)


def plan(
    objective: Objective, patterns: Mapping[str, Estimator | None], structure: Structure
) -> tuple[Plan, list[str]]:
    """The run's static choices, and one line a site that "auto" chose for.

    Raises:
        LegalityError: with every refused site and what to use instead.
    """
    found = decide(objective, patterns, structure)
    estimators = found.estimators
    problems = [f"Site {n!r} under estimator {_name(estimators[n])!r}: {why}" for n, why in found.refused.items()]
    problems += found.problems
    if problems:
        raise LegalityError(
            f"Objective {_name(objective)!r} cannot be fitted to this program as asked:\n- " + "\n- ".join(problems)
        )
    ordered = {i.name: _stopped(objective, estimators[i.name]) for i in structure.drawn()}
    ordered |= {name: estimators[name] for name in found.summed}
    kl = frozenset(n for n in structure.sites if _closed_kl(n, structure, found.sums) is None)
    return Plan(
        objective.draws,
        objective.outer,
        ordered,
        objective.requests(),
        kl if _wants_kl(objective) else frozenset(),
        objective.chunk,
        found.sums,
        nested(structure, dict(objective.marginal or ())),
        objective.resampling(),
        {i.name: i.weights for i in structure.drawn() if i.weights},
    ), found.notes


def check_linear(bound: Any, plan: Plan, batch: Any, key: Any) -> None:
    """Refuses `Estimator.linear` where the densities of other sites are not linear in a site's value.

    They are taken at three values on a line, at the parameters that a fit starts from, all other draws unchanged.

    Raises:
        LegalityError: the second difference is no rounding error.
    """
    asked = [n for n, e in plan.estimators.items() if e.linear]
    if not asked:
        return
    plain = Plan.of_values(bound.structure, 1, 1)
    drawn = bound.evaluate(bound.initial, batch, key, plain)
    values = {n: np.asarray(drawn[n]["value"]) for n in asked}
    for name in asked:
        line = [(values[name] * (1.0 + s / 2.0)).astype(values[name].dtype) for s in range(3)]
        tables = [bound.evaluate(bound.initial, batch, key, plain, values={**values, name: at}) for at in line]
        for other in drawn:
            for label in ("log_p", "log_q"):
                if other == name or drawn[other][label] is None:
                    continue
                low, middle, high = (np.asarray(t[other][label], dtype=np.float64) for t in tables)
                rounding = 200.0 * float(np.finfo(bound.dtype).eps) * np.abs([low, middle, high]).max()
                bent, slope = np.abs(low - 2.0 * middle + high).max(), np.abs(high - low).max()
                if not bent <= 1e-3 * slope + rounding:
                    raise LegalityError(
                        f"Site {name!r} under estimator {_name(plan.estimators[name])!r}: {label} of site {other!r} is "
                        f"not linear in its value (a second difference of {bent:.3g} nats beside a first of "
                        f"{slope:.3g}), so that it is no expectation at the mean; use densities that are linear in it "
                        f"(ppl.structured.Gaussian, ppl.structured.Labels), or 'pathwise'."
                    )


def _preferred(objective: Objective) -> tuple[Estimator, ...]:
    """What "auto" tries, in this order."""
    own = (resolve("estimator", name, Path(), f"Objective {_name(objective)!r}") for name in objective.prefers)
    # At fixed draws no estimator has anything to add to a draw.
    first = (score(),) if objective.detached else ()
    return (*(kind() for kind in own if issubclass(kind, Estimator)), *first, *PREFERRED)


def _stopped(objective: Objective, estimator: Estimator) -> Estimator:
    """The estimator of a run: where draws are to carry no gradient, a live one is drawn as it is and stopped."""
    return Plain() if objective.detached and _live(estimator) and not estimator.frozen else estimator


def _live(estimator: Estimator) -> bool:
    """Whether gradient flows through the value of a draw."""
    single = type(estimator).count is Estimator.count
    return estimator.relaxes or (single and not (estimator.scored or estimator.exhaustive or estimator.weighted))


def _wants_kl(objective: Objective) -> bool:
    return bool({"kl", "kl where known", "kl without draws"} & objective.requests())


def _closed_kl(name: str, structure: Structure, sums: Sequence[Group]) -> str | None:
    """Why a site has no closed-form KL here, or None where it has."""
    info = structure.sites[name]
    if info.role != "latent" or not info.closed_kl:
        return f"Site {name!r} has no closed-form KL from guide to prior"
    summed = sorted(n for g in sums for n in info.model_parents.intersection(g.sites))
    if summed:
        return (
            f"Site {name!r} has no closed-form KL here: its prior looks at {summed}, over which it is summed"
        )
    moved = sorted(p for p in info.model_parents if name in structure.ancestors(p))
    if moved:
        return (
            f"Site {name!r} has no closed-form KL here: its prior looks at {moved}, which the guide draws after it and "
            f"from it, so the term is no expectation of a KL"
        )
    return None


def _named(patterns: Mapping[str, Estimator | None], structure: Structure) -> Iterator[tuple[str, Estimator]]:
    names = [i.name for i in (*structure.drawn(), *structure.undrawn())]
    for pattern in patterns:
        if pattern != "*" and all(best_pattern([pattern], n) is None for n in names):
            raise LegalityError(
                f"estimator has an entry for {pattern!r}, which matches none of the latent sites {names}."
            )
    for name in names:
        best = best_pattern(patterns, name)
        chosen = None if best is None else patterns[best]
        if chosen is not None:
            yield name, chosen


def _undrawn(
    objective: Objective, structure: Structure, estimators: Mapping[str, Estimator], sums: Sequence[Group]
) -> Iterator[str]:
    """Sites that only the model has: what is not summed out, or cannot be."""
    group_of = {name: group for group in sums for name in group.sites}
    for info in structure.undrawn():
        if info.name in group_of:
            continue
        [alone] = groups(structure, [info.name])
        guide = [i.name for i in structure.sites.values() if i.role != "observed" and i.in_guide]
        possible = objective.resampling() is None and _not_summed(objective, structure, alone) is None
        instead = f"with estimator={{{info.name!r}: 'marginalize'}}" if possible else "in the model"
        asked = estimators.get(info.name)
        under = "" if asked is None else f", so that {_name(asked)!r} has no draw of it"
        yield (
            f"Latent site {info.name!r} is in the model but not in the guide (guide sites: {guide}){under}. Sample it "
            f"in the guide, condition on it, or sum it out {instead}."
        )
    for group in sums:
        why = _not_summed(objective, structure, group)
        if why is not None:
            yield f"Site {group.sites[0]!r} under estimator {_name(estimators[group.sites[0]])!r}: {why}"


def _not_summed(objective: Objective, structure: Structure, group: Group) -> str | None:
    """Why these sites cannot be summed out together, or None where they can."""
    sites, plate = structure.sites, structure.data_plate
    for name in group.sites:
        info = sites[name]
        if not info.local:
            return (
                f"{name!r} is outside data plate {plate!r}, and its sum would be outside the product over rows; sample "
                f"it in the guide ('enumerate' sums over it exactly there), or pass data_plate='none', which takes the "
                f"whole program as one row."
            )
        if info.undeclared:
            return (
                f"{name!r} has several elements along a dimension that is no plate's, so it is unknown whether they "
                f"are independent; declare them with a plate, or as one event with to_event."
            )
    if max(group.count, group.width) > LARGEST_SUPPORT:
        return (
            f"densities tie {len(group.sites)} sites together ({', '.join(group.sites[:8])}) so closely that their sum "
            f"takes {group.count} runs of the model and a table of {group.width} entries, more than {LARGEST_SUPPORT}; "
            f"sample some of them in the guide, or {CHAINS}."
        )
    inner = dict(zip(group.sites, group.axes, strict=True))
    nested = sorted(group.sites, key=lambda n: len(inner[n]))
    for one, other in pairwise(nested):
        if not inner[one] <= inner[other]:
            plates = [_inner(structure, n) for n in (one, other)]
            return (
                f"{one!r} in plates {plates[0]} and {other!r} in plates {plates[1]} are summed out together, and "
                f"neither's plates are among the other's; declare the elements of one with to_event, or sample it in "
                f"the guide."
            )
    for name, looks in group.looks:
        at = max(looks, key=lambda n: len(inner[n]))
        if not inner[at] <= sites[name].model_axes:
            return (
                f"{name!r} looks at {at!r} and is outside of its plates {_inner(structure, at)}, so that the elements "
                f"are tied together; put {name!r} inside too, declare the elements with to_event instead of a plate "
                f"(their joint support is summed over), or sample {at!r} in the guide."
            )
    scaled = sorted(n for n, _ in group.looks if sites[n].user_scaled)
    if scaled:
        return (
            f"{scaled} are scaled (a scale handler, or a subsampled plate inside a row), which has no meaning inside "
            f"the sum; remove the scale."
        )
    roles = {n: sites[n].role for n in group.members}
    if len(roles) > 1 and not objective.alike(roles):
        return (
            f"{list(roles)} look at it, so only their joint density exists, and the objective weighs them apart with "
            f"these options (weights, beta, free bits); give them one, or sample {group.sites[0]!r} in the guide."
        )
    return None


def _inner(structure: Structure, name: str) -> list[str]:
    """Plates inside a row."""
    return [p.name for p in structure.sites[name].plates if p.axis is not None]


def _whole_program(
    objective: Objective,
    structure: Structure,
    estimators: Mapping[str, Estimator],
    sums: Sequence[Group],
) -> Iterator[str]:
    for name, info in structure.sites.items():
        rows = sorted(n for n in info.model_parents | info.guide_parents if structure.sites[n].local)
        if rows and not info.local:
            yield (
                f"Site {name!r} is outside data plate {structure.data_plate!r} and its density looks at {rows} inside "
                f"it, so the rows are not independent; pass data_plate='none' to take the whole program as one row."
            )
    scaled = sorted(n for n, i in structure.sites.items() if i.user_scaled)
    if scaled and not objective.user_scale:
        yield (
            f"Sites {scaled} are scaled (a scale handler, or a subsampled plate inside a row), which has no meaning "
            f"inside a function of several draws; remove the scale or use 'elbo'."
        )
    above = sorted(n for n, i in structure.sites.items() if not i.local)
    if above and not objective.globals:
        yield (
            f"Sites {above} are outside data plate {structure.data_plate!r}, and the objective is of one row by "
            f"itself; pass data_plate='none', which takes the whole program as one row, or use 'elbo' or 'iwae'."
        )
    summed = all(estimators[i.name].exhaustive for i in structure.drawn(local=True))
    if objective.draws < objective.least_draws and not summed:
        yield (
            f"draws = {objective.draws}, and the objective compares draws of one row; set draws = "
            f"{objective.least_draws} or more, or enumerate all sites of a row."
        )
    still = all(i.point for i in structure.drawn(local=True))
    if objective.draws > 1 and objective.verbs != {"mean"} and still:
        yield (
            f"draws = {objective.draws}, but no latent site is drawn inside data plate {structure.data_plate!r}, so "
            f"all draws of a row are equal; raise outer, or pass data_plate='none', which takes the whole program as "
            f"one row."
        )
    shared = sorted(n for n, used in structure.groups.items() if len(used) == 2)
    if objective.separate and shared:
        yield f"Parameters {shared} are in model and guide, whose losses differ under this objective; separate them."
    unseen = sorted(n for n, i in structure.sites.items() if i.role == "auxiliary")
    if unseen and "sleep" in objective.requests():
        yield (
            f"Sites {unseen} are the guide's alone, so the model draws no values that it could learn from (sleep); use "
            f"'rws' with sleep = 0, 'elbo' or 'iwae'."
        )
    yield from objective.misfits(structure)
    yield from _by_itself(objective, structure)
    if objective.requests() & {"kl", "kl without draws"}:
        for info in structure.sites.values():
            why = _closed_kl(info.name, structure, sums)
            if info.role == "latent" and info.in_guide and why is not None:
                instead = "use kl = 'sampled', or 'where_known'" if "kl" in objective.requests() else "use 'capacitron'"
                yield f"{why}; {instead}."


def _by_itself(objective: Objective, structure: Structure) -> Iterator[str]:
    """What requests about one site's distribution, by itself or against other rows, ask of a program."""
    asked = objective.requests()
    of_guide = asked & {"cross", "moments", "kl without draws"}
    of_prior = asked & {"cross", "prior", "kl without draws"}
    across = asked & {"cross", "moments", "prior"}
    if across and structure.rows < 2:
        yield (
            f"Rows of one batch are compared with each other, and a batch has one row (data plate "
            f"{structure.data_plate!r}); raise batch_size, or use 'elbo'."
        )
    if of_guide:
        for name in sorted(n for n, i in structure.sites.items() if i.fixed):
            yield f"Site {name!r} is a factor of the guide, so its distribution is not that of its sites; use 'elbo'."
    for info in structure.drawn(local=True) if of_guide or of_prior else ():
        if info.role == "auxiliary":
            yield (
                f"Site {info.name!r} is the guide's alone, so the guide's density of what the model draws is unknown; "
                f"draw it in the model too, or use 'elbo'."
            )
            continue
        for side, parents in (("guide", info.guide_parents), ("model", info.model_parents)):
            drawn = sorted(p for p in parents if structure.sites[p].role != "observed")
            if drawn and (of_guide if side == "guide" else of_prior):
                yield (
                    f"Site {info.name!r} is compared by its distribution alone, which in the {side} looks at {drawn} "
                    f"and is another one for every draw of them; let it look at no latent site, or use 'elbo'."
                )
        if across and not info.whole:
            yield (
                f"Site {info.name!r} is masked, observed in part or inside a scan, so its value is no single draw of "
                f"its distribution; use 'elbo'."
            )
        elif asked & {"cross", "moments"} and not info.elementwise:
            yield (
                f"Site {info.name!r} has elements that depend on each other (or is a point), and its distribution is "
                f"taken element by element; use a Normal or another distribution with to_event, in guide and model."
            )
        if "moments" in asked and not info.reparameterised:
            yield f"Site {info.name!r} is discrete, and its covariance is compared with the identity; use 'tcvae'."


def _particles(objective: Objective, structure: Structure) -> Iterator[str]:
    """What a program must be for its draws to be resampled between steps."""
    outside = sorted(n for n, i in structure.sites.items() if i.local and not i.steps)
    if outside:
        yield (
            f"Sites {outside} are not inside a ppl.scan of guide and model, and the draws of a row are resampled "
            f"between its steps; write the sequence as one ppl.scan in each, with all that a row draws and its data "
            f"inside, or use 'iwae'."
        )
    steps = sorted({i.steps for i in structure.sites.values() if i.local and i.steps})
    if len(steps) > 1:
        yield f"The scans of the program have {steps} steps, and guide and model step together; use 'iwae'."
    inner = sorted({p.name for i in structure.sites.values() for p in i.plates if p.name != structure.data_plate})
    if inner or structure.nesting > (structure.data_plate is not None):
        yield (
            f"Plates {inner} are inside a row, so the row's axis of what a scan carries is not known; declare them "
            f"with to_event."
        )
    undrawn = sorted(i.name for i in structure.undrawn())
    if undrawn:
        yield f"Sites {undrawn} are summed out of a whole row, and the draws of a row meet between steps; draw them."
    if objective.chunk is not None:
        yield "chunk evaluates draws apart, and the draws of a row meet between steps; leave it out."


_OF_ESTIMATES = frozenset({"mean", "joint", "log_mean_exp"})
"""Verbs under which an estimated density of the guide, in the place of its own, gives what the objective stands for."""


def _nested(objective: Objective, structure: Structure) -> Iterator[str]:
    """Which auxiliary sites can be summed out of the guide's density by inner draws."""
    counts = dict(objective.marginal or ())
    auxiliary = [i.name for i in structure.drawn() if i.role == "auxiliary"]
    for pattern in counts:
        if all(best_pattern([pattern], n) is None for n in auxiliary):
            yield (
                f"marginal has an entry for {pattern!r}, which matches none of the guide's auxiliary sites "
                f"{auxiliary}; mark a site that only the guide has by infer={{'is_auxiliary': True}}."
            )
    if counts and (objective.detached or not objective.verbs <= _OF_ESTIMATES):
        yield (
            "marginal estimates the guide's density from draws that came with the latents, and the objective "
            "differentiates log q at fixed draws, where the estimate has another gradient; use 'elbo', 'iwae' or 'vis'."
        )
    for m in nested(structure, counts):
        for name in m.sites:
            why = _not_summed_out(structure.sites[name], m, structure)
            if why is not None:
                yield f"Site {name!r} cannot be summed out by `marginal`: {why}"
        asked = {n: counts[best_pattern(counts, n) or n] for n in m.sites}
        if len(set(asked.values())) > 1:
            yield f"Sites {list(m.sites)} are summed out together, by as many draws; marginal asks for {asked}."


def _not_summed_out(info: SiteInfo, m: Nested, structure: Structure) -> str | None:
    if not info.local:
        return f"it is outside data plate {structure.data_plate!r}; draw it for every row."
    if info.point:
        return "its distribution is a point, which is no draw; drop it from marginal."
    if info.scanned:
        return "the library's own scan draws it; write the loop over time in Python."
    inner = [p.name for p in info.plates if p.name != structure.data_plate]
    if inner:
        return f"it has a draw for every element of plates {inner}, not one a row; declare them with to_event."
    if not m.looking:
        return "no other site of the guide looks at it; drop it from marginal."
    sites = structure.sites
    points = [n for n in m.looking if sites[n].point]
    if points:
        return f"site {points[0]!r} is a point that moves with it, and has no density at other draws; drop it."
    scaled = [n for n in (info.name, *m.looking) if sites[n].user_scaled]
    if scaled:
        return f"site {scaled[0]!r} is scaled, and the estimate is of the density as it is; remove the scale."
    return None


def _name(algorithm: Objective | Estimator) -> str:
    return type(algorithm).__name__

