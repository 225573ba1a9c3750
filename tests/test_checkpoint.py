"""Checkpoints: whatever ends a fit, and wherever, the same call goes on to the same bits."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import BERNOULLI, ROWS
from typer.testing import CliRunner

from ppl_lvm import Fit, backends, checkpoint, cli, fit, interrupts, load, pace, store
from ppl_lvm.checkpoint import Checkpoint
from ppl_lvm.errors import DataError, Interrupted, RecipeError, StorageError
from ppl_lvm.monitor import EarlyStopping, Moment, Run
from ppl_lvm.pace import Pace
from ppl_lvm.program import Program, program

pytestmark = pytest.mark.optimised

BACKENDS = ("pyro", "numpyro")
on_both = pytest.mark.parametrize("backend", BACKENDS)
slow_on_numpyro = pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
"""Where what is tested is apart from the backend, or tested more widely elsewhere."""
STEP = re.compile(r"\"step\": (\d+)")
X = ROWS.data["x"]
TOY = Program("rows", ROWS.model, ROWS.guide, portable=True, arguments=("x",))


class Ended(Exception):
    """Stands for what ends a process."""


def run(backend: str, **options: Any) -> Fit:
    settings: dict[str, Any] = {"recipe": "elbo", "dtype": "float64", "seed": 3}
    settings |= {} if isinstance(options.get("recipe"), dict) and "stages" in options["recipe"] else SHORT
    settings["compile"] = "eager" if backend == "pyro" else "compiled"
    return fit(options.pop("program", TOY), data=options.pop("data", X), backend=backend, **(settings | options))


def ended(writes: int, call: Callable[..., Any], **options: Any) -> None:
    """A fit that ends where it would write one checkpoint more than so many."""
    left, write = [writes], store.write

    def end(*args: Any) -> None:
        if not left[0]:
            raise Ended
        left[0] -= 1
        write(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Ended):
        patch.setattr(store, "write", end)
        call(**options)


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
        ended(2, partial(run, backend), checkpoint=tmp_path, every=3, **options)
    found = run(backend, checkpoint=tmp_path, **options)
    assert any("checkpoint: went on from step" in m for m in found.messages), found.messages
    assert_same(whole, found)
    assert_same(whole, run(backend, checkpoint=tmp_path, **options))
    assert {p.name for p in tmp_path.iterdir()} == {*checkpoint.PLACES}


MODES = [("pyro", "eager"), ("pyro", "graph"), ("numpyro", "compiled")]
SLOW = [pytest.param(*mode, marks=pytest.mark.slow) for mode in (("pyro", "compiled"), ("numpyro", "eager"))]


@pytest.mark.parametrize(("backend", "mode"), [*MODES, *SLOW])
def test_nothing_depends_on_where_chunks_of_steps_end(
    backend: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock cuts them, so what goes on from a checkpoint meets others than what was never ended."""
    options: dict[str, Any] = {"compile": mode, "restarts": 2, "estimator": {"name": "score", "baseline": "linear"}}
    found = []
    for lengths in ([12], [1], [5, 2, 3]):
        turns = itertools.cycle(lengths)

        def took(self: Pace, steps: int, turns: Iterator[int] = turns) -> None:
            self.steps = next(turns)

        with monkeypatch.context() as patch:
            patch.setattr(Pace, "took", took)
            patch.setattr(pace, "FIRST", next(turns))
            found.append(run(backend, **options))
    assert found[0].state.mode == mode
    for other in found[1:]:
        assert_same(found[0], other)


def test_all_that_a_run_records_is_kept() -> None:
    """Every field: one that is added has to be packed as well."""
    records = {"loss": [np.array([3.0, np.nan]), np.array([1.5])], "gradient_norm": [np.array([0.1, 0.2, np.inf])]}
    records["skipped"] = [np.array([0.0, 1.0, 2.0])]
    state = {"params/w": np.arange(3.0), "count": np.array(7)}
    early = EarlyStopping(3, 0.1, 1.25, 4, 2, state)
    looks: dict[str, Any] = {"validation": [(4, 1.25), (6, np.nan)], "hard": [(6, -2.0)]}
    ends: dict[str, Any] = {"diverged": 5, "ended": (6, state)}
    kept = Run(early, records, **looks, most_skipped=1, skipped=[4, 5], first=3, told=True, **ends)
    unset = {f.name for f in dataclasses.fields(Run) if getattr(kept, f.name) == getattr(Run(None), f.name)}
    assert unset == set(), "this test sets every field to something of its own"
    stopping, other = EarlyStopping(3, 0.1), Run(None, most_skipped=1)
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


@slow_on_numpyro
def test_batches_go_on_in_their_order_or_not_at_all(backend: str, tmp_path: Path) -> None:
    """Three batches of six and a shorter one an epoch; the order is the source's, and is drawn again from its seed."""
    options: dict[str, Any] = {"batch_size": 6, "steps": 10}
    whole = run(backend, data=Loader(X, 5), **options)
    ended(2, partial(run, backend), checkpoint=tmp_path, data=Loader(X, 5), every=5, **options)
    assert_same(whole, run(backend, data=Loader(X, 5), checkpoint=tmp_path, **options))
    for other in (Loader(X, 6), Loader(X + 1e-9, 5)):
        with pytest.raises(DataError, match="10 batches before the checkpoint hold other rows, or rows in another"):
            run(backend, data=other, checkpoint=tmp_path, **(options | {"steps": 20}))
    with pytest.raises(StorageError, match=r"data\.rows was 20 and is 19"):
        run(backend, data=Loader(X[:19], 5), checkpoint=tmp_path, **options)


# Ended while it is written.

WRITER = """
import os, sys
from pathlib import Path
import numpy as np
from ppl_lvm import checkpoint, store
from ppl_lvm.backends.training import RECORDS
from ppl_lvm.monitor import LOOKS
from ppl_lvm.posterior import State

folder, most = Path(sys.argv[1]), 3

def progress(step):
    state = State("pyro", 0, step, "eager", {"w": np.full(500, float(step)), "only%d" % step: np.zeros(())})
    record = {name: np.full(step, 1.0) for name in (*RECORDS, *LOOKS)}
    return checkpoint.Progress([state], [record], {}, False, 0.0)

def write(folder, step):
    kept = checkpoint.Checkpoint.of(folder, 1)
    kept.found(dict)
    kept.look(step, lambda: progress(step))

def dying(at):
    "Ends this process at its operation number `at` on files, before it, after it, or in the middle of a write."
    count = [0]
    def patched(call):
        def counted(*args, **kwargs):
            if count[0] == at:
                os._exit(9)
            count[0] += 1
            return call(*args, **kwargs)
        return counted
    for name in ("mkdir", "fsync", "replace", "unlink", "close"):
        setattr(os, name, patched(getattr(os, name)))
    def opened(path, mode, **how):
        file = open(path, mode, **how)
        if mode == "rb":
            return file
        whole = file.write
        def write(blob):
            for part in (blob[: len(blob) // 2], blob[len(blob) // 2 :]):
                patched(whole)(part)
                file.flush()
        class File:
            def __enter__(self): return self
            def __exit__(self, *_): file.close()
            def __getattr__(self, name): return write if name == "write" else getattr(file, name)
        return File()
    store.open = opened

for before in range(most + 1):  # from no checkpoint at all to both places written
    for at in range(200):
        here = folder / ("%d-%d" % (before, at))
        for step in range(before):
            write(here, step)
        child = os.fork()
        if not child:
            dying(at)
            write(here, before)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, 9)
        held = checkpoint.newest(here)
        assert held is not None or before == 0 and ended, (before, at)
        if held is not None:
            step = held.states[0].step
            assert step in (before - 1, before) and (ended or step == before), (before, at, step)
            arrays = held.states[0].arrays
            assert set(arrays) == {"w", "only%d" % step} and (arrays["w"] == step).all()
        for step in (before + 1, before + 2):  # each place is swept when it is written again
            write(here, step)
            assert checkpoint.newest(here).states[0].step == step
        files = sorted(p.relative_to(here).parts[0] for p in here.rglob("*") if p.is_file())
        assert all(files.count(place) in (0, 2) for place in checkpoint.PLACES), list(here.rglob("*"))
        if not ended:
            break
    print(before, at, flush=True)
"""


def test_a_writer_that_is_killed_leaves_the_last_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    """At every operation on files, between them, and in the middle of a write: then it goes on, and sweeps up."""
    found = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    ends = [int(line.split()[1]) for line in found.stdout.splitlines()]
    assert len(ends) == 4
    assert min(ends) >= 10, "so many operations has a write"


# Ended by a signal.

CHILD = """
import sys
import test_checkpoint as here
here.run(sys.argv[1], checkpoint=sys.argv[2], **here.KILLED)
print("done")
"""
KILLED: dict[str, Any] = {"every": 1, "steps": 300, "validation": 0.25, "check_every": 7}


def child(backend: str, folder: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, backend, str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(step: int, folder: Path, process: Any) -> None:
    """Until there is a checkpoint of this step."""
    for _ in range(6000):
        manifests = [folder / place / "manifest.json" for place in checkpoint.PLACES]
        steps = [int(m.group(1)) for p in manifests if p.exists() and (m := STEP.search(p.read_text()))]
        if max(steps, default=-1) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no checkpoint")


@slow_on_numpyro
def test_a_process_that_is_killed_goes_on_to_the_same_bits(backend: str, tmp_path: Path) -> None:
    """A few steps after it began, in a write or between two."""
    process = child(backend, tmp_path)
    wait_for(20, tmp_path, process)
    time.sleep(random.uniform(0.0, 0.05))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    found = run(backend, checkpoint=tmp_path, **KILLED | {"every": 100})
    assert "checkpoint: went on from step 300" not in found.messages
    assert_same(run(backend, **{n: v for n, v in KILLED.items() if n != "every"}), found)


SOME: dict[str, dict[str, Any]] = {
    name: {**CASES[name], "every": 1} | ({} if name == "stages" else {"steps": 150})
    for name in ("early stopping, restarts", "optimisers, turns, a learned baseline", "multipliers", "stages")
}
SOME["early stopping, restarts"] |= {"patience": 60, "learning_rate": 0.01}
SOME["stages"]["recipe"] = {**SOME["stages"]["recipe"], "stages": [{"steps": 70}, {"learning_rate": 0.1, "steps": 70}]}


def again_and_again(backend: str, name: str, folder: str) -> None:
    run(backend, checkpoint=folder, **SOME[name])


@pytest.mark.slow
@on_both
def test_fifty_kills(backend: str, tmp_path: Path) -> None:
    """At random, from before the first step to after the last: whatever is left, the same call ends with the same bits.

    Each fit is killed until it is done, and then the next one begins. Processes are forks of one that has imported the
    library and nothing more, as starting Python would be most of their lives.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ppl_lvm.fit", f"ppl_lvm.backends.{backend}", "test_checkpoint"])
    seed = int(os.environ.get("PPL_LVM_KILLS", "0"))
    rng, kills, resumed, names = np.random.default_rng(seed), 0, 0, list(SOME)
    whole = {name: run(backend, **{n: v for n, v in SOME[name].items() if n != "every"}) for name in names}
    folder, number, longest = tmp_path / "0", 0, 8.0
    while kills < 50:
        name = names[number % len(names)]
        before = checkpoint.newest(folder)
        process = context.Process(target=again_and_again, args=(backend, name, str(folder)))
        began = time.monotonic()
        process.start()
        process.join(rng.uniform(0.0, longest))
        if process.exitcode is None:
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            resumed += before is not None
        else:
            assert process.exitcode == 0
            longest = 1.2 * (time.monotonic() - began)
        after = checkpoint.newest(folder)
        assert before is None or after is not None
        if process.exitcode == 0 or kills == 50:
            assert_same(whole[name], run(backend, checkpoint=folder, **SOME[name] | {"every": 1000}))
            number += 1
            folder = tmp_path / str(number)
    assert resumed >= 10, f"of the kills of seed {seed} only {resumed} were of a fit that had gone on"


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Pythons that a shell starts in its background ignore Ctrl-C, and so would the tests of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(*steps: int, before: Callable[[], None] = lambda: None) -> Callable[[Moment], None]:
    """A callback that presses Ctrl-C at these steps."""

    def callback(now: Moment) -> None:
        if now.step in steps:
            before()
            signal.raise_signal(signal.SIGINT)

    return callback


OFTEN: dict[str, Any] = {"validation": 0.25, "check_every": 2, "patience": 9, "learning_rate": 0.6}


@on_both
def test_ctrl_c_gives_the_fit_so_far_and_says_how_to_go_on(backend: str, tmp_path: Path) -> None:
    whole = run(backend, **OFTEN)
    with pytest.raises(Interrupted, match=r"^Interrupted at step 8 of 12\. The same call, with checkpoint=") as stop:
        run(backend, checkpoint=tmp_path, callbacks=[press(8)], **OFTEN)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert isinstance(stop.value, KeyboardInterrupt)
    assert not isinstance(stop.value, Exception), "nothing that catches errors catches it"
    part = stop.value.fit
    np.testing.assert_array_equal(part.history["loss"], whole.history["loss"][:8])
    best = int(whole.history["validation_step"][whole.history["validation"][:4].argmin()])
    for name, value in run(backend, **OFTEN | {"steps": best}).params.items():
        np.testing.assert_array_equal(part.params[name], value, err_msg=name)
    found = run(backend, checkpoint=tmp_path, **OFTEN)
    assert "checkpoint: went on from step 8" in found.messages
    assert_same(whole, found)
    with pytest.raises(Interrupted, match=r"can go on with state=error\.fit\.state") as stop:
        run(backend, callbacks=[press(8)], **OFTEN)
    again = run(backend, state=stop.value.fit.state, **OFTEN)
    np.testing.assert_array_equal(again.history["loss"], whole.history["loss"][8:])


def test_ctrl_c_in_a_stage_ends_all_of_them(tmp_path: Path) -> None:
    staged, seen = CASES["stages"], list[int]()
    whole = run("pyro", **staged)

    def twice(now: Moment) -> None:
        seen.append(now.step)
        if seen.count(4) == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="step 4 of 6") as stop:
        run("pyro", checkpoint=tmp_path, callbacks=[twice], check_every=4, **staged)
    np.testing.assert_array_equal(stop.value.fit.history["loss"], whole.history["loss"][:11])
    assert stop.value.fit.history["stage"].tolist() == [0] * 7 + [1] * 4
    found = run("pyro", checkpoint=tmp_path, check_every=4, **staged)
    assert "stage 1: checkpoint: went on from step 4" in found.messages
    np.testing.assert_array_equal(found.history["loss"], whole.history["loss"])


def test_a_second_ctrl_c_ends_a_fit_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stop:
        run("pyro", checkpoint=tmp_path, every=5, callbacks=[press(8, before=lambda: signal.raise_signal(2))], **OFTEN)
    assert not isinstance(stop.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    held = checkpoint.newest(tmp_path)
    assert held is not None
    assert held.states[0].step == 5


def test_a_handler_of_the_callers_own_stays() -> None:
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        found = run("pyro", callbacks=[press(4, 8)], **OFTEN)
        with interrupts.noticed() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert not interrupt
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(pressed) == 3
    assert len(found.history["loss"]) == 12


# Disks and folders.


@pytest.mark.parametrize("why", ["full", "too large"])
def test_a_disk_that_is_full_ends_the_fit_and_leaves_the_last_checkpoint(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own error in both: no space is left when a file is flushed, or a limit on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fsync = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(now: Moment) -> None:
        if now.step == 6 and why == "full":
            monkeypatch.setattr(os, "fsync", full)
        elif now.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    options: dict[str, Any] = {"every": 3, "check_every": 2}
    text = "No space left on device" if why == "full" else "File too large"
    try:
        with pytest.raises(StorageError, match=f"{text}.*ended at step 6, without a checkpoint of it; that of step 3"):
            run("pyro", checkpoint=tmp_path, callbacks=[fill], **options)
    finally:
        monkeypatch.setattr(os, "fsync", fsync)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = run("pyro", checkpoint=tmp_path, **options)
    assert "checkpoint: went on from step 3" in found.messages
    assert_same(run("pyro", check_every=2), found)


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    seen: list[int] = []
    options: dict[str, Any] = {"check_every": 1, "callbacks": [lambda now: seen.append(now.step)]}
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"Cannot write .*Not a directory\. Give another folder"):
        run("pyro", checkpoint=tmp_path / "file" / "a", **options)
    with pytest.raises(StorageError, match="is a file; give another name"):
        run("pyro", checkpoint=tmp_path / "file", **options)
    with pytest.raises(StorageError, match="holds 'file', which is no checkpoint"):
        run("pyro", checkpoint=tmp_path, **options)
    assert seen == []
    assert (tmp_path / "file").read_text() == "x"


def test_a_damaged_checkpoint_is_passed_over_and_two_are_refused(tmp_path: Path) -> None:
    run("pyro", checkpoint=tmp_path, every=5)
    held = checkpoint.newest(tmp_path)
    assert held is not None
    assert (held.states[0].step, held.content.number) == (12, 3)
    second, first = (tmp_path / checkpoint.PLACES[i] / "manifest.json" for i in (1, 0))
    second.write_bytes(second.read_bytes()[:-20])
    found = run("pyro", checkpoint=tmp_path, every=5)
    assert "checkpoint: went on from step 10" in found.messages
    assert_same(run("pyro"), found)
    for manifest in (first, second):
        manifest.write_bytes(b"{}")
    with pytest.raises(StorageError, match="schema"):
        run("pyro", checkpoint=tmp_path)


def test_two_fits_do_not_write_to_one_folder(tmp_path: Path) -> None:
    """Not at once: from this process and another one; a process that was killed holds nothing."""

    def other(now: Moment) -> None:
        with pytest.raises(StorageError, match="Another fit is writing checkpoints"):
            run("pyro", checkpoint=tmp_path, check_every=4)
        raise Ended

    with pytest.raises(Ended):
        run("pyro", checkpoint=tmp_path, every=2, check_every=4, callbacks=[other])
    assert_same(run("pyro", check_every=4), run("pyro", checkpoint=tmp_path, check_every=4))


# What is asked for.


def test_a_checkpoint_of_another_fit_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    options: dict[str, Any] = {"start": {"q_z_bias": np.array(0.3)}, "validation": X[:6]}
    run("pyro", checkpoint=tmp_path, **options)
    other = Program("rows", lambda ppl, x: ROWS.model(ppl, x), ROWS.guide, portable=True, arguments=("x",))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"data": X + 1e-12}, r"data\.x was float64 \(20,\) [0-9a-f]{32} and is float64 \(20,\) [0-9a-f]{32}\."),
        ({"data": X[:15]}, r"data\.x was .*\(20,\).* and is .*\(15,\)"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"learning_rate": 0.5}, r"recipe\.optimizer\.learning_rate was 0\.001 and is 0\.5"),
        ({"recipe": "iwae", "draws": 2}, r"recipe\.name was elbo and is iwae.*\(and \d+ more\)"),
        ({"recipe": CASES["stages"]["recipe"]}, r"recipe\."),
        ({"backend": "numpyro", "compile": "eager"}, "backend was pyro and is numpyro"),
        ({"compile": "graph"}, "compile was eager and is graph"),
        ({"dtype": "float32"}, "dtype was float64 and is float32"),
        ({"program": other}, r"program\.model was"),
        ({"missing": "mask"}, "missing was None and is mask"),
        ({"validation": X[:5]}, r"validation\.x was"),
        ({"validation": 0.25}, r"validation\.x was .* and is not given"),
        ({"start": None}, "start was .* and is None"),
        ({"start": None, "state": run("pyro", steps=2, validation=X[:6]).state}, "state was None and is step 2"),
        ({"data_plate": "data"}, "data_plate was None and is data"),
    ]
    for change, match in changes:
        asked = {"backend": "pyro", **options, **change}
        with pytest.raises(StorageError, match=f"is of another fit: .*{match}"):
            run(asked.pop("backend"), checkpoint=tmp_path, **asked)
    found = run("pyro", checkpoint=tmp_path, **options)
    assert "checkpoint: went on from step 12" in found.messages, "none of them has changed the checkpoint"
    again = run("pyro", checkpoint=tmp_path, **options | {"steps": 15})
    assert_same(run("pyro", **options | {"steps": 15}), again)


def test_what_belongs_to_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="every = 3 is of checkpoints"):
        run("pyro", every=3)
    for every in (0, -1, 2.0, True, "5"):
        with pytest.raises(StorageError, match="give a number of steps"):
            run("pyro", every=every, checkpoint=tmp_path)
    for folder in ("", 3, ["a"]):
        with pytest.raises(StorageError, match="give the path of a folder"):
            run("pyro", checkpoint=folder)
    with pytest.raises(RecipeError, match="checkpoint= was given, but recipe 'map' has a method"):
        fit(TOY, data=X, recipe="map", checkpoint=tmp_path)


def test_time_and_steps_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock where no number is asked for: every minute, and never more than a twentieth of the time."""
    now, written = [0.0], list[int]()
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def write(folder: Path, progress: Any) -> None:
        written.append(progress)
        now[0] += 10.0

    def steps(every: int | None) -> list[int]:
        kept = Checkpoint.of(tmp_path, every)
        monkeypatch.setattr(kept, "_write", write)
        kept.found(dict)
        written.clear()
        for step in range(100):
            kept.look(step, lambda step=step: step)  # type: ignore[misc]
            now[0] += 25.0
        kept.look(99, lambda: 99, last=True)  # type: ignore[arg-type, return-value]
        return list(written)

    assert steps(None) == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 99]
    assert steps(40) == [0, 40, 80, 99]
    kept = Checkpoint.of(tmp_path, 40)
    assert [kept.until(step) for step in (0, 39, 40, 41)] == [40, 1, 40, 39]
    assert Checkpoint.of(None, None).until(3) > 10**9


# The command line.


def command(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments, prog_name="ppl-lvm")


FITTED: tuple[str, ...] = ("fit", "probabilistic_pca", "--data", "rows.npy", "--set", "steps=8")
FITTED += ("--set", "batch_size=5", "--draws", "7")
FITTED += ("--option", "latent=1", "--dtype", "float64", "--validation", "0.2", "--seed", "2", "--backend")


@slow_on_numpyro
def test_the_command_line_goes_on_from_a_folder_alone(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder than the one where the fit began, whose data are a file there."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).normal(size=(20, 3)))
    whole = command(*FITTED, backend, "--out", "whole")
    assert whole.exit_code == 0, whole.output
    left, write = [3], store.write

    def end(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Ended
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", end)
        first = command(*FITTED, backend, "--out", "part", "--checkpoint", "kept", "--every", "2")
    assert isinstance(first.exception, Ended)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = command("resume", "../kept")
    assert found.exit_code == 0, found.output
    assert "checkpoint: went on from step 4" in found.stderr
    assert "Wrote part" in found.stdout
    folders = [tmp_path / name for name in ("whole", "part")]
    for file in ("history.csv", "validation.csv", "held_out.csv"):
        a, b = ((folder / file).read_bytes() for folder in folders)
        assert a == b, file
    names = [{path.name for path in (folder / "fit").iterdir()} for folder in folders]
    assert names[0] == names[1], "they hold the digests of their content"
    assert len(names[0]) > 3
    again = command("resume", str(tmp_path / "kept"))
    assert "checkpoint: went on from step 8" in again.stderr


def test_ctrl_c_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is a command that can be pasted; without a checkpoint the fit so far is saved."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).normal(size=(20, 3)))
    trainer = backends.load("pyro").Trainer
    steps = trainer.run

    def pressed(self: Any, *args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return steps(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "run", pressed)
        kept = command(*FITTED, "pyro", "--checkpoint", "my kept", "--every", "3")
        lost = command(*FITTED, "pyro", "--out", "runs/a")
    assert (kept.exit_code, lost.exit_code) == (130, 130)
    assert "Interrupted at step 3 of 8. `ppl-lvm resume 'my kept'` goes on from there." in kept.stderr
    assert "Interrupted at step 8 of 8. The fit so far is in 'runs/a-interrupted', for ppl_lvm.load." in lost.stderr
    assert load("runs/a-interrupted").state.step == 8
    assert not Path("runs/a").exists()
    done = command("resume", "my kept")
    assert done.exit_code == 0, done.output
    assert "checkpoint: went on from step 3" in done.stderr


def test_what_cannot_be_resumed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.zeros((20, 3)))
    run("pyro", checkpoint="python")
    held = checkpoint.newest("python")
    assert held is not None
    for arguments, said in (
        (("resume", "nothing"), "There is no checkpoint in 'nothing'; `ppl-lvm fit ... --checkpoint` writes them."),
        (("resume", "python"), "was written from Python; the same call of fit goes on from it."),
        ((*FITTED, "pyro", "--every", "3"), "every = 3 is of checkpoints; give a folder"),
        ((*FITTED, "pyro", "--out", "a", "--checkpoint", "a/b"), "is in the run folder 'a', which the run replaces"),
    ):
        found = command(*arguments)
        assert found.exit_code == 2, found.output
        assert said in found.stderr
    asked = {"where": ".", "program": "vae", "extra": 1}
    content = held.content.model_copy(update={"command": asked, "number": 9}).model_dump()
    store.write(Path("python") / "first", checkpoint.KIND, content, {"arrays": held.arrays})
    found = command("resume", "python")
    assert found.exit_code == 2
    assert "keeps no command that can be given again: data: Field required" in found.stderr


@slow_on_numpyro
def test_bits_do_not_depend_on_how_data_are_aligned(backend: str) -> None:
    """As rows of a slice are at another address than those of a copy; BLAS adds up in another order there."""
    x = np.random.default_rng(0).normal(size=(64, 33))
    held = np.empty(x.size + 16)
    found = []
    for offset in (0, 1, 3):
        start = (-held.ctypes.data % 64) // 8 + offset
        data = held[start : start + x.size].reshape(x.shape)
        data[:] = x
        options: dict[str, Any] = {"steps": 2, "batch_size": None, "compile": "eager", "learning_rate": 0.1}
        found.append(run(backend, program=program("probabilistic_pca", latent=1), data=data, **options))
    for other in found[1:]:
        assert_same(found[0], other)
