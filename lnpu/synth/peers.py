"""Arithmetic units of others in the same flow, to compare the PE with.

Measured in November 2026 from the RTL that their authors publish, with pyosys 0.70 and the flow `PLAIN` of
`lnpu.synth.netlist` (SystemVerilog through the slang front end): rounding to nearest only, flags unconnected, no wire
load. Areas in um2.
"""

from dataclasses import dataclass

__all__ = ["PEERS", "PROTOTYPE", "REDMULE", "Unit"]


@dataclass(frozen=True)
class Unit:
    """A unit's areas in um2.

    Attributes
    ----------
    osu018, sky130 : float
        In osu018 and in Sky130 HD (typical, 25 C, 1.8 V).
    fp8_products : int
        FP8 products a cycle; 0 where it has no FP8.
    """

    name: str
    osu018: float
    sky130: float
    fp8_products: int = 0

    def area(self, library: str) -> float | None:
        """In a library by its name, or None if it was not measured there."""
        if library.startswith("osu018"):
            return self.osu018
        return self.sky130 if library.startswith("sky130_fd_sc_hd") else None


REDMULE = Unit("RedMulE compute element (one FP16 FMA, three register stages)", 158272, 23965)
PROTOTYPE = Unit("prototype of this PE (97-bit accumulator, two stages, all registers)", 119397, 20052, 2)
PEERS = (
    Unit("FPnew FP16 FMA, no registers", 75351, 11954),
    Unit("HardFloat FP16 FMA, IEEE ports, no registers", 86828, 13893),
    Unit("FPnew FP8 x FP8 + FP16 FMA, no registers", 61850, 7520, 1),
    Unit("ExSdotp, two products E5M2 to FP16, no registers", 78644, 12498, 2),
    Unit("ExSdotp, two products E5M2 or E4M3 to FP16 or BF16", 92093, 14341, 2),
    REDMULE,
    PROTOTYPE,
)
