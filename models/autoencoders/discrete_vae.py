"""A variational autoencoder whose code is discrete: independent categorical variables, one-hot.

    z_i ~ OneHotCategorical(1 / categories, ...)                    i = 1 .. variables
    x | z ~ Binomial(total_count, logits = decoder(z))              [features], or Bernoulli
    q(z_i | x) = OneHotCategorical(logits_i)                        logits = encoder(x / total_count)

The gradient of a discrete draw is the estimator's business: score, rloo, vimco, relaxations. Codes that estimators are
compared on are of 8 variables with 4 values (the default), 4 with 24 and 10 with 30, for 28 x 28 images with
`hidden=512, likelihood="bernoulli"` (data mnist10k_binary).

Source: Jang, Gu and Poole (2016), Categorical Reparameterization with Gumbel-Softmax, arXiv:1611.01144;
Maddison, Mnih and Teh (2016), The Concrete Distribution, arXiv:1611.00712.

Args:
    x: counts [rows, features], integers from 0 to total_count; 0 and 1 if the likelihood is bernoulli.
    variables: number of categorical variables in the code of a row.
    categories: values that each of them can take.
    hidden: width of the hidden layer of encoder and decoder.
    total_count: trials of the binomial, for example the number of grey levels less one.
    likelihood: "binomial" or "bernoulli".
"""

from typing import Literal

import numpy as np

Likelihood = Literal["binomial", "bernoulli"]

recipe = "elbo"


def model(
    ppl, x, *, variables=8, categories=4, hidden=128, total_count=16, likelihood: Likelihood = "binomial"
):
    decoder = ppl.module("decoder", ppl.nets.MLP(variables * categories, x.shape[-1], hidden=(hidden,)))
    uniform = ppl.xp.zeros((variables, categories))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=uniform).to_event(1))
        logits = decoder(ppl.xp.reshape(z, (*z.shape[:-2], variables * categories)))
        if likelihood == "bernoulli":
            pixels = ppl.dist.Bernoulli(logits=logits)
        else:
            pixels = ppl.dist.Binomial(total_count, logits=logits)
        ppl.sample("x", pixels.to_event(1), obs=x)


def guide(
    ppl, x, *, variables=8, categories=4, hidden=128, total_count=16, likelihood: Likelihood = "binomial"
):
    encoder = ppl.module("encoder", ppl.nets.MLP(x.shape[-1], variables * categories, hidden=(hidden,)))
    with ppl.plate("data", len(x)):
        code = encoder(x / (1 if likelihood == "bernoulli" else total_count))
        logits = ppl.xp.reshape(code, (*code.shape[:-1], variables, categories))
        ppl.sample("z", ppl.dist.OneHotCategorical(logits=logits).to_event(1))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 17, size=(6, 5)).astype(np.float32)
