"""Points: maximum a posteriori."""

from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.errors import ProgramError
from ppl_lvm.latents import Sketch


class delta(GuideFamily):
    """`q(z) = delta(z - value)`: with the ELBO, the mode of `p(z, x)` in z's own space (no Jacobian).

    Discrete sites have no point that moves.

    Raises:
        ProgramError: a latent site is discrete.

    Example:
        >>> delta()
        delta()
    """

    def __call__(self, sketch: Sketch) -> None:
        dist = sketch.ppl.dist
        for latent in sketch.latents:
            if latent.discrete is not None:
                raise ProgramError(
                    f"Guide 'delta' cannot move the discrete site {latent.name!r}; sum it out in the model, or use "
                    f"'auto_normal', which gives it free logits."
                )
            with sketch.inside(latent.plates):
                u = sketch.param(latent, "value", latent.initial)
                value = u if latent.transform is None else latent.transform(u)
                sketch.ppl.sample(latent.name, dist.Delta(value, event_dim=latent.event_dim))
