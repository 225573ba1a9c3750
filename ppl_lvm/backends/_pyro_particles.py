"""Draws of a row that meet: guide and model step through their scans together, and particles are picked in between.

Draws are dimensions on the left of every batch shape, so a step's weights are those of all of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ppl_lvm.algorithm import Resampling
from ppl_lvm.backends._pyro_handlers import Handler, Message, stacked
from ppl_lvm.backends.sites import check_together
from ppl_lvm.errors import ProgramError


@contextlib.contextmanager
def _standing_in(messengers: list[Any], dims: list[Any]) -> Iterator[None]:
    """Pyro's messengers and dimensions of plates are these inside the block: a step is run where its scan was entered.
    """
    kept = _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:]
    _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = messengers, dims
    try:
        yield
    finally:
        _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = kept


@dataclass(frozen=True)
class _Scan:
    """A scan that has been entered, with the messengers around it."""

    handler: Handler
    f: Callable[[Any, Any], Any]
    init: Any
    xs: Any
    steps: int
    around: tuple[list[Any], list[Any]]

    def step(self, carry: Any, t: int) -> tuple[Any, Any, dict[str, Message]]:
        with _standing_in(*(list(part) for part in self.around)):
            self.handler.step, self.handler.kept = t, {}
            try:
                carry, y = self.f(carry, tree_map(lambda a: None if a is None else a[t], self.xs))
                return carry, y, self.handler.kept
            finally:
                self.handler.step, self.handler.kept = None, None


class Together:
    """The two scans of a run. `Namespace.scan` hands the guide's over; the model is run inside it, up to its own.

    `rows(sites)` sums the densities of a step's sites to `[M, K, B]`.
    """

    def __init__(
        self,
        resampling: Resampling,
        rows: Callable[[dict[str, Message]], Tensor],
        by_row: bool,
        run_model: Callable[[], dict[str, Message]],
    ) -> None:
        self._how, self._rows, self._by_row, self._run_model = resampling, rows, by_row, run_model
        self._guide: _Scan | None = None
        self._left: Any = None
        self.now: dict[str, Tensor] = {}
        """What the guide drew in this step."""
        self.model: dict[str, Message] = {}
        self.before: Tensor | None = None
        self.increments: Tensor | None = None
        """`[M, K, B, T]`, as in `draws.Particles`."""

    def scan(self, handler: Handler, f: Callable[[Any, Any], Any], init: Any, xs: Any, steps: int) -> Any:
        entered = _Scan(handler, f, init, xs, steps, (_PYRO_STACK[:], _DIM_ALLOCATOR._stack[:]))
        if self._guide is None:
            self._guide = entered
            with _standing_in([], []):
                self.model = self._run_model()
            check_together(self._left is not None)
            return self._left
        check_together(self._left is None and handler is not self._guide.handler, self._guide.steps, steps)
        self._left, of_model = self._run(self._guide, entered)
        return of_model

    def _run(self, guide: _Scan, model: _Scan) -> tuple[Any, Any]:
        q, p = guide.init, model.init
        ys: tuple[list[Any], list[Any]] = [], []
        before, increments = [], []
        log_w: Tensor | None = None
        for t in range(guide.steps):
            q, y, drawn = guide.step(q, t)
            ys[0].append(y)
            self.now = {n: m["value"] for n, m in drawn.items()}
            p, y, scored = model.step(p, t)
            ys[1].append(y)
            increment = self._rows(scored) - self._rows(drawn)
            if log_w is None:
                log_w = torch.full_like(increment, -math.log(increment.shape[1]))
            before.append(log_w)
            increments.append(increment)
            if t + 1 < guide.steps:
                q, p, log_w = self._met(guide, model, q, p, log_w + increment)
        self.before, self.increments = torch.stack(before, -1), torch.stack(increments, -1)
        return (q, stacked(ys[0])), (p, stacked(ys[1]))

    def _met(self, guide: _Scan, model: _Scan, q: Any, p: Any, log_w: Tensor) -> tuple[Any, Any, Tensor]:
        """What the draws go on with, and their normalised log weights, after weights `[M, K, B]` of a step."""
        log_w = log_w - torch.logsumexp(log_w, 1, keepdim=True)
        K = log_w.shape[1]
        if self._how.threshold == 0.0 or K == 1:
            return q, p, log_w
        weights = log_w.detach().exp()
        source = _chosen(weights, self._how.scheme)
        again = torch.ones_like(source[:, :1], dtype=torch.bool)
        if self._how.threshold < 1.0:
            again = 1.0 / (weights**2).sum(1, keepdim=True) <= self._how.threshold * K
            source = torch.where(again, source, torch.arange(K)[:, None])

        def pick(leaf: Any, first: Any) -> Any:
            if not isinstance(leaf, Tensor) or (leaf.dim() == 0 and self._by_row):
                return leaf
            rank = first.dim() if isinstance(first, Tensor) else 0
            if self._by_row and (rank == 0 or first.shape[0] != log_w.shape[2]):
                raise ProgramError(
                    f"A scan carries an array of shape {tuple(getattr(first, 'shape', ()))}, and rows "
                    f"({log_w.shape[2]}) must be its first axis, so that every row can go on with another of its draws."
                )
            lead = leaf.dim() - rank
            if lead == 0:  # the same for all draws
                return leaf
            trail = tuple(leaf.shape[lead + self._by_row :])
            rows = (log_w.shape[2],) if self._by_row else ()
            index = (source if lead > 1 else source[0]) if self._by_row else (source if lead > 1 else source[0])[..., 0]
            full = leaf.expand((*index.shape[: lead - 1], K, *rows, *trail))
            index = index.reshape(tuple(index.shape) + (1,) * len(trail)).expand(full.shape)
            return torch.gather(full, lead - 1, index)

        q, p = (_mapped(pick, now, side.init) for side, now in ((guide, q), (model, p)))
        return q, p, torch.where(again, torch.full_like(log_w, -math.log(K)), log_w)


def _mapped(f: Callable[[Any, Any], Any], tree: Any, like: Any) -> Any:
    """`f(leaf, leaf of like)`."""
    leaves = iter(tree_flatten(like)[0])
    return tree_map(lambda leaf: f(leaf, next(leaves)), tree)


def _chosen(weights: Tensor, scheme: str) -> Tensor:
    """Indices `[M, K, B]` of particles drawn from weights `[M, K, B]`."""
    M, K, B = weights.shape
    if scheme == "systematic":
        at = (torch.arange(K)[:, None] + torch.rand((M, 1, B), dtype=weights.dtype)) / K
    else:
        at = torch.rand((M, K, B), dtype=weights.dtype)
    below = weights.cumsum(1).movedim(1, 2).contiguous()
    return torch.searchsorted(below, at.movedim(1, 2).contiguous()).clamp(max=K - 1).movedim(2, 1)
