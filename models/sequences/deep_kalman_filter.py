"""A deep Kalman filter: a nonlinear chain behind a network, and a guide that reads the sequence backwards.

    z_t | z_{t-1} ~ Normal((1 - g) (W z_{t-1} + b) + g h, scale)        t = 1 .. T, z_0 a parameter
        g, h = sigmoid(gate(z_{t-1})), proposed(z_{t-1});  scale = softplus(linear(relu(h)))
    x_t | z_t ~ Normal(decoder(z_t), scale), or Bernoulli(logits = decoder(z_t))
    q(z_t | z_{t-1}, x_t .. x_T) = Normal(loc_t, scale_t)               of c_t = (tanh(combiner(z_{t-1})) + r_t) / 2
        r_t the state of a gated recurrent unit that has read x_T .. x_t

Given z_{t-1}, the posterior of z_t looks at x_t .. x_T alone, which is what the guide is given. Entries of x that
`x_mask` calls unknown are zeros to the guide, which is told of them.

Source: Krishnan, Shalit and Sontag (2015), Deep Kalman Filters, arXiv:1511.05121; and (2017), Structured Inference
Networks for Nonlinear State Space Models, arXiv:1609.09869 (gated transition and combiner: section 4, DKS).

Args:
    x: sequences [rows, T, features], real numbers, or 0 and 1 if the likelihood is bernoulli.
    x_mask: True where x is known, of x's shape or [rows, T]; all of it where nothing is said.
    latent: dimension of the state.
    hidden: widths of the decoder's hidden layers.
    width: of the transition's hidden layers and of the recurrent unit.
    likelihood: "gaussian" or "bernoulli".
"""

from typing import Literal

import numpy as np

Likelihood = Literal["gaussian", "bernoulli"]

recipe = "elbo"


def model(
    ppl, x, x_mask=None, *, latent=2, hidden: tuple[int, ...] = (32,), width=32, likelihood: Likelihood = "gaussian"
):
    features, dist, xp = x.shape[-1], ppl.dist, ppl.xp
    gate = ppl.module("gate", ppl.nets.MLP(latent, latent, hidden=(width,), activation="relu"))
    proposed = ppl.module("proposed", ppl.nets.MLP(latent, latent, hidden=(width,), activation="relu"))
    linear = ppl.module("linear", ppl.nets.Linear(latent, latent))
    spread = ppl.module("spread", ppl.nets.Linear(latent, latent))
    decoder = ppl.module("decoder", ppl.nets.MLP(latent, features, hidden=hidden))
    start = ppl.param("start", lambda: np.zeros(latent))
    if likelihood == "gaussian":
        scale = ppl.param("scale", lambda: np.ones(features), constraint=dist.constraints.positive)
    with ppl.plate("data", len(x)):

        def step(z, x_t):
            g, h = sigmoid(xp, gate(z)), proposed(z)
            loc = (1.0 - g) * linear(z) + g * h
            z = ppl.sample("z", dist.Normal(loc, positive(xp, spread(xp.maximum(h, 0.0 * h)))).to_event(1))
            out = decoder(z)
            pixels = dist.Normal(out, scale) if likelihood == "gaussian" else dist.Bernoulli(logits=out)
            ppl.sample("x", pixels.to_event(1), obs=x_t)
            return z, None

        ppl.scan(step, start + 0.0 * x[:, 0, :1], xp.moveaxis(x, 1, 0))


def guide(ppl, x, x_mask=None, *, latent=2, width=32):
    dist, xp = ppl.dist, ppl.xp
    backwards = ppl.module("backwards", ppl.nets.GRU(2 * x.shape[-1], width, reverse=True))
    combiner = ppl.module("combiner", ppl.nets.Linear(latent, width))
    code = ppl.module("code", ppl.nets.Linear(width, 2 * latent))
    start = ppl.param("guide_start", lambda: np.zeros(latent))
    read = backwards(inputs(ppl, x, x_mask))
    with ppl.plate("data", len(x)):

        def step(z, r_t):
            found = code((xp.tanh(combiner(z)) + r_t) / 2.0)
            z = ppl.sample("z", dist.Normal(found[..., :latent], positive(xp, found[..., latent:])).to_event(1))
            return z, None

        ppl.scan(step, start + 0.0 * x[:, 0, :1], xp.moveaxis(read, 1, 0))


def inputs(ppl, x, x_mask):
    """What a network sees of every step: known entries, zeros for others, and which of them are known."""
    known = ppl.xp.ones_like(x)
    if x_mask is not None:
        mask = 1.0 * x_mask
        known = known * (mask if mask.ndim == x.ndim else mask[..., None])
    return ppl.xp.concat([known * x, known], axis=-1)


def sigmoid(xp, a):
    return xp.exp(-xp.logaddexp(0.0 * a, -a))


def positive(xp, a):
    # What a softplus rounds to zero, far out, would be no scale.
    return xp.logaddexp(a, 0.0 * a) + 1e-4


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 4, 3)).astype(np.float32)
