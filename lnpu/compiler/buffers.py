"""The buffers of the cores as the compiler sees them: pages, regions, parts of channel blocks."""

from collections.abc import Iterator

from lnpu.compiler.geometry import Box
from lnpu.compiler.program import Program, Region
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.tiles import inside
from lnpu.config import BLOCK
from lnpu.ctrl.commands import Opcode, Target

__all__ = [
    "PageCache",
    "block_parts",
    "load_sparse",
    "loaded_pixels",
    "page_regions",
    "power_of_two",
    "psum_regions",
    "real_lanes",
    "speed_up_of",
]


class PageCache:
    """Which tile each page of the buffers of every core holds."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int, int], object] = {}  # (buffer, core, page) -> content
        self._recent: dict[tuple[str, int], int] = {}  # (buffer, core) -> page used last
        self._padding: dict[tuple[int, int], object] = {}  # (core, page) of the sparse buffers -> what is padding there

    def page(self, buffer: str, cores: int, content: object) -> tuple[int, bool]:
        """Page for `content` in these cores, and whether it is there already; else it is taken to be loaded now.

        The page that the first core used last is kept.
        """
        members = [core for core in range(16) if cores >> core & 1]
        there = [p for p in (0, 1) if all(self._held.get((buffer, core, p)) == content for core in members)]
        page = there[0] if there else 1 - self._recent.get((buffer, members[0]), 1)
        for core in members:
            self._held[buffer, core, page] = content
            self._recent[buffer, core] = page
        return page, bool(there)

    def padded(self, cores: int, page: int, padding: object) -> bool:
        """Whether the page of these cores' sparse buffers has this padding; else it is taken to be written now."""
        keys = [(core, page) for core in range(16) if cores >> core & 1]
        there = all(self._padding.get(key) == padding for key in keys)
        self._padding |= dict.fromkeys(keys, padding)
        return there


def power_of_two(count: int) -> int:
    """The largest power of two up to `count`."""
    return 1 << (count.bit_length() - 1)


def page_regions(buffer: str, cores: int, page: int) -> list[Region]:
    """A page of the "sparse" or "dense" buffers or of the "mask" stores of these cores."""
    return [Region(f"{buffer} {core}", page, page + 1) for core in range(16) if cores >> core & 1]


def real_lanes(channels: int, lanes: int) -> int:
    """How many of `lanes` lanes are among the `channels` channels that are left; the others are padding."""
    return max(0, min(lanes, channels))


def speed_up_of(streamed: Tensor) -> float:
    """How much faster than dense FP16 the products of this operand are taken to be, to choose tiles: half of it zeros,
    and pairs of what is in FP8."""
    policy = streamed.policy
    return 1.5 if policy.hi_bits == 0 and policy.above == "fp16" else 3.5


def psum_regions(cores: int, start: int, rows: int) -> list[Region]:
    """Rows `start` and up of the partial-sum stores of these cores."""
    return [Region(f"psum {core}", start, start + rows) for core in range(16) if cores >> core & 1]


def block_parts(channel: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(block, first channel in it, channels) of channels `channel` to `channel + count`."""
    end = channel + count
    while channel < end:
        block, start = divmod(channel, BLOCK)
        part = min(end - channel, BLOCK - start)
        yield block, start, part
        channel += part


def loaded_pixels(box: tuple[int, int], halo: tuple[int, int], source: tuple[int, int]) -> int:
    """Pixels, about, that LOAD brings for the lines and pixels of a box with the halo of so many taps, of an image of
    `source`: padding is there already, and a line costs more than its pixels, for words that it has only a part of (but
    not one of a single pixel: those follow each other)."""
    tall, wide = (min(inner + taps - 1, size) for inner, taps, size in zip(box, halo, source, strict=True))
    return tall * (wide + (wide > 1))


def load_sparse(
    program: Program,
    cache: PageCache,
    tensor: Tensor,
    cores: int,
    page: int,
    box: Box,
    first: tuple[int, int],
    steps: tuple[int, int],
    size: tuple[int, int],
    channel: int,
    channels: int,
    *,
    pitches: tuple[int, int] | None = None,
    transpose: bool = False,
) -> None:
    """Load the haloed part of a box into a page of the sparse buffers, row by row of `size` lines and pixels.

    Where the page has the same pixels of padding already, only the others are loaded.

    Parameters
    ----------
    first : (int, int)
        Line and pixel, in each image, of the first row; what is outside the image is padding.
    steps : (int, int)
        Lines and pixels of the tensor from one row to the next.
    channel, channels : int
        Which channels, all in one block.
    pitches : (int, int)
        Rows from one image to the next, and from one line to the next, if they do not follow each other.
    transpose : bool
        Rows are channels and elements pixels, instead of the other way round.
    """
    (line, pixel), (tall, wide), beat = first, size, program.config.beat
    image_pitch, pitch = (tall * wide, wide) if pitches is None else pitches
    i_first, i_end = inside(line, steps[0], tall, tensor.height)
    j_first, j_end = inside(pixel, steps[1], wide, tensor.width)
    counts, dest = size, 0
    if cache.padded(
        cores, page, (box.images, size, image_pitch, pitch, i_first, i_end, j_first, j_end, channels, transpose)
    ):
        if i_first == i_end or j_first == j_end:
            return
        dest = i_first * pitch + j_first
        line, pixel = line + i_first * steps[0], pixel + j_first * steps[1]
        counts = i_end - i_first, j_end - j_first
        i_first, i_end, j_first, j_end = 0, counts[0], 0, counts[1]
    program.emit(
        Opcode.LOAD,
        reads=[program.memory(tensor)],
        writes=page_regions("sparse", cores, page),
        **tensor.walk(box.image, channel // BLOCK, line),
        target=Target.SPARSE.value,
        transpose=int(transpose),
        page=page,
        cores=cores,
        n_count=box.images,
        i_count=counts[0],
        j_count=counts[1],
        line_i=steps[0],
        pixel=pixel,
        pixel_j=steps[1],
        i_first=i_first,
        i_end=i_end,
        j_first=j_first,
        j_end=j_end,
        channel=(channel % BLOCK) // beat,
        channel_beats=channels // beat,
        dest=dest,
        dest_n=image_pitch,
        dest_i=pitch,
        dest_j=1,
    )
