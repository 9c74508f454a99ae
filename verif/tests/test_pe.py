"""The processing element and the line of them, bit for bit against Python integers."""

import gc

import pytest

from lnpu.pe.pe import Pe
from lnpu.pe.pe_line import PeLine
from verif.runner import run


@pytest.mark.parametrize("acc_bits, products, step", [(97, 6000, 1), (84, 2000, 7), (128, 1000, 13)])
def test_pe(acc_bits, products, step):
    run(Pe(acc_bits=acc_bits), "verif.pe_tb", acc_bits=acc_bits, products=products, step=step)


@pytest.mark.filterwarnings("ignore::amaranth.hdl.UnusedElaboratable")
@pytest.mark.parametrize("acc_bits", [83, 0])
def test_pe_rejects_narrow_accumulators(acc_bits):
    with pytest.raises(ValueError, match=f"at least 84, not {acc_bits}"):
        Pe(acc_bits=acc_bits)
    gc.collect()  # here, where its warning that it was never used is ignored


@pytest.mark.parametrize("lanes, cycles", [(1, 500), (8, 500)])
def test_pe_line(lanes, cycles):
    run(PeLine(lanes=lanes, acc_bits=97), "verif.pe_line_tb", inside=True, lanes=lanes, acc_bits=97, cycles=cycles)
