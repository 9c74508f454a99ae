"""The whole chip."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from lnpu.bus.axi_reader import AxiReader
from lnpu.bus.axi_writer import AxiWriter
from lnpu.config import ChipConfig
from lnpu.core.drain import Drain
from lnpu.core.gated_core import GatedCore
from lnpu.ctrl.command_processor import CommandProcessor
from lnpu.ctrl.command_queue import CommandQueue
from lnpu.ctrl.counters import Counters
from lnpu.ctrl.registers import Registers
from lnpu.fgmp.controller import FgmpController
from lnpu.fgmp.record_writer import RecordWriter
from lnpu.hdl import Block, place
from lnpu.interfaces import axi_lite_signature, axi_read_signature, axi_write_signature
from lnpu.mem.load import LoadUnit
from lnpu.mem.store import StoreUnit
from lnpu.mem.store_raw import StoreRawUnit
from lnpu.vector.vector_memory import VectorMemory
from lnpu.vector.vector_unit import VectorUnit

__all__ = ["Chip"]


class Chip(Block):
    """LNPU: cores, vector unit, encoder and decoder, command processor, AXI ports. See docs/architecture.md.

    Parameters
    ----------
    config : ChipConfig
        Every count and width.

    Members
    -------
    control : In(axi_lite_signature())
        AXI4-Lite slave: registers and counters.
    memory_read : Out(axi_read_signature(config)); memory_write : Out(axi_write_signature(config))
        The two halves of one AXI4 master: programs and tensors.
    interrupt : Out(1)
        High while enabled and a program has ended, until the host clears `done` or `error` in STATUS.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "control": In(axi_lite_signature()),
                "memory_read": Out(axi_read_signature(config)),
                "memory_write": Out(axi_write_signature(config)),
                "interrupt": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        registers = place(m, "registers", Registers(config=config))
        processor = place(m, "processor", CommandProcessor(config=config))
        counters = place(m, "counters", Counters(config=config))
        reader = place(m, "reader", AxiReader(config=config, clients=5))
        writer = place(m, "writer", AxiWriter(config=config, clients=4))
        load = place(m, "load", LoadUnit(config=config))
        load_dense = place(m, "load_dense", LoadUnit(config=config, dense=True))
        store = place(m, "store", StoreUnit(config=config))
        store_raw = place(m, "store_raw", StoreRawUnit(config=config))
        vector = place(m, "vector", VectorUnit(config=config))
        vmem = place(m, "vmem", VectorMemory(config=config))
        drain = place(m, "drain", Drain(config=config))
        cores = [place(m, f"core_{i}", GatedCore(config=config)) for i in range(config.cores)]
        fgmp = place(m, "fgmp", FgmpController(config=config))
        records = place(m, "records", RecordWriter(config=config))
        units = {
            "load": load,
            "load_dense": load_dense,
            "store": store,
            "store_raw": store_raw,
            "vector": vector,
            "drain": drain,
        }

        # Buses.
        wiring.connect(m, wiring.flipped(self.control), registers.axi)
        wiring.connect(m, reader.axi, wiring.flipped(self.memory_read))
        wiring.connect(m, writer.axi, wiring.flipped(self.memory_write))
        wiring.connect(m, processor.fetch, reader.client0)
        wiring.connect(m, load.table, reader.client1)
        wiring.connect(m, load.memory, reader.client2)
        wiring.connect(m, load_dense.table, reader.client3)
        wiring.connect(m, load_dense.memory, reader.client4)
        wiring.connect(m, store.memory, writer.client0)
        wiring.connect(m, processor.mark, writer.client1)
        wiring.connect(m, records.memory, writer.client2)
        wiring.connect(m, store_raw.memory, writer.client3)

        # Commands.
        wiring.connect(m, registers.control, processor.control)
        for name, unit in units.items():
            commands, busy, queued = unit.command, unit.busy, getattr(unit, "queued", None)
            if queued is None:  # it takes one command at a time
                queue = place(m, f"{name}_queue", CommandQueue())
                wiring.connect(m, queue.o, unit.command)
                m.d.comb += [queue.unit_busy.eq(unit.busy), queue.unit_earlier.eq(getattr(unit, "earlier", 0))]
                commands, busy, queued = queue.i, queue.busy, queue.queued
            wiring.connect(m, getattr(processor, name), commands)
            m.d.comb += [
                getattr(processor, f"{name}_busy").eq(busy),
                getattr(processor, f"{name}_queued").eq(queued),
                getattr(processor, f"{name}_error").eq(unit.error),
                getattr(counters, f"{name}_busy").eq(unit.busy),
            ]
        wiring.connect(m, fgmp.record, records.record)
        m.d.comb += [  # busy until the record is in memory
            fgmp.command.payload.eq(processor.fgmp.payload),
            fgmp.command.valid.eq(processor.fgmp.valid & ~records.busy),
            processor.fgmp.ready.eq(fgmp.command.ready & ~records.busy),
            processor.fgmp_busy.eq(fgmp.busy | records.busy),
            processor.fgmp_error.eq(fgmp.error),
            records.address.eq(fgmp.record_address),
            fgmp.lookup.eq(processor.lookup),
            fgmp.lookup_tensor.eq(processor.lookup_tensor),
            processor.state.eq(fgmp.state),
        ]
        with m.If(store.events.dynamic):
            m.d.comb += [
                fgmp.store[name].eq(store.events[name])
                for name in ("zero", "underflow", "fp8", "fp16", "nonfinite", "top")
            ]
        for i, core in enumerate(cores):
            m.d.comb += [
                core.index.eq(i),
                core.command.payload.eq(processor.core_command),
                core.command.valid.eq(processor.core_valid[i]),
                processor.core_ready[i].eq(core.command.ready),
                processor.core_busy[i].eq(core.busy),
                processor.core_queued[i].eq(core.queued),
                processor.core_error[i].eq(core.error),
                core.fill_sparse.eq(load.write),
                core.fill_dense.eq(load_dense.write),
            ]
        m.d.comb += [
            processor.vmem_error.eq(vmem.error),
            processor.read_error.eq(reader.error),
            processor.write_error.eq(writer.error),
        ]

        # Vector memory.
        wiring.connect(m, load.vmem, vmem.write_load)
        wiring.connect(m, load_dense.vmem, vmem.write_load_dense)
        wiring.connect(m, drain.write, vmem.write_drain)
        wiring.connect(m, vector.write, vmem.write_vector)
        wiring.connect(m, store.read, vmem.read_store)
        wiring.connect(m, store_raw.read, vmem.read_store_raw)
        for name in ("read_a", "read_b", "read_c"):
            wiring.connect(m, getattr(vector, name), getattr(vmem, name))

        # Partial sums: the row that comes is that of the core asked last.
        request = drain.psum_request
        asked = Signal(4)
        with m.If(request.valid & request.ready):
            m.d.sync += asked.eq(request.payload.core)
        with m.Switch(request.payload.core):
            for i, core in enumerate(cores):
                with m.Case(i):
                    m.d.comb += request.ready.eq(core.psum_request.ready)
        with m.Switch(asked):
            for i, core in enumerate(cores):
                with m.Case(i):
                    m.d.comb += [taken.eq(shown) for taken, shown in zip(drain.psum, core.psum, strict=True)]
        for i, core in enumerate(cores):
            m.d.comb += [
                core.psum_request.valid.eq(request.valid & (request.payload.core == i)),
                core.psum_request.payload.eq(request.payload.row),
                core.psum_hold.eq(drain.psum_hold & (asked == i)),
            ]

        # Counters and flags.
        m.d.comb += [
            counters.busy.eq(processor.control.busy),
            counters.started.eq(processor.started),
            counters.clear.eq(registers.clear),
            counters.snapshot.eq(processor.snapshot),
            counters.host_index.eq(registers.counter_index),
            registers.counter_value.eq(counters.host_value),
            counters.mark_read.eq(processor.counter_read),
            counters.mark_index.eq(processor.counter_index),
            processor.counter_value.eq(counters.mark_value),
            counters.reader.eq(reader.events),
            counters.writer.eq(writer.events),
            counters.load.plain.eq(load.events.bits >> 4),
            counters.load.kind.eq(load.events.kind),
            counters.load_dense.plain.eq(load_dense.events.bits >> 4),
            counters.load_dense.kind.eq(load_dense.events.kind),
            counters.store.zero.eq(store.events.zero),
            counters.store.underflow.eq(store.events.underflow),
            counters.store.fp8.eq(store.events.fp8),
            counters.store.fp16.eq(store.events.fp16),
            counters.store.plain.eq(store.events.plain_bits >> 4),
            counters.store.kind.eq(store.events.kind),
            counters.store_raw.plain.eq(store_raw.events.plain_bits >> 4),
            counters.store_raw.kind.eq(store_raw.events.kind),
            *(counters.cores[i].eq(core.events) for i, core in enumerate(cores)),
            registers.flags.eq(Cat(drain.nonfinite, store.events.nonfinite)),
            self.interrupt.eq(registers.interrupt),
        ]
        return m
