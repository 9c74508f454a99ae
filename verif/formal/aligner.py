"""The aligner hands on every byte of every block once, in order, in the words where it belongs, and never gets stuck.

In the harness' memory every byte is its own address (modulo 256), so a word that is lost, used twice or shifted by a
wrong number of bytes shows. Blocks are free: any length, from any byte of the next word or of the last one taken; so is
what is valid and ready. Blocks that were taken are in a queue, which tells the words to come.
"""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import TINY
from lnpu.hdl import Block, place
from lnpu.mem.aligner import Aligner, aligned_block
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

_BYTES = TINY.axi_bits // 8
_QUEUE = 3
"""Blocks inside, at most: one word each of two, and another."""

_PATIENCE = 3
"""Cycles without a word at the output, at most, while blocks and words are offered."""

_MOVED = data.StructLayout({"data": TINY.axi_bits + 56, "fine": 3, "last": 1, "length": 8, "absent": 1})
_PEEKS = {
    "active": 1, "loaded": 1, "left": 8, "length": 8, "shift": 3, "held": TINY.axi_bits, "moved_valid": 1,
    "moved": _MOVED,
}  # fmt: skip
_BLOCK = data.StructLayout({"address": 8, "length": 8})
_COMING = data.StructLayout({"block": 2, "number": 6, "address": 8, "left": 8, "length": 8, "last": 1})
"""A word to come: place of its block in the queue, which word of it, address, bytes from there on."""


class HandsOnBytes(Block):
    """An aligner, a memory of addresses and a queue of blocks."""

    def __init__(self) -> None:
        super().__init__(
            {
                "block": In(stream.Signature(aligned_block(TINY))),
                "word_valid": In(1),
                "ready": In(1),
                **{f"peek_{name}": In(shape) for name, shape in _PEEKS.items()},
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        dut = place(m, "dut", Aligner(config=TINY))
        request, out = self.block.p, dut.o.p
        words, ever = (
            Signal(5, name="words"),
            Signal(name="ever"),
        )  # words that were taken, modulo 256 bytes; whether one was
        m.d.comb += [
            dut.block.p.eq(request),
            dut.block.valid.eq(self.block.valid),
            self.block.ready.eq(dut.block.ready),
            dut.word.valid.eq(self.word_valid),
            dut.word.payload.eq(_addresses(words << 3)),
            dut.o.ready.eq(self.ready),
        ]
        with m.If(dut.word.valid & dut.word.ready):
            m.d.sync += [words.eq(words + 1), ever.eq(1)]

        # Blocks inside, oldest first; of that, `done` words are out.
        queue = [Signal(_BLOCK, name=f"queue{n}") for n in range(_QUEUE)]
        level, remain = Signal(range(_QUEUE + 1), name="level"), Signal(range(_QUEUE + 1))
        done = Signal(6)
        needed, some = (
            Signal(5, name="needed"),
            Signal(name="some"),
        )  # words that all blocks so far take; whether one takes any
        new = Signal(_BLOCK)
        push, taken, pop = Signal(), Signal(), Signal()
        m.d.comb += [
            new.address.eq(Cat(request["shift"], (needed - request.kept)[:5])),
            new.length.eq(request.length),
            push.eq(self.block.valid & dut.block.ready),
            taken.eq(dut.o.valid & self.ready),
            pop.eq(taken & out.last),
            remain.eq(level - pop),
        ]
        m.d.sync += [level.eq(remain + push), done.eq(Mux(pop, 0, done + taken))]
        with m.If(push & (request.length != 0)):
            m.d.sync += [needed.eq(_end(new)), some.eq(1)]
        for n, block in enumerate(queue):
            with m.If(push & (remain == n)):
                m.d.sync += block.eq(new)
            if n + 1 < _QUEUE:
                with m.Elif(pop):
                    m.d.sync += block.eq(queue[n + 1])

        # The next three words: at the output, behind it, and still to be made.
        coming = []
        at, number = Const(0, 2), done
        for n in range(3):
            block, word = Array(queue)[at], Signal(_COMING, name=f"coming{n}")
            m.d.comb += [
                word.block.eq(at),
                word.number.eq(number),
                word.address.eq(block.address + (number << 3)),
                word.left.eq(block.length - (number << 3)),
                word.length.eq(block.length),
                word.last.eq(block.length <= ((number + 1) << 3)),
            ]
            coming.append(word)
            at, number = (word.block + word.last)[:2], Mux(word.last, 0, word.number + 1)
        following = Signal(_COMING)
        m.d.comb += following.eq(Array(coming)[dut.o.valid + self.peek_moved_valid])
        moved, behind = self.peek_moved, Signal(_COMING)
        m.d.comb += behind.eq(Mux(dut.o.valid, coming[1], coming[0]))

        idle = Signal(range(_PATIENCE + 2))
        with m.If(dut.o.valid | ~self.block.valid | ~self.word_valid):
            m.d.sync += idle.eq(0)
        with m.Elif(idle <= _PATIENCE):
            m.d.sync += idle.eq(idle + 1)
        stalled, before = Signal(), Signal(Value.cast(out).shape())
        m.d.sync += [stalled.eq(dut.o.valid & ~self.ready), before.eq(Value.cast(out))]

        contract = [
            ~dut.o.valid | ((level != 0) & _holds(out.data, out, coming[0])),
            ~stalled | (dut.o.valid & (Value.cast(out) == before)),
            (level != 0) | dut.block.ready,
            idle <= _PATIENCE,
        ]
        # How the state of the block and that of the harness belong together.
        absent = following.length == 0
        relation = [
            level <= _QUEUE,
            Mux(level == 0, done == 0, (done == 0) | ((done << 3) < queue[0].length)),
            ~self.peek_moved_valid
            | (
                (behind.block < level)
                & _holds(moved.data >> (moved.fine << 3), moved, behind)
                & (moved.absent == (behind.length == 0))
            ),
            level == following.block + self.peek_active,
            self.peek_active | (following.number == 0),
            ~self.peek_active | (following.number == 0) | ((following.number << 3) < following.length),
            ~self.peek_active
            | (
                (self.peek_left == following.left)
                & (self.peek_length == following.length)
                & (absent | (self.peek_shift == following.address[:3]))
            ),
            ~ever | (self.peek_held == _addresses((words - 1)[:5] << 3)),
            # Words that the blocks take, were taken, or will be.
            Mux(
                self.peek_active & ~absent,
                ((words - self.peek_loaded)[:5] == following.address[3:])
                & (~self.peek_loaded | ever)
                & some
                & (needed == _end(Array(queue)[following.block])),
                (needed == words) & (~some | ever),
            ),
        ]
        rules = Signal(len(contract) + len(relation))
        m.d.comb += [
            self.assume.eq(~request.kept | ((request.length != 0) & some)),
            rules.eq(Cat(*contract, *relation)),
            self.hold.eq(rules.all()),
        ]
        return m


def _addresses(first):
    """The word that begins at address `first`."""
    return Cat((first + byte)[:8] for byte in range(_BYTES))


def _end(block):
    """The number of the word behind those in which the bytes of `block` are."""
    return ((block.address + block.length - 1)[3:8] + 1)[:5]


def _holds(bytes_, word, coming):
    """`word`, with the bytes `bytes_`, is the word that is to come."""
    same = [(coming.left <= n) | (bytes_[8 * n : 8 * n + 8] == (coming.address + n)[:8]) for n in range(_BYTES)]
    return Cat(*same, word.last == coming.last, word.length == coming.length).all()


PROOFS = [
    Proof(
        name="aligner",
        block="Aligner, 64 bits",
        statement="every byte of every block comes out once, in order, in its place; no deadlock",
        harness=HandsOnBytes,
        method="induction",
        depth=6,
        peeks={f"peek_{name}": f"dut.{name}" for name in _PEEKS},
        faults=(Fault("early", 0), Fault("both", 0), Fault("out_free", 1), Fault("alone", 0)),
    )
]
