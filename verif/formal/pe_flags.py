"""NaN and infinity flags of the processing element: those before, or loaded, and those of the products.

Of any operands; of a pair, those of a[0] and a[1] that are enabled are E4M3 values.
"""

from amaranth.hdl import Cat, Module, Mux, Signal

from verif.formal.pe_harness import PeHarness, is_e4m3
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]


class Flags(PeHarness):
    """Compares a PE's flags with their definition, of FP16 elements or of pairs of FP8 elements."""

    def __init__(self, *, pair: bool) -> None:
        self.of_pairs = pair
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        pe = self.place_pe(m)
        new = 0
        promises = []
        for k in range(2):
            if self.of_pairs or not k:
                new |= Mux(self.enable[k], _flags(self.a[k], self.b[k]), 0)
            if self.of_pairs:
                promises.append(~self.enable[k] | is_e4m3(self.a[k]))
        load, products, flags = Signal(), Signal(3), Signal(3)
        m.d.sync += [
            load.eq(self.load),
            products.eq(new),
            flags.eq(Mux(load, _of(self.psum), _of(pe.psum_o)) | products),
        ]
        m.d.comb += [
            self.assume.eq(Cat(self.pair == self.of_pairs, *promises).all()),
            self.hold.eq(_of(pe.psum_o) == flags),
        ]
        return m


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
