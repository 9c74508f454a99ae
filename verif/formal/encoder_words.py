"""The encoder's last stage: the words of a block are its header, masks and payloads, each byte once, in order.

Blocks are free: header, masks, payloads of any length, place behind the block before or in a word of its own; so are
the payload words that come, when block, place and payload words are there, and when words are taken. The harness works
each byte out from its position in the block. It drives what comes from the encoder's memories, which are buffers with
proofs of their own (see `verif/formal/streams.py`).
"""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import TINY
from lnpu.fgmp.encoder import Encoder, block_place
from lnpu.formats import NonzeroMode, PrecisionMode
from lnpu.hdl import Block, place
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

_BYTES = TINY.axi_bits // 8
_META = data.StructLayout({"nonzero": 2, "precision": 2, "nonzeros": 64, "precisions": 64, "payload_words": 5})
_BLOCK = data.StructLayout(
    {"nonzero": 2, "precision": 2, "nonzeros": 64, "precisions": 64, "list": 4, "payload": 8, "flush": 1}
)
"""A block: modes, masks, bytes of the precision mask or list, bytes of the payloads, whether it is flushed."""

_PEEKS = {"k": 5, "before": TINY.axi_bits, "metas__o__ready": 1, "places__o__ready": 1, "lines__o__ready": 1}
_MEMORIES = {"metas": _META, "places": block_place(TINY), "lines": TINY.axi_bits}


class ComposesWords(Block):
    """The last stage of an encoder, between memories and a reader that the harness is."""

    def __init__(self) -> None:
        super().__init__(
            {
                "offer": In(1),
                "block": In(_BLOCK),
                "place_there": In(1),
                "payload": In(TINY.axi_bits),
                "payload_there": In(1),
                "ready": In(1),
                **{f"peek_{name}": In(width) for name, width in _PEEKS.items()},
                **{f"cut_{name}__o__payload": Out(layout) for name, layout in _MEMORIES.items()},
                **{f"cut_{name}__{port}": Out(1) for name in _MEMORIES for port in ("o__valid", "i__ready")},
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        dut = place(m, "dut", Encoder(config=TINY))
        there, block = Signal(), Signal(_BLOCK)
        k, taken = Signal(5), Signal(5)  # which word it is, payload words that were taken
        start, carry = Signal(3), Signal(TINY.axi_bits)  # bytes of the block before in word 0
        last_payload = Signal(TINY.axi_bits)

        head, first, end = Signal(5), Signal(6), Signal(8)
        payload_words, words = Signal(5), Signal(5)
        listed = (block.precision == PrecisionMode.MIXED) | (block.precision == PrecisionMode.FEW)
        masked = block.nonzero == NonzeroMode.MASKED
        m.d.comb += [
            head.eq(1 + Mux(masked, 8, 0) + Mux(listed, block.list, 0)),
            first.eq(start + head),
            end.eq(first + block.payload),
            payload_words.eq((block.payload + 7) >> 3),
            words.eq((end + Mux(block.flush, 7, 0)) >> 3),
        ]
        # The bytes of header and masks; beyond them nothing is looked at.
        code = Cat(block.nonzero, block.precision, Const(0b1010, 4))
        header = [code, *([None] * 16)]
        for n in range(16):
            after = block.precisions.word_select(n - 8, 8) if n >= 8 else block.nonzeros.word_select(n, 8)
            plain = block.precisions.word_select(n, 8) if n < 8 else Const(0, 8)
            header[1 + n] = Mux(masked, after, plain)

        # Payload words: those that are due, with zeros behind the last payload.
        wants, payload = Signal(), Signal(TINY.axi_bits)
        m.d.comb += wants.eq(((k << 3) + 7 >= first) & (taken < payload_words))
        for n in range(_BYTES):
            inside = (taken << 3) + n < block.payload
            m.d.comb += payload[8 * n : 8 * n + 8].eq(Mux(inside, self.payload[8 * n : 8 * n + 8], 0))

        def payload_byte(position, *, now):
            """The payload byte at a position in the words, and whether it has come before, or `now`."""
            index = Signal(9)
            m.d.comb += index.eq(position - first)
            number, which = index[3:8], index[:3]
            before = (number + 1)[:5] == taken
            word = Mux(before, last_payload, payload) if now else last_payload
            there = ~index[8] & (index[:8] < block.payload) & (before | (now & wants & (number == taken)))
            return Mux(there, word.word_select(which, 8), 0)

        word, left, rest = Signal(TINY.axi_bits), Signal(TINY.axi_bits), Signal(TINY.axi_bits)
        for n in range(_BYTES):
            here = slice(8 * n, 8 * n + 8)
            position, offset = (k << 3) + n, Signal(8, name=f"offset{n}")
            m.d.comb += [
                offset.eq(position - start),
                left[here].eq(payload_byte(position, now=False)),
                word[here].eq(
                    Mux(
                        (k == 0) & (n < start),
                        carry[here],
                        Mux(offset < head, Array(header)[offset[:5]], payload_byte(position, now=True)),
                    )
                ),
                rest[here].eq(payload_byte(position + _BYTES, now=True)),
            ]

        free, emit, leaves, final = Signal(), Signal(), Signal(), Signal()
        out_valid, out = Signal(), Signal(TINY.axi_bits)
        m.d.comb += [
            free.eq(~out_valid | self.ready),
            emit.eq(free & there & self.place_there & (self.payload_there | ~wants)),
            leaves.eq(k < words),
            final.eq(Mux(block.flush, k + 1 == words, taken + wants == payload_words)),
        ]
        with m.If(free):
            m.d.sync += out_valid.eq(emit & leaves)
        with m.If(emit):
            m.d.sync += [out.eq(word), k.eq(Mux(final, 0, k + 1)), taken.eq(Mux(final, 0, taken + wants))]
            with m.If(wants):
                m.d.sync += last_payload.eq(payload)
        with m.If(emit & final):
            m.d.sync += [
                start.eq(Mux(block.flush, 0, end[:3])),
                carry.eq(Mux(block.flush, 0, Mux(leaves, rest, word))),
            ]
        with m.If(~there | (emit & final)):
            m.d.sync += [there.eq(self.offer), block.eq(self.block)]

        spot, meta = self.cut_places__o__payload, self.cut_metas__o__payload
        m.d.comb += [
            *(meta[name].eq(block[name]) for name in ("nonzero", "precision", "nonzeros")),
            meta.payload_words.eq(payload_words),
            spot.start.eq(start),
            spot.payload.eq(first),
            spot.words.eq(words),
            spot.flush.eq(block.flush),
            self.cut_metas__o__valid.eq(there),
            self.cut_places__o__valid.eq(self.place_there),
            self.cut_lines__o__payload.eq(payload),
            self.cut_lines__o__valid.eq(self.payload_there),
            dut.o.ready.eq(self.ready),
        ]
        for n in range(8):
            m.d.comb += meta.precisions.word_select(n, 8).eq(
                Mux(listed & (n >= block.list), 0, block.precisions.word_select(n, 8))
            )

        new = self.block
        new_listed = (new.precision == PrecisionMode.MIXED) | (new.precision == PrecisionMode.FEW)
        m.d.comb += [
            # A block without payloads is empty, and has neither masks nor list.
            self.assume.eq(
                Cat(
                    new.payload <= 128,
                    new.list <= 8,
                    (new.payload != 0) | ((new.nonzero == NonzeroMode.EMPTY) & ~new_listed),
                ).all()
            ),
            self.hold.eq(
                Cat(
                    dut.o.valid == out_valid,
                    ~out_valid | (dut.o.payload == out),
                    self.peek_metas__o__ready == (emit & final),
                    self.peek_places__o__ready == (emit & final),
                    self.peek_lines__o__ready == (emit & wants),
                    # How the state of the block and that of the harness belong together.
                    self.peek_k == k,
                    self.peek_before == Mux(k == 0, carry, left),
                    Cat((n < start) | (carry.word_select(n, 8) == 0) for n in range(_BYTES)).all(),
                    ~there | (block.payload <= 128),
                    ~there | (block.list <= 8),
                    ~there | (block.payload != 0) | ((block.nonzero == NonzeroMode.EMPTY) & ~listed),
                    there | ((k == 0) & (taken == 0)),
                    ~there
                    | (
                        taken == Mux(k < first[3:], 0, Mux(k - first[3:] < payload_words, k - first[3:], payload_words))
                    ),
                    ~there | Mux(block.flush, k < words, (payload_words == 0) | (taken < payload_words)),
                ).all()
            ),
        ]
        return m


PROOFS = [
    Proof(
        name="encoder-words",
        block="Encoder, 4 elements and 64 bits: its last stage",
        statement="the words are header, masks and payloads, every byte once, in order; each goes as soon as it can",
        harness=ComposesWords,
        method="induction",
        depth=6,
        peeks={f"peek_{name}": f"dut.{name}" for name in _PEEKS},
        without=dict.fromkeys(_MEMORIES, ("o__payload", "o__valid", "i__ready")),
        faults=(Fault("before[7]", 0), Fault("wanted[3]", 0)),
    )
]
