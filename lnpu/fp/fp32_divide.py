"""FP32 divider and square root."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib.wiring import In, Out

from lnpu.formats import F32_NAN
from lnpu.fp.common import normalise, round_packed, shift_right_sticky, unpack
from lnpu.hdl import Block

__all__ = ["Fp32DivideSqrt"]

_STEPS = 26  # result bits: 24, the guard bit, and one more as a quotient's first bit may be zero
_FRACTION = _STEPS - 1  # fraction bits of the remainder, the divisor and the result


class Fp32DivideSqrt(Block):
    """a / b, or the square root of a: IEEE binary32, to nearest even, with subnormals; NaN results are 0x7FC00000.

    One bit a cycle. Every operation takes `LATENCY` cycles, so units that start together finish together.

    Members
    -------
    start : In(1)
        Take the operands; ignored while busy. It may come in the cycle of `done`.
    sqrt : In(1)
        Square root of `a`, else a / b.
    a, b : In(32)
        FP32 patterns, read in the cycle of `start`.
    busy : Out(1)
        From the cycle after `start` to the cycle before `done`.
    done : Out(1)
        One-cycle pulse.
    o : Out(32)
        FP32 pattern, valid in the cycle of `done` and held until the next one.
    """

    LATENCY = _STEPS + 5
    """Cycles from `start` to `done`."""

    def __init__(self) -> None:
        super().__init__(
            {
                "start": In(1),
                "sqrt": In(1),
                "a": In(32),
                "b": In(32),
                "busy": Out(1),
                "done": Out(1),
                "o": Out(32),
            }
        )

    def elaborate(self, platform):
        m = Module()
        x = Signal(32, reset_less=True)  # the operand to normalise
        y = Signal(32, reset_less=True)
        root = Signal(reset_less=True)
        sign = Signal(reset_less=True)
        nan, infinite, zero = (Signal(reset_less=True, name=name) for name in ("nan", "infinite", "zero"))
        exponent = Signal(signed(10), reset_less=True)  # of the result, biased
        remainder = Signal(3 + _FRACTION, reset_less=True)
        divisor = Signal(1 + _FRACTION, reset_less=True)
        quotient = Signal(1 + _FRACTION, reset_less=True)  # or root
        weight = Signal(1 + _FRACTION, reset_less=True)  # of the next bit of the result

        operand = unpack(m, x, exponent_bits=8, fraction_bits=23, name="operand")
        other = unpack(m, y, exponent_bits=8, fraction_bits=23, name="other")
        normal, _, count = normalise(m, operand.significand, keep=24, name="normal")
        operand_exponent = Signal(signed(10))
        m.d.comb += operand_exponent.eq(operand.exponent - count)

        # R' = 2 (R - D) if that is not negative, and the bit is one; else R' = 2 R. Here D is the divisor, or for the
        # square root Q of X, with R = (X - Q^2) / weight, D = 2 Q + weight.
        subtrahend = Signal(3 + _FRACTION)
        difference = Signal(4 + _FRACTION)
        m.d.comb += [
            subtrahend.eq(Mux(root, Cat(Const(0, 1), quotient) | weight, divisor)),
            difference.eq(remainder - subtrahend),
        ]

        # The result as 24 bits, guard and sticky, aligned to its exponent or to the smallest one there is.
        inexact = Signal()
        leading = Signal(_STEPS)
        result_exponent = Signal(signed(10))
        distance = Signal(signed(10))
        amount = Signal(5)
        m.d.comb += [
            inexact.eq(remainder.any()),
            leading.eq(Mux(quotient[-1], Cat(quotient[0] | inexact, quotient[1:]), Cat(inexact, quotient[:-1]))),
            result_exponent.eq(exponent - ~quotient[-1]),
            distance.eq(Cat(quotient[-1], ~quotient[-1]) - exponent),  # 1 - result_exponent
        ]
        with m.If(distance > 31):
            m.d.comb += amount.eq(31)
        with m.Elif(distance > 0):
            m.d.comb += amount.eq(distance)
        aligned = shift_right_sticky(m, leading, amount, name="align")
        rounded = round_packed(m, Cat(quotient[2:-1], exponent[:9]), quotient[1], quotient[0], name="result")

        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)
        m.d.sync += self.done.eq(0)
        with m.FSM(name="state"):
            with m.State("IDLE"), m.If(self.start):
                m.d.sync += [x.eq(self.a), y.eq(self.b), root.eq(self.sqrt), self.busy.eq(1)]
                m.next = "FIRST"
            with m.State("FIRST"):
                m.d.sync += [
                    remainder.eq(Cat(Const(0, _FRACTION - 23), normal)),
                    exponent.eq(operand_exponent),
                    x.eq(y),
                ]
                with m.If(root):
                    m.d.sync += [
                        sign.eq(operand.sign),
                        nan.eq(operand.nan | (operand.sign & ~operand.zero)),
                        infinite.eq(operand.infinite),
                        zero.eq(operand.zero),
                    ]
                with m.Else():
                    m.d.sync += [
                        sign.eq(operand.sign ^ other.sign),
                        nan.eq(
                            operand.nan | other.nan | (operand.infinite & other.infinite) | (operand.zero & other.zero)
                        ),
                        infinite.eq(operand.infinite | other.zero),
                        zero.eq(operand.zero | other.infinite),
                    ]
                m.next = "SECOND"
            with m.State("SECOND"):
                m.d.sync += [
                    divisor.eq(Cat(Const(0, _FRACTION - 23), normal)),
                    quotient.eq(0),
                    weight.eq(1 << _FRACTION),
                ]
                with m.If(root):
                    m.d.sync += exponent.eq((exponent + 127) >> 1)
                    with m.If(~exponent[0]):  # an odd power of two (the bias is odd), half of which rounds down
                        m.d.sync += remainder.eq(remainder << 1)
                with m.Else():
                    m.d.sync += exponent.eq((exponent - operand.exponent + 127) + count)  # the count comes last
                m.next = "STEP"
            with m.State("STEP"):
                with m.If(difference[-1]):
                    m.d.sync += remainder.eq(remainder << 1)
                with m.Else():
                    m.d.sync += [remainder.eq(difference << 1), quotient.eq(quotient | weight)]
                m.d.sync += weight.eq(weight >> 1)
                with m.If(weight[0]):
                    m.next = "ALIGN"
            with m.State("ALIGN"):
                m.d.sync += [quotient.eq(aligned), exponent.eq(Mux(distance > 0, 0, result_exponent))]
                m.next = "ROUND"
            with m.State("ROUND"):
                m.d.sync += [self.done.eq(1), self.busy.eq(0)]
                with m.If(nan):
                    m.d.sync += result.eq(F32_NAN)
                with m.Elif(infinite | (~zero & (rounded[23:] >= 0xFF))):
                    m.d.sync += result.eq(Cat(Const(0, 23), Const(0xFF, 8), sign))
                with m.Elif(zero):
                    m.d.sync += result.eq(Cat(Const(0, 31), sign))
                with m.Else():
                    m.d.sync += result.eq(Cat(rounded[:31], sign))
                m.next = "IDLE"
        return m
