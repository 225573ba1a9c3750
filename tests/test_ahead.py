"""What a step's key decides alone is found before the loop over steps, to the same bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl_lvm.backends import _numpyro_train
from ppl_lvm.backends._jax_ahead import ahead
from ppl_lvm.backends._jax_together import SMALL

pytestmark = pytest.mark.optimised

TABLE = jnp.arange(6.0)


def f(key: Any, given: Any) -> Any:
    """Noise, small and large, a constant, a branch and a loop of both arguments."""
    x, scale = given
    small, large, other = jax.random.split(key, 3)
    noise = jax.random.normal(small, (3,))
    weights = jax.nn.softmax(noise) + TABLE[:3]
    many = jax.random.normal(large, (SMALL + 1,))
    _, walked = jax.lax.scan(lambda c, e: (c + e * scale, c), 0.0, noise)
    chosen = jax.lax.cond(jax.random.bernoulli(other), lambda a: a, lambda a: -a, x)
    return {"sum": (weights * x).sum() + many.sum(), "walked": walked, "chosen": chosen, "noise": noise}


def primitives(g: Any, *arguments: Any) -> set[str]:
    return {eqn.primitive.name for eqn in jax.make_jaxpr(g)(*arguments).jaxpr.eqns}


def test_both_parts_give_the_bits_of_the_whole_one_by_one_and_under_vmap() -> None:
    key, given = jax.random.key(5), (jnp.arange(3.0), jnp.asarray(0.3))
    first, rest = ahead(f, key, given, 1000)
    for k in jax.random.split(key, 20):
        for found, known in zip(*map(jax.tree.leaves, (rest(first(k), given), f(k, given))), strict=True):
            np.testing.assert_array_equal(found, known)
    keys = jax.random.split(key, 7)
    together = jax.vmap(rest, (0, None))(jax.vmap(first)(keys), given)
    known = jax.vmap(f, (0, None))(keys, given)
    for one, other in zip(*map(jax.tree.leaves, (together, known)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_small_noise_and_what_follows_from_it_alone_are_found_first_and_large_arrays_never() -> None:
    key, given = jax.random.key(5), (jnp.arange(3.0), jnp.asarray(0.3))
    first, rest = ahead(f, key, given, 1000)
    found = first(key)
    assert max(a.size for a in found) <= SMALL
    assert any(np.array_equal(a, f(key, given)["noise"]) for a in found if a.dtype == jnp.float32)

    def small(key: Any, x: Any) -> Any:
        return jax.random.normal(key, (3,)) * x

    first, rest = ahead(small, key, jnp.ones(3), 1000)
    assert not any("random" in p or p == "pjit" for p in primitives(rest, first(key), jnp.ones(3)))


def test_no_more_is_found_first_than_is_allowed_for() -> None:
    key, given = jax.random.key(5), (jnp.arange(3.0), jnp.asarray(0.3))
    for most in (1000, 5, 1):
        first, rest = ahead(f, key, given, most)
        assert sum(a.size for a in first(key)) <= max(most, 1)
        for found, known in zip(*map(jax.tree.leaves, (rest(first(key), given), f(key, given))), strict=True):
            np.testing.assert_array_equal(found, known)


def test_sums_over_short_axes_are_compiled_as_they_are() -> None:
    x = jax.ShapeDtypeStruct((64, 200, 3, 2), "float32")

    def summed(x: jax.Array) -> jax.Array:
        return (x * x).sum(-1)

    def text(options: dict[str, object]) -> str:
        return jax.jit(summed, compiler_options=options).lower(x).compile().as_text() or ""

    assert "ynn" not in text(_numpyro_train._options())
