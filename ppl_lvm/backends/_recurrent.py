"""What a gated recurrent unit computes, once for both libraries; initial values are theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ppl_lvm import nets, ops
from ppl_lvm.ops import Array

SIZES = ("weight_ih", "weight_hh", "bias", "bias_n")
"""Parameters of a cell, in the order in which both libraries draw them."""


def bound(spec: nets.GRUCell, params: Mapping[str, Array], sigmoid: Callable[[Array], Array]) -> Callable[..., Array]:
    """`apply(x)` of a GRU, `apply(x, h)` of a GRUCell."""
    weight_ih, weight_hh, bias, bias_n = (params[name] for name in SIZES)
    H = spec.outputs

    def step(given: Array, h: Array) -> Array:
        xp, own = ops.xp(h), h @ weight_hh.T
        r, u = sigmoid(given[..., :H] + own[..., :H]), sigmoid(given[..., H : 2 * H] + own[..., H : 2 * H])
        n = xp.tanh(given[..., 2 * H :] + r * (own[..., 2 * H :] + bias_n))
        return n + u * (h - n)

    def cell(x: Array, h: Array) -> Array:
        spec.check_input(x.shape)
        spec.check_state(h.shape)
        return step(x @ weight_ih.T + bias, h)

    def along(x: Array) -> Array:
        spec.check_input(x.shape)
        xp = ops.xp(x)
        given = xp.moveaxis(x @ weight_ih.T + bias, -2, 0)

        def one(h: Array, now: tuple[Array]) -> tuple[Array, Array]:
            h = step(now[0], h)
            return h, h

        _, states = ops.scan(one, ops.zeros((*given.shape[1:-1], H), given), (given,), reverse)
        return xp.moveaxis(states, 0, -2)

    reverse: Any = getattr(spec, "reverse", None)
    return cell if reverse is None else along
