"""golden.exact: sums and their rounding against Python integers, fractions and math.fsum."""

from fractions import Fraction
from math import fsum, inf, nan

import numpy as np
import pytest

from golden import exact
from golden.exact import (
    DenseOperand,
    ExactSum,
    exact_dot_scalar,
    exact_dot_sum,
    exact_matmul,
    has_special,
    round_sum,
    round_sum_scalar,
)
from golden.formats import FP16, FP32, decode, encode_scalar

SPECIAL = np.array([0, 0x8000, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 1, 0x8001, 0x7C00, 0xFC00, 0x7E00, 0xFE01], np.uint16)
RARE = np.array([0.25, 0.1, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05, 0.02, 0.01, 0.01, 0.01])


def finite_patterns(rng, shape):
    return (rng.integers(0, 0x7C00, shape) | rng.integers(0, 2, shape) << 15).astype(np.uint16)


def any_patterns(rng, shape):
    return rng.integers(0, 1 << 16, shape).astype(np.uint16)


def special_patterns(rng, shape):
    return rng.choice(SPECIAL, shape, p=RARE)


def normal_patterns(rng, shape):
    return rng.normal(size=shape).astype(np.float16).view(np.uint16)


DATA = [finite_patterns, any_patterns, special_patterns, normal_patterns]


def assert_sums(sums, a, b):
    """`sums` [M, N] are those of the products of rows of `a` and columns of `b`."""
    ints = sums.to_ints()
    for m, n in np.ndindex(sums.shape):
        expected = exact_dot_scalar(a[m], b[:, n])
        assert (ints[m, n], bool(sums.nan[m, n]), bool(sums.pinf[m, n]), bool(sums.ninf[m, n])) == expected


@pytest.mark.parametrize("data", DATA)
def test_matmul(data):
    rng = np.random.default_rng(DATA.index(data))
    for _ in range(25):
        m, k, n = rng.integers(1, 6), rng.integers(0, 40), rng.integers(1, 5)
        a, b = data(rng, (m, k)), data(rng, (k, n))
        assert_sums(exact_matmul(a, b), a, b)


def test_matmul_of_many_terms():
    rng = np.random.default_rng(7)
    a, b = finite_patterns(rng, (2, 70_000)), finite_patterns(rng, (70_000, 2))
    a_values, b_values = _integers(a), _integers(b)
    expected = a_values.astype(object) @ b_values.astype(object)
    assert np.array_equal(exact_matmul(a, b).to_ints(), expected)


def _integers(bits):
    return (decode(FP16, bits) * 2.0**24).astype(np.int64)


def test_largest_terms():
    top = np.full((1, 1 << 16), 0x7BFF, np.uint16)
    sums = exact_matmul(top, top.T.copy())
    assert sums.to_ints()[0, 0] == (65504 << 24) ** 2 << 16
    assert -(exact_matmul(top | 0x8000, top.T.copy()).to_ints()[0, 0]) == (65504 << 24) ** 2 << 16


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e3, 1e-2), (3e4, 3e4)])
def test_matmul_takes_every_number_of_slices(scales, monkeypatch):
    """With small limits on exact sums the plan needs more slices, and the sums stay the same."""
    rng = np.random.default_rng(11)
    a = (rng.normal(size=(6, 200)) * scales[0]).clip(-65000, 65000).astype(np.float16).view(np.uint16)
    b = (rng.normal(size=(200, 5)) * scales[1]).clip(-65000, 65000).astype(np.float16).view(np.uint16)
    expected = _integers(a).astype(object) @ _integers(b).astype(object)
    plans = set()
    plan = exact._plan

    def spy(*arguments):
        chosen = plan(*arguments)
        plans.add(chosen)
        return chosen

    monkeypatch.setattr(exact, "_plan", spy)
    for limit in (53, 48, 42, 36):
        monkeypatch.setattr(exact, "_EXACT", 2.0**limit)
        assert np.array_equal(exact_matmul(a, b).to_ints(), expected)
    assert len(plans) >= 2


def test_slices_are_within_their_bound(monkeypatch):
    rng = np.random.default_rng(12)
    products = []

    def record(self, values, shift):
        products.append(np.abs(values).max())
        original(self, values, shift)

    original = ExactSum.add_scaled
    monkeypatch.setattr(ExactSum, "add_scaled", record)
    for _ in range(30):
        k = int(rng.integers(1, 3000))
        exact_matmul(
            np.full((1, k), 0x7BFF, np.uint16) - finite_patterns(rng, (1, k)) % 7, np.full((k, 1), 0x7BFF, np.uint16)
        )
        exact_matmul(finite_patterns(rng, (3, k)), finite_patterns(rng, (k, 2)))
    assert max(products) <= 2.0**53


def test_cancellation():
    a = np.array([[0x7BFF, 0xFBFF, 0x0001]], np.uint16)
    b = np.array([[0x7BFF], [0x7BFF], [0x0001]], np.uint16)
    sums = exact_matmul(a, b)
    assert sums.to_ints().tolist() == [[1]]
    assert round_sum(sums, 24).tolist() == [[0x0001]]
    assert round_sum(sums, 0, "fp32").tolist() == [[2.0**-48]]
    assert round_sum(exact_matmul(a[:, :2], b[:2])).tolist() == [[0]]


def test_skipped_zeros_and_infinities():
    one, zero, minus_zero, infinity, not_a_number = 0x3C00, 0, 0x8000, 0x7C00, 0x7E00

    def dot(a, b):
        return int(round_sum(exact_matmul(np.array([a], np.uint16), np.array([b], np.uint16).T))[0, 0])

    assert dot([zero, one], [infinity, one]) == one
    assert dot([minus_zero, one], [not_a_number, one]) == one
    assert dot([infinity, one], [zero, one]) == not_a_number
    assert dot([infinity, one], [one, one]) == infinity
    assert dot([one, one], [0xFC00, one]) == 0xFC00
    assert dot([infinity, one], [one, 0xFC00]) == not_a_number
    assert dot([0xFC00], [0xFC00]) == infinity
    assert dot([not_a_number], [zero]) == not_a_number
    assert dot([zero], [zero]) == 0
    assert dot([0xBC00], [zero]) == 0  # a product -0 is no part of an exact sum


def test_dense_operand_is_reused():
    rng = np.random.default_rng(3)
    b = normal_patterns(rng, (20, 3))
    dense = DenseOperand(b)
    for _ in range(3):
        a = special_patterns(rng, (4, 20))
        assert_sums(exact_matmul(a, dense), a, b)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("data", DATA)
def test_dot_sum(data, skip):
    rng = np.random.default_rng(20 + DATA.index(data))
    a, b = data(rng, (3, 5, 7, 2)), data(rng, (3, 5, 7, 2))
    for axes in (None, 1, -1, (0, 2, 3), (0, 1, 2, 3)):
        sums = exact_dot_sum(a, b, axes, skip_zeros=skip)
        chosen = tuple(range(4)) if axes is None else tuple(np.atleast_1d(axes) % 4)
        kept = [axis for axis in range(4) if axis not in chosen]
        assert sums.shape == tuple(a.shape[axis] for axis in kept)
        flat_a = a.transpose(*kept, *chosen).reshape(*sums.shape, -1)
        flat_b = b.transpose(*kept, *chosen).reshape(*sums.shape, -1)
        ints = sums.to_ints()
        for index in np.ndindex(sums.shape):
            expected = exact_dot_scalar(flat_a[index], flat_b[index], skip)
            assert (ints[index], sums.nan[index], sums.pinf[index], sums.ninf[index]) == expected


def test_dot_sum_broadcasts_and_agrees_with_fsum():
    rng = np.random.default_rng(30)
    a = normal_patterns(rng, (5, 4000))
    sums = exact_dot_sum(a, np.array(0x3C00, np.uint16), 1)
    expected = [fsum(row) for row in decode(FP16, a)]
    assert round_sum(sums, 0, "fp32").tolist() == [np.float32(one) for one in expected]
    squares = exact_dot_sum(a, a, 1)
    expected = [fsum(row * row) for row in decode(FP16, a)]
    assert round_sum(squares, 0, "fp32").tolist() == [np.float32(one) for one in expected]
    assert exact_dot_sum(a[:, :0], a[:, :0], 1).to_ints().tolist() == [0] * 5


SUMS = [
    *(sign * value for sign in (1, -1) for value in (0, 1, 2, 3, (1 << 53) - 1, (1 << 53) + 1, (1 << 63) - 1, 1 << 63)),
    *(
        sign * ((1 << shift) + delta)
        for sign in (1, -1)
        for shift in (48, 54, 63, 64, 65, 96, 126)
        for delta in (-1, 0, 1)
    ),
    *(sign * ((2049 << 37) + delta) for sign in (1, -1) for delta in (-1, 0, 1)),  # a tie of FP16
    *(sign * ((2049 << 100) + delta) for sign in (1, -1) for delta in (-1, 0, 1)),
    *(sign * (((1 << 24) + 1 << 70) + delta) for sign in (1, -1) for delta in (-1, 0, 1)),  # a tie of FP32
    *(sign * ((65520 << 48) + delta) for sign in (1, -1) for delta in (-1, 0, 1)),  # the edge of overflow
    -(1 << 127),
]


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("fmt", ["fp16", "fp32"])
def test_round_sum(fmt, saturate):
    rng = np.random.default_rng(40)
    totals = [*SUMS, *(int(rng.integers(-(1 << 62), 1 << 62)) << int(rng.integers(0, 64)) for _ in range(60))]
    totals += [total >> int(rng.integers(0, 100)) for total in totals[-60:]]
    info = FP16 if fmt == "fp16" else FP32
    for some in (
        totals,
        [total for total in totals if abs(total) < 1 << 63],
        [one for one in totals if abs(one) < 1 << 53],
    ):
        sums = ExactSum.from_ints(some)
        assert sums.to_ints().tolist() == some
        for shift in (0, 24, -60, -101, 49, -180, 2047, -2048):
            patterns = round_sum(sums, shift, fmt, saturate).view(info.dtype)
            expected = [
                encode_scalar(info, round_sum_scalar(total, shift=shift, fmt=fmt, saturate=saturate)) for total in some
            ]
            assert patterns.tolist() == expected


def test_round_sum_of_specials():
    sums = ExactSum.zeros(8)
    sums.nan[:] = [0, 0, 0, 0, 1, 1, 1, 1]
    sums.pinf[:] = [0, 1, 0, 1, 0, 1, 0, 1]
    sums.ninf[:] = [0, 0, 1, 1, 0, 0, 1, 1]
    for saturate in (False, True):
        assert round_sum(sums, 0, "fp16", saturate).tolist() == [0, 0x7C00, 0xFC00] + [0x7E00] * 5
        expected = [0, 0x7F800000, 0xFF800000] + [0x7FC00000] * 5
        assert round_sum(sums, 0, "fp32", saturate).view(np.uint32).tolist() == expected
    assert [round_sum_scalar(5, (False, True, False)), round_sum_scalar(5, (False, False, True))] == [inf, -inf]
    assert str(round_sum_scalar(5, (False, True, True))) == str(nan)


def test_underflow_keeps_the_sign():
    sums = ExactSum.from_ints([-1, 1, 0])
    assert round_sum(sums).tolist() == [0x8000, 0, 0]
    assert round_sum(sums, -200, "fp32").view(np.uint32).tolist() == [0x80000000, 0, 0]


def test_sums_of_sums():
    rng = np.random.default_rng(50)
    values = [[int(one) << 60 for one in rng.integers(-(1 << 62), 1 << 62, 40)] for _ in range(2)]
    values[0][:4], values[1][:4] = [-1, 1, (1 << 64) - 1, -(1 << 64)], [1, -1, 1, 1]
    total = ExactSum.from_ints(values[0]) + ExactSum.from_ints(values[1])
    assert total.to_ints().tolist() == [x + y for x, y in zip(*values, strict=True)]
    total.nan[3] = True
    assert (total + ExactSum.zeros(40)).nan.sum() == 1
    grid = total.reshape(8, 5).transpose(1, 0)
    assert grid[2, 1].to_ints() == total.to_ints()[7]
    grid[0] = ExactSum.zeros(8)
    assert not any(grid.to_ints()[0])


def test_rounding_equals_fractions_of_a_dot_product():
    rng = np.random.default_rng(60)
    a, b = normal_patterns(rng, (8, 300)), normal_patterns(rng, (300, 8))
    rounded = round_sum(exact_matmul(a, b), -3).view(np.float16)
    values = [[Fraction(float(x)) for x in row] for row in decode(FP16, a)]
    columns = [[Fraction(float(x)) for x in row] for row in decode(FP16, b.T)]
    for m, n in np.ndindex(rounded.shape):
        total = sum(x * y for x, y in zip(values[m], columns[n], strict=True)) / 8
        assert rounded[m, n] == np.float16(float(total)) or abs(Fraction(float(rounded[m, n])) - total) <= total / 2048


def test_wrong_arguments():
    good = np.zeros((2, 2), np.uint16)
    with pytest.raises(TypeError, match="not dtype"):
        exact_matmul(good.astype(np.int64), good)
    with pytest.raises(TypeError, match="not dtype"):
        has_special(good.view(np.float16))
    with pytest.raises(ValueError, match=r"not \(3, 2\)"):
        exact_matmul(good, np.zeros((3, 2), np.uint16))
    with pytest.raises(ValueError, match="not 1"):
        exact_matmul(good[0], good)
    with pytest.raises(ValueError, match="not 3"):
        DenseOperand(good[None])
    with pytest.raises(ValueError, match="not 'fp8'"):
        round_sum(ExactSum.zeros(1), 0, "fp8")
