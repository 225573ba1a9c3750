"""Steps of sequences that a training step says are unknown, while the model goes on scoring them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ppl_lvm import ops
from ppl_lvm.backends.base import Call
from ppl_lvm.errors import ProgramError
from ppl_lvm.ops import Array
from ppl_lvm.program import Program


class Hiding:
    """Windows of `windows[x]` steps in a row, for every row of `x` at a random place of its own, False in `x_mask`.

    Which entries of an observed site count is not told by `x_mask` but by the data, so the densities stay as they are.

    Source: Zhao and Linderman (2023), arXiv:2305.16543, section 4.3.
    """

    def __init__(self, windows: Mapping[str, int], program: Program) -> None:
        self.windows, self._program = dict(windows), program

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        """What a compiled step depends on."""
        return tuple(sorted(self.windows.items()))

    def check(self, call: Call) -> None:
        """Refuses data that no window can be hidden of.

        Raises:
            ProgramError: the program is told nothing of unknown steps, or there are too few of them.
        """
        named = call.named(self._program.arguments)
        for argument, length in self.windows.items():
            mask = named.get(f"{argument}_mask")
            if mask is None:
                raise ProgramError(
                    f"The recipe hides {length} steps of {argument!r}, but program {self._program.name!r} has no "
                    f"argument '{argument}_mask' by which its guide could be told (arguments: "
                    f"{', '.join(self._program.arguments) or 'none'}). Let the guide take it and look away where it is "
                    f"False, as svae_lds does, or leave `hide` out."
                )
            if mask.ndim < 2 or mask.shape[1] <= length:
                raise ProgramError(
                    f"The recipe hides {length} steps of {argument!r}, whose rows have "
                    f"{mask.shape[1] if mask.ndim > 1 else 'no'} steps; hide fewer."
                )

    def hidden(self, batch: Call, uniform: Callable[[str, Array], Array]) -> Call:
        """The batch with windows hidden; `uniform(name, like)` gives a number in [0, 1) for each of its rows."""

        def hide(name: str, mask: Any) -> Any:
            length = self.windows.get(name.removesuffix("_mask")) if name.endswith("_mask") else None
            if length is None:
                return mask
            xp, (rows, steps) = ops.xp(mask), tuple(mask.shape[:2])
            first = xp.floor(uniform(name, mask) * (steps - length + 1))
            at = xp.arange(steps) + 0.0 * first[:, None]
            away = (at >= first[:, None]) & (at < first[:, None] + length)
            away = xp.reshape(away, (rows, steps, *(1,) * (mask.ndim - 2)))
            return xp.where(away, xp.zeros_like(mask), mask)

        return batch.map_named(self._program.arguments, hide) if self.windows else batch
