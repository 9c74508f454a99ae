"""Signatures and payload layouts of the ports between the chip's blocks."""

from amaranth.hdl import unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES
from lnpu.formats import element_beat

__all__ = [
    "Buffer",
    "Error",
    "axi_lite_signature",
    "axi_read_signature",
    "axi_write_signature",
    "buffer_write",
    "command_stream",
    "memory_read_signature",
    "memory_write_signature",
    "vmem_read_signature",
    "vmem_row",
    "vmem_write",
]

COMMAND_BITS = 8 * COMMAND_BYTES


class Error(enum.Enum, shape=4):
    """Error codes of units and of the ERROR register."""

    NONE = 0
    OPCODE = 1
    FIELD = 2
    RANGE = 3
    DECODE = 4
    READ = 5
    WRITE = 6
    LENGTH = 7
    ABORTED = 8


class Buffer(enum.Enum, shape=2):
    """The stores of a core that LOAD writes."""

    SPARSE = 0
    DENSE = 1
    MASK = 2


def command_stream() -> stream.Signature:
    """Stream of raw commands to a unit. The unit is ready only while it is idle."""
    return stream.Signature(unsigned(COMMAND_BITS))


def buffer_write(config: ChipConfig) -> data.StructLayout:
    """A beat of elements on its way to sparse or dense buffers or mask stores (no back-pressure: qualify with `valid`).

    Not transposed: element e of the beat goes to (row, column + e). Transposed: to (row + e, column). The one that
    runs over e is a multiple of `beat`. Whatever is outside the buffer must not be written; LOAD has checked it.
    A mask store takes bit e of `mask` instead of element e, never transposed.
    """
    return data.StructLayout(
        {
            "valid": 1,
            "cores": config.cores,
            "buffer": 2,  # a `Buffer`
            "page": 1,
            "transpose": 1,
            "row": 12,
            "column": 8,
            "beat": element_beat(config.beat),
            "mask": config.beat,  # 0 for the other buffers
        }
    )


def vmem_row(config: ChipConfig) -> data.ArrayLayout:
    """A row of the vector memory: `beat` FP32 patterns."""
    return data.ArrayLayout(32, config.beat)


def vmem_write(config: ChipConfig) -> data.StructLayout:
    """Payload of a write stream into the vector memory."""
    return data.StructLayout({"address": 16, "row": vmem_row(config)})


def vmem_read_signature(config: ChipConfig) -> wiring.Signature:
    """Read port of the vector memory, seen by the reader.

    `row` is the word of the last handshake on `request`, from the cycle after it until the cycle after the next
    handshake on this port.
    """
    return wiring.Signature(
        {
            "request": Out(stream.Signature(unsigned(16))),
            "row": In(vmem_row(config)),
        }
    )


def memory_read_signature(config: ChipConfig) -> wiring.Signature:
    """Client port of the AXI reader, seen by the client: read `words` AXI words (1 or more) from `address`.

    `address` is a byte address, a multiple of the AXI width. Responses come in the order of the requests; `last` marks
    the last word of each request. A client that asked must in the end take the data.
    """
    return wiring.Signature(
        {
            "request": Out(
                stream.Signature(data.StructLayout({"address": config.address_bits, "words": 16, "kind": 3}))
            ),
            "response": In(stream.Signature(data.StructLayout({"data": config.axi_bits, "last": 1}))),
        }
    )


def memory_write_signature(config: ChipConfig) -> wiring.Signature:
    """Client port of the AXI writer, seen by the client.

    Each request is followed by its `words` AXI words on `data`. `idle` is set while every write of this client has
    been acknowledged by the memory. With `fence`, for a cycle in which all words of all requests have been taken, the
    client begins another part of its writes: from the next cycle on, `fenced` is set while all that it had asked for
    before its last `fence` has been acknowledged.
    """
    return wiring.Signature(
        {
            "request": Out(
                stream.Signature(data.StructLayout({"address": config.address_bits, "words": 16, "kind": 3}))
            ),
            "data": Out(stream.Signature(data.StructLayout({"data": config.axi_bits, "strobe": config.axi_bits // 8}))),
            "idle": In(1),
            "fence": Out(1),
            "fenced": In(1),
        }
    )


def axi_read_signature(config: ChipConfig) -> wiring.Signature:
    """AXI4 read channels, seen by the master (one ID, INCR bursts of whole words)."""
    return wiring.Signature(
        {
            "arvalid": Out(1),
            "arready": In(1),
            "araddr": Out(config.address_bits),
            "arlen": Out(8),
            "arsize": Out(3),
            "arburst": Out(2),
            "arid": Out(1),
            "arcache": Out(4),
            "arprot": Out(3),
            "rvalid": In(1),
            "rready": Out(1),
            "rdata": In(config.axi_bits),
            "rresp": In(2),
            "rlast": In(1),
            "rid": In(1),
        }
    )


def axi_write_signature(config: ChipConfig) -> wiring.Signature:
    """AXI4 write channels, seen by the master (one ID, INCR bursts of whole words)."""
    return wiring.Signature(
        {
            "awvalid": Out(1),
            "awready": In(1),
            "awaddr": Out(config.address_bits),
            "awlen": Out(8),
            "awsize": Out(3),
            "awburst": Out(2),
            "awid": Out(1),
            "awcache": Out(4),
            "awprot": Out(3),
            "wvalid": Out(1),
            "wready": In(1),
            "wdata": Out(config.axi_bits),
            "wstrb": Out(config.axi_bits // 8),
            "wlast": Out(1),
            "bvalid": In(1),
            "bready": Out(1),
            "bresp": In(2),
            "bid": In(1),
        }
    )


def axi_lite_signature() -> wiring.Signature:
    """AXI4-Lite with 12-bit addresses and 32-bit data, seen by the master."""
    return wiring.Signature(
        {
            "awvalid": Out(1),
            "awready": In(1),
            "awaddr": Out(12),
            "awprot": Out(3),
            "wvalid": Out(1),
            "wready": In(1),
            "wdata": Out(32),
            "wstrb": Out(4),
            "bvalid": In(1),
            "bready": Out(1),
            "bresp": In(2),
            "arvalid": Out(1),
            "arready": In(1),
            "araddr": Out(12),
            "arprot": Out(3),
            "rvalid": In(1),
            "rready": Out(1),
            "rdata": In(32),
            "rresp": In(2),
        }
    )
