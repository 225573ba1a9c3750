"""Maximum a posteriori: the mode of the joint density."""

from typing import Literal

from ppl_lvm.algorithm import Ascent


class map(Ascent):
    """`argmax_{z, theta} log p(x, z; theta)`: one value for every latent site, and for the model's parameters.

    Adam on unconstrained values, through the `AutoDelta` guide of the backend's library. The mode depends on the
    coordinates: `density = "constrained"` maximises the density of the sites as they are written, as AutoDelta does;
    "unconstrained" that of `u = T^-1(z)`, `log p(x, T(u)) + log |det dT/du|`, whose mode `laplace` expands around.
    Parameters and latent sites are maximised jointly, which is not the maximum of the marginal likelihood: with a
    latent for every row, parameters fit the modes of those latents.

    `history["loss"]` is `-log p(x, z)` per row in nats at every step. Draws of the posterior are the mode itself.

    Source: Gelman, Carlin, Stern, Dunson, Vehtari, Rubin (2013), Bayesian Data Analysis, chapter 13.

    Example:
        >>> map(steps=100).density
        'constrained'
    """

    learns = True
    lacks = {
        "spread": "the mode is one point, so its draws are all equal; take laplace, nuts or a variational recipe",
        "loo": "the mode is one point, and leaving a row out moves it; take nuts",
    }

    density: Literal["constrained", "unconstrained"] = "constrained"
