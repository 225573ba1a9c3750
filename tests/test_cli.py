"""The command line: what it asks of the engine, what it prints, and how it fails. Fits are made up here."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ppl_lvm import cli, report
from ppl_lvm.catalogue import available, estimators, objectives
from ppl_lvm.datasets import datasets
from ppl_lvm.errors import LegalityError
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
    messages: tuple[str, ...] = ("compiled nothing",)
    history: dict[str, np.ndarray] = field(default_factory=lambda: {"step": np.arange(2), "loss": np.ones(2)})

    def log_likelihood(self, data: np.ndarray, draws: int = 5000, seed: int = 0) -> SimpleNamespace:
        assert seed == self.seed
        values = OFFSET[self.recipe.name] - np.arange(float(len(data)))
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


@dataclass
class Engine:
    """Stands in for `ppl_lvm.fit`; keeps what was fitted, and raises what it is told to."""

    fitted: list[FakeRun] = field(default_factory=list)
    error: Exception | None = None

    def fit(self, program: Program, *, data: np.ndarray, recipe: Recipe, **how: Any) -> FakeRun:
        if self.error is not None:
            raise self.error
        run = FakeRun(program, recipe, how.pop("backend") or "numpyro", how.pop("seed"), data)
        assert not how
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


def test_compare_prints_each_fit_and_the_paired_differences(engine: Engine) -> None:
    output = done(
        *("compare", "vae", "--recipes", "elbo,iwae,beta_vae", "--backends", "numpyro,pyro"),
        *("--data", "rows.npy", "--seeds", "2", "--set", "steps=5", "--draws", "9"),
    )
    order = [(fit.backend, fit.seed, fit.recipe.name, fit.recipe.steps) for fit in engine.fitted]
    assert order == [(b, s, r, 5) for b in ("numpyro", "pyro") for s in (0, 1) for r in OFFSET]
    printed = cells(output)
    assert ["numpyro", "iwae", "1", "-21.500", "9.000", "6", "1.5"] in printed
    assert sum(len(line) == 7 for line in printed) == 12
    # All rows differ by the same amount here, so the standard error is zero.
    differences = [line for line in printed if len(line) == 6]
    assert len(differences) == 8
    assert differences[0] == ["numpyro", "iwae - elbo", "0", "+0.500", "0.000", "-"]
    assert differences[-1][:5] == ["pyro", "beta_vae - elbo", "1", "-5.000", "0.000"]
    assert not Path("runs").exists()


def test_compare_takes_all_installed_backends_and_writes_where_told(engine: Engine) -> None:
    output = done("compare", "vae", "--recipes", "elbo,iwae", "--data", "rows.npy", "--out", "all")
    written = sorted(path.parent.name for path in Path("all").glob("*/metrics.json"))
    assert written == ["numpyro-elbo", "numpyro-iwae", "pyro-elbo", "pyro-iwae"]
    assert "Wrote the runs to all" in output


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
        {*report.FILES} - {"reconstructions.png", "samples.png"}
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("programs", programs()),
        ("recipes", recipes()),
        ("objectives", objectives()),
        ("estimators", estimators()),
        ("methods", available("method")),
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


def test_every_name_that_is_listed_can_be_shown() -> None:
    for kind, names in (
        ("program", programs()),
        ("recipe", recipes()),
        ("objective", objectives()),
        ("estimator", estimators()),
        ("method", available("method")),
    ):
        for name in names:
            assert done("show", kind, name).strip()
