"""Decides, element by element, between zero, FP8 and FP16, and rounds FP16 to FP8."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from lnpu.formats import F16_INF, Code
from lnpu.hdl import Block

__all__ = ["Quantizer"]

E4M3_MAX = 0x7E  # 448
ROUNDS_TO_MAX = 0x5F40  # FP16 magnitude 464, the largest that is not rounded beyond 448
ROUNDS_TO_ZERO = 0x1400  # 2^-10, the largest that is rounded to zero


class Quantizer(Block):
    """FGMP choice and FP8 (E4M3) rounding of one FP16 element. Combinational.

    The rules are the table of FGMP in `docs/architecture.md`. Where it is silent: an element below `lo` that is to be
    FP8 saturates whatever `above` is; `below` = 3 (which no unit lets pass) acts as 2.

    Members
    -------
    v : In(16)
        FP16 pattern of the element.
    lo, hi : In(15)
        Magnitudes (FP16 patterns without the sign) between which the element is FP8.
    below : In(2)
        Magnitudes less than `lo` become 0: FP16; 1: FP8; 2: zero.
    above : In(1)
        Magnitudes greater than `hi` become 0: FP16; 1: FP8. From `lo` to `hi`, an FP8 rounding beyond 448 gives way to
        FP16 (0) or saturates (1).
    code : Out(2)
        `Code.ZERO`, `Code.FP8` or `Code.FP16`.
    fp8 : Out(8)
        Payload byte where `code` is FP8, else unspecified.
    value : Out(16)
        FP16 pattern of what is kept: `v`, the FP8 value, or +0.
    underflow : Out(1)
        A non-zero became zero.
    """

    combinational = True

    def __init__(self) -> None:
        super().__init__(
            {
                "v": In(16),
                "lo": In(15),
                "hi": In(15),
                "below": In(2),
                "above": In(1),
                "code": Out(2),
                "fp8": Out(8),
                "value": Out(16),
                "underflow": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        magnitude = self.v[:15]
        sign = self.v[15]
        exponent = self.v[10:15]

        # Normal E4M3 results: drop 7 bits of the mantissa (a carry runs into the exponent) and rebias from 15 to 7.
        half = Signal(1)
        normal = Signal(9)
        m.d.comb += [
            half.eq(magnitude[6] & (magnitude[:6].any() | magnitude[7])),
            normal.eq(magnitude[7:] + half - (8 << 3)),
        ]
        # Subnormal results, in units of 2^-9: FP16 exponents 5 to 8 hold 1.f * 2^-10 to 1.f * 2^-7, less is below 1/2.
        mantissa = self.v[:10]
        subnormal = Signal(4)
        with m.Switch(exponent):
            for e in (5, 6, 7, 8):
                kept = e - 6  # mantissa bits above the unit; the leading one is bit `kept`
                with m.Case(e):
                    if e == 5:
                        m.d.comb += subnormal.eq(mantissa.any())
                    else:
                        whole = Cat(mantissa[10 - kept :], Const(1, 1))
                        guard = mantissa[9 - kept]
                        rest = mantissa[: 9 - kept].any()
                        m.d.comb += subnormal.eq(whole + (guard & (rest | whole[0])))
            with m.Default():
                m.d.comb += subnormal.eq(0)

        is_normal = Signal()
        beyond = Signal()
        rounded = Signal(7)
        m.d.comb += [
            is_normal.eq(exponent >= 9),
            beyond.eq(magnitude > ROUNDS_TO_MAX),
            rounded.eq(Mux(is_normal, Mux(beyond, E4M3_MAX, normal[:7]), subnormal)),
        ]

        expanded = Signal(15)
        with m.If(rounded[3:].any()):
            m.d.comb += expanded.eq(Cat(Const(0, 7), rounded[:3], rounded[3:] + Const(8, 5)))
        with m.Elif(rounded[2]):
            m.d.comb += expanded.eq(Cat(Const(0, 8), rounded[:2], Const(8, 5)))
        with m.Elif(rounded[1]):
            m.d.comb += expanded.eq(Cat(Const(0, 9), rounded[0], Const(7, 5)))
        with m.Else():
            m.d.comb += expanded.eq(Cat(Const(0, 11), rounded[0], rounded[0], Const(0, 2)))

        is_zero = Signal()
        finite = Signal()
        less = Signal()
        wants_fp8 = Signal()
        to_fp8 = Signal()
        to_zero = Signal()
        m.d.comb += [
            is_zero.eq(magnitude == 0),
            finite.eq(magnitude < F16_INF),
            less.eq(magnitude < self.lo),
            wants_fp8.eq(Mux(less, self.below == 1, (magnitude <= self.hi) | self.above)),
            to_fp8.eq(finite & wants_fp8 & (~beyond | less | self.above)),
            to_zero.eq(is_zero | (to_fp8 & (magnitude <= ROUNDS_TO_ZERO)) | (finite & less & self.below[1])),
            self.underflow.eq(to_zero & ~is_zero),
            self.fp8.eq(Cat(rounded, sign)),
        ]
        with m.If(to_zero):
            m.d.comb += [self.code.eq(Code.ZERO), self.value.eq(0)]
        with m.Elif(to_fp8):
            m.d.comb += [self.code.eq(Code.FP8), self.value.eq(Cat(expanded, sign))]
        with m.Else():
            m.d.comb += [self.code.eq(Code.FP16), self.value.eq(self.v)]
        return m
