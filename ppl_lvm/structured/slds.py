"""Switching linear dynamical systems: states choose how a Gaussian chain moves. Mean field between the two chains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array
from ppl_lvm.structured.gaussian_chain import GaussianChain, Moments
from ppl_lvm.structured.markov_chain import MarkovChain
from ppl_lvm.structured.matrices import check_positive, expected_log_normal, log_diagonal, log_normal, sandwich, times
from ppl_lvm.structured.scan import Method, behind_steps


class MeanField(NamedTuple):
    """`q(s) q(z)`, each a chain."""

    states: MarkovChain
    """`q(s)`."""
    chain: GaussianChain
    """`q(z)`."""
    bounds: Array
    """After every sweep, `[sweeps, ...]`, in nats; none is below the one before it."""


class _Average(NamedTuple):
    """`E log N(y; M_s x, Q_s)` over s as `log N(y; M x, Q) - x' rest x / 2 + constant`."""

    M: Array
    Q: Array
    rest: Array
    constant: Array


@dataclass(frozen=True)
class SwitchingChain:
    """`p(s) p(z | s)` over T steps of a state s_t of V values, which chooses how D numbers z_t move:

        p(z | s) = N(z_1; mean[s_1], cov[s_1]) prod_{t>1} N(z_t; transition_t[s_t] z_{t-1} + bias_t[s_t], noise_t[s_t])

    `states` is p(s); what it does not sum to is divided out. Steps are the first axis of `transition` and `noise`
    `[T - 1, ..., V, D, D]` and `bias` `[T - 1, ..., V, D]`; `mean` is `[..., V, D]` and `cov` `[..., V, D, D]`; the
    axes between are batches, which broadcast. `cov` and `noise` are positive definite.

    Given z the states are a chain, and given s all numbers are; together they are neither, and the evidence of
    potentials of z is a sum over `V^T` sequences. `mean_field` bounds it from below.

    Raises:
        DataError: shapes do not fit, or a covariance is not positive definite.

    Source: Ghahramani and Hinton (2000), Variational Learning for Switching State-Space Models, Neural Computation
    12(4); with potentials of a network, Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), arXiv:1603.06277.

    Example:
        >>> import torch
        >>> stay = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> states = MarkovChain(torch.zeros(2).log_softmax(0), torch.stack([stay, stay]))
        >>> one, drift = torch.ones(2, 2, 1, 1), torch.tensor([[[-1.0], [1.0]]] * 2)
        >>> p = SwitchingChain(states, torch.zeros(2, 1), one[0], one, drift, one)
        >>> q = p.mean_field(torch.ones(3, 1, 1), torch.tensor([[0.0], [0.5], [1.0]]))
        >>> [round(float(m), 2) for m in q.states.statistics().single[:, 1]]
        [0.82, 0.9, 0.9]
        >>> [round(float(m), 2) for m in q.chain.moments().mean[:, 0]]
        [-0.09, 0.52, 1.16]
    """

    states: MarkovChain
    mean: Array
    cov: Array
    transition: Array
    bias: Array
    noise: Array
    method: Method = "auto"
    validate: bool = True

    def __post_init__(self) -> None:
        D, steps, V = self.mean.shape[-1], self.states.steps - 1, self.states.values
        needed = {
            **{"mean": ((), (V, D)), "cov": ((), (V, D, D))},
            **{"transition": ((steps,), (V, D, D)), "bias": ((steps,), (V, D)), "noise": ((steps,), (V, D, D))},
        }
        for name, (first, event) in needed.items():
            shape = tuple(getattr(self, name).shape)
            wrong = first and (len(shape) < len(event) + 1 or shape[:1] != first)
            if wrong or shape[-len(event) :] != event:
                raise DataError(
                    f"{name} has shape {shape}; states say V = {V} and {steps} transitions and mean D = {D}, so it is "
                    f"{(*first, '...', *event)}."
                )
        if self.validate:
            for name in ("cov", "noise"):
                check_positive(name, getattr(self, name), "SwitchingChain")

    @property
    def steps(self) -> int:
        """T."""
        return self.states.steps

    @property
    def dim(self) -> int:
        """D."""
        return int(self.mean.shape[-1])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """`(T, D)`, of z."""
        return (self.steps, self.dim)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """What all arguments broadcast to between steps and state."""
        shapes = [self.states.batch_shape, self.mean.shape[:-2], self.cov.shape[:-3], self.transition.shape[1:-3]]
        shapes += [self.bias.shape[1:-2], self.noise.shape[1:-3]]
        return tuple(np.broadcast_shapes(*(tuple(s) for s in shapes)))

    def given(self, s: Array) -> GaussianChain:
        """`p(z | s)` of integers s `[T, ...]`; batch axes in front of the chain's are draws."""
        xp, at = ops.xp(self.mean), ops.one_hot(s, self.states.values)
        c = self._aligned(s.ndim - 1)

        def chosen(at: Array, x: Array, event: int) -> Array:
            weight = xp.reshape(at, (*at.shape, *(1,) * event))
            return xp.sum(weight * x, axis=-event - 1)

        dynamics = {"transition": (c.transition, 2), "bias": (c.bias, 1), "noise": (c.noise, 2)}
        moved = {n: chosen(at[1:], x, event) for n, (x, event) in dynamics.items()}
        first = {"mean": chosen(at[0], c.mean, 1), "cov": chosen(at[0], c.cov, 2)}
        return GaussianChain(**first, **moved, method=self.method, validate=False)

    def states_given(self, z: Array) -> MarkovChain:
        """`p(s | z)` of `z [T, ..., D]`; its `log Z` is that of `p(z)` times what `states` sums to."""
        c, D = self._aligned(z.ndim - 2), self.dim
        first = log_normal(z[0][..., None, :] - c.mean, c.cov, D)
        error = z[1:, ..., None, :] - times(c.transition, z[:-1, ..., None, :]) - c.bias
        return self._with(_joined(first, log_normal(error, c.noise, D)))

    def log_prob(self, z: Array) -> Array:
        """`log p(z) = log sum_s p(s, z)`, `[T, ..., D] -> [...]`, in nats: the forward algorithm's sum, exact."""
        return self.states_given(z).log_normalizer() - self.states.log_normalizer()

    def sample(self, uniform: Array, noise: Array) -> tuple[Array, Array]:
        """A draw of all states from uniforms on (0, 1) `[T, ...]` and of z from standard normals `[T, ..., D]`."""
        s = self.states.sample(uniform)
        return s, self.given(s).sample(noise)

    def averaged(self, weight: Array) -> tuple[GaussianChain, Array]:
        """`exp E log p(z | s)` over s with marginals `weight [T, ..., V]`: a chain, and the log of what it lacks.

        The expected log density of a step is quadratic in both its ends. What is left of it beside the normalised
        density `N(z_t; A z_{t-1} + b, (E noise^-1)^-1)`, A and b the regression that the noise's precisions weigh, is
        how far states differ from that: a potential of z_{t-1}, never of negative precision.
        """
        xp, c, D = ops.xp(weight), self._aligned(weight.ndim - 2), self.dim
        first = _averaged(weight[0], c.mean[..., None], c.cov)
        shape = np.broadcast_shapes(c.bias.shape, c.transition.shape[:-1])
        both = xp.concat(
            [xp.broadcast_to(c.transition, (*shape, D)), xp.broadcast_to(c.bias[..., None], (*shape, 1))], axis=-1
        )
        rest = _averaged(weight[1:], both, c.noise)
        nothing = ops.zeros((1, *rest.rest.shape[1:]), weight)
        left = xp.concat([rest.rest, nothing], axis=0)
        chain = GaussianChain(
            *(first.M[..., 0], first.Q, rest.M[..., :D], rest.M[..., D], rest.Q, left[..., :D, :D], -left[..., :D, D]),
            method=self.method,
            validate=False,
        )
        constant = first.constant - 0.5 * first.rest[..., 0, 0]
        return chain, constant + xp.sum(rest.constant - 0.5 * rest.rest[..., D, D], axis=0)

    def expected(self, of: Moments) -> Array:
        """`E log p(z_t | z_{t-1}, s_t)` over z with these moments, for every s_t, `[T, ..., V]`, in nats."""
        c, D = self._aligned(of.mean.ndim - 2), self.dim
        mean, cov, cross = of.mean[..., None, :], of.cov[..., None, :, :], of.cross[..., None, :, :]
        error = mean[1:] - times(c.transition, mean[:-1]) - c.bias
        both = c.transition @ cross.mT
        spread = cov[1:] - both - both.mT + sandwich(c.transition, cov[:-1])
        first = expected_log_normal(mean[0] - c.mean, cov[0], c.cov, D)
        return _joined(first, expected_log_normal(error, spread, c.noise, D))

    def bound(self, states: MarkovChain, chain: GaussianChain, precision: Array, shift: Array) -> Array:
        """`E log p(s, z) prod_t psi_t(z_t) - E log q(s) q(z)`, of any two factors, `[...]`, in nats."""
        xp, moments, found = ops.xp(precision), chain.moments(), states.statistics()
        batch = moments.mean.ndim - 2
        precision, shift = behind_steps(precision, 2, batch), behind_steps(shift, 1, batch)
        square = moments.cov + moments.mean[..., :, None] * moments.mean[..., None, :]
        psi = xp.sum(shift * moments.mean, axis=-1) - 0.5 * xp.sum(precision * square, axis=(-2, -1))
        log_p = self.states.expected_log_prob(found) + xp.sum(found.single * self.expected(moments), axis=(0, -1))
        return log_p + xp.sum(psi, axis=0) + states.entropy() + chain.entropy()

    def mean_field(self, precision: Array, shift: Array, sweeps: int = 10, start: Array | None = None) -> MeanField:
        """The best `q(s) q(z)` for `p(s, z) prod_t exp(shift_t' z_t - z_t' precision_t z_t / 2)`, by coordinate ascent.

        In a sweep q(z) is made the best for q(s), then q(s) the best for q(z), so that the bound
        `E log p(s, z) psi(z) - E log q(s) q(z) <= log sum_s p(s) Z(s)` never falls. `precision [T, ..., D, D]` and
        `shift [T, ..., D]` are zero at steps without data, and have one step in front where all share it.
        `start [T, ..., V]` are the marginals of the first q(s); None: those of p(s).

        The number of sweeps is fixed, so that a compiled step has one shape, and derivatives go through all of them:
        they are those of the factors as they are, whether the sweeps are enough or not. Where these are, the bound's
        own derivative needs none of it, as it is level in both factors.

        Raises:
            DataError: fewer sweeps than one, or shapes that do not fit.
        """
        if sweeps < 1:
            raise DataError(f"sweeps={sweeps} were asked for; there is one at least.")
        T, D, V = self.steps, self.dim, self.states.values
        batches = [self.batch_shape, precision.shape[1:-2], shift.shape[1:-1]]
        for name, x, event in (("precision", precision, (D, D)), ("shift", shift, (D,))):
            if x.shape[:1] not in ((T,), (1,)) or tuple(x.shape[-len(event) :]) != event or x.ndim <= len(event):
                raise DataError(
                    f"{name} has shape {tuple(x.shape)}; the chain says it is {(T, '...', *event)}, with 1 in front "
                    f"where all steps share it."
                )
        if start is None:
            start = self.states.statistics().single
        batches.append(start.shape[1:-1])
        batch = np.broadcast_shapes(*(tuple(b) for b in batches))
        xp, log_z = ops.xp(precision), self.states.log_normalizer()
        psi = behind_steps(precision, 2, len(batch)), behind_steps(shift, 1, len(batch))

        def sweep(before: tuple[Array, ...], _: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
            weight = before[0]
            averaged, constant = self.averaged(weight)
            chain = averaged.times(*psi)
            expected = self.expected(chain.moments())
            states = self._with(expected)
            # Entropy of q(z) and the mean of its potentials are its normaliser, less what it was averaged from.
            of_chain = chain.log_normalizer() + constant - xp.sum(weight * expected, axis=(0, -1))
            kept = (chain.mean, chain.cov, chain.transition, chain.bias, chain.noise, chain.precision, chain.shift)
            return (states.statistics().single, states.node, *kept), states.log_normalizer() - log_z + of_chain

        # Both factors go along from sweep to sweep, so that a compiler meets a sweep once.
        weight = xp.broadcast_to(behind_steps(start, 1, len(batch)), (T, *batch, V))
        of_pairs = (T - 1, *batch, D, D), (T - 1, *batch, D), (T - 1, *batch, D, D)
        shapes = (T, *batch, V), (*batch, D), (*batch, D, D), *of_pairs, (T, *batch, D, D), (T, *batch, D)
        nothing = (ops.zeros(shape, precision) for shape in shapes)
        (_, node, *found), bounds = ops.scan(sweep, (weight, *nothing), (ops.zeros((sweeps,), precision),))
        names = ("mean", "cov", "transition", "bias", "noise", "precision", "shift")
        chain = GaussianChain(**dict(zip(names, found, strict=True)), method=self.method, validate=False)
        return MeanField(replace(self.states, node=node), chain, bounds)

    def _with(self, node: Array) -> MarkovChain:
        """The states times these node potentials."""
        if self.states.node is not None:
            node = node + behind_steps(self.states.node, 1, node.ndim - 2)
        return replace(self.states, node=node)

    def _aligned(self, batch: int) -> SwitchingChain:
        """Itself with as many batch axes behind the steps of every argument that has them."""
        moved = {"transition": (self.transition, 3), "bias": (self.bias, 2), "noise": (self.noise, 3)}
        return replace(self, validate=False, **{n: behind_steps(x, event, batch) for n, (x, event) in moved.items()})


def steps_in_front(
    initial: Array,
    move: Array,
    mean: Array,
    cov: Array,
    transition: Array,
    bias: Array,
    noise: Array,
    method: Method = "auto",
) -> tuple[MarkovChain, dict[str, Array]]:
    """The arguments of a distribution, `[..., T, *event]`, as a `SwitchingChain` takes them."""
    xp = ops.xp(mean)
    states = MarkovChain(initial, xp.moveaxis(move, -3, 0), method=method)
    moved = {"transition": (transition, -4), "bias": (bias, -3), "noise": (noise, -4)}
    return states, {"mean": mean, "cov": cov, **{n: xp.moveaxis(x, axis, 0) for n, (x, axis) in moved.items()}}


def _joined(first: Array, rest: Array) -> Array:
    """Of the first step `[..., V]` and of the others `[T - 1, ..., V]`, both broadcast."""
    xp, shape = ops.xp(rest), np.broadcast_shapes(first.shape, rest.shape[1:])
    parts = xp.broadcast_to(first[None], (1, *shape)), xp.broadcast_to(rest, (rest.shape[0], *shape))
    return xp.concat(parts, axis=0)


def _averaged(weight: Array, M: Array, Q: Array) -> _Average:
    """Over the states with these weights `[..., V]`, of `M [..., V, D, R]` and `Q [..., V, D, D]`."""
    xp, D = ops.xp(weight), Q.shape[-1]
    root = ops.cholesky(Q)
    white = ops.solve_triangular(root, ops.eye(D, Q))
    w = weight[..., None, None]
    inverse = xp.sum(w * (white.mT @ white), axis=-3)
    whole = ops.cholesky(inverse)
    half = ops.solve_triangular(whole, ops.eye(D, Q))
    mean_Q = half.mT @ half
    mean_M = mean_Q @ xp.sum(w * (white.mT @ (white @ M)), axis=-3)
    apart = white @ (M - mean_M[..., None, :, :])
    rest = xp.sum(w * (apart.mT @ apart), axis=-3)
    log_det = log_diagonal(root)
    constant = -log_diagonal(whole) - xp.sum(weight * log_det, axis=-1)
    return _Average(mean_M, mean_Q, rest, constant)

