"""State that NumPyro programs change as they run (`mutable` sites): batch statistics, and keys of dropout noise.

A site's state is a tree. Its keys are no state: the engine puts keys of its own in their place at every run, so that
noise is a function of (seed, step) like all other, and puts the old ones back.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ppl_lvm.errors import LegalityError, ProgramError
from ppl_lvm.process import TURN

Array = jax.Array
States = Mapping[str, Any]

FLAGS = ("deterministic", "use_running_average")
"""What modules of flax call the switch that turns dropout off and freezes batch statistics."""


def is_key(x: Any) -> bool:
    """Whether an array holds typed random keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def containers(tree: Any) -> Any:
    """The same leaves in new containers: programs write into the dictionaries that they are given."""
    return jax.tree.map(lambda x: x, tree)


def with_noise(tree: Any, key: Array) -> Any:
    """The state with every key in it replaced by one derived from `key`."""
    leaves, structure = jax.tree.flatten(tree)

    def own(i: int, old: Array) -> Array:
        seeds = jax.random.bits(jax.random.fold_in(key, i), old.shape, jnp.uint32)
        make = lambda seed: jax.random.key(seed, impl=jax.random.key_impl(old))  # noqa: E731
        for _ in old.shape:
            make = jax.vmap(make)
        return make(seeds)

    return jax.tree.unflatten(structure, [own(i, x) if is_key(x) else x for i, x in enumerate(leaves)])


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


def after_run(old: States, new: States) -> dict[str, list[Array | None]]:
    """Leaves of the state that one run left behind, in the order of `old`; None in the place of keys.

    Raises:
        ProgramError: a site is of another structure or shape than before.
    """
    found = {}
    for name, before in old.items():
        leaves, structure = _flat(before)
        after, left = _flat(new.get(name, before))
        if left != structure or any(a.shape != b.shape for a, b in zip(after, leaves, strict=True)):
            raise ProgramError(
                f"State {name!r} had the structure {structure} before a run and has {left} after it, or arrays of "
                f"other shapes; a state keeps its shape from step to step."
            )
        found[name] = [
            None if is_key(b) else jax.lax.stop_gradient(a).astype(b.dtype)
            for a, b in zip(after, leaves, strict=True)
        ]
    return found


def next_states(old: States, runs: Mapping[str, list[Array | None]], variants: int) -> dict[str, Any]:
    """The state of the next step from leaves `[M, K, ...]`: the mean over draws, or the first draw's for integers.

    Raises:
        LegalityError: some site has variants, which are no draws of equal weight, and a state would be averaged.
    """
    following = {}
    for name, before in old.items():
        leaves, structure = jax.tree.flatten(before)
        moved = []
        for b, a in zip(leaves, runs[name], strict=True):
            if a is None:
                moved.append(b)
            elif jnp.issubdtype(b.dtype, jnp.inexact):
                if variants > 1:
                    raise LegalityError(
                        f"State {name!r} (batch statistics) is averaged over draws, and under an estimator that lays "
                        f"out several values per draw these have no equal weights; use 'score', 'rloo' or 'vimco' "
                        f"there, or a network without running statistics."
                    )
                moved.append(a.mean((0, 1)).astype(b.dtype))
            else:
                moved.append(a[0, 0])
        following[name] = jax.tree.unflatten(structure, moved)
    return following


def changed(old: States, new: States) -> list[str]:
    """Sites whose state one run of concrete arrays changed, keys left out."""

    def differ(name: str) -> bool:
        pairs = zip(jax.tree.leaves(old[name]), jax.tree.leaves(new[name]), strict=True)
        return any(not is_key(a) and not np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    return sorted(name for name in old if name in new and differ(name))


# Evaluation: dropout off, batch statistics frozen.


def _still_method(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
) -> Any:
    """Interceptor of flax.linen: a module with one of the flags runs with it set, whatever it was called with."""
    module = context.module
    flags = [f for f in FLAGS if f in getattr(type(module), "__dataclass_fields__", {})]
    if context.method_name != "__call__" or not flags:
        return call(*args, **kwargs)
    given = inspect.signature(context.orig_method).bind(*args, **kwargs).arguments
    rest = given.pop("kwargs", {})
    given = {name: value for name, value in given.items() if name not in FLAGS} | rest
    before = {flag: getattr(module, flag) for flag in flags}
    try:
        for flag in flags:
            object.__setattr__(module, flag, True)  # a frozen dataclass
        return call(**given)
    finally:
        for flag, value in before.items():
            object.__setattr__(module, flag, value)


@contextlib.contextmanager
def evaluation() -> Iterator[None]:
    """Networks of flax that are called in this block run in evaluation; `still` does it for equinox.

    Other threads wait, as they call the same functions of flax.
    """
    with TURN, contextlib.ExitStack() as stack:
        linen: Any = sys.modules.get("flax.linen")
        nnx: Any = sys.modules.get("flax.nnx")
        if linen is not None:
            stack.enter_context(linen.intercept_methods(_still_method))
        if nnx is not None:
            # `numpyro.contrib.module.nnx_module` merges the module anew at every call and hands it to nobody.
            merge = nnx.merge

            def still_merge(*args: Any, **kwargs: Any) -> Any:
                merged = merge(*args, **kwargs)
                if isinstance(merged, nnx.Module):
                    merged.eval()
                return merged

            nnx.merge = still_merge
            stack.callback(setattr, nnx, "merge", merge)
        yield


def still(value: Any) -> Any:
    """A parameter tree whose equinox modules run in evaluation.

    `eqx_module` lays this tree over the rest of the module, so what is no parameter is None here; a flag that is not
    None wins over the module's own.
    """
    if not isinstance(value, eqx.Module):
        return value
    return eqx.tree_at(_inference_flags, value, replace_fn=lambda _: True, is_leaf=lambda x: x is None)


def _inference_flags(tree: Any) -> list[Any]:
    def has_flag(x: Any) -> bool:
        return hasattr(x, "inference")

    inside = [x for x in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree and has_flag(x)) if has_flag(x)]
    deeper = [flag for x in inside for flag in _inference_flags(x)]
    return [tree.inference, *deeper] if has_flag(tree) else deeper
