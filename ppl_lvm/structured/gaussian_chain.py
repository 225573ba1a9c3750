"""Linear-Gaussian chains times Gaussian potentials: filter, smoother, normaliser, joint draws, moments, entropy, KL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array
from ppl_lvm.structured.matrices import (
    LOG_2PI,
    check_positive,
    diagonal,
    expected_log_normal,
    log_normal,
    sandwich,
    times,
)
from ppl_lvm.structured.scan import (
    Arrays,
    Combine,
    Method,
    behind_steps,
    in_parallel,
    in_turn,
    pairs,
    states,
)


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


class _Forward(NamedTuple):
    """`q(z_t | potentials up to t)`; batches of roots as wide as those of the matrices, not of the vectors."""

    mean: Array
    root: Array
    """`root root'` is the covariance; no more is said of it."""
    log_z: Array
    """Of all potentials, `[...]`."""


class _InTurn(NamedTuple):
    """What a pass from step to step finds; of what nobody asks for XLA computes nothing."""

    all: _Forward
    last: _Forward
    conditionals: Arrays
    """E, g and cov, of wide chains."""


class _Conditionals(NamedTuple):
    """`z = E neighbour + g + L noise` of all steps but the one drawn first, `Normal(first_g, first_cov)`; `cov = LL'`.

    That is the last step, and the neighbour the one after; of a chain without potentials the first, and the one before.
    """

    E: Array
    g: Array
    cov: Array
    first_g: Array
    first_cov: Array


WIDE = 16
"""States from which on conditionals are found inside the scan, where it takes a call for every step anyway: matrices of
this size are quicker while they are still at hand, smaller ones are quicker in a stack."""


@dataclass(frozen=True)
class GaussianChain:
    """`q(z) = 1/Z p(z) prod_t psi_t(z_t)` over T steps of D numbers, with

        p(z)     = N(z_1; mean, cov) prod_{t>1} N(z_t; transition_t z_{t-1} + bias_t, noise_t)
        psi_t(z) = exp(shift_t' z - z' precision_t z / 2)

    Steps are the first axis of `transition` and `noise` `[T - 1, ..., D, D]`, `bias` `[T - 1, ..., D]`, `precision`
    `[T, ..., D, D]` and `shift` `[T, ..., D]`; the axes between are batches, which broadcast. In all but `bias`, which
    says how many steps there are, that first axis may be 1: one matrix for all steps, whose factors are computed once.
    Likewise no covariance is computed for more than the batch of the matrices. Potentials are in information form, so
    that a step without data has zeros in both, and a precision may be singular. `cov` and `noise` are positive definite
    (with `validate=False` what is not ends as NaN). Without potentials (None) Z = 1 and q = p.

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
            allowed = (first,) if name == "bias" else (1, first)
            wrong = first is not None and (len(shape) < len(event) + 1 or shape[0] not in allowed)
            if wrong or shape[-len(event) :] != event:
                want = ((first,) if first is not None else ()) + ("...",) + event
                shared = "" if first is None or name == "bias" else ", or with 1 in front if all steps share it"
                raise DataError(
                    f"{name} has shape {shape}; mean says D = {D} and bias {steps} transitions, so it is "
                    f"{want}{shared}."
                )
        if self.validate:
            for name in ("cov", "noise"):
                check_positive(name, getattr(self, name), "GaussianChain")

    @property
    def steps(self) -> int:
        """T."""
        return int(self.bias.shape[0]) + 1

    @property
    def dim(self) -> int:
        """D."""
        return int(self.mean.shape[-1])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """`(T, D)`."""
        return (self.steps, self.dim)

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
        f = self._forward
        cov = ops.xp(f.root).broadcast_to(f.root @ f.root.mT, (self.steps, *self.batch_shape, self.dim, self.dim))
        return Filtered(f.mean, cov, f.log_z)

    @cached_property
    def _kept(self) -> dict[Any, Any]:
        return {}

    @property
    def _forward(self) -> _Forward:
        if self._in_parallel:
            return ops.remember(self.mean, self._kept, "forward", self._forward_in_parallel)
        return self._forward_in_turn.all

    @property
    def _forward_in_turn(self) -> _InTurn:
        return ops.remember(self.mean, self._kept, "forward", self._pass_forward)

    @property
    def _tree(self) -> tuple[Arrays, list[Arrays]]:
        """The first step's mean, root and log Z, and the tree of elements of all others."""
        return ops.remember(self.mean, self._kept, "tree", self._first_and_tree)

    def _first_and_rest(self) -> tuple[Arrays, Arrays]:
        """Mean, W and log Z of the first step, and the parameters of all others."""
        c, batch, D = self._aligned(), self.batch_shape, self.dim
        n = len(batch)
        if c.precision is None or c.shift is None:
            zero = ops.zeros((1,) * (n + 1) + (D,), self.mean)
            c = replace(c, precision=diagonal(zero), shift=zero)
        assert c.precision is not None and c.shift is not None
        xp, e = ops.xp(c.mean), -c.shift[..., None]
        mean, root = behind_steps(c.mean[None], 1, n)[..., None], ops.cholesky(behind_steps(c.cov[None], 2, n))
        mean, W, log_z = _updated(mean, root, c.precision[:1], e[:1])
        matrices = (root, c.transition, c.noise, c.precision)
        shared = np.broadcast_shapes(*(tuple(x.shape[1:-2]) for x in matrices))
        first = (
            xp.broadcast_to(mean, (1, *batch, D, 1)),
            xp.broadcast_to(W, (1, *shared, D, D)),
            xp.broadcast_to(log_z, (1, *batch, 1, 1)),
        )
        potentials = (x if x.shape[0] == 1 else x[1:] for x in (c.precision, e))
        return first, (c.transition, c.bias[..., None], c.noise, *potentials)

    def _first_and_tree(self) -> tuple[Arrays, list[Arrays]]:
        (mean, W, log_z), (F, b, Q, J, e) = self._first_and_rest()
        start = mean, ops.cholesky(W.mT @ W), log_z
        if self.steps == 1:
            return start, []
        A, b, W, G, e, c = _element(F, b, ops.cholesky(Q), J, e)
        return start, pairs(_then_filter, (A, b, W.mT @ W, G, e, c), self.steps - 1)

    def _forward_in_parallel(self) -> _Forward:
        (mean, root, log_z), levels = self._tree
        if levels:
            xp = ops.xp(mean)
            *after, log_z = states(_through, (mean, root, log_z), levels, self.steps - 1)
            mean, root = (xp.concat(pair, axis=0) for pair in zip((mean, root), after, strict=True))
        return _Forward(mean[..., 0], root, log_z[-1, ..., 0, 0])

    def _pass_forward(self) -> _InTurn:
        (mean, W, log_z), rest = self._first_and_rest()
        wide = self.dim >= WIDE and not ops.steps_are_dear(self.mean)
        roots = (ops.cholesky(rest[2]),) if wide else ()

        def step(carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
            mean, W, total = carry
            F, b, Q, J, e, *root = x
            V, ahead = F @ W.mT, F @ mean + b
            lower = ops.cholesky(V @ V.mT + Q)
            back = _back(mean, W.mT, V, ahead, lower, *root) if wide else ()
            mean, W, gain = _updated(ahead, lower, J, e)
            return (mean, W, total + gain), (mean, W, *back)

        last, (means, Ws, *back) = in_turn(step, (mean[0], W[0], log_z[0]), rest + roots, self.steps - 1)
        xp = ops.xp(mean)
        mean, W = xp.concat([mean, means], axis=0), xp.concat([W, Ws], axis=0)
        total = last[2][..., 0, 0]
        at_last = _Forward(last[0][None, ..., 0], last[1][None].mT, total)
        return _InTurn(_Forward(mean[..., 0], W.mT, total), at_last, tuple(back))

    def times(self, precision: Array, shift: Array) -> GaussianChain:
        """q times more potentials of the same form."""
        if self.precision is not None and self.shift is not None:
            precision, shift = self.precision + precision, self.shift + shift
        return replace(self, precision=precision, shift=shift, validate=False)

    def log_normalizer(self) -> Array:
        """`log Z = log E_p prod_t psi_t(z_t)`, `[...]`, in nats."""
        if self.precision is None:
            return ops.zeros(self.batch_shape, self.mean)
        return self._forward.log_z

    def moments(self) -> Moments:
        """Means, covariances, and covariances of neighbouring steps, of q."""
        found = self._moments()
        xp, wide = ops.xp(found.mean), (*self.batch_shape, self.dim, self.dim)
        cov, cross = (xp.broadcast_to(x, (x.shape[0], *wide)) for x in (found.cov, found.cross))
        return Moments(found.mean, cov, cross)

    def _moments(self) -> Moments:
        """With batches of covariances as wide as those of the matrices alone."""
        c = self._conditionals
        mean, cov = self._in_order(_then_moments, (c.first_g[..., None], c.first_cov), (c.E, c.g[..., None], c.cov))
        return Moments(mean[..., 0], cov, cov[1:] @ c.E.mT if self._backwards else c.E @ cov[:-1])

    @property
    def _backwards(self) -> bool:
        # A chain without potentials is drawn as it is written. Conditionals of its first steps given later ones take
        # differences that lose all digits where transitions expand.
        return self.precision is not None

    def _first_and_rest_of(self, x: Array) -> Arrays:
        """Of an array with steps in front: the step that is drawn first, all others, and their neighbours."""
        return (x[-1:], x[:-1], x[1:]) if self._backwards else (x[:1], x[1:], x[:-1])

    def _in_order(self, combine: Combine, first: Arrays, elements: Arrays) -> Arrays:
        """States of all steps from that of the step drawn first, where elements lead from one to the next drawn."""
        n, xp, backwards = self.steps - 1, ops.xp(first[0]), self._backwards
        if n == 0:
            return first

        def act(state: Arrays, element: Arrays) -> Arrays:
            return combine((None, *state), element)[1:]

        def turned(arrays: Arrays) -> Arrays:
            return tuple(xp.flip(a, axis=0) for a in arrays) if backwards else arrays

        if self._in_parallel:
            found = turned(states(act, first, pairs(combine, turned(elements), n), n))
        else:

            def step(carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
                after = act(carry, x)
                return after, after

            _, found = in_turn(step, tuple(x[0] for x in first), elements, n, reverse=backwards)
        both = zip(found, first, strict=True) if backwards else zip(first, found, strict=True)
        return tuple(xp.concat(pair, axis=0) for pair in both)

    def sample(self, noise: Array) -> Array:
        """A draw of all steps from standard normal noise `[T, ..., D]`, differentiable in the chain.

        Batch axes of the noise in front of the chain's are draws.
        """
        E, g, L, first_g, first_L = self._behind(noise.ndim - 2)
        first, rest, _ = self._first_and_rest_of(noise)
        first, rest = times(first_L, first) + first_g, times(L, rest) + g
        return self._in_order(_then, (first[..., None],), (E, rest[..., None]))[0][..., 0]

    def noise_of(self, z: Array) -> Array:
        """The noise `[T, ..., D]` that `sample` makes z from."""
        E, g, L, first_g, first_L = self._behind(z.ndim - 2)
        first, rest, neighbours = self._first_and_rest_of(z)
        parts = [(first_L, first - first_g), (L, rest - times(E, neighbours) - g)]
        found = [ops.solve_triangular(lower, r[..., None])[..., 0] for lower, r in parts]
        return ops.xp(z).concat(found[::-1] if self._backwards else found, axis=0)

    def _behind(self, batch: int) -> Arrays:
        """E, g and L of the conditionals, g and L of the step drawn first, with as many axes of batches."""
        c = self._conditionals
        L, first_L = self._roots(c)
        events = ((c.E, 2), (c.g, 1), (L, 2), (c.first_g, 1), (first_L, 2))
        return tuple(behind_steps(x, event, batch) for x, event in events)

    def log_prob(self, z: Array) -> Array:
        """`log q(z)`, `[T, ..., D] -> [...]`, in nats."""
        return self._log_joint(z) - self.log_normalizer()

    def expected_log_prob(self, of: Moments) -> Array:
        """`E log q(z)` over any z with these moments, `[...]`, in nats."""
        batch = max(of.mean.ndim - 2, len(self.batch_shape))
        of = Moments(*(behind_steps(x, event, batch) for x, event in zip(of, (1, 2, 2), strict=True)))
        xp, D, c = ops.xp(of.mean), self.dim, self._aligned(batch)
        F = c.transition
        error = of.mean[1:] - times(F, of.mean[:-1]) - c.bias
        both = F @ of.cross.mT
        spread = of.cov[1:] - both - both.mT + sandwich(F, of.cov[:-1])
        total = expected_log_normal(of.mean[0] - c.mean, of.cov[0], c.cov, D)
        total = total + xp.sum(expected_log_normal(error, spread, c.noise, D), axis=0)
        if c.precision is not None and c.shift is not None:
            square = of.cov + of.mean[..., :, None] * of.mean[..., None, :]
            psi = xp.sum(c.shift * of.mean, axis=-1) - 0.5 * xp.sum(c.precision * square, axis=(-2, -1))
            total = total + xp.sum(psi, axis=0) - self.log_normalizer()
        return total

    def entropy(self) -> Array:
        """`-E log q(z)`, `[...]`, in nats."""
        return -self.expected_log_prob(self._moments())

    def kl(self, other: GaussianChain) -> Array:
        """`KL(q || other)`, `[...]`, in nats. Of one with the same prior it is `E sum_t log psi_t - log Z`."""
        moments = self._moments()
        return self.expected_log_prob(moments) - other.expected_log_prob(moments)

    @property
    def _in_parallel(self) -> bool:
        return self.steps == 1 or in_parallel(self.method, self.mean)

    def _log_joint(self, z: Array) -> Array:
        xp, D, c = ops.xp(z), self.dim, self._aligned(z.ndim - 2)
        total = log_normal(z[0] - c.mean, c.cov, D)
        total = total + xp.sum(log_normal(z[1:] - times(c.transition, z[:-1]) - c.bias, c.noise, D), axis=0)
        if c.precision is not None and c.shift is not None:
            psi = xp.sum((c.shift - 0.5 * times(c.precision, z)) * z, axis=-1)
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
    def _conditionals(self) -> _Conditionals:
        """Of q from the last step to the first, or of p from the first to the last."""
        find = self._conditionals_of_q if self._backwards else self._conditionals_of_p
        return ops.remember(self.mean, self._kept, "conditionals", find)

    def _roots(self, of: _Conditionals) -> tuple[Array, Array]:
        """L of the conditionals and of the step drawn first."""
        return ops.remember(self.mean, self._kept, "roots", lambda: (ops.cholesky(of.cov), ops.cholesky(of.first_cov)))

    def _conditionals_of_p(self) -> _Conditionals:
        c, n = self._aligned(), len(self.batch_shape)
        mean, cov = behind_steps(c.mean[None], 1, n), behind_steps(c.cov[None], 2, n)
        xp, D = ops.xp(mean), self.dim
        wide = np.broadcast_shapes(*(tuple(x.shape[1:-2]) for x in (cov, c.transition, c.noise)))
        first = xp.broadcast_to(mean, (1, *self.batch_shape, D)), xp.broadcast_to(cov, (1, *wide, D, D))
        return _Conditionals(c.transition, c.bias, c.noise, *first)

    def _conditionals_of_q(self) -> _Conditionals:
        c = self._aligned()
        found: Arrays = ()
        if self._in_parallel:
            f = self._forward
            last = f._replace(mean=f.mean[-1:], root=f.root[-1:])
        else:
            f, last, found = self._forward_in_turn
        if not found:
            F, root, mean = c.transition, f.root[:-1], f.mean[:-1, ..., None]
            V = F @ root
            lower = ops.cholesky(V @ V.mT + c.noise)
            found = _back(mean, root, V, F @ mean + c.bias[..., None], lower, ops.cholesky(c.noise))
        E, g, cov = found
        return _Conditionals(E, g[..., 0], cov, last.mean, last.root @ last.root.mT)


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
    leaves out coordinates that are missing (they may be NaN) and with them whole steps. Without it the precision has
    size one along every axis that matrix and variance do not have, and a chain finds its covariances once for all. The
    sum of the constants `[...]` over steps is what `log Z` lacks to the log evidence of y, in nats.

    Example:
        >>> import jax.numpy as jnp
        >>> y = jnp.array([[0.3], [jnp.nan]])
        >>> J, h, c = observed(y, jnp.ones((1, 1)), jnp.zeros(1), jnp.ones(1), known=~jnp.isnan(y))
        >>> J[:, 0, 0].tolist(), [round(float(x), 3) for x in (*h[:, 0], c[0])]
        ([1.0, 0.0], [0.3, 0.0, -0.964])
    """
    xp = ops.xp(y)
    error = y - offset
    weight = 1.0 / variance
    log_terms = LOG_2PI - xp.log(weight)
    if known is not None:
        zero = ops.zeros(tuple(error.shape), error)
        error, weight = xp.where(known, error, zero), xp.where(known, weight, zero)
        log_terms = xp.where(known, log_terms, zero)
    precision = matrix.mT @ (weight[..., :, None] * matrix)
    precision = xp.reshape(precision, (1,) * (error.ndim + 1 - precision.ndim) + tuple(precision.shape))
    shift = times(matrix.mT, weight * error)
    return precision, shift, -0.5 * xp.sum(log_terms + weight * error * error, axis=-1)


# Elements of the parallel filter: z_t | z_s is N(A z_s + b, C) with the weight exp(c - e' z_s - z_s' J z_s / 2).
# `_element` finds one with W in C's place, `C = W'W`. Vectors are columns, numbers matrices of one entry.


def _element(A: Array, b: Array, root: Array, J: Array, e: Array) -> Arrays:
    """`N(z_t; A z_s + b, root root') exp(-e' z_t - z_t' J z_t / 2)`."""
    new, W, c = _updated(b, root, J, e)
    JA = J @ A
    A_new = A - W.mT @ (W @ JA)
    return A_new, new, W, JA.mT @ A_new, A.mT @ (J @ new + e), c


def _then_filter(one: Arrays, two: Arrays) -> Arrays:
    A1, b1, C1, J1, e1, c1 = one
    A2, b2, C2, J2, e2, c2 = two
    A, b, W, J, e, c = _element(A1, b1, ops.cholesky(C1), J2, e2)
    V = A2 @ W.mT
    return A2 @ A, A2 @ b + b2, V @ V.mT + C2, J + J1, e + e1, c + c1 + c2


def _through(state: Arrays, element: Arrays) -> Arrays:
    """Mean, root and log Z of a state after an element."""
    mean, root, log_z = state
    A, b, C, J, e, c = element
    mean, W, gain = _updated(mean, root, J, e)
    V = A @ W.mT
    return A @ mean + b, ops.cholesky(V @ V.mT + C), log_z + gain + c


def _back(mean: Array, root: Array, V: Array, ahead: Array, lower: Array, noise_root: Array) -> Arrays:
    """E, g and cov of `z | next = E next + g + noise`, `z ~ N(mean, root root')`, `next ~ N(ahead, lower lower')`.

    V is the root carried over to the next step, `lower lower' = V V' + noise_root noise_root'`.
    """
    E = ops.solve_triangular(lower, ops.solve_triangular(lower, V @ root.mT), transposed=True).mT
    # Neither a difference of covariances nor an inverse of the noise, which may be tiny.
    rest, own = root - E @ V, E @ noise_root
    return E, mean - E @ ahead, rest @ rest.mT + own @ own.mT


def _then_moments(later: Arrays, earlier: Arrays) -> Arrays:
    E, g, L = earlier
    return *_then(later[:2], (E, g)), E @ (later[2] @ E.mT) + L


def _then(later: Arrays, earlier: Arrays) -> Arrays:
    """From a step on to the one before: `z -> E z + g`; of a state there is no E."""
    E, g = earlier
    return None if later[0] is None else E @ later[0], E @ later[1] + g


def _conditioned(root: Array, precision: Array) -> tuple[Array, Array]:
    """W with `W'W = ((root root')^-1 + precision)^-1`, and `log |I + root' precision root| / 2`, `[..., 1, 1]`."""
    xp = ops.xp(root)
    B = ops.cholesky(root.mT @ (precision @ root) + ops.eye(root.shape[-1], root))
    return ops.solve_triangular(B, root.mT), xp.sum(xp.log(xp.linalg.diagonal(B)), axis=-1)[..., None, None]


def _updated(mean: Array, root: Array, precision: Array, e: Array) -> Arrays:
    """Of `N(z; mean, root root') exp(-e'z - z' precision z / 2)`: mean, W with covariance `W'W`, log integral."""
    W, log_det = _conditioned(root, precision)
    residual = precision @ mean + e
    half = W @ residual
    return mean - W.mT @ half, W, (half.mT @ half - mean.mT @ (e + residual)) / 2 - log_det
