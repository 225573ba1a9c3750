"""A structured VAE on sequences: a linear dynamical system behind a network, and a guide that smooths.

    z_1 ~ Normal(m, I),  z_t | z_{t-1} ~ Normal(A z_{t-1} + b, diag(q))     z_t: `latent` numbers, t = 1 .. T
    x_t | z_t ~ Normal(decoder(z_t), scale), or Bernoulli(logits = decoder(z_t))
    q(z | x) proportional to p(z) prod_t psi_t(z_t),  psi_t Gaussian        by message passing, or
    q(z | x) = prod_t Normal(mu_t + A_t (z_{t-1} - mu_{t-1}), diag(scale_t)^2)      Gauss-Markov, or
    q(z | x) = prod_t Normal(loc_t, scale_t)                                mean field

Each potential psi_t is a network's reading of x_t alone: the system, whose parameters guide and model share, carries it
to the other steps. With a linear decoder (`hidden = ()`) the guide's family holds the exact posterior. The precision of
psi_t is the network's as well, or one parameter that all steps of all sequences share, as in that posterior: then the
network has less to learn, and without an `x_mask` covariances are computed once for all sequences. Networks of the
other two read the whole sequence, in both directions; mu_t is the marginal mean, and A_t has norm below one.

Steps, or entries, of x that `x_mask` calls unknown are not looked at; a step without known entries has no potential. A
step with some has all of a shared precision, as if every entry were known: where entries within steps are missing, the
exact posterior is not in that family, and a network that gives the precision can say that less is known.

Source: Johnson, Duvenaud, Wiltschko, Datta and Adams (2016), Composing Graphical Models with Neural Networks for
Structured Representations and Fast Inference, arXiv:1603.06277; Zhao and Linderman (2023), Revisiting Structured
Variational Autoencoders, arXiv:2305.16543.

Args:
    x: sequences [rows, T, features], real numbers, or 0 and 1 if the likelihood is bernoulli.
    x_mask: True where x is known, of x's shape or [rows, T]; all of it where nothing is said.
    latent: dimension of the state.
    hidden: widths of the hidden layers of decoder and recognition network; the last that of recurrent units.
    likelihood: "gaussian" or "bernoulli".
    potential: what the recognition network gives of psi_t: "mean" (and covariance), which trains better as a rule, or
        "natural" (shift and precision), which does with a linear decoder and a shared precision.
    precision: whose precision psi_t has, "each" (its own, from x_t) or "shared" (a parameter of all steps).
    posterior: "structured", "gauss_markov" or "mean_field".
"""

from typing import Literal

import numpy as np

Likelihood = Literal["gaussian", "bernoulli"]
Potential = Literal["mean", "natural"]
Precision = Literal["each", "shared"]
Posterior = Literal["structured", "gauss_markov", "mean_field"]

recipe = "elbo"


def model(ppl, x, x_mask=None, *, latent=2, hidden: tuple[int, ...] = (32,), likelihood: Likelihood = "gaussian"):
    features = x.shape[-1]
    decoder = ppl.module("decoder", ppl.nets.MLP(latent, features, hidden=hidden))
    if likelihood == "gaussian":
        scale = ppl.param("scale", lambda: np.ones(features), constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        out = decoder(ppl.sample("z", ppl.structured.GaussianChain(**prior(ppl, x.shape[-2], latent))))
        pixels = ppl.dist.Normal(out, scale) if likelihood == "gaussian" else ppl.dist.Bernoulli(logits=out)
        ppl.sample("x", pixels.to_event(2), obs=x)


def guide(
    ppl,
    x,
    x_mask=None,
    *,
    latent=2,
    hidden: tuple[int, ...] = (32,),
    potential: Potential = "mean",
    precision: Precision = "each",
    posterior: Posterior = "structured",
):
    entries, known = inputs(ppl, x, x_mask)
    if posterior == "mean_field":
        q = mean_field(ppl, entries, latent, hidden)
    elif posterior == "gauss_markov":
        q = gauss_markov(ppl, entries, latent, hidden)
    else:
        J, h = recognised(ppl, entries, latent, hidden, potential, precision)
        if x_mask is not None:
            J, h = known[..., None] * J, known * h
        q = ppl.structured.GaussianChain(**prior(ppl, x.shape[-2], latent), precision=J, shift=h)
    with ppl.plate("data", len(x)):
        ppl.sample("z", q)


def prior(ppl, steps, latent):
    A = ppl.param("A", lambda: 0.9 * np.eye(latent))
    b = ppl.param("b", lambda: np.zeros(latent))
    q = ppl.param("q", lambda: np.full(latent, 0.5), constraint=ppl.dist.constraints.positive)
    m = ppl.param("m", lambda: np.zeros(latent))
    eye = ppl.ops.eye(latent, m)
    return {
        "mean": m,
        "cov": eye,
        "transition": A[None],
        "bias": ppl.xp.broadcast_to(b, (steps - 1, latent)),
        "noise": (q * eye)[None],
    }


def inputs(ppl, x, x_mask):
    """What a network sees of every step, entries and which of them are known; and whether any is, [rows, T, 1]."""
    known = ppl.xp.ones_like(x)
    if x_mask is not None:
        mask = 1.0 * x_mask
        known = known * (mask if mask.ndim == x.ndim else mask[..., None])
    return ppl.xp.concat([known * x, known], axis=-1), ppl.xp.max(known, axis=-1, keepdims=True)


def recognised(ppl, entries, latent, hidden, potential, precision):
    """Precision [rows, T, latent, latent], [1, latent, latent] if shared, and shift [rows, T, latent] of psi_t.

    The network gives shift or mean. L L' is the precision or the covariance.
    """
    wanted = latent if precision == "shared" else latent + latent**2
    code = ppl.module("recognition", ppl.nets.MLP(entries.shape[-1], wanted, hidden=hidden))(entries)
    eye = ppl.ops.eye(latent, code)
    if precision == "shared":
        L = ppl.param("L", lambda: np.eye(latent), constraint=ppl.dist.constraints.lower_cholesky)[None]
    else:
        raw = ppl.xp.reshape(code[..., latent:], (*code.shape[:-1], latent, latent))
        L = ppl.xp.tril(raw, k=-1) + positive(ppl, raw) * eye
    if potential == "natural":
        return L @ ppl.xp.matrix_transpose(L), code[..., :latent]
    inverse = ppl.ops.solve_triangular(L, eye)
    J = ppl.xp.matrix_transpose(inverse) @ inverse
    return J, (J @ code[..., :latent, None])[..., 0]


def mean_field(ppl, entries, latent, hidden):
    code = read(ppl, entries, hidden, 2 * latent)
    return ppl.dist.Normal(code[..., :latent], positive(ppl, code[..., latent:])).to_event(2)


def gauss_markov(ppl, entries, latent, hidden):
    code = read(ppl, entries, hidden, latent * (latent + 2))
    mean, scale = code[..., :latent], positive(ppl, code[..., latent : 2 * latent])
    A = ppl.xp.reshape(code[..., 1:, 2 * latent :], (*code.shape[:-2], code.shape[-2] - 1, latent, latent))
    # Of norm below one, or a chain's numbers grow without end on the way to a good A.
    A = A / ppl.xp.sqrt(1.0 + ppl.xp.sum(A * A, axis=(-2, -1), keepdims=True))
    cov = (scale**2)[..., None] * ppl.ops.eye(latent, code)
    # The network gives the marginal means: biases would pass a change of one step's A on to all steps after it.
    return ppl.structured.GaussianChain(
        mean=mean[..., 0, :],
        cov=cov[..., 0, :, :],
        transition=A,
        bias=mean[..., 1:, :] - (A @ mean[..., :-1, :, None])[..., 0],
        noise=cov[..., 1:, :, :],
    )


def read(ppl, entries, hidden, wanted):
    """`wanted` numbers of every step, from the whole sequence."""
    width, size = hidden[-1] if hidden else 32, entries.shape[-1]
    found = [
        ppl.module(name, ppl.nets.GRU(size, width, reverse=name == "backwards"))(entries)
        for name in ("forwards", "backwards")
    ]
    return ppl.module("recognition", ppl.nets.Linear(2 * width, wanted))(ppl.xp.concat(found, axis=-1))


def positive(ppl, a):
    # What a softplus rounds to zero, far out, would be no scale.
    return ppl.xp.logaddexp(a, 0.0 * a) + 1e-4


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 4, 3)).astype(np.float32)
