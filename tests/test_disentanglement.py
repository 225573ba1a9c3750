"""Scores of codes whose factors are known: their closed forms on codes that are made from them."""

import numpy as np
import pytest

from ppl_lvm.datasets import load
from ppl_lvm.disentanglement import mig, sap
from ppl_lvm.errors import DataError


def grid(*sizes: int) -> np.ndarray:
    return np.indices(sizes).reshape(len(sizes), -1)


def test_the_gap_of_codes_that_are_the_factors() -> None:
    v, w = grid(4, 5)
    assert mig(np.stack([v, w], 1), {"v": v, "w": w}) == pytest.approx(1.0)
    assert mig(np.stack([v, v], 1), {"v": v}) == pytest.approx(0.0)
    # The second element knows whether v is 0 or 1 against 2 or 3: half of log 4.
    assert mig(np.stack([v, v // 2], 1), {"v": v}) == pytest.approx(0.5)
    # Factors that are not told at all count zero.
    assert mig(np.stack([v, 0 * v], 1), {"v": v, "w": w}) == pytest.approx(0.5)
    assert mig(np.stack([-3.0 * v + 1.0, 1e-3 * w], 1), {"v": v, "w": w}) == pytest.approx(1.0)


def test_the_gap_of_real_factors_is_of_bins_with_equally_many_rows() -> None:
    v = np.arange(1000) / 10.0
    # The code's ten bins of equal width are the factor's.
    assert mig(np.stack([v, 0 * v], 1), {"v": v}, bins=10) == pytest.approx(1.0)
    assert mig(np.stack([v, 0 * v], 1), {"v": np.exp(v)}, bins=10) == pytest.approx(1.0)


def test_separated_predictability() -> None:
    v, w = grid(4, 5)
    real = {"v": v.astype(float), "w": w.astype(float)}
    assert sap(np.stack([v, w], 1), real) == pytest.approx(1.0)
    assert sap(np.stack([v, v], 1), {"v": v.astype(float)}) == pytest.approx(0.0)
    # R^2 of v + w for v is Var v / (Var v + Var w).
    both = v + w
    expected = v.var() / (v.var() + w.var())
    assert sap(np.stack([both, 0 * both], 1), {"v": v.astype(float)}) == pytest.approx(expected)
    # Two classes that an element tells, and one that is the same for all rows: chance.
    assert sap(np.stack([v // 2, 0 * v], 1), {"v": v // 2}) == pytest.approx(0.5)


def test_sprites_come_with_the_factors_of_both_splits() -> None:
    data = load("sprites")
    assert data.train_factors is not None and data.test_factors is not None
    for name in ("shape", "scale", "orientation", "x", "y"):
        assert len(data.train_factors[name]) == len(data.train) and len(data.test_factors[name]) == len(data.test)
    codes = np.stack([data.test_factors[n] for n in ("x", "y")], 1)
    assert mig(codes, {n: data.test_factors[n] for n in ("x", "y")}) > 0.6
    # Rows of an image count downwards, and y points upwards.
    height = data.test.reshape(-1, 16, 16).sum(2) @ -np.arange(16) / data.test.sum(1)
    assert np.corrcoef(height, data.test_factors["y"])[0, 1] > 0.95


def test_what_cannot_be_scored_says_so() -> None:
    v, w = grid(4, 5)
    for score in (mig, sap):
        with pytest.raises(DataError, match=r"codes have shape \(20, 1\)"):
            score(v[:, None], {"v": v})
        with pytest.raises(DataError, match="'v' has shape"):
            score(np.stack([v, w], 1), {"v": v[:-1]})
        with pytest.raises(DataError, match="'v' is the same in all rows"):
            score(np.stack([v, w], 1), {"v": 0 * v})
        with pytest.raises(DataError, match="no factors"):
            score(np.stack([v, w], 1), {})
        with pytest.raises(DataError, match="not finite"):
            score(np.stack([v / 1.0, w + np.nan], 1), {"v": v})
