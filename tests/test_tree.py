"""Discrete trees against the sum over all values of all nodes; both libraries' arrays."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, assert_equal
from scipy.special import log_softmax, logsumexp
from toys import Backend

from ppl_lvm.errors import DataError
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import program
from ppl_lvm.structured.markov_chain import MarkovChain
from ppl_lvm.structured.tree import Tree

on_both = pytest.mark.parametrize("library", ["torch", "jax"])
EXACT = 1e-10
_QUICK = {"xla_backend_optimization_level": 0}
Arrays = dict[str, np.ndarray]
BUSHY = (-1, 0, 0, 2, 2, 1, 2)
"""Levels of unequal numbers of children, and nodes that are not in the order of their levels."""
SHAPES = {"alone": (-1,), "star": (-1, 0, 0, 0), "chain": (-1, 0, 1, 2), "bushy": BUSHY}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def arguments(N: int, V: int, batch: tuple[int, ...] = (), seed: int = 0) -> Arrays:
    """The root says for sure what it is not, and so does the last node."""
    rng = np.random.default_rng(seed)
    node = rng.normal(size=(N, *batch, V))
    node[0, ..., 0] = node[N - 1, ..., 1] = -np.inf
    return {
        "root": log_softmax(rng.normal(size=(*batch, V)), -1),
        "edge": log_softmax(rng.normal(size=(N - 1, *batch, V, V)), -1),
        "node": node,
    }


def outputs(
    library: str, parents: tuple[int, ...], given: Arrays, z: np.ndarray, uniform: np.ndarray
) -> dict[str, np.ndarray]:
    def everything(leaves: dict[str, Any], z: Any, uniform: Any) -> dict[str, Any]:
        q = Tree(parents, **leaves)
        found = q.statistics()
        return {
            **{"normalizer": q.log_normalizer(), "single": found.single, "pair": found.pair, "mode": q.mode()},
            **{"log_prob": q.log_prob(z), "draws": q.sample(uniform), "entropy": q.entropy(), "kl": q.kl(q.prior)},
        }

    if library == "torch":
        found = everything({n: torch.tensor(x) for n, x in given.items()}, torch.tensor(z), torch.tensor(uniform))
        return {n: x.numpy() for n, x in found.items()}
    step = jax.jit(everything, compiler_options=_QUICK)
    found = step({n: jnp.asarray(x) for n, x in given.items()}, jnp.asarray(z), jnp.asarray(uniform))
    return {n: np.asarray(x) for n, x in found.items()}


def log_joint(parents: tuple[int, ...], given: Arrays, every: np.ndarray) -> np.ndarray:
    """Of values `[S, N]`."""
    total = given["root"][every[:, 0]] + given["node"][np.arange(len(parents)), every].sum(1)
    for n, p in enumerate(parents[1:], 1):
        total = total + given["edge"][n - 1][every[:, p], every[:, n]]
    return total


@pytest.mark.parametrize(
    ("library", "shape"), [*(("torch", s) for s in SHAPES), ("jax", "bushy"), ("jax", "alone")]
)
def test_all_is_that_of_the_sum_over_values(library: str, shape: str) -> None:
    parents, V = SHAPES[shape], 3
    N = len(parents)
    given = arguments(N, V)
    every = np.array(list(itertools.product(range(V), repeat=N)))
    joint = log_joint(parents, given, every)
    log_z = logsumexp(joint)
    q = np.exp(joint - log_z)
    uniform = np.random.default_rng(1).uniform(size=(N, 40))
    found = outputs(library, parents, given, every.T, uniform)
    np.testing.assert_allclose(found["normalizer"], log_z, atol=EXACT)
    possible = np.isfinite(joint)
    np.testing.assert_allclose(found["log_prob"][possible], (joint - log_z)[possible], atol=EXACT)
    assert (found["log_prob"][~possible] < -1e29).all()
    assert found["single"].shape == (N, V) and found["pair"].shape == (N - 1, V, V)
    for n in range(N):
        single = [q[every[:, n] == v].sum() for v in range(V)]
        np.testing.assert_allclose(found["single"][n], single, atol=EXACT)
        if n:
            above = every[:, parents[n]]
            pair = [[q[(above == v) & (every[:, n] == w)].sum() for w in range(V)] for v in range(V)]
            np.testing.assert_allclose(found["pair"][n - 1], pair, atol=EXACT)
    np.testing.assert_array_equal(found["mode"], every[joint.argmax()])
    entropy = -(q * np.where(q > 0, joint - log_z, 0.0)).sum()
    np.testing.assert_allclose(found["entropy"], entropy, atol=EXACT)
    without = log_joint(parents, {**given, "node": np.zeros((N, V))}, every)
    np.testing.assert_allclose(found["kl"], -entropy - (q * without).sum(), atol=EXACT)
    for s in range(uniform.shape[1]):  # a draw is the inverse of the conditional distribution functions, node by node
        left = q.copy()
        for n in range(N):
            weights = np.array([left[every[:, n] == v].sum() for v in range(V)])
            z = int((np.cumsum(weights / weights.sum())[:-1] < uniform[n, s]).sum())
            assert found["draws"][n, s] == z
            left = np.where(every[:, n] == z, left, 0.0)


def test_a_tree_that_is_a_chain_is_the_chain() -> None:
    given = {n: torch.tensor(x, requires_grad=True) for n, x in arguments(6, 3).items()}
    tree, chain = Tree((-1, 0, 1, 2, 3, 4), **given), MarkovChain(given["root"], given["edge"], given["node"])
    for mine, its in zip(tree.statistics(), chain.statistics(), strict=True):
        np.testing.assert_allclose(mine.detach(), its.detach(), atol=EXACT)
    values = [q.log_normalizer() + q.entropy() for q in (tree, chain)]
    np.testing.assert_allclose(values[0].detach(), values[1].detach(), atol=EXACT)
    for mine, its in zip(*(torch.autograd.grad(v, list(given.values())) for v in values), strict=True):
        assert torch.isfinite(mine).all()
        np.testing.assert_allclose(mine, its, atol=EXACT)
    assert tree.mode().tolist() == chain.mode().tolist()


@on_both
def test_the_slope_in_node_potentials_is_the_marginal(library: str) -> None:
    given = arguments(7, 3)
    if library == "torch":
        leaves = {n: torch.tensor(x, requires_grad=True) for n, x in given.items()}
        q = Tree(BUSHY, **leaves)
        slope, of_edges = torch.autograd.grad(q.log_normalizer(), [leaves["node"], leaves["edge"]])
    else:
        run = jax.jit(jax.grad(lambda leaves: Tree(BUSHY, **leaves).log_normalizer()), compiler_options=_QUICK)
        gradient = run({n: jnp.asarray(x) for n, x in given.items()})
        slope, of_edges = gradient["node"], gradient["edge"]
    exact = outputs("torch", BUSHY, given, np.zeros((7, 1), int), np.zeros((7, 1)))
    np.testing.assert_allclose(slope, exact["single"], atol=EXACT)
    np.testing.assert_allclose(of_edges, exact["pair"], atol=EXACT)


@on_both
def test_batches_broadcast(library: str) -> None:
    """With as many rows as nodes, so that an axis in a wrong place would be taken for the right one."""
    V, N = 3, len(BUSHY)
    shared, own = arguments(N, V), arguments(N, V, (N,), seed=5)
    rng = np.random.default_rng(0)
    z, uniform = rng.integers(1, V, size=(N, 5, N)), rng.uniform(size=(N, 5, N))
    z[-1] = 2
    for names in (("node",), ("edge", "root")) if library == "torch" else (("node",),):
        mixed = {**shared, **{n: own[n] for n in names}}
        found = outputs(library, BUSHY, mixed, z, uniform)
        for b in range(0, N, 3):
            rows = {**shared, **{n: own[n][b] if n == "root" else own[n][:, b] for n in names}}
            alone = outputs("torch", BUSHY, rows, z[:, :, b], uniform[:, :, b])
            for name in ("normalizer", "entropy", "kl"):
                np.testing.assert_allclose(found[name][b], alone[name], atol=EXACT)
            np.testing.assert_allclose(found["log_prob"][:, b], alone["log_prob"], atol=EXACT)
            np.testing.assert_array_equal(found["draws"][:, :, b], alone["draws"])
            np.testing.assert_array_equal(found["mode"][:, b], alone["mode"])
            np.testing.assert_allclose(found["pair"][:, b], alone["pair"], atol=EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_latent_tree_has_its_evidence_and_gradient(backend: Backend) -> None:
    """By the sum over all values of its six inner nodes, two of which have one child."""
    x = np.random.default_rng(0).integers(0, 3, size=(4, 5))
    chosen = program("latent_tree", categories=3)
    assert chosen.guide is not None
    engine = Engine(backend, chosen.model, chosen.guide, {"x": x}, portable=True)
    every = np.array(list(itertools.product(range(2), repeat=6)))
    parents, of_leaf = (-1, 0, 0, 1, 1, 2), (3, 3, 4, 4, 5)

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        root, edge, leaf = (jax.nn.log_softmax(p[n], -1) for n in ("root", "edge", "leaf"))
        log_p = root[every[:, 0]] + sum(edge[n - 1, every[:, parents[n]], every[:, n]] for n in range(1, 6))
        seen = sum(leaf[i, every[:, None, of_leaf[i]], x[:, i]] for i in range(5))
        return -jax.nn.logsumexp(log_p[:, None] + seen, axis=0).sum()

    given = {n: jnp.asarray(np.asarray(v)) for n, v in engine.bound.initial.items()}
    value, gradient = jax.jit(jax.value_and_grad(loss), compiler_options=_QUICK)(given)
    expected = {n: np.asarray(g) for n, g in gradient.items()}
    assert_equal(engine.loss(elbo(draws=2), {"z": rloo()}), float(value), expected, EXACT)


def test_bad_arguments() -> None:
    given = {n: torch.tensor(x) for n, x in arguments(3, 2).items()}
    wrong = {(-1, 2, 0): "node 1 has parent 2", (0, 0, 1): "node 0 has parent 0", (): "there is none"}
    for parents, said in wrong.items():
        with pytest.raises(DataError, match=f"others have an earlier node; {said}"):
            Tree(parents, **given)
    with pytest.raises(DataError, match=r"edge has shape \(2, 2, 2\); .* 4 nodes, so it is \(3, '...', 2, 2\)"):
        Tree((-1, 0, 0, 0), **given)
    with pytest.raises(DataError, match="whose parents differ"):
        Tree((-1, 0, 0), **given).kl(Tree((-1, 0, 1), **given))
