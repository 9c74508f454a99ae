"""Writes the records of the dynamic ratio controller to memory."""

from amaranth.hdl import Cat, Const, Module, Signal, Value
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.fgmp.controller import ADAPT_RECORD
from lnpu.formats import TensorKind
from lnpu.hdl import Block
from lnpu.interfaces import memory_write_signature

__all__ = ["RecordWriter"]


class RecordWriter(Block):
    """Takes a record of ADAPT and writes its 32 bytes to `address`.

    Members
    -------
    record : In(stream.Signature(ADAPT_RECORD))
    address : In(config.address_bits)
        Byte address of the record on `record`, a multiple of 32.
    memory : Out(memory_write_signature(config))
    busy : Out(1)
        From the cycle in which a record is offered until the memory has acknowledged it.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__({
            "record": In(stream.Signature(ADAPT_RECORD)),
            "address": In(config.address_bits),
            "memory": Out(memory_write_signature(config)),
            "busy": Out(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        memory, width = self.memory, self.config.axi_bits
        words = ADAPT_RECORD.size // width
        record = Signal(ADAPT_RECORD.size, reset_less=True)
        left = Signal(range(words + 1))
        m.d.comb += [
            memory.request.payload.address.eq(self.address),
            memory.request.payload.words.eq(words),
            memory.request.payload.kind.eq(TensorKind.OTHER.value),
            memory.data.payload.data.eq(record),
            memory.data.payload.strobe.eq(~Const(0, width // 8)),
            memory.data.valid.eq(left != 0),
            # The address goes with the record, so both are taken when the request is.
            memory.request.valid.eq(self.record.valid & (left == 0)),
            self.record.ready.eq(memory.request.ready & (left == 0)),
            self.busy.eq(self.record.valid | (left != 0) | ~memory.idle),
        ]
        with m.If(self.record.valid & self.record.ready):
            m.d.sync += [record.eq(Value.cast(self.record.payload)), left.eq(words)]
        with m.Elif(memory.data.valid & memory.data.ready):
            m.d.sync += [record.eq(Cat(record[width:], Const(0, width))), left.eq(left - 1)]
        return m
