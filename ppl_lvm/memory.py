"""How much memory work may take, and what is said where it does not fit."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ppl_lvm.errors import DataError, TooLargeError, first_line

VARIABLE = "PPL_LVM_MEMORY"
"""Environment variable: bytes that one piece of work may take at once, "500MB", "4 GB"."""

SHARE = 4
"""Without it, a piece of work takes at most one part in four of what the process may use."""

EASY = 0.8
"""What a step is predicted to take may be this much of all memory without a word."""

MOST_BYTES = 512
"""Bytes that a number of a row takes at most in a step, in programs that need no measuring."""

SMALLER = "Ask for fewer draws, a smaller batch_size, or chunk = 1 to take draws one at a time."

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def limit(device: int | None = None) -> int:
    """Bytes that one piece of work may take at once; `device` is the memory of one that is not the machine itself.

    What is free at the moment does not enter: the noise of draws depends on how they are cut, and the same call should
    give the same bits.

    Raises:
        DataError: PPL_LVM_MEMORY is no number of bytes.
    """
    asked = os.environ.get(VARIABLE)
    return parsed(asked) if asked else (machine() if device is None else device) // SHARE


def parsed(text: str) -> int:
    """Bytes of "500MB" or "4 GB".

    Raises:
        DataError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", text.upper())
    unit = None if found is None else found[2] if found[2].endswith("B") or not found[2] else found[2] + "B"
    if found is None or unit not in _UNITS or float(found[1]) * _UNITS[unit] < 1:
        raise DataError(f"{VARIABLE} is {text!r}; give a number of bytes, as in '500MB' or '4GB'.")
    return int(float(found[1]) * _UNITS[unit])


def machine() -> int:
    """Bytes that this process may use: memory of the machine, or less where a limit is set for it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [2**33]
    for path in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    with contextlib.suppress(ImportError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            # Of addresses, most of which libraries reserve and never touch; what they have is not there for us.
            found.append(max(soft - _addresses(), 2**20))
    return min(found)


def _addresses() -> int:
    """Bytes of addresses that this process has."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def said(size: float) -> str:
    """A number of bytes for people."""
    unit = next((u for u in ("TB", "GB", "MB", "KB") if size >= _UNITS[u]), "B")
    return f"{size / _UNITS[unit]:.3g} {unit}"


def foretold(library: Any, trainer: Any, tree: Any, batch: Any, numbers: Mapping[str, float], plan: Any) -> list[str]:
    """What to tell of the memory that a step is going to take, where that may be too much; `batch` are its rows.

    Raises:
        TooLargeError: it cannot fit.
    """
    device = library.device_memory()
    there, (rows, width) = device or machine(), _shape(batch)
    runs = plan.K * plan.M
    if runs * rows * width * MOST_BYTES < there // 2:
        return []
    needed = trainer.peak(tree, batch, numbers)
    if needed is None or needed < EASY * there:
        return []
    share = (EASY - 0.1) * there / needed  # a little less, as some of it does not shrink
    ways = [f"draws = {int(plan.K * share)}"] if plan.K * share >= 1 and plan.K > 1 else []
    ways += [f"batch_size = {int(rows * share)}"] if rows * share >= 1 else []
    ways += ["chunk = 1 to 10 draws at a time"] if plan.K > 10 and plan.chunk is None else []
    what = f"A step with {runs:,} draws of {rows:,} rows takes up to {said(needed)}, and the memory is {said(there)}"
    way = f"; {' or '.join(ways)} would fit" if ways else ""
    if needed > trainer.fused * there:
        raise TooLargeError(f"{what}{way}.")
    return [f"memory: {what[0].lower()}{what[1:]}{way}"]


def of_step(library: Any, plan: Any, rows: int) -> contextlib.AbstractContextManager[None]:
    """Memory that runs out in a step is an error of ours."""
    what = f"A step of {plan.K * plan.M:,} draws of {rows:,} rows"
    return told(library, what, SMALLER)


def _shape(batch: Any) -> tuple[int, int]:
    """Rows, and numbers in a row."""
    leaves = [a for a in batch.leaves if len(a.shape)]
    return max((len(a) for a in leaves), default=1), sum(math.prod(a.shape[1:]) for a in leaves) or 1


@contextlib.contextmanager
def told(library: Any, what: str, way: str) -> Iterator[None]:
    """Memory that runs out in this block is an error of ours: `what` did not fit, and `way` is what to do.

    Raises:
        TooLargeError: it ran out.
    """
    try:
        yield
    except Exception as error:
        if not library.out_of_memory(error):
            raise
        raise TooLargeError(f"{what} does not fit in memory ({first_line(error)}). {way}") from error
