"""Network specifications: the same parameters, values and gradients on torch and JAX; no hidden state."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_lvm import nets
from ppl_lvm.backends import _jax_nets, _torch_nets
from ppl_lvm.errors import BackendError, ProgramError

SPECS = [
    nets.Linear(3, 2),
    nets.Linear(3, 2, bias=False),
    nets.MLP(3, 2, hidden=()),
    nets.MLP(3, 2, hidden=(5, 4), activation="relu"),
    *(nets.MLP(3, 2, hidden=(6,), activation=name) for name in nets.ACTIVATIONS),
    nets.GRU(3, 2),
    nets.GRU(3, 2, reverse=True),
]


def x64(on: bool) -> AbstractContextManager[Any]:
    """JAX's double precision, switched for a block and never for the process."""
    switch = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # type: ignore[attr-defined]
    block: AbstractContextManager[Any] = switch(on)
    return block


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with x64(True):
        yield


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(scale=12.0, size=shape)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_torch_and_jax_agree_in_names_layouts_values_and_gradients(spec: nets.Network) -> None:
    initial, bind_torch = _torch_nets.build(spec, seed=1, dtype=torch.float64)
    jax_initial, bind_jax = _jax_nets.build(spec, seed=1, dtype="float64")
    shapes = {name: tuple(value.shape) for name, value in initial.items()}
    assert shapes == {name: value.shape for name, value in jax_initial.items()}
    assert list(initial) == list(jax_initial)
    assert {str(value.dtype) for value in jax_initial.values()} == {"float64"}

    # The first rows reach far into the tails of the activations, where formulas of two libraries part first.
    x = rows(4, 5, 3)
    leaves = {name: value.clone().requires_grad_() for name, value in initial.items()}
    y = bind_torch(leaves)(torch.as_tensor(x))
    torch_gradients = dict(zip(leaves, torch.autograd.grad((y**2).sum(), list(leaves.values())), strict=True))

    def loss(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y = bind_jax(params)(jnp.asarray(x))
        return (y**2).sum(), y

    copied = {name: jnp.asarray(value.numpy()) for name, value in initial.items()}
    gradients, jax_y = jax.grad(loss, has_aux=True)(copied)
    assert jax_y.shape == (4, 5, 2)
    np.testing.assert_allclose(y.detach().numpy(), np.asarray(jax_y), rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            torch_gradients[name].numpy(), np.asarray(gradient), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_leading_axes_are_independent_rows(spec: nets.Network) -> None:
    x = rows(2, 3, 4, 3)
    params, bind = _torch_nets.build(spec, seed=0, dtype="float64")
    apply = bind(params)
    one_by_one = torch.stack([apply(row) for row in torch.as_tensor(x).reshape(-1, 3)]).reshape(2, 3, 4, 2)
    torch.testing.assert_close(apply(torch.as_tensor(x)), one_by_one, rtol=1e-12, atol=1e-12)
    jax_params, jax_bind = _jax_nets.build(spec, seed=0, dtype="float64")
    jax_apply = jax_bind(jax_params)
    np.testing.assert_allclose(
        jax_apply(jnp.asarray(x)),
        jax.vmap(jax.vmap(jax.vmap(jax_apply)))(jnp.asarray(x)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_gated_recurrent_units_are_those_of_torch() -> None:
    """A cell by torch's own; a network of cells from the first step to the last, and backwards."""
    spec = nets.GRUCell(3, 2)
    params, bind = _torch_nets.build(spec, seed=1, dtype="float64")
    x, h = torch.as_tensor(rows(4, 5, 3)), torch.as_tensor(rows(4, 5, 2)) / 12
    other = torch.cat([torch.zeros(4, dtype=torch.float64), params["bias_n"]])
    weights = params["weight_ih"], params["weight_hh"], params["bias"], other
    expected = torch.gru_cell(x.reshape(-1, 3), h.reshape(-1, 2), *weights).reshape(4, 5, 2)
    torch.testing.assert_close(bind(params)(x, h), expected, rtol=1e-12, atol=1e-12)
    copied = {name: jnp.asarray(value.numpy()) for name, value in params.items()}
    _, jax_bind = _jax_nets.build(spec, seed=1, dtype="float64")
    found = jax_bind(copied)(jnp.asarray(x.numpy()), jnp.asarray(h.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)
    for reverse in (False, True):
        state, states = torch.zeros(4, 2, dtype=torch.float64), {}
        for t in reversed(range(5)) if reverse else range(5):
            states[t] = state = torch.gru_cell(x[:, t], state, *weights)
        along = _torch_nets.build(nets.GRU(3, 2, reverse=reverse), seed=1, dtype="float64")[1](params)(x)
        torch.testing.assert_close(along, torch.stack([states[t] for t in range(5)], 1), rtol=1e-12, atol=1e-12)


def test_softplus_and_gelu_agree_far_out() -> None:
    for name in ("softplus", "gelu"):
        x = np.linspace(-60.0, 60.0, 121)
        found = _torch_nets._ACTIVATIONS[name](torch.as_tensor(x)).numpy()
        np.testing.assert_allclose(
            found, _jax_nets._ACTIVATIONS[name](jnp.asarray(x)), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_torch_network_and_its_gradient_trace_under_make_fx(spec: nets.Network) -> None:
    params, bind = _torch_nets.build(spec, seed=0, dtype="float64")
    x = torch.as_tensor(rows(5, 3))

    def step(params: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        loss = (bind(leaves)(x) ** 2).sum()
        return (loss, *torch.autograd.grad(loss, list(leaves.values())))

    graph = make_fx(step)(params, x)
    other = {name: value + 0.1 for name, value in params.items()}
    for traced, eager in zip(graph(other, 2 * x), step(other, 2 * x), strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)


def test_building_leaves_the_global_random_state_of_torch() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _torch_nets.build(nets.MLP(3, 2), seed=0, dtype=torch.float32)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("build", [_torch_nets.build, _jax_nets.build], ids=["torch", "jax"])
def test_the_seed_alone_decides_the_initial_values(build: Callable[..., Any]) -> None:
    spec = nets.MLP(3, 2, hidden=(4, 4))
    first, second, other = (build(spec, seed, "float32")[0] for seed in (0, 0, 1))
    for name in first:
        assert np.array_equal(np.asarray(first[name]), np.asarray(second[name]))
        assert not np.array_equal(np.asarray(first[name]), np.asarray(other[name]))
    assert not np.array_equal(np.asarray(first["layers.1.bias"]), np.asarray(first["layers.0.bias"]))


def test_a_specification_is_a_value() -> None:
    assert nets.MLP(3, 2, hidden=[4]) == nets.MLP(3, 2, hidden=(4,))  # type: ignore[arg-type]
    assert hash(nets.MLP(3, 2)) == hash(nets.MLP(3, 2, hidden=(128,)))


def test_errors_say_what_was_found_and_what_to_do() -> None:
    with pytest.raises(ProgramError, match=r"unknown activation 'rleu'; choose one of relu, tanh"):
        nets.MLP(3, 2, activation="rleu")
    with pytest.raises(ProgramError, match=r"inputs must be a positive integer, not 3\.0"):
        nets.Linear(3.0, 2)  # type: ignore[arg-type]
    with pytest.raises(ProgramError, match=r"hidden must be a sequence of widths such as \(128,\), not 64"):
        nets.MLP(3, 2, hidden=64)  # type: ignore[arg-type]
    with pytest.raises(ProgramError, match="every width in hidden must be a positive integer, not 0"):
        nets.MLP(3, 2, hidden=(4, 0))
    params, bind = _torch_nets.build(nets.Linear(3, 2), 0, "float32")
    with pytest.raises(ProgramError, match=r"shape \(7, 4\), whose last axis is not of size 3.*inputs=4"):
        bind(params)(torch.zeros(7, 4))
    params, bind = _torch_nets.build(nets.GRUCell(3, 2), 0, "float32")
    with pytest.raises(ProgramError, match=r"state of shape \(7, 3\), whose last axis is not of size 2"):
        bind(params)(torch.zeros(7, 3), torch.zeros(7, 3))
    params, bind = _torch_nets.build(nets.GRU(3, 2), 0, "float32")
    with pytest.raises(ProgramError, match=r"shape \(3,\); it reads sequences"):
        bind(params)(torch.zeros(3))
    with pytest.raises(BackendError, match="torch has no dtype 'float63'"):
        _torch_nets.build(nets.Linear(3, 2), 0, "float63")
    for build in (_torch_nets.build, _jax_nets.build):
        with pytest.raises(BackendError, match=r"no rule to build Network\(inputs=3, outputs=2\)"):
            build(nets.Network(3, 2), 0, "float32")


def test_float64_outside_x64_is_refused_instead_of_rounded() -> None:
    with (
        x64(False),
        pytest.raises(BackendError, match="dtype float64 was asked for, but JAX holds it as float32"),
    ):
        _jax_nets.build(nets.Linear(3, 2), 0, "float64")
