"""The netlists of PE, encoder and decoder pass the same testbenches as their RTL; all of them under `make gates`."""

import os

import pytest

from lnpu.config import TINY
from lnpu.fgmp.decoder import Decoder
from lnpu.fgmp.encoder import Encoder
from lnpu.pe.pe import Pe
from lnpu.synth.liberty import OSU018, read_liberty
from verif.runner import run

LIBERTY = os.environ.get("LIBERTY") or None
pytestmark = pytest.mark.skipif(
    not (LIBERTY or OSU018.exists()), reason="no cell library: apt-get install qflow-tech-osu018, or set LIBERTY="
)
WHOLE = bool(os.environ.get("GATES"))
"""Everything that the RTL passes, see `make gates`."""


@pytest.fixture(scope="module")
def gates():
    return read_liberty(LIBERTY)


def pe_bench(**options):
    products, step = (6000, 1) if WHOLE else (300, 29)
    return run(Pe(acc_bits=97), "verif.pe_tb", acc_bits=97, products=products, step=step, **options)


def test_pe(gates):
    pe_bench(gates=gates)


def test_encoder(gates):
    run(Encoder(config=TINY), "verif.encoder_tb", beat=TINY.beat, axi_bits=TINY.axi_bits, gates=gates)


def test_decoder(gates):
    shape = {"axi_bits": TINY.axi_bits, "beat": TINY.beat}
    only = None if WHOLE else r"every_mode|random_stalls|framing|masks|payloads|garbage|throughput"
    run(Decoder(config=TINY), "verif.decoder_tb", config=shape, gates=gates, only=only)


@pytest.mark.skipif(bool(LIBERTY), reason="names cells of osu018")
def test_swapped_cell_is_found(gates):
    with pytest.raises(AssertionError, match=r"verif\.pe_tb: .* failed"):
        pe_bench(gates=gates, swap=("NAND2X1", "NOR2X1"), only="fp16_corners")
    with pytest.raises(ValueError, match=r"no cell 'NAND9X1', but .*NAND2X1"):
        pe_bench(gates=gates, swap=("NAND9X1", "NOR2X1"))
