"""Flip-flops of a chip outside its cores, counted in the RTL: what its clock drives there."""

import json
import re
from pathlib import Path

from lnpu.chip import Chip
from lnpu.config import ChipConfig
from lnpu.hdl import emit_verilog
from lnpu.synth.macros import name_macros
from lnpu.synth.yosys import run_yosys

__all__ = ["uncore_flip_flops"]

_REGISTER = re.compile(r"\$a?s?dffe?(?:sr)?e?_(\d+)$")


def uncore_flip_flops(config: ChipConfig, folder: Path) -> int:
    """Bits of registers outside the cores, as Yosys finds them in the RTL before any optimisation.

    Raises
    ------
    SynthesisError
        If Yosys refuses the design.
    """
    top = Chip(config=config)
    files = emit_verilog(top, folder / "rtl" / config.name)
    place = folder / f"registers-{config.name}"
    place.mkdir(parents=True, exist_ok=True)
    named = [name_macros(path.read_text()) for path in files]
    sizes = sorted(set().union(*(found for _, found in named)))
    (place / "source.v").write_text("".join(text for text, _ in named))
    (place / "boxes.v").write_text("".join(macro.black_box() for macro in sizes))
    run_yosys(
        [
            "read_verilog -lib boxes.v",
            "read_verilog source.v",
            "proc",
            "opt_clean",
            "tee -q -o stat.json stat -json -width",
        ],
        place,
    )
    text = (place / "stat.json").read_text()
    modules = json.loads(text[text.index("{") :])["modules"]
    cells = {
        name.lstrip("\\"): {
            kind.lstrip("\\"): int(n["count"] if isinstance(n, dict) else n)
            for kind, n in module["num_cells_by_type"].items()
        }
        for name, module in modules.items()
    }

    def bits(name: str) -> int:
        total = 0
        for kind, count in cells.get(name, {}).items():
            match = _REGISTER.match(kind)
            total += count * (int(match[1]) if match else bits(kind) if kind in cells else 0)
        return total

    return bits(top.module_name) - config.cores * bits("lnpu_core")
