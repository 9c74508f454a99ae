"""Testbench of `MaskStore`: beats from both ports while rows are read, all in the same cycles."""

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from lnpu.interfaces import Buffer, buffer_write
from verif.agents import pack, start
from verif.runner import parameters, rng


class Masks:
    """What a mask store holds, as bits [page, row, lane]; makes the beats that write it."""

    def __init__(self, config: ChipConfig, random) -> None:
        self._config, self._random = config, random
        self._layout = buffer_write(config)
        self.bits = np.zeros((2, config.psum_rows, config.lanes), dtype=bool)

    def beat(self, page: int, row: int, column: int, mask, **fields) -> int:
        """A packed beat with noise for elements; `bits` changes at once."""
        beat, random = self._config.beat, self._random
        if column == 0:
            self.bits[page, row] = False
        self.bits[page, row, column : column + beat] = mask
        elements = {"data": random.integers(0x10000, size=beat), "code": random.integers(4, size=beat)}
        return pack(self._layout, {
            "valid": 1, "cores": 1, "buffer": Buffer.MASK.value, "page": page, "row": row, "column": column,
            "beat": elements, "mask": sum(int(bit) << e for e, bit in enumerate(mask)),
        } | fields)  # fmt: skip

    def random_row(self) -> np.ndarray:
        """Bits of a row: none, all, one, or any share of them."""
        random, lanes = self._random, self._config.lanes
        kind = random.random()
        if kind < 0.5:
            return np.full(lanes, kind < 0.25)
        if kind < 0.6:
            return np.arange(lanes) == random.integers(lanes)
        return random.random(lanes) < random.random()

    def rows(self, pages=(0, 1)):
        """Arguments of beats that begin and complete every row of pages."""
        for page in pages:
            for row in range(self._config.psum_rows):
                bits = self.random_row()
                for column in range(0, self._config.lanes, self._config.beat):
                    yield page, row, column, bits[column : column + self._config.beat]


@cocotb.test()
async def reads_and_writes(dut):
    """Rows are begun and go on by either port, or two in a cycle, while others or the same are read on both sides."""
    config = ChipConfig(**parameters()["config"])
    random = rng()
    masks = Masks(config, random)
    width = len(dut.write) // 2
    for name in ("write", "any_enable", "any_page", "any_row", "live_enable", "live_page", "live_row"):
        getattr(dut, name).value = 0
    await start(dut)
    edge = RisingEdge(dut.clk)
    for beat in masks.rows():
        dut.write.value = masks.beat(*beat) << width * int(random.integers(2))
        await edge

    def noise() -> int:
        return int.from_bytes(random.bytes(width // 8 + 1), "little") % (1 << width) & ~1  # without `valid`

    found: dict[str, list] = {"any": [], "live": []}  # what each read must show: in this cycle, in the next
    for cycle in range(parameters()["cycles"]):
        for name, expected in found.items():
            page, row = int(random.integers(2)), int(random.integers(4 if cycle % 2 else config.psum_rows))
            enable = not expected or random.random() < 0.7
            getattr(dut, f"{name}_page").value, getattr(dut, f"{name}_row").value = page, row
            getattr(dut, f"{name}_enable").value = int(enable)
            bits = masks.bits[page, row]
            expected.append((bits.any() if name == "any" else bits.copy()) if enable else expected[-1])
        words = [noise(), noise()]
        page = int(random.integers(2))
        for port in random.permutation(2)[: random.integers(3)]:  # none, one, or two of different pages
            row = int(random.integers(4 if random.integers(2) else config.psum_rows))
            column = int(random.integers(config.lanes // config.beat)) * config.beat
            mask = masks.random_row()[: config.beat]
            words[port], page = masks.beat(page, row, column, mask), 1 - page
        dut.write.value = words[0] | words[1] << width
        await edge
        if cycle:
            live = np.array([int(dut.live.value) >> n & 1 for n in range(config.lanes)], dtype=bool)
            assert (live == found["live"][-2]).all(), f"cycle {cycle}: {live}, not {found['live'][-2]}"
            assert int(dut.any.value) == found["any"][-2], f"cycle {cycle}: any is {int(dut.any.value)}"
