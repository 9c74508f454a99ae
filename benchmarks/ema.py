"""External memory access of a training step, from the golden model: no simulation, so any size will do.

python benchmarks/ema.py --config paper --width 64 --image 32 --batch 4 --steps 3 --formats dynamic [--data PATH]

The prediction is the one that `make train-step` checks against the chip's counters, bit for bit.
"""

import argparse
from collections import defaultdict
from dataclasses import asdict

import golden.network
from lnpu.compiler.graph import resnet18
from lnpu.compiler.layers import Optimiser
from lnpu.compiler.policies import TARGETS, get_formats
from lnpu.compiler.training import TrainingStep
from lnpu.config import get_config
from lnpu.datasets import load_images, normalise
from lnpu.formats import TensorKind
from lnpu.train_step import Tables


def main() -> None:
    parser = argparse.ArgumentParser(description="External memory access of a training step")
    parser.add_argument("--config", default="paper")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--formats", default="dynamic")
    parser.add_argument("--data")
    arguments = parser.parse_args()
    count = arguments.batch * arguments.steps
    images, labels, classes = load_images(arguments.data, image=arguments.image, count=count)
    pixels = normalise(images)
    formats, targets = get_formats(arguments.formats), TARGETS.get(arguments.formats, {})
    step = TrainingStep(
        get_config(arguments.config),
        resnet18(width=arguments.width, channels=pixels.shape[1], image=arguments.image, classes=classes),
        batch=arguments.batch,
        formats=formats,
        optimiser=Optimiser(0.05, 0.9, 1e-4, 1024.0),
        memory=4 << 30,
        targets=targets,
    )
    network = golden.network.Network(
        golden.network.resnet18(width=arguments.width, classes=classes),
        golden.network.Formats(**{name: getattr(formats, name) for name in asdict(formats)}),
        golden.network.Hyperparameters(rate=0.05, decay=1e-4, loss_scale=1024.0),
        targets,
    )
    state = network.initial_state(golden.network.initial_parameters(network.layers, pixels.shape[1]))
    tables = Tables(step)
    tables.write({f"w.{name}": value for name, value in state.weights.items()})
    for number in range(arguments.steps):
        part = slice(number * arguments.batch, (number + 1) * arguments.batch)
        result = network.train_step(state, pixels[part], labels[part])
        bits = tables.predict(result.tensors)
    print(f"step {arguments.steps} (loss {result.loss:.3f}), Mbit on the bus and in plain FP16:")
    total: dict[str, int] = defaultdict(int)
    for kind in TensorKind:
        name = kind.name.lower()
        fgmp = bits[f"read_bits_{name}"] + bits[f"write_bits_{name}"]
        plain = bits[f"plain_read_bits_{name}"] + bits[f"plain_write_bits_{name}"]
        if kind in (TensorKind.PROGRAM, TensorKind.OTHER):
            plain = fgmp
        total["fgmp"] += fgmp
        total["plain"] += plain
        if plain:
            print(f"  {name:<12} {fgmp / 1e6:10.2f} {plain / 1e6:10.2f} {fgmp / plain - 1:+8.1%}")
            if kind in (TensorKind.ACTIVATION, TensorKind.ERROR, TensorKind.WEIGHT):
                total["fgmp_three"] += fgmp
                total["plain_three"] += plain
    print(f"  activations, errors, weights {total['fgmp_three'] / total['plain_three'] - 1:+.1%}")
    fgmp, plain = total["fgmp"], total["plain"]
    print(f"  total        {fgmp / 1e6:10.2f} {plain / 1e6:10.2f} {fgmp / plain - 1:+8.1%}")


if __name__ == "__main__":
    main()
