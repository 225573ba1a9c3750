"""The variational autoencoder: a Gaussian latent, a neural decoder, and an amortised Gaussian guide.

    z ~ Normal(0, I)                                         [latent]
    x | z ~ Binomial(total_count, logits = decoder(z))       [features], or Bernoulli
    q(z | x) = Normal(loc, exp(log_scale))                   loc, log_scale = encoder(x / total_count)

Source: Kingma and Welling (2013), Auto-Encoding Variational Bayes, arXiv:1312.6114; Rezende, Mohamed and
Wierstra (2014), Stochastic Backpropagation and Approximate Inference, arXiv:1401.4082.

Args:
    x: counts [rows, features], integers from 0 to total_count; 0 and 1 if the likelihood is bernoulli.
    latent: dimension of z.
    hidden: width of the hidden layer of encoder and decoder.
    total_count: trials of the binomial, for example the number of grey levels less one.
    likelihood: "binomial" or "bernoulli".
"""

from typing import Literal

import numpy as np

Likelihood = Literal["binomial", "bernoulli"]

recipe = "elbo"


def model(ppl, x, *, latent=8, hidden=128, total_count=16, likelihood: Likelihood = "binomial"):
    decoder = ppl.module("decoder", ppl.nets.MLP(latent, x.shape[-1], hidden=(hidden,)))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(ppl.xp.zeros(latent), 1.0).to_event(1))
        logits = decoder(z)
        if likelihood == "bernoulli":
            pixels = ppl.dist.Bernoulli(logits=logits)
        else:
            pixels = ppl.dist.Binomial(total_count, logits=logits)
        ppl.sample("x", pixels.to_event(1), obs=x)


def guide(ppl, x, *, latent=8, hidden=128, total_count=16, likelihood: Likelihood = "binomial"):
    encoder = ppl.module("encoder", ppl.nets.MLP(x.shape[-1], 2 * latent, hidden=(hidden,)))
    with ppl.plate("data", len(x)):
        code = encoder(x / (1 if likelihood == "bernoulli" else total_count))
        loc, log_scale = code[..., :latent], code[..., latent:]
        ppl.sample("z", ppl.dist.Normal(loc, ppl.xp.exp(log_scale)).to_event(1))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 17, size=(6, 5)).astype(np.float32)
