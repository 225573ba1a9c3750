"""Pieces of work in several processes: one that fails, or takes its process with it, leaves the others alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from ppl_lvm.errors import PplLvmError

Piece = TypeVar("Piece")
Result = TypeVar("Result")

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
"""What OpenMP, MKL, OpenBLAS and XLA take their number of threads from."""


@dataclass(frozen=True)
class Failed:
    """How a piece of work failed: its error in a line, and the traceback where nobody raised it on purpose."""

    error: str
    traceback: str = ""


def each(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], jobs: int
) -> Generator[tuple[int, Result | Failed], None, None]:
    """`(number, work(piece))` of every piece, as they are done; in this process if `jobs` is 1, in order.

    Otherwise in as many new processes, with one thread each for what they calculate; `work`, pieces and results are
    pickled. Processes are stopped when the iterator is closed, and do not see a keyboard's interrupt themselves.
    """
    if jobs == 1:
        for number, piece in enumerate(pieces):
            yield number, _done(work, piece)
        return
    waiting = list(reversed(list(enumerate(pieces))))
    idle: list[tuple[Connection, BaseProcess]] = []
    busy: dict[Connection, tuple[BaseProcess, int]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                pipe, process = idle.pop() if idle else _start(work)
                number, piece = waiting.pop()
                busy[pipe] = process, number
                pipe.send(piece)
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, number = busy.pop(ready)
                result: Any
                try:
                    result = ready.recv()
                except EOFError:
                    process.join()
                    ready.close()
                    result = Failed(f"The process ended with exit code {process.exitcode}.")
                else:
                    idle.append((ready, process))
                yield number, result
    finally:
        processes = [process for _, process in idle] + [process for process, _ in busy.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _start(work: Callable[..., object]) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, there))
    with _one_thread():
        process.start()
    there.close()
    return here, process


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The environment in which a process starts; libraries read it when they are imported."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(work: Callable[[Any], object], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard's interrupt is the caller's to handle
    while True:
        try:
            piece = pipe.recv()
        except EOFError:
            return
        pipe.send(_done(work, piece))


def _done(work: Callable[[Piece], Result], piece: Piece) -> Result | Failed:
    try:
        return work(piece)
    except PplLvmError as error:
        return Failed(_line(error))
    except Exception as error:
        return Failed(f"{type(error).__name__}: {_line(error)}", traceback.format_exc())


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
