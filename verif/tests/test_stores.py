"""STORE and STORE_RAW side by side on the whole chip, against the command model and against each of them alone."""

import numpy as np
import pytest

from lnpu.config import TINY, ChipConfig
from lnpu.ctrl.commands import Command, Opcode, Unit
from lnpu.sim.simulator import Simulator
from verif.command_model import CommandModel

CONFIGS = {
    "tiny": TINY,
    "wide": TINY.replace(
        name="wide", cores=1, lanes=16, beat=8, axi_bits=128, depth=72, vmem_rows=2048, burst_beats=64
    ),
}
VALUES, SLOTS, TABLES, RESULTS, PROGRAM, MEMORY = 0x10000, 0x30000, 0x50000, 0x60000, 0x8000, 1 << 19
ROWS = 768
"""Rows that either unit stores, by two commands."""
ENCODED, RAW = (Opcode.STORE,), (Opcode.STORE_RAW,)


def program(config: ChipConfig, opcodes: tuple[Opcode, ...], **waits: int) -> list[Command]:
    """Bring rows into the vector memory and store them: a command of each opcode, twice."""
    half, row_bytes, rows_of_block = ROWS // 2, 4 * config.beat, 64 // config.beat
    blocks, lines = half // rows_of_block, 3
    everything = (1 << len(Unit)) - 1
    commands = [
        Command(Opcode.LOAD_RAW, address=VALUES, line_count=1, line_rows=2 * ROWS, kind=6),
        Command(Opcode.NOP, wait_units=everything),
    ]
    for part in range(2):
        fields = {
            Opcode.STORE: {
                "slots": SLOTS + part * 0x10000, "table": TABLES + part * 0x1000, "kind": 1, "n_count": 1, "i_count": 1,
                "j_count": blocks, "line_blocks": blocks, "log2_run": 3, "hi": 0x7BFF, "above": 1,
                "source": part * half, "source_j": rows_of_block,
            },
            Opcode.STORE_RAW: {
                "address": RESULTS + part * 0x8000 + 32, "kind": 5, "line_count": lines, "line_rows": half // lines,
                "pitch": half // lines * row_bytes + 32, "vmem": ROWS + part * half, "vmem_line": half // lines,
            },
        }  # fmt: skip
        commands += [Command(opcode, **fields[opcode], **waits) for opcode in opcodes]
    return [*commands, Command(Opcode.END)]


def run(config: ChipConfig, stall: float, commands: list[Command]) -> dict[str, int]:
    """Run a program, compare the whole memory with the model's; returns the counters."""
    rng = np.random.default_rng(41)
    sim = Simulator(config, MEMORY, stall=stall, seed=3)
    values = rng.standard_normal(2 * ROWS * config.beat).astype(np.float32).view(np.uint8)
    image = np.frombuffer(b"".join(command.encode() for command in commands), np.uint8)
    sim.memory[VALUES : VALUES + values.size] = values
    sim.memory[PROGRAM : PROGRAM + image.size] = image
    model = sim.memory.copy()
    CommandModel(config, model).run(PROGRAM)
    sim.run_program(PROGRAM, len(commands))
    assert np.array_equal(sim.memory, model)
    return sim.counters()


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize("opcodes", [ENCODED + RAW, RAW + ENCODED], ids=lambda opcodes: opcodes[0].name)
@pytest.mark.parametrize("name", CONFIGS)
def test_side_by_side(name: str, opcodes: tuple[Opcode, ...], stall: float) -> None:
    """Both write what they write alone, at the same time; they share the bus, and neither starves."""
    config = CONFIGS[name]
    loaded, encoded, raw, both = (run(config, stall, program(config, some)) for some in ((), ENCODED, RAW, opcodes))
    for counter in ("write_beats", "plain_write_bits_activation", "plain_write_bits_optimizer"):
        assert both[counter] == encoded[counter] + raw[counter] > 0
    alone = [encoded["store_busy"], raw["store_raw_busy"]]
    together = [both["store_busy"], both["store_raw_busy"]]
    cycles = both["cycles"] - loaded["cycles"]
    print(f"{alone} alone, {together} together, in {cycles} cycles, {both['write_beats']} words")
    assert sum(together) - cycles > 0.9 * alone[0], "not side by side"
    if not stall:
        assert cycles < 1.04 * both["write_beats"], "the bus stands still"
    # STORE asks for four blocks ahead: one of them waits for what STORE_RAW has asked for, a burst and two rows.
    waiting = ROWS * config.beat / 64 / 4 * (config.burst_beats + 2 * 32 * config.beat / config.axi_bits)
    assert together[0] < alone[0] + waiting / (1 - stall), "STORE starves"
