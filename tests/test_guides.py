"""Families of guides on both backends: their densities against numpy and scipy, rows in mini-batches, per-row bounds.

The model has sites of every support on both sides of the data plate, so a transposed parameter or a forgotten Jacobian
shows. Jacobians here are determinants of matrices taken by complex steps or finite differences, not formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, z_scores
from oracle import log_mean_exp_by_transform
from scipy.special import expit, log_softmax, logit, logsumexp
from scipy.stats import multivariate_normal as gaussian
from scipy.stats import norm
from toys import Array, Backend, Ppl

from ppl_lvm import fit
from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.numpyro import NumPyroBound, precision
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.errors import DataError, ProgramError, RecipeError
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.score import score
from ppl_lvm.guides.amortized import amortized
from ppl_lvm.guides.auto_normal import auto_normal
from ppl_lvm.guides.delta import delta
from ppl_lvm.guides.flow import flow
from ppl_lvm.guides.low_rank import low_rank
from ppl_lvm.guides.multivariate_normal import multivariate_normal
from ppl_lvm.legality import plan
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.program import Program

on_both = pytest.mark.parametrize("backend", BACKENDS)
QUICK = {"xla_backend_optimization_level": 0}
M, K, N = 2, 3, 4
X = np.random.default_rng(0).normal(size=(N, 3))
FAMILIES: dict[str, GuideFamily] = {
    "auto_normal": auto_normal(),
    "delta": delta(),
    "multivariate_normal": multivariate_normal(),
    "low_rank": low_rank(rank=2),
    "flow": flow(hidden=(8,)),
    "amortized": amortized(hidden=(5,)),
}
GLOBAL, LOCAL = ("g", "s", "a"), ("r", "p", "u", "w")
"""Continuous sites in the order of the model."""


def mixed(ppl: Ppl, x: Array, discrete: bool) -> None:
    """Sites that are real, positive, of the unit interval and of the simplex; plates left and right of the data's."""
    dist, xp = ppl.dist, ppl.xp
    one = 0.0 * xp.sum(x) + 1.0
    left, rows = ppl.plate("left", 2, dim=-3), ppl.plate("data", len(x), dim=-2)
    right = ppl.plate("right", 3, dim=-1)
    g = ppl.sample("g", dist.Normal(xp.zeros(2) * one, one).to_event(1))
    s = ppl.sample("s", dist.Gamma(2.0 * one, one))
    with left:
        a = ppl.sample("a", dist.Gamma(2.0 * one, 3.0 * one))
    h = ppl.sample("h", dist.OneHotCategorical(probs=xp.ones(2) * one / 2)) if discrete else one * xp.ones(2)
    with rows:
        r = ppl.sample("r", dist.Normal(xp.zeros(2) * one, one).to_event(1))
        p = ppl.sample("p", dist.Dirichlet(xp.ones(3) * one))
        d = ppl.sample("d", dist.Bernoulli(probs=0.3 * one)) if discrete else one
        with right:
            u = ppl.sample("u", dist.Beta(2.0 * one, one))
            c = ppl.sample("c", dist.Categorical(probs=xp.ones(4) * one / 4)) if discrete else one
        with left, right:
            w = ppl.sample("w", dist.LogNormal(0.0 * one, one))
        with right:
            loc = g[..., 0] * r[..., 0] + p[..., 1] - u * r[..., 1] + 0.3 * d + 0.2 * c + h[..., 0] * g[..., 1]
            loc = loc + xp.sum(a * w, axis=-3, keepdims=True)[..., 0, :, :]
            ppl.sample("x", dist.Normal(loc, 0.5 + s), obs=x)


def continuous_model(ppl: Ppl, x: Array) -> None:
    mixed(ppl, x, discrete=False)


def mixed_model(ppl: Ppl, x: Array) -> None:
    mixed(ppl, x, discrete=True)


class Fitted:
    """A model with a family's guide, bound to data; NumPy arrays in and out."""

    def __init__(
        self,
        backend: Backend,
        model: Callable[..., None],
        family: GuideFamily,
        data: Mapping[str, np.ndarray],
        total: int | None = None,
    ) -> None:
        self.jax = backend == "numpyro"
        kind: Callable[..., Any] = NumPyroBound if self.jax else PyroBound
        program = Program("toy", model, family, portable=True, arguments=tuple(data))
        self.bound = kind(program, Call.of(dict(data)), seed=0, dtype="float64", total=total)
        self.batch = self.bound.batch(Call.of(dict(data)).with_rows(len(next(iter(data.values())))))
        rng = np.random.default_rng(1)
        self.params = {
            n: np.asarray(v) + 0.3 * rng.normal(size=np.shape(v)) for n, v in sorted(self.bound.initial.items())
        }

    def array(self, value: Any) -> Any:
        return jnp.asarray(value) if self.jax else torch.tensor(value)

    def constrained(self) -> dict[str, np.ndarray]:
        with precision("float64"):
            found = self.bound.constrain({n: self.array(v) for n, v in self.params.items()})
            return {n: np.asarray(v) for n, v in found.items()}

    def run(
        self,
        objective: Any,
        estimators: Mapping[str, Any],
        values: Mapping[str, np.ndarray] | None = None,
        total_rows: int | None = None,
    ) -> tuple[dict[str, dict[str, np.ndarray]], float, dict[str, np.ndarray]]:
        """The table of one run, and the loss and the gradients of another with the same values."""
        chosen = plan(objective, estimators, self.bound.structure)[0]

        def both(params: Any, key: Any, values: Any) -> Any:
            sites = self.bound.draws(params, self.batch, key, chosen, values=values).sites
            table = {n: {"value": s.value, "log_q": s.log_q, "log_p": s.log_p} for n, s in sites.items()}
            drawn = {n: s.value for n, s in sites.items() if n in values}
            found = self.bound.gradients(
                params, self.batch, key, chosen, objective, values=drawn, total_rows=total_rows
            )
            return table, found.loss, found.params

        with precision("float64"):
            params = {n: self.array(v) for n, v in self.params.items()}
            given = {n: self.array(v) for n, v in (values or {}).items()}
            if self.jax:
                found = jax.jit(both, compiler_options=QUICK)(params, jax.random.key(0), given)
            else:
                found = both(params, 0, given)
            table, loss, gradient = found
            return jax.tree.map(as_numpy, table), float(loss), jax.tree.map(as_numpy, gradient)


def as_numpy(a: Any) -> np.ndarray:
    return np.asarray(a.detach() if isinstance(a, torch.Tensor) else a)


def estimators_of(family: str) -> dict[str, Any]:
    """Score where a value cannot be turned back into its noise: discrete sites, and the low-rank normal."""
    scores = {"h": score(), "d": score(), "c": score()} if family not in ("delta", "flow") else {}
    if family == "low_rank":
        scores |= {"auto.globals": score(), "auto.rows": score()}
    return {"*": pathwise(), **scores}


OBJECTIVE = elbo(draws=K, outer=M)


@cache
def found(backend: Backend, family: str) -> tuple[Fitted, Any]:
    """A family on the model at random parameters; NumPyro's run has the values that Pyro drew."""
    model = continuous_model if family in ("delta", "flow") else mixed_model
    fitted = Fitted(backend, model, FAMILIES[family], {"x": X})
    values = {}
    if backend == "numpyro":
        sites = fitted.bound.structure.drawn()
        pyro, (table, _, _) = found("pyro", family)
        fitted.params = pyro.params
        values = {s.name: table[s.name]["value"] for s in sites if not s.point}
    return fitted, fitted.run(OBJECTIVE, estimators_of(family), values)


# Supports, and Jacobians by complex steps.


def stick(u: np.ndarray) -> np.ndarray:
    """Reals `[D]` to the simplex `[D + 1]`; zero is its centre."""
    left, parts = 1.0, []
    for i, each in enumerate(u):
        parts.append(left / (1 + np.exp(-(each - np.log(len(u) - i)))))
        left = left - parts[-1]
    return np.array([*parts, left])


def stick_inverse(z: np.ndarray) -> np.ndarray:
    left = 1 - np.concatenate([[0.0], np.cumsum(z)[:-1]])
    n = len(z) - 1
    return np.array([logit(z[i] / left[i]) + np.log(n - i) for i in range(n)])


MAPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "real": (lambda u: u, lambda z: z),
    "positive": (np.exp, np.log),
    "unit": (lambda u: 1 / (1 + np.exp(-u)), logit),
    "simplex": (stick, stick_inverse),
}
SUPPORT = {"g": "real", "s": "positive", "a": "positive", "r": "real", "p": "simplex", "u": "unit", "w": "positive"}
EVENT = {"g": 1, "r": 1, "p": 1}


def log_det(f: Callable[..., Any], u: np.ndarray) -> float:
    """`log |det df/du|`, of a simplex without its last element."""
    columns = [np.imag(f(u + 1e-30j * unit))[: len(u)] / 1e-30 for unit in np.eye(len(u))]
    return float(np.linalg.slogdet(np.array(columns))[1])


def unconstrained(name: str, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values `[..., D]` of a site, its elements flattened, to reals and the log determinant `[...]` of their map."""
    f, inverse = MAPS[SUPPORT[name]]
    lead = 3 if name in LOCAL else 1
    event = value.shape[-1] if EVENT.get(name) else 1
    parts = value.reshape(*value.shape[:lead], -1, event)
    u = np.apply_along_axis(inverse, -1, parts)
    dets = np.apply_along_axis(lambda v: np.array([log_det(f, v)]), -1, u)[..., 0].sum(-1)
    return u.reshape(*u.shape[:lead], -1), dets


def block(table: Mapping[str, Any], names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All sites of a block: `[..., D]` and the log determinant."""
    parts = [unconstrained(n, table[n]["value"]) for n in names]
    return np.concatenate([u for u, _ in parts], axis=-1), np.sum([d for _, d in parts], axis=0)


def log_q(table: Mapping[str, Any], names: tuple[str, ...]) -> np.ndarray:
    return np.sum([table[n]["log_q"] for n in names], axis=0)


def check_discrete(p: Mapping[str, np.ndarray], table: Mapping[str, Any]) -> None:
    one_hot = (table["h"]["value"] * log_softmax(p["auto.h.logits"])).sum(-1)
    np.testing.assert_allclose(table["h"]["log_q"], one_hot, atol=1e-10)
    logits, d = p["auto.d.logits"], table["d"]["value"].reshape(M, K, N, 1)
    bernoulli = np.log(np.where(d == 1, expit(logits), expit(-logits))).sum(-1)
    np.testing.assert_allclose(table["d"]["log_q"], bernoulli, atol=1e-10)
    c = table["c"]["value"].reshape(M, K, N, 3).astype(int)
    logs = np.broadcast_to(log_softmax(p["auto.c.logits"].reshape(N, 3, 4), axis=-1), (M, K, N, 3, 4))
    picked = np.take_along_axis(logs, c[..., None], -1)[..., 0].sum(-1)
    np.testing.assert_allclose(table["c"]["log_q"], picked, atol=1e-10)


@on_both
def test_log_q_of_independent_normals(backend: Backend) -> None:
    fitted, (table, _, _) = found(backend, "auto_normal")
    p = fitted.constrained()
    for name in (*GLOBAL, *LOCAL):
        u, dets = unconstrained(name, table[name]["value"])
        shape = (N, -1) if name in LOCAL else (-1,)
        loc, scale = (p[f"auto.{name}.{leaf}"].reshape(shape) for leaf in ("loc", "scale"))
        expected = norm.logpdf(u, loc, scale).sum(-1) - dets
        np.testing.assert_allclose(table[name]["log_q"], expected, atol=1e-10, err_msg=name)
    assert table["w"]["value"].shape == (M, K, N, 2, 3) and p["auto.w.loc"].shape == (N, 2, 3)
    check_discrete(p, table)


def covariances(family: str, p: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    scale = p[f"auto.{name}.scale"]
    if family == "low_rank":
        W = p[f"auto.{name}.factor"]
        return W @ np.swapaxes(W, -1, -2) + scale[..., None] ** 2 * np.eye(scale.shape[-1])
    L = scale[..., None] * (np.tril(p[f"auto.{name}.lower"], -1) + np.eye(scale.shape[-1]))
    return L @ np.swapaxes(L, -1, -2)


@on_both
@pytest.mark.parametrize("family", ["multivariate_normal", "low_rank"])
def test_log_q_of_joint_normals(backend: Backend, family: str) -> None:
    fitted, (table, _, _) = found(backend, family)
    p = fitted.constrained()
    u, dets = block(table, GLOBAL)
    joint = gaussian(p["auto.globals.loc"], covariances(family, p, "globals"))
    np.testing.assert_allclose(log_q(table, ("auto.globals", *GLOBAL)), joint.logpdf(u) - dets, atol=1e-9)
    u, dets = block(table, LOCAL)
    S = covariances(family, p, "rows")
    rows = [gaussian(p["auto.rows.loc"][n], S[n]).logpdf(u[:, :, n]) for n in range(N)]
    np.testing.assert_allclose(log_q(table, ("auto.rows", *LOCAL)), np.stack(rows, -1) - dets, atol=1e-9)
    assert np.abs(S[0] - np.diag(np.diag(S[0]))).max() > 1e-3
    check_discrete(p, table)


@on_both
def test_points_have_no_density_and_stand_where_their_parameters_are(backend: Backend) -> None:
    fitted, (table, loss, _) = found(backend, "delta")
    p = fitted.constrained()
    for name in (*GLOBAL, *LOCAL):
        u, _ = unconstrained(name, table[name]["value"])
        shape = (N, -1) if name in LOCAL else (-1,)
        expected = np.broadcast_to(p[f"auto.{name}.value"].reshape(shape), u.shape)
        np.testing.assert_allclose(u, expected, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(table[name]["log_q"], 0.0)
    joint = sum(table[n]["log_p"].mean(0).sum() for n in GLOBAL)
    joint += sum(table[n]["log_p"].mean((0, 1)).sum() for n in (*LOCAL, "x"))
    np.testing.assert_allclose(loss, -joint, rtol=1e-12)


@on_both
def test_log_q_of_the_encoder(backend: Backend) -> None:
    fitted, (table, _, _) = found(backend, "amortized")
    p = fitted.constrained()
    first, last = ([p[f"auto.encoder.layers.{i}.{leaf}"] for leaf in ("weight", "bias")] for i in (0, 1))
    code = np.tanh(X @ first[0].T + first[1]) @ last[0].T + last[1]
    at = 0
    for name in fitted.bound.structure.sites:
        if name == "x" or name in ("g", "s", "a", "h"):
            continue
        if name in ("d", "c"):
            size = 1 if name == "d" else 12
            p[f"auto.{name}.logits"] = code[:, at : at + size]
            at += size
            continue
        u, dets = unconstrained(name, table[name]["value"])
        size = u.shape[-1]
        loc, width = code[:, at : at + size], code[:, at + size : at + 2 * size]
        at += 2 * size
        expected = norm.logpdf(u, loc, 0.1 * np.exp(width)).sum(-1) - dets
        np.testing.assert_allclose(table[name]["log_q"], expected, atol=1e-10, err_msg=name)
    assert at == code.shape[1]
    check_discrete(p, table)


@on_both
def test_log_q_of_a_flow_is_that_of_its_change_of_variables(backend: Backend) -> None:
    """The map from noise to u has a Jacobian, by central differences: the noise of every draw is injected."""
    fitted, (table, _, _) = found(backend, "flow")
    step, rng = 1e-5, np.random.default_rng(3)

    def around(noise: np.ndarray) -> np.ndarray:
        """The noise, and with each element moved up, and down."""
        moves = step * np.eye(noise.shape[-1])
        moves = np.concatenate([0 * moves[:1], moves, -moves])
        return noise + moves.reshape(len(moves), *(1,) * (noise.ndim - 1), -1)

    size = {name: len(table[f"auto.{name}"]["value"].reshape(-1)) for name in ("globals", "rows")}
    size = {"globals": size["globals"] // M, "rows": size["rows"] // (M * K * N)}
    outer, draws = (1 + 2 * size[name] for name in ("globals", "rows"))
    values = {
        "auto.globals.noise": around(rng.normal(size=size["globals"])),
        "auto.rows.noise": np.stack([around(rng.normal(size=(N, 1, 1, size["rows"])))] * outer),
    }
    table, _, _ = fitted.run(elbo(draws=draws, outer=outer), {"*": pathwise()}, values)

    def expected(noise: np.ndarray, u: np.ndarray) -> float:
        D = noise.shape[-1]
        jacobian = (u[1 : 1 + D] - u[1 + D :]) / (2 * step)
        assert np.abs(jacobian - np.diag(np.diag(jacobian))).max() > 1e-3
        return float(norm.logpdf(noise).sum() - np.linalg.slogdet(jacobian)[1])

    _, dets = block(table, GLOBAL)
    density = log_q(table, ("auto.globals.noise", "auto.globals", *GLOBAL))[0]
    noise = values["auto.globals.noise"][0]
    np.testing.assert_allclose(density, expected(noise, table["auto.globals"]["value"]) - dets[0], atol=1e-7)
    _, dets = block(table, LOCAL)
    density = log_q(table, ("auto.rows.noise", "auto.rows", *LOCAL))
    noise = values["auto.rows.noise"].reshape(outer, draws, N, -1)[0, 0]
    rows = table["auto.rows"]["value"].reshape(outer, draws, N, -1)[0]
    for n in range(N):
        np.testing.assert_allclose(density[0, 0, n], expected(noise[n], rows[:, n]) - dets[0, 0, n], atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree(family: str) -> None:
    (_, (ours, loss, gradient)), (fitted, (theirs, other, others)) = found("pyro", family), found("numpyro", family)
    for name in ours:
        np.testing.assert_allclose(theirs[name]["value"], ours[name]["value"], atol=1e-10, err_msg=name)
        if ours[name]["log_q"] is not None:
            np.testing.assert_allclose(theirs[name]["log_q"], ours[name]["log_q"], atol=1e-9, err_msg=name)
    assert gradient.keys() == others.keys() == fitted.params.keys()
    for name, expected in gradient.items():
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(others[name], expected, rtol=0, atol=1e-10 * scale, err_msg=name)
        assert np.abs(expected).max() > 1e-8 or "lower" in name
    np.testing.assert_allclose(other, loss, rtol=1e-10)


# Rows: mini-batches, bounds per row.


def rows_model(ppl: Ppl, x: Array) -> None:
    """Two latents a row, the second positive."""
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        s = ppl.sample("s", ppl.dist.LogNormal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(z, s), obs=x)


X6 = np.random.default_rng(5).normal(size=6)
OF_ROWS = [n for n in FAMILIES if n != "amortized"]


@pytest.mark.parametrize(
    ("backend", "family"), [*(("pyro", name) for name in OF_ROWS), ("numpyro", "auto_normal"), ("numpyro", "low_rank")]
)
def test_a_step_moves_the_parameters_of_its_rows_only(backend: Backend, family: str) -> None:
    run = fit(rows_model_of(backend), data=X6, guide=family, backend=backend, batch_size=2, steps=1, dtype="float64")
    tables = {n: v for n, v in run.params.items() if n in run._bound.row_params}
    assert tables and all(len(v) == 6 for v in tables.values())
    moved = set()
    for name, table in tables.items():
        values, counts = np.unique(table.reshape(6, -1), axis=0, return_counts=True)
        # Every row starts at the same bits; those outside the batch still have them.
        still = values[counts.argmax()]
        assert counts.max() == 4, name
        moved.add(tuple(np.flatnonzero((table.reshape(6, -1) != still).any(1))))
    assert len(moved) == 1 and len(moved.pop()) == 2


def rows_model_of(backend: Backend) -> Program:
    return Program("rows", rows_model, None, portable=True, arguments=("x",))


def of_rows(backend: Backend, family: str, index: np.ndarray) -> Fitted:
    """Bound to these rows of six."""
    fitted = Fitted(backend, rows_model, FAMILIES[family], {"x": X6[index]}, total=6)
    fitted.batch = fitted.bound.batch(Call.of({"x": X6[index], "rows": index}))
    return fitted


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", OF_ROWS)
def test_gradients_of_a_mini_batch(backend: Backend, family: str) -> None:
    """N/B times that of all rows for the batch's own parameters, and zero for the others; order does not matter."""
    objective, estimators = elbo(draws=2), {"*": score() if family == "low_rank" else pathwise()}
    whole = of_rows(backend, family, np.arange(6))
    names = [i.name for i in whole.bound.structure.drawn() if not i.point]
    drawn, _, _ = whole.run(objective, estimators)
    values = {n: drawn[n]["value"] for n in names}
    _, loss, gradient = whole.run(objective, estimators, values)
    index = np.array([4, 1, 5, 0, 3, 2])
    turned = of_rows(backend, family, index)
    turned.params = whole.params
    _, again, other = turned.run(objective, estimators, {n: v[:, :, index] for n, v in values.items()})
    np.testing.assert_allclose(again, loss, rtol=1e-12)
    for name, expected in gradient.items():
        np.testing.assert_allclose(other[name], expected, atol=1e-10, err_msg=name)
    part = of_rows(backend, family, index[:2])
    part.params = whole.params
    _, _, few = part.run(objective, estimators, {n: v[:, :, index[:2]] for n, v in values.items()}, total_rows=6)
    for name in part.bound.row_params:
        assert (few[name][[0, 2, 3, 5]] == 0).all(), name
        assert np.abs(few[name][[1, 4]]).max() > 1e-3 or "lower" in name
        np.testing.assert_allclose(few[name][[1, 4]], 3 * gradient[name][[1, 4]], atol=1e-9, err_msg=name)


@on_both
def test_all_rows_are_a_batch_of_all_rows(backend: Backend) -> None:
    losses = [
        fit(
            rows_model_of(backend),
            data=X6,
            guide="delta",
            backend=backend,
            batch_size=size,
            steps=3,
            dtype="float64",
        ).history["loss"]
        for size in (None, 6)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)


def linear_rows_model(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.Normal(0.0 * x, 1.0))
        z2 = ppl.sample("z2", ppl.dist.Normal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(z1 + 0.5 * z2, 0.7), obs=x)


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["multivariate_normal", "low_rank", "flow"])
def test_bounds_per_row(backend: Backend, family: str) -> None:
    """IWAE-5 of three rows: the mean of 200 runs against quadrature over the noise of the engine's own weights.

    Of the quadrature, E w = p(x) in closed form shows that it is complete.
    """
    x = np.array([0.4, -1.3, 2.1])
    engine = Engine(backend, linear_rows_model, FAMILIES[family], {"x": x}, portable=True)
    rng = np.random.default_rng(7)
    for name, value in sorted(engine.bound.initial.items()):
        start = np.zeros_like(value) if ".step" in name else np.asarray(value)  # networks start at random
        shift = rng.normal(size=start.shape)
        # Wider than the posterior, so that weights have a variance and the nodes reach all of it.
        start = np.zeros_like(start) + 0.5 + 0.1 * shift if name.endswith("scale") else start + 0.3 * shift
        with engine._precision():
            engine.bound.initial[name] = engine._array(start)
    site = "auto.rows.noise" if family == "flow" else "auto.rows"
    estimators = {"*": pathwise()}
    step = 0.2
    nodes = np.arange(-8.0, 8.01, step)
    e = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    log_mass = (norm.logpdf(e).sum(-1) + 2 * np.log(step))[:, None] + np.zeros((1, 3))
    u = np.repeat(e[:, None], 3, 1)
    if family != "flow":
        p = {n: np.asarray(v) for n, v in engine.bound.constrain(engine.bound.initial).items()}
        L = np.linalg.cholesky(covariances(family, p, "rows"))
        u = p["auto.rows.loc"] + np.einsum("nij,knj->kni", L, u)
    if backend == "pyro":
        assert engine.bound.broadcasts(engine.plan(iwae(draws=5), estimators), engine.batch) == (True, True)
    sites = engine.sites(iwae(draws=len(e)), {"*": score()}, values={site: u[None]})
    log_w = sites["z1"].log_p + sites["z2"].log_p + sites["x"].log_p
    log_w = (log_w - np.sum([sites[n].log_q for n in sites if n != "x"], axis=0))[0]
    evidence = norm.logpdf(x, 0.0, np.sqrt(1.25 + 0.49))
    np.testing.assert_allclose(logsumexp(log_mass + log_w, axis=0), evidence, rtol=0, atol=1e-9)
    with jax.enable_x64(True):
        bound = np.asarray(log_mean_exp_by_transform(jnp.asarray(log_mass.T), jnp.asarray(log_w.T), 5, 20.0))
    assert (bound < evidence).all()
    found = engine.loss(iwae(draws=5), estimators, runs=200)
    assert abs(z_scores(-found.value, bound.sum())) < 4.5


# Refusals.


def counts_model(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x)):
        k = ppl.sample("k", ppl.dist.Poisson(1.0 + 0.0 * x))
        ppl.sample("x", ppl.dist.Normal(1.0 * k, 1.0), obs=x)


def parts_model(ppl: Ppl, x: Array) -> None:
    with ppl.plate("parts", 10, subsample_size=3, dim=-2):
        w = ppl.sample("w", ppl.dist.Normal(0.0 * x[:1], 1.0))
    with ppl.plate("data", len(x), dim=-1):
        ppl.sample("x", ppl.dist.Normal(ppl.xp.sum(w), 1.0), obs=x)


def global_model(ppl: Ppl, x: Array) -> None:
    g = ppl.sample("g", ppl.dist.Normal(0.0 * ppl.xp.sum(x), 1.0))
    with ppl.plate("data", len(x)):
        ppl.sample("x", ppl.dist.Normal(g, 1.0), obs=x)


@pytest.mark.parametrize(("backend", "family"), [*(("pyro", name) for name in FAMILIES), ("numpyro", "auto_normal")])
def test_what_families_refuse(backend: Backend, family: str) -> None:
    with pytest.raises(ProgramError, match=r"Bernoulli, Categorical or OneHotCategorical; 'k' is Poisson.*sum it out"):
        Fitted(backend, counts_model, FAMILIES[family], {"x": X6})
    words = f"Guide '{family}' has no parameters for site 'w' in plate 'parts', which is subsampled .3 of 10."
    with pytest.raises(ProgramError, match=words):
        Fitted(backend, parts_model, FAMILIES[family], {"x": X6})


@on_both
def test_what_single_families_refuse(backend: Backend) -> None:
    with pytest.raises(ProgramError, match=r"'amortized' encodes .* sites .'g'. are outside a data plate.*auto_normal"):
        Fitted(backend, global_model, FAMILIES["amortized"], {"x": X6})
    with pytest.raises(ProgramError, match="'delta' cannot move the discrete site 'h'; sum it out"):
        Fitted(backend, mixed_model, FAMILIES["delta"], {"x": X})


def test_an_unknown_family_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"(?s)auto_norml.*auto_normal"):
        fit(Program("rows", rows_model, None, portable=True, arguments=("x",)), data=X6, guide="auto_norml", steps=1)


@on_both
def test_parameters_of_rows_say_nothing_of_new_rows(backend: Backend) -> None:
    run = fit(rows_model_of(backend), data=X6, guide="auto_normal", backend=backend, steps=1)
    with pytest.raises(DataError, match=r"'auto.s.loc'.*entry for every row.*refit"):
        run.log_likelihood(X6[:3], draws=2)
    assert np.isfinite(run.log_likelihood(draws=2).mean)


# Native programs that ask for the row indices.


@on_both
def test_native_programs_get_the_indices_of_their_rows(backend: Backend) -> None:
    """Row n has data n, and an offset of its own that only its index can pick."""
    ppl, dist = import_module(backend), import_module(f"{backend}.distributions")
    xp = import_module("torch" if backend == "pyro" else "jax.numpy")
    data = np.arange(6.0)

    def model(x: Array, rows: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Normal(0.0 * x, 1.0))
            ppl.sample("x", dist.Normal(z + x - 1.0 * rows, 1.0), obs=x)
            ppl.factor("right", -1e6 * (x - rows) ** 2)

    def guide(x: Array, rows: Array) -> None:
        loc = ppl.param("loc", xp.zeros(6) if backend == "numpyro" else torch.zeros(6, dtype=torch.float64))
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.Normal(loc[rows], 1.0))

    run = fit(model, guide, data, "elbo", batch_size=2, steps=9, learning_rate=0.1, dtype="float64")
    # One wrong index would cost a million nats.
    assert np.abs(run.history["loss"]).max() < 100.0
    assert (run.params["loc"] != 0).all() and run.params["loc"].shape == (6,)
