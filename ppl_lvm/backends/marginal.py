"""Discrete sites that only the model has, summed out: which are in one sum, over which values, and the sum itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppl_lvm import ops
from ppl_lvm.ops import Array

if TYPE_CHECKING:
    from ppl_lvm.backends.base import Structure


@dataclass(frozen=True)
class Group:
    """Sites that are summed out together, as densities look at several of them, directly or by way of others.

    A run s of the model has value `s // stride % size` of each, the last site's fastest.
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
        return math.prod(self.sizes)

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
        i = self.sites.index(site)
        return s // math.prod(self.sizes[i + 1 :]) % self.sizes[i]

    def summed(self, terms: Mapping[str, Array], lead: int) -> Array:
        """`log sum` of densities by site, `[S, *lead, *inner] -> [*lead, *inner]`, by element of their plates.

        Sites in more plates are summed out first, element by element; what is left of them is summed over the plates
        that the next ones are not in.
        """
        axes_of = dict(zip(self.sites, self.axes, strict=True))
        before, parts = self.count, list[Array]()
        for axes in sorted(set(self.axes), key=len, reverse=True):
            size = math.prod(n for n, own in zip(self.sizes, self.axes, strict=True) if own == axes)
            after = self.count // before
            before //= size
            for name, looks in self.looks:
                if max((axes_of[site] for site in looks), key=len) == axes:
                    x = self._proper(name, terms[name])
                    # It does not look at sites that are summed out already: the same at all of their values.
                    parts.append(ops.xp(x).reshape(x, (before * size, after, *x.shape[1:]))[:, 0])
            parts = [_kept(x, axes, 1 + lead) for x in parts]
            every: Array = sum(parts[1:], parts[0])
            parts = [ops.logsumexp(ops.xp(every).reshape(every, (before, size, *every.shape[1:])), 1)]
        return parts[0][0]

    def _proper(self, name: str, x: Array) -> Array:
        """A site's own density, summing to one over its values where a mask takes it out, so that it adds nothing."""
        if name not in self.sites:
            return x
        i, xp = self.sites.index(name), ops.xp(x)
        shape = (math.prod(self.sizes[:i]), self.sizes[i], math.prod(self.sizes[i + 1 :]), *x.shape[1:])
        split = xp.reshape(x, shape)
        return xp.reshape(split - ops.logsumexp(split, 1)[:, None], tuple(x.shape))


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
