"""Pyro: one run of a program as a table of arrays, draws as extra batch dimensions on the left of every plate.

With n plate dimensions, draws stand at `-(n + 1)` and outer draws at `-(n + 2)` of a local site's batch shape. A size
of one is left out, so that with M = 1 a global value keeps its own shape and `z @ W` runs at any K. A program that does
not broadcast over draws is run for one after the other (`PyroBound.broadcasts`).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import get_provenance, track_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.utils.checkpoint import checkpoint

from ppl_lvm.algorithm import GuideFamily, Objective, Variant
from ppl_lvm.backends import _pyro_forward, _torch_memory
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
from ppl_lvm.backends._pyro_modules import Dropout, Modules
from ppl_lvm.backends._pyro_particles import Together
from ppl_lvm.backends._torch_dists import (
    GuideSite,
    apart,
    classes,
    draw,
    elementwise,
    finite_support,
    has_kl,
    is_whole,
    kl,
    log_prob,
    most,
    reparameterised,
    site_log_prob,
    support_value,
    weights,
)
from ppl_lvm.backends._torch_missing import TorchMissing, feasible
from ppl_lvm.backends._torch_ops import Gate, current_gate, stopped_once
from ppl_lvm.backends._torch_tables import equal, joined, without_values
from ppl_lvm.backends.base import (
    PRIOR_DRAWS,
    Call,
    Gradients,
    as_float,
    check_range,
    check_value,
    dreamt,
    example_kinds,
    features,
    find_data_plate,
    first_run,
    given_rows,
    inner_axis,
    losses,
    row_params,
    starting_numbers,
    written,
)
from ppl_lvm.backends.forward import Anatomy, Forward
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
    SUMMED,
    VARIANT,
    Plan,
    Role,
    SiteInfo,
    Structure,
    class_facts,
    inner_name,
    of_least_variance,
    prior_name,
    sum_out,
)
from ppl_lvm.backends.training import rows_of
from ppl_lvm.draws import Draws, Particles, Plate, Site
from ppl_lvm.errors import BackendError, ProgramError
from ppl_lvm.latents import Latent, PlateOf
from ppl_lvm.process import TURN

if TYPE_CHECKING:
    from ppl_lvm.program import Program



class PyroBound:
    """A program on a batch: structure, initial parameters, and runs (see `backends.base.Bound`)."""

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

    def on(self, example: Call) -> PyroBound:
        """The same program on data of another shape, with what its modules set up here."""
        return PyroBound(
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

    # One run.

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
                msg["log_q"] = site.fresh_log_prob(msg["value"])
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
