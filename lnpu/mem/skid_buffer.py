"""Two-word stream buffer that cuts the combinational path of `ready`."""

from amaranth.hdl import Module, Signal
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block

__all__ = ["SkidBuffer"]


class SkidBuffer(Block):
    """Passes a word a cycle with one cycle of latency; every output comes from a register.

    Parameters
    ----------
    width : int
        Bits in a word.

    Members
    -------
    i : In(stream.Signature(width)) ; o : Out(stream.Signature(width))
    """

    def __init__(self, *, width: int) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width!r}")
        self.width = width
        super().__init__({"i": In(stream.Signature(width)), "o": Out(stream.Signature(width))})

    @property
    def suffix(self) -> str:
        return str(self.width)

    def elaborate(self, platform):
        m = Module()
        word = Signal(self.width, reset_less=True)
        spare = Signal(self.width, reset_less=True)
        full = Signal()
        spare_full = Signal()
        m.d.comb += [
            self.o.payload.eq(word),
            self.o.valid.eq(full),
            self.i.ready.eq(~spare_full),
        ]
        with m.If(~full | self.o.ready):
            with m.If(spare_full):
                m.d.sync += [word.eq(spare), spare_full.eq(0)]
            with m.Else():
                m.d.sync += [word.eq(self.i.payload), full.eq(self.i.valid)]
        with m.Elif(self.i.valid & ~spare_full):
            m.d.sync += [spare.eq(self.i.payload), spare_full.eq(1)]
        return m
