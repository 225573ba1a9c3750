"""What a method gives: a fit that holds draws of the posterior where a variational one holds a guide."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_lvm import backends
from ppl_lvm.asking import checked
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.forward import Forward
from ppl_lvm.backends.sampler import Outcome
from ppl_lvm.errors import DataError, LegalityError, PplLvmError
from ppl_lvm.fitted import Fitted
from ppl_lvm.posterior import Fit, LogLikelihood, Posterior, State, tails
from ppl_lvm.predict import Codes, forward
from ppl_lvm.program import Program

if TYPE_CHECKING:
    from xarray import DataTree

    from ppl_lvm.algorithm import Method
    from ppl_lvm.recipe import Recipe


@dataclass
class Sampled(Fit):
    """The posterior of a program as draws, found by a method; `lacks` says what it cannot give, and why.

    `stats` holds what the library reports of every draw, `[chains, draws]`. Draws belong to the rows of the fit: for
    other rows there is a posterior only where no latent site belongs to a row.
    """

    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    _sampler: Any = field(default=None, repr=False)
    _outcome: Outcome = field(default=None, repr=False)  # type: ignore[assignment]

    @property
    def method(self) -> Method:
        """The method and its options."""
        assert self.recipe.method is not None
        return self.recipe.method

    def __post_init__(self) -> None:
        super().__post_init__()
        of = self._fitted
        self._fitted = _Drawn(of.program, of.backend, of.bound, of.trained, of.example, source=self._globals)

    @checked
    def posterior(self, draws: int | None = None, data: object = None, seed: int = 0) -> Posterior:
        """Draws of the posterior with the joint density of each, `[draws, rows, ...]`; None: all that there are.

        Fewer are every so manieth of all chains together, more are draws that are taken again; `messages` says so.
        A Gaussian is drawn from anew. `log_q` is NaN, as no row has a density of its own.

        Raises:
            DataError: draws < 1, or other rows than those of the fit for a program with latent sites per row.
        """
        call, values = self._rows_of(data), self._values(self._take(draws, seed))
        found = self._evaluated(call, _count(values), seed, values, whole=True)
        unknown = None if found.log_q_global is None else np.full_like(found.log_q_global, np.nan)
        return replace(found, log_q=np.full_like(found.log_q, np.nan), log_q_global=unknown)

    @checked
    def predictive(self, draws: int | None = 100, data: object = None, seed: int = 0) -> dict[str, np.ndarray]:
        """Observed sites drawn anew from the posterior predictive, `[draws, rows, ...]`.

        Raises:
            DataError: as for `posterior`.
        """
        call, values = self._rows_of(data), self._values(self._take(draws, seed))
        observed, how = self._fitted.sites("observed"), Forward(prior=True)
        return forward(self._fitted, call, _count(values), seed, how, names=observed, given=values, whole=True)

    @checked
    def encode(self, data: object = None, draws: int | None = None, seed: int = 0) -> Codes:
        """Mean and standard deviation of each row's latents over draws of the posterior: site -> `[rows, ...]`."""
        found = self.posterior(draws, data, seed).values
        own = {n: found[n] for n in self._fitted.sites("latent", local=True)}
        return Codes({n: v.mean(0) for n, v in own.items()}, {n: v.std(0, ddof=len(v) > 1) for n, v in own.items()})

    @checked
    def log_likelihood(self, data: object = None, draws: int | None = None, seed: int = 0) -> LogLikelihood:
        """`log (1/S) sum_s p(x_n | z_s)` per row in nats, over draws of latent sites that all rows share.

        The log predictive density: held-out rows do not enter the posterior. For `map` it is that of the mode.

        Raises:
            PplLvmError: a latent site belongs to a row; `lacks` says so before.
        """
        return super().log_likelihood(data, self._there if draws is None else draws, seed)

    @checked
    def pointwise(
        self, draws: int | None = None, data: object = None, particles: int = 100, seed: int = 0
    ) -> np.ndarray:
        """`[draws, rows]`: `log p(x_n | z_s)`; None: all draws that there are.

        Raises:
            PplLvmError: a latent site belongs to a row; `lacks` says so before.
        """
        return super().pointwise(self._there if draws is None else draws, data, particles, seed)

    @checked
    def loo(self, draws: int | None = None, data: object = None, particles: int = 100, seed: int = 0) -> Any:
        """ArviZ's leave-one-out estimate over all chains (an `ELPDData`).

        Raises:
            PplLvmError: the draws are not of the posterior, or a latent site belongs to a row.

        Source: Vehtari, Gelman, Gabry (2017), arXiv:1507.04544.
        """
        from arviz_stats import loo

        self._need("loo")
        tree = self.to_arviz(draws, data, seed, predictive=0)
        name = next(iter(tree["log_likelihood"].data_vars))
        return tails(self._there if draws is None else draws, lambda: loo(tree, var_name=name, pointwise=True))

    @checked
    def log_evidence(self, draws: int = 1000, seed: int = 0) -> float:
        """`log (1/S) sum_s p(x, z_s) / q(z_s)` in nats over all rows: a lower bound on `log p(x)` in expectation.

        Raises:
            PplLvmError: the method has no density q; `lacks` says so before.

        Source: Geweke (1989), Bayesian Inference in Econometric Models Using Monte Carlo Integration, Econometrica 57.
        """
        self._need("log_evidence")
        assert self._outcome.gaussian is not None
        _, lower = self._outcome.gaussian
        noise = self._noise(draws, seed)
        log_q = -0.5 * (noise**2 + np.log(2 * np.pi)).sum(1) - np.log(np.diag(lower)).sum()
        log_w = self._sampler.log_joint(self._trained, self._gaussian(noise)).astype(np.float64) - log_q
        return float(log_w.max() + np.log(np.mean(np.exp(log_w - log_w.max()))))

    @checked
    def active_units(
        self, threshold: float = 0.01, draws: int | None = None, data: object = None, seed: int = 0
    ) -> dict[str, int]:
        """As for any fit, over the rows of the fit."""
        return super().active_units(threshold, self._there if draws is None else draws, data, seed)

    @checked
    def to_arviz(
        self,
        draws: int | None = None,
        data: object = None,
        seed: int = 0,
        *,
        particles: int = 100,
        predictive: int | None = None,
        prior: int = 0,
    ) -> DataTree:
        """As for any fit, with the chains as they were run where all draws are asked for (None).

        `log_likelihood` is there where all rows share the latents; `sample_stats` has what the library reports of every
        draw, `log_p` of the whole draw and `row_log_p` of each row.
        """
        chains, length = self._outcome.u.shape[:2]
        count = self._there if draws is None else draws
        tree = super().to_arviz(count, data, seed, particles=particles, predictive=predictive, prior=prior)
        as_run = self._outcome.gaussian is None and count == chains * length
        for group in tree.children.values():
            found = group.to_dataset()
            if as_run and found.sizes.get("draw") == count:
                flat = found.isel(chain=0, drop=True)
                index = {"chain": ("draw", np.repeat(np.arange(chains), length))}
                index |= {"step": ("draw", np.tile(np.arange(length), chains))}
                split = flat.drop_vars("draw").assign_coords(index).set_index(draw=["chain", "step"]).unstack("draw")
                found = split.rename(step="draw").transpose("chain", "draw", ...)
            if group.name == "sample_stats":
                found = found.drop_vars(["log_q", "log_weight", "row_log_q", "row_log_weight"])
                if as_run:
                    found = found.assign({n: (("chain", "draw"), v) for n, v in self.stats.items()})
            group.dataset = found
        return tree

    def _how(self) -> dict[str, Any]:
        return {"method": type(self.method).__name__}

    @property
    def _there(self) -> int:
        """Draws that there are; a Gaussian has any number."""
        return 1000 if self._outcome.gaussian is not None else int(np.prod(self._outcome.u.shape[:2]))

    def _rows_of(self, data: object) -> Call:
        """The rows that are asked for, if there is a posterior of them."""
        call, own = self._call(data), self._data
        if own is None and "new_rows" in self.lacks:
            raise DataError(
                f"The fit was loaded without its rows, and its draws are of these alone: {self.lacks['new_rows']}; or "
                f"load(path, data=rows), with the rows of the fit."
            )
        pairs = [] if own is None else list(zip(call.leaves, own.leaves, strict=False))
        same = own is not None and len(call.leaves) == len(own.leaves) == len(pairs)
        if not (same and all(a is b or np.array_equal(a, b) for a, b in pairs)) and "new_rows" in self.lacks:
            raise DataError(
                f"Other rows than those of the fit were asked for, but method {type(self.method).__name__!r} has no "
                f"posterior for them: {self.lacks['new_rows']}."
            )
        return call

    def _globals(self, draws: int, seed: int) -> dict[str, np.ndarray]:
        values = self._values(self._take(draws, seed))
        return {n: values[n] for n in self._fitted.globals}

    def _take(self, draws: int | None, seed: int) -> np.ndarray:
        """Unconstrained draws `[draws, D]`."""
        if self._outcome.gaussian is not None:
            return self._gaussian(self._noise(self._there if draws is None else draws, seed))
        every = self._outcome.u.reshape(-1, self._outcome.u.shape[-1])
        if draws is None or draws == len(every):
            return every
        if draws < len(every):
            self._say(f"posterior: {draws} of {len(every)} draws, evenly spaced over all chains")
            return every[np.linspace(0, len(every) - 1, draws).round().astype(int)]
        self._say(f"posterior: {draws} draws asked for and {len(every)} there, so they are taken again")
        index = np.random.default_rng(seed).integers(len(every), size=draws - len(every))
        return np.concatenate([every, every[index]])

    def _say(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)

    def _noise(self, draws: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(draws, self._outcome.u.shape[-1]))

    def _gaussian(self, noise: np.ndarray) -> np.ndarray:
        assert self._outcome.gaussian is not None
        mean, lower = self._outcome.gaussian
        return mean + noise @ lower.T

    def _values(self, u: np.ndarray) -> dict[str, np.ndarray]:
        return self._sampler.values(self._trained, u)


@dataclass
class _Drawn(Fitted):
    """A fitted program whose global latents come from a method instead of the guide."""

    source: Callable[[int, int], dict[str, np.ndarray]] = field(kw_only=True)

    def global_draws(self, call: Call, draws: int, seed: int) -> dict[str, np.ndarray]:
        return self.source(draws, seed)


def _count(values: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(values.values())))


def sample(
    program: Program,
    recipe: Recipe,
    data: Call,
    backend: str,
    bind: Callable[[Program], Any],
    *,
    seed: int,
    params: Mapping[str, Any] | None,
    progress: bool,
    messages: list[str],
) -> Sampled:
    """Runs the recipe's method on all rows; `bind(program)` binds the program, without its guide, to the data."""
    began = time.perf_counter()
    method = recipe.method
    assert method is not None
    name = type(method).__name__
    if program.guide is not None:
        messages.append(f"guide: not used, as method {name!r} needs none")
    if recipe.batch_size is not None:
        messages.append(f"batch_size: {recipe.batch_size} not used, as method {name!r} takes all rows at once")
    program = replace(program, guide=None)
    bound = bind(program)
    _check_sites(bound, data, name)
    if bound.row_params:
        data = data.with_rows(len(data.leaves[0]))
    library, methods = backends.load(backend), backends.methods(backend)
    sampler = methods.Sampler(bound, bound.batch(data), method, params)
    outcome = sampler.run(method, seed, progress)
    if not np.isfinite(outcome.u).all():
        raise PplLvmError(
            f"Method {name!r} ended with values that are not finite; lower learning_rate or radius, or bound the "
            f"scales of sites {list(sampler.sites)}."
        )
    diverging = int(np.sum(outcome.stats.get("diverging", 0)))
    if diverging:
        messages.append(f"{name}: {diverging} of {outcome.u.shape[0] * outcome.u.shape[1]} draws diverged")
    return Sampled(
        program=program,
        recipe=recipe,
        backend=backend,
        seed=seed,
        params={n: library.to_numpy(v) for n, v in bound.constrain(outcome.params).items()},
        history=dict(outcome.history),
        seconds=time.perf_counter() - began,
        messages=[*messages, *outcome.notes],
        state=State(backend, seed, 0, name, {}),
        lacks=lacks_of(method, bound, outcome),
        _bound=bound,
        _trained={**sampler.states, **outcome.params},
        _data=data,
        stats=outcome.stats,
        _sampler=sampler,
        _outcome=outcome,
    )


def _check_sites(bound: Any, data: Call, name: str) -> None:
    """Refuses sites whose values a method cannot place, or whose missing entries it would have to draw."""
    sites, program = bound.structure.sites, bound.program
    scanned = [n for n, i in sites.items() if i.scanned]
    if scanned:
        raise LegalityError(
            f"Latent sites {scanned} are inside a scan of the library, which draws them itself, so method {name!r} "
            f"cannot set them; write the scan with ppl.scan, or as a Python loop."
        )
    if not data.known:
        return
    missing = {n for n in sites if not np.all(data.known.get(program.argument_of(n), True))}
    drawn = sorted(n for n in missing if sites[n].role != "observed")
    read = sorted(missing & frozenset().union(*bound.anatomy(bound.batch(data)).parents.values()))
    if drawn or read:
        raise LegalityError(
            f"Sites {drawn or read} miss some of their values, and the model looks at them, so method {name!r} would "
            f"have to draw those; take an objective with a guide for them, or leave the rows out."
        )


def lacks_of(method: Method, bound: Any, outcome: Outcome) -> dict[str, str]:
    """What a fit by a method cannot give, each with the reason."""
    lacks = {
        "log_weight": "draws have no density of their own row, so they are not weighted",
        "state": "a method runs to its end; ask for more draws or steps in a new fit",
        **method.lacks,
    }
    if outcome.gaussian is None:
        lacks.setdefault("log_evidence", "the method gives no density of its draws; take laplace")
    if not outcome.history:
        lacks["loss"] = "it has no objective; look at stats and at ArviZ's r_hat and ess"
    local = sorted(n for n, i in bound.structure.sites.items() if i.local and i.role != "observed")
    if local:
        plate = bound.structure.data_plate
        where = "in no data plate" if plate is None else f"inside data plate {plate!r}"
        lacks["new_rows"] = (
            f"latent sites {local} are {where}, so their posterior is that of the rows that were fitted; fit the "
            f"other rows, or take a variational recipe whose guide looks at the data"
        )
        lacks["without_data"] = f"latent sites {local} are {where}, and their draws are of these rows alone"
        per_row = (
            f"latent sites {local} are {where}, and their draws have no density of a row to weight them by; take a "
            f"variational recipe"
        )
        lacks |= {n: per_row for n in ("pointwise", "loo", "impute", "counterfactuals")}
        lacks["log_likelihood"] = f"{per_row}, or log_evidence of laplace"
    return lacks
