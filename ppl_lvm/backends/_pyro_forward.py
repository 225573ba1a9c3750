"""Pyro: a program run forward, all draws at once where it broadcasts over them; which of its sites look at which."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from ppl_lvm.backends._pyro_handlers import Handler, Message, Params, of_step, sealed, seeded
from ppl_lvm.backends._torch_dists import draw, log_prob, site_log_prob
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.forward import Anatomy, Forward
from ppl_lvm.backends.sites import is_factor
from ppl_lvm.backends.structure import Plan, SiteInfo

if TYPE_CHECKING:
    from ppl_lvm.backends.pyro import PyroBound

Values = Mapping[str, Any]
Tables = dict[str, dict[str, Tensor]]
ONE = range(1), range(1)
"""The axes of a single draw."""


class Arrays(NamedTuple):
    """Values of sites (see `PyroBound.simulate`)."""

    given: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]


def simulate(
    bound: PyroBound,
    params: Params,
    batch: Call,
    key: int,
    draws: int,
    how: Forward,
    given: Values,
    fixed: Values,
    masks: Values,
) -> Tables:
    """See `PyroBound.simulate`."""
    outer = any(not i.local for i in bound.structure.sites.values())
    values = Arrays(*({n: torch.as_tensor(v) for n, v in part.items()} for part in (given, fixed, masks)))
    with sealed(bound.dtype), seeded(key), bound.evaluation():
        constrained = bound.constrain(params)

        def run(entries: range) -> Tables:
            axes = (entries, range(1)) if outer else (range(1), entries)
            return _run(bound, params, constrained, batch, how, values, *axes)

        if draws == 1 or _broadcasts(bound, params, batch, how, values, outer):
            return run(range(draws))
        tables = [run(range(i, i + 1)) for i in range(draws)]
    return {
        label: {n: torch.cat([t[label][n] for t in tables]) for n in found} for label, found in tables[0].items()
    }


def _broadcasts(
    bound: PyroBound, params: Params, batch: Call, how: Forward, values: Arrays, outer: bool
) -> bool:
    """Whether draws can be made at once: whether each of two has the densities that it has in a run of its own.

    Of guide and model on data this is known; here also of sites that look at observed ones, whose new draws have an
    axis that the data do not have. Found once per bound and kind of run.
    """
    plan = Plan.of_values(bound.structure, *((1, 2) if outer else (2, 1)))
    if not bound.broadcasts(plan, batch)[0 if outer else 1]:
        return False
    observed = {n for n, i in bound.structure.sites.items() if i.role == "observed"}
    if not any(observed & parents for parents in bound.anatomy(batch).parents.values()):
        return True
    what = how, outer, *(frozenset(part) for part in values)
    if what not in bound.forward_broadcasts:
        with seeded(0):
            bound.forward_broadcasts[what] = _same_apart(bound, params, batch, how, values, outer)
    return bound.forward_broadcasts[what]


def _same_apart(
    bound: PyroBound, params: Params, batch: Call, how: Forward, values: Arrays, outer: bool
) -> bool:
    constrained = bound.constrain(params)
    both = replace(how, densities=True)
    axes = (range(2), range(1)) if outer else (range(1), range(2))
    # Whatever a program raises on shapes it was not written for, it is not to be run on them.
    try:
        whole = _run(bound, params, constrained, batch, both, values, *axes)
    except Exception:
        return False
    data = _replaced(bound, batch, values.fixed)
    for i in range(2):
        # Every site of the model at the values of this draw; data are as they were in the whole run.
        fixed = {n: v[i] for n, v in whole["value"].items()}
        one = Arrays({}, fixed, {})
        alone = _run(bound, params, constrained, data, Forward(prior=True, densities=True), one, *ONE, False)
        for n, density in alone["log_p"].items():
            if n not in values.masks and not torch.allclose(whole["log_p"][n][i], density[0], rtol=1e-3, atol=1e-3):
                return False
    return True


def _replaced(bound: PyroBound, batch: Call, fixed: Mapping[str, Tensor]) -> Call:
    """The data with those of fixed sites in place of their own."""

    def argument(name: str, value: Tensor) -> Tensor:
        return fixed[name].reshape(value.shape).to(value.dtype) if name in fixed else value

    return batch.map_named(bound.program.arguments, argument)


def _run(
    bound: PyroBound,
    params: Params,
    constrained: Params,
    batch: Call,
    how: Forward,
    values: Arrays,
    outer: range,
    inner: range,
    replacing: bool = True,
) -> Tables:
    given, fixed, masks = values
    sites, n = bound.structure.sites, bound.structure.nesting
    by_outer = any(not i.local for i in sites.values())
    M, K = bound._sizes = len(outer), len(inner)

    def anew(msg: Message, info: SiteInfo) -> Tensor:
        lead = ((M, K) if M > 1 else (K,) if K > 1 else ()) if info.local else (M, 1) if M > 1 else ()
        if lead:
            base = tuple(msg["fn"].batch_shape)[-n:] if n else ()
            msg["fn"] = msg["fn"].expand(torch.Size(lead + (1,) * (n - len(base)) + base))
        return draw(msg["fn"])

    def of_draws(info: SiteInfo) -> Tensor | None:
        """Values with a draws axis, as a table has them: `[M, K, B, ...]` or `[M, ...]`."""
        if info.name not in given:
            return None
        value = given[info.name]
        if info.local:
            value = value[:, None] if by_outer else value[None]
        return bound._to_site(value, info, outer, inner)

    def of_all(values: Mapping[str, Tensor], info: SiteInfo) -> Tensor | None:
        """The same value for all draws."""
        if info.name not in values:
            return None
        value = values[info.name][None]
        return bound._to_site(value[None] if info.local else value, info, *ONE)

    def from_guide(msg: Message) -> None:
        info = sites[msg["name"]]
        value = of_draws(info)
        msg["value"] = anew(msg, info) if value is None else of_step(value, msg)

    guide: dict[str, Message] = {}
    handler = Handler(constrained, from_guide)
    if not how.prior:
        guide = bound._trace(bound._guide, handler, batch, params)

    def latent(msg: Message) -> None:
        info = sites[msg["name"]]
        value = of_all(fixed, info)
        if value is None and how.prior:
            value = of_draws(info)
        if value is None and info.name in guide and info.name not in how.fresh:
            value = guide[info.name]["value"]
        msg["value"] = anew(msg, info) if value is None else of_step(value, msg)

    def observed(msg: Message) -> None:
        info = sites[msg["name"]]
        value = of_all(fixed, info)
        if value is not None:
            msg["value"] = of_step(value, msg)
        elif info.name not in how.keep and not is_factor(msg["fn"]):
            msg["value"] = anew(msg, info)

    data = _replaced(bound, batch, fixed) if replacing else batch
    model = bound._trace(bound._model, Handler(constrained, latent, handler.subsamples, observed), data, params)

    def flat(x: Tensor, info: SiteInfo) -> Tensor:
        """`[M, K, B, ...]` as `[draws, B, ...]`."""
        return x.reshape((M * K,) + tuple(x.shape[2:])) if info.local else x

    def density(x: Tensor, info: SiteInfo) -> Tensor:
        return flat(bound._rows(bound._full(x, info), info), info)

    out: Tables = {"value": {}, "mean": {}, "log_p": {}, "log_q": {}}
    for name, site in model.items():
        info, fn, mask = sites[name], site["fn"], of_all(masks, sites[name])
        if not is_factor(fn):
            value = site["value"] if mask is None else torch.where(mask, site["value"], anew(site, info))
            out["value"][name] = flat(bound._from_site(value, fn.event_dim, info), info)
        if how.means and info.role == "observed" and not is_factor(fn):
            mean = fn.mean.expand(fn.batch_shape + fn.event_shape)
            out["mean"][name] = flat(bound._from_site(mean, fn.event_dim, info), info)
        if how.densities:
            x = site_log_prob(site) if mask is None else masked(fn, site["value"], mask)
            out["log_p"][name] = density(x, info)
    if how.densities:
        for name, site in guide.items():
            out["log_q"][name] = density(site_log_prob(site), sites[name])
    return out


def masked(fn: Any, value: Tensor, mask: Tensor) -> Tensor:
    """`log_prob` over the elements where the mask is true; where events have one density, over whole events."""
    kind = type(fn).__name__
    if isinstance(fn, torch.distributions.Independent):
        inner = masked(fn.base_dist, value, mask)
        n = fn.reinterpreted_batch_ndims
        return inner.reshape(inner.shape[: inner.dim() - n] + (-1,)).sum(-1) if n else inner
    if kind == "MaskedDistribution":
        inner = masked(fn.base_dist, value, mask)
        return torch.where(torch.as_tensor(fn._mask), inner, torch.zeros_like(inner))
    if kind == "ExpandedDistribution":
        return masked(fn.base_dist, value, mask).expand(fn.batch_shape)
    counts = mask.reshape(mask.shape[: mask.dim() - fn.event_dim] + (-1,)).all(-1) if fn.event_dim else mask
    density = log_prob(fn, value)
    return torch.where(counts, density, torch.zeros_like(density))


def elementwise(fn: Any) -> bool:
    while isinstance(fn, torch.distributions.Independent) or type(fn).__name__ in (
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        fn = fn.base_dist
    return not fn.event_dim


def outside(bound: PyroBound, params: Params, batch: Call, fixed: Values) -> list[str]:
    """Sites whose fixed values are outside the support of their distribution in the model."""
    wrong: list[str] = []
    bound._sizes = 1, 1

    def take(msg: Message) -> None:
        name = msg["name"]
        if name not in fixed:
            msg["value"] = draw(msg["fn"])
            return
        info, value = bound.structure.sites[name], torch.as_tensor(fixed[name])[None]
        msg["value"] = of_step(bound._to_site(value[None] if info.local else value, info, *ONE), msg)
        if not bool(msg["fn"].support.check(msg["value"]).all()):
            wrong.append(name)

    def observed(msg: Message) -> None:
        if msg["name"] in fixed:
            take(msg)

    with sealed(bound.dtype), seeded(0), bound.evaluation():
        bound._trace(bound._model, Handler(bound.constrain(params), take, observed=observed), batch, params)
    return wrong


def distributions(
    bound: PyroBound, params: Params, batch: Call, values: Values
) -> dict[tuple[str, str], list[Any]]:
    """See `Bound.distributions`."""
    bound._sizes = 1, 1
    found: dict[tuple[str, str], list[Any]] = {}

    def of(side: str, msg: Message) -> None:
        found.setdefault((msg["name"], side), []).append(msg["fn"])

    def latent(side: str) -> Callable[[Message], None]:
        def take(msg: Message) -> None:
            of(side, msg)
            name = msg["name"]
            if name not in values:
                msg["value"] = draw(msg["fn"])
                return
            info, value = bound.structure.sites[name], torch.as_tensor(values[name])[None]
            msg["value"] = of_step(bound._to_site(value[None] if info.local else value, info, *ONE), msg)

        return take

    plates: Mapping[str, Tensor] = {}
    with sealed(bound.dtype), seeded(0), bound.evaluation():
        for side, program in (("guide", bound._guide), ("model", bound._model)):
            handler = Handler(bound.constrain(params), latent(side), plates, observed=partial(of, side))
            bound._trace(program, handler, batch, params)
            plates = handler.subsamples
    return found


def anatomy(bound: PyroBound, batch: Call) -> Anatomy:
    """See `forward.Anatomy`."""
    bound._sizes = 1, 1
    with sealed(bound.dtype), seeded(0), bound.evaluation():
        return _anatomy(bound, batch)


def _marked(value: Tensor, mark: str) -> Tensor:
    return track_provenance(value.clone(), frozenset({mark}))


def _anatomy(bound: PyroBound, batch: Call) -> Anatomy:
    params = bound.constrain(bound.initial)
    raw: dict[str, frozenset[str]] = {}
    plain: dict[str, Tensor] = {}

    # Drawn apart from the marked run: `tensor.new(shape)`, by which torch samples a Cauchy or an exponential, takes an
    # empty shape for data there.
    values: dict[str, Tensor] = {}

    def first(msg: Message) -> None:
        name = msg["name"]
        msg["value"] = of_step(values[name], msg) if name in values else draw(msg["fn"])

    plates: dict[str, Tensor] = {}
    for program in (bound._guide, bound._model):
        unmarked = Handler(params, first, plates)
        values |= {n: s["value"] for n, s in bound._trace(program, unmarked, batch, bound.initial).items()}
        plates = unmarked.subsamples

    def take(msg: Message) -> None:
        plain[msg["name"]] = of_step(values[msg["name"]], msg)
        msg["value"] = _marked(plain[msg["name"]], f"site:{msg['name']}")

    marked = batch.map_named(bound.program.arguments, lambda n, a: _marked(a, f"argument:{n}"))
    handler = Handler(params, take, plates)
    guide = bound._trace(bound._guide, handler, marked, bound.initial)

    def replayed(msg: Message) -> None:
        if msg["name"] in guide:
            msg["value"] = of_step(guide[msg["name"]]["value"], msg)
        else:
            take(msg)

    def observed(msg: Message) -> None:
        if not is_factor(msg["fn"]):
            raw[msg["name"]] = frozenset(get_provenance(msg["value"]))
            plain[msg["name"]] = detach_provenance(msg["value"])
            msg["value"] = _marked(plain[msg["name"]], f"site:{msg['name']}")

    model = bound._trace(bound._model, Handler(params, replayed, handler.subsamples, observed), marked, bound.initial)

    def of(marks: Mapping[str, frozenset[str]], kind: str) -> dict[str, frozenset[str]]:
        return {
            n: frozenset(m.removeprefix(kind) for m in seen if m.startswith(kind)) - ({n} if kind == "site:" else set())
            for n, seen in marks.items()
        }

    in_guide, in_model = (
        {n: frozenset(get_provenance(site_log_prob(s))) for n, s in t.items()} for t in (guide, model)
    )
    own, through = of(in_guide, "argument:"), of(in_guide, "site:")
    guide_arguments: dict[str, frozenset[str]] = {}
    for n in guide:
        guide_arguments[n] = own[n].union(*(guide_arguments.get(p, frozenset()) for p in through[n]))
    every = {**guide, **model}
    valued = {n: s for n, s in every.items() if n in plain and not is_factor(s["fn"])}

    def shape(name: str, site: Message) -> tuple[int, ...]:
        info = bound.structure.sites[name]
        value = detach_provenance(site["value"])
        return tuple(bound._from_site(value, site["fn"].event_dim, info).shape[3 if info.local else 1 :])

    return Anatomy(
        parents=of(in_model, "site:"),
        arguments=of(in_model, "argument:"),
        guide_arguments=guide_arguments,
        sources=of(raw, "argument:"),
        plates={n: {f.dim: f.name for f in s["cond_indep_stack"] if f.vectorized} for n, s in every.items()},
        ranks={n: len(s["fn"].batch_shape) for n, s in every.items()},
        shapes={n: shape(n, s) for n, s in valued.items()},
        dtypes={n: np.dtype(str(plain[n].dtype).removeprefix("torch.")) for n in valued},
        discrete=frozenset(n for n, s in valued.items() if _discrete(s["fn"])),
        elementwise=frozenset(n for n, s in valued.items() if elementwise(s["fn"])),
        factors=frozenset(n for n, s in every.items() if is_factor(s["fn"])),
    )


def _discrete(fn: Any) -> bool:
    with contextlib.suppress(NotImplementedError):
        return bool(fn.support.is_discrete)
    return False
