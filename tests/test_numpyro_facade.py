"""`numpyro_loss` in NumPyro's own SVI: values and gradients are the engine's, the state of networks goes on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO

from ppl_lvm import numpyro_loss
from ppl_lvm.backends._numpyro_handlers import precision
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.numpyro import NumPyroBound
from ppl_lvm.errors import LegalityError, RecipeError
from ppl_lvm.legality import plan
from ppl_lvm.program import Program
from ppl_lvm.recipe import recipe

QUICK = {"xla_backend_optimization_level": 0}


def model(x: Any) -> None:
    weight = numpyro.param("weight", jnp.ones((2, 3)))
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(mu * jnp.ones(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)


def guide(x: Any) -> None:
    loc, slope = numpyro.param("loc", 0.1), numpyro.param("slope", 0.1 * jnp.ones((3, 2)))
    scale = numpyro.param("scale", 0.7, constraint=dist.constraints.positive)
    numpyro.sample("mu", dist.Normal(loc, 0.5))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(x @ slope, scale).to_event(1))


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("elbo", {}),
        ("iwae", {"draws": 3, "estimator": {"mu": "score", "z": "dreg"}}),
        pytest.param(
            *("iwae", {"draws": 3, "outer": 2, "estimator": {"mu": "rloo", "z": "vimco"}}), marks=pytest.mark.slow
        ),
    ],
    ids=["elbo", "iwae-dreg", "iwae-vimco"],
)
def test_value_and_gradient_are_the_engines(name: str, options: dict[str, Any]) -> None:
    """At one key, the loss in nats and the gradient of every group of unconstrained parameters."""
    how = recipe(name, **options)
    objective = how.objective
    assert objective is not None
    loss = numpyro_loss(name, **options)
    with precision("float64"):
        x = jnp.asarray(rows())
        bound = NumPyroBound(Program.from_callables(model, guide), Call((x,)), seed=0, dtype="float64")
        assert how.objective is not None
        chosen, _ = plan(how.objective, how.estimator, bound.structure)
        key = jax.random.key(7)
        svi = SVI(model, guide, numpyro.optim.Adam(0.1), loss)
        svi.init(jax.random.key(0), x)

        def ours(params: Any) -> Any:
            found = bound.gradients(params, Call((x,)), key, chosen, objective)
            return found.loss, found.params

        def theirs(params: Any) -> Any:
            return loss.loss(key, svi.constrain_fn(params), model, guide, x)

        wanted = jax.jit(ours, compiler_options=QUICK)(bound.initial)
        found = jax.jit(jax.value_and_grad(theirs), compiler_options=QUICK)(bound.initial)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-10)
    assert found[1].keys() == wanted[1].keys()
    for parameter, gradient in wanted[1].items():
        np.testing.assert_allclose(found[1][parameter], gradient, rtol=0, atol=1e-10, err_msg=parameter)
        assert np.abs(gradient).max() > 1e-6


class Encoder(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.linear, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.drop(self.norm(self.linear(x)))


def test_svi_carries_the_state_of_networks() -> None:
    """init, update, evaluate and run: statistics are moved once a step with K = 4, dropout's noise is new each time."""
    eager = Encoder()

    def amortised(x: Any) -> None:
        code = nnx_module("encoder", eager)(x)
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(code[:, :2], jnp.exp(code[:, 2:])).to_event(1))

    x = jnp.asarray(rows(), jnp.float32)
    svi = SVI(model, amortised, numpyro.optim.SGD(0.0), numpyro_loss("iwae", draws=4))
    state = svi.init(jax.random.key(0), x)
    first = state.mutable_state["encoder$state"]["state"]["norm"]  # init runs the program once
    update = jax.jit(svi.update)
    seen = []
    for _ in range(3):
        state, value = update(state, x)
        seen.append(float(value))
    assert len(set(seen)) == 3
    norm = state.mutable_state["encoder$state"]["state"]["norm"]
    h = np.asarray(eager.linear(x))
    for name, of_batch in (("mean", h.mean(0)), ("var", h.var(0))):
        wanted = 0.9**3 * first[name] + (1 - 0.9**3) * of_batch
        np.testing.assert_allclose(norm[name], wanted, rtol=0, atol=1e-5)
    assert np.isfinite(float(svi.evaluate(state, x)))
    run = svi.run(jax.random.key(1), 2, x, progress_bar=False, init_state=state)
    assert run.losses.shape == (2,)
    assert int(run.state.mutable_state["encoder$state"]["state"]["drop"]["rngs"]["count"]) == 6


def test_a_discrete_site_is_trained_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Its logit's gradient is the enumerated one, exactly; Trace_ELBO's is another number."""

    def of_class(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            y = numpyro.sample("y", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(2.0 * y, 1.0), obs=x)

    def classify(x: Any) -> None:
        logit = numpyro.param("logit", 0.2)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=logit * x))

    x = jnp.array([0.5, 2.0, -1.0])
    loss = numpyro_loss("elbo", estimator="enumerate")
    SVI(of_class, classify, numpyro.optim.Adam(0.1), loss).init(jax.random.key(0), x)
    assert not [w for w in recwarn if "discrete latent" in str(w.message)]

    def exact(logit: Any) -> Any:
        q = jax.nn.sigmoid(logit * x)
        terms = [
            p * (dist.Bernoulli(0.3).log_prob(v) + dist.Normal(2.0 * v, 1.0).log_prob(x) - jnp.log(p))
            for v, p in ((0.0, 1 - q), (1.0, q))
        ]
        return -sum(terms).sum()

    def value(kind: Any, logit: Any) -> Any:
        return kind.loss(jax.random.key(0), {"logit": logit}, of_class, classify, x)

    wanted = jax.value_and_grad(exact)(0.2)
    found = jax.value_and_grad(lambda v: value(loss, v))(0.2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert abs(jax.grad(lambda v: value(Trace_ELBO(), v))(0.2) - wanted[1]) > 1e-2


def test_what_svi_has_no_place_for_is_refused() -> None:
    with pytest.raises(RecipeError, match="steps was given to numpyro_loss, but the loop"):
        numpyro_loss("elbo", steps=10)
    with pytest.raises(RecipeError, match=r"'objective.beta'\] are schedules"):
        numpyro_loss("elbo", beta={"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 10})
    loss = numpyro_loss("iwae", draws=3, estimator="enumerate")
    with pytest.raises(LegalityError, match="'mu' under estimator 'enumerate'"):
        loss.loss(jax.random.key(0), {"loc": 0.1}, model, guide, jnp.asarray(rows()))
