"""Many short fits in one process: memory, open files and compiled code stay bounded.

    python benchmarks/load.py numpyro same --fits 1000

`same` fits one program again and again, as a service does; in `shapes` every fit has another number of rows, and in
`programs` another program, so that every one is compiled anew. Each fit is asked for a posterior, a log-likelihood and
predictions. Prints a line now and then: fits, megabytes of the process, open files, compiled code that is kept.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppl_lvm import backends, fit
from ppl_lvm.program import Program


class Reading(NamedTuple):
    """What a process holds after so many fits."""

    fits: int
    megabytes: float
    files: int
    compiled: int


def model(ppl: Any, x: Any, number: int = 0) -> None:
    w, scale = ppl.param("w", 0.5), ppl.param("scale", 0.7, constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(w * z, scale), obs=x)


def guide(ppl: Any, x: Any) -> None:
    a, scale = ppl.param("a", 0.1), ppl.param("b", 0.7, constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(a * x, scale))


def megabytes() -> float:
    """Of the process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def compiled(backend: str) -> int:
    """Compiled steps and evaluations that a backend keeps, its library's own included."""
    kept = len(backends.load(backend).STEPS)
    if backend == "numpyro":
        import jax

        kept += len(jax.devices()[0].client.live_executables())
    return kept


def readings(backend: str, kind: str, fits: int, every: int, mode: str = "auto") -> Iterator[Reading]:
    """What the process holds after every so many fits."""
    for i in range(fits):
        rows = 20 + (i if kind == "shapes" else 0)
        x = np.random.default_rng(i).normal(size=rows)
        own = partial(model, number=i) if kind == "programs" else model
        chosen = Program("toy", own, guide, portable=True, arguments=("x",))
        run = fit(chosen, data=x, recipe="elbo", backend=backend, seed=i, steps=5, compile=mode)
        for ask in (run.posterior, run.predictive):
            ask(3)
        run.log_likelihood(draws=10)
        if (i + 1) % every == 0:
            del run
            gc.collect()
            yield Reading(i + 1, megabytes(), len(os.listdir("/proc/self/fd")), compiled(backend))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("pyro", "numpyro"))
    parser.add_argument("kind", choices=("same", "shapes", "programs"))
    parser.add_argument("--fits", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--compile", default="auto")
    asked = parser.parse_args()
    for found in readings(asked.backend, asked.kind, asked.fits, asked.every, asked.compile):
        held = f"{found.megabytes:8.1f} MB {found.files:4d} files {found.compiled:5d} compiled"
        print(f"{found.fits:6d} fits {held}", flush=True)


if __name__ == "__main__":
    main()
