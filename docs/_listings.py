"""Listings of the documentation, made from the files themselves: what `<!-- listing: objectives -->` stands for."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ppl_lvm import catalogue, listing, matrix
from ppl_lvm.catalogue import Kind
from ppl_lvm.program import program, programs
from ppl_lvm.recipe import recipes

MARKER = re.compile(r"^<!-- listing: (\w+) -->$", re.MULTILINE)
SECTION = re.compile(r"^(Args|Source|Raises|Example):\s*")


def filled(page: str) -> str:
    """A page with its markers replaced by listings.

    Raises:
        KeyError: a marker names no listing.
    """
    return MARKER.sub(lambda found: LISTINGS[found[1]](), page)


def algorithms(kind: Kind, files: Mapping[str, Path]) -> str:
    """A table of all, then each one with its docstring and options."""
    lines = list(table(listing.entries(f"{kind}s"), ("name", "what it is")))
    for name in files:
        found = catalogue.resolve(kind, name, Path.cwd(), "The documentation")
        options = ", ".join(
            option if field.is_required() else f"{option}={field.default!r}"
            for option, field in found.model_fields.items()
        )
        lines += ["", f"## {name}", "", "```{eval-rst}"]
        lines += [f".. autoclass:: {found.__module__}.{found.__qualname__}({options})", "```"]
    return "\n".join(lines)


def gallery() -> str:
    """Every program: its docstring, its options, its file."""
    parts: list[str] = []
    for name, path in programs().items():
        shown = program(name)
        parts += [f"## {name}", "", *prose(path), ""]
        parts += [f"Data: `{', '.join(shown.arguments)}`. Recipe: [`{shown.recipe}`](recipes.md#{shown.recipe}). "]
        parts += ["Defaults: " + ", ".join(f"`{key}={value!r}`" for key, value in shown.options) + "."]
        parts += ["", *code(path, "python", without_docstring), ""]
    return "\n".join(parts)


def toml() -> str:
    """Every recipe as its file has it."""
    lines = list(table(listing.entries("recipes"), ("name", "what it is")))
    for name, path in recipes().items():
        lines += ["", f"## {name}", "", *code(path, "toml", str), ""]
    return "\n".join(lines)


def table(entries: Mapping[str, str], head: tuple[str, str]) -> Iterator[str]:
    """A table of two columns, names as code."""
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    for name, line in entries.items():
        yield f"| `{name}` | {line} |"


def prose(path: Path) -> Iterator[str]:
    """A program's docstring as Markdown: indented paragraphs are formulas, `Args` are a list of definitions."""
    for paragraph in listing.docstring(path).split("\n\n"):
        lines = paragraph.splitlines()
        section = SECTION.match(lines[0])
        if all(line.startswith("    ") for line in lines):
            yield from ("```text", *(line.removeprefix("    ") for line in lines), "```")
        elif section and section[1] == "Args":
            for line in lines[1:]:
                option, _, meaning = line.strip().partition(": ")
                yield f"- `{option}`: {meaning}"
        else:
            yield " ".join(lines)
        yield ""


def code(path: Path, language: str, part: Callable[[str], str]) -> Iterator[str]:
    yield f"```{language}"
    yield part(path.read_text(encoding="utf-8")).strip()
    yield "```"


def without_docstring(source: str) -> str:
    """What follows the docstring that a file begins with."""
    return source.partition('"""\n\n')[2]


LISTINGS: dict[str, Callable[[], str]] = {
    "objectives": lambda: algorithms("objective", catalogue.objectives()),
    "estimators": lambda: algorithms("estimator", catalogue.estimators()),
    "guides": lambda: algorithms("guide", catalogue.guides()),
    "methods": lambda: algorithms("method", catalogue.available("method")),
    "recipes": toml,
    "programs": gallery,
    "matrix": matrix.pages,
    "datasets": lambda: "\n".join(table(listing.entries("datasets"), ("name", "what it is"))),
}
