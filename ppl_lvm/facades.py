"""Objectives and estimators as losses for the training loops of the host libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ppl_lvm import legality
from ppl_lvm.algorithm import Algorithm, Objective, Schedule
from ppl_lvm.backends.structure import Plan, Structure
from ppl_lvm.errors import LegalityError, ProgramError, RecipeError
from ppl_lvm.posterior import Fit
from ppl_lvm.recipe import Recipe, recipe

if TYPE_CHECKING:
    from ppl_lvm.backends._numpyro_facade import NumPyroLoss
    from ppl_lvm.backends._pyro_facade import PyroLoss

_FORM = ("name", "objective", "estimator")


def _without_loop(asker: str, asked: Any, options: Mapping[str, Any]) -> tuple[Recipe, Objective]:
    """The recipe and its objective, unless options were given that are the loop's."""
    how, plain = recipe(asked, **options), recipe(asked)
    theirs = [f for f in Recipe.model_fields if f not in _FORM and getattr(how, f) != getattr(plain, f)]
    if theirs:
        raise RecipeError(
            f"{', '.join(theirs)} was given to {asker}, but the loop and its optimiser are those of SVI; give it to "
            f"them."
        )
    if how.objective is not None and how.objective.model_first():
        raise RecipeError(
            f"{asker} was asked for objective {type(how.objective).__name__!r} with the model moved first in every "
            f"step, and SVI moves all parameters at once; leave sequential out, or train with fit."
        )
    if how.objective is None:
        raise RecipeError(f"Recipe {how.name!r} has a method, which is no loss of SVI; run it with fit.")
    return how, how.objective


def pyro_loss(
    objective: Any, *, total_rows: int | None = None, data_plate: str | None = None, **options: Any
) -> PyroLoss:
    """A recipe's objective and estimators as the `loss` of `pyro.infer.SVI`, for a training loop of one's own.

    The value is that of `fit`: the objective over all rows in nats, `E_q(g) [log p(g) - log q(g) + N/B sum_n l_n]`
    with its sign turned. Gradients go to Pyro's parameter store, to each group of parameters its own. Moving averages
    of baselines are kept in the object, so a second program needs a second one.

    Args:
        objective: a name, a path, a mapping, a Recipe or an objective, as for `recipe`.
        total_rows: N where a step is given a mini-batch of B rows; None: the rows given are all, or the program's
            own subsampling says how many there are.
        data_plate: the plate of the rows where the program leaves it open; "none": the whole program is one row.
        **options: options of the objective and the estimators, `draws=8`, `estimator="dreg"`.

    Raises:
        RecipeError: an option is unknown, or is the loop's or the optimiser's.
        ProgramError, LegalityError, BackendError: at the first step, for the same reasons as `fit`.

    Example:
        >>> import pyro, torch
        >>> from ppl_lvm import pyro_loss
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        ...         pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     a = pyro.param("a", torch.tensor(0.1))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", pyro.distributions.Normal(a * x, 0.7))
        >>> loss = pyro_loss("iwae", draws=8, estimator="dreg")
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
        >>> isinstance(svi.step(torch.randn(10)), float)
        True
    """
    from ppl_lvm.backends._pyro_facade import PyroLoss

    how, loss = _without_loop("pyro_loss", objective, options)

    def planned(structure: Structure) -> Plan:
        return _checked(legality.plan(loss, how.estimator, structure)[0])

    return PyroLoss(loss, planned, total_rows=total_rows, data_plate=data_plate)


def numpyro_loss(objective: Any = "elbo", *, data_plate: str | None = None, **options: Any) -> NumPyroLoss:
    """The loss of an objective, with its gradient estimators, for `numpyro.infer.SVI(model, guide, optim, loss=...)`.

    `init`, `update`, `evaluate` and `run` work as with NumPyro's own ELBOs, networks with batch statistics and dropout
    included; the value is the loss in nats over all rows, as in `fit`. SVI has one mode, so `svi.evaluate` keeps
    dropout on, as `update` does.

    Args:
        objective: an objective, or whatever `recipe` takes; the options of its loop are not used.
        data_plate: the plate of the rows where the program leaves it open; "none": the whole program is one row.
        **options: options of the objective and the estimators, `draws=8`, `estimator={"z": "dreg"}`.

    Raises:
        RecipeError: unknown options, options of the loop, or a schedule, which needs a step that SVI does not tell.
        LegalityError: at the first call, where objective, estimators and program do not go together.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> import jax
        >>> def model(x):
        ...     with numpyro.plate("rows", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = numpyro.param("slope", 0.1)
        ...     with numpyro.plate("rows", len(x)):
        ...         numpyro.sample("z", dist.Normal(slope * x, 0.7))
        >>> loss = numpyro_loss("iwae", draws=8, estimator="dreg")
        >>> svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.05), loss)
        >>> result = svi.run(jax.random.key(0), 20, jax.numpy.arange(4.0), progress_bar=False)
        >>> result.losses.shape
        (20,)
    """
    from ppl_lvm.backends._numpyro_facade import NumPyroLoss

    how, loss = _without_loop("numpyro_loss", objective, options)
    moving = sorted(_scheduled(how))
    if moving:
        raise RecipeError(
            f"{moving} are schedules, and SVI does not tell a loss the step; use numbers here, or train with fit."
        )

    def planner(structure: Structure) -> Plan:
        plan = _checked(legality.plan(loss, how.estimator, structure)[0])
        for name, estimator in plan.estimators.items():
            if estimator.initial_state() is not None or estimator.initial_own(1):
                raise LegalityError(
                    f"Site {name!r} under estimator {type(estimator).__name__!r}: it learns as the steps go on, and "
                    f"SVI has no place for what it learns; use 'rloo' or 'vimco', or train with fit."
                )
        if loss.initial_own(1):
            raise LegalityError(
                f"Objective {type(loss).__name__!r} has parameters of its own, for which SVI has no place; "
                f"train with fit."
            )
        return plan

    return NumPyroLoss(loss, how.estimator, planner, data_plate)


def _checked(plan: Plan) -> Plan:
    for name, estimator in plan.estimators.items():
        if estimator.linear:
            raise LegalityError(
                f"Site {name!r} under estimator {type(estimator).__name__!r}: whether densities are linear in it is "
                f"looked at by fit, before it trains; train with fit, or use 'pathwise'."
            )
    return plan


def _scheduled(how: Recipe) -> list[str]:
    estimators = {f"estimator.{p}": e for p, e in how.estimator.items() if e is not None}
    owners: dict[str, Algorithm] = {"objective": how.algorithm, **estimators}
    return [f"{o}.{n}" for o, a in owners.items() for n, v in a.numbers().items() if isinstance(v, Schedule)]


def to_pyro(run: Fit) -> None:
    """Writes fitted parameters into the modules and autoguides of a native Pyro program, and into the parameter store.

    A fit leaves them as they are. Afterwards `guide.quantiles`, `pyro.infer.Predictive` and an SVI loop go on from the
    fit. Parameters of the store that have these names are replaced.

    Raises:
        ProgramError: the fit is not one of a native program on Pyro.

    Example:
        >>> import pyro, torch
        >>> from ppl_lvm import fit, to_pyro
        >>> def model(x):
        ...     mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", pyro.distributions.Normal(mu, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> to_pyro(fit(model, guide, torch.randn(20), "elbo", steps=50, batch_size=None))
        >>> guide.median()["mu"].shape
        torch.Size([])
    """
    if run.backend != "pyro" or run.program.portable:
        kind = f"a portable program on {run.backend}" if run.program.portable else f"a program of {run.backend}"
        raise ProgramError(f"to_pyro was given a fit of {kind}; only native programs of Pyro own their parameters.")
    run._bound.write(run._trained)
