"""Pyro: one run of a program as a table of arrays, draws as extra batch dimensions on the left of every plate.

With n plate dimensions, draws stand at `-(n + 1)` and outer draws at `-(n + 2)` of a local site's batch shape. A size
of one is left out, so that with M = 1 a global value keeps its own shape and `z @ W` runs at any K. A program that does
not broadcast over draws is run for one after the other (`PyroBound.broadcasts`).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppl_lvm.algorithm import Objective, Variant
from ppl_lvm.backends import _pyro_forward, _torch_memory
from ppl_lvm.backends._pyro_handlers import (
    Handler,
    Message,
    Params,
    of_step,
    sealed,
    seeded,
)
from ppl_lvm.backends._pyro_modules import Dropout
from ppl_lvm.backends._pyro_particles import Together
from ppl_lvm.backends._pyro_program import PyroProgram
from ppl_lvm.backends._torch_dists import (
    GuideSite,
    apart,
    draw,
    kl,
    log_prob,
    site_log_prob,
    support_value,
)
from ppl_lvm.backends._torch_ops import Gate, current_gate, stopped_once
from ppl_lvm.backends._torch_tables import equal, joined, without_values
from ppl_lvm.backends.base import (
    Call,
    Gradients,
    dreamt,
    features,
    first_run,
    losses,
)
from ppl_lvm.backends.forward import Anatomy, Forward
from ppl_lvm.backends.sites import (
    is_factor,
)
from ppl_lvm.backends.structure import (
    SUMMED,
    VARIANT,
    Plan,
    SiteInfo,
    inner_name,
    of_least_variance,
    prior_name,
    sum_out,
)
from ppl_lvm.backends.training import rows_of
from ppl_lvm.draws import Draws, Particles, Site
from ppl_lvm.errors import BackendError, ProgramError
from ppl_lvm.process import TURN


class PyroBound(PyroProgram):
    """A program's runs on batches (see `backends.base.Bound`)."""

    def batch_parameters(self, call: Call) -> list[str]:
        """Parameters whose shape follows the number of rows; `call` has another one than this batch."""
        try:
            other = type(self)(self.program, call, seed=0, dtype=self.dtype, data_plate=self.asked_plate)
        except Exception:
            # A program for a fixed number of rows has no parameter that could follow it.
            return []
        return sorted(n for n, v in self.initial.items() if n in other.initial and v.shape != other.initial[n].shape)

    def draws(
        self,
        params: Params,
        batch: Call,
        key: int | None,
        plan: Plan,
        *,
        total_rows: Any = None,
        values: Mapping[str, Tensor] | None = None,
        outer_weight: Tensor | None = None,
        states: Mapping[str, Tensor] | None = None,
        own: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Draws:
        """The table of one run on `batch`; `values` are laid out as in the table, `[M, K, B, ...]` and `[M, ...]`.

        `key` seeds torch's generator for this run; None draws from it as it is (the caller seeded it).
        """
        with sealed(self.dtype), seeded(key) if key is not None else contextlib.nullcontext():
            return self._draws(params, batch, plan, total_rows, values or {}, outer_weight, states, own)

    def _draws(
        self,
        params: Params,
        batch: Call,
        plan: Plan,
        total_rows: Any,
        given: Mapping[str, Tensor],
        outer_weight: Tensor | None,
        states: Mapping[str, Tensor] | None,
        own: Mapping[str, Mapping[str, Tensor]] | None,
    ) -> Draws:
        self._check_shapes(params)
        constrained = self.constrain(params)
        K = plan.K * plan.layout(self.structure, True)[0]
        M = plan.M * plan.layout(self.structure, False)[0]
        whole = self.broadcasts(plan, batch)
        if plan.resampling is not None and not all(whole):
            raise ProgramError(
                "The program does not broadcast over draws, which are dimensions on the left of every batch shape, and "
                "draws that are resampled between steps run together; index arrays from the right (z[..., 0])."
            )
        self._particles = None
        sites = self._sites(params, constrained, batch, plan, given, (M, K), whole, {}, own)
        rows = self.structure.rows
        N = self.structure.plate_size or (rows if total_rows is None else total_rows)
        return Draws(
            sites=sites,
            M=plan.M,
            K=plan.K,
            B=rows,
            N=N,
            scale=N / rows,
            outer_weight=outer_weight,
            batch=next((a for a in batch.leaves if isinstance(a, Tensor)), None),
            states=states or {},
            own=own or {},
            particles=self._particles,
            dream=self._dream(params, batch) if "sleep" in plan.requests else {},
        )

    def _dream(self, params: Params, batch: Call) -> dict[str, Tensor]:
        """`log q` of every latent site at values that the model drew, given the data that it drew with them."""
        self._sizes = 1, 1

        def drawn(msg: Message) -> None:
            msg["value"] = draw(msg["fn"]).detach()

        def observed(msg: Message) -> None:
            if not is_factor(msg["fn"]):
                drawn(msg)

        stopped = {n: p.detach() for n, p in params.items()}
        handler = Handler(self.constrain(stopped), drawn, observed=observed)
        model = self._trace(self._model, handler, batch, stopped)
        values = {n: s["value"] for n, s in model.items()}
        data = dreamt(self.program, self.structure, batch, values, lambda value, like: value.to(like.dtype))

        def replayed(msg: Message) -> None:
            msg["value"] = of_step(values[msg["name"]], msg)

        guide = self._trace(self._guide, Handler(self.constrain(params), replayed, handler.subsamples), data, params)
        found = {}
        for name, site in guide.items():
            info = self.structure.sites[name]
            log_q = self._rows(self._full(site_log_prob(site), info), info)
            found[name] = log_q[0, 0] if info.local else log_q[0]
        return found

    def broadcasts(self, plan: Plan, batch: Call) -> tuple[bool, bool]:
        """Whether this program broadcasts over outer draws and over draws; where it does not, they run one by one.

        Found once per bound, by running it both ways on the same values: `z @ W` with a global W fails at M > 1, or
        worse, goes through with other numbers. A step that is traced must have asked before.
        """
        many = (
            plan.M * plan.layout(self.structure, False)[0] > 1,
            plan.K * plan.layout(self.structure, True)[0] > 1,
        )
        if any(many) and many not in self._broadcasts:
            with sealed(self.dtype), seeded(0), self.evaluation():
                self._broadcasts[many] = self._try(*many, batch)
        whole = self._broadcasts.get(many, (True, True))
        run = many[0] and whole[0], many[1] and whole[1]
        if plan.values_summed > 2 and run not in self._at_once:
            with sealed(self.dtype), seeded(0), self.evaluation():
                self._at_once[run] = self._sums_at_once(run, batch)
        return whole

    def _sums_at_once(self, run: tuple[bool, bool], batch: Call) -> bool:
        """Whether the values of sites that are summed out can stand on the outer axis in runs of these axes."""
        plan, sizes = Plan.of_values(self.structure, 1, 1), (3 if run[0] else 1, 2 if run[1] else 1)
        subsamples, constrained = dict[str, Tensor](), self.constrain(self.initial)

        def table(given: Mapping[str, Tensor]) -> dict[str, Site]:
            return self._sites(self.initial, constrained, batch, plan, given, sizes, (True, True), subsamples)

        self._at_once[run] = False
        one_by_one = table({})
        self._at_once[run] = True
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return equal(table({n: one_by_one[n].value for n in plan.estimators}), one_by_one)
        return False

    def _try(self, outer: bool, inner: bool, batch: Call) -> tuple[bool, bool]:
        plan = Plan.of_values(self.structure, 1, 1)
        sizes, subsamples = (3 if outer else 1, 2 if inner else 1), dict[str, Tensor]()
        constrained = self.constrain(self.initial)

        def run(given: Mapping[str, Tensor], whole: tuple[bool, bool]) -> dict[str, Site]:
            return self._sites(self.initial, constrained, batch, plan, given, sizes, whole, subsamples)

        one_by_one = run({}, (False, False))
        # Points are left to the program: a given one that differs in rounding would have no density.
        values = {n: one_by_one[n].value for n in plan.estimators if not self.structure.sites[n].point}
        for whole in ((True, True), (False, True)) if outer and inner else ((True, True),):
            # Whatever a program raises on shapes it was not written for, and warns about, it is not to be run on them.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if equal(run(values, whole), one_by_one):
                    return whole
        # A program that is random by itself (dropout) cannot be compared with itself; it gets the benefit of the doubt.
        return (not outer, not inner) if equal(run(values, (False, False)), one_by_one) else (True, True)

    def _sites(
        self,
        params: Params,
        constrained: Params,
        batch: Call,
        plan: Plan,
        given: Mapping[str, Tensor],
        sizes: tuple[int, int],
        whole: tuple[bool, bool],
        subsamples: dict[str, Tensor],
        own: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Site]:
        """The table's sites from one run, or from several that are put together, on one mini-batch."""
        memo: dict[Any, Tensor] = {}
        outer, inner = (
            [range(n)] if at_once else [range(i, i + 1) for i in range(n)]
            for n, at_once in zip(sizes, whole, strict=True)
        )
        if plan.chunk is not None and plan.chunk < plan.K and whole[1]:
            size = plan.chunk * plan.layout(self.structure, True)[0]
            inner = [range(i, i + size) for i in range(0, sizes[1], size)]

        def table(m: range, k: range) -> dict[str, Site]:
            run = partial(self._run, params, constrained, batch, plan, given, own or {}, m, k)
            if plan.chunk is None:
                return run(memo, subsamples)
            table = self._in_piece(run, params, memo, subsamples)
            # For a gradient only objectives look at values, which of all draws take more than a piece does.
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in params.values())
            return without_values(table) if trained and "values" not in plan.requests else table

        return joined([joined([table(m, k) for k in inner], 1) for m in outer], 0)

    def _in_piece(
        self,
        run: Callable[[dict[Any, Tensor], dict[str, Tensor]], dict[str, Site]],
        params: Params,
        memo: dict[Any, Tensor],
        subsamples: dict[str, Tensor],
    ) -> dict[str, Site]:
        """A run that keeps nothing for the gradient but its table: the gradient runs it again, on the same noise."""
        before, gate = (dict(memo), dict(subsamples)), current_gate()

        def again(*_: Tensor) -> tuple[dict[str, Site], dict[Any, Tensor], dict[str, Tensor]]:
            now = dict(before[0]), dict(before[1])
            with sealed(self.dtype), stopped_once(gate):
                return run(*now), *now

        table, memo_, subsamples_ = checkpoint(again, *params.values(), use_reentrant=False)
        memo |= memo_
        subsamples |= subsamples_
        return table

    def _run(
        self,
        params: Params,
        constrained: Params,
        batch: Call,
        plan: Plan,
        given: Mapping[str, Tensor],
        own: Mapping[str, Mapping[str, Tensor]],
        outer: range,
        inner: range,
        memo: dict[Any, Tensor],
        subsamples: dict[str, Tensor],
    ) -> dict[str, Site]:
        """The sites of one run, for these entries of the outer axis and of the draws axis."""
        structure, n = self.structure, self.structure.nesting
        layouts = plan.layout(structure, True)[1] | plan.layout(structure, False)[1]
        M, K = self._sizes = len(outer), len(inner)
        variants: dict[str, Variant] = {}

        def of_draws(msg: Message, info: SiteInfo, M: int = M) -> Any:
            """The message's distribution for every draw."""
            fn = msg["fn"]
            lead = ((M, K) if M > 1 else (K,) if K > 1 else ()) if info.local else (M, 1) if M > 1 else ()
            if lead:
                base = tuple(fn.batch_shape)[-n:] if n else ()
                msg["fn"] = fn = fn.expand(torch.Size(lead + (1,) * (n - len(base)) + base))
            return fn

        def guide_site(
            msg: Message, given_as: str, remember: Callable[[Callable[[], Tensor]], Tensor]
        ) -> GuideSite:
            """The site with dimensions of draws, and as its estimator sees it."""
            info = structure.sites[msg["name"]]
            fn = of_draws(msg, info)

            def injected(name: str, event_dim: int) -> Tensor | None:
                if name not in given:
                    return None
                return of_step(self._to_site(given[name], info, outer, inner), msg, event_dim)

            count, stride = layouts[info.name]
            span = count * stride if len(inner if info.local else outer) > 1 else 1
            dim = -(n + 1) if info.local else -(n + 2)
            rows = partial(features, batch, info, structure)
            return GuideSite(given_as, fn, injected, info.support, span, dim, remember, own.get(info.name), rows)

        def latent(msg: Message) -> None:
            info = self._known(msg["name"])
            count, stride = layouts[info.name]
            span, entries = count * stride, inner if info.local else outer
            number = itertools.count()

            def remember(draw: Callable[[], Tensor]) -> Tensor:
                if info.local and span <= len(entries):  # no other run has these draws
                    return draw()
                at = outer.start if info.local else None, entries.start // span
                entry = (info.name, msg.get("step"), next(number), *at)
                if entry not in memo:
                    memo[entry] = draw()
                return memo[entry]

            axis = -(n + 1) if info.local else -(n + 2)
            site = guide_site(msg, info.name, remember)
            estimator = plan.estimators[info.name]
            if plan.varied(info.name, count):
                t = torch.arange(entries.start, entries.stop)
                t = t.reshape((-1,) + (1,) * (-axis - 1) if len(entries) > 1 else ())
                variant = estimator.variants(site, t // stride % count)
                variants[info.name] = variant
                msg["value"] = variant.value
            else:
                msg["value"] = estimator.sample(site)
                msg["fresh"] = site.fresh
            site.check_used()

        of_classes = {side: plan.of_classes(side) for side in ("guide", "model")}
        handler = Handler(constrained, latent, subsamples, of_classes=of_classes["guide"])
        if plan.resampling is not None:
            handler.together = self._together(plan, handler, params, constrained, batch)
        dropout = Dropout() if plan.frozen or plan.inner else contextlib.nullcontext()
        with dropout:
            guide = self._trace(self._guide, handler, batch, params)
        drawn = {name: s["value"] for name, s in guide.items()}

        def replayed(msg: Message) -> None:
            msg["value"] = of_step(drawn[self._known(msg["name"]).name], msg)

        def at(runs: range, msg: Message) -> None:
            """Values in these runs of the model, laid along the outer axis; the draws are the same in every run."""
            info, S = self._known(msg["name"]), len(runs)
            if info.in_guide:
                value = drawn[info.name]
                if S > 1:
                    value = self._pad(value, guide[info.name]["fn"].event_dim, info.local)
                    value = value.expand(S, *value.shape).flatten(0, 1)
                msg["value"] = of_step(value, msg)
                return
            fn = of_draws(msg, info, S * M)
            index = torch.arange(runs.start, runs.stop).repeat_interleave(M) if S > 1 else torch.tensor(runs.start)
            value = support_value(info.support, plan.value_at(structure, info.name, index))
            if S > 1:
                event = len(fn.event_shape)
                value = value.reshape(S * M, *(1,) * (len(fn.batch_shape) - 1), *value.shape[value.dim() - event :])
            msg["value"] = value.expand(fn.batch_shape + fn.event_shape)

        def densities(runs: range, trace: Mapping[str, Message]) -> dict[str, Tensor]:
            """Those inside a sum, `[S, M, K, B, *inner]`."""
            self._sizes = len(runs) * M, K
            every = {n: self._full(site_log_prob(trace[n]), structure.sites[n]) for n in plan.in_sums}
            self._sizes = M, K
            return {n: x.reshape(len(runs), M, *x.shape[1:]) for n, x in every.items()}

        sums: dict[str, Tensor] = {}
        if handler.together is None:
            model_handler = Handler(
                constrained, partial(at, range(1)), handler.subsamples, of_classes=of_classes["model"]
            )
            model_dropout = Dropout() if plan.values_summed > 1 else contextlib.nullcontext()
            with model_dropout:
                model = self._trace(self._model, model_handler, batch, params)
            parts = [densities(range(1), model)]
            if isinstance(model_dropout, Dropout):
                if not self._evaluating:
                    self._modules.refuse_noise()
                rest = range(1, plan.values_summed)
                # Factors of dropout, which all runs share, fit an outer axis of several runs if it has no draws of its
                # own.
                at_once = self._at_once.get((M > 1, K > 1), False) and not (model_dropout.used and M > 1)
                for runs in [rest] if at_once else [range(s, s + 1) for s in rest]:
                    other = Handler(
                        constrained, partial(at, runs), model_handler.subsamples, of_classes=of_classes["model"]
                    )
                    with model_dropout.replay():
                        trace = self._trace(self._model, other, batch, params)
                    parts.append(densities(runs, trace))
            sums = plan.sums({n: torch.cat([part[n] for part in parts]) for n in plan.in_sums}, 3)
            subsamples.update(model_handler.subsamples)
        else:
            model = handler.together.model
            self._particles = Particles(handler.together.before, handler.together.increments)
        for name in {*guide, *model} ^ set(structure.sites):
            self._known(name, missing=name in structure.sites)
        frozen: dict[str, Message] = {}
        stopped = {name: p.detach() for name, p in params.items()}

        def again(params: Params, constrained: Params, latent: Callable[[Message], None]) -> dict[str, Message]:
            """The guide run once more, on the same noise of its modules."""
            if not self._evaluating:
                self._modules.refuse_noise()
            assert isinstance(dropout, Dropout)
            replay = Handler(constrained, latent, handler.subsamples, of_classes=of_classes["guide"])
            with dropout.replay():
                return self._trace(self._guide, replay, batch, params)

        if plan.frozen:
            frozen = again(stopped, self.constrain(stopped), replayed)

        def of_guide(trace: dict[str, Message], names: Iterable[str]) -> dict[str, Tensor]:
            sites = structure.sites
            return {s: self._rows(self._full(site_log_prob(trace[s]), sites[s]), sites[s]) for s in names}

        def anew(j: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            """Densities of the guide at inner draw j, and under stopped parameters those that are frozen."""

            def inner_draw(msg: Message) -> None:
                if msg["name"] not in plan.summed_out:
                    return replayed(msg)
                site = guide_site(msg, inner_name(msg["name"], j), lambda draw: draw())
                msg["value"] = plan.estimators[msg["name"]].sample(site)

            trace = again(params, constrained, inner_draw)
            live = of_guide(trace, plan.inner_sites)
            if not plan.frozen:
                return live, {}
            values = drawn | {s: trace[s]["value"] for s in plan.summed_out}

            def kept(msg: Message) -> None:
                msg["value"] = of_step(values[msg["name"]], msg)

            return live, of_guide(again(stopped, self.constrain(stopped), kept), plan.frozen_inner_sites)

        table = {
            info.name: self._site(
                info, guide, model, frozen, plan, sums, variants.get(info.name), layouts.get(info.name, (1, 1))[0]
            )
            for info in plan.rows(structure)
        }
        for name in plan.compared(structure, "cross", "moments"):
            requested = self._of_guide(guide[name], structure.sites[name], plan)
            table[name] = replace(table[name], extra={**table[name].extra, **requested})
        for name in plan.compared(structure, "prior"):
            info, fn = structure.sites[name], of_draws(dict(model[name]), structure.sites[name])

            def of_prior(site: str, _: int) -> Tensor | None:
                drawn = given.get(prior_name(site))
                return None if drawn is None else self._to_site(drawn, structure.sites[site], outer, inner)

            prior = GuideSite(name, fn, of_prior, info.support, 1, -(n + 1), lambda draw: draw())
            value = prior.rsample() if fn.has_rsample else prior.sample()
            requested = {"prior": self._from_site(value, fn.event_dim, info)}
            if not fn.has_rsample:
                requested["prior_log_p"] = self._rows(self._full(log_prob(fn, value), info), info)
            table[name] = replace(table[name], extra={**table[name].extra, **requested})
        if plan.nested:
            pairs = [anew(j) for j in range(1, plan.inner + 1)]
            found = [{s: torch.stack([p[i][s] for p in pairs]) for s in pairs[0][i]} if pairs else {} for i in (0, 1)]
            labels = ("log_q", "log_q_full", "log_q_frozen", "log_q_inner")
            arrays = {s: {label: getattr(table[s], label) for label in labels} for s in plan.inner_sites}
            rows: dict[str, dict[str, Any]] = {
                s: {label: a for label, a in row.items() if a is not None} for s, row in arrays.items()
            }
            sum_out(rows, plan, *found)
            for s, row in rows.items():
                changed: dict[str, Any] = {label: row.get(label) for label in labels}
                table[s] = replace(table[s], **changed)
        return table

    def _together(
        self, plan: Plan, guide: Handler, params: Params, constrained: Params, batch: Call
    ) -> Together:
        """The model, run inside the guide's scan; its latent sites have what the guide drew in the same step."""
        structure, ppl = self.structure, self._ppl
        assert ppl is not None and plan.resampling is not None

        def rows(sites: dict[str, Message]) -> Tensor:
            found = {n: self._full(site_log_prob(m), structure.sites[n]) for n, m in sites.items()}
            every = [self._rows(full, structure.sites[n]) for n, full in found.items()]
            return sum(every, torch.zeros((*self._sizes, structure.rows)))

        def drawn(msg: Message) -> None:
            msg["value"] = pair.now[msg["name"]]

        def model() -> dict[str, Message]:
            before = ppl.handler, ppl.rows
            now = Handler(constrained, drawn, guide.subsamples, of_classes=plan.of_classes("model"))
            now.together = pair
            try:
                return self._trace(self._model, now, batch, params)
            finally:
                ppl.handler, ppl.rows = before

        pair = Together(plan.resampling, rows, structure.data_plate is not None, model)
        return pair

    def _known(self, name: str, missing: bool = False) -> SiteInfo:
        """The site's facts from the first run, which every run must agree with."""
        if missing or name not in self.structure.sites:
            raise ProgramError(
                f"Site {name!r} was {'met' if missing else 'not met'} when the program was first run, and is "
                f"{'not in' if missing else 'in'} this run; a program must have the same sites in every run. A loop "
                f"over a plate that subsamples, for one, names other sites each time; use the plate in a with "
                f"statement."
            )
        return self.structure.sites[name]

    def _site(
        self,
        info: SiteInfo,
        guide: dict[str, Message],
        model: dict[str, Message],
        frozen: dict[str, Message],
        plan: Plan,
        sums: Mapping[str, Tensor],
        variant: Variant | None,
        count: int,
    ) -> Site:
        name = info.name
        in_guide, in_model = guide.get(name), model.get(name) if info.role != "auxiliary" else None
        site = in_guide if in_guide is not None else in_model
        assert site is not None
        row: dict[str, Any] = {}
        for label, message in (("log_p", in_model), ("log_q", in_guide)):
            if message is None or (label == "log_p" and name in plan.in_sums and name not in sums):
                continue
            full = sums[name] if label == "log_p" and name in sums else self._full(site_log_prob(message), info)
            row[label + "_full"], row[label] = full, self._rows(full, info)
        if in_guide is not None and "drawn" in in_guide and name in plan.estimators:
            fn, drawn = in_guide["drawn"]
            row["log_q_drawn"] = self._rows(self._full(log_prob(fn, drawn), info), info)
        if name in frozen and name in plan.estimators and plan.estimators[name].frozen:
            row["log_q_frozen"] = self._rows(self._full(site_log_prob(frozen[name]), info), info)
        if variant is not None:
            for label in VARIANT:
                value = getattr(variant, label)
                if value is not None:
                    full = self._full(torch.as_tensor(value).expand(site["fn"].batch_shape), info)
                    row[label] = (self._rows if label in SUMMED else self._first)(full, info)
        extra = {}
        if name in plan.kl and in_guide is not None and in_model is not None:
            extra["kl"] = self._rows(self._full(kl(in_guide, in_model), info), info)
        scales: dict[str, Any] = {}
        for label, message in (("user_scale", in_model), ("guide_scale", in_guide)):
            if message is None:
                continue
            scale = self._user_scale(message, self.structure.data_plate)
            if info.user_scaled:
                scales[label] = self._scale(scale, info)
            elif not isinstance(scale, Tensor) and abs(scale - 1.0) > 1e-9:
                raise ProgramError(
                    f"Site {name!r} is scaled by {scale} in this run and was not in the first one; begin with another "
                    f"scale than one, or give the weight to the objective (beta)."
                )
        optional = (
            *("log_p", "log_q", "log_q_frozen", "log_q_drawn", "log_p_full", "log_q_full"),
            *VARIANT,
        )
        facts = plan.facts(self.structure, name)
        return Site(
            name=name,
            role=facts.role,
            downstream=facts.downstream,
            ancestors=facts.ancestors,
            joint=facts.joint,
            mixed=facts.mixed,
            local=info.local,
            value=self._from_site(site["value"], site["fn"].event_dim, info),
            estimator=plan.estimators.get(name),
            plates=info.plates,
            variants=count,
            extra=extra,
            **scales,
            **{label: row.get(label) for label in optional},
        )

    def _of_guide(self, site: Message, info: SiteInfo, plan: Plan) -> dict[str, Tensor]:
        """What is requested of a guide's distribution: "cross", "mean" and "variance"."""
        fn, found = site["fn"], dict[str, Tensor]()

        def flat(x: Tensor, event_dim: int) -> Tensor:
            x = self._from_site(x, event_dim, info)
            return x.reshape(*x.shape[:3], -1)

        if "moments" in plan.requests:
            shape = fn.batch_shape + fn.event_shape
            found = {n: flat(getattr(fn, n).expand(shape), fn.event_dim) for n in ("mean", "variance")}
        if "cross" in plan.requests:
            assert self.structure.plate_dim is not None
            base, rows = apart(fn), self.structure.plate_dim - fn.event_dim
            value = site["value"].expand(fn.batch_shape + fn.event_shape)
            every = log_prob(base, value.movedim(rows, 0).unsqueeze(rows)).movedim(0, -1)
            elements = fn.event_dim - len(base.event_shape)
            by_row = flat(every, elements + 1)
            found["cross"] = by_row.reshape(*by_row.shape[:3], -1, by_row.shape[2]).movedim(4, 2)
        return found

    # Shapes: batch dimensions are counted from the right, draws on their left; a table row has [M, K, B, *inner].

    def _pad(self, x: Tensor, event_dim: int, local: bool) -> Tensor:
        """All draw and plate dimensions made explicit: `[M, K, *n plates, *event]`, K = 1 for a global site."""
        n, batch = self.structure.nesting, x.dim() - event_dim
        if batch > n + 2:
            raise BackendError(f"A batch shape {tuple(x.shape)} has more than {n} plate and 2 draw dimensions.")
        # What changes nothing is left out in these functions: a step that is not compiled pays for it, twice.
        if batch < n + 2:
            x = x.reshape((1,) * (n + 2 - batch) + tuple(x.shape))
        M, K = self._sizes
        lead = M, K if local else x.shape[1]
        return x if tuple(x.shape[:2]) == lead else x.expand(lead + tuple(x.shape[2:]))

    def _full(self, x: Tensor, info: SiteInfo) -> Tensor:
        x = self._pad(x, 0, info.local)
        if not info.local:
            return x
        if self.structure.plate_dim is None:
            return x.unsqueeze(2)
        x = self._rows_third(x)
        rows = self.structure.rows
        return x if x.shape[2] == rows else x.expand(x.shape[:2] + (rows,) + x.shape[3:])

    def _rows_third(self, x: Tensor) -> Tensor:
        assert self.structure.plate_dim is not None
        place = 2 + self.structure.nesting + self.structure.plate_dim
        return x if place == 2 else x.movedim(place, 2)

    def _rows(self, full: Tensor, info: SiteInfo) -> Tensor:
        """Summed over every plate but the data plate: `[M, K, B]`, or `[M]` for a global site."""
        M, K = self._sizes
        if not info.local:
            return full.reshape(M) if full.numel() == M else full.reshape(M, -1).sum(1)
        if full.dim() == 3:
            return full
        rows = 1 if self.structure.plate_dim is None else self.structure.rows
        return full.reshape(M, K, rows, -1).sum(3)

    def _first(self, full: Tensor, info: SiteInfo) -> Tensor:
        """Of what is the same for all elements inside a row: `[M, K, B]`, or `[M]` for a global site."""
        lead = 3 if info.local else 1
        return full.reshape(*full.shape[:lead], -1)[..., 0]

    def _scale(self, scale: Any, info: SiteInfo) -> Any:
        """A scale as a number, or as `[M, K, B]` (local) or `[M]` (global)."""
        if not isinstance(scale, Tensor) or not scale.dim():
            return scale
        full = self._full(scale, info)
        return full.reshape(*self._sizes, -1) if info.local else full.reshape(len(full), -1)[:, 0]

    def _from_site(self, value: Tensor, event_dim: int, info: SiteInfo) -> Tensor:
        value = self._pad(value, event_dim, info.local)
        if not info.local:
            value = value if value.shape[1] == 1 else value[:, :1]
            return value.reshape((value.shape[0],) + self._own(value.shape[2:], event_dim, info))
        if self.structure.plate_dim is None:
            return value.reshape(tuple(value.shape[:2]) + (1,) + self._own(value.shape[2:], event_dim, info))
        return self._rows_third(value)

    def _own(self, shape: torch.Size, event_dim: int, info: SiteInfo) -> tuple[int, ...]:
        """A value's shape without the plate dimensions that its site is not in."""
        return tuple(shape[self.structure.nesting - self._ranks[info.name] :])

    def _to_site(self, value: Tensor, info: SiteInfo, outer: range, inner: range) -> Tensor:
        """A table's value as the site has it in a run of these entries."""
        M, K = len(outer), len(inner)
        n, dim = self.structure.nesting, self.structure.plate_dim
        value = value[outer.start : outer.stop]
        if info.local:
            value = value[:, inner.start : inner.stop]
        missing = (1,) * (n - self._ranks[info.name])
        if not info.local:
            return value[0] if M == 1 else value.reshape((M, 1) + missing + tuple(value.shape[1:]))
        if dim is None:
            value = value.squeeze(2)
            if (M, K) == (1, 1):
                return value[0, 0]
            value = value.reshape((M, K) + missing + tuple(value.shape[2:]))
        else:
            value = value.movedim(2, 2 + n + dim)
        if M > 1:
            return value
        return value[0] if K > 1 else value[0, 0]

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Without gradients, modules in eval mode."""
        with TURN, torch.no_grad():
            before, self._evaluating = self._evaluating, True
            try:
                yield
            finally:
                self._evaluating = before

    def evaluate(
        self, params: Params, batch: Call, key: int, plan: Plan, values: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Values and densities of every site of one run, in evaluation; `values` as `draws` takes them."""
        given = {n: torch.as_tensor(v) for n, v in (values or {}).items()}
        with self.evaluation():
            return rows_of(self.draws(params, batch, key, plan, values=given).sites)

    def log_w(
        self, params: Params, batch: Call, key: int, plan: Plan, values: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Log weights `[M, K, B]` of one run, in evaluation."""
        given = {n: torch.as_tensor(v) for n, v in (values or {}).items()}
        with self.evaluation():
            return self.draws(params, batch, key, plan, values=given).log_w

    def peak(self, params: Params, batch: Call, plan: Plan) -> int | None:
        """Bytes that `evaluate` takes at most, as far as shapes tell; nothing is run. None where shapes do not tell."""
        self.broadcasts(plan, batch)

        def run(params: Params, args: Any, kwargs: Any) -> Any:
            return self.evaluate(params, Call(args, kwargs), 0, plan)

        return _torch_memory.peak(run, dict(params), batch.args, dict(batch.kwargs))

    def simulate(
        self,
        params: Params,
        batch: Call,
        key: int,
        draws: int,
        how: Forward,
        given: Mapping[str, Any] | None = None,
        fixed: Mapping[str, Any] | None = None,
        masks: Mapping[str, Any] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """The program run forward `draws` times: "value", "mean", "log_p" and "log_q" of its sites.

        Values are `[draws, B, ...]`, or `[draws, ...]` for global sites; densities `[draws, B]` or `[draws]`. `given`
        has the draws axis and stands for draws of the guide (of the model where the guide is not run). `fixed` is the
        same for all draws, and only the model sees it; data of that name are replaced too. Elements of an observed
        site outside its mask `[B, ...]` have no density and are drawn anew.
        """
        self._check_shapes(params)
        return _pyro_forward.simulate(self, params, batch, key, draws, how, given or {}, fixed or {}, masks or {})

    def outside(self, params: Params, batch: Call, fixed: Mapping[str, Any]) -> list[str]:
        """Sites whose fixed values are outside the support of their distribution in the model."""
        return _pyro_forward.outside(self, params, batch, fixed)

    def distributions(
        self, params: Params, batch: Call, values: Mapping[str, Any]
    ) -> dict[tuple[str, str], list[Any]]:
        """See `base.Bound`."""
        return _pyro_forward.distributions(self, params, batch, values)

    def anatomy(self, batch: Call) -> Anatomy:
        """What the sites look like and look at."""
        if self._anatomy is None:
            with first_run(self.program, batch):
                self._anatomy = _pyro_forward.anatomy(self, batch)
        return self._anatomy

    # Gradients.

    def gradients(
        self,
        params: Params,
        batch: Call,
        key: int | None,
        plan: Plan,
        objective: Objective,
        *,
        total_rows: Any = None,
        values: Mapping[str, Tensor] | None = None,
        outer_weight: Tensor | None = None,
        states: Mapping[str, Tensor] | None = None,
        own: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Gradients:
        """The loss and the gradient that each group of parameters gets from it."""
        leaf = {n: p.detach().requires_grad_(True) for n, p in params.items()}
        own_leaf = {s: {n: p.detach().requires_grad_(True) for n, p in ps.items()} for s, ps in (own or {}).items()}
        varied = of_least_variance(plan, own_leaf)
        gate = Gate() if varied else None
        with torch.enable_grad(), stopped_once(gate):
            draws = self.draws(
                leaf,
                batch,
                key,
                plan,
                total_rows=total_rows,
                values=values,
                outer_weight=outer_weight,
                states=states,
                own=own_leaf,
            )
            model, guide, extra, states_ = losses(draws, objective, plan)
            N = draws.N
            del draws  # a table of many draws takes as much as the gradient of its pieces
            of_model = {n: p for n, p in leaf.items() if "model" in self.structure.groups[n]}
            of_guide = {n: p for n, p in leaf.items() if n not in of_model}
            # A third loss may be one of the other two, or share parts of them.
            keep, again = extra is not None, bool(varied)
            if guide is None:
                gradient = self._pull(model, leaf, keep=keep, again=again)
            else:
                gradient = self._pull(model, of_model, keep=True)
                gradient |= self._pull(guide, of_guide, keep=keep, again=again)
            flat = {(s, n): p for s, ps in own_leaf.items() for n, p in ps.items()}
            pulled = {k: torch.zeros_like(p) for k, p in flat.items()}
            if extra is not None:
                pulled = self._pull(extra, flat, keep=bool(varied))
            if gate is not None:
                square = sum(((gradient[n] / N) ** 2).sum() for n in of_guide)
                gate.open = True
                pulled |= self._pull(square, {k: p for k, p in flat.items() if k[0] in varied})
        own_gradient = {s: {n: pulled[s, n] for n in ps} for s, ps in own_leaf.items()}
        return Gradients(
            model.detach(),
            {n: gradient[n].detach() for n in params},
            own_gradient,
            {n: s.detach() for n, s in states_.items()},
        )

    def _pull(
        self, loss: Any, leaves: Mapping[Any, Tensor], keep: bool = False, again: bool = False
    ) -> dict[Any, Tensor]:
        """The gradient, which with `again` can itself be differentiated."""
        if not leaves or not isinstance(loss, Tensor) or not loss.requires_grad:
            return {n: torch.zeros_like(p) for n, p in leaves.items()}
        found = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=keep or again, create_graph=again, allow_unused=True
        )
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(leaves.items(), found, strict=True)
        }
