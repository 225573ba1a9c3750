"""A program run forward: what its sites take their values from, and which of them look at which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Forward:
    """The static choices of a forward run; every array goes along apart (see `simulate` of a bound).

    A site's value is, in this order: one that is fixed; the data's, for observed sites in `keep`; the guide's draw,
    for latent sites that are not in `fresh`; a draw from the model, given what was drawn before.
    """

    prior: bool = False
    """Latent sites are drawn from the model; the guide is not run."""
    fresh: frozenset[str] = frozenset()
    """Latent sites that the model draws although the guide has drawn them."""
    keep: frozenset[str] = frozenset()
    """Observed sites that keep their data."""
    means: bool = False
    """Also the means of the observed sites' distributions."""
    densities: bool = False
    """Also every site's log p and log q."""


@dataclass(frozen=True)
class Anatomy:
    """What a program's sites look like and look at, from one run of guide and model on a batch."""

    parents: Mapping[str, frozenset[str]]
    """Model site -> the sites, observed ones included, that its distribution looks at."""
    arguments: Mapping[str, frozenset[str]]
    """Model site -> the data arguments that its distribution looks at by themselves."""
    guide_arguments: Mapping[str, frozenset[str]]
    """Guide site -> the data arguments that its distribution looks at, through the sites drawn before it too."""
    sources: Mapping[str, frozenset[str]]
    """Observed site -> the data arguments that its value is made of."""
    plates: Mapping[str, Mapping[int, str]]
    """Site -> its plates by dimension, counted from the right."""
    ranks: Mapping[str, int]
    """Site -> number of batch dimensions."""
    shapes: Mapping[str, tuple[int, ...]]
    """Site -> shape of one row's value, or of the whole value of a global site, as a table has it."""
    dtypes: Mapping[str, Any]
    """Site -> numpy's dtype of its values."""
    discrete: frozenset[str]
    """Sites whose support is discrete."""
    elementwise: frozenset[str]
    """Sites whose density is a product over the elements of a value."""
    factors: frozenset[str] = field(default_factory=frozenset)
    """Sites that have a density and no value."""

    def ancestors(self, names: frozenset[str]) -> frozenset[str]:
        """Sites that these depend on in the model, through any number of others."""
        return self._closure(names, self.parents) - names

    def descendants(self, names: frozenset[str]) -> frozenset[str]:
        """Sites of the model that depend on these, through any number of others."""
        children = {n: frozenset(c for c, ps in self.parents.items() if n in ps) for n in self.parents}
        return self._closure(names, children) - names

    @property
    def needed(self) -> frozenset[str]:
        """Data arguments that some site's distribution in the model looks at by themselves."""
        return frozenset().union(*self.arguments.values())

    def _closure(self, names: frozenset[str], edges: Mapping[str, frozenset[str]]) -> frozenset[str]:
        found, todo = set(names), list(names)
        while todo:
            for other in edges.get(todo.pop(), frozenset()) - found:
                found.add(other)
                todo.append(other)
        return frozenset(found)
