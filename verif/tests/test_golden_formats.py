"""golden.formats: scalar reference and vectorised twin, against ml_dtypes and numpy.float16."""

from fractions import Fraction
from math import copysign, inf, isnan, nan

import ml_dtypes
import numpy as np
import pytest

from golden.formats import (
    E4M3,
    E5M2,
    FP16,
    FP32,
    canonical_fp32,
    decode,
    decode_scalar,
    encode,
    encode_scalar,
    round_encode,
    round_scalar,
    round_to,
)

ORACLES = {"FP16": np.float16, "E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}
SMALL = [E4M3, E5M2, FP16]

every_small = pytest.mark.parametrize("info", SMALL, ids=lambda info: info.name)


def patterns_of(info):
    return np.arange(1 << info.bits).astype(info.dtype)


def same(a, b):
    """Equal as floats, the sign of zero included; NaN equals NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(
        np.signbit(a)[~np.isnan(a)], np.signbit(b)[~np.isnan(b)]
    )


@every_small
def test_decode_of_every_pattern(info):
    patterns = patterns_of(info)
    with np.errstate(invalid="ignore"):
        expected = patterns.view(ORACLES[info.name]).astype(np.float64)
    assert same(decode(info, patterns), expected)
    assert same([float(decode_scalar(info, int(pattern))) for pattern in patterns], expected)


@every_small
def test_encode_inverts_decode(info):
    patterns = patterns_of(info)
    values = decode(info, patterns)
    expected = np.where(np.isnan(values), info.nan, patterns)
    assert np.array_equal(encode(info, values), expected)
    assert np.array_equal(round_encode(info, values), expected)
    some = slice(None, None, 1 if info.bits == 8 else 5)
    scalars = [encode_scalar(info, decode_scalar(info, int(pattern))) for pattern in patterns[some]]
    assert scalars == expected[some].tolist()


def hard_values(info):
    """All numbers of a format, the midpoints between neighbours and what lies just beside those, of both signs."""
    numbers = decode(info, np.arange(info.max_pattern + 1).astype(info.dtype))
    beyond = numbers[-1] + (numbers[-1] - numbers[-2]) * np.array([0.5, 1.0, 2.0])
    middles = (numbers[1:] + numbers[:-1]) / 2
    ties = np.concatenate([middles, beyond])
    positive = np.concatenate(
        [numbers, ties, np.nextafter(ties, inf), np.nextafter(ties, 0), [1e-300, 1e300, 5e-324, inf]]
    )
    return np.concatenate([positive, -positive, [nan]])


@every_small
def test_rounding_of_ties_and_their_neighbours(info):
    values = hard_values(info)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16) if info is FP16 else None
    rounded = round_to(info, values)
    if expected is not None:
        assert same(rounded, expected.astype(np.float64))
    assert np.array_equal(round_encode(info, values), encode(info, rounded))
    some = np.random.default_rng(1).permutation(len(values))[:1500]
    assert same(rounded[some], [float(round_scalar(info, float(value))) for value in values[some]])


@pytest.mark.parametrize("info", [E4M3, E5M2], ids=lambda info: info.name)
def test_rounding_of_all_fp16_against_ml_dtypes(info):
    values = decode(FP16, patterns_of(FP16))
    oracle = ORACLES[info.name]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float32).astype(oracle)
        assert same(round_to(info, values), expected.astype(np.float64))
        numbers = ~np.isnan(values)
        assert np.array_equal(round_encode(info, values)[numbers] & 0x7F, expected.view(np.uint8)[numbers] & 0x7F)


@pytest.mark.parametrize("info", [*SMALL, FP32], ids=lambda info: info.name)
def test_saturation(info):
    largest = info.max
    values = np.array([largest * 1.2, -largest * 1.2, largest * 4, largest, 1e300, -1e300])
    expected = [largest, -largest, largest, largest, largest, -largest]
    assert same(round_to(info, values, saturate=True), expected)
    assert same(decode(info, round_encode(info, values, saturate=True)), expected)
    assert [float(round_scalar(info, float(value), saturate=True)) for value in values] == expected
    limit = inf if info.has_infinity else nan
    assert same(round_to(info, [inf, -inf], saturate=True), [limit, -limit])
    assert same(round_to(info, values[[0, 1, 4]]), [limit, -limit, limit])


def test_largest_values():
    assert [E4M3.max, E5M2.max, FP16.max] == [448.0, 57344.0, 65504.0]
    assert FP32.max == np.finfo(np.float32).max
    assert E4M3.infinity == E4M3.nan == 0x7F


def test_fp32_rounding_against_numpy():
    rng = np.random.default_rng(2)
    values = rng.integers(0, 1 << 64, 4000, dtype=np.uint64).view(np.float64)
    exponents = rng.integers(-160, 130, 20000)
    values = np.concatenate([values, np.ldexp(rng.normal(size=20000), exponents)])
    with np.errstate(all="ignore"):
        expected = values.astype(np.float32)
    assert same(round_to(FP32, values), expected)
    finite = np.isfinite(values[:3000])
    scalar = [float(round_scalar(FP32, Fraction(float(value)))) for value in values[:3000][finite]]
    zero = expected[:3000][finite] == 0
    assert same(np.array(scalar)[~zero], expected[:3000][finite][~zero])
    assert np.array_equal(round_encode(FP32, values).view(np.float32), expected, equal_nan=True)


def test_signed_zero():
    assert copysign(1.0, round_scalar(FP16, Fraction(-1, 1 << 30))) == -1.0
    assert copysign(1.0, round_scalar(FP16, -0.0)) == -1.0
    assert encode_scalar(FP16, -0.0) == 0x8000
    assert round_encode(FP16, np.array([-1e-30, -0.0, 0.0])).tolist() == [0x8000, 0x8000, 0]


def test_nans_are_canonical():
    raw = np.array([0x7F800001, 0xFFC12345, 0x3F800000], np.uint32).view(np.float32)
    assert canonical_fp32(raw).view(np.uint32).tolist() == [0x7FC00000, 0x7FC00000, 0x3F800000]
    assert encode(FP16, np.array([-nan])).tolist() == [0x7E00]
    assert isnan(decode_scalar(E4M3, 0xFF))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"not 256"):
        decode_scalar(E4M3, 256)
    with pytest.raises(TypeError, match="uint16"):
        decode(FP16, np.zeros(3, np.int32))
    for value in (Fraction(1, 3), 500.0, inf):
        with pytest.raises(ValueError, match="E4M3, not"):
            encode_scalar(E4M3, value)
    for value in (1 / 3, 500.0, inf):
        with pytest.raises(ValueError, match="E4M3, not"):
            encode(E4M3, np.array([1.0, value]))
