"""Which rows a step takes, and how many steps are taken between two looks at the loss."""

from __future__ import annotations

import time

import numpy as np

FEWEST, MOST = 100, 1000
"""Numbers of rows that a compiled loop is made for, in steps: no fewer, and no more."""
FIRST, SECONDS = 10, 0.5
ENTRIES = 4_000_000
"""Numbers of rows that are handed to a compiled loop at once, beyond the fewest steps."""


def most_steps(rows: int) -> int:
    """Most steps between two looks where each has this many rows, of all restarts together."""
    return min(MOST, max(FEWEST, ENTRIES // max(rows, 1)))


class Order:
    """Rows of every batch `[size]`: each epoch is a permutation that depends on (seed, epoch) alone, without its rest.

    The permutation of the epoch at hand is kept: making it anew would cost more than the steps where rows are many.
    """

    def __init__(self, rows: int, size: int, seed: int) -> None:
        self.rows, self.size, self.seed = rows, size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    def batches(self, first: int, steps: int) -> np.ndarray:
        """Of `steps` steps from step `first` on, `[steps, size]`."""
        per_epoch, found = self.rows // self.size, []
        while steps:
            epoch, batch = divmod(first, per_epoch)
            if epoch != self._epoch:
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
                self._epoch = epoch
            n = min(per_epoch - batch, steps)
            found.append(self._order[batch * self.size : (batch + n) * self.size].reshape(n, self.size))
            first, steps = first + n, steps - n
        return np.concatenate(found)


class Pace:
    """Steps between two looks at the loss: many where steps are short, so that the looks cost little beside them.

    Whatever the clock says, the steps are the same ones; it decides when the progress bar moves, and how late a loss
    that is not finite, a checkpoint that is due and Ctrl-C are seen.
    """

    def __init__(self, most: int = MOST) -> None:
        self.steps, self._most, self._since = min(FIRST, most), most, time.perf_counter()

    def took(self, steps: int) -> None:
        """So many steps since the last look."""
        now = time.perf_counter()
        if steps == self.steps and now - self._since < SECONDS / 2:
            self.steps = min(2 * self.steps, self._most)
        elif now - self._since > SECONDS:
            self.steps = max(self.steps // 2, 1)
        self._since = now
