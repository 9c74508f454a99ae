"""What a training step of ResNet-18 does on a chip, with FGMP and zero skipping and without: numbers, not energies.

Four variants of the same schedule on the same chip, each with one thing more:

- `dense`: every element in FP16, none skipped, tensors in memory in plain FP16;
- `precision`: elements that FGMP stores in FP8 are computed in pairs;
- `skipping`: zeros are skipped (those that FGMP makes included);
- `fgmp`: tensors are encoded in memory. This is what the chip does.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import golden.network
from golden.fgmp import CODE_FP8, CODE_ZERO
from lnpu.compiler.cycles import Mix, predict_cycles
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.training import TrainingStep
from lnpu.config import ChipConfig
from lnpu.datasets import load_images, normalise
from lnpu.energy.counts import count_events, count_wakes
from lnpu.formats import TensorKind
from lnpu.train_step import Settings, Tables, prepare

__all__ = ["VARIANTS", "StepSettings", "measure_step"]

VARIANTS = ("dense", "precision", "skipping", "fgmp")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """A step, after `warm_up` steps of `warm_up_batch` images of the golden model; the rest as in `Settings`."""

    data: str | None = None
    width: int = 64
    image: int = 32
    batch: int = 16
    stem: str = "cifar"
    seed: int = 0
    rate: float = 0.01
    warm_up: int = 16
    warm_up_batch: int = 8


def measure_step(config: ChipConfig, settings: StepSettings) -> dict[str, Any]:
    """Events, cycles and memory access of the four variants, and what the tensors' elements are.

    Returns
    -------
    dict
        `variants`: of each, events as in `count_events`; by the model of cycles `cycles`, `core_cycles` in which cores
        are busy, `core_wakes` in which idle cores have a clock; `memory_bits` on the bus;
        `shares`: of the elements of activations, errors, weights and gradients, by what they are stored as.
    """
    count = settings.batch + settings.warm_up * settings.warm_up_batch
    images, labels, classes = load_images(settings.data, image=settings.image, count=count, seed=settings.seed)
    pixels = normalise(images)
    plain = Settings(
        width=settings.width, image=settings.image, batch=settings.batch, stem=settings.stem, rate=settings.rate,
        memory=64 << 30,
    )  # fmt: skip
    step, network = prepare(plain, config, pixels.shape[1], classes)
    state = network.initial_state(golden.network.initial_parameters(network.layers, pixels.shape[1], settings.seed))
    at = 0
    for _ in range(settings.warm_up):
        part = slice(at, at := at + settings.warm_up_batch)
        network.train_step(state, pixels[part], labels[part])
    before = {f"w.{name}": value for name, value in state.weights.items()}
    tensors = network.train_step(state, pixels[at:], labels[at:]).tensors
    encoded, raw = _traffic(step, before, tensors)
    variants = {}
    for name in VARIANTS:
        mixes = _mixes(step, before | tensors, precision=name != "dense", zeros=name in ("skipping", "fgmp"))
        events: Counter[str] = Counter()
        cycles = busy = wakes = 0.0
        for program in _programs(step):
            events.update(count_events(program, mixes))
            for segment, beats in zip(predict_cycles(program, mixes), count_wakes(program), strict=True):
                cycles += segment.cycles
                busy += segment.busy["cores"]
                # Up to a mark, beats and rows find cores as busy as these are on average.
                wakes += beats * max(0.0, 1 - segment.busy["cores"] / (config.cores * segment.cycles))
        variants[name] = dict(events) | {
            "cycles": cycles, "core_cycles": busy, "core_wakes": wakes,
            "memory_bits": encoded if name == "fgmp" else raw,
        }  # fmt: skip
    return {"variants": variants, "shares": _shares(step, tensors)}


def _programs(step: TrainingStep) -> tuple[Program, ...]:
    return step.forward, step.backward, step.update


def _mixes(step: TrainingStep, tensors: dict[str, Any], *, precision: bool, zeros: bool) -> dict[int, Mix]:
    """What the elements of the encoded tensors are, by their length tables."""
    mixes = {}
    for name, tensor in step.tensors.items():
        if not isinstance(tensor, Tensor) or name not in tensors:
            continue
        codes = tensors[name].codes
        nonzero = int((codes != CODE_ZERO).sum())
        fp8 = int((codes == CODE_FP8).sum()) / max(1, nonzero)
        mixes[tensor.table] = Mix.of(tensor, nonzero / codes.size if zeros else 1.0, fp8 if precision else 0.0)
    return mixes


def _traffic(step: TrainingStep, before: dict[str, Any], tensors: dict[str, Any]) -> tuple[int, int]:
    """Bits on the bus: as the chip does it, to the bit, and with all tensors in plain FP16."""
    tables = Tables(step)
    tables.write(before)
    encoded = raw = 0
    for _, traffic in tables.traffic(tensors):
        encoded += sum(traffic.read[kind] + traffic.write[kind] for kind in TensorKind)
        raw += sum(traffic.plain(kind) for kind in TensorKind)
    return encoded, raw


def _shares(step: TrainingStep, tensors: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, Counter[str]] = {}
    for name, tensor in step.tensors.items():
        if isinstance(tensor, Tensor) and name in tensors:
            codes = tensors[name].codes
            counts = found.setdefault(tensor.kind.name.lower(), Counter())
            zero, fp8 = int((codes == CODE_ZERO).sum()), int((codes == CODE_FP8).sum())
            counts.update({"zero": zero, "fp8": fp8, "fp16": codes.size - zero - fp8})
    return {kind: {name: n / sum(counts.values()) for name, n in counts.items()} for kind, counts in found.items()}
