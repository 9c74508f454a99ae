"""Encoded tensors in memory: blocks of 64 elements, the runs that they are packed into, and their length table.

`encode_block` and `decode_block` handle one block byte by byte and are the reference; `encode_blocks`, `decode_blocks`
and `TensorLayout` are vectorised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from golden.fgmp import CODE_FP8, CODE_FP16, CODE_PADDING, CODE_ZERO
from golden.formats import E4M3, FP16, decode, round_encode

__all__ = [
    "BLOCK",
    "MAX_LENGTH",
    "MAX_LOG2_RUN",
    "SLOT_BYTES",
    "DecodeError",
    "TensorLayout",
    "block_addresses",
    "block_lengths",
    "block_parts",
    "decode_block",
    "decode_blocks",
    "decode_slots",
    "encode_block",
    "encode_blocks",
    "encode_slots",
]

BLOCK = 64
"""Elements of a block."""

SLOT_BYTES = 160
"""Bytes of memory for each block of a run, whatever it needs."""

MAX_LENGTH = 145
"""Bytes of the longest block."""

MAX_LOG2_RUN = 4
"""A run has at most 16 blocks."""

_ALIGN = 32
_MAGIC = 0b1010
_DENSE, _MASKED, _EMPTY = 0, 1, 2
_FP8, _FP16, _MIXED, _FEW = 0, 1, 2, 3
_LAST = 0x80  # in the last byte of a list of FP16 elements


class DecodeError(ValueError):
    """A malformed encoded block.

    Attributes
    ----------
    reason : str
        What is wrong with it.
    block : int or None
        Which block.
    """

    def __init__(self, reason: str, block: int | None = None) -> None:
        super().__init__(reason if block is None else f"block {block}: {reason}")
        self.reason, self.block = reason, block


@lru_cache(maxsize=1)
def _e4m3_tables() -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
    """E4M3 pattern of every FP16 pattern (-1: it is no E4M3 number, or zero); FP16 pattern of every E4M3 one."""
    values = decode(E4M3, np.arange(256, dtype=np.uint8))
    expanded = round_encode(FP16, values).astype(np.uint16)
    codes = np.full(1 << 16, -1, np.int16)
    usable = np.isfinite(values) & (values != 0)
    codes[expanded[usable]] = np.arange(256, dtype=np.int16)[usable]
    return codes, expanded


def _bytes_of_e4m3(pattern: int) -> int:
    byte = int(_e4m3_tables()[0][pattern])
    if byte < 0:
        raise ValueError(f"an FP8 element must be a non-zero E4M3 number, not FP16 pattern {pattern!r}")
    return byte


def encode_block(bits: Sequence[int], codes: Sequence[int]) -> bytes:
    """Reference encoder: the bytes of one block.

    Parameters
    ----------
    bits : 64 int
        FP16 patterns of the elements (of zeros and padding: whatever).
    codes : 64 int
        `CODE_ZERO`, `CODE_PADDING`, `CODE_FP8` or `CODE_FP16`. Padding is encoded as a zero.

    Returns
    -------
    bytes
        1 to 145 bytes.

    Raises
    ------
    ValueError
        If there are not 64, a code is unknown, an FP8 element is no non-zero E4M3 number or an FP16 element is zero.
    """
    bits, codes = [int(one) for one in bits], [int(one) for one in codes]
    if len(bits) != BLOCK or len(codes) != BLOCK:
        raise ValueError(f"a block must have {BLOCK} elements and codes, not {(len(bits), len(codes))!r}")
    mask, precisions, payload, count = 0, 0, b"", 0
    for index, (pattern, code) in enumerate(zip(bits, codes, strict=True)):
        if code in (CODE_ZERO, CODE_PADDING):
            continue
        mask |= 1 << index
        if code == CODE_FP8:
            payload += bytes([_bytes_of_e4m3(pattern)])
        elif code == CODE_FP16:
            if pattern & 0x7FFF == 0:
                raise ValueError(f"an FP16 element must not be zero, not {pattern!r}")
            precisions |= 1 << count
            payload += pattern.to_bytes(2, "little")
        else:
            raise ValueError(f"codes must be 0 to 3, not {code!r}")
        count += 1
    nonzero_mode = _EMPTY if count == 0 else _DENSE if count == BLOCK else _MASKED
    uniform = precisions == 0 or precisions == (1 << count) - 1
    few = precisions.bit_count() < -(-count // 8)
    precision_mode = _FP8 if precisions == 0 else _FP16 if uniform else _FEW if few else _MIXED
    raw = bytes([nonzero_mode | precision_mode << 2 | _MAGIC << 4])
    if nonzero_mode == _MASKED:
        raw += mask.to_bytes(8, "little")
    if precision_mode == _MIXED:
        raw += precisions.to_bytes(-(-count // 8), "little")
    if precision_mode == _FEW:
        ranks = [rank for rank in range(count) if precisions >> rank & 1]
        raw += bytes([*ranks[:-1], ranks[-1] | _LAST])
    return raw + payload


def decode_block(raw: bytes) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Reference decoder: FP16 patterns and codes of the 64 elements of one block.

    Only what the encoder can write is accepted.

    Raises
    ------
    DecodeError
        If the block is malformed; `reason` says how.
    """
    if not 1 <= len(raw) <= MAX_LENGTH:
        raise DecodeError(f"length must be 1 to {MAX_LENGTH} bytes, not {len(raw)}")
    header = raw[0]
    nonzero_mode, precision_mode, magic = header & 3, header >> 2 & 3, header >> 4
    if magic != _MAGIC:
        raise DecodeError(f"magic must be {_MAGIC:#06b}, not {magic:#06b}")
    if nonzero_mode == 3:
        raise DecodeError("non-zero mode 3 is reserved")
    if nonzero_mode == _EMPTY and precision_mode != _FP8:
        raise DecodeError(f"precision mode of an empty block must be 0, not {precision_mode}")
    position, mask = 1, (1 << BLOCK) - 1 if nonzero_mode == _DENSE else 0
    if nonzero_mode == _MASKED:
        if len(raw) < 9:
            raise DecodeError(f"length must be at least 9 bytes for a mask, not {len(raw)}")
        mask, position = int.from_bytes(raw[1:9], "little"), 9
        if mask in (0, (1 << BLOCK) - 1):
            raise DecodeError(f"mask of a masked block must be neither empty nor full, not {mask:#018x}")
    count = mask.bit_count()
    precisions = (1 << count) - 1 if precision_mode == _FP16 else 0
    if precision_mode == _MIXED:
        size = -(-count // 8)
        precisions = int.from_bytes(raw[position : position + size], "little")
        position += size
    if precision_mode == _FEW:
        ranks: list[int] = []
        while not ranks or not ranks[-1] & _LAST:
            if len(ranks) == -(-count // 8) - 1 or position == len(raw):
                raise DecodeError("list of FP16 elements must end, and be shorter than the mask")
            ranks.append(raw[position])
            position += 1
        ranks[-1] &= ~_LAST
        if any(b <= a for a, b in pairwise(ranks)) or ranks[-1] >= count:
            raise DecodeError(f"list of FP16 elements must ascend to less than {count}, not {ranks}")
        if len(ranks) == count:
            raise DecodeError("list of FP16 elements must not be all of them")
        precisions = sum(1 << rank for rank in ranks)
    used = precisions & ((1 << count) - 1)
    end = position + count + used.bit_count()
    if len(raw) != end:
        raise DecodeError(f"length must be {end} bytes by its contents, not {len(raw)}")
    if precision_mode == _MIXED:
        if used != precisions:
            raise DecodeError("bits beyond the precision mask must be zero")
        if used in (0, (1 << count) - 1):
            raise DecodeError("precision mask of a mixed block must have both precisions")
        if used.bit_count() < -(-count // 8):
            raise DecodeError("precision mask of a mixed block must not be longer than a list")
    bits, codes, rank = np.zeros(BLOCK, np.uint16), np.zeros(BLOCK, np.uint8), 0
    expanded = _e4m3_tables()[1]
    for index in range(BLOCK):
        if not mask >> index & 1:
            continue
        if precisions >> rank & 1:
            pattern = int.from_bytes(raw[position : position + 2], "little")
            if pattern & 0x7FFF == 0:
                raise DecodeError(f"payload of element {index} is an FP16 zero")
            bits[index], codes[index] = pattern, CODE_FP16
            position += 2
        else:
            if raw[position] & 0x7F in (0, 0x7F):
                kind = "zero" if raw[position] & 0x7F == 0 else "NaN"
                raise DecodeError(f"payload of element {index} is an E4M3 {kind}")
            bits[index], codes[index] = expanded[raw[position]], CODE_FP8
            position += 1
        rank += 1
    return bits, codes


def _check_pair(bits: ArrayLike, codes: ArrayLike) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    bits, codes = np.asarray(bits), np.asarray(codes)
    if bits.dtype != np.uint16:
        raise TypeError(f"bits must be uint16, not {bits.dtype!r}")
    if codes.dtype != np.uint8:
        raise TypeError(f"codes must be uint8, not {codes.dtype!r}")
    if bits.shape != codes.shape:
        raise ValueError(f"codes must have the shape of bits, {bits.shape}, not {codes.shape!r}")
    if codes.size and codes.max() > CODE_FP16:
        raise ValueError(f"codes must be 0 to 3, not {int(codes.max())!r}")
    return bits, codes


def block_parts(codes: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Bytes [blocks] of the non-zero mask, the precision mask and the payloads of blocks with codes [blocks, 64]."""
    codes = np.asarray(codes, np.uint8)
    n16 = np.count_nonzero(codes == CODE_FP16, axis=1)
    nnz = n16 + np.count_nonzero(codes == CODE_FP8, axis=1)
    masked, mixed = (nnz > 0) & (nnz < BLOCK), (n16 > 0) & (n16 < nnz)
    return 8 * masked, np.minimum(n16, (nnz + 7) // 8) * mixed, nnz + n16


def block_lengths(codes: ArrayLike) -> NDArray[np.uint8]:
    """Bytes [blocks] that blocks with these codes [blocks, 64] take: what `encode_slots` gives, without encoding."""
    mask, precisions, payload = block_parts(codes)
    return (1 + mask + precisions + payload).astype(np.uint8)


def encode_slots(bits: ArrayLike, codes: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Encode many blocks.

    Parameters
    ----------
    bits : uint16 array [blocks, 64]
        FP16 patterns.
    codes : uint8 array [blocks, 64]

    Returns
    -------
    slots : uint8 array [blocks, 160]
        The bytes of each block, zeros behind them.
    lengths : uint8 array [blocks]
        How many bytes it has.

    Raises
    ------
    TypeError, ValueError
        As of `encode_block`, or if the arrays do not have these types and shapes.
    """
    bits, codes = _check_pair(bits, codes)
    if bits.ndim != 2 or bits.shape[1] != BLOCK:
        raise ValueError(f"bits must have shape [blocks, {BLOCK}], not {bits.shape!r}")
    blocks = bits.shape[0]
    is16, is8 = codes == CODE_FP16, codes == CODE_FP8
    nonzero = is16 | is8
    e4m3 = _e4m3_tables()[0][bits]
    wrong = is8 & (e4m3 < 0)
    if wrong.any():
        raise ValueError(f"an FP8 element must be a non-zero E4M3 number, not FP16 pattern {int(bits[wrong][0])!r}")
    wrong = is16 & ((bits & np.uint16(0x7FFF)) == 0)
    if wrong.any():
        raise ValueError(f"an FP16 element must not be zero, not {int(bits[wrong][0])!r}")
    nnz, n16 = nonzero.sum(1), is16.sum(1)
    masked, mixed = (nnz > 0) & (nnz < BLOCK), (n16 > 0) & (n16 < nnz)
    mode = np.where(nnz == 0, _EMPTY, np.where(masked, _MASKED, _DENSE))
    few = mixed & (n16 < (nnz + 7) // 8)
    precision = np.where(n16 == 0, _FP8, np.where(few, _FEW, np.where(mixed, _MIXED, _FP16)))
    slots = np.zeros((blocks, SLOT_BYTES), np.uint8)
    slots[:, 0] = mode | precision << 2 | _MAGIC << 4
    slots[masked, 1:9] = np.packbits(nonzero[masked], axis=1, bitorder="little")
    precision_bytes = np.where(few, n16, np.where(mixed, (nnz + 7) // 8, 0))
    start = 1 + 8 * masked + precision_bytes

    rank = np.cumsum(nonzero, axis=1, dtype=np.int16) - nonzero
    rows, columns = np.nonzero(is16 & mixed[:, None])
    precisions = np.zeros((blocks, BLOCK), bool)
    precisions[rows, rank[rows, columns]] = True
    packed = np.packbits(precisions, axis=1, bitorder="little")
    rows, columns = np.nonzero(is16 & few[:, None])
    order = (np.cumsum(is16, axis=1) - 1)[rows, columns]
    packed[few] = 0
    packed[rows, order] = rank[rows, columns] | np.where(order == n16[rows] - 1, _LAST, 0)
    rows, columns = np.nonzero(np.arange(8) < precision_bytes[:, None])
    slots[rows, (1 + 8 * masked)[rows] + columns] = packed[rows, columns]

    sizes = nonzero.astype(np.int16) + is16
    offset = start[:, None] + (np.cumsum(sizes, axis=1, dtype=np.int16) - sizes)
    offset += SLOT_BYTES * np.arange(blocks)[:, None]
    flat = slots.reshape(-1)
    flat[offset[is8]] = e4m3[is8].astype(np.uint8)
    where, payload = offset[is16], bits[is16]
    flat[where] = payload & np.uint16(0xFF)
    flat[where + 1] = payload >> np.uint16(8)
    return slots, (start + nnz + n16).astype(np.uint8)


def decode_slots(
    slots: ArrayLike, lengths: ArrayLike, on_error: str = "raise"
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.bool_]]:
    """Decode many blocks; inverse of `encode_slots` (padding comes back as zeros).

    Parameters
    ----------
    slots : uint8 array [blocks, 160]
        Only the first `lengths` bytes of each are looked at.
    lengths : uint8 array [blocks]
    on_error : {"raise", "zeros"}
        What a malformed block does: `DecodeError`, or zeros as the chip delivers.

    Returns
    -------
    bits, codes : uint16 array, uint8 array [blocks, 64]
    malformed : bool array [blocks]

    Raises
    ------
    DecodeError
        On the first malformed block.
    TypeError, ValueError
        If the arrays do not have these types and shapes.
    """
    if on_error not in ("raise", "zeros"):
        raise ValueError(f"on_error must be raise or zeros, not {on_error!r}")
    slots, lengths = np.asarray(slots), np.asarray(lengths)
    if slots.dtype != np.uint8 or lengths.dtype != np.uint8:
        raise TypeError(f"slots and lengths must be uint8, not {(slots.dtype, lengths.dtype)!r}")
    if slots.ndim != 2 or slots.shape[1] != SLOT_BYTES:
        raise ValueError(f"slots must have shape [blocks, {SLOT_BYTES}], not {slots.shape!r}")
    blocks = slots.shape[0]
    if lengths.shape != (blocks,):
        raise ValueError(f"lengths must have shape [{blocks}], not {lengths.shape!r}")
    header = slots[:, 0]
    mode, precision = header & 3, header >> 2 & 3
    bad = (header >> 4 != _MAGIC) | (mode == 3) | ((mode == _EMPTY) & (precision != _FP8))
    masked = mode == _MASKED
    mask = np.unpackbits(slots[:, 1:9], axis=1, bitorder="little").astype(bool)
    nonzero = np.where(masked[:, None], mask, (mode == _DENSE)[:, None])
    nnz = nonzero.sum(1)
    bad |= masked & ((nnz == 0) | (nnz == BLOCK))
    mixed = precision == _MIXED
    start = 1 + 8 * masked
    mask_bytes = (nnz + 7) // 8
    window = slots[np.arange(blocks)[:, None], start[:, None] + np.arange(8)]
    # A list of FP16 elements goes up to the first byte that says so.
    few = precision == _FEW
    ends = window & _LAST != 0
    listed = np.where(ends.any(1), ends.argmax(1) + 1, BLOCK)
    bad |= few & (listed >= mask_bytes)
    listed = np.minimum(listed, 8)
    precision_bytes = np.where(few, listed, np.where(mixed, mask_bytes, 0))
    inside = np.arange(8) < precision_bytes[:, None]
    ranks = window & ~np.uint8(_LAST)
    bad |= few & ((ranks >= nnz[:, None]) & inside).any(1)
    bad |= few & ((ranks[:, 1:] <= ranks[:, :-1]) & inside[:, 1:]).any(1)
    window[~inside] = 0
    precisions = np.unpackbits(window, axis=1, bitorder="little").astype(bool)
    rows, columns = np.nonzero(inside & few[:, None])
    precisions[few] = False
    precisions[rows, np.minimum(ranks[rows, columns], BLOCK - 1)] = True
    mixed |= few
    rank = np.cumsum(nonzero, axis=1, dtype=np.int64) - nonzero
    bad |= (precisions & (np.arange(BLOCK) >= nnz[:, None])).any(1)
    is16 = nonzero & np.where(
        mixed[:, None], np.take_along_axis(precisions, np.minimum(rank, BLOCK - 1), 1), (precision == _FP16)[:, None]
    )
    n16 = is16.sum(1)
    bad |= mixed & ((n16 == 0) | (n16 == nnz))
    bad |= (precision == _MIXED) & (n16 < mask_bytes)
    start = start + precision_bytes
    end = start + nnz + n16
    bad |= lengths != end
    sizes = nonzero.astype(np.int64) + is16
    offset = start[:, None] + np.cumsum(sizes, axis=1) - sizes
    offset = np.minimum(offset, SLOT_BYTES - 2) + SLOT_BYTES * np.arange(blocks)[:, None]
    flat = slots.reshape(-1)
    low, high = flat[offset].astype(np.uint16), flat[offset + 1].astype(np.uint16)
    is8 = nonzero & ~is16
    bits = np.where(is16, low | high << np.uint16(8), np.where(is8, _e4m3_tables()[1][low], np.uint16(0)))
    bad |= (is8 & ((low & 0x7F == 0) | (low & 0x7F == 0x7F))).any(1)
    bad |= (is16 & (bits & np.uint16(0x7FFF) == 0)).any(1)
    codes = np.where(is16, np.uint8(CODE_FP16), np.where(is8, np.uint8(CODE_FP8), np.uint8(CODE_ZERO)))
    if bad.any():
        if on_error == "raise":
            block = int(np.flatnonzero(bad)[0])
            length = int(lengths[block])
            if not 1 <= length <= MAX_LENGTH:
                raise DecodeError(f"length must be 1 to {MAX_LENGTH} bytes, not {length}", block)
            try:
                decode_block(slots[block, :length].tobytes())
            except DecodeError as error:
                raise DecodeError(error.reason, block) from None
            raise AssertionError("the decoders disagree")
        bits[bad], codes[bad] = 0, CODE_ZERO
    return bits.astype(np.uint16, copy=False), codes, bad


def encode_blocks(bits: ArrayLike, codes: ArrayLike) -> list[bytes]:
    """The bytes of each block of [blocks, 64] elements (or of 64 times any number); see `encode_slots`."""
    slots, lengths = encode_slots(np.asarray(bits).reshape(-1, BLOCK), np.asarray(codes).reshape(-1, BLOCK))
    return [slot[: int(length)].tobytes() for slot, length in zip(slots, lengths, strict=True)]


def decode_blocks(blocks: Sequence[bytes]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """FP16 patterns and codes [blocks, 64] of encoded blocks; inverse of `encode_blocks`.

    Raises
    ------
    DecodeError
        On the first malformed block.
    """
    slots, lengths = np.zeros((len(blocks), SLOT_BYTES), np.uint8), np.zeros(len(blocks), np.uint8)
    for index, raw in enumerate(blocks):
        if not 1 <= len(raw) <= MAX_LENGTH:
            raise DecodeError(f"length must be 1 to {MAX_LENGTH} bytes, not {len(raw)}", index)
        slots[index, : len(raw)] = np.frombuffer(raw, np.uint8)
        lengths[index] = len(raw)
    bits, codes, _ = decode_slots(slots, lengths)
    return bits, codes


def block_addresses(lengths: ArrayLike, log2_run: int) -> NDArray[np.int64]:
    """Where each block begins, in bytes from the first slot on, by the lengths [blocks] in the table."""
    lengths = np.asarray(lengths, np.int64)
    blocks, run = len(lengths), 1 << log2_run
    padded = np.zeros(-(-blocks // run) * run, np.int64)
    padded[:blocks] = lengths
    before = np.cumsum(padded.reshape(-1, run), axis=1) - padded.reshape(-1, run)
    return (before + SLOT_BYTES * run * np.arange(len(before))[:, None]).ravel()[:blocks]


@dataclass(frozen=True)
class TensorLayout:
    """How a tensor of lines of pixels of channels lies in memory.

    Parameters
    ----------
    lines : int
        Lines of all images; of weights, kernel taps.
    pixels : int
        Pixels of a line; of weights, input channels.
    channels : int
        Elements of a pixel. Beyond 64, each 64 of them are a plane.
    beat : int
        Least number of channels that a pixel is padded to: a power of two up to 64.
    image_lines : int
        Lines of an image, a divisor of `lines`; 0: all of them.
    line_blocks : int
        Block numbers from one line to the next, at least the blocks of a line; 0: just these.
    log2_run : int
        Blocks of a run: 2 to this power, 0 to 4. Runs must not begin in a line behind its first block unless
        `line_blocks` leaves no number unused.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    lines: int
    pixels: int
    channels: int
    beat: int = 4
    image_lines: int = 0
    line_blocks: int = 0
    log2_run: int = 0

    def __post_init__(self) -> None:
        for name in ("lines", "pixels", "channels"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        if self.beat not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"beat must be a power of two up to {BLOCK}, not {self.beat!r}")
        if not self.image_lines:
            object.__setattr__(self, "image_lines", self.lines)
        if self.image_lines < 1 or self.lines % self.image_lines:
            raise ValueError(f"image_lines must be a divisor of lines = {self.lines}, not {self.image_lines!r}")
        if not self.line_blocks:
            object.__setattr__(self, "line_blocks", self.used_blocks)
        if self.line_blocks < self.used_blocks:
            raise ValueError(f"line_blocks must be at least {self.used_blocks}, not {self.line_blocks!r}")
        if not 0 <= self.log2_run <= MAX_LOG2_RUN:
            raise ValueError(f"log2_run must be 0 to {MAX_LOG2_RUN}, not {self.log2_run!r}")
        if self.line_blocks != self.used_blocks and self.line_blocks % (1 << self.log2_run):
            raise ValueError(
                f"line_blocks must be a multiple of the run's {1 << self.log2_run} blocks, not {self.line_blocks!r}"
            )

    @property
    def padded_channels(self) -> int:
        """Elements of a pixel with its padding: a power of two, or a multiple of 64 beyond that."""
        if self.channels > BLOCK:
            return -(-self.channels // BLOCK) * BLOCK
        return max(self.beat, 1 << (int(self.channels) - 1).bit_length())

    @property
    def planes(self) -> int:
        """Planes that the channels are cut into."""
        return max(1, self.padded_channels // BLOCK)

    @property
    def block_pixels(self) -> int:
        """Pixels that share a block (1 where a pixel fills it)."""
        return max(1, BLOCK // self.padded_channels)

    @property
    def used_blocks(self) -> int:
        """Blocks of a line."""
        return -(-self.pixels // self.block_pixels)

    @property
    def blocks(self) -> int:
        """Block numbers of the tensor."""
        return self.lines * self.planes * self.line_blocks

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return SLOT_BYTES * self.blocks

    @property
    def table_bytes(self) -> int:
        """Bytes of the length table, rounded up to 32."""
        return -(-self.blocks // _ALIGN) * _ALIGN

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the array: lines, pixels, channels."""
        return self.lines, self.pixels, self.channels

    def block_of(self, line: ArrayLike, pixel: ArrayLike, channel: ArrayLike) -> NDArray[np.int64]:
        """Number of the block that holds an element (arrays broadcast)."""
        line, pixel, channel = (np.asarray(one, np.int64) for one in (line, pixel, channel))
        image, within = line // self.image_lines, line % self.image_lines
        plane = image * self.planes + channel // BLOCK
        return (plane * self.image_lines + within) * self.line_blocks + pixel // self.block_pixels

    def element_of(self, pixel: ArrayLike, channel: ArrayLike) -> NDArray[np.int64]:
        """Number of an element within its block (arrays broadcast)."""
        pixel, channel = np.asarray(pixel, np.int64), np.asarray(channel, np.int64)
        return pixel % self.block_pixels * min(self.padded_channels, BLOCK) + channel % BLOCK

    def index_maps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Block and element within it of each element of an array [lines, pixels, channels]."""
        line, pixel, channel = np.ogrid[: self.lines, : self.pixels, : self.channels]
        block = self.block_of(line, pixel, channel)
        return block, np.broadcast_to(self.element_of(pixel, channel), block.shape)

    def used(self) -> NDArray[np.bool_]:
        """Which block numbers are those of blocks."""
        return np.arange(self.blocks) % self.line_blocks < self.used_blocks

    def to_blocks(self, array: ArrayLike) -> NDArray:
        """An array [lines, pixels, channels] cut into blocks [blocks, 64], padded with zeros.

        Raises
        ------
        ValueError
            If the array has another shape.
        """
        array = np.asarray(array)
        if array.shape != self.shape:
            raise ValueError(f"array must have shape {self.shape}, not {array.shape!r}")
        padded = np.zeros((self.lines, self.line_blocks * self.block_pixels, self.padded_channels), array.dtype)
        padded[:, : self.pixels, : self.channels] = array
        split = padded.reshape(-1, self.image_lines, padded.shape[1], self.planes, min(self.padded_channels, BLOCK))
        return split.transpose(0, 3, 1, 2, 4).reshape(self.blocks, BLOCK)

    def from_blocks(self, blocks: ArrayLike) -> NDArray:
        """Inverse of `to_blocks`; padding is dropped.

        Raises
        ------
        ValueError
            If `blocks` has another shape than [blocks, 64].
        """
        blocks = np.asarray(blocks)
        if blocks.shape != (self.blocks, BLOCK):
            raise ValueError(f"blocks must have shape {(self.blocks, BLOCK)}, not {blocks.shape!r}")
        pixels = self.line_blocks * self.block_pixels
        split = blocks.reshape(-1, self.planes, self.image_lines, pixels, min(self.padded_channels, BLOCK))
        padded = split.transpose(0, 2, 3, 1, 4).reshape(self.lines, pixels, self.padded_channels)
        return padded[:, : self.pixels, : self.channels].copy()

    def lengths(self, codes: ArrayLike) -> NDArray[np.uint8]:
        """The length table [blocks] of a tensor with these codes [lines, pixels, channels]."""
        lengths = block_lengths(self.to_blocks(codes))
        lengths[~self.used()] = 0
        return lengths

    def pack(self, bits: ArrayLike, codes: ArrayLike) -> tuple[bytes, bytes]:
        """Memory image of a tensor.

        Parameters
        ----------
        bits, codes : uint16 array, uint8 array [lines, pixels, channels]

        Returns
        -------
        slots : bytes
            `slot_bytes` bytes, zeros where unused.
        table : bytes
            `table_bytes` bytes, zeros where unused.

        Raises
        ------
        TypeError, ValueError
            As of `encode_slots` and `to_blocks`.
        """
        bits, codes = _check_pair(bits, codes)
        slots, lengths = encode_slots(self.to_blocks(bits), self.to_blocks(codes))
        lengths[~self.used()] = 0
        image = np.zeros(self.slot_bytes, np.uint8)
        row, column = np.nonzero(np.arange(SLOT_BYTES) < lengths[:, None])
        image[block_addresses(lengths, self.log2_run)[row] + column] = slots[row, column]
        return image.tobytes(), lengths.tobytes() + bytes(self.table_bytes - self.blocks)

    def unpack(
        self, slots: bytes, table: bytes, on_error: str = "raise"
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """Inverse of `pack`: bits and codes [lines, pixels, channels].

        Raises
        ------
        DecodeError
            On the first malformed block, unless `on_error` is "zeros".
        ValueError
            If the image is too short.
        """
        if len(slots) < self.slot_bytes:
            raise ValueError(f"slots must have {self.slot_bytes} bytes, not {len(slots)!r}")
        if len(table) < self.blocks:
            raise ValueError(f"table must have {self.blocks} bytes, not {len(table)!r}")
        used = self.used()
        lengths = np.where(used, np.frombuffer(table, np.uint8, self.blocks), np.uint8(0))
        image = np.zeros(self.slot_bytes + 255 * (1 + (1 << self.log2_run)), np.uint8)
        image[: self.slot_bytes] = np.frombuffer(slots, np.uint8, self.slot_bytes)
        block = image[block_addresses(lengths, self.log2_run)[used][:, None] + np.arange(SLOT_BYTES)]
        bits, codes = np.zeros((self.blocks, BLOCK), np.uint16), np.zeros((self.blocks, BLOCK), np.uint8)
        bits[used], codes[used], _ = decode_slots(block, lengths[used], on_error)
        return self.from_blocks(bits), self.from_blocks(codes)

    def bus_bytes(self, table: bytes) -> int:
        """Bytes of all blocks."""
        return int(np.frombuffer(table, np.uint8, self.blocks)[self.used()].sum(dtype=np.int64))
