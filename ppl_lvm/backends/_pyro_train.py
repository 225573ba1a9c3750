"""Training on Pyro: the whole gradient traced through the handlers once, compiled where that pays.

Modes. "eager": every step runs the program through Pyro's handlers. "graph": one such run is recorded by make_fx as
a graph of torch operations, and replayed. "compiled": that graph goes through Inductor. All three draw the same
random numbers at one seed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor, _inductor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ppl_lvm.algorithm import Objective
from ppl_lvm.backends import _torch_memory, _torch_natural
from ppl_lvm.backends._pyro_handlers import kept_generators, sealed, seed_generators
from ppl_lvm.backends._torch_optimizers import Fused
from ppl_lvm.backends.base import Call, losses
from ppl_lvm.backends.hiding import Hiding
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.backends.structure import Plan
from ppl_lvm.backends.training import (
    MOST_SKIPPED,
    RECORDS,
    SKIPPED,
    Again,
    Descent,
    Numbers,
    Steps,
    Unit,
    check_state,
    initial_extras,
    merged,
    rows_of,
    skipped_in_a_row,
    static_key,
    with_numbers,
)
from ppl_lvm.errors import BackendError, first_line
from ppl_lvm.process import TURN

Bound = PyroBound
Tree = dict[str, Any]
STEPS = Steps()

FEWEST_TRACED = 300
SAVED_PER_NODE, SAVED_PER_ELEMENT = 2e-6, 4e-10
COMPILE_SECONDS, COMPILE_SECONDS_PER_NODE, COMPILE_SECONDS_PER_CALL = 5.0, 0.005, 0.15
"""Rough figures of a two-core machine, in seconds: what compiling a traced graph saves in a step, and costs."""

_ATEN = torch.ops.aten
CALLED = frozenset(
    {
        *(_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.convolution, _ATEN.convolution_backward),
        *(_ATEN.linalg_cholesky_ex, _ATEN.linalg_solve_triangular),
    }
)
"""Operations that a compiled graph calls. They cut what is around them into kernels, each of which is compiled."""

OPTIONS = {"fallback_random": True, "cpp.enable_loop_tail_vec": False}
"""Of Inductor. Where it makes one masked vector of a loop that is shorter than a vector, it takes the loops around a
sum for empty and lets threads share the sum itself: they are started, and waited for, at every entry of the result."""


class Form(NamedTuple):
    """Where the tensors that a step takes have their places, one after the other."""

    params: tuple[str, ...]
    own: tuple[tuple[str, str], ...]
    args: int
    kwargs: tuple[str, ...]
    rows: bool
    """Whether the number of rows is told. What came up to here stays over a chunk of steps."""
    numbers: tuple[str, ...]
    """Of the entries of one tensor, which `SKIPPED` follows."""
    states: tuple[str, ...]
    batched: bool
    """Whether the rows' places in the data are told."""

    def given(self, leaves: Sequence[Tensor]) -> dict[str, Any]:
        """The same by name."""
        rest = iter(leaves)
        given: dict[str, Any] = {"params": dict(zip(self.params, rest, strict=False)), "own": {}}
        for owner, name in self.own:
            given["own"].setdefault(owner, {})[name] = next(rest)
        given["args"] = tuple(itertools.islice(rest, self.args))
        given["kwargs"] = dict(zip(self.kwargs, rest, strict=False))
        given["rows"] = next(rest) if self.rows else None
        given["numbers"] = dict(zip(self.numbers, next(rest).unbind(), strict=True))
        given[SKIPPED] = next(rest)
        given["states"] = dict(zip(self.states, rest, strict=False))
        given["index"] = next(rest) if self.batched else None
        return given


def key_of(seed: int) -> int:
    """The backend's form of a seed."""
    return seed


def to_numpy(x: Any) -> np.ndarray:
    """An array of the backend as numpy's."""
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """What is made inside this block is on a device: "cpu", "gpu", "cuda:0".

    Other threads wait until its end, as torch notes the device for all of them too.

    Raises:
        BackendError: there is no such device.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    name = device.replace("gpu", "cuda")
    name = "cuda:0" if name == "cuda" else name
    if name not in there:
        raise BackendError(f"device={device!r} was asked for; PyTorch has {', '.join(there)} here.")
    with TURN, torch.device(name):
        yield


def off_device(params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Parameters of a fit as further calls find them, which are not inside its `on`."""
    return {n: p.cpu() for n, p in params.items()}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()  # blocks that the allocator keeps may be too small for what is asked next
        return True
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError)


def device_memory() -> int | None:
    """Bytes of the device that the default one is, where it has memory of its own."""
    device = torch.get_default_device()
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


class Trainer:
    """See `backends.training.Trainer`. Several runs are one after the other; a tree is a list of theirs."""

    def __init__(
        self,
        bound: PyroBound,
        plan: Plan,
        objective: Objective,
        descent: Descent,
        example: Call,
        *,
        seeds: Sequence[int],
        initials: Sequence[Mapping[str, Tensor]],
        rows: int | None,
        steps: int,
        mode: str,
        hiding: Hiding,
    ) -> None:
        if mode not in ("auto", "compiled", "graph", "eager"):
            raise BackendError(
                f"compile={mode!r} was asked for; the Pyro backend knows auto, compiled, graph and eager."
            )
        self.mode = mode
        self.notes: list[str] = []
        # Asked here as a step that is being traced cannot look at values.
        if bound.broadcasts(plan, example) != (True, True):
            self.notes.append("draws: run one by one, as the program does not broadcast over them")
        self._bound, self._plan, self._objective = bound, plan, objective
        self._descent, self._initials, self._hiding = descent, initials, hiding
        self._example, self._seeds, self._rows, self._steps = example, seeds, rows, steps
        shapes = tuple((tuple(a.shape), str(a.dtype)) for a in example.leaves)
        names = (len(example.args), tuple(example.kwargs))
        self._key: tuple[Hashable, ...] = (
            *(bound.program, bound.dtype, bound.structure.data_plate, static_key(objective, plan)),
            *(plan.K, plan.M, descent.static_key(), shapes, names, rows is None, bound.modules.form, hiding.key),
            str(torch.get_default_device()),
        )
        self._step: Callable[..., list[Tensor]] | None = None
        with sealed(bound.dtype), kept_generators():
            self._factors = _torch_natural.found(bound, example, descent.units)

    # One step as a function of tensors alone: records, gradients of the trained parameters, next states.

    def _flat(self, form: Form) -> Callable[..., list[Tensor]]:
        bound, plan, objective, descent = self._bound, self._plan, self._objective, self._descent
        # A step is kept when its trainer, which holds data, is gone: it must not be reached from here.
        factors, hiding, units = self._factors, self._hiding, descent.units

        def step(*leaves: Tensor) -> list[Tensor]:
            given = form.given(leaves)
            batch, rows = Call(given["args"], given["kwargs"]), given["rows"]
            if given["index"] is not None:
                batch = batch.map(lambda a: a[given["index"]])
            batch = _hidden(hiding, batch)
            here, planned = with_numbers(objective, plan, given["numbers"])
            result = bound.gradients(
                given["params"],
                batch,
                None,
                planned,
                here,
                total_rows=rows,
                states=given["states"],
                own=given["own"],
            )
            found, norm = _clipped(descent, merged(result.params, result.own), given["numbers"])
            for unit, chosen in factors.items():
                place, own = units[unit].place, {n: found[n] for n in units[unit].names}
                rate = given["numbers"][f"{place}.learning_rate"]
                moves = _torch_natural.displaced(bound, batch, chosen, given["params"], own, rate)
                # The gradient may be finite where what the Fisher information makes of it is not.
                norm = norm + 0.0 * sum(m.sum() for m in moves.values())
                found |= moves
            # As the optimisers' kernels take them (see `Fused`): that of a transposed parameter comes transposed.
            gradients = [found[n].contiguous() for u in units.values() for n in u.names]
            total = bound.structure.plate_size or (bound.structure.rows if rows is None else rows)
            skipped = skipped_in_a_row(torch, given[SKIPPED], given["numbers"][MOST_SKIPPED], result.loss, norm)
            states = [torch.where(skipped == 0, result.states[s], old) for s, old in given["states"].items()]
            return [result.loss / total, norm, skipped, skipped.clamp(max=1.0), *gradients, *states]

        return step

    def _prepare(self, leaves: list[Tensor], form: Form, rows: int) -> tuple[Any, str, list[str]]:
        """The step to run, its mode, and what to tell the user."""
        eager = self._flat(form)
        mode = self.mode
        if mode == "eager":
            return eager, "eager", []
        if self._plan.chunk is not None:
            return eager, "eager", ["compile: eager, as draws in chunks are run again for their gradient"]
        if mode == "auto" and self._steps < FEWEST_TRACED:
            return eager, "eager", [f"compile: eager, as {self._steps} steps are fewer than tracing pays for"]
        try:
            STEPS.traces += 1
            # Distinct tensors: one object given twice would be merged into one input of the graph.
            graph = make_fx(eager)(*(x.detach().clone() for x in leaves))
        except RuntimeError as error:
            why = f"the step cannot be traced{_where(error)}: {first_line(error)}"
            return eager, "eager", [f"compile: eager, as {why}"]
        self._refuse_frozen_data(graph, rows)
        if mode == "graph":
            return graph, "graph", []
        pays, why = self._pays(graph)
        if mode == "auto" and not pays:
            return graph, "graph", [f"compile: traced graph, {why}"]
        if not _compiler():
            return graph, "graph", ["compile: traced graph only, as no C++ compiler was found (set CXX)"]
        try:
            compiled = _compiled(graph, leaves)
        except RuntimeError as error:
            return graph, "graph", [f"compile: traced graph only, as compiling failed ({first_line(error)})"]
        return compiled, "compiled", [f"compile: compiled graph, {why}"] if mode == "auto" else []

    def _pays(self, graph: torch.fx.GraphModule) -> tuple[bool, str]:
        """Whether compiling costs less than it saves, from the number of steps and the work in the graph.

        Deterministic on purpose: a choice by the clock would give other bits from run to run.
        """
        elements = sum(
            value.numel()
            for node in graph.graph.nodes
            for value in pytree.tree_leaves(node.meta.get("val"))
            if isinstance(value, Tensor)
        )
        nodes = len(graph.graph.nodes)
        calls = sum(getattr(node.target, "overloadpacket", None) in CALLED for node in graph.graph.nodes)
        saved = self._steps * (SAVED_PER_NODE * nodes + SAVED_PER_ELEMENT * elements)
        cost = COMPILE_SECONDS + COMPILE_SECONDS_PER_NODE * nodes + COMPILE_SECONDS_PER_CALL * calls
        relation = "more" if saved > cost else "less"
        return saved > cost, (
            f"as {self._steps} steps would save about {saved:.0f} s, {relation} than the {cost:.0f} s of compiling"
        )

    def _refuse_frozen_data(self, graph: torch.fx.GraphModule, rows: int) -> None:
        """Data in a closure would be a constant of the graph, the same rows at every step."""
        if self._rows is None:
            return
        for node in graph.graph.nodes:
            value = getattr(graph, node.target, None) if node.op == "get_attr" else None
            if not isinstance(value, Tensor) or self._bound.modules.owns(value):
                continue
            if value.dim() > 1 and value.shape[0] in (rows, self._rows):
                raise BackendError(
                    f"The program holds a tensor of shape {tuple(value.shape)} of its own, which mini-batches cannot "
                    f"reach; pass it as data."
                )

    def initial(self) -> list[Tree]:
        return [self._initial(values) for values in self._initials]

    def _initial(self, values: Mapping[str, Tensor]) -> Tree:
        dtype = getattr(torch, self._bound.dtype)
        states, own = initial_extras(self._objective, self._plan, self._example)
        device, layout = torch.get_default_device(), torch.contiguous_format
        params = {n: p.detach().to(device).clone(memory_format=layout) for n, p in values.items()}
        own_params = {s: {n: torch.tensor(v, dtype=dtype) for n, v in ps.items()} for s, ps in own.items()}
        return self._with_optimizers(
            params, own_params, {s: torch.tensor(v, dtype=dtype) for s, v in states.items()}
        )

    def _with_optimizers(
        self, params: dict[str, Tensor], own: dict[str, Any], states: dict[str, Tensor]
    ) -> Tree:
        every = merged(params, own)
        optimizers = {n: Fused(u.optimizer, [every[p] for p in u.names]) for n, u in self._descent.units.items()}
        skipped = torch.zeros((), dtype=torch.float32)  # as fused optimisers take it
        return {"params": params, "own": own, "states": states, "optimizer": optimizers, SKIPPED: skipped}

    def run(
        self,
        tree: list[Tree],
        data: Call,
        index: np.ndarray | None,
        numbers: Mapping[str, np.ndarray],
        start: int,
        n: int,
    ) -> tuple[list[Tree], dict[str, Tensor]]:
        done = [
            self._run(one, data, None if index is None else index[r], numbers, start, n, self._seeds[r])
            for r, one in enumerate(tree)
        ]
        trees, *records = zip(*done, strict=True)
        return list(trees), {name: torch.stack(found) for name, found in zip(RECORDS, records, strict=True)}

    def _run(
        self,
        tree: Tree,
        data: Call,
        index: np.ndarray | None,
        numbers: Mapping[str, np.ndarray],
        start: int,
        n: int,
        seed: int,
    ) -> tuple[Tree, Tensor, Tensor, Tensor]:
        dtype, units = getattr(torch, self._bound.dtype), self._descent.units
        own = {(s, name): p for s, ps in tree["own"].items() for name, p in ps.items()}
        fixed = [*tree["params"].values(), *own.values(), *data.args, *data.kwargs.values()]
        if self._rows is not None:
            fixed.append(torch.tensor(float(self._rows), dtype=dtype))
        held = tuple(tree["params"]), tuple(own), len(data.args), tuple(data.kwargs), self._rows is not None
        form = Form(*held, tuple(numbers), tuple(tree["states"]), index is not None)
        now = torch.as_tensor(np.stack([v[:n] for v in numbers.values()], 1), dtype=dtype).unbind()
        places = () if index is None else torch.as_tensor(index[:n]).unbind()
        plain = {name: v[:n].tolist() for name, v in numbers.items()}
        moves = ("model", "guide") if self._descent.model_first else (None,)
        seeds, device, records = [_step_seed(seed, start + i) for i in range(n)], torch.get_default_device(), []
        with sealed(self._bound.dtype), kept_generators(), torch.no_grad():
            for i in range(n):
                leaves = [*fixed, now[i], tree[SKIPPED], *tree["states"].values(), *places[i : i + 1]]
                if self._step is None:
                    of_data = data.leaves[0].shape[0] if data.leaves else 0
                    rows = of_data if index is None else index.shape[1]
                    key = (*self._key, self.mode, self._steps if self.mode == "auto" else None, form)
                    self._step, self.mode, notes = STEPS.get(
                        key, lambda: self._prepare(leaves, form, rows)  # noqa: B023 - called at once
                    )
                    self.notes.extend(notes)
                values, following, skipped = list[Tensor](), tree, tree[SKIPPED]
                before = [t.clone() for t in _moving(tree)] if len(moves) > 1 else []
                # The optimisers work in place, so a second run is at what the first has moved.
                for moving in moves:
                    seed_generators(seeds[i], device)
                    value, norm, of_run, away, *rest = self._step(*leaves)
                    skipped = torch.maximum(skipped, of_run) if values else of_run
                    values.append(value)
                    away = skipped.clamp(max=1.0) if len(values) > 1 else away
                    following = self._update(units, tree, rest, {k: v[i] for k, v in plain.items()}, moving, away)
                for tensor, old in zip(_moving(tree), before, strict=True) if before else ():
                    tensor.copy_(torch.where(skipped == 0, tensor, old))
                records.append((values[0], norm, skipped))
                tree = {**following, SKIPPED: skipped}
        losses_, norms, counts = (torch.stack(found) for found in zip(*records, strict=True))
        return tree, losses_, norms, counts

    def again(
        self,
        tree: list[Tree],
        data: Call,
        index: np.ndarray | None,
        numbers: Mapping[str, np.ndarray],
        step: int,
        i: int,
        run: int = 0,
    ) -> Again:
        one, dtype = tree[run], getattr(torch, self._bound.dtype)
        with sealed(self._bound.dtype), kept_generators():
            now = {name: torch.as_tensor(v[i], dtype=dtype) for name, v in numbers.items()}
            here, planned = with_numbers(self._objective, self._plan, now)
            batch = data if index is None else data.map(lambda a: a[torch.as_tensor(index[run, i])])
            options = {"total_rows": self._rows, "states": one["states"], "own": one["own"]}
            seed_generators(_step_seed(self._seeds[run], step), torch.get_default_device())
            with torch.no_grad():
                draws = self._bound.draws(one["params"], _hidden(self._hiding, batch), None, planned, **options)
            seed_generators(_step_seed(self._seeds[run], step), torch.get_default_device())
            hidden = _hidden(self._hiding, batch)
            found = self._bound.gradients(one["params"], hidden, None, planned, here, **options)
        gradient = {n: g.cpu().numpy() for n, g in merged(found.params, found.own).items()}
        return Again(hidden, rows_of(draws.sites), gradient)

    @property
    def fused(self) -> float:
        return 1.0 if self.mode in ("eager", "graph") else 3.0

    def peak(self, tree: list[Tree], batch: Call, numbers: Numbers) -> int | None:
        def step(params: Any, states: Any, own: Any, args: Any, kwargs: Any) -> Any:
            here, planned = with_numbers(self._objective, self._plan, numbers)
            options = {"total_rows": self._rows, "states": states, "own": own}
            hidden = _hidden(self._hiding, Call(args, kwargs))
            return self._bound.gradients(params, hidden, None, planned, here, **options)

        with sealed(self._bound.dtype), kept_generators():
            state = (tree[0][name] for name in ("params", "states", "own"))
            return _torch_memory.peak(step, *state, batch.args, dict(batch.kwargs))

    def _update(
        self,
        units: Mapping[str, Unit],
        tree: Tree,
        out: list[Tensor],
        numbers: Mapping[str, float],
        moving: str | None,
        away: Tensor,
    ) -> Tree:
        """Moves the parameters whose turn it is, of one group or of all, unless the step is skipped."""
        moved, first = 1.0 - away, 0
        for name, unit in units.items():
            mine = out[first : first + len(unit.names)]
            first += len(unit.names)
            if numbers.get(unit.turn, 1.0) and moving in (None, unit.group):
                rate = 1.0 if unit.natural else numbers[f"{unit.place}.learning_rate"]
                tree["optimizer"][name].move(mine, rate, numbers.get(f"{unit.place}.weight_decay"), away, moved)
        return {**tree, "states": dict(zip(tree["states"], out[first:], strict=True))}

    def loss(
        self,
        tree: list[Tree],
        bound: PyroBound,
        batch: Call,
        key: int,
        numbers: Numbers,
        rows: int | None,
        plan: Plan | None = None,
    ) -> Tensor:
        here, planned = with_numbers(self._objective, self._plan if plan is None else plan, numbers)
        found = []
        with sealed(self._bound.dtype), bound.evaluation():
            for one in tree:
                options = {"states": one["states"], "own": one["own"]}
                draws = bound.draws(one["params"], batch, key, planned, total_rows=rows, **options)
                loss, *_ = losses(draws, here, planned)
                found.append(loss / (bound.structure.rows if rows is None else rows))
        return torch.stack(found)

    def params(self, tree: list[Tree], run: int = 0) -> Mapping[str, Tensor]:
        # Copies, as the optimiser works in place.
        return {n: p.detach().clone() for n, p in tree[run]["params"].items()}

    def pack(self, tree: list[Tree], run: int = 0) -> dict[str, np.ndarray]:
        kept = _plain(tree[run])
        for unit, u in self._descent.units.items():
            # One that has not moved yet keeps nothing.
            kept |= _of_optimizer(unit, u, tree[run]) if float(tree[run]["optimizer"][unit].step) else {}
        return arrays_of(kept)

    def unpack(self, *runs: Mapping[str, np.ndarray]) -> list[Tree]:
        return [self._unpacked(arrays) for arrays in runs]

    def _unpacked(self, arrays: Mapping[str, np.ndarray]) -> Tree:
        tree = self._initial(self._initials[0])
        kept = _plain(tree)
        for unit, u in self._descent.units.items():
            moments = _of_optimizer(unit, u, tree)
            kept |= moments if arrays.keys() & moments.keys() else {}
        check_state(arrays, arrays_of(kept))
        for name, tensor in kept.items():
            # In memory of torch's own: BLAS adds up in another order where NumPy's happens to be aligned otherwise.
            tensor.copy_(torch.tensor(arrays[name]))
        return tree

    def params_of(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Tensor]:
        return self._unpacked(arrays)["params"]


def _hidden(hiding: Hiding, batch: Call) -> Call:
    return hiding.hidden(batch, lambda _, a: torch.rand(a.shape[0], device=a.device))


def _clipped(
    descent: Descent, gradients: Mapping[str, Tensor], numbers: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the trained parameters, and their norm before clipping."""
    found: dict[str, Tensor] = {}
    norms = []
    for u in descent.units.values():
        mine = [gradients[n] for n in u.names]
        norm = _norm([torch.linalg.vector_norm(g) for g in mine])
        norms.append(torch.where(numbers[u.turn] > 0, norm, 0.0) if u.turn in numbers else norm)
        if f"{u.place}.clip" in numbers:
            factor = (numbers[f"{u.place}.clip"] / norm).clamp(max=1.0)
            mine = [g * factor for g in mine]
        found |= dict(zip(u.names, mine, strict=True))
    return found, _norm(norms)


def _norm(parts: list[Tensor]) -> Tensor:
    """Of what these are the norms of."""
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))


def _moving(tree: Tree) -> list[Tensor]:
    """What a step changes in place: parameters, and the optimisers' states."""
    held = [*merged(tree["params"], tree["own"]).values()]
    return held + [tensor for optimizer in tree["optimizer"].values() for tensor in optimizer.tensors]


def _plain(tree: Tree) -> dict[str, Tensor]:
    """All state but that of the optimisers."""
    kept = {f"params/{n}": p for n, p in tree["params"].items()}
    kept |= {f"own/{s}/{n}": p for s, ps in tree["own"].items() for n, p in ps.items()}
    return kept | {f"states/{s}": v for s, v in tree["states"].items()} | {SKIPPED: tree[SKIPPED]}


def _of_optimizer(name: str, unit: Unit, tree: Tree) -> dict[str, Tensor]:
    kept = tree["optimizer"][name].kept(unit.names)
    return {f"optimizer/{name}/{n}": v for n, v in kept.items()}


def arrays_of(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors by name as arrays that nothing else changes."""
    return {n: v.detach().cpu().numpy().copy() for n, v in values.items()}


def values_of(bound: PyroBound, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Tensor]:
    """The parameters of a program whose `arrays_of` these are."""
    check_state(arrays, arrays_of(bound.initial), "saved program")
    return {n: torch.from_numpy(np.array(arrays[n])).to(torch.get_default_device()) for n in bound.initial}


def _step_seed(seed: int, step: int) -> int:
    """The generator's seed of one step, a function of both, so that a run continues to the same bits."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def _compiled(graph: Any, leaves: list[Tensor]) -> Any:
    """The graph, compiled and called once."""

    def made() -> Any:
        # Not torch.compile, which asks at every call whether the graph is still the one for these tensors.
        compiled = _inductor.compile(graph, [x.detach().clone() for x in leaves], OPTIONS)
        compiled(*(x.detach().clone() for x in leaves))
        return compiled

    with warnings.catch_warnings():
        # The compiler calls what its own library has deprecated, which would end it where warnings are errors.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return made()
        except RuntimeError as error:
            if not isinstance(getattr(error, "inner_exception", None), ImportError):
                raise
            # A process that was killed while it compiled has left a part of a file, which torch takes for all of it.
            with _inductor.utils.fresh_inductor_cache():
                return made()


def _compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


def _where(error: BaseException) -> str:
    """The site in whose handling a run of model or guide raised, or the one before that line of the program."""
    inside = before = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        held = frame.f_locals
        run = getattr(held.get("self"), "msngr", None)
        for message in (held.get("msg"), held.get("site")):
            if isinstance(message, dict) and message.get("type") == "sample":
                inside = message["name"]
        if isinstance(run, poutine.trace_messenger.TraceMessenger):
            before = next((n for n, node in reversed(run.trace.nodes.items()) if node["type"] == "sample"), None)
    return f" at site {inside!r}" if inside else f" after site {before!r}" if before else ""
