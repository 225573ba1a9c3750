"""The latent sites of a model, and what families of guides are put together from.

A backend finds the sites by a probe run of the model alone; a family (`ppl_lvm/guides/`) then writes a guide for them
on the `ppl` namespace, so it is one program for both backends, and for native models too. Sites inside the data plate
have parameters for every row (`ppl.row_param`), so rows can be taken in mini-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ppl_lvm.errors import ProgramError
from ppl_lvm.ops import Array

Discrete = Literal["bernoulli", "categorical", "one_hot"]


@dataclass(frozen=True)
class PlateOf:
    """A plate around a site, as the model enters it."""

    name: str
    dim: int
    size: int
    subsample: int


@dataclass(frozen=True)
class Latent:
    """A latent site of a model; "unconstrained" is its value mapped to the reals."""

    name: str
    plates: tuple[PlateOf, ...]
    row_dim: int | None
    """Dimension of the data plate, counted from the right; None outside it."""
    batch: tuple[int, ...]
    event: tuple[int, ...]
    """Shape of an unconstrained value without batch dimensions."""
    event_dim: int
    """Of the constrained value."""
    initial: np.ndarray
    """Where a guide starts, unconstrained, `[*batch without rows, *event]`; logits of zero if discrete."""
    transform: Any = None
    """The library's bijection from the reals to the support; None where the support is the reals."""
    discrete: Discrete | None = None

    @property
    def inner(self) -> tuple[int, ...]:
        """The batch dimensions without that of the data plate."""
        return tuple(n for d, n in enumerate(self.batch, -len(self.batch)) if d != self.row_dim)

    @property
    def size(self) -> int:
        """Unconstrained numbers of one row, or of the whole site outside the data plate."""
        return math.prod((*self.inner, *self.event))


class Sketch:
    """One run of a guide that a family writes: the sites, and the verbs that most families need."""

    def __init__(self, ppl: Any, latents: Sequence[Latent], data: Mapping[str, Array]) -> None:
        self.ppl, self.latents, self.data = ppl, latents, data
        self._plates: dict[str, tuple[Any, Any]] = {}

    @contextmanager
    def inside(self, plates: Sequence[PlateOf]) -> Iterator[None]:
        """The plates of a site; one object for a plate and run, as a subsample is drawn once."""
        with ExitStack() as stack:
            for p in plates:
                plate, _ = self._plates.get(p.name, (None, None))
                if plate is None:
                    part = {} if p.subsample == p.size else {"subsample_size": p.subsample}
                    plate = self.ppl.plate(p.name, p.size, dim=p.dim, **part)
                self._plates[p.name] = plate, stack.enter_context(plate)
            yield

    def param(self, latent: Latent, leaf: str, initial: np.ndarray, constraint: Any = None) -> Array:
        """A parameter `auto.<site>.<leaf>`, `[*batch, *event]`, to be asked for inside the plates of its site.

        `initial` is `[*inner, *event]`: that of one row.
        """
        name = f"auto.{latent.name}.{leaf}"
        return self.spread(latent, self.table(latent, name, initial, constraint))

    def table(self, latent: Latent, name: str, initial: np.ndarray, constraint: Any = None) -> Array:
        """A parameter, `[rows, *initial.shape]` inside the data plate and of the shape of `initial` outside it."""
        if latent.row_dim is None:
            return self.ppl.param(name, initial, constraint)
        frame = next(p for p in latent.plates if p.dim == latent.row_dim)
        index = self._plates[frame.name][1] if frame.subsample != frame.size else None
        return self.ppl.row_param(name, initial, constraint, rows=index, size=frame.size if index is not None else None)

    def spread(self, latent: Latent, rows: Array) -> Array:
        """`[*lead, B, *inner, *rest]` with the rows moved to the place of the data plate: `[*lead, *batch, *rest]`."""
        if latent.row_dim is None:
            return rows
        lead = rows.ndim - 1 - len(latent.inner) - len(latent.event)
        return self.ppl.xp.moveaxis(rows, lead, lead + len(latent.batch) + latent.row_dim)

    def sample(self, latent: Latent, base: Any) -> None:
        """The site from a distribution over its unconstrained elements, mapped to its support."""
        fn = base.to_event(len(latent.event)) if latent.event else base
        if latent.transform is not None:
            fn = self.ppl.dist.TransformedDistribution(fn, [latent.transform])
        self.ppl.sample(latent.name, fn)

    def sample_discrete(self, latent: Latent, logits: Array) -> None:
        """A discrete site with free logits `[*batch, *event]`, elements independent."""
        dist = self.ppl.dist
        if latent.discrete == "bernoulli":
            fn, left = dist.Bernoulli(logits=logits), len(latent.event)
        elif latent.discrete == "categorical":
            fn, left = dist.Categorical(logits=logits), len(latent.event) - 1
        else:
            fn, left = dist.OneHotCategorical(logits=logits), len(latent.event) - 1
        self.ppl.sample(latent.name, fn.to_event(left) if left else fn)

    def mean_field(self, latent: Latent, scale: float) -> None:
        """The site with parameters of its own: a normal in unconstrained space, or free logits."""
        with self.inside(latent.plates):
            if latent.discrete is not None:
                self.sample_discrete(latent, self.param(latent, "logits", latent.initial))
                return
            loc = self.param(latent, "loc", latent.initial)
            width = self.param(
                latent, "scale", np.full(latent.initial.shape, scale), self.ppl.dist.constraints.positive
            )
            self.sample(latent, self.ppl.dist.Normal(loc, width))

    def blocks(self) -> Iterator[tuple[str, list[Latent]]]:
        """The continuous sites that share a vector: those outside the data plate, and those of one row."""
        for name, local in (("globals", False), ("rows", True)):
            block = [s for s in self.latents if s.discrete is None and (s.row_dim is not None) == local]
            if block:
                yield name, block

    def row_plates(self, block: Sequence[Latent]) -> tuple[PlateOf, ...]:
        """The plates around a block's vector: the data plate, or none."""
        first = block[0]
        return tuple(p for p in first.plates if p.dim == first.row_dim)

    def place(self, block: Sequence[Latent], vectors: Array) -> Array:
        """Parameters of a block's vector, `[B, D, ...]` or `[D, ...]`, broadcast as its site's batch shape has it."""
        dim = block[0].row_dim
        if dim is None or dim == -1:
            return vectors
        return self.ppl.xp.reshape(vectors, (vectors.shape[0], *(1,) * (-dim - 1), *vectors.shape[1:]))

    def deal(self, block: Sequence[Latent], vector: Array) -> None:
        """Each site of a block as its part of the vector `[..., D]`, mapped to its support: a point with a density."""
        xp, dist, at = self.ppl.xp, self.ppl.dist, 0
        for s in block:
            part, at = vector[..., at : at + s.size], at + s.size
            # Dimensions of draws stand on the left of all plates, and ones between the two.
            lead = tuple(part.shape[: max(part.ndim - 1 - len(s.batch), 0)])
            rows = () if s.row_dim is None else (part.shape[part.ndim - 1 + s.row_dim],)
            u = self.spread(s, xp.reshape(part, (*lead, *rows, *s.inner, *s.event)))
            value, density = u, 0.0 * xp.sum(u, axis=tuple(range(-len(s.event), 0))) if s.event else 0.0 * u
            if s.transform is not None:
                value = s.transform(u)
                jacobian = s.transform.log_abs_det_jacobian(u, value)
                extra = jacobian.ndim - (u.ndim - len(s.event))
                density = -(xp.sum(jacobian, axis=tuple(range(-extra, 0))) if extra else jacobian)
            with self.inside(s.plates):
                self.ppl.sample(s.name, dist.Delta(value, density, event_dim=s.event_dim))


def check_plates(family: str, latents: Sequence[Latent]) -> None:
    """Refuses sites in a plate that the model subsamples beside the data plate.

    Raises:
        ProgramError: with the site and the plate.
    """
    for s in latents:
        for p in s.plates:
            if p.subsample != p.size and p.dim != s.row_dim:
                raise ProgramError(
                    f"Guide {family!r} has no parameters for site {s.name!r} in plate {p.name!r}, which is subsampled "
                    f"({p.subsample} of {p.size}) and not the data plate; take the whole plate, or write a guide."
                )
