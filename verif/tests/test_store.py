"""STORE and STORE_RAW units, see `verif/plans/store.md` and `verif/plans/store_raw.md`."""

import pytest

from lnpu.config import TINY, ChipConfig
from lnpu.mem.store import StoreUnit
from lnpu.mem.store_raw import StoreRawUnit
from verif.runner import run

CONFIGS = [
    TINY,
    ChipConfig(axi_bits=128, address_bits=32),
    ChipConfig(beat=8, axi_bits=64, address_bits=36),
    ChipConfig(beat=16, lanes=16, axi_bits=256),
]


def run_bench(unit: StoreUnit | StoreRawUnit, testbench: str) -> None:
    """Run the bench of one of the units with what it needs of the configuration."""
    names = ("beat", "axi_bits", "address_bits", "burst_beats")
    run(unit, testbench, **{name: getattr(unit.config, name) for name in names})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.beat}x{config.axi_bits}")
def test_store(config):
    run_bench(StoreUnit(config=config), "verif.store_tb")


@pytest.mark.parametrize(
    "config",
    [*CONFIGS, ChipConfig(beat=16, lanes=16, burst_beats=4)],
    ids=lambda config: f"{config.beat}x{config.axi_bits}",
)
def test_store_raw(config):
    run_bench(StoreRawUnit(config=config), "verif.store_raw_tb")
