"""Tests of the AXI masters."""

from dataclasses import asdict

import pytest

from lnpu.bus.axi_reader import AxiReader
from lnpu.bus.axi_writer import AxiWriter
from lnpu.config import PAPER, TINY
from verif.runner import run

CONFIGS = {
    "tiny": TINY,
    "paper": PAPER,
    # The smallest numbers, and bursts that only the 4 KiB rule limits.
    "single": TINY.replace(address_bits=32, reads_in_flight=1, writes_in_flight=1, burst_beats=4),
    "wide": PAPER.replace(axi_bits=128, burst_beats=256, reads_in_flight=3, writes_in_flight=3),
}


@pytest.mark.parametrize(("name", "clients"), [("tiny", 3), ("paper", 3), ("single", 2), ("wide", 1)])
def test_axi_reader(name: str, clients: int) -> None:
    config = CONFIGS[name]
    run(AxiReader(config=config, clients=clients), "verif.axi_reader_tb", config=asdict(config), clients=clients)


@pytest.mark.parametrize(("name", "clients"), [("tiny", 4), ("paper", 2), ("single", 3), ("wide", 1)])
def test_axi_writer(name: str, clients: int) -> None:
    config = CONFIGS[name]
    run(AxiWriter(config=config, clients=clients), "verif.axi_writer_tb", config=asdict(config), clients=clients)
