"""The whole chip, simulated natively: registers, programs, memory."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Command
from lnpu.ctrl.counters import COUNTERS
from lnpu.ctrl.registers import COUNTER_BASE, REGISTERS
from lnpu.hdl import Block
from lnpu.interfaces import Error
from lnpu.sim.build import build

__all__ = ["BusError", "ChipError", "ProtocolError", "Register", "SimulationTimeout", "Simulator"]


Register = SimpleNamespace(**{name: register.offset for name, register in REGISTERS.items()}, COUNTER=COUNTER_BASE)
"""Byte offsets of the chip's registers, by name, and of the first counter."""


_START, _ABORT, _CLEAR = 1, 2, 4
_DONE, _ERROR = 2, 4
_RESPONSES = {1: "EXOKAY", 2: "SLVERR", 3: "DECERR"}


class BusError(RuntimeError):
    """A register access was answered with an error."""


class ProtocolError(RuntimeError):
    """The chip broke a rule of AXI; the message names the channel, the rule and the cycle."""


class SimulationTimeout(RuntimeError):
    """A program was still running after the cycles it was allowed."""


class ChipError(RuntimeError):
    """A program ended with an error.

    Attributes
    ----------
    code : Error
        Its error code.
    command : int
        Index of the command last started.
    detail : tuple of Error
        Every kind of error that was seen.
    """

    def __init__(self, code: int, command: int, detail: int) -> None:
        self.code = Error(code)
        self.command = command
        self.detail = tuple(kind for kind in Error if kind.value and detail >> kind.value & 1)
        kinds = ", ".join(kind.name for kind in self.detail) or "none"
        super().__init__(f"{self.code.name} (code {code}) at command {command}; kinds of error seen: {kinds}")


class Simulator:
    """A simulated chip with its memory. The first use of a configuration compiles it.

    The chip is in reset for a few cycles, then waits for a program. Memory starts at address 0; accesses beyond it are
    answered with DECERR.

    Parameters
    ----------
    config : ChipConfig
        Configuration of the chip.
    memory_bytes : int
        Size of the memory, a multiple of 4096.
    stall : float
        Probability of a stall in each cycle of every AXI channel, 0 to below 1. Where it is not 0, registers and
        SRAMs also power up with random contents, and the memory orders reads and writes as loosely as AXI allows.
    seed : int
        Seed of the stalls and of what they bring.
    latency : int
        Cycles from a read address to its first word, and from the last word of a write to its response; 1 or more.
    trace : path or None
        Write waveforms (VCD) to this file.
    top : Block or None
        Simulate this block instead of the chip (see `lnpu.sim.build.build`).

    Attributes
    ----------
    config : ChipConfig
    memory : numpy.ndarray
        The memory, uint8; read and write it whenever the simulation is not running.
    """

    def __init__(
        self,
        config: ChipConfig,
        memory_bytes: int = 64 << 20,
        stall: float = 0.0,
        seed: int = 0,
        latency: int = 8,
        trace: str | Path | None = None,
        *,
        top: Block | None = None,
    ) -> None:
        if memory_bytes < 4096 or memory_bytes % 4096:
            raise ValueError(f"memory_bytes must be a positive multiple of 4096, not {memory_bytes!r}")
        if not 0.0 <= stall < 1.0:
            raise ValueError(f"stall must be 0 to below 1, not {stall!r}")
        if latency < 1:
            raise ValueError(f"latency must be at least 1, not {latency!r}")
        self.config = config
        self.memory = np.zeros(memory_bytes, dtype=np.uint8)
        self._started = 0
        self._library = _load(build(config, trace is not None, top=top))
        self._model = self._library.lnpu_create(
            self.memory.ctypes.data, memory_bytes, latency, stall, seed & 0xFFFFFFFFFFFFFFFF
        )
        if trace is not None:
            path = Path(trace)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._library.lnpu_trace(self._model, str(path).encode()):
                raise OSError(f"cannot write waveforms to {path}")
        self.reset()

    def close(self) -> None:
        """Free the model; the object can then no longer be used (its memory can)."""
        if getattr(self, "_model", None) is not None:
            self._library.lnpu_destroy(self._model)
            self._model = None

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def cycle(self) -> int:
        """Cycles simulated so far."""
        return self._library.lnpu_cycle(self._model)

    @property
    def bus_beats(self) -> tuple[int, int]:
        """AXI words read and written so far, as the memory counts them."""
        return self._library.lnpu_read_beats(self._model), self._library.lnpu_write_beats(self._model)

    @property
    def interrupt(self) -> bool:
        """State of the interrupt line."""
        return bool(self._library.lnpu_interrupt(self._model))

    def reset(self, cycles: int = 4) -> None:
        """Reset the chip and forget the memory's outstanding bursts; memory keeps its contents."""
        self._library.lnpu_reset(self._model, cycles)
        self._check()

    def run(self, max_cycles: int) -> int:
        """Clock the chip until its interrupt line is up, at most `max_cycles`; return the cycles used."""
        used = self._library.lnpu_run(self._model, max_cycles)
        self._check()
        return used

    def write_register(self, offset: int, value: int) -> None:
        """Write a 32-bit register; `BusError` if the chip answers with an error."""
        response = self._library.lnpu_write_register(self._model, offset, value)
        self._check()
        if response:
            name = _RESPONSES[response]
            raise BusError(f"write of {value:#x} to register {offset:#05x} was answered with {name}")

    def read_register(self, offset: int) -> int:
        """Read a 32-bit register; `BusError` if the chip answers with an error."""
        value = ctypes.c_uint32()
        response = self._library.lnpu_read_register(self._model, offset, ctypes.byref(value))
        self._check()
        if response:
            raise BusError(f"read of register {offset:#05x} was answered with {_RESPONSES[response]}")
        return value.value

    def inject_errors(self, low: int, high: int, *, reads: bool = True, writes: bool = True) -> None:
        """Answer accesses to byte addresses low <= address < high with SLVERR (low = high: none)."""
        self._library.lnpu_fault(self._model, low, high, reads, writes)

    def load_program(self, address: int, commands: Sequence[Command | bytes]) -> int:
        """Put commands into memory at `address`; return how many."""
        raw = b"".join(item.encode() if isinstance(item, Command) else bytes(item) for item in commands)
        if len(raw) != COMMAND_BYTES * len(commands):
            raise ValueError(f"a command must be {COMMAND_BYTES} bytes, not {len(raw) / max(1, len(commands)):g}")
        if address < 0 or address + len(raw) > self.memory.size:
            raise ValueError(
                f"program of {len(raw)} bytes at {address:#x} does not fit memory of {self.memory.size:#x}"
            )
        self.memory[address : address + len(raw)] = np.frombuffer(raw, dtype=np.uint8)
        return len(commands)

    def start_program(self, address: int, commands: int | Sequence[Command | bytes]) -> None:
        """Start a program and return (see `run_program`)."""
        count = commands if isinstance(commands, int) else self.load_program(address, commands)
        if address < 0 or address % COMMAND_BYTES:
            raise ValueError(f"program address must be a multiple of {COMMAND_BYTES}, not {address:#x}")
        self.write_register(Register.PROGRAM, address & 0xFFFFFFFF)
        self.write_register(Register.PROGRAM + 4, address >> 32)
        self.write_register(Register.PROGRAM_LENGTH, count)
        self.write_register(Register.INTERRUPT, 1)
        self._started = self.cycle
        self.write_register(Register.CONTROL, _START)

    def run_program(
        self, address: int, commands: int | Sequence[Command | bytes], *, max_cycles: int = 100_000_000
    ) -> dict[str, int]:
        """Run a program to its end.

        Parameters
        ----------
        address : int
            Byte address of its first command, a multiple of 64.
        commands : int or sequence
            Number of commands at `address`, or the commands to put there first (`Command`s or encoded).
        max_cycles : int
            Cycles it may take.

        Returns
        -------
        dict
            ``cycles`` from the write that starts it to the interrupt, and the chip's ``flags`` register.

        Raises
        ------
        ChipError
            If the chip reports an error. It then takes the next program.
        SimulationTimeout
            If it does not end; the chip is left running (see `abort`).
        ProtocolError
            If the chip breaks a rule of AXI.
        """
        self.start_program(address, commands)
        return self.finish_program(max_cycles=max_cycles)

    def finish_program(self, *, max_cycles: int = 100_000_000) -> dict[str, int]:
        """Wait for the end of a started program (see `run_program`)."""
        self.run(max_cycles)
        cycles = self.cycle - self._started
        if not self.interrupt:
            status = self.read_register(Register.STATUS)
            command = self.read_register(Register.ERROR_COMMAND)
            raise SimulationTimeout(
                f"program not finished after {cycles} cycles (status {status:#x}, command last started {command})"
            )
        status = self.read_register(Register.STATUS)
        error = [
            self.read_register(offset)
            for offset in (Register.ERROR, Register.ERROR_COMMAND, Register.ERROR_DETAIL, Register.FLAGS)
        ]
        self.write_register(Register.STATUS, _DONE | _ERROR)
        if status & _ERROR:
            raise ChipError(*error[:3])
        return {"cycles": cycles, "flags": error[3]}

    def abort(self) -> None:
        """Ask the chip to stop; `finish_program` then raises `ChipError` (ABORTED)."""
        self.write_register(Register.CONTROL, _ABORT)

    def clear_flags(self) -> None:
        """Clear the sticky flags."""
        self.write_register(Register.FLAGS, 3)

    def clear_counters(self) -> None:
        """Set every performance counter to zero."""
        self.write_register(Register.CONTROL, _CLEAR)

    def counters(self) -> dict[str, int]:
        """Performance counters by name, in the order of `lnpu.ctrl.counters.COUNTERS`."""
        values = {}
        for index, name in enumerate(COUNTERS):
            offset = Register.COUNTER + 8 * index
            values[name] = self.read_register(offset) | self.read_register(offset + 4) << 32
        return values

    def flush_trace(self) -> None:
        """Write buffered waveforms to their file."""
        self._library.lnpu_flush(self._model)

    def _check(self) -> None:
        if message := self._library.lnpu_error(self._model):
            raise ProtocolError(message.decode())


@cache
def _load(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    machine, u64, u32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    functions: dict[str, tuple[Any, list[Any]]] = {
        "create": (machine, [ctypes.c_void_p, u64, u64, ctypes.c_double, u64]),
        "destroy": (None, [machine]),
        "trace": (ctypes.c_int, [machine, ctypes.c_char_p]),
        "flush": (None, [machine]),
        "reset": (None, [machine, ctypes.c_uint]),
        "write_register": (ctypes.c_int, [machine, u32, u32]),
        "read_register": (ctypes.c_int, [machine, u32, ctypes.POINTER(u32)]),
        "run": (u64, [machine, u64]),
        "fault": (None, [machine, u64, u64, ctypes.c_int, ctypes.c_int]),
        "interrupt": (ctypes.c_int, [machine]),
        "cycle": (u64, [machine]),
        "read_beats": (u64, [machine]),
        "write_beats": (u64, [machine]),
        "error": (ctypes.c_char_p, [machine]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, f"lnpu_{name}")
        function.restype, function.argtypes = result, arguments
    return library
