"""Data to fit: what ships with a dependency, what is generated, the user's own files; all split in two."""

import csv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppl_lvm import lookup
from ppl_lvm.errors import DataError

TEST_FRACTION = 0.2
SUFFIXES = (".npy", ".npz", ".csv")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to fit and rows held out: `train` and `test` are float64 arrays [rows, ...], rows first.

    `train_labels` and `test_labels` are integer arrays [rows] or None; no program sees them, they only colour
    pictures. `image_shape` is (height, width) when a row is a flattened grey-level image.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None
    test_labels: np.ndarray | None
    image_shape: tuple[int, int] | None
    description: str
    licence: str


def load(name: str | Path, seed: int = 0) -> Dataset:
    """Load a data set by name, or the rows of a .npy, .npz or .csv file; `seed` fixes which are held out.

    A file holds rows first and numbers only; a fifth of its rows, drawn by `seed`, is held out. An .npz file
    holds one array of rows and perhaps `labels`, or `train` and `test` (kept as they are) and perhaps
    `train_labels` and `test_labels`.

    Raises:
        DataError: an unknown name, a missing file, values that are no finite numbers, arrays without at
            least two rows and two axes, labels that do not fit.

    Example:
        >>> load("digits").train.shape
        (1437, 64)
    """
    if str(name).lower().endswith(SUFFIXES):
        return _load_file(Path(name), seed)
    loader = _LOADERS.get(str(name))
    if loader is None:
        raise DataError(
            f"Unknown data set {str(name)!r}. {lookup.valid(str(name), _LOADERS, 'Data sets')} "
            f"Data of your own are given by the path of a {', '.join(SUFFIXES)} file."
        )
    return loader(seed)


def datasets() -> dict[str, str]:
    """Names that `load` takes, each with one line about the data.

    Example:
        >>> list(datasets())
        ['digits', 'linear_gaussian']
    """
    return {name: (loader.__doc__ or "").partition("\n")[0] for name, loader in _LOADERS.items()}


def _digits(seed: int) -> Dataset:
    """1,797 handwritten digits, 8 x 8 grey levels 0 to 16, flattened to 64 (ships with scikit-learn)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError(
            "The data set 'digits' comes with scikit-learn, which is not installed; "
            "run `pip install scikit-learn`."
        ) from error
    bunch = load_digits()
    # Integer values on purpose: a level counts the black pixels of a 4 x 4 cell, so Binomial(16) fits it.
    rows = np.asarray(bunch.data, dtype=np.float64)
    return _split(
        "digits",
        rows,
        np.asarray(bunch.target, dtype=np.int64),
        seed,
        image_shape=(8, 8),
        description="Optical recognition of handwritten digits (Alpaydin and Kaynak, 1998, "
        "doi:10.24432/C50P49), the test part, as scikit-learn ships it.",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
    )


def _linear_gaussian(seed: int) -> Dataset:
    """1,000 rows of 10 numbers from a random factor model with 3 factors, x = W z + b + 0.5 e (generated)."""
    rng = np.random.default_rng(seed)
    loadings, offset = rng.normal(size=(10, 3)), rng.normal(size=10)
    rows = rng.normal(size=(1000, 3)) @ loadings.T + offset + 0.5 * rng.normal(size=(1000, 10))
    return _split(
        "linear_gaussian",
        rows,
        None,
        seed,
        description="Rows x = W z + b + 0.5 e, with z of 3 and e of 10 standard normal entries; the entries "
        "of W and b are standard normal too, drawn from the seed.",
        licence="CC0-1.0 (generated)",
    )


_LOADERS: dict[str, Callable[[int], Dataset]] = {"digits": _digits, "linear_gaussian": _linear_gaussian}


def _split(
    name: str,
    rows: np.ndarray,
    labels: np.ndarray | None,
    seed: int,
    *,
    description: str,
    licence: str,
    image_shape: tuple[int, int] | None = None,
) -> Dataset:
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = int(np.ceil(TEST_FRACTION * len(rows)))
    train, test = order[held_out:], order[:held_out]
    return Dataset(
        name=name,
        train=rows[train],
        test=rows[test],
        train_labels=None if labels is None else labels[train],
        test_labels=None if labels is None else labels[test],
        image_shape=image_shape,
        description=description,
        licence=licence,
    )


def _load_file(path: Path, seed: int) -> Dataset:
    if not path.is_file():
        raise DataError(f"There is no file {str(path)!r} to load data from; check the path.")
    arrays = _read_csv(path) if path.suffix.lower() == ".csv" else _read_numpy(path)
    description, licence = f"Rows of the file {path.name}.", "as the file's owner gave it"
    if {"train", "test"} <= arrays.keys():
        train, test = (_checked(arrays[part], f"{part!r} in {path}", 1) for part in ("train", "test"))
        if train.shape[1:] != test.shape[1:]:
            raise DataError(
                f"Rows of 'train' and 'test' in {path} differ in shape: {train.shape[1:]} and "
                f"{test.shape[1:]}; save rows of one shape in both."
            )
        train_labels, test_labels = (
            _checked_labels(arrays.get(f"{part}_labels"), len(rows), f"{part}_labels", path)
            for part, rows in (("train", train), ("test", test))
        )
        return Dataset(path.stem, train, test, train_labels, test_labels, None, description, licence)
    row_names = [key for key in arrays if key != "labels"]
    if len(row_names) != 1:
        raise DataError(
            f"{path} holds the arrays {', '.join(map(repr, arrays)) or '(none)'}; save one array of rows "
            "(and perhaps 'labels'), or 'train' and 'test' (and perhaps 'train_labels' and 'test_labels')."
        )
    rows = _checked(arrays[row_names[0]], str(path), 2)
    labels = _checked_labels(arrays.get("labels"), len(rows), "labels", path)
    return _split(path.stem, rows, labels, seed, description=description, licence=licence)


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


def _read_csv(path: Path) -> dict[str, np.ndarray]:
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
            if not _is_number(cell):
                raise DataError(
                    f"Line {number}, column {column} of {path} is {cell!r}, which is no number; rows must "
                    "hold numbers only, after at most one line of column names."
                )
    rows = np.array([[float(cell) for cell in cells] for _, cells in lines])
    return {"rows": rows.reshape(len(lines), width)}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _checked(rows: np.ndarray, where: str, rows_at_least: int) -> np.ndarray:
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
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise DataError(
            f"{where} holds {len(bad)} values that are not finite, the first is {rows[first]} at index "
            f"{first} (counted from 0); remove or impute them first."
        )
    return rows


def _checked_labels(labels: np.ndarray | None, rows: int, name: str, path: Path) -> np.ndarray | None:
    if labels is not None and (labels.shape != (rows,) or labels.dtype.kind not in "biu"):
        raise DataError(
            f"{name!r} in {path} has shape {labels.shape} and dtype {labels.dtype}; one integer for each of "
            f"the {rows} rows is needed."
        )
    return labels
