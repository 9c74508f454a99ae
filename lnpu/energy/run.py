"""The whole: events in gates, a training step in events, joules."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lnpu.config import ChipConfig
from lnpu.energy.account import Costs, step_energy
from lnpu.energy.efficiency import peak_efficiency, training_efficiency
from lnpu.energy.memory import NODE_65, Node, node_of
from lnpu.energy.registers import uncore_flip_flops
from lnpu.energy.step import VARIANTS, StepSettings, measure_step
from lnpu.energy.tiles import make_tiles
from lnpu.energy.workloads import coding_benches, core_bench, measure_coding, measure_core, measure_pe, pe_bench
from lnpu.results import write_json
from lnpu.sim.build import add_sources
from lnpu.synth.liberty import Liberty

__all__ = ["run"]

Progress = Callable[[str], None]

REQUIRED = 2.08
"""Energy of dense FP16 over that of FGMP with zero skipping: what the original reached."""


def _kept(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """A result that is made once for a key."""
    if path.exists():
        content = json.loads(path.read_text())
        if content["key"] == key:
            return content["value"]
    value = make()
    write_json(path, {"key": key, "value": value})
    return value


def _sources(*modules: str) -> str:
    digest = hashlib.sha256()
    add_sources(digest, *modules)
    return digest.hexdigest()[:12]


def _events(liberty: Liberty, folder: Path, progress: Progress) -> dict[str, Any]:
    progress("operands: training steps of the golden model")
    tiles = make_tiles()
    progress("PE in gates")
    pe = pe_bench(liberty, folder)
    found: dict[str, Any] = {
        "pe": measure_pe(pe, tiles),
        "shares": {name: tile.shares for name, tile in tiles.sparse.items()},
    }
    flip_flops = pe.power.clocked
    found["flip_flop"] = found["pe"]["idle"] / flip_flops
    found["pe_flip_flops"] = flip_flops
    found["pe_leakage"] = sum(pe.power.leakage.values())
    progress("a core of 4 lanes in gates")
    found["core"] = measure_core(core_bench(liberty, folder), tiles, progress)
    progress("encoder and decoder in gates")
    found["coding"] = measure_coding(*coding_benches(liberty, folder), tiles)
    return found


def run(
    liberty: Liberty,
    config: ChipConfig,
    settings: StepSettings,
    folder: Path,
    *,
    size: float | None = None,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Measure events, count those of a step, and put both together.

    Parameters
    ----------
    size : float or None
        Feature size of the library's technology in nm, where its name does not tell.

    Returns
    -------
    dict
        What the report shows; energies in joules, efficiencies in TFLOPS/W. No paths.
    """
    node = node_of(liberty, size)
    key = f"{liberty.digest} {_sources('lnpu.energy.workloads')}"
    events = _kept(
        folder / f"events-{liberty.name}-{liberty.digest[:8]}.json", key, lambda: _events(liberty, folder, progress)
    )
    progress(f"flip-flops of {config.name} outside the cores")
    outside = _kept(
        folder / f"registers-{config.name}.json",
        f"{config} {_sources('lnpu.energy.registers')}",
        lambda: uncore_flip_flops(config, folder),
    )
    progress(f"a training step of {settings.batch} images on {config.name}")
    step = _kept(
        folder / f"step-{config.name}.json",
        f"{config} {settings} {_sources('lnpu.energy.step')}",
        lambda: measure_step(config, settings),
    )
    costs = Costs(events["pe"], events["core"], events["coding"], events["flip_flop"], outside, node)
    energies = {name: step_energy(costs, config, step["variants"][name]) for name in VARIANTS}
    ungated = {name: step_energy(costs, config, step["variants"][name], gates=False) for name in VARIANTS}
    dense = step["variants"]["dense"]
    return {
        "library": liberty.name,
        "voltage": liberty.voltage,
        "node": asdict(node),
        "config": asdict(config),
        "settings": {name: value for name, value in asdict(settings).items() if name != "data"}
        | {"data": "CIFAR-10 or other images" if settings.data else "scikit-learn's digits"},
        "events": events,
        "uncore_flip_flops": outside,
        "step": step,
        "energies": energies,
        "ungated": ungated,
        "ratios": {"as_built": ratios(energies, node), "ungated": ratios(ungated, node)},
        "required": REQUIRED,
        "peak": peak_efficiency(costs, config),
        "training": training_efficiency(2 * dense["mac16"], energies["fgmp"], node),
    }


def totals(energies: dict[str, float], node: Node) -> dict[str, float]:
    """Joules: of the chip in the library's technology; of the chip at 65 nm with the external memory."""
    chip = sum(joules for name, joules in energies.items() if name != "memory")
    return {"chip": chip, "system_65": chip * node.scale_to(NODE_65) + energies["memory"]}


def ratios(energies: dict[str, dict[str, float]], node: Node) -> dict[str, dict[str, float]]:
    """Energy of dense FP16 over that of each variant, of the chip and of the system at 65 nm."""
    whole = {name: totals(energies[name], node) for name in VARIANTS}
    return {name: {what: whole["dense"][what] / whole[name][what] for what in whole[name]} for name in VARIANTS}
