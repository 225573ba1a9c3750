"""What objectives, estimators and methods share: frozen, validated options, some of which may be schedules."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

if TYPE_CHECKING:
    from ppl_lvm.backends.structure import Structure
    from ppl_lvm.draws import Draws, Loss
    from ppl_lvm.latents import Sketch
    from ppl_lvm.ops import Array


class Schedule(BaseModel):
    """A number that moves from `start` to `end` over the first `steps` optimiser steps and then stays.

    With t = min(step / steps, 1):
    linear       start + (end - start) t
    cosine       end + (start - end) (1 + cos(pi t)) / 2
    exponential  start (end / start)^t, both of the same sign

    Raises:
        pydantic.ValidationError: unknown kind, steps < 1, or an exponential one that would touch zero.

    Example:
        >>> Schedule(schedule="linear", start=0.0, end=1.0, steps=10).at(5)
        0.5
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schedule: Literal["linear", "cosine", "exponential"]
    start: float
    end: float
    steps: int = Field(ge=1)

    @model_validator(mode="after")
    def _exponential_needs_one_sign(self) -> Self:
        if self.schedule == "exponential" and not self.start * self.end > 0:
            raise ValueError(
                f"an exponential schedule needs start and end of the same sign and not zero, "
                f"not {self.start} and {self.end}"
            )
        return self

    def at(self, step: int) -> float:
        """The value at an optimiser step, counted from 0."""
        t = min(max(step / self.steps, 0.0), 1.0)
        if self.schedule == "linear":
            return self.start + (self.end - self.start) * t
        if self.schedule == "cosine":
            return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * t)) / 2.0
        return float(self.start * (self.end / self.start) ** t)


@dataclass(frozen=True)
class Turn:
    """One in a block of steps and zero in the others: `first .. first + length - 1` of every `period`.

    Example:
        >>> [Turn(first=1, length=2, period=3).at(step) for step in range(4)]
        [0.0, 1.0, 1.0, 0.0]
    """

    first: int
    length: int
    period: int
    end: ClassVar[float] = 1.0

    def at(self, step: int) -> float:
        """Whether an optimiser step, counted from 0, is in the block."""
        return float(0 <= step % self.period - self.first < self.length)


def _reach(number: float | Schedule) -> tuple[float, float]:
    return (number.start, number.end) if isinstance(number, Schedule) else (number, number)


def _check_positive(number: float | Schedule) -> float | Schedule:
    if not min(_reach(number)) > 0:
        raise ValueError("Input should be greater than 0")
    return number


def _check_not_negative(number: float | Schedule) -> float | Schedule:
    if not min(_reach(number)) >= 0:
        raise ValueError("Input should be greater than or equal to 0")
    return number


Number = float | Schedule
"""Type of a numeric option that may be scheduled: an input of the compiled step, never a constant in it."""

Positive = Annotated[Number, AfterValidator(_check_positive)]
"""A `Number` above zero, at both ends if it is a schedule."""

NonNegative = Annotated[Number, AfterValidator(_check_not_negative)]
"""A `Number` of zero or more, at both ends if it is a schedule."""


OptionalPositive = Annotated[
    Number | None, AfterValidator(lambda number: None if number is None else _check_positive(number))
]
"""A `Positive`, or None."""

OptionalNonNegative = Annotated[
    Number | None, AfterValidator(lambda number: None if number is None else _check_not_negative(number))
]
"""A `NonNegative`, or None."""


def _pairs(table: object) -> object:
    pairs = table.items() if isinstance(table, Mapping) else table
    return tuple(tuple(pair) for pair in pairs) if isinstance(pairs, Iterable) and not isinstance(pairs, str) else table


def _table(pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return dict(pairs)


BySite = Annotated[
    tuple[tuple[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], ...],
    BeforeValidator(_pairs),
    PlainSerializer(_table),
]
"""Type of an option that gives patterns of site names a number of zero or more: `weights = { "z*" = 0.5 }`."""


CountBySite = Annotated[
    tuple[tuple[str, Annotated[int, Field(ge=1)]], ...], BeforeValidator(_pairs), PlainSerializer(_table)
]
"""Type of an option that gives patterns of site names a whole number of one or more: `marginal = { u = 5 }`."""


class Algorithm(BaseModel):
    """Options of one algorithm; the class, its file and its name in a recipe are called the same.

    Types are strict (no "3" or True for a number); lists become tuples and NumPy scalars Python's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _take_plain_values(cls, options: Any) -> Any:
        return (
            {name: plain(value) for name, value in options.items()} if isinstance(options, dict) else options
        )

    def numbers(self) -> dict[str, float | Schedule]:
        """The options annotated `Number` (or `Positive`, `NonNegative`), by name.

        Example:
            >>> class tempered(Algorithm):
            ...     temperature: Number = 1.0
            ...     draws: int = 1
            >>> tempered().numbers()
            {'temperature': 1.0}
        """
        values = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if Schedule in get_args(field.annotation)
        }
        # Where an option has a word for some of its settings, that is no number.
        return {name: value for name, value in values.items() if value is not None and not isinstance(value, str)}

    def with_numbers(self, values: Mapping[str, Any]) -> Self:
        """A copy with these options; the values are not checked, so traced arrays pass."""
        return self.model_copy(update=values)


def plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return tuple(plain(item) for item in value)
    return value


def specificity(pattern: str) -> tuple[bool, int, str]:
    """Sorts patterns of site names: names first, then by how many characters are no wildcards."""
    wild = any(c in pattern for c in "*?[")
    return wild, -len(pattern.translate(_NO_WILDCARDS)), pattern


_NO_WILDCARDS = str.maketrans("", "", "*?")


def best_pattern(patterns: Iterable[str], site: str) -> str | None:
    """The most specific pattern that matches a site; its own name, which may hold brackets, before all others.

    Example:
        >>> best_pattern(["*", "z?", "z*2"], "z12"), best_pattern(["z[0]", "z*"], "z[0]")
        ('z*2', 'z[0]')
    """
    matching = [p for p in patterns if p == site or fnmatchcase(site, p)]
    return min(matching, key=lambda p: (p != site, specificity(p)), default=None)


class Objective(Algorithm):
    """What is optimised, as expectations over draws of the guide: `draws` K per row, `outer` M of the globals.

    A subclass defines `__call__(self, d: Draws) -> Loss` with the verbs of `d`, and declares what it relies on; the
    declarations are what legality is computed from, and a verb that was not declared is refused when it is called.
    """

    verbs: ClassVar[frozenset[str]]
    """The verbs it calls: of "mean", "joint", "log_mean_exp", "weighted", "wake", "variance", "squares", "sleep",
    "filtered", "pooled"."""
    detached: ClassVar[bool] = False
    """Draws must carry no gradient (objectives that differentiate densities at fixed values)."""
    separate: ClassVar[bool] = False
    """The model's and the guide's losses differ, so no parameter may be in both."""
    user_scale: ClassVar[bool] = False
    """Site weights given by `poutine.scale` or `handlers.scale` have a meaning for it."""
    globals: ClassVar[bool] = True
    """Latents outside the data plate have a meaning for it, as in `E_q(g)[ log p(g) - log q(g) + sum_n rows_n ]`."""
    least_draws: ClassVar[int] = 1
    """Draws per row that it needs, unless all of a row is enumerated."""
    prefers: ClassVar[tuple[str, ...]] = ()
    """Estimators that "auto" tries before its own choice, by name."""
    bias: ClassVar[str] = ""
    """Why gradients are not those of the quantity that it stands for, in one clause; empty where they are."""
    at_posterior: ClassVar[tuple[float | None, float | None]] = (-1.0, None)
    """Model's and guide's loss where the guide is the exact posterior, in units of log p(x); None: no loss of its own,
    or no fixed value. For programs without globals, every term sampled."""

    draws: int = Field(default=1, ge=1)
    outer: int = Field(default=1, ge=1)
    chunk: int | None = Field(default=None, ge=1)
    """Draws that are evaluated at a time, the gradient's second pass included; None: all. Divides `draws`."""
    marginal: CountBySite | None = None
    """`{ u = J }` sums auxiliary sites of the guide out of its density: `log q(z, u)` becomes the estimate
    `log (1/J) sum_j q(z | u_j)` with u_0 the draw that z came from and J - 1 fresh draws of u, patterns of site names
    allowed. Its mean is no less than that of log q(z), so bounds stay on their side. Sites that are drawn from one
    another, or that one site looks at, are summed out together. With J = 1 the ELBO is the hierarchical bound HVI, with
    more it is IWHVI, and importance weighting on top is DIWHVI.

    Ranganath, Tran, Blei (2016), arXiv:1511.02386; Sobolev, Vetrov (2019), arXiv:1905.03290; Becker, Lew et al.
    (2024), Probabilistic Programming with Programmable Variational Inference, arXiv:2406.15742."""

    @model_validator(mode="after")
    def _chunks_are_equal(self) -> Self:
        if self.chunk is not None and self.draws % self.chunk:
            raise ValueError(f"chunk = {self.chunk} does not divide draws = {self.draws}")
        return self

    def requests(self) -> frozenset[str]:
        """What the backend must find besides densities, decided before the run: "kl" (every latent site's KL in closed
        form, in `Site.extra`), "kl where known" (of those that have one), "kl without draws" (in closed form, and the
        same whatever is drawn), "sleep" (`Draws.dream`), "values" (`Site.value`, which is kept for nobody else where
        draws run in chunks on Pyro); and of every latent site of a row, in `Site.extra`, "cross"
        (log q of each row's draw under every row's guide), "moments" ("mean" and "variance" of the guide's
        distribution) and "prior" (a draw from the model's)."""
        return frozenset()

    def misfits(self, structure: "Structure") -> Iterable[str]:
        """What about a program does not go with these options, each in a sentence that names the remedy."""
        return ()

    def resampling(self) -> "Resampling | None":
        """How the draws of a row are resampled between the steps of its scan, for `filtered`; None: they are not."""
        return None

    def model_first(self) -> bool:
        """Whether the guide's gradient of a step is taken at the model's new parameters, on the same draws."""
        return False

    def smooth(self) -> bool:
        """Whether its functions of all draws are twice differentiable."""
        return True

    def alike(self, roles: Mapping[str, str]) -> bool:
        """Whether it treats the densities of these sites (name -> "latent" or "observed") alike, so that one density of
        all of them serves it: that of sites which look at one that is summed out (`Site.joint`)."""
        return True

    def why_biased(self) -> str:
        """`bias` under these options."""
        return self.bias

    def initial_own(self, features: int) -> dict[str, Any]:
        """Parameters of the objective itself, trained by `Loss.extra` and found in `d.own["objective"]`."""
        return {}

    def __call__(self, d: "Draws") -> "Loss":
        raise NotImplementedError(f"Objective {type(self).__name__} defines no __call__(d).")


@dataclass(frozen=True)
class Resampling:
    """Draws of a row as particles: drawn anew from their weights where the effective number of them is small."""

    scheme: Literal["systematic", "multinomial"]
    threshold: float
    """A fraction of K at or below which a row's particles are resampled; 0: never, 1: before every step."""


@dataclass(frozen=True)
class Signal:
    """What one site's score is multiplied by, carrying no gradient: the input of a baseline."""

    h: "Array"
    """`[M, K, B]`: the cost of each draw, or the log weights when `f` reduces them jointly. A site in plates inside a
    row has costs by element, `[M, K, B, *inner]`."""
    value: "Array"
    """What multiplies the score before the baseline is taken off: h itself, or `f(h)` as `[M, 1, B]`."""
    f: "Callable[[Array, int], Array] | None"
    batch: "Array | None"
    """The rows, for baselines that look at them."""


CREDITED: Mapping[str, str] = {
    "log_mean_exp": "its credits for values besides the draw have no place in a logarithm of a mean",
    **dict.fromkeys(("weighted", "wake", "variance", "squares"), "draws are fixed there"),
}
"""`Estimator.refuses` of those whose variants carry credits."""


@dataclass(frozen=True)
class Variant:
    """One program value of a site among V for the same draw, with how its cost h enters `E h`.

    weight w   the value is `sum_v w_v h_v`; its own gradient counts (None: the site's density, for whole supports)
    credit s   adds `s_v sg(h_v)`: value zero, live in the guide's parameters
    through r  adds `r_v (h_v - sg(h_v))`: gradient through the value only, value zero; in the guide's loss alone
    control c  adds `c_v`: value and expected gradient zero, live in the guide's parameters; in the guide's loss alone

    Each is one array over the site's batch shape. A site in plates inside a row has one number a row: its credits and
    controls are summed over the elements, and weight and through must be the same for all of them (see `by_row`).
    """

    value: "Array"
    weight: "Array | None" = None
    credit: "Array | None" = None
    through: "Array | None" = None
    control: "Array | None" = None


class SiteDistribution(Protocol):
    """A guide site's distribution as an estimator sees it; the backend owns noise and injected values."""

    def sample(self) -> "Array":
        """A draw that carries no gradient."""

    def rsample(self) -> "Array":
        """A reparameterised draw: gradient flows into the distribution's parameters."""

    def mean(self) -> "Array":
        """The mean of the distribution, live in its parameters."""

    def log_prob(self, value: "Array") -> "Array":
        """Log density over the site's batch shape."""

    def explore(self, epsilon: float) -> "tuple[Array, int]":
        """A value of a finite support, uniform with probability epsilon and else drawn; the size of the support."""

    def select(self, index: "Array") -> "Array":
        """Element `index` of the enumerated support, broadcast to the site's batch shape."""

    # Of a site whose elements are one-hots, categoricals or Bernoullis: `*elements` is its event without the classes.

    def log_probs(self) -> "Array":
        """Log probabilities of the classes, `[*batch, *elements, V]`, live in parameters; of a Bernoulli those of 0
        and 1."""

    def embed(self, weights: "Array") -> "Array":
        """The program's value of weights of classes `[*batch, *elements, V]`: those of a one-hot, the second of a
        Bernoulli, the index of the largest of a categorical."""

    def classes_of(self, value: "Array") -> "Array":
        """The inverse of `embed`: one-hots `[*batch, *elements, V]` of a hard value."""

    def uniform(self, salt: int = 0, copies: int | None = None) -> "Array":
        """Noise strictly inside (0, 1), `[*batch, *elements, V]`, or `[copies, *batch, *elements, V]`.

        It is the same for all variants of a draw, and other noise than that of `sample` and of another salt.
        """

    own: "Mapping[str, Array]"
    """The estimator's own parameters at this site."""

    def rows(self) -> "Array":
        """The numbers of each row, `[.., features]`, which broadcasts over the site's batch shape; of a site that all
        rows share their mean."""


FAR_FROM_LINEAR = "a power of the weights is far from what it has the gradient of"
"""Why estimators with a gradient through hard values refuse `log_mean_exp`."""

AT_FIXED_DRAWS: Mapping[str, str] = dict.fromkeys(
    ("weighted", "wake", "variance", "squares", "sleep"), "draws are fixed there, and it changes nothing"
)
"""Verbs that estimators with a biased gradient through values refuse, as there is none."""


class Estimator(Algorithm):
    """How the draw of a guide site carries gradient to the guide's parameters.

    A subclass defines `sample`, or `variants` together with `count`, and declares what follows. One that is `marginal`
    defines neither, as it is for sites that are not drawn.
    """

    marginal: ClassVar[bool] = False
    """It is for a site that only the model has, and the engine sums the site out of `log p`."""

    scored: ClassVar[bool] = False
    """The verbs add this site's score terms."""
    frozen: ClassVar[bool] = False
    """The guide's loss uses the density replayed under stopped parameters."""
    exhaustive: ClassVar[bool] = False
    """The variants are the whole support, weighted by the site's density."""
    weighted: ClassVar[bool] = False
    """Its `variants` is asked for one value too, whose weight is that of a draw from elsewhere, `q / b`."""
    bias: ClassVar[str] = ""
    """Why its gradient is biased, in one clause; empty where it is not."""
    site: ClassVar[Literal["any", "reparameterised", "finite", "classes", "one_hot"]] = "any"
    """The kind of distribution it needs: "classes" are one-hots, categoricals and Bernoullis, any number of elements;
    "one_hot" those of them whose values are no indices, so that gradient can flow through them."""
    least_draws: ClassVar[int] = 1
    """Draws it needs at the site's level (K for local sites, M for global ones)."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Verbs it must not serve, each with the reason in one clause; legality adds what serves instead."""
    by_row: ClassVar[bool] = False
    """Weight and through of its variants are the same for all elements of a row, so that they are variants of the row:
    it may serve sites in plates inside a row."""
    relaxes: ClassVar[bool] = False
    """Its variants have `through`: besides hard draws the program is run on values off the support, which the guide's
    loss alone sees. `log_density` is the density there, and of hard values that of the distribution."""
    linear: ClassVar[bool] = False
    """Its value is the mean of the site's distribution, right where the densities of all other sites are linear in it
    and its own enter by their KL in closed form."""
    least_variance: ClassVar[bool] = False
    """Its own parameters, which do not change the expectation of the guide's gradient g (the loss's, by row), are
    trained on the sum of g^2 over the guide's parameters: `grad |g|^2`, whose mean is the gradient of g's variance.

    Tucker, Mnih, Maddison, Lawson, Sohl-Dickstein (2017), REBAR, arXiv:1703.07370; Grathwohl, Choi, Wu, Roeder,
    Duvenaud (2018), RELAX, arXiv:1711.00123."""

    def sample(self, dist: SiteDistribution) -> "Array":
        """The value of one draw."""
        raise NotImplementedError(f"Estimator {type(self).__name__} defines neither sample nor variants.")

    def why_biased(self) -> str:
        """`bias` under these options."""
        return self.bias

    def why_refused(self, verb: str) -> str | None:
        """Why it must not serve a verb under these options, or None."""
        return self.refuses.get(verb)

    def relaxed(self) -> bool:
        """Whether its values are off the support of the site's distribution, so that `log_density` is the density of
        the site on both sides."""
        return False

    def log_density(self, log_probs: "Array", weights: "Array", side: Literal["guide", "model"]) -> "Array":
        """Log density of relaxed weights of classes, element by element: `[.., V], [.., V] -> [..]`."""
        raise NotImplementedError(f"Estimator {type(self).__name__} has no relaxed density.")

    def count(self, support: int) -> int:
        """Variants per draw, static; `support` is the number of values of a finite site, otherwise 0."""
        return 1

    def variants(self, dist: SiteDistribution, index: "Array") -> Variant:
        """The variant number `index` of each draw; `index` is an integer array that broadcasts over batch shapes.

        `dist.sample()` here returns one draw shared by all variants of a draw.
        """
        return Variant(self.sample(dist))

    def baseline_for(
        self, signal: Signal, own: "Mapping[str, Array]", state: "Array | None"
    ) -> "Array | float":
        """What is taken off the signal of a draw's score; must not depend on that draw's value of the site."""
        return 0.0

    def initial_state(self) -> float | None:
        """A number threaded through the steps and updated once a step, or None."""
        return None

    def update(self, state: "Array", signal: Signal) -> "Array":
        """The next state; baselines read the state as it was before this step's signal."""
        return state

    def initial_own(self, features: int, weights: int = 0) -> dict[str, Any]:
        """Parameters of the estimator itself; `features` numbers make a row, `weights` of classes a value of the site.

        They are trained to predict the signal, or with `least_variance` so that the guide's gradient varies least.
        """
        return {}


class GuideFamily(Algorithm):
    """A guide that is written from the model's latent sites, in place of one written by hand.

    A subclass defines `__call__(self, sketch)`, which samples every site of `sketch.latents` on `sketch.ppl`. Its
    parameters are called `auto.<site>.<leaf>`.
    """

    def __call__(self, sketch: "Sketch") -> None:
        raise NotImplementedError(f"Guide family {type(self).__name__} defines no __call__(sketch).")


class Method(Algorithm):
    """A posterior found by an algorithm of the backend's own library, without an objective and without a guide.

    A subclass holds options and documentation; the backend has an implementation under the name of the class (or of
    one that it is derived from). All rows are used at once, and latent sites must be continuous.
    """

    learns: ClassVar[bool] = False
    """The model's parameters are trained along with the latent sites; otherwise they must be given."""
    lacks: ClassVar[Mapping[str, str]] = {}
    """What of a fit it cannot give, by name, each with the reason and what serves instead."""

    radius: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """It starts from unconstrained values that are uniform on [-radius, radius]."""


class Ascent(Method):
    """A method that climbs the log joint density with Adam.

    The learning rate stays over the first half of the steps; then it falls exponentially, to `learning_rate decay` at
    the last, so that the search settles. It can go about `learning_rate steps / 2` far in unconstrained values.
    """

    steps: int = Field(default=2000, ge=1)
    learning_rate: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    decay: float = Field(default=1e-4, gt=0, le=1)

    def rates(self) -> np.ndarray:
        """The learning rate of every step, `[steps]`.

        Example:
            >>> Ascent(steps=5, learning_rate=1.0, decay=0.01).rates().round(6).tolist()
            [1.0, 1.0, 1.0, 0.1, 0.01]
        """
        done = np.arange(self.steps) / max(self.steps - 1, 1)
        return self.learning_rate * self.decay ** np.maximum(2.0 * done - 1.0, 0.0)
