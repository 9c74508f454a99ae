"""Conversions between FP16 and FP32 with a power-of-two scale."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib.wiring import In, Out

from lnpu.formats import F16_INF, F16_NAN, F32_NAN
from lnpu.fp.common import (
    Unpacked,
    leading_zeros,
    normalise,
    register,
    round_packed,
    shift_left,
    shift_right_sticky,
    unpack,
)
from lnpu.hdl import Block

__all__ = ["HalfToSingle", "SingleToHalf", "decode_half", "half_to_single"]


def decode_half(m: Module, i: Value, *, name: str = "half") -> Unpacked:
    """Fields of an FP16 pattern: its finite value is (-1)^sign * significand (11 bits) * 2^(exponent - 25)."""
    return unpack(m, i, exponent_bits=5, fraction_bits=10, name=name)


def half_to_single(m: Module, i: Value, scale: Value, *, name: str = "single") -> Signal:
    """FP32 pattern of FP16 `i` times 2^scale; see `HalfToSingle`."""
    half = decode_half(m, i, name=f"{name}_half")
    normal, _, count = normalise(m, half.significand, keep=11, name=f"{name}_normal")
    exponent = Signal(8, name=f"{name}_exponent")
    result = Signal(32, name=name)
    m.d.comb += exponent.eq(half.exponent + scale - count + (127 - 15))
    with m.If(half.nan):
        m.d.comb += result.eq(F32_NAN)
    with m.Elif(half.infinite):
        m.d.comb += result.eq(Cat(Const(0, 23), Const(0xFF, 8), half.sign))
    with m.Elif(half.zero):
        m.d.comb += result.eq(Cat(Const(0, 31), half.sign))
    with m.Else():
        m.d.comb += result.eq(Cat(Const(0, 13), normal[:10], exponent, half.sign))
    return result


class HalfToSingle(Block):
    """FP16 times 2^scale, exactly, in FP32. Subnormals are normalised; NaN gives 0x7FC00000.

    Members
    -------
    i : In(16)
        FP16 pattern.
    scale : In(signed(8))
        -64 to 64. (The result is right from -102 to 112, where it is a normal FP32 number, and unspecified elsewhere.)
    o : Out(32)
        FP32 pattern.
    """

    combinational = True

    def __init__(self) -> None:
        super().__init__({"i": In(16), "scale": In(signed(8)), "o": Out(32)})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.o.eq(half_to_single(m, self.i, self.scale))
        return m


class SingleToHalf(Block):
    """FP32 times 2^-scale, rounded once to FP16 (to nearest even), subnormals of both formats included.

    Takes operands in every cycle with `enable`; the result is on `o` after `LATENCY` such cycles.

    Members
    -------
    enable : In(1)
        All registers hold while it is 0.
    i : In(32)
        FP32 pattern.
    scale : In(signed(8))
        Any.
    saturate : In(1)
        A finite number beyond the FP16 range gives +-65504, else infinity. Infinity stays infinity.
    o : Out(16)
        FP16 pattern; 0x7E00 for a NaN.
    """

    LATENCY = 2
    """Enabled cycles from operands to result."""

    def __init__(self) -> None:
        super().__init__({"enable": In(1), "i": In(32), "scale": In(signed(8)), "saturate": In(1), "o": Out(16)})

    def elaborate(self, platform):
        m = Module()

        def keep(value, name):
            return register(m, self.enable, value, name=name)

        # 1: normalise: 11 bits, guard and sticky, and how far the highest bit is below the smallest exponent. The zeros
        # are counted beside the shifter, so that the exponent does not wait for it.
        single = unpack(m, self.i, exponent_bits=8, fraction_bits=23, name="single")
        count = Signal(5)
        m.d.comb += count.eq(leading_zeros(single.significand))
        normal, rest = shift_left(m, single.significand, count, keep=12, name="normal")
        distance = Signal(signed(10))
        m.d.comb += distance.eq(count - (single.exponent - self.scale - (127 - 15 + 1)))
        significand_1 = keep(Cat(rest, normal), "significand_1")
        distance_1 = keep(distance, "distance_1")
        sign_1 = keep(single.sign, "sign_1")
        nan_1 = keep(single.nan, "nan_1")
        infinite_1 = keep(single.infinite, "infinite_1")
        zero_1 = keep(single.zero, "zero_1")
        saturate_1 = keep(self.saturate, "saturate_1")

        # 2: align to the smallest exponent, and round. From the largest number, all ones, a guard bit rounds up.
        amount = Signal(4)
        field = Signal(5)
        beyond = Signal()
        m.d.comb += beyond.eq((distance_1 < -29) | ((distance_1 == -29) & significand_1[1:].all()))
        with m.If(distance_1 > 15):
            m.d.comb += amount.eq(15)
        with m.Elif(distance_1 > 0):
            m.d.comb += amount.eq(distance_1)
        with m.Else():
            m.d.comb += field.eq(1 - distance_1)
        aligned = shift_right_sticky(m, significand_1, amount, name="align")
        rounded = round_packed(m, Cat(aligned[2:12], field), aligned[1], aligned[0], name="half")
        result = Signal(16)
        with m.If(nan_1):
            m.d.comb += result.eq(F16_NAN)
        with m.Elif(infinite_1):
            m.d.comb += result.eq(Cat(Const(F16_INF, 15), sign_1))
        with m.Elif(zero_1):
            m.d.comb += result.eq(Cat(Const(0, 15), sign_1))
        with m.Elif(beyond):
            m.d.comb += result.eq(Cat(Mux(saturate_1, F16_INF - 1, F16_INF)[:15], sign_1))
        with m.Else():
            m.d.comb += result.eq(Cat(rounded, sign_1))
        m.d.comb += self.o.eq(keep(result, "result_2"))
        return m
