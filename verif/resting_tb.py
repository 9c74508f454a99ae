"""Testbench of a counter behind a clock gate (`verif/tests/test_synth.py`): it counts where the enable was set."""

import cocotb
from cocotb.triggers import RisingEdge

from verif.agents import start
from verif.runner import rng


@cocotb.test()
async def counts(dut):
    """It goes and rests at random; nobody resets the counter."""
    random, edge = rng(), RisingEdge(dut.clk)
    dut.go.value = 1
    await start(dut)
    await edge
    await edge
    value = int(dut.value.value)
    enables = [1, 1]  # at the edge before, and at the one that comes: a register is between
    for cycle in range(300):
        go = int(random.integers(2))
        dut.go.value = go
        await edge
        value = (value + enables.pop(0)) % 16
        enables.append(go)
        assert int(dut.value.value) == value, f"{dut.value.value}, not {value}, in cycle {cycle}"
