"""Posterior draws as an ArviZ DataTree, so that summaries, LOO, plots and files need no code of ours."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ppl_lvm.errors import DataError

if TYPE_CHECKING:
    from xarray import DataTree

SAMPLE_DIMS = ("chain", "draw")
STATS = ("log_p", "log_q", "log_weight")


class PosteriorDraws(Protocol):
    """What is read of a posterior: draws first, then rows (locals only), then the site's event axes.

    `dims` names the plates of a site, `log_p` and `log_q` are [draws, rows] or [draws] in nats, and
    `log_likelihood` is [draws, rows] per observed site.
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
    posterior: PosteriorDraws,
    observed: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
    predictive: Mapping[str, np.ndarray] | None = None,
) -> "DataTree":
    """Draws of a fit as a DataTree with one chain; log_weight = log_p - log_q goes along as a statistic.

    Groups: posterior, log_likelihood, sample_stats (log_p, log_q, log_weight), observed_data, and
    posterior_predictive where `predictive` ([draws, rows, ...] per observed site) is given. Plates name the
    dimensions, event axes are called `<site>_dim_0` and so on. A plate that shares its name with a site
    is called `<plate>_plate`, and "/" in a site's name becomes ".", because neither can be stored
    otherwise. Attributes that netCDF cannot hold are kept as JSON text.

    Draws come from the guide and are not weighted: `log_weight` tells how far it is from the posterior.
    `arviz_stats.loo` is of use for global latents; where each row has a latent of its own, leaving the row
    out turns that latent's posterior into its prior, Pareto k is high, and a held-out log-likelihood serves.

    Raises:
        DataError: `log_p` and `log_q` differ in shape, or two sites would be stored under one name.

    Example:
        >>> from types import SimpleNamespace
        >>> log = np.zeros((3, 5))
        >>> draws = SimpleNamespace(
        ...     values={"z": np.zeros((3, 5, 2))}, dims={"z": ("data",)},
        ...     log_p=log, log_q=log, log_likelihood={},
        ... )
        >>> to_arviz(draws, {}, {"objective": "iwae"}).posterior["z"].dims
        ('chain', 'draw', 'data', 'z_dim_0')
    """
    from arviz_base import from_dict

    log_p, log_q = (np.asarray(log, dtype=np.float64) for log in (posterior.log_p, posterior.log_q))
    if log_p.shape != log_q.shape:
        raise DataError(
            f"log_p has shape {log_p.shape}, log_q has {log_q.shape}; they need the same draws and rows."
        )
    stats = dict(zip(STATS, (log_p, log_q, log_p - log_q), strict=True))
    groups = {
        "posterior": posterior.values,
        "log_likelihood": posterior.log_likelihood,
        "sample_stats": stats,
        "posterior_predictive": predictive or {},
    }
    tree: dict[str, dict[str, np.ndarray]] = {
        group: {name: np.asarray(value)[None] for name, value in _storable(values).items()}
        for group, values in groups.items()
        if values
    }
    if observed:
        tree["observed_data"] = {name: np.asarray(value) for name, value in _storable(observed).items()}
    return from_dict(
        tree,
        sample_dims=list(SAMPLE_DIMS),
        dims=_dims(posterior, observed, {name for group in tree.values() for name in group}),
        attrs={"/": {name: _attribute(value) for name, value in attrs.items()}},
    )


def _storable(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {_stored_name(name): value for name, value in values.items()}
    if len(renamed) < len(values):
        raise DataError(
            f"The sites {', '.join(values)} are not distinct once '/' is written as '.'; rename one."
        )
    return renamed


def _stored_name(name: str) -> str:
    return name.replace("/", ".")


def _dims(
    posterior: PosteriorDraws, observed: Mapping[str, np.ndarray], variables: set[str]
) -> dict[str, list[str]]:
    """Plate names per variable; an observed site that names no plates has that of the rows."""
    plates = {site: [dim for dim in dims if dim not in SAMPLE_DIMS] for site, dims in posterior.dims.items()}
    rows = next(
        (np.shape(log)[1] for log in (*posterior.log_likelihood.values(), posterior.log_p) if log.ndim > 1),
        None,
    )
    row_dim = _row_dim(posterior, plates, rows)
    for site in {*posterior.log_likelihood, *observed} - plates.keys():
        # A program without a data plate has one row, however long its observed arrays are.
        plates[site] = [row_dim] if site not in observed or len(observed[site]) == rows else []
    plates |= dict.fromkeys(STATS, [row_dim] if posterior.log_p.ndim > 1 else [])
    taken = {*variables, *SAMPLE_DIMS, "sample"}
    return {
        _stored_name(site): [f"{dim}_plate" if dim in taken else dim for dim in map(_stored_name, dims)]
        for site, dims in plates.items()
    }


def _row_dim(posterior: PosteriorDraws, plates: Mapping[str, list[str]], rows: int | None) -> str:
    locals_ = [site for site, value in posterior.values.items() if np.shape(value)[1:2] == (rows,)]
    return next(
        (plates[site][0] for site in (*posterior.log_likelihood, *locals_) if plates.get(site)), "row"
    )


def _attribute(value: object) -> str | int | float:
    """A value that netCDF holds as it is, or JSON text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str | float) or (type(value) is int and abs(value) < 2**63):
        return value
    return json.dumps(value, default=str)
