"""The chip's commands: one table of fields that the hardware, the compiler and the documentation share.

A command is 64 bytes, little endian: the fields of its layout from bit 0 up, then zeros. Every command starts with

- `opcode` (8 bits),
- `wait_units` (8 bits): a set of `Unit`s that must be idle before the command starts,
- `wait_cores` (16 bits): likewise, one bit a core,
- `wait_queues` (16 bits): cores that must have done all their commands but the last one,
- `wait_unit_queues` (8 bits): likewise, one bit a `Unit`.

Commands start in program order; units then work side by side. A unit takes one more command while another is running,
but the FGMP controller takes one only when it is idle.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from amaranth.hdl import Shape, signed
from amaranth.lib import data, enum

__all__ = [
    "COMMAND_BYTES",
    "LAYOUTS",
    "READS_B",
    "READS_C",
    "TAKES_TWO",
    "UNITS",
    "Command",
    "Opcode",
    "Target",
    "Unit",
    "VectorOp",
    "layout_of",
    "unit_of",
]

COMMAND_BYTES = 64


class Opcode(enum.Enum, shape=8):
    """First byte of a command."""

    END = 0x00  # wait for every unit, then raise the interrupt
    NOP = 0x01  # only waits
    LOAD = 0x02  # encoded tensor -> sparse buffers, dense buffers, mask stores or vector memory, by one of two units
    STORE = 0x03  # vector memory -> encoded tensor
    LOAD_RAW = 0x04  # FP32 words -> vector memory
    STORE_RAW = 0x05  # vector memory -> FP32 words
    MULTIPLY = 0x06  # sparse x dense -> partial sums
    DRAIN = 0x07  # partial sums -> rounded -> vector memory
    VECTOR = 0x08  # vector memory -> vector memory
    MARK = 0x09  # wait for every unit, then write all counters to memory
    ADAPT = 0x0A  # statistics of what was stored -> next FGMP state of a tensor, and a record in memory
    STATE = 0x0B  # sets the current and the next FGMP state of a tensor
    COMMIT = 0x0C  # the next FGMP state of a tensor becomes the current one


class Unit(enum.IntEnum):
    """Bit numbers of `wait_units`."""

    LOAD = 0
    STORE = 1
    VECTOR = 2
    DRAIN = 3
    FGMP = 4  # the dynamic ratio controller
    LOAD_DENSE = 5  # LOAD with target DENSE, VMEM_DENSE or MASK_DENSE; LOAD is all others
    STORE_RAW = 6


UNITS: dict[Opcode, Unit] = {
    Opcode.LOAD: Unit.LOAD,
    Opcode.LOAD_RAW: Unit.LOAD,
    Opcode.STORE: Unit.STORE,
    Opcode.STORE_RAW: Unit.STORE_RAW,
    Opcode.VECTOR: Unit.VECTOR,
    Opcode.DRAIN: Unit.DRAIN,
    Opcode.ADAPT: Unit.FGMP,
    Opcode.STATE: Unit.FGMP,
    Opcode.COMMIT: Unit.FGMP,
}
"""Where commands go that are not for cores; but LOAD goes to LOAD_DENSE by its target, see `unit_of`."""

TAKES_TWO = (Unit.LOAD, Unit.LOAD_DENSE, Unit.STORE, Unit.STORE_RAW, Unit.VECTOR, Unit.DRAIN)
"""Units that, like cores, take a command while another is running."""


class Target(enum.Enum, shape=4):
    """Where LOAD puts elements. Bit 0: the unit is LOAD_DENSE instead of LOAD. Others do not exist (FIELD).

    A mask has a bit an element: whether it is above zero (a NaN is not).
    """

    SPARSE = 0
    DENSE = 1
    VMEM = 2
    VMEM_DENSE = 3  # to the vector memory, by the unit LOAD_DENSE
    MASK = 4  # to the mask stores of cores
    MASK_DENSE = 5  # the same, by the unit LOAD_DENSE
    DENSE_LOAD = 8  # to the dense buffers, by the unit LOAD


class VectorOp(enum.Enum, shape=5):
    """FP32 operations of the vector unit on operands a, b and c, element by element, each step rounded (RNE)."""

    COPY = 0  # a
    ADD = 1  # a + b
    SUB = 2  # a - b
    MUL = 3  # a * b
    MULADD = 4  # (a * b) + c, two roundings
    MAX = 5  # a if a > b else b (NaN if either is)
    MIN = 6  # a if a < b else b (NaN if either is)
    KEEP_POSITIVE = 7  # a if b > 0 else +0
    KEEP_EQUAL = 8  # a if b == c else +0
    DIV = 9  # a / b
    SQRT = 10  # square root of a
    SUM = 16  # accumulator[sum + outer] += f16(a * 2^-a_shift) * f16(b * 2^-b_shift), exactly; see `quantise`
    SUM_OUT = 17  # dst[outer] = f32(accumulator[sum + outer] * 2^(a_shift + b_shift))
    GREATER_EQUAL = 11  # 1.0 if a >= b else +0
    ADD_UNMASKED = 12  # +0 if a is -0 (a sum that DRAIN found masked), else a + b


READS_B = (
    VectorOp.ADD, VectorOp.SUB, VectorOp.MUL, VectorOp.MULADD, VectorOp.MAX, VectorOp.MIN, VectorOp.KEEP_POSITIVE,
    VectorOp.KEEP_EQUAL, VectorOp.DIV, VectorOp.GREATER_EQUAL, VectorOp.ADD_UNMASKED, VectorOp.SUM,
)  # fmt: skip
READS_C = (VectorOp.MULADD, VectorOp.KEEP_EQUAL)
"""Operations that have an operand b, and c (others read c if they are masked)."""

_HEADER = {"opcode": 8, "wait_units": 8, "wait_cores": 16, "wait_queues": 16, "wait_unit_queues": 8}


def _strided(name: str, base, stride, loops: str) -> dict:
    return {name: base} | {f"{name}_{loop}": stride for loop in loops.split()}


# Fields named `tensor` are numbers of dynamic tensors (0: none). Before a command starts, the command processor adds
# the scales of their current FGMP states to the command, as the comments say.
_WALK = {  # pixels of an encoded tensor, in three nested loops n, i, j (j innermost)
    "tensor": 8,  # its scale is added to `scale`; STORE also takes its lo and hi
    "slots": 40,  # byte address of block 0, a multiple of 32
    "table": 40,  # byte address of the length of block 0, a multiple of 32
    "kind": 3,
    "n_count": 12,
    "i_count": 12,
    "j_count": 12,
    "line": signed(25),  # line of n = i = 0
    "line_n": 16,  # lines from one n to the next
    "line_i": 8,  # lines from one i to the next
    "pixel": signed(16),  # pixel in its line of j = 0
    "line_blocks": 16,  # block numbers from one line to the next
    "log2_block_pixels": 3,  # pixels that share a block (where a pixel has fewer than 64 channels)
    "log2_run": 3,  # blocks that are packed one behind the other, 0 to 4
}

_FIELDS: dict[Opcode, dict] = {
    Opcode.END: {},
    Opcode.NOP: {},
    Opcode.LOAD: _WALK
    | {
        "target": 4,
        "page": 1,
        "transpose": 1,  # sparse and dense: exchange row and column; masks: 0
        "cores": 16,  # sparse, dense and masks: which cores' buffers, any number of them
        "scale": signed(8),  # vector memory: elements are multiplied by 2^scale
        "fill": 16,  # vector memory: FP16 pattern for pixels outside the valid range
        "pixel_j": 8,  # pixels from one j to the next
        "i_first": 12,  # valid i are i_first <= i < i_end; others are padding
        "i_end": 12,
        "j_first": 12,
        "j_end": 12,
        "channel": 5,  # first beat of the pixel's channels within the block's part of the pixel
        "channel_beats": 5,
    }
    # Pixel (n, i, j) goes to row dest + n*dest_n + i*dest_i + j*dest_j; its channel beat b to column
    # element + i*element_i + beat*b. Vector memory: to row dest + ... + b.
    | _strided("dest", 16, signed(16), "n i j")
    | _strided("element", 12, 12, "i"),
    Opcode.STORE: _WALK
    | {
        "scale": signed(8),  # elements are multiplied by 2^-scale, then rounded to FP16
        "lo": 15,  # FP16 magnitudes, see lnpu.fgmp.quantizer
        "hi": 15,
        "below": 2,
        "above": 1,
        "saturate": 1,  # an overflow of the rounding to FP16 gives the largest finite value
    }
    | _strided("source", 16, signed(16), "n i j"),
    Opcode.LOAD_RAW: {
        "address": 40,  # multiple of the AXI width
        "kind": 3,
        "line_count": 16,
        "line_rows": 16,  # vector memory rows (beat FP32 words) in a line
        "pitch": 32,  # bytes from one line to the next, a multiple of the AXI width
        "vmem": 16,
        "vmem_line": signed(16),
    },
    Opcode.STORE_RAW: {
        "address": 40,
        "kind": 3,
        "line_count": 16,
        "line_rows": 16,
        "pitch": 32,
        "vmem": 16,
        "vmem_line": signed(16),
    },
    # Visits (n, h, w, r, s), s innermost. A visit takes sparse row `row`, masks it with kmask << shift, and adds, for
    # every non-zero element k, element k times dense row (dense + k) to partial-sum row `psum`.
    Opcode.MULTIPLY: {
        "cores": 16,
        "sparse_page": 1,
        "dense_page": 1,
        "initialise": 1,  # partial sums start from zero instead of from the store
        "masked": 1,  # sums whose bit in the mask store is 0 are not computed, see lnpu.core.core
        "mask_page": 1,
        "lanes": 8,  # lanes that count as working in the performance counters
        "count_n": 10,
        "count_h": 10,
        "count_w": 10,
        "count_r": 10,
        "count_s": 10,
    }
    | _strided("row", signed(12), signed(12), "n h w r s")
    | _strided("psum", signed(12), signed(12), "n h w r s")
    | _strided("dense", signed(13), signed(13), "r s")
    | _strided("shift", 8, signed(8), "r s")
    | {"kmask": 128},
    Opcode.DRAIN: {
        "core": 4,
        "count_n": 10,
        "count_h": 10,
        "count_w": 10,
        "lane_beat": 6,  # first beat of lanes
        "lane_beats": 6,
        "lanes": 8,  # lanes from this one on are padding, written as +0
        "shift": signed(12),  # rounded is the sum times 2^shift ...
        "scale": signed(8),  # ... and what is written is that times 2^scale
        "fp16": 1,  # round to FP16, else to FP32
        "saturate": 1,
        "masked": 1,  # sums that were masked are written as -0, a -0 of others as +0
        "tensor_a": 8,  # scale added to `shift`
        "tensor_b": 8,  # scale added to `shift`
        "tensor_out": 8,  # scale subtracted from `shift` and added to `scale`
    }
    | _strided("psum", signed(12), signed(12), "n h w")
    | _strided("vmem", 16, signed(16), "n h w"),
    Opcode.VECTOR: {
        "op": 5,
        "outer": 16,
        "inner": 16,
        "b_immediate": 1,  # b is `immediate_b`
        "c_immediate": 1,
        "initialise": 1,  # SUM starts from zero
        "rectify": 1,  # results below zero, and -0, become +0
        "masked": 1,  # results whose c is not positive become +0; SUM and SUM_OUT do not look at it
        "quantise": 1,  # SUM takes what FGMP would keep of a, by ...
        "lo": 15,  # ... these fields, as of STORE
        "hi": 15,
        "below": 2,
        "above": 1,
        "a_shift": signed(8),
        "b_shift": signed(8),
        "sum": 10,
        "tensor_a": 8,  # scale added to `a_shift`; with `quantise`, its lo and hi are taken too
        "tensor_b": 8,  # scale added to `b_shift`
        "immediate_b": 32,
        "immediate_c": 32,
    }
    | _strided("dst", 16, signed(16), "outer inner")
    | _strided("a", 16, signed(16), "outer inner")
    | _strided("b", 16, signed(16), "outer inner")
    | _strided("c", 16, signed(16), "outer inner"),
    Opcode.MARK: {"address": 40},  # multiple of 32
    # See lnpu.fgmp.controller. Shares are in units of 1/256; `_min` and `_max` are exponent fields of FP16.
    Opcode.ADAPT: {
        "tensor": 8,  # 1 to tensor_states - 1
        "adapt_scale": 1,  # what may change
        "adapt_hi": 1,
        "adapt_lo": 1,
        "top": 5,  # wanted FP16 exponent field of the largest element ...
        "slack": 3,  # ... and how much less it may be
        "hi_least": 8,  # wanted share of FP16 in the non-zeros
        "hi_most": 8,
        "lo_least": 8,  # wanted share of underflows in what was not zero before
        "lo_most": 8,
        "hi_min": 5,
        "hi_max": 5,
        "lo_min": 5,
        "lo_max": 5,
        "address": 40,  # where the 32-byte record goes, a multiple of 32
    },
    Opcode.STATE: {"tensor": 8, "scale": signed(8), "lo": 15, "hi": 15},
    Opcode.COMMIT: {"tensor": 8, "frozen": 1},  # frozen: the current state becomes the next one instead
}

LAYOUTS: dict[Opcode, data.StructLayout] = {
    opcode: data.StructLayout(_HEADER | fields) for opcode, fields in _FIELDS.items()
}
"""Layout of each command (its size is at most 512 bits)."""

assert all(layout.size <= 8 * COMMAND_BYTES for layout in LAYOUTS.values())


def _range(shape: Shape) -> tuple[int, int]:
    if shape.signed:
        return -(1 << shape.width - 1), (1 << shape.width - 1) - 1
    return 0, (1 << shape.width) - 1


_RANGES = {
    opcode: {name: _range(Shape.cast(place.shape)) for name, place in layout if name != "opcode"}
    for opcode, layout in LAYOUTS.items()
}
_PLACES = {
    opcode: {name: (place.offset, (1 << place.width) - 1) for name, place in layout}
    for opcode, layout in LAYOUTS.items()
}


def layout_of(opcode: Opcode) -> data.StructLayout:
    """Layout of the commands with this opcode."""
    return LAYOUTS[opcode]


@dataclass
class Command:
    """One command; `fields` not named are zero.

    Raises
    ------
    TypeError
        If there is no such field.
    ValueError
        If a value does not fit its field.
    """

    opcode: Opcode
    fields: dict[str, int] = field(default_factory=dict)

    def __init__(self, opcode: Opcode, **fields: int) -> None:
        self.opcode = opcode
        self.fields = fields
        ranges = _RANGES[opcode]
        for name, value in fields.items():
            if name not in ranges:
                raise TypeError(f"{opcode.name} has no field {name!r}")
            low, high = ranges[name]
            if not low <= int(value) <= high:
                raise ValueError(f"{opcode.name}.{name} must be {low} to {high}, not {value}")

    def encode(self) -> bytes:
        """The command's 64 bytes."""
        word = self.opcode.value
        places = _PLACES[self.opcode]
        for name, value in self.fields.items():
            offset, mask = places[name]
            word |= (int(value) & mask) << offset
        return word.to_bytes(COMMAND_BYTES, "little")

    @classmethod
    def decode(cls, raw: bytes) -> "Command":
        """The command that `raw` encodes (inverse of `encode`); `ValueError` on an unknown opcode."""
        opcode = Opcode(raw[0])
        word = int.from_bytes(raw, "little")
        fields = {}
        for name, place in LAYOUTS[opcode]:
            value = (word >> place.offset) & ((1 << place.width) - 1)
            shape = place.shape
            if not isinstance(shape, int) and shape.signed and value >> (place.width - 1):
                value -= 1 << place.width
            if name != "opcode":
                fields[name] = value
        return cls(opcode, **fields)


def unit_of(opcode: Opcode, fields: Mapping[str, int]) -> Unit:
    """The unit that a command other than END, NOP, MULTIPLY and MARK goes to."""
    if opcode is Opcode.LOAD and fields.get("target", 0) & 1:
        return Unit.LOAD_DENSE
    return UNITS[opcode]
