"""The host's side: tensors into and out of the chip's memory, and training steps.

What the host does: it encodes images and initial weights, computes the loss gradient of the logits, starts programs,
and reads results and counters. Everything else of a training step is computed by the chip.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from golden.fgmp import Quantised, fgmp
from golden.memory import SLOT_BYTES, TensorLayout
from golden.vector import loss_and_gradient
from lnpu.compiler.graph import Conv
from lnpu.compiler.layers import rounded
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import RawTensor, Tensor
from lnpu.compiler.tiles import float_bits
from lnpu.compiler.training import TrainingStep
from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Command
from lnpu.ctrl.counters import COUNTERS
from lnpu.loss_scaling import LossScaler

__all__ = [
    "Device", "Host", "Measurement", "Trainer", "block_lengths", "read_raw", "read_tensor", "to_blocks", "write_raw",
    "write_tensor",
]  # fmt: skip


STORED_NONFINITE = 2
"""Bit of the sticky flags: an infinite or NaN element was stored."""


class Device(Protocol):
    """A chip with its memory: the simulation, or anything else that runs programs."""

    @property
    def memory(self) -> NDArray[np.uint8]:
        """External memory, from address 0."""

    def run_program(self, address: int, commands: int) -> dict[str, int]:
        """Run a program that is in memory; returns at least ``flags``, the chip's sticky flags after it."""

    def clear_flags(self) -> None:
        """Clear the sticky flags."""


def _layout(tensor: Tensor, beat: int) -> TensorLayout:
    return TensorLayout(
        tensor.lines,
        tensor.width,
        tensor.channels,
        beat,
        image_lines=tensor.height,
        line_blocks=tensor.line_blocks,
        log2_run=tensor.log2_run,
    )


def _to_lines(tensor: Tensor, part: NDArray) -> NDArray:
    """[images, channels, height, width] as [lines, pixels, channels]."""
    shape = (tensor.images, tensor.channels, tensor.height, tensor.width)
    if part.shape != shape:
        raise ValueError(f"{tensor.name} must have shape {shape}, not {part.shape!r}")
    return np.ascontiguousarray(part.transpose(0, 2, 3, 1)).reshape(tensor.lines, tensor.width, tensor.channels)


def _host_lines(tensor: Tensor, part: NDArray) -> NDArray:
    """[lines, pixels, channels] of OIHW weights, their gradients and momenta, else of NCHW."""
    if tensor.is_weight:
        part = _to_pixels(part, tensor.width).transpose(2, 0, 1)[None]
    return _to_lines(tensor, part)


def to_blocks(tensor: Tensor, part: NDArray, beat: int) -> NDArray:
    """Patterns or codes of a tensor, OIHW of weights and their gradients, else NCHW, as blocks [blocks, 64]."""
    return _layout(tensor, beat).to_blocks(_host_lines(tensor, part))


def block_lengths(tensor: Tensor, value: Quantised, beat: int) -> NDArray[np.uint8]:
    """The length table of a tensor with this value, shaped as in `to_blocks`."""
    return _layout(tensor, beat).lengths(_host_lines(tensor, value.codes))


def write_tensor(memory: NDArray[np.uint8], tensor: Tensor, value: Quantised, beat: int) -> None:
    """Put a quantised tensor into memory.

    Parameters
    ----------
    value : Quantised
        Shape [images, channels, height, width].
    """
    slots, table = _layout(tensor, beat).pack(_to_lines(tensor, value.bits), _to_lines(tensor, value.codes))
    memory[tensor.slots : tensor.slots + len(slots)] = np.frombuffer(slots, np.uint8)
    memory[tensor.table : tensor.table + len(table)] = np.frombuffer(table, np.uint8)


def read_tensor(memory: NDArray[np.uint8], tensor: Tensor, beat: int) -> Quantised:
    """A tensor's elements and codes, [images, channels, height, width], as they are in memory.

    Raises
    ------
    golden.memory.DecodeError
        If a block is malformed, or was never written.
    """
    layout = _layout(tensor, beat)
    slots = memory[tensor.slots : tensor.slots + SLOT_BYTES * layout.blocks].tobytes()
    bits, codes = layout.unpack(slots, memory[tensor.table : tensor.table + layout.blocks].tobytes())
    shape = (tensor.images, tensor.height, tensor.width, tensor.channels)
    bits, codes = bits.reshape(shape).transpose(0, 3, 1, 2), codes.reshape(shape).transpose(0, 3, 1, 2)
    return Quantised(bits, codes, tensor.policy.scale, np.zeros(bits.shape, bool))


def write_raw(memory: NDArray[np.uint8], tensor: RawTensor, value: NDArray[np.float32]) -> None:
    """Put FP32 numbers [rows, channels] into memory, padded with zeros."""
    if value.shape != (tensor.rows, tensor.channels):
        raise ValueError(f"{tensor.name} must have shape {(tensor.rows, tensor.channels)}, not {value.shape!r}")
    padded = np.zeros((tensor.rows, tensor.padded), np.float32)
    padded[:, : tensor.channels] = value
    memory[tensor.address : tensor.address + padded.nbytes] = padded.reshape(-1).view(np.uint8)


def read_raw(memory: NDArray[np.uint8], tensor: RawTensor) -> NDArray[np.float32]:
    """FP32 numbers [rows, channels] from memory."""
    raw = memory[tensor.address : tensor.address + tensor.rows * tensor.pitch].copy()
    return raw.view(np.float32).reshape(tensor.rows, tensor.padded)[:, : tensor.channels]


def _to_pixels(weight: NDArray, padded: int) -> NDArray:
    """OIHW weights as [taps, input channels (padded), outputs]."""
    outputs, inputs, height, width = weight.shape
    pixels = np.zeros((height * width, padded, outputs), weight.dtype)
    pixels[:, :inputs] = weight.transpose(2, 3, 1, 0).reshape(height * width, inputs, outputs)
    return pixels


def _from_pixels(pixels: NDArray, shape: tuple[int, int, int, int]) -> NDArray:
    """Inverse of `_to_pixels`."""
    outputs, inputs, height, width = shape
    return pixels[:, :inputs].reshape(height, width, inputs, outputs).transpose(3, 2, 0, 1)


class Host:
    """Moves OIHW weights and NCHW activations between NumPy and a device's memory."""

    def __init__(self, config: ChipConfig, memory: NDArray[np.uint8]) -> None:
        self.beat, self.memory = config.beat, memory

    def write(self, tensor: Tensor, value: Quantised) -> None:
        """Activations or errors."""
        write_tensor(self.memory, tensor, value, self.beat)

    def read(self, tensor: Tensor) -> Quantised:
        """Activations or errors."""
        return read_tensor(self.memory, tensor, self.beat)

    def write_weight(self, tensor: Tensor, value: Quantised) -> None:
        """OIHW weights."""
        bits, codes = (_to_pixels(part, tensor.width).transpose(2, 0, 1)[None] for part in (value.bits, value.codes))
        self.write(tensor, Quantised(bits, codes, value.scale, np.zeros(bits.shape, bool)))

    def read_weight(self, tensor: Tensor, shape: tuple[int, int, int, int]) -> Quantised:
        """OIHW weights or weight gradients of this shape."""
        value = self.read(tensor)
        bits, codes = (_from_pixels(part[0].transpose(1, 2, 0), shape) for part in (value.bits, value.codes))
        return Quantised(bits, codes, value.scale, np.zeros(bits.shape, bool))

    def write_master(self, tensor: RawTensor, value: NDArray[np.float32], padded: int) -> None:
        """FP32 copies of OIHW weights whose input channels memory pads to `padded`."""
        write_raw(self.memory, tensor, _to_pixels(value, padded).reshape(tensor.rows, -1))

    def read_master(self, tensor: RawTensor, shape: tuple[int, int, int, int], padded: int) -> NDArray[np.float32]:
        """FP32 copies of OIHW weights of this shape."""
        outputs, _, height, width = shape
        return _from_pixels(read_raw(self.memory, tensor).reshape(height * width, padded, outputs), shape)

    def write_vector(self, tensor: RawTensor, value: NDArray[np.float32]) -> None:
        """A per-channel vector."""
        write_raw(self.memory, tensor, np.asarray(value, np.float32).reshape(1, -1))

    def read_vector(self, tensor: RawTensor) -> NDArray[np.float32]:
        """A per-channel vector."""
        return read_raw(self.memory, tensor)[0]


@dataclass(frozen=True)
class Measurement:
    """Counters of one operation of a program."""

    layer: str
    phase: str
    macs_dense: int
    outputs: tuple[str, ...]
    counters: dict[str, int]


class Trainer:
    """Runs the programs of a `TrainingStep` on a device.

    Parameters
    ----------
    step : TrainingStep
    device : Device
        Its memory must be as large as the step's map.
    progress : callable or None
        Called with a text when a program starts.
    scaler : LossScaler or None
        Chooses the loss scale of every step, and leaves out updates from gradients that overflowed. None: the loss
        scale of the step's optimiser, and always an update.
    """

    def __init__(
        self,
        step: TrainingStep,
        device: Device,
        progress: Callable[[str], None] | None = None,
        scaler: LossScaler | None = None,
    ) -> None:
        if len(device.memory) < step.map.next:
            raise ValueError(f"the device's memory must have {step.map.next} bytes, not {len(device.memory)}")
        self.step, self.device, self.scaler = step, device, scaler
        self.loss_scale = step.optimiser.loss_scale
        self.host = Host(step.config, device.memory)
        self.progress = progress or (lambda text: None)
        for program in (step.initial, step.forward, step.inference, step.backward, step.update):
            image = np.frombuffer(program.encode(), np.uint8)
            address = step.address(program)
            device.memory[address : address + len(image)] = image

    def weight_shape(self, name: str) -> tuple[int, int, int, int]:
        """OIHW shape of the weights of node `name`."""
        graph = self.step.graph
        node = next(node for node in graph.nodes if node.name == name)
        kernel = node.kernel if isinstance(node, Conv) else 1
        return graph.shapes[name][0], graph.shapes[node.x][0], kernel, kernel

    def load(self, parameters: dict[str, NDArray[np.float32]]) -> None:
        """Set initial parameters (momentum zero): OIHW weights by node name; "BN.gamma", "BN.beta", "FC.bias".

        Running statistics start at mean 0 and variance 1.
        """
        step, host = self.step, self.host
        expected = [*step.weights, *step.vectors]
        if wrong := set(expected) ^ set(parameters):
            raise ValueError(
                f"parameters must be {', '.join(expected)}; missing or unknown: {', '.join(sorted(wrong))}"
            )
        for name, weight in step.weights.items():
            value = np.asarray(parameters[name], np.float32)
            if value.shape != self.weight_shape(name):
                raise ValueError(f"{name} must have shape {self.weight_shape(name)}, not {value.shape!r}")
            host.write_master(weight.master, value, weight.weight.width)
            if isinstance(weight.momentum, Tensor):
                host.write_weight(weight.momentum, fgmp(np.zeros_like(value), weight.momentum.policy))
            else:
                host.write_master(weight.momentum, np.zeros_like(value), weight.weight.width)
            host.write_weight(weight.weight, fgmp(value, weight.weight.policy))
        for name, vector in step.vectors.items():
            host.write_vector(vector.master, parameters[name])
            host.write_vector(vector.momentum, np.zeros_like(parameters[name]))
        for norm in step.norms.values():
            channels = norm.running_mean.channels
            host.write_vector(norm.running_mean, np.zeros(channels, np.float32))
            host.write_vector(norm.running_var, np.ones(channels, np.float32))
        self._run(step.initial, "initial states")

    def forward(self, images: NDArray[np.float32], *, training: bool = True) -> NDArray[np.float32]:
        """Logits [batch, classes] of normalised images [batch, channels, height, width]; see `measurements`."""
        step = self.step
        tensor = step.encoded("images")
        self.host.write(tensor, fgmp(np.asarray(images, np.float32), tensor.policy))
        self.measurements = self._run(step.forward if training else step.inference, "feed-forward")
        return read_raw(self.device.memory, step.raw(step.graph.nodes[-1].name))

    def train(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
        """One training step; returns the loss. `measurements` then has all operations of the step."""
        step = self.step
        if self.scaler is not None:
            self._set_loss_scale(self.scaler.scale)
        logits = self.forward(images)
        measurements = self.measurements
        loss, gradient = loss_and_gradient(logits, labels)
        error = step.encoded(f"d.{step.graph.nodes[-1].name}")
        scaled = gradient * np.float32(self.loss_scale)
        self.host.write(error, fgmp(scaled.reshape(*scaled.shape, 1, 1), error.policy))
        if self.scaler is not None:
            self.device.clear_flags()
        measurements += self._run(step.backward, "back-propagation and weight gradients")
        if self.scaler is None or self.scaler.step(bool(self.flags & STORED_NONFINITE)):
            measurements += self._run(step.update, "update")
        self.measurements = measurements
        return loss

    def _set_loss_scale(self, scale: float) -> None:
        """Change the loss scale, which the update divides by: in the program that is in memory."""
        if scale == self.loss_scale:
            return
        self.loss_scale = scale
        update, memory = self.step.update, self.device.memory
        for index in update.loss_scalings:
            command = update.commands[index]
            command = Command(command.opcode, **command.fields | {"immediate_b": float_bits(rounded(1.0 / scale))})
            start = self.step.address(update) + COMMAND_BYTES * index
            memory[start : start + COMMAND_BYTES] = np.frombuffer(command.encode(), np.uint8)

    def _run(self, program: Program, text: str) -> list[Measurement]:
        self.progress(text)
        self.flags = self.device.run_program(self.step.address(program), len(program.commands))["flags"]
        measured = []
        before: dict[str, int] | None = None
        for mark, operation in zip(program.marks, self.step.operations(program), strict=True):
            raw = self.device.memory[mark.address : mark.address + 8 * len(COUNTERS)].copy().view(np.uint64)
            counters = dict(zip(COUNTERS, (int(word) for word in raw), strict=True))
            if before is not None:
                difference = {name: counters[name] - before[name] for name in COUNTERS}
                measured.append(
                    Measurement(
                        operation.layer, operation.phase, operation.macs_dense, tuple(operation.outputs), difference
                    )
                )
            before = counters
        return measured
