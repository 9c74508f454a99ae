"""How the cost of a training step grows, by the models of cycles and of memory access: no simulation.

python benchmarks/scaling.py [--measure] [--json FILE] [--png FILE] [--width 64 --image 32 --batch 16]

ResNet-18 with dynamic formats, against the size of the array, the batch, the width and the image, each with the other
three at their base. What elements are is assumed (`ASSUMED`); see `docs/scaling.md`. `--measure` instead simulates
small steps on small chips and compares them with the model.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

import golden.network
from golden.fgmp import CODE_FP8, CODE_ZERO
from lnpu.compiler.cycles import Mix, Segment, predict_cycles
from lnpu.compiler.graph import resnet18
from lnpu.compiler.layers import Optimiser
from lnpu.compiler.policies import TARGETS, get_formats
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.training import TrainingStep
from lnpu.config import PAPER, TINY, ChipConfig
from lnpu.datasets import load_images, normalise
from lnpu.driver import Trainer
from lnpu.formats import TensorKind
from lnpu.page import GRID, new_figure, picture
from lnpu.sim.simulator import Simulator
from lnpu.train_step import Settings, prepare

PHASES = ("ff", "bp", "wg", "vector", "update")
LATENCY = 8
ASSUMED = {"activation": 0.55, "error": 0.7}
"""Shares of elements that are not zero, of outputs of ReLU and of errors; all others are not zero. All are FP8."""

SMALL = (TINY, TINY.replace(name="narrow", cores=4, lanes=16, beat=8, axi_bits=128))
"""16 and 64 MACs: what is simulated."""

MEASURED = ((8, 8, 4), (8, 8, 16), (16, 8, 4), (8, 16, 4))
"""Width, image and batch of the steps that are simulated."""

ARRAYS = (
    PAPER.replace(name="4x16", cores=4, lanes=16),
    PAPER.replace(name="8x32", cores=8, lanes=32),
    PAPER,
    PAPER.replace(name="16x64", cores=16, lanes=64),
    PAPER.replace(name="16x128", cores=16, lanes=128),
)
"""64 to 2048 MACs, the most that `ChipConfig` allows; all other fields are those of `paper`."""

BATCHES, WIDTHS, IMAGES = (1, 2, 4, 8, 16, 32, 64), (8, 16, 32, 64), (16, 32, 64)

BINDING = {
    "cores": ("products", "#0072b2"),
    "load": ("LOAD", "#e69f00"),
    "load_dense": ("LOAD, dense", "#f0c75e"),
    "vector": ("vector unit", "#009e73"),
    "store": ("STORE", "#cc79a7"),
    "store_raw": ("STORE_RAW", "#8c4f74"),
    "drain": ("DRAIN", "#d55e00"),
    "issue": ("issue of commands", "#8c8c8c"),
}


class _Step(TrainingStep):
    """Without the program for inference, which takes long to compile."""

    def _inference(self, program: Program) -> None:
        pass


def mixes_of(step: TrainingStep) -> dict[int, Mix]:
    """What the tensors of a step are assumed to be, by the addresses of their length tables."""
    mixes = {}
    for name, tensor in step.tensors.items():
        if isinstance(tensor, Tensor):
            share = 1.0
            if name in step.relu:
                share = ASSUMED["activation"]
            elif tensor.kind is TensorKind.ERROR:
                share = ASSUMED["error"]
            mixes[tensor.table] = Mix.of(tensor, share)
    return mixes


def measure(config: ChipConfig, *, width: int, image: int, batch: int) -> dict[str, Any]:
    """Cost of a training step; cycles, words and bits are an image's."""
    step = _Step(
        config,
        resnet18(width=width, channels=3, image=image, classes=10),
        batch=batch,
        formats=get_formats("dynamic"),
        optimiser=Optimiser(0.01, 0.9, 5e-4, 1024.0),
        memory=64 << 30,
        targets=TARGETS["dynamic"],
    )
    programs = (step.forward, step.backward, step.update)
    mixes = mixes_of(step)
    segments = [part for program in programs for part in predict_cycles(program, mixes, latency=LATENCY)]
    return {"config": config.name, "macs": config.macs_fp16, "width": width, "image": image, "batch": batch} | _summary(
        config, segments, batch
    )


def _summary(config: ChipConfig, segments: Sequence[Segment], batch: int) -> dict[str, Any]:
    phases: dict[str, list[Segment]] = defaultdict(list)
    for part in segments:
        phases[part.phase if part.phase in PHASES else "vector"].append(part)
    cycles = sum(part.cycles for part in segments)
    waits = {name: sum(part.waits[name] for part in segments) / cycles for name in BINDING}
    waits["issue"] += sum(part.waits["fgmp"] for part in segments) / cycles
    words = sum(part.read_words + part.write_words for part in segments)
    return {
        "sram_kbytes": round(config.sram_bytes / 1024, 1),
        "commands": sum(part.commands for part in segments),
        "cycles": round(cycles / batch),
        "ideal": round(sum(part.ideal for part in segments) / batch),
        "utilisation": round(sum(part.ideal for part in segments) / cycles, 4),
        "bus_bits": round(words * config.axi_bits / batch),
        "bus_share": round(words / cycles, 4),
        "phases": {
            name: {
                "cycles": round(sum(part.cycles for part in phases[name]) / batch),
                "commands": round(sum(part.commands for part in phases[name]) / batch),
                "bus_bits": round(
                    sum(part.read_words + part.write_words for part in phases[name]) * config.axi_bits / batch
                ),
                "waits": {unit: round(sum(part.waits[unit] for part in phases[name]) / batch) for unit in BINDING},
            }
            for name in PHASES
        },
        "waits": {name: round(share, 4) for name, share in waits.items()},
        "busy": {
            name: round(
                sum(part.busy[name] for part in segments) / cycles / (config.cores if name == "cores" else 1), 4
            )
            for name in BINDING
        },
    }


def check(config: ChipConfig, *, width: int, image: int, batch: int) -> dict[str, Any]:
    """The second training step on digits, simulated, and what the model says with what its tensors are."""
    settings = Settings(width=width, image=image, batch=batch)
    images, labels, classes = load_images(None, image=image, count=2 * batch, seed=0)
    pixels = normalise(images)
    step, network = prepare(settings, config, pixels.shape[1], classes)
    parameters = golden.network.initial_parameters(network.layers, pixels.shape[1], 0)
    state = network.initial_state(parameters)
    size = -(-step.map.next // 4096) * 4096
    trainer = Trainer(step, Simulator(config, size, latency=LATENCY))
    trainer.load(parameters)
    mixes: dict[int, Mix] = {}
    for part in (slice(batch), slice(batch, 2 * batch)):
        tensors = network.train_step(state, pixels[part], labels[part]).tensors
        trainer.train(pixels[part], labels[part])
        for name, value in tensors.items():
            tensor = step.tensors[name]
            if isinstance(tensor, Tensor):
                nonzero = (value.codes != CODE_ZERO).sum()
                fp8 = (value.codes == CODE_FP8).sum() / max(1, nonzero)
                mixes[tensor.table] = Mix.of(tensor, float(nonzero / value.codes.size), float(fp8))
    found = [(entry.phase, entry.counters) for entry in trainer.measurements]
    programs = (step.forward, step.backward, step.update)
    parts = [part for program in programs for part in predict_cycles(program, mixes, latency=LATENCY)]
    parts = [part for part in parts if part.phase != "end" and part.layer != "start"]
    phases = {}
    for name in PHASES:
        measured = sum(counters["cycles"] for phase, counters in found if phase == name)
        modelled = sum(part.cycles for part in parts if part.phase == name)
        phases[name] = {"measured": measured, "modelled": round(modelled)}
    words = sum(counters["read_beats"] + counters["write_beats"] for _, counters in found)
    result: dict[str, Any] = {
        "config": config.name,
        "macs": config.macs_fp16,
        "width": width,
        "image": image,
        "batch": batch,
        "measured": sum(entry["measured"] for entry in phases.values()),
        "modelled": sum(entry["modelled"] for entry in phases.values()),
        "measured_words": words,
        "modelled_words": round(sum(part.read_words + part.write_words for part in parts)),
        "phases": phases,
    }
    error = result["modelled"] / result["measured"] - 1
    print(f"{config.name} {width} {image} {batch}: {result['measured']:,} cycles, model {error:+.1%}", flush=True)
    return result


def sweep(width: int, image: int, batch: int) -> dict[str, list[dict[str, Any]]]:
    """All points, by what varies."""
    known: dict[tuple, dict[str, Any]] = {}

    def point(config: ChipConfig = PAPER, **changes: int) -> dict[str, Any]:
        sizes = {"width": width, "image": image, "batch": batch} | changes
        key = (config.name, *sizes.values())
        if key not in known:
            started = time.perf_counter()
            found = known[key] = measure(config, **sizes)
            print(
                f"{config.name:8} {sizes}: {found['cycles']:,} cycles an image, {found['utilisation']:.1%} of ideal, "
                f"{found['bus_bits'] / 1e6:.1f} Mbit, {found['commands']:,} commands "
                f"({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
        return known[key]

    return {
        "array": [point(config) for config in ARRAYS],
        "batch": [point(batch=one) for one in BATCHES],
        "width": [point(width=one) for one in WIDTHS],
        "image": [point(image=one) for one in IMAGES],
    }


def _short(value: float, unit: str = "") -> str:
    """A number of at least a thousand, with a prefix."""
    limit, prefix = next(pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= pair[0] or pair[1] == "k")
    digits = 1 if value < 10 * limit else 0
    return f"{value / limit:.{digits}f}{' ' if unit else ''}{prefix}{unit}"


def _label(point: Mapping[str, Any], field: str) -> str:
    lines = [str(point[field]), _short(point["cycles"]), _short(point["bus_bits"], "bit")]
    if field == "macs":
        lines.append(_short(1024 * point["sram_kbytes"], "B"))
    return "\n".join(lines)


def spent(point: Mapping[str, Any]) -> dict[str, float]:
    """An image's cycles by what they are spent on: products (the cores' average), and what the others wait for.

    The cycles of convolutions beyond those of products are shared out in proportion to what their commands wait for.
    """
    waits = {name: dict.fromkeys(BINDING, 0.0) for name in ("products", "others")}
    for phase, entry in point["phases"].items():
        for name, cycles in entry["waits"].items():
            waits["products" if phase in ("ff", "bp", "wg") else "others"][name] += cycles
    products = point["busy"]["cores"] * point["cycles"]
    idle = max(0.0, sum(waits["products"].values()) - products)
    shares = waits["products"] | {"cores": 0.0}
    whole = sum(shares.values())
    found = {name: waits["others"][name] + idle * shares[name] / whole for name in BINDING}
    return found | {"cores": found["cores"] + products}


def _panel(axis: Axes, points: Sequence[Mapping[str, Any]], field: str, title: str) -> None:
    """Cycles as multiples of the ideal, by what they are spent on."""
    places = range(len(points))
    parts = [spent(point) for point in points]
    bottom = [0.0] * len(points)
    for name, (label, colour) in BINDING.items():
        heights = [part[name] / point["ideal"] for part, point in zip(parts, points, strict=True)]
        axis.bar(places, heights, 0.62, bottom=bottom, color=colour, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    top = max(bottom)
    for place, height, point in zip(places, bottom, points, strict=True):
        axis.annotate(
            f"{point['utilisation']:.0%}",
            (place, height),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )
    axis.axhline(1, color="#222222", linewidth=0.9, linestyle=":")
    axis.set_ylim(0, 1.12 * top)
    axis.set_xticks(
        places,
        [_label(point, field) for point in points],
        fontsize=8.5,
    )
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("cycles / ideal")
    axis.grid(axis="y", color=GRID)
    axis.set_axisbelow(True)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The figure: a panel for each of what varies."""
    base = report["base"]
    figure, axes = new_figure(7.4, columns=2, rows=2)
    fixed = {"array": "FP16 MACs a cycle", "batch": "images a step", "width": "width", "image": "image, pixels"}
    for axis, (name, title) in zip(axes, fixed.items(), strict=True):
        others = ", ".join(
            part
            for key, part in (
                ("array", "768 MACs"),
                ("batch", f"batch {base['batch']}"),
                ("width", f"width {base['width']}"),
                ("image", f"{base['image']}x{base['image']}"),
            )
            if key != name
        )
        _panel(axis, report["points"][name], "macs" if name == "array" else name, f"{title} ({others})")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(BINDING), frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(path, figure, 110)


def main() -> None:
    parser = argparse.ArgumentParser(description="How the cost of a training step grows")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path("docs/results/scaling/scaling.json"))
    parser.add_argument("--png", type=Path, default=Path("docs/results/scaling/scaling.png"))
    parser.add_argument("--measure", action="store_true", help="compare the model with the simulation (minutes)")
    parser.add_argument("--draw", action="store_true", help="only draw what the JSON file has")
    arguments = parser.parse_args()
    report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    if arguments.measure:
        report["measured"] = [
            check(config, width=width, image=image, batch=batch) for config in SMALL for width, image, batch in MEASURED
        ]
    elif not arguments.draw:
        base = {"width": arguments.width, "image": arguments.image, "batch": arguments.batch}
        report |= {"base": base, "latency": LATENCY, "nonzero": ASSUMED, "points": sweep(**base)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if "points" in report:
        draw(report, arguments.png)


if __name__ == "__main__":
    main()
