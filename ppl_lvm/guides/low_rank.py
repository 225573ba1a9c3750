"""Normals with a low-rank covariance in unconstrained space."""

import numpy as np
from pydantic import Field

from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.latents import Sketch


class low_rank(GuideFamily):
    """`u ~ Normal(loc, W W^T + diag(scale)^2)` with W of shape `[D, rank]`, z = T(u).

    One u for all continuous sites outside the data plate, and one for those of every row, as in `multivariate_normal`.

    Args:
        rank: columns of W; None takes the square root of D, rounded up.
        scale: initial standard deviation of u.

    Source: Ong, Nott, Smith (2017), Gaussian variational approximation with a factor covariance structure,
    arXiv:1701.03208.

    Example:
        >>> low_rank(rank=2).rank
        2
    """

    rank: int | None = Field(default=None, ge=1)
    scale: float = Field(default=0.1, gt=0)

    def __call__(self, sketch: Sketch) -> None:
        ppl = sketch.ppl
        for name, block in sketch.blocks():
            size = sum(s.size for s in block)
            rank = self.rank or int(np.ceil(np.sqrt(size)))
            # Zero columns would never move: W enters the density through W W^T only.
            start = np.random.default_rng(0).normal(size=(size, rank)) * self.scale / np.sqrt(2 * rank)
            with sketch.inside(sketch.row_plates(block)):
                loc = sketch.table(block[0], f"auto.{name}.loc", np.concatenate([s.initial.ravel() for s in block]))
                scale = sketch.table(
                    *(block[0], f"auto.{name}.scale", np.full(size, self.scale / np.sqrt(2))),
                    ppl.dist.constraints.positive,
                )
                factor = sketch.table(block[0], f"auto.{name}.factor", start)
                vector = ppl.sample(
                    f"auto.{name}",
                    ppl.dist.LowRankMultivariateNormal(
                        sketch.place(block, loc), sketch.place(block, factor), sketch.place(block, scale * scale)
                    ),
                    infer={"is_auxiliary": True},
                )
            sketch.deal(block, vector)
        for latent in sketch.latents:
            if latent.discrete is not None:
                sketch.mean_field(latent, self.scale)
