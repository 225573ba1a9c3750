"""What users get wrong: the message, and that the process is as before, so that the next fit is the same.

Messages of single parts are tested beside these parts; here all of them come from `fit`, on both backends.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from toys import Array, Backend, Ppl

from ppl_lvm import fit
from ppl_lvm.errors import BackendError, DataError, LegalityError, PplLvmError, ProgramError, RecipeError
from ppl_lvm.program import Program

X = np.array([0.4, -1.1, 0.9, 1.6])
QUICK: dict[str, Any] = {"recipe": "elbo", "steps": 2, "compile": "eager", "batch_size": None}


def model(ppl: Ppl, x: Array) -> None:
    scale = ppl.param("scale", 0.8, ppl.dist.constraints.positive)
    g = ppl.sample("g", ppl.dist.Normal(0.0 * scale, 1.0))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(g, scale))
        ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)


def guide(ppl: Ppl, x: Array) -> None:
    loc = ppl.param("loc", 0.2)
    ppl.sample("g", ppl.dist.Normal(loc, 1.0))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(loc + 0.3 * x, 0.8))


def without_g(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(ppl.param("loc", 0.2) + 0.3 * x, 0.8))


def with_another(ppl: Ppl, x: Array) -> None:
    guide(ppl, x)
    ppl.sample("h", ppl.dist.Normal(ppl.param("where", 0.0), 1.0))


def from_locals(ppl: Ppl, x: Array) -> None:
    loc = ppl.param("loc", 0.2)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(loc + 0.3 * x, 0.8))
    ppl.sample("g", ppl.dist.Normal(z.mean(-1), 1.0))


def loc_of_two(ppl: Ppl, x: Array) -> None:
    guide(ppl, x)
    ppl.param("loc", np.zeros(2))


def plate_of_three(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", 3):
        z = ppl.sample("z", ppl.dist.Normal(ppl.param("loc", 0.2) + ppl.xp.zeros(3), 0.8))
        ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)


def guide_of_three(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", 3):
        ppl.sample("z", ppl.dist.Normal(ppl.param("q", 0.2) + ppl.xp.zeros(3), 0.8))


def one_plate_of_two_sizes(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", 2):
        ppl.sample("z", ppl.dist.Normal(ppl.param("loc", 0.2), 0.8))
    with ppl.plate("data", len(x)):
        ppl.sample("x", ppl.dist.Normal(ppl.param("m", 0.2), 1.0), obs=x)


def guide_of_two(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", 2):
        ppl.sample("z", ppl.dist.Normal(ppl.param("q", 0.2), 0.8))


def seen_often(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(ppl.param("loc", 0.2), 0.8))
        ppl.sample("x", ppl.dist.Normal(z + ppl.param("by", np.zeros((4, 1))), 1.0), obs=x)


def two_columns(ppl: Ppl, x: Array, u: Array) -> None:
    model(ppl, x + u)


def toy(
    model: Callable[..., None] = model, guide: Callable[..., None] = guide, arguments: tuple[str, ...] = ("x",)
) -> Program:
    return Program("toy", model, guide, portable=True, arguments=arguments)


def first(backend: Backend) -> dict[str, Array]:
    return fit(toy(), data=X, backend=backend, dtype="float64", **QUICK).params


def process() -> list[Any]:
    """All that is global: stores, generators, precision, validation, handlers."""
    validated = (
        torch.distributions.Distribution._validate_args,
        numpyro.distributions.Distribution._validate_args,
    )
    return [
        {name: value.tolist() for name, value in pyro.get_param_store().items()},
        *(torch.get_rng_state().tolist(), repr(np.random.get_state(legacy=False))),
        *(torch.get_default_dtype(), torch.is_grad_enabled(), jnp.zeros(1).dtype, validated),
        *(list(pyro.poutine.runtime._PYRO_STACK), list(numpyro.primitives._PYRO_STACK)),
    ]


BAD: dict[str, tuple[dict[str, Any], type[PplLvmError], str]] = {
    "recipe": ({"recipe": "iwea"}, RecipeError, "(?s)iwea.*Did you mean 'iwae'"),
    "key": ({"drws": 3}, RecipeError, "(?s)drws.*Did you mean 'draws'"),
    "option": ({"objective.bta": 3}, RecipeError, "(?s)bta.*Did you mean 'beta'"),
    "site pattern": ({"estimator": {"zz": "pathwise"}}, LegalityError, "(?s)'zz'.*'z'"),
    "estimator": ({"estimator": "pathwize"}, RecipeError, "(?s)pathwize.*Did you mean 'pathwise'"),
    "guide": ({"guide": "auto_norml"}, RecipeError, "(?s)auto_norml.*Did you mean 'auto_normal'"),
    "text for a number": ({"steps": "many"}, RecipeError, "(?s)steps.*many"),
    "half a draw": ({"draws": 2.5}, RecipeError, "(?s)draws.*2.5"),
    "a number beyond single precision": ({"learning_rate": 1e39}, RecipeError, "learning_rate is 1e.39.*of float32"),
    "a schedule beyond it": (
        {"learning_rate": {"schedule": "linear", "start": 0.1, "end": 1e39, "steps": 3}},
        RecipeError,
        "learning_rate is 1e.39",
    ),
    "data beyond it": ({"data": np.array([0.0, 1e300]), "batch_size": 1}, DataError, "'x' holds 1e.300.*of float32"),
    "half a seed": ({"seed": 1.5}, DataError, "seed is 1.5; give a whole number"),
    "a number for a device": ({"device": 3}, BackendError, "device is 3; give a name"),
    "a number for sites": ({"observed": 3}, ProgramError, "observed is 3; give a mapping"),
    "a number for a state": ({"state": 3}, DataError, "state is 3; give the state of an earlier fit"),
    "a number for a start": ({"start": 3}, DataError, "start is 3; give an earlier fit"),
    "text to start from": ({"start": {"loc": "a"}}, DataError, "start: 'loc' is 'a', of dtype <U1; give numbers"),
    "rows of no one length to start from": ({"start": {"loc": [[1], [1, 2]]}}, DataError, "start: 'loc' "),
    "a start beyond single precision": ({"start": {"loc": 1e300}}, DataError, "'loc' holds 1e.300.*of float32"),
    "one plate of two sizes": (
        {"model": toy(one_plate_of_two_sizes, guide_of_two)},
        ProgramError,
        "Plate 'data' has 2 rows where it is met first, and [0-9]+ later",
    ),
    "a value for many": ({"model": toy(seen_often, without_g)}, ProgramError, "for 4 distributions along dimension -2"),
    "a number for a callback": ({"callbacks": [3]}, PplLvmError, "callbacks holds 3, which cannot be called"),
    "a callback alone": ({"callbacks": print}, PplLvmError, "give a list of functions"),
    "no data": ({"data": None}, DataError, "'toy' needs data for 'x'"),
    "a site of the model": ({"model": toy(guide=without_g)}, ProgramError, "'g' is in the model but not in the guide"),
    "a site of the guide": ({"model": toy(guide=with_another)}, ProgramError, "'h' is not in the model"),
    "global from locals": ({"model": toy(guide=from_locals)}, LegalityError, r"Site 'g'.*\['z'\]"),
    "axes": ({"model": toy(two_columns, arguments=("x", "u")), "data": (X, X[:3])}, DataError, "'x': 4, 'u': 3"),
    "empty": ({"data": X[:0]}, DataError, "no rows"),
    "NaN": ({"data": np.where(X > 1, np.nan, X)}, DataError, "(?s)'x'.*NaN.*missing='mask'"),
    "text": ({"data": np.array(["a", "b"])}, DataError, "'x' has dtype <U1"),
    "complex": ({"data": X * 1j}, DataError, "'x' has dtype complex128"),
    "plate": (
        {"model": toy(plate_of_three, guide_of_three)},
        ProgramError,
        r"'x' has a value of shape \(4,\), and its distribution draws \(3,\) in plates \{'data': 3\}.*len\(x\)",
    ),
    "parameter": ({"model": toy(guide=loc_of_two)}, ProgramError, r"'loc'.*shapes \(\) and \(2,\)"),
}


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_after_any_error_the_next_fit_is_the_same(backend: Backend) -> None:
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(1.5))
    expected, before = first(backend), process()
    for case, (asked, error, message) in BAD.items():
        options = {"model": toy(), "data": X, "backend": backend, **QUICK, **asked}
        with pytest.raises(error, match=message):
            fit(options.pop("model"), **options)
        assert process() == before, case
        again = first(backend)
        assert all((again[name] == value).all() for name, value in expected.items()), case
    pyro.clear_param_store()


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_a_backend_that_is_not_installed_names_its_extra(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    found, lacking = importlib.util.find_spec, {"pyro": "torch", "numpyro": "jax"}[backend]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else found(name))
    with pytest.raises(BackendError, match=rf"needs \['{lacking}'\].*pip install 'ppl_lvm\[{backend}\]'"):
        fit(toy(), data=X, backend=backend, **QUICK)
    monkeypatch.undo()
    assert np.isfinite(fit(toy(), data=X, backend=backend, **QUICK).history["loss"]).all()


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_a_plain_number_is_observed_as_an_array_is(backend: Backend) -> None:
    def losses(plain: bool) -> np.ndarray:
        def observed(ppl: Ppl, x: Array) -> None:
            seen: Callable[[Any], Any] = (lambda number: number) if plain else ppl.xp.asarray
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0))
                ppl.sample("all", ppl.dist.Normal(ppl.param("m", 0.3) + z, 1.0), obs=seen(0.25))
                ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

        return fit(toy(observed, without_g), data=X, backend=backend, dtype="float64", **QUICK).history["loss"]

    np.testing.assert_array_equal(losses(True), losses(False))


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_parameters_of_one_entry_stand_for_all_of_an_event(backend: str) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3))

    def losses(wide: int) -> np.ndarray:
        def model(ppl: Any, x: Any) -> None:
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", ppl.dist.Normal(0.0 * x[:, 0], 1.0))
                ppl.sample("x", ppl.dist.Normal(z[:, None] + 0.0 * x[..., :wide], 1.0).to_event(1), obs=x)

        def guide(ppl: Any, x: Any) -> None:
            with ppl.plate("data", len(x)):
                ppl.sample("z", ppl.dist.Normal(ppl.param("m", lambda: np.zeros(())) + 0.0 * x[:, 0], 1.0))

        made = Program("shared", model, guide, portable=True, arguments=("x",))
        return fit(made, data=x, recipe="elbo", steps=3, backend=backend, compile="eager").history["loss"]

    np.testing.assert_allclose(losses(1), losses(3), rtol=1e-6)
