"""`numpyro_loss`: objectives and estimators for those who keep NumPyro's own training loop."""

from __future__ import annotations

from typing import Any

from ppl_lvm import legality
from ppl_lvm.algorithm import Schedule
from ppl_lvm.backends.base import Plan, Structure
from ppl_lvm.errors import LegalityError, RecipeError
from ppl_lvm.recipe import Recipe
from ppl_lvm.recipe import recipe as load_recipe

LOOP = ("steps", "batch_size", "optimizer", "learning_rate")
"""Options of a recipe that belong to the loop."""


def numpyro_loss(recipe: Any = "elbo", *, data_plate: str | None = None, **options: Any) -> Any:
    """The loss of an objective, with its gradient estimators, for `numpyro.infer.SVI(model, guide, optim, loss=...)`.

    `init`, `update`, `evaluate` and `run` work as with NumPyro's own ELBOs, networks with batch statistics and dropout
    included; the value is the loss in nats over all rows, as in `fit`. SVI has one mode, so `svi.evaluate` keeps
    dropout on, as `update` does.

    Args:
        recipe: an objective, or whatever `ppl_lvm.recipe` takes; its optimiser, steps and batch size are not used.
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

    of_loop = [name for name in options if name in LOOP or name.startswith("optimizer.")]
    if of_loop:
        raise RecipeError(f"Options {of_loop} belong to the training loop, which here is SVI's; give them to it.")
    how = load_recipe(recipe, **options)
    moving = sorted(_scheduled(how))
    if moving:
        raise RecipeError(
            f"{moving} are schedules, and SVI does not tell a loss the step; use numbers here, or train with fit."
        )

    def planner(structure: Structure) -> Plan:
        plan, _ = legality.plan(how.objective, how.estimator, structure)
        for name, estimator in plan.estimators.items():
            if estimator.initial_state() is not None or estimator.initial_own(1):
                raise LegalityError(
                    f"Site {name!r} under estimator {type(estimator).__name__!r}: it learns as the steps go on, and "
                    f"SVI has no place for what it learns; use 'rloo' or 'vimco', or train with fit."
                )
        if how.objective.initial_own(1):
            raise LegalityError(
                f"Objective {type(how.objective).__name__!r} has parameters of its own, for which SVI has no place; "
                f"train with fit."
            )
        return plan

    return NumPyroLoss(how.objective, how.estimator, planner, data_plate)


def _scheduled(how: Recipe) -> list[str]:
    owners = {"objective": how.objective, **{f"estimator.{p}": e for p, e in how.estimator.items() if e is not None}}
    return [f"{o}.{n}" for o, a in owners.items() for n, v in a.numbers().items() if isinstance(v, Schedule)]
