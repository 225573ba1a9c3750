"""Figures, tables and run folders, from a fit that is made up here."""

import csv
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from xarray import DataTree

from ppl_lvm import comparison, pictures, saving, store
from ppl_lvm.datasets import Dataset, load
from ppl_lvm.datasets._base import sequences
from ppl_lvm.errors import DataError, PplLvmError
from ppl_lvm.recipe import Recipe, recipe
from ppl_lvm.report import (
    FILES,
    Metrics,
    check_folder,
    difference,
    difference_table,
    differences,
    left_out,
    measure,
    plain,
    starting,
    table,
    write,
)
from ppl_lvm.to_arviz import to_arviz

ROWS, LATENT = 24, 3


@dataclass
class Draws:
    values: dict[str, np.ndarray]
    dims: dict[str, tuple[str, ...]]
    log_p: np.ndarray
    log_q: np.ndarray
    log_likelihood: dict[str, np.ndarray]


@dataclass
class FakeRun:
    """A fit whose draws are noise; it records what it was asked."""

    latent: int = LATENT
    fail: bool = False
    asked: dict[str, tuple[object, ...]] = field(default_factory=dict)
    program: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(name="vae", options=(("latent", 3),), source_hash="abc")
    )
    recipe: Recipe = field(default_factory=lambda: recipe("iwae", draws=7))
    backend: str = "numpyro"
    seconds: float = 12.34
    lacks: dict[str, str] = field(default_factory=dict)
    messages: tuple[str, ...] = ("estimator: z: pathwise",)
    row_params: frozenset[str] = frozenset()
    params: dict[str, np.ndarray] = field(
        default_factory=lambda: {"decoder.w": np.eye(2)[:, ::-1], "loc": np.zeros(ROWS)}
    )
    history: dict[str, np.ndarray] = field(
        default_factory=lambda: {"step": np.array([1, 2]), "loss": np.array([3.5, 2.25])}
    )

    def log_likelihood(self, data: np.ndarray | None, draws: int = 5000, seed: int = 0) -> SimpleNamespace:
        assert data is not None
        self.asked["log_likelihood"] = (len(data), draws, seed)
        values = -np.arange(float(len(data)))
        return SimpleNamespace(values=values, mean=values.mean(), se=0.5)

    def posterior(self, draws: int, data: np.ndarray | None = None, seed: int = 0) -> Draws:
        assert data is not None
        self.asked["posterior"] = (len(data), draws, seed)
        log = np.zeros((draws, len(data)))
        values = np.random.default_rng(seed).normal(size=(draws, len(data), self.latent))
        return Draws(
            {"z": values, "w": np.zeros(draws)}, {"z": ("data",), "w": ()}, log, log - 1.0, {"x": log}
        )

    def to_arviz(
        self, draws: int, data: np.ndarray | None = None, seed: int = 0, *, predictive: int | None = None
    ) -> DataTree:
        assert data is not None and predictive == 0
        log = np.ones(draws)
        groups = {
            "posterior": self.posterior(draws, data, seed).values,
            "sample_stats": {"log_weight": log},
            "observed_data": {"x": data},
        }
        return to_arviz(groups, {"z": ("data",), "x": ("data",)}, "data", {"program": "made up"})

    def predictive(self, draws: int, data: np.ndarray | None = None, seed: int = 0) -> dict[str, np.ndarray]:
        self.asked["predictive"] = (seed,)
        if self.fail:
            raise RuntimeError("out of luck")
        assert data is not None
        return {"x": np.full((draws, len(data), data.shape[1]), 8.0)}

    def prior_predictive(self, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
        self.asked["prior_predictive"] = (seed,)
        return {"z": np.zeros((rows, self.latent)), "x": np.full((rows, 64), 4.0)}

    def active_units(
        self, threshold: float = 0.01, draws: int = 100, data: np.ndarray | None = None
    ) -> dict[str, int]:
        return {"z": 2}

    def save(self, path: Path) -> None:
        """As far as parameters are read from it."""
        store.write(path, saving.KIND, {"row_params": sorted(self.row_params)}, {saving.PARAMS: self.params})


@pytest.fixture(scope="module")
def images() -> Dataset:
    digits = load("digits")
    assert digits.test_labels is not None
    return replace(digits, test=digits.test[:ROWS], test_labels=digits.test_labels[:ROWS])


@pytest.fixture(scope="module")
def rows(images: Dataset) -> Dataset:
    return replace(images, image_shape=None)


def test_a_run_folder_holds_draws_figures_and_pictures(tmp_path: Path, images: Dataset) -> None:
    from xarray import open_datatree

    run = FakeRun()
    out = write(run, images, tmp_path / "runs" / "a", draws=77, posterior_draws=5, seed=3)
    assert out == (tmp_path / "runs" / "a").resolve()
    assert {entry.name for entry in out.iterdir()} == {*FILES} - {"validation.csv", "hard.csv"}
    assert [entry.name for entry in out.parent.iterdir()] == ["a"]
    assert run.asked == {
        "log_likelihood": (ROWS, 77, 3),
        "posterior": (ROWS, 5, 3),
        "predictive": (3,),
        "prior_predictive": (3,),
    }

    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["recipe"], metrics["backend"], metrics["program"]) == ("iwae", "numpyro", "vae")
    assert metrics["log_likelihood"] == pytest.approx(-(ROWS - 1) / 2) and metrics["standard_error"] == 0.5
    assert (metrics["draws"], metrics["seed"], metrics["rows"], metrics["seconds"]) == (77, 3, ROWS, 12.34)
    assert metrics["active_units"] == {"z": 2} and metrics["program_options"] == {"latent": 3}
    assert recipe(metrics["resolved_recipe"]) == run.recipe
    assert metrics["versions"]["numpy"] == np.__version__

    with (out / "history.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "1", "loss": "3.5"}, {"step": "2", "loss": "2.25"}]
    held_out = np.loadtxt(out / "held_out.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(held_out[:, 1], -np.arange(ROWS))

    with open_datatree(out / "posterior.nc", engine="h5netcdf") as tree:
        assert dict(tree.posterior["z"].sizes) == {"chain": 1, "draw": 5, "data": ROWS, "z_dim_0": LATENT}
        np.testing.assert_array_equal(tree.observed_data["x"], images.test)
        assert float(tree.sample_stats["log_weight"].min()) == 1.0
        assert tree.attrs["backend"] == "numpyro"


def test_rows_that_are_no_images_have_no_image_pictures(tmp_path: Path) -> None:
    out = write(FakeRun(latent=1), load("linear_gaussian"), tmp_path / "a", posterior_draws=2)
    absent = {"reconstructions.png", "samples.png"}
    assert {entry.name for entry in out.iterdir()} == {*FILES} - absent - {"validation.csv", "hard.csv"}
    assert left_out(out) == [f"{name}: left out, as the rows of the data are no images" for name in sorted(absent)]


def test_validation_messages_and_parameters_are_kept(tmp_path: Path) -> None:
    history = {
        "step": np.arange(4),
        "loss": np.array([9.0, 5.0, 4.0, np.inf]),
        "validation_step": np.array([2, 4]),
        "validation": np.array([6.0, 5.5]),
        "stage": np.array([0, 0, 1, 1]),
    }
    out = write(FakeRun(history=history), load("linear_gaussian"), tmp_path / "a", posterior_draws=2)
    with (out / "validation.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "2", "loss": "6.0"}, {"step": "4", "loss": "5.5"}]
    with (out / "history.csv").open() as file:
        assert [line["stage"] for line in csv.DictReader(file)] == ["0", "0", "1", "1"]
    assert json.loads((out / "metrics.json").read_text())["messages"] == ["estimator: z: pathwise"]
    kept = starting(out)
    assert sorted(kept) == ["decoder.w", "loc"]
    np.testing.assert_array_equal(kept["decoder.w"], np.eye(2)[:, ::-1])
    with pytest.raises(DataError, match=r"nowhere.*give a run folder"):
        starting(tmp_path / "nowhere")


def test_the_loss_of_hard_draws_is_beside_the_relaxed_one(tmp_path: Path) -> None:
    """In the run folder, in its figures, and in a column of a comparison that has such a fit."""
    history = {
        "step": np.arange(4),
        "loss": np.array([9.0, 5.0, 4.0, 3.0]),
        "hard_step": np.array([2, 4]),
        "hard_loss": np.array([9.5, 8.25]),
    }
    out = write(FakeRun(history=history), load("linear_gaussian"), tmp_path / "a", posterior_draws=2)
    with (out / "hard.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "2", "loss": "9.5"}, {"step": "4", "loss": "8.25"}]
    assert json.loads((out / "metrics.json").read_text())["hard_loss"] == 8.25
    plain, relaxed = _metrics("elbo", [-1.0, -3.0]), replace(_metrics("relaxed", [-2.0, -3.5]), hard_loss=8.25)
    lines = [comparison.Line("vae", "pyro", m.recipe, None, (m,), {}) for m in (plain, relaxed)]
    assert [row["hard_loss"] for row in comparison.rows(lines)] == [None, 8.25]
    shown = _text(comparison.table(lines))
    assert "hard loss" in shown and "8.250" in shown and "their objective under hard draws" in shown
    assert "hard loss" not in _text(comparison.table(lines[:1]))


def test_a_fit_without_a_loss_of_every_step_has_no_picture_of_losses(tmp_path: Path) -> None:
    run = FakeRun(history={"step": np.arange(3), "energy": np.ones(3)})
    out = write(run, load("linear_gaussian"), tmp_path / "a", posterior_draws=2)
    assert not (out / "history.png").exists()
    assert "history.png: left out, as the fit has no loss of every step" in left_out(out)


def test_a_fit_with_parameters_of_the_held_out_rows_is_asked_for_its_own(tmp_path: Path, images: Dataset) -> None:
    class OfRows(FakeRun):
        def posterior(self, draws: int, data: np.ndarray | None = None, seed: int = 0) -> Draws:
            assert data is None
            return super().posterior(draws, images.test, seed)

        def log_likelihood(self, data: np.ndarray | None, draws: int = 5000, seed: int = 0) -> SimpleNamespace:
            assert data is None
            return super().log_likelihood(images.test, draws, seed)

        def to_arviz(
            self, draws: int, data: np.ndarray | None = None, seed: int = 0, *, predictive: int | None = None
        ) -> DataTree:
            assert data is None
            return DataTree()

        def predictive(self, draws: int, data: np.ndarray | None = None, seed: int = 0) -> dict[str, np.ndarray]:
            assert data is None
            return super().predictive(draws, images.test, seed)

    out = write(OfRows(row_params=frozenset({"loc"})), images, tmp_path / "a", posterior_draws=2)
    assert list(starting(out)) == ["decoder.w"]
    assert (out / "reconstructions.png").is_file()


def test_sequences_have_no_picture_of_latents_of_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [4, 2, 3]
    chains = replace(
        load("linear_gaussian"), train=sequences([np.zeros((5, 2))]), test=sequences([np.ones((t, 2)) for t in steps])
    )
    run = FakeRun(latent=max(steps))
    monkeypatch.setattr(FakeRun, "to_arviz", lambda *_, **__: DataTree())
    monkeypatch.setattr(FakeRun, "active_units", None)
    out = write(run, chains, tmp_path / "a", posterior_draws=2)
    assert not (out / "latent.png").exists()
    assert "latent.png: left out, as the latent sites have a value for every step" in "".join(left_out(out))
    assert json.loads((out / "metrics.json").read_text())["active_units"] == {}
    # A latent of a whole sequence is shown.
    assert "latent.png" in {f.name for f in write(FakeRun(latent=2), chains, tmp_path / "b").iterdir()}


def test_metrics_that_are_at_hand_are_not_measured_again(tmp_path: Path, rows: Dataset) -> None:
    run = FakeRun()
    metrics = replace(measure(run, rows, draws=9), seconds=1.0)
    del run.asked["log_likelihood"]
    out = write(run, rows, tmp_path / "a", posterior_draws=2, metrics=metrics)
    assert "log_likelihood" not in run.asked
    assert json.loads((out / "metrics.json").read_text())["seconds"] == 1.0


def test_an_earlier_run_is_replaced_and_empty_folders_are_used(tmp_path: Path, rows: Dataset) -> None:
    (tmp_path / "a").mkdir()
    write(FakeRun(), rows, tmp_path / "a", posterior_draws=2)
    write(FakeRun(backend="pyro"), rows, tmp_path / "a", posterior_draws=2)
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["backend"] == "pyro"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_is_no_run_is_not_overwritten(tmp_path: Path, rows: Dataset) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(PplLvmError, match=r"'chapter.tex', which no run wrote"):
        write(FakeRun(), rows, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"

    out = write(FakeRun(), rows, tmp_path / "a", posterior_draws=2)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(PplLvmError, match=r"notes.txt"):
        check_folder(out)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").write_text("{}")
    with pytest.raises(PplLvmError, match="no run folder"):
        check_folder(tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(PplLvmError, match="is a file"):
        check_folder(tmp_path / "file")


def test_a_failure_leaves_the_earlier_run_and_no_rubbish(tmp_path: Path, images: Dataset) -> None:
    write(FakeRun(), images, tmp_path / "a", posterior_draws=2)
    with pytest.raises(RuntimeError, match="out of luck"):
        write(FakeRun(backend="pyro", fail=True), images, tmp_path / "a", posterior_draws=2)
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["backend"] == "numpyro"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_the_earlier_run_comes_back_when_the_new_one_cannot_be_moved_in(
    tmp_path: Path, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(FakeRun(), rows, tmp_path / "a", posterior_draws=2)
    move = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("no space left")
        return move(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no space left"):
        write(FakeRun(backend="pyro"), rows, tmp_path / "a", posterior_draws=2)
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["backend"] == "numpyro"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def _metrics(recipe: str, rows: list[float], units: dict[str, int] | None = None) -> Metrics:
    return Metrics(
        "vae",
        "pyro",
        recipe,
        "digits",
        1,
        5000,
        float(np.mean(rows)),
        0.25,
        np.array(rows),
        units or {"z": 7},
        9.87,
    )


def _text(shown: Table) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_the_difference_is_paired_by_row() -> None:
    first, second = _metrics("elbo", [-10.0, -50.0, -90.0]), _metrics("iwae", [-9.0, -48.0, -87.0])
    found = difference(first, second)
    assert (found.first, found.second, found.backend, found.seed) == ("elbo", "iwae", "pyro", 1)
    assert found.mean == pytest.approx(2.0)
    assert found.standard_error == pytest.approx(1.0 / np.sqrt(3))
    with pytest.raises(DataError, match="3 rows of 'digits' and 1 of 'digits'"):
        difference(first, _metrics("iwae", [0.0]))
    with pytest.raises(DataError, match="'other'"):
        difference(first, replace(second, data="other"))


def test_differences_are_taken_from_the_first_fit_of_a_backend_and_seed() -> None:
    rows = [
        replace(_metrics(recipe, [value, value]), backend=backend, seed=seed)
        for backend in ("pyro", "numpyro")
        for seed in (0, 1)
        for recipe, value in (("elbo", -3.0 - seed), ("iwae", -2.0), ("vis", -5.0))
    ]
    found = [(d.backend, d.seed, d.second, d.mean) for d in differences(rows)]
    assert found[:3] == [("pyro", 0, "iwae", 1.0), ("pyro", 0, "vis", -2.0), ("pyro", 1, "iwae", 2.0)]
    assert len(found) == 8 and {d.first for d in differences(rows)} == {"elbo"}


def test_tables_show_every_figure() -> None:
    elbo, iwae = _metrics("elbo", [-10.0, -11.0]), _metrics("iwae", [-9.0, -9.5], {"z": 7, "y": 2})
    text = _text(table([elbo, iwae]))
    assert "vae on digits" in text and "5,000 importance draws" in text
    line = next(line for line in text.splitlines() if " elbo " in line)
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells == ["pyro", "elbo", "1", "-10.500", "0.250", "7", "9.9"]
    assert "z 7, y 2" in text
    text = _text(difference_table([difference(elbo, iwae)]))
    assert "iwae - elbo" in text and "+1.250" in text and "0.250" in text and "+5.0" in text


def test_values_become_plain_json() -> None:
    given = {
        "options": (1, "a", None),
        "array": np.eye(2),
        "bad": [np.float32(np.nan), np.inf],
        "path": Path("a"),
    }
    assert plain(given) == {
        "options": [1, "a", None],
        "array": [[1, 0], [0, 1]],
        "bad": [None, None],
        "path": "a",
    }


def test_reconstructions_stand_below_their_rows(
    tmp_path: Path, images: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[np.ndarray] = []
    monkeypatch.setattr(pictures, "_mosaic", lambda path, given, dataset, title: lines.extend(given))
    draws = np.stack([images.test[:20] + 1.0, images.test[:20] - 1.0])
    pictures.reconstructions(tmp_path / "a.png", {"y": np.zeros((2, 20, 3)), "x": draws}, images)
    assert [len(line) for line in lines] == [16, 16, 4, 4]
    np.testing.assert_array_equal(lines[0], images.test[:16].reshape(16, 8, 8))
    np.testing.assert_allclose(lines[1], lines[0])


def test_principal_components_keep_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 4)) * [0.1, 5.0, 0.2, 2.0] + 7.0
    scores, names = pictures._principal(points)
    assert abs(np.corrcoef(scores[:, 0], points[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(scores[:, 1], points[:, 3])[0, 1]) > 0.99
    assert names[0].startswith("principal component 1 (8")
