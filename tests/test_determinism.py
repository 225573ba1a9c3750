"""One seed, one machine, the same versions: the same bits, in processes that hash names in other orders.

Each process fits and asks, and prints a digest of every array. Processes of one test begin together in one folder, so
that what they write (compiled code, run folders) meets.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent


def digest(arrays: Mapping[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        for array in _leaves(arrays[name]):
            found.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()


def _leaves(value: Any) -> list[np.ndarray]:
    """An array, or the arrays of a network of equinox in their order."""
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(value)]


def few() -> dict[str, Mapping[str, Any]]:
    """Steps that run through handlers, that are traced, and that are compiled."""
    from test_isolation import one_fit, small, toy, trained

    return {
        "pyro eager": one_fit(toy(), "pyro", "float32", "eager", 0),
        "pyro graph": one_fit(toy(), "pyro", "float64", "graph", 0, trained),
        "numpyro compiled": one_fit(small(), "numpyro", "float32", "compiled", 0, trained),
    }


def many() -> dict[str, Mapping[str, Any]]:
    from test_isolation import map_fit, one_fit, toy

    return few() | {
        "pyro compiled": one_fit(toy(), "pyro", "float32", "compiled", 0),
        "numpyro eager": one_fit(toy(), "numpyro", "float32", "eager", 0),
        "numpyro compiled": one_fit(toy(), "numpyro", "float64", "compiled", 0),
        "pyro map": map_fit("pyro"),
        "numpyro map": map_fit("numpyro"),
    }


ALSO_COMPILED = ("gaussian_mixture", "hmm", "lds", "vae")
"""Shipped programs that are fitted on NumPyro too, where others take minutes to compile."""


def shipped() -> dict[str, Mapping[str, Any]]:
    """Every program in models/ with its own recipe, some steps."""
    from test_isolation import trained

    from ppl_lvm import fit, program, programs

    found: dict[str, Mapping[str, Any]] = {}
    for name in programs():
        example = program(name).example
        for backend in ("pyro", "numpyro")[: 1 + (name in ALSO_COMPILED)]:
            if example is not None:
                data = example(np.random.default_rng(0))
                run = fit(name, data=data, backend=backend, steps=3, batch_size=None, compile="auto")
                found[f"{name} {backend}"] = trained(run)
    return found


FITS: dict[str, Callable[[], dict[str, Mapping[str, Any]]]] = {"few": few, "many": many, "shipped": shipped}


def print_digests(which: str) -> None:
    print(json.dumps({name: digest(arrays) for name, arrays in FITS[which]().items()}))


def at_once(which: str, folder: Path) -> list[dict[str, str]]:
    """What two processes that hash strings differently print, begun together with one empty cache of compiled code."""
    processes = []
    for hashed in ("0", "1"):
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "XDG_CACHE_HOME": str(folder / "cache")}
        environment = {**os.environ, **caches, "PYTHONHASHSEED": hashed}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        code = f"import test_determinism; test_determinism.print_digests({which!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    first, second = at_once("few", tmp_path)
    assert first == second and len(first) == 3
    assert len({*first.values()}) == 3  # of other fits, other bits


@pytest.mark.slow
@pytest.mark.parametrize("which", ["many", "shipped"])
def test_two_processes_give_the_same_bits_of_everything(which: str, tmp_path: Path) -> None:
    first, second = at_once(which, tmp_path)
    assert first == second and first


CUT = """
from test_isolation import X, small
from ppl_lvm import fit

run = fit(small(), data=X, recipe="elbo", backend="pyro", compile="compiled", steps=5, guide="auto_normal")
print(run.state.mode, run.history["loss"].tobytes().hex())
"""


@pytest.mark.slow
def test_code_of_which_a_killed_process_left_a_part_is_compiled_again(tmp_path: Path) -> None:
    """torch takes a file of compiled code that is there for all of it."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])

    def said() -> str:
        command = [sys.executable, "-c", CUT]
        return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    whole = said()
    files = [*tmp_path.rglob("*.main.so")]  # of steps; torch asks by others what the processor can do
    assert whole.startswith("compiled ") and files
    for file in files:
        file.write_bytes(b"")
    assert said() == whole
