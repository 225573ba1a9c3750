"""Small latent-variable programs whose objectives and gradients are known exactly.

Each `Toy` is a portable program (a model and a guide that take the `ppl` namespace), the data it is run on,
and every parameter with its initial value, by group. All parameters are unconstrained reals; scales enter as
logarithms. Each distribution has a parameter among its arguments, so the programs run in the parameters'
precision.

`oracle.py` states the same densities once more, on its own, and computes from them what the programs should
give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, TypeAlias

import numpy as np

Array: TypeAlias = Any  # a torch tensor or a jax array, as the namespace has it
Ppl: TypeAlias = Any  # the namespace handed to portable programs
Values: TypeAlias = Mapping[str, np.ndarray]
Backend: TypeAlias = Literal["pyro", "numpyro"]
Program: TypeAlias = Callable[..., None]


def _values(**entries: object) -> dict[str, np.ndarray]:
    return {name: np.asarray(entry, dtype=np.float64) for name, entry in entries.items()}


@dataclass(frozen=True)
class Toy:
    """A model and a guide, the data, and the parameters of each group with their initial values."""

    name: str
    model: Program
    guide: Program
    data: Values
    model_params: Values
    guide_params: Values
    global_guide_params: tuple[str, ...] = ()

    @property
    def params(self) -> dict[str, np.ndarray]:
        """All parameters, model's and guide's; names are unique over both."""
        return {**self.model_params, **self.guide_params}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Parameter names by group: the model's, those of local guide sites, those of global guide sites."""
        above = self.global_guide_params
        local = tuple(name for name in self.guide_params if name not in above)
        return {"model": tuple(self.model_params), "local guide": local, "global guide": above}


def _reader(ppl: Ppl, inits: Values) -> Callable[[str], Array]:
    return lambda name: ppl.param(name, inits[name])


# One Bernoulli latent per row. Here d loss / d q_logit is -0.2465 for the ELBO and -0.1164 for IWAE-5.

_BERNOULLI_MODEL = _values(prior_logit=np.log(0.3 / 0.7), slope=2.0, log_scale=0.0)
_BERNOULLI_GUIDE = _values(q_logit=-1.5)


def bernoulli_model(ppl: Ppl, x: Array) -> None:
    """z ~ Bernoulli(0.3), x | z ~ Normal(2 z, 1)."""
    p = _reader(ppl, _BERNOULLI_MODEL)
    prior_logit, slope, log_scale = p("prior_logit"), p("slope"), p("log_scale")
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=prior_logit))
        ppl.sample("x", ppl.dist.Normal(slope * z, ppl.xp.exp(log_scale)), obs=x)


def bernoulli_guide(ppl: Ppl, x: Array) -> None:
    """q(z) = Bernoulli, the same for every row."""
    logit = ppl.param("q_logit", _BERNOULLI_GUIDE["q_logit"])
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Bernoulli(logits=logit))


# Two dependent categoricals, two and three classes.

_CATEGORICALS_MODEL = _values(
    z1_logits=[0.3, -0.4],
    z2_logits=[[0.2, -0.5, 0.1], [-0.3, 0.6, 0.4]],
    x_loc=[[-1.0, 0.5, 1.2], [0.3, 2.0, -0.7]],
    x_log_scale=-0.1,
)
_CATEGORICALS_GUIDE = _values(
    q_z1_logits=[-0.2, 0.5],
    q_z2_logits=[[0.7, -0.1, 0.3], [0.0, -0.6, 0.8]],
    q_z2_gain=[0.4, -0.3, 0.1],
)


def categoricals_model(ppl: Ppl, x: Array) -> None:
    """p(z1) p(z2 | z1), x | z1, z2 Gaussian with one mean per pair of classes."""
    p = _reader(ppl, _CATEGORICALS_MODEL)
    z1_logits, z2_logits, x_loc, x_log_scale = p("z1_logits"), p("z2_logits"), p("x_loc"), p("x_log_scale")
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.OneHotCategorical(logits=z1_logits))
        z2 = ppl.sample("z2", ppl.dist.OneHotCategorical(logits=z1 @ z2_logits))
        loc = ppl.xp.sum((z1 @ x_loc) * z2, axis=-1)
        ppl.sample("x", ppl.dist.Normal(loc, ppl.xp.exp(x_log_scale)), obs=x)


def categoricals_guide(ppl: Ppl, x: Array) -> None:
    """q(z1) q(z2 | z1, x)."""
    p = _reader(ppl, _CATEGORICALS_GUIDE)
    z1_logits, z2_logits, z2_gain = p("q_z1_logits"), p("q_z2_logits"), p("q_z2_gain")
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.OneHotCategorical(logits=z1_logits))
        ppl.sample("z2", ppl.dist.OneHotCategorical(logits=z1 @ z2_logits + x[..., None] * z2_gain))


# The same guide against the order of the model: the prior of z1 looks at z2, which is drawn after it, and x looks at
# z2 alone, so that z1 reaches it only through the guide. Credit assignment that misses either is biased here.

_UPWARD_MODEL = _values(
    z2_logits=[0.4, -0.3, 0.2],
    z1_logits=[[0.5, -0.2], [-0.4, 0.3], [0.1, 0.8]],
    x_loc=[-0.9, 0.4, 1.5],
    x_log_scale=-0.2,
)
_UPWARD_GUIDE = _values(
    q_z1_logits=[-0.2, 0.5], q_z2_logits=[[0.7, -0.1, 0.3], [0.0, -0.6, 0.8]], q_z1_gain=[0.4, -0.3]
)


def upward_model(ppl: Ppl, x: Array) -> None:
    """p(z2) p(z1 | z2), x | z2 Gaussian with one mean per class."""
    p = _reader(ppl, _UPWARD_MODEL)
    z2_logits, z1_logits, x_loc, x_log_scale = p("z2_logits"), p("z1_logits"), p("x_loc"), p("x_log_scale")
    with ppl.plate("data", len(x)):
        z2 = ppl.sample("z2", ppl.dist.OneHotCategorical(logits=z2_logits))
        ppl.sample("z1", ppl.dist.OneHotCategorical(logits=z2 @ z1_logits))
        ppl.sample("x", ppl.dist.Normal(z2 @ x_loc, ppl.xp.exp(x_log_scale)), obs=x)


def upward_guide(ppl: Ppl, x: Array) -> None:
    """q(z1 | x) q(z2 | z1)."""
    p = _reader(ppl, _UPWARD_GUIDE)
    z1_logits, z2_logits, z1_gain = p("q_z1_logits"), p("q_z2_logits"), p("q_z1_gain")
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.OneHotCategorical(logits=z1_logits + x[..., None] * z1_gain))
        ppl.sample("z2", ppl.dist.OneHotCategorical(logits=z1 @ z2_logits))


# A plate of rows under a global class.

_PLATE_MODEL = _values(
    g_logits=[0.4, -0.2],
    z_logits=[[0.5, -0.3], [-0.6, 0.2]],
    x_loc=[[-0.8, 1.1], [0.4, 1.9]],
    x_log_scale=-0.2,
)
_PLATE_GUIDE = _values(q_g_logits=[-0.1, 0.6], q_z_logits=[[0.2, -0.4], [-0.1, 0.3]], q_z_gain=[-0.5, 0.7])


def plate_model(ppl: Ppl, x: Array) -> None:
    """Global class g; per row p(z | g) and x | z, g Gaussian with one mean per pair of classes."""
    p = _reader(ppl, _PLATE_MODEL)
    g_logits, z_logits, x_loc, x_log_scale = p("g_logits"), p("z_logits"), p("x_loc"), p("x_log_scale")
    g = ppl.sample("g", ppl.dist.OneHotCategorical(logits=g_logits))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.OneHotCategorical(logits=g @ z_logits))
        loc = ppl.xp.sum((g @ x_loc) * z, axis=-1)
        ppl.sample("x", ppl.dist.Normal(loc, ppl.xp.exp(x_log_scale)), obs=x)


def plate_guide(ppl: Ppl, x: Array) -> None:
    """q(g) and, per row, q(z | g, x)."""
    p = _reader(ppl, _PLATE_GUIDE)
    g_logits, z_logits, z_gain = p("q_g_logits"), p("q_z_logits"), p("q_z_gain")
    g = ppl.sample("g", ppl.dist.OneHotCategorical(logits=g_logits))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.OneHotCategorical(logits=g @ z_logits + x[..., None] * z_gain))


# A Gaussian and a class in one row, in both orders.

_MIXED_YZ_MODEL = _values(
    z_loc=0.3,
    z_log_scale=0.1,
    y_logits=[0.2, -0.3],
    y_gain=[-0.6, 0.9],
    x_level=[-0.5, 0.8],
    x_gain=0.7,
    x_log_scale=-0.3,
)
_MIXED_YZ_GUIDE = _values(q_z_loc=-0.2, q_z_gain=0.4, q_z_log_scale=-0.1, q_y_logits=[0.6, -0.5], q_y_gain=[0.8, -0.5])


def mixed_yz_model(ppl: Ppl, x: Array) -> None:
    """p(z) Gaussian, class y given z, x | y, z Gaussian."""
    p = _reader(ppl, _MIXED_YZ_MODEL)
    z_loc, z_log_scale, y_logits, y_gain = p("z_loc"), p("z_log_scale"), p("y_logits"), p("y_gain")
    x_level, x_gain, x_log_scale = p("x_level"), p("x_gain"), p("x_log_scale")
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(z_loc, ppl.xp.exp(z_log_scale)))
        y = ppl.sample("y", ppl.dist.OneHotCategorical(logits=y_logits + z[..., None] * y_gain))
        ppl.sample("x", ppl.dist.Normal(y @ x_level + x_gain * z, ppl.xp.exp(x_log_scale)), obs=x)


def mixed_yz_guide(ppl: Ppl, x: Array) -> None:
    """q(z | x) Gaussian, then q(y | z)."""
    p = _reader(ppl, _MIXED_YZ_GUIDE)
    z_loc, z_gain, z_log_scale = p("q_z_loc"), p("q_z_gain"), p("q_z_log_scale")
    y_logits, y_gain = p("q_y_logits"), p("q_y_gain")
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(z_loc + z_gain * x, ppl.xp.exp(z_log_scale)))
        ppl.sample("y", ppl.dist.OneHotCategorical(logits=y_logits + z[..., None] * y_gain))


_MIXED_ZY_MODEL = _values(
    y_logits=[0.2, -0.3],
    z_loc=[-0.7, 0.6],
    z_log_scale=[0.1, -0.2],
    x_level=[-0.5, 0.8],
    x_gain=0.7,
    x_log_scale=-0.3,
)
_MIXED_ZY_GUIDE = _values(q_y_logits=[0.6, -0.5], q_z_loc=[-0.4, 0.5], q_z_gain=0.3, q_z_log_scale=[-0.1, 0.2])


def mixed_zy_model(ppl: Ppl, x: Array) -> None:
    """Class y, Gaussian z given y, x | y, z Gaussian."""
    p = _reader(ppl, _MIXED_ZY_MODEL)
    y_logits, z_loc, z_log_scale = p("y_logits"), p("z_loc"), p("z_log_scale")
    x_level, x_gain, x_log_scale = p("x_level"), p("x_gain"), p("x_log_scale")
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", ppl.dist.OneHotCategorical(logits=y_logits))
        z = ppl.sample("z", ppl.dist.Normal(y @ z_loc, ppl.xp.exp(y @ z_log_scale)))
        ppl.sample("x", ppl.dist.Normal(y @ x_level + x_gain * z, ppl.xp.exp(x_log_scale)), obs=x)


def mixed_zy_guide(ppl: Ppl, x: Array) -> None:
    """q(y), then q(z | y, x) Gaussian."""
    p = _reader(ppl, _MIXED_ZY_GUIDE)
    y_logits, z_loc, z_gain, z_log_scale = p("q_y_logits"), p("q_z_loc"), p("q_z_gain"), p("q_z_log_scale")
    with ppl.plate("data", len(x)):
        y = ppl.sample("y", ppl.dist.OneHotCategorical(logits=y_logits))
        ppl.sample("z", ppl.dist.Normal(y @ z_loc + z_gain * x, ppl.xp.exp(y @ z_log_scale)))


# Two Gaussians, the guide in the order of the model.

_GAUSSIANS2_MODEL = _values(
    z1_loc=0.2, z1_log_scale=0.1, z2_gain=0.9, z2_bias=-0.3, z2_log_scale=-0.2, x_gain=1.2, x_log_scale=-0.4
)
_GAUSSIANS2_GUIDE = _values(
    q_z1_loc=-0.1,
    q_z1_gain=0.3,
    q_z1_log_scale=-0.2,
    q_z2_loc=0.1,
    q_z2_gain=0.6,
    q_z2_x=0.2,
    q_z2_log_scale=-0.3,
)


def gaussians2_model(ppl: Ppl, x: Array) -> None:
    """p(z1) p(z2 | z1) p(x | z2), linear and Gaussian."""
    p = _reader(ppl, _GAUSSIANS2_MODEL)
    z1_loc, z1_log_scale, z2_gain, z2_bias = p("z1_loc"), p("z1_log_scale"), p("z2_gain"), p("z2_bias")
    z2_log_scale, x_gain, x_log_scale = p("z2_log_scale"), p("x_gain"), p("x_log_scale")
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.Normal(z1_loc, ppl.xp.exp(z1_log_scale)))
        z2 = ppl.sample("z2", ppl.dist.Normal(z2_gain * z1 + z2_bias, ppl.xp.exp(z2_log_scale)))
        ppl.sample("x", ppl.dist.Normal(x_gain * z2, ppl.xp.exp(x_log_scale)), obs=x)


def gaussians2_guide(ppl: Ppl, x: Array) -> None:
    """q(z1 | x) q(z2 | z1, x): the mean of z2 depends on z1."""
    p = _reader(ppl, _GAUSSIANS2_GUIDE)
    z1_loc, z1_gain, z1_log_scale = p("q_z1_loc"), p("q_z1_gain"), p("q_z1_log_scale")
    z2_loc, z2_gain, z2_x, z2_log_scale = p("q_z2_loc"), p("q_z2_gain"), p("q_z2_x"), p("q_z2_log_scale")
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.Normal(z1_loc + z1_gain * x, ppl.xp.exp(z1_log_scale)))
        ppl.sample("z2", ppl.dist.Normal(z2_loc + z2_gain * z1 + z2_x * x, ppl.xp.exp(z2_log_scale)))


# Two Gaussians, the guide against the order of the model: a closed-form KL of z1, whose prior has the parent
# z2 that the guide draws from z1, would be wrong here.

_BOTTOM_UP_MODEL = _values(
    z2_loc=-0.1, z2_log_scale=0.1, z1_gain=0.9, z1_bias=0.2, z1_log_scale=-0.2, x_gain=1.1, x_log_scale=-0.1
)
_BOTTOM_UP_GUIDE = _values(
    q_z1_loc=0.1, q_z1_gain=0.2, q_z1_log_scale=-0.4, q_z2_loc=-0.2, q_z2_gain=0.3, q_z2_log_scale=-0.3
)


def bottom_up_model(ppl: Ppl, x: Array) -> None:
    """p(z2) p(z1 | z2) p(x | z1), linear and Gaussian."""
    p = _reader(ppl, _BOTTOM_UP_MODEL)
    z2_loc, z2_log_scale, z1_gain, z1_bias = p("z2_loc"), p("z2_log_scale"), p("z1_gain"), p("z1_bias")
    z1_log_scale, x_gain, x_log_scale = p("z1_log_scale"), p("x_gain"), p("x_log_scale")
    with ppl.plate("data", len(x)):
        z2 = ppl.sample("z2", ppl.dist.Normal(z2_loc, ppl.xp.exp(z2_log_scale)))
        z1 = ppl.sample("z1", ppl.dist.Normal(z1_gain * z2 + z1_bias, ppl.xp.exp(z1_log_scale)))
        ppl.sample("x", ppl.dist.Normal(x_gain * z1, ppl.xp.exp(x_log_scale)), obs=x)


def bottom_up_guide(ppl: Ppl, x: Array) -> None:
    """q(z1 | x) q(z2 | z1)."""
    p = _reader(ppl, _BOTTOM_UP_GUIDE)
    z1_loc, z1_gain, z1_log_scale = p("q_z1_loc"), p("q_z1_gain"), p("q_z1_log_scale")
    z2_loc, z2_gain, z2_log_scale = p("q_z2_loc"), p("q_z2_gain"), p("q_z2_log_scale")
    with ppl.plate("data", len(x)):
        z1 = ppl.sample("z1", ppl.dist.Normal(z1_loc + z1_gain * x, ppl.xp.exp(z1_log_scale)))
        ppl.sample("z2", ppl.dist.Normal(z2_loc + z2_gain * z1, ppl.xp.exp(z2_log_scale)))


# Guides that are the exact posterior: log w is the log evidence at every draw.

_CONJUGATE_MODEL = _values(z_loc=0.4, z_log_scale=-0.2, x_log_scale=0.3)


def _conjugate_posterior() -> dict[str, np.ndarray]:
    prior, noise = np.exp(2 * _CONJUGATE_MODEL["z_log_scale"]), np.exp(2 * _CONJUGATE_MODEL["x_log_scale"])
    gain = prior / (prior + noise)
    return _values(
        q_gain=gain,
        q_bias=(1 - gain) * _CONJUGATE_MODEL["z_loc"],
        q_log_scale=0.5 * np.log(prior * noise / (prior + noise)),
    )


_CONJUGATE_GUIDE = _conjugate_posterior()


def conjugate_normal_model(ppl: Ppl, x: Array) -> None:
    """z ~ Normal, x | z ~ Normal(z, .)."""
    p = _reader(ppl, _CONJUGATE_MODEL)
    z_loc, z_log_scale, x_log_scale = p("z_loc"), p("z_log_scale"), p("x_log_scale")
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(z_loc, ppl.xp.exp(z_log_scale)))
        ppl.sample("x", ppl.dist.Normal(z, ppl.xp.exp(x_log_scale)), obs=x)


def conjugate_normal_guide(ppl: Ppl, x: Array) -> None:
    """The exact posterior of each row."""
    p = _reader(ppl, _CONJUGATE_GUIDE)
    gain, bias, log_scale = p("q_gain"), p("q_bias"), p("q_log_scale")
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(gain * x + bias, ppl.xp.exp(log_scale)))


_FACTORS_MODEL = _values(
    z_loc=[0.0, 0.0],
    loading=[[0.8, -0.4, 0.5], [0.3, 0.9, -0.6]],
    x_bias=[0.1, -0.2, 0.3],
    x_log_scale=[-0.3, 0.1, -0.1],
)


def _factors_posterior() -> dict[str, np.ndarray]:
    loading, precision = _FACTORS_MODEL["loading"], np.exp(-2 * _FACTORS_MODEL["x_log_scale"])
    covariance = np.linalg.inv(np.eye(2) + (loading * precision) @ loading.T)
    weight = (loading * precision).T @ covariance
    return _values(
        q_weight=weight,
        q_bias=-_FACTORS_MODEL["x_bias"] @ weight,
        q_scale_tril=np.linalg.cholesky(covariance),
    )


_FACTORS_GUIDE = _factors_posterior()


def linear_gaussian_factors_model(ppl: Ppl, x: Array) -> None:
    """z ~ Normal(z_loc, I) of two dimensions, x | z ~ Normal(z @ loading + bias, .) of three."""
    p = _reader(ppl, _FACTORS_MODEL)
    z_loc, loading, x_bias, x_log_scale = p("z_loc"), p("loading"), p("x_bias"), p("x_log_scale")
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(z_loc, 1.0).to_event(1))
        ppl.sample("x", ppl.dist.Normal(z @ loading + x_bias, ppl.xp.exp(x_log_scale)).to_event(1), obs=x)


def linear_gaussian_factors_guide(ppl: Ppl, x: Array) -> None:
    """The exact posterior of each row, with its full covariance."""
    p = _reader(ppl, _FACTORS_GUIDE)
    weight, bias, scale_tril = p("q_weight"), p("q_bias"), p("q_scale_tril")
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.MultivariateNormal(x @ weight + bias, scale_tril=scale_tril))


# Twenty linear Gaussian rows, alone or under a global Gaussian: a mini-batch and its scale show here.

_ROWS_MODEL = _values(z_log_scale=-0.1, x_log_scale=-0.3)
_ROWS_GUIDE = _values(q_z_gain=0.45, q_z_bias=0.1, q_z_log_scale=-0.2)
_GLOBAL_ROWS_MODEL = {**_values(g_log_scale=0.2), **_ROWS_MODEL}
_GLOBAL_ROWS_GUIDE = {**_values(q_g_loc=0.15, q_g_log_scale=-1.0, q_z_g=-0.3), **_ROWS_GUIDE}


def rows_model(ppl: Ppl, x: Array) -> None:
    """z_n ~ Normal(0, .), x_n | z_n ~ Normal(z_n, .)."""
    p = _reader(ppl, _ROWS_MODEL)
    z_scale, x_scale = ppl.xp.exp(p("z_log_scale")), ppl.xp.exp(p("x_log_scale"))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, z_scale))
        ppl.sample("x", ppl.dist.Normal(z, x_scale), obs=x)


def rows_guide(ppl: Ppl, x: Array) -> None:
    """q(z_n | x_n), not the exact posterior."""
    p = _reader(ppl, _ROWS_GUIDE)
    gain, bias, log_scale = p("q_z_gain"), p("q_z_bias"), p("q_z_log_scale")
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(gain * x + bias, ppl.xp.exp(log_scale)))


def global_rows_model(ppl: Ppl, x: Array) -> None:
    """g ~ Normal(0, .), z_n ~ Normal(0, .), x_n | g, z_n ~ Normal(g + z_n, .)."""
    p = _reader(ppl, _GLOBAL_ROWS_MODEL)
    g_scale, z_scale, x_scale = (ppl.xp.exp(p(f"{name}_log_scale")) for name in "gzx")
    g = ppl.sample("g", ppl.dist.Normal(0.0, g_scale))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0, z_scale))
        ppl.sample("x", ppl.dist.Normal(g + z, x_scale), obs=x)


def global_rows_guide(ppl: Ppl, x: Array) -> None:
    """q(g) and, per row, q(z_n | g, x_n)."""
    p = _reader(ppl, _GLOBAL_ROWS_GUIDE)
    g_loc, g_log_scale, z_g = p("q_g_loc"), p("q_g_log_scale"), p("q_z_g")
    gain, bias, log_scale = p("q_z_gain"), p("q_z_bias"), p("q_z_log_scale")
    g = ppl.sample("g", ppl.dist.Normal(g_loc, ppl.xp.exp(g_log_scale)))
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Normal(gain * x + bias + z_g * g, ppl.xp.exp(log_scale)))


BERNOULLI = Toy("bernoulli", bernoulli_model, bernoulli_guide, _values(x=[1.5]), _BERNOULLI_MODEL, _BERNOULLI_GUIDE)
CATEGORICALS = Toy(
    "categoricals",
    categoricals_model,
    categoricals_guide,
    _values(x=[0.9]),
    _CATEGORICALS_MODEL,
    _CATEGORICALS_GUIDE,
)
UPWARD = Toy("upward", upward_model, upward_guide, _values(x=[0.9]), _UPWARD_MODEL, _UPWARD_GUIDE)
PLATE = Toy(
    "plate",
    plate_model,
    plate_guide,
    _values(x=[-0.6, 0.7, 1.8]),
    _PLATE_MODEL,
    _PLATE_GUIDE,
    global_guide_params=("q_g_logits",),
)
MIXED_YZ = Toy("mixed_yz", mixed_yz_model, mixed_yz_guide, _values(x=[0.8]), _MIXED_YZ_MODEL, _MIXED_YZ_GUIDE)
MIXED_ZY = Toy("mixed_zy", mixed_zy_model, mixed_zy_guide, _values(x=[0.8]), _MIXED_ZY_MODEL, _MIXED_ZY_GUIDE)
GAUSSIANS2 = Toy(
    "gaussians2", gaussians2_model, gaussians2_guide, _values(x=[1.1]), _GAUSSIANS2_MODEL, _GAUSSIANS2_GUIDE
)
BOTTOM_UP = Toy("bottom_up", bottom_up_model, bottom_up_guide, _values(x=[0.6]), _BOTTOM_UP_MODEL, _BOTTOM_UP_GUIDE)
CONJUGATE_NORMAL = Toy(
    "conjugate_normal",
    conjugate_normal_model,
    conjugate_normal_guide,
    _values(x=[-0.7, 0.2, 1.6]),
    _CONJUGATE_MODEL,
    _CONJUGATE_GUIDE,
)
LINEAR_GAUSSIAN_FACTORS = Toy(
    "linear_gaussian_factors",
    linear_gaussian_factors_model,
    linear_gaussian_factors_guide,
    _values(x=[[0.4, -0.9, 1.1], [-1.2, 0.3, 0.2], [0.6, 1.4, -0.5], [0.0, -0.3, 2.0]]),
    _FACTORS_MODEL,
    _FACTORS_GUIDE,
)
_TWENTY = _values(x=1.4 * np.sin(1.7 * np.arange(20)) + 0.3)
ROWS = Toy("rows", rows_model, rows_guide, _TWENTY, _ROWS_MODEL, _ROWS_GUIDE)
GLOBAL_ROWS = Toy(
    "global_rows",
    global_rows_model,
    global_rows_guide,
    _TWENTY,
    _GLOBAL_ROWS_MODEL,
    _GLOBAL_ROWS_GUIDE,
    global_guide_params=("q_g_loc", "q_g_log_scale"),
)

TOYS: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        BERNOULLI,
        CATEGORICALS,
        UPWARD,
        PLATE,
        MIXED_YZ,
        MIXED_ZY,
        GAUSSIANS2,
        BOTTOM_UP,
        CONJUGATE_NORMAL,
        LINEAR_GAUSSIAN_FACTORS,
        ROWS,
        GLOBAL_ROWS,
    )
}
DISCRETE = (BERNOULLI, CATEGORICALS, UPWARD, PLATE)


def native_rows(
    backend: Backend, *, with_global: bool = False, subsample_size: int | None = None
) -> tuple[Program, Program]:
    """`ROWS`, or with a global latent `GLOBAL_ROWS`, as a model and guide written for one library.

    `subsample_size` goes to the program's own data plate: the model takes all rows and picks the plate's.
    """
    ppl, dist = import_module(backend), import_module(f"{backend}.distributions")
    xp = import_module("torch" if backend == "pyro" else "jax.numpy")
    inits = (GLOBAL_ROWS if with_global else ROWS).params

    def reader(x: Array) -> Callable[[str], Array]:
        return lambda name: ppl.param(name, xp.asarray(inits[name], dtype=x.dtype, copy=True))

    def model(x: Array) -> None:
        p = reader(x)
        z_scale, x_scale = xp.exp(p("z_log_scale")), xp.exp(p("x_log_scale"))
        g = ppl.sample("g", dist.Normal(0.0, xp.exp(p("g_log_scale")))) if with_global else 0.0
        with ppl.plate("data", len(x), subsample_size=subsample_size) as rows:
            z = ppl.sample("z", dist.Normal(0.0, z_scale))
            ppl.sample("x", dist.Normal(g + z, x_scale), obs=x[rows])

    def guide(x: Array) -> None:
        p = reader(x)
        gain, bias, scale = p("q_z_gain"), p("q_z_bias"), xp.exp(p("q_z_log_scale"))
        shift: Array = 0.0
        if with_global:
            shift = p("q_z_g") * ppl.sample("g", dist.Normal(p("q_g_loc"), xp.exp(p("q_g_log_scale"))))
        with ppl.plate("data", len(x), subsample_size=subsample_size) as rows:
            ppl.sample("z", dist.Normal(gain * x[rows] + bias + shift, scale))

    return model, guide
