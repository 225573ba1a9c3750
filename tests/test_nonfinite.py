"""Steps whose loss or gradient is not finite: named, skipped or stopped at, and the state before them kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ppl_lvm import Fit, State, fit
from ppl_lvm.errors import NonFiniteError, RecipeError
from ppl_lvm.monitor import restart_seeds
from ppl_lvm.pace import Order
from ppl_lvm.program import Program

pytestmark = pytest.mark.optimised

BAD, ROW, SIZE, SEED = 7.0, 13, 4, 3
X = np.random.default_rng(0).normal(size=20)
X[ROW] = BAD
ORDER = Order(len(X), SIZE, SEED).batches(0, 40)
STEPS = [int(i) for i in np.flatnonzero((ORDER == ROW).any(1))]
"""The steps that have the bad row, one in every epoch of five."""
MODES = [("numpyro", "compiled"), ("pyro", "eager"), ("pyro", "graph")]
SLOW = [pytest.param(*mode, marks=pytest.mark.slow) for mode in (("numpyro", "eager"), ("pyro", "compiled"))]
in_all_modes = pytest.mark.parametrize(("backend", "mode"), [*MODES, *SLOW])
on_both = pytest.mark.parametrize(("backend", "mode"), MODES[:2])
eagerly = pytest.mark.parametrize(("backend", "mode"), [MODES[1], SLOW[0]])
"""Where what is tested is not compiled, or would take long to."""


def density(ppl: Any, x: Any) -> None:
    """The density of one value of x is not a number."""
    w = ppl.param("w", 0.5)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(w * z, ppl.xp.abs(x - BAD)), obs=x)


def slope(ppl: Any, x: Any) -> None:
    """All densities are finite, and the root has no slope at one value of x."""
    w = ppl.param("w", 0.5)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(z + ppl.xp.sqrt(w * ppl.xp.abs(x - BAD)), 1.0), obs=x)


def guide(ppl: Any, x: Any) -> None:
    a, scale = ppl.param("a", 0.1), ppl.param("scale", 0.7, constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(a * ppl.xp.tanh(x), scale))


DENSITY, SLOPE = (Program(m.__name__, m, guide, portable=True, arguments=("x",)) for m in (density, slope))


def run(backend: str, mode: str, chosen: Program = DENSITY, **options: Any) -> Fit:
    settings: dict[str, Any] = {"steps": 12, "batch_size": SIZE, "seed": SEED, "dtype": "float64", "recipe": "elbo"}
    return fit(chosen, data=X, backend=backend, compile=mode, **(settings | options))


def stopped(backend: str, mode: str, chosen: Program = DENSITY, **options: Any) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        run(backend, mode, chosen, **options)
    return caught.value


def same(found: State, wanted: State) -> None:
    assert (found.step, found.mode, found.arrays.keys()) == (wanted.step, wanted.mode, wanted.arrays.keys())
    for name, array in wanted.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)


def test_the_bad_row_is_met_where_these_tests_want_it() -> None:
    assert STEPS[0] > 0
    assert len(STEPS) == 8


@in_all_modes
def test_the_state_before_the_step_is_kept(backend: str, mode: str) -> None:
    """To the bits of a fit that ends there, though the loop had more steps to go."""
    error = stopped(backend, mode, optimizer={"name": "adam", "clip": 1.0})
    assert error.step == error.state.step == STEPS[0]
    same(error.state, run(backend, mode, optimizer={"name": "adam", "clip": 1.0}, steps=STEPS[0]).state)


@in_all_modes
def test_what_is_skipped_has_moved_nothing(backend: str, mode: str) -> None:
    """The run ends where one does that is put together from the parts between the steps with the bad row."""
    whole = run(backend, mode, on_nonfinite="skip", steps=STEPS[1] + 3)
    state = run(backend, mode, steps=STEPS[0]).state
    state = run(backend, mode, steps=STEPS[1], state=replace(state, step=STEPS[0] + 1)).state
    same(whole.state, run(backend, mode, steps=STEPS[1] + 3, state=replace(state, step=STEPS[1] + 1)).state)
    assert whole.history["skipped_step"].tolist() == STEPS[:2]
    assert np.flatnonzero(~np.isfinite(whole.history["loss"])).tolist() == STEPS[:2]
    assert any(f"skipped 2 of {STEPS[1] + 3} steps" in message for message in whole.messages)
    assert any(f"skipped step {STEPS[0]}" in message and f"row {ROW}" in message for message in whole.messages)


@on_both
def test_a_fit_goes_on_from_the_state_that_was_kept(backend: str, mode: str) -> None:
    """Past the step, to the bits of one that was told to skip at once."""
    error = stopped(backend, mode)
    on = run(backend, mode, state=error.state, on_nonfinite="skip")
    same(on.state, run(backend, mode, on_nonfinite="skip").state)


@on_both
def test_the_site_its_parameters_and_the_rows_are_named(backend: str, mode: str) -> None:
    error = stopped(backend, mode)
    (guilty,) = error.cause.guilty
    assert (guilty.site, guilty.density, guilty.rows, error.cause.rows) == ("x", "log_p", (ROW,), (ROW,))
    assert guilty.parameters["scale"] == "0"
    assert guilty.value == "7"
    assert np.isfinite(float(guilty.parameters["loc"]))
    for said in (f"At step {STEPS[0]}", "'x' (log_p) at row 13", "scale 0", "error.state"):
        assert said in str(error)


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_a_distribution_whose_parameters_have_no_known_event_is_named(backend: str) -> None:
    """A point's value has as many event dimensions as it is given: what is asked of its constraint is not known."""

    def point(ppl: Any, x: Any) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Delta(ppl.param("v", 0.5)))
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    error = stopped(backend, "eager", Program("point", point, guide, portable=True, arguments=("x",)))
    (guilty,) = error.cause.guilty
    assert (guilty.site, guilty.density, guilty.parameters["v"]) == ("z", "log_p", "0.5")


@in_all_modes
def test_a_gradient_that_is_not_finite_is_seen_where_the_loss_is(backend: str, mode: str) -> None:
    error = stopped(backend, mode, SLOPE)
    assert error.step == STEPS[0]
    assert "the gradient's norm is nan" in str(error)
    assert (error.cause.guilty, error.cause.gradients, error.cause.rows) == ((), ("w",), (ROW,))
    same(error.state, run(backend, mode, SLOPE, steps=STEPS[0]).state)


@on_both
def test_too_many_steps_in_a_row_end_the_fit(backend: str, mode: str) -> None:
    """With all rows in every step there is no other one to go on with."""
    error = stopped(backend, mode, on_nonfinite="skip", most_skipped=3, batch_size=None)
    assert error.step == error.state.step == 0
    assert "every step to 3, one more than most_skipped = 3" in str(error)
    with pytest.raises(RecipeError, match="on_nonfinite"):
        run(backend, mode, on_nonfinite="ignore")


@eagerly
@pytest.mark.parametrize("chosen", [DENSITY, SLOPE], ids=lambda p: p.name)
def test_groups_that_move_apart_stay_together(backend: str, mode: str, chosen: Program) -> None:
    """Where the guide's gradient is taken at the model's new parameters, and where groups take turns."""
    apart: dict[str, Any] = {"recipe": "vis", "sequential": True, "draws": 2, "estimator": {"z": "pathwise"}}
    for options in (apart, {"alternate": {"guide": 2, "model": 1}}):
        error = stopped(backend, mode, chosen, **options)
        same(error.state, run(backend, mode, chosen, **options, steps=error.step).state)


@on_both
def test_restarts_stop_each_on_its_own(backend: str, mode: str) -> None:
    """They meet the row at steps of their own. The error has the one that went furthest, to the bits of it alone."""
    seeds = restart_seeds(SEED, 2)
    met = [int(np.flatnonzero((Order(len(X), SIZE, s).batches(0, 12) == ROW).any(1))[0]) for s in seeds]
    assert met[0] != met[1]
    error, last = stopped(backend, mode, restarts=2), int(np.argmax(met))
    assert (error.step, error.state.restart) == (max(met), last)
    alone = run(backend, mode, seed=seeds[last], steps=max(met)).state
    for name, array in alone.arrays.items():
        np.testing.assert_allclose(error.state.arrays[name], array, rtol=1e-12, err_msg=name)


@on_both
def test_restarts_skip_each_on_its_own(backend: str, mode: str) -> None:
    """All steps that have the row, of each run, and nothing else; however far the loop looks ahead."""
    seeds = restart_seeds(SEED, 2)
    options: dict[str, Any] = {"on_nonfinite": "skip", "steps": 40}
    met = [np.flatnonzero((Order(len(X), SIZE, s).batches(0, 40) == ROW).any(1)).tolist() for s in seeds]
    assert met[0] != met[1]
    ahead = run(backend, mode, restarts=2, **options)
    by_step = run(backend, mode, restarts=2, check_every=1, **options)
    same(ahead.state, by_step.state)
    np.testing.assert_array_equal(ahead.history["loss"], by_step.history["loss"])
    best = ahead.state.restart
    assert best is not None
    assert ahead.history["skipped_step"].tolist() == met[best]
    alone = run(backend, mode, seed=seeds[best], **options)
    for name, array in alone.state.arrays.items():
        np.testing.assert_allclose(ahead.state.arrays[name], array, rtol=1e-12, err_msg=name)
