"""The documentation holds every public name and every algorithm, and the examples of its pages run."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

import ppl_lvm
from ppl_lvm import catalogue, program, programs, recipes
from ppl_lvm.datasets import datasets

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = [page for page in PAGES if "```pycon\n" in page.read_text(encoding="utf-8")]
CODE = re.compile(r"^```pycon\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TUTORIALS = sorted((ROOT / "tutorials").glob("*.md"))


def filled(page: str) -> str:
    """A page as it is built."""
    sys.path.insert(0, str(DOCS))
    try:
        listings = importlib.import_module("_listings")
    finally:
        sys.path.remove(str(DOCS))
    return str(listings.filled((DOCS / page).read_text(encoding="utf-8")))


def test_every_public_name_is_on_the_api_page() -> None:
    shown = set(re.findall(r"auto(?:function|class):: ppl_lvm\.(\w+)(?:\(\))?$", filled("api.md"), re.MULTILINE))
    assert shown >= {*ppl_lvm.__all__}, f"docs/api.md lacks {sorted({*ppl_lvm.__all__} - shown)}"


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("objectives.md", catalogue.objectives()),
        ("estimators.md", catalogue.estimators()),
        ("guides.md", catalogue.guides()),
        ("methods.md", catalogue.available("method")),
        ("recipes.md", recipes()),
        ("gallery.md", programs()),
    ],
    ids=["objectives", "estimators", "guides", "methods", "recipes", "programs"],
)
def test_everything_to_choose_has_a_section(page: str, names: dict[str, Path]) -> None:
    sections = re.findall(r"^## (\w+)$", filled(page), re.MULTILINE)
    assert names and sections == [*names]


def test_every_data_set_is_listed() -> None:
    page = filled("data.md")
    assert [name for name in datasets() if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("name", [*programs()])
def test_the_gallery_shows_a_program_whole(name: str) -> None:
    page, source = filled("gallery.md"), programs()[name].read_text(encoding="utf-8")
    assert source.partition('"""\n\n')[2].strip() in page
    for option, value in program(name).options:
        assert f"`{option}={value!r}`" in page and f"- `{option}`: " in page


def test_an_unknown_listing_is_an_error() -> None:
    filled("index.md")
    with pytest.raises(KeyError, match="nothing"):
        importlib.import_module("_listings").filled("<!-- listing: nothing -->")


def test_every_page_can_be_reached() -> None:
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.DOTALL | re.MULTILINE)
    entries = {line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")}
    assert entries == {p.stem for p in PAGES if p.stem != "index"} | {f"tutorials/{p.stem}" for p in TUTORIALS}


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_a_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # Everything but the examples blank, so that a failure names its line in the page.
    lines = [""] * text.count("\n")
    for block in CODE.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    test = doctest.DocTestParser().get_doctest("\n".join(lines), {}, page.stem, str(page), 0)
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    runner.run(test, out=told.append)
    assert runner.failures == 0, "".join(told)
