"""Builds `ppl_lvm.nets` specifications for JAX: initial values by equinox, calls as pure functions."""

from collections.abc import Callable, Mapping
from functools import partial, singledispatch

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from ppl_lvm import nets
from ppl_lvm.backends import _recurrent
from ppl_lvm.errors import BackendError

Params = Mapping[str, Array]
Apply = Callable[..., Array]
Bind = Callable[[Params], Apply]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": partial(jax.nn.gelu, approximate=False),  # torch's default is the exact one
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


def build(spec: nets.Network, seed: int, dtype: DTypeLike) -> tuple[dict[str, Array], Bind]:
    """Initial parameters of `spec`, and `bind(params) -> apply(x)`, a pure function on [..., inputs].

    Names and layouts equal those of the torch backend (`layers.0.weight` [out, in], `layers.0.bias` [out]);
    the values do not, as each library initialises its own way.

    Raises:
        BackendError: JAX has no rule for this type of specification, or cannot hold this dtype now.

    Example:
        >>> params, bind = build(nets.MLP(4, 2), seed=0, dtype="float32")
        >>> bind(params)(jnp.zeros((7, 5, 4))).shape
        (7, 5, 2)
    """
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise BackendError(
            f"A network of dtype {jnp.dtype(dtype).name} was asked for, but JAX holds it as "
            f"{jax.dtypes.canonicalize_dtype(dtype).name} now; call inside jax.enable_x64(True)."
        )
    return _build(spec, jax.random.key(seed), dtype)


@singledispatch
def _build(spec: nets.Network, key: Array, dtype: DTypeLike) -> tuple[dict[str, Array], Bind]:
    raise BackendError(f"The NumPyro backend has no rule to build {spec}; use a network of ppl_lvm.nets.")


def _initial_linear(spec: nets.Linear, prefix: str, key: Array, dtype: DTypeLike) -> dict[str, Array]:
    layer = eqx.nn.Linear(spec.inputs, spec.outputs, use_bias=spec.bias, dtype=dtype, key=key)
    values = {"weight": layer.weight, "bias": layer.bias}
    return {prefix + name: value for name, value in values.items() if value is not None}


@_build.register
def _(spec: nets.Linear, key: Array, dtype: DTypeLike) -> tuple[dict[str, Array], Bind]:
    def bind(params: Params) -> Apply:
        weight, bias = params["weight"], params.get("bias")

        def apply(x: Array) -> Array:
            spec.check_input(x.shape)
            y = x @ weight.T
            return y if bias is None else y + bias

        return apply

    return _initial_linear(spec, "", key, dtype), bind


@_build.register
def _(spec: nets.MLP, key: Array, dtype: DTypeLike) -> tuple[dict[str, Array], Bind]:
    layers, activation = spec.layers, _ACTIVATIONS[spec.activation]
    params: dict[str, Array] = {}
    for i, layer in enumerate(layers):
        params |= _initial_linear(layer, f"layers.{i}.", jax.random.fold_in(key, i), dtype)
    names = [(f"layers.{i}.weight", f"layers.{i}.bias") for i in range(len(layers))]

    def bind(params: Params) -> Apply:
        *first, last = [(_masked(spec, i, params[weight]), params[bias]) for i, (weight, bias) in enumerate(names)]

        def apply(x: Array) -> Array:
            spec.check_input(x.shape)
            for weight, bias in first:
                x = activation(x @ weight.T + bias)
            return x @ last[0].T + last[1]

        return apply

    return params, bind


def _masked(spec: nets.MLP, layer: int, weight: Array) -> Array:
    mask = spec.mask(layer, jnp)
    return weight if mask is None else jnp.where(mask, weight, 0.0)


@_build.register
def _(spec: nets.GRUCell, key: Array, dtype: DTypeLike) -> tuple[dict[str, Array], Bind]:
    cell = eqx.nn.GRUCell(spec.inputs, spec.outputs, dtype=dtype, key=key)
    values = (cell.weight_ih, cell.weight_hh, cell.bias, cell.bias_n)
    params = {name: value for name, value in zip(_recurrent.SIZES, values, strict=True) if value is not None}
    return params, lambda params: _recurrent.bound(spec, params, jax.nn.sigmoid)
