"""Latent-variable models as Pyro or NumPyro programs, fitted by declarative recipes."""

# Imported here, not on first use: `fit`, `program` and `recipe` are also names of modules of the package, and what is
# bound last wins. None of these imports a framework.
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.facades import numpyro_loss, pyro_loss, to_pyro
from ppl_lvm.fit import fit, refit
from ppl_lvm.loading import load
from ppl_lvm.posterior import Fit, State
from ppl_lvm.program import Program, program, programs
from ppl_lvm.recipe import Recipe, recipe, recipes

__all__ = [
    "Draws",
    "Fit",
    "Loss",
    "Program",
    "Recipe",
    "State",
    "fit",
    "load",
    "numpyro_loss",
    "program",
    "programs",
    "pyro_loss",
    "recipe",
    "recipes",
    "refit",
    "to_pyro",
]
