"""The no-U-turn sampler."""

from pydantic import Field

from ppl_lvm.algorithm import Method


class nuts(Method):
    """Draws of a Markov chain whose stationary distribution is `p(z | x)`: Hamiltonian Monte Carlo without U-turns.

    The library's own NUTS on unconstrained values of all latent sites, step size and mass matrix adapted in `warmup`
    steps. Chains run one after the other, from points and random numbers of their own. `run.stats` and the
    sample_stats of `run.to_arviz()` hold what the library reports; divergences are counted in `messages`.

    Parameters of the model are not trained; pass `start=`, a fit that did.

    Source: Hoffman, Gelman (2014), The No-U-Turn Sampler, JMLR 15, arXiv:1111.4246.

    Example:
        >>> nuts(draws=200, chains=4).warmup
        500
    """

    lacks = {
        "log_evidence": "a chain gives draws without their density; take laplace or a variational recipe",
    }

    warmup: int = Field(default=500, ge=1)
    draws: int = Field(default=1000, ge=1)
    chains: int = Field(default=1, ge=1)
    target_accept: float = Field(default=0.8, gt=0, lt=1)
    dense_mass: bool = False
    max_tree_depth: int = Field(default=10, ge=1)
