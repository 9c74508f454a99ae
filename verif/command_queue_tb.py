"""Testbench of a command queue: a unit that takes a command when it is idle, and works for a random time."""

from collections import deque
from random import Random

import cocotb
from cocotb.triggers import RisingEdge

from verif.agents import Source, start
from verif.runner import rng


@cocotb.test()
async def commands(dut):
    """Every command reaches the unit, once and in order; `busy` and `queued` are those of what has been taken."""
    random = Random(int(rng().integers(1 << 30)))
    edge = RisingEdge(dut.clk)
    source = Source(dut, "i", seed=random.getrandbits(30), stall=0.0)
    dut.unit_busy.value, dut.o__ready.value = 0, 1
    await start(dut)
    sent = [random.getrandbits(512) for _ in range(600)]

    async def feed() -> None:
        for word in sent:
            source.stall = random.choice([0.0, 0.0, 0.9])
            await source.put(word)

    cocotb.start_soon(feed())
    taken: deque[int] = deque()  # by the queue, not done
    received, left, queued_cycles = [], 0, 0
    while len(received) < len(sent) or left:
        await edge
        assert int(dut.busy.value) == (len(taken) > 0)
        assert int(dut.queued.value) == (len(taken) > 1), "queued: what was taken before the last command is not done"
        assert int(dut.i__ready.value) == (len(taken) - (left > 0) < 1), "room for a command beside the unit's"
        queued_cycles += len(taken) > 1
        if left:  # the unit is running
            left -= 1
            if not left:
                taken.popleft()
        elif int(dut.o__valid.value):
            received.append(int(dut.o__payload.value))
            left = random.choice([1, 2, 3, 20])
        if int(dut.i__valid.value) and int(dut.i__ready.value):
            taken.append(int(dut.i__payload.value))
        dut.unit_busy.value, dut.o__ready.value = int(left > 0), int(left == 0)
    assert received == sent
    assert queued_cycles > 500
