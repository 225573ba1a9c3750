"""What a training step promises: a trainer, what it moves, the numbers it is given, what it records and keeps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ppl_lvm.algorithm import Algorithm, Estimator, Objective, Schedule, Turn
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.structure import Plan, Structure
from ppl_lvm.errors import BackendError, ProgramError, RecipeError
from ppl_lvm.ops import Array
from ppl_lvm.process import TURN

Numbers = Mapping[str, Any]
"""Every number that a schedule may move, by dotted name; the compiled step takes them as inputs."""


@dataclass(frozen=True)
class Descent:
    """Optimisers by their place in the recipe, and the place of every trained parameter's."""

    optimizers: Mapping[str, Algorithm]
    """ "optimizer" or "optimizer.<pattern>" -> name and options."""
    of: Mapping[str, str]
    """Parameter -> place; those that stay as they are have none."""
    groups: Mapping[str, str]
    """Parameter -> "model" or "guide"."""
    turns: Mapping[str, Turn]
    """When each group moves, where they take turns."""
    model_first: bool
    """The guide's gradient is taken at the model's new parameters, on the same draws."""

    @property
    def units(self) -> dict[str, Unit]:
        """Optimisers with parameters, by name; where groups move apart, each place has one for each."""
        apart = bool(self.turns) or self.model_first
        found: dict[str, Unit] = {}
        for place, optimizer in self.optimizers.items():
            for group in ("model", "guide") if apart else (None,):
                mine = (n for n, p in self.of.items() if p == place and group in (None, self.groups[n]))
                if names := sorted(mine):
                    found[place if group is None else f"{place}|{group}"] = Unit(place, optimizer, names, group)
        return found

    def static_key(self) -> Hashable:
        return (
            tuple(sorted(self.of.items())),
            tuple((p, _static(o)) for p, o in self.optimizers.items()),
            tuple(self.turns),
            self.model_first,
        )


@dataclass(frozen=True)
class Unit:
    """Parameters that one optimiser moves together."""

    place: str
    optimizer: Algorithm
    names: list[str]
    group: str | None
    """The group that all of them are of, where groups move apart."""

    @property
    def natural(self) -> bool:
        """Whether gradients are turned into displacements by the Fisher information (see `natural`)."""
        return self.optimizer.name == "natural"  # type: ignore[attr-defined]

    @property
    def turn(self) -> str:
        """The number that says whether it is this group's turn; there is none where groups take none."""
        return f"turn.{self.group}"


def numbers_of(
    objective: Objective,
    plan: Plan,
    optimizers: Mapping[str, Algorithm],
    turns: Mapping[str, Turn] | None = None,
    dtype: str = "float64",
) -> dict[str, float | Schedule | Turn]:
    """The numbers of a recipe: "objective.beta", "estimator.z.temperature", "optimizer.learning_rate", "turn.guide".

    Raises:
        RecipeError: one would become infinite in `dtype`.
    """
    owners = {"objective": objective, **optimizers}
    owners |= {f"estimator.{site}": e for site, e in plan.estimators.items()}
    numbers = {f"{owner}.{name}": v for owner, a in owners.items() for name, v in a.numbers().items()}
    most = float(np.finfo(dtype).max)
    for name, v in numbers.items():
        far = [n for n in ((v.start, v.end) if isinstance(v, Schedule) else (v,)) if most < abs(n) < np.inf]
        if far:
            raise RecipeError(f"{name} is {far[0]:g}, which is out of the range of {dtype}; give a smaller number.")
    return {**numbers, **{f"turn.{group}": turn for group, turn in (turns or {}).items()}}


def with_numbers(objective: Objective, plan: Plan, numbers: Numbers) -> tuple[Objective, Plan]:
    """Objective and plan with these numbers in place of their own."""

    def of(owner: str) -> dict[str, Any]:
        return {n.removeprefix(owner + "."): v for n, v in numbers.items() if n.rpartition(".")[0] == owner}

    def placed(s: str, e: Estimator) -> Estimator:
        return e.with_numbers({n: v for n, v in of(f"estimator.{s}").items() if n in e.numbers()})

    mine = of("objective")
    if mine:
        objective = objective.with_numbers(mine)
    if any(n.startswith("estimator.") for n in numbers):
        plan = replace(plan, estimators={s: placed(s, e) for s, e in plan.estimators.items()})
    return objective, plan


def static_key(objective: Objective, plan: Plan) -> Hashable:
    """What a compiled step depends on besides shapes: everything of objective and estimators but their numbers."""
    estimators = tuple((s, _static(e)) for s, e in plan.estimators.items())
    return _static(objective), plan.requests, plan.kl, estimators, plan.marginal


def _static(algorithm: Algorithm) -> Hashable:
    return type(algorithm), algorithm.with_numbers(dict.fromkeys(algorithm.numbers(), 0.0))


class Steps:
    """Compiled steps, the most recently used ones kept; `traces` counts how often a program was traced into one."""

    def __init__(self, size: int = 32) -> None:
        self.traces = 0
        self._size = size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, build: Callable[[], Any]) -> Any:
        with TURN:
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                self._kept[key] = build()
                while len(self._kept) > self._size:
                    self._kept.popitem(last=False)
            return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def renew(self, key: Hashable, build: Callable[[], Any]) -> Any:
        with TURN:
            self._kept.pop(key, None)
            return self.get(key, build)


SKIPPED = "skipped"
"""`skipped_in_a_row`, of a trainer's tree, of its packed state and of its records."""

RECORDS = ("loss", "gradient_norm", SKIPPED)
"""What a step records: the loss per row, the norm of all trained gradients before clipping, and `skipped_in_a_row`."""

MOST_SKIPPED = "loop.most_skipped"
"""The number of a step that says how many in a row may be skipped; 0 stops at the first that is not finite."""


def skipped_in_a_row(xp: Any, before: Array, most: Array, loss: Array, norm: Array) -> Array:
    """How many steps in a row, up to this one, had a loss or a gradient that is not finite; none moved anything.

    Beyond `most` it stays what it is, so nothing moves any more: the state after a chunk is that before the first of
    them, and no step waits to be told. `xp` is torch or numpy.
    """
    here = xp.where(xp.isfinite(loss + norm), 0.0 * before, before + 1.0)
    return xp.where(before > most, before, here)


def rows_of(sites: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values and densities of a table's sites."""
    return {n: {"value": s.value, "log_p": s.log_p, "log_q": s.log_q} for n, s in sites.items()}


@dataclass(frozen=True)
class Again:
    """A step that was run once more, outside of the compiled loop and with its own noise."""

    batch: Call
    table: Mapping[str, Mapping[str, Any]]
    """Site -> "value", "log_p" and "log_q", as in the table of a run."""
    gradient: Mapping[str, np.ndarray]
    """Gradients of the parameters; of a network that is one parameter, end to end."""


class Trainer(Protocol):
    """Optimiser steps in chunks, of R runs at once that differ in seed, initial parameters and order of rows.

    A tree holds all state of all runs: parameters, optimisers, estimators' state and parameters.
    """

    mode: str
    notes: list[str]
    fused: float
    """How much less memory a step may take than `peak` says, where operations are fused."""

    def initial(self) -> Any: ...

    def run(
        self, tree: Any, data: Call, index: np.ndarray | None, numbers: Mapping[str, np.ndarray], start: int, n: int
    ) -> tuple[Any, Mapping[str, Any]]:
        """Steps `start .. start + n - 1`; `index [R, C, B]` and `numbers [C]` may be longer.

        Gives RECORDS, each `[R, n]`.
        """

    def loss(
        self,
        tree: Any,
        bound: Any,
        batch: Call,
        key: Any,
        numbers: Numbers,
        rows: int | None,
        plan: Plan | None = None,
    ) -> Any:
        """The objective's loss per row, `[R]`, on a batch of `bound`, without gradients; `rows` is N.

        `plan` is another one than the fit's; numbers that it has no place for are left aside.
        """

    def again(
        self,
        tree: Any,
        data: Call,
        index: np.ndarray | None,
        numbers: Mapping[str, np.ndarray],
        step: int,
        i: int,
        run: int = 0,
    ) -> Again:
        """Step number `step`, whose numbers and rows are at `i`, once more; nothing moves."""

    def peak(self, tree: Any, batch: Call, numbers: Numbers) -> int | None:
        """Bytes that a step takes beside parameters and data, as far as shapes tell; nothing is run."""

    def params(self, tree: Any, run: int = 0) -> Mapping[str, Any]: ...

    def pack(self, tree: Any, run: int = 0) -> dict[str, np.ndarray]:
        """All state of one run as arrays that nothing else changes."""

    def unpack(self, *runs: Mapping[str, np.ndarray]) -> Any:
        """A tree of these runs, each as `pack` gave it."""

    def params_of(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """The parameters among what `pack` gave."""


def check_state(found: Mapping[str, np.ndarray], needed: Mapping[str, np.ndarray], what: str = "state") -> None:
    """Refuses saved arrays that are not those of this fit."""
    kinds = [{n: (a.dtype.name, a.shape) for n, a in arrays.items()} for arrays in (found, needed)]
    wrong = sorted(n for n in {*found, *needed} if kinds[0].get(n) != kinds[1].get(n))
    if wrong:
        pair = (known.get(wrong[0]) for known in kinds)
        had, wants = ("not there" if kind is None else f"{kind[0]} of shape {kind[1]}" for kind in pair)
        raise BackendError(
            f"The {what} does not fit: missing, unknown or of another shape or dtype are {wrong[:5]} ({wrong[0]!r} is "
            f"{had}, and should be {wants}); continue with the same program, recipe, backend and dtype."
        )


def own_name(owner: str, name: str) -> str:
    """What a parameter of an estimator or of the objective is called: "estimator.z.weight", "objective.log_z"."""
    return f"objective.{name}" if owner == "objective" else f"estimator.{owner}.{name}"


def merged(params: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters of the program and of the algorithms under one name each."""
    return {**params, **{own_name(s, n): p for s, ps in own.items() for n, p in ps.items()}}


def parameter_groups(
    structure: Structure, objective: Objective, plan: Plan, batch: Call
) -> dict[str, frozenset[str]]:
    """Where every parameter is used, those of the algorithms themselves nowhere."""
    own = merged({}, initial_extras(objective, plan, batch)[1])
    both = sorted(set(own) & set(structure.groups))
    if both:
        raise ProgramError(f"Parameters {both} are called like those of the objective or of an estimator; rename them.")
    return {**structure.groups, **dict.fromkeys(own, frozenset[str]())}


def initial_extras(
    objective: Objective, plan: Plan, batch: Call
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """States of the estimators, and parameters of the estimators and the objective themselves, as plain numbers."""
    features = int(np.prod(batch.leaves[0].shape[1:], dtype=int)) if batch.leaves else 0
    states = {s: e.initial_state() for s, e in plan.estimators.items()}
    own = {s: e.initial_own(features, plan.weights.get(s, 0)) for s, e in plan.estimators.items()}
    own["objective"] = objective.initial_own(features)
    return (
        {s: v for s, v in states.items() if v is not None},
        {s: v for s, v in own.items() if v},
    )
