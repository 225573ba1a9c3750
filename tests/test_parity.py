"""Both backends give the same value and gradients at the same parameters and noise.

Objectives, estimators and programs are found by globbing. The noise is what Pyro drew, injected into both; a pathwise
site is rebuilt from it with its gradient. What one backend refuses, the other refuses with the same words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_lvm import legality, program, programs
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.base import Call, Plan
from ppl_lvm.backends.numpyro import NumPyroBound, precision
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.catalogue import estimators, objectives, resolve
from ppl_lvm.errors import LegalityError

QUICK = {"xla_backend_optimization_level": 0}
SMALL: dict[str, dict[str, Any]] = {"discrete_vae": {"variables": 2, "categories": 3}}
"""Options under which a site's support is small enough to enumerate; other programs run at their defaults."""


def variants(name: str) -> Iterator[Objective]:
    """An objective with two draws, under every choice of its options that are choices."""
    kind = resolve("objective", name, Path(), "the test")
    assert issubclass(kind, Objective)
    choices = {n: get_args(f.annotation) for n, f in kind.model_fields.items() if get_origin(f.annotation) is Literal}
    # As many groups as draws.
    groups: dict[str, Any] = {"groups": 2} if "groups" in kind.model_fields else {}
    for values in itertools.product(*choices.values()):
        yield kind(draws=2, **groups, **dict(zip(choices, values, strict=True)))


CASES = [
    pytest.param(p, o, e, id=f"{p}-{o!r}-{e}".replace(" ", ""))
    for p in sorted(programs())
    for name in sorted(objectives())
    for o in variants(name)
    for e in sorted(estimators())
]


def as_matrix(unconstrained: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Lower Cholesky factors are matrices to torch and vectors (below the diagonal, then its logarithm) to NumPyro."""
    n = shape[0] if len(shape) == 2 else 0
    if unconstrained.ndim != 1 or unconstrained.shape != (n * (n + 1) // 2,):
        return unconstrained
    matrix = np.zeros(shape)
    matrix[np.tril_indices(n, -1)] = unconstrained[:-n]
    return matrix + np.diag(unconstrained[-n:])


def as_vector(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `as_matrix`."""
    if matrix.shape == shape:
        return matrix
    return np.concatenate([matrix[np.tril_indices(len(matrix), -1)], np.diagonal(matrix)])


class Pair:
    """A program bound to both backends, with Pyro's initial parameters."""

    def __init__(self, name: str) -> None:
        chosen = program(name, **SMALL.get(name, {}))
        assert chosen.example is not None
        call = Call.of(chosen.example(np.random.default_rng(0))).map(lambda a: np.asarray(a, dtype=np.float64))
        self.pyro = PyroBound(chosen, call, seed=0, dtype="float64")
        self.numpyro = NumPyroBound(chosen, call, seed=0, dtype="float64")
        self.tensors, self.arrays = self.pyro.batch(call), self.numpyro.batch(call)
        for n, p in self.pyro.initial.items():
            assert as_matrix(np.asarray(self.numpyro.initial[n]), p.shape).shape == p.shape, n

    def noise(self, plan: Plan) -> dict[str, np.ndarray]:
        """Values of the sites that are drawn, laid out as in the table."""
        draws = self.pyro.draws(self.pyro.initial, self.tensors, 3, plan)
        return {
            n: s.value.detach().numpy() for n, s in draws.sites.items() if s.role != "observed" and s.variants == 1
        }


PAIRS: dict[str, Pair] = {}


def pair(name: str) -> Pair:
    if name not in PAIRS:
        PAIRS[name] = Pair(name)
    return PAIRS[name]


@pytest.mark.parametrize(("name", "objective", "estimator"), CASES)
def test_backends_agree(name: str, objective: Objective, estimator: str) -> None:
    both = pair(name)
    kind = resolve("estimator", estimator, Path(), "the test")
    assert issubclass(kind, Estimator)
    plans: list[Plan | str] = []
    for bound in (both.pyro, both.numpyro):
        try:
            plans.append(legality.plan(objective, {"*": kind()}, bound.structure)[0])
        except LegalityError as refused:
            plans.append(str(refused))
    assert plans[0] == plans[1]
    plan = plans[0]
    if isinstance(plan, str):
        return
    noise = both.noise(plan)
    ours = both.pyro.gradients(
        both.pyro.initial,
        both.tensors,
        7,
        plan,
        objective,
        total_rows=50,
        values={n: torch.tensor(v) for n, v in noise.items()},
    )
    with precision("float64"):
        params = {
            n: jnp.asarray(as_vector(p.numpy(), both.numpyro.initial[n].shape))
            for n, p in both.pyro.initial.items()
        }
        given = {n: jnp.asarray(v) for n, v in noise.items()}

        def run(params: Any, given: Any) -> tuple[Any, Any]:
            found = both.numpyro.gradients(
                params, both.arrays, jax.random.key(7), plan, objective, total_rows=50, values=given
            )
            return found.loss, found.params

        loss, gradient = jax.jit(run, compiler_options=QUICK)(params, given)
    np.testing.assert_allclose(ours.loss.numpy(), np.asarray(loss), rtol=1e-10)
    moved = 0
    for parameter, expected in ours.params.items():
        scale = max(1.0, float(expected.abs().max()))
        found = as_matrix(np.asarray(gradient[parameter]), expected.shape)
        np.testing.assert_allclose(expected.numpy(), found, rtol=0, atol=1e-10 * scale, err_msg=parameter)
        moved += bool(expected.abs().max() > 1e-8)
    assert moved == len(ours.params)


def test_what_is_legal_is_not_refused_away() -> None:
    """Each estimator serves some site of some program under some objective."""
    served = set()
    for case in CASES:
        name, objective, estimator = case.values
        kind = resolve("estimator", str(estimator), Path(), "the test")
        try:
            legality.plan(objective, {"*": kind()}, pair(str(name)).pyro.structure)  # type: ignore[arg-type,dict-item]
        except LegalityError:
            continue
        served.add(estimator)
    assert served == set(estimators())
