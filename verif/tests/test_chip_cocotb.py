"""The whole chip under cocotb, see `verif/chip_tb.py`."""

from dataclasses import asdict

from lnpu.chip import Chip
from lnpu.config import TINY
from verif.runner import run


def test_chip() -> None:
    run(Chip(config=TINY), "verif.chip_tb", config=asdict(TINY))
