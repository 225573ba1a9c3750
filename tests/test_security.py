"""SECURITY.md: every promise names a test, and every test that is named is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from ppl_lvm.datasets import load
from ppl_lvm.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`")


def promises(text: str) -> list[str]:
    """The points under "What is promised"."""
    section = text.partition("## What is promised\n")[2].partition("\n## ")[0]
    return [point for point in re.split(r"^- ", section, flags=re.MULTILINE)[1:] if point.strip()]


def links(point: str) -> list[tuple[str, str]]:
    """File and test of every link; `::name` alone is of the file before it, and a file alone has no test named."""
    found, file = [], ""
    for match in LINK.finditer(point):
        if match[1] is None and match[2] is None:
            continue
        file = match[1] or file
        found.append((file, match[2] or ""))
    return found


def missing(file: str, test: str) -> bool:
    path = ROOT / file
    if not path.is_file():
        return True
    tests = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    return bool(test) and test not in tests


def test_every_promise_names_tests_that_exist() -> None:
    points = promises((ROOT / "SECURITY.md").read_text())
    assert len(points) >= 8
    for point in points:
        assert links(point), f"no test is named: {point}"
        assert [link for link in links(point) if missing(*link)] == [], point


def test_a_test_that_is_gone_is_seen() -> None:
    assert links("x (`tests/a.py::b`, `::c`), `tests/d.py`, `load`") == [
        ("tests/a.py", "b"),
        ("tests/a.py", "c"),
        ("tests/d.py", ""),
    ]
    assert missing("tests/no_such_file.py", "") and missing("tests/test_security.py", "test_no_such_test")
    assert not missing("tests/test_security.py", "test_a_test_that_is_gone_is_seen")


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def test_no_part_of_the_library_reads_or_writes_a_pickle() -> None:
    """torch.load and torch.save are pickles too; numpy.load says that it allows none."""
    found = []
    for path in sorted((ROOT / "ppl_lvm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, n) for n in names if n.partition(".")[0] in PICKLES]
            if isinstance(node, ast.Call):
                call, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if call in ("torch.load", "torch.save") or keywords.get("allow_pickle", "False") != "False":
                    found.append((path.name, call))
    assert found == []


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_pickle_in_a_data_file_is_not_run(suffix: str, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    rows = np.array([Touch(), Touch()], dtype=object)
    path = tmp_path / f"rows{suffix}"
    with path.open("wb") as file:
        if suffix == ".npy":
            np.save(file, rows, allow_pickle=True)
        else:
            np.savez(file, rows=rows)
    with pytest.raises(DataError, match=r"\S"):
        load(str(path))
    assert not (tmp_path / "executed").exists()
    np.load(path, allow_pickle=True)[{".npy": 0, ".npz": "rows"}[suffix]]
    assert (tmp_path / "executed").exists(), "the file holds no pickle, so the test says nothing"
