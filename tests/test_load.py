"""Long-lived processes and large results, measured: memory, open files and compiled code stay bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("pyro", "numpyro")
on_both = pytest.mark.parametrize("backend", BACKENDS)


def apart(script: str, *arguments: object, timeout: int = 900) -> Any:
    """What a script prints as JSON in a process of its own, whose memory is its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "JAX_PLATFORMS": "cpu"}
    # Memory that is given back is given back at once, so that what is held is measured.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


FITS = """
import json, sys
from load import readings
backend, kind, fits, every, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
print(json.dumps([list(found) for found in readings(backend, kind, fits, every, mode)]))
"""


def held(backend: str, kind: str, fits: int, every: int, mode: str = "auto") -> tuple[list[Any], ...]:
    """Megabytes, open files and compiled steps after every so many fits."""
    found = apart(FITS, backend, kind, fits, every, mode)
    return [f[1] for f in found], [f[2] for f in found], [f[3] for f in found]


@pytest.mark.slow
@on_both
def test_a_thousand_fits_hold_no_more_than_a_few(backend: str) -> None:
    """JAX keeps some 16 KB of its own for every fit, as it traces functions that are new."""
    megabytes, files, compiled = held(backend, "same", 1000, 100)
    assert len(megabytes) == 10
    assert megabytes[-1] - megabytes[0] < 30
    assert set(files) == {files[0]}
    assert set(compiled) == {compiled[0]}


@pytest.mark.slow
def test_compiled_code_of_ever_other_shapes_is_let_go() -> None:
    """JAX would keep 25 computations and 50 MB of every fit."""
    script = "from ppl_lvm.backends import _jax_memory\n_jax_memory.MOST_LEFT = 60\n" + FITS
    found = apart(script, "numpyro", "shapes", 12, 1, "auto")
    compiled, megabytes = [f[3] for f in found], [f[1] for f in found]
    assert max(compiled) < 60 + 2 * 40
    # It goes up for two or three fits and down again; five more fits would have made it 250 MB more.
    assert max(megabytes[8:]) - max(megabytes[3:7]) < 80


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "kind"), [("pyro", "shapes"), ("pyro", "programs")])
def test_fits_that_are_each_traced_anew_keep_the_last_ones(backend: str, kind: str) -> None:
    megabytes, files, compiled = held(backend, kind, 200, 40, "graph")
    assert set(files) == {files[0]}
    assert max(compiled) == 32
    assert megabytes[-1] - megabytes[1] < 0.1 * megabytes[1]


STREAM = """
import json, resource, sys, tempfile
from collections.abc import Iterator
import numpy as np
from ppl_lvm import fit, program

backend, rows, draws = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

class Rows:
    def __iter__(self):
        for first in range(0, rows, 5000):
            yield np.random.default_rng(first).normal(size=(5000, 3)).astype("float32")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

pca = program("probabilistic_pca", latent=2)
run = fit(pca, data=next(iter(Rows())), backend=backend, steps=2, batch_size=500, compile="eager")
with tempfile.TemporaryDirectory() as folder:
    before = peak()
    path = run.write_posterior(folder + "/a.nc", draws, Rows())
    import xarray
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        z = tree["posterior"]["z"]
        assert z.shape == (1, draws, rows, 2), z.shape
        last = z[0, :, -3:].values
        assert np.isfinite(last).all() and len(np.unique(last)) == last.size
    print(json.dumps([before, peak(), path.stat().st_size / 2**20]))
"""


@pytest.mark.slow
@on_both
def test_a_posterior_of_a_million_rows_takes_the_memory_of_few(backend: str) -> None:
    (_, few, small), (_, many, large) = (apart(STREAM, backend, rows, 10) for rows in (100_000, 1_000_000))
    assert large > 9 * small > 90  # megabytes: it is all there
    assert many - few < 32


LIMITED = """
import json, resource, sys
import numpy as np
from ppl_lvm import fit, program
from ppl_lvm.errors import TooLargeError

backend, megabytes = sys.argv[1], int(sys.argv[2])
x = np.random.default_rng(0).normal(size=(2000, 20)).astype("float32")
pca = program("probabilistic_pca", latent=2)
run = fit(pca, data=x, backend=backend, steps=2, batch_size=100, compile="eager")
run.log_likelihood(x[:100], draws=100)
# What there is of addresses now, and so much more.
there = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (there + megabytes * 2**20, resource.RLIM_INFINITY))
found = run.log_likelihood(draws=2000)
assert np.isfinite(found.values).all()
import ppl_lvm.fitted, ppl_lvm.posterior
ppl_lvm.fitted.ENTRIES = ppl_lvm.posterior.CHUNK = 2**60  # nothing but the limit cuts them now
again = run.log_likelihood(draws=2000)
assert np.isfinite(again.values).all()
refused = ""
try:
    fit(pca, data=x, backend=backend, steps=1, recipe="iwae", draws=20_000, compile="eager")
except TooLargeError as error:
    refused = str(error)
print(json.dumps([found.mean, again.mean, refused, run.messages]))
"""


@pytest.mark.slow
@on_both
def test_work_under_a_limit_of_memory_is_cut_to_it(backend: str) -> None:
    """2,000 draws of 2,000 rows are 16 GB; 300 MB more than the process has are enough."""
    mean, again, refused, messages = apart(LIMITED, backend, 300)
    assert abs(mean - again) < 0.5
    assert "takes up to" in refused and "batch_size" in refused
    assert not any("did not fit" in message for message in messages)  # it was known before
