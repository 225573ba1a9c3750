"""The density of a draw in terms of the noise behind it: that of the distribution, with the gradient of both ways."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as ndist
import pyro.distributions as pdist
import pytest
import torch
from harness import BACKENDS, Engine, assert_equal
from numpyro.distributions import transforms as ntransforms
from toys import GAUSSIANS2, GLOBAL_ROWS, MIXED_ZY, Array, Backend, Ppl, Toy

from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends import _jax_dists, _torch_dists
from ppl_lvm.backends.sites import is_fresh
from ppl_lvm.data import read
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.stl import stl
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.log_variance import log_variance
from ppl_lvm.objectives.rws import rws
from ppl_lvm.objectives.tvo import tvo
from ppl_lvm.objectives.vis import vis
from ppl_lvm.program import Program

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

    def kept(site: Any, value: Any, fn: Any = None) -> bool:
        return is_fresh({"fn": site._fn if fn is None else fn, "value": value, "fresh": site.fresh})

    on_jax = _jax_dists.GuideSite("z", ndist.Normal(0.0, 1.0), jax.random.key(0), nothing, None, True)
    drawn = on_jax.rsample()
    assert kept(on_jax, drawn)
    assert not kept(on_jax, jax.lax.stop_gradient(drawn) + 0.0)
    assert not kept(on_jax, on_jax.sample())
    assert not kept(on_jax, drawn, on_jax._fn.mask(jnp.asarray(True)))

    def site(stride: int) -> Any:
        fn = pdist.Normal(torch.zeros(4), 1.0)
        return _torch_dists.GuideSite("z", fn, nothing, None, stride, -1, lambda draw: draw())

    alone = site(1)
    drawn = alone.rsample()
    assert kept(alone, drawn)
    assert not kept(alone, drawn.detach())
    assert not kept(alone, alone.sample())
    assert not kept(alone, drawn, alone._fn.mask(torch.tensor(True)))
    shared = site(2)
    assert not kept(shared, shared.rsample())


SHARES = [0.0, 0.3, 0.0, 0.4, 0.3, 0.0]
"""Of which the logs, normalised, end below one in single precision."""


@pytest.mark.parametrize(
    "fn",
    [
        pdist.Categorical(probs=torch.tensor(SHARES)),
        pdist.Categorical(logits=torch.tensor(SHARES).log() + 3.0, validate_args=False),
        pdist.OneHotCategorical(probs=torch.tensor(SHARES, dtype=torch.float64)),
        pdist.OneHotCategorical(logits=torch.tensor([SHARES, SHARES]).log(), validate_args=False).to_event(1),
    ],
    ids=["index", "index by logits", "one-hot", "one-hot by logits"],
)
def test_classes_are_drawn_as_often_as_they_are_probable(fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniforms on a grid fall into every class in proportion, into one of probability zero never, at the ends too."""
    grid = (torch.arange(998) + 0.5) / 998
    ends = [torch.zeros(1), torch.ones(1) - torch.finfo(torch.float32).eps / 2]

    def uniform(shape: Any, dtype: Any, device: Any) -> Any:
        found = torch.cat([ends[0], grid, ends[1]]).to(dtype)
        return found.reshape(1000, *(1,) * (len(shape) - 1)).expand(shape)

    monkeypatch.setattr(_torch_dists.torch, "rand", uniform)
    wide = fn.expand((1000,))
    drawn = _torch_dists.draw(wide)
    assert (drawn.shape, drawn.dtype) == (wide.shape(), wide.sample().dtype)
    counts = _torch_dists.classes_of(wide, drawn).reshape(1000, -1, 6).sum(0)
    assert (counts - 1000 * torch.tensor(SHARES)).abs().max() <= 1
    assert not counts[:, [0, 2, 5]].any()


CASES: list[tuple[Toy, Objective, dict[str, Estimator]]] = [
    (GAUSSIANS2, elbo(draws=2), {"*": pathwise()}),
    (GAUSSIANS2, elbo(), {"*": stl()}),
    (GAUSSIANS2, iwae(draws=3), {"*": dreg()}),
    (GAUSSIANS2, rws(draws=3), {"*": pathwise()}),
    (GAUSSIANS2, vis(draws=3), {"*": pathwise()}),
    (GAUSSIANS2, tvo(draws=3), {"*": pathwise()}),
    (GAUSSIANS2, log_variance(draws=3), {"*": pathwise()}),
    (GLOBAL_ROWS, iwae(draws=2, outer=2), {"*": pathwise()}),
    (MIXED_ZY, iwae(draws=2), {"z": dreg(), "y": vimco()}),
]


def name_of(cell: object) -> str:
    if isinstance(cell, dict):
        return "-".join(type(estimator).__name__ for estimator in cell.values())
    return str(getattr(cell, "name", type(cell).__name__))


def check(engine: Engine, objective: Objective, estimators: dict[str, Estimator]) -> None:
    found, table = engine.loss(objective, estimators, seed=3), engine.sites(objective, estimators, seed=3)
    values = {n: table[n].value for n in engine.plan(objective, estimators).estimators}
    again = engine.loss(objective, estimators, values=values)
    assert_equal(found, float(again.value), again.gradient, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("toy", "objective", "estimators"), CASES, ids=name_of)
def test_fresh_draws_have_the_loss_and_gradient_of_the_same_values_injected(
    toy: Toy, objective: Objective, estimators: dict[str, Estimator], backend: Backend
) -> None:
    check(Engine.of(backend, toy), objective, estimators)


def partly_model(ppl: Ppl, x: Array, y: Array) -> None:
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", ppl.dist.Normal(ppl.param("c", 0.3), 1.3))
        ppl.sample("x", ppl.dist.Normal(ppl.param("a", 0.8) * y, 1.0), obs=x)


def partly_guide(ppl: Ppl, x: Array, y: Array) -> None:
    with ppl.plate("data", len(x)):
        ppl.sample("y", ppl.dist.Normal(ppl.param("g", 0.4) * x, ppl.param("s", 0.7)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_that_data_took_the_place_of_counts_nowhere(backend: Backend) -> None:
    """A site that is partly observed: `log q` is that of the entries which were drawn."""
    data = {"x": np.array([0.4, -0.9, 1.3]), "y": np.array([1.0, np.nan, 0.2])}
    call = read(data, Program("toy", partly_model, partly_guide, portable=True), "mask")
    engine = Engine(backend, partly_model, partly_guide, dict(call.kwargs), portable=True)
    check(engine, iwae(draws=2), {"*": pathwise()})
    table = engine.sites(iwae(draws=2), {"*": pathwise()}, seed=3)
    log_q = table["y"].log_q
    assert log_q is not None and (log_q[..., [0, 2]] == 0.0).all() and (log_q[..., 1] != 0.0).all()
