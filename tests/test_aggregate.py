"""Objectives that look across the rows of a batch, or at the size of a site's KL.

Draws are laid out along the outer axis with their probability, all rows' together, so expectations are exact; Gaussian
ones stand at the nodes of a Gauss-Hermite rule, which is exact for the polynomials that these programs have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import BACKENDS, Engine, Loss, assert_equal
from jax.scipy.special import logsumexp
from scipy import integrate, stats
from toys import BOTTOM_UP, GAUSSIANS2, PLATE, Array, Backend, Ppl, Values

from ppl_lvm import Program, fit, program
from ppl_lvm.algorithm import Estimator, Objective, Schedule
from ppl_lvm.datasets import load
from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.measure_valued import measure_valued
from ppl_lvm.estimators.off_policy import off_policy
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.stl import stl
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.autogen import autogen
from ppl_lvm.objectives.capacitron import capacitron
from ppl_lvm.objectives.capacity import capacity
from ppl_lvm.objectives.dipvae import dipvae
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.infovae import infovae
from ppl_lvm.objectives.tcvae import tcvae

on_both = pytest.mark.parametrize("backend", BACKENDS)
TIGHT = 1e-11
ENGINES: dict[tuple[str, str], Engine] = {}


def engine(backend: Backend, model: Any, guide: Any, data: Values) -> Engine:
    key = backend, model.__name__ + str(len(next(iter(data.values()))))
    if key not in ENGINES:
        ENGINES[key] = Engine(backend, model, guide, data, portable=True)
    return ENGINES[key]


def cells(names: str, *options: tuple[Any, ...]) -> Any:
    """All on Pyro; on NumPyro, which compiles each for seconds, the first one is fast."""
    found = []
    for backend, (i, option) in itertools.product(BACKENDS, enumerate(options)):
        marks = [pytest.mark.slow] if backend == "numpyro" and i else []
        shown = "-".join([backend, *(type(o).__name__ if isinstance(o, Estimator) else str(o) for o in option)])
        found.append(pytest.param(backend, *option, marks=marks, id=shown.replace(" ", "")))
    return pytest.mark.parametrize(["backend", *names.split()], found)


def nats(by_site: Mapping[str, float]) -> Any:
    """As a recipe has it; the option's type is that of what it becomes."""
    return by_site


# A bit of each row, with a learned prior.

BITS = {
    "prior": np.array(0.4),
    "level": np.array([-0.6, 0.9]),
    "log_scale": np.array(-0.2),
    "q_bias": np.array(-0.3),
    "q_gain": np.array(0.8),
}
BITS_X = np.array([0.7, -1.1, 0.4])


def bits_model(ppl: Ppl, x: Array) -> None:
    """z ~ Bernoulli, x | z Gaussian with one mean for each value."""
    p = {n: ppl.param(n, BITS[n]) for n in ("prior", "level", "log_scale")}
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=p["prior"]))
        ppl.sample("x", ppl.dist.Normal(p["level"][0] + p["level"][1] * z, ppl.xp.exp(p["log_scale"])), obs=x)


def bits_guide(ppl: Ppl, x: Array) -> None:
    bias, gain = ppl.param("q_bias", BITS["q_bias"]), ppl.param("q_gain", BITS["q_gain"])
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Bernoulli(logits=bias + gain * x))


def bits(backend: Backend, rows: int) -> Engine:
    return engine(backend, bits_model, bits_guide, {"x": BITS_X[:rows]})


def bernoulli(logit: Array, z: Array) -> Array:
    return z * logit - jax.nn.softplus(logit)


def bit_log_lik(p: Mapping[str, Array], x: Array, z: Array) -> Array:
    scale = jnp.exp(p["log_scale"])
    return -0.5 * ((x - p["level"][0] - p["level"][1] * z) / scale) ** 2 - p["log_scale"] - 0.5 * math.log(2 * math.pi)


def every_bit(rows: int) -> np.ndarray:
    """`[2^rows, rows]`."""
    return np.array(list(itertools.product([0.0, 1.0], repeat=rows)))


def exact(loss: Callable[[Mapping[str, Array]], Array], params: Values = BITS) -> tuple[float, dict[str, np.ndarray]]:
    with jax.enable_x64(True):
        p = {n: jnp.asarray(v) for n, v in params.items()}
        value, gradient = jax.jit(jax.value_and_grad(loss))(p)
        return float(value), {n: np.asarray(g) for n, g in gradient.items()}


def tc_terms(log_q: Array, every: Array, log_weights: Array) -> tuple[Array, Array, Array]:
    """Log densities of codes: given the row, of the aggregate, and of the product of its marginals.

    `every [i, j, D]` is log q of row i's code under row j.
    """
    joint = logsumexp(every.sum(-1) + log_weights, axis=1)
    marginals = logsumexp(every + log_weights[..., None], axis=1).sum(-1)
    return log_q, joint, marginals


def mixture(kind: str, B: int, N: float) -> np.ndarray:
    if kind == "weighted":
        return np.full((B, B), -math.log(N * B))
    own = np.eye(B, dtype=bool)
    return np.where(own, -math.log(N), math.log((N - 1) / (N * (B - 1))))


@cells("estimator kind", *itertools.product((rloo(), score(), vimco(), enumerated()), ("stratified", "weighted")))
def test_the_total_correlation_at_bits_by_enumeration(backend: Backend, estimator: Estimator, kind: Any) -> None:
    """log q(z_i | x_j) is a function of row i's own draw, so a mean per row carries its score: three rows of seven."""
    N, z = 7, every_bit(3)
    objective = tcvae(alpha=0.5, beta=3.0, gamma=2.0, aggregate=kind)
    K = estimator.least_draws
    if estimator.exhaustive:
        found = bits(backend, 3).loss(objective, {"z": estimator}, total_rows=N)
    else:
        with jax.enable_x64(True):
            chance = np.exp(np.asarray(bernoulli(BITS["q_bias"] + BITS["q_gain"] * BITS_X, z)).sum(1))
        pick = np.indices((len(z),) * K).reshape(K, -1).T  # [T, K]
        found = bits(backend, 3).loss(
            objective.model_copy(update={"draws": K, "outer": len(pick)}),
            {"z": estimator},
            values={"z": z[pick]},
            weight=chance[pick].prod(1),
            total_rows=N,
        )

    def loss(p: Mapping[str, Array]) -> Array:
        logits = p["q_bias"] + p["q_gain"] * BITS_X

        def of(z: Array) -> Array:
            log_q = bernoulli(logits, z)
            every = bernoulli(logits[None, :], z[:, None])[..., None]
            of_row, joint, marginals = tc_terms(log_q, every, jnp.asarray(mixture(kind, 3, N)))
            h = bit_log_lik(p, BITS_X, z) - 0.5 * (of_row - joint) - 3.0 * (joint - marginals)
            h = h - 2.0 * (marginals - bernoulli(p["prior"], z))
            return -N / 3 * jnp.exp(log_q.sum()) * h.sum()

        return jax.vmap(of)(jnp.asarray(z)).sum()

    assert_equal(found, *exact(loss), TIGHT)


@cells(
    "estimator kernel", *itertools.product((rloo(), score(), score(baseline="moving_average")), ("imq", "rbf"))
)
def test_pooled_draws_of_bits_by_enumeration(backend: Backend, estimator: Estimator, kernel: Any) -> None:
    """Two rows and two draws of the learned prior: every outcome of both, under the discrepancy of all of them."""
    N, z, K = 5, every_bit(2), estimator.least_draws
    x = BITS_X[:2]
    objective = infovae(alpha=0.3, lam=4.0, kernel=kernel, bandwidth=1.5)
    pairs = np.array(list(itertools.product(range(4), repeat=2)))  # codes, prior draws
    with jax.enable_x64(True):
        chance_q = np.exp(np.asarray(bernoulli(BITS["q_bias"] + BITS["q_gain"] * x, z)).sum(1))
        chance_p = np.exp(np.asarray(bernoulli(BITS["prior"], z)).sum(1))
    chance = chance_q[pairs[:, 0]] * chance_p[pairs[:, 1]]
    pick = np.indices((len(pairs),) * K).reshape(K, -1).T
    found = bits(backend, 2).loss(
        objective.model_copy(update={"draws": K, "outer": len(pick)}),
        {"z": estimator},
        values={"z": z[pairs[pick, 0]], "z/prior": z[pairs[pick, 1]]},
        weight=chance[pick].prod(1),
        total_rows=N,
        states={"z": np.asarray(0.7)} if estimator.initial_state() is not None else None,
    )

    def k(a: Array, b: Array) -> Array:
        square = (a - b) ** 2
        return jnp.exp(-square / 1.5) if kernel == "rbf" else 1.5 / (1.5 + square)

    def loss(p: Mapping[str, Array]) -> Array:
        logits = p["q_bias"] + p["q_gain"] * x

        def of(z: Array, w: Array) -> Array:
            log_q, log_p = bernoulli(logits, z), bernoulli(p["prior"], z)
            mmd = k(z[0], z[1]) + k(w[0], w[1]) - k(z[:, None], w[None, :]).sum() / 2
            rows = bit_log_lik(p, x, z) + 0.7 * (log_p - log_q)
            mass = jnp.exp(log_q.sum() + bernoulli(p["prior"], w).sum())
            return -mass * (N / 2 * rows.sum() - 3.3 * N * mmd)

        return jax.vmap(of)(jnp.asarray(z[pairs[:, 0]]), jnp.asarray(z[pairs[:, 1]])).sum()

    assert_equal(found, *exact(loss), TIGHT)


# Gaussian codes of two entries beside a code of two classes.

MIXED = {
    "loading": np.array([[0.8, -0.4, 0.5], [0.3, 0.9, -0.6]]),
    "shift": np.array([[0.4, -0.2, 0.1], [-0.3, 0.5, 0.7]]),
    "log_scale": np.array(-0.1),
    "q_loc": np.array([[0.5, -0.2], [0.1, 0.6], [-0.3, 0.2]]),
    "q_log_scale": np.array([[-0.2, 0.3], [0.1, -0.1], [0.2, 0.05]]),
    "q_logits": np.array([[0.7, -0.4], [0.2, 0.3], [-0.5, 0.6]]),
}
MIXED_X = np.array([[0.4, -0.9, 1.1], [-1.2, 0.3, 0.2], [0.6, 1.4, -0.5], [0.1, -0.3, 1.7]])


def mixed_model(ppl: Ppl, x: Array) -> None:
    """z ~ Normal(0, 1)^2, c uniform on two classes, x linear in both."""
    p = {n: ppl.param(n, MIXED[n]) for n in ("loading", "shift", "log_scale")}
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(ppl.xp.zeros(2), 1.0).to_event(1))
        c = ppl.sample("c", ppl.dist.OneHotCategorical(logits=ppl.xp.zeros(2)))
        loc = z @ p["loading"] + c @ p["shift"]
        ppl.sample("x", ppl.dist.Normal(loc, ppl.xp.exp(p["log_scale"])).to_event(1), obs=x)


def mixed_guide(ppl: Ppl, x: Array) -> None:
    p = {n: ppl.param(n, MIXED[n]) for n in ("q_loc", "q_log_scale", "q_logits")}
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(x @ p["q_loc"], ppl.xp.exp(x @ p["q_log_scale"])).to_event(1))
        ppl.sample("c", ppl.dist.OneHotCategorical(logits=x @ p["q_logits"]))


def mixed(backend: Backend) -> Engine:
    return engine(backend, mixed_model, mixed_guide, {"x": MIXED_X})


def cross(p: Mapping[str, Array], z: Array, c: Array) -> Array:
    """`[i, j, 3]`: two entries of z, and c."""
    loc, log_scale = MIXED_X @ p["q_loc"], MIXED_X @ p["q_log_scale"]
    of_z = -0.5 * ((z[:, None] - loc) / jnp.exp(log_scale)) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)
    of_c = c @ jax.nn.log_softmax(MIXED_X @ p["q_logits"], axis=-1).T
    return jnp.concatenate([of_z, of_c[..., None]], axis=-1)


@on_both
def test_what_is_requested_of_a_guide(backend: Backend) -> None:
    """Log densities of each row's draw under every row, means and variances, at two outer draws of three."""

    class everything(Objective):
        verbs = frozenset({"mean"})

        def requests(self) -> frozenset[str]:
            return frozenset({"cross", "moments", "prior", "kl without draws"})

        def __call__(self, d: Any) -> Any:
            raise NotImplementedError

    rng = np.random.default_rng(0)
    z, c = rng.normal(size=(2, 3, 4, 2)), np.eye(2)[rng.integers(0, 2, (2, 3, 4))]
    asked = mixed(backend)
    with pytest.raises(LegalityError, match="'c' is discrete, and its covariance"):
        asked.plan(everything(), {"*": score()})

    class all_but_moments(everything):
        def requests(self) -> frozenset[str]:
            return frozenset({"cross", "prior", "kl without draws"})

    found = asked.sites(
        all_but_moments(draws=3, outer=2), {"*": score()}, values={"z": z, "c": c, "z/prior": z + 1.0, "c/prior": c}
    )
    with jax.enable_x64(True):
        of = jax.vmap(jax.vmap(lambda z, c: cross(MIXED, z, c)))
        expected = np.asarray(of(jnp.asarray(z), jnp.asarray(c)))
    np.testing.assert_allclose(found["z"].extra["cross"], expected[..., :2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["c"].extra["cross"], expected[..., 2:], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found["z"].extra["prior"], z + 1.0)
    assert found["z"].extra["prior"].shape == z.shape and "prior_log_p" not in found["z"].extra
    np.testing.assert_allclose(found["c"].extra["prior_log_p"], np.full((2, 3, 4), -math.log(2)), atol=1e-12)
    drawn = asked.sites(all_but_moments(draws=3, outer=2), {"*": score()})
    assert len(np.unique(drawn["z"].extra["prior"])) == z.size
    # The diagonal is the density of the row itself.
    np.testing.assert_allclose(np.einsum("mkiid->mki", drawn["z"].extra["cross"]), drawn["z"].log_q, atol=1e-12)


def test_elements_in_plates_inside_a_row() -> None:
    """Two elements in a plate on the left of the rows', with an event of two each: four elements, on both backends."""
    locs = np.arange(4.0).reshape(2, 2)

    def model(ppl: Ppl, x: Array) -> None:
        scale = ppl.param("scale", np.array(1.0))
        with ppl.plate("data", len(x), dim=-1):
            with ppl.plate("inner", 2, dim=-2):
                z = ppl.sample("z", ppl.dist.Normal(ppl.xp.zeros(2), 1.0).to_event(1))
            ppl.sample("x", ppl.dist.Normal(ppl.xp.sum(z[..., 0], axis=-2), scale), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("loc", locs)
        with ppl.plate("inner", 2, dim=-2), ppl.plate("data", len(x), dim=-1):
            # [inner, rows, event]
            ppl.sample("z", ppl.dist.Normal(loc[:, None] * x[..., None], 1.0).to_event(1))

    x = np.array([0.5, -1.0, 2.0])
    z = np.random.default_rng(0).normal(size=(1, 2, 3, 2, 2))  # rows, inner, event
    for backend in BACKENDS:
        found = Engine(backend, model, guide, {"x": x}, portable=True).sites(
            tcvae(draws=2), {"*": pathwise()}, values={"z": z}
        )
        expected = stats.norm.logpdf(z[:, :, :, None], locs * x[:, None, None]).reshape(1, 2, 3, 3, 4)
        np.testing.assert_allclose(found["z"].extra["cross"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "kind", "N"),
    [
        ("pyro", "stratified", 4),
        ("pyro", "stratified", 10),
        ("pyro", "weighted", 10),
        ("numpyro", "stratified", 4),
        pytest.param("numpyro", "weighted", 10, marks=pytest.mark.slow),
    ],
)
def test_the_three_parts_are_those_of_the_kl(backend: Backend, kind: Any, N: int) -> None:
    """One by one by their weights, of continuous and discrete codes; under equal weights the loss is the ELBO's. With
    all rows in the batch the density of the codes is the mean over rows itself."""
    rng = np.random.default_rng(1)
    z, c = rng.normal(size=(1, 1, 4, 2)), np.eye(2)[rng.integers(0, 2, (1, 1, 4))]
    values, both = {"z": z, "c": c}, {"z": pathwise(), "c": score()}

    def value(**weights: Any) -> float:
        return float(mixed(backend).loss(tcvae(aggregate=kind, **weights), both, values=values, total_rows=N).value)

    with jax.enable_x64(True):
        every = np.asarray(cross(MIXED, z[0, 0], c[0, 0]))
        log_q = np.einsum("iid->i", every)
        log_q, joint, marginals = (np.asarray(a) for a in tc_terms(log_q, every, mixture(kind, 4, N)))
    if N == 4:
        np.testing.assert_allclose(joint, np.log(np.exp(every.sum(-1)).mean(1)), atol=1e-12)
        np.testing.assert_allclose(marginals, np.log(np.exp(every).mean(1)).sum(-1), atol=1e-12)
    log_p = stats.norm.logpdf(z[0, 0]).sum(1) - math.log(2)
    parts = {"alpha": log_q - joint, "beta": joint - marginals, "gamma": marginals - log_p}
    base_weights = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0}
    base = value(**base_weights)
    for name, part in parts.items():
        more = value(**{**base_weights, name: 3.0})
        assert more - base == pytest.approx(2.0 * N / 4 * part.sum(), abs=1e-10)
    found = mixed(backend).loss(elbo(), both, values=values, total_rows=N)
    same = mixed(backend).loss(tcvae(alpha=1, beta=1, gamma=1, aggregate=kind), both, values=values, total_rows=N)
    assert_equal(same, float(found.value), found.gradient, 1e-10)
    assert tcvae(alpha=2.0, beta=2.0, gamma=2.0).why_biased() == "" and tcvae().why_biased()


def test_estimates_of_the_aggregate_density() -> None:
    """Stratified weights sum to one and are unbiased over batches; exact, as the weighted ones but for 1 / N, with all
    rows in the batch."""
    rng = np.random.default_rng(2)
    N, B = 6, 3
    q = rng.uniform(0.1, 2.0, size=(N, N))  # of code i under row j

    def weights(kind: Any, B: int, N: int) -> np.ndarray:
        class Table:
            pass

        d: Any = Table()
        d.B, d.N = B, N
        with jax.enable_x64(True):
            return np.exp(np.asarray(tcvae(aggregate=kind).log_weights(d, jnp.zeros(1))))

    assert weights("stratified", B, N).sum(1) == pytest.approx(np.ones(B), abs=1e-14)
    assert weights("weighted", B, N).sum(1) == pytest.approx(np.full(B, 1 / N), abs=1e-14)
    assert weights("stratified", N, N) == pytest.approx(np.full((N, N), 1 / N), abs=1e-14)
    assert weights("stratified", 1, N).item() == 1.0
    for i in range(N):
        batches = [(i, *rest) for rest in itertools.combinations(set(range(N)) - {i}, B - 1)]
        means = [weights("stratified", B, N)[0] @ q[i, list(batch)] for batch in batches]
        assert np.mean(means) == pytest.approx(q[i].mean(), abs=1e-12)
        # The logarithm of an unbiased estimate is low.
        assert np.mean(np.log(means)) < np.log(q[i].mean())


@cells("estimator", (stl(),), (pathwise(),), (score(),))
def test_the_total_correlation_of_gaussians_by_draws(backend: Backend, estimator: Estimator) -> None:
    """Given draws, each estimator's gradient is that of its own surrogate."""
    z = np.random.default_rng(3).normal(size=(1, 1, 4, 2))
    c = np.eye(2)[[0, 1, 1, 0]][None, None]
    found = mixed(backend).loss(tcvae(beta=4.0), {"z": estimator, "c": score()}, values={"z": z, "c": c}, total_rows=9)

    def loss(p: Mapping[str, Array]) -> Array:
        stopped = {n: jax.lax.stop_gradient(v) for n, v in p.items()}
        loc, scale = MIXED_X @ p["q_loc"], jnp.exp(MIXED_X @ p["q_log_scale"])
        noise = jax.lax.stop_gradient((z[0, 0] - loc) / scale)
        value = jnp.asarray(z[0, 0]) if estimator.scored else loc + scale * noise
        every = cross(p, value, c[0, 0])
        of_c = jnp.einsum("ii->i", every[..., 2])
        own = jnp.einsum("iid->id", (cross(stopped, value, c[0, 0]) if estimator.frozen else every)[..., :2]).sum(-1)
        _, joint, marginals = tc_terms(own, every, jnp.asarray(mixture("stratified", 4, 9)))
        residual = (MIXED_X - value @ p["loading"] - c[0, 0] @ p["shift"]) / jnp.exp(p["log_scale"])
        log_lik = (-0.5 * residual**2 - p["log_scale"] - 0.5 * math.log(2 * math.pi)).sum(-1)
        log_p = (-0.5 * value**2 - 0.5 * math.log(2 * math.pi)).sum(-1) - math.log(2)
        h = log_lik - (own + of_c - joint) - 4.0 * (joint - marginals) - (marginals - log_p)
        # What is credited to a site: its own terms, and those that look at both.
        marginals_z, marginals_c = (
            logsumexp(part + jnp.asarray(mixture("stratified", 4, 9))[..., None], axis=1).sum(-1)
            for part in (every[..., :2], every[..., 2:])
        )
        both = log_lik - 3.0 * joint
        to_c = both - math.log(2) - of_c + 3.0 * marginals_c
        to_z = both + log_p + math.log(2) - own + 3.0 * marginals_z
        stop = jax.lax.stop_gradient
        surrogate = h + (of_c - stop(of_c)) * stop(to_c)
        if estimator.scored:
            surrogate = surrogate + (own - stop(own)) * stop(to_z)
        return -9 / 4 * surrogate.sum()

    assert_equal(found, *exact(loss, MIXED), 1e-10)


# The discrepancy of codes and prior.

ROWS_X = np.linspace(-1.5, 1.5, 8)
ROWS = {"gain": np.array(2.5), "log_scale": np.array(-1.0), "w": np.array(0.7)}


def rows_model(ppl: Ppl, x: Array) -> None:
    w = ppl.param("w", ROWS["w"])
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * w, 1.0))
        ppl.sample("x", ppl.dist.Normal(w * z, 0.5), obs=x)


def rows_guide(ppl: Ppl, x: Array) -> None:
    gain, log_scale = ppl.param("gain", ROWS["gain"]), ppl.param("log_scale", ROWS["log_scale"])
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(gain * x, ppl.xp.exp(log_scale)))


def discrepancies(asked: Engine, runs: int, x: Array | None = None, **options: Any) -> np.ndarray:
    """The squared discrepancy of `runs` draws of the batch: what two losses of the same draws differ by."""
    both = [
        asked.loss(infovae(alpha=0.0, lam=lam, **options), {"z": pathwise()}, runs=runs, seed=5) for lam in (1.0, 2.0)
    ]
    return (both[1].value - both[0].value) / len(ROWS_X)


def test_the_discrepancy_has_the_closed_form_of_gaussians() -> None:
    """Codes of eight rows against a standard normal prior: the mean over runs is the integral of the kernel, by
    quadrature for each pair of distinct rows."""
    b, scale = 2.0, math.exp(ROWS["log_scale"])
    loc = ROWS["gain"] * ROWS_X

    def k(mean: float, variance: float) -> float:
        """`E exp(-u^2 / b)` of a Gaussian u."""
        density = stats.norm(mean, math.sqrt(variance)).pdf
        return float(integrate.quad(lambda u: math.exp(-u * u / b) * density(u), -20, 20, limit=200)[0])

    codes = np.mean([k(a - c, 2 * scale**2) for a, c in itertools.permutations(loc, 2)])
    expected = codes + k(0.0, 2.0) - 2 * np.mean([k(a, scale**2 + 1) for a in loc])
    assert k(0.3, 2.0) == pytest.approx(math.sqrt(b / (b + 4.0)) * math.exp(-0.09 / (b + 4.0)), abs=1e-12)
    found = discrepancies(engine("numpyro", rows_model, rows_guide, {"x": ROWS_X}), 4000, kernel="rbf")
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))
    assert expected > 10 * found.std() / math.sqrt(len(found))  # which tells it from zero


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_the_discrepancy_of_equal_distributions_has_mean_zero(kernel: Any) -> None:
    def guide(ppl: Ppl, x: Array) -> None:
        gain, log_scale = ppl.param("gain", np.array(0.0)), ppl.param("log_scale", np.array(0.0))
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(gain * x, ppl.xp.exp(log_scale)))

    same = Engine("numpyro", rows_model, guide, {"x": ROWS_X}, portable=True)
    found = discrepancies(same, 4000, kernel=kernel)
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean()) < 4 * error
    # With the diagonal it would have a floor of two (1 - mean k) / B.
    assert (found < 0).any() and error < 0.02 / len(ROWS_X)


def test_kernels_scale_with_the_dimension() -> None:
    """The default bandwidth is twice the number of elements, of all sites together."""
    values = {"z": np.zeros((1, 1, 4, 2)), "c": np.eye(2)[[0, 1, 1, 0]][None, None]}
    values |= {"z/prior": np.ones((1, 1, 4, 2)), "c/prior": values["c"]}
    for kernel in ("rbf", "imq"):
        found = [
            mixed("pyro").loss(
                infovae(kernel=kernel, bandwidth=b, lam=5.0), {"z": pathwise(), "c": score()}, values=values
            ).value
            for b in (None, 8.0, 7.0)
        ]
        assert found[0] == pytest.approx(found[1], abs=1e-12) and found[0] != pytest.approx(found[2], abs=1e-3)


# The covariance of codes.


def gaussian_codes_guide(ppl: Ppl, x: Array) -> None:
    p = {n: ppl.param(n, MIXED[n]) for n in ("q_loc", "q_log_scale")}
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(x @ p["q_loc"], ppl.xp.exp(x @ p["q_log_scale"])).to_event(1))


def gaussian_codes_model(ppl: Ppl, x: Array) -> None:
    p = {n: ppl.param(n, MIXED[n]) for n in ("loading", "log_scale")}
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(ppl.xp.zeros(2), 1.0).to_event(1))
        ppl.sample("x", ppl.dist.Normal(z @ p["loading"], ppl.xp.exp(p["log_scale"])).to_event(1), obs=x)


@cells("covariance diagonal", ("codes", 7.0), ("codes", None), ("means", None))
def test_the_covariance_of_codes(backend: Backend, covariance: Any, diagonal: float | None) -> None:
    N = 11
    objective = dipvae(covariance=covariance, off_diagonal=3.0, diagonal=diagonal)
    asked = engine(backend, gaussian_codes_model, gaussian_codes_guide, {"x": MIXED_X})
    z = np.random.default_rng(4).normal(size=(1, 2, 4, 2))
    pair = objective.model_copy(update={"draws": 2})
    found = asked.loss(pair, {"z": pathwise()}, values={"z": z}, total_rows=N)
    plain = asked.loss(elbo(draws=2, kl="closed_form"), {"z": pathwise()}, values={"z": z}, total_rows=N)
    off = 3.0
    on = diagonal if diagonal is not None else {"means": 30.0, "codes": 3.0}[covariance]

    def penalty(p: Mapping[str, Array]) -> Array:
        mean, variance = MIXED_X @ p["q_loc"], jnp.exp(2 * MIXED_X @ p["q_log_scale"])
        C = jnp.cov(mean.T, ddof=1) * (N - 1) / N
        if objective.covariance == "codes":
            C = C + jnp.diag(variance.mean(0))
        return N * (off * 2 * C[0, 1] ** 2 + on * ((C[0, 0] - 1) ** 2 + (C[1, 1] - 1) ** 2))

    params = {n: v for n, v in MIXED.items() if n not in ("q_logits", "shift")}
    value, gradient = exact(penalty, params)
    assert_equal(found, float(plain.value) + value, {n: plain.gradient[n] + g for n, g in gradient.items()}, 1e-10)


def test_the_covariance_of_a_batch_is_unbiased_and_that_of_all_rows_exact() -> None:
    means = np.random.default_rng(5).normal(size=(5, 2))
    exactly = np.cov(means.T, ddof=0)
    of_batches = [np.cov(means[list(b)].T, ddof=1) * 4 / 5 for b in itertools.combinations(range(5), 3)]
    np.testing.assert_allclose(np.mean(of_batches, axis=0), exactly, atol=1e-14)


# The size of a KL.


def kls(p: Mapping[str, Array]) -> tuple[Array, Array]:
    """Of z and of c, by row."""
    loc, log_scale = MIXED_X @ p["q_loc"], MIXED_X @ p["q_log_scale"]
    log_q = jax.nn.log_softmax(MIXED_X @ p["q_logits"], axis=-1)
    of_z = 0.5 * (jnp.exp(2 * log_scale) + loc**2 - 1 - 2 * log_scale).sum(-1)
    return of_z, (jnp.exp(log_q) * (log_q + math.log(2))).sum(-1)


@cells(
    "options parts",
    ({"z": 0.2, "c": 0.5}, ((("z",), 0.1), (("c",), 0.25))),
    ({"*": 0.6}, ((("z", "c"), 0.3),)),
    ({"z": 40.0}, ((("z",), 20.0),)),
)
def test_capacities(backend: Backend, options: Any, parts: Any) -> None:
    """The absolute difference of the mean KL of a batch, above and below; a site without a capacity adds its own."""
    objective = capacity(capacity=options, gamma=4.0, ramp=0.5, draws=2)
    rng = np.random.default_rng(6)
    values = {"z": rng.normal(size=(1, 2, 4, 2)), "c": np.eye(2)[rng.integers(0, 2, (1, 2, 4))]}
    both = {"z": pathwise(), "c": rloo()}
    found = mixed(backend).loss(objective, both, values=values, total_rows=12)
    only = elbo(weights=nats({"z": 0.0, "c": 0.0, "x": 1.0}), kl="closed_form", draws=2)
    plain = mixed(backend).loss(only, both, values=values, total_rows=12)

    def penalty(p: Mapping[str, Array]) -> Array:
        kl = dict(zip(("z", "c"), kls(p), strict=True))
        held = {n for names, _ in parts for n in names}
        total = sum((kl[n].mean() for n in kl if n not in held), jnp.zeros(()))
        return 12 * (total + sum(4.0 * jnp.abs(sum(kl[n].mean() for n in names) - C) for names, C in parts))

    value, gradient = exact(penalty, MIXED)
    assert_equal(found, float(plain.value) + value, {n: plain.gradient[n] + g for n, g in gradient.items()}, 1e-10)


def test_capacities_open_by_a_schedule() -> None:
    opening = Schedule(schedule="linear", start=0.0, end=1.0, steps=100)
    assert capacity(ramp=opening).numbers() == {"ramp": opening, "gamma": 10.0}


@on_both
def test_a_bound_on_the_kl_at_its_solution(backend: Backend) -> None:
    """One Gaussian code: at the known optimum of the multiplier, the model and the guide every gradient is zero, and
    away from it the multiplier's has the sign of what is above the capacity. The nodes of the rule are exact, as the
    loss is quadratic in the noise."""
    noise, C = 0.5, 0.6
    x = np.array([-1.3, 0.2, 0.9, 1.7])
    second = float((x**2).mean())
    # The best linear code has KL = log(second / (multiplier noise^2)) / 2; see `docs/objectives.md`.
    multiplier = second / noise**2 * math.exp(-2 * C)
    w = math.sqrt(second - multiplier * noise**2)
    variance = multiplier * noise**2 / second
    best = {"w": w, "gain": w / second, "log_scale": 0.5 * math.log(variance)}

    def model(ppl: Ppl, x: Array) -> None:
        w = ppl.param("w", np.array(best["w"]))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * w, 1.0))
            ppl.sample("x", ppl.dist.Normal(w * z, noise), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        gain, log_scale = (ppl.param(n, np.array(best[n])) for n in ("gain", "log_scale"))
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(gain * x, ppl.xp.exp(log_scale)))

    node, weight = np.polynomial.hermite_e.hermegauss(3)
    z = (best["gain"] * x + math.sqrt(variance) * node[:, None])[:, None]

    def run(capacity: float) -> Loss:
        return Engine(backend, model, guide, {"x": x}, portable=True).loss(
            capacitron(capacity=nats({"z": capacity}), outer=3),
            {"z": pathwise()},
            values={"z": z},
            weight=weight / weight.sum(),
            own={"objective": {"multiplier": np.array([math.log(math.expm1(multiplier))])}},
        )

    found = run(C)
    for name, gradient in found.gradient.items():
        np.testing.assert_allclose(gradient, 0.0, atol=1e-10, err_msg=name)
    np.testing.assert_allclose(found.own["objective"]["multiplier"], 0.0, atol=1e-10)
    slope = 1 - math.exp(-multiplier)  # of softplus
    for other in (0.5 * C, 2 * C):
        away = run(other)
        # Descent along it raises the multiplier where the KL is above, and lowers it where it is below.
        np.testing.assert_allclose(away.own["objective"]["multiplier"], -slope * 4 * (C - other), atol=1e-10)
        assert away.value - found.value == pytest.approx(4 * multiplier * (C - other), abs=1e-10)


@on_both
def test_several_bounds_have_a_multiplier_each(backend: Backend) -> None:
    objective = capacitron(capacity=nats({"z": 0.3, "c*": 0.1}), draws=2)
    rng = np.random.default_rng(7)
    values = {"z": rng.normal(size=(1, 2, 4, 2)), "c": np.eye(2)[rng.integers(0, 2, (1, 2, 4))]}
    raw = np.array([0.4, -0.7])
    multipliers = np.log1p(np.exp(raw))
    both = {"z": pathwise(), "c": rloo()}
    found = mixed(backend).loss(objective, both, values=values, total_rows=12, own={"objective": {"multiplier": raw}})
    weights = {"z": float(multipliers[0]), "c": float(multipliers[1])}
    plain = mixed(backend).loss(
        elbo(weights=nats(weights), kl="closed_form", draws=2), both, values=values, total_rows=12
    )
    assert_equal(found, float(plain.value) - 12 * (0.3 * weights["z"] + 0.1 * weights["c"]), plain.gradient, 1e-10)
    with jax.enable_x64(True):
        excess = np.array([kl.mean() for kl in kls(MIXED)]) - [0.3, 0.1]
    np.testing.assert_allclose(found.own["objective"]["multiplier"], -12 * excess / (1 + np.exp(-raw)), atol=1e-10)


@cells("m", (2.0,), (0.0,))
def test_perfect_reconstructions_at_the_tempered_posterior(backend: Backend, m: float) -> None:
    """The bound is `log int p(z) p(x | z)^(1 + m) dz`, by the closed form and by quadrature, and the guide's gradient
    is zero there."""
    w, noise, x = 0.9, 0.6, np.array([-1.3, 0.2, 0.9])
    precision = 1 + (1 + m) * w**2 / noise**2
    gain, scale = (1 + m) * w / noise**2 / precision, precision**-0.5

    def model(ppl: Ppl, x: Array) -> None:
        slope = ppl.param("w", np.array(w))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * slope, 1.0))
            ppl.sample("x", ppl.dist.Normal(slope * z, noise), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        q_gain, log_scale = ppl.param("gain", np.array(gain)), ppl.param("log_scale", np.log(np.array(scale)))
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(q_gain * x, ppl.xp.exp(log_scale)))

    def evidence(x: float) -> float:
        def f(z: float) -> float:
            return float(stats.norm.pdf(z) * stats.norm.pdf(x, w * z, noise) ** (1 + m))

        return math.log(integrate.quad(f, -12, 12, epsabs=1e-14, epsrel=1e-12)[0])

    node, weight = np.polynomial.hermite_e.hermegauss(3)
    found = Engine(backend, model, guide, {"x": x}, portable=True).loss(
        autogen(m=m, outer=3),
        {"z": pathwise()},
        values={"z": (gain * x + scale * node[:, None])[:, None]},
        weight=weight / weight.sum(),
    )
    assert -found.value == pytest.approx(sum(map(evidence, x)), abs=1e-9)
    for name in ("gain", "log_scale"):
        np.testing.assert_allclose(found.gradient[name], 0.0, atol=1e-10)
    assert abs(found.gradient["w"]) > 0.01


# What is refused.


def refused(asked: Engine, objective: Objective, estimators: Mapping[str, Estimator] | None = None) -> str:
    with pytest.raises(LegalityError) as error:
        asked.plan(objective, estimators or {"*": score()})
    return str(error.value)


ACROSS: tuple[Objective, ...] = (tcvae(), dipvae(), infovae())


@on_both
def test_what_is_compared_looks_at_no_other_latent_site(backend: Backend) -> None:
    chain, upward = Engine.of(backend, GAUSSIANS2), Engine.of(backend, BOTTOM_UP)
    for objective in (tcvae(), dipvae(), capacity()):
        found = refused(chain, objective)
        assert "Site 'z2' is compared by its distribution alone, which in the guide looks at ['z1']" in found
        assert "let it look at no latent site, or use 'elbo'" in found and "Site 'z1' is compared" not in found
    assert "which in the model looks at ['z1']" in refused(chain, infovae())
    assert "which in the model looks at ['z2']" in refused(upward, tcvae())
    # Draws of a prior that looks at others are refused, of a guide they are what they are.
    assert "in the guide" not in refused(chain, infovae())


@on_both
def test_globals_and_single_rows_are_refused(backend: Backend) -> None:
    for objective in (*ACROSS, capacity(capacity=nats({"*": 0.5})), capacitron(), autogen()):
        assert "the objective is of one row by itself" in refused(Engine.of(backend, PLATE), objective)
    for objective in (tcvae(), infovae()):
        assert "a batch has one row (data plate 'data'); raise batch_size" in refused(bits(backend, 1), objective)


def test_pooled_draws_have_one_value_a_row() -> None:
    for estimator in (enumerated(), measure_valued(), off_policy()):
        found = refused(bits("pyro", 3), infovae(draws=2), {"z": estimator})
        assert "the draws of all rows of a batch meet in one function (`pooled`)" in found
        assert "use 'vimco', 'rloo' or 'score'" in found
    for legal in (vimco(), rloo(), score()):
        bits("pyro", 3).plan(infovae(draws=2), {"z": legal})


@on_both
def test_distributions_that_are_no_product_are_refused(backend: Backend) -> None:
    def tied_model(ppl: Ppl, x: Array) -> None:
        w = ppl.param("w", np.array(0.5))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.MultivariateNormal(ppl.xp.zeros(2), ppl.xp.eye(2)))
            ppl.sample("x", ppl.dist.Normal(w * z[..., 0], 1.0), obs=x)

    def tied_guide(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("loc", np.array([0.1, 0.2]))
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.MultivariateNormal(loc + x[..., None], ppl.xp.eye(2)))

    tied = engine(backend, tied_model, tied_guide, {"x": BITS_X})
    for objective in (tcvae(), dipvae()):
        found = refused(tied, objective, {"z": pathwise()})
        assert "Site 'z' has elements that depend on each other (or is a point)" in found
        assert "use a Normal or another distribution with to_event" in found
    tied.plan(infovae(), {"z": pathwise()})

    def masked_guide(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("loc", np.array([0.1, 0.2]))
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(loc + x[..., None], 1.0).to_event(1).mask(x > 0))

    masked = Engine(backend, tied_model, masked_guide, {"x": BITS_X}, portable=True)
    for other in (tcvae(), infovae()):
        assert "Site 'z' is masked, observed in part or inside a scan" in refused(masked, other, {"z": pathwise()})


def test_what_the_guide_alone_has_is_refused() -> None:
    def model(ppl: Ppl, x: Array) -> None:
        w = ppl.param("w", np.array(0.5))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * w, 1.0))
            ppl.sample("x", ppl.dist.Normal(w * z, 1.0), obs=x)

    def auxiliary(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("loc", np.array(0.1))
        with ppl.plate("data", len(x)):
            u = ppl.sample("u", ppl.dist.Normal(loc, 1.0), infer={"is_auxiliary": True})
            ppl.sample("z", ppl.dist.Normal(u + x, 1.0))

    def factor(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("loc", np.array(0.1))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(loc * x, 1.0))
            ppl.factor("f", 0.1 * z)

    mixed_density = Engine("pyro", model, auxiliary, {"x": BITS_X}, portable=True)
    for objective in (*ACROSS, capacity(capacity=nats({"z": 0.5}))):
        assert "Site 'u' is the guide's alone" in refused(mixed_density, objective, {"*": pathwise()})
    parted = capacitron(capacity=nats({"z": 1.0}))
    assert "capacity parts them; give all one pattern" in refused(mixed_density, parted, {"*": pathwise()})
    mixed_density.plan(capacitron(), {"*": pathwise()})
    weighed = Engine("pyro", model, factor, {"x": BITS_X}, portable=True)
    for objective in (tcvae(), dipvae(), capacity(capacity=nats({"z": 0.5}))):
        assert "Site 'f' is a factor of the guide" in refused(weighed, objective, {"*": pathwise()})


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [tcvae, infovae])
def test_draws_in_pieces_are_the_same(backend: Backend, kind: Any) -> None:
    rng = np.random.default_rng(8)
    values = {"z": rng.normal(size=(2, 4, 4, 2)), "c": np.eye(2)[rng.integers(0, 2, (2, 4, 4))]}
    values |= {f"{n}/prior": v[:, ::-1].copy() for n, v in values.items()}
    both = {"z": pathwise(), "c": rloo()}
    whole, parts = (
        mixed(backend).loss(kind(draws=4, outer=2, chunk=c), both, values=values, total_rows=9) for c in (None, 2)
    )
    assert_equal(parts, float(whole.value), whole.gradient, 1e-10)


@on_both
def test_capacities_that_cannot_be_met_are_refused(backend: Backend) -> None:
    asked = mixed(backend)
    found = refused(asked, capacity(capacity=nats({"z": 3.0, "c": 0.8})))
    assert "capacity gives ['c'] 0.8 nats, and their values hold 0.6931 over a uniform prior" in found
    asked.plan(capacity(capacity=nats({"z": 3.0, "c": 0.69})), {"*": score()})
    asked.plan(capacity(capacity=nats({"*": 30.0})), {"*": score()})
    for objective in (capacity(capacity=nats({"y": 1.0})), capacitron(capacity=nats({"y": 1.0}))):
        assert "capacity has an entry for 'y', under which no latent site of a row counts" in refused(asked, objective)


# Fits.


@pytest.mark.parametrize("name", ["infovae", "tcvae", "capacitron"])
def test_a_traced_step_draws_anew_from_the_prior_and_moves_the_multiplier(name: str) -> None:
    x = load("digits").train[:60]
    graph, eager = (
        fit(program("vae", latent=2, hidden=4), data=x, recipe=name, backend="pyro", steps=6, batch_size=20, compile=c)
        for c in ("graph", "eager")
    )
    np.testing.assert_allclose(graph.history["loss"], eager.history["loss"], rtol=1e-6)
    if name == "capacitron":
        assert multiplier(graph) == pytest.approx(multiplier(eager), rel=1e-6) and multiplier(graph) != 1.0


SLOW_ON_PYRO = pytest.mark.parametrize("backend", [pytest.param("pyro", marks=pytest.mark.slow), "numpyro"])


@SLOW_ON_PYRO
def test_a_fit_meets_its_capacity_and_lets_go_of_one_that_it_cannot_reach(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    gaussian, noise = Program("rows", rows_model, rows_guide, portable=True, arguments=("x",)), 0.5
    x = 1.3 * rng.normal(size=200)
    rate = {"schedule": "exponential", "start": 0.03, "end": 0.001, "steps": 1500}
    options: dict[str, Any] = {"steps": 1500, "batch_size": None, "backend": backend, "seed": 0}
    options["optimizer"] = {"name": "adam", "learning_rate": rate}
    run = fit(gaussian, data=x, recipe="capacitron", capacity={"z": 0.4}, draws=4, **options)
    gain, log_scale, w = (float(run.params[n]) for n in ("gain", "log_scale", "w"))
    kl = 0.5 * (math.exp(2 * log_scale) + gain**2 * (x**2).mean() - 1 - 2 * log_scale)
    assert kl == pytest.approx(0.4, rel=0.05)
    # The slope that belongs to it: w^2 = Var x (1 - exp(-2 C)).
    assert abs(w) == pytest.approx(math.sqrt((x**2).mean() * (1 - math.exp(-0.8))), rel=0.05)
    assert multiplier(run) == pytest.approx((x**2).mean() / noise**2 * math.exp(-0.8), rel=0.15)
    # A bit holds log 2 at most, so the multiplier falls from one towards zero (as 1 / steps: the slope of softplus).
    bit = Program("bits", bits_model, bits_guide, portable=True, arguments=("x",))
    options |= {"steps": 600, "optimizer": {"*": options["optimizer"], "objective.multiplier": {"learning_rate": 0.02}}}
    slack = fit(bit, data=x, recipe="capacitron", capacity={"z": 5.0}, estimator="enumerate", **options)
    assert multiplier(slack) < 0.05


def multiplier(run: Any) -> float:
    [raw] = [a for n, a in run.state.arrays.items() if "own" in n and "multiplier" in n]
    return float(np.log1p(np.exp(np.asarray(raw, dtype=np.float64)))[0])


@pytest.mark.slow
@on_both
def test_the_parts_of_a_joint_code_have_the_capacities_of_their_recipe(backend: Backend) -> None:
    """Digits; the KL of the continuous part within a twentieth, that of the categorical one of ten values too."""
    x = load("digits").train
    capacities = {"z": 8.0, "c": 1.8}
    options: dict[str, Any] = {"capacity": capacities, "gamma": 30.0, "steps": 2500}
    run = fit(program("joint_vae", hidden=64), data=x, recipe="joint_vae", backend=backend, seed=1, **options)
    found = run.posterior(200, data=x)
    both = (found.log_q - found.log_p + found.log_likelihood["x"]).mean()
    q = found.values["c"].mean(0)
    of_c = (q * np.log(np.maximum(q, 1e-12))).sum((1, 2)).mean() + math.log(10)
    assert of_c == pytest.approx(capacities["c"], rel=0.05)
    assert both - of_c == pytest.approx(capacities["z"], rel=0.05)
