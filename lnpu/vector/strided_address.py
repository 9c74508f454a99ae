"""Address of one operand of a vector command."""

from amaranth.hdl import Module, Signal, signed
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block

__all__ = ["StridedAddress"]


class StridedAddress(Block):
    """Walks base + o * outer stride + i * inner stride, modulo 2^16, i innermost.

    Members
    -------
    start : In(1)
        Go to `base` (o = i = 0).
    step : In(1)
        Go to the next i, or with `wrap` to i = 0 of the next o.
    base : In(16)
    inner_stride, outer_stride : In(signed(16))
        Stable from `start` to the last `step`.
    address : Out(16)
    """

    start: In(1)
    step: In(1)
    wrap: In(1)
    base: In(16)
    inner_stride: In(signed(16))
    outer_stride: In(signed(16))
    address: Out(16)

    def elaborate(self, platform):
        m = Module()
        line = Signal(16, reset_less=True)  # address of i = 0
        address = Signal(16, reset_less=True)
        next_address = Signal(16)
        with m.If(self.wrap):
            m.d.comb += next_address.eq(line + self.outer_stride)
        with m.Else():
            m.d.comb += next_address.eq(address + self.inner_stride)
        with m.If(self.start):
            m.d.sync += [address.eq(self.base), line.eq(self.base)]
        with m.Elif(self.step):
            m.d.sync += address.eq(next_address)
            with m.If(self.wrap):
                m.d.sync += line.eq(next_address)
        m.d.comb += self.address.eq(address)
        return m
