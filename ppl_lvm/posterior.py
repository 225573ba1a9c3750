"""What a fit gives: parameters, history, and the posterior as arrays and as an ArviZ DataTree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppl_lvm import lookup, predict, saving, store
from ppl_lvm.asking import checked
from ppl_lvm.backends.base import ROWS, Call
from ppl_lvm.backends.structure import Plan
from ppl_lvm.data import as_given, check_missing, is_batches, of_sequences, read
from ppl_lvm.errors import DataError, PplLvmError, ProgramError
from ppl_lvm.fitted import CHUNK, ENTRIES, Block, Chunk, Fitted, joined
from ppl_lvm.predict import Codes, Resampled
from ppl_lvm.program import Program
from ppl_lvm.sinks import Arrays, NetCDF

if TYPE_CHECKING:
    from xarray import DataTree

    from ppl_lvm.recipe import Recipe


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    backend: Literal["pyro", "numpyro"]
    seed: int = Field(ge=0)
    step: int = Field(ge=0)
    mode: str
    restart: int = Field(ge=0)


@dataclass(frozen=True)
class State:
    """Everything that a run goes on from: optimiser step, parameters, optimiser, estimators; plain arrays.

    The order of the rows and the noise of a step are functions of (seed, step), so they need no state of their own.
    `fit(..., state=run.state)` continues to the same bits as a run that never stopped, on one machine and its versions.
    """

    backend: str
    seed: int
    step: int
    mode: str
    arrays: Mapping[str, np.ndarray]
    restart: int = 0
    """Which of several restarts from this seed it is."""

    @property
    def described(self) -> dict[str, Any]:
        """All but the arrays, as a manifest has it."""
        names = ("backend", "seed", "step", "mode", "restart")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def of(described: object, arrays: Mapping[str, np.ndarray]) -> State:
        """The state that was `described` so, with its arrays.

        Raises:
            DataError: it describes no state.
        """
        try:
            return State(**_Described.model_validate(described).model_dump(), arrays=arrays)
        except ValidationError as cause:
            first = cause.errors()[0]
            raise DataError(
                f"What was saved describes no state of a fit: {'.'.join(map(repr, first['loc']))}: {first['msg']}."
            ) from cause

    def save(self, path: str | Path) -> None:
        """Writes a folder of safetensors and JSON (no pickle), or replaces the state that it holds.

        Raises:
            StorageError: it cannot be written, or the folder holds something else.
        """
        store.write(path, "state", self.described, {"state": self.arrays})

    @staticmethod
    def load(path: str | Path) -> State:
        """Reads what `save` wrote.

        Raises:
            StorageError: the folder holds no state, or it was damaged or changed.
            DataError: what it holds describes no state.
        """
        found = store.read(path, "state")
        return State.of(found.content, found.arrays.get("state", {}))


@dataclass(frozen=True)
class LogLikelihood:
    """Log likelihood of rows in nats, from importance draws; a lower bound in expectation."""

    values: np.ndarray
    """`[rows]`."""

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def se(self) -> float:
        """Standard error of the mean over rows."""
        return float(self.values.std(ddof=1) / np.sqrt(len(self.values))) if len(self.values) > 1 else float("nan")


@dataclass(frozen=True)
class Posterior:
    """Draws from the guide with their densities, as numpy arrays; rows of one draw share its globals."""

    values: Mapping[str, np.ndarray]
    """Site -> `[draws, rows, ...]`, or `[draws, ...]` for a global site."""
    dims: Mapping[str, tuple[str, ...]]
    """Site -> names of the dimensions after draws: the site's plates, then `<site>_dim_0` and so on."""
    log_p: np.ndarray
    log_q: np.ndarray
    """`[draws, rows]`: `log p(x_n, z_n | g)` and `log q(z_n | x_n, g)` of each row's draw."""
    log_likelihood: Mapping[str, np.ndarray]
    """Observed site -> `[draws, rows]`, given that draw of the row's latents. Where several look at a site that is
    summed out, there is only their joint one, under that site's name, and none if latent sites look at it too."""
    log_p_global: np.ndarray | None = None
    log_q_global: np.ndarray | None = None
    """`[draws]`: `log p(g)`, observed global sites included, and `log q(g)`; None without global latents."""

    @property
    def log_weight(self) -> np.ndarray:
        """`[draws]`: `log p(x, z, g) - log q(z, g)` of a whole draw, all rows and globals."""
        rows = (self.log_p - self.log_q).sum(1)
        if self.log_p_global is None or self.log_q_global is None:
            return np.asarray(rows)
        return np.asarray(rows + self.log_p_global - self.log_q_global)


@dataclass
class Fit:
    """A fitted program. `history["loss"]` is the objective's loss per row in nats at every step."""

    program: Program
    recipe: Recipe
    backend: str
    seed: int
    params: dict[str, Any]
    """Constrained values by name, as numpy arrays."""
    history: dict[str, np.ndarray]
    seconds: float
    messages: list[str]
    state: State
    lacks: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """What this fit cannot give, by name, each with the reason (of fits by a method)."""
    _bound: Any = field(repr=False)
    _trained: Mapping[str, Any] = field(repr=False)
    _data: Call | None = field(repr=False)
    _example: Call | None = field(default=None, repr=False)
    _fitted: Fitted = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self._example is None:
            assert self._data is not None
            self._example = self._data.map(lambda a: np.asarray(a)[:0])
        objective = self.recipe.objective
        marginal = {} if objective is None else dict(objective.marginal or ())
        given = self.program, self.backend, self._bound, self._trained, self._example
        self._fitted = Fitted(*given, marginal, self.messages)

    @property
    def row_params(self) -> frozenset[str]:
        """Parameters that have an entry for every row of the fit; `refit` trains them for other rows."""
        return frozenset(self._bound.row_params)

    @property
    def masked(self) -> bool:
        """Whether entries of its data may be missing."""
        assert self._example is not None
        return bool(self._example.known)

    @checked
    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the fit to a folder of safetensors, JSON and JSON lines (no pickle), which `ppl_lvm.load` reads.

        Parameters, state, history and recipe are in it, the program's name, options and source, and a fingerprint of
        the training data, but not the data. The folder is complete or not there, whenever the process is killed.

        Args:
            path: a folder of its own, made if it is not there.
            overwrite: replaces what was saved there before; until the new one is complete, the old one stays.

        Raises:
            StorageError: something was saved there before, the folder holds other files, it cannot be written, or an
                option of the program cannot be stored.

        Example:
            >>> import tempfile
            >>> from ppl_lvm import fit, load
            >>> run = fit("probabilistic_pca", data=np.ones((20, 4)), backend="pyro", steps=5)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     run.save(f"{folder}/run")
            ...     again = load(f"{folder}/run")
            >>> again.decode({"z": np.zeros(2)})["x"].shape
            (1, 1, 4)
        """
        saving.save(self, path, overwrite)

    def without_data(self) -> Fit:
        """The same fit without its training rows: every method then needs `data`, or a number of rows."""
        self._need("without_data")
        return replace(self, _data=None)

    # Densities.

    @checked
    def log_likelihood(self, data: object = None, draws: int = 5000, seed: int = 0) -> LogLikelihood:
        """`log (1/K) sum_k w_k` per row with `w = p(x, z) / q(z | x)` and K = `draws`, in nats.

        With global latents, `E_q(g)` is inside the logarithm: one draw of the row's latents for each of the globals.
        `data = None` takes the rows of the fit. Draws are taken in chunks of one size; what the last chunk has too
        many is dropped, so that the mean is over `draws` of them.

        Raises:
            ProgramError: the program subsamples its own data plate, so that rows cannot be told apart.
            DataError: no rows, rows of other shapes than the fit's, NaN, draws < 1.

        Source: Burda, Grosse, Salakhutdinov (2015), arXiv:1509.00519.
        """
        self._need("log_likelihood")
        fitted, call = self._fitted, self._call(data)
        given = fitted.global_draws(call, draws, seed)

        def of_block(block: Block) -> np.ndarray:
            def work(chunk: Chunk) -> np.ndarray:
                log_w = self._log_w(block, chunk, fitted.plan(block.bound, chunk.size), given)
                return _log_sum_exp(log_w.reshape(chunk.size, -1)[: chunk.wanted], 0)

            total = np.full(block.rows, -np.inf)
            for _, found in fitted.chunks(draws, block, seed, CHUNK, work):
                total = np.logaddexp(total, found)
            return np.asarray(total - np.log(draws))

        return LogLikelihood(np.concatenate(list(fitted.blocks(call, of_block))))

    @checked
    def pointwise(
        self, draws: int = 1000, data: object = None, particles: int = 100, seed: int = 0
    ) -> np.ndarray:
        """`[draws, rows]`: `log (1/K) sum_k p(x_n, z_k | g_s) / q(z_k | x_n, g_s)` for each draw g_s of the globals.

        The row's own latents are summed out by K = `particles` importance draws (one is exact where there are none).
        `exp` of it is unbiased for `p(x_n | g_s)`, so it is low by half the squared relative error of that mean.

        Raises:
            ProgramError: there are no global latents, so every draw would have the same `p(x_n)`.
        """
        self._need("pointwise")
        fitted, call = self._fitted, self._call(data)
        self._need_globals("A log-likelihood for each draw of the globals")
        given = fitted.global_draws(call, draws, seed)
        K = particles if fitted.structure.drawn(local=True) else 1

        def of_block(block: Block) -> np.ndarray:
            def work(chunk: Chunk) -> np.ndarray:
                log_w = self._log_w(block, chunk, fitted.plan_of(block.bound, K, chunk.size), given)
                return np.asarray(_log_sum_exp(log_w[: chunk.wanted], 1) - np.log(K))

            return np.concatenate([found for _, found in fitted.chunks(draws, block, seed, CHUNK, work, K)])

        return np.concatenate(list(fitted.blocks(call, of_block)), 1)

    @checked
    def loo(self, draws: int = 1000, data: object = None, particles: int = 100, seed: int = 0) -> Any:
        """ArviZ's leave-one-out estimate for draws of the globals from an approximate posterior (an `ELPDData`).

        Importance ratios of the draws are `p(x, g) / q(g)` with the rows' own latents summed out (see `to_arviz`).

        Raises:
            ProgramError: there are no global latents. Leaving a row out then changes nothing but that row's own latent,
                whose posterior becomes its prior; use the log-likelihood of held-out rows.

        Source: Vehtari, Gelman, Gabry (2017), arXiv:1507.04544; Magnusson et al. (2019), arXiv:1904.10679.
        """
        from arviz_stats import loo, loo_approximate_posterior

        self._need("loo")
        self._need_globals("Leave-one-out")
        tree = self.to_arviz(draws, data, seed, particles=particles, predictive=0)
        stats, name = tree["sample_stats"], next(iter(tree["log_likelihood"].data_vars))
        ratio = np.asarray(stats["log_weight"])
        # Draws of the exact posterior have one ratio, whose tail has no shape that could be fitted.
        options = {"var_name": name, "pointwise": True}
        if np.ptp(ratio) < 1e-6 * max(1.0, np.abs(ratio).max()):
            return tails(draws, lambda: loo(tree, **options))
        return tails(draws, lambda: loo_approximate_posterior(tree, stats["log_p"], stats["log_q"], **options))

    # Draws.

    @checked
    def posterior(self, draws: int = 1000, data: object = None, seed: int = 0) -> Posterior:
        """`draws` from the guide for every row of `data` (None: the rows of the fit)."""
        call = self._call(data)
        return self._evaluated(call, draws, seed, self._fitted.global_draws(call, draws, seed))

    def _evaluated(
        self, call: Call, draws: int, seed: int, given: Mapping[str, np.ndarray], whole: bool = False
    ) -> Posterior:
        """Draws with their densities; `given` `[draws, ...]` has those of the globals, or of all latents (`whole`)."""
        fitted, rows = self._fitted, self._fitted.rows(call)
        fitted.check_room(draws, rows, fitted.drawn, ", or write_posterior(path) writes them to a file")
        sink = Arrays(draws, rows)
        totals = list(fitted.blocks(call, partial(self._into, sink, draws, seed, given, 0), whole=whole))
        values = {n: fitted.squeezed(n, given[n], 1) for n in fitted.globals}
        values = {n: values[n] if n in values else sink.of["value", n] for n in fitted.drawn}
        of_rows, total = sink.group("rows"), totals[0]
        dims = {n: self._dims(n, v.ndim - 1) for n, v in values.items()}
        log_p, log_q = of_rows["log_p"], of_rows["log_q"]
        return Posterior(values, dims, log_p, log_q, sink.group("lik"), total.get("log_p"), total.get("log_q"))

    def _into(
        self,
        sink: Arrays,
        draws: int,
        seed: int,
        given: Mapping[str, np.ndarray],
        row: int,
        block: Block,
    ) -> dict[str, np.ndarray]:
        """Puts draws of a block's rows, the first of which is number `row + block.first`, into arrays.

        Gives the densities of the globals, `[draws]`.
        """
        fitted = self._fitted

        def work(chunk: Chunk) -> dict[str, dict[str, np.ndarray]]:
            return self._table(block, chunk, given)

        totals = []
        for chunk, table in fitted.chunks(draws, block, seed, ENTRIES, work):
            for group in ("value", "rows", "lik"):
                for n, piece in table[group].items():
                    own = fitted.squeezed(n, piece, 2) if group == "value" else piece
                    sink.put(group, n, own, chunk.first, row + block.first)
            totals.append(table["total"])
        return joined(totals, 0)

    @checked
    def write_posterior(
        self, path: str | Path, draws: int = 1000, data: object = None, seed: int = 0
    ) -> Path:
        """Draws as `posterior` makes them, written block by block to a netCDF file; memory does not grow with the rows.

        `arviz.from_netcdf(path)` opens it. Groups are `posterior`, and `sample_stats` with `row_log_p`, `row_log_q`
        and `row_log_weight` of each row's draw; without global latents `log_p`, `log_q`, `log_weight` of whole draws.

        Args:
            path: of the file; it is there when it is whole, and one that was there is replaced.
            data: as for any method (None: the rows of the fit), or batches, of which one is held at a time.

        Raises:
            DataError: the file cannot be written.
            ProgramError: the guide's global latents look at all rows, which batches do not hold together.
        """
        fitted, batched = self._fitted, is_batches(data)
        parts = (self._call(batch) for batch in data) if batched else iter([self._call(data)])  # type: ignore[attr-defined]
        if batched and fitted.globals_look_at_rows:
            raise ProgramError(
                "The guide draws global latents from all rows, and batches never are all of them; pass arrays."
            )
        first = next(parts, None)
        if first is None:
            raise DataError("The batches have no rows.")
        given = fitted.global_draws(first, draws, seed)
        rows = None if batched else fitted.rows(first)
        ranks = {n: fitted.own_rank(n) + fitted.structure.sites[n].local for n in fitted.drawn}
        dims = {n: self._dims(n, rank) for n, rank in ranks.items()}
        plate, whole = fitted.structure.data_plate or "row", np.zeros((2, draws))
        with NetCDF(path, draws, rows, plate, dims, self._attributes(draws)) as file:
            row = blocks = 0
            for call in itertools.chain([first], parts):
                file.grow(fitted.rows(call))
                work = partial(self._to_file, file, draws, seed, given, row)
                for sums in fitted.blocks(call, work, before=blocks):
                    whole += sums
                    blocks += 1
                row += fitted.rows(call)
            for n in fitted.globals:
                file.put("posterior", n, fitted.squeezed(n, given[n], 1), 0, None)
            if not fitted.globals:
                for n, total in (("log_p", whole[0]), ("log_q", whole[1]), ("log_weight", whole[0] - whole[1])):
                    file.put("sample_stats", n, total, 0, None)
        return file.path

    def _to_file(
        self, file: NetCDF, draws: int, seed: int, given: Mapping[str, np.ndarray], row: int, block: Block
    ) -> np.ndarray:
        """Writes the draws of a block; gives the sums over its rows of log p and log q, `[2, draws]`."""
        sums = []

        def work(chunk: Chunk) -> dict[str, dict[str, np.ndarray]]:
            return self._table(block, chunk, given)

        for chunk, table in self._fitted.chunks(draws, block, seed, ENTRIES, work):
            at = chunk.first, row + block.first
            for n, piece in table["value"].items():
                file.put("posterior", n, self._fitted.squeezed(n, piece, 2), *at)
            log_p, log_q = table["rows"]["log_p"], table["rows"]["log_q"]
            for n, piece in (("row_log_p", log_p), ("row_log_q", log_q), ("row_log_weight", log_p - log_q)):
                file.put("sample_stats", n, piece, *at)
            sums.append(np.stack([log_p.sum(1), log_q.sum(1)]))
        return np.concatenate(sums, 1)

    @checked
    def predictive(self, draws: int = 100, data: object = None, seed: int = 0) -> dict[str, np.ndarray]:
        """Observed sites drawn anew: `x' ~ p(x' | z, g)` with `z, g ~ q(. | x)`; site -> `[draws, rows, ...]`.

        One draw of the globals is shared by all rows.
        """
        return predict.predictive(self._fitted, self._call(data), draws, seed)

    @checked
    def encode(self, data: object = None, draws: int = 100, seed: int = 0) -> Codes:
        """`E_q(z | x) z` and its standard deviation for the latents of each row: site -> `[rows, ...]`.

        Over `draws` draws from the guide, so the mean has a standard error of `sd / sqrt(draws)`.
        """
        return predict.encode(self._fitted, self._call(data), draws, seed)

    @checked
    def decode(
        self,
        values: Mapping[str, Any],
        data: object = None,
        rows: int | None = None,
        draws: int = 1,
        mean: bool = True,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Observed sites given values of latents: `E[x | z]`, or draws where `mean` is False; `[draws, rows, ...]`.

        `values` has an array `[rows, ...]` per site (one row's value serves all). Latents that are not given come from
        the model, drawn given those that are set above them (`p(. | do(values))`), globals from the guide.

        Raises:
            DataError: unknown sites, wrong shapes, values outside a site's support.
            ProgramError: a site looks at data, which then have to be given.
        """
        call, _ = self._rows_for(values, data, rows)
        return predict.decode(self._fitted, values, call, draws, mean, seed)

    @checked
    def impute(
        self, data: object, draws: int = 100, particles: int = 1000, fill: float = 0.0, seed: int = 0
    ) -> Resampled:
        """Missing entries (NaN) of observed sites drawn from `p(x_missing | x_seen)`; entries seen are kept.

        For each row `particles` draws of its latents are taken from the guide, which sees `fill` for what is missing,
        are weighted by `w_k = p(z_k) p(x_seen | z_k) / q(z_k | x_filled)` and picked in proportion to it; the missing
        entries are then drawn given the latents. Right as `particles` grows; `ess` says how many draws carry a row.

        Returns:
            `values`: observed site -> `[draws, rows, ...]`; `ess` `[rows]`.

        Raises:
            DataError: an argument that no site observes has missing values.
            ProgramError: other sites look at the argument, or rows are missing in part where the distribution has no
                density of single elements.

        Source: Rezende, Mohamed, Wierstra (2014), arXiv:1401.4082, section 6.3, here by importance resampling.
        """
        self._need("impute")
        call = self._fitted.check(read(data, self.program, "mask"))
        return predict.impute(self._fitted, call, draws, particles, fill, seed)

    @checked
    def conditional(
        self,
        given: Mapping[str, Any],
        rows: int | None = None,
        data: object = None,
        draws: int = 100,
        particles: int = 1000,
        seed: int = 0,
    ) -> Resampled:
        """New rows with some sites fixed: every site -> `[draws, rows, ...]` from `p(. | given, g)`, g from the guide.

        Sites are drawn from the model in order. That is exact where the fixed sites have no other ancestors than fixed
        ones and globals. Otherwise `particles` draws of each row are weighted by `prod p(given | ancestors)` and picked
        in proportion to it: right as `particles` grows; `ess` says how many of them carry a row.

        Raises:
            DataError: unknown sites, wrong shapes, values outside a support, no particle that has a density.
        """
        call, _ = self._rows_for(given, data, rows)
        return predict.conditional(self._fitted, given, call, draws, particles, seed)

    @checked
    def do(
        self,
        values: Mapping[str, Any],
        data: object = None,
        rows: int | None = None,
        draws: int = 100,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """An intervention: sites get these values whatever the model says of them, and all else follows.

        Without `data`: `p(. | do(values))`, the other latents of a row from the model, globals from the guide. With
        `data`, a counterfactual in three steps: the guide infers the latents from the rows as they were (abduction);
        the sites get their values, their own densities are cut, and data of that name are replaced; what depends on
        them is drawn anew from the model, latents included, and all that does not keeps its value or its data. Noise
        inside a site's distribution is drawn anew; noise that should be kept has to be a latent site of its own.

        Returns:
            Every site of the model -> `[draws, rows, ...]`, or `[draws, ...]` for a global site.

        Raises:
            DataError: unknown sites, wrong shapes, values outside a site's support.
            ProgramError: a counterfactual would keep a site that is summed out, which has no posterior.

        Source: Pearl (2009), Causality, section 7.1.
        """
        call, factual = self._rows_for(values, data, rows)
        if factual:
            self._need("counterfactuals")
        return predict.do(self._fitted, values, call, factual, draws, seed)

    @checked
    def prior_predictive(
        self, rows: int = 100, seed: int = 0, data: object = None
    ) -> dict[str, np.ndarray]:
        """Latent and observed sites drawn from the model, `[rows, ...]`, one draw of any global site.

        Data that the model looks at (covariates) are the first rows of `data` (None: of the fit), repeated if needed.

        Raises:
            ProgramError: the program takes no data, so it cannot be asked for a number of rows, or needs covariates.
        """
        if data is None and self._data is None:
            call, _ = self._rows_for({}, None, rows)
        else:
            source = self._call(data)
            if not source.leaves:
                raise ProgramError("The program takes no data, so it cannot be asked for a number of rows.")
            call = self._fitted.repeated(source, rows)
        made = predict.prior(self._fitted, call, 1, seed)
        return {n: v[0] for n, v in made.items()}

    @checked
    def active_units(
        self, threshold: float = 0.01, draws: int = 100, data: object = None, seed: int = 0
    ) -> dict[str, int]:
        """Units whose posterior mean varies over rows by more than `threshold`, per local latent site.

        `Var_x E_q(z | x) z` over the rows of `data` (None: those of the fit). The mean is over `draws`, and what its
        noise adds to the variance, `E_x Var_q(z | x) z / draws`, is taken off: it alone is 0.01 for a unit that
        ignores the data, at 100 draws.

        Source: Burda, Grosse, Salakhutdinov (2015), arXiv:1509.00519, section 5.2.
        """
        codes = self.encode(data, draws, seed)
        return {
            n: int((codes.mean[n].var(0) - (codes.sd[n] ** 2).mean(0) / draws > threshold).sum()) for n in codes.mean
        }

    @checked
    def to_arviz(
        self,
        draws: int = 1000,
        data: object = None,
        seed: int = 0,
        *,
        particles: int = 100,
        predictive: int | None = None,
        prior: int = 0,
    ) -> DataTree:
        """The fit as an ArviZ DataTree: chain = 1, draw = `draws`, dimensions named after plates.

        Groups:
            posterior: draws of the guide, all rows, one draw of the globals for all of them.
            posterior_predictive: `predictive` draws (None: 100 at most); 0 leaves the group out.
            prior, prior_predictive: `prior` draws; 0 leaves them out.
            log_likelihood: with global latents only, `log p(x_n | g_s)` with the row's own latents summed out by
                `particles` importance draws (see `pointwise`); named after the observed site, "joint" for several.
                Without global latents there is nothing that `az.loo` could use, and the group is left out.
            sample_stats: of whole draws `log_p`, `log_q` and `log_weight = log_p - log_q`: with global latents
                `log p(g_s) + sum_n log p(x_n | g_s)` and `log q(g_s)`, latents of rows summed out; without,
                `sum_n log p(x_n, z_n)` and `sum_n log q(z_n | x_n)`. `row_log_p`, `row_log_q` and `row_log_weight` are
                those of each row's draw of its latents, `log p(x_n, z_n | g_s)` and so on.
            observed_data, constant_data: the rows; the latter are arguments that no site observes.
        """
        from ppl_lvm.to_arviz import to_arviz

        fitted, call = self._fitted, self._call(data)
        found = self.posterior(draws, call, seed)
        rows = fitted.rows(call)
        observed = self._observed_data(call)
        sources = frozenset().union(*(fitted.anatomy.sources[n] for n in observed))
        constant = {n: np.asarray(a) for n, a in fitted.named(call).items() if n not in sources | observed.keys()}
        stats = {
            "log_p": found.log_p.sum(1),
            "log_q": found.log_q.sum(1),
            "row_log_p": found.log_p,
            "row_log_q": found.log_q,
            "row_log_weight": found.log_p - found.log_q,
        }
        likelihood: dict[str, np.ndarray] = {}
        if "pointwise" in self.lacks:
            stats["log_p"] = stats["log_p"] + (0.0 if found.log_p_global is None else found.log_p_global)
        elif fitted.globals:
            summed = self.pointwise(draws, call, particles, seed)
            likelihood = {next(iter(observed)) if len(observed) == 1 else "joint": summed}
            stats["log_p"] = found.log_p_global + summed.sum(1)
            stats["log_q"] = found.log_q_global
        stats["log_weight"] = stats["log_p"] - stats["log_q"]
        again = min(draws, 100) if predictive is None else predictive
        before = predict.prior(fitted, call, prior, seed) if prior else {}
        dims = {n: self._dims(n, v.ndim - 1) for n, v in before.items()}
        dims |= {n: self._dims(n, v.ndim) for n, v in observed.items()} | dict(found.dims)
        plate = fitted.structure.data_plate or "row"
        dims |= {n: (plate,) for n in ("row_log_p", "row_log_q", "row_log_weight")}
        dims |= {n: (plate,) for n in constant if len(constant[n]) == rows}
        return to_arviz(
            {
                "posterior": found.values,
                "posterior_predictive": self.predictive(again, call, seed) if again else {},
                "prior": {n: v for n, v in before.items() if n not in observed},
                "prior_predictive": {n: v for n, v in before.items() if n in observed},
                "log_likelihood": likelihood,
                "sample_stats": stats,
                "observed_data": observed,
                "constant_data": constant,
            },
            dims,
            plate,
            self._attributes(draws),
        )

    # Parts.

    def _call(self, data: object) -> Call:
        if data is None:
            if self._data is None:
                raise DataError("The fit holds no training rows (it was loaded, or is without_data); pass data=.")
            if self._data.sample:
                raise DataError("The fit was made from batches, whose rows it does not keep; pass data=.")
            return self._data
        call = read(data, self.program, "mask" if self.masked else None)
        self._fitted.check(call, not isinstance(data, Call) and of_sequences(data))
        check_missing(call, self._bound, self.program)
        if self._bound.row_params and ROWS not in call.kwargs:
            raise DataError(
                f"Parameters {sorted(self._bound.row_params)} have an entry for every row of the fit, so they say "
                f"nothing of other rows; call refit(run, data) first, which fits them with all others frozen."
            )
        return call

    def _rows_for(self, values: Mapping[str, Any], data: object, rows: int | None) -> tuple[Call, bool]:
        """Rows to simulate: the data where they are given (True), or blanks, as many as values have or are asked for.

        Raises:
            ProgramError: the model looks at data, and there are none.
            DataError: numbers of rows contradict each other.
        """
        fitted = self._fitted
        if data is not None:
            call = self._call(data)
            if rows is not None and rows != fitted.rows(call):
                raise DataError(f"rows = {rows}, and the data have {fitted.rows(call)} rows.")
            return call, True
        known = fitted.sites("latent", "observed")
        for name in values:
            if name not in known:
                raise DataError(f"There is no site {name!r} to give values to. {lookup.valid(name, known, 'Sites')}")
        found = {
            n: len(v) for n, v in values.items() if fitted.structure.sites[n].local and np.ndim(v) > fitted.own_rank(n)
        }
        asked = found | ({"rows": rows} if rows is not None else {})
        if len(set(asked.values())) > 1:
            raise DataError(f"The values are for different numbers of rows: {asked}.")
        wanted = next(iter(asked.values()), 1)
        if wanted < 1:
            raise DataError("The values are for no rows.")
        unset = fitted.anatomy.needed - values.keys()
        if unset:
            readers = sorted(n for n, seen in fitted.anatomy.arguments.items() if seen & unset)
            raise ProgramError(f"Sites {readers} look at the data {sorted(unset)}; pass data= with the rows meant.")
        return fitted.blank(wanted), False

    def _need(self, what: str) -> None:
        """Refuses what this fit lacks."""
        if what in self.lacks:
            method = type(self.recipe.algorithm).__name__
            raise PplLvmError(f"A fit by method {method!r} has no {what}: {self.lacks[what]}.")

    def _need_globals(self, what: str) -> None:
        if not self._fitted.globals:
            raise ProgramError(
                f"{what} needs latents that all rows share, and this program has none: leaving a row out would turn "
                f"the posterior of its own latents into their prior, and log p(x_n) is the same for every draw. "
                f"Use log_likelihood(held_out_rows)."
            )

    def _log_w(self, block: Block, chunk: Chunk, plan: Plan, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """`[M, K, B]`, with these globals."""
        values = chunk.of(given) or None
        log_w = block.bound.log_w(self._trained, block.held, chunk.key, plan, values)
        return self._fitted.numpy(log_w).astype(np.float64)

    def _table(self, block: Block, chunk: Chunk, given: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        """Arrays `[draws, rows, ...]` of one run without gradients, and `[draws]` for the globals."""
        fitted, plan = self._fitted, self._fitted.plan(block.bound, chunk.size)
        table = block.bound.evaluate(self._trained, block.held, chunk.key, plan, fitted.as_table(chunk.of(given)))
        sites, draws = fitted.structure.sites, chunk.size

        def flat(name: str, x: Any) -> np.ndarray:
            x = fitted.numpy(x)
            x = x.reshape(draws, *x.shape[2:]) if sites[name].local else np.broadcast_to(x, (draws, *x.shape[1:]))
            return x[: chunk.wanted]

        def total(label: str, local: bool) -> np.ndarray:
            start = np.zeros((chunk.wanted, block.rows) if local else chunk.wanted)
            rows = {n: row[label] for n, row in table.items() if sites[n].local == local}
            return sum((flat(n, density) for n, density in rows.items() if density is not None), start)

        sides = ("log_p", "log_q")
        drawn = [n for n in fitted.drawn if sites[n].local]
        observed = [n for n in table if sites[n].local and plan.facts(fitted.structure, n).role == "observed"]
        return {
            "value": {n: flat(n, table[n]["value"]) for n in drawn},
            "rows": {side: total(side, True) for side in sides},
            "total": {side: total(side, False) for side in sides} if fitted.globals else {},
            "lik": {n: flat(n, table[n]["log_p"]) for n in observed},
        }

    def _dims(self, name: str, ndim: int) -> tuple[str, ...]:
        """Names of a site's axes, draws left out: its plates, the data's first, then event axes by number."""
        fitted = self._fitted
        local = fitted.structure.sites[name].local
        plates = [fitted.structure.data_plate or "row"] * local + fitted.plates_of(name)[1]
        names = [n or f"{name}_batch_{i}" for i, n in enumerate(plates)]
        return (*names, *(f"{name}_dim_{d}" for d in range(ndim - len(names))))

    def _observed_data(self, call: Call) -> dict[str, np.ndarray]:
        """Values of the observed sites, `[rows, ...]`: the data of that name, or what the model observes."""
        fitted, given = self._fitted, as_given(call, self.program)
        names = fitted.sites("observed")
        named = {n: given[a] for n in names if (a := self.program.argument_of(n)) in given}
        found = {n: np.asarray(v) for n, v in named.items() if fitted.rows(call) == len(v)}
        if len(found) < len(names):
            how = predict.Forward(keep=frozenset(names))
            seen = predict.forward(fitted, call, 1, 0, how, names=frozenset(names) - found.keys())
            found |= {n: v[0] for n, v in seen.items()}
        return {n: found[n] for n in names}

    def _attributes(self, draws: int) -> dict[str, Any]:
        from datetime import UTC, datetime

        from ppl_lvm.to_arviz import versions

        library = {"pyro": "pyro-ppl", "numpyro": "numpyro"}[self.backend]
        found = versions()
        return {
            "program": self.program.name,
            "program_options": dict(self.program.options),
            "recipe": self.recipe.name,
            **self._how(),
            "backend": self.backend,
            "seed": self.seed,
            "draws": draws,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "inference_library": library,
            "inference_library_version": found[library],
            "versions": found,
        }

    def _how(self) -> dict[str, Any]:
        """Names of the algorithms."""
        from ppl_lvm import legality

        assert self.recipe.objective is not None
        plan, _ = legality.plan(self.recipe.objective, self.recipe.estimator, self._bound.structure)
        return {
            "objective": type(self.recipe.objective).__name__,
            "estimator": {n: type(e).__name__ for n, e in plan.estimators.items()},
        }


LEAST_TAIL = 25
"""Draws of which a fifth is a tail that ArviZ fits a shape to."""


def tails(draws: int, estimate: Callable[[], Any]) -> Any:
    """What ArviZ makes of that many draws.

    Raises:
        DataError: they are too few, or their importance ratios have no tail.
    """
    if draws < LEAST_TAIL:
        raise DataError(f"draws = {draws}; leave-one-out fits a shape to their tail, so ask for {LEAST_TAIL} or more.")
    try:
        return estimate()
    except (ValueError, IndexError) as error:
        raise DataError(
            f"ArviZ finds no leave-one-out estimate from {draws} draws ({error}); ask for more of them, or look at "
            f"run.pointwise(draws), whose rows it is made of."
        ) from error


def _log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    peak = x.max(axis, keepdims=True)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(x - np.where(np.isfinite(peak), peak, 0.0)).sum(axis, keepdims=True))
    return np.asarray((peak + total).squeeze(axis))
