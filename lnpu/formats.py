"""Layouts of elements, partial sums and encoded blocks that several blocks of the chip share."""

from amaranth.lib import data, enum

__all__ = [
    "BLOCK",
    "F16_INF",
    "F16_NAN",
    "F32_NAN",
    "LOW_BITS",
    "MAX_LENGTH",
    "MAX_LOG2_RUN",
    "PSUM_WORD",
    "SLOT_BYTES",
    "Code",
    "NonzeroMode",
    "PrecisionMode",
    "TensorKind",
    "element_beat",
    "psum_layout",
]

BLOCK = 64
"""Elements in an encoded block of a tensor (fixed by the memory format)."""

SLOT_BYTES = 160
"""Bytes of memory for each encoded block of a run, whatever it needs."""

MAX_LENGTH = 145
"""Bytes of the longest encoded block."""

MAX_LOG2_RUN = 4
"""Encoded blocks of a run: 2 to this power at most, and at most as many as an AXI word has bytes."""

LOW_BITS = 7
"""Low bits of an FP16 pattern that are zero in every FP8 value: E4M3 has 3 bits of mantissa, FP16 has 10."""

PSUM_WORD = 40
"""Bits of the words in which exact sums are added, see `psum_layout`."""

F16_INF, F16_NAN, F32_NAN = 0x7C00, 0x7E00, 0x7FC00000
"""Canonical encodings: every NaN that the chip makes is one of the last two."""


class Code(enum.Enum, shape=2):
    """What an element is, beside its value."""

    ZERO = 0
    PADDING = 1  # a zero that no memory holds: outside the tensor
    FP8 = 2
    FP16 = 3


class NonzeroMode(enum.Enum, shape=2):
    """Bits 1:0 of a block's header."""

    DENSE = 0  # no mask: every element has a payload
    MASKED = 1  # 64-bit mask follows
    EMPTY = 2  # every element is zero: nothing follows


class PrecisionMode(enum.Enum, shape=2):
    """Bits 3:2 of a block's header."""

    FP8 = 0
    FP16 = 1
    MIXED = 2  # one bit a non-zero follows (1: FP16)
    FEW = 3  # a byte for each FP16 element follows: which of the non-zeros it is


class TensorKind(enum.Enum, shape=3):
    """What a transfer counts as in the external-memory-access counters."""

    PROGRAM = 0
    ACTIVATION = 1
    ERROR = 2
    WEIGHT = 3
    GRADIENT = 4
    OPTIMIZER = 5
    NORM = 6
    OTHER = 7


def element_beat(beat: int) -> data.StructLayout:
    """`beat` elements: FP16 patterns (FP8 values expanded exactly; 0x0000 for zero and padding) and their codes."""
    return data.StructLayout({"data": data.ArrayLayout(16, beat), "code": data.ArrayLayout(2, beat)})


def psum_layout(acc_bits: int) -> data.StructLayout:
    """An exact partial sum: two's complement value (LSB 2^-48) and what non-finite operands contributed.

    The value is `acc` plus, for every i, carries[i] * 2^(PSUM_WORD * (i + 1)), modulo 2^acc_bits: an addition carries
    only within words of PSUM_WORD bits, and what goes on into the next word is added together with the next product.
    """
    return data.StructLayout({"acc": acc_bits, "carries": (acc_bits - 1) // PSUM_WORD, "nan": 1, "pinf": 1, "ninf": 1})
