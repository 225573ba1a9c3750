"""Eight schools: effects of coaching on test scores, partially pooled; non-centred.

    mu ~ Normal(0, 5),  tau ~ HalfCauchy(5)
    eta_j ~ Normal(0, 1),  theta_j = mu + tau eta_j              j = 1 .. J, the schools
    y_j | theta_j ~ Normal(theta_j, sigma_j)

Eight numbers are the whole data, so the program is one row: mu, tau and eta are drawn together by the full-rank guide,
whose u = (mu, v, eta) has the posterior's correlations, with tau = 5 log(1 + exp v): a logarithm near zero, where the
posterior of log tau has a long tail, and linear above its prior's scale, where that of tau has one. `elbo` makes the
spread of tau too small by a fifth; `iwae` with two draws has means and spreads close to those of Markov chains.

Source: Rubin (1981), Estimation in Parallel Randomized Experiments, Journal of Educational Statistics 6(4) (data);
Gelman (2006), Prior Distributions for Variance Parameters in Hierarchical Models, Bayesian Analysis 1(3) (half-Cauchy
priors of tau).

Args:
    y: estimated effects [schools], points of the test.
    sigma: their standard errors [schools].
"""

import numpy as np

recipe = "elbo"

Y = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def model(ppl, y, sigma):
    dist, zero = ppl.dist, 0.0 * y
    mu = ppl.sample("mu", dist.Normal(zero[0], 5.0))
    tau = ppl.sample("tau", dist.HalfCauchy(5.0 + zero[0]))
    eta = ppl.sample("eta", dist.Normal(zero, 1.0).to_event(1))
    theta = ppl.deterministic("theta", mu[..., None] + tau[..., None] * eta)
    ppl.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def guide(ppl, y, sigma):
    dist, xp = ppl.dist, ppl.xp
    size = len(y) + 2
    loc = ppl.param("loc", lambda: np.zeros(size))
    L = ppl.param("L", lambda: 0.5 * np.eye(size), constraint=dist.constraints.lower_cholesky)
    u = ppl.sample("u", dist.MultivariateNormal(loc, scale_tril=L), infer={"is_auxiliary": True})
    v = u[..., 1]
    softplus = xp.logaddexp(0.0 * v, v)
    ppl.sample("mu", dist.Delta(u[..., 0]))
    ppl.sample("tau", dist.Delta(5.0 * softplus, log_density=softplus - v - np.log(5.0)))  # less log dtau/dv
    ppl.sample("eta", dist.Delta(u[..., 2:], event_dim=1))


def example(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"y": np.array(Y, dtype=np.float32), "sigma": np.array(SIGMA, dtype=np.float32)}
