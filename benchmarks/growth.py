"""How time per step grows, what restarts cost, and how long it takes to the first step.

    python benchmarks/growth.py                              all of it, both backends, on the CPU
    python benchmarks/growth.py --what restarts --backend numpyro

growth    milliseconds a step while one size grows: rows of data N at one batch (should be flat), draws K, rows of a
          batch, latent sites of a program, steps of a sequence T. Sizes take turns in blocks of steps, in several
          rounds; a time is the median over blocks after the first.
restarts  a step of 64 restarts at once over a step of one, in turns.
fits      seconds of a whole fit of 5,000 steps as it is called, with compiling, in a process of its own where nothing
          was compiled before: one, and 64 restarts at once.
first     seconds to the first step: of a new process whose compiled work nobody has cached, of the next one, which
          finds it on the disk, and of a second fit in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import speed

BACKENDS = ("numpyro", "pyro")
KINDS = ("growth", "restarts", "fits", "first")
RESTARTS = 64
SMALL = {"two_site": 10_000, "mixture": 500, "eight_schools": 5_000}
"""Small models, and steps of a turn on NumPyro: a look at 64 restarts costs as much as hundreds of steps."""
WHOLE = 5000
"""Steps of a whole fit."""


class Case(NamedTuple):
    """A fit of one size."""

    program: Any
    """One, as a second fit of it finds its compiled steps."""
    data: Mapping[str, np.ndarray]
    options: Mapping[str, Any]
    block: int


def many_sites(n: int) -> Any:
    """n latent sites of the whole program, each seen through one number of every row."""
    from ppl_lvm.program import Program

    def model(ppl: Any, x: Any) -> None:
        values = [ppl.sample(f"z{i}", ppl.dist.Normal(0.0 * x[0, 0], 1.0)) for i in range(n)]
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(ppl.xp.stack(values), 1.0).to_event(1), obs=x)

    def guide(ppl: Any, x: Any) -> None:
        for i in range(n):
            loc = ppl.param(f"loc{i}", lambda: np.zeros(()))
            scale = ppl.param(f"scale{i}", lambda: np.ones(()), constraint=ppl.dist.constraints.positive)
            ppl.sample(f"z{i}", ppl.dist.Normal(loc, scale))

    return Program("many_sites", model, guide, portable=True, arguments=("x",))


def normal(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def chain() -> Any:
    return speed.shipped("svae_lds", latent=4, hidden=(32,))


ELBO = {"recipe": "elbo"}
AXES: dict[str, tuple[Sequence[int], Callable[[int], Case]]] = {
    "N, batch 100": (
        (1_000, 10_000, 100_000, 1_000_000),
        lambda n: Case(speed.pca(), normal(n, 10), {**ELBO, "batch_size": 100}, 100),
    ),
    "K, batch 100": (
        (1, 10, 100, 1_000),
        lambda k: Case(speed.pca(), normal(1_000, 10), {"recipe": "iwae", "draws": k, "batch_size": 100}, 20),
    ),
    "batch": (
        (100, 1_000, 10_000),
        lambda b: Case(speed.pca(), normal(20_000, 10), {**ELBO, "batch_size": b}, 20),
    ),
    "sites": ((1, 10, 30, 100), lambda n: Case(many_sites(n), normal(20, n), ELBO, 100)),
    "T, batch 16": (
        (10, 100, 1_000),
        lambda t: Case(chain(), normal(64, t, 10), {**ELBO, "batch_size": 16}, 10),
    ),
}


def blocks_of(case: Case, backend: str, mode: str, rounds: int, **more: Any) -> tuple[list[float], float]:
    """Seconds a step of every block after the first, and seconds until the first was over."""
    from ppl_lvm import fit

    took, start = [], time.perf_counter()

    def tick(moment: Any) -> None:
        nonlocal start
        if moment.restart:  # a callback is called for every restart, one after the other
            return
        now = time.perf_counter()
        took.append(now - start)
        start = now

    fit(
        case.program,
        data=case.data,
        backend=backend,
        compile=mode,
        steps=case.block * (rounds + 1),
        check_every=case.block,
        callbacks=[tick],
        progress_bar=False,
        **{**case.options, **more},
    )
    return [t / case.block for t in took[1:]], took[0]


def growth(
    backend: str, mode: str, rounds: int, axes: Sequence[str], only: Sequence[int] | None
) -> list[dict[str, Any]]:
    rows = []
    for axis in axes:
        sizes, make = AXES[axis]
        cases = {size: make(size) for size in sizes if only is None or size in only}
        times: dict[int, list[float]] = {size: [] for size in cases}
        first: dict[int, float] = {}
        for turn in range(2):  # the second turn compiles nothing
            for size, case in cases.items():
                found, begun = blocks_of(case, backend, mode, rounds)
                times[size] += found
                if turn == 0:
                    first[size] = begun
        ms = {size: 1e3 * median(found) for size, found in times.items()}
        rows.append({"backend": backend, "axis": axis, "ms": ms, "first": first})
        print(
            f"| {backend} | {axis} | " + " | ".join(f"{size:,}: {found:.3g}" for size, found in ms.items()) + " |",
            flush=True,
        )
    return rows


def restarts(backend: str, mode: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, block in SMALL.items():
        work = speed.WORKLOADS[name]
        case = Case(work.program(), dict(work.data()), work.options, block if backend == "numpyro" else 20)
        one, many = [], []
        for _ in range(3):
            one.append(median(blocks_of(case, backend, mode, rounds)[0]))
            many.append(median(blocks_of(case, backend, mode, rounds, restarts=RESTARTS)[0]))
        ratio = median(m / o for o, m in zip(one, many, strict=True))
        rows.append({"backend": backend, "workload": name, "one": median(one), "many": median(many), "ratio": ratio})
        print(f"| {backend} | {name} | {1e3 * median(one):.4f} | {1e3 * median(many):.4f} | {ratio:.2f} |", flush=True)
    return rows


def first_step(name: str, backend: str, mode: str) -> None:
    """In a process of its own: seconds of the import, of the first step, and of that of a second fit, as JSON."""
    begin = time.perf_counter()
    from ppl_lvm import backends, fit

    backends.load(backend)
    imported = time.perf_counter() - begin
    work, found = speed.WORKLOADS[name], []
    data = dict(work.data())
    for _ in range(2):
        begin = time.perf_counter()
        common = {"backend": backend, "batch_size": work.batch, "compile": mode, "progress_bar": False}
        fit(work.program(), data=data, steps=1, **common, **work.options)
        found.append(time.perf_counter() - begin)
    print(json.dumps({"import": imported, "first": found[0], "second": found[1]}))


def whole_fit(name: str, backend: str, mode: str, restarts: int) -> None:
    """In a process of its own, after the imports: seconds of a fit, as JSON."""
    from ppl_lvm import backends, fit

    backends.load(backend)
    work = speed.WORKLOADS[name]
    data = dict(work.data())
    common = {"backend": backend, "batch_size": work.batch, "compile": mode, "progress_bar": False}
    begin = time.perf_counter()
    fit(work.program(), data=data, steps=WHOLE, restarts=restarts, **common, **work.options)
    print(json.dumps(time.perf_counter() - begin))


def own_process(cache: str, *asked: str) -> Any:
    """What a process prints whose compiled work is in a folder."""
    where = {
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch",
    }
    command = [sys.executable, __file__, "--process", *asked]
    done = subprocess.run(command, env={**os.environ, **where}, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def fits(backend: str, mode: str) -> list[dict[str, Any]]:
    rows = []
    for name in SMALL:
        row: dict[str, Any] = {"backend": backend, "workload": name}
        for key, restarts in (("one", 1), ("many", RESTARTS)):
            with tempfile.TemporaryDirectory() as cache:
                asked = (name, "--backend", backend, "--compile", mode, "--restarts", str(restarts))
                row[key] = own_process(cache, *asked)
        rows.append(row)
        one, many = row["one"], row["many"]
        print(f"| {backend} | {name} | {one:.1f} | {many:.1f} | {many / one:.2f} |", flush=True)
    return rows


def first(backend: str, mode: str) -> list[dict[str, Any]]:
    rows = []
    for name in ("two_site", "vae_1", "svae_lds"):
        row: dict[str, Any] = {"backend": backend, "workload": name}
        with tempfile.TemporaryDirectory() as cache:
            for when in ("cold", "cached"):
                row[when] = own_process(cache, name, "--backend", backend, "--compile", mode)
        rows.append(row)
        cold, cached = row["cold"], row["cached"]
        print(
            f"| {backend} | {name} | {cold['import']:.1f} | {cold['first']:.1f} | {cached['first']:.1f} | "
            f"{cold['second']:.2f} |",
            flush=True,
        )
    return rows


TITLES = {
    "growth": "| backend | what grows | size: ms a step | | | |\n|---|---|---|---|---|---|",
    "restarts": f"| backend | workload | one, ms a step | {RESTARTS}, ms a step | ratio |\n|---|---|---|---|---|",
    "fits": f"| backend | workload | one, s | {RESTARTS}, s | ratio |\n|---|---|---|---|---|",
    "first": "| backend | workload | import, s | first step, s | cached on disk, s | second fit, s |\n"
    "|---|---|---|---|---|---|",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=KINDS, action="append")
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--compile", default="compiled", help="how Pyro's steps are: compiled, graph, eager")
    parser.add_argument("--axis", choices=list(AXES), action="append")
    parser.add_argument("--size", type=int, action="append", help="only these of the axes' sizes")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of steps of every size")
    parser.add_argument("--out", type=Path, help="a file for the numbers as JSON")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    parser.add_argument("--restarts", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process and asked.restarts:
        whole_fit(asked.process, asked.backend[0], asked.compile, asked.restarts)
        return
    if asked.process:
        first_step(asked.process, asked.backend[0], asked.compile)
        return
    found: dict[str, Any] = {}
    for what in asked.what or KINDS:
        print(TITLES[what], flush=True)
        found[what] = []
        for backend in asked.backend or BACKENDS:
            mode = asked.compile if backend == "pyro" else "auto"
            if what == "growth":
                found[what] += growth(backend, mode, asked.rounds, asked.axis or list(AXES), asked.size)
            elif what == "restarts":
                found[what] += restarts(backend, mode, asked.rounds)
            else:
                found[what] += {"fits": fits, "first": first}[what](backend, mode)
        print()
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
