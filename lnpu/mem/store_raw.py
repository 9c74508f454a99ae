"""Moves rows of the vector memory to external memory as they are."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import LAYOUTS, Opcode
from lnpu.hdl import Block, place
from lnpu.interfaces import Error, command_stream, memory_write_signature, vmem_read_signature
from lnpu.mem.skid_buffer import SkidBuffer

__all__ = ["StoreRawUnit", "store_raw_events"]


def store_raw_events() -> data.StructLayout:
    """What STORE_RAW reports to the counters: `plain_bits` of this `kind` in plain FP16, which are 32 a word."""
    return data.StructLayout({"plain_bits": 10, "kind": 3})


class StoreRawUnit(Block):
    """STORE_RAW, see `lnpu/ctrl/commands.py`.

    Row r of line l is vmem + l * vmem_line + r, modulo 2^16 (the vector memory reports those that it has not), and goes
    to address + l * pitch + r rows, modulo 2^address_bits. It is one or more words.

    The memory is asked for a burst of rows at a time (for one row, if that is longer), when the first of them is read:
    what others ask for waits for hardly more than a burst.

    While a row is sent the next ones are read, so a row takes as many cycles as it has words; a line takes at least
    two.

    A command that it cannot run writes nothing. `error` is then set for one cycle, while `busy` is still set:

    - FIELD: `line_count` or `line_rows` is zero, `address` or `pitch` no multiple of the AXI width, an address beyond
      `address_bits`;
    - OPCODE: not STORE_RAW.

    Members
    -------
    command : In(command_stream())
        Ready unless words of a command are still to be sent.
    busy : Out(1)
        From the cycle after a command was taken until the memory has acknowledged everything.
    earlier : Out(1)
        The memory has not acknowledged everything of the commands before the last one that was taken.
    error : Out(Error)
    read : Out(vmem_read_signature(config))
    memory : Out(memory_write_signature(config))
    events : Out(store_raw_events())
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "command": In(command_stream()),
                "busy": Out(1),
                "earlier": Out(1),
                "error": Out(Error),
                "read": Out(vmem_read_signature(config)),
                "memory": Out(memory_write_signature(config)),
                "events": Out(store_raw_events()),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        word_bytes = config.axi_bits // 8
        word_bits = (word_bytes - 1).bit_length()
        row_bytes = 4 * config.beat
        row_words = row_bytes // word_bytes
        most = max(1, config.burst_beats // row_words)  # rows in a request

        # Its `vmem` and `line_count` are those of the line that is read, its `address` that of the one asked for.
        held = Signal(LAYOUTS[Opcode.STORE_RAW].size, reset_less=True)
        line = data.View(LAYOUTS[Opcode.STORE_RAW], held)

        reading, begin = Signal(), Signal()
        pending = Signal()  # a row is at the port of the vector memory
        # Behind a buffer, what is asked of the vector memory does not hang on the other memory.
        rows_read = place(m, "rows", SkidBuffer(width=8 * row_bytes))
        row, row_valid = rows_read.o.payload, rows_read.o.valid
        with m.FSM(name="command_state") as command_state:
            with m.State("IDLE"):
                m.d.comb += self.command.ready.eq(1)
                with m.If(self.command.valid):
                    m.d.sync += held.eq(self.command.payload)
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.next = "IDLE"
                with m.If(line.opcode != Opcode.STORE_RAW):
                    m.d.comb += self.error.eq(Error.OPCODE)
                with m.Elif(
                    (line.line_count == 0)
                    | (line.line_rows == 0)
                    | line.address[:word_bits].any()
                    | line.address[config.address_bits :].any()
                    | line.pitch[:word_bits].any()
                ):
                    m.d.comb += self.error.eq(Error.FIELD)
                with m.Else():
                    m.d.comb += begin.eq(1)
                    m.next = "WRITE"
            with m.State("WRITE"), m.If(~reading & ~pending & ~row_valid):
                m.next = "IDLE"
        m.d.comb += [
            self.busy.eq(~command_state.ongoing("IDLE") | ~self.memory.idle),
            self.memory.fence.eq(self.command.ready & self.command.valid),
            self.earlier.eq(~self.memory.fenced),
        ]

        # Rows: from the vector memory to the buffer.
        at = Signal(16, reset_less=True)
        rows_left = Signal(16, reset_less=True)  # of this line, with this one
        index = Signal(range(most), reset_less=True)  # among the rows that are asked for together
        asking, step = Signal(), Signal()
        room, loaded, taken = Signal(), Signal(), Signal()
        m.d.comb += [
            loaded.eq(pending & rows_read.i.ready),
            room.eq(~pending | loaded),
            rows_read.i.valid.eq(pending),
            rows_read.i.payload.eq(self.read.row),
            rows_read.o.ready.eq(taken),
            self.read.request.valid.eq(reading & room & ~(asking & (index == 0))),
            self.read.request.payload.eq(at),
            step.eq(self.read.request.valid & self.read.request.ready),
        ]
        with m.If(room):
            m.d.sync += pending.eq(step)

        following_line = line.vmem + line.vmem_line
        with m.If(begin):
            m.d.sync += [reading.eq(1), at.eq(line.vmem), rows_left.eq(line.line_rows), index.eq(0)]
        with m.Elif(step):
            m.d.sync += [at.eq(at + 1), rows_left.eq(rows_left - 1), index.eq(index + 1)]
            with m.If(rows_left == 1):
                m.d.sync += [
                    at.eq(following_line),
                    rows_left.eq(line.line_rows),
                    index.eq(0),
                    line.vmem.eq(following_line),
                    line.line_count.eq(line.line_count - 1),
                    reading.eq(line.line_count != 1),
                ]

        # Requests: with the first of their rows.
        request = self.memory.request
        address = Signal(config.address_bits, reset_less=True)
        rows, ends = Signal(range(most + 1), reset_less=True), Signal(reset_less=True)  # ends: with them the line ends
        following_address = (line.address + line.pitch)[: config.address_bits]
        m.d.comb += [
            request.valid.eq(asking),
            request.payload.address.eq(address),
            request.payload.words.eq(rows * row_words),
            request.payload.kind.eq(line.kind),
        ]
        with m.If(step & (index == 0)):
            m.d.sync += [asking.eq(1), ends.eq(rows_left <= most), rows.eq(Mux(rows_left <= most, rows_left, most))]
        with m.Elif(request.ready):
            m.d.sync += asking.eq(0)
        with m.If(begin):
            m.d.sync += address.eq(line.address)
        with m.Elif(asking & request.ready):
            m.d.sync += address.eq(address + rows * row_bytes)
            with m.If(ends):
                m.d.sync += [address.eq(following_address), line.address.eq(following_address)]

        # Words: of the row, in order. The memory takes them once it has taken the request.
        words = self.memory.data
        part = Signal(range(row_words))
        sent = Signal()
        m.d.comb += [
            words.valid.eq(row_valid),
            words.payload.data.eq(row.word_select(part, config.axi_bits)),
            words.payload.strobe.eq((1 << word_bytes) - 1),
            sent.eq(words.valid & words.ready),
            taken.eq(sent & (part == row_words - 1)),
        ]
        with m.If(sent):
            m.d.sync += part.eq(part + 1)

        m.d.comb += [self.events.plain_bits.eq(Mux(loaded, 32 * config.beat, 0)), self.events.kind.eq(line.kind)]
        return m
