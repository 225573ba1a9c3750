"""`ppl_lvm.ops` for torch tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_map

__all__ = [
    "cholesky",
    "concrete",
    "derivatives",
    "digamma",
    "eye",
    "lgamma",
    "log_softmax",
    "logsumexp",
    "one_hot",
    "remember",
    "scan",
    "softmax",
    "solve_triangular",
    "steps_are_dear",
    "stop_gradient",
    "xp",
    "zeros",
]

Tensor = torch.Tensor


class Gate:
    """Whether gradients pass what was stopped under it (see `stopped_once`)."""

    open = False


_GATE: ContextVar[Gate | None] = ContextVar("gate", default=None)


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return gradient if ctx.gate.open else None, None


@contextlib.contextmanager
def stopped_once(gate: Gate | None) -> Iterator[None]:
    """What is stopped in this block stops gradients only until the gate opens; None: for good.

    A gradient g, taken while the gate is closed, is a function of what its surrogate stopped as well: a derivative of
    g, taken with the gate open, sees that.
    """
    before = _GATE.set(gate)
    try:
        yield
    finally:
        _GATE.reset(before)


def current_gate() -> Gate | None:
    return _GATE.get()


def stop_gradient(x: Tensor) -> Tensor:
    gate = _GATE.get()
    return x.detach() if gate is None else _Stop.apply(x, gate)


def _without_denormals(x: Tensor, axis: int) -> Tensor:
    """`x` with -inf for entries whose softmax, squared, would leave the range of normal numbers.

    They are far below the rounding of the sum, and the denormal numbers that they make of all they are multiplied
    with cost a CPU ten times as much. (XLA flushes those to zero, torch does not.)
    """
    least = 0.5 * math.log(torch.finfo(x.dtype).tiny)
    with torch.no_grad():
        negligible = x - x.amax(axis, keepdim=True) < least
    return x.masked_fill(negligible, -math.inf)


def logsumexp(x: Tensor, axis: int) -> Tensor:
    return torch.logsumexp(_without_denormals(x, axis), axis)


def softmax(x: Tensor, axis: int) -> Tensor:
    return torch.softmax(_without_denormals(x, axis), axis)


def log_softmax(x: Tensor, axis: int) -> Tensor:
    return torch.log_softmax(x, axis)


def lgamma(x: Tensor) -> Tensor:
    return torch.lgamma(x)


def digamma(x: Tensor) -> Tensor:
    return torch.digamma(x)


def one_hot(index: Tensor, classes: int) -> Tensor:
    # torch.nn.functional.one_hot checks the range on the host, which stalls a GPU and cannot be traced.
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).to(torch.get_default_dtype())


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def cholesky(x: Tensor) -> Tensor:
    # The function that raises waits for a GPU at every call to know whether it must.
    lower, info = torch.linalg.cholesky_ex(x)
    return lower.masked_fill((info != 0)[..., None, None], math.nan)


def solve_triangular(lower: Tensor, b: Tensor, transposed: bool) -> Tensor:
    return torch.linalg.solve_triangular(lower.mT if transposed else lower, b, upper=transposed)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: tuple[Tensor, ...], reverse: bool
) -> tuple[Any, Any]:
    carry, ys = init, []
    steps = range(xs[0].shape[0])
    for t in reversed(steps) if reverse else steps:
        carry, y = step(carry, tuple(x[t] for x in xs))
        ys.append(y)
    return carry, tree_map(lambda *parts: torch.stack(parts), *(reversed(ys) if reverse else ys))


def steps_are_dear(like: Tensor) -> bool:
    return True


def concrete(x: Tensor) -> np.ndarray | None:
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return None
    return x.detach().cpu().numpy()


def remember(kept: dict[Any, Any], name: str, compute: Callable[[], Any]) -> Any:
    # What is computed without gradients has none later either.
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()  # which Dynamo does not know
    key = name, torch.is_grad_enabled(), inference
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def derivatives(f: Callable[[Tensor, int], Tensor], x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (first,) = torch.autograd.grad(f(leaf, axis).sum(), leaf, create_graph=True)
        second = []
        for k in range(x.shape[axis]):
            entry = first.select(axis, k).sum()
            if entry.requires_grad:
                (row,) = torch.autograd.grad(entry, leaf, retain_graph=True)
                second.append(row.select(axis, k))
            else:
                second.append(torch.zeros_like(first.select(axis, k)))
        return first.detach(), torch.stack(second, axis).detach()
