"""`scan` and `cond` of `numpyro.contrib.control_flow`, seen from outside: their sites come with values of their own.

The library draws what is inside a scan itself, and hands over every site with a leading axis of time. So the values
are plain draws (pathwise where reparameterised), the replay goes through the scan's own substitution, and everything
that would be lost in there without a word is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.primitives import Messenger

from ppl_lvm.errors import ProgramError

Array = jax.Array
Message = dict[str, Any]


@dataclass(frozen=True)
class Scan:
    """What one scan of a run held."""

    latent: tuple[str, ...]
    observed: tuple[str, ...]
    plates: Mapping[str, Message]


class _Body(Messenger):
    """Innermost, around the body: refuses what the scan would hide, and draws observed sites anew where asked."""

    def __init__(self, anew: Callable[[Message, Array], Any] | None, plates: dict[str, Message]) -> None:
        super().__init__()
        self._anew, self._plates = anew, plates

    def process_message(self, msg: Message) -> None:
        kind = msg["type"]
        if kind in ("param", "mutable"):
            what = "Parameter" if kind == "param" else "State"
            raise ProgramError(
                f"{what} {msg['name']!r} is declared inside the body of a scan or cond, where it would be neither "
                f"found nor trained; declare it (or call flax_module, nnx_module, eqx_module) before the scan."
            )
        if kind == "plate" and msg["value"] is None:
            raise ProgramError(
                f"Plate {msg['name']!r} is subsampled inside the body of a scan, which would take other rows at every "
                f"time; subsample the data before the scan, or size the plate by them and let batch_size choose."
            )
        if kind == "plate":
            # What the scan hands over has an axis of time even where it is the plate's size.
            self._plates[msg["name"]] = {"type": "plate", "name": msg["name"], "args": msg["args"]}
        if kind == "sample" and msg["is_observed"] and self._anew is not None:
            msg["value"] = self._anew(msg, numpyro.prng_key())


def enter(
    msg: Message,
    key: Array,
    replayed: Mapping[str, Array],
    observed: Callable[[Message], Any] | None,
    scans: list[Scan],
) -> None:
    """Prepares the message of a scan or cond: its noise, the values it replays, and the record of what it held."""
    run, (first, *rest) = msg["fn"], msg["args"]
    msg["kwargs"]["rng_key"] = key
    plates: dict[str, Message] = {}
    anew = None if observed is None else lambda site, own: site["fn"].sample(own)

    def inside(body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def wrapped(*args: Any) -> Any:
            with _Body(anew, plates):
                return body(*args)

        return wrapped

    if run is cond_wrapper:
        on_true, on_false, operand = rest
        msg["args"] = (first, inside(on_true), inside(on_false), operand)
    else:
        msg["args"] = (inside(first), *rest)
        trace = {
            n: {"type": "sample", "name": n, "value": v, "is_observed": False, "infer": {}} for n, v in replayed.items()
        }
        msg["kwargs"]["substitute_stack"].append(("replay", trace))

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        trace = (out[1] if run is cond_wrapper else out[1][0]).trace
        sites = {n: s for n, s in trace.items() if s["type"] == "sample"}
        latent = tuple(n for n, s in sites.items() if not s["is_observed"])
        if run is cond_wrapper and latent:
            raise ProgramError(
                f"Latent site {latent[0]!r} is sampled inside cond, which cannot be replayed in the model; sample it "
                f"outside, from parameters chosen by jnp.where."
            )
        known = {n: {**plate, "value": jnp.arange(plate["args"][0])} for n, plate in plates.items()}
        scans.append(Scan(latent, tuple(n for n in sites if n not in latent), known))
        return out

    msg["fn"] = watched
