"""A netlist as a flat list of cells on numbered nets, and the Verilog in which it is simulated."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lnpu.synth.liberty import Liberty
from lnpu.synth.macros import Macro
from lnpu.synth.netlist import Netlist
from lnpu.synth.yosys import run_yosys
from lnpu.toolchain import RTL

__all__ = ["Cell", "Gates", "read_gates"]

Net = int | str
"""A number, or a constant: "0", "1", "x"."""


@dataclass(frozen=True)
class Cell:
    """An instance: its name (blocks that were modules of their own, with dots between), its type, its pins' nets."""

    name: str
    type: str
    pins: dict[str, list[Net]]


@dataclass
class Gates:
    """A flat netlist.

    Attributes
    ----------
    top : str
    cells : list of Cell
        Of the library.
    macros : list of Cell
        SRAM macros.
    inputs, outputs : dict of str to list
        Nets of the ports; the clock is not among the inputs.
    clock : int or None
    sources : list of Path
        Verilog of cells and macros.
    """

    top: str
    cells: list[Cell]
    macros: list[Cell]
    inputs: dict[str, list[Net]]
    outputs: dict[str, list[Net]]
    clock: Net | None
    sources: list[Path] = field(default_factory=list)

    def verilog(self) -> str:
        """Module `bench`: `stimulus` has the inputs one behind the other, first lowest, `response` the outputs."""
        stimulus = [net for nets in self.inputs.values() for net in nets]
        response = [net for nets in self.outputs.values() for net in nets]
        used = {net for cell in (*self.cells, *self.macros) for nets in cell.pins.values() for net in nets}
        used |= {*stimulus, *response}
        lines = [
            f"module bench (input wire clk, input wire [{max(64, len(stimulus))}:0] stimulus,"
            f" output wire [{max(64, len(response))}:0] response);"
        ]
        lines += [f"wire n{net};" for net in sorted(net for net in used if isinstance(net, int))]
        if self.clock is not None:
            lines.append(f"assign {_wire(self.clock)} = clk;")
        lines += [f"assign {_wire(net)} = stimulus[{i}];" for i, net in enumerate(stimulus)]
        lines += [f"assign response[{i}] = {_wire(net)};" for i, net in enumerate(response)]
        lines.append(f"assign response[{max(64, len(response))}:{len(response)}] = 0;")
        for number, cell in enumerate((*self.cells, *self.macros)):
            pins = ", ".join(
                f".{name}({{{', '.join(_wire(net) for net in reversed(nets))}}})" for name, nets in cell.pins.items()
            )
            lines.append(f"{cell.type} c{number} ({pins});")
        return "\n".join(lines) + "\nendmodule\n"


def _wire(net: Net) -> str:
    return f"n{net}" if isinstance(net, int) else f"1'b{0 if net == 'x' else net}"


def read_gates(netlists: Netlist | Mapping[str, Netlist], liberty: Liberty, models: Path, folder: Path) -> Gates:
    """Flatten a netlist, or the netlists of the blocks of a design (its top first).

    Parameters
    ----------
    netlists : Netlist or mapping
        From `synthesise` or `synthesise_blocks`.
    models : Path
        From `cell_models`.
    folder : Path
        Where files go.

    Raises
    ------
    SynthesisError
        If Yosys cannot read them.
    """
    blocks = [netlists] if isinstance(netlists, Netlist) else list(netlists.values())
    top = blocks[0].top
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Macro] = {macro.name: macro for block in blocks for macro, _ in block.macros}
    (folder / "boxes.v").write_text("".join(macro.black_box() for macro in sizes.values()))
    (folder / "macros.v").write_text("".join(macro.model() for macro in sizes.values()))
    run_yosys(
        [
            f"read_liberty -lib -ignore_miss_func {liberty.plain(folder).resolve()}",
            "read_verilog -lib boxes.v",
            *(f"read_verilog {block.path.resolve()}" for block in blocks),
            f"hierarchy -top {top}",
            "flatten -noscopeinfo",
            "opt_clean",
            f"select {top}",
            "write_json -selected gates.json",
        ],
        folder,
    )
    module = json.loads((folder / "gates.json").read_text())["modules"][top]
    cells: list[Cell] = []
    macros: list[Cell] = []
    for name, cell in module["cells"].items():
        one = Cell(name, cell["type"], cell["connections"])
        (macros if cell["type"] in sizes else cells).append(one)
    inputs: dict[str, list[Net]] = {}
    outputs: dict[str, list[Net]] = {}
    clock: Net | None = None
    for name, port in module["ports"].items():
        if name == "clk":
            clock = port["bits"][0]
        else:
            (inputs if port["direction"] == "input" else outputs)[name] = port["bits"]
    sources = [models.resolve()]
    if sizes:
        sources += [(folder / "macros.v").resolve(), RTL / "sram" / "lnpu_sram_1r1w.v"]
    return Gates(top, cells, macros, inputs, outputs, clock, sources)
