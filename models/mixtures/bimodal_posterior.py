"""One bit that says on which side of zero a latent lies, with two modes on each side: every posterior has two.

    z ~ (1 - pi) / 2 [Normal(mu_1, 1) + Normal(mu_2, 1)] + pi / 2 [Normal(mu_3, 1) + Normal(mu_4, 1)]
    x | z ~ Bernoulli(sigmoid(z))
    q(z | x) = Normal(c_x, sigma_x^2),  c_0 and sigma_0 where x = 0, c_1 and sigma_1 where x = 1

A guide with one mode must choose: the ELBO's optimum is narrow, on the mode where it started, a covering divergence's
is wide, over both. x is one bit, so log p(x) depends on p(x = 1) alone and the five parameters of the model cannot be
told apart by it: compare densities of the pair, log p(x, z) and log q(z | x) at the z that made x. The values that
parameters start from are those of the source.

Source: Li, Wang, Li and Wu (2024), Forward chi^2 Divergence Based Variational Importance Sampling, arXiv:2311.02516,
section 4.1.

Args:
    x: zeros and ones [rows].
"""

import numpy as np

recipe = "vis"


def model(ppl, x):
    dist, xp = ppl.dist, ppl.xp
    pi = ppl.param("pi", 0.5, constraint=dist.constraints.unit_interval)
    mu = ppl.param("mu", lambda: np.array([-9.0, -1.0, 1.0, 9.0]))
    weights = xp.stack([1.0 - pi, 1.0 - pi, pi, pi]) / 2.0
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", dist.MixtureSameFamily(dist.Categorical(probs=weights), dist.Normal(mu, 1.0)))
        ppl.sample("x", dist.Bernoulli(logits=z), obs=x)


def guide(ppl, x):
    dist, xp = ppl.dist, ppl.xp
    c = ppl.param("c", lambda: np.array([-9.0, 9.0]))
    sigma = ppl.param("sigma", lambda: np.ones(2), constraint=dist.constraints.positive)
    with ppl.plate("data", len(x)):
        ppl.sample("z", dist.Normal(xp.where(x > 0.5, c[1], c[0]), xp.where(x > 0.5, sigma[1], sigma[0])))


def example(rng: np.random.Generator) -> np.ndarray:
    return np.array([0, 1, 1, 0, 1, 1], dtype=np.float32)
