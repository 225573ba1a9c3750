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
from typing import Any, Literal

import numpy as np

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, Signal
from ppl_lvm.errors import LegalityError
from ppl_lvm.ops import Array, stop_gradient

Reduction = Callable[[Array, int], Array]
"""`f(array, axis)`: twice differentiable, reduces `axis` (see `ops.derivatives`)."""


@dataclass(frozen=True)
class Plate:
    """A plate around a site: `size` independent rows of which `subsample` are in this run."""

    name: str
    size: int
    subsample: int
    axis: int | None = None
    """Its axis among `inner` in `[M, K, B, *inner]`; None for the data plate."""


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
    ancestors: frozenset[str] = frozenset()
    """Guide sites that its draw depends on."""
    variants: int = 1
    weight: Array | None = None
    credit: Array | None = None
    through: Array | None = None
    control: Array | None = None
    """See `algorithm.Variant`."""
    log_p_full: Array | None = None
    log_q_full: Array | None = None
    """Densities before inner plates are summed: `[M, K, B, *inner]` of a local site, one in the place of axes that the
    site is not in."""
    log_q_drawn: Array | None = None
    """Of a partly observed site: log q of the values as drawn, before the observed ones took their places."""
    log_q_inner: Array | None = None
    """Of an auxiliary site that the objective's `marginal` sums out: its own density at all of its J draws, summed. Its
    `log_q` is then minus the log of its estimated posterior given the sites that look at it, over its own density."""
    extra: Mapping[str, Array] = field(default_factory=dict)
    """What the objective requested before the run, by name: "kl" of shape `[M, K, B]` or `[M]`. Of a local site with D
    elements, events and inner plates flattened: "cross" `[M, K, B, B, D]`, where entry (i, j) is log q of row i's value
    under the guide's distribution at row j; "mean" and "variance" of that distribution, `[M, K, B, D]`; "prior", a draw
    from the model's, like the value, and "prior_log_p" `[M, K, B]` where it is not reparameterised."""
    user_scale: Array | float = 1.0
    """What `poutine.scale` or `handlers.scale` multiply the model's density by, the plates' part divided out."""
    guide_scale: Array | float = 1.0
    """The same of the guide's density."""
    joint: tuple[str, ...] = ()
    """Of a site that is summed out and that several look at: those, as `log_p` is the log of the sum over this site of
    their joint density with it. They have no `log_p` of their own, and the observed ones no row."""
    mixed: bool = False
    """That density is of latent and of observed sites, so neither prior nor likelihood."""

    @property
    def log_weight(self) -> Array:
        """Log probabilities of an exhaustive site's values; they sum to one over them, observed or not."""
        return self.log_q if self.log_q_drawn is None else self.log_q_drawn

    @property
    def log_score(self) -> Array:
        """Log density of what was drawn at this site, whose gradient is its score."""
        return self.log_q if self.log_q_inner is None else self.log_q_inner


@dataclass(frozen=True)
class Loss:
    """Scalars to minimise. The gradient of each reaches its own group of parameters only.

    `guide = None` means the same loss as the model's. `extra` trains the parameters of objectives and estimators.
    """

    model: Array
    guide: Array | None = None
    extra: Array | None = None


@dataclass(frozen=True)
class Particles:
    """Log weights of draws that were resampled between steps, `[M, K, B, T]`. Resampling has no gradient."""

    before: Array
    """Before each step, normalised over draws: `-log K` where they have just been resampled."""
    increments: Array
    """`log p(x_t, z_t | ..) - log q(z_t | ..)` of the draw that stands at each place in step t."""


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
    dream: Mapping[str, Array] = field(default_factory=dict)
    """`log q` of each latent site at values that the model drew with its data: `[B]`, or a number for a global site."""
    particles: Particles | None = None
    """Where the objective resamples: sites then hold what each place drew in every step, whoever came before it."""
    ledger: Ledger = field(default_factory=Ledger)
    allowed: frozenset[str] | None = None
    """The verbs that the objective declared; None allows all."""

    def view(self, side: Literal["model", "guide"], allowed: frozenset[str] | None = None) -> Draws:
        """The same run as the model's loss or the guide's loss sees it (frozen densities are the guide's)."""
        return replace(self, side=side, ledger=Ledger(), allowed=allowed)

    # Sums over local sites, [M, K, B].

    @cached_property
    def log_prior(self) -> Array:
        """`sum log p` over local latent sites."""
        return self._log_p_of("latent")

    @cached_property
    def log_lik(self) -> Array:
        """`sum log p` over local observed sites."""
        return self._log_p_of("observed")

    @cached_property
    def log_p(self) -> Array:
        """`log p(x, z)` per row, sites that only the model has summed out."""
        return self._sum(s.log_p for s in self._local() if s.log_p is not None)

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

    def kl_term(self, site: Site) -> Array:
        """`log p(z) - log q(z | x)` of a latent site, or minus its KL in closed form where that was requested."""
        return -site.extra["kl"] if "kl" in site.extra else self.log_ratio(site)

    # The verbs.

    def mean(self, h: Array | None = None, cost: Mapping[str, Array] | None = None) -> Array:
        """`E_q h` per row, `[M, K, B] -> [M, B]`.

        `cost` splits h by the site whose density each part is; every score term is then multiplied only by the parts
        downstream of its site (Rao-Blackwellised). A part that keeps its inner plates, `[M, K, B, *inner]` as `terms`
        gives them, is credited element by element to the sites in the same plates. With `cost` alone, h is their sum. A
        part under a name that is no site's is credited to none; that under "*", which looks at every draw of a row, to
        all.
        """
        self._declared("mean")
        if h is None:
            if not cost:
                raise ValueError("mean needs h, or the costs that h is the sum of.")
            parts = [_of_rows(part) for part in cost.values()]
            h = sum(parts[1:], parts[0])
        return self._expect(self._level(local=True), self._spread(h), cost)

    def terms(self, site: Site) -> tuple[Array | None, Array | None]:
        """`log p` and `log q` of a site as this view sees it; of a local one by element of plates where that helps."""
        if site.local and self._in_plates and (site.log_q_frozen is None or self.side == "model"):
            return site.log_p_full, site.log_q_full
        return site.log_p, None if site.log_q is None else self.density(site)

    def joint(self, f: Reduction, log_w: Array) -> Array:
        """`E f(log_w_1..K)` per row, `[M, K, B] -> [M, B]`, for a function f of all draws at once.

        Over sites that are enumerated the expectation is exact: the sum over all choices of one value for each draw.
        """
        self._declared("joint")
        level = self._level(local=True)
        log_w = self._spread(log_w)
        if any(s.estimator is not None and s.estimator.exhaustive for s in level.latents.values()):
            return self._joint_of_all(f, log_w, level)
        split = self._split(log_w, level)
        base = split[:, :, 0]
        scores = {s.name: self._split(self._score(s), level)[:, :, 0] for s in self._scored(level)}
        loss = self._joint(f, base, scores, level, lambda a: self._split(a, level)[:, :, 0])
        credit, through, control = self._credits(level)
        for site in self._scored(level):
            # Draws that follow a value which gradient flows through: their score is part of that gradient.
            count = self._counts(level, site.name)[1]
            if count is not None:
                term = self._score(site) * stop_gradient(count)
                credit = term if credit is None else credit + term
        if credit is None and through is None:
            return loss
        xp = ops.xp(base)
        if control is not None:
            loss = loss + xp.sum(control, axis=1)
        for v in range(level.variants):
            changed = f(replace_one_each(base, split[:, :, v]), 1)  # [M, K, B]: draw k at its variant v
            if credit is not None:
                loss = loss + xp.sum(self._split(credit, level)[:, :, v] * stop_gradient(changed), axis=1)
            if through is not None:
                r = self._split(through, level)[:, :, v]
                loss = loss + xp.sum(r * (changed - stop_gradient(changed)), axis=1)
        return loss

    def log_mean_exp(self, log_w: Array, power: Array | float = 1.0) -> Array:
        """`log E_q w^power` per row, `[M, K, B] -> [M, B]`, with the self-normalised gradient.

        With `v = softmax(power log_w)` over draws, a score site's is `sum_k v_k grad (power log_w_k + log q_k)`. Doubly
        reparameterised sites have `power (1 - power) sum_k v_k d log_w_k / dz_k dz_k / dphi`.
        """
        self._declared("log_mean_exp")
        level = self._level(local=True)
        log_w = self._spread(log_w)
        h = power * log_w + self._log_weight(level)
        for site in self._scored(level):
            h = h + self._score(site)
        value = ops.logsumexp(h, 1)
        if self.side == "model" or not self._frozen(level):
            return value
        terms = power * (1.0 - power) * log_w + self._log_weight(level)
        for site in level.latents.values():
            if site.estimator is not None and (site.estimator.scored or site.estimator.exhaustive):
                log_q = self._lift(site, site.log_score)
                terms = terms - power**2 * log_q + (log_q if site.estimator.scored else 0.0)
        surrogate = ops.xp(h).sum(stop_gradient(ops.softmax(h, 1)) * terms, axis=1)
        return stop_gradient(value) + surrogate - stop_gradient(surrogate)

    def weighted(self, log_w: Array, h: Array) -> Array:
        """`sum_k v_k h_k` per row, `[M, K, B] -> [M, B]`: h under the self-normalised weights `v = softmax(log_w)`.

        The weights carry no gradient.
        """
        self._declared("weighted")
        return ops.xp(h).sum(self._normalised(log_w) * self._spread(h), axis=1)

    def wake(self, log_w: Array) -> Array:
        """`sum_k v_k log q(z_k)` per row, `[M, K, B] -> [M, B]`, with stopped `v = softmax(log_w)` and draws.

        Doubly reparameterised sites have the same gradient in expectation as
        `sum_k (v_k - v_k^2) d log_w_k / dz_k dz_k / dphi`.
        """
        self._declared("wake")
        level = self._level(local=True)
        v = self._normalised(log_w)
        log_q = self._sum(s.log_q for s in self._local() if s.log_q is not None)
        value = ops.xp(v).sum(v * log_q, axis=1)
        if self.side == "model" or not self._frozen(level):
            return value
        terms = (v - v * v) * self._spread(log_w)
        for site in self._scored(level):
            terms = terms + (2.0 * v - v * v) * self._lift(site, site.log_score)
        surrogate = ops.xp(v).sum(terms, axis=1)
        return stop_gradient(value) + surrogate - stop_gradient(surrogate)

    def variance(self, h: Array) -> Array:
        """Variance of h over draws without gradient, `[M, K, B] -> [M, B]`; unbiased, exact if all are enumerated.

        `mean_k h_k^2 - mean_{j != k} h_j h_k`, where enumerated values of one draw are weighed by their probability.
        """
        self._declared("variance")
        mean, square = self._moments(h)
        xp, draws = ops.xp(mean), mean.shape[1]
        if draws == 1:
            return square[:, 0] - mean[:, 0] ** 2
        both = xp.sum(mean, axis=1) ** 2 - xp.sum(mean * mean, axis=1)
        return xp.mean(square, axis=1) - both / (draws * (draws - 1))

    def squares(self, h: Array) -> Array:
        """`E h^2` per row over draws that carry no gradient, wherever they come from, `[M, K, B] -> [M, B]`."""
        self._declared("squares")
        _, square = self._moments(h)
        return ops.xp(square).mean(square, axis=1)

    def filtered(self) -> Array:
        """`sum_t log sum_k W_k alpha_k` per row, `[M, B]`, of draws that are resampled between the steps of a scan.

        A score site's signal is the whole sum, and its score that of everything drawn, also by particles that died.
        """
        self._declared("filtered")
        assert self.particles is not None
        weights = self.particles.before + self.particles.increments
        rows = ops.xp(weights).sum(ops.logsumexp(weights, 1), axis=-1)
        value = stop_gradient(rows)[:, None]
        for site in self._scored(self._level(local=True)):
            score = self._score(site)
            baseline = self._baseline(site, Signal(value, value, None, self.batch))
            rows = rows + ops.xp(score).sum(score * (value - baseline), axis=1)
        return rows

    def pooled(self, h: Array) -> Array:
        """`E h` for a function of the draws of all rows of the batch together, `[M, K] -> [M]`.

        Draw k of a batch is one draw of all its rows, so a score-type site's score is the sum of its rows', and the
        other draws k make baselines. Draws from a prior that are not reparameterised have a score too.
        """
        self._declared("pooled")
        xp = ops.xp(h)
        value = stop_gradient(h)
        loss = xp.mean(h, axis=1)
        for site in self._local():
            if site.estimator is not None and site.estimator.scored:
                # Baselines that are learned, or kept from step to step, are of the rows' own signals.
                signal = Signal(value[:, :, None], value[:, :, None], None, None)
                baseline = site.estimator.baseline_for(signal, {}, None)
                left = value if isinstance(baseline, float) else value - stop_gradient(baseline)[:, :, 0]
                loss = loss + xp.mean(xp.sum(self._score(site), axis=2) * left, axis=1)
            if "prior_log_p" in site.extra:
                log_p = site.extra["prior_log_p"]
                loss = loss + xp.mean(xp.sum(log_p - stop_gradient(log_p), axis=2) * value, axis=1)
        return loss

    def sleep(self) -> Array:
        """`log q(z | x)` of latents and data that the model drew together, over all N rows: a scalar."""
        self._declared("sleep")
        rows, glob = 0.0 * self._zeros_rows[0, 0], 0.0 * self._zeros_rows[0, 0, 0]
        for name, log_q in self.dream.items():
            if self.sites[name].local:
                rows = rows + log_q
            else:
                glob = glob + log_q
        return glob + self.scale * ops.xp(rows).sum(rows)

    def total(self, rows: Array, glob: Array | None = None) -> Array:
        """`E over globals of [ glob + (N / B) sum_B rows ]`, a scalar; `glob` defaults to `log p(g) - log q(g)`."""
        glob = self.log_w_global if glob is None else glob
        xp = ops.xp(rows)
        t = glob + times(self.scale, xp.sum(rows, axis=1))
        return xp.reshape(self._expect(self._level(local=False), xp.reshape(t, (1, -1, 1)), None), ())

    # What the verbs are made of.

    def _declared(self, verb: str) -> None:
        if self.allowed is not None and verb not in self.allowed:
            raise LegalityError(
                f"The objective calls `{verb}` but declares verbs = {sorted(self.allowed)}, from which legality was "
                f"computed; add {verb!r} to its `verbs`."
            )

    def _local(self) -> list[Site]:
        return [s for s in self.sites.values() if s.local]

    def _log_p_of(self, role: str) -> Array:
        both = [s for s in self._local() if s.mixed]
        if both:
            raise LegalityError(
                f"The objective takes log p of latent and of observed sites apart, and {both[0].joint} look at "
                f"{both[0].name!r}, which is summed out, so that only their joint density exists; use `log_p`, or "
                f"sample {both[0].name!r} in the guide."
            )
        return self._sum(s.log_p for s in self._local() if s.role == role and s.log_p is not None)

    def _sum(self, terms: Iterable[Array]) -> Array:
        terms = list(terms)
        return sum(terms[1:], terms[0]) if terms else self._zeros_rows

    @cached_property
    def _zeros_rows(self) -> Array:
        like = next(a for s in self.sites.values() for a in (s.log_p, s.log_q) if a is not None)
        return ops.xp(like).broadcast_to(ops.zeros((1, 1, 1), like), self._shape_rows)

    @cached_property
    def _shape_rows(self) -> tuple[int, int, int]:
        level, outer = self._level(local=True), self._level(local=False)
        return outer.draws * outer.variants, level.draws * level.variants, self.B

    def _spread(self, h: Array) -> Array:
        return h + self._zeros_rows if tuple(h.shape) != self._shape_rows else h

    def _global_sum(self, term: Callable[[Site], Array]) -> Array:
        terms = [term(s) for s in self.sites.values() if not s.local]
        return sum(terms[1:], terms[0]) if terms else self._zeros_rows[:, 0, 0]

    def _level(self, local: bool) -> _Level:
        return self._levels[local]

    @cached_property
    def _levels(self) -> dict[bool, _Level]:
        return {local: self._made_level(local) for local in (False, True)}

    def _made_level(self, local: bool) -> _Level:
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
        log_q = self._lift(site, site.log_score)
        return log_q - stop_gradient(log_q)

    def _split(self, h: Array, level: _Level) -> Array:
        """`[A, D * V, C] -> [A, D, V, C]`."""
        return ops.xp(h).reshape(h, (h.shape[0], level.draws, level.variants, h.shape[-1]))

    def _normalised(self, log_w: Array) -> Array:
        """Self-normalised weights `[M, K, B]` without gradient; they sum to one over draws."""
        return stop_gradient(ops.softmax(self._spread(log_w) + self._log_weight(self._level(local=True)), 1))

    def _moments(self, h: Array) -> tuple[Array, Array]:
        """First two moments of h over each draw's enumerated values, `[M, K, B]` both."""
        level = self._level(local=True)
        split = self._split(self._spread(h), level)
        if level.variants == 1:
            return split[:, :, 0], split[:, :, 0] ** 2
        xp = ops.xp(split)
        # Of enumerated values alone: a draw from elsewhere counts as it is.
        summed = (s for s in level.latents.values() if s.estimator is not None and s.estimator.exhaustive)
        log_w = sum((self._lift(s, s.log_weight) for s in summed), self._zeros_rows)
        w = stop_gradient(xp.exp(self._split(log_w, level)))
        return xp.sum(w * split, axis=2), xp.sum(w * split * split, axis=2)

    def _joint(
        self,
        f: Reduction,
        base: Array,
        scores: Mapping[str, Array],
        level: _Level,
        pick: Callable[[Array], Array],
    ) -> Array:
        """`E f` with every site's gradient from log weights `[A, K, B]` of draws and the scores of their sites.

        `pick` takes the same entries from an array of the table.
        """
        value = f(base, 1)
        loss = value
        if self.side == "guide" and self._frozen(level):
            loss = stop_gradient(value) + self._doubly_reparameterised(f, base, level, pick)
        for name, score in scores.items():
            signal = Signal(stop_gradient(base), stop_gradient(value)[:, None], f, self.batch)
            baseline = self._baseline(self.sites[name], signal)
            loss = loss + ops.xp(score).sum(score * (signal.value - baseline), axis=1)
        return loss

    def _joint_of_all(self, f: Reduction, log_w: Array, level: _Level) -> Array:
        """`joint` with enumerated sites: the choices of one value for each draw are more outer draws, with weights."""
        choice = np.indices((level.variants,) * level.draws).reshape(level.draws, -1)  # [K, T]
        xp = ops.xp(log_w)

        def pick(array: Array) -> Array:
            """`[M, K * V, B] -> [M * T, K, B]`."""
            split = self._split(array, level)
            each = [split[:, k][:, choice[k]] for k in range(level.draws)]
            return xp.reshape(xp.stack(each, axis=2), (-1, level.draws, array.shape[-1]))

        scores = {s.name: pick(self._score(s)) for s in self._scored(level)}
        rows = self._joint(f, pick(log_w), scores, level, pick)
        weight = xp.exp(xp.sum(pick(self._spread(self._log_weight(level)) + math.log(level.draws)), axis=1))
        return xp.sum(xp.reshape(weight * rows, (log_w.shape[0], -1, log_w.shape[-1])), axis=1)

    def _log_weight(self, level: _Level) -> Array | float:
        xp = ops.xp(self._zeros_rows)
        total: Array | float = math.log(level.base) if isinstance(level.base, float) else xp.log(level.base)
        for site in level.latents.values():
            if site.estimator is not None and site.estimator.exhaustive:
                total = total + self._lift(site, site.log_weight)
            elif site.estimator is not None and site.estimator.weighted:
                total = total + xp.log(self._lift(site, site.weight))
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

    def _credits(self, level: _Level) -> tuple[Array | None, Array | None, Array | None]:
        """`s`, `r` and the controls of the variants, each site's as its entries count; the guide's alone where they are
        of value and expectation zero."""
        weights = self._weights_of(level)
        credit: Array | None = None
        through: Array | None = None
        control: Array | None = None
        parts = [a for s in level.latents.values() for a in (s.credit, s.through, s.control) if a is not None]
        if not parts and not weights:
            return None, None, None
        for name, site in level.latents.items():
            weight, more = self._counts(level, name)
            count = _plus(weight, more)
            if site.credit is not None:
                credit = _plus(credit, self._lift(site, site.credit) * count)
            if more is not None and name in weights:
                credit = _plus(credit, (weights[name] - stop_gradient(weights[name])) * more)
            if site.through is not None and self.side == "guide":
                through = _plus(through, self._lift(site, site.through) * count)
            if site.control is not None and self.side == "guide":
                control = _plus(control, self._lift(site, site.control) * weight)
        return credit, through, control

    def _counts(
        self, level: _Level, name: str, without: frozenset[str] = frozenset()
    ) -> tuple[Array | float, Array | None]:
        """How each entry counts for the terms of a site that have the value zero: by the weights of the others' values,
        and besides where gradient flows through the value of a site that it is drawn from.

        There this site's terms belong to that gradient: `r (E h - sg E h)`, the expectation over what is drawn after.
        """
        without = without | {name}
        weight: Array | float = 1.0
        for other, w in self._weights_of(level).items():
            if other not in without:
                weight = weight * stop_gradient(w)
        if self.side == "model":
            return weight, None
        more: Array | None = None
        for other, site in level.latents.items():
            if site.through is not None and other not in without and other in level.latents[name].ancestors:
                count = _plus(*self._counts(level, other, without))
                more = _plus(more, stop_gradient(self._lift(site, site.through)) * count)
        return weight, more

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
        total = xp.sum(times(base, weighted), axis=1)
        credit, through, control = self._credits(level)
        if credit is not None:
            total = total + xp.sum(times(base, credit) * stop_gradient(h), axis=1)
        if through is not None:
            total = total + xp.sum(times(base, through) * (h - stop_gradient(h)), axis=1)
        if control is not None:
            total = total + xp.sum(times(base, control), axis=1)
        for site in self._scored(level):
            if weight is None:
                part, score = self._credited(site, h, cost)
                part = stop_gradient(part)
                gain = score * (part - self._baseline(site, Signal(part, part, None, self.batch)))
                total = total + xp.sum(times(base, _of_rows(gain)), axis=1)
                continue
            part = stop_gradient(h if cost is None else self._spread(self._downstream(site, cost)))
            score = times(base, self._score(site))
            # A draw's signal is its weighted sum over variants, so its baseline is shared by them.
            stopped = stop_gradient(weight)
            per_draw = xp.sum(self._split(stopped * part, level), axis=2)
            baseline = self._baseline(site, Signal(per_draw, per_draw, None, self.batch))
            if not isinstance(baseline, float):
                repeated = xp.broadcast_to(baseline[:, :, None], self._split(h, level).shape)
                baseline = xp.reshape(repeated, h.shape)
            share = stopped * (part - baseline)
            more = self._counts(level, site.name)[1]
            if more is not None:
                share = share + stop_gradient(more) * part
            total = total + xp.sum(score * share, axis=1)
        return total

    def _downstream(self, site: Site, cost: Mapping[str, Array]) -> Array:
        parts = [_of_rows(part) for name, part in cost.items() if name in (*site.downstream, "*")]
        return sum(parts[1:], parts[0]) if parts else self._zeros_rows

    @cached_property
    def _in_plates(self) -> bool:
        """Whether some site's score is one of several elements in the plates of a row."""
        return any(_axes(site) for site in self._scored(self._level(local=True)) if site.local)

    def _credited(self, site: Site, h: Array, cost: Mapping[str, Array] | None) -> tuple[Array, Array]:
        """What a site's score is multiplied by, and the score: `[M, K, B]`, or both with the site's inner plates."""
        if cost is None:
            return h, self._score(site)
        own = _axes(site) if site.local else frozenset[int]()
        if not own or all(part.ndim == 3 for part in cost.values()):
            return self._spread(self._downstream(site, cost)), self._score(site)
        log_q = _keep(site.log_q_full, own)
        total = ops.zeros(self._zeros_rows.shape + (1,) * (log_q.ndim - 3), log_q)
        for name, part in cost.items():
            if name in (*site.downstream, "*"):
                kept = _keep(part, own & _axes(self.sites[name])) if part.ndim > 3 else trailing(part, log_q)
                total = total + kept
        return total, log_q - stop_gradient(log_q)

    def _doubly_reparameterised(
        self, f: Reduction, log_w: Array, level: _Level, pick: Callable[[Array], Array]
    ) -> Array:
        """`sum_k sg(f'_k - f''_kk) (log_w_k + L_k) - sg(f'_k) L_k`, value zero.

        `log_w` holds frozen densities of the doubly reparameterised sites; `L` is the log q of the score sites and of
        the enumerated ones, which keep their ordinary direct term. Tucker, Lawson, Gu, Maddison (2018),
        arXiv:1810.04152, for any f.
        """
        first, second = ops.derivatives(f, stop_gradient(log_w), 1)
        first, second = stop_gradient(first), stop_gradient(second)
        terms = (first - second) * log_w
        for site in level.latents.values():
            if site.estimator is not None and (site.estimator.scored or site.estimator.exhaustive):
                terms = terms - second * pick(self._lift(site, site.log_score))
        total = ops.xp(log_w).sum(terms, axis=1)
        return total - stop_gradient(total)


def times(a: Array | float, b: Array) -> Array:
    """The product; the same array where a is the number one, as each operation costs where steps are not compiled."""
    return b if isinstance(a, float) and a == 1.0 else a * b


def _plus(a: Array | float | None, b: Array | float | None) -> Any:
    """The sum of what there is."""
    return b if a is None else a if b is None else a + b


def _of_rows(part: Array) -> Array:
    """`[M, K, B, *inner] -> [M, K, B]`."""
    return part if part.ndim == 3 else ops.xp(part).sum(part, axis=tuple(range(3, part.ndim)))


def _axes(site: Site) -> frozenset[int]:
    """The axes of a local site's inner plates."""
    return frozenset(p.axis for p in site.plates if p.axis is not None)


def _keep(part: Array, axes: frozenset[int]) -> Array:
    """`[M, K, B, *inner]` summed over all inner axes but these, which stay where they are."""
    away = tuple(a for a in range(3, part.ndim) if a - 3 not in axes)
    return ops.xp(part).sum(part, axis=away, keepdims=True) if away else part


def trailing(x: Array | float, like: Array) -> Array | float:
    """`[M, K, B]` or a number, to be multiplied with `[M, K, B, *inner]`."""
    if isinstance(x, float | int) or x.ndim in (0, like.ndim):
        return x
    return ops.xp(x).reshape(x, tuple(x.shape) + (1,) * (like.ndim - x.ndim))


def replace_one_each(base: Array, new: Array) -> Array:
    """`[M, J, K, B]`: `base` along J copies, in copy k with draw k replaced by `new[:, k]`; reduce axis 1.

    Axis 1 is the draws axis that f reduces, axis 2 numbers the copies.
    """
    one = ops.eye(base.shape[1], base)[None, :, :, None]
    return ops.xp(base).where(one > 0, new[:, None], base[:, :, None])
