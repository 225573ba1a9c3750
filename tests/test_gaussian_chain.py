"""Chains of Gaussians against the joint density of all steps, sequential against parallel, both libraries' arrays."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from ppl_lvm.errors import DataError
from ppl_lvm.structured import gaussian_chain
from ppl_lvm.structured.gaussian_chain import GaussianChain, observed
from ppl_lvm.structured.scan import Method

on_both = pytest.mark.parametrize("library", ["torch", "jax"])
METHODS: tuple[Method, ...] = ("sequential", "parallel")
EXACT = 1e-10
_QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("mean", "cov", "transition", "bias", "noise", "precision", "shift")
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def spd(rng: np.random.Generator, *batch: int, dim: int) -> np.ndarray:
    a = rng.normal(size=(*batch, dim, dim))
    return a @ np.swapaxes(a, -1, -2) / dim + 0.3 * np.eye(dim)


def arguments(T: int, D: int, batch: tuple[int, ...] = (), seed: int = 0) -> Arrays:
    """Dynamics that change from step to step; potentials of any rank, among them none, and one that is zero."""
    rng = np.random.default_rng(seed)
    precision = np.zeros((T, *batch, D, D))
    for t in range(T):
        root = rng.normal(size=(*batch, D, t % (D + 1)))
        precision[t] = root @ np.swapaxes(root, -1, -2)
    return {
        "mean": rng.normal(size=(*batch, D)),
        "cov": spd(rng, *batch, dim=D),
        "transition": 0.7 * rng.normal(size=(T - 1, *batch, D, D)),
        "bias": rng.normal(size=(T - 1, *batch, D)),
        "noise": spd(rng, T - 1, *batch, dim=D),
        "precision": precision,
        "shift": (precision @ rng.normal(size=(T, *batch, D, 1)))[..., 0],
    }


def array(library: str, x: np.ndarray) -> Any:
    return torch.tensor(x) if library == "torch" else jnp.asarray(x)


def chain(library: str, given: Arrays, method: Method = "auto") -> GaussianChain:
    return GaussianChain(**{n: array(library, x) for n, x in given.items()}, method=method)


def outputs(library: str, given: Arrays, method: Method, z: np.ndarray, noise: np.ndarray) -> dict[str, Any]:
    """All that a chain computes, as numpy's arrays; compiled in one piece where that is quicker."""

    def everything(leaves: dict[str, Any], z: Any, noise: Any) -> dict[str, Any]:
        q = GaussianChain(**leaves, method=method, validate=False)
        draws = q.sample(noise)
        return {
            "filtered": q.filter(),
            "moments": q.moments(),
            "normalizer": q.log_normalizer(),
            "log_prob": q.log_prob(z),
            "entropy": q.entropy(),
            "kl": q.kl(q.prior),
            "prior": q.prior.moments().mean,
            "draws": draws,
            "density": q.log_prob(draws),
            "noise": q.noise_of(draws),
        }

    if library == "torch":
        found = everything({n: torch.tensor(x) for n, x in given.items()}, torch.tensor(z), torch.tensor(noise))
        return {n: type(x)(*(a.numpy() for a in x)) if isinstance(x, tuple) else x.numpy() for n, x in found.items()}
    step = jax.jit(everything, compiler_options=_QUICK)
    return jax.tree.map(np.asarray, step({n: jnp.asarray(x) for n, x in given.items()}, z, noise))


def joint(given: Arrays) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance of all T D numbers under q, and log Z, by dense matrices."""
    T, D = given["shift"].shape
    P, h = np.zeros((T * D, T * D)), np.zeros(T * D)
    log_z = -0.5 * (T * D * np.log(2 * np.pi) + np.linalg.slogdet(given["cov"])[1])
    inverse = np.linalg.inv(given["cov"])
    P[:D, :D] += inverse
    h[:D] += inverse @ given["mean"]
    log_z -= 0.5 * given["mean"] @ inverse @ given["mean"]
    for t in range(T - 1):
        F, b, Q = given["transition"][t], given["bias"][t], given["noise"][t]
        K = np.linalg.inv(Q)
        rows = np.zeros((D, T * D))
        rows[:, (t + 1) * D : (t + 2) * D], rows[:, t * D : (t + 1) * D] = np.eye(D), -F
        P += rows.T @ K @ rows
        h += rows.T @ K @ b
        log_z -= 0.5 * (b @ K @ b + np.linalg.slogdet(Q)[1])
    for t in range(T):
        at = slice(t * D, (t + 1) * D)
        P[at, at] += given["precision"][t]
        h[at] += given["shift"][t]
    cov = np.linalg.inv(P)
    log_z += 0.5 * (h @ cov @ h - np.linalg.slogdet(P)[1] + T * D * np.log(2 * np.pi))
    return cov @ h, cov, float(log_z)


@on_both
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("T", "D"), [(1, 2), (2, 1), (6, 3)])
def test_all_is_that_of_the_joint_density(library: str, method: Method, T: int, D: int) -> None:
    given = arguments(T, D)
    z = np.random.default_rng(1).normal(size=(T, D))
    noise = np.concatenate([np.zeros((1, T * D)), np.eye(T * D)]).reshape(-1, T, D)
    found = outputs(library, given, method, z, np.moveaxis(noise, 0, 1))
    mean, cov, log_z = joint(given)
    moments = found["moments"]
    np.testing.assert_allclose(moments.mean, mean.reshape(T, D), atol=EXACT)
    for t in range(T):
        np.testing.assert_allclose(moments.cov[t], cov[t * D : (t + 1) * D, t * D : (t + 1) * D], atol=EXACT)
    for t in range(T - 1):
        np.testing.assert_allclose(moments.cross[t], cov[(t + 1) * D : (t + 2) * D, t * D : (t + 1) * D], atol=EXACT)
    np.testing.assert_allclose(found["normalizer"], log_z, atol=EXACT)
    exact = multivariate_normal(mean, cov)
    np.testing.assert_allclose(found["log_prob"], exact.logpdf(z.ravel()), atol=1e-9)
    np.testing.assert_allclose(found["entropy"], exact.entropy(), atol=EXACT)
    prior_mean, prior_cov, _ = joint({**given, "precision": 0 * given["precision"], "shift": 0 * given["shift"]})
    K, r = np.linalg.inv(prior_cov), prior_mean - mean
    log_dets = np.linalg.slogdet(prior_cov)[1] - np.linalg.slogdet(cov)[1]
    np.testing.assert_allclose(found["kl"], 0.5 * (np.trace(K @ cov) + r @ K @ r - T * D + log_dets), atol=1e-9)
    np.testing.assert_allclose(found["prior"], prior_mean.reshape(T, D), atol=EXACT)
    for t in range(1, T + 1):
        cut = {n: x[: t - 1] if n in ("transition", "bias", "noise") else x for n, x in given.items()}
        mean_t, cov_t, _ = joint(cut | {n: given[n][:t] for n in ("precision", "shift")})
        np.testing.assert_allclose(found["filtered"].mean[t - 1], mean_t[-D:], atol=EXACT)
        np.testing.assert_allclose(found["filtered"].cov[t - 1], cov_t[-D:, -D:], atol=EXACT)
    draws = np.moveaxis(found["draws"], 1, 0).reshape(-1, T * D)
    np.testing.assert_allclose(draws[0], mean, atol=EXACT)
    root = draws[1:] - draws[0]  # a draw is an affine map of noise
    np.testing.assert_allclose(root.T @ root, cov, atol=EXACT)
    np.testing.assert_allclose(found["density"], exact.logpdf(draws), atol=1e-9)
    np.testing.assert_allclose(np.moveaxis(found["noise"], 1, 0), noise, atol=1e-9)


@on_both
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_chain_without_potentials_is_drawn_as_it_is_written(library: str, method: Method, shared: bool) -> None:
    """Also where transitions expand over so many steps that all digits of a conditional backwards would be lost."""
    T, D, rows = 60, 2, 3
    given = {n: a for n, a in arguments(T, D, (rows,)).items() if n not in ("precision", "shift")}
    given["transition"] = 3.0 * given["transition"]
    if shared:
        given |= {n: given[n][:1, 0] for n in ("transition", "noise")}
    rng = np.random.default_rng(7)
    noise = rng.normal(size=(T, 2, rows, D))
    F, Q = (np.broadcast_to(given[n], (T - 1, rows, D, D)) for n in ("transition", "noise"))
    z, mean, cov, cross = [given["mean"] + (np.linalg.cholesky(given["cov"]) @ noise[0][..., None])[..., 0]], [], [], []
    mean.append(given["mean"])
    cov.append(given["cov"])
    for t in range(T - 1):
        b = given["bias"][t]
        z.append(((F[t] @ z[-1][..., None]) + np.linalg.cholesky(Q[t]) @ noise[t + 1][..., None])[..., 0] + b)
        mean.append((F[t] @ mean[-1][..., None])[..., 0] + b)
        cross.append(F[t] @ cov[-1])
        cov.append(F[t] @ cov[-1] @ np.swapaxes(F[t], -1, -2) + Q[t])
    assert np.abs(z[-1]).min() > 1e8

    def everything(leaves: dict[str, Any], noise: Any) -> Any:
        p = GaussianChain(**leaves, method=method, validate=False)
        draws = p.sample(noise)
        return draws, p.noise_of(draws)[:10], p.log_prob(draws), p.moments()

    if library == "torch":
        found = everything({n: torch.tensor(a) for n, a in given.items()}, torch.tensor(noise))
    else:
        step = jax.jit(everything, compiler_options=_QUICK)
        found = step({n: jnp.asarray(a) for n, a in given.items()}, noise)
    draws, back, log_prob, moments = found
    np.testing.assert_allclose(back, noise[:10], rtol=0, atol=1e-8)
    assert np.isfinite(np.asarray(log_prob)).all()
    for actual, expected in zip((draws, *moments), (z, mean, cov, cross), strict=True):
        for here, wanted in zip(np.asarray(actual), expected, strict=True):
            np.testing.assert_allclose(here, wanted, rtol=0, atol=EXACT * np.abs(wanted).max())


@on_both
def test_batches_broadcast(library: str) -> None:
    T, D = 4, 2
    shared, own = arguments(T, D), arguments(T, D, (3,), seed=5)
    mixed = {**shared, "precision": own["precision"], "shift": own["shift"], "mean": own["mean"]}
    assert chain(library, mixed).batch_shape == (3,)
    noise = np.random.default_rng(0).normal(size=(T, 7, 3, D))
    found = outputs(library, mixed, "auto", noise, noise)
    assert found["draws"].shape == (T, 7, 3, D)
    for b in range(3):
        rows = {n: x[:, b] if n in ("precision", "shift") else x for n, x in mixed.items()} | {"mean": mixed["mean"][b]}
        alone = outputs("torch", rows, "sequential", noise[:, :, b], noise[:, :, b])
        for name in ("draws", "density", "log_prob"):
            axis = 2 if name == "draws" else 1
            np.testing.assert_allclose(np.take(found[name], b, axis), alone[name], atol=1e-9)
        np.testing.assert_allclose(found["moments"].cov[:, b], alone["moments"].cov, atol=EXACT)
        np.testing.assert_allclose(found["moments"].cross[:, b], alone["moments"].cross, atol=EXACT)
        for name in ("normalizer", "entropy", "kl"):
            np.testing.assert_allclose(found[name][b], alone[name], atol=1e-9)


def test_kl_to_chains_that_differ_from_row_to_row() -> None:
    """With as many rows as steps, so that an axis in a wrong place would be taken for the right one."""
    one, many = arguments(3, 2), arguments(3, 2, (3,), seed=5)
    q, p = chain("torch", one), chain("torch", many)
    for b in range(3):
        row = chain("torch", {n: x[b] if n in ("mean", "cov") else x[:, b] for n, x in many.items()})
        np.testing.assert_allclose(q.kl(p)[b], q.kl(row), atol=EXACT)
        np.testing.assert_allclose(p.kl(q)[b], row.kl(q), atol=EXACT)


@pytest.mark.parametrize(
    ("library", "method"),
    [
        ("torch", "parallel"),
        ("torch", "sequential"),
        *(pytest.param("jax", method, marks=pytest.mark.slow) for method in METHODS),
    ],
)
@pytest.mark.parametrize("T", [1, 2, 6])
def test_what_all_steps_share_is_given_once(library: str, method: Method, T: int) -> None:
    """Also matrices for fewer batches than vectors."""
    rng, one = np.random.default_rng(2), arguments(max(T, 2), 2, seed=3)
    once = {n: one[n][:1, None] for n in ("transition", "noise")} | {"precision": spd(rng, 1, 1, dim=2)}
    own = {n: rng.normal(size=(T - (n == "bias"), 3, 2)) for n in ("bias", "shift")}
    given = {"mean": one["mean"], "cov": one["cov"], **once, **own}
    wide = {n: np.tile(x, (T - (n != "precision"), 3, 1, 1)) for n, x in once.items()}
    noise = rng.normal(size=(T, 5, 3, 2))
    found, expected = (outputs(library, x, method, noise, noise) for x in (given, {**given, **wide}))
    assert found["moments"].cov.shape == (T, 3, 2, 2) == found["filtered"].cov.shape
    for name, parts in expected.items():
        pairs = zip(found[name], parts, strict=True) if isinstance(parts, tuple) else [(found[name], parts)]
        for a, b in pairs:
            np.testing.assert_allclose(a, b, atol=EXACT, err_msg=name)


def of_everything(leaves: dict[str, Any], noise: Any, method: Method) -> Any:
    """A number that all of a chain's outputs have a part in."""
    q = GaussianChain(**leaves, method=method, validate=False)
    moments, z = q.moments(), q.sample(noise)
    xp: Any = torch if isinstance(noise, torch.Tensor) else jnp
    return xp.sum(q.log_normalizer()) + xp.sum(xp.sin(moments.mean)) + xp.sum(moments.cov**2) + xp.sum(xp.cos(z))


def differentiated(library: str, given: Arrays, noise: np.ndarray, method: Method) -> tuple[float, Arrays]:
    if library == "torch":
        leaves = {n: torch.tensor(x, requires_grad=True) for n, x in given.items()}
        value = of_everything(leaves, torch.tensor(noise), method)
        value.backward()
        return float(value.detach()), {n: np.asarray(x.grad) for n, x in leaves.items()}
    step = jax.jit(jax.value_and_grad(partial(of_everything, method=method)), compiler_options=_QUICK)
    value, gradient = step({n: jnp.asarray(x) for n, x in given.items()}, jnp.asarray(noise))
    return float(value), {n: np.asarray(g) for n, g in gradient.items()}


@pytest.mark.parametrize("T", [2, 3, *(pytest.param(T, marks=pytest.mark.slow) for T in (17, 257))])
def test_parallel_is_sequential_with_values_and_gradients(T: int) -> None:
    given = arguments(T, 3, seed=T)
    given["transition"] *= 0.5
    noise = np.random.default_rng(0).normal(size=(T, 3))
    found = [differentiated(library, given, noise, m) for library in ("torch", "jax") for m in METHODS]
    for value, gradient in found[1:]:
        np.testing.assert_allclose(value, found[0][0], rtol=1e-9)
        for n in NAMES:
            one, other = gradient[n], found[0][1][n]
            if n in ("cov", "noise", "precision"):  # symmetric: what a gradient says of the other part is nothing
                one, other = (g + np.swapaxes(g, -1, -2) for g in (one, other))
            np.testing.assert_allclose(one, other, atol=1e-8, rtol=1e-8, err_msg=n)


@pytest.mark.parametrize("shared", [False, True])
def test_conditionals_of_wide_chains_are_found_in_the_scan(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    given = arguments(5, 3, () if shared else (2,), seed=3)
    if shared:
        given |= {n: given[n][:1] for n in ("transition", "noise")} | {"precision": given["precision"][-1:]}
    noise = np.random.default_rng(0).normal(size=(5, *given["mean"].shape))
    value, gradient = differentiated("torch", given, noise, "parallel")
    monkeypatch.setattr(gaussian_chain, "WIDE", 3)
    again, other = differentiated("jax", given, noise, "sequential")
    np.testing.assert_allclose(again, value, rtol=1e-10)
    for n in NAMES:
        one, two = gradient[n], other[n]
        if n in ("cov", "noise", "precision"):
            one, two = (g + np.swapaxes(g, -1, -2) for g in (one, two))
        np.testing.assert_allclose(one, two, atol=EXACT, rtol=1e-9, err_msg=n)


@pytest.mark.parametrize(
    ("library", "method"),
    [
        ("torch", "parallel"),
        ("jax", "sequential"),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (("torch", "sequential"), ("jax", "parallel"))),
    ],
)
def test_a_long_chain_in_float32(library: str, method: Method) -> None:
    T, D = 10_000, 3
    rng = np.random.default_rng(0)
    given = {
        "mean": np.zeros(D),
        "cov": np.eye(D),
        "transition": np.tile(0.999 * np.linalg.qr(rng.normal(size=(D, D)))[0], (T - 1, 1, 1)),
        "bias": np.zeros((T - 1, D)),
        "noise": np.tile(0.05 * np.eye(D), (T - 1, 1, 1)),
    }
    C, y = rng.normal(size=(5, D)), rng.normal(size=(T, 5))

    def evidence(leaves: dict[str, Any], y: Any, C: Any) -> tuple[Any, Any]:
        J, h, c = observed(y, C, 0.0 * C[:, 0], 0.0 * C[:, 0] + 0.1)
        q = GaussianChain(**leaves, method=method, validate=False).times(J, h)
        return q.log_normalizer() + c.sum(), q.moments()

    run = evidence if library == "torch" else jax.jit(evidence, compiler_options=_QUICK)
    found = []
    for dtype in (np.float64, np.float32):
        leaves = {n: array(library, x.astype(dtype)) for n, x in given.items()}
        log_z, moments = run(leaves, *(array(library, x.astype(dtype)) for x in (y, C)))
        assert all(np.isfinite(np.asarray(x)).all() for x in moments)
        found.append(float(log_z))
    assert abs(found[1] / found[0] - 1) < 1e-4


@on_both
def test_missing_coordinates_are_left_out(library: str) -> None:
    rng = np.random.default_rng(3)
    T, D, P = 4, 2, 3
    given = arguments(T, D)
    C, d, r = rng.normal(size=(P, D)), rng.normal(size=P), np.array([0.2, 0.5, 0.1])
    y = rng.normal(size=(T, P))
    known = rng.uniform(size=(T, P)) < 0.6
    known[2] = False
    hidden = np.where(known, y, np.nan)
    y_, C_, d_, r_ = (array(library, x) for x in (hidden, C, d, r))
    J, h, c = observed(y_, C_, d_, r_, known=array(library, known))
    found = float(chain(library, given).prior.times(J, h).log_normalizer() + c.sum())
    mean, cov, _ = joint({**given, "precision": 0 * given["precision"], "shift": 0 * given["shift"]})
    wide = np.kron(np.eye(T), C)
    seen = known.ravel()
    expected = multivariate_normal(
        (wide @ mean + np.tile(d, T))[seen], (wide @ cov @ wide.T + np.diag(np.tile(r, T)))[np.ix_(seen, seen)]
    ).logpdf(y.ravel()[seen])
    np.testing.assert_allclose(found, expected, atol=EXACT)


@on_both
def test_bad_arguments(library: str) -> None:
    given = arguments(3, 2)
    singular = {**given, "noise": given["noise"] * np.array([[1.0, 0.0], [0.0, 0.0]])}
    with pytest.raises(DataError, match="noise of a GaussianChain is not positive definite: its smallest"):
        chain(library, singular)
    with pytest.raises(DataError, match=r"shift has shape \(2, 2\).*it is \(3, '...', 2\)"):
        chain(library, {**given, "shift": given["shift"][1:]})
    with pytest.raises(DataError, match="both or neither"):
        GaussianChain(*(array(library, given[n]) for n in NAMES[:6]))
    with pytest.raises(ValueError, match="method='fast' was asked for"):
        chain(library, given, "fast").filter()  # type: ignore[arg-type]


def test_a_chain_is_traced_by_torch_compile() -> None:
    """As a whole: a loop by hand may compile what it takes from here."""
    eye = torch.eye(2, dtype=torch.float64)

    def density(precision: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        bias, shift = torch.zeros_like(noise[1:]), torch.ones_like(noise)
        q = GaussianChain(eye[0], eye, 0.9 * eye[None], bias, eye[None], precision, shift)
        return q.log_prob(q.sample(noise))

    varied = eye.expand(4, 2, 2), torch.ones((4, 2), dtype=torch.float64)
    expected = density(*varied)
    compiled = torch.compile(density, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*varied), expected, rtol=0, atol=1e-12)
