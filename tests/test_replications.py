"""Published experiments, with the margins by which their order was measured (see docs/results.md)."""

import numpy as np
import pytest

from benchmarks import vis_mixture


@pytest.mark.slow
def test_a_covering_guide_finds_both_modes() -> None:
    """VIS on the mixture of Li, Wang, Li and Wu (2024): densities of pairs, and the order of the four methods.

    Pairs of the same data, noise and order of rows; margins are half of the measured differences or less. Every method
    reaches the best log p(x), of one bit, which does not tell them apart.
    """
    rng = np.random.default_rng(0)
    train, test = (vis_mixture.draw(rng, vis_mixture.ROWS) for _ in range(2))
    found = {m: vis_mixture.run(m, 1, 1000, train, test) for m in vis_mixture.METHODS}
    vis = found["VIS"]
    assert vis["CLL"] >= -3.4 and vis["HLL"] >= -2.95
    assert all(abs(scores["gap"]) < 2e-3 for scores in found.values())
    for method, least in {"VBIS": 1.0, "CHIVI": 1.0, "VI": 2.5}.items():
        assert vis["CLL"] - found[method]["CLL"] >= least, method
