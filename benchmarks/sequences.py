"""Structured VAEs on sequences against deep Kalman filters, VRNNs and a mean field guide, where frames are missing.

    python benchmarks/sequences.py --jobs 8 --out sequences.jsonl

Data sets `lds_medium` (its first 40 steps) and `pendulum` (16 x 16 pixels), a fifth of whose frames are missing in
training and test. Every model has the same decoder, the same steps, batches, learning rates and weights of the KL,
which grow to one in the first third of the steps (without, most fits of the pendulum end with states that say nothing),
and takes the rate that is best on its validation rows (20 importance draws). Seeds share data, so differences are
paired. On test rows:

    log p(seen)          of the frames that are seen, nats a frame
    log p(missing)       of the missing frames given the seen ones, nats a frame
    log p(future)        of the last ten frames given the seen ones before them, nats a frame
    error                of the guide's predictions of the same frames, root mean square distance to the frames without
                         noise

All densities are importance weighted, with the guide that sees the seen frames alone; a conditional one is the
difference of two on the same draws. One line of JSON for every model, data set and seed goes to `--out`; those that are
there already with the same settings are not run again, and a run that failed is told in the tables and tried again.

Zhao and Linderman (2023), Revisiting Structured Variational Autoencoders, arXiv:2305.16543, section 5.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppl_lvm import Fit, fit, program
from ppl_lvm.datasets import load
from ppl_lvm.datasets._generated import draw_pendulum
from ppl_lvm.jobs import Failed, each

PLAIN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "svae_lds": ("svae_lds", {}),
    "mean field": ("svae_lds", {"posterior": "mean_field"}),
    "deep_kalman_filter": ("deep_kalman_filter", {}),
    "vrnn": ("vrnn", {}),
}
HIDING = ", hiding"
"""Ends the names of models that are trained with ten steps hidden (self-supervised masking)."""
MODELS = {**PLAIN, **{name + HIDING: how for name, how in PLAIN.items()}}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "lds_medium": {"latent": 3, "hidden": (32,)},
    "pendulum": {"latent": 4, "hidden": (64,)},
}
STEPS, FUTURE = 40, 10
TRAIN, VALID, TEST = 100, 20, 40
METRICS = {
    "seen": "log p(seen)",
    "missing": "log p(missing)",
    "missing_error": "error, missing",
    "future": "log p(future)",
    "future_error": "error, future",
}
Task = dict[str, Any]


def frames(name: str, seed: int) -> dict[str, np.ndarray]:
    """Rows to train, to choose by and to test on, NaN where frames are missing; and the test rows whole, and clean."""
    data = load(name, seed, missing=True)
    factors, p = data.test_factors, data.parameters
    assert factors is not None
    if name == "pendulum":
        clean = draw_pendulum(factors["angle"]).reshape(data.test.shape)
    else:
        assert p is not None
        clean = factors["z"] @ p["C"].T + p["d"]
    rows = {"train": data.train[:TRAIN], "valid": data.train[TRAIN : TRAIN + VALID], "test": data.test[:TEST]}
    rows |= {"whole": factors["x"][:TEST], "clean": clean[:TEST]}
    return {n: a[:, :STEPS].astype(np.float32) for n, a in rows.items()}


def trained(task: Task, x: np.ndarray, rate: float) -> Fit:
    name, options = MODELS[task["model"]]
    size = SIZES[task["data"]]
    width = {} if name == "svae_lds" else {"width": size["hidden"][-1]}
    return fit(
        program(name, **size, **width, **options),
        data=x,
        recipe="elbo",
        beta={"schedule": "linear", "start": 0.01, "end": 1.0, "steps": max(1, task["steps"] // 3)},
        missing="mask",
        steps=task["steps"],
        batch_size=10,
        learning_rate=rate,
        clip=10.0,
        hide={"x": FUTURE} if task["model"].endswith(HIDING) else {},
        backend=task["backend"],
        seed=task["seed"],
        progress_bar=False,
    )


def given(
    run: Fit, x: np.ndarray, clean: np.ndarray, seen: np.ndarray, of: np.ndarray, draws: int
) -> tuple[float, float, float]:
    """log p of what is seen, log p of the frames `of` given that, nats a frame, and the error of their predictions.

    Everything else than `seen` and `of` `[rows, T]` is left out.
    """
    entries = np.broadcast_to(seen[..., None], x.shape)
    told = {"x_mask": entries}
    before = run.log_likelihood({"x": np.where(entries, x, np.nan), **told}, draws=draws).values
    both = np.where((seen | of)[..., None], x, np.nan)
    after = run.log_likelihood({"x": both, **told}, draws=draws).values
    mean = run.predictive(draws, {"x": np.where(entries, x, 0.0), **told})["x"].mean(0)
    error = np.sqrt(((mean - clean)[of] ** 2).mean())
    return before.sum() / seen.sum(), (after - before).sum() / of.sum(), float(error)


def measured(task: Task) -> Task:
    """One model on one data set, at the rate of the grid that is best on validation rows."""
    started, x = time.perf_counter(), frames(task["data"], task["seed"])
    valid: dict[str, float] = {}
    best: Fit | None = None
    for rate in task["rates"]:
        try:
            run = trained(task, x["train"], rate)
            valid[str(rate)] = run.log_likelihood(x["valid"], draws=20).mean
        except Exception as error:  # a rate that is too high for a model is no reason to lose the others
            valid[str(rate)] = float("-inf")
            problem = error
            continue
        if valid[str(rate)] >= max(valid.values()):
            best = run
    if best is None:
        raise problem
    fitted = time.perf_counter()
    known = ~np.isnan(x["test"][..., 0])
    past = np.arange(STEPS) < STEPS - FUTURE
    result: dict[str, float] = {}
    result["seen"], result["missing"], result["missing_error"] = given(
        best, x["whole"], x["clean"], known, ~known, task["draws"]
    )
    future = np.broadcast_to(~past, known.shape)
    _, result["future"], result["future_error"] = given(
        best, x["whole"], x["clean"], known & past, future, task["draws"]
    )
    return {
        **task,
        "valid": valid,
        **{n: float(v) for n, v in result.items()},
        "seconds": [round(fitted - started, 1), round(time.perf_counter() - fitted, 1)],
    }


def tables(tasks: list[Task], results: list[Task]) -> str:
    """Means over seeds, and differences of the first model to the others seed by seed, with standard errors."""
    found = {(r["data"], r["model"], r["seed"]): r for r in results}
    lines = []
    for data in dict.fromkeys(t["data"] for t in tasks):
        mine = [t for t in tasks if t["data"] == data]
        models = list(dict.fromkeys(t["model"] for t in mine))
        seeds = list(dict.fromkeys(t["seed"] for t in mine))

        def values(model: str, metric: str, data: str = data, seeds: list[int] = seeds) -> dict[int, float]:
            every = {s: found.get((data, model, s), {}) for s in seeds}
            return {s: r[metric] for s, r in every.items() if metric in r}

        lines += [
            f"\n{data}\n",
            f"| model | seeds | {' | '.join(METRICS.values())} | rate |",
            "|" + "---|" * (3 + len(METRICS)),
        ]
        for model in models:
            cells = [_mean([*values(model, m).values()]) for m in METRICS]
            rates = [
                max(r["valid"], key=r["valid"].get) for s in seeds if "valid" in (r := found.get((data, model, s), {}))
            ]
            count = len(values(model, "seen"))
            lines.append(f"| {model} | {count} of {len(seeds)} | {' | '.join(cells)} | {', '.join(rates)} |")
        lines += [f"\n| {models[0]} less | pairs | {' | '.join(METRICS.values())} |", "|" + "---|" * (2 + len(METRICS))]
        for model in models[1:]:
            cells, pairs = [], 0
            for m in METRICS:
                ours, theirs = values(models[0], m), values(model, m)
                both = ours.keys() & theirs.keys()
                pairs = len(both)
                cells.append(_mean([ours[s] - theirs[s] for s in sorted(both)]))
            lines.append(f"| {model} | {pairs} | {' | '.join(cells)} |")
    failed = [r for r in results if "error" in r]
    lines += [f"\nFailed: {r['model']} on {r['data']}, seed {r['seed']}: {r['error']}" for r in failed]
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    error = f" ({np.std(values, ddof=1) / np.sqrt(len(values)):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["pendulum", "lds_medium"], choices=[*SIZES])
    parser.add_argument("--models", nargs="+", default=[*PLAIN], choices=[*MODELS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=3000, help="batches of 10 of the 100 training rows")
    parser.add_argument("--draws", type=int, default=100, help="importance draws on test rows")
    parser.add_argument("--backend", default="numpyro", choices=["pyro", "numpyro"])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=Path("sequences.jsonl"))
    asked = parser.parse_args()
    shared = {"rates": asked.rates, "steps": asked.steps, "draws": asked.draws, "backend": asked.backend}
    tasks = [
        {"data": data, "model": model, "seed": seed, **shared}
        for data in asked.data
        for seed in asked.seeds
        for model in asked.models
    ]
    lines = asked.out.read_text().splitlines() if asked.out.exists() else []
    results = [r for r in map(json.loads, lines) if {n: r[n] for n in tasks[0]} in tasks and "error" not in r]
    done = [{n: r[n] for n in tasks[0]} for r in results]
    left = [t for t in tasks if t not in done]
    started = time.perf_counter()
    with asked.out.open("a") as file:
        for number, result in each(measured, left, asked.jobs):
            line = {**left[number], "error": result.error} if isinstance(result, Failed) else result
            if isinstance(result, Failed):
                print(result.error, result.traceback, sep="\n", flush=True)
            results.append(line)
            print(json.dumps(line), file=file, flush=True)
            at = f"{time.perf_counter() - started:.0f} s"
            print(f"{at}: {line['model']} on {line['data']}, seed {line['seed']}", flush=True)
    print(tables(tasks, results))


if __name__ == "__main__":
    main()
