"""Floating-point formats: decode, round and encode, as a scalar reference (fractions) and a vectorised twin.

A *pattern* is the unsigned integer of an encoding. `decode_scalar`, `round_scalar` and `encode_scalar` work on Python
numbers and are the reference; `decode`, `round_to` and `encode` are their twins on arrays. Every NaN made here is the
format's canonical one.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import copysign, inf, isinf, isnan, nan

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "E4M3",
    "E5M2",
    "FP16",
    "FP32",
    "FormatInfo",
    "canonical_fp32",
    "decode",
    "decode_scalar",
    "encode",
    "encode_scalar",
    "round_encode",
    "round_scalar",
    "round_to",
]


@dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """A binary floating-point format with subnormals.

    Parameters
    ----------
    name : str
        What messages call it.
    exponent_bits, mantissa_bits : int
        Widths of the fields; the sign bit is above both.
    bias : int
        Exponent field of 1.0.
    has_infinity : bool
        Whether the greatest exponent field means infinity and NaN, as in IEEE 754. Otherwise it is a normal exponent,
        of which only the pattern with an all-ones mantissa is NaN (OCP E4M3).
    nan : int
        Pattern of the canonical NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_infinity: bool
    nan: int

    @property
    def bits(self) -> int:
        """Width of a pattern."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        """Pattern of -0."""
        return 1 << (self.bits - 1)

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number (its value is 2^min_exponent)."""
        return 1 - self.bias

    @property
    def max_pattern(self) -> int:
        """Pattern of the largest finite number."""
        top = ((1 << self.exponent_bits) - 1) << self.mantissa_bits
        return top - 1 if self.has_infinity else top | ((1 << self.mantissa_bits) - 2)

    @property
    def infinity(self) -> int:
        """Pattern of +infinity; the canonical NaN where the format has no infinity."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits if self.has_infinity else self.nan

    @property
    def max(self) -> float:
        """The largest finite number."""
        return float(decode_scalar(self, self.max_pattern))

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """NumPy type of a pattern."""
        types: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16, 32: np.uint32}
        return types[self.bits]


FP16 = FormatInfo(name="FP16", exponent_bits=5, mantissa_bits=10, bias=15, has_infinity=True, nan=0x7E00)
"""IEEE binary16."""

FP32 = FormatInfo(name="FP32", exponent_bits=8, mantissa_bits=23, bias=127, has_infinity=True, nan=0x7FC00000)
"""IEEE binary32."""

E4M3 = FormatInfo(name="E4M3", exponent_bits=4, mantissa_bits=3, bias=7, has_infinity=False, nan=0x7F)
"""OCP FP8 E4M3: no infinity, NaN S.1111.111, largest value 448."""

E5M2 = FormatInfo(name="E5M2", exponent_bits=5, mantissa_bits=2, bias=15, has_infinity=True, nan=0x7E)
"""OCP FP8 E5M2."""


def decode_scalar(info: FormatInfo, pattern: int) -> Fraction | float:
    """Value of a pattern: an exact `Fraction`, or a float for -0.0, infinities and NaN.

    Raises
    ------
    ValueError
        If the pattern does not fit the format.
    """
    if not 0 <= pattern < 1 << info.bits:
        raise ValueError(f"pattern of {info.name} must be 0 to {(1 << info.bits) - 1:#x}, not {pattern!r}")
    negative = bool(pattern & info.sign_bit)
    magnitude = pattern & (info.sign_bit - 1)
    if magnitude > info.max_pattern:
        return copysign(inf, -negative) if info.has_infinity and magnitude == info.infinity else nan
    if magnitude == 0:
        return -0.0 if negative else Fraction(0)
    exponent, mantissa = divmod(magnitude, 1 << info.mantissa_bits)
    if exponent:
        mantissa += 1 << info.mantissa_bits
    value = Fraction(mantissa) * Fraction(2) ** (max(exponent, 1) - info.bias - info.mantissa_bits)
    return -value if negative else value


def _exponent(magnitude: Fraction) -> int:
    """The greatest e with 2^e <= magnitude."""
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= magnitude else exponent - 1


def round_scalar(info: FormatInfo, value: Fraction | float, saturate: bool = False) -> Fraction | float:
    """The value of the format that is nearest to `value`, ties to even.

    Parameters
    ----------
    value : Fraction or float
        Any real number, infinity or NaN. The sign of a zero is that of a float.
    saturate : bool
        What is beyond the largest finite number gives that, instead of infinity (NaN in a format without). An infinite
        `value` is never saturated.

    Returns
    -------
    Fraction or float
        As of `decode_scalar`.
    """
    if isinstance(value, float):
        if isnan(value):
            return nan
        if isinf(value):
            return value if info.has_infinity else nan
        if value == 0:
            return -0.0 if copysign(1.0, value) < 0 else Fraction(0)
        value = Fraction(value)
    if value == 0:
        return Fraction(0)
    negative, magnitude = value < 0, abs(value)
    quantum = Fraction(2) ** (max(_exponent(magnitude), info.min_exponent) - info.mantissa_bits)
    rounded = round(magnitude / quantum) * quantum  # ties to even, as Python rounds fractions
    if rounded == 0:
        return -0.0 if negative else Fraction(0)
    largest = Fraction(info.max)
    if rounded > largest:
        if not saturate:
            return nan if not info.has_infinity else -inf if negative else inf
        rounded = largest
    return -rounded if negative else rounded


def encode_scalar(info: FormatInfo, value: Fraction | float) -> int:
    """Pattern of a value that the format represents exactly; inverse of `decode_scalar`.

    Raises
    ------
    ValueError
        If the format does not have the value.
    """
    if isinstance(value, float):
        if isnan(value):
            return info.nan
        if isinf(value):
            if not info.has_infinity:
                raise ValueError(f"value must be finite in {info.name}, not {value!r}")
            return info.infinity | (info.sign_bit if value < 0 else 0)
        if value == 0:
            return info.sign_bit if copysign(1.0, value) < 0 else 0
        value = Fraction(value)
    magnitude = abs(value)
    sign = info.sign_bit if value < 0 else 0
    if magnitude > Fraction(info.max):
        raise ValueError(f"value must be at most {info.max} in {info.name}, not {value!r}")
    if magnitude == 0:
        return 0
    exponent = max(_exponent(magnitude), info.min_exponent)
    units = magnitude / Fraction(2) ** (exponent - info.mantissa_bits)
    if units.denominator != 1:
        raise ValueError(f"value must be representable in {info.name}, not {value!r}")
    return sign | (int(units) + ((exponent - info.min_exponent) << info.mantissa_bits))


@cache
def _decode_table(info: FormatInfo) -> NDArray[np.float64]:
    """Values of all patterns of a format of at most 16 bits."""
    table = np.array([float(decode_scalar(info, pattern)) for pattern in range(1 << info.bits)])
    table.setflags(write=False)
    return table


def decode(info: FormatInfo, patterns: ArrayLike) -> NDArray[np.float64]:
    """Values of an array of patterns, exact in float64.

    Raises
    ------
    TypeError
        If `patterns` is not of the format's unsigned type.
    """
    patterns = np.asarray(patterns)
    if patterns.dtype != info.dtype:
        raise TypeError(f"patterns of {info.name} must be {np.dtype(info.dtype)}, not {patterns.dtype!r}")
    if info.bits <= 16:
        return _decode_table(info)[patterns]
    return patterns.view(np.float32).astype(np.float64)


def round_to(info: FormatInfo, values: ArrayLike, saturate: bool = False) -> NDArray[np.float64]:
    """Twin of `round_scalar` on float64 values: nearest values of the format, ties to even."""
    values = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        _, exponent = np.frexp(values)
        shift = np.maximum(exponent - 1, info.min_exponent) - info.mantissa_bits
        rounded = np.ldexp(np.rint(np.ldexp(values, -shift)), shift)
    finite = np.isfinite(values)
    rounded = np.where(finite, rounded, values)
    beyond = finite & (np.abs(rounded) > info.max)
    limit = info.max if saturate else inf if info.has_infinity else nan
    rounded = np.where(beyond, np.copysign(limit, values), rounded)
    if not info.has_infinity:
        rounded = np.where(np.isinf(values), nan, rounded)
    return rounded


def encode(info: FormatInfo, values: ArrayLike) -> NDArray[np.unsignedinteger]:
    """Twin of `encode_scalar` on float64 values.

    Raises
    ------
    ValueError
        If the format does not have one of the values.
    """
    values = np.asarray(values, np.float64)
    nans = np.isnan(values)
    wrong = ~nans & (round_to(info, values) != values)
    if wrong.any():
        raise ValueError(f"values must be representable in {info.name}, not {float(values[wrong].flat[0])!r}")
    infinite = np.isinf(values)
    magnitude = np.abs(np.where(nans | infinite, 0.0, values))
    _, exponent = np.frexp(magnitude)
    exponent = np.maximum(np.where(magnitude == 0, info.min_exponent, exponent - 1), info.min_exponent)
    units = np.ldexp(magnitude, info.mantissa_bits - exponent).astype(np.int64)
    patterns = units + ((exponent - info.min_exponent).astype(np.int64) << info.mantissa_bits)
    patterns = np.where(infinite, info.infinity, patterns) | np.where(np.signbit(values), info.sign_bit, 0)
    return np.where(nans, info.nan, patterns).astype(info.dtype)


def round_encode(info: FormatInfo, values: ArrayLike, saturate: bool = False) -> NDArray[np.unsignedinteger]:
    """Patterns of float64 values rounded once to the format: `encode(info, round_to(info, values))`, but fast."""
    values = np.asarray(values, np.float64)
    if info not in (FP16, FP32):
        return encode(info, round_to(info, values, saturate))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = values.astype(np.float16 if info is FP16 else np.float32)
    patterns = rounded.view(info.dtype)
    if saturate:
        beyond = np.isinf(rounded) & np.isfinite(values)
        sign = patterns & info.dtype(info.sign_bit)
        patterns = np.where(beyond, sign | info.dtype(info.max_pattern), patterns)
    return np.where(np.isnan(values), info.dtype(info.nan), patterns).astype(info.dtype, copy=False)


def canonical_fp32(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """`values` with every NaN replaced by the canonical one, 0x7FC00000."""
    values = np.asarray(values, np.float32)
    nans = np.isnan(values)
    if not nans.any():
        return values
    return np.where(nans, np.uint32(FP32.nan), values.view(np.uint32)).astype(np.uint32).view(np.float32)
