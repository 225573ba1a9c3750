"""Groups of parameters that move apart: in blocks of steps, or the model before the guide in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from harness import BACKENDS
from oracle import exact
from toys import BERNOULLI, Backend

from ppl_lvm import Fit, fit, numpyro_loss, pyro_loss, recipe
from ppl_lvm.errors import RecipeError
from ppl_lvm.program import Program

on_both = pytest.mark.parametrize("backend", BACKENDS)
PROGRAM = Program("bernoulli", BERNOULLI.model, BERNOULLI.guide, portable=True, arguments=("x",))
ENUMERATED: dict[str, Any] = {"estimator": "enumerate", "batch_size": None, "learning_rate": 0.05}
"""Summed out, a step has no noise."""


def run(backend: Backend, objective: Any, steps: int, **options: Any) -> Fit:
    how = ENUMERATED | options
    return fit(PROGRAM, data=BERNOULLI.data, recipe={"objective": objective}, backend=backend, dtype="float64",
               steps=steps, **how)  # fmt: skip


def assert_params(found: Fit, expected: Mapping[str, np.ndarray], tolerance: float = 1e-12) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found.params[name], value, rtol=0, atol=tolerance, err_msg=name)


@on_both
def test_blocks_move_one_group_each(backend: Backend) -> None:
    """Two steps of the guide, one of the model, then the guide again, each as if the others had not been."""
    blocks = {"alternate": {"guide": 2, "model": 1}}
    two = run(backend, "elbo", 2, **blocks)
    assert_params(two, BERNOULLI.model_params)
    assert_params(two, run(backend, "elbo", 2, freeze=["model"]).params)
    three = run(backend, "elbo", 3, **blocks)
    assert_params(three, {n: two.params[n] for n in BERNOULLI.guide_params})
    moved = run(backend, "elbo", 1, freeze=["guide"], start=two)
    # Adam's first step is as long as its learning rate: nothing of the guide's two steps is in the model's state.
    assert_params(three, {n: moved.params[n] for n in BERNOULLI.model_params})
    four = run(backend, "elbo", 4, **blocks)
    assert_params(four, {n: three.params[n] for n in BERNOULLI.model_params})
    assert any(abs(four.params[n] - three.params[n]).max() > 1e-4 for n in BERNOULLI.guide_params)


@on_both
def test_blocks_go_on_from_a_state(backend: Backend) -> None:
    blocks = {"alternate": {"model": 1, "guide": 2}}
    first = run(backend, "elbo", 4, **blocks)
    again = run(backend, "elbo", 7, **blocks, state=first.state)
    assert_params(again, run(backend, "elbo", 7, **blocks).params, 0.0)


@on_both
def test_the_model_moves_first(backend: Backend) -> None:
    """`sequential`: the guide's gradient is that at the model's new parameters."""
    rate = 0.1
    start = {n: np.asarray(v, float) for n, v in BERNOULLI.params.items()}
    both = exact(BERNOULLI, "vis", None).gradient
    model = {n: start[n] - rate * both[n] for n in BERNOULLI.model_params}
    later = exact(BERNOULLI, "vis", None, params={**start, **model}).gradient
    options = {"optimizer": "sgd", "learning_rate": rate}
    at_once = run(backend, {"name": "vis", "draws": 1}, 1, **options)
    assert_params(at_once, {n: start[n] - rate * both[n] for n in start})
    in_turn = run(backend, {"name": "vis", "draws": 1, "sequential": True}, 1, **options)
    assert_params(in_turn, {**model, **{n: start[n] - rate * later[n] for n in BERNOULLI.guide_params}})
    assert in_turn.history["loss"][0] == pytest.approx(at_once.history["loss"][0], abs=1e-12)


@on_both
def test_both_passes_of_a_step_have_the_same_draws(backend: Backend) -> None:
    """With the guide frozen, what the model does first changes nothing."""
    options = {"estimator": "score", "freeze": ["guide"], "optimizer": "sgd"}
    runs = [run(backend, {"name": "vis", "draws": 3, "sequential": s}, 5, **options) for s in (False, True)]
    assert_params(runs[0], runs[1].params)
    moving = [run(backend, {"name": "vis", "draws": 3, "sequential": s}, 5, estimator="score") for s in (False, True)]
    assert any(abs(moving[0].params[n] - moving[1].params[n]).max() > 1e-6 for n in BERNOULLI.params)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RecipeError, match="a block of guide alone; give both, or freeze the other"):
        recipe("elbo", alternate={"guide": 3})
    with pytest.raises(RecipeError, match="alternate"):
        recipe("elbo", alternate={"guide": 3, "modle": 1})
    for facade in (pyro_loss, numpyro_loss):
        with pytest.raises(RecipeError, match="SVI moves all parameters at once"):
            facade("vis", sequential=True)
    assert recipe(recipe("elbo", alternate={"guide": 3, "model": 1}).to_dict()).alternate == {"guide": 3, "model": 1}
