"""Methods on NumPyro: its AutoDelta, AutoLaplaceApproximation, NUTS and SVGD on the joint density of one vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.contrib.einstein import SVGD, RBFKernel
from numpyro.distributions.transforms import biject_to
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation
from numpyro.infer.initialization import init_to_uniform, init_to_value
from numpyro.optim import optax_to_numpyro

from ppl_lvm.algorithm import Method
from ppl_lvm.backends._jax_dists import draw, site_log_prob
from ppl_lvm.backends._numpyro_handlers import Handler, Message, Params, message_key, precision
from ppl_lvm.backends._numpyro_program import is_tree
from ppl_lvm.backends._numpyro_state import evaluation
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.numpyro import NumPyroBound
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

Array = jax.Array
LATENT = "latent"
STATS = {
    "diverging": "diverging",
    "acceptance_rate": "accept_prob",
    "n_steps": "num_steps",
    "energy": "energy",
    "step_size": "adapt_state.step_size",
}
"""ArviZ's names of what NumPyro's NUTS reports of every draw."""


class Sampler:
    """See `backends.sampler.Sampler`."""

    def __init__(self, bound: NumPyroBound, batch: Call, method: Method, params: Mapping[str, Any] | None) -> None:
        self._bound, self._batch, self._method = bound, batch, method
        check_params(method, params is not None, bound.initial)
        bound._check_frozen()
        self._params, self.states = bound.initial, dict(bound.states)
        if params is not None:
            self._params = self._given(params)
            self.states |= {n: bound._cast(params[n]) for n in bound.states if n in params}
        self._key = jax.random.key(0)
        with precision(bound.dtype):
            self._probe()

    def _given(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The model's parameters among those given, unconstrained."""
        bound = self._bound
        with precision(bound.dtype):
            initial = bound.constrain(bound.initial)
            trees = {n for n, v in initial.items() if is_tree(v)}
            arrays = {n: v.shape for n, v in initial.items() if n not in trees}
            found = {n: bound._unconstrain(n, v) for n, v in given_params(params, arrays).items()}
            # A module's parameters are a tree, whose shapes the module itself would complain of.
            return found | {n: bound._unconstrain(n, params[n]) for n in trees & params.keys()}

    def _probe(self) -> None:
        def prior(msg: Message) -> Array:
            return draw(msg["fn"], message_key(self._key, msg), self._bound.program.portable)

        trace = self._run(self._params, prior)
        latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
        sizes = {n: s["args"] for n, s in trace.items() if s["type"] == "plate"}
        frames = {f.name: f for s in trace.values() for f in s.get("cond_indep_stack", ())}
        subsampled = {n: (sizes[n][0], f.size) for n, f in frames.items() if sizes[n][0] != f.size}
        continuous = {n: not s["fn"].support.is_discrete for n, s in latent.items()}
        check_program(continuous, subsampled, type(self._method).__name__)
        unconstrained = {n: biject_to(s["fn"].support)._inverse(s["value"]) for n, s in latent.items()}
        self.sites = {n: tuple(v.shape) for n, v in unconstrained.items()}
        self._parts = offsets(self.sites)
        self._event_dims = {n: s["fn"].event_dim for n, s in latent.items()}
        self.size = sum(p.stop - p.start for p in self._parts.values())

    def _run(self, params: Params, latent: Callable[[Message], Array]) -> dict[str, Message]:
        """A run of the model, networks in evaluation, so that the density is a function of the vector alone."""
        bound = self._bound
        known = {**bound.constrain(params), **self.states}
        handler = Handler(known, self._key, latent, side="model", still=True, unrolled=True)
        # The library's algorithm, around the vector's model, has no business with these sites.
        with handlers.block(), evaluation():
            return bound._trace(bound._model, handler, self._batch)

    def _joint(self, params: Params, u: Array, jacobian: bool = True) -> tuple[Array, dict[str, Array]]:
        """Log joint density, and the sites' values, for one vector."""
        logdet: list[Array] = []

        def placed(msg: Message) -> Array:
            name = msg["name"]
            transform = biject_to(msg["fn"].support)
            x = u[self._parts[name]].reshape(self.sites[name])
            if "step" in msg:  # of a scan: steps are the first dimension of the site's event
                x = jnp.take(x, msg["step"], axis=x.ndim - 1 - transform.domain.event_dim)
            value = transform(x)
            logdet.append(transform.log_abs_det_jacobian(x, value).sum())
            return value

        trace = self._run(params, placed)
        terms = [
            (site_log_prob(s) * (1.0 if s["scale"] is None else s["scale"])).sum()
            for s in trace.values()
            if s["type"] == "sample"
        ]
        values = {n: trace[n]["value"] for n in self.sites}
        return sum(terms + (logdet if jacobian else []), jnp.zeros(())), values

    def _flat(self, jacobian: bool = True, learns: bool = False) -> Callable[[], None]:
        """The posterior as a NumPyro model of one real vector, for algorithms that take a model."""
        held = {} if learns else dict(self._params)

        def flat() -> None:
            params = {n: numpyro.param(n, v) for n, v in self._params.items()} if learns else held
            u = numpyro.sample(LATENT, dist.Normal(jnp.zeros(self.size), 1.0).to_event(1).mask(False))
            numpyro.factor("log_joint", self._joint(params, u, jacobian)[0])

        return flat

    def _start(self, key: Array) -> Array:
        slope = jax.jit(jax.value_and_grad(lambda u: self._joint(self._params, u)[0]))
        radius = self._method.radius

        def make(attempt: int) -> Array:
            return jax.random.uniform(jax.random.fold_in(key, attempt), (self.size,), minval=-radius, maxval=radius)

        return first_finite(make, lambda u: all(bool(jnp.isfinite(x).all()) for x in slope(u)), self._method)

    def run(self, method: Method, seed: int, progress: bool) -> Outcome:
        with precision(self._bound.dtype):
            return implementation(method, _KNOWN)(self, method, jax.random.key(seed), progress)

    def log_joint(self, params: Params, u: np.ndarray) -> np.ndarray:
        with precision(self._bound.dtype):
            return np.asarray(jax.lax.map(lambda v: self._joint(params, v)[0], self._vector(u)))

    def values(self, params: Params, u: np.ndarray) -> dict[str, np.ndarray]:
        sites = self._bound.structure.sites

        def rows(v: Array) -> dict[str, Array]:
            values = self._joint(params, v)[1]
            return {n: self._bound._from_site(x, self._event_dims[n], sites[n]) for n, x in values.items()}

        with precision(self._bound.dtype):
            return {n: np.asarray(x) for n, x in jax.lax.map(rows, self._vector(u)).items()}

    def _vector(self, u: np.ndarray) -> Array:
        return jnp.asarray(u, dtype=self._bound.dtype)


def _adam(method: Any) -> Any:
    rates = jnp.asarray(method.rates())
    return optax_to_numpyro(optax.adam(lambda step: rates[jnp.minimum(step, method.steps - 1)]))


def _ascend(sampler: Sampler, flat: Any, guide: Any, method: Any, key: Array, progress: bool) -> Any:
    return SVI(flat, guide, _adam(method), Trace_ELBO()).run(key, method.steps, progress_bar=progress)


def _history(sampler: Sampler, losses: Array) -> dict[str, np.ndarray]:
    loss = np.asarray(losses, dtype=np.float64) / sampler._bound.structure.rows
    return {"step": np.arange(len(loss)), "loss": loss}


def _map(sampler: Sampler, method: Any, key: Array, progress: bool) -> Outcome:
    flat = sampler._flat(jacobian=method.density == "unconstrained", learns=True)
    guide = AutoDelta(flat, init_loc_fn=init_to_value(values={LATENT: sampler._start(key)}))
    found = _ascend(sampler, flat, guide, method, key, progress)
    params = {n: found.params[n] for n in sampler._params}
    u = found.params[f"{LATENT}_auto_loc"]

    def slope(u: Array) -> Array:
        return jax.grad(lambda u: -sampler._joint(params, u, method.density == "unconstrained")[0])(u)

    gradient = slope(u)
    curved = jax.jvp(slope, (u,), (gradient,))[1]
    notes = check_slope(np.asarray(gradient, dtype=np.float64), np.asarray(curved, dtype=np.float64))
    return Outcome(np.asarray(u)[None, None], params, _history(sampler, found.losses), notes=notes)


def _laplace(sampler: Sampler, method: Any, key: Array, progress: bool) -> Outcome:
    flat = sampler._flat()
    guide = AutoLaplaceApproximation(flat, init_loc_fn=init_to_value(values={LATENT: sampler._start(key)}))
    found = _ascend(sampler, flat, guide, method, key, progress)

    def cost(u: Array) -> Array:
        return -sampler._joint(sampler._params, u)[0]

    mode = found.params["auto_loc"]
    # Looked at before the library does: it goes on with a covariance of zero where this is no precision.
    hessian, gradient = np.asarray(jax.hessian(cost)(mode)), np.asarray(jax.grad(cost)(mode))
    notes = check_curvature(hessian, gradient, sampler.sites)
    normal = guide.get_posterior(found.params)
    gaussian = np.asarray(normal.loc), np.asarray(normal.scale_tril)
    return Outcome(gaussian[0][None, None], sampler._params, _history(sampler, found.losses), {}, gaussian, notes)


def _nuts(sampler: Sampler, method: Any, key: Array, progress: bool) -> Outcome:
    kernel = NUTS(
        potential_fn=lambda z: -sampler._joint(sampler._params, z[LATENT])[0],
        target_accept_prob=method.target_accept,
        dense_mass=method.dense_mass,
        max_tree_depth=method.max_tree_depth,
    )
    starts = jnp.stack([sampler._start(jax.random.fold_in(key, chain)) for chain in range(method.chains)])
    chains = MCMC(
        kernel,
        num_warmup=method.warmup,
        num_samples=method.draws,
        num_chains=method.chains,
        chain_method="sequential",
        progress_bar=progress,
    )
    start = {LATENT: starts if method.chains > 1 else starts[0]}
    chains.run(key, init_params=start, extra_fields=tuple(STATS.values()))
    reported = chains.get_extra_fields(group_by_chain=True)
    stats = {name: np.asarray(reported[field]) for name, field in STATS.items()}
    return Outcome(np.asarray(chains.get_samples(group_by_chain=True)[LATENT]), sampler._params, {}, stats)


def _svgd(sampler: Sampler, method: Any, key: Array, progress: bool) -> Outcome:
    stein = SVGD(
        sampler._flat(),
        _adam(method),
        RBFKernel(),
        num_stein_particles=method.particles,
        guide_kwargs={"init_loc_fn": init_to_uniform(radius=method.radius)},
    )
    found = stein.run(key, method.steps, progress_bar=progress)
    force = np.asarray(found.losses, dtype=np.float64)
    return Outcome(
        np.asarray(found.params[f"{LATENT}_auto_loc"])[None],
        sampler._params,
        {"step": np.arange(len(force)), "force": force},
    )


_KNOWN = {"map": _map, "laplace": _laplace, "nuts": _nuts, "svgd": _svgd}
