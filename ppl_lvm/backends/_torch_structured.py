"""Structured distributions of `ppl.structured` as Pyro's."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from ppl_lvm import ops
from ppl_lvm.backends import _torch_mixtures
from ppl_lvm.structured import gaussian_chain as gaussian
from ppl_lvm.structured import markov_chain as markov
from ppl_lvm.structured import slds, tucker
from ppl_lvm.structured import tree as trees
from ppl_lvm.structured.matern import matern
from ppl_lvm.structured.scan import Method


class _Structured(TorchDistribution):
    """An algorithm of `ppl_lvm.structured` as a distribution: its steps (nodes) in front are behind the batch here."""

    arg_constraints: dict[str, Any] = {}
    chain: Any

    @classmethod
    def of(cls, chain: Any, batch_shape: Any = None) -> Any:
        """With this algorithm, and its batch unless another is given."""
        self = cls.__new__(cls)
        self._of(chain, batch_shape)
        return self

    def _of(self, chain: Any, batch_shape: Any = None) -> None:
        self.chain = chain
        shape = chain.batch_shape if batch_shape is None else batch_shape
        super().__init__(torch.Size(shape), torch.Size(chain.event_shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return type(self).of(self.chain, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        found = self.chain.log_prob(value.movedim(-len(self.event_shape), 0))
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))


class _States(_Structured):
    """Events are integers, drawn from a uniform each."""

    like: str
    """The algorithm's argument whose dtype and device are those of the uniforms."""

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.chain.values - 1), 1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        like, shape = getattr(self.chain, self.like), (*self.event_shape, *sample_shape, *self.batch_shape)
        with torch.no_grad():
            return self.chain.sample(torch.rand(shape, dtype=like.dtype, device=like.device)).movedim(0, -1)


class GaussianChain(_Structured):
    """See `ppl_lvm.structured.gaussian_chain`; steps are the first axis of events `[T, D]`, behind the batch."""

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
        self._of(gaussian.GaussianChain(**front, method=method, validate=bool(check)))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        shape = (self.chain.steps, *sample_shape, *self.batch_shape, self.chain.dim)
        like = self.chain.mean
        noise = torch.randn(shape, dtype=like.dtype, device=like.device)
        return self.chain.sample(noise).movedim(0, -2)

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


class MarkovChain(_States):
    """See `ppl_lvm.structured.markov_chain`; events are sequences `[T]` of integers, behind the batch."""

    like = "initial"

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        node: Tensor | None = None,
        method: Method = "auto",
        validate_args: bool | None = None,
    ) -> None:
        self._of(markov.MarkovChain(**markov.steps_in_front(initial, transition, node), method=method))


class SwitchingChain(_Structured):
    """See `ppl_lvm.structured.slds`; events are the numbers z `[T, D]`, the states summed out of their density.

    `initial [..., V]` and `move [..., T - 1, V, V]` are the states' logs. `states` is their distribution,
    `given(s)` that of z given them.
    """

    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        initial: Tensor,
        move: Tensor,
        mean: Tensor,
        cov: Tensor,
        transition: Tensor,
        bias: Tensor,
        noise: Tensor,
        method: Method = "auto",
        validate_args: bool | None = None,
    ) -> None:
        states, front = slds.steps_in_front(initial, move, mean, cov, transition, bias, noise, method)
        check = torch.distributions.Distribution._validate_args if validate_args is None else validate_args
        self._of(slds.SwitchingChain(states, **front, method=method, validate=bool(check)))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        like, shape = self.chain.mean, (self.chain.steps, *sample_shape, *self.batch_shape)
        uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
        noise = torch.randn((*shape, self.chain.dim), dtype=like.dtype, device=like.device)
        with torch.no_grad():
            return self.chain.sample(uniform, noise)[1].movedim(0, -2)

    @property
    def states(self) -> MarkovChain:
        return MarkovChain.of(self.chain.states)

    def given(self, s: Tensor) -> GaussianChain:
        return GaussianChain.of(self.chain.given(s.movedim(-1, 0)))

    def mean_field(self, precision: Tensor, shift: Tensor, sweeps: int = 10) -> Any:
        """The distributions of the states and of z, and the bound after every sweep, `[..., sweeps]`."""
        q = self.chain.mean_field(precision.movedim(-3, 0), shift.movedim(-2, 0), sweeps)
        return SimpleNamespace(
            states=MarkovChain.of(q.states),
            chain=GaussianChain.of(q.chain),
            bounds=q.bounds.movedim(0, -1),
        )


class Tree(_States):
    """See `ppl_lvm.structured.tree`; events are the integers `[N]` of all nodes, behind the batch."""

    like = "root"

    def __init__(
        self,
        parents: Sequence[int],
        root: Tensor,
        edge: Tensor,
        node: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._of(trees.Tree(tuple(parents), **trees.nodes_in_front(root, edge, node)))


class _Weights(constraints.Constraint):
    """Weights `[T, V]` from 0 to 1, at every step one above 0."""

    event_dim = 2
    lower_bound = 1.0  # what stands for weights that are missing
    needs = markov.EVIDENCE

    def check(self, value: Tensor) -> Tensor:
        return ((value >= 0) & (value <= 1)).all(-1).all(-1) & (value > 0).any(-1).all(-1)


class VirtualEvidence(TorchDistribution):
    """Weights `[T, V]` of what is known of states z `[..., T]`: `log_prob(weight) = sum_t log weight_t(z_t)`.

    A likelihood, which is a density of weights only where they are labels (one-hot); those are what it draws.
    """

    arg_constraints: dict[str, Any] = {}
    support = _Weights()

    def __init__(self, z: Tensor, values: int, validate_args: bool | None = None) -> None:
        self.z, self.values = z, values
        super().__init__(z.shape[:-1], torch.Size((z.shape[-1], values)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> VirtualEvidence:
        return VirtualEvidence(self.z.expand(*batch_shape, self.z.shape[-1]), self.values)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        return ops.one_hot(self.z, self.values).expand(*sample_shape, *self.batch_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return markov.log_evidence(value, self.z)


@torch.distributions.register_kl(GaussianChain, GaussianChain)
@torch.distributions.register_kl(MarkovChain, MarkovChain)
@torch.distributions.register_kl(Tree, Tree)
def _kl(q: Any, p: Any) -> Tensor:
    found = q.chain.kl(p.chain)
    return found.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


def namespace() -> Any:
    """What portable programs find as `ppl.structured`."""
    return SimpleNamespace(
        GaussianChain=GaussianChain,
        MarkovChain=MarkovChain,
        SwitchingChain=SwitchingChain,
        Tree=Tree,
        VirtualEvidence=VirtualEvidence,
        at=tucker.at,
        matern=matern,
        observed=gaussian.observed,
        **_torch_mixtures.namespace(),
    )
