"""The oracle checked: bounds in order, published numbers, other routes to the same value, the programs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pytest
import torch
from numpyro.infer.util import log_density
from oracle import (
    exact,
    gaussian_log_evidence,
    log_evidence,
    log_evidence_rows,
    log_mean_exp_by_transform,
    log_mean_exp_by_tuples,
    table,
    tuples,
)
from toys import (
    BERNOULLI,
    BOTTOM_UP,
    CATEGORICALS,
    CONJUGATE_NORMAL,
    DISCRETE,
    GAUSSIANS2,
    GLOBAL_ROWS,
    LINEAR_GAUSSIAN_FACTORS,
    MIXED_YZ,
    MIXED_ZY,
    PLATE,
    ROWS,
    TOYS,
    Array,
    Toy,
    native_rows,
)

SITES = {"g", "z", "z1", "z2", "y", "x"}
GAUSSIAN = (GAUSSIANS2, BOTTOM_UP, CONJUGATE_NORMAL, LINEAR_GAUSSIAN_FACTORS, ROWS, GLOBAL_ROWS)


def each(*toys: Toy) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("toy", toys, ids=[toy.name for toy in toys])


def log_mean_exp(values: Array, axis: int) -> np.ndarray:
    return np.logaddexp.reduce(values, axis=axis) - np.log(values.shape[axis])


@each(BERNOULLI, CATEGORICALS, PLATE, MIXED_YZ, GAUSSIANS2)
def test_bounds_are_in_order_and_below_the_evidence(toy: Toy) -> None:
    bounds = [-exact(toy, "elbo").value] + [-exact(toy, "iwae", K).value for K in (2, 3)]
    assert bounds == sorted(bounds)
    assert len(set(bounds)) == 3
    assert bounds[-1] < log_evidence(toy)


@each(MIXED_YZ, GAUSSIANS2)
def test_one_draw_is_the_elbo(toy: Toy) -> None:
    one, elbo = exact(toy, "iwae", 1), exact(toy, "elbo")
    assert one.value == pytest.approx(elbo.value, abs=1e-11)
    for name in toy.params:
        np.testing.assert_allclose(one.gradient[name], elbo.gradient[name], atol=1e-10)


def test_published_gradients_of_one_bernoulli() -> None:
    assert float(exact(BERNOULLI, "elbo").gradient["q_logit"]) == pytest.approx(-0.2465, abs=5e-5)
    assert float(exact(BERNOULLI, "iwae", 5).gradient["q_logit"]) == pytest.approx(-0.1164, abs=5e-5)


@pytest.mark.parametrize(
    ("toy", "objective", "K"),
    [
        *((toy, *cell) for toy in (CATEGORICALS, PLATE, MIXED_YZ, MIXED_ZY) for cell in (("elbo", 1), ("iwae", 2))),
        (GAUSSIANS2, "iwae", 4),
        (CATEGORICALS, "vis_model", None),
        (CATEGORICALS, "vis_guide", None),
    ],
)
def test_gradients_agree_with_finite_differences(toy: Toy, objective: str, K: int | None) -> None:
    gradient = exact(toy, objective, K, scale=1.7).gradient
    rng, step = np.random.default_rng(0), 1e-4
    direction = {name: rng.normal(size=value.shape) for name, value in toy.params.items()}
    ahead, behind = (
        exact(
            toy,
            objective,
            K,
            {name: value + sign * step * direction[name] for name, value in toy.params.items()},
            scale=1.7,
        ).value
        for sign in (1.0, -1.0)
    )
    along = sum(float((gradient[name] * direction[name]).sum()) for name in toy.params)
    assert (ahead - behind) / (2 * step) == pytest.approx(along, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("K", [1, 2, 3])
@each(*DISCRETE)
def test_the_integral_equals_the_sum_over_tuples(toy: Toy, K: int) -> None:
    entries = table(toy)
    with jax.enable_x64(True):
        by_tuples = log_mean_exp_by_tuples(entries.log_mass, entries.log_w, K)
        by_transform = log_mean_exp_by_transform(entries.log_mass, entries.log_w, K, reach=15.0)
    np.testing.assert_allclose(np.asarray(by_transform), np.asarray(by_tuples), atol=1e-12)


@each(*GAUSSIAN)
def test_quadrature_finds_the_closed_form_evidence(toy: Toy) -> None:
    assert log_evidence(toy) == pytest.approx(gaussian_log_evidence(toy), abs=1e-10)


@pytest.mark.parametrize(("objective", "K"), [("elbo", 1), ("iwae", 4)])
@each(CONJUGATE_NORMAL, LINEAR_GAUSSIAN_FACTORS)
def test_every_bound_is_the_evidence_at_the_exact_posterior(toy: Toy, objective: str, K: int) -> None:
    found = exact(toy, objective, K)
    assert -found.value == pytest.approx(gaussian_log_evidence(toy), abs=1e-10)
    for name in toy.guide_params:
        np.testing.assert_allclose(found.gradient[name], 0.0, atol=1e-10)
    log_w = table(toy).log_w[0]
    np.testing.assert_allclose(log_w, np.broadcast_to(log_evidence_rows(toy)[:, None], log_w.shape), atol=1e-10)


def test_elbo_of_a_bottom_up_guide_in_closed_form() -> None:
    # E_q log p - E_q log q, all linear and Gaussian: second moments are enough.
    p, x = {name: float(value) for name, value in BOTTOM_UP.params.items()}, float(BOTTOM_UP.data["x"][0])
    v1, v2 = np.exp(2 * p["q_z1_log_scale"]), np.exp(2 * p["q_z2_log_scale"])
    m1 = p["q_z1_loc"] + p["q_z1_gain"] * x
    m2, spread = p["q_z2_loc"] + p["q_z2_gain"] * m1, p["q_z2_gain"] ** 2 * v1 + v2

    def expected(loc: float, variance: float, log_scale: float) -> float:
        return -0.5 * (loc**2 + variance) * np.exp(-2 * log_scale) - log_scale - 0.5 * np.log(2 * np.pi)

    cross = (1 - p["z1_gain"] * p["q_z2_gain"]) ** 2 * v1 + p["z1_gain"] ** 2 * v2
    elbo = (
        expected(m2 - p["z2_loc"], spread, p["z2_log_scale"])
        + expected(m1 - p["z1_gain"] * m2 - p["z1_bias"], cross, p["z1_log_scale"])
        + expected(x - p["x_gain"] * m1, p["x_gain"] ** 2 * v1, p["x_log_scale"])
        + 1 + np.log(2 * np.pi) + p["q_z1_log_scale"] + p["q_z2_log_scale"]
    )  # fmt: skip
    assert -exact(BOTTOM_UP, "elbo").value == pytest.approx(elbo, abs=1e-10)


@pytest.mark.parametrize("K", [2, 4])
def test_iwae_of_two_gaussians_by_monte_carlo(K: int) -> None:
    p, x = GAUSSIANS2.params, GAUSSIANS2.data["x"][0]
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 200_000, K))

    def normal(value: np.ndarray, loc: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
        return -0.5 * ((value - loc) / np.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi)

    z1 = p["q_z1_loc"] + p["q_z1_gain"] * x + np.exp(p["q_z1_log_scale"]) * first
    loc2 = p["q_z2_loc"] + p["q_z2_gain"] * z1 + p["q_z2_x"] * x
    z2 = loc2 + np.exp(p["q_z2_log_scale"]) * second
    zero = np.zeros(())
    log_w = normal(z1, p["z1_loc"], p["z1_log_scale"]) - normal(first, zero, zero) + p["q_z1_log_scale"]
    log_w += p["q_z2_log_scale"] - normal(second, zero, zero)
    log_w += normal(z2, p["z2_gain"] * z1 + p["z2_bias"], p["z2_log_scale"])
    bounds = log_mean_exp(log_w + normal(x, p["x_gain"] * z2, p["x_log_scale"]), axis=1)
    error = bounds.std() / np.sqrt(len(bounds))
    assert abs(bounds.mean() + exact(GAUSSIANS2, "iwae", K).value) < 4 * error


@each(ROWS, GLOBAL_ROWS)
def test_iwae_16_of_twenty_rows_by_monte_carlo(toy: Toy) -> None:
    # The draw of the global is shared by the rows; each row has its own 16 draws inside the logarithm.
    p, x, outer = {name: float(value) for name, value in toy.params.items()}, toy.data["x"], 2_000
    rng = np.random.default_rng(2)
    noise, log_w_g, g = rng.normal(size=(outer, 16, 20)), np.zeros(outer), np.zeros((outer, 1, 1))
    if toy is GLOBAL_ROWS:
        noise_g = rng.normal(size=outer)
        values = p["q_g_loc"] + np.exp(p["q_g_log_scale"]) * noise_g
        log_w_g = -0.5 * (values / np.exp(p["g_log_scale"])) ** 2 - p["g_log_scale"]
        log_w_g += 0.5 * noise_g**2 + p["q_g_log_scale"]
        g = values[:, None, None]
    z = p["q_z_gain"] * x + p["q_z_bias"] + p.get("q_z_g", 0.0) * g + np.exp(p["q_z_log_scale"]) * noise
    log_w = -0.5 * (z / np.exp(p["z_log_scale"])) ** 2 - p["z_log_scale"]
    log_w += 0.5 * noise**2 + p["q_z_log_scale"]
    log_w += -0.5 * ((x - g - z) / np.exp(p["x_log_scale"])) ** 2 - p["x_log_scale"] - 0.5 * np.log(2 * np.pi)
    bounds = log_w_g + log_mean_exp(log_w, axis=1).sum(-1)
    error = bounds.std() / np.sqrt(outer)
    assert abs(bounds.mean() + exact(toy, "iwae", 16).value) < 4 * error


@pytest.mark.parametrize("K", [1, 2, 3])
@each(*DISCRETE)
def test_outcomes_are_complete(toy: Toy, K: int) -> None:
    outcomes, rows = tuples(toy, K), len(toy.data["x"])
    assert outcomes.weight.sum() == pytest.approx(1.0, abs=1e-14)
    count = len(outcomes.weight)
    for name, value in outcomes.values.items():
        shape = (count,) if name == "g" else (count, K, rows)
        assert value.shape[: len(shape)] == shape
    flat = np.concatenate([value.reshape(count, -1) for value in outcomes.values.values()], axis=1)
    assert len(np.unique(flat, axis=0)) == count


def test_outcomes_weigh_like_the_guide() -> None:
    # The guide of the plate, by hand, at every outcome.
    p, x = PLATE.params, PLATE.data["x"]
    outcomes = tuples(PLATE, 2)
    g, z = outcomes.values["g"], outcomes.values["z"]

    def log_prob(value: np.ndarray, logits: np.ndarray) -> np.ndarray:
        return (value * logits).sum(-1) - np.logaddexp.reduce(logits, axis=-1)

    logits = (g @ p["q_z_logits"])[:, None, None, :] + x[:, None] * p["q_z_gain"]
    log_q = log_prob(g, p["q_g_logits"]) + log_prob(z, logits).sum((1, 2))
    np.testing.assert_allclose(outcomes.weight, np.exp(log_q), rtol=1e-13)


@pytest.mark.parametrize("K", [2, 3])
def test_score_function_identity(K: int) -> None:
    # Over all outcomes grad E f = E [f grad log q + grad f], here f = log mean w. For one Bernoulli of logit
    # l, grad log q(z) = z - sigmoid(l), and grad f = -sum of the normalised weights times that.
    outcomes, entries = tuples(BERNOULLI, K), table(BERNOULLI)
    z = outcomes.values["z"][:, :, 0]
    log_w = entries.log_w[0, 0][z.astype(int)]
    score = z - np.exp(entries.log_mass[0, 0, 1])
    bound = log_mean_exp(log_w, axis=1)
    share = np.exp(log_w - bound[:, None]) / K
    np.testing.assert_allclose((outcomes.weight * score.sum(1)).sum(), 0.0, atol=1e-15)
    gradient = outcomes.weight @ (bound * score.sum(1) - (share * score).sum(1))
    assert -gradient == pytest.approx(float(exact(BERNOULLI, "iwae", K).gradient["q_logit"]), abs=1e-14)


def test_doubly_reparameterised_gradient_by_quadrature() -> None:
    # IWAE-2 of two dependent Gaussians on a tensor rule over all four noises: the squared normalised weights
    # times the path derivative of log w (guide parameters stopped, the path through z1 into q(z2 | z1) kept).
    nodes = 0.5 * np.arange(-15, 16)
    weights = np.exp(-0.5 * nodes**2)
    weights /= weights.sum()
    noise = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.outer(weights, weights).ravel()
    p, x = {name: float(value) for name, value in GAUSSIANS2.params.items()}, float(GAUSSIANS2.data["x"][0])
    first, second = noise.T
    s1, s2 = np.exp(p["q_z1_log_scale"]), np.exp(p["q_z2_log_scale"])
    z1 = p["q_z1_loc"] + p["q_z1_gain"] * x + s1 * first
    z2 = p["q_z2_loc"] + p["q_z2_gain"] * z1 + p["q_z2_x"] * x + s2 * second
    prior1, prior2, noise_x = (np.exp(-2 * p[f"{name}_log_scale"]) for name in ("z1", "z2", "x"))
    ahead = z2 - p["z2_gain"] * z1 - p["z2_bias"]
    log_w = (
        -0.5 * prior1 * (z1 - p["z1_loc"]) ** 2 - 0.5 * prior2 * ahead**2
        - 0.5 * noise_x * (x - p["x_gain"] * z2) ** 2 + 0.5 * first**2 + 0.5 * second**2
    )  # fmt: skip
    by_z1 = -prior1 * (z1 - p["z1_loc"]) + prior2 * p["z2_gain"] * ahead
    by_z1 += first / s1 - p["q_z2_gain"] * second / s2
    by_z2 = -prior2 * ahead + noise_x * p["x_gain"] * (x - p["x_gain"] * z2) + second / s2
    down = by_z1 + p["q_z2_gain"] * by_z2
    path = {
        "q_z1_loc": down,
        "q_z1_gain": down * x,
        "q_z1_log_scale": down * s1 * first,
        "q_z2_loc": by_z2,
        "q_z2_gain": by_z2 * z1,
        "q_z2_x": by_z2 * x,
        "q_z2_log_scale": by_z2 * s2 * second,
    }
    truth = exact(GAUSSIANS2, "iwae", 2).gradient
    share = 1 / (1 + np.exp(log_w[None, :] - log_w[:, None]))
    for name in GAUSSIANS2.guide_params:
        # Both draws contribute alike, hence the factor 2.
        gradient = 2 * mass @ (share**2 * path[name][:, None]) @ mass
        assert -gradient == pytest.approx(float(truth[name]), abs=1e-7)


def pyro_namespace(toy: Toy) -> SimpleNamespace:
    """Just enough of a portable namespace to read a toy's log densities off its programs."""
    params = {name: torch.tensor(value) for name, value in toy.params.items()}
    return SimpleNamespace(
        sample=pyro.sample,
        plate=pyro.plate,
        param=lambda name, init: params[name],
        dist=pyro.distributions,
        xp=import_module("array_api_compat.torch"),
    )


def pyro_log_joint(program: Callable[..., None], toy: Toy, values: dict[str, torch.Tensor], outer: int) -> torch.Tensor:
    """Log density of a program at outer values of its sites, [outer], the rows summed out."""
    x = torch.tensor(toy.data["x"])
    with (
        pyro.poutine.trace() as record,
        pyro.poutine.condition(data=values),
        pyro.plate("outer", outer, dim=-2),
    ):
        program(pyro_namespace(toy), x)
    total = torch.zeros(outer, dtype=torch.float64)
    nodes: dict[str, Any] = record.trace.nodes
    for name in SITES & nodes.keys():
        total = total + nodes[name]["fn"].log_prob(nodes[name]["value"]).sum(-1)
    return total


@each(*DISCRETE)
def test_discrete_programs_state_the_oracles_densities(toy: Toy) -> None:
    outcomes = tuples(toy, 1)
    values = {name: torch.tensor(value) for name, value in outcomes.values.items()}
    # Both levels take the shape [outcomes, rows or 1, *event].
    values = {name: value[:, None] if name == "g" else value[:, 0] for name, value in values.items()}
    log_q = pyro_log_joint(toy.guide, toy, values, len(outcomes.weight)).numpy()
    log_p = pyro_log_joint(toy.model, toy, values, len(outcomes.weight)).numpy()
    np.testing.assert_allclose(np.exp(log_q), outcomes.weight, rtol=1e-12)
    assert -outcomes.weight @ (log_p - log_q) == pytest.approx(exact(toy, "elbo").value, abs=1e-12)


@each(*(toy for toy in TOYS.values() if toy not in DISCRETE))
def test_continuous_programs_state_the_oracles_densities(toy: Toy) -> None:
    outer = 20_000
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x = torch.tensor(toy.data["x"])
        with pyro.poutine.trace() as record, pyro.plate("outer", outer, dim=-2):
            toy.guide(pyro_namespace(toy), x)
    nodes: dict[str, Any] = record.trace.nodes
    values = {name: nodes[name]["value"] for name in SITES & nodes.keys()}
    log_w = pyro_log_joint(toy.model, toy, values, outer) - pyro_log_joint(toy.guide, toy, values, outer)
    error = float(log_w.std()) / np.sqrt(outer)
    assert abs(float(log_w.mean()) + exact(toy, "elbo").value) < 4 * error + 1e-10


@pytest.mark.parametrize(("backend", "with_global"), list(product(("pyro", "numpyro"), (False, True))))
def test_native_programs_equal_the_portable_ones(backend: Literal["pyro", "numpyro"], with_global: bool) -> None:
    toy = GLOBAL_ROWS if with_global else ROWS
    rng = np.random.default_rng(4)
    values = {"z": rng.normal(size=20)} | ({"g": np.asarray(0.3)} if with_global else {})
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    for native, portable in zip(native_rows(backend, with_global=with_global), (toy.model, toy.guide), strict=True):
        expected = float(pyro_log_joint(portable, toy, tensors, 1)[0])
        if backend == "pyro":
            pyro.clear_param_store()
            with pyro.poutine.trace() as record, pyro.poutine.condition(data=tensors):
                native(torch.tensor(toy.data["x"]))
            found = float(torch.as_tensor(record.trace.log_prob_sum()).detach())
            pyro.clear_param_store()
        else:
            with jax.enable_x64(True):
                found = float(log_density(native, (jnp.asarray(toy.data["x"]),), {}, values)[0])
        assert found == pytest.approx(expected, abs=1e-11)
