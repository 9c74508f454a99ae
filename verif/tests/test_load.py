import pytest

from lnpu.config import TINY
from lnpu.mem.load import LoadUnit
from verif.runner import run

SHAPES = {
    "tiny": {},
    "middle": {"axi_bits": 128, "beat": 8, "lanes": 16, "cores": 3, "depth": 128, "vmem_rows": 5000},
    "wide": {"axi_bits": 256, "beat": 16, "lanes": 32, "cores": 16, "address_bits": 36, "rows": 128},
    "slow": {"axi_bits": 64, "beat": 16, "lanes": 16, "cores": 1, "address_bits": 32, "vmem_rows": 65536},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_load(shape: str) -> None:
    run(LoadUnit(config=TINY.replace(**SHAPES[shape])), "verif.load_tb", config=SHAPES[shape])


@pytest.mark.parametrize("shape", ["tiny", "wide"])
def test_load_dense(shape: str) -> None:
    run(LoadUnit(config=TINY.replace(**SHAPES[shape]), dense=True), "verif.load_dense_tb", config=SHAPES[shape])
