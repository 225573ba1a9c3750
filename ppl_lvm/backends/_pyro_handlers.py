"""How the engine speaks to Pyro: settings, the namespace of portable programs, the outermost handler."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import array_api_compat.torch as xp
import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ppl_lvm import nets, ops
from ppl_lvm.backends import _torch_nets, _torch_structured
from ppl_lvm.backends._torch_dists import site_log_prob
from ppl_lvm.backends.base import check_param
from ppl_lvm.backends.sites import Chain, check_plate
from ppl_lvm.errors import ProgramError
from ppl_lvm.process import TURN

Params = Mapping[str, Tensor]
Message = Any
_stored = pyro.get_param_store().get_param


_INSIDE = threading.local()
"""`dtype`: that of the `sealed` block which this thread is in."""


def _tables(store: Any) -> list[dict[Any, Any]]:
    return [table for table in store.__dict__.values() if isinstance(table, dict)]


@contextlib.contextmanager
def sealed(dtype: str) -> Iterator[None]:
    """Default dtype and validation switches as the engine needs them, and as they were before afterwards.

    Pyro's parameter store is empty inside: a PyroModule writes to it past every handler. Other threads wait.
    """
    store = pyro.get_param_store()
    around = getattr(_INSIDE, "dtype", None)
    if around == dtype and not any(_tables(store)):  # all is as it should be, and every run asks
        try:
            yield
        finally:
            for table in filter(None, _tables(store)):
                table.clear()
        return
    with TURN, pyro.validation_enabled(False):
        before = torch.get_default_dtype()
        kept = dict(store.__dict__)
        torch.set_default_dtype(getattr(torch, dtype))
        # Not `store.scope()`, which takes attributes off the owner's parameters.
        store.__dict__.update({name: type(table)() for name, table in kept.items() if isinstance(table, dict)})
        _INSIDE.dtype = dtype
        try:
            yield
        finally:
            _INSIDE.dtype = around
            store.__dict__.update(kept)
            torch.set_default_dtype(before)


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """The generators that the engine draws from, seeded inside this block, restored afterwards."""
    with kept_generators():
        seed_generators(key, torch.get_default_device())
        yield


def kept_generators() -> contextlib.AbstractContextManager[None]:
    """The CPU's generator, and that of the device which is the default now, as they were after this block."""
    device = torch.get_default_device()
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def seed_generators(key: int, device: torch.device) -> None:
    """Those of `kept_generators` where this device is the default; torch.manual_seed would reach every device."""
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(key)


def borrowed(a: np.ndarray) -> Tensor:
    """A tensor on NumPy's memory; on a copy where torch could not use it: read backwards, or not to be written to."""
    return torch.as_tensor(a if a.flags.writeable and all(s >= 0 for s in a.strides) else a.copy())


class Namespace:
    """What a portable program calls, spoken by Pyro; one object per fit, holding the networks it built."""

    def __init__(self, seed: int, dtype: str, total: int | None = None) -> None:
        self.dist = pyro.distributions
        self.nets, self.ops, self.xp = nets, ops, xp
        self.structured = _torch_structured.namespace()
        self.factor, self.deterministic = pyro.factor, pyro.deterministic
        self._seed, self._dtype = seed, dtype
        self.total = total
        """N, the rows of all data, where there are any."""
        self.rows: Any = None
        """Indices of this run's rows among them."""
        self.row_params: set[str] = set()
        self.handler: Handler | None = None
        """The engine's handler of the run that is under way."""
        self._built: dict[str, tuple[nets.Network, Any, Any]] = {}

    def sample(self, name: str, fn: Any, obs: Tensor | None = None, **options: Any) -> Tensor:
        return pyro.sample(name, fn, obs=obs, **options)

    def plate(self, name: str, size: int, **options: Any) -> Any:
        return pyro.plate(name, size, **options)

    def param(self, name: str, init: Any, constraint: Any = None) -> Tensor:
        def initial() -> Tensor:
            return torch.as_tensor(init() if callable(init) else init, dtype=getattr(torch, self._dtype))

        value = pyro.param(name, initial, constraints.real if constraint is None else constraint)
        if self.handler is not None and self.handler.params is None:
            check_param(name, value, init)
        return value

    def row_param(
        self, name: str, init: Any, constraint: Any = None, *, rows: Any = None, size: int | None = None
    ) -> Tensor:
        """A parameter with an entry for each of the N rows of the data, `[B, *init.shape]` at the rows of this run.

        `init` is that of one row. A plate of the program's own size takes its indices and its size.
        """
        index, total = (self.rows, self.total) if rows is None else (rows, size)
        if index is None or total is None:
            raise ProgramError(
                f"Parameter {name!r} has an entry for every row, but this run does not say which rows it is on; pass "
                f"data whose first axis is rows, and refit it for new ones."
            )
        self.row_params.add(name)

        def table() -> np.ndarray:
            one = np.asarray(init() if callable(init) else init)
            return np.array(np.broadcast_to(one, (total, *one.shape)))

        return self.param(name, table, constraint)[index]

    def scan(
        self, f: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any = None, length: int | None = None
    ) -> tuple[Any, Any]:
        """`carry, y = f(carry, x)` over the first axis of xs; returns the last carry and all y.

        A site inside f is one site of the program, with steps as the first dimension of its event.
        """
        leaves = [a for a in tree_flatten(xs)[0] if a is not None]
        steps = length if length is not None else len(leaves[0]) if leaves else 0
        if steps < 1 or any(len(a) != steps for a in leaves):
            raise ProgramError(
                f"A scan needs one number of steps; found length {length} and first axes {[len(a) for a in leaves]}."
            )
        handler = self.handler
        assert handler is not None
        if handler.together is not None and handler.step is None:
            return handler.together.scan(handler, f, init, xs, steps)
        if handler.step is not None:
            raise ProgramError("A scan inside a scan is not known here; write the inner one as a Python loop.")
        carry, ys = init, []
        try:
            for t in range(steps):
                handler.step = t
                carry, y = f(carry, tree_map(lambda a: None if a is None else a[t], xs))  # noqa: B023 - used at once
                ys.append(y)
        finally:
            handler.step = None
        return carry, stacked(ys)

    def module(self, name: str, spec: nets.Network) -> Callable[..., Tensor]:
        if name not in self._built:
            self._built[name] = (spec, *_torch_nets.build(spec, crc32(name.encode()) ^ self._seed, self._dtype))
        known, initial, bind = self._built[name]
        if known != spec:
            raise ProgramError(f"Module {name!r} is {known} and {spec} in one program; give them two names.")
        return bind({leaf: pyro.param(f"{name}.{leaf}", value) for leaf, value in initial.items()})


def stacked(ys: list[Any]) -> Any:
    """What the steps of a scan gave, steps in front; nothing where they gave nothing."""
    return tree_map(lambda *a: None if a[0] is None else torch.stack(torch.broadcast_tensors(*a)), *ys)


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
        of_classes: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.of_classes = of_classes or {}
        """Densities of classes that stand in the place of a distribution's own, by site."""
        self.params, self.latent, self.observed = params, latent, observed
        self.subsamples = dict(subsamples or {})
        self.plates: dict[str, int] = {}
        self.constraints: dict[str, Any] = {}
        self.step: int | None = None
        """Number of the step inside a scan; its sites are recorded under names of their own and joined later."""
        self.offered: dict[str, torch.nn.Parameter] = {}
        self.leaves: dict[str, Tensor] = {}
        """The tensors that parameters are made of, before constraints."""
        self.values: dict[str, Tensor] = {}
        self.missing: Any = None
        self.kept: dict[str, Message] | None = None
        """The sites of the step that is under way, where they are asked for."""
        self.together: Any = None
        """What runs the scans of guide and model together, where draws meet between steps."""

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
            if "$$$" not in name:
                check_param(name, value, msg["args"][1] if len(msg["args"]) > 1 else None)
            if hasattr(value, "unconstrained"):
                self.leaves[name] = value.unconstrained()
            stored = pyro.get_param_store()._constraints
            self.constraints[name] = stored.get(name, msg["kwargs"].get("constraint", constraints.real))

    def _pyro_sample(self, msg: Message) -> None:
        if self.step is not None:
            msg["step"] = self.step
        if site_is_subsample(msg):
            check_plate(msg["name"], self.plates.setdefault(msg["name"], msg["fn"].size), msg["fn"].size)
            if msg["name"] in self.subsamples:
                msg["value"], msg["done"] = self.subsamples[msg["name"]], True
            return
        if msg["is_observed"] and isinstance(msg["value"], bool | int | float):
            msg["value"] = torch.as_tensor(msg["value"])
        if self.missing is not None:
            self.missing.before(msg)
        if not msg["is_observed"] and not msg["infer"].get("_deterministic"):
            self.latent(msg)
            msg["done"] = True
            if msg["name"] in self.of_classes:
                msg["of_classes"] = self.of_classes[msg["name"]]
        elif msg["is_observed"] and self.observed is not None:
            self.observed(msg)
        if self.missing is not None and self.observed is None:
            self.missing.after(msg)

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
        if self.step is not None:
            if self.kept is not None and not site_is_subsample(msg) and not (msg["infer"] or {}).get("_deterministic"):
                self.kept[msg["name"]] = msg
            # This handler is the outermost, so the trace sees what it leaves.
            msg["of"], msg["name"] = msg["name"], f"{msg['name']}/{self.step}"


def of_step(value: Tensor, msg: Message, event_dim: int | None = None) -> Tensor:
    """A site's value `[*batch, T, *event]` at the step of a message inside a scan; outside of one, all of it."""
    if "step" not in msg:
        return value
    return value.select(value.dim() - 1 - (msg["fn"].event_dim if event_dim is None else event_dim), msg["step"])


def joined_steps(sites: dict[str, Message]) -> dict[str, Message]:
    """A run's sites, with those of a scan as one site each over all steps."""
    steps: dict[str, list[Message]] = {}
    for site in sites.values():
        if "step" in site:
            steps.setdefault(site["of"], []).append(site)
    if not steps:
        return sites
    whole = {n: s for n, s in sites.items() if "step" not in s}
    for name, parts in steps.items():
        if name in whole:
            raise ProgramError(f"Two sites are called {name!r}; give every site a name of its own.")
        fn = Chain(parts[0]["fn"], len(parts))
        values = torch.broadcast_tensors(*(s["value"] for s in parts))
        log_probs = torch.broadcast_tensors(*(site_log_prob(s) for s in parts))
        whole[name] = {
            **parts[0],
            "name": name,
            "fn": fn,
            "value": torch.stack(values, values[0].dim() + 1 - fn.event_dim),
            "log_prob": torch.stack(log_probs).sum(0),
            "mask": None,
        }
        del whole[name]["step"]
    return whole


def prior_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """The guide of a program that has none: its model without the observed sites, so latent sites have their prior."""
    return poutine.block(model, hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"])
