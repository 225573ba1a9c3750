"""NumPyro: what a program is, found by running it once on one batch: structure, parameters, constraints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.transforms import biject_to
from numpyro.infer.autoguide import AutoGuide

from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.backends import _jax_memory
from ppl_lvm.backends._jax_dists import (
    classes,
    draw,
    elementwise,
    finite_support,
    has_kl,
    is_whole,
    most,
    reparameterised,
    site_log_prob,
    weights,
)
from ppl_lvm.backends._jax_missing import JaxMissing, feasible
from ppl_lvm.backends._jax_provenance import provenance
from ppl_lvm.backends._numpyro_guides import constants, own_guide, prototype_supports
from ppl_lvm.backends._numpyro_handlers import (
    Handler,
    Message,
    Namespace,
    Params,
    message_key,
    of_step,
    owned,
    plates_of,
    precision,
    prior_of,
)
from ppl_lvm.backends._numpyro_state import changed, evaluation, is_key
from ppl_lvm.backends.base import (
    PRIOR_DRAWS,
    Call,
    as_float,
    check_range,
    check_value,
    example_kinds,
    find_data_plate,
    first_run,
    given_rows,
    inner_axis,
    row_params,
    starting_numbers,
    written,
)
from ppl_lvm.backends.natural import Enough
from ppl_lvm.backends.sites import (
    CHECK_DATA,
    Chain,
    check_scale,
    check_sites,
    density,
    is_chain_of_classes,
    is_factor,
    is_point,
    latent_site,
    steps_of,
    undeclared,
)
from ppl_lvm.backends.structure import (
    Role,
    SiteInfo,
    Structure,
    class_facts,
)
from ppl_lvm.backends.training import Steps
from ppl_lvm.draws import Plate
from ppl_lvm.errors import DataError, ProgramError
from ppl_lvm.latents import Latent, PlateOf

if TYPE_CHECKING:
    from ppl_lvm.program import Program

Array = jax.Array

EVALUATIONS = Steps(64)
"""Compiled runs without gradients, each with the bound that it was traced from."""


class NumPyroProgram:
    """A program on a batch: structure, initial parameters, and how it is run under a handler."""

    name = "numpyro"

    def __init__(
        self,
        program: Program,
        example: Call,
        *,
        seed: int,
        dtype: str,
        data_plate: str | None = None,
        total: int | None = None,
    ) -> None:
        _jax_memory.COMPILED.let_go()
        self.program, self.dtype, self.asked_plate = program, dtype, data_plate
        size = len(example.leaves[0]) if example.leaves and np.ndim(example.leaves[0]) else None
        self.total = size if total is None else total
        self._kinds = example_kinds(program)
        guide = program.guide
        asked = program.takes_rows
        family = guide if isinstance(guide, GuideFamily) else None
        self._missing = JaxMissing(program)
        self.joint_dims = self._missing.joint_dims
        with precision(dtype):
            key, batch = jax.random.key(seed), self.batch(example)
            ppl = Namespace(seed, dtype, self.total) if program.portable or family is not None else None
            self._ppl = ppl
            if ppl is not None and size is not None:
                batch = self.batch(example.with_rows(size))
            self._model = given_rows(partial(program.model, ppl) if program.portable else program.model, ppl, asked)
            self._guide: Callable[..., Any] = prior_of(self._model)
            with first_run(program, batch):
                if family is not None:
                    latents = self._latents(batch, key, data_plate)
                    self._guide = given_rows(written(family, ppl, latents, program.arguments), ppl)
                elif guide is not None and program.portable:
                    self._guide = given_rows(partial(guide, ppl), ppl)
                elif guide is not None:
                    self._guide = given_rows(self._own(guide), None, asked)
                self._probe(batch, key, data_plate)
        self.row_params = row_params(program, ppl, self.initial, self.total)

    def on(self, example: Call) -> Self:
        """The same program on data of another shape."""
        return type(self)(
            self.program, example, seed=0, dtype=self.dtype, data_plate=self.asked_plate, total=self.total
        )

    def _own(self, guide: Callable[..., Any]) -> Callable[..., Any]:
        return own_guide(guide)

    def batch(self, call: Call) -> Call:
        """Arrays of this fit's dtype."""
        with precision(self.dtype):
            return call.map_named(self.program.arguments, self._placed)

    def _placed(self, name: str, a: Any) -> Array:
        """What an argument holds, as a step is given it."""
        a = np.asarray(a) if not isinstance(a, jax.Array) else a
        dtype = self.dtype if as_float(self._kinds, name, a.dtype.kind) else None
        # Without 64 bits, JAX cuts longer integers off in silence.
        if isinstance(a, np.ndarray) and (dtype is not None or self.dtype == "float32"):
            check_range(name, a, dtype)
        return owned(a, dtype)

    def in_support(self, site: str, value: np.ndarray, known: np.ndarray | None = None) -> bool:
        """Whether data of the probe's shape are values of a site that has data, where they are known."""
        with precision(self.dtype):
            support, given = self._supports[site], self._placed(self.program.argument_of(site), value)
            if known is not None:
                given = jnp.where(known, given, feasible(support, given))
            return bool(jnp.all(support(given)))

    def needs(self, site: str) -> str:
        """What a site with data asks of them, for an error."""
        return getattr(self._supports[site], "needs", CHECK_DATA)

    # Structure and parameters, from probe runs on one draw.

    def _trace(self, program: Callable[..., Any], handler: Handler, batch: Call) -> dict[str, Message]:
        handler.missing = self._missing.run(batch, guide=program is self._guide)
        if self._ppl is not None:
            self._ppl.handler = handler
        with handler:
            program(*batch.own.args, **batch.own.kwargs)
        for scan in handler.scans:
            for name, plate in scan.plates.items():
                handler.trace.setdefault(name, plate)
        return handler.trace

    def _probe(self, batch: Call, key: Array, asked: str | None) -> None:
        def prior(msg: Message) -> Array:
            return draw(msg["fn"], message_key(key, msg), self.program.portable)

        guide_handler = Handler({}, key, prior, cast=self._cast, unrolled=True)
        guide = self._traced(self._guide, guide_handler, batch)
        values = {n: s["value"] for n, s in guide.items() if s["type"] == "sample"}
        plates = plates_of(guide)

        def replayed(msg: Message) -> Array:
            return of_step(values[msg["name"]], msg) if msg["name"] in values else prior(msg)

        known = {n: v for n, (v, _) in guide_handler.found.items()} | guide_handler.states
        model_handler = Handler(
            known, key, replayed, plates, side="model", scanned=values, cast=self._cast, unrolled=True
        )
        model = self._traced(self._model, model_handler, batch)
        of_model = {n: s for n, s in model.items() if s["type"] == "sample" and not s["is_observed"]}
        values |= {n: s["value"] for n, s in of_model.items() if n not in values}
        self._supports = {
            n: s["fn"].support
            for n, s in model.items()
            if s["type"] == "sample" and (s["is_observed"] or self._missing.fills(n))
        }
        found = {**model_handler.found, **guide_handler.found}
        self._constraints = {n: c for n, (_, c) in found.items()}
        self._transforms = {n: biject_to(c) for n, c in self._constraints.items()}
        first = {**model_handler.initial_states, **guide_handler.initial_states}
        self.states = {n: self._cast(v) for n, v in first.items()}
        self.initial = {n: self._unconstrain(n, v) for n, (v, _) in found.items()}
        self._scans = [scan.latent for scan in guide_handler.scans]
        self.constants = constants([self._transforms, self._supports, prototype_supports(self._guide)])
        scanned = [scan.latent for scan in (*guide_handler.scans, *model_handler.scans)]
        structure = self._structure(guide, model, asked, scanned)
        self._check_scans(structure, guide, model)
        used = {"model": model_handler.found, "guide": guide_handler.found}
        groups = {n: frozenset(g for g, names in used.items() if n in names) for n in found}
        self.structure = structure
        self.structure = replace(self._with_parents(batch, values, key), groups=groups)
        around_each = {**model_handler.plates_of, **guide_handler.plates_of}
        self._plated = sorted(n for n, around in around_each.items() if structure.data_plate in around)
        self._restless = self._unfrozen(batch, values, plates, key) if self.states else []

    def _traced(self, program: Callable[..., Any], handler: Handler, batch: Call) -> dict[str, Message]:
        """A first run, with a word on what cannot be found out later."""
        try:
            trace = self._trace(program, handler, batch)
        except KeyError as error:
            if isinstance(program, AutoGuide):
                raise ProgramError(
                    f"Autoguide {type(program).__name__} cannot be set up: {error} is a plate that the model opens "
                    f"only inside a scan, which NumPyro's autoguides do not know; open it once outside, or write "
                    f"a guide."
                ) from error
            raise
        inside = [n for n, s in trace.items() if s["type"] == "sample" and isinstance(s["value"], jax.core.Tracer)]
        if inside:
            raise ProgramError(
                f"Site {inside[0]!r} is sampled inside a loop or transformation of JAX (lax.scan, while_loop, cond, "
                f"vmap), which does not hand it out; use numpyro.contrib.control_flow.scan, or a Python loop."
            )
        return trace

    def _check_scans(self, structure: Structure, guide: dict[str, Message], model: dict[str, Message]) -> None:
        for names in self._scans:
            levels = {structure.sites[n].local for n in names}
            if len(levels) > 1:
                raise ProgramError(
                    f"Sites {list(names)} of one scan in the guide are partly inside data plate "
                    f"{structure.data_plate!r} and partly outside, and share their noise; put them into two scans."
                )
        for name in structure.sites:
            if name in guide and name in model:
                shapes = [t[name]["value"].shape for t in (guide, model)]
                if shapes[0] != shapes[1]:
                    raise ProgramError(
                        f"Site {name!r} has a value of shape {shapes[0]} in the guide and {shapes[1]} in the model."
                    )

    def _unfrozen(self, batch: Call, values: dict[str, Array], plates: dict[str, Array], key: Array) -> list[str]:
        """States that change in evaluation too."""
        params = {**self.constrain(self.initial), **self.states}
        left: dict[str, Any] = {}
        with evaluation():
            for program, side in ((self._guide, "guide"), (self._model, "model")):
                handler = Handler(
                    {**params, **left},
                    key,
                    lambda m: of_step(values[m["name"]], m),
                    plates,
                    side=side,
                    still=True,
                    scanned=values,
                    unrolled=True,
                )
                self._trace(program, handler, batch)
                left |= handler.states
        return changed(self.states, left)

    def batch_parameters(self, call: Call) -> list[str]:
        """Parameters that hold values of the batch's own rows: those whose shape follows the number of rows.

        `call` has another number of rows than this batch.
        """

        def shapes(args: Any, kwargs: Any) -> dict[str, Any]:
            found: dict[str, Any] = {}
            key = jax.random.key(0)
            plates: dict[str, Array] = {}
            for program in (self._guide, self._model):
                handler = Handler({}, key, lambda m: m["fn"].sample(message_key(key, m)), plates, unrolled=True)
                trace = self._trace(program, handler, Call(args, kwargs))
                plates |= plates_of(trace)
                found |= {n: v for n, (v, _) in handler.found.items() if not is_tree(v)}
            return found

        if self._plated:
            return self._plated
        with precision(self.dtype):
            held = self.batch(call)
            try:
                found = jax.eval_shape(shapes, held.args, dict(held.kwargs))
            except Exception:
                # A program for a fixed number of rows has no parameter that could follow it.
                return []
            first = self.constrain(self.initial)
            return sorted(n for n, v in found.items() if n in first and jnp.shape(first[n]) != v.shape)

    def _latents(self, batch: Call, key: Array, asked: str | None) -> list[Latent]:
        """The model's latent sites, and where a guide for them starts."""

        def trace(i: int) -> dict[str, Message]:
            draws = jax.random.fold_in(key, i)

            def prior(msg: Message) -> Array:
                return draw(msg["fn"], message_key(draws, msg), self.program.portable)

            handler = Handler({}, key, prior, unrolled=True)
            return self._trace(self._model, handler, batch)

        runs = [trace(i) for i in range(PRIOR_DRAWS)]
        model = runs[0]
        data_plate = self._data_plate(model, asked)
        sizes = {n: s["args"] for n, s in model.items() if s["type"] == "plate"}
        found = []
        for name, site in model.items():
            if site["type"] != "sample" or site["is_observed"]:
                continue
            fn, frames = site["fn"], site["cond_indep_stack"]
            plates = tuple(PlateOf(f.name, f.dim, sizes[f.name][0], f.size) for f in frames)
            transform = None if fn.support.is_discrete else biject_to(fn.support)

            def unconstrained(site: str = name, transform: Any = transform) -> list[np.ndarray]:
                return [np.asarray(transform._inverse(r[site]["value"])) for r in runs]

            found.append(latent_site(name, fn, plates, data_plate, transform, unconstrained))
        return found

    def _data_plate(self, model: dict[str, Message], asked: str | None) -> str | None:
        observed = {n: s for n, s in model.items() if s["type"] == "sample" and s["is_observed"]}
        data = {n: s for n, s in observed.items() if not is_factor(s["fn"])} or observed
        return find_data_plate(
            {n: [(f.name, f.dim) for f in s["cond_indep_stack"]] for n, s in data.items()},
            asked,
            [n for n, s in model.items() if s["type"] == "plate"],
        )

    def _structure(
        self,
        guide: dict[str, Message],
        model: dict[str, Message],
        asked: str | None,
        scanned: Sequence[tuple[str, ...]],
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
        alone = {n: s for n, s in model_sites.items() if n not in guide_sites and not s["is_observed"]}
        supports = {n: finite_support(s["fn"]) for n, s in alone.items()}
        check_sites(
            in_guide, in_model, auxiliary, supports, [n for n, s in alone.items() if is_chain_of_classes(s["fn"])]
        )
        sizes = {n: s["args"] for t in (guide, model) for n, s in t.items() if s["type"] == "plate"}
        every = [*guide_sites.values(), *model_sites.values()]
        # A batch dimension without a plate counts too: rows and draws must not meet it.
        ranks = [len(jax.eval_shape(partial(density, s, site_log_prob)).shape) for s in every]
        nesting = max([*ranks, *(-f.dim for s in every for f in s["cond_indep_stack"])], default=0)
        data_plate = self._data_plate(guide | model, asked)
        frames = {f.name: f for s in every for f in s["cond_indep_stack"]}
        dims = {n: f.dim for n, f in frames.items()}
        plate_dim = dims[data_plate] if data_plate else None

        def plates(site: Message) -> tuple[Plate, ...]:
            stack = sorted(site["cond_indep_stack"], key=lambda f: f.dim)
            return tuple(
                Plate(f.name, sizes[f.name][0], f.size, inner_axis(f.dim, nesting, plate_dim)) for f in stack
            )

        def local(site: Message) -> bool:
            return data_plate is None or any(f.name == data_plate for f in site["cond_indep_stack"])

        infos: dict[str, SiteInfo] = {}
        for name, site in {**guide_sites, **{n: s for n, s in model_sites.items() if n not in guide_sites}}.items():
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
                reparameterised=reparameterised(site["fn"]),
                support=finite_support(site["fn"]) if role != "observed" and not site["is_observed"] else None,
                **(class_facts(classes(site["fn"]), classes(of_model["fn"])) if role != "observed" else {}),
                weights=weights(site["fn"]) if role != "observed" else 0,
                partly_observed=self._missing.fills(name),
                plates=plates(site),
                local_in_model=local(of_model),
                in_guide=name not in alone,
                model_axes=frozenset(p.axis for p in plates(of_model) if p.axis is not None),
                undeclared=name in alone and undeclared(site["fn"], site["cond_indep_stack"]),
                enumerated=name in alone and site["infer"].get("enumerate") == "parallel",
                closed_kl=role == "latent"
                and name in guide_sites
                and not any(name in names for names in scanned)
                and np.array_equal(scales[0], scales[1])
                and has_kl(site["fn"], of_model["fn"]),
                user_scaled=any(np.abs(scale - 1.0).max() > 1e-9 for scale in scales),
                whole=is_whole(site) and is_whole(of_model) and not self._missing.fills(name),
                elementwise=elementwise(site["fn"]) and elementwise(of_model["fn"]),
                most=None if role == "observed" or site["is_observed"] else most(site["fn"]),
                fixed=site["is_observed"] and role == "auxiliary",
                point=is_point(site["fn"]),
                chained=isinstance(site["fn"], Chain),
                steps=steps_of(site["fn"], of_model["fn"]),
                scanned=any(name in names for names in self._scans),
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
        params = {**self.constrain(self.initial), **self.states}

        def densities(**given: Array) -> dict[str, dict[str, Array]]:
            def replayed(msg: Message) -> Array:
                return of_step(given[msg["name"]], msg)

            handler = partial(Handler, params, key, replayed, scanned=given, unrolled=True)
            guide = self._trace(self._guide, handler(), batch)
            model = self._trace(self._model, handler(subsamples=plates_of(guide), side="model"), batch)
            return {
                side: {n: site_log_prob(s) for n, s in trace.items() if s["type"] == "sample"}
                for side, trace in (("guide", guide), ("model", model))
            }

        parents = provenance(densities, **values)
        parameterised = self._parameterised(batch, values, key)
        sites = {
            name: replace(
                info,
                parameterised=info.point and name in parameterised,
                trained=not info.point and name in parameterised,
                guide_parents=frozenset(parents["guide"].get(name, ())) - {name},
                model_parents=frozenset(parents["model"].get(name, ())) - {name},
            )
            for name, info in self.structure.sites.items()
        }
        return replace(self.structure, sites=sites)

    def _parameterised(self, batch: Call, values: dict[str, Array], key: Array) -> frozenset[str]:
        """Points and auxiliary sites that look at parameters while all sites before them stay where they are."""
        sites = self.structure.sites
        asked = [n for n, i in sites.items() if i.point or (i.role == "auxiliary" and not i.fixed)]
        if not asked:
            return frozenset()

        def places(params: Params) -> dict[str, Any]:
            handler = Handler(
                {**self.constrain(params), **self.states},
                key,
                lambda m: of_step(values[m["name"]], m),
                scanned=values,
                unrolled=True,
            )
            trace = self._trace(self._guide, handler, batch)
            return {
                n: jax.tree.leaves(trace[n]["fn"]) if sites[n].point else site_log_prob(trace[n]) for n in asked
            }

        found = provenance(places, params=self.initial)
        return frozenset(n for n, looks in found.items() if any(jax.tree.leaves(looks, is_leaf=_is_set)))

    def _cast(self, value: Any) -> Any:
        """Floats in this fit's precision."""

        def leaf(v: Any) -> Array:
            v = jnp.asarray(v)
            if is_key(v):
                return v
            # Never a weak type, which changes as it meets others, and a loop's state must not.
            return jax.lax.convert_element_type(v, self.dtype if jnp.issubdtype(v.dtype, jnp.floating) else v.dtype)

        return jax.tree.map(leaf, value)

    def _unconstrain(self, name: str, value: Any) -> Any:
        value = self._cast(value)
        return value if is_tree(value) or name in self.states else self._transforms[name]._inverse(value)

    def unconstrain(self, name: str, value: Any) -> Any:
        """The unconstrained value of a parameter's constrained one; DataError where it can have no such value."""
        with precision(self.dtype):
            known = self.constrain({name: {**self.initial, **self.states}[name]})[name]
            layout = jax.tree.structure(known)
            if str(jax.tree.structure(value)) != str(layout):
                raise DataError(f"start: {name!r} is not laid out as its parameter, which is {layout}.")
            # Keys in a state are replaced at every run.
            value = jax.tree.map(
                lambda a, k: k if is_key(k) else owned(starting_numbers(name, a, str(k.dtype)), k.dtype), value, known
            )

            def inside() -> bool:
                if name in self.states:
                    return True
                within = is_tree(value) or bool(jnp.all(self._constraints[name](value)))
                inverse = jax.tree.leaves(self._unconstrain(name, value))
                return within and all(bool(jnp.isfinite(a).all()) for a in inverse)

            for found, needed in zip(jax.tree.leaves(value), jax.tree.leaves(known), strict=True):
                check_value(name, found, needed.shape, inside)
            return self._unconstrain(name, value)

    def constrain(self, params: Params) -> dict[str, Any]:
        """Constrained values of unconstrained parameters; states and networks as they are."""
        with precision(self.dtype):
            return {
                n: v if n in self.states or is_tree(v) else self._transforms[n](v) for n, v in params.items()
            }

    def guide_distributions(self, params: Params, batch: Call, sites: Sequence[str]) -> dict[str, Any]:
        """The distributions that sites of the guide are drawn from; the guide is run until it has met them."""
        key, found = jax.random.key(0), dict[str, Any]()

        def drawn(msg: Message) -> Array:
            if msg["name"] in sites:
                found[msg["name"]] = msg["fn"]
                if len(found) == len(sites):
                    raise Enough
            return draw(msg["fn"], message_key(key, msg), self.program.portable)

        with contextlib.suppress(Enough):
            self._trace(self._guide, Handler({**self.constrain(params), **self.states}, key, drawn), batch)
        return found

    def chart(self, name: str) -> tuple[Any, Any]:
        """A parameter's transform from unconstrained values, and the constraint of what it gives."""
        return self._transforms[name], self._constraints[name]


def _is_set(value: Any) -> bool:
    return isinstance(value, frozenset)


def is_tree(value: Any) -> bool:
    return not jax.tree_util.all_leaves([value])
