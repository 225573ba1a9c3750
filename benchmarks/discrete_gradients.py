"""Bias, noise and cost of every gradient through discrete draws, on a VAE with 200 binary variables.

    python benchmarks/discrete_gradients.py --picture discrete_gradients.png

Program `discrete_vae` (200 variables of two categories) is fitted to digits by `reinmax`; then 8 held-out rows have
their variational logits as parameters of their own, from the fitted encoder. Measured is the gradient of their ELBO, KL
in closed form, in all 8 x 200 x 2 logits, over repeated runs of each estimator at K draws:

    bias   |mean - g| / |g|, from runs at the largest K, the runs' own noise taken out of the square
    noise  sqrt(trace of the covariance) / |g|, of one run
    cost   median milliseconds of one compiled run

g is unbiased and precise: for draws z of all bits, `pi_1 (1 - pi_1) (f(z, z_i = 1) - f(z, z_i = 0))` for each bit i,
which needs 200 more evaluations a draw (Titsias and Lazaro-Gredilla, 2015, Local Expectation Gradients). Its own
standard error, relative to |g|, is printed. The error beside a bias is that of a mean without one.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from ppl_lvm import backends, catalogue, fit, legality, program
from ppl_lvm.algorithm import Estimator
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.training import initial_extras
from ppl_lvm.datasets import load
from ppl_lvm.errors import LegalityError
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import Program

VARIABLES, ROWS, COUNT = 200, 8, 16
DRAWS = (1, 4, 16, 64)
OPTIONS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "gumbel_softmax": ({"temperature": 0.5, "hard": True}, {"temperature": 0.5}),
    "gumbel_rao": ({"temperature": 0.5, "samples": 10},),
}
"""Options other than the defaults."""


@dataclass(frozen=True)
class Checkpoint:
    """Rows, their logits `[rows, VARIABLES, 2]`, and the decoder's layers."""

    x: np.ndarray
    theta: np.ndarray
    decoder: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def trained(steps: int) -> Checkpoint:
    """A fit of the program, and what of it the measurement needs."""
    digits = load("digits")
    shape = {"variables": VARIABLES, "categories": 2}
    run = fit(
        program("discrete_vae", **shape),
        data=digits.train,
        recipe="elbo",
        backend="numpyro",
        kl="closed_form",
        estimator="reinmax",
        steps=steps,
        learning_rate=2e-3,
        progress_bar=False,
    )
    layers = {n: np.asarray(v, dtype=np.float64) for n, v in run.params.items()}

    def of(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        first, second = ([layers[f"{name}.layers.{i}.{leaf}"] for leaf in ("weight", "bias")] for i in (0, 1))
        return first[0], first[1], second[0], second[1]

    x = np.asarray(digits.test[:ROWS], dtype=np.float64)
    w, b, v, c = of("encoder")
    code = np.tanh(x / COUNT @ w.T + b) @ v.T + c
    return Checkpoint(x, code.reshape(ROWS, VARIABLES, 2), of("decoder"))


def of_logits(at: Checkpoint) -> Program:
    """The program with logits of rows as parameters and the decoder held."""

    def model(ppl: Any, x: Any) -> None:
        w, b, v, c = (ppl.xp.asarray(a) for a in at.decoder)
        with ppl.plate("data", ROWS):
            z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=ppl.xp.zeros((VARIABLES, 2))).to_event(1))
            hidden = ppl.xp.tanh(ppl.xp.reshape(z, (*z.shape[:-2], 2 * VARIABLES)) @ w.T + b)
            ppl.sample("x", ppl.dist.Binomial(COUNT, logits=hidden @ v.T + c).to_event(1), obs=x)

    def guide(ppl: Any, x: Any) -> None:
        theta = ppl.param("theta", at.theta)
        with ppl.plate("data", ROWS):
            ppl.sample("z", ppl.dist.OneHotCategorical(logits=theta).to_event(1))

    return Program("rows", model, guide, portable=True, arguments=("x",))


def reference(at: Checkpoint, draws: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of the negative ELBO `[ROWS, VARIABLES, 2]`, and its standard error."""
    w, b, v, c = at.decoder
    pi = expit(at.theta[..., 1] - at.theta[..., 0])
    step = w[:, 1::2] - w[:, 0::2]  # [hidden, VARIABLES]
    rng = np.random.default_rng(seed)

    def log_likelihood(hidden: np.ndarray) -> np.ndarray:
        logits = np.tanh(hidden) @ v.T + c
        return (at.x[:, None] * logits - COUNT * np.logaddexp(0.0, logits)).sum(-1)

    likelihood = np.zeros((2, ROWS, VARIABLES))
    for _ in range(draws):
        bits = rng.random((ROWS, VARIABLES)) < pi
        hidden = np.where(bits[:, None], w[:, 1::2], w[:, 0::2]).sum(-1)[:, None] + b
        up = 1.0 - 2.0 * bits
        here, flipped = log_likelihood(hidden), log_likelihood(hidden + up[..., None] * step.T)
        one = pi * (1.0 - pi) * up * (flipped - here)
        likelihood += one, one * one
    mean = likelihood[0] / draws
    error = np.sqrt(np.maximum(likelihood[1] / draws - mean**2, 0.0) / draws)
    # KL from uniform bits is log 2 less the entropy.
    kl = pi * (1.0 - pi) * (at.theta[..., 1] - at.theta[..., 0])
    return np.stack([mean - kl, kl - mean], -1), np.stack([error, error], -1)


def estimators() -> Iterator[tuple[str, Estimator]]:
    """All that there are, with their names in the table."""
    for name in catalogue.estimators():
        kind = catalogue.resolve("estimator", name, Path.cwd(), "The benchmark")
        assert issubclass(kind, Estimator)
        for options in OPTIONS.get(name, ({},)):
            said = ", ".join(f"{n} = {v}".lower() for n, v in options.items())
            yield (f"{name} ({said})" if said else name), kind(**options)


@dataclass(frozen=True)
class Measured:
    """Of one estimator at one K; gradients of `runs` runs `[runs, D]`, and milliseconds of one."""

    gradients: np.ndarray
    milliseconds: float

    def noise(self, scale: float) -> float:
        return float(np.sqrt(self.gradients.var(axis=0, ddof=1).sum()) / scale)

    def bias(self, g: np.ndarray, error: np.ndarray) -> tuple[float, float]:
        """Relative to |g|, and the standard error of a mean that had none."""
        mean, own = self.gradients.mean(0), self.gradients.var(axis=0, ddof=1).sum() / len(self.gradients)
        floor = own + (error**2).sum()
        square = ((mean - g) ** 2).sum() - floor
        scale = np.linalg.norm(g)
        return float(np.sqrt(max(square, 0.0)) / scale), float(np.sqrt(floor) / scale)


def measure(bound: Any, batch: Call, estimator: Estimator, draws: int, runs: int) -> Measured | None:
    """None where the estimator is not legal here."""
    objective = elbo(draws=draws, kl="closed_form")
    try:
        plan, _ = legality.plan(objective, {"z": estimator}, bound.structure)
    except LegalityError:
        return None
    found_states, found_own = initial_extras(objective, plan, batch)
    states = {s: jnp.asarray(v) for s, v in found_states.items()}
    own = {s: {n: jnp.asarray(v) for n, v in ps.items()} for s, ps in found_own.items()}

    @jax.jit
    def step(key: Any) -> Any:
        options = {"states": states, "own": own}
        return bound.gradients(bound.initial, batch, key, plan, objective, **options).params["theta"]

    keys = jax.random.split(jax.random.key(1), runs)
    found, seconds = [np.asarray(step(keys[0]))], []
    for key in keys[1:]:
        started = time.perf_counter()
        found.append(np.asarray(step(key)))
        seconds.append(time.perf_counter() - started)
    return Measured(np.stack(found).reshape(runs, -1), 1e3 * float(np.median(seconds)))


def picture(path: Path, table: Mapping[str, Mapping[int, Measured]], g: np.ndarray, error: np.ndarray) -> None:
    """Bias with two errors, noise against K, and the error of one run (both together) against its cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    bars, left, right = figure.subplots(1, 3)
    scale = float(np.linalg.norm(g))
    bars.set(xlabel="bias / |g|", xlim=(0.0, 1.0), yticks=[])
    bars.invert_yaxis()
    for i, (name, of_draws) in enumerate(table.items()):
        most = max(of_draws)
        bias, floor = of_draws[most].bias(g.ravel(), error.ravel())
        noise = [m.noise(scale) for m in of_draws.values()]
        style: Any = {"marker": "os^vDPX*"[i % 8], "color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        bars.barh(i, bias, xerr=2.0 * floor, color=style["color"], capsize=3.0)
        left.plot([*of_draws], noise, label=name, **style)
        total = [np.hypot(bias, n) for n in noise]
        right.plot([m.milliseconds for m in of_draws.values()], total, **style)
    for axes, x, y in ((left, "draws K", "noise / |g|"), (right, "milliseconds", "root mean squared error / |g|")):
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", nargs="+", type=int, default=[*DRAWS])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000, help="of the fit that the logits are from")
    parser.add_argument("--reference", type=int, default=4000, help="draws of the reference")
    parser.add_argument("--estimators", nargs="+", help="those of these names; all where not given")
    parser.add_argument("--picture", type=Path, help="a file for the picture")
    asked = parser.parse_args()
    at = trained(asked.steps)
    g, error = reference(at, asked.reference)
    scale = float(np.linalg.norm(g))
    relative = np.linalg.norm(error) / scale
    print(f"|g| = {scale:.4g}, standard error of the reference {relative:.4f} |g|, {asked.runs} runs\n")
    head = [f"noise, K = {k}" for k in asked.draws] + [f"ms, K = {k}" for k in asked.draws]
    print("| estimator | bias (error) | " + " | ".join(head) + " |\n" + "|---" * (2 + len(head)) + "|")
    library, table = backends.load("numpyro"), dict[str, dict[int, Measured]]()
    call = Call.of({"x": at.x})
    bound = library.Bound(of_logits(at), call, seed=0, dtype="float32")
    batch = bound.batch(call)
    for name, estimator in estimators():
        if asked.estimators and type(estimator).__name__ not in asked.estimators:
            continue
        found = {k: m for k in asked.draws if (m := measure(bound, batch, estimator, k, asked.runs)) is not None}
        if not found:
            continue
        table[name] = found
        bias, floor = found[max(found)].bias(g.ravel(), error.ravel())
        cells = [f"{bias:.3f} ({floor:.3f})"]
        for figure in (lambda m: f"{m.noise(scale):.3f}", lambda m: f"{m.milliseconds:.2f}"):
            cells += [figure(found[k]) if k in found else "-" for k in asked.draws]
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)
    if asked.picture is not None:
        picture(asked.picture, table, g, error)


if __name__ == "__main__":
    main()
