"""Vector memory: the FP32 rows that LOAD, DRAIN and the vector unit write and that STORE and the vector unit read."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Module, Mux, Signal, ValueLike
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.hdl import Block, Sram
from lnpu.interfaces import vmem_read_signature, vmem_write

__all__ = ["VectorMemory"]


def _round_robin(m: Module, valids: Sequence[ValueLike], name: str) -> list[Signal]:
    """Ready signals, one a requester: the one served last comes last.

    At most one requester is both valid and ready. `ready` does not depend on the requester's own `valid`. A requester
    that stays valid is served after each other one has been served at most once.
    """
    count = len(valids)
    served = Signal(range(count), name=f"{name}_served")
    readys = [Signal(name=f"{name}_ready{i}") for i in range(count)]
    with m.Switch(served):
        for last in range(count):
            order = [(last + 1 + k) % count for k in range(count)]
            with m.Case(last):
                for position, i in enumerate(order):
                    before = [valids[j] for j in order[:position]]
                    m.d.comb += readys[i].eq(~Cat(before).any() if before else 1)
    for i in range(count):
        with m.If(valids[i] & readys[i]):
            m.d.sync += served.eq(i)
    return readys


class VectorMemory(Block):
    """`vmem_rows` rows of `beat` FP32 words, with one write and one read a cycle.

    A write takes effect at its handshake: a read whose handshake is in a later cycle returns it, one in the same cycle
    returns the old row. Arbitration among the write ports, and among the read ports, is round robin: a port that asks
    waits while each other port is served at most once. The contents after power-up are undefined.

    Parameters
    ----------
    config : ChipConfig
        Uses `vmem_rows` and `beat`.

    Members
    -------
    write_load, write_drain, write_vector : In(stream.Signature(vmem_write(config)))
    read_store, read_vector : In(vmem_read_signature(config))
    error : Out(1)
        An access whose address is beyond the last row is taken in this cycle. Such a write is dropped; such a read
        returns any row.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "write_load": In(stream.Signature(vmem_write(config))),
                "write_drain": In(stream.Signature(vmem_write(config))),
                "write_vector": In(stream.Signature(vmem_write(config))),
                "read_store": In(vmem_read_signature(config)),
                "read_vector": In(vmem_read_signature(config)),
                "error": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.rows = rows = Sram(depth=self.config.vmem_rows, width=32 * self.config.beat)

        def inside(address):
            return address < self.config.vmem_rows

        writers = [self.write_load, self.write_drain, self.write_vector]
        write = Signal(vmem_write(self.config))
        write_valid = Cat(port.valid for port in writers).any()
        for port, ready in zip(writers, _round_robin(m, [port.valid for port in writers], "write"), strict=True):
            m.d.comb += port.ready.eq(ready)
            with m.If(port.valid & ready):
                m.d.comb += write.eq(port.payload)
        m.d.comb += [
            rows.w_en.eq(write_valid & inside(write.address)),
            rows.w_addr.eq(write.address),
            rows.w_data.eq(write.row),
        ]

        readers = [self.read_store, self.read_vector]
        address = Signal(16)
        requests = [port.request for port in readers]
        fires = [Signal(name=f"read_fire{i}") for i in range(2)]
        for fire, request, ready in zip(
            fires, requests, _round_robin(m, [request.valid for request in requests], "read"), strict=True
        ):
            m.d.comb += [request.ready.eq(ready), fire.eq(request.valid & ready)]
            with m.If(fire):
                m.d.comb += address.eq(request.payload)
        m.d.comb += [rows.r_en.eq(Cat(fires).any() & inside(address)), rows.r_addr.eq(address)]

        # The SRAM's output is the row of the port served last. When the other one is served the row moves to `held`,
        # whose old row, that of the port now served, is no longer owed to anyone.
        owner = Signal()
        held = Signal(32 * self.config.beat, reset_less=True)
        for i, port in enumerate(readers):
            with m.If(fires[i]):
                m.d.sync += owner.eq(i)
                with m.If(owner != i):
                    m.d.sync += held.eq(rows.r_data)
            m.d.comb += port.row.eq(Mux(owner == i, rows.r_data, held))

        m.d.comb += self.error.eq((write_valid & ~inside(write.address)) | (Cat(fires).any() & ~inside(address)))
        return m
