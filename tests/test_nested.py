"""Auxiliary sites summed out of the guide's density (`marginal`): exact over every outcome, inner draws included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import BACKENDS, Engine, Loss, assert_equal
from jax.scipy.special import logsumexp
from oracle import log_mean_exp_by_tuples
from scipy.stats import norm
from toys import Array, Backend, Ppl

from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.structure import inner_name
from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.stl import stl
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.rws import rws
from ppl_lvm.objectives.vis import vis

on_both = pytest.mark.parametrize("backend", BACKENDS)
AUXILIARY = {"is_auxiliary": True}
X = np.array([0.7, -0.4])
P: dict[str, np.ndarray] = {
    "z_logits": np.array([0.3, -0.5, 0.2]),
    "x_loc": np.array([-0.9, 0.4, 1.5]),
    "q_u_logits": np.array([0.4, -0.3]),
    "q_u_gain": np.array([0.2, -0.6]),
    "q_z_logits": np.array([[1.2, -0.8, 0.3], [-0.7, 0.9, 1.1]]),
    "q_z_gain": np.array([0.4, -0.3, 0.1]),
}


def slow(*cell: object) -> Any:
    return pytest.param(*cell, marks=pytest.mark.slow)


def inner_draws(objective: Objective) -> int:
    assert objective.marginal is not None
    return objective.marginal[0][1]


def named(cell: object) -> str | None:
    if isinstance(cell, Objective):
        return f"{type(cell).__name__}{cell.draws}-{inner_draws(cell)}"
    return type(cell).__name__ if isinstance(cell, Estimator) else None


# A class z under a mixture of two classes u, of which the weight has parameters and looks at the data.


def model(ppl: Ppl, x: Array) -> None:
    z_logits, x_loc = ppl.param("z_logits", P["z_logits"]), ppl.param("x_loc", P["x_loc"])
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=z_logits))
        ppl.sample("x", ppl.dist.Normal(z @ x_loc, 1.0), obs=x)


def guide(ppl: Ppl, x: Array) -> None:
    u_logits, u_gain = ppl.param("q_u_logits", P["q_u_logits"]), ppl.param("q_u_gain", P["q_u_gain"])
    z_logits, z_gain = ppl.param("q_z_logits", P["q_z_logits"]), ppl.param("q_z_gain", P["q_z_gain"])
    with ppl.plate("data", len(x)):
        u = ppl.sample("u", ppl.dist.OneHotCategorical(logits=u_logits + x[..., None] * u_gain), infer=AUXILIARY)
        ppl.sample("z", ppl.dist.OneHotCategorical(logits=u @ z_logits + x[..., None] * z_gain))


def outcomes(J: int) -> np.ndarray:
    """`[S, J + 1]`: every (z, u_0, .., u_{J-1})."""
    return np.indices((3, *(2,) * J)).reshape(J + 1, -1).T


def masses_and_weights(p: Mapping[str, Array], x: Array, J: int) -> tuple[Array, Array]:
    """Log probability and log weight `[B, S]` of every outcome."""
    log_u = jax.nn.log_softmax(p["q_u_logits"] + x[:, None] * p["q_u_gain"])
    log_z = jax.nn.log_softmax(p["q_z_logits"] + (x[:, None] * p["q_z_gain"])[:, None], axis=-1)
    log_lik = -0.5 * (x[:, None] - p["x_loc"]) ** 2 - 0.5 * np.log(2 * np.pi)
    log_p = jax.nn.log_softmax(p["z_logits"]) + log_lik
    z, us = outcomes(J)[:, 0], outcomes(J)[:, 1:]
    mass = log_u[:, us].sum(-1) + log_z[:, us[:, 0], z]
    inner = log_z[:, us, z[:, None]]
    return mass, log_p[:, z] - (logsumexp(inner, axis=-1) - np.log(J))


def exact(objective: Objective, x: np.ndarray) -> Loss:
    """The objective's value and gradient, from all outcomes of its K draws."""
    K, J = objective.draws, inner_draws(objective)

    def self_normalised(mass: Array, log_w: Array, power: float) -> Array:
        frozen = jax.lax.stop_gradient(mass)
        return log_mean_exp_by_tuples(frozen, power * log_w + mass - frozen, K).sum()

    def losses(p: Mapping[str, Array]) -> tuple[Array, Array]:
        mass, log_w = masses_and_weights(p, jnp.asarray(x), J)
        if isinstance(objective, elbo):
            value = -(jnp.exp(mass) * log_w).sum()
            return value, value
        if isinstance(objective, iwae):
            value = -log_mean_exp_by_tuples(mass, log_w, K).sum()
            return value, value
        return -self_normalised(mass, log_w, 1.0), self_normalised(mass, log_w, 2.0)

    with jax.enable_x64(True):
        params = {n: jnp.asarray(v) for n, v in P.items()}
        of_model, of_guide = (jax.grad(lambda p, i=i: losses(p)[i])(params) for i in (0, 1))
        gradient = {n: np.asarray((of_guide if n.startswith("q_") else of_model)[n]) for n in P}
        return Loss(np.asarray(losses(params)[0]), gradient)


def over_outcomes(backend: Backend, objective: Objective, estimators: Mapping[str, Estimator], x: np.ndarray) -> Loss:
    """The expectation of one run: every outcome of its draws, inner ones included, along the outer axis."""
    K, J, B = objective.draws, inner_draws(objective), len(x)
    one = outcomes(J)
    index = np.indices((len(one),) * (K * B)).reshape(K * B, -1).T.reshape(-1, K, B)
    with jax.enable_x64(True):
        params = {n: jnp.asarray(v) for n, v in P.items()}
        mass = np.asarray(masses_and_weights(params, jnp.asarray(x), J)[0])
    weight = np.exp(mass[np.arange(B), index].sum((1, 2)))
    values = {"z": np.eye(3)[one[index][..., 0]], "u": np.eye(2)[one[index][..., 1]]}
    values |= {inner_name("u", j): np.eye(2)[one[index][..., 1 + j]] for j in range(1, J)}
    engine = Engine(backend, model, guide, {"x": x}, portable=True)
    options = objective.model_copy(update={"outer": len(weight)})
    return engine.loss(options, estimators, values=values, weight=weight)


@on_both
@pytest.mark.parametrize(
    ("objective", "estimator"),
    [
        (elbo(marginal=(("u", 1),)), score()),
        (elbo(marginal=(("u", 2),)), score()),
        slow(elbo(marginal=(("u", 3),)), score()),
        slow(elbo(draws=2, marginal=(("u", 2),)), rloo()),
        (iwae(draws=2, marginal=(("u", 2),)), vimco()),
        slow(iwae(draws=2, marginal=(("u", 2),)), score()),
        (vis(draws=2, marginal=(("*", 2),)), score()),
    ],
    ids=named,
)
def test_expected_gradients_are_exact(backend: Backend, objective: Objective, estimator: Estimator) -> None:
    x = X if objective.draws == 1 and inner_draws(objective) < 3 else X[:1]
    truth = exact(objective, x)
    assert_equal(over_outcomes(backend, objective, {"*": estimator}, x), float(truth.value), truth.gradient, 1e-12)


@on_both
@pytest.mark.parametrize(
    "objective", [elbo(marginal=(("u", 2),)), slow(iwae(draws=2, marginal=(("u", 2),)))], ids=named
)
def test_an_enumerated_class_under_a_site_that_is_summed_out(backend: Backend, objective: Objective) -> None:
    """z takes all its values in every draw; its own values in the outcomes are left out."""
    x, truth = X[:1], exact(objective, X[:1])
    K, J = objective.draws, inner_draws(objective)
    us = np.indices((2,) * (K * J)).reshape(K, J, -1).transpose(2, 0, 1)  # [outcomes, K, J]
    log_u = np.log(np.exp(P["q_u_logits"] + x * P["q_u_gain"]) / np.exp(P["q_u_logits"] + x * P["q_u_gain"]).sum())
    weight = np.exp(log_u[us].sum((1, 2)))
    # The table has an entry for every value of z, fastest.
    values = {"u": np.eye(2)[us[..., 0]], inner_name("u", 1): np.eye(2)[us[..., 1]]}
    values = {n: np.repeat(v, 3, axis=1)[:, :, None] for n, v in values.items()}
    engine = Engine(backend, model, guide, {"x": x}, portable=True)
    options = objective.model_copy(update={"outer": len(weight)})
    found = engine.loss(options, {"z": enumerated(), "u": score()}, values=values, weight=weight)
    assert_equal(found, float(truth.value), truth.gradient, 1e-12)


# Gaussians: u1 -> z1 -> u2 -> (w ->) z2. What looks at u2 or w is summed out over both; u1 by itself.

G = {"a": 0.7, "b": -0.4, "c": 0.5, "d": 0.8, "e": -0.6, "s": -0.3}


def chain_model(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.Normal(0.0 * x, 1.0))
        z2 = ppl.sample("z2", ppl.dist.Normal(0.5 * z1, 1.0))
        ppl.sample("x", ppl.dist.Normal(z1 + z2, 1.0), obs=x)


def chain_guide(ppl: Ppl, x: Array) -> None:
    a, b, c, d, e, s = (ppl.param(n, v) for n, v in G.items())
    dist, scale = ppl.dist, ppl.xp.exp(s)
    with ppl.plate("data", len(x)):
        u1 = ppl.sample("u1", dist.Normal(a * x, scale), infer=AUXILIARY)
        z1 = ppl.sample("z1", dist.Normal(b * u1, 1.0))
        u2 = ppl.sample("u2", dist.Normal(c * z1, 1.0), infer=AUXILIARY)
        w = ppl.sample("w", dist.Normal(d * u2, scale), infer=AUXILIARY)
        ppl.sample("z2", dist.Normal(e * w + u2, 1.0))


def normal(x: Array, loc: Array, scale: Array | float) -> Array:
    return -0.5 * ((x - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * np.log(2 * np.pi)


def chain_log_w(p: Mapping[str, Array], x: Array, noise: Mapping[str, Array]) -> Array:
    """`log p(x, z) - log q^(z)` per row of draws that are functions of their noise."""
    scale = jnp.exp(p["s"])
    u1 = {j: p["a"] * x + scale * noise[inner_name("u1", j)] for j in range(3)}
    z1 = p["b"] * u1[0] + noise["z1"]
    u2 = {j: p["c"] * z1 + noise[inner_name("u2", j)] for j in range(2)}
    w = {j: p["d"] * u2[j] + scale * noise[inner_name("w", j)] for j in range(2)}
    z2 = p["e"] * w[0] + u2[0] + noise["z2"]
    log_p = normal(z1, 0.0, 1.0) + normal(z2, 0.5 * z1, 1.0) + normal(x, z1 + z2, 1.0)
    first = logsumexp(jnp.stack([normal(z1, p["b"] * u, 1.0) for u in u1.values()]), axis=0) - np.log(3)
    both = jnp.stack([normal(z2, p["e"] * w[j] + u2[j], 1.0) for j in range(2)])
    return log_p - first - (logsumexp(both, axis=0) - np.log(2))


def chain_values(noise: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    g, scale = G, np.exp(G["s"])
    u1 = {j: g["a"] * X + scale * noise[inner_name("u1", j)] for j in range(3)}
    z1 = g["b"] * u1[0] + noise["z1"]
    u2 = {j: g["c"] * z1 + noise[inner_name("u2", j)] for j in range(2)}
    w = {j: g["d"] * u2[j] + scale * noise[inner_name("w", j)] for j in range(2)}
    drawn = {"z1": z1, "z2": g["e"] * w[0] + u2[0] + noise["z2"]}
    for name, found in (("u1", u1), ("u2", u2), ("w", w)):
        drawn |= {inner_name(name, j) if j else name: v for j, v in found.items()}
    return {n: v[None] for n, v in drawn.items()}


@on_both
@pytest.mark.parametrize("chunk", [None, slow(1)])
def test_pathwise_draws_are_differentiated_through_inner_ones_too(backend: Backend, chunk: int | None) -> None:
    rng, K = np.random.default_rng(0), 2
    names = [inner_name("u1", j) for j in range(3)] + [inner_name(n, j) for n in ("u2", "w") for j in range(2)]
    noise = {n: rng.normal(size=(K, len(X))) for n in (*names, "z1", "z2")}

    def loss(p: Mapping[str, Array]) -> Array:
        log_w = chain_log_w(p, jnp.asarray(X), noise)
        return -(logsumexp(log_w, axis=0) - np.log(K)).sum()

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)({n: jnp.asarray(v) for n, v in G.items()})
    engine = Engine(backend, chain_model, chain_guide, {"x": X}, portable=True)
    objective = iwae(draws=K, chunk=chunk, marginal=(("u1", 3), ("u2", 2), ("w", 2)))
    found = engine.loss(objective, {"*": pathwise()}, values=chain_values(noise))
    assert_equal(found, float(value), {n: np.asarray(g) for n, g in gradient.items()}, 1e-12)


@on_both
def test_what_credits_look_at(backend: Backend) -> None:
    engine = Engine(backend, chain_model, chain_guide, {"x": X}, portable=True)
    chosen = engine.plan(elbo(marginal=(("u1", 3), ("[uw]*", 2))), {"*": pathwise()})
    assert [(m.sites, m.looking, m.draws) for m in chosen.nested] == [
        (("u1",), ("z1",), 3),
        (("u2", "w"), ("z2",), 2),
    ]
    seen = chosen.seen(engine.structure)
    assert seen.downstream("z2") == {"z2", "x", "u2"}
    assert seen.downstream("u1") == {"u1", "z1", "u2", "w", "z2", "x"}
    assert engine.structure.downstream("z2") == {"z2", "x"}


@on_both
def test_a_site_inside_a_scan_is_summed_out_over_all_its_steps(backend: Backend) -> None:
    x = np.random.default_rng(1).normal(size=(2, 3))

    def scanned(ppl: Ppl, x: Array, guided: bool) -> None:
        c = ppl.param("c" if guided else "a", 0.4)
        with ppl.plate("data", len(x)):

            def step(z: Array, x_t: Array) -> Any:
                if guided:
                    u = ppl.sample("u", ppl.dist.Normal(0.5 * z + c * x_t, 1.0), infer=AUXILIARY)
                    z = ppl.sample("z", ppl.dist.Normal(u, 1.0 + 0.0 * c))
                else:
                    z = ppl.sample("z", ppl.dist.Normal(c * z, 1.0))
                    ppl.sample("x", ppl.dist.Normal(z, 1.0 + 0.0 * c), obs=x_t)
                return z, z

            ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))

    models = partial(scanned, guided=False), partial(scanned, guided=True)
    engine = Engine(backend, *models, {"x": x}, portable=True)
    values = {n: np.random.default_rng(i).normal(size=(1, 1, 2, 3)) for i, n in enumerate(("z", "u", "u/1"))}
    found = engine.sites(elbo(marginal=(("u", 2),)), {"*": pathwise()}, values=values)
    inner = [norm.logpdf(values["z"], values[n], 1.0).sum(-1) for n in ("u", "u/1")]
    np.testing.assert_allclose(found["z"].log_q, inner[0], atol=1e-12)
    np.testing.assert_allclose(found["u"].log_q + found["z"].log_q, np.logaddexp(*inner) - np.log(2), atol=1e-12)


# Densities under stopped parameters: z of one Gaussian or the other, and u without parameters.

F = {"m": np.array([-0.8, 0.9]), "l": np.array([0.1, -0.3])}


def flip_model(ppl: Ppl, x: Array) -> None:
    b = ppl.param("b", 0.6)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(b * z, 1.0), obs=x)


def flip_guide(ppl: Ppl, x: Array, own: bool = False) -> None:
    m, log_scale = ppl.param("m", F["m"]), ppl.param("l", F["l"])
    with ppl.plate("data", len(x)):
        u = ppl.sample("u", ppl.dist.Bernoulli(0.5 + 0.0 * x), infer=AUXILIARY)
        loc = m[0] + u * (m[1] - m[0])
        ppl.sample("z", ppl.dist.Normal(loc, ppl.xp.exp(log_scale[0] + u * (log_scale[1] - log_scale[0]))))


@on_both
@pytest.mark.parametrize(
    ("objective", "estimator"),
    [
        (elbo(marginal=(("u", 2),)), stl()),
        slow(elbo(marginal=(("u", 2),)), dreg()),
        (iwae(draws=2, marginal=(("u", 2),)), dreg()),
        slow(iwae(draws=2, marginal=(("u", 2),)), pathwise()),
    ],
    ids=named,
)
def test_frozen_densities_have_the_exact_gradient(backend: Backend, objective: Objective, estimator: Estimator) -> None:
    """By quadrature over z's noise and all u. A doubly reparameterised gradient differs from the pathwise one at every
    draw, and in expectation does not."""
    x, K, step = X[:1], objective.draws, 0.25
    eps = step * np.arange(-33, 34)
    mass = step * np.exp(-0.5 * eps**2) / np.sqrt(2 * np.pi)
    u0, u1, e = (a.ravel() for a in np.meshgrid([0, 1], [0, 1], eps, indexing="ij"))
    chance = np.tile(mass, 4) / 4

    def log_w(p: Mapping[str, Array]) -> Array:
        z = p["m"][u0] + jnp.exp(p["l"][u0]) * e
        log_q = jnp.logaddexp(*(normal(z, p["m"][u], jnp.exp(p["l"][u])) for u in (u0, u1))) - np.log(2)
        return normal(z, 0.0, 1.0) + normal(x[0], p["b"] * z, 1.0) - log_q

    pairs = np.indices((len(e),) * K).reshape(K, -1).T
    weight = chance[pairs].prod(1)

    def loss(p: Mapping[str, Array]) -> Array:
        return -(weight * (logsumexp(log_w(p)[pairs], axis=1) - np.log(K))).sum()

    with jax.enable_x64(True):
        params = {n: jnp.asarray(v) for n, v in F.items()} | {"b": jnp.asarray(0.6)}
        value, gradient = jax.value_and_grad(loss)(params)
    z = F["m"][u0] + np.exp(F["l"][u0]) * e
    values = {n: v[pairs][..., None].astype(float) for n, v in (("z", z), ("u", u0), (inner_name("u", 1), u1))}
    engine = Engine(backend, flip_model, flip_guide, {"x": x}, portable=True)
    options = objective.model_copy(update={"outer": len(weight)})
    found = engine.loss(options, {"z": estimator, "u": score()}, values=values, weight=weight)
    assert_equal(found, float(value), {n: np.asarray(g) for n, g in gradient.items()}, 1e-9)


# What is refused.


def test_what_cannot_be_summed_out_is_refused_by_name() -> None:
    plan = partial(Engine("pyro", model, guide, {"x": X}, portable=True).plan)
    for objective, estimators, why in (
        (elbo(marginal=(("v", 2),)), {"*": score()}, r"'v', which matches none of the guide's auxiliary sites \['u'\]"),
        (elbo(marginal=(("z", 2),)), {"*": score()}, r"matches none of the guide's auxiliary sites"),
        (rws(draws=2, marginal=(("u", 2),)), {"*": score()}, "at fixed draws, where the estimate has another gradient"),
        (elbo(marginal=(("u", 2),)), {"u": enumerated(), "z": score()}, "it has values besides its draw; use 'score'"),
    ):
        with pytest.raises(LegalityError, match=why):
            plan(objective, estimators)
    chain = Engine("pyro", chain_model, chain_guide, {"x": X}, portable=True)
    with pytest.raises(LegalityError, match=r"\['u2', 'w'\] are summed out together, by as many draws; .*'u2': 3"):
        chain.plan(elbo(marginal=(("u2", 3), ("w", 2))), {"*": pathwise()})
    with pytest.raises(LegalityError, match="sums out 'u2', whose density looks at parameters or at other sites"):
        chain.plan(elbo(marginal=(("u2", 3), ("w", 3))), {"*": stl()})
    flip = Engine("pyro", flip_model, flip_guide, {"x": X}, portable=True)
    with pytest.raises(LegalityError, match="it has values besides its draw"):
        flip.plan(iwae(draws=2, marginal=(("u", 2),)), {"z": dreg(), "u": enumerated()})


@on_both
def test_sites_of_no_row_points_and_scales_are_refused(backend: Backend) -> None:
    def draw(kind: str) -> Any:
        def guide(ppl: Ppl, x: Array) -> None:
            a, one = ppl.param("a", 0.3), 0.0 * x + 1.0
            if kind == "global":
                u = ppl.sample("u", ppl.dist.Normal(a, 1.0), infer=AUXILIARY)
            with ppl.plate("data", len(x)):
                if kind != "global":
                    u = ppl.sample("u", ppl.dist.Normal(a * one, 1.0), infer=AUXILIARY)
                if kind == "point":
                    ppl.sample("z", ppl.dist.Delta(u))
                else:
                    ppl.sample("z", ppl.dist.Normal((a if kind == "apart" else u) * one, 1.0))

        return guide

    for kind, why in (
        ("global", "'u' cannot be summed out by `marginal`: it is outside data plate 'data'"),
        ("point", "site 'z' is a point that moves with it, and has no density at other draws"),
        ("apart", "no other site of the guide looks at it"),
    ):
        engine = Engine(backend, flip_model, draw(kind), {"x": X}, portable=True)
        with pytest.raises(LegalityError, match=why):
            engine.plan(elbo(marginal=(("u", 2),)), {"*": pathwise()})
