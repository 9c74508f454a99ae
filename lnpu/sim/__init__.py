"""Native simulation of the chip's Verilog."""

from lnpu.sim.chip import Chip

__all__ = ["Chip"]
