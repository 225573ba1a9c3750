"""The only part of the library that imports torch, pyro, jax or numpyro; each backend is imported when it is used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ppl_lvm.errors import BackendError

REQUIRED = {"pyro": ("torch", "pyro"), "numpyro": ("jax", "numpyro", "equinox", "optax")}
"""The packages that each backend needs."""


def installed() -> list[str]:
    """The backends whose packages are installed."""
    return [name for name, needs in REQUIRED.items() if all(importlib.util.find_spec(n) for n in needs)]


def load(name: str) -> Any:
    """The module of a backend: its `Bound` class, `Trainer` class and key function.

    Raises:
        BackendError: there is no such backend, or its packages are not installed.
    """
    if name not in REQUIRED:
        raise BackendError(f"Unknown backend {name!r}; backends are {list(REQUIRED)}.")
    missing = [n for n in REQUIRED[name] if importlib.util.find_spec(n) is None]
    if missing:
        raise BackendError(
            f"Backend {name!r} needs {missing}, which are not installed; pip install 'ppl_lvm[{name}]'."
        )
    return importlib.import_module(f"ppl_lvm.backends._{name}_train")


def methods(name: str) -> Any:
    """The module of a backend's methods: its `Sampler` class, and evaluations given values of the latent sites.

    Raises:
        BackendError: as for `load`.
    """
    load(name)
    return importlib.import_module(f"ppl_lvm.backends._{name}_methods")
