"""Switching linear dynamical systems against the sum over all sequences of states, each a chain of Gaussians."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import multivariate_normal

from ppl_lvm.errors import DataError
from ppl_lvm.structured.gaussian_chain import GaussianChain
from ppl_lvm.structured.markov_chain import MarkovChain
from ppl_lvm.structured.scan import Method
from ppl_lvm.structured.slds import MeanField, SwitchingChain

on_both = pytest.mark.parametrize("library", ["torch", "jax"])
EXACT = 1e-10
_QUICK = {"xla_backend_optimization_level": 0}
DYNAMICS = ("mean", "cov", "transition", "bias", "noise")
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def spd(rng: np.random.Generator, *batch: int, dim: int) -> np.ndarray:
    a = rng.normal(size=(*batch, dim, dim))
    return a @ np.swapaxes(a, -1, -2) / dim + 0.3 * np.eye(dim)


def arguments(T: int, V: int, D: int, batch: tuple[int, ...] = (), seed: int = 0, missing: int = 2) -> Arrays:
    """Dynamics that change from step to step, states that what is known of them weighs, and steps without data."""
    rng = np.random.default_rng(seed)
    precision, shift = 2.0 * spd(rng, T, *batch, dim=D), 2.0 * rng.normal(size=(T, *batch, D))
    precision[missing : missing + 2], shift[missing : missing + 2] = 0.0, 0.0
    node = rng.normal(size=(T, *batch, V))
    node[0, ..., 0] = -np.inf
    return {
        "initial": log_softmax(rng.normal(size=(*batch, V)), -1),
        "move": log_softmax(rng.normal(size=(T - 1, *batch, V, V)), -1),
        "node": node,
        "mean": rng.normal(size=(*batch, V, D)),
        "cov": spd(rng, *batch, V, dim=D),
        "transition": 0.7 * rng.normal(size=(T - 1, *batch, V, D, D)),
        "bias": rng.normal(size=(T - 1, *batch, V, D)),
        "noise": spd(rng, T - 1, *batch, V, dim=D),
        "precision": precision,
        "shift": shift,
    }


def chain(given: dict[str, Any], method: Method = "auto") -> SwitchingChain:
    states = MarkovChain(given["initial"], given["move"], given["node"], method=method)
    return SwitchingChain(states, **{n: given[n] for n in DYNAMICS}, method=method, validate=False)


def tensors(given: Arrays) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(x) for n, x in given.items()}


def mean_field(library: str, given: Arrays, method: Method = "auto", sweeps: int = 10) -> MeanField:
    """As tensors of torch, whichever library computed them."""
    if library == "torch":
        p = tensors(given)
        return chain(p, method).mean_field(p["precision"], p["shift"], sweeps)

    def run(leaves: dict[str, Any]) -> Any:
        q = chain(leaves, method).mean_field(leaves["precision"], leaves["shift"], sweeps)
        potentials = (q.chain.precision, q.chain.shift)
        dynamics = (q.chain.mean, q.chain.cov, q.chain.transition, q.chain.bias, q.chain.noise)
        return q.states.node, dynamics + potentials, q.bounds

    compiled = jax.jit(run, compiler_options=_QUICK)({n: jnp.asarray(x) for n, x in given.items()})
    node, of_chain, bounds = jax.tree.map(lambda x: torch.tensor(np.array(x)), compiled)
    states = MarkovChain(torch.tensor(given["initial"]), torch.tensor(given["move"]), node)
    return MeanField(states, GaussianChain(*of_chain), bounds)


def sequences(T: int, V: int) -> np.ndarray:
    """`[T, V^T]`."""
    return np.array(list(itertools.product(range(V), repeat=T))).T


def log_evidence(given: Arrays) -> float:
    """Of the potentials, by the normaliser of each sequence's chain."""
    p = tensors(given)
    paths = torch.tensor(sequences(len(given["node"]), given["node"].shape[-1]))
    of_path = chain(p).given(paths).times(p["precision"][:, None], p["shift"][:, None]).log_normalizer()
    return float(torch.logsumexp(chain(p).states.log_prob(paths) + of_path, 0))


def log_density(given: Arrays, s: np.ndarray, z: np.ndarray) -> float:
    """`log p(z | s)` by a loop."""
    total = multivariate_normal(given["mean"][s[0]], given["cov"][s[0]]).logpdf(z[0])
    for t, k in enumerate(s[1:]):
        mean = given["transition"][t, k] @ z[t] + given["bias"][t, k]
        total += multivariate_normal(mean, given["noise"][t, k]).logpdf(z[t + 1])
    return float(total)


@pytest.mark.parametrize("T", [1, 4])
def test_densities_are_those_of_all_sequences(T: int) -> None:
    given, paths = arguments(T, 3, 2), sequences(T, 3)
    p, z = chain(tensors(given)), np.random.default_rng(1).normal(size=(T, 2))
    each = np.array([log_density(given, s, z) for s in paths.T])
    found = p.given(torch.tensor(paths)).log_prob(torch.tensor(z)[:, None])
    np.testing.assert_allclose(found, each, atol=EXACT)
    log_prior = p.states.log_prob(torch.tensor(paths)).numpy()
    joint = log_prior + each
    np.testing.assert_allclose(p.log_prob(torch.tensor(z)), logsumexp(joint), atol=EXACT)
    posterior = p.states_given(torch.tensor(z))
    possible = paths[0] > 0
    np.testing.assert_allclose(
        posterior.log_prob(torch.tensor(paths))[possible], (joint - logsumexp(joint))[possible], atol=EXACT
    )


def test_draws_are_states_and_then_their_chain() -> None:
    given, rng = arguments(3, 2, 2), np.random.default_rng(0)
    p, uniform, noise = chain(tensors(given)), rng.uniform(size=(3, 5)), rng.normal(size=(3, 5, 2))
    s, z = p.sample(torch.tensor(uniform), torch.tensor(noise))
    for i in range(5):
        alone = {n: given[n] for n in DYNAMICS}
        mine = s[:, i].numpy()
        first = {n: alone[n][mine[0]] for n in ("mean", "cov")}
        rest = {n: alone[n][range(2), mine[1:]] for n in ("transition", "bias", "noise")}
        leaves: dict[str, Any] = {n: torch.tensor(x) for n, x in {**first, **rest}.items()}
        expected = GaussianChain(**leaves).sample(torch.tensor(noise[:, i]))
        np.testing.assert_allclose(z[:, i], expected, atol=EXACT)


def test_averaged_dynamics_are_a_chain_times_potentials() -> None:
    """As a function of z, whatever the marginals of the states are, among them one that is sure."""
    given, rng = arguments(5, 3, 2), np.random.default_rng(0)
    weight = rng.dirichlet(np.ones(3), size=5)
    weight[1] = [0.0, 1.0, 0.0]
    averaged, constant = chain(tensors(given)).averaged(torch.tensor(weight))
    assert averaged.precision is not None
    assert (torch.linalg.eigvalsh(averaged.precision) > -1e-12).all()
    for z in rng.normal(size=(3, 5, 2)):
        expected = 0.0
        for t in range(5):
            for k in range(3):
                mean, cov = given["mean"][k], given["cov"][k]
                if t:
                    F, b, cov = (given[n][t - 1, k] for n in ("transition", "bias", "noise"))
                    mean = F @ z[t - 1] + b
                expected += weight[t, k] * multivariate_normal(mean, cov).logpdf(z[t])
        found = averaged.log_prob(torch.tensor(z)) + averaged.log_normalizer() + constant
        np.testing.assert_allclose(found, expected, atol=EXACT)


def value_of(given: Arrays, q: MeanField) -> float:
    """The bound of the two factors by the sum over sequences."""
    p = tensors(given)
    paths, moments = torch.tensor(sequences(len(given["node"]), given["node"].shape[-1])), q.chain.moments()
    wide = type(moments)(*(x[:, None] for x in moments))
    log_q = q.states.log_prob(paths)
    joint = chain(p).states.log_prob(paths) + chain(p).given(paths).expected_log_prob(wide)
    square = moments.cov + moments.mean[:, :, None] * moments.mean[:, None, :]
    psi = (p["shift"] * moments.mean).sum() - 0.5 * (p["precision"] * square).sum()
    of_states = torch.where(log_q > -1e20, log_q.exp() * (joint - log_q), torch.zeros(()).double()).sum()
    return float(of_states + psi + q.chain.entropy())


@pytest.mark.parametrize(
    ("library", "method"),
    [
        ("torch", "parallel"),
        ("torch", "sequential"),
        ("jax", "sequential"),
        pytest.param("jax", "parallel", marks=pytest.mark.slow),
    ],
)
def test_the_bound_rises_to_below_the_evidence(library: str, method: Method) -> None:
    given = arguments(6, 3, 2)
    q = mean_field(library, given, method)
    bounds = q.bounds.numpy()
    assert (np.diff(bounds) > -1e-12).all() and bounds[-1] > bounds[0] + 0.1
    evidence = log_evidence(given)
    assert evidence - 3.0 < bounds[-1] < evidence - 1e-3
    p = tensors(given)
    np.testing.assert_allclose(bounds[-1], value_of(given, q), atol=EXACT)
    own = chain(p).bound(q.states, q.chain, p["precision"], p["shift"])
    np.testing.assert_allclose(bounds[-1], own, atol=EXACT)


@pytest.mark.parametrize("T", [1, 2, *(pytest.param(T, marks=pytest.mark.slow) for T in (5, 8))])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_never_above_the_evidence(T: int, seed: int) -> None:
    given = arguments(T, 2, 2, seed=seed)
    q = mean_field("torch", given, sweeps=60)
    assert (np.diff(q.bounds) > -1e-11).all()
    assert float(q.bounds[-1]) < log_evidence(given) + EXACT
    np.testing.assert_allclose(q.bounds[-1], value_of(given, q), atol=EXACT)


@on_both
def test_it_is_the_evidence_where_states_choose_nothing(library: str) -> None:
    given = arguments(5, 3, 2)
    for n in DYNAMICS:
        axis = 0 if n in ("mean", "cov") else 1
        given[n] = np.repeat(np.take(given[n], [0], axis), 3, axis)
    q = mean_field(library, given, sweeps=2)
    np.testing.assert_allclose(q.bounds, log_evidence(given), atol=EXACT)
    known = chain(tensors(given)).states.statistics()
    np.testing.assert_allclose(q.states.statistics().single, known.single, atol=EXACT)


def test_it_is_the_evidence_where_states_are_known() -> None:
    """One sequence alone: the dynamics of the others are there and count for nothing."""
    given = arguments(5, 3, 2)
    given["node"] = np.where(np.eye(3)[[1, 0, 2, 2, 1]] > 0, given["node"], -np.inf)
    q = mean_field("torch", given, sweeps=3)
    np.testing.assert_allclose(q.bounds, log_evidence(given), atol=1e-9)


def test_the_fixed_point_is_level_in_both_factors() -> None:
    given = arguments(5, 3, 2)
    p, q = tensors(given), mean_field("torch", given, sweeps=100)
    moved = {n: torch.zeros(x.shape, dtype=torch.float64, requires_grad=True) for n, x in p.items() if n[0] in "ps"}
    node, pair = (torch.zeros(p[n].shape, dtype=torch.float64, requires_grad=True) for n in ("node", "move"))
    node_now = q.states.node
    assert node_now is not None
    states = replace(q.states, node=node_now + node, transition=q.states.transition + pair)
    symmetric = moved["precision"] + moved["precision"].mT
    bound = chain(p).bound(states, q.chain.times(symmetric, moved["shift"]), p["precision"], p["shift"])
    bound.backward()
    for x in (node, pair, *moved.values()):
        assert x.grad is not None
        np.testing.assert_allclose(x.grad, 0.0, atol=1e-9)
    away = mean_field("torch", given, sweeps=1)
    assert float(away.bounds[0]) < float(bound.detach()) - 0.1


def of_everything(leaves: dict[str, Any], method: Method, sweeps: int) -> Any:
    """A number that both factors have a part in."""
    q = chain(leaves, method).mean_field(leaves["precision"], leaves["shift"], sweeps)
    moments = q.chain.moments()
    return q.bounds[-1] + (q.states.statistics().pair ** 2).sum() + (moments.mean**2).sum() + (moments.cov**2).sum()


def differentiated(library: str, given: Arrays, method: Method, sweeps: int) -> tuple[float, Arrays]:
    if library == "torch":
        leaves = {n: torch.tensor(x, requires_grad=True) for n, x in given.items()}
        value = of_everything(leaves, method, sweeps)
        value.backward()
        return float(value.detach()), {n: np.asarray(x.grad) for n, x in leaves.items()}
    run = jax.value_and_grad(partial(of_everything, method=method, sweeps=sweeps))
    value, gradient = jax.jit(run, compiler_options=_QUICK)({n: jnp.asarray(x) for n, x in given.items()})
    return float(value), {n: np.asarray(g) for n, g in gradient.items()}


def test_derivatives_through_the_sweeps_are_those_of_differences() -> None:
    """Of both libraries, whether the sweeps are enough or not: here they are not."""
    given, h = arguments(3, 3, 2, missing=1), 1e-5
    value, gradient = differentiated("torch", given, "parallel", 3)
    other, of_other = differentiated("jax", given, "sequential", 3)
    np.testing.assert_allclose(other, value, rtol=1e-11)
    rng = np.random.default_rng(0)
    for n, x in given.items():
        way, one, both = rng.normal(size=x.shape), gradient[n], of_other[n]
        if n in ("cov", "noise", "precision"):  # symmetric: what a gradient says of the other part is nothing
            way, one, both = (g + np.swapaxes(g, -1, -2) for g in (way, one, both))
            one, both = one / 2, both / 2
        np.testing.assert_allclose(both, one, atol=1e-9, rtol=1e-9, err_msg=n)
        ends = [float(of_everything(tensors({**given, n: x + s * h * way}), "parallel", 3)) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose((one * way).sum(), slope, rtol=1e-6, atol=1e-7, err_msg=n)


def test_a_fixed_point_needs_no_derivative_of_its_factors() -> None:
    """The bound's own derivative is that at factors that stand still, once they are the best."""
    given = arguments(4, 2, 2)
    leaves = {n: torch.tensor(x, requires_grad=True) for n, x in given.items()}
    q = chain(leaves).mean_field(leaves["precision"], leaves["shift"], 60)
    through = torch.autograd.grad(q.bounds[-1], [leaves[n] for n in DYNAMICS], retain_graph=True)
    still = MeanField(*mean_field("torch", given, sweeps=60))
    value = chain(leaves).bound(still.states, still.chain, leaves["precision"], leaves["shift"])
    for n, a, b in zip(DYNAMICS, through, torch.autograd.grad(value, [leaves[n] for n in DYNAMICS]), strict=True):
        np.testing.assert_allclose(a + a.mT if a.ndim > 2 else a, b + b.mT if b.ndim > 2 else b, atol=1e-8, err_msg=n)


def test_batches_broadcast() -> None:
    T, V, D = 4, 3, 2
    shared, own = arguments(T, V, D), arguments(T, V, D, (2,), seed=5)
    mixed = {**shared, **{n: own[n] for n in ("precision", "shift", "node", "mean")}}
    q = mean_field("torch", mixed)
    np.testing.assert_allclose(mean_field("jax", mixed, sweeps=1).bounds, q.bounds[:1], atol=EXACT)
    p, z = tensors(mixed), np.random.default_rng(0).normal(size=(T, 5, 2, D))
    s = chain(p).sample(torch.rand(T, 5, 2, dtype=torch.float64), torch.tensor(z))[0]
    for b in range(2):
        rows = {n: x[:, b] if n in ("precision", "shift", "node") else x for n, x in mixed.items()}
        rows["mean"] = mixed["mean"][b]
        alone, single = mean_field("torch", rows), chain(tensors(rows))
        np.testing.assert_allclose(q.bounds[:, b], alone.bounds, atol=EXACT)
        np.testing.assert_allclose(q.chain.moments().mean[:, b], alone.chain.moments().mean, atol=EXACT)
        found = chain(p).log_prob(torch.tensor(z))[:, b]
        np.testing.assert_allclose(found, single.log_prob(torch.tensor(z[:, :, b])), atol=EXACT)
        of_s = chain(p).given(s).log_prob(torch.tensor(z))[:, b]
        np.testing.assert_allclose(of_s, single.given(s[:, :, b]).log_prob(torch.tensor(z[:, :, b])), atol=EXACT)


def test_rows_that_share_their_potentials_or_their_dynamics() -> None:
    """With as many rows as steps, so that an axis in a wrong place would be taken for the right one."""
    T, V, D = 3, 2, 2
    given, own = arguments(T, V, D, missing=1), arguments(T, V, D, (T,), seed=5, missing=1)
    for names in (("precision", "shift"), ("noise", "transition"), ("move", "node"), ("bias",)):
        mixed = {**given, **{n: own[n] for n in names}}
        q = mean_field("torch", mixed, sweeps=3)
        p = tensors(mixed)
        np.testing.assert_allclose(
            chain(p).bound(q.states, q.chain, p["precision"], p["shift"]), q.bounds[-1], atol=EXACT
        )
        for b in range(T):
            alone = mean_field("torch", {**given, **{n: own[n][:, b] for n in names}}, sweeps=3)
            np.testing.assert_allclose(q.bounds[:, b], alone.bounds, atol=EXACT)


def test_bad_arguments() -> None:
    given = tensors(arguments(3, 2, 2))
    p = chain(given)
    with pytest.raises(DataError, match=r"bias has shape \(1, 2, 2\); .* 2 transitions .* \(2, '...', 2, 2\)"):
        replace(p, bias=given["bias"][1:])
    with pytest.raises(DataError, match=r"cov of a SwitchingChain is not positive definite"):
        replace(p, cov=-given["cov"], validate=True)
    with pytest.raises(DataError, match="sweeps=0 were asked for"):
        p.mean_field(given["precision"], given["shift"], sweeps=0)
    with pytest.raises(DataError, match=r"shift has shape \(2, 2\); the chain says it is \(3, '...', 2\)"):
        p.mean_field(given["precision"], given["shift"][1:])
