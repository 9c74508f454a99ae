"""Tests of the registers, the counters and the command processor."""

from dataclasses import asdict

import pytest

from lnpu.config import EDGE, PAPER, TINY
from lnpu.ctrl.command_processor import CommandProcessor
from lnpu.ctrl.command_queue import CommandQueue
from lnpu.ctrl.counters import COUNTERS, Counters
from lnpu.ctrl.registers import COUNTER_BASE, REGISTERS, Registers, register_table
from verif.runner import run

CONFIGS = {
    "tiny": TINY,
    "edge": EDGE,
    "paper": PAPER,
    "half": TINY.replace(beat=8, axi_bits=128, cores=16, address_bits=32, tensor_states=16),
}


@pytest.mark.parametrize("name", ["tiny", "half"])
def test_registers(name: str) -> None:
    config = CONFIGS[name]
    run(Registers(config=config), "verif.registers_tb", config=asdict(config))


@pytest.mark.parametrize("name", ["edge", "paper"])
def test_counters(name: str) -> None:
    config = CONFIGS[name]
    run(Counters(config=config), "verif.counters_tb", inside=True, config=asdict(config))


@pytest.mark.parametrize("name", ["tiny", "paper", "half"])
def test_command_processor(name: str) -> None:
    config = CONFIGS[name]
    run(CommandProcessor(config=config), "verif.command_processor_tb", config=asdict(config))


def test_command_queue() -> None:
    run(CommandQueue(), "verif.command_queue_tb")


def test_register_table() -> None:
    """Fields do not overlap, offsets are unique and below the counters, and the documentation has every line."""
    offsets = [register.offset for register in REGISTERS.values()]
    assert len(set(offsets)) == len(offsets)
    assert all(offset % 4 == 0 and offset < COUNTER_BASE for offset in offsets)
    for register in REGISTERS.values():
        masks = [((1 << field.width) - 1) << field.low for field in register.fields]
        assert sum(masks) <= 0xFFFFFFFF
        assert all(a & b == 0 for i, a in enumerate(masks) for b in masks[:i])
    lines = register_table().splitlines()
    assert len(lines) == 2 + sum(len(register.fields) for register in REGISTERS.values()) + len(COUNTERS)
