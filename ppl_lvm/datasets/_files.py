"""Data of the user's own: files of rows, and functions that return them."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ppl_lvm import lookup
from ppl_lvm.datasets._base import Dataset, sequences, split
from ppl_lvm.errors import DataError

SUFFIXES = (".npy", ".npz", ".csv", ".parquet")


def load_file(path: Path, seed: int, missing: bool = False) -> Dataset:
    """Rows of a .npy, .npz, .csv or .parquet file."""
    if not lookup.is_file(path):
        raise DataError(f"There is no file {str(path)!r} to load data from; check the path.")
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]]
    readers = {".csv": partial(_read_csv, missing=missing), ".parquet": _read_parquet}
    arrays = readers.get(path.suffix.lower(), _read_numpy)(path)
    return _from_arrays(arrays, path.stem, str(path), f"Rows of the file {path.name}.", seed, missing)


def load_function(asked: str, seed: int, missing: bool = False) -> Dataset:
    """The data that `module:function` or `path.py:function` returns when it is called without arguments."""
    source, _, name = asked.rpartition(":")
    if source.endswith(".py"):
        if not lookup.is_file(Path(source)):
            raise DataError(f"There is no file {source!r} to load data from; check the path.")
        module: Any = lookup.load(Path(source), DataError)
    else:
        module = lookup.imported(source, DataError, f"Data {asked!r} were asked for")
    made = getattr(module, name, None)
    if not callable(made):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise DataError(f"{source} has no function {name!r} to make data. {lookup.valid(name, names, 'Functions')}")
    found = made()
    described = f"What {asked} returns."
    if isinstance(found, Dataset):
        return found
    if isinstance(found, Mapping):
        return _from_arrays({str(n): _as_rows(a) for n, a in found.items()}, name, asked, described, seed, missing)
    return _from_arrays({"rows": _as_rows(found)}, name, asked, described, seed, missing)


def _as_rows(found: Any) -> np.ndarray:
    if isinstance(found, list) and found and all(np.ndim(a) for a in found):
        return sequences(found) if len({np.shape(a) for a in found}) > 1 else np.asarray(found)
    if hasattr(found, "detach"):
        found = found.detach().cpu()
    return np.asarray(found)


def _from_arrays(
    arrays: Mapping[str, np.ndarray], name: str, where: str, description: str, seed: int, missing: bool
) -> Dataset:
    """Rows to be split, or a split that is there; `where` is named in errors."""
    licence = "as its owner gave it"
    if {"train", "test"} <= arrays.keys():
        train, test = (_checked(arrays[part], f"{part!r} in {where}", 1, missing) for part in ("train", "test"))
        if train.shape[1:] != test.shape[1:]:
            raise DataError(
                f"Rows of 'train' and 'test' in {where} differ in shape: {train.shape[1:]} and "
                f"{test.shape[1:]}; save rows of one shape in both."
            )
        train_labels, test_labels = (
            _checked_labels(arrays.get(f"{part}_labels"), len(rows), f"{part}_labels", where)
            for part, rows in (("train", train), ("test", test))
        )
        return Dataset(name, train, test, train_labels, test_labels, None, description, licence)
    row_names = [key for key in arrays if key != "labels"]
    if len(row_names) != 1:
        raise DataError(
            f"{where} holds the arrays {', '.join(map(repr, arrays)) or '(none)'}; save one array of rows "
            "(and perhaps 'labels'), or 'train' and 'test' (and perhaps 'train_labels' and 'test_labels')."
        )
    rows = _checked(arrays[row_names[0]], where, 2, missing)
    labels = _checked_labels(arrays.get("labels"), len(rows), "labels", where)
    return split(name, rows, labels, seed, description=description, licence=licence)


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise DataError(f"{path} needs pandas, which is not installed; run `pip install pandas pyarrow`.") from error
    try:
        frame = pandas.read_parquet(path)
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow, which is not installed; run `pip install pyarrow`.") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet file ({error}).") from error
    wrong = [str(c) for c, dtype in frame.dtypes.items() if getattr(dtype, "kind", "O") not in "biuf"]
    if wrong:
        raise DataError(f"Columns {', '.join(wrong)} of {path} hold no numbers; encode or drop them.")
    return {"rows": frame.to_numpy(dtype=float)}


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    # Unpickling runs code from the file, so arrays of Python objects are refused.
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return {"rows": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read as a NumPy file of numbers ({error}); write it with numpy.save or "
            "numpy.savez from arrays of a numeric dtype."
        ) from error


def _read_csv(path: Path, missing: bool = False) -> dict[str, np.ndarray]:
    try:
        reader = csv.reader(path.read_text(encoding="utf-8-sig").splitlines())
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as comma-separated text in UTF-8 ({error}).") from error
    if lines and not any(_is_number(cell) for cell in lines[0][1]):
        lines = lines[1:]  # a header
    width = len(lines[0][1]) if lines else 0
    for number, cells in lines:
        if len(cells) != width:
            raise DataError(f"Line {number} of {path} has {len(cells)} columns, the first row has {width}.")
        for column, cell in enumerate(cells, start=1):
            if not (_is_number(cell) or (missing and not cell.strip())):
                raise DataError(
                    f"Line {number}, column {column} of {path} is {cell!r}, which is no number; rows must "
                    "hold numbers only, after at most one line of column names."
                )
    rows = np.array([[float(cell.strip() or "nan") for cell in cells] for _, cells in lines])
    return {"rows": rows.reshape(len(lines), width)}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _checked(rows: np.ndarray, where: str, rows_at_least: int, missing: bool) -> np.ndarray:
    if rows.dtype == object and rows.ndim == 1 and all(np.ndim(a) for a in rows):
        flat = [_checked(np.asarray(a).reshape(len(a), -1), where, 1, missing) for a in rows]
        return sequences([a.reshape(np.shape(given)) for a, given in zip(flat, rows, strict=True)])
    if rows.dtype.kind not in "biuf":
        raise DataError(f"{where} has dtype {rows.dtype}; rows must hold real numbers.")
    if rows.ndim < 2:
        raise DataError(
            f"{where} has shape {rows.shape}; rows come first and at least one axis follows. "
            "For one number per row reshape to (rows, 1)."
        )
    if len(rows) < rows_at_least or rows.size == 0:
        raise DataError(f"{where} has shape {rows.shape}; it needs {rows_at_least} or more rows, none empty.")
    rows = rows.astype(np.float64)
    bad = np.argwhere(np.isinf(rows) if missing else ~np.isfinite(rows))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise DataError(
            f"{where} holds {len(bad)} values that are not finite, the first is {rows[first]} at index "
            f"{first} (counted from 0); remove or impute them first, or leave NaN out (missing)."
        )
    return rows


def _checked_labels(labels: np.ndarray | None, rows: int, name: str, where: str) -> np.ndarray | None:
    if labels is not None and (labels.shape != (rows,) or labels.dtype.kind not in "biu"):
        raise DataError(
            f"{name!r} in {where} has shape {labels.shape} and dtype {labels.dtype}; one integer for each of "
            f"the {rows} rows is needed."
        )
    return labels
