"""Testbench of `ZeroSkip`: which elements are issued when, and in how many cycles."""

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from lnpu.core.zero_skip import issue_layout, visit_layout
from verif.agents import Source, pack, start, unpack
from verif.runner import parameters, rng


def visits_of(random, depth: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks (non-zero, FP8) of every density and mixture, empty and full ones included."""
    visits = []
    for _ in range(count):
        density, mixture = (random.choice([0, 0.02, 0.1, 0.5, 0.9, 1]) for _ in range(2))
        nonzero = random.random(depth) < density
        if random.random() < 0.4:  # elements of a few banks, or many of one bank and few of the others
            chosen = np.isin(np.arange(depth) % 4, random.choice(4, int(random.integers(1, 4)), replace=False))
            nonzero &= chosen | (random.random(depth) < random.choice([0, 0.1]))
        visits.append((nonzero, random.random(depth) < mixture))
    return visits


def cycles_of(nonzero: np.ndarray, fp8: np.ndarray, banks: int) -> int:
    """Cycles of a visit, by the documented formula."""
    n8 = nonzero & fp8
    most = max(int(n8[bank::banks].sum()) for bank in range(banks))
    return max(1, int((nonzero & ~fp8).sum()) + max(-(-int(n8.sum()) // 2), most))


async def check(dut, valid_stall: float, ready_stall: float) -> None:
    config = ChipConfig(**parameters()["config"])
    layout = issue_layout(config)
    random = rng()
    dut.issue__ready.value = 0
    source = Source(dut, "visit", seed=int(random.integers(1 << 30)), stall=valid_stall)
    await start(dut)
    edge = RisingEdge(dut.clk)
    visits = visits_of(random, config.depth, parameters()["visits"])
    bits = [sum(int(bit) << k for k, bit in enumerate(mask)) for pair in visits for mask in pair]
    words = [
        pack(visit_layout(config), {"nonzero": nonzero, "fp8": fp8})
        for nonzero, fp8 in zip(bits[::2], bits[1::2], strict=True)
    ]
    sender = cocotb.start_soon(source.put(words))
    gaps = 0
    for number, (nonzero, fp8) in enumerate(visits):
        seen = np.zeros(config.depth, dtype=int)
        wanted = cycles_of(nonzero, fp8, config.dense_banks)
        for cycle in range(wanted):
            while True:
                ready = int(random.random() >= ready_stall)
                dut.issue__ready.value = ready
                await edge
                if ready and int(dut.issue__valid.value):
                    break
                gaps += number > 0 or cycle > 0
            issue = unpack(layout, int(dut.issue__payload.value))
            assert issue["first"] == (cycle == 0), f"visit {number}, cycle {cycle}: {issue}"
            assert issue["last"] == (cycle == wanted - 1), f"visit {number}, cycle {cycle}: {issue}"
            ks = [issue["k"][i] for i in range(2) if issue["enable"] >> i & 1]
            assert issue["enable"] != 2, f"visit {number}: the second port alone: {issue}"
            if len(ks) == 2:
                assert not issue["fp16"], f"visit {number}: {issue}"
                assert (ks[0] - ks[1]) % config.dense_banks, f"visit {number}: two of a bank: {issue}"
            for k in ks:
                assert fp8[k] != issue["fp16"], f"visit {number}: {issue}"
                seen[k] += 1
        assert (seen == nonzero).all(), f"visit {number}: issued {seen}, not {nonzero.astype(int)}"
    await sender
    if not valid_stall and not ready_stall:
        assert gaps == 0, f"{gaps} bubbles"
    dut.issue__ready.value = 1
    for _ in range(5):
        await edge
        assert not int(dut.issue__valid.value), "an issue too many"


@cocotb.test()
async def back_to_back(dut):
    """Visits that wait, an issue taken every cycle: exactly the documented cycles, without a bubble."""
    await check(dut, 0.0, 0.0)


@cocotb.test()
async def slow_visits(dut):
    """Visits come late at random."""
    await check(dut, 0.7, 0.0)


@cocotb.test()
async def slow_issues(dut):
    """Issues and visits are stalled at random."""
    await check(dut, 0.3, 0.5)
