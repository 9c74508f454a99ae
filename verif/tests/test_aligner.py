import pytest

from lnpu.config import TINY
from lnpu.mem.aligner import Aligner
from verif.runner import run


@pytest.mark.parametrize("axi_bits", [64, 128, 256])
def test_aligner(axi_bits: int) -> None:
    shape = {"axi_bits": axi_bits, "beat": 16, "lanes": 16}
    run(Aligner(config=TINY.replace(**shape)), "verif.aligner_tb", config=shape)
