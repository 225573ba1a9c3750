"""Neural sequence models: exact where they are linear, by hand where they are not, one value on both backends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import BACKENDS
from scipy.linalg import block_diag
from scipy.special import expit
from scipy.stats import multivariate_normal, norm
from toys import Backend, Ppl

from ppl_lvm import data, fit, legality
from ppl_lvm.algorithm import Objective
from ppl_lvm.backends.base import Call, losses
from ppl_lvm.backends.hiding import Hiding
from ppl_lvm.backends.numpyro import NumPyroBound, precision
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.errors import ProgramError, RecipeError
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import Program, program
from ppl_lvm.recipe import recipe

Arrays = dict[str, np.ndarray]
on_both = pytest.mark.parametrize("backend", BACKENDS)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5, 3))
HOLES = np.zeros((3, 5), dtype=bool)
HOLES[0, 1:3], HOLES[1, 4], HOLES[2, 0] = True, True, True
WITH_HOLES = np.where(HOLES[..., None], np.nan, X)


class Run:
    """A program on data as a user gives them, at chosen parameters, in float64; arrays come back as NumPy's."""

    def __init__(self, backend: Backend, asked: Program, given: object) -> None:
        self.jax = backend == "numpyro"
        call = data.read(given, asked, "mask")
        with precision("float64"):
            self.bound: Any = (NumPyroBound if self.jax else PyroBound)(asked, call, seed=0, dtype="float64")
            self.batch = self.bound.batch(call)
        self.params = dict(self.bound.initial)

    def set(self, values: Mapping[str, Any]) -> Run:
        assert self.params.keys() == values.keys()
        for name, value in values.items():
            transform = self.bound._transforms[name]
            with precision("float64"):
                array = (jnp.asarray if self.jax else torch.as_tensor)(np.asarray(value, dtype=float))
                self.params[name] = (transform._inverse if self.jax else transform.inv)(array)
        return self

    def constrained(self) -> Arrays:
        with precision("float64"):
            return {n: self._numpy(self.bound._transforms[n](v)) for n, v in self.params.items()}

    def table(self, draws: int, values: Arrays | None = None, objective: Objective | None = None) -> Arrays:
        """Values of sites, their densities and log weights `[1, draws, rows, ...]`, and the loss."""
        chosen = objective or elbo(draws=draws)
        plan = legality.plan(chosen, {"*": pathwise()}, self.bound.structure)[0]

        def run(params: Any, key: Any, given: Any) -> dict[str, Any]:
            found = self.bound.draws(params, self.batch, key, plan, values=given)
            sites = {n: s.value for n, s in found.sites.items()}
            log_p = {f"log_p({n})": s.log_p for n, s in found.sites.items() if s.log_p is not None}
            log_q = {f"log_q({n})": s.log_q for n, s in found.sites.items() if s.log_q is not None}
            return {**sites, **log_p, **log_q, "log_w": found.log_w, "loss": losses(found, chosen, plan)[0]}

        with precision("float64"):
            if self.jax:
                laid = {n: jnp.asarray(v) for n, v in (values or {}).items()}
                compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
                return {n: self._numpy(v) for n, v in compiled(self.params, jax.random.key(1), laid).items()}
            tensors = {n: torch.as_tensor(v) for n, v in (values or {}).items()}
            return {n: self._numpy(v) for n, v in run(self.params, 1, tensors).items()}

    def _numpy(self, a: Any) -> np.ndarray:
        return np.asarray(a.detach() if isinstance(a, torch.Tensor) else a)


def system(D: int = 2, F: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    A = 0.7 * rng.normal(size=(D, D))
    return {
        **{"A": A, "b": rng.normal(size=D), "q": rng.uniform(0.3, 1.0, D), "m": rng.normal(size=D)},
        **{"C": rng.normal(size=(F, D)), "d": rng.normal(size=F), "scale": rng.uniform(0.5, 1.5, F)},
    }


def evidence(p: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """`log p(x)` of every row by the joint Gaussian of all its numbers; NaN are left out."""
    D, T = len(p["m"]), x.shape[1]
    mean, moved = [p["m"]], np.zeros((T * D, T * D))
    for _ in range(1, T):
        mean.append(p["A"] @ mean[-1] + p["b"])
    for t in range(T):  # z is `moved` times independent noise
        for s in range(t + 1):
            moved[t * D : (t + 1) * D, s * D : (s + 1) * D] = np.linalg.matrix_power(p["A"], t - s)
    spread = moved @ block_diag(np.eye(D), *[np.diag(p["q"])] * (T - 1)) @ moved.T
    wide = np.kron(np.eye(T), p["C"])
    loc = wide @ np.concatenate(mean) + np.tile(p["d"], T)
    cov = wide @ spread @ wide.T + np.diag(np.tile(p["scale"] ** 2, T))
    rows = []
    for row in x.reshape(len(x), -1):
        seen = np.flatnonzero(~np.isnan(row))
        rows.append(multivariate_normal(loc[seen], cov[np.ix_(seen, seen)]).logpdf(row[seen]))
    return np.array(rows)


def exact(p: Mapping[str, np.ndarray], potential: str, precision: str) -> Arrays:
    """Parameters of a linear `svae_lds` whose potentials are `N(x_t; C z_t + d, diag(scale^2))` as functions of z_t."""
    D = len(p["m"])
    scaled = p["C"].T / p["scale"] ** 2
    matrix, vector = scaled @ p["C"], scaled
    if potential == "mean":
        matrix = np.linalg.inv(matrix)
        vector = matrix @ scaled
    L = np.linalg.cholesky(matrix)
    raw = L - np.diag(np.diag(L)) + np.diag(np.log(np.expm1(np.diag(L) - 1e-4)))
    of_network, own = (raw.ravel(), {}) if precision == "each" else (np.zeros(0), {"L": L})
    weight = np.zeros((D + len(of_network), 2 * p["C"].shape[0]))
    weight[:D, : p["C"].shape[0]] = vector
    return {
        **{n: p[n] for n in ("A", "b", "q", "m", "scale")},
        **{"decoder.layers.0.weight": p["C"], "decoder.layers.0.bias": p["d"]},
        **{"recognition.layers.0.weight": weight},
        "recognition.layers.0.bias": np.concatenate([-vector @ p["d"], of_network]),
        **own,
    }


@pytest.mark.parametrize(
    ("backend", "potential", "precision", "x"),
    [
        ("pyro", "natural", "each", WITH_HOLES),
        ("numpyro", "natural", "each", WITH_HOLES),
        ("pyro", "mean", "each", X),
        pytest.param("numpyro", "mean", "each", X, marks=pytest.mark.slow),
        ("pyro", "mean", "shared", X),
        ("numpyro", "mean", "shared", X),
        ("pyro", "natural", "shared", WITH_HOLES),
        pytest.param("numpyro", "natural", "shared", WITH_HOLES, marks=pytest.mark.slow),
    ],
)
def test_a_linear_svae_with_the_right_potentials_has_the_evidence(
    backend: Backend, potential: str, precision: str, x: np.ndarray
) -> None:
    """Program to objective; frames that are missing are as if they had been dropped."""
    asked = program("svae_lds", hidden=(), potential=potential, precision=precision)
    run = Run(backend, asked, x).set(exact(system(), potential, precision))
    table, expected = run.table(draws=2), evidence(system(), x)
    np.testing.assert_allclose(table["log_w"][0], np.broadcast_to(expected, (2, 3)), rtol=0, atol=1e-10)
    np.testing.assert_allclose(table["loss"], -expected.sum(), rtol=0, atol=1e-10)


# Steps hidden in training.


@pytest.mark.parametrize("library", [torch, jnp], ids=["torch", "jax"])
def test_a_window_is_hidden_of_every_row_and_nothing_else(library: Any) -> None:
    rng = np.random.default_rng(7)
    mask = rng.uniform(size=(200, 6, 2)) < 0.7
    uniform = np.concatenate([[0.0, 1.0 - 2.0**-24], rng.uniform(size=198)]).astype(np.float32)
    hiding = Hiding({"x": 2}, program("svae_lds"))
    call = Call((library.asarray(X),), {"x_mask": library.asarray(mask), "x?": library.asarray(mask)})
    found = hiding.hidden(call, lambda name, like: library.asarray(uniform))
    assert found.args[0] is call.args[0] and found.kwargs["x?"] is call.kwargs["x?"]
    after = np.asarray(found.kwargs["x_mask"])
    first = np.minimum((uniform * 5).astype(int), 4)
    expected = mask.copy()
    for row, at in zip(expected, first, strict=True):
        row[at : at + 2] = False
    np.testing.assert_array_equal(after, expected)
    assert {*first} == {0, 1, 2, 3, 4} and after.dtype == bool
    assert Hiding({}, program("svae_lds")).hidden(call, lambda name, like: like) is call


@on_both
def test_hidden_steps_change_every_training_step_and_nothing_afterwards(backend: Backend) -> None:
    """Without learning the loss moves with the window alone, as the guide is the posterior given what it is told of."""

    def model(ppl: Ppl, x: Any, x_mask: Any) -> None:
        loc = ppl.param("loc", 0.5)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(loc, 1.0))
            ppl.sample("x", ppl.dist.Normal(z[..., None], 1.0).expand([*z.shape, 5]).to_event(1), obs=x)

    def guide(ppl: Ppl, x: Any, x_mask: Any) -> None:
        loc, known = ppl.param("loc", 0.5), 1.0 * x_mask
        precision = 1.0 + known.sum(-1)
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal((loc + (known * x).sum(-1)) / precision, 1.0 / ppl.xp.sqrt(precision)))

    toy = Program("toy", model, guide, portable=True, arguments=("x", "x_mask"))
    x = X[..., 0]
    settings: dict[str, Any] = {"data": x, "backend": backend, "recipe": "elbo", "learning_rate": 0.0, "steps": 4}
    settings |= {"dtype": "float64", "progress_bar": False}
    hide: dict[str, Any] = {"hide": {"x": 2}, **settings}
    exact = multivariate_normal(np.full(5, 0.5), np.eye(5) + 1.0).logpdf(x)
    for mode in ("compiled",) if backend == "numpyro" else ("eager", "graph"):
        seen, hidden = fit(toy, compile=mode, **settings), fit(toy, compile=mode, **hide)
        # The guide that sees all is the posterior. The other's bound is loose, and differs from step to step.
        np.testing.assert_allclose(seen.history["loss"], -exact.mean(), rtol=0, atol=1e-10)
        assert (np.abs(hidden.history["loss"] + exact.mean()) > 1e-3).all() and np.ptp(hidden.history["loss"]) > 1e-3
        np.testing.assert_allclose(hidden.log_likelihood(draws=2).values, exact, rtol=0, atol=1e-10)
        np.testing.assert_array_equal(hidden.history["loss"], fit(toy, compile=mode, **hide).history["loss"])


def test_what_cannot_be_hidden_is_refused() -> None:
    def refused(name: str, match: str, hide: dict[str, int]) -> None:
        with pytest.raises(ProgramError, match=match):
            fit(name, data=X, recipe="elbo", hide=hide)

    refused("lds", r"hides 2 steps of 'x', but program 'lds' has no argument 'x_mask'", {"x": 2})
    refused("svae_lds", r"hides 5 steps of 'x', whose rows have 5 steps", {"x": 5})
    refused("svae_lds", "hides 2 steps of 'y'", {"y": 2})
    with pytest.raises(RecipeError, match="hide"):
        recipe("elbo", hide={"x": 0})
    assert recipe(recipe("elbo", hide={"x": 3}).to_dict()).hide == {"x": 3}


# By hand.

MASK = np.where(HOLES[..., None], 0.0, 1.0) * (np.random.default_rng(5).uniform(size=X.shape) < 0.9)


def random_params(run: Run, seed: int = 4) -> dict[str, np.ndarray]:
    """Values for every parameter; positive ones positive."""
    rng = np.random.default_rng(seed)
    shapes = {n: v.shape for n, v in sorted(run.constrained().items())}
    p = {n: rng.uniform(0.3, 1.2, s) if n in ("scale", "q") else 0.5 * rng.normal(size=s) for n, s in shapes.items()}
    return p | ({"L": np.tril(p["L"], -1) + np.diag(np.exp(np.diag(p["L"])))} if "L" in p else {})


def mlp(p: Mapping[str, np.ndarray], name: str, x: np.ndarray, relu: bool = False) -> np.ndarray:
    layers = sum(n.startswith(f"{name}.layers.") for n in p) // 2
    for i in range(layers):
        x = x @ p[f"{name}.layers.{i}.weight"].T + p[f"{name}.layers.{i}.bias"]
        if i < layers - 1:
            x = np.maximum(x, 0.0) if relu else np.tanh(x)
    return x


def linear(p: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def gru(p: Mapping[str, np.ndarray], name: str, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    a, c = x @ p[f"{name}.weight_ih"].T + p[f"{name}.bias"], h @ p[f"{name}.weight_hh"].T
    (ar, au, an), (cr, cu, cn) = np.split(a, 3, -1), np.split(c, 3, -1)
    u = expit(au + cu)
    return (1 - u) * np.tanh(an + expit(ar + cr) * (cn + p[f"{name}.bias_n"])) + u * h


def softplus(a: np.ndarray) -> np.ndarray:
    return np.logaddexp(a, 0.0) + 1e-4


def by_deep_kalman_filter(p: Mapping[str, np.ndarray], z: np.ndarray, seen: np.ndarray) -> tuple[Any, ...]:
    state, read = np.zeros((len(X), 4)), {}
    for t in reversed(range(X.shape[1])):
        state = read[t] = gru(p, "backwards", seen[:, t], state)
    log_p_z, log_p_x, log_q = 0.0, 0.0, 0.0
    for t in range(X.shape[1]):
        before = z[:, t - 1] if t else np.broadcast_to(p["start"], z[:, 0].shape)
        g, h = expit(mlp(p, "gate", before, relu=True)), mlp(p, "proposed", before, relu=True)
        scale = softplus(linear(p, "spread", np.maximum(h, 0.0)))
        log_p_z += norm.logpdf(z[:, t], (1 - g) * linear(p, "linear", before) + g * h, scale).sum(-1)
        log_p_x += (MASK[:, t] * norm.logpdf(X[:, t], mlp(p, "decoder", z[:, t]), p["scale"])).sum(-1)
        before = z[:, t - 1] if t else np.broadcast_to(p["guide_start"], z[:, 0].shape)
        loc, raw = np.split(linear(p, "code", (np.tanh(linear(p, "combiner", before)) + read[t]) / 2), 2, -1)
        log_q += norm.logpdf(z[:, t], loc, softplus(raw)).sum(-1)
    return log_p_z, log_p_x, log_q


def by_vrnn(p: Mapping[str, np.ndarray], z: np.ndarray, seen: np.ndarray) -> tuple[Any, ...]:
    h, log_p_z, log_p_x, log_q = np.zeros((len(X), 4)), 0.0, 0.0, 0.0
    for t in range(X.shape[1]):
        loc, raw = np.split(mlp(p, "prior", h), 2, -1)
        log_p_z += norm.logpdf(z[:, t], loc, softplus(raw)).sum(-1)
        out = mlp(p, "decoder", np.concatenate([z[:, t], h], -1))
        log_p_x += (MASK[:, t] * norm.logpdf(X[:, t], out, p["scale"])).sum(-1)
        loc, raw = np.split(mlp(p, "encoder", np.concatenate([seen[:, t], h], -1)), 2, -1)
        log_q += norm.logpdf(z[:, t], loc, softplus(raw)).sum(-1)
        h = gru(p, "gru", np.concatenate([seen[:, t], z[:, t]], -1), h)
    return log_p_z, log_p_x, log_q


BY_HAND = {"deep_kalman_filter": by_deep_kalman_filter, "vrnn": by_vrnn}


@on_both
@pytest.mark.parametrize("name", BY_HAND)
def test_densities_of_the_rivals(name: str, backend: Backend) -> None:
    """log p(z), log p(x) and log q(z) of whole sequences, entries and frames of which are missing, by a loop."""
    run = Run(backend, program(name, hidden=(5,), width=4), np.where(MASK > 0, X, np.nan))
    p = random_params(run)
    table = run.set(p).table(draws=2)
    seen = np.concatenate([MASK * X, MASK], -1)
    for k in range(2):
        expected = BY_HAND[name](p, table["z"][0, k], seen)
        for of, value in zip(("log_p(z)", "log_p(x)", "log_q(z)"), expected, strict=True):
            np.testing.assert_allclose(table[of][0, k], value, rtol=0, atol=1e-10, err_msg=of)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"potential": "natural", "likelihood": "bernoulli"}, marks=pytest.mark.slow),
        {"precision": "shared"},
        pytest.param({"posterior": "mean_field"}, marks=pytest.mark.slow),
        pytest.param({"posterior": "gauss_markov"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_both_backends_have_one_structured_vae(options: dict[str, Any]) -> None:
    """Densities of given values at given parameters, with entries and frames missing."""
    x = np.where(MASK > 0, (X > 0) if "likelihood" in options else X, np.nan)
    runs = [Run(b, program("svae_lds", hidden=(5,), **options), x) for b in BACKENDS]
    p, z = random_params(runs[0]), np.random.default_rng(6).normal(size=(1, 2, 3, 5, 2))
    pyro, numpyro = (run.set(p).table(draws=2, values={"z": z}) for run in runs)
    for of in ("log_p(z)", "log_p(x)", "log_q(z)", "log_w"):
        np.testing.assert_allclose(pyro[of], numpyro[of], rtol=0, atol=1e-10, err_msg=of)


def test_a_gauss_markov_guide_is_a_mean_field_one_of_what_steps_add() -> None:
    """With one transition A for all steps, q(z) is the mean field density of `z_t - A (z_{t-1} - mean_{t-1})`."""
    x = np.where(MASK > 0, X, np.nan)
    single, chained = (
        Run("pyro", program("svae_lds", hidden=(5,), posterior=posterior), x)
        for posterior in ("mean_field", "gauss_markov")
    )
    p, A = random_params(single), np.array([[0.5, -0.4], [0.2, 0.6]])
    raw = A / np.sqrt(1.0 - (A**2).sum())
    weight, bias = p["recognition.weight"], p["recognition.bias"]
    with_A = {"recognition.weight": np.concatenate([weight, np.zeros((4, weight.shape[1]))])}
    with_A |= {"recognition.bias": np.concatenate([bias, raw.ravel()])}
    single.set(p)
    with precision("float64"):
        mean = single.bound.guide_distributions(single.params, single.batch, ["z"])["z"]["fn"].mean.detach().numpy()
    z = np.random.default_rng(6).normal(size=(1, 2, *mean.shape))
    from_before = (z - mean)[..., :-1, :] @ A.T
    added = z - np.concatenate([0 * z[..., :1, :], from_before], axis=-2)
    found = chained.set({**p, **with_A}).table(draws=2, values={"z": z})["log_q(z)"]
    expected = single.table(draws=2, values={"z": added})["log_q(z)"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
