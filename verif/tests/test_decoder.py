import numpy as np
import pytest

from golden import memory
from lnpu.config import TINY
from lnpu.fgmp.decoder import Decoder
from verif import decoder_tb
from verif.runner import run

SHAPES = [(64, 4), (128, 4), (128, 8), (64, 8), (256, 8), (256, 16), (64, 16)]


@pytest.mark.parametrize(("axi_bits", "beat"), SHAPES)
def test_decoder(axi_bits: int, beat: int) -> None:
    shape = {"axi_bits": axi_bits, "beat": beat, "lanes": 16}
    run(Decoder(config=TINY.replace(**shape)), "verif.decoder_tb", config=shape)


def test_models_agree() -> None:
    """The testbench's encoder and decoder and the golden model are two readings of one page."""
    random = np.random.default_rng(5)
    for number in range(300):
        elements = decoder_tb.random_elements(random, number % 7 / 6, number % 5 / 4)
        raw = decoder_tb.encode_block(elements)
        decoded = decoder_tb.decode_block(raw)
        assert decoded is not None
        bits, codes = zip(*decoded, strict=True)
        assert memory.encode_block(bits, codes) == raw
        spoilt = bytearray(raw)
        spoilt[int(random.integers(len(raw)))] ^= 1 << int(random.integers(8))
        for part in (bytes(spoilt), bytes(spoilt)[:-1], bytes(spoilt) + raw[:1], raw[: int(random.integers(len(raw)))]):
            try:
                theirs = list(zip(*(array.tolist() for array in memory.decode_block(part)), strict=True))
            except memory.DecodeError:
                theirs = None
            assert decoder_tb.decode_block(part) == theirs
