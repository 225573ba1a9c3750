"""A progress bar that is quiet where the output is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


def wanted(shown: bool | None) -> bool:
    """Whether to show progress; None: where standard error is a terminal."""
    return sys.stderr.isatty() if shown is None else shown


@contextlib.contextmanager
def bar(
    title: str, steps: int, done: int, shown: bool | None
) -> Iterator[Callable[[int, float, float | None], None]]:
    """Yields `advance(steps, loss, validation)`. `shown = None` shows a bar where standard error is a terminal."""
    if not wanted(shown) or done >= steps:
        yield lambda _steps, _loss, _validation: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}{task.fields[validation]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=steps, completed=done, loss="...", validation="")

        def advance(n: int, loss: float, validation: float | None) -> None:
            held_out = "" if validation is None else f" validation {validation:.3f}"
            progress.update(task, advance=n, loss=f"{loss:.3f}", validation=held_out)

        yield advance
