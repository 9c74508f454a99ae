"""The least that has a clock gate: a counter that rests."""

from amaranth.hdl import Module
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block, ClockGate, place

__all__ = ["Nibble", "Resting"]


class Nibble(Block):
    """Counts."""

    def __init__(self) -> None:
        super().__init__({"value": Out(4)})

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.value.eq(self.value + 1)
        return m


class Resting(Block):
    """Counts while a register says so."""

    def __init__(self) -> None:
        super().__init__({"value": Out(4), "go": In(1)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.gate = gate = ClockGate()
        m.d.sync += gate.enable.eq(self.go)
        counter = place(m, "counter", Nibble(), clock=gate.gated_clk)
        m.d.comb += self.value.eq(counter.value)
        return m
