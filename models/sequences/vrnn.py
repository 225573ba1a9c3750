"""A variational recurrent network: every step has a latent, and a recurrent state that has seen latents and data.

    z_t | h_{t-1} ~ Normal(loc, scale)                      of prior(h_{t-1}),      t = 1 .. T, h_0 = 0
    x_t | z_t, h_{t-1} ~ Normal(decoder(z_t, h_{t-1}), scale), or Bernoulli(logits)
    h_t = gru((x_t, z_t), h_{t-1})
    q(z_t | x_t, h_{t-1}) = Normal(loc, scale)              of encoder(x_t, h_{t-1})

The model looks at the past of x, and so does the guide, which walks along with the same recurrent unit. Entries of x
that `x_mask` calls unknown are zeros to all networks, which are told of them: the model is then one of the others.

Source: Chung, Kastner, Dinh, Goel, Courville and Bengio (2015), A Recurrent Latent Variable Model for Sequential Data,
arXiv:1506.02216 (here with networks of its own for what each part sees, in place of shared features of x and z).

Args:
    x: sequences [rows, T, features], real numbers, or 0 and 1 if the likelihood is bernoulli.
    x_mask: True where x is known, of x's shape or [rows, T]; all of it where nothing is said.
    latent: dimension of each step's latent.
    hidden: widths of the decoder's hidden layers.
    width: of the recurrent state, and of the hidden layer of prior and encoder.
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
    prior = ppl.module("prior", ppl.nets.MLP(width, 2 * latent, hidden=(width,)))
    decoder = ppl.module("decoder", ppl.nets.MLP(latent + width, features, hidden=hidden))
    gru = recurrent(ppl, features, latent, width)
    if likelihood == "gaussian":
        scale = ppl.param("scale", lambda: np.ones(features), constraint=dist.constraints.positive)
    with ppl.plate("data", len(x)):

        def step(h, now):
            x_t, seen_t = now
            z = ppl.sample("z", normal(ppl, prior(h), latent))
            out = decoder(xp.concat([z, h], axis=-1))
            pixels = dist.Normal(out, scale) if likelihood == "gaussian" else dist.Bernoulli(logits=out)
            ppl.sample("x", pixels.to_event(1), obs=x_t)
            return gru(beside(xp, seen_t, z), h), None

        ppl.scan(step, nothing(ppl, x, width), (xp.moveaxis(x, 1, 0), xp.moveaxis(inputs(ppl, x, x_mask), 1, 0)))


def guide(ppl, x, x_mask=None, *, latent=2, width=32):
    features, xp = x.shape[-1], ppl.xp
    encoder = ppl.module("encoder", ppl.nets.MLP(2 * features + width, 2 * latent, hidden=(width,)))
    gru = recurrent(ppl, features, latent, width)
    with ppl.plate("data", len(x)):

        def step(h, seen_t):
            z = ppl.sample("z", normal(ppl, encoder(beside(xp, seen_t, h)), latent))
            return gru(beside(xp, seen_t, z), h), None

        ppl.scan(step, nothing(ppl, x, width), xp.moveaxis(inputs(ppl, x, x_mask), 1, 0))


def recurrent(ppl, features, latent, width):
    return ppl.module("gru", ppl.nets.GRUCell(2 * features + latent, width))


def nothing(ppl, x, width):
    """h_0 of every row."""
    return ppl.xp.zeros(width) + 0.0 * x[:, 0, :1]


def normal(ppl, code, latent):
    # What a softplus rounds to zero, far out, would be no scale.
    scale = ppl.xp.logaddexp(code[..., latent:], 0.0 * code[..., latent:]) + 1e-4
    return ppl.dist.Normal(code[..., :latent], scale).to_event(1)


def beside(xp, seen_t, state):
    """Data of a step and a state, which may have draws in front, as one vector."""
    return xp.concat([seen_t + 0.0 * state[..., :1], state + 0.0 * seen_t[..., :1]], axis=-1)


def inputs(ppl, x, x_mask):
    """What a network sees of every step: known entries, zeros for others, and which of them are known."""
    known = ppl.xp.ones_like(x)
    if x_mask is not None:
        mask = 1.0 * x_mask
        known = known * (mask if mask.ndim == x.ndim else mask[..., None])
    return ppl.xp.concat([known * x, known], axis=-1)


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 4, 3)).astype(np.float32)
