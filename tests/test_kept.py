"""Nothing lost: what a step leaves beside parameters, through checkpoints and skips; the run before an error."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pytest
import torch
from flax import nnx
from numpyro.contrib.module import nnx_module
from test_checkpoint import ended
from test_memory import run_out
from test_nonfinite import BAD, DENSITY, ROW, SEED, SIZE, STEPS, X, same

from ppl_lvm import Fit, State, backends, checkpoint, fit, pace
from ppl_lvm.errors import NonFiniteError, StorageError, TooLargeError
from ppl_lvm.monitor import Moment, restart_seeds
from ppl_lvm.nonfinite import Cause, Inquiry
from ppl_lvm.pace import Order, Pace


class Net(nnx.Module):
    """Batch statistics and a counter of noise, which every step moves."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(1, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(3, momentum=0.9, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))


NET = Net()


def moving_model(x: Any) -> None:
    w = numpyro.param("w", 0.5)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0 * x, 1.0))
        numpyro.sample("x", dist.Normal(w * z, jnp.abs(x - BAD)), obs=x)


def moving_guide(x: Any) -> None:
    code = nnx_module("encoder", NET)(x[:, None])[:, 0]
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(code, 0.7))


LAYERS = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).eval()


def fixed_model(x: Any) -> None:
    w = pyro.param("w", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", pyro.distributions.Normal(0.0 * x, 1.0))
        pyro.sample("x", pyro.distributions.Normal(w * z, (x - BAD).abs()), obs=x)


def fixed_guide(x: Any) -> None:
    pyro.module("encoder", LAYERS)
    with pyro.plate("data", len(x)):
        pyro.sample("z", pyro.distributions.Normal(LAYERS(x[:, None])[:, 0], 0.7))


@dataclass(frozen=True)
class Case:
    """A fit with a kind of state beside its parameters; `kept` is in the names of its arrays."""

    backend: str
    kept: str | None
    program: tuple[Any, Any] = (DENSITY, None)
    estimator: Any = "auto"

    def run(self, **options: Any) -> Fit:
        mode = "compiled" if self.backend == "numpyro" else "eager"
        settings: dict[str, Any] = {"steps": 12, "batch_size": SIZE, "seed": SEED, "dtype": "float64"}
        settings |= {"recipe": "elbo", "estimator": self.estimator, "learning_rate": 0.05, "compile": mode}
        data = options.pop("data", torch.as_tensor(X) if self.backend == "pyro" else X)
        return fit(*self.program, data, backend=self.backend, **(settings | options))

    def error(self, **options: Any) -> NonFiniteError:
        with pytest.raises(NonFiniteError) as caught:
            self.run(**options)
        return caught.value


AVERAGE, LEARNED = ({"name": "score", "baseline": b} for b in ("moving_average", "linear"))
CASES = {
    "batch statistics": Case("numpyro", "encoder$state", (moving_model, moving_guide)),
    "buffers of modules": Case("pyro", None, (fixed_model, fixed_guide)),
    "a moving average, pyro": Case("pyro", "states", estimator=AVERAGE),
    "a moving average, numpyro": Case("numpyro", "states", estimator=AVERAGE),
    "a learned baseline, pyro": Case("pyro", "own", estimator=LEARNED),
    "a learned baseline, numpyro": Case("numpyro", "own", estimator=LEARNED),
}
MOVING, PLAIN = CASES["batch statistics"], Case("pyro", None)
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
on_both = pytest.mark.parametrize("case", [PLAIN, CASES["a moving average, numpyro"]], ids=lambda c: c.backend)


def part(state: State, kept: str) -> dict[str, np.ndarray]:
    return {n: a for n, a in state.arrays.items() if kept in n}


def same_fit(found: Fit, wanted: Fit) -> None:
    same(found.state, wanted.state)
    assert found.history.keys() == wanted.history.keys()
    for name, values in wanted.history.items():
        np.testing.assert_array_equal(found.history[name], values, err_msg=name)


@pytest.fixture(autouse=True)
def _untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causes are not looked for, which JAX compiles a step for; `test_nonfinite.py` has them."""
    monkeypatch.setattr(Inquiry, "cause", lambda *_: Cause())


@each
def test_a_step_that_is_skipped_leaves_it_as_it_was(case: Case) -> None:
    """Put together from the parts between the steps with the bad row; and it is moved by every other step."""
    whole = case.run(on_nonfinite="skip", steps=STEPS[1] + 2)
    first = case.run(steps=STEPS[0]).state
    second = case.run(steps=STEPS[1], state=replace(first, step=STEPS[0] + 1)).state
    same(whole.state, case.run(steps=STEPS[1] + 2, state=replace(second, step=STEPS[1] + 1)).state)
    if case.kept is not None:
        before, after = part(first, case.kept), part(second, case.kept)
        assert before
        assert any((after[name] != array).any() for name, array in before.items())
        assert all(np.isfinite(array).all() for array in after.values() if array.dtype.kind == "f")


@each
def test_an_error_has_it_as_it_was_before_the_step(case: Case, tmp_path: Path) -> None:
    """So does the checkpoint, from which the same call goes on to the same error, and past it where it is told to."""
    buffers = [b.clone() for b in LAYERS.buffers()]
    error = case.error(checkpoint=tmp_path)
    assert error.step == STEPS[0]
    same(error.state, case.run(steps=STEPS[0]).state)
    assert f"is at step {STEPS[0]}: the same call goes on from there, with on_nonfinite='skip'" in str(error)
    held = checkpoint.newest(tmp_path)
    assert held is not None
    same(held.states[0], error.state)
    again = case.error(checkpoint=tmp_path)
    assert str(again) == str(error)
    same(again.state, error.state)
    on = case.run(checkpoint=tmp_path, on_nonfinite="skip")
    assert f"checkpoint: went on from step {STEPS[0]}" in on.messages
    same_fit(on, case.run(on_nonfinite="skip"))
    assert all(torch.equal(now, before) for now, before in zip(LAYERS.buffers(), buffers, strict=True))


RESTARTS: dict[str, Any] = {"restarts": 2}
EARLY: dict[str, Any] = {"validation": 0.25, "check_every": 2, "patience": 3}


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *[(PLAIN, {}), (PLAIN, RESTARTS), (PLAIN, EARLY), (MOVING, {})],
        *[pytest.param(MOVING, options, marks=pytest.mark.slow) for options in (RESTARTS, EARLY)],
    ],
)
def test_it_goes_through_a_checkpoint(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    """Ended twice, also among steps that are skipped, and with restarts and early stopping, whose best has it too."""
    options = {"every": 2, "on_nonfinite": "skip", **options}
    whole = case.run(**{n: v for n, v in options.items() if n != "every"})
    for writes in (2, 1):
        ended(writes, case.run, checkpoint=tmp_path, **options)
    found = case.run(checkpoint=tmp_path, **options)
    assert "checkpoint: went on from step 4" in found.messages
    same_fit(found, whole)
    for name, value in whole.params.items():
        np.testing.assert_equal(found.params[name], value, err_msg=name)


GOOD = np.where(np.arange(len(X)) == ROW, 0.1, X)


def test_a_fit_and_a_stage_start_from_it() -> None:
    """Statistics go on from those of the fit before: by hand, as the network does not move."""
    options: dict[str, Any] = {"data": GOOD, "learning_rate": 0.0}
    first = MOVING.run(steps=3, **options)
    norm, net = first.params["encoder$state"]["state"]["norm"], first.params["encoder$params"]["first"]
    mean, variance = norm["mean"], norm["var"]
    for index in Order(len(X), SIZE, SEED).batches(0, 2):
        h = GOOD[index][:, None] @ net["kernel"] + net["bias"]
        mean, variance = 0.9 * mean + 0.1 * h.mean(0), 0.9 * variance + 0.1 * h.var(0)
    for start in (first, dict(first.params)):
        found = MOVING.run(steps=2, start=start, **options)
        assert "start: took w, encoder$params, encoder$state" in found.messages
        norm = found.params["encoder$state"]["state"]["norm"]
        np.testing.assert_allclose(norm["mean"], mean, rtol=0, atol=1e-7)
        np.testing.assert_allclose(norm["var"], variance, rtol=0, atol=1e-7)
    recipe = {"objective": "elbo", "batch_size": SIZE, "stages": [{"steps": 3}, {"steps": 2}]}
    recipe["optimizer"] = {"name": "adam", "learning_rate": 0.0}
    staged = fit(*MOVING.program, GOOD, recipe, backend="numpyro", seed=SEED, dtype="float64")
    np.testing.assert_allclose(staged.params["encoder$state"]["state"]["norm"]["mean"], mean, rtol=0, atol=1e-7)


# The run before an error.


BLOCKS = np.random.default_rng(1).normal(size=20)
BLOCKS[[9, 13]] = BAD
"""Batches of four: the third and the fourth of an epoch have a bad row."""


class Loader:
    """Batches in the order of the rows."""

    def __iter__(self) -> Iterator[np.ndarray]:
        return (BLOCKS[i : i + SIZE] for i in range(0, len(BLOCKS), SIZE))


def test_one_step_too_many_in_a_row_is_where_the_fit_goes_on(tmp_path: Path) -> None:
    """A streak with a look at validation in it: with one more allowed, to the bits of a fit that had it at once."""
    options: dict[str, Any] = {"on_nonfinite": "skip", "validation": X[:4], "check_every": 3, "patience": 2}
    error = PLAIN.error(data=Loader(), checkpoint=tmp_path, most_skipped=1, **options)
    assert error.step == 2
    assert "is at step 3: the same call" in str(error)
    assert str(PLAIN.error(data=Loader(), checkpoint=tmp_path, most_skipped=1, **options)) == str(error)
    found = PLAIN.run(data=Loader(), checkpoint=tmp_path, most_skipped=2, **options)
    assert "checkpoint: went on from step 3" in found.messages
    same_fit(found, PLAIN.run(data=Loader(), most_skipped=2, **options))


def test_steps_that_were_left_out_do_not_end_a_fit_that_goes_on() -> None:
    """Where none may be left out any more, the next one that is not finite ends it."""
    state = PLAIN.run(data=Loader(), on_nonfinite="skip", steps=4).state
    assert state.arrays["skipped"] == 2
    error = PLAIN.error(data=Loader(), state=state)
    assert error.step == 7
    assert "At step 7, the loss is nan" in str(error)


@pytest.mark.parametrize("case", [PLAIN, pytest.param(MOVING, marks=pytest.mark.slow)])
def test_of_restarts_the_one_that_went_furthest_goes_on(case: Case, tmp_path: Path) -> None:
    """Those before it stay dropped."""
    seeds = restart_seeds(SEED, 2)
    met = [int(np.flatnonzero((Order(len(X), SIZE, s).batches(0, 12) == ROW).any(1))[0]) for s in seeds]
    last = int(np.argmax(met))
    error = case.error(checkpoint=tmp_path, restarts=2)
    assert (error.step, error.state.restart) == (max(met), last)
    found = case.run(checkpoint=tmp_path, restarts=2, on_nonfinite="skip")
    assert f"checkpoint: went on from step {max(met)}" in found.messages
    dropped = [m for m in found.messages if "dropped" in m]
    assert len(dropped) == 1
    assert dropped[0].startswith(f"restarts: {1 - last} dropped: at step {min(met)}")
    alone = case.run(seed=seeds[last], on_nonfinite="skip")
    for name, array in alone.state.arrays.items():
        # Flax finds statistics in single precision.
        rtol = 1e-12 if case is PLAIN else 1e-5
        np.testing.assert_allclose(found.state.arrays[name], array, rtol=rtol, atol=rtol, err_msg=name)
    assert found.history["skipped_step"].tolist() == alone.history["skipped_step"].tolist()


def test_of_stages_the_one_at_hand_goes_on(tmp_path: Path) -> None:
    first = {"steps": STEPS[0]}
    staged = {"objective": "elbo", "stages": [first, {"steps": 8, "on_nonfinite": "stop"}]}
    past = {"objective": "elbo", "stages": [first, {"steps": 8, "on_nonfinite": "skip"}]}

    def run(recipe: dict[str, Any], **rest: Any) -> Fit:
        how = {"batch_size": SIZE, **recipe}
        return fit(DENSITY, data=X, recipe=how, backend="pyro", seed=SEED, dtype="float64", compile="eager", **rest)

    with pytest.raises(NonFiniteError, match=f"is at step {STEPS[0]}: the same call"):
        run(staged, checkpoint=tmp_path)
    found = run(past, checkpoint=tmp_path)
    assert f"stage 1: checkpoint: went on from step {STEPS[0]}" in found.messages
    same_fit(found, run(past))


def test_other_recipes_do_not_go_on_from_there_and_a_state_does(tmp_path: Path) -> None:
    PLAIN.error(checkpoint=tmp_path)
    with pytest.raises(StorageError, match=r"another fit: recipe\.optimizer\.learning_rate was 0\.05 and is 0\.01"):
        PLAIN.run(checkpoint=tmp_path, learning_rate=0.01, on_nonfinite="skip")
    held = checkpoint.newest(tmp_path)
    assert held is not None
    found = PLAIN.run(state=held.states[0], learning_rate=0.01, batch_size=2, on_nonfinite="skip")
    assert found.history["step"].tolist() == list(range(STEPS[0], 12))


def test_a_checkpoint_that_cannot_be_written_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(now: Moment) -> None:
        monkeypatch.setattr(os, "fsync", full)

    options: dict[str, Any] = {"check_every": 1, "every": STEPS[0] + 20, "callbacks": [fill]}
    error = PLAIN.error(checkpoint=tmp_path, **options)
    assert "No space left on device" in str(error) and "that of step 0 is whole" in str(error)
    same(error.state, PLAIN.run(steps=STEPS[0], check_every=1).state)


def test_what_errors_leave_in_a_checkpoint_is_said_where_there_is_one() -> None:
    assert "checkpoint" not in str(PLAIN.error())


# Memory.


@on_both
def test_memory_that_runs_out_in_a_step_leaves_the_last_checkpoint(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call goes on to the bits of a fit that had the memory."""
    options: dict[str, Any] = {"every": 3, "on_nonfinite": "skip"}
    trainer, error = backends.load(case.backend).Trainer, run_out(case.backend, "gpu")
    steps = trainer.run

    def run(self: Any, tree: Any, data: Any, index: Any, numbers: Any, start: int, n: int) -> Any:
        if start >= 7:
            raise error
        return steps(self, tree, data, index, numbers, start, 1)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "run", run)
        patch.setattr(Pace, "took", lambda self, steps: None)
        patch.setattr(pace, "FIRST", 1)
        with pytest.raises(TooLargeError, match=r"does not fit in memory .*smaller batch_size.* is at step 6: the sa"):
            case.run(checkpoint=tmp_path, **options)
    found = case.run(checkpoint=tmp_path, **options)
    assert "checkpoint: went on from step 6" in found.messages
    same_fit(found, case.run(on_nonfinite="skip"))


@on_both
def test_memory_that_runs_out_in_a_look_is_an_error_of_ours(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    error = run_out(case.backend, "gpu")

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(backends.load(case.backend).Trainer, "loss", full)
    with pytest.raises(TooLargeError, match=r"The loss of 5 rows .* does not fit in memory .*smaller batch_size"):
        case.run(validation=X[:5], on_nonfinite="skip")


LIMITED = """
import resource, sys
import test_kept as here
from ppl_lvm import memory

memory.machine = lambda: 2**60  # what is told before a fit begins is tested elsewhere

def tighten(now):
    if now.step == 4:
        there = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (there + 30 * 2**20, resource.RLIM_INFINITY))

try:
    here.large(sys.argv[1], checkpoint=sys.argv[2], callbacks=[tighten])
except here.TooLargeError as error:
    print(error)
"""


def large(backend: str, **options: Any) -> Fit:
    """Steps that take some 200 MB."""
    rows = np.random.default_rng(0).normal(size=(2000, 20))
    settings: dict[str, Any] = {"recipe": "iwae", "draws": 250, "batch_size": 1000, "steps": 8, "check_every": 2}
    return fit("probabilistic_pca", data=rows, backend=backend, compile="eager", every=1, **settings, **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_a_limit_of_memory_that_is_met_in_training_leaves_the_last_checkpoint(backend: str, tmp_path: Path) -> None:
    """The system's own: a process that may not have more in the middle of its fit."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", LIMITED, backend, str(tmp_path / "kept")]
    # Memory that is given back is given back at once, so that every step asks for its own.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = paths
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "does not fit in memory" in done.stdout and "is at step 4: the same call" in done.stdout, done.stdout
    found = large(backend, checkpoint=tmp_path / "kept")
    assert "checkpoint: went on from step 4" in found.messages
    same_fit(found, large(backend, checkpoint=tmp_path / "whole"))
