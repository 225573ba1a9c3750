"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ppl_lvm import lookup
from ppl_lvm.datasets import _generated, _public
from ppl_lvm.datasets._base import Dataset
from ppl_lvm.datasets._files import SUFFIXES, load_file, load_function
from ppl_lvm.errors import DataError

_LOADERS: dict[str, Callable[[int], Dataset]] = {
    **{f.__name__: f for f in (_public.digits, _generated.linear_gaussian, _generated.pinwheel, _generated.spirals)},
    **{f.__name__: f for f in (_generated.sprites, _generated.lds, _public.mnist10k, _public.mnist10k_binary)},
    **{f.__name__: f for f in (_generated.lds_medium, _generated.pendulum, _generated.functional_tensor)},
    **{f.__name__: f for f in (_public.omniglot, _public.omniglot_binary, _public.omniglot_105, _public.jsb_chorales)},
}
_WITH_GAPS = ("lds", "lds_medium", "pendulum")
"""Sequences of which steps are left out where missing entries are asked for."""


def load(name: str | Path, seed: int = 0, missing: bool = False) -> Dataset:
    """Load a data set by name, of a .npy, .npz, .csv or .parquet file, or of `module:function`.

    `seed` fixes which rows are held out, and what is generated; `missing` lets NaN (and empty cells of a .csv file)
    stand for entries that are not known, for `fit(..., missing="mask")`; of generated sequences a fifth of the steps
    are then left out. A file holds rows first and numbers only; a fifth of its rows, drawn by `seed`, is held out. An
    .npz file holds one array of rows and perhaps `labels`, or `train` and `test` (kept as they are) and perhaps
    `train_labels` and `test_labels`. A function, of a module or of a file (`data.py:function`), is called without
    arguments and returns rows, a list of sequences, a dictionary as an .npz file holds it, or a Dataset.

    Data that ship with no dependency are read from the folder that the environment variable PPL_LVM_DATA names, else
    downloaded once into the user's cache; their digest is checked.

    Raises:
        DataError: an unknown name, a missing file, values that are no finite numbers, arrays without at
            least two rows and two axes, labels that do not fit; a file that cannot be downloaded, or is another one.

    Example:
        >>> load("digits").train.shape
        (1437, 64)
    """
    asked = str(name)
    if ":" in asked and asked.rpartition(":")[2].isidentifier():
        return load_function(asked, seed, missing)
    if asked.lower().endswith(SUFFIXES):
        return load_file(Path(name), seed, missing)
    loader = _LOADERS.get(asked)
    if loader is None:
        raise DataError(
            f"Unknown data set {asked!r}. {lookup.valid(asked, _LOADERS, 'Data sets')} Data of your own are given by "
            f"the path of a {', '.join(SUFFIXES)} file, or as module:function."
        )
    data = loader(seed)
    return _generated.with_gaps(data, seed) if missing and asked in _WITH_GAPS else data


def datasets() -> dict[str, str]:
    """Names that `load` takes, each with one line about the data.

    Example:
        >>> "digits" in datasets()
        True
    """
    return {name: (loader.__doc__ or "").partition("\n")[0] for name, loader in _LOADERS.items()}
