"""Programs: commands with their hazards worked out.

The chip starts commands in order and lets units work side by side; a command names the units that must be idle first.
`Program.emit` is told what a command reads and writes and derives those waits, so that a lowering only has to put its
commands in a good order.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from lnpu.compiler.tensor import RawTensor, Tensor
from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, TAKES_TWO, Command, Opcode, Unit, unit_of

__all__ = ["COMMAND_CYCLES", "Emission", "Mark", "Program", "Region", "interleaved", "merged"]

COMMAND_CYCLES = 32
"""Cycles, about, that LOAD or DRAIN needs for a command besides its elements."""

_ELEMENTS = {
    Opcode.LOAD: ("n_count", "i_count", "j_count", "channel_beats"),
    Opcode.LOAD_RAW: ("line_count", "line_rows"),
}
"""Fields whose product is how many beats a command loads."""


class Region(NamedTuple):
    """Part of a memory that a command touches: words `start` to `end` (exclusive) of `space`."""

    space: str
    start: int = 0
    end: int = 1

    def overlaps(self, other: "Region") -> bool:
        """Whether the two share a word."""
        return self.space == other.space and self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Mark:
    """A point of the program at which the counters are written to memory."""

    layer: str
    phase: str
    address: int
    macs_dense: int = 0


@dataclass(frozen=True)
class Emission:
    """A command that is to be emitted, and what it touches."""

    opcode: Opcode
    reads: list[Region]
    writes: list[Region]
    fields: dict[str, int]
    loss_scaling: bool = False

    def merges(self, other: "Emission") -> bool:
        """Whether the two are MULTIPLYs that differ in their cores alone."""
        return (
            self.opcode is other.opcode is Opcode.MULTIPLY
            and self.fields | {"cores": 0} == other.fields | {"cores": 0}
            and not self.fields["cores"] & other.fields["cores"]
        )


class Program:
    """A sequence of commands for a chip of configuration `config`.

    Attributes
    ----------
    commands : list of Command
    marks : list of Mark
        In program order; a mark's counters minus those of the mark before are what happened in between.
    loss_scalings : list of int
        Which commands multiply gradients by 1 / loss scale (their second operand).
    open : list of Tensor
        Dynamic tensors that are being stored: their states have been committed, their statistics not yet been used.
    loading : dict of Unit to float
        Cycles, about, that the two LOAD units have been given since the last mark.
    """

    def __init__(self, config: ChipConfig) -> None:
        self.config = config
        self.commands: list[Command] = []
        self.marks: list[Mark] = []
        self.loss_scalings: list[int] = []
        self.open: list[Tensor] = []
        self.loading: defaultdict[Unit, float] = defaultdict(float)
        self._recorded: list[Emission] | None = None
        # What each unit (or core) may still be doing: what its last commands read and write, oldest first.
        self._busy: dict[tuple[str, int], list[tuple[list[Region], list[Region]]]] = {}

    @staticmethod
    def memory(tensor: Tensor | RawTensor, start: int = 0, end: int = 1 << 40) -> Region:
        """Region of a tensor in external memory: lines (of a raw tensor, rows) `start` to `end` of all its channel
        blocks, one block after the other."""
        return Region(f"memory {tensor.name}", start, end)

    def emit(
        self,
        opcode: Opcode,
        *,
        reads: Iterable[Region] = (),
        writes: Iterable[Region] = (),
        loss_scaling: int = 0,
        **fields: int,
    ) -> None:
        """Append a command that touches these regions. `loss_scaling`: 1 if it is one of `loss_scalings`."""
        emission = Emission(opcode, list(reads), list(writes), fields, bool(loss_scaling))
        if opcode in _ELEMENTS:
            unit = unit_of(opcode, fields)
            beats = prod(fields.get(name, 0) for name in _ELEMENTS[opcode])
            cycles = beats * 32 * self.config.beat / self.config.axi_bits if opcode is Opcode.LOAD_RAW else beats
            self.loading[unit] += COMMAND_CYCLES + cycles
        if self._recorded is not None:
            self._recorded.append(emission)
        else:
            self._append(emission)

    def record(self, body: Callable[[], None]) -> list[Emission]:
        """What `body` emits, without emitting it."""
        before, self._recorded = self._recorded, []
        try:
            body()
            return self._recorded
        finally:
            self._recorded = before

    def play(self, emissions: Iterable[Emission]) -> None:
        """Emit what was recorded."""
        for emission in emissions:
            if self._recorded is not None:
                self._recorded.append(emission)
            else:
                self._append(emission)

    def _append(self, emission: Emission) -> None:
        command = Command(emission.opcode, **emission.fields)
        reads, writes = emission.reads, emission.writes
        if emission.loss_scaling:
            self.loss_scalings.append(len(self.commands))
        if command.opcode is Opcode.MULTIPLY:
            own = [("core", core) for core in range(self.config.cores) if command.fields["cores"] >> core & 1]
            depth = 2
        else:
            unit = unit_of(emission.opcode, emission.fields)
            own = [("unit", int(unit))]
            depth = 2 if unit in TAKES_TWO else 1
        waits = {"unit": 0, "core": 0, "queue": 0, "unit_queue": 0}
        for key, commands in self._busy.items():
            if key in own:
                continue
            conflicts = [
                any(
                    mine.overlaps(theirs)
                    for mines, others in ((reads, busy_writes), (writes, busy_writes), (writes, busy_reads))
                    for mine in mines
                    for theirs in others
                )
                for busy_reads, busy_writes in commands
            ]
            if not any(conflicts):
                continue
            two = key[0] == "core" or key[1] in TAKES_TWO
            if two and not conflicts[-1]:  # the last command may go on
                waits["queue" if key[0] == "core" else "unit_queue"] |= 1 << key[1]
                del commands[:-1]
            else:
                waits[key[0]] |= 1 << key[1]
                commands.clear()
        for key in own:  # when one takes a command, it has done all but the last `depth` with it
            self._busy[key] = [*self._busy.get(key, []), (reads, writes)][-depth:]
        command.fields |= {f"wait_{name}s": mask for name, mask in waits.items()}
        self.commands.append(command)

    def commit(self, tensor: Tensor) -> None:
        """Begin to store a tensor: if it is dynamic, its next FGMP state becomes the current one (once)."""
        if tensor.state and tensor not in self.open:
            self.open.append(tensor)
            self.emit(Opcode.COMMIT, tensor=tensor.state)

    def mark(self, layer: str, phase: str, address: int, macs_dense: int = 0) -> None:
        """Write the counters to `address` when everything before is done."""
        self.commands.append(Command(Opcode.MARK, address=address))
        self.marks.append(Mark(layer, phase, address, macs_dense))
        self._busy.clear()
        self.loading.clear()

    def end(self) -> None:
        """Close the program."""
        self.commands.append(Command(Opcode.END))

    def encode(self) -> bytes:
        """The program's memory image."""
        return b"".join(command.encode() for command in self.commands)

    @property
    def size(self) -> int:
        """Bytes of the memory image."""
        return COMMAND_BYTES * len(self.commands)


def interleaved(*sequences: list[Emission]) -> list[Emission]:
    """The sequences mixed evenly, each in its order; where places are equal, the earlier sequence first."""
    places = [
        (index / len(sequence), number, index, emission)
        for number, sequence in enumerate(sequences)
        for index, emission in enumerate(sequence)
    ]
    return [emission for *_, emission in sorted(places, key=lambda place: place[:3])]


def merged(emissions: Iterable[Emission]) -> list[Emission]:
    """The same with MULTIPLYs that differ in their cores alone made one, where the first of them is."""
    result: list[Emission] = []
    for emission in emissions:
        for index, before in enumerate(result):
            if before.merges(emission):
                cores = before.fields["cores"] | emission.fields["cores"]
                reads, writes = before.reads + emission.reads, before.writes + emission.writes
                result[index] = Emission(Opcode.MULTIPLY, reads, writes, before.fields | {"cores": cores})
                break
        else:
            result.append(emission)
    return result
