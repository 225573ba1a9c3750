"""What holds for all tests."""

from __future__ import annotations

from ppl_lvm.backends import _jax_memory

# Tests that count what is compiled must not meet the moment at which it is all let go.
_jax_memory.MOST_LEFT = 10**9
