"""Neurons that excite and inhibit each other, some of which nobody recorded: a partially observed GLM of spike counts.

    y_t = (x_t, h_t)                                             visible and hidden counts of bin t = 1 .. T
    s_t = sum_l k_l y_{t-l},  k_l = exp(-decay l dt) / Z         l = 1 .. window, with dt sum_l k_l = 1
    y_ti | y_<t ~ Poisson(sigmoid(W s_t + b)_i)                  neurons i, visible ones first
    q(h_ti | x_<t, h_<t) = Poisson(sigmoid(V s_t + a)_i)         hidden neurons i, on their own draws

Counts of hidden neurons have no finite support and no reparameterised draw, so they are for score-type estimators.
Hidden neurons carry no names: permuted ones are as probable. Nothing before the first bin counts.

Source: Pillow and Latham (2007), Neural Characterization in Partially Observed Populations of Spiking Neurons, NIPS 20;
in this form Li, Wang, Li and Wu (2024), arXiv:2311.02516, section 4.3.

Args:
    x: spike counts of the visible neurons [rows, T, visible].
    hidden: number of neurons that were not recorded.
    window: bins of history that a neuron sees.
    decay: rate at which a past spike's influence falls, per unit of time.
    dt: width of a bin.
"""

import numpy as np

recipe = "vis"


def model(ppl, x, *, hidden=2, window=5, decay=5.0, dt=0.05):
    dist, xp, visible = ppl.dist, ppl.xp, x.shape[-1]
    W = ppl.param("W", lambda: np.zeros((visible + hidden, visible + hidden)))
    b = ppl.param("b", lambda: np.zeros(visible + hidden))
    kernel = kernel_of(xp, x, window, decay, dt)
    seen = past(xp, x, kernel) @ xp.moveaxis(W[:, :visible], 0, 1) + b
    own = xp.moveaxis(W[:, visible:], 0, 1)
    with ppl.plate("data", len(x)):

        def step(h, now):
            x_t, seen_t = now
            rate = sigmoid(xp, seen_t + filtered(xp, h, kernel) @ own)
            h_t = ppl.sample("h", dist.Poisson(rate[..., visible:]).to_event(1))
            ppl.sample("x", dist.Poisson(rate[..., :visible]).to_event(1), obs=x_t)
            return latest(xp, h, h_t), None

        ppl.scan(step, nothing(xp, x, hidden, window), (xp.moveaxis(x, 1, 0), xp.moveaxis(seen, 1, 0)))


def guide(ppl, x, *, hidden=2, window=5, decay=5.0, dt=0.05):
    dist, xp, visible = ppl.dist, ppl.xp, x.shape[-1]
    V = ppl.param("V", lambda: np.zeros((hidden, visible + hidden)))
    a = ppl.param("a", lambda: np.zeros(hidden))
    kernel = kernel_of(xp, x, window, decay, dt)
    seen = past(xp, x, kernel) @ xp.moveaxis(V[:, :visible], 0, 1) + a
    own = xp.moveaxis(V[:, visible:], 0, 1)
    with ppl.plate("data", len(x)):

        def step(h, seen_t):
            rate = sigmoid(xp, seen_t + filtered(xp, h, kernel) @ own)
            h_t = ppl.sample("h", dist.Poisson(rate).to_event(1))
            return latest(xp, h, h_t), None

        ppl.scan(step, nothing(xp, x, hidden, window), xp.moveaxis(seen, 1, 0))


def kernel_of(xp, x, window, decay, dt):
    """`[window, 1]`, the last bin first."""
    weights = np.exp(-decay * dt * np.arange(window))
    return xp.stack([float(k) + 0.0 * x[:1, 0, 0] for k in weights / (dt * weights.sum())])


def past(xp, x, kernel):
    """`sum_l k_l x_{t-l}` of all bins at once, [rows, T, visible]."""
    T = x.shape[1]
    lags = range(1, len(kernel) + 1)
    moved = (xp.concat((0.0 * x[:, :lag], 1.0 * x[:, : max(T - lag, 0)]), axis=1) for lag in lags)
    return sum(k * part for k, part in zip(kernel, moved, strict=True))


def filtered(xp, h, kernel):
    """The same of the last bins [.., window, hidden]."""
    return xp.sum(h * kernel, axis=-2)


def latest(xp, h, h_t):
    # Counts are integers in one of the libraries.
    h_t = 1.0 * h_t[..., None, :]
    return h_t if h.shape[-2] == 1 else xp.concat((h_t, h[..., :-1, :] + 0.0 * h_t), axis=-2)


def nothing(xp, x, hidden, window):
    return xp.zeros((len(x), window, hidden)) + 0.0 * x[:, :1, :1]


def sigmoid(xp, a):
    return xp.exp(-xp.logaddexp(0.0 * a, -a))


def example(rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(0.5, size=(6, 8, 3)).astype(np.float32)
