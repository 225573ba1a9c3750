"""Generated data whose makings are known: functions of a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ppl_lvm.datasets._base import Dataset, split

GENERATED = "CC0-1.0 (generated)"


def linear_gaussian(seed: int) -> Dataset:
    """1,000 rows of 10 numbers from a random factor model with 3 factors, x = W z + b + 0.5 e (generated)."""
    rng = np.random.default_rng(seed)
    loadings, offset = rng.normal(size=(10, 3)), rng.normal(size=10)
    rows = rng.normal(size=(1000, 3)) @ loadings.T + offset + 0.5 * rng.normal(size=(1000, 10))
    return split(
        "linear_gaussian",
        rows,
        None,
        seed,
        description="Rows x = W z + b + 0.5 e, with z of 3 and e of 10 standard normal entries; the entries "
        "of W and b are standard normal too, drawn from the seed.",
        licence=GENERATED,
    )


def pinwheel(seed: int) -> Dataset:
    """1,000 points of the plane on five bent arms, 200 each; labels number the arms (generated)."""
    rng = np.random.default_rng(seed)
    arms = np.repeat(np.arange(5), 200)
    along, across = 1.0 + 0.3 * rng.normal(size=1000), 0.05 * rng.normal(size=1000)
    angle = 2.0 * np.pi * arms / 5 + 0.25 * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    rows = np.stack([along * cos - across * sin, along * sin + across * cos], axis=1)
    return split(
        "pinwheel",
        rows,
        arms,
        seed,
        factors={"along": along, "across": across},
        description="Points (1 + 0.3 e1, 0.05 e2), turned by 2 pi arm / 5 + 0.25 exp(1 + 0.3 e1), with e1 and e2 "
        "standard normal; as in Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), arXiv:1603.06277.",
        licence=GENERATED,
    )


def spirals(seed: int) -> Dataset:
    """1,000 points of the plane on two spirals about the origin, 500 each; labels number the spirals (generated)."""
    rng = np.random.default_rng(seed)
    arms = np.repeat(np.arange(2), 500)
    turn = 3.0 * np.pi * np.sqrt(rng.random(1000))
    angle = turn + np.pi * arms
    rows = turn[:, None] / np.pi * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.1 * rng.normal(size=(1000, 2))
    return split(
        "spirals",
        rows,
        arms,
        seed,
        factors={"turn": turn},
        description="Points t / pi (cos(t + pi arm), sin(t + pi arm)) + 0.1 e, with t = 3 pi sqrt(u), u uniform and e "
        "standard normal.",
        licence=GENERATED,
    )


def sprites(seed: int) -> Dataset:
    """4,000 images of one square, ellipse or triangle, 16 x 16 zeros and ones, whose five factors are known."""
    rng, n = np.random.default_rng(seed), 4000
    factors = {
        "shape": rng.integers(0, 3, n),
        "scale": rng.uniform(0.3, 0.6, n),
        "orientation": rng.uniform(0.0, 2.0 * np.pi, n),
        "x": rng.uniform(-0.4, 0.4, n),
        "y": rng.uniform(-0.4, 0.4, n),
    }
    rows = draw_sprites(factors)
    return split(
        "sprites",
        rows.reshape(n, -1),
        factors["shape"],
        seed,
        factors=factors,
        image_shape=(16, 16),
        description="One shape (0 square, 1 ellipse, 2 triangle; the labels) on the square [-1, 1]^2, of half-width "
        "`scale`, turned by `orientation` (radians, counter-clockwise) about its centre (`x`, `y`, upwards). A pixel "
        "is 1 where its centre is inside. All factors are uniform and independent.",
        licence=GENERATED,
    )


def draw_sprites(factors: Mapping[str, np.ndarray], size: int = 16) -> np.ndarray:
    """Images [rows, size, size] of zeros and ones from factors [rows]; see `sprites`."""
    shape, scale, turn, x, y = (factors[n][:, None, None] for n in ("shape", "scale", "orientation", "x", "y"))
    centres = (2.0 * np.arange(size) + 1.0) / size - 1.0
    across, up = centres[None, None, :] - x, -centres[None, :, None] - y
    cos, sin = np.cos(turn), np.sin(turn)
    u = (cos * across + sin * up) / scale
    v = (cos * up - sin * across) / scale
    square = np.maximum(np.abs(u), np.abs(v)) <= 1.0
    ellipse = u**2 + (2.0 * v) ** 2 <= 1.0
    triangle = (v >= -1.0) & (2.0 * np.abs(u) <= 1.0 - v)
    return np.choose(shape, [square, ellipse, triangle]).astype(np.float64)


def lds(seed: int) -> Dataset:
    """500 sequences of 20 steps and 4 numbers from a linear dynamical system with 2 states, parameters known."""
    rng, n, steps = np.random.default_rng(seed), 500, 20
    turn = 0.95 * np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    parameters = {
        "A": turn,
        "C": rng.normal(size=(4, 2)),
        "Q": 0.1 * np.eye(2),
        "R": 0.2 * np.eye(4),
        "mean": np.zeros(2),
        "cov": np.eye(2),
    }
    z = _walked(rng, turn, np.sqrt(0.1), n, steps)
    rows = z @ parameters["C"].T + np.sqrt(0.2) * rng.normal(size=(n, steps, 4))
    return split(
        "lds",
        rows,
        None,
        seed,
        factors={"z": z},
        parameters=parameters,
        description="x_t = C z_t + N(0, R), z_t = A z_(t-1) + N(0, Q), z_1 = N(mean, cov); A turns by 0.4 radians and "
        "shrinks by 0.95 at every step, C is standard normal, drawn from the seed. `parameters` holds all of them, the "
        "factors the states.",
        licence=GENERATED,
    )


def lds_medium(seed: int) -> Dataset:
    """300 sequences of 100 steps and 5 numbers from a linear dynamical system with 3 states, parameters known."""
    rng, n, steps = np.random.default_rng(seed), 300, 100
    plane = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    cos, sin = np.cos(np.pi / 20), np.sin(np.pi / 20)
    turn = plane @ np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]) @ plane.T
    parameters = {
        "A": turn,
        "C": rng.normal(size=(5, 3)),
        "d": rng.normal(size=5),
        "Q": 0.1 * np.eye(3),
        "R": np.eye(5),
        "mean": np.zeros(3),
        "cov": np.eye(3),
    }
    z = _walked(rng, turn, np.sqrt(0.1), n, steps)
    rows = z @ parameters["C"].T + parameters["d"] + rng.normal(size=(n, steps, 5))
    return split(
        "lds_medium",
        rows,
        None,
        seed,
        factors={"z": z},
        parameters=parameters,
        description="x_t = C z_t + d + N(0, R), z_t = A z_(t-1) + N(0, Q), z_1 = N(mean, cov); A turns by pi / 20 in a "
        "random plane, C and d are standard normal. After Zhao and Linderman (2023), arXiv:2305.16543, noise 'medium'. "
        "`parameters` holds all of them, the factors the states.",
        licence=GENERATED,
    )


def _walked(rng: np.random.Generator, A: np.ndarray, scale: float, rows: int, steps: int) -> np.ndarray:
    """States `[rows, steps, D]` of `z_t = A z_(t-1) + scale e_t` from a standard normal z_1."""
    z = rng.normal(size=(rows, steps, len(A)))
    for t in range(1, steps):
        z[:, t] = z[:, t - 1] @ A.T + scale * z[:, t]
    return z


def pendulum(seed: int) -> Dataset:
    """300 films of a swinging pendulum, 40 frames of 16 x 16 noisy pixels, whose angles are known."""
    rng, n, steps = np.random.default_rng(seed), 300, 40
    angle = swung(rng.uniform(-2.5, 2.5, n), rng.normal(0.0, 0.5, n), steps)
    rows = draw_pendulum(angle).reshape(n, steps, -1) + 0.1 * rng.normal(size=(n, steps, 256))
    return split(
        "pendulum",
        rows,
        None,
        seed,
        factors={"angle": angle},
        description="A frictionless pendulum, angle'' = -sin(angle), let go at uniform angles from -2.5 to 2.5 radians "
        "(0 hangs down) with normal speeds of sd 0.5, a frame every 0.4 units of time; pixels are those of "
        "`draw_pendulum` plus normal noise of sd 0.1.",
        licence=GENERATED,
    )


def swung(angle: np.ndarray, speed: np.ndarray, steps: int, every: float = 0.4, within: int = 40) -> np.ndarray:
    """Angles `[rows, steps]` of `angle'' = -sin(angle)`, by `within` leapfrog steps between two frames."""
    h, found = every / within, [angle]
    for _ in range(steps - 1):
        for _ in range(within):
            speed = speed - 0.5 * h * np.sin(angle)
            angle = angle + h * speed
            speed = speed - 0.5 * h * np.sin(angle)
        found.append(angle)
    return np.stack(found, axis=1)


def draw_pendulum(angle: np.ndarray, size: int = 16) -> np.ndarray:
    """Images `[..., size, size]` from 0 to 1 of a bob at distance 0.7 from the middle of the square [-1, 1]^2."""
    centres = (2.0 * np.arange(size) + 1.0) / size - 1.0
    angle = np.asarray(angle)[..., None, None]
    across, up = centres - 0.7 * np.sin(angle), -centres[:, None] + 0.7 * np.cos(angle)
    return np.exp(-(across**2 + up**2) / (2.0 * 0.15**2))


def functional_tensor(seed: int) -> Dataset:
    """1,500 noisy entries of a tensor with three continuous modes, of 20, 25 and 30 coordinates from 0 to 1."""
    rng, n, rank, sizes = np.random.default_rng(seed), 1500, 2, (20, 25, 30)
    coordinates = [np.sort(rng.random(size)) for size in sizes]
    factors = [_smooth(rng, at, rank) for at in coordinates]
    core = rng.normal(size=(rank,) * 3)
    whole = np.einsum("abc,ia,jb,kc->ijk", core, *factors)
    size = whole.std()
    places = rng.choice(whole.size, size=n, replace=False)
    index = np.stack(np.unravel_index(places, sizes), axis=1)
    clean = whole.ravel()[places] / size
    return split(
        "functional_tensor",
        clean + 0.1 * rng.normal(size=n),
        None,
        seed,
        factors={"at": np.stack([at[i] for at, i in zip(coordinates, index.T, strict=True)], axis=1), "clean": clean},
        parameters={"core": core / size, **{f"u{k}": u for k, u in enumerate(factors, 1)}},
        description="Entries W' (u_1(s_1) kron u_2(s_2) kron u_3(s_3)) + 0.1 e at random places, none twice, of "
        "a grid of uniform coordinates s. The two functions u of each mode are waves of random phase and frequency (a "
        "half to two turns). W and e are standard normal; without e, the tensor is divided by its standard deviation. "
        "Factor `at` holds the coordinates [rows, 3], `clean` the entries without e; `parameters` core and functions.",
        licence=GENERATED,
    )


def _smooth(rng: np.random.Generator, at: np.ndarray, functions: int) -> np.ndarray:
    """Values `[T, functions]` of random waves."""
    turns, phase = rng.uniform(0.5, 2.0, functions), rng.uniform(0.0, 2.0 * np.pi, functions)
    return np.sqrt(2.0) * np.sin(2.0 * np.pi * turns * at[:, None] + phase)


def with_gaps(data: Dataset, seed: int, fraction: float = 0.2) -> Dataset:
    """Sequences of which each step is unknown (NaN) with probability `fraction`; factor `x` has all of them."""
    rng = np.random.default_rng([seed, 1])

    def gaps(rows: np.ndarray) -> np.ndarray:
        return np.where(rng.random(rows.shape[:2])[..., None] < fraction, np.nan, rows)

    return replace(
        data,
        train=gaps(data.train),
        test=gaps(data.test),
        train_factors={**(data.train_factors or {}), "x": data.train},
        test_factors={**(data.test_factors or {}), "x": data.test},
        description=f"{data.description} A step is missing with probability {fraction:g}; factor `x` has all of them.",
    )
