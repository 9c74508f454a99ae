"""The buffer of a core's streamed operand: elements that are picked one by one, and the codes of whole rows."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.hdl import Block, Sram
from lnpu.interfaces import buffer_write

__all__ = ["SparseBuffer", "rotated"]


class SparseBuffer(Block):
    """Two pages of `rows` x `depth` elements and their codes.

    A beat is written in a cycle, along a row or (transposed) along a column; at the same time the codes of one row and
    two elements of one row are read. Element (row, column) is in bank (row + column) mod `beat`, so that neither a
    beat nor a pair collides. A read that coincides with the write of the same element returns the old one.

    Parameters
    ----------
    config : ChipConfig
        Its `rows`, `depth`, `beat` and `dense_banks`.

    Members
    -------
    write : In(buffer_write(config))
        Every valid beat is written: `buffer` and `cores` are the core's business.
    codes_enable : In(1); codes_page : In(1); codes_row : In(range(rows))
    codes : Out(ArrayLayout(2, depth))
        From the cycle after `codes_enable` until the next one.
    element_enable : In(2); element_page : In(1); element_row : In(range(rows)); k : In(ArrayLayout(range(depth), 2))
        Reads elements k[0] and k[1], which differ modulo `dense_banks`.
    element : Out(ArrayLayout(16, 2))
        FP16 patterns, in the cycle after; without meaning where `element_enable` was not set.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        row, k = (config.rows - 1).bit_length(), (config.depth - 1).bit_length()
        super().__init__(
            {
                "write": In(buffer_write(config)),
                "codes_enable": In(1),
                "codes_page": In(1),
                "codes_row": In(row),
                "codes": Out(data.ArrayLayout(2, config.depth)),
                "element_enable": In(2),
                "element_page": In(1),
                "element_row": In(row),
                "k": In(data.ArrayLayout(k, 2)),
                "element": Out(data.ArrayLayout(16, 2)),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.config.rows}x{self.config.depth}x{self.config.beat}x{self.config.dense_banks}"

    def elaborate(self, platform):
        m = Module()
        beat, rows, depth = self.config.beat, self.config.rows, self.config.depth
        bits = (beat - 1).bit_length()
        words = depth // beat  # of a row in a bank
        write = self.write

        # Element e of the beat goes to bank (e + rotation) mod beat.
        rotation = Mux(write.transpose, write.column[:bits], write.row[:bits])
        written = Signal(18 * beat)
        m.d.comb += written.eq(
            Cat(rotated([Cat(write.beat.data[e], write.beat.code[e]) for e in range(beat)], rotation))
        )
        word = Signal(range(words))
        m.d.comb += word.eq(write.column[bits:])

        # Element k[i] is in a bank that is (row + k[i]) mod `ways`, modulo `ways`: another one for each i.
        ways = self.config.dense_banks
        element_row = self.element_row
        element_bank = [Signal(bits, name=f"element_bank_{i}") for i in range(2)]
        element_word = [Signal(range(2 * rows * words), name=f"element_word_{i}") for i in range(2)]
        picked_bank = [Signal(bits, name=f"picked_bank_{i}", reset_less=True) for i in range(2)]
        for i in range(2):
            m.d.comb += [
                element_bank[i].eq(self.k[i][:bits] + element_row[:bits]),
                element_word[i].eq((element_row + Mux(self.element_page, rows, 0)) * words + self.k[i][bits:]),
            ]
            with m.If(self.element_enable[i]):
                m.d.sync += picked_bank[i].eq(element_bank[i])
        way_word = []
        for way in range(ways):
            word_of_way = Signal(range(2 * rows * words), name=f"way_word_{way}")
            first = self.element_enable[0] & (element_bank[0] % ways == way)
            m.d.comb += word_of_way.eq(Mux(first, element_word[0], element_word[1]))
            way_word.append(word_of_way)

        codes_address = Signal(range(2 * rows))
        m.d.comb += codes_address.eq(self.codes_row + Mux(self.codes_page, rows, 0))
        codes_rotation = Signal(bits, reset_less=True)
        with m.If(self.codes_enable):
            m.d.sync += codes_rotation.eq(self.codes_row)

        codes, elements = [], []
        for c in range(beat):
            e = Signal(bits, name=f"e_{c}")
            row = Signal(range(2 * rows), name=f"row_{c}")
            m.d.comb += [
                e.eq(c - rotation),
                row.eq(
                    Mux(write.transpose, Cat(e, write.row[bits:]), write.row)[: (rows - 1).bit_length()]
                    + Mux(write.page, rows, 0)
                ),
            ]
            m.submodules[f"data_{c}"] = sram = Sram(depth=2 * rows * words, width=16)
            m.d.comb += [
                sram.w_en.eq(write.valid),
                sram.w_addr.eq(row * words + word),
                sram.w_data.eq(written[18 * c : 18 * c + 16]),
                sram.r_en.eq(Cat(self.element_enable[i] & (element_bank[i] == c) for i in range(2)).any()),
                sram.r_addr.eq(way_word[c % ways]),
            ]
            elements.append(sram.r_data)
            m.submodules[f"code_{c}"] = sram = Sram(depth=2 * rows, width=2 * words, granularity=2)
            m.d.comb += [
                sram.w_en.eq(Mux(write.valid, 1 << word, 0)),
                sram.w_addr.eq(row),
                sram.w_data.eq(written[18 * c + 16 : 18 * c + 18].replicate(words)),
                sram.r_en.eq(self.codes_enable),
                sram.r_addr.eq(codes_address),
            ]
            codes.append(sram.r_data)

        # Column j mod beat of the row is in bank (row + j) mod beat.
        straight = Signal(2 * depth)
        m.d.comb += straight.eq(Cat(rotated(codes, -codes_rotation)))
        for k in range(depth):
            j = 2 * (k % beat * words + k // beat)
            m.d.comb += self.codes[k].eq(straight[j : j + 2])

        for i in range(2):
            with m.Switch(picked_bank[i]):
                for c, word in enumerate(elements):
                    with m.Case(c):
                        m.d.comb += self.element[i].eq(word)
        return m


def rotated(words: list, amount) -> list:
    """A power of two of words of one width, rotated up: word i of the result is words[(i - amount) mod len(words)]."""
    bits = (len(words) - 1).bit_length()
    amount = amount[:bits]
    for i in range(bits):
        words = [Mux(amount[i], words[(n - (1 << i)) % len(words)], word) for n, word in enumerate(words)]
    return words
