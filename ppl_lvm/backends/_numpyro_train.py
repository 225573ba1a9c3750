"""Training on NumPyro: chunks of steps in one jitted loop, compiled once per program, recipe and shape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppl_lvm.algorithm import Algorithm, Objective
from ppl_lvm.backends import _jax_memory, _jax_natural
from ppl_lvm.backends._jax_ahead import ahead
from ppl_lvm.backends._jax_waiting import without_waiting
from ppl_lvm.backends._numpyro_handlers import owned, precision, site_key
from ppl_lvm.backends._numpyro_state import is_key
from ppl_lvm.backends.base import Call, Gradients, losses
from ppl_lvm.backends.hiding import Hiding
from ppl_lvm.backends.numpyro import NumPyroBound
from ppl_lvm.backends.structure import Plan
from ppl_lvm.backends.training import (
    MOST_SKIPPED,
    RECORDS,
    SKIPPED,
    Again,
    Descent,
    Numbers,
    Steps,
    check_state,
    initial_extras,
    merged,
    own_name,
    rows_of,
    skipped_in_a_row,
    static_key,
    with_numbers,
)
from ppl_lvm.errors import BackendError

SKIPPED_LEAF = jax.tree_util.keystr((jax.tree_util.DictKey(SKIPPED),))
"""What a leaf is called that both backends pack under one name."""

AT_ONCE = 100
"""Steps whose noise is found at once."""

MOST_AHEAD = 2**15
"""Entries of it for each step, of all runs together."""

Bound = NumPyroBound
Tree = dict[str, Any]
STEPS = Steps()

_TRANSFORMS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "adamw": optax.scale_by_adam,
    "sgd": optax.identity,
    "natural": optax.identity,
}
WEIGHT_DECAY = {"adamw": 0.01}
"""Where a recipe leaves it open; the learning rate and the decay are applied below, as inputs of the step."""


def key_of(seed: int) -> jax.Array:
    """The backend's form of a seed."""
    return jax.random.key(seed)


def to_numpy(x: Any) -> Any:
    """An array of the backend as numpy's, or a tree of them (a network's parameters); random keys as their words."""
    if isinstance(x, np.ndarray):
        return x
    return jax.tree.map(lambda a: np.asarray(jax.random.key_data(a) if is_key(a) else a), x)


def on(device: str) -> contextlib.AbstractContextManager[Any]:
    """What is made inside this block is on a device: "cpu", "gpu", "cuda:0".

    Raises:
        BackendError: there is no such device.
    """
    kind, _, number = device.partition(":")
    try:
        found = jax.devices(kind)
    except RuntimeError:
        found = []
    if not (number or "0").isdecimal() or int(number or 0) >= len(found):
        there = dict.fromkeys(f"{d.platform}:{i}" for i, d in enumerate(jax.devices())) | {"cpu": None}
        raise BackendError(f"device={device!r} was asked for; JAX has {', '.join(there)} here.")
    return jax.default_device(found[int(number or 0)])


def off_device(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters of a fit as further calls find them; JAX moves them to where it computes."""
    return params


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # The second where an operation ran out that had been sent off.
    words = ("RESOURCE_EXHAUSTED", "Out of memory")
    found = isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words)
    return found or isinstance(error, MemoryError)


def device_memory() -> int | None:
    """Bytes of the device that the default one is, where it has memory of its own."""
    device = next(iter(jnp.zeros(()).devices()))
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


class Trainer:
    """See `backends.training.Trainer`. Modes: "compiled" (a jitted loop) and "eager" (one operation at a time).

    Several runs are one loop under `vmap`: trees, keys and orders of rows have a leading axis, the data have none.
    """

    def __init__(
        self,
        bound: NumPyroBound,
        plan: Plan,
        objective: Objective,
        descent: Descent,
        example: Call,
        *,
        seeds: Sequence[int],
        initials: Sequence[Mapping[str, Any]],
        rows: int | None,
        steps: int,
        mode: str,
        hiding: Hiding,
    ) -> None:
        del steps
        if mode not in ("auto", "compiled", "eager"):
            raise BackendError(f"compile={mode!r} was asked for; the NumPyro backend knows auto, compiled and eager.")
        self.mode = "eager" if mode == "eager" else "compiled"
        self.notes = [] if mode != "auto" else ["compile: one jitted loop"]
        self._bound, self._plan, self._objective, self._example = bound, plan, objective, example
        self._initials, self._rows, self._hiding = initials, rows, hiding
        keys = [jax.random.key(seed) for seed in seeds]
        self._key = keys[0] if len(keys) == 1 else jnp.stack(keys)
        self._descent = descent
        self._transforms = {unit: _TRANSFORMS[_name(u.optimizer)]() for unit, u in descent.units.items()}
        with precision(bound.dtype):
            self._factors = _jax_natural.found(bound, example, descent.units)
        shapes = tuple((np.shape(a), np.asarray(a).dtype.str) for a in example.leaves)
        names = (len(example.args), tuple(example.kwargs))
        self._cached = (
            *(bound.program, bound.dtype, bound.structure.data_plate, static_key(objective, plan)),
            *(plan.K, plan.M, descent.static_key(), shapes, names, rows is None, bound.constants, hiding.key),
        )
        body = self._body(bound, plan, objective)
        self._again: Callable[..., Any] | None = None
        self._numbers: dict[str, tuple[np.ndarray, Any]] = {}

        if self.mode == "compiled":
            options = _options() if self._several else {}
            what = (*self._cached, self._several)
            self._chunk = STEPS.get(what, lambda: jax.jit(without_waiting(_chunk(body)), compiler_options=options))
        else:
            self._chunk = _one_by_one(body)

    def _body(self, bound: NumPyroBound, plan: Plan, objective: Objective) -> Callable[..., Any]:
        # A compiled step is kept when its trainer, which holds data, is gone: it must not be reached from here.
        factors, hiding, descent, transforms = self._factors, self._hiding, self._descent, self._transforms

        def body(tree: Tree, batch: Call, numbers: Mapping[str, Any], key: Any, rows: Any) -> tuple[Tree, Any]:
            here, planned = with_numbers(objective, plan, numbers)
            batch = _hidden(hiding, batch, key)

            def natural(unit: str, values: Any, gradient: Any) -> Any:
                rate = numbers[f"{descent.units[unit].place}.learning_rate"]
                return _jax_natural.displaced(bound, batch, factors[unit], values, gradient, rate)

            descend = _descend(descent, transforms, natural)

            def gradients(params: Any) -> Gradients:
                states, own, mutable = tree["states"], tree["own"], tree["mutable"]
                options = {"total_rows": rows, "states": states, "own": own, "mutable": mutable}
                return bound.gradients(params, batch, key, planned, here, **options)

            step = gradients(tree["params"])
            values, found = merged(tree["params"], tree["own"]), merged(step.params, step.own)
            if descent.model_first:
                moved, *_ = descend(values, found, tree["optimizer"], numbers)
                groups = descent.groups
                step_ = gradients({n: moved[n] if groups[n] == "model" else p for n, p in tree["params"].items()})
                later = merged(step_.params, step_.own)
                found = {n: g if groups[n] == "model" else later[n] for n, g in found.items()}
            values, optimizer, norm = descend(values, found, tree["optimizer"], numbers)
            total = bound.structure.plate_size or (bound.structure.rows if rows is None else rows)
            after = {
                "params": {n: values[n] for n in tree["params"]},
                "own": {s: {n: values[own_name(s, n)] for n in ps} for s, ps in tree["own"].items()},
                "states": step.states,
                "mutable": step.mutable,
                "optimizer": optimizer,
            }
            return after | {SKIPPED: tree[SKIPPED]}, jnp.stack([step.loss / total, norm])

        return body

    def initial(self) -> Tree:
        return self._together([self._initial(values) for values in self._initials])

    def _together(self, trees: list[Tree]) -> Tree:
        """Trees of one run each as a tree of all."""
        with precision(self._bound.dtype):
            return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def _initial(self, values: Mapping[str, Any]) -> Tree:
        with precision(self._bound.dtype):
            states, own = initial_extras(self._objective, self._plan, self._example)
            arrays = jax.tree.map(jnp.asarray, own, is_leaf=lambda x: isinstance(x, list))
            held = self._bound.states
            every = merged(values, arrays)
            return {
                "params": {n: v for n, v in values.items() if n not in held},
                "own": arrays,
                "states": {s: jnp.asarray(v, float) for s, v in states.items()},
                "mutable": {n: values.get(n, state) for n, state in held.items()},
                "optimizer": {
                    unit: self._transforms[unit].init({n: every[n] for n in u.names})
                    for unit, u in self._descent.units.items()
                },
                SKIPPED: jnp.zeros((), float),
            }

    def run(
        self,
        tree: Tree,
        data: Call,
        index: np.ndarray | None,
        numbers: Mapping[str, np.ndarray],
        start: int,
        n: int,
    ) -> tuple[Tree, dict[str, np.ndarray]]:
        with precision(self._bound.dtype):
            scalars = {name: self._placed_number(name, v) for name, v in numbers.items()}
            rows = None if self._rows is None else np.asarray(self._rows, self._bound.dtype)
            where = None
            if index is not None:
                where = owned(index if self._several else index[0])

            def steps(tree: Tree, first: int, end: int) -> tuple[Tree, np.ndarray]:
                inputs = data.args, dict(data.kwargs), where, scalars, start, first, end, self._key, rows
                tree, records = self._chunk(tree, *inputs)
                return tree, np.array(records).reshape(len(records), -1, 2)

            tree, records = self._without_lost_steps(tree, steps, n, numbers[MOST_SKIPPED])
            return tree, {name: records[..., i].T for i, name in enumerate(RECORDS)}

    def _placed_number(self, name: str, values: np.ndarray) -> Any:
        """A number of the next steps: plain, which a compiled call takes as it is, as an operation of JAX on each would
        cost a small model more than its steps; on the device once it is seen not to change.
        """
        known, array = self._numbers.get(name, (None, None))
        if known is not values:
            array = np.asarray(values, self._bound.dtype)
        elif isinstance(array, np.ndarray):
            array = jax.device_put(array)
        self._numbers[name] = values, array
        return array

    def _without_lost_steps(
        self, tree: Tree, steps: Callable[[Tree, int, int], tuple[Tree, np.ndarray]], n: int, most: np.ndarray
    ) -> tuple[Tree, np.ndarray]:
        """The tree after n steps of which those that are not finite moved nothing, and `RECORDS`, `[n, runs, 3]`.

        Steps are taken as if all were finite: a loop in which each looks at its own gradient first would keep two
        states, which costs all fits for the sake of a few. Where one was not, those before it are taken again, and it
        is looked less far ahead.
        """
        skipped = np.asarray(tree[SKIPPED], np.float64).reshape(-1)
        records, first, span = np.zeros((n, len(skipped), 3)), 0, n
        while first < n:
            live, end = skipped <= most[first], min(n, first + span)
            after, found = steps(tree, first, end)
            lost = (live & ~np.isfinite(found[first:end]).all(-1)).any(1)
            good = int(lost.argmax()) if lost.any() else end - first
            if good:
                if lost.any():
                    after, _ = steps(tree, first, first + good)
                skipped = np.where(live, 0.0, skipped)
                tree = self._moved(live, after, tree, skipped)
                kept = slice(first, first + good)
                records[kept, :, :2], records[kept, :, 2] = found[kept], skipped
            first, span = first + good, 2 * span
            if lost.any():
                skipped = skipped_in_a_row(np, skipped, most[first], *np.moveaxis(found[first], -1, 0))
                tree = self._moved(skipped == 0, steps(tree, first, first + 1)[0], tree, skipped)
                records[first:, :, :2], records[first:, :, 2] = found[first], skipped
                if (skipped > most[first]).all():
                    break
                first, span = first + 1, 2 * (good + 1)
        return tree, records

    def _moved(self, which: np.ndarray, after: Tree, before: Tree, skipped: np.ndarray) -> Tree:
        """A tree in which these runs have moved on."""
        held = before[SKIPPED]
        if which.all() or not which.any():
            tree = after if which.all() else before
        else:
            kept = jnp.asarray(which)
            tree = jax.tree.map(
                lambda new, old: jnp.where(kept.reshape(-1, *(1,) * (new.ndim - 1)), new, old), after, before
            )
        if np.array_equal(np.asarray(held).reshape(-1), skipped):
            return tree  # to make an array costs as much as a hundred steps of a small model
        return tree | {SKIPPED: jnp.asarray(skipped.reshape(held.shape), held.dtype)}

    def loss(
        self,
        tree: Tree,
        bound: NumPyroBound,
        batch: Call,
        key: Any,
        numbers: Numbers,
        rows: int | None,
        plan: Plan | None = None,
    ) -> jax.Array:
        plan, objective, runs = self._plan if plan is None else plan, self._objective, self._several

        def one(tree: Tree, args: Any, kwargs: Any, key: Any, numbers: Numbers, rows: Any) -> jax.Array:
            here, planned = with_numbers(objective, plan, numbers)
            options = {"states": tree["states"], "own": tree["own"]}
            params = {**tree["params"], **tree["mutable"]}
            draws = bound.draws(params, Call(args, kwargs), key, planned, total_rows=rows, **options)
            loss, *_ = losses(draws, here, planned)
            return loss / (bound.structure.rows if rows is None else rows)

        def all_runs(tree: Tree, *inputs: Any) -> jax.Array:
            several = jax.vmap(one, in_axes=(0, *[None] * len(inputs)))
            return several(tree, *inputs) if runs else one(tree, *inputs)[None]

        shapes = tuple((a.shape, str(a.dtype)) for a in batch.leaves)
        with precision(self._bound.dtype):
            f = all_runs
            if self.mode == "compiled":
                what = (*self._cached, static_key(objective, plan), "loss", shapes, rows is None, self._several)
                f = STEPS.get(what, lambda: jax.jit(without_waiting(all_runs)))
            scalars = {name: jnp.asarray(v, float) for name, v in numbers.items()}
            total = None if rows is None else jnp.asarray(rows, float)
            needed = {name: tree[name] for name in ("params", "own", "states", "mutable")}
            return f(needed, batch.args, dict(batch.kwargs), key, scalars, total)

    def again(
        self,
        tree: Tree,
        data: Call,
        index: np.ndarray | None,
        numbers: Mapping[str, np.ndarray],
        step: int,
        i: int,
        run: int = 0,
    ) -> Again:
        one, now = self._of_run(tree, run), {n: v[i] for n, v in numbers.items()}
        with precision(self._bound.dtype):
            key = jax.random.fold_in(self._key[run] if self._several else self._key, step)
            batch = data if index is None else data.map(lambda a: jnp.take(a, index[run, i], axis=0))
            if self._again is None:
                self._again = jax.jit(without_waiting(self._once))
            batch, table, gradient = self._again(one, batch.args, dict(batch.kwargs), key, now)
        flat = {n: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for n, g in gradient.items()}
        return Again(Call(*batch), table, flat)

    @property
    def fused(self) -> float:
        return 1.0 if self.mode == "eager" else 8.0

    def peak(self, tree: Tree, batch: Call, numbers: Numbers) -> int | None:
        one = self._of_run(tree, 0)
        with precision(self._bound.dtype):
            key = jax.random.key(0)
            found = _jax_memory.peak(self._once, one, batch.args, dict(batch.kwargs), key, dict(numbers))
        return found * (len(self._key) if self._several else 1)

    def _once(self, tree: Tree, args: Any, kwargs: Any, key: Any, numbers: Numbers) -> tuple[Any, Any, Any]:
        """The data, the table and the gradient of one step."""
        here, planned = with_numbers(self._objective, self._plan, numbers)
        batch = _hidden(self._hiding, Call(args, kwargs), key)
        options = {"total_rows": self._rows, "states": tree["states"], "own": tree["own"]}
        params = {**tree["params"], **tree["mutable"]}
        draws, _ = self._bound._run(params, batch, key, planned, training=True, **options)
        found = self._bound.gradients(tree["params"], batch, key, planned, here, mutable=tree["mutable"], **options)
        return (batch.args, dict(batch.kwargs)), rows_of(draws.sites), merged(found.params, found.own)

    @property
    def _several(self) -> bool:
        return self._key.ndim > 0

    def params(self, tree: Tree, run: int = 0) -> Mapping[str, Any]:
        return self._of_run({**tree["params"], **tree["mutable"]}, run)

    def _of_run(self, tree: Any, run: int) -> Any:
        return jax.tree.map(lambda a: a[run], tree) if self._several else tree

    def pack(self, tree: Tree, run: int = 0) -> dict[str, np.ndarray]:
        named = arrays_of(self._of_run(tree, run))
        return {SKIPPED if n == SKIPPED_LEAF else n: a for n, a in named.items()}

    def unpack(self, *runs: Mapping[str, np.ndarray]) -> Tree:
        return self._together([self._unpacked(arrays) for arrays in runs])

    def _unpacked(self, arrays: Mapping[str, np.ndarray]) -> Tree:
        named = {SKIPPED_LEAF if n == SKIPPED else n: a for n, a in arrays.items()}
        return _filled(self._initial(self._initials[0]), named, self._bound.dtype, "state")

    def params_of(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        tree = self._unpacked(arrays)
        return {**tree["params"], **tree["mutable"]}


def _like(leaf: jax.Array, array: np.ndarray) -> jax.Array:
    """A saved array as the kind of leaf it was."""
    return jax.random.wrap_key_data(owned(array), impl=jax.random.key_impl(leaf)) if is_key(leaf) else owned(array)


def arrays_of(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A tree of arrays as arrays by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): to_numpy(leaf) for path, leaf in leaves}


def values_of(bound: NumPyroBound, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """The parameters and states of a program whose `arrays_of` these are."""
    return _filled({**bound.initial, **bound.states}, arrays, bound.dtype, "saved program")


def _filled(template: Any, arrays: Mapping[str, np.ndarray], dtype: str, what: str) -> Any:
    """A tree like the template with these leaves."""
    check_state(arrays, arrays_of(template), what)
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    with precision(dtype):
        held = [_like(leaf, arrays[jax.tree_util.keystr(path)]) for path, leaf in leaves]
        return jax.tree_util.tree_unflatten(structure, held)


def _name(optimizer: Algorithm) -> str:
    return optimizer.name  # type: ignore[attr-defined]


def _descend(
    descent: Descent,
    transforms: Mapping[str, optax.GradientTransformation],
    natural: Callable[[str, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]],
) -> Callable[..., tuple[dict[str, Any], dict[str, Any], Any]]:
    """`(values, gradients, optimizers' states, numbers) -> (values, states, norm)`, all by parameter's name."""

    def descend(
        values: dict[str, Any], gradients: Mapping[str, Any], states: Mapping[str, Any], numbers: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], Any]:
        values, states_, squares = dict(values), {}, []
        for unit, u in descent.units.items():
            place, names = u.place, u.names
            gradient = {n: gradients[n] for n in names}
            # Adam has g**2 as well: behind a barrier, or the compiler would write it to memory for both.
            apart = jax.lax.optimization_barrier(jax.tree.leaves(gradient))
            square = sum((jnp.sum(jnp.square(g)) for g in apart), jnp.zeros(()))
            norm = jnp.sqrt(square)
            if f"{place}.clip" in numbers:
                factor = jnp.minimum(1.0, numbers[f"{place}.clip"] / norm)
                gradient = jax.tree.map(lambda g, c=factor: g * c, gradient)
            now = {n: values[n] for n in names}
            if u.natural:
                gradient = natural(unit, values, gradient)
                # The gradient may be finite where what the Fisher information makes of it is not.
                square = square + 0.0 * sum((jnp.sum(g) for g in jax.tree.leaves(gradient)), jnp.zeros(()))
            update, state = transforms[unit].update(gradient, states[unit], now)
            rate = 1.0 if u.natural else numbers[f"{place}.learning_rate"]
            decay = numbers.get(f"{place}.weight_decay", WEIGHT_DECAY.get(_name(u.optimizer), 0.0))
            moved = jax.tree.map(
                lambda p, u, rate=rate, decay=decay: (p - rate * (u + decay * p)).astype(p.dtype), now, update
            )
            if u.turn in numbers:
                mine = numbers[u.turn] > 0

                def chosen(new: Any, old: Any, mine: Any = mine) -> Any:
                    return jnp.where(mine, new, old)

                moved, state = jax.tree.map(chosen, (moved, state), (now, states[unit]))
                square = jnp.where(mine, square, 0.0)
            squares.append(square)
            states_[unit] = state
            values |= moved
        return values, states_, jnp.sqrt(sum(squares))

    return descend


def _hidden(hiding: Hiding, batch: Call, key: Any) -> Call:
    return hiding.hidden(batch, lambda n, a: jax.random.uniform(site_key(key, f"${n}"), a.shape[:1], float))


def _step(
    body: Callable[..., Any], inputs: tuple[Any, ...]
) -> Callable[[Any, tuple[Tree, Any, Any]], tuple[Tree, Any]]:
    """A step of one run: `(key, (tree, rows of the batch, numbers)) -> (tree, record)`."""
    args, kwargs, rows = inputs

    def step(key: Any, given: tuple[Tree, Any, Any]) -> tuple[Tree, Any]:
        tree, index, now = given
        batch = Call(args, kwargs)
        if index is not None:
            # Ours are in bounds: to fill in what is not would read a batch twice.
            batch = batch.map(lambda a: a.at[index].get(mode="promise_in_bounds"))
        return body(tree, batch, now, key, rows)

    return step


def _at(i: Any, index: Any, numbers: Mapping[str, Any], several: bool) -> tuple[Any, Any]:
    """Rows and numbers of a step."""
    rows = None if index is None else index[:, i] if several else index[i]
    return rows, {n: v[i] for n, v in numbers.items()}


def _keys(key: Any, start: Any, steps: int, of_key: Callable[[Any], Any]) -> Any:
    """What the keys of the steps from `start` on decide: at once, as one by one they would cost a small model more than
    the rest of a step."""

    def of_step(key: Any, step: Any) -> Any:
        return of_key(jax.random.fold_in(key, step))

    return jax.vmap(jax.vmap(of_step, (0, None)) if key.ndim else of_step, (None, 0))(key, start + jnp.arange(steps))


def _length(numbers: Mapping[str, Any]) -> int:
    return len(next(iter(numbers.values())))


@cache
def _options() -> dict[str, Any]:
    """How XLA is to compile a loop of several runs.

    On a CPU it hands sums over many entries to YNNPACK, which takes five times as long where the axis that is summed
    over is short, as that of a few components is: a step of 64 mixtures is nothing else. Over long axes it is the
    faster, by 5 % of a step of a VAE, so one run has it. The option is none that XLA promises to keep; where it is not
    known, there is nothing to turn off.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return {}
    return options


def _chunk(body: Callable[..., Any]) -> Callable[..., Any]:
    """A loop with a dynamic number of steps, so that the last, shorter chunk compiles nothing new."""

    def chunk(tree: Tree, *inputs: Any) -> tuple[Tree, Any]:
        STEPS.traces += 1
        args, kwargs, index, numbers, start, first, end, key, rows = inputs
        several, length = key.ndim > 0, _length(numbers)
        now = partial(_at, index=index, numbers=numbers, several=several)
        of_run = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0] if several else a, (key, tree, now(0)[0])))
        numbers_of = jax.eval_shape(lambda: now(0)[1])
        together = min(AT_ONCE, length)
        noise, step = ahead(
            _step(body, (args, kwargs, rows)), of_run[0], (*of_run[1:], numbers_of), MOST_AHEAD // key.size
        )
        step = jax.vmap(step, (0, (0, 0, None))) if several else step

        def some(n: Any, carry: tuple[Tree, Any]) -> tuple[Tree, Any]:
            before = n * together
            found = _keys(key, start + before, together, noise)

            def one(i: Any, carry: tuple[Tree, Any]) -> tuple[Tree, Any]:
                tree, records = carry
                tree, record = step([a[i - before] for a in found], (tree, *now(i)))
                return tree, jax.lax.dynamic_update_index_in_dim(records, record, i, 0)

            return jax.lax.fori_loop(jnp.maximum(first, before), jnp.minimum(end, before + together), one, carry)

        # Unsigned, so that no step asks whether they count from the end.
        first, end = (jnp.asarray(a, jnp.uint32) for a in (first, end))
        empty = jnp.zeros((length, *key.shape, 2))
        return jax.lax.fori_loop(first // together, (end + together - 1) // together, some, (tree, empty))

    return chunk


def _one_by_one(body: Callable[..., Any]) -> Callable[..., Any]:
    def chunk(tree: Tree, *inputs: Any) -> tuple[Tree, Any]:
        args, kwargs, index, numbers, start, first, end, key, rows = inputs
        several, step = key.ndim > 0, _step(body, (args, kwargs, rows))
        step = jax.vmap(step, (0, (0, 0, None))) if several else step
        keys, records = _keys(key, start, end, lambda key: key), np.zeros((end, *key.shape, 2))
        for i in range(first, end):
            tree, records[i] = step(keys[i], (tree, *_at(i, index, numbers, several)))
        return tree, records

    return chunk
