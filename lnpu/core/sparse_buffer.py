"""The buffer of a core's streamed operand: elements that are picked one by one, and the codes of whole rows."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
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
        Its `rows`, `depth` and `beat`.

    Members
    -------
    write : In(buffer_write(config))
        Every valid beat is written: `buffer` and `cores` are the core's business.
    codes_enable : In(1); codes_page : In(1); codes_row : In(range(rows))
    codes : Out(ArrayLayout(2, depth))
        From the cycle after `codes_enable` until the next one.
    element_enable : In(2); element_page : In(1); element_row : In(range(rows)); k : In(ArrayLayout(range(depth), 2))
        Reads element k[0], which is even, and element k[1], which is odd.
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
        return f"{self.config.rows}x{self.config.depth}x{self.config.beat}"

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

        # Bank c of the element pair has k with the parity of c - row.
        element_row = self.element_row
        odd_row = element_row[0]
        half_k = [self.k[0][1:], self.k[1][1:]]
        element_bank = [Signal(bits - 1, name=f"element_bank_{i}", reset_less=True) for i in range(2)]
        swap = Signal(reset_less=True)
        element_word, element_on = [], []
        for parity in range(2):  # of the bank
            k = Signal(range(depth), name=f"k_{parity}")
            m.d.comb += k.eq(Mux(odd_row ^ parity, Cat(Const(1, 1), half_k[1]), Cat(Const(0, 1), half_k[0])))
            bank = Signal(bits, name=f"bank_{parity}")
            on = Signal(name=f"on_{parity}")
            address = Signal(range(2 * rows * words), name=f"address_{parity}")
            m.d.comb += [
                bank.eq(k[:bits] + element_row[:bits]),
                on.eq(Mux(odd_row ^ parity, self.element_enable[1], self.element_enable[0])),
                address.eq((element_row + Mux(self.element_page, rows, 0)) * words + k[bits:]),
            ]
            with m.If(on):
                m.d.sync += element_bank[parity].eq(bank[1:])
            element_word.append(address)
            element_on.append((on, bank))
        with m.If(self.element_enable.any()):
            m.d.sync += swap.eq(odd_row)

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
            on, bank = element_on[c % 2]
            m.d.comb += [
                sram.w_en.eq(write.valid),
                sram.w_addr.eq(row * words + word),
                sram.w_data.eq(written[18 * c : 18 * c + 16]),
                sram.r_en.eq(on & (bank == c)),
                sram.r_addr.eq(element_word[c % 2]),
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

        picked = []
        for parity in range(2):
            value = Signal(16, name=f"picked_{parity}")
            with m.Switch(element_bank[parity]):
                for i, word in enumerate(elements[parity::2]):
                    with m.Case(i):
                        m.d.comb += value.eq(word)
            picked.append(value)
        m.d.comb += [
            self.element[0].eq(Mux(swap, picked[1], picked[0])),
            self.element[1].eq(Mux(swap, picked[0], picked[1])),
        ]
        return m


def rotated(words: list, amount) -> list:
    """A power of two of words of one width, rotated up: word i of the result is words[(i - amount) mod len(words)]."""
    bits = (len(words) - 1).bit_length()
    amount = amount[:bits]
    for i in range(bits):
        words = [Mux(amount[i], words[(n - (1 << i)) % len(words)], word) for n, word in enumerate(words)]
    return words
