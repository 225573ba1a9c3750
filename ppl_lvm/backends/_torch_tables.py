"""Tables of several runs of one program: put together, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_lvm.backends.structure import VARIANT
from ppl_lvm.draws import Site
from ppl_lvm.errors import ProgramError

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
        found, known = [t[name] for t in tables], dict[int, Any]()

        def once(label: str) -> Any:
            """Without inner plates a density and its sum over them are one array."""
            arrays = [getattr(s, label) for s in found]
            if id(arrays[0]) not in known:
                known[id(arrays[0])] = along(arrays)
            return known[id(arrays[0])]

        extra = {label: along([s.extra[label] for s in found]) for label in site.extra}
        return replace(site, extra=extra, **{label: once(label) for label in _ARRAYS})

    return {name: join(name, site) for name, site in first.items()}


class _NotKept:
    """In the place of a site's values that were let go."""

    def __init__(self, site: str) -> None:
        self._site = site

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ProgramError(
            f"The objective looks at the values of site {self._site!r}, which are not kept where draws run in chunks; "
            f"add 'values' to what its `requests` returns, or leave `chunk` out."
        )

    __getattr__ = __getitem__ = __len__ = __iter__ = __bool__ = __float__ = __array__ = __torch_function__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse
    __matmul__ = __rmatmul__ = __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


def without_values(table: Mapping[str, Site]) -> dict[str, Site]:
    """The table, whose values raise ProgramError where something looks at them."""
    return {name: replace(site, value=_NotKept(name)) for name, site in table.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two arrays lie at one place in memory, the same way."""
    # By the storage, as tensors that only have shapes have no address.
    one, other = ((x.untyped_storage()._cdata, x.storage_offset(), x.stride(), x.shape[2:]) for x in (a, b))
    return one == other


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
