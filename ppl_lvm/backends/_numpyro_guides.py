"""NumPyro's autoguides: objects that are set up by their first call, and so are copied for every fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import autoguide

from ppl_lvm.errors import BackendError

REFUSED = {
    autoguide.AutoLaplaceApproximation: (
        "is a point until its Hessian is taken after the training; use AutoDelta for the point, or a Gaussian guide "
        "such as AutoMultivariateNormal"
    ),
    autoguide.AutoDAIS: "anneals towards the model's density on the data of its first call; use AutoIAFNormal",
    autoguide.AutoSemiDAIS: "anneals towards the model's density on the data of its first call; use AutoNormal",
    autoguide.AutoSurrogateLikelihoodDAIS: (
        "anneals towards a surrogate of the model on the data of its first call; use AutoIAFNormal"
    ),
}
"""Autoguides that are not fitted, and why."""


def own_guide(guide: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of an autoguide that will be set up by its own first call; any other callable as it is.

    An autoguide keeps shapes, initial values and supports of the data it saw first, so two fits must not share one.

    Raises:
        BackendError: it is one of `REFUSED`.
    """
    if not isinstance(guide, autoguide.AutoGuide):
        return guide
    why = next((why for kind, why in REFUSED.items() if isinstance(guide, kind)), None)
    if why is not None:
        raise BackendError(f"Guide {type(guide).__name__} {why}.")
    mine = copy.copy(guide)
    mine.prototype_trace, mine._prototype_frames, mine._prototype_frame_full_sizes = None, {}, {}
    for name, value in vars(guide).items():
        if name == "_event_dims":
            setattr(mine, name, {})
        elif isinstance(value, autoguide.AutoGuide):
            setattr(mine, name, own_guide(value))
        elif isinstance(value, list):
            setattr(mine, name, [own_guide(part) for part in value])
    return by_noise(mine)


def by_noise(guide: Any) -> Any:
    """A guide whose flow has no inverse, with the flow's noise as a site; any other as it is."""
    if not isinstance(guide, autoguide.AutoBNAFNormal):
        return guide
    mine = copy.copy(guide)
    mine._sample_latent = partial(_forward, mine)
    return mine


def _forward(guide: Any, *args: Any, **kwargs: Any) -> Any:
    """The latent vector as a point above its noise: NumPyro's site has a density at its own draw alone."""
    flow, auxiliary = guide._get_posterior(), {"is_auxiliary": True}
    x = numpyro.sample(f"_{guide.prefix}_noise", flow.base_dist, infer=auxiliary)
    log_det = 0.0
    for transform in flow.transforms:
        y, inside = transform.call_with_intermediates(x)
        x, log_det = y, log_det + transform.log_abs_det_jacobian(x, y, inside)
    return numpyro.sample(f"_{guide.prefix}_latent", dist.Delta(x, -log_det, event_dim=1), infer=auxiliary)


def prototype_supports(guide: Any) -> list[Any]:
    """Supports of the latent sites that an autoguide has taken over from its first call."""
    if not isinstance(guide, autoguide.AutoGuide):
        return []
    found = [s["fn"].support for s in guide.prototype_trace.values() if s["type"] == "sample" and not s["is_observed"]]
    parts = [part for value in vars(guide).values() if isinstance(value, list) for part in value]
    return found + [support for part in parts for support in prototype_supports(part)]


def constants(trees: Any) -> Hashable:
    """The arrays in constraints and transforms, which a compiled step holds as constants, as something to compare."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array | np.ndarray | float)]
    return tuple((leaf.shape, leaf.dtype.str, leaf.tobytes()) for leaf in leaves)
