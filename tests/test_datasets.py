"""Data sets: what they hold, that a seed fixes the split, and what bad files are told."""

import gzip
import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import savemat

from ppl_lvm.data import read
from ppl_lvm.datasets import Dataset, _fetch, _public, datasets, load
from ppl_lvm.datasets._generated import draw_pendulum, draw_sprites, swung
from ppl_lvm.errors import DataError
from ppl_lvm.program import Program

PUBLIC = {"mnist10k", "mnist10k_binary", "omniglot", "omniglot_binary", "omniglot_105", "jsb_chorales"}
"""Names whose files no dependency ships; the tests write tiny ones of the same formats."""


@pytest.mark.parametrize("name", sorted({*datasets()} - PUBLIC))
def test_every_named_data_set_is_split_and_finite(name: str) -> None:
    data = load(name)
    assert data.name == name
    assert data.train.dtype == data.test.dtype == np.float64
    assert data.train.shape[1:] == data.test.shape[1:]
    assert len(data.test) / (len(data.test) + len(data.train)) == pytest.approx(0.2, abs=0.001)
    assert np.isfinite(data.train).all() and np.isfinite(data.test).all()
    assert data.description and data.licence and datasets()[name]


def test_digits_are_integer_grey_levels_with_their_labels() -> None:
    data = load("digits")
    assert (data.train.shape, data.test.shape, data.image_shape) == ((1437, 64), (360, 64), (8, 8))
    rows = np.concatenate([data.train, data.test])
    assert set(np.unique(rows)) == set(range(17))
    assert data.train_labels is not None and data.test_labels is not None
    from sklearn.datasets import load_digits

    wanted = {row.tobytes(): label for row, label in zip(*load_digits(return_X_y=True), strict=True)}
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert {row.tobytes(): label for row, label in zip(rows, labels, strict=True)} == wanted


def test_the_seed_fixes_which_rows_are_held_out() -> None:
    first, again, other = load("digits"), load("digits", seed=0), load("digits", seed=1)
    np.testing.assert_array_equal(first.test, again.test)
    np.testing.assert_array_equal(first.train_labels, again.train_labels)
    assert not np.array_equal(first.test, other.test)
    assert not {row.tobytes() for row in first.train} & {row.tobytes() for row in first.test}


def test_linear_gaussian_has_three_factors() -> None:
    data = load("linear_gaussian")
    spectrum = np.linalg.eigvalsh(np.cov(data.train.T))[::-1]
    # Noise has variance 0.25 in every direction; the three factors stand clear of it.
    np.testing.assert_allclose(spectrum[3:], 0.25, rtol=0.3)
    assert spectrum[2] > 1.0


@pytest.mark.parametrize(
    "name", ["pinwheel", "spirals", "sprites", "lds", "lds_medium", "pendulum", "functional_tensor"]
)
def test_generated_data_are_a_function_of_the_seed(name: str) -> None:
    first, again, other = load(name), load(name), load(name, seed=1)
    np.testing.assert_array_equal(first.train, again.train)
    assert not np.array_equal(first.train, other.train)


def test_factors_make_the_images_and_points() -> None:
    data = load("sprites")
    assert data.train_factors is not None and data.test_factors is not None
    for rows, factors in ((data.train, data.train_factors), (data.test, data.test_factors)):
        np.testing.assert_array_equal(rows.reshape(-1, 16, 16), draw_sprites(factors))
    np.testing.assert_array_equal(data.train_factors["shape"], data.train_labels)
    spirals = load("spirals")
    assert spirals.train_factors is not None
    radius = np.linalg.norm(spirals.train, axis=1)
    assert np.abs(radius - spirals.train_factors["turn"] / np.pi).max() < 0.5  # 5 standard deviations of the noise


def test_sprites_are_where_their_factors_say() -> None:
    """Centre of mass, in units of [-1, 1] and upwards; a quarter turn turns the image."""
    one = {n: np.array([v]) for n, v in {"shape": 0, "scale": 0.4, "orientation": 0.3, "x": 0.3, "y": -0.2}.items()}
    image = draw_sprites(one, size=200)[0]
    centres = (2.0 * np.arange(200) + 1.0) / 200 - 1.0
    assert (image.sum(0) @ centres / image.sum()) == pytest.approx(0.3, abs=0.01)
    assert (image.sum(1) @ -centres / image.sum()) == pytest.approx(-0.2, abs=0.01)
    assert image.mean() * 4 == pytest.approx((2 * 0.4) ** 2, rel=0.02)
    turned = {n: np.array([v]) for n, v in {"shape": 2, "scale": 0.5, "orientation": 0.0, "x": 0.0, "y": 0.0}.items()}
    upright = draw_sprites(turned, size=64)[0]
    quarter = draw_sprites({**turned, "orientation": np.array([np.pi / 2])}, size=64)[0]
    assert np.mean(np.rot90(upright) != quarter) < 0.01  # counter-clockwise, up to pixels on an edge


@pytest.mark.parametrize("name", ["lds", "lds_medium"])
def test_dynamical_systems_have_the_moments_of_their_parameters(name: str) -> None:
    data = load(name)
    p, factors = data.parameters, data.train_factors
    assert p is not None and factors is not None
    z = factors["z"]
    noise = z[:, 1:] - z[:, :-1] @ p["A"].T
    # n independent entries: a covariance's standard error is at most sqrt(2 / n) times the variances.
    error = np.sqrt(2.0 / noise[..., 0].size)
    np.testing.assert_allclose(np.cov(noise.reshape(-1, z.shape[-1]).T), p["Q"], atol=4.5 * error * p["Q"].max())
    residual = data.train - z @ p["C"].T - p.get("d", 0.0)
    found = np.cov(residual.reshape(-1, residual.shape[-1]).T)
    np.testing.assert_allclose(found, p["R"], atol=4.5 * error * p["R"].max())
    np.testing.assert_allclose(p["A"] @ p["A"].T, np.eye(len(p["A"])) * (p["A"] @ p["A"].T)[0, 0], atol=1e-12)


def test_a_pendulum_keeps_its_energy_and_its_bob_is_where_the_angle_says() -> None:
    angle = swung(np.array([0.05, 2.4]), np.array([0.0, 0.3]), 30)
    # Small swings have angular frequency 1, less a sixteenth of the amplitude squared.
    np.testing.assert_allclose(angle[0], 0.05 * np.cos(0.4 * np.arange(30) * (1 - 0.05**2 / 16)), atol=1e-5)
    fine = swung(np.array([0.05, 2.4]), np.array([0.0, 0.3]), 1161, every=0.01, within=1)
    np.testing.assert_allclose(fine[:, ::40], angle, atol=1e-12)
    speed = (fine[1, 2:] - fine[1, :-2]) / 0.02
    np.testing.assert_allclose(speed**2 / 2 - np.cos(fine[1, 1:-1]), 0.3**2 / 2 - np.cos(2.4), atol=2e-4)
    image = draw_pendulum(np.array(0.5), size=100)
    centres = (2.0 * np.arange(100) + 1.0) / 100 - 1.0
    assert image.sum(0) @ centres / image.sum() == pytest.approx(0.7 * np.sin(0.5), abs=0.01)
    assert image.sum(1) @ -centres / image.sum() == pytest.approx(-0.7 * np.cos(0.5), abs=0.01)
    data = load("pendulum")
    assert data.test_factors is not None
    noise = data.test - draw_pendulum(data.test_factors["angle"]).reshape(data.test.shape)
    assert noise.std() == pytest.approx(0.1, abs=0.002)


def test_steps_are_left_out_where_missing_entries_are_asked_for() -> None:
    whole, data = load("pendulum"), load("pendulum", missing=True)
    assert data.train_factors is not None
    gaps = np.isnan(data.train)
    assert (gaps.any(-1) == gaps.all(-1)).all() and gaps.mean() == pytest.approx(0.2, abs=0.02)
    np.testing.assert_array_equal(data.train_factors["x"], whole.train)
    np.testing.assert_array_equal(np.where(gaps, whole.train, data.train), whole.train)


# Public files.


def _gzip_idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


Offer = Callable[[str, bytes], None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Puts a file of the test's own into the user's folder, with its digest; nothing is downloaded or cached."""
    monkeypatch.setenv("PPL_LVM_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def put(remote: str, content: bytes) -> None:
        known = _public.REMOTES[remote]
        (tmp_path / known.name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(_public.REMOTES, remote, replace(known, sha256=digest, url="file:///nowhere"))

    return put


def test_mnist_holds_out_its_last_fifth(offer: Offer) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 3))
    offer("mnist_images", _gzip_idx(images))
    offer("mnist_labels", _gzip_idx(np.arange(10)))
    data = load("mnist10k", seed=5)
    np.testing.assert_array_equal(np.concatenate([data.train, data.test]), images.reshape(10, 12))
    assert (len(data.train), data.image_shape, data.test_labels.tolist()) == (8, (4, 3), [8, 9])  # type: ignore[union-attr]
    binary, again, other = (load("mnist10k_binary", seed=s) for s in (0, 0, 1))
    assert {*np.unique(binary.train)} == {0.0, 1.0}
    np.testing.assert_array_equal(binary.train, again.train)
    assert not np.array_equal(binary.train, other.train)
    offer("mnist_images", gzip.compress(b"no images"))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz is no IDX file"):
        load("mnist10k")


def test_omniglot_reads_ink_and_numbers_its_characters(offer: Offer) -> None:
    paper = np.ones((105, 105), dtype=bool)
    paper[:30, :60] = False
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for character in ("Greek/character01", "Greek/character02"):
            for i in range(5):
                png = io.BytesIO()
                Image.fromarray(paper).save(png, "png")
                archive.writestr(f"images/{character}/{i}.png", png.getvalue())
    offer("omniglot", written.getvalue())
    whole, small = load("omniglot_105"), load("omniglot")
    assert (whole.train.shape, small.train.shape, len(small.test)) == ((8, 105 * 105), (8, 784), 2)
    np.testing.assert_array_equal(whole.train[0].reshape(105, 105), ~paper)
    # Ink covers the same share of both: 30 / 105 of the rows, 60 / 105 of the columns, in levels of 255.
    assert small.train[0].mean() / 255 == pytest.approx(30 * 60 / 105**2, abs=2e-3)
    assert small.train[0].reshape(28, 28)[:7, :15].min() == 255
    assert small.train_labels is not None and {*small.train_labels.tolist()} == {0, 1}


def test_chorales_are_sequences_that_fit_takes(offer: Offer) -> None:
    rng = np.random.default_rng(0)
    parts = {}
    for part, lengths in {"traindata": [3, 5], "validdata": [2], "testdata": [4]}.items():
        cells = np.empty((1, len(lengths)), dtype=object)
        for i, n in enumerate(lengths):
            cells[0, i] = rng.integers(0, 2, (n, 88)).astype(np.uint8)
        parts[part] = cells
    file = io.BytesIO()
    savemat(file, parts)
    offer("jsb_chorales", file.getvalue())
    data = load("jsb_chorales")
    assert data.ragged and data.valid is not None
    assert [a.shape for a in (*data.train, *data.valid, *data.test)] == [(3, 88), (5, 88), (2, 88), (4, 88)]
    np.testing.assert_array_equal(data.train[1], parts["traindata"][0, 1])

    def model(ppl: object, x: object, lengths: object) -> None: ...

    call = read(data.train, Program("toy", model, model, portable=True, arguments=("x", "lengths")))
    assert call.own.kwargs["x"].shape == (2, 5, 88)
    assert call.own.kwargs["lengths"].tolist() == [3, 5]
    file = io.BytesIO()
    savemat(file, {"traindata": parts["traindata"]})
    offer("jsb_chorales", file.getvalue())
    with pytest.raises(DataError, match="lacks validdata, testdata"):
        load("jsb_chorales")


def test_a_file_is_downloaded_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PPL_LVM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "there"
    source.write_bytes(b"content")
    remote = _fetch.Remote("here", source.as_uri(), hashlib.sha256(b"content").hexdigest())
    with pytest.raises(DataError, match=r"has the SHA-256 digest ed7002b.*and here has 00.*another file"):
        _fetch.fetch(replace(remote, sha256="00"))
    assert not list((tmp_path / "cache").rglob("*"))  # nothing of it is kept
    assert _fetch.fetch(remote) == b"content"
    assert [p.name for p in (tmp_path / "cache" / "ppl_lvm").iterdir()] == ["here"]
    source.unlink()
    assert _fetch.fetch(remote) == b"content"
    (tmp_path / "cache" / "ppl_lvm" / "here").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"cache/ppl_lvm/here has the SHA-256.*Delete it"):
        _fetch.fetch(remote)
    (tmp_path / "cache" / "ppl_lvm" / "here").unlink()
    with pytest.raises(DataError, match=r"here cannot be downloaded from file://.*environment variable PPL_LVM_DATA"):
        _fetch.fetch(remote)
    monkeypatch.setenv("PPL_LVM_DATA", str(tmp_path / "own"))
    with pytest.raises(DataError, match=r"it is not in .*own"):
        _fetch.fetch(remote)


needs_files = pytest.mark.skipif(
    "PPL_LVM_DATA" not in os.environ, reason="PPL_LVM_DATA names no folder with the public files"
)


@needs_files
def test_the_public_images_are_those_of_their_authors() -> None:
    data = load("mnist10k")
    assert data.train_labels is not None and data.test_labels is not None
    assert (data.train.shape, data.test.shape) == ((8000, 784), (2000, 784))
    # As MNIST's page counts them.
    counts = np.bincount(np.concatenate([data.train_labels, data.test_labels]))
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    drawn = load("omniglot_105")
    assert drawn.train_labels is not None and drawn.test_labels is not None
    assert {*np.unique(drawn.train)} == {0.0, 1.0} and drawn.train.mean() < 0.1
    # Twenty people drew each of 136 characters.
    assert np.bincount(np.concatenate([drawn.train_labels, drawn.test_labels])).tolist() == [20] * 136


@needs_files
def test_the_public_chorales_are_in_their_published_split() -> None:
    data = load("jsb_chorales")
    assert data.valid is not None
    assert (len(data.train), len(data.valid), len(data.test)) == (229, 76, 77)
    assert {int(v) for song in data.train for v in np.unique(song)} == {0, 1}
    assert max(np.mean(song.sum(1)) for song in data.train) <= 4  # voices


# The user's own.


def test_a_parquet_file_is_rows(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": np.arange(10), "b": np.arange(10) / 7})
    frame.to_parquet(tmp_path / "own.parquet")
    data = load(tmp_path / "own.parquet")
    assert _rows(data) == {tuple(row) for row in frame.to_numpy()}
    frame.assign(c="text").to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"Columns c of .*bad.parquet hold no numbers"):
        load(tmp_path / "bad.parquet")
    (tmp_path / "no.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read as a Parquet file"):
        load(tmp_path / "no.parquet")


FUNCTIONS = """
import numpy as np

def rows():
    return np.arange(20.0).reshape(10, 2)

def parts():
    return {"train": rows()[:7], "test": rows()[7:]}

def songs():
    return [np.ones((1 + i % 3, 2)) for i in range(10)]

def text():
    return np.array([["a"], ["b"]])
"""


def test_a_function_returns_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own_data.py"
    path.write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for source in (str(path), "own_data"):
        assert _rows(load(f"{source}:rows")) == {(2.0 * i, 2.0 * i + 1) for i in range(10)}
        assert len(load(f"{source}:parts").test) == 3
    songs = load(f"{path}:songs")
    assert songs.ragged
    assert sorted(len(s) for s in (*songs.train, *songs.test)) == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    with pytest.raises(DataError, match="dtype <U1"):
        load(f"{path}:text")
    with pytest.raises(DataError, match=r"has no function 'row' to make data. Did you mean 'rows'"):
        load(f"{path}:row")
    with pytest.raises(DataError, match=r"There is no file '.*absent.py'"):
        load(f"{tmp_path}/absent.py:rows")
    with pytest.raises(DataError, match="No module named 'no_such_module'"):
        load("no_such_module:rows")


def _rows(data: Dataset) -> set[tuple[float, ...]]:
    return {tuple(row) for part in (data.train, data.test) for row in part}


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
@pytest.mark.parametrize("as_text", [True, False])
def test_rows_of_a_file_come_back_split(tmp_path: Path, suffix: str, as_text: bool) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3))
    path = tmp_path / f"own{suffix}"
    if suffix == ".npy":
        np.save(path, rows)
    elif suffix == ".npz":
        np.savez(path, x=rows)
    else:
        np.savetxt(path, rows, delimiter=",", fmt="%.17g", header="a,b,c", comments="")
    data = load(str(path) if as_text else path)
    assert (data.name, data.train.shape, data.test.shape) == ("own", (16, 3), (4, 3))
    assert _rows(data) == {tuple(row) for row in rows}


def test_labels_stay_with_their_rows(tmp_path: Path) -> None:
    labels = np.arange(10)
    np.savez(tmp_path / "own.npz", x=np.stack([labels, -labels], axis=1), labels=labels)
    data = load(tmp_path / "own.npz")
    np.testing.assert_array_equal(data.train[:, 0], data.train_labels)
    assert data.test_labels is not None
    np.testing.assert_array_equal(data.test[:, 1], -data.test_labels)


def test_a_split_that_the_file_brings_is_kept(tmp_path: Path) -> None:
    train, test = np.arange(12.0).reshape(4, 3), np.ones((1, 3))
    np.savez(tmp_path / "own.npz", train=train, test=test, test_labels=np.array([7]))
    data = load(tmp_path / "own.npz")
    np.testing.assert_array_equal(data.train, train)
    np.testing.assert_array_equal(data.test, test)
    assert data.train_labels is None and data.test_labels is not None and data.test_labels.tolist() == [7]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'digit'. Did you mean 'digits'.*linear_gaussian.*\.csv"):
        load("digit")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, 2.0], [np.nan, 3.0]]), r"1 values that are not finite.*nan at index \(1, 0\)"),
        (np.array([[1.0], [np.inf]]), "inf at index"),
        (np.arange(5.0), r"shape \(5,\).*reshape to \(rows, 1\)"),
        (np.array(3.0), r"shape \(\)"),
        (np.array([["a"], ["b"]]), "dtype <U1"),
        (np.ones((2, 2), dtype=complex), "dtype complex128"),
        (np.ones((1, 4)), "2 or more rows"),
        (np.ones((4, 0)), "none empty"),
    ],
)
def test_bad_arrays_are_refused_with_what_was_found(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "bad.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,x\n", "Line 3, column 2 of .* is 'x'"),
        ("a,b\n1,2\n3\n", "Line 3 of .* has 1 columns, the first row has 2"),
        ("1,2\n3,nan\n", "not finite"),
        ("", "shape"),
        ("a,b\n", "shape"),
    ],
)
def test_bad_text_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "bad.csv")


def test_files_that_are_no_arrays_of_numbers_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as a NumPy file"):
        load(tmp_path / "objects.npy")
    (tmp_path / "text.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match="cannot be read as a NumPy file"):
        load(tmp_path / "text.npz")
    np.savez(tmp_path / "two.npz", a=np.ones((3, 2)), b=np.ones((3, 2)))
    with pytest.raises(DataError, match="holds the arrays 'a', 'b'"):
        load(tmp_path / "two.npz")
    with pytest.raises(DataError, match="There is no file"):
        load(tmp_path / "absent.npy")


def test_parts_and_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", train=np.ones((3, 2)), test=np.ones((3, 1)))
    with pytest.raises(DataError, match=r"differ in shape: \(2,\) and \(1,\)"):
        load(tmp_path / "own.npz")
    np.savez(tmp_path / "own.npz", x=np.ones((3, 2)), labels=np.arange(2))
    with pytest.raises(DataError, match=r"'labels' in .* shape \(2,\)"):
        load(tmp_path / "own.npz")


def test_missing_entries_are_let_through_where_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,\n2,3\nnan,4\n5,6\n7,8\n")
    with pytest.raises(DataError, match="Line 2, column 2"):
        load(tmp_path / "a.csv")
    found = load(tmp_path / "a.csv", missing=True)
    rows = np.concatenate([found.train, found.test])
    assert np.isnan(rows).sum() == 2 and np.nansum(rows) == 36
    np.save(tmp_path / "b.npy", np.where(np.eye(5, 2), np.inf, 1.0))
    with pytest.raises(DataError, match="2 values that are not finite"):
        load(tmp_path / "b.npy", missing=True)
    np.save(tmp_path / "c.npy", np.where(np.eye(5, 2), np.nan, 1.0))
    with pytest.raises(DataError, match="leave NaN out"):
        load(tmp_path / "c.npy")
    assert np.isnan(load(tmp_path / "c.npy", missing=True).train).any()
