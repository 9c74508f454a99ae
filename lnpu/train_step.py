"""`lnpu train-step`: training steps of ResNet-18 on the simulated chip, compared bit for bit with the golden model."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import golden.network
from golden.fgmp import CODE_FP8, CODE_FP16, CODE_ZERO, Quantised
from lnpu.compiler.graph import resnet18
from lnpu.compiler.layers import Optimiser
from lnpu.compiler.policies import TARGETS, get_formats
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import RawTensor, Tensor
from lnpu.compiler.traffic import Traffic, predict_traffic
from lnpu.compiler.training import TrainingStep
from lnpu.config import ChipConfig, get_config
from lnpu.datasets import load_images, normalise
from lnpu.driver import Measurement, Trainer, block_lengths, read_raw
from lnpu.formats import TensorKind
from lnpu.report import write_report
from lnpu.sim.simulator import Register, Simulator

__all__ = ["Settings", "Tables", "compare", "prepare", "read_back", "run"]

Progress = Callable[[str, float], None]
"""Called with what is going on and how much of it is done (0 to 1)."""

_UNCUT = 8.0
"""More standard deviations than any output of a batch norm is below its mean."""

_SLICE = 100_000
"""Cycles between two progress reports."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train, and how.

    Parameters
    ----------
    config : str
        Named configuration of the chip.
    data : str or None
        Images: None for scikit-learn's digits, else a path (see `lnpu.datasets.load_images`).
    width, image, batch, steps : int
        Channels of ResNet-18's first stage, height and width of the images, images a step, steps.
    stem : str
        "cifar" or "imagenet".
    formats : str
        "dynamic", "fgmp", "fp16" or "fp8", see `lnpu.compiler.policies`.
    dense : bool
        Batch norms begin with a beta of 8, so that no ReLU cuts anything: operands without zeros, to compare with.
    seed : int
        Of the parameters and of the order of the images.
    rate, momentum, decay, loss_scale : float
        SGD.
    stall : float
        Probability of a stall in each cycle of every AXI channel.
    memory : int
        Bytes of external memory.
    """

    config: str = "tiny"
    data: str | None = None
    width: int = 8
    image: int = 8
    batch: int = 16
    steps: int = 3
    stem: str = "cifar"
    formats: str = "dynamic"
    dense: bool = False
    seed: int = 0
    rate: float = 0.05
    momentum: float = 0.9
    decay: float = 1e-4
    loss_scale: float = 1024.0
    stall: float = 0.0
    memory: int = 256 << 20

    def __post_init__(self) -> None:
        for name in ("width", "image", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        if not self.rate > 0 or not self.loss_scale > 0:
            raise ValueError(f"rate and loss_scale must be positive, not {self.rate!r} and {self.loss_scale!r}")


class _Reporting:
    """A simulator that says how far its programs are."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.report: Callable[[float], None] = lambda part: None

    @property
    def memory(self) -> NDArray[np.uint8]:
        return self.simulator.memory

    def run_program(self, address: int, commands: int) -> dict[str, int]:
        simulator = self.simulator
        simulator.start_program(address, commands)
        while not simulator.interrupt:
            simulator.run(_SLICE)
            self.report(simulator.read_register(Register.ERROR_COMMAND) / commands)
        return simulator.finish_program()

    def clear_flags(self) -> None:
        self.simulator.clear_flags()


def read_back(trainer: Trainer, name: str, like: "Quantised | NDArray[np.float32]") -> Any:
    """A tensor of the chip's memory, in the shape of its golden twin `like`."""
    tensor = trainer.step.tensors[name]
    shape: Any = like.shape
    if isinstance(tensor, Tensor):
        if tensor.is_weight:
            return trainer.host.read_weight(tensor, shape)
        return trainer.host.read(tensor)
    if len(shape) == 4:
        weight = trainer.step.weights[name.split(".", 1)[1]].weight
        return trainer.host.read_master(tensor, shape, weight.width)
    return read_raw(trainer.host.memory, tensor).reshape(shape)


def compare(trainer: Trainer, tensors: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Mismatching and all elements of every golden tensor: value and code of encoded ones, 32 bits of FP32."""
    result = {}
    for name, expected in tensors.items():
        actual = read_back(trainer, name, expected)
        if isinstance(expected, Quantised):
            wrong = (actual.bits != expected.bits) | (actual.codes != expected.codes)
        else:
            wrong = actual.view(np.uint32) != np.ascontiguousarray(expected).view(np.uint32)
        result[name] = int(wrong.sum()), int(wrong.size)
    return result


def prepare(
    settings: Settings, config: ChipConfig, channels: int, classes: int
) -> tuple[TrainingStep, golden.network.Network]:
    """The compiled step and its golden model, for images of `channels` channels."""
    formats = get_formats(settings.formats)
    targets = TARGETS.get(settings.formats, {})
    step = TrainingStep(
        config,
        resnet18(width=settings.width, channels=channels, image=settings.image, classes=classes, stem=settings.stem),
        batch=settings.batch,
        formats=formats,
        optimiser=Optimiser(settings.rate, settings.momentum, settings.decay, settings.loss_scale),
        memory=settings.memory,
        targets=targets,
    )
    network = golden.network.Network(
        golden.network.resnet18(width=settings.width, classes=classes, stem=settings.stem),
        golden.network.Formats(**{name: getattr(formats, name) for name in asdict(formats)}),
        golden.network.Hyperparameters(
            rate=settings.rate, momentum=settings.momentum, decay=settings.decay, loss_scale=settings.loss_scale
        ),
        targets,
    )
    return step, network


def initial_parameters(settings: Settings, network: golden.network.Network, channels: int) -> dict[str, Any]:
    """What training begins with."""
    parameters = golden.network.initial_parameters(network.layers, channels, settings.seed)
    for name, value in parameters.items():
        if settings.dense and name.endswith(".beta"):
            value[:] = _UNCUT
    return parameters


def run(
    settings: Settings, directory: Path, progress: Progress | None = None, *, config: ChipConfig | None = None
) -> dict[str, Any]:
    """Train, compare, and write the report to `directory`.

    Parameters
    ----------
    config : ChipConfig or None
        Use this configuration instead of the named one.

    Returns
    -------
    dict
        The report, as in `report.json` (see `lnpu.report.write_report`), with `report`, the path of the page.
    """
    tell = progress or (lambda text, part: None)
    config = config or get_config(settings.config)
    images, labels, classes = load_images(
        settings.data, image=settings.image, count=settings.batch * settings.steps, seed=settings.seed
    )
    pixels = normalise(images)
    channels = pixels.shape[1]
    step, network = prepare(settings, config, channels, classes)
    parameters = initial_parameters(settings, network, channels)
    state = network.initial_state(parameters)

    tell("building the simulation", 0.0)
    size = -(-step.map.next // 4096) * 4096
    device = _Reporting(Simulator(config, size, stall=settings.stall, seed=settings.seed))
    tell("building the simulation", 1.0)
    trainer = Trainer(step, device)
    trainer.load(parameters)

    totals: dict[tuple[str, str], dict[str, int]] = {}
    steps: list[dict[str, Any]] = []
    precision: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("zero", "underflow", "fp8", "fp16"), 0))
    tables = Tables(step)
    tables.write({f"w.{name}": value for name, value in state.weights.items()})
    traffic: dict[str, int] = defaultdict(int)
    unpredicted = 0
    for number in range(settings.steps):
        part = slice(number * settings.batch, (number + 1) * settings.batch)
        tell(f"step {number + 1}: golden model", 0.0)
        expected = network.train_step(state, pixels[part], labels[part])
        tell(f"step {number + 1}: golden model", 1.0)

        def phase(text: str, number: int = number) -> None:
            label = f"step {number + 1}: {text}"
            tell(label, 0.0)
            device.report = partial(tell, label)

        trainer.progress = phase
        before = device.simulator.counters()
        loss = trainer.train(pixels[part], labels[part])
        tell(f"step {number + 1}: update", 1.0)
        after = device.simulator.counters()
        wrong = compare(trainer, expected.tensors)
        for name, bits in tables.predict(expected.tensors).items():
            traffic[name] += after[name] - before[name]
            unpredicted += abs(after[name] - before[name] - bits)
        _account(totals, trainer.measurements, wrong)
        _count_precision(precision, step, expected.tensors)
        steps.append(
            {
                "loss": loss,
                "golden_loss": expected.loss,
                "mismatches": sum(bad for bad, _ in wrong.values()),
                "elements": sum(count for _, count in wrong.values()),
                "cycles": sum(m.counters["cycles"] for m in trainer.measurements),
            }
        )
    report = _report(settings, config, step.graph.name, totals, steps, precision, traffic)
    report["ema_unpredicted_bits"] = unpredicted
    report["report"] = str(write_report(directory, report))
    return report


class Tables:
    """Predicts external memory access from the golden tensors: the lengths of their encoded blocks."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.lengths: dict[int, NDArray[np.uint8]] = {}
        """Length table of each tensor, by its address."""

    def write(self, tensors: dict[str, Any]) -> None:
        """Take the lengths of golden tensors."""
        for name, value in tensors.items():
            tensor = self.step.tensors[name]
            if isinstance(tensor, Tensor):
                self.lengths[tensor.table] = block_lengths(tensor, value, self.step.config.beat)

    def traffic(self, tensors: dict[str, Any]) -> list[tuple[Program, Traffic]]:
        """What each program of a step moves that leaves these tensors; weights are read as they were before."""
        weights = [weight.weight.table for weight in self.step.weights.values()]
        before = dict(self.lengths)
        self.write(tensors)
        after = self.lengths
        reads = after | {table: before[table] for table in weights}
        programs = (self.step.forward, self.step.backward, self.step.update)
        return [(program, predict_traffic(program, reads, after)) for program in programs]

    def predict(self, tensors: dict[str, Any]) -> dict[str, int]:
        """Bits of a step that leaves these tensors, by the names of the counters."""
        total: dict[str, int] = defaultdict(int)
        for _, traffic in self.traffic(tensors):
            for name, bits in traffic.counters().items():
                total[name] += bits
        return total


def _account(
    totals: dict[tuple[str, str], dict[str, int]], measurements: list[Measurement], wrong: dict[str, tuple[int, int]]
) -> None:
    """Add a step's counters and mismatches to the totals of each operation."""
    for measurement in measurements:
        total = totals.setdefault((measurement.layer, measurement.phase), defaultdict(int))
        total["macs_dense"] += measurement.macs_dense
        for name, value in measurement.counters.items():
            total[name] += value
        for name in measurement.outputs:
            bad, count = wrong[name]
            total["mismatches"] += bad
            total["elements"] += count


def _count_precision(precision: dict[str, dict[str, int]], step: TrainingStep, tensors: dict[str, Any]) -> None:
    for name, value in tensors.items():
        tensor = step.tensors[name]
        if isinstance(tensor, RawTensor) or not isinstance(value, Quantised):
            continue
        counts = precision[tensor.kind.name.lower()]
        underflow = int(value.underflow.sum())
        counts["underflow"] += underflow
        counts["zero"] += int((value.codes == CODE_ZERO).sum()) - underflow
        counts["fp8"] += int((value.codes == CODE_FP8).sum())
        counts["fp16"] += int((value.codes == CODE_FP16).sum())


def _report(
    settings: Settings,
    config: ChipConfig,
    network: str,
    totals: dict[tuple[str, str], dict[str, int]],
    steps: list[dict[str, Any]],
    precision: dict[str, dict[str, int]],
    traffic: dict[str, int],
) -> dict[str, Any]:
    """All figures of the report."""
    ops: list[dict[str, Any]] = []
    for (layer, phase), total in totals.items():
        ideal = config.ideal_cycles(total["mac16"], total["mac8"])
        ops.append(
            {
                "layer": layer,
                "phase": phase,
                **{name: total[name] for name in ("mismatches", "elements", "cycles", "macs_dense")},
                "macs_issued": total["mac16"] + total["mac8"],
                "utilization": ideal / total["cycles"] if total["cycles"] else 0.0,
                **{
                    name: total[name]
                    for name in ("core_busy", "mac16", "mac8", "skipped_zero", "skipped_padding", "load_busy")
                },
            }
        )
    overall: dict[str, int] = defaultdict(int)
    for total in totals.values():
        for name, value in total.items():
            overall[name] += value
    kinds = {}
    for kind in TensorKind:
        name = kind.name.lower()
        row = {
            key: traffic[f"{counter}_{name}"]
            for key, counter in (
                ("read", "read_bits"),
                ("write", "write_bits"),
                ("plain_read", "plain_read_bits"),
                ("plain_write", "plain_write_bits"),
            )
        }
        if kind in (TensorKind.PROGRAM, TensorKind.OTHER):  # commands and counters are the same in either format
            row |= {"plain_read": row["read"], "plain_write": row["write"]}
        if any(row.values()):
            kinds[name] = row
    return {
        "network": network,
        "config": config.name,
        "settings": asdict(settings),
        "chip": asdict(config),
        "mismatches": sum(step["mismatches"] for step in steps),
        "elements": sum(step["elements"] for step in steps),
        "cycles": overall["cycles"],
        "utilization": sum(op["utilization"] * op["cycles"] for op in ops) / max(1, overall["cycles"]),
        "skipped_zero": overall["skipped_zero"],
        "skipped_padding": overall["skipped_padding"],
        "ema_bits": {
            "fgmp": sum(row["read"] + row["write"] for row in kinds.values()),
            "fp16": sum(row["plain_read"] + row["plain_write"] for row in kinds.values()),
        },
        "ema_by_kind": kinds,
        "precision": {kind: dict(counts) for kind, counts in precision.items()},
        "steps": steps,
        "ops": ops,
    }
