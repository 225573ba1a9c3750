"""Programs: found and loaded as files, options checked, equal by file content or by identity."""

import ast
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppl_lvm import lookup
from ppl_lvm.errors import ProgramError
from ppl_lvm.program import Program, program, programs

DROPPED = '''
"""A point and its noise.

Source: made up for a test.
"""
from typing import Literal

recipe = "iwae"

def model(ppl, x, y=None, *, latent=2, scale=1.0, sizes=(3, 4), kind: Literal["a", "b"] = "a", extra=None):
    return "model", latent, scale, sizes, kind, extra

def guide(ppl, x, y=None, *, latent=2, steps=3):
    return "guide", latent, steps

def example(rng):
    return rng.normal(size=(6, 2))
'''


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    path = tmp_path / "point.py"
    path.write_text(DROPPED)
    return path


def message(asked: Any, **options: Any) -> str:
    with pytest.raises(ProgramError) as caught:
        program(asked, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", programs())
def test_every_shipped_program_is_documented_portable_and_has_tiny_data(name: str) -> None:
    found = program(name)
    assert found.portable
    assert found.summary
    assert "Source: " in (ast.get_docstring(ast.parse(programs()[name].read_text())) or "")
    assert found.example is not None
    data = found.example(np.random.default_rng(0))
    arrays = data if isinstance(data, dict) else {found.arguments[0]: data}
    assert set(arrays) <= set(found.arguments)
    assert all(2 <= len(array) <= 10 for array in arrays.values())


@pytest.mark.parametrize("name", programs())
def test_every_shipped_program_imports_no_framework(name: str) -> None:
    imported = {
        module.partition(".")[0]
        for node in ast.walk(ast.parse(programs()[name].read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported <= {*sys.stdlib_module_names, "numpy"}


def test_a_program_is_one_dropped_file(
    dropped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "points"
    folder.mkdir(parents=True)
    dropped.rename(folder / "point.py")
    (folder / "_shared.py").write_text("")
    monkeypatch.setattr(lookup, "PACKAGE", tmp_path / "ppl_lvm")
    assert programs() == {"point": folder / "point.py"}
    found = program("point", latent=5, steps=4)
    assert (found.name, found.recipe, found.portable) == ("point", "iwae", True)
    assert found.arguments == ("x", "y")
    assert found.summary == "A point and its noise."
    assert found.model(None, None) == ("model", 5, 1.0, (3, 4), "a", None)
    assert found.guide is not None and found.guide(None, None) == ("guide", 5, 4)
    assert found.options_of("guide") == {"latent": 5, "steps": 4}
    assert dict(found.options) == {
        "extra": None, "kind": "a", "latent": 5, "scale": 1.0, "sizes": (3, 4), "steps": 4
    }  # fmt: skip


def test_installed_programs_come_before_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "ppl_lvm" / "_shipped" / "models"
    shipped.mkdir(parents=True)
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(lookup, "PACKAGE", tmp_path / "ppl_lvm")
    assert lookup.folder("models") == shipped
    assert lookup.folder("inference") == tmp_path / "inference"
    for folder in ("one", "two"):
        (shipped / folder).mkdir()
        (shipped / folder / "same.py").write_text("")
    with pytest.raises(ProgramError, match="Two files are called 'same'"):
        programs()


def test_programs_are_equal_by_file_content_and_options(dropped: Path) -> None:
    first = program(dropped, latent=3)
    assert first == program(str(dropped), latent=3)
    assert hash(first) == hash(program(dropped, latent=3))
    assert first != program(dropped, latent=4)
    assert first != program(dropped)
    assert program(dropped) == program(dropped, latent=2), "a default said aloud"
    assert program(first) == first
    assert program(program(dropped, latent=4, steps=5), latent=3) == program(dropped, latent=3, steps=5)
    dropped.write_text(DROPPED + "\n")
    assert first != program(dropped, latent=3)


def test_option_values_take_the_type_of_the_default(dropped: Path) -> None:
    numpy_values: dict[str, Any] = {
        "latent": np.int64(3),
        "scale": 2,
        "sizes": [1, 2],
        "kind": "b",
        "extra": "any",
    }
    options = dict(program(dropped, **numpy_values).options)
    assert options == {"extra": "any", "kind": "b", "latent": 3, "scale": 2.0, "sizes": (1, 2), "steps": 3}
    assert {type(options["latent"]), type(options["scale"])} == {int, float}
    assert program(dropped, **numpy_values) == program(dropped, **options)


def test_wrong_options_are_refused_with_what_is_possible(dropped: Path) -> None:
    unknown = message(dropped, laten=3)
    assert "'point'" in unknown
    assert "no option 'laten'. Did you mean 'latent'?" in unknown
    assert (
        "Options and defaults: extra=None, kind='a', latent=2, scale=1.0, sizes=(3, 4), steps=3." in unknown
    )
    assert "option 'latent' is 2.5, but it should be a valid integer (default 2)." in message(
        dropped, latent=2.5
    )
    assert "option 'latent' is True, but it should be a valid integer" in message(dropped, latent=True)
    assert "option 'scale' is '1', but it should be a valid number (default 1.0)." in message(
        dropped, scale="1"
    )
    assert "option 'kind' is 'c', but it should be 'a' or 'b' (default 'a')." in message(dropped, kind="c")
    assert "option 'extra' is {}, which cannot be hashed" in message(dropped, extra={})
    dropped.write_text("def model(ppl, x, *, size): ...\ndef guide(ppl, x): ...")
    assert "option 'size' has no default; give it, as in size=..." in message(dropped)
    assert program(dropped, size=3).options == (("size", 3),)
    assert "Options and defaults: size." in message(dropped, siz=3)


def test_model_and_guide_have_to_fit_together(dropped: Path) -> None:
    cases = {
        "def model(ppl, x): ...": "needs a function guide(ppl, x, *, option=...), but defines none",
        "def guide(ppl, x): ...\nmodel = 3": "defines model = 3",
        "def model(ppl, x): ...\ndef guide(x): ...": "found model(ppl, x) and guide(x)",
        "def model(ppl, x, y): ...\ndef guide(ppl, x): ...": "found model(x, y) and guide(x) after ppl",
        "def model(ppl, x, *, n=1): ...\ndef guide(ppl, x, *, n=2): ...": "'n' is 1 by default in the",
        "def model(ppl, x): ...\ndef guide(ppl, x): ...\nrecipe = 3": "`recipe` must be a name",
        "def model(ppl, x): ...\n1 / 0": "line 2, raised ZeroDivisionError: division by zero",
        "def model(ppl, x)\n": "line 1, raised SyntaxError",
    }
    for source, expected in cases.items():
        dropped.write_text(source)
        found = message(dropped)
        assert expected in found
        assert "point" in found


def test_unknown_programs_list_the_known_ones() -> None:
    assert message("vea").startswith("Unknown program 'vea'. Did you mean 'vae'? Programs: ")
    assert "no program file" in message("nowhere.py")
    with pytest.raises(ProgramError, match="The model is 3, which cannot be called"):
        Program.from_callables(3, print)  # type: ignore[arg-type]


def test_native_callables_are_equal_if_they_are_the_same() -> None:
    class Net:
        def model(self, x: object) -> None: ...

        def guide(self, x: object) -> None: ...

    net, other = Net(), Net()
    first = Program.from_callables(net.model, net.guide)
    assert first == Program.from_callables(net.model, net.guide)
    assert hash(first) == hash(Program.from_callables(net.model, net.guide))
    assert first != Program.from_callables(other.model, other.guide)
    assert (first.name, first.arguments, first.portable, first.path) == ("model", ("x",), False, None)
    by_options = [Program.from_callables(functools.partial(net.model, x=k), net.guide) for k in (1, 1, 2)]
    assert by_options[0] == by_options[1] != by_options[2]
    unhashable: list[int] = []
    assert Program.from_callables(functools.partial(net.model, x=unhashable), net.guide).name == "model"
    assert program(first) is first
    assert "has no options, but was given latent" in message(first, latent=3)


def test_a_native_file_needs_no_namespace(dropped: Path) -> None:
    dropped.write_text("def model(x, *, n=1): return x, n\ndef guide(x): return x")
    found = program(dropped, n=2)
    assert not found.portable
    assert found.arguments == ("x",)
    assert found.model(0) == (0, 2)
