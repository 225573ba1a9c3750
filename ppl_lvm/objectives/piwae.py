"""The model by a tight bound, the guide by the average of looser ones."""

from typing import Self

from pydantic import Field, model_validator

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import grouped_log_mean_exp, log_mean_exp


class piwae(Objective):
    """Model: `-E log mean_k w_k` of all draws. Guide: `-E 1/G sum_g log mean_{k in g} w_k`, in G `groups`.

    A bound of many draws is good for the model and leaves the guide a gradient that drowns in noise; both losses share
    one set of draws. Model and guide share no parameter.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh (2018), arXiv:1802.04537.

    Example:
        >>> piwae(draws=64, groups=8).separate
        True
    """

    verbs = frozenset({"joint"})
    separate = True

    draws: int = Field(default=64, ge=1)
    groups: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Self:
        if self.draws % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide draws = {self.draws}")
        return self

    def __call__(self, d: Draws) -> Loss:
        return Loss(
            -d.total(d.joint(log_mean_exp, d.log_w)),
            -d.total(d.joint(grouped_log_mean_exp(self.groups), d.log_w)),
        )
