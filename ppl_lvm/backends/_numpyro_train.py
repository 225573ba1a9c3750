"""Training on NumPyro: chunks of steps in one jitted loop, compiled once per program, recipe and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppl_lvm.algorithm import Algorithm, Objective
from ppl_lvm.backends._numpyro_state import is_key
from ppl_lvm.backends.base import Call, Plan, Steps, check_state, initial_extras, static_key, with_numbers
from ppl_lvm.backends.numpyro import NumPyroBound, owned, precision
from ppl_lvm.errors import BackendError

Bound = NumPyroBound
Tree = dict[str, Any]
STEPS = Steps()

_TRANSFORMS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "adamw": lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.01)),
    "sgd": optax.identity,
}


def key_of(seed: int) -> jax.Array:
    """The backend's form of a seed."""
    return jax.random.key(seed)


def to_numpy(x: Any) -> Any:
    """An array of the backend as numpy's, or a tree of them (a network's parameters); random keys as their words."""
    return jax.tree.map(lambda a: np.asarray(jax.random.key_data(a) if is_key(a) else a), x)


class Trainer:
    """See `backends.base.Trainer`. Modes: "compiled" (a jitted loop) and "eager" (one operation at a time)."""

    def __init__(
        self,
        bound: NumPyroBound,
        plan: Plan,
        objective: Objective,
        optimizer: Algorithm,
        example: Call,
        *,
        seed: int,
        rows: int | None,
        steps: int,
        mode: str,
    ) -> None:
        del steps
        if mode not in ("auto", "compiled", "eager"):
            raise BackendError(f"compile={mode!r} was asked for; the NumPyro backend knows auto, compiled and eager.")
        self.mode = "eager" if mode == "eager" else "compiled"
        self.notes = [] if mode != "auto" else ["compile: one jitted loop"]
        self._bound, self._plan, self._objective, self._example = bound, plan, objective, example
        self._rows, self._key = rows, jax.random.key(seed)
        name: str = optimizer.name  # type: ignore[attr-defined]
        self._transform = _TRANSFORMS[name]()
        shapes = tuple((np.shape(a), np.asarray(a).dtype.str) for a in example.leaves)
        names = (len(example.args), tuple(example.kwargs))
        key = (
            *(bound.program, bound.dtype, bound.structure.data_plate, static_key(objective, plan)),
            *(plan.K, plan.M, name, shapes, names, rows is None, bound.constants),
        )
        body = self._body(bound, plan, objective)
        if self.mode == "compiled":
            self._chunk = STEPS.get(key, lambda: jax.jit(_chunk(body)))
        else:
            self._chunk = _one_by_one(body)

    def _body(self, bound: NumPyroBound, plan: Plan, objective: Objective) -> Callable[..., Any]:
        transform = self._transform

        def body(tree: Tree, batch: Call, numbers: Mapping[str, Any], key: Any, rows: Any) -> tuple[Tree, Any]:
            here, planned = with_numbers(objective, plan, numbers)
            step = bound.gradients(
                tree["params"],
                batch,
                key,
                planned,
                here,
                total_rows=rows,
                states=tree["states"],
                own=tree["own"],
                mutable=tree["mutable"],
            )
            trained = {"params": tree["params"], "own": tree["own"]}
            updates, optimizer = transform.update(
                {"params": step.params, "own": step.own}, tree["optimizer"], trained
            )
            rate = numbers["optimizer.learning_rate"]
            trained = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), trained, updates)
            total = bound.structure.plate_size or (bound.structure.rows if rows is None else rows)
            kept = {"states": step.states, "mutable": step.mutable, "optimizer": optimizer}
            return {**trained, **kept}, step.loss / total

        return body

    def initial(self) -> Tree:
        with precision(self._bound.dtype):
            states, own = initial_extras(self._objective, self._plan, self._example)
            trained = {
                "params": self._bound.initial,
                "own": jax.tree.map(jnp.asarray, own, is_leaf=lambda x: isinstance(x, list)),
            }
            return {
                **trained,
                "states": {s: jnp.asarray(v, float) for s, v in states.items()},
                "mutable": self._bound.states,
                "optimizer": self._transform.init(trained),
            }

    def run(
        self,
        tree: Tree,
        data: Call,
        index: np.ndarray | None,
        numbers: Mapping[str, np.ndarray],
        start: int,
        n: int,
    ) -> tuple[Tree, jax.Array]:
        with precision(self._bound.dtype):
            scalars = {name: jnp.asarray(v, float) for name, v in numbers.items()}
            rows = None if self._rows is None else jnp.asarray(self._rows, float)
            where = None if index is None else owned(index)
            tree, losses = self._chunk(
                tree, data.args, dict(data.kwargs), where, scalars, start, n, self._key, rows
            )
            return tree, losses[:n]

    def params(self, tree: Tree) -> Mapping[str, Any]:
        return {**tree["params"], **tree["mutable"]}

    def pack(self, tree: Tree) -> dict[str, np.ndarray]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path): to_numpy(leaf) for path, leaf in leaves}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> Tree:
        template = self.initial()
        leaves, structure = jax.tree_util.tree_flatten_with_path(template)
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        check_state(arrays, self.pack(template))
        with precision(self._bound.dtype):
            held = [_like(leaf, arrays[n]) for n, (_, leaf) in zip(names, leaves, strict=True)]
            return jax.tree_util.tree_unflatten(structure, held)


def _like(leaf: jax.Array, array: np.ndarray) -> jax.Array:
    """A saved array as the kind of leaf it was."""
    return jax.random.wrap_key_data(owned(array), impl=jax.random.key_impl(leaf)) if is_key(leaf) else owned(array)


def _step(body: Callable[..., Any], i: Any, tree: Tree, inputs: tuple[Any, ...]) -> tuple[Tree, Any]:
    args, kwargs, index, numbers, start, key, rows = inputs
    batch = Call(args, kwargs)
    if index is not None:
        batch = batch.map(lambda a: jnp.take(a, index[i], axis=0))
    return body(tree, batch, {n: v[i] for n, v in numbers.items()}, jax.random.fold_in(key, start + i), rows)


def _length(numbers: Mapping[str, Any]) -> int:
    return len(next(iter(numbers.values())))


def _chunk(body: Callable[..., Any]) -> Callable[..., Any]:
    """A loop with a dynamic number of steps, so that the last, shorter chunk compiles nothing new."""

    def chunk(
        tree: Tree, args: Any, kwargs: Any, index: Any, numbers: Any, start: Any, n: Any, key: Any, rows: Any
    ) -> tuple[Tree, Any]:
        STEPS.traces += 1
        inputs = (args, kwargs, index, numbers, start, key, rows)

        def one(i: Any, carry: tuple[Tree, Any]) -> tuple[Tree, Any]:
            tree, losses = carry
            tree, loss = _step(body, i, tree, inputs)
            return tree, losses.at[i].set(loss)

        return jax.lax.fori_loop(0, n, one, (tree, jnp.zeros(_length(numbers))))

    return chunk


def _one_by_one(body: Callable[..., Any]) -> Callable[..., Any]:
    def chunk(
        tree: Tree, args: Any, kwargs: Any, index: Any, numbers: Any, start: Any, n: Any, key: Any, rows: Any
    ) -> tuple[Tree, Any]:
        losses = []
        for i in range(n):
            tree, loss = _step(body, i, tree, (args, kwargs, index, numbers, start, key, rows))
            losses.append(loss)
        return tree, jnp.stack(losses)

    return chunk
