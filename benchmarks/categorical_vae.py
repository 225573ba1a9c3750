"""Categorical VAEs under biased gradients: how far each fit gets, and the cosine of its gradient to the exact one.

    PPL_LVM_DATA=... python benchmarks/categorical_vae.py --codes 8x4 10x30

Program `discrete_vae` on 8,000 rows of mnist10k_binary (one hidden layer of 512 units, batches of 100, KL in closed
form), 2,000 rows held out. Every method has the same steps and the same grid of learning rates, and is reported at the
one that is best on its training rows; temperatures are those that the literature uses. Nats per row, negative ELBO of
hard draws.

    PPL_LVM_DATA=... python benchmarks/categorical_vae.py --cosine

The gradient of 16 rows' ELBO in their 8 x 4 variational logits: cosine of the mean of 512 draws to the exact one (a sum
over all 65,536 codes), at the start and at a checkpoint that `reinmax` trained.

Liu, Dong, Liu, Yu, Gao (2023), Bridging Discrete and Backpropagation, arXiv:2304.08612, sections 5 and 6.
"""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from discrete_gradients import measure
from scipy.special import log_softmax

from ppl_lvm import Fit, backends, catalogue, fit, program
from ppl_lvm.algorithm import Estimator
from ppl_lvm.backends.base import Call
from ppl_lvm.datasets import load
from ppl_lvm.program import Program

METHODS: Mapping[str, Mapping[str, Any]] = {
    "reinmax": {"name": "reinmax", "temperature": 1.3},
    "reinmax, 1": {"name": "reinmax"},
    "straight_through": {"name": "straight_through"},
    "gumbel_softmax, hard, 0.5": {"name": "gumbel_softmax", "hard": True, "temperature": 0.5},
    "gumbel_softmax, hard, 1": {"name": "gumbel_softmax", "hard": True, "temperature": 1.0},
    "gapped_st, 0.5": {"name": "gapped_st", "temperature": 0.5},
    "gumbel_rao, 0.5": {"name": "gumbel_rao", "temperature": 0.5, "samples": 20},
    "rloo": {"name": "rloo"},
}
HIDDEN, TRAIN, ROWS = 512, 8000, 16


def trained(x: np.ndarray, code: tuple[int, int], method: Mapping[str, Any], rate: float, steps: int, seed: int) -> Fit:
    options: dict[str, Any] = {"variables": code[0], "categories": code[1], "hidden": HIDDEN}
    return fit(
        program("discrete_vae", likelihood="bernoulli", **options),
        data=x,
        recipe="elbo",
        kl="closed_form",
        draws=2 if method["name"] == "rloo" else 1,
        estimator=method,
        learning_rate=rate,
        steps=steps,
        batch_size=100,
        backend="numpyro",
        seed=seed,
        progress_bar=False,
    )


def loss(run: Fit, x: np.ndarray) -> float:
    """Of one hard draw a row."""
    return -float(run.log_likelihood(x, draws=1).mean)


def fits(x: np.ndarray, codes: list[str], methods: list[str], rates: list[float], steps: int, seed: int) -> None:
    print("| code | method | learning rate | training rows | held-out rows |\n|---|---|---|---|---|")
    for text in codes:
        variables, categories = map(int, text.split("x"))
        for name in methods:
            found = []
            for rate in rates:
                run = trained(x[:TRAIN], (variables, categories), METHODS[name], rate, steps, seed)
                found.append((loss(run, x[:TRAIN]), loss(run, x[TRAIN:]), rate))
            train, held, rate = min(found)
            print(f"| {text} | `{name}` | {rate:g} | {train:.2f} | {held:.2f} |", flush=True)


def cosines(x: np.ndarray, methods: list[str], steps: int, seed: int) -> None:
    print("| method | at the start | trained |\n|---|---|---|")
    columns = []
    for trained_steps in (1, steps):
        run = trained(x[:TRAIN], (8, 4), METHODS["reinmax"], 5e-4, trained_steps, seed)
        columns.append(at_checkpoint(run, x[TRAIN : TRAIN + ROWS].astype(np.float64), methods))
    for name in methods:
        print(f"| `{name}` | " + " | ".join(f"{column[name]:.3f}" for column in columns) + " |")


def at_checkpoint(run: Fit, x: np.ndarray, methods: list[str]) -> dict[str, float]:
    """The cosine of each method."""
    p = {n: np.asarray(v, dtype=np.float64) for n, v in run.params.items()}
    leaves = [f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")]
    (w, b, v, c), (wd, bd, vd, cd) = ([p[f"{net}.{leaf}"] for leaf in leaves] for net in ("encoder", "decoder"))
    theta = (np.tanh(x @ w.T + b) @ v.T + c).reshape(ROWS, 8, 4)

    def model(ppl: Any, x: Any) -> None:
        weight, bias, out, last = (ppl.xp.asarray(a) for a in (wd, bd, vd, cd))
        with ppl.plate("data", ROWS):
            z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=ppl.xp.zeros((8, 4))).to_event(1))
            hidden = ppl.xp.tanh(ppl.xp.reshape(z, (*z.shape[:-2], 32)) @ weight.T + bias)
            ppl.sample("x", ppl.dist.Bernoulli(logits=hidden @ out.T + last).to_event(1), obs=x)

    def guide(ppl: Any, x: Any) -> None:
        logits = ppl.param("theta", theta)
        with ppl.plate("data", ROWS):
            ppl.sample("z", ppl.dist.OneHotCategorical(logits=logits).to_event(1))

    log_pi = log_softmax(theta, -1)
    sums = np.zeros((ROWS, 8, 4))  # E f 1[z_i = v]
    for first in itertools.product(range(4), repeat=2):
        states = np.array([(*first, *rest) for rest in itertools.product(range(4), repeat=6)])
        at = np.eye(4)[states]  # [codes, 8, 4]
        logits = np.tanh(at.reshape(len(at), 32) @ wd.T + bd) @ vd.T + cd
        f = x @ logits.T - np.logaddexp(0.0, logits).sum(1)
        q = np.exp(np.einsum("siv,riv->rs", at, log_pi))
        sums += np.einsum("rs,siv->riv", q * f, at)
    pi = np.exp(log_pi)
    kl = pi * (log_pi - (pi * log_pi).sum(-1, keepdims=True))
    exact = kl - (sums - pi * sums.sum(-1, keepdims=True))
    call = Call.of({"x": x})
    bound = backends.load("numpyro").Bound(
        Program("rows", model, guide, portable=True, arguments=("x",)), call, seed=0, dtype="float32"
    )
    found = {}
    for name in methods:
        options = dict(METHODS[name])
        kind = catalogue.resolve("estimator", options.pop("name"), Path.cwd(), "The benchmark")
        assert issubclass(kind, Estimator)
        measured = measure(bound, bound.batch(call), kind(**options), 16, 32)
        assert measured is not None
        mean = measured.gradients.mean(0)
        found[name] = float(mean @ exact.ravel() / np.linalg.norm(mean) / np.linalg.norm(exact))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", nargs="+", default=["8x4", "10x30"], help="variables x categories")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 2e-3])
    parser.add_argument("--steps", type=int, default=1600, help="80 are an epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cosine", action="store_true")
    asked = parser.parse_args()
    data = load("mnist10k_binary")
    x = np.concatenate([data.train, data.test])[: TRAIN + 2000].astype(np.float32)
    if asked.cosine:
        cosines(x, asked.methods, asked.steps, asked.seed)
    else:
        fits(x, asked.codes, asked.methods, asked.rates, asked.steps, asked.seed)


if __name__ == "__main__":
    main()
