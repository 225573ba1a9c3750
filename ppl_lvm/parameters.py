"""Which optimiser moves which parameter, which stay as they are, and what values they start from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_lvm import lookup
from ppl_lvm.algorithm import Turn, best_pattern
from ppl_lvm.backends.base import check_value
from ppl_lvm.backends.training import Descent
from ppl_lvm.errors import DataError, ProgramError, RecipeError

if TYPE_CHECKING:
    from ppl_lvm.posterior import Fit
    from ppl_lvm.recipe import Recipe

GROUPS = ("model", "guide")
Groups = Mapping[str, Collection[str]]
"""Parameter -> where it is used, of "model" and "guide"; neither for those of estimators and objectives themselves."""


def group_of(used: Collection[str]) -> str:
    """A parameter that model and guide share is the model's; what is in neither serves the guide's gradient."""
    return "model" if "model" in used else "guide"


def optimizer_of(patterns: Iterable[str], groups: Groups) -> dict[str, str]:
    """The pattern of every parameter's optimiser: a name, a pattern, a group, "*", in this order.

    Raises:
        RecipeError: a pattern matches no parameter, or a parameter no pattern.

    Example:
        >>> used = {"w": ["model"], "q.loc": ["guide"], "q.scale": ["guide"]}
        >>> optimizer_of(["*", "guide", "q.s*"], used)
        {'w': '*', 'q.loc': 'guide', 'q.scale': 'q.s*'}
    """
    patterns = list(patterns)
    for pattern in patterns:
        _check_used(pattern, groups, f"optimizer.{pattern}")
    chosen: dict[str, str] = {}
    for name, used in groups.items():
        named = best_pattern([p for p in patterns if p != "*"], name)
        rest = [p for p in (group_of(used), "*") if p in patterns]
        if named is None and not rest:
            raise RecipeError(
                f"Parameter {name!r} has no optimizer: patterns are {patterns}. Add one for it, or '*' for all others."
            )
        chosen[name] = named if named is not None else rest[0]
    return chosen


def descent(how: Recipe, groups: Groups) -> Descent:
    """The optimisers of a recipe, and which of them moves which parameter."""
    if not any(groups.values()):
        raise ProgramError("The program has no parameters, so there is nothing to fit.")
    single = not isinstance(how.optimizer, dict)
    owner = {pattern: "optimizer" if single else f"optimizer.{pattern}" for pattern in how.optimizers}
    stay = frozen(how.freeze, groups)
    chosen = optimizer_of(how.optimizers, groups)
    assert how.objective is not None
    return Descent(
        {owner[p]: o for p, o in how.optimizers.items()},
        {n: owner[p] for n, p in chosen.items() if n not in stay},
        {n: group_of(used) for n, used in groups.items()},
        turns({str(group): steps for group, steps in (how.alternate or {}).items()}),
        how.objective.model_first(),
    )


def turns(blocks: Mapping[str, int]) -> dict[str, Turn]:
    """When each group moves, from the lengths of its blocks in their order."""
    period = sum(blocks.values())
    first = dict(zip(blocks, accumulate(blocks.values(), initial=0), strict=False))
    return {group: Turn(first[group], length, period) for group, length in blocks.items()}


def frozen(patterns: Sequence[str], groups: Groups) -> set[str]:
    """The parameters that stay as they are.

    Raises:
        RecipeError: a pattern matches no parameter, or nothing is left to train.
    """
    for pattern in patterns:
        _check_used(pattern, groups, "freeze")
    found = {name for name, used in groups.items() if any(_matches(p, name, used) for p in patterns)}
    if patterns and not any(used for name, used in groups.items() if name not in found):
        raise RecipeError(
            f"freeze = {list(patterns)} leaves no parameter of the program to train; it has {_listed(groups)}."
        )
    return found


def _matches(pattern: str, name: str, used: Collection[str]) -> bool:
    return pattern == name or fnmatchcase(name, pattern) or pattern == group_of(used)


def _check_used(pattern: str, groups: Groups, where: str) -> None:
    if pattern != "*" and not any(_matches(pattern, name, used) for name, used in groups.items()):
        raise RecipeError(
            f"{where}: {pattern!r} matches no parameter. {lookup.valid(pattern, groups, 'Parameters')} Groups: "
            f"{', '.join(GROUPS)}."
        )


def _listed(groups: Groups) -> str:
    return ", ".join(sorted(name for name, used in groups.items() if used))


def starting_values(
    initial: Mapping[str, Any], start: Fit | Mapping[str, Any], bound: Any, messages: list[str]
) -> dict[str, Any]:
    """Unconstrained initial values with those of the same names replaced by constrained ones, or by a fit's.

    Raises:
        DataError: nothing matches, or a value has another shape than its parameter or is outside its support.
    """
    if isinstance(start, Mapping):
        values, exact = start, False
    else:
        known = start._bound
        exact = (known.name, known.program, known.dtype) == (bound.name, bound.program, bound.dtype)
        # A fit of the same program goes on from the very bits: a transform and back would round.
        values = start._trained if exact else start.params
    taken = [name for name in initial if name in values]
    if not taken:
        raise DataError(
            f"start: none of {sorted(values)} is a parameter of the program, whose parameters are {sorted(initial)}."
        )
    if exact:
        for name in taken:
            check_value(name, values[name], np.shape(initial[name]), lambda: True)
    found = {name: values[name] if exact else bound.unconstrain(name, values[name]) for name in taken}
    rest = {"initial as ever": set(initial) - set(taken), "not used": set(values) - set(taken)}
    message = f"start: took {', '.join(taken)}"
    message += "".join(f"; {what}: {', '.join(sorted(names))}" for what, names in rest.items() if names)
    if message not in messages:
        messages.append(message)
    return {**initial, **found}
