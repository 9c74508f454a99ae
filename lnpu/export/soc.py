"""Builds and runs the example system (examples/soc): Verilog, Verilator, the C program; checks the memory after it."""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnpu.config import ChipConfig
from lnpu.export.step import ExportedStep
from lnpu.export.write import write_register_views
from lnpu.results import lock
from lnpu.toolchain import RTL, ToolError, verilator_environment
from lnpu.verilog import write_verilog

__all__ = ["EXAMPLE", "SocResult", "run_soc"]

EXAMPLE = RTL.parent / "examples" / "soc"

_FLAGS = (
    "--cc", "--build", "-j", "2", "-O3", "--no-timing", "--no-assert", "--x-assign", "fast", "--x-initial", "unique",
    "--output-split", "10000", "--output-split-cfuncs", "5000", "-Wno-fatal", "-Wno-lint", "-Wno-style",
    "--top-module", "lnpu_soc",
)  # fmt: skip
_MAKE = "OPT_FAST=-O2 OPT_GLOBAL=-O1 OPT_SLOW=-O0"


@dataclass(frozen=True)
class SocResult:
    """What the C program printed, and mismatching and all elements of every tensor in the memory after it."""

    output: str
    tensors: dict[str, tuple[int, int]]

    @property
    def mismatches(self) -> int:
        """Of all tensors."""
        return sum(wrong for wrong, _ in self.tensors.values())

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(count for _, count in self.tensors.values())


def run_soc(config: ChipConfig, directory: Path, **options: Any) -> SocResult:
    """Run training steps from C on the example system.

    Parameters
    ----------
    config : ChipConfig
        With `axi_bits` 64, the width of the example's bus.
    directory : Path
        For everything that is made; the compiled model is used again if its Verilog is the same.
    options
        Of the steps (`lnpu.export.step.ExportedStep`).

    Raises
    ------
    ValueError
        If the configuration's bus is not 64 bits wide, or of the options.
    ToolError
        If a tool is missing, fails, or the C program ends with an error.
    """
    if config.axi_bits != 64:
        raise ValueError(f"the example system has a bus of 64 bits; axi_bits of {config.name} is {config.axi_bits}")
    if shutil.which("gcc") is None:
        raise ToolError("missing system tools: run `apt-get install gcc` (or your system's equivalent)")
    directory = directory.resolve()
    step = ExportedStep(config, **options)
    rtl = directory / "rtl"
    verilog = write_verilog(config, rtl)
    write_register_views(rtl)
    step.write(directory)
    with lock(directory / "model"):
        model = _model(config, directory, [*sorted(EXAMPLE.glob("*.v")), *verilog], (step.size - 1).bit_length())

    include = Path(verilator_environment()["VERILATOR_ROOT"]) / "include"
    own = [f"-I{path}" for path in (directory, rtl, EXAMPLE)]
    verilated = ["-I", str(model), "-isystem", str(include), "-isystem", str(include / "vltstd")]
    program = directory / "train_step"
    objects = []
    for source in sorted(EXAMPLE.glob("*.c")):
        objects.append(str(directory / f"{source.stem}.o"))
        _call(["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", *own, "-c", str(source), "-o", objects[-1]])
    libraries = [str(model / name) for name in ("libVlnpu_soc.a", "libverilated.a")]
    _call(["g++", "-O2", "-Wall", *own, *verilated, str(EXAMPLE / "bus.cpp"), *objects, *libraries, "-pthread",
           "-lm", "-latomic", "-o", str(program)])  # fmt: skip
    after = directory / "after.bin"
    output = _call([str(program), str(directory / "memory.bin"), str(after)])
    return SocResult(output, step.check(after.read_bytes()))


def _model(config: ChipConfig, directory: Path, sources: list[Path], log2_ram: int) -> Path:
    """Folder of the Verilated system."""
    parameters = [
        f"-GADDR_BITS={config.address_bits}",
        f"-GDATA_BITS={config.axi_bits}",
        f"-GLOG2_RAM_BYTES={log2_ram}",
    ]
    digest = hashlib.sha256(repr((_FLAGS, _MAKE, parameters, importlib.metadata.version("verilator"))).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    model = directory / f"model-{digest.hexdigest()[:16]}"
    finished = model / "finished"
    if not finished.exists():
        shutil.rmtree(model, ignore_errors=True)
        environment = verilator_environment()
        environment["MAKEFLAGS"] += f" {_MAKE} PYTHON3={sys.executable}"
        command = ["verilator", *_FLAGS, *parameters, "--Mdir", str(model), *map(str, sources)]
        _call(command, environment)
        finished.touch()
    return model


def _call(command: list[str], environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-30:])
        raise ToolError(f"{Path(command[0]).name} ended with {result.returncode}:\n{tail}")
    return result.stdout
