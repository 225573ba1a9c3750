"""A linear dynamical system, with its smoothing distribution for a guide.

    z_1 ~ Normal(m, I),  z_t | z_{t-1} ~ Normal(A z_{t-1} + b, diag(q))       z_t: `latent` numbers, t = 1 .. T
    x_t | z_t ~ Normal(C z_t + d, diag(r))
    q(z | x) = p(z) prod_t N(x_t; C z_t + d, diag(r)) / p(x)                  by message passing

The guide is the posterior and shares all parameters with the model: the ELBO is log p(x) for every draw, the Kalman
filter's log likelihood, and training maximises that.

Source: Kalman (1960), A New Approach to Linear Filtering and Prediction Problems; Rauch, Tung and Striebel (1965).

Args:
    x: sequences [rows, T, features], real numbers.
    latent: dimension of the state.
"""

import numpy as np

recipe = "elbo"


def prior(ppl, steps, latent):
    A = ppl.param("A", lambda: 0.9 * np.eye(latent))
    b = ppl.param("b", lambda: np.zeros(latent))
    q = ppl.param("q", lambda: np.full(latent, 0.5), constraint=ppl.dist.constraints.positive)
    m = ppl.param("m", lambda: np.zeros(latent))
    eye = ppl.ops.eye(latent, m)
    return {
        "mean": m,
        "cov": eye,
        "transition": A[None],
        "bias": ppl.xp.broadcast_to(b, (steps - 1, latent)),
        "noise": (q * eye)[None],
    }


def emission(ppl, features, latent):
    C = ppl.param("C", lambda: np.random.default_rng(0).normal(size=(features, latent)))
    d = ppl.param("d", lambda: np.zeros(features))
    r = ppl.param("r", lambda: np.ones(features), constraint=ppl.dist.constraints.positive)
    return C, d, r


def model(ppl, x, *, latent=2):
    chain = ppl.structured.GaussianChain(**prior(ppl, x.shape[-2], latent))
    C, d, r = emission(ppl, x.shape[-1], latent)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", chain)
        mean = z @ ppl.xp.matrix_transpose(C) + d
        ppl.sample("x", ppl.dist.Normal(mean, ppl.xp.sqrt(r)).to_event(2), obs=x)


def guide(ppl, x, *, latent=2):
    chain = prior(ppl, x.shape[-2], latent)
    precision, shift, _ = ppl.structured.observed(x, *emission(ppl, x.shape[-1], latent))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.structured.GaussianChain(**chain, precision=precision, shift=shift))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 4, 3)).astype(np.float32)
