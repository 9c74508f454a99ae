"""Blocks that can go through the flow alone."""

from collections.abc import Callable

from lnpu.chip import Chip
from lnpu.config import ChipConfig
from lnpu.core.core import Core
from lnpu.core.drain import Drain
from lnpu.ctrl.command_processor import CommandProcessor
from lnpu.ctrl.counters import Counters
from lnpu.fgmp.controller import FgmpController
from lnpu.hdl import Block
from lnpu.mem.load import LoadUnit
from lnpu.mem.store import StoreUnit
from lnpu.mem.store_raw import StoreRawUnit
from lnpu.pe.pe_line import PeLine
from lnpu.vector.vector_memory import VectorMemory
from lnpu.vector.vector_unit import VectorUnit

__all__ = ["BLOCKS", "make_block"]

BLOCKS: dict[str, Callable[[ChipConfig], Block]] = {
    "chip": lambda config: Chip(config=config),
    "core": lambda config: Core(config=config),
    "line": lambda config: PeLine(lanes=config.lanes, acc_bits=config.acc_bits),
    "drain": lambda config: Drain(config=config),
    "load": lambda config: LoadUnit(config=config),
    "store": lambda config: StoreUnit(config=config),
    "store_raw": lambda config: StoreRawUnit(config=config),
    "vector": lambda config: VectorUnit(config=config),
    "vmem": lambda config: VectorMemory(config=config),
    "fgmp": lambda config: FgmpController(config=config),
    "processor": lambda config: CommandProcessor(config=config),
    "counters": lambda config: Counters(config=config),
}
"""Makers of the blocks, by the names of their instances in the chip."""


def make_block(config: ChipConfig, name: str) -> Block:
    """The named block of a chip; `ValueError` lists the names if there is none."""
    if name not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, not {name!r}")
    return BLOCKS[name](config)
