"""Hard and relaxed discrete draws beside everything else: scans, sums, chunks, inner draws, other estimators, refusals.
"""

from __future__ import annotations

import itertools
import re
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyro.distributions as pyro_dist
import pytest
import torch
from harness import BACKENDS, Engine, assert_equal
from toys import Array, Backend, Ppl

from ppl_lvm import legality, matrix
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends import _jax_dists, _torch_dists
from ppl_lvm.backends.structure import inner_name, noise_name
from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.gapped_st import gapped_st
from ppl_lvm.estimators.gumbel_rao import gumbel_rao
from ppl_lvm.estimators.gumbel_softmax import gumbel_softmax
from ppl_lvm.estimators.marginalize import marginalize
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.reinmax import reinmax
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.stl import stl
from ppl_lvm.estimators.straight_through import straight_through
from ppl_lvm.fit import fit
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.fivo import fivo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.rws import rws
from ppl_lvm.objectives.vis import vis
from ppl_lvm.objectives.wake_sleep import wake_sleep
from ppl_lvm.program import Program

on_both = pytest.mark.parametrize("backend", BACKENDS)
HARD: list[Estimator] = [
    straight_through(),
    gumbel_softmax(hard=True),
    gapped_st(),
    gumbel_rao(samples=2),
    reinmax(),
]
EVERY: list[Estimator] = [*HARD, gumbel_softmax()]


def named(e: object) -> str:
    return f"{type(e).__name__}{'-hard' if getattr(e, 'hard', False) else ''}"


def _quickest(backend: Backend) -> str:
    """How a fit of a few steps is soonest done; one operation at a time, JAX compiles each."""
    return "eager" if backend == "pyro" else "auto"


@pytest.fixture(autouse=True)
def _double() -> Any:
    with jax.enable_x64(True):
        yield


# Two sites: one-hots z, and bits y that look at nothing, under a term that is linear in z for every y.

Z, Y = np.array([0.3, -0.8, 0.5]), np.array(0.4)
P_Z, P_Y = np.array([0.1, 0.6, -0.2]), np.array(-0.3)
C = np.array([0.7, -1.1, 0.4])


def pair_model(ppl: Ppl, x: Array) -> None:
    z_logits, y_logit = ppl.param("p_z", P_Z), ppl.param("p_y", P_Y)
    c = ppl.param("c", C)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=z_logits))
        y = ppl.sample("y", ppl.dist.Bernoulli(logits=y_logit))
        ppl.factor("f", x * (1.0 - 3.0 * y) * (z @ c))


def pair_guide(ppl: Ppl, x: Array) -> None:
    z_logits, y_logit = ppl.param("q_z", Z), ppl.param("q_y", Y)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.OneHotCategorical(logits=z_logits))
        ppl.sample("y", ppl.dist.Bernoulli(logits=y_logit))


def of_pair() -> dict[str, np.ndarray]:
    """Gradients of the negative ELBO, summed over all values."""

    def loss(p: dict[str, Array]) -> Array:
        total = 0.0
        for v, b in itertools.product(range(3), (0.0, 1.0)):
            log_q = jax.nn.log_softmax(p["q_z"])[v] + jax.nn.log_sigmoid((2.0 * b - 1.0) * p["q_y"])
            log_p = jax.nn.log_softmax(p["p_z"])[v] + jax.nn.log_sigmoid((2.0 * b - 1.0) * p["p_y"])
            total = total - jnp.exp(log_q) * (log_p - log_q + 1.3 * (1.0 - 3.0 * b) * p["c"][v])
        return total

    start = {"q_z": Z, "q_y": Y, "p_z": P_Z, "p_y": P_Y, "c": C}
    return {n: np.asarray(g) for n, g in jax.grad(loss)({n: jnp.asarray(v) for n, v in start.items()}).items()}


@on_both
@pytest.mark.parametrize("other", [score(), enumerated(), straight_through()], ids=named)
def test_beside_other_estimators(backend: Backend, other: Estimator) -> None:
    """Exact in expectation where each site's terms are linear in it, whatever carries the other."""
    engine = Engine(backend, pair_model, pair_guide, {"x": np.array([1.3])}, portable=True)
    every = [*itertools.product(range(3), [None] if other.exhaustive else [0.0, 1.0])]
    values = {"z": np.eye(3)[[v for v, _ in every]][:, None, None, None]}
    weight = np.exp(Z)[[v for v, _ in every]] / np.exp(Z).sum()
    if not other.exhaustive:
        bits = np.array([b for _, b in every], dtype=float)
        values["y"] = bits[:, None, None, None]
        weight = weight / (1.0 + np.exp(-(2.0 * bits - 1.0) * Y))
    else:
        values["z"] = values["z"].repeat(2, axis=2)
    for estimator in (straight_through(), reinmax()):
        found = engine.loss(elbo(), {"z": estimator, "y": other}, values=values, runs=len(every))
        for name, wanted in of_pair().items():
            mean = np.tensordot(weight, found.gradient[name], 1)
            np.testing.assert_allclose(mean, wanted, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("backend", "estimator"),
    [
        *(pytest.param("pyro", e, id=f"pyro-{named(e)}") for e in EVERY),
        *(pytest.param("numpyro", e, id=f"numpyro-{named(e)}") for e in EVERY if isinstance(e, gumbel_rao)),
        *(
            pytest.param("numpyro", e, id=f"numpyro-{named(e)}", marks=pytest.mark.slow)
            for e in EVERY
            if not isinstance(e, gumbel_rao)
        ),
    ],
)
def test_in_chunks(backend: Backend, estimator: Estimator) -> None:
    """The value and the gradient of the whole, at the same draws and noise."""
    rng = np.random.default_rng(0)
    engine = Engine(backend, pair_model, pair_guide, {"x": np.array([1.3, -0.4])}, portable=True)
    hard = {n: np.eye(3)[rng.integers(3, size=(1, 4, 2))] for n in ("z",)}
    noise = {noise_name("z"): rng.uniform(size=(1, 4, 2, 3))}
    if isinstance(estimator, gumbel_rao):
        noise = {noise_name("z"): rng.uniform(size=(1, 4, 2, 2, 3))}
    given = noise if isinstance(estimator, gumbel_softmax) else hard | noise
    given["y"] = rng.integers(2, size=(1, 4, 2)).astype(float)
    whole, pieces = (
        engine.loss(iwae(draws=4, chunk=size), {"z": estimator, "y": score()}, values=given) for size in (None, 2)
    )
    assert_equal(pieces, float(whole.value), whole.gradient, 1e-12)
    assert np.abs(whole.gradient["q_z"]).max() > 1e-3


# A scan.

STEPS = np.array([[0.5, -1.2]])
S_P, S_Q = np.array([[0.2, -0.4], [0.5, 0.1]]), np.array([0.6, -0.3])


def walk_model(ppl: Ppl, x: Array) -> None:
    start = ppl.param("p", S_P)
    with ppl.plate("data", len(x)):

        def step(z: Array, x_t: Array) -> Any:
            z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=z @ start))
            ppl.factor("f", x_t * z[..., 0])
            return z, None

        zero = 0.0 * x[:, 0]
        ppl.scan(step, ppl.xp.stack([zero + 1.0, zero], -1), ppl.xp.moveaxis(x, 1, 0))


def walk_guide(ppl: Ppl, x: Array) -> None:
    q = ppl.param("q", S_Q)
    with ppl.plate("data", len(x)):

        def step(carry: Array, x_t: Array) -> Any:
            ppl.sample("z", ppl.dist.OneHotCategorical(logits=q + 0.5 * x_t[..., None]))
            return carry, None

        ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@on_both
def test_in_a_scan(backend: Backend) -> None:
    """Relaxed values and densities step by step, at given noise, and hard values with their exact expectation.

    In the model a step's logits are linear in the last one's value and so is log p but for its normaliser, in which
    straight-through is biased; the model's gradients are exact.
    """
    u = np.random.default_rng(1).uniform(size=(1, 1, 1, 2, 2))
    engine = Engine(backend, walk_model, walk_guide, {"x": STEPS}, portable=True)
    found = engine.loss(elbo(), {"z": gumbel_softmax(temperature=0.7)}, values={noise_name("z"): u})

    p, q = (torch.tensor(a, requires_grad=True) for a in (S_P, S_Q))
    t = torch.tensor(0.7, dtype=torch.float64)
    last, total = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i in range(2):
        logits = q + 0.5 * STEPS[0, i]
        y = torch.softmax((logits - torch.log(-torch.log(torch.tensor(u[0, 0, 0, i])))) / t, -1)
        prior = torch.distributions.RelaxedOneHotCategorical(t, logits=last @ p).log_prob(y)
        total = total + prior + STEPS[0, i] * y[0]
        total = total - torch.distributions.RelaxedOneHotCategorical(t, logits=logits).log_prob(y)
        last = y
    (-total).backward()
    assert p.grad is not None and q.grad is not None
    assert_equal(found, -total.item(), {"p": p.grad.numpy(), "q": q.grad.numpy()}, 1e-10)

    every = np.eye(2)[[[a, b] for a in range(2) for b in range(2)]]
    pi = softmax(S_Q + 0.5 * STEPS[0][:, None])
    weight = np.einsum("svc,vc->sv", every, pi).prod(-1)
    hard = engine.loss(elbo(), {"z": straight_through()}, values={"z": every[:, None, None, None]}, runs=4)
    # -log p is sum_t z_{t-1} p z_t - logsumexp(z_{t-1} p); its gradient in p, for every pair of values.
    wanted = np.zeros((2, 2))
    for s in range(4):
        for last_, now in ((np.array([1.0, 0.0]), every[s, 0]), (every[s, 0], every[s, 1])):
            wanted -= weight[s] * np.outer(last_, now - softmax(last_ @ S_P))
    np.testing.assert_allclose(np.tensordot(weight, hard.gradient["p"], 1), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "estimator"),
    [
        ("pyro", straight_through()),
        ("pyro", gumbel_softmax(temperature=0.8)),
        ("numpyro", gumbel_softmax(temperature=0.8)),
        pytest.param("numpyro", straight_through(), marks=pytest.mark.slow),
    ],
)
def test_draws_that_meet(backend: Backend, estimator: Estimator) -> None:
    """A filter that never resamples is the importance-weighted bound, gradient included."""
    rng = np.random.default_rng(2)
    data = np.concatenate([STEPS, -STEPS])
    given = {"z": np.eye(2)[rng.integers(2, size=(1, 3, 2, 2))]}
    if estimator.relaxed():
        given = {noise_name("z"): rng.uniform(size=(1, 3, 2, 2, 2))}
    engine = Engine(backend, walk_model, walk_guide, {"x": data}, portable=True)
    apart, together = (
        engine.loss(o, {"z": estimator}, values=given) for o in (iwae(draws=3), fivo(draws=3, threshold=0.0))
    )
    assert_equal(together, float(apart.value), apart.gradient, 1e-12)
    assert np.abs(apart.gradient["q"]).max() > 1e-3


# Sums: over a site that the model alone has, and over inner draws of one that the guide alone has.


@on_both
def test_a_sum_over_a_site_that_looks_at_relaxed_values(backend: Backend) -> None:
    """`log sum_y p(y) p(z | y) N(x; z c + y, 1)` with the relaxed density of z for every y."""
    W = np.array([[0.4, -0.2, 0.6], [-0.5, 0.3, 0.1]])

    def model(ppl: Ppl, x: Array) -> None:
        w, c = ppl.param("w", W), ppl.param("c", C)
        with ppl.plate("data", len(x)):
            y = ppl.sample("y", ppl.dist.OneHotCategorical(logits=w[:, 0]))
            z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=y @ w))
            ppl.sample("x", ppl.dist.Normal(z @ c + y[..., 1], 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        q = ppl.param("q", Z)
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.OneHotCategorical(logits=q))

    u, x = np.random.default_rng(4).uniform(size=3), 0.7
    engine = Engine(backend, model, guide, {"x": np.array([x])}, portable=True)
    chosen = {"y": marginalize(), "z": gumbel_softmax(temperature=0.6, prior_temperature=0.8)}
    found = engine.loss(elbo(), chosen, values={noise_name("z"): u[None, None, None]})

    w, c, q = (torch.tensor(a, requires_grad=True) for a in (W, C, Z))
    tau, prior = (torch.tensor(t, dtype=torch.float64) for t in (0.6, 0.8))
    z = torch.softmax((q - torch.log(-torch.log(torch.tensor(u)))) / tau, -1)
    terms = [
        torch.log_softmax(w[:, 0], -1)[v]
        + torch.distributions.RelaxedOneHotCategorical(prior, logits=w[v]).log_prob(z)
        + torch.distributions.Normal(z @ c + v, 1.0).log_prob(torch.tensor(x, dtype=torch.float64))
        for v in range(2)
    ]
    log_q = torch.distributions.RelaxedOneHotCategorical(tau, logits=q).log_prob(z)
    loss = log_q - torch.logsumexp(torch.stack(terms), 0)
    loss.backward()
    wanted = {n: a.grad.numpy() for n, a in (("w", w), ("c", c), ("q", q)) if a.grad is not None}
    assert_equal(found, loss.item(), wanted, 1e-10)


@on_both
def test_inner_draws_of_a_hard_site(backend: Backend) -> None:
    """`log q(z) ~ log mean_j N(z; u_j m, 1)`: every inner draw carries the straight-through gradient."""
    M = np.array([0.5, -0.7, 1.1])

    def model(ppl: Ppl, x: Array) -> None:
        scale = ppl.param("scale", np.array(0.2))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0, ppl.xp.exp(scale)))
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        q, m = ppl.param("q", Z), ppl.param("m", M)
        with ppl.plate("data", len(x)):
            u = ppl.sample("u", ppl.dist.OneHotCategorical(logits=q), infer={"is_auxiliary": True})
            ppl.sample("z", ppl.dist.Normal(u @ m, 1.0))

    first, second, at, x = np.eye(3)[1], np.eye(3)[2], 0.3, 0.9
    engine = Engine(backend, model, guide, {"x": np.array([x])}, portable=True)
    given = {"u": first, inner_name("u", 1): second, "z": np.array(at)}
    laid = {n: v[None, None, None] for n, v in given.items()}
    found = engine.loss(elbo(marginal=(("u", 2),)), {"u": straight_through(), "z": pathwise()}, values=laid)

    q, m, scale = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (Z, M, 0.2))
    mean = torch.softmax(q, -1)
    u0, u1 = (torch.tensor(d) + mean - mean.detach() for d in (first, second))
    z = u0 @ m + (at - u0 @ m).detach()
    Normal = torch.distributions.Normal
    log_q = torch.logsumexp(torch.stack([Normal(u @ m, 1.0).log_prob(z) for u in (u0, u1)]), 0) - np.log(2.0)
    log_p = Normal(0.0, torch.exp(scale)).log_prob(z) + Normal(z, 1.0).log_prob(torch.tensor(x, dtype=torch.float64))
    loss = log_q - log_p
    loss.backward()
    wanted = {n: a.grad.numpy() for n, a in (("q", q), ("m", m), ("scale", scale)) if a.grad is not None}
    assert_equal(found, loss.item(), wanted, 1e-10)


def test_masks_leave_out_relaxed_densities() -> None:
    """Of rows, and of elements of an event, on both backends alike."""
    rng = np.random.default_rng(5)
    logits, y = rng.normal(size=(4, 2, 3)), softmax(rng.normal(size=(4, 2, 3)))
    rows, elements = np.array([True, False, True, True]), rng.uniform(size=(4, 2)) < 0.6
    density = gumbel_softmax(temperature=0.5).log_density
    log_probs = torch.log_softmax(torch.tensor(logits), -1)
    each = density(log_probs, torch.tensor(y), "guide").numpy()
    wanted = np.where(rows, (each * elements).sum(-1), 0.0)
    on_each: Any = (
        (pyro_dist.OneHotCategorical, _torch_dists.log_prob, torch.tensor),
        (_jax_dists.OneHotCategorical, _jax_dists._log_prob_of_classes, jnp.asarray),
    )
    for dist, log_prob, array in on_each:
        fn = dist(logits=array(logits)).mask(array(elements)).to_event(1).mask(array(rows))
        found = log_prob(fn, array(y), lambda p, w: density(p, w, "guide"))
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=1e-12)
        nothing = log_prob(fn.mask(False), array(y), lambda p, w: density(p, w, "guide"))
        np.testing.assert_array_equal(np.asarray(nothing), 0.0)


def test_masked_one_hots_have_a_gradient_on_pyro() -> None:
    value = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    fn = pyro_dist.OneHotCategorical(logits=torch.zeros(1, 3, dtype=torch.float64)).mask(torch.tensor([True]))
    _torch_dists.log_prob(fn, value).sum().backward()
    assert value.grad is not None
    np.testing.assert_allclose(value.grad.numpy(), -np.log(3.0), atol=1e-14)


@on_both
def test_programs_may_be_relaxed_themselves(backend: Backend) -> None:
    """`RelaxedOneHotCategorical` has pathwise draws inside the simplex, and torch's density, on both."""

    def model(ppl: Ppl, x: Array) -> None:
        p, tau = ppl.param("p", Z), ppl.xp.asarray(0.6)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.RelaxedOneHotCategorical(tau, logits=p))
            ppl.sample("x", ppl.dist.Normal(z @ p, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        q, tau = ppl.param("q", P_Z), ppl.xp.asarray(0.8)
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.RelaxedOneHotCategorical(tau, logits=q))

    engine = Engine(backend, model, guide, {"x": np.array([0.3, 1.1])}, portable=True)
    z = engine.sites(elbo(draws=500), {"z": pathwise()})["z"]
    value = torch.tensor(z.value)
    assert (value > 0).all() and torch.allclose(value.sum(-1), torch.ones((), dtype=torch.float64))
    for tau, logits, found in ((0.6, Z, z.log_p), (0.8, P_Z, z.log_q)):
        temperature = torch.tensor(tau, dtype=torch.float64)
        wanted = torch.distributions.RelaxedOneHotCategorical(temperature, logits=torch.tensor(logits)).log_prob(value)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-9)
    # The largest weight is a draw of the classes: 1,000 of them, four standard errors.
    largest = np.bincount(z.value.argmax(-1).ravel(), minlength=3) / 1000.0
    assert (np.abs(largest - softmax(P_Z)) < 4.0 * np.sqrt(softmax(P_Z) / 1000.0)).all()
    assert np.abs(engine.loss(elbo(), {"z": pathwise()}).gradient["q"]).max() > 1e-3


# Recipes.


@on_both
def test_temperatures_are_schedules(backend: Backend) -> None:
    """The first step has the loss of the first temperature, the next of the second; by site and for all."""
    moving = {"schedule": "linear", "start": 1.0, "end": 0.4, "steps": 1}
    program = Program("pair", pair_model, pair_guide, portable=True, arguments=("x",))

    def losses(temperature: Any) -> np.ndarray:
        estimator = {"z": {"name": "gumbel_softmax", "temperature": temperature}, "y": "reinmax"}
        options: Any = {"steps": 2, "learning_rate": 1e-14, "estimator": estimator, "batch_size": None}
        options |= {"backend": backend, "compile": _quickest(backend), "dtype": "float64"}
        found = fit(program, None, np.array([1.3]), "elbo", **options)
        return found.history["loss"]

    first, second, moved = losses(1.0), losses(0.4), losses(moving)
    np.testing.assert_allclose(moved, [first[0], second[1]], rtol=0, atol=1e-10)
    assert np.abs(first - second).min() > 1e-3


@on_both
def test_native_programs(backend: Backend) -> None:
    """Zeros and ones that NumPyro draws as integers carry gradients all the same."""
    ppl, dist = import_module(backend), import_module(f"{backend}.distributions")
    xp = torch if backend == "pyro" else jnp

    def native_model(x: Array) -> None:
        with ppl.plate("data", len(x)):
            y = ppl.sample("y", dist.Bernoulli(logits=xp.asarray(P_Y, dtype=x.dtype)))
            ppl.sample("x", dist.Normal(2.0 * y, 1.0), obs=x)

    def native_guide(x: Array) -> None:
        logit = ppl.param("q", xp.asarray(Y, dtype=x.dtype))
        with ppl.plate("data", len(x)):
            ppl.sample("y", dist.Bernoulli(logits=logit))

    engine = Engine(backend, native_model, native_guide, {"x": np.array([1.3])}, portable=False)
    values = {"y": np.array([[[0]], [[1]]])[:, None]}
    if backend == "pyro":
        values = {"y": values["y"].astype(float)}
    found = engine.loss(elbo(), {"y": straight_through()}, values=values, runs=2)
    pi = 1.0 / (1.0 + np.exp(-Y))
    # d/dy of log p(y) + log N(x; 2 y, 1) - log q(y), at y = 0 and 1; the direct gradient of log q has mean zero.
    slope = P_Y - Y + 2.0 * (1.3 - 2.0 * np.array([0.0, 1.0]))
    wanted = -pi * (1.0 - pi) * ((1.0 - pi) * slope[0] + pi * slope[1])
    np.testing.assert_allclose((1.0 - pi) * found.gradient["q"][0] + pi * found.gradient["q"][1], wanted, atol=1e-12)


@pytest.mark.parametrize("estimator", [gumbel_rao(samples=3), gumbel_softmax(), reinmax()], ids=named)
def test_traced_steps_are_eager_ones_on_pyro(estimator: Estimator) -> None:
    """Noise is drawn anew in every step of a traced one."""
    program = Program("pair", pair_model, pair_guide, portable=True, arguments=("x",))
    options: Any = {"backend": "pyro", "dtype": "float64", "batch_size": None, "steps": 4}
    options |= {"estimator": {"z": estimator, "y": "score"}}
    eager, traced = (
        fit(program, None, np.array([1.3, 0.2]), "elbo", compile=mode, **options).history["loss"]
        for mode in ("eager", "graph")
    )
    np.testing.assert_allclose(traced, eager, rtol=0, atol=1e-12)
    assert len(np.unique(traced)) == 4


@on_both
def test_a_program_without_data(backend: Backend) -> None:
    """A term and no rows: what is relaxed and what is hard, in a fit that goes by a factor alone."""

    def model(ppl: Ppl) -> None:
        z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=ppl.xp.zeros((3,))))
        ppl.factor("f", 2.0 * z[..., 0])

    def guide(ppl: Ppl) -> None:
        ppl.sample("z", ppl.dist.OneHotCategorical(logits=ppl.param("q", Z)))

    program = Program("term", model, guide, portable=True, arguments=())
    options: Any = {"backend": backend, "batch_size": None, "dtype": "float64", "draws": 5}
    options |= {"compile": _quickest(backend)}
    start = {"q": np.array([2.0, 0.0, 0.0])}
    run = fit(program, None, None, "elbo", estimator="gumbel_softmax", start=start, steps=2, **options)
    # At the posterior a hard draw has the weight E exp(2 z_0) / 3, whatever it is.
    hard = fit(program, None, None, "elbo", estimator="reinmax", start=start, steps=1, **options)
    wanted = -np.log((np.exp(2.0) + 2.0) / 3.0)
    assert hard.history["loss"][0] == pytest.approx(wanted, abs=1e-12)
    assert run.history["hard_step"].tolist() == [2]
    assert abs(run.history["hard_loss"][0] - wanted) < 0.02 < abs(run.history["loss"][1] - wanted)


# What is refused.


def refused(structure: Any, objective: Objective, estimators: dict[str, Estimator], why: str) -> None:
    with pytest.raises(LegalityError, match=why):
        legality.plan(objective, estimators, structure)


@on_both
def test_what_is_refused(backend: Backend) -> None:
    def model(ppl: Ppl, x: Array) -> None:
        p = ppl.param("p", Z)
        with ppl.plate("data", len(x)):
            i = ppl.sample("i", ppl.dist.Categorical(logits=p))
            y = ppl.sample("y", ppl.dist.Bernoulli(logits=p[0] + 0.0 * x))
            z = ppl.sample("z", ppl.dist.Normal(p[1] + 0.0 * x, 1.0))
            b = ppl.sample("b", ppl.dist.Binomial(total_count=1, logits=p[1] + 0.0 * x))
            ppl.sample("x", ppl.dist.Normal(i + y + z + b, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        q = ppl.param("q", Z)
        with ppl.plate("data", len(x)):
            ppl.sample("i", ppl.dist.Categorical(logits=q))
            ppl.sample("y", ppl.dist.Bernoulli(logits=q[0] + 0.0 * x))
            ppl.sample("z", ppl.dist.Normal(q[1] + 0.0 * x, 1.0))
            ppl.sample("b", ppl.dist.Bernoulli(logits=q[2] + 0.0 * x))

    found = Engine(backend, model, guide, {"x": np.array([0.3, 0.4])}, portable=True).structure
    rest: dict[str, Estimator] = {"*": score(), "z": pathwise()}
    for e in EVERY:
        refused(found, elbo(), rest | {"i": e}, r"'i' under .*its value is an index.*make it a OneHotCategorical")
        refused(found, elbo(), rest | {"z": e}, "'z' under .*is for one-hots and Bernoullis.*use 'pathwise'")
        refused(found, rws(draws=2), rest | {"y": e}, "inside `(log_mean_exp|wake|sleep)` .*use ")
        legality.plan(elbo(), rest | {"y": e}, found)
        legality.plan(iwae(draws=2), rest | {"y": e}, found)
        if e.relaxed():
            legality.plan(vis(draws=2), rest | {"y": e}, found)
            refused(found, elbo(), rest | {"b": e}, "the model's distribution of the site is of another kind")
        else:
            refused(found, vis(draws=2), rest | {"y": e}, "inside `log_mean_exp` a power of the weights.*use ")
            legality.plan(elbo(), rest | {"b": e}, found)
        beside = rest | {"y": e, "z": dreg()}
        refused(found, iwae(draws=2), beside, f"'z' under .*'y' of the same row is '{type(e).__name__}', whose grad")
        legality.plan(elbo(), rest | {"y": e, "z": stl()}, found)
    for name, chosen in legality.plan(elbo(), {}, found)[0].estimators.items():
        assert not chosen.why_biased(), name


def test_a_site_of_all_rows_whose_draws_are_fixed() -> None:
    for e in EVERY:
        found = matrix.cell("wake_sleep", wake_sleep(outer=2), e, "finite global")
        assert found.verdict == "refused" and "the objective takes draws as they are" in found.why


@on_both
def test_relaxed_values_beside_known_ones_are_refused(backend: Backend) -> None:
    """Labels that some rows have are hard; a straight-through site may have them."""

    def model(ppl: Ppl, x: Array, y: Array | None = None) -> None:
        p = ppl.param("p", np.array(0.3))
        with ppl.plate("data", len(x)):
            label = ppl.sample("y", ppl.dist.Bernoulli(logits=p + 0.0 * x))
            ppl.sample("x", ppl.dist.Normal(label, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array, y: Array | None = None) -> None:
        q = ppl.param("q", np.array(0.1))
        with ppl.plate("data", len(x)):
            ppl.sample("y", ppl.dist.Bernoulli(logits=q + x))

    program = Program("labels", model, guide, portable=True, arguments=("x", "y"))
    data = {"x": np.array([0.3, 1.2, -0.4]), "y": np.array([1.0, np.nan, 0.0])}
    options: dict[str, Any] = {"backend": backend, "missing": "mask", "steps": 2, "compile": _quickest(backend)}
    with pytest.raises(LegalityError, match="its values are relaxed, and the data that take the places of some"):
        fit(program, None, data, "elbo", estimator="gumbel_softmax", **options)
    assert np.isfinite(fit(program, None, data, "elbo", estimator="straight_through", **options).history["loss"]).all()


def test_a_straight_through_distribution_is_not_taken_for_a_reparameterised_one() -> None:
    """Pyro's own says that it is, so that "auto" would choose a biased gradient without a word."""

    def model(ppl: Ppl, x: Array) -> None:
        p = ppl.param("p", Z)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.OneHotCategoricalStraightThrough(logits=p))
            ppl.sample("x", ppl.dist.Normal(z @ p, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        q = ppl.param("q", Z)
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.OneHotCategoricalStraightThrough(logits=q))

    found = Engine("pyro", model, guide, {"x": np.array([0.3])}, portable=True).structure
    assert not found.sites["z"].reparameterised and found.sites["z"].one_hot
    assert re.match("z: (vimco|rloo|score)", legality.plan(elbo(), {}, found)[1][0])
