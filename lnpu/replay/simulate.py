"""One segment of a training step on a simulated chip, whose memory has the golden model's operands and nothing else."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.memory import DecodeError
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import RawTensor, Tensor
from lnpu.compiler.traffic import predict_traffic
from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Command, Opcode
from lnpu.ctrl.counters import COUNTERS
from lnpu.driver import read_raw, read_tensor
from lnpu.formats import SLOT_BYTES
from lnpu.sim.simulator import ChipError, ProtocolError, Register, SimulationTimeout, Simulator

__all__ = ["AFTER", "BEFORE", "RECORD_BYTES", "Operand", "Segment", "simulate"]

BEFORE, AFTER = "before.bin", "after.bin"
"""Images of the memory that the golden model expects before the step (with the programs) and after it."""

RECORD_BYTES = 32

_POISON = 0xA5  # no length of a block
_SLICE = 2_000_000  # cycles in which the chip must start a command
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Operand:
    """A tensor that a segment reads: as it is after the step (`updated`: an earlier segment writes it) or before."""

    tensor: Tensor | RawTensor
    updated: bool


@dataclass(frozen=True)
class Segment:
    """The commands of a program from one mark to the next, and what they need and leave.

    Parameters
    ----------
    name, title : str
        For files, and for people.
    program, layer, phase : str
        Where it is from: "forward", "backward" or "update", and the operation's names.
    address, count : int
        Byte address of its first command, and how many there are (its MARK is the last).
    marks : tuple of int
        Where the counters go before and after it.
    states : tuple of (int, int, int, int)
        FGMP states that it starts from: number, scale, lo, hi.
    reads : tuple of Operand
    writes : tuple of Tensor and RawTensor
    records : tuple of (str, int)
        Dynamic tensors that it adapts, and addresses of the controller's records.
    macs_dense : int
        Multiply-accumulates of a dense computation.
    cost : float
        About how long it takes, in cycles, to begin with the longest.
    shape : tuple of int or None
        Shape of the convolution that it belongs to.
    """

    name: str
    title: str
    program: str
    layer: str
    phase: str
    address: int
    count: int
    marks: tuple[int, int]
    states: tuple[tuple[int, int, int, int], ...]
    reads: tuple[Operand, ...]
    writes: tuple[Tensor | RawTensor, ...]
    records: tuple[tuple[str, int], ...]
    macs_dense: int
    cost: float
    shape: tuple[int, ...] | None


def _regions(tensor: Tensor | RawTensor) -> list[slice]:
    """The bytes of a tensor in memory."""
    if isinstance(tensor, RawTensor):
        return [slice(tensor.address, tensor.address + tensor.rows * tensor.pitch)]
    table = -(-tensor.blocks // 32) * 32
    return [
        slice(tensor.slots, tensor.slots + SLOT_BYTES * tensor.blocks),
        slice(tensor.table, tensor.table + table),
    ]


def _lengths(image: NDArray[np.uint8], tensor: Tensor) -> NDArray[np.uint8]:
    return np.asarray(image[tensor.table : tensor.table + tensor.blocks])


def simulate(segment: Segment, config: ChipConfig, folder: str) -> dict[str, Any]:
    """Run a segment and compare all that it leaves in memory with the golden model.

    Parameters
    ----------
    segment : Segment
    config : ChipConfig
    folder : str
        Where the images of memory are.

    Returns
    -------
    dict
        The segment's names and numbers; `elements` compared, `mismatches` (by tensor; bytes of a record), `errors`
        (texts), `counters` of the segment, `traffic` of the whole program by counter in bits and its difference from
        the prediction in `unpredicted`, `stray` (bytes changed that nobody may change), `seconds`.
    """
    started = time.perf_counter()
    before, after = (np.memmap(Path(folder) / name, np.uint8, "r") for name in (BEFORE, AFTER))
    program = Program(config)
    program.commands = [
        *(Command(Opcode.STATE, tensor=number, scale=scale, lo=lo, hi=hi) for number, scale, lo, hi in segment.states),
        Command(Opcode.MARK, address=segment.marks[0]),
    ]
    own = before[segment.address : segment.address + COMMAND_BYTES * segment.count].tobytes()
    raw = program.encode() + own + Command(Opcode.END).encode()
    program.commands += [Command.decode(own[at : at + COMMAND_BYTES]) for at in range(0, len(own), COMMAND_BYTES)]
    program.end()
    result: dict[str, Any] = {
        name: getattr(segment, name) for name in ("name", "program", "layer", "phase", "macs_dense")
    } | {"commands": segment.count, "elements": 0, "mismatches": {}, "errors": [], "counters": {}, "traffic": {},
         "unpredicted": {}, "stray": 0}  # fmt: skip

    start = -(-len(before) // COMMAND_BYTES) * COMMAND_BYTES
    code = slice(start, start + len(raw))
    with Simulator(config, -(-code.stop // 4096) * 4096) as simulator:
        memory = simulator.memory
        memory[:] = _POISON
        for operand in segment.reads:
            for region in _regions(operand.tensor):
                memory[region] = (after if operand.updated else before)[region]
        memory[code] = np.frombuffer(raw, np.uint8)
        try:
            _run(simulator, start, len(program.commands))
            traffic = simulator.counters()
        except (ChipError, ProtocolError, SimulationTimeout) as error:
            result["errors"].append(f"{type(error).__name__}: {error}")
        else:
            writes = {tensor.table: _lengths(after, tensor) for tensor in segment.writes if isinstance(tensor, Tensor)}
            reads = {
                operand.tensor.table: _lengths(after if operand.updated else before, operand.tensor)
                for operand in segment.reads
                if isinstance(operand.tensor, Tensor)
            }
            predicted = predict_traffic(program, writes | reads, writes).counters()
            result["traffic"] = {name: traffic[name] for name in predicted if traffic[name]}
            result["unpredicted"] = {
                name: traffic[name] - bits for name, bits in predicted.items() if traffic[name] != bits
            }
            first, last = (
                memory[mark : mark + 8 * len(COUNTERS)].copy().view(np.uint64).tolist() for mark in segment.marks
            )
            result["counters"] = dict(zip(COUNTERS, (b - a for a, b in zip(first, last, strict=True)), strict=True))
            for tensor in segment.writes:
                _compare(result, tensor, memory, after, config.beat)
            for name, address in segment.records:
                region = slice(address, address + RECORD_BYTES)
                if wrong := int(np.count_nonzero(memory[region] != after[region])):
                    result["mismatches"][f"{name} (record)"] = wrong
            result["stray"] = _stray(segment, memory, before, after, code, raw)
    result["seconds"] = round(time.perf_counter() - started, 3)
    return result


def _run(simulator: Simulator, address: int, commands: int) -> None:
    """Run a program as long as it makes progress."""
    simulator.start_program(address, commands)
    last = -1
    while True:
        simulator.run(_SLICE)
        if simulator.interrupt:
            break
        now = simulator.read_register(Register.ERROR_COMMAND)
        if now == last:
            raise SimulationTimeout(f"command {now} of {commands} still running after {_SLICE} cycles")
        last = now
    simulator.finish_program()


def _compare(
    result: dict[str, Any], tensor: Tensor | RawTensor, memory: NDArray[np.uint8], after: NDArray[np.uint8], beat: int
) -> None:
    """Count the elements that differ: value and code of encoded ones, 32 bits of FP32."""
    if isinstance(tensor, RawTensor):
        values = (read_raw(image, tensor).view(np.uint32) for image in (memory, after))
        wrong = np.not_equal(*values)
        bad, size = int(wrong.sum()), int(wrong.size)
    else:
        expected = read_tensor(after, tensor, beat)
        size = int(expected.bits.size)
        try:
            actual = read_tensor(memory, tensor, beat)
            bad = int(((actual.bits != expected.bits) | (actual.codes != expected.codes)).sum())
        except DecodeError as error:
            result["errors"].append(f"{tensor.name} in memory is malformed: {error}")
            bad = size
    result["elements"] += size
    if bad:
        result["mismatches"][tensor.name] = bad


def _stray(
    segment: Segment,
    memory: NDArray[np.uint8],
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    code: slice,
    raw: bytes,
) -> int:
    """Bytes that are not what they were, outside of all that the segment writes. Destroys memory."""
    for tensor in segment.writes:
        for region in _regions(tensor):
            memory[region] = _POISON
    for address in segment.marks:
        memory[address : address + -(-8 * len(COUNTERS) // 32) * 32] = _POISON
    for _, address in segment.records:
        memory[address : address + RECORD_BYTES] = _POISON
    count = int(np.count_nonzero(memory[code] != np.frombuffer(raw, np.uint8)))
    memory[code] = _POISON
    for operand in segment.reads:
        if any(tensor.name == operand.tensor.name for tensor in segment.writes):
            continue
        for region in _regions(operand.tensor):
            count += int(np.count_nonzero(memory[region] != (after if operand.updated else before)[region]))
            memory[region] = _POISON
    return count + sum(
        int(np.count_nonzero(memory[at : at + _CHUNK] != _POISON)) for at in range(0, len(memory), _CHUNK)
    )
