"""Pyro: what a program is, found by running it once on one batch: structure, parameters, constraints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import get_provenance, track_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, transform_to

from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.backends._pyro_handlers import (
    Handler,
    Message,
    Namespace,
    Params,
    borrowed,
    joined_steps,
    of_step,
    prior_of,
    sealed,
    seeded,
)
from ppl_lvm.backends._pyro_modules import Modules
from ppl_lvm.backends._torch_dists import (
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
from ppl_lvm.backends._torch_missing import TorchMissing, feasible
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
from ppl_lvm.backends.forward import Anatomy
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
from ppl_lvm.draws import Particles, Plate
from ppl_lvm.errors import ProgramError
from ppl_lvm.latents import Latent, PlateOf
from ppl_lvm.process import TURN

if TYPE_CHECKING:
    from ppl_lvm.program import Program



class PyroProgram:
    """A program on a batch: structure, initial parameters, and how it is run under a handler."""

    name = "pyro"
    states: ClassVar[dict[str, Any]] = {}
    """None: modules whose buffers a step would move are refused."""

    def __init__(
        self,
        program: Program,
        example: Call,
        *,
        seed: int,
        dtype: str,
        data_plate: str | None = None,
        total: int | None = None,
        setup: Modules | None = None,
    ) -> None:
        self.program, self.dtype, self.asked_plate, self._seed = program, dtype, data_plate, seed
        size = len(example.leaves[0]) if example.leaves and np.ndim(example.leaves[0]) else None
        self.total = size if total is None else total
        guide = program.guide
        asked = program.takes_rows
        family = guide if isinstance(guide, GuideFamily) else None
        self._ppl = ppl = Namespace(seed, dtype, self.total) if program.portable or family is not None else None
        self._model = given_rows(partial(program.model, ppl) if program.portable else program.model, ppl, asked)
        self._guide: Callable[..., Any] = prior_of(self._model)
        if guide is not None and family is None:
            self._guide = given_rows(partial(guide, ppl) if program.portable else guide, ppl, asked)
        if ppl is not None and size is not None:
            example = example.with_rows(size)
        self._kinds = example_kinds(program)
        self._modules = Modules(self._cast, [] if setup is None else setup.setup)
        self._missing = TorchMissing(program)
        self.joint_dims = self._missing.joint_dims
        self._evaluating = False
        self._particles: Particles | None = None
        self._anatomy: Anatomy | None = None
        self.forward_broadcasts: dict[Any, bool] = {}
        self._broadcasts: dict[tuple[bool, bool], tuple[bool, bool]] = {}
        self._at_once: dict[tuple[bool, bool], bool] = {}
        batch = self.batch(example)
        with sealed(dtype), seeded(seed), first_run(program, batch):
            self._probe(batch, data_plate, family)
        self.row_params = row_params(program, ppl, self.initial, self.total)

    def write(self, params: Params) -> None:
        """Puts these values into the program's own modules, and into the parameter store."""
        with TURN, torch.no_grad():
            self._modules.keep()
            store = pyro.get_param_store()
            for name, value in params.items():
                leaf = self._leaves[name]
                leaf.copy_(value)
                store._constraints[name], store._params[name] = self._constraints[name], leaf.requires_grad_(True)
                store._param_to_name[leaf] = name

    @property
    def modules(self) -> Modules:
        return self._modules

    def on(self, example: Call) -> Self:
        """The same program on data of another shape, with what its modules set up here."""
        return type(self)(
            self.program,
            example,
            seed=self._seed,
            dtype=self.dtype,
            data_plate=self.asked_plate,
            total=self.total,
            setup=self._modules,
        )

    def batch(self, call: Call) -> Call:
        """Contiguous tensors of this fit's dtype, as a compiled step is for one layout; of NumPy's arrays copies.

        A caller may change an array under a running fit, and BLAS adds up in another order where memory is aligned
        otherwise, as that of a slice is.
        """

        def convert(name: str, a: Any) -> Any:
            if isinstance(a, bool | int | float | str):  # settings that a training loop passes along
                return a
            if not isinstance(a, Tensor):
                a = np.asarray(a)
                if as_float(self._kinds, name, a.dtype.kind):
                    check_range(name, a, self.dtype)
                # In memory of torch's own: BLAS adds up in another order where NumPy's happens to be aligned otherwise.
                a = borrowed(a).clone(memory_format=torch.contiguous_format)
            a = a.to(torch.get_default_device()).contiguous()
            kind = "f" if a.is_floating_point() else "b" if a.dtype == torch.bool else "i"
            return a.to(getattr(torch, self.dtype)) if as_float(self._kinds, name, kind) else a

        return call.map_named(self.program.arguments, convert)

    def in_support(self, site: str, value: np.ndarray, known: np.ndarray | None = None) -> bool:
        """Whether data of the probe's shape are values of a site that has data, where they are known."""
        support, given = self._supports[site], borrowed(value)
        if known is not None:
            given = torch.where(borrowed(known), given, feasible(support, given))
        return bool(support.check(given).all())

    def needs(self, site: str) -> str:
        """What a site with data asks of them, for an error."""
        return getattr(self._supports[site], "needs", CHECK_DATA)

    # Structure and parameters, from probe runs on one draw.

    def _trace(
        self, program: Callable[..., Any], handler: Handler, batch: Call, params: Params | None = None
    ) -> dict[str, Message]:
        handler.missing = self._missing.run(batch, guide=program is self._guide)

        def run() -> dict[str, Message]:
            if self._ppl is not None:
                self._ppl.handler = handler
            with handler:
                nodes = poutine.trace(program).get_trace(*batch.own.args, **batch.own.kwargs).nodes
            return joined_steps(
                {
                    n: s
                    for n, s in nodes.items()
                    if s["type"] == "sample"
                    and not site_is_subsample(s)
                    and not (s["infer"] or {}).get("_deterministic")
                }
            )

        return self._modules.run(run, params or {}, self._evaluating)

    def _probe(self, batch: Call, asked: str | None, family: GuideFamily | None) -> None:
        def prior(msg: Message) -> None:
            msg["value"] = draw(msg["fn"]).detach()

        with self._modules.noticed(), torch.no_grad():
            if family is not None:
                family_guide = written(family, self._ppl, self._latents(batch, asked), self.program.arguments)
                self._guide = given_rows(family_guide, self._ppl)
            guide_handler = Handler(None, prior)
            guide = self._trace(self._guide, guide_handler, batch)
            values = {n: s["value"] for n, s in guide.items()}

            def replayed(msg: Message) -> None:
                if msg["name"] in values:
                    msg["value"] = of_step(values[msg["name"]], msg)
                else:
                    prior(msg)

            model_handler = Handler(None, replayed, guide_handler.subsamples)
            model_handler.offered, model_handler.plates = guide_handler.offered, guide_handler.plates
            model = self._trace(self._model, model_handler, batch)
            values |= {n: s["value"] for n, s in model.items() if n not in values and not s["is_observed"]}
            again = self._modules.hold(model_handler.offered)
        self._supports = {
            n: s["fn"].support for n, s in model.items() if s["is_observed"] or self._missing.fills(n)
        }
        found = {**guide_handler.values, **model_handler.values}
        constraint = {**guide_handler.constraints, **model_handler.constraints}
        self._transforms = {n: transform_to(constraint[n]) for n in found if n not in again}
        self.initial = {
            n: transform.inv(self._cast(found[n].detach())).detach().clone()
            for n, transform in self._transforms.items()
        }
        self._leaves = {**guide_handler.leaves, **model_handler.leaves}
        self._constraints = constraint
        used = {
            role: {again.get(n, n) for n in handler.values}
            for role, handler in (("model", model_handler), ("guide", guide_handler))
        }
        groups = {n: frozenset(g for g, names in used.items() if n in names) for n in self.initial}
        structure = self._structure(guide, model, asked)
        self.structure = replace(
            self._with_parents(structure, batch, values, guide_handler.subsamples), groups=groups
        )

    def _cast(self, value: Tensor) -> Tensor:
        value = value.to(torch.get_default_device())
        return value.to(getattr(torch, self.dtype)) if value.is_floating_point() else value

    def _latents(self, batch: Call, asked: str | None) -> list[Latent]:
        """The model's latent sites, and where a guide for them starts."""

        def prior(msg: Message) -> None:
            msg["value"] = draw(msg["fn"])

        runs = [self._trace(self._model, Handler(None, prior), batch) for _ in range(PRIOR_DRAWS)]
        model = runs[0]
        data_plate = self._data_plate(model, asked)
        found = []
        for name, site in model.items():
            if site["is_observed"]:
                continue
            fn, frames = site["fn"], [f for f in site["cond_indep_stack"] if f.vectorized]
            plates = tuple(PlateOf(f.name, f.dim, f.full_size or f.size, f.size) for f in frames)
            transform = None if fn.support.is_discrete else biject_to(fn.support)

            def unconstrained(site: str = name, transform: Any = transform) -> list[np.ndarray]:
                return [transform.inv(r[site]["value"]).numpy() for r in runs]

            found.append(latent_site(name, fn, plates, data_plate, transform, unconstrained))
        return found

    def _data_plate(self, model: dict[str, Message], asked: str | None) -> str | None:
        observed = {n: s for n, s in model.items() if s["is_observed"]}
        data = {n: s for n, s in observed.items() if not is_factor(s["fn"])} or observed
        known = {f.name for s in model.values() for f in s["cond_indep_stack"] if f.vectorized}
        return find_data_plate(
            {n: [(f.name, f.dim) for f in s["cond_indep_stack"] if f.vectorized] for n, s in data.items()},
            asked,
            sorted(known),
        )

    def _structure(self, guide: dict[str, Message], model: dict[str, Message], asked: str | None) -> Structure:
        observed = {n: s for n, s in model.items() if s["is_observed"]}
        auxiliary = [
            n for n, s in guide.items() if n not in model and (s["infer"].get("is_auxiliary") or s["is_observed"])
        ]
        in_guide, in_model = ({n: bool(s["is_observed"]) for n, s in t.items()} for t in (guide, model))
        alone = {n: s for n, s in model.items() if n not in guide and not s["is_observed"]}
        supports = {n: finite_support(s["fn"]) for n, s in alone.items()}
        check_sites(
            in_guide, in_model, auxiliary, supports, [n for n, s in alone.items() if is_chain_of_classes(s["fn"])]
        )
        every = [*guide.values(), *model.values()]
        frames = {f.name: f for s in every for f in s["cond_indep_stack"] if f.vectorized}
        # A batch dimension without a plate counts too: rows and draws must not meet it.
        ranks = [density(s, site_log_prob).dim() for s in every]
        nesting = max([*ranks, *(-f.dim for f in frames.values())], default=0)
        self._ranks = {n: len(s["fn"].batch_shape) for t in (model, guide) for n, s in t.items()}
        data_plate = self._data_plate(model, asked)

        plate_dim = frames[data_plate].dim if data_plate else None

        def local(site: Message) -> bool:
            return data_plate is None or any(f.name == data_plate for f in site["cond_indep_stack"])

        def plates(site: Message) -> tuple[Plate, ...]:
            stack = sorted(site["cond_indep_stack"], key=lambda f: f.dim or 0)
            return tuple(
                Plate(f.name, f.full_size or f.size, f.size, inner_axis(f.dim, nesting, plate_dim)) for f in stack
            )

        infos: dict[str, SiteInfo] = {}
        for name, site in {**guide, **{n: s for n, s in model.items() if n not in guide}}.items():
            role: Role = "observed" if name in observed and name not in guide else "latent"
            if name in auxiliary:
                role = "auxiliary"
            of_model = model.get(name, site)
            given = [self._user_scale(s, data_plate) for s in (site, of_model)]
            scales = [torch.as_tensor(scale, dtype=torch.get_default_dtype()) for scale in given]
            for scale in scales:
                check_scale(name, scale.shape, plate_dim if local(site) else None)
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
                closed_kl=role == "latent" and name in guide and torch.equal(*scales) and has_kl(site, of_model),
                # A tensor's values are those of this batch, and others in the next one.
                user_scaled=any(isinstance(scale, Tensor) or abs(scale - 1.0) > 1e-9 for scale in given),
                whole=is_whole(site) and is_whole(of_model) and not self._missing.fills(name),
                elementwise=elementwise(site["fn"]) and elementwise(of_model["fn"]),
                most=None if role == "observed" or site["is_observed"] else most(site["fn"]),
                fixed=site["is_observed"] and role == "auxiliary",
                point=is_point(site["fn"]),
                chained=isinstance(site["fn"], Chain),
                steps=steps_of(site["fn"], of_model["fn"]),
            )
        frame = frames.get(data_plate) if data_plate else None
        return Structure(
            sites=infos,
            data_plate=data_plate,
            plate_size=frame.full_size if frame is not None and frame.full_size != frame.size else None,
            rows=frame.size if frame is not None else 1,
            nesting=nesting,
            plate_dim=plate_dim,
            groups={},
        )

    def _user_scale(self, site: Message, data_plate: str | None) -> Any:
        scale = site["scale"]
        for frame in site["cond_indep_stack"]:
            if frame.name == data_plate and frame.full_size:
                scale = scale / (frame.full_size / frame.size)
        return scale

    def _with_parents(
        self, structure: Structure, batch: Call, values: Mapping[str, Tensor], subsamples: Mapping[str, Tensor]
    ) -> Structure:
        """Which sites each density looks at, from values that carry their site's name through every operation."""
        marked = {n: track_provenance(v.clone(), frozenset({n})) for n, v in values.items()}
        params = self.constrain(self.initial)

        def replayed(msg: Message) -> None:
            msg["value"] = of_step(marked[msg["name"]], msg)

        def parents(program: Callable[..., Any]) -> dict[str, frozenset[str]]:
            handler = Handler(params, replayed, subsamples)
            trace = self._trace(program, handler, batch, self.initial)
            return {n: frozenset(get_provenance(site_log_prob(s))) for n, s in trace.items()}

        with torch.no_grad():
            guide, model = parents(self._guide), parents(self._model)
        parameterised = self._parameterised(structure, batch, values, subsamples)
        sites = {
            n: replace(
                info,
                parameterised=info.point and n in parameterised,
                trained=not info.point and n in parameterised,
                guide_parents=guide.get(n, frozenset()) - {n},
                model_parents=model.get(n, frozenset()) - {n},
            )
            for n, info in structure.sites.items()
        }
        return replace(structure, sites=sites)

    def unconstrain(self, name: str, value: Any) -> Tensor:
        """The unconstrained value of a parameter's constrained one; DataError where it can have no such value."""
        with sealed(self.dtype):
            known = self._transforms[name](self.initial[name])
            value = torch.tensor(starting_numbers(name, value, self.dtype)).to(known)

            def inverse() -> Tensor:
                return self._transforms[name].inv(value).detach().clone()

            check_value(
                name,
                value,
                known.shape,
                lambda: bool(self._constraints[name].check(value).all() and inverse().isfinite().all()),
            )
            return inverse()

    def _parameterised(
        self, structure: Structure, batch: Call, values: Mapping[str, Tensor], subsamples: Mapping[str, Tensor]
    ) -> frozenset[str]:
        """Points and auxiliary sites that a gradient reaches parameters through while all before them stay."""
        sites = structure.sites
        asked = [n for n, i in sites.items() if i.point or (i.role == "auxiliary" and not i.fixed)]
        if not asked:
            return frozenset()

        def replayed(msg: Message) -> None:
            msg["value"] = of_step(values[msg["name"]], msg)

        with torch.enable_grad():
            params = {n: p.detach().requires_grad_() for n, p in self.initial.items()}
            trace = self._trace(self._guide, Handler(self.constrain(params), replayed, subsamples), batch, params)

            def moves(name: str) -> bool:
                fn = trace[name]["fn"]
                if not sites[name].point:
                    return bool(site_log_prob(trace[name]).requires_grad)
                return bool((at := fn.rsample()).requires_grad or fn.log_prob(at).requires_grad)

            return frozenset(n for n in asked if moves(n))

    def constrain(self, params: Params) -> dict[str, Tensor]:
        """Constrained values of unconstrained parameters."""
        with sealed(self.dtype):
            return {n: self._transforms[n](v) for n, v in params.items()}

    def guide_distributions(self, params: Params, batch: Call, sites: Sequence[str]) -> dict[str, Message]:
        """Sites of the guide with the distributions they are drawn from; the guide is run until it has met them."""
        found: dict[str, Message] = {}

        def drawn(msg: Message) -> None:
            if msg["name"] in sites:
                found[msg["name"]] = {"fn": msg["fn"], "mask": msg["mask"]}
                if len(found) == len(sites):
                    raise Enough
            msg["value"] = draw(msg["fn"]).detach()

        with contextlib.suppress(Enough):
            self._trace(self._guide, Handler(self.constrain(params), drawn), batch, params)
        return found

    def chart(self, name: str) -> tuple[Any, Any]:
        """A parameter's transform from unconstrained values, and the constraint of what it gives."""
        return self._transforms[name], self._constraints[name]

    def _check_shapes(self, params: Params) -> None:
        for name, value in params.items():
            if value.shape != self.initial[name].shape:
                raise ProgramError(
                    f"Parameter {name!r} has shape {tuple(value.shape)}, and {tuple(self.initial[name].shape)} where "
                    f"the program meets these data first, so it belongs to the rows that it was fitted on; ask for "
                    f"those, or write an amortised guide."
                )
