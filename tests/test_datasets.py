"""Data sets: what they hold, that a seed fixes the split, and what bad files are told."""

from pathlib import Path

import numpy as np
import pytest

from ppl_lvm.datasets import Dataset, datasets, load
from ppl_lvm.errors import DataError


@pytest.mark.parametrize("name", datasets())
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
