"""Linear-Gaussian chains times Gaussian potentials: filter, smoother, normaliser, joint draws, moments, entropy, KL."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array
from ppl_lvm.structured.scan import Method, associative_scan, behind_steps, in_parallel

LOG_2PI = math.log(2.0 * math.pi)


class Filtered(NamedTuple):
    """`q(z_t | potentials up to t)`, steps in front."""

    mean: Array
    """`[T, ..., D]`."""
    cov: Array
    """`[T, ..., D, D]`."""
    log_normalizer: Array
    """`[...]`, in nats."""


class Moments(NamedTuple):
    """Of `q(z)`, steps in front."""

    mean: Array
    """`[T, ..., D]`."""
    cov: Array
    """`[T, ..., D, D]`."""
    cross: Array
    """`Cov(z_{t+1}, z_t)`, `[T - 1, ..., D, D]`."""


class _Backward(NamedTuple):
    """`z_t | z_{t+1} = E z_{t+1} + g + W' noise`, of the last step `z_T = g + W' noise`; steps in front."""

    E: Array
    g: Array
    W: Array


@dataclass(frozen=True)
class GaussianChain:
    """`q(z) = 1/Z p(z) prod_t psi_t(z_t)` over T steps of D numbers, with

        p(z)     = N(z_1; mean, cov) prod_{t>1} N(z_t; transition_t z_{t-1} + bias_t, noise_t)
        psi_t(z) = exp(shift_t' z - z' precision_t z / 2)

    Steps are the first axis of `transition` and `noise` `[T - 1, ..., D, D]`, `bias` `[T - 1, ..., D]`, `precision`
    `[T, ..., D, D]` and `shift` `[T, ..., D]`; the axes between are batches, which broadcast. Potentials are in
    information form, so that a step without data has zeros in both, and a precision may be singular. `cov` and `noise`
    are positive definite. Without potentials (None) Z = 1 and q = p.

    The forward pass goes through Cholesky factors of `I + L' precision L`, with L one of a predicted covariance, so no
    covariance is inverted or subtracted from another.

    Raises:
        DataError: shapes do not fit, or a covariance is not positive definite (looked for where values are at hand, not
            in a traced computation).

    Source: filter and smoother of Kalman (1960), Rauch, Tung, Striebel (1965); in parallel, Särkkä and
    García-Fernández (2021), arXiv:1905.13002; as a guide, Johnson, Duvenaud, Wiltschko, Datta, Adams (2016),
    arXiv:1603.06277, Zhao and Linderman (2023), arXiv:2305.16543.

    Example:
        >>> import jax.numpy as jnp
        >>> one, steps, zeros = jnp.eye(1), jnp.ones((2, 1, 1)), jnp.zeros((2, 1))
        >>> walk = GaussianChain(jnp.zeros(1), one, steps, zeros, steps)
        >>> walk = walk.times(precision=jnp.ones((3, 1, 1)), shift=jnp.ones((3, 1)))
        >>> [round(float(mean), 3) for mean in walk.moments().mean[:, 0]]
        [0.615, 0.846, 0.923]
        >>> round(float(walk.log_normalizer()), 4), round(float(walk.kl(walk.prior)), 4)
        (-0.0902, 0.7706)
    """

    mean: Array
    cov: Array
    transition: Array
    bias: Array
    noise: Array
    precision: Array | None = None
    shift: Array | None = None
    method: Method = "auto"
    validate: bool = True

    def __post_init__(self) -> None:
        D, steps = self.mean.shape[-1], self.bias.shape[0]
        needed = {"cov": (D, D), "transition": (D, D), "bias": (D,), "noise": (D, D)}
        if (self.precision is None) != (self.shift is None):
            raise DataError("A GaussianChain's potentials are precision and shift, both or neither of them.")
        if self.precision is not None:
            needed |= {"precision": (D, D), "shift": (D,)}
        for name, event in needed.items():
            shape = tuple(getattr(self, name).shape)
            first = {"cov": None, "precision": steps + 1, "shift": steps + 1}.get(name, steps)
            wrong = first is not None and (len(shape) < len(event) + 1 or shape[0] != first)
            if wrong or shape[-len(event) :] != event:
                want = ((first,) if first is not None else ()) + ("...",) + event
                raise DataError(
                    f"{name} has shape {shape}; mean says D = {D} and bias {steps} transitions, so it is {want}."
                )
        if self.validate:
            for name in ("cov", "noise"):
                _check_positive(name, getattr(self, name))

    @property
    def steps(self) -> int:
        """T."""
        return int(self.bias.shape[0]) + 1

    @property
    def dim(self) -> int:
        """D."""
        return int(self.mean.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """What all arguments broadcast to between steps and state."""
        shapes = [self.mean.shape[:-1], self.cov.shape[:-2], self.transition.shape[1:-2], self.bias.shape[1:-1]]
        shapes.append(self.noise.shape[1:-2])
        if self.precision is not None and self.shift is not None:
            shapes += [self.precision.shape[1:-2], self.shift.shape[1:-1]]
        return tuple(np.broadcast_shapes(*(tuple(s) for s in shapes)))

    @property
    def prior(self) -> GaussianChain:
        """p, without the potentials."""
        return replace(self, precision=None, shift=None, validate=False)

    def filter(self) -> Filtered:
        """`q(z_t | potentials up to t)` at every step, and `log Z`."""
        return ops.remember(self.mean, self._kept, "filter", self._filter)

    @cached_property
    def _kept(self) -> dict[Any, Any]:
        return {}

    def _filter(self) -> Filtered:
        c, batch, D = self._aligned(), self.batch_shape, self.dim
        if c.precision is None or c.shift is None:
            zero = ops.zeros((self.steps, *(1 for _ in batch), D), self.mean)
            c = replace(c, precision=_diagonal(zero), shift=zero)
        assert c.precision is not None and c.shift is not None
        xp = ops.xp(c.mean)
        if self._in_parallel:
            nothing = ops.zeros(tuple(c.cov.shape), c.cov)
            first = _element(nothing, c.mean, c.cov, c.precision[0], c.shift[0])
            rest = _element(c.transition, c.bias, c.noise, c.precision[1:], c.shift[1:])
            elements = [
                _joined(f[None], r, (self.steps, *batch, *f.shape[len(batch) :]))
                for f, r in zip(first, rest, strict=True)
            ]
            _, mean, cov, _, _, total = associative_scan(_then_filter, elements)
            return Filtered(mean, cov, total[-1])
        mean, cov, total = _updated(c.mean, c.cov, c.precision[0], c.shift[0])
        start = (
            xp.broadcast_to(mean, (*batch, D)),
            xp.broadcast_to(cov, (*batch, D, D)),
            xp.broadcast_to(total, batch),
        )

        def step(carry: tuple[Array, ...], x: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            mean, cov, total = carry
            F, b, Q, J, h = x
            mean, cov, gain = _updated(_times(F, mean) + b, _sandwich(F, cov) + Q, J, h)
            return (mean, cov, total + gain), (mean, cov)

        rest = (c.transition, c.bias, c.noise, c.precision[1:], c.shift[1:])
        (_, _, log_z), (means, covs) = ops.scan(step, start, rest)
        return Filtered(
            xp.concat([start[0][None], means], axis=0), xp.concat([start[1][None], covs], axis=0), log_z
        )

    def times(self, precision: Array, shift: Array) -> GaussianChain:
        """q times more potentials of the same form."""
        if self.precision is not None and self.shift is not None:
            precision, shift = self.precision + precision, self.shift + shift
        return replace(self, precision=precision, shift=shift, validate=False)

    def log_normalizer(self) -> Array:
        """`log Z = log E_p prod_t psi_t(z_t)`, `[...]`, in nats."""
        if self.precision is None:
            return ops.zeros(self.batch_shape, self.mean)
        return self.filter().log_normalizer

    def moments(self) -> Moments:
        """Means, covariances, and covariances of neighbouring steps, of q."""
        back = self._backward
        xp = ops.xp(back.g)
        cov = _transposed(back.W) @ back.W
        if self._in_parallel:
            _, mean, cov = associative_scan(_then_moments, (back.E, back.g, cov), reverse=True)
        else:
            last = back.g[-1], cov[-1]

            def step(carry: tuple[Array, ...], x: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
                E, g, L = x
                after = _times(E, carry[0]) + g, _sandwich(E, carry[1]) + L
                return after, after

            parts = (xp.flip(a[:-1], axis=0) for a in (back.E, back.g, cov))
            _, (means, covs) = ops.scan(step, last, tuple(parts))
            mean = xp.concat([xp.flip(means, axis=0), last[0][None]], axis=0)
            cov = xp.concat([xp.flip(covs, axis=0), last[1][None]], axis=0)
        return Moments(mean, cov, cov[1:] @ _transposed(back.E[:-1]))

    def sample(self, noise: Array) -> Array:
        """A draw of all steps from standard normal noise `[T, ..., D]`, differentiable in the chain.

        Batch axes of the noise in front of the chain's are draws.
        """
        xp, draws = ops.xp(noise), noise.ndim - 2
        back = self._backward
        E, g, W = behind_steps(back.E, 2, draws), behind_steps(back.g, 1, draws), behind_steps(back.W, 2, draws)
        h = _times(_transposed(W), noise) + g
        E = xp.broadcast_to(E, (*h.shape, self.dim))
        if self._in_parallel:
            return associative_scan(_then, (E, h), reverse=True)[1]

        def step(later: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
            z = _times(x[0], later) + x[1]
            return z, z

        _, found = ops.scan(step, h[-1], (xp.flip(E[:-1], axis=0), xp.flip(h[:-1], axis=0)))
        return xp.concat([xp.flip(found, axis=0), h[-1:]], axis=0)

    def noise_of(self, z: Array) -> Array:
        """The noise `[T, ..., D]` that `sample` makes z from."""
        back, xp, draws = self._backward, ops.xp(z), z.ndim - 2
        E, g, W = behind_steps(back.E, 2, draws), behind_steps(back.g, 1, draws), behind_steps(back.W, 2, draws)
        later = xp.concat([z[1:], ops.zeros(tuple(z[:1].shape), z)], axis=0)
        rest = (z - _times(E, later) - g)[..., None]
        return xp.linalg.solve(xp.broadcast_to(_transposed(W), (*z.shape, self.dim)), rest)[..., 0]

    def log_prob(self, z: Array) -> Array:
        """`log q(z)`, `[T, ..., D] -> [...]`, in nats."""
        return self._log_joint(z) - self.log_normalizer()

    def expected_log_prob(self, of: Moments) -> Array:
        """`E log q(z)` over any z with these moments, `[...]`, in nats."""
        batch = max(of.mean.ndim - 2, len(self.batch_shape))
        of = Moments(*(behind_steps(x, event, batch) for x, event in zip(of, (1, 2, 2), strict=True)))
        xp, D, c = ops.xp(of.mean), self.dim, self._aligned(batch)
        F = c.transition
        error = of.mean[1:] - _times(F, of.mean[:-1]) - c.bias
        both = F @ _transposed(of.cross)
        spread = of.cov[1:] - both - _transposed(both) + _sandwich(F, of.cov[:-1])
        total = _expected_log_normal(of.mean[0] - c.mean, of.cov[0], c.cov, D)
        total = total + xp.sum(_expected_log_normal(error, spread, c.noise, D), axis=0)
        if c.precision is not None and c.shift is not None:
            square = of.cov + of.mean[..., :, None] * of.mean[..., None, :]
            psi = xp.sum(c.shift * of.mean, axis=-1) - 0.5 * xp.sum(c.precision * square, axis=(-2, -1))
            total = total + xp.sum(psi, axis=0) - self.log_normalizer()
        return total

    def entropy(self) -> Array:
        """`-E log q(z)`, `[...]`, in nats."""
        return -self.expected_log_prob(self.moments())

    def kl(self, other: GaussianChain) -> Array:
        """`KL(q || other)`, `[...]`, in nats. Of one with the same prior it is `E sum_t log psi_t - log Z`."""
        moments = self.moments()
        return self.expected_log_prob(moments) - other.expected_log_prob(moments)

    @property
    def _in_parallel(self) -> bool:
        return self.steps == 1 or in_parallel(self.method, self.mean)

    def _log_joint(self, z: Array) -> Array:
        xp, D, c = ops.xp(z), self.dim, self._aligned(z.ndim - 2)
        total = _log_normal(z[0] - c.mean, c.cov, D)
        total = total + xp.sum(_log_normal(z[1:] - _times(c.transition, z[:-1]) - c.bias, c.noise, D), axis=0)
        if c.precision is not None and c.shift is not None:
            psi = xp.sum((c.shift - 0.5 * _times(c.precision, z)) * z, axis=-1)
            total = total + xp.sum(psi, axis=0)
        return total

    def _aligned(self, batch: int | None = None) -> GaussianChain:
        """The same with as many batch axes in every argument, of size one where it has none."""
        n = len(self.batch_shape) if batch is None else batch
        return replace(
            self,
            transition=behind_steps(self.transition, 2, n),
            bias=behind_steps(self.bias, 1, n),
            noise=behind_steps(self.noise, 2, n),
            precision=None if self.precision is None else behind_steps(self.precision, 2, n),
            shift=None if self.shift is None else behind_steps(self.shift, 1, n),
            validate=False,
        )

    @property
    def _backward(self) -> _Backward:
        """The conditionals of q from the last step to the first."""
        return ops.remember(self.mean, self._kept, "backward", self._conditionals)

    def _conditionals(self) -> _Backward:
        f, c = self.filter(), self._aligned()
        xp = ops.xp(f.mean)
        lower = xp.linalg.cholesky(c.noise)
        whitened = ops.solve_triangular(lower, c.transition)
        precision = _transposed(whitened) @ whitened
        W, _ = _root(f.cov[:-1], precision)
        L = _transposed(W) @ W
        E = L @ _transposed(ops.solve_triangular(lower, whitened, transposed=True))
        g = f.mean[:-1] - _times(E, _times(c.transition, f.mean[:-1]) + c.bias)
        last = _transposed(xp.linalg.cholesky(f.cov[-1:]))
        zero = ops.zeros(tuple(last.shape), last)
        E = xp.broadcast_to(E, (E.shape[0], *last.shape[1:]))
        return _Backward(
            xp.concat([E, zero], axis=0),
            xp.concat([g, f.mean[-1:]], axis=0),
            xp.concat([W, last], axis=0),
        )


def steps_in_front(
    mean: Array,
    cov: Array,
    transition: Array,
    bias: Array,
    noise: Array,
    precision: Array | None = None,
    shift: Array | None = None,
) -> dict[str, Array]:
    """The arguments of a distribution, `[..., T, *event]`, as a `GaussianChain` takes them."""
    matrices = {"transition": transition, "noise": noise, "precision": precision}
    vectors = {"bias": bias, "shift": shift}
    moved = {"mean": mean, "cov": cov}
    for event, arrays in ((2, matrices), (1, vectors)):
        moved |= {n: ops.xp(x).moveaxis(x, -event - 1, 0) for n, x in arrays.items() if x is not None}
    return moved


def observed(
    y: Array, matrix: Array, offset: Array, variance: Array, known: Array | None = None
) -> tuple[Array, Array, Array]:
    """`log N(y_t; matrix_t z_t + offset_t, diag(variance_t))` as a potential of z: precision, shift and a constant.

    y `[..., P]` of every step, matrix `[..., P, D]`, offset and variance `[..., P]`; `known`, booleans of y's shape,
    leaves out coordinates that are missing (they may be NaN) and with them whole steps. The sum of the constants
    `[...]` over steps is what `log Z` lacks to the log evidence of y, in nats.

    Example:
        >>> import jax.numpy as jnp
        >>> y = jnp.array([[0.3], [jnp.nan]])
        >>> J, h, c = observed(y, jnp.ones((1, 1)), jnp.zeros(1), jnp.ones(1), known=~jnp.isnan(y))
        >>> J[:, 0, 0].tolist(), [round(float(x), 3) for x in (*h[:, 0], c[0])]
        ([1.0, 0.0], [0.3, 0.0, -0.964])
    """
    xp = ops.xp(y)
    error = y - offset
    weight = 1.0 / variance + 0.0 * ops.zeros(tuple(error.shape), error)
    log_terms = LOG_2PI - xp.log(weight)
    if known is not None:
        zero = ops.zeros(tuple(error.shape), error)
        error, weight = xp.where(known, error, zero), xp.where(known, weight, zero)
        log_terms = xp.where(known, log_terms, zero)
    scaled = weight[..., :, None] * matrix
    precision = _transposed(matrix + ops.zeros(tuple(scaled.shape), scaled)) @ scaled
    shift = _times(_transposed(scaled), error)
    return precision, shift, -0.5 * xp.sum(log_terms + weight * error * error, axis=-1)


# Elements of the parallel filter: z_t | z_{t-1} is N(A z_{t-1} + b, C) with the weight exp(e' z - z' J z / 2 + c).


def _element(F: Array, m: Array, Q: Array, J: Array, h: Array) -> tuple[Array, ...]:
    """One step: `N(z_t; F z_{t-1} + m, Q) psi_t(z_t)`."""
    W, log_det = _root(Q, J)
    C = _transposed(W) @ W
    A, G = F - C @ (J @ F), J - _sandwich(J, C)
    g = h - _times(J, _times(C, h))
    r = h - _times(J, m)
    b = m + _times(C, r)
    c = _dot(r, _times(C, r)) / 2 + _dot(h, m) - _dot(m, _times(J, m)) / 2 - log_det
    return A, b, C, _transposed(F) @ G @ F, _times(_transposed(F), g - _times(G, m)), c


def _then_filter(one: tuple[Array, ...], two: tuple[Array, ...]) -> tuple[Array, ...]:
    A1, b1, C1, J1, e1, c1 = one
    A2, b2, C2, J2, e2, c2 = two
    A, b, C, J, e, c = _element(A1, b1, C1, J2, e2)
    return A2 @ A, _times(A2, b) + b2, _sandwich(A2, C) + C2, J + J1, e + e1, c + c1 + c2


def _then_moments(one: tuple[Array, ...], two: tuple[Array, ...]) -> tuple[Array, ...]:
    return one[0] @ two[0], _times(one[0], two[1]) + one[1], _sandwich(one[0], two[2]) + one[2]


def _then(one: tuple[Array, ...], two: tuple[Array, ...]) -> tuple[Array, ...]:
    return one[0] @ two[0], _times(one[0], two[1]) + one[1]


def _root(cov: Array, precision: Array) -> tuple[Array, Array]:
    """W with `W'W = (cov^-1 + precision)^-1`, and `log |I + cov precision| / 2`."""
    xp = ops.xp(cov)
    L = xp.linalg.cholesky(cov)
    inside = _transposed(L) @ precision @ L
    B = xp.linalg.cholesky(ops.eye(cov.shape[-1], cov) + (inside + _transposed(inside)) / 2)
    log_det = xp.sum(xp.log(xp.linalg.diagonal(B)), axis=-1)
    return ops.solve_triangular(B, _transposed(L)), log_det


def _updated(mean: Array, cov: Array, precision: Array, shift: Array) -> tuple[Array, Array, Array]:
    """Mean and covariance of `N(z; mean, cov) psi(z)`, and the log of its integral."""
    W, log_det = _root(cov, precision)
    r = shift - _times(precision, mean)
    half = _times(W, r)
    new = mean + _times(_transposed(W), half)
    gain = _dot(half, half) / 2 + _dot(shift, mean) - _dot(mean, _times(precision, mean)) / 2 - log_det
    return new, _transposed(W) @ W, gain


def _log_normal(error: Array, cov: Array, D: int) -> Array:
    xp = ops.xp(error)
    L = xp.linalg.cholesky(cov)
    white = ops.solve_triangular(L, error[..., None])[..., 0]
    return -0.5 * xp.sum(white * white, axis=-1) - xp.sum(xp.log(xp.linalg.diagonal(L)), axis=-1) - 0.5 * D * LOG_2PI


def _expected_log_normal(error: Array, spread: Array, cov: Array, D: int) -> Array:
    """`E log N(x; 0, cov)` of an x with this mean and covariance."""
    xp = ops.xp(error)
    inverse = ops.solve_triangular(xp.linalg.cholesky(cov), ops.eye(D, cov))
    inside = inverse @ spread @ _transposed(inverse)
    return _log_normal(error, cov, D) - 0.5 * xp.sum(xp.linalg.diagonal(inside), axis=-1)


def _joined(first: Array, rest: Array, shape: tuple[int, ...]) -> Array:
    """Along the steps, both broadcast."""
    xp = ops.xp(first)
    parts = [xp.broadcast_to(x, (x.shape[0], *shape[1:])) for x in (first, rest)]
    return xp.concat(parts, axis=0)


def _times(matrix: Array, vector: Array) -> Array:
    return (matrix @ vector[..., None])[..., 0]


def _dot(a: Array, b: Array) -> Array:
    return ops.xp(a).sum(a * b, axis=-1)


def _transposed(matrix: Array) -> Array:
    return ops.xp(matrix).matrix_transpose(matrix)


def _sandwich(matrix: Array, inner: Array) -> Array:
    """`matrix inner matrix'`, symmetric to the last bit."""
    found = matrix @ inner @ _transposed(matrix)
    return (found + _transposed(found)) / 2


def _diagonal(x: Array) -> Array:
    return x[..., :, None] * ops.eye(x.shape[-1], x)


def _check_positive(name: str, x: Array, of: str = "GaussianChain") -> None:
    found = ops.concrete(x)
    if found is None or not found.size:
        return
    smallest = np.linalg.eigvalsh(found.astype(float))[..., 0]
    if not (smallest > 0).all():
        raise DataError(
            f"{name} of a {of} is not positive definite: its smallest eigenvalue is {smallest.min():.3g}. Add "
            f"a small multiple of the identity, or take the coordinates without noise out of the state."
        )
