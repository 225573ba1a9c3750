"""`pyro_loss`: the engine's losses and gradients in Pyro's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_lvm import fit, program, pyro_loss, to_pyro
from ppl_lvm.backends._pyro_train import _step_seed
from ppl_lvm.errors import LegalityError, ProgramError, RecipeError

optim: Any = pyro.optim  # its classes are made from torch's at import
ROWS = torch.as_tensor(np.random.default_rng(0).normal(size=6))


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    pyro.clear_param_store()


def model(x: Tensor) -> None:
    spread = pyro.param("spread", torch.tensor(0.6), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, spread), obs=x)


def guide(x: Tensor) -> None:
    slope, scale = pyro.param("slope", torch.tensor(0.2)), pyro.param("scale", torch.tensor(0.9), constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def discrete_model(x: Tensor) -> None:
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(locs[0] + (locs[1] - locs[0]) * k, 1.0), obs=x)


def discrete_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.2))
    with pyro.plate("rows", len(x)):
        pyro.sample("k", dist.Bernoulli(logits=slope * x))


CASES: dict[str, dict[str, Any]] = {
    "elbo": {"objective": "elbo"},
    "elbo, draws": {"objective": "elbo", "draws": 4, "estimator": "dreg"},
    "elbo, kl": {"objective": "elbo", "kl": "closed_form"},
    "iwae, dreg": {"objective": "iwae", "draws": 8, "estimator": "dreg"},
    "iwae, vimco": {"objective": "iwae", "draws": 5, "estimator": "vimco"},
    "elbo, rloo": {"objective": "elbo", "draws": 3, "estimator": "rloo"},
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_fit(name: str) -> None:
    """At the noise of each step of `fit`, SVI with plain SGD has the same losses and ends at the same parameters."""
    options = dict(CASES[name])
    objective = options.pop("objective")
    plain: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.05, "dtype": "float64", "compile": "eager"}
    run = fit(model, guide, ROWS.numpy(), objective, steps=4, batch_size=None, **plain, **options)
    loss = pyro_loss(objective, **options)
    assert isinstance(loss, ELBO)
    loss.loss(model, guide, ROWS)
    svi = SVI(model, guide, optim.SGD({"lr": 0.05}), loss=loss)
    losses = []
    for step in range(4):
        torch.manual_seed(_step_seed(0, step))
        evaluated = svi.evaluate_loss(ROWS)
        torch.manual_seed(_step_seed(0, step))
        losses.append(svi.step(ROWS))
        assert losses[-1] == pytest.approx(evaluated, abs=1e-10)
    np.testing.assert_allclose(np.array(losses) / len(ROWS), run.history["loss"], rtol=1e-10)
    for parameter, value in run.params.items():
        np.testing.assert_allclose(pyro.param(parameter).detach().numpy(), value, rtol=1e-10, err_msg=parameter)


@pytest.mark.parametrize("make", [lambda: guide, lambda: AutoNormal(model)])
def test_the_elbo_is_trace_elbo(make: Callable[[], Any]) -> None:
    """Value and gradient, at one noise."""
    chosen, found = make(), {}
    for loss in (pyro_loss("elbo"), Trace_ELBO()):
        loss.loss(model, chosen, ROWS)
        for _, p in pyro.get_param_store().named_parameters():
            p.grad = None
        torch.manual_seed(3)
        value = loss.loss_and_grads(model, chosen, ROWS)
        gradients = {n: p.grad.clone() for n, p in pyro.get_param_store().named_parameters()}  # type: ignore[union-attr]
        found[type(loss).__name__] = value, gradients
    (ours, mine), (theirs, other) = found["PyroLoss"], found["Trace_ELBO"]
    assert ours == pytest.approx(theirs, abs=1e-10)
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-9, atol=1e-10)


def test_mini_batches_are_scaled_by_total_rows_only() -> None:
    whole, part = pyro_loss("elbo"), pyro_loss("elbo", total_rows=60)
    for loss in (whole, part):
        loss.loss(model, guide, ROWS)
    torch.manual_seed(0)
    plain = whole.loss(model, guide, ROWS)
    torch.manual_seed(0)
    assert part.loss(model, guide, ROWS) == pytest.approx(10.0 * plain, rel=1e-12)


def test_a_moving_average_is_kept_in_the_object() -> None:
    """Three steps of the score estimator with a baseline that remembers are fit's; a fresh object forgets."""
    options: dict[str, Any] = {"estimator": {"k": {"name": "score", "baseline": "moving_average"}}}
    plain: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1, "dtype": "float64", "compile": "eager"}
    run = fit(discrete_model, discrete_guide, ROWS.numpy(), "elbo", steps=3, batch_size=None, **plain, **options)
    ends = []
    for fresh in (False, True):
        pyro.clear_param_store()
        loss = pyro_loss("elbo", **options)
        loss.loss(discrete_model, discrete_guide, ROWS)
        for step in range(3):
            if fresh:
                loss = pyro_loss("elbo", **options)
            svi = SVI(discrete_model, discrete_guide, optim.SGD({"lr": 0.1}), loss=loss)
            loss.loss(discrete_model, discrete_guide, ROWS)
            torch.manual_seed(_step_seed(0, step))
            svi.step(ROWS)
        ends.append(pyro.param("slope").item())
    assert ends[0] == pytest.approx(float(run.params["slope"]), rel=1e-10)
    assert abs(ends[1] - ends[0]) > 1e-6


class Net(nn.Module):
    """A VAE with pyro.module in both its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(self, x: Tensor, beta: float = 1.0) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            with pyro.poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor, beta: float = 1.0) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=beta):
            code = self.encoder(x)
            pyro.sample("z", dist.Normal(code[..., :2], code[..., 2:].exp()).to_event(1))


def test_modules_are_trained_in_place_and_batches_may_differ_in_size() -> None:
    net, x = Net(), torch.randn(20, 3)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    svi = SVI(net.model, net.guide, optim.Adam({"lr": 0.02}), loss=pyro_loss("iwae", draws=3, estimator="dreg"))
    losses = [svi.step(x[: 20 if step % 3 else 13]) / (20 if step % 3 else 13) for step in range(60)]
    assert np.mean(losses[-9:]) < np.mean(losses[:9]) - 0.5
    for name, parameter in net.named_parameters():
        assert not torch.allclose(parameter, before[name]), name


def test_settings_pass_through_and_an_annealed_weight_counts() -> None:
    """`step(x, beta)`: the scale is the argument's at every step, as in Trace_ELBO."""
    net, x = Net(), torch.randn(4, 3)
    ours, theirs = pyro_loss("elbo"), Trace_ELBO()
    for beta in (1.0, 0.1, 0.5):
        ours.loss(net.model, net.guide, x, beta)
        values = []
        for loss in (ours, theirs):
            torch.manual_seed(1)
            values.append(loss.loss(net.model, net.guide, x, beta))
        assert values[0] == pytest.approx(values[1], abs=1e-10), beta


def test_an_autoguide_is_trained_in_place() -> None:
    chosen = AutoNormal(model)
    svi = SVI(model, chosen, optim.Adam({"lr": 0.05}), loss=pyro_loss("iwae", draws=4))
    for _ in range(150):
        svi.step(ROWS)
    expected = ROWS / (1 + pyro.param("spread").detach() ** 2)
    torch.testing.assert_close(chosen.median()["z"], expected, rtol=0, atol=0.25)


def test_svi_goes_on_from_a_fit() -> None:
    run = fit(model, guide, ROWS, "elbo", steps=200, batch_size=None, learning_rate=0.02, dtype="float64")
    to_pyro(run)
    svi = SVI(model, guide, optim.Adam({"lr": 1e-6}), loss=pyro_loss("elbo", draws=200))
    assert svi.step(ROWS) / len(ROWS) == pytest.approx(run.history["loss"][-50:].mean(), abs=0.1)
    assert pyro.param("slope").item() == pytest.approx(float(run.params["slope"]), abs=1e-5)


def test_what_is_illegal_or_not_its_own_is_refused() -> None:
    with pytest.raises(RecipeError, match="optimizer"):
        pyro_loss("elbo", learning_rate=0.5)
    with pytest.raises(RecipeError, match="steps"):
        pyro_loss("elbo", steps=7)
    with pytest.raises(LegalityError, match="'k'"):
        pyro_loss("elbo", estimator="pathwise").loss(discrete_model, discrete_guide, ROWS)
    run = fit(program("probabilistic_pca", latent=1), data=ROWS[:, None].numpy(), steps=1, backend="pyro")
    with pytest.raises(ProgramError, match="portable program on pyro"):
        to_pyro(run)


def test_a_module_that_the_store_knows_otherwise_is_refused() -> None:
    """Pyro would step the store's tensor and run the module's, without a word."""
    old, new, x = Net(), Net(), torch.randn(4, 3)
    pyro_loss("elbo").loss(old.model, old.guide, x)
    with pytest.raises(ProgramError, match=r"'\w+\$\$\$\w+'.*clear_param_store"):
        pyro_loss("elbo").loss(new.model, new.guide, x)
