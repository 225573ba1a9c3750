"""Natural-gradient steps: what both backends share. The backends differentiate (`_torch_natural`, `_jax_natural`).

A step solves `F x = g` for the gradient g of the loss in unconstrained parameters u, with F the Fisher information of
the guide's sites that look at them, the Hessian of `KL(q_u || q_u')` in u' at u' = u. The parameters' constrained
values c = T(u) then go along `dT/du x` in a straight line: where they are natural parameters of the site, up to an
affine map, that is the step of an exponential family, which arrives at the optimum of a conjugate model with rate one.
Elements of a site for which the line leaves the parameters' domain take `u - rate x` instead, which is the same to
first order.

Source: Amari (1998), Natural Gradient Works Efficiently in Learning; Hoffman, Blei, Wang, Paisley (2013), Stochastic
Variational Inference, arXiv:1206.7051; Johnson et al. (2016), arXiv:1603.06277; that the gradient in mean parameters is
the natural one, Bendekgey, Hope, Sudderth (2023), Unbiased Learning of Deep Generative Models with Structured Discrete
Representations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ppl_lvm import ops
from ppl_lvm.backends.structure import Structure
from ppl_lvm.backends.training import Unit
from ppl_lvm.errors import LegalityError
from ppl_lvm.ops import Array


@dataclass(frozen=True)
class Factor:
    """Sites of the guide and the parameters that only they look at; n elements, each with its own p parameters."""

    sites: tuple[str, ...]
    names: tuple[str, ...]
    elements: tuple[int, ...]
    """The axes in front of every parameter that count independent elements; () where there is one."""

    @property
    def n(self) -> int:
        return math.prod(self.elements)

    def flat(self, values: Mapping[str, Array]) -> Array:
        """`[n, p]`."""
        parts = [values[name].reshape((self.n, -1)) for name in self.names]
        return ops.xp(parts[0]).concat(parts, axis=1)

    def parts(self, flat: Array, like: Mapping[str, Any]) -> dict[str, Array]:
        """The inverse of `flat`."""
        found, first = {}, 0
        for name in self.names:
            shape = tuple(like[name].shape)
            size = math.prod(shape) // self.n
            found[name] = flat[:, first : first + size].reshape(shape)
            first += size
        return found

    def over(self, mask: Array, like: Array) -> Array:
        """A mask `[n]` on the elements of a parameter."""
        return mask.reshape((*self.elements, *(1,) * (like.ndim - len(self.elements))))


class Enough(BaseException):
    """Ends a run of the guide that has met all sites it was for; no program catches it by an `except Exception`."""


Slopes = Mapping[str, Mapping[str, np.ndarray]]


class Divergences(Protocol):
    """`KL(q_u || q_u')` of sites of the guide at the parameters a fit starts from and at others near them."""

    def shapes(self, sites: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        """Batch shapes of those that have a KL in closed form."""

    def slopes(self, weights: Mapping[str, np.ndarray]) -> Slopes:
        """By site, the gradient of the sum of its weighed elements in all parameters u' that are arrays."""

    def fishers(self, factors: Sequence[Factor]) -> Sequence[np.ndarray]:
        """`[n, p, p]` of each."""


def factors(
    units: Mapping[str, Unit], structure: Structure, divergences: Divergences, trained: Mapping[str, Any]
) -> dict[str, tuple[Factor, ...]]:
    """What the parameters of optimisers with natural steps are made of; `trained` are all parameters.

    Raises:
        LegalityError: a parameter is not one of the distributions of sites that all rows share, or these have no Fisher
            information that could be found or inverted.
    """
    drawn = [i.name for i in structure.drawn(local=False) if i.role == "latent" and not i.point and not i.chained]
    shapes = divergences.shapes(drawn)
    plain = divergences.slopes({s: np.ones(shape) for s, shape in shapes.items()})
    weights = {s: np.random.default_rng(0).uniform(0.5, 2.0, shape) for s, shape in shapes.items()}
    weighed = divergences.slopes(weights)
    looked = {s: {n for n, g in slope.items() if np.any(g != 0)} for s, slope in plain.items()}
    found: dict[str, tuple[Factor, ...]] = {}
    for unit, u in units.items():
        for name in u.names:
            _check_parameter(u.place, name, structure, looked)
        own = {s: names.intersection(u.names) for s, names in looked.items()}
        own = {s: names for s, names in own.items() if names}
        for site, names in own.items():
            parents = sorted(structure.sites[site].guide_parents)
            if parents:
                raise LegalityError(
                    f"{u.place}: site {site!r} is drawn from {parents}, so its Fisher information is another one for "
                    f"every draw of them; give {sorted(names)} another optimizer."
                )

        def elements(sites: tuple[str, ...], names: tuple[str, ...]) -> tuple[int, ...]:
            """The batch shape, where all parameters have it in front and each element looks at its own entries."""
            shape = shapes[sites[0]]
            in_front = all(tuple(trained[n].shape[: len(shape)]) == shape for n in names)
            if not in_front or any(shapes[s] != shape for s in sites):
                return ()
            apart = all(_apart(plain[s][n], weighed[s][n], weights[s]) for s in sites for n in names)
            return shape if apart else ()

        found[unit] = tuple(Factor(s, n, elements(s, n)) for s, n in _connected(own))
    every = [(units[unit].place, f) for unit, group in found.items() for f in group]
    for (place, factor), F in zip(every, divergences.fishers([f for _, f in every]), strict=True):
        _check_regular(place, factor, F)
    return found


def _check_parameter(place: str, name: str, structure: Structure, looked: Mapping[str, set[str]]) -> None:
    if "model" in structure.groups.get(name, ()):
        raise LegalityError(
            f"{place}: natural steps are for the guide's own parameters, and {name!r} is the model's too; give it "
            f"another optimizer."
        )
    if not any(name in own for own in looked.values()):
        sites = {s: sorted(own) for s, own in looked.items() if own}
        raise LegalityError(
            f"{place}: natural steps go by the Fisher information of a site that all rows share, and {name!r} is a "
            f"parameter of none with a closed-form KL (such sites and their parameters: {sites or 'none'}). Give it "
            f"another optimizer, as in optimizer={{'{name}': 'adam', ...}}."
        )


def _apart(plain: np.ndarray, weighed: np.ndarray, weights: np.ndarray) -> bool:
    own = weights.reshape((*weights.shape, *(1,) * (plain.ndim - weights.ndim)))
    return bool(np.allclose(plain * own, weighed, rtol=1e-3, atol=1e-6 * np.abs(weighed).max(initial=0.0)))


def _connected(looked: Mapping[str, set[str]]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Sites that share parameters, together with these."""
    groups: list[tuple[set[str], set[str]]] = []
    for site, own in looked.items():
        touching = [g for g in groups if g[1] & own]
        merged = {site}.union(*(s for s, _ in touching)), set(own).union(*(n for _, n in touching))
        groups = [g for g in groups if g not in touching] + [merged]
    return [(tuple(sorted(s)), tuple(sorted(n))) for s, n in groups]


def _check_regular(place: str, factor: Factor, F: np.ndarray) -> None:
    diagonal = np.diagonal(F, axis1=1, axis2=2)
    scale = np.where(diagonal > 0, diagonal, 1.0) ** -0.5
    scaled = F * scale[:, :, None] * scale[:, None, :] + (diagonal <= 0)[:, :, None] * np.eye(F.shape[-1])
    smallest = np.linalg.eigvalsh(scaled)[:, 0].min()
    if not smallest > 10 * np.finfo(F.dtype).eps:
        raise LegalityError(
            f"{place}: the Fisher information of sites {list(factor.sites)} in parameters {list(factor.names)} is "
            f"singular or not finite (smallest eigenvalue {smallest:.3g}, scaled to a diagonal of one): parameters do "
            f"the same to the distribution, or start at its edge. Leave one of them to another optimizer, or freeze it."
        )


def scaled(F: Array) -> tuple[Array, Array]:
    """`D F D` with a diagonal of one, and the diagonal of D; rows of entries that nothing looks at become units."""
    xp = ops.xp(F)
    diagonal = xp.linalg.diagonal(F)
    dead = diagonal <= 0
    ones = 0.0 * diagonal + 1.0
    D = 1.0 / xp.sqrt(xp.where(dead, ones, diagonal))
    unit = xp.where(dead, ones, 0.0 * ones)[..., None] * ops.eye(F.shape[-1], F)
    return F * D[..., :, None] * D[..., None, :] + unit, D


def solved(lower: Array, D: Array, g: Array) -> Array:
    """`F^-1 g`, `[n, p]`, from the Cholesky factor of the scaled F."""
    half = ops.solve_triangular(lower, (D * g)[..., None])
    return D * ops.solve_triangular(lower, half, transposed=True)[..., 0]
