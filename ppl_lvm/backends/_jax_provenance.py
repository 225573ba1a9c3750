"""Which outputs of a computation on JAX look at which of its arguments, found without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from numpyro.ops.provenance import track_deps_jaxpr


def provenance(f: Callable[..., Any], **given: Any) -> Any:
    """What f gives, with the names of the arguments that each array depends on in the array's place.

    NumPyro's `eval_provenance` is this from 0.22 on; that of 0.21 fails under JAX 0.11 where f closes over arrays.

    Example:
        >>> found = provenance(lambda x, y, z: {"a": x + y, "b": 2.0 * z}, x=1.0, y=2.0, z=3.0)
        >>> sorted(found["a"]), sorted(found["b"])
        (['x', 'y'], ['z'])
    """
    jaxpr, shapes = jax.make_jaxpr(lambda given: f(**given), return_shape=True)(given)
    marks = {name: jax.tree.map(lambda _, name=name: frozenset({name}), value) for name, value in given.items()}
    found = track_deps_jaxpr(jaxpr.jaxpr, jax.tree.leaves(marks))
    return jax.tree.unflatten(jax.tree.structure(shapes), found)
