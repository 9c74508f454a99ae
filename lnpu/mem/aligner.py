"""Brings encoded blocks, which begin at any byte of an AXI word, to the words that the decoder takes."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.fgmp.decoder import decoder_input
from lnpu.hdl import Block

__all__ = ["Aligner", "aligned_block"]


def aligned_block(config: ChipConfig) -> data.StructLayout:
    """A block to be aligned.

    `length`: its bytes; 0: a block that is not in memory. `shift`: which byte of its first word it begins at. `kept`:
    that word is the last one of the block before (other than those of length 0), and does not come again.
    """
    return data.StructLayout({"length": 8, "shift": (config.axi_bits // 8).bit_length() - 1, "kept": 1})


class Aligner(Block):
    """Shifts the words of each block so that the block begins at the lowest byte of a word.

    A block takes the words from memory that hold its bytes (but for the first if `kept`) and gives ceil(length / word
    bytes) words to the decoder, `last` with the last of them. Behind the block's bytes, that one holds whatever is
    there. A block of length 0 takes no word and gives a single one of zeros, which is no block's beginning.

    A word a cycle, in and out: a block that takes n words and gives k of them needs max(n, k) cycles, one more if it is
    the first one in a row. Latency of 2 cycles from the last word that an output needs.

    Parameters
    ----------
    config : ChipConfig
        Uses `axi_bits`.

    Members
    -------
    block : In(stream.Signature(aligned_block(config)))
        `kept` not in the first block and not in one of length 0.
    word : In(stream.Signature(axi_bits))
        The blocks' words as they come from memory. Ready only while there is a block that needs it.
    o : Out(stream.Signature(decoder_input(config)))
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "block": In(stream.Signature(aligned_block(config))),
                "word": In(stream.Signature(config.axi_bits)),
                "o": Out(stream.Signature(decoder_input(config))),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.config.axi_bits}"

    def elaborate(self, platform):
        m = Module()
        axi_bits = self.config.axi_bits
        word_bytes = axi_bits // 8

        # `held` is the last word taken, and once `loaded`, the one in which the current block's next output begins.
        # `left`: bytes of the block from that output on.
        held = Signal(axi_bits, reset_less=True)
        active, loaded = Signal(name="active"), Signal(name="loaded")
        left, length = Signal(8, name="left", reset_less=True), Signal(8, name="length", reset_less=True)
        shift = Signal.like(self.block.payload.shift, name="shift", reset_less=True)
        absent, both, final, free, alone, go = (
            Signal(name=name) for name in ("absent", "both", "final", "free", "alone", "go")
        )
        early = Signal()  # A word would be the first one of the next block, and nobody needs `held` any more.
        m.d.comb += [
            absent.eq(length == 0),
            both.eq(loaded & ~absent & (shift + left > word_bytes)),
            final.eq(left <= word_bytes),
            alone.eq(absent | (loaded & ~both)),
            go.eq(active & (alone | (both & self.word.valid)) & free),
            self.block.ready.eq(~active | (go & final)),
            early.eq(
                self.block.valid & ~self.block.payload.kept & (self.block.payload.length != 0)
                & (~active | (alone & final & free))
            ),
            self.word.ready.eq(early | (active & ~absent & Mux(loaded, both & free, 1))),
        ]  # fmt: skip
        with m.If(self.word.valid & self.word.ready):
            m.d.sync += [held.eq(self.word.payload), loaded.eq(1)]
        with m.If(go):
            m.d.sync += left.eq(left - word_bytes)
        with m.If(self.block.ready):
            m.d.sync += [
                active.eq(self.block.valid),
                left.eq(self.block.payload.length),
                length.eq(self.block.payload.length),
                shift.eq(self.block.payload.shift),
                loaded.eq(self.block.payload.kept | (early & self.word.valid)),
            ]

        # Shift by whole 8 bytes, then by the rest.
        coarse, fine = shift[3:] << 3, shift[:3]
        moved = Signal(data.StructLayout({
            "data": axi_bits + 56, "fine": 3, "last": 1, "length": 8, "absent": 1,
        }), reset_less=True)  # fmt: skip
        moved_valid, out_free = Signal(name="moved_valid"), Signal(name="out_free")
        m.d.comb += [out_free.eq(~self.o.valid | self.o.ready), free.eq(~moved_valid | out_free)]
        with m.If(free):
            m.d.sync += moved_valid.eq(go)
        with m.If(go):
            m.d.sync += [
                moved.data.eq(Cat(held, self.word.payload) >> (coarse << 3)),
                moved.fine.eq(fine),
                moved.last.eq(final),
                moved.length.eq(length),
                moved.absent.eq(absent),
            ]
        with m.If(out_free):
            m.d.sync += self.o.valid.eq(moved_valid)
        with m.If(out_free & moved_valid):
            m.d.sync += [
                self.o.payload.data.eq(Mux(moved.absent, 0, moved.data >> (moved.fine << 3))),
                self.o.payload.last.eq(moved.last),
                self.o.payload.length.eq(moved.length),
            ]
        return m
