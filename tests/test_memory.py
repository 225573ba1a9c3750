"""Memory: cut to a limit, halved where it runs out, told before a fit begins; draws that are written to a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from ppl_lvm import Fit, backends, fit, memory, program
from ppl_lvm.backends.structure import Plan
from ppl_lvm.errors import DataError, TooLargeError
from ppl_lvm.fitted import Fitted

BACKENDS = ("pyro", "numpyro")
on_both = pytest.mark.parametrize("backend", BACKENDS)
X = np.random.default_rng(0).normal(size=(12, 3))
MADE: dict[str, Fit] = {}


def made(backend: str) -> Fit:
    """One fit of each backend. Its guide is the exact posterior, so every weight is p(x)."""
    if backend not in MADE:
        pca = program("probabilistic_pca", latent=1)
        MADE[backend] = fit(pca, data=X, backend=backend, steps=1, dtype="float64")
    MADE[backend].messages.clear()
    return MADE[backend]


def run_out(backend: str, device: str = "cpu") -> Exception:
    """What a backend raises where memory runs out: as it words it itself, and as it does for a device of its own."""
    import jax
    import torch

    if device == "gpu":
        of_torch = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        of_jax = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2000000 bytes.")
        return of_torch if backend == "pyro" else of_jax
    if backend == "pyro":
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**55)
    else:
        import jax.numpy as jnp

        with pytest.raises(RuntimeError) as caught:
            jnp.zeros(2**45).block_until_ready()
    return caught.value


class Small:
    """Stands before a method of a bound and lets it have so many draws of rows at once, no more."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, run: Fit, method: str, most: int, device: str = "cpu"
    ) -> None:
        self.tried: list[int] = []
        error, kind = run_out(run.backend, device), type(run._bound)
        before = getattr(kind, method)

        def called(bound: Any, params: Any, batch: Any, key: Any, plan: Any, *rest: Any) -> Any:
            draws = plan.K * plan.M if isinstance(plan, Plan) else plan
            self.tried.append(draws * bound.structure.rows)
            if self.tried[-1] > most:
                raise error
            return before(bound, params, batch, key, plan, *rest)

        monkeypatch.setattr(kind, method, called)


# Sizes.


def test_sizes_are_read_and_said() -> None:
    assert [memory.parsed(t) for t in ("1000", "2KB", "1.5 mb", "3G")] == [1000, 2000, 1_500_000, 3 * 10**9]
    assert memory.said(1.5e9) == "1.5 GB"
    for text in ("", "much", "-1", "0", "3 GiB", "1e3"):
        with pytest.raises(DataError, match=r"PPL_LVM_MEMORY is .*'4GB'"):
            memory.parsed(text)


def test_the_limit_is_the_machine_s_or_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PPL_LVM_MEMORY", raising=False)
    assert memory.limit() == memory.machine() // 4 > 2**20
    assert memory.limit(device=8000) == 2000
    monkeypatch.setenv("PPL_LVM_MEMORY", "5MB")
    assert memory.limit() == memory.limit(device=8000) == 5_000_000


@on_both
def test_what_shapes_say_is_what_the_arrays_are(backend: str) -> None:
    """A sum of squares of a square matrix: its square is alive beside what was made of it."""
    library = __import__(f"ppl_lvm.backends._{'torch' if backend == 'pyro' else 'jax'}_memory", fromlist=["peak"])
    xp = __import__("torch" if backend == "pyro" else "jax.numpy", fromlist=["ones"])

    def f(a: Any) -> Any:
        squares = a * a
        shifted = squares + 1.0
        return (squares * shifted).sum()

    ones = xp.ones((100, 100))
    assert 3 * 40_000 <= library.peak(f, ones) <= 3 * 40_000 + 100
    assert library.peak(lambda a: (a * a).sum(), ones) <= 40_100


# Evaluation.


@on_both
def test_a_small_limit_cuts_the_draws(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(backend)
    monkeypatch.setenv("PPL_LVM_MEMORY", "100KB")
    seen = Small(monkeypatch, run, "evaluate", 10**9)
    found = run.posterior(4000).values["z"]
    assert found.shape == (4000, 12, 1) and len(np.unique(found)) == found.size
    fitted: Fitted = run._fitted
    assert max(seen.tried) * fitted.weight <= 100_000
    assert max(seen.tried) * fitted.weight > 50_000  # as large as the limit lets them be
    assert run.messages == []


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@on_both
def test_memory_that_runs_out_halves_the_draws(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(backend)
    whole = run.log_likelihood(draws=100)
    seen = Small(monkeypatch, run, "log_w", 12 * 30, device)
    found = run.log_likelihood(draws=100)
    np.testing.assert_allclose(found.values, whole.values, rtol=0.2)
    assert [n // 12 for n in seen.tried] == [100, 50, 25, 25, 25, 25]
    assert run.messages == ["memory: 50 draws of 12 rows at once did not fit, and went on with 25; their noise is "
                            "another one than where they fit"]


@on_both
def test_memory_that_runs_out_halves_the_rows_of_a_draw(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(backend)
    seen = Small(monkeypatch, run, "evaluate", 3)
    found = run.posterior(2)
    assert found.values["z"].shape == (2, 12, 1)
    assert len(np.unique(found.values["z"])) == 24 and np.isfinite(found.log_p).all()
    assert seen.tried == [24, 12, 12, 6, 6, 3, 3, 6, 3, 3, 6, 3, 3, 6, 3, 3]
    assert len(run.messages) == 1
    moments = run.encode(draws=50)
    assert moments.mean["z"].shape == moments.sd["z"].shape == (12, 1)


@on_both
def test_what_fits_in_no_way_is_an_error_of_ours(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(backend)
    Small(monkeypatch, run, "simulate", 0)
    with pytest.raises(TooLargeError, match="1 draws of 1 rows at once do not fit in memory"):
        run.predictive(5)


@on_both
def test_other_errors_are_passed_on_as_they_are(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(backend)

    def wrong(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(type(run._bound), "evaluate", wrong)
    with pytest.raises(RuntimeError, match="something else"):
        run.posterior(2)


def test_a_result_that_no_machine_holds_is_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made("numpyro")
    with pytest.raises(TooLargeError, match=r"of values, and there are .* draws would fit, or write_posterior"):
        run.posterior(10**12)


# Training.


@on_both
def test_a_step_that_cannot_fit_is_refused_before_it_starts(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"data": X, "backend": backend, "steps": 1, "recipe": "iwae", "compile": "eager"}
    with pytest.raises(TooLargeError, match=r"draws of 6 rows takes up to .* draws = \d+ or batch_size = \d+ or chunk"):
        fit("probabilistic_pca", **options, draws=10**8, batch_size=6)


def test_what_an_error_says_would_fit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"data": X, "backend": "pyro", "steps": 1, "recipe": "iwae", "compile": "eager"}
    monkeypatch.setattr(memory, "machine", lambda: 1_000_000)
    with pytest.raises(TooLargeError) as caught:
        fit("probabilistic_pca", **options, draws=50_000, batch_size=6)
    draws = int(str(caught.value).split("draws = ")[1].split()[0])
    run = fit("probabilistic_pca", **options, draws=draws, batch_size=6)
    assert draws > 20
    assert not any("memory" in message for message in run.messages)


def test_a_step_that_may_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine", lambda: 100_000)
    options: dict[str, Any] = {"data": X, "backend": "numpyro", "steps": 1, "recipe": "iwae", "draws": 500}
    run = fit("probabilistic_pca", **options, batch_size=6)
    assert any(m.startswith("memory: a step with 500 draws of 6 rows takes up to") for m in run.messages)


@on_both
def test_memory_that_runs_out_in_training_is_an_error_of_ours(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, trainer = run_out(backend), backends.load(backend).Trainer

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "run", full)
    with pytest.raises(TooLargeError, match=r"A step of 1 draws of 12 rows does not fit in memory .*fewer draws"):
        fit("probabilistic_pca", data=X, backend=backend, steps=1, compile="eager")


# Files.


class Rows:
    """Batches of rows that are made as they are asked for."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[np.ndarray]:
        first = 0
        for size in self.sizes:
            yield X[first : first + size]
            first += size


@on_both
def test_a_written_posterior_is_that_in_memory(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = made(backend)
    for n in ("fitted", "posterior"):
        monkeypatch.setattr(f"ppl_lvm.{n}.ENTRIES", 16 * 3 * 5)  # blocks of five rows
    found = run.posterior(40)
    tree: Any = xarray.open_datatree(run.write_posterior(tmp_path / "a.nc", 40))
    z = tree["posterior"]["z"]
    assert z.dims == ("chain", "draw", "data", "z_dim_0")
    np.testing.assert_array_equal(z.values[0], found.values["z"])
    assert tree["posterior"]["data"].values.tolist() == list(range(12))
    stats = tree["sample_stats"]
    np.testing.assert_array_equal(stats["row_log_p"].values[0], found.log_p)
    np.testing.assert_array_equal(stats["row_log_weight"].values[0], found.log_p - found.log_q)
    np.testing.assert_allclose(stats["log_weight"].values[0], found.log_weight, rtol=1e-12)
    assert tree.attrs["backend"] == backend
    assert {p.name for p in tmp_path.iterdir()} == {"a.nc"}
    wanted = run.to_arviz(40, predictive=0)
    assert tree["posterior"]["z"].dims == wanted["posterior"]["z"].dims
    assert wanted["sample_stats"].data_vars.keys() == stats.data_vars.keys()


def test_batches_are_written_one_after_the_other(tmp_path: Path) -> None:
    run = made("pyro")
    tree: Any = xarray.open_datatree(run.write_posterior(tmp_path / "a.nc", 500, Rows([5, 5, 2])))
    z, exact = tree["posterior"]["z"].values[0], run.posterior(500).values["z"]
    assert z.shape == (500, 12, 1) and len(np.unique(z)) == z.size
    np.testing.assert_allclose(z.mean(0), exact.mean(0), atol=5 * exact.std() * (2 / 500) ** 0.5)
    assert tree["sample_stats"]["row_log_p"].shape == (1, 500, 12)
    assert np.isfinite(tree["sample_stats"]["log_weight"].values).all()


def test_a_file_that_cannot_be_written_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, path = made("pyro"), tmp_path / "a.nc"
    with pytest.raises(DataError, match="cannot be written"):
        run.write_posterior(tmp_path / "no" / "a.nc", 2)
    before = run.write_posterior(path, 2).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ppl_lvm.sinks.NetCDF.put", full)
    with pytest.raises(DataError, match=r"could not be written to its end .*No space left"):
        run.write_posterior(path, 2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nc"]
