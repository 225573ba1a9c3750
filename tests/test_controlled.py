"""Discrete draws with values beside them: antithetic pairs (DisARM), and relaxed values as a control variate (REBAR,
RELAX).

Expectations are exact. The antithetic estimator is piecewise constant in its uniforms, so it is summed over the pieces.
For the others hard draws are summed over, and the noise given them is integrated: the exponentials E_D and E_i of a
relaxed value enter through their ratios alone, so that V of them are V - 1 numbers with the uniform distribution on a
simplex. Quadrature there is of Gauss and Legendre; the tests say how far off it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import oracle
import pytest
import test_discrete as discrete
from _pytest.mark import ParameterSet
from harness import BACKENDS, Engine, Loss, assert_equal, assert_unbiased
from toys import BERNOULLI, CATEGORICALS, MIXED_YZ, MIXED_ZY, PLATE, UPWARD, Array, Backend, Ppl, Toy

from ppl_lvm import Fit, fit, matrix, program, recipe
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.catalogue import objectives
from ppl_lvm.errors import LegalityError, RecipeError
from ppl_lvm.estimators.disarm import disarm
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rebar import rebar
from ppl_lvm.estimators.relax import relax
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.stl import stl
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.log_variance import log_variance
from ppl_lvm.objectives.vis import vis
from ppl_lvm.program import Program

on_both = pytest.mark.parametrize("backend", BACKENDS)
TO_ROUNDING, TO_QUADRATURE = 1e-12, 1e-9
TAU, ETA = 0.5, 0.7
OWN: dict[str, dict[str, np.ndarray]] = {
    "rebar": {"log_temperature": np.log([TAU]), "log_eta": np.log([ETA])},
    "relax": {
        **{"log_temperature": np.log([TAU]), "log_eta": np.log([ETA])},
        **{"w": np.array([0.8, -0.6]), "u": np.array([0.2, -0.5])},
        "X": np.array([[0.7, -0.4]]),
    },
}


def own_of(estimators: Mapping[str, Estimator], weights: Mapping[str, int]) -> dict[str, dict[str, np.ndarray]]:
    """Own parameters anywhere but where they start."""
    found = {}
    for site, estimator in estimators.items():
        if estimator.initial_own(1, 1):
            own = dict(OWN[type(estimator).__name__])
            if "w" in own:
                own["U"] = np.sin(1.0 + np.arange(2 * weights[site])).reshape(weights[site], 2)
            found[site] = own
    return found


class Noise(NamedTuple):
    """Outcomes of one element's noise, with their probability, and the weights of classes of each variant."""

    weight: Array  # [O]
    values: Array  # [O, variants, V]
    given: Mapping[str, Array]  # what is injected: "", a hard draw [O, V], and "~0", uniforms [O, V]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def simplex(V: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes `[.., V]` and weights of the uniform distribution on the simplex of two or three exponentials, E_D first.

    Relaxed values are rough where E_D and another of three vanish together. So the triangle is halved, and each half is
    written in polar form around that vertex.
    """
    t, w = np.polynomial.legendre.leggauss(n)
    t, w = (t + 1) / 2, w / 2
    if V == 2:
        return np.stack([1 - t, t], -1), w
    r, b = (x.ravel()[:, None] for x in np.meshgrid(t, t, indexing="ij"))
    far = (1 - b) * np.array([1.0, 0.0, 0.0]) + b * np.array([0.0, 0.5, 0.5])
    halves = [(1 - r) * np.eye(3)[vertex] + r * far for vertex in (1, 2)]
    return np.concatenate(halves), np.tile(np.outer(w, w).ravel() * r[:, 0], 2)


def noise(estimator: Estimator, pi: np.ndarray, n: int) -> Noise:
    """All outcomes of one element with these probabilities of classes, `n` nodes for each integral."""
    V = len(pi)
    if isinstance(estimator, score):
        return Noise(pi, np.eye(V)[:, None], {"": np.eye(V)})
    if isinstance(estimator, disarm):
        beta = pi[:-1] / pi[::-1].cumsum()[::-1][:-1]
        cuts = [np.unique([0.0, b, 1.0 - b, 1.0]) for b in beta]
        pieces = [list(zip((c[1:] + c[:-1]) / 2, np.diff(c), strict=True)) for c in cuts]
        weight, values, uniforms = [], [], []
        for piece in itertools.product(*pieces):
            u = np.array([middle for middle, _ in piece])
            weight.append(np.prod([length for _, length in piece]))
            uniforms.append([*u, 0.5])
            pair = [np.append(sticks, True).argmax() for sticks in (u < beta, 1 - u < beta)]
            values.append(np.eye(V)[pair])
        return Noise(np.array(weight), np.array(values), {"~0": np.array(uniforms)})
    assert isinstance(estimator, rebar | relax)
    at, of_node = simplex(V, n)
    weight, values, uniforms, draws = [], [], [], []
    for D in range(V):
        order = [D, *(i for i in range(V) if i != D)]
        E = np.empty_like(at)
        E[:, order] = at
        arrival = E / pi + E[:, [D]]
        arrival[:, D] = E[:, D]
        soft = softmax(-np.log(arrival) / TAU)
        hard = np.broadcast_to(np.eye(V)[D], soft.shape)
        weight.append(pi[D] * of_node)
        values.append(np.stack([hard, soft, soft], 1))
        uniforms.append(np.exp(-E))
        draws.append(hard)
    given = {"": np.concatenate(draws), "~0": np.concatenate(uniforms)}
    return Noise(np.concatenate(weight), np.concatenate(values), given)


def together(estimator: Estimator, noises: list[Noise], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes `[T, R]` of the noise of R elements, and their probability `[T]`.

    Relaxed values of different draws, rows and sites never meet in one term of a gradient, only hard ones do; so they
    may be integrated over one noise.
    """
    if isinstance(estimator, enumerated):
        return np.zeros((1, len(noises)), int), np.ones(1)
    if not isinstance(estimator, rebar | relax):
        index = np.indices([len(x.weight) for x in noises]).reshape(len(noises), -1).T
        return index, np.prod([x.weight[index[:, r]] for r, x in enumerate(noises)], axis=0)
    V = noises[0].values.shape[-1]
    _, of_node = simplex(V, n)
    D, node = np.indices((V ** len(noises), len(of_node))).reshape(2, -1)
    digits = np.stack(np.unravel_index(D, (V,) * len(noises)), -1)
    chance = [x.weight.reshape(V, -1).sum(1)[digits[:, r]] for r, x in enumerate(noises)]
    return digits * len(of_node) + node[:, None], np.prod(chance, axis=0) * of_node[node]


def noise_or_none(estimator: Estimator, pi: np.ndarray, n: int) -> Noise:
    if isinstance(estimator, enumerated):
        V = len(pi)
        return Noise(np.ones(1), np.eye(V)[None], {})
    return noise(estimator, pi, n)


def of_one_site(
    name: str, estimator: Estimator, pi: np.ndarray, K: int, n: int, program: Any = lambda y: y
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What to inject into the one site of a row, laid out like a table of outcomes, and their probability."""
    one = noise(estimator, pi, n)
    index, weight = together(estimator, [one] * K, n)
    found = {}
    for what, array in one.given.items():
        laid = np.repeat(array[index], one.values.shape[1], axis=1)[:, :, None]
        found[name + what] = laid if what else program(laid)
    return found, weight


def of_two_sites(
    toy: Toy, estimators: Mapping[str, Estimator], K: int, n: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same of z1 and of z2, which is drawn from it in every value of z1 that a draw has."""
    p, x = toy.params, float(toy.data["x"][0])
    first, second = estimators["z1"], estimators["z2"]
    of_x = toy is UPWARD
    one = noise_or_none(first, softmax(p["q_z1_logits"] + (x * p["q_z1_gain"] if of_x else 0.0)), n)
    shift = 0.0 if of_x else x * p["q_z2_gain"]
    found: dict[str, list[np.ndarray]] = {}
    weights = []
    R1, index, weight = one.values.shape[1], *together(first, [one] * K, n)
    for t, chance in zip(index, weight, strict=True):
        rows = one.values[t].reshape(K * R1, -1)
        noises = [noise_or_none(second, softmax(row @ p["q_z2_logits"] + shift), n) for row in rows]
        R2, below, then = noises[0].values.shape[1], *together(second, noises, n)
        weights.append(chance * then)
        for what, array in one.given.items():
            laid = np.repeat(array[t], R1 * R2, axis=0)[None, :, None]
            found.setdefault("z1" + what, []).append(np.broadcast_to(laid, (len(then), *laid.shape[1:])))
        for what in noises[0].given:
            laid = np.stack([x.given[what][below[:, r]] for r, x in enumerate(noises)], 1)
            found.setdefault("z2" + what, []).append(np.repeat(laid, R2, axis=1)[:, :, None])
    return {name: np.concatenate(arrays) for name, arrays in found.items()}, np.concatenate(weights)


BERNOULLI_CASES = [
    (elbo(), disarm()),
    (elbo(draws=2), disarm()),
    (iwae(draws=2), disarm()),
    (iwae(draws=3), disarm()),
    (elbo(), rebar()),
    (elbo(draws=2), rebar(learn=False, temperature=TAU, eta=ETA)),
    (elbo(), relax(hidden=2)),
    (elbo(kl="closed_form"), disarm()),
    (elbo(kl="closed_form"), relax(hidden=2)),
    (iwae(draws=2), rebar()),
    (iwae(draws=2), relax(hidden=2)),
]


def name_of(cell: object) -> str | None:
    if isinstance(cell, dict):
        return "-".join(type(e).__name__ for e in cell.values())
    if isinstance(cell, Objective):
        return f"{type(cell).__name__}-{cell.draws}"
    return type(cell).__name__ if isinstance(cell, Estimator) else getattr(cell, "name", None)


def tolerance(*estimators: Estimator) -> float:
    return TO_QUADRATURE if any(e.relaxes for e in estimators) else TO_ROUNDING


@on_both
@pytest.mark.parametrize(("objective", "estimator"), BERNOULLI_CASES, ids=name_of)
def test_a_bernoulli(backend: Backend, objective: Any, estimator: Estimator) -> None:
    """Model and guide; off by less than 1e-12 with 32 nodes where the temperature is 1/2."""
    p, K = 1 / (1 + np.exp(1.5)), objective.draws
    values, weight = of_one_site("z", estimator, np.array([1 - p, p]), K, 32, lambda y: y[..., 1])
    found = Engine.of(backend, BERNOULLI).loss(
        objective.model_copy(update={"outer": len(weight)}),
        {"z": estimator},
        values=values,
        weight=weight,
        own=own_of({"z": estimator}, {"z": 2}),
    )
    assert_equal(found, *oracle.exact(BERNOULLI, type(objective).__name__, K), TO_ROUNDING)


def served() -> Iterator[ParameterSet]:
    for name in objectives():
        for label, objective in matrix._objectives(name):
            if objective.requests() & {"cross", "moments", "prior"}:
                continue  # compares rows, of which the toy has one
            for estimator in (disarm(), rebar()):
                if matrix.cell(label, objective, estimator, "finite").verdict != "refused":
                    fast = isinstance(estimator, disarm)
                    marks = [] if fast else [pytest.mark.slow]
                    yield pytest.param(objective, estimator, id=f"{label}-{name_of(estimator)}", marks=marks)


@pytest.mark.parametrize(("objective", "estimator"), [*served()])
def test_every_objective_that_they_serve(objective: Objective, estimator: Estimator) -> None:
    """The expectation of its gradient is that of the sum over all values; a kink is hit by quadrature to 1e-4."""
    p, K, engine = 1 / (1 + np.exp(1.5)), objective.draws, Engine.of("pyro", BERNOULLI)
    values, weight = of_one_site("z", estimator, np.array([1 - p, p]), K, 24, lambda y: y[..., 1])
    learned = {n: np.asarray(v, dtype=float) for n, v in objective.initial_own(2).items()}
    own = {"objective": learned} if learned else {}
    exact = engine.loss(objective.model_copy(update={"outer": 1}), {"z": enumerated()}, own=own)
    found = engine.loss(
        objective.model_copy(update={"outer": len(weight)}),
        {"z": estimator},
        values=values,
        weight=weight,
        own=own_of({"z": estimator}, {"z": 2}) | own,
    )
    rough = estimator.relaxes and not objective.smooth()
    assert_equal(found, float(exact.value), exact.gradient, 1e-4 if rough else tolerance(estimator))


FIXED = rebar(learn=False, temperature=TAU, eta=ETA)
PAIRS: list[tuple[Objective, Estimator, Estimator]] = [
    (elbo(), disarm(), score()),
    (elbo(), score(), disarm()),
    (elbo(), disarm(), disarm()),
    (elbo(), enumerated(), disarm()),
    (elbo(), disarm(), enumerated()),
    (elbo(), FIXED, score()),
    (elbo(), FIXED, enumerated()),
    (elbo(), score(), rebar()),
    (elbo(), enumerated(), relax(hidden=2)),
    (elbo(), disarm(), relax(hidden=2)),
    (elbo(), FIXED, disarm()),
    (elbo(), FIXED, relax(hidden=2)),
    (iwae(draws=2), disarm(), score()),
    (iwae(draws=2), score(), disarm()),
    (iwae(draws=2), disarm(), disarm()),
    (iwae(draws=2), FIXED, score()),
    (iwae(draws=2), score(), relax(hidden=2)),
]


def cells() -> Iterator[ParameterSet]:
    for (i, case), toy, backend in itertools.product(enumerate(PAIRS), (CATEGORICALS, UPWARD), BACKENDS):
        fast = toy is UPWARD if backend == "pyro" else toy is CATEGORICALS and i % 4 == 1
        fast = fast and not (case[1].relaxes and case[2].relaxes)
        name = "-".join([backend, *map(str, map(name_of, (toy, *case)))])
        yield pytest.param(backend, toy, *case, id=name, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("backend", "toy", "objective", "first", "second"), [*cells()])
def test_a_site_and_one_that_is_drawn_from_it(
    backend: Backend, toy: Toy, objective: Objective, first: Estimator, second: Estimator
) -> None:
    """Gradient that flows through a relaxed value reaches what is drawn from it by that site's own estimator.

    With 16 nodes for every integral the expectation is off by less than 1e-10, with 24 by less than 1e-14.
    """
    estimators = {"z1": first, "z2": second}
    values, weight = of_two_sites(toy, estimators, objective.draws, 16)
    found = Engine.of(backend, toy).loss(
        objective.model_copy(update={"outer": len(weight)}),
        estimators,
        values=values,
        weight=weight,
        own=own_of(estimators, {"z1": 2, "z2": 3}),
    )
    exact = oracle.exact(toy, type(objective).__name__, objective.draws)
    assert_equal(found, *exact, tolerance(first, second))


# Elements of a site: in one event, in a plate inside the row, and as indices.


def of_elements(
    estimator: Estimator, pi: np.ndarray, n: int, program: Any = lambda y: y
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same of one draw of a site of two elements, whose relaxed values do meet: `pi` is `[2, V]`."""
    ones = [noise(estimator, p, n) for p in pi]
    index = np.indices([len(x.weight) for x in ones]).reshape(2, -1)
    weight = ones[0].weight[index[0]] * ones[1].weight[index[1]]
    found = {}
    for what in ones[0].given:
        laid = np.stack([x.given[what][at] for x, at in zip(ones, index, strict=True)], 1)[:, None, None]
        laid = np.repeat(laid, ones[0].values.shape[1], axis=1)
        found["z" + what] = laid if what else program(laid)
    return found, weight


ELEMENTS = [
    pytest.param(3, {}, disarm(), id="one-hots-disarm"),
    pytest.param(3, {"plate": True}, disarm(), id="plate-disarm"),
    pytest.param(2, {"bernoulli": True}, disarm(), id="bernoullis-disarm"),
    pytest.param(2, {"bernoulli": True}, relax(hidden=2), id="bernoullis-relax"),
    pytest.param(2, {"plate": True}, relax(hidden=2), id="plate-relax"),
    pytest.param(2, {}, rebar(), id="one-hots-rebar"),
]


@on_both
@pytest.mark.parametrize(("V", "kind", "estimator"), ELEMENTS)
def test_elements_of_a_row(backend: Backend, V: int, kind: dict[str, bool], estimator: Estimator) -> None:
    """All elements of a row have values beside the draw together, in whatever way they are declared."""
    pi = softmax(discrete.THETA[:2, :V])
    program = (lambda y: y[..., 1]) if "bernoulli" in kind else (lambda y: y)
    values, weight = of_elements(estimator, pi, 16, program)
    with jax.enable_x64(True):
        run = discrete.engine(backend, discrete.quadratic, 2, V, **kind)
        found = run.loss(
            elbo(outer=len(weight)),
            {"z": estimator},
            values=values,
            weight=weight,
            own=own_of({"z": estimator}, {"z": V if "plate" in kind else 2 * V}),
        )
        assert_equal(found, None, discrete.exact(discrete.quadratic, 2, V), tolerance(estimator))


@on_both
def test_indices(backend: Backend) -> None:
    """A categorical's value is an index, with which the program looks up what it needs."""
    logits, prior, at = np.array([0.4, -0.3, 0.9]), np.array([0.1, 0.5, -0.2]), np.array([-0.8, 0.3, 1.7])

    def model(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("at", at)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Categorical(logits=ppl.param("prior", prior)))
            ppl.sample("x", ppl.dist.Normal(loc[z], 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Categorical(logits=ppl.param("logits", logits)))

    engine = Engine(backend, model, guide, {"x": np.array([0.6])}, portable=True)
    for objective in (elbo(), iwae(draws=2)):
        exact = engine.loss(objective, {"z": enumerated()})
        values, weight = of_one_site("z", disarm(), softmax(logits), objective.draws, 0)
        many = objective.model_copy(update={"outer": len(weight)})
        found = engine.loss(many, {"z": disarm()}, values=values, weight=weight)
        assert_equal(found, float(exact.value), exact.gradient, TO_ROUNDING)


@on_both
@pytest.mark.parametrize("estimator", [disarm(), rebar(), relax(hidden=2)], ids=name_of)
def test_a_mask(backend: Backend, estimator: Estimator) -> None:
    """It takes away the site's density; what the data say of the value is a function of the draw as ever."""
    logit, x = 0.4, 1.3

    def z(ppl: Ppl, x: Array, start: float) -> Array:
        logits = ppl.param(f"logit{start}", start) + 0.0 * x
        return ppl.sample("z", ppl.dist.Bernoulli(logits=logits).mask(x < 0.0))

    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(z(ppl, x, -0.2), 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z(ppl, x, logit)

    p = 1 / (1 + np.exp(-logit))
    values, weight = of_one_site("z", estimator, np.array([1 - p, p]), 1, 24, lambda y: y[..., 1])
    found = Engine(backend, model, guide, {"x": np.array([x])}, portable=True).loss(
        elbo(outer=len(weight)), {"z": estimator}, values=values, weight=weight, own=own_of({"z": estimator}, {"z": 2})
    )
    exact = p * (1 - p) * ((x - 1.0) ** 2 - x**2) / 2
    assert_equal(found, None, {"logit0.4": exact, "logit-0.2": np.zeros(())}, tolerance(estimator))


@on_both
@pytest.mark.parametrize("estimator", [disarm(), FIXED, relax(hidden=2)], ids=name_of)
@pytest.mark.parametrize("objective", [elbo(), iwae(draws=2)], ids=name_of)
def test_a_global_class(backend: Backend, objective: Objective, estimator: Estimator) -> None:
    """The rows are summed over under every value of it, soft ones included."""
    one = noise(estimator, softmax(PLATE.params["q_g_logits"]), 24)
    values = {"g" + what: np.repeat(array, one.values.shape[1], axis=0) for what, array in one.given.items()}
    estimators = {"g": estimator, "z": enumerated()}
    found = Engine.of(backend, PLATE).loss(
        objective.model_copy(update={"outer": len(one.weight)}),
        estimators,
        values=values,
        weight=one.weight,
        own=own_of(estimators, {"g": 2}),
    )
    assert_equal(found, *oracle.exact(PLATE, type(objective).__name__, objective.draws), tolerance(estimator))


# Beside a continuous site the expectation over classes alone is that of enumeration, at every noise of the other's.


def beside(*others: Estimator) -> Iterator[ParameterSet]:
    for i, (other, estimator) in enumerate(itertools.product(others, (disarm(), rebar(), relax(hidden=2)))):
        for backend in BACKENDS:
            name = "-".join([backend, *map(str, map(name_of, (other, estimator)))])
            fast = backend == "pyro" or i == 2
            yield pytest.param(backend, other, estimator, id=name, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("backend", "above", "estimator"), [*beside(pathwise(), score())])
def test_below_a_continuous_site(backend: Backend, above: Estimator, estimator: Estimator) -> None:
    p, z = MIXED_YZ.params, 0.4
    values, weight = of_one_site("y", estimator, softmax(p["q_y_logits"] + z * p["q_y_gain"]), 2, 24)
    rows = values["y~0"].shape[1]
    engine = Engine.of(backend, MIXED_YZ)
    for objective in (elbo(draws=2), iwae(draws=2)):
        found = engine.loss(
            objective.model_copy(update={"outer": len(weight)}),
            {"z": above, "y": estimator},
            values={**values, "z": np.full((len(weight), rows, 1), z)},
            weight=weight,
            own=own_of({"y": estimator}, {"y": 2}),
        )
        exact = engine.loss(objective, {"z": above, "y": enumerated()}, values={"z": np.full((1, 4, 1), z)})
        assert_equal(found, float(exact.value), exact.gradient, tolerance(estimator))


@pytest.mark.parametrize(("backend", "below", "estimator"), [*beside(pathwise(), stl())])
def test_above_a_continuous_site(backend: Backend, below: Estimator, estimator: Estimator) -> None:
    """z is drawn from each value of y by the same noise, soft values included."""
    p, x, noise_of_z = MIXED_ZY.params, MIXED_ZY.data["x"][0], -0.7
    one = noise(estimator, softmax(p["q_y_logits"]), 24)

    def z(y: np.ndarray) -> np.ndarray:
        return y @ p["q_z_loc"] + p["q_z_gain"] * x + np.exp(y @ p["q_z_log_scale"]) * noise_of_z

    rows = one.values.shape[1]
    values = {"y" + what: np.repeat(a[:, None, None], rows, axis=1) for what, a in one.given.items()}
    engine = Engine.of(backend, MIXED_ZY)
    found = engine.loss(
        elbo(outer=len(one.weight)),
        {"y": estimator, "z": below},
        values={**values, "z": z(one.values)[..., None]},
        weight=one.weight,
        own=own_of({"y": estimator}, {"y": 2}),
    )
    exact = engine.loss(elbo(), {"y": enumerated(), "z": below}, values={"z": z(np.eye(2))[None, :, None]})
    assert_equal(found, float(exact.value), exact.gradient, tolerance(estimator))


@pytest.mark.parametrize("estimator", [disarm(), rebar(), relax(hidden=2)], ids=name_of)
def test_three_classes_by_two_elements(estimator: Estimator) -> None:
    """By sampling: 40,000 draws of the library's own noise, each mean within 4 standard errors."""
    with jax.enable_x64(True):
        run = discrete.engine("numpyro", discrete.quadratic, 2, 3)
        own = own_of({"z": estimator}, {"z": 6})
        found = run.loss(elbo(draws=100), {"z": estimator}, own=own, runs=400, seed=1)
        assert_unbiased(found, None, discrete.exact(discrete.quadratic, 2, 3), bound=4.0)


# Variance.


def spread(found: Loss, weight: np.ndarray, name: str) -> float:
    g = found.gradient[name]
    return float(weight @ g**2 - (weight @ g) ** 2)


def test_less_variance_than_the_score() -> None:
    """On the same draws: of the Bernoulli's logit at K = 1, 0.51 and 0.007 (DisARM) and 0.28 (REBAR) by quadrature."""
    p = 1 / (1 + np.exp(1.5))
    found = {}
    for name, estimator in (("score", score()), ("disarm", disarm()), ("rebar", rebar()), ("relax", relax(hidden=2))):
        values, weight = of_one_site("z", estimator, np.array([1 - p, p]), 1, 24, lambda y: y[..., 1])
        given = {n: v[:, None] for n, v in values.items()}
        own = own_of({"z": estimator}, {"z": 2})
        if name == "relax":  # without its network
            own["z"] |= {"w": np.zeros(2)}
        runs = Engine.of("numpyro", BERNOULLI).loss(elbo(), {"z": estimator}, values=given, own=own, runs=len(weight))
        found[name] = spread(runs, weight, "q_logit")
    assert found["disarm"] < 0.02 * found["score"] and found["rebar"] < 0.6 * found["score"]
    assert found["relax"] == pytest.approx(found["rebar"], rel=1e-10)


TRAINED = [
    pytest.param(elbo(draws=2), rebar(), id="elbo-rebar"),
    pytest.param(iwae(draws=3), relax(hidden=2), id="iwae-relax"),
]


@on_both
@pytest.mark.parametrize(("objective", "estimator"), TRAINED)
def test_own_parameters_descend_the_squared_gradient(
    backend: Backend, objective: Objective, estimator: Estimator
) -> None:
    """At fixed draws: the temperature moves what is stopped in the score's signal, too."""
    with jax.enable_x64(True):
        run = discrete.engine(backend, discrete.quadratic, 2, 3)
        at = own_of({"z": estimator}, {"z": 6})["z"]

        def loss(own: Any) -> Loss:
            return run.loss(objective, {"z": estimator}, own={"z": own}, seed=4)

        found, h = loss(at).own["z"], 1e-4
        direction = {n: np.cos(1.0 + np.arange(v.size)).reshape(v.shape) for n, v in at.items()}
        ends = [
            (loss({n: v + by * direction[n] for n, v in at.items()}).gradient["theta"] ** 2).sum() for by in (h, -h)
        ]
        slope = sum((found[n] * d).sum() for n, d in direction.items())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
        assert all(np.abs(found[n]).max() > 1e-3 for n in at if n != "X")  # its rows are zeros


@cache
def parabola() -> tuple[float, float, float]:
    """`E a b` and `E b^2` of the Bernoulli's gradient `a - eta b`, where b has mean zero, and the mean of what eta's
    logarithm is trained by at 0.7; by quadrature."""
    p = 1 / (1 + np.exp(1.5))
    values, weight = of_one_site("z", rebar(), np.array([1 - p, p]), 1, 24, lambda y: y[..., 1])
    given = {n: v[:, None] for n, v in values.items()}

    def runs(eta: float) -> Loss:
        at = {"z": {**OWN["rebar"], "log_eta": np.log([eta])}}
        return Engine.of("numpyro", BERNOULLI).loss(elbo(), {"z": rebar()}, values=given, own=at, runs=len(weight))

    one, other = (runs(eta) for eta in (1.0, 0.7))
    b = (other.gradient["q_logit"] - one.gradient["q_logit"]) / 0.3
    a = one.gradient["q_logit"] + b
    assert abs(weight @ b) < 1e-10
    return float(weight @ (a * b)), float(weight @ b**2), float(weight @ other.own["z"]["log_eta"][:, 0])


def test_the_mean_slope_is_that_of_the_variance() -> None:
    ab, bb, slope = parabola()
    assert slope == pytest.approx(2 * 0.7 * (0.7 * bb - ab), rel=1e-9) and abs(slope) > 1e-3


@on_both
def test_eta_is_trained_to_where_the_gradient_varies_least(backend: Backend) -> None:
    """Model and guide stand still, and so does the temperature; one row, whose mean gradient drowns the least.

    From 0.3 to 1.07 by quadrature; over seeds the end scatters by 0.03, and five times that is allowed.
    """
    ab, bb, _ = parabola()
    best = ab / bb
    assert abs(np.log(best / 0.3)) > 0.3
    names = [*(n for n in BERNOULLI.params if n != "slope"), "estimator.z.log_temperature"]
    rows = {"x": np.full(1, 1.5)}
    falling = {"schedule": "exponential", "start": 0.05, "end": 0.0005, "steps": 3000}
    run = fit(
        Program("bernoulli", BERNOULLI.model, BERNOULLI.guide, portable=True, arguments=("x",)),
        data=rows,
        recipe="elbo",
        estimator={"name": "rebar", "temperature": TAU, "eta": 0.3},
        optimizer={"slope": {"name": "sgd", "learning_rate": 0.0}, "*": {"name": "adam", "learning_rate": falling}},
        freeze=names,
        steps=3000,
        backend=backend,
        dtype="float64",
        compile="graph" if backend == "pyro" else "auto",
    )
    found = next(v for n, v in run.state.arrays.items() if "log_eta" in n and "optimizer" not in n)
    assert np.exp(found).item() == pytest.approx(best, abs=0.15)


# The two backends, the ways to run a step, and fits.


@pytest.mark.parametrize("estimator", [disarm(), rebar(), relax(hidden=2)], ids=name_of)
@pytest.mark.parametrize("objective", [elbo(draws=2), pytest.param(iwae(draws=3), marks=pytest.mark.slow)], ids=name_of)
def test_backends_agree(objective: Objective, estimator: Estimator) -> None:
    """At one noise, own parameters' gradients included."""
    rng, K, rows = np.random.default_rng(0), objective.draws, estimator.count(0)
    values = {"z~0": np.repeat(rng.uniform(0.01, 0.99, (1, K, 1, 2, 3)), rows, axis=1)}
    if not isinstance(estimator, disarm):
        values["z"] = np.repeat(np.eye(3)[rng.integers(0, 3, (1, K, 1, 2))], rows, axis=1)
    found = []
    with jax.enable_x64(True):
        for backend in BACKENDS:
            run = discrete.engine(backend, discrete.quadratic, 2, 3)
            found.append(run.loss(objective, {"z": estimator}, values=values, own=own_of({"z": estimator}, {"z": 6})))
    ours, theirs = found
    assert_equal(ours, float(theirs.value), theirs.gradient, 1e-12)
    assert ours.own.keys() == theirs.own.keys()
    for name, gradient in theirs.own.get("z", {}).items():
        np.testing.assert_allclose(ours.own["z"][name], gradient, rtol=1e-10, atol=1e-14, err_msg=name)
        assert name == "X" or np.abs(gradient).max() > 1e-6


def trained(backend: Backend, estimator: Any, **options: Any) -> Fit:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 3)) + 2.0 * rng.integers(0, 2, (24, 1))
    given: dict[str, Any] = {"objective": "elbo", "steps": 20, "batch_size": 8, "learning_rate": 0.02, "seed": 1}
    given |= {"estimator": estimator, "dtype": "float64", "backend": backend} | options
    return fit(CODES, data=x, **{"recipe": given.pop("objective"), **given})


def codes_model(ppl: Ppl, x: Array) -> None:
    """Three bits a row and a linear decoder."""
    weight, bias = ppl.param("weight", np.eye(3)), ppl.param("bias", np.zeros(3))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("prior", np.zeros(3))).to_event(1))
        ppl.sample("x", ppl.dist.Normal(z @ weight + bias, 1.0).to_event(1), obs=x)


def codes_guide(ppl: Ppl, x: Array) -> None:
    encoder, shift = ppl.param("encoder", 0.3 * np.eye(3)), ppl.param("shift", np.zeros(3))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Bernoulli(logits=x @ encoder + shift).to_event(1))


CODES = Program("codes", codes_model, codes_guide, portable=True, arguments=("x",))


def assert_same_state(one: Fit, other: Fit, tolerance: float) -> None:
    assert one.state.arrays.keys() == other.state.arrays.keys()
    for name, value in one.state.arrays.items():
        np.testing.assert_allclose(value, other.state.arrays[name], rtol=tolerance, atol=tolerance, err_msg=name)


STEPPED = [("disarm", {}), ("relax", {}), ("rebar", {"objective": "iwae", "draws": 2})]


@pytest.mark.parametrize(("estimator", "options"), STEPPED, ids=lambda o: o if isinstance(o, str) else "")
def test_traced_as_eager_on_pyro(estimator: str, options: dict[str, Any]) -> None:
    eager, graph = (trained("pyro", estimator, compile=mode, **options) for mode in ("eager", "graph"))
    assert graph.state.mode == "graph" and not graph.messages
    assert_same_state(eager, graph, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "options"), STEPPED, ids=lambda o: o if isinstance(o, str) else "")
def test_compiled_as_eager_on_pyro(estimator: str, options: dict[str, Any]) -> None:
    eager, compiled = (trained("pyro", estimator, compile=mode, **options) for mode in ("eager", "compiled"))
    assert compiled.state.mode == "compiled"
    assert_same_state(eager, compiled, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "options"), STEPPED, ids=lambda o: o if isinstance(o, str) else "")
def test_compiled_as_eager_on_numpyro(estimator: str, options: dict[str, Any]) -> None:
    few = {**options, "steps": 3}
    eager, compiled = (trained("numpyro", estimator, compile=mode, **few) for mode in ("eager", "compiled"))
    assert_same_state(eager, compiled, 1e-9)


@on_both
@pytest.mark.parametrize("estimator", ["disarm", "rebar", "relax"])
def test_a_fit(backend: Backend, estimator: str) -> None:
    """In single precision the loss falls, own parameters move, and the state goes on to the same bits."""
    options: dict[str, Any] = {"dtype": "float32", "learning_rate": 0.05, "compile": "auto"}
    whole = trained(backend, estimator, steps=120, **options)
    loss = np.asarray(whole.history["loss"])
    assert np.isfinite(loss).all() and loss[-20:].mean() < loss[:20].mean() - 0.1
    own = {n: v for n, v in whole.state.arrays.items() if "log_eta" in n and "optimizer" not in n}
    assert bool(own) == (estimator != "disarm") and all(abs(float(v[0])) > 1e-3 for v in own.values())


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_pieces(backend: Backend) -> None:
    """Draws in pieces are run again for both derivatives."""
    rng, estimator = np.random.default_rng(0), relax(hidden=2)
    values = {
        "z~0": np.repeat(rng.uniform(0.01, 0.99, (1, 4, 1, 2, 3)), 3, axis=1),
        "z": np.repeat(np.eye(3)[rng.integers(0, 3, (1, 4, 1, 2))], 3, axis=1),
    }
    with jax.enable_x64(True):
        run = discrete.engine(backend, discrete.quadratic, 2, 3)
        own = own_of({"z": estimator}, {"z": 6})
        pieces, whole = (run.loss(iwae(draws=4, chunk=c), {"z": estimator}, values=values, own=own) for c in (2, None))
    assert_equal(pieces, float(whole.value), whole.gradient, TO_ROUNDING)
    for name, gradient in whole.own["z"].items():
        np.testing.assert_allclose(pieces.own["z"][name], gradient, rtol=1e-10, atol=1e-14, err_msg=name)


def test_turns() -> None:
    """They move with the guide."""
    run = trained("pyro", "rebar", alternate={"model": 1, "guide": 2}, steps=6)
    moved = [v for n, v in run.state.arrays.items() if n.startswith("own/z/log_eta")]
    assert len(moved) == 1 and abs(moved[0].item()) > 1e-3


@on_both
def test_restarts_and_a_network(backend: Backend) -> None:
    """A shipped program with networks, several runs at once."""
    x = np.random.default_rng(0).integers(0, 2, (12, 9))
    small = program("discrete_vae", variables=3, categories=4)
    run = fit(small, data=x, recipe="elbo", estimator="relax", restarts=2, steps=4, batch_size=6, backend=backend)
    assert np.isfinite(np.asarray(run.history["loss"])).all()


# What is refused.


def refused(
    match: str,
    estimators: Mapping[str, Estimator],
    toy: Toy | Program = CATEGORICALS,
    objective: Objective = elbo(),  # noqa: B008 - frozen
    data: Any = None,
) -> None:
    with pytest.raises(LegalityError, match=match):
        if isinstance(toy, Toy):
            Engine.of("pyro", toy).plan(objective, estimators)
        else:
            assert callable(toy.guide)
            Engine("pyro", toy.model, toy.guide, data, portable=True).plan(objective, estimators)


def test_own_parameters_do_not_learn_from_a_part_of_the_variance() -> None:
    why = r"'z2' is drawn from its relaxed values without a gradient \('{}'\).*'rebar' with learn = false, or use '"
    for second in (score(), disarm(), FIXED):
        refused(why.format(type(second).__name__), {"z1": rebar(), "z2": second})
    refused(why.format("score"), {"z1": relax(), "z2": score()})
    for legal in ({"z1": rebar(), "z2": enumerated()}, {"z1": FIXED, "z2": relax()}):
        Engine.of("pyro", CATEGORICALS).plan(elbo(), legal)
    Engine.of("pyro", MIXED_ZY).plan(elbo(), {"y": rebar(), "z": pathwise()})


def test_parameters_of_both_are_the_models() -> None:
    def z(ppl: Ppl, x: Array) -> Array:
        return ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("shared", 0.2) + 0.0 * x))

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z(ppl, x)

    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(z(ppl, x), 1.0), obs=x)

    shared = Program("shared", model, guide, portable=True, arguments=("x",))
    data = {"x": np.zeros(2)}
    for estimator in (rebar(), relax()):
        refused(
            r"share parameters \['shared'\], and its control variate is in the guide's gradient alone; use '",
            {"z": estimator},
            shared,
            data=data,
        )
    Engine("pyro", model, guide, data, portable=True).plan(elbo(), {"z": disarm()})


def test_verbs_sites_and_dreg() -> None:
    for estimator in (disarm(), rebar(), relax()):
        refused(r"inside `log_mean_exp` its credits .*; use '", {"z": estimator}, BERNOULLI, vis(draws=2))
        refused(r"inside `variance` draws are fixed there; use", {"z": estimator}, BERNOULLI, log_variance(draws=2))
        refused("one-hots and Bernoullis, and the distribution is neither", {"z": estimator, "y": score()}, MIXED_YZ)
        refused(
            "z.*make both|whose gradient the surrogate would reweigh",
            {"z": dreg(), "y": estimator},
            MIXED_YZ,
            iwae(draws=2),
        )


def test_a_live_global_above_dreg() -> None:
    """Soft values of a global are moved with, so that the surrogate of the rows would reweigh them."""

    def model(ppl: Ppl, x: Array) -> None:
        g = ppl.sample("g", ppl.dist.Bernoulli(logits=ppl.param("prior", 0.1)))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(g, 1.0))
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        g = ppl.sample("g", ppl.dist.Bernoulli(logits=ppl.param("logit", 0.3)))
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(0.5 * x + g * ppl.param("gain", 0.2), 1.0))

    chosen, data = Program("above", model, guide, portable=True, arguments=("x",)), {"x": np.zeros(2)}
    sites = {"z": dreg()}
    refused("global site 'g' carries a pathwise gradient", {"g": rebar(), **sites}, chosen, iwae(draws=2), data)
    Engine("pyro", model, guide, data, portable=True).plan(iwae(draws=2), {"g": disarm(), **sites})


def test_a_model_of_another_kind() -> None:
    def site(ppl: Ppl, logits: Array) -> object:
        return ppl.dist.Bernoulli(logits=logits)

    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Binomial(1, logits=ppl.param("prior", 0.1) + 0.0 * x))
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", site(ppl, ppl.param("logit", 0.3) + x))

    chosen, data = Program("other", model, guide, portable=True, arguments=("x",)), {"x": np.zeros(2)}
    refused("is of another kind, which has no density there; give the model", {"z": rebar()}, chosen, data=data)
    Engine("pyro", model, guide, data, portable=True).plan(elbo(), {"z": disarm()})


def test_steps_of_a_scan() -> None:
    """Each step is drawn from the last, so that two values of a step are two sequences."""

    def codes(ppl: Ppl, x: Array, logit: Array) -> Array:
        def step(carry: Array, _: Array) -> tuple[Array, Array]:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=logit + carry))
            return z, z

        return ppl.scan(step, 0.0 * x, ppl.xp.zeros(3))[1]

    def model(ppl: Ppl, x: Array) -> None:
        logit = ppl.param("prior", 0.1)
        with ppl.plate("data", len(x)):
            z = codes(ppl, x, logit)
            ppl.sample("x", ppl.dist.Normal(ppl.xp.sum(z, axis=0), 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        logit = ppl.param("logit", 0.2)
        with ppl.plate("data", len(x)):
            codes(ppl, x, logit)

    chosen, data = Program("steps", model, guide, portable=True, arguments=("x",)), {"x": np.zeros(2)}
    for estimator in (disarm(), rebar()):
        refused("drawn step by step inside a scan", {"z": estimator}, chosen, data=data)


def test_options() -> None:
    with pytest.raises(RecipeError, match="temperature has a schedule and is learned; set learn = false"):
        recipe(
            "elbo",
            estimator={"name": "rebar", "temperature": {"schedule": "linear", "start": 1.0, "end": 0.5, "steps": 10}},
        )
    with pytest.raises(RecipeError, match="eta"):
        recipe("elbo", estimator={"name": "rebar", "eta": -1.0})
    assert rebar(learn=False, eta=0.3).numbers() == {"temperature": 0.5, "eta": 0.3}
