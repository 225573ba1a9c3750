"""Where parts of the engine meet programs out of the ordinary: masks, scales, nested plates, the program's own
mini-batches, several global draws, factors, integers. On both backends, against hand computation in numpy.

Noise is injected, so a bound is a number, and its gradient that of the same formula: numpy's, by a complex step, which
is exact to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import numpy as np
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from _pytest.mark import ParameterSet
from harness import BACKENDS, Engine, Loss, assert_unbiased
from toys import GLOBAL_ROWS, ROWS, Array, Backend, Ppl, Values, native_rows

from ppl_lvm import fit
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.numpyro import NumPyroBound, precision
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.backends.structure import Plan
from ppl_lvm.errors import LegalityError, ProgramError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.trajectory_balance import trajectory_balance
from ppl_lvm.program import Program, program

TO_ROUNDING = 1e-10


def slow(*cell: object) -> ParameterSet:
    """A cell that repeats what another shows; NumPyro takes seconds to compile each."""
    return pytest.param(*cell, marks=pytest.mark.slow)


on_both = pytest.mark.parametrize("backend", BACKENDS)
Numbers = Mapping[str, Any]


# Hand computation.


def normal(x: Any, loc: Any, scale: Any) -> Any:
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def bernoulli(x: Any, logits: Any) -> Any:
    return x * logits - np.log1p(np.exp(logits))


def log_mean_exp(h: Any, axis: int) -> Any:
    """Without the shift by the largest entry, through which a complex step would not pass."""
    return np.log(np.exp(h).mean(axis))


def differentiated(f: Callable[[Numbers], Any], params: Values) -> Loss:
    """f and its gradient: the imaginary part of f a tiny imaginary step away."""
    gradient = {}
    for name, value in params.items():
        gradient[name] = np.zeros(np.shape(value))
        for at in np.ndindex(np.shape(value)):
            moved = np.array(value, dtype=complex)
            moved[at] += 1e-30j
            gradient[name][at] = f({**params, name: moved}).imag / 1e-30
    return Loss(np.asarray(f(params)), gradient)


def assert_equal(found: Loss, expected: Loss) -> None:
    np.testing.assert_allclose(found.value, expected.value, rtol=0, atol=TO_ROUNDING)
    assert found.gradient.keys() == expected.gradient.keys()
    for name, gradient in expected.gradient.items():
        np.testing.assert_allclose(found.gradient[name], gradient, rtol=0, atol=TO_ROUNDING, err_msg=name)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


class Native:
    """The libraries' common words, so that one text makes a native program of either."""

    def __init__(self, backend: Backend) -> None:
        library = import_module(backend)
        handlers = import_module("pyro.poutine" if backend == "pyro" else "numpyro.handlers")
        self.xp: Any = import_module("torch" if backend == "pyro" else "jax.numpy")
        self.dist: Any = import_module(f"{backend}.distributions")
        self.sample, self.plate, self.factor = library.sample, library.plate, library.factor
        self.deterministic = library.deterministic
        self.mask, self.scale = handlers.mask, handlers.scale
        self._param = library.param

    def param(self, name: str, value: Any) -> Array:
        return self._param(name, self.array(value))

    def array(self, value: Any) -> Array:
        return self.xp.asarray(np.asarray(value))


def native(
    backend: Backend,
    model: Callable[..., None],
    guide: Callable[..., None],
    data: Values,
    data_plate: str | None = None,
) -> Engine:
    words = Native(backend)
    return Engine(
        backend, lambda x: model(words, x), lambda x: guide(words, x), data, portable=False, data_plate=data_plate
    )


def portable(
    backend: Backend,
    model: Callable[..., None],
    guide: Callable[..., None],
    data: Values,
    data_plate: str | None = None,
) -> Engine:
    return Engine(backend, model, guide, data, portable=True, data_plate=data_plate)


# Masks: rows x columns with holes; the last row has no cell, and the second row no latent.

CELLS = np.array([[0.3, -0.7, 1.2, 0.1], [0.5, 0.9, -1.1, 0.4], [1.5, -0.2, 0.8, -0.6]])
HOLES = np.array([[True, False, True, True], [True, True, True, False], [False, False, False, False]])
SEEN = np.array([True, False, True])
MASKED = {"log_scale": np.array(-0.2), "loc": np.array(0.3), "gain": np.array([0.4, -0.1, 0.2, 0.3])}


def masked_model(how: str) -> Callable[..., None]:
    def model(ppl: Any, x: Array) -> None:
        scale = ppl.xp.exp(ppl.param("log_scale", MASKED["log_scale"]))
        holes = ppl.array(HOLES)
        with ppl.plate("rows", len(x), dim=-2):
            with ppl.mask(mask=ppl.array(SEEN[:, None])):
                z = ppl.sample("z", ppl.dist.Normal(0.0, scale))
            if how == "event":
                cells = ppl.dist.Normal(z[..., None], scale).expand((*z.shape, 4)).mask(holes[:, None, :]).to_event(1)
                ppl.sample("x", cells, obs=x[:, None, :])
                return
            with ppl.plate("columns", x.shape[1], dim=-1):
                if how == "handler":
                    with ppl.mask(mask=holes):
                        ppl.sample("x", ppl.dist.Normal(z, scale), obs=x)
                else:
                    ppl.sample("x", ppl.dist.Normal(z, scale).mask(holes), obs=x)

    return model


def masked_guide(ppl: Any, x: Array) -> None:
    loc, gain = ppl.param("loc", MASKED["loc"]), ppl.param("gain", MASKED["gain"])
    with ppl.plate("rows", len(x), dim=-2), ppl.mask(mask=ppl.array(SEEN[:, None])):
        ppl.sample("z", ppl.dist.Normal(loc + (x @ gain)[:, None], 0.7))


def masked_log_w(p: Numbers, eps: np.ndarray) -> tuple[Any, Any, Any]:
    """Log prior, log likelihood and log q of the rows."""
    loc, scale = p["loc"] + CELLS @ p["gain"], np.exp(p["log_scale"])
    z = loc + 0.7 * eps
    prior, log_q = (np.where(SEEN, h, 0.0) for h in (normal(z, 0.0, scale), normal(z, loc, 0.7)))
    return prior, np.where(HOLES, normal(CELLS, z[..., None], scale), 0.0).sum(-1), log_q


@pytest.mark.parametrize("how", ["handler", slow("distribution"), slow("event")])
@on_both
def test_masked_cells_and_rows(backend: Backend, how: str) -> None:
    engine = native(backend, masked_model(how), masked_guide, {"x": CELLS})
    assert engine.structure.data_plate == "rows"
    eps = noise(1, 4, 3)
    z = MASKED["loc"] + CELLS @ MASKED["gain"] + 0.7 * eps
    values = {"z": z[..., None]}
    prior, likelihood, log_q = masked_log_w(MASKED, eps)
    table = engine.sites(iwae(draws=4), {"z": pathwise()}, values=values)
    for found, expected in ((table["z"].log_p, prior), (table["x"].log_p, likelihood), (table["z"].log_q, log_q)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TO_ROUNDING)
    np.testing.assert_array_equal(table["x"].log_p[..., 2], 0.0)
    np.testing.assert_array_equal(table["z"].log_q[..., 1], 0.0)

    def loss(p: Numbers) -> Any:
        prior, likelihood, log_q = masked_log_w(p, eps)
        return -log_mean_exp(prior + likelihood - log_q, 1).sum()

    found = engine.loss(iwae(draws=4), {"z": pathwise()}, values=values)
    assert_equal(found, differentiated(loss, MASKED))


# An inner plate: a latent per row, a latent per cell.

NESTED = {
    "log_s": np.array(-0.1), "log_t": np.array(0.2), "a": np.array(0.3), "b": np.array([0.2, -0.4]), "c": np.array(0.5)
}  # fmt: skip
GRID = np.array([[0.3, -0.7], [0.5, 0.9], [1.5, -0.2]])


def nested_model(ppl: Ppl, x: Array) -> None:
    s, t = ppl.xp.exp(ppl.param("log_s", NESTED["log_s"])), ppl.xp.exp(ppl.param("log_t", NESTED["log_t"]))
    with ppl.plate("rows", x.shape[0], dim=-2):
        z = ppl.sample("z", ppl.dist.Normal(0.0, s))
        with ppl.plate("columns", x.shape[1], dim=-1):
            w = ppl.sample("w", ppl.dist.Normal(0.5 * z, t))
            ppl.sample("x", ppl.dist.Normal(z + w, s), obs=x)


def nested_guide(ppl: Ppl, x: Array) -> None:
    a, b, c = (ppl.param(n, NESTED[n]) for n in "abc")
    with ppl.plate("rows", x.shape[0], dim=-2):
        z = ppl.sample("z", ppl.dist.Normal(a + (x @ b)[:, None], 0.6))
        with ppl.plate("columns", x.shape[1], dim=-1):
            ppl.sample("w", ppl.dist.Normal(c * x - 0.2 * z, 0.9))


def nested_terms(p: Numbers, eps_z: np.ndarray, eps_w: np.ndarray, at: Values | None = None) -> dict[str, Any]:
    """Densities of noise, or of fixed values `at`, before any sum: z `[..., B, 1]`, w and x `[..., B, C]`."""
    s, t = np.exp(p["log_s"]), np.exp(p["log_t"])
    z_loc = p["a"] + (GRID @ p["b"])[:, None]
    z = z_loc + 0.6 * eps_z if at is None else at["z"]
    w_loc = p["c"] * GRID - 0.2 * z
    w = w_loc + 0.9 * eps_w if at is None else at["w"]
    return {
        **{"z": z, "w": w, "p_z": normal(z, 0.0, s), "q_z": normal(z, z_loc, 0.6), "p_w": normal(w, 0.5 * z, t)},
        **{"q_w": normal(w, w_loc, 0.9), "p_x": normal(GRID, z + w, s)},
    }


def nested_noise(K: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    eps_z, eps_w = noise(1, K, 3, 1), noise(1, K, 3, 2)
    terms = nested_terms(NESTED, eps_z, eps_w)
    return eps_z, eps_w, {"z": terms["z"], "w": terms["w"]}


@on_both
def test_an_inner_plate_is_summed_into_its_row(backend: Backend) -> None:
    engine = portable(backend, nested_model, nested_guide, {"x": GRID})
    structure = engine.structure
    assert (structure.data_plate, structure.rows, structure.nesting, structure.plate_dim) == ("rows", 3, 2, -2)
    assert [p.name for p in structure.sites["w"].plates] == ["rows", "columns"]
    eps_z, eps_w, values = nested_noise(3)
    table = engine.sites(iwae(draws=3), {"*": pathwise()}, values=values)
    terms = nested_terms(NESTED, eps_z, eps_w)
    for site, log_p, log_q in (("z", "p_z", "q_z"), ("w", "p_w", "q_w"), ("x", "p_x", None)):
        np.testing.assert_allclose(table[site].log_p, terms[log_p].sum(-1), rtol=0, atol=TO_ROUNDING)
        if log_q is not None:
            np.testing.assert_allclose(table[site].log_q, terms[log_q].sum(-1), rtol=0, atol=TO_ROUNDING)
    assert table["z"].value.shape == (1, 3, 3, 1) and table["w"].value.shape == (1, 3, 3, 2)

    def loss(p: Numbers) -> Any:
        t = nested_terms(p, eps_z, eps_w)
        log_w = (t["p_z"] - t["q_z"])[..., 0] + (t["p_w"] - t["q_w"] + t["p_x"]).sum(-1)
        return -log_mean_exp(log_w, 1).sum()

    assert_equal(engine.loss(iwae(draws=3), {"*": pathwise()}, values=values), differentiated(loss, NESTED))


@on_both
def test_the_score_of_an_inner_plate(backend: Backend) -> None:
    """Each element's score times what is downstream of it: the row for a site of the row, its column for one of it."""
    engine = portable(backend, nested_model, nested_guide, {"x": GRID})
    eps_z, eps_w, values = nested_noise(2)

    def loss(p: Numbers) -> Any:
        t, fixed = nested_terms(p, eps_z, eps_w, values), nested_terms(NESTED, eps_z, eps_w)
        rows = {n: t[f"p_{n}"].sum(-1) - t[f"q_{n}"].sum(-1) for n in "zw"} | {"x": t["p_x"].sum(-1)}
        of_z, of_w = (t[f"q_{n}"] - fixed[f"q_{n}"] for n in "zw")
        columns = fixed["p_w"] - fixed["q_w"] + fixed["p_x"]
        row = (fixed["p_z"] - fixed["q_z"]).sum(-1) + columns.sum(-1)
        surrogate = of_z.sum(-1) * row + (of_w * columns).sum(-1)
        return -(rows["z"] + rows["w"] + rows["x"] + surrogate).mean(1).sum()

    assert_equal(engine.loss(elbo(draws=2), {"*": score()}, values=values), differentiated(loss, NESTED))


@on_both
def test_a_data_plate_chosen_by_name(backend: Backend) -> None:
    """Rows of the bound are the columns: z is outside their plate, so one draw serves them all."""
    engine = portable(backend, nested_model, nested_guide, {"x": GRID}, data_plate="columns")
    structure = engine.structure
    assert (structure.data_plate, structure.rows, structure.plate_dim) == ("columns", 2, -1)
    assert not structure.sites["z"].local and structure.sites["w"].local
    eps_z, eps_w = noise(2, 1, 3, 1), noise(2, 3, 3, 2)
    terms = nested_terms(NESTED, eps_z, eps_w)
    values = {"z": terms["z"][:, 0], "w": terms["w"].swapaxes(-1, -2)}

    def loss(p: Numbers) -> Any:
        t = nested_terms(p, eps_z, eps_w)
        columns = log_mean_exp((t["p_w"] - t["q_w"] + t["p_x"]).sum(-2), 1).sum(-1)
        return -((t["p_z"] - t["q_z"]).sum((1, 2, 3)) + columns).mean()

    found = engine.loss(iwae(draws=3, outer=2), {"*": pathwise()}, values=values)
    assert_equal(found, differentiated(loss, NESTED))


@on_both
def test_observations_that_share_no_plate_are_ambiguous(backend: Backend) -> None:
    def model(ppl: Ppl, x: Array) -> None:
        z = ppl.sample("z", ppl.dist.Normal(0.0, ppl.xp.exp(ppl.param("log_s", 0.1))))
        with ppl.plate("left", len(x)):
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)
        with ppl.plate("right", len(x)):
            ppl.sample("y", ppl.dist.Normal(-z, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        ppl.sample("z", ppl.dist.Normal(ppl.param("loc", 0.1), 1.0))

    data = {"x": np.array([0.1, 0.2])}
    with pytest.raises(ProgramError, match=r"'x': \['left'\], 'y': \['right'\].*data_plate='none'"):
        portable(backend, model, guide, data)
    with pytest.raises(ProgramError, match=r"data_plate='middle' .* \['left', 'right'\]"):
        portable(backend, model, guide, data, data_plate="middle")
    assert portable(backend, model, guide, data, data_plate="none").structure.data_plate is None
    assert portable(backend, model, guide, data, data_plate="left").structure.data_plate == "left"


# The whole program as one row; mini-batches of rows under a global site.


def global_rows_terms(p: Numbers, x: np.ndarray, eps_g: np.ndarray, eps_z: np.ndarray) -> dict[str, Any]:
    """Log weights of g `[...]` and of the rows `[..., B]`, g and z; eps_g `[...]`, eps_z `[..., B]`."""
    scale = {n: np.exp(p[f"{n}_log_scale"]) for n in ("g", "z", "x", "q_g", "q_z")}
    g = p["q_g_loc"] + scale["q_g"] * eps_g
    loc = p["q_z_gain"] * x + p["q_z_bias"] + p["q_z_g"] * g[..., None]
    z = loc + scale["q_z"] * eps_z
    rows = normal(z, 0.0, scale["z"]) - normal(z, loc, scale["q_z"]) + normal(x, g[..., None] + z, scale["x"])
    return {"g": g, "z": z, "of_g": normal(g, 0.0, scale["g"]) - normal(g, p["q_g_loc"], scale["q_g"]), "rows": rows}


@on_both
def test_the_whole_program_as_one_row(backend: Backend) -> None:
    data, params = {"x": GLOBAL_ROWS.data["x"][:4]}, GLOBAL_ROWS.params
    engine = portable(backend, GLOBAL_ROWS.model, GLOBAL_ROWS.guide, data, data_plate="none")
    assert engine.structure.rows == 1 and all(s.local for s in engine.structure.sites.values())
    eps_g, eps_z = noise(2, 3), noise(2, 3, 4)
    terms = global_rows_terms(params, data["x"], eps_g, eps_z)
    values = {"g": terms["g"][..., None], "z": terms["z"][:, :, None]}

    def loss(p: Numbers) -> Any:
        t = global_rows_terms(p, data["x"], eps_g, eps_z)
        return -log_mean_exp(t["of_g"] + t["rows"].sum(-1), 1).mean()

    found = engine.loss(iwae(draws=3, outer=2), {"*": pathwise()}, values=values)
    assert_equal(found, differentiated(loss, params))
    table = engine.sites(iwae(draws=3, outer=2), {"*": pathwise()}, values=values)
    assert table["g"].value.shape == (2, 3, 1) and table["z"].value.shape == (2, 3, 1, 4)
    assert table["z"].log_p.shape == (2, 3, 1)


@pytest.mark.parametrize("objective", [slow(elbo(outer=2, draws=3)), iwae(outer=2, draws=3)], ids=["elbo", "iwae"])
@on_both
def test_a_mini_batch_under_a_global_site(backend: Backend, objective: Objective) -> None:
    """N/B multiplies the rows' terms once, after any logarithm, and the global's not at all."""
    data, params = {"x": GLOBAL_ROWS.data["x"][3:8]}, GLOBAL_ROWS.params
    engine = Engine.of(backend, GLOBAL_ROWS, data)
    eps_g, eps_z = noise(2, 1), noise(2, 3, 5)
    terms = global_rows_terms(params, data["x"], eps_g, eps_z)
    values = {"g": terms["g"][:, 0], "z": terms["z"]}

    def loss(p: Numbers) -> Any:
        t = global_rows_terms(p, data["x"], eps_g, eps_z)
        rows = t["rows"].mean(1) if isinstance(objective, elbo) else log_mean_exp(t["rows"], 1)
        return -(t["of_g"][:, 0] + 20 / 5 * rows.sum(-1)).mean()

    found = engine.loss(objective, {"*": pathwise()}, values=values, total_rows=20)
    assert_equal(found, differentiated(loss, params))


# Scales that a program puts on its sites.

SCALED = {"log_s": np.array(0.2), "loc": np.array(0.3)}
WEIGHTS = np.array([0.5, 2.0, 1.5])


@pytest.mark.parametrize(
    ("of_model", "of_guide", "of_x"),
    [
        slow(0.4, 0.4, 1.0),
        slow(0.4, 1.0, 1.0),
        (1.0, 0.4, 3.0),
        (WEIGHTS, WEIGHTS, 1.0),
        slow(1.0, 1.0, WEIGHTS),
    ],
    ids=["both", "model", "guide and likelihood", "by row", "likelihood by row"],
)
@on_both
def test_the_elbo_multiplies_scaled_densities(backend: Backend, of_model: Any, of_guide: Any, of_x: Any) -> None:
    x = np.array([0.3, -0.7, 1.2])

    def scale(ppl: Any, by: Any) -> Any:
        return ppl.scale(scale=by if isinstance(by, float) else ppl.array(by))

    def model(ppl: Any, x: Array) -> None:
        s = ppl.xp.exp(ppl.param("log_s", SCALED["log_s"]))
        with ppl.plate("data", len(x)):
            with scale(ppl, of_model):
                z = ppl.sample("z", ppl.dist.Normal(0.0, s))
            with scale(ppl, of_x):
                ppl.sample("x", ppl.dist.Normal(z, s), obs=x)

    def guide(ppl: Any, x: Array) -> None:
        with ppl.plate("data", len(x)), scale(ppl, of_guide):
            ppl.sample("z", ppl.dist.Normal(ppl.param("loc", SCALED["loc"]) + x, 0.7))

    eps = noise(1, 2, 3)
    values = {"z": SCALED["loc"] + x + 0.7 * eps}

    def terms(p: Numbers, z: Any) -> tuple[Any, Any]:
        s = np.exp(p["log_s"])
        log_q = normal(z, p["loc"] + x, 0.7)
        return of_model * normal(z, 0.0, s) + of_x * normal(x, z, s) - of_guide * log_q, log_q

    def loss(p: Numbers) -> Any:
        return -terms(p, p["loc"] + x + 0.7 * eps)[0].mean(1).sum()

    engine = native(backend, model, guide, {"x": x})
    assert_equal(engine.loss(elbo(draws=2), {"*": pathwise()}, values=values), differentiated(loss, SCALED))

    def surrogate(p: Numbers) -> Any:
        h, log_q = terms(p, values["z"])
        fixed, log_q_fixed = terms(SCALED, values["z"])
        return -(h + fixed * (log_q - log_q_fixed)).mean(1).sum()

    assert_equal(engine.loss(elbo(draws=2), {"*": score()}, values=values), differentiated(surrogate, SCALED))
    # The scale is of the program, not of the mini-batch: both multiply.
    found = engine.loss(elbo(draws=2), {"*": pathwise()}, values=values, total_rows=6)
    np.testing.assert_allclose(found.value, 2 * loss(SCALED), rtol=0, atol=TO_ROUNDING)
    with pytest.raises(LegalityError, match="are scaled"):
        engine.loss(iwae(draws=2), {"*": pathwise()}, values=values)


@on_both
def test_a_scale_for_each_element_of_an_event_is_refused(backend: Backend) -> None:
    def model(ppl: Any, x: Array) -> None:
        with ppl.plate("rows", len(x), dim=-2):
            z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0))
            with ppl.plate("columns", x.shape[1], dim=-1), ppl.scale(scale=ppl.array(HOLES + 1.0)):
                ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    def guide(ppl: Any, x: Array) -> None:
        with ppl.plate("rows", len(x), dim=-2):
            ppl.sample("z", ppl.dist.Normal(ppl.param("loc", 0.1), 1.0))

    with pytest.raises(ProgramError, match=r"'x' is scaled by an array of shape \(3, 4\)"):
        native(backend, model, guide, {"x": CELLS})


# The program's own mini-batches.


def rows_seen(found: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Which rows of the data a run's observed values are, one for all draws."""
    assert (found == found[:1, :1]).all()
    index = np.array([int(np.flatnonzero(data == value)[0]) for value in found[0, 0]])
    assert len(set(index)) == len(index)
    return index


@pytest.mark.parametrize("objective", [slow(elbo(draws=3, outer=2)), iwae(draws=3, outer=2)], ids=["elbo", "iwae"])
@on_both
def test_model_guide_and_all_draws_share_the_programs_mini_batch(backend: Backend, objective: Objective) -> None:
    """N/B is the plate's, once; how many rows the engine would have, 40, is not looked at."""
    x, params = GLOBAL_ROWS.data["x"], GLOBAL_ROWS.params
    model, guide = native_rows(backend, with_global=True, subsample_size=5)
    engine = Engine(backend, model, guide, {"x": x}, portable=False)
    assert (engine.structure.plate_size, engine.structure.rows) == (20, 5)
    seen = []
    for seed in range(2):
        eps_g, g = noise(2, 1), params["q_g_loc"] + np.exp(params["q_g_log_scale"]) * noise(2, 1)
        values = {"g": g[:, 0], "z": noise(2, 3, 5)}
        table = engine.sites(objective, {"*": pathwise()}, values=values, seed=seed)
        rows = x[rows_seen(table["x"].value, x)]
        loc = params["q_z_gain"] * rows + params["q_z_bias"] + params["q_z_g"] * g[..., None]
        eps_z = (values["z"] - loc) / np.exp(params["q_z_log_scale"])

        def loss(p: Numbers, rows: np.ndarray = rows, eps_g: np.ndarray = eps_g, eps_z: np.ndarray = eps_z) -> Any:
            t = global_rows_terms(p, rows, eps_g, eps_z)
            of_rows = t["rows"].mean(1) if isinstance(objective, elbo) else log_mean_exp(t["rows"], 1)
            return -(t["of_g"][:, 0] + 20 / 5 * of_rows.sum(-1)).mean()

        found = engine.loss(objective, {"*": pathwise()}, values=values, total_rows=40, seed=seed)
        assert_equal(found, differentiated(loss, params))
        seen.append(rows)
    assert set(seen[0]) != set(seen[1])


@pytest.mark.parametrize("batch_size", [2, slow(10)])
@on_both
def test_the_engine_takes_no_mini_batch_of_a_mini_batch(backend: Backend, batch_size: int) -> None:
    """The guide is each row's exact posterior, so a step's loss is the evidence of the rows that the program took."""
    params = {"log_scale": np.array(0.1)}
    x = np.linspace(-1.0, 2.0, 12)

    def model(ppl: Any, x: Array) -> None:
        scale = ppl.xp.exp(ppl.param("log_scale", params["log_scale"]))
        with ppl.plate("data", 12, subsample_size=3) as rows:
            z = ppl.sample("z", ppl.dist.Normal(0.0, scale))
            ppl.sample("x", ppl.dist.Normal(z, scale), obs=x[rows])

    def guide(ppl: Any, x: Array) -> None:
        with ppl.plate("data", 12, subsample_size=3) as rows:
            ppl.sample("z", ppl.dist.Normal(0.5 * x[rows], 0.5**0.5 * ppl.xp.exp(ppl.array(params["log_scale"]))))

    words = Native(backend)
    options: dict[str, Any] = {"steps": 12, "learning_rate": 0.0, "dtype": "float64"}
    run = fit(
        lambda x: model(words, x),
        lambda x: guide(words, x),
        x,
        "elbo",
        backend=backend,
        batch_size=batch_size,
        **options,
    )
    assert f"batch_size: {batch_size} not used, as the program subsamples plate 'data' itself" in run.messages[0]
    evidence = normal(x, 0.0, 2**0.5 * np.exp(0.1))
    sums = np.array([evidence[list(rows)].sum() for rows in itertools.combinations(range(12), 3)])
    nearest = np.abs(-run.history["loss"] * 3 - sums[:, None]).min(0)
    np.testing.assert_allclose(nearest, 0.0, atol=1e-9)
    assert len(set(run.history["loss"].round(9))) > 3


# Several draws of a global matrix, which `z @ W` does not broadcast over on Pyro.

MATRIX = {"log_s": np.array(0.1), "m": 0.2 * np.arange(6.0).reshape(2, 3), "a": np.array([0.3, -0.2])}
POINTS = np.array([[0.3, -0.7, 0.4], [0.5, 0.9, -1.0], [1.5, -0.2, 0.2], [0.1, 0.6, -0.4]])


def matrix_model(ppl: Ppl, x: Array) -> None:
    s = ppl.xp.exp(ppl.param("log_s", MATRIX["log_s"]))
    W = ppl.sample("W", ppl.dist.Normal(0.0 * s, s).expand((2, 3)).to_event(2))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * s, 1.0).expand((2,)).to_event(1))
        ppl.sample("x", ppl.dist.Normal(z @ W, s).to_event(1), obs=x)


def matrix_guide(ppl: Ppl, x: Array) -> None:
    m, a = ppl.param("m", MATRIX["m"]), ppl.param("a", MATRIX["a"])
    W = ppl.sample("W", ppl.dist.Normal(m, 0.5).to_event(2))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(a + x @ W.T, 0.8).to_event(1))


def matrix_terms(p: Numbers, eps_W: np.ndarray, eps_z: np.ndarray) -> dict[str, Any]:
    """eps_W `[M, 2, 3]`, eps_z `[M, K, B, 2]`: values, log weights of W `[M]` and of the rows `[M, K, B]`."""
    s = np.exp(p["log_s"])
    W = p["m"] + 0.5 * eps_W
    loc = p["a"] + (POINTS @ W.swapaxes(-1, -2))[:, None]
    z = loc + 0.8 * eps_z
    rows = (normal(z, 0.0, 1.0) - normal(z, loc, 0.8)).sum(-1) + normal(POINTS, z @ W[:, None], s).sum(-1)
    return {"W": W, "z": z, "of_W": (normal(W, 0.0, s) - normal(W, p["m"], 0.5)).sum((1, 2)), "rows": rows}


@pytest.mark.parametrize(
    ("objective", "broadcasts"),
    [(elbo(outer=3), (False, True)), (iwae(outer=2, draws=3), (False, True)), (iwae(draws=3), (True, True))],
    ids=["outer", "outer and draws", "draws"],
)
@on_both
def test_draws_of_a_global_matrix(backend: Backend, objective: Objective, broadcasts: tuple[bool, bool]) -> None:
    engine = portable(backend, matrix_model, matrix_guide, {"x": POINTS})
    eps_W, eps_z = noise(objective.outer, 2, 3), noise(objective.outer, objective.draws, 4, 2)
    values = {n: matrix_terms(MATRIX, eps_W, eps_z)[n] for n in ("W", "z")}

    def loss(p: Numbers) -> Any:
        t = matrix_terms(p, eps_W, eps_z)
        return -(t["of_W"] + log_mean_exp(t["rows"], 1).sum(-1)).mean()

    found = engine.loss(objective, {"*": pathwise()}, values=values)
    assert_equal(found, differentiated(loss, MATRIX))
    if backend == "pyro":
        table = engine.sites(objective, {"*": pathwise()}, values=values)
        np.testing.assert_allclose(table["W"].value, values["W"], rtol=0, atol=TO_ROUNDING)
        np.testing.assert_allclose(table["z"].value, values["z"], rtol=0, atol=TO_ROUNDING)
        assert engine.bound.broadcasts(engine.plan(objective, {"*": pathwise()}), engine.batch) == broadcasts


@on_both
def test_the_whole_program_as_one_row_with_a_matrix(backend: Backend) -> None:
    """With one row for all, W is drawn K times, and Pyro has to run them one by one too."""
    engine = portable(backend, matrix_model, matrix_guide, {"x": POINTS}, data_plate="none")
    eps_W, eps_z = noise(3, 2, 3), noise(3, 1, 4, 2)
    terms = matrix_terms(MATRIX, eps_W, eps_z)
    values = {"W": terms["W"][None, :, None], "z": terms["z"][:, 0][None, :, None]}

    def loss(p: Numbers) -> Any:
        t = matrix_terms(p, eps_W, eps_z)
        return -log_mean_exp(t["of_W"] + t["rows"].sum((1, 2)), 0)

    found = engine.loss(iwae(draws=3), {"*": pathwise()}, values=values)
    assert_equal(found, differentiated(loss, MATRIX))


def test_draws_that_would_broadcast_wrongly_without_an_error() -> None:
    """`z[:, None]` puts the features beside the draws instead of the rows; with as many rows as features it runs."""

    def model(ppl: Ppl, x: Array) -> None:
        w = ppl.param("w", np.array([0.3, -0.2, 0.5]))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * w.sum(), 1.0))
            ppl.sample("x", ppl.dist.Normal(z[:, None] * w, 1.0).to_event(1), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(x @ ppl.param("b", np.array([0.1, 0.2, -0.3])), 0.8))

    x, values = POINTS[:3], {"z": noise(1, 2, 3)}
    found = {}
    for backend in BACKENDS:
        engine = portable(backend, model, guide, {"x": x})
        found[backend] = engine.loss(iwae(draws=2), {"z": pathwise()}, values=values)
    assert_equal(found["pyro"], found["numpyro"])
    engine = portable("pyro", model, guide, {"x": x})
    assert engine.bound.broadcasts(engine.plan(iwae(draws=2), {"z": pathwise()}), engine.batch) == (True, False)


def test_a_program_that_is_random_by_itself_is_taken_to_broadcast() -> None:
    """Dropout makes two runs on the same values differ, which says nothing about their shapes."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))

    def model(x: Array) -> None:
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro_dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", pyro_dist.Normal(layer(z), 1.0).to_event(1), obs=x)

    def guide(x: Array) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro_dist.Normal(pyro.param("loc", torch.zeros(2)) + x, 1.0).to_event(1))

    engine = Engine("pyro", model, guide, {"x": POINTS[:, :2]}, portable=False)
    assert engine.bound.initial["layer$$$0.weight"].dtype == torch.float64
    assert layer[0].weight.dtype == torch.float32
    assert engine.bound.broadcasts(engine.plan(elbo(draws=4), {"z": pathwise()}), engine.batch) == (True, True)


def switched_model(ppl: Ppl, x: Array) -> None:
    s = ppl.xp.exp(ppl.param("log_s", MATRIX["log_s"]))
    W = ppl.sample("W", ppl.dist.Normal(0.0 * s, s).expand((2, 3)).to_event(2))
    on = ppl.sample("on", ppl.dist.Bernoulli(logits=0.3 * s))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * s, 1.0).expand((2,)).to_event(1))
        ppl.sample("x", ppl.dist.Normal(z @ W + on[..., None], s).to_event(1), obs=x)


def switched_guide(ppl: Ppl, x: Array) -> None:
    m, a = ppl.param("m", MATRIX["m"]), ppl.param("a", MATRIX["a"])
    W = ppl.sample("W", ppl.dist.Normal(m, 0.5).to_event(2))
    ppl.sample("on", ppl.dist.Bernoulli(logits=a[0] + W[..., 0, 0]))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(a, 0.8).to_event(1))


@on_both
def test_an_enumerated_global_site_beside_a_matrix(backend: Backend) -> None:
    """Its two values lie along the outer axis, two entries for each draw of W; W is above it, so it has one value."""
    engine = portable(backend, switched_model, switched_guide, {"x": POINTS})
    estimators: dict[str, Estimator] = {"W": pathwise(), "on": enumerated(), "z": pathwise()}
    eps_W, eps_z = np.repeat(noise(2, 2, 3), 2, axis=0), noise(4, 1, 4, 2)
    on = np.array([0.0, 1.0, 0.0, 1.0])
    W, z = MATRIX["m"] + 0.5 * eps_W, MATRIX["a"] + 0.8 * eps_z

    def loss(p: Numbers) -> Any:
        s = np.exp(p["log_s"])
        W, z = p["m"] + 0.5 * eps_W, p["a"] + 0.8 * eps_z
        of_W = (normal(W, 0.0, s) - normal(W, p["m"], 0.5)).sum((1, 2))
        log_q = bernoulli(on, p["a"][0] + W[:, 0, 0])
        rows = (normal(z, 0.0, 1.0) - normal(z, p["a"], 0.8)).sum(-1)
        rows = rows + normal(POINTS, z @ W[:, None] + on[:, None, None, None], s).sum(-1)
        return -(np.exp(log_q) * (of_W + bernoulli(on, 0.3 * s) - log_q + rows.sum((1, 2)))).sum() / 2

    found = engine.loss(elbo(outer=2), estimators, values={"W": W, "z": z})
    assert_equal(found, differentiated(loss, MATRIX))
    table = engine.sites(elbo(outer=2), estimators)
    drawn = table["W"].value
    assert drawn.shape == (4, 2, 3)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[2], drawn[3])
    assert (drawn[0] != drawn[2]).all()
    np.testing.assert_array_equal(table["on"].value, on)


def test_a_loop_over_draws_is_traced_and_said() -> None:
    options: dict[str, Any] = {"recipe": "elbo", "outer": 2, "steps": 4, "learning_rate": 0.05, "backend": "pyro"}
    toy = Program("matrix", matrix_model, matrix_guide, portable=True, arguments=("x",))
    runs = [fit(toy, data=POINTS, compile=mode, **options) for mode in ("eager", "graph")]
    for run in runs:
        assert "draws: run one by one, as the program does not broadcast over them" in run.messages
    np.testing.assert_array_equal(runs[0].history["loss"], runs[1].history["loss"])
    for name, value in runs[0].params.items():
        np.testing.assert_array_equal(value, runs[1].params[name])
    # Evaluation draws the globals anew for every draw, so it depends on the loop too.
    posterior = runs[0].posterior(5)
    np.testing.assert_allclose(
        posterior.log_likelihood["x"],
        normal(POINTS, posterior.values["z"] @ posterior.values["W"], np.exp(runs[0].params["log_s"])).sum(-1),
        rtol=1e-4,
    )


# Precision and integers.


@pytest.mark.parametrize("dtype", ["float32", slow("float64")])
@on_both
def test_a_fit_keeps_its_precision(backend: Backend, dtype: str) -> None:
    kind = PyroBound if backend == "pyro" else NumPyroBound
    toy = Program("nested", nested_model, nested_guide, portable=True, arguments=("x",))
    bound: Any = kind(toy, Call.of(GRID), seed=0, dtype=dtype)
    batch, key = bound.batch(Call.of(GRID)), (0 if backend == "pyro" else jax.random.key(0))
    plan = Plan(2, 1, {"z": pathwise(), "w": dreg()})

    def run(batch: Any, key: Any) -> dict[str, Array]:
        draws = bound.draws(bound.initial, Call((batch,)), key, plan)
        found = bound.gradients(bound.initial, Call((batch,)), key, plan, elbo(draws=2), total_rows=9)
        arrays = {**{f"{n}'": g for n, g in found.params.items()}, "loss": found.loss}
        for name, site in draws.sites.items():
            for label in ("value", "log_p", "log_q", "log_q_frozen"):
                if getattr(site, label) is not None:
                    arrays[f"{name}.{label}"] = getattr(site, label)
        return arrays

    with precision(dtype) if backend == "numpyro" else nullcontext():
        run_once = jax.jit(run) if backend == "numpyro" else run
        arrays = {**bound.initial, **run_once(batch.args[0], key)}
    assert {"w.log_q_frozen", "x.log_p", "a'"} <= set(arrays)
    assert {n: str(a.dtype).removeprefix("torch.") for n, a in arrays.items()} == dict.fromkeys(arrays, dtype)


def counts(kind: type) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 17, size=(8, 5)).astype(kind)


@pytest.mark.parametrize("name", ["vae", "probabilistic_pca"])
@on_both
def test_counts_as_integers_are_the_same_as_floats(backend: Backend, name: str) -> None:
    chosen = program(name)
    assert chosen.guide is not None
    runs = [
        portable(backend, chosen.model, chosen.guide, {"x": counts(kind)}).loss(elbo(), {"*": pathwise()})
        for kind in (float, int)
    ]
    assert_equal(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["vae", "probabilistic_pca"])
@on_both
def test_a_fit_to_integers_is_that_to_floats(backend: Backend, name: str, dtype: str) -> None:
    options: dict[str, Any] = {"recipe": "elbo", "steps": 2, "batch_size": 4, "backend": backend, "dtype": dtype}
    runs = [fit(program(name), data=counts(kind), **options) for kind in (float, int, np.uint8)]
    for run in runs:
        np.testing.assert_array_equal(run.history["loss"], runs[0].history["loss"])
        assert {str(p.dtype) for p in run.params.values()} == {dtype}


@on_both
def test_which_integers_stay(backend: Backend) -> None:
    """Those of a native program, and of a portable one where its example has some; bytes do not wrap around."""
    seen: dict[str, str] = {}

    def model(ppl: Any, x: Array, y: Array) -> None:
        seen.update(x=str(x.dtype), y=str(y.dtype))
        table = ppl.param("table", np.array([0.1, 0.2, 0.3]))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(table[y] if "int" in str(y.dtype) else 0.0 * y, 1.0))
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=2 * x)

    def guide(ppl: Any, x: Array, y: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(ppl.param("loc", np.array(0.1)) + 0.0 * x, 1.0))

    def example(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"x": rng.normal(size=3), "y": np.array([0, 1, 2])}

    kind = PyroBound if backend == "pyro" else NumPyroBound
    call = Call((np.array([3, 200, 100], dtype=np.uint8), np.array([2, 0, 1])))
    names = ("x", "y")
    with_example = Program("p", model, guide, portable=True, arguments=names, example=example)
    bound: Any = kind(with_example, call, seed=0, dtype="float64")
    assert "float64" in seen["x"] and "int64" in seen["y"]
    np.testing.assert_array_equal(np.asarray(bound.batch(call).args[0]), [3.0, 200.0, 100.0])

    kind(Program("p", model, guide, portable=True, arguments=names), call, seed=0, dtype="float64")
    assert "float64" in seen["x"] and "float64" in seen["y"]

    words = Native(backend)
    as_native = Program("p", lambda x, y: model(words, x, y), lambda x, y: guide(words, x, y), arguments=names)
    kind(as_native, call, seed=0, dtype="float64")
    assert "uint8" in seen["x"] and "int64" in seen["y"]


# Parameters in model and guide.


def tied_terms(p: Numbers, x: np.ndarray, eps: np.ndarray) -> Any:
    s = np.exp(p["log_s"])
    z = p["a"] * x + s * eps
    return normal(z, p["a"], s) + normal(x, z, 1.0) - normal(z, p["a"] * x, s)


def tied_model(ppl: Ppl, x: Array) -> None:
    a, s = ppl.param("a", 0.6), ppl.xp.exp(ppl.param("log_s", -0.2))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(a, s))
        ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)


def tied_guide(ppl: Ppl, x: Array) -> None:
    a, s = ppl.param("a", 0.6), ppl.xp.exp(ppl.param("log_s", -0.2))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(a * x, s))


@on_both
def test_a_shared_parameter_gets_the_sum_of_both_gradients(backend: Backend) -> None:
    params, x = {"a": np.array(0.6), "log_s": np.array(-0.2)}, np.array([0.3, -0.7, 1.2])
    engine, eps = portable(backend, tied_model, tied_guide, {"x": x}), noise(1, 2, 3)
    assert set(engine.structure.groups.values()) == {frozenset({"model", "guide"})}
    values = {"z": 0.6 * x + np.exp(-0.2) * eps}
    found = engine.loss(elbo(draws=2), {"z": pathwise()}, values=values)
    assert_equal(found, differentiated(lambda p: -tied_terms(p, x, eps).mean(1).sum(), params))


@on_both
def test_a_shared_parameter_takes_one_step(backend: Backend) -> None:
    """The guide is a point, so the loss has no noise: one step of sgd is the parameter less rate times gradient."""
    x = np.array([0.3, -0.7, 1.2])

    def guide(ppl: Ppl, x: Array) -> None:
        a = ppl.param("a", 0.6)
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Delta(a * x))

    def loss(p: Numbers) -> Any:
        s = np.exp(p["log_s"])
        return -(normal(p["a"] * x, p["a"], s) + normal(x, p["a"] * x, 1.0)).sum()

    gradient = differentiated(loss, {"a": np.array(0.6), "log_s": np.array(-0.2)}).gradient
    toy = Program("tied", tied_model, guide, portable=True, arguments=("x",))
    run = fit(
        toy, data=x, recipe="elbo", backend=backend, steps=1, optimizer="sgd", learning_rate=0.01, dtype="float64"
    )
    for name, before in (("a", 0.6), ("log_s", -0.2)):
        np.testing.assert_allclose(run.params[name], before - 0.01 * gradient[name], rtol=0, atol=TO_ROUNDING)


# Factors and deterministic sites.


@on_both
def test_factors_count_once_and_deterministic_sites_not_at_all(backend: Backend) -> None:
    """A factor of the model adds to log p, of the guide to log q; outside the plate it is not multiplied by N/B."""
    params = {"s": np.array(0.4), "m": np.array(0.3), "t": np.array(0.2)}
    x = np.array([0.3, -0.7, 1.2])

    def model(ppl: Ppl, x: Array) -> None:
        s = ppl.param("s", params["s"])
        ppl.factor("penalty", -3.0 * s**2)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(s, 1.0))
            ppl.deterministic("square", z**2)
            ppl.factor("bend", -s * z**4)
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        m, t = ppl.param("m", params["m"]), ppl.param("t", params["t"])
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(m + x, 0.7))
            ppl.factor("tilt", t * z)

    engine = portable(backend, model, guide, {"x": x})
    assert engine.structure.data_plate == "data"
    assert set(engine.structure.sites) == {"z", "tilt", "penalty", "bend", "x"}
    assert not engine.structure.sites["penalty"].local
    eps = noise(1, 2, 3)
    values = {"z": params["m"] + x + 0.7 * eps}

    def rows(p: Numbers, z: Any) -> Any:
        return normal(z, p["s"], 1.0) - p["s"] * z**4 + normal(x, z, 1.0) - normal(z, p["m"] + x, 0.7) - p["t"] * z

    for objective in (elbo(draws=2), iwae(draws=2)):

        def loss(p: Numbers, objective: Objective = objective) -> Any:
            h = rows(p, p["m"] + x + 0.7 * eps)
            h = h.mean(1) if isinstance(objective, elbo) else log_mean_exp(h, 1)
            return 3.0 * p["s"] ** 2 - 2 * h.sum()

        found = engine.loss(objective, {"z": pathwise()}, values=values, total_rows=6)
        assert_equal(found, differentiated(loss, params))

    def surrogate(p: Numbers) -> Any:
        log_q = normal(values["z"], p["m"] + x, 0.7) - normal(values["z"], params["m"] + x, 0.7)
        return 3.0 * p["s"] ** 2 - (rows(p, values["z"]) + rows(params, values["z"]) * log_q).mean(1).sum()

    assert_equal(engine.loss(elbo(draws=2), {"z": score()}, values=values), differentiated(surrogate, params))


# Two enumerated sites, with a Gaussian before, between and after them.

CHAIN = {
    "p": np.array([0.3, -0.4, 0.5, 0.2, -0.3, 0.6]),
    **{"qa": np.array(0.2), "qi": np.array([-0.3, 0.8]), "qb": np.array([0.4, -0.5, 0.3])},
    **{"qj": np.array([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6]]), "qc": np.array([0.1, 0.7, -0.4])},
}


def chain_model(ppl: Ppl, x: Array) -> None:
    p = ppl.param("p", CHAIN["p"])
    with ppl.plate("data", len(x)):
        a = ppl.sample("a", ppl.dist.Normal(p[0], 1.0))
        i = ppl.sample("i", ppl.dist.Bernoulli(logits=p[1] + a))
        b = ppl.sample("b", ppl.dist.Normal(p[2] * i + a, 1.2))
        j = ppl.sample("j", ppl.dist.OneHotCategorical(logits=ppl.xp.stack([b, p[3] * i, 0.0 * b], axis=-1)))
        c = ppl.sample("c", ppl.dist.Normal(p[4] * j[..., 1] + b, 0.9))
        ppl.sample("x", ppl.dist.Normal(a + p[5] * i * b + c * j[..., 2], 1.1), obs=x)


def chain_guide(ppl: Ppl, x: Array) -> None:
    qa, qi, qb, qj, qc = (ppl.param(n, CHAIN[n]) for n in ("qa", "qi", "qb", "qj", "qc"))
    with ppl.plate("data", len(x)):
        a = ppl.sample("a", ppl.dist.Normal(qa + 0.3 * x, 0.8))
        i = ppl.sample("i", ppl.dist.Bernoulli(logits=qi[0] + qi[1] * a))
        b = ppl.sample("b", ppl.dist.Normal(qb[0] + qb[1] * i + qb[2] * a, 0.7))
        j = ppl.sample("j", ppl.dist.OneHotCategorical(logits=qj[0] + qj[1] * (b + i)[..., None]))
        ppl.sample("c", ppl.dist.Normal(qc[0] + qc[1] * b + qc[2] * j[..., 0], 0.6))


def one_hot(x: Any, logits: Any) -> Any:
    return (x * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1)


def chain_terms(p: Numbers, x: np.ndarray, eps: Values, i: np.ndarray, j: np.ndarray) -> dict[str, Any]:
    """Values, weights of the enumerated sites, and log weights, all `[..., B]` (j has an axis of classes more)."""
    qa, qi, qb, qj, qc = (p[n] for n in ("qa", "qi", "qb", "qj", "qc"))
    a_loc = qa + 0.3 * x
    a = a_loc + 0.8 * eps["a"]
    log_qi = bernoulli(i, qi[0] + qi[1] * a)
    b_loc = qb[0] + qb[1] * i + qb[2] * a
    b = b_loc + 0.7 * eps["b"]
    log_qj = one_hot(j, qj[0] + qj[1] * (b + i)[..., None])
    c_loc = qc[0] + qc[1] * b + qc[2] * j[..., 0]
    c = c_loc + 0.6 * eps["c"]
    p_ = p["p"]
    log_p = normal(a, p_[0], 1.0) + bernoulli(i, p_[1] + a) + normal(b, p_[2] * i + a, 1.2)
    log_p = log_p + one_hot(j, np.stack([b, p_[3] * i + 0.0 * b, 0.0 * b], axis=-1))
    log_p = log_p + normal(c, p_[4] * j[..., 1] + b, 0.9)
    log_p = log_p + normal(x, a + p_[5] * i * b + c * j[..., 2], 1.1)
    log_q = normal(a, a_loc, 0.8) + log_qi + normal(b, b_loc, 0.7) + log_qj + normal(c, c_loc, 0.6)
    return {"a": a, "b": b, "c": c, "weight": np.exp(log_qi + log_qj), "log_w": log_p - log_q}


ENUMERATED: dict[str, Estimator] = {"i": enumerated(), "j": enumerated(), "*": pathwise()}
VALUES_I = np.repeat(np.arange(2.0), 3)
VALUES_J = np.tile(np.eye(3), (2, 1))
ROWS_X = np.array([0.4, -0.9])


@on_both
def test_two_enumerated_sites_among_pathwise_ones(backend: Backend) -> None:
    """sum_ij q(i) q(j) log w at fixed noise, and its gradient; the value of `a` is shared by all six, `b` by three."""
    engine = portable(backend, chain_model, chain_guide, {"x": ROWS_X})
    K = 2
    i, j = (np.tile(v, (K,) + (1,) * (v.ndim - 1)) for v in (VALUES_I, VALUES_J))
    i, j = np.broadcast_to(i[:, None], (6 * K, 2)), np.broadcast_to(j[:, None], (6 * K, 2, 3))
    eps = {"a": np.repeat(noise(K, 2), 6, 0), "b": np.repeat(noise(2 * K, 2), 3, 0), "c": noise(6 * K, 2)}
    terms = chain_terms(CHAIN, ROWS_X, eps, i, j)

    def loss(p: Numbers) -> Any:
        t = chain_terms(p, ROWS_X, eps, i, j)
        return -(t["weight"] * t["log_w"]).sum() / K

    found = engine.loss(elbo(draws=K), ENUMERATED, values={n: terms[n][None] for n in "abc"})
    assert_equal(found, differentiated(loss, CHAIN))
    drawn = {n: row.value[0] for n, row in engine.sites(elbo(draws=K), ENUMERATED).items()}
    np.testing.assert_array_equal(drawn["i"], i)
    np.testing.assert_array_equal(drawn["j"], j)
    for name, shared in (("a", 6), ("b", 3)):
        groups = drawn[name].reshape(-1, shared, 2)
        np.testing.assert_array_equal(groups, np.repeat(groups[:, :1], shared, axis=1))
        assert len(np.unique(groups[:, 0])) == groups[:, 0].size


@pytest.mark.parametrize(
    ("backend", "estimators"),
    [
        ("pyro", {"i": enumerated(), "j": enumerated(), "*": score()}),
        slow("numpyro", {"i": enumerated(), "j": enumerated(), "*": score()}),
        slow("pyro", ENUMERATED),
        slow("numpyro", ENUMERATED),
        slow("pyro", {**ENUMERATED, "b": score()}),
        slow("numpyro", {**ENUMERATED, "b": score()}),
        slow("pyro", {"i": enumerated(), "j": rloo(), "*": dreg()}),
        slow("numpyro", {"i": enumerated(), "j": rloo(), "*": dreg()}),
    ],
    ids=lambda cell: "-".join(f"{n}={type(e).__name__}" for n, e in cell.items()) if isinstance(cell, dict) else None,
)
def test_the_gradient_is_unbiased_when_the_noise_is_drawn(backend: Backend, estimators: dict[str, Estimator]) -> None:
    """Against a trapezoid rule in the three noises."""
    nodes = 0.5 * np.arange(-12, 13)
    mass = np.exp(-0.5 * nodes**2)
    mass = mass / mass.sum()
    shape = np.meshgrid(nodes, nodes, nodes, indexing="ij")
    eps = {n: e.reshape(-1, 1, 1) for n, e in zip("abc", shape, strict=True)}
    weight = np.prod(np.meshgrid(mass, mass, mass, indexing="ij"), axis=0).reshape(-1, 1, 1)
    i, j = np.broadcast_to(VALUES_I[:, None], (6, 2)), np.broadcast_to(VALUES_J[:, None], (6, 2, 3))

    def loss(p: Numbers) -> Any:
        t = chain_terms(p, ROWS_X, eps, i, j)
        return -(weight * t["weight"] * t["log_w"]).sum()

    truth = differentiated(loss, CHAIN)
    engine = portable(backend, chain_model, chain_guide, {"x": ROWS_X})
    found = engine.loss(elbo(outer=250, draws=2), estimators, runs=25)
    assert_unbiased(found, float(truth.value), truth.gradient)


# Closed-form KL.


@pytest.mark.parametrize(
    "name", ["bits", "Categorical", slow("Bernoulli"), slow("OneHotCategorical"), slow("Binomial"), slow("Normal")]
)
@on_both
def test_closed_form_kl(backend: Backend, name: str) -> None:
    """NumPyro's list is shorter than torch's: what both must know."""
    q, p = np.array([0.3, -0.8, 0.5]), np.array([-0.2, 0.4, 0.1])
    x = np.array([0.2, -0.4])

    def site(ppl: Ppl, logits: Array) -> Any:
        if name == "Normal":
            return ppl.dist.Normal(logits, 0.8).to_event(1)
        if name == "bits":
            return ppl.dist.Bernoulli(logits=logits).to_event(1)
        if name == "Bernoulli":
            return ppl.dist.Bernoulli(logits=logits[..., 0])
        if name == "Binomial":
            return ppl.dist.Binomial(4, logits=logits[..., 0])
        return getattr(ppl.dist, name)(logits=logits)

    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", site(ppl, ppl.param("p", p)))
            ppl.sample("x", ppl.dist.Normal(ppl.param("mu", 0.1), 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", site(ppl, ppl.param("q", q) + x[:, None]))

    def loss(params: Numbers) -> Any:
        q, p = params["q"] + x[:, None], params["p"]
        if name == "Normal":
            divergence = (0.5 * ((q - p) / 0.8) ** 2).sum(-1)
        elif name in ("Categorical", "OneHotCategorical"):
            log_q, log_p = (h - np.log(np.exp(h).sum(-1, keepdims=True)) for h in (q, p))
            divergence = (np.exp(log_q) * (log_q - log_p)).sum(-1)
        else:
            bits = sum(np.exp(bernoulli(v, q)) * (bernoulli(v, q) - bernoulli(v, p)) for v in (0.0, 1.0))
            divergence = bits.sum(-1) if name == "bits" else (4 if name == "Binomial" else 1) * bits[..., 0]
        return (divergence - normal(x, params["mu"], 1.0)).sum()

    engine = portable(backend, model, guide, {"x": x})
    assert engine.structure.sites["z"].closed_kl
    found = engine.loss(elbo(kl="closed_form"), {"z": pathwise() if name == "Normal" else enumerated()})
    expected = differentiated(loss, {"q": q, "p": p, "mu": np.array(0.1)})
    np.testing.assert_allclose(found.value, expected.value, rtol=0, atol=TO_ROUNDING)
    for parameter, gradient in expected.gradient.items():
        np.testing.assert_allclose(found.gradient[parameter], gradient, rtol=0, atol=TO_ROUNDING)


@pytest.mark.parametrize("masked", ["both", "model", slow("guide")])
@on_both
def test_closed_form_kl_under_masks(backend: Backend, masked: str) -> None:
    """Two densities that count at different rows are no KL."""
    x = np.array([0.3, -0.7, 1.2])

    def covered(ppl: Any, side: str) -> Any:
        return ppl.mask(mask=ppl.array(SEEN)) if masked in (side, "both") else nullcontext()

    def model(ppl: Any, x: Array) -> None:
        with ppl.plate("data", len(x)):
            with covered(ppl, "model"):
                z = ppl.sample("z", ppl.dist.Normal(ppl.param("p", np.array(0.2)), 1.0))
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    def guide(ppl: Any, x: Array) -> None:
        with ppl.plate("data", len(x)), covered(ppl, "guide"):
            ppl.sample("z", ppl.dist.Normal(ppl.param("q", np.array(0.5)) + x, 1.0))

    engine = native(backend, model, guide, {"x": x})
    if masked != "both":
        with pytest.raises(LegalityError, match="'z' has no closed-form KL"):
            engine.plan(elbo(kl="closed_form"), {"z": pathwise()})
        return
    table = engine.sites(elbo(kl="closed_form"), {"z": pathwise()})
    expected = np.where(SEEN, 0.5 * (0.5 + x - 0.2) ** 2, 0.0)
    np.testing.assert_allclose(table["z"].extra["kl"][0, 0], expected, rtol=0, atol=TO_ROUNDING)


# Batch dimensions that no plate declares.


@pytest.mark.parametrize("objective", [slow(elbo(draws=3)), iwae(draws=3)], ids=["elbo", "iwae"])
@on_both
def test_a_batch_dimension_without_a_plate_is_summed(backend: Backend, objective: Objective) -> None:
    """Three draws of three elements: an axis of draws in the place of the elements would go unnoticed."""
    params = {"s": np.array(0.4), "m": np.array([0.3, -0.1, 0.2])}
    x = np.array([0.3, -0.7, 1.2])

    def model(ppl: Ppl, x: Array) -> None:
        z = ppl.sample("z", ppl.dist.Normal(ppl.param("s", params["s"]), 1.0))
        w = ppl.sample("w", ppl.dist.Normal(ppl.xp.zeros(3), 1.0))
        ppl.sample("x", ppl.dist.Normal(z + w, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        m = ppl.param("m", params["m"])
        ppl.sample("z", ppl.dist.Normal(m[0], 0.7))
        ppl.sample("w", ppl.dist.Normal(m, 0.9))

    engine = portable(backend, model, guide, {"x": x})
    assert engine.structure.data_plate is None
    eps_z, eps_w = noise(3, 1), noise(3, 3)
    values = {"z": (params["m"][0] + 0.7 * eps_z)[None], "w": (params["m"] + 0.9 * eps_w)[None, :, None]}

    def loss(p: Numbers) -> Any:
        z, w = p["m"][0] + 0.7 * eps_z, p["m"] + 0.9 * eps_w
        log_w = (normal(z, p["s"], 1.0) - normal(z, p["m"][0], 0.7))[:, 0]
        log_w = log_w + (normal(w, 0.0, 1.0) - normal(w, p["m"], 0.9) + normal(x, z + w, 1.0)).sum(-1)
        return -(log_w.mean() if isinstance(objective, elbo) else log_mean_exp(log_w, 0))

    assert_equal(engine.loss(objective, {"*": pathwise()}, values=values), differentiated(loss, params))


@on_both
@pytest.mark.parametrize("where", ["guide", "both"])
def test_one_name_is_one_parameter(backend: Backend, where: str) -> None:
    def model(ppl: Any, x: Any) -> None:
        shift = ppl.param("a", np.zeros(2)) if where == "both" else np.zeros(1)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
            ppl.sample("x", ppl.dist.Normal(z + shift[0], 1.0), obs=x)

    def guide(ppl: Any, x: Any) -> None:
        loc = ppl.param("a", 0.5)
        scale = ppl.param("a", np.ones(3))[0] if where == "guide" else 1.0
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(loc + 0.0 * x, scale))

    with pytest.raises(ProgramError, match=r"Parameter 'a' is given initial values of shapes \(\) and \([23],\)"):
        portable(backend, model, guide, {"x": np.zeros(4)})


# A third loss that is one of the other two: the amortised log Z of trajectory balance.


@pytest.mark.parametrize("estimator", [score(), pathwise()], ids=["score", "pathwise"])
def test_a_third_loss_that_is_the_guides(estimator: Estimator) -> None:
    """Quadratic in the objective's own parameters, so that a central difference is its derivative to rounding."""
    objective, engine = trajectory_balance(draws=3), Engine.of("pyro", ROWS)
    chosen, bound, h = engine.plan(objective, {"z": estimator}), engine.bound, 0.1
    own = {n: torch.tensor(v, dtype=torch.float64) for n, v in objective.initial_own(1).items()}

    def third(name: str, by: float) -> float:
        moved = {**own, name: own[name] + by}
        found = bound.draws(bound.initial, engine.batch, 0, chosen, own={"objective": moved})
        extra = objective(replace(found, allowed=objective.verbs)).extra
        assert extra is not None
        return float(extra)

    found = bound.gradients(bound.initial, engine.batch, 0, chosen, objective, own={"objective": own})
    for name, gradient in found.own["objective"].items():
        assert float(gradient[0]) == pytest.approx((third(name, h) - third(name, -h)) / (2 * h), rel=1e-9)
        assert abs(float(gradient[0])) > 0.1
    assert all(bool(g.abs().sum() > 0) for g in found.params.values())
