"""Steps whose loss or gradient is not finite: which site, under which parameters of its distribution, at which rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ppl_lvm.algorithm import Schedule, Turn
from ppl_lvm.backends.sites import innermost
from ppl_lvm.backends.training import SKIPPED, Again
from ppl_lvm.errors import NonFiniteError
from ppl_lvm.monitor import Run, Watch

SIDES = {"log_p": "model", "log_q": "guide"}
SHOWN = 5
"""Rows that a message names; the error has all."""

ADVICE = (
    "Lower the learning rate, or bound the scales of these sites; a covariance that is singular gives NaN, a small "
    "multiple of the identity added to it does not."
)


@dataclass(frozen=True)
class Guilty:
    """A density that is not finite."""

    site: str
    density: str
    """ "log_p" or "log_q"."""
    rows: tuple[int, ...]
    """Numbers of the rows of the training data where it is not, those of the batch where the data came in batches;
    empty for a site that all rows share."""
    parameters: Mapping[str, str]
    """Parameters of its distribution at the first draw where it is not, at those rows, by name: number or range."""
    value: str
    """The site's value there."""

    def __str__(self) -> str:
        where = f" at {_listed(self.rows)}" if self.rows else ""
        given = "".join(f", {name} {said}" for name, said in self.parameters.items())
        return f"{self.site!r} ({self.density}){where}: value {self.value}{given}"


@dataclass(frozen=True)
class Cause:
    """What a step that is not finite shows when it is run again."""

    guilty: tuple[Guilty, ...] = ()
    gradients: tuple[str, ...] = ()
    """Parameters whose gradient is not finite."""
    rows: tuple[int, ...] = ()
    """Rows of the guilty sites; where only the gradient is not finite, rows that alone make it so."""

    def __str__(self) -> str:
        if self.guilty:
            return "Not finite there: " + "; ".join(map(str, self.guilty)) + "."
        if self.gradients:
            where = f" It is so for {_listed(self.rows)} alone." if self.rows else ""
            return (
                f"All densities are finite there, and the gradient of parameters {_some(self.gradients)} is not.{where}"
            )
        return "Run again outside of the compiled loop, the step is finite: it was at the edge of the number format."


@dataclass
class Inquiry:
    """Looks into steps of a fit. `Trainer.again` and `Bound.distributions` do the work."""

    trainer: Any
    bound: Any
    to_numpy: Callable[[Any], Any]
    numbers: Mapping[str, float | Schedule | Turn]
    batches: bool = False
    """The data come in batches, whose rows have no other numbers than their places in it."""

    def report(
        self,
        watch: Watch,
        tree: Any,
        first: int,
        n: int,
        held: Any,
        index: np.ndarray | None,
        state: Callable[[int, int], Any],
    ) -> None:
        """Tells of steps `first .. first + n - 1`: in the watch's messages where a run skipped its first step.

        `state(step, run)` is the state to go on from.

        Raises:
            NonFiniteError: no run is left that could go on.
        """
        if watch.lost is not None:
            run = watch.runs[watch.lost]
            assert run.diverged is not None
            raise self._error(run, watch.lost, tree, first, held, index, state)
        for r, run in enumerate(watch.runs):
            if run.diverged is None and run.skipped and not run.told:
                run.told, step = True, run.skipped[0]
                cause = self._cause(tree, r, step, step - first, held, index)
                watch.messages.append(
                    f"on_nonfinite: skipped step {step}, where {run.said(step)}. With the parameters of step "
                    f"{first + n}: {cause}"
                )

    def _error(
        self,
        run: Run,
        r: int,
        tree: Any,
        first: int,
        held: Any,
        index: np.ndarray | None,
        state: Callable[[int, int], Any],
    ) -> NonFiniteError:
        assert run.diverged is not None
        step = run.diverged - run.most_skipped
        at = max(step, first)
        cause = self._cause(tree, r, at, at - first, held, index)
        said = f"At step {step}, {run.said(step)}."
        if run.most_skipped:
            said += f" So it was in every step to {run.diverged}, one more than most_skipped = {run.most_skipped}."
        before = state(step, r)
        return NonFiniteError(
            f"{said} {cause} {ADVICE} error.state is the run before that step: fit(..., state=error.state) goes on "
            f"from there, with on_nonfinite='skip' past it.",
            step=step,
            state=replace(before, arrays={**before.arrays, SKIPPED: np.zeros_like(before.arrays[SKIPPED])}),
            cause=cause,
        )

    def _cause(self, tree: Any, r: int, step: int, i: int, held: Any, index: np.ndarray | None) -> Cause:
        """Of step `step`, whose rows are at `i`, at these parameters."""
        rows = None if index is None else index[r, i]
        return self.cause(tree, r, step, held, rows, None if rows is None or not self.batches else np.arange(len(rows)))

    def cause(
        self, tree: Any, run: int, step: int, held: Any, rows: np.ndarray | None, names: np.ndarray | None = None
    ) -> Cause:
        """Of a step at these parameters; `rows` are its rows among `held`, None for all, and `names` their numbers."""
        if names is None:
            names = rows
        index = None if rows is None else np.stack([rows[None]] * (run + 1))

        def again(index: np.ndarray | None) -> Again:
            found: Again = self.trainer.again(tree, held, index, self._at(step), step, 0, run)
            return found

        found = again(index)
        params = self.trainer.params(tree, run)
        guilty = tuple(
            self._guilty(found, name, label, params, names)
            for name, row in found.table.items()
            for label in SIDES
            if row[label] is not None and not np.isfinite(self.to_numpy(row[label])).all()
        )
        if guilty:
            named = sorted({row for one in guilty for row in one.rows})
            return Cause(guilty, rows=tuple(named))
        gradients = tuple(n for n, g in found.gradient.items() if not np.isfinite(g).all())
        if not gradients or rows is None or names is None or self.bound.structure.data_plate is None:
            return Cause((), gradients)

        def wrong(part: np.ndarray) -> bool:
            filled = np.resize(part, rows.shape)
            gradient = again(np.stack([filled[None]] * (run + 1))).gradient
            return not all(np.isfinite(g).all() for g in gradient.values())

        at = [names[int(np.flatnonzero(rows == row)[0])] for row in _at_fault(rows, wrong)]
        return Cause((), gradients, tuple(sorted(map(int, at))))

    def _at(self, step: int) -> dict[str, np.ndarray]:
        """The numbers of one step, each of length 1."""
        return {n: np.array([v.at(step) if isinstance(v, Schedule | Turn) else v]) for n, v in self.numbers.items()}

    def _guilty(
        self, found: Again, name: str, label: str, params: Mapping[str, Any], names: np.ndarray | None
    ) -> Guilty:
        info, structure = self.bound.structure.sites[name], self.bound.structure
        density = self.to_numpy(found.table[name][label])
        wrong = ~np.isfinite(density)
        draw = tuple(int(i) for i in np.argwhere(wrong)[0][:2])
        local = info.local and density.ndim > 2
        at = np.flatnonzero(wrong.any((0, 1))) if local else None
        here = np.flatnonzero(wrong[draw]) if local else None
        latent = [n for n in found.table if structure.sites[n].role != "observed"]
        values = {n: self._draw(found, n, draw) for n in latent}
        fns = self.bound.distributions(params, found.batch, values).get((name, SIDES[label]), [])
        value = self._draw(found, name, draw)
        known = () if at is None else tuple(sorted(int(r) for r in (at if names is None else names[at])))
        return Guilty(
            name,
            label,
            known if structure.data_plate is not None else (),
            self._parameters(fns, structure.plate_dim, here, len(wrong[draw]) if local else 0),
            described(value if here is None else value[here]),
        )

    def _draw(self, found: Again, name: str, draw: tuple[int, ...]) -> np.ndarray:
        """One draw of a site, `[B, ...]` or whole."""
        value = np.asarray(self.to_numpy(found.table[name]["value"]))
        if not self.bound.structure.sites[name].local:
            return value[min(draw[0], len(value) - 1)]
        return value[min(draw[0], value.shape[0] - 1), min(draw[1], value.shape[1] - 1)]

    def _parameters(
        self, fns: Sequence[Any], plate_dim: int | None, rows: np.ndarray | None, size: int
    ) -> dict[str, str]:
        """Of a distribution, or of those of all steps of a scan together."""
        found: dict[str, list[np.ndarray]] = {}
        for fn in fns:
            base = innermost(fn)
            for name, constraint in _constraints(base).items():
                value = getattr(base, name, None)
                if value is None:
                    continue
                array = np.asarray(self.to_numpy(value))
                if rows is not None and plate_dim is not None and array.dtype.kind in "fiub":
                    inner = len(base.batch_shape) - len(fn.batch_shape) + _event_dim(base, constraint)
                    axis = array.ndim + plate_dim - inner
                    if 0 <= axis < array.ndim and array.shape[axis] == size:
                        array = np.take(array, rows, axis)
                found.setdefault(name, []).append(array.reshape(-1))
        return {name: described(np.concatenate(parts)) for name, parts in found.items()}


def _constraints(fn: Any) -> dict[str, Any]:
    """Parameters of a distribution; of those that can be given in several ways (scale_tril or covariance), one."""
    known = getattr(fn, "arg_constraints", None)
    known = dict(known) if isinstance(known, Mapping) else {}
    given = {n: c for n, c in known.items() if n in getattr(fn, "__dict__", {})}
    return given or known


def _event_dim(fn: Any, constraint: Any) -> int:
    try:
        return int(getattr(constraint, "event_dim", 0))
    except NotImplementedError:  # of a constraint that depends on other parameters, as that of Delta's value does
        return len(fn.event_shape)


def _at_fault(rows: np.ndarray, wrong: Callable[[np.ndarray], bool], most: int = SHOWN) -> list[int]:
    """Rows that alone make a batch wrong, by halves, the first few of them; none where no half does."""
    found: list[int] = []
    todo = [rows]
    while todo and len(found) < most:
        part = todo.pop()
        if wrong(part):
            if len(part) == 1:
                found.append(int(part[0]))
            else:
                half = len(part) // 2
                todo += [part[half:], part[:half]]
    return found


def described(array: np.ndarray) -> str:
    """A number, or the range of an array's entries and how many of them are not finite."""
    flat = np.asarray(array, dtype=np.float64).reshape(-1)
    finite = flat[np.isfinite(flat)]
    if len(flat) == 1 or (len(finite) == len(flat) > 0 and np.ptp(flat) == 0):
        return f"{flat[0]:.4g}"
    if len(finite) == len(flat):
        return f"from {flat.min():.4g} to {flat.max():.4g}" if len(flat) else "empty"
    odd = f"{len(flat) - len(finite)} of {len(flat)} not finite"
    return f"{odd}, others from {finite.min():.4g} to {finite.max():.4g}" if len(finite) else odd


def _listed(rows: Sequence[int]) -> str:
    return ("row " if len(rows) == 1 else "rows ") + _some(rows)


def _some(found: Sequence[Any]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(map(str, found[:SHOWN])) + more
