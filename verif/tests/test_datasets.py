"""Data sets: digits, CIFAR-10's formats, .npz, sizes, errors."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from lnpu.datasets import load_images, normalise


def cifar(seed: int, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, count)


class OldPickler(pickle.Pickler):
    """Writes arrays the way of the original files, which NumPy 2.4 warns about."""

    def reducer_override(self, obj):
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def batch(images, labels) -> bytes:
    content = {b"data": images.reshape(len(images), -1), b"labels": labels.tolist(), b"batch_label": b"a batch"}
    file = io.BytesIO()
    OldPickler(file, protocol=2).dump(content)
    return file.getvalue()


def records(images, labels) -> bytes:
    return np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1).tobytes()


def ordered(images, labels):
    """Images and labels in an order that does not depend on the one they came in."""
    order = np.lexsort(images.reshape(len(images), -1).T)
    return images[order], labels[order]


def assert_same(actual, images, labels):
    got, got_labels, classes = actual
    assert classes == 10
    assert got.dtype == np.uint8 and got_labels.dtype == np.int64
    for a, b in zip(ordered(got, got_labels), ordered(images, labels), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def five():
    return [cifar(seed) for seed in range(5)]


def joined(batches):
    return np.concatenate([images for images, _ in batches]), np.concatenate([labels for _, labels in batches])


def test_digits():
    images, labels, classes = load_images()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == np.uint8
    assert labels.shape == (1797,) and labels.dtype == np.int64 and set(labels) == set(range(10)) and classes == 10
    assert images.min() == 0 and images.max() == 255
    assert set(np.unique(images)) == {(v * 255 + 8) // 16 for v in range(17)}


def test_digits_are_enlarged_and_reduced_exactly():
    small = load_images(count=10)[0]
    large = load_images(count=10, image=32)[0]
    np.testing.assert_array_equal(large, small.repeat(4, axis=2).repeat(4, axis=3))
    half = load_images(count=10, image=4)[0]
    mean = small.reshape(10, 1, 4, 2, 4, 2).mean(axis=(3, 5))
    np.testing.assert_array_equal(half, np.floor(mean + 0.5))
    assert load_images(count=10, image=12)[0].shape == (10, 1, 12, 12)


def test_seed_and_count():
    first, second, other = (load_images(count=20, seed=seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    assert_same(load_images(seed=1), *load_images(seed=2)[:2])


@pytest.mark.parametrize("nested", [False, True])
def test_cifar_directory(tmp_path, five, nested):
    folder = tmp_path / "cifar-10-batches-py" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    for i, (images, labels) in enumerate(five):
        (folder / f"data_batch_{i + 1}").write_bytes(batch(images, labels))
    (folder / "test_batch").write_bytes(batch(*cifar(9)))
    assert_same(load_images(tmp_path, image=32), *joined(five))
    assert_same(load_images(folder / "test_batch", image=32), *cifar(9))


@pytest.mark.parametrize("encode, suffix", [(batch, ""), (records, ".bin")])
def test_cifar_archive(tmp_path, five, encode, suffix):
    path = tmp_path / "cifar-10.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for i, (images, labels) in enumerate(five):
            raw = encode(images, labels)
            info = tarfile.TarInfo(f"cifar-10-batches/data_batch_{i + 1}{suffix}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    assert_same(load_images(path, image=32), *joined(five))


def test_cifar_binary(tmp_path, five):
    for i, (images, labels) in enumerate(five):
        (tmp_path / f"data_batch_{i + 1}.bin").write_bytes(records(images, labels))
    (tmp_path / "test_batch.bin").write_bytes(records(*cifar(9)))
    assert_same(load_images(tmp_path, image=32), *joined(five))
    assert_same(load_images(tmp_path / "data_batch_2.bin", image=32), *five[1])
    assert load_images(tmp_path, image=8)[0].shape == (20, 3, 8, 8)


@pytest.mark.parametrize("prefix", ["", "train_"])
def test_npz(tmp_path, prefix):
    images, labels = cifar(1, 30)
    labels[0] = 9
    path = tmp_path / "data.npz"
    np.savez(path, **{f"{prefix}images": images, f"{prefix}labels": labels, "test_images": images[:1]})
    assert_same(load_images(path, image=32), images, labels)


@pytest.mark.parametrize("arrays, message", [
    ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, "labels or train_labels, not images"),
    ({"labels": np.zeros(2, int)}, "images or train_images"),
    ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(2, int)}, r"uint8 \(N, C, S, S\), not uint8 \(2, 8"),
    ({"images": np.zeros((2, 3, 8, 8)), "labels": np.zeros(2, int)}, "not float64"),
    ({"images": np.zeros((2, 3, 8, 8), np.uint8), "labels": np.zeros(3, int)}, "each of 2 images"),
    ({"images": np.zeros((2, 3, 8, 8), np.uint8), "labels": np.zeros(2)}, "integers, not float64"),
    ({"images": np.zeros((2, 3, 8, 8), np.uint8), "labels": np.array([0, -1])}, "0 or more"),
])  # fmt: skip
def test_bad_npz(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(path)
    assert "bad.npz" in str(caught.value)


@pytest.mark.parametrize("name, raw, message", [
    ("x.bin", b"123", "records of 3073 bytes"),
    ("x.bin", bytes([10]) + bytes(3072), "0 to 9, not 10"),
    ("data_batch_1", b"garbage", "not a batch of CIFAR-10"),
    ("data_batch_1", pickle.dumps(np.random.default_rng(0)), "not a batch of CIFAR-10"),
    ("data_batch_1", pickle.dumps({b"data": np.zeros((1, 5), np.uint8), b"labels": [0]}), r"\(N, 3072\)"),
    ("x.npz", b"garbage", "cannot read"),
    ("x.tar.gz", b"garbage", "cannot read"),
    ("x.png", b"", "CIFAR-10 binary files"),
])  # fmt: skip
def test_bad_files(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path / name)
    assert name in str(caught.value)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither"):
        load_images(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(batch(*cifar(0)))
    with pytest.raises(ValueError, match="no data_batch_2"):
        load_images(tmp_path)


@pytest.mark.parametrize("options", [{"image": 0}, {"image": "8"}, {"count": 0}, {"count": 1798}])
def test_bad_arguments(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        load_images(**options)


def test_normalise():
    images, _ = cifar(3, 50)
    images[:, 2] = 7
    result = normalise(images)
    assert result.dtype == np.float32 and result.shape == images.shape
    np.testing.assert_allclose(result[:, :2].mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(result[:, :2].std(axis=(0, 2, 3)), 1, atol=1e-5)
    assert not result[:, 2].any()
    with pytest.raises(ValueError, match="shape"):
        normalise(images[0])
