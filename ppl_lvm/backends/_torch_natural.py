"""Natural-gradient steps on Pyro; see `natural`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_lvm.backends import _torch_dists
from ppl_lvm.backends.natural import Factor, Slopes, factors, scaled, solved
from ppl_lvm.backends.training import Unit

Params = Mapping[str, Tensor]


def _total(bound: Any, batch: Any, sites: Sequence[str], params: Params, moved: Params) -> dict[str, Tensor]:
    """`KL(q_params || q_moved)` of sites, elements apart."""
    one, other = bound.guide_distributions(params, batch, sites), bound.guide_distributions(moved, batch, sites)
    return {s: _torch_dists.kl(one[s], other[s]) for s in sites}


class _Divergences:
    def __init__(self, bound: Any, batch: Any) -> None:
        self._bound, self._batch, self._u = bound, batch, bound.initial

    def shapes(self, sites: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        found = {}
        for site in sites:
            try:
                found[site] = tuple(_total(self._bound, self._batch, [site], self._u, self._u)[site].shape)
            except NotImplementedError:
                continue
        return found

    def slopes(self, weights: Mapping[str, np.ndarray]) -> Slopes:
        rng = np.random.default_rng(0)
        near = {
            n: (v + torch.as_tensor(0.1 * rng.normal(size=v.shape), dtype=v.dtype)).detach().requires_grad_()
            for n, v in self._u.items()
        }
        found = {}
        with torch.enable_grad():
            for site, kl in _total(self._bound, self._batch, [*weights], self._u, near).items():
                total = (kl * torch.as_tensor(weights[site], dtype=kl.dtype)).sum()
                leaves = list(near.values())
                slope: Sequence[Tensor | None] = [None] * len(leaves)
                if total.requires_grad:
                    slope = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
                found[site] = {
                    n: np.zeros(v.shape) if g is None else g.cpu().numpy()
                    for (n, v), g in zip(near.items(), slope, strict=True)
                }
        return found

    def fishers(self, factors: Sequence[Factor]) -> Sequence[np.ndarray]:
        return [_fisher(self._bound, self._batch, f, self._u).cpu().numpy() for f in factors]


def found(bound: Any, batch: Any, units: Mapping[str, Unit]) -> dict[str, tuple[Factor, ...]]:
    """The factors of units with natural steps, or LegalityError."""
    natural = {unit: u for unit, u in units.items() if u.natural}
    return factors(natural, bound.structure, _Divergences(bound, batch), bound.initial) if natural else {}


def _fisher(bound: Any, batch: Any, factor: Factor, params: Params) -> Tensor:
    with torch.enable_grad():
        params = {n: p.detach() for n, p in params.items()}
        at = factor.flat(params).requires_grad_()
        kl = _total(bound, batch, factor.sites, params, {**params, **factor.parts(at, params)})
        total = torch.stack([x.sum() for x in kl.values()]).sum()
        (slope,) = torch.autograd.grad(total, at, create_graph=True)
        rows = [torch.autograd.grad(s.sum(), at, retain_graph=True)[0] for s in slope.unbind(1)]
    return torch.stack(rows, 1).detach()


def displaced(
    bound: Any, batch: Any, chosen: tuple[Factor, ...], params: Params, gradient: Params, rate: Tensor
) -> dict[str, Tensor]:
    """What a step takes off the unconstrained parameters."""
    found: dict[str, Tensor] = {}
    for factor in chosen:
        u = {n: params[n].detach() for n in factor.names}
        F, D = scaled(_fisher(bound, batch, factor, params))
        x = factor.parts(solved(torch.linalg.cholesky(F), D, factor.flat(gradient)), u)
        ahead = {n: v - rate * x[n] for n, v in u.items()}
        straight, mask = {}, torch.ones(factor.n, dtype=torch.bool, device=F.device)
        for n, v in u.items():
            transform, constraint = bound.chart(n)
            c, tangent = _jvp(transform, v, x[n])
            straight[n] = c, c - rate * tangent
            mask = mask & _inside(constraint, straight[n][1]).reshape(factor.n, -1).all(1)
        for n, v in u.items():
            transform, _ = bound.chart(n)
            where = partial(factor.over, mask)
            c, target = straight[n]
            back = transform.inv(torch.where(where(c), target, c))
            found[n] = v - torch.where(where(v), back, ahead[n])
    return found


def _jvp(f: Any, at: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Value and directional derivative, by differentiating a pull-back, which is linear in what it pulls back."""
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        value = f(at)
        dual = torch.zeros_like(value).requires_grad_()
        (pulled,) = torch.autograd.grad(value, at, dual, create_graph=True)
        (along,) = torch.autograd.grad(pulled, dual, tangent)
    return value.detach(), along


def _inside(constraint: Any, value: Tensor) -> Tensor:
    if isinstance(constraint, type(torch.distributions.constraints.positive_definite)):
        # Symmetric as it is made; its own check reads a value, which cannot be traced.
        return torch.linalg.cholesky_ex(value).info.eq(0)
    return constraint.check(value)
