"""How the engine speaks to Pyro: settings, the namespace of portable programs, the outermost handler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from zlib import crc32

import array_api_compat.torch as xp
import numpy as np
import pyro
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ppl_lvm import nets, ops
from ppl_lvm.backends import _torch_nets
from ppl_lvm.backends._torch_dists import site_log_prob
from ppl_lvm.backends.base import Chain
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

    def __init__(self, seed: int, dtype: str, total: int | None = None) -> None:
        self.dist = pyro.distributions
        self.nets, self.ops, self.xp = nets, ops, xp
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

        return pyro.param(name, initial, constraints.real if constraint is None else constraint)

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
        return carry, tree_map(lambda *a: torch.stack(torch.broadcast_tensors(*a)), *ys)

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
        self.step: int | None = None
        """Number of the step inside a scan; its sites are recorded under names of their own and joined later."""
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
        if self.step is not None:
            msg["step"] = self.step
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
        if self.step is not None:
            # This handler is the outermost, so the trace sees what it leaves.
            msg["of"], msg["name"] = msg["name"], f"{msg['name']}/{self.step}"


def of_step(value: Tensor, msg: Message) -> Tensor:
    """A site's value `[*batch, T, *event]` at the step of a message inside a scan; outside of one, all of it."""
    return value.select(value.dim() - 1 - msg["fn"].event_dim, msg["step"]) if "step" in msg else value


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
