"""Objectives and estimators as losses for the training loops of the host libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppl_lvm import legality
from ppl_lvm.errors import ProgramError, RecipeError
from ppl_lvm.posterior import Fit
from ppl_lvm.recipe import Recipe, recipe

if TYPE_CHECKING:
    from ppl_lvm.backends._pyro_facade import PyroLoss

_FORM = ("name", "objective", "estimator")


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
    how, plain = recipe(objective, **options), recipe(objective)
    theirs = [f for f in Recipe.model_fields if f not in _FORM and getattr(how, f) != getattr(plain, f)]
    if theirs:
        raise RecipeError(
            f"{', '.join(theirs)} was given to pyro_loss, but the loop and its optimiser are those of SVI; give it to "
            f"them."
        )
    from ppl_lvm.backends._pyro_facade import PyroLoss

    def planned(structure: Any) -> Any:
        return legality.plan(how.objective, how.estimator, structure)[0]

    return PyroLoss(how.objective, how.optimizer, planned, total_rows=total_rows, data_plate=data_plate)


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
