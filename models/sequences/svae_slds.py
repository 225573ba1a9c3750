"""A structured VAE on sequences that switch between ways to move: a switching linear dynamical system behind a network.

    s_1 ~ Categorical(softmax(start)),  s_t | s_{t-1} ~ Categorical(softmax(move[s_{t-1}]))     t = 1 .. T
    z_1 ~ Normal(m, I),  z_t | z_{t-1}, s_t ~ Normal(A[s_t] z_{t-1} + b[s_t], diag(q[s_t]))     z_t: `latent` numbers
    x_t | z_t ~ Normal(decoder(z_t), scale), or Bernoulli(logits = decoder(z_t))
    q(s) q(z), the best for p(s, z) prod_t psi_t(z_t),  psi_t Gaussian                          by message passing

Each potential psi_t is a network's reading of x_t alone. Given z the states are a chain, so they need no draw: with
`switches = "summed"` they are summed out of p(z), and z is drawn from q(z). The bound is then never below that of the
two factors, which `switches = "drawn"` has: the states are a site of their own, whose draws need a score-type estimator
(recipe elbo with `draws = 2` takes `rloo`), and both terms of the KL have a closed form (`kl = "closed_form"`).
Parameters are the same either way.

Steps, or entries, of x that `x_mask` calls unknown are not looked at; a step without known entries has no potential.

Source: Johnson, Duvenaud, Wiltschko, Datta and Adams (2016), Composing Graphical Models with Neural Networks for
Structured Representations and Fast Inference, arXiv:1603.06277; Ghahramani and Hinton (2000), Variational Learning for
Switching State-Space Models, Neural Computation 12(4).

Args:
    x: sequences [rows, T, features], real numbers, or 0 and 1 if the likelihood is bernoulli.
    x_mask: True where x is known, of x's shape or [rows, T]; all of it where nothing is said.
    latent: dimension of z_t.
    states: number of ways to move.
    hidden: widths of the hidden layers of decoder and recognition network.
    likelihood: "gaussian" or "bernoulli".
    switches: "summed" or "drawn".
    sweeps: updates of the guide's two factors. Pyro's compiler takes each anew, minutes of it; `compile = "graph"` is
        spared them, and NumPyro's meets one sweep for all.
"""

from typing import Literal

import numpy as np

Likelihood = Literal["gaussian", "bernoulli"]
Switches = Literal["summed", "drawn"]

recipe = "elbo"


def model(
    ppl,
    x,
    x_mask=None,
    *,
    latent=2,
    states=3,
    hidden: tuple[int, ...] = (32,),
    likelihood: Likelihood = "gaussian",
    switches: Switches = "summed",
):
    features = x.shape[-1]
    decoder = ppl.module("decoder", ppl.nets.MLP(latent, features, hidden=hidden))
    if likelihood == "gaussian":
        scale = ppl.param("scale", lambda: np.ones(features), constraint=ppl.dist.constraints.positive)
    p = prior(ppl, x.shape[-2], latent, states)
    with ppl.plate("data", len(x)):
        out = decoder(ppl.sample("z", p.given(ppl.sample("s", p.states)) if switches == "drawn" else p))
        pixels = ppl.dist.Normal(out, scale) if likelihood == "gaussian" else ppl.dist.Bernoulli(logits=out)
        ppl.sample("x", pixels.to_event(2), obs=x)


def guide(
    ppl,
    x,
    x_mask=None,
    *,
    latent=2,
    states=3,
    hidden: tuple[int, ...] = (32,),
    switches: Switches = "summed",
    sweeps=3,
):
    q = prior(ppl, x.shape[-2], latent, states).mean_field(*recognised(ppl, x, x_mask, latent, hidden), sweeps)
    with ppl.plate("data", len(x)):
        if switches == "drawn":
            ppl.sample("s", q.states)
        ppl.sample("z", q.chain)


def prior(ppl, steps, latent, states):
    # States that move alike would stay alike.
    start = ppl.ops.log_softmax(ppl.param("start", lambda: np.zeros(states)), -1)
    move = ppl.ops.log_softmax(ppl.param("move", lambda: 2.0 * np.eye(states)), -1)
    A = ppl.param("A", lambda: turns(latent, states))
    b = ppl.param("b", lambda: 0.1 * np.random.default_rng(1).normal(size=(states, latent)))
    q = ppl.param("q", lambda: np.full((states, latent), 0.5), constraint=ppl.dist.constraints.positive)
    m = ppl.param("m", lambda: np.zeros(latent))
    xp, eye = ppl.xp, ppl.ops.eye(latent, m)
    return ppl.structured.SwitchingChain(
        initial=start,
        move=xp.broadcast_to(move, (steps - 1, states, states)),
        mean=xp.broadcast_to(m, (states, latent)),
        cov=xp.broadcast_to(eye, (states, latent, latent)),
        transition=xp.broadcast_to(A, (steps - 1, states, latent, latent)),
        bias=xp.broadcast_to(b, (steps - 1, states, latent)),
        noise=xp.broadcast_to(q[..., None] * eye, (steps - 1, states, latent, latent)),
    )


def turns(latent, states):
    rng = np.random.default_rng(0)
    return np.stack([0.9 * np.linalg.qr(np.eye(latent) + rng.normal(size=(latent, latent)))[0] for _ in range(states)])


def recognised(ppl, x, x_mask, latent, hidden):
    """Precision [rows, T, latent, latent], positive definite, and shift [rows, T, latent] of psi_t; 0 without data."""
    xp, known = ppl.xp, ppl.xp.ones_like(x)
    if x_mask is not None:
        mask = 1.0 * x_mask
        known = known * (mask if mask.ndim == x.ndim else mask[..., None])
    network = ppl.module("recognition", ppl.nets.MLP(2 * x.shape[-1], latent + latent**2, hidden=hidden))
    code = network(xp.concat([known * x, known], axis=-1))
    raw = xp.reshape(code[..., latent:], (*code.shape[:-1], latent, latent))
    L = xp.tril(raw, k=-1) + (xp.logaddexp(raw, 0.0 * raw) + 1e-4) * ppl.ops.eye(latent, raw)
    any_known = xp.max(known, axis=-1, keepdims=True)
    return any_known[..., None] * (L @ xp.matrix_transpose(L)), any_known * code[..., :latent]


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 4, 3)).astype(np.float32)
