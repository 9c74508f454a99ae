"""Fine-grained mixed precision (FGMP): each FP16 value becomes a zero, an FP8 (E4M3) or an FP16 element.

Inside the model, as inside the chip, an element is an FP16 pattern and a code; an FP8 element is the FP16 pattern of
its E4M3 value (every one is a normal FP16 number or zero). A tensor x with scale s is held as v = x * 2^-s.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isnan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from golden.formats import E4M3, FP16, canonical_fp32, decode, decode_scalar, encode_scalar, round_encode, round_scalar

__all__ = [
    "CODE_FP8",
    "CODE_FP16",
    "CODE_PADDING",
    "CODE_ZERO",
    "FP8_POLICY",
    "FP16_POLICY",
    "POLICIES",
    "Policy",
    "Quantised",
    "as_policy",
    "fgmp",
    "quantize",
    "quantize_scalar",
    "to_fp16",
]

CODE_ZERO, CODE_PADDING, CODE_FP8, CODE_FP16 = 0, 1, 2, 3
"""What an element is: a zero, a zero that no memory holds (outside the tensor), FP8, FP16."""

_F16_INFINITY = 0x7C00
_BELOW = ("fp16", "fp8", "zero")
_ABOVE = ("fp16", "fp8")


@dataclass(frozen=True)
class Policy:
    """How a tensor is encoded.

    Parameters
    ----------
    scale : int
        Exponent s of the tensor's scale: elements are v = x * 2^-s. From -128 to 127.
    lo_bits, hi_bits : int
        Limits on the magnitude of v, as 15-bit FP16 patterns, lo_bits <= hi_bits.
    below : {"fp16", "fp8", "zero"}
        What becomes of magnitudes under `lo`.
    above : {"fp16", "fp8"}
        What becomes of magnitudes over `hi` (or whose FP8 rounding is beyond 448): kept in FP16, or saturated to 448.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If a field is out of its range.
    """

    scale: int = 0
    lo_bits: int = 0
    hi_bits: int = 0
    below: str = "fp16"
    above: str = "fp16"

    def __post_init__(self) -> None:
        for name in ("scale", "lo_bits", "hi_bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an integer, not {value!r}")
            object.__setattr__(self, name, int(value))
        if not -128 <= self.scale <= 127:
            raise ValueError(f"scale must be -128 to 127, not {self.scale!r}")
        for name in ("lo_bits", "hi_bits"):
            value = getattr(self, name)
            if not 0 <= value <= 0x7FFF:
                raise ValueError(f"{name} must be 0 to 0x7FFF, not {value!r}")
        if self.lo_bits > self.hi_bits:
            raise ValueError(f"lo_bits must be at most hi_bits = {self.hi_bits:#x}, not {self.lo_bits!r}")
        if self.below not in _BELOW:
            raise ValueError(f"below must be one of {', '.join(_BELOW)}, not {self.below!r}")
        if self.above not in _ABOVE:
            raise ValueError(f"above must be one of {', '.join(_ABOVE)}, not {self.above!r}")

    @classmethod
    def between(
        cls, lo: float = 0.0, hi: float = 0.0, *, scale: int = 0, below: str = "fp16", above: str = "fp16"
    ) -> "Policy":
        """The policy with limits given as numbers.

        Raises
        ------
        ValueError
            If a limit is negative, NaN or not an FP16 number.
        """
        return cls(scale, _limit("lo", lo), _limit("hi", hi), below, above)

    @property
    def lo(self) -> float:
        """The lower limit as a number."""
        return float(decode_scalar(FP16, self.lo_bits))

    @property
    def hi(self) -> float:
        """The upper limit as a number."""
        return float(decode_scalar(FP16, self.hi_bits))

    def with_scale(self, scale: int) -> "Policy":
        """This policy with another scale."""
        return Policy(scale, self.lo_bits, self.hi_bits, self.below, self.above)


def _limit(name: str, value: float) -> int:
    value = float(value)
    if isnan(value) or value < 0 or round_scalar(FP16, value) != value:
        raise ValueError(f"{name} must be a non-negative FP16 number, not {value!r}")
    return encode_scalar(FP16, value)


FP16_POLICY = Policy()
"""Every non-zero element is FP16."""

FP8_POLICY = Policy(0, 0, 0x7BFF, "fp16", "fp8")
"""Every finite non-zero element is FP8, saturated to 448."""

POLICIES = {"fp16": FP16_POLICY, "fp8": FP8_POLICY}
"""The policies that have a name."""


def as_policy(policy: "str | Policy") -> Policy:
    """The policy itself, or that of the name.

    Raises
    ------
    ValueError
        If there is no policy of that name.
    TypeError
        If it is neither a name nor a policy.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or a Policy, not {policy!r}")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    return POLICIES[policy]


def quantize_scalar(pattern: int, policy: Policy) -> tuple[int, int, bool]:
    """Reference of `quantize` for one FP16 pattern: its element's pattern, its code, and whether it underflowed."""
    magnitude = pattern & 0x7FFF
    if magnitude == 0:
        return 0, CODE_ZERO, False
    if magnitude >= _F16_INFINITY:
        return pattern, CODE_FP16, False
    if magnitude < policy.lo_bits:
        choice = policy.below
    elif magnitude <= policy.hi_bits:
        choice = "fp8"
        if policy.above == "fp16" and isnan(round_scalar(E4M3, decode_scalar(FP16, pattern))):
            choice = "fp16"
    else:
        choice = policy.above
    if choice == "fp16":
        return pattern, CODE_FP16, False
    if choice == "zero":
        return 0, CODE_ZERO, True
    value = round_scalar(E4M3, decode_scalar(FP16, pattern), saturate=True)
    if value == 0:
        return 0, CODE_ZERO, True
    return encode_scalar(FP16, Fraction(value)), CODE_FP8, False


@lru_cache(maxsize=1)
def _fp8_tables() -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """For all FP16 patterns: pattern of the saturated E4M3 rounding, and whether the rounding was beyond 448."""
    values = decode(FP16, np.arange(1 << 16, dtype=np.uint16))
    rounded = decode(E4M3, round_encode(E4M3, values, saturate=True))
    beyond = np.isnan(decode(E4M3, round_encode(E4M3, values)))
    return round_encode(FP16, rounded).astype(np.uint16), beyond


@lru_cache(maxsize=64)
def _tables(
    lo: int, hi: int, below: str, above: str
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.bool_]]:
    """`quantize` of all 65,536 FP16 patterns."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    magnitude = patterns & np.uint16(0x7FFF)
    fp8, beyond = _fp8_tables()
    under, inside = magnitude < lo, (magnitude >= lo) & (magnitude <= hi)
    as_fp8 = under & (below == "fp8") | inside & (~beyond | (above == "fp8")) | (magnitude > hi) & (above == "fp8")
    as_zero = under & (below == "zero") | as_fp8 & ((fp8 & np.uint16(0x7FFF)) == 0)
    special, zero = magnitude >= _F16_INFINITY, magnitude == 0
    as_fp8 &= ~special
    as_zero &= ~special
    bits = np.where(as_fp8, fp8, patterns)
    bits[as_zero | zero] = 0
    codes = np.where(as_fp8, np.uint8(CODE_FP8), np.uint8(CODE_FP16))
    codes[as_zero | zero] = CODE_ZERO
    underflow = as_zero & ~zero
    for table in (bits, codes, underflow):
        table.setflags(write=False)
    return bits, codes, underflow


def quantize(
    v_bits: ArrayLike, policy: "str | Policy"
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.bool_]]:
    """FGMP of FP16 values (the policy's scale plays no part: they are scaled already).

    Parameters
    ----------
    v_bits : uint16 array
        FP16 patterns.

    Returns
    -------
    bits : uint16 array
        FP16 patterns of the elements; 0x0000 for zeros of either sign.
    codes : uint8 array
        `CODE_ZERO`, `CODE_FP8` or `CODE_FP16`.
    underflow : bool array
        Non-zeros that became zero.

    Raises
    ------
    TypeError
        If `v_bits` is not of type uint16.
    """
    policy, v_bits = as_policy(policy), np.asarray(v_bits)
    if v_bits.dtype != np.uint16:
        raise TypeError(f"v_bits must be uint16, not {v_bits.dtype!r}")
    bits, codes, underflow = _tables(policy.lo_bits, policy.hi_bits, policy.below, policy.above)
    return bits[v_bits], codes[v_bits], underflow[v_bits]


def to_fp16(x: ArrayLike, scale: int = 0, saturate: bool = False) -> NDArray[np.uint16]:
    """FP16 patterns of x * 2^-scale, rounded once (RNE) from the exact FP32 value.

    Parameters
    ----------
    x : float32 (or float16) array
    scale : int
        From -128 to 127.
    saturate : bool
        An overflow gives the largest finite number instead of infinity. Infinite x stay infinite.

    Raises
    ------
    TypeError
        If x is not of type float32 or float16.
    """
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float16):
        raise TypeError(f"x must be float32 or float16, not {x.dtype!r}")
    if not -128 <= scale <= 127:
        raise ValueError(f"scale must be -128 to 127, not {scale!r}")
    with np.errstate(invalid="ignore"):  # a signalling NaN
        scaled = x.astype(np.float64) * 2.0**-scale
    return round_encode(FP16, scaled, saturate).astype(np.uint16, copy=False)


@dataclass(frozen=True, eq=False)
class Quantised:
    """An FGMP tensor: x = v * 2^scale.

    Attributes
    ----------
    bits : uint16 array
        FP16 patterns of v.
    codes : uint8 array
        Code of each element, same shape.
    scale : int
        Exponent of the tensor's scale.
    underflow : bool array
        Non-zeros that FGMP turned into zeros, same shape.
    """

    bits: NDArray[np.uint16]
    codes: NDArray[np.uint8]
    scale: int
    underflow: NDArray[np.bool_]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.bits.shape

    def values(self) -> NDArray[np.float32]:
        """x in FP32: v * 2^scale. Exact for scales from -125 to 111; beyond, one rounding (RNE)."""
        with np.errstate(over="ignore", under="ignore"):
            return canonical_fp32((decode(FP16, self.bits) * 2.0**self.scale).astype(np.float32))


def fgmp(x: ArrayLike, policy: "str | Policy" = "fp16", saturate: bool = False) -> Quantised:
    """Scale, round to FP16 and quantise: the encoding of tensor x.

    Parameters
    ----------
    x : float32 (or float16) array
    policy : str or Policy
    saturate : bool
        As of `to_fp16`.

    Raises
    ------
    TypeError, ValueError
        As of `to_fp16` and `as_policy`.
    """
    policy = as_policy(policy)
    bits, codes, underflow = quantize(to_fp16(x, policy.scale, saturate), policy)
    return Quantised(bits, codes, policy.scale, underflow)
