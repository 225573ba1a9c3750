"""The folder that everything saved is kept in: to the bit, atomically, and refused at the first byte that differs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppl_lvm import store
from ppl_lvm.errors import StorageError

ARRAYS: dict[str, dict[str, np.ndarray]] = {
    "params": {"w": np.arange(6.0).reshape(2, 3), "['a'].b": np.array(3, np.int8)},
    "run0": {"n": np.zeros((0, 4))},
}
LINES = [{"step": 0, "loss": 0.1}, {"step": 1, "loss": -1e300}]
CONTENT = {"step": 3, "name": "é", "nested": [{"a": None}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store.write(tmp_path / "a", "note", CONTENT, ARRAYS, LINES)
    return tmp_path / "a"


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Another manifest with a right digest, as somebody would write it who knows how."""
    manifest = json.loads((folder / store.MANIFEST).read_text())
    edit(manifest)
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    rest = {n: v for n, v in manifest.items() if n != "sha256"}
    if "sha256" in manifest:
        manifest["sha256"] = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    (folder / store.MANIFEST).write_text(json.dumps(manifest, indent=1))


def replace_file(folder: Path, group: str, blob: bytes, arrays: dict[str, Any] | None = None) -> None:
    """Another file of arrays, with the manifest that belongs to it."""
    digest = hashlib.sha256(blob).hexdigest()
    (folder / f"{group}-{digest[:16]}.safetensors").write_bytes(blob)

    def edit(manifest: dict[str, Any]) -> None:
        manifest["groups"][group] |= {"bytes": len(blob), "sha256": digest}
        if arrays is not None:
            manifest["groups"][group]["arrays"] = arrays

    rewrite(folder, edit)


def safetensors(header: object, body: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


# To the bit.


def test_what_is_written_is_read(folder: Path) -> None:
    found = store.read(folder, "note")
    assert (found.content, found.lines) == (CONTENT, LINES)
    assert {g: list(a) for g, a in found.arrays.items()} == {g: list(a) for g, a in ARRAYS.items()}
    np.testing.assert_array_equal(found.arrays["params"]["w"], ARRAYS["params"]["w"])


@pytest.mark.parametrize("dtype", store.DTYPES)
def test_every_dtype_keeps_its_bits(dtype: str, tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 64 * 8, np.uint8)
    arrays = {"all": raw.view(dtype), "one": raw.view(dtype)[3].reshape(()), "none": raw.view(dtype)[:0]}
    arrays["turned"] = raw.view(dtype)[: 8 * 8 // np.dtype(dtype).itemsize].reshape(2, -1).T
    swapped = raw.view(dtype).astype(np.dtype(dtype).newbyteorder(">"))
    store.write(tmp_path / "a", "note", {}, {"g": arrays | {"other": swapped}})
    found = store.read(tmp_path / "a", "note").arrays["g"]
    np.testing.assert_array_equal(found.pop("other").view(np.uint8), raw)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == np.array(array, order="C").tobytes()
        found[name][...] = 0  # the reader's own memory


def test_the_same_content_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    store.write(tmp_path / "b", "note", CONTENT, ARRAYS, LINES)
    first, second = ({p.name: p.read_bytes() for p in files(f)} for f in (folder, tmp_path / "b"))
    assert first == second


# Damage.


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_every_flipped_byte_is_refused(folder: Path) -> None:
    random = np.random.default_rng(0)
    tried = 0
    for path in files(folder):
        blob = path.read_bytes()
        for place in range(0, len(blob), 2):
            wrong = bytearray(blob)
            wrong[place] ^= 1 << int(random.integers(8))
            path.write_bytes(wrong)
            with pytest.raises(StorageError):
                store.read(folder, "note")
            tried += 1
        path.write_bytes(blob)
    assert tried > 500
    store.read(folder, "note")


def test_every_truncation_is_refused(folder: Path) -> None:
    for path in files(folder):
        blob = path.read_bytes()
        for length in [*range(0, len(blob), 7), len(blob) - 1]:
            path.write_bytes(blob[:length])
            with pytest.raises(StorageError):
                store.read(folder, "note")
        path.write_bytes(blob + b"\0")
        with pytest.raises(StorageError):
            store.read(folder, "note")
        path.write_bytes(blob)
    store.read(folder, "note")


def test_a_missing_file_is_named(folder: Path) -> None:
    for path in files(folder):
        blob = path.read_bytes()
        path.unlink()
        said = "no manifest.json" if path.name == store.MANIFEST else f"{path.name}' is missing"
        with pytest.raises(StorageError, match=said):
            store.read(folder, "note")
        path.write_bytes(blob)


def test_no_folder_and_another_kind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no folder"):
        store.read(tmp_path / "none", "note")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="holds nothing that was saved"):
        store.read(tmp_path / "empty", "note")
    with pytest.raises(StorageError, match="is a 'note', and a 'fit' was asked for"):
        store.read(folder, "fit")


# Malice: manifests with right digests.


@pytest.mark.parametrize("schema", [2, 0, "1", None, True, 1.0, [1]])
def test_an_unknown_schema_is_refused(schema: object, folder: Path) -> None:
    rewrite(folder, lambda m: m.update(schema=schema))
    said = "update ppl_lvm" if schema == 2 else "not written by ppl_lvm"
    with pytest.raises(StorageError, match=f"reads schema 1; .*{said}"):
        store.read(folder, "note")


@pytest.mark.parametrize("group", ["../params", "/etc/passwd", "a/b", "..", "", "A", "a\0", "a" * 40])
def test_paths_out_of_the_folder_are_refused(group: str, folder: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["groups"][group] = manifest["groups"].pop("params")

    (folder.parent / next(p.name for p in files(folder) if p.name.startswith("params"))).write_bytes(b"outside")
    rewrite(folder, edit)
    with pytest.raises(StorageError, match="cannot be understood"):
        store.read(folder, "note")


def test_digests_that_are_paths_are_refused(folder: Path) -> None:
    rewrite(folder, lambda m: m["groups"]["params"].update(sha256="../" * 22))
    with pytest.raises(StorageError, match=r"cannot be understood: 'groups\.params\.sha256'"):
        store.read(folder, "note")


def test_links_are_not_followed(folder: Path) -> None:
    for path in files(folder):
        there = folder.parent / "elsewhere"
        path.rename(there)
        path.symlink_to(there)
        with pytest.raises(StorageError, match="links are not followed"):
            store.read(folder, "note")
        path.unlink()
        there.rename(path)
    store.read(folder, "note")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_folders_are_no_files(folder: Path) -> None:
    """A pipe that nobody writes to would be waited for without end."""
    for path in files(folder):
        blob = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(StorageError, match="no ordinary file"):
            store.read(folder, "note")
        path.unlink()
        path.mkdir()
        with pytest.raises(StorageError, match=r"no ordinary file|Cannot read"):
            store.read(folder, "note")
        path.rmdir()
        path.write_bytes(blob)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "no JSON"),
        ('{"a":' * 100_000, "no JSON"),
        ('{"schema": 1, "content": ' + "[" * 70 + "]" * 70 + "}", "more than 64 brackets"),
        ("[]", "should be a JSON object"),
        ("null", "should be a JSON object"),
        ('{"schema": NaN}', "NaN is no number"),
        ('{"schema": 1, "x": 1e999}', "cannot be understood"),
        ('{"schema": ' + "1" * 5000 + "}", "no JSON"),
        ("é", "no JSON"),
        ("", "no JSON"),
        ('{"schema": 1}', "cannot be understood"),
        (" " * (store.MANIFEST_BYTES + 1), "at most"),
    ],
)
def test_manifests_that_are_no_manifests(text: str, said: str, folder: Path) -> None:
    (folder / store.MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError, match=said):
        store.read(folder, "note")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.pop("kind"),
        lambda m: m.update(more=1),
        lambda m: m.update(kind=3),
        lambda m: m.update(content=[]),
        lambda m: m.update(groups=[]),
        lambda m: m["groups"]["params"].update(bytes=-1),
        lambda m: m["groups"]["params"].update(bytes="600"),
        lambda m: m["groups"]["params"].update(bytes=True),
        lambda m: m["groups"]["params"].update(more=1),
        lambda m: m["groups"]["params"]["arrays"]["w"].update(shape=[-1]),
        lambda m: m["groups"]["params"]["arrays"]["w"].update(shape=[2**60]),
        lambda m: m["groups"]["params"]["arrays"]["w"].update(shape=[1] * 40),
        lambda m: m["groups"]["params"]["arrays"]["w"].update(shape=[2.0, 3]),
        lambda m: m["groups"]["params"]["arrays"]["w"].update(dtype=3),
        lambda m: m.update(lines={"bytes": 1}),
    ],
)
def test_entries_of_other_types_are_refused(edit: Callable[[dict[str, Any]], None], folder: Path) -> None:
    rewrite(folder, edit)
    with pytest.raises(StorageError, match="cannot be understood"):
        store.read(folder, "note")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"w": {"dtype": "float64", "shape": [3, 2]}}, "'w' is float64 of shape"),
        ({"w": {"dtype": "int64", "shape": [2, 3]}}, "'w' is float64 of shape"),
        ({"w": {"dtype": "object", "shape": [2, 3]}}, "cannot be object"),
        ({"w": {"dtype": "float64", "shape": [2**40, 2**40]}}, "cannot be float64"),
        ({"w": {"dtype": "float64", "shape": [0, *[2**47] * 3]}}, "cannot be float64"),
        ({"v": {"dtype": "float64", "shape": [2, 3]}}, "not there"),
        ({"w\x1b[2J": {"dtype": "float64", "shape": [2, 3]}}, "printable"),
        ({"\ud800": {"dtype": "float64", "shape": [2, 3]}}, "printable"),
    ],
)
def test_arrays_that_are_not_what_the_manifest_says(wrong: dict[str, Any], said: str, folder: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        arrays = manifest["groups"]["params"]["arrays"]
        arrays.pop("w")
        arrays |= wrong

    rewrite(folder, edit)
    with pytest.raises(StorageError, match=said) as told:
        store.read(folder, "note")
    assert str(told.value).isprintable()  # what a file says does not reach the terminal as it is


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (safetensors({}, size=2**63), "header has 9,223,372,036,854,775,808 bytes"),
        (safetensors({}, size=2**20), "header has 1,048,576 bytes"),
        (b"", "header"),
        (b"abc", "header"),
        (safetensors(b"[" * 5000), "no safetensors file"),
        (safetensors(b"{" * 20), "no safetensors file"),
        (safetensors({"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 16]}}, b"\0" * 8), "no safetensors file"),
        (safetensors({"w": {"dtype": "F64", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8), "no safetensors file"),
        (safetensors({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8), "no safetensors file"),
        (safetensors({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}, b"\0" * 8), "no safetensors file"),
        (safetensors({"w": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}}, b"\0" * 8), "no safetensors file"),
        (
            safetensors({"w": {"dtype": "F64", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, b"\0" * 8),
            "no safetensors file",
        ),
        (safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "'w' is float32"),
        (safetensors({"w": {"dtype": "U8", "shape": [0, 2**62], "data_offsets": [0, 0]}}), "is uint8|no safetensors"),
    ],
)
def test_array_files_with_a_right_digest_and_a_wrong_content(blob: bytes, said: str, folder: Path) -> None:
    replace_file(folder, "params", blob, {"w": {"dtype": "float64", "shape": [1]}})
    with pytest.raises(StorageError, match=said):
        store.read(folder, "note")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"[]", "should be a JSON object"),
        (b"{", "no JSON"),
        (b'{"a": Infinity}', "Infinity is no number"),
        (b'{"a": "' + b"x" * store.LINE_BYTES + b'"}', "at most"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "brackets"),
    ],
)
def test_lines_that_are_no_lines(line: bytes, said: str, folder: Path) -> None:
    digest = hashlib.sha256(line).hexdigest()
    (folder / f"metrics-{digest[:16]}.jsonl").write_bytes(line)
    rewrite(folder, lambda m: m.update(lines={"bytes": len(line), "sha256": digest}))
    with pytest.raises(StorageError, match=said):
        store.read(folder, "note")


# Writing.


@pytest.mark.parametrize(
    ("content", "arrays", "said"),
    [
        ({"x": float("nan")}, {}, "as JSON"),
        ({"x": {1, 2}}, {}, "as JSON"),
        ({}, {"g": {"x": np.array(["a"])}}, "dtype <U1"),
        ({}, {"g": {"x": np.array([None])}}, "dtype object"),
        ({}, {"g": {"x": np.zeros(2, complex)}}, "dtype complex128"),
        ({}, {"g": {"": np.zeros(2)}}, "printable"),
        ({}, {"g": {"a\n": np.zeros(2)}}, "printable"),
        ({}, {"g": {"__metadata__": np.zeros(2)}}, "printable"),
        ({}, {"../g": {"a": np.zeros(2)}}, "use a-z"),
        ({}, {"metrics": {"a": np.zeros(2)}}, "use a-z"),
        ({"x": "y" * store.MANIFEST_BYTES}, {}, "at most"),
    ],
)
def test_what_cannot_be_read_is_not_written(content: Any, arrays: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=said):
        store.write(tmp_path / "a", "note", content, arrays)
    assert not (tmp_path / "a").exists()


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(StorageError, match=r"holds 'thesis\.tex'"):
        store.write(tmp_path, "note", {}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        store.write(tmp_path / "file", "note", {}, {})


def test_a_folder_that_is_written_again_holds_the_new_files_alone(folder: Path) -> None:
    (folder / ".part-0123456789abcdef").write_bytes(b"left by a writer that was killed")
    store.write(folder, "note", {"step": 4}, {"params": {"w": np.ones(3)}})
    found = store.read(folder, "note")
    assert (found.content, found.lines) == ({"step": 4}, [])
    assert [re.sub("[0-9a-f]{16}", "#", p.name) for p in files(folder)] == ["manifest.json", "params-#.safetensors"]


class Stopped(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("error", [OSError, Stopped])
def test_whatever_call_fails_the_folder_is_the_old_or_the_new_one(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call that writes fails, and with it all that follow, as where a disk is full or a process killed."""
    new = {"params": {"w": np.ones(3)}, "more": {"v": np.zeros(2)}}
    found = []
    for n in range(100):
        folder, calls = tmp_path / str(n), 0
        store.write(folder, "note", {"step": 0}, {"params": {"w": np.zeros(3)}})

        def failing(original: Callable[..., Any], n: int = n) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > n:
                    raise error(28, "No space left on device")
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (Path, "unlink")):
                patch.setattr(module, name, failing(getattr(module, name)))
            try:
                store.write(folder, "note", {"step": 1}, new, [{"a": 1}])
                done = True
            except (StorageError, Stopped) as told:
                done = False
                assert isinstance(told, Stopped) or "No space left on device" in str(told)
                unchanged = store.read(folder, "note").content["step"] == 0
                assert isinstance(told, Stopped) or ("before is unchanged" in str(told)) == unchanged
        found.append(store.read(folder, "note").content["step"])
        store.write(folder, "note", {"step": 1}, new)
        assert len(files(folder)) == 3  # nothing is left of what failed
        if done:
            break
    # A flush and a rename of each file and one flush of their names come first, then the manifest's own.
    assert found == [0] * 9 + [1] * 3
