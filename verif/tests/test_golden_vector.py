"""golden.vector: FP32 operations against fractions; the training formulas step by step and against PyTorch."""

from fractions import Fraction
from math import inf, isqrt

import numpy as np
import pytest

from golden import vector
from golden.exact import round_sum
from golden.fgmp import Policy, fgmp
from golden.formats import FP32, encode_scalar, round_scalar
from golden.vector import (
    batch_norm_apply,
    batch_norm_backward,
    batch_norm_coefficients,
    batch_norm_statistics,
    global_average_pool,
    global_average_pool_backward,
    loss_and_gradient,
    max_pool,
    max_pool_backward,
    relu,
    relu_backward,
    running_statistics,
    sgd_step,
    sum_products,
    vector_op,
)

f32 = np.float32
SPECIAL = np.array(
    [
        *(0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000),
        *(0x7FC00000, 0xFFC00001, 0x7F800001, 0x3F800000, 0xBF800000, 0x3F7FFFFF, 0x3F800001),
    ],
    np.uint32,
)


def operands(count, seed):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 1 << 32, (3, count)).astype(np.uint32)
    near = rng.normal(size=(3, count)).astype(f32).view(np.uint32)
    pairs = np.stack(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, -1)
    some = np.concatenate([pairs, rng.choice(SPECIAL, (1, pairs.shape[1]))])
    return np.concatenate([raw, near, some], axis=1).view(f32)


def bits(x):
    return np.asarray(x, f32).view(np.uint32)


def exact_result(name, a, b):
    """One operation on finite floats, in fractions, rounded by the scalar reference; None: no finite result."""
    a, b = Fraction(a), Fraction(b)
    if name == "DIV" and b == 0:
        return None
    if name == "SQRT":
        if a < 0:
            return None
        scaled = a * Fraction(4) ** 200
        root = isqrt(int(scaled))
        value = Fraction(2 * root + (root * root != scaled), 2 * 2**200)  # a half beyond stands for an inexact root
    else:
        value = {"ADD": a + b, "SUB": a - b, "MUL": a * b, "DIV": a / b if b else 0}[name]
    if value == 0:
        return None
    return encode_scalar(FP32, round_scalar(FP32, value))


@pytest.mark.parametrize("name", ["ADD", "SUB", "MUL", "DIV", "SQRT"])
def test_arithmetic_is_rounded_once(name):
    a, b, _ = operands(250, 1)
    results = bits(vector_op(name, a, b))
    checked = 0
    for index in range(len(a)):
        if np.isfinite(a[index]) and np.isfinite(b[index]):
            expected = exact_result(name, float(a[index]), float(b[index]))
            if expected is not None:
                assert results[index] == expected
                checked += 1
    assert checked > 300


def test_subnormals_are_kept():
    tiny = np.array([1, 0x80000003], np.uint32).view(f32)
    assert bits(vector_op("ADD", tiny, tiny)).tolist() == [2, 0x80000006]
    assert bits(vector_op("MUL", tiny, f32(0.5))).tolist() == [0, 0x80000002]
    assert bits(vector_op("MUL", tiny, f32(-0.25))).tolist() == [0x80000000, 1]
    assert bits(vector_op("SQRT", tiny[:1])).tolist() == bits(f32(2.0**-74.5)).reshape(1).tolist()


@pytest.mark.parametrize("name", ["ADD", "SUB", "MUL", "DIV", "SQRT", "MULADD", "MAX", "MIN"])
def test_nans_are_canonical(name):
    a, b, c = operands(500, 2)
    result = vector_op(name, a, b, c)
    nans = np.isnan(result)
    assert nans.any()
    assert (bits(result)[nans] == 0x7FC00000).all()


def test_muladd_rounds_twice():
    a, b, c = operands(500, 3)
    assert np.array_equal(bits(vector_op("MULADD", a, b, c)), bits(vector_op("ADD", vector_op("MUL", a, b), c)))
    x = f32(1 + 2.0**-12)
    assert vector_op("MULADD", x, x, f32(-1 - 2.0**-11)) == 0  # fused it would be 2^-24


def test_rectify():
    """The flag of a command: what has a sign becomes +0, but a NaN stays as it is; elsewhere as MAX with 0."""
    x = np.array([0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC01234, 0x3F800000], np.uint32)
    expected = [0, 0, 1, 0, 0x7F800000, 0, 0x7FC00000, 0xFFC01234, 0x3F800000]
    assert bits(vector_op("COPY", x.view(f32), rectify=True)).tolist() == expected
    a, b = np.random.default_rng(6).normal(size=(2, 100)).astype(f32)
    assert np.array_equal(bits(vector_op("ADD", a, b, rectify=True)), bits(vector_op("MAX", a + b, f32(0))))


def test_selections():
    a, b, c = operands(500, 4)
    for index in range(len(a)):
        x, y, z = a[index], b[index], c[index]
        one = slice(index, index + 1)
        either = np.isnan(x) or np.isnan(y)
        expected = {
            "COPY": x,
            "MAX": f32(np.nan) if either else x if x > y else y,
            "MIN": f32(np.nan) if either else x if x < y else y,
            "KEEP_POSITIVE": x if y > 0 else f32(0),
            "KEEP_EQUAL": x if y == z else f32(0),
            "GREATER_EQUAL": f32(1) if x >= y else f32(0),
        }
        for name, value in expected.items():
            assert bits(vector_op(name, a[one], b[one], c[one]))[0] == bits(value)


def test_signed_zeros_of_selections():
    plus, minus = f32(0.0), f32(-0.0)
    assert bits(vector_op("MAX", plus, minus)) == 0x80000000
    assert bits(vector_op("MAX", minus, plus)) == 0
    assert bits(relu(minus)) == 0
    assert bits(vector_op("KEEP_POSITIVE", minus, f32(1))) == 0x80000000
    assert bits(vector_op("KEEP_EQUAL", f32(3), plus, minus)) == bits(f32(3))
    assert vector_op("GREATER_EQUAL", minus, plus) == 1


def test_sum_products():
    rng = np.random.default_rng(5)
    a, b = (rng.normal(size=(2, 50, 3)) * 100).astype(f32)
    sums = sum_products(a, b, a_shift=3, b_shift=-2, axis=0)
    expected = sum(
        Fraction(float(x)) * Fraction(float(y))
        for x, y in zip(np.float16(a[:, 1] / f32(8)), np.float16(b[:, 1] * f32(4)), strict=True)
    )
    assert Fraction(sums.to_ints()[1], 1 << 48) == expected
    out = round_sum(sums, 1, "fp32")
    assert out[1] == f32(float(expected * 2))
    ones = sum_products(a, axis=(0, 1))
    assert Fraction(int(ones.to_ints()), 1 << 48) == sum(Fraction(float(x)) for x in np.float16(a).ravel())
    infinite = np.array([inf, 1], f32)
    assert not sum_products(np.zeros(2, f32), infinite).nan
    assert sum_products(np.zeros(2, f32), infinite, skip_zeros=False).nan


def batch(shape, seed, scale=0):
    rng = np.random.default_rng(seed)
    return fgmp((rng.normal(size=shape) * 2 + 0.5).astype(f32) * f32(2.0**scale), Policy(scale=scale))


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (9, 4), (1, 2, 1, 1)])
def test_batch_norm_step_by_step(shape):
    """Each step again in float64, where one operation on FP32 numbers and a rounding to FP32 is exact enough (IEEE)."""
    y, dz = batch(shape, 6), batch(shape, 7, -12)
    rng = np.random.default_rng(8)
    gamma, beta = rng.normal(size=(2, shape[1])).astype(f32)
    got = batch_norm_statistics(y, gamma, beta, 1e-5)
    axes = (0, *range(2, len(shape)))
    n = int(np.prod([shape[axis] for axis in axes]))
    d64 = np.float64

    def step(value):
        return np.asarray(value).astype(f32).astype(d64)

    ys, dzs = y.values().astype(d64), dz.values().astype(d64)
    s1, s2 = step(ys.sum(axes)), step((ys * ys).sum(axes))
    inv_n = step(1 / d64(n))
    mean, ex2 = step(s1 * inv_n), step(s2 * inv_n)
    var = np.maximum(step(ex2 - step(mean * mean)), 0)
    invstd = step(1 / step(np.sqrt(step(var + step(1e-5)))))
    a = step(gamma.astype(d64) * invstd)
    b = step(beta.astype(d64) - step(mean * a))
    for name, value in {"mean": mean, "var": var, "invstd": invstd, "a": a, "b": b}.items():
        assert np.array_equal(getattr(got, name), value.astype(f32)), name
    assert (got.count, got.inv_count) == (n, f32(inv_n))
    column = (1, -1, *[1] * (len(shape) - 2))
    z = step(step(a.reshape(column) * ys) + b.reshape(column))
    assert np.array_equal(batch_norm_apply(y, got.a, got.b), z.astype(f32))
    shortcut = batch(shape, 9).values()
    added = np.maximum(step(z + shortcut), 0).astype(f32)
    assert np.array_equal(batch_norm_apply(y, got.a, got.b, shortcut=shortcut, rectify=True), added)

    gradients = batch_norm_backward(dz, y, got)
    s1, s2 = step(dzs.sum(axes)), step((dzs * ys).sum(axes))
    dgamma = step(step(s2 - step(mean * s1)) * invstd)
    g1, g2 = step(dgamma * inv_n), step(s1 * inv_n)
    big_b = step(0 - step(step(a * invstd) * g1))
    big_c = step(0 - step(step(a * g2) + step(big_b * mean)))
    affine = step(step(big_b.reshape(column) * ys) + big_c.reshape(column))
    dy = step(step(a.reshape(column) * dzs) + affine)
    assert np.array_equal(gradients.dgamma, dgamma.astype(f32))
    assert np.array_equal(gradients.dbeta, s1.astype(f32))
    assert np.array_equal(gradients.dy, dy.astype(f32))

    momentum = 0.1
    unbiased = step(var * step(n / (n - 1) if n > 1 else 1))
    keep, take = step(1 - momentum), step(momentum)
    mean_new, var_new = running_statistics(gamma, beta, got, momentum)
    assert np.array_equal(mean_new, step(step(gamma.astype(d64) * keep) + step(mean * take)).astype(f32))
    assert np.array_equal(var_new, step(step(beta.astype(d64) * keep) + step(unbiased * take)).astype(f32))


def test_batch_norm_against_torch():
    torch = pytest.importorskip("torch")
    shape = (6, 5, 7, 4)
    y, dz = batch(shape, 10), batch(shape, 11)
    rng = np.random.default_rng(12)
    gamma, beta = rng.normal(size=(2, 5)).astype(f32)
    layer = torch.nn.BatchNorm2d(5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(gamma))
        layer.bias.copy_(torch.tensor(beta))
    ty = torch.tensor(y.values().astype(np.float64), requires_grad=True)
    tz = torch.relu(layer(ty))
    tz.backward(torch.tensor(dz.values().astype(np.float64)))
    known = batch_norm_statistics(y, gamma, beta)
    z = batch_norm_apply(y, known.a, known.b, rectify=True)
    np.testing.assert_allclose(z, tz.detach().numpy(), rtol=1e-5, atol=1e-5)
    masked = fgmp(relu_backward(dz.values(), z))
    gradients = batch_norm_backward(masked, y, known)
    np.testing.assert_allclose(gradients.dgamma, layer.weight.grad.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients.dbeta, layer.bias.grad.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients.dy, ty.grad.numpy(), rtol=1e-4, atol=1e-5)
    mean, var = running_statistics(np.zeros(5, f32), np.ones(5, f32), known)
    np.testing.assert_allclose(mean, layer.running_mean.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, layer.running_var.numpy(), rtol=1e-5)
    layer.eval()
    _, a, b = batch_norm_coefficients(mean, var, gamma, beta)
    np.testing.assert_allclose(batch_norm_apply(y, a, b), layer(ty).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_variance_is_not_negative():
    y = fgmp(np.full((3, 1, 5, 5), 1.2345, f32))
    known = batch_norm_statistics(y, np.ones(1, f32), np.zeros(1, f32))
    assert known.var[0] >= 0
    assert np.isfinite(known.invstd).all()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (1, 1, 0), (2, 1, 1)])
def test_max_pool_against_torch(kernel, stride, padding):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(13)
    x = rng.integers(-3, 4, (2, 3, 9, 8)).astype(f32)  # with ties
    values, argmax = max_pool(x, kernel, stride, padding)
    tx = torch.tensor(x, requires_grad=True)
    ty, indices = torch.nn.functional.max_pool2d(tx, kernel, stride, padding, return_indices=True)
    assert np.array_equal(values, ty.detach().numpy())
    rows = np.arange(values.shape[2])[:, None] * stride - padding + argmax // kernel
    columns = np.arange(values.shape[3]) * stride - padding + argmax % kernel
    assert np.array_equal(rows * x.shape[3] + columns, indices.numpy())
    dy = rng.normal(size=values.shape).astype(f32)
    ty.backward(torch.tensor(dy))
    dx = max_pool_backward(dy, argmax, x.shape, kernel, stride, padding)
    np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_max_pool_adds_in_the_order_of_taps():
    x = np.zeros((1, 1, 3, 3), f32)
    x[0, 0, 1, 1] = 1
    _, argmax = max_pool(x, 2, 1)
    assert argmax.ravel().tolist() == [3, 2, 1, 0]
    dy = np.array([1, 2.0**-24, 2.0**-24, 1], f32).reshape(1, 1, 2, 2)
    # Tap 0 is of the last window: ((1 + 2^-24) + 2^-24) + 1, each step rounded.
    assert max_pool_backward(dy, argmax, x.shape, 2, 1)[0, 0, 1, 1] == 2.0
    dy = np.array([2.0**-24, 2.0**-24, 1, 2.0**-24], f32).reshape(1, 1, 2, 2)
    # 2^-24, then + 1 (a tie, to even), then + 2^-24 twice.
    assert max_pool_backward(dy, argmax, x.shape, 2, 1)[0, 0, 1, 1] == 1.0
    dy = np.array([1, 2.0**-24, 2.0**-24, 2.0**-24], f32).reshape(1, 1, 2, 2)
    assert max_pool_backward(dy, argmax, x.shape, 2, 1)[0, 0, 1, 1] == f32(1 + 2.0**-22)


def test_max_pool_of_nan_and_equal_zeros():
    x = np.array([[1, np.nan, -0.0, 0.0]], f32).reshape(1, 1, 1, 4)
    x = np.concatenate([x, x], 2)
    values, argmax = max_pool(x, 2, 2)
    assert bits(values).ravel().tolist() == [0x7FC00000, 0x80000000]
    assert argmax.ravel().tolist() == [1, 0]


def test_global_average_pool():
    x = batch((3, 4, 7, 7), 14)
    expected = x.values().astype(np.float64).sum((2, 3)).astype(f32) * (f32(1) / f32(49))
    assert np.array_equal(global_average_pool(x), expected)
    dp = np.random.default_rng(15).normal(size=(3, 4)).astype(f32)
    dx = global_average_pool_backward(dp, (3, 4, 7, 7))
    assert dx.shape == (3, 4, 7, 7)
    assert np.array_equal(dx, np.broadcast_to((dp * (f32(1) / f32(49)))[:, :, None, None], dx.shape))


def test_sgd_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(16)
    w, m = rng.normal(size=(40, 3)).astype(f32), np.zeros((40, 3), f32)
    parameter = torch.nn.Parameter(torch.tensor(w.astype(np.float64)))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(4):
        g = rng.normal(size=w.shape).astype(f32)
        w, m = sgd_step(w, m, g * f32(1024), lr=0.1, momentum=0.9, weight_decay=1e-3, inv_loss_scale=1 / 1024)
        parameter.grad = torch.tensor(g.astype(np.float64))
        optimizer.step()
    np.testing.assert_allclose(w, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_sgd_step_by_step():
    rng = np.random.default_rng(17)
    w, m, g = rng.normal(size=(3, 1000)).astype(f32)
    lr, mu, wd, inv = f32(0.05), f32(0.9), f32(5e-4), f32(1 / 128)
    d = g * inv + wd * w
    m_new = mu * m + d
    got_w, got_m = sgd_step(w, m, g, lr=0.05, momentum=0.9, weight_decay=5e-4, inv_loss_scale=1 / 128)
    assert np.array_equal(got_m, m_new)
    assert np.array_equal(got_w, w - lr * m_new)


def test_loss_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(18)
    logits, labels = (rng.normal(size=(12, 10)) * 5).astype(f32), rng.integers(0, 10, 12)
    loss, gradient = loss_and_gradient(logits, labels)
    t = torch.tensor(logits.astype(np.float64), requires_grad=True)
    expected = torch.nn.functional.cross_entropy(t, torch.tensor(labels))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert gradient.dtype == f32
    np.testing.assert_allclose(gradient, t.grad.numpy(), rtol=1e-6, atol=1e-9)
    loss, gradient = loss_and_gradient(np.array([[1e4, -1e4]], f32), np.array([1]))
    assert loss == 2e4
    assert gradient.tolist() == [[1.0, -1.0]]


Y = fgmp(np.ones((2, 3, 4, 4), f32))
C3 = np.ones(3, f32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: vector_op("FMA", C3, C3, C3),
        lambda: batch_norm_statistics(Y, np.ones(4, f32), C3),
        lambda: batch_norm_statistics(fgmp(C3), C3, C3),
        lambda: batch_norm_apply(Y, C3, np.ones(1, f32)),
        lambda: batch_norm_apply(Y, C3, C3, shortcut=C3),
        lambda: batch_norm_backward(fgmp(np.ones((2, 3, 4, 5), f32)), Y, batch_norm_statistics(Y, C3, C3)),
        lambda: max_pool(np.ones((1, 1, 2, 2), f32), 3, 1),
        lambda: max_pool(np.ones((1, 1, 2, 2), f32), 0, 1),
        lambda: max_pool(np.ones((1, 1, 2, 2), f32), 2, 1, 2),
        lambda: max_pool(C3, 2, 1),
        lambda: max_pool_backward(np.ones((1, 1, 2, 2), f32), np.zeros((1, 1, 2, 2), int), (1, 1, 2, 2), 2, 2),
        lambda: global_average_pool(fgmp(C3)),
        lambda: global_average_pool_backward(C3, (2, 3, 4, 4)),
        lambda: sgd_step(C3, C3, C3[:2], lr=0.1),
        lambda: loss_and_gradient(np.ones((2, 3)), np.zeros(3, int)),
        lambda: loss_and_gradient(np.ones((2, 3)), np.array([0, 3])),
    ],
)
def test_wrong_values(make):
    with pytest.raises(ValueError, match=r"not "):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: vector.add(np.ones(3), C3),
        lambda: vector.add(C3, np.ones(3, np.float16)),
        lambda: batch_norm_statistics(Y.values(), C3, C3),
        lambda: global_average_pool(Y.values()),
        lambda: sgd_step(np.ones(3), C3, C3, lr=0.1),
    ],
)
def test_wrong_types(make):
    with pytest.raises(TypeError, match=r"not "):
        make()
