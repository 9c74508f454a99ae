"""Exact sums of products of FP16 numbers, rounded once.

A product of two finite FP16 numbers is an integer multiple of 2^-48; `ExactSum` holds sums of them as 128-bit two's
complement integers, so 2^47 products of any size fit. `exact_matmul` computes them with BLAS (the Ozaki scheme): the
operands, as integers in float64, are cut into slices so narrow that no partial sum of a product of slices exceeds
2^53; then every float64 matrix product is exact in whatever order BLAS adds, and their results are added in 128 bits.
Most tensors of a network need one slice.

Infinities and NaN are kept beside the sum: `nan` (an operand was NaN, or infinity met zero), `pinf` and `ninf` (a
product was infinite). The first operand is *streamed*: its zeros are skipped and contribute nothing even against
infinity or NaN.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf, isinf, isnan, log2, nan
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from golden.formats import FP16, FP32, decode, decode_scalar, round_encode, round_scalar

__all__ = [
    "LSB_EXPONENT",
    "DenseOperand",
    "ExactSum",
    "exact_dot_scalar",
    "exact_dot_sum",
    "exact_matmul",
    "has_special",
    "round_sum",
    "round_sum_scalar",
]

LSB_EXPONENT = -48
"""Exponent of the least significant bit of a sum."""

_F16_LSB = -24
_EXACT = 2.0**53 * (1 - 2.0**-20)
"""Limit on partial sums in units; the margin covers the rounding of the norms that bound them."""


@dataclass(eq=False)
class ExactSum:
    """An array of exact sums.

    Attributes
    ----------
    hi : int64 array
        Upper half of the two's complement sum of the finite products, in units of 2^-48.
    lo : uint64 array
        Lower half.
    nan, pinf, ninf : bool array
        What non-finite products contributed.
    """

    hi: NDArray[np.int64]
    lo: NDArray[np.uint64]
    nan: NDArray[np.bool_]
    pinf: NDArray[np.bool_]
    ninf: NDArray[np.bool_]

    @classmethod
    def zeros(cls, shape: "int | Sequence[int]") -> "ExactSum":
        """Empty sums."""
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.uint64), *(np.zeros(shape, bool) for _ in range(3)))

    @classmethod
    def from_ints(cls, values: ArrayLike) -> "ExactSum":
        """Finite sums of the given integers (units of 2^-48), which may be Python integers of up to 128 bits.

        Raises
        ------
        OverflowError
            If a value does not fit 128 bits.
        """
        values = np.asarray(values, object)
        out = cls.zeros(values.shape)
        for index in np.ndindex(values.shape):
            value = int(values[index])
            out.hi[index], out.lo[index] = value >> 64, value & 0xFFFF_FFFF_FFFF_FFFF
        return out

    def to_ints(self) -> NDArray[np.object_]:
        """The sums as Python integers (units of 2^-48), whatever the flags."""
        return np.asarray(self.hi.astype(object) * (1 << 64) + self.lo.astype(object), object)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.hi.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.hi.ndim

    def _map(self, function: Any) -> "ExactSum":
        return ExactSum(*(function(part) for part in (self.hi, self.lo, self.nan, self.pinf, self.ninf)))

    def __getitem__(self, index: Any) -> "ExactSum":
        return self._map(lambda part: part[index])

    def __setitem__(self, index: Any, value: "ExactSum") -> None:
        self.hi[index], self.lo[index] = value.hi, value.lo
        self.nan[index], self.pinf[index], self.ninf[index] = value.nan, value.pinf, value.ninf

    def reshape(self, *shape: Any) -> "ExactSum":
        """The sums in another shape."""
        return self._map(lambda part: part.reshape(*shape))

    def transpose(self, *axes: Any) -> "ExactSum":
        """The sums with their axes permuted."""
        return self._map(lambda part: part.transpose(*axes))

    def __add__(self, other: "ExactSum") -> "ExactSum":
        if not isinstance(other, ExactSum):
            return NotImplemented
        with np.errstate(over="ignore"):  # of scalars: a carry, not an error
            lo = self.lo + other.lo
        hi = self.hi + other.hi + (lo < self.lo)
        return ExactSum(hi, lo, self.nan | other.nan, self.pinf | other.pinf, self.ninf | other.ninf)

    def add_scaled(self, values: NDArray[np.float64], shift: int) -> None:
        """Add values * 2^shift units in place; `values` are integers of magnitude at most 2^53, shift >= 0."""
        whole = values.astype(np.int64)
        if shift == 0:
            low, high = whole.view(np.uint64), whole >> 63
        elif shift < 64:
            low, high = whole.view(np.uint64) << np.uint64(shift), whole >> (64 - shift)
        else:
            low, high = None, whole << (shift - 64)
        if low is not None:
            self.lo += low
            high = high + (self.lo < low)
        self.hi += high


# Decoding to integers

_MAGNITUDE = np.arange(1 << 15, dtype=np.int64)
_UNITS = np.where(
    FP16.max_pattern >= _MAGNITUDE,
    np.where(_MAGNITUDE < 1024, _MAGNITUDE, (1024 + (_MAGNITUDE & 1023)) << np.maximum((_MAGNITUDE >> 10) - 1, 0)),
    0,
)
_INTEGER = np.concatenate([_UNITS, -_UNITS]).astype(np.float64)
"""Of each FP16 pattern: value in units of 2^-24 (an integer of up to 40 bits); 0 for infinities and NaN."""

_LOWEST = np.tile(np.where(_UNITS != 0, np.frexp((_UNITS & -_UNITS).astype(np.float64))[1] - 1, 63), 2)
"""Of each FP16 pattern: number of trailing zeros of that integer (63 of zero)."""


def _check_patterns(name: str, bits: ArrayLike) -> NDArray[np.uint16]:
    bits = np.asarray(bits)
    if bits.dtype != np.uint16:
        raise TypeError(f"{name} must be FP16 patterns of type uint16, not {bits.dtype!r}")
    return bits


def _survey(bits: NDArray[np.uint16]) -> tuple[int, bool]:
    """Of the patterns in an array: lowest bit set in any integer (0 if all are zero), and whether there is any infinity
    or NaN."""
    present = np.zeros(1 << 16, bool)
    present[bits] = True
    lowest = int(_LOWEST[present].min(initial=63))
    special = bool(present[FP16.infinity : 0x8000].any() or present[0x8000 + FP16.infinity :].any())
    return (0 if lowest == 63 else lowest), special


def has_special(bits: ArrayLike) -> bool:
    """Whether an array of FP16 patterns has any infinity or NaN."""
    return _survey(_check_patterns("bits", bits))[1]


class _Indicators:
    """0/1 matrices (float32) that say where an operand is what, for sums of special values."""

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        magnitude = bits & np.uint16(0x7FFF)
        negative = bits >= 0x8000
        self.nan = (magnitude > FP16.infinity).astype(np.float32)
        infinite, number = magnitude == FP16.infinity, (magnitude != 0) & (magnitude <= FP16.infinity)
        self.zero = (magnitude == 0).astype(np.float32)
        self.infinite = infinite.astype(np.float32)
        self.positive_infinity = (infinite & ~negative).astype(np.float32)
        self.negative_infinity = (infinite & negative).astype(np.float32)
        self.positive = (number & ~negative).astype(np.float32)
        self.negative = (number & negative).astype(np.float32)
        self.finite_positive = (number & ~negative & ~infinite).astype(np.float32)
        self.finite_negative = (number & negative & ~infinite).astype(np.float32)


def _slices(values: NDArray[np.float64], count: int, width: int) -> list[NDArray[np.float64]]:
    """`values` as `count` signed digits, the lower of `width` bits (magnitude at most 2^(width - 1)), lowest first."""
    out = []
    for _ in range(count - 1):
        upper = np.rint(values * 2.0**-width)
        out.append(values - upper * 2.0**width)
        values = upper
    return [*out, values]


def _best_width(norm: float, terms: int, count: int) -> tuple[int, float]:
    """Width of the digits, and bound on their norms, where a row of `terms` integers and this norm is cut in `count`.

    Lower digits have a norm of at most sqrt(terms) 2^(width - 1), the top one of at most norm 2^-(width (count - 1)),
    plus sqrt(terms) for its rounding; the width is the one that makes the greater of both least.
    """
    if count == 1:
        return 0, norm
    root = terms**0.5
    ideal = log2(max(2 * norm / root, 2.0)) / count
    candidates = []
    for width in (max(1, int(ideal)), int(ideal) + 1):
        candidates.append((max(root * 2.0 ** (width - 1), norm * 2.0 ** -(width * (count - 1)) + root), width))
    bound, width = min(candidates)
    return width, bound


def _plan(norm_a: float, norm_b: float, terms: int) -> tuple[int, int, int, int]:
    """Slices of a, their width, slices of b, their width: the fewest products that are all exact.

    By Cauchy and Schwarz no partial sum of a product exceeds the norm of the row times that of the column.
    """
    for count_a, count_b in ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (2, 3), (3, 2), (3, 3), (4, 4)):
        width_a, bound_a = _best_width(norm_a, terms, count_a)
        width_b, bound_b = _best_width(norm_b, terms, count_b)
        if bound_a * bound_b <= _EXACT:
            return count_a, width_a, count_b, width_b
    raise AssertionError("more terms in a chunk than it can have")


class DenseOperand:
    """The dense operand [K, N] of `exact_matmul`, prepared once for many streamed ones.

    Parameters
    ----------
    bits : uint16 array
        FP16 patterns, shape [K, N].

    Raises
    ------
    TypeError, ValueError
        If `bits` is not a uint16 matrix.
    """

    def __init__(self, bits: ArrayLike) -> None:
        bits = _check_patterns("b_bits", bits)
        if bits.ndim != 2:
            raise ValueError(f"b_bits must have 2 dimensions, not {bits.ndim!r}")
        self.bits = bits
        self.lowest, self.special = _survey(bits)
        self.values = _INTEGER[bits] * 2.0**-self.lowest
        self._slices: dict[tuple[int, int], list[NDArray[np.float64]]] = {}
        self._indicators: _Indicators | None = None
        self.norm = float(np.sqrt(np.einsum("ij,ij->j", self.values, self.values).max(initial=0.0)))

    def slices(self, count: int, width: int) -> list[NDArray[np.float64]]:
        """The matrix as signed digits (cached)."""
        if (count, width) not in self._slices:
            self._slices[count, width] = _slices(self.values, count, width)
        return self._slices[count, width]

    @property
    def indicators(self) -> _Indicators:
        """Where the matrix is what (cached)."""
        if self._indicators is None:
            self._indicators = _Indicators(self.bits)
        return self._indicators


class StreamedTensor:
    """A streamed tensor of any shape, as float64 integers, from which chunks of matrices are cut.

    Attributes
    ----------
    values : float64 array
        Value over 2^(lowest - 24); 0 for infinities and NaN.
    lowest : int
        Lowest bit set in any element.
    special : bool
        Whether there is an infinity or NaN.
    """

    def __init__(self, bits: ArrayLike) -> None:
        self.bits = _check_patterns("a_bits", bits)
        self.lowest, self.special = _survey(self.bits)
        self.values = _INTEGER[self.bits]
        if self.lowest:
            self.values *= 2.0**-self.lowest


def accumulate_product(
    out: ExactSum,
    values: NDArray[np.float64],
    bits: "NDArray[np.uint16] | None",
    source: StreamedTensor,
    dense: DenseOperand,
    norm: "float | None" = None,
) -> None:
    """out += A @ B exactly, in place.

    Parameters
    ----------
    out : ExactSum
        Shape [M, N].
    values : float64 array
        A [M, K], cut from `source.values` (zeros elsewhere); K at most 2^16.
    bits : uint16 array or None
        Patterns of A, needed where `source` or `dense` has an infinity or NaN.
    norm : float or None
        Greatest Euclidean norm of the rows of `values`, where the caller has a cheap bound.
    """
    if values.size == 0 or dense.values.size == 0:
        return
    if norm is None:
        norm = float(np.sqrt(np.einsum("ij,ij->i", values, values).max()))
    if norm and dense.norm:
        count_a, width_a, count_b, width_b = _plan(norm, dense.norm, values.shape[1])
        a_slices, b_slices = _slices(values, count_a, width_a), dense.slices(count_b, width_b)
        for i, a in enumerate(a_slices):
            if count_a > 1 and not a.any():
                continue
            for j, b in enumerate(b_slices):
                if count_b > 1 and not b.any():
                    continue
                out.add_scaled(a @ b, source.lowest + dense.lowest + i * width_a + j * width_b)
    if source.special or dense.special:
        assert bits is not None
        _accumulate_special(out, _Indicators(bits), dense.indicators)


def _accumulate_special(out: ExactSum, a: _Indicators, b: _Indicators) -> None:
    some = np.float32(1) - a.zero
    out.nan |= (a.nan.sum(1, keepdims=True) > 0) | (some @ b.nan > 0) | (a.infinite @ b.zero > 0)
    pinf = a.positive_infinity @ b.positive + a.negative_infinity @ b.negative
    pinf += a.finite_positive @ b.positive_infinity + a.finite_negative @ b.negative_infinity
    ninf = a.positive_infinity @ b.negative + a.negative_infinity @ b.positive
    ninf += a.finite_positive @ b.negative_infinity + a.finite_negative @ b.positive_infinity
    out.pinf |= pinf > 0
    out.ninf |= ninf > 0


_MAX_TERMS = 1 << 16
_CHUNK = 1 << 20
"""Elements of A in a chunk: what fits the cache of the processor's last level."""


def _chunks(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def exact_matmul(a_bits: ArrayLike, b_bits: "ArrayLike | DenseOperand") -> ExactSum:
    """Exact sums of products of FP16 matrices.

    Parameters
    ----------
    a_bits : uint16 array
        Streamed operand [M, K]; its zeros of either sign are skipped, even against infinity and NaN.
    b_bits : uint16 array or DenseOperand
        Dense operand [K, N]; against its zeros an infinity gives NaN.

    Returns
    -------
    ExactSum
        Shape [M, N].

    Raises
    ------
    TypeError, ValueError
        If an operand is not a uint16 matrix, or the shapes do not agree.
    """
    a_bits = _check_patterns("a_bits", a_bits)
    if a_bits.ndim != 2:
        raise ValueError(f"a_bits must have 2 dimensions, not {a_bits.ndim!r}")
    b_array = b_bits.bits if isinstance(b_bits, DenseOperand) else _check_patterns("b_bits", b_bits)
    if b_array.ndim != 2 or b_array.shape[0] != a_bits.shape[1]:
        raise ValueError(f"b_bits must have shape [{a_bits.shape[1]}, N], not {b_array.shape!r}")
    out = ExactSum.zeros((a_bits.shape[0], b_array.shape[1]))
    for terms in _chunks(a_bits.shape[1], _MAX_TERMS):
        whole = terms == slice(0, a_bits.shape[1])
        dense = b_bits if whole and isinstance(b_bits, DenseOperand) else DenseOperand(b_array[terms])
        source = StreamedTensor(a_bits[:, terms])
        for rows in _chunks(a_bits.shape[0], max(1, _CHUNK // max(1, source.values.shape[1]))):
            accumulate_product(out[rows], source.values[rows], source.bits[rows], source, dense)
    return out


def exact_dot_sum(
    a_bits: ArrayLike, b_bits: ArrayLike, axis: "int | Sequence[int] | None" = None, *, skip_zeros: bool = True
) -> ExactSum:
    """Exact sums of elementwise products of FP16 arrays over some axes.

    Parameters
    ----------
    a_bits, b_bits : uint16 array
        Patterns of shapes that broadcast; b may be the scalar pattern 0x3C00 (1.0) for a sum of a.
    axis : int, sequence of int or None
        Axes to sum over; all if None.
    skip_zeros : bool
        Zeros of a contribute nothing even against infinity and NaN; else those give NaN.

    Returns
    -------
    ExactSum
        Of the shape of the remaining axes.

    Raises
    ------
    TypeError, ValueError
        If an operand is not of type uint16 or the shapes do not broadcast.
    """
    a_bits, b_bits = _check_patterns("a_bits", a_bits), _check_patterns("b_bits", b_bits)
    (lowest_a, special_a), (lowest_b, special_b) = _survey(a_bits), _survey(b_bits)
    lowest, special = lowest_a + lowest_b, special_a or special_b
    a, b = np.broadcast_arrays(a_bits, b_bits)
    axes = tuple(range(a.ndim)) if axis is None else (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    axes = tuple(sorted(one % a.ndim for one in axes))
    kept = [one for one in range(a.ndim) if one not in axes]
    shape = tuple(a.shape[one] for one in kept)
    terms = int(np.prod([a.shape[one] for one in axes], dtype=np.int64))
    a = a.transpose(*axes, *kept).reshape(terms, *shape)
    b = b.transpose(*axes, *kept).reshape(terms, *shape)
    out = ExactSum.zeros(shape)
    for part in _chunks(terms, 1 << 24):
        products = _INTEGER[a[part]] * _INTEGER[b[part]]  # exact: 22 bits
        products *= 2.0**-lowest
        if np.abs(products).sum(0).max(initial=0.0) <= _EXACT:
            out.add_scaled(products.sum(0), lowest)
        else:
            for index, digit in enumerate(_slices(products, 3, 28)):
                out.add_scaled(digit.sum(0), lowest + 28 * index)
        if special:
            _dot_special(out, a[part], b[part], skip_zeros)
    return out


def _dot_special(out: ExactSum, a: NDArray[np.uint16], b: NDArray[np.uint16], skip_zeros: bool) -> None:
    with np.errstate(invalid="ignore"):
        products = decode(FP16, a) * decode(FP16, b)
    if skip_zeros:
        products[(a & np.uint16(0x7FFF)) == 0] = 0.0
    out.nan |= np.isnan(products).any(0)
    out.pinf |= (products == inf).any(0)
    out.ninf |= (products == -inf).any(0)


# Rounding


def _leading(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Bits in use of each value (0 of 0)."""
    as_float = (values & ~(values >> np.uint64(1))).astype(np.float64)  # cannot round up to a power of two
    return np.maximum((as_float.view(np.int64) >> 52) - 1022, 0)


def _to_odd(hi: NDArray[np.int64], lo: NDArray[np.uint64]) -> NDArray[np.float64]:
    """128-bit integers as float64, rounded to odd: what is inexact has its last bit set.

    A rounding to fewer bits (at least two fewer) of the result is then a rounding of the integer.
    """
    small = lo.view(np.int64)
    if np.array_equal(hi, small >> 63):
        if small.size == 0 or (small.max() <= 1 << 53 and small.min() >= -(1 << 53)):
            return small.astype(np.float64)
        fits = (small <= 1 << 53) & (small >= -(1 << 53))
        shift = np.maximum(_leading(np.abs(small).view(np.uint64)) - 53, 0)
        odd = (small >> shift) | ((small & ((1 << shift) - 1)) != 0)
        return np.where(fits, small.astype(np.float64), np.ldexp(odd.astype(np.float64), shift))
    negative = hi < 0
    upper, lower = hi.view(np.uint64), lo
    lower = np.where(negative, ~lower + np.uint64(1), lower)
    upper = np.where(negative, ~upper + (lower == 0), upper)
    # Shift the number left until its upper half is full, keep 53 bits of it.
    swap = upper == 0
    exponent = np.where(swap, 0, 64)
    upper, lower = np.where(swap, lower, upper), np.where(swap, np.uint64(0), lower)
    used = _leading(upper)
    left = (64 - used).astype(np.uint64)
    none, full = left == 0, left == 64
    left_safe = np.where(none | full, np.uint64(1), left)
    head = np.where(none | full, upper, upper << left_safe | lower >> (np.uint64(64) - left_safe))
    rest = np.where(none | full, lower, lower << left_safe)
    sticky = ((head & np.uint64(0x7FF)) != 0) | (rest != 0)
    top = (head >> np.uint64(11)) | sticky.astype(np.uint64)
    value = np.ldexp(top.astype(np.float64), exponent - (64 - used) + 11)
    return np.where(full, 0.0, np.where(negative, -value, value))


def round_sum(sums: ExactSum, shift: int = 0, fmt: str = "fp16", saturate: bool = False) -> NDArray[Any]:
    """Sums times 2^shift, rounded once to nearest, ties to even.

    Parameters
    ----------
    sums : ExactSum
    shift : int
        Exponent of the scaling before the rounding.
    fmt : {"fp16", "fp32"}
    saturate : bool
        A finite sum beyond the largest finite number gives that, with its sign, instead of infinity.

    Returns
    -------
    uint16 array of FP16 patterns, or float32 array
        An exact zero is +0, a negative sum that underflows -0; NaN (canonical) if `nan` or both infinities are set,
        else the infinity if one is.

    Raises
    ------
    ValueError
        If `fmt` is not known.
    """
    if fmt not in ("fp16", "fp32"):
        raise ValueError(f"fmt must be fp16 or fp32, not {fmt!r}")
    values = _to_odd(sums.hi, sums.lo)
    with np.errstate(over="ignore", under="ignore"):
        values = np.ldexp(values, shift + LSB_EXPONENT)
    info = FP16 if fmt == "fp16" else FP32
    if saturate and np.isinf(values).any():
        values = np.clip(values, -1e300, 1e300)  # a sum is finite
    patterns = round_encode(info, values, saturate)
    if sums.nan.any() or sums.pinf.any() or sums.ninf.any():
        patterns = patterns.copy()
        patterns[sums.pinf] = info.infinity
        patterns[sums.ninf] = info.infinity | info.sign_bit
        patterns[sums.nan | (sums.pinf & sums.ninf)] = info.nan
    return patterns if fmt == "fp16" else patterns.view(np.float32)


# Scalar reference


def exact_dot_scalar(
    a_patterns: Sequence[int], b_patterns: Sequence[int], skip_zeros: bool = True
) -> tuple[int, bool, bool, bool]:
    """Reference of an exact sum of products, in Python integers.

    Returns
    -------
    tuple
        The sum of the finite products in units of 2^-48, and the flags nan, pinf, ninf.
    """
    total, flags = Fraction(0), [False, False, False]
    for a_pattern, b_pattern in zip(a_patterns, b_patterns, strict=True):
        a, b = decode_scalar(FP16, int(a_pattern)), decode_scalar(FP16, int(b_pattern))
        if a == 0 and skip_zeros:
            continue
        special = [value for value in (a, b) if isinstance(value, float) and (isnan(value) or isinf(value))]
        if not special:
            total += Fraction(a) * Fraction(b)
        elif any(isnan(value) for value in special) or a == 0 or b == 0:
            flags[0] = True
        else:
            flags[2 if (a < 0) != (b < 0) else 1] = True
    units = total * 2**-LSB_EXPONENT
    assert units.denominator == 1
    return int(units), flags[0], flags[1], flags[2]


def round_sum_scalar(
    total: int,
    flags: tuple[bool, bool, bool] = (False, False, False),
    shift: int = 0,
    fmt: str = "fp16",
    saturate: bool = False,
) -> "Fraction | float":
    """Reference of `round_sum`: the rounded value of one sum (in units of 2^-48) with flags nan, pinf, ninf."""
    is_nan, pinf, ninf = flags
    if is_nan or (pinf and ninf):
        return nan
    if pinf or ninf:
        return inf if pinf else -inf
    value = Fraction(total) * Fraction(2) ** (shift + LSB_EXPONENT)
    return round_scalar(FP16 if fmt == "fp16" else FP32, value, saturate)
