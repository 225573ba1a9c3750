"""The legality table says what `legality` says of real programs, and every refusal in it names a way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from harness import BACKENDS, Engine
from toys import Array, Backend, Ppl

from ppl_lvm import legality, matrix
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.structure import Structure
from ppl_lvm.catalogue import estimators, objectives
from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.marginalize import marginalize

Program = tuple[Callable[..., None], Callable[..., None]]
on_both = pytest.mark.parametrize("backend", BACKENDS)
of_each_kind = pytest.mark.parametrize("kind", matrix.KINDS)


def of_a_row(prior: Callable[[Ppl, Array], object], posterior: Callable[[Ppl, Array], object]) -> Program:
    """A latent z in every row, whose distributions have a parameter."""

    def model(ppl: Ppl, x: Array) -> None:
        theta = ppl.param("theta", 0.1)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", prior(ppl, theta + 0.0 * x))
            z = z if z.ndim == x.ndim else ppl.xp.sum(z, axis=-1)
            ppl.sample("x", ppl.dist.Normal(theta + z, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", posterior(ppl, ppl.param("phi", 0.2) + 0.3 * x))

    return model, guide


def normal(ppl: Ppl, loc: Array) -> object:
    return ppl.dist.Normal(loc, 0.8)


def bit(ppl: Ppl, logits: Array) -> object:
    return ppl.dist.Bernoulli(logits=logits)


def index(ppl: Ppl, logits: Array) -> object:
    return ppl.dist.Categorical(logits=ppl.xp.stack([0.0 * logits, logits], -1))


def bits(ppl: Ppl, logits: Array) -> object:
    return ppl.dist.Bernoulli(logits=ppl.xp.stack([logits] * 40, axis=-1)).to_event(1)


def count(ppl: Ppl, log_rate: Array) -> object:
    return ppl.dist.Poisson(ppl.xp.exp(log_rate))


def geometric(ppl: Ppl, logits: Array) -> object:
    """Counts of another family than the guide's, so that no library has the KL."""
    return ppl.dist.Geometric(logits=logits)


def above(top: Callable[[Ppl, Array], object]) -> Program:
    """A latent g of all rows, above a continuous one of each."""

    def model(ppl: Ppl, x: Array) -> None:
        theta = ppl.param("theta", 0.1)
        g = ppl.sample("g", top(ppl, theta))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(g + 0.0 * x, ppl.xp.exp(theta)))
            ppl.sample("x", ppl.dist.Normal(g + z, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        phi = ppl.param("phi", 0.2)
        g = ppl.sample("g", top(ppl, phi))
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(g + phi * x, 0.8))

    return model, guide


def with_a_point() -> Program:
    def model(ppl: Ppl, x: Array) -> None:
        theta = ppl.param("theta", 0.1)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(theta + 0.0 * x, 1.0))
            w = ppl.sample("w", ppl.dist.Normal(z, ppl.xp.exp(theta)))
            ppl.sample("x", ppl.dist.Normal(z + w, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        phi = ppl.param("phi", 0.2)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Delta(phi + 0.3 * x))
            ppl.sample("w", ppl.dist.Normal(phi + z, 0.8))

    return model, guide


def without_a_guide() -> Program:
    def model(ppl: Ppl, x: Array) -> None:
        theta = ppl.param("theta", 0.1)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(theta + 0.0 * x, 1.0))
            y = ppl.sample("y", ppl.dist.Bernoulli(logits=theta + 0.0 * x))
            ppl.sample("x", ppl.dist.Normal(z + y, 1.0), obs=x)

    def guide(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", normal(ppl, ppl.param("phi", 0.2) + 0.3 * x))

    return model, guide


def in_a_scan() -> Program:
    def model(ppl: Ppl, x: Array) -> None:
        theta = ppl.param("theta", 0.1)
        with ppl.plate("data", len(x)):

            def step(last: Array, x_t: Array) -> tuple[Array, Array]:
                z = ppl.sample("z", ppl.dist.Normal(theta * last, 1.0))
                ppl.sample("x", ppl.dist.Normal(z, ppl.xp.exp(theta)), obs=x_t)
                return z, z

            ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))

    def guide(ppl: Ppl, x: Array) -> None:
        phi = ppl.param("phi", 0.2)
        with ppl.plate("data", len(x)):

            def step(last: Array, x_t: Array) -> tuple[Array, Array]:
                z = ppl.sample("z", ppl.dist.Normal(phi * x_t + 0.1 * last, 0.8))
                return z, z

            ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))

    return model, guide


PROGRAMS: dict[str, Program] = {
    "continuous": of_a_row(normal, normal),
    "finite": of_a_row(bit, bit),
    "index": of_a_row(index, index),
    "many classes": of_a_row(bits, bits),
    "count": of_a_row(geometric, count),
    "continuous global": above(normal),
    "finite global": above(bit),
    "sequence": in_a_scan(),
    "model only": without_a_guide(),
    "point": with_a_point(),
}


@cache
def structure(backend: Backend, kind: str) -> Structure:
    x = np.array([0.4, -1.1, 0.9])
    if kind == "sequence":
        x = x[:, None] * np.array([1.0, 0.5, -0.2, 0.3])
    return Engine(backend, *PROGRAMS[kind], {"x": x}, portable=True).structure


def every() -> list[tuple[str, Objective, Estimator]]:
    named = [pair for name in objectives() for pair in matrix._objectives(name)]
    return [(label, o, e) for label, o in named for name in estimators() for e in matrix._estimators(name)]


def test_every_kind_of_site_is_explained() -> None:
    assert [*matrix.KINDS] == [*matrix.MEANING] == [*PROGRAMS]


@of_each_kind
@on_both
def test_the_table_is_what_is_said_of_a_real_program(backend: Backend, kind: str) -> None:
    found, (site, _) = structure(backend, kind), matrix.KINDS[kind]
    for label, objective, estimator in every():
        real = matrix.judged(objective, estimator, site, found)
        one = matrix.cell(label, objective, estimator, kind)
        assert real == (one.verdict, one.why), (label, one.estimator)
        try:
            legality.plan(objective, {site: estimator}, found)
        except LegalityError as refused:
            assert one.verdict == "refused"
            # Names what it is about: a site, or the parts of the program.
            assert all(f"'{site}'" in line or "Sites [" in line or "draws = " in line for line in lines(refused))
        else:
            assert one.verdict != "refused"


def lines(refused: LegalityError) -> list[str]:
    return [line for line in str(refused).splitlines() if line.startswith("- ")]


@of_each_kind
def test_what_a_refusal_offers_is_legal(kind: str) -> None:
    """Each estimator that is offered, and each objective, the rest unchanged."""
    site, found = matrix.KINDS[kind]
    served = 0
    for label, objective, estimator in every():
        decision = legality.decide(objective, {site: estimator}, found)
        for why in decision.refused.values():
            offered = re.findall(r"'(\w+)'", why.rpartition("use ")[2])
            assert offered or "use another objective" in why or "free of" in why, (label, why)
            for name in offered:
                if name in estimators():
                    other = legality.decide(objective, {site: matrix._estimators(name)[0]}, found)
                    assert site not in other.refused, (label, name, why)
                    served += 1
                else:
                    assert_served(name, site, found)
        for why in decision.problems:
            if "'marginalize'" in why:
                other = legality.decide(objective, {site: marginalize()}, found)
                assert why not in other.problems
                # An objective of sequences refuses the program for another reason.
                served += not other.problems
                continue
            for name in re.findall(r"'(\w+)'", why.rpartition("use ")[2]) if "use " in why else []:
                assert name in ("sampled", "where_known") or assert_served(name, site, found)
    assert served or kind == "point"


def assert_served(objective: str, site: str, found: Structure) -> bool:
    (_, plain), *_ = matrix._objectives(objective)
    legality.plan(plain, {site: None if found.sites[site].in_guide else marginalize()}, found)
    return True


ROW_SCORES = {"score", "vimco"}
LOWER = ("elbo", "iwae", "miwae", "piwae", "ciwae", "renyi")


@pytest.mark.parametrize("name", ["elbo", "iwae", "vis", "rws", "renyi", "log_variance"])
def test_what_must_be_legal_in_a_row(name: str) -> None:
    """Score-type estimators at discrete and continuous sites, pathwise-type at continuous, enumeration at finite."""
    legal = {(c.estimator, c.kind) for c in matrix.cells(name) if c.objective == name and c.verdict != "refused"}
    assert legal >= {(e, k) for e in ROW_SCORES for k in ("continuous", "finite", "count")}
    assert legal >= {("pathwise", "continuous"), ("enumerate", "finite")}
    if name in ("elbo", "iwae", "renyi", "vis", "rws"):
        assert ("dreg", "continuous") in legal


@pytest.mark.parametrize("name", LOWER)
def test_globals_beside_rows_are_legal_in_lower_bounds(name: str) -> None:
    for c in matrix.cells(name):
        if c.objective != name:  # under options
            continue
        if c.kind == "continuous global" and c.estimator in ("pathwise", "stl", "score", "rloo", "vimco"):
            assert c.verdict == "unbiased", c
        if c.kind == "finite global" and c.estimator in ("enumerate", "score", "rloo", "measure_valued", "off_policy"):
            assert c.verdict == "unbiased", c


def test_sites_of_one_guide_may_have_estimators_of_their_own() -> None:
    """A class and a Gaussian in a row under every objective that serves each alone."""
    by_name = {n: matrix._estimators(n)[0] for n in estimators()}
    z, y = matrix.KINDS["continuous"][1].sites["z"], matrix.KINDS["finite"][1].sites["z"]
    both = matrix._structure(replace(y, name="y"), z)
    for name in ("elbo", "iwae", "vis", "rws", "renyi", "log_variance"):
        (_, objective), *_ = matrix._objectives(name)
        for first in ("score", "vimco", "enumerate"):
            for second in ("pathwise", "score", "vimco"):
                legality.plan(objective, {"y": by_name[first], "z": by_name[second]}, both)


def test_the_text_has_every_cell() -> None:
    words, told = matrix.text(), 0
    for c in matrix.cells():
        told += f": {c}\n" in words + "\n"
    assert told == len([*matrix.cells()])
    assert matrix.text("iwae", "stl").splitlines()[0] == "iwae"
    assert "continuous, sequence: refused: inside `joint` the guide's own score" in matrix.text("iwae", "stl")
    assert matrix.text("vis", "enumerate").count("unbiased") == 1
