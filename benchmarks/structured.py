"""Message passing in Gaussian chains against dynamax (JAX) and Pyro's GaussianHMM (torch): time, and the same numbers.

    python benchmarks/structured.py
    python benchmarks/structured.py --device gpu --T 10000 --D 2 8

A linear dynamical system of D states seen through D numbers a step, one sequence of T steps. From parameters and data:

    filter      the log evidence
    smoother    means and covariances given all data (Pyro has none)
    sampler     a draw of all states given all data

Runs of one size take turns in one process. A time is the median of n turns, compilation apart; a ratio is the median
over turns of here / peer, both of that turn: below one is quicker than the peer. A peer that is not installed is named
under the table. Numbers are held to each other at every size ("apart"): log evidence, means and covariances relative to
the largest, and draws by the sum of squares of the noise that they are made of under the chain here, less its mean, in
standard errors. What would take a third of `--max-seconds` or more for one turn, by the time of the size before, is
left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TASKS = ("filter", "smoother", "sampler")
METHODS = ("sequential", "parallel")
AGREE = {"float64": 1e-6, "float32": 2e-2}
"""Relative; in float32 sums of 100,000 terms and a peer's own rounding are in it."""

Arrays = dict[str, Any]
Run = Callable[[], Any]
"""Does the work once and returns when the device is done: arrays by name."""


class Key(NamedTuple):
    """Who runs."""

    who: str
    method: str


def problem(T: int, D: int, dtype: str) -> Arrays:
    """A system that turns and forgets slowly, and data drawn from it. All matrices are the same for every step."""
    rng = np.random.default_rng(T + D)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    A, C = 0.98 * turn, rng.normal(size=(D, D)) / np.sqrt(D)
    Q, R = 0.1 * np.eye(D) + 0.02 * np.ones((D, D)), 0.5 * np.eye(D)
    z, y, root = rng.normal(size=D), np.empty((T, D)), np.linalg.cholesky(Q)
    for t in range(T):
        z = A @ z + root @ rng.normal(size=D)
        y[t] = C @ z + np.sqrt(0.5) * rng.normal(size=D)
    # What Pyro calls the initial state is one step before the first that is seen.
    mean, cov = np.zeros(D), A @ A.T + Q
    given = {"A": A, "C": C, "Q": Q, "R": R, "mean": mean, "cov": cov, "y": y}
    return {n: np.asarray(x, dtype) for n, x in given.items()}


def jax_runs(given: Arrays, device: str) -> tuple[dict[str, dict[Key, Run]], dict[str, float]]:
    """Runs of every task, and seconds that compilation took."""
    import jax
    import jax.numpy as jnp

    from ppl_lvm.structured.gaussian_chain import GaussianChain, observed

    jax.config.update("jax_enable_x64", given["y"].dtype == np.float64)
    where = jax.devices("gpu" if device == "gpu" else "cpu")[0]
    data = jax.device_put(given, where)
    T, D = given["y"].shape

    def chain(p: Arrays, method: Any) -> tuple[GaussianChain, Any]:
        A, b, Q = p["A"][None], jnp.zeros((T - 1, D), p["y"].dtype), p["Q"][None]
        J, h, c = observed(p["y"], p["C"], 0.0 * p["mean"], jnp.diagonal(p["R"]))
        q = GaussianChain(p["mean"], p["cov"], A, b, Q, J, h, method=method, validate=False)
        return q, c.sum()

    def filter_(method: Any) -> Callable[[Arrays, Any], Arrays]:
        def run(p: Arrays, key: Any) -> Arrays:
            q, c = chain(p, method)
            return {"evidence": q.log_normalizer() + c}

        return run

    def smoother(method: Any) -> Callable[[Arrays, Any], Arrays]:
        def run(p: Arrays, key: Any) -> Arrays:
            moments = chain(p, method)[0].moments()
            return {"mean": moments.mean, "cov": moments.cov}

        return run

    def sampler(method: Any) -> Callable[[Arrays, Any], Arrays]:
        def run(p: Arrays, key: Any) -> Arrays:
            return {"draw": chain(p, method)[0].sample(jax.random.normal(key, (T, D), p["y"].dtype))}

        return run

    makers: dict[str, dict[Key, Callable[[Arrays, Any], Arrays]]] = {
        task: {Key("here", m): make(m) for m in METHODS}
        for task, make in zip(TASKS, (filter_, smoother, sampler), strict=True)
    }
    if importlib.util.find_spec("dynamax"):
        from dynamax.linear_gaussian_ssm import inference, parallel_inference

        def params(p: Arrays) -> Any:
            return inference.make_lgssm_params(p["mean"], p["cov"], p["A"], p["Q"], p["C"], p["R"])

        def of(library: Any) -> dict[str, Callable[[Arrays, Any], Arrays]]:
            def filter_(p: Arrays, key: Any) -> Arrays:
                return {"evidence": library.lgssm_filter(params(p), p["y"]).marginal_loglik}

            def smoother(p: Arrays, key: Any) -> Arrays:
                f = library.lgssm_smoother(params(p), p["y"])
                return {"mean": f.smoothed_means, "cov": f.smoothed_covariances}

            def sampler(p: Arrays, key: Any) -> Arrays:
                return {"draw": library.lgssm_posterior_sample(key, params(p), p["y"])}

            return dict(zip(TASKS, (filter_, smoother, sampler), strict=True))

        for method, library in zip(METHODS, (inference, parallel_inference), strict=True):
            for task, run in of(library).items():
                makers[task][Key("dynamax", method)] = run

    compiling: dict[str, float] = {}

    def compiled(task: str, key: Key, run: Callable[[Arrays, Any], Arrays]) -> Run:
        seed, steps = jax.device_put(jax.random.key(0), where), jax.jit(run)
        ready: list[Any] = []

        def once() -> Arrays:
            if not ready:  # of those that are left out nothing is compiled
                begin = time.perf_counter()
                ready.append(steps.lower(data, seed).compile())
                compiling[f"{task} {key.who} {key.method}"] = time.perf_counter() - begin
            return jax.block_until_ready(ready[0](data, seed))

        return once

    return {t: {k: compiled(t, k, run) for k, run in runs.items()} for t, runs in makers.items()}, compiling


def torch_runs(given: Arrays, device: str) -> tuple[dict[str, dict[Key, Run]], dict[str, float]]:
    """Runs of every task; nothing is compiled."""
    import torch

    from ppl_lvm.structured.gaussian_chain import GaussianChain, observed

    where = torch.device("cuda" if device == "gpu" else "cpu")
    p = {n: torch.as_tensor(x).to(where) for n, x in given.items()}
    T, D = given["y"].shape

    def chain(method: Any) -> tuple[GaussianChain, Any]:
        A, b, Q = p["A"][None], p["mean"].new_zeros(T - 1, D), p["Q"][None]
        J, h, c = observed(p["y"], p["C"], 0.0 * p["mean"], p["R"].diagonal())
        q = GaussianChain(p["mean"], p["cov"], A, b, Q, J, h, method=method, validate=False)
        return q, c.sum()

    def filter_(method: Any) -> Arrays:
        q, c = chain(method)
        return {"evidence": q.log_normalizer() + c}

    def smoother(method: Any) -> Arrays:
        moments = chain(method)[0].moments()
        return {"mean": moments.mean, "cov": moments.cov}

    def sampler(method: Any) -> Arrays:
        return {"draw": chain(method)[0].sample(torch.randn(T, D, dtype=p["y"].dtype, device=where))}

    def synced(run: Callable[[], Arrays]) -> Run:
        def once() -> Arrays:
            with torch.no_grad():
                found = run()
            if device == "gpu":
                torch.cuda.synchronize()
            return found

        return once

    runs: dict[str, dict[Key, Run]] = {task: {} for task in TASKS}
    for task, make in zip(TASKS, (filter_, smoother, sampler), strict=True):
        for method in METHODS:
            runs[task][Key("here", method)] = synced(lambda make=make, method=method: make(method))  # type: ignore[misc]
    if importlib.util.find_spec("pyro") and importlib.util.find_spec("pyro.distributions"):
        import pyro.distributions as dist

        def hmm() -> Any:
            zero, eye = torch.zeros_like(p["mean"]), torch.eye(D, dtype=p["y"].dtype, device=where)
            emission = dist.Normal(zero, p["R"].diagonal().sqrt()).to_event(1)
            parts = (dist.MultivariateNormal(zero, p["Q"]), p["C"].mT, emission)
            first = dist.MultivariateNormal(zero, eye)
            return dist.GaussianHMM(first, p["A"].mT, *parts, validate_args=False, duration=T)

        runs["filter"][Key("Pyro", "parallel")] = synced(lambda: {"evidence": hmm().log_prob(p["y"])})
        runs["sampler"][Key("Pyro", "parallel")] = synced(lambda: {"draw": hmm().rsample_posterior(p["y"])})
    return runs, {}


LIBRARIES = {"jax": (jax_runs, "dynamax"), "torch": (torch_runs, "Pyro")}


def host(x: Any) -> np.ndarray:
    return np.array(x.cpu().numpy() if hasattr(x, "cpu") else x, float)


def apart(one: Any, other: Any) -> float:
    """The largest difference, relative to the largest number."""
    a, b = host(one), host(other)
    return float(np.abs(a - b).max() / np.abs(b).max())


def whitened(given: Arrays, draw: Any) -> float:
    """How far the sum of squares of the noise that a draw is made of is from its mean, in standard errors."""
    import torch

    from ppl_lvm.structured.gaussian_chain import GaussianChain, observed

    p = {n: torch.as_tensor(host(x)) for n, x in given.items()}
    z = torch.as_tensor(host(draw))
    A, b, Q = p["A"][None], torch.zeros_like(z[1:]), p["Q"][None]
    J, h, _ = observed(p["y"], p["C"], 0.0 * p["mean"], p["R"].diagonal())
    noise = GaussianChain(p["mean"], p["cov"], A, b, Q, J, h, method="parallel").noise_of(z)
    return float((noise.square().sum() - noise.numel()) / np.sqrt(2 * noise.numel()))


def turns(runs: dict[Key, Run], pairs: int, seconds: float) -> dict[Key, list[float]]:
    """Seconds of every run, all in turn, to and fro; as many turns as the time allows, three at least."""
    order = list(runs)
    times: dict[Key, list[float]] = {k: [] for k in runs}
    once = {k: timed(run, 1) for k, run in runs.items()}
    repeat = {k: max(1, int(0.01 / t)) for k, t in once.items()}
    one_turn = sum(once[k] * repeat[k] for k in runs)
    for i in range(max(3, min(pairs, int(seconds / one_turn)))):
        for k in order if i % 2 == 0 else reversed(order):
            times[k].append(timed(runs[k], repeat[k]))
    return times


def timed(run: Run, repeat: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - begin) / repeat


def measured(library: str, task: str, T: int, D: int, runs: dict[Key, Run], given: Arrays, asked: Any) -> list[Arrays]:
    """Rows of the table for one task and size."""
    found = {k: run() for k, run in runs.items()}
    tolerance = AGREE[asked.dtype]
    far: dict[Key, float] = {}
    reference = found[max((k for k in found if k.who == "here"), key=lambda k: k.method == "parallel")]
    for k, outputs in found.items():
        if task == "sampler":
            far[k] = whitened(given, outputs["draw"])
            limit = 5.0
        else:
            far[k] = max(apart(x, reference[n]) for n, x in outputs.items())
            limit = tolerance
        if not abs(far[k]) <= limit:
            raise SystemExit(
                f"{library} {task} T={T} D={D} {k}: {far[k]:.3g} is beyond {limit}; times would be of two things."
            )
    del found, reference
    times = turns(runs, asked.pairs, asked.max_seconds)
    rows = []
    for k in runs:
        row = {"backend": library, "task": task, "T": T, "D": D, "who": k.who, "method": k.method}
        row |= {"seconds": float(np.median(times[k])), "turns": len(times[k]), "apart": far[k]}
        peers = [o for o in runs if o.who != "here" and o.method == k.method]
        if k.who == "here" and peers:
            row["ratio"] = float(np.median(np.array(times[k]) / np.array(times[peers[0]])))
        rows.append(row)
    both = [np.array(times[Key("here", m)]) for m in METHODS if Key("here", m) in times]
    if len(both) == 2:
        rows[0]["sequential / parallel"] = float(np.median(both[0] / both[1]))
    return rows


def show(rows: list[Arrays], left_out: list[str], missing: list[str]) -> None:
    titles = ("backend", "task", "T", "D", "method", "here, ms", "peer, ms", "here / peer", "sequential / parallel")
    print("| " + " | ".join((*titles, "turns", "apart")) + " |")
    print("|---" * 11 + "|")
    at = {(r["backend"], r["task"], r["T"], r["D"], r["who"], r["method"]): r for r in rows}
    for r in rows:
        if r["who"] != "here":
            continue
        peer = at.get((r["backend"], r["task"], r["T"], r["D"], LIBRARIES[r["backend"]][1], r["method"]))
        cells = [r["backend"], r["task"], f"{r['T']:,}", r["D"], r["method"], f"{1e3 * r['seconds']:.3g}"]
        cells += ["-", "-"] if peer is None else [f"{1e3 * peer['seconds']:.3g}", f"{r['ratio']:.2f}"]
        both = r.get("sequential / parallel")
        cells += ["" if both is None else f"{both:.1f}", r["turns"], f"{(peer or r)['apart']:.1e}"]
        print("| " + " | ".join(str(c) for c in cells) + " |")
    ratios = [r["ratio"] for r in rows if "ratio" in r]
    if ratios:
        print(f"\nhere / peer over {len(ratios)} rows: median {np.median(ratios):.2f}, largest {max(ratios):.2f}")
    for said, what in (("left out", left_out), ("no peer", missing)):
        if what:
            print(f"{said}: {'; '.join(what)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--backends", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--T", nargs="+", type=int, default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--D", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--dtype", choices=tuple(AGREE), default="float64")
    parser.add_argument("--pairs", type=int, default=15, help="turns of every size, where the time allows")
    parser.add_argument("--max-seconds", type=float, default=20.0, help="for all turns of a task and size")
    parser.add_argument("--max-gib", type=float, default=12.0, help="of memory; larger sizes are left out")
    parser.add_argument("--json", type=Path, default=Path("structured.json"))
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device
    rows: list[Arrays] = []
    left_out: list[str] = []
    compiling: dict[str, float] = {}
    missing = [
        f"{p} is not installed"
        for p, m in (("dynamax", "dynamax"), ("Pyro", "pyro"))
        if not importlib.util.find_spec(m)
    ]
    for library in asked.backends:
        for D in asked.D:
            before: dict[tuple[str, Key], tuple[int, float]] = {}
            for T in sorted(asked.T):
                gib = 24 * T * D * D * np.dtype(asked.dtype).itemsize / 2**30
                if gib > asked.max_gib:
                    left_out.append(f"{library} T={T:,} D={D} (about {gib:.0f} GiB)")
                    continue
                given = problem(T, D, asked.dtype)
                runs, seconds = LIBRARIES[library][0](given, asked.device)
                for task in asked.tasks:
                    kept = {}
                    for k, run in runs[task].items():
                        size, took = before.get((task, k), (T, 0.0))
                        if k.method not in asked.methods:
                            continue
                        if took * T / size > asked.max_seconds / 3:
                            left_out.append(
                                f"{library} {task} T={T:,} D={D} {k.who} {k.method} (about {took * T / size:.0f} s)"
                            )
                        else:
                            kept[k] = run
                    if not any(k.who == "here" for k in kept):
                        continue
                    found = measured(library, task, T, D, kept, given, asked)
                    for row in found:
                        before[task, Key(row["who"], row["method"])] = T, row["seconds"]
                    rows += found
                    print(
                        f"{library} {task} T={T} D={D}: "
                        + ", ".join(f"{r['who']} {r['method']} {1e3 * r['seconds']:.3g} ms" for r in found),
                        flush=True,
                    )
                compiling |= {f"{library} T={T} D={D} {n}": s for n, s in seconds.items()}
    print()
    show(rows, left_out, missing)
    if compiling:
        took = np.array(list(compiling.values()))
        print(f"compilation (JAX): median {np.median(took):.1f} s, largest {took.max():.1f} s")
    machine = {"device": asked.device, "dtype": asked.dtype, "machine": platform.machine(), "cpus": os.cpu_count()}
    asked.json.write_text(
        json.dumps({**machine, "rows": rows, "compile_seconds": compiling, "left_out": left_out}, indent=1)
    )


if __name__ == "__main__":
    main()
