"""Builds `ppl_lvm.nets` specifications for torch: initial values by torch.nn, calls as pure functions."""

from collections.abc import Callable, Mapping
from functools import singledispatch

import torch
from torch import Tensor
from torch.nn import functional as F

from ppl_lvm import nets
from ppl_lvm.backends import _recurrent
from ppl_lvm.errors import BackendError

Params = Mapping[str, Tensor]
Apply = Callable[..., Tensor]
Bind = Callable[[Params], Apply]


def _softplus(x: Tensor) -> Tensor:
    # torch's own threshold of 20 is off by 2e-9 in float64; beyond 40 both branches round to the same number.
    return F.softplus(x, threshold=40.0)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": _softplus,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def build(spec: nets.Network, seed: int, dtype: torch.dtype | str) -> tuple[dict[str, Tensor], Bind]:
    """Initial parameters of `spec`, and `bind(params) -> apply(x)`, a pure function on [..., inputs].

    The parameters are leaves on the default device without `requires_grad`; names and layouts equal those of the JAX
    backend (`layers.0.weight` [out, in], `layers.0.bias` [out]). The global random state is left as it was.

    Raises:
        BackendError: torch has no rule for this type of specification, or no such dtype.

    Example:
        >>> params, bind = build(nets.MLP(4, 2), seed=0, dtype="float64")
        >>> bind(params)(torch.zeros(7, 5, 4, dtype=torch.float64)).shape
        torch.Size([7, 5, 2])
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise BackendError(f"torch has no dtype {dtype!r}; use 'float32' or 'float64'.")
    # Only the CPU generator is forked, so only it may be seeded: torch.manual_seed would reach every device.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        params, bind = _build(spec, found)
    # Drawn on the CPU, so that a seed gives the same values on every device.
    return {name: value.to(torch.get_default_device()) for name, value in params.items()}, bind


@singledispatch
def _build(spec: nets.Network, dtype: torch.dtype) -> tuple[dict[str, Tensor], Bind]:
    raise BackendError(f"The torch backend has no rule to build {spec}; use a network of ppl_lvm.nets.")


def _initial_linear(spec: nets.Linear, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    layer = torch.nn.Linear(spec.inputs, spec.outputs, bias=spec.bias, device="cpu", dtype=dtype)
    # Read one by one: a module that is asked for its parameters in a probe is taken for one of the program's own.
    values = {"weight": layer.weight, "bias": layer.bias}
    return {prefix + name: value.detach() for name, value in values.items() if value is not None}


@_build.register
def _(spec: nets.Linear, dtype: torch.dtype) -> tuple[dict[str, Tensor], Bind]:
    def bind(params: Params) -> Apply:
        weight, bias = params["weight"], params.get("bias")

        def apply(x: Tensor) -> Tensor:
            spec.check_input(x.shape)
            return F.linear(x, weight, bias)

        return apply

    return _initial_linear(spec, "", dtype), bind


@_build.register
def _(spec: nets.MLP, dtype: torch.dtype) -> tuple[dict[str, Tensor], Bind]:
    layers, activation = spec.layers, _ACTIVATIONS[spec.activation]
    params: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        params |= _initial_linear(layer, f"layers.{i}.", dtype)
    names = [(f"layers.{i}.weight", f"layers.{i}.bias") for i in range(len(layers))]

    def bind(params: Params) -> Apply:
        *first, last = [(_masked(spec, i, params[weight]), params[bias]) for i, (weight, bias) in enumerate(names)]

        def apply(x: Tensor) -> Tensor:
            spec.check_input(x.shape)
            for weight, bias in first:
                x = activation(F.linear(x, weight, bias))
            return F.linear(x, *last)

        return apply

    return params, bind


def _masked(spec: nets.MLP, layer: int, weight: Tensor) -> Tensor:
    # The mask is computed, not kept: a tensor held by the program could be taken for rows of data.
    mask = spec.mask(layer, torch)
    return weight if mask is None else torch.where(mask.to(weight.device), weight, 0.0)


@_build.register
def _(spec: nets.GRUCell, dtype: torch.dtype) -> tuple[dict[str, Tensor], Bind]:
    cell, H = torch.nn.GRUCell(spec.inputs, spec.outputs, device="cpu", dtype=dtype), spec.outputs
    # Of torch's second bias only the last third is no copy of the first.
    values = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh[2 * H :])
    params = {name: value.detach().clone() for name, value in zip(_recurrent.SIZES, values, strict=True)}
    return params, lambda params: _recurrent.bound(spec, params, torch.sigmoid)
