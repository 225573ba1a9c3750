"""Data on their way to a program: frames, batches, sequences, missing entries, partly observed labels.

Bounds with missing entries are held to formulas written out below, and their gradients to complex-step derivatives of
these, at injected noise; expectations over labels are enumerated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as npdist
import pandas as pd
import pyarrow as pa
import pytest
import torch
from _pytest.mark import ParameterSet
from harness import BACKENDS, Engine, assert_equal
from toys import Array, Backend, Ppl

from ppl_lvm import Fit, Program, fit, program
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.base import KNOWN
from ppl_lvm.data import pad, read
from ppl_lvm.errors import DataError, LegalityError, ProgramError
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.pace import Order

on_both = pytest.mark.parametrize("backend", BACKENDS)
NAN = np.nan
Params = Mapping[str, Any]


def complex_step(f: Callable[[Params], Any], at: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Derivatives of an analytic function to rounding: `Im f(x + ih) / h`."""
    found = {}
    for name, value in at.items():
        slope = np.zeros(value.shape)
        for entry in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[entry] += 1e-30j
            slope[entry] = np.imag(f({**at, name: moved})) / 1e-30
        found[name] = slope
    return found


def log_mean_exp(x: Any, axis: int) -> Any:
    peak = x.real.max(axis, keepdims=True)
    return np.squeeze(peak, axis) + np.log(np.mean(np.exp(x - peak), axis))


def normal(x: Any, loc: Any, scale: Any) -> Any:
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


# Rows of three entries from one factor; the guide sees them with zeros where they are missing.

FACTOR = {
    "w": np.array([0.8, -0.5, 0.3]),
    "b": np.array([0.1, 0.4, -0.2]),
    "log_s": np.array(-0.3),
    "v": np.array([0.3, -0.2, 0.5]),
    "log_r": np.array(-0.7),
}
HOLES = np.array([[0.4, NAN, 1.2], [NAN, NAN, NAN], [0.9, 0.3, 0.7], [1.6, 0.2, NAN]])


def factor_model(ppl: Ppl, x: Array, family: str = "Normal") -> None:
    w, b, log_s = (ppl.param(n, FACTOR[n]) for n in ("w", "b", "log_s"))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0))
        fn = getattr(ppl.dist, family)(z[..., None] * w + b, ppl.xp.exp(log_s))
        ppl.sample("x", fn.to_event(1), obs=x)


def plates_model(ppl: Ppl, x: Array) -> None:
    """The same with a plate of features instead of `to_event`."""
    w, b, log_s = (ppl.param(n, FACTOR[n]) for n in ("w", "b", "log_s"))
    rows = ppl.plate("data", len(x), dim=-2)
    with rows:
        z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0))
        with ppl.plate("features", 3, dim=-1):
            ppl.sample("x", ppl.dist.Normal(z * w + b, ppl.xp.exp(log_s)), obs=x)


def factor_guide(ppl: Ppl, x: Array, family: str = "Normal") -> None:
    v, log_r = ppl.param("v", FACTOR["v"]), ppl.param("log_r", FACTOR["log_r"])
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(x @ v, ppl.xp.exp(log_r)))


def plates_guide(ppl: Ppl, x: Array) -> None:
    v, log_r = ppl.param("v", FACTOR["v"]), ppl.param("log_r", FACTOR["log_r"])
    with ppl.plate("data", len(x), dim=-2):
        ppl.sample("z", ppl.dist.Normal((x @ v)[..., None], ppl.xp.exp(log_r)))


def lognormal(function: Callable[..., None]) -> Callable[..., None]:
    def call(ppl: Ppl, x: Array) -> None:
        function(ppl, x, "LogNormal")

    return call


PROGRAMS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "event": (factor_model, factor_guide),
    "plates": (plates_model, plates_guide),
    "positive": (lognormal(factor_model), lognormal(factor_guide)),
}


def factor_bound(p: Params, noise: np.ndarray, kind: str, K: int) -> Any:
    """Loss over rows: entries that are NaN have no density, and count as zeros in the guide."""
    known, x = ~np.isnan(HOLES), np.nan_to_num(HOLES)
    loc, scale = x @ p["v"], np.exp(p["log_r"])
    z = loc + scale * noise
    mean, s = z[..., None] * p["w"] + p["b"], np.exp(p["log_s"])
    if kind == "positive":
        log_x = np.log(np.where(known, x, 1.0))
        of_entries = normal(log_x, mean, s) - log_x
    else:
        of_entries = normal(x, mean, s)
    log_w = np.where(known, of_entries, 0.0).sum(-1) + normal(z, 0.0, 1.0) - normal(z, loc, scale)
    rows = log_mean_exp(log_w, 0) if K > 1 else log_w.mean(0)
    return -rows.sum()


def masked(model: Callable[..., None], guide: Callable[..., None], **data: Any) -> dict[str, np.ndarray]:
    """What the program gets, and what is known of it, from data with missing entries."""
    call = read(data, Program("toy", model, guide, portable=True), "mask")
    return dict(call.kwargs)


def slow(*cell: object, id: str) -> ParameterSet:
    """A cell that repeats what others show already; compiling each takes NumPyro seconds."""
    return pytest.param(*cell, marks=pytest.mark.slow, id=id)


@on_both
@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        pytest.param("event", iwae(draws=3), id="event-iwae"),
        pytest.param("plates", elbo(draws=2), id="plates-elbo"),
        pytest.param("positive", iwae(draws=3), id="positive-iwae"),
        slow("event", elbo(draws=2), id="event-elbo"),
        slow("plates", iwae(draws=3), id="plates-iwae"),
        slow("positive", elbo(draws=2), id="positive-elbo"),
    ],
)
def test_missing_entries_leave_the_bound_and_its_gradient(kind: str, objective: Objective, backend: Backend) -> None:
    model, guide = PROGRAMS[kind]
    engine = Engine(backend, model, guide, masked(model, guide, x=HOLES), portable=True)
    K = objective.draws
    noise = np.random.default_rng(1).normal(size=(K, len(HOLES)))
    z = np.nan_to_num(HOLES) @ FACTOR["v"] + np.exp(FACTOR["log_r"]) * noise
    table = z[None, ..., None] if kind == "plates" else z[None]
    found = engine.loss(objective, {"*": pathwise()}, values={"z": table})
    joint = K if isinstance(objective, iwae) else 1

    def bound(p: Params) -> Any:
        return factor_bound(p, noise, kind, joint)

    assert_equal(found, bound(FACTOR), complex_step(bound, FACTOR), 1e-10)
    # Rows count as rows, whatever is known of them.
    twice = engine.loss(objective, {"*": pathwise()}, values={"z": table}, total_rows=8)
    np.testing.assert_allclose(twice.value, 2 * found.value, rtol=1e-12)
    whole = {"x": np.nan_to_num(HOLES, nan=1.0)}
    complete = Engine(backend, model, guide, whole, portable=True)
    assert abs(complete.loss(objective, {"*": pathwise()}, values={"z": table}).value - found.value) > 1.0


# Partly observed labels: y ~ Bernoulli, x | y Normal; rows 0 and 2 are labelled.

LABELS = np.array([1.0, NAN, 0.0, NAN])
XS = np.array([0.4, -0.9, 1.3, 0.2])
MIXTURE = {"c": np.array(0.3), "mu": np.array([-0.6, 0.9]), "a": np.array(-0.2), "g": np.array(0.7)}


def label_model(ppl: Ppl, x: Array, y: Array) -> None:
    c, mu = ppl.param("c", MIXTURE["c"]), ppl.param("mu", MIXTURE["mu"])
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", ppl.dist.Bernoulli(logits=c))
        ppl.sample("x", ppl.dist.Normal(mu[0] * (1 - y) + mu[1] * y, 1.0), obs=x)


def said_label_model(ppl: Ppl, x: Array, y: Array) -> None:
    """The same, said as users of both libraries say it."""
    c, mu = ppl.param("c", MIXTURE["c"]), ppl.param("mu", MIXTURE["mu"])
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", ppl.dist.Bernoulli(logits=c), obs=y)
        ppl.sample("x", ppl.dist.Normal(mu[0] * (1 - y) + mu[1] * y, 1.0), obs=x)


def label_guide(ppl: Ppl, x: Array, y: Array) -> None:
    a, g = ppl.param("a", MIXTURE["a"]), ppl.param("g", MIXTURE["g"])
    with ppl.plate("data", len(x)):
        ppl.sample("y", ppl.dist.Bernoulli(logits=a + g * x))


def log_sigmoid(logit: Any, y: Any) -> Any:
    return y * logit - np.log(1 + np.exp(logit))


def label_bound(p: Params, K: int, joint: bool) -> Any:
    """Labelled rows: log p(x, y). Others: the expectation over all values of K draws, written out."""
    total = 0.0
    for x, y in zip(XS, LABELS, strict=True):
        log_p = {v: log_sigmoid(p["c"], v) + normal(x, p["mu"][v], 1.0) for v in (0, 1)}
        if not np.isnan(y):
            total = total + log_p[int(y)]
            continue
        log_q = {v: log_sigmoid(p["a"] + p["g"] * x, v) for v in (0, 1)}
        for draws in itertools.product((0, 1), repeat=K):
            log_w = np.array([log_p[v] - log_q[v] for v in draws])
            value = np.log(np.mean(np.exp(log_w))) if joint else np.mean(log_w)
            total = total + np.exp(sum(log_q[v] for v in draws)) * value
    return -total


@on_both
@pytest.mark.parametrize(
    ("model", "objective", "estimator"),
    [
        pytest.param(label_model, elbo(), score(), id="latent-score"),
        pytest.param(label_model, iwae(draws=2), vimco(), id="latent-vimco"),
        pytest.param(said_label_model, elbo(), enumerated(), id="obs-enumerate"),
        pytest.param(said_label_model, elbo(draws=2), rloo(), id="obs-rloo"),
        slow(said_label_model, elbo(), score(), id="obs-score"),
        slow(said_label_model, iwae(draws=2), vimco(), id="obs-vimco"),
        slow(label_model, elbo(), enumerated(), id="latent-enumerate"),
        slow(label_model, elbo(draws=2), rloo(), id="latent-rloo"),
    ],
)
def test_labels_that_are_known_replace_draws(
    model: Callable[..., None], objective: Objective, estimator: Estimator, backend: Backend
) -> None:
    """The expected loss and gradient over every outcome of the draws, those behind the labels included."""
    engine = Engine(backend, model, label_guide, masked(model, label_guide, x=XS, y=LABELS), portable=True)
    K = objective.draws
    expected = (lambda p: label_bound(p, K, isinstance(objective, iwae)), MIXTURE)
    if estimator == enumerated():
        found = engine.loss(objective, {"*": estimator})
    else:
        outcomes = np.array(list(itertools.product((0.0, 1.0), repeat=K * len(XS)))).reshape(-1, K, len(XS))
        log_q = log_sigmoid(MIXTURE["a"] + MIXTURE["g"] * XS, outcomes)
        found = engine.loss(
            objective.model_copy(update={"outer": len(outcomes)}),
            {"*": estimator},
            values={"y": outcomes},
            weight=np.exp(log_q.sum((1, 2))),
        )
    assert_equal(found, expected[0](MIXTURE), complex_step(*expected), 1e-10)


@on_both
def test_closed_form_kl_of_a_partly_observed_site_is_refused(backend: Backend) -> None:
    data = masked(label_model, label_guide, x=XS, y=LABELS)
    engine = Engine(backend, label_model, label_guide, data, portable=True)
    with pytest.raises(LegalityError, match="'y' has no closed-form KL"):
        engine.plan(elbo(kl="closed_form"), {"*": enumerated()})


def classes_model(ppl: Ppl, x: Array, y: Array) -> None:
    mu = ppl.param("mu", np.zeros(3))
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", ppl.dist.Categorical(logits=ppl.xp.zeros(3)), obs=y)
        ppl.sample("x", ppl.dist.Normal(mu[y], 1.0), obs=x)


def classes_guide(ppl: Ppl, x: Array, y: Array) -> None:
    logits = ppl.param("logits", np.zeros(3))
    with ppl.plate("data", len(x)):
        ppl.sample("y", ppl.dist.Categorical(logits=logits))


def quick(chosen: Any, data: Any, backend: str, **options: Any) -> Fit:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "dtype": "float64", "seed": 3}
    return fit(chosen, data=data, backend=backend, **(settings | options))


@on_both
def test_labels_of_minus_one_are_drawn_and_the_others_kept(backend: str) -> None:
    data = {"x": XS, "y": np.array([2, -1, 1, -1])}
    toy = Program("toy", classes_model, classes_guide, portable=True, arguments=("x", "y"))
    run = quick(toy, data, backend, missing="mask", estimator="enumerate")
    drawn = run.posterior(200).values["y"]
    assert (drawn[:, [0, 2]] == [2, 1]).all()
    assert all(len({*drawn[:, row].tolist()}) > 1 for row in (1, 3))
    # Other rows, given later, are read in the same way.
    kept = run.posterior(50, data={"x": XS[:1], "y": np.array([0])}).values["y"]
    assert (kept == 0).all()


def test_a_traced_step_leaves_out_the_same() -> None:
    """Missing entries of an observed site and labels, in mini-batches: the graph takes them as inputs."""

    def guide(ppl: Ppl, x: Array, y: Array) -> None:
        label_guide(ppl, x[:, 0], y)

    def plane(ppl: Ppl, x: Array, y: Array) -> None:
        mu = ppl.param("mu", np.array([[-0.6, 0.2], [0.9, 0.5]]))
        with ppl.plate("data", len(x)):
            y = ppl.sample("y", ppl.dist.Bernoulli(logits=ppl.xp.zeros(())), obs=y)
            loc = mu[0] * (1 - y)[..., None] + mu[1] * y[..., None]
            ppl.sample("x", ppl.dist.Normal(loc, 1.0).to_event(1), obs=x)

    toy = Program("toy", plane, guide, portable=True, arguments=("x", "y"))
    x = np.stack([XS, [NAN, 0.3, NAN, -0.5]], axis=1)
    data = {"x": x, "y": LABELS}
    graph, eager = (
        quick(toy, data, "pyro", missing="mask", estimator="score", compile=mode) for mode in ("graph", "eager")
    )
    assert graph.state.mode == "graph"
    np.testing.assert_allclose(graph.history["loss"], eager.history["loss"], rtol=1e-12)
    for name, value in eager.params.items():
        np.testing.assert_allclose(graph.params[name], value, rtol=1e-12)


def onehot_model(ppl: Ppl, x: Array, y: Array) -> None:
    mu = ppl.param("mu", np.arange(3.0))
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", ppl.dist.OneHotCategorical(logits=ppl.xp.zeros(3)))
        ppl.sample("x", ppl.dist.Normal(y @ mu, 1.0), obs=x)


def onehot_guide(ppl: Ppl, x: Array, y: Array) -> None:
    logits = ppl.param("logits", np.zeros(3))
    with ppl.plate("data", len(x)):
        ppl.sample("y", ppl.dist.OneHotCategorical(logits=logits))


@on_both
def test_labels_outside_the_support_or_known_in_part_are_refused(backend: str) -> None:
    toy = Program("toy", onehot_model, onehot_guide, portable=True, arguments=("x", "y"))
    y = np.array([[0.0, 0, 1], [NAN, NAN, NAN], [1, 0, 0], [NAN, NAN, NAN]])
    run = quick(toy, {"x": XS, "y": y}, backend, missing="mask", estimator="enumerate")
    np.testing.assert_array_equal(run.posterior(3).values["y"][:, [0, 2]], np.broadcast_to(y[[0, 2]], (3, 2, 3)))
    with pytest.raises(DataError, match="Values of 'y' are outside the support"):
        quick(toy, {"x": XS, "y": np.abs(y) * 2}, backend, missing="mask", estimator="enumerate")
    y[1, 0] = 0.0
    with pytest.raises(DataError, match=r"Row 1 of 'y' is known in part.*site 'y'.*3 entries at once"):
        quick(toy, {"x": XS, "y": y}, backend, missing="mask", estimator="enumerate")
    with pytest.raises(ProgramError, match=r"Site 'y' has values of shape \(4, 3\).*of shape \(4,\)"):
        quick(toy, {"x": XS, "y": np.array([0, -1, 1, -1])}, backend, missing="mask", batch_size=None)


# The same through `fit`.


def arguments(name: str) -> Program:
    model, guide = PROGRAMS[name]
    return Program("toy", model, guide, portable=True, arguments=("x",))


@on_both
def test_fit_leaves_missing_entries_out_in_mini_batches(backend: str) -> None:
    run = quick(arguments("event"), HOLES, backend, missing="mask", learning_rate=0.0, steps=2)
    # What is known of a row goes where the row goes: batches that bring it themselves train to the same bits.
    streamed = quick(arguments("event"), Epochs(HOLES, 2, 3), backend, missing="mask", learning_rate=0.0, steps=2)
    np.testing.assert_array_equal(run.history["loss"], streamed.history["loss"])
    assert np.isfinite(run.history["loss"]).all() and run.history["loss"][0] != run.history["loss"][1]
    tree = run.to_arviz(draws=2)
    np.testing.assert_array_equal(tree["observed_data"]["x"], HOLES)
    likelihood = run.log_likelihood(draws=4000)
    known = ~np.isnan(HOLES)
    cover = [
        np.diag(np.full(k.sum(), np.exp(2 * FACTOR["log_s"]))) + np.outer(FACTOR["w"][k], FACTOR["w"][k]) for k in known
    ]
    exact = [
        -0.5 * (len(c) * np.log(2 * np.pi) + np.linalg.slogdet(c)[1] + d @ np.linalg.solve(c, d))
        for c, k, row in zip(cover, known, HOLES, strict=True)
        for d in [row[k] - FACTOR["b"][k]]
    ]
    # 4,000 importance draws, standard error of a row below 0.05.
    np.testing.assert_allclose(likelihood.values, exact, atol=0.25)
    other = run.log_likelihood(np.array([[0.4, NAN, 1.2]]), draws=4000)
    np.testing.assert_allclose(other.values, exact[:1], atol=0.25)


@on_both
def test_missing_entries_are_refused_where_no_density_leaves_them_out(backend: str) -> None:
    with pytest.raises(DataError, match=r"'x' holds NaN .*5 of 12.*\(0, 1\).*missing='mask'"):
        quick(arguments("event"), HOLES, backend)

    def joint_model(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("loc", np.zeros(3))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0))
            cov = ppl.ops.eye(3, loc)
            ppl.sample("x", ppl.dist.MultivariateNormal(loc + z[..., None], scale_tril=cov), obs=x)

    joint = Program("joint", joint_model, factor_guide, portable=True, arguments=("x",))
    with pytest.raises(DataError, match=r"Row 0 of 'x' is known in part.*site 'x'"):
        quick(joint, HOLES, backend, missing="mask")
    rows = HOLES.copy()
    rows[[0, 3]] = NAN
    assert np.isfinite(quick(joint, rows, backend, missing="mask").history["loss"]).all()


def covariate_model(ppl: Ppl, x: Array, u: Array) -> None:
    b = ppl.param("b", np.zeros(()))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0))
        ppl.sample("x", ppl.dist.Normal(z + b * u, 1.0), obs=x)


def covariate_guide(ppl: Ppl, x: Array, u: Array) -> None:
    a = ppl.param("a", np.zeros(()))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(a * x, 1.0))


COVARIATE = Program("covariate", covariate_model, covariate_guide, portable=True, arguments=("x", "u"))


def summed_model(ppl: Ppl, x: Array, u: Array) -> None:
    covariate_model(ppl, x, u.sum(-1))


def summed_guide(ppl: Ppl, x: Array, u: Array) -> None:
    covariate_guide(ppl, x, u.sum(-1))


SUMMED_COVARIATE = Program("summed", summed_model, summed_guide, portable=True, arguments=("x", "u"))


def test_a_missing_covariate_is_refused() -> None:
    with pytest.raises(DataError, match=r"'u' has 2 missing entries.*no site has its values.*'u_mask'"):
        quick(COVARIATE, {"x": XS, "u": LABELS}, "numpyro", missing="mask")


def told_model(ppl: Ppl, x: Array, x_mask: Array, lengths: Array) -> None:
    b = ppl.param("b", np.ones(()))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0))
        ppl.factor("steps", ppl.xp.where(x_mask, b * z[..., None] * x, 0.0 * x).sum(-1) - 0.5 * lengths)


def told_guide(ppl: Ppl, x: Array, x_mask: Array, lengths: Array) -> None:
    a = ppl.param("a", np.zeros(()))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(a * lengths, 1.0))


@on_both
def test_a_program_is_told_what_was_padded(backend: str) -> None:
    told = Program("told", told_model, told_guide, portable=True, arguments=("x", "x_mask", "lengths"))
    sequences = [np.array([1.0, 2.0, 3.0]), np.array([4.0]), np.array([5.0, 6.0])]
    call = read(sequences, told)
    assert call.own.named(told.arguments)["lengths"].tolist() == [3, 1, 2]
    assert call.own.named(told.arguments)["x_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert np.isfinite(quick(told, sequences, backend).history["loss"]).all()


@on_both
def test_padding_is_left_out_of_an_observed_site(backend: str) -> None:
    """Rows of one, two and three entries: the same loss as three entries with the rest missing."""
    sequences = [row[: 1 + i] for i, row in enumerate(np.abs(np.nan_to_num(HOLES, nan=1.0))[:3])]
    holes = np.full((3, 3), NAN)
    for i, s in enumerate(sequences):
        holes[i, : len(s)] = s
    ragged = quick(arguments("event"), sequences, backend, batch_size=3)
    masked = quick(arguments("event"), holes, backend, batch_size=3, missing="mask")
    np.testing.assert_array_equal(ragged.history["loss"], masked.history["loss"])
    with pytest.raises(DataError, match="'u' has 1 missing entries"):
        quick(SUMMED_COVARIATE, {"x": XS[:2], "u": [np.ones(2), np.ones(1)]}, backend)


def test_pad_refuses_what_is_no_sequence() -> None:
    for bad, message in (([], "no sequences"), ([np.ones(0)], "one or more steps"), ([1.0], "Sequence 0")):
        with pytest.raises(DataError, match=message):
            pad(bad)
    with pytest.raises(DataError, match=r"Sequence 1 has shape \(2, 2\), the first \(2, 3\)"):
        pad([np.ones((2, 3)), np.ones((2, 2))])


# Frames, tensors, names.


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, jnp.asarray, pd.Series, list], ids=lambda f: f.__module__)
def test_arrays_of_every_library_are_the_same_data(make: Callable[[Any], Any]) -> None:
    given = make(XS.astype(np.float32))
    for data in ((given, given), {"x": given, "u": given}):
        named = read(data, COVARIATE).named(COVARIATE.arguments)
        assert list(named) == ["x", "u"]
        for a in named.values():
            np.testing.assert_array_equal(a, XS.astype(np.float32))


def test_columns_of_a_frame_are_arguments_or_a_matrix() -> None:
    frame = pd.DataFrame({"u": [1, 2, 3], "x": [0.1, 0.2, 0.3], "note": ["a", "b", "c"]})
    notes: list[str] = []
    named = read(frame, COVARIATE, notes=notes).named(COVARIATE.arguments)
    assert (named["u"].tolist(), named["x"].tolist()) == ([1, 2, 3], [0.1, 0.2, 0.3])
    assert notes == ["data: columns note are no arguments of the program and not used"]
    matrix = read(frame[["u"]].assign(v=[4, 5, 6]).rename(columns={"u": "a"}), arguments("event"))
    assert matrix.args[0].tolist() == [[1, 4], [2, 5], [3, 6]]
    with pytest.raises(DataError, match=r"no column 'u'.*Did you mean 'uu'"):
        read(frame.rename(columns={"u": "uu"}), COVARIATE)
    with pytest.raises(DataError, match=r"Columns \['note'\] of the frame are no numbers"):
        read(frame.rename(columns={"x": "w"}), arguments("event"))
    series = pd.Series([1.0, 2.0], name="u")
    assert read(series, arguments("event")).args[0].tolist() == [1.0, 2.0]
    with pytest.raises(DataError, match="needs data for 'x'; given were 'u'"):
        read(series, COVARIATE)
    with pytest.raises(DataError, match="series 'w' is no argument"):
        read(series.rename("w"), COVARIATE)
    nullable = pd.DataFrame({"x": pd.array([1, None], dtype="Int64"), "u": [1.0, 2.0]})
    known = read(nullable, COVARIATE, "mask").known["x"]
    assert known.tolist() == [True, False]


def test_a_table_of_pyarrow_is_read_by_its_column_names() -> None:
    named = read(pa.table({"u": 2 * XS, "x": XS}), COVARIATE).named(COVARIATE.arguments)
    np.testing.assert_array_equal(named["x"], XS)
    np.testing.assert_array_equal(named["u"], 2 * XS)
    known = read(pa.table({"u": [1, 2, None], "x": XS[:3]}), COVARIATE, "mask").known["u"]
    assert known.tolist() == [True, True, False]


def test_masked_arrays_say_what_is_missing() -> None:
    given = np.ma.MaskedArray([1, 2, 3], mask=[False, True, False])
    call = read({"x": given, "u": XS[:3]}, COVARIATE, "mask")
    assert call.kwargs["x"].tolist() == [1, 0, 3]
    assert call.kwargs[f"x{KNOWN}"].tolist() == [True, False, True]
    with pytest.raises(DataError, match="masked entries"):
        read({"x": given, "u": XS[:3]}, COVARIATE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.ones(3), np.ones(2)), r"share their first axis.*'x': 3, 'u': 2"),
        ((np.ones(0), np.ones(0)), "no rows"),
        ((np.ones(2), np.float64(3.0)), "'u' is the number 3.0.*first axis"),
        ((np.ones(2), np.array([1.0, np.inf])), r"'u' holds 1 infinite values.*\(1,\)"),
        ((np.ones(2), np.array(["a", "b"])), "'u' has dtype <U1"),
        ((np.ones(2), np.array([None, 1], dtype=object)), "list of NoneTypes|dtype object"),
        ((np.ones(2), "text"), "'u' is 'text'"),
        ((np.ones(2), ["a", "b"]), "list of strs"),
        ({"x": np.ones(2), "v": np.ones(2)}, "no argument 'v'"),
        ({"x": np.ones(2)}, "needs data for 'u'; given were 'x'"),
        (np.ones(2), "needs data for 'u'"),
        ((np.ones(2), np.ones(2), np.ones(2)), "takes 2 arguments.*3 were given"),
    ],
    ids=["axes", "empty", "0-d", "inf", "strings", "objects", "text", "list", "unknown", "lacking", "one", "many"],
)
def test_data_that_do_not_fit_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(data, COVARIATE)


def test_an_unknown_way_with_missing_entries_is_refused() -> None:
    with pytest.raises(DataError, match="missing='drop' was asked for"):
        read(XS, arguments("event"), "drop")  # type: ignore[arg-type]


# Batches.


class Epochs:
    """Batches in the order in which `fit` takes rows of arrays."""

    def __init__(self, rows: np.ndarray, size: int, seed: int) -> None:
        self._rows, self._size, self._seed, self.epoch = rows, size, seed, -1

    def __iter__(self) -> Iterator[np.ndarray]:
        per_epoch = len(self._rows) // self._size
        epoch, self.epoch = max(self.epoch, 0), self.epoch + 1
        for b in range(per_epoch):
            step = epoch * per_epoch + b
            yield self._rows[Order(len(self._rows), self._size, self._seed).batches(step, 1)[0]]

    @property
    def dataset(self) -> np.ndarray:
        return self._rows


POINTS = np.exp(np.random.default_rng(0).normal(size=(10, 3)))
POSITIVE = arguments("positive")


@pytest.mark.parametrize(("backend", "mode"), [("pyro", "graph"), ("numpyro", "compiled")])
def test_batches_train_to_the_bits_of_arrays_in_their_order(backend: str, mode: str) -> None:
    options: dict[str, Any] = {"compile": mode, "steps": 7, "batch_size": 3}
    source = Epochs(POINTS, 3, 3)
    streamed = quick(POSITIVE, source, backend, **options)
    held = quick(POSITIVE, POINTS, backend, **options)
    np.testing.assert_array_equal(streamed.history["loss"], held.history["loss"])
    for name, value in held.state.arrays.items():
        np.testing.assert_array_equal(streamed.state.arrays[name], value, err_msg=name)
    with pytest.raises(DataError, match=r"made from batches.*pass data="):
        streamed.log_likelihood()
    assert streamed.log_likelihood(POINTS, draws=5).values.shape == (10,)


@on_both
def test_a_loader_of_torch_gives_its_batches_and_its_number_of_rows(backend: str) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(POINTS)), batch_size=4)
    run = quick(POSITIVE, loader, backend, steps=5, learning_rate=0.0)
    assert "batch_size: 4, the size of the batches that were given, not 2" in run.messages
    assert "data: an epoch's last batch of 2 rows is left out, as the others have 4" in run.messages

    class Plain:
        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            return ({"x": POINTS[i : i + 4]} for i in (0, 4, 8))

    plain = quick(POSITIVE, Plain(), backend, steps=5, learning_rate=0.0)
    assert "data: 10 rows were counted in a first pass over the batches" in plain.messages
    np.testing.assert_array_equal(run.history["loss"], plain.history["loss"])


def test_a_run_on_batches_goes_on_where_it_was() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(POINTS)), batch_size=3)
    whole = quick(POSITIVE, loader, "numpyro", steps=5)
    first = quick(POSITIVE, loader, "numpyro", steps=4)
    rest = quick(POSITIVE, loader, "numpyro", steps=5, state=first.state)
    np.testing.assert_array_equal(rest.history["loss"], whole.history["loss"][4:])


class Listed:
    def __init__(self, *batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((b for b in [POINTS]), "generator, which can be gone through only once"),
        (Listed(), "no batches"),
        (Listed(POINTS[:2], POINTS[:3]), "Batches differ in size: 2 rows in the first, 3"),
        (Listed(POINTS[:2], POINTS[:1], POINTS[:2]), "Batches differ in size: 2 rows in the first, 1"),
        (Listed(POINTS[:2], POINTS[:2, :2]), r"Batch 1 of an epoch has rows of shapes \[\(2,\)\]"),
        (Listed(POINTS[:2], NAN * POINTS[:2]), "holds NaN"),
        (Listed(POINTS[:2], -POINTS[:2]), "outside the support"),
    ],
    ids=["generator", "none", "larger", "smaller", "shape", "nan", "support"],
)
def test_batches_that_cannot_be_trained_on_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        quick(POSITIVE, data, "numpyro")


def test_a_program_without_a_data_plate_takes_no_batches() -> None:
    with pytest.raises(ProgramError, match="has no data plate, so it cannot be given batches"):
        quick(POSITIVE, Listed(POINTS[:4], POINTS[4:8]), "numpyro", data_plate="none")


# Sites that are called otherwise than their data.


def native_model(values: Array) -> None:
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("rows", len(values)):
        z = numpyro.sample("z", npdist.Normal(loc, 1.0))
        numpyro.sample("obs", npdist.LogNormal(z, 1.0), obs=values)


def native_guide(values: Array) -> None:
    a = numpyro.param("a", 0.1)
    with numpyro.plate("rows", len(values)):
        numpyro.sample("z", npdist.Normal(a * values, 1.0))


def test_observed_names_the_data_of_a_site() -> None:
    data = np.array([0.5, 1.5, NAN, 2.0])
    with pytest.raises(DataError, match="'values' has 1 missing entries"):
        fit(native_model, native_guide, data, steps=2, missing="mask")
    run = fit(native_model, native_guide, data, steps=2, missing="mask", observed={"obs": "values"})
    assert run.program.argument_of("obs") == "values"
    assert np.isfinite(run.history["loss"]).all()
    with pytest.raises(DataError, match="'obs' are outside the support"):
        fit(native_model, native_guide, -data[:2], steps=2, observed={"obs": "values"})
    with pytest.raises(ProgramError, match=r"\{'obs': 'value'\} names no data argument. Did you mean 'values'"):
        fit(native_model, native_guide, data[:2], steps=2, observed={"obs": "value"})
    with pytest.raises(ProgramError, match=r"\{'ob': 'values'\} names no observed site. Did you mean 'obs'"):
        fit(native_model, native_guide, data[:2], steps=2, observed={"ob": "values"})


def test_rows_that_the_plate_does_not_have_are_refused() -> None:
    def fixed(values: Array) -> None:
        with numpyro.plate("rows", 3):
            z = numpyro.sample("z", npdist.Normal(numpyro.param("loc", 0.0), 1.0))
            numpyro.sample("x", npdist.Normal(z.sum(), 1.0), obs=values[:3])

    def guide(values: Array) -> None:
        with numpyro.plate("rows", 3):
            numpyro.sample("z", npdist.Normal(numpyro.param("a", 0.0), 1.0))

    with pytest.raises(ProgramError, match="'rows' has 3 rows where the program was given 4"):
        fit(fixed, guide, XS, steps=1)


def test_portable_programs_are_loaded_as_before() -> None:
    assert read(POINTS, program("vae")).args[0].shape == (10, 3)
