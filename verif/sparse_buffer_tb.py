"""Testbench of `SparseBuffer`: writes along rows and columns while codes and elements are read."""

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from lnpu.interfaces import buffer_write
from verif.agents import pack, start
from verif.runner import parameters, rng


class BufferWriter:
    """Drives a `buffer_write` port and keeps what has been written to a page as arrays [page, row, column]."""

    def __init__(self, port, config: ChipConfig, rows: int, columns: int, random) -> None:
        self._port, self._config, self._random = port, config, random
        self._layout = buffer_write(config)
        self.rows, self.columns = rows, columns
        self.data = np.zeros((2, rows, columns), dtype=np.uint16)
        self.code = np.zeros((2, rows, columns), dtype=np.uint8)
        port.value = 0

    def beat(self, page: int, row: int, column: int, transpose: bool, data, code, *, port=None, **fields) -> None:
        """Put a beat on the port, or on another one; the arrays change at once."""
        (self._port if port is None else port).value = pack(self._layout, {
            "valid": 1, "cores": 1, "page": page, "row": row, "column": column, "transpose": transpose,
            "beat": {"data": data, "code": code},
        } | fields)  # fmt: skip
        beat = self._config.beat
        place = np.s_[page, row : row + beat, column] if transpose else np.s_[page, row, column : column + beat]
        self.data[place], self.code[place] = data, code

    def values(self):
        """Random patterns of a beat's elements."""
        return self._random.integers(0x10000, size=self._config.beat)

    def random_beat(self, pages=(0, 1)) -> None:
        """A beat of random elements to a random place, along a row or a column."""
        random, beat = self._random, self._config.beat
        transpose = bool(random.integers(2))
        row, column = int(random.integers(self.rows)), int(random.integers(self.columns))
        if transpose:
            row -= row % beat
        else:
            column -= column % beat
        data, code = self.values(), random.integers(4, size=beat)
        self.beat(int(random.choice(pages)), row, column, transpose, data, code)

    def idle(self) -> None:
        """Noise without `valid`."""
        self._port.value = int.from_bytes(self._random.bytes(len(self._port) // 8), "little") << 1

    def fill(self):
        """Beats (as thunks, one a cycle) that write both pages, one along its rows and the other along its columns."""
        for page in (0, 1):
            for row in range(0, self.rows, self._config.beat if page else 1):
                for column in range(0, self.columns, 1 if page else self._config.beat):
                    code = self._random.integers(4, size=self._config.beat)
                    yield page, row, column, bool(page), self.values(), code


@cocotb.test()
async def reads_and_writes(dut):
    """After filling both pages, random reads of codes and elements beside random writes, both in every cycle."""
    shape = parameters()["config"]
    config = ChipConfig(**shape)
    random = rng()
    for name in ("codes_enable", "codes_page", "codes_row", "element_enable", "element_page", "element_row", "k"):
        getattr(dut, name).value = 0
    writer = BufferWriter(dut.write, config, config.rows, config.depth, random)
    await start(dut)
    edge = RisingEdge(dut.clk)
    for beat in writer.fill():
        writer.beat(*beat)
        await edge
    k_bits = (config.depth - 1).bit_length()
    codes = None
    pair: list = [None, None]
    for cycle in range(parameters()["cycles"]):
        # The arrays now hold what the memory holds in this cycle: reads see it, this cycle's write not yet.
        page, row, enable = int(random.integers(2)), int(random.integers(config.rows)), bool(random.random() < 0.7)
        dut.codes_page.value, dut.codes_row.value, dut.codes_enable.value = page, row, int(enable)
        next_codes = writer.code[page, row].copy() if enable else codes
        page, row, enables = int(random.integers(2)), int(random.integers(config.rows)), int(random.integers(4))
        ks = [int(k) for k in random.integers(config.depth, size=2)]
        if enables == 3 and (ks[0] - ks[1]) % config.dense_banks == 0:  # else the other one's k is noise
            ks[1] ^= 1
        dut.element_page.value, dut.element_row.value, dut.element_enable.value = page, row, enables
        dut.k.value = ks[0] | ks[1] << k_bits
        next_pair = [int(writer.data[page, row, k]) if enables >> i & 1 else None for i, k in enumerate(ks)]
        if random.random() < 0.8:
            writer.random_beat()
        else:
            writer.idle()
        await edge
        if codes is not None:
            word = int(dut.codes.value)
            got = np.array([word >> 2 * k & 3 for k in range(config.depth)])
            assert (got == codes).all(), f"cycle {cycle}: codes {got}, not {codes}"
        word = int(dut.element.value)
        for i, want in enumerate(pair):
            got = word >> 16 * i & 0xFFFF
            assert want is None or got == want, f"cycle {cycle}: element {i} is {got:#x}, not {want:#x}"
        codes, pair = next_codes, next_pair
