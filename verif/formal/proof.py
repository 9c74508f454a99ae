"""What a proof is, and how Yosys' SAT engine decides it.

A harness is a `Block` around the block under proof, which it places as `dut`. Its inputs are free in every cycle. It
has two outputs: `assume`, what the surroundings promise, and `hold`, what must then be true. Reset is never asserted;
the first cycle is in the state after it.
"""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lnpu.hdl import Block, emit_verilog
from lnpu.synth.yosys import SynthesisError, run_yosys
from lnpu.toolchain import CLOCK_GATE, RTL

__all__ = ["Fault", "Proof", "Result", "check"]


@dataclass(frozen=True)
class Fault:
    """A defect put into the block: `signal` (of `dut`, or a bit of it) stuck at `value`."""

    signal: str
    value: int


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A property of a block.

    Parameters
    ----------
    name : str
        Unique, for the command line.
    block, statement : str
        What it is about; what it says.
    harness : callable
        Makes the harness.
    method : str
        `"induction"`: for every number of cycles, by k-induction with k up to `depth`. `"bounded"`: the first `depth`
        cycles after reset. `"window"`: the last of any `depth` successive cycles from any state, reachable or not,
        hence always.
    depth : int
        Cycles.
    peeks : dict
        Input ports of the harness that observe a signal of the block, such as `{"level": "dut.level"}`: an induction
        needs to know how the state of the block and that of the harness belong together.
    without : dict
        Submodules of the block that are no part of the proof, and their outputs, which outputs of the harness take the
        place of: `{"buffer": ("o__valid",)}` puts `cut_buffer__o__valid` for `dut.buffer__o__valid`.
    cuts : tuple of str
        Registers of the block that are none either, likewise: `("state",)` puts `cut_state` for `dut.state`.
    constants : dict
        Values of inputs, or bits of them, in every cycle: the case that the proof is about.
    faults : tuple of Fault
        Defects, each of which must refute the property.
    quick : bool
        Seconds: part of the test suite.
    """

    name: str
    block: str
    statement: str
    harness: Callable[[], Block]
    method: str
    depth: int
    peeks: dict[str, str] | None = None
    without: dict[str, tuple[str, ...]] | None = None
    cuts: tuple[str, ...] = ()
    constants: dict[str, int] | None = None
    faults: tuple[Fault, ...] = ()
    quick: bool = True

    def __post_init__(self) -> None:
        if self.method not in _OUTCOMES:
            raise ValueError(f"method must be one of {', '.join(_OUTCOMES)}, not {self.method!r}")
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, not {self.depth!r}")


@dataclass(frozen=True)
class Result:
    """Outcome of a proof: whether it holds, cycles of the induction or of the counterexample, wall time in seconds."""

    proven: bool
    refuted: bool
    cycles: int
    seconds: float


_OUTCOMES = {
    "induction": ("Induction step proven: SUCCESS!", "model found for base case: FAIL!"),
    "bounded": ("proved base case for", "model found for base case: FAIL!"),
    "window": ("no model found: SUCCESS!", "model found: FAIL!"),
}


def check(proof: Proof, *, fault: Fault | None = None) -> Result:
    """Let Yosys decide a property, of the block as it is or with a `fault`.

    Neither `proven` nor `refuted`: the induction did not close within `depth` cycles.

    Raises
    ------
    SynthesisError
        If Yosys failed.
    ToolError
        If pyosys is not installed.
    """
    top = proof.harness()
    peeks, without = proof.peeks or {}, proof.without or {}
    outputs = [f"{name}__{port}" for name, ports in without.items() for port in ports]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [*emit_verilog(top, Path(folder)), *sorted((RTL / "sram").glob("*.v")), CLOCK_GATE]
        passes = [
            *(f'read_verilog -defer "{path}"' for path in files),
            f"hierarchy -check -top {top.module_name}",
            *(f"delete */c:{name}" for name in without),
            "proc",
            "flatten",
            "memory_map",
            # While every signal has still a driver of its own, not that of an alias.
            *([f"connect -nomap -set dut.{fault.signal} {fault.value}"] if fault else ()),
            *(f"setattr -unset init w:dut.{wire}" for wire in proof.cuts),
            *(f"connect -nomap -set dut.{wire} cut_{wire}" for wire in proof.cuts),
            "setattr -set keep 1 w:dut.*",  # what only peeks look at
            "opt_clean",
            "setattr -unset keep w:dut.*",
            *(f"connect -set dut.{wire} cut_{wire}" for wire in outputs),
            *(f"delete -input w:{port}" for port in peeks),
            *(f"connect -set {port} {signal}" for port, signal in peeks.items()),
            "check -assert",  # a net without a driver would be free, or be optimised to what proves the property
            *(["setattr -unset init w:*"] if proof.method == "window" else ()),
            "opt -fine",
            _sat(proof),
        ]
        log = run_yosys(passes)
    success, failure = _OUTCOMES[proof.method]
    proven, refuted = success in log, failure in log
    if not (proven or refuted or "Reached maximum number of time steps" in log):
        raise SynthesisError(f"Yosys has no answer to {proof.name}:\n" + "\n".join(log.splitlines()[-20:]))
    steps = re.findall(r"\[(?:base case|induction step) (\d+)", log)
    return Result(proven, refuted, int(steps[-1]) if steps else proof.depth, time.monotonic() - begin)


def _sat(proof: Proof) -> str:
    extent = {
        "induction": f"-tempinduct -maxsteps {proof.depth}",
        "bounded": f"-tempinduct-baseonly -maxsteps {proof.depth}",
        "window": f"-seq {proof.depth} -prove-skip {proof.depth - 1}",
    }[proof.method]
    constants = "".join(f"-set {port} {value} " for port, value in (proof.constants or {}).items())
    return f"sat -set rst 0 -set assume 1 {constants}-prove hold 1 {extent}"
