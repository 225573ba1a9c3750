"""Draws that are evaluated in pieces: the same value and gradient, and memory that does not grow with their number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, assert_equal
from toys import BERNOULLI, GAUSSIANS2, GLOBAL_ROWS, MIXED_ZY, ROWS, Backend, Toy

from ppl_lvm import fit, recipe
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends._torch_memory import Alive
from ppl_lvm.backends._torch_tables import without_values
from ppl_lvm.draws import Draws, Loss, Site
from ppl_lvm.errors import ProgramError, RecipeError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.measure_valued import measure_valued
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.rws import rws
from ppl_lvm.objectives.vis import vis

on_both = pytest.mark.parametrize("backend", BACKENDS)
TO_ROUNDING = 1e-12

Case = tuple[Toy, Objective, dict[str, Estimator]]
CASES: list[Case] = [
    (GAUSSIANS2, iwae(draws=6, chunk=2), {"*": dreg()}),
    (GLOBAL_ROWS, iwae(draws=4, outer=2, chunk=2), {"*": pathwise()}),
    (MIXED_ZY, iwae(draws=4, chunk=2), {"z": dreg(), "y": vimco()}),
    (BERNOULLI, vis(draws=2, chunk=1), {"z": enumerated()}),
    (GAUSSIANS2, rws(draws=4, chunk=2), {"*": pathwise()}),
]
ONE_KEY_A_DRAW: list[Case] = [
    (BERNOULLI, iwae(draws=4, chunk=2), {"z": measure_valued()}),
    (GAUSSIANS2, rws(draws=4, sleep=0.3, chunk=2), {"*": pathwise()}),
]
"""Noise that cannot be injected: a draw beside its variants, the sleep phase's own."""


def name_of(cell: object) -> str | None:
    return getattr(cell, "name", None if isinstance(cell, dict) else type(cell).__name__)


@pytest.mark.parametrize(("toy", "objective", "estimators"), CASES, ids=name_of)
def test_pieces_on_pyro(toy: Toy, objective: Objective, estimators: dict[str, Estimator]) -> None:
    """The value and the gradient of the whole at the values that the pieces drew, in both passes."""
    engine = Engine.of("pyro", toy)
    pieces, table = engine.loss(objective, estimators, seed=3), engine.sites(objective, estimators, seed=3)
    sampled = {n for n, e in engine.plan(objective, estimators).estimators.items() if not e.exhaustive}
    whole = objective.model_copy(update={"chunk": None})
    found = engine.loss(whole, estimators, values={n: table[n].value for n in sampled})
    assert_equal(pieces, float(found.value), found.gradient, TO_ROUNDING)


@pytest.mark.parametrize(("toy", "objective", "estimators"), CASES + ONE_KEY_A_DRAW, ids=name_of)
def test_pieces_on_numpyro(toy: Toy, objective: Objective, estimators: dict[str, Estimator]) -> None:
    """Every draw has a key of its own, so pieces draw what the whole draws."""
    engine, whole = Engine.of("numpyro", toy), objective.model_copy(update={"chunk": None})
    pieces, found = engine.loss(objective, estimators, seed=3), engine.loss(whole, estimators, seed=3)
    assert_equal(pieces, float(found.value), found.gradient, TO_ROUNDING)


@on_both
def test_pieces_of_injected_draws(backend: Backend) -> None:
    engine = Engine.of(backend, ROWS)
    values = {"z": np.random.default_rng(0).normal(size=(1, 6, 20))}
    pieces, found = (engine.loss(iwae(draws=6, chunk=c), {"z": pathwise()}, values=values) for c in (3, None))
    assert_equal(pieces, float(found.value), found.gradient, TO_ROUNDING)


@on_both
def test_a_fit_in_pieces(backend: Backend) -> None:
    """The same fit on NumPyro, whose noise is that of a draw; on Pyro the step says that it runs eagerly."""
    x = np.random.default_rng(0).normal(size=(12, 4))
    options = {"steps": 4, "batch_size": 6, "dtype": "float64", "backend": backend}
    runs = [fit("probabilistic_pca", data=x, recipe="iwae", draws=8, chunk=c, **options) for c in (None, 2)]  # type: ignore[arg-type]
    if backend == "numpyro":
        np.testing.assert_allclose(runs[1].history["loss"], runs[0].history["loss"], rtol=1e-12)
    else:
        assert "compile: eager, as draws in chunks are run again for their gradient" in runs[1].messages
        again = fit("probabilistic_pca", data=x, recipe="iwae", draws=8, chunk=2, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(again.history["loss"], runs[1].history["loss"])


def test_pieces_are_equal() -> None:
    with pytest.raises(RecipeError, match="chunk = 3 does not divide draws = 50"):
        recipe("iwae", chunk=3)


def held(draws: int, chunk: int | None) -> int:
    """Most bytes of tensors that are alive at once in a step of a VAE."""
    x = np.random.default_rng(0).random((32, 64)) < 0.5
    with Alive() as alive:
        fit("vae", data=x, recipe="iwae", draws=draws, chunk=chunk, steps=1, backend="pyro", compile="eager")
    return alive.most


def test_memory_of_five_thousand_draws_is_that_of_fifty() -> None:
    """To half as much again, which weights of all draws take; on Pyro, where no compiler sees what is looked at."""
    few = held(50, None)
    assert few > 32 * 50 * 128 * 4
    assert held(5000, 50) <= 1.5 * few


class spread(Objective):
    """Looks at values."""

    verbs = frozenset({"mean"})
    asks: tuple[str, ...] = ()

    def requests(self) -> frozenset[str]:
        return frozenset(self.asks)

    def __call__(self, d: Draws) -> Loss:
        square = (d.sites["z1"].value ** 2).sum(-1)
        return Loss(-d.total(d.mean(cost={n: s.log_p - 0.1 * square for n, s in d.sites.items()})))


@on_both
def test_values_are_kept_for_an_objective_that_asks(backend: Backend) -> None:
    engine = Engine.of(backend, GAUSSIANS2)
    asks: dict[str, Any] = {"draws": 4, "asks": ("values",)}
    pieces = engine.loss(spread(chunk=2, **asks), {"*": pathwise()}, seed=3)
    table = engine.sites(spread(chunk=2, **asks), {"*": pathwise()}, seed=3)
    values = {n: table[n].value for n in ("z1", "z2")}
    found = engine.loss(spread(**asks), {"*": pathwise()}, values=values)
    assert_equal(pieces, float(found.value), found.gradient, TO_ROUNDING)


def test_values_that_were_let_go_are_not_looked_at_in_silence() -> None:
    engine = Engine.of("pyro", GAUSSIANS2)
    with pytest.raises(ProgramError, match=r"looks at the values of site 'z1'.*add 'values' to what its `requests`"):
        engine.loss(spread(draws=4, chunk=2), {"*": pathwise()})
    site = Site("z", "latent", local=True, value=torch.zeros(1), log_p=None, log_q=None)
    gone = without_values({"z": site})["z"].value
    for look in (lambda z: z**2, lambda z: 2.0 * z, lambda z: z.sum(), torch.exp, lambda z: torch.stack([z]), len):
        with pytest.raises(ProgramError, match="not kept"):
            look(gone)
