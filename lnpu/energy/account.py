"""From energies of events and numbers of events to the energy of a training step, by component.

A lane is a PE with its share of the dense buffer's logic. Energies of events come on top of the clock's, which every
flip-flop takes in every cycle, but for those of idle cores: their clocks are gated (`lnpu.core.gated_core`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lnpu.config import ChipConfig
from lnpu.energy.memory import DRAM_BIT, FP32, NODE_45, Node, sram_bit
from lnpu.formats import LOW_BITS, psum_layout

__all__ = ["COMPONENTS", "Costs", "clock_of", "step_energy"]

COMPONENTS = {
    "products": "products",
    "control": "core control",
    "clock_busy": "clock, busy cores",
    "clock_idle": "clock, idle cores",
    "clock_other": "clock, the rest",
    "sram": "SRAM",
    "coding": "encoder, decoder",
    "vector": "vector unit, rounding",
    "memory": "external memory",
}
"""Names of the parts of an energy, and labels."""


@dataclass(frozen=True)
class Costs:
    """Joules of events in one technology.

    Attributes
    ----------
    pe : dict
        From `measure_pe`.
    core : dict
        From `measure_core`: `lane` and `core` parts of `idle`, `clock`, `visit`, `fp16`, `pair`, `fp16_masked`,
        `pair_masked`, `fill`.
    coding : dict
        From `measure_coding`.
    flip_flop : float
        A flip-flop's clock, a cycle.
    uncore_flip_flops : int
        Flip-flops outside the cores.
    node : Node
        The technology of all of these.
    """

    pe: Mapping[str, float]
    core: Mapping[str, Any]
    coding: Mapping[str, float]
    flip_flop: float
    uncore_flip_flops: int
    node: Node


def macro_bytes(config: ChipConfig) -> dict[str, float]:
    """Bytes of a macro of each SRAM of a chip."""
    words, groups = config.depth // config.beat, config.lanes // config.beat
    return {
        "code": 2 * config.rows * 2 * words / 8,
        "sparse": 2 * config.rows * words * 16 / 8,
        "dense_high": config.dense_rows // config.dense_banks * (16 - LOW_BITS) * groups / 8,
        "dense_low": config.dense_rows // config.dense_banks * LOW_BITS * groups / 8,
        "dense_flag": config.dense_rows // config.dense_banks * groups / 8,
        "mask": config.psum_rows * config.lanes / 8,
        "psum": config.psum_rows * psum_layout(config.acc_bits).size / 8,
        "vmem": config.vmem_rows / config.vmem_banks * 32 * config.beat / 8,
    }


def clock_of(costs: Costs, config: ChipConfig) -> tuple[float, float]:
    """Joules a cycle of the running clock of a core, and of everything outside the cores."""
    return _of_core(costs, config, "clock"), costs.uncore_flip_flops * costs.flip_flop


def _of_core(costs: Costs, config: ChipConfig, event: str) -> float:
    return costs.core[event]["core"] + config.lanes * costs.core[event]["lane"]


def step_energy(
    costs: Costs, config: ChipConfig, events: Mapping[str, float], *, gates: bool = True
) -> dict[str, float]:
    """Joules of a step by component.

    Parameters
    ----------
    events : mapping
        Of a variant, from `measure_step`.
    gates : bool
        Whether clock gates stop the clocks of idle cores, as they do. Without them these run on.
    """
    count = {**dict.fromkeys(("mac8", "issue8", "gated16", "gated8"), 0.0), **events}
    core = costs.core
    lanes = count["issue16"] and count["mac16"] / count["issue16"]  # working lanes of an issue, on average
    lanes = lanes or (count["mac8"] / count["issue8"] if count["issue8"] else 0.0)
    clock_core, clock_other = clock_of(costs, config)
    idle = config.cores * count["cycles"] - count["core_cycles"]
    awake = min(idle, count.get("core_wakes", 0)) if gates else idle
    to_node = NODE_45.scale_to(costs.node)
    found = {
        "products": (count["mac16"] - count["gated16"]) * core["fp16"]["lane"]
        + (count["mac8"] - count["gated8"]) / 2 * core["pair"]["lane"]
        + count["gated16"] * core["fp16_masked"]["lane"]
        + count["gated8"] / 2 * core["pair_masked"]["lane"]
        + count["visits"] * lanes * core["visit"]["lane"],
        "control": count["issue16"] * core["fp16"]["core"]
        + count["issue8"] / 2 * core["pair"]["core"]
        + count["visits"] * core["visit"]["core"]
        + (count.get("placed_sparse", 0) + count.get("placed_dense", 0)) * core["fill"]["core"],
        "clock_busy": count["core_cycles"] * clock_core,
        "clock_idle": awake * clock_core + (idle - awake) * _of_core(costs, config, "idle"),
        "clock_other": count["cycles"] * clock_other,
        "sram": sum(
            (count.get(f"{name}_read_bits", 0) + count.get(f"{name}_write_bits", 0)) * sram_bit(size, costs.node)
            for name, size in macro_bytes(config).items()
        ),
        "coding": sum(
            count.get(f"{way}_{kind}", 0) * costs.coding[f"{way}_{kind}"]
            for way in ("encoded", "decoded")
            for kind in ("zero", "fp8", "fp16")
        ),
        "vector": to_node
        * (sum(count.get(name, 0) * energy for name, energy in FP32.items()) + count.get("drained", 0) * FP32["add32"])
        + count.get("sum", 0) * core["fp16"]["lane"],
        "memory": count["memory_bits"] * DRAM_BIT,
    }
    return {name: float(found[name]) for name in COMPONENTS}
