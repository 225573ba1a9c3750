"""The filtering variational objective of sequences."""

from typing import Literal

from pydantic import Field

from ppl_lvm.algorithm import Objective, Resampling
from ppl_lvm.draws import Draws, Loss


class fivo(Objective):
    """`E sum_t log sum_k W_k alpha_k` per row, `alpha = p(x_t, z_t | ..) / q(z_t | ..)`, in nats summed over N rows.

    K draws per row (`draws`) are particles of a filter: guide and model step together, weights W accumulate over steps,
    and where the effective number of particles `1 / sum_k W_k^2` of a row is at most `threshold` K the particles are
    drawn anew from them before the next step, their carries with them. `exp` of the bound is unbiased for p(x), so the
    bound is below log p(x); over long sequences it is far above the importance-weighted bound, which it is at
    `threshold = 0`. With `threshold = 1` particles are resampled at every step.

    The program is one `ppl.scan` in the guide and one in the model, with the latent sites of a row and its data inside;
    rows are the first axis of every array that they carry.
    Gradients leave out the score of the resampling, as the source does: it costs more in variance than it is worth.

    Source: Maddison, Lawson, Tucker, Heess, Norouzi, Mnih, Doucet, Teh (2017), Filtering Variational Objectives,
    arXiv:1705.09465; systematic resampling: Douc, Cappe, Moulines (2005), arXiv:cs/0507025.

    Example:
        >>> fivo(draws=32, threshold=1.0).resampling().threshold
        1.0
    """

    verbs = frozenset({"filtered"})
    globals = False
    bias = "the score of the resampling is left out, as in the source"

    draws: int = Field(default=16, ge=1)
    scheme: Literal["systematic", "multinomial"] = "systematic"
    threshold: float = Field(default=0.5, ge=0.0, le=1.0)

    def resampling(self) -> Resampling:
        return Resampling(self.scheme, self.threshold)

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.filtered()))
