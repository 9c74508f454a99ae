"""Room for a command in front of a unit that takes one at a time."""

from amaranth.hdl import Module, Signal
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block
from lnpu.interfaces import command_stream

__all__ = ["CommandQueue"]


class CommandQueue(Block):
    """Takes the next command of a unit while that one is running.

    Members
    -------
    i : In(command_stream())
        Ready whether or not `i.valid` is set; then until it takes a command.
    o : Out(command_stream())
        To the unit, a cycle later at the earliest.
    unit_busy : In(1)
        Set from the cycle after the unit took a command until its last effect is done.
    unit_earlier : In(1)
        Of a unit that takes a command before the last effects of the one before are done: those are not. Then no
        further command is taken here, so when one is, all but the last are done.
    busy : Out(1)
        From the cycle after a command was taken until the last effect of all that were taken is done.
    queued : Out(1)
        An effect of a command that was taken before the last one is not done.
    """

    i: In(command_stream())
    o: Out(command_stream())
    unit_busy: In(1)
    unit_earlier: In(1)
    busy: Out(1)
    queued: Out(1)

    def elaborate(self, platform):
        m = Module()
        full = Signal()
        with m.If(~full):
            m.d.sync += [full.eq(self.i.valid & self.i.ready), self.o.payload.eq(self.i.payload)]
        with m.Elif(self.o.ready):
            m.d.sync += full.eq(0)
        m.d.comb += [
            self.i.ready.eq(~full & ~self.unit_earlier),
            self.o.valid.eq(full),
            self.busy.eq(full | self.unit_busy),
            self.queued.eq((full & self.unit_busy) | self.unit_earlier),
        ]
        return m
