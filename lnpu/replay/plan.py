"""A training step of the golden model, cut into the segments of the compiled programs."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.controller import COUNT_MAX, Controller, ControllerState
from golden.fgmp import Quantised, fgmp
from lnpu.compiler.graph import Conv, Linear
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import RawTensor, Tensor
from lnpu.compiler.training import TrainingStep
from lnpu.config import BLOCK, ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Command, Opcode
from lnpu.datasets import load_images, normalise
from lnpu.driver import Host, write_raw
from lnpu.formats import SLOT_BYTES
from lnpu.replay.simulate import AFTER, BEFORE, RECORD_BYTES, Operand, Segment
from lnpu.sim.build import add_sources
from lnpu.train_step import Settings, initial_parameters, prepare

__all__ = ["GoldenStep", "Images", "load", "plan"]

_VERSION = 2
"""Of what a segment's result is; those of another are not taken for it."""

_SOURCES = ("lnpu.chip", "lnpu.compiler.traffic", "lnpu.sim.simulator", "golden.memory")
_SOURCES_ALONE = ("lnpu.driver", "lnpu.replay.plan", "lnpu.replay.simulate")
"""What a segment's result depends on besides its commands and its tensors: not on how these came about."""

_NO_MEMORY = {Opcode.MULTIPLY, Opcode.DRAIN, Opcode.VECTOR, Opcode.STATE, Opcode.COMMIT, Opcode.NOP}


@dataclass(frozen=True)
class Images:
    """What a step is computed from: normalised images [N, C, H, W], labels [N], and the number of classes."""

    pixels: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: int


def load(settings: Settings) -> Images:
    """The images of all steps."""
    images, labels, classes = load_images(
        settings.data, image=settings.image, count=settings.batch * settings.steps, seed=settings.seed
    )
    return Images(normalise(images), labels, classes)


@dataclass
class GoldenStep:
    """The last of the settings' steps, by the golden model.

    Attributes
    ----------
    step : TrainingStep
    before, after : dict
        Tensors by name: what is in memory when the step begins (its images and the error of the logits, which are the
        host's, included), and what the chip must leave there.
    stored : dict
        FGMP states by which dynamic tensors of `before` are stored.
    used : dict
        FGMP states by which those of `after` are stored.
    records : dict
        What the chip's controller must write after it, by tensor.
    loss : float
    overflow : bool
        An error or gradient is infinite or NaN.
    """

    step: TrainingStep
    before: dict[str, Any]
    after: dict[str, Any]
    stored: dict[str, ControllerState]
    used: dict[str, ControllerState]
    records: dict[str, bytes]
    loss: float
    overflow: bool

    @classmethod
    def compute(cls, settings: Settings, config: ChipConfig, images: Images) -> "GoldenStep":
        """Compile the step and compute it, after those that come before it."""
        channels = images.pixels.shape[1]
        step, network = prepare(settings, config, channels, images.classes)
        state = network.initial_state(initial_parameters(settings, network, channels))
        batches = [slice(at * settings.batch, (at + 1) * settings.batch) for at in range(settings.steps)]
        for batch in batches[:-1]:
            network.train_step(state, images.pixels[batch], images.labels[batch])
        before: dict[str, Any] = {f"w.{name}": value for name, value in state.weights.items()}
        for name, value in state.parameters.items():
            before[f"master.{name}"] = value
            momentum = step.tensors[f"momentum.{name}"]
            before[f"momentum.{name}"] = (
                fgmp(state.momenta[name], momentum.policy) if isinstance(momentum, Tensor) else state.momenta[name]
            )
        for name, (mean, variance) in state.running.items():
            before[f"{name}.running_mean"], before[f"{name}.running_var"] = mean, variance

        def state_of(tensor: Tensor) -> ControllerState:
            policy = tensor.policy
            return ControllerState(policy.scale, policy.lo_bits, policy.hi_bits)

        used = {tensor.name: state.formats.get(tensor.name, state_of(tensor)) for tensor, _ in step.dynamic}
        stored = {
            tensor.name: replace(state_of(tensor), scale=before[tensor.name].scale)
            for tensor, _ in step.dynamic
            if tensor.name in before
        }
        result = network.train_step(state, images.pixels[batches[-1]], images.labels[batches[-1]])
        after = result.tensors
        for name in ("images", f"d.{step.graph.nodes[-1].name}"):
            before[name] = after.pop(name)
        records = {}
        for tensor, targets in step.dynamic:
            if tensor.name not in after:
                continue
            # What fills up blocks is stored too.
            blocks = tensor.lines * tensor.planes * -(-tensor.width // tensor.block_pixels)
            statistics = state.statistics[tensor.name]
            zeros = statistics.zero + BLOCK * blocks - after[tensor.name].codes.size
            controller = Controller(config.tensor_states)
            controller.state(tensor.state, used[tensor.name])
            controller.store(replace(statistics, zero=min(zeros, COUNT_MAX)))
            records[tensor.name] = controller.adapt(tensor.state, targets)
        return cls(step, before, after, stored, used, records, result.loss, result.overflow)

    def write(self, folder: Path) -> None:
        """Write the images of memory (see `BEFORE`), in files that are as large as the step's memory map."""
        folder.mkdir(parents=True, exist_ok=True)
        step = self.step
        for file, tensors in ((BEFORE, self.before), (AFTER, self.after)):
            memory = np.memmap(folder / file, np.uint8, "w+", shape=(step.map.next,))
            host = Host(step.config, memory)
            for name, value in tensors.items():
                _write(step, host, name, value)
            if file == BEFORE:
                for program in (step.forward, step.backward, step.update):
                    code = np.frombuffer(program.encode(), np.uint8)
                    address = step.address(program)
                    memory[address : address + len(code)] = code
            else:
                for name, record in self.records.items():
                    address = step.records[name]
                    memory[address : address + RECORD_BYTES] = np.frombuffer(record, np.uint8)
            memory.flush()


def _write(step: TrainingStep, host: Host, name: str, value: "Quantised | NDArray[np.float32]") -> None:
    """Put a tensor of the golden model where the chip has it."""
    tensor = step.tensors[name]
    if isinstance(tensor, Tensor):
        assert isinstance(value, Quantised)
        (host.write_weight if tensor.is_weight else host.write)(tensor, value)
    else:
        assert isinstance(value, np.ndarray)
        if value.ndim == 4:
            host.write_master(tensor, value, step.weights[name.partition(".")[2]].weight.width)
        elif value.ndim == 2:
            write_raw(host.memory, tensor, value)
        else:
            host.write_vector(tensor, value)


class _Keys:
    """Identifies results of segments by all that they depend on: sources, chip, commands, tensors before and after."""

    def __init__(self, golden_step: GoldenStep) -> None:
        self._step = golden_step
        self._common = hashlib.sha256(json.dumps([_VERSION, asdict(golden_step.step.config)]).encode())
        add_sources(self._common, *_SOURCES, alone=_SOURCES_ALONE)
        self._contents: dict[tuple[str, bool], bytes] = {}

    def of(self, segment: Segment, commands: Sequence[Command]) -> str:
        """The key of a segment with these commands; wherever they are in memory."""
        digest = self._common.copy()
        anywhere = replace(segment, name="", address=0)
        digest.update(repr(anywhere).encode() + b"".join(command.encode() for command in commands))
        for operand in segment.reads:
            digest.update(self._content(operand.tensor.name, operand.updated))
        for tensor in segment.writes:
            digest.update(self._content(tensor.name, True))
        for name, _ in segment.records:
            digest.update(self._step.records[name])
        return digest.hexdigest()[:12]

    def _content(self, name: str, after: bool) -> bytes:
        """Hash of a tensor of the golden model."""
        if (name, after) not in self._contents:
            value = (self._step.after if after else self._step.before)[name]
            arrays: list[NDArray[Any]] = [value.bits, value.codes] if isinstance(value, Quantised) else [value]
            digest = hashlib.sha256(repr([value.scale] if isinstance(value, Quantised) else []).encode())
            for array in arrays:
                digest.update(repr((array.dtype.str, array.shape)).encode() + np.ascontiguousarray(array).tobytes())
            self._contents[name, after] = digest.digest()
        return self._contents[name, after]


class _Map:
    """Which tensor a command means."""

    def __init__(self, tensors: Mapping[str, Tensor | RawTensor]) -> None:
        self._tables = {tensor.table: name for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        raw = [(tensor.address, name, tensor) for name, tensor in tensors.items() if isinstance(tensor, RawTensor)]
        self._raw = sorted(raw, key=lambda entry: entry[0])
        self._addresses = [address for address, _, _ in self._raw]

    def name(self, command: Command) -> str:
        """Name of the tensor that a LOAD, STORE, LOAD_RAW or STORE_RAW transfers."""
        if "table" in command.fields:
            return self._tables[command.fields["table"]]
        address = command.fields["address"]
        _, name, tensor = self._raw[bisect_right(self._addresses, address) - 1]
        if not 0 <= address - tensor.address < tensor.rows * tensor.pitch:
            raise ValueError(f"{command.opcode.name} of address {address:#x}, where no tensor is")
        return name


@dataclass
class _Accesses:
    """What commands do to memory and to FGMP states: names of tensors, in the order of first use.

    `reads` are those that are read before they are written.
    """

    reads: dict[str, None]
    writes: dict[str, None]
    committed: set[int]
    named: set[int]
    records: list[int]

    @classmethod
    def of(cls, commands: Sequence[Command], tensors: _Map) -> "_Accesses":
        found = cls({}, {}, set(), set(), [])
        for command in commands:
            opcode, fields = command.opcode, command.fields
            for field in ("tensor", "tensor_a", "tensor_b", "tensor_out"):
                if fields.get(field):
                    found.named.add(int(fields[field]))
            if opcode in (Opcode.LOAD, Opcode.LOAD_RAW):
                if (name := tensors.name(command)) not in found.writes:
                    found.reads[name] = None
            elif opcode in (Opcode.STORE, Opcode.STORE_RAW):
                found.writes[tensors.name(command)] = None
            elif opcode is Opcode.COMMIT:
                found.committed.add(int(fields["tensor"]))
            elif opcode is Opcode.ADAPT:
                found.records.append(int(fields["address"]))
            elif opcode not in _NO_MEMORY:
                raise ValueError(f"{opcode.name} is no command of an operation")
        return found


def plan(golden_step: GoldenStep) -> list[Segment]:
    """All segments of the step's programs, in order. A segment's name has a key of all that its result depends on.

    Raises
    ------
    ValueError
        If a program does what segments cannot be cut from: a tensor that two of them write, that the golden model does
        not have, or that one reads in two FGMP states.
    """
    step = golden_step.step
    tensors, numbers = _Map(step.tensors), {tensor.state: tensor.name for tensor, _ in step.dynamic}
    record_names = {address: name for name, address in step.records.items()}
    keys = _Keys(golden_step)
    written: set[str] = set()
    committed: set[int] = set()
    segments: list[Segment] = []
    for name in ("forward", "backward", "update"):
        program: Program = getattr(step, name)
        places = [index for index, command in enumerate(program.commands) if command.opcode is Opcode.MARK]
        operations = step.operations(program)
        for index in range(1, len(places)):
            first, last, operation = places[index - 1] + 1, places[index], operations[index]
            title = f"{name} {operation.layer} {operation.phase}"
            found = _Accesses.of(program.commands[first:last], tensors)
            if set(found.writes) != set(operation.outputs):
                raise ValueError(f"{title} writes {', '.join(found.writes)}, not {', '.join(operation.outputs)}")
            for output in found.writes:
                if output in written or output not in golden_step.after:
                    raise ValueError(f"{title} writes {output}, of which there is no golden copy at that point")
            for source in found.reads:
                if source not in golden_step.before and source not in written:
                    raise ValueError(f"{title} reads {source}, which nothing has written yet")
            states = []
            for number in sorted(found.named):
                tensor = numbers[number]
                state = golden_step.used[tensor]
                if number not in committed | found.committed:
                    state = golden_step.stored[tensor]
                elif number in found.committed and tensor in found.reads and state != golden_step.stored.get(tensor):
                    raise ValueError(f"{title} reads {tensor} and stores it, in different FGMP states")
                states.append((number, state.scale, state.lo, state.hi))
            reads = tuple(Operand(step.tensors[source], source in written) for source in found.reads)
            writes = tuple(step.tensors[output] for output in found.writes)
            size = sum(_bytes(tensor) for tensor in (*(operand.tensor for operand in reads), *writes))
            segment = Segment(
                name="",
                title=title,
                program=name,
                layer=operation.layer,
                phase=operation.phase,
                address=step.address(program) + COMMAND_BYTES * first,
                count=last + 1 - first,
                marks=(program.marks[index - 1].address, program.marks[index].address),
                states=tuple(states),
                reads=reads,
                writes=writes,
                records=tuple((record_names[address], address) for address in found.records),
                macs_dense=operation.macs_dense,
                cost=operation.macs_dense / step.config.macs_fp16 + size / (2 * step.config.beat),
                shape=_shape(step, operation.layer),
            )
            key = keys.of(segment, program.commands[first : last + 1])
            named = f"{name}-{index:03}-{operation.layer}-{operation.phase}-{key}".replace(" ", "_")
            segments.append(replace(segment, name=named))
            written |= set(found.writes)
            committed |= found.committed
    return segments


def _bytes(tensor: Tensor | RawTensor) -> int:
    return tensor.rows * tensor.pitch if isinstance(tensor, RawTensor) else SLOT_BYTES * tensor.blocks


def _shape(step: TrainingStep, layer: str) -> tuple[int, ...] | None:
    """Input channels, height and width, outputs, kernel, stride and padding of a convolution or linear layer."""
    node = next((node for node in step.graph.nodes if node.name == layer), None)
    match node:
        case Conv():
            return (*step.graph.shapes[node.x], node.outputs, node.kernel, node.stride, node.padding)
        case Linear():
            return (*step.graph.shapes[node.x], node.outputs, 1, 1, 0)
    return None
