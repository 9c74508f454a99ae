"""golden.fgmp: every policy over all FP16 patterns against the scalar reference and ml_dtypes."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from golden.fgmp import (
    CODE_FP8,
    CODE_FP16,
    CODE_ZERO,
    FP8_POLICY,
    FP16_POLICY,
    POLICIES,
    Policy,
    as_policy,
    fgmp,
    quantize,
    quantize_scalar,
    to_fp16,
)
from golden.formats import FP16, encode_scalar, round_scalar

PATTERNS = np.arange(1 << 16, dtype=np.uint16)

SOME_POLICIES = [
    FP16_POLICY,
    FP8_POLICY,
    *(Policy.between(0.015625, 448.0, below=below, above="fp16") for below in ("fp16", "fp8", "zero")),
    Policy.between(0.25, 12.0, below="zero", above="fp8"),
    Policy.between(0.0, 60000.0, below="fp16", above="fp16"),
    Policy(0, 1, 1, "zero", "fp8"),
    Policy(0, 0x7FFF, 0x7FFF, "fp8", "fp16"),
    Policy(0, 0x7C00, 0x7E12, "zero", "fp16"),
]


@pytest.mark.parametrize("policy", SOME_POLICIES, ids=range(len(SOME_POLICIES)))
def test_all_patterns_against_the_scalar_reference(policy):
    bits, codes, underflow = quantize(PATTERNS, policy)
    step = 3 if policy == SOME_POLICIES[4] else 17
    expected = [quantize_scalar(int(pattern), policy) for pattern in PATTERNS[::step]]
    assert bits[::step].tolist() == [one[0] for one in expected]
    assert codes[::step].tolist() == [one[1] for one in expected]
    assert underflow[::step].tolist() == [one[2] for one in expected]
    assert (bits.dtype, codes.dtype, underflow.dtype) == (np.uint16, np.uint8, bool)


@pytest.mark.parametrize("policy", SOME_POLICIES, ids=range(len(SOME_POLICIES)))
def test_invariants(policy):
    bits, codes, underflow = quantize(PATTERNS, policy)
    assert np.array_equal(codes == CODE_ZERO, bits == 0)
    assert np.array_equal(bits[codes == CODE_FP16], PATTERNS[codes == CODE_FP16])
    assert not underflow[[0, 0x8000]].any()
    assert (codes[underflow] == CODE_ZERO).all()
    fp8 = bits[codes == CODE_FP8].view(np.float16)
    assert np.array_equal(fp8.astype(ml_dtypes.float8_e4m3fn).astype(np.float16), fp8)
    # Quantising twice changes nothing but what flushing already made zero.
    again, _, _ = quantize(bits, policy)
    inside = (bits & 0x7FFF >= policy.lo_bits) | (policy.below != "zero")
    assert np.array_equal(again[inside], bits[inside])


def test_fp8_policy_is_saturated_ml_dtypes():
    values = PATTERNS.view(np.float16).astype(np.float32)
    finite = np.isfinite(values)
    expected = np.clip(values[finite], -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float16).view(np.uint16)
    expected = np.where(expected == 0x8000, 0, expected)
    bits, codes, underflow = quantize(PATTERNS, "fp8")
    assert np.array_equal(bits[finite], expected)
    assert np.array_equal(underflow[finite], (expected == 0) & (values[finite] != 0))
    assert (codes[~finite] == CODE_FP16).all()


def test_fp8_only_where_it_does_not_overflow():
    policy = Policy.between(0.0, 1000.0)
    values = np.array([448, 464, 464.25, 480, 1000, 1001], np.float16)
    _, codes, _ = quantize(values.view(np.uint16), policy)
    assert codes.tolist() == [2, 2, 3, 3, 3, 3]
    bits, codes, _ = quantize(values.view(np.uint16), Policy.between(0.0, 1000.0, above="fp8"))
    assert codes.tolist() == [2] * 6
    assert bits.view(np.float16).tolist() == [448.0] * 6


@pytest.mark.parametrize("scale", [-128, -30, -3, 0, 5, 24, 127])
def test_to_fp16_rounds_once(scale):
    rng = np.random.default_rng(scale + 1000)
    exponents = rng.integers(-30, 20, 600) + scale
    x = np.ldexp(rng.normal(size=600), np.clip(exponents, -149, 124)).astype(np.float32)
    x[:8] = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38]
    expected = [
        encode_scalar(
            FP16, round_scalar(FP16, value if not np.isfinite(value) or value == 0 else _scaled(value, scale))
        )
        for value in (float(one) for one in x)
    ]
    assert to_fp16(x, scale).tolist() == expected
    saturated = to_fp16(x, scale, saturate=True).view(np.float16)
    assert np.isinf(saturated).sum() == 2
    ordinary = ~np.isinf(np.array(expected, np.uint16).view(np.float16))
    assert np.array_equal(saturated.view(np.uint16)[ordinary], np.array(expected)[ordinary])


def _scaled(value, scale):
    return Fraction(value) * Fraction(2) ** -scale


def test_no_double_rounding():
    # 1 + 2^-11 + 2^-23: rounding via anything narrower would see a tie and give 1.
    x = np.array([0x3F801001], np.uint32).view(np.float32)
    assert to_fp16(x).tolist() == [0x3C01]
    # Below the normal numbers, after scaling.
    assert to_fp16(x, 24).tolist() == [0x0001]


def test_quantised_tensor():
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(3, 5)) * 1e-4).astype(np.float32)
    x[0, 0] = np.nan
    q = fgmp(x, Policy.between(0.25, 448.0, scale=-12, below="zero"))
    assert q.shape == (3, 5)
    assert q.scale == -12
    values = q.values()
    assert values.dtype == np.float32
    assert values.view(np.uint32)[0, 0] == 0x7FC00000
    assert np.array_equal(values[1:], q.bits[1:].view(np.float16).astype(np.float32) * np.float32(2.0**-12))
    assert np.array_equal(fgmp(x[1:], "fp16").values(), x[1:].astype(np.float16).astype(np.float32))
    same = fgmp(values, Policy.between(0.25, 448.0, scale=-12))
    assert np.array_equal(same.bits, q.bits)


def test_policies():
    assert as_policy("fp8") is POLICIES["fp8"]
    assert as_policy(FP8_POLICY) is FP8_POLICY
    assert (FP8_POLICY.lo, FP8_POLICY.hi) == (0.0, 65504.0)
    assert Policy.between(0.5, 2.0) == Policy(0, 0x3800, 0x4000)
    assert Policy.between(0.5, 2.0).with_scale(-7) == Policy(-7, 0x3800, 0x4000)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Policy(scale=128),
        lambda: Policy(lo_bits=0x8000, hi_bits=0x8000),
        lambda: Policy(lo_bits=2, hi_bits=1),
        lambda: Policy(below="fp4"),
        lambda: Policy(above="zero"),
        lambda: Policy.between(0.1, 1.0),
        lambda: Policy.between(-1.0, 1.0),
        lambda: Policy.between(0.0, float("nan")),
        lambda: Policy.between(0.0, 1e6),
        lambda: as_policy("fp4"),
        lambda: to_fp16(np.zeros(1, np.float32), 200),
    ],
)
def test_wrong_values(make):
    with pytest.raises(ValueError, match=r"not "):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Policy(scale=1.0),
        lambda: Policy(lo_bits=True),
        lambda: as_policy(3),
        lambda: quantize(np.zeros(1, np.float16), "fp8"),
        lambda: to_fp16(np.zeros(1, np.float64)),
    ],
)
def test_wrong_types(make):
    with pytest.raises(TypeError, match=r"not "):
        make()
