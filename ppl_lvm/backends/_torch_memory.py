"""What a computation on torch would take of memory, without running it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak(f: Callable[..., Any], *given: Any) -> int | None:
    """Most bytes that are alive at once in `f(*given)`, beside what it is given; None where it looks at values."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            inputs = pytree.tree_map(lambda x: fake.from_tensor(x) if isinstance(x, Tensor) else x, given)
            with Alive() as alive:
                f(*inputs)
    except RuntimeError:  # `f` runs otherwise, so it is an operation that looks at values, of which there are none
        return None
    return alive.most


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage._cdata] = storage
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size
