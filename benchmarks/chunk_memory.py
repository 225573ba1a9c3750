"""Peak memory of importance weighting in chunks: K = 5,000 draws, 50 at a time, against K = 50 and K = 500 at once.

    python benchmarks/chunk_memory.py

Each fit of the VAE to digits (batches of 128, IWAE, three steps) has a process of its own. What is counted is its peak
above that of the same process after a fit of one draw, in MiB. glibc is told to give memory back at once, so that what
is held is counted and not what the allocator keeps for later.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

CASES = ((50, None), (500, None), (5000, 50))
"""Draws, and how many at a time."""


def peak() -> float:
    """The largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(backend: str, draws: int, chunk: int | None) -> None:
    """Prints the growth of one process."""
    from ppl_lvm import fit
    from ppl_lvm.datasets import load

    x = load("digits").train
    options = {"backend": backend, "steps": 3, "batch_size": 128, "progress_bar": False}
    fit("vae", data=x, recipe="iwae", draws=1, **options)  # type: ignore[arg-type]
    idle = peak()
    fit("vae", data=x, recipe="iwae", draws=draws, chunk=chunk, **options)  # type: ignore[arg-type]
    print(f"{peak() - idle:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("BACKEND", "DRAWS", "CHUNK"))
    asked = parser.parse_args()
    if asked.one:
        backend, draws, chunk = asked.one
        measure(backend, int(draws), int(chunk) or None)
        return
    print("| backend | draws | at a time | MiB above idle |\n|---|---|---|---|")
    for backend in ("numpyro", "pyro"):
        for draws, chunk in CASES:
            command = [sys.executable, __file__, "--one", backend, str(draws), str(chunk or 0)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found = done.stdout.split()[-1]
            print(f"| {backend} | {draws:,} | {chunk or 'all'} | {found} |", flush=True)


if __name__ == "__main__":
    main()
