"""A latent tree: what is observed are leaves, and inner nodes say which of them go together.

    z_0 ~ Categorical(softmax(root)),  z_n | z_parent(n) ~ Categorical(softmax(edge[n, z_parent(n)]))   inner nodes n
    x_i | z ~ Categorical(softmax(leaf[i, z_parent(i)]))                                                i = 1 .. leaves
    q(z | x) = p(z, x) / p(x)                                                                           by elimination

Neighbouring leaves share a parent, `branches` of them, neighbouring parents one of theirs, and so on up to the root, so
that order the columns by what belongs together. The guide is the posterior and shares all parameters with the model:
the ELBO is log p(x) for every draw. Values of an inner node carry no names: permuted ones are as probable.

Source: Zhang (2004), Hierarchical Latent Class Models for Cluster Analysis, Journal of Machine Learning Research 5.

Args:
    x: values of the leaves [rows, leaves], integers from 0 to categories - 1.
    categories: values that a leaf can have.
    states: values of an inner node.
    branches: children of an inner node, at most.
"""

import numpy as np

recipe = "elbo_rloo"


def above(leaves, branches):
    """Parents of the inner nodes, and of the leaves among them; the root is node 0."""
    if branches < 2:
        raise ValueError(f"branches={branches} was asked for; an inner node has 2 or more.")
    widths = [-(-leaves // branches)]
    while widths[-1] > 1:
        widths.append(-(-widths[-1] // branches))
    widths = widths[::-1]
    first = np.cumsum([0, *widths])
    parents = [-1] + [int(first[k]) + j // branches for k, width in enumerate(widths[1:]) for j in range(width)]
    return parents, first[len(widths) - 1] + np.arange(leaves) // branches


def prior(ppl, inner, states):
    rng = np.random.default_rng(0)
    root = ppl.ops.log_softmax(ppl.param("root", lambda: np.zeros(states)), -1)
    edge = ppl.param("edge", lambda: 2.0 * np.eye(states) + 0.1 * rng.normal(size=(inner - 1, states, states)))
    return root, ppl.ops.log_softmax(edge, -1)


def emission(ppl, leaves, states, categories):
    rng = np.random.default_rng(1)
    return ppl.ops.log_softmax(ppl.param("leaf", lambda: rng.normal(size=(leaves, states, categories))), -1)


def model(ppl, x, *, categories=2, states=2, branches=2):
    parents, of_leaf = above(x.shape[-1], branches)
    leaf = emission(ppl, x.shape[-1], states, categories)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.structured.Tree(parents, *prior(ppl, len(parents), states)))
        logits = leaf[np.arange(x.shape[-1]), z[..., of_leaf]]
        ppl.sample("x", ppl.dist.Categorical(logits=logits).to_event(1), obs=ppl.xp.astype(x, ppl.xp.int32))


def guide(ppl, x, *, categories=2, states=2, branches=2):
    parents, of_leaf = above(x.shape[-1], branches)
    leaf = emission(ppl, x.shape[-1], states, categories)
    log_p = ppl.dist.Categorical(logits=leaf).log_prob(ppl.xp.astype(x, ppl.xp.int32)[..., None])
    below = ppl.xp.astype(ppl.xp.asarray(np.eye(len(parents))[of_leaf]), log_p.dtype)
    node = ppl.xp.matrix_transpose(below) @ log_p
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.structured.Tree(parents, *prior(ppl, len(parents), states), node=node))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, size=(6, 5))
