"""How far the elements of a code stand for the known factors of data: MIG and SAP."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ppl_lvm.errors import DataError


def mig(codes: np.ndarray, factors: Mapping[str, np.ndarray], bins: int = 20) -> float:
    """Mutual information gap: the mean over factors v of `(I(z_1; v) - I(z_2; v)) / H(v)`, from 0 to 1.

    z_1 and z_2 are the two elements of the code that tell most of v. Information is that of histograms: an element of
    the code has `bins` bins of equal width over its range, a factor of integers one for each value, another factor
    `bins` of equally many rows. With few rows such information is too high, alike for all elements that tell nothing
    more, so the gap stays zero there; it knows nothing of a rotation of the factors.

    Args:
        codes: `[rows, D]`, such as means of the posterior (`fit.encode(data).mean["z"]`); D of 2 or more.
        factors: name -> `[rows]`, integers or real numbers (`Dataset.test_factors`).
        bins: of real numbers.

    Raises:
        DataError: shapes that do not fit, values that are not finite, a factor that is the same in all rows.

    Source: Chen, Li, Grosse, Duvenaud (2018), arXiv:1802.04942.

    Example:
        >>> v, w = (a.ravel() for a in np.indices((4, 50)))
        >>> round(mig(np.stack([v, 0.5 * w], axis=1), {"v": v, "w": w}, bins=50), 2)
        1.0
    """
    codes = _checked(codes, factors)
    cut = [np.digitize(z, np.linspace(z.min(), z.max(), bins + 1)[1:-1]) for z in codes.T]
    gaps = []
    for values in factors.values():
        v = _classes(values, bins)
        told = sorted((_information(z, v) for z in cut), reverse=True)
        gaps.append((told[0] - told[1]) / _information(v, v))
    return float(np.mean(gaps))


def sap(codes: np.ndarray, factors: Mapping[str, np.ndarray]) -> float:
    """Separated attribute predictability: the mean over factors of the best element's score less the second best's.

    The score of an element for a factor of real numbers is the squared correlation, R^2 of a line; for one of integers
    the balanced accuracy of a linear classifier of it. A factor that two elements tell alike adds zero.

    Args:
        codes: `[rows, D]`, such as means of the posterior (`fit.encode(data).mean["z"]`); D of 2 or more.
        factors: name -> `[rows]`, integers or real numbers (`Dataset.test_factors`).

    Raises:
        DataError: shapes that do not fit, values that are not finite, a factor that is the same in all rows.

    Source: Kumar, Sattigeri, Balakrishnan (2017), arXiv:1711.00848.

    Example:
        >>> v, w = np.random.default_rng(0).normal(size=(2, 500))
        >>> sap(np.stack([v, w], axis=1), {"v": v, "w": w}) > 0.95
        True
    """
    codes = _checked(codes, factors)
    gaps = []
    for values in factors.values():
        scores = sorted((_score(z, np.asarray(values)) for z in codes.T), reverse=True)
        gaps.append(scores[0] - scores[1])
    return float(np.mean(gaps))


def _checked(codes: np.ndarray, factors: Mapping[str, np.ndarray]) -> np.ndarray:
    codes = np.asarray(codes, dtype=np.float64)
    if codes.ndim != 2 or codes.shape[1] < 2:
        raise DataError(f"codes have shape {codes.shape}; rows of two elements or more, [rows, D], are compared.")
    if not factors:
        raise DataError("There are no factors; pass a mapping from names to arrays of one number for each row.")
    for name, values in factors.items():
        if np.shape(values) != codes.shape[:1]:
            raise DataError(f"Factor {name!r} has shape {np.shape(values)}, and codes have {len(codes)} rows.")
        if not np.isfinite(np.asarray(values, dtype=np.float64)).all():
            raise DataError(f"Factor {name!r} has values that are not finite.")
        if len(np.unique(values)) < 2:
            raise DataError(f"Factor {name!r} is the same in all rows, so nothing tells it; leave it out.")
    if not np.isfinite(codes).all():
        raise DataError("codes have values that are not finite.")
    return codes


def _discrete(values: np.ndarray) -> bool:
    return np.asarray(values).dtype.kind in "iub"


def _classes(values: np.ndarray, bins: int) -> np.ndarray:
    """Integers from 0: the values' own, or bins of equally many rows."""
    values = np.asarray(values)
    if not _discrete(values):
        values = np.digitize(values, np.quantile(values, np.linspace(0.0, 1.0, bins + 1)[1:-1]))
    return np.unique(values, return_inverse=True)[1]


def _information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information in nats of two arrays of integers; with itself an entropy."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1.0 / len(a))
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    met = joint > 0
    return float((joint[met] * np.log(joint[met] / apart[met])).sum())


def _score(z: np.ndarray, values: np.ndarray) -> float:
    if z.std() == 0:
        return 1.0 / len(np.unique(values)) if _discrete(values) else 0.0
    if not _discrete(values):
        return float(np.corrcoef(z, values)[0, 1] ** 2)
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    column = ((z - z.mean()) / z.std())[:, None]
    found = LogisticRegression(class_weight="balanced").fit(column, values)
    return float(balanced_accuracy_score(values, found.predict(column)))
