"""An autoregressive hidden Markov model of which some states are known, more or less, and its smoothing distribution.

    z_1 ~ Categorical(softmax(start)),  z_t | z_{t-1} ~ Categorical(softmax(move[z_{t-1}]))    t = 1 .. T
    x_t | z_t, x_<t ~ Normal(loc[z_t] + sum_l W[z_t, l] x_{t-l}, scale[z_t])                   l = 1 .. order < t
    log p(known | z) = sum_t log known_t(z_t)
    q(z | x, known) = p(z, x, known) / p(x, known)                                             by message passing

`known_t(k)` from 0 to 1 says how far what is known of step t allows state k: ones say nothing, a one among zeros is a
label. It weighs the joint density of states and data, in model and guide alike: the ELBO is
`log sum_z p(z, x | x_1 .. x_order) prod_t known_t(z_t)`, whose derivative in `log known_t(k)` is `q(z_t = k)`. The
first `order` values are conditioned on, so that bounds of different orders are comparable only on data of which the
same values are. States keep the names that what is known gives them; without that they may be permuted.

Source: Hamilton (1989), A New Approach to the Economic Analysis of Nonstationary Time Series and the Business Cycle,
Econometrica 57(2); virtual evidence: Pearl (1988), Probabilistic Reasoning in Intelligent Systems, section 2.3.

Args:
    x: sequences [rows, T, features], real numbers.
    known: weights of states [rows, T, states], from 0 to 1; a step with none above 0 is refused.
    order: number of past values that a value looks at.
"""

import numpy as np

recipe = "elbo_rloo"


def prior(ppl, steps, states):
    start = ppl.ops.log_softmax(ppl.param("start", lambda: np.zeros(states)), -1)
    move = ppl.ops.log_softmax(ppl.param("move", lambda: 2.0 * np.eye(states)), -1)
    return start, ppl.xp.broadcast_to(move, (steps - 1, states, states))


def emission(ppl, features, states, order):
    loc = ppl.param("loc", lambda: np.random.default_rng(0).normal(size=(states, features)))
    W = ppl.param("W", lambda: np.zeros((states, features, order * features)))
    scale = ppl.param("scale", lambda: np.ones((states, features)), constraint=ppl.dist.constraints.positive)
    return loc, W, scale


def past(ppl, x, order):
    """`x_{t-1} .. x_{t-order}`, [rows, T, order * features], zeros before the first, and which have no such zeros."""
    T = x.shape[1]
    if not 0 < order < T:
        raise ValueError(f"order={order} was asked for on sequences of {T} steps; it is from 1 to {T - 1}.")
    lags = (ppl.xp.concat([0.0 * x[:, :lag], x[:, : T - lag]], axis=1) for lag in range(1, order + 1))
    return ppl.xp.concat(list(lags), axis=-1), ppl.xp.asarray(np.arange(T) >= order)


def model(ppl, x, known, *, order=1):
    states = known.shape[-1]
    loc, W, scale = emission(ppl, x.shape[-1], states, order)
    seen, scored = past(ppl, x, order)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.structured.MarkovChain(*prior(ppl, x.shape[-2], states)))
        mean = loc[z] + (W[z] @ seen[..., None])[..., 0]
        ppl.sample("x", ppl.dist.Normal(mean, scale[z]).mask(scored[:, None]).to_event(2), obs=x)
        ppl.sample("known", ppl.structured.VirtualEvidence(z, states), obs=known)


def guide(ppl, x, known, *, order=1):
    states = known.shape[-1]
    loc, W, scale = emission(ppl, x.shape[-1], states, order)
    seen, scored = past(ppl, x, order)
    mean = loc + (W @ seen[..., None, :, None])[..., 0]
    log_p = ppl.dist.Normal(mean, scale).log_prob(x[..., None, :]).sum(-1)
    node = ppl.xp.where(scored[:, None], log_p, 0.0 * log_p) + ppl.xp.log(known)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.structured.MarkovChain(*prior(ppl, x.shape[-2], states), node=node))


def example(rng: np.random.Generator) -> dict[str, np.ndarray]:
    known = np.ones((6, 4, 3))
    known[:, 1] = rng.uniform(size=(6, 3))
    known[:3, 2] = np.eye(3)
    return {"x": rng.normal(size=(6, 4, 2)).astype(np.float32), "known": known.astype(np.float32)}
