"""The legality table: what becomes of every objective, estimator and kind of site, by the rules of `legality`.

Each cell is a program of the smallest size, given to `legality.decide`: a site of that kind in a row, or outside the
rows above a continuous one of them. Objectives are at their default options, with two draws of a row (two groups of two
where there are groups) and two outer draws, so that no cell is refused for want of draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ppl_lvm import catalogue, legality
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.structure import SiteInfo, Structure
from ppl_lvm.draws import Plate

Verdict = Literal["unbiased", "biased", "refused"]

ROW, TOP, HIDDEN = "z", "g", "y"


def _structure(*latents: SiteInfo) -> Structure:
    """These latent sites in a model and guide that share no parameter, above rows of data."""
    names = frozenset(i.name for i in latents)
    data = SiteInfo("x", "observed", True, plates=_PLATES, model_parents=names)
    sites = {i.name: i for i in (*latents, data)}
    groups = {"phi": frozenset({"guide"}), "theta": frozenset({"model"})}
    return Structure(sites, "data", None, rows=3, nesting=1, plate_dim=-1, groups=groups)


_PLATES = (Plate("data", 3, 3),)
_BITS = np.array([0.0, 1.0])
_NORMAL: Mapping[str, Any] = {"closed_kl": True, "whole": True, "elementwise": True}
_CLASSES: dict[str, Any] = {"classes": 2, "one_hot": True, "classes_in_model": 2}


def _row(**facts: Any) -> Structure:
    return _structure(SiteInfo(ROW, "latent", True, plates=_PLATES, **facts))


def _beside_a_draw(**facts: Any) -> Structure:
    seen = frozenset({ROW})
    drawn = SiteInfo("w", "latent", True, True, plates=_PLATES, guide_parents=seen, model_parents=seen, **_NORMAL)
    return _structure(SiteInfo(ROW, "latent", True, plates=_PLATES, **facts), drawn)


def _beside_the_guide(**facts: Any) -> Structure:
    drawn = SiteInfo(ROW, "latent", True, True, plates=_PLATES, **_NORMAL)
    return _structure(drawn, SiteInfo(HIDDEN, "latent", True, plates=_PLATES, in_guide=False, **facts))


def _in_a_scan(**facts: Any) -> Structure:
    found = _structure(SiteInfo(ROW, "latent", True, plates=_PLATES, steps=4, **facts))
    return replace(found, sites={n: replace(i, steps=4) for n, i in found.sites.items()})


def _above(**facts: Any) -> Structure:
    top = SiteInfo(TOP, "latent", False, local_in_model=False, **facts)
    seen = frozenset({TOP})
    row = SiteInfo(ROW, "latent", True, True, plates=_PLATES, guide_parents=seen, model_parents=seen, **_NORMAL)
    return _structure(top, row)


KINDS: Mapping[str, tuple[str, Structure]] = {
    "continuous": (ROW, _row(reparameterised=True, **_NORMAL)),
    "finite": (ROW, _row(support=_BITS, most=math.log(2.0), **_NORMAL, **_CLASSES)),
    "index": (ROW, _row(support=_BITS, most=math.log(2.0), **_NORMAL, **_CLASSES | {"one_hot": False})),
    "many classes": (ROW, _row(**_NORMAL, **_CLASSES)),
    "count": (ROW, _row(whole=True, elementwise=True)),
    "continuous global": (TOP, _above(reparameterised=True, closed_kl=True)),
    "finite global": (TOP, _above(support=_BITS, closed_kl=True, **_CLASSES)),
    "sequence": (ROW, _in_a_scan(reparameterised=True)),
    "model only": (HIDDEN, _beside_the_guide(support=_BITS)),
    "point": (ROW, _beside_a_draw(reparameterised=True, point=True, parameterised=True, closed_kl=True, whole=True)),
}
"""Kind of site -> its name in a program, and the program's structure."""

MEANING: Mapping[str, str] = {
    "continuous": "a reparameterised site of a row (Normal, Gamma)",
    "finite": "a site of a row with finite support, whose values gradient can flow through (Bernoulli, "
    "OneHotCategorical)",
    "index": "a site of a row with finite support, whose values are indices (Categorical)",
    "many classes": "Bernoullis or one-hots of a row, more of them than can be summed over",
    "count": "a discrete site of a row without finite support (Poisson)",
    "continuous global": "a reparameterised site that all rows share, above continuous ones of the rows",
    "finite global": "a finite site that all rows share, above continuous ones of the rows",
    "sequence": "a reparameterised site of a row inside a ppl.scan, with the row's data in the same steps",
    "model only": "a finite site of a row that the model has and the guide does not, beside a continuous one of both",
    "point": "a site of a row that is no draw (Delta), carried pathwise whatever is asked, beside a continuous one",
}

VARIANTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "elbo": ({"kl": "closed_form"}, {"free_bits": 0.5}),
    "gumbel_softmax": ({"hard": True},),
    "renyi": ({"alpha": "max"},),
    "f_divergence": ({"divergence": "total_variation"},),
    "rws": ({"sleep": 0.5},),
}
"""Options of objectives and estimators that change a verdict, beside the defaults."""


@dataclass(frozen=True)
class Cell:
    """One objective, estimator and kind of site."""

    objective: str
    estimator: str
    kind: str
    verdict: Verdict
    why: str = ""
    """The reason, with what to use instead where it is refused; empty where it is unbiased."""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.why}" if self.why else self.verdict


def cells(objective: str | None = None, estimator: str | None = None) -> Iterator[Cell]:
    """All cells, or those of one objective or estimator by name, options included in an objective's label.

    Raises:
        CatalogueError: there is no algorithm of that name.

    Example:
        >>> [f"{c.kind}: {c.verdict}" for c in cells("iwae", "vimco")][:3]
        ['continuous: unbiased', 'finite: unbiased', 'index: unbiased']
    """
    for name in [objective] if objective else catalogue.objectives():
        for label, o in _objectives(name):
            for named in [estimator] if estimator else catalogue.estimators():
                for e in _estimators(named):
                    for kind in KINDS:
                        yield cell(label, o, e, kind)


def cell(label: str, objective: Objective, estimator: Estimator, kind: str) -> Cell:
    """What becomes of a site of this kind under the two; other sites are left to "auto".

    Example:
        >>> from ppl_lvm.estimators.score import score
        >>> from ppl_lvm.objectives.vis import vis
        >>> cell("vis", vis(draws=2), score(), "finite").verdict
        'biased'
    """
    verdict, why = judged(objective, estimator, *KINDS[kind])
    options = {name: getattr(estimator, name) for name in estimator.model_fields_set}
    return Cell(label, _labelled(type(estimator).__name__, options), kind, verdict, why)


def judged(objective: Objective, estimator: Estimator, site: str, structure: Structure) -> tuple[Verdict, str]:
    """The verdict on one site of a program, its others left to "auto", and the reason."""
    found = legality.decide(objective, {site: estimator}, structure)
    wrong = [*found.refused.values(), *found.problems]
    if wrong:
        return "refused", " ".join(wrong)
    why = _bias(objective, found.estimators, structure)
    return ("biased" if why else "unbiased"), why


def _bias(objective: Objective, estimators: Mapping[str, Estimator], structure: Structure) -> str:
    of_draws = objective.why_biased()
    if all(estimators[i.name].exhaustive for i in structure.drawn(local=True)) and "joint" not in objective.verbs:
        of_draws = ""  # a mean over all values of a row, which knows no number of draws
    return "; ".join(filter(None, (of_draws, *sorted({e.why_biased() for e in estimators.values()}))))


def _objectives(name: str) -> Iterator[tuple[str, Objective]]:
    kind = catalogue.resolve("objective", name, Path.cwd(), "The table")
    assert issubclass(kind, Objective)
    few: dict[str, Any] = {"draws": 4, "groups": 2} if "groups" in kind.model_fields else {"draws": 2}
    for options in ({}, *VARIANTS.get(name, ())):
        yield _labelled(name, options), kind(outer=2, **few, **options)


def _labelled(name: str, options: Mapping[str, Any]) -> str:
    said = ", ".join(f"{option} = {value!r}" for option, value in options.items())
    return f"{name} ({said})" if said else name


@cache
def _estimators(name: str) -> tuple[Estimator, ...]:
    """An estimator at its defaults, then under the options that change a verdict."""
    kind = catalogue.resolve("estimator", name, Path.cwd(), "The table")
    assert issubclass(kind, Estimator)
    return tuple(kind(**options) for options in ({}, *VARIANTS.get(name, ())))


def text(objective: str | None = None, estimator: str | None = None) -> str:
    """The table in words: under each objective, estimators with the kinds of site that have the same verdict."""
    lines: list[str] = []
    for label, of_objective in groupby(cells(objective, estimator), key=lambda c: c.objective):
        lines += ["", label] if lines else [label]
        for name, row in groupby(of_objective, key=lambda c: c.estimator):
            for i, (said, kinds) in enumerate(_together(row)):
                lines.append(f"  {'' if i else name:28} {', '.join(kinds)}: {said}")
    return "\n".join(lines)


def _together(row: Iterable[Cell]) -> list[tuple[str, list[str]]]:
    """Verdicts of a row, each with its kinds of site."""
    found: dict[str, list[str]] = {}
    for c in row:
        found.setdefault(str(c), []).append(c.kind)
    return list(found.items())


def pages() -> str:
    """The table in Markdown: one for each kind of site, then the reasons by objective."""
    every = list(cells())
    names = list(dict.fromkeys(c.estimator for c in every))
    labels = list(dict.fromkeys(c.objective for c in every))
    lines: list[str] = []
    for kind, meaning in MEANING.items():
        lines += [f"## {kind.capitalize()}", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
        lines += ["| | " + " | ".join(f"`{n}`" for n in names) + " |", "|---" * (len(names) + 1) + "|"]
        found = {(c.objective, c.estimator): c.verdict for c in every if c.kind == kind}
        for label in labels:
            marks = (_MARK[found[label, n]] for n in names)
            lines.append(f"| `{label}` | " + " | ".join(marks) + " |")
        lines.append("")
    lines += ["## Reasons", ""]
    for label in labels:
        lines += [f"### {label}", ""]
        reasons: dict[str, dict[str, list[str]]] = {}
        for c in every:
            if c.objective == label and c.why:
                reasons.setdefault(str(c), {}).setdefault(c.estimator, []).append(c.kind)
        for said, of in reasons.items():
            lines.append(f"- {said}")
            where = (f"{', '.join(f'`{n}`' for n, _ in same)} at {kinds}" for kinds, same in _by_kinds(of))
            lines += ["", f"  {'; '.join(where)}.", ""]
    return "\n".join(lines)


def _by_kinds(of: Mapping[str, list[str]]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Kinds of site, with the estimators that have all of them."""
    told = sorted(((n, ", ".join(kinds)) for n, kinds in of.items()), key=lambda pair: pair[1])
    for kinds, same in groupby(told, key=lambda pair: pair[1]):
        yield kinds, list(same)


_MARK: Mapping[Verdict, str] = {"unbiased": "yes", "biased": "biased", "refused": "–"}
