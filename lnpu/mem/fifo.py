"""A first-in first-out buffer for a few words, in registers."""

from amaranth.hdl import Module, Shape, Signal
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block

__all__ = ["RegisterFifo"]


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
