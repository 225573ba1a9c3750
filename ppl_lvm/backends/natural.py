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
from ppl_lvm.backends.base import Structure
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


class Divergences(Protocol):
    """`KL(q_u || q_u')` of sites of the guide at the parameters a fit starts from and at others near them."""

    def shape(self, site: str) -> tuple[int, ...]:
        """The site's batch shape.

        Raises:
            NotImplementedError: it has no KL in closed form.
        """

    def slope(self, site: str, weights: np.ndarray) -> Mapping[str, np.ndarray]:
        """The gradient of the KL's elements, weighed, in all parameters u' that are arrays."""

    def fisher(self, factor: Factor) -> np.ndarray:
        """`[n, p, p]`."""


def factors(
    place: str, names: Sequence[str], structure: Structure, divergences: Divergences, trained: Mapping[str, Any]
) -> tuple[Factor, ...]:
    """What the parameters of one optimiser are made of; `trained` are all parameters.

    Raises:
        LegalityError: a parameter is not one of the distributions of sites that all rows share, or these have no Fisher
            information that could be found or inverted.
    """
    looked: dict[str, set[str]] = {}
    sites = [i for i in structure.sites.values() if i.in_guide and not i.local and i.role == "latent" and not i.point]
    for info in sites:
        try:
            shape = divergences.shape(info.name)
        except NotImplementedError:
            continue
        slope = divergences.slope(info.name, np.ones(shape))
        looked[info.name] = {n for n in names if n in slope and np.any(slope[n] != 0)}
    for name in names:
        if "model" in structure.groups.get(name, ()):
            raise LegalityError(
                f"{place}: natural steps are for the guide's own parameters, and {name!r} is the model's too; give it "
                f"another optimizer."
            )
        if not any(name in own for own in looked.values()):
            raise LegalityError(
                f"{place}: natural steps go by the Fisher information of a site that all rows share, and {name!r} is "
                f"a parameter of none with a closed-form KL; such sites are "
                f"{({s: sorted(own) for s, own in looked.items() if own}) or 'none'}. Give it another optimizer, as in "
                f"optimizer={{'{name}': 'adam', ...}}."
            )
    for site, own in looked.items():
        parents = sorted(structure.sites[site].guide_parents)
        if own and parents:
            raise LegalityError(
                f"{place}: site {site!r} is drawn from {parents}, so its Fisher information is another one for every "
                f"draw of them; give {sorted(own)} another optimizer."
            )
    found = []
    for group, ours in _connected({s: own for s, own in looked.items() if own}):
        factor = Factor(group, ours, _elements(group, ours, divergences, trained))
        _check_regular(place, factor, divergences.fisher(factor))
        found.append(factor)
    return tuple(found)


def _connected(looked: Mapping[str, set[str]]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Sites that share parameters, together with these."""
    groups: list[tuple[set[str], set[str]]] = []
    for site, own in looked.items():
        touching = [g for g in groups if g[1] & own]
        merged = {site}.union(*(s for s, _ in touching)), set(own).union(*(n for _, n in touching))
        groups = [g for g in groups if g not in touching] + [merged]
    return [(tuple(sorted(s)), tuple(sorted(n))) for s, n in groups]


def _elements(
    sites: tuple[str, ...], names: tuple[str, ...], divergences: Divergences, trained: Mapping[str, Any]
) -> tuple[int, ...]:
    """The site's batch shape where every parameter has it in front and each element looks at its own entries alone."""
    shapes = {tuple(divergences.shape(s)) for s in sites}
    shape = shapes.pop()
    if shapes or any(tuple(trained[n].shape)[: len(shape)] != shape for n in names) or not shape:
        return ()
    weights = np.random.default_rng(0).uniform(0.5, 2.0, shape)
    for site in sites:
        plain, weighed = (divergences.slope(site, w) for w in (np.ones(shape), weights))
        for name in names:
            own = weights.reshape((*shape, *(1,) * (plain[name].ndim - len(shape))))
            if not np.allclose(plain[name] * own, weighed[name], rtol=1e-3, atol=1e-6 * np.abs(weighed[name]).max()):
                return ()
    return shape


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
