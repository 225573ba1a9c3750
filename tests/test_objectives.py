"""Every legal cell of objective and estimator: the expected gradient is the exact one, on both backends.

Discrete programs have no Monte Carlo tolerance: every outcome of the draws is laid out along the outer axis with its
probability, so the mean of the gradients must equal what the oracle finds by differentiating the enumerated formula.
Self-normalised objectives are held to the expectation of their own K-draw gradient, or, where all sites are
enumerated, to that of many draws. Which cells are legal is what `legality` says; for the others it must name a remedy.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _pytest.mark import ParameterSet
from harness import BACKENDS, Engine, Loss, assert_equal
from jax.scipy.special import logsumexp
from oracle import Exact, Formula, Kind, Row, expected, expected_at, outcomes, table, tuples
from toys import BERNOULLI, CATEGORICALS, PLATE, UPWARD, Backend, Toy

from ppl_lvm import legality, matrix
from ppl_lvm.algorithm import Estimator, Objective, best_pattern
from ppl_lvm.backends.training import initial_extras
from ppl_lvm.catalogue import estimators as estimator_files
from ppl_lvm.catalogue import objectives as objective_files
from ppl_lvm.catalogue import resolve
from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.measure_valued import measure_valued
from ppl_lvm.estimators.off_policy import off_policy
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.autogen import autogen
from ppl_lvm.objectives.chivi import chivi
from ppl_lvm.objectives.ciwae import ciwae
from ppl_lvm.objectives.cubo import cubo
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.f_divergence import Name, f_divergence
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.objectives.log_variance import log_variance
from ppl_lvm.objectives.miwae import miwae
from ppl_lvm.objectives.piwae import piwae
from ppl_lvm.objectives.renyi import renyi
from ppl_lvm.objectives.rws import rws
from ppl_lvm.objectives.trajectory_balance import trajectory_balance
from ppl_lvm.objectives.tvo import tvo
from ppl_lvm.objectives.vbis import vbis
from ppl_lvm.objectives.vis import vis
from ppl_lvm.objectives.wake_sleep import wake_sleep

TO_ROUNDING = 1e-12
EPSILON = 0.1  # of off_policy, by default
OWN = {"a": np.array([0.3]), "v": np.array([-0.4])}
"""log Z of trajectory balance; any number, as gradients must be right before it is learned."""

Array = jax.Array
stop = jax.lax.stop_gradient


# What the objectives are, in formulas of their own: losses of one row's draws.


def mean(r: Row, h: Array) -> Array:
    return (jnp.exp(r.log_weight) * h).sum(-1)


def log_mean(r: Row, h: Array) -> Array:
    return logsumexp(h + r.log_weight, axis=-1)


def bound(r: Row, groups: int = 1) -> Array:
    """Importance-weighted bounds of equal groups, averaged."""
    h = r.log_w.reshape(*r.log_w.shape[:-1], groups, -1)
    return (logsumexp(h, axis=-1) - math.log(h.shape[-1])).mean(-1)


def weighted_elbo(r: Row, beta: float = 1.0, weights: Mapping[str, float] | None = None) -> Array:
    total: Any = 0.0
    for name, (log_p, log_q) in r.parts.items():
        pattern = best_pattern(weights or {}, name)
        weight = 1.0 if pattern is None else (weights or {})[pattern]
        if log_p is not None and log_p.ndim > 1:  # not a global site's
            total = total + weight * (log_p if log_q is None else beta * (log_p - log_q))
    return total.mean(-1)


def vr(r: Row, alpha: float) -> Array:
    if alpha == 1.0:
        return r.log_w.mean(-1)
    return (logsumexp((1 - alpha) * r.log_w, axis=-1) - math.log(r.log_w.shape[-1])) / (1 - alpha)


def thermodynamic(r: Row, points: tuple[float, ...]) -> Array:
    """Left Riemann sum of expectations under `q^(1-b) p^b`, whose probabilities are differentiated."""

    def under(b: float) -> Array:
        return (jax.nn.softmax(b * r.log_w + r.log_weight, axis=-1) * r.log_w).sum(-1)

    return sum(((b - a) * under(a) for a, b in itertools.pairwise(points)), jnp.zeros(()))


def wake(r: Row) -> Array:
    return (stop(jax.nn.softmax(r.log_w + r.log_weight, axis=-1)) * r.log_q).sum(-1)


def by_draw(r: Row, h: Array) -> Array:
    """`[..., K * V] -> [..., K, V]`."""
    return h.reshape(*h.shape[:-1], *r.per_draw.shape[-2:])


def spread(r: Row) -> Array:
    """Unbiased variance over draws, each a mean over its own values; over all values where there is one draw."""
    h = by_draw(r, r.log_w)
    first, second = (r.per_draw * h).sum(-1), (r.per_draw * h**2).sum(-1)
    K = h.shape[-2]
    if K == 1:
        return (second - first**2).mean(-1)
    pairs = first.sum(-1) ** 2 - (first**2).sum(-1)
    return second.mean(-1) - pairs / (K * (K - 1))


def imbalance(r: Row) -> Array:
    log_z = r.params["a"][0] + r.x[0] * r.params["v"][0]
    return (r.per_draw * (log_z - by_draw(r, r.log_w)) ** 2).sum(-1).mean(-1)


F = {
    "kl_reverse": lambda u: -jnp.log(u),
    "kl_forward": lambda u: u * jnp.log(u),
    "jeffreys": lambda u: (u - 1) * jnp.log(u),
    "jensen_shannon": lambda u: (u * jnp.log(u) - (1 + u) * jnp.log((1 + u) / 2)) / 2,
    "hellinger": lambda u: (jnp.sqrt(u) - 1) ** 2,
    "chi_square": lambda u: u**2 - 1,
    "neyman": lambda u: 1 / u - 1,
    "total_variation": lambda u: abs(u - 1) / 2,
}


def divergence(r: Row, name: str) -> Array:
    w = jax.nn.softmax(r.log_w, axis=-1)
    return F[name](w * w.shape[-1]).mean(-1)


@dataclass(frozen=True)
class Case:
    """An objective, and its two losses of a row as formulas; `exact` where gradients are those of an expectation."""

    objective: Objective
    model: Formula
    guide: Formula | None = None
    exact: bool = True
    glob: float = -1.0

    def __str__(self) -> str:
        kind = type(self.objective)
        said = {n: v for n, v in self.objective if v != kind.model_fields[n].default}
        return f"{kind.__name__}({', '.join(f'{n}={v}' for n, v in said.items())})".replace(" ", "")


def lower(r: Row) -> Array:
    return -mean(r, r.log_w)


WEIGHTS: Any = {"z*": 0.5, "x": 2.0}
ALPHAS = (0.0, 0.5, 1.0, 2.0, -1.0)
CASES = [
    Case(elbo(), lower),
    Case(elbo(draws=2), lower),
    Case(elbo(draws=2, beta=2.5), lambda r: -weighted_elbo(r, 2.5), glob=-2.5),
    Case(elbo(draws=2, beta=0.7, weights=WEIGHTS), lambda r: -weighted_elbo(r, 0.7, WEIGHTS), glob=-0.7),
    Case(elbo(draws=2, beta=2.5, kl="closed_form"), lambda r: -weighted_elbo(r, 2.5), glob=-2.5),
    Case(elbo(draws=2, weights=WEIGHTS, kl="where_known"), lambda r: -weighted_elbo(r, 1.0, WEIGHTS)),
    Case(autogen(draws=2, m=1.5), lambda r: -weighted_elbo(r, 1.0, {"x": 2.5})),
    Case(iwae(draws=2), lambda r: -bound(r)),
    Case(iwae(draws=3), lambda r: -bound(r)),
    Case(miwae(draws=4, groups=2), lambda r: -bound(r, 2)),
    Case(piwae(draws=4, groups=2), lambda r: -bound(r), lambda r: -bound(r, 2)),
    Case(ciwae(draws=2, beta=0.3), lambda r: -0.3 * mean(r, r.log_w) - 0.7 * bound(r)),
    *(Case(renyi(draws=2, alpha=a), lambda r, a=a: -vr(r, a)) for a in ALPHAS),  # type: ignore[misc]
    Case(renyi(draws=2, alpha="max"), lambda r: -r.log_w.max(-1)),
    *(
        Case(f_divergence(draws=2, divergence=n), lambda r: -bound(r), lambda r, n=n: divergence(r, n))  # type: ignore[misc]
        for n in get_args(Name)
    ),
    Case(vis(draws=2), lambda r: -log_mean(r, r.log_w), lambda r: log_mean(r, 2 * r.log_w), exact=False),
    Case(cubo(draws=2), lower, lambda r: log_mean(r, 2 * r.log_w) / 2, exact=False),
    Case(cubo(draws=2, n=3.0), lower, lambda r: log_mean(r, 3 * r.log_w) / 3, exact=False),
    Case(
        chivi(draws=2), lower, lambda r: 0.5 * (log_mean(r, 2 * r.log_w) - mean(r, r.log_w)), exact=False
    ),
    Case(vbis(draws=2), lambda r: -log_mean(r, r.log_w), lower, exact=False),
    Case(
        tvo(draws=2, partitions=3, smallest=0.2),
        lambda r: -thermodynamic(r, (0.0, 0.2, math.sqrt(0.2), 1.0)),
        exact=False,
    ),
    Case(rws(draws=2), lambda r: -log_mean(r, r.log_w), lambda r: -wake(r), exact=False),
    Case(log_variance(draws=2), lower, lambda r: 0.5 * spread(r), exact=False),
    Case(log_variance(draws=3), lower, lambda r: 0.5 * spread(r), exact=False),
    Case(trajectory_balance(draws=2), lower, imbalance, exact=False),
    # Its guide learns from the model's own draws: see `test_sleep`.
    Case(wake_sleep(draws=2), lower),
]
OF_SEQUENCES = {"fivo"}
"""Proved in `test_fivo`, on programs with a scan."""
ACROSS_ROWS = {"tcvae", "infovae", "dipvae", "capacity", "capacitron"}
"""No sums over rows, or with parameters of their own: proved in `test_aggregate`."""
FORMULAS = {type(c.objective).__name__ for c in CASES} | OF_SEQUENCES | ACROSS_ROWS
assert {*objective_files()} == FORMULAS, "an objective has no formula here"


def options(kind: type[Estimator]) -> Iterator[Estimator]:
    """An estimator under every choice of its options that are choices."""
    choices = {n: get_args(f.annotation) for n, f in kind.model_fields.items() if get_origin(f.annotation) is not None}
    literal = {n: [v for v in c if isinstance(v, str)] for n, c in choices.items()}
    literal = {n: c for n, c in literal.items() if c}
    for values in itertools.product(*literal.values()):
        yield kind(**dict(zip(literal, values, strict=True)))


ESTIMATORS = [
    e
    for name in estimator_files()
    if issubclass(kind := resolve("estimator", name, Path(), "the test"), Estimator)
    and not kind.marginal  # of sites that these programs do not have; see `test_marginal.py`
    and kind.site not in ("classes", "one_hot")  # values of their own; see `test_discrete.py`, `test_controlled.py`
    for e in options(kind)
]


def name_of(cell: object) -> str | None:
    if isinstance(cell, Toy):
        return cell.name
    if isinstance(cell, Estimator):
        said = [str(v) for n, v in cell if v != type(cell).model_fields[n].default]
        return "-".join([type(cell).__name__, *said])
    return str(cell) if isinstance(cell, Case) else None


def objective_name(objective: Objective) -> str:
    return type(objective).__name__


def kind_of(estimator: Estimator) -> Kind:
    """How the values of a site with two values are laid out."""
    if estimator.exhaustive:
        return "enumerated"
    if estimator.weighted:
        return "elsewhere"
    return "measured" if estimator.count(2) > 1 else "drawn"


def in_expectation(backend: Backend, toy: Toy, objective: Objective, estimators: Mapping[str, Estimator]) -> Loss:
    """One run with every outcome of its draws along the outer axis, baselines and own parameters anywhere."""
    engine = Engine.of(backend, toy)
    kinds = {name: kind_of(e) for name, e in estimators.items() if name != "g"}
    if toy is PLATE:
        values, weight = of_plate(objective.draws, estimators["z"])
    else:
        values, weight, _ = outcomes(toy, objective.draws, kinds, epsilon=EPSILON)
    many = objective.model_copy(update={"outer": len(weight)})
    plan = engine.plan(many, estimators)
    rng = np.random.default_rng(0)
    states, own = initial_extras(many, plan, engine.batch)
    return engine.loss(
        many,
        estimators,
        values=values,
        weight=weight,
        states={name: np.asarray(0.7) for name in states},
        own={
            of: OWN if of == "objective" else {n: rng.normal(size=np.shape(p)) for n, p in ps.items()}
            for of, ps in own.items()
        },
    )


def of_plate(K: int, local: Estimator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outcomes of the plate: a scored global class, and its rows' under an estimator of theirs."""
    kind, entries = kind_of(local), table(PLATE)
    if kind == "enumerated":
        return {"g": np.eye(2)}, np.exp(entries.global_log_mass)
    values, weight = tuples(PLATE, K)
    if kind == "measured":
        values["z"] = np.repeat(values["z"], 3, axis=1)
    if kind == "elsewhere":
        g, z = values["g"].argmax(-1), values["z"].argmax(-1)
        q = np.exp(entries.log_mass[g[:, None, None], np.arange(3), z])
        weight = np.exp(entries.global_log_mass[g]) * ((1 - EPSILON) * q + EPSILON / 2).prod((1, 2))
    return values, weight


TRUTHS: dict[object, Exact] = {}


def truth(case: Case, toy: Toy, estimators: Mapping[str, Estimator]) -> Exact:
    """The model's loss, its gradient in the model's parameters, and that of the guide's loss in all others."""
    K = case.objective.draws
    kinds = {name: kind_of(e) for name, e in estimators.items()}

    def of(part: str, formula: Formula, glob: float) -> Exact:
        key = str(case), part, toy.name, None if case.exact else tuple(kinds.items())
        if key not in TRUTHS:
            own = OWN if isinstance(case.objective, trajectory_balance) else None
            TRUTHS[key] = (
                expected(toy, K, formula, glob) if case.exact else expected_at(toy, K, kinds, formula, own=own)
            )
        return TRUTHS[key]

    model = of("model", case.model, case.glob)
    if case.guide is None:
        return model
    # The guide's loss of a lower bound has the global part too; divergences are of rows alone, without globals.
    guide = of("guide", case.guide, case.glob)
    return Exact(model.value, {n: g if n in toy.model_params else guide.gradient[n] for n, g in model.gradient.items()})


def assert_exact(case: Case, toy: Toy, estimators: Mapping[str, Estimator], found: Loss) -> None:
    value, gradient = truth(case, toy, estimators)
    if isinstance(case.objective, wake_sleep):
        gradient = {n: gradient[n] for n in toy.model_params}
        found = Loss(found.value, {n: found.gradient[n] for n in gradient})
    if isinstance(case.objective, trajectory_balance):
        assert case.guide is not None
        guide = TRUTHS[str(case), "guide", toy.name, tuple((n, kind_of(e)) for n, e in estimators.items())].gradient
        for n in OWN:
            np.testing.assert_allclose(found.own["objective"][n], guide[n], rtol=0, atol=TO_ROUNDING)
        gradient = {n: gradient[n] for n in toy.params}
    assert_equal(found, value, gradient, TO_ROUNDING)


def assert_remedied(message: str, toy: Toy, objective: Objective, estimators: Mapping[str, Estimator]) -> None:
    """A refusal names the site, and every estimator that it offers there is legal."""
    structure = Engine.of("pyro", toy).structure
    lines = [line for line in message.splitlines() if line.startswith("- ")]
    assert lines, message
    for line in lines:
        assert any(repr(name) in line for name in structure.sites) or "draws = " in line, line
        site = re.match(r"- Site '(\w+)' under", line)
        if site is None:
            continue
        for offered in re.findall(r"'(\w+)'", line.rpartition("use ")[2]):
            if offered in estimator_files():
                kind = resolve("estimator", offered, Path(), "the test")
                assert issubclass(kind, Estimator)
                others = {**estimators, site[1]: kind()}
                case = legality.Case(objective, kind(), structure.sites[site[1]], structure, others)
                assert legality.refusal(case) is None, (line, offered)


on_both = pytest.mark.parametrize("backend", BACKENDS)


def cells() -> Iterator[ParameterSet]:
    """Fast are a third of one program on Pyro and a cover of the rest: compiling each takes NumPyro seconds."""
    for backend, toy in itertools.product(BACKENDS, (BERNOULLI, CATEGORICALS, UPWARD, PLATE)):
        for i, case in enumerate(CASES):
            finite = matrix.KINDS["finite"]
            served = [e for e in ESTIMATORS if matrix.judged(case.objective, e, *finite)[0] != "refused"]
            for j, estimator in enumerate(ESTIMATORS):
                chosen = estimator == served[i % len(served)]
                fast = chosen and toy is UPWARD if backend == "numpyro" else chosen and toy is PLATE
                fast = fast or (toy is UPWARD and backend == "pyro" and (i + j) % 3 == 0)
                name = "-".join([backend, *map(str, map(name_of, (toy, case, estimator)))])
                marks = [] if fast else [pytest.mark.slow]
                yield pytest.param(backend, toy, case, estimator, id=name, marks=marks)


@pytest.mark.parametrize(("backend", "toy", "case", "estimator"), [*cells()])
def test_one_estimator(backend: Backend, toy: Toy, case: Case, estimator: Estimator) -> None:
    sites = [i.name for i in Engine.of("pyro", toy).structure.drawn()]
    estimators = {name: score() if name == "g" else estimator for name in sites}
    if kind_of(estimator) == "measured" and case.objective.draws > 2:
        # Each value that is measured at one site has a draw of the next: too many outcomes for both to be measured.
        estimators |= {name: score() for name in sites[:-1]}
    check(backend, toy, case, estimators)


MIXED = (elbo, iwae, renyi, ciwae, vis, chivi, tvo, rws, log_variance, trajectory_balance)
# The first of each with two draws.
MIXED_CASES = [next(c for c in CASES if isinstance(c.objective, kind) and c.objective.draws == 2) for kind in MIXED]
KINDS_OF_ESTIMATORS = (score(), vimco(), enumerated(), measure_valued(), off_policy())


def pairs() -> Iterator[ParameterSet]:
    for backend, toy in itertools.product(BACKENDS, (CATEGORICALS, UPWARD)):
        for (i, case), (j, pair) in itertools.product(
            enumerate(MIXED_CASES), enumerate(itertools.permutations(KINDS_OF_ESTIMATORS, 2))
        ):
            fast = toy is UPWARD and (i + j) % (3 if backend == "pyro" else 20) == 0
            name = "-".join([backend, *map(str, map(name_of, (toy, case, *pair)))])
            yield pytest.param(backend, toy, case, *pair, id=name, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("backend", "toy", "case", "first", "second"), [*pairs()])
def test_two_estimators_in_one_guide(
    backend: Backend, toy: Toy, case: Case, first: Estimator, second: Estimator
) -> None:
    """The second site is drawn from the first: in every value of it where it has several."""
    check(backend, toy, case, {"z1": first, "z2": second})


def check(backend: Backend, toy: Toy, case: Case, estimators: Mapping[str, Estimator]) -> None:
    try:
        Engine.of(backend, toy).plan(case.objective, estimators)
    except LegalityError as refused:
        assert_remedied(str(refused), toy, case.objective, estimators)
        return
    assert_exact(case, toy, estimators, in_expectation(backend, toy, case.objective, estimators))


@pytest.mark.parametrize("objective", [pytest.param(elbo(), marks=pytest.mark.slow), iwae(draws=2)], ids=objective_name)
@pytest.mark.parametrize("estimator", [enumerated(), measure_valued(), off_policy()], ids=name_of)
@on_both
def test_a_global_class_over_scored_rows(backend: Backend, estimator: Estimator, objective: Objective) -> None:
    """The rows are drawn anew under every value of the global site."""
    if isinstance(estimator, measure_valued):
        objective = objective.model_copy(update={"draws": 1})  # half a million outcomes otherwise
    K, kind, entries = objective.draws, kind_of(estimator), table(PLATE)
    q_g, q_z = np.exp(entries.global_log_mass), np.exp(entries.log_mass)
    values: dict[str, list[np.ndarray]] = {"g": [], "z": []}
    weight = []
    for start in [-1] if kind == "enumerated" else [0, 1]:
        under = ([start] if start >= 0 else []) + ([0, 1] if kind != "elsewhere" else [])
        z = np.indices((2,) * (len(under) * K * 3)).reshape(len(under), K, 3, -1)
        chance = np.ones(z.shape[-1])
        if start >= 0:
            chance *= (1 - EPSILON) * q_g[start] + EPSILON / 2 if kind == "elsewhere" else q_g[start]
        for e, g in enumerate(under):
            chance *= q_z[g, np.arange(3)[:, None], z[e]].prod((0, 1))
        weight.append(chance)
        values["z"].append(np.eye(2)[z.transpose(3, 0, 1, 2)].reshape(-1, K, 3, 2))
        values["g"].append(np.tile(np.eye(2)[start], (len(values["z"][-1]), 1)))
    given = {n: np.concatenate(v) for n, v in values.items() if n != "g" or kind != "enumerated"}
    found = Engine.of(backend, PLATE).loss(
        objective.model_copy(update={"outer": len(np.concatenate(weight))}),
        {"g": estimator, "z": score()},
        values=given,
        weight=np.concatenate(weight),
    )
    assert_equal(found, *expected(PLATE, K, lambda r: -bound(r), -1.0), TO_ROUNDING)


@pytest.mark.parametrize("kl", ["sampled", "where_known"])
@on_both
def test_free_bits(backend: Backend, kl: Any) -> None:
    """Each site's KL where it is above them; the number itself, without gradient, where it is below."""

    def parts(*names: str) -> Callable[[Row], Array]:
        return lambda r: sum((-weighted_elbo(r._replace(parts={n: r.parts[n]})) for n in names), jnp.zeros(()))

    kls = {n: expected(CATEGORICALS, 1, parts(n)).value for n in ("z1", "z2")}
    low, high = sorted(kls, key=lambda n: kls[n])
    for bits, counted in ((0.5 * kls[low], (low, high)), (0.5 * sum(kls.values()), (high,)), (2 * kls[high], ())):
        found = Engine.of(backend, CATEGORICALS).loss(elbo(kl=kl, free_bits=bits), {"*": enumerated()})
        value, gradient = expected(CATEGORICALS, 1, parts("x", *counted))
        assert_equal(found, value + bits * (2 - len(counted)), gradient, TO_ROUNDING)
    # A KL in closed form that looks at no draw is no estimate, whatever the estimator.
    found = in_expectation(backend, BERNOULLI, elbo(draws=2, kl="closed_form", free_bits=5.0), {"z": score()})
    value, gradient = expected(BERNOULLI, 2, parts("x"))
    assert_equal(found, value + 5.0, gradient, TO_ROUNDING)


@on_both
def test_published_gradients_of_one_bernoulli(backend: Backend) -> None:
    """Of the guide's logit, and the same where the site is enumerated."""
    for objective, estimator, published in (
        (elbo(), score(), -0.2465),
        (iwae(draws=4), vimco(), -0.1377),
        (iwae(draws=5), score(), -0.1164),
        (iwae(draws=5), enumerated(), -0.1164),
    ):
        found = in_expectation(backend, BERNOULLI, objective, {"z": estimator}).gradient["q_logit"]
        assert found == pytest.approx(published, abs=5e-5)


def test_the_fast_cells_have_every_objective_and_estimator() -> None:
    """Of those that discrete sites have, on both backends, in cells that are legal."""
    for backend in BACKENDS:
        found: set[str] = set()
        for cell in cells():
            where, toy, case, estimator = cell.values
            if where == backend and not cell.marks and toy is UPWARD:
                try:
                    Engine.of("pyro", UPWARD).plan(case.objective, {"*": estimator})  # type: ignore[union-attr,dict-item]
                except LegalityError:
                    continue
                found |= {type(case.objective).__name__, str(name_of(estimator))}  # type: ignore[union-attr]
        elsewhere = {"pathwise", "dreg", "stl", "expected"} | OF_SEQUENCES | ACROSS_ROWS
        assert found >= {*objective_files(), *(str(name_of(e)) for e in ESTIMATORS)} - elsewhere
