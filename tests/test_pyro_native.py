"""Programs in the style of Pyro's tutorials, fitted as they are; their ELBO is Pyro's own at the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_lvm import Fit, fit, to_pyro
from ppl_lvm.backends._pyro_train import _step_seed

RNG = np.random.default_rng(0)


class Example(NamedTuple):
    """A program as a tutorial writes it, and its data."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: Any
    options: dict[str, Any] = {}


# A variational autoencoder whose networks are registered by pyro.module.


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 5)
        self.loc, self.scale = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = nn.functional.softplus(self.hidden(x))
        return self.loc(hidden), self.scale(hidden).exp()


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 6))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


def vae() -> Example:
    program = VAE()
    return Example(program.model, program.guide, RNG.integers(0, 2, (8, 6)).astype(float))


# A semi-supervised VAE: rows with a label and rows without, the label's classifier trained on both.


class SemiSupervised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classify, self.encode, self.decode = nn.Linear(4, 3), nn.Linear(7, 4), nn.Linear(5, 4)

    def model(self, x: Tensor, xs: Tensor, ys: Tensor) -> None:
        pyro.module("ss", self)
        with pyro.plate("unlabelled", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(torch.cat([y, z], -1)), 1.0).to_event(1), obs=x)
        with pyro.plate("labelled", len(xs)):
            zs = pyro.sample("zs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("xs", dist.Normal(self.decode(torch.cat([ys, zs], -1)), 1.0).to_event(1), obs=xs)
            with poutine.scale(scale=2.5):
                pyro.sample("ys", dist.OneHotCategorical(logits=self.classify(xs)), obs=ys)

    def guide(self, x: Tensor, xs: Tensor, ys: Tensor) -> None:
        pyro.module("ss", self)
        with pyro.plate("unlabelled", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.classify(x)))
            code = self.encode(torch.cat([x, y], -1))
            pyro.sample("z", dist.Normal(code[..., :2], code[..., 2:].exp()).to_event(1))
        with pyro.plate("labelled", len(xs)):
            code = self.encode(torch.cat([xs, ys], -1))
            pyro.sample("zs", dist.Normal(code[..., :2], code[..., 2:].exp()).to_event(1))


def semi_supervised() -> Example:
    program = SemiSupervised()
    data = (RNG.normal(size=(5, 4)), RNG.normal(size=(5, 4)), np.eye(3)[RNG.integers(0, 3, 5)])
    return Example(program.model, program.guide, data, {"data_plate": "none", "estimator": {"y": "score"}})


# A Gaussian mixture: globals under an AutoDelta, the discrete site summed in the likelihood.


def mixture_model(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        parts = dist.Normal(locs, scale)
        pyro.sample("obs", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)


def mixture_map() -> Example:
    return Example(mixture_model, AutoDelta(mixture_model), np.array([0.0, 1.0, 10.0, 11.0, 12.0]))


def mixture_normal() -> Example:
    return Example(mixture_model, AutoNormal(mixture_model), np.array([0.0, 1.0, 10.0, 11.0, 12.0]))


# A deep Markov model: a loop over time, sequences of several lengths masked, an RNN backwards as the guide.


class DMM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transition, self.emission = nn.Linear(2, 4), nn.Linear(2, 3)
        self.rnn = nn.RNN(3, 4, batch_first=True)
        self.combine = nn.Linear(6, 4)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(2)), nn.Parameter(0.1 * torch.ones(2))

    def model(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        z = self.z_0.expand(len(x), 2)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=lengths > t):
                    code = self.transition(z)
                    z = pyro.sample(f"z_{t}", dist.Normal(code[..., :2], (0.1 * code[..., 2:]).exp()).to_event(1))
                    emitted = dist.Bernoulli(logits=self.emission(z)).to_event(1)
                    pyro.sample(f"obs_x_{t}", emitted, obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        h, _ = self.rnn(x.flip(1))
        h, z = h.flip(1), self.z_q_0.expand(len(x), 2)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=lengths > t):
                    before = torch.cat([z, h[:, t].expand(*z.shape[:-1], 4)], -1)
                    code = self.combine(before)
                    z = pyro.sample(f"z_{t}", dist.Normal(code[..., :2], (0.1 * code[..., 2:]).exp()).to_event(1))

    def forward(self) -> None:
        """Never called: the networks are used through their attributes."""


def deep_markov() -> Example:
    program = DMM()
    data = (RNG.integers(0, 2, (4, 3, 3)).astype(float), np.array([3, 1, 2, 3]))
    return Example(program.model, program.guide, data)


# Topics: documents of words in nested plates, a structured guide over documents.


def lda_model(words: Tensor) -> None:
    with pyro.plate("topics", 2):
        topics = pyro.sample("topic_words", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("documents", len(words), dim=-2):
        shares = pyro.sample("shares", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        shares = shares / shares.sum(-1, keepdim=True)
        with pyro.plate("words", words.shape[1], dim=-1):
            pyro.sample("w", dist.Categorical(shares @ topics), obs=words)


def lda_guide(words: Tensor) -> None:
    counts = nn.functional.one_hot(words, 4).to(torch.get_default_dtype()).sum(1)
    concentration = pyro.param("topics", lambda: 1.0 + torch.rand(2, 4), constraint=constraints.positive)
    weight = pyro.param("weight", lambda: 0.1 * torch.randn(4, 2))
    with pyro.plate("topics", 2):
        pyro.sample("topic_words", dist.Dirichlet(concentration))
    with pyro.plate("documents", len(words), dim=-2):
        pyro.sample("shares", dist.LogNormal((counts @ weight).unsqueeze(1), 0.5).to_event(1))


def topics() -> Example:
    return Example(lda_model, lda_guide, RNG.integers(0, 4, (5, 6)))


# Regression as a PyroModule whose weights are random, under a joint normal.


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))
        self.spread = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.offsets = nn.Linear(2, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        group = pyro.sample("group", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        mean = self.linear(x).squeeze(-1) + group + 0.1 * self.offsets(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(mean, sigma * self.spread), obs=y)
        return mean


def regression() -> Example:
    model = Regression()
    x = RNG.normal(size=(9, 2))
    return Example(model, AutoMultivariateNormal(model), (x, x @ [1.0, -2.0] + 0.3))


def guide_list() -> Example:
    model = Regression()
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["sigma"])))
    guide.append(AutoMultivariateNormal(poutine.block(model, hide=["sigma"])))
    x = RNG.normal(size=(9, 2))
    return Example(model, guide, (x, x @ [1.0, -2.0] + 0.3))


# A Gaussian process: the rows depend on each other, so the program is one row.


def gp_model(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    variance = pyro.sample("variance", dist.LogNormal(0.0, 1.0))
    noise = pyro.param("noise", torch.tensor(0.2), constraint=constraints.positive)
    squared = (x[:, None] - x[None, :]).pow(2)
    kernel = variance[..., None, None] * torch.exp(-0.5 * squared / length[..., None, None].pow(2))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel + noise * torch.eye(len(x))), obs=y)


def gaussian_process() -> Example:
    x = np.linspace(0.0, 3.0, 7)
    return Example(gp_model, AutoNormal(gp_model), (x, np.sin(x)))


# Plates that are not nested, that subsample, that are loops; factors, deterministic values, scales, masks.


def crossed_model(x: Tensor) -> None:
    rows, columns = pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        mean = pyro.deterministic("mean", a + b)
        pyro.sample("x", dist.Normal(mean, 1.0).mask(x > -0.5), obs=x)
    pyro.factor("wish", -b.pow(2).sum(-1))


def crossed() -> Example:
    return Example(crossed_model, AutoNormal(crossed_model), RNG.normal(size=(4, 3)), {"data_plate": "none"})


def subsampled_model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x), subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def subsampled_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.1))
    mu = pyro.sample("mu", dist.Normal(loc, 1.0))
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("rows", len(x), subsample_size=3) as index:
        pyro.sample("z", dist.Normal(slope * x[index] + 0.1 * mu, 0.8))


def subsampled() -> Example:
    return Example(subsampled_model, subsampled_guide, RNG.normal(size=8))


def subsampled_automatically() -> Example:
    return Example(subsampled_model, AutoNormal(subsampled_model), RNG.normal(size=8))


def loop_model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    for i in pyro.plate("rows", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
        with poutine.scale(scale=1.5):
            pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=x[i])


def loop_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.3))
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
    for i in pyro.plate("rows", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(slope * x[i], 0.8))


def loop() -> Example:
    return Example(loop_model, loop_guide, RNG.normal(size=4))


EXAMPLES = {
    f.__name__: f
    for f in (
        *(vae, semi_supervised, mixture_map, mixture_normal, deep_markov, topics, regression, guide_list),
        *(gaussian_process, crossed, subsampled, subsampled_automatically, loop),
    )
}


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def arguments(data: Any) -> list[Tensor]:
    return [torch.as_tensor(a) for a in (data if isinstance(data, tuple) else (data,))]


def fitted(example: Example, **options: Any) -> Fit:
    every = {"recipe": "elbo", "batch_size": None, "dtype": "float64", "compile": "eager", "learning_rate": 0.01}
    return fit(example.model, example.guide, example.data, **every | example.options | options)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_elbo_is_pyros_own(name: str) -> None:
    """After some steps, at the noise of the last one: Trace_ELBO of the program itself, run by Pyro on its store."""
    torch.manual_seed(1)
    example = EXAMPLES[name]()
    run = fitted(example, steps=3)
    last = fitted(example, steps=4, state=run.state)
    assert not np.allclose([*run.history["loss"]], run.history["loss"][0]) or name == "mixture_map"
    assert set(pyro.get_param_store().keys()) == set()
    to_pyro(run)
    assert set(pyro.get_param_store().keys()) == set(run.params)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(_step_seed(0, 3))
        expected = Trace_ELBO().loss(example.model, example.guide, *arguments(example.data))
    finally:
        torch.set_default_dtype(before)
    rows = len(arguments(example.data)[0]) if run._bound.structure.data_plate else 1
    assert last.history["loss"][0] * rows == pytest.approx(expected, abs=1e-10, rel=1e-10)
