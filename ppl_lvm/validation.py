"""Rows that a fit does not train on, and the objective on them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ppl_lvm import memory
from ppl_lvm.algorithm import Schedule, Turn
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.structure import Plan
from ppl_lvm.errors import DataError

SPLIT, NOISE = 0x5EED, 0x0B5E
"""What sets these streams of random numbers apart from those of the order of rows, at the same seed."""


def split(call: Call, rows: int | None, validation: object, seed: int) -> tuple[Call, Call | None]:
    """Training and held-out data; a fraction takes rows from the end of a permutation that depends on the seed.

    Raises:
        DataError: the fraction is not between 0 and 1 or leaves no rows on a side, or rows of other data have
            another shape.
    """
    if validation is None:
        return call, None
    if isinstance(validation, bool) or not isinstance(validation, int | float | np.number):
        held_out = Call.of(validation)
        shapes, found = [_row_shapes(c) for c in (call, held_out)]
        if shapes != found:
            raise DataError(f"Rows of the validation data have shapes {found}, those of the data {shapes}.")
        return call, held_out
    if not 0.0 < validation < 1.0:
        raise DataError(
            f"validation = {validation} is no fraction of the rows; give one between 0 and 1, other data, or None."
        )
    if rows is None:
        raise DataError(f"validation = {validation}, but the program has no data to take rows from.")
    taken = round(rows * float(validation))
    if not 0 < taken < rows:
        raise DataError(
            f"validation = {validation} of {rows} rows is {taken}, which leaves none to "
            f"{'validate' if taken == 0 else 'train'} on."
        )
    order = np.random.default_rng([seed, SPLIT]).permutation(rows)
    kept, held = np.sort(order[: rows - taken]), np.sort(order[rows - taken :])
    return call.map(lambda a: a[kept]), call.map(lambda a: a[held])


def at_least(call: Call, example: Call) -> Call:
    """Rows repeated where there are fewer than in the example, whose shape checks of support have."""
    size = max((len(a) for a in example.leaves), default=0)
    return call.map(lambda a: a if len(a) >= size else np.resize(np.asarray(a), (size, *np.shape(a)[1:])))


def _row_shapes(call: Call) -> list[tuple[int, ...]]:
    return [np.shape(a)[1:] for a in call.leaves]


LOOKED = 1000
"""Rows of the training data, at least, that are looked at where there are as many."""


class HeldOut:
    """The objective's loss per row on held-out rows, with the same noise and final schedules at every look.

    Rows are taken in blocks of the training batch, for which the program is bound already, and what is left over.
    A schedule is at its end: what is compared is parameters, not schedules. `training` rows instead are those that the
    fit has in its first batches, or all that the program takes at once.
    """

    def __init__(
        self, library: Any, chosen: Any, call: Call, bound: Any, rows: int | None, seed: int, training: bool = False
    ) -> None:
        structure = bound.structure
        if training:
            self._of_training(library, call, bound, rows, seed)
            return
        if structure.plate_size is not None:
            raise DataError(
                f"The program subsamples plate {structure.data_plate!r} itself, so there is no loss on rows that are "
                f"held out; size the plate by its data (len(x)) and let batch_size choose the rows."
            )
        self._library = library
        self._rows = None if structure.data_plate is None else rows

        self.blocks: list[tuple[Any, Call, Any, float]] = []
        held_out = len(call.leaves[0]) if call.leaves else 0
        self.size = held_out
        size = structure.rows if structure.data_plate is not None else held_out
        for i, first in enumerate(range(0, held_out, max(size, 1))):
            block = call.map(operator.itemgetter(slice(first, first + size)))
            n = min(size, held_out - first)
            own = bound if n == size and structure.data_plate is not None else bound.on(block)
            key = library.key_of(int(np.random.SeedSequence([seed, NOISE, i]).generate_state(1)[0]))
            self.blocks.append((own, own.batch(block), key, n / held_out))
        if not self.blocks:
            raise DataError("The validation data have no rows.")

    def _of_training(self, library: Any, call: Call, bound: Any, rows: int | None, seed: int) -> None:
        structure, size = bound.structure, bound.structure.rows
        held = len(call.leaves[0]) if call.leaves else 0
        self._library, self._rows = library, rows
        if structure.data_plate is None or structure.plate_size is not None:
            self._rows, parts = structure.plate_size, [call]
        else:
            count = min(max(held // size, 1), -(-LOOKED // size))
            parts = [call.map(operator.itemgetter(slice(i * size, (i + 1) * size))) for i in range(count)]
        self.size = len(parts) * size
        keys = [
            library.key_of(int(np.random.SeedSequence([seed, NOISE, i]).generate_state(1)[0]))
            for i in range(len(parts))
        ]
        self.blocks = [(bound, bound.batch(p), key, 1.0 / len(parts)) for p, key in zip(parts, keys, strict=True)]

    def look(
        self, trainer: Any, numbers: Mapping[str, float | Schedule | Turn], plan: Plan | None = None
    ) -> Callable[[Any], np.ndarray]:
        """A function of the trainer's tree: the loss `[R]` in nats per row, under another plan than the fit's too."""
        final = {n: v.end if isinstance(v, Schedule | Turn) else v for n, v in numbers.items()}

        def loss(tree: Any) -> np.ndarray:
            with memory.told(self._library, f"The loss of {self.size:,} rows that are looked at", memory.SMALLER):
                parts = [
                    (trainer.loss(tree, bound, batch, key, final, self._rows, plan), share)
                    for bound, batch, key, share in self.blocks
                ]
                to_numpy = self._library.to_numpy
                return np.sum([to_numpy(x).astype(np.float64) * share for x, share in parts], axis=0)

        return loss
