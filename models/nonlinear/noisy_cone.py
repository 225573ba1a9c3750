"""The noisy cone: a point of the plane seen through its squared distance from the origin; its posterior is a ring.

    x, y ~ Normal(0, 10)
    z | x, y ~ Normal(r2, 0.1 + r2 / 100),  r2 = x^2 + y^2
    q(x, y) = Normal(loc, scale)                                     a blob on the ring, or with circle = true
    q(x, y | u) = Normal(sqrt(z) (cos 2 pi u, sin 2 pi u), sigma)    u ~ Uniform(0, 1)

Of z = 5, log p(z) = -5.32323 by quadrature, and the best ELBO of a blob is -8.0745. A ring is a mixture over u, whose
density has no closed form: `marginal = { u = 5 }` estimates it from five draws of u. With one draw the ELBO of the ring
(HVI) is -9.749, worse than the blob's; with five (IWHVI) -8.179, and under five importance draws (DIWHVI) -7.311.

Source: Becker, Lew et al. (2024), Probabilistic Programming with Programmable Variational Inference, arXiv:2406.15742.

Args:
    z: squared distances seen with noise [rows], positive for the ring.
    circle: whether the guide is a ring with an auxiliary angle u instead of a blob.
"""

import math

import numpy as np

recipe = "elbo"


def model(ppl, z, *, circle=False):
    dist, zero = ppl.dist, 0.0 * z
    with ppl.plate("data", len(z)):
        x = ppl.sample("x", dist.Normal(zero, 10.0))
        y = ppl.sample("y", dist.Normal(zero, 10.0))
        r2 = x**2 + y**2
        ppl.sample("z", dist.Normal(r2, 0.1 + r2 / 100.0), obs=z)


def guide(ppl, z, *, circle=False):
    dist, xp = ppl.dist, ppl.xp
    positive = dist.constraints.positive
    if not circle:
        loc, scale = ppl.param("loc", (2.0, 0.0)), ppl.param("scale", (0.1, 0.5), constraint=positive)
    else:
        sigma = ppl.param("sigma", 0.1, constraint=positive)
    with ppl.plate("data", len(z)):
        if circle:
            u = ppl.sample("u", dist.Uniform(0.0 * z, 1.0 + 0.0 * z), infer={"is_auxiliary": True})
            angle, radius = 2.0 * math.pi * u, xp.sqrt(z)
            ppl.sample("x", dist.Normal(radius * xp.cos(angle), sigma))
            ppl.sample("y", dist.Normal(radius * xp.sin(angle), sigma))
        else:
            ppl.sample("x", dist.Normal(loc[0] + 0.0 * z, scale[0]))
            ppl.sample("y", dist.Normal(loc[1] + 0.0 * z, scale[1]))


def example(rng: np.random.Generator) -> np.ndarray:
    return np.array([5.0, 3.0, 7.0, 4.0, 6.0, 5.5], dtype=np.float32)
