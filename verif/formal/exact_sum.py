"""The processing element adds exactly its products, whatever the operands.

Three lemmas, cut at the PE's product and shift registers and at the shifted products ("terms") that it adds. With
value(psum) = acc + sum of carries[i] * 2^(PSUM_WORD (i + 1)), modulo 2^acc_bits:

1. `pe-products`: a cycle after any operands, the registers hold the two part products (4 x 11 and 7 x 11 bits) of their
   significands, negated if negative, and the sums of their exponents: 2 to 60, unless a flag is set. The parts
   are the upper 4 and lower 7 bits of an FP16 significand, so they add to the whole product.
2. `pe-terms-high`, `pe-terms-low`: for any registers with such sums, each term is the part product times the power of
   two that its sum stands for.
3. `pe-addition`: for any registers, the value after is the value before, or that loaded, plus both terms.

So while no flag is set, value after = value before (or loaded) + products, modulo 2^acc_bits. The state before is any
state, so after any number of cycles the value is the sum of all products since the last `load`.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib.wiring import In

from lnpu.formats import PSUM_WORD
from verif.formal.pe_harness import ACC_BITS, PeHarness, is_e4m3
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

TOP = 2 * PSUM_WORD
"""Bits of a term; above them it has copies of its product's sign."""

_WIDTHS = {"high": 15, "low": 18}
"""Bits of the part products."""

_POWERS = {"high": 7 - 2, "low": -2}
"""A part product counts times 2 to the sum of its exponents and this; 2^-48 is the LSB."""


class Products(PeHarness):
    """Lemma 1: the registers behind the multipliers."""

    def __init__(self) -> None:
        super().__init__(
            peek_restart=In(1),
            peek_special=In(3),
            **{f"peek_product_{part}": In(signed(width + 1)) for part, width in _WIDTHS.items()},
            **{f"peek_shift_{part}": In(6) for part in _WIDTHS},
        )

    def elaborate(self, platform):
        m = Module()
        self.place_pe(m)
        pair = self.pair
        first, second = (self.a[0], self.b[0]), (self.a[1], self.b[1])
        word = {"high": first, "low": [Mux(pair, y, x) for x, y in zip(first, second, strict=True)]}
        factor = {
            "high": _significand(self.a[0])[7:],
            "low": Mux(pair, _significand(self.a[1])[7:], _significand(self.a[0])[:7]),
        }
        enable = {"high": self.enable[0], "low": Mux(pair, self.enable[1], self.enable[0])}
        # Of a pair, the low part product weighs 2^7 more than that of an FP16 element.
        extra = {"high": 0, "low": Mux(pair, 7, 0)}
        load = Signal()
        m.d.sync += load.eq(self.load)
        rules = [self.peek_restart == load]
        for part, width in _WIDTHS.items():
            a, b = word[part]
            magnitude, negative = Signal(width, name=f"magnitude_{part}"), Signal(name=f"negative_{part}")
            exponents = Signal(7, name=f"exponents_{part}")
            m.d.sync += [
                magnitude.eq(Mux(enable[part], factor[part] * _significand(b), 0)),
                negative.eq(a[15] ^ b[15]),
                exponents.eq(_exponent(a) + _exponent(b) + extra[part]),
            ]
            product = getattr(self, f"peek_product_{part}")
            rules += [
                product == Mux(negative, -magnitude, magnitude),
                (magnitude == 0)
                | (
                    (getattr(self, f"peek_shift_{part}") == exponents)
                    & (self.peek_special.any() | ((exponents >= 2) & (exponents <= 60)))
                ),
            ]
        promises = [~pair | ~self.enable[k] | is_e4m3(self.a[k]) for k in range(2)]
        m.d.comb += [self.assume.eq(Cat(promises).all()), self.hold.eq(Cat(rules).all())]
        return m


class Terms(PeHarness):
    """Lemma 2: the shifters."""

    def __init__(self, *, part: str) -> None:
        self.part = part
        super().__init__(
            peek_product=In(signed(_WIDTHS[part] + 1)),
            peek_shift=In(6),
            peek_term_0=In(PSUM_WORD),
            peek_term_1=In(PSUM_WORD),
        )

    def elaborate(self, platform):
        m = Module()
        self.place_pe(m)
        product, power = self.peek_product, _POWERS[self.part]
        exact = Signal(signed(TOP + 1))
        shifted = product << self.peek_shift
        m.d.comb += [
            exact.eq(shifted << power if power > 0 else shifted >> -power),
            self.assume.eq((product == 0) | ((self.peek_shift >= 2) & (self.peek_shift <= 60))),
            self.hold.eq(Cat(self.peek_term_0, self.peek_term_1, product[-1]).as_signed() == exact),
        ]
        return m


class Addition(PeHarness):
    """Lemma 3: the adders, from any terms."""

    def __init__(self) -> None:
        super().__init__(
            peek_restart=In(1),
            **{f"peek_product_{part}": In(signed(width + 1)) for part, width in _WIDTHS.items()},
            **{f"peek_term_{part}_{i}": In(PSUM_WORD) for part in _WIDTHS for i in range(2)},
        )

    def elaborate(self, platform):
        m = Module()
        pe = self.place_pe(m)
        total = Mux(self.peek_restart, _value(self.psum), _value(pe.psum_o))
        for part in _WIDTHS:
            sign = getattr(self, f"peek_product_{part}")[-1]
            term = Cat(*(getattr(self, f"peek_term_{part}_{i}") for i in range(2)), sign)
            total = (total + term.as_signed())[:ACC_BITS]
        expected = Signal(ACC_BITS)
        m.d.sync += expected.eq(total)
        m.d.comb += [self.assume.eq(1), self.hold.eq(_value(pe.psum_o) == expected)]
        return m


def _significand(word):
    return Cat(word[:10], word[10:15] != 0)


def _exponent(word):
    return Mux(word[10:15] == 0, 1, word[10:15])


def _value(psum):
    """The number that a partial sum stands for, modulo 2^ACC_BITS."""
    carries = sum(carry << PSUM_WORD * (i + 1) for i, carry in enumerate(psum.carries))
    return (psum.acc + carries)[:ACC_BITS]


PROOFS = [
    Proof(
        name="pe-products",
        block="PE, 97 bits",
        statement="registers hold the part products of any operands, and the sums of their exponents",
        harness=Products,
        method="window",
        depth=2,
        peeks={
            f"peek_{name}": f"dut.{name}"
            for name in ("product_high", "product_low", "shift_high", "shift_low", "special", "restart")
        },
        faults=(Fault("product_high[3]", 0), Fault("factor_low[6]", 0), Fault("shift_low[3]", 0), Fault("restart", 0)),
        quick=False,
    ),
    *(
        Proof(
            name=f"pe-terms-{part}",
            block="PE, 97 bits",
            statement=f"the {part} part product is shifted by its exponents, any product and exponents",
            harness=lambda part=part: Terms(part=part),
            method="window",
            depth=1,
            peeks={
                "peek_product": f"dut.product_{part}",
                "peek_shift": f"dut.shift_{part}",
                **{f"peek_term_{i}": f"dut.term_{part}_{i}" for i in range(2)},
            },
            faults=(Fault(f"near_{part}[20]", 0), Fault(f"near_{part}[40]", 1)),
        )
        for part in _WIDTHS
    ),
    Proof(
        name="pe-addition",
        block="PE, 97 bits",
        statement="value after = value before, or loaded, + both terms; any terms, any state",
        harness=Addition,
        method="window",
        depth=2,
        peeks={
            f"peek_{name}": f"dut.{name}"
            for name in (
                "restart",
                *(f"product_{part}" for part in _WIDTHS),
                *(f"term_{part}_{half}" for part in _WIDTHS for half in range(2)),
            )
        },
        faults=(Fault("word_1_majority[26]", 0), Fault("signs_2[5]", 0), Fault("word_0_majority[30]", 0)),
        quick=False,
    ),
]
