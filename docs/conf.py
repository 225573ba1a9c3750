"""How the documentation is built: `make docs`."""

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from _listings import filled  # noqa: E402 - lies beside this file

project = "ppl_lvm"
author = "The ppl_lvm contributors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
copyright = author

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_*"]
html_theme = "furo"
html_title = f"{project} {release}"

# Docstrings write code and formulas between single backticks.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source", ("Groups", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Of the kernels: pictures are part of the page whatever the shell says, and tqdm's missing widget is no news.
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

# Tutorials run in every build, as what they show depends on the package too; an error in one ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 400
nb_execution_show_tb = True
nb_merge_streams = True


def setup(app: Sphinx) -> None:
    app.connect("source-read", _fill)
    app.connect("build-finished", _check_pictures)
    # Around napoleon, at 500, which takes what stands before a colon for the type of an attribute.
    written: dict[str, list[str]] = {}

    def keep(app: Sphinx, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
        written[name] = [*lines]

    def restore(app: Sphinx, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
        if what in ("attribute", "property"):
            lines[:] = written[name]

    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = filled(source[0])


def _check_pictures(app: Sphinx, failed: Exception | None) -> None:
    """A picture that was drawn and is not on its page would be missed by no one else."""
    if failed or app.config.nb_execution_mode == "off" or app.builder.name != "html":
        return
    for tutorial in sorted((ROOT / "tutorials").glob("*.md")):
        page = Path(app.outdir) / "tutorials" / f"{tutorial.stem}.html"
        found = page.read_text(encoding="utf-8").count("/_images/")
        wanted = tutorial.read_text(encoding="utf-8").count("plt.show()")
        if found < wanted:
            raise ExtensionError(f"{page} has {found} pictures, and {tutorial} draws {wanted}.")
