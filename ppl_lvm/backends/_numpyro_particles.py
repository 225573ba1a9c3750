"""Draws of a row that meet: guide and model step through their scans together, and particles are picked in between.

A program is run for one draw, under a `vmap` whose axis is called DRAWS; inside a step the lanes exchange weights and
what the scans carry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from numpyro.primitives import _PYRO_STACK

from ppl_lvm.algorithm import Resampling
from ppl_lvm.backends._jax_dists import site_log_prob
from ppl_lvm.backends._numpyro_handlers import Handler, Message, recorded
from ppl_lvm.backends.sites import check_together
from ppl_lvm.errors import ProgramError

Array = jax.Array
DRAWS = "draws"


@contextlib.contextmanager
def _standing_in(messengers: list[Any]) -> Iterator[None]:
    """NumPyro's handlers are these inside the block: a step is run where its scan was entered."""
    kept = _PYRO_STACK[:]
    _PYRO_STACK[:] = messengers
    try:
        yield
    finally:
        _PYRO_STACK[:] = kept


@dataclass(frozen=True)
class _Scan:
    """A scan that has been entered, with the handlers around it."""

    handler: Handler
    f: Callable[[Any, Any], Any]
    init: Any
    xs: Any
    steps: int
    around: list[Any]


class Together:
    """The two scans of one draw. `Namespace.scan` hands the guide's over; the model is run inside it, up to its own.

    `rows(sites)` sums the densities of a step's sites to `[B]`.
    """

    def __init__(
        self,
        resampling: Resampling,
        key: Array,
        draws: int,
        rows: Callable[[Mapping[str, Message]], Array],
        by_row: bool,
        run_model: Callable[[], dict[str, Message]],
    ) -> None:
        self._how, self._key, self._draws, self._rows, self._by_row = resampling, key, draws, rows, by_row
        self._run_model = run_model
        self._guide: _Scan | None = None
        self._left: Any = None
        self.now: dict[str, Array] = {}
        """What the guide drew in this step."""
        self.model: dict[str, Message] = {}
        self.weights: dict[str, Array] = {}
        """`[B, T]`: "before" and "increments" of `draws.Particles`, for this draw."""

    def scan(self, handler: Handler, f: Callable[[Any, Any], Any], init: Any, xs: Any, steps: int) -> Any:
        entered = _Scan(handler, f, init, xs, steps, _PYRO_STACK[:])
        if self._guide is None:
            self._guide = entered
            with _standing_in([]):
                self.model = self._run_model()
            check_together(self._left is not None)
            return self._left
        check_together(self._left is None and handler is not self._guide.handler, self._guide.steps, steps)
        self._left, of_model = self._run(self._guide, entered)
        return of_model

    def _run(self, guide: _Scan, model: _Scan) -> tuple[Any, Any]:
        first: tuple[dict[str, Message], dict[str, Message]] = {}, {}

        def half(side: _Scan, carry: Any, x: Any, t: Array, kept: dict[str, Message]) -> tuple[Any, Any, Any]:
            with _standing_in(list(side.around)), side.handler.step(t) as found:
                carry, y = side.f(carry, x)
            sites = {n: m for n, m in found.items() if m["type"] == "sample"}
            kept.update({n: m for n, m in found.items() if n not in kept})
            return carry, y, sites

        def body(carry: Any, step: Any) -> tuple[Any, Any]:
            (q, p, log_w), (t, x_q, x_p) = carry, step
            q, y_q, drawn = half(guide, q, x_q, t, first[0])
            self.now = {n: m["value"] for n, m in drawn.items()}
            p, y_p, scored = half(model, p, x_p, t, first[1])
            increment = self._rows(scored) - self._rows(drawn)
            (q, p), after = self._met((q, p), log_w + increment, jax.random.fold_in(self._key, t))
            tables = [{n: (m["value"], site_log_prob(m)) for n, m in s.items()} for s in (drawn, scored)]
            return (q, p, after), (y_q, y_p, *tables, log_w, increment)

        rows = self._rows({})
        start = rows - jnp.log(float(self._draws)).astype(rows.dtype)
        steps = jnp.arange(guide.steps), guide.xs, model.xs
        (q, p, _), (y_q, y_p, drawn, scored, before, increments) = jax.lax.scan(
            body, (guide.init, model.init, start), steps
        )
        self.weights = {"before": jnp.moveaxis(before, 0, -1), "increments": jnp.moveaxis(increments, 0, -1)}
        for side, kept, sites in ((guide, first[0], drawn), (model, first[1], scored)):
            recorded(side.handler, kept, sites, side.steps)
        return (q, y_q), (p, y_p)

    def _met(self, carries: Any, log_w: Array, key: Array) -> tuple[Any, Array]:
        """What this draw goes on with, and its normalised log weights, after weights `[B]` of a step."""
        every = jax.lax.all_gather(log_w, DRAWS)  # [K, B]
        total = logsumexp(every, axis=0)
        K = self._draws
        log_w = log_w - total
        if self._how.threshold == 0.0 or K == 1:
            return carries, log_w
        weights = jax.lax.stop_gradient(jnp.exp(every - total))
        chosen, own = _chosen(weights, self._how.scheme, key), jnp.arange(K)[:, None]
        again = jnp.full(total.shape, True)
        if self._how.threshold < 1.0:
            again = 1.0 / (weights**2).sum(0) <= self._how.threshold * K
        source = jnp.where(again, chosen, own)[jax.lax.axis_index(DRAWS)]

        def pick(leaf: Array) -> Array:
            leaf = jnp.asarray(leaf)
            if leaf.ndim == 0 and self._by_row:
                return leaf
            everywhere = jax.lax.all_gather(leaf, DRAWS)
            if not self._by_row:
                return everywhere[source[0]]
            if leaf.shape[0] != len(source):
                raise ProgramError(
                    f"A scan carries an array of shape {leaf.shape}, and rows ({len(source)}) must be its first axis, "
                    f"so that every row can go on with another of its draws."
                )
            return everywhere[source, jnp.arange(len(source))]

        return jax.tree.map(pick, carries), jnp.where(again, -jnp.log(float(K)).astype(log_w.dtype), log_w)


def _chosen(weights: Array, scheme: str, key: Array) -> Array:
    """Indices `[K, B]` of particles drawn from weights `[K, B]`."""
    K, B = weights.shape
    if scheme == "systematic":
        at = (jnp.arange(K)[:, None] + jax.random.uniform(key, (1, B), weights.dtype)) / K
    else:
        at = jax.random.uniform(key, (K, B), weights.dtype)
    below = jnp.cumsum(weights, axis=0)
    found = jax.vmap(jnp.searchsorted, in_axes=1, out_axes=1)(below, at)
    return jnp.minimum(found, K - 1)
