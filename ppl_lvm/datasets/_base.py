"""What a data set is, and how rows are held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

TEST_FRACTION = 0.2


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to fit and rows held out: `train` and `test` are float64 arrays [rows, ...], rows first.

    Sequences of several lengths are arrays [rows] of objects, each an array [T, ...]; `fit` takes them as they are.
    `train_labels` and `test_labels` are integer arrays [rows] or None; no program sees them, they only colour
    pictures. `image_shape` is (height, width) when a row is a flattened grey-level image. `valid` are rows of a split
    that comes with them, or None. Of generated data, `train_factors` and `test_factors` are what each row was made
    from, by name, and `parameters` what all rows were.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None
    test_labels: np.ndarray | None
    image_shape: tuple[int, int] | None
    description: str
    licence: str
    valid: np.ndarray | None = None
    train_factors: Mapping[str, np.ndarray] | None = None
    test_factors: Mapping[str, np.ndarray] | None = None
    parameters: Mapping[str, np.ndarray] | None = None

    @property
    def ragged(self) -> bool:
        """Whether rows are sequences of several lengths."""
        return self.train.dtype == object


def split(
    name: str,
    rows: np.ndarray,
    labels: np.ndarray | None,
    seed: int,
    *,
    factors: Mapping[str, np.ndarray] | None = None,
    **described: Any,
) -> Dataset:
    """A fifth of the rows held out, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = int(np.ceil(TEST_FRACTION * len(rows)))
    train, test = order[held_out:], order[:held_out]
    return Dataset(
        name=name,
        train=rows[train],
        test=rows[test],
        train_labels=None if labels is None else labels[train],
        test_labels=None if labels is None else labels[test],
        train_factors=None if factors is None else {n: a[train] for n, a in factors.items()},
        test_factors=None if factors is None else {n: a[test] for n, a in factors.items()},
        **{"image_shape": None, **described},
    )


def sequences(given: Any) -> np.ndarray:
    """An array [rows] of objects from sequences [T, ...]."""
    found = np.empty(len(given), dtype=object)
    for i, sequence in enumerate(given):
        found[i] = np.asarray(sequence, dtype=np.float64)
    return found
