"""Matérn processes as chains against dense Gaussian processes, small steps against quadrature."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, assert_equal
from toys import Backend

from ppl_lvm.errors import DataError
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import program
from ppl_lvm.structured.gaussian_chain import GaussianChain, observed
from ppl_lvm.structured.matern import matern

ORDERS = (0.5, 1.5, 2.5)
TIMES = np.array([-3.0, -2.0, -1.999, -1.2, 0.0, 0.4, 0.41, 5.0, 60.0])
LENGTHSCALE, SCALE = np.array([0.7, 2.5]), np.array([1.3, 0.4])
_RNG = np.random.default_rng(0)
C, OFFSET, VARIANCE = _RNG.normal(size=(3, 2)), _RNG.normal(size=3), np.array([0.1, 0.3, 0.2])
Y = _RNG.normal(size=(len(TIMES), 3))
KNOWN = _RNG.uniform(size=Y.shape) < 0.7
KNOWN[3] = False


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def kernel(r: Any, order: float) -> Any:
    root = math.sqrt(2.0 * order) * r
    polynomial = {0.5: 1.0, 1.5: 1.0 + root, 2.5: 1.0 + root + root**2 / 3.0}[order]
    return polynomial * (-root).exp()


def dense(lengthscale: Any, scale: Any, order: float) -> tuple[Any, Any, Any]:
    """Evidence, and mean and covariance of both processes at all times, from the Gram matrix."""
    times, T = torch.tensor(TIMES), len(TIMES)
    apart = (times[:, None] - times).abs()
    grams = [s**2 * kernel(apart / ls, order) for ls, s in zip(lengthscale, scale, strict=True)]
    prior, read = torch.block_diag(*grams), torch.kron(torch.tensor(C), torch.eye(T, dtype=torch.float64))
    seen = torch.tensor(KNOWN.T.ravel())
    read, noise = read[seen], torch.tensor(np.repeat(VARIANCE, T)[KNOWN.T.ravel()]).diag()
    error = torch.tensor((Y - OFFSET).T.ravel())[seen]
    cov = read @ prior @ read.T + noise
    found = torch.distributions.MultivariateNormal(torch.zeros(len(error), dtype=torch.float64), cov).log_prob(error)
    gain = torch.linalg.solve(cov, read @ prior).T
    return found, gain @ error, prior - gain @ read @ prior


def chained(lengthscale: Any, scale: Any, order: float, as_array: Any) -> tuple[Any, GaussianChain, Any]:
    process = matern(as_array(TIMES), lengthscale, scale, order)
    hidden = np.where(KNOWN, Y, np.nan)
    J, h, c = observed(
        as_array(hidden), as_array(C) @ process.read, as_array(OFFSET), as_array(VARIANCE), known=as_array(KNOWN)
    )
    q = GaussianChain(**process.chain, precision=J, shift=h, validate=False)
    return q.log_normalizer() + c.sum(), q, process.read


@pytest.mark.parametrize("order", ORDERS)
def test_a_chain_is_the_dense_process(order: float) -> None:
    ours, theirs = ([torch.tensor(x, requires_grad=True) for x in (LENGTHSCALE, SCALE)] for _ in range(2))
    found, q, read = chained(ours[0], ours[1], order, torch.tensor)
    expected, mean, cov = dense(theirs[0], theirs[1], order)
    np.testing.assert_allclose(found.detach(), expected.detach(), atol=1e-10)
    moments, T = q.moments(), len(TIMES)
    np.testing.assert_allclose((moments.mean @ read.T).T.ravel().detach(), mean.detach(), atol=1e-10)
    f_cov, cross = (read @ x @ read.T for x in (moments.cov, moments.cross))
    for t in range(T):
        np.testing.assert_allclose(f_cov[t].detach(), cov[t::T, t::T].detach(), atol=1e-10)
        if t:
            np.testing.assert_allclose(cross[t - 1].detach(), cov[t::T, t - 1 :: T].detach(), atol=1e-10)
    gradients = (torch.autograd.grad(value, leaves) for value, leaves in ((found, ours), (expected, theirs)))
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8, rtol=1e-9)


@pytest.mark.parametrize("order", [0.5, *(pytest.param(o, marks=pytest.mark.slow) for o in ORDERS[1:])])
def test_both_libraries_agree(order: float) -> None:
    def evidence(lengthscale: Any, scale: Any) -> Any:
        return chained(lengthscale, scale, order, jnp.asarray)[0]

    quick = {"xla_backend_optimization_level": 0}
    value, gradient = jax.jit(jax.value_and_grad(evidence, (0, 1)), compiler_options=quick)(LENGTHSCALE, SCALE)
    leaves = [torch.tensor(x, requires_grad=True) for x in (LENGTHSCALE, SCALE)]
    expected = chained(leaves[0], leaves[1], order, torch.tensor)[0]
    np.testing.assert_allclose(value, expected.detach(), atol=1e-10)
    for one, other in zip(gradient, torch.autograd.grad(expected, leaves), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8, rtol=1e-9)


def last_column(drift: np.ndarray, u: float) -> np.ndarray:
    """`exp(drift u)` times the last unit vector, by its series in small steps, so that small entries are right too."""
    halvings = max(0, math.ceil(math.log2(u)))
    start = term = np.eye(len(drift))
    for k in range(1, 40):
        term = term @ drift * (u / 2**halvings) / k
        start = start + term
    return np.linalg.matrix_power(start, 2**halvings)[:, -1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ORDERS)
def test_the_noise_of_small_and_large_steps_by_quadrature(order: float, dtype: torch.dtype) -> None:
    steps = np.array([1e-5, 1e-3, 0.03, 0.3, 0.8, 0.99, 1.0, 1.01, 3.0, 40.0])
    rate = math.sqrt(2.0 * order)
    times = torch.tensor(np.concatenate([[0.0], np.cumsum(steps)]))
    chain = matern(times.to(dtype), torch.ones(1, dtype=dtype), torch.full((1,), 1.5, dtype=dtype), order).chain
    apart = np.diff(times.to(dtype).numpy().astype(float))  # what rounding of times leaves of a step
    nodes, weights = np.polynomial.legendre.leggauss(80)
    drift = np.array({0.5: [[-1.0]], 1.5: [[0, 1], [-1, -2.0]], 2.5: [[0, 1, 0], [0, 0, 1], [-1, -3, -3.0]]}[order])
    density = 2.25 * {0.5: 2.0, 1.5: 4.0, 2.5: 16.0 / 3.0}[order]
    for t, step in enumerate(apart[:-1]):
        upper = rate * step
        columns = np.stack([last_column(drift, x) for x in upper * (nodes + 1) / 2])
        exact = density * upper / 2 * np.einsum("n,ni,nj->ij", weights, columns, columns)
        size = np.sqrt(np.diag(exact))
        far = np.abs(chain["noise"][t].numpy() - exact) / size[:, None] / size
        assert far.max() < (3e-6 if dtype == torch.float32 else 1e-13), step
        torch.linalg.cholesky(chain["noise"][t])
    F, P = chain["transition"][5:].double(), chain["cov"].double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-14
    np.testing.assert_allclose(F @ P @ F.mT + chain["noise"][5:].double(), P.expand(len(F), -1, -1), atol=tolerance)


@pytest.mark.parametrize("order", ORDERS)
def test_a_long_process_in_float32(order: float) -> None:
    rng = np.random.default_rng(4)
    times = np.cumsum(rng.exponential(size=2000) * 0.05 + 1e-3)
    y = np.sin(times)[:, None] + 0.1 * rng.normal(size=(2000, 1))
    found = []
    for dtype in (torch.float64, torch.float32):
        t = torch.tensor(times, dtype=torch.float32).to(dtype)
        process = matern(t, torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype), order)
        variance = torch.full((1,), 0.01, dtype=dtype)
        J, h, c = observed(torch.tensor(y).to(dtype), process.read, 0.0 * variance, variance)
        q = GaussianChain(**process.chain, precision=J, shift=h)
        moments = q.moments()
        draw = q.sample(torch.zeros(2000, process.read.shape[1], dtype=dtype))
        paths = [(x @ process.read.T)[:, 0].double() for x in (moments.mean, draw)]
        found.append([*paths, q.log_normalizer() + c.sum()])
    assert (found[1][0] - found[0][0]).abs().max() < 1e-3
    assert (found[1][1] - found[0][1]).abs().max() < 1e-3
    assert abs(found[1][2] / found[0][2] - 1) < 1e-4


def test_bad_arguments() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"order=2 was asked for; there are 0\.5, 1\.5 and 2\.5"):
        matern(torch.tensor([0.0, 1.0]), one, one, 2)
    with pytest.raises(DataError, match=r"at step 1 they go from 2 to 2\. Sort them, and merge equal ones"):
        matern(torch.tensor([0.0, 2.0, 2.0]), one, one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_elbo_of_factor_analysis_is_the_evidence_of_the_dense_process(backend: Backend) -> None:
    """With its gradient; rows have times of their own and miss coordinates, one of them all at a time."""
    shipped, rng = program("gp_factor_analysis"), np.random.default_rng(6)
    assert shipped.guide is not None
    x, t = rng.normal(size=(2, 4, 3)), np.cumsum(rng.exponential(size=(2, 4)), axis=1)
    known = rng.uniform(size=x.shape) < 0.7
    known[1, 2] = False
    data = {"x": np.where(known, x, 0.0), "t": t, "x_mask": known.astype(float)}
    engine = Engine(backend, shipped.model, shipped.guide, data, portable=True)
    p = {n: torch.tensor(np.asarray(v), requires_grad=True) for n, v in engine.bound.initial.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        apart = torch.tensor(np.abs(t[row][:, None] - t[row]))
        cov = torch.kron(p["r"].exp().diag(), torch.eye(4, dtype=torch.float64))
        for c, lengthscale in zip(p["C"].T, p["lengthscale"].exp(), strict=True):
            cov = cov + torch.kron(torch.outer(c, c), kernel(apart / lengthscale, 1.5))
        seen = torch.tensor(known[row].T.ravel())
        error = (torch.tensor(x[row]) - p["d"]).T.ravel()[seen]
        normal = torch.distributions.MultivariateNormal(torch.zeros_like(error), cov[seen][:, seen])
        loss = loss - normal.log_prob(error)
    gradient = dict(zip(p, (g.numpy() for g in torch.autograd.grad(loss, list(p.values()))), strict=True))
    assert_equal(engine.loss(elbo(draws=2), {"z": pathwise()}), float(loss.detach()), gradient, 1e-10)
