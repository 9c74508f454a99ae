"""The processing element adds exactly its products: the sum after a cycle is the sum before plus the products.

The sum before is free, from any state: over the cycles the accumulator therefore equals the sum of all products since
the last load, modulo 2^acc_bits. The multiplication of arbitrary significands with arbitrary exponents is more than
the SAT engine can decide; each proof tells which operands it is about. Where it compares `acc`, no flag is set.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.formats import psum_layout
from lnpu.hdl import Block, place
from lnpu.pe.pe import Pe
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

ACC_BITS = 97


class ExactSum(Block):
    """Compares a PE with the definition of its sum; `pair` selects the case, `part` what is compared."""

    def __init__(self, *, pair: bool, part: str) -> None:
        self.pair, self.part = pair, part
        super().__init__(
            {
                "enable": In(2),
                "a": In(data.ArrayLayout(16, 2)),
                "b": In(data.ArrayLayout(16, 2)),
                "load": In(1),
                "psum": In(psum_layout(ACC_BITS)),
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        pe = place(m, "dut", Pe(acc_bits=ACC_BITS))
        m.d.comb += [
            pe.enable.eq(self.enable),
            pe.pair.eq(self.pair),
            pe.load.eq(self.load),
            Value.cast(pe.psum_i).eq(self.psum),
        ]
        operands = []
        for k in range(2):
            m.d.comb += [pe.a[k].eq(self.a[k]), pe.b[k].eq(self.b[k])]
            a, b = Signal(16, name=f"a{k}"), Signal(16, name=f"b{k}")
            enable = Signal(name=f"enable{k}")
            m.d.sync += [a.eq(self.a[k]), b.eq(self.b[k]), enable.eq(self.enable[k] if self.pair or not k else 0)]
            operands.append((enable, a, b))
        load = Signal()
        before = Signal(psum_layout(ACC_BITS))
        m.d.sync += load.eq(self.load)
        m.d.comb += Value.cast(before).eq(Mux(load, Value.cast(self.psum), Value.cast(pe.psum_o)))

        # What the sum has to be one cycle later.
        acc, flags = Signal(ACC_BITS), Signal(3)
        products = [_product(m, k, *operand) for k, operand in enumerate(operands)]
        m.d.sync += [
            acc.eq(_value(before) + sum(value for value, _ in products)),
            flags.eq(Cat(before.nan, before.pinf, before.ninf) | products[0][1] | products[1][1]),
        ]
        if self.part == "acc":
            m.d.comb += self.hold.eq(flags.any() | (_value(pe.psum_o) == acc))
        else:
            m.d.comb += self.hold.eq(Cat(pe.psum_o.nan, pe.psum_o.pinf, pe.psum_o.ninf) == flags)
        promises = []
        if self.pair:
            # E4M3 values: zero, or a normal FP16 number of their range with four significant bits.
            for word in (self.a[0], self.a[1]):
                exponent = word[10:15]
                promises.append((word[:15] == 0) | ((word[:7] == 0) & (exponent >= 6) & (exponent <= 23)))
        m.d.comb += self.assume.eq(Cat(1, *promises).all())
        return m


def _value(psum):
    """The number that a partial sum stands for."""
    return psum.acc


def _product(m, k, enable, a, b):
    """The product as a multiple of 2^-48, and its flags nan, pinf, ninf."""

    def fields(word):
        return word[:10], word[10:15], word[15]

    (ma, ea, sa), (mb, eb, sb) = fields(a), fields(b)
    significand = [Cat(mantissa, exponent != 0) for mantissa, exponent in ((ma, ea), (mb, eb))]
    power = Signal(6, name=f"power{k}")
    magnitude = Signal(ACC_BITS, name=f"magnitude{k}")
    value = Signal(signed(ACC_BITS), name=f"value{k}")
    special = [exponent == 31 for exponent in (ea, eb)]
    nan = [top & (mantissa != 0) for top, mantissa in zip(special, (ma, mb), strict=True)]
    zero = [word[:15] == 0 for word in (a, b)]
    invalid = nan[0] | nan[1] | (special[0] & zero[1]) | (zero[0] & special[1])
    infinite = (special[0] | special[1]) & ~invalid
    m.d.comb += [
        power.eq(Mux(ea == 0, 1, ea) + Mux(eb == 0, 1, eb) - 2),
        magnitude.eq(((significand[0][7:] * significand[1] << 7) + significand[0][:7] * significand[1]) << power),
        value.eq(Mux(enable, Mux(sa ^ sb, -magnitude, magnitude), 0)),
    ]
    return value, Mux(enable, Cat(invalid, infinite & ~(sa ^ sb), infinite & (sa ^ sb)), 0)


PROOFS = [
    *(
        Proof(
            name=f"pe-flags-{'fp8' if pair else 'fp16'}",
            block="PE",
            statement=f"NaN and infinity flags, {'pair of FP8 x FP16' if pair else 'FP16 x FP16'}, any operands",
            harness=lambda pair=pair: ExactSum(pair=pair, part="flags"),
            method="window",
            depth=3,
            faults=(Fault("special", 0),),
        )
        for pair in (False, True)
    ),
    Proof(
        name="pe-sum-power",
        block="PE",
        statement="sum grows exactly by the product: any b, any sum; a zero or a power of two, of either sign",
        harness=lambda: ExactSum(pair=False, part="acc"),
        method="window",
        depth=3,
        constants={"a[9:0]": 0},
        faults=(Fault("shift_high[0]", 0), Fault("product_high[3]", 0)),
        quick=False,
    ),
    Proof(
        name="pe-sum-fp8",
        block="PE",
        statement="sum grows exactly by the product: first of a pair, any sum; |a| in [1, 2), |b| in [32, 64)",
        harness=lambda: ExactSum(pair=True, part="acc"),
        method="window",
        depth=3,
        constants={"enable": 1, "a[14:10]": 15, "b[14:10]": 20},
        faults=(Fault("shift_high[0]", 0),),
        quick=False,
    ),
]
