"""Finding things by name: files by globbing, Python files as modules, near misses among valid names."""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from ppl_lvm.errors import PplLvmError
from ppl_lvm.process import TURN

PACKAGE = Path(__file__).resolve().parent
PREFIX = "_ppl_lvm_file_"
"""How the names of modules begin that were loaded from a path."""
SOURCE_HASH = "__ppl_lvm_source_hash__"
"""Where such a module keeps the digest of the source that was executed."""


def folder(name: str) -> Path:
    """The folder `models` or `inference`: inside an installed package, else at the root of the checkout."""
    shipped = PACKAGE / "_shipped" / name
    return shipped if shipped.is_dir() else PACKAGE.parent / name


def find(root: Path, suffix: str, error: type[PplLvmError]) -> dict[str, Path]:
    """All files below `root` with this suffix, by stem and sorted; not those starting with `_` or `.`.

    Raises:
        error: two files have the same stem.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.rglob(f"*{suffix}"), key=lambda path: (path.stem, path)):
        if any(part.startswith(("_", ".")) for part in path.relative_to(root).parts):
            continue
        if path.stem in found:
            raise error(f"Two files are called {path.stem!r}: {found[path.stem]} and {path}. Rename one.")
        found[path.stem] = path
    return found


def is_path(asked: str, suffix: str) -> bool:
    """Whether a string names a file rather than something found by its stem."""
    return asked.endswith(suffix) or "/" in asked or "\\" in asked


def is_file(path: Path) -> bool:
    """Whether there is such a file; not where no file could be called so (too long, zeros, halves of characters)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def valid(asked: str, names: Iterable[str], what: str) -> str:
    """The end of an error message about an unknown name: the likely one, and all valid ones."""
    names = sorted(names)
    close = get_close_matches(asked, names, n=1)
    listed = f"{what}: {', '.join(names)}." if names else f"There are no {what[:1].lower()}{what[1:]}."
    return (f"Did you mean {close[0]!r}? " if close else "") + listed


def digest(content: bytes) -> str:
    """What tells one source from another."""
    return hashlib.sha256(content).hexdigest()[:16]


def load(path: Path, error: type[PplLvmError]) -> ModuleType:
    """The module that a Python file defines, executed under a private name, once per path and content.

    An edited file is a new module; an unchanged one is the same object, so its functions and classes compare
    equal across calls. No bytecode is written: a cache that goes by time stamps could serve an older file.

    Raises:
        error: the file cannot be read, or raised while it was executed; the message names file and line.
    """
    try:
        path = path.resolve()
        source = path.read_bytes()
    except (OSError, ValueError) as cause:  # what no file could be called is a ValueError
        raise error(f"Cannot read {str(path)!r}: {getattr(cause, 'strerror', None) or cause}.") from cause
    name = f"{PREFIX}{path.stem}_{digest(str(path).encode() + source)}"
    with TURN:  # a module that another thread has begun to execute is half of one
        if name in sys.modules:
            return sys.modules[name]
        module = ModuleType(name)
        module.__file__ = str(path)
        module.__dict__[SOURCE_HASH] = digest(source)
        sys.modules[name] = module  # classes with annotations look their module up there
        try:
            exec(compile(source, str(path), "exec"), module.__dict__)
        except BaseException as cause:
            del sys.modules[name]
            if isinstance(cause, Exception | SystemExit):
                raise error(f"{path}{_line(path, cause)} raised {type(cause).__name__}: {cause}") from cause
            raise
        return module


def imported(name: str, error: type[PplLvmError], asker: str) -> ModuleType:
    """The module of this dotted name, imported.

    Raises:
        error: there is none, or it raised while it was executed; `asker` says in the message who asked.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise error(f"{asker}, but {name!r} is no name of a module; a file is given as path/to/file.py.")
    try:
        return importlib.import_module(name)
    except ImportError as cause:
        raise error(f"{asker}, but: {cause}.") from cause
    except (Exception, SystemExit) as cause:
        raise error(f"{asker}, but module {name} raised {type(cause).__name__}: {cause}") from cause


def _line(path: Path, cause: BaseException) -> str:
    if isinstance(cause, SyntaxError) and cause.lineno is not None:
        return f", line {cause.lineno},"
    lines = [
        frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == str(path)
    ]
    return f", line {lines[-1]}," if lines else ""
