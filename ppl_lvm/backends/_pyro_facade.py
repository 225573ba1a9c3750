"""An objective as a loss of `pyro.infer.SVI`: values and gradients are the engine's, parameters are the store's."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from ppl_lvm.algorithm import Objective, Schedule
from ppl_lvm.backends.base import Call, losses
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.backends.structure import Plan, Structure
from ppl_lvm.backends.training import Steps, initial_extras, numbers_of, with_numbers
from ppl_lvm.errors import BackendError, ProgramError
from ppl_lvm.program import Program

Own = dict[str, dict[str, Tensor]]


class PyroLoss(ELBO):
    """See `ppl_lvm.pyro_loss`."""

    def __init__(
        self,
        objective: Objective,
        planned: Callable[[Structure], Plan],
        *,
        total_rows: int | None,
        data_plate: str | None,
    ) -> None:
        super().__init__()
        self.steps = 0
        """Gradient steps so far, at which scheduled numbers are read."""
        self._objective, self._planned = objective, planned
        self._total_rows, self._data_plate = total_rows, data_plate
        self._bounds = Steps()
        self._states: dict[str, Tensor] | None = None

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("The engine runs model and guide itself; use loss or loss_and_grads.")

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss in nats over all rows, without gradients."""
        bound, plan, batch = self._bound(model, guide, args, kwargs)
        states, own = self._extras(plan, batch)
        objective, plan = self._now(plan)
        with torch.no_grad():
            params = {n: leaf.detach() for n, leaf in self._leaves(bound).items()}
            draws = bound.draws(params, batch, None, plan, total_rows=self._total_rows, states=states, own=own)
            return float(losses(draws, objective, plan)[0])

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The same, with the gradient of each group added to `grad` of the store's parameters."""
        bound, plan, batch = self._bound(model, guide, args, kwargs)
        states, own = self._extras(plan, batch)
        objective, plan = self._now(plan)
        leaves = self._leaves(bound)
        found = bound.gradients(
            leaves, batch, None, plan, objective, total_rows=self._total_rows, states=states, own=own
        )
        self._states = found.states
        self.steps += 1
        every = [(n, leaves[n], found.params[n]) for n in leaves]
        every += [(_named(s, n), own[s][n], g) for s, gs in found.own.items() for n, g in gs.items()]
        for name, leaf, gradient in every:
            gradient = gradient.to(leaf.dtype)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            pyro.param(name)  # SVI looks for its parameters in these messages.
        return float(found.loss)

    def _now(self, plan: Plan) -> tuple[Objective, Plan]:
        numbers = numbers_of(self._objective, plan, {})
        values = {n: v.at(self.steps) if isinstance(v, Schedule) else v for n, v in numbers.items()}
        return with_numbers(self._objective, plan, values)

    def _bound(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[PyroBound, Plan, Call]:
        call = Call(args, kwargs)
        key = (model, guide, len(args), tuple(kwargs), *(_form(a) for a in (*args, *kwargs.values())))

        def bind() -> tuple[PyroBound, Plan]:
            # One run as it is, so that the store has its parameters and autoguides are set up.
            with torch.no_grad(), poutine.block():
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
                poutine.replay(model, trace=trace)(*args, **kwargs)
            wide = any(p.dtype == torch.float64 for _, p in pyro.get_param_store().named_parameters())
            bound = PyroBound(
                Program.from_callables(model, guide),
                call,
                seed=0,
                dtype="float64" if wide else "float32",
                data_plate=self._data_plate,
            )
            return bound, self._planned(bound.structure)

        bound, plan = self._bounds.get(key, bind)
        if any(n not in pyro.get_param_store() for n in bound.initial):  # cleared since
            bound, plan = self._bounds.renew(key, bind)
        return bound, plan, bound.batch(call)

    def _leaves(self, bound: PyroBound) -> dict[str, Tensor]:
        """The unconstrained parameters as the store has them."""
        stored = dict(pyro.get_param_store().named_parameters())
        missing = [n for n in bound.initial if n not in stored]
        if missing:
            raise BackendError(
                f"Parameters {missing} are not in Pyro's parameter store, where SVI looks for them; use "
                f"pyro.settings.set(module_local_params=False)."
            )
        for name, parameter in bound.modules.parameters.items():
            if stored[name] is not parameter:
                raise ProgramError(
                    f"Pyro's parameter store has another tensor under {name!r} than the module itself, which would "
                    f"stay untrained; call pyro.clear_param_store() before a module is used anew."
                )
        return {n: stored[n] for n in bound.initial}

    def _extras(self, plan: Plan, batch: Call) -> tuple[dict[str, Tensor], Own]:
        arrays = Call(tuple(a for a in batch.leaves if isinstance(a, Tensor)))
        states, own = initial_extras(self._objective, plan, arrays)
        if self._states is None:
            self._states = {s: torch.tensor(v) for s, v in states.items()}
        held: Own = {}
        for site, values in own.items():
            for name, value in values.items():
                pyro.param(_named(site, name), torch.tensor(value))
            stored = dict(pyro.get_param_store().named_parameters())
            held[site] = {name: stored[_named(site, name)] for name in values}
        return self._states, held


def _form(a: Any) -> Hashable:
    """What a program's structure may depend on in this argument: shapes, and settings themselves."""
    if isinstance(a, Tensor | np.ndarray):
        return tuple(a.shape), str(a.dtype)
    return a if isinstance(a, Hashable) else repr(a)


def _named(site: str, name: str) -> str:
    return f"ppl_lvm.{site}.{name}"
