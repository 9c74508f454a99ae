"""Writes the files that go beside the Verilog."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lnpu.config import ChipConfig
from lnpu.export.constraints import sdc
from lnpu.export.core_file import core_file
from lnpu.export.headers import commands_header, config_header
from lnpu.export.srams import sram_table, srams
from lnpu.export.systemrdl import system_rdl
from lnpu.hdl import Block
from lnpu.toolchain import CLOCK_GATE, RTL, ToolError

__all__ = ["write_collateral", "write_register_views"]

WAIVERS = RTL / "lint_waivers.vlt"


def write_collateral(config: ChipConfig, directory: Path, verilog: Sequence[Path], top: Block) -> list[Path]:
    """Write `lnpu.rdl`, C headers, `lnpu.sdc`, `lnpu.core` and `SRAMS.md`; the same inputs give the same bytes.

    FuseSoC wants all files of a core below it, so copies of the models and of the lint waivers go with them.

    Parameters
    ----------
    directory : Path
        Folder of the chip's Verilog.
    verilog : sequence of Path
        The chip's Verilog in that folder, and the models of SRAM and clock gate.
    top : Block
        The chip.
    """
    macros = [path for path in verilog if path.stem == "lnpu_sram_1r1w"]
    gates = [path for path in verilog if path.stem == CLOCK_GATE.stem]
    own = [path for path in verilog if path not in (*macros, *gates)]

    sram = {f"sram/{path.name}": path for path in macros}
    clock = {f"clock/{path.name}": path for path in gates}
    copies = sram | clock | {WAIVERS.name: WAIVERS}
    texts = {
        "lnpu.rdl": system_rdl(config),
        "lnpu_commands.h": commands_header(),
        "lnpu_config.h": config_header(config),
        "lnpu.sdc": sdc(config, top),
        "lnpu.core": core_file(config, [path.name for path in own], [*sram], [*clock]),
        "SRAMS.md": sram_table(srams(own), config.name),
        **{name: path.read_text() for name, path in copies.items()},
    }
    for name, text in texts.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return [directory / name for name in texts]


def write_register_views(directory: Path) -> list[Path]:
    """Let PeakRDL make `lnpu_registers.h` and `registers/index.html` from `lnpu.rdl` in this folder.

    Raises
    ------
    ToolError
        If PeakRDL is not installed, or fails.
    """
    if importlib.util.find_spec("peakrdl") is None:
        raise ToolError("PeakRDL is missing: run `pip install 'lnpu[integration]'` or `make setup-integration`")
    header, html = directory / "lnpu_registers.h", directory / "registers"
    for exporter, output, *options in (("c-header", header), ("html", html, "--title", "LNPU")):
        command = [sys.executable, "-m", "peakrdl", exporter, str(directory / "lnpu.rdl"), "-o", str(output), *options]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ToolError(f"PeakRDL {exporter} failed:\n{(result.stdout + result.stderr).strip()}")
    return [header, html / "index.html"]
