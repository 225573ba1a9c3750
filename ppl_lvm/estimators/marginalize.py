"""Exact sum over a discrete site that only the model has."""

from ppl_lvm.algorithm import Estimator


class marginalize(Estimator):
    """`log p(x, z) = log sum_y p(x, y, z)` for a local site y of the model that the guide does not draw.

    The sum is over all sites that densities tie together, directly or by way of others, one after the other (variable
    elimination), so that its cost grows with the length of a chain as it does for the forward algorithm. The model is
    run once for all values of the sites that one density looks at: V times for a mixture of V components, V^2 times for
    a Markov chain of any length. In plates inside a row the sum is taken element by element. It enters every objective
    as it is, costs no evaluation of the guide, and leaves no noise and no draws of y.

    Source: Obermeyer, Bingham, Jankowiak, Pradhan, Chiu, Rush, Goodman (2019), Tensor Variable Elimination for Plated
    Factor Graphs, arXiv:1902.03210.

    Example:
        >>> marginalize().marginal, marginalize().site
        (True, 'finite')
    """

    marginal = True
    site = "finite"
