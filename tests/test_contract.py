"""The contract between objectives, estimators and backends, held against the oracle on both backends.

Discrete programs are exact: every joint outcome is laid out along the outer axis with its probability, so the
expected gradient of each estimator must equal the gradient of the enumerated objective to rounding. Programs
with Gaussian sites are held to quadrature within the standard error of their own runs.
"""

from __future__ import annotations

import numpy as np
import pytest
from _pytest.mark import ParameterSet
from harness import BACKENDS, Engine, Loss, assert_equal, assert_unbiased
from oracle import exact, log_evidence_rows, tuples
from toys import (
    BERNOULLI,
    BOTTOM_UP,
    CATEGORICALS,
    CONJUGATE_NORMAL,
    GAUSSIANS2,
    GLOBAL_ROWS,
    LINEAR_GAUSSIAN_FACTORS,
    MIXED_YZ,
    MIXED_ZY,
    PLATE,
    ROWS,
    UPWARD,
    Backend,
    Toy,
    native_rows,
)

from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.log_variance import log_variance
from ppl_lvm.objectives.vis import vis

TO_ROUNDING = 1e-12


def slow(*cell: object) -> ParameterSet:
    """A cell that repeats what others show already; compiling each takes NumPyro seconds."""
    return pytest.param(*cell, marks=pytest.mark.slow)


def each(*toys: Toy, slowly: tuple[Toy, ...] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("toy", [*toys, *map(slow, slowly)], ids=name_of)


def name_of(cell: object) -> str | None:
    """The name of a toy or an estimator, or of an objective with its number of draws."""
    if isinstance(cell, Toy):
        return cell.name
    if not isinstance(cell, Objective | Estimator):
        return None
    return type(cell).__name__ + (f"{cell.draws}" if isinstance(cell, Objective) else "")


on_both = pytest.mark.parametrize("backend", BACKENDS)


def over_outcomes(backend: Backend, toy: Toy, objective: Objective, local: Estimator) -> Loss:
    """The expectation of one run: every outcome of its draws along the outer axis."""
    outcomes = tuples(toy, objective.draws)
    engine = Engine.of(backend, toy)
    options = objective.model_copy(update={"outer": len(outcomes.weight)})
    estimators = {"*": local} | ({"g": score()} if toy is PLATE else {})
    return engine.loss(options, estimators, values=outcomes.values, weight=outcomes.weight)


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [
        (elbo(draws=1), score()),
        slow(elbo(draws=2), score()),
        (elbo(draws=2), rloo()),
        slow(elbo(draws=2), vimco()),
        slow(iwae(draws=2), score()),
        (iwae(draws=2), vimco()),
        (iwae(draws=3), score()),
        slow(iwae(draws=3), vimco()),
    ],
    ids=name_of,
)
@each(UPWARD, PLATE, slowly=(BERNOULLI, CATEGORICALS))
@on_both
def test_expected_gradients_are_exact(backend: Backend, toy: Toy, objective: Objective, estimator: Estimator) -> None:
    truth = exact(toy, type(objective).__name__, objective.draws)
    assert_equal(over_outcomes(backend, toy, objective, estimator), *truth, TO_ROUNDING)


@on_both
def test_published_gradients_of_one_bernoulli(backend: Backend) -> None:
    assert over_outcomes(backend, BERNOULLI, elbo(), score()).gradient["q_logit"] == pytest.approx(-0.2465, abs=5e-5)
    five = over_outcomes(backend, BERNOULLI, iwae(draws=5), vimco())
    assert five.gradient["q_logit"] == pytest.approx(-0.1164, abs=5e-5)
    assert_equal(five, *exact(BERNOULLI, "iwae", 5), TO_ROUNDING)


@pytest.mark.parametrize("K", [slow(1), 2])
@each(UPWARD, PLATE, slowly=(BERNOULLI, CATEGORICALS))
@on_both
def test_enumerated_elbo_is_exact_in_one_run(backend: Backend, toy: Toy, K: int) -> None:
    found = Engine.of(backend, toy).loss(elbo(draws=K), {"*": enumerated()})
    assert_equal(found, *exact(toy, "elbo"), TO_ROUNDING)


@on_both
def test_enumerated_rows_under_a_scored_global(backend: Backend) -> None:
    engine, outcomes = Engine.of(backend, PLATE), tuples(PLATE, 1)
    weight = np.array([outcomes.weight[outcomes.values["g"][:, c] == 1].sum() for c in range(2)])
    estimators = {"g": score(), "z": enumerated()}
    found = engine.loss(elbo(outer=2), estimators, values={"g": np.eye(2)}, weight=weight)
    assert_equal(found, *exact(PLATE, "elbo"), TO_ROUNDING)


@on_both
def test_leave_one_out_over_two_global_draws_is_exact(backend: Backend) -> None:
    # Every pair of outcomes is one run with two outer draws; the pairs' probabilities weigh the runs.
    outcomes = tuples(PLATE, 1)
    first, second = np.indices((len(outcomes.weight),) * 2).reshape(2, -1)
    pairs = {name: np.stack([entry[first], entry[second]], axis=1) for name, entry in outcomes.values.items()}
    chance = outcomes.weight[first] * outcomes.weight[second]
    estimators = {"g": rloo(), "z": score()}
    found = Engine.of(backend, PLATE).loss(elbo(outer=2), estimators, values=pairs, runs=len(chance))
    gradient = {name: np.tensordot(chance, entry, axes=1) for name, entry in found.gradient.items()}
    assert_equal(Loss(chance @ found.value, gradient), *exact(PLATE, "elbo"), TO_ROUNDING)


@on_both
def test_mini_batches_average_to_the_whole_batch(backend: Backend) -> None:
    # The scale N / B belongs to the rows alone: the global's terms enter once.
    rows, found = len(PLATE.data["x"]), []
    for n in range(rows):
        batch = {"x": PLATE.data["x"][n : n + 1]}
        engine = Engine.of(backend, PLATE, batch)
        one = engine.loss(elbo(), {"*": enumerated()}, total_rows=rows)
        assert_equal(one, *exact(PLATE, "elbo", data=batch, scale=float(rows)), TO_ROUNDING)
        found.append(one)
    gradient = {name: np.mean([one.gradient[name] for one in found], axis=0) for name in PLATE.params}
    value = np.mean([one.value for one in found], axis=0)
    assert_equal(Loss(value, gradient), *exact(PLATE, "elbo"), TO_ROUNDING)


@pytest.mark.parametrize("K", [2, slow(3)])
@each(CATEGORICALS, slowly=(BERNOULLI,))
@on_both
def test_two_losses_through_the_self_normalised_verb(backend: Backend, toy: Toy, K: int) -> None:
    assert_equal(over_outcomes(backend, toy, vis(draws=K), score()), *exact(toy, "vis", K), TO_ROUNDING)


@each(CATEGORICALS, slowly=(BERNOULLI,))
@on_both
def test_the_self_normalised_verb_under_enumeration(backend: Backend, toy: Toy) -> None:
    found = Engine.of(backend, toy).loss(vis(), {"*": enumerated()})
    assert_equal(found, *exact(toy, "vis", None), TO_ROUNDING)


@each(CATEGORICALS, slowly=(BERNOULLI,))
@on_both
def test_log_variance_has_the_gradient_of_the_elbo(backend: Backend, toy: Toy) -> None:
    found = over_outcomes(backend, toy, log_variance(draws=2), score())
    assert_equal(found, *exact(toy, "elbo"), TO_ROUNDING)


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [
        (elbo(draws=3), pathwise()),
        slow(iwae(draws=5), pathwise()),
        slow(elbo(draws=3), dreg()),
        (iwae(draws=5), dreg()),
    ],
    ids=name_of,
)
@each(CONJUGATE_NORMAL, LINEAR_GAUSSIAN_FACTORS)
@on_both
def test_every_draw_is_the_evidence_at_the_exact_posterior(
    backend: Backend, toy: Toy, objective: Objective, estimator: Estimator
) -> None:
    engine, evidence = Engine.of(backend, toy), log_evidence_rows(toy)
    log_w = engine.log_w(objective, {"z": estimator})
    np.testing.assert_allclose(log_w, np.broadcast_to(evidence, log_w.shape), rtol=0, atol=1e-10)
    found = engine.loss(objective, {"z": estimator}, runs=3)
    np.testing.assert_allclose(found.value, -evidence.sum(), rtol=0, atol=1e-10)
    if isinstance(estimator, dreg):
        for name in toy.guide_params:
            np.testing.assert_allclose(found.gradient[name], 0.0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("objective", "z", "y"),
    [
        slow(elbo(), pathwise(), score()),
        slow(elbo(), pathwise(), enumerated()),
        slow(elbo(draws=2), score(), enumerated()),
        slow(elbo(draws=2), score(), rloo()),
        (elbo(draws=2), dreg(), rloo()),
        (elbo(), dreg(), enumerated()),
        slow(iwae(draws=2), pathwise(), score()),
        (iwae(draws=2), pathwise(), vimco()),
        slow(iwae(draws=2), score(), vimco()),
    ],
    ids=name_of,
)
@each(MIXED_YZ, MIXED_ZY)
@on_both
def test_gaussian_and_class_in_one_row(
    backend: Backend, toy: Toy, objective: Objective, z: Estimator, y: Estimator
) -> None:
    engine = Engine.of(backend, toy)
    found = engine.loss(objective.model_copy(update={"outer": 1_000}), {"z": z, "y": y}, runs=60)
    assert_unbiased(found, *exact(toy, type(objective).__name__, objective.draws))


@pytest.mark.parametrize("y", [slow(score()), vimco()], ids=name_of)
@on_both
def test_doubly_reparameterised_below_a_scored_class(backend: Backend, y: Estimator) -> None:
    found = Engine.of(backend, MIXED_ZY).loss(iwae(draws=2, outer=1_000), {"z": dreg(), "y": y}, runs=60)
    assert_unbiased(found, *exact(MIXED_ZY, "iwae", 2))


@pytest.mark.parametrize(
    ("toy", "objective", "estimators", "reason"),
    [
        (BOTTOM_UP, elbo(kl="closed_form"), {"*": pathwise()}, "'z1' has no closed-form KL"),
        (MIXED_YZ, iwae(draws=2), {"z": dreg(), "y": vimco()}, "'y' depends on its draw"),
        (GAUSSIANS2, iwae(draws=2), {"z1": dreg(), "z2": pathwise()}, "make both 'dreg'"),
        (UPWARD, elbo(kl="closed_form", draws=2), {"*": rloo()}, "'z1' has no closed-form KL"),
        (CATEGORICALS, iwae(draws=2), {"*": rloo()}, "use 'vimco'"),
        (CATEGORICALS, iwae(draws=5), {"*": enumerated()}, "summed over 6\\^5 choices"),
        (CATEGORICALS, iwae(draws=2), {"*": pathwise()}, "no reparameterised draw"),
        (BERNOULLI, elbo(), {"z": rloo()}, "draws = 1"),
        (BERNOULLI, iwae(), {"z": vimco()}, "draws = 1"),
        (PLATE, elbo(draws=2), {"g": rloo(), "z": rloo()}, "outer = 1"),
    ],
    ids=name_of,
)
@on_both
def test_what_would_be_wrong_is_refused(
    backend: Backend, toy: Toy, objective: Objective, estimators: dict[str, Estimator], reason: str
) -> None:
    with pytest.raises(LegalityError, match=reason):
        Engine.of(backend, toy).loss(objective, estimators)


@on_both
def test_dependent_gaussians_and_their_spread(backend: Backend) -> None:
    engine, truth, spread = Engine.of(backend, GAUSSIANS2), exact(GAUSSIANS2, "iwae", 4), {}
    for estimator in (pathwise(), dreg(), vimco(), score()):
        found = engine.loss(iwae(draws=4, outer=1_000), {"*": estimator}, runs=60)
        assert_unbiased(found, *truth)
        spread[type(estimator).__name__] = found.gradient["q_z1_loc"].std() * np.sqrt(1_000)
    assert spread["dreg"] < 0.5 * spread["pathwise"]
    assert spread["vimco"] < 0.5 * spread["score"]


@each(GAUSSIANS2, BOTTOM_UP)
@on_both
def test_elbo_of_dependent_gaussians(backend: Backend, toy: Toy) -> None:
    found = Engine.of(backend, toy).loss(elbo(outer=1_000), {"z1": pathwise(), "z2": dreg()}, runs=60)
    assert_unbiased(found, *exact(toy, "elbo"))


@on_both
def test_closed_form_kl_where_the_guide_follows_the_model(backend: Backend) -> None:
    objective = elbo(kl="closed_form", outer=1_000)
    found = Engine.of(backend, GAUSSIANS2).loss(objective, {"*": pathwise()}, runs=60)
    assert_unbiased(found, *exact(GAUSSIANS2, "elbo"))


@pytest.mark.parametrize("with_global", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("subsample_size", [slow(None), 5], ids=["full", "subsampled"])
@on_both
def test_native_programs_with_their_own_plate(backend: Backend, subsample_size: int | None, with_global: bool) -> None:
    toy = GLOBAL_ROWS if with_global else ROWS
    model, guide = native_rows(backend, with_global=with_global, subsample_size=subsample_size)
    engine = Engine(backend, model, guide, toy.data, portable=False)
    assert engine.structure.plate_size == (None if subsample_size is None else 20)
    found = engine.loss(iwae(draws=16, outer=4), {"*": pathwise()}, runs=400)
    assert_unbiased(found, *exact(toy, "iwae", 16))


@each(GLOBAL_ROWS, slowly=(ROWS,))
@on_both
def test_portable_rows_and_a_mini_batch_of_them(backend: Backend, toy: Toy) -> None:
    objective, estimators = iwae(draws=16, outer=16), {"*": pathwise()}
    whole = Engine.of(backend, toy).loss(objective, estimators, runs=40)
    assert_unbiased(whole, *exact(toy, "iwae", 16))
    batch = {"x": toy.data["x"][3:8]}
    part = Engine.of(backend, toy, batch).loss(objective, estimators, total_rows=20, runs=40)
    assert_unbiased(part, *exact(toy, "iwae", 16, data=batch, scale=4.0))


@on_both
def test_more_draws_drown_the_signal_of_one_estimator_and_not_of_the_other(backend: Backend) -> None:
    """Signal to noise of a guide's gradient in the bound of K draws: pathwise falls with K, `dreg` rises.

    Rainforth et al. (2018), arXiv:1802.04537: the ratio falls like 1 / sqrt(K); Tucker et al. (2018), arXiv:1810.04152.
    """
    ratio: dict[tuple[str, int], float] = {}
    for estimator in (pathwise(), dreg()):
        for K in (4, 100):
            found = Engine.of(backend, GAUSSIANS2).loss(iwae(draws=K, outer=100), {"*": estimator}, runs=100)
            gradient = found.gradient["q_z1_loc"]
            ratio[type(estimator).__name__, K] = float(abs(gradient.mean()) / gradient.std())
    # A ratio from 100 runs has a relative standard error below a tenth, and 4 to 100 draws are a factor of five.
    assert ratio["pathwise", 100] < 0.6 * ratio["pathwise", 4], ratio
    assert ratio["dreg", 100] > 1.2 * ratio["dreg", 4], ratio
