"""The processing element: one FP16 or two FP8 products a cycle into an exact accumulator."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.formats import PSUM_WORD, psum_layout
from lnpu.hdl import Block

__all__ = ["Pe"]

_LSB = 2
"""The exponents of two factors (at least 1 each) add to at least 2, where a product's LSB is the accumulator's."""

_LOW = 2 * PSUM_WORD
"""Bits of the lower part of the sum."""

_TOP = 3 * PSUM_WORD
"""Products are less than 2^80, so from this bit on they are copies of their sign."""


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

        # A negative product is kept as its complement; stage 2 adds the one that is missing.
        product_high = Signal(signed(16), reset_less=True)
        product_low = Signal(signed(19), reset_less=True)
        shift_high = Signal(6, reset_less=True)
        shift_low = Signal(6, reset_less=True)
        special = Signal(3, reset_less=True)  # nan, pinf, ninf
        load = Signal(name="restart", reset_less=True)
        m.d.sync += [
            product_high.eq(_complemented(factor_high * b0.significand, sign[0])),
            product_low.eq(_complemented(factor_low * b1.significand, sign[1])),
            shift_high.eq(a0.exponent + b0.exponent),
            shift_low.eq(exponent_low + b1.exponent),
            load.eq(self.load),
        ]
        infinite = (self.enable[0] & (a0.top | b0.top), self.enable[1] & pair & b1.top)
        nan = (a0.nan | b0.nan | (a0.zero & b0.top) | (a0.top & b0.zero), b1.nan | a1.zero)
        m.d.sync += special.eq(0)
        with m.If(infinite[0] | infinite[1]):
            m.d.sync += special.eq(
                Cat(
                    (infinite[0] & nan[0]) | (infinite[1] & nan[1]),
                    (infinite[0] & ~nan[0] & ~sign[0]) | (infinite[1] & ~nan[1] & ~sign[1]),
                    (infinite[0] & ~nan[0] & sign[0]) | (infinite[1] & ~nan[1] & sign[1]),
                )
            )

        # Stage 2. The sum is in words, each with a carry for the next that waits for the next addition. Products reach
        # the words below _TOP, which are compressed in two parts, so that a native simulation computes with at most 64
        # bits. Sign bits come from a choice of two constants: as copies of a bit they would be extracted one by one.
        terms_low, terms_high = [], []
        for name, product, shift, up in (
            ("high", product_high, shift_high, 7 - _LSB),
            ("low", product_low, shift_low, -_LSB),
        ):
            # A complement has ones below, too.
            near = Signal(len(product) + 31, name=f"near_{name}")
            far = shift[5]  # by 32 more
            fill = Signal(64, name=f"fill_{name}")
            shifted = Signal(64, name=f"shifted_{name}")
            term_low = Signal(_LOW, name=f"term_{name}_low")
            term_high = Signal(_TOP - _LOW, name=f"term_{name}_high")
            m.d.comb += [
                fill.eq(Mux(product[-1], (1 << 64) - 1, 0)),
                near.eq(Cat(fill[:31], product).as_signed() >> ~shift[:5]),
                shifted.eq(Mux(far, Cat(fill[:32], near[:32]), Cat(near, fill))),
                term_low.eq(Cat(fill[:up], shifted) if up > 0 else shifted[-up:]),
                term_high.eq(Mux(far, Cat(near[_LOW - up - 32 :], fill), fill)),
            ]
            terms_low.append(term_low)
            terms_high.append(term_high)
        one_high, one_low = product_high[-1], product_low[-1]

        psum = self.psum_i
        words = [range(start, min(start + PSUM_WORD, self.acc_bits)) for start in range(0, self.acc_bits, PSUM_WORD)]
        sums = [Signal(len(word), name=f"sum_{i}", reset_less=True) for i, word in enumerate(words)]
        carries = [Signal(name=f"carry_{i}", reset_less=True) for i in range(len(words) - 1)]  # i: into word i + 1
        flags = Signal(3, reset_less=True)
        start = [
            Mux(load, psum.acc[word.start : word.stop], word_sum) for word, word_sum in zip(words, sums, strict=True)
        ]
        carries_in = [one_low, *(Mux(load, psum.carries[i], carry) for i, carry in enumerate(carries))]

        below = _LOW // PSUM_WORD
        bits_low, majority_low, carry_low = _compressed(m, "low", Cat(start[:below]), *terms_low, carry=one_high)
        bits_high, majority_high, carry_high = _compressed(
            m, "high", Cat(start[below : _TOP // PSUM_WORD]), *terms_high, carry=carry_low
        )
        bits, majority = Cat(bits_low, bits_high), Cat(majority_low, majority_high)
        # Above the products are only their signs and a carry; -1 for each sign and 1 for the carry are -2 to 1.
        odd = Signal()
        minus = Signal(PSUM_WORD)
        m.d.comb += [
            odd.eq(one_high ^ one_low ^ carry_high),
            minus.eq(Mux((one_high & one_low) | ((one_high | one_low) & ~carry_high), (1 << PSUM_WORD) - 1, 0)),
        ]
        for i, word in enumerate(words):
            total = Signal(len(word) + 1, name=f"total_{i}")
            if word.start < _TOP:
                x, y = bits[word.start : word.stop], majority[word.start : word.stop]
            elif word.start == _TOP:
                x, y = start[i], Cat(odd, minus[1 : len(word)])
            else:
                x, y = start[i], minus[: len(word)]
            m.d.comb += total.eq(x + y + carries_in[i])
            m.d.sync += sums[i].eq(total)
            if i < len(carries):
                m.d.sync += carries[i].eq(total[-1])
        m.d.sync += flags.eq(Mux(load, Cat(psum.nan, psum.pinf, psum.ninf), flags) | special)
        m.d.comb += [
            self.psum_o.acc.eq(Cat(sums)),
            self.psum_o.carries.eq(Cat(carries)),
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


def _complemented(value, negative):
    """`value` or its complement, one bit wider."""
    return Cat(value ^ Mux(negative, (1 << len(value)) - 1, 0), negative).as_signed()


def _compressed(m, name, a, b, c, carry):
    """Three words of one width as two with the same sum modulo 2^width: bits, and carries from `carry` up.

    The third value is the carry out of the top.
    """
    width = len(a)
    words = [Signal(width, name=f"{name}_{i}") for i in range(3)]
    m.d.comb += [signal.eq(word) for signal, word in zip(words, (a, b, c), strict=True)]
    x, y, z = words
    bits = Signal(width, name=f"{name}_bits")
    majority = Signal(width, name=f"{name}_majority")
    m.d.comb += [bits.eq(x ^ y ^ z), majority.eq((x & y) | ((x ^ y) & z))]
    return bits, Cat(carry, majority[:-1]), majority[-1]
