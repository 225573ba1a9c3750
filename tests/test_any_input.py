"""Whatever is given: it is taken, or refused by an error of ours. Nothing else is raised, and nothing is warned of.

Hypothesis makes recipes, files, data, programs and arguments, most of them wrong. The fast tests are few and always the
same; the slow ones hunt. What a hunt has found is an `example` of its own where the message matters, in
`test_bad_input.py`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import Array, Backend, Ppl

from ppl_lvm import Fit, fit, program, recipe, recipes
from ppl_lvm.catalogue import available, objectives
from ppl_lvm.errors import PplLvmError, ProgramError, RecipeError
from ppl_lvm.program import Program
from ppl_lvm.recipe import Optimizer, Recipe

BACKENDS: tuple[Backend, ...] = ("pyro", "numpyro")
X = np.array([0.4, -1.1, 0.9, 1.6])
EAGER: dict[str, Any] = {"recipe": "elbo", "steps": 1, "compile": "eager", "batch_size": None}

FEW = settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
SECONDS = 200.0
"""After which a hunt ends, however many examples are left."""


def hunt(strategy: st.SearchStrategy[Any], call: Callable[[Any], object], examples: int) -> None:
    """Calls with up to so many examples; PplLvmError is an answer, all else is raised with the smallest example."""
    end = time.monotonic() + SECONDS

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def tried(example: Any) -> None:
        nonlocal end
        if time.monotonic() < end:
            try:
                taken_or_refused(call, example)
            except BaseException:
                # Time to make it small and to show it again, or Hypothesis would call the failure unreliable.
                end = max(end, time.monotonic() + SECONDS / 2)
                raise

    with warnings.catch_warnings():
        # Hypothesis, of a strategy that it names in a note when it leaves out an example.
        warnings.filterwarnings("ignore", message="Generating overly large repr")
        tried()


def taken_or_refused(call: Callable[[Any], object], example: Any) -> None:
    with warnings.catch_warnings():
        # ArviZ says by it that a leave-one-out estimate is not to be trusted.
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto", category=UserWarning)
        try:
            call(example)
        except PplLvmError as error:
            assert str(error).strip()


# Recipes.

WORDS = ("elbo", "iwae", "adam", "auto", "own", "auto_normal", "pathwise", "nuts", "model", "guide", "linear", "z", "*")
PATHS = (
    *("method.draws", "estimator.z", "estimator.z.name", "optimizer.learning_rate", "optimizer.*.name", "a.b.c"),
    *("objective.name", "guide.rank", "estimator.", "optimizer.", ".", "stages.0"),
)
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-3, 20), st.floats(), st.text(max_size=8)),
    *(st.binary(max_size=3), st.sampled_from(WORDS), st.just(10**400), st.complex_numbers(), st.dates()),
)
KEYS = st.one_of(
    st.text(max_size=6),
    st.sampled_from([*Recipe.model_fields, *Optimizer.model_fields, "draws", "alpha", "beta", "schedule", "start"]),
    st.sampled_from(["end", "temperature", *WORDS, *PATHS]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.one_of(st.integers(), st.none()), inner, max_size=2),
        st.frozensets(st.integers(), max_size=2),
    ),
    max_leaves=6,
)
TABLES = st.dictionaries(KEYS, VALUES, max_size=4)
ASKED = st.one_of(
    st.sampled_from([*recipes()]),
    TABLES,
    st.builds(lambda name, rest: {**rest, "objective": name}, st.sampled_from([*objectives()]), TABLES),
    st.builds(lambda name, rest: {**rest, "method": name}, st.sampled_from([*available("method")]), TABLES),
    VALUES,
    st.lists(st.sampled_from([*recipes()]), max_size=3),
)
RECIPES = st.tuples(ASKED, st.dictionaries(KEYS, VALUES, max_size=3))


def read_recipe(example: tuple[Any, dict[str, Any]]) -> None:
    asked, overrides = example
    try:
        found = recipe(asked, **overrides)
    except RecipeError:
        return
    hash(found)
    if not found.stages:
        assert recipe(found.to_dict()) == found


@FEW
@given(RECIPES)
def test_any_recipe(example: tuple[Any, dict[str, Any]]) -> None:
    taken_or_refused(read_recipe, example)


@pytest.mark.slow
def test_hunt_for_recipes() -> None:
    hunt(RECIPES, read_recipe, 20_000)


TOML: dict[str, bytes] = {
    "arrays in arrays": b"objective = " + b"[" * 10_000 + b"]" * 10_000,
    "tables in tables": b"objective = " + b"{a=" * 3_000 + b"1" + b"}" * 3_000,
    "thousands of digits": b"objective = 'elbo'\nsteps = " + b"9" * 5_000,
    "a step counter that overflows": b"objective = 'elbo'\nsteps = 9999999999999999999999",
    "no UTF-8": b"objective = '\xe9'",
    "a zero": b"objective = 'elbo'\0",
    "a date": b"objective = 'elbo'\nsteps = 2020-01-01",
    "a file that is no Python": b"objective = '../../../etc/passwd:x'",
    "a module that is relative": b"objective = '..a:x'",
    "a zero in a name": b"objective = 'a\\u0000.py:x'",
    "half a character": b"objective = '\\ud800.py:x'",
    "a table in a list": b"[[objective]]\nname = 'elbo'",
    "a mark of byte order": b"\xef\xbb\xbfobjective = 'elbo'",
}


@pytest.mark.parametrize("text", TOML.values(), ids=TOML)
def test_files_that_are_no_recipe(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(text)
    with pytest.raises(RecipeError, match=r"\S"):
        recipe(tmp_path / "bad.toml")


SOURCES: dict[str, str] = {
    "ends the process": "import sys\nsys.exit(3)",
    "fails": "1 / 0",
    "holds a zero": "x = 1\0",
    "never ends a call": "def f(): f()\nf()",
    "no function": "model = 3\nguide = 4",
    "no value": "def model(ppl, x, *, a=[]): pass\ndef guide(ppl, x, *, a=[]): pass",
}
NO_NAMES = ["a" * 5_000, "a" * 5_000 + ".{}", "a\0b.{}", "\ud800.{}", "/", "", ".", 3, None, b"vae", ["vae"], {}]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_files_that_are_no_program(source: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ProgramError, match=r"\S"):
        program(tmp_path / "bad.py")


@pytest.mark.parametrize("asked", NO_NAMES, ids=lambda asked: repr(asked)[:12])
def test_names_that_no_file_has(asked: Any) -> None:
    for suffix, read, error in (("py", program, ProgramError), ("toml", recipe, RecipeError)):
        with pytest.raises(error, match=r"\S"):
            read(asked.format(suffix) if isinstance(asked, str) else asked)


mostly_on_pyro = pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
"""JAX's eager operations are many times slower than torch's."""

# Data.

DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    st.sampled_from([np.dtype(t) for t in ("f2", "g", ">f4", "u8", "M8[s]", "m8", "S3", "F", "?", "i1")]),
)
SHAPES = st.sampled_from([(), (0,), (1,), (3,), (3, 1), (0, 2), (2, 0), (3, 2), (3, 1, 1)])
OBJECTS = st.one_of(st.none(), st.floats(), st.integers(), st.text(max_size=2))
ARRAYS = st.one_of(
    st.tuples(DTYPES, SHAPES).flatmap(lambda of: hnp.arrays(*of)),
    SHAPES.flatmap(lambda shape: hnp.arrays(object, shape, elements=OBJECTS)),
)
FLOATS = SHAPES.flatmap(
    lambda shape: hnp.arrays(
        np.float64, shape, elements=st.one_of(st.floats(), st.floats(-3, 3), st.just(1e300), st.just(np.nan))
    )
)
ROWS = st.sampled_from([(3,), (4,)]).flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=st.floats(-3, 3)))


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "as it is": lambda a: a,
    "read-only": read_only,
    "backwards": lambda a: a[::-1],
    "in strides": lambda a: np.repeat(a, 2, 0)[::2],
    "by columns": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "torch": torch.as_tensor,
    "with gradient": lambda a: torch.as_tensor(a).requires_grad_(True),
    "bfloat16": lambda a: torch.as_tensor(a).to(torch.bfloat16),
    "sparse": lambda a: torch.as_tensor(a).to_sparse(),
    "without memory": lambda a: torch.as_tensor(a).to("meta"),
    "jax": jnp.asarray,
    "bfloat16 of jax": lambda a: jnp.asarray(a, dtype=jnp.bfloat16),
    "masked": lambda a: np.ma.masked_array(a, mask=np.zeros(a.shape, bool)),
    "list": lambda a: a.tolist(),
    "iterator": lambda a: iter(a.tolist()),
    "memory": lambda a: memoryview(a.copy()),  # type: ignore[arg-type]
    "frame": pd.DataFrame,
    "series": pd.Series,
}


def formed(a: np.ndarray, form: str) -> Any:
    """The array in another form, where it has one."""
    try:
        return FORMS[form](a)
    except Exception:  # of the library that is asked for what it does not have
        return a


ANY_ARRAY = st.builds(formed, st.one_of(ARRAYS, FLOATS, ROWS), st.sampled_from(list(FORMS)))
JUNK = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3)),
    st.sampled_from([object(), print, range(3), 10**400, 3 + 0j, type, np.float64(3), np.nan]),
)
LEAF = st.one_of(ANY_ARRAY, ANY_ARRAY, ANY_ARRAY, JUNK)
NAMES = st.sampled_from(["x", "y", "", "x?", "rows", 1, None, "x_mask"])
DATA = st.one_of(
    *(LEAF, LEAF, ROWS, st.lists(LEAF, max_size=3), st.tuples(LEAF), st.tuples(LEAF, LEAF)),
    st.dictionaries(NAMES, LEAF, max_size=2),
    st.builds(lambda a: {"x": a}, LEAF),
    st.lists(st.lists(st.one_of(st.floats(-3, 3), st.none()), max_size=3), max_size=3),
)
FRACTIONS = st.sampled_from([None, None, None, 2, 0.5, 0.0, 1.5, -1.0, np.nan, True])
OF_DATA = st.tuples(DATA, st.sampled_from([None, None, "mask"]), FRACTIONS, st.sampled_from([None, 1, 2, 100]))


def model(ppl: Ppl, x: Array) -> None:
    scale = ppl.param("scale", 0.8, ppl.dist.constraints.positive)
    g = ppl.sample("g", ppl.dist.Normal(0.0, scale))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(g, 1.0))
        ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)


def guide(ppl: Ppl, x: Array) -> None:
    loc = ppl.param("loc", 0.1)
    ppl.sample("g", ppl.dist.Normal(loc, 0.5))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(loc + 0.1 * x, 0.5))


TOY = Program("toy", model, guide, portable=True, arguments=("x",))


def fit_data(backend: Backend) -> Callable[[Any], None]:
    def call(example: tuple[Any, Any, Any, Any]) -> None:
        data, missing, validation, batch_size = example
        options = {**EAGER, "batch_size": batch_size, "missing": missing, "validation": validation}
        run = fit(TOY, data=data, backend=backend, **options)
        assert np.isfinite(run.history["loss"]).all()

    return call


@mostly_on_pyro
def test_any_data(backend: Backend) -> None:
    FEW(given(OF_DATA)(lambda example: taken_or_refused(fit_data(backend), example)))()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_hunt_for_data(backend: Backend) -> None:
    hunt(OF_DATA, fit_data(backend), 3_000)


# Programs: sites, plates, shapes, events and parameters put together at random.

SIZES = st.one_of(st.just("rows"), st.integers(0, 5), st.just(-1))
DIMS = st.sampled_from([None, None, -1, -2, 0])
PLATES = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(["data", "other", "z"]), "size": SIZES, "dim": DIMS}), max_size=2
)
KINDS = st.sampled_from(["Normal", "Normal", "Bernoulli", "Categorical", "Dirichlet", "Poisson", "Delta", "Gamma"])
GOOD = {"kind": "Normal", "shape": (), "event": 0, "plates": [{"name": "data", "size": "rows", "dim": None}]}
GOOD |= {"start": 0.5, "bound": "real"}
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "kind": KINDS,
    "shape": st.sampled_from([(), (1,), (3,), (2, 3), (4,), (4, 1), (0,)]),
    "event": st.sampled_from([0, 1, 2, -1]),
    "plates": PLATES,
    "start": st.sampled_from([0.1, 0.5, -1.0, np.nan, np.inf, 1e30]),
    "bound": st.sampled_from(["real", "positive", "simplex", "unit_interval"]),
}


def changed(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({key: CHANGES[key] for key in keys}).map(lambda change: GOOD | change)


SITE = st.sampled_from(list(CHANGES)).flatmap(changed)
TWICE = st.lists(st.sampled_from(list(CHANGES)), min_size=2, max_size=3).flatmap(lambda keys: changed(*keys))
SEEN = st.sampled_from(["x", "x", "x", "x", "x[:2]", "x[:, None]", "x + z", "None", "0.5", "'x'", "x * 0"])
# A guide is mostly that of its model: of two sites that have nothing in common, only the first complaint is heard.
BOTH = st.one_of(SITE, SITE, TWICE).flatmap(
    lambda site: st.tuples(st.just(site), st.one_of(st.just(site), st.just(site), SITE))
)
SPECS = st.builds(
    lambda both, observed, seen, guided: {
        "model": both[0],
        "guide": both[1],
        "observed": observed,
        "seen": seen,
        "guided": guided,
    },
    BOTH,
    st.one_of(st.just(GOOD), SITE),
    SEEN,
    st.sampled_from(["z", "z", "z", "z", "z", "x", "y"]),
)


def drawn(ppl: Ppl, name: str, site: Mapping[str, Any], x: Array, **options: Any) -> Array:
    """A site with a parameter of its own, inside its plates."""

    def within(plates: list[dict[str, Any]]) -> Array:
        if plates:
            first, *rest = plates
            size = len(x) if first["size"] == "rows" else first["size"]
            with ppl.plate(first["name"], size, **({} if first["dim"] is None else {"dim": first["dim"]})):
                return within(rest)
        constraint = getattr(ppl.dist.constraints, site["bound"])
        value = ppl.param(f"{name}.{site['kind']}", np.full(site["shape"], site["start"]), constraint)
        kinds: dict[str, Callable[[], Any]] = {
            "Normal": lambda: ppl.dist.Normal(value, 1.0),
            "Gamma": lambda: ppl.dist.Gamma(value, 1.0),
            "Poisson": lambda: ppl.dist.Poisson(value),
            "Delta": lambda: ppl.dist.Delta(value),
            "Bernoulli": lambda: ppl.dist.Bernoulli(logits=value),
            "Categorical": lambda: ppl.dist.Categorical(logits=value),
            "Dirichlet": lambda: ppl.dist.Dirichlet(value),
        }
        fn = kinds[site["kind"]]()
        return ppl.sample(name, fn.to_event(site["event"]) if site["event"] else fn, **options)

    return within(site["plates"])


def fit_program(backend: Backend) -> Callable[[Any], None]:
    def call(spec: Mapping[str, Any]) -> None:
        def model(ppl: Ppl, x: Array) -> None:
            z = drawn(ppl, "z", spec["model"], x)
            seen = {"x": lambda: x, "x[:2]": lambda: x[:2], "x[:, None]": lambda: x[:, None], "x + z": lambda: x + z}
            rest = {"None": lambda: None, "0.5": lambda: 0.5, "'x'": lambda: "x", "x * 0": lambda: x * 0}
            drawn(ppl, "x", spec["observed"], x, obs=(seen | rest)[spec["seen"]]())

        def guide(ppl: Ppl, x: Array) -> None:
            drawn(ppl, spec["guided"], spec["guide"], x)

        run = fit(Program("any", model, guide, portable=True, arguments=("x",)), data=X, backend=backend, **EAGER)
        run.log_likelihood(draws=2)
        run.predictive(2)

    return call


@mostly_on_pyro
def test_any_program(backend: Backend) -> None:
    FEW(given(SPECS)(lambda spec: taken_or_refused(fit_program(backend), spec)))()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_hunt_for_programs(backend: Backend) -> None:
    hunt(SPECS, fit_program(backend), 1_000)


# Arguments.

ODD = st.one_of(
    JUNK,
    *(st.integers(-3, 3), st.floats(-3, 3)),
    st.sampled_from(["cpu", "gpu", "cuda:9", "cpu:7", "eager", "float64", "none", "data", "mask", 10**30, 2**40, -1]),
    st.sampled_from([np.int64(2), np.float32(3), np.array(3), np.array([0.1, 0.2])]).map(lambda a: np.array(a)),
    st.sampled_from([{}, [], (), [1, 2], [print], {1: 2}]),
    st.sampled_from([{"x": "x"}, {"g": "x"}, {"g": "a"}, {"x": None}, {"g": None}]),
    st.sampled_from([{"loc": 1}, {"loc": "a"}, {"loc": [0.0, 0.0]}, {"scale": -1.0}, {"scale": np.nan}, {"g": 0.1}]),
    st.sampled_from([{"x": [1.0, 2.0, 3.0, 4.0]}, {"g": [[1.0, 2.0]]}, {"z": [0.1, 0.2]}, {"z": [[0.1], [0.2]]}]),
)
OF_FIT = (
    *("model", "guide", "data", "recipe", "backend", "seed", "dtype", "progress_bar", "compile", "data_plate"),
    *("missing", "observed", "state", "validation", "start", "callbacks", "device", *Recipe.model_fields),
    *("learning_rate", "beta", "draws"),
)
COUNTS = ("steps", "restarts", "draws", "particles", "rows", "prior", "predictive")
"""Arguments that say how much is computed: a large one is legal, and is asked for elsewhere."""
FITS = st.dictionaries(st.sampled_from(OF_FIT), ODD, min_size=1, max_size=2)

OF_METHODS: dict[str, tuple[str, ...]] = {
    "log_likelihood": ("data", "draws", "seed"),
    "pointwise": ("draws", "data", "particles", "seed"),
    "posterior": ("draws", "data", "seed"),
    "predictive": ("draws", "data", "seed"),
    "encode": ("data", "draws", "seed"),
    "decode": ("values", "data", "rows", "draws", "mean", "seed"),
    "impute": ("data", "draws", "particles", "fill", "seed"),
    "conditional": ("given", "rows", "data", "draws", "particles", "seed"),
    "do": ("values", "data", "rows", "draws", "seed"),
    "prior_predictive": ("rows", "seed", "data"),
    "active_units": ("threshold", "draws", "data", "seed"),
    "loo": ("draws", "data", "particles", "seed"),
    "to_arviz": ("draws", "data", "seed", "particles", "predictive", "prior"),
}
USUAL: dict[str, dict[str, Any]] = {
    "decode": {"values": {"z": 0.1}},
    "impute": {"data": X},
    "conditional": {"given": {"z": 0.1}},
    "do": {"values": {"z": 0.1}},
    "to_arviz": {"predictive": 0},
}
ASKING = st.sampled_from(list(OF_METHODS)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.dictionaries(st.sampled_from(OF_METHODS[name]), ODD, min_size=1, max_size=2)
    )
)


def few(name: str, value: Any) -> Any:
    """A count that can be computed in a test."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return 3 if number and name in COUNTS and np.isfinite(float(min(value, 1e300))) and value > 100 else value


def fit_with(backend: Backend) -> Callable[[Any], None]:
    def call(example: Mapping[str, Any]) -> None:
        options = {"data": X, "backend": backend, **EAGER} | {n: few(n, v) for n, v in example.items()}
        fit(options.pop("model", TOY), **options)

    return call


def ask(run: Fit) -> Callable[[Any], None]:
    def call(example: tuple[str, Mapping[str, Any]]) -> None:
        name, given_ = example
        options: dict[str, Any] = {"draws": 50 if name == "loo" else 2, "particles": 2, **USUAL.get(name, {}), **given_}
        getattr(run, name)(**{n: few(n, v) for n, v in options.items() if n in OF_METHODS[name]})

    return call


def fitted(backend: Backend) -> Fit:
    return fit(TOY, data=X, backend=backend, **EAGER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_arguments(backend: Backend) -> None:
    FEW(given(FITS)(lambda example: taken_or_refused(fit_with(backend), example)))()


def test_any_question() -> None:
    asked = ask(fitted("pyro"))
    FEW(given(ASKING)(lambda example: taken_or_refused(asked, example)))()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_hunt_for_arguments(backend: Backend) -> None:
    hunt(FITS, fit_with(backend), 1_500)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_hunt_for_questions(backend: Backend) -> None:
    hunt(ASKING, ask(fitted(backend)), 1_500)
