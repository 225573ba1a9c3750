"""Pictures of a fit: losses, reconstructions, prior samples, and the latent space of the held-out rows."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# A Figure of its own, not pyplot: it draws with Agg, opens no window and touches no global state.
from matplotlib.figure import Figure

from ppl_lvm.datasets import Dataset
from ppl_lvm.to_arviz import PosteriorDraws

COLUMNS = 16
NO_IMAGES = "no observed site has the values of an image"


def losses(path: Path, history: Mapping[str, np.ndarray]) -> str | None:
    """The loss of every step, and of the validation rows where there are some; stages are told apart by a line.

    Returns:
        Why nothing was drawn, or None.
    """
    if not {"step", "loss"} <= history.keys():
        return "the fit has no loss of every step"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per row")
    step, loss = history["step"], history["loss"]
    axes.plot(step, loss, linewidth=0.7, color="tab:blue", alpha=0.6, label="training batches")
    later = loss[len(loss) // 20 :]  # the first steps would flatten all others
    if "validation" in history:
        held_out = history["validation"]
        axes.plot(history["validation_step"], held_out, color="tab:orange", marker=".", label="validation rows")
        later = np.concatenate([later, held_out])
    if "hard_loss" in history:
        axes.plot(history["hard_step"], history["hard_loss"], color="tab:green", marker=".", label="hard draws")
        later = np.concatenate([later, history["hard_loss"]])
    finite = later[np.isfinite(later)]
    if len(finite) and np.ptp(finite) > 0:
        axes.set_ylim(finite.min() - 0.05 * np.ptp(finite), finite.max() + 0.05 * np.ptp(finite))
    for i in np.flatnonzero(np.diff(history.get("stage", np.zeros(len(step))))):
        axes.axvline(float(step[i + 1]) - 0.5, color="tab:gray", linestyle=":")
    axes.legend()
    figure.savefig(path, dpi=120)
    return None


def reconstructions(path: Path, predictive: Mapping[str, np.ndarray], dataset: Dataset) -> str | None:
    """Held-out rows above the mean of their `predictive` draws, [draws, rows, ...] per observed site.

    Returns:
        Why nothing was drawn, or None.
    """
    images = _images(predictive, dataset, axis=2)
    if images is None:
        return NO_IMAGES
    rows = dataset.test[: images.shape[1]].reshape(images.shape[1:])
    columns = min(COLUMNS, len(rows))
    pairs = [part[i : i + columns] for i in range(0, len(rows), columns) for part in (rows, images.mean(0))]
    _mosaic(path, pairs, dataset, "Above: held-out rows. Below: posterior predictive means.")
    return None


def samples(path: Path, prior_predictive: Mapping[str, np.ndarray], dataset: Dataset) -> str | None:
    """Rows drawn from the fitted model, [rows, ...] per site; returns why nothing was drawn, or None."""
    images = _images(prior_predictive, dataset, axis=1)
    if images is None:
        return NO_IMAGES
    lines = [images[i : i + COLUMNS] for i in range(0, len(images), COLUMNS)]
    _mosaic(path, lines, dataset, "Samples from the fitted model's prior.")
    return None


def latent(path: Path, posterior: PosteriorDraws, dataset: Dataset) -> str | None:
    """Posterior means of the held-out rows' latents, in two principal components where there are more.

    Latents of every step of sequences that differ in length are left out: steps that were padded have no data.

    Returns:
        Why nothing was drawn, or None.
    """
    rows = len(dataset.test)
    of_rows = {
        site: value
        for site, value in posterior.values.items()
        if posterior.dims.get(site) and value.shape[1:2] == (rows,)
    }
    if not of_rows:
        return "no latent site has a value for every row"
    steps = max(map(len, dataset.test)) if dataset.ragged else None
    means = {
        site: value.mean(0, dtype=np.float64).reshape(rows, -1)
        for site, value in of_rows.items()
        if steps is None or value.shape[2:3] != (steps,)
    }
    if not means:
        return "the latent sites have a value for every step of sequences that differ in length"
    points = np.concatenate(list(means.values()), axis=1)
    names = [f"{site}[{i}]" for site, mean in means.items() for i in range(mean.shape[1])]
    if points.shape[1] > 2:
        points, names = _principal(points)
    elif points.shape[1] == 1:
        points, names = np.column_stack([points, np.arange(rows)]), [*names, "row"]
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xlabel=names[0], ylabel=names[1])
    axes.set_title(f"Posterior means of {', '.join(means)}: one point per held-out row", fontsize=10)
    labels = np.zeros(rows, dtype=int) if dataset.test_labels is None else dataset.test_labels
    classes, colours = np.unique(labels, return_inverse=True)
    few = len(classes) <= 10
    scatter = axes.scatter(
        points[:, 0],
        points[:, 1],
        c=colours,
        s=12,
        cmap="tab10" if few else "viridis",
        vmax=9 if few else None,
    )
    for i, label in enumerate(classes if few and len(classes) > 1 else []):
        colour = scatter.cmap(scatter.norm(i))
        # Written at the middle of its points: ten colours are too many to look up in a legend.
        axes.annotate(
            str(label),
            tuple(np.median(points[labels == label], axis=0)),
            ha="center",
            va="center",
            weight="bold",
            color=colour,
            bbox={"boxstyle": "circle", "facecolor": "white", "edgecolor": colour, "alpha": 0.85},
        )
    figure.savefig(path, dpi=120)
    return None


def _principal(points: np.ndarray) -> tuple[np.ndarray, list[str]]:
    left, spread, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    share = spread**2 / max(float((spread**2).sum()), np.finfo(float).tiny)
    scores = np.pad(left * spread, ((0, 0), (0, max(0, 2 - len(spread)))))
    share = np.pad(share, (0, max(0, 2 - len(share))))
    return scores[:, :2], [f"principal component {i + 1} ({share[i]:.0%} of the variance)" for i in range(2)]


def _images(sites: Mapping[str, np.ndarray], dataset: Dataset, axis: int) -> np.ndarray | None:
    """The first site whose axes from `axis` on make one image of the data's shape."""
    shape = dataset.image_shape or ()
    for value in sites.values():
        if value.ndim > axis and math.prod(value.shape[axis:]) == math.prod(shape):
            return value.reshape(*value.shape[:axis], *shape)
    return None


def _mosaic(path: Path, lines: list[np.ndarray], dataset: Dataset, title: str) -> None:
    """Images [height, width] side by side, a list per line, grey levels on the scale of the training rows."""
    low, high = float(np.nanmin(dataset.train)), float(np.nanmax(dataset.train))
    columns = max(len(line) for line in lines)
    height, width = (size + 2 for size in lines[0].shape[1:])
    canvas = np.full((len(lines) * height, columns * width), low)
    for i, line in enumerate(lines):
        for j, image in enumerate(line):
            canvas[i * height + 1 : (i + 1) * height - 1, j * width + 1 : (j + 1) * width - 1] = image
    figure = Figure(figsize=(8, 8 * canvas.shape[0] / canvas.shape[1] + 0.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(canvas, cmap="gray_r", vmin=low, vmax=high, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    figure.savefig(path, dpi=120)
