"""Both backends give the same value and gradients at the same parameters and noise.

Objectives, estimators and programs are found by globbing. The noise is what Pyro drew, injected into both; a pathwise
site is rebuilt from it with its gradient. What one backend refuses, the other refuses with the same words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from ppl_lvm import legality, matrix, program, programs
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends._torch_dists import GuideSite, elements
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.numpyro import NumPyroBound, precision
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.backends.structure import Plan, noise_name, prior_name
from ppl_lvm.backends.training import initial_extras
from ppl_lvm.catalogue import estimators, objectives, resolve
from ppl_lvm.errors import LegalityError

QUICK = {"xla_backend_optimization_level": 0}
SMALL: dict[str, dict[str, Any]] = {"discrete_vae": {"variables": 2, "categories": 3}}
"""Options under which a site's support is small enough to enumerate; other programs run at their defaults."""


def variants(name: str) -> Iterator[Objective]:
    """An objective with two draws (two groups of two), under every choice of its options that are choices."""
    kind = resolve("objective", name, Path(), "the test")
    assert issubclass(kind, Objective)
    few: dict[str, Any] = {"draws": 4, "groups": 2} if "groups" in kind.model_fields else {"draws": 2}
    choices = {n: get_args(f.annotation) for n, f in kind.model_fields.items() if get_origin(f.annotation) is Literal}
    for values in itertools.product(*choices.values()):
        yield kind(**few, **dict(zip(choices, values, strict=True)))


def named(estimator: str) -> Estimator:
    kind = resolve("estimator", estimator, Path(), "the test")
    assert issubclass(kind, Estimator)
    return kind()


OBJECTIVES = [o for name in sorted(objectives()) for o in variants(name)]
OTHERS = sorted({*programs()} - {"vae", "discrete_vae"})


def serving(objective: Objective, kind: str) -> list[str]:
    """Estimators that serve an objective at a site of this kind."""
    judged = {e: matrix.judged(objective, named(e), *matrix.KINDS[kind])[0] for e in sorted(estimators())}
    if "joint" in objective.verbs and objective.draws > 2:
        judged["enumerate"] = "refused"  # nine values are too many for all choices of four draws
    return [e for e, verdict in judged.items() if verdict != "refused"]


def cells() -> Iterator[ParameterSet]:
    """Fast are a cover: each objective at a continuous or a discrete site, with estimators in turn that serve it there,
    and the other programs in turn with the first ones. Compiling each takes NumPyro seconds."""
    for i, objective in enumerate(OBJECTIVES):
        kinds = (("vae", "continuous"), ("discrete_vae", "finite"))
        of_kind = kinds[i % 2] if serving(objective, kinds[i % 2][1]) else kinds[0]
        served = [e for e in serving(objective, of_kind[1]) if named(e).site != "one_hot"]
        # An objective of sequences serves no program without a scan.
        chosen = [(of_kind[0], served[i // 2 % len(served)]) if served else ("linear_gaussian_chain", "pathwise")]
        if type(objective).__name__ == "elbo":
            chosen += [("vae", "stl")]  # serves means alone
            if getattr(objective, "kl", "") == "sampled":  # through a discrete value, every rule has its own gradient
                chosen += [("discrete_vae", e) for e in sorted(estimators()) if named(e).site == "one_hot"]
        if type(objective).__name__ in ("elbo", "iwae"):
            chosen += [(other, "pathwise") for j, other in enumerate(OTHERS) if j % 4 == i % 4]
        for p, e in itertools.product(sorted(programs()), sorted(estimators())):
            marks = [] if (p, e) in chosen else [pytest.mark.slow]
            yield pytest.param(p, objective, e, id=f"{p}-{objective!r}-{e}".replace(" ", ""), marks=marks)


CASES = [*cells()]


def as_matrix(unconstrained: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Lower Cholesky factors are matrices to torch and vectors (below the diagonal, then its logarithm) to NumPyro."""
    n = shape[-1] if len(shape) >= 2 else 0
    if unconstrained.shape != (*shape[:-2], n * (n + 1) // 2):
        return unconstrained
    matrix = np.zeros(shape)
    below = np.tril_indices(n, -1)
    matrix[(..., *below)] = unconstrained[..., :-n]
    return matrix + unconstrained[..., -n:, None] * np.eye(n)


def as_vector(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `as_matrix`."""
    if matrix.shape == shape:
        return matrix
    below = np.tril_indices(matrix.shape[-1], -1)
    return np.concatenate([matrix[(..., *below)], np.diagonal(matrix, axis1=-2, axis2=-1)], axis=-1)


class Pair:
    """A program bound to both backends, with Pyro's initial parameters."""

    def __init__(self, name: str) -> None:
        chosen = program(name, **SMALL.get(name, {}))
        assert chosen.example is not None
        made = Call.of(chosen.example(np.random.default_rng(0)))
        call = made.map(lambda a: np.asarray(a, dtype=np.float64) if np.asarray(a).dtype.kind == "f" else a)
        self.pyro = PyroBound(chosen, call, seed=0, dtype="float64")
        self.numpyro = NumPyroBound(chosen, call, seed=0, dtype="float64")
        self.tensors, self.arrays = self.pyro.batch(call), self.numpyro.batch(call)
        for n, p in self.pyro.initial.items():
            assert as_matrix(np.asarray(self.numpyro.initial[n]), p.shape).shape == p.shape, n

    def noise(self, plan: Plan, own: Any) -> dict[str, np.ndarray]:
        """Values and uniforms that sites were asked for, laid out as in the table; of several of a draw, the first."""
        structure = self.pyro.structure
        asked: list[GuideSite] = []

        class Asked(GuideSite):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                asked.append(self)

        with mock.patch("ppl_lvm.backends.pyro.GuideSite", Asked):
            draws = self.pyro.draws(self.pyro.initial, self.tensors, 3, plan, own=own)
        layout = {True: plan.layout(structure, True)[1], False: plan.layout(structure, False)[1]}
        found = {}
        for site in asked:
            for (salt, copies), u in site._noise.items():
                event = len(elements(site._fn)) + 1
                moved = u if copies is None else u.movedim(0, -event - 1)
                info = structure.sites[site._name]
                laid = self.pyro._from_site(moved, event + (copies is not None), info)
                found[noise_name(site._name, salt)] = laid.numpy()
        of_noise_alone = {s._name for s in asked if s._noise and "_drawn" not in s.__dict__}
        for n, s in draws.sites.items():
            if s.role == "observed" or n in of_noise_alone or (s.estimator is not None and s.estimator.exhaustive):
                continue
            if structure.sites[n].point:
                continue  # a value that differs from its own place in rounding would have no density
            value, (count, stride) = s.value.detach().numpy(), layout[s.local].get(n, (1, 1))
            entry = np.arange(value.shape[1 if s.local else 0])
            found[n] = np.take(value, entry - entry // stride % count * stride, axis=1 if s.local else 0)
            if "prior" in s.extra:
                found[prior_name(n)] = s.extra["prior"].detach().numpy()
        return found


PAIRS: dict[str, Pair] = {}


def pair(name: str) -> Pair:
    if name not in PAIRS:
        PAIRS[name] = Pair(name)
    return PAIRS[name]


@pytest.mark.parametrize(("name", "objective", "estimator"), CASES)
def test_backends_agree(name: str, objective: Objective, estimator: str) -> None:
    both = pair(name)
    plans: list[Plan | str] = []
    for bound in (both.pyro, both.numpyro):
        try:
            plans.append(legality.plan(objective, {"*": named(estimator)}, bound.structure)[0])
        except LegalityError as refused:
            plans.append(str(refused))
    assert plans[0] == plans[1]
    plan = plans[0]
    if isinstance(plan, str):
        return
    # log Z of trajectory balance, and weights of baselines, away from where they start.
    extras = initial_extras(objective, plan, both.tensors)[1]
    own: dict[str, Any] = {of: {n: 0.1 + np.asarray(v) for n, v in ps.items()} for of, ps in extras.items()}
    tensors = {of: {n: torch.tensor(v) for n, v in ps.items()} for of, ps in own.items()}
    noise = both.noise(plan, tensors)
    ours = both.pyro.gradients(
        both.pyro.initial,
        both.tensors,
        7,
        plan,
        objective,
        total_rows=50,
        values={n: torch.tensor(v) for n, v in noise.items()},
        own=tensors,
    )
    with precision("float64"):
        params = {
            n: jnp.asarray(as_vector(p.numpy(), both.numpyro.initial[n].shape))
            for n, p in both.pyro.initial.items()
        }
        given = {n: jnp.asarray(v) for n, v in noise.items()}

        def run(params: Any, given: Any) -> tuple[Any, Any, Any]:
            found = both.numpyro.gradients(
                params, both.arrays, jax.random.key(7), plan, objective, total_rows=50, values=given, own=own
            )
            return found.loss, found.params, found.own

        loss, gradient, of_own = jax.jit(run, compiler_options=QUICK)(params, given)
    np.testing.assert_allclose(ours.loss.numpy(), np.asarray(loss), rtol=1e-10)
    for of, ps in ours.own.items():
        for n, pulled in ps.items():
            other = np.asarray(of_own[of][n])
            # Of a network's entries some cancel to far below the rest.
            rounding = 1e-13 * np.abs(other).max()
            np.testing.assert_allclose(pulled.numpy(), other, rtol=1e-10, atol=rounding, err_msg=f"{of}.{n}")
    groups = both.pyro.structure.groups
    # What the model draws in its sleep is the libraries' own noise; see `test_sleep` of test_objectives_continuous.
    asleep = "sleep" in objective.requests()
    compared = {n: g for n, g in ours.params.items() if not asleep or "model" in groups[n]}
    moved = 0
    for parameter, expected in compared.items():
        scale = max(1.0, float(expected.abs().max()))
        found = as_matrix(np.asarray(gradient[parameter]), expected.shape)
        np.testing.assert_allclose(expected.numpy(), found, rtol=0, atol=1e-10 * scale, err_msg=parameter)
        moved += bool(expected.abs().max() > 1e-8)
    assert moved == len(compared)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "all"])
def test_what_is_legal_is_not_refused_away(fast: bool) -> None:
    """Each objective and each estimator is legal somewhere, among the fast cells too."""
    served = set()
    for case in CASES:
        if fast and case.marks:
            continue
        name, objective, estimator = case.values
        try:
            legality.plan(objective, {"*": named(str(estimator))}, pair(str(name)).pyro.structure)  # type: ignore[arg-type]
        except LegalityError:
            continue
        served |= {estimator, type(objective).__name__}
    # These programs draw all their sites in the guide; see `test_marginal.py` for those that the model alone has.
    assert served == {*objectives(), *(e for e in estimators() if not named(e).marginal)}
