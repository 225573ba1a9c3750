"""The loop: the same numbers compiled and eager, continued and unbroken; nothing traced twice, nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyro
import pytest
import torch

from ppl_lvm import Fit, State, fit, program, programs, recipe, recipes
from ppl_lvm.backends import _numpyro_train, _pyro_train
from ppl_lvm.errors import BackendError, DataError, LegalityError, PplLvmError, ProgramError, RecipeError, StorageError
from ppl_lvm.pace import Order, Pace, most_steps

pytestmark = pytest.mark.optimised

BACKENDS = ("pyro", "numpyro")
on_both = pytest.mark.parametrize("backend", BACKENDS)


def counts(rows: int = 48, features: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 17, size=(rows, features)).astype(float)


FEW: dict[str, dict[str, Any]] = {"svae_slds": {"sweeps": 1}}
"""Options that spare a compiler what it would meet again."""


def short(name: str, backend: str, **options: Any) -> Fit:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 16, "dtype": "float64", "seed": 3, "compile": "eager"}
    chosen = program(name, **FEW.get(name, {}))
    assert chosen.example is not None
    made = chosen.example(np.random.default_rng(0))
    if isinstance(made, dict):  # programs of several arguments bring their own data
        data: Any = made
    else:
        data = counts() if made.ndim == 2 and made.dtype.kind == "f" else np.resize(made, (48, *made.shape[1:]))
    return fit(chosen, data=data, backend=backend, **(settings | options))


def assert_close(a: Fit, b: Fit, tolerance: float) -> None:
    np.testing.assert_allclose(a.history["loss"], b.history["loss"], rtol=tolerance, atol=tolerance)
    assert a.params.keys() == b.params.keys()
    for name, value in a.params.items():
        np.testing.assert_allclose(value, b.params[name], rtol=tolerance, atol=tolerance, err_msg=name)


def assert_same_bits(a: Fit, b: Fit) -> None:
    for name, value in a.state.arrays.items():
        np.testing.assert_array_equal(value, b.state.arrays[name], err_msg=name)


LONG = {
    *("ar_hmm_partial", "deep_kalman_filter", "gp_factor_analysis", "hmm", "joint_vae", "latent_tree", "lds", "poglm"),
    *("functional_tucker", "svae_gmm", "svae_lds", "svae_slds", "vrnn"),
}
"""Programs that take a compiler the better part of a minute."""


@on_both
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in sorted(programs())]
)
def test_compiled_equals_eager(name: str, backend: str) -> None:
    """By plain gradient steps: Adam divides a gradient by its own size, and blows up the rounding of one near zero."""
    plain: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1e-5}
    assert_close(short(name, backend, compile="compiled", **plain), short(name, backend, **plain), 1e-10)


@pytest.mark.slow
@on_both
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vae", {"recipe": "iwae", "draws": 3, "estimator": "dreg"}),
        ("vae", {"recipe": "elbo_closed_kl"}),
        ("vae", {"recipe": "beta_vae", "estimator": "score"}),
        ("discrete_vae", {"recipe": "iwae", "draws": 3, "estimator": "vimco"}),
        ("discrete_vae", {"draws": 3, "estimator": "rloo"}),
        ("discrete_vae", {"estimator": {"name": "score", "baseline": "linear"}}),
        ("probabilistic_pca", {"recipe": "iwae", "draws": 2}),
    ],
)
def test_compiled_equals_eager_under_other_recipes(name: str, options: dict[str, Any], backend: str) -> None:
    compiled = short(name, backend, compile="compiled", **options)
    assert compiled.state.mode == "compiled", compiled.messages
    assert_close(compiled, short(name, backend, **options), 1e-10)


COVERED = [n for n in recipes() if recipe(n).objective is not None and n not in ("fivo", "joint_vae", "svae")]
"""Recipes for any program; those three are tested with the programs that they are for."""
ESTIMATORS = {"vae": ("auto", "score", "rloo", "stl"), "discrete_vae": ("auto", "score", "reinmax", "enumerate")}


def cover() -> list[tuple[str, str, dict[str, Any]]]:
    """Recipes by programs, estimators, mini-batches and clipping, so that every two of them are asked for together.

    Where the two are not legal together, the first that is takes their place.
    """
    cells = []
    for i, name in enumerate(COVERED):
        for j, (on, estimators) in enumerate(ESTIMATORS.items()):
            options: dict[str, Any] = {"estimator": estimators[(i + j) % 4], "clip": None if (i // 4 + j) % 2 else 10.0}
            cells.append((name, on, options | {"batch_size": None if (i // 2 + j) % 2 else 16}))
    return cells


@pytest.mark.slow
@on_both
@pytest.mark.parametrize(("name", "on", "options"), cover())
def test_compiled_equals_eager_under_every_recipe(name: str, on: str, options: dict[str, Any], backend: str) -> None:
    asked = {"recipe": name, "optimizer": "sgd", "learning_rate": 1e-5, **options}
    asked |= {n: few for n, few in (("draws", 4), ("groups", 2)) if hasattr(recipe(name).objective, n)}
    eager = None
    for chosen, estimator in ((on, asked["estimator"]), (on, "auto"), ("vae", "auto")):  # the first that is legal
        asked["estimator"] = estimator
        try:
            eager = short(chosen, backend, **asked)
            break
        except (LegalityError, RecipeError):
            continue
    assert eager is not None
    compiled = short(chosen, backend, compile="compiled", **asked)
    assert compiled.state.mode == "compiled", compiled.messages
    assert_close(compiled, eager, 1e-10)


def test_traced_graph_equals_eager() -> None:
    graph = short("discrete_vae", "pyro", compile="graph", estimator={"name": "score", "baseline": "moving_average"})
    eager = short("discrete_vae", "pyro", estimator={"name": "score", "baseline": "moving_average"})
    assert graph.state.mode == "graph"
    assert_close(graph, eager, 1e-12)


@pytest.mark.parametrize(
    ("backend", "mode"), [("pyro", "eager"), ("pyro", "graph"), ("numpyro", "compiled"), ("numpyro", "eager")]
)
@pytest.mark.parametrize("estimator", ["score", {"name": "score", "baseline": "linear"}])
def test_a_continued_run_ends_with_the_same_bits(
    backend: str, mode: str, estimator: object, tmp_path: Path
) -> None:
    """Seven steps of three batches an epoch, stopped after four: inside an epoch, optimiser and baseline under way."""
    whole = short("discrete_vae", backend, steps=7, compile=mode, estimator=estimator)
    first = short("discrete_vae", backend, steps=4, compile=mode, estimator=estimator)
    first.state.save(tmp_path / "state")
    held = State.load(tmp_path / "state")
    rest = short("discrete_vae", backend, steps=7, compile=mode, estimator=estimator, state=held)
    assert rest.history["step"].tolist() == [4, 5, 6]
    np.testing.assert_array_equal(rest.history["loss"], whole.history["loss"][4:])
    assert_same_bits(rest, whole)
    assert any(not np.array_equal(v, whole.state.arrays[n]) for n, v in first.state.arrays.items())


@on_both
def test_a_state_of_another_fit_is_refused(backend: str, tmp_path: Path) -> None:
    state = short("vae", backend).state
    with pytest.raises(DataError, match="seed 3"):
        short("vae", backend, seed=4, state=state)
    with pytest.raises(DataError, match="step 4 already"):
        short("vae", backend, steps=3, state=state)
    with pytest.raises(BackendError, match="same program"):
        short("probabilistic_pca", backend, steps=9, state=state)
    with pytest.raises(StorageError, match="no folder"):
        State.load(tmp_path / "no")
    with pytest.raises(DataError, match="no state of a fit: 'step'"):
        State.of(state.described | {"step": -1}, state.arrays)


@on_both
def test_same_seed_same_bits_and_another_seed_others(backend: str) -> None:
    a, b, other = short("vae", backend), short("vae", backend), short("vae", backend, seed=4)
    assert_same_bits(a, b)
    assert not np.array_equal(a.history["loss"], other.history["loss"])


@pytest.mark.parametrize(("backend", "mode"), [("pyro", "graph"), ("numpyro", "compiled")])
def test_a_second_fit_with_the_same_shapes_traces_nothing(backend: str, mode: str) -> None:
    steps = {"pyro": _pyro_train.STEPS, "numpyro": _numpyro_train.STEPS}[backend]
    options: dict[str, Any] = {"compile": mode, "steps": 5, "recipe": "beta_vae"}
    short("vae", backend, **options)
    before = steps.traces
    for change in ({"seed": 8}, {"beta": 2.0}, {"learning_rate": 0.1}, {"steps": 9}):
        short("vae", backend, **(options | change))
    schedule = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 3}
    short("vae", backend, **options, **{"objective.beta": schedule})
    assert steps.traces == before
    short("vae", backend, **options, draws=2)
    assert steps.traces == before + 1


@pytest.mark.parametrize(("backend", "mode"), [("pyro", "graph"), ("numpyro", "compiled")])
def test_a_schedule_moves_its_number_in_the_compiled_step(backend: str, mode: str) -> None:
    schedule = {"schedule": "linear", "start": 0.0, "end": 4.0, "steps": 4}
    moving = short("vae", backend, compile=mode, learning_rate=0.0, **{"objective.beta": schedule})
    fixed = [
        short("vae", backend, compile=mode, learning_rate=0.0, beta=float(beta)).history["loss"][step]
        for step, beta in enumerate([0.0, 1.0, 2.0, 3.0])
    ]
    np.testing.assert_allclose(moving.history["loss"], fixed, rtol=1e-12)
    assert len(set(fixed)) == 4


def test_every_row_is_seen_once_an_epoch() -> None:
    index = Order(rows=10, size=3, seed=5).batches(first=0, steps=7)
    for epoch in (index[:3], index[3:6]):
        assert len(set(epoch.ravel().tolist())) == 9
    assert not np.array_equal(index[:3], index[3:6])
    order = Order(rows=10, size=3, seed=5)
    for first, steps in ((2, 3), (5, 2), (0, 7)):
        np.testing.assert_array_equal(index[first : first + steps], order.batches(first, steps))


def test_short_steps_are_looked_at_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ppl_lvm.pace.time.perf_counter", lambda: now)
    pace, taken = Pace(), []
    for seconds_of_a_step in [1e-4] * 9 + [1e-2] * 4 + [10.0] * 8:
        taken.append(pace.steps)
        now += pace.steps * seconds_of_a_step
        pace.took(pace.steps)
    assert taken == [10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000, 500, 250, 125, 62, 31, 15, 7, 3, 1, 1, 1]
    assert Pace(most=5).steps == 5
    # What is handed over at once is bounded: 1,000 batches of 10^5 rows would be 800 MB.
    assert [most_steps(rows) for rows in (0, 128, 8_000, 100_000)] == [1000, 1000, 500, 100]


@on_both
def test_the_clock_moves_no_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick: dict[str, Any] = {"steps": 230, "compile": "graph" if backend == "pyro" else "compiled"}
    monkeypatch.setattr("ppl_lvm.pace.SECONDS", 0.0)
    slow = short("probabilistic_pca", backend, **quick)
    monkeypatch.setattr("ppl_lvm.pace.SECONDS", 1e9)
    assert_same_bits(slow, short("probabilistic_pca", backend, **quick))


@on_both
def test_nothing_global_survives(backend: str) -> None:
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(1.5))
    before = (torch.get_default_dtype(), torch.get_rng_state(), jnp.zeros(1).dtype, str(np.random.get_state()))
    validation = torch.distributions.Distribution._validate_args
    short("vae", backend)
    with pytest.raises(LegalityError):
        short("discrete_vae", backend, estimator="pathwise")
    with pytest.raises(PplLvmError, match="At step"):
        short("vae", backend, steps=30, learning_rate=1e6)
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert jnp.zeros(1).dtype == before[2]
    assert str(np.random.get_state()) == before[3]
    assert torch.distributions.Distribution._validate_args == validation
    store = pyro.get_param_store()
    assert set(store.keys()) == {"mine"}
    assert store["mine"].item() == 1.5
    pyro.clear_param_store()


def test_without_a_compiler_the_graph_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pyro_train, "_compiler", lambda: False)
    run = short("vae", "pyro", compile="compiled", recipe="elbo_closed_kl")
    assert run.state.mode == "graph"
    assert any("no C++ compiler" in message for message in run.messages)


def test_auto_compiles_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    few = short("vae", "pyro", compile="auto")
    assert few.state.mode == "eager"
    assert any("4 steps" in message for message in few.messages)
    monkeypatch.setattr(_pyro_train, "FEWEST_TRACED", 2)
    some = short("vae", "pyro", compile="auto", steps=5)
    assert some.state.mode == "graph"
    assert any("less than" in message for message in some.messages)
    assert_close(some, short("vae", "pyro", steps=5), 1e-12)


@pytest.mark.parametrize("constant", ["COMPILE_SECONDS", "COMPILE_SECONDS_PER_NODE", "COMPILE_SECONDS_PER_CALL"])
def test_auto_counts_what_compiling_costs(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of the cost decides alone: without any of them five steps pay."""
    monkeypatch.setattr(_pyro_train, "FEWEST_TRACED", 2)
    monkeypatch.setattr(_pyro_train, "_compiler", lambda: False)
    for name in ("COMPILE_SECONDS", "COMPILE_SECONDS_PER_NODE", "COMPILE_SECONDS_PER_CALL"):
        monkeypatch.setattr(_pyro_train, name, 0.0)

    def said(word: str) -> bool:
        monkeypatch.setattr(_pyro_train, "STEPS", _pyro_train.Steps())  # where nothing has been decided yet
        return any(word in message for message in short("vae", "pyro", compile="auto", steps=5).messages)

    assert said("no C++ compiler")
    monkeypatch.setattr(_pyro_train, constant, 1e3)
    assert said("less than")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_not_finite_stops_and_names_the_site(backend: str) -> None:
    with pytest.raises(PplLvmError, match=r"At step \d+, the loss is (nan|inf).*z"):
        short("vae", backend, steps=50, learning_rate=1e6)


@on_both
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((0, 5)), "first axis"),
        ((np.zeros((4, 5)), np.zeros(3)), "takes 1 argument"),
        (np.array([["a", "b"]]), "numbers"),
        (np.array([[1.0, np.nan]]), "NaN"),
        (np.float64(3.0), "first axis"),
    ],
)
def test_bad_data_are_refused(backend: str, data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit(program("vae"), data=data, backend=backend, steps=1)


@on_both
def test_values_outside_a_support_are_refused_wherever_they_stand(backend: str) -> None:
    for row in (0, 47):
        x = counts()
        x[row, 2] = 17.0
        with pytest.raises(DataError, match=r"'x'.*17"):
            fit(program("vae"), data=x, backend=backend, steps=1, batch_size=16)


def test_what_is_asked_wrongly_is_refused() -> None:
    x = counts()
    with pytest.raises(BackendError, match="pyro"):
        fit(program("vae"), data=x, backend="stan")
    with pytest.raises(DataError, match="float64"):
        fit(program("vae"), data=x, dtype="float16")
    with pytest.raises(BackendError, match="eager"):
        fit(program("vae"), data=x, backend="numpyro", compile="graph")
    with pytest.raises(ProgramError, match="brings its guide"):
        fit(program("vae"), lambda x: None, data=x)


@on_both
def test_what_a_fit_gives(backend: str) -> None:
    run = fit(program("vae", latent=2), data=counts(), recipe="iwae", backend=backend, draws=5, steps=3, seed=0)
    assert run.recipe == recipe("iwae", draws=5, steps=3)
    assert run.history["loss"].shape == (3,)
    x = counts(7)
    held_out = run.log_likelihood(x, draws=30)
    assert held_out.values.shape == (7,)
    assert held_out.mean == pytest.approx(held_out.values.mean())
    assert held_out.se == pytest.approx(held_out.values.std(ddof=1) / 7**0.5)
    posterior = run.posterior(11, data=x)
    assert posterior.values["z"].shape == (11, 7, 2)
    assert posterior.dims["z"][0] == "data"
    assert posterior.log_p.shape == posterior.log_q.shape == posterior.log_likelihood["x"].shape == (11, 7)
    assert run.predictive(3, data=x)["x"].shape == (3, 7, 5)
    prior = run.prior_predictive(9)
    assert prior["z"].shape == (9, 2)
    assert prior["x"].shape == (9, 5)
    assert prior["x"].max() <= 16
    assert set(run.active_units()) == {"z"}
    tree = run.to_arviz(13)
    assert tree["posterior"]["z"].shape == (1, 13, 48, 2)
    assert tree["observed_data"]["x"].shape == (48, 5)
    with pytest.raises(DataError, match="shape"):
        run.log_likelihood(np.zeros((4, 6)))


@on_both
def test_log_likelihood_in_blocks_is_the_same_sum(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact posterior as guide every weight is p(x), however rows and draws are cut."""
    x = np.random.default_rng(1).normal(size=(12, 3))
    run = fit(program("probabilistic_pca", latent=1), data=x, backend=backend, steps=1, dtype="float64")
    whole = run.log_likelihood(x, draws=1000)
    monkeypatch.setattr("ppl_lvm.fitted.ENTRIES", 16 * 3 * 5)
    cut = run.log_likelihood(x, draws=1000)
    spread = np.sqrt(2.0) * 0.2
    assert np.abs(whole.values - cut.values).max() < spread
    assert not np.array_equal(whole.values, cut.values)


@pytest.mark.parametrize("inside", [True, False])
def test_what_cannot_be_traced_runs_eagerly_and_names_the_site(inside: bool) -> None:
    class Looking(pyro.distributions.Normal):
        def log_prob(self, value: Any) -> Any:
            return super().log_prob(value) * (1.0 if float(value.detach().sum()) > -1e9 else 2.0)

    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0 * x, 1.0))
            scale = 1.0 if inside or float(z.detach().sum()) > -1e9 else 2.0
            pyro.sample("x", (Looking if inside else pyro.distributions.Normal)(z, scale), obs=x)

    def guide(x: Any) -> None:
        m = pyro.param("m", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(m + 0.0 * x, 1.0))

    x = np.linspace(-1, 1, 6)
    traced = fit(model, guide, x, "elbo", steps=3, compile="compiled", dtype="float64")
    assert traced.state.mode == "eager"
    (said,) = (m for m in traced.messages if m.startswith("compile:"))
    site = "at site 'x'" if inside else "after site 'z'"
    assert said.startswith(f"compile: eager, as the step cannot be traced {site}: ")
    eager = fit(model, guide, x, "elbo", steps=3, compile="eager", dtype="float64")
    np.testing.assert_array_equal(traced.history["loss"], eager.history["loss"])
