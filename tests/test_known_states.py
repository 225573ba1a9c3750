"""Hidden Markov models of which some states are known, more or less: against the sum over all sequences of states."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, assert_equal
from toys import Array, Backend

from ppl_lvm import fit
from ppl_lvm.errors import DataError
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import program
from ppl_lvm.structured.markov_chain import EVIDENCE, MarkovChain, log_evidence

on_both = pytest.mark.parametrize("backend", BACKENDS)
RNG = np.random.default_rng(7)
T, V, F = 5, 3, 2
X = RNG.normal(size=(4, T, F))
KNOWN = RNG.uniform(size=(4, T, V))
KNOWN[0] = 1.0
KNOWN[1, 3] = [0.0, 1.0, 0.0]
KNOWN[2, 0] = [0.0, 0.4, 0.9]
PATHS = np.array(list(itertools.product(range(V), repeat=T)))


def log_joint(p: dict[str, Array], x: Array, known: Array, order: int) -> Array:
    """`log p(z, x_{order+1} .. x_T | x_1 .. x_order) + sum_t log known_t(z_t)` of all sequences, `[rows, paths]`."""
    start, move = (jax.nn.log_softmax(p[n], -1) for n in ("start", "move"))
    total = start[PATHS[:, 0]] + sum(move[PATHS[:, t], PATHS[:, t + 1]] for t in range(T - 1))
    for t in range(T):
        total = total + jnp.log(known)[:, t][:, PATHS[:, t]]
        if t >= order:
            lags = jnp.concatenate([x[:, t - lag] for lag in range(1, order + 1)], axis=-1)
            z = PATHS[:, t]
            mean = p["loc"][z] + jnp.einsum("sfl,bl->bsf", p["W"][z], lags)
            total = total + jax.scipy.stats.norm.logpdf(x[:, None, t], mean, jnp.exp(p["scale"])[z]).sum(-1)
    return total


def truth(initial: dict[str, Any], order: int) -> tuple[float, dict[str, np.ndarray]]:
    def loss(p: dict[str, Array]) -> Array:
        return -jax.nn.logsumexp(log_joint(p, X, KNOWN, order), axis=1).sum()

    with jax.enable_x64(True):
        start = {n: jnp.asarray(np.asarray(v)) for n, v in initial.items()}
        value, gradient = jax.jit(jax.value_and_grad(loss))(start)
    return float(value), {n: np.asarray(g) for n, g in gradient.items()}


def engine(backend: Backend, order: int) -> Engine:
    chosen = program("ar_hmm_partial", order=order)
    assert chosen.guide is not None
    found = Engine(backend, chosen.model, chosen.guide, {"x": X, "known": KNOWN}, portable=True)
    W = np.random.default_rng(1).normal(size=(V, F, order * F)) / 2
    with found._precision():
        found.bound.initial["W"] = found._array(W)
    return found


@on_both
@pytest.mark.parametrize("order", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_the_bound_is_the_evidence_with_its_gradient(backend: Backend, order: int) -> None:
    at = engine(backend, order)
    value, gradient = truth(at.bound.initial, order)
    assert_equal(at.loss(elbo(draws=2), {"z": rloo()}), value, gradient, 1e-10)


@on_both
def test_draws_have_the_one_weight_that_is_the_evidence(backend: Backend) -> None:
    at = engine(backend, 2)
    weights = at.log_w(elbo(draws=5), {"z": score()})[0]
    with jax.enable_x64(True):
        p = {n: jnp.asarray(np.asarray(v)) for n, v in at.bound.initial.items()}
        joint = jax.nn.logsumexp(log_joint(p, X, KNOWN, 2), axis=1)
    np.testing.assert_allclose(weights, np.broadcast_to(joint, (5, 4)), atol=1e-10)
    drawn = at.sites(elbo(draws=5), {"z": score()})["z"].value[0]
    assert (drawn[:, 1, 3] == 1).all() and (drawn[:, 2, 0] > 0).all()


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_slope_in_what_is_known_is_the_marginal(library: str) -> None:
    rng = np.random.default_rng(3)
    initial, transition = rng.normal(size=V), rng.normal(size=(T - 1, V, V))
    node, known = rng.normal(size=(T, V)), rng.uniform(0.1, 1.0, size=(T, V))
    joint = initial[PATHS[:, 0]] + sum(transition[t, PATHS[:, t], PATHS[:, t + 1]] for t in range(T - 1))
    joint = joint + sum((node + np.log(known))[t, PATHS[:, t]] for t in range(T))
    q = np.exp(joint - np.logaddexp.reduce(joint))
    gamma = np.array([[q[PATHS[:, t] == k].sum() for k in range(V)] for t in range(T)])

    def log_z(log_m: Array, a: Array, b: Array, c: Array) -> Array:
        return MarkovChain(a, b, c + log_m).log_normalizer()

    given = [np.log(known), initial, transition, node]
    if library == "torch":
        log_m, *rest = (torch.tensor(a, requires_grad=True) for a in given)
        log_z(log_m, *rest).backward()
        slope = np.asarray(log_m.grad)
    else:
        with jax.enable_x64(True):
            slope = np.asarray(jax.jit(jax.grad(log_z))(*(jnp.asarray(a) for a in given)))
    np.testing.assert_allclose(slope, gamma, atol=1e-10)


def test_evidence_of_states() -> None:
    z = np.array([[2, 1, 1, 0, 2], [1, 2, 0, 0, 0]])
    weights, states = torch.tensor(KNOWN[2], requires_grad=True), torch.tensor(z)
    found = log_evidence(weights, states)
    np.testing.assert_allclose(found[0].item(), np.log(KNOWN[2, range(T), z[0]]).sum(), atol=1e-12)
    found.sum().backward()
    assert weights.grad is not None and torch.isfinite(weights.grad).all()
    assert log_evidence(torch.zeros(T, V), states)[0] < -1e29


@on_both
def test_what_rules_out_everything_is_refused(backend: Backend) -> None:
    """With an error from `fit`, on the backend that is quicker to come to it."""
    bound = engine(backend, 2).bound
    assert bound.in_support("known", KNOWN)
    for wrong in (1.5, -0.5, np.nan, 0.0):
        known = KNOWN.copy()
        known[3, 2] = wrong
        assert not bound.in_support("known", known)
    assert bound.needs("known") == EVIDENCE
    if backend == "pyro":
        with pytest.raises(DataError, match=r"Values of 'known' are .* no step rules out all of its values"):
            fit(program("ar_hmm_partial"), data={"x": X, "known": known}, backend=backend, steps=1)


@on_both
def test_an_order_that_leaves_nothing_to_score_is_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match="order=5 was asked for on sequences of 5 steps; it is from 1 to 4"):
        engine(backend, 5)
