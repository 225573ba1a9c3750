"""A fit in stages: recipes one after the other, each from the parameters of the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ppl_lvm.checkpoint import Checkpoint, Stage
from ppl_lvm.errors import DataError, Interrupted
from ppl_lvm.posterior import Fit, State
from ppl_lvm.recipe import Recipe

STEPS = ("step", "validation_step", "hard_step", "skipped_step")


def in_stages(
    how: Recipe,
    once: Callable[..., Fit],
    start: Fit | Mapping[str, Any] | None,
    state: State | None,
    checkpoint: Checkpoint,
) -> Fit:
    """`once(recipe=stage, start=last)` for every stage that is not over; the last fit, with the history of all.

    Raises:
        DataError: a state was given, which belongs to one stage.
        Interrupted: with the history of all so far.
    """
    if state is not None:
        raise DataError(
            f"A state goes on inside one stage, and recipe {how.name!r} has {len(how.stages)}; fit the stage alone, "
            f"recipe=run.recipe.stages[-1] with state=run.state."
        )
    kept = checkpoint.of_stages(how.to_dict(), start)
    done = kept.done
    last = start if not done else None  # the state in the checkpoint has what a stage begins with
    for stage in how.stages[len(done) :]:
        try:
            last = once(recipe=stage, start=last, checkpoint=kept)
        except Interrupted as stop:
            kept.stage(stop.fit)
            raise stop.of(_whole(how, stop.fit, done)) from None
        kept.stage(last)
    assert isinstance(last, Fit)
    return _whole(how, last, done)


def _whole(how: Recipe, last: Fit, done: list[Stage]) -> Fit:
    return replace(
        last,
        recipe=how,
        history=_joined([stage.history for stage in done]),
        seconds=sum(stage.seconds for stage in done),
        messages=[f"stage {i}: {message}" for i, stage in enumerate(done) for message in stage.messages],
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
