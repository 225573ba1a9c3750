"""An accelerator gives the CPU's numbers, and no step waits for it. Without one there is nothing to test here."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_lvm import Fit, fit, legality, program, programs
from ppl_lvm.backends import load
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.numpyro import NumPyroBound, precision
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.catalogue import resolve
from ppl_lvm.objectives.elbo import elbo

THERE = {"pyro": torch.cuda.is_available(), "numpyro": jax.default_backend() != "cpu"}
on_both = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.skipif(not there, reason="no accelerator")) for b, there in THERE.items()],
)
DISCRETE = {"discrete_vae": "score", "hmm": "score", "joint_vae": "score", "poglm": "score"}


def bound(name: str, backend: str, data: Any) -> Any:
    kind: Any = PyroBound if backend == "pyro" else NumPyroBound
    return kind(program(name), Call.of(data), seed=0, dtype="float64")


def example(name: str) -> Any:
    make = program(name).example
    assert make is not None
    return make(np.random.default_rng(0))


def numbers(name: str, backend: str, device: str, given: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Values of the sites, and loss and gradients where those are given."""
    data, objective = example(name), elbo(draws=2, outer=2)
    with load(backend).on(device), precision("float64"):
        here = bound(name, backend, data)
        estimator: Any = resolve("estimator", DISCRETE.get(name, "pathwise"), Path(), "the test")()
        plan = legality.plan(objective, {"*": estimator}, here.structure)[0]
        batch = here.batch(Call.of(data))
        as_array: Any = jnp.asarray if backend == "numpyro" else torch.tensor  # on the default device, both
        values = {n: as_array(v) for n, v in given.items()}

        def drawn(params: Any, key: Any) -> Any:
            return {n: s.value for n, s in here.draws(params, batch, key, plan, values=values).sites.items()}

        def gradients(params: Any, key: Any) -> Any:
            found = here.gradients(params, batch, key, plan, objective, values=values)
            return found.loss, found.params

        call = gradients if given else drawn
        if backend == "numpyro":
            found = jax.jit(call)(here.initial, jax.random.key(3))
            devices = {d.platform for leaf in jax.tree.leaves(found) for d in leaf.devices()}
            assert devices == {device}
            return jax.tree.map(np.asarray, found), here.structure
        found = call(here.initial, 3)
        leaves = torch.utils._pytree.tree_leaves(found)
        assert {leaf.device.type for leaf in leaves} == {device.replace("gpu", "cuda")}
        return torch.utils._pytree.tree_map(lambda t: t.detach().cpu().numpy(), found), here.structure


@on_both
@pytest.mark.parametrize("name", programs())
def test_losses_and_gradients_are_those_of_the_cpu(name: str, backend: str) -> None:
    values, structure = numbers(name, backend, "cpu", {})
    latent = {n: v for n, v in values.items() if structure.sites[n].role != "observed" and structure.sites[n].in_guide}
    (loss, gradient), _ = numbers(name, backend, "cpu", latent)
    (there, found), _ = numbers(name, backend, "gpu", latent)
    np.testing.assert_allclose(there, loss, rtol=1e-10, atol=1e-10)
    assert found.keys() == gradient.keys()
    for n, expected in gradient.items():
        np.testing.assert_allclose(found[n], expected, rtol=1e-9, atol=1e-9, err_msg=n)


def short(backend: str, name: str = "vae", **options: Any) -> Fit:
    rows = np.random.default_rng(1).integers(0, 17, size=(64, 5)).astype(float)
    settings: dict[str, Any] = {"steps": 40, "batch_size": 16, "dtype": "float64", "device": "gpu", "compile": "eager"}
    return fit(program(name), data=rows, backend=backend, **(settings | options))


@on_both
@pytest.mark.parametrize("mode", ["graph", "compiled", "auto"])
def test_a_fit_is_the_same_however_its_steps_are_compiled(backend: str, mode: str) -> None:
    if backend == "numpyro" and mode == "graph":
        mode = "compiled"
    plain: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1e-4}
    eager, other = short(backend, **plain), short(backend, compile=mode, **plain)
    np.testing.assert_allclose(other.history["loss"], eager.history["loss"], rtol=1e-9)
    for n, value in eager.params.items():
        np.testing.assert_allclose(other.params[n], value, rtol=1e-8, atol=1e-10, err_msg=n)


@on_both
@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "iwae"},
        {"recipe": "vis"},
        {"name": "discrete_vae", "recipe": "elbo", "estimator": "reinmax"},
        {"name": "discrete_vae", "recipe": "elbo", "estimator": "gumbel_softmax"},
        {"name": "discrete_vae", "recipe": "elbo_rloo"},
        {"recipe": "elbo", "validation": 0.25},
        {"recipe": "elbo", "dtype": "float32"},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_fits_their_states_and_posteriors(backend: str, options: dict[str, Any]) -> None:
    run = short(backend, steps=30, **options)
    assert np.isfinite(run.history["loss"]).all()
    whole = short(backend, steps=60, **options)
    again = short(backend, steps=60, state=run.state, **options)
    for n, value in whole.state.arrays.items():
        np.testing.assert_array_equal(again.state.arrays[n], value, err_msg=n)
    data = np.random.default_rng(1).integers(0, 17, size=(64, 5)).astype(float)
    assert np.isfinite(run.log_likelihood(data, draws=20).values).all()
    assert set(run.to_arviz(draws=10, data=data).children) >= {"posterior", "observed_data"}


@pytest.mark.skipif(not THERE["pyro"], reason="no accelerator")
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_no_step_waits_for_the_accelerator(mode: str) -> None:
    """What makes the host wait is counted by PyTorch itself: more steps between two looks, no more of it."""

    def waits(steps: int) -> int:
        short("pyro", steps=steps, compile=mode, check_every=1000)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                short("pyro", steps=steps, compile=mode, check_every=1000)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum(bool(re.search("synchronizing CUDA", str(w.message))) for w in seen)

    few, many = waits(20), waits(60)
    assert few and many == few
