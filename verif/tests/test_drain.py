"""The DRAIN unit in several shapes of chip."""

from dataclasses import asdict

import pytest

from lnpu.config import TINY
from lnpu.core.drain import Drain
from lnpu.fp.accumulator_round import AccumulatorRound
from verif.runner import run

CONFIGS = {
    "tiny": TINY,
    "wide": TINY.replace(cores=3, lanes=24, psum_rows=21),
    "one-beat": TINY.replace(cores=1, lanes=8, beat=8, psum_rows=16, acc_bits=84),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_drain(name):
    config = CONFIGS[name]
    # Busy beside a cycle a beat: check, first request, selection, rounding, write.
    latency = 4 + AccumulatorRound.LATENCY
    run(Drain(config=config), "verif.drain_tb", config=asdict(config), commands=160, latency=latency)
