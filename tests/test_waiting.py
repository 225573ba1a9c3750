"""Threads of jaxlib that may wait for one another in large stacks of matrices: these are taken in pieces."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from ppl_lvm import fit, program
from ppl_lvm.backends import _jax_waiting, _numpyro_train, numpyro
from ppl_lvm.backends._jax_equations import inner
from ppl_lvm.backends._jax_waiting import in_pieces, threads
from ppl_lvm.backends.training import Steps

STACK = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5, 3, 3)), jnp.float32)


def loss(x: Any) -> Any:
    """Factors and solves in the open, in a loop, in a branch, under vmap, computed anew, and of one matrix alone."""
    cov = x @ x.mT + jnp.eye(3)
    lower = jnp.linalg.cholesky(cov)
    solved = jax.scipy.linalg.solve_triangular(lower, x, lower=True)
    back = jax.scipy.linalg.solve_triangular(lower, x[..., :2], lower=True, trans=1)

    def step(carry: Any, one: Any) -> tuple[Any, Any]:
        root = jnp.linalg.cholesky(carry @ carry.mT + one)
        return root, root[..., 0]

    _, walked = jax.lax.scan(step, lower[0], cov)
    branch = jax.lax.cond(x[0, 0, 0, 0] > 0, jnp.linalg.cholesky, lambda a: a, cov[1])
    mapped = jax.vmap(jnp.linalg.cholesky)(cov)
    mapped = mapped + x[jnp.arange(7), jnp.argsort(x[:, 0, 0, 0]) % 5][:, None]
    anew = jax.lax.map(jax.checkpoint(lambda a: jnp.cos(jnp.linalg.cholesky(a))), cov)
    alone = jnp.linalg.cholesky(cov[0, 0])
    return sum((a**2 * jnp.cos(a)).sum() for a in (lower, solved, back, walked, branch, mapped, anew, alone))


def left(f: Any) -> list[int]:
    """Stacks in a computation, by the number of their matrices."""
    found = []

    def look(eqns: Any) -> None:
        for eqn in eqns:
            if eqn.primitive.name in _jax_waiting.OPERATIONS:
                found.append(_jax_waiting._stack(eqn))
            for part in inner(eqn.params):
                look(part.eqns)

    look(f.jaxpr.eqns)
    return found


@pytest.mark.parametrize("work", [60, 27 * 4, 10**9])
def test_values_and_gradients_are_the_same_in_pieces(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = jax.make_jaxpr(jax.value_and_grad(loss))(STACK)
    monkeypatch.setattr(_jax_waiting, "WORK", work)
    pieces = in_pieces(closed)
    known, found = (jax.jit(jax.extend.core.jaxpr_as_fun(c))(STACK) for c in (closed, pieces))
    for a, b in zip(known, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    assert max(left(closed)) == 35
    assert max(left(pieces)) == {60: 3, 27 * 4: 5, 10**9: 35}[work]


@pytest.mark.parametrize(
    ("version", "given", "found"),
    [
        ("0.9.2", "4", 1),
        ("0.10.0", "4", 4),
        ("0.11.1", "1", 1),
        ("0.11.1", "3", 3),
        ("0.11.2", "4", 1),
        ("0.12", "4", 1),
    ],
)
def test_versions_and_threads(version: str, given: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxlib, "__version__", version)
    monkeypatch.setenv("NPROC", given)
    assert threads() == (found if jax.default_backend() == "cpu" else 1)


def test_a_fit_and_its_evaluation_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def counted(closed: Any) -> Any:
        taken.append(found := in_pieces(closed))
        return found

    def largest() -> list[int]:
        of_each = [max(left(closed), default=0) for closed in taken]
        taken.clear()
        return of_each

    options: dict[str, Any] = {"recipe": "elbo", "steps": 3, "backend": "numpyro", "progress_bar": False}
    make = program("lds").example
    assert make is not None
    data = make(np.random.default_rng(0))
    whole = fit(program("lds"), data=data, **options)
    likely = whole.log_likelihood(data, draws=2)
    monkeypatch.setattr(_jax_waiting, "WORK", 100)
    monkeypatch.setattr(_jax_waiting, "threads", lambda: 2)
    monkeypatch.setattr(_jax_waiting, "in_pieces", counted)
    steps = Steps()
    monkeypatch.setattr(_numpyro_train, "STEPS", steps)
    monkeypatch.setattr(numpyro, "EVALUATIONS", Steps())
    pieces = fit(program("lds"), data=data, **options)
    assert steps.traces == 1
    assert largest()[-1] > 0
    np.testing.assert_allclose(pieces.history["loss"], whole.history["loss"], rtol=1e-5)
    np.testing.assert_allclose(pieces.log_likelihood(data, draws=2).values, likely.values, rtol=1e-4)
    assert largest()


TWO_THREADS = """
import jax, jax.numpy as jnp, numpy as np
from ppl_lvm.backends._jax_waiting import without_waiting
def f(x):
    a = [jnp.linalg.cholesky((i + 1.0) * x @ x.mT + jnp.eye(4)) for i in range(8)]
    return sum(jax.scipy.linalg.solve_triangular(l, x, lower=True) for l in a).sum()
x = jnp.asarray(np.random.default_rng(0).normal(size=(20_000, 4, 4)), jnp.float32)
slope = jax.jit(without_waiting(jax.grad(f)))
for _ in range(20):
    slope(x).block_until_ready()
print("over")
"""


def test_two_threads_come_to_an_end() -> None:
    """Without pieces this stands still, on jaxlib 0.10."""
    environment = os.environ | {"NPROC": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWO_THREADS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "over\n", done.stderr
