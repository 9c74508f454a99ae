"""Netlists of a cell library's gates, from the Verilog of blocks."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lnpu.hdl import Block, emit_verilog
from lnpu.results import lock, write_json
from lnpu.synth.fanout import limit_fanout
from lnpu.synth.liberty import Liberty
from lnpu.synth.macros import Macro, name_macros
from lnpu.synth.yosys import run_yosys
from lnpu.toolchain import CLOCK_GATE

__all__ = ["ABC_SCRIPT", "BUFFERED", "PLAIN", "Flow", "Netlist", "cell_models", "synthesise", "synthesise_blocks"]

ABC_SCRIPT = (
    "strash", "ifraig", "scorr", "dc2", "strash", "&get -n", "&dch -f", "&nf", "&put", "buffer", "topo", "stime -p",
)  # fmt: skip
"""ABC's optimisation and mapping for area; its last command prints a delay of unsized gates without wires."""


@dataclass(frozen=True)
class Flow:
    """How gates are made.

    Attributes
    ----------
    script : tuple of str
        Commands of ABC.
    max_fanout : int
        Pins that a net may drive before it gets a tree of buffers; 0: any number.
    special : bool
        Whether cells for power domains and delay may be used as if they were logic (see `Liberty.dont_use`).
    """

    script: tuple[str, ...] = ABC_SCRIPT
    max_fanout: int = 0
    special: bool = False


BUFFERED = Flow(max_fanout=16)
"""The default: for area, with buffers, so that delays mean something."""

PLAIN = Flow(special=True)
"""Nothing but ABC's script: what published areas of others were measured with."""

_VERSION = 8
"""Counts changes of this file that change netlists: kept ones of another version are not used."""

_PORT = re.compile(r"^\s*(?:input|output)\b.*$", re.MULTILINE)
_MODULE = re.compile(r"^module (\w+)", re.MULTILINE)
_DELAY = re.compile(r"Delay =\s*([\d.]+) ps")


@dataclass(frozen=True)
class Netlist:
    """A block in gates.

    Attributes
    ----------
    top : str
        Its module.
    path : Path
        The Verilog netlist: one module; instances of cells, of SRAM macros, and (see `synthesise_blocks`) of blocks.
    models : Path
        Verilog of the SRAM macros named in it, to be simulated with rtl/sram/lnpu_sram_1r1w.v.
    area : float
        Sum of the areas of the cells, um2; no macros, no blocks.
    sequential : float
        Of that, flip-flops and latches.
    cells : dict of str to int
        Number of each cell of the library.
    macros : tuple of (Macro, int)
        SRAM macros and the number of each.
    children : dict of str to int
        Blocks that are modules of their own, and the number of each: none in a flat netlist.
    instances : dict of str to str
        Module of every instance of a macro or a block.
    abc_delay : float
        Longest combinational path as ABC estimates it (unsized gates, no wires), in ps; 0 without logic.
    """

    top: str
    path: Path
    models: Path
    area: float
    sequential: float
    cells: dict[str, int]
    macros: tuple[tuple[Macro, int], ...]
    children: dict[str, int]
    instances: dict[str, str]
    abc_delay: float

    @property
    def macro_bits(self) -> int:
        """Bits of SRAM."""
        return sum(macro.bits * count for macro, count in self.macros)

    @property
    def macro_instances(self) -> int:
        """Number of SRAM macros."""
        return sum(count for _, count in self.macros)


def synthesise(block: Block, liberty: Liberty, folder: Path, *, flow: Flow = BUFFERED) -> Netlist:
    """Synthesise a block with all that is in it to one flat module of gates.

    The result is kept in `folder`, and used again where the Verilog, the library and the flow are the same.

    Parameters
    ----------
    block : Block
        The block, e.g. `lnpu.pe.pe.Pe(acc_bits=97)`.
    liberty : Liberty
        The cell library, from `lnpu.synth.liberty.read_liberty`.
    folder : Path
        Where files go.
    flow : Flow
        How.

    Raises
    ------
    SynthesisError
        If Yosys refuses the design.
    ToolError
        If pyosys is not installed.
    """
    with lock(folder / "synthesis"):
        texts = _emit(block, folder)
        return _map(block.module_name, list(texts.values()), [], liberty, folder / "flat", flow)


def synthesise_blocks(
    top: Block,
    liberty: Liberty,
    folder: Path,
    *,
    flow: Flow = BUFFERED,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Netlist]:
    """Synthesise every distinct block of a design once, each to a module in which other blocks are instances.

    Finished blocks are kept in `folder`, so a run that was stopped goes on, and what has not changed is not done again.

    Parameters
    ----------
    top : Block
        The design, e.g. `lnpu.chip.Chip(config=config)`.
    progress : function or None
        Called before each block: its module, how many are finished, how many there are.

    Returns
    -------
    dict of str to Netlist
        By module, top first. How often a block is used: the product of `children` on the way from the top.
    """
    result = {}
    with lock(folder / "synthesis"):
        texts = _emit(top, folder)
        for number, (name, text) in enumerate(texts.items()):
            if progress is not None:
                progress(name, number, len(texts))
            placed = [
                child for child in texts if child != name and re.search(rf"^\s+{child} \\?\S+ \(", text, re.MULTILINE)
            ]
            result[name] = _map(name, [text], [_stub(texts[child], child) for child in placed], liberty, folder, flow)
    return result


def cell_models(liberty: Liberty, folder: Path) -> Path:
    """Verilog of a library's cells, made from their functions in the Liberty file: no timing, no primitives.

    What a netlist needs to be simulated (with Verilator too) or to be compared with the RTL. Made once in `folder`.
    """
    path = folder / f"{liberty.name}-{liberty.digest[:8]}_cells.v"
    with lock(path):
        if not path.exists():
            plain = liberty.plain(folder)
            part = f"{path.name}.part"
            run_yosys(
                [
                    "read_liberty -ignore_miss_func -ignore_miss_dir -ignore_miss_data_latch -ignore_buses "
                    f"{plain.name}",
                    "delete A:blackbox",
                    "proc",
                    "opt",
                    f"write_verilog -noattr {part}",
                ],
                folder,
            )
            (folder / part).replace(path)
    return path


def _emit(block: Block, folder: Path) -> dict[str, str]:
    """Verilog of every block by module, `block` first, and of the clock gate if there is one."""
    texts = {path.stem: path.read_text() for path in emit_verilog(block, folder / "rtl" / block.module_name)}
    if any(f"  {CLOCK_GATE.stem} " in text for text in texts.values()):
        texts[CLOCK_GATE.stem] = CLOCK_GATE.read_text()
    return texts


def _latch_map(liberty: Liberty) -> str:
    """Verilog for Yosys' techmap: the clock gate's latch as a cell of the library."""
    cell, latch = liberty.latch
    enable = "E" if latch.low else "open"
    return f"""module \\$_DLATCH_N_ (input E, D, output Q);
wire open;
\\$_NOT_ invert (.A(E), .Y(open));
{cell} _TECHMAP_REPLACE_ (.{latch.enable}({enable}), .{latch.data}(D), .{latch.output}(Q));
endmodule
"""


def _stub(text: str, name: str) -> str:
    """A module without its content."""
    match = re.search(rf"^module {name} ?\(.*?\);\n", text, re.MULTILINE | re.DOTALL)
    assert match is not None
    body = text[match.end() : text.index("endmodule", match.end())]
    return f"(* blackbox *)\n{match[0]}" + "".join(f"{line}\n" for line in _PORT.findall(body)) + "endmodule\n"


def _map(name: str, texts: Iterable[str], stubs: Iterable[str], liberty: Liberty, folder: Path, flow: Flow) -> Netlist:
    named = [name_macros(text) for text in texts]
    source = "".join(text for text, _ in named)
    macros = sorted(set().union(*(found for _, found in named)))
    boxes = "".join(macro.black_box() for macro in macros) + "".join(stubs)
    key = hashlib.sha256("\0".join([str(_VERSION), source, boxes, liberty.digest, repr(flow)]).encode()).hexdigest()
    # Blocks that are the same in several chips are shared, and those of the same name that differ do not meet.
    folder = folder / f"{liberty.name}-{liberty.digest[:8]}"
    here = folder / f"{name}-{key[:12]}"
    here.mkdir(parents=True, exist_ok=True)
    record = here / "netlist.json"
    if not record.exists():
        (here / "source.v").write_text(source)
        (here / "boxes.v").write_text(boxes)
        (here / "macros.v").write_text("".join(macro.model() for macro in macros))
        (here / "abc.script").write_text("".join(f"{line}\n" for line in flow.script))
        latch = ["techmap -map latch.v"] if CLOCK_GATE.stem in source else []
        if latch:
            (here / "latch.v").write_text(_latch_map(liberty))
        plain = f"../{liberty.plain(folder).name}"
        avoid = "" if flow.special else "".join(f" -dont_use {cell}" for cell in liberty.dont_use)
        log = run_yosys(
            [
                "read_verilog source.v",
                "read_verilog -lib boxes.v",
                f"synth -flatten -top {name}",
                f"dfflibmap -liberty {plain}{avoid}",
                *latch,
                f"abc -liberty {plain} -script abc.script{avoid}",
                "opt_clean -purge",
                "setattr -unset init w:*",
                f"read_liberty -lib {plain}",
                "write_json gates.json",
            ],
            here,
        )
        module = json.loads((here / "gates.json").read_text())["modules"][name]
        if flow.max_fanout:
            limit_fanout(module, liberty, flow.max_fanout)
        # Plain names for what is looked up by its path in the hierarchy.
        module["cells"] = {
            cell if content["type"] in liberty.areas else re.sub(r"\W", "_", cell): content
            for cell, content in module["cells"].items()
        }
        write_json(here / "gates.json", {"modules": {name: module}})
        run_yosys(
            [
                "read_json gates.json",
                "write_verilog -noattr -simple-lhs netlist.v",
            ],
            here,
        )
        (here / "gates.json").unlink()
        (here / "yosys.log").write_text(log)
        write_json(record, _figures(module, log, liberty, macros))
    content = json.loads(record.read_text())
    return Netlist(
        top=name,
        path=here / "netlist.v",
        models=here / "macros.v",
        area=content["area"],
        sequential=content["sequential"],
        cells=content["cells"],
        macros=tuple((Macro(**macro), count) for macro, count in content["macros"]),
        children=content["children"],
        instances=content["instances"],
        abc_delay=content["abc_delay"],
    )


def _figures(module: dict[str, Any], log: str, liberty: Liberty, macros: Sequence[Macro]) -> dict[str, object]:
    types = {cell: content["type"] for cell, content in module["cells"].items()}
    numbers = Counter(types.values())
    sizes = {macro.name: macro for macro in macros}
    cells = {cell: count for cell, count in sorted(numbers.items()) if cell in liberty.areas}
    instances = {cell: kind for cell, kind in types.items() if kind not in cells}
    return {
        "area": sum(liberty.areas[cell] * count for cell, count in cells.items()),
        "sequential": sum(liberty.areas[cell] * n for cell, n in cells.items() if cell in liberty.sequential),
        "cells": cells,
        "macros": [(asdict(sizes[cell]), count) for cell, count in numbers.items() if cell in sizes],
        "children": {cell: n for cell, n in numbers.items() if cell not in cells and cell not in sizes},
        "instances": instances,
        "abc_delay": max(map(float, _DELAY.findall(log)), default=0.0),
    }
