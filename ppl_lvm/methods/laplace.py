"""The Laplace approximation."""

from ppl_lvm.algorithm import Ascent


class laplace(Ascent):
    """`Normal(m, H^-1)` of unconstrained values u, with m the mode and `H = -d2 log p(x, T(u)) |dT/du| / du2` there.

    Adam finds m (`AutoLaplaceApproximation` of the backend's library), then H is computed, [D, D] for all D numbers of
    all latent sites together: meant for some hundred of them. Exact where the posterior is Gaussian in u. `messages`
    says how far from the mode the search ended, if that is more than 0.01 posterior standard deviations.

    Its density is known, so `run.log_evidence()` is an importance estimate of `log p(x)`. Parameters of the model are
    not trained; pass `start=`, a fit that did.

    Raises:
        PplLvmError: H is not positive definite where the search ended.

    Source: Tierney, Kadane (1986), Accurate Approximations for Posterior Moments and Marginal Densities, JASA 81(393).

    Example:
        >>> laplace(steps=500).learns
        False
    """

    lacks = {
        "loo": "a Gaussian in its place is not the posterior that rows are left out of; take nuts",
    }
