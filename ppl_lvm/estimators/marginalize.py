"""Exact sum over a discrete site that only the model has."""

from ppl_lvm.algorithm import Estimator


class marginalize(Estimator):
    """`log p(x, z) = log sum_y p(x, y, z)` for a local site y of the model that the guide does not draw.

    The model is run at each of the S values of y, or of all sites that one sum is over: those that some density looks
    at together. In plates inside a row the sum is taken element by element. It enters every objective as it is, costs
    S evaluations of the model and none of the guide, and leaves no noise and no draws of y.

    Example:
        >>> marginalize().marginal, marginalize().site
        (True, 'finite')
    """

    marginal = True
    site = "finite"
