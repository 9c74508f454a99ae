"""What FGMP costs in gates: area of its blocks in a cell library, beside that of the PEs.

python benchmarks/area.py --liberty sky130_fd_sc_hd__tt_025C_1v80.lib [--config paper]

Yosys with its default mapping (`synth -flatten`, `dfflibmap`, `abc`), registers included, SRAM macros and wires not.
A gate equivalent (GE) is the library's smallest two-input NAND.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from lnpu.config import ChipConfig, get_config
from lnpu.fgmp.controller import FgmpController
from lnpu.fgmp.decoder import Decoder
from lnpu.fgmp.encoder import Encoder
from lnpu.hdl import Block, emit_verilog
from lnpu.mem.aligner import Aligner
from lnpu.pe.pe import Pe

_YOSYS = """
import sys
from pyosys import libyosys as yosys
design = yosys.Design()
for command in sys.argv[1:]:
    yosys.run_pass(command, design)
"""

SRAM = Path(__file__).parent.parent / "rtl" / "sram"


def blocks_of(config: ChipConfig) -> dict[str, tuple[Block, int]]:
    """The blocks, and how many a chip has."""
    return {
        "encoder": (Encoder(config=config), 1),
        "decoder": (Decoder(config=config), 2),
        "aligner of LOAD": (Aligner(config=config), 2),
        "controller": (FgmpController(config=config), 1),
        "PE": (Pe(acc_bits=config.acc_bits), config.cores * config.lanes),
    }


def nand_area(liberty: str) -> float:
    """Area of the smallest two-input NAND of a library."""
    areas = [
        float(area)
        for name, area in re.findall(r"cell\s*\(\s*\"?(\w+)\"?\s*\)\s*\{.*?\barea\s*:\s*([\d.]+)", liberty, re.DOTALL)
        if re.search(r"nand2(?!b)", name, re.IGNORECASE)
    ]
    if not areas:
        raise SystemExit("the library has no cell with nand2 in its name")
    return min(areas)


def area(block: Block, liberty: Path) -> float:
    """Cell area of a block in the units of the library."""
    with tempfile.TemporaryDirectory() as folder:
        files = emit_verilog(block, Path(folder))
        report = Path(folder) / "stat.json"
        commands = [
            *(f"read_verilog {path}" for path in files),
            *(f"read_verilog -lib {path}" for path in sorted(SRAM.glob("*.v"))),
            f"synth -flatten -top {block.module_name}",
            f"dfflibmap -liberty {liberty}",
            f"abc -liberty {liberty}",
            "opt_clean",
            f"tee -q -o {report} stat -json -liberty {liberty}",
        ]
        # In a process of its own, whose log is dropped.
        subprocess.run([sys.executable, "-c", _YOSYS, *commands], check=True, stdout=subprocess.DEVNULL)
        text = report.read_text()
        return float(json.loads(text[text.index("{") :])["design"]["area"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Area of the FGMP blocks")
    parser.add_argument("--liberty", type=Path, required=True, help="cell library (.lib or .lib.gz)")
    parser.add_argument("--config", default="paper")
    arguments = parser.parse_args()
    raw = arguments.liberty.read_bytes()
    text = (gzip.decompress(raw) if arguments.liberty.suffix == ".gz" else raw).decode()
    with tempfile.TemporaryDirectory() as folder:
        liberty = Path(folder) / "cells.lib"
        liberty.write_text(text)
        unit = nand_area(text)
        total = sum_fgmp = 0.0
        print(f"{'block':<18}{'area':>12}{'GE':>10}{'number':>8}")
        for name, (block, count) in blocks_of(get_config(arguments.config)).items():
            size = area(block, liberty)
            print(f"{name:<18}{size:12.0f}{size / unit:10.0f}{count:8}", flush=True)
            total += count * size
            sum_fgmp += count * size if name != "PE" else 0.0
        print(f"encoder, decoder, aligner and controller: {sum_fgmp / total:.1%} of their sum with the PEs")


if __name__ == "__main__":
    main()
