"""Work in several processes: order, failures, processes that end, and those that are stopped."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ppl_lvm.errors import DataError
from ppl_lvm.jobs import ONE_THREAD, Failed, each


def work(piece: int | str) -> tuple[int | str, dict[str, str | None]]:
    if piece == "refuse":
        raise DataError("no rows\nat all")
    if piece == "fail":
        raise ZeroDivisionError("a bug")
    if piece == "end":
        os._exit(7)
    return piece, {name: os.environ.get(name) for name in ONE_THREAD}


def sleep(path: str) -> None:
    Path(path).touch()
    time.sleep(600)


def test_every_piece_has_its_result_or_its_failure() -> None:
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    pieces: list[int | str] = [1, "refuse", "end", "fail", 2, 3]
    found = dict(each(work, pieces, 2))
    assert sorted(found) == list(range(6))
    threads = dict.fromkeys(ONE_THREAD, "1")
    assert [found[i] for i in (0, 4, 5)] == [(1, threads), (2, threads), (3, threads)]
    assert found[1] == Failed("no rows")
    assert found[2] == Failed("The process ended with exit code 7.")
    failed = found[3]
    assert isinstance(failed, Failed) and failed.error == "ZeroDivisionError: a bug" and "in work" in failed.traceback
    assert {name: os.environ.get(name) for name in ONE_THREAD} == before
    assert not multiprocessing.active_children()


def test_one_job_stays_in_this_process_and_in_order() -> None:
    pieces: list[int | str] = [1, "refuse", 2]
    found = list(each(work, pieces, 1))
    assert [number for number, _ in found] == [0, 1, 2] and found[1][1] == Failed("no rows")
    assert found[2][1] == (2, {name: os.environ.get(name) for name in ONE_THREAD})


def test_processes_are_stopped_when_nobody_waits_any_more(tmp_path: Path) -> None:
    def interrupt(piece: int | str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(each(interrupt, [1], 1))
    pieces: list[int | str] = [1, str(tmp_path / "begun")]
    results = each(work_or_sleep, pieces, 2)
    next(results)
    results.close()
    assert not multiprocessing.active_children()


def work_or_sleep(piece: int | str) -> int:
    if isinstance(piece, str):
        sleep(piece)
    return 0
