"""A processing element whose inputs are free, for the proofs about it."""

from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.formats import psum_layout
from lnpu.hdl import Block, place
from lnpu.pe.pe import Pe

__all__ = ["ACC_BITS", "PeHarness", "is_e4m3"]

ACC_BITS = 97


class PeHarness(Block):
    """Free inputs of a PE of `ACC_BITS` bits, those of the harness itself (`more`), and the two outputs of a proof."""

    def __init__(self, **more) -> None:
        super().__init__(
            {
                "enable": In(2),
                "pair": In(1),
                "a": In(data.ArrayLayout(16, 2)),
                "b": In(data.ArrayLayout(16, 2)),
                "load": In(1),
                "psum": In(psum_layout(ACC_BITS)),
                "assume": Out(1),
                "hold": Out(1),
                **more,
            }
        )

    def place_pe(self, m):
        """The PE, as `dut`, on these inputs."""
        pe = place(m, "dut", Pe(acc_bits=ACC_BITS))
        m.d.comb += [getattr(pe, name).eq(getattr(self, name)) for name in ("enable", "pair", "a", "b", "load")]
        m.d.comb += pe.psum_i.eq(self.psum)
        return pe


def is_e4m3(word):
    """Whether an FP16 pattern is an E4M3 value: zero, or normal of its range with four significant bits."""
    exponent = word[10:15]
    return (word[:15] == 0) | ((word[:7] == 0) & (exponent >= 6) & (exponent <= 23))
