"""The buffer of a core's resident operand: two whole rows a cycle."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.core.sparse_buffer import rotated
from lnpu.formats import LOW_BITS
from lnpu.hdl import Block, Sram
from lnpu.interfaces import buffer_write

__all__ = ["DenseBuffer"]

_HIGH_BITS = 16 - LOW_BITS


class DenseBuffer(Block):
    """Two pages of `dense_rows` x `lanes` FP16 values.

    A beat is written in a cycle, along a row or (transposed) along a lane; at the same time an even and an odd row are
    read. Value (row, lane) is in bank (row mod 2, (row + lane) mod `beat`).

    A bank has three SRAMs with the same addresses: the high 9 bits of its values, their low 7 bits, and a flag for each
    value whose low bits are not all zero. The flags of a row are read first, the rest in the cycle after: high bits of
    all banks, and low bits of banks where a flag is set. Low bits are written where they are not zero. So of a row of
    zeros and FP8 values no low bits are accessed, whatever was there before. A flag is written whenever its value is.

    Parameters
    ----------
    config : ChipConfig
        Its `dense_rows`, `lanes` and `beat`.

    Members
    -------
    write : In(buffer_write(config))
        Every valid beat is written: `buffer` and `cores` are the core's business.
    enable : In(2); page : In(1); row : In(ArrayLayout(range(dense_rows), 2))
        Reads the rows; the parities of two rows read in a cycle differ. What is written in this cycle or the next must
        not be among the values used.
    value : Out(ArrayLayout(ArrayLayout(16, lanes), 2))
        In the second cycle after; without meaning where `enable` was not set.
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
        written = Signal(data.ArrayLayout(16, beat))
        m.d.comb += written.as_value().eq(Cat(rotated([write.beat.data[e] for e in range(beat)], rotation)))
        group = Signal(groups)
        with m.If(write.valid):
            m.d.comb += group.eq(1 << write.column[bits:])

        # The parity of each port's row: while the banks are read, then with what they gave.
        swap, swap_out = Signal(2, reset_less=True), Signal(2, reset_less=True)
        for i in range(2):
            with m.If(self.enable[i]):
                m.d.sync += swap[i].eq(self.row[i][0])
        m.d.sync += swap_out.eq(swap)

        straight = []
        for parity in range(2):
            use_first = Signal(name=f"use_first_{parity}")  # port 0 has the row of this parity
            ask = Signal(name=f"ask_{parity}")
            row = Signal(len(self.row[0]), name=f"row_{parity}")
            asked = Signal(range(2 * half), name=f"asked_{parity}")
            m.d.comb += [
                use_first.eq(self.enable[0] & (self.row[0][0] == parity)),
                ask.eq(use_first | (self.enable[1] & (self.row[1][0] == parity))),
                row.eq(Mux(use_first, self.row[0], self.row[1])),
                asked.eq(row[1:] + Mux(self.page, half, 0)),
            ]
            on = Signal(name=f"on_{parity}")
            address = Signal(range(2 * half), name=f"address_{parity}", reset_less=True)
            read_rotation = Signal(bits, name=f"read_rotation_{parity}", reset_less=True)
            m.d.sync += on.eq(ask)
            with m.If(ask):
                m.d.sync += address.eq(asked)
            with m.If(on):
                # Pages have a multiple of `beat` rows, so the row mod `beat` is in the address.
                m.d.sync += read_rotation.eq(Cat(Const(parity, 1), address))
            words = []
            for c in range(beat):
                e = Signal(bits, name=f"e_{parity}_{c}")
                w_row = Signal(range(2 * half), name=f"w_row_{parity}_{c}")
                w_en = Signal(groups, name=f"w_en_{parity}_{c}")
                w_addr = Signal(range(2 * half), name=f"w_addr_{parity}_{c}")
                not_zero = Signal(name=f"not_zero_{parity}_{c}")
                high, low, flag = (
                    Sram(depth=2 * half, width=width * groups, granularity=width) for width in (_HIGH_BITS, LOW_BITS, 1)
                )
                m.submodules[f"high_{parity}_{c}"] = high
                m.submodules[f"low_{parity}_{c}"] = low
                m.submodules[f"flag_{parity}_{c}"] = flag
                m.d.comb += [
                    e.eq(c - rotation),
                    w_row.eq(Mux(write.transpose, Cat(e, write.row[bits:]), write.row)),
                    w_en.eq(Mux(w_row[0] == parity, group, 0)),
                    w_addr.eq(w_row[1:] + Mux(write.page, half, 0)),
                    not_zero.eq(written[c][:LOW_BITS].any()),
                    high.w_en.eq(w_en),
                    high.w_data.eq(written[c][LOW_BITS:].replicate(groups)),
                    low.w_en.eq(Mux(not_zero, w_en, 0)),
                    low.w_data.eq(written[c][:LOW_BITS].replicate(groups)),
                    flag.w_en.eq(w_en),
                    flag.w_data.eq(not_zero.replicate(groups)),
                    flag.r_en.eq(ask),
                    flag.r_addr.eq(asked),
                    high.r_en.eq(on),
                    low.r_en.eq(on & flag.r_data.any()),
                ]
                for sram in (high, low, flag):
                    m.d.comb += sram.w_addr.eq(w_addr)
                for sram in (high, low):
                    m.d.comb += sram.r_addr.eq(address)
                # Low bits that were not read, or not written, count as zero.
                shown = Signal(groups, name=f"shown_{parity}_{c}", reset_less=True)
                with m.If(on):
                    m.d.sync += shown.eq(flag.r_data)
                words.append(
                    Cat(
                        part
                        for g in range(groups)
                        for part in (
                            low.r_data.word_select(g, LOW_BITS) & shown[g].replicate(LOW_BITS),
                            high.r_data.word_select(g, _HIGH_BITS),
                        )
                    )
                )
            # Lane j mod beat of the row is in bank (row + j) mod beat.
            value = Signal(16 * lanes, name=f"straight_{parity}")
            m.d.comb += value.eq(Cat(rotated(words, -read_rotation)))
            straight.append(value)

        for i in range(2):
            value = Signal(16 * lanes, name=f"value_{i}")
            m.d.comb += value.eq(Mux(swap_out[i], straight[1], straight[0]))
            for n in range(lanes):
                j = 16 * (n % beat * groups + n // beat)
                m.d.comb += self.value[i][n].eq(value[j : j + 16])
        return m
