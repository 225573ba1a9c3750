"""Peak memory of importance weighting in chunks: K = 5,000 draws, 50 at a time, against K = 50 and K = 500 at once.

    python benchmarks/chunk_memory.py
    python benchmarks/chunk_memory.py --size images --backend pyro

Batches of 128 rows of the VAE: that of digits (64-128-8), or 784-400-20 of binary images of noise. A step is one of
IWAE; a likelihood is that of 128 rows by as many draws, which are taken in chunks whatever is asked for. Each has a
process of its own. What is counted is its peak above that of the same process after the same with one draw, in MiB.
glibc is told to give memory back at once, so that what is held is counted and not what the allocator keeps for later.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from typing import Any

BACKENDS = ("numpyro", "pyro")
STEPS = ((50, 0), (500, 0), (5000, 50))
"""Draws, and how many at a time; 0: all."""
LIKELIHOODS = ((50, 0), (5000, 0))


def peak() -> float:
    """The largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def workload(size: str) -> tuple[Any, Any]:
    """A program and its data."""
    import speed

    from ppl_lvm.datasets import load

    if size == "digits":
        return speed.shipped("vae"), load("digits").train
    work = speed.vae(1, 128)
    return work.program(), work.data()["x"]


def measure(size: str, what: str, backend: str, draws: int, chunk: int) -> None:
    """Prints the growth of one process."""
    from ppl_lvm import fit

    program, x = workload(size)
    options: dict[str, Any] = {"backend": backend, "steps": 2, "batch_size": 128, "progress_bar": False}
    run = fit(program, data=x, recipe="iwae", draws=1, **options)
    if what == "likelihood":
        run.log_likelihood(x[:128], draws=1)
    idle = peak()
    if what == "likelihood":
        run.log_likelihood(x[:128], draws=draws)
    else:
        fit(program, data=x, recipe="iwae", draws=draws, chunk=chunk or None, **options)
    print(f"{peak() - idle:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("digits", "images"), default="digits")
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--what", choices=("step", "likelihood"), action="append")
    parser.add_argument("--one", nargs=2, metavar=("DRAWS", "CHUNK"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        draws, chunk = map(int, asked.one)
        measure(asked.size, asked.what[0], asked.backend[0], draws, chunk)
        return
    print("| backend | what | draws | at a time | MiB above idle |\n|---|---|---|---|---|")
    for backend in asked.backend or BACKENDS:
        for what in asked.what or ("step", "likelihood"):
            for draws, chunk in STEPS if what == "step" else LIKELIHOODS:
                named = ["--size", asked.size, "--backend", backend, "--what", what]
                command = [sys.executable, __file__, *named, "--one", str(draws), str(chunk)]
                environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                at_once = chunk or ("all" if what == "step" else "its own")
                print(f"| {backend} | {what} | {draws:,} | {at_once} | {done.stdout.split()[-1]} |", flush=True)


if __name__ == "__main__":
    main()
