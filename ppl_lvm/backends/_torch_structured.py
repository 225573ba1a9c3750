"""Structured distributions of `ppl.structured` as Pyro's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from ppl_lvm.structured import gaussian_chain as gaussian
from ppl_lvm.structured import markov_chain as markov
from ppl_lvm.structured.matern import matern
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
        front = gaussian.steps_in_front(mean, cov, transition, bias, noise, precision, shift)
        check = torch.distributions.Distribution._validate_args if validate_args is None else validate_args
        self._of(gaussian.GaussianChain(**front, method=method, validate=bool(check)), None)

    def _of(self, chain: gaussian.GaussianChain, batch_shape: torch.Size | None) -> GaussianChain:
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


class MarkovChain(TorchDistribution):
    """See `ppl_lvm.structured.markov_chain`; events are sequences `[T]` of integers, behind the batch."""

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        node: Tensor | None = None,
        method: Method = "auto",
        validate_args: bool | None = None,
    ) -> None:
        self._of(markov.MarkovChain(**markov.steps_in_front(initial, transition, node), method=method), None)

    def _of(self, chain: markov.MarkovChain, batch_shape: torch.Size | None) -> MarkovChain:
        self.chain = chain
        shape = torch.Size(chain.batch_shape) if batch_shape is None else batch_shape
        super().__init__(shape, torch.Size((chain.steps,)), validate_args=False)
        return self

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.chain.values - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovChain:
        return type(self).__new__(type(self))._of(self.chain, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        like = self.chain.initial
        shape = (self.chain.steps, *sample_shape, *self.batch_shape)
        with torch.no_grad():
            return self.chain.sample(torch.rand(shape, dtype=like.dtype, device=like.device)).movedim(0, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        found = self.chain.log_prob(value.movedim(-1, 0))
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))


@torch.distributions.register_kl(GaussianChain, GaussianChain)
@torch.distributions.register_kl(MarkovChain, MarkovChain)
def _kl(q: Any, p: Any) -> Tensor:
    found = q.chain.kl(p.chain)
    return found.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


def namespace() -> Any:
    """What portable programs find as `ppl.structured`."""
    chains = {"GaussianChain": GaussianChain, "MarkovChain": MarkovChain}
    return SimpleNamespace(**chains, matern=matern, observed=gaussian.observed)
