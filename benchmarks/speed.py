"""Time per step of `ppl_lvm.fit` against the same workload written by hand, and against the library's own SVI.

    python benchmarks/speed.py                             all workloads, both backends, on the CPU
    python benchmarks/speed.py --workload vae_1_wide --device gpu --share
    python benchmarks/speed.py --draw speed.jsonl speed.png        a picture of what --out has written

Blocks of steps of a fit and of its peer take turns in one process: the fit hands over in a callback, where the peer
makes as many steps. A ratio is the median over all pairs of blocks after the first three, of time per step (both wait
for the last step of a block); below one ours is the faster. Beside it: seconds until the first block is over, with
compiling. Peers for NumPyro: a jitted scan with optax, a jitted scan of SVI.update. For Pyro: a loop with
torch.compile and fused Adam, the same uncompiled, and SVI.step. With --share a row ends with the floating-point
operations a second of our steps, those of matrix products alone, and their share of what the library reaches in a
product of two large matrices on the same device.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import speed_peers as peers

Arrays = Mapping[str, np.ndarray]
WARM = 3
"""Pairs of blocks that are not counted."""


@dataclass
class Workload:
    """What is fitted, and what it is compared with."""

    program: Callable[[], Any]
    data: Callable[[], Arrays]
    params: Callable[[], Any]
    """Of the loops by hand."""
    by_hand: Mapping[str, Callable[[], Callable[..., Any]]]
    svi: Mapping[str, Callable[[str], tuple[Any, Any, Any]]]
    """Backend -> on a device, its model, guide and ELBO."""
    options: Mapping[str, Any] = field(default_factory=dict)
    block: Mapping[str, int] = field(default_factory=lambda: {"numpyro": 1000, "pyro": 40})
    """Steps of a turn: at two microseconds a step it takes a thousand to be longer than a call."""
    batch: int | None = None


def two_site() -> Any:
    from ppl_lvm.program import Program

    def model(ppl: Any, x: Any) -> None:
        z = ppl.sample("z", ppl.dist.Normal(ppl.xp.zeros(()), 1.0))
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    def guide(ppl: Any, x: Any) -> None:
        scale = ppl.param("scale", lambda: np.ones(()), constraint=ppl.dist.constraints.positive)
        ppl.sample("z", ppl.dist.Normal(ppl.param("loc", lambda: np.zeros(())), scale))

    return Program("two_site", model, guide, portable=True, arguments=("x",))


def pca() -> Any:
    from ppl_lvm.program import Program

    def model(ppl: Any, x: Any) -> None:
        dist, (W, _) = ppl.dist, peers.small_matrices()
        W, b = ppl.param("W", lambda: W), ppl.param("b", lambda: np.zeros(10))
        sigma = ppl.param("sigma", lambda: np.ones(()), constraint=dist.constraints.positive)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Normal(ppl.xp.zeros(2), 1.0).to_event(1))
            ppl.sample("x", dist.Normal(z @ W.T + b, sigma).to_event(1), obs=x)

    def guide(ppl: Any, x: Any) -> None:
        dist, (_, R) = ppl.dist, peers.small_matrices()
        R, r = ppl.param("R", lambda: R), ppl.param("r", lambda: np.zeros(2))
        scale = ppl.param("scale", lambda: np.ones(2), constraint=dist.constraints.positive)
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.Normal(x @ R.T + r, scale).to_event(1))

    return Program("pca", model, guide, portable=True, arguments=("x",))


def shipped(name: str, **options: Any) -> Any:
    from ppl_lvm import program

    return program(name, **options)


def images(rows: int = 5000) -> Arrays:
    return {"x": np.random.default_rng(0).integers(0, 2, (rows, 784)).astype(np.float32)}


def blobs() -> Arrays:
    rng = np.random.default_rng(0)
    centres = np.array([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]])
    return {"x": (centres[rng.integers(0, 3, 200)] + 0.5 * rng.normal(size=(200, 2))).astype(np.float32)}


def schools() -> Arrays:
    from ppl_lvm import program

    example = program("eight_schools").example
    assert example is not None
    made = example(np.random.default_rng(0))
    assert isinstance(made, dict)
    return made


def native(build: Callable[..., tuple[Any, Any]], backend: str, device: str) -> tuple[Any, Any, Any]:
    """A program of one library, with its own guide or a full-rank or diagonal autoguide, and its ELBO."""
    library, infer = import_module(backend), import_module(f"{backend}.infer")
    if backend == "pyro":
        arrays = import_module("torch")
        if device != "cpu":  # even that of the CPU makes every call of torch go through Python
            arrays.set_default_device(device)
    else:
        arrays = import_module("jax.numpy")
    model, guide = build(library, library.distributions, arrays)
    if guide is None:
        kind = "AutoMultivariateNormal" if build is peers.eight_schools else "AutoNormal"
        guide = getattr(import_module(f"{backend}.infer.autoguide"), kind)(model)
    return model, guide, infer.Trace_ELBO()


def vae_svi(backend: str, draws: int, device: str) -> tuple[Any, Any, Any]:
    infer = import_module(f"{backend}.infer")
    at_once = {"vectorize_particles": True, "max_plate_nesting": 1} if backend == "pyro" else {}
    bound = infer.Trace_ELBO() if draws == 1 else infer.RenyiELBO(0.0, draws, **at_once)
    build = partial(peers.pyro_vae, device=device) if backend == "pyro" else peers.numpyro_vae
    return *build(784, 400, 20), bound


def vae(draws: int, batch: int, rows: int = 5000) -> Workload:
    def params() -> Any:
        return {"encoder": peers.networks((784, 400, 40), 1), "decoder": peers.networks((20, 400, 784), 2)}

    return Workload(
        partial(shipped, "vae", latent=20, hidden=400, likelihood="bernoulli"),
        partial(images, rows),
        params,
        {"numpyro": lambda: peers.jax_vae(draws), "pyro": lambda: peers.torch_vae(draws)},
        {b: partial(vae_svi, b, draws) for b in ("pyro", "numpyro")},
        {"recipe": "elbo"} if draws == 1 else {"recipe": "iwae", "draws": draws},
        block=dict.fromkeys(("numpyro", "pyro"), 20 if draws == 1 else 1),
        batch=batch,
    )


def codes(estimator: str, options: Mapping[str, Any]) -> Workload:
    """A VAE with 200 variables of two values; the libraries have neither estimator."""
    of_jax, of_torch = (
        (lambda: peers.jax_reinmax, lambda: peers.torch_reinmax)
        if estimator == "reinmax"
        else (lambda: peers.jax_vimco(10), lambda: peers.torch_vimco(10))
    )
    return Workload(
        partial(shipped, "discrete_vae", variables=200, categories=2, hidden=400, likelihood="bernoulli"),
        images,
        lambda: {"encoder": peers.networks((784, 400, 400), 1), "decoder": peers.networks((400, 400, 784), 2)},
        {"numpyro": of_jax, "pyro": of_torch},
        {},
        options,
        block=dict.fromkeys(("numpyro", "pyro"), 10 if estimator == "reinmax" else 3),
        batch=128,
    )


def sequences(rows: int = 512, T: int = 100) -> Arrays:
    return {"x": np.random.default_rng(0).normal(size=(rows, T, 10)).astype(np.float32)}


def svae(latent: int = 4, hidden: int = 32) -> Workload:
    """A structured VAE with a linear dynamical system; the libraries have no such guide."""

    def params() -> Any:
        nets = {
            "encoder": peers.networks((20, hidden, latent + latent**2), 1),
            "decoder": peers.networks((latent, hidden, 10), 2),
        }
        own = {"A": 0.9 * np.eye(latent), "b": np.zeros(latent), "m": np.zeros(latent)}
        return nets | own | {"log_q": np.full(latent, -0.7), "log_scale": np.zeros(10)}

    return Workload(
        partial(shipped, "svae_lds", latent=latent, hidden=(hidden,)),
        sequences,
        params,
        {"numpyro": lambda: peers.jax_svae_lds, "pyro": lambda: peers.torch_svae_lds},
        {},
        {"recipe": "elbo"},
        block=dict.fromkeys(("numpyro", "pyro"), 3),
        batch=32,
    )


def normals(*shapes: tuple[str, tuple[int, ...]]) -> Any:
    parts = {f"{name}_loc": np.random.default_rng(0).normal(size=shape) for name, shape in shapes}
    return parts | {f"{name}_log_scale": np.full(shape, -2.3) for name, shape in shapes}


WORKLOADS = {
    "two_site": Workload(
        two_site,
        lambda: {"x": np.random.default_rng(0).normal(size=20).astype(np.float32)},
        lambda: {"loc": np.zeros(()), "log_scale": np.zeros(())},
        {"numpyro": lambda: peers.jax_two_site, "pyro": lambda: peers.torch_two_site},
        {b: partial(native, peers.two_site, b) for b in ("pyro", "numpyro")},
        {"recipe": "elbo"},
    ),
    "mixture": Workload(
        partial(shipped, "gaussian_mixture", components=3),
        blobs,
        lambda: normals(("w", (2,)), ("mu", (3, 2)), ("sigma", (3, 2))),
        {"numpyro": lambda: peers.jax_mixture, "pyro": lambda: peers.torch_mixture},
        {b: partial(native, peers.mixture, b) for b in ("pyro", "numpyro")},
        {"recipe": "elbo"},
    ),
    "eight_schools": Workload(
        partial(shipped, "eight_schools"),
        schools,
        lambda: {"loc": np.zeros(10), "L": np.diag(np.full(10, -0.7))},
        {"numpyro": lambda: peers.jax_eight_schools, "pyro": lambda: peers.torch_eight_schools},
        {b: partial(native, peers.eight_schools, b) for b in ("pyro", "numpyro")},
        {"recipe": "elbo"},
    ),
    "rows_1e6": Workload(
        pca,
        lambda: {"x": np.random.default_rng(0).normal(size=(peers.ROWS, 10)).astype(np.float32)},
        lambda: {
            **dict(zip(("W", "R"), peers.small_matrices(), strict=True)),
            **{"b": np.zeros(10), "r": np.zeros(2), "log_scale": np.zeros(2), "log_sigma": np.zeros(())},
        },
        {"numpyro": lambda: peers.jax_pca, "pyro": lambda: peers.torch_pca},
        {b: partial(native, peers.pca, b) for b in ("pyro", "numpyro")},
        {"recipe": "elbo"},
        batch=100,
    ),
    "reinmax": codes("reinmax", {"recipe": "elbo", "estimator": "reinmax"}),
    "vimco_10": codes("vimco", {"recipe": "iwae", "draws": 10, "estimator": "vimco"}),
    "svae_lds": svae(),
    "vae_1": vae(1, 128),
    "vae_50": vae(50, 128),
    "vae_1_wide": vae(1, 4096, 40960),
}


class Turns:
    """A callback that lets the peer have its turn, and times both."""

    def __init__(self, peer: peers.Peer, block: int) -> None:
        self.peer, self.block = peer, block
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._start = time.perf_counter()

    def __call__(self, moment: Any) -> None:
        self.ours.append(time.perf_counter() - self._start)
        start = time.perf_counter()
        self.peer.run(self.block)
        self.theirs.append(time.perf_counter() - start)
        self._start = time.perf_counter()


def peer_of(work: Workload, backend: str, kind: str, data: Arrays, size: int | None, device: str) -> peers.Peer:
    if backend == "numpyro":
        if kind == "scan":
            return peers.JaxLoop(work.by_hand["numpyro"](), work.params(), data, size)
        return peers.NumPyroSVI(*work.svi["numpyro"](device), data, size)
    if kind == "SVI.step":
        return peers.PyroSVI(*work.svi["pyro"](device), data, size, device)
    return peers.TorchLoop(work.by_hand["pyro"](), work.params(), data, size, kind == "torch.compile", device)


PEERS = {
    "numpyro": (("auto", "scan"), ("auto", "SVI.update")),
    "pyro": (
        *(("compiled", "torch.compile"), ("compiled", "SVI.step")),
        *(("eager", "by hand, eager"), ("eager", "SVI.step")),
    ),
}
"""How ours is compiled, and with what it is compared."""


@cache
def operations(name: str) -> int:
    """Floating-point operations of a step's matrix products, forward and backward, as torch counts those by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    work = WORKLOADS[name]
    loop = peers.TorchLoop(work.by_hand["pyro"](), work.params(), dict(work.data()), work.batch, False, "cpu")
    with FlopCounterMode(display=False) as counter:
        loop.run(1)
    return int(counter.get_total_flops())


@cache
def reached(backend: str, device: str, size: int = 4096, times: int = 10) -> float:
    """Operations a second in products of two matrices of single precision, the best of several."""
    square = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    if backend == "numpyro":
        jax = import_module("jax")
        a, product, wait = jax.device_put(square), jax.jit(lambda a: a @ a), jax.block_until_ready
    else:
        torch = import_module("torch")
        a, product = torch.as_tensor(square, device=device), lambda a: a @ a
        wait = (lambda _: None) if device == "cpu" else (lambda _: torch.cuda.synchronize())
    wait(product(a))
    took = []
    for _ in range(times):
        start = time.perf_counter()
        wait(product(a))
        took.append(time.perf_counter() - start)
    return float(2 * size**3 / min(took))


def measure(name: str, backend: str, mode: str, kind: str, pairs: int, device: str) -> dict[str, Any]:
    from ppl_lvm import fit

    work, named = WORKLOADS[name], "cuda" if device == "gpu" else device
    data, block = dict(work.data()), work.block[backend]
    peer = peer_of(work, backend, kind, data, work.batch, named if backend == "pyro" else device)
    turns = Turns(peer, block)
    run = fit(
        work.program(),
        data=data,
        backend=backend,
        compile=mode,
        batch_size=work.batch,
        learning_rate=peers.RATE,
        steps=block * (pairs + WARM),
        check_every=block,
        callbacks=[turns],
        progress_bar=False,
        device=None if device == "cpu" else device,
        **work.options,
    )
    assert np.isfinite(run.history["loss"]).all()
    ours, theirs = (np.array(t) / block for t in (turns.ours, turns.theirs))
    ratios = sorted(ours[WARM:] / theirs[WARM:])
    return {
        "workload": name,
        "backend": backend,
        "ours": mode,
        "peer": kind,
        "device": device,
        "pairs": len(ratios),
        "ms": median(ours[WARM:]) * 1e3,
        "peer_ms": median(theirs[WARM:]) * 1e3,
        "ratio": median(ratios),
        "low": ratios[len(ratios) // 10],
        "high": ratios[-1 - len(ratios) // 10],
        "first": turns.ours[0],
        "peer_first": turns.theirs[0],
    }


def draw(source: Path, target: Path) -> None:
    """Ratios with their 10 and 90 % quantiles, a row for every workload and a colour for every peer."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    found = [json.loads(line) for line in source.read_text().splitlines()]
    backends = list(dict.fromkeys(r["backend"] for r in found))
    names = [n for n in WORKLOADS if any(r["workload"] == n for r in found)]
    figure, axes = plt.subplots(1, len(backends), figsize=(4.6 * len(backends), 0.45 * len(names) + 1.4), sharey=True)
    for ax, backend in zip(np.atleast_1d(axes), backends, strict=True):
        rows = [r for r in found if r["backend"] == backend]
        kinds = list(dict.fromkeys((r["ours"], r["peer"]) for r in rows))
        for i, (ours, peer) in enumerate(kinds):
            mine = [r for r in rows if (r["ours"], r["peer"]) == (ours, peer)]
            y = [names.index(r["workload"]) + 0.22 * (i - (len(kinds) - 1) / 2) for r in mine]
            x = np.array([r["ratio"] for r in mine])
            ends = np.abs(np.array([[r["low"], r["high"]] for r in mine]).T - x)
            ax.errorbar(x, y, xerr=ends, fmt="o", ms=4, label=peer if ours == "auto" else f"{ours} / {peer}")
        ax.axvline(1.0, color="0.6", lw=1)
        ax.set(xscale="log", title=backend, xlabel="time per step, ours / peer", yticks=range(len(names)))
        ax.set_xticks([0.125, 0.25, 0.5, 1, 2, 4], ["1/8", "1/4", "1/2", "1", "2", "4"])
        ax.minorticks_off()
        ax.set_yticklabels(names)
        ax.legend(fontsize=7, loc="best")
    np.atleast_1d(axes)[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(WORKLOADS), action="append")
    parser.add_argument("--backend", choices=list(PEERS), action="append")
    parser.add_argument("--peer", action="append", help="only these, as the table names them")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--share", action="store_true", help="of what the library reaches in a large matrix product")
    parser.add_argument("--out", type=Path, help="a file for one JSON object a line")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("JSONL", "PNG"), help="draws what is there")
    asked = parser.parse_args()
    if asked.draw:
        draw(*asked.draw)
        return
    more, rule = (" Tflop/s | share |", "---|---|") if asked.share else ("", "")
    print(
        f"| workload | backend | ours | peer | ms/step | peer's | ratio (10 %, 90 %) | first block, s | peer's |{more}"
    )
    print(f"|---|---|---|---|---|---|---|---|---|{rule}")
    for name in asked.workload or [n for n in WORKLOADS if asked.device == "gpu" or n != "vae_1_wide"]:
        for backend in asked.backend or PEERS:
            for mode, kind in PEERS[backend]:
                if (asked.peer and kind not in asked.peer) or ("SVI" in kind and not WORKLOADS[name].svi):
                    continue
                r = measure(name, backend, mode, kind, asked.pairs, asked.device)
                end = ""
                if asked.share:
                    r["flops"] = operations(name) / r["ms"] * 1e3
                    r["share"] = r["flops"] / reached(backend, "cuda" if asked.device == "gpu" else "cpu")
                    end = f" {r['flops'] / 1e12:.2f} | {r['share']:.2f} |"
                print(
                    f"| {name} | {backend} | {mode} | {kind} | {r['ms']:.3f} | {r['peer_ms']:.3f} | "
                    f"{r['ratio']:.2f} ({r['low']:.2f}, {r['high']:.2f}) | {r['first']:.1f} | "
                    f"{r['peer_first']:.1f} |{end}",
                    flush=True,
                )
                if asked.out:
                    with asked.out.open("a") as file:
                        file.write(json.dumps(r) + "\n")


if __name__ == "__main__":
    main()
