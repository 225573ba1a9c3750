"""Sites that miss entries, on Pyro."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_lvm.backends._missing import Missing


class TorchMissing(Missing):
    """See `_missing.Missing`."""

    def joint(self, fn: Any) -> int:
        while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
            fn = fn.base_dist
        return len(fn.event_shape)

    def apart(self, fn: Any, known: Tensor) -> Any:
        if not fn.event_shape:
            return dist.MaskedDistribution(fn, known)
        if isinstance(fn, torch.distributions.Independent):
            return dist.Independent(self.apart(fn.base_dist, known), fn.reinterpreted_batch_ndims)
        if isinstance(fn, dist.MaskedDistribution):
            return dist.MaskedDistribution(self.apart(fn.base_dist, known), fn._mask)
        if isinstance(fn, dist.ExpandedDistribution) and isinstance(fn.base_dist, torch.distributions.Independent):
            return self.apart(fn.base_dist.expand(fn.batch_shape), known)
        return dist.MaskedDistribution(fn, known.flatten(-len(fn.event_shape)).all(-1))

    def merge(self, known: Tensor, value: Tensor, other: Tensor) -> Tensor:
        return torch.where(known, value.to(other.dtype), other)

    def neutral(self, fn: Any, value: Tensor) -> Tensor:
        return feasible(fn.support, value)


def feasible(support: Any, value: Tensor) -> Tensor:
    """Values inside a support: the image of zero, or the lower bound of a discrete one."""
    zeros = torch.zeros_like(value)
    try:
        found = torch.distributions.transform_to(support)(zeros)
    except NotImplementedError:
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        found = zeros + getattr(support, "lower_bound", 0)
        if support is torch.distributions.constraints.one_hot:
            found[..., 0] = 1
    return torch.as_tensor(found + zeros).detach().to(value.dtype)
