"""Discrete chains against the sum over all sequences, sequential against parallel, both libraries' arrays."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from ppl_lvm.errors import DataError
from ppl_lvm.structured.markov_chain import MarkovChain
from ppl_lvm.structured.scan import Method

on_both = pytest.mark.parametrize("library", ["torch", "jax"])
METHODS: tuple[Method, ...] = ("sequential", "parallel")
EXACT = 1e-10
_QUICK = {"xla_backend_optimization_level": 0}
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def arguments(T: int, V: int, batch: tuple[int, ...] = (), seed: int = 0) -> Arrays:
    """Transitions that change from step to step; the first node says for sure what its state is not."""
    rng = np.random.default_rng(seed)
    node = rng.normal(size=(T, *batch, V))
    node[0, ..., 0] = -np.inf
    return {
        "initial": log_softmax(rng.normal(size=(*batch, V)), -1),
        "transition": log_softmax(rng.normal(size=(T - 1, *batch, V, V)), -1),
        "node": node,
    }


def outputs(library: str, given: Arrays, method: Method, z: np.ndarray, uniform: np.ndarray) -> dict[str, Any]:
    """All that a chain computes, as numpy's arrays."""

    def everything(leaves: dict[str, Any], z: Any, uniform: Any) -> dict[str, Any]:
        q = MarkovChain(**leaves, method=method)
        found = q.statistics()
        return {
            **{"normalizer": q.log_normalizer(), "filtered": q.filtered(), "single": found.single, "pair": found.pair},
            **{"log_prob": q.log_prob(z), "mode": q.mode(), "draws": q.sample(uniform), "entropy": q.entropy()},
            **{"kl": q.kl(q.prior)},
        }

    if library == "torch":
        found = everything({n: torch.tensor(x) for n, x in given.items()}, torch.tensor(z), torch.tensor(uniform))
        return {n: x.numpy() for n, x in found.items()}
    step = jax.jit(everything, compiler_options=_QUICK)
    found = step({n: jnp.asarray(x) for n, x in given.items()}, jnp.asarray(z), jnp.asarray(uniform))
    return {n: np.asarray(x) for n, x in found.items()}


def log_joint(given: Arrays, paths: np.ndarray) -> np.ndarray:
    """Of paths `[S, T]`."""
    total = given["initial"][paths[:, 0]] + given["node"][np.arange(paths.shape[1]), paths].sum(1)
    for t, transition in enumerate(given["transition"]):
        total = total + transition[paths[:, t], paths[:, t + 1]]
    return total


@on_both
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("T", "V"), [(1, 3), (2, 2), (6, 3)])
def test_all_is_that_of_the_sum_over_sequences(library: str, method: Method, T: int, V: int) -> None:
    given = arguments(T, V)
    paths = np.array(list(itertools.product(range(V), repeat=T)))
    joint = log_joint(given, paths)
    log_z = logsumexp(joint)
    q = np.exp(joint - log_z)
    # Uniforms that hit every sequence once and again, in proportion: a grid over the first step's, and midpoints.
    uniform = (np.stack(np.meshgrid(*[(np.arange(7) + 0.5) / 7] * min(T, 3))).reshape(min(T, 3), -1))
    uniform = np.concatenate([uniform, np.full((T - len(uniform), uniform.shape[1]), 0.37)])
    found = outputs(library, given, method, paths.T, uniform)
    np.testing.assert_allclose(found["normalizer"], log_z, atol=EXACT)
    possible = paths[:, 0] > 0
    np.testing.assert_allclose(found["log_prob"][possible], (joint - log_z)[possible], atol=EXACT)
    assert (found["log_prob"][~possible] < -1e29).all()
    for t in range(T):
        single = np.array([q[paths[:, t] == v].sum() for v in range(V)])
        np.testing.assert_allclose(found["single"][t], single, atol=EXACT)
        cut = {n: x[: t + (n == "node")] if n != "initial" else x for n, x in given.items()}
        short = np.array(list(itertools.product(range(V), repeat=t + 1)))
        log_cut = log_joint(cut, short)
        filtered = [logsumexp(log_cut[short[:, t] == v]) - logsumexp(log_cut) for v in range(V)]
        np.testing.assert_allclose(np.exp(found["filtered"][t]), np.exp(filtered), atol=EXACT)
    for t in range(T - 1):
        pair = [[q[(paths[:, t] == v) & (paths[:, t + 1] == w)].sum() for w in range(V)] for v in range(V)]
        np.testing.assert_allclose(found["pair"][t], pair, atol=EXACT)
    np.testing.assert_array_equal(found["mode"], paths[joint.argmax()])
    entropy = -(q * np.where(q > 0, joint - log_z, 0.0)).sum()
    np.testing.assert_allclose(found["entropy"], entropy, atol=EXACT)
    without = log_joint({**given, "node": 0 * np.nan_to_num(given["node"])}, paths)
    np.testing.assert_allclose(found["kl"], -entropy - (q * without).sum(), atol=EXACT)
    for s in range(uniform.shape[1]):  # a draw is the inverse of the conditional distribution functions, step by step
        left = q.copy()
        for t in range(T):
            weights = np.array([left[paths[:, t] == v].sum() for v in range(V)])
            z = int((np.cumsum(weights / weights.sum())[:-1] < uniform[t, s]).sum())
            assert found["draws"][t, s] == z
            left = np.where(paths[:, t] == z, left, 0.0)


@on_both
def test_batches_broadcast(library: str) -> None:
    T, V = 4, 3
    shared, own = arguments(T, V), arguments(T, V, (2,), seed=5)
    mixed = {**shared, "node": own["node"]}
    rng = np.random.default_rng(0)
    z, uniform = rng.integers(1, V, size=(T, 5, 2)), rng.uniform(size=(T, 5, 2))
    found = outputs(library, mixed, "auto", z, uniform)
    for b in range(2):
        rows = {**shared, "node": own["node"][:, b]}
        alone = outputs("torch", rows, "sequential", z[:, :, b], uniform[:, :, b])
        for name in ("normalizer", "entropy", "kl"):
            np.testing.assert_allclose(found[name][b], alone[name], atol=EXACT)
        np.testing.assert_allclose(found["log_prob"][:, b], alone["log_prob"], atol=EXACT)
        np.testing.assert_array_equal(found["draws"][:, :, b], alone["draws"])
        np.testing.assert_array_equal(found["mode"][:, b], alone["mode"])
        np.testing.assert_allclose(found["pair"][:, b], alone["pair"], atol=EXACT)


def test_kl_to_chains_that_differ_from_row_to_row() -> None:
    """With as many rows as steps, so that an axis in a wrong place would be taken for the right one."""
    one, many = arguments(3, 2), arguments(3, 2, (3,), seed=5)

    def chain(given: Arrays) -> MarkovChain:
        initial, transition, node = (torch.tensor(np.maximum(given[n], -9.0)) for n in given)
        return MarkovChain(initial, transition, node)

    q, p = chain(one), chain(many)
    for b in range(3):
        row = chain({n: x[b] if n == "initial" else x[:, b] for n, x in many.items()})
        np.testing.assert_allclose(q.kl(p)[b], q.kl(row), atol=EXACT)
        np.testing.assert_allclose(p.kl(q)[b], row.kl(q), atol=EXACT)


def of_everything(leaves: dict[str, Any], method: Method) -> Any:
    q = MarkovChain(**leaves, method=method)
    return q.log_normalizer() + q.entropy() + (q.statistics().pair ** 2).sum()


@pytest.mark.parametrize("T", [2, 9, pytest.param(257, marks=pytest.mark.slow)])
def test_parallel_is_sequential_with_values_and_gradients(T: int) -> None:
    given = arguments(T, 3, seed=T)
    found: list[tuple[float, Arrays]] = []
    for method in METHODS:
        leaves = {n: torch.tensor(x, requires_grad=True) for n, x in given.items()}
        value = of_everything(leaves, method)
        value.backward()
        found.append((float(value.detach()), {n: np.asarray(x.grad) for n, x in leaves.items()}))
        step = jax.jit(jax.value_and_grad(partial(of_everything, method=method)), compiler_options=_QUICK)
        value, gradient = step({n: jnp.asarray(x) for n, x in given.items()})
        found.append((float(value), {n: np.asarray(g) for n, g in gradient.items()}))
    for value, gradient in found[1:]:
        np.testing.assert_allclose(value, found[0][0], rtol=1e-10)
        for n, g in gradient.items():
            np.testing.assert_allclose(g, found[0][1][n], atol=1e-9, err_msg=n)
    assert all(np.isfinite(g).all() for g in found[0][1].values())


@on_both
def test_what_is_no_number_is_not_taken_for_an_impossible_value(library: str) -> None:
    given = arguments(3, 2)
    given["node"][1, 1] = np.nan
    leaves: dict[str, Any] = {n: torch.tensor(x) if library == "torch" else jnp.asarray(x) for n, x in given.items()}
    assert np.isnan(float(MarkovChain(**leaves).log_normalizer()))


def test_bad_arguments() -> None:
    given = arguments(3, 2)
    with pytest.raises(DataError, match=r"node has shape \(2, 2\); .* it is \(3, '...', 2\)"):
        MarkovChain(given["initial"], given["transition"], given["node"][1:])
    with pytest.raises(DataError, match=r"transition has shape \(2, 2, 1\)"):
        MarkovChain(given["initial"], given["transition"][..., :1])
