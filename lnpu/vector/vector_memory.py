"""Vector memory: rows of FP32 that LOAD units, DRAIN and vector unit write, and STORE units and vector unit read."""

from collections.abc import Sequence

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

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


def _bank(address: Value, banks: int) -> Value:
    """Bank of a row: rows that follow each other, and those a power of two apart, are spread over all of them."""
    bits = exact_log2(banks)
    return Cat(address[bit::bits].xor() for bit in range(bits))


class VectorMemory(Block):
    """`vmem_rows` rows of `beat` FP32 words in `vmem_banks` banks, each with one write and one read a cycle.

    A write takes effect at its handshake: a read whose handshake is in a later cycle returns it, one in the same cycle
    returns the old row. Arbitration among the write ports, and among the read ports, is round robin in each bank: a
    port that asks waits while each other port is served in that bank at most once. The contents after power-up are
    undefined.

    Parameters
    ----------
    config : ChipConfig
        Uses `vmem_rows`, `vmem_banks` and `beat`.

    Members
    -------
    write_load, write_load_dense, write_drain, write_vector : In(stream.Signature(vmem_write(config)))
    read_store, read_store_raw, read_a, read_b, read_c : In(vmem_read_signature(config))
        Those of the vector unit give a row in the cycle after the handshake only.
    error : Out(1)
        An access whose address is beyond the last row was taken in the cycle before. Such a write is dropped; such a
        read returns any row.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "write_load": In(stream.Signature(vmem_write(config))),
                "write_load_dense": In(stream.Signature(vmem_write(config))),
                "write_drain": In(stream.Signature(vmem_write(config))),
                "write_vector": In(stream.Signature(vmem_write(config))),
                "read_store": In(vmem_read_signature(config)),
                "read_store_raw": In(vmem_read_signature(config)),
                "read_a": In(vmem_read_signature(config)),
                "read_b": In(vmem_read_signature(config)),
                "read_c": In(vmem_read_signature(config)),
                "error": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        row_bits, count = 32 * self.config.beat, self.config.vmem_banks
        writers = [self.write_load, self.write_load_dense, self.write_drain, self.write_vector]
        readers = [self.read_store, self.read_store_raw, self.read_a, self.read_b, self.read_c]
        written, asked = (
            [_bank(port.payload.address, count) for port in writers],
            [_bank(port.request.payload, count) for port in readers],
        )
        errors = []

        def inside(address):
            return address < self.config.vmem_rows

        banks = []
        fires = []  # of each bank, which reader it serves
        write_ready, read_ready = [], []
        for number in range(count):
            m.submodules[f"bank{number}"] = bank = Sram(depth=-(-self.config.vmem_rows // count), width=row_bits)
            banks.append(bank)

            asks = [port.valid & (which == number) for port, which in zip(writers, written, strict=True)]
            write_ready.append(_round_robin(m, asks, f"write{number}"))
            write = Signal(vmem_write(self.config), name=f"write_of_bank{number}")
            for port, ask, ready in zip(writers, asks, write_ready[number], strict=True):
                with m.If(ask & ready):
                    m.d.comb += write.eq(port.payload)
            any_write = Cat(asks).any()
            m.d.comb += [
                bank.w_en.eq(any_write & inside(write.address)),
                bank.w_addr.eq(write.address[exact_log2(count) :]),
                bank.w_data.eq(write.row),
            ]

            asks = [port.request.valid & (which == number) for port, which in zip(readers, asked, strict=True)]
            read_ready.append(_round_robin(m, asks, f"read{number}"))
            address = Signal(16, name=f"read_address{number}")
            fires.append([ask & ready for ask, ready in zip(asks, read_ready[number], strict=True)])
            for port, fire in zip(readers, fires[number], strict=True):
                with m.If(fire):
                    m.d.comb += address.eq(port.request.payload)
            any_read = Cat(asks).any()
            m.d.comb += [bank.r_en.eq(any_read & inside(address)), bank.r_addr.eq(address[exact_log2(count) :])]
            errors += [any_write & ~inside(write.address), any_read & ~inside(address)]

        for i, (port, which) in enumerate(zip(writers, written, strict=True)):
            m.d.comb += port.ready.eq(Array(ready[i] for ready in write_ready)[which])

        # A bank's output is the row of the port that it served last.
        for i, (port, which) in enumerate(zip(readers, asked, strict=True)):
            latest = Signal(range(count), name=f"latest{i}")  # bank that served the port last
            for number in range(count):
                with m.If(fires[number][i]):
                    m.d.sync += latest.eq(number)
            row = Array(bank.r_data for bank in banks)[latest]
            m.d.comb += port.request.ready.eq(Array(ready[i] for ready in read_ready)[which])
            if port not in (self.read_store, self.read_store_raw):
                m.d.comb += port.row.eq(row)
                continue
            # It stays until the next one: where the bank may serve others, in `held`.
            held = Signal(row_bits, name=f"held{i}", reset_less=True)
            fresh = Signal(name=f"fresh{i}")
            m.d.sync += fresh.eq(Cat(fires[number][i] for number in range(count)).any())
            m.d.comb += port.row.eq(Mux(fresh, row, held))
            with m.If(fresh):
                m.d.sync += held.eq(row)
        m.d.sync += self.error.eq(Cat(errors).any())
        return m
