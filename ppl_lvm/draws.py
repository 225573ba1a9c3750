"""`Draws` and `Loss`: all that an objective ever sees, and the verbs that carry every estimator's gradient.

A backend runs model and guide once on a batch of rows and hands over a table of arrays, one `Site` a row. Axes are
`[outer M, draws K, rows B]` for sites inside the data plate (local) and `[M]` for the others (global). An objective
says where its expectation is by calling a verb, and never reduces a draws axis itself; an estimator says how a draw
carries gradient, and the verbs add what it needs: score terms with their baselines, weights and credits of variants,
the doubly reparameterised surrogate. All score terms have the value zero and a first-order gradient.

When some site has variants (several program values per draw, such as the whole support), the draws axis of the table
has K * V entries, variants fastest: entry `t` belongs to draw `t // V`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, Signal
from ppl_lvm.errors import LegalityError
from ppl_lvm.ops import Array, stop_gradient

Reduction = Callable[[Array, int], Array]
"""`f(array, axis)`: symmetric, twice differentiable, reduces `axis` (see `ops.derivatives`)."""


@dataclass(frozen=True)
class Plate:
    """A plate around a site: `size` independent rows of which `subsample` are in this run."""

    name: str
    size: int
    subsample: int


@dataclass(frozen=True)
class Site:
    """One sample site of the guide or the model. Densities are unscaled, masked and summed over inner plates."""

    name: str
    role: Literal["latent", "observed", "auxiliary"]
    local: bool
    value: Array
    """Local `[M, K, B, *inner, *event]`, global `[M, *event]`."""
    log_p: Array | None
    """Local `[M, K, B]`, global `[M]`; None for a site that only the guide has."""
    log_q: Array | None
    """Live in the value and in the guide's parameters; None for an observed site."""
    log_q_frozen: Array | None = None
    """The same value, the guide's parameters stopped: the guide replayed on its own values."""
    estimator: Estimator | None = None
    plates: tuple[Plate, ...] = ()
    downstream: frozenset[str] = frozenset()
    """Sites whose density depends on this site's value, itself included, through the guide's later sites too."""
    variants: int = 1
    weight: Array | None = None
    credit: Array | None = None
    through: Array | None = None
    log_p_full: Array | None = None
    log_q_full: Array | None = None
    """Densities before inner plates are summed, `[M, K, B, *inner]`."""
    log_q_drawn: Array | None = None
    """Of a partly observed site: log q of the values as drawn, before the observed ones took their places."""
    extra: Mapping[str, Array] = field(default_factory=dict)
    """What the objective requested before the run, by name: "kl" of shape `[M, K, B]` or `[M]`."""
    user_scale: Array | float = 1.0
    """What `poutine.scale` or `handlers.scale` multiply the model's density by, the plates' part divided out."""
    guide_scale: Array | float = 1.0
    """The same of the guide's density."""

    @property
    def log_weight(self) -> Array:
        """Log probabilities of an exhaustive site's values; they sum to one over them, observed or not."""
        return self.log_q if self.log_q_drawn is None else self.log_q_drawn


@dataclass(frozen=True)
class Loss:
    """Scalars to minimise. The gradient of each reaches its own group of parameters only.

    `guide = None` means the same loss as the model's. `extra` trains the parameters of objectives and estimators.
    """

    model: Array
    guide: Array | None = None
    extra: Array | None = None


@dataclass
class Ledger:
    """What the verbs saw while a guide's loss was built: for estimators that keep state or learn a baseline."""

    signals: dict[str, Signal] = field(default_factory=dict)
    extra: list[Array] = field(default_factory=list)


@dataclass(frozen=True)
class _Level:
    """The sites of one level (local or global) on axes `[A, D * V, C]`: the draws axis is always the second."""

    draws: int
    variants: int
    latents: Mapping[str, Site]
    base: Array | float
    """Weight of each draw before variants: 1 / D, or given."""


@dataclass(frozen=True)
class Draws:
    """The table of one run. `scale` is N / B, a number that is never inside an exponent."""

    sites: Mapping[str, Site]
    M: int
    K: int
    B: int
    N: Array | float
    scale: Array | float
    side: Literal["model", "guide"] = "guide"
    outer_weight: Array | None = None
    """Probabilities `[M]` of the outer draws when they are laid out instead of drawn; None: 1 / M."""
    batch: Array | None = None
    states: Mapping[str, Array] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    allowed: frozenset[str] | None = None
    """The verbs that the objective declared; None allows all."""

    def view(self, side: Literal["model", "guide"]) -> Draws:
        """The same run as the model's loss or the guide's loss sees it (frozen densities are the guide's)."""
        return replace(self, side=side, ledger=Ledger())

    # Sums over local sites, [M, K, B].

    @cached_property
    def log_prior(self) -> Array:
        """`sum log p` over local latent sites."""
        return self._sum(s.log_p for s in self._local() if s.role == "latent")

    @cached_property
    def log_lik(self) -> Array:
        """`sum log p` over local observed sites."""
        return self._sum(s.log_p for s in self._local() if s.role == "observed")

    @cached_property
    def log_p(self) -> Array:
        """`log p(x, z)` per row."""
        return self.log_prior + self.log_lik

    @cached_property
    def log_q(self) -> Array:
        """`log q(z | x)` per row; in the guide's view frozen where a site's estimator asks for it."""
        return self._sum(self.density(s) for s in self._local() if s.log_q is not None)

    @cached_property
    def log_w(self) -> Array:
        """`log p(x, z) - log q(z | x)` per row."""
        return self.log_p - self.log_q

    @cached_property
    def log_weight(self) -> Array | float:
        """`[M, K, B]`: -log K, plus log q of enumerated sites; `exp` sums to one over draws."""
        return self._log_weight(self._level(local=True))

    @cached_property
    def log_w_global(self) -> Array:
        """`log p(g) - log q(g)` per outer draw, `[M]`, global observed sites included."""
        return self._global_sum(lambda s: self.log_ratio(s))

    def density(self, site: Site) -> Array:
        """`log q` of a site as this view sees it."""
        if self.side == "guide" and site.log_q_frozen is not None:
            return site.log_q_frozen
        return site.log_q

    def log_ratio(self, site: Site) -> Array:
        """`log p - log q` of one site (one of the two where the other does not exist)."""
        if site.log_q is None:
            return site.log_p
        if site.log_p is None:
            return -self.density(site)
        return site.log_p - self.density(site)

    # The verbs.

    def mean(self, h: Array | None = None, cost: Mapping[str, Array] | None = None) -> Array:
        """`E_q h` per row, `[M, K, B] -> [M, B]`.

        `cost` splits h by the site whose density each part is; every score term is then multiplied only by the parts
        downstream of its site (Rao-Blackwellised). With `cost` alone, h is their sum.
        """
        self._declared("mean")
        if h is None:
            if not cost:
                raise ValueError("mean needs h, or the costs that h is the sum of.")
            h = sum(cost.values())
        return self._expect(self._level(local=True), self._spread(h), cost)

    def joint(self, f: Reduction, log_w: Array) -> Array:
        """`E f(log_w_1..K)` per row, `[M, K, B] -> [M, B]`, for a symmetric f of all draws at once."""
        self._declared("joint")
        level = self._level(local=True)
        self._refuse_exhaustive(level, "joint")
        log_w = self._spread(log_w)
        split = self._split(log_w, level)
        base = split[:, :, 0]
        value = f(base, 1)
        loss = value
        if self.side == "guide" and self._frozen(level):
            loss = stop_gradient(value) + self._doubly_reparameterised(f, base, level)
        for site in self._scored(level):
            signal = Signal(stop_gradient(base), stop_gradient(value)[:, None], f, self.batch)
            score = self._split(self._score(site), level)[:, :, 0]
            loss = loss + ops.xp(score).sum(score * (signal.value - self._baseline(site, signal)), axis=1)
        credit, through = self._credits(level)
        if credit is None and through is None:
            return loss
        xp = ops.xp(base)
        for v in range(level.variants):
            changed = f(replace_one_each(base, split[:, :, v]), 1)  # [M, K, B]: draw k at its variant v
            if credit is not None:
                loss = loss + xp.sum(self._split(credit, level)[:, :, v] * stop_gradient(changed), axis=1)
            if through is not None and self.side == "guide":
                r = self._split(through, level)[:, :, v]
                loss = loss + xp.sum(r * (changed - stop_gradient(changed)), axis=1)
        return loss

    def log_mean_exp(self, h: Array) -> Array:
        """`log E_q exp h` per row, `[M, K, B] -> [M, B]`, with the self-normalised gradient."""
        self._declared("log_mean_exp")
        level = self._level(local=True)
        h = self._spread(h) + self._log_weight(level)
        for site in self._scored(level):
            h = h + self._score(site)
        return ops.logsumexp(h, 1)

    def weights(self, log_w: Array) -> Array:
        """Self-normalised importance weights `[M, K, B]`; they sum to one over draws."""
        self._declared("weights")
        return ops.softmax(self._spread(log_w) + self._log_weight(self._level(local=True)), 1)

    def variance(self, h: Array) -> Array:
        """Variance of h over draws that carry no gradient, `[M, K, B] -> [M, B]`; unbiased for sampled draws."""
        self._declared("variance")
        level = self._level(local=True)
        xp = ops.xp(h)
        h = self._spread(h)
        if level.variants == 1:
            centred = h - xp.mean(h, axis=1, keepdims=True)
            return xp.sum(centred * centred, axis=1) / max(level.draws - 1, 1)
        w = stop_gradient(xp.exp(self._log_weight(level)))
        centred = h - xp.sum(w * h, axis=1, keepdims=True)
        return xp.sum(w * centred * centred, axis=1)

    def total(self, rows: Array, glob: Array | None = None) -> Array:
        """`E over globals of [ glob + (N / B) sum_B rows ]`, a scalar; `glob` defaults to `log p(g) - log q(g)`."""
        glob = self.log_w_global if glob is None else glob
        t = glob + self.scale * ops.xp(rows).sum(rows, axis=1)
        return self._expect(self._level(local=False), t[None, :, None], None)[0, 0]

    # What the verbs are made of.

    def _declared(self, verb: str) -> None:
        if self.allowed is not None and verb not in self.allowed:
            raise LegalityError(
                f"The objective calls `{verb}` but declares verbs = {sorted(self.allowed)}, from which legality was "
                f"computed; add {verb!r} to its `verbs`."
            )

    def _local(self) -> list[Site]:
        return [s for s in self.sites.values() if s.local]

    def _sum(self, terms: Iterable[Array]) -> Array:
        terms = list(terms)
        return sum(terms[1:], terms[0]) if terms else self._zeros_rows

    @cached_property
    def _zeros_rows(self) -> Array:
        like = next(a for s in self.sites.values() for a in (s.log_p, s.log_q) if a is not None)
        level, outer = self._level(local=True), self._level(local=False)
        shape = (outer.draws * outer.variants, level.draws * level.variants, self.B)
        return ops.zeros(shape, like)

    def _spread(self, h: Array) -> Array:
        return h + self._zeros_rows if h.shape != self._zeros_rows.shape else h

    def _global_sum(self, term: Callable[[Site], Array]) -> Array:
        terms = [term(s) for s in self.sites.values() if not s.local]
        return sum(terms[1:], terms[0]) if terms else self._zeros_rows[:, 0, 0]

    def _level(self, local: bool) -> _Level:
        latents = {n: s for n, s in self.sites.items() if s.local == local and s.role != "observed"}
        variants = 1
        for site in latents.values():
            variants *= site.variants
        draws = self.K if local else self.M
        base: Array | float = 1.0 / draws
        if not local and self.outer_weight is not None:
            base = self.outer_weight[None, :, None]
        return _Level(draws, variants, latents, base)

    def _lift(self, site: Site, array: Array) -> Array:
        return array if site.local else array[None, :, None]

    def _scored(self, level: _Level) -> list[Site]:
        return [s for s in level.latents.values() if s.estimator is not None and s.estimator.scored]

    def _frozen(self, level: _Level) -> list[Site]:
        return [s for s in level.latents.values() if s.estimator is not None and s.estimator.frozen]

    def _score(self, site: Site) -> Array:
        log_q = self._lift(site, site.log_q)
        return log_q - stop_gradient(log_q)

    def _split(self, h: Array, level: _Level) -> Array:
        """`[A, D * V, C] -> [A, D, V, C]`."""
        return ops.xp(h).reshape(h, (h.shape[0], level.draws, level.variants, h.shape[-1]))

    def _refuse_exhaustive(self, level: _Level, verb: str) -> None:
        for site in level.latents.values():
            if site.estimator is not None and site.estimator.exhaustive:
                raise LegalityError(f"Site {site.name!r} is enumerated, which `{verb}` cannot weigh as draws.")

    def _log_weight(self, level: _Level) -> Array | float:
        xp = ops.xp(self._zeros_rows)
        total: Array | float = math.log(level.base) if isinstance(level.base, float) else xp.log(level.base)
        for site in level.latents.values():
            if site.estimator is not None and site.estimator.exhaustive:
                total = total + self._lift(site, site.log_weight)
        return total

    def _weights_of(self, level: _Level) -> dict[str, Array]:
        """The weight of each entry's variant, one array a site that has any; None-weighted sites are exhaustive."""
        found = {}
        for name, site in level.latents.items():
            if site.estimator is not None and site.estimator.exhaustive:
                found[name] = ops.xp(site.log_q).exp(self._lift(site, site.log_weight))
            elif site.weight is not None:
                found[name] = self._lift(site, site.weight)
        return found

    def _credits(self, level: _Level) -> tuple[Array | None, Array | None]:
        """`s` and `r` of the variants: each site's own, times the other variant sites' weights."""
        weights = self._weights_of(level)
        sums: list[Array | None] = [None, None]
        for name, site in level.latents.items():
            for i, own in enumerate((site.credit, site.through)):
                if own is None:
                    continue
                term = self._lift(site, own)
                for other, w in weights.items():
                    if other != name:
                        term = term * stop_gradient(w)
                sums[i] = term if sums[i] is None else sums[i] + term
        return sums[0], sums[1]

    def _baseline(self, site: Site, signal: Signal) -> Array | float:
        """The site's baseline for a signal, stopped; notes both for an estimator that learns from them."""
        estimator = site.estimator
        assert estimator is not None
        own = self.own.get(site.name, {})
        baseline = estimator.baseline_for(signal, own, self.states.get(site.name))
        if self.side == "guide":
            self.ledger.signals[site.name] = signal
            if own:
                difference = signal.value - baseline
                self.ledger.extra.append(ops.xp(difference).mean(difference * difference))
        return baseline if isinstance(baseline, float) else stop_gradient(baseline)

    def _expect(self, level: _Level, h: Array, cost: Mapping[str, Array] | None) -> Array:
        xp = ops.xp(h)
        base = level.base
        if not isinstance(base, float) and level.variants > 1:
            base = xp.reshape(xp.stack([base] * level.variants, axis=2), (1, -1, 1))
        weights = self._weights_of(level)
        weight = None
        for w in weights.values():
            weight = w if weight is None else weight * w
        weighted = h if weight is None else weight * h
        total = xp.sum(base * weighted, axis=1)
        credit, through = self._credits(level)
        if credit is not None:
            total = total + xp.sum(base * credit * stop_gradient(h), axis=1)
        if through is not None and self.side == "guide":
            total = total + xp.sum(base * through * (h - stop_gradient(h)), axis=1)
        for site in self._scored(level):
            part = stop_gradient(h if cost is None else self._spread(self._downstream(site, cost)))
            score = base * self._score(site)
            if weight is None:
                signal = Signal(part, part, None, self.batch)
                total = total + xp.sum(score * (part - self._baseline(site, signal)), axis=1)
                continue
            # A draw's signal is its weighted sum over variants, so its baseline is shared by them.
            stopped = stop_gradient(weight)
            per_draw = xp.sum(self._split(stopped * part, level), axis=2)
            baseline = self._baseline(site, Signal(per_draw, per_draw, None, self.batch))
            if not isinstance(baseline, float):
                repeated = xp.broadcast_to(baseline[:, :, None], self._split(h, level).shape)
                baseline = xp.reshape(repeated, h.shape)
            share = stopped * (part - baseline)
            if through is not None and self.side == "guide":
                share = share + stop_gradient(through) * part
            total = total + xp.sum(score * share, axis=1)
        return total

    def _downstream(self, site: Site, cost: Mapping[str, Array]) -> Array:
        parts = [part for name, part in cost.items() if name in site.downstream]
        return sum(parts[1:], parts[0]) if parts else self._zeros_rows

    def _doubly_reparameterised(self, f: Reduction, log_w: Array, level: _Level) -> Array:
        """`sum_k sg(f'_k - f''_kk) (log_w_k + L_k) - sg(f'_k) L_k`, value zero.

        `log_w` holds frozen densities of the doubly reparameterised sites; `L` is the log q of the score sites, which
        keep their ordinary direct term. Tucker, Lawson, Gu, Maddison (2018), arXiv:1810.04152, for any f.
        """
        first, second = ops.derivatives(f, stop_gradient(log_w), 1)
        first, second = stop_gradient(first), stop_gradient(second)
        scores = [self._split(self._lift(s, s.log_q), level)[:, :, 0] for s in self._scored(level)]
        terms = (first - second) * log_w
        for score in scores:
            terms = terms - second * score
        total = ops.xp(log_w).sum(terms, axis=1)
        return total - stop_gradient(total)


def replace_one_each(base: Array, new: Array) -> Array:
    """`[M, J, K, B]`: `base` along J copies, in copy k with draw k replaced by `new[:, k]`; reduce axis 1.

    Axis 1 is the draws axis that f reduces, axis 2 numbers the copies.
    """
    one = ops.eye(base.shape[1], base)[None, :, :, None]
    return ops.xp(base).where(one > 0, new[:, None], base[:, :, None])
