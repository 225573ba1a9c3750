"""Hard draws of classes with relaxed values beside them, whose function is a control variate."""

from __future__ import annotations

import math
from collections.abc import Callable

from ppl_lvm import ops
from ppl_lvm.algorithm import SiteDistribution, Variant
from ppl_lvm.ops import Array, stop_gradient


def perturbed(dist: SiteDistribution) -> tuple[Array, Array, Array, Array]:
    """A hard draw D, `log pi`, and perturbed z, z' of which D is the largest entry, all `[*batch, *elements, V]`.

    z and z' have the same value and another gradient: z is `log pi + G` at fixed Gumbel noise G; z' is drawn given D,
    at the fixed noise of that draw. With exponentials E, `z'` is `-log E_D` at the class D and `-log(E_i / pi_i + E_D)`
    elsewhere: an exponential of rate pi_i that is more than E_D.
    """
    hard, log_pi, u = dist.classes_of(dist.sample()), dist.log_probs(), dist.uniform()
    xp = ops.xp(u)
    # A class without probability is never drawn, and the derivative at infinity is no number.
    log_pi = xp.clip(log_pi, min=math.log(xp.finfo(u.dtype).smallest_normal))
    log_e = xp.log(-xp.log(u))
    of_draw = xp.sum(hard * log_e, axis=-1, keepdims=True)
    given = -xp.where(hard > 0, of_draw, xp.logaddexp(log_e - log_pi, of_draw))
    return hard, log_pi, stop_gradient(given) + (log_pi - stop_gradient(log_pi)), given


def linear_density(log_probs: Array, weights: Array) -> Array:
    """`sum_i y_i log pi_i`, `[.., V], [.., V] -> [..]`: the density of hard classes, continued to all weights."""
    return ops.xp(weights).sum(weights * log_probs, axis=-1)


def controlled(
    dist: SiteDistribution,
    index: Array,
    temperature: Array | float,
    eta: Array | float,
    critic: Callable[[Array], Array] | None = None,
) -> Variant:
    """`[h(D) - c(s')] grad log q(D) + grad c(s) - grad c(s')` with `c = eta h + critic`, as three variants.

    The program sees D, `s = softmax(z / temperature)` and `s' = softmax(z' / temperature)` (see `perturbed`).
    `critic` takes weights of classes to one number for each entry of the site's batch shape.

    What is added to the score of h(D) has expectation zero: `E[c(s') grad log q(D) + grad c(s')]` is the gradient of
    `E c(s')`, as s' is a draw given D, and so is `E grad c(s)`, as s and s' have one distribution. That holds for the
    direct dependence of c on parameters (log q at s and s') as well, whose expectation is the same at both.
    """
    hard, log_pi, z, given = perturbed(dist)
    xp = ops.xp(z)
    # Of all elements, those under a mask too: the relaxed values of all are differentiated.
    batch = dist.log_prob(dist.embed(hard)).ndim
    log_q = xp.sum(hard * log_pi, axis=tuple(range(batch, z.ndim)))
    score = log_q - stop_gradient(log_q)
    soft, soft_ = (ops.softmax(x / temperature, -1) for x in (z, given))
    first, last = index == 0, index == 2
    wide = tuple(first.shape) + (1,) * (z.ndim - log_q.ndim)
    value = xp.where(xp.reshape(first, wide), hard, xp.where(xp.reshape(last, wide), soft_, soft))
    nothing = xp.zeros_like(log_q)
    control = None
    if critic is not None:
        at, at_ = critic(soft), critic(soft_)
        low = at_ - stop_gradient(at_) + score * stop_gradient(at_)
        control = xp.where(first, nothing, xp.where(last, -low, at - stop_gradient(at)))
    return Variant(
        dist.embed(value),
        weight=xp.where(first, nothing + 1.0, nothing),
        credit=xp.where(first, score, xp.where(last, -eta * score, nothing)),
        through=xp.where(first, nothing, xp.where(last, nothing - eta, nothing + eta)),
        control=control,
    )
