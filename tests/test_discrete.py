"""Gradients through hard and relaxed values of discrete sites: every estimator against enumeration and its own rule.

A program has one site `z` of E one-hots of V classes (or E Bernoullis), a prior, and a term that is a polynomial in z.
Exact gradients are those of sums over all values, by automatic differentiation of a few lines of jax that share nothing
with the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as numpyro_dist
import pyro.distributions as pyro_dist
import pytest
import torch
from harness import BACKENDS, Engine, Loss
from toys import Array, Backend, Ppl

from ppl_lvm.algorithm import Estimator
from ppl_lvm.backends import _jax_dists, _torch_dists
from ppl_lvm.backends.base import noise_name
from ppl_lvm.errors import BackendError, LegalityError
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.straight_through import straight_through
from ppl_lvm.objectives.elbo import elbo

Polynomial = Callable[[Any, Any], Array]
"""`f(xp, z)`, z `[.., E, V]` (a Bernoulli's as its two classes); reduces the last two axes."""

C = np.array([[0.7, -1.1, 0.4, 1.3, -0.6, 0.2, 0.9, -1.4], [-0.3, 0.8, -0.9, 0.5, 1.2, -0.7, 0.1, 0.6]])
"""Coefficients by element and class."""
A = np.sin(1.0 + 2.3 * np.arange(8)[:, None] + 1.7 * np.arange(8))
"""Coefficients of products of classes."""
THETA = np.array([[0.3, -0.8, 1.1, 0.2, -0.4, 0.6, -1.0, 0.5], [-0.5, 0.9, 0.1, -0.2, 0.7, -1.1, 0.3, 0.8]])
PRIOR = np.array([[0.1, 0.4, -0.6, 0.3, 0.5, -0.2, 0.8, -0.9], [0.6, -0.1, 0.2, -0.7, 0.4, 0.9, -0.3, 0.1]])


def linear(xp: Any, z: Array) -> Array:
    return xp.sum(z * _like(xp, C, z), axis=(-2, -1))


def quadratic(xp: Any, z: Array) -> Array:
    """Each element's own quadratic, and a product over elements in which each is linear."""
    within = xp.sum((z @ _like(xp, A, z, square=True)) * z, axis=(-2, -1))
    across = xp.prod(xp.sum(z * _like(xp, C, z), axis=-1), axis=-1)
    return linear(xp, z) + 1.5 * within + 0.8 * across


def _like(xp: Any, a: np.ndarray, z: Array, square: bool = False) -> Array:
    """The part of the coefficients that fits, as an array of z's kind."""
    E, V = z.shape[-2:]
    return xp.asarray(a[:V, :V] if square else a[:E, :V], dtype=z.dtype)


def engine(backend: Backend, f: Polynomial, E: int, V: int, *, bernoulli: bool = False, plate: bool = False) -> Engine:
    """One row; elements are one event, or (`plate`) in a plate inside the row."""

    def site(ppl: Ppl, logits: Array) -> Any:
        if bernoulli:
            fn = ppl.dist.Bernoulli(logits=logits[:, 1] - logits[:, 0])
        else:
            fn = ppl.dist.OneHotCategorical(logits=logits)
        return fn if plate else fn.to_event(1)

    def sample(ppl: Ppl, logits: Array) -> Array:
        if not plate:
            return ppl.sample("z", site(ppl, logits))
        with ppl.plate("elements", E, dim=-1):
            return ppl.sample("z", site(ppl, logits))

    def model(ppl: Ppl, x: Array) -> None:
        prior, scale = ppl.param("prior", PRIOR[:E, :V]), ppl.param("scale", np.array(1.3))
        with ppl.plate("data", 1, dim=-2 if plate else -1):
            z = sample(ppl, prior)
            y = ppl.xp.stack([1.0 - z, z], axis=-1) if bernoulli else z
            term = scale * f(ppl.xp, y)
            ppl.factor("f", term[..., None] if plate else term)

    def guide(ppl: Ppl, x: Array) -> None:
        theta = ppl.param("theta", THETA[:E, :V])
        with ppl.plate("data", 1, dim=-2 if plate else -1):
            sample(ppl, theta)

    return Engine(backend, model, guide, {"x": np.zeros(1)}, portable=True)


def hard(E: int, V: int) -> np.ndarray:
    """All values `[V^E, E, V]`."""
    return np.stack([np.eye(V)[list(choice)] for choice in itertools.product(range(V), repeat=E)])


def probabilities(theta: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`[values]`."""
    log_pi = theta - np.log(np.exp(theta).sum(-1, keepdims=True))
    return np.exp((values * log_pi).sum((-2, -1)))


def exact(f: Polynomial, E: int, V: int, beta: float = 1.0) -> dict[str, np.ndarray]:
    """Gradients of the negative ELBO, summed over all values."""
    values = jnp.asarray(hard(E, V))

    def loss(p: dict[str, Array]) -> Array:
        log_q = (values * jax.nn.log_softmax(p["theta"])).sum((-2, -1))
        log_p = (values * jax.nn.log_softmax(p["prior"])).sum((-2, -1))
        return -(jnp.exp(log_q) * (p["scale"] * f(jnp, values) + beta * (log_p - log_q))).sum()

    start = {"theta": THETA[:E, :V], "prior": PRIOR[:E, :V], "scale": np.array(1.3)}
    return {n: np.asarray(g) for n, g in jax.grad(loss)({n: jnp.asarray(v) for n, v in start.items()}).items()}


def expected(
    run: Engine, estimator: Estimator, E: int, V: int, *, bernoulli: bool = False, plate: bool = False, **options: Any
) -> dict[str, np.ndarray]:
    """The mean of an estimator's gradient over its own draws, which are all injected."""
    values = hard(E, V)
    laid = values[..., 1] if bernoulli else values
    objective = elbo(**options)
    found = run.loss(objective, {"z": estimator}, values={"z": laid[:, None, None, None]}, runs=len(values))
    weight = probabilities(THETA[:E, :V], values)
    return {n: np.tensordot(weight, g, 1) for n, g in found.gradient.items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(autouse=True)
def _double() -> Any:
    with jax.enable_x64(True):
        yield


# What a backend tells an estimator.

VALUES = np.array([[0, 2], [1, 1], [2, 0]])
LOGITS = np.array([[[0.2, -0.3, 0.9], [1.0, 0.1, -0.4]]])


def _sites(kind: str) -> dict[Backend, tuple[Any, Any]]:
    """On each backend a distribution of three rows with two elements each, and its values as above."""
    found: dict[Backend, tuple[Any, Any]] = {}
    mask = [True, False, True]
    for backend, d, array in (("pyro", pyro_dist, torch.tensor), ("numpyro", numpyro_dist, jnp.asarray)):
        logits = array(LOGITS)
        if kind == "one_hot":
            one_hot = pyro_dist if backend == "pyro" else _jax_dists
            fn, value = one_hot.OneHotCategorical(logits=logits), np.eye(3)[VALUES]
        elif kind == "categorical":
            fn, value = d.Categorical(logits=logits), VALUES
        else:
            fn, value = d.Bernoulli(logits=logits[..., 0]), (VALUES > 1) * 1.0
        found[backend] = fn.to_event(1).expand((3,)).mask(array(mask)), array(value)
    return found


@pytest.mark.parametrize("kind", ["one_hot", "categorical", "bernoulli"])
def test_a_site_with_classes(kind: str) -> None:
    wide = np.broadcast_to(LOGITS, (3, 2, 3))
    if kind == "bernoulli":
        wide = np.stack([np.zeros((3, 2)), wide[..., 0]], -1)
    classes = (VALUES > 1) * 1 if kind == "bernoulli" else VALUES
    wanted = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    for backend, (fn, value) in _sites(kind).items():
        module = _torch_dists if backend == "pyro" else _jax_dists
        V = wide.shape[-1]
        assert module.classes(fn) == (V, kind != "categorical")
        assert module.elements(fn) == (2,)
        np.testing.assert_allclose(np.asarray(module.log_probs(fn)), wanted, atol=1e-14)
        y = module.classes_of(fn, value)
        np.testing.assert_array_equal(np.asarray(y), np.eye(V)[classes])
        np.testing.assert_array_equal(np.asarray(module.embed(fn, y)), np.asarray(value))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_its_own(backend: Backend) -> None:
    """It is inside (0, 1), the same when asked for twice, and another for another salt, draw and element."""
    seen: dict[Any, Array] = {}

    class noisy(straight_through):
        def sample(self, dist: Any) -> Array:
            seen.update({salt: dist.uniform(salt) for salt in (0, 1)})
            seen["again"], seen["many"] = dist.uniform(0), dist.uniform(2, copies=4)
            return super().sample(dist)

    if backend == "pyro":
        engine(backend, linear, 2, 3).loss(elbo(draws=5), {"z": noisy()})
        shape: tuple[int, ...] = (5, 1, 2, 3)
    else:
        # Inside vmap and jit a draw is alone: its own site is asked.
        fn, _ = _sites("one_hot")["numpyro"]
        site = _jax_dists.GuideSite("z", fn, jax.random.key(0), lambda *_: None, None, True)
        noisy().sample(site)
        shape = (3, 2, 3)
    u, v, again, many = (np.asarray(seen[n]) for n in (0, 1, "again", "many"))
    assert u.shape == v.shape == shape and many.shape == (4, *shape)
    every = np.concatenate([u.ravel(), v.ravel(), many.ravel()])
    assert len(np.unique(every)) == every.size and (0 < every).all() and (every < 1).all()
    np.testing.assert_array_equal(u, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_injected(backend: Backend) -> None:
    u = np.random.default_rng(0).uniform(size=(1, 2, 1, 2, 3))
    seen: list[Array] = []

    class echo(straight_through):
        def sample(self, dist: Any) -> Array:
            return dist.embed(0.0 * dist.classes_of(dist.sample()) + dist.uniform(3))

    run = engine(backend, linear, 2, 3)
    table = run.sites(elbo(draws=2), {"z": echo()}, values={noise_name("z", 3): u})
    np.testing.assert_array_equal(table["z"].value, u)
    assert not seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_is_no_noise(backend: Backend) -> None:
    class deaf(straight_through):
        def sample(self, dist: Any) -> Array:
            return dist.embed(dist.uniform())

    with pytest.raises(BackendError, match=r"injected into site 'z'.*inject the noise \('z~0'\)"):
        engine(backend, linear, 2, 3).loss(elbo(), {"z": deaf()}, values={"z": hard(2, 3)[None, None, :1]})


# Straight-through.

SHAPES = [pytest.param(2, 3, {}, id="one-hots"), pytest.param(2, 2, {"bernoulli": True}, id="bernoullis")]
PLATES = [pytest.param(2, 3, {"plate": True}, id="plate")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("E", "V", "kind"), [*SHAPES, *PLATES])
def test_straight_through_is_exact_for_linear_terms(backend: Backend, E: int, V: int, kind: dict[str, bool]) -> None:
    run = engine(backend, linear, E, V, **kind)
    for kl in ("sampled", "closed_form"):
        assert_same(expected(run, straight_through(), E, V, **kind, kl=kl), exact(linear, E, V))


@pytest.mark.parametrize("backend", BACKENDS)
def test_straight_through_is_biased_for_others(backend: Backend) -> None:
    """Of products over elements it is exact too, each element linear; so of the bias only squares are left."""
    found = expected(engine(backend, quadratic, 2, 3), straight_through(), 2, 3)
    wanted = exact(quadratic, 2, 3)
    assert np.abs(found["theta"] - wanted["theta"]).max() > 0.1 * np.abs(wanted["theta"]).max()
    assert_same({n: found[n] for n in ("prior", "scale")}, {n: wanted[n] for n in ("prior", "scale")})


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_exactly_hard(backend: Backend) -> None:
    value = engine(backend, linear, 2, 3).sites(elbo(draws=8), {"z": straight_through()})["z"].value
    assert set(np.unique(value)) == {0.0, 1.0}
