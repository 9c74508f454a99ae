"""The processing element: one FP16 or two FP8 products a cycle into an exact accumulator."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.formats import PSUM_WORD, psum_layout
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
        load = Signal(name="restart", reset_less=True)
        m.d.sync += [
            product_high.eq(_negated(factor_high * b0.significand, sign[0])),
            product_low.eq(_negated(factor_low * b1.significand, sign[1])),
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

        # Stage 2. The sum is in words, each with a carry for the next word that waits for the next addition. Nothing is
        # wider than the 64 bits of a native simulation. Signs come from a choice of two constants: as copies of a bit
        # they would be extracted one by one.
        terms = []  # of each product, the words that it reaches
        for name, product, shift, up in (
            ("high", product_high, shift_high, 7 - _LSB),
            ("low", product_low, shift_low, -_LSB),
        ):
            near = Signal(len(product) + 31, name=f"near_{name}")
            far = shift[5]  # by 32 more
            fill = Signal(PSUM_WORD, name=f"fill_{name}")
            words = [Signal(PSUM_WORD, name=f"term_{name}_{i}") for i in range(2)]
            split = PSUM_WORD - up  # where the second word begins
            low = near[:split] if up > 0 else near[-up:]
            below = [Const(0, up)] if up > 0 else []
            m.d.comb += [
                fill.eq(Mux(product[-1], (1 << PSUM_WORD) - 1, 0)),
                near.eq(product << shift[:5]),
                words[0].eq(Mux(far, Cat(Const(0, 32 + up), near[: PSUM_WORD - 32 - up]), Cat(*below, low))),
                words[1].eq(Mux(far, _extended(near[split - 32 :], fill), _extended(near[split:], fill))),
            ]
            terms.append(words)

        psum = self.psum_i
        words = [range(first, min(first + PSUM_WORD, self.acc_bits)) for first in range(0, self.acc_bits, PSUM_WORD)]
        sums = [Signal(len(word), name=f"sum_{i}", reset_less=True) for i, word in enumerate(words)]
        carries = Signal(len(words) - 1, reset_less=True)  # carry i goes into word i + 1
        flags = Signal(3, reset_less=True)
        waiting = Signal.like(carries)
        m.d.comb += waiting.eq(Mux(load, psum.carries, carries))
        carries_in = [Const(0, 1), *waiting]

        carry = Const(0, 1)
        addends = []
        for i, word in enumerate(words):
            old = Mux(load, psum.acc[word.start : word.stop], sums[i])
            if i < 2:
                bits, majority, carry = _compressed(m, f"word_{i}", old, terms[0][i], terms[1][i], carry=carry)
                addends.append((bits, majority))
            else:
                addends.append((old, _above(m, product_high[-1], product_low[-1], carry, i)[: len(word)]))
        totals = [Signal(len(word) + 1, name=f"total_{i}") for i, word in enumerate(words)]
        m.d.comb += [
            total.eq(x + y + carry_in) for total, (x, y), carry_in in zip(totals, addends, carries_in, strict=True)
        ]
        m.d.sync += [
            *(word_sum.eq(total) for word_sum, total in zip(sums, totals, strict=True)),
            carries.eq(Cat(total[-1] for total in totals[:-1])),
            flags.eq(Mux(load, Cat(psum.nan, psum.pinf, psum.ninf), flags) | special),
        ]
        m.d.comb += [
            self.psum_o.acc.eq(Cat(sums)),
            self.psum_o.carries.eq(carries),
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


def _extended(bits, fill):
    """`bits` with `fill` above them, as wide as `fill`."""
    return Cat(bits, fill[: max(0, len(fill) - len(bits))])[: len(fill)]


def _negated(value, negative):
    """`value` or -`value`, one bit wider."""
    return (Cat(value ^ negative.replicate(len(value)), negative) + negative)[: len(value) + 1].as_signed()


def _above(m, negative_high, negative_low, carry, i):
    """What word `i`, above the products, adds: -1 for each negative product and 1 for the carry, -2 to 1."""
    fill = Signal(PSUM_WORD, name=f"signs_{i}")
    negative = (negative_high & negative_low) | ((negative_high | negative_low) & ~carry)
    m.d.comb += fill.eq(Mux(negative, (1 << PSUM_WORD) - 1, 0))
    return Cat(negative_high ^ negative_low ^ carry, fill[1:]) if i == 2 else fill


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
