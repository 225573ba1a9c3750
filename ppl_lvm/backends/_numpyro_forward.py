"""NumPyro: a program run forward, one `vmap` over draws; which of its sites look at which."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ppl_lvm.backends._jax_dists import draw, site_log_prob
from ppl_lvm.backends._jax_provenance import provenance
from ppl_lvm.backends._numpyro_handlers import Handler, Message, Params, message_key, of_step, plates_of, precision
from ppl_lvm.backends._numpyro_state import evaluation
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.forward import Anatomy, Forward
from ppl_lvm.backends.sites import is_factor

if TYPE_CHECKING:
    from ppl_lvm.backends.numpyro import NumPyroBound

Array = jax.Array
Values = Mapping[str, Any]


def simulate(
    bound: NumPyroBound,
    params: Params,
    batch: Call,
    key: Array,
    draws: int,
    how: Forward,
    given: Values,
    fixed: Values,
    masks: Values,
) -> dict[str, dict[str, Array]]:
    """See `NumPyroBound.simulate`."""

    def run(params: Params, batch: Call, key: Array, values: Mapping[str, Values]) -> dict[str, dict[str, Array]]:
        constrained = bound.constrain(params)

        def one(key: Array, given: Values) -> dict[str, dict[str, Array]]:
            return _one(bound, constrained, batch, key, how, given, values["fixed"], values["masks"])

        return jax.vmap(one)(jax.random.split(key, draws), values["given"])

    values = {"given": given, "fixed": fixed, "masks": masks}
    bound._check_frozen()
    with evaluation():
        return bound.compiled(run, params, batch, key, (draws, how), values)


def _one(
    bound: NumPyroBound,
    constrained: Params,
    batch: Call,
    key: Array,
    how: Forward,
    given: Values,
    fixed: Values,
    masks: Values,
) -> dict[str, dict[str, Array]]:
    sites = bound.structure.sites
    # Draws of the model and of the guide are apart: a site that both draw must not get the same noise twice.
    guide_key, model_key = jax.random.split(key)

    def placed(values: Values, msg: Message) -> Array | None:
        if msg["name"] not in values:
            return None
        return of_step(bound._to_site(values[msg["name"]], sites[msg["name"]]), msg)

    def anew(msg: Message, key: Array) -> Array:
        return draw(msg["fn"], message_key(key, msg), bound.program.portable)

    def from_guide(msg: Message) -> Array:
        value = placed(given, msg)
        return anew(msg, guide_key) if value is None else value

    constrained = {**bound.states, **constrained}
    guide: dict[str, Message] = {}
    if not how.prior:
        guide = bound._trace(bound._guide, Handler(constrained, guide_key, from_guide, still=True), batch)
    drawn = {n: s["value"] for n, s in guide.items() if s["type"] == "sample"}

    def latent(msg: Message) -> Array:
        value = placed(fixed, msg)
        if value is None and how.prior:
            value = placed(given, msg)
        if value is None and msg["name"] in drawn and msg["name"] not in how.fresh:
            return of_step(drawn[msg["name"]], msg)
        return anew(msg, model_key) if value is None else value

    def observed(msg: Message) -> Array:
        value = placed(fixed, msg)
        if value is not None:
            return value
        return msg["value"] if msg["name"] in how.keep or is_factor(msg["fn"]) else anew(msg, model_key)

    def argument(name: str, value: Array) -> Array:
        return jnp.asarray(fixed[name]).reshape(value.shape).astype(value.dtype) if name in fixed else value

    handler = Handler(
        constrained, model_key, latent, plates_of(guide), observed, side="model", still=True, scanned=drawn
    )
    model = bound._trace(bound._model, handler, batch.map_named(bound.program.arguments, argument))
    out: dict[str, dict[str, Array]] = {"value": {}, "mean": {}, "log_p": {}, "log_q": {}}
    for name, site in model.items():
        if site["type"] != "sample":
            continue
        info, mask = sites[name], placed(masks, site)
        if not is_factor(site["fn"]):
            value = site["value"] if mask is None else jnp.where(mask, site["value"], anew(site, model_key))
            out["value"][name] = bound._from_site(value, site["fn"].event_dim, info)
        if how.means and info.role == "observed" and not is_factor(site["fn"]):
            mean = jnp.broadcast_to(site["fn"].mean, site["fn"].shape())
            out["mean"][name] = bound._from_site(mean, site["fn"].event_dim, info)
        if how.densities:
            density = site_log_prob(site) if mask is None else masked(site["fn"], site["value"], mask)
            out["log_p"][name] = bound._rows(bound._full(density, info), info)
    if how.densities:
        for name, site in guide.items():
            if site["type"] == "sample":
                out["log_q"][name] = bound._rows(bound._full(site_log_prob(site), sites[name]), sites[name])
    return out


def masked(fn: Any, value: Array, mask: Array) -> Array:
    """`log_prob` over the elements where the mask is true; where events have one density, over whole events."""
    if isinstance(fn, dist.Independent):
        inner = masked(fn.base_dist, value, mask)
        return inner.reshape(*inner.shape[: inner.ndim - fn.reinterpreted_batch_ndims], -1).sum(-1)
    if isinstance(fn, dist.MaskedDistribution):
        return jnp.where(fn._mask, masked(fn.base_dist, value, mask), 0.0)
    if isinstance(fn, dist.ExpandedDistribution):
        return jnp.broadcast_to(masked(fn.base_dist, value, mask), fn.batch_shape)
    counts = mask.all(tuple(range(-fn.event_dim, 0))) if fn.event_dim else mask
    return jnp.where(counts, fn.log_prob(value), 0.0)


def elementwise(fn: Any) -> bool:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return not fn.event_dim


def outside(bound: NumPyroBound, params: Params, batch: Call, fixed: Values) -> list[str]:
    """Sites whose fixed values are outside the support of their distribution in the model."""
    wrong: list[str] = []
    with precision(bound.dtype):
        key, constrained = jax.random.key(0), {**bound.states, **bound.constrain(params)}

        def take(msg: Message) -> Any:
            if msg["name"] not in fixed:
                return draw(msg["fn"], message_key(key, msg), bound.program.portable)
            value: Any = bound._to_site(jnp.asarray(fixed[msg["name"]]), bound.structure.sites[msg["name"]])
            value = of_step(value, msg)
            if not bool(jnp.all(msg["fn"].support(value))):
                wrong.append(msg["name"])
            return value

        def observed(msg: Message) -> Array:
            return take(msg) if msg["name"] in fixed else msg["value"]

        handler = Handler(constrained, key, take, observed=observed, side="model", still=True, unrolled=True)
        bound._trace(bound._model, handler, batch)
    return wrong


def distributions(
    bound: NumPyroBound, params: Params, batch: Call, values: Values
) -> dict[tuple[str, str], list[Any]]:
    """See `Bound.distributions`."""
    found: dict[tuple[str, str], list[Any]] = {}
    with precision(bound.dtype), evaluation():
        key, constrained = jax.random.key(0), {**bound.states, **bound.constrain(params)}

        def of(side: str, msg: Message) -> Any:
            found.setdefault((msg["name"], side), []).append(msg["fn"])
            return msg["value"]

        def latent(side: str, msg: Message) -> Any:
            of(side, msg)
            if msg["name"] not in values:
                return draw(msg["fn"], message_key(key, msg), bound.program.portable)
            value: Any = bound._to_site(jnp.asarray(values[msg["name"]]), bound.structure.sites[msg["name"]])
            return of_step(value, msg)

        plates: Mapping[str, Any] = {}
        for side, program in (("guide", bound._guide), ("model", bound._model)):
            options: dict[str, Any] = {"side": side, "still": True, "unrolled": True}
            options["observed"] = partial(of, side)
            handler = Handler(constrained, key, partial(latent, side), plates, **options)
            plates = plates_of(bound._trace(program, handler, batch))
    return found


def anatomy(bound: NumPyroBound, batch: Call) -> Anatomy:
    """See `forward.Anatomy`."""
    with precision(bound.dtype), evaluation():
        return _anatomy(bound, batch)


def _anatomy(bound: NumPyroBound, batch: Call) -> Anatomy:
    key, params = jax.random.key(0), {**bound.constrain(bound.initial), **bound.states}
    names = dict(zip(bound.program.arguments, range(len(batch.args)), strict=False))
    args = {n: batch.args[i] for n, i in names.items() if batch.args[i] is not None} | dict(batch.kwargs)

    def prior(msg: Message) -> Array:
        return draw(msg["fn"], message_key(key, msg), bound.program.portable)

    def traces(batch: Call, values: Values | None = None) -> tuple[dict[str, Message], dict[str, Message], Any]:
        raw: dict[str, Array] = {}

        def take(msg: Message) -> Array:
            return prior(msg) if values is None else of_step(values[msg["name"]], msg)

        def observed(msg: Message) -> Array:
            raw[msg["name"]] = msg["value"]
            return msg["value"] if values is None or is_factor(msg["fn"]) else of_step(values[msg["name"]], msg)

        handler = Handler(params, key, take, still=True, scanned=values, unrolled=True)
        guide = bound._trace(bound._guide, handler, batch)
        drawn = {n: s["value"] for n, s in guide.items() if s["type"] == "sample"}

        def replayed(msg: Message) -> Array:
            return of_step(drawn[msg["name"]], msg) if msg["name"] in drawn else take(msg)

        handler = Handler(
            params, key, replayed, plates_of(guide), observed, side="model", still=True, scanned=drawn, unrolled=True
        )
        model = bound._trace(bound._model, handler, batch)
        of_guide, of_model = ({n: s for n, s in t.items() if s["type"] == "sample"} for t in (guide, model))
        return of_guide, of_model, raw

    guide, model, _ = traces(batch)
    every = guide | model
    held = {n: s["value"] for n, s in every.items() if not is_factor(s["fn"])}

    def looks(**marked: Any) -> dict[str, Any]:
        values = {n.removeprefix("site:"): v for n, v in marked.items() if n.startswith("site:")}
        given = batch.map_named(bound.program.arguments, lambda n, a: marked.get(f"argument:{n}", a))
        guide, model, raw = traces(given, values)
        sides = {"guide": guide, "model": model}
        return {k: {n: site_log_prob(s) for n, s in t.items()} for k, t in sides.items()} | {"raw": raw}

    marks = {f"site:{n}": v for n, v in held.items()} | {f"argument:{n}": a for n, a in args.items()}
    found = provenance(looks, **marks)

    def of(side: str, kind: str) -> dict[str, frozenset[str]]:
        return {
            n: frozenset(m.removeprefix(kind) for m in seen if m.startswith(kind)) - ({n} if kind == "site:" else set())
            for n, seen in found[side].items()
        }

    own = of("guide", "argument:")
    through = of("guide", "site:")
    guide_arguments: dict[str, frozenset[str]] = {}
    for n in guide:
        guide_arguments[n] = own[n].union(*(guide_arguments.get(p, frozenset()) for p in through[n]))

    def shape(name: str, site: Message) -> tuple[int, ...]:
        info = bound.structure.sites[name]
        return bound._from_site(site["value"], site["fn"].event_dim, info).shape[1 if info.local else 0 :]

    valued = {n: s for n, s in every.items() if n in held}
    return Anatomy(
        parents=of("model", "site:"),
        arguments=of("model", "argument:"),
        guide_arguments=guide_arguments,
        sources=of("raw", "argument:"),
        plates={n: {f.dim: f.name for f in s["cond_indep_stack"]} for n, s in every.items()},
        ranks={n: len(s["fn"].batch_shape) for n, s in every.items()},
        shapes={n: shape(n, s) for n, s in valued.items()},
        dtypes={n: np.dtype(s["value"].dtype) for n, s in valued.items()},
        discrete=frozenset(n for n, s in valued.items() if s["fn"].support is not None and s["fn"].support.is_discrete),
        elementwise=frozenset(n for n, s in valued.items() if elementwise(s["fn"])),
        factors=frozenset(every) - frozenset(held),
    )
