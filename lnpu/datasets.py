"""Images to train on: scikit-learn's digits, CIFAR-10's own files, or an .npz."""

import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["load_images", "normalise", "resize"]

_CIFAR_CLASSES = 10
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR_RECORD = 1 + 3 * 32 * 32
_ALLOWED = (
    "a directory or .tar.gz with CIFAR-10's data_batch_1 ... data_batch_5, CIFAR-10 binary files (*.bin), "
    "or an .npz with images (or train_images), uint8 NCHW, and labels (or train_labels)"
)

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def load_images(
    source: str | Path | None = None, *, image: int = 8, count: int | None = None, seed: int = 0
) -> tuple[Images, Labels, int]:
    """Labelled images of one size.

    Parameters
    ----------
    source : path or None
        None: scikit-learn's 1,797 handwritten digits (8 x 8, one channel, 0 to 16 scaled to 0 to 255). Else CIFAR-10
        as its authors distribute it (the directory or .tar.gz of the Python version, or a `*.bin` file or a directory
        of them), or an .npz with `images` or `train_images` (uint8, NCHW) and `labels` or `train_labels`. Only
        training batches are read, unless a test file is named.
    image : int
        Height and width of the images returned. Sources of an integer multiple of it are reduced by averaging areas
        (rounded half up), sources that divide it are enlarged by repeating pixels, all others take the nearest pixel.
    count : int or None
        How many images (default: all), drawn without repetition.
    seed : int
        Seed of the order of the images.

    Returns
    -------
    images : numpy.ndarray
        uint8, (count, channels, image, image).
    labels : numpy.ndarray
        int64, (count,).
    classes : int
        Number of classes: 10 for digits and CIFAR-10, else the highest label plus 1.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If its contents are not what this reads, or `image` or `count` make no sense for it.
    """
    if isinstance(image, bool) or not isinstance(image, int) or not 1 <= image <= 1024:
        raise ValueError(f"image must be 1 to 1024, not {image!r}")
    images, labels, classes = _digits() if source is None else _read(Path(source))
    if count is not None and not 1 <= count <= len(images):
        raise ValueError(f"count must be 1 to {len(images)} (the images in {source or 'the digits'}), not {count!r}")
    order = np.random.default_rng(seed).permutation(len(images))[:count]
    return resize(images[order], image), labels[order], classes


def resize(images: Images, size: int) -> Images:
    """Square images (uint8, NCHW) with height and width `size`: how, see `load_images`."""
    n, channels, old, _ = images.shape
    if old % size == 0:
        factor = old // size
        areas = images.reshape(n, channels, size, factor, size, factor).sum(axis=(3, 5), dtype=np.int64)
        return ((2 * areas + factor * factor) // (2 * factor * factor)).astype(np.uint8)
    # Nearest: the source pixel in which the centre of the new pixel lies; repeats pixels where `old` divides `size`.
    index = (2 * np.arange(size) + 1) * old // (2 * size)
    return np.ascontiguousarray(images[:, :, index[:, None], index])


def normalise(images: Images) -> npt.NDArray[np.float32]:
    """Images with mean 0 and standard deviation 1 in each channel.

    The mean and the (population) standard deviation are those of all pixels of the channel in `images`, computed in
    float64: normalise a data set once, then cut it into batches. A channel of one value becomes zeros.

    Parameters
    ----------
    images : numpy.ndarray
        uint8, NCHW.

    Returns
    -------
    numpy.ndarray
        float32, NCHW.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have the shape (N, C, H, W), not {images.shape}")
    values = images.astype(np.float64)
    mean = values.mean(axis=(0, 2, 3), keepdims=True)
    deviation = values.std(axis=(0, 2, 3), keepdims=True)
    return ((values - mean) / np.where(deviation == 0, 1, deviation)).astype(np.float32)


def _digits() -> tuple[Images, Labels, int]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    values = digits.images.astype(np.int64)[:, None]
    return ((values * 255 + 8) // 16).astype(np.uint8), digits.target.astype(np.int64), 10


def _read(path: Path) -> tuple[Images, Labels, int]:
    if not path.exists():
        raise FileNotFoundError(f"data not found: {path} (allowed: {_ALLOWED})")
    if path.is_dir():
        return _read_directory(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".bin":
        return _read_binary([path])
    if path.name.endswith((".tar.gz", ".tgz")):
        return _read_archive(path)
    if path.name in (*_CIFAR_BATCHES, "test_batch"):
        with path.open("rb") as file:
            return _join([_unpickle(file, str(path))])
    raise ValueError(f"cannot read {path}: data must be {_ALLOWED}")


def _read_directory(path: Path) -> tuple[Images, Labels, int]:
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if (folder / _CIFAR_BATCHES[0]).exists():
            batches = []
            for name in _CIFAR_BATCHES:
                if not (folder / name).exists():
                    raise ValueError(f"{folder} has no {name}: {_ALLOWED}")
                with (folder / name).open("rb") as file:
                    batches.append(_unpickle(file, str(folder / name)))
            return _join(batches)
        if files := sorted(item for item in folder.glob("*.bin") if item.name != "test_batch.bin"):
            return _read_binary(files)
    raise ValueError(f"{path} has neither data_batch_1 nor *.bin: data must be {_ALLOWED}")


def _read_archive(path: Path) -> tuple[Images, Labels, int]:
    found: dict[str, tuple[Images, Labels]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None and name in _CIFAR_BATCHES:
                    found[name] = _unpickle(file, f"{path}:{member.name}")
                elif file is not None and name in {f"{batch}.bin" for batch in _CIFAR_BATCHES}:
                    found[name] = _binary(file.read(), f"{path}:{member.name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if len(found) != len(_CIFAR_BATCHES):
        raise ValueError(f"{path} has {len(found)} of the 5 batches data_batch_1 to 5: data must be {_ALLOWED}")
    return _join([found[name] for name in sorted(found)])


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, bytes, lists and arrays, which is all that CIFAR-10's batches hold; a file can run no code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _unpickle(file: Any, name: str) -> tuple[Images, Labels]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy complains about the types in the original files, of 2009
            content = _PlainUnpickler(file, encoding="bytes").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images, labels = np.asarray(content["data"]), np.asarray(content["labels"], dtype=np.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{name} is not a batch of CIFAR-10: {error!r}") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _CIFAR_RECORD - 1:
        raise ValueError(f"data in {name} must be uint8 (N, 3072), not {images.dtype} {images.shape}")
    return _checked(images.reshape(-1, *_CIFAR_SHAPE), labels, name, _CIFAR_CLASSES)


def _read_binary(paths: list[Path]) -> tuple[Images, Labels, int]:
    return _join([_binary(path.read_bytes(), str(path)) for path in paths])


def _binary(raw: bytes, name: str) -> tuple[Images, Labels]:
    if not raw or len(raw) % _CIFAR_RECORD:
        raise ValueError(f"{name} must be records of {_CIFAR_RECORD} bytes (CIFAR-10 binary), not {len(raw)} bytes")
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
    images = records[:, 1:].reshape(-1, *_CIFAR_SHAPE)
    return _checked(images, records[:, 0].astype(np.int64), name, _CIFAR_CLASSES)


def _read_npz(path: Path) -> tuple[Images, Labels, int]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"cannot read {path}: it is not an .npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {}
            for kind in ("images", "labels"):
                key = next((key for key in (kind, f"train_{kind}") if key in archive.files), None)
                if key is None:
                    present = ", ".join(archive.files) or "nothing"
                    raise ValueError(f"{path} must hold {kind} or train_{kind}, not {present}")
                arrays[kind] = archive[key]
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or images.shape[2] != images.shape[3]:
        raise ValueError(f"images in {path} must be uint8 (N, C, S, S), not {images.dtype} {images.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels in {path} must be integers, not {labels.dtype}")
    checked = _checked(images, labels.astype(np.int64), str(path), None)
    return *checked, int(checked[1].max()) + 1


def _checked(images: Images, labels: Labels, name: str, classes: int | None) -> tuple[Images, Labels]:
    if labels.shape != (len(images),):
        raise ValueError(f"labels in {name} must be one for each of {len(images)} images, not {labels.shape}")
    if labels.size and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise ValueError(f"labels in {name} must be {allowed}, not {labels.min()} to {labels.max()}")
    return images, labels


def _join(batches: list[tuple[Images, Labels]]) -> tuple[Images, Labels, int]:
    images = np.concatenate([images for images, _ in batches])
    return images, np.concatenate([labels for _, labels in batches]), _CIFAR_CLASSES
