"""Gaussian processes with Matérn covariance as chains: exact inference at a cost linear in the number of times."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array

# In steps of 1 / rate and with the k-th derivative divided by rate^k, a process of each order follows the same equation
# whatever its lengthscale: dz = F z du + last unit vector times white noise, with these F and stationary covariances.
_DRIFT = {0.5: [[-1]], 1.5: [[0, 1], [-1, -2]], 2.5: [[0, 1, 0], [0, 0, 1], [-1, -3, -3]]}
_STATIONARY = {0.5: [[1]], 1.5: [[1, 0], [0, 1]], 2.5: [[1, 0, -1 / 3], [0, 1 / 3, 0], [-1 / 3, 0, 1]]}


class StateSpace(NamedTuple):
    """Processes as a chain: `f(times_t) = read z_t`."""

    chain: dict[str, Array]
    """`mean`, `cov`, `transition`, `bias` and `noise`, as a distribution `ppl.structured.GaussianChain` takes them."""
    read: Array
    """`[L, D]`."""


def matern(times: Array, lengthscale: Array, scale: Array, order: float = 1.5) -> StateSpace:
    """L independent Gaussian processes `f_l ~ GP(0, scale_l^2 k(|t - t'| / lengthscale_l))` at increasing times.

        order 1/2   k(r) = exp(-r)
        order 3/2   k(r) = (1 + sqrt(3) r) exp(-sqrt(3) r)
        order 5/2   k(r) = (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r)

    times `[..., T]` in any unit, lengthscale `[L]` in the same, scale `[L]` in that of f, all of one library. The state
    of a process is f and its first `order - 1/2` derivatives, the k-th divided by `(sqrt(2 order) / lengthscale)^k`;
    states of all processes are stacked, D numbers. The covariance of a step's noise is a sum of lower incomplete gamma
    functions of the step, no difference of two covariances, so that small steps lose no digits.

    Raises:
        ValueError: there is no such order.
        DataError: times do not increase. Sort them, and merge equal ones: a potential at a time is the sum of those of
            all data there, `unique, index = numpy.unique(times, return_inverse=True)`. (Looked for where values are at
            hand, not in a traced computation.)

    Source: Hartikainen and Särkkä (2010), Kalman filtering and smoothing solutions to temporal Gaussian process
    regression models; Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 4.2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from ppl_lvm.structured.gaussian_chain import GaussianChain, observed
        >>> process = matern(jnp.array([0.0, 0.5, 2.0]), jnp.ones(1), jnp.ones(1), order=0.5)
        >>> [round(float(a), 3) for a in process.chain["transition"][:, 0, 0]]
        [0.607, 0.223]
        >>> J, h, _ = observed(jnp.array([[1.0], [0.0], [0.0]]), process.read, jnp.zeros(1), 0.1 * jnp.ones(1))
        >>> posterior = GaussianChain(**process.chain, precision=J, shift=h).moments()
        >>> [round(float(m), 3) for m in (posterior.mean @ process.read.mT)[:, 0]]
        [0.869, 0.072, 0.002]
    """
    if order not in _DRIFT:
        raise ValueError(f"order={order!r} was asked for; there are 0.5, 1.5 and 2.5.")
    _check_increasing(times)
    xp, F, stationary = ops.xp(lengthscale), np.array(_DRIFT[order], float), np.array(_STATIONARY[order])
    d, processes = len(F), lengthscale.shape[0]
    # exp(F u) = exp(-u) (I + N u + N^2 u^2 / 2), as N = F + I is nilpotent.
    powers = np.stack([np.linalg.matrix_power(F + np.eye(d), k) / math.factorial(k) for k in range(d)])
    columns, density = powers[:, :, -1], -2.0 * (F @ stationary)[-1, -1]
    squares = np.zeros((2 * d - 1, d, d))
    for k in range(d):
        for m in range(d):
            both = math.factorial(k + m) / 2 ** (k + m + 1)
            squares[k + m] += density * both * np.outer(columns[k], columns[m])
    u = (times[..., 1:] - times[..., :-1])[..., None] * (math.sqrt(2.0 * order) / lengthscale)
    decay, variance = xp.exp(-u), (scale * scale)[..., None, None]
    one = ops.zeros((processes,), lengthscale) + 1.0
    transition = _matrix(powers, [decay * u**k for k in range(d)])
    noise = variance * _matrix(squares, _lower_gammas(2.0 * u, 2 * d - 1))
    chain = {
        "mean": ops.zeros((processes * d,), lengthscale),
        "cov": _blocks(variance * _matrix(stationary[None], [one])),
        "transition": _blocks(transition),
        "bias": ops.zeros((*u.shape[:-1], processes * d), lengthscale),
        "noise": _blocks(noise),
    }
    first = ops.eye(d, lengthscale)[0]
    read = ops.eye(processes, lengthscale)[:, :, None] * first
    return StateSpace(chain, xp.reshape(read, (processes, processes * d)))


def _matrix(coefficients: np.ndarray, basis: list[Array]) -> Array:
    """`sum_k coefficients_k basis_k`, matrices `[..., d, d]`."""
    xp, d = ops.xp(basis[0]), coefficients.shape[-1]

    def entry(i: int, j: int) -> Any:
        terms = [float(c) * b for c, b in zip(coefficients[:, i, j], basis, strict=True) if c]
        return sum(terms[1:], terms[0]) if terms else 0.0 * basis[0]

    return xp.stack([xp.stack([entry(i, j) for j in range(d)], axis=-1) for i in range(d)], axis=-2)


def _blocks(x: Array) -> Array:
    """`[..., L, d, d]` along the diagonal of `[..., L d, L d]`."""
    L, d = x.shape[-3], x.shape[-1]
    wide = ops.eye(L, x)[:, None, :, None] * x[..., :, :, None, :]
    return ops.xp(x).reshape(wide, (*x.shape[:-3], L * d, L * d))


def _lower_gammas(x: Array, most: int) -> list[Array]:
    """`1 - exp(-x) sum_{j < a} x^j / j!` for a from 1 to `most`, without that difference where x is small."""
    xp = ops.xp(x)
    small, decay = x < 2.0, xp.exp(-x)
    near, far = xp.where(small, x, 0.0 * x + 1.0), xp.where(small, 0.0 * x + 2.0, x)
    j = xp.cumulative_sum(ops.zeros((20,), x) + 1.0, axis=0)  # beyond these, terms are below the rounding of float64
    # x^j most! / (most + j)!, as one array: term after term they would be most of the program that is compiled.
    terms = xp.exp(j * xp.log(near)[..., None] - xp.cumulative_sum(xp.log(j + most), axis=0))
    tail = 1.0 + xp.sum(terms, axis=-1)
    series = xp.exp(-near) * near**most / math.factorial(most) * tail
    direct = 1.0 - xp.exp(-far) * sum(far**j / math.factorial(j) for j in range(most))
    found = [xp.where(small, series, direct)]
    for a in range(most - 1, 0, -1):
        found.insert(0, found[0] + decay * x**a / math.factorial(a))
    return found


def _check_increasing(times: Array) -> None:
    found = ops.concrete(times)
    if found is None:
        return
    step = np.diff(found, axis=-1)
    if not (step > 0).all():
        at = tuple(int(i) for i in np.argwhere(~(step > 0))[0])
        before, after = found[at], found[(*at[:-1], at[-1] + 1)]
        raise DataError(
            f"times of a Matérn process must increase; at step {at[-1]} they go from {before:g} to {after:g}. Sort "
            f"them, and merge equal ones: unique, index = numpy.unique(times, return_inverse=True)."
        )
