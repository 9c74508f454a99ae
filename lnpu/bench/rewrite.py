"""Compiled programs, changed for a measurement: from operands on the chip on, or with cores in lockstep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Command, Opcode, Target, Unit

__all__ = ["RewritingDevice", "in_lockstep", "resident"]

_RESERVED = 4 << 20
_BUFFERS = {Target.SPARSE.value: "sparse", Target.DENSE.value: "dense", Target.DENSE_LOAD.value: "dense"}


def resident(commands: Sequence[Command]) -> tuple[list[Command], list[Command], list[Command]]:
    """A program cut in three: what fills the buffers of the cores, the products, and what is left.

    The first are those LOADs of each unit, from its first one on, that fill pages which no MULTIPLY has used. So what
    fits both pages of the buffers is on the chip when the products begin; the rest is loaded beside them, as ever. The
    second part ends with the last MULTIPLY.

    Parameters
    ----------
    commands : sequence of Command
        A program with a MULTIPLY.
    """
    used: set[tuple[str, int, int]] = set()  # buffer, core, page
    late: set[Unit] = set()
    first: list[Command] = []
    rest: list[Command] = []
    end = 0
    for command in commands:
        f = command.fields
        if command.opcode is Opcode.LOAD:
            target, cores = f.get("target", 0), f.get("cores", 0)
            unit = Unit.LOAD_DENSE if target & 1 else Unit.LOAD
            pages = {(_BUFFERS.get(target, ""), core, f.get("page", 0)) for core in _bits(cores)}
            # LOADs of a unit stay in order: what waits for all but a unit's last one counts on that.
            if target in _BUFFERS and unit not in late and not pages & used:
                first.append(command)
                continue
            late.add(unit)
        elif command.opcode is Opcode.LOAD_RAW:
            late.add(Unit.LOAD)
        rest.append(command)
        if command.opcode is Opcode.MULTIPLY:
            end = len(rest)
            for core in _bits(f.get("cores", 0)):
                used |= {(buffer, core, f.get(f"{buffer}_page", 0)) for buffer in ("sparse", "dense")}
    return [*first, Command(Opcode.END)], [*rest[:end], Command(Opcode.END)], rest[end:]


def in_lockstep(commands: Sequence[Command], cores: int) -> list[Command]:
    """A program in which no core begins its next MULTIPLY before all `cores` cores have done their last one."""
    found = []
    running: set[int] = set()
    for command in commands:
        if command.opcode is Opcode.MULTIPLY:
            mine = _bits(command.fields["cores"])
            if running & set(mine):
                command = Command(command.opcode, **(command.fields | {"wait_cores": (1 << cores) - 1}))
                running = set()
            running |= set(mine)
        found.append(command)
    return found


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(16) if mask >> bit & 1]


class RewritingDevice:
    """A simulated chip that runs each program rewritten.

    Parameters
    ----------
    device : Simulator
        The chip. The end of its memory is for rewritten programs and not part of `memory`.
    config : ChipConfig
    program : str
        "resident" or "lockstep".
    """

    def __init__(self, device: Any, config: ChipConfig, program: str) -> None:
        if program not in ("resident", "lockstep"):
            raise ValueError(f"program must be resident or lockstep, not {program!r}")
        self.device, self.config, self.program = device, config, program
        self._end = len(device.memory) - _RESERVED
        self._counters: dict[str, int] = {}

    @property
    def memory(self) -> NDArray[np.uint8]:
        """External memory, from address 0."""
        return self.device.memory[: self._end]

    def run_program(self, address: int, commands: int) -> dict[str, int]:
        """Run the program at `address` rewritten."""
        raw = self.memory[address : address + COMMAND_BYTES * commands].tobytes()
        found = [Command.decode(raw[at : at + COMMAND_BYTES]) for at in range(0, len(raw), COMMAND_BYTES)]
        if self.program == "lockstep":
            result = self._run(in_lockstep(found, self.config.cores))
            self._counters = self.device.counters()
            return result
        loads, products, rest = resident(found)
        self._run(loads)
        self.device.clear_counters()
        self._run(products)
        self._counters = self.device.counters()
        return self._run(rest)

    def _run(self, commands: Sequence[Command]) -> dict[str, int]:
        raw = b"".join(command.encode() for command in commands)
        if len(raw) > _RESERVED:
            raise ValueError(f"a rewritten program must have at most {_RESERVED} bytes, not {len(raw)}")
        self.device.memory[self._end : self._end + len(raw)] = np.frombuffer(raw, np.uint8)
        return self.device.run_program(self._end, len(commands))

    def clear_flags(self) -> None:
        """Clear the sticky flags."""
        self.device.clear_flags()

    def clear_counters(self) -> None:
        """Set every performance counter to zero."""
        self.device.clear_counters()

    def counters(self) -> dict[str, int]:
        """Counters of the last program; of a resident one, those of its products."""
        return self._counters
