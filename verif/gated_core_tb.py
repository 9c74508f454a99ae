"""Testbench of `GatedCore` in `CoreTwins`: anything at any time, every output in every cycle, rests of the clock."""

from enum import Enum, auto

import cocotb

from lnpu.ctrl.commands import Command, Opcode
from verif.core_tb import LOOPS, begin
from verif.runner import parameters


class Phase(Enum):
    """What may happen in a cycle of the random test."""

    QUIET = auto()
    COMMANDS = auto()
    FILLS = auto()
    READS = auto()
    ALL = auto()


@cocotb.test()
async def twins(dut):
    """Commands, bad ones too, beats for this core and others, rows read and held, resets: alone and all at once.

    Nothing spares the page that is read or waits for its turn: both cores must do the same, whatever it is.
    """
    dut.compare_psum.value = 0
    bench = await begin(dut)
    random, config = bench.random, bench.config
    await bench.compare(range(config.psum_rows))
    dut.compare_psum.value = 1
    phase, left = Phase.QUIET, 0
    rests = 0
    cycles = parameters()["cycles"]
    for cycle in range(cycles):
        if not left:
            phase, left = Phase(int(random.integers(1, 6))), int(random.choice([1, 3, 20, 60]))
        left -= 1
        commands, fills, reads = ({phase} & {one, Phase.ALL} for one in (Phase.COMMANDS, Phase.FILLS, Phase.READS))
        dut.rst.value = int(random.random() < 0.002)
        dut.command__valid.value = offered = int(bool(commands) and random.random() < 0.2)
        if offered:
            bench.density = float(random.choice([0.0, 0.1, 0.6]))
            dut.command__payload.value = int.from_bytes(_command(bench).encode(), "little")
        bench.idle()
        for dense, writer in ((False, bench.sparse), (True, bench.dense)):
            if fills and random.random() < 0.1:
                row, column = int(random.integers(config.psum_rows)), int(random.integers(config.lanes // config.beat))
                mask, mine = bench.masks.random_row()[: config.beat], bool(random.integers(2))
                bench.put_mask(int(dense), int(random.integers(2)), row, column * config.beat, mask, mine=mine)
            elif fills and random.random() < 0.5:
                row, column = int(random.integers(writer.rows)), int(random.integers(writer.columns // config.beat))
                bench.put(dense, int(random.integers(2)), row, column * config.beat, False)
        dut.psum_request__valid.value = int(bool(reads) and random.random() < 0.4)
        dut.psum_request__payload.value = int(random.integers(config.psum_rows))
        dut.psum_hold.value = int(random.random() < 0.3)
        await bench.edge
        assert not int(dut.differ.value), f"an output differs in cycle {cycle}, {phase}"
        rests += not int(dut.gated.gate.enable.value)
    dut._log.info(f"the clock rests in {rests} of {cycles} cycles")
    assert cycles // 5 < rests < cycles // 2


def _command(bench) -> Command:
    fields = {f"count_{loop}": 1 for loop in LOOPS} | {"kmask": 3, "lanes": bench.config.lanes}
    match int(bench.random.integers(6)):
        case 0:
            fields["count_s"] = 0
        case 1:
            fields |= {"count_w": 3, "row": -1, "row_w": 1}
        case 2:
            fields["psum"] = -1
        case 3:
            fields |= {"initialise": 1, "psum": 2, "count_w": 2, "psum_w": 1}
        case 4:
            fields |= {"kmask": 0xFFFF, "count_s": 2, "dense_s": 1, "psum": int(bench.random.integers(8))}
        case _:
            fields = bench.random_command() | {"count_n": 1, "count_h": 1}
    return Command(Opcode.MULTIPLY, **fields)
