"""What holds for all tests."""

from __future__ import annotations

import jax
import pytest

from ppl_lvm.backends import _jax_memory

# Tests that count what is compiled must not meet the moment at which it is all let go.
_jax_memory.MOST_LEFT = 10**9

COMPILED = {"few": False}
"""Whether XLA leaves most optimisations out at this moment."""


@pytest.fixture(autouse=True, scope="module")
def compiling(request: pytest.FixtureRequest) -> None:
    """XLA compiles with few optimisations, unless a module is marked `optimised`.

    Compiling is most of the time of the suite. What is left out keeps values to rounding; where bits are compared, or
    compiled steps with eager ones, it is as users compile, and nothing that others have compiled is met.
    """
    few = request.node.get_closest_marker("optimised") is None
    if few != COMPILED["few"]:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", few)
        COMPILED["few"] = few
