"""Small dense matrices in batches, on `ops`: what the algorithms here share."""

from __future__ import annotations

import math

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array

LOG_2PI = math.log(2.0 * math.pi)


def log_normal(error: Array, cov: Array, D: int) -> Array:
    """`log N(x; 0, cov)`, in nats."""
    L = ops.cholesky(cov)
    white = ops.solve_triangular(L, error[..., None])[..., 0]
    return -0.5 * dot(white, white) - log_diagonal(L) - 0.5 * D * LOG_2PI


def expected_log_normal(error: Array, spread: Array, cov: Array, D: int) -> Array:
    """`E log N(x; 0, cov)` of an x with this mean and covariance."""
    xp = ops.xp(error)
    inverse = ops.solve_triangular(ops.cholesky(cov), ops.eye(D, cov))
    inside = inverse @ spread @ inverse.mT
    return log_normal(error, cov, D) - 0.5 * xp.sum(xp.linalg.diagonal(inside), axis=-1)


def times(matrix: Array, vector: Array) -> Array:
    return (matrix @ vector[..., None])[..., 0]


def dot(a: Array, b: Array) -> Array:
    return ops.xp(a).sum(a * b, axis=-1)


def sandwich(matrix: Array, inner: Array) -> Array:
    return matrix @ inner @ matrix.mT


def log_diagonal(lower: Array) -> Array:
    """`log |lower|` of a triangular matrix with a positive diagonal."""
    xp = ops.xp(lower)
    return xp.sum(xp.log(xp.linalg.diagonal(lower)), axis=-1)


def diagonal(x: Array) -> Array:
    return x[..., :, None] * ops.eye(x.shape[-1], x)


def check_positive(name: str, x: Array, of: str) -> None:
    """Raises DataError where a covariance whose values are at hand is not positive definite."""
    found = ops.concrete(x)
    if found is None or not found.size:
        return
    found = found.astype(float)
    # By correlations: where units of coordinates are far apart, the smallest eigenvalue is below rounding.
    size = np.sqrt(np.maximum(np.linalg.diagonal(found), 0.0))
    unit = np.where(size > 0, size, 1.0)
    correlations = found / unit[..., :, None] / unit[..., None, :]
    if not ((size > 0).all() and (np.linalg.eigvalsh(correlations) > 0).all()):
        smallest = np.linalg.eigvalsh(found)[..., 0]
        raise DataError(
            f"{name} of a {of} is not positive definite: its smallest eigenvalue is {smallest.min():.3g}. Add "
            f"a small multiple of the identity, or take the coordinates without noise out of the state."
        )
