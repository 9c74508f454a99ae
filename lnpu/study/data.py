"""The images of the study: training and test set, and how the training set is augmented."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lnpu.datasets import load_images, normalise, resize

__all__ = ["Batches", "StudyData", "load_data"]

_HELD_OUT = 6
"""One image in so many is for testing where the source has no test set."""


@dataclass(frozen=True, eq=False)
class StudyData:
    """Images and labels.

    Attributes
    ----------
    train, test : float32 array [N, H, W, C]
        Normalised by the training set's mean and deviation of each channel.
    train_labels, test_labels : int64 array [N]
    classes : int
    digest : str
        Of all of these: tells data sets apart.
    """

    train: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test: NDArray[np.float32]
    test_labels: NDArray[np.int64]
    classes: int
    digest: str


def load_data(source: str | Path | None = None, *, image: int = 16) -> StudyData:
    """Training and test set.

    Parameters
    ----------
    source : path or None
        As of `lnpu.datasets.load_images`. An .npz may hold `test_images` and `test_labels`, a folder `test_batch` or
        `test_batch.bin`; of other sources every sixth image is held out for testing.
    image : int
        Height and width.

    Raises
    ------
    FileNotFoundError, ValueError
        As of `load_images`.
    """
    images, labels, classes = load_images(source, image=image)
    test = _test_set(Path(source), image) if source is not None else None
    if test is None:
        held_out = np.arange(len(images)) % _HELD_OUT == 0
        test = images[held_out], labels[held_out]
        images, labels = images[~held_out], labels[~held_out]
    digest = hashlib.sha256()
    for array in (images, labels, *test):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    values = images.astype(np.float64)
    mean, deviation = values.mean(axis=(0, 2, 3), keepdims=True), values.std(axis=(0, 2, 3), keepdims=True)
    test_values = (test[0] - mean) / np.where(deviation == 0, 1, deviation)
    last = (0, 2, 3, 1)
    return StudyData(
        np.ascontiguousarray(normalise(images).transpose(last)),
        labels,
        np.ascontiguousarray(test_values.astype(np.float32).transpose(last)),
        test[1],
        classes,
        digest.hexdigest()[:16],
    )


def _test_set(path: Path, image: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            if not {"test_images", "test_labels"} <= set(archive.files):
                return None
            return resize(archive["test_images"], image), archive["test_labels"].astype(np.int64)
    if path.is_dir():
        for name in ("test_batch", "test_batch.bin"):
            for found in (path / name, *sorted(path.glob(f"cifar-10-batches-*/{name}"))):
                if found.exists():
                    return load_images(found, image=image)[:2]
    return None


class Batches:
    """Iterates over (images float32 [batch, H, W, C], indices [batch]); a last batch that is not full is left out.

    Parameters
    ----------
    images : float32 array [N, H, W, C]
    batch : int
    seed : tuple of int
        Of order, crops and flips.
    padding : int
        Pixels of zeros around an image, from which a crop of its size is taken.
    flip : bool
        Half of the images are mirrored.
    """

    def __init__(
        self, images: NDArray[np.float32], batch: int, seed: tuple[int, ...], *, padding: int, flip: bool
    ) -> None:
        count = len(images)
        if not 1 <= batch <= count:
            raise ValueError(f"batch must be 1 to {count}, the number of images, not {batch!r}")
        rng = np.random.default_rng(seed)
        self._order = rng.permutation(count)
        self._places = rng.integers(0, 2 * padding + 1, (count, 2))
        self._flipped = (rng.random(count) < 0.5) & flip
        sides = (0, 0), (padding, padding), (padding, padding), (0, 0)
        self._padded, self._size, self._batch = np.pad(images, sides), images.shape[1:3], batch

    def __len__(self) -> int:
        return len(self._order) // self._batch

    def __iter__(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        height, width = self._size
        for number in range(len(self)):
            chosen = self._order[number * self._batch : (number + 1) * self._batch]
            rows = self._places[chosen, :1] + np.arange(height)
            columns = np.arange(width)[None].repeat(len(chosen), 0)
            columns[self._flipped[chosen]] = columns[0, ::-1]
            columns = columns + self._places[chosen, 1:]
            yield self._padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]], chosen
