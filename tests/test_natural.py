"""Natural-gradient steps: exact posteriors in one step, mini-batches, Fisher matrices, domains; means for draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import polygamma
from toys import Array, Ppl

from ppl_lvm import fit, program, recipe
from ppl_lvm.datasets import load
from ppl_lvm.errors import LegalityError, RecipeError
from ppl_lvm.program import Program
from ppl_lvm.structured.mixture import Dirichlet, NormalInverseWishart, mixture_posterior, niw_form

MODES = [("pyro", "eager"), pytest.param("pyro", "graph", marks=pytest.mark.slow), ("numpyro", "compiled")]
in_every_mode = pytest.mark.parametrize(("backend", "mode"), MODES)
on_both = pytest.mark.parametrize("backend", ["pyro", "numpyro"])
slow_to_compile = pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
CLOSED: dict[str, Any] = {
    "recipe": "elbo",
    "kl": "where_known",
    "dtype": "float64",
    "progress_bar": False,
    "seed": 1,
}
NATURAL = {"name": "natural", "learning_rate": 1.0}
K, D, N = 2, 2, 12
RNG = np.random.default_rng(0)
LABELS = np.arange(N) % K
POINTS = RNG.normal(size=(N, D)) + 2.0 * LABELS[:, None]
FIRST = np.stack([np.diag([2.0, 1.0, 1.0]), [[3.0, 1.0, 0.0], [1.0, 4.0, 1.0], [0.0, 1.0, 2.0]]])

STARTS = {"a": np.array([1.0, 2.0]), "form": FIRST, "df": np.array([3.0, 5.0])}


def priors(ppl: Ppl, like: Array) -> tuple[Array, Array]:
    one = ppl.ops.zeros((K,), like) + 1.0
    eye = ppl.ops.eye(D, like) + ppl.ops.zeros((K, 1, 1), like)
    form = ppl.structured.niw_form(ppl.ops.zeros((K, D), like), 0.5 * one, eye)
    return ppl.structured.LogDirichlet(0.5 * one), ppl.structured.NormalInverseWishart(form, 4.0 * one)


def of(ppl: Ppl, c: Array, forms: Array) -> Array:
    return (ppl.ops.one_hot(c, K)[..., None, None] * forms).sum(-3)


def labelled(ppl: Ppl, c: Array, y: Array) -> None:
    on_pi, on_theta = priors(ppl, y)
    pi = ppl.sample("pi", on_pi)
    with ppl.plate("components", K):
        theta = ppl.sample("theta", on_theta)
    with ppl.plate("data", len(y)):
        ppl.sample("c", ppl.structured.Labels(pi), obs=c)
        ppl.sample("y", ppl.structured.Gaussian(of(ppl, c, theta)), obs=y)


def factors(ppl: Ppl) -> tuple[Array, Array]:
    constraints = ppl.dist.constraints
    a = ppl.param("a", lambda: STARTS["a"], constraint=constraints.positive)
    form = ppl.param("form", lambda: STARTS["form"], constraint=constraints.positive_definite)
    df = ppl.param("df", lambda: STARTS["df"], constraint=constraints.greater_than(D - 1.0))
    return ppl.structured.LogDirichlet(a), ppl.structured.NormalInverseWishart(form, df)


def of_globals(ppl: Ppl, c: Array, y: Array) -> None:
    pi, theta = factors(ppl)
    ppl.sample("pi", pi)
    with ppl.plate("components", K):
        ppl.sample("theta", theta)


CONJUGATE = Program("labelled", labelled, of_globals, portable=True, arguments=("c", "y"))


def posterior(weights: np.ndarray, y: np.ndarray) -> tuple[Dirichlet, NormalInverseWishart, float]:
    """After data with labels known `[N, K]`, or their expectations, and the log evidence."""
    t = torch.tensor
    prior = NormalInverseWishart.of(
        t(np.zeros((K, D))), t(np.full(K, 0.5)), t(np.stack([np.eye(D)] * K)), t(np.full(K, 4.0))
    )
    u = np.concatenate([np.ones((len(y), 1)), y], 1)
    moments = np.einsum("nk,ni,nj->kij", weights, u, u)
    theta, on_pi = prior.updated(t(moments), t(weights.sum(0))), Dirichlet(t(np.full(K, 0.5)))
    pi = on_pi.updated(t(weights.sum(0)))
    gained = pi.log_normalizer() - on_pi.log_normalizer()
    gained = gained + (theta.log_normalizer() - prior.log_normalizer()).sum() - len(y) * D / 2 * np.log(2 * np.pi)
    return pi, theta, float(gained)


@in_every_mode
def test_one_step_of_rate_one_is_the_posterior_and_the_loss_the_evidence(backend: str, mode: str) -> None:
    """From anywhere; the networks' kind of optimiser beside it has nothing to move here."""
    pi, theta, evidence = posterior(np.eye(K)[LABELS], POINTS)
    run = fit(
        CONJUGATE,
        data={"c": LABELS, "y": POINTS},
        estimator="expected",
        steps=2,
        optimizer={"a": NATURAL, "*": NATURAL},
        backend=backend,
        compile=mode,
        **CLOSED,
    )
    assert run.history["loss"][0] * N > 5.0 - evidence
    np.testing.assert_allclose(run.history["loss"][1] * N, -evidence, atol=1e-10)
    np.testing.assert_allclose(run.params["a"], pi.concentration, atol=1e-10)
    np.testing.assert_allclose(run.params["form"], theta.form, atol=1e-10)
    np.testing.assert_allclose(run.params["df"], theta.df, atol=1e-10)


@slow_to_compile
def test_mini_batches_count_for_all_rows(backend: str) -> None:
    """`eta <- (1 - rate) eta + rate (eta0 + N / B sum t)`: stochastic variational inference by hand."""
    run = fit(
        CONJUGATE,
        data={"c": LABELS, "y": POINTS},
        estimator="expected",
        steps=1,
        batch_size=4,
        optimizer={**NATURAL, "learning_rate": 0.25},
        backend=backend,
        **CLOSED,
    )
    rows = np.random.default_rng([1, 0]).permutation(N)[:4]
    pi, theta, _ = posterior(N / 4 * np.eye(K)[LABELS[rows]], POINTS[rows])
    targets = {"a": pi.concentration.numpy(), "form": theta.form.numpy(), "df": theta.df.numpy()}
    for (name, first), target in zip(STARTS.items(), targets.values(), strict=True):
        np.testing.assert_allclose(run.params[name], 0.75 * first + 0.25 * target, atol=1e-10)


# Two Gammas that are drawn: one by shape and rate, its natural parameters; three by shape and mean, which are not.

RATES = (1e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
GAMMAS = {
    "shape": np.array(3.0),
    "rate": np.array(0.5),
    "k": np.array([1.0, 2.0, 30.0]),
    "m": np.array([0.5, 1.0, 9.0]),
}


def gammas(ppl: Ppl, x: Array) -> None:
    g = ppl.sample("g", ppl.dist.Gamma(2.0 + 0.0 * x[0], 1.0))
    with ppl.plate("three", 3):
        h = ppl.sample("h", ppl.dist.Gamma(2.0 + ppl.ops.zeros((3,), x), 1.0))
    with ppl.plate("data", len(x)):
        ppl.sample("x", ppl.dist.Normal(ppl.xp.log(g) + h.sum(-1), 0.2), obs=x)


def by_shape_rate_mean(ppl: Ppl, x: Array) -> None:
    positive = ppl.dist.constraints.positive
    shape = ppl.param("shape", lambda: GAMMAS["shape"], constraint=positive)
    rate = ppl.param("rate", lambda: GAMMAS["rate"], constraint=positive)
    k = ppl.param("k", lambda: GAMMAS["k"], constraint=positive)
    m = ppl.param("m", lambda: GAMMAS["m"], constraint=positive)
    ppl.sample("g", ppl.dist.Gamma(shape, rate))
    with ppl.plate("three", 3):
        ppl.sample("h", ppl.dist.Gamma(k, k / m))


DRAWN = Program("gammas", gammas, by_shape_rate_mean, portable=True, arguments=("x",))


@slow_to_compile
def test_steps_are_the_inverse_fisher_matrix_times_the_gradient(backend: str) -> None:
    """The gradient is that of a plain step with the same noise. Elements that would leave their domain go around."""
    x = np.array([0.5, 1.0, 2.0])
    first = GAMMAS
    plainly = {"name": "sgd", "learning_rate": 1e-3}
    options: dict[str, Any] = {"data": x, "steps": 1, "backend": backend, **CLOSED}
    plain = fit(DRAWN, optimizer=plainly, **options)
    g = {n: (np.log(v) - np.log(plain.params[n])) / 1e-3 / v for n, v in first.items()}  # in constrained values
    a, b, k, m = first["shape"], first["rate"], first["k"], first["m"]
    F = np.array([[polygamma(1, a), -1.0 / b], [-1.0 / b, a / b**2]])
    step = dict(zip(("shape", "rate"), np.linalg.solve(F, [g["shape"], g["rate"]]), strict=True))
    step |= {"k": g["k"] / (polygamma(1, k) - 1.0 / k), "m": g["m"] * m**2 / k}
    ways = []
    good = 1e-7 if backend == "pyro" else 1e-9  # torch's trigamma has an error of about 1e-9
    for rate in RATES:
        run = fit(DRAWN, optimizer={"name": "natural", "learning_rate": rate}, **options)
        left = {n: first[n] - rate * step[n] <= 0 for n in first}
        out = {"shape": left["shape"] | left["rate"], "k": left["k"] | left["m"]}
        out |= {"rate": out["shape"], "m": out["k"]}
        for n, v in first.items():
            straight, curved = v - rate * step[n], v * np.exp(-rate * step[n] / v)
            np.testing.assert_allclose(run.params[n], np.where(out[n], curved, straight), rtol=good)
        ways.append(int(out["k"].sum()))
    assert ways[0] == 0 and any(0 < n < 3 for n in ways)


def plain_guide(ppl: Ppl, x: Array) -> None:
    ppl.sample("g", ppl.dist.LogNormal(ppl.param("loc", 0.0) + ppl.param("more", 0.0), 1.0))
    slope, inner = ppl.param("slope", 0.1), ppl.param("inner", 0.1)
    h = ppl.sample("h", ppl.dist.Normal(ppl.param("first", 0.0), 1.0))
    ppl.sample("i", ppl.dist.Normal(inner * h, 1.0))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(slope * x, 1.0))


def plain_model(ppl: Ppl, x: Array) -> None:
    g = ppl.sample("g", ppl.dist.LogNormal(0.0 * x[0], 1.0))
    h = ppl.sample("h", ppl.dist.Normal(0.0 * x[0], 1.0))
    i = ppl.sample("i", ppl.dist.Normal(h, 1.0))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(ppl.param("of_model", 0.0), 1.0))
        ppl.sample("x", ppl.dist.Normal(z + i, g), obs=x)


PLAIN = Program("plain", plain_model, plain_guide, portable=True, arguments=("x",))


@on_both
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("slope", r"optimizer.slope: .*'slope' is a parameter of none with a closed-form KL"),
        ("of_model", r"'of_model' is the model's too"),
        ("inner", r"site 'i' is drawn from \['h'\]"),
        ("[lm]o[cr]*", r"Fisher information of sites \['g'\] in parameters \['loc', 'more'\] is singular"),
    ],
)
def test_what_has_no_natural_step_is_refused(backend: str, pattern: str, message: str) -> None:
    optimizer = {pattern: {"name": "natural"}, "*": {"name": "adam"}}
    with pytest.raises(LegalityError, match=message):
        fit(PLAIN, data=np.arange(3.0), optimizer=optimizer, steps=1, backend=backend, **CLOSED)


def test_options_that_natural_steps_do_not_take() -> None:
    with pytest.raises(RecipeError, match="clip is a norm of gradients, which natural steps do not go by"):
        recipe("elbo", optimizer={"name": "natural", "clip": 1.0})


def normalised(ppl: Ppl, c: Array, y: Array) -> None:
    on_pi, on_theta = priors(ppl, y)
    pi = ppl.sample("pi", on_pi)
    with ppl.plate("components", K):
        theta = ppl.sample("theta", on_theta)
    with ppl.plate("data", len(y)):
        ppl.sample("c", ppl.dist.Categorical(logits=pi), obs=c)
        ppl.sample("y", ppl.structured.Gaussian(of(ppl, c, theta)), obs=y)


@slow_to_compile
def test_means_stand_for_draws_in_linear_densities_alone(backend: str) -> None:
    options: dict[str, Any] = {"estimator": "expected", "backend": backend, "steps": 1}
    options["data"] = {"c": LABELS, "y": POINTS}
    bent = Program(
        "normalised",
        normalised,
        of_globals,
        portable=True,
        arguments=("c", "y"),
        example=lambda rng: {"c": LABELS, "y": POINTS},  # keeps the labels integers
    )
    with pytest.raises(LegalityError, match=r"'pi' under estimator 'expected': log_p of site 'c' is not linear"):
        fit(bent, **options, **CLOSED)
    with pytest.raises(LegalityError, match="set kl = 'where_known'"):
        fit(CONJUGATE, **options, **{**CLOSED, "kl": "sampled"})
    with pytest.raises(LegalityError, match="'i' from it"):
        fit(PLAIN, data=np.arange(3.0), estimator={"h": "expected"}, backend=backend, steps=1, **CLOSED)


# A mixture whose labels and draws are local: potentials that are not the likelihood's.


def unlabelled(ppl: Ppl, x: Array) -> None:
    on_pi, on_theta = priors(ppl, x)
    pi = ppl.sample("pi", on_pi)
    with ppl.plate("components", K):
        theta = ppl.sample("theta", on_theta)
    with ppl.plate("data", len(x)):
        c = ppl.sample("c", ppl.structured.Labels(pi))
        z = ppl.sample("z", ppl.structured.Gaussian(of(ppl, c, theta)))
        ppl.sample("x", ppl.dist.Normal(z, 0.5).to_event(1), obs=x)


def as_johnson(ppl: Ppl, x: Array) -> None:
    message_passing(ppl, x, ppl.ops.stop_gradient)


def message_passing(ppl: Ppl, x: Array, seen: Callable[[Array], Array] = lambda a: a) -> None:
    pi, theta = factors(ppl)
    ppl.sample("pi", pi)
    with ppl.plate("components", K):
        ppl.sample("theta", theta)
    J = 1.5 * ppl.ops.eye(D, x) + 0.0 * x[..., None]
    q = ppl.structured.mixture_posterior(seen(pi.mean), seen(theta.mean), J, 1.5 * x)
    with ppl.plate("data", len(x)):
        c = ppl.sample("c", ppl.dist.Categorical(logits=q.log_prob))
        ppl.sample("z", ppl.structured.Gaussian(of(ppl, c, q.form)))


@slow_to_compile
def test_johnson_s_step_is_that_of_stopped_statistics(backend: str) -> None:
    """`eta0 + N / B sum E t - eta` by hand; the exact one has another term."""
    t, y = torch.tensor, POINTS[:6]
    pi, theta = Dirichlet(t(STARTS["a"])), NormalInverseWishart(t(FIRST), t(STARTS["df"]))
    J = 1.5 * torch.eye(D, dtype=torch.float64).expand(6, D, D)
    q = mixture_posterior(pi.expected(), theta.expected(), J, 1.5 * t(y))
    labels, moments = q.statistics()
    prior = niw_form(t(np.zeros((K, D))), t(np.full(K, 0.5)), t(np.stack([np.eye(D)] * K)))
    steps: dict[bool, dict[str, np.ndarray]] = {}
    for correction, guide in ((False, as_johnson), (True, message_passing)):
        mixture = Program("mixture", unlabelled, guide, portable=True, arguments=("x",))
        estimator = {"pi": "expected", "theta": "expected", "c": "enumerate", "z": "pathwise"}
        options: dict[str, Any] = {"optimizer": NATURAL, "estimator": estimator, "backend": backend}
        steps[correction] = dict(fit(mixture, data=y, steps=1, **options, **CLOSED).params)
    stopped = steps[False]
    np.testing.assert_allclose(stopped["a"], 0.5 + labels.sum(0), atol=1e-10)
    np.testing.assert_allclose(stopped["form"], prior + moments.sum(0), atol=1e-10)
    np.testing.assert_allclose(stopped["df"], 4.0 + labels.sum(0), atol=1e-10)
    assert np.abs(steps[True]["form"] - stopped["form"]).max() > 0.1


@pytest.mark.slow
@on_both
def test_a_mixture_in_the_code_finds_the_arms_of_a_pinwheel(backend: str) -> None:
    """Of 15 components five are used, one an arm; on rows that were held out."""
    data = load("pinwheel")
    chosen = program("svae_gmm", components=15)
    run = fit(chosen, data=data.train, recipe="svae", steps=1000, backend=backend, progress_bar=False)
    drawn = run.posterior(100, data.test).values["c"].astype(int)
    clusters = np.stack([(drawn == k).sum(0) for k in range(15)]).argmax(0)
    arms = np.asarray(data.test_labels)
    purity = sum(np.bincount(arms[clusters == k]).max() for k in np.unique(clusters)) / len(arms)
    assert purity >= 0.9
    assert (np.bincount(clusters) >= 0.01 * len(arms)).sum() <= 8
