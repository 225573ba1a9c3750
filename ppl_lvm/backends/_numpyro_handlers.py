"""How the engine speaks to NumPyro: settings, the namespace of portable programs, the outermost handler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

from ppl_lvm import nets, ops
from ppl_lvm.backends import _jax_nets, _jax_structured
from ppl_lvm.backends._jax_dists import namespace, site_log_prob
from ppl_lvm.backends._numpyro_scan import Scan, enter
from ppl_lvm.backends._numpyro_state import containers, still, with_noise
from ppl_lvm.backends.base import check_param
from ppl_lvm.backends.sites import Chain, check_plate
from ppl_lvm.errors import ProgramError
from ppl_lvm.process import TURN

Array = jax.Array
Params = Mapping[str, Any]
Message = dict[str, Any]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float64, and no checks of distributions' arguments, inside this block only; the process's settings stay.

    A check stops on the first value that is not finite; the loop stops there too, and names step and site.

    Other threads wait.
    """
    with TURN, jax.enable_x64(dtype == "float64"), numpyro.validation_enabled(False):
        yield


def owned(a: Any, dtype: str | None = None) -> Array:
    """A copy: `asarray` may borrow NumPy's memory, which the caller can change under a running fit."""
    return jnp.array(a, dtype=dtype, copy=True)


class Namespace:
    """What a portable program calls, spoken by NumPyro; one object per fit, holding the networks it built."""

    def __init__(self, seed: int, dtype: str, total: int | None = None) -> None:
        self.dist = namespace()
        self.nets, self.ops, self.xp = nets, ops, jnp
        self.structured = _jax_structured.namespace()
        self.factor, self.deterministic = numpyro.factor, numpyro.deterministic
        self._seed, self._dtype = seed, dtype
        self.total = total
        """N, the rows of all data, where there are any."""
        self.rows: Any = None
        """Indices of this run's rows among them."""
        self.row_params: set[str] = set()
        self.handler: Handler | None = None
        """The engine's handler of the run that is under way."""
        self._built: dict[str, tuple[nets.Network, Any, Any]] = {}

    def sample(self, name: str, fn: Any, obs: Array | None = None, **options: Any) -> Array:
        return numpyro.sample(name, fn, obs=obs, **options)

    def plate(self, name: str, size: int, **options: Any) -> Any:
        return numpyro.plate(name, size, **options)

    def param(self, name: str, init: Any, constraint: Any = None) -> Array:
        value = init() if callable(init) else init
        kwargs = {} if constraint is None else {"constraint": constraint}
        return numpyro.param(name, jnp.asarray(value, dtype=self._dtype), **kwargs)

    def row_param(
        self, name: str, init: Any, constraint: Any = None, *, rows: Any = None, size: int | None = None
    ) -> Array:
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
        leaves = jax.tree.leaves(xs)
        steps = length if length is not None else len(leaves[0]) if leaves else 0
        if steps < 1 or any(len(a) != steps for a in leaves):
            raise ProgramError(
                f"A scan needs one number of steps; found length {length} and first axes {[len(a) for a in leaves]}."
            )
        handler = self.handler
        assert handler is not None
        if handler.together is not None and not handler.inside:
            return handler.together.scan(handler, f, init, xs, steps)
        return _scanned(handler, f, init, xs, steps)

    def module(self, name: str, spec: nets.Network) -> Callable[..., Array]:
        if name not in self._built:
            with jax.ensure_compile_time_eval():
                built = _jax_nets.build(spec, crc32(name.encode()) ^ self._seed, self._dtype)
            self._built[name] = (spec, *built)
        known, initial, bind = self._built[name]
        if known != spec:
            raise ProgramError(f"Module {name!r} is {known} and {spec} in one program; give them two names.")
        return bind({leaf: numpyro.param(f"{name}.{leaf}", value) for leaf, value in initial.items()})


class Handler(Messenger):
    """Outermost: answers parameters, states, noise, plates and latent sites; keeps every message.

    Noise that a program asks for itself (`prng_key`: dropout, initial weights) is one key per step, side and request,
    shared by all draws. `scan_keys` gives the key of the n-th native scan, `scanned` the values that it replays, and
    `cast` brings states that are not known yet into the fit's precision.

    Inside `ppl.scan`, messages carry the number of their step and are kept apart (`step`). `unrolled` runs it as a
    Python loop, where values must not be traced.
    """

    def __init__(
        self,
        params: Params,
        key: Array,
        latent: Callable[[Message], Any] | None = None,
        subsamples: Mapping[str, Array] | None = None,
        observed: Callable[[Message], Any] | None = None,
        *,
        unrolled: bool = False,
        side: str = "guide",
        still: bool = False,
        scan_keys: Callable[[int], Array] | None = None,
        scanned: Mapping[str, Array] | None = None,
        cast: Callable[[Any], Any] | None = None,
        of_classes: Mapping[str, Callable[[Array, Array], Array]] | None = None,
    ) -> None:
        super().__init__()
        self.of_classes = of_classes or {}
        """Densities of classes that stand in the place of a distribution's own, by site."""
        self.params, self.key, self.latent, self.observed = params, key, latent, observed
        self.trace: dict[str, Message] = {}
        self.unrolled = unrolled
        self._step: tuple[Any, dict[str, Message]] | None = None
        self.subsamples = subsamples or {}
        self.still, self._cast, self._noise = still, cast, site_key(key, f"${side}")
        self._scan_keys, self._replayed = scan_keys, scanned or {}
        self.found: dict[str, tuple[Any, Any]] = {}
        self.plates: dict[str, int] = {}
        self.plates_of: dict[str, tuple[str, ...]] = {}
        """Plates around each parameter whose dimension they index."""
        self.initial_states: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        """The states that the program holds now; it changes them as it runs."""
        self.scans: list[Scan] = []
        self.missing: Any = None
        self.together: Any = None
        """What runs the scans of guide and model together, where draws meet between steps."""
        self._anonymous = 0

    @contextlib.contextmanager
    def step(self, number: Any) -> Iterator[dict[str, Message]]:
        """Messages of one step of a scan, which do not reach the trace."""
        if self._step is not None:
            raise ProgramError("A scan inside a scan is not known here; write the inner one as a Python loop.")
        self._step = number, {}
        try:
            yield self._step[1]
        finally:
            self._step = None

    @property
    def inside(self) -> bool:
        """Whether a step of a scan is under way."""
        return self._step is not None

    def process_message(self, msg: Message) -> None:
        kind = msg["type"]
        if self._step is not None:
            msg["step"] = self._step[0]
        if kind == "sample" and msg["is_observed"] and isinstance(msg["value"], bool | int | float):
            msg["value"] = jnp.asarray(msg["value"])
        if kind == "sample" and self.missing is not None:
            self.missing.before(msg)
        if kind == "param" and msg["name"] in self.params:
            value = containers(self.params[msg["name"]])
            msg["value"] = still(value) if self.still else value
        elif kind == "mutable":
            self._state(msg)
        elif kind == "plate":
            self._plate(msg)
        elif kind == "prng_key":
            key = self._next_noise()
            msg["kwargs"]["rng_key"] = key if self._step is None else jax.random.fold_in(key, self._step[0])
        elif kind == "control_flow":
            key = self._next_noise() if self._scan_keys is None else self._scan_keys(len(self.scans))
            enter(msg, key, self._replayed, self.observed, self.scans)
        elif kind == "sample" and not msg["is_observed"] and msg["value"] is None and self.latent is not None:
            msg["value"] = self.latent(msg)
            if msg["name"] in self.of_classes:
                msg["of_classes"] = self.of_classes[msg["name"]]
        elif kind == "sample" and msg["is_observed"] and self.observed is not None and not self._drawn(msg["name"]):
            msg["value"] = self.observed(msg)
        if kind == "sample" and self.missing is not None and self.observed is None:
            self.missing.after(msg)

    def postprocess_message(self, msg: Message) -> None:
        name = msg.get("name")
        if name is not None:
            kept = self.trace if self._step is None else self._step[1]
            if msg["type"] == "sample" and name in kept:
                raise ProgramError(f"Two sites are called {name!r}; give every site a name of its own.")
            kept[name] = msg.copy()
        if msg["type"] == "param":
            if self.unrolled and jax.tree_util.all_leaves([msg["value"]]):
                known, _ = self.found.get(msg["name"], (msg["value"], None))
                check_param(msg["name"], known, msg["args"][0] if msg["args"] else None)
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

    def _plate(self, msg: Message) -> None:
        name, size = msg["name"], msg["args"][0]
        check_plate(name, self.plates.setdefault(name, size), size)
        if msg["value"] is not None:
            return
        if name in self.subsamples:
            msg["value"] = self.subsamples[name]
        else:
            msg["kwargs"]["rng_key"] = site_key(self.key, name)

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


def of_step(value: Array, msg: Message, event_dim: int | None = None) -> Array:
    """A site's value `[*batch, T, *event]` at the step of a message inside a scan; outside of one, all of it."""
    if "step" not in msg:
        return value
    event_dim = msg["fn"].event_dim if event_dim is None else event_dim
    return jnp.take(value, msg["step"], axis=value.ndim - 1 - event_dim)


def plates_of(trace: Mapping[str, Message]) -> dict[str, Array]:
    """The rows that plates took in a run, for other runs to take the same; not of plates inside a scan."""
    return {n: s["value"] for n, s in trace.items() if s["type"] == "plate" and s["value"] is not None}


def message_key(key: Array, msg: Message) -> Array:
    """The key of a site, and of a step inside a scan."""
    own = site_key(key, msg["name"])
    return jax.random.fold_in(own, msg["step"]) if "step" in msg else own


def _scanned(handler: Handler, f: Callable[[Any, Any], Any], init: Any, xs: Any, steps: int) -> tuple[Any, Any]:
    """A scan under the engine's handler; its sites reach the trace once, as one site over all steps."""
    first: dict[str, Message] = {}

    def body(carry: Any, step: tuple[Any, Any]) -> tuple[Any, Any]:
        number, x = step
        with handler.step(number) as kept:
            carry, y = f(carry, x)
        sites = {n: m for n, m in kept.items() if m["type"] == "sample"}
        first.update({n: m for n, m in kept.items() if n not in first})
        return carry, (y, {n: (m["value"], site_log_prob(m)) for n, m in sites.items()})

    if handler.unrolled:
        outs = []
        for t in range(steps):
            init, out = body(init, (t, jax.tree.map(lambda a: a[t], xs)))  # noqa: B023 - used at once
            outs.append(out)
        carry, (ys, sites) = init, jax.tree.map(lambda *a: jnp.stack(a), *outs)
    else:
        carry, (ys, sites) = jax.lax.scan(body, init, (jnp.arange(steps), xs))
    recorded(handler, first, sites, steps)
    return carry, ys


def recorded(
    handler: Handler, first: Mapping[str, Message], sites: Mapping[str, tuple[Array, Array]], steps: int
) -> None:
    """Puts the sites of a scan into the trace: the messages of a step, values and densities of all, steps in front."""
    for name, msg in first.items():
        if msg["type"] == "plate" and msg["args"][0] != msg["args"][1]:
            raise ProgramError(f"Plate {name!r} is subsampled inside a scan; enter it outside.")
        if name in handler.trace and msg["type"] == "sample":
            raise ProgramError(f"Two sites are called {name!r}; give every site a name of its own.")
        if msg["type"] != "sample":
            handler.trace.setdefault(name, {**msg, "value": None} if msg["type"] == "plate" else msg)
            continue
        value, log_prob = sites[name]
        fn = Chain(msg["fn"], steps)
        value = jnp.moveaxis(value, 0, value.ndim - fn.event_dim)
        handler.trace[name] = {**msg, "fn": fn, "value": value, "log_prob": log_prob.sum(0)}
        del handler.trace[name]["step"]


def prior_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """The guide of a program that has none: its model without the observed sites, so latent sites have their prior."""
    return handlers.block(model, hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"])


def site_key(key: Array, name: str) -> Array:
    """A site's own key: adding a site does not change the noise of the others."""
    return jax.random.fold_in(key, crc32(name.encode()) & 0x7FFFFFFF)
