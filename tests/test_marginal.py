"""Discrete sites that only the model has, summed out exactly, on both backends.

A program whose sum is written by hand (a factor) says what is right: it is run on Pyro with the same injected noise,
and value and every gradient must be equal to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from _pytest.mark import ParameterSet
from harness import BACKENDS, Engine, Loss, assert_equal
from toys import Array, Backend, Ppl, Values

from ppl_lvm import Fit, fit, numpyro_loss, pyro_loss, recipe
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.sites import LARGEST_SUPPORT
from ppl_lvm.catalogue import objectives
from ppl_lvm.draws import Draws
from ppl_lvm.draws import Loss as Losses
from ppl_lvm.errors import LegalityError, ProgramError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.marginalize import marginalize
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.score import score
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.program import Program, program

TO_ROUNDING = 1e-12
optim: Any = pyro.optim  # its classes are made from torch's at import
on_both = pytest.mark.parametrize("backend", BACKENDS)


def slow(*cell: object) -> ParameterSet:
    """A cell that repeats what another shows; NumPyro takes seconds to compile each."""
    return pytest.param(*cell, marks=pytest.mark.slow)


Model = Callable[..., None]


@dataclass(frozen=True)
class Pair:
    """A model with sites that its guide does not draw, the same model with the sum written by hand, and the guide."""

    summed: Model
    by_hand: Model
    guide: Model
    data: Values
    estimators: dict[str, Estimator]

    def engine(self, backend: Backend, by_hand: bool = False) -> Engine:
        return Engine(backend, self.by_hand if by_hand else self.summed, self.guide, self.data, portable=True)


def reader(ppl: Ppl, inits: dict[str, Any]) -> Callable[[str], Array]:
    return lambda name: ppl.param(name, np.asarray(inits[name], dtype=float))


def log_softmax(ppl: Ppl, x: Array) -> Array:
    return x - ppl.ops.logsumexp(x, -1)[..., None]


def gaussian_guide(ppl: Ppl, x: Array) -> None:
    a, b, log_scale = ppl.param("a", 0.3), ppl.param("b", 0.1), ppl.param("q_log_scale", -0.2)
    with ppl.plate("data", len(x)):
        rows = ppl.xp.reshape(x, (len(x), -1)).sum(-1)
        ppl.sample("z", ppl.dist.Normal(a * rows + b, ppl.xp.exp(log_scale)))


def data_of(*shape: int) -> Values:
    return {"x": np.random.default_rng(0).normal(size=shape)}


# A mixture of three components beside a Gaussian: one site, one that looks at it.

MIXTURE = {"w": [0.3, -0.4, 0.2], "loc": [[-1.0, 0.5], [0.4, 1.2], [2.0, -0.6]], "gain": 0.7, "log_scale": -0.2}


def mixture(by_hand: bool) -> Model:
    def model(ppl: Ppl, x: Array) -> None:
        p = reader(ppl, MIXTURE)
        w, loc, gain, scale = p("w"), p("loc"), p("gain"), ppl.xp.exp(p("log_scale"))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * gain, 1.0))
            if by_hand:
                parts = ppl.dist.Normal(loc + gain * z[..., None, None], scale).log_prob(x[:, None]).sum(-1)
                ppl.factor("x", ppl.ops.logsumexp(log_softmax(ppl, w) + parts, -1))
            else:
                y = ppl.sample("y", ppl.dist.Categorical(logits=w))
                ppl.sample("x", ppl.dist.Normal(loc[y] + gain * z[..., None], scale).to_event(1), obs=x)

    return model


# Two chained classes under a global: z and both data look at one of the two, so one sum is over six values.

CHAINED = {
    "w1": [0.3, -0.4],
    "w2": [[0.2, -0.5, 0.1], [-0.3, 0.6, 0.4]],
    "m": [-0.6, 0.9],
    "loc": [-1.0, 0.4, 1.5],
    "rate": [[0.2, -0.7, 0.5], [0.1, 0.4, -0.3]],
    "log_scale": -0.3,
}


def chained(by_hand: bool) -> Model:
    def model(ppl: Ppl, x: Array, u: Array) -> None:
        p, dist = reader(ppl, CHAINED), ppl.dist
        w1, w2, m, loc, rate, scale = p("w1"), p("w2"), p("m"), p("loc"), p("rate"), ppl.xp.exp(p("log_scale"))
        g = ppl.sample("g", dist.Normal(0.0 * scale, 1.0))
        with ppl.plate("data", len(x)):
            if by_hand:
                z = ppl.sample("z", dist.Normal(0.0 * scale, 1.0))
                at = z[..., None, None]
                joint = log_softmax(ppl, w1)[:, None] + log_softmax(ppl, w2)
                joint = joint + dist.Normal(m[:, None], 1.0).log_prob(at) - dist.Normal(0.0 * scale, 1.0).log_prob(at)
                joint = joint + dist.Normal(loc + g[..., None, None] + at, scale).log_prob(x[:, None, None])
                joint = joint + dist.Bernoulli(logits=rate).log_prob(u[:, None, None])
                joint = ppl.xp.reshape(joint, (*joint.shape[:-2], 6))
                ppl.factor("x", ppl.ops.logsumexp(joint, -1))
            else:
                y1 = ppl.sample("y1", dist.Categorical(logits=w1))
                y2 = ppl.sample("y2", dist.OneHotCategorical(logits=w2[y1]))
                z = ppl.sample("z", dist.Normal(m[y1], 1.0))
                ppl.sample("x", dist.Normal(y2 @ loc + g + z, scale), obs=x)
                ppl.sample("u", dist.Bernoulli(logits=(rate[y1] * y2).sum(-1)), obs=u)

    return model


def chained_guide(ppl: Ppl, x: Array, u: Array) -> None:
    g_loc, g_scale = ppl.param("g_loc", 0.2), ppl.param("g_log_scale", -0.5)
    ppl.sample("g", ppl.dist.Normal(g_loc, ppl.xp.exp(g_scale)))
    gaussian_guide(ppl, x)


# A class in every cell of a row, given a class of the row; two data look at the cell's, one of them in a deeper plate.
# Masks leave out cells, and classes with all that looks at them.

CELLS = {"w1": [0.3, -0.4], "w2": [[0.2, -0.5, 0.1], [-0.3, 0.6, 0.4]], "loc": [-1.0, 0.4, 1.5], "gain": 0.6}
SEEN = np.random.default_rng(1).uniform(size=(3, 4)) < 0.7
THERE = np.array([[True, True, False, True], [True, True, True, True], [False, False, False, False]])


def cells(by_hand: bool) -> Model:
    def model(ppl: Ppl, x: Array, v: Array, seen: Array, there: Array) -> None:
        p, dist, xp = reader(ppl, CELLS), ppl.dist, ppl.xp
        w1, w2, loc, gain = p("w1"), p("w2"), p("loc"), p("gain")
        seen, there = seen > 0, there > 0
        with ppl.plate("data", len(x), dim=-3):
            z = ppl.sample("z", dist.Normal(0.0 * gain, 1.0))
            if by_hand:
                at = z[..., None, None]  # [rows, 1, 1, class of the row, class of the cell]
                of_x = xp.where(seen[..., None, None], dist.Normal(loc + at, 1.0).log_prob(x[..., None, None]), 0.0)
                of_v = dist.Normal(gain * loc, 1.0).log_prob(v[..., None, None]).sum(-3, keepdims=True)
                of_v = xp.where(there[..., None, None], of_v, 0.0)
                in_cell = ppl.ops.logsumexp(log_softmax(ppl, w2) + of_x + of_v, -1)
                in_cell = xp.where(there[..., None], in_cell, 0.0)
                of_row = log_softmax(ppl, w1) + in_cell.sum(-3, keepdims=True)
                ppl.factor("x", ppl.ops.logsumexp(of_row, -1))
            else:
                y1 = ppl.sample("y1", dist.Categorical(logits=w1))
                with ppl.plate("cells", 4, dim=-2):
                    y2 = ppl.sample("y2", dist.Categorical(logits=w2[y1]).mask(there))
                    ppl.sample("x", dist.Normal(loc[y2] + z, 1.0).mask(seen & there), obs=x)
                    with ppl.plate("views", 2, dim=-1):
                        ppl.sample("v", dist.Normal(gain * loc[y2], 1.0).mask(there), obs=v)

    return model


def cells_guide(ppl: Ppl, x: Array, v: Array, seen: Array, there: Array) -> None:
    a, log_scale = ppl.param("a", 0.3), ppl.param("q_log_scale", -0.2)
    with ppl.plate("data", len(x), dim=-3):
        ppl.sample("z", ppl.dist.Normal(a * x.sum(-2, keepdims=True), ppl.xp.exp(log_scale)))


# A hidden Markov chain, 3^9 paths, and a ring of five sites that are tied to both neighbours, with sites of two sizes.

MOVE = [[0.9, -0.2, 0.1], [0.0, 0.7, -0.4], [-0.5, 0.3, 0.6]]
MARKOV = {"start": [0.2, -0.3, 0.1], "move": MOVE, "loc": [-1, 0.4, 2]}
STEPS = 9


def markov(by_hand: bool) -> Model:
    def model(ppl: Ppl, x: Array) -> None:
        p = reader(ppl, MARKOV)
        start, move, loc = p("start"), p("move"), p("loc")
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * loc[0], 1.0))
            if by_hand:
                at = [ppl.dist.Normal(loc + z[..., None], 1.0).log_prob(x[:, t, None]) for t in range(STEPS)]
                forward = log_softmax(ppl, start) + at[0]
                for t in range(1, STEPS):
                    forward = ppl.ops.logsumexp(forward[..., None] + log_softmax(ppl, move), -2) + at[t]
                ppl.factor("x", ppl.ops.logsumexp(forward, -1))
                return
            y = ppl.sample("y0", ppl.dist.Categorical(logits=start))
            for t in range(STEPS):
                y = y if t == 0 else ppl.sample(f"y{t}", ppl.dist.Categorical(logits=move[y]))
                ppl.sample(f"x{t}", ppl.dist.Normal(loc[y] + z, 1.0), obs=x[:, t])

    return model


RING = (2, 3, 2, 3, 3)
TIES = {f"tie{i}": np.random.default_rng(i).normal(size=(n, RING[i - 1])).tolist() for i, n in enumerate(RING)}


def ring(by_hand: bool) -> Model:
    def model(ppl: Ppl, x: Array) -> None:
        p, xp = reader(ppl, TIES), ppl.xp
        ties = [p(f"tie{i}") for i in range(len(RING))]
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * ties[0][0, 0], 1.0))
            if by_hand:
                parts = []
                for path in itertools.product(*map(range, RING)):
                    mean = [ties[i][path[i], path[i - 1]] * z for i in range(len(RING))]
                    parts.append(sum(ppl.dist.Normal(m, 1.0).log_prob(x[:, i]) for i, m in enumerate(mean)))
                ppl.factor("x", ppl.ops.logsumexp(xp.stack(parts, -1), -1) - math.log(math.prod(RING)))
                return
            y = [ppl.sample(f"y{i}", ppl.dist.Categorical(logits=0.0 * ties[i][:, 0])) for i in range(len(RING))]
            for i in range(len(RING)):
                ppl.sample(f"x{i}", ppl.dist.Normal(ties[i][y[i], y[i - 1]] * z, 1.0), obs=x[:, i])

    return model


SUMMED = marginalize()
POINTS = np.concatenate([np.random.default_rng(0).normal(c, 0.6, size=(20, 2)) for c in (-2.0, 1.5)])
PAIRS = {
    "mixture": Pair(mixture(False), mixture(True), gaussian_guide, data_of(4, 2), {"y": SUMMED, "z": pathwise()}),
    "chained": Pair(
        chained(False),
        chained(True),
        chained_guide,
        {**data_of(3), "u": np.array([1.0, 0.0, 1.0])},
        {"y*": SUMMED, "*": pathwise()},
    ),
    "cells": Pair(
        cells(False),
        cells(True),
        cells_guide,
        {
            **data_of(3, 4, 1),
            "v": np.random.default_rng(2).normal(size=(3, 4, 2)),
            "seen": SEEN[..., None].astype(float),
            "there": THERE[..., None].astype(float),
        },
        {"y*": SUMMED, "*": pathwise()},
    ),
    "markov": Pair(markov(False), markov(True), gaussian_guide, data_of(3, STEPS), {"y*": SUMMED, "z": pathwise()}),
    "ring": Pair(ring(False), ring(True), gaussian_guide, data_of(3, len(RING)), {"y*": SUMMED, "z": pathwise()}),
}


def assert_same(found: Loss, expected: Loss) -> None:
    assert_equal(found, float(expected.value), expected.gradient, TO_ROUNDING)


def noise(pair: Pair, objective: Objective) -> dict[str, np.ndarray]:
    rng, rows = np.random.default_rng(3), len(pair.data["x"])
    inner = (1, 1) if pair is PAIRS["cells"] else ()
    values = {"z": rng.normal(size=(objective.outer, objective.draws, rows, *inner))}
    return values | ({"g": rng.normal(size=objective.outer)} if pair is PAIRS["chained"] else {})


@cache
def truth(name: str, objective: Objective, total_rows: int | None = None) -> Loss:
    pair = PAIRS[name]
    engine = pair.engine("pyro", by_hand=True)
    estimators = {n: e for n, e in pair.estimators.items() if not e.marginal}
    return engine.loss(objective, estimators, values=noise(pair, objective), total_rows=total_rows)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("mixture", iwae(draws=4)),
        slow("mixture", elbo()),
        slow("chained", elbo(draws=2)),
        ("chained", iwae(draws=4, outer=3)),
        ("cells", elbo(draws=2)),
        slow("cells", iwae(draws=4)),
        ("markov", iwae(draws=2)),
        ("ring", iwae(draws=2)),
    ],
    ids=lambda cell: cell if isinstance(cell, str) else f"{type(cell).__name__}{cell.draws}",
)
@on_both
def test_values_and_gradients_are_those_of_the_sum_written_by_hand(
    backend: Backend, name: str, objective: Objective
) -> None:
    pair = PAIRS[name]
    found = pair.engine(backend).loss(objective, pair.estimators, values=noise(pair, objective), total_rows=30)
    assert_same(found, truth(name, objective, 30))


@pytest.mark.parametrize("name", sorted(set(objectives()) - {"wake_sleep", "trajectory_balance", "fivo", "capacitron"}))
def test_every_objective_takes_the_sum_as_it_is(name: str) -> None:
    """All but `wake_sleep`, which would have to draw data from a factor, `fivo`, which is for scans, and those with
    parameters of their own."""
    own: dict[str, dict[str, Any]] = {"rws": {"sleep": 0.0}, "miwae": {"groups": 2}, "piwae": {"groups": 2}}
    own["capacity"] = {"ramp": 0.5}
    options: dict[str, Any] = {"draws": 4, **own.get(name, {})}
    chosen = recipe(name, steps=1, **options)
    assert chosen.objective is not None
    pair, patterns = PAIRS["mixture"], {n: e for n, e in chosen.estimator.items() if e is not None}
    values = noise(pair, chosen.objective)
    expected = pair.engine("pyro", by_hand=True).loss(chosen.objective, patterns, values=values)
    found = pair.engine("pyro").loss(chosen.objective, {**patterns, "y": SUMMED}, values=values)
    assert_same(found, expected)


@pytest.mark.parametrize("backend", ["pyro", slow("numpyro")])
def test_doubly_reparameterised_draws_beside_a_sum(backend: Backend) -> None:
    pair, objective = PAIRS["mixture"], iwae(draws=3)
    values = noise(pair, objective)
    expected = pair.engine("pyro", by_hand=True).loss(objective, {"z": dreg()}, values=values)
    assert_same(pair.engine(backend).loss(objective, {"y": SUMMED, "z": dreg()}, values=values), expected)


def test_pyro_runs_the_model_at_all_values_at_once_where_it_broadcasts() -> None:
    """Values are right either way (the cases above); here which way it is, and how often the model is run."""
    runs = []

    def counted(by: Model) -> Model:
        def model(ppl: Ppl, x: Array) -> None:
            runs.append(1)
            by(ppl, x)

        return model

    def stacked(ppl: Ppl, x: Array) -> None:
        """Does not broadcast: the number of dimensions of z is taken for granted."""
        p = reader(ppl, MIXTURE)
        w, loc, gain = p("w"), p("loc"), p("gain")
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * gain, 1.0))
            y = ppl.sample("y", ppl.dist.Categorical(logits=w))
            at = ppl.xp.stack([gain * z[i] for i in range(len(x))], 0)
            ppl.sample("x", ppl.dist.Normal(loc[y] + at[..., None], 1.0).to_event(1), obs=x)

    pair = PAIRS["mixture"]
    for model, count in ((mixture(False), 2), (stacked, 3)):
        engine = Engine("pyro", counted(model), gaussian_guide, pair.data, portable=True)
        engine.loss(elbo(), pair.estimators)
        del runs[:]
        engine.loss(elbo(), pair.estimators)
        assert len(runs) == count


@pytest.mark.parametrize("objective", [iwae(draws=4), iwae(draws=3, outer=2)], ids=["K = 4", "M = 2"])
def test_all_values_meet_the_same_dropout(objective: Objective) -> None:
    """x looks at y in name only, so the sum must be the density without it; it would be a mean over masks."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    net = torch.nn.Sequential(*layers).double()

    def model(summed: bool) -> Model:
        def model(x: torch.Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", pyro_dist.Normal(0.0, 1.0))
                y = pyro.sample("y", pyro_dist.Categorical(torch.ones(3) / 3)) if summed else 0.0 * z
                pyro.sample("x", pyro_dist.Normal(net(z[..., None])[..., 0] + 0.0 * y, 1.0), obs=x)

        return model

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro_dist.Normal(pyro.param("a", torch.tensor(0.3)) * x, 1.0))

    x = {"x": POINTS[:5, 0]}
    losses = []
    for summed in (False, True):
        engine = Engine("pyro", model(summed), guide, x, portable=False)
        losses.append(engine.loss(objective, {"z": pathwise(), **({"y": SUMMED} if summed else {})}))
    assert_same(losses[1], losses[0])
    other = engine.loss(objective, {"z": pathwise(), "y": SUMMED}, seed=1)
    assert abs(other.value - losses[0].value) > 1e-3


# Score terms are credited with the sum where any density inside it looks at their draw.

BITS = {"c": 0.3, "k": [0.5, -0.2], "w": [[0.3, -0.4, 0.2], [-0.5, 0.6, 0.1]], "loc": [-1.0, 0.4, 1.5]}
BITS_GUIDE: dict[str, Any] = {"q_s": 0.2, "q_b": [0.4, -0.7]}
TWO = np.array([[0.7, -1.1]])


def bits_model(ppl: Ppl, x: Array) -> None:
    """A bit of the row, a bit in each of two cells, the cell's class given both; x looks at the class alone."""
    p, dist = reader(ppl, BITS), ppl.dist
    c, k, w, loc = p("c"), p("k"), p("w"), p("loc")
    with ppl.plate("data", len(x), dim=-2):
        s = ppl.sample("s", dist.Bernoulli(logits=c))
        with ppl.plate("cells", 2, dim=-1):
            b = ppl.sample("b", dist.Bernoulli(logits=k))
            logits = w[0] + b[..., None] * (w[1] - w[0]) + s[..., None] * loc
            y = ppl.sample("y", dist.Categorical(logits=logits))
            ppl.sample("x", dist.Normal(loc[y], 1.0), obs=x)


def bits_guide(ppl: Ppl, x: Array) -> None:
    p = reader(ppl, BITS_GUIDE)
    q_s, q_b = p("q_s"), p("q_b")
    with ppl.plate("data", len(x), dim=-2):
        ppl.sample("s", ppl.dist.Bernoulli(logits=q_s))
        with ppl.plate("cells", 2, dim=-1):
            ppl.sample("b", ppl.dist.Bernoulli(logits=q_b))


def exact_bits() -> Loss:
    """The negative ELBO summed over all bits, and its gradient by autograd."""
    leaf = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in {**BITS, **BITS_GUIDE}.items()}
    x = torch.tensor(TWO[0])

    def log_p(logits: Array, bit: int) -> Array:
        return torch.distributions.Bernoulli(logits=logits).log_prob(torch.tensor(float(bit), dtype=torch.float64))

    total: Array = 0.0
    for s in (0, 1):
        q_s = log_p(leaf["q_s"], s).exp()
        total = total + q_s * (log_p(leaf["c"], s) - log_p(leaf["q_s"], s))
        for cell, b in itertools.product((0, 1), (0, 1)):
            q_b = log_p(leaf["q_b"][cell], b)
            of_class = torch.log_softmax(leaf["w"][b] + s * leaf["loc"], 0)
            of_x = torch.logsumexp(of_class + torch.distributions.Normal(leaf["loc"], 1.0).log_prob(x[cell]), 0)
            total = total + q_s * q_b.exp() * (log_p(leaf["k"][cell], b) + of_x - q_b)
    (-total).backward()
    return Loss(-total.detach().numpy(), {n: np.asarray(p.grad) for n, p in leaf.items()})


@pytest.mark.parametrize("backend", ["pyro", slow("numpyro")])
def test_score_terms_are_credited_with_the_sum(backend: Backend) -> None:
    outcomes = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
    probability = 1 / (1 + np.exp(-np.hstack(list(BITS_GUIDE.values()))))
    weight = np.where(outcomes == 1, probability, 1 - probability).prod(1)
    values = {"s": outcomes[:, :1, None, None], "b": outcomes[:, None, None, 1:]}
    engine = Engine(backend, bits_model, bits_guide, {"x": TWO}, portable=True)
    found = engine.loss(elbo(outer=8), {"*": score(), "y": SUMMED}, values=values, weight=weight)
    assert_same(found, exact_bits())


# What is refused, before training.


def structure(model: Model, guide: Model, data: Values | None = None, data_plate: str | None = None) -> Engine:
    return Engine("pyro", model, guide, data_of(3) if data is None else data, portable=True, data_plate=data_plate)


def refused(engine: Engine, estimators: Mapping[str, Estimator], objective: Objective | None = None) -> str:
    with pytest.raises(LegalityError) as caught:
        engine.plan(objective or elbo(), estimators)
    return str(caught.value)


def test_a_site_of_the_model_alone_is_summed_out_only_if_asked() -> None:
    engine = PAIRS["mixture"].engine("pyro")
    cases: tuple[dict[str, Estimator], ...] = ({}, {"*": pathwise()})
    for estimators in cases:
        message = refused(engine, estimators)
        assert "Latent site 'y' is in the model but not in the guide (guide sites: ['z'])" in message
        assert "Sample it in the guide, condition on it, or sum it out with estimator={'y': 'marginalize'}." in message
    assert "so that 'pathwise' has no draw of it" in message


def test_a_site_of_the_guide_is_enumerated_instead() -> None:
    engine = Engine("pyro", bits_model, bits_guide, {"x": TWO}, portable=True)
    message = refused(engine, {"s": SUMMED, "y": SUMMED})
    assert "Site 's' under estimator 'marginalize': it is for sites that only the model has, and the guide" in message
    assert "use 'score' or 'enumerate'." in message


def test_a_site_without_a_finite_support_is_refused_at_once() -> None:
    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
            y = ppl.sample("y", ppl.dist.Poisson(1.0 + 0.0 * x))
            ppl.sample("x", ppl.dist.Normal(z + y, 1.0), obs=x)

    for backend in BACKENDS:
        with pytest.raises(ProgramError, match=r"'y' is in the model but not in the guide .* sum it out in the model"):
            Engine(backend, model, gaussian_guide, data_of(3), portable=True)


def with_global(ppl: Ppl, x: Array) -> None:
    y = ppl.sample("y", ppl.dist.Bernoulli(logits=ppl.param("logit", 0.3)))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(y + z, 1.0), obs=x)


def test_a_global_site() -> None:
    message = refused(structure(with_global, gaussian_guide), {"y": SUMMED})
    assert "'y' is outside data plate 'data', and its sum would be outside the product over rows" in message
    assert "data_plate='none'" in message
    assert "sum it out in the model." in refused(structure(with_global, gaussian_guide), {})


@pytest.mark.parametrize("backend", ["pyro", slow("numpyro")])
def test_a_global_site_is_summed_out_of_the_whole_program_as_one_row(backend: Backend) -> None:
    def by_hand(ppl: Ppl, x: Array) -> None:
        logit = ppl.param("logit", 0.3)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        parts = [ppl.dist.Normal(y + z, 1.0).log_prob(x).sum(-1) for y in (0.0, 1.0)]
        prior = [ppl.dist.Bernoulli(logits=logit).log_prob(y + 0.0 * parts[0]) for y in (0.0, 1.0)]
        ppl.factor("x", ppl.ops.logsumexp(ppl.xp.stack([a + b for a, b in zip(parts, prior, strict=True)], -1), -1))

    data, values = data_of(3), {"z": np.random.default_rng(0).normal(size=(1, 2, 1, 3))}
    options: dict[str, Any] = {"portable": True, "data_plate": "none"}
    expected = Engine("pyro", by_hand, gaussian_guide, data, **options).loss(iwae(draws=2), {}, values=values)
    engine = Engine(backend, with_global, gaussian_guide, data, **options)
    assert_same(engine.loss(iwae(draws=2), {"y": SUMMED}, values=values), expected)


def chain(steps: int, classes: int = 2) -> Model:
    def model(ppl: Ppl, x: Array) -> None:
        logits = ppl.param("logits", np.zeros((classes, classes)))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
            y = ppl.sample("y0", ppl.dist.Categorical(logits=logits[0]))
            for t in range(1, steps):
                y = ppl.sample(f"y{t}", ppl.dist.Categorical(logits=logits[y]))
            ppl.sample("x", ppl.dist.Normal(z + y, 1.0), obs=x)

    return model


def test_a_chain_takes_as_many_runs_as_two_of_its_sites() -> None:
    plan = structure(chain(60, 4), gaussian_guide).plan(elbo(), {"y*": SUMMED})
    assert (plan.values_summed, plan.marginal[0].width) == (16, 16)


def test_sites_that_are_tied_together_over_the_limit() -> None:
    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
            y = [ppl.sample(f"y{i}", ppl.dist.Bernoulli(0.5 + 0.0 * x)) for i in range(13)]
            ppl.sample("x", ppl.dist.Normal(z + sum(y), 1.0), obs=x)

    message = refused(structure(model, gaussian_guide), {"y*": SUMMED})
    assert "tie 13 sites together (y0, y1, y2, y3, y4, y5, y6, y7)" in message
    assert f"8192 runs of the model and a table of 8192 entries, more than {LARGEST_SUPPORT}" in message
    assert "pyro.distributions.DiscreteHMM" in message
    assert "numpyro.contrib.funsor" in message


def test_sums_that_no_density_ties_together_share_their_runs() -> None:
    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x[:, 0], 1.0))
            for i in range(20):
                y = ppl.sample(f"y{i}", ppl.dist.Bernoulli(logits=ppl.param(f"w{i}", 0.1 * i)))
                ppl.sample(f"x{i}", ppl.dist.Normal(z + y, 1.0), obs=x[:, i])

    plan = structure(model, gaussian_guide, data_of(3, 20)).plan(elbo(), {"y*": SUMMED})
    assert len(plan.marginal) == 20
    assert plan.values_summed == 2


def test_a_site_inside_a_scan_is_sent_to_the_libraries() -> None:
    def model(ppl: Ppl, x: Array) -> None:
        logits = ppl.param("logits", np.zeros((2, 2)))
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(0.0 * x[:, 0], 1.0))

            def step(y: Array, x_t: Array) -> tuple[Array, Array]:
                y = ppl.sample("y", ppl.dist.Categorical(logits=logits[y]))
                ppl.sample("x", ppl.dist.Normal(1.0 * y, 1.0), obs=x_t)
                return y, x_t

            first = ppl.xp.zeros(len(x), dtype=ppl.xp.int64 if hasattr(ppl.xp, "int64") else int)
            ppl.scan(step, first, ppl.xp.moveaxis(x, 1, 0))

    with pytest.raises(ProgramError, match=r"'y' is in the model but .* discrete chain inside a scan; .*DiscreteHMM"):
        structure(model, gaussian_guide, data_of(3, 5))


def in_cells(outside: bool = False, plate: bool = True, crossed: bool = False) -> Model:
    """A bit in each of two cells of a row; x inside the plate, or a number of the row outside of it."""

    def model(ppl: Ppl, x: Array) -> None:
        logits = ppl.param("logits", np.zeros(2))
        with ppl.plate("data", len(x), dim=-3):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x[..., :1, :1], 1.0))
            if plate:
                with ppl.plate("cells", 2, dim=-1):
                    y = ppl.sample("y", ppl.dist.Bernoulli(logits=logits))
            else:
                y = ppl.sample("y", ppl.dist.Bernoulli(logits=logits))
            if crossed:
                with ppl.plate("views", 3, dim=-2):
                    w = ppl.sample("w", ppl.dist.Bernoulli(logits=logits[:1]))
                    with ppl.plate("cells_", 2, dim=-1):
                        ppl.sample("x", ppl.dist.Normal(z + y + w, 1.0), obs=x)
            elif outside:
                ppl.sample("u", ppl.dist.Normal(y.sum(-1)[..., None], 1.0), obs=x[..., :1, :1])
            else:
                with ppl.plate("views", 3, dim=-2), ppl.plate("cells_" if not plate else "cells", 2, dim=-1):
                    ppl.sample("x", ppl.dist.Normal(z + y, 1.0), obs=x)

    return model


def cells_only_guide(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x), dim=-3):
        ppl.sample("z", ppl.dist.Normal(0.0 * x[..., :1, :1], ppl.xp.exp(ppl.param("q_log_scale", -0.2))))


def test_elements_that_are_tied_together() -> None:
    data = data_of(3, 3, 2)
    message = refused(structure(in_cells(outside=True), cells_only_guide, data), {"y": SUMMED})
    assert "'u' looks at 'y' and is outside of its plates ['cells'], so that the elements are tied together" in message
    assert "to_event" in message
    message = refused(structure(in_cells(plate=False), cells_only_guide, data), {"y": SUMMED})
    assert "'y' has several elements along a dimension that is no plate's" in message
    message = refused(structure(in_cells(crossed=True), cells_only_guide, data), {"y": SUMMED, "w": SUMMED})
    assert "neither's plates are among the other's" in message


def test_closed_form_kl_of_a_prior_that_looks_at_a_site_summed_out() -> None:
    engine = PAIRS["chained"].engine("pyro")
    message = refused(engine, PAIRS["chained"].estimators, elbo(kl="closed_form"))
    assert "Site 'z' has no closed-form KL here: its prior looks at ['y1'], over which it is summed" in message
    plan = engine.plan(elbo(kl="where_known"), PAIRS["chained"].estimators)
    assert plan.kl == {"g"}
    mixture = PAIRS["mixture"]
    assert mixture.engine("pyro").plan(elbo(kl="closed_form"), mixture.estimators).kl == {"z"}


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"weights": {"x": 2.0}}, {"free_bits": 0.1}], ids=str)
def test_weights_that_a_joint_density_cannot_take(options: dict[str, Any]) -> None:
    message = refused(PAIRS["chained"].engine("pyro"), PAIRS["chained"].estimators, elbo(**options))
    assert "['z', 'x', 'u'] look at it, so only their joint density exists" in message
    mixture = PAIRS["mixture"]
    mixture.engine("pyro").plan(elbo(**options), mixture.estimators)


class apart(Objective):
    """Uses the likelihood by itself."""

    verbs = frozenset({"mean"})

    def __call__(self, d: Draws) -> Losses:
        return Losses(-d.total(d.mean(d.log_lik)))


def test_an_objective_that_takes_prior_and_likelihood_apart() -> None:
    chained, mixture = PAIRS["chained"], PAIRS["mixture"]
    with pytest.raises(LegalityError, match=r"\('z', 'x', 'u'\) look at 'y1', which is summed out"):
        chained.engine("pyro").loss(apart(), chained.estimators)
    mixture.engine("pyro").loss(apart(), mixture.estimators)


def test_a_scale_inside_the_sum() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro_dist.Normal(0.0, 1.0))
            y = pyro.sample("y", pyro_dist.Bernoulli(0.3))
            with pyro.poutine.scale(scale=0.5):
                pyro.sample("x", pyro_dist.Normal(z + y, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro_dist.Normal(0.3 * x, 1.0))

    engine = Engine("pyro", model, guide, data_of(3), portable=False)
    assert "['x'] are scaled" in refused(engine, {"y": SUMMED})


# Fits.

def explicit_mixture(ppl: Ppl, x: Array) -> None:
    """`models/mixtures/gaussian_mixture.py` with a site for the assignment."""
    dist, features, components, concentration, width = ppl.dist, x.shape[-1], 2, 2.0, 3.0
    ones = ppl.xp.ones((components, features)) + 0.0 * x[0, 0]
    w = ppl.sample("w", dist.Dirichlet(concentration * ones[:, 0]))
    mu = ppl.sample("mu", dist.Normal(0.0 * ones, width).to_event(2))
    sigma = ppl.sample("sigma", dist.LogNormal(0.0 * ones, 1.0).to_event(2))
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", dist.Categorical(probs=w))
        ppl.sample("x", dist.Normal(mu[y], sigma[y]).to_event(1), obs=x)


@pytest.mark.parametrize("backend", ["pyro", slow("numpyro")])
def test_a_fit_follows_the_path_of_the_mixture_written_by_hand(backend: Backend) -> None:
    shipped = program("gaussian_mixture")
    explicit = Program("explicit", explicit_mixture, shipped.guide, portable=True, arguments=("x",))
    options: dict[str, Any] = {"data": POINTS, "recipe": "elbo", "backend": backend, "steps": 30, "dtype": "float64"}
    options["batch_size"] = 20
    modes = ("eager", "graph") if backend == "pyro" else ("auto",)
    by_hand = fit(shipped, **options, compile=modes[0])
    for mode in modes:
        run = fit(explicit, **options, compile=mode, estimator={"y": "marginalize"})
        np.testing.assert_allclose(run.history["loss"], by_hand.history["loss"], rtol=0, atol=1e-10)
        for name, value in by_hand.params.items():
            np.testing.assert_allclose(run.params[name], value, rtol=0, atol=1e-10)
    assert np.ptp(by_hand.history["loss"]) > 0.1


def classes_model(ppl: Ppl, x: Array) -> None:
    """Nothing but the class: x | y Gaussian."""
    p = reader(ppl, MIXTURE)
    w, loc, scale = p("w"), p("loc"), ppl.xp.exp(p("log_scale"))
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", ppl.dist.Categorical(logits=w))
        ppl.sample("x", ppl.dist.Normal(loc[y], scale).to_event(1), obs=x)


def no_guide(ppl: Ppl, x: Array) -> None:
    """All latent sites of the model are summed out."""


def log_mixture(x: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """`log p(x)` of `classes_model`."""
    w, loc, scale = params["w"], params["loc"], np.exp(params["log_scale"])
    parts = -0.5 * (((x[:, None] - loc) / scale) ** 2).sum(-1) - 2 * np.log(scale) - np.log(2 * np.pi)
    return np.asarray(np.log((np.exp(w) / np.exp(w).sum() * np.exp(parts)).sum(-1)))


@pytest.mark.parametrize("backend", ["pyro", slow("numpyro")])
def test_a_program_of_nothing_but_sums(backend: Backend) -> None:
    toy = Program("classes", classes_model, no_guide, portable=True, arguments=("x",))
    run = fit(
        *(toy, None, POINTS, "elbo"), backend=backend, steps=20, dtype="float64", estimator={"y": "marginalize"}
    )
    exact = log_mixture(POINTS, run.params)
    np.testing.assert_allclose(run.log_likelihood(POINTS, draws=3).values, exact, rtol=0, atol=1e-9)
    assert run.history["loss"][-1] < run.history["loss"][0]
    assert not run.posterior(2, POINTS).values
    np.testing.assert_allclose(run.posterior(2, POINTS).log_likelihood["x"], [exact, exact], rtol=0, atol=1e-9)


@cache
def fitted(backend: Backend) -> Fit:
    toy = Program("mixture", mixture(False), gaussian_guide, portable=True, arguments=("x",))
    return fit(
        *(toy, None, POINTS, "elbo"), backend=backend, steps=5, dtype="float64", estimator={"y": "marginalize"}
    )


@pytest.mark.parametrize("backend", ["pyro", slow("numpyro")])
def test_the_site_is_drawn_by_the_model_and_is_in_no_posterior(backend: Backend) -> None:
    run = fitted(backend)
    found = run.posterior(4, POINTS)
    z, p = found.values["z"], run.params
    assert list(found.values) == ["z"]
    assert list(run.encode(POINTS, draws=3).mean) == ["z"]
    of_x = np.stack([log_mixture(POINTS - p["gain"] * z[i][:, None], p) for i in range(4)])
    np.testing.assert_allclose(found.log_likelihood["x"], of_x, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.log_p - of_x, -0.5 * z**2 - 0.5 * math.log(2 * math.pi), rtol=0, atol=1e-9)
    # 800 draws of each of 40 rows: the classes have the probabilities of the model, to 5 standard errors.
    drawn = run.do({"z": 0.0}, rows=40, draws=800)["y"]
    share = np.exp(p["w"]) / np.exp(p["w"]).sum()
    error = np.sqrt(share * (1 - share) / drawn.size)
    assert np.all(np.abs(np.bincount(drawn.astype(int).ravel(), minlength=3) / drawn.size - share) < 5 * error)
    # decode at a class and a code is Gaussian around them.
    mean = run.decode({"z": np.zeros(40), "y": np.full(40, 2)}, mean=True)["x"]
    np.testing.assert_allclose(mean.reshape(-1, 2), np.tile(p["loc"][2], (mean.size // 2, 1)), rtol=0, atol=1e-9)
    tree = run.to_arviz(5, POINTS, prior=3)
    assert tree["prior"]["y"].dims == ("chain", "draw", "data")
    assert run.predictive(3, POINTS)["x"].shape == (3, 40, 2)


def test_a_counterfactual_needs_a_posterior_of_the_site() -> None:
    run = fitted("pyro")
    with pytest.raises(ProgramError, match=r"\['y'\] are summed out, without a posterior to draw from"):
        run.do({"z": 0.0}, POINTS, draws=2)
    assert run.do({"z": 0.0, "y": 1}, POINTS, draws=2)["x"].shape == (2, 40, 2)


def test_entries_are_imputed_from_the_conditional_of_the_mixture() -> None:
    """With the class drawn from its prior as a proposal, weights are those of the seen entries alone."""
    run = fitted("pyro")
    p, data = run.params, POINTS[:1].copy()
    data[0, 1] = np.nan
    made = run.impute(data, draws=4000, particles=4000).values["x"][:, 0, 1]
    # z and y on a grid: the mean of the missing entry given the seen one.
    z = np.linspace(-8, 8, 4001)[:, None]
    scale = np.exp(p["log_scale"])
    at = p["loc"][:, 0] + p["gain"] * z
    w = np.exp(p["w"] - 0.5 * z**2 - 0.5 * ((data[0, 0] - at) / scale) ** 2)
    w /= w.sum()
    other = p["loc"][:, 1] + p["gain"] * z
    mean, sd = (w * other).sum(), np.sqrt((w * (other**2 + scale**2)).sum() - (w * other).sum() ** 2)
    assert abs(made.mean() - mean) < 5 * sd / np.sqrt(1000)  # 4,000 draws from an effective number of 1,000 or more


def test_joint_densities_are_named_after_the_site_that_is_summed_out() -> None:
    def model(ppl: Ppl, x: Array, u: Array) -> None:
        with ppl.plate("data", len(x)):
            y = ppl.sample("y", ppl.dist.Bernoulli(logits=ppl.param("logit", 0.3)))
            ppl.sample("x", ppl.dist.Normal(y, 1.0), obs=x)
            ppl.sample("u", ppl.dist.Normal(2.0 * y, 1.0), obs=u)

    def guide(ppl: Ppl, x: Array, u: Array) -> None:
        """Nothing is left to draw."""

    x, u = np.array([0.3, 1.2]), np.array([-0.4, 2.2])
    toy = Program("two", model, guide, portable=True, arguments=("x", "u"))
    options: dict[str, Any] = {"backend": "pyro", "steps": 2, "dtype": "float64", "compile": "eager"}
    run = fit(toy, None, {"x": x, "u": u}, "elbo", **options, estimator={"y": "marginalize"})
    one = 1 / (1 + np.exp(-run.params["logit"]))
    exact = np.log(sum(w * np.exp(-0.5 * (x - y) ** 2 - 0.5 * (u - 2 * y) ** 2) for y, w in ((0, 1 - one), (1, one))))
    found = run.posterior(1).log_likelihood
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"][0], exact - math.log(2 * math.pi), rtol=0, atol=1e-12)


# Native programs and their libraries' own loops.


def native(library: str, enumerated: bool) -> tuple[Model, Model]:
    """A mixture of two beside a Gaussian; `enumerated` marks the class as both libraries do."""
    ppl, dist = (pyro, pyro_dist) if library == "pyro" else (numpyro, numpyro_dist)
    array = torch.tensor if library == "pyro" else jnp.array

    def model(x: Array) -> None:
        loc = ppl.param("loc", array([-1.0, 1.5]))
        w = ppl.param("w", array([0.3, 0.7]), constraint=dist.constraints.simplex)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Normal(0.0, 1.0))
            y = ppl.sample("y", dist.Categorical(w), infer={"enumerate": "parallel"} if enumerated else {})
            ppl.sample("x", dist.Normal(loc[y] + z, 0.7), obs=x)

    def guide(x: Array) -> None:
        a = ppl.param("a", array(0.3))
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.Normal(a * x, 0.8))

    return model, guide


@pytest.mark.parametrize("backend", ["pyro", slow("numpyro")])
def test_native_programs_and_the_mark_of_both_libraries(backend: Backend) -> None:
    x = POINTS[:, 0]
    options: dict[str, Any] = {"steps": 3, "compile": "eager" if backend == "pyro" else "auto"}
    with pytest.raises(LegalityError, match=r"sum it out with estimator=\{'y': 'marginalize'\}"):
        fit(*native(backend, False), x, "iwae", **options)
    asked = fit(*native(backend, False), x, "iwae", **options, estimator={"y": "marginalize"})
    marked = fit(*native(backend, True), x, "iwae", **options)
    np.testing.assert_array_equal(marked.history["loss"], asked.history["loss"])
    assert [m for m in marked.messages if " y: " in m] == [
        "estimator: y: marginalize (only the model has it, which marks it to be enumerated)"
    ]
    assert not any(" y: " in m for m in asked.messages)


@on_both
def test_in_the_libraries_own_loops(backend: Backend) -> None:
    """With many draws the loss is `-log p(x)`, and a step moves all parameters."""
    model, guide = native(backend, enumerated=True)
    x = POINTS[:, 0]
    if backend == "pyro":
        pyro.clear_param_store()
        loss = pyro_loss("iwae", draws=400)
        svi = pyro.infer.SVI(model, guide, optim.Adam({"lr": 1e-3}), loss=loss)
        torch.manual_seed(0)
        value = svi.step(torch.tensor(x))
        moved = {n: float(np.abs(p.detach().numpy() - {"loc": [-1.0, 1.5], "w": [0.3, 0.7], "a": 0.3}[n]).max())
                 for n, p in pyro.get_param_store().items()}  # fmt: skip
        pyro.clear_param_store()
    else:
        svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro_loss("iwae", draws=400))
        state = svi.init(jax.random.key(0), jnp.asarray(x))
        state, value = jax.jit(svi.update)(state, jnp.asarray(x))
        value = float(value)
        start = {"loc": [-1.0, 1.5], "w": [0.3, 0.7], "a": 0.3}
        moved = {n: float(np.abs(np.asarray(p) - start[n]).max()) for n, p in svi.get_params(state).items()}
    var = 1.0 + 0.7**2
    exact = -np.log(sum(w * np.exp(-0.5 * (x - m) ** 2 / var) for w, m in ((0.3, -1.0), (0.7, 1.5)))).sum()
    exact += 0.5 * len(x) * np.log(2 * np.pi * var)
    assert value == pytest.approx(exact, abs=0.5)  # 40 rows at 400 draws each: a standard error of about 0.1
    assert min(moved.values()) > 1e-4
