"""Functional Bayesian Tucker decomposition: entries of a tensor whose modes are continuous, from some of them.

    u_kr ~ GP(0, k(|s - s'| / lengthscale_kr)), r = 1 .. rank               of mode k = 1 .. K; Matern
    W ~ Normal(0, I)                                                        [rank^K], the core
    y_n | u, W ~ Normal(W' (u_1(s_n1) kron .. kron u_K(s_nK)), noise^2)
    q(u_k) = p(u_k) prod_j N(seen_kj; u_k(s_kj), (root_kj root_kj')^-1) / Z_k         by message passing
    q(W) = Normal(core_loc, core_root core_root')

The factors of a mode are a linear-Gaussian chain of states `z1` .. `zK` (u and its derivatives) along the coordinates
that the mode has anywhere in the data, so the cost is linear in their number. Their guide is the prior times a
pseudo-observation at every coordinate, which is the form of the best factor given those of all others. The core and the
modes are shared by all entries, which come in mini-batches. Factors have unit variance; W holds the scale.

Source: Fang, Yu, Wang, Li, Kirby and Zhe (2024), Functional Bayesian Tucker Decomposition for Continuous-indexed Tensor
Data, arXiv:2311.04829.

Args:
    y: entries [rows], of unit variance or of that order.
    index: of each its place in `coordinates` [rows, K], integers from 0; `ppl_lvm.structured.tucker.grid` makes both.
    coordinates: of every mode its different coordinates, increasing, K tuples.
    rank: how many factors a mode has.
    order: 0.5, 1.5 or 2.5; how smooth they are.
    lengthscale: of all factors at the start, as a fraction of the range of the mode's coordinates.
"""

import numpy as np

recipe = "elbo"


def process(ppl, y, k, at, rank, order, lengthscale):
    """Of mode k, as a chain."""
    start = lengthscale * ((max(at) - min(at)) or 1.0)
    of_all = ppl.param(
        f"lengthscale{k}", lambda: np.full(rank, start), constraint=ppl.dist.constraints.positive
    )
    return ppl.structured.matern(ppl.xp.asarray(np.array(at), dtype=y.dtype), of_all, 0.0 * of_all + 1.0, order)


def model(
    ppl,
    y,
    index,
    *,
    coordinates: tuple[tuple[float, ...], ...] = ((0.0, 0.3, 1.0), (0.0, 0.5, 0.6, 1.0)),
    rank=2,
    order=1.5,
    lengthscale=0.3,
):
    mean = ppl.sample("W", ppl.dist.Normal(ppl.ops.zeros((rank ** len(coordinates),), y), 1.0).to_event(1))
    noise = ppl.param("noise", lambda: np.array(0.5), constraint=ppl.dist.constraints.positive)
    for k, at in enumerate(coordinates):
        mode = process(ppl, y, k + 1, at, rank, order, lengthscale)
        z = ppl.sample(f"z{k + 1}", ppl.structured.GaussianChain(**mode.chain))
        u = ppl.structured.at(z @ mode.read.mT, index[:, k])
        # One mode of the core after the other: its axis is the first of those that are left.
        core = ppl.xp.reshape(mean, (*mean.shape[:-1], rank, mean.shape[-1] // rank))
        mean = (u[..., :, None] * core).sum(-2)
    with ppl.plate("data", len(y)):
        ppl.sample("y", ppl.dist.Normal(mean[..., 0], noise), obs=y)


def guide(
    ppl,
    y,
    index,
    *,
    coordinates: tuple[tuple[float, ...], ...] = ((0.0, 0.3, 1.0), (0.0, 0.5, 0.6, 1.0)),
    rank=2,
    order=1.5,
    lengthscale=0.3,
):
    lower, size = ppl.dist.constraints.lower_cholesky, rank ** len(coordinates)
    # At zero, where the prior is, the product has no gradient, and with wide factors the noise explains everything:
    # factors and core start from smooth functions and weights at random, and narrow.
    loc = ppl.param("core_loc", lambda: np.random.default_rng(0).normal(size=size))
    root = ppl.param("core_root", lambda: 0.1 * np.eye(size), constraint=lower)
    ppl.sample("W", ppl.dist.MultivariateNormal(loc, scale_tril=root))
    for k, at in enumerate(coordinates, 1):
        mode = process(ppl, y, k, at, rank, order, lengthscale)
        seen = ppl.param(f"seen{k}", lambda k=k, at=at: waves(np.array(at), rank, k))
        root = ppl.param(f"root{k}", lambda at=at: np.stack([5.0 * np.eye(rank)] * len(at)), constraint=lower)
        precision = root @ root.mT
        shift = (precision @ seen[..., None])[..., 0]
        potentials = {"precision": mode.read.mT @ precision @ mode.read, "shift": shift @ mode.read}
        ppl.sample(f"z{k}", ppl.structured.GaussianChain(**mode.chain, **potentials))


def waves(at, functions, seed):
    """Of the first one half a turn along the coordinates, of the next one two halves, and so on; random phases."""
    halves, phase = np.arange(1, functions + 1), np.random.default_rng(seed).uniform(0.0, 2.0 * np.pi, functions)
    return np.sqrt(2.0) * np.sin(np.pi * halves * ((at - at[0]) / ((at[-1] - at[0]) or 1.0))[:, None] + phase)


def example(rng: np.random.Generator) -> dict[str, np.ndarray]:
    index = np.stack([rng.permutation(6) % 3, rng.permutation(6) % 4], axis=1)
    return {"y": rng.normal(size=6).astype(np.float32), "index": index}
