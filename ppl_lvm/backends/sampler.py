"""What a backend promises to methods: the posterior as a density of one vector, and the library's algorithms on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ppl_lvm.algorithm import Method
from ppl_lvm.errors import BackendError, DataError, LegalityError, PplLvmError, ProgramError

TRIES = 100
"""Starting points that are tried until the density is finite."""


@dataclass(frozen=True)
class Outcome:
    """What a method found; arrays are numpy's, `params` the backend's (unconstrained)."""

    u: np.ndarray
    """Unconstrained draws `[chains, draws, D]`, D numbers of all latent sites in a row."""
    params: Mapping[str, Any]
    history: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What there is of every step, `[steps]`."""
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What there is of every draw, `[chains, draws]`."""
    gaussian: tuple[np.ndarray, np.ndarray] | None = None
    """Mean `[D]` and lower triangle `[D, D]`, where the posterior is a Gaussian in u."""
    notes: tuple[str, ...] = ()


class Sampler(Protocol):
    """A bound program's joint density with its parameters, on all rows."""

    sites: Mapping[str, tuple[int, ...]]
    """Latent sites in the program's order, with the shapes of their unconstrained values."""
    states: Mapping[str, Any]
    """What the program keeps besides parameters (statistics of networks); held."""

    def run(self, method: Method, seed: int, progress: bool) -> Outcome: ...

    def log_joint(self, params: Mapping[str, Any], u: np.ndarray) -> np.ndarray:
        """`log p(x, T(u)) + log |det dT/du|` in nats, `[draws]` for u `[draws, D]`."""

    def values(self, params: Mapping[str, Any], u: np.ndarray) -> dict[str, np.ndarray]:
        """The sites' values: `[draws, rows, ...]` for local sites, `[draws, ...]` for others."""


def check_program(continuous: Mapping[str, bool], subsampled: Mapping[str, tuple[int, int]], name: str) -> None:
    """Refuses what has no density of a fixed vector (`continuous` by latent site, `subsampled`: plate -> sizes)."""
    discrete = [site for site, smooth in continuous.items() if not smooth]
    if discrete:
        raise LegalityError(
            f"Method {name!r} needs continuous latent sites, but {discrete} are discrete. Sum them out in the model, "
            f"or take an objective, whose estimators (enumerate, score, rloo) serve them."
        )
    if not continuous:
        raise ProgramError(f"Method {name!r} was asked for, but the model has no latent sites to have a posterior.")
    for plate, (size, taken) in subsampled.items():
        raise ProgramError(
            f"The program subsamples plate {plate!r} itself ({taken} of {size}), so method {name!r} would see one part "
            f"of the rows at every step; size the plate by its data (len(x))."
        )


def check_params(method: Method, given: bool, params: Mapping[str, Any]) -> None:
    """Refuses to hold parameters at values that nobody chose."""
    if params and not given and not method.learns:
        raise LegalityError(
            f"Method {type(method).__name__!r} does not train the model's parameters {sorted(params)[:5]}; they would "
            f"stay at their initial values. Pass start=run of a fit that trained them, or sample them from a "
            f"prior, or take 'map', which trains them along."
        )


def given_params(given: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The model's parameters among those given; others, of a guide for example, are left aside."""
    missing = sorted(shapes.keys() - given.keys())
    if missing:
        raise DataError(f"params= lacks {missing[:5]} of the model's parameters; found {sorted(given)[:10]}.")
    found = {n: np.asarray(given[n]) for n in shapes}
    wrong = {n: (v.shape, tuple(shapes[n])) for n, v in found.items() if v.shape != tuple(shapes[n])}
    if wrong:
        raise DataError(f"params= has other shapes than the model (given, needed): {wrong}.")
    return found


def implementation(method: Method, known: Mapping[str, Callable[..., Outcome]]) -> Callable[..., Outcome]:
    """The backend's function for a method: under its own name, or that of a class it is derived from."""
    for kind in type(method).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    raise BackendError(
        f"No backend implements method {type(method).__name__!r}; derive its class from one of {sorted(known)}."
    )


def offsets(sites: Mapping[str, tuple[int, ...]]) -> dict[str, slice]:
    """Where each site's numbers are in the vector."""
    found, first = {}, 0
    for name, shape in sites.items():
        size = int(np.prod(shape, dtype=int))
        found[name] = slice(first, first + size)
        first += size
    return found


def first_finite(make: Callable[[int], Any], finite: Callable[[Any], bool], method: Method) -> Any:
    """The first of `make(0)`, `make(1)`, ... with a finite density and gradient."""
    for attempt in range(TRIES):
        start = make(attempt)
        if finite(start):
            return start
    raise PplLvmError(
        f"No starting point with a finite density and gradient was found in {TRIES} tries on [-{method.radius}, "
        f"{method.radius}]; lower radius, or bound the scales of the model."
    )


def check_slope(gradient: np.ndarray, curved: np.ndarray) -> tuple[str, ...]:
    """Notes a search that ended on a slope; `curved` is the Hessian of `-log p` times its gradient.

    Along the gradient the density could still rise by about `(g.g)^2 / (2 g.Hg)` nats, without end if g.Hg <= 0.
    """
    square, bend = float(gradient @ gradient), float(gradient @ curved)
    gain = 0.0 if square == 0.0 else square**2 / (2.0 * bend) if bend > 0 else np.inf
    if square > 1e-12 and gain > 0.01:
        return (f"map: the search ended about {gain:.2g} nats below a mode of the latent sites; ask for more steps",)
    return ()


def check_curvature(
    hessian: np.ndarray, gradient: np.ndarray, sites: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Refuses a Hessian of `-log p` that is no precision; notes a search that ended before the mode."""
    if not np.isfinite(hessian).all():
        raise PplLvmError("The Hessian at the end of the search is not finite; lower learning_rate or radius.")
    smallest, directions = np.linalg.eigh(hessian)
    if smallest[0] <= 0:
        index = int(np.abs(directions[:, 0]).argmax())
        site = next(name for name, part in offsets(sites).items() if part.start <= index < part.stop)
        raise PplLvmError(
            f"The Hessian is not positive definite where the search ended (smallest eigenvalue {smallest[0]:.3g}, "
            f"mostly of site {site!r}), so there is no Gaussian with this curvature: the posterior is flat there, or "
            f"the mode was not reached. Ask for more steps, give the site a proper prior, or take 'nuts'."
        )
    distance = float(np.sqrt(gradient @ np.linalg.solve(hessian, gradient)))
    if distance > 0.01:
        return (
            f"laplace: the search ended {distance:.2g} posterior standard deviations from the mode; ask for more steps",
        )
    return ()
