"""Gradients through hard and relaxed values of discrete sites: every estimator against enumeration and its own rule.

A program has one site `z` of E one-hots of V classes (or E Bernoullis), a prior, and a term that is a polynomial in z.
Exact gradients are those of sums over all values, by automatic differentiation of a few lines of jax that share nothing
with the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as numpyro_dist
import pyro.distributions as pyro_dist
import pytest
import torch
from harness import BACKENDS, Engine
from toys import Array, Backend, Ppl

from ppl_lvm.algorithm import Estimator
from ppl_lvm.backends import _jax_dists, _torch_dists
from ppl_lvm.backends.structure import noise_name
from ppl_lvm.errors import BackendError
from ppl_lvm.estimators.gapped_st import gapped_st
from ppl_lvm.estimators.gumbel_rao import gumbel_rao
from ppl_lvm.estimators.gumbel_softmax import gumbel_softmax
from ppl_lvm.estimators.reinmax import reinmax
from ppl_lvm.estimators.straight_through import straight_through
from ppl_lvm.fit import fit
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import Program

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
    for backend in BACKENDS:
        d: Any = pyro_dist if backend == "pyro" else numpyro_dist
        array: Any = torch.tensor if backend == "pyro" else jnp.asarray
        logits = array(LOGITS)
        if kind == "one_hot":
            one_hot: Any = pyro_dist if backend == "pyro" else _jax_dists
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
    assert len(np.unique(every)) == every.size and (every > 0).all() and (every < 1).all()
    np.testing.assert_array_equal(u, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_injected(backend: Backend) -> None:
    u = np.random.default_rng(0).uniform(size=(1, 2, 1, 2, 3))

    class echo(straight_through):
        def sample(self, dist: Any) -> Array:
            return dist.embed(0.0 * dist.classes_of(dist.sample()) + dist.uniform(3))

    run = engine(backend, linear, 2, 3)
    table = run.sites(elbo(draws=2), {"z": echo()}, values={noise_name("z", 3): u})
    np.testing.assert_array_equal(table["z"].value, u)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_is_no_noise(backend: Backend) -> None:
    class deaf(straight_through):
        def sample(self, dist: Any) -> Array:
            return dist.embed(dist.uniform())

    run = engine(backend, linear, 2, 3)
    with pytest.raises(BackendError, match=r"injected into site 'z'.*inject the noise \('z~0'\)"):
        run.loss(elbo(), {"z": deaf()}, values={"z": hard(2, 3)[None, None, :1]})


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


# What each estimator does to one draw, against its rule in numpy.


class Pulled(NamedTuple):
    """A value `[*batch, V]`, and `g` pulled back through it to the logits."""

    value: np.ndarray
    gradient: np.ndarray


def pulled(
    backend: Backend,
    estimator: Estimator,
    theta: np.ndarray,
    g: np.ndarray,
    draw: np.ndarray | None = None,
    u: np.ndarray | None = None,
    *,
    bernoulli: bool = False,
) -> Pulled:
    """One site asked alone, its draw and its noise given; of a Bernoulli, value and g are those of its second class."""
    array: Any = torch.tensor if backend == "pyro" else jnp.asarray
    given = {n: array(a) for n, a in (("z", draw), ("z~0", u)) if a is not None}

    def value_of(logits: Array) -> Array:
        if bernoulli:
            logits = logits[..., 1] - logits[..., 0]
        kind = "Bernoulli" if bernoulli else "OneHotCategorical"
        if backend == "pyro":
            fn: Any = getattr(pyro_dist, kind)(logits=logits)
            return estimator.sample(_torch_dists.GuideSite("z", fn, lambda n, _: given.get(n), None, 1, -1, _once))
        fn = getattr(numpyro_dist if bernoulli else _jax_dists, kind)(logits=logits)
        key = jax.random.key(0)
        return estimator.sample(_jax_dists.GuideSite("z", fn, key, lambda n, _: given.get(n), None, True))

    if backend == "pyro":
        leaf = torch.tensor(theta, requires_grad=True)
        value = value_of(leaf)
        (value * torch.tensor(g)).sum().backward()
        assert leaf.grad is not None
        return Pulled(value.detach().numpy(), leaf.grad.numpy())
    value, pull = jax.vjp(value_of, jnp.asarray(theta))
    return Pulled(np.asarray(value), np.asarray(pull(jnp.broadcast_to(jnp.asarray(g), value.shape))[0]))


def _once(make: Callable[[], Array]) -> Array:
    return make()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def J(p: np.ndarray) -> np.ndarray:
    return np.diag(p) - np.outer(p, p)


def rule(estimator: Estimator, theta: np.ndarray, D: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and Jacobian of one element, as the papers have them; `u [S, V]`."""
    e: Any = estimator
    pi, V = softmax(theta), len(theta)
    gumbel = -np.log(-np.log(u))
    match type(estimator).__name__:
        case "straight_through":
            return D, J(softmax(theta / e.temperature)) / e.temperature
        case "reinmax":
            return D, 2.0 * J((softmax(theta / e.temperature) + D) / 2.0) - 0.5 * J(pi)
        case "gapped_st":
            moved = theta.copy()
            for i in range(V):
                if D[i] == 1.0:
                    moved[i] = theta.max()
                elif theta[i] > theta.max() - e.gap:
                    moved[i] = theta.max() - e.gap
            return D, J(softmax(moved / e.temperature)) / e.temperature
        case "gumbel_softmax":
            y = softmax((theta + gumbel[0]) / e.temperature)
            return np.eye(V)[(theta + gumbel[0]).argmax()] if e.hard else y, J(y) / e.temperature
        case "gumbel_rao":
            drawn, parts = int(D.argmax()), []
            for exponential in -np.log(u):
                top = -np.log(exponential[drawn])
                below = -np.log(exponential / pi + exponential[drawn])
                given = np.where(np.arange(V) == drawn, top, below)
                parts.append(J(softmax(given / e.temperature)) / e.temperature)
            return D, np.mean(parts, 0)
    raise AssertionError(estimator)


HARD: list[Estimator] = [
    straight_through(temperature=0.7),
    gumbel_softmax(temperature=0.6, hard=True),
    gapped_st(temperature=0.8, gap=0.9),
    gumbel_rao(temperature=0.4, samples=3),
    reinmax(temperature=1.4),
]
EVERY: list[Estimator] = [*HARD, gumbel_softmax(temperature=0.6)]


def _named(e: object) -> str:
    return f"{type(e).__name__}{'-hard' if getattr(e, 'hard', False) else ''}"


@pytest.mark.parametrize("V", [2, 5])
@pytest.mark.parametrize("estimator", EVERY, ids=_named)
def test_one_draw_has_the_published_gradient(estimator: Estimator, V: int) -> None:
    rng = np.random.default_rng(V)
    theta, g = 1.5 * rng.normal(size=(4, V)), rng.normal(size=(4, V))
    draw = np.eye(V)[rng.integers(V, size=4)]
    u = rng.uniform(size=(3, 4, V))
    is_rao = isinstance(estimator, gumbel_rao)
    given = None if isinstance(estimator, gumbel_softmax) else draw
    # Copies of the noise are injected behind the batch.
    noise = np.moveaxis(u, 0, 1) if is_rao else u[0]
    for backend in BACKENDS:
        found = pulled(backend, estimator, theta, g, given, noise)
        for i in range(4):
            value, jacobian = rule(estimator, theta[i], draw[i], u[:, i])
            np.testing.assert_allclose(found.value[i], value, rtol=0, atol=1e-13)
            np.testing.assert_allclose(found.gradient[i], jacobian.T @ g[i], rtol=0, atol=1e-12)
        if V == 2:
            first = None if given is None else draw[..., 1]
            of_bits = pulled(backend, estimator, theta, g[:, 1], first, noise, bernoulli=True)
            wanted = pulled(backend, estimator, theta, g * [0.0, 1.0], given, noise)
            np.testing.assert_allclose(of_bits.value, wanted.value[:, 1], rtol=0, atol=1e-13)
            np.testing.assert_allclose(of_bits.gradient, wanted.gradient, rtol=0, atol=1e-12)


REINMAX = [(b, V, b == "numpyro" and V not in (2, 8)) for b in BACKENDS for V in range(2, 9)]


@pytest.mark.parametrize(
    ("backend", "V"), [pytest.param(b, V, marks=[pytest.mark.slow] if slow else []) for b, V, slow in REINMAX]
)
def test_reinmax_is_exact_for_quadratics(backend: Backend, V: int) -> None:
    """`E_D[gradient] = J(pi) f` at temperature 1, where straight-through is off by more than a tenth."""
    rng = np.random.default_rng(V)
    theta, a, b = rng.normal(size=V), rng.normal(size=(V, V)), rng.normal(size=V)
    pi, every = softmax(theta), np.eye(V)
    wanted = J(pi) @ (np.einsum("vi,ij,vj->v", every, a, every) + b)

    def mean(estimator: Estimator) -> np.ndarray:
        g = every @ (a + a.T) + b
        return pi @ pulled(backend, estimator, np.tile(theta, (V, 1)), g, every).gradient

    np.testing.assert_allclose(mean(reinmax()), wanted, rtol=0, atol=1e-12)
    scale = np.abs(wanted).max()
    assert np.abs(mean(straight_through()) - wanted).max() > 0.1 * scale
    assert np.abs(mean(reinmax(temperature=1.5)) - wanted).max() > 1e-3 * scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_given_the_draw_has_the_right_law(backend: Backend) -> None:
    """Over draws and noise, gumbel_rao's gradient is that of hard gumbel_softmax: quadrature for two classes.

    The gradient at D is another for each D, so that it matters which noise goes with which draw.
    """
    theta, tau, g = np.array([0.4, -0.5]), 0.7, np.array([[1.0, -0.3], [0.2, 0.9]])
    t = np.linspace(-5.0, 34.0, 500)
    weight = np.exp(-t - np.exp(-t)) * (t[1] - t[0])
    u = np.exp(-np.exp(-np.stack(np.meshgrid(t, t, indexing="ij"), -1).reshape(-1, 2)))
    both = (weight[:, None] * weight).ravel()
    many = np.tile(theta, (len(u), 1))
    rao = 0.0
    for v, p in enumerate(softmax(theta)):
        D = np.tile(np.eye(2)[v], (len(u), 1))
        estimator = gumbel_rao(temperature=tau, samples=1)
        rao = rao + p * both @ pulled(backend, estimator, many, np.tile(g[v], (len(u), 1)), D, u[:, None]).gradient
    # The difference of two Gumbels is logistic: D is the first class where it is above theta_1 - theta_0.
    s = np.linspace(-40.0, 40.0, 400_001) + theta[1] - theta[0]
    density = np.exp(-np.abs(s)) / (1.0 + np.exp(-np.abs(s))) ** 2 * (s[1] - s[0])
    y = softmax(np.stack([theta[0] + s, theta[1] + 0.0 * s], -1) / tau)
    at = np.where((s > theta[1] - theta[0])[:, None], g[0], g[1])
    at[len(s) // 2] = g.mean(0)
    move = (at[:, 0] - at[:, 1]) * y[:, 0] * y[:, 1] / tau
    wanted = density @ np.stack([move, -move], -1)
    np.testing.assert_allclose(rao, wanted, rtol=0, atol=1e-8)
    assert np.abs(wanted).max() > 0.05


def test_averaging_takes_out_the_noise() -> None:
    """Given D the variance falls as 1 / S, to nothing."""
    theta, D, g = np.tile([0.4, -0.5, 0.2], (2000, 1)), np.tile([0.0, 1.0, 0.0], (2000, 1)), np.array([1.0, -0.3, 0.6])
    u = np.random.default_rng(0).uniform(size=(2000, 64, 3))
    spread = [
        pulled("pyro", gumbel_rao(temperature=0.5, samples=S), theta, g, D, u[:, :S]).gradient.std(0) for S in (1, 64)
    ]
    np.testing.assert_allclose(spread[1], spread[0] / 8.0, rtol=0.1)


def test_the_gap_is_kept() -> None:
    """The class that was drawn leads the others by the gap, so a class far below is left as it is."""
    theta = np.array([2.0, 1.5, -3.0])
    estimator = gapped_st(gap=1.0)
    _, jacobian = rule(estimator, theta, np.array([0.0, 1.0, 0.0]), np.full((1, 3), 0.5))
    np.testing.assert_allclose(jacobian, J(softmax(np.array([1.0, 2.0, -3.0]))), atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", HARD, ids=_named)
def test_values_are_exactly_hard(backend: Backend, estimator: Estimator) -> None:
    value = engine(backend, linear, 2, 3).sites(elbo(draws=8), {"z": estimator})["z"].value
    assert set(np.unique(value)) == {0.0, 1.0}
    np.testing.assert_array_equal(value.sum(-1), 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reinmax_in_a_program(backend: Backend) -> None:
    """Exact with two elements too, as the product over them is linear in each; KL sampled and in closed form."""
    run = engine(backend, quadratic, 2, 3)
    for kl in ("sampled", "closed_form"):
        assert_same(expected(run, reinmax(), 2, 3, kl=kl), exact(quadratic, 2, 3))


# Relaxed values.


def concrete(theta: np.ndarray, u: np.ndarray, tau: float, prior_tau: float, bernoulli: bool) -> Any:
    """Loss and gradients of the relaxed program at given noise, with torch's own densities."""
    leaf = {"theta": THETA[: u.shape[-2], : u.shape[-1]], "prior": PRIOR[: u.shape[-2], : u.shape[-1]], "scale": 1.3}
    p = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in leaf.items()}
    y = torch.softmax((p["theta"] - torch.log(-torch.log(torch.tensor(u)))) / tau, -1)

    def density(name: str, temperature: float) -> torch.Tensor:
        t = torch.tensor(temperature, dtype=torch.float64)
        if bernoulli:
            bits = torch.distributions.RelaxedBernoulli(t, logits=p[name][:, 1] - p[name][:, 0])
            return bits.log_prob(y[..., 1]).sum()
        return torch.distributions.RelaxedOneHotCategorical(t, logits=p[name]).log_prob(y).sum()

    loss = -(p["scale"] * quadratic(torch, y).sum() + density("prior", prior_tau) - density("theta", tau))
    loss.backward()
    return loss.item(), {n: v.grad.numpy() for n, v in p.items() if v.grad is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("E", "V", "kind"), [*SHAPES, *PLATES])
def test_relaxed_values_have_the_gradient_of_the_relaxed_program(
    backend: Backend, E: int, V: int, kind: dict[str, bool]
) -> None:
    u = np.random.default_rng(3).uniform(0.05, 0.95, size=(1, 1, 1, E, V))
    run = engine(backend, quadratic, E, V, **kind)
    for prior in (None, 0.9):
        estimator = gumbel_softmax(temperature=0.6, prior_temperature=prior)
        found = run.loss(elbo(), {"z": estimator}, values={noise_name("z"): u})
        value, gradient = concrete(THETA, u[0, 0, 0], 0.6, prior or 0.6, kind.get("bernoulli", False))
        np.testing.assert_allclose(found.value, value, rtol=0, atol=1e-10)
        assert_same(found.gradient, gradient, 1e-10)


@pytest.mark.parametrize("tau", [0.3, 0.7, 2.0])
def test_the_relaxed_density_integrates_to_one(tau: float) -> None:
    estimator = gumbel_softmax(temperature=tau)
    t, s = np.linspace(-120.0, 120.0, 4001), np.linspace(-120.0, 120.0, 1201)

    def log_sigmoid(x: np.ndarray) -> np.ndarray:
        return -np.logaddexp(0.0, -x)

    def density(theta: np.ndarray, log_y: np.ndarray) -> np.ndarray:
        y = np.maximum(np.exp(log_y), np.finfo(float).tiny)
        log_probs = torch.log_softmax(torch.tensor(theta), -1)
        return estimator.log_density(log_probs, torch.tensor(y), "guide").numpy()

    # Sums over logits: dy = y (1 - y) dt, where the densities have no poles.
    a, b = log_sigmoid(t), log_sigmoid(-t)
    total = np.exp(density(THETA[0, :2], np.stack([a, b], -1)) + a + b).sum() * (t[1] - t[0])
    np.testing.assert_allclose(total, 1.0, atol=1e-10)
    a, b, c, d = (f[:, None] if i < 2 else f[None] for i, f in enumerate([*_both(s, log_sigmoid)] * 2))
    log_y = np.stack(np.broadcast_arrays(a, b + c, b + d), -1)
    total = np.exp(density(THETA[0, :3], log_y) + a + 2.0 * b + c + d).sum() * (s[1] - s[0]) ** 2
    np.testing.assert_allclose(total, 1.0, atol=1e-8)


def _both(x: np.ndarray, f: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return f(x), f(-x)


@pytest.mark.parametrize("V", [2, 3, 10])
def test_relaxed_densities_are_the_same_on_both_backends(V: int) -> None:
    rng = np.random.default_rng(V)
    theta, y = rng.normal(size=(6, V)), softmax(4.0 * rng.normal(size=(6, V)))
    tau = 0.4
    wanted = torch.distributions.RelaxedOneHotCategorical(
        torch.tensor(tau, dtype=torch.float64), logits=torch.tensor(theta)
    ).log_prob(torch.tensor(y))
    estimator = gumbel_softmax(temperature=tau)
    of_torch = estimator.log_density(torch.log_softmax(torch.tensor(theta), -1), torch.tensor(y), "guide")
    of_jax = estimator.log_density(jax.nn.log_softmax(jnp.asarray(theta), -1), jnp.asarray(y), "guide")
    relaxed = _jax_dists.RelaxedOneHotCategorical(tau, logits=jnp.asarray(theta)).log_prob(jnp.asarray(y))
    for found in (of_torch, of_jax, relaxed):
        np.testing.assert_allclose(np.asarray(found), wanted.numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relaxed_values_stay_off_the_vertices(backend: Backend) -> None:
    """At a temperature where weights are below the least number, densities and gradients are finite."""
    for kind in ({}, {"bernoulli": True}):
        run = engine(backend, linear, 2, 2 if kind else 3, **kind)
        found = run.loss(elbo(draws=20), {"z": gumbel_softmax(temperature=1e-3)})
        assert np.isfinite(found.value) and all(np.isfinite(g).all() for g in found.gradient.values())


# What a fit says of relaxed values.

MEANS = np.array([-1.0, 0.3, 1.4])
DATA = np.array([0.4, -0.7, 1.1, 0.2])


def mixture_model(ppl: Ppl, x: Array) -> None:
    logits, means = ppl.param("prior", PRIOR[0, :3]), ppl.param("means", MEANS)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=logits))
        ppl.sample("x", ppl.dist.Normal(z @ means, 1.0), obs=x)


def mixture_guide(ppl: Ppl, x: Array) -> None:
    gain, bias = ppl.param("gain", MEANS), ppl.param("bias", PRIOR[0, :3] - MEANS**2 / 2.0)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.OneHotCategorical(logits=x[..., None] * gain + bias))


MIXTURE = Program("mixture", mixture_model, mixture_guide, portable=True, arguments=("x",))
"""The guide starts as the exact posterior, under which every hard draw's log weight is log p(x)."""


def evidence(x: np.ndarray) -> float:
    weights = softmax(PRIOR[0, :3]) * np.exp(-((x[:, None] - MEANS) ** 2) / 2.0) / np.sqrt(2.0 * np.pi)
    return float(-np.log(weights.sum(-1)).mean())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("held_out", [None, DATA[:3] + 0.1])
def test_a_relaxed_fit_reports_the_loss_of_hard_draws(backend: Backend, held_out: np.ndarray | None) -> None:
    schedule = {"schedule": "exponential", "start": 1.0, "end": 0.5, "steps": 5}
    how: Any = {"steps": 5, "check_every": 2, "draws": 3, "learning_rate": 1e-14}
    how |= {"backend": backend, "dtype": "float64", "compile": "eager" if backend == "pyro" else "auto"}
    how |= {"batch_size": 2} if held_out is None else {"batch_size": None, "validation": held_out}
    run = fit(MIXTURE, None, DATA, "elbo", estimator={"name": "gumbel_softmax", "temperature": schedule}, **how)
    assert run.history["hard_step"].tolist() == [2, 4, 5]
    wanted = evidence(DATA if held_out is None else held_out)
    np.testing.assert_allclose(run.history["hard_loss"], wanted, rtol=0, atol=1e-10)
    beside = run.history["loss"] if held_out is None else run.history["validation"]
    assert np.abs(beside - wanted).min() > 1e-3
    rows = "4 training rows" if held_out is None else "3 validation rows"
    assert f"hard draws: history['hard_loss'] is the loss of {rows} under them" in run.messages
    assert any(m.startswith("estimator: z: gumbel_softmax is biased: values are relaxed, ") for m in run.messages)


def test_a_hard_fit_reports_no_other_loss() -> None:
    run = fit(MIXTURE, None, DATA, "elbo", backend="pyro", steps=1, compile="eager", estimator="reinmax")
    assert "hard_loss" not in run.history
    assert any(m.startswith("estimator: z: reinmax is biased") for m in run.messages)
