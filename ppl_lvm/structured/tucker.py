"""Tensors with continuous modes: coordinates as places on a grid, and the messages of a Tucker decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array


@dataclass(frozen=True, eq=False)
class Grid:
    """Where entries are: `values[n, k] = coordinates[k][index[n, k]]`."""

    coordinates: tuple[tuple[float, ...], ...]
    """Of every mode its different coordinates, increasing."""
    index: np.ndarray
    """`[rows, K]`, integers from 0."""


def grid(values: Any) -> Grid:
    """The different coordinates of every mode, and the place of each entry among them.

    values `[rows, K]` are the coordinates of all entries, those that are held out included, in any order and unit.
    Equal ones are merged; round them first where nearly equal ones should be.

    Raises:
        DataError: values are not `[rows, K]`, or not all finite numbers.

    Example:
        >>> found = grid([[2.0, 0.1], [-1.0, 0.7], [2.0, 0.7]])
        >>> found.coordinates, found.index.tolist()
        (((-1.0, 2.0), (0.1, 0.7)), [[1, 0], [0, 1], [1, 1]])
    """
    try:
        found = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as cause:
        raise DataError(f"Coordinates of entries must be numbers [rows, modes]; found {values!r:.80}.") from cause
    if found.ndim != 2 or 0 in found.shape:
        raise DataError(
            f"Coordinates of entries have shape {found.shape}; they are [rows, modes], one of each mode for every row."
        )
    if not np.isfinite(found).all():
        row, mode = (int(i) for i in np.argwhere(~np.isfinite(found))[0])
        raise DataError(
            f"The coordinate of row {row} in mode {mode} is {found[row, mode]}. An entry must have a finite coordinate "
            f"in every mode; leave out rows that do not."
        )
    modes = [np.unique(column, return_inverse=True) for column in found.T]
    index = np.stack([places for _, places in modes], axis=1)
    return Grid(tuple(tuple(unique.tolist()) for unique, _ in modes), index)


def at(factor: Array, index: Array) -> Array:
    """Values `[..., T, R]` of functions at places `[rows]` of their grid, `[..., rows, R]`.

    A place that is not on the grid gives NaN where its number cannot be looked at, in a traced computation: neither
    library would complain of it there.

    Raises:
        DataError: places are no integers, or not on the grid (looked for where values are at hand).

    Example:
        >>> import jax.numpy as jnp
        >>> at(jnp.array([[0.5], [0.7], [0.9]]), jnp.array([2, 0])).tolist()
        [[0.8999999761581421], [0.5]]
    """
    xp, T = ops.xp(factor), int(factor.shape[-2])
    if xp.isdtype(index.dtype, "real floating"):
        raise DataError(f"The index of entries has dtype {index.dtype}; it must be integers from 0 to {T - 1}.")
    found = ops.concrete(index)
    if found is not None and ((found < 0) | (found >= T)).any():
        row = int(np.argmax((found < 0) | (found >= T)))
        raise DataError(
            f"The index of row {row} of a batch is {int(found[row])}, but its mode has {T} coordinates, 0 to {T - 1}. "
            f"ppl_lvm.structured.tucker.grid makes coordinates and index of all entries together."
        )
    picked = factor[..., xp.clip(index, 0, T - 1), :]
    return xp.where(((index >= 0) & (index < T))[:, None], picked, 0.0 * picked + float("nan"))


class Belief(NamedTuple):
    """What is known of factors or of the core."""

    mean: Array
    """`[..., R]`."""
    second: Array
    """`E x x'`, `[..., R, R]`."""


def messages(
    y: Array, index: Array, modes: Sequence[Belief], core: Belief, weight: Array, mode: int | None
) -> tuple[Array, Array]:
    """What entries say of one mode's factors (the first is 0), or with None of the core, given beliefs of all others:
    precision and shift of a Gaussian potential.

        y_n = W' (u_1(s_n1) kron .. kron u_K(s_nK)) + noise,   b_n = d y_n / d u_mode
        precision_j = weight sum_{n at j} E b_n b_n'           shift_j = weight sum_{n at j} y_n E b_n

    y `[rows]`, index `[rows, K]`, beliefs of modes `[T_k, R_k]`, of the core `[R_1 .. R_K]` flat, weight the precision
    of the noise. Returned are `[T, R, R]` and `[T, R]`, of the core `[P, P]` and `[P]`. As a potential of the mode's
    prior they are its best factor in a mean field of modes and core: coordinate ascent.

    Source: Fang, Yu, Wang, Li, Kirby and Zhe (2024), arXiv:2311.04829, whose conditional expectation propagation has
    these messages.

    Example:
        >>> import jax.numpy as jnp
        >>> u, w = Belief(jnp.array([[2.0]]), jnp.array([[[4.0]]])), Belief(jnp.array([3.0]), jnp.array([[9.0]]))
        >>> J, h = messages(jnp.array([1.0]), jnp.array([[0, 0]]), [u, u], w, jnp.array(0.5), mode=1)
        >>> float(J[0, 0, 0]), float(h[0, 0])
        (18.0, 3.0)
    """
    xp, rows = ops.xp(y), y.shape[0]
    ranks = [int(m.mean.shape[-1]) for m in modes]
    if mode is None:
        first, square = ops.zeros((rows, 1), y) + 1.0, ops.zeros((rows, 1, 1), y) + 1.0
        for k, m in enumerate(modes):
            u, uu = m.mean[index[:, k]], m.second[index[:, k]]
            first = xp.reshape(first[:, :, None] * u[:, None, :], (rows, -1))
            square = square[:, :, None, :, None] * uu[:, None, :, None, :]
            square = xp.reshape(square, (rows, first.shape[1], first.shape[1]))
        return weight * xp.sum(square, axis=0), weight * xp.sum(y[:, None] * first, axis=0)
    # Of every entry the core and its square; each mode takes its own axis away, but the one that is asked about.
    first, square = core.mean[None, :], core.second[None, :, :]
    for k, m in enumerate(modes):
        left, r = first.shape[1] // ranks[k], ranks[k]
        first = xp.reshape(first, (-1, r, left))
        square = xp.reshape(square, (-1, r, left, r, left))
        if k == mode:  # to the end of the axes, where it is when all others are gone
            first, square = xp.moveaxis(first, 1, 2), xp.moveaxis(xp.moveaxis(square, 1, 2), 3, 4)
        else:
            u, uu = m.mean[index[:, k]], m.second[index[:, k]]
            first = xp.sum(u[:, :, None] * first, axis=1)
            square = xp.sum(uu[:, :, None, :, None] * square, axis=(1, 3))
        n, size = first.shape[0], r * left if k == mode else left
        first, square = xp.reshape(first, (n, size)), xp.reshape(square, (n, size, size))
    one = ops.one_hot(index[:, mode], int(modes[mode].mean.shape[0]))
    one = xp.astype(one, y.dtype)
    precision = xp.sum(one[:, :, None, None] * square[:, None, :, :], axis=0)
    return weight * precision, weight * xp.sum(one[:, :, None] * (y[:, None] * first)[:, None, :], axis=0)
