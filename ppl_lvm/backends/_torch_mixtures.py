"""Conjugate distributions of `ppl.structured` as Pyro's."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Categorical, TorchDistribution, constraints
from torch import Tensor

from ppl_lvm.structured import mixture


class _LogSimplex(constraints.Constraint):
    """Logs of probabilities."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return value.logsumexp(-1).abs() < 1e-5


class _Form(constraints.Constraint):
    """Forms of normals (see `structured.mixture`)."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        return torch.linalg.cholesky_ex(value[..., 1:, 1:]).info.eq(0)


class LogDirichlet(TorchDistribution):
    """Log probabilities `[K]` of a Dirichlet draw; see `structured.mixture.Dirichlet`. Densities are the draw's own."""

    arg_constraints = {"concentration": constraints.independent(constraints.positive, 1)}
    support = _LogSimplex()
    has_rsample = True

    def __init__(self, concentration: Tensor, validate_args: bool | None = None) -> None:
        self.concentration = concentration
        super().__init__(concentration.shape[:-1], concentration.shape[-1:], validate_args=validate_args)

    @property
    def of(self) -> mixture.Dirichlet:
        return mixture.Dirichlet(self.concentration)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogDirichlet:
        return LogDirichlet(self.concentration.expand(*batch_shape, *self.event_shape), validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        a = self.concentration.expand(*sample_shape, *self.batch_shape, *self.event_shape)
        uniform = torch.rand_like(a).clamp_min(torch.finfo(a.dtype).tiny)
        return mixture.Dirichlet(a).sample(torch._standard_gamma(a + 1.0), uniform)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.of.log_prob(value)

    @property
    def mean(self) -> Tensor:
        return self.of.expected()


class NormalInverseWishart(TorchDistribution):
    """Forms `[D + 1, D + 1]` of normals; see `structured.mixture.NormalInverseWishart`.

    Densities are those of mean and covariance.
    """

    arg_constraints: dict[str, Any] = {}
    support = _Form()
    has_rsample = True

    def __init__(self, form: Tensor, df: Tensor, validate_args: bool | None = None) -> None:
        check = torch.distributions.Distribution._validate_args if validate_args is None else validate_args
        self._of(mixture.NormalInverseWishart(form, torch.as_tensor(df, dtype=form.dtype), validate=bool(check)), None)

    def _of(self, of: mixture.NormalInverseWishart, batch_shape: torch.Size | None) -> NormalInverseWishart:
        self.of = of
        shape = torch.Size(of.batch_shape) if batch_shape is None else batch_shape
        super().__init__(shape, torch.Size(of.form.shape[-2:]), validate_args=False)
        return self

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalInverseWishart:
        return type(self).__new__(type(self))._of(self.of, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        shape, like = (*sample_shape, *self.batch_shape), self.of.form
        normal = torch.randn((*shape, self.of.dim + 1, self.of.dim), dtype=like.dtype, device=like.device)
        halves = self.of.halves.expand(*shape, self.of.dim)
        return self.of.sample(normal, torch._standard_gamma(halves))

    def log_prob(self, value: Tensor) -> Tensor:
        found = self.of.log_prob(value)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        return self.of.expected().expand(*self.batch_shape, *self.event_shape)


class Gaussian(TorchDistribution):
    """`log_prob(z)` is that of a form, of a normal or a multiple of it; draws are normal. See `structured.mixture`."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, form: Tensor, validate_args: bool | None = None) -> None:
        self._of(mixture.Gaussian(form), form.shape[:-2])

    def _of(self, of: mixture.Gaussian, batch_shape: torch.Size) -> Gaussian:
        self.of = of
        super().__init__(batch_shape, torch.Size((of.dim,)), validate_args=False)
        return self

    def expand(self, batch_shape: Any, _instance: Any = None) -> Gaussian:
        return type(self).__new__(type(self))._of(self.of, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        shape, like = (*sample_shape, *self.batch_shape, self.of.dim), self.of.form
        return self.of.sample(torch.randn(shape, dtype=like.dtype, device=like.device))

    def log_prob(self, value: Tensor) -> Tensor:
        found = self.of.log_prob(value)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    def noise_of(self, value: Tensor) -> Tensor:
        return self.of.noise_of(value)

    def from_noise(self, noise: Tensor) -> Tensor:
        return self.of.sample(noise)

    @property
    def mean(self) -> Tensor:
        return self.of.moments()[0].expand(*self.batch_shape, *self.event_shape)

    @property
    def variance(self) -> Tensor:
        variance = self.of.moments()[1].diagonal(dim1=-2, dim2=-1)
        return variance.expand(*self.batch_shape, *self.event_shape)


class Labels(Categorical):
    """Integers whose `log_prob` is `log_weight[value]` as it is, linear in `log_weight` `[..., K]`, normalised or not.

    Draws are from the normalised weights. The guide of a site takes a Categorical, whose density is one.
    """

    def __init__(self, log_weight: Tensor, validate_args: bool | None = None) -> None:
        self.log_weight = log_weight
        super().__init__(logits=log_weight, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Labels:
        return Labels(self.log_weight.expand(*batch_shape, self.log_weight.shape[-1]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + self.log_weight.logsumexp(-1)


@torch.distributions.register_kl(LogDirichlet, LogDirichlet)
@torch.distributions.register_kl(NormalInverseWishart, NormalInverseWishart)
@torch.distributions.register_kl(Gaussian, Gaussian)
def _kl_of(q: Any, p: Any) -> Tensor:
    found = q.of.kl(p.of)
    return found.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


@torch.distributions.register_kl(torch.distributions.Categorical, Labels)
@torch.distributions.register_kl(Labels, Labels)
def _kl_of_labels(q: Any, p: Any) -> Tensor:
    values = q.enumerate_support(expand=False)
    log_q = q.log_prob(values)
    return (log_q.exp() * (log_q - p.log_prob(values))).sum(0)


def namespace() -> dict[str, Any]:
    """See `_torch_structured.namespace`."""
    return {
        "LogDirichlet": LogDirichlet,
        "NormalInverseWishart": NormalInverseWishart,
        "Gaussian": Gaussian,
        "Labels": Labels,
        "niw_form": mixture.niw_form,
        "mixture_posterior": mixture.mixture_posterior,
    }
