"""Testbench of a command queue: a unit that takes a command when it has done the work of the one before, whose last
effects may be done later."""

from collections import deque
from random import Random

import cocotb
from cocotb.triggers import RisingEdge

from verif.agents import Source, start
from verif.runner import rng


@cocotb.test()
@cocotb.parametrize(tails=[(0,), (0, 1, 5, 30)])
async def commands(dut, tails):
    """Every command reaches the unit, once and in order; `busy` and `queued` are those of what has been taken.

    `tails`: cycles from the end of a command's work to its last effect.
    """
    random = Random(int(rng().integers(1 << 30)))
    edge = RisingEdge(dut.clk)
    source = Source(dut, "i", seed=random.getrandbits(30), stall=0.0)
    dut.unit_busy.value, dut.unit_earlier.value, dut.o__ready.value = 0, 0, 1
    await start(dut)
    sent = [random.getrandbits(512) for _ in range(600)]

    async def feed() -> None:
        for word in sent:
            source.stall = random.choice([0.0, 0.0, 0.9])
            await source.put(word)

    cocotb.start_soon(feed())
    taken = 0  # by the queue, not done
    received: list[int] = []
    ends: deque[int] = deque()  # of the unit's commands, when their last effects are done
    free = now = queued_cycles = overlaps = 0
    while len(received) < len(sent) or ends:
        await edge
        waiting = taken - len(ends)  # in the queue
        assert int(dut.busy.value) == (taken > 0)
        assert int(dut.queued.value) == (taken > 1), "queued: what was taken before the last command is not done"
        assert int(dut.i__ready.value) == (not waiting and len(ends) < 2), "room for a command beside the unit's"
        queued_cycles += taken > 1
        overlaps += len(ends) > 1
        if now >= free and int(dut.o__valid.value):
            received.append(int(dut.o__payload.value))
            free = now + random.choice([1, 2, 3, 20])
            ends.append(max(free + random.choice(tails), ends[-1] if ends else 0))
        if int(dut.i__valid.value) and int(dut.i__ready.value):
            taken += 1
        now += 1
        while ends and now > ends[0]:
            ends.popleft()
            taken -= 1
        dut.unit_busy.value, dut.unit_earlier.value = int(bool(ends)), int(len(ends) > 1)
        dut.o__ready.value = int(now >= free)
    assert received == sent
    assert queued_cycles > 500
    assert (overlaps > 200) == (len(tails) > 1)
