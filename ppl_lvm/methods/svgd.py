"""Stein variational gradient descent."""

from pydantic import Field

from ppl_lvm.algorithm import Ascent


class svgd(Ascent):
    """Particles u that follow `(1/P) sum_j k(u_j, u) d log p(u_j) / du_j + dk(u_j, u) / du_j` until they stand still.

    The first term climbs the log joint density of unconstrained values, the second keeps the P particles apart. The
    kernel is Gaussian, its bandwidth the library's median rule. The library's own implementation, with Adam. Few
    particles in many dimensions understate the spread. On NumPyro a step costs P^2 gradients, on Pyro P.

    `history["force"]` is what the library reports of every step: the norm of the update's direction on NumPyro, its
    mean square on Pyro. The particles are the draws. Parameters of the model are not trained; pass `start=`, a fit
    that did.

    Source: Liu, Wang (2016), Stein Variational Gradient Descent, arXiv:1608.04471.

    Example:
        >>> svgd(particles=50).steps
        1000
    """

    lacks = {
        "log_evidence": "particles come without a density; take laplace or a variational recipe",
        "loss": 'it has no objective; history["force"] says whether the particles still move',
        "loo": "particles push each other apart and are no independent draws to be weighted; take nuts",
    }

    steps: int = Field(default=1000, ge=1)
    particles: int = Field(default=20, ge=2)
