"""Draws as a DataTree: groups, named dimensions, a round trip through netCDF, what ArviZ makes of it."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ppl_lvm.errors import DataError
from ppl_lvm.to_arviz import to_arviz

if TYPE_CHECKING:
    from xarray import DataTree

DRAWS, ROWS, NOISE = 400, 30, 0.5


@dataclass(frozen=True)
class Draws:
    values: Mapping[str, np.ndarray]
    dims: Mapping[str, tuple[str, ...]]
    log_p: np.ndarray
    log_q: np.ndarray
    log_likelihood: Mapping[str, np.ndarray] = field(default_factory=dict)


def _log_normal(x: np.ndarray, mean: np.ndarray | float, sd: float) -> np.ndarray:
    return np.asarray(-0.5 * ((x - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi)))


def _conjugate() -> tuple[Draws, dict[str, np.ndarray]]:
    """x_n ~ Normal(z_n, NOISE) in two columns, z_n ~ Normal(0, 1); the guide is the exact posterior."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 2)) * np.sqrt(1 + NOISE**2)
    mean, sd = x / (1 + NOISE**2), NOISE / np.sqrt(1 + NOISE**2)
    z = mean + sd * rng.normal(size=(DRAWS, ROWS, 2))
    log_likelihood = _log_normal(x, z, NOISE).sum(-1)
    draws = Draws(
        values={"z": z, "scale": rng.gamma(2.0, size=DRAWS)},
        dims={"z": ("data",), "scale": ()},
        log_p=log_likelihood + _log_normal(z, 0.0, 1.0).sum(-1),
        log_q=_log_normal(z, mean, float(sd)).sum(-1),
        log_likelihood={"x": log_likelihood},
    )
    return draws, {"x": x}


@pytest.fixture(scope="module")
def tree() -> "DataTree":
    draws, observed = _conjugate()
    predictive = {"x": np.zeros((7, ROWS, 2))}
    attrs = {
        "objective": "iwae",
        "draws": np.int64(50),
        "estimator": {"z": "dreg"},
        "compiled": True,
        "seed": None,
    }
    return to_arviz(draws, observed, attrs, predictive)


def test_dims_are_named_by_plates(tree: "DataTree") -> None:
    assert tree.posterior["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert tree.posterior["scale"].dims == ("chain", "draw")
    assert tree.log_likelihood["x"].dims == ("chain", "draw", "data")
    assert tree.observed_data["x"].dims == ("data", "x_dim_0")
    assert tree.posterior_predictive["x"].dims == ("chain", "draw", "data", "x_dim_0")
    assert tree.sample_stats["log_p"].dims == ("chain", "draw", "data")
    assert dict(tree.posterior.sizes) == {"chain": 1, "draw": DRAWS, "data": ROWS, "z_dim_0": 2}
    assert tree.posterior_predictive.sizes["draw"] == 7


def test_the_exact_posterior_has_constant_log_weight_per_row(tree: "DataTree") -> None:
    stats = tree.sample_stats
    np.testing.assert_array_equal(stats["log_weight"], stats["log_p"] - stats["log_q"])
    evidence = _log_normal(tree.observed_data["x"].values, 0.0, float(np.sqrt(1 + NOISE**2))).sum(-1)
    np.testing.assert_allclose(stats["log_weight"].values, np.tile(evidence, (1, DRAWS, 1)), rtol=1e-10)


def test_netcdf_gives_back_the_same_tree(tree: "DataTree", tmp_path: Path) -> None:
    from xarray import open_datatree

    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with open_datatree(tmp_path / "posterior.nc", engine="h5netcdf") as back:
        assert back.identical(tree)
        assert back.attrs["objective"] == "iwae" and back.attrs["draws"] == 50
        assert back.attrs["estimator"] == '{"z": "dreg"}'
        assert (back.attrs["compiled"], back.attrs["seed"]) == ("true", "null")


def test_arviz_summary_works(tree: "DataTree") -> None:
    summary = importlib.import_module("arviz_stats").summary(tree, round_to="none")
    assert len(summary) == ROWS * 2 + 1
    assert float(summary.loc["z[3, 1]", "mean"]) == pytest.approx(
        tree.posterior["z"].values[0, :, 3, 1].mean()
    )


def test_arviz_loo_equals_the_exact_leave_one_out_density() -> None:
    """x_n ~ Normal(m, 1), m ~ Normal(0, 1): without row n, x_n is normal around the others' sum / ROWS."""
    rng = np.random.default_rng(1)
    x = rng.normal(0.7, 1.0, size=ROWS)
    m = x.sum() / (ROWS + 1) + rng.normal(size=20_000) / np.sqrt(ROWS + 1)
    log_likelihood = _log_normal(x, m[:, None], 1.0)
    draws = Draws(
        values={"m": m},
        dims={"m": ()},
        log_p=log_likelihood.sum(1) + _log_normal(m, 0.0, 1.0),
        log_q=_log_normal(m, x.sum() / (ROWS + 1), float(1 / np.sqrt(ROWS + 1))),
        log_likelihood={"x": log_likelihood},
    )
    tree = to_arviz(draws, {"x": x}, {})
    assert np.ptp(tree.sample_stats["log_weight"].values) < 1e-10
    loo = importlib.import_module("arviz_stats").loo(tree)
    exact = _log_normal(x, (x.sum() - x) / ROWS, float(np.sqrt(1 + 1 / ROWS))).sum()
    assert loo.n_data_points == ROWS
    assert loo.elpd == pytest.approx(exact, abs=0.03)


def test_groups_without_content_are_left_out() -> None:
    draws, _ = _conjugate()
    tree = to_arviz(replace(draws, log_likelihood={}), {}, {})
    assert set(tree.children) == {"posterior", "sample_stats"}
    assert tree.sample_stats["log_p"].dims == ("chain", "draw", "data")


def test_draws_without_a_data_plate() -> None:
    draws = Draws({"w": np.zeros((5, 3))}, {"w": ()}, np.zeros(5), np.ones(5), {"x": np.zeros((5, 1))})
    tree = to_arviz(draws, {"x": np.zeros(9)}, {})
    assert tree.sample_stats["log_weight"].dims == ("chain", "draw")
    assert tree.posterior["w"].dims == ("chain", "draw", "w_dim_0")
    assert tree.observed_data["x"].sizes == {"x_dim_0": 9}


def test_names_that_netcdf_cannot_hold_are_changed(tmp_path: Path) -> None:
    log = np.zeros((5, 4))
    draws = Draws({"enc/z": np.zeros((5, 4, 2))}, {"enc/z": ("x",)}, log, log, {"x": log})
    tree = to_arviz(draws, {"x": np.zeros(4)}, {"note": "", "many": 2**70, "list": [1, 2]})
    assert tree.posterior["enc.z"].dims == ("chain", "draw", "x_plate", "enc.z_dim_0")
    assert tree.observed_data["x"].dims == ("x_plate",)
    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with pytest.raises(DataError, match="not distinct"):
        to_arviz(replace(draws, values={"a/b": log, "a.b": log}), {}, {})


def test_log_densities_of_different_draws_are_refused() -> None:
    draws, observed = _conjugate()
    with pytest.raises(DataError, match=r"\(400, 30\), log_q has \(400, 29\)"):
        to_arviz(replace(draws, log_q=draws.log_q[:, 1:]), observed, {})
