"""Decoder of FGMP blocks: words as they come from memory in, beats of elements and their codes out."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.formats import BLOCK, Code, NonzeroMode, PrecisionMode, element_beat
from lnpu.hdl import Block, Sram, place
from lnpu.mem.fifo import RegisterFifo
from lnpu.tree_sum import tree_sum

__all__ = ["Decoder", "decoder_input", "expand_e4m3"]

MAGIC = 0b1010
MASK_BYTES = BLOCK // 8
HEADER_BYTES = 1 + 2 * MASK_BYTES
"""Longest header: mode byte and two masks."""

LIST_BYTES = MASK_BYTES - 1
"""Longest list of FP16 elements: it is shorter than the mask would be."""

LIST_LAST, LIST_RESERVED = 7, 6
"""Bits of a byte of that list, above the rank."""

WINDOW_UNITS = 6
"""Units (see `Decoder.elaborate`) that wait for their header to be parsed or for the element pipeline."""


def decoder_input(config: ChipConfig) -> data.StructLayout:
    """A word of an encoded block, whether it is the block's last, and the block's bytes (the same in each; 0: none)."""
    return data.StructLayout({"data": config.axi_bits, "last": 1, "length": 8})


def expand_e4m3(byte: Value) -> Value:
    """FP16 pattern of an E4M3 pattern (zero for zero; a NaN gives some number)."""
    mantissa, exponent, sign = byte[:3], byte[3:7], byte[7]
    normal = Cat(Const(0, 7), mantissa, (exponent + 8)[:5])
    subnormal = Mux(
        mantissa[2], Cat(Const(0, 8), mantissa[:2], Const(8, 5)),
        Mux(mantissa[1], Cat(Const(0, 9), mantissa[:1], Const(7, 5)), Cat(Const(0, 10), Mux(mantissa[0], 6, 0)[:5])),
    )  # fmt: skip
    return Cat(Mux(exponent == 0, subnormal, normal)[:15], sign)


def _parse_list(entries: list[Value]) -> tuple[Value, Value, Value]:
    """Parse a list of FP16 elements.

    Returns the mask that it stands for, its bytes (one more than `entries` if none is the last), and whether it does
    not ascend or has a reserved bit set.
    """
    size, mask, wrong = Const(len(entries) + 1, 4), Const(0, BLOCK), Const(0, 1)
    for index in reversed(range(len(entries))):
        size = Mux(entries[index][LIST_LAST], index + 1, size)
    for index, entry in enumerate(entries):
        rank = entry[:LIST_RESERVED]
        inside = ~Cat(before[LIST_LAST] for before in entries[:index]).any() if index else Const(1, 1)
        rows, columns = ([part == number for number in range(8)] for part in (rank[3:], rank[:3]))
        mask = mask | Cat(inside & row & column for row in rows for column in columns)
        unordered = rank <= entries[index - 1][:LIST_RESERVED] if index else Const(0, 1)
        wrong = wrong | (inside & (entry[LIST_RESERVED] | unordered))
    return mask, size, wrong


class Decoder(Block):
    """Turns encoded blocks (docs/architecture.md, "Encoded tensors in memory") into beats of elements.

    Every block, good or malformed, gives `64 / beat` beats in element order. Elements are ZERO (value 0x0000), FP8
    (its exact FP16 pattern) or FP16. Blocks are independent and stay in order.

    A block is malformed if it is not what the encoder can have written for this `length`:

    - header: magic other than 0b1010, a reserved mode, empty with a precision mode other than 0, masked with no
      non-zero or with 64, mixed whose non-zeros are all FP8 or all FP16, or so few FP16 that a list is shorter;
    - padding bits of the precision mask that are not 0;
    - a list of FP16 elements that does not ascend or not to less than the non-zeros, is not shorter than the mask (or
      does not end), or has bit 6 set in a byte;
    - `length` other than the length that header and masks imply (so 0 and more than 145 are always errors);
    - an E4M3 payload that is a zero or a NaN, an FP16 payload that is a zero (of either sign).

    Not looked at: what follows the `length` bytes in the last word, and whether an FP16 element ought to be FP8 by
    some policy. A malformed block gives 64 zeros, however late in the block the defect is found (a block is held
    until it has been checked completely); the rest of its words up to `last` is dropped.

    `last` comes with word ceil(length / word bytes), with the first if `length` is 0. If it comes with another, the
    block gives 64 elements, but which is open, and so is whether it counts as malformed; other blocks are as ever.

    In the steady state the decoder takes a word a cycle or gives a beat a cycle, whichever binds. Latency from the
    last word of a block to its first beat: about 8 cycles.

    Parameters
    ----------
    config : ChipConfig
        Uses `axi_bits` and `beat`.

    Members
    -------
    i : In(stream.Signature(decoder_input(config)))
        The words of one block after the other; a block starts with a word, and its first byte is the word's lowest.
    o : Out(stream.Signature(element_beat(config.beat)))
    error : Out(1)
        High for one cycle for each malformed block, before its first beat is offered.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "i": In(stream.Signature(decoder_input(config))),
                "o": Out(stream.Signature(element_beat(config.beat))),
                "error": Out(1),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.config.axi_bits}_{self.config.beat}"

    # The stages, each with registers behind it:
    #
    #   pack     words into units of max(AXI word, 2 * beat) bytes, so that a beat needs at most two units
    #   header   collects mode and masks of block b+1 while block b is in the stages below; drops units without payload
    #   window   units that wait; the first two are visible
    #   rank     which elements of the beat are non-zero, which of them FP16 (takes bits from the precision mask)
    #   offset   where in the block's bytes each of them lies
    #   align    moves the beat's first byte to byte 0; takes units from the window
    #   pick     selects each element's bytes
    #   convert  to FP16; checks payloads; writes to the store
    #   store    two blocks; a block is released to `o`, or replaced by zeros, with its last beat
    #
    # All checks end in one bit that goes with the beats, so the stages need to know of a defect only where it would
    # make them lose the place: `align` drops what a block has too much and does without what it has too little.

    def elaborate(self, platform):
        m = Module()
        unit = max(self.config.axi_bits // 8, 2 * self.config.beat)
        unit_layout = data.StructLayout({"data": 8 * unit, "last": 1})
        packed = self._pack(m, unit)
        held, header = self._header(m, packed, unit, unit_layout)
        window = self._window(m, held, unit_layout)
        offsets = self._offset(m, self._rank(m, header, unit))
        aligned = self._align(m, offsets, window, unit)
        self._store(m, self._pick(m, aligned))
        return m

    def _pack(self, m: Module, unit: int):
        """Gather words to units."""
        config = self.config
        word = config.axi_bits // 8
        group = unit // word
        layout = data.StructLayout({"data": 8 * unit, "last": 1, "length": 8})
        packed = stream.Signature(layout).create(path=("packed",))
        if group == 1:
            m.d.comb += [
                self.i.ready.eq(packed.ready),
                packed.valid.eq(self.i.valid),
                packed.payload.data.eq(self.i.payload.data),
                packed.payload.last.eq(self.i.payload.last),
                packed.payload.length.eq(self.i.payload.length),
            ]
            return packed

        gathered = Signal(layout, name="gathered", reset_less=True)
        slot, full = Signal(range(group), name="gathered_slot"), Signal(name="gathered_full")
        m.d.comb += [
            self.i.ready.eq(~full | packed.ready),
            packed.valid.eq(full),
            packed.payload.eq(gathered),
        ]
        with m.If(full & packed.ready):
            m.d.sync += full.eq(0)
        with m.If(self.i.valid & self.i.ready):
            for index in range(group):
                with m.If(slot == index):
                    m.d.sync += gathered.data[index * 8 * word : (index + 1) * 8 * word].eq(self.i.payload.data)
            m.d.sync += [
                gathered.last.eq(self.i.payload.last),
                gathered.length.eq(self.i.payload.length),
            ]
            with m.If(self.i.payload.last | (slot == group - 1)):
                m.d.sync += [full.eq(1), slot.eq(0)]
            with m.Else():
                m.d.sync += slot.eq(slot + 1)
        return packed

    def _header(self, m: Module, packed, unit: int, unit_layout):
        """Collect headers; pass on the units that hold payload or end a block."""
        most = -(-HEADER_BYTES // unit)
        raw = Signal(8 * unit * most, name="header", reset_less=True)
        ones = Signal(7, name="header_ones", reset_less=True)  # in the first mask; counted as it comes in
        length = Signal(8, name="header_length", reset_less=True)
        complete = Signal(name="header_complete")
        index, collecting = Signal(range(most + 1), name="unit_index"), Signal(name="header_collecting", init=1)
        held = stream.Signature(unit_layout).create(path=("held",))
        held_index = Signal(range(most + 1), reset_less=True)
        waiting = Signal(name="held_waiting")

        # The header of the unit that comes in, as far as it tells how many units the header has. A list of FP16
        # elements adds none: it ends with byte 7 without a mask before it, with byte 15 with one.
        mode = Signal(8, name="mode")
        units = Signal(range(most + 1), name="header_units")
        m.d.comb += mode.eq(Mux(index == 0, packed.payload.data[:8], raw[:8]))
        masked, mixed = mode[:2] == NonzeroMode.MASKED.value, mode[2:4] == PrecisionMode.MIXED.value
        m.d.comb += units.eq(Mux(masked & mixed, most, Mux(masked | mixed, -(-(1 + MASK_BYTES) // unit), 1)))

        header = stream.Signature(data.StructLayout({
            "mask": BLOCK, "precision": BLOCK, "nonzeros": 7, "fp16": 1, "mixed": 1, "masked": 1,
            "precision_bytes": 4, "start": 5, "length": 8, "zero": 1, "bad": 1,
        })).create(path=("header_out",))  # fmt: skip
        out = header.payload
        magic, nonzero_mode, precision_mode = raw[4:8], raw[:2], raw[2:4]
        first_mask, second_mask = raw[8 : 8 + BLOCK], raw[8 + BLOCK : 8 + 2 * BLOCK]
        empty, few, behind = Signal(), Signal(name="header_few"), Signal(BLOCK, name="header_precision")
        list_mask, list_size, list_wrong = _parse_list([behind.word_select(k, 8) for k in range(LIST_BYTES)])
        m.d.comb += [
            header.valid.eq(complete),
            behind.eq(Mux(out.masked, second_mask, first_mask)),
            few.eq(precision_mode == PrecisionMode.FEW.value),
            empty.eq(nonzero_mode == NonzeroMode.EMPTY.value),
            out.masked.eq(nonzero_mode == NonzeroMode.MASKED.value),
            # Few is both.
            out.mixed.eq((precision_mode == PrecisionMode.MIXED.value) | few),
            out.fp16.eq((precision_mode == PrecisionMode.FP16.value) | few),
            out.mask.eq(Mux(out.masked, first_mask, (1 << BLOCK) - 1)),
            out.precision.eq(Mux(few, list_mask, behind)),
            out.nonzeros.eq(Mux(out.masked, ones, BLOCK)),
            out.precision_bytes.eq(Mux(out.mixed & ~empty, Mux(few, list_size, (out.nonzeros + 7) >> 3), 0)),
            out.start.eq(1 + Mux(out.masked, MASK_BYTES, 0) + out.precision_bytes),
            out.length.eq(length),
            out.bad.eq(
                (magic != MAGIC) | (nonzero_mode == 3) | (empty & (precision_mode != 0))
                | (out.masked & (~first_mask.any() | first_mask.all())) | (few & list_wrong)
            ),
            out.zero.eq(out.bad | empty),
        ]  # fmt: skip

        take, advance, useless = Signal(name="unit_take"), Signal(name="held_advance"), Signal(name="held_useless")
        m.d.comb += [
            # To be early, `ready` looks at registers only: a useless unit waits like others, and the place of a header
            # is free in the cycle after it has left.
            advance.eq(~waiting | held.ready),
            packed.ready.eq(advance & ((index != 0) | ~complete)),
            take.eq(packed.valid & packed.ready),
            # `raw` still holds the header of the block that the held unit is of, as far as that unit reached.
            useless.eq((held_index < most) & (((held_index + 1) * unit) <= out.start) & ~held.payload.last),
            held.valid.eq(waiting & ~useless),
        ]
        with m.If(advance):
            m.d.sync += waiting.eq(take)
        with m.If(header.valid & header.ready):
            m.d.sync += complete.eq(0)
        with m.If(take):
            m.d.sync += [
                held.payload.data.eq(packed.payload.data),
                held.payload.last.eq(packed.payload.last),
                held_index.eq(index),
            ]
            with m.If(packed.payload.last):
                m.d.sync += [index.eq(0), collecting.eq(1)]
            with m.Elif(index != most):
                m.d.sync += index.eq(index + 1)
            with m.If(collecting):
                for place in range(most):
                    with m.If(index == place):
                        m.d.sync += raw[8 * unit * place : 8 * unit * (place + 1)].eq(packed.payload.data)
                        first, end = (8 * max(0, byte - unit * place) for byte in (1, 1 + MASK_BYTES))
                        if first < 8 * unit and end:
                            before = ones if place else 0
                            m.d.sync += ones.eq(before + tree_sum(packed.payload.data[first:end]))
                m.d.sync += length.eq(packed.payload.length)
                with m.If((index + 1 >= units) | packed.payload.last):
                    m.d.sync += complete.eq(1)
                    with m.If(~packed.payload.last):
                        m.d.sync += collecting.eq(0)
        return held, header

    def _window(self, m: Module, held, unit_layout):
        """A buffer whose first two units are visible and from which both can be taken at once."""
        units = [Signal(unit_layout, name=f"window{index}", reset_less=True) for index in range(WINDOW_UNITS)]
        level, place = Signal(range(WINDOW_UNITS + 1), name="window_level"), Signal(range(WINDOW_UNITS + 1))
        pop, push = Signal(2, name="window_pop"), Signal(name="window_push")
        m.d.comb += [
            held.ready.eq(level != WINDOW_UNITS),
            push.eq(held.valid & held.ready),
            place.eq(level - pop),
        ]
        m.d.sync += level.eq(place + push)
        for index, word in enumerate(units):
            with m.If(push & (place == index)):
                m.d.sync += word.eq(held.payload)
            if index + 1 < WINDOW_UNITS:
                with m.Elif(pop == 1):
                    m.d.sync += word.eq(units[index + 1])
            if index + 2 < WINDOW_UNITS:
                with m.Elif(pop == 2):
                    m.d.sync += word.eq(units[index + 2])
        return units[0], units[1], level, pop

    def _rank(self, m: Module, header, unit: int):
        """Give each beat its bits of the masks. A block without payload passes as a single beat."""
        beat = self.config.beat
        block = Signal(header.payload.shape(), name="block", reset_less=True)
        active, beats, first = Signal(name="block_active"), Signal(range(BLOCK // beat)), Signal(name="block_first")
        seen8 = Signal(reset_less=True)
        ranked = stream.Signature(data.StructLayout({
            "nonzero": beat, "fp16": beat, "first": 1, "final": 1, "zero": 1, "bad": 1, "start": 5, "length": 8,
        })).create(path=("ranked",))  # fmt: skip
        advance, final, bad = Signal(name="rank_advance"), Signal(name="rank_final"), Signal(name="rank_bad")
        mask, fp16, ranks = Signal(beat, name="rank_mask"), Signal(beat, name="rank_fp16"), []
        any8, padding = Signal(), Signal(name="mask_padding")
        least, few, unfit = Signal(8, name="least_length"), Signal(name="block_few"), Signal(name="precision_unfit")
        m.d.comb += [
            mask.eq(Mux(block.zero, 0, block.mask[:beat])),
            advance.eq(~ranked.valid | ranked.ready),
            final.eq(block.zero | (beats == BLOCK // beat - 1)),
            header.ready.eq(~active | (advance & final)),
            any8.eq(seen8 | (mask & ~fp16).any()),
            # In the first beat the precision mask is whole: the bits of its last byte beyond the non-zeros.
            padding.eq((block.precision.bit_select((block.nonzeros >> 3) << 3, 8) >> block.nonzeros[:3]).any()
                       & (block.nonzeros[:3] != 0)),
            # By its length (checked later), the block has length - start - non-zeros FP16 elements: of a mask at least
            # as many as it has bytes; of a list just as many, so no rank is beyond the non-zeros.
            few.eq(block.mixed & block.fp16),
            least.eq(block.start + block.nonzeros + block.precision_bytes),
            unfit.eq(Mux(
                few,
                (block.length != least) | (block.precision_bytes >= ((block.nonzeros + 7) >> 3)),
                block.length < least,
            )),
            bad.eq(block.bad | (block.mixed & ~block.zero & ((first & (padding | unfit)) | (final & ~any8)))),
        ]  # fmt: skip
        for element in range(beat):
            rank = Signal(range(element + 1), name=f"rank{element}")
            m.d.comb += [
                rank.eq(tree_sum(mask[:element]) if element else 0),
                fp16[element].eq(Mux(block.mixed, block.precision[: element + 1].bit_select(rank, 1), block.fp16)),
            ]
            ranks.append(rank)
        with m.If(advance):
            m.d.sync += [
                ranked.valid.eq(active),
                ranked.payload.nonzero.eq(mask),
                ranked.payload.fp16.eq(fp16),
                ranked.payload.first.eq(first),
                ranked.payload.final.eq(final),
                ranked.payload.zero.eq(block.zero),
                ranked.payload.bad.eq(bad),
                ranked.payload.start.eq(block.start),
                ranked.payload.length.eq(block.length),
            ]
            with m.If(active):
                m.d.sync += [
                    block.mask.eq(block.mask >> beat),
                    block.precision.eq(block.precision >> tree_sum(mask)),
                    beats.eq(beats + 1),
                    first.eq(0),
                    seen8.eq(any8),
                ]
        with m.If(header.ready):
            m.d.sync += [
                active.eq(header.valid), block.eq(header.payload), beats.eq(0), first.eq(1), seen8.eq(0),
            ]  # fmt: skip
        return ranked

    def _offset(self, m: Module, ranked):
        """Where each non-zero's bytes lie behind the beat's first byte, and how long the block is so far."""
        beat = self.config.beat
        layout = data.StructLayout({
            "nonzero": beat, "fp16": beat, "first": 1, "final": 1, "zero": 1, "bad": 1, "start": 5, "length": 8,
            "offset": data.ArrayLayout(range(2 * beat - 1), beat), "bytes": range(2 * beat + 1), "total": 8,
        })  # fmt: skip
        placed = stream.Signature(layout).create(path=("placed",))
        total = Signal(8, name="total_bytes")
        m.d.comb += [
            ranked.ready.eq(~placed.valid | placed.ready),
            total.eq(Mux(ranked.payload.first, ranked.payload.start, placed.payload.total)),
        ]
        sizes = [
            Cat(nonzero & ~fp16, nonzero & fp16)
            for nonzero, fp16 in zip(ranked.payload.nonzero, ranked.payload.fp16, strict=True)
        ]
        used = Signal(range(2 * beat + 1), name="beat_bytes")
        m.d.comb += used.eq(tree_sum(sizes))
        with m.If(ranked.ready):
            m.d.sync += placed.valid.eq(ranked.valid)
        with m.If(ranked.ready & ranked.valid):
            for name in ("nonzero", "fp16", "first", "final", "zero", "bad", "start", "length"):
                m.d.sync += placed.payload[name].eq(ranked.payload[name])
            for element in range(beat):
                m.d.sync += placed.payload.offset[element].eq(tree_sum(sizes[:element]) if element else 0)
            m.d.sync += [placed.payload.bytes.eq(used), placed.payload.total.eq(total + used)]
        return placed

    def _align(self, m: Module, placed, window, unit: int):
        """Take the beat's bytes from the window."""
        beat = self.config.beat
        here, there, level, pop = window
        payload = placed.payload
        aligned = stream.Signature(data.StructLayout({
            "bytes": 16 * beat, "nonzero": beat, "fp16": beat, "offset": payload.offset.shape(),
            "final": 1, "zero": 1, "bad": 1,
        })).create(path=("aligned",))  # fmt: skip

        position, at, end = Signal(range(unit + 1)), Signal(range(unit + 1)), Signal(range(2 * unit + 1))
        starved, skipping = Signal(), Signal()  # the rest of the block has no bytes; bytes are left over
        dry, cross, present, enough, go = Signal(), Signal(), Signal(), Signal(), Signal()
        bits = unit.bit_length() - 1
        m.d.comb += [
            dry.eq(starved & ~payload.first),
            at.eq(Mux(payload.first, payload.start[:bits], position)),
            end.eq(at + payload.bytes),
            cross.eq(end > unit),
            present.eq(level != 0),
            enough.eq(present & (~cross | here.last | (level > 1))),
            placed.ready.eq((~aligned.valid | aligned.ready) & ~skipping & (dry | enough)),
            go.eq(placed.valid & placed.ready),
        ]
        with m.If(skipping):
            m.d.comb += pop.eq(present)
            m.d.sync += skipping.eq(~(present & here.last))
        with m.Elif(go & ~dry):
            m.d.sync += [starved.eq(0), position.eq(end)]
            with m.If(payload.final):
                m.d.comb += pop.eq(Mux(cross & ~here.last, 2, 1))
                m.d.sync += skipping.eq(~here.last & ~(cross & there.last))
            with m.Elif(cross & here.last):
                m.d.comb += pop.eq(1)
                m.d.sync += starved.eq(1)
            with m.Elif((end >= unit) & ~here.last):
                m.d.comb += pop.eq(1)
                m.d.sync += position.eq(end - unit)

        with m.If(aligned.ready | ~aligned.valid):
            m.d.sync += aligned.valid.eq(go)
        with m.If(go):
            for name in ("nonzero", "fp16", "offset", "final", "zero"):
                m.d.sync += aligned.payload[name].eq(payload[name])
            # A block that ends too early or too late has a length other than its contents': only that is checked.
            m.d.sync += [
                aligned.payload.bytes.eq((Cat(here.data, there.data) >> (at[:bits] << 3))[: 16 * beat]),
                aligned.payload.bad.eq(payload.bad | (payload.final & (payload.total != payload.length))),
            ]
        return aligned

    def _pick(self, m: Module, aligned):
        """Select each element's two bytes."""
        beat = self.config.beat
        picked = stream.Signature(data.StructLayout({
            "raw": data.ArrayLayout(16, beat), "nonzero": beat, "fp16": beat, "final": 1, "zero": 1, "bad": 1,
        })).create(path=("picked",))  # fmt: skip
        m.d.comb += aligned.ready.eq(~picked.valid | picked.ready)
        with m.If(aligned.ready):
            m.d.sync += picked.valid.eq(aligned.valid)
        with m.If(aligned.ready & aligned.valid):
            for name in ("nonzero", "fp16", "final", "zero", "bad"):
                m.d.sync += picked.payload[name].eq(aligned.payload[name])
            for element in range(beat):
                reach = aligned.payload.bytes[: 16 * (element + 1)]
                offset = aligned.payload.offset[element]
                m.d.sync += picked.payload.raw[element].eq((reach >> (offset << 3))[:16])
        return picked

    def _store(self, m: Module, picked) -> None:
        """Convert, check, and hold each block until it is known to be good."""
        beat, beats = self.config.beat, self.config.block_beats
        layout = element_beat(beat)
        depth = 2 * beats
        m.submodules.store = store = Sram(depth=depth, width=Value.cast(Signal(layout)).shape().width)
        released = place(m, "released", RegisterFifo(shape=1, depth=4))  # 1: a block of zeros, not in the store

        elements, wrong = Signal(layout, name="elements"), Signal(beat, name="payload_wrong")
        for element in range(beat):
            raw = picked.payload.raw[element]
            nonzero, fp16 = picked.payload.nonzero[element], picked.payload.fp16[element]
            m.d.comb += [
                elements.data[element].eq(Mux(nonzero, Mux(fp16, raw, expand_e4m3(raw[:8])), 0)),
                elements.code[element].eq(Mux(nonzero, Mux(fp16, Code.FP16.value, Code.FP8.value), Code.ZERO.value)),
                wrong[element].eq(
                    nonzero & Mux(fp16, raw[:15] == 0, (raw[:7] == 0) | (raw[:7] == 0x7F))
                ),
            ]  # fmt: skip

        # Write side. Pointers count modulo twice the depth.
        to, base, at = (Signal(range(2 * depth), name=f"store_{name}") for name in ("to", "base", "at"))
        spoilt, bad, room, go = (Signal(name=f"store_{name}") for name in ("spoilt", "bad", "room", "go"))
        m.d.comb += [
            room.eq(picked.payload.zero | ((to - at)[: len(to)] != depth)),
            picked.ready.eq(~picked.valid | (room & (released.i.ready | ~picked.payload.final))),
            go.eq(picked.valid & picked.ready),
            bad.eq(spoilt | picked.payload.bad | wrong.any()),
            store.w_en.eq(go & ~picked.payload.zero),
            store.w_addr.eq(to[:-1]),
            store.w_data.eq(elements),
            released.i.valid.eq(go & picked.payload.final),
            released.i.payload.eq(bad | picked.payload.zero),
        ]
        m.d.sync += self.error.eq(go & picked.payload.final & bad)
        with m.If(go):
            with m.If(~picked.payload.final):
                m.d.sync += [to.eq(to + 1), spoilt.eq(bad)]
            with m.Else():
                m.d.sync += spoilt.eq(0)
                with m.If(released.i.payload):
                    m.d.sync += to.eq(base)
                with m.Else():
                    m.d.sync += [to.eq(to + 1), base.eq(to + 1)]

        # Read side: the store's read register is the output register.
        valid, zero, issue = (Signal(name=f"beat_{name}") for name in ("valid", "zero", "issue"))
        count = Signal(range(beats), name="beats_out")
        m.d.comb += [
            issue.eq(released.o.valid & (~valid | self.o.ready)),
            released.o.ready.eq(issue & (count == beats - 1)),
            store.r_en.eq(issue & ~released.o.payload),
            store.r_addr.eq(at[:-1]),
            self.o.valid.eq(valid),
            self.o.payload.eq(Mux(zero, 0, store.r_data)),
        ]
        with m.If(issue):
            m.d.sync += [valid.eq(1), zero.eq(released.o.payload), count.eq(count + 1)]
            with m.If(~released.o.payload):
                m.d.sync += at.eq(at + 1)
        with m.Elif(self.o.ready):
            m.d.sync += valid.eq(0)
