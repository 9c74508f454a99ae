"""Toggles of a netlist's nets: its gates simulated by Verilator, without delays, hence without glitches."""

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lnpu.energy.gates import Gates
from lnpu.sim.build import BuildError
from lnpu.toolchain import verilator_environment

__all__ = ["Activity", "GateSimulation", "Stimulus", "read_saif"]

_HARNESS = Path(__file__).with_name("harness.cpp")
_NET = re.compile(r"\(n(\d+)\s+\(T0 \d+\) \(T1 \d+\) \(TZ \d+\) \(TX \d+\) \(TB \d+\) \(TC (\d+)\)\)")


@dataclass(frozen=True)
class Activity:
    """Changes of every net (by number) in so many cycles."""

    toggles: Mapping[int, int]
    cycles: int


def read_saif(text: str) -> dict[int, int]:
    """Changes of the nets called n0, n1, ... in a SAIF file of the simulation."""
    return {int(net): int(count) for net, count in _NET.findall(re.sub(r"\s+", " ", text))}


class Stimulus:
    """Values of input ports over the cycles; ports that are not set are 0."""

    def __init__(self, gates: Gates, cycles: int) -> None:
        self._places, at = {}, 0
        for name, nets in gates.inputs.items():
            self._places[name] = (at, len(nets))
            at += len(nets)
        self.bits = np.zeros((cycles, at), np.uint8)

    def set(self, name: str, values: NDArray | int, cycles: slice | int = slice(None), bit: int = 0) -> None:
        """Set a port, or up to 64 bits of it from `bit` up; `values` are integers, one a cycle or one for all."""
        if name not in self._places:
            raise ValueError(f"no input {name!r}: there are {', '.join(self._places)}")
        at, width = self._places[name]
        at, width = at + bit, min(64, width - bit)
        words = np.atleast_1d(np.asarray(values)).astype(np.uint64)
        self.bits[cycles, at : at + width] = (words[:, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)

    def words(self) -> NDArray[np.uint32]:
        """Records as the harness reads them."""
        cycles, width = self.bits.shape
        size = -(-(max(64, width) + 1) // 32)
        padded = np.zeros((cycles, 32 * size), np.uint8)
        padded[:, :width] = self.bits
        return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


class GateSimulation:
    """Simulates gates; built once, kept in `folder`.

    Raises
    ------
    BuildError
        If Verilator or the compiler fails.
    ToolError
        If a program is missing.
    """

    def __init__(self, gates: Gates, folder: Path) -> None:
        self.gates = gates
        text = gates.verilog()
        digest = hashlib.sha256(text.encode() + _HARNESS.read_bytes())
        for path in gates.sources:
            digest.update(path.read_bytes())
        self._folder = folder.resolve() / f"{gates.top}-{digest.hexdigest()[:12]}"
        self._program = self._folder / "obj" / "Vbench"
        if not self._program.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "bench.v").write_text(text)
            self._build()

    def _build(self) -> None:
        environment = verilator_environment()
        environment["MAKEFLAGS"] += f" OPT_FAST=-O0 OPT_GLOBAL=-O0 OPT_SLOW=-O0 PYTHON3={sys.executable}"
        command = [
            "verilator", "--cc", "--exe", "--build", "-j", "2", "--trace-saif", "--trace-depth", "1",
            "--output-split", "10000", "--output-split-ctrace", "5000",
            "--no-timing", "--no-assert", "--x-assign", "fast", "--x-initial", "fast", "-Wno-fatal", "-Wno-lint",
            "-Wno-style", "--top-module", "bench", "--Mdir", "obj", "-o", "Vbench", "bench.v",
            *map(str, self.gates.sources), str(_HARNESS),
        ]  # fmt: skip
        result = subprocess.run(command, cwd=self._folder, env=environment, capture_output=True, text=True)
        if result.returncode:
            tail = "\n".join((result.stdout + result.stderr).splitlines()[-30:])
            raise BuildError(f"build of the gates' simulation failed:\n{tail}")

    def run(self, stimulus: Stimulus, first: int = 0) -> tuple[Activity, dict[str, NDArray[np.uint8]]]:
        """Simulate.

        Parameters
        ----------
        stimulus : Stimulus
        first : int
            The first cycle whose toggles count.

        Returns
        -------
        Activity
            Of the cycles from `first` on.
        dict
            Bits [cycle, bit] of every output, as they are before the cycle's rising edge.
        """
        cycles = len(stimulus.bits)
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:  # several processes may simulate
            place = Path(scratch)
            (place / "stimulus").write_bytes(stimulus.words().tobytes())
            subprocess.run(
                [self._program, "stimulus", "response", "toggles.saif", "initial.saif", str(first), str(cycles)],
                cwd=place,
                check=True,
                capture_output=True,
            )
            record = np.fromfile(place / "response", np.uint8).reshape(cycles, -1)
            toggles, initial = (read_saif((place / f"{name}.saif").read_text()) for name in ("toggles", "initial"))
        bits = np.unpackbits(record, axis=1, bitorder="little")
        found, at = {}, 0
        for name, nets in self.gates.outputs.items():
            found[name] = bits[:, at : at + len(nets)]
            at += len(nets)
        toggles = {net: count - initial.get(net, 0) for net, count in toggles.items()}
        return Activity(toggles, cycles - first), found
