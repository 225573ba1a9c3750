"""Posterior draws as an ArviZ DataTree, so that summaries, LOO, plots and files need no code of ours."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ppl_lvm.errors import DataError

if TYPE_CHECKING:
    from xarray import DataTree

SAMPLE_DIMS = ("chain", "draw")
DATA = ("observed_data", "constant_data")
"""Groups without draws."""
PACKAGES = ("ppl_lvm", "numpy", "torch", "pyro-ppl", "jax", "numpyro", "arviz-base")


class PosteriorDraws(Protocol):
    """What pictures and reports read of a posterior: draws first, then rows (locals only), then the site's event axes.

    `dims` names the axes after draws, `log_p` and `log_q` are `[draws, rows]` in nats.
    """

    @property
    def values(self) -> Mapping[str, np.ndarray]: ...
    @property
    def dims(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def log_p(self) -> np.ndarray: ...
    @property
    def log_q(self) -> np.ndarray: ...
    @property
    def log_likelihood(self) -> Mapping[str, np.ndarray]: ...


def to_arviz(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, tuple[str, ...]],
    rows: str,
    attrs: Mapping[str, Any],
) -> "DataTree":
    """Arrays by group and name as a DataTree with one chain: `[draw, ...]`, in the groups of data without draws.

    `dims` names the axes after draws, those it leaves out are `<name>_dim_0` and so on; `log_likelihood` is
    `[draw, rows]` and `rows` the name of that axis. Groups without content are left out. A dimension that shares its
    name with a variable is called `<name>_plate`, and "/" in a name becomes ".", because neither can be stored
    otherwise. Attributes that netCDF cannot hold are kept as JSON text.

    Raises:
        DataError: two names of a group would be stored as one, or its arrays have different numbers of draws.

    Example:
        >>> groups = {"posterior": {"z": np.zeros((3, 5, 2))}}
        >>> to_arviz(groups, {"z": ("data",)}, "data", {"objective": "iwae"}).posterior["z"].dims
        ('chain', 'draw', 'data', 'z_dim_0')
    """
    from arviz_base import from_dict

    tree: dict[str, dict[str, np.ndarray]] = {}
    for group, values in groups.items():
        if not values:
            continue
        draws = {name: len(value) for name, value in values.items()}
        if group not in DATA and len(set(draws.values())) > 1:
            raise DataError(f"The arrays of {group!r} need the same number of draws; found {draws}.")
        tree[group] = {
            name: np.asarray(value) if group in DATA else np.asarray(value)[None]
            for name, value in _storable(values).items()
        }
    variables = {name for group in tree.values() for name in group}
    # ArviZ looks a variable's dimensions up by its name alone, and log_likelihood has no axes after the rows.
    named = {name: list(own) for name, own in dims.items()}
    for name in groups.get("log_likelihood", {}):
        named.setdefault(name, [rows])
    return from_dict(
        tree,
        sample_dims=list(SAMPLE_DIMS),
        dims=stored_dims(variables, named),
        attrs={"/": {name: attribute(value) for name, value in attrs.items()}},
    )


def stored_dims(variables: Iterable[str], dims: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Stored name of a variable -> names of its dimensions after draws, none of which is called like a variable."""
    taken = {*map(stored_name, variables), *SAMPLE_DIMS, "sample"}
    return {
        stored_name(name): [f"{dim}_plate" if dim in taken else dim for dim in map(stored_name, own)]
        for name, own in dims.items()
    }


def _storable(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {stored_name(name): value for name, value in values.items()}
    if len(renamed) < len(values):
        raise DataError(
            f"The sites {', '.join(values)} are not distinct once '/' is written as '.'; rename one."
        )
    return renamed


def stored_name(name: str) -> str:
    return name.replace("/", ".")


def attribute(value: object) -> str | int | float:
    """A value that netCDF holds as it is, or JSON text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str | float) or (type(value) is int and abs(value) < 2**63):
        return value
    return json.dumps(value, default=str)


def versions() -> dict[str, str]:
    """Versions of Python, ppl_lvm and the libraries a fit depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
