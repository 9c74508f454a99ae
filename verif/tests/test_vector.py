"""Vector memory and vector unit."""

import gc

import pytest

from lnpu.config import TINY
from lnpu.mem.skid_buffer import SkidBuffer
from lnpu.vector.vector_memory import VectorMemory
from lnpu.vector.vector_unit import VectorUnit
from verif.runner import run

MEMORIES = {"power_of_two": {"vmem_rows": 256}, "odd": {"vmem_rows": 300, "beat": 8, "vmem_banks": 8}}
UNITS = {"beat4": ({"sum_rows": 24}, 12), "beat8": ({"beat": 8, "sum_rows": 16, "acc_bits": 100}, 3)}


@pytest.mark.parametrize("changes", MEMORIES.values(), ids=MEMORIES)
def test_vector_memory(changes):
    run(VectorMemory(config=TINY.replace(**changes)), "verif.vector_memory_tb", config=changes)


@pytest.mark.parametrize(("changes", "rounds"), UNITS.values(), ids=UNITS)
def test_vector_unit(changes, rounds):
    run(VectorUnit(config=TINY.replace(**changes)), "verif.vector_unit_tb", config=changes, rounds=rounds)


@pytest.mark.filterwarnings("ignore::amaranth.hdl.UnusedElaboratable")
def test_skid_buffer_width():
    with pytest.raises(ValueError, match="width must be at least 1, not 0"):
        SkidBuffer(width=0)
    gc.collect()  # the object goes while its warning is ignored
