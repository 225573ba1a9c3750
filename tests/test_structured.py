"""Programs whose guide is a posterior found by message passing: the whole path from distribution to objective."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, assert_equal
from jax.scipy.stats import multivariate_normal
from toys import Array, Backend, Ppl

from ppl_lvm.algorithm import Objective
from ppl_lvm.errors import DataError, PplLvmError
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.fit import fit
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.program import Program, program
from ppl_lvm.structured.gaussian_chain import GaussianChain, observed
from ppl_lvm.structured.markov_chain import MarkovChain

on_both = pytest.mark.parametrize("backend", BACKENDS)
X = np.random.default_rng(1).normal(size=(3, 5, 3))
KNOWN = np.random.default_rng(2).uniform(size=X.shape) < 0.6


def evidence(p: dict[str, jax.Array], x: np.ndarray) -> jax.Array:
    """`log p(x)` of every row by the joint Gaussian of all its numbers; NaN are left out."""
    D, T = len(p["m"]), x.shape[1]
    mean, cov = [p["m"]], [[jnp.eye(D)]]
    for _ in range(1, T):
        mean.append(p["A"] @ mean[-1] + p["b"])
        across = [p["A"] @ c for c in cov[-1]]
        cov.append([*across, across[-1] @ p["A"].T + jnp.diag(p["q"])])
    full = jnp.block([[cov[max(s, t)][min(s, t)] if s >= t else cov[t][s].T for t in range(T)] for s in range(T)])
    wide = jnp.kron(jnp.eye(T), p["C"])
    loc = wide @ jnp.concatenate(mean) + jnp.tile(p["d"], T)
    spread = wide @ full @ wide.T + jnp.diag(jnp.tile(p["r"], T))
    rows = []
    for row in x.reshape(len(x), -1):
        seen = np.flatnonzero(~np.isnan(row))
        rows.append(multivariate_normal.logpdf(row[seen], loc[seen], spread[np.ix_(seen, seen)]))
    return jnp.stack(rows)


def shipped(backend: Backend) -> Engine:
    lds = program("lds")
    assert lds.guide is not None
    return Engine(backend, lds.model, lds.guide, {"x": X}, portable=True)


def unconstrained(initial: dict[str, Any]) -> dict[str, jax.Array]:
    return {n: jnp.asarray(np.asarray(v)) for n, v in initial.items()}


def truth(initial: dict[str, Any], x: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    def loss(u: dict[str, jax.Array]) -> jax.Array:
        return -evidence({n: jnp.exp(v) if n in ("q", "r") else v for n, v in u.items()}, x).sum()

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(unconstrained(initial))
    return float(value), {n: np.asarray(g) for n, g in gradient.items()}


@on_both
@pytest.mark.parametrize("objective", [elbo(draws=2), iwae(draws=3)], ids=["elbo", "iwae"])
def test_a_guide_that_is_the_posterior_gives_the_evidence_and_its_gradient(
    backend: Backend, objective: Objective
) -> None:
    engine = shipped(backend)
    value, gradient = truth({n: np.asarray(v) for n, v in engine.bound.initial.items()}, X)
    assert_equal(engine.loss(objective, {"z": pathwise()}), value, gradient, 1e-10)


@on_both
def test_missing_coordinates(backend: Backend) -> None:
    def model(ppl: Ppl, x: Array, known: Array) -> None:
        known, hidden = known > 0, x
        chain = ppl.structured.GaussianChain(**parts["prior"](ppl, x.shape[-2], 2))
        C, d, r = parts["emission"](ppl, x.shape[-1], 2)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", chain)
            normal = ppl.dist.Normal(z @ ppl.xp.matrix_transpose(C) + d, ppl.xp.sqrt(r)).mask(known)
            ppl.sample("x", normal.to_event(2), obs=hidden)

    def guide(ppl: Ppl, x: Array, known: Array) -> None:
        J, h, _ = ppl.structured.observed(x, *parts["emission"](ppl, x.shape[-1], 2), known=known > 0)
        with ppl.plate("data", len(x)):
            chain = parts["prior"](ppl, x.shape[-2], 2)
            ppl.sample("z", ppl.structured.GaussianChain(**chain, precision=J, shift=h))

    parts: dict[str, Any] = program("lds").model.func.__globals__  # type: ignore[attr-defined]
    data = {"x": np.where(KNOWN, X, 0.0), "known": KNOWN.astype(float)}
    engine = Engine(backend, model, guide, data, portable=True)
    value, gradient = truth(dict(engine.bound.initial), np.where(KNOWN, X, np.nan))
    assert_equal(engine.loss(elbo(), {"z": pathwise()}), value, gradient, 1e-10)


@on_both
def test_closed_form_kl_and_injected_draws(backend: Backend) -> None:
    engine = shipped(backend)
    objective = elbo(draws=2, kl="closed_form")
    table, own = engine.sites(objective, {"z": pathwise()}), engine.loss(objective, {"z": pathwise()})
    p = {n: torch.tensor(np.asarray(v)) for n, v in engine.bound.initial.items()}
    p |= {n: p[n].exp() for n in ("q", "r")}
    J, h, _ = observed(torch.tensor(X).movedim(1, 0), p["C"], p["d"], p["r"])
    F, b, Q = (torch.stack([x] * 4) for x in (p["A"], p["b"], p["q"].diag()))
    posterior = GaussianChain(p["m"], torch.eye(2, dtype=torch.float64), F, b, Q, J, h)
    np.testing.assert_allclose(table["z"].extra["kl"][0, 0], posterior.kl(posterior.prior), atol=1e-10)
    injected = engine.loss(objective, {"z": pathwise()}, values={"z": table["z"].value})
    assert_equal(injected, float(own.value), own.gradient, 1e-9)


@on_both
def test_a_hidden_markov_model_has_its_evidence_and_gradient(backend: Backend) -> None:
    """By the sum over all sequences of states. Each draw is the other's baseline, and log w is the same for both, so
    that the gradient of every draw is exact."""
    x, T, V = X[:, :3, :2], 3, 3
    hmm = program("hmm")
    assert hmm.guide is not None
    engine = Engine(backend, hmm.model, hmm.guide, {"x": x}, portable=True)
    paths = np.array(list(itertools.product(range(V), repeat=T)))

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        start, move = (jax.nn.log_softmax(p[n], -1) for n in ("start", "move"))
        log_p = start[paths[:, 0]] + sum(move[paths[:, t], paths[:, t + 1]] for t in range(T - 1))
        seen = jax.scipy.stats.norm.logpdf(x[:, None], p["loc"][paths], jnp.exp(p["scale"])[paths]).sum((-2, -1))
        return -jax.nn.logsumexp(log_p + seen, axis=1).sum()

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(unconstrained(engine.bound.initial))
    expected = {n: np.asarray(g) for n, g in gradient.items()}
    assert_equal(engine.loss(elbo(draws=2), {"z": rloo()}), float(value), expected, 1e-10)
    extra = engine.sites(elbo(kl="closed_form"), {"z": score()})["z"].extra["kl"]
    p = {n: torch.tensor(np.asarray(v)) for n, v in engine.bound.initial.items()}
    node = torch.distributions.Normal(p["loc"], p["scale"].exp()).log_prob(torch.tensor(x)[..., None, :]).sum(-1)
    move = torch.stack([p["move"].log_softmax(-1)] * 2)
    posterior = MarkovChain(p["start"].log_softmax(-1), move, node.movedim(1, 0))
    np.testing.assert_allclose(extra[0, 0], posterior.kl(posterior.prior), atol=1e-10)


@on_both
def test_bad_shapes_are_named(backend: Backend) -> None:
    def model(ppl: Ppl, x: Array) -> None:
        eye = ppl.ops.eye(2, x)
        potentials = {"precision": ppl.xp.stack([eye] * 3), "shift": eye}
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.structured.GaussianChain(x[0, 0, :2], eye, eye[None], eye[:1], eye[None], **potentials))

    with pytest.raises(DataError, match=r"precision has shape \(3, 2, 2\).*it is \(2, '...', 2, 2\), or"):
        Engine(backend, model, model, {"x": X}, portable=True)


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_a_fit_with_a_singular_noise_stops_and_says_so(backend: Backend) -> None:
    """Where it is traced no value is looked at; what comes of it is no error of a library's Cholesky factor but NaN."""

    def chain(ppl: Ppl, **potentials: Array) -> Any:
        q = ppl.param("q", lambda: np.array([0.5, 0.0]))
        eye, zero = ppl.ops.eye(2, q), 0.0 * q
        steps = (eye[None], ppl.xp.stack([zero] * 4), (q * eye)[None])
        return ppl.structured.GaussianChain(zero, eye, *steps, **potentials)

    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", chain(ppl))
            ppl.sample("x", ppl.dist.Normal(z, 1.0).to_event(2), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        eye = ppl.ops.eye(2, x)
        precision, shift, _ = ppl.structured.observed(x, eye, 0.0 * eye[0], 1.0 + 0.0 * eye[0])
        with ppl.plate("data", len(x)):
            ppl.sample("z", chain(ppl, precision=precision, shift=shift))

    singular = Program("singular", model, guide, portable=True, arguments=("x",))
    said = r"At step 0, the loss is nan.*'z' \(log_p\).*'z' \(log_q\).*is singular.*multiple of the identity"
    with pytest.raises(PplLvmError, match=said):
        fit(singular, data=X[..., :2].astype(np.float32), recipe="elbo", backend=backend, steps=3, batch_size=None)
