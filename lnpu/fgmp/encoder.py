"""Encodes blocks of 64 elements: quantises, drops zeros, packs masks and payloads into AXI words.

The elements of a beat are quantised and compacted to bytes as they come, and the bytes of a block gathered into lines
that wait in a memory. Its masks, hence its length and the size of what precedes the payloads, are known with its last
beat: only then can the reader of the lengths say where the block goes. It leaves with its lines rotated into the place
behind header and masks, and these shifted into the place behind the block before it.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from lnpu.config import BLOCK, ChipConfig
from lnpu.fgmp.quantizer import Quantizer
from lnpu.formats import F16_INF, Code, NonzeroMode, PrecisionMode
from lnpu.hdl import Block, place
from lnpu.mem.fifo import RegisterFifo, SramFifo
from lnpu.tree_sum import tree_sum

__all__ = ["BLOCKS_AHEAD", "Encoder", "block_place", "block_size", "encoder_events"]

BLOCKS_AHEAD = 4
"""Encoded blocks that wait for their turn at most."""

MAGIC = 0b1010
HEADER_BYTES = 17  # header, non-zero mask, precision mask at most
LIST_BYTES, RANK_BITS = 7, 6  # of the longest list of FP16 elements; of the place of one among the non-zeros


def block_size() -> data.StructLayout:
    """Bytes of an encoded block: all of them (1 to 145), and those before its payloads (1 to 17)."""
    return data.StructLayout({"length": 8, "head": 5})


def block_place(config: ChipConfig) -> data.StructLayout:
    """Where a block goes, in bytes from the start of the AXI word in which it begins.

    - `start`: its first byte. Not 0: the block before it has left its last bytes to share this word.
    - `payload`: its first payload byte, `start` + `head`.
    - `words`: words that leave with this block: those that it completes, and with `flush` the last one in any case.
    - `flush`: the next block starts in a word of its own.
    """
    start = unsigned((config.axi_bits // 8 - 1).bit_length())
    return data.StructLayout({"start": start, "payload": 6, "words": 5, "flush": 1})


def encoder_events(config: ChipConfig) -> data.StructLayout:
    """What became of the elements of a beat: how many of each class (they add up to `beat`, or to 0: no beat).

    `nonfinite`: one of them was infinite or NaN; `top`: the largest FP16 exponent field of the others.
    """
    count = unsigned(config.beat.bit_length())
    return data.StructLayout(
        {"zero": count, "underflow": count, "fp8": count, "fp16": count, "nonfinite": 1, "top": 5}
    )  # fmt: skip


def _rotate(m: Module, name: str, value, by):
    """Rotate the bytes of `value`, a power of two of them, so that byte 0 comes to byte `by`."""
    for bit in range(len(by)):
        moved = Signal(len(value), name=f"{name}_rotate{bit}")
        cut = len(value) - (8 << bit)
        m.d.comb += moved.eq(Mux(by[bit], Cat(value[cut:], value[:cut]), value))
        value = moved
    return value


def _compact(m: Module, name: str, unit: int, pieces: list, lengths: list):
    """Concatenate `pieces[k]`, of which the first `lengths[k]` units of `unit` bits hold something.

    What is beyond a piece's length must be zero. Returns the result, zeros beyond its length, and the length.
    """
    most = len(pieces[0]) // unit
    level = 0
    while len(pieces) > 1:
        level += 1
        next_pieces, next_lengths = [], []
        for k in range(0, len(pieces), 2):
            piece = Signal(unit * 2 * most, name=f"{name}_piece{level}_{k // 2}")
            length = Signal(range(2 * most + 1), name=f"{name}_length{level}_{k // 2}")
            shifted = pieces[k + 1]
            for bit in range(most.bit_length()):
                moved = Signal(unit * 2 * most, name=f"{name}_shift{level}_{k // 2}_{bit}")
                m.d.comb += moved.eq(Mux(lengths[k][bit], Cat(Const(0, unit << bit), shifted), shifted))
                shifted = moved
            m.d.comb += [piece.eq(pieces[k] | shifted), length.eq(lengths[k] + lengths[k + 1])]
            next_pieces.append(piece)
            next_lengths.append(length)
        pieces, lengths, most = next_pieces, next_lengths, 2 * most
    return pieces[0], lengths[0]


class Encoder(Block):
    """Turns beats of FP16 elements into encoded blocks (see *Encoded tensors in memory* in `docs/architecture.md`).

    64 / `beat` beats make a block. Takes a beat a cycle and gives a word a cycle, whichever binds; a block's first
    word comes six cycles after its last beat. A block takes a cycle more where its last payloads leave a part of a word
    behind. There are no combinational paths between the streams.

    Members
    -------
    i : In(stream.Signature(ArrayLayout(16, beat)))
        FP16 patterns.
    lo, hi : In(15); below : In(2); above : In(1)
        Policy (see `Quantizer`); belongs to the beat on `i`.
    sizes : Out(stream.Signature(block_size()))
        Of each block, as soon as it is known, in a queue of `BLOCKS_AHEAD`.
    places : In(stream.Signature(block_place(config)))
        Of each block. Its words come after this.
    o : Out(stream.Signature(axi_bits))
        Words of the blocks, zeros before the first and beyond the last byte of a word that is not full.
    events : Out(encoder_events(config))
        Statistics; valid in one cycle for each beat.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self._config = config
        super().__init__(
            {
                "i": In(stream.Signature(data.ArrayLayout(16, config.beat))),
                "lo": In(15),
                "hi": In(15),
                "below": In(2),
                "above": In(1),
                "sizes": Out(stream.Signature(block_size())),
                "places": In(stream.Signature(block_place(config))),
                "o": Out(stream.Signature(unsigned(config.axi_bits))),
                "events": Out(encoder_events(config)),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self._config.beat}x{self._config.axi_bits}"

    def elaborate(self, platform):
        m = Module()
        config = self._config
        beat, beats = config.beat, config.block_beats
        word_bytes = config.axi_bits // 8
        line_bytes = max(word_bytes, 2 * beat)
        line_words = line_bytes // word_bytes

        lines_depth = BLOCKS_AHEAD * 2 * BLOCK // line_bytes
        lines = place(m, "lines", SramFifo(width=8 * line_bytes, depth=lines_depth))
        meta_layout = data.StructLayout(
            {
                "nonzero": 2,
                "precision": 2,
                "nonzeros": BLOCK,
                "precisions": BLOCK,
                "payload_words": 5,
            }
        )
        metas = place(m, "metas", SramFifo(width=meta_layout.size, depth=BLOCKS_AHEAD))
        ahead = place(m, "ahead", RegisterFifo(shape=block_size(), depth=BLOCKS_AHEAD))
        places = place(m, "places", RegisterFifo(shape=block_place(config), depth=BLOCKS_AHEAD))

        # 1: quantised.
        quantized_valid = Signal()
        quantized_ready = Signal()
        codes = [Signal(2, name=f"code{e}", reset_less=True) for e in range(beat)]
        payloads = [Signal(16, name=f"payload{e}", reset_less=True) for e in range(beat)]
        quantizers = [place(m, f"quantizer{e}", Quantizer()) for e in range(beat)]
        m.d.comb += self.i.ready.eq(~quantized_valid | quantized_ready)
        with m.If(self.i.ready):
            m.d.sync += quantized_valid.eq(self.i.valid)
        for e, quantizer in enumerate(quantizers):
            m.d.comb += [
                quantizer.v.eq(self.i.payload[e]),
                quantizer.lo.eq(self.lo),
                quantizer.hi.eq(self.hi),
                quantizer.below.eq(self.below),
                quantizer.above.eq(self.above),
            ]
            with m.If(self.i.ready):
                m.d.sync += codes[e].eq(quantizer.code)
                with m.Switch(quantizer.code):
                    with m.Case(Code.FP16):
                        m.d.sync += payloads[e].eq(quantizer.value)
                    with m.Case(Code.FP8):
                        m.d.sync += payloads[e].eq(quantizer.fp8)
                    with m.Default():
                        m.d.sync += payloads[e].eq(0)
        took = Signal()
        m.d.comb += took.eq(self.i.valid & self.i.ready)
        for name, condition in {
            "zero": lambda q: (q.code == Code.ZERO) & ~q.underflow,
            "underflow": lambda q: q.underflow,
            "fp8": lambda q: q.code == Code.FP8,
            "fp16": lambda q: q.code == Code.FP16,
        }.items():
            m.d.sync += self.events[name].eq(Mux(took, tree_sum([condition(q) for q in quantizers]), 0))
        m.d.sync += self.events.nonfinite.eq(took & Cat(q.v[:15] >= F16_INF for q in quantizers).any())
        tops = [Mux(took & ~q.v[10:15].all(), q.v[10:15], 0) for q in quantizers]
        while len(tops) > 1:
            larger = [Signal(5, name=f"top{len(tops)}_{k}") for k in range(len(tops) // 2)]
            m.d.comb += [top.eq(Mux(a > b, a, b)) for top, a, b in zip(larger, tops[::2], tops[1::2], strict=True)]
            tops = larger
        m.d.sync += self.events.top.eq(tops[0])

        # 2: payloads compacted.
        packed_valid = Signal()
        packed_ready = Signal()
        packed = Signal(16 * beat, reset_less=True)
        packed_bytes = Signal(range(2 * beat + 1), reset_less=True)
        packed_nonzeros = Signal(beat, reset_less=True)
        packed_nonzero_count = Signal(range(beat + 1), reset_less=True)
        packed_precisions = Signal(beat, reset_less=True)
        nonzeros = [code[1] for code in codes]
        precisions = [code.all() for code in codes]
        compacted, compacted_bytes = _compact(
            m,
            "payload",
            8,
            payloads,
            [Cat(nonzero & ~wide, wide) for nonzero, wide in zip(nonzeros, precisions, strict=True)],
        )
        compacted_precisions, nonzero_count = _compact(m, "precision", 1, precisions, nonzeros)
        m.d.comb += quantized_ready.eq(~packed_valid | packed_ready)
        with m.If(quantized_ready):
            m.d.sync += [
                packed_valid.eq(quantized_valid),
                packed.eq(compacted),
                packed_bytes.eq(compacted_bytes),
                packed_nonzeros.eq(Cat(nonzeros)),
                packed_nonzero_count.eq(nonzero_count),
                packed_precisions.eq(compacted_precisions),
            ]

        # 3: gathered into lines, and masks gathered. `flush`: the tail of the last block is still to be written.
        fill_bits = ceil_log2(line_bytes)
        fill = Signal(fill_bits)
        tail = Signal(8 * line_bytes)
        flush = Signal()
        step = Signal()
        last = Signal()
        index = Signal(range(beats))
        total = Signal(fill_bits + 1)
        widened = Signal(8 * line_bytes)
        m.d.comb += widened.eq(packed)
        rotated = _rotate(m, "line", widened, fill)
        line, rest = Signal(8 * line_bytes), Signal(8 * line_bytes)
        for b in range(line_bytes):
            byte = rotated[8 * b : 8 * b + 8]
            before = b < fill if b < line_bytes - 1 else Const(0)  # the byte belongs to the next line
            m.d.comb += [
                line[8 * b : 8 * b + 8].eq(Mux(flush, 0, tail[8 * b : 8 * b + 8]) | Mux(before, 0, byte)),
                rest[8 * b : 8 * b + 8].eq(Mux(before, byte, 0)),
            ]
        full, over = Signal(), Signal()
        m.d.comb += [
            last.eq(index == beats - 1),
            total.eq(fill + packed_bytes),
            full.eq(total[fill_bits]),
            over.eq(full & total[:fill_bits].any()),
        ]
        gathered_valid, gathered_ready = Signal(name="gathered_valid"), Signal(name="gathered_ready")
        # A beat that fills a line waits for a flush; otherwise the flush uses its cycle.
        m.d.comb += [
            packed_ready.eq(lines.i.ready & (gathered_ready | ~last) & ~(flush & full)),
            step.eq(packed_valid & packed_ready),
            lines.i.valid.eq(flush | (step & (full | (last & (total != 0))))),
            lines.i.payload.eq(Mux(flush, tail, line)),
        ]
        with m.If(lines.i.ready):
            m.d.sync += flush.eq(0)
        with m.If(step):
            m.d.sync += [
                index.eq(Mux(last, 0, index + 1)),
                fill.eq(Mux(last, 0, total[:fill_bits])),
                tail.eq(Mux(full, rest, Mux(last, 0, line))),
                flush.eq(last & over),
            ]
        with m.Elif(flush & lines.i.ready):
            m.d.sync += tail.eq(0)

        nonzero_total = Signal(range(BLOCK + 1))
        # The ranks of the first FP16 elements, for a list: those of this beat behind those before.
        rank_bits = ceil_log2(beat)
        ranks, fp16_count = _compact(
            m,
            "rank",
            rank_bits,
            [Mux(packed_precisions[rank], Const(rank, rank_bits), 0) for rank in range(beat)],
            [packed_precisions[rank] for rank in range(beat)],
        )
        entries = [Signal(RANK_BITS, name=f"entry{k}") for k in range(min(LIST_BYTES, beat))]
        listed, listed_next = (Signal(LIST_BYTES * RANK_BITS, name=name) for name in ("listed", "listed_next"))
        fp16_total = Signal(range(BLOCK + 1))
        m.d.comb += listed_next.eq(listed)
        for k, entry in enumerate(entries):
            rank = ranks[rank_bits * k : rank_bits * (k + 1)]
            m.d.comb += entry.eq(Mux(k < fp16_count, rank + nonzero_total, 0))
        with m.Switch(fp16_total):
            for before in range(LIST_BYTES):
                with m.Case(before):
                    m.d.comb += listed_next.eq(listed | (Cat(entries) << RANK_BITS * before))

        mask = Signal(BLOCK, reset_less=True)
        precision_mask = Signal(BLOCK)
        mask_next, precision_next = Signal(BLOCK), Signal(BLOCK)
        nonzero_next, fp16_next = Signal(range(BLOCK + 1)), Signal(range(BLOCK + 1))
        m.d.comb += [
            mask_next.eq(Cat(mask[beat:], packed_nonzeros)),
            precision_next.eq(precision_mask | (packed_precisions << nonzero_total[:6])),
            nonzero_next.eq(nonzero_total + packed_nonzero_count),
            fp16_next.eq(fp16_total + (packed_bytes - packed_nonzero_count)),
        ]
        gathered_mask = Signal(BLOCK, reset_less=True)
        gathered_precisions = Signal(BLOCK, reset_less=True)
        gathered_nonzeros = Signal(range(BLOCK + 1), reset_less=True)
        gathered_fp16 = Signal(range(BLOCK + 1), reset_less=True)
        gathered_list = Signal.like(listed, name="gathered_list", reset_less=True)
        with m.If(gathered_ready):
            m.d.sync += gathered_valid.eq(step & last)
        with m.If(step):
            m.d.sync += [
                mask.eq(mask_next),
                precision_mask.eq(Mux(last, 0, precision_next)),
                nonzero_total.eq(Mux(last, 0, nonzero_next)),
                fp16_total.eq(Mux(last, 0, fp16_next)),
                listed.eq(Mux(last, 0, listed_next)),
            ]
            with m.If(last):
                m.d.sync += [
                    gathered_mask.eq(mask_next),
                    gathered_precisions.eq(precision_next),
                    gathered_nonzeros.eq(nonzero_next),
                    gathered_fp16.eq(fp16_next),
                    gathered_list.eq(listed_next),
                ]

        # 4: the block's modes and sizes.
        nonzero_mode, precision_mode = Signal(2), Signal(2)
        size, payload, payload_words = Signal(block_size()), Signal(8), Signal(5)
        word_bits = ceil_log2(word_bytes)
        room, mask_bytes = Signal(), Signal(4)
        with m.If(gathered_nonzeros == 0):
            m.d.comb += nonzero_mode.eq(NonzeroMode.EMPTY)
        with m.Elif(gathered_nonzeros == BLOCK):
            m.d.comb += nonzero_mode.eq(NonzeroMode.DENSE)
        with m.Else():
            m.d.comb += nonzero_mode.eq(NonzeroMode.MASKED)
        with m.If(gathered_fp16 == 0):
            m.d.comb += precision_mode.eq(PrecisionMode.FP8)
        with m.Elif(gathered_fp16 == gathered_nonzeros):
            m.d.comb += precision_mode.eq(PrecisionMode.FP16)
        with m.Elif(gathered_fp16 < mask_bytes):
            m.d.comb += precision_mode.eq(PrecisionMode.FEW)
        with m.Else():
            m.d.comb += precision_mode.eq(PrecisionMode.MIXED)
        list_bytes = Cat(
            Cat(gathered_list[RANK_BITS * k : RANK_BITS * (k + 1)], Const(0, 1), gathered_fp16 == k + 1)
            for k in range(LIST_BYTES)
        )
        m.d.comb += [
            mask_bytes.eq((gathered_nonzeros + 7)[3:]),
            size.head.eq(
                1
                + Mux(nonzero_mode == NonzeroMode.MASKED, BLOCK // 8, 0)
                + Mux(precision_mode == PrecisionMode.MIXED, mask_bytes, 0)
                + Mux(precision_mode == PrecisionMode.FEW, gathered_fp16[:3], 0)
            ),
            payload.eq(gathered_nonzeros + gathered_fp16),
            payload_words.eq((payload + (word_bytes - 1)) >> word_bits),
            size.length.eq(size.head + payload),
        ]
        meta = {
            "nonzero": nonzero_mode,
            "precision": precision_mode,
            "nonzeros": gathered_mask,
            "precisions": Mux(precision_mode == PrecisionMode.FEW, list_bytes, gathered_precisions),
            "payload_words": payload_words,
        }
        assert list(meta) == list(meta_layout.members)
        m.d.comb += [
            room.eq(metas.i.ready & ahead.i.ready),
            gathered_ready.eq(~gathered_valid | room),
            metas.i.valid.eq(gathered_valid & ahead.i.ready),
            metas.i.payload.eq(Cat(meta.values())),
            ahead.i.valid.eq(gathered_valid & metas.i.ready),
            ahead.i.payload.eq(size),
        ]
        wiring.connect(m, ahead.o, wiring.flipped(self.sizes))
        wiring.connect(m, wiring.flipped(self.places), places.i)

        # 5: words. Word k holds the header's bytes of its place, and payload words k - skip and the one before. What is
        # left of a block that is not flushed stays in `before` and comes into the next block's word 0. That takes no
        # cycle if it is the rest of a payload word.
        head = Signal(meta_layout)
        spot = Signal(block_place(config))
        advance, emit, leaves = Signal(), Signal(), Signal()
        k = Signal(5)
        skip, turn = Signal(6 - word_bits), Signal(word_bits)
        place_in_payload = Signal(6)
        begun, wants, spent, final = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            head.eq(metas.o.payload),
            spot.eq(places.o.payload),
            Cat(turn, skip).eq(spot.payload),
            place_in_payload.eq(k - skip),
            begun.eq(k >= skip),
            wants.eq(begun & (place_in_payload < head.payload_words)),
            spent.eq((head.payload_words == 0) | (begun & (place_in_payload == head.payload_words - 1))),
            final.eq(Mux(spot.flush, k == spot.words - 1, spent)),
            leaves.eq(k < spot.words),
            advance.eq(~self.o.valid | self.o.ready),
            emit.eq(advance & metas.o.valid & places.o.valid & (lines.o.valid | ~wants)),
            metas.o.ready.eq(emit & final),
            places.o.ready.eq(emit & final),
        ]
        word = Signal(8 * word_bytes)
        if line_words == 1:
            m.d.comb += [word.eq(lines.o.payload), lines.o.ready.eq(emit & wants)]
        else:
            part = Signal(range(line_words))
            ends = Signal()
            m.d.comb += [
                word.eq(lines.o.payload.word_select(part, 8 * word_bytes)),
                ends.eq((part == line_words - 1) | (place_in_payload == head.payload_words - 1)),
                lines.o.ready.eq(emit & wants & ends),
            ]
            with m.If(emit & wants):
                m.d.sync += part.eq(Mux(ends, 0, part + 1))

        wanted = Signal(8 * word_bytes)
        m.d.comb += wanted.eq(Mux(wants, word, 0))
        turned = _rotate(m, "word", wanted, turn)
        before = Signal(8 * word_bytes)
        header = Signal(8 * HEADER_BYTES)
        first_byte = Cat(head.nonzero, head.precision, Const(MAGIC, 4))
        listed_or_masked = (head.precision == PrecisionMode.MIXED) | (head.precision == PrecisionMode.FEW)
        precisions_field = Mux(listed_or_masked, head.precisions, 0)
        with m.If(head.nonzero == NonzeroMode.MASKED):
            m.d.comb += header.eq(Cat(first_byte, head.nonzeros, precisions_field))
        with m.Else():
            m.d.comb += header.eq(Cat(first_byte, precisions_field))
        shifted = header
        for bit in range(word_bits):
            moved = Signal(len(shifted) + (8 << bit), name=f"header_shift{bit}")
            m.d.comb += moved.eq(Mux(spot.start[bit], Cat(Const(0, 8 << bit), shifted), shifted))
            shifted = moved
        header_words = [
            shifted[8 * word_bytes * n : 8 * word_bytes * (n + 1)] for n in range(-(-len(shifted) // (8 * word_bytes)))
        ]
        # What the block before has left is before the first payload: if that is in a later word, word 0 takes it all.
        # The rest of a word that leaves is that of its payload word, nothing after a flush.
        composed, rest = Signal(8 * word_bytes), Signal(8 * word_bytes)
        for b in range(word_bytes):
            at = slice(8 * b, 8 * b + 8)
            head_byte = 0
            for n, header_word in enumerate(header_words):
                head_byte = Mux(k == n, header_word[at], head_byte)
            here = (b >= turn if b < word_bytes - 1 else Const(1)) & begun
            m.d.comb += [
                composed[at].eq(Mux(here, turned[at], before[at]) | head_byte),
                rest[at].eq(Mux(leaves, Mux(here, 0, turned[at]), composed[at])),
            ]
        with m.If(advance):
            m.d.sync += self.o.valid.eq(emit & leaves)
        with m.If(emit):
            m.d.sync += [
                self.o.payload.eq(composed),
                k.eq(Mux(final, 0, k + 1)),
                before.eq(rest),
            ]
        return m
