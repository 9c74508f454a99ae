"""External memory access (EMA) of a training step, from the golden model: no simulation, so any size will do.

python benchmarks/ema.py --config paper --width 64 --image 32 --batch 32 [--stem imagenet] [--data PATH] [--json FILE]

The prediction is the one that `make train-step` checks against the chip's counters, bit for bit. The baseline is the
same schedule in plain FP16 (FP32 where the chip keeps FP32). What is saved is told apart by its cause:

- precision: a byte for each element in FP8, less the precision masks;
- zeros: two bytes for each zero, less the non-zero masks;
- overhead (a loss): headers, length tables, parts of AXI words and of blocks that were not asked for;
- fusion, on top of the baseline: passes over memory, in plain FP16, that a chip would take that does batch norm
  statistics, sums, ReLU and its mask one by one.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import golden.network
from golden.fgmp import CODE_FP8, CODE_FP16, CODE_ZERO, Quantised
from golden.memory import block_parts
from lnpu.compiler.graph import ConvStage, GroupStage, LinearStage, PoolStage, resnet18
from lnpu.compiler.layers import Optimiser
from lnpu.compiler.policies import TARGETS, get_formats
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.training import TrainingStep
from lnpu.config import BLOCK, get_config
from lnpu.datasets import load_images, normalise
from lnpu.driver import to_blocks
from lnpu.formats import TensorKind
from lnpu.train_step import Tables

CAUSES = ("precision", "zeros", "overhead")


def fusion(step: TrainingStep) -> dict[str, int]:
    """Bits, by kind of tensor, that passes over memory would take which the compiler has fused into others."""
    bits: dict[str, int] = defaultdict(int)

    def elements(name: str) -> int:
        tensor = step.encoded(name)
        return tensor.images * tensor.height * tensor.width * tensor.padded

    uses: dict[str, int] = defaultdict(int)
    for stage in step.stages:
        for source in (stage.x, getattr(stage, "other", None)):
            if source is not None:
                uses[source] += 1
        match stage:
            case ConvStage(norm=str()):
                bits["activation"] += 16 * elements(stage.name)  # statistics read y once more
            case GroupStage():
                parts = (stage.norm is not None) + (stage.other is not None) + stage.relu
                bits["activation"] += 2 * 16 * (parts - 1) * elements(stage.name)  # each part writes, the next reads
    for stage in step.stages:
        if isinstance(stage, (GroupStage, PoolStage)):
            # Each sum of errors, and the ReLU mask, would be a pass that reads what the one before wrote.
            passes = uses[stage.name] - 1 + (isinstance(stage, GroupStage) and stage.relu)
            bits["error"] += 2 * 16 * max(0, passes) * elements(stage.name)
        if isinstance(stage, LinearStage):
            bits["other"] += 2 * 32 * step.raw(stage.name).rows * step.raw(stage.name).padded  # bias
    return bits


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps, then count one."""
    count = arguments.batch + arguments.warm_up * arguments.warm_up_batch
    images, labels, classes = load_images(arguments.data, image=arguments.image, count=count)
    pixels = normalise(images)
    formats, targets = get_formats(arguments.formats), TARGETS.get(arguments.formats, {})
    config = get_config(arguments.config).replace(acc_bits=arguments.acc_bits)
    step = TrainingStep(
        config,
        resnet18(
            width=arguments.width,
            channels=pixels.shape[1],
            image=arguments.image,
            classes=classes,
            stem=arguments.stem,
        ),
        batch=arguments.batch,
        formats=formats,
        optimiser=Optimiser(arguments.rate, 0.9, 5e-4, 1024.0),
        memory=64 << 30,
        targets=targets,
    )
    network = golden.network.Network(
        golden.network.resnet18(width=arguments.width, classes=classes, stem=arguments.stem),
        golden.network.Formats(**{name: getattr(formats, name) for name in asdict(formats)}),
        golden.network.Hyperparameters(rate=arguments.rate, decay=5e-4, loss_scale=1024.0),
        targets,
    )
    state = network.initial_state(golden.network.initial_parameters(network.layers, pixels.shape[1]))
    at = 0
    for number in range(arguments.warm_up):
        part = slice(at, at := at + arguments.warm_up_batch)
        loss = network.train_step(state, pixels[part], labels[part]).loss
        print(f"warm-up step {number + 1}: loss {loss:.3f}", flush=True)
    before = {f"w.{name}": value for name, value in state.weights.items()}
    result = network.train_step(state, pixels[at:], labels[at:])
    print(f"step of {arguments.batch} images: loss {result.loss:.3f}", flush=True)
    return {
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("data", "json")},
        "sram_kbytes": config.sram_bytes / 1024,
        **account(step, before, result.tensors),
    }


def account(step: TrainingStep, before: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Bits by kind of tensor: on the bus, plain, and saved by each cause.

    Parameters
    ----------
    before : dict
        Weights [OIHW] at the start of the step.
    tensors : dict
        Every tensor that the step left, as `golden.network.StepResult` has them.
    """
    tables = Tables(step)
    tables.write(before)
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    plain_bits: dict[str, int] = defaultdict(int)
    preactivations = {stage.name for stage in step.stages if isinstance(stage, ConvStage)}
    for program, traffic in tables.traffic(tensors):
        for kind in TensorKind:
            entry = kinds[kind.name.lower()]
            entry["read"] += traffic.read[kind]
            entry["write"] += traffic.write[kind]
            plain = traffic.plain(kind)
            entry["plain"] += plain
            if kind not in (TensorKind.ACTIVATION, TensorKind.ERROR, TensorKind.WEIGHT, TensorKind.GRADIENT):
                plain_bits[kind.name.lower()] += plain
        for name, tensor in step.tensors.items():
            if not isinstance(tensor, Tensor) or tensor.table not in traffic.blocks or name not in tensors:
                continue
            # Weights are those of before, but for the update, which writes the new ones.
            values = before if name in before and program is not step.update else tensors
            times = traffic.blocks[tensor.table]
            codes = to_blocks(tensor, values[name].codes, step.config.beat)
            mask, precisions, payload = block_parts(codes)
            nonzeros = np.count_nonzero(codes, axis=1)
            plain_bits["preactivation" if name in preactivations else tensor.kind.name.lower()] += (
                16 * BLOCK * int(times.sum())
            )
            entry = kinds[tensor.kind.name.lower()]
            entry["precision"] += 8 * int(times @ (2 * nonzeros - payload - precisions))
            entry["zeros"] += 8 * int(times @ (2 * (BLOCK - nonzeros) - mask))
    for name, value in tensors.items():
        if isinstance(value, Quantised):
            entry = counts[step.encoded(name).kind.name.lower()]
            entry["underflow"] += int(value.underflow.sum())
            entry["zero"] += int((value.codes == CODE_ZERO).sum()) - int(value.underflow.sum())
            entry["fp8"] += int((value.codes == CODE_FP8).sum())
            entry["fp16"] += int((value.codes == CODE_FP16).sum())
    for entry in kinds.values():
        entry["bus"] = entry["read"] + entry["write"]
        entry["overhead"] = entry["bus"] - entry["plain"] + entry["precision"] + entry["zeros"]
    unfused = fusion(step)
    return {
        "kinds": {name: dict(entry) for name, entry in kinds.items()},
        "fusion": dict(unfused),
        "elements": {name: dict(entry) for name, entry in counts.items()},
        # Preactivations apart from activations: what `lnpu fgmp-study --ema` takes.
        "plain_bits": dict(plain_bits),
    }


def print_table(report: dict[str, Any]) -> None:
    """Mbit by kind, and what was saved by what, in percent of plain."""
    print(
        f"{'Mbit':<14}{'bus':>10}{'plain':>10}{'saved':>9}" + "".join(f"{cause:>11}" for cause in CAUSES) + "  elements"
    )
    kinds = {name: entry for name, entry in report["kinds"].items() if entry["plain"]}
    three = [name for name in ("activation", "error", "weight") if name in kinds]

    def line(name: str, parts: list[str]) -> None:
        total: dict[str, int] = defaultdict(int)
        for part in parts:
            for key, bits in kinds[part].items():
                total[key] += bits
        elements = report["elements"].get(name, {})
        shares = [f"{key} {bits / sum(elements.values()):.1%}" for key, bits in elements.items()]
        plain = total["plain"]
        print(
            f"{name:<14}{total['bus'] / 1e6:10.1f}{plain / 1e6:10.1f}{1 - total['bus'] / plain:9.1%}"
            f"{total['precision'] / plain:11.1%}{total['zeros'] / plain:11.1%}{-total['overhead'] / plain:11.1%}  "
            + ", ".join(shares)
        )

    for name in kinds:
        line(name, [name])
    line("act+err+weight", three)
    line("all", list(kinds))
    bus, plain = (sum(entry[key] for entry in kinds.values()) for key in ("bus", "plain"))
    fused = sum(report["fusion"].values())
    print(
        f"fusion has avoided {fused / 1e6:.1f} Mbit more: {1 - bus / (plain + fused):.1%} less than unfused plain FP16"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="External memory access of a training step")
    parser.add_argument("--config", default="paper")
    parser.add_argument("--acc-bits", type=int, default=97, help="100 for batches of 224x224 images")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--stem", default="cifar")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=16, help="training steps before the one that counts")
    parser.add_argument("--warm-up-batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--formats", default="dynamic")
    parser.add_argument("--data")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments)
    print_table(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
