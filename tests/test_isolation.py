"""Fits beside each other, in threads and processes, and what a call leaves behind: nothing.

`process()` is all that is global. Threads are compared with serial runs bit by bit, with fresh functions each time, so
that every step is traced anew while the others run.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from toys import Array, Backend, Ppl

import ppl_lvm
from ppl_lvm import Fit, State, fit, numpyro_loss, pyro_loss, refit, to_pyro
from ppl_lvm.errors import PplLvmError
from ppl_lvm.program import Program
from ppl_lvm.sampled import Sampled

ROOT = Path(__file__).resolve().parents[1]
X = np.array([0.4, -1.1, 0.9, 1.6, -0.2, 0.7])
Arrays = Mapping[str, np.ndarray]


def toy() -> Program:
    """A global and a local latent, a local class, a network; functions of its own, so that nothing of it is cached."""

    def model(ppl: Ppl, x: Array) -> None:
        scale = ppl.param("scale", 0.8, ppl.dist.constraints.positive)
        g = ppl.sample("g", ppl.dist.Normal(0.0 * scale, 1.0))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(g, scale))
            c = ppl.sample("c", ppl.dist.Bernoulli(probs=0.3 + 0.0 * scale))
            ppl.sample("x", ppl.dist.Normal(z + c, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("loc", 0.2)
        ppl.sample("g", ppl.dist.Normal(loc, 1.0))
        with ppl.plate("data", len(x)):
            code = ppl.module("encoder", ppl.nets.MLP(1, 1, hidden=(3,)))(x[..., None])[..., 0]
            ppl.sample("z", ppl.dist.Normal(loc + code, 0.8))
            ppl.sample("c", ppl.dist.Bernoulli(logits=0.5 * code))

    return Program("toy", model, guide, portable=True, arguments=("x",))


def torch_model() -> tuple[Any, Any]:
    """A native program of Pyro with a module, whose tensors every run swaps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.Linear(1, 1)

    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(layer(x[..., None])[..., 0], 0.8))

    return model, guide


def found(run: Fit) -> Arrays:
    """What a fit gives, evaluations included."""
    drawn = run.posterior(3, seed=1)
    values = {f"value {n}": v for n, v in drawn.values.items()} | {"log_p": drawn.log_p, "log_q": drawn.log_q}
    values |= {f"predictive {n}": v for n, v in run.predictive(3, seed=2).items()}
    return {**run.params, **run.history, **values, "likelihood": run.log_likelihood(draws=4, seed=3).values}


def one_fit(program: Program, backend: Backend, dtype: str, compile: str, seed: int) -> Arrays:
    options: dict[str, Any] = {"steps": 12, "batch_size": 3}
    options |= {"guide": "auto_normal"} if program.guide is None else {"estimator": {"c": "score"}}
    return found(
        fit(program, data=X, recipe="elbo", backend=backend, dtype=dtype, compile=compile, seed=seed, **options)
    )


def native_fit(seed: int) -> Arrays:
    options: dict[str, Any] = {"steps": 12, "batch_size": None, "compile": "eager"}
    return found(fit(*torch_model(), torch.as_tensor(X), "elbo", dtype="float64", seed=seed, **options))


def map_fit(backend: Backend) -> Arrays:
    run = fit(small(), data=X, recipe={"method": {"name": "map", "steps": 5}}, backend=backend, dtype="float64")
    return {**run.params, **run.history}


def small() -> Program:
    """One global latent, which compiles quickly."""

    def model(ppl: Ppl, x: Array) -> None:
        g = ppl.sample("g", ppl.dist.Normal(0.0, ppl.param("scale", 0.8, ppl.dist.constraints.positive)))
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(g, 1.0), obs=x)

    return Program("small", model, None, portable=True, arguments=("x",))


JOBS: list[Callable[[], Arrays]] = [
    lambda: one_fit(toy(), "pyro", "float64", "eager", 0),
    lambda: one_fit(small(), "numpyro", "float32", "compiled", 1),
    lambda: one_fit(toy(), "pyro", "float32", "graph", 2),
    lambda: one_fit(small(), "numpyro", "float64", "compiled", 3),
    lambda: native_fit(4),
    lambda: map_fit("pyro"),
]
MORE: list[Callable[[], Arrays]] = [
    *JOBS,
    lambda: one_fit(toy(), "numpyro", "float64", "compiled", 5),
    lambda: one_fit(toy(), "numpyro", "float32", "eager", 6),
    lambda: one_fit(toy(), "pyro", "float64", "compiled", 7),
    lambda: map_fit("numpyro"),
]


def at_once(jobs: list[Callable[[], Any]], threads: int) -> list[Any]:
    """The results of jobs in threads that begin together and change turns as often as they can."""
    results: list[Any] = [None] * len(jobs)
    begin, todo = threading.Barrier(threads), iter(enumerate(jobs))
    guard = threading.Lock()

    def work() -> None:
        begin.wait()
        while True:
            with guard:
                number, job = next(todo, (-1, jobs[0]))
            if number < 0:
                return
            try:
                results[number] = job()
            except BaseException as error:
                results[number] = error

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        each = [threading.Thread(target=work) for _ in range(threads)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def assert_same_bits(first: Arrays, second: Arrays) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.asarray(value).dtype == np.asarray(second[name]).dtype, name
        assert np.array_equal(value, second[name]), name


def test_fits_in_threads_are_those_of_one_thread() -> None:
    serial, before = [job() for job in JOBS], process()
    for expected, result in zip(serial, at_once(JOBS, 4), strict=True):
        assert_same_bits(expected, result)
    assert changes(before) == {}


@pytest.mark.slow
def test_many_fits_in_threads_are_those_of_one_thread() -> None:
    serial, before = [job() for job in MORE], process()
    for expected, result in zip(serial * 5, at_once(MORE * 5, 4), strict=True):
        assert_same_bits(expected, result)
    assert changes(before) == {}


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_threads_ask_one_fit(backend: Backend) -> None:
    options: dict[str, Any] = {"steps": 2, "compile": "eager", "guide": "auto_normal"}
    run = fit(small(), data=X, recipe="elbo", backend=backend, **options)
    other = np.concatenate([X, X]) + 0.5

    def posterior() -> Arrays:
        drawn = run.posterior(3, other, seed=5)
        return {**drawn.values, "log_p": drawn.log_p, "log_q": drawn.log_q}

    asked: list[Callable[[], Arrays]] = [
        posterior,
        lambda: run.predictive(3, seed=2),
        lambda: {"likelihood": run.log_likelihood(other, draws=4, seed=3).values},
        lambda: run.do({"g": 0.3}, rows=2, draws=3),
    ]
    expected = [job() for job in asked]
    for serial, result in zip(expected * 3, at_once(asked * 3, 3), strict=True):
        assert_same_bits(serial, result)


# What a call leaves behind.


def process() -> dict[str, Any]:
    """All that is global, by name: of Python, of NumPy, of torch and Pyro, of JAX and NumPyro, of flax."""
    store, hooks = pyro.get_param_store(), torch.nn.modules.module
    torch_config = (torch.get_default_dtype(), torch.get_default_device(), torch.utils._device.CURRENT_DEVICE)
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "search path": list(sys.path),
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)},
        "warning filters": list(warnings.filters),
        "warnings shown by": warnings.showwarning,
        "exceptions shown by": (sys.excepthook, threading.excepthook),
        "threads": {t.name for t in threading.enumerate()},
        "open files": _open_files(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "random": random.getstate(),
        "numpy random": repr(np.random.get_state(legacy=False)),
        "numpy settings": (np.geterr(), np.get_printoptions()),
        "torch random": torch.get_rng_state().tolist(),
        "torch defaults": torch_config,
        "torch modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "torch threads": (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
        "torch function modes": torch._C._len_torch_function_stack(),
        "torch checks": torch.distributions.Distribution._validate_args,
        "torch modules": (torch.nn.Module.named_parameters, list(hooks._global_forward_pre_hooks.values())),
        "pyro store": {n: (id(store._params[n]), v.tolist()) for n, v in store.items()},
        "pyro tables": {n: id(v) for n, v in store.__dict__.items()},
        "pyro handlers": list(pyro.poutine.runtime._PYRO_STACK),
        "pyro dimensions": list(pyro.poutine.runtime._DIM_ALLOCATOR._stack),
        "pyro checks": (pyro.infer.util.is_validation_enabled(), pyro.poutine.util.is_validation_enabled()),
        "pyro settings": pyro.settings.get(),
        "jax settings": dict(jax.config.values),
        "jax here": (jax.config.jax_enable_x64, jax.config.jax_default_device, jnp.zeros(1).dtype),
        "numpyro handlers": list(numpyro.primitives._PYRO_STACK),
        "numpyro checks": (
            numpyro.distributions.distribution._VALIDATION_ENABLED,
            numpyro.distributions.Distribution._validate_args,
        ),
        "flax": (flax.nnx.merge, len(flax.linen.module._global_interceptor_stack._storage)),
    }


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def changes(before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is otherwise than it was, with both values."""
    return {n: (before[n], v) for n, v in process().items() if v != before[n]}
