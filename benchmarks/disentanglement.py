"""Codes of sprites: beta-TCVAE against the beta-VAE in MIG and SAP, at matched reconstruction.

    python benchmarks/disentanglement.py --seeds 0 1 2 3 4

Program `vae` with 6 latents on data `sprites` (16 x 16, 3,200 rows to fit and 800 to test), recipes `elbo` and `tcvae`
at several beta, 2,000 steps of 128 rows, Adam at 1e-3. On the test rows, in nats for each:

    log p(x | z)  reconstruction from draws of the guide
    KL            of the guide from the prior
    MIG, SAP      of posterior means for the factors shape, scale, x and y; orientation is left out, as a square looks
                  the same every quarter turn and an ellipse every half

A larger beta reconstructs worse under either, so they are compared where they reconstruct alike: a seed's scores of the
beta-VAE are interpolated linearly at the reconstruction of its beta-TCVAE.
"""

import argparse
from typing import Any

import numpy as np

from ppl_lvm import fit, program
from ppl_lvm.datasets import load
from ppl_lvm.disentanglement import mig, sap

BETAS = {"elbo": (1.0, 2.0, 4.0, 8.0), "tcvae": (2.0, 4.0, 8.0)}
FACTORS = ("shape", "scale", "x", "y")
COLUMNS = ("log p(x given z)", "KL", "MIG", "SAP")


def scores(recipe: str, beta: float, seed: int, steps: int, backend: str) -> np.ndarray:
    """Reconstruction, KL, MIG and SAP of one fit."""
    data = load("sprites")
    assert data.test_factors is not None
    sprites = program("vae", latent=6, likelihood="bernoulli")
    options: dict[str, Any] = {"beta": beta, "steps": steps, "batch_size": 128, "learning_rate": 1e-3}
    run = fit(sprites, data=data.train, recipe=recipe, backend=backend, seed=seed, progress_bar=False, **options)
    draws = run.posterior(50, data=data.test)
    reconstruction = draws.log_likelihood["x"].mean()
    kl = (draws.log_q - draws.log_p).mean() + reconstruction
    codes, factors = draws.values["z"].mean(0), {n: data.test_factors[n] for n in FACTORS}
    return np.array([reconstruction, kl, mig(codes, factors), sap(codes, factors)])


def matched(of_vae: np.ndarray, of_tcvae: np.ndarray) -> np.ndarray | None:
    """MIG and SAP of beta-TCVAE less those of the beta-VAE at its reconstruction; None outside of what those have.

    `of_vae [betas, 4]` and `of_tcvae [4]` are of one seed.
    """
    order = np.argsort(of_vae[:, 0])
    at, low, high = of_tcvae[0], of_vae[order[0], 0], of_vae[order[-1], 0]
    if not low <= at <= high:
        return None
    return np.array([of_tcvae[i] - np.interp(at, of_vae[order, 0], of_vae[order, i]) for i in (2, 3)])


def spread(x: np.ndarray) -> str:
    """Mean over seeds, and its standard error."""
    error = f" ({x.std(ddof=1) / np.sqrt(len(x)):.3f})" if len(x) > 1 else ""
    return f"{x.mean():.3f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--backend", choices=["pyro", "numpyro"], default="numpyro")
    asked = parser.parse_args()
    found: dict[tuple[str, float], np.ndarray] = {}
    print("| recipe | beta | " + " | ".join(COLUMNS) + " |\n|---|---|---|---|---|---|", flush=True)
    for recipe, betas in BETAS.items():
        for beta in betas:
            each = [scores(recipe, beta, seed, asked.steps, asked.backend) for seed in asked.seeds]
            found[recipe, beta] = np.stack(each)
            shown = " | ".join(spread(column) for column in found[recipe, beta].T)
            print(f"| `{recipe}` | {beta:g} | {shown} |", flush=True)
    print("\n| beta of `tcvae` | seeds | MIG less the beta-VAE's | SAP less the beta-VAE's |\n|---|---|---|---|")
    of_vae = np.stack([found["elbo", beta] for beta in BETAS["elbo"]], axis=1)
    for beta in BETAS["tcvae"]:
        pairs = [matched(vae, tcvae) for vae, tcvae in zip(of_vae, found["tcvae", beta], strict=True)]
        inside = np.stack([p for p in pairs if p is not None] or [np.full(2, np.nan)])
        count = sum(p is not None for p in pairs)
        print(f"| {beta:g} | {count} of {len(pairs)} | {spread(inside[:, 0])} | {spread(inside[:, 1])} |")


if __name__ == "__main__":
    main()
