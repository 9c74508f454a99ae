"""Cycles of the cores against sparsity and precision, on the simulated chip.

python benchmarks/zero_skipping.py [config]

A 3x3 convolution of 32 channels on a 16x16 image, in the three phases. `ideal`: non-zero products over the peak rate of
their precision; `cores`: cycles in which the cores were busy, `total`: cycles of the whole operation with loads, drains
and stores. Utilisation is ideal / cores.
"""

import sys

import numpy as np

from lnpu.sim import Chip


def main() -> None:
    chip = Chip(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    config = chip.config
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 32, 3, 3)).astype(np.float16)
    dense = rng.standard_normal((1, 32, 16, 16)).astype(np.float16)
    print("phase  format  zeros     ideal     cores     total  utilisation")
    for phase in ("ff", "bp", "wg"):
        for streamed in ("fp16", "fp8"):
            for sparsity in (0.0, 0.5, 0.75, 0.9):
                x = np.where(rng.random(dense.shape) < sparsity, np.float16(0), dense)
                if phase == "ff":
                    chip.conv2d(x, w, padding=1, x_format=streamed)
                elif phase == "bp":
                    chip.conv2d_input_grad(x, w, input_shape=x.shape, padding=1, dy_format=streamed)
                else:
                    chip.conv2d_weight_grad(x, dense, kernel_shape=(3, 3), padding=1, x_format=streamed)
                counters = chip.counters
                ideal = (counters["mac16"] + counters["mac8"] / 2) / config.macs_fp16
                cores = counters["core_busy"] / config.cores
                print(
                    f"{phase:<6} {streamed:<6} {sparsity:6.0%} {ideal:9.0f} {cores:9.0f} {counters['cycles']:9d} "
                    f"{ideal / cores:12.1%}"
                )


if __name__ == "__main__":
    main()
