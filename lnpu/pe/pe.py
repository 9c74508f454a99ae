"""The processing element: one FP16 or two FP8 products a cycle into an exact accumulator."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.formats import psum_layout
from lnpu.hdl import Block

__all__ = ["Pe"]

_LSB = 2
"""The exponents of two factors (at least 1 each) add to at least 2, where a product's LSB is the accumulator's."""


class Pe(Block):
    """A processing element.

    Operands that arrive in cycle t are multiplied in t and added in t + 1, so `psum_o` holds their sum from t + 2 on.
    With `load` in cycle t, the sum restarts from `psum_i` of cycle t + 1 and the products of cycle t.

    - `pair` = 0: `enable[0]` adds a[0] * b[0], any FP16 values. `enable[1]`, a[1] and b[1] have no influence.
    - `pair` = 1: `enable[0]` adds a[0] * b[0] and `enable[1]` adds a[1] * b[1], where a[0] and a[1] are E4M3 values as
      FP16 patterns (zero, or normal with at most four significant bits) and b[0] and b[1] any FP16 values.

    Products are exact, subnormals included. A NaN factor or infinity times zero sets `nan` of the sum, an infinite
    product `pinf` or `ninf`; they stay until the next `load`. `acc` has no meaning once one of the three is set.

    Parameters
    ----------
    acc_bits : int
        Width of the sum in two's complement, LSB 2^-48; at least 84.

    Members
    -------
    enable : In(2)
    pair : In(1)
    a, b : In(ArrayLayout(16, 2))
        FP16 patterns.
    load : In(1)
    psum_i : In(psum_layout(acc_bits))
        Read only in the cycle after `load`.
    psum_o : Out(psum_layout(acc_bits))
    """

    def __init__(self, *, acc_bits: int = 97) -> None:
        if acc_bits < 84:
            raise ValueError(f"acc_bits must be at least 84, not {acc_bits!r}")
        self.acc_bits = acc_bits
        super().__init__(
            {
                "enable": In(2),
                "pair": In(1),
                "a": In(data.ArrayLayout(16, 2)),
                "b": In(data.ArrayLayout(16, 2)),
                "load": In(1),
                "psum_i": In(psum_layout(acc_bits)),
                "psum_o": Out(psum_layout(acc_bits)),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.acc_bits}"

    def elaborate(self, platform):
        m = Module()
        pair = self.pair

        # Stage 1. The significand of a is cut into 4 and 7 bits. Without `pair` both parts go with b[0]; with it, the
        # 7-bit multiplier is free for the four significant bits of a[1], and takes b[1].
        enable_low = Mux(pair, self.enable[1], self.enable[0])
        b_low = Signal(16)
        m.d.comb += b_low.eq(Mux(pair, self.b[1], self.b[0]))
        a0, a1, b0 = (_Fp16(word) for word in (self.a[0], self.a[1], self.b[0]))
        b1 = _Fp16(b_low)

        sign = Signal(2)
        m.d.comb += sign.eq(Cat(a0.sign ^ b0.sign, Mux(pair, a1.sign, a0.sign) ^ b1.sign))
        factor_high = Signal(4)
        factor_low = Signal(7)
        m.d.comb += [
            factor_high.eq(Mux(self.enable[0], a0.significand[7:], 0)),
            factor_low.eq(Mux(enable_low, Mux(pair, a1.significand[7:], a0.significand[:7]), 0)),
        ]
        # The parts' weights differ by 2^7; adding that to an E4M3 exponent (at most 23) does not carry.
        exponent_low = Signal(5)
        m.d.comb += exponent_low.eq(Mux(pair, a1.exponent + 7, a0.exponent))

        product_high = Signal(signed(16), reset_less=True)
        product_low = Signal(signed(19), reset_less=True)
        shift_high = Signal(6, reset_less=True)
        shift_low = Signal(6, reset_less=True)
        special = Signal(3, reset_less=True)  # nan, pinf, ninf
        load = Signal(reset_less=True)
        m.d.sync += [
            product_high.eq(_negated(factor_high * b0.significand, sign[0])),
            product_low.eq(_negated(factor_low * b1.significand, sign[1])),
            shift_high.eq(a0.exponent + b0.exponent),
            shift_low.eq(exponent_low + b1.exponent),
            load.eq(self.load),
        ]
        infinite = Cat(
            self.enable[0] & (a0.top | b0.top),
            self.enable[1] & pair & b1.top,
        )
        nan = Cat(
            a0.nan | b0.nan | (a0.zero & b0.top) | (a0.top & b0.zero),
            b1.nan | a1.zero,
        )
        m.d.sync += special.eq(
            Cat((infinite & nan).any(), (infinite & ~nan & ~sign).any(), (infinite & ~nan & sign).any())
        )

        # Stage 2.
        sum_ = Signal(signed(self.acc_bits), reset_less=True)
        flags = Signal(3, reset_less=True)
        psum = self.psum_i
        term_high = Signal(signed(self.acc_bits))
        term_low = Signal(signed(self.acc_bits))
        m.d.comb += [
            term_high.eq(((product_high << shift_high) << 7) >> _LSB),
            term_low.eq((product_low << shift_low) >> _LSB),
        ]
        m.d.sync += [
            sum_.eq(Mux(load, psum.acc.as_signed(), sum_) + term_high + term_low),
            flags.eq(Mux(load, Cat(psum.nan, psum.pinf, psum.ninf), flags) | special),
        ]
        m.d.comb += [
            self.psum_o.acc.eq(sum_),
            Cat(self.psum_o.nan, self.psum_o.pinf, self.psum_o.ninf).eq(flags),
        ]
        return m


class _Fp16:
    """Fields of an FP16 pattern; value = significand * 2^(exponent - 25)."""

    def __init__(self, word) -> None:
        mantissa, exponent = word[:10], word[10:15]
        normal = exponent.any()
        self.sign = word[15]
        self.significand = Cat(mantissa, normal)
        self.exponent = Cat(exponent[0] | ~normal, exponent[1:])
        self.top = exponent.all()
        self.nan = self.top & mantissa.any()
        self.zero = ~normal & ~mantissa.any()


def _negated(value, negative):
    """`value` or -`value`, one bit wider."""
    return (Cat(value ^ negative.replicate(len(value)), negative) + negative)[: len(value) + 1].as_signed()
