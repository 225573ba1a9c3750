"""A hidden Gaussian random walk with decay, and a guide that reads each row's sequence backwards.

    z_1 ~ Normal(0, 1),  z_t | z_{t-1} ~ Normal(a z_{t-1}, q)          t = 1 .. T
    x_t | z_t ~ Normal(c z_t, r)
    q(z_t | z_{t-1}, x_t ..) = Normal(A_t z_{t-1} + B_t x + b_t, s_t)  B_t x looks at x_t .. x_T

The smoothing distribution of a linear Gaussian chain, given z_{t-1}, is Gaussian with a mean linear in z_{t-1} and in
the observations from t on, and a variance that does not depend on either. The guide's family holds it, so at the ELBO's
optimum the bound is tight: it is the Kalman filter's log likelihood.

Source: Kalman (1960), A New Approach to Linear Filtering and Prediction Problems, Journal of Basic Engineering 82(1).

Args:
    x: sequences [rows, T], real numbers.
"""

import numpy as np

recipe = "elbo"


def model(ppl, x):
    dist, xp = ppl.dist, ppl.xp
    positive = dist.constraints.positive
    a, c = ppl.param("a", 0.5), ppl.param("c", 1.0)
    q, r = ppl.param("q", 1.0, constraint=positive), ppl.param("r", 1.0, constraint=positive)
    first = xp.asarray(np.arange(x.shape[-1]) == 0)
    with ppl.plate("data", len(x)):

        def step(z, now):
            x_t, first_t = now
            z = ppl.sample("z", dist.Normal(a * z, xp.where(first_t, 1.0 + 0.0 * q, q)))
            ppl.sample("x", dist.Normal(c * z, r), obs=x_t)
            return z, z

        ppl.scan(step, 0.0 * x[:, 0], (xp.moveaxis(x, 1, 0), first))


def guide(ppl, x):
    dist, xp, T = ppl.dist, ppl.xp, x.shape[-1]
    A, b = ppl.param("A", lambda: np.full(T, 0.1)), ppl.param("b", lambda: np.zeros(T))
    B = ppl.param("B", lambda: 0.1 * np.eye(T))
    s = ppl.param("s", lambda: np.ones(T), constraint=dist.constraints.positive)
    looked = xp.moveaxis(x @ xp.moveaxis(xp.triu(B), 0, 1) + b, 1, 0)
    with ppl.plate("data", len(x)):

        def step(z, now):
            A_t, loc_t, s_t = now
            z = ppl.sample("z", dist.Normal(A_t * z + loc_t, s_t))
            return z, z

        ppl.scan(step, 0.0 * x[:, 0], (A, looked, s))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 4)).astype(np.float32)
