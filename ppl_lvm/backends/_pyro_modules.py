"""torch modules of a native program: noticed in a probe run, given their parameters functionally, left as they were.

A probe meets every module that the program calls or registers, also through closures and attributes. What a module
sets up when it is first called (the parameters of Pyro's autoguides) is kept here and taken off it again, so that no
fit meets another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ppl_lvm.errors import BackendError, ProgramError

State = dict[str, Any]


class Holder(torch.nn.Module):
    """The modules of a native program, so that one functional call swaps all their tensors."""

    def forward(self, f: Callable[[], Any]) -> Any:
        return f()


class Buffer(NamedTuple):
    """A module's buffer, and its values before the probe."""

    module: torch.nn.Module
    name: str
    tensor: Tensor
    kept: Tensor


class Modules:
    """The modules that a program calls; `cast` brings a tensor to the fit's precision."""

    def __init__(self, cast: Callable[[Tensor], Tensor], setup: list[tuple[torch.nn.Module, State]]) -> None:
        self.setup = list(setup)
        """What modules set up in the probe: their attributes then, which every run puts in place."""
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self._cast = cast
        self._holder = Holder()
        self._held: dict[int, str] = {}
        self._all: list[torch.nn.Module] = []
        self._paths: dict[str, list[str]] = {}
        self._fixed: dict[str, Tensor] = {}
        """Buffers, and parameters that need no gradient, in the fit's precision."""

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Notices the modules that are called inside, and takes back what the calls change."""
        before: dict[int, State] = {}
        data: list[tuple[Tensor, Tensor]] = []
        buffers: list[Buffer] = []
        named_parameters = torch.nn.Module.named_parameters

        def asked(root: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            notice(root)
            return named_parameters(root, *args, **kwargs)

        def notice(root: torch.nn.Module, _: Any = None) -> None:
            for module in root.modules():
                if id(module) in before:
                    continue
                before[id(module)] = _state(module)
                self._all.append(module)
                # Until its tensors are known and can be swapped, a module of another precision is cast.
                for parameter in [p for p in module._parameters.values() if p is not None]:
                    if self._cast(parameter.data).dtype != parameter.dtype:
                        data.append((parameter, parameter.data))
                        parameter.data = self._cast(parameter.data)
                for name, buffer in [(n, b) for n, b in module._buffers.items() if b is not None]:
                    buffers.append(Buffer(module, name, buffer, buffer.detach().clone()))
                    module._buffers[name] = self._cast(buffer)

        with self._in_place():
            hook = register_module_forward_pre_hook(notice)
            # pyro.module asks a module for its parameters, and that is all there is to be noticed of one which is
            # never called itself.
            torch.nn.Module.named_parameters = asked  # type: ignore[method-assign, assignment]
            try:
                yield
                self._refuse_changed(buffers)
            finally:
                hook.remove()
                torch.nn.Module.named_parameters = named_parameters  # type: ignore[method-assign]
                for tensor, kept in data:
                    tensor.data = kept
                for b in buffers:
                    b.module._buffers[b.name] = b.tensor
                    if not torch.equal(b.tensor, b.kept):
                        b.tensor.data = b.kept
                for module in self._all:
                    if id(module) in before and _changed(module, before[id(module)]):
                        self.setup.append((module, dict(module.__dict__)))
                        module.__dict__.clear()
                        module.__dict__.update(before[id(module)])

    def _refuse_changed(self, buffers: list[Buffer]) -> None:
        kinds = {
            f"{type(b.module).__name__}.{b.name}"
            for b in buffers
            if not torch.equal(b.module._buffers[b.name], self._cast(b.kept))  # type: ignore[arg-type]
        }
        if kinds:
            raise BackendError(
                f"A run of the program changes buffers of its modules ({', '.join(sorted(kinds))}), which no step "
                f"could undo or count once. Put such modules into eval() to keep their statistics fixed, or use "
                f"LayerNorm, GroupNorm, or BatchNorm with track_running_stats=False."
            )

    def hold(self, offered: Mapping[str, torch.nn.Parameter]) -> dict[str, str]:
        """Finds the modules that own each parameter, so that it can be swapped; further names of one -> its own.

        To be called where the modules are noticed, as parameters that are set up there exist only there.
        """
        owners: dict[int, dict[tuple[int, str], torch.nn.Module]] = {}
        for module in [m for root in self._all for m in root.modules()]:
            for leaf, parameter in module._parameters.items():
                owners.setdefault(id(parameter), {})[id(module), leaf] = module
        own: dict[int, str] = {}
        # Whatever the order in which a run meets them, and public ones first.
        for name in sorted(offered, key=lambda n: (n.rpartition(".")[2].startswith("_"), n)):
            parameter = offered[name]
            if id(parameter) not in owners:
                raise ProgramError(
                    f"Parameter {name!r} belongs to no module that the program calls or registers by pyro.module, so "
                    f"its values cannot be given functionally; pass a tensor to pyro.param, or register its module."
                )
            if own.setdefault(id(parameter), name) == name:
                self.parameters[name] = parameter
                found = owners[id(parameter)].items()
                self._paths[name] = [f"{self._key(module)}.{leaf}" for (_, leaf), module in found]
        for module in self._all:
            tensors = {**module._buffers, **module._parameters}
            for leaf, tensor in tensors.items():
                if tensor is not None and id(tensor) not in own and not leaf.endswith("_unconstrained"):
                    self._fixed[f"{self._key(module)}.{leaf}"] = tensor.detach()
        return {name: own[id(p)] for name, p in offered.items() if own[id(p)] != name}

    def keep(self) -> None:
        """Leaves what the probe set up in the modules for good."""
        for module, state in self.setup:
            module.__dict__.clear()
            module.__dict__.update(state)
        self.setup.clear()

    def _key(self, module: torch.nn.Module) -> str:
        if id(module) not in self._held:
            self._held[id(module)] = f"m{len(self._held)}"
            self._holder.add_module(self._held[id(module)], module)
        return self._held[id(module)]

    def refuse_noise(self) -> None:
        """Refuses modules that draw noise inside, which a replay in training (see `Dropout`) cannot repeat."""
        inside = (torch.nn.RNNBase, torch.nn.MultiheadAttention)
        own = (torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout, torch.nn.RReLU)
        for m in self._all:
            if m.training and (isinstance(m, own) or (isinstance(m, inside) and m.dropout > 0)):
                raise BackendError(
                    f"A {type(m).__name__} draws noise of its own, and an estimator replays the guide on its values, "
                    f"or the model on all values of a site, which must meet the same noise; use 'pathwise', "
                    f"torch.nn.Dropout layers, or put the module into eval()."
                )

    def run(self, f: Callable[[], Any], params: Mapping[str, Tensor], evaluating: bool) -> Any:
        """`f()` with these parameters in the modules; `evaluating` puts all of them into eval mode for the time."""
        # pyro.module skips parameters that need no gradient, so even stopped ones are leaves that do.
        swapped = {
            path: v if v.requires_grad else v.detach().requires_grad_(True)
            for path, v in ((path, params[n]) for n, paths in self._paths.items() for path in paths)
        }
        if not self._all and not self.setup:
            return f()
        with self._in_place(), self._mode(evaluating):
            if not swapped and not self._fixed:
                return f()
            every = {**self._fixed, **swapped}
            return torch.func.functional_call(self._holder, every, (f,), tie_weights=False)

    @property
    def form(self) -> Hashable:
        """What a traced step has taken from the modules besides parameters: set-up, modes, fixed tensors."""
        fixed = tuple((t.data_ptr(), t._version) for t in self._fixed.values())
        return id(self.setup) if self.setup else None, tuple(m.training for m in self._all), fixed

    def owns(self, tensor: Tensor) -> bool:
        """Whether this is one of the modules' fixed tensors."""
        return any(tensor.data_ptr() == t.data_ptr() for t in self._fixed.values())

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """What the probe set up, put into the modules; afterwards they are as their owner has them."""
        kept = [(module, dict(module.__dict__)) for module, _ in self.setup]
        try:
            for module, state in self.setup:
                module.__dict__.clear()
                module.__dict__.update(state)
            yield
        finally:
            for module, state in kept:
                module.__dict__.clear()
                module.__dict__.update(state)

    @contextlib.contextmanager
    def _mode(self, evaluating: bool) -> Iterator[None]:
        trained = [m for m in self._all if m.training] if evaluating else []
        try:
            for module in trained:
                module.training = False
            yield
        finally:
            for module in trained:
                module.training = True


def _state(module: torch.nn.Module) -> State:
    """A module's attributes, its tables of parameters and submodules copied."""
    return {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}


def _changed(module: torch.nn.Module, before: State) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
        return a is b

    now = module.__dict__
    return now.keys() != before.keys() or not all(same(now[k], before[k]) for k in now)


class Dropout(TorchFunctionMode):
    """Keeps the factors of every dropout inside, so that a replay multiplies by the same ones.

    A guide that is replayed on its own values must be the guide that drew them.
    """

    _ELEMENTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d"})

    def __init__(self) -> None:
        super().__init__()
        self._factors: list[Tensor] = []
        self._next: int | None = None

    @property
    def used(self) -> bool:
        """Whether there was any."""
        return bool(self._factors)

    def replay(self) -> Dropout:
        self._next = 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in self._ELEMENTS and func.__module__ == "torch.nn.functional":
            return args[0] * self._factor(func, args[0], args[1:], kwargs)
        return func(*args, **kwargs)

    def _factor(self, func: Any, x: Tensor, rest: Any, kwargs: Any) -> Tensor:
        if self._next is None:
            options = {k: v for k, v in kwargs.items() if k != "inplace"}
            self._factors.append(func(torch.ones_like(x), *rest[:2], **options))
            return self._factors[-1]
        self._next += 1
        return self._factors[self._next - 1]
