"""Moves rows of the vector memory to external memory, as encoded tensors.

A reader walks the rows; a writer walks the blocks, tells the encoder between them where each block goes, asks the
memory for the words that leave with it, and gathers lengths into words of the length table. The reader's first rows
come while the writer still multiplies out where the first block is.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum
from amaranth.lib.wiring import In, Out

from lnpu.config import BLOCK, ChipConfig
from lnpu.ctrl.commands import LAYOUTS, Opcode
from lnpu.fgmp.encoder import Encoder
from lnpu.formats import MAX_LOG2_RUN, SLOT_BYTES
from lnpu.fp.half import SingleToHalf
from lnpu.hdl import Block, place
from lnpu.interfaces import Error, command_stream, memory_write_signature, vmem_read_signature
from lnpu.mem.fifo import RegisterFifo
from lnpu.mem.skid_buffer import SkidBuffer

__all__ = ["StoreUnit", "store_events"]

MAX_SCALE = 64


class Job(enum.Enum, shape=1):
    """What the next words on the way to memory are."""

    BLOCK = 0
    TABLE = 1


def store_events(config: ChipConfig) -> data.StructLayout:
    """What STORE reports to the counters; to be added up in every cycle.

    - `zero`, `underflow`, `fp8`, `fp16`: elements of a beat that were zero, became zero, or are kept in that precision.
      They add up to 64 for each block: what fills the last block of a line counts as zero.
    - `nonfinite`: an element was infinite or NaN after rounding to FP16.
    - `top`: the largest exponent field of a finite element of a beat after rounding to FP16, 0 if there is none.
    - `dynamic`: the tensor that is being stored has an FGMP state.
    - `plain_bits`: bits that a transfer of this `kind` takes in plain FP16: 1024 for a block.
    """
    count = unsigned(config.beat.bit_length())
    return data.StructLayout(
        {
            "zero": count,
            "underflow": count,
            "fp8": count,
            "fp16": count,
            "nonfinite": 1,
            "top": 5,
            "dynamic": 1,
            "plain_bits": 11,
            "kind": 3,
        }
    )


class StoreUnit(Block):
    """STORE, see `lnpu/ctrl/commands.py`.

    It cuts pixels (n, i, j) into blocks. With `log2_block_pixels` = k > 0, 2^k pixels of a line share a block; their
    channels are (64 >> k) / `beat` rows each, and after the last j the block is filled with zeros. Rows are at source +
    n * source_n + i * source_i + j * source_j + row, modulo 2^16; the vector memory reports those that it has not.

    Blocks of a run that follow one another are packed. A block is one memory request of the words that it completes,
    and the rest if the next block does not continue the run; none if there are no such words. Only used bytes are
    strobed. Lengths of blocks that follow one another and share a word of the length table go out together.

    A command that it cannot run writes nothing. `error` is then set for one cycle, while `busy` is still set:

    - FIELD: a zero count (`n_count`, `i_count`, `j_count`, `line_blocks`), lo > hi, below = 3, `slots` or `table` no
      multiple of 32 or beyond `address_bits`, (64 >> log2_block_pixels) < `beat`, `pixel` no multiple of the pixels
      that share a block, log2_run > 4, more blocks in a run than bytes in an AXI word, |scale| > 64;
    - RANGE (if it is not FIELD): `line` or `pixel` is negative;
    - OPCODE: not STORE.

    `error` is also set to FIELD for one cycle for each block that is not the first of its run and does not follow the
    one before it in the command. The command goes on; such a block is written as if it were the first of its run.

    Addresses are modulo 2^address_bits. A row is read in every cycle where the memory takes the words.

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
    events : Out(store_events(config))
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
                "events": Out(store_events(config)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        beat, address_bits = config.beat, config.address_bits
        word_bytes = config.axi_bits // 8
        word_bits = (word_bytes - 1).bit_length()
        encoder = place(m, "encoder", Encoder(config=config))

        held = Signal(LAYOUTS[Opcode.STORE].size, reset_less=True)
        store = data.View(LAYOUTS[Opcode.STORE], held)
        offered = data.View(LAYOUTS[Opcode.STORE], self.command.payload[: LAYOUTS[Opcode.STORE].size])

        # What is wrong with a command: known in the cycle after it was taken.
        bad_opcode, bad_field, bad_range = (
            Signal(name=f"bad_{what}", reset_less=True) for what in ("opcode", "field", "range")
        )
        misplaced = Signal()
        most = (BLOCK // beat).bit_length() - 1
        with m.Switch(offered.log2_block_pixels):
            for k in range(most + 1):
                with m.Case(k):
                    m.d.comb += misplaced.eq(offered.pixel[:k].any())
            with m.Default():
                m.d.comb += misplaced.eq(1)
        m.d.sync += [
            bad_opcode.eq(offered.opcode != Opcode.STORE),
            bad_field.eq(
                (offered.n_count == 0)
                | (offered.i_count == 0)
                | (offered.j_count == 0)
                | (offered.line_blocks == 0)
                | (offered.lo > offered.hi)
                | (offered.below == 3)
                | offered.slots[:5].any()
                | offered.table[:5].any()
                | offered.slots[address_bits:].any()
                | offered.table[address_bits:].any()
                | misplaced
                | (offered.log2_run > min(MAX_LOG2_RUN, word_bits))
                | (offered.scale > MAX_SCALE)
                | (offered.scale < -MAX_SCALE)
            ),
            bad_range.eq((offered.line < 0) | (offered.pixel < 0)),
        ]

        begin, astray, written = Signal(), Signal(), Signal()
        problem = Signal(Error)
        m.d.sync += self.error.eq(problem)
        with m.FSM(name="command_state") as command_state:
            with m.State("IDLE"):
                m.d.comb += self.command.ready.eq(1)
                with m.If(self.command.valid):
                    m.d.sync += [
                        held.eq(self.command.payload),
                        self.events.dynamic.eq((offered.opcode == Opcode.STORE) & (offered.tensor != 0)),
                    ]
                    m.next = "CHECK"
            with m.State("CHECK"):
                with m.If(bad_opcode):
                    m.d.comb += problem.eq(Error.OPCODE)
                with m.Elif(bad_field):
                    m.d.comb += problem.eq(Error.FIELD)
                with m.Elif(bad_range):
                    m.d.comb += problem.eq(Error.RANGE)
                m.d.comb += begin.eq(problem == Error.NONE)
                m.next = "WRITE"
                with m.If(~begin):
                    m.next = "REJECT"
            with m.State("REJECT"):
                m.next = "IDLE"
            with m.State("WRITE"):
                with m.If(astray):
                    m.d.comb += problem.eq(Error.FIELD)
                with m.If(written):
                    m.next = "IDLE"
        m.d.comb += [
            self.busy.eq(~command_state.ongoing("IDLE") | ~self.memory.idle),
            self.memory.fence.eq(self.command.ready & self.command.valid),
            self.earlier.eq(~self.memory.fenced),
        ]

        row_taken = Signal()
        row, row_valid = self._reader(m, begin, row_taken, store, most)

        # Rows to the encoder.
        half_valid = Signal(SingleToHalf.LATENCY)
        m.d.comb += row_taken.eq(~half_valid[-1] | encoder.i.ready)
        with m.If(row_taken):
            m.d.sync += half_valid.eq(Cat(row_valid, half_valid[:-1]))
        for e in range(beat):
            half = place(m, f"half{e}", SingleToHalf())
            m.d.comb += [
                half.enable.eq(row_taken),
                half.i.eq(row[e]),
                half.scale.eq(store.scale),
                half.saturate.eq(store.saturate),
                encoder.i.payload[e].eq(half.o),
            ]
        m.d.comb += [
            encoder.i.valid.eq(half_valid[-1]),
            encoder.lo.eq(store.lo),
            encoder.hi.eq(store.hi),
            encoder.below.eq(store.below),
            encoder.above.eq(store.above),
        ]

        # Words to memory: `jobs` says what to send for the requests that were taken.
        job_layout = data.StructLayout(
            {
                "job": Job,
                "words": 5,
                "used": word_bits,  # bytes of the last word; 0: all
            }
        )
        jobs = place(m, "jobs", RegisterFifo(shape=job_layout, depth=4))
        table_word = Signal(data.StructLayout({"data": config.axi_bits, "strobe": word_bytes}), reset_less=True)
        table_waits = Signal()
        port = self.memory.data
        job = jobs.o.payload
        words_sent = Signal(5)
        sent, last = Signal(), Signal()
        m.d.comb += [
            sent.eq(port.valid & port.ready),
            last.eq(words_sent == job.words - 1),
            jobs.o.ready.eq(sent & last),
        ]
        with m.If(sent):
            m.d.sync += words_sent.eq(Mux(last, 0, words_sent + 1))
        with m.If(jobs.o.valid), m.Switch(job.job):
            with m.Case(Job.BLOCK):
                m.d.comb += [
                    port.valid.eq(encoder.o.valid),
                    port.payload.data.eq(encoder.o.payload),
                    port.payload.strobe.eq(
                        Cat(
                            ~last | (job.used == 0) | ((job.used > b) if b < word_bytes - 1 else 0)
                            for b in range(word_bytes)
                        )
                    ),
                    encoder.o.ready.eq(port.ready),
                ]
            with m.Case(Job.TABLE):
                m.d.comb += [port.valid.eq(1), port.payload.eq(table_word)]
                with m.If(sent):
                    m.d.sync += table_waits.eq(0)

        block_placed = self._writer(m, encoder, jobs, table_word, table_waits, begin, astray, written, store)

        m.d.comb += [
            self.events[name].eq(encoder.events[name])
            for name in ("zero", "underflow", "fp8", "fp16", "nonfinite", "top")
        ]
        m.d.comb += self.events.kind.eq(store.kind)
        m.d.sync += self.events.plain_bits.eq(Mux(block_placed, 16 * BLOCK, 0))
        return m

    def _reader(self, m, begin, row_taken, store, most):
        """Walk the rows: the registers of the walk are the next request. Returns the encoder's row and its `valid`."""
        beat = self.config.beat
        active = Signal()
        address, address_j, address_i, address_n = (
            Signal(16, name=f"read_address{loop}", reset_less=True) for loop in ("", "_j", "_i", "_n")
        )
        rows_left = Signal(range(BLOCK // beat), reset_less=True)  # of this pixel, after this row
        group_left = Signal(range(BLOCK // beat), reset_less=True)  # pixels of this block, after this one
        j_left = Signal(12, reset_less=True)  # with this one; 0: a pixel that fills the block
        i_left = Signal(12, reset_less=True)
        n_left = Signal(12, reset_less=True)
        pixel_rows, group_pixels = Signal.like(rows_left), Signal.like(group_left)  # less 1
        fills, step = Signal(), Signal()
        with m.Switch(store.log2_block_pixels):
            for k in range(most + 1):
                with m.Case(k):
                    m.d.comb += [pixel_rows.eq((BLOCK // beat >> k) - 1), group_pixels.eq((1 << k) - 1)]
        next_n, next_i, next_j = (Signal(16, name=f"next_{loop}") for loop in "nij")
        m.d.comb += [
            fills.eq(j_left == 0),
            next_n.eq(address_n + store.source_n),
            next_i.eq(address_i + store.source_i),
            next_j.eq(address_j + store.source_j),
        ]
        with m.If(begin):
            m.d.sync += [
                active.eq(1),
                address.eq(store.source),
                address_j.eq(store.source),
                address_i.eq(store.source),
                address_n.eq(store.source),
                rows_left.eq(pixel_rows),
                group_left.eq(group_pixels),
                j_left.eq(store.j_count),
                i_left.eq(store.i_count),
                n_left.eq(store.n_count),
            ]
        with m.Elif(step):
            with m.If(rows_left != 0):
                m.d.sync += [rows_left.eq(rows_left - 1), address.eq(address + 1)]
            with m.Else():
                m.d.sync += rows_left.eq(pixel_rows)
                with m.If((j_left > 1) | (group_left != 0)):
                    m.d.sync += [
                        address.eq(next_j),
                        address_j.eq(next_j),
                        j_left.eq(Mux(fills, 0, j_left - 1)),
                        group_left.eq(Mux(group_left == 0, group_pixels, group_left - 1)),
                    ]
                with m.Else():
                    m.d.sync += [j_left.eq(store.j_count), group_left.eq(group_pixels)]
                    with m.If(i_left != 1):
                        m.d.sync += [
                            i_left.eq(i_left - 1),
                            address.eq(next_i),
                            address_j.eq(next_i),
                            address_i.eq(next_i),
                        ]
                    with m.Else():
                        m.d.sync += [
                            i_left.eq(store.i_count),
                            n_left.eq(n_left - 1),
                            address.eq(next_n),
                            address_j.eq(next_n),
                            address_i.eq(next_n),
                            address_n.eq(next_n),
                        ]
                        with m.If(n_left == 1):
                            m.d.sync += active.eq(0)

        # Behind a buffer, what is asked of the vector memory does not hang on the encoder.
        rows = place(m, "rows", SkidBuffer(width=32 * beat))
        pending, pending_fills = Signal(), Signal(reset_less=True)  # a row is at the port of the vector memory
        room = Signal()
        m.d.comb += [
            room.eq(~pending | rows.i.ready),
            rows.i.valid.eq(pending),
            rows.i.payload.eq(Mux(pending_fills, 0, self.read.row.as_value())),
            rows.o.ready.eq(row_taken),
            self.read.request.valid.eq(active & ~fills & room),
            self.read.request.payload.eq(address),
            step.eq(active & room & (fills | self.read.request.ready)),
        ]
        with m.If(room):
            m.d.sync += [pending.eq(step), pending_fills.eq(fills)]
        return data.View(data.ArrayLayout(32, beat), rows.o.payload), rows.o.valid

    def _writer(self, m, encoder, jobs, table_word, table_waits, begin, astray, written, store):
        """Walk the blocks, ask the memory for each; returns a signal that pulses for each block."""
        config = self.config
        address_bits = config.address_bits
        word_bytes = config.axi_bits // 8
        word_bits = (word_bytes - 1).bit_length()

        # Blocks: number of the next block, of the first block of this i, of this n.
        index, index_i, index_n = (
            Signal(address_bits, name=f"block{loop}", reset_less=True) for loop in ("", "_i", "_n")
        )
        line_step_n, line_step_i = (Signal(32, name=f"blocks_{loop}", reset_less=True) for loop in "ni")
        factor = Signal(16, reset_less=True)
        bit = Signal(4)
        pixels_left, i_left, n_left = (
            Signal(12, name=f"{what}_left", reset_less=True) for what in ("pixels", "lines", "n")
        )
        block_pixels = Signal(12)
        final = Signal(reset_less=True)
        in_run = Signal(MAX_LOG2_RUN)
        m.d.comb += [
            block_pixels.eq(1 << store.log2_block_pixels),
            in_run.eq((1 << store.log2_run) - 1),
        ]

        # The block at hand: `fill` bytes of its first word are of the block that it continues.
        fill = Signal(word_bits)
        continues = Signal()  # it follows the one before in a run
        inner, flush = Signal(reset_less=True), Signal(reset_less=True)
        follower = Signal(address_bits, reset_less=True)
        offset = Signal(address_bits, reset_less=True)  # of the run's slot
        table_address, address = Signal(address_bits, reset_less=True), Signal(address_bits, reset_less=True)
        length = Signal(8, reset_less=True)
        end, payload = Signal(8, reset_less=True), Signal(6, reset_less=True)  # bytes from `address`
        words = Signal(5, reset_less=True)
        gathering = Signal()
        gathered_at = Signal(address_bits - word_bits, reset_less=True)
        gathered, strobe = Signal(config.axi_bits, reset_less=True), Signal(word_bytes, reset_less=True)

        def gather(fresh):
            """Put the length into the table word, which is a new one if `fresh`."""
            m.d.sync += [gathering.eq(1), gathered_at.eq(table_address[word_bits:])]
            for b in range(word_bytes):
                with m.If(table_address[:word_bits] == b):
                    m.d.sync += [gathered[8 * b : 8 * b + 8].eq(length), strobe[b].eq(1)]
                with m.Elif(fresh):
                    m.d.sync += [gathered[8 * b : 8 * b + 8].eq(0), strobe[b].eq(0)]

        request = self.memory.request
        asked, block_placed = Signal(), Signal()
        wanted = Signal()
        m.d.comb += [
            request.valid.eq(wanted & jobs.i.ready),
            asked.eq(request.valid & request.ready),
            jobs.i.valid.eq(asked),
            jobs.i.payload.words.eq(request.payload.words),
            request.payload.kind.eq(store.kind),
            encoder.places.valid.eq(block_placed),
            encoder.places.payload.start.eq(fill),
            encoder.places.payload.payload.eq(payload),
            encoder.places.payload.words.eq(words),
            encoder.places.payload.flush.eq(flush),
        ]

        def ask_table():
            """Ask to write the table word, which then waits for its turn; returns that this was done."""
            m.d.comb += [
                wanted.eq(~table_waits),
                request.payload.address.eq(gathered_at << word_bits),
                request.payload.words.eq(1),
                jobs.i.payload.job.eq(Job.TABLE),
            ]
            with m.If(asked):
                m.d.sync += [table_waits.eq(1), table_word.data.eq(gathered), table_word.strobe.eq(strobe)]
            return asked

        with m.FSM(name="writer_state"):
            with m.State("IDLE"), m.If(begin):
                m.d.sync += [
                    index_n.eq(0),
                    line_step_n.eq(0),
                    line_step_i.eq(0),
                    factor.eq(store.line_blocks),
                    pixels_left.eq(store.j_count),
                    i_left.eq(store.i_count),
                    n_left.eq(store.n_count),
                ]
                m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                # By the factor's bits from the highest down.
                m.d.sync += [
                    index_n.eq((index_n << 1) + Mux(factor[15], store.line.as_unsigned(), 0)),
                    line_step_n.eq((line_step_n << 1) + Mux(factor[15], store.line_n, 0)),
                    line_step_i.eq((line_step_i << 1) + Mux(factor[15], store.line_i, 0)),
                    factor.eq(factor << 1),
                    bit.eq(bit + 1),
                ]
                with m.If(bit == 15):
                    m.next = "FIRST"
            with m.State("FIRST"):
                first = index_n + (store.pixel.as_unsigned() >> store.log2_block_pixels)
                m.d.sync += [index.eq(first), index_i.eq(first), index_n.eq(first)]
                m.next = "NEXT"
            with m.State("NEXT"):
                m.d.comb += encoder.sizes.ready.eq(1)
                with m.If(encoder.sizes.valid):
                    run = Cat(index[:MAX_LOG2_RUN] & ~in_run, index[MAX_LOG2_RUN:])
                    m.d.sync += [
                        length.eq(encoder.sizes.payload.length),
                        end.eq(fill + encoder.sizes.payload.length),
                        payload.eq(fill + encoder.sizes.payload.head),
                        inner.eq((index[:MAX_LOG2_RUN] & in_run).any()),
                        follower.eq(index + 1),
                        offset.eq((run << 7) + (run << 5)),
                        table_address.eq(store.table + index),
                        final.eq(0),
                    ]
                    with m.If(pixels_left > block_pixels):
                        m.d.sync += [pixels_left.eq(pixels_left - block_pixels), index.eq(index + 1)]
                    with m.Else():
                        m.d.sync += pixels_left.eq(store.j_count)
                        with m.If(i_left != 1):
                            following = index_i + line_step_i
                            m.d.sync += [i_left.eq(i_left - 1), index.eq(following), index_i.eq(following)]
                        with m.Else():
                            following = index_n + line_step_n
                            m.d.sync += [
                                i_left.eq(store.i_count),
                                n_left.eq(n_left - 1),
                                index.eq(following),
                                index_i.eq(following),
                                index_n.eq(following),
                                final.eq(n_left == 1),
                            ]
                    m.next = "PLACE"
            with m.State("PLACE"):
                ends = final | (index != follower) | ~(index[:MAX_LOG2_RUN] & in_run).any()
                m.d.comb += astray.eq(inner & ~continues)
                m.d.sync += [
                    flush.eq(ends),
                    words.eq((end >> word_bits) + (ends & end[:word_bits].any())),
                ]
                with m.If(~continues):
                    m.d.sync += address.eq(store.slots + offset)
                with m.If(gathering & (gathered_at != table_address[word_bits:])):
                    m.next = "TABLE"
                with m.Else():
                    gather(~gathering)
                    m.next = "BLOCK"
            with m.State("TABLE"), m.If(ask_table()):
                gather(1)
                m.next = "BLOCK"
            with m.State("BLOCK"):
                m.d.comb += [
                    wanted.eq((words != 0) & encoder.places.ready),
                    block_placed.eq(Mux(words != 0, asked, encoder.places.ready)),
                    request.payload.address.eq(address),
                    request.payload.words.eq(words),
                    jobs.i.payload.job.eq(Job.BLOCK),
                    jobs.i.payload.used.eq(Mux(flush, end[:word_bits], 0)),
                ]
                with m.If(block_placed):
                    m.d.sync += [
                        address.eq(address + (words << word_bits)),
                        fill.eq(Mux(flush, 0, end[:word_bits])),
                        continues.eq(~flush),
                    ]
                    m.next = "NEXT"
                    with m.If(final):
                        m.next = "LAST_TABLE"
            with m.State("LAST_TABLE"), m.If(ask_table()):
                m.d.sync += gathering.eq(0)
                m.next = "SEND"
            with m.State("SEND"), m.If(~jobs.o.valid):
                m.d.comb += written.eq(1)
                m.next = "IDLE"
        return block_placed


assert SLOT_BYTES == (1 << 7) + (1 << 5)
