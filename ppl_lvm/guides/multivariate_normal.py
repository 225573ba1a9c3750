"""Full-rank normals in unconstrained space."""

import numpy as np
from pydantic import Field

from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.latents import Sketch


class multivariate_normal(GuideFamily):
    """`u ~ MultivariateNormal(loc, L L^T)` with `L = diag(scale) (I + strictly lower(lower))`, z = T(u).

    One u for all continuous sites outside the data plate, and one for those of every row: rows are independent of each
    other and of the global sites given x, so every row has a density and per-row bounds are legal. Discrete sites get
    free logits.

    Args:
        scale: initial standard deviation of u.

    Source: Kucukelbir, Tran, Ranganath, Gelman, Blei (2016), Automatic Differentiation Variational Inference,
    arXiv:1603.00788 (full rank).

    Example:
        >>> multivariate_normal().scale
        0.1
    """

    scale: float = Field(default=0.1, gt=0)

    def __call__(self, sketch: Sketch) -> None:
        ppl = sketch.ppl
        for name, block in sketch.blocks():
            size = sum(s.size for s in block)
            with sketch.inside(sketch.row_plates(block)):
                loc = sketch.table(block[0], f"auto.{name}.loc", np.concatenate([s.initial.ravel() for s in block]))
                scale = sketch.table(
                    block[0], f"auto.{name}.scale", np.full(size, self.scale), ppl.dist.constraints.positive
                )
                lower = sketch.table(block[0], f"auto.{name}.lower", np.zeros((size, size)))
                factor = scale[..., None] * (ppl.xp.tril(lower, k=-1) + ppl.ops.eye(size, lower))
                vector = ppl.sample(
                    f"auto.{name}",
                    ppl.dist.MultivariateNormal(sketch.place(block, loc), scale_tril=sketch.place(block, factor)),
                    infer={"is_auxiliary": True},
                )
            sketch.deal(block, vector)
        for latent in sketch.latents:
            if latent.discrete is not None:
                sketch.mean_field(latent, self.scale)
