"""NaN and infinity flags of the processing element: those before, or loaded, and those of the products.

Of any operands; of a pair, those of a[0] and a[1] that are enabled are E4M3 values.
"""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.formats import psum_layout
from lnpu.hdl import Block, place
from lnpu.pe.pe import Pe
from verif.formal.proof import Fault, Proof

__all__ = ["ACC_BITS", "PROOFS", "is_e4m3"]

ACC_BITS = 97


class Flags(Block):
    """Compares a PE's flags with their definition."""

    def __init__(self, *, pair: bool) -> None:
        self.pair = pair
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
            pe.psum_i.eq(self.psum),
        ]
        new = 0
        promises = []
        for k in range(2):
            m.d.comb += [pe.a[k].eq(self.a[k]), pe.b[k].eq(self.b[k])]
            if self.pair or not k:
                new |= Mux(self.enable[k], _flags(self.a[k], self.b[k]), 0)
            if self.pair:
                promises.append(~self.enable[k] | is_e4m3(self.a[k]))
        load, products, flags = Signal(), Signal(3), Signal(3)
        m.d.sync += [
            load.eq(self.load),
            products.eq(new),
            flags.eq(Mux(load, _of(self.psum), _of(pe.psum_o)) | products),
        ]
        m.d.comb += [self.assume.eq(Cat(1, *promises).all()), self.hold.eq(_of(pe.psum_o) == flags)]
        return m


def is_e4m3(word):
    """Whether an FP16 pattern is an E4M3 value: zero, or normal of its range with four significant bits."""
    exponent = word[10:15]
    return (word[:15] == 0) | ((word[:7] == 0) & (exponent >= 6) & (exponent <= 23))


def _of(psum):
    return Cat(psum.nan, psum.pinf, psum.ninf)


def _flags(a, b):
    """Flags nan, pinf and ninf of the product of two FP16 patterns."""
    top = [word[10:15] == 31 for word in (a, b)]
    nan = [large & (word[:10] != 0) for large, word in zip(top, (a, b), strict=True)]
    zero = [word[:15] == 0 for word in (a, b)]
    invalid = nan[0] | nan[1] | (top[0] & zero[1]) | (zero[0] & top[1])
    infinite = (top[0] | top[1]) & ~invalid
    negative = a[15] ^ b[15]
    return Cat(invalid, infinite & ~negative, infinite & negative)


PROOFS = [
    Proof(
        name=f"pe-flags-{'fp8' if pair else 'fp16'}",
        block="PE, 97 bits",
        statement=f"NaN and infinity flags, {'pair of FP8 x FP16' if pair else 'FP16 x FP16'}, any operands",
        harness=lambda pair=pair: Flags(pair=pair),
        method="window",
        depth=3,
        faults=(Fault("special", 0),),
    )
    for pair in (False, True)
]
