"""Operations a joule at peak and in a training step, beside published figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lnpu.compiler.cycles import expected_visit_cycles
from lnpu.config import ChipConfig
from lnpu.energy.account import Costs, clock_of, macro_bytes
from lnpu.energy.memory import NODE_65, Node, sram_bit
from lnpu.formats import LOW_BITS, psum_layout

__all__ = ["PUBLISHED", "SPARSITIES", "V100", "Published", "peak_efficiency"]

SPARSITIES = (0.0, 0.5, 0.9)
_TAPS = 3


@dataclass(frozen=True)
class Published:
    """A published efficiency, in TFLOPS/W, and the technology (None: not stated) with its nominal supply."""

    name: str
    value: float
    what: str
    node: Node | None

    @property
    def at_65(self) -> float | None:
        """The same normalised to 65 nm by L V^2."""
        return None if self.node is None else self.value / self.node.scale_to(NODE_65)


_V100_NODE = Node(12, 0.8)
V100 = {
    "peak": Published("V100, peak", 125 / 300, "125 TFLOPS FP16, 300 W with its memory", _V100_NODE),
    "achieved": Published("V100, training ResNet-50", 32.7 / 300, "about 32.7 TFLOPS achieved, 300 W", _V100_NODE),
}

PUBLISHED = (
    Published("LNPU (ISSCC 2019), best", 25.3, "FP8, high sparsity, skipped operations counted", Node(65, 1.0)),
    Published("RedMulE, FP16", 0.755, "dense", Node(22, 0.8)),
    Published("RedMulE, FP8", 0.920, "dense", Node(22, 0.8)),
    Published("IBM (ISSCC 2021), hybrid FP8", 3.58, "peak", Node(7, 0.75)),
    Published("FP8-SEB (ISSCC 2021)", 4.81, "dense", None),
    *V100.values(),
)
"""As published; supplies are the nominal ones of the technologies, which the figures may not have been taken at."""


def peak_efficiency(costs: Costs, config: ChipConfig) -> list[dict[str, Any]]:
    """TFLOPS/W of busy cores with operands that are there, by precision and sparsity: no loads, no external memory.

    Visits of 64 elements, three to a row of partial sums that is read and written. An operation is a multiplication or
    an addition. `counted`: skipped operations counted as done; `done`: not. Both in the technology of `costs`, and
    `..._65` normalised to 65 nm.
    """
    clock_core, clock_other = clock_of(costs, config)
    clock = clock_core + clock_other / config.cores
    size = macro_bytes(config)
    bit = {name: sram_bit(size[name], costs.node) for name in size}
    core, lanes, depth = costs.core, config.lanes, config.depth
    rows = []
    for kind in ("fp16", "fp8"):
        for sparsity in SPARSITIES:
            elements = depth * (1 - sparsity)
            cycles = expected_visit_cycles(config, 1 - sparsity, fp8=kind == "fp8")
            issues, event = (elements, "fp16") if kind == "fp16" else (elements / 2, "pair")
            # Both operands are of this precision.
            row = (16 - LOW_BITS) * bit["dense_high"] + bit["dense_flag"]
            row += LOW_BITS * bit["dense_low"] if kind == "fp16" else 0.0
            joules = (
                cycles * clock
                + issues * (lanes * core[event]["lane"] + core[event]["core"])
                + lanes * core["visit"]["lane"]
                + core["visit"]["core"]
                + elements * (16 * bit["sparse"] + lanes * row)
                + depth * 2 * bit["code"]
                + 2 * lanes * psum_layout(config.acc_bits).size * bit["psum"] / _TAPS
            )
            done = 2 * elements * lanes / joules * 1e-12
            counted = 2 * depth * lanes / joules * 1e-12
            factor = 1 / costs.node.scale_to(NODE_65)
            rows.append(
                {
                    "precision": kind, "sparsity": sparsity, "counted": counted, "done": done,
                    "counted_65": counted * factor, "done_65": done * factor,
                }
            )  # fmt: skip
    return rows


def training_efficiency(operations: float, energies: Mapping[str, float], node: Node) -> dict[str, float]:
    """TFLOPS/W of a whole step at 65 nm with external memory, dense operations counted, and over the V100's figures.

    External memory is not scaled, the chip is.
    """
    chip = sum(joules for name, joules in energies.items() if name != "memory") * node.scale_to(NODE_65)
    value = operations / (chip + energies["memory"]) * 1e-12
    found = {"value": value}
    for name, one in V100.items():
        normalised = one.at_65
        assert normalised is not None
        found |= {f"v100_{name}": value / one.value, f"v100_{name}_65": value / normalised}
    return found
