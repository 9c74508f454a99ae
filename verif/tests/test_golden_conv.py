"""golden.conv and golden.linear: the three phases against brute force in fractions, and against PyTorch in float64."""

import numpy as np
import pytest

from golden.conv import (
    conv2d,
    conv2d_input_grad,
    conv2d_input_grad_sums,
    conv2d_output_shape,
    conv2d_sums,
    conv2d_weight_grad,
    conv2d_weight_grad_sums,
)
from golden.exact import exact_dot_scalar, round_sum_scalar
from golden.fgmp import FP8_POLICY, Policy, fgmp
from golden.formats import FP16, encode_scalar
from golden.linear import linear, linear_input_grad, linear_weight_grad

SPECIAL = np.array([0, 0x8000, 0x3C00, 0x7BFF, 0xFBFF, 1, 0x7C00, 0xFC00, 0x7E00], np.uint16)


def normal(rng, shape):
    return rng.normal(size=shape).astype(np.float16)


def any_pattern(rng, shape):
    return rng.integers(0, 1 << 16, shape).astype(np.uint16).view(np.float16)


def special(rng, shape):
    return rng.choice(SPECIAL, shape, p=[0.35, 0.1, 0.2, 0.1, 0.1, 0.1, 0.02, 0.02, 0.01]).view(np.float16)


def products_of(x, w, dy, stride, padding):
    """For each output, input and weight: the pairs (streamed, dense) of patterns whose products it is the sum of."""
    forward, backward, weights = {}, {}, {}
    for n, o, i, j in np.ndindex(dy.shape):
        for c, r, s in np.ndindex(w.shape[1:]):
            h, v = i * stride[0] - padding[0] + r, j * stride[1] - padding[1] + s
            if 0 <= h < x.shape[2] and 0 <= v < x.shape[3]:
                xp, wp, dp = x[n, c, h, v], w[o, c, r, s], dy[n, o, i, j]
                forward.setdefault((n, o, i, j), []).append((xp, wp))
                backward.setdefault((n, c, h, v), []).append((dp, wp))
                weights.setdefault((o, c, r, s), []).append((xp, dp))
    return forward, backward, weights


def rounded(pairs):
    total, *flags = exact_dot_scalar([a for a, _ in pairs], [b for _, b in pairs])
    return encode_scalar(FP16, round_sum_scalar(total, tuple(flags)))


@pytest.mark.parametrize("data", [normal, any_pattern, special])
@pytest.mark.parametrize("seed", range(12))
def test_phases_against_brute_force(data, seed):
    rng = np.random.default_rng(seed)
    n, c, o = (int(one) for one in rng.integers(1, 4, 3))
    h, v = (int(one) for one in rng.integers(3, 7, 2))
    kernel = tuple(int(one) for one in rng.integers(1, 4, 2))
    stride, padding = (tuple(int(one) for one in rng.integers(low, 4 if low else 3, 2)) for low in (1, 0))
    x, w = data(rng, (n, c, h, v)), data(rng, (o, c, *kernel))
    dy = data(rng, conv2d_output_shape(x.shape, w.shape, stride, padding))
    at = {"stride": stride, "padding": padding}
    results = (
        conv2d(x, w, **at),
        conv2d_input_grad(dy, w, input_shape=x.shape, **at),
        conv2d_weight_grad(x, dy, kernel_shape=kernel, **at),
    )
    expected = products_of(fgmp(x).bits, fgmp(w).bits, fgmp(dy).bits, stride, padding)
    for result, pairs in zip(results, expected, strict=True):
        patterns = result.view(np.uint16)
        for index in np.ndindex(result.shape):
            assert patterns[index] == rounded(pairs.get(index, []))


@pytest.mark.parametrize(
    ("stride", "padding", "kernel"), [(1, 1, (3, 3)), (2, 3, (7, 7)), ((2, 1), (0, 2), (1, 5)), (3, 0, (2, 2))]
)
def test_phases_against_torch(stride, padding, kernel):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    x, w = normal(rng, (3, 8, 17, 12)), normal(rng, (9, 8, *kernel))
    at = {"stride": stride, "padding": padding}
    y = conv2d(x, w, out="fp32", **at)
    dy = normal(rng, y.shape)
    tx, tw = (torch.tensor(one.astype(np.float64), requires_grad=True) for one in (x, w))
    ty = torch.nn.functional.conv2d(tx, tw, **at)
    ty.backward(torch.tensor(dy.astype(np.float64)))
    # FP16 data of these sizes have sums that float64 holds exactly.
    assert np.array_equal(y, ty.detach().numpy().astype(np.float32))
    assert np.array_equal(conv2d(x, w, **at), ty.detach().numpy().astype(np.float16))
    dx = conv2d_input_grad(dy, w, input_shape=x.shape, out="fp32", **at)
    assert np.array_equal(dx, tx.grad.numpy().astype(np.float32))
    dw = conv2d_weight_grad(x, dy, kernel_shape=kernel, out="fp32", **at)
    assert np.array_equal(dw, tw.grad.numpy().astype(np.float32))


@pytest.mark.parametrize("stride", [1, 2])
def test_mask_against_torch(stride):
    """The error of a ReLU's input, by automatic differentiation."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(13)
    z, w = normal(rng, (2, 8, 9, 7)), normal(rng, (5, 8, 3, 3))
    tz, tw = (torch.tensor(one.astype(np.float64), requires_grad=True) for one in (z, w))
    ty = torch.nn.functional.conv2d(tz.relu(), tw, stride=stride, padding=1)
    dy = normal(rng, tuple(ty.shape))
    ty.backward(torch.tensor(dy.astype(np.float64)))
    at = {"input_shape": z.shape, "stride": stride, "padding": 1, "out": "fp32"}
    assert np.array_equal(conv2d_input_grad(dy, w, mask=z, **at), tz.grad.numpy().astype(np.float32))


def test_mask_of_special_values():
    """A masked gradient is +0 whatever it would be; NaN masks, infinity does not, -0 does not come out."""
    mask = np.array([[1, 0, -0.0, -1, np.nan, np.inf, -np.inf, 6e-8, 1e-9]], np.float32).T
    for dy, w, expected in ((np.inf, 1.0, np.inf), (np.nan, 1.0, np.nan), (-6e-8, 1e-3, 0.0), (2.0, 3.0, 6.0)):
        result = linear_input_grad(np.full((9, 1), dy, np.float32), np.full((1, 1), w, np.float32), mask=mask)
        np.testing.assert_array_equal(result[:, 0], np.array([1, 0, 0, 0, 0, 1, 0, 1, 0], bool).choose([0, expected]))
        assert not np.signbit(result[~np.isnan(result)]).any()


def test_large_images_are_cut_into_chunks(monkeypatch):
    from golden import conv

    rng = np.random.default_rng(6)
    x, w = normal(rng, (3, 5, 11, 9)), normal(rng, (4, 5, 3, 3))
    x[0, 0, 0, 0] = np.inf
    dy = normal(rng, (3, 4, 11, 9))

    def phases():
        return [
            conv2d_sums(fgmp(x), fgmp(w), padding=1),
            conv2d_input_grad_sums(fgmp(dy), fgmp(w), input_shape=x.shape, padding=1),
            conv2d_weight_grad_sums(fgmp(x), fgmp(dy), kernel_shape=(3, 3), padding=1),
        ]

    whole = phases()
    for chunk, terms in ((1, 1 << 16), (9 * 45 * 4, 1 << 16), (9 * 45 * 11, 20), (1 << 20, 7)):
        monkeypatch.setattr(conv, "_CHUNK", chunk)
        monkeypatch.setattr(conv, "_CHUNK_WG", chunk)
        monkeypatch.setattr(conv, "_MAX_TERMS", terms)
        for one, other in zip(phases(), whole, strict=True):
            assert np.array_equal(one.to_ints(), other.to_ints())
            for name in ("nan", "pinf", "ninf"):
                assert np.array_equal(getattr(one, name), getattr(other, name))


def test_result_does_not_depend_on_order():
    rng = np.random.default_rng(7)
    x, w = normal(rng, (2, 32, 6, 6)), normal(rng, (8, 32, 3, 3))
    order = rng.permutation(32)
    assert np.array_equal(conv2d(x, w, out="fp32"), conv2d(x[:, order], w[:, order], out="fp32"))


def test_formats_and_scales():
    rng = np.random.default_rng(8)
    x, w = (rng.normal(size=(2, 3, 5, 5)) * 1e-3).astype(np.float32), normal(rng, (4, 3, 3, 3))
    small = Policy.between(0.0625, 448.0, scale=-10, below="zero")
    xq, wq = fgmp(x, small), fgmp(w, FP8_POLICY)
    expected = conv2d(xq.values().astype(np.float32), wq.values(), out="fp32")
    assert np.array_equal(conv2d(x, w, x_format=small, w_format="fp8", out="fp32"), expected)
    assert np.array_equal(conv2d(xq, wq, out="fp32"), expected)
    scaled = conv2d(x, w, x_format=small, w_format="fp8", out="fp32", out_scale=-9)
    assert np.array_equal(scaled, expected * np.float32(512))
    half = conv2d(x, w, x_format=small, w_format="fp8", out_scale=-9)
    assert half.dtype == np.float16
    assert np.array_equal(half, scaled.astype(np.float16))
    dy = fgmp(rng.normal(size=half.shape).astype(np.float32) * np.float32(1e-6), Policy(scale=-20))
    dx = conv2d_input_grad(dy, wq, input_shape=x.shape, out="fp32")
    assert np.array_equal(
        dx, conv2d_input_grad(dy.values() * 2**20, wq.values(), input_shape=x.shape, out="fp32") / 2**20
    )
    dw = conv2d_weight_grad(xq, dy, kernel_shape=(3, 3), out="fp32")
    plain = conv2d_weight_grad(xq.values() * 2**10, dy.values() * 2**20, kernel_shape=(3, 3), out="fp32")
    assert np.array_equal(dw, plain / np.float32(2**30))


def test_overflow():
    x = np.full((1, 4, 1, 1), 60000, np.float16)
    w = np.array([2, -2], np.float16).reshape(2, 1, 1, 1).repeat(4, 1)
    assert conv2d(x, w).ravel().tolist() == [np.inf, -np.inf]
    assert conv2d(x, w, saturate=True).ravel().tolist() == [65504, -65504]
    assert conv2d(x, w, out_scale=4).ravel().tolist() == [30000, -30000]


def test_padding_contributes_nothing():
    x, w = np.ones((1, 1, 2, 2), np.float16), np.full((1, 1, 3, 3), np.inf, np.float16)
    w[0, 0, 1, 1] = 1
    x[:] = 0
    x[0, 0, 0, 0] = 1
    y = conv2d(x, w, padding=1)
    assert y[0, 0, 0, 0] == 1.0  # the other taps of this pixel meet padding and zeros
    assert y[0, 0, 1, 1] == np.inf


@pytest.mark.parametrize("data", [normal, any_pattern, special])
def test_linear_against_brute_force(data):
    rng = np.random.default_rng(9)
    for _ in range(6):
        n, c, o = (int(one) for one in rng.integers(1, 9, 3))
        x, w, dy = data(rng, (n, c)), data(rng, (o, c)), data(rng, (n, o))
        xb, wb, db = (fgmp(one).bits for one in (x, w, dy))
        y, dx, dw = (one.view(np.uint16) for one in (linear(x, w), linear_input_grad(dy, w), linear_weight_grad(x, dy)))
        assert y.shape == (n, o)
        assert dx.shape == (n, c)
        assert dw.shape == (o, c)
        for i, j in np.ndindex(n, o):
            assert y[i, j] == rounded(list(zip(xb[i], wb[j], strict=True)))
        for i, k in np.ndindex(n, c):
            assert dx[i, k] == rounded(list(zip(db[i], wb[:, k], strict=True)))
        for j, k in np.ndindex(o, c):
            assert dw[j, k] == rounded(list(zip(xb[:, k], db[:, j], strict=True)))


def test_linear_is_a_convolution():
    rng = np.random.default_rng(10)
    x, w, dy = normal(rng, (6, 40)), normal(rng, (10, 40)), normal(rng, (6, 10))
    as_image = tuple(one[:, :, None, None] for one in (x, w, dy))
    at = {"out": "fp32", "out_scale": 2}
    assert np.array_equal(linear(x, w, **at), conv2d(as_image[0], as_image[1], **at)[:, :, 0, 0])
    dx = conv2d_input_grad(as_image[2], as_image[1], input_shape=(6, 40, 1, 1), **at)
    assert np.array_equal(linear_input_grad(dy, w, **at), dx[:, :, 0, 0])
    dw = conv2d_weight_grad(as_image[0], as_image[2], kernel_shape=(1, 1), **at)
    assert np.array_equal(linear_weight_grad(x, dy, **at), dw[:, :, 0, 0])


X, W, DY = np.zeros((1, 2, 4, 4), np.float16), np.zeros((3, 2, 3, 3), np.float16), np.zeros((1, 3, 2, 2), np.float16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: conv2d(X, W[:, :1]),
        lambda: conv2d(X[0], W),
        lambda: conv2d(X, W[0]),
        lambda: conv2d(X[:, :, :2], W),
        lambda: conv2d(X, W, stride=0),
        lambda: conv2d(X, W, stride=(1, 1, 1)),
        lambda: conv2d(X, W, stride=1.5),
        lambda: conv2d(X, W, padding=-1),
        lambda: conv2d(X[:0], W),
        lambda: conv2d(X, W, x_format="fp4"),
        lambda: conv2d(X, W, out="fp8"),
        lambda: conv2d_input_grad(DY, W, input_shape=(1, 2, 5, 4)),
        lambda: conv2d_input_grad(DY, W, input_shape=(2, 4, 4)),
        lambda: conv2d_input_grad(DY, W, input_shape=X.shape, mask=X[:, :, :, :2]),
        lambda: conv2d_weight_grad(X, DY, kernel_shape=(2, 3)),
        lambda: conv2d_weight_grad(X, DY, kernel_shape=3, stride=2),
        lambda: linear(X, W),
        lambda: linear(X[0, 0], W[0, 0]),
        lambda: linear_input_grad(X[0, 0], W[0, 0]),
        lambda: linear_weight_grad(X[0, 0], W[0, 0]),
    ],
)
def test_wrong_values(make):
    with pytest.raises(ValueError, match=r"not "):
        make()


@pytest.mark.parametrize("make", [lambda: conv2d(X.astype(np.float64), W), lambda: linear(X[0, 0], [[1, 2, 3, 4]])])
def test_wrong_types(make):
    with pytest.raises(TypeError, match=r"not dtype"):
        make()
