"""Sites that miss some of their entries, in one run of a program; what a library does is left to two subclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ppl_lvm.backends.base import Call
from ppl_lvm.backends.sites import check_fits
from ppl_lvm.errors import ProgramError

if TYPE_CHECKING:
    from ppl_lvm.program import Program

Message = Any


class Missing:
    """What a program's sites miss, learned in its first runs.

    An *observed* site keeps the densities of its known entries. A site that the guide draws and that has data is
    *partly observed*: known entries take the places of drawn ones, log q counts the drawn ones alone, log p all. The
    model may say so (`obs=y`) or leave it out.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._joint: dict[str, int] = {}
        self._drawn: set[str] = set()

    def joint_dims(self, site: str) -> int:
        """Last dimensions of a site's value that its density takes at once; 0 where entries are apart."""
        return self._joint.get(site, 0)

    def fills(self, site: str) -> bool:
        """Whether data take the places of a latent site's draws."""
        return site in self._drawn

    def run(self, batch: Call, guide: bool) -> Run | None:
        return Run(self, batch, guide) if batch.known else None

    # What a library does.

    def joint(self, fn: Any) -> int:
        raise NotImplementedError

    def apart(self, fn: Any, known: Any) -> Any:
        """The distribution with densities of known entries alone; `known` has a value's shape."""
        raise NotImplementedError

    def merge(self, known: Any, value: Any, other: Any) -> Any:
        """`value` where it is known, `other` elsewhere, in the dtype of `other`."""
        raise NotImplementedError

    def neutral(self, fn: Any, value: Any) -> Any:
        """A value at which the density and its gradient are finite."""
        raise NotImplementedError


class Run:
    """One run of the guide or of the model on a batch."""

    def __init__(self, missing: Missing, batch: Call, guide: bool) -> None:
        self._missing, self._guide = missing, guide
        self._known: Mapping[str, Any] = batch.known
        self._data = batch.named(missing._program.arguments)

    def before(self, msg: Message) -> None:
        """A partly observed site is latent in the model too, whatever `obs` it was given."""
        if not self._guide and self._missing.fills(msg["name"]):
            msg["is_observed"], msg["value"] = False, None

    def after(self, msg: Message) -> None:
        """Densities and values of a site whose data miss entries."""
        missing, name, fn = self._missing, msg["name"], msg["fn"]
        argument = missing._program.argument_of(name)
        if argument not in self._known:
            return
        entries, data = self._known[argument], self._data[argument]
        if "step" in msg:  # of a scan: time is the first axis of a row
            entries, data = entries[:, msg["step"]], data[:, msg["step"]]
        if self._guide and not msg["is_observed"]:
            missing._drawn.add(name)
            shape = missing._shapes.setdefault(name, tuple(msg["value"].shape))
            known, value = (self._laid(name, a, shape) for a in (entries, data))
            msg["drawn"] = (fn, msg["value"])
            msg["value"] = missing.merge(known, value, msg["value"])
            msg["fn"] = missing.apart(fn, ~known)
        elif not self._guide and msg["is_observed"]:
            check_fits(msg)
            known = self._laid(name, entries, tuple(msg["value"].shape))
            msg["value"] = missing.merge(known, msg["value"], missing.neutral(fn, msg["value"]))
            msg["fn"] = missing.apart(fn, known)
        else:
            return
        missing._joint.setdefault(name, missing.joint(fn))

    def _laid(self, name: str, data: Any, shape: Sequence[int]) -> Any:
        """Data of a site's shape: plates that they lack have one element, behind the rows."""
        found = tuple(data.shape)
        if len(found) < len(shape):
            data = data.reshape((*found[:1], *(1,) * (len(shape) - len(found)), *found[1:]))
        if tuple(data.shape) != tuple(shape):
            raise ProgramError(
                f"Site {name!r} has values of shape {tuple(shape)} where its data, some of them missing, are of shape "
                f"{found}; give the site the argument as it is, or pass data without missing entries."
            )
        return data
