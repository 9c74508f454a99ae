"""The LOAD unit: encoded tensors and FP32 words from memory to the cores' buffers and the vector memory."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import BLOCK, ChipConfig
from lnpu.ctrl.commands import LAYOUTS, Opcode
from lnpu.fgmp.decoder import Decoder
from lnpu.formats import F16_INF, MAX_LENGTH, MAX_LOG2_RUN, SLOT_BYTES, Code
from lnpu.fp.half import HalfToSingle
from lnpu.hdl import Block, place
from lnpu.interfaces import Buffer, Error, buffer_write, command_stream, memory_read_signature, vmem_write
from lnpu.mem.aligner import Aligner, aligned_block
from lnpu.mem.fifo import RegisterFifo, SramFifo
from lnpu.mem.skid_buffer import SkidBuffer

__all__ = ["LoadUnit", "LoadWalker", "block_bits", "load_events", "load_pixel", "load_walk"]

ROW_BITS = 31
"""Bits of a destination row before it is checked (signed)."""

COLUMN_BITS = 24
"""Bits of a pixel's destination column before it is checked."""

PENDING_BLOCKS, BLOCKS_IN_FLIGHT = 8, 16
"""Blocks whose length is being read; blocks requested and not yet decoded."""

WORDS_AHEAD = 64
"""AXI words of blocks that have been requested and not yet taken by the aligner."""

RAW_ROWS = 2048
"""Most vector-memory rows in one request of LOAD_RAW."""


def load_events(config: ChipConfig) -> data.StructLayout:
    """What LOAD reports to the counters each cycle.

    `bits`: what the elements that went to their place in this cycle take in plain form (0 in most cycles): 16 for each
    element of a beat of a pixel that is not padding, 32 for each FP32 word. Elements that were dropped because their
    destination is out of range count too. `kind`: the command's tensor kind; to be ignored where `bits` is 0.
    """
    return data.StructLayout({"kind": 3, "bits": (32 * config.beat).bit_length()})


def block_bits(config: ChipConfig) -> int:
    """Bits of a block's number: 160 bytes times that covers all addresses. Block numbers are modulo 2^(these bits)."""
    return config.address_bits - 7


def load_walk(config: ChipConfig) -> data.StructLayout:
    """Parameters of a `LoadWalker`: fields of LOAD, and products of them, numbers of blocks.

    `block`: line * line_blocks; `block_n`, `block_i`: the same of line_n and line_i.
    """
    count = dict.fromkeys(("n_count", "i_count", "j_count", "i_first", "i_end", "j_first", "j_end"), 12)
    return data.StructLayout(
        count
        | {"line": signed(25), "line_n": 16, "line_i": 8, "pixel": signed(16), "pixel_j": 8}
        | dict.fromkeys(("block", "block_n", "block_i"), block_bits(config))
        | {"log2_block_pixels": 3, "channel": 5}
        | {"dest": 16, "dest_n": signed(16), "dest_i": signed(16), "dest_j": signed(16)}
        | {"element": 12, "element_i": 12}
    )


def load_pixel(config: ChipConfig) -> data.StructLayout:
    """A pixel of the walk.

    `real`: it comes from memory, else it is padding, and `negative` tells if only because its line or its pixel is
    below 0. `fresh`: its block is to be fetched for it (it is another block than that of the real pixel before it, or
    one that has been read past `position`). `block`, `position`: number of its block, and its first beat there.
    `row`, `column`: its destination. `last`: the last of the walk.
    """
    position_bits = config.block_beats.bit_length() - 1
    return data.StructLayout({
        "real": 1, "negative": 1, "fresh": 1, "block": block_bits(config), "position": position_bits,
        "row": signed(ROW_BITS), "column": COLUMN_BITS, "last": 1,
    })  # fmt: skip


def _row_write(config: ChipConfig) -> data.StructLayout:
    """A row for the vector memory, before its address is checked."""
    return data.StructLayout({"address": signed(34), "row": vmem_write(config)["row"].shape})


class LoadWalker(Block):
    """Walks the pixels of a LOAD, one a cycle, three cycles of latency.

    LOAD has two: one runs ahead and fetches blocks, the other follows the decoded beats. They see the same pixels.

    Parameters
    ----------
    config : ChipConfig
        Uses `beat`.
    places : bool
        Whether `o.row` and `o.column` are needed (they are 0 otherwise).

    Members
    -------
    start : In(1)
        Begin the walk. Only while there is none.
    walk : In(load_walk(config))
        Constant from `start` until `last` has been taken.
    o : Out(stream.Signature(load_pixel(config)))
    """

    def __init__(self, *, config: ChipConfig, places: bool) -> None:
        self.config, self.places = config, places
        super().__init__({
            "start": In(1), "walk": In(load_walk(config)), "o": Out(stream.Signature(load_pixel(config))),
        })  # fmt: skip

    @property
    def suffix(self) -> str:
        return f"{self.config.beat}_{'place' if self.places else 'fetch'}"

    def elaborate(self, platform):
        m = Module()
        walk = self.walk

        # Counters, and what follows them, each with one adder.
        n, i, j = Signal(12, reset_less=True), Signal(12, reset_less=True), Signal(12, reset_less=True)
        j_last, i_last, n_last = (Signal(name=f"{loop}_last", reset_less=True) for loop in "jin")
        active, step = Signal(), Signal()

        def begin(index, last, count):
            return [index.eq(0), last.eq(count == 1)]

        def go_on(index, last, count):
            return [index.eq(index + 1), last.eq(index + 2 == count)]

        of_n, of_i, of_j = (n, n_last, walk.n_count), (i, i_last, walk.i_count), (j, j_last, walk.j_count)
        with m.If(self.start):
            m.d.sync += [active.eq(1), begin(*of_n), begin(*of_i), begin(*of_j)]
        with m.Elif(step):
            m.d.sync += go_on(*of_j)
            with m.If(j_last):
                m.d.sync += [begin(*of_j), go_on(*of_i)]
                with m.If(i_last):
                    m.d.sync += [begin(*of_i), go_on(*of_n)]
                    with m.If(n_last):
                        m.d.sync += active.eq(0)

        def follow(name, shape, base, step_n, step_i, step_j):
            """base + n * step_n + i * step_i + j * step_j; a step of None: 0 (the base is constant)."""
            value = Signal(shape, name=name, reset_less=True)
            of_i = Signal(shape, name=f"{name}_i", reset_less=True) if step_j is not None else value
            of_n = Signal(shape, name=f"{name}_n", reset_less=True) if step_n is not None else base
            following = Signal(shape, name=f"{name}_next")
            if step_i is None:
                m.d.comb += following.eq(Mux(j_last, of_i, value + step_j))
            else:
                origin, stride = Mux(i_last, of_n, of_i), Mux(i_last, 0 if step_n is None else step_n, step_i)
                if step_j is not None:
                    origin, stride = Mux(j_last, origin, value), Mux(j_last, stride, step_j)
                m.d.comb += following.eq(origin + stride)
            with m.If(self.start):
                m.d.sync += [signal.eq(base) for signal in (value, of_i, of_n) if signal is not base]
            with m.Elif(step):
                m.d.sync += value.eq(following if step_j is not None else Mux(j_last, following, value))
                if step_i is not None:
                    with m.If(j_last):
                        m.d.sync += of_i.eq(following)
                        if step_n is not None:
                            with m.If(i_last):
                                m.d.sync += of_n.eq(following)
            return value

        line = follow("line", signed(30), walk.line, walk.line_n, walk.line_i, None)
        block = follow("block", len(walk.block), walk.block, walk.block_n, walk.block_i, None)
        pixel = follow("pixel", signed(22), walk.pixel, None, None, walk.pixel_j)
        row = column = Const(0, 1)
        if self.places:
            row = follow("row", signed(ROW_BITS), walk.dest, walk.dest_n, walk.dest_i, walk.dest_j)
            column = follow("column", COLUMN_BITS, walk.element, None, walk.element_i, None)

        # Block and position of the pixel
        found = Signal(load_pixel(self.config), reset_less=True)
        found_valid, found_ready = Signal(), Signal()
        inside, negative = Signal(), Signal()
        m.d.comb += [
            found_ready.eq(~found_valid | ~self.o.valid | self.o.ready),
            step.eq(active & found_ready),
            inside.eq((i >= walk.i_first) & (i < walk.i_end) & (j >= walk.j_first) & (j < walk.j_end)),
            negative.eq((line < 0) | (pixel < 0)),
        ]
        with m.If(found_ready):
            m.d.sync += [
                found_valid.eq(active),
                found.real.eq(inside & ~negative),
                found.negative.eq(inside & negative),
                found.row.eq(row),
                found.column.eq(column),
                found.last.eq(n_last & i_last & j_last),
            ]
            with m.Switch(walk.log2_block_pixels):
                beats = len(found.position)
                for log2 in range(beats + 1):
                    with m.Case(log2):
                        m.d.sync += [
                            found.block.eq(block + pixel[log2:]),
                            found.position.eq(Cat(Const(0, beats - log2), pixel[:log2]) + walk.channel),
                        ]

        # Whether its block is there already
        held, held_position = Signal(), Signal.like(found.position)
        held_block = Signal(len(found.block), reset_less=True)
        with m.If(self.start):
            m.d.sync += held.eq(0)
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [
                self.o.valid.eq(found_valid),
                self.o.payload.eq(found),
                self.o.payload.fresh.eq(~held | (found.block != held_block) | (found.position <= held_position)),
            ]
            with m.If(found_valid & found.real):
                m.d.sync += [held.eq(1), held_block.eq(found.block), held_position.eq(found.position)]
        return m


class LoadUnit(Block):
    """Runs LOAD and LOAD_RAW (see `lnpu.ctrl.commands`, docs/architecture.md).

    LOAD walks pixels n, i, j (j innermost): line = line + n * line_n + i * line_i, pixel = pixel + j * pixel_j. A
    pixel with i outside [i_first, i_end) or j outside [j_first, j_end) is padding and not read: its beats have code
    PADDING and value 0, in the vector memory the value of `fill`. Another one is at beats `(pixel mod 2^log2) * (64 >>
    log2) / beat + channel` and on of its block. Real pixels that follow each other (whatever padding is between them)
    share one fetch of a block as long as they come in increasing position. A mask has a bit an element: whether it is
    above zero; padding and NaNs are not.

    Errors, each a pulse:

    - FIELD: the command cannot run and has been dropped: an opcode other than LOAD and LOAD_RAW; a count or
      `line_blocks` that is 0; channel_beats of 0 or channel + channel_beats beyond the pixel's part of a block; a part
      smaller than a beat; runs of more than 16 blocks or more than an AXI word has bytes; |scale| > 64
      (whatever the target); i_end > i_count, i_first > i_end or the same of j; `slots` or `table` not a multiple of 32;
      for the cores' buffers and masks: no core, one that there is not, `element` or `element_i` not a multiple of
      `beat`; a mask transposed; a target that there is not. LOAD_RAW: a count of 0, `address` or `pitch` not a multiple
      of the AXI width. Both: an address beyond `address_bits`.
    - RANGE: a beat whose destination is outside its buffer, which is dropped; a pixel that is not padding but whose
      line or number is negative, which is treated as padding.
    - DECODE: a malformed block, or one with a length of 0 or more than 145 in the table, which is not read. It counts
      as a block of zeros.

    Errors of one kind that come at the same time as others may merge; `error` is NONE in the cycles between, and all
    have been given when `busy` falls. Destination rows are exact integers (they do not wrap), block numbers are modulo
    2^(address_bits - 7). Neither the number of lines nor `line_blocks` bounds the pixels.

    A block begins behind those before it in its run: at the sum of their bytes in the table, whatever these are. Its
    words are one request, or none: the first word is not asked for if it is the last one of the block that was read
    before in this command.

    A second command is taken while one is running: its blocks are fetched as soon as all of the first have been
    requested, while those come and go to their places. LOAD_RAW waits until the unit is idle.

    LOAD needs 6 cycles before it walks. In the steady state it is limited by the slowest of: memory; `Aligner` and
    `Decoder`; placement, one beat a cycle, in which beats of a block that no pixel needs count too. Where an AXI word
    has 8 bytes, the lengths of 8 blocks at a time are read, so 8 blocks take no less than a read of memory.

    Parameters
    ----------
    config : ChipConfig
    dense : bool
        The unit of targets DENSE, VMEM_DENSE and MASK_DENSE alone: others and LOAD_RAW are FIELD.

    Members
    -------
    command : In(command_stream())
        Ready while at most one command is being run, and that one needs no more requests.
    busy : Out(1)
        From the cycle after a command has been taken until the last effect of all that have been taken is done.
    queued : Out(1)
        A command has been taken while the one before is not done (unless it was dropped: that ends the program).
    error : Out(Error)
    table : Out(memory_read_signature(config))
        Reads of the length table. Its data is always taken at once.
    memory : Out(memory_read_signature(config))
        Reads of blocks and FP32 words.
    write : Out(buffer_write(config))
    vmem : Out(stream.Signature(vmem_write(config)))
    events : Out(load_events(config))
    """

    def __init__(self, *, config: ChipConfig, dense: bool = False) -> None:
        self.config, self.dense = config, dense
        super().__init__(
            {
                "command": In(command_stream()),
                "busy": Out(1),
                "queued": Out(1),
                "error": Out(Error),
                "table": Out(memory_read_signature(config)),
                "memory": Out(memory_read_signature(config)),
                "write": Out(buffer_write(config)),
                "vmem": Out(stream.Signature(vmem_write(config))),
                "events": Out(load_events(config)),
            }
        )

    @property
    def suffix(self) -> str:
        return "dense" if self.dense else ""

    def elaborate(self, platform):
        m = Module()
        config = self.config
        word = Signal(len(self.command.payload), name="command_word", reset_less=True)
        load = data.View(LAYOUTS[Opcode.LOAD], word[: LAYOUTS[Opcode.LOAD].size])
        raw = data.View(LAYOUTS[Opcode.LOAD_RAW], word[: LAYOUTS[Opcode.LOAD_RAW].size])

        # Two commands overlap: this one is fetched while the one before, `place_word`, is still brought to its place.
        walk = Signal(load_walk(config))
        place_word = Signal.like(word, name="place_word")
        placed = data.View(LAYOUTS[Opcode.LOAD], place_word[: LAYOUTS[Opcode.LOAD].size])
        place_walk = Signal(load_walk(config), name="place_walk", reset_less=True)
        start, hand_over, start_place, start_raw = Signal(), Signal(), Signal(), Signal()
        fetch_done, place_done, raw_done, writing = Signal(), Signal(), Signal(), Signal()
        fetching, placing, raw_active = Signal(), Signal(), Signal()
        pending = Signal(data.StructLayout({"field": 1, "decode": 1, "range": 1}))
        step = Signal(range(4))
        valid_load, valid_raw = self._valid_load(m, load), self._valid_raw(m, raw)

        reporting = Cat(pending.as_value(), self.error.as_value()).any()
        handed_over = Signal()  # what is being placed is the same command
        m.d.comb += [
            fetching.eq(1),
            self.busy.eq(fetching | placing | reporting),
            self.queued.eq(fetching & placing & ~handed_over),
        ]
        with m.FSM(name="load"):
            with m.State("idle"):
                m.d.comb += [self.command.ready.eq(1), fetching.eq(0)]
                m.d.sync += word.eq(self.command.payload)
                with m.If(self.command.valid):
                    m.next = "check"
            with m.State("check"):
                m.d.sync += step.eq(0)
                with m.If((load.opcode == Opcode.LOAD) & valid_load):
                    m.next = "multiply"
                if not self.dense:
                    with m.Elif((load.opcode == Opcode.LOAD_RAW) & valid_raw):
                        m.next = "start raw"
                with m.Else():
                    m.d.sync += pending.field.eq(1)
                    m.next = "idle"
            with m.State("multiply"):
                m.d.sync += step.eq(step + 1)
                with m.If(step == 3):
                    m.next = "start"
            with m.State("start"):
                m.d.comb += start.eq(1)
                m.next = "hand over"
            with m.State("hand over"), m.If(~placing):
                m.d.comb += hand_over.eq(1)
                m.next = "fetch"
            with m.State("fetch"):
                m.d.comb += handed_over.eq(1)
                with m.If(fetch_done):
                    m.next = "idle"
            if not self.dense:
                with m.State("start raw"), m.If(~placing):
                    m.d.comb += start_raw.eq(1)
                    m.d.sync += raw_active.eq(1)
                    m.next = "raw"
                with m.State("raw"), m.If(raw_done & ~writing):
                    m.d.sync += raw_active.eq(0)
                    m.next = "idle"
        m.d.sync += start_place.eq(hand_over)
        with m.If(hand_over):
            m.d.sync += [place_word.eq(word), place_walk.eq(walk), placing.eq(1)]
        with m.Elif(~start_place & place_done & ~writing):
            m.d.sync += placing.eq(0)

        self._products(m, load, step, walk)

        # Errors: one a cycle
        decode_error, range_error = Signal(), Signal()
        m.d.sync += self.error.eq(Error.NONE)
        with m.If(pending.field):
            m.d.sync += [self.error.eq(Error.FIELD), pending.field.eq(0)]
        with m.Elif(pending.decode):
            m.d.sync += [self.error.eq(Error.DECODE), pending.decode.eq(0)]
        with m.Elif(pending.range):
            m.d.sync += [self.error.eq(Error.RANGE), pending.range.eq(0)]
        with m.If(decode_error):
            m.d.sync += pending.decode.eq(1)
        with m.If(range_error):
            m.d.sync += pending.range.eq(1)

        # Requests and data of the two commands
        decoder = place(m, "decoder", Decoder(config=config))
        m.d.comb += decode_error.eq(decoder.error)
        request = stream.Signature(self.memory.request.payload.shape()).create(path=("block_request",))
        words = stream.Signature(self.memory.response.payload.shape()).create(path=("block_words",))
        rows = stream.Signature(_row_write(config)).create(path=("element_rows",))
        real_beat, range_place, beat_waits = Signal(), Signal(), Signal()
        self._fetch(m, load, walk, start, fetch_done, request, words, decoder)
        m.d.comb += beat_waits.eq(
            self._place(m, placed, place_walk, start_place, place_done, decoder, rows, real_beat, range_place)
        )
        # Writes of the two commands to the vector memory, out of one buffer: what is before it does not hang on the
        # memory's arbiter, and so on other units.
        out = place(m, "vmem_buffer", SkidBuffer(width=self.vmem.payload.shape().size))
        free, inside = out.i.ready, Signal()
        written = data.View(vmem_write(config), out.o.payload)
        entry = Signal(vmem_write(config), name="vmem_entry")
        chosen = Signal(_row_write(config), name="vmem_next")
        offered, offered_raw = Signal(), Signal()
        m.d.comb += [
            rows.ready.eq(free),
            offered.eq(rows.valid | offered_raw),
            chosen.eq(rows.payload),
            inside.eq((chosen.address >= 0) & (chosen.address < config.vmem_rows)),
            range_error.eq(range_place | (offered & free & ~inside)),
            writing.eq(beat_waits | out.o.valid | offered),
            entry.address.eq(chosen.address[:16]),
            entry.row.eq(chosen.row),
            out.i.payload.eq(entry),
            out.i.valid.eq(offered & inside),
            self.vmem.payload.eq(written),
            self.vmem.valid.eq(out.o.valid),
            out.o.ready.eq(self.vmem.ready),
        ]
        m.d.sync += [self.events.kind.eq(placed.kind), self.events.bits.eq(Mux(real_beat, 16 * config.beat, 0))]
        m.d.comb += [
            self.memory.request.payload.eq(request.payload),
            self.memory.request.valid.eq(request.valid),
            request.ready.eq(self.memory.request.ready & ~raw_active),
            words.payload.eq(self.memory.response.payload),
            words.valid.eq(self.memory.response.valid & ~raw_active),
            self.memory.response.ready.eq(words.ready),
        ]
        if self.dense:
            return m

        # LOAD_RAW: while it is active, memory and vector memory are its own.
        raw_request = stream.Signature(self.memory.request.payload.shape()).create(path=("raw_request",))
        raw_words = stream.Signature(self.memory.response.payload.shape()).create(path=("raw_words",))
        raw_rows = stream.Signature(_row_write(config)).create(path=("raw_rows",))
        self._fetch_raw(m, raw, start_raw, raw_request)
        self._place_raw(m, raw, start_raw, raw_done, raw_words, raw_rows)
        m.d.comb += [
            raw_request.ready.eq(self.memory.request.ready & raw_active),
            raw_words.payload.eq(self.memory.response.payload),
            raw_words.valid.eq(self.memory.response.valid & raw_active),
            raw_rows.ready.eq(free),
            offered_raw.eq(raw_rows.valid),
        ]
        with m.If(raw_active):
            m.d.comb += [
                self.memory.request.payload.eq(raw_request.payload),
                self.memory.request.valid.eq(raw_request.valid),
                self.memory.response.ready.eq(raw_words.ready),
                chosen.eq(raw_rows.payload),
            ]
            m.d.sync += self.events.kind.eq(raw.kind)
        with m.If(raw_rows.valid & free):
            m.d.sync += self.events.bits.eq(32 * config.beat)
        return m

    def _beyond(self, address):
        """Whether a 40-bit address is one that the AXI port does not have."""
        return address[self.config.address_bits :].any() if self.config.address_bits < 40 else Const(0, 1)

    def _valid_load(self, m: Module, load):
        config = self.config
        part_bits = BLOCK.bit_length() - 1 - (config.beat.bit_length() - 1)  # log2 of the beats in a block
        part = Signal(range(config.block_beats + 1), name="part_beats")
        m.d.comb += part.eq(Mux(load.log2_block_pixels > part_bits, 0, config.block_beats >> load.log2_block_pixels))
        cores = ~load.target[1]
        wrong = [
            load.n_count == 0,
            load.i_count == 0,
            load.j_count == 0,
            load.line_blocks == 0,
            load.channel_beats == 0,
            load.channel + load.channel_beats > part,
            load.log2_run > min(MAX_LOG2_RUN, (config.axi_bits // 8).bit_length() - 1),
            (load.scale > 64) | (load.scale < -64),
            (load.i_end > load.i_count) | (load.i_first > load.i_end),
            (load.j_end > load.j_count) | (load.j_first > load.j_end),
            load.slots[:5].any() | self._beyond(load.slots),
            load.table[:5].any() | self._beyond(load.table),
            cores & ((load.cores == 0) | load.cores[config.cores :].any()),
            cores & (load.element | load.element_i)[: config.beat.bit_length() - 1].any(),
            load.target[2] & (load.target[1] | load.transpose),
            load.target[3] & load.target[:3].any(),
        ]
        if self.dense:
            wrong.append(~load.target[0])
        valid = Signal(name="valid_load")
        m.d.comb += valid.eq(~Cat(wrong).any())
        return valid

    def _valid_raw(self, m: Module, raw):
        align = (self.config.axi_bits // 8).bit_length() - 1
        wrong = [
            raw.line_count == 0,
            raw.line_rows == 0,
            raw.address[:align].any() | self._beyond(raw.address),
            raw.pitch[:align].any(),
        ]
        valid = Signal(name="valid_raw")
        m.d.comb += valid.eq(~Cat(wrong).any())
        return valid

    def _products(self, m: Module, load, step, walk) -> None:
        """Fill the walkers' parameters; the products one a cycle, out of one multiplier."""
        for name, _ in load_walk(self.config):
            if name in LAYOUTS[Opcode.LOAD].members:
                m.d.comb += walk[name].eq(load[name])
        factors = [
            ("block", load.line, load.line_blocks),
            ("block_n", load.line_n, load.line_blocks),
            ("block_i", load.line_i, load.line_blocks),
        ]
        a, b = Signal(signed(25), name="factor_a"), Signal(16, name="factor_b")
        product = Signal(signed(41), reset_less=True)
        m.d.sync += product.eq(a * b)
        for index, (name, first, second) in enumerate(factors):
            with m.If(step == index):
                m.d.comb += [a.eq(first), b.eq(second)]
            held = Signal(block_bits(self.config), name=f"product_{name}", reset_less=True)
            with m.If(step == index + 1):
                m.d.sync += held.eq(product)
            m.d.comb += walk[name].eq(held)

    def _fetch(self, m: Module, load, walk, start, done, request, words, decoder) -> None:
        """Request lengths and blocks; bring the blocks' words to the decoder. `done`: all have been requested."""
        config = self.config
        word_bytes = config.axi_bits // 8
        word_bits = word_bytes.bit_length() - 1
        walker = place(m, "fetch_walker", LoadWalker(config=config, places=False))
        pixel = walker.o.payload
        walked = Signal(name="fetch_walked")
        m.d.comb += [walker.start.eq(start), walker.walk.eq(walk)]
        with m.If(start):
            m.d.sync += walked.eq(0)
        with m.Elif(walker.o.valid & walker.o.ready & pixel.last):
            m.d.sync += walked.eq(1)

        # Words of the table. One is requested only when there is room for it: it must not block the memory's data.
        ahead = max(2, 256 // config.axi_bits)
        pending = data.StructLayout({"block": block_bits(config), "next_word": 1})
        blocks = place(m, "pending_blocks", RegisterFifo(shape=pending, depth=PENDING_BLOCKS))
        lengths = place(m, "table_words", RegisterFifo(shape=config.axi_bits, depth=ahead))
        table_word, table_valid = Signal(block_bits(config) - word_bits, reset_less=True), Signal()
        asked = Signal(range(ahead + 1), name="table_words_asked")
        asking, table_address = Signal(name="table_asking"), Signal(config.address_bits, reset_less=True)
        needed, same, possible, ask = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            needed.eq(walker.o.valid & pixel.real & pixel.fresh),
            same.eq(table_valid & (pixel.block[word_bits:] == table_word)),
            possible.eq(same | (~asking & (asked != ahead))),
            blocks.i.valid.eq(needed & possible),
            blocks.i.payload.block.eq(pixel.block),
            blocks.i.payload.next_word.eq(~same),
            walker.o.ready.eq(~needed | (possible & blocks.i.ready)),
            ask.eq(blocks.i.valid & blocks.i.ready & ~same),
            self.table.request.valid.eq(asking),
            self.table.request.payload.address.eq(table_address),
            self.table.request.payload.words.eq(1),
            self.table.request.payload.kind.eq(load.kind),
            lengths.i.valid.eq(self.table.response.valid),
            lengths.i.payload.eq(self.table.response.payload.data),
            self.table.response.ready.eq(lengths.i.ready),
        ]
        m.d.sync += asked.eq(asked + ask - (lengths.o.valid & lengths.o.ready))
        with m.If(self.table.request.ready):
            m.d.sync += asking.eq(0)
        with m.If(ask):
            m.d.sync += [
                asking.eq(1),
                table_address.eq(load.table + (pixel.block[word_bits:] << word_bits)),
                table_word.eq(pixel.block[word_bits:]),
                table_valid.eq(1),
            ]
        with m.If(start):
            m.d.sync += table_valid.eq(0)

        # Length and address of the block, in steps that go on together.
        current, current_next = Signal(config.axi_bits, reset_less=True), Signal()
        block = blocks.o.payload.block
        waits, advance = Signal(name="length_waits"), Signal(name="length_advance")
        m.d.comb += [
            waits.eq(blocks.o.payload.next_word & ~current_next),
            lengths.o.ready.eq(blocks.o.valid & waits),
            blocks.o.ready.eq(~waits & advance),
        ]
        with m.If(lengths.o.valid & lengths.o.ready):
            m.d.sync += [current.eq(lengths.o.payload), current_next.eq(1)]
        with m.If(blocks.o.valid & blocks.o.ready):
            m.d.sync += current_next.eq(0)

        # 1: the block's length; sums of the lengths of those before it in its run; its run's slot.
        run_bits = min(MAX_LOG2_RUN, word_bits)
        run_mask = Signal(run_bits, name="run_mask")  # bits of a block's number that tell it from others of its run
        place_bits, first_bits = Signal(run_bits, name="run_place"), Signal(run_bits, name="run_first")
        m.d.comb += [
            run_mask.eq(~(Const(-1, run_bits).as_unsigned() << load.log2_run)),
            place_bits.eq(block[:run_bits]),
            first_bits.eq(place_bits & ~run_mask),
        ]
        group = current.word_select(block[run_bits:word_bits], 8 << run_bits)
        before = [
            Mux((first_bits <= index) & (index < place_bits), group.word_select(index, 8), 0)
            for index in range((1 << run_bits) - 1)
        ]
        assert SLOT_BYTES == 128 + 32
        first = Cat(first_bits, block[run_bits:])
        valid1, byte = Signal(name="length_valid1"), Signal(8, name="length_byte", reset_less=True)
        sums = [Signal(10, name=f"length_sum{index}", reset_less=True) for index in range((1 << run_bits) // 4)]
        slot1 = Signal(config.address_bits, name="slot1", reset_less=True)
        # 2: where it begins in the slot; the slot's address.
        valid2, length2 = Signal(name="length_valid2"), Signal(8, name="length2", reset_less=True)
        offset = Signal(12, name="block_offset", reset_less=True)
        slot2 = Signal(config.address_bits, name="slot2", reset_less=True)
        # 3: its address.
        valid3, length3 = Signal(name="length_valid3"), Signal(8, name="length3", reset_less=True)
        address = Signal(config.address_bits, name="block_address", reset_less=True)
        with m.If(advance):
            m.d.sync += [
                valid1.eq(blocks.o.valid & ~waits),
                byte.eq(current.word_select(block[:word_bits], 8)),
                [total.eq(sum(before[4 * index : 4 * index + 4])) for index, total in enumerate(sums)],
                slot1.eq((first << 7) + (first << 5)),
                valid2.eq(valid1),
                length2.eq(Mux(byte > MAX_LENGTH, 0, byte)),
                offset.eq(sum(sums)),
                slot2.eq(load.slots + slot1),
                valid3.eq(valid2),
                length3.eq(length2),
                address.eq(slot2 + offset),
            ]

        # 4: its words. The first is there already if it was the last of the block before. Behind this, a buffer of two
        # blocks, so that none of these steps hangs on the memory's `ready`.
        last_word = Signal(config.address_bits - word_bits, name="last_word", reset_less=True)
        last_valid = Signal(name="last_word_valid")
        kept, more = Signal(name="word_kept"), Signal(5, name="words_more")
        layout = data.StructLayout(
            {"address": config.address_bits - word_bits, "words": 5, "block": aligned_block(config)}
        )
        found = place(m, "found_blocks", RegisterFifo(shape=layout, depth=2))
        flying = place(m, "blocks_in_flight", RegisterFifo(shape=aligned_block(config), depth=BLOCKS_IN_FLIGHT))
        # Words are requested only when there is room for the longest block's: those that wait for the decoder, or for
        # the next command's turn, must not block the data of the memory's other clients.
        arrived = place(m, "words_ahead", SramFifo(width=config.axi_bits, depth=WORDS_AHEAD))
        most_words = -(-(MAX_LENGTH - 1) // word_bytes) + 1
        room = Signal(range(WORDS_AHEAD + 1), name="words_room", init=WORDS_AHEAD)
        enough = Signal(name="words_room_enough")
        m.d.comb += [
            more.eq((address[:word_bits] + length3 - 1) >> word_bits),
            kept.eq(last_valid & (last_word == address[word_bits:]) & (length3 != 0)),
            advance.eq(~valid3 | found.i.ready),
            found.i.valid.eq(valid3),
            found.i.payload.address.eq(address[word_bits:] + kept),
            found.i.payload.words.eq(Mux(length3 == 0, 0, more + 1 - kept)),
            found.i.payload.block.length.eq(length3),
            found.i.payload.block.shift.eq(address[:word_bits]),
            found.i.payload.block.kept.eq(kept),
            enough.eq(room >= most_words),
            request.valid.eq(found.o.valid & (found.o.payload.words != 0) & flying.i.ready & enough),
            request.payload.address.eq(found.o.payload.address << word_bits),
            request.payload.words.eq(found.o.payload.words),
            request.payload.kind.eq(load.kind),
            flying.i.valid.eq(found.o.valid & ((found.o.payload.words == 0) | (request.ready & enough))),
            flying.i.payload.eq(found.o.payload.block),
            found.o.ready.eq(flying.i.valid & flying.i.ready),
        ]
        m.d.sync += room.eq(
            room - Mux(request.valid & request.ready, request.payload.words, 0) + (arrived.o.valid & arrived.o.ready)
        )
        with m.If(advance & valid3 & (length3 != 0)):
            m.d.sync += [last_word.eq(address[word_bits:] + more), last_valid.eq(1)]
        with m.If(start):
            m.d.sync += last_valid.eq(0)
        m.d.comb += done.eq(walked & ~(blocks.o.valid | valid1 | valid2 | valid3 | found.o.valid))

        aligner = place(m, "aligner", Aligner(config=config))
        m.d.comb += [
            aligner.block.payload.eq(flying.o.payload),
            aligner.block.valid.eq(flying.o.valid),
            flying.o.ready.eq(aligner.block.ready),
            arrived.i.payload.eq(words.payload.data),
            arrived.i.valid.eq(words.valid),
            words.ready.eq(arrived.i.ready),
            aligner.word.payload.eq(arrived.o.payload),
            aligner.word.valid.eq(arrived.o.valid),
            arrived.o.ready.eq(aligner.word.ready),
            decoder.i.payload.eq(aligner.o.payload),
            decoder.i.valid.eq(aligner.o.valid),
            aligner.o.ready.eq(decoder.i.ready),
        ]

    def _place(self, m: Module, load, walk, start, done, decoder, rows, real_beat, range_error):
        """Bring beats to their places; returns whether one is on its way."""
        config = self.config
        beat_bits = config.beat.bit_length() - 1
        walker = place(m, "place_walker", LoadWalker(config=config, places=True))
        pixel = walker.o.payload
        m.d.comb += [walker.start.eq(start), walker.walk.eq(walk)]

        # `at` is the next beat that the decoder gives. A block is taken to its end before the next is begun.
        at, index = Signal(range(config.block_beats), name="block_beat"), Signal(5, name="pixel_beat")
        walked, begun = Signal(), Signal()
        behind, use, last, emit, pop = Signal(), Signal(), Signal(), Signal(), Signal()
        out_valid, out_free = Signal(name="beat_valid"), Signal(name="beat_free")
        m.d.comb += [
            behind.eq(pixel.fresh & ~begun & (at != 0)),
            use.eq(~behind & ((index != 0) | (at == pixel.position))),
            last.eq(index + 1 == load.channel_beats),
            done.eq(walked & (at == 0)),
            pop.eq(decoder.o.valid & decoder.o.ready),
            walker.o.ready.eq(emit & last),
            real_beat.eq(emit & pixel.real),
            range_error.eq(emit & last & pixel.negative),
        ]
        with m.If(walked & ~done):
            m.d.comb += decoder.o.ready.eq(1)
        with m.Elif(walker.o.valid & pixel.real):
            m.d.comb += [decoder.o.ready.eq(~use | out_free), emit.eq(decoder.o.valid & use & out_free)]
        with m.Elif(walker.o.valid):
            m.d.comb += emit.eq(out_free)
        with m.If(pop):
            m.d.sync += at.eq(at + 1)
        with m.If(emit & last):
            m.d.sync += [index.eq(0), begun.eq(0)]
            with m.If(pixel.last):
                m.d.sync += walked.eq(1)
        with m.Else():
            with m.If(emit):
                m.d.sync += index.eq(index + 1)
            with m.If(pop & ~behind):
                m.d.sync += begun.eq(1)
        with m.If(start):
            m.d.sync += walked.eq(0)

        # The beat and where it goes: `row` is that of the pixel, `run` the index that runs over elements.
        to_vmem = Signal()
        row, run = Signal(signed(ROW_BITS + 1), reset_less=True), Signal(COLUMN_BITS + 1, reset_less=True)
        elements = Signal(self.write.beat.shape(), name="beat_elements", reset_less=True)
        m.d.comb += [
            to_vmem.eq(load.target[1]),
            out_free.eq(~out_valid | ~to_vmem | rows.ready),
        ]
        with m.If(out_free):
            m.d.sync += out_valid.eq(emit)
        with m.If(emit):
            m.d.sync += [
                row.eq(pixel.row + Mux(to_vmem, index, 0)),
                run.eq(pixel.column + (index << beat_bits)),
                elements.eq(decoder.o.payload),
            ]
            with m.If(~pixel.real):
                for element in range(config.beat):
                    m.d.sync += [
                        elements.data[element].eq(Mux(to_vmem, load.fill, 0)),
                        elements.code[element].eq(Code.PADDING),
                    ]

        # Buffers and masks of the cores
        high, low = Signal(signed(ROW_BITS + 1), name="high"), Signal(signed(ROW_BITS + 1), name="low")
        to_mask, inside = Signal(), Signal(name="high_low_inside")
        buffer, high_end, low_end = Signal(Buffer), Signal(12), Signal(8)
        m.d.comb += [
            to_mask.eq(load.target[2]),
            high.eq(Mux(load.transpose, run, row)),
            low.eq(Mux(load.transpose, row, run)),
            inside.eq((high >= 0) & (high < high_end) & (low >= 0) & (low < low_end)),
        ]
        with m.If(to_mask):
            m.d.comb += [buffer.eq(Buffer.MASK), high_end.eq(config.psum_rows), low_end.eq(config.lanes)]
        with m.Elif(1 if self.dense else load.target[0] | load.target[3]):
            m.d.comb += [buffer.eq(Buffer.DENSE), high_end.eq(config.dense_rows), low_end.eq(config.lanes)]
        with m.Else():
            m.d.comb += [buffer.eq(Buffer.SPARSE), high_end.eq(config.rows), low_end.eq(config.depth)]
        with m.If(out_valid & ~to_vmem & ~inside):
            m.d.comb += range_error.eq(1)
        m.d.sync += self.write.valid.eq(out_valid & ~to_vmem & inside)
        with m.If(out_valid & ~to_vmem):
            m.d.sync += [
                self.write.cores.eq(load.cores[: config.cores]),
                self.write.buffer.eq(buffer),
                self.write.page.eq(load.page),
                self.write.transpose.eq(load.transpose),
                self.write.row.eq(high[:12]),
                self.write.column.eq(low[:8]),
                self.write.beat.eq(elements),
                self.write.mask.eq(Mux(to_mask, Cat((word != 0) & (word <= F16_INF) for word in elements.data), 0)),
            ]

        # Vector memory
        m.d.comb += [rows.valid.eq(out_valid & to_vmem), rows.payload.address.eq(row)]
        for element in range(config.beat):
            single = place(m, f"single{element}", HalfToSingle())
            m.d.comb += [
                single.i.eq(elements.data[element]),
                single.scale.eq(load.scale),
                rows.payload.row[element].eq(single.o),
            ]
        return out_valid

    def _fetch_raw(self, m: Module, raw, start, request) -> None:
        """Request the lines of LOAD_RAW, a long one in pieces."""
        config = self.config
        row_bytes = 4 * config.beat
        lines, rows = Signal(16, name="raw_lines"), Signal(16, name="raw_rows_left", reset_less=True)
        address = Signal(config.address_bits, name="raw_address", reset_less=True)
        line_address = Signal(config.address_bits, name="raw_line_address", reset_less=True)
        piece, last = Signal(range(RAW_ROWS + 1), name="raw_piece"), Signal(name="raw_piece_last")
        m.d.comb += [
            last.eq(rows <= RAW_ROWS),
            piece.eq(Mux(last, rows, RAW_ROWS)),
            request.valid.eq(lines != 0),
            request.payload.address.eq(address),
            request.payload.words.eq(piece * (row_bytes // (config.axi_bits // 8))),
            request.payload.kind.eq(raw.kind),
        ]
        with m.If(start):
            m.d.sync += [
                lines.eq(raw.line_count), rows.eq(raw.line_rows), address.eq(raw.address), line_address.eq(raw.address),
            ]  # fmt: skip
        with m.Elif(request.valid & request.ready):
            m.d.sync += [rows.eq(rows - piece), address.eq(address + piece * row_bytes)]
            with m.If(last):
                m.d.sync += [
                    lines.eq(lines - 1),
                    rows.eq(raw.line_rows),
                    address.eq(line_address + raw.pitch),
                    line_address.eq(line_address + raw.pitch),
                ]

    def _place_raw(self, m: Module, raw, start, done, words, rows) -> None:
        """Gather words to rows of the vector memory."""
        config = self.config
        group = 32 * config.beat // config.axi_bits
        line, row = Signal(16, name="raw_line"), Signal(16, name="raw_row")
        base = Signal(signed(33), name="raw_line_base", reset_less=True)
        m.d.comb += rows.payload.address.eq(base + row)
        if group == 1:
            m.d.comb += [
                rows.valid.eq(words.valid), words.ready.eq(rows.ready), rows.payload.row.eq(words.payload.data),
            ]  # fmt: skip
        else:
            slot = Signal(range(group), name="raw_slot")
            early = Signal(config.axi_bits * (group - 1), name="raw_early_words", reset_less=True)
            final = slot == group - 1
            m.d.comb += [
                rows.valid.eq(words.valid & final),
                words.ready.eq(rows.ready | ~final),
                rows.payload.row.eq(Cat(early, words.payload.data)),
            ]
            with m.If(words.valid & words.ready):
                m.d.sync += slot.eq(Mux(final, 0, slot + 1))
                with m.If(~final):
                    m.d.sync += early.eq(Cat(early, words.payload.data)[config.axi_bits :])
        with m.If(start):
            m.d.sync += [line.eq(0), row.eq(0), base.eq(raw.vmem), done.eq(0)]
        with m.Elif(rows.valid & rows.ready):
            m.d.sync += row.eq(row + 1)
            with m.If(row + 1 == raw.line_rows):
                m.d.sync += [row.eq(0), base.eq(base + raw.vmem_line), line.eq(line + 1)]
                with m.If(line + 1 == raw.line_count):
                    m.d.sync += done.eq(1)
