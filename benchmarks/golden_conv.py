"""Speed of the golden model's exact convolutions: prints billions of multiply-adds a second for each phase.

python benchmarks/golden_conv.py [batch]
"""

import sys
import time
from collections.abc import Callable

import numpy as np

import golden

LAYERS = [  # name, channels, image, output channels, kernel, stride, padding (ResNet-18 on 32 x 32 and on 224 x 224)
    ("stem 3x3", 3, 32, 64, 3, 1, 1),
    ("64 3x3", 64, 32, 64, 3, 1, 1),
    ("128 3x3 /2", 64, 32, 128, 3, 2, 1),
    ("256 3x3", 256, 8, 256, 3, 1, 1),
    ("512 3x3", 512, 4, 512, 3, 1, 1),
    ("512 1x1 /2", 256, 8, 512, 1, 2, 0),
]


def best(function: Callable[[], object], repeats: int = 3) -> float:
    """Least time of some runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main(batch: int) -> None:
    """Print a line for each layer."""
    rng = np.random.default_rng(0)
    print(f"batch {batch}; GMAC/s of FF, BP, WG (FP16 data as in training: rectified x, small dy)")
    total, seconds = 0.0, 0.0
    for name, channels, size, outputs, kernel, stride, padding in LAYERS:
        x = np.maximum(rng.normal(size=(batch, channels, size, size)), 0).astype(np.float16)
        w = (rng.normal(size=(outputs, channels, kernel, kernel)) * (2 / channels / kernel**2) ** 0.5).astype(
            np.float16
        )
        out = golden.conv2d_output_shape(x.shape, w.shape, stride, padding)
        dy = golden.fgmp((rng.normal(size=out) * 1e-5).astype(np.float32), golden.Policy(scale=-14))
        macs = np.prod(out) * channels * kernel**2
        at = {"stride": stride, "padding": padding}
        times = [
            best(lambda x=x, w=w, at=at: golden.conv2d(x, w, **at)),
            best(lambda x=x, w=w, dy=dy, at=at: golden.conv2d_input_grad(dy, w, input_shape=x.shape, **at)),
            best(lambda x=x, k=kernel, dy=dy, at=at: golden.conv2d_weight_grad(x, dy, kernel_shape=(k, k), **at)),
        ]
        total, seconds = total + 3 * macs, seconds + sum(times)
        print(f"{name:12s}", *(f"{macs / one / 1e9:7.2f}" for one in times))
    print(f"all: {total / seconds / 1e9:.2f} GMAC/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
