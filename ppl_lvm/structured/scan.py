"""Scans over the first axis of arrays: one step after the other, or in log depth where steps compose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ppl_lvm import ops
from ppl_lvm.ops import Array

Arrays = tuple[Array, ...]
Combine = Callable[[Arrays, Arrays], Arrays]
Act = Callable[[Arrays, Arrays], Arrays]
Method = Literal["auto", "sequential", "parallel"]
"""How the steps of a chain are taken. "auto" is "parallel" where every step costs a call (torch) or a kernel (a GPU),
otherwise "sequential"; the numbers are the same to rounding."""


def in_parallel(method: Method, like: Array) -> bool:
    """Whether a method stands for the parallel scan.

    Raises:
        ValueError: it is none of the three.
    """
    if method not in ("auto", "sequential", "parallel"):
        raise ValueError(f"method={method!r} was asked for; there are 'auto', 'sequential' and 'parallel'.")
    return ops.steps_are_dear(like) if method == "auto" else method == "parallel"


def associative_scan(combine: Combine, elements: Sequence[Array], reverse: bool = False) -> Arrays:
    """All prefixes `e_1, e_1 * e_2, ...` (suffixes `.., e_{T-1} * e_T, e_T`) along the first axis.

    `combine(earlier, later)` is associative and takes stacks of elements at once; it is called about `2 log2 T` times
    on T elements in all, the work of a sequential scan twice over.

    Example:
        >>> import jax.numpy as jnp
        >>> associative_scan(lambda a, b: (a[0] + b[0],), [jnp.arange(5)])[0].tolist()
        [0, 1, 3, 6, 10]
        >>> associative_scan(lambda a, b: (a[0] + b[0],), [jnp.arange(5)], reverse=True)[0].tolist()
        [10, 10, 9, 7, 4]
    """
    elements = tuple(elements)
    if not reverse:
        return _prefixes(combine, elements)
    xp = ops.xp(elements[0])
    backwards = tuple(xp.flip(e, axis=0) for e in elements)
    found = _prefixes(lambda later, earlier: combine(earlier, later), backwards)
    return tuple(xp.flip(e, axis=0) for e in found)


def _prefixes(combine: Combine, elements: Arrays) -> Arrays:
    n = elements[0].shape[0]
    if n < 2:
        return elements
    odd = _prefixes(combine, combine(tuple(e[: n - 1 : 2] for e in elements), tuple(e[1::2] for e in elements)))
    if n == 2:
        even = tuple(e[:1] for e in elements)
    else:
        before = tuple(o[: (n - 1) // 2] for o in odd)
        xp = ops.xp(elements[0])
        rest = combine(before, tuple(e[2::2] for e in elements))
        even = tuple(xp.concat([e[:1], r], axis=0) for e, r in zip(elements, rest, strict=True))
    return tuple(_interleaved(e, o) for e, o in zip(even, odd, strict=True))


def _interleaved(even: Array, odd: Array) -> Array:
    """`even_0, odd_0, even_1, ...`; there may be one more of the first."""
    xp, n = ops.xp(even), odd.shape[0]
    pairs = xp.reshape(xp.stack([even[:n], odd], axis=1), (2 * n, *odd.shape[1:]))
    return pairs if even.shape[0] == n else xp.concat([pairs, even[n:]], axis=0)


def pairs(combine: Combine, elements: Sequence[Array], n: int) -> list[Arrays]:
    """The tree over n elements: they, their neighbours combined, those of these, up to one.

    `combine(earlier, later)` is associative and takes stacks of elements at once, n of them in all levels together. An
    array with one entry for all n keeps one entry in every level.
    """
    levels = [tuple(elements)]
    while n > 1:
        below, n = levels[-1], n // 2
        levels.append(combine(_every_other(below, 0, 2 * n), _every_other(below, 1, 2 * n)))
    return levels


def states(act: Act, start: Sequence[Array], levels: Sequence[Arrays], n: int) -> Arrays:
    """The state after every one of the n elements at the bottom of `pairs`: n calls' work in `log2 n` calls.

    `act(state, element)` is associative with `combine`. States, too, are stacked along the first axis.

    Example:
        >>> import jax.numpy as jnp
        >>> add = lambda a, b: (a[0] + b[0],)
        >>> levels = pairs(add, [jnp.arange(1, 6)], 5)
        >>> states(add, [jnp.array([10])], levels, 5)[0].tolist()
        [11, 13, 16, 20, 25]
    """
    start = tuple(start)
    found = act(start, levels[-1])
    for depth in reversed(range(len(levels) - 1)):
        size, xp = n >> depth, ops.xp(start[0])
        before = tuple(xp.concat([s, f[: (size - 1) // 2]], axis=0) for s, f in zip(start, found, strict=True))
        even = act(before, _every_other(levels[depth], 0, size))
        found = tuple(_interleaved(e, o) for e, o in zip(even, found, strict=True))
    return found


def in_turn(
    step: Callable[[Any, Arrays], tuple[Any, Any]], init: Any, xs: Sequence[Array], n: int, reverse: bool = False
) -> tuple[Any, Any]:
    """`ops.scan` over n steps, of arrays of which some have one entry for all."""
    own = [i for i, x in enumerate(xs) if x.shape[0] == n]

    def with_shared(carry: Any, now: Arrays) -> tuple[Any, Any]:
        given = [x[0] if x.shape[0] else x for x in xs]
        for i, x in zip(own, now, strict=True):
            given[i] = x
        return step(carry, tuple(given))

    return ops.scan(with_shared, init, tuple(xs[i] for i in own), reverse)


def _every_other(elements: Arrays, first: int, stop: int) -> Arrays:
    return tuple(e if e.shape[0] == 1 else e[first:stop:2] for e in elements)


def behind_steps(x: Array, event: int, batch: int) -> Array:
    """`[T, ..., *event]` with axes of size one behind T, for as many batch axes as `batch`."""
    inner = tuple(x.shape[1:])
    return ops.xp(x).reshape(x, (x.shape[0], *(1,) * (batch + event - len(inner)), *inner))
