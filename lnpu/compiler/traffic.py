"""External memory access of a program, to the bit, from its commands and the lengths of encoded blocks.

Counts what crosses the AXI master: words of blocks, of length tables, of FP32 lines, of commands and of counters, as
the LOAD and STORE units ask for them; and what the same elements take in plain FP16.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from golden.memory import block_addresses
from lnpu.compiler.program import Program
from lnpu.config import BLOCK, ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Opcode
from lnpu.ctrl.counters import COUNTERS
from lnpu.formats import MAX_LENGTH, TensorKind

__all__ = ["Traffic", "predict_traffic"]

Lengths = NDArray[np.uint8]
"""Length of each block of a tensor, in bytes: its length table."""


@dataclass
class Traffic:
    """Bits by tensor kind: on the bus, and in plain form (as of the counters of the same names)."""

    read: dict[TensorKind, int] = field(default_factory=lambda: dict.fromkeys(TensorKind, 0))
    write: dict[TensorKind, int] = field(default_factory=lambda: dict.fromkeys(TensorKind, 0))
    plain_read: dict[TensorKind, int] = field(default_factory=lambda: dict.fromkeys(TensorKind, 0))
    plain_write: dict[TensorKind, int] = field(default_factory=lambda: dict.fromkeys(TensorKind, 0))
    blocks: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """How often each block of a tensor was transferred, by the address of its length table."""

    def counters(self) -> dict[str, int]:
        """The same, by the names of the chip's counters."""
        return {
            f"{name}_bits_{kind.name.lower()}": bits
            for name in ("read", "write", "plain_read", "plain_write")
            for kind, bits in getattr(self, name).items()
        }

    def plain(self, kind: TensorKind) -> int:
        """Bits of a kind in plain form, both ways; programs and what has no kind stay as they are."""
        if kind in (TensorKind.PROGRAM, TensorKind.OTHER):
            return self.read[kind] + self.write[kind]
        return self.plain_read[kind] + self.plain_write[kind]

    def count(self, table: int, blocks: NDArray[np.int64], size: int) -> None:
        """Note the transfer of these blocks of a tensor of `size` blocks."""
        if table not in self.blocks:
            self.blocks[table] = np.zeros(size, np.int64)
        np.add.at(self.blocks[table], blocks, 1)


class _Tables:
    """Length tables by their addresses, and where their blocks lie, worked out once for each."""

    def __init__(self, config: ChipConfig, lengths: Mapping[int, Lengths]) -> None:
        self._word_bytes, self._lengths = config.axi_bits // 8, lengths
        self._words: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def lengths(self, f: Mapping[str, int]) -> Lengths:
        """The table that a command names."""
        return self._lengths[f["table"]]

    def words(self, f: Mapping[str, int], block: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last AXI word of the bytes of each block, from the first word of the slots on."""
        if f["table"] not in self._words:
            lengths = self.lengths(f)
            start = block_addresses(lengths, f["log2_run"])
            self._words[f["table"]] = start // self._word_bytes, (start + lengths - 1) // self._word_bytes
        first, last = self._words[f["table"]]
        return first[block], last[block]


def predict_traffic(
    program: Program, reads: Mapping[int, Lengths], writes: Mapping[int, Lengths] | None = None
) -> Traffic:
    """What a program moves.

    Parameters
    ----------
    program : Program
    reads : mapping
        Length tables of the tensors that it reads, by the address of the table.
    writes : mapping or None
        Those of the tensors that it writes, where they are not in `reads` or become others.
    """
    config = program.config
    read_tables, write_tables = _Tables(config, reads), _Tables(config, {**reads, **(writes or {})})
    total = Traffic()
    for command in program.commands:
        f = _Fields(command.fields)
        match command.opcode:
            case Opcode.LOAD:
                _load(total, config, f, read_tables)
            case Opcode.STORE:
                _store(total, config, f, write_tables)
            case Opcode.LOAD_RAW | Opcode.STORE_RAW:
                bits = 32 * f["line_count"] * f["line_rows"] * config.beat
                names = ("read", "plain_read") if command.opcode is Opcode.LOAD_RAW else ("write", "plain_write")
                for name in names:
                    getattr(total, name)[TensorKind(f["kind"])] += bits
            case Opcode.MARK:
                size = -(-8 * len(COUNTERS) // 32) * 32
                total.write[TensorKind.OTHER] += 8 * size
            case Opcode.ADAPT:
                total.write[TensorKind.OTHER] += 256
        total.read[TensorKind.PROGRAM] += 8 * COMMAND_BYTES
    return total


class _Fields(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return 0


def _walk(f: Mapping[str, int], pixel_step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Line, pixel and validity of each (n, i, j) in order."""
    n, i, j = np.ogrid[: f["n_count"], : f["i_count"], : f["j_count"]]
    line = f["line"] + n * f["line_n"] + i * f["line_i"] + 0 * j
    pixel = f["pixel"] + j * pixel_step + 0 * (n + i)
    valid = (i >= f["i_first"]) & (i < f["i_end"]) & (j >= f["j_first"]) & (j < f["j_end"]) & (n >= 0)
    return line.ravel(), pixel.ravel(), np.broadcast_to(valid, np.broadcast_shapes(n.shape, i.shape, j.shape)).ravel()


def _block(f: Mapping[str, int], line: NDArray[np.int64], pixel: NDArray[np.int64]) -> NDArray[np.int64]:
    return line * f["line_blocks"] + (pixel >> f["log2_block_pixels"])


def _changes(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where a value differs from the one before (the first always does)."""
    return np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]])


def _load(total: Traffic, config: ChipConfig, f: Mapping[str, int], tables: _Tables) -> None:
    line, pixel, valid = _walk(f, f["pixel_j"])
    line, pixel = line[valid], pixel[valid]
    kind = TensorKind(f["kind"])
    total.plain_read[kind] += 16 * len(line) * f["channel_beats"] * config.beat
    if not len(line):
        return
    block = _block(f, line, pixel)
    within = pixel & ((1 << f["log2_block_pixels"]) - 1)
    # A block is fetched again where the next pixel in it does not come later in it.
    again = np.concatenate([[False], (block[1:] == block[:-1]) & (within[1:] <= within[:-1])])
    fetched = block[_changes(block) | again]
    table_words = int(_changes((f["table"] + fetched) // (config.axi_bits // 8)).sum())
    lengths = tables.lengths(f)
    fetched = fetched[(lengths[fetched] > 0) & (lengths[fetched] <= MAX_LENGTH)]
    total.count(f["table"], fetched, len(lengths))
    first, last = tables.words(f, fetched)
    kept = int((first[1:] == last[:-1]).sum())
    total.read[kind] += (int((last - first + 1).sum()) - kept + table_words) * config.axi_bits


def _store(total: Traffic, config: ChipConfig, f: Mapping[str, int], tables: _Tables) -> None:
    share = 1 << f["log2_block_pixels"]
    line, pixel, _ = _walk({**f, "i_end": f["i_count"], "j_end": f["j_count"], "i_first": 0, "j_first": 0}, 1)
    block = _block(f, line, pixel)
    block = block[_changes(block)] if share > 1 else block
    kind = TensorKind(f["kind"])
    table_words = int(_changes((f["table"] + block) // (config.axi_bits // 8)).sum())
    total.count(f["table"], block, len(tables.lengths(f)))
    first, last = tables.words(f, block)
    merged = int(((first[1:] == last[:-1]) & (block[1:] == block[:-1] + 1)).sum())
    total.write[kind] += (int((last - first + 1).sum()) - merged + table_words) * config.axi_bits
    total.plain_write[kind] += 16 * BLOCK * len(block)
