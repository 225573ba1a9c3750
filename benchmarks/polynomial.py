"""Bits that minimise a polynomial, by every gradient through discrete draws: Liu et al. (2023), section 4.

    python benchmarks/polynomial.py --seeds 0 1 2

128 independent bits z, `min (1/128) E sum_i |z_i - 0.45|^p`, as pairs of logits from U(-0.01, 0.01); 64 draws a step,
Adam at 1e-3, 8,000 steps, every temperature 1. All zeros are best. The loss is exact, from the probabilities that were
learned. Straight-through and Gumbel gradients barely tell the two values apart; ReinMax is exact at p = 2.

Source: Liu, Dong, Liu, Yu, Gao (2023), arXiv:2304.08612.
"""

import argparse
from typing import Any

import numpy as np

from ppl_lvm import fit
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import Program

BITS, TARGET, DRAWS, STEPS, RATE = 128, 0.45, 64, 8000, 1e-3
POWERS = (1.5, 2.0, 3.0)
METHODS: dict[str, Any] = {
    "straight_through": "straight_through",
    "gapped_st": "gapped_st",
    "gumbel_softmax, hard": {"name": "gumbel_softmax", "hard": True},
    "gumbel_rao": "gumbel_rao",
    "score": "score",
    "rloo": "rloo",
    "reinmax": "reinmax",
}


def bits(power: float, seed: int) -> Program:
    """One-hots z with a term `-(1/128) sum_i |z_i1 - 0.45|^power`; no data."""
    start = np.random.default_rng(seed).uniform(-0.01, 0.01, size=(BITS, 2))

    def model(ppl: Any) -> None:
        z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=ppl.xp.zeros((BITS, 2))).to_event(1))
        ppl.factor("loss", -ppl.xp.mean(ppl.xp.abs(z[..., 1] - TARGET) ** power, axis=-1))

    def guide(ppl: Any) -> None:
        ppl.sample("z", ppl.dist.OneHotCategorical(logits=ppl.param("theta", start)).to_event(1))

    return Program("bits", model, guide, portable=True, arguments=())


def expected(theta: np.ndarray, power: float) -> float:
    """`(1/128) E sum_i |z_i - 0.45|^power`."""
    ones = 1.0 / (1.0 + np.exp(theta[:, 0] - theta[:, 1]))
    return float(np.mean(ones * (1.0 - TARGET) ** power + (1.0 - ones) * TARGET**power))


def run(
    method: str, power: float, seed: int, steps: int = STEPS, rate: float = RATE, backend: str = "numpyro"
) -> dict[str, float]:
    """The loss that one fit ends at, and its seconds."""
    fitted = fit(
        bits(power, seed),
        None,
        None,
        # Of the bound the factor alone: the site's own terms have no weight.
        {"objective": elbo(draws=DRAWS, weights=(("z", 0.0),)), "batch_size": None},
        backend=backend,
        estimator={"z": METHODS[method]},
        steps=steps,
        learning_rate=rate,
        seed=seed,
        progress_bar=False,
    )
    return {"loss": expected(fitted.params["theta"], power), "seconds": fitted.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--powers", nargs="+", type=float, default=[*POWERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--backend", choices=["pyro", "numpyro"], default="numpyro")
    asked = parser.parse_args()
    heads = [f"p = {power:g}" for power in asked.powers]
    print("| method | " + " | ".join(heads) + " | seconds |\n" + "|---" * (len(heads) + 2) + "|")
    print("| all zeros | " + " | ".join(f"{TARGET**p:.4f}" for p in asked.powers) + " | |", flush=True)
    for method in asked.methods:
        cells, seconds = [], []
        for power in asked.powers:
            found = [run(method, power, seed, asked.steps, backend=asked.backend) for seed in asked.seeds]
            losses = np.array([f["loss"] for f in found])
            error = f" ({losses.std(ddof=1) / len(losses) ** 0.5:.4f})" if len(losses) > 1 else ""
            cells.append(f"{losses.mean():.4f}{error}")
            seconds += [f["seconds"] for f in found]
        print(f"| {method} | " + " | ".join(cells) + f" | {np.mean(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
