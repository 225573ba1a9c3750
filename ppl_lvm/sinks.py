"""Where draws go that are made piece by piece: arrays in memory, or a netCDF file that ArviZ opens."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppl_lvm.errors import DataError
from ppl_lvm.to_arviz import attribute, stored_dims, stored_name

CHUNK_BYTES = 2**18
"""Size of the pieces in which a file holds a variable."""


class Arrays:
    """Arrays `[draws, rows, ...]` in memory, made whole when the first piece of them comes."""

    def __init__(self, draws: int, rows: int) -> None:
        self.draws, self.rows = draws, rows
        self.of: dict[tuple[str, str], np.ndarray] = {}

    def put(self, group: str, name: str, piece: np.ndarray, draw: int, row: int) -> None:
        """A piece `[draws, rows, ...]` that begins at this draw and row; it takes the place of what was there."""
        if (group, name) not in self.of:
            self.of[group, name] = np.empty((self.draws, self.rows, *piece.shape[2:]), piece.dtype)
        self.of[group, name][draw : draw + piece.shape[0], row : row + piece.shape[1]] = piece

    def group(self, group: str) -> dict[str, np.ndarray]:
        return {n: a for (g, n), a in self.of.items() if g == group}


class NetCDF:
    """A netCDF file with ArviZ's groups, one chain. It has its name when it is whole and no other before.

    Args:
        path: of the file; one that is there is replaced.
        draws: how many.
        rows: how many, None where that is not known before.
        row_dim: the name of their dimension.
        dims: variable -> names of the dimensions after draws.
        attributes: of the file.
    """

    def __init__(
        self,
        path: str | Path,
        draws: int,
        rows: int | None,
        row_dim: str,
        dims: Mapping[str, Sequence[str]],
        attributes: Mapping[str, Any],
    ) -> None:
        self.path, self.draws, self._rows = Path(path), draws, rows
        names = [*dims, "row_log_p", "row_log_q", "row_log_weight"]
        self._dims = stored_dims(names, {**dict.fromkeys(names[len(dims) :], (row_dim,)), **dims})
        self._row_dim = self._dims["row_log_p"][0]
        self._attributes = attributes
        self._there = 0
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def __enter__(self) -> NetCDF:
        import h5netcdf

        try:
            self._file = h5netcdf.File(self._partial, "w")
        except OSError as error:
            raise DataError(f"{self.path} cannot be written ({error}); give a path in a folder that can be.") from error
        self._file.attrs.update({n: attribute(v) for n, v in self._attributes.items()})
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
                self._end()
            if error is None:
                os.replace(self._partial, self.path)
        except OSError as cause:
            raise DataError(f"{self.path} could not be written to its end ({cause}).") from cause
        finally:
            self._partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"{self.path} could not be written to its end ({error}).") from error

    def _end(self) -> None:
        for group in self._file.groups.values():
            if self._row_dim in group.dimensions:
                rows = np.arange(self._there)
                self._variable(group, self._row_dim, (self._row_dim,), rows.dtype)[...] = rows
        self._file.close()

    def grow(self, rows: int) -> None:
        """There are so many rows more."""
        self._there += rows
        if self._rows is None:
            for group in self._file.groups.values():
                group.resize_dimension(self._row_dim, self._there)

    def put(self, group: str, name: str, piece: np.ndarray, draw: int, row: int | None) -> None:
        """A piece `[draws, rows, ...]` that begins at this draw and row; `row = None`: `[draws, ...]`, for all rows."""
        where = slice(draw, draw + piece.shape[0])
        rows = () if row is None else (slice(row, row + piece.shape[1]),)
        self._of(group, name, piece)[(0, where, *rows)] = piece

    def _of(self, group: str, name: str, piece: np.ndarray) -> Any:
        if group not in self._file.groups:
            held = self._file.create_group(group)
            held.dimensions = {"chain": 1, "draw": self.draws}
            for dim, size in (("chain", 1), ("draw", self.draws)):
                self._variable(held, dim, (dim,), np.dtype(int))[...] = np.arange(size)
        held, stored = self._file.groups[group], stored_name(name)
        if stored in held.variables:
            return held.variables[stored]
        own = self._dims.get(stored, [])
        named = [*own, *(f"{stored}_dim_{i}" for i in range(piece.ndim - 1 - len(own)))]
        for dim, size in zip(named, piece.shape[1:], strict=True):
            if dim not in held.dimensions:
                held.dimensions[dim] = self._size(dim, size)
            if dim == self._row_dim and self._rows is None:
                held.resize_dimension(dim, self._there)
        return self._variable(held, stored, ("chain", "draw", *named), piece.dtype)

    def _size(self, dim: str, size: int) -> int | None:
        return self._rows if dim == self._row_dim else size

    def _variable(self, group: Any, name: str, dims: Sequence[str], dtype: np.dtype[Any]) -> Any:
        sizes = [group.dimensions[d].size for d in dims]
        if self._row_dim not in dims:
            return group.create_variable(name, dims, dtype)
        # Pieces are of some draws and some rows, whichever way they are read later.
        at, tail = dims.index(self._row_dim), math.prod(s for d, s in zip(dims, sizes, strict=True) if d not in
                                                        ("chain", "draw", self._row_dim))
        draws = min(sizes[dims.index("draw")], 64) if "draw" in dims else 1
        rows = max(1, CHUNK_BYTES // (dtype.itemsize * draws * max(1, tail)))
        chunks = [draws if d == "draw" else s for d, s in zip(dims, sizes, strict=True)]
        chunks[at] = rows if self._rows is None else max(1, min(rows, self._rows))
        return group.create_variable(name, dims, dtype, chunks=tuple(chunks))
