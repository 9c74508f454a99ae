"""Writes the files that go beside the Verilog."""

import importlib.util
import os
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
from lnpu.toolchain import RTL, ToolError

__all__ = ["write_collateral", "write_register_views"]


def write_collateral(config: ChipConfig, directory: Path, verilog: Sequence[Path]) -> list[Path]:
    """Write `lnpu.rdl`, C headers, `lnpu.sdc`, `lnpu.core` and `SRAMS.md`; the same inputs give the same bytes.

    Parameters
    ----------
    verilog : sequence of Path
        The chip's Verilog in this folder, and the SRAM model.
    """
    macros = [path for path in verilog if path.stem == "lnpu_sram_1r1w"]
    own = [path for path in verilog if path not in macros]

    def relative(paths: Sequence[Path]) -> list[str]:
        return [os.path.relpath(path, directory) for path in paths]

    texts = {
        "lnpu.rdl": system_rdl(config),
        "lnpu_commands.h": commands_header(),
        "lnpu_config.h": config_header(config),
        "lnpu.sdc": sdc(config),
        "lnpu.core": core_file(
            config, relative(own), relative(macros), os.path.relpath(RTL / "lint_waivers.vlt", directory)
        ),
        "SRAMS.md": sram_table(srams(own), config.name),
    }
    for name, text in texts.items():
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
    for exporter, output in (("c-header", header), ("html", html)):
        command = [sys.executable, "-m", "peakrdl", exporter, str(directory / "lnpu.rdl"), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ToolError(f"PeakRDL {exporter} failed:\n{(result.stdout + result.stderr).strip()}")
    return [header, html / "index.html"]
