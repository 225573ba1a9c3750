"""How the engine speaks to Pyro: settings, the namespace of portable programs, the outermost handler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from zlib import crc32

import array_api_compat.torch as xp
import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_lvm import nets, ops
from ppl_lvm.backends import _torch_nets
from ppl_lvm.errors import ProgramError

Params = Mapping[str, Tensor]
Message = Any


@contextlib.contextmanager
def sealed(dtype: str) -> Iterator[None]:
    """Default dtype and validation switches as the engine needs them, and as they were before afterwards."""
    before = torch.get_default_dtype()
    with pyro.validation_enabled(False):
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """torch's CPU generator seeded inside this block, restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key)
        yield


class Namespace:
    """What a portable program calls, spoken by Pyro; one object per fit, holding the networks it built."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.dist = pyro.distributions
        self.nets, self.ops, self.xp = nets, ops, xp
        self.factor, self.deterministic = pyro.factor, pyro.deterministic
        self._seed, self._dtype = seed, dtype
        self._built: dict[str, tuple[nets.Network, Any, Any]] = {}

    def sample(self, name: str, fn: Any, obs: Tensor | None = None, **options: Any) -> Tensor:
        return pyro.sample(name, fn, obs=obs, **options)

    def plate(self, name: str, size: int, **options: Any) -> Any:
        return pyro.plate(name, size, **options)

    def param(self, name: str, init: Any, constraint: Any = None) -> Tensor:
        def initial() -> Tensor:
            return torch.as_tensor(init() if callable(init) else init, dtype=getattr(torch, self._dtype))

        return pyro.param(name, initial, constraints.real if constraint is None else constraint)

    def module(self, name: str, spec: nets.Network) -> Callable[[Tensor], Tensor]:
        if name not in self._built:
            self._built[name] = (spec, *_torch_nets.build(spec, crc32(name.encode()) ^ self._seed, self._dtype))
        known, initial, bind = self._built[name]
        if known != spec:
            raise ProgramError(f"Module {name!r} is {known} and {spec} in one program; give them two names.")
        return bind({leaf: pyro.param(f"{name}.{leaf}", value) for leaf, value in initial.items()})


class Holder(torch.nn.Module):
    """The modules of a native program, so that one functional call swaps all their parameters."""

    def forward(self, f: Callable[[], Any]) -> Any:
        return f()


class Handler(Messenger):
    """Outermost: answers parameters, plates and latent sites, so that neither store nor generator is asked.

    Parameters of modules are offered by the module itself, whose tensors a functional call has swapped: they are
    answered with what was offered.
    """

    def __init__(
        self,
        params: Params,
        latent: Callable[[Message], None],
        subsamples: Mapping[str, Tensor] | None = None,
        observed: Callable[[Message], None] | None = None,
    ) -> None:
        super().__init__()
        self.params, self.latent, self.observed = params, latent, observed
        self.subsamples = dict(subsamples or {})
        self.constraints: dict[str, Any] = {}
        self.offered: dict[str, torch.nn.Parameter] = {}
        self.values: dict[str, Tensor] = {}

    def _pyro_param(self, msg: Message) -> None:
        name = msg["name"]
        offer = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(offer, torch.nn.Parameter):
            self.offered[name] = offer
        value: Any
        if "$$$" in name:
            value = offer
        elif name in self.params:
            value = self.params[name]
        elif name in self.values:
            value = self.values[name]
        elif offer is None:
            raise ProgramError(f"Parameter {name!r} is read before it is given an initial value.")
        else:
            value = offer() if callable(offer) and not isinstance(offer, Tensor) else offer
            value = torch.as_tensor(value).detach().clone()
        if offer is not None:
            self.constraints.setdefault(name, msg["kwargs"].get("constraint", constraints.real))
        self.values[name] = value
        msg["value"], msg["done"] = value, True

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            if msg["name"] in self.subsamples:
                msg["value"], msg["done"] = self.subsamples[msg["name"]], True
        elif not msg["is_observed"] and not msg["infer"].get("_deterministic"):
            self.latent(msg)
            msg["done"] = True
        elif msg["is_observed"] and self.observed is not None:
            self.observed(msg)

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]


def prior_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """The guide of a program that has none: its model without the observed sites, so latent sites have their prior."""
    return poutine.block(model, hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"])
