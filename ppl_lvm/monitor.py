"""What is watched while a fit runs: losses, validation, early stopping, callbacks, and which restart was best."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_lvm.backends.training import RECORDS, SKIPPED

if TYPE_CHECKING:
    from ppl_lvm.posterior import State

BEST, PROGRESS = "early_stopping/best/", "early_stopping/progress"
"""Where a state keeps the best parameters so far, and (best loss, its step, checks since)."""
LOOKS, ENDED = ("validation", "hard"), "ended/"
"""What is recorded now and then, of a run; and where its state is kept if it has ended before the others."""


class Moment:
    """What a callback is given: where the run is. Parameters and state are read from the device when asked for."""

    def __init__(
        self,
        step: int,
        loss: float,
        validation: float | None,
        restart: int,
        params: Callable[[], dict[str, Any]],
        state: Callable[[], State],
    ) -> None:
        self.step, self.loss, self.validation, self.restart = step, loss, validation, restart
        self.stopped = False
        self._params, self._state = params, state

    @property
    def params(self) -> dict[str, Any]:
        """Constrained values by name, as numpy arrays."""
        return self._params()

    @property
    def state(self) -> State:
        """What `fit(..., state=)` goes on from: a checkpoint, once it is saved."""
        return self._state()

    def stop(self) -> None:
        """Ends the fit at this step."""
        self.stopped = True


@dataclass
class EarlyStopping:
    """The best parameters so far by validation, and how long ago that was."""

    patience: int
    min_delta: float
    best: float = math.inf
    step: int = 0
    waited: int = 0
    arrays: Mapping[str, np.ndarray] | None = None
    """All state of the run at its best."""

    def see(self, step: int, loss: float, arrays: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """A look at the validation loss; a loss that is not a number is no improvement."""
        if loss < self.threshold:
            self.best, self.step, self.waited, self.arrays = loss, step, 0, arrays()
        else:
            self.waited += 1

    @property
    def threshold(self) -> float:
        return self.best - self.min_delta

    @property
    def over(self) -> bool:
        return self.waited >= self.patience

    @property
    def reason(self) -> str:
        unit = "check" if self.waited == 1 else "checks"
        return (
            f"no validation loss under {self.best:.6g} (step {self.step}) by more than min_delta = {self.min_delta:g} "
            f"in {self.waited} {unit}"
        )

    def pack(self) -> dict[str, np.ndarray]:
        progress = {PROGRESS: np.array([self.best, self.step, self.waited], dtype=np.float64)}
        return progress | {BEST + n: a for n, a in (self.arrays or {}).items()}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> None:
        if PROGRESS in arrays:
            best, step, waited = arrays[PROGRESS].tolist()
            held = {n.removeprefix(BEST): a for n, a in arrays.items() if n.startswith(BEST)}
            self.best, self.step, self.waited, self.arrays = best, int(step), int(waited), held or None


def going_on(arrays: Mapping[str, np.ndarray], skips: int) -> dict[str, np.ndarray]:
    """The part of a state that is the trainer's, for a fit that may leave out `skips` steps in a row.

    Those that were left out before do not end it: the next one that is not finite may.
    """
    found = {n: a for n, a in arrays.items() if n != PROGRESS and not n.startswith(BEST)}
    return with_fewer_skipped(found, skips) if SKIPPED in found else found


def with_fewer_skipped(arrays: Mapping[str, np.ndarray], most: int) -> dict[str, np.ndarray]:
    """A state whose last steps were left out, for a fit that may leave out no more than `most`; others as they are."""
    skipped = arrays[SKIPPED]
    return {**arrays, SKIPPED: np.asarray(np.minimum(skipped, most), dtype=skipped.dtype)}


@dataclass
class Run:
    """The record of one of the runs that a fit makes at once."""

    early: EarlyStopping | None
    records: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in RECORDS})
    validation: list[tuple[int, float]] = field(default_factory=list)
    hard: list[tuple[int, float]] = field(default_factory=list)
    """The loss of hard draws, where those of the fit are relaxed."""
    most_skipped: int = 0
    """How many steps in a row may be skipped as their loss or gradient is not finite."""
    skipped: list[int] = field(default_factory=list)
    """Steps whose loss or gradient is not finite; they moved nothing."""
    first: int = 0
    """The step that its record begins with."""
    told: bool = False
    """Something was said about the first of them."""
    diverged: int | None = None
    """The step that was one too many of them in a row."""
    ended: tuple[int, Mapping[str, np.ndarray]] | None = None
    """Step and state where early stopping ended it; runs beside it may go on."""

    def add(self, chunk: Mapping[str, np.ndarray], first: int) -> None:
        if not self.records["loss"]:
            self.first = first
        for name, values in chunk.items():
            self.records[name].append(values)
        count = chunk["skipped"]
        over = np.flatnonzero(count > self.most_skipped)
        if len(over):
            self.diverged, count = first + int(over[0]), count[: over[0] + 1]
        self.skipped += (first + np.flatnonzero(count > 0)).tolist()

    def rewind(self) -> int:
        """To before the step at which it diverged, as if that were still to come; gives its number."""
        assert self.diverged is not None
        step, self.diverged = self.diverged, None
        self.records = {name: [self.record(name)[: step - self.first]] for name in RECORDS}
        self.skipped = [skipped for skipped in self.skipped if skipped < step]
        return step

    def pack(self) -> dict[str, np.ndarray]:
        """What is recorded, and how the run ended; early stopping is in the state."""
        found = {name: self.record(name) for name in RECORDS}
        found |= {name: np.array(getattr(self, name), dtype=np.float64).reshape(-1, 2) for name in LOOKS}
        found |= {"first": np.array(self.first), "told": np.array(self.told)}
        if self.diverged is not None:
            found["diverged"] = np.array(self.diverged)
        if self.ended is not None:
            step, arrays = self.ended
            found |= {"ended": np.array(step)} | {ENDED + name: a for name, a in arrays.items()}
        return found

    def unpack(self, found: Mapping[str, np.ndarray]) -> None:
        self.records = {name: [found[name]] if len(found[name]) else [] for name in RECORDS}
        self.validation, self.hard = ([(int(step), loss) for step, loss in found[name].tolist()] for name in LOOKS)
        self.first, self.told = int(found["first"]), bool(found["told"])
        self.diverged = int(found["diverged"]) if "diverged" in found else None
        last = None if self.diverged is None else self.diverged + 1 - self.first
        self.skipped = (self.first + np.flatnonzero(found["skipped"][:last] > 0)).tolist()
        held = {name.removeprefix(ENDED): a for name, a in found.items() if name.startswith(ENDED)}
        self.ended = (int(found["ended"]), held) if "ended" in found else None

    def record(self, name: str) -> np.ndarray:
        return np.concatenate(self.records[name]) if self.records[name] else np.zeros(0)

    def said(self, step: int) -> str:
        """What is not finite at a step."""
        i = step - self.first
        loss, norm = (float(self.record(name)[i]) for name in ("loss", "gradient_norm"))
        gradient = f"the gradient's norm is {norm:g}, and the loss {loss:g}"
        return gradient if np.isfinite(loss) else f"the loss is {loss:g}"

    @property
    def over(self) -> bool:
        return self.diverged is not None or (self.early is not None and self.early.over)

    @property
    def checked(self) -> int:
        """The last step with a look at validation."""
        return self.validation[-1][0] if self.validation else -1

    @property
    def score(self) -> float:
        """What restarts are compared by: validation where there is some, else the mean loss of the last tenth."""
        if self.diverged is not None:
            return math.nan
        if self.validation:
            last = self.validation[-1][1]
            return last if self.early is None else min(last, self.early.best)
        loss = self.record("loss")
        tail = loss[-max(1, len(loss) // 10) :]
        tail = tail[np.isfinite(tail)]
        return float(tail.mean()) if len(tail) else math.nan

    def history(self, last: int) -> dict[str, np.ndarray]:
        loss = self.record("loss")
        found = {"step": np.arange(last - len(loss), last), "loss": loss}
        found["gradient_norm"] = self.record("gradient_norm")
        if self.skipped:
            found["skipped_step"] = np.array(self.skipped)
        if self.validation:
            steps, losses = zip(*self.validation, strict=True)
            found |= {"validation_step": np.array(steps), "validation": np.array(losses)}
        if self.hard:
            steps, losses = zip(*self.hard, strict=True)
            found |= {"hard_step": np.array(steps), "hard_loss": np.array(losses)}
        return found


def run_seed(seed: int, restart: int) -> int:
    """The seed of a restart; the first is the fit's own, so that one restart is a plain fit."""
    return seed if restart == 0 else int(np.random.SeedSequence([seed, restart]).generate_state(1)[0])


def restart_seeds(seed: int, restarts: int) -> list[int]:
    """A seed for every restart; `fit(..., seed=s)` with one of them is that restart alone."""
    return [run_seed(seed, r) for r in range(restarts)]


class Watch:
    """Looks at the runs of a fit after every chunk, and every so many steps at validation and callbacks.

    Args:
        look: the validation loss `[R]` of all runs, if there is one.
        hard: the loss `[R]` of hard draws, if those of the fit are relaxed.
        callbacks: called with a Moment once for every run that has neither stopped nor diverged.
        every: steps between two looks at those.
        params, state: constrained parameters, and the state, of one run: `params(arrays)`, `state(arrays, step, run)`.
    """

    def __init__(
        self,
        trainer: Any,
        runs: Sequence[Run],
        look: Callable[[Any], np.ndarray] | None,
        callbacks: Sequence[Callable[[Moment], object]],
        every: int,
        params: Callable[[Mapping[str, np.ndarray]], dict[str, Any]],
        state: Callable[[Mapping[str, np.ndarray], int, int], State],
        hard: Callable[[Any], np.ndarray] | None = None,
    ) -> None:
        self.runs, self.messages = list(runs), list[str]()
        self.stopped = False
        """Whether a callback has stopped the fit."""
        self._trainer, self._look, self._hard, self._callbacks = trainer, look, hard, callbacks
        self._params, self._state = params, state
        self._every = every if callbacks or look is not None or hard is not None else sys.maxsize

    @property
    def over(self) -> bool:
        return self.stopped or all(run.over for run in self.runs)

    @property
    def lost(self) -> int | None:
        """The run that diverged last, where all have."""
        steps = [run.diverged for run in self.runs if run.diverged is not None]
        return None if len(steps) < len(self.runs) else steps.index(max(steps))

    @property
    def wrong(self) -> bool:
        """Whether there is something to say of steps that are not finite: no run is left, or one has skipped its first.
        """
        return self.lost is not None or any(r.skipped and not r.told and r.diverged is None for r in self.runs)

    @property
    def last(self) -> tuple[float, float | None]:
        """The least loss of the runs, and the least validation loss if there is one."""
        losses = [run.records["loss"][-1][-1] for run in self.runs if run.diverged is None and run.records["loss"]]
        looked = [run.validation[-1][1] for run in self.runs if run.diverged is None and run.validation]
        return float(min(losses, default=math.nan)), min(looked, default=None)

    def add(self, chunk: Mapping[str, np.ndarray], first: int) -> None:
        """Records of a chunk that began at step `first`, each `[R, n]`."""
        going = [r for r, run in enumerate(self.runs) if not run.over]
        for r in going:
            self.runs[r].add({name: values[r] for name, values in chunk.items()}, first)
        for r in going:
            step = self.runs[r].diverged
            if step is not None and r != self.lost:  # that one is an error, and its restart is what it goes on from
                self.messages.append(f"restarts: {r} dropped: at step {step}, {self.runs[r].said(step)}")

    def until(self, step: int) -> int:
        """Steps to the next look at validation and callbacks."""
        return self._every - step % self._every

    def check(self, step: int, tree: Any) -> None:
        """Validation and early stopping where they are due, then the callbacks."""
        if step % self._every:
            return
        losses = None if self._look is None else self._look(tree)
        of_hard = None if self._hard is None else self._hard(tree)
        for r, run in enumerate(self.runs):
            if run.over:
                continue
            if of_hard is not None:
                run.hard.append((step, float(of_hard[r])))
            if losses is not None:
                run.validation.append((step, float(losses[r])))
            if run.early is not None and losses is not None:
                run.early.see(step, float(losses[r]), partial(self._trainer.pack, tree, r))
                if run.early.over:
                    run.ended = step, self._trainer.pack(tree, r)
            for callback in self._callbacks:
                self._call(callback, step, tree, r)

    def _call(self, callback: Callable[[Moment], object], step: int, tree: Any, r: int) -> None:
        run = self.runs[r]
        moment = Moment(
            step,
            float(run.records["loss"][-1][-1]),
            run.validation[-1][1] if run.validation else None,
            r,
            lambda: self._params(self._trainer.pack(tree, r)),
            lambda: self.state(tree, step, r),
        )
        callback(moment)
        if moment.stopped and not self.stopped:
            self.stopped = True
            self.messages.append(f"callback: stopped at step {step}")

    def state(self, tree: Any, step: int, r: int) -> State:
        """What a run goes on from at this step."""
        run, arrays = self.runs[r], dict(self._trainer.pack(tree, r))
        if run.diverged is None:  # nor has one that was taken back, whose tree says so still
            arrays = with_fewer_skipped(arrays, run.most_skipped)
        return self._state(arrays | ({} if run.early is None else run.early.pack()), step, r)

    def finish(self, step: int, tree: Any) -> Ended:
        """The best run at the end, after a last look if steps were made since the one before."""
        alive = [run for run in self.runs if not run.over]
        if self._look is not None and any(run.checked < step for run in alive):
            losses = self._look(tree)
            for r, run in enumerate(self.runs):
                if run in alive:
                    run.validation.append((step, float(losses[r])))
        if self._hard is not None and any(not run.hard or run.hard[-1][0] < step for run in alive):
            of_hard = self._hard(tree)
            for r, run in enumerate(self.runs):
                if run in alive:
                    run.hard.append((step, float(of_hard[r])))
        best = best_of(self.runs)
        run = self.runs[best]
        if len(self.runs) > 1:
            scores = ", ".join(f"{other.score:.6g}" for other in self.runs)
            self.messages.append(f"restarts: kept {best} of 0 to {len(self.runs) - 1}, whose losses are {scores}")
        at, arrays = (step, self._trainer.pack(tree, best)) if run.ended is None else run.ended
        # The last look is no check of early stopping: a run that goes on from here has its checks where they were.
        kept = run.early.arrays if run.early is not None else None
        improved = run.early is not None and bool(run.validation) and run.validation[-1][1] < run.early.threshold
        if run.early is not None and run.early.over:
            self.messages.append(f"early stopping: stopped at step {at}: {run.early.reason}")
        if run.early is not None and kept is not None and not improved and run.early.step < at:
            self.messages.append(f"early stopping: kept the parameters of step {run.early.step}")
        if run.skipped:
            self.messages.append(
                f"on_nonfinite: skipped {len(run.skipped)} of {len(run.record('loss'))} steps, as their loss or "
                f"gradient is not finite (history['skipped_step'])"
            )
        state = {**arrays, **(run.early.pack() if run.early is not None else {})}
        return Ended(best, at, arrays if kept is None or improved else kept, state)

    def history(self, ended: Ended) -> dict[str, np.ndarray]:
        """That of the best run, and what restarts were compared by."""
        found = self.runs[ended.run].history(ended.step)
        return found | ({"restarts": np.array([run.score for run in self.runs])} if len(self.runs) > 1 else {})


@dataclass(frozen=True)
class Ended:
    """How the best run ended."""

    run: int
    step: int
    kept: Mapping[str, np.ndarray]
    """All state at the parameters that are kept."""
    state: Mapping[str, np.ndarray]
    """What a further fit goes on from."""


def best_of(runs: Sequence[Run]) -> int:
    """The run with the least score of those that have not diverged; the first where none has a finite one."""
    alive = [r for r, run in enumerate(runs) if run.diverged is None]
    return min(alive, key=lambda r: runs[r].score if math.isfinite(runs[r].score) else math.inf)
