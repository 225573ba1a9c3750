"""What `speed.py` compares with: the same workloads written by hand for one library, and its own SVI.

Message passing in the chain of `svae_lds` is not written again: the loss by hand takes it from `ppl_lvm.structured`,
which `structured.py` compares with other libraries. Every peer has `run(steps)`, which makes that many optimiser steps
and waits for the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]
LOG_2PI = math.log(2 * math.pi)
RATE = 1e-3
ROWS = 1_000_000


class Peer(Protocol):
    """Something that trains."""

    def run(self, steps: int) -> None: ...


def batches(rows: int, size: int | None, seed: int = 0) -> Iterator[np.ndarray]:
    """Indices of one batch after another, shuffled once per epoch."""
    rng = np.random.default_rng(seed)
    assert size is not None
    while True:
        order = rng.permutation(rows)[: rows // size * size].reshape(-1, size)
        yield from order


def networks(sizes: tuple[int, ...], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases of a small network as torch and equinox start them."""
    rng = np.random.default_rng(seed)
    return [
        (rng.uniform(-1, 1, (o, i)) / math.sqrt(i), rng.uniform(-1, 1, o) / math.sqrt(i))
        for i, o in pairwise(sizes)
    ]


# JAX.


class JaxLoop:
    """A jitted scan of gradient steps with optax's Adam."""

    def __init__(self, loss: Callable[..., Any], params: Any, data: Arrays, size: int | None) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        adam, held = optax.adam(RATE), {n: jnp.asarray(x) for n, x in data.items()}
        self._params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        self._state, self._key = adam.init(self._params), jax.random.key(0)
        rows = len(next(iter(data.values())))
        self._batches = None if size is None or size >= rows else batches(rows, size)

        @jax.jit
        def block(params: Any, state: Any, key: Any, index: Any) -> tuple[Any, Any, Any, Any]:
            def step(carry: Any, now: Any) -> tuple[Any, Any]:
                params, state = carry
                key, rows = now
                x = held if rows is None else {n: a[rows] for n, a in held.items()}
                value, gradient = jax.value_and_grad(loss)(params, x, key)
                updates, state = adam.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), value

            length = steps_of(index)
            key, *_ = keys = jax.random.split(key, length + 1)
            (params, state), values = jax.lax.scan(step, (params, state), (keys[1:], rows_of(index)))
            return params, state, key, values

        def steps_of(index: Any) -> int:
            return len(index)

        def rows_of(index: Any) -> Any:
            return None if self._batches is None else index

        self._block = block

    def run(self, steps: int) -> None:
        index = np.zeros(steps) if self._batches is None else np.stack([next(self._batches) for _ in range(steps)])
        self._params, self._state, self._key, values = self._block(self._params, self._state, self._key, index)
        values.block_until_ready()


class NumPyroSVI:
    """A jitted scan of `numpyro.infer.SVI.update`."""

    def __init__(self, model: Any, guide: Any, elbo: Any, data: Arrays, size: int | None) -> None:
        import jax
        import jax.numpy as jnp
        import numpyro.optim
        from numpyro.infer import SVI

        held = {n: jnp.asarray(x) for n, x in data.items()}
        rows = len(next(iter(data.values())))
        self._batches = None if size is None or size >= rows else batches(rows, size)
        svi = SVI(model, guide, numpyro.optim.Adam(RATE), elbo)
        first = held if self._batches is None else {n: a[:size] for n, a in held.items()}
        self._state = svi.init(jax.random.key(0), **first)

        @jax.jit
        def block(state: Any, index: Any) -> tuple[Any, Any]:
            def step(state: Any, rows: Any) -> tuple[Any, Any]:
                x = held if self._batches is None else {n: a[rows] for n, a in held.items()}
                return svi.update(state, **x)

            return jax.lax.scan(step, state, index)

        self._block = block

    def run(self, steps: int) -> None:
        index = np.zeros(steps) if self._batches is None else np.stack([next(self._batches) for _ in range(steps)])
        self._state, values = self._block(self._state, index)
        values.block_until_ready()


def jax_two_site(params: Any, data: Any, key: Any) -> Any:
    import jax
    import jax.numpy as jnp

    scale = jnp.exp(params["log_scale"])
    noise = jax.random.normal(key)
    z = params["loc"] + scale * noise
    log_q = -0.5 * noise**2 - params["log_scale"]
    return log_q + 0.5 * z**2 + 0.5 * ((data["x"] - z) ** 2).sum()


def jax_eight_schools(params: Any, data: Any, key: Any) -> Any:
    import jax
    import jax.numpy as jnp

    n = params["loc"].shape[0]
    L = jnp.tril(params["L"], -1) + jnp.diag(jnp.exp(jnp.diag(params["L"])))
    noise = jax.random.normal(key, (n,))
    u = params["loc"] + L @ noise
    log_q = -0.5 * (noise**2).sum() - jnp.diag(params["L"]).sum()
    mu, v, eta = u[0], u[1], u[2:]
    tau = 5.0 * jax.nn.softplus(v)
    log_p = -0.5 * (mu / 5.0) ** 2 - jnp.log1p((tau / 5.0) ** 2) - 0.5 * (eta**2).sum() + jax.nn.log_sigmoid(v)
    return log_q - log_p + 0.5 * (((data["y"] - mu - tau * eta) / data["sigma"]) ** 2).sum()


def jax_mixture(params: Any, data: Any, key: Any) -> Any:
    import jax
    import jax.numpy as jnp

    keys = dict(zip(("w", "mu", "sigma"), jax.random.split(key, 3), strict=True))
    values, log_q = {}, 0.0
    for name in keys:
        loc, log_scale = params[name + "_loc"], params[name + "_log_scale"]
        noise = jax.random.normal(keys[name], loc.shape)
        values[name] = loc + jnp.exp(log_scale) * noise
        log_q += (-0.5 * noise**2 - log_scale).sum()
    log_w = jax.nn.log_softmax(jnp.append(values["w"], 0.0))
    mu, log_sigma = values["mu"], values["sigma"]
    # Dirichlet(2) in softmax coordinates, where the Jacobian is the product of the weights.
    log_p = 2.0 * log_w.sum() - (0.5 * (mu / 3.0) ** 2).sum() - (0.5 * log_sigma**2).sum()
    error = (data["x"][:, None] - mu) * jnp.exp(-log_sigma)
    parts = (-0.5 * error**2 - log_sigma).sum(-1)
    return log_q - log_p - jax.nn.logsumexp(log_w + parts, axis=-1).sum()


def jax_vae(draws: int) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def loss(params: Any, data: Any, key: Any) -> Any:
        x = data["x"]
        loc, log_scale = jnp.split(jax_network(params["encoder"], x), 2, axis=-1)
        noise = jax.random.normal(key, (draws, *loc.shape))
        z = loc + jnp.exp(log_scale) * noise
        logits = jax_network(params["decoder"], z)
        log_x = (x * logits - jax.nn.softplus(logits)).sum(-1)
        log_w = log_x + (0.5 * noise**2 + log_scale - 0.5 * z**2).sum(-1)
        bound = log_w[0] if draws == 1 else jax.nn.logsumexp(log_w, axis=0) - jnp.log(draws)
        return -bound.sum()

    return loss


def jax_network(layers: Any, x: Any) -> Any:
    import jax.numpy as jnp

    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias


def jax_codes(params: Any, x: Any, key: Any, draws: int) -> tuple[Any, Any, Any]:
    """Logits [B, 200, 2], hard draws [draws, B, 200, 2], and a function of them: log p(x, z)."""
    import jax
    import jax.numpy as jnp

    logits = jax_network(params["encoder"], x).reshape(len(x), 200, 2)
    gumbel = jax.random.gumbel(key, (draws, *logits.shape))
    hard = jax.nn.one_hot(jnp.argmax(logits + gumbel, -1), 2)

    def log_joint(z: Any) -> Any:
        out = jax_network(params["decoder"], z.reshape(*z.shape[:-2], 400))
        return (x * out - jax.nn.softplus(out)).sum(-1) - 200 * math.log(2.0)

    return logits, hard, log_joint


def jax_reinmax(params: Any, data: Any, key: Any) -> Any:
    import jax

    logits, hard, log_joint = jax_codes(params, data["x"], key, 1)
    stop, log_pi = jax.lax.stop_gradient, jax.nn.log_softmax(logits)
    pi = stop(jax.nn.softmax(logits))

    def moved(p: Any) -> Any:
        return p * (log_pi - (p * log_pi).sum(-1, keepdims=True))

    step = 2.0 * moved((pi + hard) / 2.0) - 0.5 * moved(pi)
    z = hard + step - stop(step)
    return -(log_joint(z) - (z * log_pi).sum((-2, -1))).sum()


def jax_vimco(draws: int) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def loss(params: Any, data: Any, key: Any) -> Any:
        logits, hard, log_joint = jax_codes(params, data["x"], key, draws)
        log_q = (hard * jax.nn.log_softmax(logits)).sum((-2, -1))
        log_w = log_joint(hard) - log_q
        stopped = jax.lax.stop_gradient(log_w)
        bound = jax.nn.logsumexp(log_w, axis=0) - math.log(draws)
        others = (stopped.sum(0) - stopped) / (draws - 1)
        without = jnp.where(jnp.eye(draws, dtype=bool)[..., None], others[:, None], stopped[None])
        signal = jax.lax.stop_gradient(bound) - (jax.nn.logsumexp(without, axis=1) - math.log(draws))
        return -(bound + (signal * log_q).sum(0) - jax.lax.stop_gradient((signal * log_q).sum(0))).sum()

    return loss


def jax_pca(params: Any, data: Any, key: Any) -> Any:
    import jax
    import jax.numpy as jnp

    x, W = data["x"], params["W"]
    loc, log_scale = x @ params["R"].T + params["r"], params["log_scale"]
    noise = jax.random.normal(key, loc.shape)
    z = loc + jnp.exp(log_scale) * noise
    error = (x - z @ W.T - params["b"]) * jnp.exp(-params["log_sigma"])
    log_x = (-0.5 * error**2 - params["log_sigma"]).sum(-1)
    return -(log_x + (0.5 * noise**2 + log_scale - 0.5 * z**2).sum(-1)).sum() * (ROWS / len(x))


def chain_of(p: Any, code: Any, eye: Any, positive: Any, xp: Any) -> Any:
    """q(z | x) of `svae_lds`, from parameters and what the recognition network gives, steps in front."""
    from ppl_lvm.structured.gaussian_chain import GaussianChain

    latent = eye.shape[0]
    raw = code[..., latent:].reshape(*code.shape[:-1], latent, latent)
    inverse = xp.linalg.inv(xp.tril(raw, -1) + (positive(raw) + 1e-4) * eye)
    J = inverse.mT @ inverse
    h = (J @ code[..., :latent, None])[..., 0]
    steps = code.shape[0]
    bias = xp.broadcast_to(p["b"], (steps - 1, latent))
    noise = (xp.exp(p["log_q"]) * eye)[None]
    return GaussianChain(p["m"], eye, p["A"][None], bias, noise, J, h, validate=False)


def jax_svae_lds(params: Any, data: Any, key: Any) -> Any:
    import jax
    import jax.numpy as jnp

    x = data["x"]
    code = jax_network(params["encoder"], jnp.concatenate([x, jnp.ones_like(x)], -1)).swapaxes(0, 1)
    latent = params["m"].shape[0]
    q = chain_of(params, code, jnp.eye(latent), jax.nn.softplus, jnp)
    z = q.sample(jax.random.normal(key, (*code.shape[:2], latent)))
    error = (x - jax_network(params["decoder"], z.swapaxes(0, 1))) * jnp.exp(-params["log_scale"])
    log_x = (-0.5 * error**2 - params["log_scale"]).sum((-2, -1))
    psi = ((q.shift - 0.5 * (q.precision @ z[..., None])[..., 0]) * z).sum((0, -1))
    return -(log_x - psi + q.log_normalizer()).sum()


# torch.


class TorchLoop:
    """Gradient steps with fused Adam; the loss compiled, or not."""

    def __init__(
        self, loss: Callable[..., Any], params: Any, data: Arrays, size: int | None, compiled: bool, device: str
    ) -> None:
        import torch

        self._held = {n: torch.as_tensor(np.asarray(x, np.float32), device=device) for n, x in data.items()}
        leaves = torch.utils._pytree.tree_map(lambda x: torch.tensor(x, dtype=torch.float32, device=device), params)
        self._params = torch.utils._pytree.tree_map(lambda x: x.requires_grad_(), leaves)
        self._adam = torch.optim.Adam(torch.utils._pytree.tree_leaves(self._params), lr=RATE, fused=True)
        self._loss = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
        rows = len(next(iter(data.values())))
        self._batches = None if size is None or size >= rows else batches(rows, size)
        self._device = device

    def run(self, steps: int) -> None:
        import torch

        every = None
        if self._batches is not None:
            every = torch.as_tensor(np.stack([next(self._batches) for _ in range(steps)]), device=self._device)
        values = []
        for i in range(steps):
            x = self._held if every is None else {n: a[every[i]] for n, a in self._held.items()}
            self._adam.zero_grad()
            value = self._loss(self._params, x)
            value.backward()
            self._adam.step()
            values.append(value.detach())
        torch.stack(values).cpu()


class PyroSVI:
    """`pyro.infer.SVI.step`, as its documentation has it."""

    def __init__(
        self, model: Any, guide: Any, elbo: Any, data: Arrays, size: int | None, device: str
    ) -> None:
        import pyro
        import torch
        from pyro.infer import SVI
        from pyro.optim import Adam  # type: ignore[attr-defined]

        pyro.clear_param_store()
        self._held = {n: torch.as_tensor(np.asarray(x, np.float32), device=device) for n, x in data.items()}
        self._svi = SVI(model, guide, Adam({"lr": RATE}), elbo)
        rows = len(next(iter(data.values())))
        self._batches = None if size is None or size >= rows else batches(rows, size)
        self._device = device

    def run(self, steps: int) -> None:
        import torch

        for _ in range(steps):
            x = self._held
            if self._batches is not None:
                rows = torch.as_tensor(next(self._batches), device=self._device)
                x = {n: a[rows] for n, a in self._held.items()}
            self._svi.step(**x)


def torch_two_site(params: Any, data: Any) -> Any:
    import torch

    noise = torch.randn_like(params["loc"])
    z = params["loc"] + params["log_scale"].exp() * noise
    log_q = -0.5 * noise**2 - params["log_scale"]
    return log_q + 0.5 * z**2 + 0.5 * ((data["x"] - z) ** 2).sum()


def torch_eight_schools(params: Any, data: Any) -> Any:
    import torch
    from torch.nn import functional as F

    diagonal = params["L"].diagonal()
    L = params["L"].tril(-1) + diagonal.exp().diag()
    noise = torch.randn_like(params["loc"])
    u = params["loc"] + L @ noise
    log_q = -0.5 * (noise**2).sum() - diagonal.sum()
    mu, v, eta = u[0], u[1], u[2:]
    tau = 5.0 * F.softplus(v)
    log_p = -0.5 * (mu / 5.0) ** 2 - torch.log1p((tau / 5.0) ** 2) - 0.5 * (eta**2).sum() + F.logsigmoid(v)
    return log_q - log_p + 0.5 * (((data["y"] - mu - tau * eta) / data["sigma"]) ** 2).sum()


def torch_mixture(params: Any, data: Any) -> Any:
    import torch

    values, log_q = {}, 0.0
    for name in ("w", "mu", "sigma"):
        loc, log_scale = params[name + "_loc"], params[name + "_log_scale"]
        noise = torch.randn_like(loc)
        values[name] = loc + log_scale.exp() * noise
        log_q = log_q + (-0.5 * noise**2 - log_scale).sum()
    log_w = torch.cat([values["w"], values["w"].new_zeros(1)]).log_softmax(-1)
    mu, log_sigma = values["mu"], values["sigma"]
    log_p = 2.0 * log_w.sum() - (0.5 * (mu / 3.0) ** 2).sum() - (0.5 * log_sigma**2).sum()
    error = (data["x"][:, None] - mu) * (-log_sigma).exp()
    parts = (-0.5 * error**2 - log_sigma).sum(-1)
    return log_q - log_p - (log_w + parts).logsumexp(-1).sum()


def torch_vae(draws: int) -> Callable[..., Any]:
    import torch
    from torch.nn import functional as F

    def loss(params: Any, data: Any) -> Any:
        x = data["x"]
        loc, log_scale = torch_network(params["encoder"], x).chunk(2, -1)
        noise = torch.randn((draws, *loc.shape), device=loc.device)
        z = loc + log_scale.exp() * noise
        logits = torch_network(params["decoder"], z)
        log_x = (x * logits - F.softplus(logits)).sum(-1)
        log_w = log_x + (0.5 * noise**2 + log_scale - 0.5 * z**2).sum(-1)
        bound = log_w[0] if draws == 1 else log_w.logsumexp(0) - math.log(draws)
        return -bound.sum()

    return loss


def torch_network(layers: Any, x: Any) -> Any:
    from torch.nn import functional as F

    for weight, bias in layers[:-1]:
        x = F.linear(x, weight, bias).tanh()
    weight, bias = layers[-1]
    return F.linear(x, weight, bias)


def torch_codes(params: Any, x: Any, draws: int) -> tuple[Any, Any, Any]:
    """Logits [B, 200, 2], hard draws [draws, B, 200, 2], and a function of them: log p(x, z)."""
    import torch
    from torch.nn import functional as F

    logits = torch_network(params["encoder"], x).reshape(len(x), 200, 2)
    ends = logits.detach().softmax(-1).cumsum(-1)[..., :-1]
    # A uniform for each draw: torch takes ten times as long for an exponential.
    uniform = torch.rand((draws, len(x), 200, 1), device=x.device)
    hard = F.one_hot((uniform >= ends).sum(-1), 2).to(logits.dtype)

    def log_joint(z: Any) -> Any:
        out = torch_network(params["decoder"], z.reshape(*z.shape[:-2], 400))
        return (x * out - F.softplus(out)).sum(-1) - 200 * math.log(2.0)

    return logits, hard, log_joint


def torch_reinmax(params: Any, data: Any) -> Any:
    logits, hard, log_joint = torch_codes(params, data["x"], 1)
    log_pi = logits.log_softmax(-1)
    pi = log_pi.detach().exp()

    def moved(p: Any) -> Any:
        return p * (log_pi - (p * log_pi).sum(-1, keepdim=True))

    step = 2.0 * moved((pi + hard) / 2.0) - 0.5 * moved(pi)
    z = hard + step - step.detach()
    return -(log_joint(z) - (z * log_pi).sum((-2, -1))).sum()


def torch_vimco(draws: int) -> Callable[..., Any]:
    import torch

    def loss(params: Any, data: Any) -> Any:
        logits, hard, log_joint = torch_codes(params, data["x"], draws)
        log_q = (hard * logits.log_softmax(-1)).sum((-2, -1))
        log_w = log_joint(hard) - log_q
        stopped = log_w.detach()
        bound = log_w.logsumexp(0) - math.log(draws)
        others = (stopped.sum(0) - stopped) / (draws - 1)
        eye = torch.eye(draws, dtype=torch.bool, device=stopped.device)[..., None]
        without = torch.where(eye, others[:, None], stopped[None])
        signal = bound.detach() - (without.logsumexp(1) - math.log(draws))
        credit = (signal * log_q).sum(0)
        return -(bound + credit - credit.detach()).sum()

    return loss


def torch_pca(params: Any, data: Any) -> Any:
    import torch

    x, W = data["x"], params["W"]
    loc, log_scale = x @ params["R"].T + params["r"], params["log_scale"]
    noise = torch.randn_like(loc)
    z = loc + log_scale.exp() * noise
    error = (x - z @ W.T - params["b"]) * (-params["log_sigma"]).exp()
    log_x = (-0.5 * error**2 - params["log_sigma"]).sum(-1)
    return -(log_x + (0.5 * noise**2 + log_scale - 0.5 * z**2).sum(-1)).sum() * (ROWS / len(x))


def torch_svae_lds(params: Any, data: Any) -> Any:
    import torch
    from torch.nn import functional as F

    x = data["x"]
    code = torch_network(params["encoder"], torch.cat([x, torch.ones_like(x)], -1)).transpose(0, 1)
    latent = params["m"].shape[0]
    q = chain_of(params, code, torch.eye(latent, device=x.device), F.softplus, torch)
    z = q.sample(torch.randn((*code.shape[:2], latent), device=x.device))
    error = (x - torch_network(params["decoder"], z.transpose(0, 1))) * (-params["log_scale"]).exp()
    log_x = (-0.5 * error**2 - params["log_scale"]).sum((-2, -1))
    psi = ((q.shift - 0.5 * (q.precision @ z[..., None])[..., 0]) * z).sum((0, -1))
    return -(log_x - psi + q.log_normalizer()).sum()


# Native programs for the libraries' own SVI, with the distributions of either (`dist`) and its primitives (`ppl`).


def two_site(ppl: Any, dist: Any, np_: Any) -> tuple[Any, Any]:
    def model(x: Any) -> None:
        z = ppl.sample("z", dist.Normal(np_.zeros(()), 1.0))
        with ppl.plate("data", x.shape[0]):
            ppl.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        loc = ppl.param("loc", np_.zeros(()))
        scale = ppl.param("scale", np_.ones(()), constraint=dist.constraints.positive)
        ppl.sample("z", dist.Normal(loc, scale))

    return model, guide


def eight_schools(ppl: Any, dist: Any, np_: Any) -> tuple[Any, Any]:
    def model(y: Any, sigma: Any) -> None:
        mu = ppl.sample("mu", dist.Normal(np_.zeros(()), 5.0))
        tau = ppl.sample("tau", dist.HalfCauchy(5.0 * np_.ones(())))
        eta = ppl.sample("eta", dist.Normal(np_.zeros(8), 1.0).to_event(1))
        ppl.sample("y", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)

    return model, None


def mixture(ppl: Any, dist: Any, np_: Any) -> tuple[Any, Any]:
    def model(x: Any) -> None:
        w = ppl.sample("w", dist.Dirichlet(2.0 * np_.ones(3)))
        mu = ppl.sample("mu", dist.Normal(np_.zeros((3, 2)), 3.0).to_event(2))
        sigma = ppl.sample("sigma", dist.LogNormal(np_.zeros((3, 2)), 1.0).to_event(2))
        with ppl.plate("data", x.shape[0]):
            parts = dist.Normal(mu, sigma).to_event(1)
            ppl.sample("x", dist.MixtureSameFamily(dist.Categorical(probs=w), parts), obs=x)

    return model, None


def pyro_vae(features: int, hidden: int, latent: int, device: str) -> tuple[Any, Any]:
    import pyro
    import pyro.distributions as dist
    import torch
    from torch import nn

    def network(i: int, o: int) -> Any:
        return nn.Sequential(nn.Linear(i, hidden), nn.Tanh(), nn.Linear(hidden, o)).to(device)

    encoder, decoder = network(features, 2 * latent), network(latent, features)

    def model(x: Any) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent, device=device), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def numpyro_vae(features: int, hidden: int, latent: int) -> tuple[Any, Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def network(name: str, sizes: tuple[int, ...], x: Any) -> Any:
        for i, (weight, bias) in enumerate(networks(sizes, 0)):
            weight = numpyro.param(f"{name}.{i}.weight", jnp.asarray(weight, jnp.float32))
            bias = numpyro.param(f"{name}.{i}.bias", jnp.asarray(bias, jnp.float32))
            x = (jnp.tanh(x) if i else x) @ weight.T + bias
        return x

    def model(x: Any) -> None:
        with numpyro.plate("data", x.shape[0], dim=-1):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            logits = network("decoder", (latent, hidden, features), z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", x.shape[0], dim=-1):
            loc, log_scale = jnp.split(network("encoder", (features, hidden, 2 * latent), x), 2, axis=-1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


def pca(ppl: Any, dist: Any, np_: Any) -> tuple[Any, Any]:
    positive = dist.constraints.positive
    W0, R0 = (np_.asarray(p.tolist()) for p in small_matrices())

    def model(x: Any) -> None:
        W, b = ppl.param("W", W0), ppl.param("b", np_.zeros(10))
        sigma = ppl.param("sigma", np_.ones(()), constraint=positive)
        with ppl.plate("data", ROWS, subsample_size=x.shape[0]):
            z = ppl.sample("z", dist.Normal(np_.zeros(2), 1.0).to_event(1))
            ppl.sample("x", dist.Normal(z @ W.T + b, sigma).to_event(1), obs=x)

    def guide(x: Any) -> None:
        R, r = ppl.param("R", R0), ppl.param("r", np_.zeros(2))
        scale = ppl.param("scale", np_.ones(2), constraint=positive)
        with ppl.plate("data", ROWS, subsample_size=x.shape[0]):
            ppl.sample("z", dist.Normal(x @ R.T + r, scale).to_event(1))

    return model, guide


def small_matrices() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(10, 2)), 0.1 * rng.normal(size=(2, 10))
