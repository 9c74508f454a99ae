"""Builds one block of the chip with Verilator, as RTL or in gates, and runs a cocotb testbench on it.

A pytest entry point calls `run(block, "verif.pe_tb", cases=...)`; the testbench reads its parameters with
`parameters()` and its random generator from `rng()`, whose seed is printed and can be set with `SEED=`.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from cocotb_tools.runner import get_runner

from lnpu.hdl import Block, emit_verilog
from lnpu.results import lock
from lnpu.synth.liberty import Liberty
from lnpu.synth.netlist import cell_models, synthesise
from lnpu.toolchain import CLOCK_GATE, RTL, compiled_library, verilator_environment

__all__ = ["parameters", "rng", "run"]

BUILD = Path(__file__).resolve().parent.parent / "build" / "verif"
_VERSIONS = tuple(importlib.metadata.version(package) for package in ("verilator", "cocotb"))
_MAKE = " VM_PARALLEL_BUILDS=0 OPT_FAST=-O1"  # blocks are small: what is read for each file would take longest
_ARGUMENTS = ("-Wno-fatal", "-Wno-lint", "-Wno-style", "--x-initial", "unique", "-O3")


def run(
    block: Block,
    testbench: str,
    *,
    gates: Liberty | None = None,
    swap: tuple[str, str] | None = None,
    only: str | None = None,
    sources: Sequence[Path] = (),
    inside: bool | Sequence[str] = False,
    **parameters,
) -> Path:
    """Emit `block`, build it (once for all testbenches, cached by content) and run every cocotb test in `testbench`.

    Parameters
    ----------
    block : Block
        The device under test.
    testbench : str
        Importable name of the cocotb module, e.g. ``"verif.pe_tb"``.
    gates : Liberty or None
        Run the block's netlist in the gates of this library, instead of the RTL.
    swap : (str, str) or None
        A defect of the netlist, to see that the tests find it: the middle one of the first cell becomes the second.
    only : str or None
        Run only the cocotb tests in whose name this regular expression is found.
    sources : sequence of Path
        Verilog beside what is emitted.
    inside : bool or sequence of str
        What the testbench sees beside the block's ports: signals as ``"module.signal"``, which are seen in every
        instance of the module; or, if true, everything as it was written, which takes several times as long to compile
        and is slower.
    parameters
        JSON-serialisable values for the testbench, see `parameters`.

    Returns
    -------
    Path
        What the tests have printed.

    Raises
    ------
    AssertionError
        If a cocotb test fails; the message names the tests and the log.
    ValueError
        If `swap` names a cell that the netlist has not.
    """
    key = (block.module_name, testbench, sorted(parameters.items()), *([gates.digest, swap] if gates else ()))
    label = hashlib.sha256(repr(key).encode()).hexdigest()[:8]
    work = BUILD / f"{block.module_name}-{testbench.rsplit('.', 1)[-1]}-{label}"
    work.mkdir(parents=True, exist_ok=True)
    waves = bool(os.environ.get("WAVES"))
    results = work / "results.xml"
    environment = verilator_environment()
    environment["MAKEFLAGS"] += _MAKE
    saved = dict(os.environ)
    os.environ.update(environment)
    try:
        results.unlink(missing_ok=True)
        model = _model(block, gates, swap, [*sources, *sorted((RTL / "sram").glob("*.v")), CLOCK_GATE], inside, waves)
        with suppress(SystemExit):  # a test failed; which one is in the results
            get_runner("verilator").test(
                hdl_toplevel=block.module_name,
                hdl_toplevel_lang="verilog",
                test_module=testbench,
                build_dir=model,
                test_dir=work,
                results_xml=str(results),
                test_filter=only,
                waves=waves,
                log_file=work / "test.log",
                extra_env={
                    "LNPU_PARAMETERS": json.dumps(parameters),
                    "PYTHONPATH": os.pathsep.join([str(BUILD.parent.parent), os.environ.get("PYTHONPATH", "")]),
                },
            )
    finally:
        os.environ.clear()
        os.environ.update(saved)
    assert results.exists(), f"{testbench} did not end, see {work / 'test.log'}"
    cases = list(ET.parse(results).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    assert cases, f"{testbench} ran no test, see {work / 'test.log'}"
    assert not failed, f"{testbench}: {', '.join(map(str, failed))} failed, see {work / 'test.log'}"
    return work / "test.log"


def _model(
    block: Block,
    gates: Liberty | None,
    swap: tuple[str, str] | None,
    sources: Sequence[Path],
    inside: bool | Sequence[str],
    waves: bool,
) -> Path:
    """The folder in which Verilator has built `block` and `sources`, for any testbench."""
    all_visible = not gates and (inside is True or waves)
    with tempfile.TemporaryDirectory(prefix="emit-", dir=BUILD) as folder:
        scratch = Path(folder)
        emitted = _gate_sources(block, gates, swap, scratch) if gates else emit_verilog(block, scratch / "rtl")
        files = [*emitted, *sources]
        if not all_visible:
            files.insert(0, _visible(block, inside or (), scratch))
        digest = hashlib.sha256(repr((_VERSIONS, _ARGUMENTS, _MAKE, waves)).encode())
        for path in files:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        model = BUILD / f"{block.module_name}-{digest.hexdigest()[:12]}"
        stamp = model / "built"
        with lock(model):
            if not stamp.exists():
                shutil.rmtree(model, ignore_errors=True)
                (model / "source").mkdir(parents=True)
                runner = get_runner("verilator")
                if not all_visible:
                    _hide_inside(runner)
                options = hashlib.sha256(repr((_VERSIONS, _MAKE, waves)).encode()).hexdigest()[:8]
                with compiled_library(model, BUILD / f"library-{options}"):
                    runner.build(
                        sources=[shutil.copy(path, model / "source") for path in files],
                        hdl_toplevel=block.module_name,
                        build_dir=model,
                        build_args=_ARGUMENTS,
                        always=True,
                        waves=waves,
                        log_file=model / "build.log",
                    )
                stamp.touch()
    return model


def _gate_sources(block: Block, liberty: Liberty, swap: tuple[str, str] | None, work: Path) -> list[Path]:
    """A block's netlist, the models of its cells and of its SRAM macros."""
    netlist = synthesise(block, liberty, BUILD / "gates")
    path = netlist.path
    if swap is not None:
        text = path.read_text()
        places = list(re.finditer(rf"^(\s+){re.escape(swap[0])}(?= )", text, re.MULTILINE))
        if not places:
            raise ValueError(f"the netlist has no cell {swap[0]!r}, but {', '.join(sorted(netlist.cells))}")
        place = places[len(places) // 2]
        path = work / "swapped.v"
        path.write_text(f"{text[: place.start()]}{place[1]}{swap[1]}{text[place.end() :]}")
    return [path, cell_models(liberty, BUILD / "gates"), netlist.models]


def _visible(block: Block, inside: Sequence[str], work: Path) -> Path:
    """Directives for Verilator that the bench sees a block's ports, and these signals inside."""
    clock = [] if block.combinational else ["clk", "rst"]
    names = [*clock, *("__".join(map(str, port)) for port, _, _ in block.signature.flatten(block))]
    visible = work / "visible.vlt"
    lines = [f'public_flat_rw -module "{block.module_name}" -var "{name}"' for name in names]
    for signal in inside:
        module, name = signal.split(".")
        lines.append(f'public_flat_rd -module "{module}" -var "{name}"')
    visible.write_text("\n".join(["`verilator_config", *lines, ""]))
    return visible


def _hide_inside(runner) -> None:
    """Leave the signals inside to the optimiser: thousands that a bench could see take minutes to compile."""
    commands = runner._build_command
    runner._build_command = lambda: [[arg for arg in line if arg != "--public-flat-rw"] for line in commands()]


def parameters() -> dict:
    """Parameters that `run` was called with (inside the simulator)."""
    return json.loads(os.environ["LNPU_PARAMETERS"])


def rng(default_seed: int = 1) -> np.random.Generator:
    """Random generator of a testbench; prints its seed, which `SEED=` overrides."""
    seed = int(os.environ.get("SEED", default_seed))
    print(f"seed {seed}")
    return np.random.default_rng(seed)
