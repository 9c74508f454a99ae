"""Testbench of `DenseBuffer`: writes along rows and lanes while pairs of rows are read."""

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from verif.agents import start
from verif.runner import parameters, rng
from verif.sparse_buffer_tb import BufferWriter


@cocotb.test()
async def reads_and_writes(dut):
    """After filling both pages, random reads of one or two rows beside random writes, both in every cycle."""
    config = ChipConfig(**parameters()["config"])
    random = rng()
    for name in ("enable", "page", "row"):
        getattr(dut, name).value = 0
    writer = BufferWriter(dut.write, config, config.dense_rows, config.lanes, random)
    await start(dut)
    edge = RisingEdge(dut.clk)
    for beat in writer.fill():
        writer.beat(*beat)
        await edge
    bits = (config.dense_rows - 1).bit_length()
    pair: list = [None, None]
    for cycle in range(parameters()["cycles"]):
        page, enable = int(random.integers(2)), int(random.integers(4))
        first = int(random.integers(config.dense_rows))
        second = 2 * int(random.integers(config.dense_rows // 2)) + (first + 1) % 2
        dut.page.value, dut.enable.value, dut.row.value = page, enable, first | second << bits
        rows = [writer.data[page, row].copy() if enable >> i & 1 else None for i, row in enumerate((first, second))]
        if random.random() < 0.8:
            writer.random_beat()
        else:
            writer.idle()
        await edge
        words = np.frombuffer(int(dut.value.value).to_bytes(4 * config.lanes, "little"), dtype="<u2")
        for i, want in enumerate(pair):
            got = words[i * config.lanes : (i + 1) * config.lanes]
            assert want is None or (got == want).all(), f"cycle {cycle}: row {i} is {got}, not {want}"
        pair = rows
