"""The command line: what it asks of the engine, what it prints, and how it fails. Fits are made up here."""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from ppl_lvm import cli, load, report, saving, store
from ppl_lvm.catalogue import available, estimators, guides, objectives
from ppl_lvm.datasets import datasets
from ppl_lvm.errors import LegalityError
from ppl_lvm.guides.low_rank import low_rank
from ppl_lvm.program import Program, programs
from ppl_lvm.recipe import Recipe, recipes
from ppl_lvm.to_arviz import to_arviz

if TYPE_CHECKING:
    from xarray import DataTree

OFFSET = {"elbo": -20.0, "iwae": -19.5, "beta_vae": -25.0}
"""Held-out log-likelihood of row 0 per recipe; row n has n less."""


@dataclass
class FakeRun:
    program: Program
    recipe: Recipe
    backend: str
    seed: int
    data: np.ndarray
    seconds: float = 1.5
    lacks: dict[str, str] = field(default_factory=dict)
    row_params: frozenset[str] = frozenset()
    params: dict[str, np.ndarray] = field(default_factory=lambda: {"w": np.zeros(2)})
    messages: tuple[str, ...] = ("compiled nothing",)
    settings: dict[str, Any] = field(default_factory=dict)
    history: dict[str, np.ndarray] = field(default_factory=lambda: {"step": np.arange(2), "loss": np.ones(2)})

    def log_likelihood(self, data: np.ndarray | None, draws: int = 5000, seed: int = 0) -> SimpleNamespace:
        assert data is not None and seed == self.seed
        values = OFFSET[self.recipe.name.split(", ")[-1]] - np.arange(float(len(data)))
        return SimpleNamespace(values=values, mean=values.mean(), se=float(draws))

    def posterior(self, draws: int, data: np.ndarray | None = None, seed: int = 0) -> SimpleNamespace:
        assert data is not None
        log = np.zeros((draws, len(data)))
        z = np.zeros((draws, len(data), 2))
        return SimpleNamespace(
            values={"z": z}, dims={"z": ("data",)}, log_p=log, log_q=log, log_likelihood={"x": log}
        )

    def to_arviz(
        self, draws: int, data: np.ndarray | None = None, seed: int = 0, *, predictive: int | None = None
    ) -> "DataTree":
        return to_arviz({"posterior": self.posterior(draws, data, seed).values}, {"z": ("data",)}, "data", {})

    def predictive(self, draws: int, data: np.ndarray | None = None, seed: int = 0) -> dict[str, np.ndarray]:
        assert data is not None
        return {"x": np.zeros((draws, *data.shape))}

    def prior_predictive(self, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
        return {"x": np.zeros((rows, 64))}

    def active_units(
        self, threshold: float = 0.01, draws: int = 100, data: np.ndarray | None = None
    ) -> dict[str, int]:
        return {"z": 6}

    def save(self, path: Path) -> None:
        """As far as parameters are read from it."""
        store.write(path, saving.KIND, {"row_params": sorted(self.row_params)}, {saving.PARAMS: self.params})


@dataclass
class Engine:
    """Stands in for `ppl_lvm.fit`; keeps what was fitted, and raises what it is told to."""

    fitted: list[FakeRun] = field(default_factory=list)
    error: Exception | None = None
    broken: dict[tuple[str, int], Exception] = field(default_factory=dict)

    def fit(self, program: Program, *, data: np.ndarray, recipe: Recipe, **how: Any) -> FakeRun:
        backend, seed = how.pop("backend") or "numpyro", how.pop("seed")
        if error := self.broken.get((recipe.name, seed), self.error):
            raise error
        run = FakeRun(program, recipe, backend, seed, data, settings=how)
        self.fitted.append(run)
        return run


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    engine = Engine()
    module = ModuleType("ppl_lvm.fit")
    monkeypatch.setattr(module, "fit", engine.fit, raising=False)
    monkeypatch.setitem(sys.modules, "ppl_lvm.fit", module)
    monkeypatch.setattr(cli, "_installed", lambda: ["pyro", "numpyro"])
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).integers(0, 17, size=(25, 4))
    np.save("rows.npy", rows)
    return engine


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, prog_name="ppl-lvm")


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    """The message of a command that ends with code 2 and no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout and "Traceback" not in result.stderr
    return result.stderr


def cells(output: str) -> list[list[str]]:
    """Cells of the printed tables, without their headings."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]


def flat(output: str) -> str:
    """What is printed, as if on one line."""
    return " ".join(output.split())


def test_fit_passes_everything_on_and_writes_a_run(engine: Engine) -> None:
    output = done(
        *("fit", "vae", "--recipe", "iwae", "--data", "rows.npy", "--backend", "pyro", "--seed", "3"),
        *("--set", "objective.draws=7", "--set", "steps=11", "--set", "estimator=dreg"),
        *("--option", "latent=2", "--option", "likelihood=bernoulli", "--draws", "123", "--out", "runs/a"),
    )
    (found,) = engine.fitted
    assert found.program.name == "vae" and (found.backend, found.seed) == ("pyro", 3)
    assert dict(found.program.options)["latent"] == 2
    assert dict(found.program.options)["likelihood"] == "bernoulli"
    table = found.recipe.to_dict()
    assert (table["objective"]["draws"], table["steps"]) == (7, 11)
    assert table["estimator"] == {"*": {"name": "dreg"}}
    assert found.data.shape == (20, 4)
    assert cells(output) == [["pyro", "iwae", "3", "-21.500", "123.000", "6", "1.5"]]
    assert "Wrote runs/a" in output
    metrics = json.loads(Path("runs/a/metrics.json").read_text())
    assert (metrics["recipe"], metrics["seed"], metrics["draws"]) == ("iwae", 3, 123)


def test_fit_takes_the_programs_recipe_and_names_the_run(engine: Engine) -> None:
    result = run("fit", "vae", "--data", "rows.npy")
    assert result.exit_code == 0
    assert engine.fitted[0].recipe.name == "elbo"
    assert Path("runs/vae-elbo-0/metrics.json").is_file()
    assert "compiled nothing" in result.stderr


def test_compare_has_a_line_for_all_seeds_and_differences_from_the_first(engine: Engine) -> None:
    output = done(
        *("compare", "vae", "--recipes", "elbo,iwae,beta_vae", "--backends", "numpyro,pyro"),
        *("--data", "rows.npy", "--seeds", "2", "--set", "steps=5", "--draws", "9"),
    )
    order = [(fit.backend, fit.recipe.name, fit.seed, fit.recipe.steps) for fit in engine.fitted]
    assert order == [(b, r, s, 5) for b in ("numpyro", "pyro") for r in OFFSET for s in (0, 1)]
    # Rows and seeds all differ by the same amount here, so standard errors are zero.
    assert cells(output) == [
        [b, r, "2", f"{OFFSET[r] - 2:.3f}", "0.000", *apart, "6", "1.5"]
        for b in ("numpyro", "pyro")
        for r, apart in (
            ("elbo", ["-", "-"] if b == "numpyro" else ["+0.000", "0.000"]),
            ("iwae", ["+0.500", "0.000"]),
            ("beta_vae", ["-5.000", "0.000"]),
        )
    ]
    assert "Standard errors are over seeds" in flat(output)
    assert "Differences are from vae numpyro elbo, paired by row." in flat(output)
    assert not Path("runs").exists()


def test_compare_crosses_programs_and_guides_and_writes_the_table(engine: Engine) -> None:
    output = done(
        *("compare", "vae,probabilistic_pca", "--recipes", "elbo,iwae", "--backends", "pyro"),
        *("--guides", "own,low_rank", "--data", "rows.npy", "--out", "all"),
    )
    fitted = [(f.program.name, f.recipe.name, type(f.recipe.guide).__name__) for f in engine.fitted]
    programs = ("vae", "probabilistic_pca")
    assert fitted == [(p, r, g) for p in programs for r in ("elbo", "iwae") for g in ("NoneType", "low_rank")]
    assert [line[:4] for line in cells(output)][-1] == ["probabilistic_pca", "pyro", "iwae", "low_rank"]
    assert Path("all/vae-pyro-elbo-low_rank/metrics.json").is_file()
    table = json.loads(Path("all/comparison.json").read_text())
    assert [row["guide"] for row in table] == ["own", "low_rank"] * 4
    assert table[0]["difference"] is None and table[0]["standard_error_over"] == "rows"
    # With one seed the standard error is that of the fit, which is made up of the draws here.
    assert (table[2]["difference"], table[2]["standard_error"]) == (0.5, 5000.0)
    assert table[2]["difference_from"] == "vae pyro elbo own" and table[2]["log_likelihood_of_seed"] == {"0": -21.5}
    with Path("all/comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["recipe"], line["seeds"], line["active_units"]) for line in lines[:3]] == [
        *(("elbo", "1", "z=6"), ("elbo", "1", "z=6"), ("iwae", "1", "z=6")),
    ]


def test_a_fit_that_fails_leaves_the_others_alone(engine: Engine) -> None:
    engine.broken = {("iwae", 1): LegalityError("Site 'y' is discrete.\nMore."), ("beta_vae", 0): KeyError("bug")}
    result = run(
        *("compare", "vae", "--recipes", "iwae,beta_vae,elbo", "--backends", "pyro", "--data", "rows.npy"),
        *("--seeds", "2", "--out", "all"),
    )
    assert result.exit_code == 1
    assert [line[:4] for line in cells(result.stdout)] == [
        ["pyro", "iwae", "1", "-21.500"],
        ["pyro", "beta_vae", "1", "-27.000"],
        ["pyro", "elbo", "2", "-22.000"],
    ]
    errors = "failed: vae pyro iwae, seed 1: Site 'y' is discrete. failed: vae pyro beta_vae, seed 0: KeyError: 'bug'"
    assert errors in flat(result.stdout)
    # Nobody raised the second on purpose, so where it came from is told.
    assert result.stderr.count("Traceback") == 1
    table = json.loads(Path("all/comparison.json").read_text())
    assert table[0]["errors"] == {"1": "Site 'y' is discrete."} and table[2]["errors"] == {}
    assert table[2]["difference_seeds"] == 1


def test_fit_runs_stages_and_passes_settings_on(engine: Engine) -> None:
    np.savetxt("holes.csv", np.where(np.eye(20, 4), np.nan, 1.0), delimiter=",")
    Path("holes.csv").write_text(Path("holes.csv").read_text().replace("nan", ""))
    done(
        *("fit", "vae", "--recipe", "elbo", "--recipe", "iwae", "--guide", "low_rank", "--data", "holes.csv"),
        *("--set", "guide.rank=2", "--validation", "0.25", "--missing", "mask", "--dtype", "float64"),
        *("--compile", "eager", "--device", "cpu", "--data-plate", "data"),
    )
    (found,) = engine.fitted
    assert [stage.name for stage in found.recipe.stages] == ["elbo", "iwae"]
    assert [stage.guide for stage in found.recipe.stages] == [low_rank(rank=2)] * 2
    assert np.isnan(found.data).any() and found.settings == {
        **{"validation": 0.25, "missing": "mask", "dtype": "float64"},
        **{"compile": "eager", "device": "cpu", "data_plate": "data"},
    }
    for start in ("runs/vae-elbo-iwae-low_rank-0", "runs/vae-elbo-iwae-low_rank-0/fit"):
        done("fit", "vae", "--data", "rows.npy", "--start", start, "--out", "b")
        np.testing.assert_array_equal(engine.fitted[-1].settings["start"]["w"], np.zeros(2))


def test_data_come_from_every_kind_of_file_and_from_functions(engine: Engine) -> None:
    rows = np.load("rows.npy")
    np.savez("rows.npz", rows=rows)
    np.savetxt("rows.csv", rows, delimiter=",")
    pd.DataFrame(rows, columns=list("abcd")).to_parquet("rows.parquet")
    Path("mine.py").write_text("import numpy as np\n\ndef rows():\n    return np.load('rows.npy')\n")
    for asked in ("rows.npy", "rows.npz", "rows.csv", "rows.parquet", "mine.py:rows"):
        done("fit", "vae", "--data", asked, "--out", asked.translate({ord("."): None, ord(":"): None}))
    first, *others = (found.data for found in engine.fitted)
    assert len(first) == 20  # a fifth is held out
    for found in others:
        np.testing.assert_array_equal(found, first)
    assert "There is no file 'none.parquet'" in refused("fit", "vae", "--data", "none.parquet")


def test_a_single_recipe_may_be_one_with_a_method_and_is_no_stage(engine: Engine) -> None:
    from ppl_lvm.cells import Cell

    _, how, _ = Cell("vae", "rows.npy", ("map",)).loaded()
    assert how.name == "map" and not how.stages
    assert "has a method and cannot be a stage" in refused("fit", "vae", "--recipe", "elbo", "--recipe", "map")


def test_validation_rows_of_the_data_set(engine: Engine) -> None:
    Path("data.py").write_text(
        "from dataclasses import replace\nfrom ppl_lvm.datasets import load\n"
        "def split():\n    d = load('linear_gaussian')\n    return replace(d, valid=d.test[:7])\n"
    )
    done("fit", "vae", "--data", "data.py:split", "--validation", "own")
    assert engine.fitted[0].settings["validation"].shape == (7, 10)
    assert "comes without validation rows" in refused("fit", "vae", "--data", "rows.npy", "--validation", "own")




def test_compare_takes_all_installed_backends_and_writes_where_told(engine: Engine) -> None:
    output = done("compare", "vae", "--recipes", "elbo,iwae", "--data", "rows.npy", "--out", "all")
    written = sorted(path.parent.name for path in Path("all").glob("*/metrics.json"))
    assert written == ["numpyro-elbo", "numpyro-iwae", "pyro-elbo", "pyro-iwae"]
    assert "Wrote the runs and comparison.csv and comparison.json to all" in output


def test_demo_fits_two_recipes_on_every_installed_backend(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(report, "write", lambda run, data, out, metrics: written.append(str(out)))
    output = done("demo", "--steps", "4", "--draws", "3")
    order = [(fit.backend, fit.recipe.name, fit.recipe.steps, len(fit.data)) for fit in engine.fitted]
    assert order == [(b, r, 4, 1437) for b in ("pyro", "numpyro") for r in ("elbo", "iwae")]
    assert written == [f"runs/demo/{b}-{r}" for b in ("pyro", "numpyro") for r in ("elbo", "iwae")]
    assert all(f"Wrote {folder}\n" in output for folder in written)
    assert [line[:2] for line in cells(output)] == [[b, r] for b in ("pyro", "numpyro") for r in ("elbo", "iwae")]
    assert "On pyro, iwae is +0.50 nats per held-out row from elbo (paired, standard error 0.00)." in output
    monkeypatch.setattr(cli, "_installed", lambda: ["numpyro"])
    result = run("demo", "--out", "again")
    assert "pyro is not installed" in result.stderr
    assert written[4:] == ["again/numpyro-elbo", "again/numpyro-iwae"]


def test_nothing_is_fitted_when_the_result_could_not_be_written(engine: Engine) -> None:
    Path("all/pyro-iwae").mkdir(parents=True)
    Path("all/pyro-iwae/mine.txt").touch()
    assert "mine.txt" in refused("fit", "vae", "--data", "rows.npy", "--out", "all/pyro-iwae")
    assert "mine.txt" in refused("compare", "vae", "--data", "rows.npy", "--out", "all")
    assert not engine.fitted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "vea"], "Did you mean 'vae'?"),
        (["fit", "vae", "--recipe", "iwea"], "Did you mean 'iwae'?"),
        (["fit", "vae", "--data", "digit"], "Did you mean 'digits'?"),
        (["fit", "vae", "--backend", "jax"], "Unknown backend 'jax'"),
        (["fit", "vae", "--set", "draws"], "--set takes KEY=VALUE"),
        (["fit", "vae", "--set", "=3"], "--set takes KEY=VALUE"),
        (["fit", "vae", "--set", "drws=3"], "Did you mean 'draws'?"),
        (["fit", "vae", "--set", "steps=many"], "steps"),
        (["fit", "vae", "--option", "laten=3"], "Did you mean 'latent'?"),
        (["compare", "vae", "--recipes", "elbo,elbo"], "--recipes takes different names"),
        (["compare", "vae", "--backends", ","], "--backends takes different names"),
        (["show", "estimator", "vimc"], "Did you mean 'vimco'?"),
        (["show", "guide", "lowrank"], "Did you mean 'low_rank'?"),
        (["show", "objective"], "which objective? Give its name"),
        (["show", "objective", "elbo", "--estimator", "score"], "are of `show matrix`"),
        (["show", "matrix", "vae"], "the matrix has no name"),
        (["show", "matrix", "--objective", "iwea"], "Did you mean 'iwae'?"),
        (["fit", "vae", "--guide", "auto_norml"], "Did you mean 'auto_normal'?"),
        (["fit", "vae", "--validation", "some"], "--validation takes a fraction of the rows, as in 0.1, or own"),
        (["fit", "vae", "--validation", "1.5"], "--validation takes a fraction between 0 and 1"),
        (["fit", "vae", "--start", "nowhere"], "give a run folder"),
        (["fit", "vae", "--dtype", "float16"], "float64"),
        (["compare", "vae,vea"], "Did you mean 'vae'?"),
        (["compare", "vae", "--guides", "own,lowrank"], "Did you mean 'low_rank'?"),
        (["compare", "vae", "--jobs", "0"], "--jobs"),
        (["list", "things"], "things"),
    ],
)
def test_wrong_requests_are_answered_with_one_message(
    engine: Engine, arguments: list[str], message: str
) -> None:
    assert message in refused(*arguments)
    assert not engine.fitted


def test_errors_of_the_engine_are_printed_without_a_traceback(engine: Engine) -> None:
    engine.error = LegalityError("Site 'y' cannot be reparameterised; use rloo.")
    assert "Error: Site 'y' cannot be reparameterised; use rloo." in refused(
        "fit", "vae", "--data", "rows.npy"
    )
    engine.error = ZeroDivisionError("a bug")
    assert isinstance(run("fit", "vae", "--data", "rows.npy").exception, ZeroDivisionError)


def test_missing_backends_are_told_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_installed", lambda: ["numpyro"])
    assert "pip install 'ppl_lvm[pyro]'" in refused("fit", "vae", "--backend", "pyro")
    monkeypatch.undo()
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert "No backend is installed" in refused("compare", "vae")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1e-3", 1e-3),
        ("true", True),
        ("[128, 64]", [128, 64]),
        ('{ name = "score" }', {"name": "score"}),
        ("dreg", "dreg"),
        ("a=b", "a=b"),
        ('"7"', "7"),
        ("", ""),
        ("none", None),
    ],
)
def test_values_are_read_as_toml_or_text(text: str, value: object) -> None:
    assert cli._pairs([f"key={text}"], "--set") == {"key": value}


# The wheel check in .ci fits on NumPyro by the command line, so only Pyro (which compiles less) runs every time.
@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_the_engine_itself_fits_and_fills_a_run_folder(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).integers(0, 17, size=(15, 5)))
    output = done(
        *("fit", "vae", "--recipe", "iwae", "--data", "rows.npy", "--backend", backend, "--draws", "20"),
        *("--set", "steps=3", "--set", "draws=2", "--option", "latent=2", "--option", "hidden=3", "--out", "a"),
    )
    (line,) = cells(output)
    assert line[:3] == [backend, "iwae", "0"] and float(line[3]) < 0
    metrics = json.loads(Path("a/metrics.json").read_text())
    assert metrics["log_likelihood"] == pytest.approx(float(line[3]), abs=1e-3)
    assert len(Path("a/history.csv").read_text().splitlines()) == 4
    assert len(Path("a/held_out.csv").read_text().splitlines()) == 4
    assert sorted(path.name for path in Path("a").iterdir()) == sorted(
        {*report.FILES} - {"reconstructions.png", "samples.png", "validation.csv", "hard.csv"}
    )


def test_a_run_folder_is_evaluated_and_started_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).normal(size=(25, 4)))
    short = ("--data", "rows.npy", "--backend", "pyro", "--set", "steps=3", "--draws", "20")
    done("fit", "probabilistic_pca", *short, "--seed", "4", "--out", "a")
    measured = json.loads(Path("a/metrics.json").read_text())["log_likelihood"]
    assert f"{measured:.3f}" in done("evaluate", "a", "--data", "rows.npy", "--draws", "20")
    assert f"{measured:.3f}" in done("evaluate", "a/fit", "--data", "rows.npy", "--draws", "20")
    done("fit", "probabilistic_pca", *short, "--start", "a", "--out", "b")
    assert "start: took" in " ".join(load("b/fit").messages)
    assert "no folder 'elsewhere/fit'" in refused("evaluate", "elsewhere", "--data", "rows.npy")
    Path("a/fit/notes.txt").write_text("mine")
    assert "holds 'notes.txt', which no run wrote" in refused("fit", "probabilistic_pca", *short, "--out", "a")


def test_several_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guides with parameters of rows are fitted to the held-out rows; a program that is refused fails alone."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).integers(0, 17, size=(15, 5)))
    asked = [
        *("compare", "discrete_vae", "--recipes", "elbo", "--backends", "pyro", "--guides", "own,delta,auto_normal"),
        *("--data", "rows.npy", "--draws", "20", "--set", "steps=3", "--option", "variables=2", "--option", "hidden=3"),
        *("--option", "categories=2", "--compile", "eager", "--dtype", "float64"),
    ]
    found = {}
    for jobs in ("1", "2"):
        result = run(*asked, "--jobs", jobs, "--out", jobs)
        assert result.exit_code == 1, result.output
        found[jobs] = json.loads(Path(jobs, "comparison.json").read_text())
        for row in found[jobs]:
            del row["seconds"]
    assert found["1"] == found["2"]
    own, delta, normal = found["1"]
    assert "cannot move the discrete site 'z'" in delta["errors"]["0"] and delta["log_likelihood"] is None
    assert own["log_likelihood"] < 0
    # A mean of differences, and a difference of means: the same but for rounding.
    apart = normal["log_likelihood"] - own["log_likelihood"]
    assert normal["difference"] == pytest.approx(apart, rel=0, abs=1e-12)
    metrics = json.loads(Path("2/pyro-elbo-auto_normal/metrics.json").read_text())
    assert "auto.z.logits fitted anew" in metrics["messages"][-1] and len(metrics["active_units"]) == 1
    kept = report.starting(Path("2/pyro-elbo-auto_normal"))
    assert kept and all("decoder" in name for name in kept)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("programs", programs()),
        ("recipes", recipes()),
        ("objectives", objectives()),
        ("estimators", estimators()),
        ("methods", available("method")),
        ("guides", guides()),
        ("datasets", datasets()),
        ("backends", cli.BACKENDS),
    ],
)
def test_list_gives_each_name_a_line(kind: str, names: Any) -> None:
    lines = done("list", kind).splitlines()
    assert [line.split()[0] for line in lines] == list(names)
    assert all(len(line.split()) > 1 for line in lines)
    assert all(f"  {line}\n" in done("list") for line in lines)


def test_version_tells_what_a_report_of_a_problem_needs() -> None:
    assert f"numpy {np.__version__}\n" in done("--version")


def test_list_imports_no_framework() -> None:
    code = (
        "import sys\nfrom ppl_lvm.cli import app\n"
        "app(['list'], standalone_mode=False)\n"
        "print('imported', *({'torch', 'pyro', 'jax', 'numpyro'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "iwae" in output and output.endswith("imported\n")


def test_help_imports_nothing_slow() -> None:
    slow = {
        "torch",
        "jax",
        "numpyro",
        "pyro",
        "sklearn",
        "matplotlib",
        "xarray",
        "arviz_base",
        "pandas",
        "scipy",
    }
    code = f"import sys, ppl_lvm.cli; print('imported', *({slow} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "imported\n"


def test_show_recipe_gives_resolved_values_that_set_takes_back() -> None:
    output = done("show", "recipe", "iwae")
    assert "importance-weighted bound" in output and "  objective.draws = 50\n" in output
    values = [line.strip().replace(" = ", "=", 1) for line in output.split("KEY=VALUE):\n")[1].splitlines()]
    from ppl_lvm.recipe import recipe

    assert recipe("elbo", **cli._pairs(values, "--set")) == recipe("iwae")


def test_show_explains_programs_algorithms_and_data() -> None:
    output = done("show", "program", "vae")
    assert "variational autoencoder" in output and "  latent = 8\n" in output and "data: x\n" in output
    output = done("show", "objective", "elbo")
    assert "  beta: float | Schedule = 1.0\n" in output and "1312.6114" in output
    assert "  baseline" in done("show", "estimator", "score")
    output = done("show", "dataset", "linear_gaussian")
    assert "rows: 800 to fit, 200 held out, each of shape 10" in output and "labels: none" in output


def test_show_matrix_says_what_becomes_of_every_cell() -> None:
    output = done("show", "matrix", "--objective", "iwae", "--estimator", "rloo")
    assert output.splitlines()[0] == "iwae" and "inside `joint`" in output
    assert "unbiased" in done("show", "matrix", "--estimator", "score")


def test_every_name_that_is_listed_can_be_shown() -> None:
    for kind, names in (
        ("program", programs()),
        ("recipe", recipes()),
        ("objective", objectives()),
        ("estimator", estimators()),
        ("method", available("method")),
        ("guide", guides()),
    ):
        for name in names:
            assert done("show", kind, name).strip()
