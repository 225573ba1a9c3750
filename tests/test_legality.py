"""Every rule of legality: what it refuses, with the site's name and a remedy, and that the remedy is legal.

Programs are probed on both backends, whose structures must be equal, so each refusal is checked on both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from harness import BACKENDS, Engine
from toys import (
    BERNOULLI,
    BOTTOM_UP,
    GAUSSIANS2,
    GLOBAL_ROWS,
    MIXED_YZ,
    MIXED_ZY,
    PLATE,
    ROWS,
    Array,
    Backend,
    Ppl,
    Toy,
)

from ppl_lvm import fit, legality, recipe
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.structure import Plain, Structure
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.errors import LegalityError, ProgramError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.measure_valued import measure_valued
from ppl_lvm.estimators.off_policy import off_policy
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.rloo import rloo
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.stl import stl
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.guides.flow import flow
from ppl_lvm.guides.multivariate_normal import multivariate_normal
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.rws import rws
from ppl_lvm.objectives.wake_sleep import wake_sleep
from ppl_lvm.ops import log_mean_exp

X = np.array([0.4, -1.1, 0.9])
BY_NAME = {kind().__class__.__name__: kind for kind in (pathwise, dreg, enumerated, rloo, vimco, score)}
on_both = pytest.mark.parametrize("backend", BACKENDS)

Program = tuple[Callable[..., None], Callable[..., None]]


class still(Objective):
    """An objective at fixed draws, whose losses for model and guide differ."""

    verbs = frozenset({"mean", "variance"})
    detached = True

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.mean(d.log_w)), d.total(d.variance(d.log_w), 0.0 * d.log_w_global))


class parted(Objective):
    """Two losses."""

    verbs = frozenset({"log_mean_exp"})
    separate = True

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.log_mean_exp(d.log_w)), d.total(d.log_mean_exp(d.log_w, 2.0)))


class weighing(Objective):
    """Uses the self-normalised weights."""

    verbs = frozenset({"weighted"})

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.weighted(d.log_w, d.log_w)))


class undeclared(Objective):
    """Calls a verb that it does not declare."""

    verbs = frozenset({"mean"})

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.joint(log_mean_exp, d.log_w)))


# Programs of which one feature matters.


def normal_model(ppl: Ppl, x: Array) -> None:
    scale = ppl.xp.exp(ppl.param("log_scale", 0.1))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, scale))
        ppl.sample("x", ppl.dist.Normal(z, scale), obs=x)


def normal_guide(ppl: Ppl, x: Array) -> None:
    loc = ppl.param("loc", 0.2)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(loc + 0.3 * x, 0.8))


def bits(plated: bool, n: int) -> Program:
    """n binary latents a row: in a plate inside the row, or as one event."""

    def latent(ppl: Ppl, name: str, logits: Array) -> Array:
        if plated:
            with ppl.plate("bits", n, dim=-1):
                return ppl.sample(name, ppl.dist.Bernoulli(logits=logits))
        return ppl.sample(name, ppl.dist.Bernoulli(logits=logits).to_event(1))

    def model(ppl: Ppl, x: Array) -> None:
        logits = ppl.param("logits", np.linspace(-0.5, 0.5, n))
        with ppl.plate("data", len(x), dim=-2 if plated else -1):
            b = latent(ppl, "b", logits)
            loc = b.sum(-1)[..., None] if plated else b.sum(-1)
            ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=x[:, None] if plated else x)

    def guide(ppl: Ppl, x: Array) -> None:
        logits = ppl.param("q_logits", np.zeros(n))
        with ppl.plate("data", len(x), dim=-2 if plated else -1):
            latent(ppl, "b", logits + x[:, None])

    return model, guide


def shared_model(ppl: Ppl, x: Array) -> None:
    loc = ppl.param("loc", 0.2)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(loc, 1.0))
        ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)


def mean_field_guide(ppl: Ppl, x: Array) -> None:
    """Draws of a row do not look at the global site, but their likelihood does."""
    g_loc, loc = ppl.param("g_loc", 0.1), ppl.param("loc", 0.2)
    ppl.sample("g", ppl.dist.Normal(g_loc, 0.5))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(loc + 0.3 * x, 0.8))


def global_model(ppl: Ppl, x: Array) -> None:
    scale = ppl.xp.exp(ppl.param("log_scale", 0.1))
    g = ppl.sample("g", ppl.dist.Normal(0.0, scale))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, scale))
        ppl.sample("x", ppl.dist.Normal(g + z, 1.0), obs=x)


def class_above(ppl: Ppl, x: Array) -> None:
    """A class of all rows, as model and as guide of one."""
    g = ppl.sample("g", ppl.dist.Bernoulli(logits=ppl.param("logit", 0.1)))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(g + 0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(g + z, 1.0), obs=x)


def class_above_guide(ppl: Ppl, x: Array) -> None:
    g = ppl.sample("g", ppl.dist.Bernoulli(logits=ppl.param("q_logit", 0.2)))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(g + ppl.param("loc", 0.1) * x, 0.8))


def only_global_model(ppl: Ppl, x: Array) -> None:
    g = ppl.sample("g", ppl.dist.Normal(0.0, ppl.xp.exp(ppl.param("log_scale", 0.1))))
    with ppl.plate("data", len(x)):
        ppl.sample("x", ppl.dist.Normal(g, 1.0), obs=x)


def only_global_guide(ppl: Ppl, x: Array) -> None:
    ppl.sample("g", ppl.dist.Normal(ppl.param("loc", 0.2), 0.5))


def per_row_guide(ppl: Ppl, x: Array) -> None:
    loc = ppl.param("loc", 0.2)
    with ppl.plate("data", len(x)):
        ppl.sample("g", ppl.dist.Normal(loc + x, 0.5))


def cauchy_model(ppl: Ppl, x: Array) -> None:
    scale = ppl.xp.exp(ppl.param("log_scale", 0.1))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Cauchy(0.0, scale))
        ppl.sample("x", ppl.dist.Normal(z, scale), obs=x)


def summed_model(ppl: Ppl, x: Array) -> None:
    """An observation of all rows together, outside their plate."""
    scale = ppl.xp.exp(ppl.param("log_scale", 0.1))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, scale))
        ppl.sample("x", ppl.dist.Normal(z, scale), obs=x)
    ppl.factor("total", -((ppl.xp.sum(z, axis=-1) - 1.0) ** 2))


def point_guide(ppl: Ppl, x: Array) -> None:
    loc = ppl.param("loc", 0.2)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Delta(loc + 0.3 * x))


def factor_guide(ppl: Ppl, x: Array) -> None:
    loc = ppl.param("loc", 0.2)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(loc + 0.3 * x, 0.8))
        ppl.factor("tilt", -loc * z**2)


def half_point_guide(ppl: Ppl, x: Array) -> None:
    """z1 is a point of its own parameters, z2 a draw."""
    loc = ppl.param("loc", 0.2)
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.Delta(loc + 0.3 * x))
        ppl.sample("z2", ppl.dist.Normal(loc + z1, 0.8))


def moved_guide(ppl: Ppl, x: Array) -> None:
    """z is a point, but a function of a draw."""
    loc = ppl.param("loc", 0.2)
    with ppl.plate("data", len(x)):
        u = ppl.sample("u", ppl.dist.Normal(loc + 0.3 * x, 0.8), infer={"is_auxiliary": True})
        ppl.sample("z", ppl.dist.Delta(2.0 * u, log_density=-np.log(2.0)))


def steered_guide(ppl: Ppl, x: Array) -> None:
    """z is a point that looks at a draw without parameters, and at parameters."""
    loc, width = ppl.param("loc", 0.2), ppl.param("width", -0.2)
    with ppl.plate("data", len(x)):
        u = ppl.sample("u", ppl.dist.Normal(0.0 * x, 1.0), infer={"is_auxiliary": True})
        ppl.sample("z", ppl.dist.Delta(loc + ppl.xp.exp(width) * u, log_density=-width + 0.0 * u))


def weighed_guide(ppl: Ppl, x: Array) -> None:
    """Only the density of the point looks at parameters."""
    width = ppl.param("width", -0.2)
    with ppl.plate("data", len(x)):
        u = ppl.sample("u", ppl.dist.Normal(0.0 * x, 1.0), infer={"is_auxiliary": True})
        ppl.sample("z", ppl.dist.Delta(2.0 * u, log_density=-width + 0.0 * u))


PROGRAMS: dict[str, Program] = {
    "steered": (normal_model, steered_guide),
    "weighed": (normal_model, weighed_guide),
    "normal": (normal_model, normal_guide),
    "plated bits": bits(True, 3),
    "bits": bits(False, 3),
    "many bits": bits(False, 13),
    "shared": (shared_model, lambda ppl, x: normal_guide(ppl, x)),
    "mean field": (global_model, mean_field_guide),
    "only global": (only_global_model, only_global_guide),
    "per row": (only_global_model, per_row_guide),
    "cauchy": (cauchy_model, normal_guide),
    "summed": (summed_model, normal_guide),
    "point": (normal_model, point_guide),
    "factor": (normal_model, factor_guide),
    "half point": (GAUSSIANS2.model, half_point_guide),
    "moved": (normal_model, moved_guide),
    "class above": (class_above, class_above_guide),
}


@cache
def structure(backend: Backend, name: str) -> Structure:
    model, guide = PROGRAMS[name]
    return Engine(backend, model, guide, {"x": X}, portable=True).structure


def structures(case: Toy | str) -> list[Structure]:
    """What both backends find, which must be the same."""
    both = [Engine.of(b, case).structure if isinstance(case, Toy) else structure(b, case) for b in BACKENDS]
    assert_same(*both)
    return both


def assert_same(one: Structure, other: Structure) -> None:
    assert list(one.sites) == list(other.sites)
    for field in fields(one):
        if field.name != "sites":
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    for name, info in one.sites.items():
        for field in fields(info):
            a, b = getattr(info, field.name), getattr(other.sites[name], field.name)
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, (name, field.name)


def refusal(case: Toy | str, objective: Objective, estimators: Mapping[str, Estimator | None]) -> str:
    """The message, the same on both backends."""
    messages = []
    for found in structures(case):
        with pytest.raises(LegalityError) as refused:
            legality.plan(objective, estimators, found)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    return messages[0]


def assert_legal(case: Toy | str, objective: Objective, estimators: Mapping[str, Estimator | None]) -> None:
    for found in structures(case):
        legality.plan(objective, estimators, found)


def assert_refused(
    case: Toy | str,
    objective: Objective,
    estimators: Mapping[str, Estimator | None],
    site: str,
    *words: str,
    instead: set[str] | None = None,
) -> None:
    """Names the site and the words; offers these estimators for it, and each is legal, the others unchanged."""
    message = refusal(case, objective, estimators)
    assert repr(site) in message
    for word in words:
        assert word in message, message
    if instead is not None:
        line = next(line for line in message.splitlines() if f"Site {site!r}" in line)
        offered = re.findall(r"'(\w+)'", line.rpartition("use ")[2])
        assert set(offered) == instead, message
        for name in offered:
            assert_legal(case, objective, {**estimators, site: BY_NAME[name]()})


# Estimator against site.


def test_pathwise_needs_a_reparameterised_distribution() -> None:
    words = "no reparameterised draw"
    assert_refused(BERNOULLI, elbo(), {"z": pathwise()}, "z", words, instead={"score", "enumerate"})
    assert_refused(
        BERNOULLI, elbo(draws=2), {"z": pathwise()}, "z", words, instead={"vimco", "rloo", "score", "enumerate"}
    )
    instead = {"vimco", "score", "enumerate"}
    assert_refused(BERNOULLI, iwae(draws=2), {"z": pathwise()}, "z", words, instead=instead)
    assert_refused(BERNOULLI, iwae(draws=2), {"z": dreg()}, "z", words, instead=instead)


def test_enumeration_needs_a_finite_support() -> None:
    words = "no finite support of at most 4096 values"
    assert_refused("normal", elbo(), {"z": enumerated()}, "z", words, instead={"pathwise", "score"})
    assert_refused("many bits", elbo(draws=2), {"b": enumerated()}, "b", words, instead={"vimco", "rloo", "score"})
    assert_legal("bits", elbo(), {"b": enumerated()})


def test_a_support_is_counted_up_to_its_limit() -> None:
    """12 bits have 4,096 values, 13 bits 8,192."""
    PROGRAMS["12 bits"] = bits(False, 12)
    for found in structures("12 bits"):
        support = found.sites["b"].support
        assert support is not None and support.shape == (4096, 12)
        assert len(np.unique(support, axis=0)) == 4096
    assert all(found.sites["b"].support is None for found in structures("many bits"))


def test_enumeration_is_of_one_draw_a_row() -> None:
    assert_refused("plated bits", elbo(), {"b": enumerated()}, "b", "plates ['bits']", "to_event", instead={"score"})
    assert_legal("bits", elbo(), {"b": enumerated()})


def test_not_inside_a_joint_function() -> None:
    instead = {"vimco", "score", "enumerate"}
    assert_refused(BERNOULLI, iwae(draws=2), {"z": rloo()}, "z", "inside `joint`", instead=instead)
    assert_refused(BERNOULLI, iwae(), {"z": rloo()}, "z", "inside `joint`", instead=instead - {"vimco"})


def test_a_function_of_all_draws_is_summed_over_so_many_choices() -> None:
    assert_legal(BERNOULLI, iwae(draws=12), {"z": enumerated()})
    why = "summed over 2^13 choices, more than 4096"
    assert_refused(BERNOULLI, iwae(draws=13), {"z": enumerated()}, "z", why, instead={"vimco", "score"})


def test_estimators_that_one_verb_cannot_take() -> None:
    assert_refused("normal", parted(), {"z": stl()}, "z", "inside `log_mean_exp`", instead={"pathwise", "score"})
    assert_refused("normal", weighing(), {"z": dreg()}, "z", "inside `weighted`", instead={"pathwise", "score"})
    instead = {"vimco", "rloo", "score", "enumerate"}
    assert_refused(BERNOULLI, still(draws=2), {"z": measure_valued()}, "z", "inside `variance`", instead=instead)


@pytest.mark.parametrize("estimator", [rloo(), vimco()], ids=lambda e: type(e).__name__)
def test_a_leave_one_out_baseline_needs_two_draws(estimator: Estimator) -> None:
    assert_refused(BERNOULLI, elbo(), {"z": estimator}, "z", "needs 2 draws", "set draws = 2", instead={"score"})
    assert_legal(BERNOULLI, elbo(draws=2), {"z": estimator})
    # A global site's draws are the outer ones, however many a row has.
    estimators = {"g": estimator, "z": score()}
    assert_refused(PLATE, elbo(draws=8), estimators, "g", "needs 2 draws", "set outer = 2", instead={"score"})
    assert_legal(PLATE, elbo(outer=2), estimators)
    assert_legal(PLATE, iwae(draws=2, outer=2), {"g": estimator, "z": vimco()})


def test_an_objective_at_fixed_draws() -> None:
    """A live draw is stopped."""
    for found in structures("normal"):
        assert legality.plan(still(draws=2), {"z": pathwise()}, found)[0].estimators == {"z": Plain()}
    assert_refused("point", still(draws=1), {"z": score()}, "z", "fixed draws", "use 'elbo' or 'iwae'")
    assert_legal("moved", still(draws=2), {"u": score()})


# dreg.


def test_dreg_gives_shared_parameters_two_gradients() -> None:
    assert_refused("shared", elbo(), {"z": dreg()}, "z", "share parameters ['loc']", instead={"pathwise"})


def test_dreg_above_a_score_type_site() -> None:
    estimators: dict[str, Estimator] = {"z": dreg(), "y": score()}
    assert_refused(MIXED_YZ, iwae(draws=2), estimators, "z", "'y' depends on its draw", instead={"pathwise"})
    assert_legal(MIXED_ZY, iwae(draws=2), estimators)  # the scored site comes first
    assert_legal(MIXED_YZ, elbo(draws=2), estimators)  # no function of all draws


def test_dreg_beside_a_pathwise_site() -> None:
    estimators: dict[str, Estimator] = {"z1": dreg(), "z2": pathwise()}
    assert_refused(GAUSSIANS2, iwae(draws=2), estimators, "z1", "'z2'", "make both 'dreg' or both 'pathwise'")
    for both in (dreg(), pathwise()):
        assert_legal(GAUSSIANS2, iwae(draws=2), {"*": both})
    assert_legal(GAUSSIANS2, elbo(), estimators)


@pytest.mark.parametrize("case", [GLOBAL_ROWS, "mean field"], ids=["guide looks at it", "likelihood looks at it"])
def test_dreg_under_a_live_global_site(case: Toy | str) -> None:
    """The surrogate weighs the global's own path through the rows by w^2 too, whichever density it comes through."""
    estimators: dict[str, Estimator] = {"g": pathwise(), "z": dreg()}
    assert_refused(case, iwae(draws=2), estimators, "z", "'g' carries a pathwise gradient", "'score' for 'g'")
    assert_refused(case, iwae(draws=2), {"*": dreg()}, "z", "'g' carries a pathwise gradient")
    assert_legal(case, iwae(draws=2), {"g": pathwise(), "z": pathwise()})
    assert_legal(case, iwae(draws=2), {"g": score(), "z": dreg()})
    assert_legal(case, iwae(draws=2, outer=2), {"g": rloo(), "z": dreg()})
    assert_legal(case, elbo(draws=2), estimators)
    assert_legal(case, elbo(draws=2), {"*": dreg()})


@pytest.mark.parametrize("estimator", [measure_valued(), off_policy()], ids=lambda e: type(e).__name__)
def test_dreg_under_a_global_site_of_values(estimator: Estimator) -> None:
    """No gradient flows through them."""
    assert_legal("class above", iwae(draws=2), {"g": estimator, "z": dreg()})


def test_dreg_beside_what_is_no_draw() -> None:
    """A factor's and a point's own parameters have no second score that the surrogate could cancel."""
    assert_refused("factor", iwae(draws=2), {"z": dreg()}, "z", "'tilt' of the same row is a factor")
    assert_legal("factor", iwae(draws=2), {"z": pathwise()})
    assert_legal("factor", elbo(), {"z": dreg()})
    assert_refused("half point", iwae(draws=2), {"z2": dreg()}, "z2", "'z1' of the same row is a point")
    assert_legal("half point", iwae(draws=2), {"z2": pathwise()})
    assert_legal("moved", iwae(draws=2), {"*": dreg()})


@pytest.mark.parametrize("case", ["steered", "weighed"])
def test_dreg_beside_a_point_that_looks_at_parameters(case: str) -> None:
    """Their gradient reaches the bound beside the draw, and the surrogate would reweigh it."""
    words = "'z' of the same row is a point that looks at parameters beside its draws"
    assert_refused(case, iwae(draws=2), {"u": dreg()}, "u", words, instead={"pathwise"})
    assert_legal(case, elbo(draws=2), {"u": dreg()})
    for found in structures(case):
        assert [n for n, i in found.sites.items() if i.parameterised] == ["z"]
    assert_refused(case, still(draws=2), {"u": score()}, "z", "fixed draws")


def native_steered(library: str, steered: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    ppl, dist = (pyro, pyro_dist) if library == "pyro" else (numpyro, numpyro_dist)

    def model(x: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Normal(0.0 * x, 1.0))
            ppl.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Array) -> None:
        loc = ppl.param("loc", torch.tensor(0.1) if library == "pyro" else np.float32(0.1))
        with ppl.plate("data", len(x)):
            u = ppl.sample("u", dist.Normal(0.0 * x if steered else loc + 0.0 * x, 1.0), infer={"is_auxiliary": True})
            ppl.sample("z", dist.Delta(loc + u if steered else 2.0 * u))

    return model, guide


@on_both
def test_dreg_in_native_programs_with_points(backend: Backend) -> None:
    data = torch.tensor(X) if backend == "pyro" else X
    run: dict[str, Any] = {"recipe": "iwae", "draws": 2, "estimator": "dreg", "steps": 1, "batch_size": None}
    with pytest.raises(LegalityError, match=r"Site 'u' .*'z' of the same row is a point that looks at parameters"):
        fit(*native_steered(backend, True), data, **run)
    assert np.isfinite(fit(*native_steered(backend, False), data, **run).history["loss"]).all()


def test_dreg_in_a_flow_is_refused_for_bounds_of_several_draws() -> None:
    for b in BACKENDS:
        found = Engine(b, normal_model, flow(hidden=(4,)), {"x": X}, portable=True).structure
        assert [n for n, i in found.sites.items() if i.parameterised] == ["auto.rows"]
        with pytest.raises(LegalityError, match=r"'auto\.rows' of the same row is a point that looks at parameters"):
            legality.plan(iwae(draws=2), {"*": dreg()}, found)
        legality.plan(iwae(draws=2), {"*": pathwise()}, found)
        legality.plan(elbo(draws=2), {"*": dreg()}, found)
        joint = Engine(b, normal_model, multivariate_normal(), {"x": X}, portable=True).structure
        legality.plan(iwae(draws=2), {"*": dreg()}, joint)


# Points.


def test_a_point_is_carried_pathwise_whatever_is_asked() -> None:
    for found in structures("point"):
        for asked in (score(), dreg(), enumerated()):
            plan, notes = legality.plan(elbo(), {"*": asked}, found)
            assert plan.estimators == {"z": pathwise()}
            assert "z: pathwise" in notes[0] and type(asked).__name__ in notes[0]
        assert legality.plan(elbo(), {}, found) == legality.plan(elbo(), {"z": pathwise()}, found)


# Levels.


def test_a_site_that_the_guide_draws_for_every_row_and_the_model_once() -> None:
    model, guide = PROGRAMS["per row"]
    said = r"'g'.*the model once for all rows, sample it outside the plate in both"
    for backend in BACKENDS:
        with pytest.raises(ProgramError, match=said):
            Engine(backend, model, guide, {"x": X}, portable=True)
    assert_legal("only global", elbo(), {"g": score()})


def test_a_site_outside_the_plate_must_not_look_inside() -> None:
    message = refusal("summed", elbo(), {"*": pathwise()})
    assert "Site 'total'" in message and "['z']" in message and "data_plate='none'" in message
    for backend in BACKENDS:
        model, guide = PROGRAMS["summed"]
        whole = Engine(backend, model, guide, {"x": X}, portable=True, data_plate="none")
        legality.plan(iwae(draws=2), {"*": pathwise()}, whole.structure)


def test_several_draws_need_a_draw_in_the_row() -> None:
    for case in ("only global", "point"):
        message = refusal(case, iwae(draws=2), {"*": pathwise()})
        assert "draws = 2" in message and "raise outer" in message and "data_plate='none'" in message
        assert_legal(case, iwae(outer=2), {"*": pathwise()})
        assert_legal(case, elbo(draws=2), {"*": pathwise()})
    for backend in BACKENDS:
        whole = Engine(backend, only_global_model, only_global_guide, {"x": X}, portable=True, data_plate="none")
        legality.plan(iwae(draws=2), {"*": pathwise()}, whole.structure)


# The whole program.


def scaled(backend: Backend) -> Program:
    def in_pyro(x: Any) -> None:
        scale = pyro.param("scale", torch.tensor(1.0, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=0.5):
                z = pyro.sample("z", pyro_dist.Normal(0.0, scale))
            pyro.sample("x", pyro_dist.Normal(z, 1.0), obs=x)

    def in_numpyro(x: Any) -> None:
        scale = numpyro.param("scale", 1.0)
        with numpyro.plate("data", len(x)):
            with numpyro.handlers.scale(scale=0.5):
                z = numpyro.sample("z", numpyro_dist.Normal(0.0, scale))
            numpyro.sample("x", numpyro_dist.Normal(z, 1.0), obs=x)

    def pyro_guide(x: Any) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro_dist.Normal(pyro.param("loc", torch.tensor(0.1, dtype=x.dtype)), 1.0))

    def numpyro_guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", numpyro_dist.Normal(numpyro.param("loc", 0.1), 1.0))

    return (in_pyro, pyro_guide) if backend == "pyro" else (in_numpyro, numpyro_guide)


def test_a_scale_of_the_program_has_no_meaning_inside_a_function_of_draws() -> None:
    both = [Engine(b, *scaled(b), {"x": X}, portable=False).structure for b in BACKENDS]
    assert_same(*both)
    for found in both:
        with pytest.raises(LegalityError, match=r"Sites \['z'\] are scaled .* use 'elbo'"):
            legality.plan(iwae(draws=2), {"*": pathwise()}, found)
        legality.plan(elbo(), {"*": pathwise()}, found)
        # The guide is not scaled, so the two scaled densities are no KL of two distributions.
        with pytest.raises(LegalityError, match=r"'z' has no closed-form KL .* kl = 'sampled'"):
            legality.plan(elbo(kl="closed_form"), {"*": pathwise()}, found)


def test_sleep_needs_a_model_that_draws_every_site_of_the_guide() -> None:
    for objective in (wake_sleep(), rws(draws=2, sleep=0.5)):
        message = refusal("moved", objective, {"u": score()})
        assert "Sites ['u'] are the guide's alone" in message and "'rws' with sleep = 0" in message
    assert_legal("moved", rws(draws=2), {"u": score()})
    assert_legal("normal", wake_sleep(), {"z": score()})


def test_two_losses_and_shared_parameters() -> None:
    message = refusal("shared", parted(draws=2), {"*": pathwise()})
    assert "Parameters ['loc'] are in model and guide" in message and "separate them" in message
    assert_legal("normal", parted(draws=2), {"*": pathwise()})
    assert_legal("shared", elbo(), {"*": pathwise()})


def test_closed_form_kl_of_a_guide_against_the_order_of_the_model() -> None:
    assert_refused(BOTTOM_UP, elbo(kl="closed_form"), {"*": pathwise()}, "z1", "looks at ['z2']", "kl = 'sampled'")
    assert_legal(BOTTOM_UP, elbo(), {"*": pathwise()})
    assert_legal(GAUSSIANS2, elbo(kl="closed_form"), {"*": pathwise()})


def test_closed_form_kl_that_no_library_has() -> None:
    assert_refused(
        "cauchy", elbo(kl="closed_form"), {"*": pathwise()}, "z", "no closed-form KL from guide to prior", "'sampled'"
    )
    assert_legal("cauchy", elbo(), {"*": pathwise()})
    assert_legal("normal", elbo(kl="closed_form"), {"*": pathwise()})


def test_every_site_at_fault_is_named_at_once() -> None:
    message = refusal(PLATE, iwae(draws=2), {"g": pathwise(), "z": rloo()})
    assert "Objective 'iwae'" in message and "Site 'g' under estimator 'pathwise'" in message
    assert "Site 'z' under estimator 'rloo'" in message


# Verbs.


@on_both
def test_an_undeclared_verb_is_refused_when_it_is_called(backend: Backend) -> None:
    with pytest.raises(LegalityError, match=r"calls `joint` but declares verbs = \['mean'\].*add 'joint'"):
        Engine.of(backend, ROWS).loss(undeclared(draws=2), {"*": pathwise()})


# Patterns and auto.


def test_a_pattern_that_matches_nothing() -> None:
    message = refusal(GAUSSIANS2, elbo(), {"z3": score(), "*": pathwise()})
    assert "'z3'" in message and "['z1', 'z2']" in message
    assert_legal(GAUSSIANS2, elbo(), {"z2": score(), "*": pathwise()})


def test_the_most_specific_pattern_is_taken() -> None:
    """A name before a longer pattern, then the pattern that leaves less open, as a recipe has it."""
    for found in structures(GAUSSIANS2):
        patterns: dict[str, Estimator | None] = {"*": pathwise(), "z[12]": dreg(), "z1": score()}
        plan, notes = legality.plan(elbo(), patterns, found)
        assert plan.estimators == {"z1": score(), "z2": dreg()}
        assert notes == []
        plan, notes = legality.plan(elbo(), {"z?": score(), "z2": None}, found)
        assert plan.estimators == {"z1": score(), "z2": pathwise()}
        assert notes == ["z2: pathwise (chosen by auto)"]
        patterns = {"??": dreg(), "z*": score()}
        assert legality.plan(elbo(), patterns, found)[0].estimators == {"z1": score(), "z2": score()}
        assert recipe({"objective": "elbo", "estimator": patterns}).estimator_for("z1") == score()


def test_a_name_with_brackets_is_a_name_first() -> None:
    def model(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z[0]", ppl.dist.Normal(ppl.param("a", 0.1), 1.0))
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z[0]", ppl.dist.Normal(ppl.param("b", 0.1), 1.0))

    PROGRAMS["brackets"] = (model, guide)
    for found in structures("brackets"):
        assert legality.plan(elbo(), {"z[0]": score()}, found)[0].estimators == {"z[0]": score()}


@pytest.mark.parametrize(
    ("case", "objective", "chosen"),
    [
        (GLOBAL_ROWS, iwae(draws=5), {"g": pathwise(), "z": pathwise()}),
        (BERNOULLI, iwae(draws=5), {"z": vimco()}),
        (BERNOULLI, elbo(draws=2), {"z": vimco()}),
        (BERNOULLI, elbo(), {"z": score()}),
        (PLATE, iwae(draws=5), {"g": score(), "z": vimco()}),
        (PLATE, elbo(outer=2), {"g": vimco(), "z": score()}),
        (MIXED_YZ, iwae(draws=2), {"z": pathwise(), "y": vimco()}),
        ("plated bits", iwae(draws=2), {"b": vimco()}),
        ("normal", still(draws=2), {"z": score()}),
        ("normal", still(), {"z": score()}),
    ],
    ids=lambda v: v.name if isinstance(v, Toy) else str(v) if isinstance(v, str) else None,
)
def test_auto(case: Toy | str, objective: Objective, chosen: dict[str, Estimator]) -> None:
    for found in structures(case):
        plan, notes = legality.plan(objective, {}, found)
        assert plan.estimators == chosen
        assert notes == [f"{n}: {type(e).__name__} (chosen by auto)" for n, e in chosen.items()]
        assert legality.plan(objective, {"*": None}, found) == (plan, notes)


# What is refused before any rule, at the probe.


@on_both
def test_a_guide_that_observes_the_models_site(backend: Backend) -> None:
    """Its likelihood would have been taken for the guide's."""

    def guide(ppl: Ppl, x: Array) -> None:
        loc = ppl.param("loc", 0.2)
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(loc, 0.8))
            ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ProgramError, match="'x' is observed in the guide and observed in the model"):
        Engine(backend, normal_model, guide, {"x": X}, portable=True)
