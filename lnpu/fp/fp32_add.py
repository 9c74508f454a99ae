"""FP32 adder and subtractor."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from lnpu.formats import F32_NAN
from lnpu.fp.common import leading_zeros, register, round_packed, shift_right_sticky, unpack
from lnpu.hdl import Block

__all__ = ["Fp32Add"]


class Fp32Add(Block):
    """a + b, or a - b: IEEE binary32, to nearest even, with subnormals; every NaN result is 0x7FC00000.

    Takes operands in every cycle with `enable`; the result is on `o` after `LATENCY` such cycles.

    Members
    -------
    enable : In(1)
        All registers hold while it is 0.
    a, b : In(32)
        FP32 patterns.
    subtract : In(1)
        Change the sign of `b`.
    o : Out(32)
        FP32 pattern.
    """

    LATENCY = 3
    """Enabled cycles from operands to result."""

    def __init__(self) -> None:
        super().__init__({"enable": In(1), "a": In(32), "b": In(32), "subtract": In(1), "o": Out(32)})

    def elaborate(self, platform):
        m = Module()

        def keep(value, name):
            return register(m, self.enable, value, name=name)

        # 1: the larger magnitude first, the other aligned to it. Three bits (guard, round, sticky) below.
        b_sign = self.b[31] ^ self.subtract
        swap = Signal()
        larger, smaller = Signal(32), Signal(32)
        m.d.comb += [
            swap.eq(self.b[:31] > self.a[:31]),
            larger.eq(Mux(swap, Cat(self.b[:31], b_sign), self.a)),
            smaller.eq(Mux(swap, self.a, Cat(self.b[:31], b_sign))),
        ]
        x = unpack(m, larger, exponent_bits=8, fraction_bits=23, name="larger")
        y = unpack(m, smaller, exponent_bits=8, fraction_bits=23, name="smaller")
        distance = Signal(8)
        amount = Signal(5)
        opposite = Signal()
        m.d.comb += [
            distance.eq(x.exponent - y.exponent),
            amount.eq(Mux(distance[5:].any(), 31, distance[:5])),
            opposite.eq(x.sign ^ y.sign),
        ]
        aligned = shift_right_sticky(m, Cat(Const(0, 3), y.significand), amount, name="align")

        sign_1 = keep(x.sign, "sign_1")
        opposite_1 = keep(opposite, "opposite_1")
        exponent_1 = keep(x.exponent, "exponent_1")
        significand_1 = keep(x.significand, "significand_1")
        aligned_1 = keep(aligned, "aligned_1")
        nan_1 = keep(x.nan | y.nan | (x.infinite & y.infinite & opposite), "nan_1")
        infinite_1 = keep(x.infinite, "infinite_1")

        # 2: sum and its leading zeros.
        total = Signal(28)
        m.d.comb += total.eq(Cat(Const(0, 3), significand_1) + Mux(opposite_1, ~aligned_1, aligned_1)[:27] + opposite_1)
        # In a difference the carry of the two's complement sum goes.
        magnitude = Signal(28)
        m.d.comb += magnitude.eq(Cat(total[:27], total[27] & ~opposite_1))

        sum_2 = keep(magnitude, "sum_2")
        zeros_2 = keep(leading_zeros(magnitude), "zeros_2")
        # A difference of equal numbers is +0; a sum of zeros keeps their sign.
        sign_2 = keep(sign_1 & ~(opposite_1 & ~magnitude.any()), "sign_2")
        exponent_2 = keep(exponent_1, "exponent_2")
        nan_2 = keep(nan_1, "nan_2")
        infinite_2 = keep(infinite_1, "infinite_2")

        # 3: normalise, but not below the smallest exponent; round.
        shift = Signal(5)
        normal = Signal(28)
        field = Signal(8)
        m.d.comb += [
            shift.eq(Mux(zeros_2 > exponent_2, exponent_2, zeros_2)),
            normal.eq(sum_2 << shift),
            field.eq(Mux(normal[27], exponent_2 + 1 - shift, 0)),
        ]
        rounded = round_packed(m, Cat(normal[4:27], field), normal[3], normal[:3].any(), name="sum")
        result = Signal(32)
        with m.If(nan_2):
            m.d.comb += result.eq(F32_NAN)
        with m.Elif(infinite_2 | rounded[23:].all()):
            m.d.comb += result.eq(Cat(Const(0, 23), Const(0xFF, 8), sign_2))
        with m.Else():
            m.d.comb += result.eq(Cat(rounded, sign_2))
        m.d.comb += self.o.eq(keep(result, "result_3"))
        return m
