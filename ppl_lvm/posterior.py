"""What a fit gives: parameters, history, and the posterior as arrays and as an ArviZ DataTree."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_lvm import backends
from ppl_lvm.backends.base import Call, Plan
from ppl_lvm.errors import DataError, ProgramError
from ppl_lvm.program import Program

if TYPE_CHECKING:
    from xarray import DataTree

    from ppl_lvm.recipe import Recipe

ENTRIES = 2**24
"""Numbers held at once while draws are evaluated, roughly: draws x rows x the size of a row."""

CHUNK = 2**20
"""The same for log weights."""


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

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file (no pickle)."""
        from safetensors.numpy import save_file

        described = {"backend": self.backend, "seed": str(self.seed), "step": str(self.step), "mode": self.mode}
        save_file({n: np.array(a, order="C") for n, a in self.arrays.items()}, str(path), metadata=described)

    @staticmethod
    def load(path: str | Path) -> State:
        """Reads what `save` wrote.

        Raises:
            DataError: the file is no state.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                described = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return State(
                described["backend"], int(described["seed"]), int(described["step"]), described["mode"], arrays
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path} is not a saved state of a fit ({error}); pass a file of State.save.") from error


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
    """Draws from the guide with their densities, as numpy arrays."""

    values: Mapping[str, np.ndarray]
    """Site -> `[draws, rows, ...]`, or `[draws, ...]` for a global site."""
    dims: Mapping[str, tuple[str, ...]]
    """Site -> names of the dimensions after draws."""
    log_p: np.ndarray
    log_q: np.ndarray
    """`[draws, rows]`: joint density and guide's density of each row's draw."""
    log_likelihood: Mapping[str, np.ndarray]
    """Observed site -> `[draws, rows]`."""


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
    _data: Call = field(repr=False)
    _bounds: dict[Any, Any] = field(default_factory=dict, repr=False)

    def log_likelihood(self, data: object = None, draws: int = 5000, seed: int = 0) -> LogLikelihood:
        """`log (1/K) sum_k w_k` per row with `w = p(x, z) / q(z | x)` and K = `draws`, in nats.

        With global latents, `E_q(g)` is inside the logarithm: one draw of the row's latents for each of the globals.
        `data = None` takes the rows of the fit. Draws are taken in chunks of one size; what the last chunk has too
        many is dropped, so that the mean is over `draws` of them.

        Raises:
            ProgramError: the program subsamples its own data plate, so that rows cannot be told apart.

        Source: Burda, Grosse, Salakhutdinov (2015), arXiv:1509.00519.
        """
        blocks = []
        for batch, bound in self._blocks(self._call(data)):
            total = np.full(bound.structure.rows, -np.inf)
            size, keys = self._chunks(draws, batch, seed, CHUNK)
            plan, held = self._plan(bound, size), bound.batch(batch)
            for i, key in enumerate(keys):
                log_w = self._numpy(bound.log_w(self._trained, held, key, plan)).astype(np.float64)
                log_w = log_w.reshape(size, -1)[: draws - i * size]
                peak = log_w.max(0)
                total = np.logaddexp(total, peak + np.log(np.exp(log_w - peak).sum(0)))
            blocks.append(total - np.log(draws))
        return LogLikelihood(np.concatenate(blocks))

    def posterior(self, draws: int = 1000, data: object = None, seed: int = 0) -> Posterior:
        """`draws` from the guide for every row of `data` (None: the rows of the fit)."""
        blocks = []
        for batch, bound in self._blocks(self._call(data)):
            size, keys = self._chunks(draws, batch, seed, ENTRIES)
            plan, held = self._plan(bound, size), bound.batch(batch)
            chunks = [self._table(bound, held, key, plan, draws - i * size) for i, key in enumerate(keys)]
            blocks.append(_concatenate(chunks, 0))
        local = {n: i.local for n, i in self._bound.structure.sites.items()}
        plate = self._bound.structure.data_plate or "row"
        drawn = [i.name for i in self._bound.structure.sites.values() if i.role != "observed" and not i.fixed]
        values = {
            n: np.concatenate([b["value"][n] for b in blocks], 1) if local[n] else blocks[0]["value"][n]
            for n in drawn
        }
        rest = {k: np.concatenate([b[k] for b in blocks], 1) for k in ("log_p", "log_q")}
        likelihood = {n: np.concatenate([b["lik"][n] for b in blocks], 1) for n in blocks[0]["lik"]}
        dims = {
            n: tuple(
                [plate] * local[n] + [f"{n}_dim_{d}" for d in range(v.ndim - 1 - local[n])]
            )
            for n, v in values.items()
        }
        return Posterior(values, dims, rest["log_p"], rest["log_q"], likelihood)

    def predictive(self, draws: int = 100, data: object = None, seed: int = 0) -> dict[str, np.ndarray]:
        """Observed sites drawn anew from the posterior predictive, `[draws, rows, ...]`."""
        observed = self._observed()
        blocks = []
        for batch, bound in self._blocks(self._call(data)):
            made = bound.simulate(self._trained, bound.batch(batch), self._key(seed, 0), draws)
            blocks.append({n: self._numpy(made[n]) for n in observed})
        return {n: np.concatenate([b[n] for b in blocks], 1) for n in observed}

    def prior_predictive(self, rows: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
        """Latent and observed sites drawn from the model, `[rows, ...]`, one draw of any global site."""
        if not self._data.leaves:
            raise ProgramError("The program takes no data, so it cannot be asked for a number of rows.")
        template = self._data.map(lambda a: np.resize(np.asarray(a), (rows, *np.shape(a)[1:])))
        bound = self._bound_for(template)
        made = bound.simulate(self._trained, bound.batch(template), self._key(seed, 0), 1, prior=True)
        return {n: self._numpy(v)[0] for n, v in made.items()}

    def active_units(
        self, threshold: float = 0.01, draws: int = 100, data: object = None, seed: int = 0
    ) -> dict[str, int]:
        """Units whose posterior mean varies over rows by more than `threshold`, per local latent site.

        `Var_x E_q(z | x) z` over the rows of `data` (None: those of the fit). The mean is over `draws`, and what its
        noise adds to the variance, `E_x Var_q(z | x) z / draws`, is taken off: it alone is 0.01 for a unit that
        ignores the data, at 100 draws.

        Source: Burda, Grosse, Salakhutdinov (2015), arXiv:1509.00519, section 5.2.
        """
        posterior = self.posterior(draws, data, seed)
        sites = self._bound.structure.sites
        return {
            n: int((v.mean(0).var(0) - v.var(0).mean(0) / max(draws - 1, 1) > threshold).sum())
            for n, v in posterior.values.items()
            if sites[n].local and sites[n].role == "latent"
        }

    def to_arviz(self, draws: int = 1000, data: object = None, seed: int = 0) -> DataTree:
        """Posterior, log likelihood, densities and observed data as an ArviZ DataTree: chain = 1, draw = `draws`."""
        from ppl_lvm.to_arviz import to_arviz

        call = self._call(data)
        names = self.program.arguments[: len(call.args)]
        arrays = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        observed = {n: np.asarray(arrays[n]) for n in self._observed() if arrays.get(n) is not None}
        attrs = {
            "program": self.program.name,
            "backend": self.backend,
            "recipe": self.recipe.name,
            "objective": type(self.recipe.algorithm).__name__,
            "seed": self.seed,
        }
        return to_arviz(self.posterior(draws, data, seed), observed, attrs, None)

    # Rows in blocks, draws in chunks.

    def _call(self, data: object) -> Call:
        call = self._data if data is None else Call.of(data)
        for name, given, known in zip(
            self.program.arguments, call.args, self._data.args, strict=False
        ):
            if known is not None and np.shape(given)[1:] != np.shape(known)[1:]:
                raise DataError(
                    f"Rows of {name!r} have shape {np.shape(given)[1:]}, the fit was made on {np.shape(known)[1:]}."
                )
        return call

    def _observed(self) -> list[str]:
        return [n for n, i in self._bound.structure.sites.items() if i.role == "observed"]

    def _blocks(self, call: Call) -> Iterator[tuple[Call, Any]]:
        """Blocks of rows small enough that one draw of each fits, with a bound for the block's shape."""
        if self._bound.structure.plate_size is not None:
            raise ProgramError(
                f"The program subsamples plate {self._bound.structure.data_plate!r} itself, so rows cannot be asked "
                f"for; size the plate by its data (len(x)) and let batch_size choose the rows."
            )
        if self._bound.structure.data_plate is None or not call.leaves:
            yield call, self._bound_for(call)
            return
        rows = len(call.leaves[0])
        if rows == 0:
            raise DataError("There are no rows.")
        block = max(1, min(rows, ENTRIES // (16 * self._width(call))))
        for first in range(0, rows, block):
            part = call.map(operator.itemgetter(slice(first, first + block)))
            yield part, self._bound_for(part)

    def _width(self, call: Call) -> int:
        return sum(int(np.prod(np.shape(a)[1:], dtype=int)) for a in call.leaves) or 1

    def _chunks(self, draws: int, batch: Call, seed: int, entries: int) -> tuple[int, list[Any]]:
        """The draws of one chunk, and a key for each; chunks are equal, as every size would be compiled anew."""
        if draws < 1:
            raise DataError(f"draws = {draws}; ask for one or more.")
        rows = len(batch.leaves[0]) if batch.leaves else 1
        most = max(1, entries // (rows * self._width(batch)))
        size = math.ceil(draws / math.ceil(draws / most))
        return size, [self._key(seed, i) for i in range(math.ceil(draws / size))]

    def _plan(self, bound: Any, draws: int) -> Plan:
        """Draws in the inner axis, or in the outer one where every draw has its own globals."""
        globals_ = any(not i.local for i in bound.structure.drawn())
        return Plan.of_values(bound.structure, *((1, draws) if globals_ else (draws, 1)))

    def _key(self, seed: int, i: int) -> Any:
        return backends.load(self.backend).key_of(int(np.random.SeedSequence([seed, i]).generate_state(1)[0]))

    def _numpy(self, x: Any) -> np.ndarray:
        return backends.load(self.backend).to_numpy(x)

    def _bound_for(self, call: Call) -> Any:
        key = tuple((np.shape(a), np.asarray(a).dtype.str) for a in call.leaves)
        if key not in self._bounds:
            known = self._bound
            self._bounds[key] = type(known)(
                self.program, call, seed=0, dtype=known.dtype, data_plate=known.asked_plate
            )
        return self._bounds[key]

    def _table(self, bound: Any, held: Call, key: Any, plan: Plan, wanted: int) -> dict[str, Any]:
        """Arrays `[draws, rows, ...]` of one run without gradients, of the first `wanted` draws."""
        table = bound.evaluate(self._trained, held, key, plan)
        sites, draws = bound.structure.sites, plan.K * plan.M

        def flat(name: str, x: Any) -> np.ndarray:
            x = self._numpy(x)
            x = x.reshape(draws, *x.shape[2:]) if sites[name].local else np.broadcast_to(x, (draws, *x.shape[1:]))
            return x[:wanted]

        log_p = log_q = np.zeros((min(draws, wanted), bound.structure.rows))
        lik: dict[str, np.ndarray] = {}
        for name, info in sites.items():
            if not info.local:
                continue
            if info.role == "observed":
                lik[name] = flat(name, table[name]["log_p"])
            if table[name]["log_p"] is not None:
                log_p = log_p + flat(name, table[name]["log_p"])
            if table[name]["log_q"] is not None:
                log_q = log_q + flat(name, table[name]["log_q"])
        value = {n: flat(n, row["value"]) for n, row in table.items() if sites[n].role != "observed"}
        return {"value": value, "log_p": log_p, "log_q": log_q, "lik": lik}


def _concatenate(parts: list[dict[str, Any]], axis: int) -> dict[str, Any]:
    first = parts[0]
    return {
        k: _concatenate([p[k] for p in parts], axis)
        if isinstance(v, dict)
        else np.concatenate([p[k] for p in parts], axis)
        for k, v in first.items()
    }
