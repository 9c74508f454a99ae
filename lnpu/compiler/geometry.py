"""Geometry of convolutions: shapes, the phases of strided ones, and tiles.

The array knows only unit strides: every loop of a MULTIPLY moves the sparse row by a constant. A strided convolution is
cut into *phases*: every stride-th line and pixel of its large side forms a lattice, and between one phase's lattice and
the small side each tap is a constant offset. A fully connected layer is a 1x1 convolution on images of one pixel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = [
    "Axis",
    "Box",
    "Convolution",
    "Plan",
    "Taps",
    "backward_axes",
    "boxes_of",
    "by_phase",
    "cut",
    "forward_axes",
    "pairs_inside",
]

Taps = tuple[tuple[int, int], ...]
"""Taps (r, offset) of an axis, see `Axis`."""


@dataclass(frozen=True)
class Convolution:
    """Shape of a convolution: x [batch, channels, height, width], weights [outputs, channels, kernel...].

    Raises
    ------
    ValueError
        If a size is not positive, or the output would be empty.
    """

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel_height: int
    kernel_width: int
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "channels", "height", "width", "outputs", "kernel_height", "kernel_width", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        if self.padding < 0:
            raise ValueError(f"padding must be 0 or more, not {self.padding!r}")
        if min(self.out_height, self.out_width) < 1:
            raise ValueError(
                f"the kernel must fit the padded image, not {self.kernel_height}x{self.kernel_width} on "
                f"{self.height + 2 * self.padding}x{self.width + 2 * self.padding}"
            )

    @property
    def out_height(self) -> int:
        """Lines of the output."""
        return (self.height + 2 * self.padding - self.kernel_height) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Pixels of an output line."""
        return (self.width + 2 * self.padding - self.kernel_width) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of each of its three phases, padding included."""
        taps = self.kernel_height * self.kernel_width
        return self.batch * self.outputs * self.out_height * self.out_width * self.channels * taps


@dataclass(frozen=True)
class Axis:
    """One axis of one (output phase, source phase) pair.

    Output position a of the phase is element a * out_step + out_phase of the output; tap r reads element
    (a + offset) * source_step + source_phase of the source.

    Attributes
    ----------
    taps : tuple of (int, int)
        (r, offset), r rising in steps of the stride; offsets rise or fall by one.
    """

    out_phase: int
    out_step: int
    out_count: int
    source_phase: int
    source_step: int
    taps: Taps


def pairs_inside(axis: Axis, size: int, first: int, count: int) -> int:
    """Pairs of a position of the output phase, of `count` from `first` on, and a tap that reads one of the `size`
    elements of the source, not padding."""
    return sum(
        0 <= (at + offset) * axis.source_step + axis.source_phase < size
        for _, offset in axis.taps
        for at in range(first, min(first + count, axis.out_count))
    )


def forward_axes(size: int, out: int, kernel: int, stride: int, padding: int) -> list[Axis]:
    """FF: one output phase, `stride` source phases."""
    axes = []
    for phase in range(stride):
        taps = tuple((r, (r - padding - phase) // stride) for r in range(kernel) if (r - padding - phase) % stride == 0)
        axes.append(Axis(0, 1, out, phase, stride, _useful(taps, out, size, phase, stride)))
    return axes


def backward_axes(size: int, out: int, kernel: int, stride: int, padding: int) -> list[Axis]:
    """BP: `stride` output phases (of dx), one source phase (dy)."""
    axes = []
    for phase in range(min(stride, size)):
        taps = tuple((r, (phase + padding - r) // stride) for r in range(kernel) if (phase + padding - r) % stride == 0)
        count = -(-(size - phase) // stride)
        axes.append(Axis(phase, stride, count, 0, 1, _useful(taps, count, out, 0, 1)))
    return axes


def _useful(taps: Taps, count: int, size: int, phase: int, step: int) -> Taps:
    """Taps that reach the source from some output position (others see only padding)."""
    lattice = max(0, -(-(size - phase) // step))
    return tuple((r, offset) for r, offset in taps if max(0, -offset) < min(count, lattice - offset))


def most_taps(axes: list[Axis]) -> int:
    """Taps of an axis, at most; 1 where there are none."""
    return max(1, *(len(axis.taps) for axis in axes))


def cut(taps: Taps, size: int) -> list[Taps]:
    return [taps[i : i + size] for i in range(0, len(taps), size)]


def by_phase(axes: list[Axis]) -> list[list[Axis]]:
    phases: dict[int, list[Axis]] = {}
    for axis in axes:
        phases.setdefault(axis.out_phase, []).append(axis)
    return list(phases.values())


@dataclass(frozen=True)
class Box:
    """A tile in lattice coordinates: images, and positions of an output phase (the same for all phases)."""

    image: int
    images: int
    line: int
    lines: int
    pixel: int
    pixels: int


@dataclass(frozen=True)
class Plan:
    """Tile and tap-group sizes.

    Attributes
    ----------
    images, lines, pixels : int
        Lattice positions of a tile.
    taps_r, taps_s : int
        Taps of a group: those whose weights are in the dense buffer together.
    whole : bool
        A tile of the source has the halo of all taps of its phase, so that it serves every group of them.
    planes : int
        Channel blocks of the output that are computed side by side, so that their tiles share pixels of the source.
    phases : int
        Output phases (of a strided BP) whose sums are added up together, so that they share pixels of the source.
    """

    images: int
    lines: int
    pixels: int
    taps_r: int
    taps_s: int
    whole: bool
    planes: int = 1
    phases: int = 1

    @property
    def sums(self) -> int:
        """Partial-sum rows of a tile."""
        return self.images * self.lines * self.pixels * self.phases


def boxes_of(sizes: tuple[int, int, int], images: int, lattice_h: int, lattice_w: int) -> Iterator[Box]:
    """Boxes of so many images, lines and pixels (or what is left of them) that cover a lattice."""
    most_images, most_lines, most_pixels = sizes
    for image in range(0, images, most_images):
        for line in range(0, lattice_h, most_lines):
            for pixel in range(0, lattice_w, most_pixels):
                yield Box(
                    image,
                    min(most_images, images - image),
                    line,
                    min(most_lines, lattice_h - line),
                    pixel,
                    min(most_pixels, lattice_w - pixel),
                )
