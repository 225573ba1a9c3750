"""Conjugate families against SciPy and their own identities; posteriors of mixtures against sums and quadrature."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.special import logsumexp

from ppl_lvm.backends import _jax_dists, _jax_mixtures, _torch_mixtures
from ppl_lvm.errors import DataError
from ppl_lvm.structured.mixture import (
    Dirichlet,
    Gaussian,
    NormalInverseWishart,
    mixture_mean_field,
    mixture_posterior,
    niw_form,
)

on_both = pytest.mark.parametrize("library", ["torch", "jax"])
EXACT = 1e-10
_QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def spd(rng: np.random.Generator, *batch: int, dim: int) -> np.ndarray:
    a = rng.normal(size=(*batch, dim, dim))
    return a @ np.swapaxes(a, -1, -2) / dim + 0.3 * np.eye(dim)


def run(library: str, f: Any, *given: np.ndarray) -> Any:
    """What f makes of arrays of a library, as numpy's."""
    if library == "torch":
        found = f(*(torch.tensor(x) for x in given))
        return jax.tree.map(lambda a: a.detach().numpy(), found)
    return jax.tree.map(np.asarray, jax.jit(f, compiler_options=_QUICK)(*map(jnp.asarray, given)))


def gradient(library: str, f: Any, *given: np.ndarray) -> list[np.ndarray]:
    if library == "torch":
        leaves = [torch.tensor(x, requires_grad=True) for x in given]
        return [g.numpy() for g in torch.autograd.grad(f(*leaves).sum(), leaves)]
    found = jax.grad(lambda *x: f(*x).sum(), argnums=tuple(range(len(given))))
    return run("jax", lambda *x: list(found(*x)), *given)


def niw(seed: int, dim: int, batch: tuple[int, ...] = ()) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    loc, scale = rng.normal(size=(*batch, dim)), spd(rng, *batch, dim=dim)
    return loc, rng.uniform(0.5, 3.0, batch), scale, dim + rng.uniform(0.0, 4.0, batch)


def form(loc: np.ndarray, count: np.ndarray, scale: np.ndarray, df: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return niw_form(*(torch.tensor(x) for x in (loc, count, scale))).numpy(), df


_niw = partial(NormalInverseWishart, validate=False)


@on_both
@pytest.mark.parametrize("dim", [1, 3])
def test_normal_inverse_wishart_density_and_parameters(library: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    loc, count, scale, df = niw(dim, dim)
    mean, cov, z = rng.normal(size=dim), spd(rng, dim=dim), rng.normal(size=dim)

    def everything(form: Any, df: Any, mean: Any, cov: Any, z: Any) -> Any:
        q, A = _niw(form, df), Gaussian.of(mean, cov)
        return q.log_prob(A.form), q.standard(), A.log_prob(z), A.moments(), A.log_normalizer()

    log_prob, standard, normal, moments, zero = run(library, everything, *form(loc, count, scale, df), mean, cov, z)
    exact = stats.multivariate_normal(loc, cov / count).logpdf(mean) + stats.invwishart(df, scale).logpdf(cov)
    np.testing.assert_allclose(log_prob, exact, atol=EXACT)
    for found, given in zip(standard, (loc, count, scale, df), strict=True):
        np.testing.assert_allclose(found, given, atol=EXACT)
    np.testing.assert_allclose(normal, stats.multivariate_normal(mean, cov).logpdf(z), atol=EXACT)
    np.testing.assert_allclose(moments[0], mean, atol=EXACT)
    np.testing.assert_allclose(moments[1], cov, atol=EXACT)
    np.testing.assert_allclose(zero, 0.0, atol=EXACT)


@on_both
def test_normalisers_have_the_expected_statistics_for_gradient(library: str) -> None:
    B, df = form(*niw(0, 2, (3,)))
    by_form, by_df = gradient(library, lambda B, df: _niw(B, df).log_normalizer(), B, df)
    expected = run(library, lambda B, df: _niw(B, df).expected(), B, df)
    corner = np.zeros((3, 3, 3))
    corner[:, 0, 0] = 2.0 * by_df  # the expected log determinant
    np.testing.assert_allclose(by_form, -(expected + corner) / 2.0, atol=EXACT)
    a = np.array([[0.3, 2.0, 5.0], [1.0, 1.0, 0.01]])
    by_a = gradient(library, lambda a: Dirichlet(a).log_normalizer(), a)[0]
    np.testing.assert_allclose(by_a, run(library, lambda a: Dirichlet(a).expected(), a), atol=EXACT)


@on_both
def test_divergences_are_bregman_s(library: str) -> None:
    """KL(q || p) = log Z(p) - log Z(q) - <grad log Z(q), p - q> in natural parameters."""
    q, p = form(*niw(1, 2, (3,))), form(*niw(2, 2, (3,)))
    kl, zq, zp = run(
        library,
        lambda Bq, dq, Bp, dp: (
            _niw(Bq, dq).kl(_niw(Bp, dp)),
            _niw(Bq, dq).log_normalizer(),
            _niw(Bp, dp).log_normalizer(),
        ),
        *q,
        *p,
    )
    by_form, by_df = gradient(library, lambda B, df: _niw(B, df).log_normalizer(), *q)
    inner = (by_form * (p[0] - q[0])).sum((-2, -1)) + by_df * (p[1] - q[1])
    np.testing.assert_allclose(kl, zp - zq - inner, atol=EXACT)
    assert (kl > 0.1).all()
    a, b = np.array([0.3, 2.0, 5.0]), np.array([1.0, 0.2, 4.0])
    kl, zq, zp = run(
        library, lambda a, b: (Dirichlet(a).kl(Dirichlet(b)), *(Dirichlet(x).log_normalizer() for x in (a, b))), a, b
    )
    slope = gradient(library, lambda a: Dirichlet(a).log_normalizer(), a)[0]
    np.testing.assert_allclose(kl, zp - zq - slope @ (b - a), atol=EXACT)
    same = run(library, lambda B, df: _niw(B, df).kl(_niw(B, df)), *q)
    np.testing.assert_allclose(same, 0.0, atol=EXACT)


@on_both
def test_evidence_of_conjugate_data(library: str) -> None:
    """By the chain rule of predictive densities: multivariate Student's t, and frequencies of labels."""
    rng = np.random.default_rng(5)
    prior, z = niw(5, 2), rng.normal(size=(4, 2))
    u = np.concatenate([np.ones((4, 1)), z], 1)

    def evidence(B: Any, df: Any, moments: Any, count: Any) -> Any:
        p = _niw(B, df)
        q = p.updated(moments, count)
        return q.log_normalizer() - p.log_normalizer(), q.standard()

    found, _ = run(library, evidence, *form(*prior), u.T @ u, np.array(4.0))
    total, now = 0.0, prior
    for n in range(4):
        loc, count, scale, df = now
        spread = scale * (count + 1.0) / (count * (df - 1.0))
        total += stats.multivariate_t(loc, spread, df - 1.0).logpdf(z[n])
        _, now = run(library, evidence, *form(*now), np.outer(u[n], u[n]), np.array(1.0))
    np.testing.assert_allclose(found - 4 * np.log(2 * np.pi), total, atol=EXACT)
    a, labels, predictive, seen = np.array([0.5, 1.5, 2.0]), [0, 2, 2, 1], 0.0, np.zeros(3)
    for label in labels:
        predictive += np.log((a + seen)[label] / (a + seen).sum())
        seen[label] += 1
    both = run(library, lambda a, n: (Dirichlet(a).updated(n).log_normalizer(), Dirichlet(a).log_normalizer()), a, seen)
    np.testing.assert_allclose(both[0] - both[1], predictive, atol=EXACT)
    pi = rng.dirichlet(a)
    log_prob = run(library, lambda a, v: Dirichlet(a).log_prob(v), a, np.log(pi))
    np.testing.assert_allclose(log_prob, stats.dirichlet(a).logpdf(pi), atol=EXACT)


@on_both
def test_draws_are_the_families_(library: str) -> None:
    """Means of draws at 3.5 standard errors, and their gradient against that of the exact means."""
    N, (B, df), a = 5000, form(*niw(3, 2)), np.array([0.02, 0.5, 4.0])

    def exactly(B: Any, df: Any, a: Any) -> Any:
        return _niw(B, df).expected(), Dirichlet(a).expected()

    def weighed(forms: Any, log_pi: Any) -> Any:
        return forms[..., 1:, 1:].sum((-2, -1)) + 0.1 * log_pi[..., 1:].sum(-1)

    if library == "torch":
        torch.manual_seed(0)
        leaves = [torch.tensor(x, requires_grad=True) for x in (B, df, a)]
        forms = _torch_mixtures.NormalInverseWishart(leaves[0], leaves[1]).rsample((N,))
        found = [forms, _torch_mixtures.LogDirichlet(leaves[2]).rsample((N,))]
        slopes = [g.numpy() for g in torch.autograd.grad(weighed(*found).mean(), leaves)]
        draws = [x.detach().numpy() for x in found]
    else:

        def draw(leaves: Any) -> Any:
            forms = _jax_mixtures.NormalInverseWishart(leaves[0], leaves[1]).rsample(jax.random.key(0), (N,))
            log_pi = _jax_mixtures.LogDirichlet(leaves[2]).rsample(jax.random.key(1), (N,))
            return weighed(forms, log_pi).mean(), [forms, log_pi]

        step = jax.jit(jax.grad(draw, has_aux=True), compiler_options=_QUICK)
        slopes, draws = step([jnp.asarray(x) for x in (B, df, a)])
    for drawn_, exact in zip(draws, run(library, exactly, B, df, a), strict=True):
        assert np.abs((np.mean(drawn_, 0) - exact) / (np.std(drawn_, 0) / np.sqrt(N))).max() < 3.5
    np.testing.assert_allclose(np.exp(draws[1]).sum(-1), 1.0, atol=EXACT)
    for slope, exact in zip(slopes, gradient(library, lambda *x: weighed(*exactly(*x)), B, df, a), strict=True):
        np.testing.assert_allclose(slope, exact, atol=0.1 * np.abs(exact).max())


def mixture(seed: int, dim: int, K: int = 3) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    mean, cov = rng.normal(size=(K, dim)), spd(rng, K, dim=dim)
    log_weight = np.log(rng.dirichlet(np.ones(K)))
    root = rng.normal(size=(dim, max(dim - 1, 1)))
    precision = root @ root.T  # singular where it can be
    return log_weight, mean, cov, precision, precision @ rng.normal(size=dim)


@on_both
@pytest.mark.parametrize("dim", [1, 2])
def test_labels_are_summed_out_exactly(library: str, dim: int) -> None:
    """Each component's integral by the Gaussian formula in dense matrices."""
    log_weight, mean, cov, J, h = mixture(dim, dim)

    def everything(log_weight: Any, mean: Any, cov: Any, J: Any, h: Any) -> Any:
        q = mixture_posterior(log_weight, Gaussian.of(mean, cov).form, J, h)
        product = Gaussian(q.form)
        return (
            q.log_prob,
            product.moments(),
            q.log_normalizer,
            product.log_normalizer(),
            q.statistics(),
            q.expected_potential(J, h),
        )

    log_prob, moments, log_z, zero, (labels, outer), potential = run(library, everything, log_weight, mean, cov, J, h)
    gains = []
    for k in range(3):
        P = np.linalg.inv(cov[k])
        posterior = np.linalg.inv(P + J)
        m = posterior @ (P @ mean[k] + h)
        gain = 0.5 * (m @ (P + J) @ m - mean[k] @ P @ mean[k])
        gains.append(gain + 0.5 * (np.linalg.slogdet(posterior)[1] - np.linalg.slogdet(cov[k])[1]))
        np.testing.assert_allclose(moments[0][k], m, atol=EXACT)
        np.testing.assert_allclose(moments[1][k], posterior, atol=EXACT)
        u = np.concatenate([[1.0], m])
        second = np.outer(u, u)
        second[1:, 1:] += posterior
        np.testing.assert_allclose(outer[k], labels[k] * second, atol=EXACT)
    np.testing.assert_allclose(log_z, logsumexp(log_weight + gains), atol=EXACT)
    np.testing.assert_allclose(log_prob, log_weight + gains - logsumexp(log_weight + gains), atol=EXACT)
    np.testing.assert_allclose(zero, 0.0, atol=EXACT)
    second = outer.sum(0)
    np.testing.assert_allclose(potential, h @ second[1:, 0] - 0.5 * (J * second[1:, 1:]).sum(), atol=EXACT)
    if dim == 1:

        def density(z: float) -> float:
            parts = stats.norm(mean[:, 0], np.sqrt(cov[:, 0, 0])).pdf(z)
            return float((np.exp(log_weight) * parts).sum() * np.exp(h[0] * z - 0.5 * J[0, 0] * z * z))

        np.testing.assert_allclose(log_z, np.log(quad(density, -30, 30, epsabs=1e-13)[0]), atol=1e-9)


@on_both
def test_mean_field_is_a_bound_that_climbs_and_is_exact_where_labels_do_not_matter(library: str) -> None:
    log_weight, mean, cov, J, h = mixture(4, 2)

    def bounds(log_weight: Any, mean: Any, cov: Any, J: Any, h: Any) -> Any:
        A = Gaussian.of(mean, cov).form
        found = [mixture_mean_field(log_weight, A, J, h, iterations=n) for n in (0, 1, 2, 30)]
        log_q, form, bound = found[-1]
        # E over q(c) q(z) of all terms and entropies, term by term.
        q = Gaussian(form)
        stat = q.statistics()
        scores = log_weight + Gaussian(A).expected_log_prob(stat)
        psi = (h * stat[1:, 0]).sum() - (J * stat[1:, 1:]).sum() / 2.0
        terms = (_exp(log_q) * (scores - log_q)).sum() + psi - q.expected_log_prob(stat)
        return [b for *_, b in found], mixture_posterior(log_weight, A, J, h).log_normalizer, terms, bound

    climbing, log_z, terms, bound = run(library, bounds, log_weight, mean, cov, J, h)
    assert np.all(np.diff(climbing) > -1e-12) and climbing[0] < climbing[1] - 1e-3
    assert climbing[-1] < log_z - 1e-4
    np.testing.assert_allclose(terms, bound, atol=EXACT)
    same = run(library, bounds, log_weight, mean[:1].repeat(3, 0), cov[:1].repeat(3, 0), J, h)
    np.testing.assert_allclose(same[0][-1], same[1], atol=EXACT)


def _exp(x: Any) -> Any:
    return x.exp() if isinstance(x, torch.Tensor) else jnp.exp(x)


def test_distributions_agree_across_libraries() -> None:
    """Densities, divergences and shapes, with labels whose weights are not normalised."""
    B, df = form(*niw(6, 2, (3,)))
    C, dg = form(*niw(7, 2, (3,)))
    log_weight, mean, cov, _, _ = mixture(8, 2)
    A = Gaussian.of(torch.tensor(mean), torch.tensor(cov)).form.numpy()
    weights, a = 0.7 * log_weight, np.array([0.3, 1.0, 2.0])
    t, j = torch.tensor, jnp.asarray
    of_torch, of_jax = _torch_mixtures, _jax_mixtures
    pairs = [
        (lambda m, x: m.NormalInverseWishart(x(B), x(df)), lambda m, x: m.NormalInverseWishart(x(C), x(dg)), A),
        (lambda m, x: m.LogDirichlet(x(a)), lambda m, x: m.LogDirichlet(x(a[::-1].copy())), log_weight),
        (lambda m, x: m.Gaussian(x(A)), lambda m, x: m.Gaussian(x(A[::-1].copy())), mean),
        (lambda m, x: m.Labels(x(log_weight)), lambda m, x: m.Labels(x(weights)), np.arange(3)),
    ]

    @partial(jax.jit, compiler_options=_QUICK)
    def of_numpyro() -> Any:
        both = [(q(of_jax, j), p(of_jax, j), j(value)) for q, p, value in pairs]
        return [(q.log_prob(v), p.log_prob(v), _jax_dists.kl(q, p)) for q, p, v in both]

    for (q, p, value), expected in zip(pairs, of_numpyro(), strict=True):
        one, two, v = q(of_torch, t), p(of_torch, t), t(value)
        found = one.log_prob(v), two.log_prob(v), torch.distributions.kl_divergence(one, two)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=EXACT)
        if value.dtype == int:
            np.testing.assert_allclose(found[1], weights, atol=EXACT)
            np.testing.assert_allclose(found[2], (np.exp(log_weight) * (log_weight - weights)).sum(), atol=EXACT)
        else:
            wider = one.expand((4, *one.batch_shape))
            assert wider.rsample().shape == wider.mean.shape == (4, *one.batch_shape, *one.event_shape)


def test_values_outside_the_domain_are_named() -> None:
    B, df = form(*niw(0, 2))
    with pytest.raises(DataError, match="not positive definite"):
        NormalInverseWishart(torch.tensor(B - 2.0 * B[0, 0] * np.eye(3)), torch.tensor(df))
    with pytest.raises(DataError, match=r"df .* is 0.5 somewhere; it has to be above D - 1 = 1"):
        NormalInverseWishart(torch.tensor(B), torch.tensor(0.5))
    with pytest.raises(DataError, match=r"form has shape \(3, 2\)"):
        NormalInverseWishart(torch.tensor(B[:, :2]), torch.tensor(df))


def test_numpyro_mixes_events_of_independent_elements_and_refuses_supports_that_move() -> None:
    """`ppl.dist.MixtureSameFamily`; NumPyro 0.21's own refuses the events too."""
    rng = np.random.default_rng(4)
    w, mu, sigma = np.array([0.2, 0.5, 0.3]), rng.normal(size=(3, 2)), rng.uniform(0.5, 2.0, (3, 2))
    x = rng.normal(size=(5, 2))
    library = _jax_dists.namespace()
    mixing = library.Categorical(probs=jnp.asarray(w))
    mixture = library.MixtureSameFamily(mixing, library.Normal(mu, sigma).to_event(1), validate_args=True)
    assert (mixture.batch_shape, mixture.event_shape, mixture.support.event_dim) == ((), (2,), 1)
    exact = logsumexp(np.log(w) + stats.norm.logpdf(x[:, None], mu, sigma).sum(-1), axis=-1)
    np.testing.assert_allclose(mixture.log_prob(x), exact, rtol=EXACT)
    np.testing.assert_allclose(mixture.mean, w @ mu, rtol=EXACT)
    assert mixture.sample(jax.random.key(0), (7,)).shape == (7, 2)
    np.testing.assert_allclose(jax.jit(lambda m: m.log_prob(x))(mixture), exact, rtol=EXACT)
    assert library.MixtureSameFamily(mixing, library.Normal(mu[:, 0], 1.0)).event_shape == ()
    with pytest.raises(AssertionError, match="does not depend on their parameters"):
        library.MixtureSameFamily(mixing, library.Uniform(mu, mu + sigma).to_event(1))
    with pytest.raises(AssertionError, match="mixture_size=3"):
        library.MixtureSameFamily(mixing, library.Normal(mu[:2], 1.0).to_event(1))
