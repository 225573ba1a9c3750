"""NumPyro: one run of a program as a table of arrays, under two `vmap`s (outer draws, draws)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.ops.provenance import eval_provenance

from ppl_lvm.algorithm import Objective, Variant
from ppl_lvm.backends._jax_dists import (
    GuideSite,
    draw,
    finite_support,
    has_kl,
    kl,
    site_log_prob,
)
from ppl_lvm.backends._numpyro_handlers import (
    Handler,
    Message,
    Namespace,
    Params,
    owned,
    precision,
    prior_of,
    site_key,
)
from ppl_lvm.backends.base import (
    Call,
    Gradients,
    Plan,
    Role,
    SiteInfo,
    Steps,
    Structure,
    as_float,
    check_scale,
    check_sites,
    example_kinds,
    find_data_plate,
    is_factor,
    is_point,
    losses,
)
from ppl_lvm.draws import Draws, Plate, Site

if TYPE_CHECKING:
    from ppl_lvm.program import Program

Array = jax.Array

EVALUATIONS = Steps(64)
"""Compiled runs without gradients, each with the bound that it was traced from."""


class NumPyroBound:
    """A program on a batch: structure, initial parameters, and runs (see `backends.base.Bound`)."""

    name = "numpyro"

    def __init__(
        self, program: Program, example: Call, *, seed: int, dtype: str, data_plate: str | None = None
    ) -> None:
        self.program, self.dtype, self.asked_plate = program, dtype, data_plate
        self._model: Callable[..., Any] = program.model
        self._kinds = example_kinds(program)
        guide = program.guide
        with precision(dtype):
            if program.portable:
                ppl = Namespace(seed, dtype)
                self._model = partial(program.model, ppl)
                guide = None if guide is None else partial(guide, ppl)
            self._guide: Callable[..., Any] = prior_of(self._model) if guide is None else guide
            self._probe(self.batch(example), jax.random.key(seed), data_plate)

    def batch(self, call: Call) -> Call:
        """Arrays of this fit's dtype."""

        def convert(name: str, a: Any) -> Array:
            a = np.asarray(a) if not isinstance(a, jax.Array) else a
            return owned(a, self.dtype if as_float(self._kinds, name, a.dtype.kind) else None)

        with precision(self.dtype):
            return call.map_named(self.program.arguments, convert)

    def in_support(self, site: str, value: np.ndarray) -> bool:
        """Whether data of the probe's shape are values of an observed site."""
        with precision(self.dtype):
            return bool(jnp.all(self._supports[site](jnp.asarray(value))))

    # Structure and parameters, from probe runs on one draw.

    def _trace(self, program: Callable[..., Any], handler: Handler, batch: Call) -> dict[str, Message]:
        with handler, handlers.trace() as trace:
            program(*batch.args, **batch.kwargs)
        return trace

    def _probe(self, batch: Call, key: Array, asked: str | None) -> None:
        def prior(msg: Message) -> Array:
            return draw(msg["fn"], site_key(key, msg["name"]), self.program.portable)

        guide_handler = Handler({}, key, prior)
        guide = self._trace(self._guide, guide_handler, batch)
        values = {n: s["value"] for n, s in guide.items() if s["type"] == "sample"}
        plates = {n: s["value"] for n, s in guide.items() if s["type"] == "plate"}

        def replayed(msg: Message) -> Array:
            return values[msg["name"]] if msg["name"] in values else prior(msg)

        model_handler = Handler(
            {n: v for n, (v, _) in guide_handler.found.items()}, key, replayed, subsamples=plates
        )
        model = self._trace(self._model, model_handler, batch)
        self._supports = {n: s["fn"].support for n, s in model.items() if s["type"] == "sample" and s["is_observed"]}
        found = {**model_handler.found, **guide_handler.found}
        self._transforms = {n: biject_to(c) for n, (_, c) in found.items()}
        self.initial = {n: self._unconstrain(n, v) for n, (v, _) in found.items()}
        self.structure = self._structure(guide, model, asked, batch)
        used = {"model": model_handler.found, "guide": guide_handler.found}
        groups = {n: frozenset(g for g, names in used.items() if n in names) for n in found}
        self.structure = replace(
            self._with_parents(batch, {n: values[n] for n in values}, key), groups=groups
        )

    def _structure(
        self, guide: dict[str, Message], model: dict[str, Message], asked: str | None, batch: Call
    ) -> Structure:
        guide_sites = {n: s for n, s in guide.items() if s["type"] == "sample"}
        model_sites = {n: s for n, s in model.items() if s["type"] == "sample"}
        observed = {n: s for n, s in model_sites.items() if s["is_observed"]}
        auxiliary = [
            n
            for n, s in guide_sites.items()
            if n not in model_sites and (s["infer"].get("is_auxiliary") or s["is_observed"])
        ]
        in_guide, in_model = ({n: bool(s["is_observed"]) for n, s in t.items()} for t in (guide_sites, model_sites))
        check_sites(in_guide, in_model, auxiliary)
        sizes = {n: s["args"] for t in (guide, model) for n, s in t.items() if s["type"] == "plate"}
        every = [*guide_sites.values(), *model_sites.values()]
        # A batch dimension without a plate counts too: rows and draws must not meet it.
        ranks = [len(jax.eval_shape(partial(site_log_prob, s)).shape) for s in every]
        nesting = max([*ranks, *(-f.dim for s in every for f in s["cond_indep_stack"])], default=0)
        data = {n: s for n, s in observed.items() if not is_factor(s["fn"])} or observed
        data_plate = find_data_plate(
            {n: [(f.name, f.dim) for f in s["cond_indep_stack"]] for n, s in data.items()},
            asked,
            list(sizes),
        )
        frames = {f.name: f for s in every for f in s["cond_indep_stack"]}
        dims = {n: f.dim for n, f in frames.items()}

        def plates(site: Message) -> tuple[Plate, ...]:
            stack = sorted(site["cond_indep_stack"], key=lambda f: f.dim)
            return tuple(Plate(f.name, sizes[f.name][0], f.size) for f in stack)

        def local(site: Message) -> bool:
            return data_plate is None or any(f.name == data_plate for f in site["cond_indep_stack"])

        infos: dict[str, SiteInfo] = {}
        for name, site in {**guide_sites, **observed}.items():
            role: Role = "observed" if name in observed and name not in guide_sites else "latent"
            if name in auxiliary:
                role = "auxiliary"
            of_model = model_sites.get(name, site)
            scales = [np.asarray(self._user_scale(s, data_plate, sizes)) for s in (site, of_model)]
            for scale in scales:
                check_scale(name, scale.shape, dims.get(data_plate) if local(site) else None)
            infos[name] = SiteInfo(
                name=name,
                role=role,
                local=local(site),
                reparameterised=bool(site["fn"].has_rsample),
                support=finite_support(site["fn"]) if role != "observed" and not site["is_observed"] else None,
                plates=plates(site),
                local_in_model=local(of_model),
                closed_kl=role == "latent"
                and np.array_equal(scales[0], scales[1])
                and has_kl(site["fn"], of_model["fn"]),
                user_scaled=any(np.abs(scale - 1.0).max() > 1e-9 for scale in scales),
                fixed=site["is_observed"] and role == "auxiliary",
                point=is_point(site["fn"]),
            )
        frame = frames.get(data_plate) if data_plate else None
        size = sizes[frame.name][0] if frame is not None else None
        return Structure(
            sites=infos,
            data_plate=data_plate,
            plate_size=size if frame is not None and size != frame.size else None,
            rows=frame.size if frame is not None else 1,
            nesting=nesting,
            plate_dim=frame.dim if frame is not None else None,
            groups={},
        )

    def _user_scale(self, site: Message, data_plate: str | None, sizes: Mapping[str, tuple[int, Any]]) -> Any:
        scale = 1.0 if site["scale"] is None else site["scale"]
        for frame in site["cond_indep_stack"]:
            if frame.name == data_plate:
                scale = scale / (sizes[frame.name][0] / frame.size)
        return scale

    def _with_parents(self, batch: Call, values: dict[str, Array], key: Array) -> Structure:
        """Which sites each density looks at, from the dependencies of the traced computation."""
        params = self.constrain(self.initial)

        def densities(**given: Array) -> dict[str, dict[str, Array]]:
            guide = self._trace(self._guide, Handler(params, key, lambda m: given[m["name"]]), batch)
            plates = {n: s["value"] for n, s in guide.items() if s["type"] == "plate"}
            model = self._trace(
                self._model, Handler(params, key, lambda m: given[m["name"]], plates), batch
            )
            return {
                side: {n: site_log_prob(s) for n, s in trace.items() if s["type"] == "sample"}
                for side, trace in (("guide", guide), ("model", model))
            }

        parents = eval_provenance(densities, **values)
        sites = {
            name: replace(
                info,
                guide_parents=frozenset(parents["guide"].get(name, ())) - {name},
                model_parents=frozenset(parents["model"].get(name, ())) - {name},
            )
            for name, info in self.structure.sites.items()
        }
        return replace(self.structure, sites=sites)

    def _unconstrain(self, name: str, value: Any) -> Any:
        def leaf(v: Any) -> Array:
            v = jnp.asarray(v)
            return v.astype(self.dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v

        value = jax.tree.map(leaf, value)
        return value if is_tree(value) else self._transforms[name]._inverse(value)

    def constrain(self, params: Params) -> dict[str, Any]:
        """Constrained values of unconstrained parameters."""
        with precision(self.dtype):
            return {n: v if is_tree(v) else self._transforms[n](v) for n, v in params.items()}

    # One run.

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
        """The table of one run on `batch`; `values` are laid out as in the table, `[M, K, B, ...]` and `[M, ...]`."""
        structure = self.structure
        constrained = self.constrain(params)
        stopped = jax.lax.stop_gradient(constrained) if plan.frozen else None
        v_local, local_layout = plan.layout(structure, True)
        v_outer, outer_layout = plan.layout(structure, False)
        given = values or {}
        given_local = {n: v for n, v in given.items() if structure.sites[n].local}
        given_outer = {n: v for n, v in given.items() if not structure.sites[n].local}

        def run(m: Array, k: Array, outer: dict[str, Array], local: dict[str, Array]) -> dict[str, Any]:
            outer_key = jax.random.fold_in(key, m // v_outer)
            draw_key = jax.random.fold_in(outer_key, 1 + k // v_local)
            injected = {**outer, **local}
            variants: dict[str, Variant] = {}

            def latent(msg: Message) -> Array:
                info = structure.sites[msg["name"]]
                layout, t, own_key = (
                    (local_layout, k, draw_key) if info.local else (outer_layout, m, outer_key)
                )
                site = GuideSite(
                    msg["fn"],
                    site_key(own_key, info.name),
                    self._to_site(injected.get(info.name), info),
                    info.support,
                    self.program.portable,
                )
                estimator = plan.estimators[info.name]
                count, stride = layout[info.name]
                if count == 1:
                    return estimator.sample(site)
                variant = estimator.variants(site, t // stride % count)
                variants[info.name] = variant
                return variant.value

            guide = self._trace(self._guide, Handler(constrained, key, latent), batch)
            plates = {n: s["value"] for n, s in guide.items() if s["type"] == "plate"}
            drawn = {n: s["value"] for n, s in guide.items() if s["type"] == "sample"}

            def replayed(msg: Message) -> Array:
                return drawn[msg["name"]]

            model = self._trace(self._model, Handler(constrained, key, replayed, plates), batch)
            frozen: dict[str, Message] = {}
            if stopped is not None:
                frozen = self._trace(self._guide, Handler(stopped, key, replayed, plates), batch)
            sizes = {n: s["args"] for t in (guide, model) for n, s in t.items() if s["type"] == "plate"}
            table: dict[str, dict[str, Any]] = {"local": {}, "outer": {}}
            for info in structure.sites.values():
                row = self._row(info, guide, model, frozen, plan, variants.get(info.name), sizes)
                table["local" if info.local else "outer"][info.name] = row
            return table

        K, M = plan.K * v_local, plan.M * v_outer
        axes = {"local": 0, "outer": None}
        inner = jax.vmap(run, in_axes=(None, 0, None, 0), out_axes=axes)
        table = jax.vmap(inner, in_axes=(0, None, 0, 0))(
            jnp.arange(M), jnp.arange(K), given_outer, given_local
        )
        sites = {
            info.name: self._site(
                info, table["local" if info.local else "outer"][info.name], plan, local_layout | outer_layout
            )
            for info in structure.sites.values()
        }
        rows = structure.rows
        N = structure.plate_size or (rows if total_rows is None else total_rows)
        return Draws(
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
        )

    def _row(
        self,
        info: SiteInfo,
        guide: dict[str, Message],
        model: dict[str, Message],
        frozen: dict[str, Message],
        plan: Plan,
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
            if message is not None:
                row[label + "_full"] = self._full(site_log_prob(message), info)
                row[label] = self._rows(row[label + "_full"], info)
        if name in frozen and name in plan.estimators and plan.estimators[name].frozen:
            row["log_q_frozen"] = self._rows(self._full(site_log_prob(frozen[name]), info), info)
        if variant is not None:
            for label in ("weight", "credit", "through"):
                value = getattr(variant, label)
                if value is not None:
                    value = jnp.broadcast_to(value, site["fn"].batch_shape)
                    row[label] = self._only(self._full(value, info), info)
        if "kl" in plan.requests and in_guide is not None and in_model is not None:
            row["kl"] = self._rows(self._full(kl(in_guide["fn"], in_model["fn"]), info), info)
        if info.user_scaled:
            for label, message in (("user_scale", in_model), ("guide_scale", in_guide)):
                if message is not None:
                    row[label] = self._scale(self._user_scale(message, self.structure.data_plate, sizes), info)
        return row

    def _site(
        self, info: SiteInfo, row: dict[str, Any], plan: Plan, layout: Mapping[str, tuple[int, int]]
    ) -> Site:
        extra = {"kl": row["kl"]} if "kl" in row else {}
        optional = ("log_q_frozen", "weight", "credit", "through", "log_p_full", "log_q_full")
        return Site(
            name=info.name,
            role=info.role,
            local=info.local,
            value=row["value"],
            log_p=row.get("log_p"),
            log_q=row.get("log_q"),
            estimator=plan.estimators.get(info.name),
            plates=info.plates,
            downstream=self.structure.downstream(info.name),
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
        if not info.local or self.structure.plate_dim is None:
            return x
        x = jnp.reshape(x, (1,) * (n - x.ndim) + x.shape)
        axis = n + self.structure.plate_dim
        x = jnp.moveaxis(x, axis, 0)
        return jnp.broadcast_to(x, (self.structure.rows, *x.shape[1:]))

    def _rows(self, full: Array, info: SiteInfo) -> Array:
        """Summed over every plate but the data plate: `[B]`, or a scalar for a global site."""
        if info.local and self.structure.plate_dim is None:
            return full.sum()[None]
        return full.reshape(full.shape[0], -1).sum(1) if info.local else full.sum()

    def _scale(self, scale: Any, info: SiteInfo) -> Array:
        """A scale as `[B]` or `[1]` (local), or as a number (global)."""
        scale = jnp.asarray(scale)
        if not info.local:
            return scale.reshape(())
        return (self._full(scale, info) if scale.ndim else scale).reshape(-1)

    def _only(self, full: Array, info: SiteInfo) -> Array:
        """Coefficients of variants: one number a row, as a site with variants is one draw a row."""
        if info.local and self.structure.plate_dim is not None:
            return full.reshape(full.shape[0])
        return full.reshape((1,) if info.local else ())

    def _from_site(self, value: Array, event_dim: int, info: SiteInfo) -> Array:
        if not info.local or self.structure.plate_dim is None:
            return value[None] if info.local else value
        n, batch = self.structure.nesting, value.ndim - event_dim
        value = value.reshape((1,) * (n - batch) + value.shape)
        return jnp.moveaxis(value, n + self.structure.plate_dim, 0)

    def _to_site(self, value: Array | None, info: SiteInfo) -> Array | None:
        if value is None or not info.local:
            return value
        if self.structure.plate_dim is None:
            return value[0]
        return jnp.moveaxis(value, 0, self.structure.nesting + self.structure.plate_dim)

    def evaluate(self, params: Params, batch: Call, key: Array, plan: Plan) -> dict[str, dict[str, Any]]:
        """Values and densities of every site of one run, without gradients."""

        def run(params: Params, batch: Call, key: Array) -> dict[str, dict[str, Any]]:
            sites = self.draws(params, batch, key, plan).sites
            return {n: {"value": s.value, "log_p": s.log_p, "log_q": s.log_q} for n, s in sites.items()}

        return self._compiled(run, params, batch, key, _static(plan))

    def log_w(self, params: Params, batch: Call, key: Array, plan: Plan) -> Array:
        """Log weights `[M, K, B]` of one run, without gradients; nothing else is kept."""

        def run(params: Params, batch: Call, key: Array) -> Array:
            return self.draws(params, batch, key, plan).log_w

        return self._compiled(run, params, batch, key, _static(plan))

    def simulate(
        self, params: Params, batch: Call, key: Array, draws: int, *, prior: bool = False
    ) -> dict[str, Array]:
        """Values `[draws, ...]` of every site of the model with its observed sites drawn anew.

        Latent sites are drawn from the guide, or from the model where `prior` says so.
        """

        def run(params: Params, batch: Call, key: Array) -> dict[str, Array]:
            one = partial(self._simulate, self.constrain(params), batch, prior)
            return jax.vmap(one)(jax.random.split(key, draws))

        return self._compiled(run, params, batch, key, (draws, prior))

    def _simulate(self, constrained: Params, batch: Call, prior: bool, key: Array) -> dict[str, Array]:
        def anew(msg: Message) -> Array:
            return draw(msg["fn"], site_key(key, msg["name"]), self.program.portable)

        guide: dict[str, Message] = {}
        if not prior:
            guide = self._trace(self._guide, Handler(constrained, key, anew), batch)

        def latent(msg: Message) -> Array:
            return guide[msg["name"]]["value"] if msg["name"] in guide else anew(msg)

        plates = {n: s["value"] for n, s in guide.items() if s["type"] == "plate"}
        model = self._trace(self._model, Handler(constrained, key, latent, plates, anew), batch)
        return {n: s["value"] for n, s in model.items() if s["type"] == "sample"}

    def _compiled(
        self, run: Callable[[Params, Call, Array], Any], params: Params, batch: Call, key: Array, static: Hashable
    ) -> Any:
        """`run(params, batch, key)`, compiled once for all fits of the program at this shape."""

        def flat(params: Params, args: Any, kwargs: Any, key: Array) -> Any:
            EVALUATIONS.traces += 1
            return run(params, Call(args, kwargs), key)

        shapes = tuple((a.shape, str(a.dtype)) for a in batch.leaves)
        names = (len(batch.args), tuple(batch.kwargs))
        what = (run.__qualname__, static, self.program, self.dtype, self.asked_plate, shapes, names)
        with precision(self.dtype):
            return EVALUATIONS.get(what, lambda: jax.jit(flat))(dict(params), batch.args, dict(batch.kwargs), key)

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
    ) -> Gradients:
        """The loss and the gradient that each group of parameters gets from it."""
        own = {n: dict(v) for n, v in (own or {}).items()}

        def evaluate(params: Params, own: Any) -> tuple[dict[str, Array], tuple[Array, dict[str, Array]]]:
            draws = self.draws(
                params,
                batch,
                key,
                plan,
                total_rows=total_rows,
                values=values,
                outer_weight=outer_weight,
                states=states,
                own=own,
            )
            draws = replace(draws, allowed=objective.verbs)
            model, guide, extra, states_ = losses(draws, objective, plan)
            parts = {"model": model}
            if guide is not None:
                parts["guide"] = guide
            if extra is not None:
                parts["extra"] = extra
            return parts, (model, states_)

        parts, pull, (loss, states_) = jax.vjp(evaluate, dict(params), own, has_aux=True)

        def towards(*names: str) -> tuple[dict[str, Any], Any]:
            return pull({n: jnp.ones_like(p) if n in names else jnp.zeros_like(p) for n, p in parts.items()})

        if "guide" not in parts:
            gradient, own_gradient = towards("model", "extra")
        else:
            from_model, _ = towards("model")
            from_guide, own_gradient = towards("guide", "extra")
            gradient = {
                n: from_model[n] if "model" in self.structure.groups[n] else from_guide[n] for n in params
            }
        return Gradients(loss, gradient, own_gradient, states_)


def _static(plan: Plan) -> Hashable:
    return plan.K, plan.M, plan.requests, tuple(plan.estimators.items())


def is_tree(value: Any) -> bool:
    return not jax.tree_util.all_leaves([value])


