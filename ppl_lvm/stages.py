"""A fit in stages: recipes one after the other, each from the parameters of the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ppl_lvm.errors import DataError
from ppl_lvm.posterior import Fit, State
from ppl_lvm.recipe import Recipe

STEPS = ("step", "validation_step", "hard_step", "skipped_step")


def in_stages(
    how: Recipe, once: Callable[..., Fit], start: Fit | Mapping[str, Any] | None, state: State | None
) -> Fit:
    """`once(recipe=stage, start=last)` for every stage; the last fit, with the history of all.

    Raises:
        DataError: a state was given, which belongs to one stage.
    """
    if state is not None:
        raise DataError(
            f"A state goes on inside one stage, and recipe {how.name!r} has {len(how.stages)}; fit the stage alone, "
            f"recipe=run.recipe.stages[-1] with state=run.state."
        )
    runs: list[Fit] = []
    for stage in how.stages:
        runs.append(once(recipe=stage, start=runs[-1] if runs else start))
    return replace(
        runs[-1],
        recipe=how,
        history=_joined([run.history for run in runs]),
        seconds=sum(run.seconds for run in runs),
        messages=[f"stage {i}: {message}" for i, run in enumerate(runs) for message in run.messages],
    )


def _joined(histories: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Steps count on from stage to stage; "stage" says of which each step is."""
    names = dict.fromkeys(name for history in histories for name in history)
    first = np.cumsum([0, *(len(history["loss"]) for history in histories)])
    shifted = [
        {name: values + offset if name in STEPS else values for name, values in history.items()}
        for history, offset in zip(histories, first, strict=False)
    ]
    parts = {name: [history[name] for history in shifted if name in history] for name in names}
    stage = [np.full(len(history["loss"]), i) for i, history in enumerate(histories)]
    return {name: np.concatenate(found) for name, found in parts.items()} | {"stage": np.concatenate(stage)}
