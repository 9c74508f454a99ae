"""Testbench of `PeLine`: every PE has its own dense operands, sum and gate, and shares the rest."""

import cocotb
from cocotb.triggers import RisingEdge

from verif.agents import start
from verif.pe_tb import FP8, Psum, random_fp16, random_start
from verif.runner import parameters, rng


@cocotb.test()
async def lanes(dut):
    """Random pairs, single products, loads and idle cycles on all lanes at once, those that are not live among them."""
    count, acc_bits = parameters()["lanes"], parameters()["acc_bits"]
    random = rng()

    def ports(name):
        return [getattr(dut, f"{name}__{n}") for n in range(count)]

    for port in (dut.enable, dut.pair, dut.a, dut.live, dut.load, *ports("b"), *ports("psum_i")):
        port.value = 0
    await start(dut)
    edge = RisingEdge(dut.clk)
    pes = [getattr(dut, f"pe_{n}") for n in range(count)]
    expected: list = [None, None]
    psums = [Psum()] * count
    following = [0] * count
    for cycle in range(parameters()["cycles"]):
        load = cycle == 0 or random.random() < 0.1
        pair = bool(random.integers(2))
        enable = int(random.integers(4))
        a = [int(random.choice(FP8)) if pair else random_fp16(random) & 0xFBFF for _ in range(2)]
        b = [[random_fp16(random) & 0xFBFF for _ in range(count)] for _ in range(2)]
        live = random.random(count) < random.choice([0, 0.5, 1])
        starts = [random_start(random, acc_bits) for _ in range(count)]
        for port, value in zip(ports("psum_i"), following, strict=True):
            port.value = value
        dut.load.value, dut.pair.value, dut.enable.value = int(load), int(pair), enable
        dut.a.value = a[0] | a[1] << 16
        dut.live.value = sum(int(bit) << n for n, bit in enumerate(live))
        for n, port in enumerate(ports("b")):
            port.value = b[0][n] | b[1][n] << 16
        following = [psum.pack(acc_bits) for psum in starts]
        if load:
            psums = starts
        used = [i for i in range(2 if pair else 1) if enable >> i & 1]
        psums = [psum.plus_many([(a[i], b[i][n]) for i in used if live[n]]) for n, psum in enumerate(psums)]
        expected.append(psums)
        await edge
        for n in range(count):
            if not live[n]:
                rests = not int(pes[n].b.value) and not int(pes[n].enable.value)
                assert rests, f"cycle {cycle}: lane {n} is not at rest"
        want = expected.pop(0)
        if want is not None:
            for n, (port, psum) in enumerate(zip(ports("psum_o"), want, strict=True)):
                got = int(port.value)
                assert psum.same(got, acc_bits), f"cycle {cycle - 2}, lane {n}: {got:#x}, not {psum}"
