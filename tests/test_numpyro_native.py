"""Programs in the style of NumPyro's users, fitted as they are: networks with state, autoguides, scan, plates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from jax.example_libraries import stax
from numpyro import handlers, optim
from numpyro.contrib.control_flow import cond, scan
from numpyro.contrib.module import eqx_module, flax_module, nnx_module, random_flax_module, random_nnx_module
from numpyro.infer import SVI, Trace_ELBO, autoguide
from numpyro.infer.reparam import LocScaleReparam

from ppl_lvm import Fit, State, fit, numpyro_loss
from ppl_lvm.backends._numpyro_handlers import precision, site_key
from ppl_lvm.backends._numpyro_state import with_noise
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.numpyro import NumPyroBound
from ppl_lvm.backends.structure import Plan
from ppl_lvm.errors import BackendError, LegalityError, ProgramError
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.pace import Order
from ppl_lvm.program import Program

QUICK = {"xla_backend_optimization_level": 0}
WHOLE: dict[str, Any] = {"batch_size": None, "dtype": "float64", "progress_bar": False}
slow = pytest.mark.slow


def rows(n: int = 12, width: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width))


def bind(model: Callable[..., None], guide: Callable[..., Any], *data: Any) -> tuple[NumPyroBound, Call]:
    call = Call(data)
    bound = NumPyroBound(Program.from_callables(model, guide), call, seed=0, dtype="float64")
    return bound, bound.batch(call)


def assert_same_elbo(run: Fit, model: Callable[..., None], *, tolerance: float = 1e-10) -> None:
    """The loss in training and the state it leaves, against Trace_ELBO at the same parameters and values."""
    bound: NumPyroBound = run._bound
    plan, sites = Plan.of_values(bound.structure, 1, 1), bound.structure.sites
    with precision("float64"):
        assert run._data is not None
        batch = bound.batch(run._data)

        def ours(params: Any) -> Any:
            draws, left = bound._run(params, batch, jax.random.key(3), plan, training=True)
            return elbo()(draws).model, {n: s.value for n, s in draws.sites.items() if s.role != "observed"}, left

        value, drawn, left = jax.jit(ours, compiler_options=QUICK)(run._trained)
        # A point that differs in rounding would have no density.
        drawn = {n: v for n, v in drawn.items() if not sites[n].point}
        given = {n: bound._to_site(v[0, 0] if sites[n].local else v[0], sites[n]) for n, v in drawn.items()}
        params = bound.constrain(run._trained)

        def theirs() -> Any:
            guide = handlers.substitute(bound._guide, data=given)
            return Trace_ELBO().loss_with_mutable_state(
                jax.random.key(0), params, model, guide, *batch.args, **batch.kwargs
            )

        wanted = jax.jit(theirs, compiler_options=QUICK)()
    np.testing.assert_allclose(value, wanted["loss"], rtol=0, atol=tolerance * max(1.0, abs(float(value))))
    for name, state in (wanted["mutable_state"] or {}).items():
        for a, b in zip(jax.tree.leaves(left[name]), jax.tree.leaves(state), strict=True):
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


# Networks.


class Linen(linen.Module):
    outputs: int
    rate: float = 0.0

    @linen.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = linen.BatchNorm(momentum=0.9)(linen.Dense(4)(x), not train)
        return linen.Dense(self.outputs)(linen.Dropout(self.rate, deterministic=False)(jnp.tanh(x)))


class Nnx(nnx.Module):
    def __init__(self, inputs: int, outputs: int, rate: float = 0.0) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(inputs, 4, rngs=rngs), nnx.Linear(4, outputs, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(4, momentum=0.9, rngs=rngs), nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: Any, **how: Any) -> Any:
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x))), **how))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, inputs: int, outputs: int, rate: float = 0.0) -> None:
        one, two = jax.random.split(jax.random.key(0))
        self.first, self.last = eqx.nn.Linear(inputs, 4, key=one), eqx.nn.Linear(4, outputs, key=two)
        self.norm = eqx.nn.BatchNorm(4, "rows", momentum=0.9, mode="batch")
        self.drop = eqx.nn.Dropout(rate)

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        x, state = self.norm(self.first(x), state)
        return self.last(self.drop(jnp.tanh(x), key=key)), state


def network(kind: str, name: str, inputs: int, outputs: int, rate: float = 0.0) -> Callable[[], Callable[..., Any]]:
    """What declares a network in a program, in the way of each library."""
    if kind == "linen":
        module = Linen(outputs, rate)

        def of_linen() -> Callable[..., Any]:
            net = flax_module(
                name, module, jnp.ones((2, inputs)), apply_rng=["dropout"], mutable=["batch_stats"]
            )
            return lambda x: net(x, rngs={"dropout": numpyro.prng_key()})

        return of_linen
    if kind == "nnx":
        eager = Nnx(inputs, outputs, rate)
        return lambda: nnx_module(name, eager)
    if kind == "equinox":
        built, first = eqx.nn.make_with_state(Equinox)(inputs, outputs, rate)

        def of_equinox() -> Callable[..., Any]:
            net = eqx_module(name, built)
            held = numpyro.primitives.mutable(f"{name}$state", {"state": first})

            def apply(x: Any) -> Any:
                keys = jax.random.split(numpyro.prng_key(), len(x))
                y, held["state"] = jax.vmap(net, (0, None, 0), (0, None), axis_name="rows")(x, held["state"], keys)
                return y

            return apply

        return of_equinox
    layers = stax.serial(stax.Dense(4), stax.Tanh, stax.Dense(outputs))
    return lambda: numpyro.module(name, layers, input_shape=(inputs,))


def vae(encoder: Callable[[], Any], decoder: Callable[[], Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    def model(x: Any) -> None:
        net = decoder()
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    def guide(x: Any) -> None:
        code = encoder()(x)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(code[:, :2], jnp.exp(code[:, 2:])).to_event(1))

    return model, guide


@pytest.mark.parametrize("kind", ["nnx", *(pytest.param(k, marks=slow) for k in ("linen", "equinox", "stax"))])
def test_a_vae_with_the_networks_of_each_library(kind: str) -> None:
    """Batch statistics in both networks; the value and the state after one run are those of Trace_ELBO."""
    model, guide = vae(network(kind, "encoder", 3, 4), network(kind, "decoder", 2, 3))
    run = fit(model, guide, rows(), "elbo", steps=3, **WHOLE)
    assert_same_elbo(run, model)
    assert run.params["encoder$params"] is not None
    assert run.predictive(2)["x"].shape == (2, 12, 3)


@pytest.mark.parametrize("kind", ["linen", *(pytest.param(k, marks=slow) for k in ("nnx", "equinox"))])
def test_evaluation_drops_nothing_and_keeps_the_statistics(kind: str) -> None:
    """At running mean m and variance v, the encoder is a function of one row: dropout off, nothing updated."""
    encoder = network(kind, "encoder", 3, 4, rate=0.5)
    model, guide = vae(encoder, network("stax", "decoder", 2, 3))
    x = rows()
    run = fit(model, guide, x, "elbo", steps=4, learning_rate=0.05, **WHOLE)
    value = rows(12, 2, seed=5)
    log_q = _log_q(run, run._bound, x, value)
    params, state = run.params["encoder$params"], run.params["encoder$state"]
    if kind == "linen":
        state = state["batch_stats"]["BatchNorm_0"]
        mean, variance, eps = state["mean"], state["var"], 1e-5
        a, b = params["Dense_0"]["kernel"], params["Dense_1"]["kernel"]
        c, d, norm = params["Dense_0"]["bias"], params["Dense_1"]["bias"], params["BatchNorm_0"]
        gain, shift = norm["scale"], norm["bias"]
    elif kind == "nnx":
        state = state["state"]["norm"]
        mean, variance, eps = state["mean"], state["var"], 1e-5
        a, b, c, d = (params[n][k] for k in ("kernel", "bias") for n in ("first", "last"))
        gain, shift = params["norm"]["scale"], params["norm"]["bias"]
    else:
        hidden = [v for v in jax.tree.leaves(state) if np.shape(v) == (4,)]
        mean, variance, eps = *(v / (1 - 0.9**4) for v in hidden), 1e-5
        a, b, c, d = params.first.weight.T, params.last.weight.T, params.first.bias, params.last.bias
        gain, shift = params.norm.weight, params.norm.bias
    assert np.abs(mean).max() > 0.01
    code = np.tanh((x @ a + c - mean) / np.sqrt(variance + eps) * gain + shift) @ b + d
    wanted = np.asarray(dist.Normal(code[:, :2], np.exp(code[:, 2:])).log_prob(value)).sum(-1)
    np.testing.assert_allclose(log_q, wanted, rtol=0, atol=1e-5)
    one = _log_q(run, run._fitted.bound_for(Call((x[:1],))), x[:1], value[:1])
    np.testing.assert_allclose(one, log_q[:1], rtol=0, atol=1e-10)


def _log_q(run: Fit, bound: Any, x: np.ndarray, value: np.ndarray) -> np.ndarray:
    with precision("float64"):
        given = {"z": jnp.asarray(value)[None, None]}
        plan, held = Plan(1, 1, {"z": pathwise()}), bound.batch(Call((x,)))
        draws = jax.jit(
            lambda params: bound.draws(params, held, jax.random.key(0), plan, values=given).log_q,
            compiler_options=QUICK,
        )(run._trained)
        return np.asarray(draws)[0, 0]


def test_the_gradient_under_dropout_is_that_of_the_masked_network() -> None:
    """One mask a step, shared by the draws and by the frozen replay: gradient of the masked network by hand."""
    eager = Nnx(3, 4, rate=0.5)
    model, guide = vae(lambda: nnx_module("encoder", eager), lambda: lambda z: z @ numpyro.param("w", jnp.ones((2, 3))))
    x, draws = rows(6), rows(3 * 6, 2, seed=1).reshape(1, 3, 6, 2)
    with precision("float64"):
        bound, batch = bind(model, guide, x)
        key = jax.random.key(11)
        state = with_noise(bound.states["encoder$state"], site_key(key, "encoder$state"))["state"]["drop"]["rngs"]
        mask = jax.random.bernoulli(jax.random.fold_in(state["key"], 0), 0.5, (6, 4))

        def by_hand(params: Any) -> Any:
            net = params["encoder$params"]
            h = x @ net["first"]["kernel"] + net["first"]["bias"]
            h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5) * net["norm"]["scale"] + net["norm"]["bias"]
            code = jnp.where(mask, jnp.tanh(h) / 0.5, 0.0) @ net["last"]["kernel"] + net["last"]["bias"]
            loc, scale = code[:, :2], jnp.exp(code[:, 2:])
            z = loc + scale * jax.lax.stop_gradient((draws[0] - loc) / scale)
            log_p = dist.Normal(0, 1).log_prob(z).sum(-1) + dist.Normal(z @ params["w"], 0.5).log_prob(x).sum(-1)
            log_w = log_p - dist.Normal(loc, scale).log_prob(z).sum(-1)
            return -(jax.nn.logsumexp(log_w, axis=0) - jnp.log(3)).sum()

        def step(params: Any) -> Any:
            plan = Plan(3, 1, {"z": pathwise()})
            found = bound.gradients(params, batch, key, plan, iwae(draws=3), values={"z": jnp.asarray(draws)})
            return found.loss, found.params, found.mutable

        loss, gradient, left = jax.jit(step, compiler_options=QUICK)(bound.initial)
        value, wanted = jax.value_and_grad(by_hand)(bound.initial)
    np.testing.assert_allclose(loss, value, rtol=0, atol=1e-8)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-8)
    assert int(left["encoder$state"]["state"]["drop"]["rngs"]["count"]) == 1


@pytest.mark.parametrize("recipe", ["iwae", pytest.param("elbo", marks=slow)])
def test_batch_statistics_are_updated_once_a_step(recipe: str) -> None:
    """Four draws and a frozen replay; the statistics are those of a loop over the batches. A fit goes on from them."""
    eager = Nnx(3, 4, rate=0.5)
    model, guide = vae(lambda: nnx_module("encoder", eager), network("stax", "decoder", 2, 3))
    x = rows(12)
    options: dict[str, Any] = {"draws": 4, "learning_rate": 0.0, "dtype": "float64", "batch_size": 5}
    run = fit(model, guide, x, recipe, steps=7, estimator="dreg", **options)
    net, mean, variance = run.params["encoder$params"]["first"], np.zeros(4), np.ones(4)
    for index in Order(12, 5, 0).batches(0, 7):
        h = x[index] @ net["kernel"] + net["bias"]
        mean, variance = 0.9 * mean + 0.1 * h.mean(0), 0.9 * variance + 0.1 * h.var(0)
    found = run.params["encoder$state"]["state"]
    np.testing.assert_allclose(found["norm"]["mean"], mean, rtol=0, atol=1e-7)
    np.testing.assert_allclose(found["norm"]["var"], variance, rtol=0, atol=1e-7)
    assert found["drop"]["rngs"]["count"] == 7
    assert len(set(run.history["loss"].round(12))) == 7
    assert np.asarray(eager.norm.mean[...]).tolist() == [0.0] * 4
    np.testing.assert_array_equal(np.asarray(eager.drop.rngs.count[...]), 0)


def test_statistics_that_differ_between_draws_are_averaged() -> None:
    eager = Nnx(2, 3)
    model, guide = vae(network("stax", "encoder", 3, 4), lambda: nnx_module("decoder", eager))
    x, z = rows(5), rows(3 * 5, 2, seed=1).reshape(1, 3, 5, 2)
    with precision("float64"):
        bound, batch = bind(model, guide, x)

        def step(params: Any) -> Any:
            plan = Plan(3, 1, {"z": pathwise()})
            given = {"z": jnp.asarray(z)}
            return bound.gradients(params, batch, jax.random.key(0), plan, iwae(draws=3), values=given).mutable

        left = jax.jit(step, compiler_options=QUICK)(bound.initial)["decoder$state"]["state"]["norm"]
        first = bound.initial["decoder$params"]["first"]
        h = np.asarray(z[0] @ first["kernel"] + first["bias"])
    np.testing.assert_allclose(left["mean"], 0.1 * h.mean(1).mean(0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(left["var"], 0.9 + 0.1 * h.var(1).mean(0), rtol=0, atol=1e-7)


def test_a_fit_with_state_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    eager = Nnx(3, 4, rate=0.5)
    model, guide = vae(lambda: nnx_module("encoder", eager), network("stax", "decoder", 2, 3))
    options: dict[str, Any] = {"recipe": "elbo", "batch_size": 5, "dtype": "float64", "learning_rate": 0.01}
    whole = fit(model, guide, rows(), steps=6, **options)
    part = fit(model, guide, rows(), steps=3, **options)
    part.state.save(tmp_path / "state")
    rest = fit(model, guide, rows(), steps=6, state=State.load(tmp_path / "state"), **options)
    assert whole.state.arrays.keys() == rest.state.arrays.keys()
    for name, value in whole.state.arrays.items():
        np.testing.assert_array_equal(value, rest.state.arrays[name], err_msg=name)
    np.testing.assert_array_equal(whole.history["loss"][3:], rest.history["loss"])


@slow
def test_a_network_that_is_told_to_drop_in_the_call_is_not_evaluated() -> None:
    eager = Nnx(3, 4, rate=0.5)
    model, guide = vae(
        lambda: lambda x: nnx_module("encoder", eager)(x, deterministic=False), network("stax", "decoder", 2, 3)
    )
    run = fit(model, guide, rows(), "elbo", steps=1, **WHOLE)
    with pytest.raises(ProgramError, match=r"'encoder\$state' changes in evaluation too"):
        run.log_likelihood(draws=2)
    with pytest.raises(ProgramError, match="changes in evaluation too"):
        run.predictive(2)


def test_statistics_under_enumeration_are_refused() -> None:
    eager = Nnx(3, 2)

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            y = numpyro.sample("y", dist.Categorical(jnp.ones(2) / 2))
            numpyro.sample("x", dist.Normal(y[:, None].astype(float), 1.0).to_event(1), obs=x)

    def guide(x: Any) -> None:
        logits = nnx_module("encoder", eager)(x)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Categorical(logits=logits))

    with pytest.raises(LegalityError, match=r"'encoder\$state' .*averaged over draws"):
        fit(model, guide, rows(), "elbo", estimator="enumerate", steps=1, **WHOLE)
    fit(model, guide, rows(), "elbo", estimator="score", steps=1, **WHOLE)


@pytest.mark.parametrize("kind", ["linen", pytest.param("nnx", marks=slow)])
def test_a_network_with_a_prior_over_its_weights(kind: str) -> None:
    eager = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def model(x: Any, y: Any) -> None:
        prior = dist.Normal(0.0, 1.0)
        if kind == "linen":
            net = random_flax_module("net", linen.Dense(1), prior, input_shape=(3,))
        else:
            net = random_nnx_module("net", eager, prior)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Normal(net(x)[:, 0], 0.3), obs=y)

    x = rows()
    run = fit(model, autoguide.AutoNormal(model), (x, x @ [1.0, 2.0, 3.0]), "elbo", steps=3, **WHOLE)
    assert_same_elbo(run, model)
    assert run.posterior(5).values["net/kernel"].shape == (5, 3, 1)


# Autoguides.


def regression(x: Any, y: Any) -> None:
    """Slopes by group under common scales: positive, simplex and real latents, none of a row."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    share = numpyro.sample("share", dist.Dirichlet(jnp.ones(2)))
    with numpyro.plate("groups", 3):
        slope = numpyro.sample("slope", dist.Normal(mu, tau))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ slope * share[0], 0.5), obs=y)


GUIDES: dict[str, Callable[[Any], Any]] = {
    "delta": autoguide.AutoDelta,
    "normal": autoguide.AutoNormal,
    "diagonal": autoguide.AutoDiagonalNormal,
    "mvn": autoguide.AutoMultivariateNormal,
    "low_rank": autoguide.AutoLowRankMultivariateNormal,
    "iaf": autoguide.AutoIAFNormal,
    "bnaf": lambda model: autoguide.AutoBNAFNormal(model, num_flows=1),
    "list": lambda model: _listed(model),
}


def _listed(model: Any) -> Any:
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(handlers.block(model, hide=["mu", "y"])))
    guide.append(autoguide.AutoDelta(handlers.block(model, expose=["mu"])))
    return guide


@pytest.mark.parametrize("kind", ["mvn", *(pytest.param(k, marks=slow) for k in GUIDES if k != "mvn")])
def test_autoguides_over_globals(kind: str) -> None:
    """Mini-batches are legal, as no parameter belongs to a row; the value is Trace_ELBO's."""
    x = rows()
    data = (x, x @ [1.0, 0.5, -0.5])
    guide = GUIDES[kind](regression)
    run = fit(regression, guide, data, "elbo", steps=2, dtype="float64", batch_size=6)
    assert_same_elbo(fit(regression, guide, data, "elbo", steps=2, **WHOLE), regression)
    draws = run.posterior(4)
    assert draws.values["slope"].shape == (4, 3)
    assert draws.log_q_global is not None and np.isfinite(draws.log_q_global).all()
    with pytest.raises((AttributeError, TypeError)):
        vars(guide)["prototype_trace"]["mu"]


def pair_model(x: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(mu, tau), obs=x)


@slow
def test_a_flow_without_an_inverse_has_numpyros_density() -> None:
    """Two flows and the permutation between them, at the noise that NumPyro keeps beside its draw; in SVI too."""
    x = rows(6, 1)[:, 0]
    guide = autoguide.AutoBNAFNormal(pair_model, num_flows=2, hidden_factors=[3])
    bound, _ = bind(pair_model, guide, x)
    with precision("float64"):
        params = bound.constrain(bound.initial)
        site = handlers.trace(handlers.substitute(handlers.seed(guide, 3), params)).get_trace(x)["_auto_latent"]
        wanted = site["fn"].log_prob(site["value"], site["intermediates"])
        noise = handlers.substitute(bound._guide, data={**params, "_auto_noise": site["intermediates"][0][0]})
        found = handlers.trace(handlers.seed(noise, 4)).get_trace(x)
        parts = [found[n]["fn"].log_prob(found[n]["value"]) for n in ("_auto_noise", "_auto_latent")]
    np.testing.assert_allclose(found["_auto_latent"]["value"], site["value"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(parts[0] + parts[1], wanted, rtol=0, atol=1e-12)
    svi = SVI(pair_model, autoguide.AutoBNAFNormal(pair_model), optim.Adam(0.01), loss=numpyro_loss("elbo", draws=2))
    state = svi.init(jax.random.key(0), x)
    assert np.isfinite(jax.jit(svi.update, compiler_options=QUICK)(state, x)[1])


def test_fits_do_not_share_an_autoguide() -> None:
    """An autoguide keeps the shapes and values of its first call; a second fit has data of its own."""
    x = rows(14)
    y = x @ [1.0, 0.5, -0.5]
    guide = autoguide.AutoNormal(local_model)
    first = fit(local_model, guide, y, "elbo", steps=1, **WHOLE)
    second = fit(local_model, guide, y[:9], "elbo", steps=1, seed=3, **WHOLE)
    again = fit(local_model, guide, y, "elbo", steps=1, **WHOLE)
    assert first.params["z_auto_loc"].shape == (14,)
    assert second.params["z_auto_loc"].shape == (9,)
    np.testing.assert_array_equal(first.params["z_auto_loc"], again.params["z_auto_loc"])


def local_model(x: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("kind", ["normal", pytest.param("mvn", marks=slow)])
def test_autoguides_over_rows(kind: str) -> None:
    """Whole-program ELBOs are fitted; a bound per row needs a density per row, mini-batches no parameters of one."""
    x = rows(8, 1)[:, 0]
    guide = GUIDES[kind](local_model)
    assert_same_elbo(fit(local_model, guide, x, "elbo", steps=2, **WHOLE), local_model)
    if kind == "mvn":
        with pytest.raises(LegalityError, match="no density per row"):
            fit(local_model, guide, x, "iwae", draws=2, steps=1, **WHOLE)
    else:
        fit(local_model, guide, x, "iwae", draws=2, steps=1, **WHOLE)
    with pytest.raises(LegalityError, match="mini-batches" if kind == "mvn" else r"z_auto_loc.*of one batch"):
        fit(local_model, guide, x, "elbo", steps=1, batch_size=4)


def test_a_parameter_for_every_row_is_refused_in_mini_batches() -> None:
    def guide(x: Any) -> None:
        numpyro.sample("mu", dist.Normal(numpyro.param("loc", 0.0), 1.0))
        where = numpyro.param("where", jnp.zeros(len(x)))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(where, 1.0))

    x = rows(8, 1)[:, 0]
    with pytest.raises(LegalityError, match=r"\['where'\] hold values for the rows of one batch"):
        fit(local_model, guide, x, "elbo", steps=1, batch_size=4)
    fit(local_model, guide, x, "elbo", steps=1, batch_size=None)


@pytest.mark.parametrize("kind", ["AutoLaplaceApproximation", "AutoDAIS"])
def test_autoguides_that_are_refused(kind: str) -> None:
    with pytest.raises(BackendError, match=f"Guide {kind} "):
        fit(local_model, getattr(autoguide, kind)(local_model), rows(4, 1)[:, 0], "elbo", steps=1, **WHOLE)


def test_a_program_that_subsamples_with_an_autoguide_over_rows() -> None:
    """The parameters are those of all rows, and a step reaches the rows of its mini-batch."""

    def model(x: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 8, subsample_size=3):
            batch = numpyro.subsample(jnp.asarray(x), event_dim=0)
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=batch)

    x = rows(8, 1)[:, 0]
    with precision("float64"):
        bound, batch = bind(model, autoguide.AutoNormal(model), x)
        key = jax.random.key(2)
        plan = Plan(1, 1, {"mu": pathwise(), "z": pathwise()})

        def step(params: Any) -> Any:
            values = bound.draws(params, batch, key, plan).sites
            found = bound.gradients(params, batch, key, plan, elbo())
            return found.loss, found.params, values["z"].value[0, 0], values["mu"].value[0]

        loss, gradient, z, mu = jax.jit(step, compiler_options=QUICK)(bound.initial)
        index = numpyro.primitives._subsample_fn(8, 3, site_key(key, "rows"))
        params = bound.constrain(bound.initial)
        guide = handlers.substitute(bound._guide, data={"rows": index, "z": z, "mu": mu})
        wanted = Trace_ELBO().loss(key, params, model, guide, *batch.args)
    np.testing.assert_allclose(loss, wanted, rtol=0, atol=1e-10)
    assert gradient["z_auto_loc"].shape == (8,)
    assert set(np.flatnonzero(gradient["z_auto_loc"])) == set(np.asarray(index).tolist())


# Scan.


def markov_model(x: Any) -> None:
    """Rows of sequences `[B, T]`; z_t ~ Normal(tanh(w z_t-1), 1), x_t ~ Normal(z_t, 0.5)."""
    w = numpyro.param("w", 0.8)

    def transition(z: Any, x_t: Any) -> Any:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.tanh(w * z), 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x_t)
        return z, None

    scan(transition, jnp.zeros(len(x)), jnp.swapaxes(x, 0, 1))


def markov_guide(x: Any) -> None:
    a, s = numpyro.param("a", 0.5), numpyro.param("s", 0.7, constraint=dist.constraints.positive)

    def transition(z: Any, x_t: Any) -> Any:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(a * z + 0.3 * x_t, s))
        return z, None

    scan(transition, jnp.zeros(len(x)), jnp.swapaxes(x, 0, 1))


@slow
def test_a_markov_model_with_scan() -> None:
    x = rows(5, 4)
    run = fit(markov_model, markov_guide, x, "elbo", steps=3, **WHOLE)
    assert_same_elbo(run, markov_model)
    assert run.posterior(6).values["z"].shape == (6, 5, 4)
    assert run.predictive(2)["x"].shape == (2, *x.shape)


def test_a_scan_by_hand() -> None:
    """Draws differ, densities are summed over time and per row; value and gradient are those of the chain by hand."""
    x = rows(5, 4)
    with precision("float64"):
        bound, batch = bind(markov_model, markov_guide, x)
        plan, key, size = Plan(3, 1, {"z": pathwise()}), jax.random.key(1), 3

        def step(params: Any) -> Any:
            found = bound.gradients(params, batch, key, plan, iwae(draws=size))
            draws = bound.draws(params, batch, key, plan)
            return found.loss, found.params, draws.sites["z"].value, draws.log_w

        loss, gradient, z, log_w = jax.jit(step, compiler_options=QUICK)(bound.initial)
        assert z.shape == (1, 3, 5, 4)
        assert len(np.unique(np.asarray(z))) == z.size
        first = bound.constrain(bound.initial)
        past = jnp.concatenate([jnp.zeros((3, 5, 1)), z[0, ..., :-1]], -1)
        noise = (z[0] - first["a"] * past - 0.3 * x) / first["s"]

        def by_hand(params: Any) -> Any:
            p = bound.constrain(params)
            state, total = jnp.zeros((3, 5)), jnp.zeros((3, 5))
            for t in range(4):
                loc = p["a"] * state + 0.3 * x[:, t]
                new = loc + p["s"] * noise[..., t]
                total += dist.Normal(jnp.tanh(p["w"] * state), 1.0).log_prob(new)
                total += dist.Normal(new, 0.5).log_prob(x[:, t]) - dist.Normal(loc, p["s"]).log_prob(new)
                state = new
            return -(jax.nn.logsumexp(total, axis=0) - jnp.log(3)).sum(), total

        (value, total), wanted = jax.value_and_grad(by_hand, has_aux=True)(bound.initial)
    np.testing.assert_allclose(log_w[0], total, rtol=0, atol=1e-10)
    np.testing.assert_allclose(loss, value, rtol=0, atol=1e-10)
    for name, expected in wanted.items():
        np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=1e-10, err_msg=name)


@slow
def test_an_autoguide_over_a_scan() -> None:
    """The guide draws all times at once, outside any scan; the model's scan replays them."""

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            pass
        markov_model(x)

    x = rows(3, 4)
    run = fit(model, autoguide.AutoNormal(model), x, "elbo", steps=2, **WHOLE)
    assert_same_elbo(run, model)
    assert run.params["z_auto_loc"].shape == (4, 3)
    with pytest.raises(ProgramError, match="'rows' is a plate that the model opens only inside a scan"):
        fit(markov_model, autoguide.AutoNormal(markov_model), x, "elbo", steps=1, **WHOLE)


@pytest.mark.parametrize("estimator", ["score", pytest.param("rloo", marks=slow)])
def test_estimators_do_not_reach_into_a_scan(estimator: str) -> None:
    with pytest.raises(LegalityError, match=r"'z' under estimator '\w+': the library's own scan draws it.*pathwise"):
        fit(markov_model, markov_guide, rows(3, 2), "elbo", estimator=estimator, draws=2, steps=1, **WHOLE)


def test_what_a_scan_would_hide_is_refused() -> None:
    def hidden(x: Any) -> None:
        def transition(z: Any, x_t: Any) -> Any:
            w = numpyro.param("w", 0.5)
            with numpyro.plate("rows", len(x)):
                z = numpyro.sample("z", dist.Normal(w * z, 1.0))
            return z, None

        scan(transition, jnp.zeros(len(x)), jnp.swapaxes(x, 0, 1))

    def branched(x: Any) -> None:
        loc = numpyro.param("loc", 0.0)
        cond(True, lambda _: numpyro.sample("z", dist.Normal(loc)), lambda _: numpyro.sample("z", dist.Normal(-loc)), 0)

    def looped(x: Any) -> None:
        loc = numpyro.param("loc", 0.0)

        def body(carry: Any, _: Any) -> Any:
            return numpyro.sample("z", dist.Normal(loc + carry)), None

        jax.lax.scan(body, 0.0, None, 3)

    for guide, message in (
        (hidden, "'w' is declared inside the body of a scan"),
        (branched, "'z' is sampled inside cond"),
        (looped, "'z' is sampled inside a loop or transformation of JAX"),
    ):
        with pytest.raises(ProgramError, match=message):
            fit(markov_model, guide, rows(3, 2), "elbo", steps=1, **WHOLE)
    fit(markov_model, markov_guide, rows(3, 2), "elbo", steps=1, **WHOLE)


# Plates, masks and handlers.


@slow
def test_a_semi_supervised_vae_with_an_observation_mask() -> None:
    """Labels are known for some rows; the guide draws the others under the mask that the library gives them."""
    encoder, classifier, decoder = (
        network("stax", n, i, o) for n, i, o in (("encoder", 5, 4), ("classifier", 3, 2), ("decoder", 4, 3))
    )

    def model(x: Any, y: Any, known: Any) -> None:
        net = decoder()
        with numpyro.plate("rows", len(x)):
            label = numpyro.sample("y", dist.Categorical(jnp.ones(2) / 2), obs=y, obs_mask=known)
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(net(jnp.concatenate([z, jnp.eye(2)[label]], -1)), 0.5).to_event(1), obs=x)

    def guide(x: Any, y: Any, known: Any) -> None:
        net, logits = encoder(), classifier()(x)
        with numpyro.plate("rows", len(x)):
            drawn = numpyro.sample("y_unobserved", dist.Categorical(logits=logits).mask(~known))
            code = net(jnp.concatenate([x, jnp.eye(2)[jnp.where(known, y, drawn)]], -1))
            numpyro.sample("z", dist.Normal(code[:, :2], jnp.exp(code[:, 2:])).to_event(1))

    known = np.arange(12) % 3 == 0
    data = (rows(), np.arange(12) % 2, known)
    run = fit(model, guide, data, "elbo", steps=3, **WHOLE)
    assert_same_elbo(run, model)
    assert np.isfinite(fit(model, guide, data, "iwae", draws=2, steps=2, batch_size=6).history["loss"]).all()


def test_a_gaussian_mixture() -> None:
    def model(x: Any) -> None:
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("components", 3):
            locs = numpyro.sample("locs", dist.Normal(0.0, 3.0))
        with numpyro.plate("rows", len(x)):
            mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, scale))
            numpyro.sample("x", mixture, obs=x)

    guide = autoguide.AutoNormal(model, init_loc_fn=numpyro.infer.init_to_median(num_samples=5))
    run = fit(model, guide, rows(12, 1)[:, 0], "elbo", steps=3, **WHOLE)
    assert_same_elbo(run, model)


@slow
def test_topics_in_nested_plates() -> None:
    """Words of documents, `[D, W]`; the topic of a word is summed out; topics are global, proportions a document's."""

    def model(words: Any) -> None:
        with numpyro.plate("topics", 2):
            topics = numpyro.sample("topic_words", dist.Dirichlet(jnp.ones(5)))
        with numpyro.plate("documents", len(words), dim=-2):
            shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(2)))
            with numpyro.plate("positions", words.shape[1], dim=-1):
                numpyro.sample("words", dist.Categorical(shares @ topics), obs=words)

    def guide(words: Any) -> None:
        counts = (words[..., None] == jnp.arange(5)).sum(1).astype(float)
        net = numpyro.module("net", stax.Dense(2), input_shape=(5,))
        prior = numpyro.param("prior", jnp.ones((2, 5)), constraint=dist.constraints.positive)
        with numpyro.plate("topics", 2):
            numpyro.sample("topic_words", dist.Dirichlet(prior))
        with numpyro.plate("documents", len(words), dim=-2):
            numpyro.sample("shares", dist.Dirichlet(jnp.exp(net(counts))[:, None]))

    words = np.random.default_rng(0).integers(0, 5, size=(6, 4))
    run = fit(model, guide, words, "elbo", steps=3, **WHOLE)
    assert run._bound.structure.data_plate == "documents"
    assert_same_elbo(run, model)
    batched = fit(model, guide, words, "elbo", steps=2, batch_size=3, dtype="float64")
    assert np.isfinite(batched.history["loss"]).all()


@slow
def test_a_gaussian_process_is_one_row() -> None:
    def model(x: Any, y: Any) -> None:
        length = numpyro.sample("length", dist.LogNormal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        square = (x[:, None] - x[None]) ** 2
        covariance = jnp.exp(-square / (2 * length**2)) + noise**2 * jnp.eye(len(x))
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)

    x = np.linspace(0, 1, 6)
    guide = autoguide.AutoMultivariateNormal(model)
    run = fit(model, guide, (x, np.sin(x)), "elbo", steps=3, **WHOLE)
    assert_same_elbo(run, model)
    bound = fit(model, guide, (x, np.sin(x)), "iwae", draws=3, steps=3, **WHOLE)
    assert np.isfinite(bound.history["loss"]).all()


def test_handlers_around_a_model() -> None:
    """Eight schools: a reparameterised site, a scale on one density, a mask, a factor and a deterministic site."""

    def model(y: Any, sigma: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        with handlers.scale(scale=0.5):
            tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", len(y)):
            with handlers.reparam(config={"theta": LocScaleReparam(0)}):
                theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.deterministic("double", 2 * theta)
            numpyro.factor("soft", -0.1 * theta**2)
            with handlers.mask(mask=sigma > 9.5):
                numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    run = fit(model, autoguide.AutoNormal(model), (y, sigma), "elbo", steps=3, **WHOLE)
    assert_same_elbo(run, model)
    assert {"theta_decentered", "mu", "tau"} <= set(run.posterior(2).values)


def test_nothing_of_the_process_has_changed() -> None:
    """After a fit, and after one that fails."""

    def broken(x: Any) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        raise RuntimeError("on purpose")

    merge = nnx.merge
    before = (jax.config.jax_enable_x64, numpyro.distributions.distribution.validation_enabled)  # type: ignore[attr-defined]
    with pytest.raises(ProgramError, match="RuntimeError: on purpose"):
        fit(local_model, broken, rows(4, 1)[:, 0], "elbo", steps=1, **WHOLE)
    fit(local_model, autoguide.AutoNormal(local_model), rows(4, 1)[:, 0], "elbo", steps=1, **WHOLE)
    after = (jax.config.jax_enable_x64, numpyro.distributions.distribution.validation_enabled)  # type: ignore[attr-defined]
    assert before == after
    assert nnx.merge is merge
    assert not numpyro.primitives._PYRO_STACK


def test_a_number_is_observed_as_it_is() -> None:
    """A program without data may observe a Python number."""

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=1.5)

    def guide() -> None:
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.2), 0.7))

    run = fit(model, guide, None, "elbo", steps=2, backend="numpyro", estimator="dreg")
    assert run.posterior(3).values["z"].shape == (3, 1)
