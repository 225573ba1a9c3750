"""Equal operations of many sites are made as one, to the same numbers."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl_lvm.backends._jax_together import ENOUGH, SMALL, array, together

N = ENOUGH + 3


def sites(key: Any, x: Any, scale: Any) -> dict[str, Any]:
    """Noise of every site, a chain over sites, an order turned round, a branch, a loop, and a number of each."""
    keys = [jax.random.fold_in(key, 7 * i) for i in range(N)]
    noise = [jax.random.normal(k, (3,)) for k in keys]
    moved = [x[i] + scale * e for i, e in enumerate(noise)]
    backwards = [jnp.tanh(m) * (i + 1.0) for i, m in enumerate(reversed(moved))]
    some = [jnp.exp(m) for m in moved[::2]]
    branched = [jax.lax.cond(m[0] > 0, jnp.sin, jnp.cos, m) for m in moved]
    walked = [jax.lax.scan(lambda c, e: (c * scale + e, c), 0.0, e)[0] for e in noise]
    chain = x[0]
    for m in moved:
        chain = 0.5 * chain + m
    return {"chain": chain, "back": backwards, "some": some, "branched": branched, "walked": walked, "noise": noise}


ARGUMENTS = (jax.random.key(3), jnp.linspace(-1.0, 1.0, 3 * N).reshape(N, 3), jnp.asarray(0.3))


def at_once(f: Any, *arguments: Any) -> Any:
    closed, out = jax.make_jaxpr(f, return_shape=True)(*arguments)

    def g(*arguments: Any) -> Any:
        found = map(array, together(closed, jax.tree.leaves(arguments)))
        return jax.tree.unflatten(jax.tree.structure(out), found)

    return g


def count(f: Any, primitive: str, *arguments: Any) -> int:
    return sum(eqn.primitive.name == primitive for eqn in jax.make_jaxpr(f)(*arguments).jaxpr.eqns)


def test_the_numbers_are_those_of_one_after_the_other() -> None:
    found, known = at_once(sites, *ARGUMENTS)(*ARGUMENTS), sites(*ARGUMENTS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(found["noise"], known["noise"], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_of_a_loss_over_sites_holds_under_vmap_and_jit() -> None:
    def loss(x: Any) -> Any:
        moved = [jnp.tanh(x[i]) * jax.random.normal(jax.random.key(i)) for i in range(N)]
        return sum(jnp.sum(a * b) for a, b in pairwise(moved))

    xs = jnp.stack([ARGUMENTS[1], 2.0 * ARGUMENTS[1]])
    found = jax.jit(jax.vmap(at_once(jax.grad(loss), xs[0])))(xs)
    np.testing.assert_allclose(found, jax.jit(jax.vmap(jax.grad(loss)))(xs), rtol=2e-5, atol=1e-5)


def test_noise_of_many_sites_is_one_operation() -> None:
    assert count(sites, "random_fold_in", *ARGUMENTS) == N
    assert count(at_once(sites, *ARGUMENTS), "random_fold_in", *ARGUMENTS) == 1
    assert count(sites, "tanh", *ARGUMENTS) == N
    assert count(at_once(sites, *ARGUMENTS), "tanh", *ARGUMENTS) == 1


@pytest.mark.parametrize(("n", "entries", "left"), [(ENOUGH - 1, 3, ENOUGH - 1), (N, SMALL + 1, N), (N, SMALL, 1)])
def test_few_operations_and_those_on_large_arrays_stay_apart(n: int, entries: int, left: int) -> None:
    def f(x: Any) -> Any:
        return [jnp.exp(x[i]) for i in range(n)]

    x = jnp.ones((n, entries))
    assert count(at_once(f, x), "exp", x) == left


def test_what_nobody_asks_for_is_left_out_and_effects_stay() -> None:
    seen: list[float] = []

    def f(x: Any) -> Any:
        jnp.sin(x)
        for i in range(N):
            a = jnp.exp(jnp.log(x[i] + 1.0)) - 1.0 if i % 2 else x[i]
            jax.debug.callback(lambda a: seen.append(round(float(a))), a, ordered=True)
        return x

    x = jnp.arange(float(N))
    assert count(at_once(f, x), "sin", x) == 0
    np.testing.assert_array_equal(at_once(f, x)(x), x)
    jax.effects_barrier()
    assert seen == x.tolist()
