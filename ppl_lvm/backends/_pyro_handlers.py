"""How the engine speaks to Pyro: settings, the namespace of portable programs, the outermost handler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import array_api_compat.torch as xp
import pyro
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_lvm import nets, ops
from ppl_lvm.backends import _torch_nets
from ppl_lvm.errors import ProgramError

Params = Mapping[str, Tensor]
Message = Any
_stored = pyro.get_param_store().get_param


@contextlib.contextmanager
def sealed(dtype: str) -> Iterator[None]:
    """Default dtype and validation switches as the engine needs them, and as they were before afterwards.

    Pyro's parameter store is empty inside: a PyroModule writes to it past every handler.
    """
    before = torch.get_default_dtype()
    store = pyro.get_param_store()
    kept = dict(store.__dict__)
    with pyro.validation_enabled(False):
        torch.set_default_dtype(getattr(torch, dtype))
        # Not `store.scope()`, which takes attributes off the owner's parameters.
        store.__dict__.update({name: type(table)() for name, table in kept.items() if isinstance(table, dict)})
        try:
            yield
        finally:
            store.__dict__.update(kept)
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


class Handler(Messenger):
    """Outermost: answers parameters, plates and latent sites, so that neither store nor generator is asked.

    Parameters of modules are offered by the module itself, whose tensors a functional call has swapped: they are
    answered with what was offered. In a probe (`params` None) the store, which is empty then, makes the others.
    """

    def __init__(
        self,
        params: Params | None,
        latent: Callable[[Message], None],
        subsamples: Mapping[str, Tensor] | None = None,
        observed: Callable[[Message], None] | None = None,
    ) -> None:
        super().__init__()
        self.params, self.latent, self.observed = params, latent, observed
        self.subsamples = dict(subsamples or {})
        self.plates: dict[str, int] = {}
        self.constraints: dict[str, Any] = {}
        self.offered: dict[str, torch.nn.Parameter] = {}
        self.leaves: dict[str, Tensor] = {}
        """The tensors that parameters are made of, before constraints."""
        self.values: dict[str, Tensor] = {}

    def _pyro_param(self, msg: Message) -> None:
        name = msg["name"]
        offer = msg["args"][1] if len(msg["args"]) > 1 else None
        if self.params is None:
            if isinstance(offer, torch.nn.Parameter):
                self.leaves[name] = offer
                if self.offered.setdefault(name, offer) is not offer:
                    raise ProgramError(
                        f"Two parameters of modules are named {name!r}, which one value cannot be given for; give one "
                        f"of the modules another name (PyroModule(name=...), or the name in pyro.module)."
                    )
                msg["value"], msg["done"] = offer, True
            elif offer is None and msg["fn"] == _stored and name not in pyro.get_param_store():
                raise ProgramError(f"Parameter {name!r} is read before it is given an initial value.")
            return
        value: Any
        if isinstance(offer, torch.nn.Parameter):
            raise ProgramError(
                f"Parameter {name!r} is of a module that the program did not have, or had frozen, when it was first "
                f"run; build modules outside of model and guide, and freeze and unfreeze layers between fits."
            )
        if "$$$" in name:
            value = offer
        elif name in self.params:
            value = self.params[name]
        else:
            raise ProgramError(
                f"Parameter {name!r} was not met when the program was first run, on one batch; a program must have the "
                f"same parameters in every run."
            )
        if msg["kwargs"].get("event_dim") is not None:
            # A plate that takes its rows of a parameter notes them here for Pyro's own optimisers.
            value._pyro_unconstrained_param = SimpleNamespace()
        msg["value"], msg["done"] = value, True

    def _pyro_post_param(self, msg: Message) -> None:
        name, value = msg["name"], msg["value"]
        self.values[name] = value
        if self.params is None:
            if hasattr(value, "unconstrained"):
                self.leaves[name] = value.unconstrained()
            stored = pyro.get_param_store()._constraints
            self.constraints[name] = stored.get(name, msg["kwargs"].get("constraint", constraints.real))

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            size = self.plates.setdefault(msg["name"], msg["fn"].size)
            if msg["fn"].size != size:
                raise ProgramError(
                    f"Plate {msg['name']!r} has {size} rows in the guide and {msg['fn'].size} in the model. A guide "
                    f"that was set up on other data (an autoguide keeps its plates) serves those only; make a new one."
                )
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
