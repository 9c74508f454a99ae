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

    LATENCY = 4
    """Enabled cycles from operands to result."""

    def __init__(self) -> None:
        super().__init__({"enable": In(1), "a": In(32), "b": In(32), "subtract": In(1), "o": Out(32)})

    def elaborate(self, platform):
        m = Module()

        def keep(value, name):
            return register(m, self.enable, value, name=name)

        # 1: the larger magnitude first.
        b_sign = self.b[31] ^ self.subtract
        a = unpack(m, self.a, exponent_bits=8, fraction_bits=23, name="a")
        b = unpack(m, self.b, exponent_bits=8, fraction_bits=23, name="b")
        swap = Signal()
        opposite = Signal()
        m.d.comb += [swap.eq(self.b[:31] > self.a[:31]), opposite.eq(a.sign ^ b_sign)]
        sign_1 = keep(Mux(swap, b_sign, a.sign), "sign_1")
        opposite_1 = keep(opposite, "opposite_1")
        exponent_1 = keep(Mux(swap, b.exponent, a.exponent), "exponent_1")
        significand_1 = keep(Mux(swap, b.significand, a.significand), "significand_1")
        lesser_exponent_1 = keep(Mux(swap, a.exponent, b.exponent), "lesser_exponent_1")
        lesser_significand_1 = keep(Mux(swap, a.significand, b.significand), "lesser_significand_1")
        nan_1 = keep(a.nan | b.nan | (a.infinite & b.infinite & opposite), "nan_1")
        infinite_1 = keep(a.infinite | b.infinite, "infinite_1")

        # 2: the other aligned to it. Three bits (guard, round, sticky) below.
        distance = Signal(8)
        amount = Signal(5)
        m.d.comb += [
            distance.eq(exponent_1 - lesser_exponent_1),
            amount.eq(Mux(distance[5:].any(), 31, distance[:5])),
        ]
        aligned = shift_right_sticky(m, Cat(Const(0, 3), lesser_significand_1), amount, name="align")
        aligned_2 = keep(aligned, "aligned_2")
        sign_2 = keep(sign_1, "sign_2")
        opposite_2 = keep(opposite_1, "opposite_2")
        exponent_2 = keep(exponent_1, "exponent_2")
        significand_2 = keep(significand_1, "significand_2")
        nan_2 = keep(nan_1, "nan_2")
        infinite_2 = keep(infinite_1, "infinite_2")

        # 3: sum and its leading zeros.
        total = Signal(28)
        m.d.comb += total.eq(Cat(Const(0, 3), significand_2) + Mux(opposite_2, ~aligned_2, aligned_2)[:27] + opposite_2)
        # In a difference the carry of the two's complement sum goes.
        magnitude = Signal(28)
        m.d.comb += magnitude.eq(Cat(total[:27], total[27] & ~opposite_2))

        sum_3 = keep(magnitude, "sum_3")
        zeros_3 = keep(leading_zeros(magnitude), "zeros_3")
        # A difference of equal numbers is +0; a sum of zeros keeps their sign.
        sign_3 = keep(sign_2 & ~(opposite_2 & ~magnitude.any()), "sign_3")
        exponent_3 = keep(exponent_2, "exponent_3")
        nan_3 = keep(nan_2, "nan_3")
        # The largest exponent and a carry; where only rounding carries, the fraction becomes zero by itself.
        infinite_3 = keep(infinite_2 | (exponent_2[1:].all() & magnitude[27]), "infinite_3")

        # 4: normalise, but not below the smallest exponent; round.
        shift = Signal(5)
        normal = Signal(28)
        field = Signal(8)
        m.d.comb += [
            shift.eq(Mux(zeros_3 > exponent_3, exponent_3, zeros_3)),
            normal.eq(sum_3 << shift),
            field.eq(Mux(normal[27], exponent_3 + 1 - shift, 0)),
        ]
        rounded = round_packed(m, Cat(normal[4:27], field), normal[3], normal[:3].any(), name="sum")
        result = Signal(32)
        with m.If(nan_3):
            m.d.comb += result.eq(F32_NAN)
        with m.Elif(infinite_3):
            m.d.comb += result.eq(Cat(Const(0, 23), Const(0xFF, 8), sign_3))
        with m.Else():
            m.d.comb += result.eq(Cat(rounded, sign_3))
        m.d.comb += self.o.eq(keep(result, "result_4"))
        return m
