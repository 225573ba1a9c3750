"""Clusters of bent shapes: a structured VAE with a mixture in its code, against a VAE and a mixture after it.

    python benchmarks/pinwheel.py --seeds 0 1 2

The pinwheel of Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), arXiv:1603.06277: points on five bent arms (data
`pinwheel`, 800 rows to fit, held-out rows to score). Three methods with the same networks, code of two numbers, batches
and steps:

    svae       program `svae_gmm` by recipe `svae`, at most 15 components, exact natural gradients
    johnson    the same without the gradient through the local factor's expected parameters (`correction = False`)
    vae        normal prior; afterwards scikit-learn's BayesianGaussianMixture of 15 on the codes' means

    purity     share of held-out rows whose arm is the commonest one of their component
    used       components with 1 % of the held-out rows or more
    LL         log p(x) of held-out rows in nats, by importance sampling (a lower bound in expectation)
"""

import argparse
import warnings
from typing import Any

import numpy as np
from sklearn.mixture import BayesianGaussianMixture

from ppl_lvm import fit, program
from ppl_lvm.datasets import load
from ppl_lvm.program import Program

METHODS = ("svae", "johnson", "vae")
COMPONENTS, HIDDEN = 15, 40


def vae_model(ppl: Any, x: Any) -> None:
    decoder = ppl.module("decoder", ppl.nets.MLP(2, 2, hidden=(HIDDEN, HIDDEN)))
    noise = ppl.param("noise", lambda: np.full(2, 0.3), constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(ppl.xp.zeros(2), 1.0).to_event(1))
        ppl.sample("x", ppl.dist.Normal(decoder(z), noise).to_event(1), obs=x)


def vae_guide(ppl: Any, x: Any) -> None:
    encoder = ppl.module("encoder", ppl.nets.MLP(2, 4, hidden=(HIDDEN, HIDDEN)))
    with ppl.plate("data", len(x)):
        code = encoder(x)
        ppl.sample("z", ppl.dist.Normal(code[..., :2], ppl.xp.exp(code[..., 2:])).to_event(1))


VAE = Program("gaussian_vae", vae_model, vae_guide, portable=True, arguments=("x",))


def purity(clusters: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows that have the commonest label of their cluster."""
    return float(sum(np.bincount(labels[clusters == k]).max() for k in np.unique(clusters)) / len(labels))


def run(method: str, seed: int, steps: int, backend: str) -> dict[str, float]:
    """Scores of one fit, and its seconds."""
    data = load("pinwheel")
    options: dict[str, Any] = {"steps": steps, "backend": backend, "seed": seed, "progress_bar": False}
    options["data"] = data.train
    if method == "vae":
        adam = {"name": "adam", "learning_rate": 1e-3}
        fitted = fit(VAE, recipe="elbo", kl="closed_form", batch_size=100, optimizer=adam, **options)
        codes = [fitted.posterior(200, x).values["z"].mean(0) for x in (data.train, data.test)]
        after = BayesianGaussianMixture(
            n_components=COMPONENTS,
            weight_concentration_prior=1.0 / COMPONENTS,
            max_iter=1000,
            n_init=5,
            random_state=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of five starts that has not converged is no news
            clusters = after.fit(codes[0]).predict(codes[1])
    else:
        chosen = program("svae_gmm", components=COMPONENTS, hidden=HIDDEN, correction=method == "svae")
        fitted = fit(chosen, recipe="svae", **options)
        drawn = fitted.posterior(200, data.test).values["c"].astype(int)
        clusters = np.stack([(drawn == k).sum(0) for k in range(COMPONENTS)]).argmax(0)
    return {
        "purity": purity(clusters, np.asarray(data.test_labels)),
        "used": float((np.bincount(clusters) >= 0.01 * len(clusters)).sum()),
        "LL": float(np.mean(fitted.log_likelihood(data.test, draws=500).values)),
        "seconds": fitted.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--backend", choices=["pyro", "numpyro"], default="numpyro")
    asked = parser.parse_args()
    print("| method | seed | purity | used | LL | seconds |\n|---|---|---|---|---|---|")
    for method in asked.methods:
        for seed in asked.seeds:
            s = run(method, seed, asked.steps, asked.backend)
            scores = f"{s['purity']:.3f} | {s['used']:.0f} | {s['LL']:.3f} | {s['seconds']:.0f}"
            print(f"| `{method}` | {seed} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
