"""Tensors in the chip's external memory, and the allocation of that memory."""

from dataclasses import dataclass

from golden.fgmp import Policy
from lnpu.config import BLOCK
from lnpu.formats import SLOT_BYTES, TensorKind

__all__ = ["MemoryMap", "RawTensor", "Tensor", "padded_channels"]


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
    state: int = 0

    @property
    def scale(self) -> int:
        """The scale that commands name: the policy's, or 0 where the chip adds that of the state."""
        return 0 if self.state else self.policy.scale

    @property
    def lines(self) -> int:
        """Lines in memory."""
        return self.images * self.height

    @property
    def block_pixels(self) -> int:
        """Pixels that share a block (1 from 64 channels up)."""
        return max(1, BLOCK // self.padded)

    @property
    def pixel_blocks(self) -> int:
        """Blocks of a pixel (1 where pixels share blocks)."""
        return max(1, self.padded // BLOCK)

    @property
    def line_blocks(self) -> int:
        """Blocks of a line."""
        return -(-self.width * self.padded // BLOCK)

    @property
    def blocks(self) -> int:
        """Blocks of the tensor."""
        return self.lines * self.line_blocks

    @property
    def block_channels(self) -> int:
        """Channels of a pixel in one block."""
        return min(self.padded, BLOCK)

    def walk(self) -> dict[str, int]:
        """The command fields that describe the tensor."""
        return {
            "tensor": self.state,
            "slots": self.slots,
            "table": self.table,
            "kind": self.kind.value,
            "line_blocks": self.line_blocks,
            "log2_block_pixels": self.block_pixels.bit_length() - 1,
            "pixel_blocks": self.pixel_blocks,
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


class MemoryMap:
    """Hands out external memory from `base` up to `size` bytes.

    Raises
    ------
    MemoryError
        If the memory is too small; the message says what was asked for.
    """

    def __init__(self, *, size: int, beat: int, base: int = 0) -> None:
        self.size, self.beat = size, beat
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
        shape = Tensor(name, kind, images, height, width, channels, padded_channels(channels, self.beat), policy, 0, 0)
        slots = self.allocate(name, shape.blocks * SLOT_BYTES)
        table = self.allocate(f"{name} (lengths)", -(-shape.blocks // 32) * 32)
        return Tensor(name, kind, images, height, width, channels, shape.padded, policy, slots, table, state)

    def raw(self, name: str, kind: TensorKind, *, rows: int = 1, channels: int) -> RawTensor:
        """Place an array of FP32 words."""
        padded = padded_channels(channels, self.beat)
        return RawTensor(name, kind, rows, channels, padded, self.allocate(name, 4 * rows * padded))
