"""The buffer of a core's resident operand: two whole rows a cycle."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.core.sparse_buffer import rotated
from lnpu.hdl import Block, Sram
from lnpu.interfaces import buffer_write

__all__ = ["DenseBuffer"]


class DenseBuffer(Block):
    """Two pages of `dense_rows` x `lanes` FP16 values.

    A beat is written in a cycle, along a row or (transposed) along a lane; at the same time an even and an odd row are
    read. Value (row, lane) is in bank (row mod 2, (row + lane) mod `beat`). A read that coincides with the write of the
    same value returns the old one.

    Parameters
    ----------
    config : ChipConfig
        Its `dense_rows`, `lanes` and `beat`.

    Members
    -------
    write : In(buffer_write(config))
        Every valid beat is written: `buffer` and `cores` are the core's business.
    enable : In(2); page : In(1); row : In(ArrayLayout(range(dense_rows), 2))
        Reads the rows; the parities of two rows read in a cycle differ.
    value : Out(ArrayLayout(ArrayLayout(16, lanes), 2))
        In the cycle after; without meaning where `enable` was not set.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "write": In(buffer_write(config)),
                "enable": In(2),
                "page": In(1),
                "row": In(data.ArrayLayout((config.dense_rows - 1).bit_length(), 2)),
                "value": Out(data.ArrayLayout(data.ArrayLayout(16, config.lanes), 2)),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.config.dense_rows}x{self.config.lanes}x{self.config.beat}"

    def elaborate(self, platform):
        m = Module()
        beat, lanes, half = self.config.beat, self.config.lanes, self.config.dense_rows // 2
        bits = (beat - 1).bit_length()
        groups = lanes // beat
        write = self.write

        # Element e of the beat goes to bank (e + rotation) mod beat.
        rotation = Mux(write.transpose, write.column[:bits], write.row[:bits])
        written = Signal(16 * beat)
        m.d.comb += written.eq(Cat(rotated([write.beat.data[e] for e in range(beat)], rotation)))
        group = Signal(groups)
        with m.If(write.valid):
            m.d.comb += group.eq(1 << write.column[bits:])

        straight = []
        swap = Signal(2, reset_less=True)
        for i in range(2):
            with m.If(self.enable[i]):
                m.d.sync += swap[i].eq(self.row[i][0])
        for parity in range(2):
            first = self.row[0][0] == parity  # port 0 has the row of this parity
            second = self.row[1][0] == parity
            use_first = Signal(name=f"use_first_{parity}")
            row = Signal(len(self.row[0]), name=f"row_{parity}")
            on = Signal(name=f"on_{parity}")
            m.d.comb += [
                use_first.eq(self.enable[0] & first),
                on.eq(use_first | (self.enable[1] & second)),
                row.eq(Mux(use_first, self.row[0], self.row[1])),
            ]
            read_rotation = Signal(bits, name=f"read_rotation_{parity}", reset_less=True)
            with m.If(on):
                m.d.sync += read_rotation.eq(row)
            words = []
            for c in range(beat):
                e = Signal(bits, name=f"e_{parity}_{c}")
                w_row = Signal(range(2 * half), name=f"w_row_{parity}_{c}")
                m.submodules[f"bank_{parity}_{c}"] = sram = Sram(depth=2 * half, width=16 * groups, granularity=16)
                m.d.comb += [
                    e.eq(c - rotation),
                    w_row.eq(Mux(write.transpose, Cat(e, write.row[bits:]), write.row)),
                    sram.w_en.eq(Mux(w_row[0] == parity, group, 0)),
                    sram.w_addr.eq(w_row[1:] + Mux(write.page, half, 0)),
                    sram.w_data.eq(written[16 * c : 16 * c + 16].replicate(groups)),
                    sram.r_en.eq(on),
                    sram.r_addr.eq(row[1:] + Mux(self.page, half, 0)),
                ]
                words.append(sram.r_data)
            # Lane j mod beat of the row is in bank (row + j) mod beat.
            value = Signal(16 * lanes, name=f"straight_{parity}")
            m.d.comb += value.eq(Cat(rotated(words, -read_rotation)))
            straight.append(value)

        for i in range(2):
            value = Signal(16 * lanes, name=f"value_{i}")
            m.d.comb += value.eq(Mux(swap[i], straight[1], straight[0]))
            for n in range(lanes):
                j = 16 * (n % beat * groups + n // beat)
                m.d.comb += self.value[i][n].eq(value[j : j + 16])
        return m
