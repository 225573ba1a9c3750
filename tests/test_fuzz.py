"""Saved fits and recipes under a coverage-guided fuzzer: nothing but our own errors, and nothing run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest

from ppl_lvm.errors import PplLvmError, StorageError

HERE = Path(__file__).resolve().parent


def planted(data: bytes) -> None:
    """A fault behind four conditions, each of which a single byte meets."""
    if data[:1] != b"\x00":
        raise StorageError("no")
    if data[1:2] != b"\x22":
        raise StorageError("no")
    if data[2:3] != b"\x5b":
        raise StorageError("no")
    if data[3:4] == b"\x7b":
        raise ZeroDivisionError


def found_by(guided: bool) -> fuzz.Found:
    mutate = fuzz.of_bytes([b"\x00"])
    return fuzz.fuzz(planted, [b"abcdef"], mutate, PplLvmError, ("test_fuzz.py",), runs=8000, seed=0, guided=guided)


def test_coverage_leads_the_fuzzer_to_a_fault_that_chance_does_not_find() -> None:
    found = found_by(guided=True)
    assert found.failure is not None and "ZeroDivisionError" in found.failure
    assert found.input[:4] == b"\x00\x22\x5b\x7b"
    assert found_by(guided=False).failure is None


def test_a_hang_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def hung(*_: object) -> None:
        raise fuzz.Hung

    def forever(data: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    before = signal.signal(signal.SIGALRM, hung)
    try:
        found = fuzz.fuzz(forever, [b""], fuzz.of_bytes([b""]), PplLvmError, ("test_fuzz.py",), runs=1, seed=0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert found.failure is not None and "Hung" in found.failure


def test_mutations_of_json_stay_json() -> None:
    mutate, random = fuzz.of_json(lambda _, data: data), np.random.default_rng(0)
    data, seen = b'{"a": [1, {"b": 2.5}], "c": "x"}', set()
    for _ in range(200):
        seen.add(mutate(random, data))
    assert len(seen) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "runs"), [("manifest", 1500), ("arrays", 1000), ("metrics", 600), ("recipe", 4000), ("named", 6000)]
)
def test_nothing_but_our_own_errors_comes_out(target: str, runs: int) -> None:
    """In a process of its own, under limits of memory and of the time of one input."""
    command = [sys.executable, str(HERE / "fuzz.py"), target, "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{target}: {runs} inputs" in done.stdout
