"""Area and critical paths of a chip, block by block."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lnpu.chip import Chip
from lnpu.config import ChipConfig
from lnpu.pe.pe import Pe
from lnpu.results import write_json
from lnpu.synth.liberty import Liberty
from lnpu.synth.netlist import PLAIN, Netlist, synthesise, synthesise_blocks
from lnpu.synth.peers import PEERS, PROTOTYPE, REDMULE
from lnpu.synth.timing import critical_paths, period

__all__ = ["SKIPPING", "instances_of", "measure"]

SKIPPING = ("lnpu_zero_skip", "lnpu_encoder", "lnpu_decoder", "lnpu_fgmp_controller")
"""What zero skipping and mixed precision add to a chip, by the beginning of the module's name."""


def measure(
    config: ChipConfig,
    liberty: Liberty,
    folder: Path,
    *,
    only: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Synthesise a chip and find its critical paths; all that is finished is kept in `folder`.

    Parameters
    ----------
    config : ChipConfig
        The chip.
    liberty : Liberty
        The cell library.
    folder : Path
        Where netlists go.
    only : str or None
        Regular expression: critical paths of just the blocks in whose names it is found.
    progress : function
        Told what is done next.

    Returns
    -------
    dict
        `config`, `library`, `nand2_area` (um2); `blocks`: for each module, top first, its number of `instances`,
        `own_area` (without the blocks inside it), `area` (with them), `sequential` (of `own_area`; all um2), `cells`,
        `sram_bits` and `sram_instances` (own), `children`, `paths` and `period` (ns; see `critical_paths`);
        `totals`; `pe`: the PE by the flow that peers were measured with.
    """
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise ValueError(f"only must be a regular expression, not {only!r}: {error}") from None
    netlists = synthesise_blocks(
        Chip(config=config),
        liberty,
        folder,
        progress=lambda name, number, of: progress(f"synthesis {number + 1}/{of}: {name}"),
    )
    if not any(pattern.search(name) for name in netlists):
        raise ValueError(f"only must be found in the name of a block: {', '.join(netlists)}; not {only!r}")
    counts = instances_of(netlists)
    blocks = {}
    for name, netlist in netlists.items():
        paths: dict[str, Any] = {}
        if pattern.search(name):
            progress(f"timing: {name}")
            paths = _paths(name, netlists, liberty, folder / "timing" / f"{config.name}-{liberty.name}")
        blocks[name] = {
            "instances": counts[name],
            "own_area": netlist.area,
            "area": _area(name, netlists),
            "sequential": netlist.sequential,
            "cells": sum(netlist.cells.values()),
            "sram_bits": netlist.macro_bits,
            "sram_instances": netlist.macro_instances,
            "children": netlist.children,
            **paths,
        }
    progress("the PE by the flow of its peers")
    return {
        "config": config.name,
        "library": liberty.name,
        "nand2_area": liberty.nand2_area,
        "blocks": blocks,
        "totals": _totals(config, netlists, counts),
        "pe": _pe(config, liberty, folder),
    }


def instances_of(netlists: dict[str, Netlist]) -> Counter[str]:
    """How often each block is in the design, whose top is the first of the netlists."""
    counts: Counter[str] = Counter()

    def count(name: str, number: int) -> None:
        counts[name] += number
        for child, times in netlists[name].children.items():
            count(child, number * times)

    count(next(iter(netlists)), 1)
    return counts


def _area(name: str, netlists: dict[str, Netlist]) -> float:
    inner = netlists[name].children.items()
    return netlists[name].area + sum(times * _area(child, netlists) for child, times in inner)


def _totals(config: ChipConfig, netlists: dict[str, Netlist], counts: Counter[str]) -> dict[str, float]:
    cores = config.cores * _area("lnpu_core", netlists)
    skipping = sum(counts[name] * _area(name, netlists) for name in netlists if name.startswith(SKIPPING))
    return {
        "area": _area(next(iter(netlists)), netlists),
        "cores_area": cores,
        "skipping_area": skipping,
        "skipping_of_cores": skipping / cores,
        "sram_bits": sum(counts[name] * netlist.macro_bits for name, netlist in netlists.items()),
        "sram_instances": sum(counts[name] * netlist.macro_instances for name, netlist in netlists.items()),
    }


def _paths(name: str, netlists: dict[str, Netlist], liberty: Liberty, folder: Path) -> dict[str, Any]:
    """Critical paths of a block, kept by the content of the netlists in it."""
    inside = [name]
    for module in inside:
        inside += [child for child in netlists[module].children if child not in inside]
    key = hashlib.sha256()
    for module in sorted(inside):
        key.update(netlists[module].path.read_bytes())
    record = folder / f"{name}.json"
    kept = json.loads(record.read_text()) if record.exists() else {}
    if kept.get("key") != key.hexdigest():
        found = critical_paths(name, netlists, liberty, folder / name)
        kept = {
            "key": key.hexdigest(),
            "paths": {group: asdict(path) for group, path in found.items()},
            "period": period(found),
        }
        write_json(record, kept)
    return {"paths": kept["paths"], "period": kept["period"]}


def _pe(config: ChipConfig, liberty: Liberty, folder: Path) -> dict[str, Any]:
    """The PE by the flow of its peers, and ratios to them; no peers in libraries they were not measured in."""
    pe = synthesise(Pe(acc_bits=config.acc_bits), liberty, folder / "peers", flow=PLAIN)
    result: dict[str, Any] = {"area": pe.area, "ge": pe.area / liberty.nand2_area, "abc_delay": pe.abc_delay}
    peers = {peer.name: peer.area(liberty.name) for peer in PEERS}
    result["peers"] = {name: {"area": area, "ratio": pe.area / area} for name, area in peers.items() if area}
    if redmule := REDMULE.area(liberty.name):
        result["fp8_product_of_redmule"] = pe.area / 2 / redmule
        result["of_prototype"] = pe.area / PROTOTYPE.area(liberty.name)  # type: ignore[operator]
    return result
