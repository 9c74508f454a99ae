"""A training step for a host in C: image of the memory before it, addresses as a C header, and the check afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import golden.network
from golden.network import Layer
from lnpu.compiler.graph import BatchNorm, Conv, GlobalAveragePool, Graph, Linear, Relu
from lnpu.compiler.layers import Optimiser
from lnpu.compiler.training import Formats, TrainingStep
from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES
from lnpu.datasets import load_images, normalise
from lnpu.driver import Trainer
from lnpu.train_step import compare

__all__ = ["ExportedStep"]

_IMAGE, _CLASSES, _WIDTH, _LOSS_SCALE = 8, 10, 8, 1024.0
_PAGE = 4096


class _Memory:
    """A device that only has memory: programs are left for the host in C."""

    def __init__(self, size: int) -> None:
        self.memory = np.zeros(size, np.uint8)

    def run_program(self, address: int, commands: int) -> dict[str, int]:
        """Does nothing."""
        return {"flags": 0}

    def clear_flags(self) -> None:
        """Does nothing."""


class ExportedStep:
    """A step of a small network (convolution, batch norm, ReLU, average, linear) on scikit-learn's digits.

    All formats are static FP16, so that the host's encoder in C stays short.

    Parameters
    ----------
    config : ChipConfig
    batch : int
        Images in the step.
    seed : int
        Of the choice of images and the initial weights.
    """

    def __init__(self, config: ChipConfig, *, batch: int = 4, seed: int = 0) -> None:
        graph = Graph("digits", 1, _IMAGE, _IMAGE)
        x = graph.add(Conv("conv", "images", _WIDTH, 3, 1, 1))
        x = graph.add(Relu("relu", graph.add(BatchNorm("bn", x))))
        graph.add(Linear("fc", graph.add(GlobalAveragePool("pool", x)), _CLASSES))
        layers = [
            Layer(name="conv", op="conv", inputs=("images",), outputs=_WIDTH, kernel=3, stride=1, padding=1),
            Layer(name="bn", op="batch_norm", inputs=("conv",)),
            Layer(name="relu", op="relu", inputs=("bn",)),
            Layer(name="pool", op="global_average_pool", inputs=("relu",)),
            Layer(name="fc", op="linear", inputs=("pool",), outputs=_CLASSES),
        ]
        images, self.labels, _ = load_images(None, image=_IMAGE, count=batch, seed=seed)
        self.pixels = normalise(images)
        self.step = TrainingStep(
            config, graph, batch=batch, formats=Formats(), optimiser=Optimiser(0.05, 0.9, 1e-4, _LOSS_SCALE)
        )
        self.network = golden.network.Network(
            layers,
            golden.network.Formats(),
            golden.network.Hyperparameters(rate=0.05, momentum=0.9, decay=1e-4, loss_scale=_LOSS_SCALE),
        )
        self.parameters = golden.network.initial_parameters(layers, 1, seed)
        self.scratch = -(-self.step.map.next // COMMAND_BYTES) * COMMAND_BYTES
        self.size = -(-(self.scratch + _PAGE) // _PAGE) * _PAGE
        """Bytes of memory that the step needs, a page for the host's own programs included."""
        self._trainer = Trainer(self.step, _Memory(self.size))
        self._trainer.load(self.parameters)
        images_tensor = self.step.encoded("images")
        self._trainer.host.write(images_tensor, golden.fgmp(self.pixels, images_tensor.policy))

    @property
    def memory(self) -> NDArray[np.uint8]:
        """Programs, encoded images, initial parameters."""
        return self._trainer.device.memory

    def header(self) -> str:
        """`lnpu_step.h`: where the programs, the logits and their error are, and the labels."""
        step = self.step
        logits, error = step.raw("fc"), step.encoded("d.fc")
        numbers: dict[str, Any] = {"MEMORY_BYTES": self.size, "SCRATCH": self.scratch}
        for name in ("initial", "forward", "backward", "update"):
            program = getattr(step, name)
            numbers |= {
                f"{name.upper()}_ADDRESS": step.address(program),
                f"{name.upper()}_COMMANDS": len(program.commands),
            }
        numbers |= {
            "BATCH": step.batch,
            "CLASSES": logits.channels,
            "LOGITS_ADDRESS": logits.address,
            "LOGITS_PITCH": logits.pitch,
            "ERROR_SLOTS": error.slots,
            "ERROR_TABLE": error.table,
            "ERROR_LINE_BLOCKS": error.line_blocks,
            "ERROR_LOG2_RUN": error.log2_run,
        }
        return "\n".join(
            [
                "/* A training step in memory.bin. Generated: do not edit. */",
                "#ifndef LNPU_STEP_H",
                "#define LNPU_STEP_H",
                "",
                *(f"#define LNPU_STEP_{name} {value}u" for name, value in numbers.items()),
                f"#define LNPU_STEP_LOSS_SCALE {_LOSS_SCALE}f",
                f"#define LNPU_STEP_LABELS {{{', '.join(str(label) for label in self.labels)}}}",
                "",
                "#endif",
                "",
            ]
        )

    def write(self, directory: Path) -> list[Path]:
        """Write `memory.bin` and `lnpu_step.h`."""
        directory.mkdir(parents=True, exist_ok=True)
        image, header = directory / "memory.bin", directory / "lnpu_step.h"
        image.write_bytes(self.memory.tobytes())
        header.write_text(self.header())
        return [image, header]

    def check(self, memory: bytes) -> dict[str, tuple[int, int]]:
        """Mismatching and all elements of every tensor in the memory after the step, against the golden model.

        Raises
        ------
        ValueError
            If it is not `size` bytes.
        golden.memory.DecodeError
            If an encoded tensor is malformed, or was never written.
        """
        if len(memory) != self.size:
            raise ValueError(f"the memory after the step must be {self.size} bytes, not {len(memory)}")
        expected = self.network.train_step(self.network.initial_state(self.parameters), self.pixels, self.labels)
        before = self.memory.copy()
        self.memory[:] = np.frombuffer(memory, np.uint8)
        try:
            return compare(self._trainer, expected.tensors)
        finally:
            self.memory[:] = before
