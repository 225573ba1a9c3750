"""An objective, an estimator and a program are one dropped file each: nothing else is touched, both backends run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

OBJECTIVE = '''"""The Renyi bound."""

from ppl_lvm import ops
from ppl_lvm.algorithm import Number, Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array


class dropped_renyi(Objective):
    """`E log mean w^(1 - alpha) / (1 - alpha)` per row; alpha = 0 is the importance-weighted bound."""

    verbs = frozenset({"joint"})
    alpha: Number = 0.5

    def __call__(self, d: Draws) -> Loss:
        power = 1.0 - self.alpha

        def bound(log_w: Array, axis: int) -> Array:
            return ops.log_mean_exp(power * log_w, axis) / power

        return Loss(-d.total(d.joint(bound, d.log_w)))
'''

ESTIMATOR = '''"""The measure-valued gradient of a Bernoulli."""

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, SiteDistribution, Variant
from ppl_lvm.ops import Array, stop_gradient


class dropped_measure_valued(Estimator):
    """`(h(1) - h(0)) grad p`: three program values a draw, of which the first is the draw."""

    site = "finite"

    def count(self, support: int) -> int:
        return 3

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        draw = dist.sample()
        xp = ops.xp(draw)
        one, zero = xp.ones_like(draw), xp.zeros_like(draw)
        p = xp.exp(dist.log_prob(one))
        moved = p - stop_gradient(p)
        return Variant(
            xp.where(index == 0, draw, xp.where(index == 1, one, zero)),
            weight=xp.where(index == 0, xp.ones_like(p), xp.zeros_like(p)),
            credit=xp.where(index == 0, xp.zeros_like(p), xp.where(index == 1, moved, -moved)),
        )
'''

PROGRAM = '''"""A coin seen through noise: z ~ Bernoulli(sigmoid(a)), x | z ~ Normal(z + b, 1)."""

recipe = "elbo"


def model(ppl, x):
    a, b = ppl.param("a", 0.3), ppl.param("b", -0.2)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=a))
        ppl.sample("x", ppl.dist.Normal(z + b, 1.0), obs=x)


def guide(ppl, x):
    c, d = ppl.param("c", 0.1), ppl.param("d", 0.4)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Bernoulli(logits=c + d * x))


def example(rng):
    return rng.normal(size=6)
'''

USE = '''
import sys
from pathlib import Path
import numpy as np
import ppl_lvm
from ppl_lvm import fit, program, programs
from ppl_lvm.catalogue import estimators, objectives

assert Path(ppl_lvm.__file__).is_relative_to(Path.cwd()), ppl_lvm.__file__
assert "dropped_coin" in programs() and "dropped_renyi" in objectives() and "dropped_measure_valued" in estimators()
x = np.random.default_rng(0).normal(size=6)
renyi, iwae = {"objective": {"name": "dropped_renyi", "alpha": 0.0}}, {"objective": "iwae"}


def gradient(recipe, backend, **options):
    """What one step of gradient descent at rate 1 took off each parameter."""
    run = fit(program("dropped_coin"), data=x, recipe=recipe, backend=backend, steps=1, learning_rate=1.0,
              optimizer="sgd", dtype="float64", **options)
    start = {"a": 0.3, "b": -0.2, "c": 0.1, "d": 0.4}
    return np.array([start[n] - float(run.params[n]) for n in "abcd"])


for backend in ("pyro", "numpyro"):
    for estimator in ("score", "vimco"):
        pair = [gradient(r, backend, draws=3, estimator=estimator) for r in (renyi, iwae)]
        assert np.abs(pair[0] - pair[1]).max() < 1e-12, (backend, estimator, pair)
    other = gradient({"objective": {"name": "dropped_renyi", "alpha": 0.5}}, backend, draws=3, estimator="vimco")
    assert np.abs(other - pair[1]).max() > 1e-3

    exact = gradient("elbo", backend, estimator="enumerate")
    drawn = {"draws": 100, "estimator": "dropped_measure_valued"}
    runs = np.stack([gradient("elbo", backend, seed=s, **drawn) for s in range(25)])
    error = runs.std(0, ddof=1) / 5.0
    assert (np.abs(runs.mean(0) - exact) < 4.5 * error).all(), (backend, runs.mean(0), exact, error)
    # Precise enough to tell: without its credits the guide's gradient would have mean zero.
    assert (np.abs(exact[2:]) > 9.0 * error[2:]).any(), (backend, exact, error)
print("dropped files work")
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources with three files more."""
    for folder in ("ppl_lvm", "models", "inference"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "ppl_lvm/objectives/dropped_renyi.py").write_text(OBJECTIVE)
    (tmp_path / "ppl_lvm/estimators/dropped_measure_valued.py").write_text(ESTIMATOR)
    (tmp_path / "models/linear/dropped_coin.py").write_text(PROGRAM)
    return tmp_path


def test_three_dropped_files_run_on_both_backends(checkout: Path) -> None:
    (checkout / "use.py").write_text(USE)
    done = subprocess.run([sys.executable, "use.py"], cwd=checkout, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dropped files work" in done.stdout
