"""The engine's losses inside NumPyro's own loop: an object that `numpyro.infer.SVI` takes for an ELBO."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.backends._numpyro_guides import by_noise
from ppl_lvm.backends.base import Call, losses
from ppl_lvm.backends.numpyro import NumPyroBound
from ppl_lvm.backends.structure import Plan, Structure
from ppl_lvm.draws import Draws
from ppl_lvm.program import Program

Array = jax.Array
Planner = Callable[[Structure], Plan]


class _Bound(NumPyroBound):
    """A program as SVI runs it: arguments and precision as they come, parameters constrained, the guide itself."""

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], call: Call, data_plate: str | None
    ) -> None:
        dtype = "float64" if jax.config.jax_enable_x64 else "float32"  # type: ignore[attr-defined]
        super().__init__(Program.from_callables(model, guide), call, seed=0, dtype=dtype, data_plate=data_plate)

    def batch(self, call: Call) -> Call:
        return call

    def constrain(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return dict(params)

    def _unconstrain(self, name: str, value: Any) -> Any:
        return self._cast(value)

    def _own(self, guide: Callable[..., Any]) -> Callable[..., Any]:
        return by_noise(guide)


class NumPyroLoss:
    """An objective with its estimators as the `loss` of `numpyro.infer.SVI` (see `ppl_lvm.numpyro_loss`)."""

    can_infer_discrete = True
    multi_sample_guide = False

    def __init__(
        self, objective: Objective, estimators: Mapping[str, Estimator | None], planner: Planner, data_plate: str | None
    ) -> None:
        self.objective, self.estimators, self.data_plate = objective, estimators, data_plate
        self._planner = planner
        self._bounds: dict[Hashable, tuple[_Bound, Plan]] = {}

    def loss(
        self,
        rng_key: Array,
        param_map: Mapping[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Array:
        """The loss in nats over all rows; its gradient is the estimators' own, for every group of parameters."""
        return self.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)["loss"]

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: Mapping[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The same with the state that the program leaves behind (batch statistics), or None."""
        call = Call(args, kwargs)
        bound, plan = self._bound(model, guide, call)

        def run(params: Mapping[str, Any]) -> tuple[Draws, dict[str, Any]]:
            return bound._run(params, call, rng_key, plan, training=True)

        groups = bound.structure.groups
        draws, left = run(param_map)
        value, of_guide, _, _ = losses(draws, self.objective, plan)
        if of_guide is not None:
            # Two losses in one number: each sees the other group's parameters stopped.
            of_model = {n for n, used in groups.items() if "model" in used}
            value = losses(run(_stopped(param_map, set(groups) - of_model))[0], self.objective, plan)[0]
            other = losses(run(_stopped(param_map, of_model))[0], self.objective, plan)[1]
            assert other is not None
            value = value + other - jax.lax.stop_gradient(other)
        return {"loss": value, "mutable_state": left or None}

    def _bound(self, model: Callable[..., Any], guide: Callable[..., Any], call: Call) -> tuple[_Bound, Plan]:
        """The program's structure on arguments of these shapes, probed once."""
        leaves, structure = jax.tree.flatten((call.args, dict(call.kwargs)))
        what = tuple((jnp.shape(a), str(a.dtype)) if _is_array(a) else a for a in leaves)
        key = (model, guide, structure, what, bool(jax.config.jax_enable_x64))  # type: ignore[attr-defined]
        if key not in self._bounds:
            # SVI calls under jit; the probe looks at values, which must not be traced.
            with jax.ensure_compile_time_eval():
                known = [jnp.zeros(a.shape, a.dtype) if isinstance(a, jax.core.Tracer) else a for a in leaves]
                args, kwargs = jax.tree.unflatten(structure, known)
                bound = _Bound(model, guide, Call(args, kwargs), self.data_plate)
            self._bounds[key] = bound, self._planner(bound.structure)
        return self._bounds[key]


def _is_array(a: Any) -> bool:
    return hasattr(a, "shape") and hasattr(a, "dtype")


def _stopped(params: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {n: jax.lax.stop_gradient(v) if n in names else v for n, v in params.items()}
