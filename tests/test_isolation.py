"""Fits beside each other, in threads and processes, and what a call leaves behind: nothing.

`process()` is all that is global. Threads are compared with serial runs bit by bit, with fresh functions each time, so
that every step is traced anew while the others run.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from typer.testing import CliRunner

from ppl_lvm import Fit, State, cli, fit, load, numpyro_loss, program, pyro_loss, refit, to_pyro
from ppl_lvm.errors import PplLvmError, ProgramError, StorageError
from ppl_lvm.program import Program

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
    # Made without a draw: this is no part of a fit, so other threads' generators are not the engine's to guard here.
    # Nor is the default dtype, which a fit of another thread may have set to its own.
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 1, 1, dtype=torch.float32)
    torch.nn.init.constant_(layer.weight, 0.3)
    torch.nn.init.constant_(layer.bias, -0.2)

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
    return {**trained(run), **values, "likelihood": run.log_likelihood(draws=4, seed=3).values}


def trained(run: Fit) -> Arrays:
    return {**run.params, **run.history}


def one_fit(
    program: Program, backend: Backend, dtype: str, compile: str, seed: int, look: Callable[[Fit], Arrays] = found
) -> Arrays:
    options: dict[str, Any] = {"steps": 12, "batch_size": 3}
    options |= {"guide": "auto_normal"} if program.guide is None else {"estimator": {"c": "score"}}
    return look(
        fit(program, data=X, recipe="elbo", backend=backend, dtype=dtype, compile=compile, seed=seed, **options)
    )


def native_fit(seed: int) -> Arrays:
    options: dict[str, Any] = {"steps": 12, "batch_size": None, "compile": "eager"}
    return found(fit(*torch_model(), torch.as_tensor(X), "elbo", dtype="float64", seed=seed, **options))


def map_fit(backend: Backend) -> Arrays:
    run = fit(small(), data=X, recipe={"method": {"name": "map", "steps": 5}}, backend=backend, dtype="float64")
    return trained(run)


def small() -> Program:
    """One global latent, which compiles quickly."""

    def model(ppl: Ppl, x: Array) -> None:
        g = ppl.sample("g", ppl.dist.Normal(0.0, ppl.param("scale", 0.8, ppl.dist.constraints.positive)))
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(g, 1.0), obs=x)

    return Program("small", model, None, portable=True, arguments=("x",))


JOBS: list[Callable[[], Arrays]] = [
    lambda: one_fit(toy(), "pyro", "float64", "eager", 0),
    lambda: one_fit(small(), "numpyro", "float32", "compiled", 1, trained),
    lambda: one_fit(toy(), "pyro", "float32", "graph", 2),
    lambda: one_fit(small(), "numpyro", "float64", "compiled", 3, trained),
    lambda: native_fit(4),
    lambda: map_fit("pyro"),
]
MORE: list[Callable[[], Arrays]] = [
    *JOBS,
    lambda: one_fit(small(), "numpyro", "float32", "compiled", 1),
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


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_threads_ask_one_fit(backend: Backend) -> None:
    options: dict[str, Any] = {"steps": 2, "compile": "eager", "guide": "auto_normal"}
    run = fit(small(), data=X, recipe="elbo", backend=backend, **options)
    other = np.concatenate([X, X]) + 0.5

    def posterior() -> Arrays:
        drawn = run.posterior(3, other, seed=5)
        return {**drawn.values, "log_p": drawn.log_p, "log_q": drawn.log_q}

    asked: list[Callable[[], Arrays]] = [posterior, lambda: run.predictive(3, seed=2)]
    expected = [job() for job in asked]
    for serial, result in zip(expected * 4, at_once(asked * 4, 4), strict=True):
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
        "jax here": (jax.config.values["jax_enable_x64"], jax.typeof(jnp.zeros(1)), jax.default_backend()),
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


class Boom(Exception):
    """What a program of somebody's raises in the middle of a run."""


class Halt(BaseException):
    """As an interrupt from the keyboard is, which no `except Exception` sees."""


ARMED: list[type[BaseException]] = []


def explosive() -> Program:
    """Raises inside plates, after sites, where it is armed."""

    def model(ppl: Ppl, x: Array) -> None:
        g = ppl.sample("g", ppl.dist.Normal(0.0, ppl.param("scale", 0.8, ppl.dist.constraints.positive)))
        with ppl.plate("data", len(x)):
            if ARMED:
                raise ARMED[0]("a bug in the program")
            ppl.sample("x", ppl.dist.Normal(g, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        ppl.sample("g", ppl.dist.Normal(ppl.param("loc", 0.1), 0.5))

    return Program("explosive", model, guide, portable=True, arguments=("x",))


EAGER: dict[str, Any] = {"recipe": "elbo", "steps": 2, "compile": "eager", "batch_size": None}
OTHER = X[:5]
"""Other rows than a fit's, for which everything runs anew."""
HOLED = np.where(np.arange(len(OTHER)) == 1, np.nan, OTHER)



def saved(run: Fit) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run.posterior(2, OTHER)
        run.save(Path(folder) / "fit")


def written(run: Fit) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run.write_posterior(Path(folder) / "posterior.nc", 2, OTHER)


OF_A_FIT: dict[str, Callable[[Fit], Any]] = {
    "active_units": lambda run: run.active_units(draws=2, data=OTHER),
    "conditional": lambda run: run.conditional({"g": 0.1}, data=OTHER, draws=2, particles=3),
    "decode": lambda run: run.decode({"g": 0.1}, data=OTHER),
    "do": lambda run: run.do({"g": 0.1}, data=OTHER, draws=2),
    "encode": lambda run: run.encode(OTHER, draws=2),
    "impute": lambda run: run.impute(HOLED, draws=2, particles=3),
    "log_likelihood": lambda run: run.log_likelihood(OTHER, draws=2),
    "loo": lambda run: run.loo(200, OTHER),
    "pointwise": lambda run: run.pointwise(2, OTHER),
    "posterior": lambda run: run.posterior(2, OTHER),
    "predictive": lambda run: run.predictive(2, OTHER),
    "prior_predictive": lambda run: run.prior_predictive(2, data=OTHER),
    "to_arviz": lambda run: run.to_arviz(2, OTHER, prior=2),
    "save": saved,
    "write_posterior": written,
    "without_data": lambda run: run.without_data().posterior(2, OTHER),
}


def public(kind: type) -> set[str]:
    return {n for n, f in inspect.getmembers(kind, inspect.isfunction) if not n.startswith("_")}


def test_every_method_of_a_fit_is_looked_at() -> None:
    assert set(OF_A_FIT) == public(Fit), "say in OF_A_FIT how the method is called"


def test_what_is_global_is_seen_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    pyro.clear_param_store()
    before = process()
    checked = before["numpyro checks"][0]
    changed: dict[str, Callable[[], Any]] = {
        "environment": lambda: monkeypatch.setenv("PPL_LVM_TEST", "1"),
        "torch random": lambda: torch.rand(1),
        "numpy random": lambda: np.random.rand(),
        "random": random.random,
        "torch defaults": lambda: torch.set_default_dtype(torch.float64),
        "torch modes": lambda: torch.set_grad_enabled(False),
        "pyro store": lambda: pyro.param("mine", torch.tensor(1.0)),
        "jax settings": lambda: jax.config.update("jax_enable_x64", True),
        "numpyro checks": lambda: numpyro.enable_validation(not checked),
        "warning filters": lambda: warnings.simplefilter("ignore"),
    }
    with warnings.catch_warnings(), torch.random.fork_rng():
        try:
            for name, change in changed.items():
                change()
                assert name in changes(before), name
        finally:
            torch.set_default_dtype(before["torch defaults"][0])
            torch.set_grad_enabled(True)
            del pyro.get_param_store()["mine"]
            jax.config.update("jax_enable_x64", False)
            numpyro.enable_validation(checked)
            random.setstate(before["random"])


FEW = ("posterior", "predictive", "log_likelihood")
"""Methods that are also called to their end in the fast tests; on NumPyro each is compiled for it."""


@pytest.mark.parametrize(
    ("backend", "ended"),
    [("pyro", tuple(OF_A_FIT)), ("numpyro", FEW), pytest.param("numpyro", tuple(OF_A_FIT), marks=pytest.mark.slow)],
)
def test_a_call_leaves_nothing_behind(backend: Backend, ended: tuple[str, ...], tmp_path: Path) -> None:
    options = {"backend": backend, **EAGER}
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(1.5))
    run = fit(explosive(), data=X, **options)
    if "loo" in ended:
        run.loo(200)  # imports libraries, which set things up when they are
    before = process()

    def stopped(name: str, call: Callable[[], Any]) -> None:
        for kind in (Boom, Halt):
            ARMED[:] = [kind]
            try:
                with pytest.raises(ProgramError if kind is Boom else kind, match="a bug in the program"):
                    call()
            finally:
                ARMED.clear()
            assert changes(before) == {}, f"{name} under {kind.__name__}"

    def interrupted(_: Any) -> None:
        raise Halt

    for how in ({"seed": 3}, {"dtype": "float64"}, {"device": "cpu"}):
        if "dtype" not in how or len(ended) > len(FEW):
            fit(explosive(), data=X, **how, **options)
            assert changes(before) == {}, how
        stopped(f"fit {how}", lambda how=how: fit(explosive(), data=X, **how, **options))  # type: ignore[misc]
    with pytest.raises(Halt):
        fit(explosive(), data=X, callbacks=[interrupted], check_every=1, **options)
    assert changes(before) == {}, "a callback"
    for name, call in OF_A_FIT.items():
        if name in ended:
            call(run)
            assert changes(before) == {}, name
        new = fit(explosive(), data=X, **options)  # of which nothing was traced before
        stopped(name, lambda call=call, new=new: call(new))  # type: ignore[misc]
    run.state.save(tmp_path / "state")
    State.load(tmp_path / "state")
    with pytest.raises(PplLvmError):
        State.load(Path(__file__))
    assert changes(before) == {}, "State"
    pyro.clear_param_store()


# The same of what is no method of a fit: refits, files, the libraries' own loops, the command line.

MINE = '''
from pathlib import Path

recipe = "elbo"


def model(ppl, x):
    scale = ppl.param("scale", 0.8, constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x[..., 0], scale))
        if Path({armed!r}).exists():
            raise {{"Boom": ValueError, "Halt": KeyboardInterrupt}}[Path({armed!r}).read_text()]("a bug in the program")
        ppl.sample("x", ppl.dist.Normal(z[..., None] + 0.0 * x, 1.0).to_event(1), obs=x)


def guide(ppl, x):
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(ppl.param("loc", 0.1) + 0.0 * x[..., 0], 0.5))
'''
"""A program in a file, which raises while there is a file that says how."""


def mine(folder: Path) -> tuple[Path, Path]:
    """Its path, and that of the file that arms it; beside them rows."""
    path, armed = folder / "mine.py", folder / "armed"
    path.write_text(MINE.format(armed=str(armed)))
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(20, 2)))
    return path, armed


def local() -> Program:
    """A latent for every row; raises where it is armed."""

    def model(ppl: Ppl, x: Array) -> None:
        scale = ppl.param("scale", 0.8, ppl.dist.constraints.positive)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x, scale))
            if ARMED:
                raise ARMED[0]("a bug in the program")
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    return Program("local", model, None, portable=True, arguments=("x",))


def leaves_nothing(name: str, call: Callable[[], Any], errors: Sequence[Callable[[], Any]] = ()) -> None:
    """The call and its errors; the first time it may import libraries, which set these things when they are."""
    before = process()
    call()
    assert changes(before).keys() <= {"environment", "warning filters"}, name
    before = process()
    call()
    assert changes(before) == {}, name
    for i, error in enumerate(errors):
        error()
        assert changes(before) == {}, f"{name}, error {i}"


def refused(kind: Any, match: str, call: Callable[[], Any]) -> Callable[[], None]:
    def error() -> None:
        with pytest.raises(kind, match=match):
            call()

    return error


def under(arm: Callable[[str], None], call: Callable[[], Any], kinds: Mapping[str, Any]) -> list[Callable[[], None]]:
    """The call in a program that raises, by what it then raises."""

    def error(name: str, kind: Any) -> None:
        arm(name)
        try:
            with pytest.raises(kind, match="a bug in the program"):
                call()
        finally:
            arm("")

    return [partial(error, name, kind) for name, kind in kinds.items()]


def arm(name: str) -> None:
    ARMED[:] = [{"Boom": Boom, "Halt": Halt}[name]] if name else []


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_a_refit_and_files_leave_nothing_behind(backend: Backend, tmp_path: Path) -> None:
    run = fit(local(), data=X, backend=backend, guide="auto_normal", **EAGER)
    again = partial(refit, run, OTHER, steps=2, compile="eager")
    leaves_nothing("refit", again, under(arm, again, {"Boom": ProgramError, "Halt": Halt}))

    path, armed = mine(tmp_path)
    rows = np.load(tmp_path / "rows.npy")
    run = fit(program(path), data=rows, backend=backend, **EAGER)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine")
    leaves_nothing(
        "save",
        lambda: run.save(tmp_path / "fit", overwrite=True),
        [refused(StorageError, "letter", lambda: run.save(taken))],
    )

    def arm_file(name: str) -> None:
        armed.unlink() if not name else armed.write_text(name)

    def loaded() -> Fit:
        return load(tmp_path / "fit", program=path)

    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "fit", broken)
    (broken / "manifest.json").write_bytes((tmp_path / "fit" / "manifest.json").read_bytes()[:-9])
    errors = under(arm_file, loaded, {"Boom": PplLvmError, "Halt": KeyboardInterrupt})
    errors += [
        refused(StorageError, "manifest", lambda: load(broken, program=path)),
        refused(PplLvmError, "pass program", lambda: load(tmp_path / "fit")),
    ]
    leaves_nothing("load", loaded, errors)


def test_the_loop_of_pyro_is_left_to_it() -> None:
    """Its parameters and the generator that SVI draws from are the loop's own; all else stays."""
    pyro.clear_param_store()

    def model(x: Any) -> None:
        g = pyro.sample("g", pyro.distributions.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            if ARMED:
                raise ARMED[0]("a bug in the program")
            pyro.sample("x", pyro.distributions.Normal(g, 1.0), obs=x)

    def guide(x: Any) -> None:
        pyro.sample("g", pyro.distributions.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    x = torch.as_tensor(X, dtype=torch.float32)
    pyro.param("loc", torch.tensor(0.1))
    with torch.random.fork_rng():
        svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.0}), loss=pyro_loss("elbo"))

        def kept(call: Callable[[], Any]) -> Callable[[], Any]:
            def called() -> None:
                with torch.random.fork_rng():
                    call()

            return called

        for name, call in {"step": svi.step, "evaluate_loss": svi.evaluate_loss}.items():
            errors = under(arm, kept(partial(call, x)), {"Boom": (Boom, ProgramError), "Halt": Halt})
            errors += under(arm, kept(partial(call, x[:4])), {"Boom": (Boom, ProgramError), "Halt": Halt})
            leaves_nothing(name, kept(partial(call, x)), errors)
        run = fit(model, guide, x, **EAGER)
        to_pyro(run)  # which is to write to the store
        leaves_nothing("to_pyro", lambda: to_pyro(run))
    other = fit(explosive(), data=X, backend="pyro", **EAGER)
    leaves_nothing("to_pyro, refused", refused(ProgramError, "only native programs", lambda: to_pyro(other)))
    pyro.clear_param_store()


def test_the_loop_of_numpyro_is_left_to_it() -> None:
    def model(x: Any) -> None:
        g = numpyro.sample("g", numpyro.distributions.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            if ARMED:
                raise ARMED[0]("a bug in the program")
            numpyro.sample("x", numpyro.distributions.Normal(g, 1.0), obs=x)

    def guide(x: Any) -> None:
        numpyro.sample("g", numpyro.distributions.Normal(numpyro.param("loc", 0.1), 0.5))

    x = jnp.asarray(X)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.SGD(0.1), numpyro_loss("elbo"))
    state = svi.init(jax.random.key(0), x)
    for name, call in {"update": svi.update, "evaluate": svi.evaluate}.items():
        errors = under(arm, partial(call, state, x[:4]), {"Boom": (Boom, ProgramError), "Halt": Halt})
        leaves_nothing(name, partial(call, state, x), errors)


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_the_command_line_leaves_nothing_behind(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, armed = mine(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    count = itertools.count()

    def command(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, arguments, prog_name="ppl-lvm")

    def fine(*arguments: str) -> None:
        found = command(*arguments)
        assert found.exit_code == 0, found.output

    def wrong(said: str, *arguments: str) -> None:
        found = command(*arguments)
        assert found.exit_code not in (0, None) and said in found.output, found.output

    def fitted(*rest: str) -> tuple[str, ...]:
        short = ("--set", "steps=2", "--set", "batch_size=5", "--draws", "7", "--compile", "eager")
        names = ("--out", f"run{next(count)}", "--checkpoint", f"kept{next(count)}")
        return ("fit", "mine.py", "--data", "rows.npy", "--backend", backend, *short, *names, *rest)

    def armed_by(name: str, *arguments: str) -> None:
        armed.write_text(name)
        try:
            found = command(*arguments)
        finally:
            armed.unlink()
        assert found.exit_code != 0
        assert "a bug in the program" in found.output or name == "Halt", found.output

    fine(*fitted()[:-4], "--out", "a", "--checkpoint", "b")
    evaluated = ("evaluate", "a", "--data", "rows.npy", "--program", "mine.py", "--draws", "7")
    leaves_nothing(
        "fit",
        lambda: fine(*fitted()),
        [
            lambda: armed_by("Boom", *fitted()),
            lambda: armed_by("Halt", *fitted()),
            lambda: wrong("Unknown recipe", *fitted("--recipe", "nothing")),
            lambda: wrong("stepz", *fitted("--set", "stepz=1")),
        ],
    )
    resumed = [lambda: armed_by("Boom", "resume", "b"), lambda: wrong("no checkpoint", "resume", "elsewhere")]
    leaves_nothing("resume", lambda: fine("resume", "b"), resumed)
    asked = [lambda: armed_by("Boom", *evaluated), lambda: wrong("", "evaluate", "elsewhere")]
    leaves_nothing("evaluate", lambda: fine(*evaluated), asked)
    leaves_nothing("list", lambda: fine("list", "recipes"), [lambda: wrong("", "show", "recipe", "nothing")])
