"""Discrete sites that only the model has, summed out: which are in one sum, over which values, and the sum itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ppl_lvm import ops
from ppl_lvm.ops import Array

if TYPE_CHECKING:
    from ppl_lvm.backends.structure import Structure


@dataclass(frozen=True)
class Group:
    """Sites that are summed out together, as densities look at several of them, directly or by way of others.

    A run of the model puts values to all of them at once. No density looks at two sites of one colour, so those share a
    digit of the run's number: the densities of a chain of any length are found in V^2 runs. The sum itself is taken
    site by site (variable elimination; Obermeyer et al. 2019, arXiv:1902.03210).
    """

    sites: tuple[str, ...]
    """Those in fewer plates inside a row first."""
    sizes: tuple[int, ...]
    axes: tuple[frozenset[int], ...]
    """Of each site: its plates inside a row, as axes of `[M, K, B, *inner]`."""
    looks: tuple[tuple[str, frozenset[str]], ...]
    """Each density inside the sum, those of the sites themselves included, and the sites that it looks at or is of."""
    observed: frozenset[str]
    """The observed ones among them."""

    @property
    def count(self) -> int:
        """S: runs of the model."""
        return math.prod(self._digits)

    @property
    def width(self) -> int:
        """Entries of the largest table that the sum goes through."""
        return max(math.prod(self._size(n) for n in scope) for _, scope in self._order)

    @property
    def members(self) -> tuple[str, ...]:
        """The other sites whose densities are inside the sum."""
        return tuple(name for name, _ in self.looks if name not in self.sites)

    @property
    def carrier(self) -> str | None:
        """The site in whose row the sum stands: the one that looks at these sites, or, of several, none of those."""
        members = self.members
        return (members[0] if len(members) == 1 else self.sites[0]) if members else None

    @property
    def mixed(self) -> bool:
        """Whether the sum is a density of latent and observed sites at once."""
        return 0 < len(self.observed) < len(self.members)

    @property
    def absent(self) -> frozenset[str]:
        """Sites that have no row of their own: nothing of them is left."""
        return frozenset({*self.sites, *self.observed}) - {self.carrier}

    def index(self, site: str, s: Array | int) -> Array | int:
        """Which of its values a site has in run s."""
        colour = self._colours[site]
        return s // math.prod(self._digits[colour + 1 :]) % self._digits[colour] % self._size(site)

    def summed(self, terms: Mapping[str, Array], lead: int) -> Array:
        """`log sum` of densities by site, `[S, *lead, *inner] -> [*lead, *inner]`, by element of their plates.

        Sites in more plates are summed out first, element by element; what is left of them is summed over the plates
        that the next ones are not in.
        """
        axes_of = dict(zip(self.sites, self.axes, strict=True))
        tables = [self._table(name, looks, terms[name]) for name, looks in self.looks]
        for site, scope in self._order:
            together = [t for t in tables if site in t[0]]
            tables = [t for t in tables if site not in t[0]]
            parts = [self._aligned(mine, x, scope, axes_of[site], lead) for mine, x in together]
            every: Array = sum(parts[1:], parts[0])
            tables.append((tuple(n for n in scope if n != site), ops.logsumexp(every, scope.index(site))))
        [(_, total)] = tables
        return total

    @cached_property
    def _colours(self) -> dict[str, int]:
        """Greedily, the sites in their order."""
        found: dict[str, int] = {}
        for site in self.sites:
            met = {found[n] for _, looks in self.looks if site in looks for n in looks if n in found}
            found[site] = next(c for c in itertools.count() if c not in met)
        return found

    @cached_property
    def _digits(self) -> tuple[int, ...]:
        """Values of each colour, as many as of its largest site."""
        colours = self._colours
        return tuple(max(self._size(n) for n in colours if colours[n] == c) for c in range(max(colours.values()) + 1))

    @cached_property
    def _order(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The sites as they are summed out, each with the sites of the table that it is summed out of.

        Of those in the same plates the one with the smallest table is next.
        """
        scopes = [looks for _, looks in self.looks]
        axes_of = dict(zip(self.sites, self.axes, strict=True))
        left, found = list(self.sites), []

        def scope_of(site: str) -> frozenset[str]:
            return frozenset[str]().union(*(scope for scope in scopes if site in scope))

        while left:
            most = max(len(axes_of[n]) for n in left)
            inside = [n for n in left if len(axes_of[n]) == most]
            site = min(inside, key=lambda n: math.prod(self._size(m) for m in scope_of(n)))
            scope = scope_of(site)
            found.append((site, tuple(n for n in self.sites if n in scope)))
            scopes = [s for s in scopes if site not in s] + [scope - {site}]
            left.remove(site)
        return tuple(found)

    def _size(self, site: str) -> int:
        return self.sizes[self.sites.index(site)]

    def _table(self, name: str, looks: frozenset[str], x: Array) -> tuple[tuple[str, ...], Array]:
        """A density at all values of the sites that it looks at, `[*sizes, *lead, *inner]`, and those sites.

        A site's own sums to one over its values where a mask takes it out, so that it adds nothing.
        """
        scope = tuple(n for n in self.sites if n in looks)
        by_colour = {self._colours[n]: self._size(n) for n in scope}
        x = ops.xp(x).reshape(x, (*self._digits, *x.shape[1:]))
        # A site that it does not look at is at its first value: the same at all of them.
        x = x[tuple(slice(by_colour[c]) if c in by_colour else 0 for c in range(len(self._digits)))]
        at = sorted(by_colour)
        xp = ops.xp(x)
        order = [at.index(self._colours[n]) for n in scope]
        x = xp.permute_dims(x, (*order, *range(len(order), x.ndim)))
        if name in self.sites:
            own = scope.index(name)
            x = x - xp.expand_dims(ops.logsumexp(x, own), axis=own)
        return scope, x

    def _aligned(
        self, mine: tuple[str, ...], x: Array, scope: tuple[str, ...], axes: frozenset[int], lead: int
    ) -> Array:
        """A table with an axis for each site of `scope`, summed over all inner plates but these."""
        x = _kept(x, axes, len(mine) + lead)
        shape = (*(self._size(n) if n in mine else 1 for n in scope), *x.shape[len(mine) :])
        return ops.xp(x).reshape(x, shape)


def _kept(x: Array, axes: frozenset[int], first: int) -> Array:
    """Summed over all inner axes but these, which stay where they are; `first` is the first inner one."""
    away = tuple(a for a in range(first, x.ndim) if a - first not in axes)
    return ops.xp(x).sum(x, axis=away, keepdims=True) if away else x


def groups(structure: Structure, names: Iterable[str]) -> tuple[Group, ...]:
    """The sums over these sites: as small as the densities that look at them allow."""
    summed, sites = set(names), structure.sites
    looks = {n: (i.model_parents | {n}) & summed for n, i in sites.items()}
    together: list[set[str]] = []
    for seen in looks.values():
        if seen:
            joined = set(seen).union(*(t for t in together if t & seen))
            together = [t for t in together if not t & seen] + [joined]
    found = []
    for names_ in together:
        order = sorted((n for n in sites if n in names_), key=lambda n: len(sites[n].model_axes))
        inside = tuple((n, seen) for n, seen in looks.items() if seen & names_)
        found.append(
            Group(
                tuple(order),
                tuple(1 if (v := sites[n].support) is None else len(v) for n in order),
                tuple(sites[n].model_axes for n in order),
                inside,
                frozenset(n for n, _ in inside if sites[n].role == "observed"),
            )
        )
    return tuple(sorted(found, key=lambda g: min(list(sites).index(n) for n in g.sites)))
