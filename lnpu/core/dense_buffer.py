"""The buffer of a core's resident operand: two whole rows a cycle."""

from dataclasses import dataclass
from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.core.page_write import page_write
from lnpu.core.sparse_buffer import rotated
from lnpu.formats import LOW_BITS
from lnpu.hdl import Block, Sram
from lnpu.interfaces import buffer_write

__all__ = ["DenseBuffer"]

_HIGH_BITS = 16 - LOW_BITS


class DenseBuffer(Block):
    """Two pages of `dense_rows` x `lanes` FP16 values.

    In a cycle each page takes a beat, along a row or (transposed) along a lane; at the same time two rows of a page are
    read that differ modulo `dense_banks`. Value (row, lane) is in bank (page, row mod `dense_banks`, (row + lane) mod
    `beat`).

    A bank has three SRAMs with the same addresses: the high 9 bits of its values, their low 7 bits, and a flag for each
    value whose low bits are not all zero. The flags of a row are read first, the rest in the cycle after: high bits of
    all banks, and low bits of banks where a flag is set. Low bits are written where they are not zero. So of a row of
    zeros and FP8 values no low bits are accessed, whatever was there before. A flag is written whenever its value is.

    Parameters
    ----------
    config : ChipConfig
        Its `dense_rows`, `dense_banks`, `lanes` and `beat`.

    Members
    -------
    write : In(ArrayLayout(buffer_write(config), 2))
        Every valid beat is written: `buffer` and `cores` are the core's business. Two in a cycle are of different
        pages; otherwise only the first is written.
    enable : In(2); page : In(1); row : In(ArrayLayout(range(dense_rows), 2))
        Reads the rows; two rows read in a cycle differ modulo `dense_banks`. What is written in this cycle or the next
        must not be among the values used.
    value : Out(ArrayLayout(ArrayLayout(16, lanes), 2))
        In the second cycle after; without meaning where `enable` was not set.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "write": In(data.ArrayLayout(buffer_write(config), 2)),
                "enable": In(2),
                "page": In(1),
                "row": In(data.ArrayLayout((config.dense_rows - 1).bit_length(), 2)),
                "value": Out(data.ArrayLayout(data.ArrayLayout(16, config.lanes), 2)),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.config.dense_rows}x{self.config.lanes}x{self.config.beat}x{self.config.dense_banks}"

    def elaborate(self, platform):
        m = Module()
        beat, lanes, banks = self.config.beat, self.config.lanes, self.config.dense_banks
        size = self.config.dense_rows // banks
        bank_bits = (banks - 1).bit_length()
        bits = (beat - 1).bit_length()
        groups = lanes // beat
        writes = [self._write(m, page) for page in range(2)]

        # Of each port: its row modulo `beat`, while the banks are read and then with what they gave. It names the bank
        # too, and is the rotation: pages have a multiple of `beat` rows.
        place, place_out = (
            [Signal(bits, name=f"{name}_{i}", reset_less=True) for i in range(2)] for name in ("place", "place_out")
        )
        for i in range(2):
            with m.If(self.enable[i]):
                m.d.sync += place[i].eq(self.row[i])
            m.d.sync += place_out[i].eq(place[i])
        page, page_out = Signal(reset_less=True), Signal(reset_less=True)
        with m.If(self.enable.any()):
            m.d.sync += page.eq(self.page)
        m.d.sync += page_out.eq(page)

        read = []  # of each bank, its words
        for bank in range(banks):
            mine = [Signal(name=f"mine_{bank}_{i}") for i in range(2)]  # port i has a row of this bank
            row = Signal(len(self.row[0]), name=f"row_{bank}")
            m.d.comb += [
                *(mine[i].eq(self.enable[i] & (self.row[i][:bank_bits] == bank)) for i in range(2)),
                row.eq(Mux(mine[0], self.row[0], self.row[1])),
            ]
            ask = mine[0] | mine[1]
            on = Signal(name=f"on_{bank}")
            address = Signal(range(size), name=f"address_{bank}", reset_less=True)
            m.d.sync += on.eq(ask)
            with m.If(ask):
                m.d.sync += address.eq(row[bank_bits:])
            words = []
            for c in range(beat):
                parts = []  # of each page: what was read of the high and low bits, and the flags
                for number, write in enumerate(writes):
                    name = f"{number}_{bank}_{c}"
                    w_row, written, not_zero = write.row[c], write.data[c], write.not_zero[c]
                    w_en = Signal(groups, name=f"w_en_{name}")
                    high, low, flag = (
                        Sram(depth=size, width=width * groups, granularity=width) for width in (_HIGH_BITS, LOW_BITS, 1)
                    )
                    m.submodules[f"high_{name}"] = high
                    m.submodules[f"low_{name}"] = low
                    m.submodules[f"flag_{name}"] = flag
                    m.d.comb += [
                        w_en.eq(Mux(w_row[:bank_bits] == bank, write.group, 0)),
                        high.w_en.eq(w_en),
                        high.w_data.eq(written[LOW_BITS:].replicate(groups)),
                        low.w_en.eq(Mux(not_zero, w_en, 0)),
                        low.w_data.eq(written[:LOW_BITS].replicate(groups)),
                        flag.w_en.eq(w_en),
                        flag.w_data.eq(not_zero.replicate(groups)),
                        flag.r_en.eq(ask & (self.page == number)),
                        flag.r_addr.eq(row[bank_bits:]),
                        high.r_en.eq(on & (page == number)),
                        low.r_en.eq(on & (page == number) & flag.r_data.any()),
                    ]
                    for sram in (high, low, flag):
                        m.d.comb += sram.w_addr.eq(w_row[bank_bits:])
                    for sram in (high, low):
                        m.d.comb += sram.r_addr.eq(address)
                    parts.append((high.r_data, low.r_data, flag.r_data))
                high_out = Signal(_HIGH_BITS * groups, name=f"high_out_{bank}_{c}")
                low_out = Signal(LOW_BITS * groups, name=f"low_out_{bank}_{c}")
                m.d.comb += [
                    high_out.eq(Mux(page_out, parts[1][0], parts[0][0])),
                    low_out.eq(Mux(page_out, parts[1][1], parts[0][1])),
                ]
                # Low bits that were not read, or not written, count as zero.
                shown = Signal(groups, name=f"shown_{bank}_{c}", reset_less=True)
                with m.If(on):
                    m.d.sync += shown.eq(Mux(page, parts[1][2], parts[0][2]))
                word = Signal(data.ArrayLayout(16, groups), name=f"word_{bank}_{c}")
                for g in range(groups):
                    low_part = Mux(shown[g], low_out.word_select(g, LOW_BITS), 0)
                    m.d.comb += word[g].eq(Cat(low_part, high_out.word_select(g, _HIGH_BITS)))
                words.append(word.as_value())
            read.append(words)

        for i in range(2):
            chosen = [Signal(16 * groups, name=f"chosen_{i}_{c}") for c in range(beat)]
            with m.Switch(place_out[i][:bank_bits]):
                for bank, words in enumerate(read):
                    with m.Case(bank):
                        m.d.comb += [target.eq(word) for target, word in zip(chosen, words, strict=True)]
            # Lane j mod beat of the row is in bank (row + j) mod beat.
            value = Signal(16 * lanes, name=f"value_{i}")
            m.d.comb += value.eq(Cat(rotated(chosen, -place_out[i])))
            for n in range(lanes):
                j = 16 * (n % beat * groups + n // beat)
                m.d.comb += self.value[i][n].eq(value[j : j + 16])
        return m

    def _write(self, m: Module, page: int) -> "_Write":
        """What is written to a page."""
        beat = self.config.beat
        bits = (beat - 1).bit_length()
        valid, (row, column, transpose, elements) = page_write(
            m, self.write, page, "row", "column", "transpose", "beat.data"
        )
        # Element e of the beat goes to bank (e + rotation) mod beat.
        rotation = Mux(transpose, column[:bits], row[:bits])
        written = Signal(data.ArrayLayout(16, beat), name=f"written_{page}")
        m.d.comb += written.as_value().eq(Cat(rotated([elements.word_select(e, 16) for e in range(beat)], rotation)))
        group = Signal(self.config.lanes // beat, name=f"group_{page}")
        with m.If(valid):
            m.d.comb += group.eq(1 << column[bits:])
        rows, not_zero = [], Signal(beat, name=f"not_zero_{page}")
        for c in range(beat):
            e = Signal(bits, name=f"e_{page}_{c}")
            bank_row = Signal(range(self.config.dense_rows), name=f"w_row_{page}_{c}")
            m.d.comb += [
                e.eq(c - rotation),
                bank_row.eq(Mux(transpose, Cat(e, row[bits:]), row)),
                not_zero[c].eq(written[c][:LOW_BITS].any()),
            ]
            rows.append(bank_row)
        return _Write(rows, group, written, not_zero)


@dataclass(frozen=True)
class _Write:
    """A beat for a page: `data[c]`, with low bits if `not_zero[c]`, goes to bank c, to `row[c]` and lanes `group`."""

    row: list[Value]
    group: Value
    data: Any
    not_zero: Value
