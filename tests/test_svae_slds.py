"""Program svae_slds with a linear decoder and the potentials that are right for it: what its bounds are is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, Row
from scipy.special import logsumexp
from toys import Backend

from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.score import score
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import program
from ppl_lvm.structured.gaussian_chain import observed
from ppl_lvm.structured.markov_chain import MarkovChain
from ppl_lvm.structured.slds import MeanField, SwitchingChain

on_both = pytest.mark.parametrize("backend", BACKENDS)
RNG = np.random.default_rng(5)
ROWS, T, V, D, F = 2, 3, 2, 2, 3
X = RNG.normal(size=(ROWS, T, F))
C, d, r = RNG.normal(size=(F, D)), RNG.normal(size=F), np.array([0.5, 0.8, 0.3])
A, b, q = 0.8 * RNG.normal(size=(V, D, D)), RNG.normal(size=(V, D)), RNG.uniform(0.3, 1.0, size=(V, D))
m, start, move = RNG.normal(size=D), RNG.normal(size=V), RNG.normal(size=(V, V))
PATHS = np.array(list(itertools.product(range(V), repeat=T)))
SWEEPS = 3


def parameters() -> dict[str, np.ndarray]:
    """Unconstrained; the network says `C' R^-1 C` and `C' R^-1 (x - d)` of every step."""
    precision, weight = C.T @ (C / r[:, None]), C.T / r
    L = np.linalg.cholesky(precision)
    raw = L.copy()
    np.fill_diagonal(raw, np.log(np.expm1(np.diagonal(L) - 1e-4)))
    recognise = np.zeros((D + D * D, 2 * F))
    recognise[:D, :F] = weight
    return {
        **{"A": A, "b": b, "q": np.log(q), "m": m, "start": start, "move": move, "scale": np.log(r) / 2},
        **{"decoder.layers.0.weight": C, "decoder.layers.0.bias": d, "recognition.layers.0.weight": recognise},
        "recognition.layers.0.bias": np.concatenate([-weight @ d, raw.ravel()]),
    }


def engine(backend: Backend, switches: str) -> Engine:
    chosen = program("svae_slds", latent=D, states=V, hidden=(), switches=switches, sweeps=SWEEPS)
    assert chosen.guide is not None
    found = Engine(backend, chosen.model, chosen.guide, {"x": X}, portable=True)
    values = parameters()
    assert found.bound.initial.keys() == values.keys()
    with found._precision():
        for n, v in values.items():
            assert tuple(found.bound.initial[n].shape) == v.shape
            found.bound.initial[n] = found._array(v)
    return found


def exact() -> tuple[SwitchingChain, MeanField, np.ndarray, np.ndarray]:
    """The prior, the two factors, and of every row their bound and the evidence."""

    def wide(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.broadcast_to(x, (T - 1, *x.shape)).copy())

    states = MarkovChain(torch.tensor(start).log_softmax(-1), wide(move).log_softmax(-1))
    eye = torch.eye(D, dtype=torch.float64)
    noise = wide(q[..., None] * np.eye(D))
    p = SwitchingChain(states, torch.tensor(m).expand(V, D), eye.expand(V, D, D), wide(A), wide(b), noise)
    y = torch.tensor(X).movedim(1, 0)
    J, h, c = observed(y, torch.tensor(C), torch.tensor(d), torch.tensor(r))
    factors = p.mean_field(J, h, SWEEPS)
    paths = torch.tensor(PATHS.T)[:, :, None]
    each = states.log_prob(paths) + p.given(paths).times(J[:, None], h[:, None]).log_normalizer()
    constant = c.sum(0)
    return p, factors, (factors.bounds[-1] + constant).numpy(), (torch.logsumexp(each, 0) + constant).numpy()


def points(factors: MeanField) -> np.ndarray:
    """Draws of q(z) `[2 T D, rows, T, D]` whose plain mean is the expectation of every quadratic function."""
    n = T * D
    noise = np.sqrt(n) * np.concatenate([np.eye(n), -np.eye(n)]).reshape(2 * n, 1, T, D)
    noise = np.moveaxis(np.broadcast_to(noise, (2 * n, ROWS, T, D)), 2, 0)
    return np.moveaxis(factors.chain.sample(torch.tensor(noise.copy())).numpy(), 0, 2)


def drawn(backend: Backend, z: np.ndarray) -> dict[str, Row]:
    """The table at every pair of given z and sequence of states, `[1, z, sequences, rows]` but for the draws' axis."""
    S = len(PATHS)
    s = np.broadcast_to(PATHS[None, :, None], (len(z), S, ROWS, T)).reshape(1, -1, ROWS, T)
    wide = np.broadcast_to(z[:, None], (len(z), S, *z.shape[1:])).reshape(1, -1, *z.shape[1:])
    objective = elbo(draws=s.shape[1], kl="closed_form")
    found = engine(backend, "drawn").sites(objective, {"s": score(), "z": pathwise()}, values={"s": s, "z": wide})

    def split(x: Any) -> Any:
        return np.broadcast_to(x, (1, s.shape[1], ROWS)).reshape(len(z), S, ROWS) if x is not None else None

    return {
        n: Row(row.value, split(row.log_p), split(row.log_q), {k: split(v) for k, v in row.extra.items()})
        for n, row in found.items()
    }


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_the_bound_of_both_sites_is_that_of_mean_field(backend: Backend) -> None:
    """In expectation, which is exact: over all sequences of states, and of z at points that suffice for quadratics."""
    _, factors, bound, evidence = exact()
    table = drawn(backend, points(factors))
    weight = np.exp(table["s"].log_q)
    np.testing.assert_allclose(weight.sum(1), 1.0, atol=1e-10)
    log_w = table["x"].log_p + sum(table[n].log_p - table[n].log_q for n in ("s", "z"))
    np.testing.assert_allclose((weight * log_w).sum(1).mean(0), bound, atol=1e-10)
    closed = table["x"].log_p - table["s"].extra["kl"] - table["z"].extra["kl"]
    np.testing.assert_allclose((weight * closed).sum(1).mean(0), bound, atol=1e-10)
    assert (bound < evidence - 1e-3).all()


@on_both
def test_states_summed_out_give_no_lower_a_bound(backend: Backend) -> None:
    """At every z: the density is the sum over sequences, and the mean of its parts under q(s) is below it."""
    p, factors, _, _ = exact()
    z = np.random.default_rng(0).normal(size=(3, ROWS, T, D)) + factors.chain.moments().mean.movedim(0, 1).numpy()
    found = engine(backend, "summed").sites(elbo(draws=3), {"z": pathwise()}, values={"z": z[None]})
    steps = torch.tensor(np.moveaxis(z, 2, 0))[:, :, None]
    paths = torch.tensor(PATHS.T)[:, None, :, None]
    each = (p.states.log_prob(paths) + p.given(paths).log_prob(steps)).numpy()
    np.testing.assert_allclose(found["z"].log_p[0], logsumexp(each, axis=1), atol=1e-10)
    log_q = factors.chain.log_prob(torch.tensor(np.moveaxis(z, 2, 0))).numpy()
    np.testing.assert_allclose(found["z"].log_q[0], log_q, atol=1e-10)
    of_states = factors.states.log_prob(torch.tensor(PATHS.T)[:, :, None]).numpy()
    parts = (np.exp(of_states) * (each - of_states)).sum(1)
    assert (parts < found["z"].log_p[0] - 1e-6).all()


def test_steps_that_are_not_known_are_not_looked_at() -> None:
    chosen = program("svae_slds", sweeps=2)
    assert chosen.guide is not None
    mask = np.array([[True, False, True], [True, True, True]])
    z = np.random.default_rng(0).normal(size=(1, 1, ROWS, T, 2))
    found = []
    for hidden in (0.0, 5.0):
        x = np.where(mask[..., None], X, hidden)
        at = Engine("pyro", chosen.model, chosen.guide, {"x": x, "x_mask": mask.astype(float)}, portable=True)
        found.append(at.sites(elbo(), {"z": pathwise()}, values={"z": z})["z"].log_q)
        whole = Engine("pyro", chosen.model, chosen.guide, {"x": x}, portable=True)
        found.append(whole.sites(elbo(), {"z": pathwise()}, values={"z": z})["z"].log_q)
    np.testing.assert_array_equal(found[0], found[2])
    assert abs(found[1] - found[3])[0, 0, 0] > 1e-3 and abs(found[0] - found[1])[0, 0, 0] > 1e-3
    np.testing.assert_allclose(found[0][0, 0, 1], found[1][0, 0, 1], atol=1e-12)
