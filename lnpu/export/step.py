"""Training steps for a host in C: image of the memory before them, addresses as a C header, the check afterwards."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import golden.network
from golden.network import Layer
from lnpu.compiler.graph import BatchNorm, Conv, GlobalAveragePool, Graph, Linear, Relu
from lnpu.compiler.layers import Optimiser
from lnpu.compiler.policies import TARGETS, get_formats
from lnpu.compiler.training import TrainingStep
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

    Parameters
    ----------
    config : ChipConfig
    batch : int
        Images in the step.
    steps : int
        How often it is run, on the same images.
    formats : str
        "dynamic", "fgmp", "fp16" or "fp8", see `lnpu.compiler.policies`.
    seed : int
        Of the choice of images and the initial weights.

    Raises
    ------
    ValueError
        If `steps` is less than 1, or `formats` is none of these.
    """

    def __init__(
        self, config: ChipConfig, *, batch: int = 4, steps: int = 2, formats: str = "dynamic", seed: int = 0
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps!r}")
        self.steps = steps
        policies, targets = get_formats(formats), TARGETS.get(formats, {})
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
            config,
            graph,
            batch=batch,
            formats=policies,
            optimiser=Optimiser(0.05, 0.9, 1e-4, _LOSS_SCALE),
            targets=targets,
        )
        self.network = golden.network.Network(
            layers,
            golden.network.Formats(**{name: getattr(policies, name) for name in asdict(policies)}),
            golden.network.Hyperparameters(rate=0.05, momentum=0.9, decay=1e-4, loss_scale=_LOSS_SCALE),
            targets,
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
        """`lnpu_step.h`: where the programs, the logits and their error are, its format, and the labels."""
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
            "STEPS": self.steps,
            "BATCH": step.batch,
            "CLASSES": logits.channels,
            "LOGITS_ADDRESS": logits.address,
            "LOGITS_PITCH": logits.pitch,
            "ERROR_SLOTS": error.slots,
            "ERROR_TABLE": error.table,
            "ERROR_LINE_BLOCKS": error.line_blocks,
            "ERROR_LOG2_RUN": error.log2_run,
            "ERROR_LO": error.policy.lo_bits,
            "ERROR_HI": error.policy.hi_bits,
        }
        return "\n".join(
            [
                "/* The training step in memory.bin. Generated: do not edit. */",
                "#ifndef LNPU_STEP_H",
                "#define LNPU_STEP_H",
                "",
                *(f"#define LNPU_STEP_{name} {value}u" for name, value in numbers.items()),
                f"#define LNPU_STEP_LOSS_SCALE {_LOSS_SCALE}f",
                f"#define LNPU_STEP_ERROR_SCALE ({error.policy.scale})",
                f"#define LNPU_STEP_ERROR_BELOW FGMP_{error.policy.below.upper()}",
                f"#define LNPU_STEP_ERROR_ABOVE FGMP_{error.policy.above.upper()}",
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
        """Mismatching and all elements of every tensor in the memory after the last step, against the golden model.

        Raises
        ------
        ValueError
            If it is not `size` bytes.
        golden.memory.DecodeError
            If an encoded tensor is malformed, or was never written.
        """
        if len(memory) != self.size:
            raise ValueError(f"the memory after the step must be {self.size} bytes, not {len(memory)}")
        state = self.network.initial_state(self.parameters)
        for _ in range(self.steps):
            expected = self.network.train_step(state, self.pixels, self.labels)
        before = self.memory.copy()
        self.memory[:] = np.frombuffer(memory, np.uint8)
        try:
            return compare(self._trainer, expected.tensors)
        finally:
            self.memory[:] = before
