"""A structured VAE: a Bayesian mixture of Gaussians in the code, a network from code to data.

    pi ~ Dirichlet(concentration / K, ..)                                      K: components
    mu_k, Sigma_k ~ NormalInverseWishart(0, count, spread I, df)               [latent], [latent, latent]
    c_n ~ Categorical(pi)
    z_n | c_n ~ Normal(mu_c, Sigma_c)                                          [latent]
    x_n | z_n ~ Normal(decoder(z_n), diag(noise)^2)                            [features]
    q(pi) Dirichlet, q(mu_k, Sigma_k) NormalInverseWishart
    q(c_n, z_n) = exp( E_q log p(c_n, z_n | pi, mu, Sigma) ) psi(z_n; x_n) / Z
    psi(z; x) = exp( shift' z - z' diag(precision) z / 2 )                     shift, precision = encoder(x)

Draws of pi and theta are their natural forms (log pi, and `ppl.structured`'s forms of (mu_k, Sigma_k)), in which log p
is linear: under the estimator "expected" they are not drawn but taken at their means, exactly. The labels are summed
out of q exactly, so that z's network sees the best q(c, z) for its potentials, not independent factors.

With `correction = False` the local factor's expected parameters carry no gradient: natural steps of pi and theta are
then Johnson's `eta0 + N/B sum E t - eta`, which lacks that the local optimum moves with them.

Source: Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), Composing Graphical Models with Neural Networks for
Structured Representations and Fast Inference, arXiv:1603.06277.

Args:
    x: real numbers [rows, features], standardised or of that order.
    latent: dimension of z.
    components: K, the most that can be used.
    hidden: width of the two hidden layers of encoder and decoder.
    concentration: of the Dirichlet, all components together; small: few are used.
    count: how many observations the prior's mean 0 counts for.
    spread: the prior's scale matrix is spread I.
    df: the prior's degrees of freedom, above latent - 1; None: latent + 2.
    correction: whether the local factor's dependence on the global ones has its gradient.
"""

import numpy as np

recipe = "svae"


def model(
    ppl, x, *, latent=2, components=10, hidden=40, concentration=1.0, count=0.5, spread=1.0, df: float | None = None
):
    like = ppl.ops.zeros((components,), x)
    pi = ppl.sample("pi", ppl.structured.LogDirichlet(like + concentration / components))
    scale = spread * ppl.ops.eye(latent, x) + like[:, None, None]
    form = ppl.structured.niw_form(ppl.ops.zeros((components, latent), x), like + count, scale)
    with ppl.plate("components", components):
        theta = ppl.sample(
            "theta", ppl.structured.NormalInverseWishart(form, like + (latent + 2.0 if df is None else df))
        )
    decoder = ppl.module("decoder", ppl.nets.MLP(latent, x.shape[-1], hidden=(hidden, hidden)))
    noise = ppl.param("noise", lambda: np.full(x.shape[-1], 0.3), constraint=ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        c = ppl.sample("c", ppl.structured.Labels(pi))
        z = ppl.sample("z", ppl.structured.Gaussian(of(ppl, c, theta)))
        ppl.sample("x", ppl.dist.Normal(decoder(z), noise).to_event(1), obs=x)


def guide(ppl, x, *, latent=2, components=10, hidden=40, correction=True):
    constraints = ppl.dist.constraints
    pi = ppl.structured.LogDirichlet(
        ppl.param("pi.concentration", lambda: np.full(components, 5.0), constraint=constraints.positive)
    )
    theta = ppl.structured.NormalInverseWishart(
        ppl.param("theta.form", lambda: start(components, latent), constraint=constraints.positive_definite),
        ppl.param(
            "theta.df", lambda: np.full(components, latent + 5.0), constraint=constraints.greater_than(latent - 1.0)
        ),
    )
    ppl.sample("pi", pi)
    with ppl.plate("components", components):
        ppl.sample("theta", theta)
    encoder = ppl.module("encoder", ppl.nets.MLP(x.shape[-1], 2 * latent, hidden=(hidden, hidden)))
    code = encoder(x)
    precision = ppl.xp.exp(code[..., latent:])
    weight, form = pi.mean, theta.mean
    if not correction:
        weight, form = ppl.ops.stop_gradient(weight), ppl.ops.stop_gradient(form)
    J, h = precision[..., None] * ppl.ops.eye(latent, x), precision * code[..., :latent]
    q = ppl.structured.mixture_posterior(weight, form, J, h)
    with ppl.plate("data", len(x)):
        c = ppl.sample("c", ppl.dist.Categorical(logits=q.log_prob))
        ppl.sample("z", ppl.structured.Gaussian(of(ppl, c, q.form)))


def of(ppl, c, forms):
    """Of components `[..., K, D + 1, D + 1]` those of labels c."""
    one = ppl.ops.one_hot(c, forms.shape[-3])
    return (one[..., None, None] * forms).sum(-3)


def start(components, latent):
    """Forms of five observations each around means that are spread at random."""
    loc = np.random.default_rng(0).normal(size=(components, latent))
    form = np.zeros((components, latent + 1, latent + 1))
    form[:, 0, 0], form[:, 1:, 0], form[:, 0, 1:] = 5.0, 5.0 * loc, 5.0 * loc
    form[:, 1:, 1:] = np.eye(latent) + 5.0 * loc[:, :, None] * loc[:, None, :]
    return form


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(6, 2)).astype(np.float32)
