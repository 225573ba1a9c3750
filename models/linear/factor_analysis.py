"""Factor analysis: a linear map of a Gaussian latent, seen through Gaussian noise of a scale per feature.

    z ~ Normal(0, I)                               [latent]
    x | z ~ Normal(W z + mu, diag(sigma)^2)        [features];  W [features, latent]
    q(z | x) = Normal(A x + b, L L^T)              one covariance for all rows

The exact posterior is Normal(P W^T diag(sigma)^-2 (x - mu), P) with P = (I + W^T diag(sigma)^-2 W)^-1. The guide's
family holds it, so at the ELBO's optimum the bound is tight and W, mu, sigma maximise the likelihood, W up to a
rotation of z.

Source: Rubin and Thayer (1982), EM Algorithms for ML Factor Analysis, Psychometrika 47(1).

Args:
    x: real numbers [rows, features].
    latent: dimension of z, less than the number of features.
"""

import numpy as np

recipe = "elbo"


def model(ppl, x, *, latent=2):
    features = x.shape[-1]
    # W = 0 is a saddle point, so the start is random; any such start will do, so its seed is fixed.
    W = ppl.param("W", lambda: 0.1 * np.random.default_rng(0).normal(size=(features, latent)))
    mu = ppl.param("mu", lambda: np.zeros(features))
    sigma = ppl.param("sigma", lambda: np.ones(features), constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(ppl.xp.zeros(latent), 1.0).to_event(1))
        ppl.sample("x", ppl.dist.Normal(z @ W.T + mu, sigma).to_event(1), obs=x)


def guide(ppl, x, *, latent=2):
    encoder = ppl.module("encoder", ppl.nets.Linear(x.shape[-1], latent))
    L = ppl.param("L", lambda: np.eye(latent), constraint=ppl.dist.constraints.lower_cholesky)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.MultivariateNormal(encoder(x), scale_tril=L))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 5)).astype(np.float32)
