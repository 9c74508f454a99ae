"""Speed of the native simulation: multiply-adds and cycles a second while every core is busy.

python benchmarks/simulation.py [--config paper] [--cores N] [--repeats 3]

A dense FP16 convolution runs on the simulated chip; only `Simulator.run` is timed, on one processor core.
"""

import argparse
import time

import numpy as np

from lnpu.config import get_config
from lnpu.sim import Chip
from lnpu.sim.simulator import Simulator


class TimedSimulator(Simulator):
    """A simulator that adds up the time in `run`, and the cycles."""

    seconds = 0.0
    cycles = 0

    def run(self, max_cycles: int) -> int:
        start = time.perf_counter()
        used = super().run(max_cycles)
        self.seconds += time.perf_counter() - start
        self.cycles += used
        return used


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the native simulation")
    parser.add_argument("--config", default="paper")
    parser.add_argument("--cores", type=int, help="another number of cores than the configuration's")
    parser.add_argument("--repeats", type=int, default=3, help="the best one counts")
    arguments = parser.parse_args()
    config = get_config(arguments.config)
    if arguments.cores is not None:
        config = config.replace(name=f"{config.name}-{arguments.cores}", cores=arguments.cores)

    start = time.perf_counter()
    device = TimedSimulator(config)
    print(f"{config.name}: built or found in {time.perf_counter() - start:.0f} s", flush=True)
    chip = Chip(config, device=device)
    rng = np.random.default_rng(0)
    outputs = min(64, config.lanes)
    batch, size = (3, 32) if config.macs_fp16 > 64 else (1, 8)
    x = rng.normal(size=(batch, 64, size, size)).astype(np.float16)
    w = rng.normal(size=(outputs, 64, 3, 3)).astype(np.float16)
    for _ in range(arguments.repeats):
        device.seconds, device.cycles = 0.0, 0
        chip.conv2d(x, w, padding=1)
        counters, seconds = chip.counters, device.seconds
        macs = counters["mac16"] + counters["mac8"]
        busy = counters["core_busy"] / (config.cores * device.cycles)
        print(
            f"{macs / seconds / 1e6:6.2f} M MAC/s, {device.cycles / seconds:7.0f} cycles/s"
            f" ({macs / device.cycles:.0f} MACs a cycle, cores busy {busy:.0%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
