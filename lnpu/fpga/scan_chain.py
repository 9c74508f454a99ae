"""A block with few pins: its ports on a shift register."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block, place

__all__ = ["ScanChain"]


class ScanChain(Block):
    """A block whose ports are on a shift register, so that it can be placed and routed on a device with few pins.

    Every input of the block comes from a flip-flop and every output goes to one, so that all paths are between
    flip-flops. The chain takes one of each for a port bit.

    Parameters
    ----------
    block : Block
        What to place.

    Members
    -------
    scan_in : In(1)
        Shifted into the inputs, a bit a cycle.
    capture : In(1)
        Take the outputs in this cycle, instead of shifting them.
    scan_out : Out(1)
        The outputs, a bit a cycle.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        super().__init__({"scan_in": In(1), "capture": In(1), "scan_out": Out(1)})

    def elaborate(self, platform):
        m = Module()
        placed = place(m, "block", self.block)
        inputs, outputs = [], []
        for _, member, value in placed.signature.flatten(placed):
            (outputs if member.flow is Out else inputs).append(Value.cast(value))
        driven = Signal(sum(len(value) for value in inputs), reset_less=True)
        taken = Signal(sum(len(value) for value in outputs), reset_less=True)
        m.d.sync += [
            driven.eq(Cat(self.scan_in, driven)),
            taken.eq(Mux(self.capture, Cat(outputs), Cat(driven[-1], taken))),
        ]
        m.d.comb += [Cat(inputs).eq(driven), self.scan_out.eq(taken[-1])]
        return m
