"""The DL core and its parts."""

import pytest

from lnpu.config import TINY, ChipConfig
from lnpu.core.core import Core
from lnpu.core.dense_buffer import DenseBuffer
from lnpu.core.gated_core import GatedCore
from lnpu.core.mask_store import MaskStore
from lnpu.core.sparse_buffer import SparseBuffer
from lnpu.core.zero_skip import ZeroSkip
from verif.core_twins import CoreTwins
from verif.runner import run

SHAPES = {
    "tiny": {},
    "odd": {  # nothing is a power of two
        "rows": 24, "depth": 48, "dense_rows": 56, "dense_banks": 2, "lanes": 24, "beat": 8, "psum_rows": 19,
        "acc_bits": 90, "buffer_registers": True,
    },
    "registered": {"buffer_registers": True},
    "least": {"rows": 16, "depth": 16, "dense_rows": 16, "lanes": 4, "beat": 4, "psum_rows": 16, "cores": 1},
    "single": {"rows": 16, "depth": 16, "dense_rows": 16, "lanes": 16, "beat": 16, "psum_rows": 16},
}  # fmt: skip

GATE = ("lnpu_clock_gate.enable",)


@pytest.mark.parametrize("banks", [2, 4])
@pytest.mark.parametrize("depth, visits", [(64, 400), (16, 300), (128, 150), (48, 150)])
def test_zero_skip(depth, visits, banks):
    config = {"depth": depth, "dense_rows": 128, "dense_banks": banks}
    run(ZeroSkip(config=ChipConfig(**config)), "verif.zero_skip_tb", config=config, visits=visits)


@pytest.mark.parametrize("shape", ["tiny", "odd", "single"])
def test_sparse_buffer(shape):
    config = ChipConfig(**SHAPES[shape])
    run(SparseBuffer(config=config), "verif.sparse_buffer_tb", config=SHAPES[shape], cycles=3000)


@pytest.mark.parametrize("shape", ["tiny", "odd", "single"])
def test_dense_buffer(shape):
    config = ChipConfig(**SHAPES[shape])
    enables = [f"lnpu_sram_1r1w.{port}_en" for port in "wr"]
    run(DenseBuffer(config=config), "verif.dense_buffer_tb", inside=enables, config=SHAPES[shape], cycles=3000)


@pytest.mark.parametrize("shape", ["tiny", "odd", "single"])
def test_mask_store(shape):
    config = ChipConfig(**SHAPES[shape])
    run(MaskStore(config=config), "verif.mask_store_tb", config=SHAPES[shape], cycles=5000)


@pytest.mark.parametrize("shape", ["tiny", "odd", "least", "registered"])
def test_core(shape):
    commands = 120 if shape in ("tiny", "registered") else 60
    run(Core(config=ChipConfig(**SHAPES[shape])), "verif.core_tb", config=SHAPES[shape], commands=commands)


def test_gated_core():
    """Everything that a core does, through the clock gate."""
    run(GatedCore(config=ChipConfig(**SHAPES["least"])), "verif.core_tb", config=SHAPES["least"], commands=60)


@pytest.mark.parametrize("shape", ["tiny", "least"])
def test_twins(shape):
    config = SHAPES[shape]
    run(CoreTwins(config=ChipConfig(**config)), "verif.gated_core_tb", inside=GATE, config=config, cycles=20_000)


@pytest.mark.parametrize("without", ["busy", "command", "fill_sparse", "fill_dense", "psum_request"])
def test_every_cause_is_needed(without):
    """A gate that lacks a cause is found out. (Not so `reset`: registers of a simulation begin as after one.)"""
    twins = CoreTwins(config=ChipConfig(**SHAPES["least"]), without=without)
    with pytest.raises(AssertionError, match="twins failed"):
        run(twins, "verif.gated_core_tb", inside=GATE, config=SHAPES["least"], cycles=3000, without=without)


def test_shapes():
    assert ChipConfig(**SHAPES["tiny"]).replace(name="tiny") == TINY
