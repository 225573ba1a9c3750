"""The errors this library raises. Each message says what was asked, what was found, and what to do."""

from __future__ import annotations

from typing import Any


def first_line(error: BaseException) -> str:
    """What another library's error says, at its shortest: its first line, or its kind where it says nothing."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line[:300] or type(error).__name__


class PplLvmError(ValueError):
    """Base class of every error that ppl_lvm raises on purpose."""


class RecipeError(PplLvmError):
    """A recipe, an objective, an estimator or one of their options is unknown or out of range."""


class ProgramError(PplLvmError):
    """A program cannot be loaded, or its model and guide do not fit together."""


class DataError(PplLvmError):
    """The data do not fit the program: wrong shapes, types, or values outside a site's support."""


class LegalityError(PplLvmError):
    """An objective, an estimator and a site do not go together; raised before training starts."""


class BackendError(PplLvmError):
    """A backend is missing, or cannot do what was asked of it."""


class StorageError(PplLvmError):
    """What was saved cannot be written, read or understood, or is not what it says it is."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a fit between two steps.

    Args:
        where: the step at which it ended.
        onwards: how it goes on.
        fit: the fit so far, with the best parameters where there is early stopping.
    """

    def __init__(self, where: str, onwards: str, fit: Any) -> None:
        super().__init__(f"{where} {onwards}")
        self.where, self.onwards, self.fit = where, onwards, fit

    def of(self, fit: Any) -> Interrupted:
        """The same of another fit."""
        return Interrupted(self.where, self.onwards, fit)


class NonFiniteError(PplLvmError):
    """A loss or a gradient is not finite, and the fit cannot go on as it was asked to.

    Attributes:
        step: the first step where it is not.
        state: all of the run before that step, what `fit(state=)` goes on from.
        cause: what the step shows when it is run again: `guilty` (site, density, rows, parameters of its distribution),
            `gradients` (parameters whose gradient is not finite) and `rows`.
    """

    def __init__(self, message: str, *, step: int, state: Any, cause: Any) -> None:
        super().__init__(message)
        self.step, self.state, self.cause = step, state, cause

    def saying(self, more: str) -> NonFiniteError:
        """The same with more to say."""
        return NonFiniteError(f"{self} {more}", step=self.step, state=self.state, cause=self.cause)


class TooLargeError(PplLvmError):
    """What was asked for does not fit in memory."""
