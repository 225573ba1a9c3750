"""Independent normals in unconstrained space."""

from pydantic import Field

from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.latents import Sketch


class auto_normal(GuideFamily):
    """`q(z) = prod_i Normal(u_i; loc_i, scale_i) |du_i / dz_i|`: every unconstrained element u_i on its own.

    Discrete sites (Bernoulli, categorical, one-hot) get free logits. A site inside the data plate has parameters for
    every row. Starts at the median of prior draws.

    Args:
        scale: initial standard deviation of u.

    Source: Kucukelbir, Tran, Ranganath, Gelman, Blei (2016), Automatic Differentiation Variational Inference,
    arXiv:1603.00788.

    Example:
        >>> auto_normal(scale=0.5).scale
        0.5
    """

    scale: float = Field(default=0.1, gt=0)

    def __call__(self, sketch: Sketch) -> None:
        for latent in sketch.latents:
            sketch.mean_field(latent, self.scale)
