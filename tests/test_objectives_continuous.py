"""Objectives at Gaussian sites: expected gradients by quadrature, exact posteriors, the order of bounds, sleep.

Draws are the nodes of a trapezoid rule for the noise, injected along the outer axis with their mass; a pathwise site is
rebuilt from them with its gradient. So the engine's expected gradient is a quadrature too, without Monte Carlo error:
equal to rounding where the truth is taken at the same nodes, and to the accuracy of the rule where it is another form
of the same expectation (doubly reparameterised and score-type gradients).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import BACKENDS, Engine, Loss, assert_equal, assert_unbiased, z_scores
from jax.lax import stop_gradient
from jax.scipy.special import betaln, gammaln, logsumexp
from oracle import expected, log_evidence, log_evidence_rows, table
from toys import (
    CATEGORICALS,
    CONJUGATE_NORMAL,
    GAUSSIANS2,
    LINEAR_GAUSSIAN_FACTORS,
    MIXED_YZ,
    MIXED_ZY,
    Array,
    Backend,
    Ppl,
    Toy,
)

from ppl_lvm import matrix
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.base import losses
from ppl_lvm.backends.training import initial_extras
from ppl_lvm.catalogue import objectives
from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.stl import stl
from ppl_lvm.objectives.chivi import chivi
from ppl_lvm.objectives.ciwae import ciwae
from ppl_lvm.objectives.cubo import cubo
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.f_divergence import f_divergence
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.piwae import piwae
from ppl_lvm.objectives.renyi import renyi
from ppl_lvm.objectives.rws import rws
from ppl_lvm.objectives.vbis import vbis
from ppl_lvm.objectives.vis import vis
from ppl_lvm.objectives.wake_sleep import wake_sleep

BY_QUADRATURE = {"mixed_zy": 1e-10, "mixed_yz": 1e-10, "gaussians2": 1e-8}
"""What rules with steps of 0.1 scales, or of 0.5 for two Gaussians, leave out."""

on_both = pytest.mark.parametrize("backend", BACKENDS)
Params = Mapping[str, jax.Array]
Formula = Callable[[jax.Array], jax.Array]


def normal(value: Array, loc: Array, log_scale: Array) -> Array:
    return -0.5 * ((value - loc) / jnp.exp(log_scale)) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


class Draw(NamedTuple):
    """Entries of one row, [T, E]: the values' log densities under model and guide, and the part of a class."""

    log_p: jax.Array
    log_q: jax.Array
    log_q_y: jax.Array
    values: dict[str, jax.Array]


def mixed_zy(p: Params, q: Params, x: float, y: Array, first: Array, _: Array) -> Draw:
    """Values from parameters p, the guide's densities from q."""
    z = p["q_z_loc"][y] + p["q_z_gain"] * x + jnp.exp(p["q_z_log_scale"][y]) * first
    log_q_y = jax.nn.log_softmax(q["q_y_logits"])[y]
    log_q = normal(z, q["q_z_loc"][y] + q["q_z_gain"] * x, q["q_z_log_scale"][y]) + log_q_y
    log_p = normal(z, p["z_loc"][y], p["z_log_scale"][y]) + jax.nn.log_softmax(p["y_logits"])[y]
    log_p += normal(x, p["x_level"][y] + p["x_gain"] * z, p["x_log_scale"])
    return Draw(log_p, log_q, log_q_y, {"z": z, "y": jax.nn.one_hot(y, 2)})


def mixed_yz(p: Params, q: Params, x: float, y: Array, first: Array, _: Array) -> Draw:
    z = p["q_z_loc"] + p["q_z_gain"] * x + jnp.exp(p["q_z_log_scale"]) * first

    def of(logits: jax.Array, gain: jax.Array) -> jax.Array:
        every = jax.nn.log_softmax(logits + z[..., None] * gain, axis=-1)
        return jnp.take_along_axis(every, y[..., None], -1)[..., 0]

    log_q_y = of(q["q_y_logits"], q["q_y_gain"])
    log_q = normal(z, q["q_z_loc"] + q["q_z_gain"] * x, q["q_z_log_scale"]) + log_q_y
    log_p = normal(z, p["z_loc"], p["z_log_scale"]) + of(p["y_logits"], p["y_gain"])
    log_p += normal(x, p["x_level"][y] + p["x_gain"] * z, p["x_log_scale"])
    return Draw(log_p, log_q, log_q_y, {"z": z, "y": jax.nn.one_hot(y, 2)})


def gaussians2(p: Params, q: Params, x: float, _: Array, first: Array, second: Array) -> Draw:
    z1 = p["q_z1_loc"] + p["q_z1_gain"] * x + jnp.exp(p["q_z1_log_scale"]) * first
    z2 = p["q_z2_loc"] + p["q_z2_gain"] * z1 + p["q_z2_x"] * x + jnp.exp(p["q_z2_log_scale"]) * second
    log_q = normal(z1, q["q_z1_loc"] + q["q_z1_gain"] * x, q["q_z1_log_scale"])
    log_q += normal(z2, q["q_z2_loc"] + q["q_z2_gain"] * z1 + q["q_z2_x"] * x, q["q_z2_log_scale"])
    log_p = normal(z1, p["z1_loc"], p["z1_log_scale"])
    log_p += normal(z2, p["z2_gain"] * z1 + p["z2_bias"], p["z2_log_scale"])
    log_p += normal(x, p["x_gain"] * z2, p["x_log_scale"])
    return Draw(log_p, log_q, jnp.zeros_like(log_q), {"z1": z1, "z2": z2})


DRAWS = {"mixed_zy": mixed_zy, "mixed_yz": mixed_yz, "gaussians2": gaussians2}


class Grid(NamedTuple):
    """K draws of one row at nodes, [T, E]: class, noises, and the log mass of an outcome's noise, [T]."""

    y: np.ndarray
    first: np.ndarray
    second: np.ndarray
    log_mass: np.ndarray
    summed: bool
    """The entries are the classes, enumerated."""


def grid(toy: Toy, K: int, summed: bool) -> Grid:
    step, reach = (0.5, 7) if toy is GAUSSIANS2 else (0.1, 9)
    half = round(reach / step)
    noise = step * np.arange(-half, half + 1)
    log_mass = np.log(step) - 0.5 * noise**2 - 0.5 * np.log(2 * np.pi)
    n = np.arange(len(noise))
    if summed:  # both classes, each with a draw of its own
        assert K == 1
        a, b = (i.ravel() for i in np.meshgrid(n, n, indexing="ij"))
        y = np.tile([0, 1], (len(a), 1))
        return Grid(y, noise[np.stack([a, b], 1)], 0.0 * y, log_mass[a] + log_mass[b], True)
    if toy is GAUSSIANS2:
        first, second = (i.ravel() for i in np.meshgrid(n, n, indexing="ij"))
        y, weight = np.zeros_like(first), log_mass[first] + log_mass[second]
    else:
        y, first = (i.ravel() for i in np.meshgrid([0, 1], n, indexing="ij"))
        second, weight = np.zeros_like(first), log_mass[first]
    draw = np.indices((len(y),) * K).reshape(K, -1).T
    return Grid(y[draw], noise[first][draw], noise[second][draw], weight[draw].sum(1), False)


def run(backend: Backend, toy: Toy, objective: Objective, estimators: Mapping[str, Estimator], g: Grid) -> Loss:
    """The engine at the grid's nodes."""
    with jax.enable_x64(True):
        p = {n: jnp.asarray(v) for n, v in toy.params.items()}
        found = DRAWS[toy.name](p, p, toy.data["x"][0], g.y, g.first, g.second)
        weight = g.log_mass if g.summed or toy is GAUSSIANS2 else g.log_mass + found.log_q_y.sum(-1)
        values = {n: np.asarray(v)[:, :, None] for n, v in found.values.items() if not (g.summed and n == "y")}
        weight = np.exp(np.asarray(weight))
    many = objective.model_copy(update={"outer": len(weight)})
    return Engine.of(backend, toy).loss(many, estimators, values=values, weight=weight)


def differentiated(toy: Toy, g: Grid, loss: Callable[..., jax.Array]) -> dict[str, Any]:
    """The gradient of `sum_t loss_t`; `loss` is given densities of (values' parameters, densities' parameters)."""

    def total(p: Params) -> jax.Array:
        def draws(values: Params, densities: Params) -> Draw:
            return DRAWS[toy.name](values, densities, toy.data["x"][0], g.y, g.first, g.second)

        return loss(draws, p, jnp.exp(g.log_mass)).sum()

    with jax.enable_x64(True):
        p = {n: jnp.asarray(v) for n, v in toy.params.items()}
        value, gradient = jax.jit(jax.value_and_grad(total))(p)
        return {"": np.asarray(value), **{n: np.asarray(v) for n, v in gradient.items()}}


def in_expectation(toy: Toy, g: Grid, f: Formula) -> dict[str, Any]:
    """`E f(log_w)` over all draws: classes by their live mass, Gaussians through their values."""

    def loss(draws: Callable[..., Draw], p: Params, mass: jax.Array) -> jax.Array:
        found = draws(p, p)
        log_w = found.log_p - found.log_q
        if g.summed:  # one draw: a mean over its values
            return mass * (jnp.exp(found.log_q_y) * jax.vmap(f, 1, 1)(log_w[:, :, None])).sum(-1)
        of_class = 0.0 if toy is GAUSSIANS2 else found.log_q_y.sum(-1)
        return mass * jnp.exp(of_class) * f(log_w)

    return differentiated(toy, g, loss)


def frozen(p: Params, toy: Toy, of: str) -> dict[str, jax.Array]:
    """The guide's parameters stopped, or the model's, or all."""
    stopped = {"guide": toy.guide_params, "model": toy.model_params, "all": toy.params}[of]
    return {n: stop_gradient(v) if n in stopped else v for n, v in p.items()}


def weights(found: Draw, g: Grid, power: float) -> jax.Array:
    h = power * (found.log_p - found.log_q) + (found.log_q_y if g.summed else 0.0)
    return stop_gradient(jax.nn.softmax(h, axis=-1))


def self_normalised(toy: Toy, g: Grid, power: float, z: Estimator) -> dict[str, Any]:
    """The expected K-draw gradient of `log mean_k w^power`: as it is, or doubly reparameterised."""

    def loss(draws: Callable[..., Draw], p: Params, mass: jax.Array) -> jax.Array:
        found = draws(p, p)
        chance = mass if g.summed or toy is GAUSSIANS2 else mass * stop_gradient(jnp.exp(found.log_q_y.sum(-1)))
        h = power * (found.log_p - found.log_q)
        if z.scored:
            found = draws(frozen(p, toy, "guide"), p)
            h = power * (found.log_p - found.log_q) + found.log_q - stop_gradient(found.log_q)
            value = logsumexp(h, axis=-1)
        elif not z.frozen:
            of_class = found.log_q_y - (0.0 if g.summed else stop_gradient(found.log_q_y))
            value = logsumexp(h + of_class, axis=-1)
        else:
            v, path = weights(found, g, power), draws(p, frozen(p, toy, "guide"))
            # Only the guide's: through the values with densities as they are, and by the score of the class.
            surrogate = power * (1 - power) * (path.log_p - path.log_q) + (1 - power) * found_class(draws, p, toy)
            of_guide = (v * surrogate).sum(-1)
            value = stop_gradient(logsumexp(h, axis=-1)) + of_guide - stop_gradient(of_guide)
        return chance * (value - (0.0 if g.summed else math.log(h.shape[-1])))

    return differentiated(toy, g, loss)


def found_class(draws: Callable[..., Draw], p: Params, toy: Toy) -> jax.Array:
    """log q of the class at fixed values."""
    return draws(frozen(p, toy, "guide"), p).log_q_y


def wake(toy: Toy, g: Grid) -> dict[str, Any]:
    """`E sum_k v_k log q(z_k)` at fixed draws and weights."""

    def loss(draws: Callable[..., Draw], p: Params, mass: jax.Array) -> jax.Array:
        found = draws(frozen(p, toy, "all"), p)
        chance = mass if g.summed or toy is GAUSSIANS2 else mass * stop_gradient(jnp.exp(found.log_q_y.sum(-1)))
        return chance * (weights(found, g, 1.0) * found.log_q).sum(-1)

    return differentiated(toy, g, loss)


def bound(log_w: jax.Array) -> jax.Array:
    return logsumexp(log_w, axis=-1) - math.log(log_w.shape[-1])


def mean(log_w: jax.Array) -> jax.Array:
    return log_w.mean(-1)


def half_vr(log_w: jax.Array) -> jax.Array:
    return 2 * (logsumexp(0.5 * log_w, axis=-1) - math.log(log_w.shape[-1]))


def chi_square(log_w: jax.Array) -> jax.Array:
    u = jax.nn.softmax(log_w, axis=-1) * log_w.shape[-1]
    return (u**2 - 1).mean(-1)


Truth = Callable[[Toy, Grid, Estimator], dict[str, Any]]


def of(f: Formula, sign: float = -1.0) -> Truth:
    return lambda toy, g, z: times(sign, in_expectation(toy, g, f))


def log_mean(power: float, factor: float) -> Truth:
    return lambda toy, g, z: times(factor, self_normalised(toy, g, power, z))


def both(*parts: Truth) -> Truth:
    def found(toy: Toy, g: Grid, z: Estimator) -> dict[str, Any]:
        every = [part(toy, g, z) for part in parts]
        return {n: sum(one[n] for one in every) for n in every[0]}

    return found


def times(factor: float, found: Mapping[str, Any]) -> dict[str, Any]:
    return {n: factor * v for n, v in found.items()}


# The model's self-normalised gradient is at the draws as they are, whatever the guide's estimator.
MODEL_BOUND: Truth = lambda toy, g, z: times(-1.0, self_normalised(toy, g, 1.0, pathwise()))  # noqa: E731

LOSSES: dict[str, tuple[Objective, Truth, Truth | None]] = {
    "elbo": (elbo(draws=2), of(mean), None),
    "iwae": (iwae(draws=2), of(bound), None),
    "ciwae": (ciwae(draws=2, beta=0.3), both(of(mean, -0.3), of(bound, -0.7)), None),
    "piwae": (piwae(draws=2, groups=2), of(bound), of(mean)),
    "renyi": (renyi(draws=2, alpha=0.5), of(half_vr), None),
    "f_divergence": (f_divergence(draws=2), of(bound), of(chi_square, 1.0)),
    "vis": (vis(draws=2), MODEL_BOUND, log_mean(2.0, 1.0)),
    "cubo": (cubo(draws=2, n=3.0), of(mean), log_mean(3.0, 1 / 3)),
    "chivi": (chivi(draws=2), of(mean), both(log_mean(2.0, 0.5), of(mean, -0.5))),
    "vbis": (vbis(draws=2), MODEL_BOUND, of(mean)),
    "rws": (rws(draws=2), MODEL_BOUND, lambda toy, g, z: times(-1.0, wake(toy, g))),
}


def slow(*cell: object) -> Any:
    return pytest.param(*cell, marks=pytest.mark.slow)


DREG_CELLS = [
    (toy, name, z, y)
    for toy, z, y, names in [
        (MIXED_ZY, dreg(), score(), ("iwae", "ciwae", "piwae", "renyi", "f_divergence", "vis", "cubo", "chivi", "rws")),
        (MIXED_ZY, dreg(), enumerated(), ("vis", "cubo", "chivi", "elbo")),
        (MIXED_ZY, stl(), score(), ("elbo",)),
        (MIXED_YZ, stl(), score(), ("elbo",)),
        (MIXED_YZ, stl(), enumerated(), ("elbo",)),
        (MIXED_YZ, pathwise(), score(), tuple(LOSSES)),
        (MIXED_YZ, score(), score(), ("elbo", "iwae", "vis", "renyi", "rws")),
        (GAUSSIANS2, dreg(), None, ("elbo", "iwae", "renyi", "vis", "rws")),
        (GAUSSIANS2, pathwise(), None, ("iwae", "vis")),
        (GAUSSIANS2, stl(), None, ("elbo",)),
    ]
    for name in names
]
QUICK = ("iwae", "vis", "rws", "elbo")
CELLS = [
    pytest.param(
        backend,
        *cell,
        id="-".join([backend, cell[0].name, cell[1], *(type(e).__name__ for e in cell[2:] if e is not None)]),
        # Compiling each takes NumPyro seconds, and two Gaussians have many nodes.
        marks=[] if cell[0] is MIXED_ZY and (backend == "pyro" or cell[1] in QUICK) else [pytest.mark.slow],
    )
    for backend in BACKENDS
    for cell in DREG_CELLS
]


@pytest.mark.parametrize(("backend", "toy", "name", "z", "y"), CELLS)
def test_expected_gradients_by_quadrature(
    backend: Backend, toy: Toy, name: str, z: Estimator, y: Estimator | None
) -> None:
    objective, model, guide = LOSSES[name]
    summed = y is not None and y.exhaustive
    if name == "elbo" or summed:
        objective = objective.model_copy(update={"draws": 1})
    estimators = {"z1": z, "z2": z} if y is None else {"z": z, "y": y}
    g = grid(toy, objective.draws, summed and toy is MIXED_ZY)
    if summed and toy is MIXED_YZ:  # one draw of z, shared by both classes, as if it had been drawn with each
        g = grid(toy, 1, False)
        half = len(g.log_mass) // 2
        first, second = (np.repeat(a[:half], 2, 1) for a in (g.first, g.second))
        classes = Grid(np.tile([0, 1], (half, 1)), first, second, g.log_mass[:half], True)
        found, truth = run(backend, toy, objective, estimators, classes), model(toy, g, z)
        assert_equal(found, truth.pop(""), truth, BY_QUADRATURE[toy.name])
        return
    found, truth = run(backend, toy, objective, estimators, g), model(toy, g, z)
    value = truth.pop("")
    if guide is not None:
        of_guide = guide(toy, g, z)
        truth = {n: v if n in toy.model_params else of_guide[n] for n, v in truth.items()}
    assert_equal(found, value, truth, BY_QUADRATURE[toy.name])


def test_sticking_the_landing_in_a_bound_of_two_draws_is_biased() -> None:
    """Without the guide's own score the gradient is another one, and it is refused; with one draw it is the ELBO's."""
    g = grid(GAUSSIANS2, 2, False)

    def stuck(draws: Callable[..., Draw], p: Params, mass: jax.Array) -> jax.Array:
        found = draws(p, frozen(p, GAUSSIANS2, "guide"))
        return mass * bound(found.log_p - found.log_q)

    right = in_expectation(GAUSSIANS2, g, bound)
    wrong = differentiated(GAUSSIANS2, g, stuck)
    assert abs(wrong["q_z1_loc"] - right["q_z1_loc"]) > 0.05
    one = grid(GAUSSIANS2, 1, False)
    alike, elbo_ = differentiated(GAUSSIANS2, one, stuck), in_expectation(GAUSSIANS2, one, mean)
    for name in GAUSSIANS2.guide_params:
        np.testing.assert_allclose(alike[name], elbo_[name], rtol=0, atol=BY_QUADRATURE["gaussians2"])
    for backend in BACKENDS:
        with pytest.raises(LegalityError, match="inside `joint` the guide's own score has no mean of zero"):
            Engine.of(backend, GAUSSIANS2).plan(iwae(draws=2), {"*": stl()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_sticking_the_landing_at_a_global_site_around_importance_weighted_rows(backend: Backend) -> None:
    """The expectation over a global site is a mean, whatever the rows' bound: its score has mean zero there."""
    x = np.array([-0.4, 0.3, 1.1])
    start = {"a": 0.7, "b": 1.3, "m": 0.2, "s": -0.5, "c": 0.1, "d": 0.4, "e": -0.3}

    def model(ppl: Ppl, x: Array) -> None:
        a, b = ppl.param("a", start["a"]), ppl.param("b", start["b"])
        g = ppl.sample("g", ppl.dist.Normal(0.0 * a, 1.0))
        with ppl.plate("data", len(x)):
            y = ppl.sample("y", ppl.dist.Bernoulli(logits=a * g))
            ppl.sample("x", ppl.dist.Normal(b * y + g, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        m, s, c, d, e = (ppl.param(n, start[n]) for n in "mscde")
        g = ppl.sample("g", ppl.dist.Normal(m, ppl.xp.exp(s)))
        with ppl.plate("data", len(x)):
            ppl.sample("y", ppl.dist.Bernoulli(logits=c + d * g + e * x))

    nodes, mass = np.polynomial.hermite_e.hermegauss(60)
    mass = mass / mass.sum()

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        g = (p["m"] + jnp.exp(p["s"]) * nodes)[:, None]  # [nodes, rows]

        def log_bernoulli(y: float, logit: jax.Array) -> jax.Array:
            return jax.nn.log_sigmoid((2.0 * y - 1.0) * logit)

        log_q = [log_bernoulli(y, p["c"] + p["d"] * g + p["e"] * x) for y in (0.0, 1.0)]
        log_w = [
            log_bernoulli(y, p["a"] * g) + normal(x, p["b"] * y + g, 0.0) - of_q
            for y, of_q in zip((0.0, 1.0), log_q, strict=True)
        ]
        rows = jnp.zeros_like(g * x)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows += jnp.exp(log_q[i] + log_q[j]) * (jnp.logaddexp(log_w[i], log_w[j]) - math.log(2))
        outside = normal(g, 0.0, 0.0) - normal(g, p["m"], p["s"])
        return -jnp.sum(mass * (outside[:, 0] + rows.sum(1)))

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)({n: jnp.asarray(v) for n, v in start.items()})
    values = {"g": start["m"] + np.exp(start["s"]) * nodes}
    engine, objective = Engine(backend, model, guide, {"x": x}, portable=True), iwae(draws=2, outer=60)
    found = {
        name: engine.loss(objective, {"g": e, "y": enumerated()}, values=values, weight=mass)
        for name, e in (("stl", stl()), ("pathwise", pathwise()))
    }
    for loss_ in found.values():
        assert_equal(loss_, float(value), {n: np.asarray(v) for n, v in gradient.items()}, 1e-10)


# At the exact posterior.

NO_FIXED_VALUE = {"autogen", "tcvae", "infovae", "dipvae", "capacity", "capacitron"}
"""Objectives that are no bound on the evidence of a row; see `test_aggregate`."""


@pytest.mark.parametrize("toy", [CONJUGATE_NORMAL, LINEAR_GAUSSIAN_FACTORS], ids=lambda t: t.name)
@on_both
def test_every_objective_has_its_declared_value_at_the_exact_posterior(backend: Backend, toy: Toy) -> None:
    """In units of the log evidence, whatever is drawn."""
    engine, evidence = Engine.of(backend, toy), float(log_evidence_rows(toy).sum())
    named = {name: next(matrix._objectives(name))[1] for name in objectives()}
    of_rows = {n for n, o in named.items() if matrix.judged(o, pathwise(), *matrix.KINDS["continuous"])[0] != "refused"}
    assert {*named} - of_rows == {"fivo"}  # needs a scan: see `test_fivo`
    assert {n for n, o in named.items() if o.at_posterior == (None, None)} == NO_FIXED_VALUE
    named = {n: o for n, o in named.items() if n in of_rows - NO_FIXED_VALUE}

    def every(key: Any) -> dict[str, tuple[Any, Any]]:
        found = {}
        for name, objective in named.items():
            plan = engine.plan(objective, {"*": pathwise()})
            extras = initial_extras(objective, plan, engine.batch)[1]
            own = {s: {n: engine._array(np.asarray(v)) for n, v in ps.items()} for s, ps in extras.items()}
            draws = engine.bound.draws(engine.bound.initial, engine.batch, key, plan, own=own)
            found[name] = losses(draws, objective, plan)[:2]
        return found

    with engine._precision():
        if backend == "numpyro":
            compiled = jax.jit(every, compiler_options={"xla_backend_optimization_level": 0})
            found = compiled(jax.random.key(1))
        else:
            found = every(1)
    for name, objective in named.items():
        model, guide = objective.at_posterior
        assert model is not None, name
        np.testing.assert_allclose(float(found[name][0]), model * evidence, atol=1e-9, err_msg=name)
        if found[name][1] is None:
            assert guide is None, name
        elif guide is not None:
            np.testing.assert_allclose(float(found[name][1]), guide * evidence, atol=1e-9, err_msg=name)


# The order of bounds, in exact expectation.


def value(K: int, f: Formula) -> float:
    return expected(CATEGORICALS, K, lambda r: f(r.log_w)).value


def grouped(groups: int) -> Formula:
    return lambda log_w: bound(log_w.reshape(*log_w.shape[:-1], groups, -1)).mean(-1)


def vr(alpha: float) -> Formula:
    return lambda log_w: bound((1 - alpha) * log_w) / (1 - alpha)


def test_bounds_are_in_order() -> None:
    """The ELBO, means of smaller bounds, larger bounds, the evidence; more draws are never worse."""
    lower = [value(1, mean), value(4, grouped(2)), value(4, bound), log_evidence(CATEGORICALS)]
    assert lower == sorted(lower) and min(np.diff(lower)) > 1e-3
    rising = [value(K, bound) for K in (1, 2, 3, 4)]
    assert min(np.diff(rising)) > 1e-3
    assert value(2, bound) == pytest.approx(value(4, grouped(2)), abs=1e-12)


def test_variational_renyi_bounds_fall_in_alpha_to_their_limits() -> None:
    at = [value(3, vr(alpha)) for alpha in (-2.0, -1.0, 0.0, 0.5, 0.999, 1.001, 2.0)]
    assert max(np.diff(at)) < 0
    assert value(3, vr(1 - 1e-6)) == pytest.approx(value(3, mean), abs=1e-5)
    assert value(3, vr(0.0)) == pytest.approx(value(3, bound), abs=1e-12)
    assert value(3, vr(-300.0)) == pytest.approx(value(3, lambda log_w: log_w.max(-1)), abs=1e-2)


@on_both
def test_the_chi_bound_is_above_the_evidence_in_the_limit_of_all_draws(backend: Backend) -> None:
    """Of the guide's loss, with every value enumerated; with few draws it is below its limit in expectation."""
    engine, entries = Engine.of(backend, CATEGORICALS), table(CATEGORICALS)
    found = engine.guide_loss(cubo(draws=1), {"*": enumerated()})
    limit = 0.5 * np.logaddexp.reduce(2 * entries.log_w[0, 0] + entries.log_mass[0, 0])
    assert found == pytest.approx(limit, abs=1e-12)
    assert limit > log_evidence(CATEGORICALS) + 1e-3
    assert value(3, vr(-1.0)) < limit


# Sleep: gradients at what the model draws, rows and latents together.


@pytest.mark.parametrize("objective", [wake_sleep(), rws(sleep=1.0, draws=2)], ids=lambda o: type(o).__name__)
@on_both
def test_sleep(backend: Backend, objective: Objective) -> None:
    """`E_p(z, x) grad log q(z | x)`: the classes summed, x by quadrature; 2,000 rows in a run, 40 runs."""
    rows, toy = 2_000, CATEGORICALS
    engine = Engine(backend, toy.model, toy.guide, {"x": np.zeros(rows)}, portable=True)
    found = engine.loss(objective, {"*": score()}, runs=40)
    noise = 0.25 * np.arange(-28, 29)
    mass = 0.25 * np.exp(-0.5 * noise**2) / np.sqrt(2 * np.pi)
    p = toy.params
    prior = p["z1_logits"][:, None] - np.logaddexp.reduce(p["z1_logits"])
    prior = prior + p["z2_logits"] - np.logaddexp.reduce(p["z2_logits"], axis=-1)[:, None]
    x = p["x_loc"] + np.exp(p["x_log_scale"]) * noise[:, None, None]  # [S, 2, 3]

    def asleep(guide: Params) -> jax.Array:
        logits = guide["q_z2_logits"][:, None] + x[..., None] * guide["q_z2_gain"]  # [S, 2, 3, 3]
        log_q = jnp.diagonal(jax.nn.log_softmax(logits, axis=-1), axis1=-2, axis2=-1)
        log_q = log_q + jax.nn.log_softmax(guide["q_z1_logits"])[:, None]
        return -rows * (np.exp(prior) * mass[:, None, None] * log_q).sum()

    with jax.enable_x64(True):
        truth = jax.grad(asleep)({n: jnp.asarray(v) for n, v in toy.guide_params.items()})
    gradient = {n: np.asarray(v) for n, v in truth.items()}
    assert_unbiased(Loss(found.value, found.gradient), None, gradient)
    for name, exact in gradient.items():  # and the noise is small beside it
        error = found.gradient[name].std(0, ddof=1) / np.sqrt(40)
        assert (error < 0.02 * np.abs(exact).max()).all(), name


# Implicit reparameterisation.


def gamma(ppl: Ppl) -> Any:
    return ppl.dist.Gamma(ppl.xp.exp(ppl.param("a", 1.5)), ppl.xp.exp(ppl.param("b", 1.6)))


def beta(ppl: Ppl) -> Any:
    return ppl.dist.Beta(ppl.xp.exp(ppl.param("a", 0.7)), ppl.xp.exp(ppl.param("b", 0.4)))


def dirichlet(ppl: Ppl) -> Any:
    return ppl.dist.Dirichlet(ppl.xp.exp(ppl.param("a", [0.9, 0.4, 0.7])))


def gamma_density(p: Params, z: jax.Array) -> jax.Array:
    a, b = jnp.exp(p["a"]), jnp.exp(p["b"])
    return a * jnp.log(b) - gammaln(a) + (a - 1) * jnp.log(z) - b * z


def beta_density(p: Params, z: jax.Array) -> jax.Array:
    a, b = jnp.exp(p["a"]), jnp.exp(p["b"])
    return (a - 1) * jnp.log(z) + (b - 1) * jnp.log1p(-z) - betaln(a, b)


def dirichlet_density(p: Params, z: jax.Array) -> jax.Array:
    a = jnp.exp(p["a"])
    return gammaln(a.sum()) - gammaln(a).sum() + ((a - 1) * jnp.log(z)).sum(-1)


def unit_nodes(n: int = 4_000) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and masses on (0, 1), `z = 1 / (1 + exp(-pi sinh u))`: ends do not matter, whatever a power is there."""
    u, step = np.linspace(-2.6, 2.6, n, retstep=True)
    s = np.pi * np.sinh(u)
    z = 1 / (1 + np.exp(-s))
    return z, step * z / (1 + np.exp(s)) * np.pi * np.cosh(u)


def nodes_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    z, mass = unit_nodes(400 if name == "dirichlet" else 4_000)
    if name == "gamma":
        return z / (1 - z), mass / (1 - z) ** 2
    if name == "beta":
        return z, mass
    first, second = np.meshgrid(z, z, indexing="ij")
    simplex = np.stack([first, (1 - first) * second, (1 - first) * (1 - second)], -1)
    return simplex.reshape(-1, 3), (mass[:, None] * mass * (1 - first)).ravel()


IMPLICIT: dict[str, tuple[Callable[[Ppl], Any], Callable[..., jax.Array], dict[str, Any]]] = {
    "gamma": (gamma, gamma_density, {"a": 1.5, "b": 1.6}),
    "beta": (beta, beta_density, {"a": 0.7, "b": 0.4}),
    "dirichlet": (dirichlet, dirichlet_density, {"a": [0.9, 0.4, 0.7]}),
}


_OTHERS = ("beta", "dirichlet")


@pytest.mark.parametrize(
    ("backend", "name"), [("pyro", "gamma"), slow("numpyro", "gamma"), *(slow(b, n) for b in BACKENDS for n in _OTHERS)]
)
def test_implicit_reparameterisation(backend: Backend, name: str) -> None:
    """The ELBO's gradient in the guide's concentrations, per row, of two million draws."""
    of_guide, density, start = IMPLICIT[name]
    rows = 20_000

    def model(ppl: Ppl, x: Array) -> None:
        shift = ppl.param("shift", 0.0)
        with ppl.plate("data", len(x)):
            one = ppl.xp.exp(shift + 0.0 * x)
            if name == "dirichlet":
                z = ppl.sample("z", ppl.dist.Dirichlet(one[..., None] * ppl.xp.ones(3, dtype=one.dtype)))
                loc = z @ ppl.xp.asarray([0.5, -0.2, 0.9], dtype=one.dtype)
            else:
                prior = ppl.dist.Gamma(one, one) if name == "gamma" else ppl.dist.Beta(one, one)
                z = ppl.sample("z", prior)
                loc = z
            ppl.sample("x", ppl.dist.Normal(loc, 3.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        q = of_guide(ppl)
        with ppl.plate("data", len(x)):
            ppl.sample("z", q)

    engine = Engine(backend, model, guide, {"x": np.full(rows, 0.8)}, portable=True)
    found = engine.loss(elbo(), {"z": pathwise()}, runs=100)
    z, mass = nodes_of(name)

    def loss(p: Params) -> jax.Array:
        log_q = density(p, z)
        flat = {"a": jnp.zeros(3) if name == "dirichlet" else jnp.zeros(()), "b": jnp.zeros(())}
        loc = z @ np.array([0.5, -0.2, 0.9]) if name == "dirichlet" else z
        log_p = density(flat, z) + normal(0.8, loc, math.log(3.0))
        return -(mass * jnp.exp(log_q) * (log_p - log_q)).sum()

    with jax.enable_x64(True):
        p = {n: jnp.asarray(v) for n, v in start.items()}
        assert float((mass * jnp.exp(density(p, z))).sum()) == pytest.approx(1.0, abs=1e-9)
        truth = {n: np.asarray(v) for n, v in jax.grad(loss)(p).items()}
    for n, exact in truth.items():
        each = found.gradient[n] / rows
        print(name, backend, n, each.mean(0), exact, each.std(0, ddof=1) / np.sqrt(100))
        assert np.abs(each.mean(0) - exact).max() < 1e-3
        assert np.abs(z_scores(each, exact)).max() < 4.5
