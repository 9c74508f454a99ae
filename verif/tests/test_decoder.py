import pytest

from lnpu.config import TINY, ChipConfig
from lnpu.fgmp.decoder import Decoder
from verif.runner import run

SHAPES = [(64, 4), (128, 4), (128, 8), (64, 8), (256, 8), (256, 16), (64, 16)]


@pytest.mark.parametrize(("axi_bits", "beat"), SHAPES)
def test_decoder(axi_bits: int, beat: int) -> None:
    shape = {"axi_bits": axi_bits, "beat": beat, "lanes": 16}
    run(Decoder(config=TINY.replace(**shape)), "verif.decoder_tb", config=shape)


def test_suffix() -> None:
    assert Decoder(config=ChipConfig()).module_name == "lnpu_decoder_64_4"
