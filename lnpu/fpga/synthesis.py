"""Synthesis for ECP5 by Yosys, and what each block takes."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lnpu.hdl import Block, emit_verilog
from lnpu.synth.yosys import run_yosys
from lnpu.toolchain import CLOCK_GATE, RTL

__all__ = ["CELLS", "Hierarchy", "Netlist", "read_netlist", "synthesise"]

CELLS = ("LUT4", "CCU2C", "TRELLIS_DPR16X4", "TRELLIS_FF", "DP16KD", "MULT18X18D")
"""Cells of ECP5 that logic is mapped to."""

_DELAY = 6_000
"""Delay in ps that ABC maps for, with 300 ps for a wire: 11 levels of LUTs. Within that, or what the longest path
needs, it looks for few LUTs."""

_SMALL = 8
"""Widest adder that is made of LUTs alone. A carry chain takes LUTs at its ends, and no logic is merged into it."""

_INSTANCES = "instances.txt"
"""List of the instances, TOP/PATH in each line: Yosys drops them from the netlist."""


class Hierarchy:
    """The instances of a design, to find out which of them a cell of the flat netlist belongs to.

    Parameters
    ----------
    paths : iterable of str
        Paths of the instances below the top module, with dots.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)

    def owner(self, cell: str) -> str:
        """Path of the innermost instance that the name of a cell is from; "" for the top module.

        Yosys names a cell after a net that it is connected to. `a.b` is net b of instance a, and so is `a__b`: a port
        of it.
        """
        parts = cell.replace("__", ".").split(".")
        for end in range(len(parts), 0, -1):
            path = ".".join(parts[:end])
            if path in self._paths:
                return path
        return ""


@dataclass(frozen=True, kw_only=True)
class Netlist:
    """A synthesised design.

    Attributes
    ----------
    path : Path
        Netlist in Yosys' JSON.
    instances : tuple of str
        Paths of the instances that were flattened.
    cells : dict
        Number of cells of each type in `CELLS`, by path of the instance ("" is the top module).
    """

    path: Path
    instances: tuple[str, ...]
    cells: Mapping[str, Mapping[str, int]]

    def total(self, path: str = "") -> Counter[str]:
        """Cells in an instance and all below it."""
        found: Counter[str] = Counter()
        for owner, cells in self.cells.items():
            if not path or owner == path or owner.startswith(f"{path}."):
                found.update(cells)
        return found


def synthesise(block: Block, directory: Path) -> Netlist:
    """Write the Verilog of a block and map it to ECP5.

    Memories are told that what they return for a word which is being written does not matter; that is so for every
    memory of the chip, see `rtl/sram/lnpu_sram_1r1w.v`.

    Parameters
    ----------
    block : Block
        Top module.
    directory : Path
        Where Verilog (`rtl/`), netlist (`netlist.json`), list of instances and log (`yosys.log`) go.

    Raises
    ------
    SynthesisError
        If Yosys fails.
    ToolError
        If pyosys is not installed.
    """
    sources = [*emit_verilog(block, directory / "rtl"), *sorted((RTL / "sram").glob("*.v")), CLOCK_GATE]
    path = directory / "netlist.json"
    command = f"synth_ecp5 -top {block.module_name} -no-rw-check -nowidelut -cmp2softlogic"
    commands = [
        *(f'read_verilog -defer -D LNPU_NO_CLOCK_GATING "{source.resolve()}"' for source in sources),
        f"hierarchy -check -top {block.module_name}",
        f"scratchpad -set abc9.D {_DELAY}",
        # Muxes of LUTs (PFUMX) would save time, but cost LUTs.
        f"{command} -run :map_gates",
        f"techmap t:$alu r:Y_WIDTH<={_SMALL} %i",
        f"{command} -run map_gates:map_luts",
        f"select -write {_INSTANCES} t:$scopeinfo",
        "opt_clean -purge",  # aliases of nets that have public names: on some, ABC's results fail an assertion of Yosys
        f"{command} -run map_luts:",
        f"write_json {path.name}",
    ]
    run_yosys(commands, directory, log_file=directory / "yosys.log")
    return read_netlist(path, block.module_name)


def read_netlist(path: Path, top: str) -> Netlist:
    """The cells in a flat netlist of `synthesise`, by instance."""
    cells = json.loads(path.read_text())["modules"][top]["cells"]
    listed = (path.parent / _INSTANCES).read_text().splitlines()
    instances = tuple(sorted(line.removeprefix(f"{top}/") for line in listed))
    hierarchy = Hierarchy(instances)
    found: dict[str, Counter[str]] = {}
    for name, cell in cells.items():
        if cell["type"] in CELLS:
            found.setdefault(hierarchy.owner(name), Counter())[cell["type"]] += 1
    return Netlist(path=path, instances=instances, cells={owner: dict(count) for owner, count in found.items()})
