"""Is the wheel complete? Run by the Python of an environment that holds nothing but the wheel and NumPyro.

Compares the programs and recipes of the wheel with those of the checkout, then fits one of them, from a
folder that has nothing to do with the checkout and from the environment's own.

    empty-environment/bin/python -I .ci/wheel_check.py CHECKOUT
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import ppl_lvm
from ppl_lvm.program import programs
from ppl_lvm.recipe import recipes


def check_environment(environment: Path, package: Path) -> None:
    """The package comes from the environment, and the other backend is absent."""
    assert package.is_relative_to(environment), f"ppl_lvm was imported from {package}, not from {environment}"
    for module in ("torch", "pyro"):
        assert importlib.util.find_spec(module) is None, f"{module} is installed, and must not be here"


def check_shipped(
    package: Path, checkout: Path, folder: str, pattern: str, found: Callable[[], Mapping[str, Path]]
) -> None:
    """All files of one folder of the checkout are found by name, inside the package, with the same bytes."""
    shipped = {path.resolve() for path in found().values()}
    outside = sorted(str(path) for path in shipped if not path.is_relative_to(package))
    assert not outside, f"{folder}: found outside the package: {outside}"
    expected = {path.name: path.read_bytes() for path in (checkout / folder).rglob(pattern)}
    assert expected, f"{folder}: the checkout at {checkout} has no {pattern}"
    found_here = {path.name: path.read_bytes() for path in shipped}
    assert found_here == expected, f"{folder}: wheel has {sorted(found_here)}, checkout {sorted(expected)}"
    print(f"{folder}: {', '.join(sorted(found_here))}")


def fit(environment: Path, cwd: Path, out: Path) -> None:
    """A short fit by the command line, with the environment's variables for Python taken away."""
    command = [str(environment / "bin" / "ppl-lvm"), "fit", "vae", "--data", "digits", "--recipe", "elbo"]
    command += ["--backend", "numpyro", "--set", "steps=50", "--out", str(out)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    print(f"in {cwd}: ppl-lvm {' '.join(command[1:])}", flush=True)
    subprocess.run(command, cwd=cwd, env=variables, check=True)
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written, f"the fit wrote nothing to {out}"
    print(f"wrote {', '.join(written)}")


def main(checkout: Path) -> None:
    """All checks; the first that fails raises."""
    environment = Path(sys.prefix).resolve()
    package = Path(ppl_lvm.__file__).resolve().parent
    check_environment(environment, package)
    check_shipped(package, checkout, "models", "*.py", programs)
    check_shipped(package, checkout, "inference", "*.toml", recipes)
    with tempfile.TemporaryDirectory() as scratch:
        fit(environment, Path(scratch), Path(scratch) / "unrelated")
        fit(environment, environment, Path(scratch) / "environment")
    print("The wheel is complete.")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
