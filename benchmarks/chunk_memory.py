"""Peak memory of importance weighting in chunks: K = 5,000 draws, 50 at a time, against K = 50 and K = 500 at once.

    python benchmarks/chunk_memory.py
    python benchmarks/chunk_memory.py --size images --backend pyro

Batches of 128 rows of the VAE: that of digits (64-128-8), or 784-400-20 of binary images of noise. Each fit (IWAE, two
steps) has a process of its own. What is counted is its peak above that of the same process after a fit of one draw, in
MiB. glibc is told to give memory back at once, so that what is held is counted, not what the allocator keeps for later.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from typing import Any

BACKENDS = ("numpyro", "pyro")
CASES = ((50, 0), (500, 0), (5000, 50))
"""Draws, and how many at a time; 0: all."""


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


def measure(size: str, backend: str, draws: int, chunk: int) -> None:
    """Prints the growth of one process."""
    from ppl_lvm import fit

    program, x = workload(size)
    options: dict[str, Any] = {"backend": backend, "steps": 2, "batch_size": 128, "progress_bar": False}
    fit(program, data=x, recipe="iwae", draws=1, **options)
    idle = peak()
    fit(program, data=x, recipe="iwae", draws=draws, chunk=chunk or None, **options)
    print(f"{peak() - idle:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("digits", "images"), default="digits")
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--one", nargs=2, metavar=("DRAWS", "CHUNK"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        draws, chunk = map(int, asked.one)
        measure(asked.size, asked.backend[0], draws, chunk)
        return
    print("| backend | draws | at a time | MiB above idle |\n|---|---|---|---|")
    for backend in asked.backend or BACKENDS:
        for draws, chunk in CASES:
            named = ["--size", asked.size, "--backend", backend]
            command = [sys.executable, __file__, *named, "--one", str(draws), str(chunk)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            print(f"| {backend} | {draws:,} | {chunk or 'all'} | {done.stdout.split()[-1]} |", flush=True)


if __name__ == "__main__":
    main()
