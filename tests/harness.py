"""Programs run on either backend in float64, numpy arrays in and out: what contract tests are written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from toys import Array, Backend, Toy, Values

from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends.base import Call, losses
from ppl_lvm.backends.numpyro import NumPyroBound
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.backends.structure import Plan, Structure
from ppl_lvm.legality import plan
from ppl_lvm.program import Program

BACKENDS: tuple[Backend, ...] = ("pyro", "numpyro")

# Compiling these small programs well would take longer than running them.
_QUICK = {"xla_backend_optimization_level": 0}
_BOUND: dict[tuple[str, str], Engine] = {}


class Loss(NamedTuple):
    """The model's loss and the gradient of each parameter; with `runs`, an axis of runs in front of both."""

    value: np.ndarray
    gradient: dict[str, np.ndarray]
    own: dict[str, dict[str, np.ndarray]] = {}
    """Gradients of the parameters of estimators and objective."""


class Row(NamedTuple):
    """One site of a table, as numpy arrays."""

    value: Array
    log_p: Array
    log_q: Array
    extra: dict[str, Array]


class Engine:
    """A model and guide bound to a backend and data, with the parameters they start from."""

    def __init__(
        self,
        backend: Backend,
        model: Callable[..., None],
        guide: Callable[..., None],
        data: Values,
        *,
        portable: bool,
        data_plate: str | None = None,
        example: Callable[..., Any] | None = None,
    ) -> None:
        program = Program("toy", model, guide, portable=portable, arguments=tuple(data), example=example)
        self.backend = backend
        kind = PyroBound if backend == "pyro" else NumPyroBound
        with self._precision():
            self.bound: Any = kind(program, Call.of(dict(data)), seed=0, dtype="float64", data_plate=data_plate)
            call = Call.of(dict(data))
            if self.bound.row_params:
                call = call.with_rows(len(next(iter(data.values()))))
            self.batch = self.bound.batch(call)

    @classmethod
    def of(cls, backend: Backend, toy: Toy, data: Values | None = None) -> Engine:
        """A toy on its own data, bound once, or on other data."""
        if data is not None:
            return cls(backend, toy.model, toy.guide, data, portable=True)
        if (backend, toy.name) not in _BOUND:
            _BOUND[backend, toy.name] = cls(backend, toy.model, toy.guide, toy.data, portable=True)
        return _BOUND[backend, toy.name]

    @property
    def structure(self) -> Structure:
        return self.bound.structure

    def loss(
        self,
        objective: Objective,
        estimators: Mapping[str, Estimator],
        *,
        values: Values | None = None,
        weight: np.ndarray | None = None,
        total_rows: int | None = None,
        states: Values | None = None,
        own: Mapping[str, Values] | None = None,
        runs: int | None = None,
        seed: int = 0,
    ) -> Loss:
        """One run, or `runs` of them with different noise.

        Injected `values` are laid out as in the table, behind an axis of runs if there are several; noise of a site
        with classes goes by `noise_name(site, salt)`, `[M, K, B, *inner, *elements, V]`, copies in front of elements.
        `weight` is the probability of each outer draw. `states` and `own` are what estimators and objective keep and
        learn.
        """
        chosen, given = self.plan(objective, estimators), values or {}
        if runs is None:
            given = {name: value[None] for name, value in given.items()}
        with self._precision():
            outer_weight = None if weight is None else self._array(weight)
            kept = {name: self._array(value) for name, value in (states or {}).items()}
            learned = {s: {n: self._array(p) for n, p in ps.items()} for s, ps in (own or {}).items()}

            def step(run: tuple[Array, dict[str, Array]]) -> tuple[Array, dict[str, Array], Any]:
                found = self.bound.gradients(
                    self.bound.initial,
                    self.batch,
                    run[0],
                    chosen,
                    objective,
                    values=run[1],
                    outer_weight=outer_weight,
                    total_rows=total_rows,
                    states=kept,
                    own=learned,
                )
                return found.loss, found.params, found.own

            if self.backend == "numpyro":
                keys = jax.random.split(jax.random.key(seed), runs or 1)
                arrays = {name: jnp.asarray(value) for name, value in given.items()}
                compiled = jax.jit(lambda *every: jax.lax.map(step, every), compiler_options=_QUICK)
                value, gradient, pulled = compiled(keys, arrays)
                losses, gradients = np.asarray(value), {n: np.asarray(g) for n, g in gradient.items()}
                of_own = {s: {n: np.asarray(g) for n, g in gs.items()} for s, gs in pulled.items()}
            else:
                tensors = {name: torch.tensor(value) for name, value in given.items()}
                every = [
                    step((seed * 100_000 + run, {name: value[run] for name, value in tensors.items()}))
                    for run in range(runs or 1)
                ]
                losses = np.stack([value.numpy() for value, *_ in every])
                gradients = {n: np.stack([g[n].numpy() for _, g, _ in every]) for n in self.bound.initial}
                of_own = {
                    s: {n: np.stack([o[s][n].numpy() for *_, o in every]) for n in gs}
                    for s, gs in every[0][2].items()
                }
        if runs is None:
            alone = {s: {n: g[0] for n, g in gs.items()} for s, gs in of_own.items()}
            return Loss(losses[0], {name: value[0] for name, value in gradients.items()}, alone)
        return Loss(losses, gradients, of_own)

    def guide_loss(self, objective: Objective, estimators: Mapping[str, Estimator], seed: int = 0) -> float:
        """The guide's loss of one run; that of the model is `loss`."""
        chosen = self.plan(objective, estimators)

        def run(key: Any) -> Array:
            return losses(self.bound.draws(self.bound.initial, self.batch, key, chosen), objective, chosen)[1]

        with self._precision():
            if self.backend == "numpyro":
                return float(jax.jit(run, compiler_options=_QUICK)(jax.random.key(seed)))
            return float(run(seed))

    def sites(
        self, objective: Objective, estimators: Mapping[str, Estimator], *, values: Values | None = None, seed: int = 0
    ) -> dict[str, Row]:
        """The table of the run that `loss` makes with the same seed."""
        chosen = self.plan(objective, estimators)

        def run(key: Any, given: dict[str, Array]) -> dict[str, Row]:
            found = self.bound.draws(self.bound.initial, self.batch, key, chosen, values=given)
            return {n: Row(s.value, s.log_p, s.log_q, dict(s.extra)) for n, s in found.sites.items()}

        with self._precision():
            given = {name: self._array(value) for name, value in (values or {}).items()}
            if self.backend == "numpyro":
                key = jax.random.split(jax.random.key(seed), 1)[0]
                table = jax.jit(run, compiler_options=_QUICK)(key, given)
                return jax.tree.map(np.asarray, table)
            return jax.tree.map(lambda t: t.detach().numpy(), run(seed * 100_000, given))

    def log_w(self, objective: Objective, estimators: Mapping[str, Estimator], seed: int = 0) -> np.ndarray:
        """Log weights `[M, K, B]` of one run."""
        chosen = self.plan(objective, estimators)

        def run(key: Any) -> Array:
            return self.bound.draws(self.bound.initial, self.batch, key, chosen).log_w

        with self._precision():
            if self.backend == "numpyro":
                return np.asarray(jax.jit(run, compiler_options=_QUICK)(jax.random.key(seed)))
            return run(seed).detach().numpy()

    def plan(self, objective: Objective, estimators: Mapping[str, Estimator]) -> Plan:
        """The run's static choices; what is not legal raises."""
        return plan(objective, estimators, self.structure)[0]

    def _precision(self) -> AbstractContextManager[Any]:
        return jax.enable_x64(True) if self.backend == "numpyro" else nullcontext()

    def _array(self, value: np.ndarray) -> Array:
        return jnp.asarray(value) if self.backend == "numpyro" else torch.tensor(value)


def assert_equal(found: Loss, value: float | None, gradient: Mapping[str, np.ndarray], tolerance: float) -> None:
    """The loss and every gradient, without Monte Carlo tolerance."""
    if value is not None:
        np.testing.assert_allclose(found.value, value, rtol=0, atol=tolerance)
    assert found.gradient.keys() == gradient.keys()
    for name, expected in gradient.items():
        np.testing.assert_allclose(found.gradient[name], expected, rtol=0, atol=tolerance, err_msg=name)


def assert_unbiased(found: Loss, value: float | None, gradient: Mapping[str, np.ndarray], bound: float = 4.5) -> None:
    """Means over runs lie within `bound` of their own standard errors, for every entry."""
    scores = {name: z_scores(found.gradient[name], expected) for name, expected in gradient.items()}
    if value is not None:
        scores["loss"] = z_scores(found.value, np.asarray(value))
    worst = {name: float(np.abs(score).max()) for name, score in scores.items()}
    assert max(worst.values()) < bound, worst


def z_scores(runs: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Deviation of the mean over runs in standard errors (rounding is forgiven where there is no noise)."""
    error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    return (runs.mean(axis=0) - expected) / np.maximum(error, 1e-10)
