"""A mixture of Gaussians with diagonal covariances, the assignments summed out.

    w ~ Dirichlet(concentration, ..)                                          [components]
    mu_kd ~ Normal(0, width)                                                  [components, features]
    sigma_kd ~ LogNormal(0, 1)
    x_n | w, mu, sigma ~ sum_k w_k Normal(mu_k, diag(sigma_k)^2)              [features]
    q = independent normals in unconstrained space

Components carry no names: any relabelling is as probable, and the guide settles on one, from the starting means, which
are spread over the data's directions at random.

Source: Bishop (2006), Pattern Recognition and Machine Learning, chapter 9; the sum over assignments as in
Stan Development Team, User's Guide, Finite mixtures.

Args:
    x: real numbers [rows, features], standardised or of that order.
    components: number of Gaussians.
    concentration: of the Dirichlet prior of the weights.
    width: standard deviation of the prior of the means.
"""

import numpy as np

recipe = "elbo"


def model(ppl, x, *, components=2, concentration=2.0, width=3.0):
    dist, features = ppl.dist, x.shape[-1]
    ones = ppl.xp.ones((components, features)) + 0.0 * x[0, 0]
    w = ppl.sample("w", dist.Dirichlet(concentration * ones[:, 0]))
    mu = ppl.sample("mu", dist.Normal(0.0 * ones, width).to_event(2))
    sigma = ppl.sample("sigma", dist.LogNormal(0.0 * ones, 1.0).to_event(2))
    with ppl.plate("data", len(x)):
        parts = dist.Normal(mu, sigma).to_event(1)
        ppl.sample("x", dist.MixtureSameFamily(dist.Categorical(probs=w), parts), obs=x)


def guide(ppl, x, *, components=2, concentration=2.0, width=3.0):
    dist, features = ppl.dist, x.shape[-1]
    positive = dist.constraints.positive
    shape = (components, features)
    w_loc = ppl.param("w_loc", lambda: np.zeros(components - 1))
    w_scale = ppl.param("w_scale", lambda: np.full(components - 1, 0.1), constraint=positive)
    mu_loc = ppl.param("mu_loc", lambda: np.random.default_rng(0).normal(size=shape))
    mu_scale = ppl.param("mu_scale", lambda: np.full(shape, 0.1), constraint=positive)
    sigma_loc = ppl.param("sigma_loc", lambda: np.zeros(shape))
    sigma_scale = ppl.param("sigma_scale", lambda: np.full(shape, 0.1), constraint=positive)
    stick = dist.transforms.StickBreakingTransform()
    w = dist.Normal(w_loc, w_scale).to_event(1)
    ppl.sample("w", dist.TransformedDistribution(w, [stick]))
    ppl.sample("mu", dist.Normal(mu_loc, mu_scale).to_event(2))
    ppl.sample("sigma", dist.LogNormal(sigma_loc, sigma_scale).to_event(2))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 2)).astype(np.float32)
