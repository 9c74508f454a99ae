"""First-in first-out buffers: for a few words, in registers, and for more, in an SRAM."""

from amaranth.hdl import Module, Shape, Signal, unsigned
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block, Sram

__all__ = ["RegisterFifo", "SramFifo"]


class RegisterFifo(Block):
    """Holds up to `depth` words, one in and one out a cycle, one cycle of latency.

    `o` is the first register and no port depends on another combinationally: a full buffer takes a word again the
    cycle after one has left.

    Parameters
    ----------
    shape : ShapeLike
        Shape of a word.
    depth : int
        Number of words, 1 or more (2 or more to pass a word every cycle).

    Members
    -------
    i : In(stream.Signature(shape)) ; o : Out(stream.Signature(shape))
    """

    def __init__(self, *, shape, depth: int) -> None:
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be 1 or more, not {depth!r}")
        self.width, self.depth = Shape.cast(shape).width, depth
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    @property
    def suffix(self) -> str:
        return f"{self.width}x{self.depth}"

    def elaborate(self, platform):
        m = Module()
        words = [Signal.like(self.i.payload, name=f"word{index}", reset_less=True) for index in range(self.depth)]
        level = Signal(range(self.depth + 1))
        place = Signal(range(self.depth + 1))
        push = Signal()
        pop = Signal()
        m.d.comb += [
            self.i.ready.eq(level != self.depth),
            self.o.valid.eq(level != 0),
            self.o.payload.eq(words[0]),
            push.eq(self.i.valid & self.i.ready),
            pop.eq(self.o.valid & self.o.ready),
            place.eq(level - pop),
        ]
        m.d.sync += level.eq(level + push - pop)
        for index, word in enumerate(words):
            with m.If(push & (place == index)):
                m.d.sync += word.eq(self.i.payload)
            if index + 1 < self.depth:
                with m.Elif(pop):
                    m.d.sync += word.eq(words[index + 1])
        return m


class SramFifo(Block):
    """Holds wide words in an SRAM, one in and one out a cycle, two cycles of latency.

    Parameters
    ----------
    width : int
        Bits in a word.
    depth : int
        Number of words, a power of two; one more is held at the output.

    Members
    -------
    i : In(stream.Signature(width)); o : Out(stream.Signature(width))
    """

    def __init__(self, *, width: int, depth: int) -> None:
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"depth must be a power of two from 2, not {depth!r}")
        self.width, self.depth = width, depth
        super().__init__({"i": In(stream.Signature(unsigned(width))), "o": Out(stream.Signature(unsigned(width)))})

    @property
    def suffix(self) -> str:
        return f"{self.width}x{self.depth}"

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = words = Sram(depth=self.depth, width=self.width)
        level = Signal(range(self.depth + 1))
        at, to = Signal(range(self.depth), name="at"), Signal(range(self.depth), name="to")
        valid, push, pull = Signal(name="valid"), Signal(name="push"), Signal(name="pull")
        m.d.comb += [
            self.i.ready.eq(level != self.depth),
            push.eq(self.i.valid & self.i.ready),
            pull.eq((level != 0) & (~valid | self.o.ready)),
            words.w_en.eq(push),
            words.w_addr.eq(to),
            words.w_data.eq(self.i.payload),
            words.r_en.eq(pull),
            words.r_addr.eq(at),
            self.o.valid.eq(valid),
            self.o.payload.eq(words.r_data),
        ]
        m.d.sync += level.eq(level + push - pull)
        with m.If(push):
            m.d.sync += to.eq(to + 1)
        with m.If(pull):
            m.d.sync += [at.eq(at + 1), valid.eq(1)]
        with m.Elif(self.o.ready):
            m.d.sync += valid.eq(0)
        return m
