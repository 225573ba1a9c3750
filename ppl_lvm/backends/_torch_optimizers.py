"""Adam, AdamW and plain gradient steps by torch's fused kernels.

torch's classes of the same names call these kernels too. What they do around the call in every step costs ten times as
much on a small model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppl_lvm.algorithm import Algorithm

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01
"""What torch has where nothing is said; DECAY is AdamW's."""


class Fused:
    """The state of one optimiser: parameters that move together, and what it keeps of each of them.

    The kernels go through memory and look at no strides, so parameters and gradients are contiguous. Where they are
    told `away` = 1 they leave everything as it is, which no step waits for.
    """

    def __init__(self, optimizer: Algorithm, params: Sequence[Tensor]) -> None:
        self._kind = optimizer.name  # type: ignore[attr-defined]
        self._params = list(params)
        self.moments: dict[str, list[Tensor]] = {}
        if self._kind in ("adam", "adamw"):
            self.moments = {n: [torch.zeros_like(p) for p in params] for n in ("exp_avg", "exp_avg_sq")}
        self.step = torch.zeros((), dtype=torch.float32)
        """How often they moved."""
        self._steps = [self.step] * len(self._params)

    @property
    def tensors(self) -> list[Tensor]:
        """What a step changes in place, beside the parameters."""
        return [*(v for vs in self.moments.values() for v in vs), self.step]

    def kept(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What it keeps of each parameter, under these names of theirs; nothing where it needs nothing."""
        found = dict[str, Tensor]()
        for i, name in enumerate(names if self.moments else ()):
            found |= {f"{name}/step": self.step, **{f"{name}/{n}": vs[i] for n, vs in self.moments.items()}}
        return found

    def move(self, gradients: list[Tensor], rate: float, decay: float | None, away: Tensor, moved: Tensor) -> None:
        """One step; `moved` is 1 - `away`."""
        if not self.moments:
            torch._fused_sgd_(
                *(self._params, gradients, []),
                lr=rate,
                weight_decay=0.0,
                momentum=0.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=away,
            )
            return
        self.step.add_(moved)
        kernel, least = (torch._fused_adam_, 0.0) if self._kind == "adam" else (torch._fused_adamw_, DECAY)
        kernel(
            *(self._params, gradients, self.moments["exp_avg"], self.moments["exp_avg_sq"], [], self._steps),
            lr=rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=least if decay is None else decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
            found_inf=away,
        )
