"""A folder of arrays, a JSON manifest and JSON lines: written so that nothing is lost, read so that nothing is run.

```
manifest.json                    what there is; the last file to be written, and what makes the folder valid
<group>-<digest>.safetensors     arrays by name, a file for each group of them
metrics-<digest>.jsonl           one JSON object a line
```

Every file is written under a temporary name, flushed to the disk and renamed. The names of the others hold the digest
of their content, so a folder that is written again keeps the files of its old manifest until the new manifest has taken
the place of the old one in a single rename. Whenever a writer is killed, the folder is what it was before or what it
was to become.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppl_lvm.errors import StorageError

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**24
HEADER_BYTES = 2**24
LINE_BYTES = 2**20
DEEPEST = 64
"""Limits of what is read: the manifest, the header of an array file, a line, and brackets within brackets."""

DTYPES = (*("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
          *("float16", "float32", "float64"))
_GROUP = r"[a-z][a-z0-9_]{0,31}"
_FILE = re.compile(_GROUP + r"-[0-9a-f]{16}\.(safetensors|jsonl)")
_PART = re.compile(r"\.part-[0-9a-f]{16}")
_LINES = "metrics"


@dataclass(frozen=True)
class Stored:
    """What a folder holds."""

    content: dict[str, Any]
    """The writer's part of the manifest."""
    arrays: dict[str, dict[str, np.ndarray]]
    """Group -> name -> array."""
    lines: list[dict[str, Any]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Array(_Strict):
    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**48)]], Field(max_length=32)]


class _File(_Strict):
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _ArrayFile(_File):
    arrays: dict[str, _Array]


class _Manifest(_Strict):
    """The head of every manifest. `sha256` is that of the manifest without this entry."""

    schema_: Annotated[int, Field(alias="schema")]
    kind: str
    sha256: str
    groups: dict[Annotated[str, Field(pattern=f"^{_GROUP}$")], _ArrayFile]
    lines: _File | None
    content: dict[str, Any]


def write(
    folder: str | Path,
    kind: str,
    content: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    lines: Iterable[Mapping[str, Any]] | None = None,
) -> None:
    """Writes a folder, or replaces what an earlier call has written there.

    Args:
        folder: where; it is made with its parents if it is not there.
        kind: what the folder is, as `read` will be asked for: "fit", "checkpoint".
        content: the manifest's own entries: what JSON has, without NaN and infinities.
        arrays: group (a-z, 0-9, `_`) -> name -> array. A group is a file.
        lines: one JSON object a line, as `content`.

    Raises:
        StorageError: an array's dtype or a name cannot be stored, the folder holds other files, or the disk is full or
            cannot be written. What the folder held before is then as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(folder, "note", {"step": 3}, {"params": {"w": np.ones(2)}})
        ...     found = read(folder, "note")
        >>> found.content["step"], found.arrays["params"]["w"]
        (3, array([1., 1.]))
    """
    folder = Path(folder)
    blobs: dict[str, bytes] = {}
    groups: dict[str, Any] = {}
    for group, members in arrays.items():
        if group == _LINES or not re.fullmatch(_GROUP, group):
            raise StorageError(f"A group of arrays is called {group!r}; use a-z, 0-9 and _, and not {_LINES!r}.")
        plain = {name: _storable(name, array) for name, array in members.items()}
        blob = _packed(plain)
        described = {n: {"dtype": a.dtype.name, "shape": list(a.shape)} for n, a in plain.items()}
        groups[group] = _described(blob) | {"arrays": described}
        blobs[_file(group, groups[group], "safetensors")] = blob
    line_file = None
    if lines is not None:
        blob = b"".join(_json(line, "a line", indent=None) + b"\n" for line in lines)
        line_file = _described(blob)
        blobs[_file(_LINES, line_file, "jsonl")] = blob
    head = {"schema": SCHEMA, "kind": kind, "groups": groups, "lines": line_file, "content": dict(content)}
    digest = hashlib.sha256(_json(head, "the manifest", indent=None)).hexdigest()
    manifest = _json({"schema": SCHEMA, "kind": kind, "sha256": digest} | head, "the manifest")
    if len(manifest) > MANIFEST_BYTES:
        raise StorageError(f"The manifest would have {len(manifest):,} bytes; at most {MANIFEST_BYTES:,} are read.")
    _parsed(manifest, folder / MANIFEST)  # what could not be read is not written
    left = "What was there before is unchanged"
    try:
        _make(folder)
        _check_own(folder)
        for name, blob in blobs.items():
            _put(folder, name, blob)
        _sync(folder)
        _put(folder, MANIFEST, manifest)
        left = "What was to be written is there, but may not outlive a power failure, and old files may lie beside it"
        _sync(folder)
        _sweep(folder, {MANIFEST, *blobs})
    except OSError as cause:
        raise StorageError(
            f"Cannot write {str(folder)!r}: {cause.strerror or cause}. {left}; make room, or give another folder."
        ) from cause


def read(folder: str | Path, kind: str) -> Stored:
    """Reads and verifies what `write` has written; nothing in it is executed.

    Args:
        folder: where it is.
        kind: what it should be.

    Raises:
        StorageError: there is none, it is of another kind or schema, a file is missing, truncated, changed or no
            ordinary file, or what it says of itself does not hold.
    """
    folder = Path(folder)
    manifest = manifest_of(folder, kind)
    arrays = {
        group: _unpacked(folder / _file(group, found, "safetensors"), found)
        for group, found in manifest["groups"].items()
    }
    lines: list[dict[str, Any]] = []
    if manifest["lines"] is not None:
        lines = _lines(folder / _file(_LINES, manifest["lines"], "jsonl"), manifest["lines"])
    return Stored(manifest["content"], arrays, lines)


def exists(folder: str | Path) -> bool:
    """Whether a folder has been written by `write`, to its end."""
    return os.path.lexists(Path(folder) / MANIFEST)


def foreign(folder: str | Path) -> list[str]:
    """Files in a folder that `write` has not written."""
    names = [entry.name for entry in os.scandir(folder)] if os.path.isdir(folder) else []
    return sorted(name for name in names if name != MANIFEST and not _FILE.fullmatch(name) and not _is_part(name))


def manifest_of(folder: str | Path, kind: str) -> dict[str, Any]:
    """The manifest alone, verified; the files that it names are not looked at. Raises as `read` does."""
    path = Path(folder) / MANIFEST
    if not path.parent.is_dir():
        raise StorageError(f"There is no folder {str(path.parent)!r}.")
    if not exists(folder):
        raise StorageError(f"{str(path.parent)!r} holds nothing that was saved: it has no {MANIFEST}.")
    blob = _content(path, MANIFEST_BYTES)
    found = _parsed(blob, path)
    if found.kind != kind:
        raise StorageError(f"{str(path.parent)!r} is a {_cut(repr(found.kind))}, and a {kind!r} was asked for.")
    return found.model_dump(by_alias=True)


# Names and JSON.


def _file(group: str, described: Mapping[str, Any], suffix: str) -> str:
    return f"{group}-{described['sha256'][:16]}.{suffix}"


def _described(blob: bytes) -> dict[str, Any]:
    return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}


def _json(value: Mapping[str, Any], what: str, indent: int | None = 1) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, indent=indent).encode("ascii")
    except (TypeError, ValueError, RecursionError) as cause:
        raise StorageError(f"Cannot write {what} as JSON: {cause}.") from cause


def _from_json(blob: bytes, where: str) -> dict[str, Any]:
    """An object, as `_json` writes it: no NaN, no key twice, not too deep."""
    try:
        found = json.loads(blob.decode("ascii"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as cause:
        raise StorageError(f"{where} is no JSON that was written here ({_short(cause)}).") from cause
    if not isinstance(found, dict):
        raise StorageError(f"{where} should be a JSON object.")
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v) if isinstance(x, dict | list)]
        if not level:
            return found
    raise StorageError(f"{where} has more than {DEEPEST} brackets within each other.")


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _parsed(blob: bytes, path: Path) -> _Manifest:
    where = f"The manifest {str(path)!r}"
    table = _from_json(blob, where)
    schema = table.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        todo = "update ppl_lvm" if newer else "it was not written by ppl_lvm, or was changed"
        raise StorageError(f"{where} has schema {_cut(repr(schema))}, and this version reads schema {SCHEMA}; {todo}.")
    try:
        found = _Manifest.model_validate(table)
    except ValidationError as cause:
        first = cause.errors()[0]
        place = _cut(repr(".".join(str(part) for part in first["loc"])))
        raise StorageError(f"{where} cannot be understood: {place}: {first['msg']}.") from cause
    rest = {name: value for name, value in table.items() if name != "sha256"}
    own = hashlib.sha256(_json(rest, where, indent=None)).hexdigest()
    if own != found.sha256 or _json(table, where) != blob:
        raise StorageError(f"{where} was changed after it was written: its digest is another one.")
    return found


def _short(cause: BaseException) -> str:
    text = str(cause) or type(cause).__name__
    return _cut(text if text.isprintable() else ascii(text))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


# Arrays.


def _storable(name: str, array: Any) -> np.ndarray:
    held = np.array(array, order="C")
    if held.dtype.name not in DTYPES:
        raise StorageError(f"Array {name!r} has dtype {held.dtype}; arrays of {', '.join(DTYPES)} can be stored.")
    _check_name(name)
    return held


def _check_name(name: str) -> None:
    if not name.isprintable() or not name or name == "__metadata__" or len(name) > 1024:
        raise StorageError(f"An array is called {_cut(repr(name))}; a name has 1 to 1024 printable characters.")


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save(dict(arrays))


def _unpacked(path: Path, described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    blob = _verified(path, described)
    wanted = {n: (a["dtype"], tuple(a["shape"])) for n, a in described["arrays"].items()}
    size = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or size > min(HEADER_BYTES, len(blob) - 8):
        raise StorageError(f"{str(path)!r} says that its header has {size:,} bytes; at most {HEADER_BYTES:,} are read.")
    # Before anything is made of them: an array without entries may still have more than NumPy can count.
    for name, (dtype, shape) in wanted.items():
        _check_name(name)
        if dtype not in DTYPES or math.prod(shape) * np.dtype(dtype).itemsize > len(blob) or math.prod(
            d or 1 for d in shape
        ) >= 2**60:
            raise StorageError(f"{str(path)!r}: array {_cut(repr(name))} cannot be {_cut(dtype)} of shape {shape}.")
    try:
        found = load(blob)
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as cause:
        raise StorageError(f"{str(path)!r} is no safetensors file ({_short(cause)}).") from cause
    there = {n: (a.dtype.name, a.shape) for n, a in found.items()}
    if there != wanted:
        name = min(n for n in there.keys() | wanted.keys() if there.get(n) != wanted.get(n))
        raise StorageError(
            f"{str(path)!r}: array {_cut(repr(name))} is {_kind(there.get(name))}, and the manifest says "
            f"{_kind(wanted.get(name))}."
        )
    return {name: found[name] for name in wanted}


def _kind(found: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if found is None else f"{found[0]} of shape {found[1]}"


def _lines(path: Path, described: Mapping[str, Any]) -> list[dict[str, Any]]:
    blob = _verified(path, described)
    found = []
    for number, line in enumerate(blob.splitlines(), 1):
        if len(line) > LINE_BYTES:
            raise StorageError(f"{str(path)!r}, line {number}: {len(line):,} bytes; at most {LINE_BYTES:,} are read.")
        found.append(_from_json(line, f"{str(path)!r}, line {number}"))
    return found


# Files.


def _content(path: Path, most: int) -> bytes:
    """The bytes of an ordinary file of at most that many; no link is followed and no pipe waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as cause:
        raise StorageError(f"{str(path)!r} is missing, which the manifest names.") from cause
    except OSError as cause:
        linked = path.is_symlink()
        why = "it is a link, and links are not followed" if linked else cause.strerror or str(cause)
        raise StorageError(f"Cannot read {str(path)!r}: {why}.") from cause
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise StorageError(f"{str(path)!r} is no ordinary file.")
        if about.st_size > most:
            raise StorageError(f"{str(path)!r} has {about.st_size:,} bytes, and at most {most:,} are expected.")
        with open(handle, "rb", closefd=False) as file:
            return file.read(about.st_size + 1)
    except OSError as cause:
        raise StorageError(f"Cannot read {str(path)!r}: {cause.strerror or cause}.") from cause
    finally:
        os.close(handle)


def _verified(path: Path, described: Mapping[str, Any]) -> bytes:
    blob = _content(path, described["bytes"])
    if len(blob) != described["bytes"]:
        raise StorageError(
            f"{str(path)!r} has {len(blob):,} bytes of {described['bytes']:,}; it is truncated or was changed."
        )
    if hashlib.sha256(blob).hexdigest() != described["sha256"]:
        raise StorageError(f"{str(path)!r} was changed or damaged after it was written: its digest is another one.")
    return blob


def _make(folder: Path) -> None:
    """The folder, on the disk also where its parents are new."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync(path.parent)


def _check_own(folder: Path) -> None:
    if found := foreign(folder):
        raise StorageError(
            f"The folder {str(folder)!r} holds {found[0]!r}, which was not written here; give a folder of its own."
        )


def _is_part(name: str) -> bool:
    return _PART.fullmatch(name) is not None


def _put(folder: Path, name: str, blob: bytes) -> None:
    part = folder / f".part-{secrets.token_hex(8)}"
    try:
        with open(part, "xb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _sweep(folder: Path, kept: set[str]) -> None:
    """Removes what earlier manifests named, and what writers that were killed left."""
    for entry in list(os.scandir(folder)):
        if entry.name not in kept and (_FILE.fullmatch(entry.name) or _is_part(entry.name)):
            os.unlink(entry.path)


def _sync(folder: Path) -> None:
    """Flushes the names in a folder; not everywhere can a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
