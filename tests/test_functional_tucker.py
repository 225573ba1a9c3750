"""Functional Tucker decomposition: one mode against the dense process, messages against their definition, ascent."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, Loss, assert_unbiased
from toys import Backend

from ppl_lvm import fit
from ppl_lvm.datasets import load
from ppl_lvm.errors import DataError
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import program
from ppl_lvm.structured.gaussian_chain import GaussianChain
from ppl_lvm.structured.matern import matern
from ppl_lvm.structured.tucker import Belief, at, grid, messages

Tensor = torch.Tensor
COORDINATES = ((-1.0, 0.2, 0.5, 4.0), (0.0, 1.0, 1.1))
_RNG = np.random.default_rng(0)
INDEX = np.array([[0, 0], [0, 2], [0, 1], [3, 0], [3, 1], [3, 2], [1, 1], [1, 1], [1, 0]])  # nothing at 0.5 of mode 1
Y = _RNG.normal(size=len(INDEX))
W, U2, NOISE, LENGTHSCALE = _RNG.normal(size=4), _RNG.normal(size=(3, 2)), 0.3, np.array([0.8, 2.0])


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def covariance(apart: np.ndarray, lengthscale: float) -> Any:
    r = math.sqrt(3.0) * np.abs(apart) / lengthscale
    return (1.0 + r) * np.exp(-r)


def as_parameters(precision: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root and pseudo-observations; of a place without data a root whose square is no potential, as it cannot be 0."""
    none = np.where(precision.any((1, 2)), 0.0, 1e-9)
    root = np.linalg.cholesky(precision + none[:, None, None] ** 2 * np.eye(precision.shape[-1]))
    return root, np.linalg.solve(root @ np.swapaxes(root, 1, 2), shift[..., None])[..., 0]


def put(engine: Engine, values: dict[str, Any]) -> None:
    for name, value in values.items():
        transform, given = engine.bound._transforms[name], engine._array(np.asarray(value))
        inverse = transform._inverse if engine.backend == "numpyro" else transform.inv
        engine.bound.initial[name] = inverse(given)


def bound(backend: Backend, coordinates: Any, y: np.ndarray = Y, index: np.ndarray = INDEX) -> Engine:
    shipped = program("functional_tucker", coordinates=coordinates)
    assert shipped.guide is not None
    data = {"y": y, "index": index}
    return Engine(backend, shipped.model, shipped.guide, data, portable=True, example=shipped.example)


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_given_all_others_a_mode_is_exact(backend: Backend) -> None:
    """For every draw log p(y, z1) - log q(z1), the rest fixed, is the log evidence of the dense process."""
    engine = bound(backend, COORDINATES)
    b = U2[INDEX[:, 1]] @ W.reshape(2, 2).T  # W kron's first axis is that of mode 1
    precision, shift = np.zeros((4, 2, 2)), np.zeros((4, 2))
    for n, (j, _) in enumerate(INDEX):
        precision[j] += np.outer(b[n], b[n]) / NOISE**2
        shift[j] += Y[n] * b[n] / NOISE**2
    root, seen = as_parameters(precision, shift)
    put(engine, {"noise": np.array(NOISE), "lengthscale1": LENGTHSCALE, "root1": root, "seen1": seen})
    z2 = np.zeros((3, 4))
    z2[:, ::2] = U2  # the derivatives are not looked at
    fixed = {"z2": z2[None], "W": W[None]}
    values = {n: np.repeat(v, 3, 0) for n, v in fixed.items()}
    rows = engine.sites(elbo(draws=1, outer=3), {"*": pathwise()}, values=values)
    s = np.array(COORDINATES[0])[INDEX[:, 0]]
    cov = NOISE**2 * np.eye(len(Y))
    for r in range(2):
        cov += np.outer(b[:, r], b[:, r]) * covariance(s[:, None] - s, LENGTHSCALE[r])
    half = np.linalg.solve(np.linalg.cholesky(cov), Y)
    evidence = -0.5 * (half @ half + np.linalg.slogdet(2.0 * np.pi * cov)[1])
    found = rows["y"].log_p.reshape(3, -1).sum(1) + (rows["z1"].log_p - rows["z1"].log_q).reshape(3)
    np.testing.assert_allclose(found, evidence, atol=1e-10)


def test_messages_are_their_definition() -> None:
    """By enumeration: every belief is of a variable with two values, and b_n a Kronecker product of points."""
    rng, sizes, ranks, weight = np.random.default_rng(1), (4, 3, 2), (2, 3, 2), 1.7
    index = np.stack([rng.integers(0, size, 6) for size in sizes], axis=1)
    y = rng.normal(size=6)
    atoms = [rng.normal(size=(2, T, R)) for T, R in zip(sizes, ranks, strict=True)]
    cores = rng.normal(size=(2, math.prod(ranks)))
    modes, core = [belief(a) for a in atoms], belief(cores)
    for mode in (0, 1, 2, None):
        T, R = (sizes[mode], ranks[mode]) if mode is not None else (1, math.prod(ranks))
        precision, shift = np.zeros((T, R, R)), np.zeros((T, R))
        for n, places in enumerate(index):
            for which in itertools.product(range(2), repeat=4):
                points = [a[c, j] for a, c, j in zip(atoms, which, places, strict=False)]
                if mode is None:
                    b, j = np.kron(np.kron(points[0], points[1]), points[2]), 0
                else:
                    units = [[*points[:mode], unit, *points[mode + 1 :]] for unit in np.eye(R)]
                    b = np.array([np.kron(np.kron(u[0], u[1]), u[2]) @ cores[which[3]] for u in units])
                    j = places[mode]
                precision[j] += weight * np.outer(b, b) / 16
                shift[j] += weight * y[n] * b / 16
        J, h = messages(torch.tensor(y), torch.tensor(index), modes, core, torch.tensor(weight), mode)
        np.testing.assert_allclose(J, precision if mode is not None else precision[0], atol=1e-12)
        np.testing.assert_allclose(h, shift if mode is not None else shift[0], atol=1e-12)


def belief(atoms: np.ndarray) -> Belief:
    return Belief(torch.tensor(atoms.mean(0)), torch.tensor((atoms[..., :, None] * atoms[..., None, :]).mean(0)))


class Ascent(NamedTuple):
    bounds: list[float]
    """After every update of a mode, of the core, or of the noise."""
    beliefs: list[Belief]
    """Of the modes, and last of the core."""
    potentials: list[tuple[Tensor, Tensor]]
    weight: Tensor

    def mean(self, index: np.ndarray) -> np.ndarray:
        return product([b.mean for b in self.beliefs[:-1]], self.beliefs[-1].mean, index)


def product(modes: list[Tensor], core: Tensor, index: np.ndarray) -> np.ndarray:
    c = torch.ones((len(index), 1), dtype=torch.float64)
    for u, places in zip(modes, torch.tensor(index).T, strict=True):
        c = (c[:, :, None] * u[places][:, None, :]).reshape(len(index), -1)
    return (c @ core).numpy()


def ascent(coordinates: Any, index: np.ndarray, y: np.ndarray, sweeps: int, rank: int = 2) -> Ascent:
    places, data, rng = torch.tensor(index), torch.tensor(y), np.random.default_rng(0)
    K, P, weight = len(coordinates), rank ** len(coordinates), torch.tensor(4.0, dtype=torch.float64)
    one = torch.ones(rank, dtype=torch.float64)
    processes = [matern(torch.tensor(c, dtype=torch.float64), 0.3 * (c[-1] - c[0]) * one, one) for c in coordinates]
    shapes = [*((len(c), rank) for c in coordinates), (P,)]
    point = [torch.tensor(rng.normal(size=shape)) for shape in shapes]
    beliefs = [Belief(p, p[..., :, None] * p[..., None, :]) for p in point]
    potentials, kl, bounds = [(one, one)] * (K + 1), [float("inf")] * (K + 1), []
    for _ in range(sweeps):
        for k in range(K + 1):
            J, h = potentials[k] = messages(data, places, beliefs[:K], beliefs[K], weight, k if k < K else None)
            if k == K:
                cov = torch.linalg.inv(J + torch.eye(P, dtype=torch.float64))
                mean = cov @ h
                kl[k] = float(0.5 * (cov.trace() + mean @ mean - P - torch.logdet(cov)))
            else:
                chain, read = processes[k]
                q = GaussianChain(**chain, precision=read.mT @ J @ read, shift=h @ read)
                moments = q.moments()
                mean, cov, kl[k] = moments.mean @ read.mT, read @ moments.cov @ read.mT, float(q.kl(q.prior))
            beliefs[k] = Belief(mean, cov + mean[..., :, None] * mean[..., None, :])
            bounds.append(float(expected(data, places, beliefs, weight)) - sum(kl))
        square = -2.0 * expected(data, places, beliefs, 0.0 * weight + 1.0) - len(data) * math.log(2.0 * math.pi)
        weight = len(data) / square
        bounds.append(float(expected(data, places, beliefs, weight)) - sum(kl))
    return Ascent(bounds, beliefs, potentials, weight)


def expected(y: Tensor, index: Tensor, beliefs: list[Belief], weight: Tensor) -> Tensor:
    """`E log p(y | u, W)`."""
    J, h = messages(y, index, beliefs[:-1], beliefs[-1], weight, None)
    quadratic = (h * beliefs[-1].mean).sum() - 0.5 * (J * beliefs[-1].second).sum()
    return quadratic - 0.5 * weight * (y * y).sum() + 0.5 * len(y) * torch.log(weight / (2.0 * math.pi))


def tensor() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates and entries, which of them are to be fitted, and those without noise."""
    data = load("functional_tensor")
    assert data.train_factors is not None and data.test_factors is not None
    both = (np.concatenate([data.train_factors[n], data.test_factors[n]]) for n in ("at", "clean"))
    at_all, clean = both
    known = np.arange(len(clean)) < len(data.train)
    return at_all, np.concatenate([data.train, data.test]), known, clean


def test_updates_of_coordinates_never_lower_the_bound_and_find_the_tensor() -> None:
    at_all, y, known, clean = tensor()
    found = grid(at_all)
    best = ascent(found.coordinates, found.index[known], y[known], sweeps=20)
    gains = np.diff([b for b in best.bounds if np.isfinite(b)])
    assert gains.min() > -1e-7
    assert gains.max() > 100.0
    held_out = np.sqrt(np.mean((best.mean(found.index) - clean)[~known] ** 2))
    assert held_out < 0.05, held_out  # half the noise's; the entries have standard deviation 1


@pytest.mark.slow
def test_where_updates_end_the_program_has_their_bound_and_no_gradient() -> None:
    """Of the guide and the noise, in the mean over draws: the messages are the best potentials."""
    index = np.tile(INDEX, (3, 1))
    u1 = np.random.default_rng(2).normal(size=(4, 2))
    b = U2[index[:, 1]] @ W.reshape(2, 2).T
    y = (b * u1[index[:, 0]]).sum(1) + 0.2 * np.random.default_rng(3).normal(size=len(index))
    best = ascent(COORDINATES, index, y, sweeps=300)
    assert best.bounds[-1] - best.bounds[-5] < 2e-3  # nats in the last sweep, far below the error of a mean over draws
    engine = bound("numpyro", COORDINATES, y, index)
    core = torch.linalg.inv(best.potentials[2][0] + torch.eye(4, dtype=torch.float64))
    given = {"noise": best.weight**-0.5, "core_loc": best.beliefs[2].mean, "core_root": torch.linalg.cholesky(core)}
    for k, (J, h) in enumerate(best.potentials[:2], 1):
        given |= dict(zip((f"root{k}", f"seen{k}"), as_parameters(J.numpy(), h.numpy()), strict=True))
    put(engine, given)
    found = engine.loss(elbo(draws=1, outer=20), {"*": pathwise()}, runs=200)
    still = {n: g for n, g in found.gradient.items() if "lengthscale" not in n}
    assert_unbiased(Loss(found.value, still), -best.bounds[-1], {n: np.zeros(g.shape[1:]) for n, g in still.items()})


@pytest.mark.slow
def test_a_fit_in_batches_finds_the_tensor() -> None:
    at_all, y, known, clean = tensor()
    found = grid(at_all)
    run = fit(
        program("functional_tucker", coordinates=found.coordinates),
        data={"y": y[known], "index": found.index[known]},
        backend="numpyro",
        steps=2000,
        batch_size=300,
        learning_rate=0.02,
        seed=0,
    )
    p, modes = {n: torch.tensor(np.asarray(v), dtype=torch.float64) for n, v in run.params.items()}, []
    for k, s in enumerate(found.coordinates, 1):
        scale = p[f"lengthscale{k}"]
        chain, read = matern(torch.tensor(s, dtype=torch.float64), scale, torch.ones_like(scale))
        J = p[f"root{k}"] @ p[f"root{k}"].mT
        h = (J @ p[f"seen{k}"][..., None])[..., 0]
        q = GaussianChain(**chain, precision=read.mT @ J @ read, shift=h @ read)
        modes.append(q.moments().mean @ read.mT)
    error = (product(modes, p["core_loc"], found.index) - clean)[~known]
    assert np.sqrt(np.mean(error**2)) < 0.1 * np.std(clean[~known])  # of predicting the mean


def test_a_grid_merges_and_sorts() -> None:
    values = np.array([[3.0, 1.0], [-1.0, 1.0], [3.0, -2.0], [0.0, 1.0]])
    found = grid(values)
    assert found.coordinates == ((-1.0, 0.0, 3.0), (-2.0, 1.0))
    back = np.stack([np.array(c)[i] for c, i in zip(found.coordinates, found.index.T, strict=True)], axis=1)
    np.testing.assert_array_equal(back, values)


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="The coordinate of row 1 in mode 0 is nan"):
        grid([[0.0, 1.0], [np.nan, 1.0]])
    with pytest.raises(DataError, match=r"have shape \(2,\); they are \[rows, modes\]"):
        grid([0.0, 1.0])
    with pytest.raises(DataError, match="must be numbers"):
        grid([["a", "b"]])
    factor = torch.ones((3, 2))
    with pytest.raises(DataError, match=r"has dtype torch\.float32; it must be integers from 0 to 2"):
        at(factor, torch.tensor([0.0]))
    for wrong in (-1, 3):
        with pytest.raises(DataError, match=f"index of row 1 of a batch is {wrong}, but its mode has 3 coordinates"):
            at(factor, torch.tensor([0, wrong]))
    traced = jax.jit(at)(np.ones((3, 2)), np.array([0, 3, -1]))
    np.testing.assert_array_equal(np.isnan(traced).all(1), [False, True, True])


@pytest.mark.parametrize("backend", BACKENDS)
def test_coordinates_that_do_not_increase_are_refused(backend: Backend) -> None:
    with pytest.raises(DataError, match="at step 1 they go from 2 to 1"):
        bound(backend, ((0.0, 2.0, 1.0, 3.0), (0.0, 1.0, 2.0)))
