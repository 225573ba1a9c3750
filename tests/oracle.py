"""What the programs of `toys.py` should give: exact objectives and gradients, from densities of their own.

Every toy becomes a `Table`: the values that its latents take (all of them where they are discrete, the nodes
of a trapezoid rule where they are Gaussian), with their mass under the guide and their log weight. From it
follow, in float64, to rounding or to the accuracy of the rule (better than 1e-9 here):

    ELBO     sum_g q(g) [log_w(g) + scale * sum_n sum_z q(z | g) log_w_n(z, g)]
    IWAE-K   sum_g q(g) [log_w(g) + scale * sum_n E_{z_1..K ~ q(. | g)} log mean_k w_n(z_k, g)]

The expectation of log mean over K draws is a sum over all K-tuples (`log_mean_exp_by_tuples`), or for any K
and any latents a one-dimensional integral (`log_mean_exp_by_transform`). Gradients are jax.grad of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp
from scipy.special import logsumexp as scipy_logsumexp
from toys import Toy, Values

Array: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = Mapping[str, jax.Array]
Density: TypeAlias = Callable[[Params, jax.Array], "Table"]

# Most tables are tiny: compiling them well takes longer than running them.
_FAST_COMPILE = {"xla_backend_optimization_level": 0}
_LARGE = ("gaussians2", "bottom_up", "linear_gaussian_factors", "rows", "global_rows")


class Table(NamedTuple):
    """Log mass under the guide and log weight, of G global values and, given each, of S values in B rows."""

    global_log_mass: Array  # [G]
    global_log_w: Array  # [G]
    log_mass: Array  # [G, B, S]
    log_w: Array  # [G, B, S]
    parts: Mapping[str, tuple[Array | None, Array | None]] = {}
    """log p and log q of every site, `[G]` or `[G, B, S]`; of the discrete toys."""


class Exact(NamedTuple):
    """A loss (the negative bound) and its gradient by parameter name."""

    value: float
    gradient: dict[str, np.ndarray]


Kind: TypeAlias = Literal["drawn", "enumerated", "measured", "elsewhere"]
"""Where the values of a discrete site come from: the guide, its support (as variants of one draw), the guide with the
support behind it (for the gradient), or another distribution."""


class Row(NamedTuple):
    """Some draws of one row as a formula sees them, on the last axis: [..., E]."""

    log_w: jax.Array
    log_q: jax.Array
    log_weight: jax.Array
    """`exp` sums to one over enumerated entries, and averages over draws; live in the guide's parameters, so that a
    sum of `exp(log_weight) h` has the gradient of `E h`, score included."""
    parts: Mapping[str, tuple[jax.Array | None, jax.Array | None]]
    per_draw: jax.Array
    """Probability of each entry among those of its draw, `[..., K, V]`, without gradient."""
    params: Params
    x: jax.Array


Formula: TypeAlias = Callable[[Row], jax.Array]
"""One number from the draws of a row, [..., E] -> [...]."""


class Outcomes(NamedTuple):
    """Every joint outcome of K draws of one row, T of them, as runs lay them out; see `Tuples`."""

    values: dict[str, np.ndarray]  # of sites that are drawn, [T, K * V, 1, *event]
    weight: np.ndarray  # [T]
    entries: np.ndarray  # [T, E], entries of the table's last axis: measured values are left out


class Tuples(NamedTuple):
    """Every joint outcome of the guide's draws: values with T outcomes in front, and their probabilities."""

    values: dict[str, np.ndarray]  # local sites [T, K, B, *event], global sites [T, *event]
    weight: np.ndarray  # [T]


# Densities, nodes and tables


def _normal(value: jax.Array, loc: jax.Array, log_scale: jax.Array) -> jax.Array:
    return -0.5 * ((value - loc) / jnp.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi)


def _nodes(step: float) -> tuple[np.ndarray, np.ndarray]:
    """Trapezoid rule for a standard normal: nodes, log masses. Nine scales to each side leave out 1e-19."""
    half = round(9 / step)
    noise = step * np.arange(-half, half + 1)
    return noise, np.log(step) - 0.5 * noise**2 - 0.5 * np.log(2 * np.pi)


def _grid(step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    noise, log_mass = _nodes(step)
    first, second = np.meshgrid(noise, noise, indexing="ij")
    return first.ravel(), second.ravel(), (log_mass[:, None] + log_mass).ravel()


def _local(log_mass: Array, log_w: jax.Array) -> Table:
    """A table without globals, from [B, S] (the mass may be shared by the rows)."""
    return Table(jnp.zeros(1), jnp.zeros(1), jnp.broadcast_to(log_mass, log_w.shape)[None], log_w[None])


def _by_site(shape: tuple[int, ...], parts: Mapping[str, tuple[Array | None, Array | None]]) -> Table:
    """A table without globals, from the densities of its sites, [*shape] or broadcast to it: [B, *support]."""

    def flat(part: Array | None) -> jax.Array | None:
        return None if part is None else jnp.broadcast_to(part, shape).reshape(1, shape[0], -1)

    full = {name: (flat(log_p), flat(log_q)) for name, (log_p, log_q) in parts.items()}
    nothing = jnp.zeros((1, shape[0], int(np.prod(shape[1:]))))
    log_q: jax.Array = sum((q for _, q in full.values() if q is not None), nothing)
    log_p: jax.Array = sum((p for p, _ in full.values() if p is not None), nothing)
    return Table(jnp.zeros(1), jnp.zeros(1), log_q, log_p - log_q, full)


def _bernoulli(p: Params, x: jax.Array) -> Table:
    z = jnp.arange(2.0)
    log_prior = z * p["prior_logit"] - jnp.logaddexp(0.0, p["prior_logit"])
    log_q = z * p["q_logit"] - jnp.logaddexp(0.0, p["q_logit"])
    log_lik = _normal(x[:, None], p["slope"] * z, p["log_scale"])
    return _by_site((len(x), 2), {"z": (log_prior, log_q), "x": (log_lik, None)})


def _categoricals(p: Params, x: jax.Array) -> Table:
    z2_logits = p["q_z2_logits"] + x[:, None, None] * p["q_z2_gain"]
    z1 = jax.nn.log_softmax(p["z1_logits"])[:, None], jax.nn.log_softmax(p["q_z1_logits"])[:, None]
    z2 = jax.nn.log_softmax(p["z2_logits"], axis=-1), jax.nn.log_softmax(z2_logits, axis=-1)
    log_lik = _normal(x[:, None, None], p["x_loc"], p["x_log_scale"])
    return _by_site((len(x), 2, 3), {"z1": z1, "z2": z2, "x": (log_lik, None)})


def _upward(p: Params, x: jax.Array) -> Table:
    z1_logits = p["q_z1_logits"] + x[:, None] * p["q_z1_gain"]
    z1 = jax.nn.log_softmax(p["z1_logits"], axis=-1).T, jax.nn.log_softmax(z1_logits, axis=-1)[:, :, None]
    z2 = jax.nn.log_softmax(p["z2_logits"]), jax.nn.log_softmax(p["q_z2_logits"], axis=-1)
    log_lik = _normal(x[:, None, None], p["x_loc"], p["x_log_scale"])
    return _by_site((len(x), 2, 3), {"z1": z1, "z2": z2, "x": (log_lik, None)})


def _plate(p: Params, x: jax.Array) -> Table:
    global_log_q = jax.nn.log_softmax(p["q_g_logits"])
    z_logits = p["q_z_logits"][:, None, :] + x[:, None] * p["q_z_gain"]
    log_q = jax.nn.log_softmax(z_logits, axis=-1)
    log_prior = jax.nn.log_softmax(p["z_logits"], axis=-1)[:, None, :]
    log_lik = _normal(x[:, None], p["x_loc"][:, None, :], p["x_log_scale"])
    log_prior = jnp.broadcast_to(log_prior, log_q.shape)
    global_log_p = jax.nn.log_softmax(p["g_logits"])
    parts = {"g": (global_log_p, global_log_q), "z": (log_prior, log_q), "x": (log_lik, None)}
    return Table(global_log_q, global_log_p - global_log_q, log_q, log_prior + log_lik - log_q, parts)


def _mixed_yz(p: Params, x: jax.Array) -> Table:
    noise, log_mass = _nodes(0.04)
    x = x[:, None]
    loc = p["q_z_loc"] + p["q_z_gain"] * x
    z = loc + jnp.exp(p["q_z_log_scale"]) * noise
    log_q_y = jax.nn.log_softmax(p["q_y_logits"] + z[..., None] * p["q_y_gain"], axis=-1)
    log_p_y = jax.nn.log_softmax(p["y_logits"] + z[..., None] * p["y_gain"], axis=-1)
    log_w_z = _normal(z, p["z_loc"], p["z_log_scale"]) - _normal(z, loc, p["q_z_log_scale"])
    log_lik = _normal(x[..., None], p["x_level"] + p["x_gain"] * z[..., None], p["x_log_scale"])
    log_w = log_w_z[..., None] + log_p_y - log_q_y + log_lik
    return _local((log_mass[:, None] + log_q_y).reshape(len(x), -1), log_w.reshape(len(x), -1))


def _mixed_zy(p: Params, x: jax.Array) -> Table:
    noise, log_mass = _nodes(0.04)
    x = x[:, None, None]
    log_q_y = jax.nn.log_softmax(p["q_y_logits"])[:, None]
    log_p_y = jax.nn.log_softmax(p["y_logits"])[:, None]
    q_log_scale = p["q_z_log_scale"][:, None]
    loc = p["q_z_loc"][:, None] + p["q_z_gain"] * x
    z = loc + jnp.exp(q_log_scale) * noise
    log_w_z = _normal(z, p["z_loc"][:, None], p["z_log_scale"][:, None]) - _normal(z, loc, q_log_scale)
    log_lik = _normal(x, p["x_level"][:, None] + p["x_gain"] * z, p["x_log_scale"])
    log_w = log_w_z + log_p_y - log_q_y + log_lik
    return _local((log_mass + log_q_y).ravel(), log_w.reshape(len(x), -1))


def _gaussians2(p: Params, x: jax.Array) -> Table:
    first, second, log_mass = _grid(0.1)
    x = x[:, None]
    q1_loc = p["q_z1_loc"] + p["q_z1_gain"] * x
    z1 = q1_loc + jnp.exp(p["q_z1_log_scale"]) * first
    q2_loc = p["q_z2_loc"] + p["q_z2_gain"] * z1 + p["q_z2_x"] * x
    z2 = q2_loc + jnp.exp(p["q_z2_log_scale"]) * second
    log_q = _normal(z1, q1_loc, p["q_z1_log_scale"]) + _normal(z2, q2_loc, p["q_z2_log_scale"])
    log_p = _normal(z1, p["z1_loc"], p["z1_log_scale"])
    log_p += _normal(z2, p["z2_gain"] * z1 + p["z2_bias"], p["z2_log_scale"])
    return _local(log_mass, log_p + _normal(x, p["x_gain"] * z2, p["x_log_scale"]) - log_q)


def _bottom_up(p: Params, x: jax.Array) -> Table:
    first, second, log_mass = _grid(0.1)
    x = x[:, None]
    q1_loc = p["q_z1_loc"] + p["q_z1_gain"] * x
    z1 = q1_loc + jnp.exp(p["q_z1_log_scale"]) * first
    q2_loc = p["q_z2_loc"] + p["q_z2_gain"] * z1
    z2 = q2_loc + jnp.exp(p["q_z2_log_scale"]) * second
    log_q = _normal(z1, q1_loc, p["q_z1_log_scale"]) + _normal(z2, q2_loc, p["q_z2_log_scale"])
    log_p = _normal(z2, p["z2_loc"], p["z2_log_scale"])
    log_p += _normal(z1, p["z1_gain"] * z2 + p["z1_bias"], p["z1_log_scale"])
    return _local(log_mass, log_p + _normal(x, p["x_gain"] * z1, p["x_log_scale"]) - log_q)


def _conjugate_normal(p: Params, x: jax.Array) -> Table:
    noise, log_mass = _nodes(0.04)
    x = x[:, None]
    loc = p["q_gain"] * x + p["q_bias"]
    z = loc + jnp.exp(p["q_log_scale"]) * noise
    log_p = _normal(z, p["z_loc"], p["z_log_scale"]) + _normal(x, z, p["x_log_scale"])
    return _local(log_mass, log_p - _normal(z, loc, p["q_log_scale"]))


def _linear_gaussian_factors(p: Params, x: jax.Array) -> Table:
    first, second, log_mass = _grid(0.1)
    noise = jnp.stack([first, second], axis=-1)
    scale_tril = jnp.tril(p["q_scale_tril"])
    z = (x @ p["q_weight"] + p["q_bias"])[:, None, :] + noise @ scale_tril.T
    log_q = -0.5 * (noise**2).sum(-1) - np.log(2 * np.pi) - jnp.log(jnp.diag(scale_tril)).sum()
    log_p = _normal(z, p["z_loc"], jnp.zeros(())).sum(-1)
    log_p += _normal(x[:, None, :], z @ p["loading"] + p["x_bias"], p["x_log_scale"]).sum(-1)
    return _local(log_mass, log_p - log_q)


def _linear_rows(p: Params, x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows given a global shift of x [G, 1, 1]: log mass and log weight [G, B, S]."""
    noise, log_mass = _nodes(0.05)
    x = x[:, None]
    loc = p["q_z_gain"] * x + p["q_z_bias"] + p.get("q_z_g", jnp.zeros(())) * shift
    z = loc + jnp.exp(p["q_z_log_scale"]) * noise
    log_w = _normal(z, jnp.zeros(()), p["z_log_scale"]) - _normal(z, loc, p["q_z_log_scale"])
    log_w += _normal(x, shift + z, p["x_log_scale"])
    return jnp.broadcast_to(log_mass, log_w.shape), log_w


def _rows(p: Params, x: jax.Array) -> Table:
    return Table(jnp.zeros(1), jnp.zeros(1), *_linear_rows(p, x, jnp.zeros((1, 1, 1))))


def _global_rows(p: Params, x: jax.Array) -> Table:
    noise, log_mass = _nodes(0.25)
    g = p["q_g_loc"] + jnp.exp(p["q_g_log_scale"]) * noise
    log_w = _normal(g, jnp.zeros(()), p["g_log_scale"]) - _normal(g, p["q_g_loc"], p["q_g_log_scale"])
    return Table(jnp.asarray(log_mass), log_w, *_linear_rows(p, x, g[:, None, None]))


_TABLES: dict[str, Density] = {
    "bernoulli": _bernoulli,
    "categoricals": _categoricals,
    "upward": _upward,
    "plate": _plate,
    "mixed_yz": _mixed_yz,
    "mixed_zy": _mixed_zy,
    "gaussians2": _gaussians2,
    "bottom_up": _bottom_up,
    "conjugate_normal": _conjugate_normal,
    "linear_gaussian_factors": _linear_gaussian_factors,
    "rows": _rows,
    "global_rows": _global_rows,
}

# Values of the discrete toys' sites, in the order of their tables: global sites, local sites.
_SUPPORTS: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {
    "bernoulli": ({}, {"z": np.arange(2.0)}),
    "categoricals": ({}, {"z1": np.repeat(np.eye(2), 3, axis=0), "z2": np.tile(np.eye(3), (2, 1))}),
    "upward": ({}, {"z1": np.repeat(np.eye(2), 3, axis=0), "z2": np.tile(np.eye(3), (2, 1))}),
    "plate": ({"g": np.eye(2)}, {"z": np.eye(2)}),
}


# Expectations over K draws


def log_mean_exp_by_tuples(log_mass: Array, h: Array, K: int) -> jax.Array:
    """E log mean_k exp h_k over K independent draws from the last axis, as a sum over all K-tuples."""
    index = np.indices((h.shape[-1],) * K).reshape(K, -1).T
    weight = jnp.exp(log_mass[..., index].sum(-1))
    return (weight * (logsumexp(h[..., index], axis=-1) - np.log(K))).sum(-1)


def log_mean_exp_by_transform(log_mass: Array, h: Array, K: int, reach: float) -> jax.Array:
    """The same for any K: E log S = int_0^inf (exp(-t) - E exp(-t S)) dt / t, with E exp(-t S) a K-th power.

    With t = exp(u) the integrand is analytic and decays on both sides: a step of 1/4 leaves an error of
    1e-17. `reach` is where u may stop.
    """
    shift = jax.lax.stop_gradient(logsumexp(log_mass + h, axis=-1, keepdims=True))
    h = h - shift

    @jax.checkpoint
    def integrand(u: jax.Array) -> jax.Array:
        # exp(-exp(80)) is zero already; without the bound its gradient would be inf * 0.
        decay = jnp.exp(-jnp.exp(jnp.minimum(u - np.log(K) + h, 80.0)))
        return jnp.exp(-jnp.exp(u)) - (jnp.exp(log_mass) * decay).sum(-1) ** K

    u = jnp.arange(-42.0, reach, 0.25)
    return shift[..., 0] + 0.25 * jax.lax.map(integrand, u).sum(0)


def _reach(table: Table, K: int) -> float:
    """Where E exp(-t mean w) is below 1e-17: K draws are hardly ever all as small as this quantile."""
    log_mass, log_w = np.asarray(table.log_mass), np.asarray(table.log_w)
    centre = scipy_logsumexp(log_mass + log_w, axis=-1)
    order = np.argsort(log_w, axis=-1)
    below = np.cumsum(np.exp(np.take_along_axis(log_mass, order, -1)), axis=-1)
    smallest = np.argmax(below > 1e-17 ** (1 / K), axis=-1)[..., None]
    quantile = np.take_along_axis(np.take_along_axis(log_w, order, -1), smallest, -1)[..., 0]
    return float(np.ceil(np.log(40 * K) + max((centre - quantile).max(), 0.0)))


# Objectives


def _total(table: Table, rows: jax.Array, scale: float) -> jax.Array:
    """sum_g q(g) [log_w(g) + scale * sum_n rows[g, n]]."""
    return (jnp.exp(table.global_log_mass) * (table.global_log_w + scale * rows.sum(-1))).sum()


def _self_normalised(table: Table, power: float, K: int | None) -> jax.Array:
    """log mean exp(power * log_w) per row with its self-normalised gradient, in expectation over K draws.

    The gradient of K draws is sum_k softmax(power * log_w)_k grad(power * log_w_k + log_q_k); it is not the
    gradient of the expected value, hence the stopped weights. Without K, the sum over all values.
    """
    h = power * table.log_w
    if K is None:
        return logsumexp(h + table.log_mass, axis=-1)
    frozen = jax.lax.stop_gradient(table.log_mass)
    return log_mean_exp_by_tuples(frozen, h + table.log_mass - frozen, K)


@cache
def _loss_and_gradient(
    name: str, objective: str, K: int | None, reach: float
) -> Callable[..., tuple[jax.Array, Params]]:
    def loss(params: Params, x: jax.Array, scale: float) -> jax.Array:
        table = _TABLES[name](params, x)
        if objective == "elbo":
            return -_total(table, (jnp.exp(table.log_mass) * table.log_w).sum(-1), scale)
        if objective == "iwae":
            if K is None:
                return -_total(table, logsumexp(table.log_mass + table.log_w, axis=-1), scale)
            if name in _SUPPORTS:
                return -_total(table, log_mean_exp_by_tuples(table.log_mass, table.log_w, K), scale)
            return -_total(table, log_mean_exp_by_transform(table.log_mass, table.log_w, K, reach), scale)
        if objective == "vis_model":
            return -_total(table, _self_normalised(table, 1.0, K), scale)
        if objective == "vis_guide":
            return _total(table, _self_normalised(table, 2.0, K), scale)
        raise ValueError(f"objective {objective!r}: expected elbo, iwae, vis, vis_model or vis_guide")

    return jax.jit(jax.value_and_grad(loss), compiler_options=None if name in _LARGE else _FAST_COMPILE)


def _inputs(toy: Toy, params: Values | None, data: Values | None) -> tuple[dict[str, jax.Array], jax.Array]:
    values = toy.params if params is None else params
    x = (toy.data if data is None else data)["x"]
    return {name: jnp.asarray(value, float) for name, value in values.items()}, jnp.asarray(x, float)


@cache
def _compiled(name: str) -> Density:
    return jax.jit(_TABLES[name], compiler_options=_FAST_COMPILE)


def table(toy: Toy, params: Values | None = None, data: Values | None = None) -> Table:
    """The toy's values, masses and weights as float64 numpy arrays; defaults are the toy's own."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _compiled(toy.name)(*_inputs(toy, params, data)))


def exact(
    toy: Toy,
    objective: str,
    K: int | None = 1,
    params: Values | None = None,
    data: Values | None = None,
    scale: float = 1.0,
) -> Exact:
    """Expected loss of `objective` (elbo, iwae, vis, vis_model, vis_guide), its gradient in every parameter.

    The loss is the negative bound, summed over rows (times `scale`) and globals; `K` is ignored by the ELBO,
    and `K=None` is the limit of many draws per row. For "vis" the model's gradient is that of its loss
    -log mean w, the guide's that of log mean w^2, both self-normalised over K draws, and the value is the
    model's loss.
    """
    if objective == "vis":
        model, guide = (exact(toy, part, K, params, data, scale) for part in ("vis_model", "vis_guide"))
        parts = {name: (model if name in toy.model_params else guide) for name in toy.params}
        return Exact(model.value, {name: part.gradient[name] for name, part in parts.items()})
    if objective.startswith("vis") and (toy.global_guide_params or (K and toy.name not in _SUPPORTS)):
        raise ValueError(f"{objective} is not defined here for {toy.name}: it needs discrete latents of rows only")
    reach = 0.0
    if objective == "iwae" and K is not None and toy.name not in _SUPPORTS:
        reach = _reach(table(toy, params, data), K)
    with jax.enable_x64(True):
        values, x = _inputs(toy, params, data)
        value, gradient = _loss_and_gradient(toy.name, objective, K, reach)(values, x, scale)
        return Exact(float(value), {name: np.asarray(entry) for name, entry in gradient.items()})


def expected(
    toy: Toy, K: int, rows: Formula, glob: float = 1.0
) -> Exact:
    """`E_q(g)[ glob (log p(g) - log q(g)) + sum_n E rows_n ]` over K draws of each row, and its gradient.

    The masses of all K-tuples are live, so the gradient is that of the expectation. `glob` multiplies the global part.
    Discrete toys.
    """

    def value(values: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        entries = _TABLES[toy.name](values, x)
        index = np.indices((entries.log_w.shape[-1],) * K).reshape(K, -1).T
        row = _row(entries, index, jnp.full(K, -np.log(K)), jnp.ones((K, 1)), values, x)
        inner = (jnp.exp(entries.log_mass[..., index].sum(-1)) * rows(row)).sum((-1, -2))
        return (jnp.exp(entries.global_log_mass) * (glob * entries.global_log_w + inner)).sum()

    return _differentiated(value, toy, None)


def expected_at(
    toy: Toy, K: int, kinds: Mapping[str, Kind], rows: Formula, *, own: Values | None = None, epsilon: float = 0.1
) -> Exact:
    """`sum_t weight_t rows_t` over the outcomes of K draws, whose weights carry no gradient; toys of one row.

    The gradient is the expectation of a formula's own, as of self-normalised estimators. `own` are parameters of the
    formula, differentiated along.
    """
    laid_out = outcomes(toy, K, kinds, epsilon=epsilon)

    def value(values: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        entries = _TABLES[toy.name](values, x)
        log_weight = -np.log(K) * jnp.ones(entries.log_w.shape[-1])
        log_inner = jnp.zeros(entries.log_w.shape[-1])
        for name, kind in kinds.items():
            log_q = jnp.asarray(entries.parts[name][1])[0, 0]
            behind = jnp.zeros(())
            if kind == "enumerated":
                log_inner = log_inner + stop_gradient(log_q)
            if kind in ("drawn", "measured"):
                behind = log_q
            elif kind == "elsewhere":
                behind = jnp.log((1 - epsilon) * jnp.exp(log_q) + epsilon / _size(toy, name))
            log_weight = log_weight + log_q - stop_gradient(behind)
        at = laid_out.entries
        row = _row(entries, at, log_weight[at], jnp.exp(log_inner)[at].reshape(len(at), K, -1), values, x)
        return (laid_out.weight * rows(row)[0, 0]).sum()

    return _differentiated(value, toy, own)


def _row(
    entries: Table, index: np.ndarray, log_weight: jax.Array, per_draw: jax.Array, params: Params, x: jax.Array
) -> Row:
    def at(a: Array | None) -> jax.Array | None:
        return None if a is None else jnp.asarray(a[..., index] if a.ndim > 1 else a)

    parts = {name: (at(log_p), at(log_q)) for name, (log_p, log_q) in entries.parts.items()}
    log_w, log_q = (jnp.asarray(a)[..., index] for a in (entries.log_w, entries.log_mass))
    return Row(log_w, log_q, log_weight, parts, per_draw, params, x)


def _differentiated(value: Callable[..., jax.Array], toy: Toy, more: Values | None) -> Exact:
    with jax.enable_x64(True):
        values, x = _inputs(toy, {**toy.params, **(more or {})}, None)
        found, gradient = jax.value_and_grad(value)(values, x)
        return Exact(float(found), {name: np.asarray(entry) for name, entry in gradient.items()})


def log_evidence_rows(toy: Toy, params: Values | None = None, data: Values | None = None) -> np.ndarray:
    """log p(x_n) of each row [B], for toys without globals."""
    if toy.global_guide_params:
        raise ValueError(f"{toy.name} has a global latent: its rows are not independent, use log_evidence")
    values = table(toy, params, data)
    return scipy_logsumexp(values.log_mass + values.log_w, axis=-1)[0]


def log_evidence(toy: Toy, params: Values | None = None, data: Values | None = None) -> float:
    """log p(x) of all rows together, the globals summed out."""
    values = table(toy, params, data)
    rows = scipy_logsumexp(values.log_mass + values.log_w, axis=-1)
    return float(scipy_logsumexp(values.global_log_mass + values.global_log_w + rows.sum(-1)))


def gaussian_log_evidence(toy: Toy) -> float:
    """log p(x) of a linear Gaussian toy at its own parameters, from the mean and covariance of its data."""
    p = toy.model_params
    x = toy.data["x"]
    variances = {name: np.exp(2 * value) for name, value in p.items() if name.endswith("log_scale")}
    loc, covariance = np.zeros(len(x)), np.eye(len(x))
    if toy.name == "gaussians2":
        loc = loc + p["x_gain"] * (p["z2_gain"] * p["z1_loc"] + p["z2_bias"])
        above = p["z2_gain"] ** 2 * variances["z1_log_scale"] + variances["z2_log_scale"]
        covariance *= p["x_gain"] ** 2 * above + variances["x_log_scale"]
    elif toy.name == "bottom_up":
        loc = loc + p["x_gain"] * (p["z1_gain"] * p["z2_loc"] + p["z1_bias"])
        above = p["z1_gain"] ** 2 * variances["z2_log_scale"] + variances["z1_log_scale"]
        covariance *= p["x_gain"] ** 2 * above + variances["x_log_scale"]
    elif toy.name in ("conjugate_normal", "rows", "global_rows"):
        loc = loc + p.get("z_loc", 0.0)
        covariance *= variances["z_log_scale"] + variances["x_log_scale"]
        covariance += variances.get("g_log_scale", 0.0)
    elif toy.name == "linear_gaussian_factors":
        row_loc = p["z_loc"] @ p["loading"] + p["x_bias"]
        row_covariance = p["loading"].T @ p["loading"] + np.diag(variances["x_log_scale"])
        loc, covariance, x = np.tile(row_loc, len(x)), np.kron(np.eye(len(x)), row_covariance), x.ravel()
    else:
        raise ValueError(f"{toy.name} is not linear and Gaussian")
    residual = x - loc
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return float(-0.5 * (residual @ np.linalg.solve(covariance, residual) + log_det))


def tuples(toy: Toy, K: int, params: Values | None = None, data: Values | None = None) -> Tuples:
    """Every joint outcome of K draws per row and of the globals, for discrete toys, with its probability.

    Outcomes are laid out along the first axis, so that a weighted mean over an outer axis is an expectation
    without error. There are G * S ** (K * B) of them.
    """
    global_support, local_support = _SUPPORTS[toy.name]
    entries = table(toy, params, data)
    count, rows, support = entries.log_mass.shape
    index = np.indices((support,) * (K * rows)).reshape(K, rows, -1).transpose(2, 0, 1)  # [outcomes, K, B]
    masses = np.stack([entries.log_mass[g, np.arange(rows), index] for g in range(count)])
    weight = np.exp(entries.global_log_mass[:, None] + masses.sum((-1, -2))).ravel()
    values = {name: np.repeat(value, len(index), axis=0) for name, value in global_support.items()}
    for name, value in local_support.items():
        values[name] = np.tile(value[index], (count,) + (1,) * (value.ndim + 1))
    return Tuples(values, weight)


def _size(toy: Toy, name: str) -> int:
    return len(np.unique(_SUPPORTS[toy.name][1][name], axis=0))


def outcomes(toy: Toy, K: int, kinds: Mapping[str, Kind], *, epsilon: float = 0.1) -> Outcomes:
    """Every outcome of K draws of one row of one or two sites, each of a kind, as runs lay them out.

    A draw of two sites has an entry for every value of the first one; the second is drawn anew in each, and has
    entries of its own inside. Behind enumerated and measured sites the entries of a draw have the draw's probability;
    "elsewhere" is the mixture of the guide, and uniform values with probability `epsilon`.
    """
    first, *later = kinds
    rows = len(toy.data["x"])
    assert rows == 1 and len(later) < 2
    q = np.exp(table(toy).log_mass[0, 0]).reshape(_size(toy, first), -1)
    of_first, of_second = q.sum(1), q / q.sum(1, keepdims=True)
    kind = kinds[first]
    second: Kind = kinds[later[0]] if later else "drawn"

    def drawn_from(p: np.ndarray, kind: Kind) -> np.ndarray:
        return (1 - epsilon) * p + epsilon / p.shape[-1] if kind == "elsewhere" else p

    weight, base, inside, index = [], [], [], []
    starts = [-1] if kind == "enumerated" else range(len(of_first))
    for start in starts:
        entries = [start] if kind != "enumerated" else []
        entries += list(range(len(of_first))) if kind in ("enumerated", "measured") else []
        at_first = 1.0 if start < 0 else drawn_from(of_first, kind)[start]
        options = [-1] if second == "enumerated" else range(q.shape[1])
        for choice in itertools.product(options, repeat=len(entries)):
            chance = at_first
            for entry, value in zip(entries, choice, strict=True):
                chance *= 1.0 if value < 0 else drawn_from(of_second, second)[entry, value]
            weight.append(chance)
            base.append([start] * len(entries))
            inside.append(choice)
            counted = list(zip(entries, choice, strict=True))[: 1 if kind == "measured" else None]
            index.append([e * q.shape[1] + v for e, c in counted for v in (range(q.shape[1]) if c < 0 else [c])])
    draws = np.indices((len(weight),) * K).reshape(K, -1).T  # [T, K]
    repeats = {"enumerated": q.shape[1], "measured": q.shape[1] + 1}.get(second, 1)
    values = {}
    for name, numbers in zip(kinds, (base, inside), strict=False):
        if kinds[name] != "enumerated":
            chosen = np.repeat(np.asarray(numbers)[draws].reshape(len(draws), -1), repeats, axis=1)
            support = np.unique(_SUPPORTS[toy.name][1][name], axis=0)
            # One-hot values sort from the last class to the first.
            values[name] = (support[::-1] if support.ndim > 1 else support)[chosen][:, :, None]
    return Outcomes(values, np.asarray(weight)[draws].prod(1), np.asarray(index)[draws].reshape(len(draws), -1))
