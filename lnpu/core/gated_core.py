"""A DL core whose clock stands still while it has nothing to do."""

from amaranth.hdl import Cat, Module, ResetSignal, Signal, Value
from amaranth.lib import wiring

from lnpu.core.core import Core
from lnpu.hdl import ClockGate, place

__all__ = ["GatedCore"]


class GatedCore(Core):
    """A `Core` behind a clock gate: the same ports, the same values on them in every cycle, less energy.

    The edge at the end of a cycle reaches the core if one of `causes` is true in the cycle. No register of an idle core
    moves without one in a way that matters: when `busy` falls, the last partial sums are in the store, the pipeline is
    empty and every event is zero; what a row of partial sums is read from holds it. So there is no need of cycles after
    these, and nothing waits for the clock to start.
    """

    def causes(self) -> dict[str, Value]:
        """What the core needs its clock for, by name; each is a bit."""
        return {
            "reset": ResetSignal(),
            "busy": self.busy,
            "command": self.command.valid,
            "fill_sparse": self._addressed(self.fill_sparse),
            "fill_dense": self._addressed(self.fill_dense),
            "psum_request": self.psum_request.valid,
        }

    def _addressed(self, write) -> Value:
        """A beat comes that is, by its cores, for this one."""
        return write.valid & (write.cores >> self.index)[0]

    def elaborate(self, platform):
        m = Module()
        clock = Signal()
        m.submodules.gate = gate = ClockGate()
        m.d.comb += [gate.enable.eq(Cat(self.causes().values()).any()), clock.eq(gate.gated_clk)]
        core = place(m, "core", Core(config=self.config), clock=clock)
        wiring.connect(m, wiring.flipped(self), core)
        return m
