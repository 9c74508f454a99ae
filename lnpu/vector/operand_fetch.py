"""Reads one operand of a vector command ahead of the lanes."""

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.hdl import Block, place
from lnpu.interfaces import vmem_read_signature, vmem_row
from lnpu.vector.strided_address import StridedAddress

__all__ = ["OperandFetch"]


class OperandFetch(Block):
    """Reads the rows of a strided walk in order, up to two ahead of those taken: one a cycle if the memory grants.

    Parameters
    ----------
    config : ChipConfig
        Uses `beat`.

    Members
    -------
    start : In(1)
        Begin a walk; all rows of the last one were taken. What follows is stable from `start` on.
    base : In(16)
    inner_stride, outer_stride : In(signed(16))
    inner, outer : In(16)
        Rows of the two loops, at least 1.
    still : In(1)
        Read only the first row of each inner loop.
    read : Out(vmem_read_signature(config))
        `row` is looked at only in the cycle after a request was taken.
    rows : Out(stream.Signature(vmem_row(config)))
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "base": In(16),
                "inner_stride": In(signed(16)),
                "outer_stride": In(signed(16)),
                "inner": In(16),
                "outer": In(16),
                "still": In(1),
                "read": Out(vmem_read_signature(config)),
                "rows": Out(stream.Signature(vmem_row(config))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        # Whether to ask hangs on registers only, so a request never goes away once made.
        asking = Signal()
        arriving = Signal()  # the row asked for is on the port
        kept = Signal(range(3))  # rows in hand beside it
        asked, taken = Signal(), Signal()
        end = Signal(reset_less=True)  # the next row is the last of its inner loop
        single = self.still | (self.inner == 1)
        inner_left = Signal(16, reset_less=True)
        outer_left = Signal(16, reset_less=True)
        walk = place(m, "walk", StridedAddress())
        m.d.comb += [
            walk.start.eq(self.start),
            walk.base.eq(self.base),
            walk.inner_stride.eq(self.inner_stride),
            walk.outer_stride.eq(self.outer_stride),
            walk.step.eq(asked),
            walk.wrap.eq(end),
            self.read.request.valid.eq(asking & (kept + arriving < 2)),
            self.read.request.payload.eq(walk.address),
            asked.eq(self.read.request.valid & self.read.request.ready),
        ]
        with m.If(self.start):
            m.d.sync += [asking.eq(1), inner_left.eq(self.inner), outer_left.eq(self.outer), end.eq(single)]
        with m.Elif(asked):
            m.d.sync += [inner_left.eq(inner_left - 1), end.eq(inner_left == 2)]
            with m.If(end):
                m.d.sync += [inner_left.eq(self.inner), outer_left.eq(outer_left - 1), asking.eq(outer_left != 1)]
                m.d.sync += end.eq(single)

        row = vmem_row(self.config)
        first, second = (Signal(row, name=name, reset_less=True) for name in ("first", "second"))
        m.d.comb += [
            self.rows.valid.eq(arriving | kept.any()),
            self.rows.payload.eq(Mux(kept.any(), first, self.read.row)),
            taken.eq(self.rows.valid & self.rows.ready),
        ]
        m.d.sync += [arriving.eq(asked), kept.eq(kept + arriving - taken)]
        with m.If(taken | ~kept.any()):
            m.d.sync += first.eq(Mux(kept[1], second, self.read.row))
        with m.If(~kept[1]):
            m.d.sync += second.eq(self.read.row)
        return m
