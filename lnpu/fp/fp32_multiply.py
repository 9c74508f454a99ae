"""FP32 multiplier."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from lnpu.formats import F32_NAN
from lnpu.fp.common import leading_zeros, register, round_packed, shift_left, unpack
from lnpu.hdl import Block

__all__ = ["Fp32Multiply"]


class Fp32Multiply(Block):
    """a * b: IEEE binary32, to nearest even, with subnormals; every NaN result is 0x7FC00000.

    Takes operands in every cycle with `enable`; the result is on `o` after `LATENCY` such cycles.

    Members
    -------
    enable : In(1)
        All registers hold while it is 0.
    a, b : In(32)
        FP32 patterns.
    o : Out(32)
        FP32 pattern.
    """

    LATENCY = 3
    """Enabled cycles from operands to result."""

    def __init__(self) -> None:
        super().__init__({"enable": In(1), "a": In(32), "b": In(32), "o": Out(32)})

    def elaborate(self, platform):
        m = Module()

        def keep(value, name):
            return register(m, self.enable, value, name=name)

        # 1: the product of the significands, subnormals as they are, and how many zeros those put before it.
        a = unpack(m, self.a, exponent_bits=8, fraction_bits=23, name="a")
        b = unpack(m, self.b, exponent_bits=8, fraction_bits=23, name="b")
        product_1 = keep(a.significand * b.significand, "product_1")
        # Those of two subnormal factors do not matter: they leave no room.
        zeros_1 = keep(leading_zeros(a.significand) | leading_zeros(b.significand), "zeros_1")
        # The left shift that makes the exponent of a one in the product's highest bit 1, the smallest there is; and 32.
        room_1 = keep(a.exponent + b.exponent - (127 - 32), "room_1")
        sign_1 = keep(a.sign ^ b.sign, "sign_1")
        zero_1 = keep(a.zero | b.zero, "zero_1")
        infinite_1 = keep(a.infinite | b.infinite, "infinite_1")
        nan_1 = keep(a.nan | b.nan | (a.infinite & b.zero) | (a.zero & b.infinite), "nan_1")

        # 2: shift by the zeros, but no further than there is room. Where the room is negative, that is to the right:
        # the product begins 32 bits below the top. Of it 26 bits matter, and whether there are ones below.
        tight = Signal()
        needed = Cat(zeros_1, Const(1, 1))
        amount = Signal(6)
        m.d.comb += [
            tight.eq(room_1 < needed),
            amount.eq(Mux(tight, Mux(room_1 < 0, 0, room_1), needed)),
        ]
        shifted, rest = shift_left(m, Cat(product_1, Const(0, 32)), amount, keep=26, name="shifted")
        shifted_2 = keep(shifted, "shifted_2")
        rest_2 = keep(rest, "rest_2")
        exponent_2 = keep(Mux(tight, 1, room_1 + 1 - needed)[:9], "exponent_2")
        sign_2 = keep(sign_1, "sign_2")
        zero_2 = keep(zero_1, "zero_2")
        infinite_2 = keep(infinite_1, "infinite_2")
        nan_2 = keep(nan_1, "nan_2")

        # 3: one more bit to the left where the product's highest bit is zero, and round.
        again = Signal()
        normal = Signal(24)
        exponent = Signal(9)
        with m.If(shifted_2[-1]):
            m.d.comb += exponent.eq(exponent_2)
        with m.Elif(exponent_2 == 1):
            m.d.comb += exponent.eq(0)
        with m.Else():
            m.d.comb += [exponent.eq(exponent_2 - 1), again.eq(1)]
        m.d.comb += normal.eq(Mux(again, shifted_2[:24], shifted_2[1:25]))
        sticky = rest_2 | (~again & shifted_2[0])
        rounded = round_packed(m, Cat(normal[1:], exponent), normal[0], sticky, name="product")
        result = Signal(32)
        with m.If(nan_2):
            m.d.comb += result.eq(F32_NAN)
        with m.Elif(infinite_2 | (~zero_2 & (rounded[23:] >= 0xFF))):
            m.d.comb += result.eq(Cat(Const(0, 23), Const(0xFF, 8), sign_2))
        with m.Elif(zero_2):
            m.d.comb += result.eq(Cat(Const(0, 31), sign_2))
        with m.Else():
            m.d.comb += result.eq(Cat(rounded[:31], sign_2))
        m.d.comb += self.o.eq(keep(result, "result_3"))
        return m
