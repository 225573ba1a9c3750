"""How the engine speaks to NumPyro: settings, the namespace of portable programs, the outermost handler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

from ppl_lvm import nets, ops
from ppl_lvm.backends import _jax_nets
from ppl_lvm.backends._jax_dists import namespace
from ppl_lvm.errors import ProgramError

Array = jax.Array
Params = Mapping[str, Any]
Message = dict[str, Any]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float64, and no checks of distributions' arguments, inside this block only; the process's settings stay.

    A check stops on the first value that is not finite; the loop stops there too, and names step and site.
    """
    with jax.enable_x64(dtype == "float64"), numpyro.validation_enabled(False):
        yield


def owned(a: Any, dtype: str | None = None) -> Array:
    """A copy: `asarray` may borrow NumPy's memory, which the caller can change under a running fit."""
    return jnp.array(a, dtype=dtype, copy=True)


class Namespace:
    """What a portable program calls, spoken by NumPyro; one object per fit, holding the networks it built."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.dist = namespace()
        self.nets, self.ops, self.xp = nets, ops, jnp
        self.factor, self.deterministic = numpyro.factor, numpyro.deterministic
        self._seed, self._dtype = seed, dtype
        self._built: dict[str, tuple[nets.Network, Any, Any]] = {}

    def sample(self, name: str, fn: Any, obs: Array | None = None, **options: Any) -> Array:
        return numpyro.sample(name, fn, obs=obs, **options)

    def plate(self, name: str, size: int, **options: Any) -> Any:
        return numpyro.plate(name, size, **options)

    def param(self, name: str, init: Any, constraint: Any = None) -> Array:
        value = init() if callable(init) else init
        kwargs = {} if constraint is None else {"constraint": constraint}
        return numpyro.param(name, jnp.asarray(value, dtype=self._dtype), **kwargs)

    def module(self, name: str, spec: nets.Network) -> Callable[[Array], Array]:
        if name not in self._built:
            with jax.ensure_compile_time_eval():
                built = _jax_nets.build(spec, crc32(name.encode()) ^ self._seed, self._dtype)
            self._built[name] = (spec, *built)
        known, initial, bind = self._built[name]
        if known != spec:
            raise ProgramError(f"Module {name!r} is {known} and {spec} in one program; give them two names.")
        return bind({leaf: numpyro.param(f"{name}.{leaf}", value) for leaf, value in initial.items()})


class Handler(Messenger):
    """Outermost: answers parameters, noise, plates and latent sites; keeps what it saw of the first two."""

    def __init__(
        self,
        params: Params,
        key: Array,
        latent: Callable[[Message], Any] | None = None,
        subsamples: Mapping[str, Array] | None = None,
        observed: Callable[[Message], Any] | None = None,
    ) -> None:
        super().__init__()
        self.params, self.key, self.latent, self.observed = params, key, latent, observed
        self.subsamples = subsamples or {}
        self.found: dict[str, tuple[Any, Any]] = {}
        self._anonymous = 0

    def process_message(self, msg: Message) -> None:
        kind = msg["type"]
        if kind == "param" and msg["name"] in self.params:
            msg["value"] = self.params[msg["name"]]
        elif kind == "plate" and msg["value"] is None:
            if msg["name"] in self.subsamples:
                msg["value"] = self.subsamples[msg["name"]]
            else:
                msg["kwargs"]["rng_key"] = site_key(self.key, msg["name"])
        elif kind in ("prng_key", "control_flow"):
            self._anonymous += 1
            msg["kwargs"]["rng_key"] = jax.random.fold_in(self.key, self._anonymous)
        elif kind == "sample" and not msg["is_observed"] and msg["value"] is None and self.latent is not None:
            msg["value"] = self.latent(msg)
        elif kind == "sample" and msg["is_observed"] and self.observed is not None:
            msg["value"] = self.observed(msg)

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] == "param":
            self.found[msg["name"]] = (msg["value"], msg["kwargs"].get("constraint", constraints.real))


def prior_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """The guide of a program that has none: its model without the observed sites, so latent sites have their prior."""
    return handlers.block(model, hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"])


def site_key(key: Array, name: str) -> Array:
    """A site's own key: adding a site does not change the noise of the others."""
    return jax.random.fold_in(key, crc32(name.encode()) & 0x7FFFFFFF)
