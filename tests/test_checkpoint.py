"""Checkpoints: whatever ends a fit, and wherever, the same call goes on to the same bits."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import BERNOULLI, ROWS

from ppl_lvm import Fit, checkpoint, errors, fit, interrupts, store
from ppl_lvm.checkpoint import Checkpoint
from ppl_lvm.errors import DataError, Interrupted, RecipeError, StorageError
from ppl_lvm.monitor import EarlyStopping, Moment, Run
from ppl_lvm.pace import Pace
from ppl_lvm.program import Program

BACKENDS = ("pyro", "numpyro")
on_both = pytest.mark.parametrize("backend", BACKENDS)
X = ROWS.data["x"]
TOY = Program("rows", ROWS.model, ROWS.guide, portable=True, arguments=("x",))


class Ended(Exception):
    """Stands for what ends a process."""


def run(backend: str, **options: Any) -> Fit:
    settings: dict[str, Any] = {"recipe": "elbo", "dtype": "float64", "seed": 3}
    settings |= {} if isinstance(options.get("recipe"), dict) and "stages" in options["recipe"] else SHORT
    settings["compile"] = "eager" if backend == "pyro" else "compiled"
    return fit(options.pop("program", TOY), data=options.pop("data", X), backend=backend, **(settings | options))


def ended(writes: int, backend: str, folder: Path, **options: Any) -> None:
    """A fit that ends where it would write one checkpoint more than so many."""
    left, write = [writes], store.write

    def end(*args: Any) -> None:
        if not left[0]:
            raise Ended
        left[0] -= 1
        write(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Ended):
        patch.setattr(store, "write", end)
        run(backend, checkpoint=folder, **options)


def assert_same(whole: Fit, other: Fit) -> None:
    """State, parameters, history and messages, to the bit."""
    assert whole.state.described == other.state.described
    for found, expected in ((other.state.arrays, whole.state.arrays), (other.history, whole.history)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            assert np.asarray(found[name]).dtype == np.asarray(value).dtype, name
    assert other.params.keys() == whole.params.keys()
    for name, value in whole.params.items():
        np.testing.assert_array_equal(other.params[name], value, err_msg=name)
    assert [m for m in other.messages if "checkpoint: " not in m] == whole.messages
    assert whole.recipe == other.recipe


# Whatever a fit holds between two steps.

ADAM = {"name": "adam", "learning_rate": 0.3, "clip": 0.5}
WARM = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 9}
SHORT = {"steps": 12, "batch_size": 5}
STAGES = [{"steps": 7, "freeze": ["guide"]}, {"learning_rate": 0.1, "steps": 6}]
COINS = Program("coins", BERNOULLI.model, BERNOULLI.guide, portable=True, arguments=("x",))

CASES: dict[str, dict[str, Any]] = {
    "early stopping, restarts": {
        **{"validation": 0.25, "check_every": 2, "patience": 2, "restarts": 3},
        **{"learning_rate": 0.6, "steps": 16},
    },
    "optimisers, turns, a learned baseline": {
        "optimizer": {"*": ADAM, "model": {"name": "adamw", "weight_decay": WARM}},
        "freeze": ["q_z_gain"],
        "estimator": {"name": "score", "baseline": "linear"},
        "alternate": {"guide": 2, "model": 3},
    },
    "multipliers": {"recipe": {"objective": {"name": "capacitron", "capacity": {"z": 0.1}}}, "objective.draws": 2},
    "stages": {"recipe": {"objective": "elbo", "batch_size": 5, "stages": STAGES}},
    "a moving average": {"estimator": {"name": "score", "baseline": "moving_average"}, "batch_size": None},
    "relaxed draws": {
        **{"program": COINS, "data": BERNOULLI.data["x"], "batch_size": None, "check_every": 2},
        "estimator": "gumbel_softmax",
    },
}
LONG = {("a moving average", "numpyro"), ("relaxed draws", "numpyro")}
EACH = [
    pytest.param(name, backend, marks=[pytest.mark.slow] if (name, backend) in LONG else [])
    for name in CASES
    for backend in BACKENDS
]


@pytest.mark.parametrize(("name", "backend"), EACH)
def test_a_fit_that_was_ended_goes_on_to_the_same_bits(name: str, backend: str, tmp_path: Path) -> None:
    """Ended twice, between checks, epochs, turns and stages; the last time there is nothing left to do."""
    options = CASES[name]
    whole = run(backend, **options)
    if "restarts" in options:
        assert any("early stopping: kept the parameters" in m for m in whole.messages), whole.messages
    for _ in range(2):
        ended(2, backend, tmp_path, every=3, **options)
    found = run(backend, checkpoint=tmp_path, **options)
    assert any("checkpoint: went on from step" in m for m in found.messages), found.messages
    assert_same(whole, found)
    assert_same(whole, run(backend, checkpoint=tmp_path, **options))
    assert {p.name for p in tmp_path.iterdir()} == {*checkpoint.PLACES}


def test_all_that_a_run_records_is_kept() -> None:
    """Every field: one that is added has to be packed as well."""
    records = {"loss": [np.array([3.0, np.nan]), np.array([1.5])], "gradient_norm": [np.array([0.1, 0.2, np.inf])]}
    state = {"params/w": np.arange(3.0), "count": np.array(7)}
    early = EarlyStopping(3, 0.1, 1.25, 4, 2, state)
    kept = Run(early, records, [(4, 1.25), (6, np.nan)], [(6, -2.0)], 1, (6, state))
    unset = {f.name for f in dataclasses.fields(Run) if getattr(kept, f.name) == getattr(Run(None), f.name)}
    assert unset == set(), "this test sets every field to something of its own"
    stopping, other = EarlyStopping(3, 0.1), Run(None)
    stopping.unpack(early.pack())
    other.unpack(kept.pack())
    np.testing.assert_equal(dataclasses.asdict(stopping), dataclasses.asdict(early))
    found, expected = (dataclasses.asdict(dataclasses.replace(r, early=None)) for r in (other, kept))
    for table in (found, expected):
        table["records"] = {name: np.concatenate(parts) for name, parts in table["records"].items()}
    np.testing.assert_equal(found, expected)
    empty = Run(None)
    empty.unpack(Run(None).pack())
    assert empty == Run(None)


class Loader:
    """Batches in an order that is drawn anew in every epoch, as a DataLoader with a generator draws it."""

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        self._rows, self._rng = rows, np.random.default_rng(seed)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = self._rng.permutation(len(self._rows))
        return (self._rows[order[i : i + 6]] for i in range(0, 20, 6))


@on_both
def test_batches_go_on_in_their_order_or_not_at_all(backend: str, tmp_path: Path) -> None:
    """Three batches of six and a shorter one an epoch; the order is the source's, and is drawn again from its seed."""
    options: dict[str, Any] = {"batch_size": 6, "steps": 10}
    whole = run(backend, data=Loader(X, 5), **options)
    ended(2, backend, tmp_path, data=Loader(X, 5), every=5, **options)
    assert_same(whole, run(backend, data=Loader(X, 5), checkpoint=tmp_path, **options))
    for other in (Loader(X, 6), Loader(X + 1e-9, 5)):
        with pytest.raises(DataError, match="10 batches before the checkpoint hold other rows, or rows in another"):
            run(backend, data=other, checkpoint=tmp_path, **(options | {"steps": 20}))
    with pytest.raises(StorageError, match=r"data\.rows was 20 and is 19"):
        run(backend, data=Loader(X[:19], 5), checkpoint=tmp_path, **options)
