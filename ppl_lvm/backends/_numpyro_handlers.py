"""How the engine speaks to NumPyro: settings, the namespace of portable programs, the outermost handler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpyro
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

from ppl_lvm import nets, ops
from ppl_lvm.backends import _jax_nets
from ppl_lvm.backends._jax_dists import namespace
from ppl_lvm.backends._numpyro_scan import Scan, enter
from ppl_lvm.backends._numpyro_state import containers, still, with_noise
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
    """Outermost: answers parameters, states, noise, plates and latent sites; keeps what it saw of them.

    Noise that a program asks for itself (`prng_key`: dropout, initial weights) is one key per step, side and request,
    shared by all draws. `scan_keys` gives the key of the n-th scan, `scanned` the values that it replays, and `cast`
    brings states that are not known yet into the fit's precision.
    """

    def __init__(
        self,
        params: Params,
        key: Array,
        latent: Callable[[Message], Any] | None = None,
        subsamples: Mapping[str, Array] | None = None,
        observed: Callable[[Message], Any] | None = None,
        *,
        side: str = "guide",
        still: bool = False,
        scan_keys: Callable[[int], Array] | None = None,
        scanned: Mapping[str, Array] | None = None,
        cast: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.params, self.key, self.latent, self.observed = params, key, latent, observed
        self.subsamples = subsamples or {}
        self.still, self._cast, self._noise = still, cast, site_key(key, f"${side}")
        self._scan_keys, self._replayed = scan_keys, scanned or {}
        self.found: dict[str, tuple[Any, Any]] = {}
        self.plates_of: dict[str, tuple[str, ...]] = {}
        """Plates around each parameter whose dimension they index."""
        self.initial_states: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        """The states that the program holds now; it changes them as it runs."""
        self.scans: list[Scan] = []
        self._anonymous = 0

    def process_message(self, msg: Message) -> None:
        kind = msg["type"]
        if kind == "param" and msg["name"] in self.params:
            value = containers(self.params[msg["name"]])
            msg["value"] = still(value) if self.still else value
        elif kind == "mutable":
            self._state(msg)
        elif kind == "plate" and msg["value"] is None:
            if msg["name"] in self.subsamples:
                msg["value"] = self.subsamples[msg["name"]]
            else:
                msg["kwargs"]["rng_key"] = site_key(self.key, msg["name"])
        elif kind == "prng_key":
            msg["kwargs"]["rng_key"] = self._next_noise()
        elif kind == "control_flow":
            key = self._next_noise() if self._scan_keys is None else self._scan_keys(len(self.scans))
            enter(msg, key, self._replayed, self.observed, self.scans)
        elif kind == "sample" and not msg["is_observed"] and msg["value"] is None and self.latent is not None:
            msg["value"] = self.latent(msg)
        elif kind == "sample" and msg["is_observed"] and self.observed is not None and not self._drawn(msg["name"]):
            msg["value"] = self.observed(msg)

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] == "param":
            self.found[msg["name"]] = (msg["value"], msg["kwargs"].get("constraint", constraints.real))
            self.plates_of[msg["name"]] = _indexing(msg)
        elif msg["type"] == "mutable" and msg["value"] is not None:
            if msg["name"] not in self.states:
                self.initial_states[msg["name"]] = containers(msg["value"])
            self.states[msg["name"]] = msg["value"]

    def _drawn(self, name: str) -> bool:
        """Whether a scan has drawn this observed site anew already."""
        return any(name in scan.observed for scan in self.scans)

    def _next_noise(self) -> Array:
        self._anonymous += 1
        return jax.random.fold_in(self._noise, self._anonymous)

    def _state(self, msg: Message) -> None:
        name = msg["name"]
        if name in self.states:
            msg["value"] = self.states[name]
        elif name in self.params:
            msg["value"] = with_noise(self.params[name], site_key(self.key, name))
        elif msg["value"] is not None and self._cast is not None:
            msg["value"] = self._cast(msg["value"])


def _indexing(msg: Message) -> tuple[str, ...]:
    """Plates around a parameter that take their rows from one of its dimensions."""
    event_dim = msg["kwargs"].get("event_dim")
    if event_dim is None:
        return ()
    shape = jnp.shape(msg["value"])
    dims = {f.name: len(shape) + f.dim - event_dim for f in msg["cond_indep_stack"]}
    return tuple(name for name, dim in dims.items() if dim >= 0 and shape[dim] > 1)


def site_key(key: Array, name: str) -> Array:
    """A site's own key: adding a site does not change the noise of the others."""
    return jax.random.fold_in(key, crc32(name.encode()) & 0x7FFFFFFF)
