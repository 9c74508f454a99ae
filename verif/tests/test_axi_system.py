"""The AXI interconnect and the RAM of the example system."""

from pathlib import Path

from verif.axi_system import AxiSystem
from verif.runner import run

SOC = Path(__file__).parent.parent.parent / "examples" / "soc"


def test_axi_system():
    sources = [SOC / "axi_interconnect.v", SOC / "axi_ram.v"]
    run(AxiSystem(log2_bytes=13), "verif.axi_system_tb", inside=True, sources=sources, log2_bytes=13)
