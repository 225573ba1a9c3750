"""Factor analysis with smooth functions of time for factors, at irregular times, and their exact posterior for a guide.

    f_l ~ GP(0, k(|t - t'| / lengthscale_l)), l = 1 .. latent          Matern, of order 1/2, 3/2 or 5/2
    x_t | f ~ Normal(C f(t) + d, diag(r))
    q(f | x) = p(f) prod_t N(x_t; C f(t) + d, diag(r)) / p(x)          by message passing

The factors are a linear-Gaussian chain of states `z` (f and its derivatives), so the cost is linear in the number of
times. The guide is the posterior and shares all parameters with the model: the ELBO is log p(x) for every draw, the log
evidence of the dense process, and training maximises that. The factors have unit variance; C holds their scale.

Source: Yu, Cunningham, Santhanam, Ryu, Shenoy and Sahani (2009), Gaussian-process factor analysis for low-dimensional
single-trial analysis of neural population activity; as a chain, Hartikainen and Särkkä (2010).

Args:
    x: sequences [rows, T, features], real numbers.
    t: their times [rows, T], increasing in every row.
    x_mask: where x is known [rows, T, features]; made from x by `fit(..., missing="mask")`.
    latent: number of factors.
    order: 0.5, 1.5 or 2.5; how smooth they are.
    lengthscale: of all factors at the start, in the unit of t.
"""

import numpy as np

recipe = "elbo"


def factors(ppl, t, latent, order, lengthscale):
    positive = ppl.dist.constraints.positive
    of_all = ppl.param("lengthscale", lambda: np.full(latent, float(lengthscale)), constraint=positive)
    return ppl.structured.matern(t, of_all, 0.0 * of_all + 1.0, order)


def emission(ppl, features, latent, read):
    C = ppl.param("C", lambda: np.random.default_rng(0).normal(size=(features, latent)))
    d = ppl.param("d", lambda: np.zeros(features))
    r = ppl.param("r", lambda: np.ones(features), constraint=ppl.dist.constraints.positive)
    return C @ read, d, r


def model(ppl, x, t, x_mask, *, latent=2, order=1.5, lengthscale=1.0):
    process = factors(ppl, t, latent, order, lengthscale)
    C, d, r = emission(ppl, x.shape[-1], latent, process.read)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.structured.GaussianChain(**process.chain))
        normal = ppl.dist.Normal(z @ ppl.xp.matrix_transpose(C) + d, ppl.xp.sqrt(r)).mask(x_mask > 0)
        ppl.sample("x", normal.to_event(2), obs=x)


def guide(ppl, x, t, x_mask, *, latent=2, order=1.5, lengthscale=1.0):
    process = factors(ppl, t, latent, order, lengthscale)
    parts = emission(ppl, x.shape[-1], latent, process.read)
    precision, shift, _ = ppl.structured.observed(x, *parts, known=x_mask > 0)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.structured.GaussianChain(**process.chain, precision=precision, shift=shift))


def example(rng: np.random.Generator) -> dict[str, np.ndarray]:
    times = np.cumsum(0.5 + rng.exponential(size=(6, 4)), axis=1)
    known = np.ones((6, 4, 3), dtype=bool)
    return {"x": rng.normal(size=(6, 4, 3)).astype(np.float32), "t": times.astype(np.float32), "x_mask": known}
