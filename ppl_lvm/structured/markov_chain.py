"""Discrete chains times node potentials: forward-backward, Viterbi, joint draws, normaliser, statistics, KL."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array
from ppl_lvm.structured.scan import Method, associative_scan, behind_steps, in_parallel

IMPOSSIBLE = -1e30
"""What stands for log 0: sums of it stay finite, and so do gradients."""


class Statistics(NamedTuple):
    """Expected statistics of `q(z)`, steps in front."""

    single: Array
    """`q(z_t = v)`, `[T, ..., V]`."""
    pair: Array
    """`q(z_t = v, z_{t+1} = w)`, `[T - 1, ..., V, V]`."""


class _Logs(NamedTuple):
    initial: Array
    transition: Array
    node: Array


@dataclass(frozen=True)
class MarkovChain:
    """`q(z) = 1/Z exp( initial(z_1) + sum_{t>1} transition_t(z_{t-1}, z_t) + sum_t node_t(z_t) )`, z_t of V values.

    Steps are the first axis of `transition` `[T - 1, ..., V, V]` (from, to) and `node` `[T, ..., V]`; `initial` is
    `[..., V]`; the axes between are batches, which broadcast. All are logs and need not be normalised; -inf forbids a
    value. `node` holds log likelihoods of data, what a recognition network says, or what is known of the states
    (0 for what may be, -inf for what may not; a log probability for soft knowledge); None: nothing. With normalised
    `initial` and `transition` and no `node` Z = 1, and with log likelihoods for `node` `log Z` is the log evidence.

    Raises:
        DataError: shapes do not fit.

    Source: Baum, Petrie, Soules, Weiss (1970); Viterbi (1967); in parallel, Särkkä and García-Fernández (2021),
    arXiv:1905.13002; Hassan, Särkkä, García-Fernández (2021), arXiv:2102.05743.

    Example:
        >>> import jax.numpy as jnp
        >>> stay = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> seen = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5], [0.3, 0.7]]))
        >>> q = MarkovChain(jnp.log(jnp.ones(2) / 2), jnp.stack([stay, stay]), seen)
        >>> [round(float(p), 3) for p in q.statistics().single[:, 0]]
        [0.703, 0.595, 0.491]
        >>> round(float(q.log_normalizer()), 4), q.mode().tolist()
        (-2.2462, [0, 0, 0])
    """

    initial: Array
    transition: Array
    node: Array | None = None
    method: Method = "auto"
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was found before; not a `cached_property`, whose lock torch.compile does not go through."""

    def __post_init__(self) -> None:
        V, steps = self.initial.shape[-1], self.transition.shape[0]
        needed = {"transition": (steps, (V, V))} | ({} if self.node is None else {"node": (steps + 1, (V,))})
        for name, (first, event) in needed.items():
            shape = tuple(getattr(self, name).shape)
            if len(shape) < len(event) + 1 or shape[0] != first or shape[-len(event) :] != event:
                raise DataError(
                    f"{name} has shape {shape}; initial says V = {V} and transition {steps} steps, so it is "
                    f"{(first, '...', *event)}."
                )

    @property
    def steps(self) -> int:
        """T."""
        return int(self.transition.shape[0]) + 1

    @property
    def values(self) -> int:
        """V."""
        return int(self.initial.shape[-1])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """`(T,)`."""
        return (self.steps,)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """What all arguments broadcast to between steps and values."""
        shapes = [self.initial.shape[:-1], self.transition.shape[1:-2]]
        if self.node is not None:
            shapes.append(self.node.shape[1:-1])
        return tuple(np.broadcast_shapes(*(tuple(s) for s in shapes)))

    @property
    def prior(self) -> MarkovChain:
        """The chain without the node potentials."""
        return replace(self, node=None)

    def log_normalizer(self) -> Array:
        """`log Z`, `[...]`, in nats."""
        return ops.logsumexp(self._forward[-1], -1)

    def filtered(self) -> Array:
        """`log q(z_t | nodes up to t)`, `[T, ..., V]`."""
        return ops.log_softmax(self._forward, -1)

    def statistics(self) -> Statistics:
        """Marginals of every step and of neighbouring steps."""
        xp, c, log_z = ops.xp(self.initial), self._aligned, self.log_normalizer()
        single = xp.exp(self._forward + self._backward - log_z[..., None])
        arriving = c.transition + (c.node[1:] + self._backward[1:])[..., None, :]
        return Statistics(single, xp.exp(self._forward[:-1, ..., :, None] + arriving - log_z[..., None, None]))

    def log_prob(self, z: Array) -> Array:
        """`log q(z)` of integers z `[T, ...]`, `[...]`, in nats; batch axes in front of the chain's are draws."""
        return self._log_joint(z) - self.log_normalizer()

    def sample(self, uniform: Array) -> Array:
        """A draw of all steps from uniforms on (0, 1) `[T, ...]`, integers `[T, ...]`, by inverse cumulative sums."""
        xp, c, draws = ops.xp(uniform), self._aligned, uniform.ndim - 1
        first = _inverse(ops.softmax(self._forward[0] + self._backward[0], -1), uniform[0])
        weights = ops.softmax(c.transition + (c.node[1:] + self._backward[1:])[..., None, :], -1)
        # Where every value would go next; the draw is what these maps, one after the other, make of the first.
        after = _inverse(behind_steps(weights, 2, draws), uniform[1:, ..., None])
        start = xp.broadcast_to(first[..., None], (*first.shape, self.values))[None]
        return self._composed(xp.concat([start, after], axis=0))[..., 0]

    def mode(self) -> Array:
        """The most probable sequence, integers `[T, ...]` (Viterbi)."""
        xp, c = ops.xp(self.initial), self._aligned
        best = xp.broadcast_to(c.initial + c.node[0], (*self.batch_shape, self.values))

        def step(best: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
            transition, node = x
            arriving = best[..., :, None] + transition
            return xp.max(arriving, axis=-2) + node, xp.argmax(arriving, axis=-2)

        if self.steps == 1:
            return xp.argmax(best, axis=-1)[None]
        last, origin = ops.scan(step, best, (c.transition, c.node[1:]))
        end = xp.argmax(last, axis=-1)
        start = xp.broadcast_to(end[..., None], (*end.shape, self.values))[None]
        backwards = xp.concat([start, xp.flip(origin, axis=0)], axis=0)
        return xp.flip(self._composed(backwards)[..., 0], axis=0)

    def expected_log_prob(self, of: Statistics) -> Array:
        """`E log q(z)` over any z with these statistics, `[...]`, in nats."""
        xp, c, batch = ops.xp(self.initial), self._aligned, max(of.single.ndim - 2, len(self.batch_shape))
        of = Statistics(behind_steps(of.single, 1, batch), behind_steps(of.pair, 2, batch))
        node, transition = behind_steps(c.node, 1, batch), behind_steps(c.transition, 2, batch)
        total = xp.sum(of.single[0] * c.initial, axis=-1) + xp.sum(of.single * node, axis=(0, -1))
        return total + xp.sum(of.pair * transition, axis=(0, -2, -1)) - self.log_normalizer()

    def entropy(self) -> Array:
        """`-E log q(z)`, `[...]`, in nats."""
        return -self.expected_log_prob(self.statistics())

    def kl(self, other: MarkovChain) -> Array:
        """`KL(q || other)`, `[...]`, in nats. Of one with the same prior it is `E sum_t node_t(z_t) - log Z`."""
        found = self.statistics()
        return self.expected_log_prob(found) - other.expected_log_prob(found)

    @property
    def _in_parallel(self) -> bool:
        return self.steps == 1 or in_parallel(self.method, self.initial)

    @property
    def _aligned(self) -> _Logs:
        """Its arguments with as many batch axes in each, node potentials, and no -inf."""
        n = len(self.batch_shape)
        node = self.node
        if node is None:
            node = ops.zeros((self.steps, *(1,) * n, self.values), self.initial)
        node, transition = behind_steps(node, 1, n), behind_steps(self.transition, 2, n)
        return _Logs(_finite(self.initial), _finite(transition), _finite(node))

    @property
    def _forward(self) -> Array:
        """`log` of the sum over all earlier steps, `[T, ..., V]`."""
        return ops.remember(self.initial, self._kept, "forward", self._pass_forward)

    @property
    def _backward(self) -> Array:
        """`log` of the sum over all later steps, `[T, ..., V]`."""
        return ops.remember(self.initial, self._kept, "backward", self._pass_backward)

    def _pass_forward(self) -> Array:
        xp, c, batch, V = ops.xp(self.initial), self._aligned, self.batch_shape, self.values
        first = xp.broadcast_to(c.initial + c.node[0], (*batch, V))
        if self.steps == 1:
            return first[None]
        if self._in_parallel:
            start = xp.broadcast_to(first[..., None, :], (*batch, V, V))[None]
            rest = xp.broadcast_to(c.transition + c.node[1:, ..., None, :], (self.steps - 1, *batch, V, V))
            return associative_scan(_then, [xp.concat([start, rest], axis=0)])[0][..., 0, :]

        def step(before: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
            now = ops.logsumexp(before[..., :, None] + x[0], -2) + x[1]
            return now, now

        return xp.concat([first[None], ops.scan(step, first, (c.transition, c.node[1:]))[1]], axis=0)

    def _pass_backward(self) -> Array:
        xp, c, batch, V = ops.xp(self.initial), self._aligned, self.batch_shape, self.values
        last = ops.zeros((*batch, V), self.initial)
        if self.steps == 1:
            return last[None]
        leaving = xp.broadcast_to(c.transition + c.node[1:, ..., None, :], (self.steps - 1, *batch, V, V))
        if self._in_parallel:
            found = ops.logsumexp(associative_scan(_then, [leaving], reverse=True)[0], -1)
        else:

            def step(after: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
                now = ops.logsumexp(x[0] + after[..., None, :], -1)
                return now, now

            found = ops.scan(step, last, (leaving,), reverse=True)[1]
        return xp.concat([found, last[None]], axis=0)

    def _log_joint(self, z: Array) -> Array:
        xp, c, draws = ops.xp(self.initial), self._aligned, z.ndim - 1
        at = ops.one_hot(z, self.values)
        pair = at[:-1, ..., :, None] * at[1:, ..., None, :]
        total = xp.sum(at[0] * c.initial, axis=-1) + xp.sum(at * behind_steps(c.node, 1, draws), axis=(0, -1))
        return total + xp.sum(pair * behind_steps(c.transition, 2, draws), axis=(0, -2, -1))

    def _composed(self, maps: Array) -> Array:
        """Maps of values to values `[T, ..., V]`, each after all before it."""
        xp = ops.xp(maps)
        if self._in_parallel:
            return associative_scan(lambda one, two: (xp.take_along_axis(two[0], one[0], axis=-1),), [maps])[0]

        def step(before: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
            now = xp.take_along_axis(x[0], before, axis=-1)
            return now, now

        return xp.concat([maps[:1], ops.scan(step, maps[0], (maps[1:],))[1]], axis=0)


def steps_in_front(initial: Array, transition: Array, node: Array | None = None) -> dict[str, Array]:
    """The arguments of a distribution, `[..., T, *event]`, as a `MarkovChain` takes them."""
    moved = {"initial": initial, "transition": ops.xp(transition).moveaxis(transition, -3, 0)}
    return moved if node is None else {**moved, "node": ops.xp(node).moveaxis(node, -2, 0)}


EVIDENCE = "Weights are from 0 to 1, and no step rules out all of its values."
"""What weights of `log_evidence` have to be, for an error."""


def log_evidence(weight: Array, z: Array) -> Array:
    """`sum_t log weight_t(z_t)` of what is known of states: weights `[..., T, V]`, integers z `[..., T]`, `[...]`."""
    xp, at = ops.xp(weight), ops.one_hot(z, weight.shape[-1]) > 0
    at, weight = xp.broadcast_arrays(at, weight)
    nothing = ops.zeros(tuple(weight.shape), weight)
    log_weight = _finite(xp.log(xp.where(at, weight, nothing + 1.0)))
    return xp.sum(log_weight, axis=(-2, -1))


def _then(one: tuple[Array, ...], two: tuple[Array, ...]) -> tuple[Array, ...]:
    """`log (exp(one) @ exp(two))`."""
    return (ops.logsumexp(one[0][..., :, :, None] + two[0][..., None, :, :], -2),)


def _inverse(weights: Array, uniform: Array) -> Array:
    """How many cumulative sums of weights `[..., V]` lie below a uniform `[...]`: an integer from 0 to V - 1."""
    xp = ops.xp(weights)
    below = xp.cumulative_sum(weights, axis=-1)[..., :-1] < uniform[..., None]
    return xp.sum(xp.astype(below, xp.int64 if uniform.dtype == xp.float64 else xp.int32), axis=-1)


def _finite(x: Array) -> Array:
    """Without -inf. What is no number stays so, and with it the loss that it makes."""
    xp = ops.xp(x)
    return xp.where(x < IMPOSSIBLE, ops.zeros(tuple(x.shape), x) + IMPOSSIBLE, x)
