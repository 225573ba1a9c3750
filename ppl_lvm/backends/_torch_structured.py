"""Structured distributions of `ppl.structured` as Pyro's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from ppl_lvm.structured import gaussian_chain as core
from ppl_lvm.structured.scan import Method


class GaussianChain(TorchDistribution):
    """See `ppl_lvm.structured.gaussian_chain`; steps are the first axis of events `[T, D]`, behind the batch."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        mean: Tensor,
        cov: Tensor,
        transition: Tensor,
        bias: Tensor,
        noise: Tensor,
        precision: Tensor | None = None,
        shift: Tensor | None = None,
        method: Method = "auto",
        validate_args: bool | None = None,
    ) -> None:
        front = core.steps_in_front(mean, cov, transition, bias, noise, precision, shift)
        check = torch.distributions.Distribution._validate_args if validate_args is None else validate_args
        self._of(core.GaussianChain(**front, method=method, validate=bool(check)), None)

    def _of(self, chain: core.GaussianChain, batch_shape: torch.Size | None) -> GaussianChain:
        self.chain = chain
        shape = torch.Size(chain.batch_shape) if batch_shape is None else batch_shape
        super().__init__(shape, torch.Size((chain.steps, chain.dim)), validate_args=False)
        return self

    def expand(self, batch_shape: Any, _instance: Any = None) -> GaussianChain:
        return type(self).__new__(type(self))._of(self.chain, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        shape = (self.chain.steps, *sample_shape, *self.batch_shape, self.chain.dim)
        like = self.chain.mean
        noise = torch.randn(shape, dtype=like.dtype, device=like.device)
        return self.chain.sample(noise).movedim(0, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        found = self.chain.log_prob(value.movedim(-2, 0))
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    def noise_of(self, value: Tensor) -> Tensor:
        return self.chain.noise_of(value.movedim(-2, 0))

    def from_noise(self, noise: Tensor) -> Tensor:
        return self.chain.sample(noise).movedim(0, -2)

    @property
    def mean(self) -> Tensor:
        moved = self.chain.moments().mean.movedim(0, -2)
        return moved.expand(*self.batch_shape, *self.event_shape)

    @property
    def variance(self) -> Tensor:
        moved = self.chain.moments().cov.diagonal(dim1=-2, dim2=-1).movedim(0, -2)
        return moved.expand(*self.batch_shape, *self.event_shape)


@torch.distributions.register_kl(GaussianChain, GaussianChain)
def _kl(q: GaussianChain, p: GaussianChain) -> Tensor:
    found = q.chain.kl(p.chain)
    return found.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


def namespace() -> Any:
    """What portable programs find as `ppl.structured`."""
    return SimpleNamespace(GaussianChain=GaussianChain, observed=core.observed)
