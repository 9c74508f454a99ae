"""No word of a stream buffer is lost, duplicated, changed or overtaken, and none waits for ever.

The harness keeps the words in a queue of its own, whose length and words those of the buffer must equal in every
cycle, under any pattern of `valid` and `ready`. There is no deadlock: a buffer that holds a word offers it, and one
that is not full takes one.
"""

from amaranth.hdl import Array, Cat, Module, Signal
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block, place
from lnpu.mem.fifo import RegisterFifo, SramFifo
from lnpu.mem.skid_buffer import SkidBuffer
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

WIDTH = 8


class KeepsWords(Block):
    """A stream buffer of `depth` words beside a queue.

    `peek_level` and `peek_word0`, ... are the state of the buffer; a word counts where the queue has one. A buffer that
    has no register for its level tells it by `valid` and `ready`.
    """

    def __init__(self, *, buffer, depth: int, has_level: bool = True) -> None:
        self.buffer, self.depth, self.has_level = buffer, depth, has_level
        super().__init__(
            {
                "i": In(stream.Signature(WIDTH)),
                "o": Out(stream.Signature(WIDTH)),
                "peek_level": In(range(depth + 1)),
                **{f"peek_word{n}": In(WIDTH) for n in range(depth)},
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        dut = place(m, "dut", self.buffer())
        queue = [Signal(WIDTH, name=f"queue{n}") for n in range(self.depth)]
        level, kept = Signal(range(self.depth + 1)), Signal(range(self.depth + 1))
        push, pop = Signal(), Signal()
        m.d.comb += [
            dut.i.payload.eq(self.i.payload),
            dut.i.valid.eq(self.i.valid),
            self.i.ready.eq(dut.i.ready),
            self.o.payload.eq(dut.o.payload),
            self.o.valid.eq(dut.o.valid),
            dut.o.ready.eq(self.o.ready),
            push.eq(self.i.valid & dut.i.ready),
            pop.eq(self.o.ready & dut.o.valid),
            kept.eq(level - pop),
            self.assume.eq(1),
        ]
        m.d.sync += level.eq(kept + push)
        for n, word in enumerate(queue):
            with m.If(push & (kept == n)):
                m.d.sync += word.eq(self.i.payload)
            if n + 1 < self.depth:
                with m.Elif(pop):
                    m.d.sync += word.eq(queue[n + 1])
        same = [(level <= n) | (word == getattr(self, f"peek_word{n}")) for n, word in enumerate(queue)]
        m.d.comb += self.hold.eq(
            Cat(
                level <= self.depth,
                dut.o.valid == (level != 0),
                dut.i.ready == (level != self.depth),
                ~dut.o.valid | (dut.o.payload == queue[0]),
                (self.peek_level == level) if self.has_level else 1,
                *same,
            ).all()
        )
        return m


class KeepsWordsInMemory(Block):
    """A buffer in an SRAM of `depth` words, and a word at its output, beside a queue and a word."""

    def __init__(self, *, depth: int) -> None:
        self.depth = depth
        super().__init__(
            {
                "i": In(stream.Signature(WIDTH)),
                "o": Out(stream.Signature(WIDTH)),
                "peek_level": In(range(depth + 1)),
                **{f"peek_{name}": In(range(depth)) for name in ("at", "to")},
                **{f"peek_word{n}": In(WIDTH) for n in range(depth)},
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        dut = place(m, "dut", SramFifo(width=WIDTH, depth=self.depth))
        queue = [Signal(WIDTH, name=f"queue{n}") for n in range(self.depth)]
        level, kept = Signal(range(self.depth + 1)), Signal(range(self.depth + 1))
        there, word = Signal(), Signal(WIDTH)
        push, pull = Signal(), Signal()
        m.d.comb += [
            dut.i.payload.eq(self.i.payload),
            dut.i.valid.eq(self.i.valid),
            self.i.ready.eq(dut.i.ready),
            self.o.payload.eq(dut.o.payload),
            self.o.valid.eq(dut.o.valid),
            dut.o.ready.eq(self.o.ready),
            push.eq(self.i.valid & dut.i.ready),
            pull.eq((level != 0) & (~there | self.o.ready)),
            kept.eq(level - pull),
            self.assume.eq(1),
        ]
        m.d.sync += level.eq(kept + push)
        with m.If(pull):
            m.d.sync += [there.eq(1), word.eq(queue[0])]
        with m.Elif(self.o.ready):
            m.d.sync += there.eq(0)
        for n, place_ in enumerate(queue):
            with m.If(push & (kept == n)):
                m.d.sync += place_.eq(self.i.payload)
            if n + 1 < self.depth:
                with m.Elif(pull):
                    m.d.sync += place_.eq(queue[n + 1])
        words = Array(getattr(self, f"peek_word{n}") for n in range(self.depth))
        spots = [(self.peek_at + n)[: (self.depth - 1).bit_length()] for n in range(self.depth)]
        m.d.comb += self.hold.eq(
            Cat(
                level <= self.depth,
                dut.i.ready == (level != self.depth),
                dut.o.valid == there,
                ~there | (dut.o.payload == word),
                self.peek_level == level,
                (self.peek_at + level)[: (self.depth - 1).bit_length()] == self.peek_to,
                *((level <= n) | (words[spot] == queue[n]) for n, spot in enumerate(spots)),
            ).all()
        )
        return m


def _proof(name, block, buffer, depth, peeks, fault):
    return Proof(
        name=name,
        block=block,
        statement="every word comes out once, unchanged, in order; no deadlock",
        harness=lambda: KeepsWords(buffer=buffer, depth=depth, has_level="peek_level" in peeks),
        method="induction",
        depth=4,
        peeks=peeks,
        faults=(fault,),
    )


PROOFS = [
    _proof(
        "skid-buffer",
        "SkidBuffer, 8 bits",
        lambda: SkidBuffer(width=WIDTH),
        2,
        {"peek_word0": "dut.word", "peek_word1": "dut.spare"},
        Fault("spare_full", 0),
    ),
    *(
        _proof(
            f"fifo-{depth}",
            f"RegisterFifo, 8 bits x {depth}",
            lambda depth=depth: RegisterFifo(shape=WIDTH, depth=depth),
            depth,
            {"peek_level": "dut.level", **{f"peek_word{n}": f"dut.word{n}" for n in range(depth)}},
            Fault("pop", 0),
        )
        for depth in (1, 2, 4)
    ),
    Proof(
        name="sram-fifo-4",
        block="SramFifo, 8 bits x 4 and one",
        statement="every word comes out once, unchanged, in order; no deadlock",
        harness=lambda: KeepsWordsInMemory(depth=4),
        method="induction",
        depth=8,
        peeks={f"peek_{name}": f"dut.{name}" for name in ("level", "at", "to")}
        | {f"peek_word{n}": f"\\dut.memory.words[{n}]" for n in range(4)},
        faults=(Fault("level[1]", 0), Fault("level[2]", 0)),
    ),
]
