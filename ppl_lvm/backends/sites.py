"""What distributions and sites of a program are, as far as both libraries agree; and what is refused of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import BackendError, ProgramError, first_line
from ppl_lvm.latents import Discrete, Latent, PlateOf
from ppl_lvm.ops import Array

LARGEST_SUPPORT = 4096
"""Values of a finite site that are enumerated at most."""


def is_real(support: Any) -> bool:
    """Whether a support is the reals, so that its bijection is the identity."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return type(support).__name__.strip("_") in ("Real", "RealVector")


def latent_site(
    name: str,
    fn: Any,
    plates: Sequence[PlateOf],
    data_plate: str | None,
    transform: Any,
    unconstrained: Callable[[], Sequence[np.ndarray]],
) -> Latent:
    """What a family of guides is told of a model's latent site.

    `transform` maps the reals to its support; `unconstrained()` are prior draws `[*batch, *event]` mapped back, whose
    median, over rows too, is where a guide starts.

    Raises:
        ProgramError: the site is discrete, and of no kind that families know.
    """
    batch = tuple(fn.batch_shape)
    row_dim = next((p.dim for p in plates if p.name == data_plate), None)
    discrete = _discrete_kind(name, fn)
    if discrete is not None:
        event = tuple(fn.event_shape) + ((innermost(fn).probs.shape[-1],) if discrete == "categorical" else ())
        draws: Sequence[np.ndarray] = [np.zeros(batch + event)]
    else:
        draws = unconstrained()
        event = draws[0].shape[len(batch) :]
    values = np.stack(draws).astype(np.float64)
    if row_dim is not None:
        values = np.moveaxis(values, 1 + len(batch) + row_dim, 0)
        values = values.reshape(-1, *values.shape[2:])
    start = np.nan_to_num(np.nanmedian(values, axis=0), nan=0.0, posinf=0.0, neginf=0.0)
    identity = discrete is not None or is_real(fn.support)
    return Latent(
        name, tuple(plates), row_dim, batch, event, fn.event_dim, start, None if identity else transform, discrete
    )


def _discrete_kind(name: str, fn: Any) -> Discrete | None:
    kind = type(innermost(fn)).__name__
    for prefix, discrete in _DISCRETE.items():
        if kind.startswith(prefix):
            return discrete
    if fn.support.is_discrete:
        raise ProgramError(
            f"Families of guides know discrete sites that are Bernoulli, Categorical or OneHotCategorical; "
            f"{name!r} is {kind}. Write a guide for it, or sum it out in the model."
        )
    return None


_DISCRETE: dict[str, Discrete] = {
    "Bernoulli": "bernoulli",
    "OneHotCategorical": "one_hot",
    "Categorical": "categorical",
}


def rebuild(fn: Any, value: Array, solve: Callable[[Array, Array], Array]) -> Array:
    """`T(sg(T^-1(value)), parameters)`: an injected value that carries the pathwise gradient of its distribution.

    `solve(L, b)` solves a lower-triangular system. Location-scale families, multivariate normals and invertible
    transforms of them are known; others raise BackendError.
    """
    kind = type(fn).__name__
    stop = ops.stop_gradient
    if hasattr(fn, "noise_of"):
        return fn.from_noise(stop(fn.noise_of(value)))
    if kind == "TransformedDistribution" or getattr(fn, "transforms", None):
        x = value
        for transform in reversed(fn.transforms):
            x = transform.inv(x) if hasattr(transform, "inv") else transform._inverse(x)
        x = rebuild(fn.base_dist, x, solve)
        for transform in fn.transforms:
            x = transform(x)
        return x
    if hasattr(fn, "base_dist"):
        return rebuild(fn.base_dist, value, solve)
    if kind == "Delta":
        return fn.v + stop(value - fn.v)
    if kind == "MultivariateNormal":
        noise = stop(solve(fn.scale_tril, value - fn.loc))
        return fn.loc + ops.xp(value).matmul(fn.scale_tril, noise[..., None])[..., 0]
    if kind in {"Normal", "Laplace", "Cauchy", "Gumbel", "Logistic", "StudentT"}:
        return fn.loc + fn.scale * stop((value - fn.loc) / fn.scale)
    raise BackendError(
        f"A value was injected into a pathwise site with distribution {kind}, whose noise cannot be recovered; inject "
        f"values into location-scale, multivariate normal or transformed sites, or use a score-type estimator."
    )


@dataclass(frozen=True)
class Fresh:
    """A draw of a distribution, and its log density in terms of the noise behind it."""

    fn: Any
    value: Array
    log_prob: Array


def is_fresh(site: Mapping[str, Any]) -> bool:
    """Whether a site has its draw as it was drawn: not detached or changed by its estimator, nor replaced by data."""
    drawn = site.get("fresh")
    return drawn is not None and drawn.fn is site["fn"] and drawn.value is site["value"]


def product_support(atoms: np.ndarray, event_shape: Sequence[int]) -> np.ndarray | None:
    """All values `[V, *event_shape]` of independent elements with the given atoms `[E, *atom_shape]`.

    None where there would be more than LARGEST_SUPPORT.
    """
    atom_shape = atoms.shape[1:]
    outer = tuple(event_shape)[: len(event_shape) - len(atom_shape)]
    elements = int(np.prod(outer, dtype=int))
    if len(atoms) ** elements > LARGEST_SUPPORT:
        return None
    rows = [atoms[list(choice)] for choice in itertools.product(range(len(atoms)), repeat=elements)]
    return np.stack(rows).reshape(len(rows), *outer, *atom_shape)


def log_values(atoms: int, atom_shape: Sequence[int], event_shape: Sequence[int]) -> float:
    """log V of independent elements with so many atoms each."""
    elements = np.prod(tuple(event_shape)[: len(event_shape) - len(atom_shape)], dtype=int)
    return float(elements * np.log(atoms))


def innermost(fn: Any) -> Any:
    """The distribution inside `to_event`, masks, expansions and transforms."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


@dataclass(frozen=True)
class Chain:
    """The distribution of a site inside a scan, over all steps: facts only, as its density was taken step by step.

    Steps are the first dimension of an event, so a value is `[*batch, T, *event]`.
    """

    of: Any
    """The distribution of one step."""
    steps: int
    has_enumerate_support = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.of.batch_shape)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.steps, *self.of.event_shape)

    @property
    def event_dim(self) -> int:
        return int(self.of.event_dim) + 1

    @property
    def has_rsample(self) -> bool:
        return bool(self.of.has_rsample)

    @property
    def support(self) -> Any:
        return self.of.support

    @property
    def mean(self) -> Any:
        raise ProgramError("A site inside a scan has no mean of its own: each step depends on the last; take draws.")


def _kind(fn: Any) -> str:
    return type(innermost(fn.of if isinstance(fn, Chain) else fn)).__name__


def steps_of(*fns: Any) -> int:
    """Steps of the scan that a site is inside of wherever it is met, or 0."""
    found = {fn.steps if isinstance(fn, Chain) else 0 for fn in fns}
    return found.pop() if len(found) == 1 else 0


def check_together(one_each: bool, guide: int = 0, model: int = 0) -> None:
    """Refuses programs that do not have one scan of the same number of steps in the guide and in the model."""
    if not one_each or guide != model:
        raise ProgramError(
            "The draws of a row are resampled between steps, which guide and model take together: each needs one "
            "ppl.scan" + (f", and theirs have {guide} and {model} steps." if one_each else ".")
        )


def is_factor(fn: Any) -> bool:
    """Whether a site is a `factor`: a density without a value, which is no data."""
    return _kind(fn) == "Unit"


def is_chain_of_classes(fn: Any) -> bool:
    """Whether a site is inside a scan and has a finite support at every step."""
    return isinstance(fn, Chain) and bool(fn.of.has_enumerate_support)


def check_plate(name: str, known: int, size: int) -> None:
    """Refuses a plate that is entered with another size than before, in the guide or in the model."""
    if size != known:
        raise ProgramError(
            f"Plate {name!r} has {known} rows where it is met first, and {size} later; guide and model enter it with "
            f"one size. Give other rows a plate of another name. A guide that was set up on other data (an autoguide "
            f"keeps its plates) serves those only; make a new one."
        )


def undeclared(fn: Any, plates: Iterable[Any]) -> bool:
    """Whether a site has several elements along a batch dimension that is no plate's."""
    dims = {f.dim for f in plates}
    return any(size > 1 and dim not in dims for dim, size in enumerate(fn.batch_shape, -len(fn.batch_shape)))


def is_point(fn: Any) -> bool:
    """Whether a site's value is a function of the distribution's parameters."""
    return _kind(fn) == "Delta"


def density(site: Mapping[str, Any], log_prob: Callable[[Any], Any]) -> Any:
    """`log_prob(site)`, or an error that says so where value, distribution and plates do not fit each other."""
    check_fits(site)
    try:
        found = log_prob(site)
    except (RuntimeError, TypeError, ValueError) as error:
        value = site["value"]
        raise ProgramError(
            f"Site {site['name']!r} has no density: {_kind(site['fn'])} at a value of shape {tuple(np.shape(value))} "
            f"and dtype {getattr(value, 'dtype', type(value).__name__)} says {told(error)}."
        ) from error
    for frame in site["cond_indep_stack"]:
        size = found.shape[frame.dim] if frame.dim is not None and len(found.shape) >= -frame.dim else 1
        if size not in (1, frame.size):
            raise ProgramError(
                f"Site {site['name']!r} has densities of shape {tuple(found.shape)} in plate {frame.name!r}, which is "
                f"dimension {frame.dim} and has {frame.size} rows; make further axes of a value part of one event "
                f"(to_event), or give them a plate."
            )
    if site["is_observed"] and not is_factor(site["fn"]):
        _check_counted_once(site)
    return found


def _check_counted_once(site: Mapping[str, Any]) -> None:
    """Refuses an observed value that its distribution repeats outside of every plate: each copy would count as data."""
    fn, dims = site["fn"], {f.dim for f in site["cond_indep_stack"]}
    shape = np.shape(site["value"])
    value = (1,) * (len(fn.batch_shape) + len(fn.event_shape) - len(shape)) + tuple(shape)
    for axis, size in enumerate(fn.batch_shape):
        dim = axis - len(fn.batch_shape)
        if dim not in dims and size > 1 and value[axis] == 1:
            raise ProgramError(
                f"Site {site['name']!r} has one value of shape {tuple(shape)} for {size} distributions along dimension "
                f"{dim}, which is no plate's, and would be counted {size} times; give distribution and value the same "
                f"shape (to_event for further axes), or open a plate of {size} there."
            )


def check_fits(site: Mapping[str, Any]) -> None:
    """Refuses a value of another shape than its distribution's; a larger one has densities that no plate would sum.

    Where `to_event` sums them, parameters of size one stand for all of the value's.
    """
    fn, shape = site["fn"], tuple(np.shape(site["value"]))
    drawn = (*fn.batch_shape, *fn.event_shape)
    summed = range(len(fn.batch_shape), len(fn.batch_shape) + getattr(fn, "reinterpreted_batch_ndims", 0))
    offset = len(drawn) - len(shape)
    wanted = tuple(shape[i - offset] if i in summed and n == 1 and i >= offset else n for i, n in enumerate(drawn))
    try:
        fits = np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        fits = False
    if not fits:
        sizes = {f.name: f.size for f in site["cond_indep_stack"]}
        remedy = (
            "size plates and parameters by the data (len(x))"
            if site["is_observed"]
            else "if the guide draws it for every row, the model once for all rows, sample it outside the plate in both"
        )
        raise ProgramError(
            f"Site {site['name']!r} has a value of shape {shape}, and its distribution draws {tuple(drawn)} in plates "
            f"{sizes}; {remedy}."
        )


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}"


CHECK_DATA = "Check units and options such as total_count."

UNOBSERVED = "_unobserved"
"""How both libraries end the name of the latent site that `obs_mask` makes."""

CHAINS = (
    "sum it out in the model by the library's own variable elimination (pyro.distributions.DiscreteHMM; on NumPyro a "
    "factor of a scan with logsumexp, or numpyro.contrib.funsor in an SVI of its own)"
)


def check_scale(name: str, shape: Sequence[int], plate_dim: int | None) -> None:
    """Refuse a scale handler's array unless it is a number a row."""
    if any(size > 1 and dim != plate_dim for dim, size in enumerate(shape, -len(shape))):
        raise ProgramError(
            f"Site {name!r} is scaled by an array of shape {tuple(shape)}; a scale is one number, or one for each row "
            f"of the data plate. Sum elements that are weighted apart in a factor of your own."
        )


def check_sites(
    guide: Mapping[str, bool],
    model: Mapping[str, bool],
    auxiliary: Sequence[str],
    supports: Mapping[str, np.ndarray | None],
    chains: Sequence[str],
) -> None:
    """Refuse sites that only one of model and guide has, or both observe (`guide`, `model`: site -> observed).

    Of latent sites that only the model has, `supports` holds all values or None; those with values may be summed out,
    which is for legality to say. `chains` are those that are discrete and inside a scan.
    """
    for name, observed in guide.items():
        if name in model and (observed or model[name]):
            raise ProgramError(
                f"Site {name!r} is {'observed' if observed else 'latent'} in the guide and "
                f"{'observed' if model[name] else 'latent'} in the model; a guide draws the model's latent sites, and "
                f"terms of its own (factor) need names of their own."
            )
    latent = [name for name, observed in model.items() if not observed]
    missing = [name for name in latent if name not in guide and (name.endswith(UNOBSERVED) or supports[name] is None)]
    if missing:
        way = "Sample it in the guide, condition on it, or sum it out in the model."
        if missing[0].endswith(UNOBSERVED):
            way = "If obs_mask made it, observe under a mask instead (poutine.mask, handlers.mask or dist.mask)."
        elif missing[0] in chains:
            way = f"It is a discrete chain inside a scan; sample it in the guide, or {CHAINS}."
        raise ProgramError(
            f"Latent site {missing[0]!r} is in the model but not in the guide (guide sites: {list(guide)}). {way}"
        )
    orphans = [name for name in guide if name not in model and name not in auxiliary]
    if orphans:
        raise ProgramError(
            f"Guide site {orphans[0]!r} is not in the model (model sites: {latent}). Rename it, or mark it as "
            f"auxiliary with infer={{'is_auxiliary': True}}."
        )
