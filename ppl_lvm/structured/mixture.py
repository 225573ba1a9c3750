"""Conjugate families of mixtures of Gaussians, in natural parameters, and the exact posterior of their local draws.

A Gaussian of z, D numbers, is written as a *form*: a symmetric matrix A `[D + 1, D + 1]` with

    log N(z; mean, cov) = -(u' A u + D log 2 pi) / 2,   u = (1, z)
    A = [[mean' P mean - log |P|, -(P mean)'], [-P mean, P]],   P = cov^-1

The log density is linear in A, and so is a log probability in itself. That is why the draws of the distributions over
parameters below are forms and log probabilities: where a program's log joint density is linear in them, its expectation
is its value at their means, which are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array
from ppl_lvm.structured.matrices import LOG_2PI, log_diagonal, times


@dataclass(frozen=True)
class Dirichlet:
    """`p(pi) = exp( sum_k (concentration_k - 1) log pi_k - log Z )` over K probabilities, in terms of `log pi`.

    `concentration` is positive, `[..., K]`. Densities are those of pi, in nats.

    Source: Johnson (1960), see Gelman et al. (2013), Bayesian Data Analysis, appendix A.

    Example:
        >>> import jax.numpy as jnp
        >>> q = Dirichlet(jnp.array([1.0, 1.0])).updated(jnp.array([3.0, 0.0]))
        >>> q.concentration.tolist(), [round(float(x), 4) for x in q.expected()]
        ([4.0, 1.0], [-0.25, -2.0833])
    """

    concentration: Array

    def log_normalizer(self) -> Array:
        """`log Z = sum_k log Gamma(concentration_k) - log Gamma(sum_k concentration_k)`, `[...]`."""
        xp, a = ops.xp(self.concentration), self.concentration
        return xp.sum(ops.lgamma(a), axis=-1) - ops.lgamma(xp.sum(a, axis=-1))

    def expected(self) -> Array:
        """`E log pi`, `[..., K]`: the gradient of `log Z`."""
        a = self.concentration
        return ops.digamma(a) - ops.digamma(ops.xp(a).sum(a, axis=-1, keepdims=True))

    def log_prob(self, log_pi: Array) -> Array:
        """Log density of pi, `[...]`."""
        xp = ops.xp(log_pi)
        return xp.sum((self.concentration - 1.0) * log_pi, axis=-1) - self.log_normalizer()

    def kl(self, other: Dirichlet) -> Array:
        """`KL(self || other)`, `[...]`."""
        xp = ops.xp(self.concentration)
        cross = xp.sum((self.concentration - other.concentration) * self.expected(), axis=-1)
        return cross - self.log_normalizer() + other.log_normalizer()

    def updated(self, counts: Array) -> Dirichlet:
        """The posterior after labels that were counted `[..., K]`, whole or in expectation."""
        return Dirichlet(self.concentration + counts)

    def sample(self, gamma: Array, uniform: Array) -> Array:
        """`log pi` from standard gamma draws of shape `concentration + 1` and uniforms, `[..., K]`.

        `log gamma + log uniform / concentration` is the log of a gamma draw of shape `concentration`, which itself
        would be zero where that is small.
        """
        xp = ops.xp(gamma)
        return ops.log_softmax(xp.log(gamma) + xp.log(uniform) / self.concentration, -1)


@dataclass(frozen=True)
class NormalInverseWishart:
    """`p(mean, cov) = N(mean; loc, cov / count) InverseWishart(cov; df, scale)`, in natural parameters.

    With A the form of `N(mean, cov)` whose corner is without its log determinant, and P = cov^-1,

        p(mean, cov) = exp( -tr(form A) / 2 + (df + D + 2) / 2 log det P - log Z )
        form = [[count, count loc'], [count loc, scale + count loc loc']]            `[..., D + 1, D + 1]`, `df [...]`

    so that data z with weights w add `sum w (1, z) (1, z)'` to `form` and `sum w` to `df` (`updated`). `form` is
    positive definite and `df > D - 1`; `E cov = scale / (df - D - 1)` exists for `df > D + 1`. Its Cholesky factor is
    `[[sqrt(count), 0], [sqrt(count) loc, chol(scale)]]`, from which everything is computed. Densities are those of
    `(mean, cov)`, in nats.

    Texts differ in what they call `scale` (here that of SciPy's `invwishart`, a sum of squares, no inverse).

    Raises:
        DataError: shapes do not fit, or values (looked at where they are at hand) are outside the domain.

    Source: DeGroot (1970), Optimal Statistical Decisions; Murphy (2007), Conjugate Bayesian Analysis of the Gaussian.

    Example:
        >>> import jax.numpy as jnp
        >>> p = NormalInverseWishart.of(jnp.zeros(1), jnp.array(1.0), jnp.eye(1), jnp.array(3.0))
        >>> q = p.updated(jnp.array([[2.0, 4.0], [4.0, 10.0]]), jnp.array(2.0))          # z = 1 and z = 3
        >>> [round(float(x.squeeze()), 3) for x in q.standard()]
        [1.333, 3.0, 5.667, 5.0]
    """

    form: Array
    df: Array
    validate: bool = True

    def __post_init__(self) -> None:
        shape = tuple(self.form.shape)
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
            raise DataError(f"form has shape {shape}; it holds matrices [D + 1, D + 1] of z of D numbers.")
        form, df = (ops.concrete(x) for x in (self.form, self.df)) if self.validate else (None, None)
        if form is not None and form.size:
            smallest = np.linalg.eigvalsh(form.astype(float))[..., 0].min()
            if not smallest > 0:
                raise DataError(
                    f"form of a NormalInverseWishart is not positive definite (smallest eigenvalue {smallest:.3g}), so "
                    f"count or scale is not; make it by NormalInverseWishart.of(loc, count, scale, df)."
                )
        if df is not None and df.size and not df.min() > self.dim - 1:
            raise DataError(
                f"df of a NormalInverseWishart is {df.min():.3g} somewhere; it has to be above D - 1 = {self.dim - 1}."
            )

    @classmethod
    def of(cls, loc: Array, count: Array, scale: Array, df: Array) -> NormalInverseWishart:
        """From standard parameters: loc `[..., D]`, count `[...]`, scale `[..., D, D]`, df `[...]`."""
        return cls(niw_form(loc, count, scale), df)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.form.shape[-1]) - 1

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """What form and df broadcast to."""
        return tuple(np.broadcast_shapes(tuple(self.form.shape[:-2]), tuple(self.df.shape)))

    def standard(self) -> tuple[Array, Array, Array, Array]:
        """`loc, count, scale, df`."""
        root, loc, lower = self._roots
        return loc, root**2, lower @ lower.mT, self.df

    @property
    def _roots(self) -> tuple[Array, Array, Array]:
        """`sqrt(count)`, loc, and the Cholesky factor of scale."""
        L = ops.cholesky(self.form)
        return L[..., 0, 0], L[..., 1:, 0] / L[..., :1, 0], L[..., 1:, 1:]

    @property
    def halves(self) -> Array:
        """`(df - j) / 2`, `[..., D]`: shapes of the gamma draws that `sample` takes."""
        return (self.df[..., None] - _arange(self.dim, self.df)) / 2.0

    def log_normalizer(self) -> Array:
        """`log Z`, `[...]`; its gradients in `form` and `df` are those of `expected`."""
        xp, D = ops.xp(self.form), self.dim
        root, _, lower = self._roots
        constant = D * LOG_2PI / 2.0 + D * (D - 1) / 4.0 * math.log(math.pi)
        gammas = xp.sum(ops.lgamma(self.halves), axis=-1)
        half = self.df / 2.0
        return constant + gammas + half * (D * math.log(2.0)) - self.df * log_diagonal(lower) - D * xp.log(root)

    def expected(self) -> Array:
        """`E A`, the mean form with its log determinant, `[..., D + 1, D + 1]`."""
        E, log_det = self._expected()
        return _with_corner(E, -log_det)

    def _expected(self) -> tuple[Array, Array]:
        """`E A` without the log determinant, and `E log |P|`."""
        xp, D = ops.xp(self.form), self.dim
        root, loc, lower = self._roots
        df = self.df[..., None, None]
        # scale^-1 = W' W
        W = ops.solve_triangular(lower, ops.eye(D, lower) + ops.zeros(tuple(lower.shape), lower))
        P = df * (W.mT @ W)
        corner = D / root**2 + self.df * xp.sum(times(W, loc) ** 2, axis=-1)
        log_det = xp.sum(ops.digamma(self.halves), axis=-1) + D * math.log(2.0) - 2.0 * log_diagonal(lower)
        return _joined(corner, -times(P, loc), P), log_det

    def log_prob(self, form: Array) -> Array:
        """Log density of the (mean, cov) with form A `[..., D + 1, D + 1]`, `[...]`; its corner is not looked at."""
        xp, D = ops.xp(form), self.dim
        P, h = form[..., 1:, 1:], -form[..., 1:, 0]
        lower = ops.cholesky(P)
        square = xp.sum(ops.solve_triangular(lower, h[..., None])[..., 0] ** 2, axis=-1)
        count, sums, scatter = self.form[..., 0, 0], self.form[..., 1:, 0], self.form[..., 1:, 1:]
        trace = count * square - 2.0 * xp.sum(sums * h, axis=-1) + xp.sum(scatter * P, axis=(-2, -1))
        return (self.df + D + 2.0) * log_diagonal(lower) - trace / 2.0 - self.log_normalizer()

    def kl(self, other: NormalInverseWishart) -> Array:
        """`KL(self || other)`, `[...]`."""
        xp = ops.xp(self.form)
        E, log_det = self._expected()
        cross = (self.df - other.df) * log_det - xp.sum((self.form - other.form) * E, axis=(-2, -1))
        return cross / 2.0 - self.log_normalizer() + other.log_normalizer()

    def updated(self, moments: Array, count: Array) -> NormalInverseWishart:
        """The posterior after data with `moments = sum w (1, z) (1, z)'` and `count = sum w`."""
        return NormalInverseWishart(self.form + moments, self.df + count, self.validate)

    def sample(self, normal: Array, gamma: Array) -> Array:
        """A form A from standard normals `[..., D + 1, D]` and standard gamma draws `[..., D]` of shapes `halves`.

        By Bartlett's decomposition of P: `P = R R'` with `R = L^-T T`, `scale = L L'`, T lower triangular with normals
        below its diagonal; the last row of the normals draws the mean.
        """
        xp, D = ops.xp(normal), self.dim
        root, loc, lower = self._roots
        T = xp.tril(normal[..., :D, :], k=-1) + xp.sqrt(2.0 * gamma)[..., None] * ops.eye(D, normal)
        R = ops.solve_triangular(lower, T, transposed=True)
        spread = times(lower, ops.solve_triangular(T, normal[..., D, :, None], transposed=True)[..., 0])
        P = R @ R.mT
        return _form(loc + spread / root[..., None], P, 2.0 * (log_diagonal(T) - log_diagonal(lower)))


def niw_form(loc: Array, count: Array, scale: Array) -> Array:
    """`[[count, count loc'], [count loc, scale + count loc loc']]`, `[..., D + 1, D + 1]`."""
    weighted = count[..., None] * loc
    inner = scale + weighted[..., :, None] * loc[..., None, :]
    return _joined(count, weighted, inner)


@dataclass(frozen=True)
class Gaussian:
    """`f(z) = exp( -((1, z)' A (1, z) + D log 2 pi) / 2 )` for a form A `[..., D + 1, D + 1]`.

    It is the density of a normal where A's corner is that of one, and else a multiple of it: `times` a Gaussian
    potential, or with the mean form of a `NormalInverseWishart`, when `log f` is the expected log density.

    Example:
        >>> import jax.numpy as jnp
        >>> f = Gaussian.of(jnp.zeros(1), jnp.eye(1)).times(jnp.eye(1), jnp.array([2.0]))
        >>> [round(float(x.squeeze()), 4) for x in (*f.moments(), f.log_normalizer())]
        [1.0, 0.5, 0.6534]
    """

    form: Array

    @classmethod
    def of(cls, mean: Array, cov: Array) -> Gaussian:
        """The normal with this mean `[..., D]` and covariance `[..., D, D]`."""
        lower = ops.cholesky(cov)
        D = cov.shape[-1]
        W = ops.solve_triangular(lower, ops.eye(D, lower) + ops.zeros(tuple(lower.shape), lower))
        return cls(_form(mean, W.mT @ W, -2.0 * log_diagonal(lower)))

    @property
    def dim(self) -> int:
        """D."""
        return int(self.form.shape[-1]) - 1

    @property
    def _solved(self) -> tuple[Array, Array, Array]:
        """Cholesky factor L of P, `L^-1 h`, and the mean."""
        lower = ops.cholesky(self.form[..., 1:, 1:])
        half = ops.solve_triangular(lower, -self.form[..., 1:, :1])
        return lower, half[..., 0], ops.solve_triangular(lower, half, transposed=True)[..., 0]

    def times(self, precision: Array, shift: Array) -> Gaussian:
        """f times `exp(shift' z - z' precision z / 2)`; precision `[..., D, D]` may be singular, shift `[..., D]`."""
        nothing = ops.zeros(tuple(shift.shape[:-1]), shift)
        return Gaussian(self.form + _joined(nothing, -shift, precision))

    def log_normalizer(self) -> Array:
        """`log of the integral of f`, `[...]`, in nats."""
        lower, half, _ = self._solved
        return (ops.xp(half).sum(half**2, axis=-1) - self.form[..., 0, 0]) / 2.0 - log_diagonal(lower)

    def normalized(self) -> Gaussian:
        """f over its integral."""
        return Gaussian(_with_corner(self.form, 2.0 * self.log_normalizer()))

    def moments(self) -> tuple[Array, Array]:
        """Mean `[..., D]` and covariance `[..., D, D]`."""
        lower, _, mean = self._solved
        W = ops.solve_triangular(lower, ops.eye(self.dim, lower) + ops.zeros(tuple(lower.shape), lower))
        return mean, W.mT @ W

    def statistics(self) -> Array:
        """`E (1, z) (1, z)'`, `[..., D + 1, D + 1]`: what a `NormalInverseWishart` is updated by."""
        mean, cov = self.moments()
        one = ops.zeros(tuple(mean.shape[:-1]), mean) + 1.0
        return _joined(one, mean, cov + mean[..., :, None] * mean[..., None, :])

    def log_prob(self, z: Array) -> Array:
        """`log f(z)`, `[..., D] -> [...]`, in nats; linear in the form."""
        xp, A = ops.xp(z), self.form
        square = xp.sum(times(A[..., 1:, 1:], z) * z, axis=-1) + 2.0 * xp.sum(A[..., 1:, 0] * z, axis=-1)
        return -(square + A[..., 0, 0] + self.dim * LOG_2PI) / 2.0

    def sample(self, noise: Array) -> Array:
        """A draw from standard normal noise `[..., D]`."""
        lower, _, mean = self._solved
        return mean + ops.solve_triangular(lower, noise[..., None], transposed=True)[..., 0]

    def noise_of(self, z: Array) -> Array:
        """The noise that `sample` makes z from."""
        lower, _, mean = self._solved
        return times(lower.mT, z - mean)

    def expected_log_prob(self, statistics: Array) -> Array:
        """`E log f(z)` over any z with these `statistics`, `[...]`, in nats."""
        xp = ops.xp(statistics)
        return -(xp.sum(self.form * statistics, axis=(-2, -1)) + self.dim * LOG_2PI) / 2.0

    def kl(self, other: Gaussian) -> Array:
        """`E log q(z) - E log f(z)` for q this one normalised: the KL to `other` where that is normalised too."""
        q, of = self.normalized(), self.statistics()
        return q.expected_log_prob(of) - other.expected_log_prob(of)


class Posterior(NamedTuple):
    """`q(c, z) = exp( log_weight_c ) f_c(z) psi(z) / Z` of a mixture, exactly."""

    log_prob: Array
    """`log q(c)`, `[..., K]`: responsibilities, labels' log probabilities with z integrated out."""
    form: Array
    """Of the normal `q(z | c)`, `[..., K, D + 1, D + 1]`."""
    log_normalizer: Array
    """`log Z = log sum_c integral`, `[...]`, in nats."""

    def statistics(self) -> tuple[Array, Array]:
        """Expected labels `[..., K]` and `E 1(c = k) (1, z) (1, z)'`, `[..., K, D + 1, D + 1]`."""
        weights = ops.xp(self.log_prob).exp(self.log_prob)
        return weights, weights[..., None, None] * Gaussian(self.form).statistics()

    def expected_potential(self, precision: Array, shift: Array) -> Array:
        """`E log psi(z)`, `[...]`; `KL(q || prior) = E log psi - log Z`."""
        _, moments = self.statistics()
        nothing = ops.zeros(tuple(shift.shape[:-1]), shift)
        xp = ops.xp(shift)
        return -xp.sum(_joined(nothing, -shift, precision) * xp.sum(moments, axis=-3), axis=(-2, -1)) / 2.0


def mixture_posterior(log_weight: Array, form: Array, precision: Array, shift: Array) -> Posterior:
    """The labels and draws of a mixture of Gaussians under a potential `psi(z) = exp(shift' z - z' precision z / 2)`.

    The sum over labels is exact: `log Z = log sum_k exp(log_weight_k) integral f_k(z) psi(z) dz`. Weights `[..., K]`
    and components f_k, forms `[..., K, D + 1, D + 1]`, need not be normalised; precision is `[..., D, D]`, shift
    `[..., D]`. With log probabilities, forms of normals and a likelihood for potential, `log Z` is the log evidence;
    with means of a `Dirichlet` and a `NormalInverseWishart`, q is the optimal local factor of variational Bayes.

    Source: Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), arXiv:1603.06277, whose factor has labels and draws apart
    (`mixture_mean_field`).

    Example:
        >>> import jax.numpy as jnp
        >>> f = Gaussian.of(jnp.array([[-1.0], [1.0]]), jnp.ones((2, 1, 1))).form
        >>> q = mixture_posterior(jnp.log(jnp.ones(2) / 2), f, jnp.ones((1, 1)), jnp.array([2.0]))
        >>> [round(float(p), 3) for p in jnp.exp(q.log_prob)]
        [0.119, 0.881]
    """
    product = Gaussian(form).times(precision[..., None, :, :], shift[..., None, :])
    gains = product.log_normalizer()
    joint = log_weight + gains
    log_z = ops.logsumexp(joint, -1)
    return Posterior(joint - log_z[..., None], _with_corner(product.form, 2.0 * gains), log_z)


def mixture_mean_field(
    log_weight: Array, form: Array, precision: Array, shift: Array, iterations: int = 20
) -> tuple[Array, Array, Array]:
    """The best `q(c) q(z)` for the same joint as `mixture_posterior`, by coordinate ascent from equal labels.

    `log q(c)` `[..., K]`, the form of `q(z)` `[..., D + 1, D + 1]`, and the bound
    `E[ log_weight_c + log f_c(z) + log psi(z) ] + H[q(c)] + H[q(z)] <= log Z`, which no iteration lowers.

    Source: Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), arXiv:1603.06277, appendix D.
    """
    xp = ops.xp(log_weight)
    batch = np.broadcast_shapes(tuple(shift.shape[:-1]), tuple(log_weight.shape[:-1]), tuple(form.shape[:-3]))
    K = int(log_weight.shape[-1])
    log_q = ops.log_softmax(ops.zeros((*batch, K), log_weight), -1)
    for _ in range(iterations):
        mean_form = xp.sum(xp.exp(log_q)[..., None, None] * form, axis=-3)
        product = Gaussian(mean_form).times(precision, shift)
        scores = log_weight + Gaussian(form).expected_log_prob(product.statistics()[..., None, :, :])
        log_q = ops.log_softmax(scores, -1)
    mean_form = xp.sum(xp.exp(log_q)[..., None, None] * form, axis=-3)
    product = Gaussian(mean_form).times(precision, shift)
    # E log f + E log psi + H[q(z)] is the log normaliser of what q(z) is proportional to.
    bound = product.log_normalizer() + xp.sum(xp.exp(log_q) * (log_weight - log_q), axis=-1)
    return log_q, product.normalized().form, bound


def _form(mean: Array, P: Array, log_det: Array) -> Array:
    h = times(P, mean)
    return _joined(ops.xp(h).sum(h * mean, axis=-1) - log_det, -h, P)


def _joined(corner: Array, side: Array, inner: Array) -> Array:
    """`[[corner, side'], [side, inner]]`."""
    xp = ops.xp(inner)
    batch = np.broadcast_shapes(tuple(corner.shape), tuple(side.shape[:-1]), tuple(inner.shape[:-2]))
    D = inner.shape[-1]
    corner = xp.broadcast_to(corner, batch)[..., None, None]
    side = xp.broadcast_to(side, (*batch, D))
    below = xp.concat([side[..., :, None], xp.broadcast_to(inner, (*batch, D, D))], axis=-1)
    return xp.concat([xp.concat([corner, side[..., None, :]], axis=-1), below], axis=-2)


def _with_corner(form: Array, more: Array) -> Array:
    """The form with something added to its corner."""
    corner = form[..., 0, 0] + more
    return _joined(corner, form[..., 1:, 0], form[..., 1:, 1:])


def _arange(n: int, like: Array) -> Array:
    xp = ops.xp(like)
    return xp.cumulative_sum(ops.zeros((n,), like) + 1.0, axis=0) - 1.0
