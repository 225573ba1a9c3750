"""Programs in the style of Pyro's tutorials, fitted as they are; their ELBO is Pyro's own at the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import Trace_ELBO, autoguide
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_lvm import Fit, fit, to_pyro
from ppl_lvm.backends._pyro_train import _step_seed
from ppl_lvm.backends._torch_dists import draw
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.structure import Plan
from ppl_lvm.errors import BackendError, LegalityError, ProgramError

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
                with poutine.mask(mask=lengths > t):  # type: ignore[call-overload]
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
                with poutine.mask(mask=lengths > t):  # type: ignore[call-overload]
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
    concentration = pyro.param("concentration", lambda: 1.0 + torch.rand(2, 4), constraint=constraints.positive)
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
        self.linear: Any = PyroModule[nn.Linear](2, 1)  # type: ignore[arg-type, call-arg]
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))
        self.spread = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.offsets = nn.Linear(2, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        group = pyro.sample("group", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        mean = self.linear(x).squeeze(-1) + group + 0.1 * self.offsets(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(mean, sigma * self.spread), obs=y)  # type: ignore[arg-type]
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


def converted() -> Example:
    """A network of torch made Bayesian in place."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    to_pyro_module_(net)
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())))

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    x = RNG.normal(size=(7, 2))
    return Example(model, AutoNormal(model), (x, x.sum(1)))


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
    for i in map(int, pyro.plate("rows", len(x))):
        z = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
        with poutine.scale(scale=1.5):
            pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=x[i])


def loop_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.3))
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
    for i in map(int, pyro.plate("rows", len(x))):
        pyro.sample(f"z_{i}", dist.Normal(slope * x[i], 0.8))


def loop() -> Example:
    return Example(loop_model, loop_guide, RNG.normal(size=4))


EXAMPLES = {
    f.__name__: f
    for f in (
        *(vae, semi_supervised, mixture_map, mixture_normal, deep_markov, topics, regression, guide_list),
        *(converted, gaussian_process, crossed, subsampled, subsampled_automatically, loop),
    )
}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """What programs make themselves, priors and networks, is float64, and the store is empty."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    pyro.clear_param_store()


def arguments(data: Any) -> list[Tensor]:
    return [torch.as_tensor(a) for a in (data if isinstance(data, tuple) else (data,))]


def fitted(example: Example, **options: Any) -> Fit:
    every = {"recipe": "elbo", "batch_size": None, "dtype": "float64", "compile": "eager", "learning_rate": 0.01}
    return fit(example.model, example.guide, example.data, **every | example.options | options)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_elbo_is_pyros_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some steps, at the noise of the last one: Trace_ELBO of the program itself, run by Pyro on its store.

    Classes are drawn as the engine does it, which takes other noise than torch does.
    """

    def drawn(fn: Any, shape: Any = ()) -> Tensor:
        return draw(fn.expand((*shape, *fn.batch_shape)))

    monkeypatch.setattr(torch.distributions.Categorical, "sample", drawn)
    example = EXAMPLES[name]()
    run = fitted(example, steps=3)
    last = fitted(example, steps=4, state=run.state)
    assert not np.allclose([*run.history["loss"]], run.history["loss"][0]) or name == "mixture_map"
    assert set(pyro.get_param_store().keys()) == set()
    to_pyro(run)
    assert set(pyro.get_param_store().keys()) == set(run.params)
    torch.manual_seed(_step_seed(0, 3))
    expected = Trace_ELBO().loss(example.model, example.guide, *arguments(example.data))
    rows = len(arguments(example.data)[0]) if run._bound.structure.data_plate else 1
    assert last.history["loss"][0] * rows == pytest.approx(expected, abs=1e-10, rel=1e-10)


@pytest.mark.parametrize("name", ["vae", "deep_markov", "regression", "guide_list", "subsampled_automatically"])
def test_a_traced_graph_takes_the_same_steps(name: str) -> None:
    example = EXAMPLES[name]()
    eager, graph = (fitted(example, steps=5, compile=mode) for mode in ("eager", "graph"))
    assert graph.state.mode == "graph"
    np.testing.assert_allclose(eager.history["loss"], graph.history["loss"], rtol=1e-10)
    for parameter, value in eager.params.items():
        np.testing.assert_allclose(graph.params[parameter], value, rtol=1e-8, atol=1e-10)


LOCAL_ROWS = RNG.normal(size=8)


def local_model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.7))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


AUTOGUIDES: dict[str, Callable[..., Any]] = {
    **{
        f.__name__: f
        for f in (
            *(AutoDelta, AutoNormal, AutoMultivariateNormal, autoguide.AutoDiagonalNormal),
            *(autoguide.AutoLowRankMultivariateNormal, autoguide.AutoGaussian, autoguide.AutoStructured),
        )
    },
    "AutoIAFNormal": partial(autoguide.AutoIAFNormal, hidden_dim=[10], num_transforms=2),
    "AutoNormalizingFlow": lambda model: autoguide.AutoNormalizingFlow(
        model, partial(iterated, 2, affine_autoregressive)
    ),
}


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_an_autoguide_is_fitted_and_left_as_it_was(name: str) -> None:
    """All parameters move; the object is not set up; a second fit begins and goes as the first."""
    guide = AUTOGUIDES[name](local_model)
    before, store = dict(guide.__dict__), dict(pyro.get_param_store().items())
    runs = [fitted(Example(local_model, guide, LOCAL_ROWS), steps=3) for _ in range(2)]
    assert guide.prototype_trace is None
    assert guide.__dict__.keys() == before.keys()
    assert not list(guide.parameters())
    assert dict(pyro.get_param_store().items()) == store
    np.testing.assert_array_equal(runs[0].history["loss"], runs[1].history["loss"])
    began = runs[0]._bound.constrain(runs[0]._bound.initial)
    for parameter, value in runs[0].params.items():
        assert not np.allclose(value, began[parameter].numpy(), atol=1e-6), parameter


def test_an_autoguide_that_is_set_up_starts_from_its_own_values() -> None:
    guide = AutoNormal(local_model, init_scale=0.3)
    guide(torch.tensor(LOCAL_ROWS))
    with torch.no_grad():
        guide.locs.mu.fill_(0.7)
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    pyro.clear_param_store()
    pyro.param("AutoNormal.locs.mu", torch.tensor(99.0))
    run = fitted(Example(local_model, guide, LOCAL_ROWS), steps=1, learning_rate=1e-3, optimizer="sgd")
    assert run.params["AutoNormal.locs.mu"] == pytest.approx(0.7, abs=0.1)
    assert run.params["AutoNormal.scales.z"] == pytest.approx(0.3, abs=0.1)
    for name, parameter in guide.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert pyro.param("AutoNormal.locs.mu").item() == 99.0


def test_fitted_values_go_into_the_guide_on_request() -> None:
    guide = AutoMultivariateNormal(local_model)
    run = fitted(Example(local_model, guide, LOCAL_ROWS), steps=200, learning_rate=0.05)
    to_pyro(run)
    median = guide.median()
    draws = run.posterior(4000)
    assert median["mu"].item() == pytest.approx(np.median(draws.values["mu"]), abs=0.08)
    spread = draws.values["mu"].std() / 4000**0.5
    assert spread < 0.02
    low, high = guide.quantiles([0.16, 0.84])["mu"]
    assert (high - low).item() / 2 == pytest.approx(draws.values["mu"].std(), rel=0.1)


def test_the_density_of_an_autonormal_per_row_is_its_auxiliary_sites() -> None:
    """K > 1 draws of a local site differ, and log q of the table is the normal's of the value that is in it."""
    run = fitted(Example(local_model, AutoNormal(local_model), LOCAL_ROWS), steps=2, recipe="iwae", draws=4)
    bound, p = run._bound, run.params
    table = bound.draws(run._trained, bound.batch(Call.of(LOCAL_ROWS)), 3, Plan.of_values(bound.structure, 4, 1))
    z = table.sites["z"].value
    assert z.shape == (1, 4, 8)
    assert float(z.std(1).min()) > 0.01
    loc, scale = torch.tensor(p["AutoNormal.locs.z"]), torch.tensor(p["AutoNormal.scales.z"])
    expected = dist.Normal(loc, scale).log_prob(z)
    torch.testing.assert_close(table.log_q, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "AutoIAFNormal", "AutoDelta"]
)
def test_a_guide_without_densities_per_row_is_refused_for_bounds_per_row(name: str) -> None:
    guide = AUTOGUIDES[name](local_model)
    with pytest.raises(LegalityError, match="all draws of a row are equal"):
        fitted(Example(local_model, guide, LOCAL_ROWS), recipe="iwae", draws=3, steps=1)
    if name != "AutoDelta":
        run = fitted(Example(local_model, guide, LOCAL_ROWS), recipe="iwae", draws=3, steps=2, data_plate="none")
        assert np.isfinite(run.history["loss"]).all()


def per_row_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(x)))
    pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5))


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, AutoDelta, lambda _: per_row_guide])
def test_parameters_of_rows_are_refused_in_mini_batches(make: Callable[..., Any]) -> None:
    guide = make(local_model)
    with pytest.raises(LegalityError, match=r"for the rows of one batch.*batch_size=None"):
        fitted(Example(local_model, guide, LOCAL_ROWS), steps=1, batch_size=4)
    run = fitted(Example(local_model, guide, LOCAL_ROWS), steps=1)
    with pytest.raises(ProgramError, match="rows"):
        run.log_likelihood(LOCAL_ROWS[:3], draws=5)
    assert np.isfinite(run.log_likelihood(draws=5).values).all()


def global_model(x: Tensor) -> None:
    mu, sigma = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, sigma), obs=x)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoIAFNormal"])
def test_a_guide_of_globals_takes_mini_batches_and_other_rows(name: str) -> None:
    """Its random parts that are no parameters (a flow's permutation) are the fit's on any data."""
    guide = AUTOGUIDES[name](global_model)
    run = fitted(Example(global_model, guide, LOCAL_ROWS), steps=5, batch_size=4, seed=3)
    here, there = (run.posterior(3, data=x, seed=1).values["mu"] for x in (LOCAL_ROWS, LOCAL_ROWS[:2]))
    np.testing.assert_allclose(here, there, rtol=1e-12)


def test_a_guide_set_up_on_other_rows_is_refused() -> None:
    guide = AutoNormal(local_model)
    guide(torch.tensor(LOCAL_ROWS[:3]))
    with pytest.raises(ProgramError, match="Plate 'rows' has 3 rows where it is met first, and 8 later"):
        fitted(Example(local_model, guide, LOCAL_ROWS), steps=1)


def test_two_modules_with_a_parameter_of_one_name_are_refused() -> None:
    class Scale(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.sum()

    one, other = Scale(), Scale()

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(one(x).mean() + other(x).mean(), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ProgramError, match="Two parameters of modules are named 'weight'"):
        fitted(Example(local_model, guide, LOCAL_ROWS), steps=1)


def networks(*layers: nn.Module) -> tuple[Any, Callable[..., Any]]:
    """An encoder with these layers in its middle, and the guide that calls it."""
    net = nn.Sequential(nn.Linear(1, 3), *layers, nn.Linear(3, 2))

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        code = net(x[:, None])
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(code[..., 0], code[..., 1].exp()))

    return net, guide


def test_running_statistics_are_refused_unless_fixed() -> None:
    net, guide = networks(nn.BatchNorm1d(3))
    before = {n: v.clone() for n, v in net.state_dict().items()}
    with pytest.raises(BackendError, match=r"BatchNorm1d.running_mean.*eval\(\)"):
        fitted(Example(local_model, guide, LOCAL_ROWS), steps=1)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    net.eval()
    net[1].running_mean.fill_(0.4)
    run = fitted(Example(local_model, guide, LOCAL_ROWS), steps=5, batch_size=4)
    assert (net[1].running_mean == 0.4).all()
    assert np.isfinite(run.history["loss"]).all()
    net, guide = networks(nn.BatchNorm1d(3, track_running_stats=False))
    fitted(Example(local_model, guide, LOCAL_ROWS), steps=1)


def test_dropout_is_drawn_by_the_engine_and_off_in_evaluation() -> None:
    net, guide = networks(nn.Dropout(0.5))
    example = Example(local_model, guide, LOCAL_ROWS)
    first, again = (fitted(example, steps=20) for _ in range(2))
    np.testing.assert_array_equal(first.history["loss"], again.history["loss"])
    other = fitted(example, steps=20, seed=1)
    assert not np.allclose(first.history["loss"], other.history["loss"])
    assert net.training
    bound, batch = first._bound, first._bound.batch(Call.of(LOCAL_ROWS))
    plan = Plan.of_values(bound.structure, 1, 1)
    values = {n: s.value for n, s in bound.draws(first._trained, batch, 0, plan).sites.items() if n != "x"}
    noisy = [bound.draws(first._trained, batch, key, plan, values=values).log_q for key in (1, 2)]
    assert not torch.allclose(*noisy)
    # Evaluated, the draws are those of the networks in eval mode, and their log q is the same at any key.
    table = bound.evaluate(first._trained, batch, 5, plan)
    with torch.no_grad():
        net.eval()
        weights = {n.removeprefix("net$$$"): v for n, v in first._trained.items() if n.startswith("net")}
        code = torch.func.functional_call(net, weights, (torch.tensor(LOCAL_ROWS)[:, None],))
        net.train()
        expected = dist.Normal(code[..., 0], code[..., 1].exp()).log_prob(table["z"]["value"])
    torch.testing.assert_close(table["z"]["log_q"], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_frozen_replay_meets_the_same_dropout(mode: str) -> None:
    """At fixed parameters the doubly reparameterised ELBO has the loss of the pathwise one, noise for noise."""
    losses = []
    _, guide = networks(nn.Dropout(0.5), nn.Dropout1d(0.3))
    example = Example(local_model, guide, LOCAL_ROWS)
    for estimator in ("pathwise", "dreg"):
        run = fitted(example, steps=3, learning_rate=0.0, estimator={"z": estimator}, compile=mode)
        losses.append(run.history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)


def test_after_errors_everything_is_as_before() -> None:
    """Store, generator, dtype, validation, hooks and modules; and a second fit works."""

    def failing(x: Tensor) -> None:
        pyro.module("net", net)
        net(x[:, None])
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        raise RuntimeError("broken on purpose")

    net, guide = networks()
    pyro.param("other", torch.tensor(3.0))
    kept = dict(pyro.get_param_store().items())
    asks = nn.Module.named_parameters
    generator, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    weights = [p.detach().clone() for p in net.parameters()]
    torch.set_default_dtype(torch.float32)
    for program in (failing, AutoNormal(failing)):
        with pytest.raises(ProgramError, match="RuntimeError: broken on purpose"):
            fitted(Example(local_model, program, LOCAL_ROWS), steps=1)
        assert torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(dtype)
    run = fitted(Example(local_model, guide, LOCAL_ROWS), steps=2)
    assert np.isfinite(run.history["loss"]).all()
    assert nn.Module.named_parameters is asks
    assert not nn.modules.module._global_forward_pre_hooks
    assert torch.equal(generator, torch.random.get_rng_state())
    assert dict(pyro.get_param_store().items()) == kept
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_a_module_of_single_precision_is_fitted_in_double() -> None:
    torch.set_default_dtype(torch.float32)
    net, guide = networks(nn.Tanh())
    run = fitted(Example(local_model, guide, LOCAL_ROWS), steps=2)
    assert run.params["net$$$0.weight"].dtype == np.float64
    assert net[0].weight.dtype == torch.float32


def test_obs_mask_is_refused_with_the_way_out() -> None:
    def model(x: Tensor, there: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=there)  # type: ignore[arg-type]

    def guide(x: Tensor, there: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.1)) * x, 1.0))

    with pytest.raises(ProgramError, match=r"'x_unobserved'.*poutine.mask"):
        fitted(Example(model, guide, (LOCAL_ROWS, LOCAL_ROWS > 0)), steps=1)


def test_sites_that_change_from_run_to_run_are_refused() -> None:
    def looping(x: Tensor, guide: bool) -> None:
        mu = pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        for i in pyro.plate("rows", len(x), subsample_size=2):
            if not guide:
                pyro.sample(f"x_{int(i)}", dist.Normal(mu, 0.5), obs=x[int(i)])

    example = Example(partial(looping, guide=False), partial(looping, guide=True), LOCAL_ROWS)
    with pytest.raises(ProgramError, match=r"Site 'x_\d' was .*met.*with statement"):
        fitted(example, steps=5)


def test_weights_of_rows_that_are_one_in_the_first_batch_count_in_the_others() -> None:
    """Losses of the two mini-batches of an epoch, nothing being random, have the whole batch's as their mean."""

    def weighted(x: Tensor, w: Tensor) -> None:
        with pyro.plate("rows", len(x)), poutine.scale(scale=w):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, w: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("rows", len(x)), poutine.scale(scale=w):
            pyro.sample("z", dist.Delta(slope * x))

    weights = np.array([1.0, 1.0, 3.0, 5.0])
    example = Example(weighted, guide, (np.array([0.5, -1.0, 2.0, 0.1]), weights))
    pieces = fitted(example, steps=2, batch_size=2, learning_rate=0.0)
    x, z = torch.tensor(example.data[0]), 0.3 * torch.tensor(example.data[0])
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    expected = -(torch.tensor(weights) * log_p).mean()
    assert pieces.history["loss"].mean() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(LegalityError, match="scaled"):
        fitted(example, steps=1, batch_size=2, recipe="iwae")


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad=False")
def test_frozen_layers_stay_and_a_second_fit_sees_other_modes() -> None:
    """Neither a frozen weight nor a mode is kept from an earlier fit's graph; a weight as long as a batch is fine."""
    torch.set_default_dtype(torch.float32)
    net, guide = networks(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    for parameter in net[1].parameters():
        parameter.requires_grad_(False)
    example = Example(local_model, guide, LOCAL_ROWS)
    options: dict[str, Any] = {"steps": 3, "batch_size": 4, "compile": "graph"}
    first = fitted(example, **options)
    assert first.state.mode == "graph"
    assert not any(name.startswith("net$$$1.") for name in first.params)
    with torch.no_grad():
        net[1].weight.mul_(3.0)
    losses = [first.history["loss"], fitted(example, **options).history["loss"]]
    net.eval()
    losses += [fitted(example, **options).history["loss"], fitted(example, **options).history["loss"]]
    eager = fitted(example, **options | {"compile": "eager"}).history["loss"]
    assert not np.allclose(losses[0], losses[1])
    assert not np.allclose(losses[1], losses[2])
    np.testing.assert_array_equal(losses[2], losses[3])
    np.testing.assert_allclose(losses[2], eager, rtol=1e-10)


def test_a_module_that_is_built_in_the_program_is_refused() -> None:
    def guide(x: Tensor) -> None:
        net = nn.Linear(1, 1)
        pyro.module("net", net)
        pyro.sample("mu", dist.Normal(net(x[:1]).sum(), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ProgramError, match="build modules outside of model and guide"):
        fitted(Example(local_model, guide, LOCAL_ROWS), steps=1)
