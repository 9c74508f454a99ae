"""Tensors in the chip's external memory, and the allocation of that memory."""

from dataclasses import dataclass

from golden.fgmp import Policy
from lnpu.config import BLOCK, ChipConfig
from lnpu.formats import MAX_LOG2_RUN, SLOT_BYTES, TensorKind

__all__ = ["MemoryMap", "RawTensor", "Tensor", "packing", "padded_channels"]

_WEIGHTS = (TensorKind.WEIGHT, TensorKind.GRADIENT, TensorKind.OPTIMIZER)


def padded_channels(channels: int, beat: int) -> int:
    """Channels that memory holds for `channels`: a power of two from `beat` up to 64, then multiples of 64."""
    if channels > BLOCK:
        return -(-channels // BLOCK) * BLOCK
    return max(beat, 1 << (channels - 1).bit_length())


@dataclass(frozen=True, eq=False)
class Tensor:
    """An FGMP-encoded tensor of `images` x `height` lines of `width` pixels of `channels` elements.

    A weight tensor has a line per kernel tap (`images` = 1, `height` = taps) and a pixel per input channel.

    Parameters
    ----------
    name : str
        Name in reports and error messages.
    kind : TensorKind
        What its transfers count as.
    images, height, width, channels : int
        Shape; `padded` is the number of channels that memory holds.
    policy : Policy
        FGMP policy and scale; of a dynamic tensor, what it starts from.
    slots, table : int
        Byte addresses of the slots and of the length table.
    line_blocks : int
        Block numbers from one line to the next.
    log2_run : int
        Blocks of a run: 2 to this power.
    state : int
        Number of the tensor in the chip's table of FGMP states, 0 if its policy is static.
    """

    name: str
    kind: TensorKind
    images: int
    height: int
    width: int
    channels: int
    padded: int
    policy: Policy
    slots: int
    table: int
    line_blocks: int
    log2_run: int
    state: int = 0

    @property
    def scale(self) -> int:
        """The scale that commands name: the policy's, or 0 where the chip adds that of the state."""
        return 0 if self.state else self.policy.scale

    @property
    def is_weight(self) -> bool:
        """Weights, their gradients or momenta: OIHW for the host."""
        return self.kind in _WEIGHTS

    @property
    def lines(self) -> int:
        """Lines of all images."""
        return self.images * self.height

    @property
    def block_pixels(self) -> int:
        """Pixels that share a block (1 from 64 channels up)."""
        return max(1, BLOCK // self.padded)

    @property
    def planes(self) -> int:
        """Planes of 64 channels, each with its own lines (1 up to 64 channels)."""
        return max(1, self.padded // BLOCK)

    @property
    def run_pixels(self) -> int:
        """Pixels of a line that STORE writes together; it may begin only at multiples of them."""
        return self.block_pixels * min(1 << self.log2_run, self.line_blocks)

    @property
    def run_lines(self) -> int:
        """Lines that STORE writes together, likewise."""
        return max(1, (1 << self.log2_run) // self.line_blocks)

    @property
    def blocks(self) -> int:
        """Block numbers of the tensor."""
        return self.lines * self.planes * self.line_blocks

    @property
    def block_channels(self) -> int:
        """Channels of a pixel in one block."""
        return min(self.padded, BLOCK)

    def walk(self, image: int, plane: int, line: int) -> dict[str, int]:
        """The command fields that describe the tensor, and where line `line` of a plane of an image is in it."""
        return {
            "line": (image * self.planes + plane) * self.height + line,
            "line_n": self.planes * self.height,
            "tensor": self.state,
            "slots": self.slots,
            "table": self.table,
            "kind": self.kind.value,
            "line_blocks": self.line_blocks,
            "log2_block_pixels": self.block_pixels.bit_length() - 1,
            "log2_run": self.log2_run,
        }


@dataclass(frozen=True, eq=False)
class RawTensor:
    """FP32 words in memory: `rows` of `channels` (padded like an encoded tensor's).

    The master copies of weights are [taps * input channels, output channels]; per-channel vectors have one row.
    """

    name: str
    kind: TensorKind
    rows: int
    channels: int
    padded: int
    address: int

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        return 4 * self.padded


def packing(config: ChipConfig, height: int, blocks: int, block_pixels: int) -> tuple[int, int]:
    """How a plane of `height` lines of `blocks` blocks is packed: `line_blocks` and `log2_run`.

    Long runs waste less of the AXI words that they end in. But they are written whole, so their pixels must fit half of
    a core's partial sums, and a small part of the vector memory, which holds many tiles.
    """
    rows = config.vmem_rows // 64
    most = min(
        1 << MAX_LOG2_RUN, config.axi_bits // 8, config.psum_rows // 2 // block_pixels, rows // config.block_beats
    )
    most = 1 << max(0, most.bit_length() - 1)
    run = min(most, 1 << (blocks - 1).bit_length())
    line_blocks = -(-blocks // run) * run
    if line_blocks == blocks:
        while 2 * run <= most and (line_blocks * height) % (2 * run) == 0 and line_blocks <= run:
            run *= 2
    return line_blocks, run.bit_length() - 1


class MemoryMap:
    """Hands out external memory from `base` up to `size` bytes.

    Raises
    ------
    MemoryError
        If the memory is too small; the message says what was asked for.
    """

    def __init__(self, *, size: int, config: ChipConfig, base: int = 0) -> None:
        self.size, self.config = size, config
        self.next = base

    def allocate(self, name: str, count: int, align: int = 64) -> int:
        """Address of `count` fresh bytes."""
        start = -(-self.next // align) * align
        if start + count > self.size:
            raise MemoryError(f"{name} takes {count} bytes at {start:#x}, but the memory has {self.size} bytes")
        self.next = start + count
        return start

    def tensor(
        self,
        name: str,
        kind: TensorKind,
        *,
        images: int = 1,
        height: int,
        width: int,
        channels: int,
        policy: Policy,
        state: int = 0,
    ) -> Tensor:
        """Place an encoded tensor."""
        padded = padded_channels(channels, self.config.beat)
        block_pixels = max(1, BLOCK // padded)
        # Weight gradients come tap by tap, so a run is never longer than a line.
        together = 1 if kind in _WEIGHTS else height
        line_blocks, log2_run = packing(self.config, together, -(-width // block_pixels), block_pixels)
        blocks = images * height * max(1, padded // BLOCK) * line_blocks
        slots = self.allocate(name, blocks * SLOT_BYTES)
        table = self.allocate(f"{name} (lengths)", -(-blocks // 32) * 32)
        return Tensor(
            name, kind, images, height, width, channels, padded, policy, slots, table, line_blocks, log2_run, state
        )

    def raw(self, name: str, kind: TensorKind, *, rows: int = 1, channels: int) -> RawTensor:
        """Place an array of FP32 words."""
        padded = padded_channels(channels, self.config.beat)
        return RawTensor(name, kind, rows, channels, padded, self.allocate(name, 4 * rows * padded))
