"""What a fitted program says about rows: predictions, codes, missing entries, conditions and interventions.

Every function takes rows in blocks and draws in chunks; none looks at the rows of the fit. Latents that all rows share
come from the guide unless they are given, so everything is under the fitted posterior of the globals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppl_lvm.backends.base import Call
from ppl_lvm.backends.forward import Forward
from ppl_lvm.errors import DataError, ProgramError
from ppl_lvm.fitted import ENTRIES, Block, Chunk, Fitted, joined

Values = Mapping[str, Any]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Codes:
    """Moments of the latents that each row has of its own, under the guide: site -> `[rows, ...]`."""

    mean: Mapping[str, np.ndarray]
    sd: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Resampled:
    """Draws picked from weighted ones: site -> `[draws, rows, ...]`."""

    values: Mapping[str, np.ndarray]
    ess: np.ndarray
    """`[rows]`: effective number of the weighted draws, `(sum_k w_k)^2 / sum_k w_k^2`, at most `particles`."""


def forward(
    fitted: Fitted,
    call: Call,
    draws: int,
    seed: int,
    how: Forward,
    fixed: Values | None = None,
    names: Iterable[str] | None = None,
    label: str = "value",
    given: Mapping[str, np.ndarray] | None = None,
    whole: bool = False,
) -> Arrays:
    """`draws` forward runs on these rows: site -> `[draws, rows, ...]`, or `[draws, ...]` for a global site.

    `fixed` is as the user gives it; `given` are draws of globals, from the guide where it is None. `whole` takes all
    rows in one block.
    """
    values = fitted.as_fixed(fixed or {}, fitted.rows(call))
    if given is None:
        given = {} if values.keys() >= set(fitted.globals) else fitted.global_draws(call, draws, seed)
    known = dict(given)
    if how.prior:
        left = frozenset(fitted.globals) - known.keys() - values.keys()

        def first(block: Block) -> Arrays:
            return _forward(fitted, block, draws, seed, how, known, values, left, "value")

        known |= next(fitted.blocks(call, first, whole=whole)) if left else {}
    known = {n: v for n, v in known.items() if n not in values}

    def work(block: Block) -> Arrays:
        if block.number == 0:
            fitted.check_support(block, fitted.rows_in(block, values))
        return _forward(fitted, block, draws, seed, how, known, values, names, label)

    return assembled(fitted, list(fitted.blocks(call, work, whole=whole)))


def _forward(
    fitted: Fitted,
    block: Block,
    draws: int,
    seed: int,
    how: Forward,
    given: Mapping[str, np.ndarray],
    values: Arrays,
    names: Iterable[str] | None,
    label: str,
) -> Arrays:
    """All draws of one block, chunk by chunk."""

    def work(chunk: Chunk) -> Arrays:
        made = fitted.simulate(block, chunk.key, chunk.size, how, chunk.of(given), fitted.rows_in(block, values))
        return {n: v[: chunk.wanted] for n, v in made[label].items() if names is None or n in names}

    return joined([found for _, found in fitted.chunks(draws, block, seed, ENTRIES, work)], 0)


def assembled(fitted: Fitted, blocks: list[Arrays]) -> Arrays:
    """The blocks of rows put together, without the axes of plates that a site is not in."""
    local = {n for n in blocks[0] if fitted.structure.sites[n].local}
    return {
        n: fitted.squeezed(n, np.concatenate([b[n] for b in blocks], 1) if n in local else v, 2 if n in local else 1)
        for n, v in blocks[0].items()
    }


def predictive(fitted: Fitted, call: Call, draws: int, seed: int) -> Arrays:
    return forward(fitted, call, draws, seed, Forward(), names=fitted.sites("observed"))


def encode(fitted: Fitted, call: Call, draws: int, seed: int) -> Codes:
    names = [n for n in fitted.sites("latent", local=True) if fitted.structure.sites[n].in_guide]
    given = fitted.global_draws(call, draws, seed)

    def of_block(block: Block) -> tuple[Arrays, Arrays]:
        def work(chunk: Chunk) -> Arrays:
            table = block.bound.evaluate(
                fitted.trained, block.held, chunk.key, fitted.plan(block.bound, chunk.size), chunk.of(given) or None
            )
            values = {n: fitted.numpy(table[n]["value"]) for n in names}
            return {n: x.reshape(chunk.size, *x.shape[2:])[: chunk.wanted] for n, x in values.items()}

        total: Arrays = {}
        squares: Arrays = {}
        for _, found in fitted.chunks(draws, block, seed, ENTRIES, work):
            for n, value in found.items():
                x = value.astype(np.float64)
                # Sums are taken around the first draw, so that small deviations survive a large mean.
                if n not in total:
                    total[n], squares[n] = np.zeros_like(x[0]), np.zeros_like(x[0])
                    total["origin of " + n] = x[0]
                x = x - total["origin of " + n]
                total[n] += x.sum(0)
                squares[n] += (x**2).sum(0)
        mean = {n: total[n] / draws for n in names}
        sd = {n: np.sqrt(np.maximum(squares[n] - draws * mean[n] ** 2, 0.0) / max(draws - 1, 1)) for n in names}
        return {n: mean[n] + total["origin of " + n] for n in names}, sd

    def rows(parts: Iterable[Arrays]) -> Arrays:
        return {n: fitted.squeezed(n, v, 1) for n, v in joined(list(parts), 0).items()}

    means, sds = zip(*fitted.blocks(call, of_block), strict=True)
    return Codes(rows(means), rows(sds))


def decode(fitted: Fitted, values: Values, call: Call, draws: int, mean: bool, seed: int) -> Arrays:
    names, label = fitted.sites("observed"), "mean" if mean else "value"
    given = _untouched(fitted, values, call, draws, seed)
    return forward(fitted, call, draws, seed, Forward(prior=True, means=mean), values, names, label, given)


def prior(fitted: Fitted, call: Call, draws: int, seed: int) -> Arrays:
    return forward(fitted, call, draws, seed, Forward(prior=True), given={})


def do(fitted: Fitted, values: Values, call: Call, factual: bool, draws: int, seed: int) -> Arrays:
    if not factual:
        given = _untouched(fitted, values, call, draws, seed)
        return forward(fitted, call, draws, seed, Forward(prior=True), values, given=given)
    changed = _changed(fitted, values)
    summed = sorted(i.name for i in fitted.structure.undrawn() if i.name not in changed | values.keys())
    if summed:
        raise ProgramError(
            f"A counterfactual keeps what the rows say of every site that the intervention does not reach, and "
            f"{summed} are summed out, without a posterior to draw from; sample them in the guide, give them values, "
            f"or leave the data out."
        )
    fresh = frozenset(fitted.sites("latent")) & changed
    keep = frozenset(fitted.sites("observed")) - changed - frozenset(values)
    # Globals that the intervention changes are drawn with the rows, so all rows must be in one run.
    whole = not fresh.isdisjoint(fitted.globals)
    return forward(fitted, call, draws, seed, Forward(fresh=fresh, keep=keep), values, whole=whole)


def _changed(fitted: Fitted, values: Values) -> frozenset[str]:
    """Sites that an intervention reaches: through sites, and through data of an intervened site's name."""
    readers = _readers(fitted, values)
    return fitted.anatomy.descendants(frozenset(values) | readers) | readers


def _untouched(fitted: Fitted, values: Values, call: Call, draws: int, seed: int) -> Arrays:
    """Draws from the guide of the globals that an intervention does not reach."""
    reached = _changed(fitted, values) | frozenset(values)
    if reached.issuperset(fitted.globals):
        return {}
    return {n: v for n, v in fitted.global_draws(call, draws, seed).items() if n not in reached}


def _readers(fitted: Fitted, values: Values) -> frozenset[str]:
    """Sites that look at the data of an intervened site by themselves."""
    return frozenset(n for n, seen in fitted.anatomy.arguments.items() if seen & set(values)) - frozenset(values)


def conditional(
    fitted: Fitted, given: Values, call: Call, draws: int, particles: int, seed: int
) -> Resampled:
    anatomy, fixed, shared = fitted.anatomy, frozenset(given), frozenset(fitted.globals)
    fitted.as_fixed(given, fitted.rows(call))
    related = (anatomy.ancestors(fixed & shared) | anatomy.descendants(fixed & shared)) & shared - fixed
    if related:
        raise ProgramError(
            f"Global sites {sorted(fixed & shared)} were given, and {sorted(related)} depend on them or they on those; "
            f"give those too, or intervene with do()."
        )
    if not anatomy.ancestors(fixed) - shared - fixed:
        values = forward(fitted, call, draws, seed, Forward(prior=True), given)
        return Resampled(values, np.full(fitted.rows(call), float(particles)))
    how = Forward(prior=True, densities=True)
    return _resampled(fitted, call, draws, particles, seed, how, given, fixed)


def impute(fitted: Fitted, data: Call, draws: int, particles: int, fill: float, seed: int) -> Resampled:
    anatomy, known = fitted.anatomy, data.known
    data, given = data.own, fitted.named(data)
    site_of = {fitted.program.argument_of(s): s for s in fitted.sites("observed")}
    missing = {n: np.asarray(mask) for n, mask in known.items() if not np.all(mask)}
    for n, mask in missing.items():
        if n not in site_of:
            raise DataError(
                f"Argument {n!r} has {int((~mask).sum())} missing values, but no observed site has its values, so the "
                f"model does not say what they could be; observed sites are {fitted.sites('observed')}."
            )
    named = {site_of[n]: a for n, a in given.items() if n in site_of}
    masks = {site_of[n]: mask for n, mask in missing.items()}
    for n, mask in masks.items():
        if not fitted.structure.sites[n].local:
            raise ProgramError(f"Site {n!r} is not in the data plate, so its entries cannot be imputed by row.")
        readers = [s for s, seen in anatomy.arguments.items() if fitted.program.argument_of(n) in seen]
        readers += [s for s, seen in anatomy.parents.items() if n in seen]
        if readers:
            raise ProgramError(
                f"{n!r} has missing values, and the distribution of {sorted(set(readers))} looks at {n!r}; imputing is "
                f"for observed sites that nothing else depends on."
            )
        axes = tuple(range(1, mask.ndim))
        partly = mask.any(axes) & ~mask.all(axes)
        if n not in anatomy.elementwise and partly.any():
            raise ProgramError(
                f"Rows {np.flatnonzero(partly)[:5].tolist()} of {n!r} are missing in part, and its distribution has no "
                f"density of single elements; use one that is independent over elements, given the latents."
            )
    filled = data.map_named(fitted.program.arguments, lambda n, a: np.where(missing[n], a, fill) if n in missing else a)
    observed = [n for n in fitted.sites("observed") if n in named]
    shaped = {n: m.reshape(len(m), *anatomy.shapes[n]) for n, m in masks.items()}
    how = Forward(keep=frozenset(fitted.sites("observed")), densities=True)
    made = _resampled(fitted, filled, draws, particles, seed, how, {}, None, shaped, observed)
    values = {}
    for n in observed:
        mask = masks.get(n, np.ones(np.shape(named[n]), bool))
        drawn = made.values[n].reshape(draws, *mask.shape)
        values[n] = np.where(mask, np.nan_to_num(np.asarray(named[n], drawn.dtype)), drawn)
    return Resampled(values, made.ess)


def _resampled(
    fitted: Fitted,
    call: Call,
    draws: int,
    particles: int,
    seed: int,
    how: Forward,
    fixed: Values,
    weighing: frozenset[str] | None,
    masks: Mapping[str, np.ndarray] | None = None,
    names: list[str] | None = None,
) -> Resampled:
    """Draws picked from `particles` weighted ones, for each row by itself and for each draw of the globals.

    Weights are the densities of the sites in `weighing`, or, where that is None, `p(z, x_seen) / q(z)`.
    """
    rng = np.random.default_rng([seed, 1])
    values = fitted.as_fixed(fixed, fitted.rows(call))
    shared = {n: v for n, v in fitted.global_draws(call, draws, seed).items() if n not in values}
    groups = draws if shared else 1

    def of_block(block: Block) -> tuple[Arrays, np.ndarray]:
        here, mask = fitted.rows_in(block, values), fitted.rows_in(block, masks or {})
        if block.number == 0:
            fitted.check_support(block, here)

        def work(chunk: Chunk) -> tuple[Arrays, np.ndarray]:
            given = {n: np.repeat(v, particles, 0) for n, v in chunk.of(shared).items()}
            made = fitted.simulate(block, chunk.key, chunk.size * particles, how, given, here, mask)
            log_w = _log_weights(fitted, made, weighing).reshape(chunk.size, particles, block.rows)
            index, effective = pick(log_w, draws // groups, rng, block.first)
            kept = made["value"] if names is None else {n: made["value"][n] for n in names}
            picked = {
                n: _taken(v, index, fitted.structure.sites[n].local)[: chunk.wanted * index.shape[1]]
                for n, v in kept.items()
            }
            return picked, effective[: chunk.wanted]

        found = [made for _, made in fitted.chunks(groups, block, seed, ENTRIES, work, particles)]
        picked, ess = zip(*found, strict=True)
        return joined(list(picked), 0), np.concatenate(ess).mean(0)

    blocks, sizes = zip(*fitted.blocks(call, of_block, particles), strict=True)
    return Resampled(assembled(fitted, list(blocks)), np.concatenate(sizes))


def _log_weights(
    fitted: Fitted, made: Mapping[str, Mapping[str, np.ndarray]], weighing: frozenset[str] | None
) -> np.ndarray:
    """`[draws, rows]`."""
    sites = fitted.structure.sites
    # What the guide does not draw, the model drew from this density.
    drawn = {n for n, i in sites.items() if i.in_guide}
    terms = [v for n, v in made["log_p"].items() if sites[n].local and n in (drawn if weighing is None else weighing)]
    terms += [-v for n, v in made["log_q"].items() if sites[n].local and weighing is None]
    return np.asarray(sum(terms[1:], terms[0]), dtype=np.float64)


def pick(
    log_w: np.ndarray, take: int, rng: np.random.Generator, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Indices `[M, take, B]` drawn with replacement with probabilities `w_k / sum w`, and effective sizes `[M, B]`.

    Raises:
        DataError: no draw of a row has a density; rows are counted from `first`.
    """
    peak = log_w.max(1, keepdims=True)
    if not np.isfinite(peak).all():
        rows = sorted({int(b) + first for b in np.argwhere(~np.isfinite(peak))[:, 2]})
        raise DataError(f"No draw gives rows {rows[:5]} a density, so none can be picked; ask for more particles.")
    w = np.exp(log_w - peak)
    w /= w.sum(1, keepdims=True)
    M, K, B = w.shape
    # All columns end to end: column c climbs from c to c + 1, so that one search serves them all.
    column = np.arange(M * B)[:, None]
    climb = np.cumsum(w.transpose(0, 2, 1).reshape(M * B, K), 1)
    climb = climb / climb[:, -1:] + column
    u = rng.random((M * B, take)) + column
    index = np.searchsorted(climb.ravel(), u.ravel(), side="right").reshape(M * B, take) - K * column
    index = np.minimum(index, K - 1).reshape(M, B, take).transpose(0, 2, 1)
    return index, 1.0 / (w**2).sum(1)


def _taken(value: np.ndarray, index: np.ndarray, local: bool) -> np.ndarray:
    """`[M * K, B, ...]` at the indices `[M, take, B]`, as `[M * take, B, ...]`; a global's draw as often as taken."""
    M, take = index.shape[:2]
    split = value.reshape(M, -1, *value.shape[1:])
    if not local:
        return np.repeat(split[:, 0], take, 0)
    spread = index.reshape(*index.shape, *(1,) * (split.ndim - 3))
    return np.take_along_axis(split, spread, 1).reshape(M * take, *value.shape[1:])
