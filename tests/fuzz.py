"""Coverage-guided fuzzing of what reads other people's files: saved fits and recipes.

    python tests/fuzz.py manifest --runs 3000 --seed 0

Inputs are mutated; those that reach lines in an order not seen before are kept and mutated further. A target may end
well or raise one of ppl_lvm's own errors. Anything else is a failure: another exception, more than `SECONDS` for one
input, more memory than `MEMORY`, or the canary, a module and a file that the mutations like to name, having been run.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SECONDS, MEMORY = 10, 4 * 2**30
Mutate = Callable[[np.random.Generator, bytes], bytes]

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**47, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e308, -1e308),
    *("", "elbo", "iwae", "nuts", "auto", "own", "adam", "pathwise", "canary:elbo", "canary.py:elbo", "../canary.py:x"),
    *("canary", "../../canary", "pyro", "numpyro", "float32", "vae", "\ud800", "\x00", "\x1b[2J", "é" * 40, "x" * 5000),
    *([], {}, [[]], [{}], {"name": "canary:elbo"}, {"schedule": "linear"}, {"name": "vae"}, [[[[[[[[[[]]]]]]]]]]),
    *({"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 10}, {"*": "score"}, {"z": {"name": "canary:elbo"}}),
]


# The loop.


@dataclass
class Found:
    """What a session of fuzzing came to."""

    runs: int = 0
    refused: int = 0
    edges: set[int] = field(default_factory=set)
    corpus: list[bytes] = field(default_factory=list)
    failure: str | None = None
    input: bytes = b""


class Hung(BaseException):
    """One input took too long."""


@contextmanager
def watched(edges: set[int], files: tuple[str, ...]) -> Iterator[None]:
    """Collects pairs of lines that follow each other in these files, while the block runs."""
    known: dict[CodeType, bool] = {}

    def traced(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in known:
            known[code] = any(part in code.co_filename for part in files)
        if not known[code]:
            return None
        last = -1

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            edges.add(hash((code.co_filename, last, frame.f_lineno, event)))
            last = frame.f_lineno
            return line

        return line

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        yield
    finally:
        sys.settrace(before)


def fuzz(
    target: Callable[[bytes], None],
    seeds: list[bytes],
    mutate: Mutate,
    allowed: type[Exception],
    files: tuple[str, ...],
    *,
    runs: int,
    seed: int,
    guided: bool = True,
) -> Found:
    """Runs the target on the seeds and on what they are mutated to; stops at the first failure."""
    random, found = np.random.default_rng(seed), Found()
    for number in range(runs):
        data = seeds[number] if number < len(seeds) else b""
        if number >= len(seeds):
            # Half of the time one of the last that were new, as they lead further.
            last = found.corpus[-16:] if guided and random.integers(2) else found.corpus
            data = last[random.integers(len(last))]
            for _ in range(random.geometric(0.5)):
                data = mutate(random, data)
        edges: set[int] = set()
        found.runs, found.input = found.runs + 1, data
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with watched(edges, files):
                target(data)
        except allowed:
            found.refused += 1
        except (Exception, Hung):
            found.failure = traceback.format_exc()
            return found
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if number < len(seeds) or (guided and not edges <= found.edges):
            found.corpus.append(data)
        found.edges |= edges
    return found


# Mutations.


def of_bytes(words: list[bytes]) -> Mutate:
    """Bytes changed, taken out, doubled, cut off; words put in."""

    def mutate(random: np.random.Generator, data: bytes) -> bytes:
        made, kind = bytearray(data), int(random.integers(7))
        i, j = sorted(int(x) for x in random.integers(len(data) + 1, size=2))
        j = min(j, i + 64)
        if kind == 0 and made:
            made[i % len(made)] ^= 1 << int(random.integers(8))
        elif kind == 1 and made:
            made[i % len(made)] = int(random.choice([0, 1, 34, 91, 123, 127, 128, 255]))
        elif kind == 2:
            del made[i:j]
        elif kind == 3:
            made[i:i] = made[i:j] * int(random.integers(1, 20))
        elif kind == 4:
            del made[i:]
        elif kind == 5:
            made[i:j] = words[random.integers(len(words))]
        else:
            made[i:i] = words[random.integers(len(words))]
        return bytes(made[: 2**16])

    return mutate


def of_json(rest: Mutate) -> Mutate:
    """Entries of JSON replaced by odd ones, taken out, swapped; or its bytes changed."""

    def mutate(random: np.random.Generator, data: bytes) -> bytes:
        try:
            table = json.loads(data)
        except (ValueError, RecursionError):
            return rest(random, data)
        kind = int(random.integers(8))
        if kind == 0 or not (place := _place(random, table)):
            return rest(random, data)
        node, key = place
        if kind == 1:
            del node[key]
        elif kind == 2 and isinstance(node, dict):
            node[str(ODD[random.integers(len(ODD))])] = node.pop(key)
        elif kind == 3:
            other, there = _place(random, table)
            node[key] = copy.deepcopy(other[there])
        elif kind == 4 and isinstance(node[key], int | float):
            node[key] = node[key] + int(random.integers(-2, 3))
        else:
            node[key] = copy.deepcopy(ODD[random.integers(len(ODD))])
        return json.dumps(table).encode()

    return mutate


def _place(random: np.random.Generator, node: Any) -> Any:
    """A container and a key of it, by steps down from the top, so that long tables do not outweigh short ones."""
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[random.integers(len(keys))]
        if not (isinstance(node[key], dict | list) and node[key]) or random.random() < 0.2:
            return node, key
        node = node[key]
    return ()


# Targets: how a folder and a recipe are read. Each has its seeds, its mutations and the files that guide it.


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    seeds: list[bytes]
    mutate: Mutate
    files: tuple[str, ...]


WORDS = [json.dumps(odd).encode() for odd in ODD] + [
    *(b"[" * 5000, b'{"a":' * 3000, b"NaN", b"1e999", b"9" * 5000, b"\\ud800", b"\n", b"{", b"}", b"\0" * 8),
    *(b"\xff" * 8, b'"dtype":"F64"', b'"dtype":"BF16"', b'"shape":[0,4611686018427387904]', b'"data_offsets":[0,8]'),
]
TOML = [
    *(b"\n[optimizer]\n", b"\n[estimator]\n", b"\n[[stages]]\n", b"[objective]\n", b'"*" = ', b"= ", b"steps = "),
    *(b'name = "elbo"\n', b"1_000", b"0x", b"1979-05-27T07:32:00Z", b"inf", b"nan", b"'''", b'"""', b"[" * 2000),
    *(b"= " + b"[" * 2000 + b"]" * 2000 + b"\n", b"= " + b"9" * 5000 + b"\n"),
    *(b"= " + b"{a=" * 2000 + b"1" + b"}" * 2000 + b"\n", b"= " + b"[" * 300 + b"]" * 300 + b"\n"),
    *(b"a." * 2000, b"stages = [{ steps = 1 }]\n", b'objective = "iwae"\n', b"draws = 5\n", b"freeze = 3\n", b"#"),
]


def manifest_target(folder: Path) -> Target:
    """`load` of a folder whose manifest is other text, with the digest that belongs to it."""
    from ppl_lvm import load

    path = folder / "manifest.json"

    def run(data: bytes) -> None:
        path.write_bytes(signed(data))
        load(folder)

    whole = of_json(of_bytes(WORDS))

    def mutate(random: np.random.Generator, data: bytes) -> bytes:
        """A fit's own part, mostly, as the rest of a manifest is looked at first and seldom lets anything pass."""
        try:
            table = json.loads(data)
            own = json.dumps(table["content"]).encode()
            return json.dumps(table | {"content": json.loads(whole(random, own))}).encode()
        except (ValueError, RecursionError, KeyError, TypeError):
            return whole(random, data)

    files = ("ppl_lvm/store.py", "ppl_lvm/loading.py", "ppl_lvm/saving.py", "ppl_lvm/recipe.py", "ppl_lvm/program.py")
    return Target(run, [path.read_bytes()], mutate, files)


def arrays_target(folder: Path) -> Target:
    """The same with another file of parameters, of which the manifest says what the file says of itself."""
    from ppl_lvm import load

    manifest = json.loads((folder / "manifest.json").read_text())
    name = next(p for p in folder.iterdir() if p.name.startswith("trained"))

    def run(data: bytes) -> None:
        table = copy.deepcopy(manifest)
        digest = hashlib.sha256(data).hexdigest()
        table["groups"]["trained"] |= {"bytes": len(data), "sha256": digest}
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            kinds = {"F64": "float64", "F32": "float32", "BF16": "bfloat16"}
            table["groups"]["trained"]["arrays"] = {
                n: {"dtype": kinds.get(a["dtype"], "int64"), "shape": a["shape"]} for n, a in header.items()
            }
        except Exception:
            pass  # then the manifest says what it said
        (folder / "manifest.json").write_bytes(signed(json.dumps(table).encode()))
        (folder / f"trained-{digest[:16]}.safetensors").write_bytes(data)
        try:
            load(folder)
        finally:
            (folder / f"trained-{digest[:16]}.safetensors").unlink()

    mutate = of_bytes(WORDS)
    inner = of_json(mutate)

    def header(random: np.random.Generator, data: bytes) -> bytes:
        """The header's entries, with the length that belongs to them, or any bytes."""
        size = int.from_bytes(data[:8], "little")
        if random.integers(2) or not 0 < size <= len(data) - 8:
            return mutate(random, data)
        text = inner(random, data[8 : 8 + size])
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return Target(run, [name.read_bytes()], header, ("ppl_lvm/store.py", "ppl_lvm/loading.py", "safetensors/numpy.py"))


def metrics_target(folder: Path) -> Target:
    """The same with other lines."""
    from ppl_lvm import load

    manifest = json.loads((folder / "manifest.json").read_text())
    name = next(p for p in folder.iterdir() if p.name.startswith("metrics"))

    def run(data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        table = manifest | {"lines": {"bytes": len(data), "sha256": digest}}
        (folder / "manifest.json").write_bytes(signed(json.dumps(table).encode()))
        path = folder / f"metrics-{digest[:16]}.jsonl"
        path.write_bytes(data)
        try:
            load(folder)
        finally:
            path.unlink()

    each = of_json(of_bytes(WORDS))

    def lines(random: np.random.Generator, data: bytes) -> bytes:
        parts = data.split(b"\n")
        i = int(random.integers(len(parts)))
        parts[i] = each(random, parts[i])
        return b"\n".join(parts)

    return Target(run, [name.read_bytes()], lines, ("ppl_lvm/store.py", "ppl_lvm/saving.py"))


def recipe_target(folder: Path) -> Target:
    """`recipe` of a TOML file."""
    from ppl_lvm import recipe, recipes

    path = folder.parent / "any.toml"

    def run(data: bytes) -> None:
        if b".py:" in data or b":" in data.replace(b"::", b""):
            return  # an explicit file or module, which a recipe of one's own may name
        path.write_bytes(data)
        recipe(path)

    seeds = [p.read_bytes().replace(b":", b"") for p in sorted(recipes().values())]
    return Target(run, seeds, of_bytes(TOML + WORDS), ("ppl_lvm/recipe.py", "ppl_lvm/algorithm.py", "tomllib/"))


def named_target(folder: Path) -> Target:
    """The recipe of a saved fit, which may name nothing but the library's own."""
    from ppl_lvm import recipe, recipes
    from ppl_lvm.errors import StorageError
    from ppl_lvm.recipe import named

    def run(data: bytes) -> None:
        try:
            table = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(table, dict):
            raise StorageError("not a table")  # which the manifest would not have been read with
        named(table)

    seeds = [json.dumps(recipe(name).to_dict()).encode() for name in recipes()]
    files = ("ppl_lvm/recipe.py", "ppl_lvm/catalogue.py", "ppl_lvm/algorithm.py")
    return Target(run, seeds, of_json(of_bytes(WORDS)), files)


TARGETS = {
    "manifest": manifest_target,
    "arrays": arrays_target,
    "metrics": metrics_target,
    "recipe": recipe_target,
    "named": named_target,
}


def signed(data: bytes) -> bytes:
    """A manifest with its right digest, laid out as it is written, if it can be one at all."""
    try:
        table = json.loads(data)
        rest = {n: v for n, v in table.items() if n != "sha256"}
        digest = hashlib.sha256(json.dumps(rest, allow_nan=False).encode()).hexdigest()
        return json.dumps(table | {"sha256": digest}, indent=1, allow_nan=False).encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        return data


@contextmanager
def prepared() -> Iterator[tuple[Path, Path]]:
    """A folder with a small fit, and a canary that must not be run, in a folder that modules are looked for in."""
    from ppl_lvm import fit

    with tempfile.TemporaryDirectory() as place:
        mark = Path(place) / "canary-was-run"
        for name in ("canary.py", "fit/canary.py"):
            (Path(place) / name).parent.mkdir(exist_ok=True)
            (Path(place) / name).write_text(f"import pathlib\npathlib.Path({str(mark)!r}).write_text('')\n")
        (Path(place) / "fit" / "canary.py").unlink()
        sys.path.insert(0, place)
        data = np.random.default_rng(0).normal(size=(6, 3))
        run = fit("probabilistic_pca", data=data, backend="pyro", steps=2, compile="eager", progress_bar=False)
        run.save(Path(place) / "fit")
        try:
            yield Path(place) / "fit", mark
        finally:
            sys.path.remove(place)


def main() -> None:
    """Fuzzes one target; leaves with code 1 and the input at the first failure."""
    import resource

    from ppl_lvm.errors import PplLvmError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    def hung(*_: object) -> None:
        raise Hung(f"one input took more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, hung)
    with prepared() as (folder, mark):
        target = TARGETS[asked.target](folder)
        target.run(target.seeds[0])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        found = fuzz(
            target.run, target.seeds, target.mutate, PplLvmError, target.files, runs=asked.runs, seed=asked.seed
        )
        if mark.exists():
            found.failure = "the canary was run"
    counts = f"{found.runs} inputs, {found.refused} refused, {len(found.corpus)} kept, {len(found.edges)} edges"
    print(f"{asked.target}: {counts}")
    if found.failure is not None:
        print(f"{found.failure}\nfailing input: {found.input[:4000]!r}")
        raise SystemExit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
