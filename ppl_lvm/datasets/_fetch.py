"""Public files: from a folder of the user's, from the cache, or downloaded; never without their digest."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ppl_lvm.errors import DataError

FOLDER = "PPL_LVM_DATA"
SECONDS = 30
"""After which a server that does not answer is given up."""


@dataclass(frozen=True)
class Remote:
    """A public file: its name in a folder, where it comes from, and the digest of its content."""

    name: str
    url: str
    sha256: str


def cache() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppl_lvm"


def fetch(remote: Remote) -> bytes:
    """The content of a public file, whose SHA-256 is checked wherever it comes from.

    Raises:
        DataError: it is another file than the known one, or cannot be downloaded.
    """
    own = os.environ.get(FOLDER)
    for folder in ([Path(own)] if own else []) + [cache()]:
        if (folder / remote.name).is_file():
            content = (folder / remote.name).read_bytes()
            _check(content, remote, str(folder / remote.name))
            return content
    try:
        with urllib.request.urlopen(remote.url, timeout=SECONDS) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"{remote.name} cannot be downloaded from {remote.url} ({error}). Put it into a folder and name the folder "
            f"in the environment variable {FOLDER}" + (f" (it is not in {own})." if own else ".")
        ) from error
    _check(content, remote, remote.url)
    _keep(content, cache() / remote.name)
    return content


def _check(content: bytes, remote: Remote, where: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != remote.sha256:
        raise DataError(
            f"{where} has the SHA-256 digest {found}, and {remote.name} has {remote.sha256}: it is damaged or another "
            f"file. Delete it, and it is downloaded anew."
        )


def _keep(content: bytes, path: Path) -> None:
    """Written under another name first: a run that is stopped leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
