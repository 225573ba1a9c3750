"""Specifications of small networks; each backend builds them with its own library (torch.nn, equinox).

A specification is a frozen, hashable value without parameters, so a portable program can write one down
without knowing a framework, and a compiled step can be cached on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ppl_lvm.errors import ProgramError

ACTIVATIONS = ("relu", "tanh", "gelu", "silu", "softplus", "sigmoid", "identity")


@dataclass(frozen=True)
class Network:
    """What every specification has: it maps arrays [..., inputs] to arrays [..., outputs].

    Raises:
        ProgramError: a size is not a positive integer.
    """

    inputs: int
    outputs: int

    def __post_init__(self) -> None:
        self._check_size("inputs", self.inputs)
        self._check_size("outputs", self.outputs)

    def _check_size(self, option: str, size: object) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ProgramError(f"{type(self).__name__}: {option} must be a positive integer, not {size!r}.")

    def check_input(self, shape: Sequence[int]) -> None:
        """Raise ProgramError unless an array of this shape can be fed to the network."""
        if not shape or shape[-1] != self.inputs:
            raise ProgramError(
                f"{self} was called on an array of shape {tuple(shape)}, whose last axis is not of size "
                f"{self.inputs}. Build it with inputs={shape[-1] if shape else 1}, or reshape the array."
            )


@dataclass(frozen=True)
class Linear(Network):
    """Affine map y = x W^T + b, with W [outputs, inputs] and b [outputs].

    Example:
        >>> Linear(784, 2)
        Linear(inputs=784, outputs=2, bias=True)
    """

    bias: bool = True


@dataclass(frozen=True)
class MLP(Network):
    """Multi-layer perceptron: affine maps with `activation` after every one but the last.

    Args:
        inputs: size of the last axis of the input.
        outputs: size of the last axis of the output.
        hidden: width of each hidden layer; empty makes the network affine.
        activation: one of relu, tanh, gelu (the exact one, x Phi(x)), silu, softplus, sigmoid, identity.

    Raises:
        ProgramError: a size is not a positive integer, or the activation is unknown.

    Example:
        >>> [(layer.inputs, layer.outputs) for layer in MLP(784, 2, hidden=(256, 64)).layers]
        [(784, 256), (256, 64), (64, 2)]
    """

    hidden: tuple[int, ...] = (128,)
    activation: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.hidden, str) or not isinstance(self.hidden, Sequence):
            raise ProgramError(
                f"MLP: hidden must be a sequence of widths such as (128,), not {self.hidden!r}."
            )
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a list would make the value unhashable
        for width in self.hidden:
            self._check_size("every width in hidden", width)
        if self.activation not in ACTIVATIONS:
            raise ProgramError(
                f"MLP: unknown activation {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}."
            )

    @property
    def layers(self) -> tuple[Linear, ...]:
        """The affine maps, first to last."""
        sizes = (self.inputs, *self.hidden, self.outputs)
        return tuple(Linear(a, b) for a, b in pairwise(sizes))

    def mask(self, layer: int, xp: Any = np) -> Any:
        """What a layer's weights are multiplied by, or None."""
        return None


@dataclass(frozen=True)
class Autoregressive(MLP):
    """Multi-layer perceptron whose outputs `i, i + inputs, i + 2 inputs, ...` see the inputs before i only.

    `y = a(... a(x (M_1 * W_1)^T + b_1) ...) (M_L * W_L)^T + b_L` with fixed masks M of zeros and ones
    (`mask`).

    Args:
        inputs: size D of the last axis of the input.
        outputs: a multiple of D.

    Raises:
        ProgramError: a size is not a positive integer, or outputs no multiple of inputs.

    Source: Germain, Gregor, Murray, Larochelle (2015), MADE: Masked Autoencoder for Distribution Estimation,
    arXiv:1502.03509.

    Example:
        >>> Autoregressive(3, 3, hidden=()).mask(0).astype(int).tolist()
        [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outputs % self.inputs:
            raise ProgramError(
                f"Autoregressive: outputs must be a multiple of inputs, not {self.outputs} for {self.inputs}."
            )

    def mask(self, layer: int, xp: Any = np) -> Any:
        """Which inputs `[outputs, inputs]` a layer's outputs see, as an array of the namespace `xp`.

        Unit h of a hidden layer sees the first `1 + h mod (D - 1)` inputs.
        """
        last = layer == len(self.hidden)
        seen = self._degrees(layer - 1, xp) if layer else 1 + xp.arange(self.inputs)
        seeing = xp.arange(self.outputs) % self.inputs if last else self._degrees(layer, xp)
        return seeing[:, None] >= seen[None, :]

    def _degrees(self, layer: int, xp: Any) -> Any:
        return 1 + xp.arange(self.hidden[layer]) % max(self.inputs - 1, 1)


@dataclass(frozen=True)
class GRUCell(Network):
    """One step of a gated recurrent unit: `module(x, h)` takes x `[..., inputs]` and h `[..., outputs]` to the next h.

        r, u = sigmoid(W_ih x + bias + W_hh h)                  two of three thirds of the rows
        n    = tanh(W_ih x + bias + r (W_hh h + bias_n))        the last third
        h'   = (1 - u) n + u h

    W_ih `[3 outputs, inputs]`, W_hh `[3 outputs, outputs]`, bias `[3 outputs]`, bias_n `[outputs]`.

    Source: Cho et al. (2014), Learning Phrase Representations using RNN Encoder-Decoder, arXiv:1406.1078.

    Example:
        >>> GRUCell(5, 8)
        GRUCell(inputs=5, outputs=8)
    """

    def check_state(self, shape: Sequence[int]) -> None:
        """Raise ProgramError unless an array of this shape can be the state."""
        if not shape or shape[-1] != self.outputs:
            raise ProgramError(
                f"{self} was called on a state of shape {tuple(shape)}, whose last axis is not of size {self.outputs}."
            )


@dataclass(frozen=True)
class GRU(GRUCell):
    """A `GRUCell` along sequences `[..., T, inputs]` from a state of zeros: all states `[..., T, outputs]`.

    Args:
        reverse: read from the last step to the first; the state at t has then seen steps t to T.

    Example:
        >>> GRU(5, 8, reverse=True)
        GRU(inputs=5, outputs=8, reverse=True)
    """

    reverse: bool = False

    def check_input(self, shape: Sequence[int]) -> None:
        super().check_input(shape)
        if len(shape) < 2:
            raise ProgramError(
                f"{self} was called on an array of shape {tuple(shape)}; it reads sequences [..., T, inputs]."
            )
