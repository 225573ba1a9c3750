"""Where parts of the engine meet programs out of the ordinary: masks, scales, nested plates, the program's own
mini-batches, several global draws, factors, integers. On both backends, against hand computation in numpy.

Noise is injected, so a bound is a number, and its gradient that of the same formula: numpy's, by a complex step, which
is exact to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from harness import BACKENDS, Engine, Loss
from toys import GLOBAL_ROWS, ROWS, Array, Backend, Ppl, Values, native_rows

from ppl_lvm import fit
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.base import Call, Plan
from ppl_lvm.backends.numpyro import NumPyroBound
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.errors import LegalityError, ProgramError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.score import score
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.program import Program, program

TO_ROUNDING = 1e-10
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


@pytest.mark.parametrize("how", ["handler", "distribution", "event"])
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
    assert_equal(engine.loss(elbo(), {"z": pathwise()}, values={"z": z[:, :1, :, None]}), elbo_of(eps[:, :1]))


def elbo_of(eps: np.ndarray) -> Loss:
    def loss(p: Numbers) -> Any:
        prior, likelihood, log_q = masked_log_w(p, eps)
        return -(prior + likelihood - log_q).mean(1).sum()

    return differentiated(loss, MASKED)


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
    """Each site's score, summed over its plate, times what is downstream of it in its own row."""
    engine = portable(backend, nested_model, nested_guide, {"x": GRID})
    eps_z, eps_w, values = nested_noise(2)

    def loss(p: Numbers) -> Any:
        t, fixed = nested_terms(p, eps_z, eps_w, values), nested_terms(NESTED, eps_z, eps_w)
        rows = {n: t[f"p_{n}"].sum(-1) - t[f"q_{n}"].sum(-1) for n in "zw"} | {"x": t["p_x"].sum(-1)}
        cost = {n: fixed[f"p_{n}"].sum(-1) - fixed[f"q_{n}"].sum(-1) for n in "zw"} | {"x": fixed["p_x"].sum(-1)}
        of_z, of_w = ((t[f"q_{n}"] - fixed[f"q_{n}"]).sum(-1) for n in "zw")
        surrogate = of_z * (cost["z"] + cost["w"] + cost["x"]) + of_w * (cost["w"] + cost["x"])
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


@pytest.mark.parametrize("objective", [elbo(outer=2, draws=3), iwae(outer=2, draws=3)], ids=["elbo", "iwae"])
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
    [(0.4, 0.4, 1.0), (0.4, 1.0, 1.0), (1.0, 0.4, 3.0), (WEIGHTS, WEIGHTS, 1.0), (1.0, 1.0, WEIGHTS)],
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
