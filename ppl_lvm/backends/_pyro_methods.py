"""Methods on Pyro: its AutoDelta, AutoLaplaceApproximation, NUTS and SVGD on the joint density of one vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVGD, SVI, RBFSteinKernel, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import biject_to
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ppl_lvm.algorithm import Method
from ppl_lvm.backends._pyro_handlers import Handler, Message, Params, sealed, seeded
from ppl_lvm.backends._torch_dists import draw, site_log_prob
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.backends.sampler import (
    Outcome,
    check_curvature,
    check_params,
    check_program,
    check_slope,
    first_finite,
    given_params,
    implementation,
    offsets,
)

LATENT = "latent"


class Sampler:
    """See `backends.sampler.Sampler`."""

    def __init__(self, bound: PyroBound, batch: Call, method: Method, params: Mapping[str, Any] | None) -> None:
        self._bound, self._batch, self._method = bound, batch, method
        check_params(method, params is not None, bound.initial)
        self._params: Params = bound.initial
        self.states: Params = {}
        if params is not None:
            given = given_params(params, {n: v.shape for n, v in bound.constrain(bound.initial).items()})
            self._params = {n: bound._transforms[n].inv(bound._cast(torch.tensor(v))) for n, v in given.items()}
        with sealed(bound.dtype), seeded(0), torch.no_grad():
            self._probe()

    def _probe(self) -> None:
        def prior(msg: Message) -> None:
            msg["value"] = draw(msg["fn"])

        trace = self._run(self._params, prior)
        latent = {n: s for n, s in trace.items() if not s["is_observed"]}
        frames = {f.name: f for s in trace.values() for f in s["cond_indep_stack"]}
        subsampled = {n: (f.full_size, f.size) for n, f in frames.items() if f.full_size not in (None, f.size)}
        continuous = {n: not s["fn"].support.is_discrete for n, s in latent.items()}
        check_program(continuous, subsampled, type(self._method).__name__)
        self.sites = {n: tuple(biject_to(s["fn"].support).inv(s["value"]).shape) for n, s in latent.items()}
        self._parts = offsets(self.sites)
        self._event_dims = {n: s["fn"].event_dim for n, s in latent.items()}
        self.size = sum(p.stop - p.start for p in self._parts.values())

    def _run(self, params: Params, latent: Callable[[Message], None]) -> dict[str, Message]:
        """A run of the model, modules in eval mode, so that the density is a function of the vector alone."""
        bound, with_gradient = self._bound, torch.is_grad_enabled()
        handler = Handler(bound.constrain(params), latent)
        # The library's algorithm, around the vector's model, has no business with these sites.
        with poutine.block(), bound.evaluation(), torch.set_grad_enabled(with_gradient):
            return bound._trace(bound._model, handler, self._batch, params)

    def joint(self, params: Params, u: Tensor, jacobian: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Log joint density, and the sites' values, for one vector."""
        terms: list[Tensor] = []

        def placed(msg: Message) -> None:
            name = msg["name"]
            transform = biject_to(msg["fn"].support)
            x = u[self._parts[name]].reshape(self.sites[name])
            if "step" in msg:  # of a scan: steps are the first dimension of the site's event
                x = x.select(x.dim() - 1 - transform.domain.event_dim, msg["step"])
            msg["value"] = transform(x)
            if jacobian:
                terms.append(transform.log_abs_det_jacobian(x, msg["value"]).sum())

        trace = self._run(params, placed)
        terms += [(site_log_prob(s) * s["scale"]).sum() for s in trace.values()]
        return torch.stack(terms).sum(), {n: trace[n]["value"] for n in self.sites}

    def density(self) -> Callable[[Tensor], Tensor]:
        """The log joint density under held parameters, as a graph of torch operations where it can be traced."""
        held = {n: p.detach() for n, p in self._params.items()}
        return self._traced(lambda u: self.joint(held, u)[0])[0]

    def _traced(self, f: Callable[[Tensor], Any]) -> tuple[Callable[[Tensor], Any], bool]:
        """A function of the vector as a graph, and whether that is one; as it is if the graph would not be the same."""
        points = torch.linspace(-1.0, 1.0, self.size), torch.linspace(0.5, -0.5, self.size)
        try:
            graph = make_fx(f)(points[0])
        except RuntimeError:  # a program that looks at values, or at its own randomness, runs through the handlers
            return f, False
        # A branch on a value would be frozen as it was at the first point.
        found, wanted = (pytree.tree_leaves(g(points[1])) for g in (graph, f))
        same = all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
        return (graph, True) if same else (f, False)

    def _over_draws(self, f: Callable[[Tensor], dict[str, Tensor]], u: np.ndarray) -> dict[str, np.ndarray]:
        """A function of the vector for every draw `[draws, D]`."""
        vectors = torch.as_tensor(u, dtype=getattr(torch, self._bound.dtype))
        with sealed(self._bound.dtype), torch.no_grad():
            function, graph = self._traced(f)
            if graph:
                return {n: x.numpy() for n, x in torch.func.vmap(function)(vectors).items()}
            found = [f(v) for v in vectors]
        return {n: torch.stack([x[n] for x in found]).numpy() for n in found[0]}

    def start(self, seed: int) -> Tensor:
        """A starting point with a finite density and gradient."""
        radius = self._method.radius
        generator = torch.Generator().manual_seed(seed)

        def make(_: int) -> Tensor:
            return (torch.rand(self.size, generator=generator) * 2.0 - 1.0) * radius

        def finite(u: Tensor) -> bool:
            u = u.clone().requires_grad_(True)
            value = self.joint(self._params, u)[0]
            slope = torch.autograd.grad(value, u)[0]
            return bool(torch.isfinite(value)) and bool(torch.isfinite(slope).all())

        return first_finite(make, finite, self._method)

    def run(self, method: Method, seed: int, progress: bool) -> Outcome:
        with _apart(self._bound.dtype, seed):
            return implementation(method, _KNOWN)(self, method, seed, progress)

    def log_joint(self, params: Params, u: np.ndarray) -> np.ndarray:
        return self._over_draws(lambda v: {LATENT: self.joint(params, v)[0]}, u)[LATENT]

    def values(self, params: Params, u: np.ndarray) -> dict[str, np.ndarray]:
        sites, bound = self._bound.structure.sites, self._bound

        def rows(v: Tensor) -> dict[str, Tensor]:
            bound._sizes = (1, 1)
            values = self.joint(params, v)[1]
            table = {n: bound._from_site(x, self._event_dims[n], sites[n]) for n, x in values.items()}
            return {n: x[0, 0] if sites[n].local else x[0] for n, x in table.items()}

        return self._over_draws(rows, u)

    def flat(self, density: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """The posterior as a Pyro model of one real vector, or of particles, for algorithms that take a model."""

        def flat() -> None:
            u = pyro.sample(LATENT, dist.Normal(torch.zeros(self.size), 1.0).to_event(1).mask(False))
            log_joint = torch.stack([density(v) for v in u.reshape(-1, self.size)])
            pyro.factor("log_joint", log_joint.reshape(u.shape[:-1]))

        return flat


@contextlib.contextmanager
def _apart(dtype: str, seed: int) -> Iterator[None]:
    """A parameter store and random numbers of its own; those of the process stay as they are."""
    with sealed(dtype), seeded(seed):
        yield


def _ascend(sampler: Sampler, flat: Callable[[], None], guide: Any, method: Any) -> dict[str, np.ndarray]:
    rates = method.rates()
    optimizer = pyro.optim.LambdaLR(  # type: ignore[attr-defined]
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 1.0},
            "lr_lambda": lambda step: rates[min(step, method.steps - 1)],
        }
    )
    search = SVI(flat, guide, optimizer, Trace_ELBO())
    losses = np.zeros(method.steps)
    for step in range(method.steps):
        losses[step] = search.step()
        optimizer.step()
    return {"step": np.arange(method.steps), "loss": losses / sampler._bound.structure.rows}


def _map(sampler: Sampler, method: Any, seed: int, progress: bool) -> Outcome:
    jacobian = method.density == "unconstrained"

    def density(u: Tensor) -> Tensor:
        params = {n: pyro.param(f"param.{n}", v.detach().clone()) for n, v in sampler._params.items()}
        return sampler.joint(params, u, jacobian)[0]

    flat = sampler.flat(density)
    guide = AutoDelta(flat, init_loc_fn=init_to_value(values={LATENT: sampler.start(seed)}))
    history = _ascend(sampler, flat, guide, method)
    params = {n: pyro.param(f"param.{n}").detach().clone() for n in sampler._params}
    mode = guide.median()[LATENT].detach().clone().requires_grad_(True)
    gradient = torch.autograd.grad(-sampler.joint(params, mode, jacobian)[0], mode, create_graph=True)[0]
    curved = torch.autograd.grad(gradient, mode, gradient.detach())[0] if gradient.requires_grad else 0.0 * gradient
    notes = check_slope(gradient.detach().double().numpy(), curved.detach().double().numpy())
    return Outcome(mode.detach().numpy()[None, None], params, history, notes=notes)


def _laplace(sampler: Sampler, method: Any, seed: int, progress: bool) -> Outcome:
    density = sampler.density()
    guide = AutoLaplaceApproximation(
        sampler.flat(density), init_loc_fn=init_to_value(values={LATENT: sampler.start(seed)})
    )
    history = _ascend(sampler, sampler.flat(density), guide, method)
    mode = guide.loc.detach().clone().requires_grad_(True)
    # Looked at before the library does: it would stop at a factorisation, without a name of a site.
    hessian = torch.autograd.functional.hessian(lambda u: -density(u), mode).numpy()
    gradient = torch.autograd.grad(-density(mode), mode)[0].numpy()
    notes = check_curvature(hessian, gradient, sampler.sites)
    normal = guide.laplace_approximation()
    gaussian = normal.loc.numpy(), (normal.scale[:, None] * normal.scale_tril).numpy()
    return Outcome(gaussian[0][None, None], sampler._params, history, {}, gaussian, notes)


def _nuts(sampler: Sampler, method: Any, seed: int, progress: bool) -> Outcome:
    density = sampler.density()
    chains = [_chain(sampler, density, method, [seed, chain], progress) for chain in range(method.chains)]
    draws = np.stack([u for u, _ in chains])
    return Outcome(draws, sampler._params, {}, {n: np.stack([s[n] for _, s in chains]) for n in chains[0][1]})


def _chain(
    sampler: Sampler, density: Callable[[Tensor], Tensor], method: Any, seed: list[int], progress: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One chain `[draws, D]` in this process: the library would start processes, and seed them by itself."""
    key = int(np.random.SeedSequence(seed).generate_state(1)[0])
    steps: list[float] = []
    accepted: list[float] = []
    kernel = NUTS(
        potential_fn=lambda z: -density(z[LATENT]),
        target_accept_prob=method.target_accept,
        full_mass=method.dense_mass,
        max_tree_depth=method.max_tree_depth,
    )

    def look(kernel: Any, _: Any, stage: str, __: int) -> None:
        if stage.startswith("Sample"):
            steps.append(float(kernel.step_size))
            accepted.append(kernel._mean_accept_prob * (len(accepted) + 1))

    with seeded(key):
        chain = MCMC(
            kernel,
            num_samples=method.draws,
            warmup_steps=method.warmup,
            initial_params={LATENT: sampler.start(key)},
            hook_fn=look,
            disable_progbar=not progress,
        )
        chain.run()
    diverging = np.isin(np.arange(method.draws), chain.diagnostics()["divergences"]["chain 0"])
    rates = np.diff(np.array(accepted), prepend=0.0)  # the library keeps a running mean
    stats = {"diverging": diverging, "acceptance_rate": rates, "step_size": np.array(steps)}
    return chain.get_samples()[LATENT].numpy(), stats


def _svgd(sampler: Sampler, method: Any, seed: int, progress: bool) -> Outcome:
    flat = sampler.flat(sampler.density())
    rates = method.rates()
    optimizer = pyro.optim.LambdaLR(  # type: ignore[attr-defined]
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 1.0},
            "lr_lambda": lambda step: rates[min(step, method.steps - 1)],
        }
    )
    stein = SVGD(flat, RBFSteinKernel(), optimizer, method.particles, max_plate_nesting=0, mode="multivariate")
    start = torch.stack([sampler.start(seed + i) for i in range(method.particles)])
    pyro.param("svgd_particles", start.reshape(-1))
    force = np.zeros(method.steps)
    for step in range(method.steps):
        force[step] = stein.step()[LATENT]
        optimizer.step()
    particles = stein.get_named_particles()[LATENT].detach().numpy()
    return Outcome(particles[None], sampler._params, {"step": np.arange(method.steps), "force": force})


_KNOWN = {"map": _map, "laplace": _laplace, "nuts": _nuts, "svgd": _svgd}
