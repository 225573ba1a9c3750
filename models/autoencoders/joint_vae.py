"""A variational autoencoder whose code is continuous and discrete: a Gaussian vector beside categorical variables.

    z ~ Normal(0, I)                                         [latent]
    c_i ~ OneHotCategorical(1 / categories, ...)             i = 1 .. variables
    x | z, c ~ Binomial(total_count, logits = decoder(z, c)) [features], or Bernoulli
    q(z | x) = Normal(loc, exp(log_scale)), q(c_i | x) = OneHotCategorical(logits_i), all = encoder(x / total_count)

Neither part looks at the other, so that each has a KL of its own: recipe joint_vae opens their capacities apart. A
likelihood alone is happy with z, and c is the part that is left unused.

Source: Dupont (2018), Learning Disentangled Joint Continuous and Discrete Representations, arXiv:1804.00104.

Args:
    x: counts [rows, features], integers from 0 to total_count; 0 and 1 if the likelihood is bernoulli.
    latent: dimension of z.
    variables: number of categorical variables in the code of a row.
    categories: values that each of them can take.
    hidden: width of the hidden layer of encoder and decoder.
    total_count: trials of the binomial, for example the number of grey levels less one.
    likelihood: "binomial" or "bernoulli".
"""

from typing import Literal

import numpy as np

Likelihood = Literal["binomial", "bernoulli"]

recipe = "joint_vae"


def model(
    ppl, x, *, latent=6, variables=1, categories=10, hidden=128, total_count=16, likelihood: Likelihood = "binomial"
):
    size = latent + variables * categories
    decoder = ppl.module("decoder", ppl.nets.MLP(size, x.shape[-1], hidden=(hidden,)))
    uniform = ppl.xp.zeros((variables, categories))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(ppl.xp.zeros(latent), 1.0).to_event(1))
        c = ppl.sample("c", ppl.dist.OneHotCategorical(logits=uniform).to_event(1))
        flat = ppl.xp.reshape(c, (*c.shape[:-2], variables * categories))
        logits = decoder(ppl.xp.concat([z, flat], axis=-1))
        if likelihood == "bernoulli":
            pixels = ppl.dist.Bernoulli(logits=logits)
        else:
            pixels = ppl.dist.Binomial(total_count, logits=logits)
        ppl.sample("x", pixels.to_event(1), obs=x)


def guide(
    ppl, x, *, latent=6, variables=1, categories=10, hidden=128, total_count=16, likelihood: Likelihood = "binomial"
):
    size = 2 * latent + variables * categories
    encoder = ppl.module("encoder", ppl.nets.MLP(x.shape[-1], size, hidden=(hidden,)))
    with ppl.plate("data", len(x)):
        code = encoder(x / (1 if likelihood == "bernoulli" else total_count))
        loc, log_scale = code[..., :latent], code[..., latent : 2 * latent]
        ppl.sample("z", ppl.dist.Normal(loc, ppl.xp.exp(log_scale)).to_event(1))
        logits = ppl.xp.reshape(code[..., 2 * latent :], (*code.shape[:-1], variables, categories))
        ppl.sample("c", ppl.dist.OneHotCategorical(logits=logits).to_event(1))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 17, size=(6, 5)).astype(np.float32)
