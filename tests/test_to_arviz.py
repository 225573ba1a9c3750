"""Draws as a DataTree: groups, named dimensions, a round trip through netCDF, what ArviZ makes of it."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_posterior import BACKENDS, COVARIATE, FEATURES, PROGRAMS, ROWS, SX, SZ, X, normal

from ppl_lvm.errors import DataError
from ppl_lvm.to_arviz import to_arviz

if TYPE_CHECKING:
    from xarray import DataTree

DRAWS = 500
Groups = Mapping[str, Mapping[str, np.ndarray]]


def arviz(package: str) -> Any:
    return importlib.import_module(f"arviz_{package}")


# Arrays by group.


def test_dims_are_named_and_groups_without_content_left_out() -> None:
    z, log = np.zeros((4, 6, 2)), np.zeros((4, 6))
    groups: Groups = {
        "posterior": {"z": z, "scale": np.ones(4)},
        "posterior_predictive": {"x": np.zeros((7, 6, 2))},
        "log_likelihood": {"x": log},
        "sample_stats": {"log_p": log.sum(1), "row_log_p": log},
        "observed_data": {"x": np.zeros((6, 2))},
        "prior": {},
    }
    dims = {"z": ("data",), "x": ("data",), "row_log_p": ("data",)}
    tree = to_arviz(groups, dims, "data", {})
    assert set(tree.children) == groups.keys() - {"prior"}
    assert tree.posterior["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert tree.posterior["scale"].dims == ("chain", "draw")
    assert tree.log_likelihood["x"].dims == ("chain", "draw", "data")
    assert tree.observed_data["x"].dims == ("data", "x_dim_0")
    assert tree.posterior_predictive["x"].dims == ("chain", "draw", "data", "x_dim_0")
    assert tree.sample_stats["row_log_p"].dims == ("chain", "draw", "data")
    assert dict(tree.posterior.sizes) == {"chain": 1, "draw": 4, "data": 6, "z_dim_0": 2}
    assert tree.posterior_predictive.sizes["draw"] == 7


def test_names_that_netcdf_cannot_hold_are_changed(tmp_path: Path) -> None:
    from xarray import open_datatree

    log = np.zeros((5, 4))
    groups: Groups = {"posterior": {"enc/z": np.zeros((5, 4, 2))}, "observed_data": {"x": np.zeros(4)}}
    attrs = {"many": 2**70, "estimator": {"z": "dreg"}, "compiled": True, "seed": None, "draws": np.int64(3)}
    tree = to_arviz(groups, {"enc/z": ("x",), "x": ("x",)}, "x", attrs)
    assert tree.posterior["enc.z"].dims == ("chain", "draw", "x_plate", "enc.z_dim_0")
    assert tree.observed_data["x"].dims == ("x_plate",)
    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with open_datatree(tmp_path / "posterior.nc", engine="h5netcdf") as back:
        assert back.identical(tree)
        assert back.attrs["estimator"] == '{"z": "dreg"}' and back.attrs["draws"] == 3
        assert (back.attrs["compiled"], back.attrs["seed"]) == ("true", "null")
    with pytest.raises(DataError, match="not distinct"):
        to_arviz({"posterior": {"a/b": log, "a.b": log}}, {}, "row", {})


def test_arrays_of_different_draws_are_refused() -> None:
    with pytest.raises(DataError, match=r"'sample_stats' need the same number of draws; found \{'a': 3, 'b': 4\}"):
        to_arviz({"sample_stats": {"a": np.zeros(3), "b": np.zeros(4)}}, {}, "row", {})


# Fits.

TREES: dict[tuple[str, str], "DataTree"] = {}


@pytest.fixture(params=BACKENDS)
def tree(request: pytest.FixtureRequest) -> "DataTree":
    """Of a program with a global latent."""
    return made("shared", request.param)


def made(name: str, backend: str) -> "DataTree":
    if (name, backend) not in TREES:
        TREES[name, backend] = PROGRAMS[name](backend).to_arviz(DRAWS, particles=2, predictive=DRAWS, prior=DRAWS)
    return TREES[name, backend]


def test_a_fit_with_globals_has_all_groups(tree: "DataTree") -> None:
    assert set(tree.children) == {
        *("posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood", "sample_stats"),
        "observed_data",
    }
    assert tree.posterior["g"].dims == ("chain", "draw")
    assert tree.posterior["z"].dims == ("chain", "draw", "rows")
    np.testing.assert_array_equal(tree.observed_data["x"], X)
    for name in ("program", "objective", "estimator", "recipe", "backend", "versions", "created_at", "seed"):
        assert tree.attrs[name] is not None
    assert tree.attrs["estimator"] == '{"g": "pathwise", "z": "pathwise"}'
    assert tree.attrs["inference_library"] in ("numpyro", "pyro-ppl")


def test_log_likelihood_has_the_latents_of_rows_summed_out(tree: "DataTree") -> None:
    g = tree.posterior["g"].values[0]
    exact = normal(X, g[:, None], np.hypot(SZ, SX))
    np.testing.assert_allclose(tree.log_likelihood["x"].values[0], exact, rtol=1e-10)
    stats = tree.sample_stats
    # The guide is the exact posterior: log p(g) + sum_n log p(x_n | g) - log q(g) is log p(x) at every draw.
    assert np.ptp(stats["log_weight"].values) < 1e-9
    np.testing.assert_array_equal(stats["log_weight"], stats["log_p"] - stats["log_q"])
    z = tree.posterior["z"].values[0]
    rows = normal(z, g[:, None], SZ) + normal(X, z, SX)
    np.testing.assert_allclose(stats["row_log_p"].values[0], rows, rtol=1e-10)
    np.testing.assert_allclose(stats["row_log_weight"].values[0], exact, rtol=1e-10)


def test_a_fit_without_globals_has_no_log_likelihood_that_loo_could_take() -> None:
    tree = PROGRAMS["scm"]("pyro").to_arviz(DRAWS)
    assert "log_likelihood" not in tree.children
    stats = tree.sample_stats
    for side in ("log_p", "log_q"):
        np.testing.assert_allclose(stats[side], stats[f"row_{side}"].sum("people"), rtol=1e-12)
    assert np.ptp(stats["log_weight"].values) < 1e-9  # the guide is the exact posterior


def test_several_observed_sites_share_one_log_likelihood() -> None:
    from test_posterior import as_fit

    def model(ppl: Any, x: Any, y: Any) -> None:
        unit = ppl.param("unit", 1.0)
        g = ppl.sample("g", ppl.dist.Normal(0.0 * unit, 1.0))
        with ppl.plate("rows", len(x)):
            ppl.sample("x", ppl.dist.Normal(g, unit), obs=x)
            ppl.sample("y", ppl.dist.Normal(-g, unit), obs=y)

    def guide(ppl: Any, x: Any, y: Any) -> None:
        ppl.sample("g", ppl.dist.Normal(ppl.param("loc", 0.1), 1.0))

    y = X[::-1].copy()
    tree = as_fit("pyro", model, guide, ("x", "y"), X, y).to_arviz(DRAWS, predictive=0)
    g = tree.posterior["g"].values[0][:, None]
    np.testing.assert_allclose(tree.log_likelihood["joint"].values[0], normal(X, g, 1.0) + normal(y, -g, 1.0))
    assert tree.log_likelihood["joint"].dims == ("chain", "draw", "rows")


def test_netcdf_gives_back_the_same_tree(tree: "DataTree", tmp_path: Path) -> None:
    from xarray import open_datatree

    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with open_datatree(tmp_path / "posterior.nc", engine="h5netcdf") as back:
        assert back.identical(tree)


def test_arviz_statistics_work(tree: "DataTree") -> None:
    summary = arviz("stats").summary(tree, round_to="none")
    assert len(summary) == ROWS + 1
    assert float(summary.loc["g", "mean"]) == pytest.approx(tree.posterior["g"].values.mean())
    assert arviz("stats").loo(tree).n_data_points == ROWS


@pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_arviz_leaves_rows_out_under_an_approximate_posterior(backend: str) -> None:
    """From the tree alone, as users call it; the estimate is that of the fit itself."""
    run = PROGRAMS["shared_wide"](backend)
    tree = run.to_arviz(DRAWS, particles=50, predictive=0)
    stats = tree.sample_stats
    found = arviz("stats").loo_approximate_posterior(tree, stats["log_p"], stats["log_q"])
    assert found.n_data_points == ROWS
    assert float(found.elpd) == pytest.approx(float(run.loo(DRAWS, particles=50).elpd), rel=1e-10)


def test_arviz_plots_work(tree: "DataTree") -> None:
    plots = arviz("plots")
    for plot, options in (
        (plots.plot_forest, {"var_names": ["g"]}),
        (plots.plot_trace, {"var_names": ["g"]}),
        (plots.plot_ppc_dist, {"num_samples": 5}),
        (plots.plot_dist, {"var_names": ["g"]}),
    ):
        figure = plot(tree, backend="matplotlib", **options)
        assert figure.viz["figure"].item() is not None
    importlib.import_module("matplotlib.pyplot").close("all")


def test_older_arviz_takes_it(tree: "DataTree") -> None:
    arviz = pytest.importorskip("arviz", reason="only the older ArviZ has InferenceData")
    if int(arviz.__version__.split(".")[0]) >= 1:
        pytest.skip("this ArviZ works with the DataTree itself")
    data = arviz.InferenceData.from_datatree(tree)
    assert data.posterior["z"].shape == (1, DRAWS, ROWS)
    assert len(arviz.summary(data, var_names=["g"])) == 1


def test_constant_data_are_what_no_site_observes() -> None:
    tree = made("nested", "pyro")
    np.testing.assert_array_equal(tree.constant_data["size"], COVARIATE)
    np.testing.assert_array_equal(tree.observed_data["x"], FEATURES)
    assert tree.constant_data["size"].dims[0] == "pupils"
