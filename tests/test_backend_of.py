"""The backend of a native program is found from what its code refers to."""

import functools
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as npd
import pyro
import pyro.distributions as pd
import pytest
import torch
from numpyro.infer.autoguide import AutoNormal as NumPyroAutoNormal
from pyro.infer.autoguide import AutoNormal as PyroAutoNormal
from pyro.nn import PyroModule

from ppl_lvm import lookup
from ppl_lvm.errors import ProgramError
from ppl_lvm.program import backend_of, program, programs


def pyro_model(x: Any) -> None:
    pyro.sample("z", pd.Normal(0.0, 1.0))


def numpyro_model(x: Any) -> None:
    numpyro.sample("z", npd.Normal(0.0, 1.0))


def distribution_only(x: Any) -> Any:
    return [npd.Normal(0.0, k) for k in range(3)]


def imported_inside(x: Any) -> None:
    import numpyro.handlers as h

    h.seed(lambda: None, 0)


def calls_a_helper(x: Any) -> None:
    def inner() -> None:
        for _ in range(3):
            pyro_model(x)

    inner()


def arrays_only(x: Any) -> Any:
    return torch.zeros(3)


def both(x: Any) -> None:
    library = pyro if isinstance(x, torch.Tensor) else numpyro
    library.sample("z", None)


def near_numpyro_far_pyro(x: Any) -> None:
    numpyro.sample("z", None)
    calls_a_helper(x)


def numpy_only(x: Any, name: str = "pyro") -> Any:
    return np.linalg.norm(x)


class Holder:
    def __init__(self, net: Callable[..., Any] | None = None) -> None:
        self.net = net

    def model(self, x: Any) -> None:
        self.helper(x)

    def helper(self, x: Any) -> None:
        numpyro.sample("z", npd.Normal(0.0, 1.0))

    def __call__(self, x: Any) -> None:
        self.model(x)


class TorchNet(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x


TORCH_NET = TorchNet()


class PyroNet(PyroModule):
    def forward(self, x: Any) -> Any:
        return x


def closure_over(library: ModuleType) -> Callable[..., Any]:
    def model(x: Any) -> None:
        library.sample("z", None)

    return model


@functools.wraps(pyro_model)
def wrapper(*args: Any) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (pyro_model, "pyro"),
        (numpyro_model, "numpyro"),
        (distribution_only, "numpyro"),
        (imported_inside, "numpyro"),
        (calls_a_helper, "pyro"),
        (arrays_only, "pyro"),
        (lambda x: jnp.zeros(3), "numpyro"),
        (near_numpyro_far_pyro, "numpyro"),
        (numpy_only, None),
        (Holder(), "numpyro"),
        (Holder().model, "numpyro"),
        (TorchNet(), "pyro"),
        (PyroNet(), "pyro"),
        (PyroNet().forward, "pyro"),
        (closure_over(pyro), "pyro"),
        (closure_over(numpyro), "numpyro"),
        (functools.partial(numpyro_model, 3), "numpyro"),
        (wrapper, "pyro"),
        (PyroAutoNormal(pyro_model), "pyro"),
        (NumPyroAutoNormal(numpyro_model), "numpyro"),
        (lambda x, net=TORCH_NET: net(x), "pyro"),
    ],
)
def test_the_backend_is_found(call: Callable[..., Any], expected: str | None) -> None:
    assert backend_of(call) == expected


def test_model_and_guide_are_looked_at_together() -> None:
    assert backend_of(numpy_only, PyroAutoNormal(pyro_model)) == "pyro"
    assert backend_of(numpyro_model, None) == "numpyro"
    with pytest.raises(ProgramError, match="one to pyro and the other to numpyro"):
        backend_of(pyro_model, numpyro_model)


def test_both_libraries_at_once_asks() -> None:
    with pytest.raises(ProgramError, match=r"backend of 'both'.*Say backend="):
        backend_of(both)


@pytest.mark.parametrize("name", programs())
def test_portable_programs_have_no_backend(name: str) -> None:
    found = program(name)
    assert backend_of(found.model, found.guide) is None


def test_nothing_is_imported() -> None:
    code = """
import sys
from ppl_lvm.program import backend_of, program, programs
def model(x):
    import pyro
assert backend_of(model) == "pyro"
for name in programs():
    program(name)
loaded = {"torch", "jax", "pyro", "numpyro"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], cwd=lookup.PACKAGE.parent, check=True)
