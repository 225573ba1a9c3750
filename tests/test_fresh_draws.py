"""The density of a draw in terms of the noise behind it: that of the distribution, with the gradient of both ways."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as ndist
import pyro.distributions as pdist
import pytest
import torch
from numpyro.distributions import transforms as ntransforms

from ppl_lvm.backends import _jax_dists, _torch_dists

LOC, RAW = np.array([[0.3], [-1.2]]), np.array([0.7, 1.9, 0.2])
FACTOR = np.tril(np.random.default_rng(0).normal(size=(2, 3, 3)), -1) + np.diag([0.5, 1.5, 2.0])

KNOWN = {
    "normal": lambda d, t, loc, scale, L: d.Normal(loc, scale),
    "broadcast": lambda d, t, loc, scale, L: d.Normal(loc[:, 0], 0.5),
    "expanded": lambda d, t, loc, scale, L: d.Normal(loc[0], scale).expand((4, 3)).to_event(1),
    "event": lambda d, t, loc, scale, L: d.Normal(loc, scale).to_event(2),
    "of no dimension": lambda d, t, loc, scale, L: d.Normal(loc, scale).to_event(0),
    "full": lambda d, t, loc, scale, L: d.MultivariateNormal(loc + scale, scale_tril=L),
    "one factor": lambda d, t, loc, scale, L: d.MultivariateNormal(loc + scale, scale_tril=L[0]),
    "log normal": lambda d, t, loc, scale, L: d.LogNormal(loc, scale).to_event(1),
    "transforms": lambda d, t, loc, scale, L: d.TransformedDistribution(
        d.Normal(loc, scale), [t.SigmoidTransform(), t.AffineTransform(-1.0, 2.0)]
    ),
    "of an event": lambda d, t, loc, scale, L: d.TransformedDistribution(
        d.Normal(loc, scale).to_event(1), [t.ExpTransform()]
    ),
    "simplex": lambda d, t, loc, scale, L: d.TransformedDistribution(
        d.Normal(loc, scale).to_event(1), [t.StickBreakingTransform()]
    ),
    "full, positive": lambda d, t, loc, scale, L: d.TransformedDistribution(
        d.MultivariateNormal(loc + scale, scale_tril=L), [t.ExpTransform()]
    ),
}
"""name -> `(distributions, transforms, loc [2, 1], scale [3], factors [2, 3, 3]) -> distribution`."""


def of_jax(build: Any, values: Any) -> Any:
    loc, raw, L = values
    return build(ndist, ntransforms, loc, jnp.exp(raw), jnp.tril(L))


def of_torch(build: Any, values: Any) -> Any:
    loc, raw, L = values
    return build(pdist, pdist.transforms, loc, torch.exp(raw), L.tril())


@pytest.mark.parametrize("kind", KNOWN)
def test_on_numpyro_a_draw_its_density_and_their_gradient_are_those_of_the_distribution(kind: str) -> None:
    key = jax.random.key(3)

    def ours(values: Any) -> Any:
        fn = of_jax(KNOWN[kind], values)
        found = _jax_dists.fresh(fn, key)
        assert found is not None
        value, log_q = found
        assert log_q.shape == fn.batch_shape
        return log_q, value

    def asked(values: Any) -> Any:
        fn = of_jax(KNOWN[kind], values)
        value = fn.sample(key)
        return fn.log_prob(value), value

    def loss(both: Any, values: Any) -> Any:
        log_q, value = both(values)
        return (log_q * (1.0 + jnp.arange(log_q.size).reshape(log_q.shape))).sum() + jnp.sin(value).sum()

    with jax.enable_x64(True):
        values = tuple(map(jnp.asarray, (LOC, RAW, FACTOR)))
        for found, known in zip(ours(values), asked(values), strict=True):
            np.testing.assert_allclose(found, known, rtol=1e-11)
        gradients = [jax.grad(lambda v, f=f: loss(f, v))(values) for f in (ours, asked)]
        for found, known in zip(*gradients, strict=True):
            np.testing.assert_allclose(found, known, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KNOWN)
def test_on_pyro_a_draw_its_density_and_their_gradient_are_those_of_the_distribution(kind: str) -> None:
    found: list[list[np.ndarray]] = []
    for ours in (True, False):
        values = tuple(torch.tensor(a, requires_grad=True) for a in (LOC, RAW, FACTOR))
        fn = of_torch(KNOWN[kind], values)
        torch.manual_seed(3)
        if ours:
            both = _torch_dists.fresh(fn)
            assert both is not None
            value, log_q = both
        else:
            value = fn.rsample()
            log_q = fn.log_prob(value)
        assert log_q.shape == fn.batch_shape
        loss = (log_q * (1.0 + torch.arange(log_q.numel()).reshape(log_q.shape))).sum() + torch.sin(value).sum()
        gradient = torch.autograd.grad(loss, values, materialize_grads=True, allow_unused=True)
        found.append([a.detach().numpy() for a in (value, log_q, *gradient)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


class OddNormal(ndist.Normal):
    def log_prob(self, value: Any) -> Any:
        return super().log_prob(value) - 1.0


class OddTorchNormal(pdist.Normal):
    def log_prob(self, value: Any) -> Any:
        return super().log_prob(value) - 1.0


class OddLogNormal(ndist.LogNormal):
    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        return super().log_prob(value, intermediates) - 1.0


class OddTorchLogNormal(pdist.LogNormal):
    def log_prob(self, value: Any) -> Any:
        return super().log_prob(value) - 1.0


@pytest.mark.parametrize("kind", ["Gamma", "StudentT", "OddNormal", "OddLogNormal"])
def test_a_distribution_with_noise_or_a_density_of_its_own_is_asked_for_both(kind: str) -> None:
    ours = {"OddNormal": (OddNormal, OddTorchNormal), "OddLogNormal": (OddLogNormal, OddTorchLogNormal)}
    of_n, of_p = ours[kind] if kind in ours else (getattr(ndist, kind), getattr(pdist, kind))
    assert _jax_dists.fresh(of_n(1.0, 2.0), jax.random.key(0)) is None
    assert _torch_dists.fresh(of_p(torch.tensor(1.0), torch.tensor(2.0))) is None


def test_only_a_draw_as_it_was_drawn_has_the_density_of_its_noise() -> None:
    def nothing(name: str, event_dim: int) -> None:
        return None

    on_jax = _jax_dists.GuideSite("z", ndist.Normal(0.0, 1.0), jax.random.key(0), nothing, None, True)
    drawn = on_jax.rsample()
    assert on_jax.fresh_log_prob(drawn) is not None
    assert on_jax.fresh_log_prob(jax.lax.stop_gradient(drawn) + 0.0) is None
    assert on_jax.fresh_log_prob(on_jax.sample()) is None

    def site(stride: int) -> Any:
        fn = pdist.Normal(torch.zeros(4), 1.0)
        return _torch_dists.GuideSite("z", fn, nothing, None, stride, -1, lambda draw: draw())

    alone = site(1)
    drawn = alone.rsample()
    assert alone.fresh_log_prob(drawn) is not None
    assert alone.fresh_log_prob(drawn.detach()) is None
    assert alone.fresh_log_prob(alone.sample()) is None
    shared = site(2)
    assert shared.fresh_log_prob(shared.rsample()) is None
