"""A hidden Markov model with Gaussian observations, and its smoothing distribution for a guide.

    z_1 ~ Categorical(softmax(start)),  z_t | z_{t-1} ~ Categorical(softmax(move[z_{t-1}]))     t = 1 .. T
    x_t | z_t ~ Normal(loc[z_t], scale[z_t])                                                    [features]
    q(z | x) = p(z, x) / p(x)                                                                   by message passing

The guide is the posterior and shares all parameters with the model: the ELBO is log p(x) for every draw, the forward
algorithm's number. The states are discrete, so draws need a score-type estimator; as log w is the same for all draws,
what `rloo` multiplies the score by is zero, and its gradient is exact.

Source: Baum, Petrie, Soules and Weiss (1970), A Maximization Technique Occurring in the Statistical Analysis of
Probabilistic Functions of Markov Chains, Annals of Mathematical Statistics 41(1); Rabiner (1989).

Args:
    x: sequences [rows, T, features], real numbers.
    states: number of hidden states.
"""

import numpy as np

recipe = "elbo_rloo"


def prior(ppl, steps, states):
    start = ppl.ops.log_softmax(ppl.param("start", lambda: np.zeros(states)), -1)
    move = ppl.ops.log_softmax(ppl.param("move", lambda: 2.0 * np.eye(states)), -1)
    return start, ppl.xp.broadcast_to(move, (steps - 1, states, states))


def emission(ppl, features, states):
    loc = ppl.param("loc", lambda: np.random.default_rng(0).normal(size=(states, features)))
    scale = ppl.param("scale", lambda: np.ones((states, features)), constraint=ppl.dist.constraints.positive)
    return loc, scale


def model(ppl, x, *, states=3):
    loc, scale = emission(ppl, x.shape[-1], states)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.structured.MarkovChain(*prior(ppl, x.shape[-2], states)))
        ppl.sample("x", ppl.dist.Normal(loc[z], scale[z]).to_event(2), obs=x)


def guide(ppl, x, *, states=3):
    node = ppl.dist.Normal(*emission(ppl, x.shape[-1], states)).log_prob(x[..., None, :]).sum(-1)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.structured.MarkovChain(*prior(ppl, x.shape[-2], states), node=node))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 4, 2)).astype(np.float32)
