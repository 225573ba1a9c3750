"""NumPyro: one run of a program as a table of arrays, under two `vmap`s (outer draws, draws)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl_lvm.algorithm import Objective, Resampling, Variant
from ppl_lvm.backends import _jax_memory, _numpyro_forward
from ppl_lvm.backends._jax_dists import (
    GuideSite,
    apart,
    draw,
    kl,
    site_log_prob,
    support_value,
)
from ppl_lvm.backends._jax_ops import stopped_once
from ppl_lvm.backends._jax_waiting import without_waiting
from ppl_lvm.backends._numpyro_handlers import (
    Handler,
    Message,
    Params,
    message_key,
    of_step,
    plates_of,
    precision,
    site_key,
)
from ppl_lvm.backends._numpyro_particles import DRAWS, Together
from ppl_lvm.backends._numpyro_program import NumPyroProgram
from ppl_lvm.backends._numpyro_state import after_run, evaluation, next_states
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
    owner,
    prior_name,
    sum_out,
)
from ppl_lvm.backends.training import Steps, rows_of
from ppl_lvm.draws import Draws, Particles, Site
from ppl_lvm.errors import BackendError, ProgramError

Array = jax.Array

EVALUATIONS = Steps(64)
"""Compiled runs without gradients, each with the bound that it was traced from."""


class NumPyroBound(NumPyroProgram):
    """A program's runs on batches (see `backends.base.Bound`)."""

    def draws(
        self,
        params: Params,
        batch: Call,
        key: Array,
        plan: Plan,
        *,
        total_rows: Any = None,
        values: Mapping[str, Array] | None = None,
        outer_weight: Array | None = None,
        states: Mapping[str, Array] | None = None,
        own: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> Draws:
        """The table of one run on `batch`, networks in evaluation.

        `values` are laid out as in the table, `[M, K, B, ...]` and `[M, ...]`.
        """
        options = {"total_rows": total_rows, "values": values, "outer_weight": outer_weight}
        return self._run(params, batch, key, plan, training=False, states=states, own=own, **options)[0]

    def _run(
        self,
        params: Params,
        batch: Call,
        key: Array,
        plan: Plan,
        *,
        training: bool,
        total_rows: Any = None,
        values: Mapping[str, Array] | None = None,
        outer_weight: Array | None = None,
        states: Mapping[str, Array] | None = None,
        own: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> tuple[Draws, dict[str, Any]]:
        """The table, and the program's own state after the run.

        Guide and model start from the state that was given, the model after the guide where they share it. What the
        draws leave behind is averaged; a replay leaves nothing.
        """
        if not training:
            self._check_frozen()
        structure = self.structure
        held = {n: params.get(n, state) for n, state in self.states.items()}
        constrained = {**self.constrain(params), **held}
        stopped = jax.lax.stop_gradient(constrained) if plan.frozen else None
        v_local, local_layout = plan.layout(structure, True)
        v_outer, outer_layout = plan.layout(structure, False)
        K, M = plan.K * v_local, plan.M * v_outer
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        # Of nothing but the run's key, so that a loop over steps finds them for many steps at once.
        of_outer = fold(key, jnp.arange(M) // v_outer)
        of_local = jax.vmap(fold, (0, None))(of_outer, 1 + jnp.arange(K) // v_local)
        given = values or {}
        inner_counts = {n: m.draws - 1 for m in plan.nested for n in m.sites}
        inner_draws = {inner_name(n, j + 1): n for n, count in inner_counts.items() for j in range(count)}
        owners = {n: structure.sites[owner(n, structure.sites)] for n in given}
        inside = [n for n, info in owners.items() if info.scanned]
        if inside:
            raise BackendError(f"A value was injected into site {inside[0]!r}, which is drawn inside a scan.")
        given_local = {n: v for n, v in given.items() if owners[n].local}
        given_outer = {n: v for n, v in given.items() if n not in given_local}

        with_inner = sorted({inner_draws[n] for n in given if n in inner_draws})
        of_classes = {side: plan.of_classes(side) for side in ("guide", "model")}

        def together(how: Resampling, guided: Handler, key: Array) -> Together:
            """The model of one draw, run inside the guide's scan; its latent sites have what the guide drew there."""
            ppl = self._ppl
            assert ppl is not None

            def rows(sites: Mapping[str, Message]) -> Array:
                found = {n: self._full(site_log_prob(m), structure.sites[n]) for n, m in sites.items()}
                every = [self._rows(full, structure.sites[n]) for n, full in found.items()]
                return sum(every, jnp.zeros(structure.rows))

            def model() -> dict[str, Message]:
                before = ppl.handler, ppl.rows
                drawn, plates = (lambda msg: pair.now[msg["name"]]), plates_of(guided.trace)
                now = Handler(
                    constrained,
                    guided.key,
                    drawn,
                    plates,
                    side="model",
                    still=not training,
                    of_classes=of_classes["model"],
                )
                now.together = pair
                try:
                    return self._trace(self._model, now, batch)
                finally:
                    ppl.handler, ppl.rows = before

            by_row = structure.data_plate is not None
            pair = Together(how, site_key(key, "$particles"), plan.K, rows, by_row, model)
            return pair

        def run(
            m: Array, k: Array, outer_key: Array, draw_key: Array, outer: dict[str, Array], local: dict[str, Array]
        ) -> dict[str, Any]:
            injected = {**outer, **local}
            variants: dict[str, Variant] = {}

            def guide_site(msg: Message, own_key: Array, given: Mapping[str, Array]) -> GuideSite:
                info = structure.sites[msg["name"]]

                def injected(name: str, event_dim: int) -> Array | None:
                    return of_step(self._to_site(given[name], info), msg, event_dim) if name in given else None

                fn, portable, learned = msg["fn"], self.program.portable, (own or {}).get(info.name)
                rows = partial(features, batch, info, structure)
                return GuideSite(info.name, fn, own_key, injected, info.support, portable, learned, rows)

            def latent(msg: Message) -> Array:
                info = structure.sites[msg["name"]]
                layout, t, own_key = (
                    (local_layout, k, draw_key) if info.local else (outer_layout, m, outer_key)
                )
                site = guide_site(msg, message_key(own_key, msg), injected)
                estimator = plan.estimators[info.name]
                count, stride = layout[info.name]
                if plan.varied(info.name, count):
                    variant = estimator.variants(site, t // stride % count)
                    variants[info.name] = variant
                    value = variant.value
                else:
                    value = estimator.sample(site)
                    msg["fresh"] = site.fresh
                site.check_used()
                return value

            def scan_key(n: int) -> Array:
                names = self._scans[n]
                scan = draw_key if any(structure.sites[s].local for s in names) else outer_key
                return site_key(scan, f"$scan{n}")

            guided = Handler(
                constrained,
                key,
                latent,
                still=not training,
                scan_keys=scan_key,
                of_classes=of_classes["guide"],
            )
            if plan.resampling is not None:
                guided.together = together(plan.resampling, guided, outer_key)
            guide = self._trace(self._guide, guided, batch)
            plates = plates_of(guide)
            drawn = {n: s["value"] for n, s in guide.items() if s["type"] == "sample"}

            def replayed(msg: Message) -> Array:
                return of_step(drawn[msg["name"]], msg)

            portable = self.program.portable

            def at(s: Array | int, msg: Message) -> Array:
                info = structure.sites[msg["name"]]
                if info.in_guide:
                    return replayed(msg)
                value = support_value(msg["fn"], info.support, plan.value_at(structure, info.name, s), portable)
                return jnp.broadcast_to(value, msg["fn"].batch_shape + msg["fn"].event_shape)

            replay = partial(Handler, key=key, subsamples=plates, still=not training, scanned=drawn)

            again = partial(replay, of_classes=of_classes["guide"])

            def of_model(s: Array | int) -> tuple[dict[str, Message], Handler]:
                handler = replay(
                    {**constrained, **guided.states},
                    latent=partial(at, s),
                    side="model",
                    of_classes=of_classes["model"],
                )
                return self._trace(self._model, handler, batch), handler

            def terms(s: Array) -> dict[str, Array]:
                run, _ = of_model(s)
                return {n: self._full(site_log_prob(run[n]), structure.sites[n]) for n in plan.in_sums}

            if guided.together is None:
                model, modelled = of_model(0)
            else:
                model, modelled = guided.together.model, guided
            sums = plan.sums(jax.vmap(terms)(jnp.arange(plan.values_summed)), 1) if plan.marginal else {}
            frozen: dict[str, Message] = {}
            if stopped is not None:
                frozen = self._trace(self._guide, again(stopped, latent=replayed), batch)

            def anew(j: Array, given: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
                """Densities of the guide at inner draw j, and under stopped parameters those that are frozen."""
                sites = structure.sites

                def inner(msg: Message) -> Array:
                    if msg["name"] not in plan.summed_out:
                        return replayed(msg)
                    own_key = jax.random.fold_in(message_key(draw_key, msg), j)
                    return plan.estimators[msg["name"]].sample(guide_site(msg, own_key, given))

                def densities(trace: dict[str, Message], names: Iterable[str]) -> dict[str, Array]:
                    return {n: self._rows(self._full(site_log_prob(trace[n]), sites[n]), sites[n]) for n in names}

                trace = self._trace(self._guide, again(constrained, latent=inner), batch)
                live = densities(trace, plan.inner_sites)
                if stopped is None:
                    return live, {}
                values = drawn | {n: trace[n]["value"] for n in plan.summed_out}
                kept = again(stopped, latent=lambda msg: of_step(values[msg["name"]], msg))
                return live, densities(self._trace(self._guide, kept, batch), plan.frozen_inner_sites)

            sizes = {n: s["args"] for t in (guide, model) for n, s in t.items() if s["type"] == "plate"}
            left = after_run(held, {**guided.states, **modelled.states})
            met = {} if guided.together is None else guided.together.weights
            table: dict[str, dict[str, Any]] = {"local": {}, "outer": {}, "states": left, "particles": met}
            for info in plan.rows(structure):
                row = self._row(info, guide, model, frozen, plan, sums, variants.get(info.name), sizes)
                table["local" if info.local else "outer"][info.name] = row
            for name in plan.compared(structure, "cross", "moments"):
                table["local"][name] |= self._of_guide(guide[name], structure.sites[name], plan)
            for name in plan.compared(structure, "prior"):
                info, prior = structure.sites[name], prior_name(name)
                of_prior = {name: injected[prior]} if prior in injected else {}
                site = guide_site(model[name], site_key(draw_key, prior), of_prior)
                value = site.rsample() if model[name]["fn"].has_rsample else site.sample()
                row = {"prior": self._from_site(value, model[name]["fn"].event_dim, info)}
                if not model[name]["fn"].has_rsample:
                    row["prior_log_p"] = self._rows(self._full(site.log_prob(value), info), info)
                table["local"][name] |= row
            if plan.nested:
                # A site with fewer of them repeats its last, which nothing looks at.
                js = range(1, plan.inner + 1)
                named = {n: [inner_name(n, min(j, inner_counts[n])) for j in js] for n in with_inner}
                stacked = {n: jnp.stack([local[name] for name in names]) for n, names in named.items()}
                found = jax.vmap(anew)(jnp.arange(1, plan.inner + 1), stacked) if plan.inner else ({}, {})
                sum_out(table["local"], plan, *found)
            return table

        axes = {"local": 0, "outer": None, "states": 0, "particles": 0}
        inner = jax.vmap(run, in_axes=(None, 0, None, 0, None, 0), out_axes=axes, axis_name=DRAWS)
        if plan.chunk is not None and plan.chunk < plan.K:
            inner = _in_pieces(inner, plan.chunk * v_local)
        with contextlib.nullcontext() if training else evaluation():
            table = jax.vmap(inner, in_axes=(0, None, 0, 0, 0, 0))(
                jnp.arange(M), jnp.arange(K), of_outer, of_local, given_outer, given_local
            )
        sites = {
            info.name: self._site(
                info, table["local" if info.local else "outer"][info.name], plan, local_layout | outer_layout
            )
            for info in plan.rows(structure)
        }
        rows = structure.rows
        N = structure.plate_size or (rows if total_rows is None else total_rows)
        table_of_sites = Draws(
            sites=sites,
            M=plan.M,
            K=plan.K,
            B=rows,
            N=N,
            scale=N / rows,
            outer_weight=outer_weight,
            batch=batch.leaves[0] if batch.leaves else None,
            states=states or {},
            own=own or {},
            particles=Particles(**table["particles"]) if table["particles"] else None,
            dream=self._dream(constrained, batch, key, training) if "sleep" in plan.requests else {},
        )
        return table_of_sites, next_states(held, table["states"], v_local * v_outer * plan.values_summed)

    def _dream(self, constrained: Params, batch: Call, key: Array, training: bool) -> dict[str, Array]:
        """`log q` of every latent site at values that the model drew, given the data that it drew with them."""
        key = site_key(key, "$dream")

        def drawn(msg: Message) -> Array:
            return draw(msg["fn"], message_key(key, msg), self.program.portable)

        def observed(msg: Message) -> Array:
            return msg["value"] if is_factor(msg["fn"]) else drawn(msg)

        sides = partial(Handler, key=key, still=not training)
        with contextlib.nullcontext() if training else evaluation():
            stopped = jax.lax.stop_gradient(constrained)
            model = self._trace(self._model, sides(stopped, latent=drawn, observed=observed, side="model"), batch)
            values = {n: s["value"] for n, s in model.items() if s["type"] == "sample"}
            data = dreamt(self.program, self.structure, batch, values, lambda value, like: value.astype(like.dtype))

            def replayed(msg: Message) -> Array:
                return of_step(values[msg["name"]], msg)

            plates = plates_of(model)
            again = sides(constrained, latent=replayed, subsamples=plates, scanned=values)
            guide = self._trace(self._guide, again, data)
        sites = self.structure.sites
        return {
            n: self._rows(self._full(site_log_prob(s), sites[n]), sites[n])
            for n, s in guide.items()
            if s["type"] == "sample"
        }

    def _check_frozen(self) -> None:
        if self._restless:
            raise ProgramError(
                f"State {self._restless[0]!r} changes in evaluation too, so batch statistics or dropout are on there; "
                f"leave deterministic, use_running_average and inference to the modules instead of passing them in "
                f"the call, and they are switched."
            )

    def _row(
        self,
        info: SiteInfo,
        guide: dict[str, Message],
        model: dict[str, Message],
        frozen: dict[str, Message],
        plan: Plan,
        sums: Mapping[str, Array],
        variant: Variant | None,
        sizes: Mapping[str, tuple[int, Any]],
    ) -> dict[str, Any]:
        """The arrays of one site for one draw; None where there is none."""
        name = info.name
        in_guide, in_model = guide.get(name), model.get(name) if info.role != "auxiliary" else None
        site = in_guide if in_guide is not None else in_model
        assert site is not None
        row: dict[str, Any] = {"value": self._from_site(site["value"], site["fn"].event_dim, info)}
        for label, message in (("log_p", in_model), ("log_q", in_guide)):
            if message is None or (label == "log_p" and name in plan.in_sums and name not in sums):
                continue
            full = sums[name] if label == "log_p" and name in sums else self._full(site_log_prob(message), info)
            row[label + "_full"], row[label] = full, self._rows(full, info)
        if in_guide is not None and "drawn" in in_guide and name in plan.estimators:
            fn, drawn = in_guide["drawn"]
            row["log_q_drawn"] = self._rows(self._full(fn.log_prob(drawn), info), info)
        if name in frozen and name in plan.estimators and plan.estimators[name].frozen:
            row["log_q_frozen"] = self._rows(self._full(site_log_prob(frozen[name]), info), info)
        if variant is not None:
            for label in VARIANT:
                value = getattr(variant, label)
                if value is not None:
                    full = self._full(jnp.broadcast_to(value, site["fn"].batch_shape), info)
                    row[label] = (self._rows if label in SUMMED else self._first)(full, info)
        if name in plan.kl and in_guide is not None and in_model is not None:
            row["kl"] = self._rows(self._full(kl(in_guide["fn"], in_model["fn"]), info), info)
        if info.user_scaled:
            for label, message in (("user_scale", in_model), ("guide_scale", in_guide)):
                if message is not None:
                    row[label] = self._scale(self._user_scale(message, self.structure.data_plate, sizes), info)
        return row

    def _of_guide(self, site: Message, info: SiteInfo, plan: Plan) -> dict[str, Array]:
        """What is requested of a guide's distribution: "cross", "mean" and "variance"."""
        fn, found = site["fn"], dict[str, Array]()
        shape = fn.batch_shape + fn.event_shape

        def flat(x: Array, event_dim: int) -> Array:
            return self._from_site(x, event_dim, info).reshape(self.structure.rows, -1)

        if "moments" in plan.requests:
            moments = {n: jnp.broadcast_to(getattr(fn, n), shape) for n in ("mean", "variance")}
            found = {n: flat(x, fn.event_dim) for n, x in moments.items()}
        if "cross" in plan.requests:
            assert self.structure.plate_dim is not None
            base, rows = apart(fn), self.structure.plate_dim - fn.event_dim
            value = jnp.expand_dims(jnp.moveaxis(jnp.broadcast_to(site["value"], shape), rows, 0), rows)
            kept = shape[: len(shape) - len(base.event_shape)]
            every = jnp.broadcast_to(base.log_prob(value), (self.structure.rows, *kept))
            by_row = flat(jnp.moveaxis(every, 0, -1), fn.event_dim - len(base.event_shape) + 1)
            found["cross"] = jnp.moveaxis(by_row.reshape(self.structure.rows, -1, self.structure.rows), 2, 0)
        return found

    def _site(
        self,
        info: SiteInfo,
        row: dict[str, Any],
        plan: Plan,
        layout: Mapping[str, tuple[int, int]],
    ) -> Site:
        requested = ("kl", "cross", "mean", "variance", "prior", "prior_log_p")
        extra: dict[str, Array] = {n: row[n] for n in requested if n in row}
        optional = (
            *("log_q_frozen", "log_q_drawn", "log_q_inner", "log_p_full", "log_q_full"),
            *VARIANT,
        )
        facts = plan.facts(self.structure, info.name)
        return Site(
            name=info.name,
            role=facts.role,
            downstream=facts.downstream,
            ancestors=facts.ancestors,
            joint=facts.joint,
            mixed=facts.mixed,
            local=info.local,
            value=row["value"],
            log_p=row.get("log_p"),
            log_q=row.get("log_q"),
            estimator=plan.estimators.get(info.name),
            plates=info.plates,
            variants=layout.get(info.name, (1, 1))[0],
            extra=extra,
            user_scale=row.get("user_scale", 1.0),
            guide_scale=row.get("guide_scale", 1.0),
            **{label: row.get(label) for label in optional},
        )

    # Shapes: batch dimensions are counted from the right; the data plate's comes first in a table row.

    def _full(self, x: Array, info: SiteInfo) -> Array:
        """A batch-shaped array as `[B, *inner]` (local) or as it is (global)."""
        n = self.structure.nesting
        if not info.local:
            return x
        x = jnp.reshape(x, (1,) * (n - x.ndim) + x.shape)
        if self.structure.plate_dim is None:
            return x[None]
        axis = n + self.structure.plate_dim
        x = jnp.moveaxis(x, axis, 0)
        return jnp.broadcast_to(x, (self.structure.rows, *x.shape[1:]))

    def _rows(self, full: Array, info: SiteInfo) -> Array:
        """Summed over every plate but the data plate: `[B]`, or a scalar for a global site."""
        return full.reshape(full.shape[0], -1).sum(1) if info.local else full.sum()

    def _scale(self, scale: Any, info: SiteInfo) -> Array:
        """A scale as `[B]` or `[1]` (local), or as a number (global)."""
        scale = jnp.asarray(scale)
        if not info.local:
            return scale.reshape(())
        return (self._full(scale, info) if scale.ndim else scale).reshape(-1)

    def _first(self, full: Array, info: SiteInfo) -> Array:
        """Of what is the same for all elements inside a row: `[B]`, or a number for a global site."""
        return full.reshape(full.shape[0], -1)[:, 0] if info.local else full.reshape(-1)[0]

    def _from_site(self, value: Array, event_dim: int, info: SiteInfo) -> Array:
        if not info.local or self.structure.plate_dim is None:
            return value[None] if info.local else value
        n, batch = self.structure.nesting, value.ndim - event_dim
        value = value.reshape((1,) * (n - batch) + value.shape)
        return jnp.moveaxis(value, n + self.structure.plate_dim, 0)

    def _to_site(self, value: Array, info: SiteInfo) -> Array:
        if not info.local:
            return value
        if self.structure.plate_dim is None:
            return value[0]
        return jnp.moveaxis(value, 0, self.structure.nesting + self.structure.plate_dim)

    def evaluate(
        self, params: Params, batch: Call, key: Array, plan: Plan, values: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Values and densities of every site of one run, without gradients; `values` as `draws` takes them."""

        def run(
            params: Params, batch: Call, key: Array, values: Mapping[str, Array]
        ) -> dict[str, dict[str, Any]]:
            return rows_of(self.draws(params, batch, key, plan, values=values).sites)

        return self.compiled(run, params, batch, key, _static(plan), values or {})

    def log_w(
        self, params: Params, batch: Call, key: Array, plan: Plan, values: Mapping[str, Any] | None = None
    ) -> Array:
        """Log weights `[M, K, B]` of one run, without gradients; nothing else is kept."""

        def run(params: Params, batch: Call, key: Array, values: Mapping[str, Array]) -> Array:
            return self.draws(params, batch, key, plan, values=values).log_w

        return self.compiled(run, params, batch, key, _static(plan), values or {})

    def peak(self, params: Params, batch: Call, plan: Plan) -> int | None:
        """Bytes that `evaluate` takes at most, as far as shapes tell; nothing is run."""

        def run(params: Params, args: Any, kwargs: Any, key: Array) -> dict[str, dict[str, Any]]:
            return rows_of(self.draws(params, Call(args, kwargs), key, plan).sites)

        with precision(self.dtype):
            return _jax_memory.peak(run, dict(params), batch.args, dict(batch.kwargs), jax.random.key(0))

    def simulate(
        self,
        params: Params,
        batch: Call,
        key: Array,
        draws: int,
        how: Forward,
        given: Mapping[str, Any] | None = None,
        fixed: Mapping[str, Any] | None = None,
        masks: Mapping[str, Any] | None = None,
    ) -> dict[str, dict[str, Array]]:
        """The program run forward `draws` times: "value", "mean", "log_p" and "log_q" of its sites.

        Values are `[draws, B, ...]`, or `[draws, ...]` for global sites; densities `[draws, B]` or `[draws]`. `given`
        has the draws axis and stands for draws of the guide (of the model where the guide is not run). `fixed` is the
        same for all draws, and only the model sees it; data of that name are replaced too. Elements of an observed
        site outside its mask `[B, ...]` have no density and are drawn anew.
        """
        return _numpyro_forward.simulate(
            self, params, batch, key, draws, how, given or {}, fixed or {}, masks or {}
        )

    def outside(self, params: Params, batch: Call, fixed: Mapping[str, Any]) -> list[str]:
        """Sites whose fixed values are outside the support of their distribution in the model."""
        return _numpyro_forward.outside(self, params, batch, fixed)

    def distributions(
        self, params: Params, batch: Call, values: Mapping[str, Any]
    ) -> dict[tuple[str, str], list[Any]]:
        """See `base.Bound`."""
        return _numpyro_forward.distributions(self, params, batch, values)

    def anatomy(self, batch: Call) -> Anatomy:
        """What the sites look like and look at."""
        with first_run(self.program, batch):
            return _numpyro_forward.anatomy(self, batch)

    def compiled(
        self,
        run: Callable[[Params, Call, Array, Any], Any],
        params: Params,
        batch: Call,
        key: Array,
        static: Hashable,
        values: Any,
    ) -> Any:
        """`run(params, batch, key, values)`, compiled once for all fits of the program at these shapes."""

        def flat(params: Params, args: Any, kwargs: Any, key: Array, values: Any) -> Any:
            EVALUATIONS.traces += 1
            return run(params, Call(args, kwargs), key, values)

        shapes = tuple((a.shape, str(a.dtype)) for a in batch.leaves)
        names = (len(batch.args), tuple(batch.kwargs))
        leaves, tree = jax.tree.flatten(values)
        given = (tree, tuple((np.shape(v), str(v.dtype)) for v in leaves))
        fixed = (static, self.program, self.dtype, self.asked_plate, self.constants)
        what = (run.__qualname__, *fixed, shapes, names, given)
        with precision(self.dtype):
            step = EVALUATIONS.get(what, lambda: jax.jit(without_waiting(flat)))
            return step(dict(params), batch.args, dict(batch.kwargs), key, values)

    # Gradients.

    def gradients(
        self,
        params: Params,
        batch: Call,
        key: Array,
        plan: Plan,
        objective: Objective,
        *,
        total_rows: Any = None,
        values: Mapping[str, Array] | None = None,
        outer_weight: Array | None = None,
        states: Mapping[str, Array] | None = None,
        own: Mapping[str, Mapping[str, Array]] | None = None,
        mutable: Mapping[str, Any] | None = None,
    ) -> Gradients:
        """The loss and the gradient that each group of parameters gets from it."""
        held = mutable or {}
        own = {n: dict(v) for n, v in (own or {}).items()}

        varied = of_least_variance(plan, own)

        def evaluate(params: Params, own: Any) -> tuple[dict[str, Array], tuple[Any, ...]]:
            draws, left = self._run(
                {**params, **held},
                batch,
                key,
                plan,
                training=True,
                total_rows=total_rows,
                values=values,
                outer_weight=outer_weight,
                states=states,
                own=own,
            )
            model, guide, extra, states_ = losses(draws, objective, plan)
            parts = {"model": model}
            if guide is not None:
                parts["guide"] = guide
            if extra is not None:
                parts["extra"] = extra
            return parts, (model, states_, left, draws.N)

        def pulled(f: Callable[..., Any], *given: Any) -> tuple[dict[str, Any], Any, tuple[Any, ...]]:
            """The gradients of params and own, each loss's to its own group alone, however it was computed."""
            parts, pull, rest = jax.vjp(f, dict(params), *given, has_aux=True)

            def towards(name: str) -> tuple[Any, ...]:
                return pull({n: jnp.ones_like(p) if n == name else jnp.zeros_like(p) for n, p in parts.items()})

            own_gradient = towards("extra")[1] if own else {}
            gradient = towards("model")[0]
            if "guide" in parts:
                from_guide = towards("guide")[0]
                gradient = {
                    n: from_model if "model" in self.structure.groups[n] else from_guide[n]
                    for n, from_model in gradient.items()
                }
            return gradient, own_gradient, rest

        if not varied:
            gradient, own_gradient, (loss, states_, left, _) = pulled(evaluate, own)
            return Gradients(loss, gradient, own_gradient, states_, left)

        def once(params: Params, own: Any, zero: Array) -> tuple[dict[str, Array], tuple[Any, ...]]:
            with stopped_once(zero):
                return evaluate(params, own)

        def square(own: Any) -> tuple[Array, tuple[Any, ...]]:
            found = pulled(once, own, jnp.zeros(()))
            gradient, _, (*_, N) = found
            of_guide = [g for n, g in gradient.items() if "model" not in self.structure.groups[n]]
            squares = [jnp.sum((leaf / N) ** 2) for leaf in jax.tree.leaves(of_guide)]
            return sum(squares, jnp.zeros(())), found

        by_variance, (gradient, own_gradient, (loss, states_, left, _)) = jax.grad(square, has_aux=True)(own)
        own_gradient = {**own_gradient, **{s: by_variance[s] for s in varied}}
        return Gradients(loss, gradient, own_gradient, states_, left)


def _in_pieces(inner: Callable[..., Any], size: int) -> Callable[..., Any]:
    """The same table from `size` entries of the draws axis at a time, computed anew for the gradient."""

    def run(
        m: Array, k: Array, outer_key: Array, draw_key: Array, outer: dict[str, Array], local: dict[str, Array]
    ) -> dict[str, Any]:
        def cut(a: Array) -> Array:
            return a.reshape(len(a) // size, size, *a.shape[1:])

        def piece(part: tuple[Array, Array, dict[str, Array]]) -> dict[str, Any]:
            k, draw_key, local = part
            return inner(m, k, outer_key, draw_key, outer, local)

        table = jax.lax.map(jax.checkpoint(piece), jax.tree.map(cut, (k, draw_key, local)))
        first = jax.tree.map(lambda a: a[0], table.pop("outer"))
        # The value of a factor has no entries, from which no axis could be inferred.
        return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), table) | {"outer": first}

    return run


def _static(plan: Plan) -> Hashable:
    fixed = plan.K, plan.M, plan.requests, plan.kl, plan.chunk, plan.marginal, plan.nested, plan.resampling
    return *fixed, tuple(plan.estimators.items())
