"""What the benchmark runs: the cases and their sets."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from golden.conv import conv2d_output_shape
from lnpu.compiler.graph import Conv, Linear, resnet18
from lnpu.config import ChipConfig

__all__ = ["MASKS", "PHASES", "PROGRAMS", "SETS", "ZEROS", "Case", "Shape", "cases_of", "select"]

PHASES = ("ff", "bp", "wg")
"""Feed-forward, error back-propagation, weight gradient."""

SETS = ("small", "full")

ZEROS = ("random", "images", "bands", "mixed")
"""Where the zeros of the streamed operand are: each element by itself, or all elements of every second image, of every
second pair of lines, or of pairs of lines drawn by lot."""

PROGRAMS = ("compiled", "resident", "lockstep")
"""What runs: the compiled program; that, measured with operands on the chip up to the last product; that, with cores
that wait for each other after every step (see `lnpu.bench.rewrite`)."""

MASKS = ("", "random", "lines")
"""What a ReLU masks of a result of BP: nothing, every second element on average, or every second line."""

_FORMATS = ("fp16", "fp8")
_SPARSITIES = (0.5, 0.75, 0.9)
_PEAK_CYCLES = 200_000
_MOST_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a convolution with square images and kernels; a 1x1 one on a pixel is a fully connected layer."""

    batch: int = 1
    channels: int
    image: int = 1
    outputs: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0

    @property
    def x(self) -> tuple[int, int, int, int]:
        """Shape of the input, NCHW."""
        return self.batch, self.channels, self.image, self.image

    @property
    def w(self) -> tuple[int, int, int, int]:
        """Shape of the weights, OIHW."""
        return self.outputs, self.channels, self.kernel, self.kernel

    @property
    def dy(self) -> tuple[int, int, int, int]:
        """Shape of the output and of its error, NCHW."""
        return conv2d_output_shape(self.x, self.w, self.stride, self.padding)

    @property
    def linear(self) -> bool:
        """Whether it is a fully connected layer."""
        return self.image == self.kernel == 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a dense computation, those on the padding included; the same in every phase."""
        _, _, height, width = self.dy
        return self.batch * self.outputs * height * width * self.channels * self.kernel**2

    @property
    def name(self) -> str:
        """Name without the batch, for example 3x3s2-64-128-32px (stride 2, 64 channels, 128 outputs)."""
        if self.linear:
            return f"linear-{self.channels}-{self.outputs}"
        stride = f"s{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride}-{self.channels}-{self.outputs}-{self.image}px"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation of the benchmark.

    Parameters
    ----------
    group : str
        "layer" (of ResNet-18), "gemm", "memory" (bound by the bus), "balance" (zeros not evenly spread), "mask" (BP
        under a ReLU), or "tiny" (shapes smaller than the array).
    phase : str
        One of `PHASES`.
    shape : Shape
    streamed, resident : str
        Formats, "fp16" or "fp8", of the operand whose zeros are skipped (x; dy in BP) and of the other.
    sparsity : float
        Probability of a zero in the streamed operand.
    zeros : str
        One of `ZEROS`.
    mask : str
        One of `MASKS`.
    program : str
        One of `PROGRAMS`.
    seed : int
        Of the operands.
    """

    group: str
    phase: str
    shape: Shape
    streamed: str = "fp16"
    resident: str = "fp16"
    sparsity: float = 0.0
    zeros: str = "random"
    program: str = "compiled"
    mask: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique in its set."""
        formats = self.streamed if self.streamed == self.resident else f"{self.streamed}x{self.resident}"
        zeros = f"/z{100 * self.sparsity:.0f}" if self.sparsity else ""
        zeros += f"-{self.zeros}" if self.zeros != "random" else ""
        program = f"/{self.program}" if self.program != "compiled" else ""
        program += f"/masked-{self.mask}" if self.mask else ""
        return f"{self.group}/{self.shape.name}/{self.phase}/{formats}{zeros}/b{self.shape.batch}{program}"

    def peak_cycles(self, config: ChipConfig) -> float:
        """Cycles at peak that it is expected to need."""
        rate = 2 if self.streamed == "fp8" else 1
        return self.shape.macs * (1 - self.sparsity) / (rate * config.macs_fp16)


def cases_of(name: str, config: ChipConfig, batch: int | None = None) -> list[Case]:
    """The cases of a set, the cheapest first.

    Parameters
    ----------
    name : str
        One of `SETS`: "small" takes seconds on `tiny`, "full" an hour on `paper`.
    config : ChipConfig
        What they are to run on. It sets the batch of the layers in "full": the largest power of two up to 32 with
        which the layer takes at most 200,000 cycles at FP16 peak, or 1.
    batch : int or None
        Images of the layers instead.
    """
    if name not in SETS:
        raise ValueError(f"set must be one of {', '.join(SETS)}, not {name!r}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    cases = list(_small(batch) if name == "small" else _full(config, batch))
    return sorted(cases, key=lambda case: (case.peak_cycles(config), case.name))


def select(names: Iterable[str], only: str | None) -> list[str]:
    """The names in which the regular expression `only` is found; all without one."""
    found = list(names)
    if only is None:
        return found
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ValueError(f"--only must be a regular expression, not {only!r}: {error}") from None
    if chosen := [name for name in found if pattern.search(name)]:
        return chosen
    example = f", names are like {found[0]}" if found else ""
    raise ValueError(f"no case has {only!r} in its name{example}")


def _phases(group: str, shape: Shape, phases: Sequence[str] = PHASES, **options: Any) -> Iterator[Case]:
    for phase in phases:
        yield Case(group=group, phase=phase, shape=shape, **options)


def _dense(group: str, shape: Shape, phases: Sequence[str] = PHASES) -> Iterator[Case]:
    for format_ in _FORMATS:
        yield from _phases(group, shape, phases, streamed=format_, resident=format_)


def _sparse(shape: Shape) -> Iterator[Case]:
    for sparsity in _SPARSITIES:
        for format_ in _FORMATS:
            yield from _phases("layer", shape, streamed=format_, resident=format_, sparsity=sparsity)


def _balance(shape: Shape, phases: Sequence[str]) -> Iterator[Case]:
    for zeros in ZEROS:
        for program in ("compiled", "lockstep"):
            yield from _phases("balance", shape, phases, sparsity=0.5, zeros=zeros, program=program)


def _gemm(size: int) -> Iterator[Case]:
    shape = Shape(batch=size, channels=size, outputs=size)
    yield from _dense("gemm", shape, ("ff",))
    yield from _phases("gemm", shape, ("ff",), program="resident")


def _resnet18(width: int, image: int) -> list[Shape]:
    """The distinct convolutions of ResNet-18 and its fully connected layer, of a batch of 1."""
    graph = resnet18(width=width, channels=3, image=image)
    shapes = []
    for node in graph.nodes:
        if isinstance(node, Conv):
            channels, height, _ = graph.shapes[node.x]
            sizes = {"kernel": node.kernel, "stride": node.stride, "padding": node.padding}
            shapes.append(Shape(channels=channels, image=height, outputs=node.outputs, **sizes))
        elif isinstance(node, Linear):
            shapes.append(Shape(channels=graph.shapes[node.x][0], outputs=node.outputs))
    return list(dict.fromkeys(shapes))


def _images(shape: Shape, config: ChipConfig) -> int:
    images = _MOST_IMAGES
    while images > 1 and images * shape.macs > _PEAK_CYCLES * config.macs_fp16:
        images //= 2
    return images


def _full(config: ChipConfig, batch: int | None) -> Iterator[Case]:
    shapes = _resnet18(64, 32)
    for shape in shapes:
        layer = replace(shape, batch=batch or _images(shape, config))
        # Training needs no error of the images, before the first layer.
        yield from _dense("layer", layer, PHASES if shape != shapes[0] else ("ff", "wg"))
        if layer.channels == layer.outputs and layer.channels in (64, 256):
            yield from _sparse(layer)
    for size in (96, 192, 512):
        yield from _gemm(size)
    for shape in (
        Shape(channels=512, outputs=1000),
        Shape(channels=2048, outputs=512),
        Shape(channels=512, image=4, outputs=512, kernel=3, padding=1),
        Shape(channels=256, image=8, outputs=512, stride=2),
    ):
        yield from _dense("memory", shape)
    yield from _balance(Shape(batch=4, channels=64, image=32, outputs=64, kernel=3, padding=1), ("ff", "wg"))
    yield from _masked(Shape(batch=2, channels=64, image=32, outputs=64, kernel=3, padding=1))
    for outputs in (1, 2, 4, 8):
        yield from _phases("tiny", Shape(channels=64, image=16, outputs=outputs, kernel=3, padding=1))
    yield from _phases("tiny", Shape(channels=1, image=16, outputs=64, kernel=3, padding=1))
    yield from _phases("tiny", Shape(channels=64, image=8, outputs=64, kernel=3, padding=1))
    yield from _phases("tiny", Shape(batch=4, channels=64, image=1, outputs=64, kernel=3, padding=1))
    yield from _phases("tiny", Shape(batch=64, channels=1, outputs=64))
    yield from _phases("tiny", Shape(channels=512, outputs=512))


def _masked(shape: Shape) -> Iterator[Case]:
    for mask in MASKS:
        yield from _phases("mask", shape, ("bp",), mask=mask)


def _small(batch: int | None) -> Iterator[Case]:
    wide = Shape(batch=batch or 1, channels=32, image=16, outputs=32, kernel=3, padding=1)
    yield from _dense("layer", wide)
    yield from _phases("layer", wide, ("ff",), streamed="fp8", resident="fp16")
    for format_ in _FORMATS:
        yield from _phases("layer", wide, streamed=format_, resident=format_, sparsity=0.5)
    for sparsity in (0.75, 0.9):
        yield from _phases("layer", wide, ("ff", "wg"), sparsity=sparsity)
    plain = Shape(batch=batch or 2, channels=16, image=8, outputs=16, kernel=3, padding=1)
    yield from _phases("layer", replace(plain, outputs=32, stride=2))
    yield from _phases("layer", replace(plain, outputs=32, kernel=1, stride=2, padding=0))
    yield from _phases("layer", replace(plain, channels=3), ("ff", "wg"))
    yield from _phases("layer", Shape(batch=batch or 16, channels=64, outputs=10))
    yield from _gemm(24)
    yield from _phases("memory", Shape(channels=128, outputs=64), ("ff",))
    yield from _balance(replace(plain, batch=2, image=16), ("ff",))
    yield from _masked(replace(plain, batch=2, channels=8))
    yield from _phases("tiny", replace(plain, batch=1, outputs=1), ("ff",))
    yield from _phases("tiny", Shape(channels=64, outputs=64), ("bp",))
    yield from _phases("tiny", Shape(batch=4, channels=16, image=1, outputs=16, kernel=3, padding=1), ("wg",))
    yield from _phases("tiny", Shape(batch=16, channels=1, outputs=16), ("ff",))
