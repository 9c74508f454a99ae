"""AXI4-Lite slave: turns the five channels into simple accesses to a register file."""

from amaranth.hdl import Module, Signal
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block
from lnpu.interfaces import axi_lite_signature

__all__ = ["AxiLiteSlave"]


class AxiLiteSlave(Block):
    """AXI4-Lite slave with one write and one read at a time, side by side.

    Address and data of a write come in any order. Bits 1:0 of addresses are ignored, as AXI4-Lite has it: accesses are
    of whole words. All AXI outputs are registers. A write takes at least three cycles, a read `LOOK_UP` and three.

    Members
    -------
    axi : In(axi_lite_signature())
    write : Out(1)
        There is a write in this cycle; a response other than OKAY is given if `write_refused` is set (combinational).
    write_address : Out(10)
        Number of the word.
    write_data : Out(32); write_strobe : Out(4)
    write_refused : In(1)
    read_address : Out(10)
        Number of the word that is being read.
    read_data : In(32); read_refused : In(1)
        Answer, taken `LOOK_UP` cycles after the first one in which `read_address` has its value. Reads have no side
        effects.
    """

    LOOK_UP = 8

    def __init__(self) -> None:
        super().__init__({
            "axi": In(axi_lite_signature()),
            "write": Out(1),
            "write_address": Out(10),
            "write_data": Out(32),
            "write_strobe": Out(4),
            "write_refused": In(1),
            "read_address": Out(10),
            "read_data": In(32),
            "read_refused": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        axi = self.axi

        have_address, have_data = Signal(), Signal()
        # READY is the inverse of a register: set while there is room for an address (or data) of a write.
        m.d.comb += [
            axi.awready.eq(~have_address),
            axi.wready.eq(~have_data),
            self.write.eq(have_address & have_data & ~axi.bvalid),
        ]
        with m.If(axi.awvalid & axi.awready):
            m.d.sync += [have_address.eq(1), self.write_address.eq(axi.awaddr[2:])]
        with m.If(axi.wvalid & axi.wready):
            m.d.sync += [have_data.eq(1), self.write_data.eq(axi.wdata), self.write_strobe.eq(axi.wstrb)]
        with m.If(axi.bready):
            m.d.sync += axi.bvalid.eq(0)
        with m.If(self.write):
            m.d.sync += [
                have_address.eq(0),
                have_data.eq(0),
                axi.bvalid.eq(1),
                axi.bresp.eq(self.write_refused << 1),
            ]

        looked = Signal(range(self.LOOK_UP))
        with m.FSM(name="read_state"):
            with m.State("IDLE"):
                m.d.comb += axi.arready.eq(1)
                with m.If(axi.arvalid):
                    m.d.sync += self.read_address.eq(axi.araddr[2:])
                    m.next = "LOOK_UP"
            with m.State("LOOK_UP"):
                m.d.sync += looked.eq(looked + 1)
                with m.If(looked == self.LOOK_UP - 1):
                    m.d.sync += looked.eq(0)
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.sync += [axi.rvalid.eq(1), axi.rdata.eq(self.read_data), axi.rresp.eq(self.read_refused << 1)]
                m.next = "GIVE"
            with m.State("GIVE"), m.If(axi.rready):
                m.d.sync += axi.rvalid.eq(0)
                m.next = "IDLE"
        return m
