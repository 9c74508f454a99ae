"""Energy of memories, of FP32 arithmetic, and between technologies: cited figures and two rules, nothing measured.

Source for SRAM, FP32 and DRAM: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014,
45 nm at 0.9 V: 10, 20 and 100 pJ for 64 bits of caches of 8 KB, 32 KB and 1 MB; 0.9 pJ for an FP32 addition, 3.7 pJ
for a multiplication; 1.3 to 2.6 nJ for 64 bits of DRAM. Divisions: 7.1 multiplications, as measured on a
microcontroller with an FP32 unit (PMC8934428, table 3).

Rules: energy of a bit of SRAM goes with the square root of its size, about as these three do, from 1 KB up; and energy
goes with L V^2 from one technology to another (capacitance with the feature size L, at the supply V).
"""

import math
from dataclasses import dataclass

from lnpu.synth.liberty import Liberty

__all__ = ["DRAM_BIT", "FP32", "NODE_45", "NODE_65", "Node", "node_of", "sram_bit"]


@dataclass(frozen=True)
class Node:
    """A technology: feature size in nm, supply in V."""

    size: float
    voltage: float

    def scale_to(self, other: "Node") -> float:
        """Factor on dynamic energy from this technology to another: L V^2."""
        return other.size * other.voltage**2 / (self.size * self.voltage**2)


NODE_45 = Node(45, 0.9)
NODE_65 = Node(65, 1.0)
"""What efficiencies are normalised to: 65 nm at its nominal 1.0 V."""

_NODES = {"osu018": 180.0, "sky130": 130.0}
"""Feature size in nm by the beginning of a library's name."""

_SRAM_8K, _SRAM_LEAST = 10e-12 / 64, 1024
"""Joules a bit of 8 KB at 45 nm; bytes below which SRAMs are taken to be no cheaper."""

DRAM_BIT = 1.3e-9 / 64
"""Joules a bit of external memory, in any technology of the chip: the lower end, 20 pJ."""

FP32 = {"add32": 0.9e-12, "multiply32": 3.7e-12, "divide32": 7.1 * 3.7e-12}
"""Joules at 45 nm of an FP32 operation."""


def node_of(liberty: Liberty, size: float | None = None) -> Node:
    """The technology of a library; its feature size in nm must be given if its name does not tell.

    Raises
    ------
    ValueError
        If the size is unknown or not positive.
    """
    if size is None:
        size = next((nm for name, nm in _NODES.items() if liberty.name.startswith(name)), None)
    if size is None or not size > 0:
        known = ", ".join(f"{name}*" for name in _NODES)
        raise ValueError(
            f"the feature size of library {liberty.name} in nm must be given (known: {known}), not {size!r}"
        )
    return Node(size, liberty.voltage)


def sram_bit(size: float, node: Node) -> float:
    """Joules of reading or writing a bit of an SRAM macro of `size` bytes."""
    return _SRAM_8K * math.sqrt(max(size, _SRAM_LEAST) / 8192) * NODE_45.scale_to(node)
