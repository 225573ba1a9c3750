"""Several importance-weighted bounds of fewer draws, averaged."""

from typing import Self

from pydantic import Field, model_validator

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import grouped_log_mean_exp


class miwae(Objective):
    """`E 1/G sum_g log mean_{k in g} w_k` per row: the draws in G `groups` of `draws / groups` each.

    The bound is that of `iwae` with `draws / groups` draws, its gradient has less noise.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh (2018), arXiv:1802.04537.

    Example:
        >>> miwae(draws=64, groups=8).groups
        8
    """

    verbs = frozenset({"joint"})

    draws: int = Field(default=64, ge=1)
    groups: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Self:
        if self.draws % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide draws = {self.draws}")
        return self

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.joint(grouped_log_mean_exp(self.groups), d.log_w)))
