"""Checkpoints: a folder that a fit writes as it goes, and goes on from to the same bits after it was killed.

A folder has two places, which are written in turn, so that the last state but one stays whole while the last one is
written. What is stored is what no other input of the fit gives: the state of every restart (`State`), the records so
far, what was said, the stages that are over, and fingerprints of what was asked for. The data are not stored.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppl_lvm import fingerprint, store
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.training import RECORDS
from ppl_lvm.errors import DataError, NonFiniteError, StorageError, TooLargeError
from ppl_lvm.monitor import LOOKS
from ppl_lvm.posterior import Fit, State
from ppl_lvm.to_arviz import versions

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from ppl_lvm.data import Batches
    from ppl_lvm.monitor import Watch
    from ppl_lvm.program import Program
    from ppl_lvm.recipe import Recipe

KIND = "checkpoint"
PLACES = ("first", "second")
SECONDS, SHARE = 60.0, 0.05
"""Between two checkpoints where nothing was asked for; the part of the time that writing them may take."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Stage:
    """A stage that is over: what it adds to the fit that is made of all."""

    history: dict[str, np.ndarray]
    messages: list[str]
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Where a fit is between two steps."""

    states: Sequence[State]
    """Of every restart."""
    records: Sequence[Arrays]
    """`Run.pack` of every restart."""
    said: Mapping[str, Sequence[str]]
    """Messages, by who says them."""
    stopped: bool
    """Whether a callback has stopped it."""
    seconds: float
    batches: int | None = None
    """A checksum of the batches so far, where data come as batches."""

    @classmethod
    def of(
        cls, step: int, tree: Any, watch: Watch, said: Mapping[str, list[str]], seconds: float, batches: Batches | None
    ) -> Progress:
        """Where a loop is."""
        states = [watch.state(tree, step, r) for r in range(len(watch.runs))]
        seen = None if batches is None else batches.seen[step]
        return cls(states, [run.pack() for run in watch.runs], said, watch.stopped, seconds, seen)

    def restore(self, watch: Watch, said: Mapping[str, list[str]], batches: Batches | None) -> None:
        """Puts a loop's records and messages, and its batches, where they were.

        Raises:
            DataError: the batches before this step are others than they were.
        """
        for run, records in zip(watch.runs, self.records, strict=True):
            run.unpack(records)
        watch.stopped = self.stopped
        for who, lines in said.items():
            lines[:] = self.said[who]
        if batches is not None:
            step = self.states[0].step
            batches.go_to(step)
            if batches.seen[step] != self.batches:
                raise DataError(
                    f"The {step} batches before the checkpoint hold other rows, or rows in another order, than when it "
                    f"was written, so the fit would not go on as it began. Give the same data, and a source that draws "
                    f"its order from a seed, as in DataLoader(..., generator=torch.Generator().manual_seed(0)); or go "
                    f"on with these batches all the same, from state=ppl_lvm.checkpoint.newest(folder).states[0]."
                )


class Checkpoint:
    """A folder of checkpoints of one fit; or of none, where there is no folder to write to.

    Args:
        folder: where; None writes nothing and finds nothing.
        every: steps between two checkpoints; None: about a minute, or longer where writing takes long.
        held: what the folder has already.
        given: what was asked for of a whole fit, where this is a stage of it.
    """

    def __init__(
        self,
        folder: Path | None,
        every: int | None = None,
        held: Held | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.every = folder, every
        self.done: list[Stage] = []
        """The stages that are over."""
        self.command: dict[str, Any] | None = None if held is None else held.content.command
        """What the command line was asked for, if it was that; it travels along."""
        self._held, self._given = held, given or {}
        self._number = -1 if held is None else held.content.number
        self._asked: dict[str, Any] = {}
        self._saved, self._due = -1, 0.0
        self.notes: list[str] = []

    @classmethod
    def of(cls, asked: Any, every: Any) -> Checkpoint:
        """From the arguments of `fit`.

        Raises:
            StorageError: the folder is no path, holds other files, or what it holds cannot be read; or `every` is no
                number of steps.
        """
        if isinstance(asked, Checkpoint):
            return asked
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise StorageError(f"every is {every!r}; give a number of steps between two checkpoints, or None.")
        if asked is None:
            if every is not None:
                raise StorageError(f"every = {every} is of checkpoints; give a folder for them, checkpoint='runs/a'.")
            return cls(None)
        if not isinstance(asked, str | Path) or not str(asked):
            raise StorageError(f"checkpoint is {asked!r}; give the path of a folder.")
        folder = Path(asked).absolute()
        _check_own(folder)
        return cls(folder, every, newest(folder))

    # What was there.

    def of_stages(self, recipe: Mapping[str, Any], start: Any) -> Checkpoint:
        """The same for a fit in stages; those that are over are in `done`.

        Raises:
            StorageError: what the folder holds is of another recipe.
        """
        if self.folder is None:
            return self
        given = fingerprint.plain({"recipe": recipe, "start": _of_start(start)})
        found = Checkpoint(self.folder, self.every, self._held, given)
        found.command = self.command
        if self._held is not None:
            self._refuse_others(given)
            found.done = [
                Stage(self._held.part("done", i), stage.messages, stage.seconds)
                for i, stage in enumerate(self._held.content.done)
            ]
        return found

    def stage(self, fit: Fit) -> None:
        """A stage is over, and the next one begins."""
        self.done.append(Stage(fit.history, fit.messages, fit.seconds))
        self._held, self._saved, self.notes = None, -1, []

    def found(self, asked: Callable[[], Mapping[str, Any]]) -> Progress | None:
        """What to go on from, if there is anything; `asked` is a description of the fit.

        Raises:
            StorageError: it is of another fit; says what differs.
        """
        if self.folder is None:
            return None
        self._asked = fingerprint.plain({**asked(), **self._given})
        if self._held is None:
            return None
        self._refuse_others(self._asked)
        content, states = self._held.content, self._held.states
        step = states[0].step
        self._saved, self._due = step, time.monotonic() + SECONDS
        self.notes = [f"checkpoint: went on from step {step}"]
        others = [n for n, v in versions().items() if content.versions.get(n, v) != v]
        if others:
            then = ", ".join(f"{n} {content.versions[n]}" for n in others)
            self.notes.append(f"checkpoint: {then} wrote it, so bits may not be those of a fit that was not ended")
        records = [self._held.part("records", i) for i in range(len(states))]
        return Progress(states, records, content.said, content.stopped, content.seconds, content.batches)

    def _refuse_others(self, asked: Mapping[str, Any]) -> None:
        assert self._held is not None
        before = {name: value for name, value in self._held.content.asked.items() if name in asked}
        lines = fingerprint.differences(_without_free(before), _without_free(asked))
        if lines:
            more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
            raise StorageError(
                f"The checkpoint in {str(self.folder)!r} is of another fit: {'; '.join(lines[:3])}{more}. Give the "
                f"same data and arguments to go on with it, or another folder for this fit."
            )

    # What is to be.

    @property
    def onwards(self) -> str:
        """How a fit that was interrupted goes on."""
        if self.folder is None:
            return "This process can go on with state=error.fit.state; with checkpoint='runs/a' any other could."
        return f"The same call, with checkpoint={str(self.folder)!r}, goes on from there."

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Makes the folder, and keeps other processes from writing to it in this block, also after one was killed.

        Raises:
            StorageError: another one writes to it, or it cannot be made.
        """
        if self.folder is None:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
        except OSError as cause:
            raise StorageError(
                f"Cannot write {str(self.folder)!r}: {cause.strerror}. Give another folder for checkpoints."
            ) from cause
        try:
            _lock(handle, self.folder)
            yield
        except TooLargeError as error:
            if self._saved >= 0:
                error.args = (
                    f"{error} The checkpoint in {str(self.folder)!r} is at step {self._saved}: the same call goes on "
                    f"from there where there is more memory, and here another one does with smaller steps and "
                    f"state=ppl_lvm.checkpoint.newest({str(self.folder)!r}).states[0].",
                )
            raise
        finally:
            os.close(handle)  # which gives the lock back

    def until(self, step: int) -> int:
        """Steps to the next checkpoint, where steps are counted."""
        return sys.maxsize if self.every is None or self.folder is None else self.every - step % self.every

    def look(self, step: int, progress: Callable[[], Progress], last: bool = False) -> None:
        """Writes a checkpoint if it is time for one, or if it is the first or the last.

        Raises:
            StorageError: the folder cannot be written. The checkpoint before is whole.
        """
        if self.folder is None or self._saved == step:
            return
        due = time.monotonic() >= self._due if self.every is None else step % self.every == 0
        if not (due or last or self._saved < 0):
            return
        began = time.monotonic()
        try:
            self._write(self.folder, progress())
        except StorageError as cause:
            before = f"; that of step {self._saved} is whole, and can be gone on from" if self._saved >= 0 else ""
            raise StorageError(f"{cause} The fit ended at step {step}, without a checkpoint of it{before}.") from cause
        now = time.monotonic()
        self._saved, self._due = step, now + max(SECONDS, (now - began) / SHARE)

    @contextlib.contextmanager
    def of_a_loss(self, watch: Watch, progress: Callable[[int], Progress]) -> Iterator[None]:
        """A step that is not finite ends the fit in this block: the run before it is written, and the error says so."""
        try:
            yield
        except NonFiniteError as error:
            if self.folder is None or watch.lost is None:
                raise
            step = watch.runs[watch.lost].rewind()
            try:
                self.look(step, partial(progress, step), last=True)
            except StorageError as cause:
                raise error.saying(f"{cause} error.state is kept nowhere else.") from cause
            raise error.saying(
                f"The checkpoint in {str(self.folder)!r} is at step {step}: the same call goes on from there, with "
                f"on_nonfinite='skip' or more of most_skipped past it."
            ) from None

    def _write(self, folder: Path, now: Progress) -> None:
        parts: dict[str, Sequence[Arrays]] = {"state": [state.arrays for state in now.states], "records": now.records}
        parts["done"] = [stage.history for stage in self.done]
        arrays = {
            f"{part}/{i}/{n}": a for part, each in parts.items() for i, held in enumerate(each) for n, a in held.items()
        }
        content = _Content(
            number=self._number + 1,
            asked=self._asked,
            states=[state.described for state in now.states],
            said={who: list(lines) for who, lines in now.said.items()},
            stopped=now.stopped,
            seconds=now.seconds,
            batches=now.batches,
            done=[_Done(messages=stage.messages, seconds=stage.seconds) for stage in self.done],
            versions=versions(),
            command=self.command,
        )
        place = folder / PLACES[content.number % len(PLACES)]
        store.write(place, KIND, content.model_dump(), {"arrays": arrays})
        self._number = content.number


class _Done(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    messages: list[str]
    seconds: float


class _Content(BaseModel):
    """The entries of a manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    number: int = Field(ge=0)
    """How many were written before it."""
    asked: dict[str, Any]
    states: list[dict[str, Any]] = Field(min_length=1)
    said: dict[str, list[str]]
    stopped: bool
    seconds: float
    batches: int | None
    done: list[_Done]
    versions: dict[str, str]
    command: dict[str, Any] | None


@dataclass(frozen=True)
class Held:
    """A checkpoint that was read and verified."""

    content: _Content
    arrays: Arrays

    @property
    def states(self) -> list[State]:
        return [State.of(described, self.part("state", i)) for i, described in enumerate(self.content.states)]

    def part(self, part: str, i: int) -> dict[str, np.ndarray]:
        before = f"{part}/{i}/"
        return {name.removeprefix(before): a for name, a in self.arrays.items() if name.startswith(before)}


def _lock(handle: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as cause:
        raise StorageError(
            f"Another fit is writing checkpoints to {str(folder)!r}; wait for it, or give another folder."
        ) from cause
    except OSError as cause:
        if cause.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems without locks
            raise


def newest(folder: str | Path) -> Held | None:
    """The last whole checkpoint in a folder; None where there is none.

    Raises:
        StorageError: there is something, and none of it can be read.
    """
    found: list[Held] = []
    wrong: list[StorageError] = []
    for place in PLACES:
        if store.exists(Path(folder) / place):
            try:
                found.append(_read(Path(folder) / place))
            except StorageError as cause:
                wrong.append(cause)
    if wrong and not found:
        raise wrong[0]
    return max(found, key=lambda held: held.content.number, default=None)


def _read(place: Path) -> Held:
    stored = store.read(place, KIND)
    try:
        held = Held(_Content.model_validate(stored.content), stored.arrays.get("arrays", {}))
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StorageError(f"{str(place)!r} describes no checkpoint: {where}: {first['msg']}.") from cause
    for i in range(len(held.content.states)):
        lacking = {*RECORDS, *LOOKS} - held.part("records", i).keys()
        if lacking:
            raise StorageError(f"{str(place)!r} is no checkpoint: it has no records {sorted(lacking)} of run {i}.")
    return held


def describe(
    program: Program, how: Recipe, data: Call | Batches, validation: Any, start: Any, state: State | None, **rest: Any
) -> dict[str, Any]:
    """What a fit was asked for, as `fingerprint.differences` compares it."""
    names = program.arguments
    held_out = fingerprint.of_data(validation, names) if isinstance(validation, Call) else validation
    return {
        "program": fingerprint.of_program(program),
        "recipe": how.to_dict(),
        **rest,
        "data": fingerprint.of_data(data, names) if isinstance(data, Call) else data.kind,
        "validation": held_out,
        "start": _of_start(start),
        "state": None if state is None else f"step {state.step}, {fingerprint.of_values(state.arrays)}",
    }


def _of_start(start: Any) -> str | None:
    return None if start is None else fingerprint.of_values(start.params if isinstance(start, Fit) else start)


PAST = ("on_nonfinite", "most_skipped")
"""Of a recipe, past what the fit goes on; as how long it does, that may be other than it was."""


def _without_free(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What makes it another fit. Of stages each has its own steps."""
    recipe = asked.get("recipe")
    if not isinstance(recipe, Mapping):
        return dict(asked)

    def without(recipe: Mapping[str, Any], *free: str) -> dict[str, Any]:
        return {name: value for name, value in recipe.items() if name not in free}

    if "stages" not in recipe:
        return {**asked, "recipe": without(recipe, "steps", *PAST)}
    stages = [without(stage, *PAST) for stage in recipe["stages"]]
    return {**asked, "recipe": {**without(recipe, *PAST), "stages": stages}}


def _check_own(folder: Path) -> None:
    """Refuses a folder that holds anything but checkpoints."""
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"Checkpoints are in a folder, but {str(folder)!r} is a file; give another name.")
    foreign = sorted({entry.name for entry in folder.iterdir()} - {*PLACES}) if folder.exists() else []
    if foreign:
        raise StorageError(
            f"The folder {str(folder)!r} holds {foreign[0]!r}, which is no checkpoint; give a folder of its own."
        )
