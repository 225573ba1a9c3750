"""What the loop offers around its steps: clipping, optimisers by pattern, freezing, validation, restarts, stages."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import GLOBAL_ROWS, ROWS

from ppl_lvm import Fit, State, backends, fit, progress
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.structure import Plan
from ppl_lvm.errors import BackendError, DataError, PplLvmError, RecipeError
from ppl_lvm.monitor import EarlyStopping, Moment, restart_seeds
from ppl_lvm.parameters import frozen, optimizer_of
from ppl_lvm.program import Program, program
from ppl_lvm.validation import HeldOut, split

pytestmark = pytest.mark.optimised

BACKENDS = ("pyro", "numpyro")
on_both = pytest.mark.parametrize("backend", BACKENDS)
X = ROWS.data["x"]
TOY = Program("rows", ROWS.model, ROWS.guide, portable=True, arguments=("x",))


def net_model(ppl: Any, x: Any) -> None:
    """x | z ~ Normal(a linear function of z, scale): parameters that depend on the seed, and one with a constraint."""
    decode = ppl.module("decoder", ppl.nets.Linear(1, 1))
    scale = ppl.param("scale", 0.7, constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(decode(z[..., None])[..., 0], scale), obs=x)


def net_guide(ppl: Any, x: Any) -> None:
    encode = ppl.module("encoder", ppl.nets.Linear(1, 2))
    with ppl.plate("data", len(x)):
        out = encode(x[..., None])
        ppl.sample("z", ppl.dist.Normal(out[..., 0], ppl.xp.exp(out[..., 1])))


NET = Program("net", net_model, net_guide, portable=True, arguments=("x",))


def run(backend: str, chosen: Program = TOY, data: Any = X, **options: Any) -> Fit:
    settings: dict[str, Any] = {"recipe": "elbo", "steps": 1, "batch_size": 5, "dtype": "float64", "seed": 3}
    settings |= {"steps": options.get("steps", 1)}
    # A step or two are sooner done than compiled.
    settings["compile"] = "eager" if backend == "pyro" or settings["steps"] < 4 else "compiled"
    return fit(chosen, data=data, backend=backend, **(settings | options))


def sgd(rate: float = 0.01, **options: Any) -> dict[str, Any]:
    return {"name": "sgd", "learning_rate": rate, **options}


def gradient(backend: str, **options: Any) -> dict[str, np.ndarray]:
    """That of the first step, from a step of plain gradient descent."""
    after = run(backend, optimizer=sgd(), **options).params
    return {name: (ROWS.params[name] - after[name]) / 0.01 for name in ROWS.params}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-10, err_msg=name)


def assert_same_bits(a: Fit, b: Fit) -> None:
    assert a.state.arrays.keys() == b.state.arrays.keys()
    for name, value in a.state.arrays.items():
        np.testing.assert_array_equal(value, b.state.arrays[name], err_msg=name)
    for name, value in a.params.items():
        np.testing.assert_array_equal(value, b.params[name], err_msg=name)


# Optimisers.


@on_both
def test_clipping_scales_all_gradients_by_one_factor(backend: str) -> None:
    g = gradient(backend)
    norm = np.sqrt(sum((v**2).sum() for v in g.values()))
    for clip in (norm / 3, norm * 3):
        clipped = run(backend, optimizer=sgd(clip=clip))
        factor = min(1.0, clip / norm)
        assert_close(clipped.params, {n: ROWS.params[n] - 0.01 * factor * g[n] for n in g})
        np.testing.assert_allclose(clipped.history["gradient_norm"], [norm], rtol=1e-9)


@on_both
def test_optimisers_by_pattern_move_their_own_parameters(backend: str) -> None:
    """One step by hand: a rate for the model, one for a name of the guide, and a clipped one for the guide's rest."""
    g = gradient(backend)
    rest = np.hypot(g["q_z_gain"], g["q_z_log_scale"])
    table = {"model": sgd(0.02), "q_z_b*": sgd(0.03), "guide": sgd(0.04, clip=rest / 2), "*": sgd(9.0)}
    rates = dict.fromkeys(ROWS.model_params, 0.02) | {"q_z_bias": 0.03, "q_z_gain": 0.02, "q_z_log_scale": 0.02}
    found = run(backend, optimizer=table)
    assert_close(found.params, {n: ROWS.params[n] - rates[n] * g[n] for n in g})
    norm = np.sqrt(sum((v**2).sum() for v in g.values()))
    np.testing.assert_allclose(found.history["gradient_norm"], [norm], rtol=1e-9)


def turned_model(ppl: Any, x: Any) -> None:
    """Rows x ~ Normal(W', 1): in memory neither W nor its gradient is in the order of the other."""
    W = ppl.param("W", lambda: START.T)
    with ppl.plate("data", len(x)):
        ppl.sample("x", ppl.dist.Normal(W.T, 1.0).to_event(2), obs=x)


START = np.random.default_rng(6).normal(size=(2, 3))
TURNED = Program("turned", turned_model, lambda ppl, x: None, portable=True, arguments=("x",))


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimisers_move_parameters_that_are_transposed(backend: str, name: str) -> None:
    x = np.random.default_rng(7).normal(size=(4, 2, 3))
    W = torch.tensor(START, requires_grad=True)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    reference = kinds[name]([W], lr=0.01, foreach=False)
    for _ in range(3):
        reference.zero_grad()
        (0.5 * (torch.tensor(x) - W) ** 2).sum().backward()
        reference.step()
    found = run(backend, TURNED, x, optimizer={"name": name, "learning_rate": 0.01}, steps=3, batch_size=None)
    np.testing.assert_allclose(found.params["W"].T, W.detach(), rtol=1e-10)


def test_the_traced_step_equals_the_eager_one() -> None:
    table = {"model": sgd(0.02, clip=0.5), "guide": {"name": "adamw", "learning_rate": 0.1, "clip": 2.0}}
    options: dict[str, Any] = {"steps": 3, "optimizer": table, "freeze": ["q_z_gain"]}
    graph, eager = (run("pyro", compile=mode, **options) for mode in ("graph", "eager"))
    assert graph.state.mode == "graph"
    assert_close(graph.params, eager.params)
    np.testing.assert_allclose(graph.history["gradient_norm"], eager.history["gradient_norm"], rtol=1e-10)
    assert np.array_equal(graph.params["q_z_gain"], ROWS.params["q_z_gain"])


@on_both
def test_schedules_move_clip_and_weight_decay(backend: str) -> None:
    """With a rate of one step, Adam moves by its sign: p - rate (g / (|g| + eps) + decay p)."""
    decay = {"schedule": "linear", "start": 0.5, "end": 0.0, "steps": 4}
    options = {"name": "adamw", "learning_rate": 0.01, "weight_decay": decay}
    g = gradient(backend)
    found = run(backend, optimizer=options)
    assert_close(
        found.params,
        {n: ROWS.params[n] - 0.01 * (g[n] / (np.abs(g[n]) + 1e-8) + 0.5 * ROWS.params[n]) for n in g},
    )
    unlike = run(backend, optimizer={"name": "adamw", "learning_rate": 0.01})
    assert not np.allclose(unlike.params["q_z_gain"], found.params["q_z_gain"])
    clip = {"schedule": "linear", "start": 0.1, "end": 0.3, "steps": 1}
    moved = [np.stack(list(run(backend, steps=n, optimizer=sgd(1.0, clip=clip)).params.values())) for n in (1, 2)]
    first = np.linalg.norm(moved[0] - np.stack([ROWS.params[n] for n in run(backend).params]))
    np.testing.assert_allclose([first, np.linalg.norm(moved[1] - moved[0])], [0.1, 0.3], rtol=1e-9)


@on_both
def test_frozen_parameters_keep_their_bits(backend: str) -> None:
    free = run(backend, steps=3)
    for freeze in ("guide", "q_*", ["q_z_gain", "model"]):
        held = run(backend, steps=3, freeze=freeze)
        names = ROWS.guide_params if freeze in ("guide", "q_*") else ("q_z_gain", *ROWS.model_params)
        for name in ROWS.params:
            same = np.array_equal(held.params[name], ROWS.params[name])
            assert same == (name in names), name
    assert not any(np.array_equal(free.params[n], ROWS.params[n]) for n in ROWS.params)
    parts: tuple[Any, ...] = ([], "model", "guide")
    norm = [run(backend, freeze=f).history["gradient_norm"][0] for f in parts]
    np.testing.assert_allclose(norm[0] ** 2, norm[1] ** 2 + norm[2] ** 2, rtol=1e-9)


def test_the_most_specific_pattern_wins() -> None:
    groups = {"a.w": {"model"}, "a.b": {"guide"}, "c": {"model", "guide"}, "estimator.z.w": set[str]()}
    chosen = optimizer_of(["*", "guide", "a.*", "a.b"], groups)
    assert chosen == {"a.w": "a.*", "a.b": "a.b", "c": "*", "estimator.z.w": "guide"}
    assert frozen(["model"], groups) == {"a.w", "c"}
    with pytest.raises(RecipeError, match=r"optimizer\.a\.c.*matches no parameter.*Did you mean.*Groups: model, guide"):
        optimizer_of(["a.c", "*"], groups)
    with pytest.raises(RecipeError, match=r"'a\.b' has no optimizer.*\['model'\].*'\*'"):
        optimizer_of(["model"], groups)
    with pytest.raises(RecipeError, match=r"freeze: 'b\*' matches no parameter"):
        frozen(["b*"], groups)
    with pytest.raises(RecipeError, match=r"leaves no parameter .* to train; it has a\.b, a\.w, c"):
        frozen(["model", "guide"], groups)
    with pytest.raises(RecipeError, match="leaves no parameter"):
        frozen(["a.*", "c"], groups)


# Validation.


def test_a_fraction_of_the_rows_is_held_out() -> None:
    x = np.arange(20.0)
    train, held = split(Call((x,), {"y": 2 * x}), 20, 0.25, seed=1)
    assert held is not None
    assert (len(train.args[0]), len(held.args[0])) == (15, 5)
    np.testing.assert_array_equal(np.sort(np.concatenate([train.args[0], held.args[0]])), x)
    np.testing.assert_array_equal(held.kwargs["y"], 2 * held.args[0])
    again, other = (split(Call((x,)), 20, 0.25, seed=s)[1] for s in (1, 2))
    assert again is not None
    assert other is not None
    np.testing.assert_array_equal(again.args[0], held.args[0])
    assert not np.array_equal(other.args[0], held.args[0])
    for fraction in (0.0, 1.0, -0.5, 3):
        with pytest.raises(DataError, match="no fraction"):
            split(Call((x,)), 20, fraction, seed=1)
    with pytest.raises(DataError, match="0, which leaves none to validate"):
        split(Call((x,)), 20, 0.01, seed=1)
    with pytest.raises(DataError, match="20, which leaves none to train"):
        split(Call((x,)), 20, 0.99, seed=1)
    with pytest.raises(DataError, match="no data to take rows from"):
        split(Call(), None, 0.5, seed=1)
    with pytest.raises(DataError, match=r"\[\(3,\)\], those of the data \[\(\)\]"):
        split(Call((x,)), 20, np.zeros((4, 3)), seed=1)


@on_both
def test_the_validation_loss_is_the_objective_per_row(backend: str) -> None:
    """From the tables of values and densities: blocks of 5, 5 and 2 rows; N = 20 rows share the globals' terms."""
    toy = Program("global_rows", GLOBAL_ROWS.model, GLOBAL_ROWS.guide, portable=True, arguments=("x",))
    found = run(backend, toy, validation=X[:12], learning_rate=0.0, steps=3, check_every=1, draws=2, outer=3)
    assert found.history["validation_step"].tolist() == [1, 2, 3]
    assert np.ptp(found.history["validation"]) == 0
    library = backends.load(backend)
    held_out = HeldOut(library, toy, Call((X[:12],)), found._bound, 20, seed=3)
    assert [share for *_, share in held_out.blocks] == [5 / 12, 5 / 12, 2 / 12]
    expected = 0.0
    for bound, batch, key, share in held_out.blocks:
        table = bound.evaluate(found._trained, batch, key, Plan.of_values(bound.structure, 2, 3))
        d = {(n, s): library.to_numpy(x) for n, row in table.items() for s, x in row.items() if x is not None}
        of_globals = (d["g", "log_p"] - d["g", "log_q"]).mean()
        of_rows = (d["z", "log_p"] + d["x", "log_p"] - d["z", "log_q"]).mean()
        expected -= share * (of_globals / 20 + of_rows)
    np.testing.assert_allclose(found.history["validation"][0], expected, rtol=1e-12)


@on_both
def test_schedules_are_at_their_end_in_validation(backend: str) -> None:
    beta = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 1000}
    options: dict[str, Any] = {"validation": 0.2, "learning_rate": 0.0, "steps": 2, "check_every": 1}
    plain, annealed = (run(backend, **o).history for o in (options, options | {"objective.beta": beta}))
    np.testing.assert_allclose(annealed["validation"], plain["validation"], rtol=1e-12)
    assert not np.allclose(annealed["loss"], plain["loss"], rtol=1e-3)


@on_both
def test_early_stopping_keeps_the_best_parameters(backend: str) -> None:
    """A rate that overshoots: the best is a run of exactly that many steps, to the bit."""
    options: dict[str, Any] = {"validation": 0.25, "check_every": 2, "learning_rate": 0.5}
    options["compile"] = "eager" if backend == "pyro" else "compiled"
    stopped = run(backend, steps=20, patience=2, **options)
    steps, losses = stopped.history["validation_step"], stopped.history["validation"]
    best = int(steps[losses.argmin()])
    assert best < 16
    assert stopped.state.step == best + 4 == len(stopped.history["loss"]) == steps[-1]
    alone = run(backend, steps=best, **options)
    for name, value in alone.params.items():
        np.testing.assert_array_equal(value, stopped.params[name], err_msg=name)
    np.testing.assert_array_equal(alone.history["loss"], stopped.history["loss"][:best])
    assert any(f"stopped at step {best + 4}" in m and f"(step {best})" in m for m in stopped.messages)
    assert any(f"kept the parameters of step {best}" in m for m in stopped.messages)
    whole = run(backend, steps=best + 4, **options)
    assert not np.array_equal(whole.params["q_z_gain"], stopped.params["q_z_gain"])


def test_patience_counts_checks_without_improvement() -> None:
    early = EarlyStopping(patience=2, min_delta=0.5)
    for step, loss in enumerate([3.0, 2.0, 1.6, float("nan")]):
        assert not early.over
        early.see(step, loss, partial(dict, at=np.array(step)))
    assert early.over
    assert (early.best, early.step, early.arrays) == (2.0, 1, {"at": np.array(1)})
    assert "under 2 (step 1) by more than min_delta = 0.5 in 2 checks" in early.reason
    other = EarlyStopping(patience=2, min_delta=0.5)
    other.unpack(early.pack())
    assert (other.best, other.step, other.waited, other.arrays) == (2.0, 1, 2, {"at": np.array(1)})


@on_both
def test_a_continued_run_ends_with_the_same_bits(backend: str, tmp_path: Path) -> None:
    """Clipping, patterns, freezing, validation and early stopping; a check is between the halves, and one after."""
    options: dict[str, Any] = {
        "optimizer": {"*": {"name": "adam", "learning_rate": 0.3, "clip": 0.5}, "model": sgd(0.1)},
        "freeze": ["q_z_gain"],
        "validation": 0.25,
        "check_every": 3,
        "patience": 50,
    }
    whole = run(backend, steps=8, **options)
    first = run(backend, steps=4, **options)
    first.state.save(tmp_path / "state")
    rest = run(backend, steps=8, state=State.load(tmp_path / "state"), **options)
    assert_same_bits(whole, rest)
    assert_same_bits(whole, run(backend, steps=8, **options))
    np.testing.assert_array_equal(rest.history["loss"], whole.history["loss"][4:])
    assert whole.history["validation_step"].tolist() == [3, 6, 8]
    np.testing.assert_array_equal(rest.history["validation"], whole.history["validation"][1:])


@on_both
def test_validation_data_are_checked_like_data(backend: str) -> None:
    for x, what in ((np.array([1.0, np.nan]), "NaN"), (np.zeros(0), "data have no rows"), (np.array(["a"]), "numbers")):
        with pytest.raises(DataError, match=what):
            run(backend, validation=x)
    counts = np.full((6, 3), 2.0)
    for rows in (2, 9):
        bad = np.full((rows, 3), 2.0)
        bad[-1, 1] = 17.0
        with pytest.raises(DataError, match=r"'x' are outside the support.*17"):
            run(backend, program("vae"), counts, batch_size=None, validation=bad)


def test_what_validation_needs() -> None:
    with pytest.raises(RecipeError, match=r"patience = 3, which goes by validation; pass validation=0\.1"):
        run("pyro", patience=3)


# Starts.


@on_both
def test_a_start_takes_values_by_name(backend: str) -> None:
    other = "pyro" if backend == "numpyro" else "numpyro"
    first = run(other, NET, steps=2, learning_rate=0.1)
    again = run(backend, NET, start=first, learning_rate=0.0)
    assert_close(again.params, first.params)
    assert any(m.startswith("start: took ") and "scale" in m and "initial" not in m for m in again.messages)
    part = run(backend, NET, start={"scale": np.array(2.5), "more": np.zeros(1)}, learning_rate=0.0)
    assert part.params["scale"] == pytest.approx(2.5, abs=1e-12)
    assert not np.allclose(part.params["encoder.weight"], first.params["encoder.weight"])
    assert any("took scale; initial as ever: decoder.bias" in m and "not used: more" in m for m in part.messages)
    exact = run(backend, NET, start=again, learning_rate=0.0)
    for name, value in exact.params.items():
        np.testing.assert_array_equal(value, again.params[name])


@on_both
def test_a_start_that_does_not_fit_is_refused(backend: str) -> None:
    with pytest.raises(DataError, match=r"none of \['loc'\] is a parameter.*'decoder\.bias'"):
        run(backend, NET, start={"loc": np.zeros(1)})
    with pytest.raises(DataError, match=r"'encoder\.weight' has shape \(3,\), and the parameter \(2, 1\)"):
        run(backend, NET, start={"encoder.weight": np.zeros(3)})
    with pytest.raises(DataError, match=r"'scale' is outside the support .* span -1 to -1"):
        run(backend, NET, start={"scale": np.array(-1.0)})
    with pytest.raises(DataError, match="Both state and start"):
        run(backend, NET, steps=2, start={"scale": np.array(1.0)}, state=run(backend, NET).state)


# Stages.


@on_both
def test_stages_are_fits_one_after_the_other(backend: str) -> None:
    table = [{"steps": 3, "freeze": ["guide"]}, {"objective": "iwae", "draws": 3, "steps": 2}]
    recipe = {"objective": "elbo", "batch_size": 5, "stages": table, "optimizer": {"learning_rate": 0.1}}
    options: dict[str, Any] = {"dtype": "float64", "seed": 3, "backend": backend, "compile": "eager"}
    options["validation"] = 0.25
    staged = fit(NET, data=X, recipe=recipe, check_every=2, **options)
    plain: dict[str, Any] = {"batch_size": 5, "learning_rate": 0.1, "check_every": 2}
    first = fit(NET, data=X, recipe="elbo", steps=3, freeze="guide", **plain, **options)
    second = fit(NET, data=X, recipe="iwae", draws=3, steps=2, start=first, **plain, **options)
    assert_same_bits(staged, second)
    both = np.concatenate([first.history["loss"], second.history["loss"]])
    np.testing.assert_array_equal(staged.history["loss"], both)
    assert staged.history["step"].tolist() == [0, 1, 2, 3, 4]
    assert staged.history["stage"].tolist() == [0, 0, 0, 1, 1]
    assert staged.history["validation_step"].tolist() == [2, 3, 5]
    assert any(m.startswith("stage 1: start: took") for m in staged.messages)
    with pytest.raises(DataError, match=r"has 2; fit the stage alone.*stages\[-1\]"):
        fit(NET, data=X, recipe=recipe, state=staged.state, **options)
    on = fit(NET, data=X, recipe=staged.recipe.stages[-1], steps=3, state=staged.state, **options)
    assert on.state.step == 3


# Restarts.


def stable(run: Fit) -> dict[str, Any]:
    return {n: v for n, v in run.state.arrays.items() if np.asarray(v).dtype.kind == "f"}


@on_both
@pytest.mark.parametrize(
    "validated", [pytest.param(False, id="by loss"), pytest.param(True, id="by validation", marks=pytest.mark.slow)]
)
def test_restarts_are_the_runs_one_by_one(backend: str, validated: bool) -> None:
    more: dict[str, Any] = {"validation": X[:7] + 0.1, "check_every": 2} if validated else {}
    options: dict[str, Any] = {"steps": 4, "learning_rate": 0.1, **more}
    together = run(backend, NET, restarts=3, **options)
    alone = [run(backend, NET, **(options | {"seed": s})) for s in restart_seeds(3, 3)]
    label = "validation" if validated else "loss"
    # The noise of validation is the fit's, so the first alone is compared with it; losses are compared one by one.
    if not validated:
        np.testing.assert_allclose(together.history["restarts"], [a.history[label][-1] for a in alone], rtol=1e-10)
    best = int(np.argmin(together.history["restarts"]))
    np.testing.assert_allclose(together.history["loss"], alone[best].history["loss"], rtol=1e-10)
    assert_close(together.params, alone[best].params)
    assert stable(together).keys() == stable(alone[best]).keys()
    for name, value in stable(together).items():
        np.testing.assert_allclose(value, alone[best].state.arrays[name], rtol=1e-8, atol=1e-10, err_msg=name)
    assert together.state.restart == best
    assert any(f"restarts: kept {best} of 0 to 2" in m for m in together.messages)
    assert not any("do not depend on the seed" in m for m in together.messages)
    on = run(backend, NET, restarts=3, state=together.state, **(options | {"steps": 6}))
    assert any(f"goes on with its own, {best}, alone" in m for m in on.messages)
    further = run(backend, NET, **(options | {"steps": 6, "seed": restart_seeds(3, 3)[best]}))
    assert_close(on.params, further.params)


@pytest.mark.slow
@on_both
def test_restarts_with_early_stopping_end_each_on_its_own(backend: str) -> None:
    options: dict[str, Any] = {"validation": X[:7], "check_every": 1, "patience": 1, "optimizer": sgd(0.5), "steps": 12}
    together = run(backend, restarts=2, **options)
    assert any("do not depend on the seed" in m for m in together.messages)
    best = together.state.restart
    assert together.history["restarts"][best] == together.history["validation"].min()
    assert len(together.history["loss"]) == together.state.step
    if together.state.step < 12:
        assert together.history["validation"].argmin() == together.state.step - 2


def doomed_guide(ppl: Any, x: Any) -> None:
    """A guide that overflows where an initial weight is negative."""
    encode = ppl.module("encoder", ppl.nets.Linear(1, 2))
    sign = encode(0.0 * x[:1, None] + 1e6)[0, 0]
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(0.0 * x + sign * 0.0, 1.0 + ppl.xp.exp(-sign)))


DOOMED = Program("doomed", net_model, doomed_guide, portable=True, arguments=("x",))


@on_both
def test_a_restart_that_diverges_is_dropped(backend: str) -> None:
    options: dict[str, Any] = {"learning_rate": 0.0, "compile": "eager" if backend == "pyro" else "compiled"}
    fates = []
    for seed in restart_seeds(3, 6):
        try:
            run(backend, DOOMED, **(options | {"seed": seed}))
        except PplLvmError:
            fates.append(False)
        else:
            fates.append(True)
    assert len(set(fates)) == 2, "the seeds show both"
    together = run(backend, DOOMED, restarts=6, **options)
    assert np.isfinite(together.history["restarts"]).tolist() == fates
    dropped = [r for r, fate in enumerate(fates) if not fate]
    assert all(any(f"restarts: {r} dropped: at step 0, the " in m for m in together.messages) for r in dropped)
    assert fates[together.state.restart]
    if not fates[0]:
        with pytest.raises(PplLvmError, match="At step 0, the"):
            run(backend, DOOMED, **options)


# Progress.


@on_both
def test_progress_is_shown_on_a_terminal_or_on_request(
    backend: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written where the output is no terminal; where it is one, unless it is not wanted."""
    run(backend, steps=2, progress_bar=None)
    assert capfd.readouterr() == ("", "")
    run(backend, steps=2, progress_bar=True)
    out, err = capfd.readouterr()
    assert not out and "2/2" in err and "loss" in err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert progress.wanted(None) and not progress.wanted(False)


# Callbacks.


@on_both
def test_callbacks_see_the_run_and_can_stop_it(backend: str) -> None:
    seen: list[Moment] = []
    params: list[dict[str, Any]] = []

    def callback(moment: Moment) -> None:
        seen.append(moment)
        params.append(moment.params)
        if moment.step == 4:
            moment.stop()

    found = run(backend, steps=10, check_every=2, validation=0.25, callbacks=[callback])
    assert [m.step for m in seen] == [2, 4]
    assert [m.loss for m in seen] == found.history["loss"][[1, 3]].tolist()
    assert [m.validation for m in seen] == found.history["validation"].tolist()
    assert len(found.history["loss"]) == found.state.step == 4
    assert_close(params[1], found.params)
    assert not np.array_equal(params[0]["q_z_gain"], params[1]["q_z_gain"])
    assert any("callback: stopped at step 4" in m for m in found.messages)


@on_both
def test_what_a_callback_raises_is_passed_on_and_its_checkpoint_goes_on(backend: str) -> None:
    kept: list[State] = []

    def callback(moment: Moment) -> None:
        kept.append(moment.state)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(backend, steps=6, check_every=4, callbacks=[callback])
    assert kept[0].step == 4
    assert_same_bits(run(backend, steps=6, state=kept[0]), run(backend, steps=6))


# Devices.


@pytest.mark.parametrize(
    ("backend", "mode"),
    [("pyro", "eager"), ("pyro", "graph"), pytest.param("numpyro", "eager", marks=pytest.mark.slow)],
)
def test_a_device_by_name_is_the_same_fit(backend: str, mode: str) -> None:
    options: dict[str, Any] = {"steps": 2, "validation": 0.25, "compile": mode}
    here, named = run(backend, NET, **options), run(backend, NET, device="cpu", **options)
    assert_same_bits(here, named)
    np.testing.assert_array_equal(here.history["loss"], named.history["loss"])
    np.testing.assert_array_equal(here.log_likelihood(draws=3).values, named.log_likelihood(draws=3).values)


@on_both
def test_a_device_that_is_not_there_is_refused(backend: str) -> None:
    for device in ("gpu:99", "cuda:99", "tpu9", "cpu:x"):
        with pytest.raises(BackendError, match=f"device='{device}' was asked for; .* has .*cpu.* here"):
            run(backend, device=device)
