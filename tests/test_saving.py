"""Fits in folders: the same bits and predictions, on the other backend too, and nothing run that is not ours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import BACKENDS
from test_store import replace_file, rewrite, safetensors
from toys import GLOBAL_ROWS, PLATE, Array, Backend, Ppl, native_rows

from ppl_lvm import Fit, fit, load, program, programs, recipe, saving
from ppl_lvm.errors import BackendError, DataError, PplLvmError, ProgramError, RecipeError, StorageError
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import Program
from ppl_lvm.sampled import Sampled

on_both = pytest.mark.parametrize("backend", BACKENDS)
mostly_on_pyro = pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
OTHER: dict[str, Backend] = {"pyro": "numpyro", "numpyro": "pyro"}
X = np.random.default_rng(0).normal(size=(50, 3)) @ np.diag([1.0, 2.0, 0.5]) + 1.0
SHORT: dict[str, Any] = {"steps": 6, "batch_size": 20, "dtype": "float64", "seed": 3}


def pca(backend: str, **options: Any) -> Fit:
    return fit("probabilistic_pca", data=X, backend=backend, **(SHORT | options))


def saved(run: Fit, tmp_path: Path) -> Path:
    run.save(tmp_path / "run")
    return tmp_path / "run"


def toy(which: Any) -> Program:
    return Program(which.name, which.model, which.guide, portable=True, arguments=("x",))


def same_bits(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert np.asarray(a[name]).dtype == np.asarray(b[name]).dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# The same fit.


@on_both
def test_a_loaded_fit_is_the_fit_to_the_bit(backend: str, tmp_path: Path) -> None:
    run = pca(backend, validation=0.2, check_every=2)
    again = load(saved(run, tmp_path))
    assert again.program == run.program and again.recipe == run.recipe
    assert (again.backend, again.seed, again.seconds, again.messages) == (backend, 3, run.seconds, run.messages)
    same_bits(again.params, run.params)
    same_bits(again.history, run.history)
    same_bits(again.state.arrays, run.state.arrays)
    assert again.state.described == run.state.described
    same_bits(again.posterior(5, X, seed=1).values, run.posterior(5, X, seed=1).values)
    with pytest.raises(DataError, match="holds no training rows"):
        again.posterior(5)
    again.save(tmp_path / "copy")
    same_bits(load(tmp_path / "copy").params, run.params)


@mostly_on_pyro
def test_all_that_is_asked_of_a_fit_is_asked_of_a_loaded_one(backend: str, tmp_path: Path) -> None:
    run = pca(backend)
    again = load(saved(run, tmp_path))
    np.testing.assert_array_equal(again.log_likelihood(X, 20).values, run.log_likelihood(X, 20).values)
    same_bits(again.predictive(3, X), run.predictive(3, X))
    same_bits(again.encode(X, 4).mean, run.encode(X, 4).mean)
    same_bits(again.prior_predictive(7), run.without_data().prior_predictive(7))
    holes = np.where(np.arange(3) == 1, np.nan, X[:5])
    same_bits(again.impute(holes, 2, 50).values, run.impute(holes, 2, 50).values)
    assert again.to_arviz(3, X, predictive=0).equals(run.to_arviz(3, X, predictive=0))


@on_both
def test_training_goes_on_from_what_was_saved(backend: str, tmp_path: Path) -> None:
    half = pca(backend, steps=3)
    state = load(saved(half, tmp_path)).state
    same_bits(pca(backend, state=state).state.arrays, pca(backend).state.arrays)
    warm = pca(backend, start=load(tmp_path / "run"), steps=1)
    same_bits(warm.history, pca(backend, start=half, steps=1).history)


@on_both
def test_with_its_rows_a_loaded_fit_lacks_nothing(backend: str, tmp_path: Path) -> None:
    run = pca(backend)
    again = load(saved(run, tmp_path), data=X)
    same_bits(again.posterior(5).values, run.posterior(5).values)
    with pytest.raises(DataError, match="on other data than these: x was float64"):
        load(tmp_path / "run", data=X + 1e-9)
    with pytest.raises(DataError, match="on other data than these: x was float64"):
        load(tmp_path / "run", data=X[:40])


LIGHT: dict[str, Any] = {"dtype": "float64", "batch_size": None}
DRAWS = 3


# On the other backend.


def scores(run: Fit, values: dict[str, np.ndarray], data: Any) -> dict[str, np.ndarray]:
    """All densities of the program at given latents, `[draws, rows]`: nothing of it is noise."""
    call = run._call(data)
    found = run._evaluated(call, DRAWS, 0, values, whole=True)
    given = {"log_p": found.log_p, "log_q": found.log_q, **found.log_likelihood}
    globals_ = {"log_p_global": found.log_p_global, "log_q_global": found.log_q_global}
    return given | {n: v for n, v in globals_.items() if v is not None}


def assert_same_predictions(a: Fit, b: Fit, data: Any, tolerance: float = 1e-10) -> None:
    """Densities at the same latents, the means of data given them, parameters: of a fit on two backends."""
    for name, value in a.params.items():
        np.testing.assert_allclose(b.params[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    sites = a._bound.structure.sites
    # A point of the guide is computed by each backend to its own last digit, and has no density beside that.
    values = {n: v for n, v in a.posterior(DRAWS, data, seed=1).values.items() if not sites[n].point}
    first, second = scores(a, values, data), scores(b, values, data)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("which", "backend"),
    [
        (GLOBAL_ROWS, "numpyro"),
        (PLATE, "pyro"),
        pytest.param(GLOBAL_ROWS, "pyro", marks=pytest.mark.slow),
        pytest.param(PLATE, "numpyro", marks=pytest.mark.slow),
    ],
    ids=lambda given: getattr(given, "name", given),
)
def test_a_portable_fit_gives_the_same_on_the_other_backend(which: Any, backend: str, tmp_path: Path) -> None:
    chosen, x = toy(which), which.data["x"]
    options = {"estimator": {"*": "score"}} if which is PLATE else {}
    run = fit(chosen, data=x, backend=backend, recipe="elbo", steps=3, **(options | LIGHT))
    other = load(saved(run, tmp_path), program=chosen, backend=OTHER[backend])
    same_bits(load(tmp_path / "run", program=chosen)._trained, run._trained)
    assert other.backend == OTHER[backend]
    assert_same_predictions(run, other, x)


@on_both
def test_means_are_the_same_on_the_other_backend(backend: str, tmp_path: Path) -> None:
    run = pca(backend)
    other = load(saved(run, tmp_path), backend=OTHER[backend])
    z = np.random.default_rng(1).normal(size=(9, 2))
    np.testing.assert_allclose(other.decode({"z": z})["x"], run.decode({"z": z})["x"], rtol=0, atol=1e-12)
    assert_same_predictions(run, other, X)
    # By draws: means of 4,000 differ by noise alone, of variance sd^2 / 4000 in each.
    a, b = (r.encode(X, 4000, seed=2) for r in (run, other))
    error = np.sqrt((a.sd["z"] ** 2 + b.sd["z"] ** 2) / 4000)
    assert np.abs((a.mean["z"] - b.mean["z"]) / error).max() < 4.5
    with pytest.raises(DataError, match="go on with the same"):
        fit("probabilistic_pca", data=X, backend=OTHER[backend], state=other.state, **SHORT)


SLOW_TO_FIT = {"functional_tucker", "svae_slds"}


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("name", sorted(programs()))
def test_every_program_is_saved_and_loaded_on_both_backends(name: str, backend: str, tmp_path: Path) -> None:
    chosen = program(name, **({"sweeps": 1} if name == "svae_slds" else {}))
    assert chosen.example is not None
    data = chosen.example(np.random.default_rng(0))
    run = fit(chosen, data=data, backend=backend, steps=2, dtype="float64", compile="eager")
    run.save(tmp_path / "run")
    again = load(tmp_path / "run")
    same_bits(again.params, run.params)
    if run.row_params:
        return
    same_bits(again.posterior(2, data).values, run.posterior(2).values)
    assert_same_predictions(run, load(tmp_path / "run", backend=OTHER[backend]), data, 1e-8)


# Native programs and files of one's own.


@on_both
def test_a_native_program_is_given_by_the_caller(backend: Backend, tmp_path: Path) -> None:
    model, guide = native_rows(backend, with_global=True)
    x = GLOBAL_ROWS.data["x"]
    run = fit(model, guide, x, backend=backend, recipe="elbo", steps=2, **LIGHT)
    path = saved(run, tmp_path)
    with pytest.raises(StorageError, match=r"native callables, .* pass program=\(model, guide\)"):
        load(path)
    again = load(path, program=(model, guide))
    same_bits(again.posterior(4, x).values, run.posterior(4).values)
    with pytest.raises(BackendError, match=f"of backend {backend!r} alone"):
        load(path, program=(model, guide), backend=OTHER[backend])

    def other(x: Array) -> None:
        return guide(x)

    with pytest.raises(StorageError, match=r"the guide has changed since:\n(.|\n)*\+    def other"):
        load(path, program=(model, other))
    same_bits(load(path, program=(model, other), changed=True).params, run.params)


@mostly_on_pyro
def test_an_autoguide_is_given_anew(backend: Backend, tmp_path: Path) -> None:
    if backend == "pyro":
        from pyro.infer.autoguide import AutoNormal
    else:
        from numpyro.infer.autoguide import AutoNormal  # type: ignore[no-redef]
    model, _ = native_rows(backend)
    x = GLOBAL_ROWS.data["x"]
    native = fit(model, AutoNormal(model), x, backend=backend, recipe="elbo", steps=2, **LIGHT)
    again = load(saved(native, tmp_path), program=(model, AutoNormal(model)))
    same_bits(again.params, native.params)
    same_bits(again.posterior(3, x).values, native.posterior(3).values)


@mostly_on_pyro
def test_a_family_writes_the_guide_again(backend: str, tmp_path: Path) -> None:
    run = pca(backend, guide="amortized", steps=2)
    same_bits(load(saved(run, tmp_path)).posterior(3, X).values, run.posterior(3).values)


@pytest.mark.slow
@on_both
def test_a_family_writes_the_guide_on_the_other_backend(backend: str, tmp_path: Path) -> None:
    run = pca(backend, guide="amortized", steps=2)
    assert_same_predictions(run, load(saved(run, tmp_path), backend=OTHER[backend]), X)


@mostly_on_pyro
def test_parameters_of_rows_stay_with_their_rows(backend: str, tmp_path: Path) -> None:
    run = pca(backend, guide="auto_normal", steps=2)
    again = load(saved(run, tmp_path), data=X)
    same_bits(again.posterior(3).values, run.posterior(3).values)
    assert again.row_params == run.row_params
    with pytest.raises(DataError, match="call refit"):
        load(tmp_path / "run").posterior(3, X)


SOURCE = '''
def model(ppl, x, *, scale=1.0, sizes=(1, 2)):
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0 + 0.0 * x))
        ppl.sample("x", ppl.dist.Normal(z, scale), obs=x)


def guide(ppl, x, *, scale=1.0):
    loc = ppl.param("loc", 0.5)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(loc * x, 1.0))
'''


def test_a_file_of_ones_own_is_given_and_its_changes_are_told(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    run = fit(program(file, scale=2.0), data=X[:, 0], backend="pyro", **SHORT)
    path = saved(run, tmp_path)
    file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).write_text('')\n" + SOURCE)
    with pytest.raises(StorageError, match=r"a file of your own, .* pass program='path/to/file\.py'"):
        load(path)
    assert not (tmp_path / "ran").exists()
    file.write_text(SOURCE.replace("Normal(z, scale)", "Normal(3.0 * z, scale)"))
    with pytest.raises(StorageError, match=r"(?s)the file has changed.*-.*Normal\(z, scale.*\+.*Normal\(3\.0 \* z, sc"):
        load(path, program=file)
    again = load(path, program=file, changed=True)
    assert dict(again.program.options) == {"scale": 2.0, "sizes": (1, 2)}
    file.write_text(SOURCE)
    same_bits(load(path, program=str(file)).params, run.params)
    with pytest.raises(StorageError, match=r"other options of program 'mine': scale was 2\.0 and is 1\.0"):
        load(path, program=program(file))
    file.write_text(SOURCE.replace('"z"', '"u"'))
    with pytest.raises(StorageError, match="other sites than its program"):
        load(path, program=file, changed=True)
    file.write_text(SOURCE.replace('"loc", 0.5', '"place", 0.5'))
    with pytest.raises(BackendError, match="missing, unknown or of another shape or dtype"):
        load(path, program=file, changed=True)
    file.write_text(SOURCE.replace("scale=1.0", "size=1.0"))
    with pytest.raises(ProgramError, match="no option 'scale'"):
        load(path, program=file, changed=True)


def test_a_changed_program_of_the_library_is_refused(tmp_path: Path) -> None:
    path = saved(pca("pyro"), tmp_path)

    def older(manifest: dict[str, Any]) -> None:
        source = manifest["content"]["program"]["source"].replace("sigma = ppl.param", "sigma = \x1b[2J ppl.param")
        manifest["content"]["program"] |= {"source": source, "source_hash": "0" * 16}

    rewrite(path, older)
    with pytest.raises(StorageError, match=r"(?s)the file has changed since:.*- +sigma = \\x1b\[2J.*\+ +sigma = ppl"):
        load(path)
    assert load(path, changed=True).program.name == "probabilistic_pca"
    rewrite(path, lambda m: m["content"]["program"].update(source=None))
    with pytest.raises(StorageError, match="0000000000000000 before, "):
        load(path)


class own_elbo(elbo):
    """The ELBO under a name of one's own."""


def test_a_recipe_of_ones_own_is_given(tmp_path: Path) -> None:
    chosen = recipe(own_elbo())
    run = pca("pyro", recipe=chosen, steps=2)
    path = saved(run, tmp_path)
    with pytest.raises(RecipeError, match=r"none of the library's, .* load\(path, recipe=\.\.\.\)"):
        load(path)
    same_bits(load(path, recipe=run.recipe).params, run.params)
    with pytest.raises(StorageError, match="another recipe: steps was 2 and is 1000"):
        load(path, recipe=chosen)


# Methods.


def shared_model(ppl: Ppl, x: Array) -> None:
    mu = ppl.sample("mu", ppl.dist.Normal(0.0, 2.0))
    scale = ppl.sample("scale", ppl.dist.LogNormal(0.0, 1.0))
    with ppl.plate("data", len(x)):
        ppl.sample("x", ppl.dist.Normal(mu, scale), obs=x)


def of_method(model: Callable[..., None], backend: str, method: dict[str, Any]) -> tuple[Program, Fit]:
    chosen = Program("shared", model, None, portable=True, arguments=("x",))
    return chosen, fit(chosen, data=X[:20, 0], recipe={"method": method}, backend=backend, dtype="float64")


@mostly_on_pyro
@pytest.mark.parametrize(
    "method",
    [
        {"name": "laplace", "steps": 300, "learning_rate": 0.1},
        pytest.param({"name": "nuts", "draws": 5, "warmup": 5, "chains": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda m: m["name"],
)
def test_draws_of_a_method_are_kept(method: dict[str, Any], backend: str, tmp_path: Path) -> None:
    chosen, run = of_method(shared_model, backend, method)
    path = saved(run, tmp_path)
    assert isinstance(run, Sampled)
    new = X[20:24, 0]
    without, again = load(path, program=chosen), load(path, program=chosen, data=X[:20, 0])
    assert isinstance(again, Sampled) and isinstance(without, Sampled)
    for each in (without, again):
        same_bits(each.posterior(4, new).values, run.posterior(4, new).values)
        np.testing.assert_array_equal(each.log_likelihood(new).values, run.log_likelihood(new).values)
        same_bits(each.stats, run.stats)
        same_bits(each.history, run.history)
    assert again.lacks == run.lacks
    if method["name"] == "laplace":
        assert again.log_evidence(50) == run.log_evidence(50)
        with pytest.raises(PplLvmError, match="the rows of the fit, and they were not given"):
            without.log_evidence(50)
    with pytest.raises(BackendError, match="alone; load it there"):
        load(path, program=chosen, backend=OTHER[backend])


def rows_of_their_own(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0 + 0.0 * x))
        ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)


@on_both
def test_draws_of_rows_need_their_rows(backend: str, tmp_path: Path) -> None:
    chosen, run = of_method(rows_of_their_own, backend, {"name": "map", "steps": 5})
    path = saved(run, tmp_path)
    same_bits(load(path, program=chosen, data=X[:20, 0]).posterior().values, run.posterior().values)
    with pytest.raises(DataError, match=r"without its rows, .* load\(path, data=rows\)"):
        load(path, program=chosen).posterior(data=X[:20, 0])


# What is refused.


@pytest.fixture(scope="module")
def fitted() -> Fit:
    return pca("pyro", steps=2)


@pytest.fixture
def folder(fitted: Fit, tmp_path: Path) -> Path:
    return saved(fitted, tmp_path)


def test_nothing_is_replaced_unasked(fitted: Fit, folder: Path) -> None:
    with pytest.raises(StorageError, match="overwrite=True"):
        fitted.save(folder)
    dataclasses.replace(fitted, seconds=1.5).save(folder, overwrite=True)
    assert load(folder).seconds == 1.5


def test_an_option_that_json_has_not_is_refused(fitted: Fit, tmp_path: Path) -> None:
    odd = dataclasses.replace(fitted.program, options=(("latent", {1, 2}),))
    with pytest.raises(StorageError, match="Option 'latent' of program 'probabilistic_pca'"):
        dataclasses.replace(fitted, program=odd).save(tmp_path / "no")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("program.name", "../../etc/passwd", "which this version has not"),
        ("program.name", "no_such", "which this version has not"),
        ("program.origin", "file", "nothing that a folder names is run"),
        ("program.origin", "elsewhere", "cannot be understood"),
        ("program.options", {"latent": "x"}, "latent"),
        ("program.options", {"latent": 3}, "saved program does not fit"),
        ("program.options", {"hidden": 3}, "no option 'hidden'"),
        ("program.observed", {"x": 3}, "cannot be understood"),
        ("backend", "tensorflow", "cannot be understood"),
        ("dtype", "float16", "cannot be understood"),
        ("dtype", "float32", "saved program does not fit"),
        ("seed", -1, "cannot be understood"),
        ("", {"rows": 2**47, "in_plate": False}, "at most"),
        ("total", 2**47, "at most"),
        ("arguments", [], "failed when it was first run.*TypeError"),
        ("arguments", [{"name": "y", "dtype": "float64", "shape": [3]}], "failed when it was first run.*TypeError"),
        ("arguments", [{"name": None, "dtype": "object", "shape": [3]}], "which no data have"),
        ("arguments", [{"name": None, "dtype": "float64", "shape": [2**47] * 9}], "have shape"),
        ("arguments", [{"name": None, "dtype": "float64", "shape": [2**40]}], "at most"),
        ("arguments", [{"name": None, "dtype": "float64", "shape": [4]}], "saved program does not fit"),
        ("sites", {}, "other sites than its program"),
        ("history", {"loss": "float64"}, "of which the manifest says nothing"),
        ("history", {"loss": "object", "step": "int64", "gradient_norm": "float64"}, "of dtype 'object'"),
        ("history", {"loss": "int64", "step": "int64", "gradient_norm": "float64"}, "in column 'loss'"),
        ("history", {"loss": "float64", "step": "int8", "gradient_norm": "bool"}, "in column 'gradient_norm'"),
        ("state", {"step": 3}, "describes no state"),
        ("data", "abc", "cannot be understood"),
        ("recipe", {}, "names no objective"),
        ("recipe.objective", "elbo", "OK"),
        ("recipe.steps", "many", "steps is 'many'"),
        ("recipe.stages", 3, "should be a list"),
        ("messages", [3], "cannot be understood"),
        ("more", 3, "cannot be understood"),
    ],
)
def test_manifests_that_do_not_hold_are_refused(place: str, value: Any, said: str, folder: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        *parents, last = place.split(".")
        table = manifest["content"]
        for parent in parents:
            table = table[parent]
        table.update({last: value} if last else value)

    rewrite(folder, edit)
    if said == "OK":
        load(folder)
        return
    with pytest.raises(PplLvmError, match=said):
        load(folder)


@pytest.mark.parametrize("where", ["objective", "estimator", "guide", "stage", "dotted", "optimizer"])
@pytest.mark.parametrize("kind", ["file", "module"])
def test_nothing_that_a_folder_names_is_run(where: str, kind: str, folder: Path, tmp_path: Path) -> None:
    """Whichever place of a recipe could name a file or a module: neither is imported."""
    mark = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('')\n"
    (tmp_path / "evil.py").write_text(code)
    name = f"{tmp_path}/evil.py:elbo" if kind == "file" else "antigravity:elbo"
    table = json.loads((folder / "manifest.json").read_text())["content"]["recipe"]
    table |= {
        "objective": {"objective": {"name": name}},
        "estimator": {"estimator": {"z": {"name": name}}},
        "guide": {"guide": {"name": name}},
        "stage": {"stages": [{"objective": {"name": name}}]},
        "dotted": {"stages": [{"objective.name": name}]},
        "optimizer": {"optimizer": {"name": name}},
    }[where]
    rewrite(folder, lambda m: m["content"].update(recipe=table))
    with pytest.raises(PplLvmError):
        load(folder)
    import sys

    assert not mark.exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize("group", [saving.TRAINED, saving.PARAMS])
def test_arrays_of_other_shapes_and_dtypes_are_refused(group: str, folder: Path) -> None:
    backend = None if group == saving.TRAINED else "numpyro"
    described = json.loads((folder / "manifest.json").read_text())["groups"][group]["arrays"]
    for name, kind in (("W", {"dtype": "float64", "shape": [2, 3]}), ("W", {"dtype": "float32", "shape": [3, 2]})):
        arrays = described | {name: kind}
        header, body = dict[str, Any](), b""
        for n, a in arrays.items():
            size = int(np.prod(a["shape"])) * np.dtype(a["dtype"]).itemsize
            code = {"float64": "F64", "float32": "F32"}[a["dtype"]]
            header[n] = {"dtype": code, "shape": a["shape"], "data_offsets": [len(body), len(body) + size]}
            body += b"\0" * size
        replace_file(folder, group, safetensors(header, body), arrays)
        with pytest.raises(PplLvmError, match=r"does not fit|has shape|outside the support"):
            load(folder, backend=backend)
    rewrite(folder, lambda m: m["groups"].pop(group))
    with pytest.raises(PplLvmError, match=r"does not fit|other parameters than its program"):
        load(folder, backend=backend)
