"""Tables of several runs of one program: put together, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_lvm.backends.structure import VARIANT
from ppl_lvm.draws import Site

_ARRAYS = (
    *("value", "log_p", "log_q", "log_q_frozen", "log_p_full", "log_q_full"),
    *("log_q_drawn", "log_q_inner", "user_scale", "guide_scale"),
    *VARIANT,
)


def joined(tables: list[dict[str, Site]], axis: int) -> dict[str, Site]:
    """The tables of several runs as one, along the outer axis (0) or the draws axis (1), which global sites lack."""
    first = tables[0]
    if len(tables) == 1:
        return first

    def along(arrays: list[Any]) -> Any:
        one = arrays[0]
        if not isinstance(one, Tensor) or not one.dim():
            return one
        if all(_same(a, one) and a.stride(axis) == 0 for a in arrays):
            # Data, which all draws look at: as they are, they take no memory.
            size = sum(a.shape[axis] for a in arrays)
            return one.narrow(axis, 0, 1).expand(*one.shape[:axis], size, *one.shape[axis + 1 :])
        return torch.cat(arrays, axis)

    def join(name: str, site: Site) -> Site:
        if axis == 1 and not site.local:
            return site
        found = [t[name] for t in tables]
        extra = {label: along([s.extra[label] for s in found]) for label in site.extra}
        return replace(site, extra=extra, **{label: along([getattr(s, label) for s in found]) for label in _ARRAYS})

    return {name: join(name, site) for name, site in first.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two arrays lie at one place in memory, the same way."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape[2:] == b.shape[2:]


def equal(one: Mapping[str, Site], other: Mapping[str, Site]) -> bool:
    """Whether two tables hold the same densities, to rounding."""

    def close(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        tolerance = 1e-3 if a.dtype == torch.float32 else 1e-8
        finite = b[b.isfinite()].abs()
        size = max(float(finite.max()), 1.0) if finite.numel() else 1.0
        return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)

    return all(close(s.log_p, other[n].log_p) and close(s.log_q, other[n].log_q) for n, s in one.items())
